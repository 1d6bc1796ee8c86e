//! Volumes that get larger or smaller, while clients use them.
//!
//! A volume grows by a commit; clients may use the new blocks after it. It shrinks in the other
//! order: clients are kept from what is to go, that is pushed and looked at, discarded through the
//! shards if it may be, and then a commit says the new size. Whatever happens before the commit,
//! the volume has its old size, and what was discarded reads as zeroes.

use heeler_core::ids::BLOCK_BYTES;
use heeler_core::keeper::Edit;
use heeler_core::wire::head::{Head, VOLUME_BLOCKS_MAX};
use heeler_core::wire::names::Uuid;
use heeler_driver::control::{Event, VolumeStatus};
use heeler_store::Store;
use heeler_store::image::{self, Beyond, Image};
use heeler_store::volumes::{self, VolumeError};

use super::{Lines, Server, unix_secs};
use crate::lines::bytes;
use crate::size::Size;

/// A volume's size in blocks.
pub(crate) fn blocks_of(size: u64) -> Result<u64, String> {
    let blocks = size / BLOCK_BYTES as u64;
    if !size.is_multiple_of(BLOCK_BYTES as u64) || !(1..=VOLUME_BLOCKS_MAX).contains(&blocks) {
        return Err(format!(
            "a volume cannot have {size} bytes: a multiple of 4096, up to {}",
            Size(bytes(VOLUME_BLOCKS_MAX))
        ));
    }
    Ok(blocks)
}

/// Changes the size of a volume that no server has.
pub(crate) async fn resize_stored(store: &Store, name: &str, size: u64) -> Result<(), String> {
    let blocks = blocks_of(size)?;
    let change = |head: &mut Head| {
        if blocks < head.blocks {
            return Err(VolumeError::Owner(format!(
                "only a server that has volume '{name}' can make it smaller: start one, or attach \
                 the volume to one"
            )));
        }
        head.blocks = blocks;
        Ok(())
    };
    let set = volumes::edit(store, name, unix_secs(), change).await;
    set.map_err(|e| match e {
        VolumeError::InUse { name, host, .. } => format!(
            "volume '{name}' belongs to a server on '{host}': resize it there (name its data \
             directory with --data)"
        ),
        e => e.to_string(),
    })
}

impl Server {
    /// Changes the size of a volume; done when clients that connect see it.
    pub(super) async fn volume_resize(
        &self,
        name: &str,
        size: u64,
        force: bool,
        out: &mut Lines,
    ) -> Result<(), String> {
        let blocks = blocks_of(size)?;
        let Some(own) = self.own_volume(name) else {
            return resize_stored(&self.store, name, size).await;
        };
        let _alone = self.resizes.try_lock().map_err(|_| "another resize is under way")?;
        if blocks >= own.blocks {
            self.edit(own.uuid, name, &Edit::Blocks(blocks)).await?;
        } else {
            let shrunk = self.shrink(&own, blocks, force, out).await;
            if shrunk.is_err() {
                self.control.borrow_mut().limit(own.uuid, None);
                self.wake.notify_one();
            }
            shrunk?;
        }
        // All shards know it, then all cores do, and then new clients.
        for _ in 0..2 {
            self.report().await;
        }
        Ok(())
    }

    async fn shrink(
        &self,
        own: &VolumeStatus,
        blocks: u64,
        force: bool,
        out: &mut Lines,
    ) -> Result<(), String> {
        if !force {
            // Before clients are kept from it for nothing.
            self.refuse_beyond(own, blocks, out).await?;
        }
        self.control.borrow_mut().limit(own.uuid, Some(blocks));
        self.wake.notify_one();
        let beyond = if force {
            self.beyond(own, blocks, out).await?
        } else {
            self.refuse_beyond(own, blocks, out).await?
        };
        if beyond.blocks > 0 {
            self.discard(own.uuid, blocks..beyond.last + 1).await?;
        }
        self.edit(own.uuid, &own.name, &Edit::Blocks(blocks)).await
    }

    async fn refuse_beyond(
        &self,
        own: &VolumeStatus,
        blocks: u64,
        out: &mut Lines,
    ) -> Result<Beyond, String> {
        let beyond = self.beyond(own, blocks, out).await?;
        if beyond.blocks == 0 {
            return Ok(beyond);
        }
        Err(format!(
            "volume '{}' has {} bytes of data behind byte {}, the last one at {}: use --force to \
             discard them, or make a snapshot before",
            own.name,
            bytes(beyond.blocks),
            bytes(blocks),
            bytes(beyond.last + 1) - 1,
        ))
    }

    /// Pushes, and looks what the image has behind a place.
    async fn beyond(
        &self,
        own: &VolumeStatus,
        blocks: u64,
        out: &mut Lines,
    ) -> Result<Beyond, String> {
        self.push(std::slice::from_ref(own), out).await?;
        let found = image::of_newest(async || {
            let head = volumes::newest_head(&self.store, own.uuid).await?;
            let head = head.ok_or_else(|| VolumeError::Missing(own.name.clone()))?;
            Image::open(&self.store, head).await?.beyond(&self.store, blocks).await
        });
        found.await.map_err(|e| e.to_string())
    }

    async fn discard(&self, volume: Uuid, blocks: std::ops::Range<u64>) -> Result<(), String> {
        let ticket = self.control.borrow_mut().cut(volume, blocks);
        let ticket = ticket.ok_or("the volume was removed")?;
        match self.wait_for(ticket).await {
            Ok(Event::Cut { done: true, .. }) => Ok(()),
            _ => Err("the volume was lost before it was made smaller".into()),
        }
    }
}
