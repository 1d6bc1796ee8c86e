//! What packs change of an image: by map page, where each of their blocks lies.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::wire::head::{Head, TailPack};
use crate::wire::map_page::{Data, MapPage, PackRef, Update};
use crate::wire::pack;

/// Blocks of a map page that lie elsewhere now.
#[derive(Clone, Copy, Debug)]
struct Change {
    first: u16,
    count: u16,
    /// `None`: zeroes.
    data: Option<Place>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    pack: PackRef,
    /// First block in the pack.
    offset: u16,
    /// Index of the first block's CRC in the list of all.
    crc_at: u32,
}

/// Changes of packs that have no block in common.
#[derive(Debug, Default)]
pub struct Changes {
    crcs: Vec<u32>,
    pages: BTreeMap<u32, Vec<Change>>,
}

impl Changes {
    /// Adds what a pack holds. Runs beyond the end are left out: the volume was larger once.
    pub fn add(&mut self, head: &Head, tail: TailPack, header: &pack::Header) {
        let TailPack { source, epoch, n, header_bytes } = tail;
        let pack = PackRef { source, epoch, n, header_bytes };
        let crc_base = self.crcs.len() as u32;
        self.crcs.extend_from_slice(&header.crcs);
        let mut offset = 0;
        for run in &header.runs {
            let (page, first) = head.place_of(run.object, run.first);
            let crc_at = crc_base + u32::from(offset);
            let data = (!run.zero).then_some(Place { pack, offset, crc_at });
            offset += if run.zero { 0 } else { run.count };
            if page >= head.page_count() {
                continue;
            }
            self.pages.entry(page).or_default().push(Change { first, count: run.count, data });
        }
    }

    /// Brings each page's changes into order; `false` if two of them have a block in common.
    #[must_use]
    pub fn sort(&mut self) -> bool {
        let apart = |pair: &[Change]| pair[0].first + pair[0].count <= pair[1].first;
        self.pages.values_mut().all(|changes| {
            changes.sort_unstable_by_key(|change| change.first);
            changes.windows(2).all(apart)
        })
    }

    /// Lays the changes, which must be in order ([`sort`](Self::sort)), on top of what lies over
    /// the pages.
    pub fn apply(&self, overlays: &mut BTreeMap<u32, MapPage>) {
        for (page, changes) in &self.pages {
            let updates = self.updates(changes);
            let overlay = overlays.entry(*page).or_default();
            *overlay = overlay.overlay(&updates);
        }
    }

    fn updates(&self, changes: &[Change]) -> Vec<Update<'_>> {
        let update = |change: &Change| {
            let data = change.data.map(|place| {
                let crc_at = place.crc_at as usize;
                let crcs = &self.crcs[crc_at..crc_at + usize::from(change.count)];
                Data { pack: place.pack, offset: place.offset, crcs }
            });
            Update { first: change.first, count: change.count, data }
        };
        changes.iter().map(update).collect()
    }
}
