//! A checkpoint: the packs of the tail are folded into the map pages, so that the tail stays short
//! and what it takes of memory bounded.
//!
//! It runs beside pushes and works on what was committed when it began. Its pages become part of
//! the image with the next head.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::collect::Folded;
use super::map::{Known, Map};
use super::rewrite::Moves;
use super::scan::own;
use super::store::{Call, Io, Task};
use crate::ids::Epoch;
use crate::wire::head::{Head, PageRef};
use crate::wire::map_page::MapPage;
use crate::wire::names;

/// A map page of the next head.
#[derive(Debug)]
struct Staged {
    /// The page is all zeroes and needs no object.
    empty: bool,
    /// Kept for after the commit, if there is room.
    content: Option<Arc<MapPage>>,
    folded: Folded,
}

#[derive(Debug)]
pub(super) struct Checkpoint {
    /// In the names of the pages.
    epoch: Epoch,
    /// So many packs of the tail, from the first on, are folded in, and so many bytes of data.
    packs: usize,
    tail_bytes: u64,
    /// Blocks that were copied elsewhere.
    moves: Moves,
    /// Pages to fold, then those whose base is on its way, then those on their way to the store.
    todo: BTreeSet<u32>,
    loading: BTreeSet<u32>,
    putting: usize,
    staged: BTreeMap<u32, Staged>,
}

impl Checkpoint {
    /// Begins with what the head's tail has now, and with pages of which blocks were copied
    /// elsewhere. `epoch` names its pages.
    pub(super) fn start(
        head: &Head,
        map: &mut Map,
        epoch: Epoch,
        tail_bytes: u64,
        (pages, moves): (Vec<u32>, Moves),
    ) -> Self {
        Self {
            epoch,
            packs: head.tail.len(),
            tail_bytes,
            moves,
            todo: map.freeze().into_iter().chain(pages).collect(),
            loading: BTreeSet::new(),
            putting: 0,
            staged: BTreeMap::new(),
        }
    }

    /// In the names of its pages.
    pub(super) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// How many packs of the tail it folds, from the first on.
    pub(super) fn packs(&self) -> usize {
        self.packs
    }

    /// Bytes of data that it takes from the tail.
    pub(super) fn tail_bytes(&self) -> u64 {
        self.tail_bytes
    }

    /// Goes on as far as it can. True when all its pages are in the store.
    pub(super) fn settle(&mut self, io: &mut Io<'_>, head: &Head, map: &mut Map) -> bool {
        while self.putting + self.loading.len() < io.config.puts_max.max(1) {
            let Some(page) = self.todo.pop_first() else { break };
            match map.want_for_checkpoint(io, head, page) {
                Known::Page(base) => self.stage(io, head, map, page, &base),
                Known::Loading => {
                    self.loading.insert(page);
                }
            }
        }
        self.todo.is_empty() && self.loading.is_empty() && self.putting == 0
    }

    /// A page that it waited for.
    pub(super) fn handle_loaded(
        &mut self,
        io: &mut Io<'_>,
        head: &Head,
        map: &Map,
        page: u32,
        base: &MapPage,
    ) {
        // It may have been cut off since.
        if self.loading.remove(&page) {
            self.stage(io, head, map, page, base);
        }
    }

    /// The volume has lost the pages from this one on. Returns those that were written for nothing,
    /// and the epoch in their names.
    pub(super) fn cut(&mut self, pages: u32) -> Vec<(u32, Epoch)> {
        self.todo.split_off(&pages);
        self.loading.split_off(&pages);
        let staged = self.staged.split_off(&pages).into_iter();
        staged.filter(|(_, staged)| !staged.empty).map(|(page, _)| (page, self.epoch)).collect()
    }

    pub(super) fn handle_put(&mut self) {
        self.putting -= 1;
    }

    fn stage(&mut self, io: &mut Io<'_>, head: &Head, map: &Map, page: u32, base: &MapPage) {
        let over = map.frozen(page).map(MapPage::updates).unwrap_or_default();
        let mut content = base.apply(&over);
        if !self.moves.is_empty() {
            content = content.relocate(|pack, offset| self.moves.get(&(pack, offset)).copied());
        }
        let folded = Folded { page, before: own(base), after: own(&content) };
        let empty = content.is_empty();
        if !empty {
            let bytes = content.encode(&head.volumes(), page, self.epoch, io.config.crc32c);
            io.store.put_bytes += bytes.len() as u64;
            let call = Call::Put {
                key: names::map_key(head.volume, page, self.epoch),
                meta: bytes.into(),
                batches: Vec::new(),
            };
            io.start(Task::PutPage { page }, call);
            self.putting += 1;
        }
        let keep = !empty && self.staged.len() < io.config.pages_max;
        let content = keep.then(|| Arc::new(content));
        self.staged.insert(page, Staged { empty, content, folded });
    }

    /// What the next head says of the image.
    pub(super) fn put_into(&self, head: &mut Head) {
        head.tail.drain(..self.packs);
        for (&page, staged) in &self.staged {
            if staged.empty {
                head.pages.remove(&page);
            } else {
                head.pages.insert(page, PageRef { source: 0, epoch: self.epoch });
            }
        }
    }

    /// The head with its pages is the newest. Returns what changed.
    pub(super) fn finish(self, map: &mut Map, pages_max: usize) -> Vec<Folded> {
        map.thaw();
        let mut changed = Vec::with_capacity(self.staged.len());
        for (page, staged) in self.staged {
            map.replace(page, staged.content, pages_max);
            changed.push(staged.folded);
        }
        changed
    }
}
