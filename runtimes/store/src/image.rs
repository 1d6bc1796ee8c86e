//! An image as the store has it: where the blocks of a head lie, and where two heads differ.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::{StreamExt, TryStreamExt, stream};
use heeler_core::ids::BLOCK_BYTES;
use heeler_core::keeper::Changes;
use heeler_core::limits::MAP_PAGE_BLOCKS;
use heeler_core::wire::frame::FormatError;
use heeler_core::wire::head::{Head, PageRef, TailPack};
use heeler_core::wire::map_page::MapPage;
use heeler_core::wire::names::{self, Uuid};
use heeler_core::wire::pack;

use crate::volumes::{CRC32C, VolumeError};
use crate::{ErrorKind, Store, StoreError};

/// Reads under way at the same time at most.
const READS_MAX: usize = 16;
/// How often something is read of an image that is replaced meanwhile, at most.
const TRIES_MAX: usize = 8;

/// Where the blocks of a head lie. The head must be the newest one, or a snapshot, as long as this
/// is used.
#[derive(Debug)]
pub struct Image {
    head: Head,
    /// What the packs of the tail lay over the map pages.
    overlays: BTreeMap<u32, MapPage>,
}

/// Blocks behind some place of an image that hold data.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Beyond {
    /// How many.
    pub blocks: u64,
    /// The last of them.
    pub last: u64,
}

/// Neighbouring blocks in which two images differ, or may.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// The first block.
    pub first: u64,
    /// Blocks.
    pub blocks: u64,
    /// They are zeroes in the later image.
    pub zeroes: bool,
}

/// Neighbouring blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stretch {
    /// The first block.
    pub first: u64,
    /// Blocks.
    pub blocks: u64,
    /// The pack that has them, and the byte in it; `None`: they are zeroes.
    pub pack: Option<(String, u64)>,
}

/// Where a block's data lies.
type Place = (Uuid, u64, u32, u16);

/// Reads something of a volume's newest image, by a function that begins with its head. While it is
/// read, a server may replace the image and delete what only the old one needed: that looks broken,
/// and goes well when it is read anew.
///
/// # Errors
/// The function's.
pub async fn of_newest<T>(
    read: impl AsyncFn() -> Result<T, VolumeError>,
) -> Result<T, VolumeError> {
    let mut result = read().await;
    for _ in 1..TRIES_MAX {
        if !matches!(result, Err(VolumeError::Broken { .. })) {
            break;
        }
        result = read().await;
    }
    result
}

impl Image {
    /// Reads what the map pages do not know yet.
    ///
    /// # Errors
    /// `Broken` or `Store`.
    pub async fn open(store: &Store, head: Head) -> Result<Self, VolumeError> {
        let mut headers = stream::iter(&head.tail)
            .map(async |at| {
                let key = names::pack_key(head.volume_of(at.source), at.epoch, at.n);
                let bytes = store.get(&key, Some(0..u64::from(at.header_bytes))).await;
                let bytes = bytes.map_err(|e| lost(&head, &key, e))?;
                changes(&head, *at, &bytes).map_err(|e| broken(&head, &key, &e.to_string()))
            })
            .buffered(READS_MAX);
        let mut overlays = BTreeMap::new();
        while let Some(changes) = headers.try_next().await? {
            changes.apply(&mut overlays);
        }
        drop(headers);
        Ok(Self { head, overlays })
    }

    /// The head.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The map pages from `first` on in which there may be something.
    fn pages_from(&self, first: u32) -> BTreeSet<u32> {
        let pages = self.head.pages.range(first..).map(|(page, _)| *page);
        pages.chain(self.overlays.range(first..).map(|(page, _)| *page)).collect()
    }

    /// A map page as the image has it.
    async fn page(&self, store: &Store, page: u32) -> Result<MapPage, VolumeError> {
        let base = match self.head.pages.get(&page) {
            None => MapPage::default(),
            Some(&PageRef { source, epoch }) => {
                let key = names::map_key(self.head.volume_of(source), page, epoch);
                let bytes = store.get(&key, None).await.map_err(|e| lost(&self.head, &key, e))?;
                let volumes = self.head.volumes();
                MapPage::decode(&bytes, (&volumes, source), page, epoch, CRC32C)
                    .map_err(|e| broken(&self.head, &key, &e.to_string()))?
            }
        };
        let over = self.overlays.get(&page);
        Ok(over.map(|over| base.apply(&over.updates())).unwrap_or(base))
    }

    /// The blocks from `first` on that hold data.
    ///
    /// # Errors
    /// `Broken` or `Store`.
    pub async fn beyond(&self, store: &Store, first: u64) -> Result<Beyond, VolumeError> {
        let page_blocks = MAP_PAGE_BLOCKS as u64;
        let pages = self.pages_from((first / page_blocks) as u32);
        let mut found = stream::iter(pages)
            .map(async |page| Ok::<_, VolumeError>((page, self.page(store, page).await?)))
            .buffered(READS_MAX);
        let mut beyond = Beyond::default();
        while let Some((page, map)) = found.try_next().await? {
            let base = u64::from(page) * page_blocks;
            for piece in map.lookup(0, MAP_PAGE_BLOCKS as u16).filter(|p| p.data.is_some()) {
                let from = (base + u64::from(piece.first)).max(first);
                let end = base + u64::from(piece.first) + u64::from(piece.count);
                if from < end {
                    beyond = Beyond { blocks: beyond.blocks + end - from, last: end - 1 };
                }
            }
        }
        Ok(beyond)
    }

    /// Where so many blocks lie.
    ///
    /// # Errors
    /// `Broken` or `Store`.
    pub async fn stretches(
        &self,
        store: &Store,
        first: u64,
        blocks: u64,
    ) -> Result<Vec<Stretch>, VolumeError> {
        let mut found = Vec::new();
        let page_blocks = MAP_PAGE_BLOCKS as u64;
        let (mut at, end) = (first, (first + blocks).min(self.head.blocks));
        while at < end {
            let (page, from) = (at / page_blocks, at % page_blocks);
            let count = (page_blocks - from).min(end - at);
            let map = self.page(store, page as u32).await?;
            for piece in map.lookup(from as u16, count as u16) {
                let pack = piece.data.map(|data| {
                    let volume = self.head.volume_of(data.pack.source);
                    let key = names::pack_key(volume, data.pack.epoch, data.pack.n);
                    let header = u64::from(data.pack.header_bytes);
                    (key, header + u64::from(data.offset) * BLOCK_BYTES as u64)
                });
                let first = page * page_blocks + u64::from(piece.first);
                found.push(Stretch { first, blocks: piece.count.into(), pack });
            }
            at += count;
        }
        Ok(found)
    }

    /// The map pages in which this image may differ from an earlier one of the same volume, from
    /// `first` on. What both have in the same version is not read.
    #[must_use]
    pub fn changed_pages(&self, earlier: &Self, first: u32) -> Vec<u32> {
        let version = |image: &Self, page: &u32| {
            let at = image.head.pages.get(page)?;
            Some((image.head.volume_of(at.source), at.epoch))
        };
        let mut pages = self.pages_from(first);
        pages.extend(earlier.pages_from(first));
        let changed = |page: &u32| {
            let overlaid = self.overlays.contains_key(page) || earlier.overlays.contains_key(page);
            overlaid || version(self, page) != version(earlier, page)
        };
        pages.into_iter().filter(changed).collect()
    }

    /// How a map page of this image differs from that of an earlier one. Blocks that lie where they
    /// lay are the same; others may be all the same.
    ///
    /// # Errors
    /// `Broken` or `Store`.
    pub async fn changes(
        &self,
        store: &Store,
        earlier: &Self,
        page: u32,
    ) -> Result<Vec<Change>, VolumeError> {
        let before = earlier.places(store, page).await?;
        let now = self.places(store, page).await?;
        let base = u64::from(page) * MAP_PAGE_BLOCKS as u64;
        let mut changes: Vec<Change> = Vec::new();
        for (block, (now, before)) in (base..self.head.blocks).zip(now.iter().zip(&before)) {
            if now == before {
                continue;
            }
            let zeroes = now.is_none();
            match changes.last_mut() {
                Some(last) if last.first + last.blocks == block && last.zeroes == zeroes => {
                    last.blocks += 1;
                }
                _ => changes.push(Change { first: block, blocks: 1, zeroes }),
            }
        }
        Ok(changes)
    }

    /// Where each block of a map page lies.
    async fn places(&self, store: &Store, page: u32) -> Result<Vec<Option<Place>>, VolumeError> {
        let map = self.page(store, page).await?;
        let mut places = vec![None; MAP_PAGE_BLOCKS];
        for piece in map.lookup(0, MAP_PAGE_BLOCKS as u16) {
            let Some(data) = piece.data else { continue };
            let volume = self.head.volume_of(data.pack.source);
            for at in 0..piece.count {
                let place = (volume, data.pack.epoch.0, data.pack.n, data.offset + at);
                places[usize::from(piece.first + at)] = Some(place);
            }
        }
        Ok(places)
    }
}

/// What a pack of the tail changes.
fn changes(head: &Head, at: TailPack, bytes: &[u8]) -> Result<Changes, FormatError> {
    let header = pack::Header::decode(bytes, CRC32C)?;
    let mut changes = Changes::default();
    changes.add(head, at, &header);
    let known = (header.volume, header.epoch, header.n);
    if known == (head.volume_of(at.source), at.epoch, at.n) && changes.sort() {
        Ok(changes)
    } else {
        Err(FormatError::Field { at: 16, what: "identity of a pack" })
    }
}

fn lost(head: &Head, key: &str, error: StoreError) -> VolumeError {
    match error.kind {
        ErrorKind::NotFound => broken(head, key, "it is missing; run `heeler check`"),
        _ => error.into(),
    }
}

fn broken(head: &Head, key: &str, what: &str) -> VolumeError {
    VolumeError::Broken { name: head.name.clone(), what: format!("{key}: {what}") }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// How often something is read that looks broken so many times.
    async fn reads(broken_times: u32, error: fn() -> VolumeError) -> (u32, bool) {
        let reads = Cell::new(0);
        let result = of_newest(async || {
            reads.set(reads.get() + 1);
            if reads.get() <= broken_times { Err(error()) } else { Ok(()) }
        });
        let ok = result.await.is_ok();
        (reads.get(), ok)
    }

    /// A server committed a map page anew and deleted the old one between the reads of the head and
    /// of the page: an import was refused, as of a broken volume.
    #[tokio::test]
    async fn an_image_that_is_replaced_meanwhile_is_read_anew() {
        let broken = || VolumeError::Broken { name: "disk0".into(), what: "gone".into() };
        assert_eq!(reads(0, broken).await, (1, true));
        assert_eq!(reads(3, broken).await, (4, true));
        let tries = TRIES_MAX as u32;
        assert_eq!(reads(100, broken).await, (tries, false), "it stays broken");
        assert_eq!(reads(100, || VolumeError::Missing("disk0".into())).await, (1, false));
    }
}
