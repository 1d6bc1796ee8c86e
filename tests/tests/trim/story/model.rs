//! What the index, the table and the onodes must say: plain maps, told of each change and asked
//! whether it was allowed.

use std::collections::{BTreeMap, VecDeque};

use heeler_core::ages::{WINDOW_ENDS, WINDOWS};
use heeler_core::buffer::{BufferId, YOUNG_SECONDS};
use heeler_core::ids::PageId;
use heeler_core::limits::LEAF_BLOCKS;
use heeler_core::onode::ONODE_UNITS;

use super::place::{BLOCKS, OBJECT_BLOCKS, OBJECTS};

/// Where a page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// Lent, or never given.
    Outside,
    /// In the table, in no buffer.
    Free,
    /// In this buffer.
    Buffer(BufferId),
}

/// What a page is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Life {
    Filling,
    Writing,
    Clean,
}

/// A buffer with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Held {
    pub(crate) page: PageId,
    pub(crate) life: Life,
    pub(crate) pins: u32,
    /// The second of its last use.
    pub(crate) used: u32,
}

impl Held {
    fn is_used(&self) -> bool {
        self.pins > 0 || self.life != Life::Clean
    }
}

/// What the index must refer to for a block. Without a page it is a ghost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ref {
    pub(crate) id: BufferId,
    pub(crate) held: Option<Held>,
}

/// What is known of an object's onode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Onode {
    pub(crate) pins: u32,
    /// The second of its last use.
    used: u32,
}

/// How many of what there must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) free: u32,
    pub(crate) clean: u32,
    pub(crate) clean_pinned: u32,
    pub(crate) filling: u32,
    pub(crate) writing: u32,
    pub(crate) detached: u32,
    pub(crate) ghosts: u32,
}

pub(crate) struct Model {
    refs: Vec<Option<Ref>>,
    /// Discarded, but still used.
    detached: BTreeMap<u32, Held>,
    pages: Vec<Place>,
    /// The newest version of each block.
    newest: Vec<u64>,
    /// The block and version that were put into each page last.
    contents: Vec<(usize, u64)>,
    /// Seconds since the start.
    now: u32,
    /// `None` where the object has no onode.
    onodes: Vec<Option<Onode>>,
    /// Onodes without users, the one released last in front.
    released: VecDeque<usize>,
}

impl Model {
    /// Of `pages` pages the first `inside` are in the table.
    pub(crate) fn new(pages: u32, inside: u32) -> Self {
        let place = |page| if page < inside { Place::Free } else { Place::Outside };
        Self {
            refs: vec![None; BLOCKS],
            detached: BTreeMap::new(),
            pages: (0..pages).map(place).collect(),
            newest: vec![0; BLOCKS],
            contents: vec![(usize::MAX, 0); pages as usize],
            now: 0,
            onodes: vec![None; OBJECTS],
            released: VecDeque::new(),
        }
    }

    pub(crate) fn block(&self, block: usize) -> Option<Ref> {
        self.refs[block]
    }

    /// What the block's page is used for, if it has one.
    pub(crate) fn life(&self, block: usize) -> Option<Life> {
        self.refs[block]?.held.map(|held| held.life)
    }

    /// Of the blocks whose pages are used as `wanted`, one.
    pub(crate) fn nth(&self, nth: usize, wanted: impl Fn(Held) -> bool) -> Option<usize> {
        let held = |block: usize| self.refs[block].and_then(|slot| slot.held);
        let found: Vec<_> = (0..BLOCKS).filter(|block| held(*block).is_some_and(&wanted)).collect();
        (!found.is_empty()).then(|| found[nth % found.len()])
    }

    pub(crate) fn detached(&self) -> impl Iterator<Item = (BufferId, Held)> + '_ {
        self.detached.iter().map(|(id, held)| (BufferId(*id), *held))
    }

    /// A page left the free ones.
    pub(crate) fn take(&mut self, page: PageId) {
        self.change_place(page, Place::Free, Place::Outside);
    }

    /// A page from outside came to the free ones.
    pub(crate) fn give(&mut self, page: PageId) {
        self.change_place(page, Place::Outside, Place::Free);
    }

    fn change_place(&mut self, page: PageId, from: Place, to: Place) {
        let place = &mut self.pages[page.0 as usize];
        assert_eq!(*place, from, "{page:?} was to become {to:?}");
        *place = to;
    }

    /// A block without a buffer got one, with a page from outside.
    pub(crate) fn insert(&mut self, block: usize, id: BufferId, page: PageId, life: Life) {
        assert_eq!(self.refs[block], None);
        assert!(!self.detached.contains_key(&id.0), "{id:?} is in use");
        assert!(self.refs.iter().flatten().all(|other| other.id != id), "{id:?} is in use");
        self.change_place(page, Place::Outside, Place::Buffer(id));
        self.newest[block] += u64::from(life == Life::Writing);
        self.contents[page.0 as usize] = (block, self.newest[block]);
        self.refs[block] =
            Some(Ref { id, held: Some(Held { page, life, pins: 0, used: self.now }) });
    }

    /// A buffer that no block refers to, pinned once, got a page from outside.
    pub(crate) fn insert_private(&mut self, id: BufferId, page: PageId) {
        let held = Held { page, life: Life::Filling, pins: 1, used: self.now };
        let before = self.detached.insert(id.0, held);
        assert_eq!(before, None, "{id:?} is in use");
        assert!(self.refs.iter().flatten().all(|other| other.id != id), "{id:?} is in use");
        self.change_place(page, Place::Outside, Place::Buffer(id));
    }

    /// A block's buffer was used.
    pub(crate) fn touch(&mut self, block: usize) {
        let now = self.now;
        let slot = self.refs[block].as_mut().expect("a buffer is used");
        slot.held.as_mut().expect("a page is used").used = now;
    }

    /// A block's buffer got new data in the page it has.
    pub(crate) fn rewrite(&mut self, block: usize) {
        self.touch(block);
        let held = self.refs[block].and_then(|slot| slot.held).expect("a page is written");
        self.newest[block] += 1;
        self.contents[held.page.0 as usize] = (block, self.newest[block]);
    }

    /// Time goes on.
    pub(crate) fn advance(&mut self, seconds: u32) -> u32 {
        self.now += seconds;
        self.now
    }

    /// The data of a buffer arrived, or is in the log.
    pub(crate) fn finish(&mut self, id: BufferId) {
        let held = self.held_mut(id);
        assert_ne!(held.life, Life::Clean);
        held.life = Life::Clean;
        self.release_detached(id);
    }

    pub(crate) fn pin(&mut self, id: BufferId) {
        self.held_mut(id).pins += 1;
    }

    pub(crate) fn unpin(&mut self, id: BufferId) {
        self.held_mut(id).pins -= 1;
        self.release_detached(id);
    }

    /// The owner lets go of a block; the page is outside if nobody uses it.
    pub(crate) fn discard(&mut self, block: usize, page: Option<PageId>) {
        let Ref { id, held } = self.refs[block].take().expect("there is something to discard");
        match held {
            Some(held) if held.is_used() => {
                assert_eq!(page, None, "{id:?} was given up while used: {held:?}");
                self.detached.insert(id.0, held);
            }
            Some(held) => {
                assert_eq!(page, Some(held.page), "the page of {id:?}");
                self.change_place(held.page, Place::Buffer(id), Place::Outside);
            }
            None => assert_eq!(page, None, "the ghost {id:?} has a page"),
        }
    }

    /// An eviction took the block's page, and made a ghost of the buffer or not. Tells whether the
    /// block was used a short time ago.
    pub(crate) fn evict(&mut self, block: usize, ghost: Option<BufferId>) -> bool {
        let Ref { id, held } =
            self.refs[block].take().expect("a block without a buffer is evicted");
        let held = held.expect("a ghost is evicted");
        assert!(!held.is_used(), "{id:?} is evicted while used: {held:?}");
        assert!(ghost.is_none_or(|ghost| !ghost.is_buffer()), "{id:?} became {ghost:?}");
        assert!(self.refs.iter().flatten().all(|other| Some(other.id) != ghost), "{ghost:?} twice");
        self.change_place(held.page, Place::Buffer(id), Place::Free);
        self.refs[block] = ghost.map(|id| Ref { id, held: None });
        self.now - held.used < u32::from(YOUNG_SECONDS)
    }

    /// The block's ghost is gone.
    pub(crate) fn drop_ghost(&mut self, block: usize) {
        let ghost = self.refs[block].take().expect("there is a ghost");
        assert_eq!(ghost.held, None, "{ghost:?} is dropped as a ghost");
    }

    fn held_mut(&mut self, id: BufferId) -> &mut Held {
        let attached = self.refs.iter_mut().flatten().find(|slot| slot.id == id);
        let held = match attached {
            Some(slot) => slot.held.as_mut(),
            None => self.detached.get_mut(&id.0),
        };
        held.expect("a buffer with a page")
    }

    fn release_detached(&mut self, id: BufferId) {
        let Some(held) = self.detached.get(&id.0).copied() else { return };
        if !held.is_used() {
            self.detached.remove(&id.0);
            self.change_place(held.page, Place::Buffer(id), Place::Free);
        }
    }

    /// A buffer that can be read must hold the newest version of its block.
    pub(crate) fn check_content(&self, block: usize, page: PageId) {
        let content = self.contents[page.0 as usize];
        assert_eq!(content, (block, self.newest[block]), "what is in {page:?}");
    }

    pub(crate) fn counts(&self) -> Counts {
        let free = self.pages.iter().filter(|place| **place == Place::Free).count() as u32;
        let detached = self.detached.len() as u32;
        let mut counts = Counts { free, detached, ..Counts::default() };
        for slot in self.refs.iter().flatten() {
            match slot.held.map(|held| held.life) {
                None => counts.ghosts += 1,
                Some(Life::Filling) => counts.filling += 1,
                Some(Life::Writing) => counts.writing += 1,
                Some(Life::Clean) => counts.clean += 1,
            }
            counts.clean_pinned +=
                u32::from(slot.held.is_some_and(|held| held.life == Life::Clean && held.pins > 0));
        }
        counts
    }

    /// The data of a block moved to a page from outside; the old one is outside now.
    pub(crate) fn change_page(&mut self, block: usize, page: PageId) -> PageId {
        let slot = self.refs[block].as_mut().expect("a buffer moves");
        let (id, held) = (slot.id, slot.held.as_mut().expect("a page moves"));
        assert!(!held.is_used(), "{id:?} moves while used: {held:?}");
        let old = std::mem::replace(&mut held.page, page);
        self.change_place(old, Place::Buffer(id), Place::Outside);
        self.change_place(page, Place::Outside, Place::Buffer(id));
        self.contents[page.0 as usize] = self.contents[old.0 as usize];
        old
    }

    /// Pages in buffers by the time since their last use.
    pub(crate) fn page_ages(&self) -> [u64; WINDOWS] {
        let attached = self.refs.iter().flatten().filter_map(|slot| slot.held.as_ref());
        self.windows(attached.chain(self.detached.values()).map(|held| (held.used, 1)))
    }

    /// Leaves by the time since the last use of their onode.
    pub(crate) fn leaf_ages(&self) -> [u64; WINDOWS] {
        let onodes = self.onodes.iter().enumerate();
        let known = onodes.filter_map(|(object, onode)| Some((object, (*onode)?)));
        self.windows(known.map(|(object, onode)| (onode.used, u64::from(self.leaves(object)))))
    }

    fn windows(&self, items: impl Iterator<Item = (u32, u64)>) -> [u64; WINDOWS] {
        let mut windows = [0; WINDOWS];
        for (used, weight) in items {
            let age = self.now - used;
            let window = WINDOW_ENDS.iter().position(|end| age < u32::from(*end));
            windows[window.unwrap_or(WINDOWS - 1)] += weight;
        }
        windows
    }

    /// Leaves of an object that have something to say.
    fn leaves(&self, object: usize) -> u32 {
        let blocks = &self.refs[object * OBJECT_BLOCKS..][..OBJECT_BLOCKS];
        let leaves = blocks.chunks(LEAF_BLOCKS);
        leaves.filter(|leaf| leaf.iter().any(Option::is_some)).count() as u32
    }

    /// Units that onodes and leaves take: all, and those of onodes that have users.
    pub(crate) fn units(&self) -> (u32, u32) {
        let (mut all, mut used) = (0, 0);
        for (object, onode) in self.onodes.iter().enumerate() {
            let Some(onode) = onode else { continue };
            let units = ONODE_UNITS + self.leaves(object);
            all += units;
            used += if onode.pins > 0 { units } else { 0 };
        }
        (all, used)
    }

    /// An object got an onode, which has one user.
    pub(crate) fn create_onode(&mut self, object: usize) {
        assert_eq!(self.onodes[object], None);
        self.onodes[object] = Some(Onode { pins: 1, used: self.now });
    }

    /// An object's onode has one user more.
    pub(crate) fn use_onode(&mut self, object: usize) {
        let onode = self.onodes[object].as_mut().expect("an onode");
        onode.pins += 1;
        onode.used = self.now;
        self.released.retain(|other| *other != object);
    }

    pub(crate) fn unpin_onode(&mut self, object: usize) {
        let onode = self.onodes[object].as_mut().expect("an onode");
        onode.pins -= 1;
        if onode.pins == 0 {
            self.released.push_front(object);
        }
    }

    pub(crate) fn evict_onode(&mut self, object: usize) {
        assert_eq!(self.released.pop_back(), Some(object), "not the onode released longest ago");
        self.onodes[object] = None;
    }

    /// What is known of an object's onode, if it has one.
    pub(crate) fn onode(&self, object: usize) -> Option<Onode> {
        self.onodes[object]
    }

    /// The onode to evict next.
    pub(crate) fn victim(&self) -> Option<usize> {
        self.released.back().copied()
    }

    pub(crate) fn evictable_onodes(&self) -> u32 {
        self.released.len() as u32
    }
}
