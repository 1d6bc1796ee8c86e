//! Where two images of a volume differ, by where their blocks lie in the store.

use heeler_core::wire::head::Head;
use heeler_store::image::{self, Change, Image};
use heeler_store::snapshots::{self, SnapshotName};
use heeler_store::volumes::{self, VolumeError};

use super::Server;
use crate::api::Changes;

/// An answer ends with the map page in which it has got so many changes.
const CHANGES_MAX: usize = 50_000;

impl Server {
    /// What changed from one snapshot to another, or to the newest image, from a map page on.
    pub(super) async fn snapshot_changes(
        &self,
        volume: &str,
        from: &str,
        to: Option<&str>,
        page: u32,
    ) -> Result<Changes, String> {
        let found = image::of_newest(async || {
            let earlier = self.head_of(volume, Some(from)).await?;
            let later = self.head_of(volume, to).await?;
            if earlier.number > later.number {
                let what = format!("'{volume}@{from}' is the later one of the two snapshots");
                return Err(VolumeError::Owner(what));
            }
            self.changes_between(earlier, later, page).await
        });
        found.await.map_err(|e: VolumeError| e.to_string())
    }

    async fn head_of(&self, volume: &str, snapshot: Option<&str>) -> Result<Head, VolumeError> {
        match snapshot {
            None => volumes::named_head(&self.store, volume).await,
            Some(snapshot) => {
                let name = SnapshotName { volume: volume.into(), snapshot: snapshot.into() };
                snapshots::open(&self.store, &name).await
            }
        }
    }

    async fn changes_between(
        &self,
        earlier: Head,
        later: Head,
        first: u32,
    ) -> Result<Changes, VolumeError> {
        let mut found = Changes {
            uuid: later.volume.to_string(),
            from: earlier.number,
            to: later.number,
            from_blocks: earlier.blocks,
            to_blocks: later.blocks,
            changes: Vec::new(),
            next: None,
        };
        let earlier = Image::open(&self.store, earlier).await?;
        let later = Image::open(&self.store, later).await?;
        for page in later.changed_pages(&earlier, first) {
            if found.changes.len() >= CHANGES_MAX {
                found.next = Some(page);
                break;
            }
            let changes = later.changes(&self.store, &earlier, page).await?;
            let plain = |Change { first, blocks, zeroes }| (first, blocks, zeroes);
            found.changes.extend(changes.into_iter().map(plain));
        }
        Ok(found)
    }
}
