//! What is ordered of a volume; what it is called, and whether clients may change it, while they
//! use it.

use heeler_core::keeper::Edit;
use heeler_core::wire::head::Settings;
use heeler_core::wire::names::Uuid;
use heeler_store::volumes;

use super::{Lines, Server, dirty_of, done};
use crate::api::{Answer, Order};
use crate::{object, snapshot};

/// Pushes until nothing is dirty: of what was under way when writers were stopped.
const PUSHES_MAX: u32 = 10;

impl Server {
    /// Does what is ordered of a volume.
    pub(super) async fn manage(
        &self,
        name: &str,
        order: Order,
        out: &mut Lines,
    ) -> Result<Answer, String> {
        Ok(match order {
            Order::Resize { size_bytes, force } => {
                done(&self.volume_resize(name, size_bytes, force, out).await?)
            }
            Order::Rename { to } => done(&self.volume_rename(name, &to).await?),
            Order::Object { object } => done(&object::find(&self.store, name, object).await?),
            Order::Changes { from, to, page } => {
                done(&self.snapshot_changes(name, &from, to.as_deref(), page).await?)
            }
        })
    }

    /// Renames a volume. Clients that have it keep it; new ones use the new name.
    pub(super) async fn volume_rename(&self, old: &str, new: &str) -> Result<(), String> {
        let _alone = self.deletions.lock().await;
        let own = self.own_volume(old).map(|own| own.uuid);
        let edit = async |edit| self.edit_anywhere(old, edit).await;
        let renamed = volumes::rename(&self.store, old, new, edit).await;
        if let Some(uuid) = own {
            // The commit counts, even if the old name could not be removed.
            let head = volumes::newest_head(&self.store, uuid).await;
            if renamed.is_ok() || head.is_ok_and(|head| head.is_some_and(|h| h.name == new)) {
                self.control.borrow_mut().rename(uuid, new);
                self.wake.notify_one();
                self.report().await;
            }
        }
        renamed.map_err(snapshot::explain)
    }

    /// Makes a volume read-only, and clean, or lets clients write again.
    pub(super) async fn set_read_only(
        &self,
        volume: Uuid,
        name: &str,
        settings: Settings,
    ) -> Result<(), String> {
        let read_only = settings.read_only;
        if read_only {
            // Every core refuses writes before the push begins.
            self.publish_read_only(volume, true).await;
        }
        let done = self.edit(volume, name, &Edit::Settings(settings)).await;
        self.publish_read_only(volume, read_only == done.is_ok()).await;
        done?;
        for _ in 0..PUSHES_MAX {
            let status = self.find(name).filter(|_| read_only);
            let Some(status) = status else { break };
            if dirty_of(&self.report_shards().await, status.number) == 0 {
                break;
            }
            let ticket = self.control.borrow_mut().push(self.now(), volume);
            if let Some(ticket) = ticket {
                let _ = self.wait_for(ticket).await;
            }
        }
        Ok(())
    }

    async fn publish_read_only(&self, volume: Uuid, read_only: bool) {
        self.control.borrow_mut().set_read_only(volume, read_only);
        self.wake.notify_one();
        self.report().await;
    }
}
