//! Pushes on demand, how far they are, and how the store keeps up.

use heeler_driver::control::{Event, VolumeStatus};
use heeler_driver::mail::ShardStatus;

use super::{Lines, PROGRESS_EVERY, Server, dirty_of};
use crate::api::{Answer, PushInfo};
use crate::lines::bytes;

/// Bytes of blocks that a volume's pushes have brought to the store since it was claimed.
fn stored_bytes(volume: &VolumeStatus) -> u64 {
    let running = volume.keeper.push_bytes - volume.keeper.backlog_bytes;
    volume.keeper.pushed_bytes + running
}

/// How far pushes are. What clients write meanwhile can make more of it, never less.
#[derive(Debug)]
pub(super) struct Progress {
    /// Stored when the push was asked for, and what was to be stored then.
    stored_bytes: u64,
    total_bytes: u64,
}

impl Progress {
    /// What is done and what there is to do by now, if so much is stored and so much of the running
    /// pushes is not.
    pub(super) fn of(&mut self, stored_bytes: u64, backlog_bytes: u64) -> Answer {
        let done_bytes = stored_bytes.saturating_sub(self.stored_bytes);
        self.total_bytes = self.total_bytes.max(done_bytes + backlog_bytes);
        Answer::Progress { done_bytes, total_bytes: self.total_bytes }
    }
}

impl Server {
    /// Pushes volumes and says how far it is.
    pub(super) async fn push(&self, which: &[VolumeStatus], out: &mut Lines) -> Result<(), String> {
        let mut progress = self.progress_of(which).await;
        let mut waiting = Vec::new();
        for volume in which {
            let ticket = self.control.borrow_mut().push(self.now(), volume.uuid);
            if let Some(ticket) = ticket {
                waiting.push((volume, self.wait_for(ticket)));
            }
        }
        let mut failed = Vec::new();
        for (volume, mut done) in waiting {
            let event = loop {
                tokio::select! {
                    event = &mut done => break event,
                    () = tokio::time::sleep(PROGRESS_EVERY) => {
                        let (stored, backlog) = self.how_far(which);
                        out.send(&progress.of(stored, backlog)).await?;
                    }
                }
            };
            if !matches!(event, Ok(Event::Pushed { committed: true, .. })) {
                let status = self.find(&volume.name);
                let state = status.as_ref().map_or("gone", |status| status.state);
                let reason = status.as_ref().and_then(|status| status.reason.as_deref());
                let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
                failed.push(format!(
                    "volume '{}' was not pushed: it is {state}{reason}",
                    volume.name
                ));
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(failed.join("\n")) }
    }

    /// A push of these volumes begins.
    pub(super) async fn progress_of(&self, which: &[VolumeStatus]) -> Progress {
        let shards = self.report_shards().await;
        let still = |volume| self.still_to_put(volume, &shards);
        Progress {
            stored_bytes: which.iter().map(stored_bytes).sum(),
            total_bytes: which.iter().map(still).sum(),
        }
    }

    /// What these volumes have stored, and what of their running pushes is not.
    pub(super) fn how_far(&self, which: &[VolumeStatus]) -> (u64, u64) {
        let now = self.control.borrow().volumes();
        let of_these = now.iter().filter(|now| which.iter().any(|volume| volume.uuid == now.uuid));
        of_these.fold((0, 0), |(stored, backlog), volume| {
            (stored + stored_bytes(volume), backlog + volume.keeper.backlog_bytes)
        })
    }

    /// Dirty bytes of a volume that the store does not have at all. Those of the running push that
    /// it has stay dirty until the commit.
    fn still_to_put(&self, volume: &VolumeStatus, shards: &[ShardStatus]) -> u64 {
        let put = volume.keeper.push_bytes - volume.keeper.backlog_bytes;
        bytes(dirty_of(shards, volume.number)).saturating_sub(put)
    }

    /// How the pushes of a volume go.
    pub(super) fn push_info(&self, volume: &VolumeStatus, shards: &[ShardStatus]) -> PushInfo {
        let now = self.now();
        let keeper = &volume.keeper;
        let backlog_bytes = self.still_to_put(volume, shards);
        let rate = self.control.borrow().put_rate(now, volume.uuid);
        PushInfo {
            phase: keeper.phase.to_string(),
            backlog_bytes,
            backlog_seconds: seconds_left(backlog_bytes, rate),
            bytes_per_second: rate,
            dirty_seconds: keeper.dirty_since.map_or(0, |since| (now - since).0 / 1_000_000_000),
            retrying: keeper.retrying as u64,
            last_failure: volume.last_failure.clone(),
            pushed_bytes: keeper.pushed_bytes,
            put_bytes: keeper.put_bytes,
        }
    }
}

/// How long so much takes; `None`: nobody knows.
fn seconds_left(bytes: u64, bytes_per_second: u64) -> Option<u64> {
    if bytes == 0 { Some(0) } else { bytes.div_ceil(4096).checked_div(bytes_per_second / 4096) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_never_goes_back() {
        let mut progress = Progress { stored_bytes: 100, total_bytes: 50 };
        let mut at = |stored, backlog| match progress.of(stored, backlog) {
            Answer::Progress { done_bytes, total_bytes } => (done_bytes, total_bytes),
            other => panic!("{other:?}"),
        };
        assert_eq!(at(100, 30), (0, 50), "the next push has the other 20");
        assert_eq!(at(130, 0), (30, 50));
        assert_eq!(at(130, 40), (30, 70), "more was written");
        assert_eq!(at(170, 0), (70, 70));
    }

    #[test]
    fn what_is_left_takes_as_long_as_at_the_rate_of_late() {
        assert_eq!(seconds_left(0, 0), Some(0));
        assert_eq!(seconds_left(1 << 20, 0), None);
        assert_eq!(seconds_left(10 << 20, 1 << 20), Some(10));
    }
}
