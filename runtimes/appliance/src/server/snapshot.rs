//! Snapshots and clones of volumes, for a server: its own volumes it changes itself, others in the
//! store.

use heeler_core::ids::BLOCK_BYTES;
use heeler_core::keeper::Edit;
use heeler_core::limits::MAP_PAGE_BLOCKS;
use heeler_core::wire::head::{Head, Source};
use heeler_core::wire::names::Uuid;
use heeler_driver::control::{Event, VolumeStatus};
use heeler_store::snapshots::{self, SnapshotName};
use heeler_store::volumes::{self, VolumeError};

use super::{Lines, PROGRESS_EVERY, Server, unix_secs};
use crate::api::{Answer, SnapshotLine};
use crate::snapshot;

impl Server {
    /// The volume of this name, if it is this server's to change.
    pub(super) fn own_volume(&self, name: &str) -> Option<VolumeStatus> {
        self.find(name).filter(|status| status.state == "served")
    }

    /// Changes a volume: by its keeper, or in the store if nobody owns it.
    pub(super) async fn edit_anywhere(&self, name: &str, edit: Edit) -> Result<(), VolumeError> {
        match self.own_volume(name) {
            Some(own) => self.edit(own.uuid, name, &edit).await.map_err(VolumeError::Owner),
            None => snapshots::edit(&self.store, name, unix_secs(), &edit).await,
        }
    }

    pub(super) async fn snapshot_create(&self, name: &SnapshotName) -> Result<(), String> {
        let edit = Edit::Snapshot(name.snapshot.clone());
        self.edit_anywhere(&name.volume, edit).await.map_err(snapshot::explain)
    }

    pub(super) async fn snapshot_list(&self, volume: &str) -> Result<Vec<SnapshotLine>, String> {
        let mut lines = snapshot::list(&self.store, volume).await.map_err(|e| e.to_string())?;
        let views = self.control.borrow().views();
        for line in &mut lines {
            let name = format!("{volume}@{}", line.name);
            let served = |view: &VolumeStatus| view.name == name && view.state == "served";
            line.served = views.iter().any(|(_, view)| served(view));
        }
        Ok(lines)
    }

    pub(super) async fn snapshot_delete(&self, name: &SnapshotName) -> Result<(), String> {
        // One at a time: else one could take away the mark on which another relies.
        let _alone = self.deletions.lock().await;
        let head = volumes::named_head(&self.store, &name.volume).await;
        let head = head.map_err(|e| e.to_string())?;
        let edit = async |edit| self.edit_anywhere(&name.volume, edit).await;
        let deleted = snapshots::delete(&self.store, name, unix_secs(), edit).await;
        deleted.map_err(snapshot::explain)?;
        if let Some(gone) = head.snapshots.iter().find(|known| known.name == name.snapshot) {
            self.stop_view(Source { volume: head.volume, number: gone.number })?;
        }
        Ok(())
    }

    /// Makes a volume what it was. One of this server is given up for that, and claimed anew.
    pub(super) async fn snapshot_rollback(
        &self,
        name: &SnapshotName,
        force: bool,
        out: &mut Lines,
    ) -> Result<(), String> {
        let own = self.own_volume(&name.volume);
        if own.is_some() {
            // Before clients are disconnected for nothing.
            snapshots::open(&self.store, name).await.map_err(|e| e.to_string())?;
            if !force {
                self.refuse_with_clients(&name.volume).await?;
            }
            self.detach(&name.volume, out).await?;
        }
        let done = snapshots::rollback(&self.store, name, unix_secs()).await;
        if own.is_some() {
            self.attach(&name.volume, false).await?;
        }
        done.map_err(snapshot::explain)
    }

    /// Copies what a clone shares with its parent, and says how far it is. Then nothing but its own
    /// snapshots holds its parent's.
    pub(super) async fn flatten(&self, name: &str, out: &mut Lines) -> Result<(), String> {
        let own = self.own_volume(name);
        let own = own.ok_or_else(|| format!("this server serves no volume '{name}'"))?;
        let head = volumes::named_head(&self.store, name).await.map_err(|e| e.to_string())?;
        if head.sources.is_empty() {
            return Err(format!("volume '{name}' is no clone: there is nothing to flatten"));
        }
        let ticket = self.control.borrow_mut().flatten(self.now(), own.uuid);
        let ticket = ticket.ok_or_else(|| format!("volume '{name}' was removed"))?;
        let mut done = self.wait_for(ticket);
        let event = loop {
            tokio::select! {
                event = &mut done => break event,
                () = tokio::time::sleep(PROGRESS_EVERY) => {
                    let pages = self.find(name).and_then(|status| status.keeper.flatten_pages);
                    let (total, left) = pages.unwrap_or((0, 0));
                    let bytes = |pages: u64| pages * (MAP_PAGE_BLOCKS * BLOCK_BYTES) as u64;
                    let (done_bytes, total_bytes) = (bytes(total - left), bytes(total));
                    out.send(&Answer::Progress { done_bytes, total_bytes }).await?;
                }
            }
        };
        if !matches!(event, Ok(Event::Pushed { committed: true, .. })) {
            return Err(format!("volume '{name}' was lost before it was flattened"));
        }
        for source in &head.sources {
            // Removes the records of who needs it no more.
            let swept = snapshots::clones(&self.store, source.volume, unix_secs()).await;
            swept.map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Makes a volume with the image of a snapshot, and serves it.
    pub(super) async fn clone_snapshot(
        &self,
        from: &SnapshotName,
        name: &str,
    ) -> Result<(), String> {
        let made = snapshots::clone(&self.store, from, name, unix_secs()).await;
        self.serve_made(&made.map_err(|e| e.to_string())?).await
    }

    /// Serves a snapshot, or does so no more.
    pub(super) async fn snapshot_serve(
        &self,
        name: &SnapshotName,
        stop: bool,
    ) -> Result<(), String> {
        let head = volumes::named_head(&self.store, &name.volume).await;
        let head = head.map_err(|e| e.to_string())?;
        let text = name.to_string();
        if stop {
            let views = self.control.borrow().views();
            let view = views.iter().find(|(_, view)| view.name == text);
            let (of, _) = view.ok_or_else(|| format!("'{text}' is not served"))?;
            return self.stop_view(*of);
        }
        let number = snapshots::find(&head, name).map_err(|e| e.to_string())?.number;
        let of = Source { volume: head.volume, number };
        self.control.borrow_mut().add_view(self.now(), of, &text)?;
        self.wake.notify_one();
        loop {
            let views = self.control.borrow().views();
            let view = views.into_iter().find(|(known, _)| *known == of);
            let (_, view) = view.ok_or_else(|| format!("'{text}' was removed"))?;
            match (view.state, view.reason) {
                ("starting", _) => self.changed.notified().await,
                ("served", _) => return Ok(()),
                (_, reason) => {
                    self.stop_view(of)?;
                    return Err(format!("'{text}' is not served: {}", reason.unwrap_or_default()));
                }
            }
        }
    }

    /// Serves the snapshots of a volume that were served before the server was restarted.
    pub(crate) fn serve_known_snapshots(&self, name: &str, head: &Head) {
        for snapshot in &head.snapshots {
            let of = Source { volume: head.volume, number: snapshot.number };
            let text = format!("{name}@{}", snapshot.name);
            let mut control = self.control.borrow_mut();
            if control.knows_view(of)
                && let Err(e) = control.add_view(self.now(), of, &text)
            {
                log::error!("{text}: not served: {e}");
            }
        }
        self.wake.notify_one();
    }

    fn stop_view(&self, of: Source) -> Result<(), String> {
        self.wake.notify_one();
        self.control.borrow_mut().remove_view(self.now(), of)
    }

    /// Makes sure that a volume of this server which is to be deleted has no clones and gets none.
    pub(super) async fn prepare_delete(&self, name: &str, force: bool) -> Result<(), String> {
        let _alone = self.deletions.lock().await;
        let edit = async |edit| self.edit_anywhere(name, edit).await;
        let ready = snapshots::prepare_delete(&self.store, name, force, unix_secs(), edit).await;
        ready.map_err(|e| e.to_string())
    }

    /// A volume has been deleted, and its snapshots with it.
    pub(super) fn forget_snapshots(&self, volume: Uuid) -> Result<(), String> {
        self.control.borrow_mut().remove_views_of(self.now(), volume)
    }
}
