//! Fetches: the reads of packs that a keeper planned, verified block by block.

use std::collections::BTreeMap;

use bytes::Bytes;
use heeler_core::ids::{BLOCK_BYTES, OpId, ShardId};
use heeler_core::keeper::PackRead;
use heeler_core::time::{Duration, Instant};
use heeler_hw::crc32c;

use super::StoreAnswer;
use crate::mail::FetchedPiece;

/// How long a read that fails is tried again before its fetch fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Wait before a failed read is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Tries of a read whose bytes do not match their checksums, or whose pack is missing.
const WRONG_MAX: u32 = 3;

/// A ranged read of a pack that is under way or waits to be tried again.
#[derive(Debug)]
pub(super) struct Read {
    fetch: u64,
    pub(super) plan: PackRead,
    since: Instant,
    wrong: u32,
}

/// The answer to a shard.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) shard: ShardId,
    pub(super) op: OpId,
    pub(super) pieces: Option<Vec<FetchedPiece>>,
}

#[derive(Debug)]
struct Fetch {
    answer: Answer,
    left: usize,
}

/// The fetches under way.
#[derive(Debug, Default)]
pub(super) struct Fetches {
    fetches: BTreeMap<u64, Fetch>,
    next: u64,
    /// Reads that failed, by the time they are due.
    waiting: Vec<(Instant, Read)>,
}

impl Fetches {
    /// Begins a fetch of at least one read; each must be sent to the store.
    pub(super) fn begin(
        &mut self,
        now: Instant,
        (shard, op): (ShardId, OpId),
        reads: Vec<PackRead>,
    ) -> Vec<Read> {
        let fetch = self.next;
        self.next += 1;
        let answer = Answer { shard, op, pieces: Some(Vec::new()) };
        self.fetches.insert(fetch, Fetch { answer, left: reads.len() });
        reads.into_iter().map(|plan| Read { fetch, plan, since: now, wrong: 0 }).collect()
    }

    /// The store's answer to a read. `Some` if that was the last one of its fetch.
    pub(super) fn handle(
        &mut self,
        now: Instant,
        mut read: Read,
        answer: StoreAnswer,
    ) -> Option<Answer> {
        let failure = match answer {
            StoreAnswer::Got(bytes) => match pieces(&read.plan, &bytes) {
                Ok(pieces) => return self.end(read.fetch, Some(pieces)),
                Err(why) => why,
            },
            StoreAnswer::Failed { transient: true, .. } if now - read.since < PATIENCE => {
                self.waiting.push((now + RETRY_AFTER, read));
                return None;
            }
            StoreAnswer::Failed { text, .. } => {
                log::error!("a fetch fails: {text}");
                return self.end(read.fetch, None);
            }
            _ => "is missing in the store".into(),
        };
        read.wrong += 1;
        if read.wrong < WRONG_MAX {
            log::warn!("pack {} {failure}; trying again", read.plan.key);
            self.waiting.push((now + RETRY_AFTER, read));
            return None;
        }
        log::error!("pack {} {failure}; run `heeler check`", read.plan.key);
        self.end(read.fetch, None)
    }

    /// A read whose time has come.
    pub(super) fn poll_due(&mut self, now: Instant) -> Option<Read> {
        let index = self.waiting.iter().position(|(due, _)| *due <= now)?;
        Some(self.waiting.swap_remove(index).1)
    }

    /// When to come back.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.waiting.iter().map(|(due, _)| *due).min()
    }

    fn end(&mut self, number: u64, pieces: Option<Vec<FetchedPiece>>) -> Option<Answer> {
        let fetch = self.fetches.get_mut(&number).expect("a fetch ends with its last read");
        match (&mut fetch.answer.pieces, pieces) {
            (Some(all), Some(mut pieces)) => all.append(&mut pieces),
            (all, _) => *all = None,
        }
        fetch.left -= 1;
        if fetch.left > 0 {
            return None;
        }
        self.fetches.remove(&number).map(|fetch| fetch.answer)
    }
}

/// The wanted blocks of a read, each compared with its checksum.
fn pieces(plan: &PackRead, bytes: &Bytes) -> Result<Vec<FetchedPiece>, String> {
    if bytes.len() != plan.len as usize {
        return Err(format!("gave {} bytes of {} asked for", bytes.len(), plan.len));
    }
    let mut pieces = Vec::with_capacity(plan.parts.len());
    for part in &plan.parts {
        let from = part.at as usize * BLOCK_BYTES;
        let part_bytes = bytes.slice(from..from + part.crcs.len() * BLOCK_BYTES);
        for (index, (block, crc)) in part_bytes.chunks(BLOCK_BYTES).zip(&part.crcs).enumerate() {
            if crc32c(0, block) != *crc {
                let at = plan.offset + (from + index * BLOCK_BYTES) as u64;
                return Err(format!("has a damaged block at byte {at}"));
            }
        }
        pieces.push(FetchedPiece { at: part.first, bytes: part_bytes });
    }
    Ok(pieces)
}
