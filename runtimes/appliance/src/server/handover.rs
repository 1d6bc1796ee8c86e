//! Volumes that come and go while the server runs: attach, detach, forget.

use std::rc::Rc;

use heeler_core::ids::Epoch;
use heeler_core::wire::names::Uuid;
use heeler_driver::control::{Event, Geometry, VolumeStatus};
use heeler_store::{lineage, volumes};

use super::{Lines, PROGRESS_EVERY, Server};
use crate::api::Purged;
use crate::lines::bytes;
use crate::size::Size;

impl Server {
    /// Whether it is still open how a volume's claim ends.
    pub(super) fn is_settling(&self, status: &VolumeStatus) -> bool {
        status.state == "starting" || self.settling.borrow().contains(&status.uuid)
    }

    fn status_of(&self, volume: Uuid) -> Option<VolumeStatus> {
        self.control.borrow().volumes().into_iter().find(|status| status.uuid == volume)
    }

    /// Waits until a volume is served; else the reason.
    pub(super) async fn served(&self, volume: Uuid, name: &str) -> Result<(), String> {
        loop {
            let status = self.status_of(volume);
            let status = status.ok_or_else(|| format!("volume '{name}' was removed"))?;
            if self.is_settling(&status) {
                self.changed.notified().await;
                continue;
            }
            if status.is_served() {
                return Ok(());
            }
            return Err(status.reason.unwrap_or_else(|| format!("it is {}", status.state)));
        }
    }

    /// Claims a volume of the store and serves it.
    pub(super) async fn attach(&self, name: &str, takeover: bool) -> Result<(), String> {
        let head = volumes::named_head(&self.store, name).await.map_err(|e| e.to_string())?;
        let volume = head.volume;
        let dirty_blocks = match self.status_of(volume) {
            Some(status) if status.is_stranded() => self.dirty_map(&status).await.blocks(),
            _ => 0,
        };
        let now = self.now();
        self.control.borrow_mut().attach(now, volume, name, takeover, dirty_blocks)?;
        self.wake.notify_one();
        let served = self.served(volume, name).await;
        served.map_err(|reason| format!("volume '{name}' is not served: {reason}"))
    }

    /// Gives a volume up, and says how far it is. If the client goes meanwhile, it is kept.
    pub(super) async fn detach(&self, name: &str, out: &mut Lines) -> Result<(), String> {
        let status = self.find(name);
        let status = status.ok_or_else(|| format!("this server has no volume '{name}'"))?;
        if status.state == "detached" {
            return Ok(());
        }
        let ordered = self.control.borrow_mut().detach(self.now(), status.uuid);
        let ticket = ordered.map_err(|e| format!("volume '{name}' cannot be detached: {e}"))?;
        let mut done = self.wait_for(ticket);
        let which = [status];
        let mut progress = self.progress_of(&which).await;
        let event = loop {
            tokio::select! {
                event = &mut done => break event,
                () = tokio::time::sleep(PROGRESS_EVERY) => {
                    let (stored, backlog) = self.how_far(&which);
                    if let Err(e) = out.send(&progress.of(stored, backlog)).await {
                        log::info!("volume {name}: whoever wanted it detached has gone");
                        // If it is too late, it is detached.
                        let _ = self.stay(name);
                        return Err(e);
                    }
                }
            }
        };
        if matches!(event, Ok(Event::Detached { detached: true, .. })) {
            return Ok(());
        }
        let status = self.find(name);
        let state = status.as_ref().map_or("gone", |status| status.state);
        let reason = status.as_ref().and_then(|status| status.reason.as_deref());
        let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
        Err(format!("volume '{name}' was not detached: it is {state}{reason}"))
    }

    /// Calls a detach off.
    pub(super) fn stay(&self, name: &str) -> Result<(), String> {
        let status = self.find(name);
        let status = status.ok_or_else(|| format!("this server has no volume '{name}'"))?;
        let kept = self.control.borrow_mut().stay(self.now(), status.uuid);
        self.wake.notify_one();
        kept.map_err(|e| format!("volume '{name}': {e}"))
    }

    /// Drops what the cache holds of a volume that is not served.
    pub(super) async fn forget(&self, name: &str, force: bool) -> Result<Purged, String> {
        let status = self.find(name);
        let status = status.ok_or_else(|| format!("this server has no volume '{name}'"))?;
        if status.is_served() {
            return Err(format!(
                "volume '{name}' is served: detach it first, with `heeler volume detach {name}`"
            ));
        }
        let dirty = if status.is_stranded() {
            self.dirty_map(&status).await.blocks()
        } else {
            self.control.borrow().logged_blocks(status.uuid)
        };
        if dirty > 0 && !force {
            return Err(format!(
                "the cache holds {} of '{name}' that were never pushed: save them with `heeler \
                 volume salvage {name} FILE`, or drop them for ever with --force",
                Size(bytes(dirty))
            ));
        }
        let forgotten = self.control.borrow_mut().forget_volume(status.uuid);
        forgotten.map_err(|e| format!("volume '{name}' cannot be forgotten: {e}"))?;
        // The shards drop it in the turn in which they hear of it: whoever asks next finds it gone.
        self.report().await;
        Ok(Purged { dirty_bytes: bytes(dirty), clean_bytes: 0 })
    }

    /// Finds out what is dirty of a volume that was refused because the image has moved on. If it
    /// turns out that nothing is, it is claimed like any other.
    pub(super) fn settle_stale(self: &Rc<Self>, volume: Uuid) {
        self.settling.borrow_mut().insert(volume);
        let this = self.clone();
        drop(tokio::task::spawn_local(async move {
            if let Err(e) = this.name_dirty(volume).await {
                log::error!("what the cache holds of volume {volume} cannot be told: {e}");
                this.status_of(volume).iter().for_each(&this.on_served);
            }
            this.settling.borrow_mut().remove(&volume);
            this.changed.notify_waiters();
        }));
    }

    async fn name_dirty(&self, volume: Uuid) -> Result<(), String> {
        let claims = self.control.borrow().claims(volume);
        let next = lineage::claim_after(&self.store, volume, &claims).await;
        let (head, committed) = match next.map_err(|e| e.to_string())? {
            Some(head) => (head.clone(), head.epoch),
            None => {
                // All that was dirty when it was written counts.
                let newest = volumes::newest_head(&self.store, volume).await;
                let newest = newest.map_err(|e| e.to_string())?;
                (newest.ok_or("the store has no head of it")?, Epoch::ZERO)
            }
        };
        let geometry = Geometry { blocks: head.blocks, object_shift: head.object_shift };
        self.control.borrow_mut().take_in(volume, geometry, committed);
        self.wake.notify_one();
        let Some(status) = self.status_of(volume) else { return Ok(()) };
        let dirty_blocks = self.dirty_map(&status).await.blocks();
        self.control.borrow_mut().attach(self.now(), volume, &status.name, false, dirty_blocks)?;
        self.wake.notify_one();
        while self.status_of(volume).is_some_and(|status| status.state == "starting") {
            self.changed.notified().await;
        }
        Ok(())
    }
}
