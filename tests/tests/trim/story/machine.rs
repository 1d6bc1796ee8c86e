//! A story told by bytes: what a shard does with onodes and buffers, in any order, and after each
//! step a comparison of all that they say with the model.

use heeler_core::buffer::{BlockAddr, BufferId, BufferStorage, Buffers, Evicted, State};
use heeler_core::ids::PageId;
use heeler_core::limits::LEAF_BLOCKS;
use heeler_core::onode::{OnodeStorage, Onodes};
use heeler_core::policy::{Hint, Level, Policy};

use super::model::{Held, Life, Model, Ref};
use super::op::{Bytes, Op, PAGES_MAX, Told};
use super::place::{
    LEAVES, OBJECT_BLOCKS, OBJECTS, addr, block_at, number, references, volume_and_object,
};

const ADOPTED_MAX: usize = 8;
const PINS_MAX: usize = 40;
const ONODE_PINS_MAX: usize = 8;
const STEPS_MAX: usize = 4096;
/// Ages are told apart for so long.
const SECONDS_MAX: u32 = u16::MAX as u32;

/// Runs the story that `bytes` tell.
///
/// # Panics
///
/// If anything is not as the model says.
pub(crate) fn run(bytes: &mut Bytes<'_>) {
    let own = 1 + bytes.below(PAGES_MAX) as u32;
    let capacity = 1 + bytes.below(own as usize) as u32;
    let adopted = bytes.below(ADOPTED_MAX) as u32;
    let policy = bytes.policy();
    let onodes = 1 + bytes.below(OBJECTS);
    let leaves = 1 + bytes.below(OBJECTS * LEAVES.len());
    let slots = BufferStorage::slots_for(own as usize, adopted as usize);
    let mut buffers = BufferStorage::new(slots);
    let mut onodes = OnodeStorage::new(onodes);
    let pages: Vec<_> = (0..capacity).map(PageId).collect();
    let mut machine = Machine {
        buffers: Buffers::new(&mut buffers, &pages, policy),
        onodes: Onodes::new(&mut onodes, leaves),
        model: Model::new(own + adopted, capacity),
        under_way: Vec::new(),
        pins: Vec::new(),
        onode_pins: Vec::new(),
        outside: (capacity..own + adopted).map(PageId).collect(),
        capacity,
        capacity_max: own,
        pages: own + adopted,
        expected: Expected::default(),
        told: Told::default(),
    };
    machine.check();
    while !bytes.0.is_empty() && machine.told.0.len() < STEPS_MAX {
        let op = bytes.op();
        machine.told.0.push(op);
        machine.step(op);
        machine.check();
    }
    machine.end();
}

/// A fill or a write that has not ended.
#[derive(Clone, Copy)]
struct UnderWay {
    id: BufferId,
    block: usize,
}

/// What the table must have counted.
#[derive(Default)]
struct Expected {
    hits: u64,
    misses: u64,
    evictions: u64,
    young_evictions: u64,
    onode_hits: u64,
    onode_misses: u64,
    onode_evictions: u64,
}

struct Machine<'a> {
    buffers: Buffers<'a>,
    onodes: Onodes<'a>,
    model: Model,
    under_way: Vec<UnderWay>,
    pins: Vec<BufferId>,
    /// Objects whose onodes are pinned by `Op::PinOnode`.
    onode_pins: Vec<usize>,
    /// Pages that the table does not have.
    outside: Vec<PageId>,
    /// Pages that the table should have.
    capacity: u32,
    capacity_max: u32,
    /// Pages in all.
    pages: u32,
    expected: Expected,
    told: Told,
}

impl Machine<'_> {
    fn step(&mut self, op: Op) {
        match op {
            Op::Access { first, count, write, level } => self.access(first, count, write, level),
            Op::Fill(block) if self.model.life(block).is_none() => _ = self.miss(block),
            Op::Private(nth) => self.start_private(nth),
            Op::Write(block) => _ = self.start(block, Life::Writing),
            Op::Finish(nth, level) => self.finish(nth, level, true),
            Op::Fail(nth) => self.finish(nth, Level::High, false),
            Op::Pin(nth) => self.pin(nth),
            Op::Unpin(nth) if !self.pins.is_empty() => {
                let id = self.pins.swap_remove(nth % self.pins.len());
                self.buffers.unpin(id);
                self.model.unpin(id);
            }
            Op::Discard { first, count } => {
                for block in first..first + count {
                    self.discard(block);
                    self.free_leaf(block);
                }
            }
            Op::Lend(pages) => {
                for _ in 0..pages {
                    let Some(page) = self.take_page(Hint::NEW) else { break };
                    self.outside.push(page);
                }
            }
            Op::Return(pages) => {
                let left = self.outside.len().saturating_sub(pages as usize);
                for page in self.outside.split_off(left) {
                    self.give_page(page);
                }
            }
            Op::Shrink(pages) => (0..pages).for_each(|_| self.shrink()),
            Op::Grow(pages) => (0..pages).for_each(|_| self.grow()),
            Op::Rewrite(nth) => self.rewrite(nth),
            Op::Wait(seconds) => self.wait(seconds),
            Op::DropGhosts(count) => self.drop_ghosts(count),
            Op::Move(nth) => self.move_block(nth),
            Op::Vacate(nth) => self.vacate(nth),
            Op::Limit(units) => self.onodes.set_limit(units),
            Op::Pack(count) => (0..count).for_each(|_| _ = self.pack()),
            Op::Switch(policy) => {
                self.buffers.set_policy(policy);
                assert_eq!(self.buffers.policy(), policy);
            }
            Op::Trim(count) => (0..count).for_each(|_| self.trim()),
            Op::PinOnode(object) if self.onode_pins.len() < ONODE_PINS_MAX => {
                if self.pin_onode(object).is_some() {
                    self.onode_pins.push(object);
                }
            }
            Op::UnpinOnode(nth) if !self.onode_pins.is_empty() => {
                let object = self.onode_pins.swap_remove(nth % self.onode_pins.len());
                self.unpin_onode(object);
            }
            Op::EvictOnode => _ = self.evict_onode(),
            Op::Fill(_) | Op::Unpin(_) | Op::PinOnode(_) | Op::UnpinOnode(_) => {}
        }
    }

    fn access(&mut self, first: usize, count: usize, write: bool, level: Level) {
        self.buffers.begin(count, write);
        for block in first..first + count {
            let life = self.model.life(block);
            let started = match life {
                _ if write => self.start(block, Life::Writing),
                None => self.miss(block),
                // A client would wait for the fill.
                Some(Life::Filling) => None,
                Some(_) => {
                    self.hit(block);
                    None
                }
            };
            if started.is_some() {
                self.finish(self.under_way.len() - 1, level, true);
            }
        }
    }

    fn hit(&mut self, block: usize) {
        let id = self.model.block(block).expect("a hit is a buffer").id;
        self.model.check_content(block, self.buffers.page(id));
        self.buffers.touch(id);
        self.model.touch(block);
        self.expected.hits += 1;
    }

    fn miss(&mut self, block: usize) -> Option<BufferId> {
        self.buffers.miss();
        self.expected.misses += 1;
        self.start(block, Life::Filling)
    }

    /// A new buffer for a block, in place of what it had. `None`: there is no room.
    fn start(&mut self, block: usize, life: Life) -> Option<BufferId> {
        if self.buffers.available() == 0 {
            return None;
        }
        let object = block / OBJECT_BLOCKS;
        let onode = self.pin_onode(object)?;
        let Some((leaf, index)) = self.leaf_for(onode, block) else {
            self.unpin_onode(object);
            return None;
        };
        let hint = self.discard(block);
        // The leaf must outlive the eviction, though it may say nothing now.
        self.onodes.leaf_mut(leaf).bad |= 1 << index;
        let page = self.take_page(hint).expect("a page was available, and a discard takes none");
        self.onodes.leaf_mut(leaf).bad &= !(1 << index);
        let id = match life {
            Life::Writing => self.buffers.insert_writing(addr(leaf, index), page, hint),
            _ => self.buffers.insert_filling(addr(leaf, index), page, hint),
        };
        let id = id.expect("there are always enough slots");
        self.onodes.set_ram(leaf, index, id);
        self.model.insert(block, id, page, life);
        self.under_way.push(UnderWay { id, block });
        Some(id)
    }

    fn start_private(&mut self, nth: usize) {
        let Some(block) = self.model.nth(nth, |_| true) else { return };
        if self.buffers.available() == 0 || self.pins.len() == PINS_MAX {
            return;
        }
        let id = self.model.block(block).expect("it has a page").id;
        let at = self.buffers.block(id);
        self.pin_onode(block / OBJECT_BLOCKS).expect("a leaf has an onode");
        let page = self.take_page(Hint::NEW).expect("a page was available");
        let id = self.buffers.insert_private(at, page).expect("there are always enough slots");
        self.model.insert_private(id, page);
        self.under_way.push(UnderWay { id, block });
        self.pins.push(id);
    }

    fn finish(&mut self, nth: usize, level: Level, ok: bool) {
        if self.under_way.is_empty() {
            return;
        }
        let UnderWay { id, block } = self.under_way.swap_remove(nth % self.under_way.len());
        let attached = self.model.block(block).is_some_and(|slot| slot.id == id);
        if !ok && attached && self.buffers.state(id) == State::Filling {
            self.discard(block);
            self.free_leaf(block);
        }
        self.buffers.finish(id, level);
        self.model.finish(id);
        self.unpin_onode(block / OBJECT_BLOCKS);
    }

    fn pin(&mut self, nth: usize) {
        let Some(block) = self.model.nth(nth, |_| true) else { return };
        if self.pins.len() < PINS_MAX {
            let id = self.model.block(block).expect("it has a page").id;
            self.buffers.pin(id);
            self.model.pin(id);
            self.pins.push(id);
        }
    }

    fn rewrite(&mut self, nth: usize) {
        let Some(block) = self.model.nth(nth, |held| held.life == Life::Clean) else { return };
        let id = self.model.block(block).expect("it is clean").id;
        self.buffers.rewrite(id);
        self.model.rewrite(block);
        self.expected.hits += 1;
    }

    /// Ends the reference to what the block has, if it has something. Its leaf stays.
    fn discard(&mut self, block: usize) -> Hint {
        let Some(slot) = self.model.block(block) else { return Hint::NEW };
        let onode = self.find(block / OBJECT_BLOCKS).expect("a leaf has an onode");
        let (leaf, index) = self.onodes.block(onode, number(block)).expect("a buffer has a leaf");
        self.onodes.set_ram(leaf, index, BufferId::NONE);
        let known = self.buffers.tag(slot.id);
        let (hint, page) = self.buffers.discard(slot.id);
        assert_eq!(hint.tag, known, "the hint of {slot:?}");
        self.model.discard(block, page);
        if let Some(page) = page {
            self.give_page(page);
        }
        hint
    }

    fn free_leaf(&mut self, block: usize) {
        let Some(onode) = self.find(block / OBJECT_BLOCKS) else { return };
        if let Some((leaf, _)) = self.onodes.block(onode, number(block)) {
            self.onodes.free_if_empty(leaf);
        }
    }

    fn take_page(&mut self, incoming: Hint) -> Option<PageId> {
        let available = self.buffers.available();
        let taken = self.buffers.take_page(incoming).ok();
        assert_eq!(taken.is_some(), available > 0, "{available} pages are available");
        let taken = taken?;
        if let Some(evicted) = taken.evicted {
            self.forget(evicted);
        }
        self.model.take(taken.page);
        Some(taken.page)
    }

    fn give_page(&mut self, page: PageId) {
        self.buffers.give_page(page);
        self.model.give(page);
    }

    fn shrink(&mut self) {
        if self.capacity > 1
            && let Some(page) = self.take_page(Hint::NEW)
        {
            self.lose(page);
        }
    }

    /// A page that was taken does not come back.
    fn lose(&mut self, page: PageId) {
        self.buffers.lose_page();
        self.outside.push(page);
        self.capacity -= 1;
    }

    fn vacate(&mut self, nth: usize) {
        let free = self.buffers.free_pages();
        assert_eq!(self.buffers.free_page_at(free), None);
        if free == 0 || self.capacity == 1 {
            return;
        }
        let at = nth as u32 % free;
        let page = self.buffers.free_page_at(at);
        assert_eq!(page, Some(self.buffers.take_free_page_at(at)));
        let page = page.expect("it is free");
        self.model.take(page);
        self.lose(page);
    }

    /// Moves a block's data, unless the block itself leaves to make room.
    fn move_block(&mut self, nth: usize) {
        let is_movable = |held: Held| held.life == Life::Clean && held.pins == 0;
        let Some(block) = self.model.nth(nth, is_movable) else { return };
        let page = self.take_page(Hint::NEW).expect("at least this block can leave");
        let page = match self.model.block(block) {
            Some(Ref { id, held: Some(_) }) => {
                let old = self.buffers.set_page(id, page);
                assert_eq!(old, self.model.change_page(block, page));
                old
            }
            _ => page,
        };
        self.give_page(page);
    }

    fn drop_ghosts(&mut self, count: u32) {
        for _ in 0..count {
            let Some(at) = self.buffers.drop_ghost_above() else { return };
            self.model.drop_ghost(block_at(&self.onodes, at));
            self.set_ram(at, BufferId::NONE);
        }
    }

    /// Packs one place of the tables: nothing that they say changes.
    fn pack(&mut self) -> bool {
        let before = self.onodes.units_held();
        let packed =
            before > self.onodes.units_used() && (self.pack_leaf() || self.onodes.pack_onode());
        assert!(self.onodes.units_held() <= before);
        packed
    }

    fn pack_leaf(&mut self) -> bool {
        let Some((from, to)) = self.onodes.top_leaf() else { return false };
        assert!(to < from, "a free leaf at the end");
        if self.onodes.get(self.onodes.leaf(from).onode).pins > 0 {
            return false;
        }
        self.onodes.move_leaf(from, to);
        for index in 0..LEAF_BLOCKS {
            let id = self.onodes.ram(to, index);
            if id.is_some() {
                self.buffers.set_block(id, addr(to, index));
            }
        }
        true
    }

    fn grow(&mut self) {
        if self.capacity == self.capacity_max {
            return;
        }
        if let Some(page) = self.outside.pop() {
            self.buffers.grow(page);
            self.model.give(page);
            self.capacity += 1;
        }
    }

    fn wait(&mut self, seconds: u32) {
        let now = self.model.advance(0);
        let now = self.model.advance(seconds.min(SECONDS_MAX - now));
        self.buffers.set_second(now as u16);
        self.onodes.set_second(now as u16);
    }

    fn trim(&mut self) {
        let evictable = self.buffers.evictable();
        let evicted = self.buffers.evict();
        assert_eq!(evicted.is_some(), evictable > 0, "{evictable} buffers can be evicted");
        if let Some(evicted) = evicted {
            self.forget(evicted);
        }
    }

    /// What a shard does when an eviction took something away.
    fn forget(&mut self, evicted: Evicted) {
        let (ghosts, before) = (self.buffers.usage().ghosts, self.model.counts().ghosts);
        let bound = self.ghosts_max();
        assert!(ghosts <= bound.max(before), "{before} ghosts, now {ghosts}, of {bound}");
        self.expected.evictions += 1;
        let young = self.model.evict(block_at(&self.onodes, evicted.block), evicted.ghost);
        self.expected.young_evictions += u64::from(young);
        self.set_ram(evicted.block, evicted.ghost.unwrap_or(BufferId::NONE));
        if let Some(dropped) = evicted.dropped {
            self.model.drop_ghost(block_at(&self.onodes, dropped));
            self.set_ram(dropped, BufferId::NONE);
        }
    }

    /// More ghosts than any policy wants to keep.
    fn ghosts_max(&self) -> u32 {
        let pages = self.capacity;
        match self.buffers.policy() {
            Policy::Lru => 0,
            Policy::TwoQ | Policy::TwoQBluestore => pages / 2,
            Policy::S3Fifo => pages - (pages / 10).max(1).min(pages),
            Policy::Reuse => 2 * pages,
        }
    }

    fn set_ram(&mut self, at: BlockAddr, id: BufferId) {
        let leaf = at.0 / LEAF_BLOCKS as u32;
        self.onodes.set_ram(leaf, at.0 as usize % LEAF_BLOCKS, id);
        self.onodes.free_if_empty(leaf);
    }

    /// An object's onode, looked up without a trace.
    fn find(&self, object: usize) -> Option<u32> {
        self.onodes.iter().find(|onode| {
            let onode = self.onodes.get(*onode);
            (onode.volume, onode.object) == volume_and_object(object)
        })
    }

    fn pin_onode(&mut self, object: usize) -> Option<u32> {
        let (volume, number) = volume_and_object(object);
        let known = self.onodes.lookup(volume, number);
        assert_eq!(known.is_some(), self.model.onode(object).is_some());
        if let Some(onode) = known {
            self.expected.onode_hits += 1;
            self.onodes.pin(onode);
            self.model.use_onode(object);
            return Some(onode);
        }
        self.expected.onode_misses += 1;
        if !self.onodes.has_room() {
            self.evict_onode()?;
        }
        let onode = self.onodes.create(volume, number).expect("an onode is free");
        self.model.create_onode(object);
        Some(onode)
    }

    fn unpin_onode(&mut self, object: usize) {
        let onode = self.find(object).expect("a pinned onode is there");
        self.onodes.unpin(onode);
        self.model.unpin_onode(object);
    }

    fn leaf_for(&mut self, onode: u32, block: usize) -> Option<(u32, usize)> {
        let known = self.onodes.block(onode, number(block));
        let mut paid = false;
        // What an eviction gave is made use of, even above the limit.
        while known.is_none()
            && self.onodes.leaves_free() == 0
            && !(paid && self.onodes.leaf_slots_free() > 0)
        {
            let before = self.onodes.units_used();
            self.evict_onode()?;
            paid = self.onodes.units_used() < before;
        }
        Some(self.onodes.leaf_for(onode, number(block)).expect("a leaf is free"))
    }

    fn evict_onode(&mut self) -> Option<()> {
        let onode = self.onodes.victim()?;
        let object = self.model.victim().expect("the model has a victim too");
        assert_eq!(self.find(object), Some(onode), "not the onode released longest ago");
        for block in object * OBJECT_BLOCKS..(object + 1) * OBJECT_BLOCKS {
            self.discard(block);
            self.free_leaf(block);
        }
        self.onodes.remove(onode);
        self.expected.onode_evictions += 1;
        self.model.evict_onode(object);
        Some(())
    }

    /// All that is under way ends, all pins are given back: then every page can be had, and nothing
    /// is left when all blocks are discarded.
    fn end(&mut self) {
        while !self.under_way.is_empty() {
            self.finish(0, Level::High, true);
        }
        for id in std::mem::take(&mut self.pins) {
            self.buffers.unpin(id);
            self.model.unpin(id);
        }
        for object in std::mem::take(&mut self.onode_pins) {
            self.unpin_onode(object);
        }
        while self.pack() {}
        assert_eq!(self.onodes.units_held(), self.onodes.units_used(), "it can all be packed");
        self.check();
        assert_eq!(self.buffers.available(), self.buffers.usage().pages(), "a page is stuck");
        self.step(Op::Lend(self.pages));
        self.check();
        while self.evict_onode().is_some() {}
        self.check();
        assert_eq!(self.onodes.used(), (0, 0));
        assert_eq!(self.buffers.usage().ghosts, 0);
    }

    /// Compares all that the machines say with the model.
    fn check(&mut self) {
        self.check_usage();
        // A thousand additions.
        if self.told.0.len().is_multiple_of(16) {
            assert_eq!(self.buffers.ages(), self.model.page_ages(), "pages by age");
            assert_eq!(self.onodes.ages(), self.model.leaf_ages(), "leaves by age");
        }
        for (block, id) in references(&self.onodes, &self.buffers).into_iter().enumerate() {
            assert_eq!(id, self.model.block(block).map(|slot| slot.id), "what block {block} has");
            self.check_block(block);
        }
        for (id, held) in self.model.detached() {
            assert!(self.buffers.is_detached(id));
            assert_eq!(self.buffers.page(id), held.page);
            assert_eq!(u32::from(self.buffers.pins(id)), held.pins);
        }
        for object in 0..OBJECTS {
            let pins = self.find(object).map(|onode| self.onodes.get(onode).pins);
            assert_eq!(
                pins,
                self.model.onode(object).map(|onode| onode.pins),
                "users of object {object}"
            );
        }
        let units = (self.onodes.units_used(), self.onodes.units_unevictable());
        assert_eq!(units, self.model.units(), "units of onodes and leaves");
        assert!(self.onodes.units_held() >= units.0);
        let counters = self.onodes.counters();
        let expected = &self.expected;
        assert_eq!((counters.hits, counters.misses), (expected.onode_hits, expected.onode_misses));
        assert_eq!(counters.evictions, expected.onode_evictions);
        assert_eq!(self.onodes.evictable(), self.model.evictable_onodes());
        assert_eq!(self.onodes.victim(), self.model.victim().and_then(|victim| self.find(victim)));
    }

    fn check_usage(&mut self) {
        let usage = self.buffers.usage();
        assert_eq!(self.buffers.recount(), usage, "what a recount says of the accounts");
        let counts = self.model.counts();
        let clean = usage.warm_in + usage.hot + usage.pinned_unlisted;
        let pinned = usage.pinned_listed + usage.pinned_unlisted;
        let in_flight = (usage.filling, usage.writing, usage.detached);
        assert_eq!(usage.free, counts.free, "free pages");
        assert_eq!((clean, pinned), (counts.clean, counts.clean_pinned), "clean, pinned");
        assert_eq!(in_flight, (counts.filling, counts.writing, counts.detached), "in flight");
        assert_eq!(usage.ghosts, counts.ghosts, "ghosts");
        assert_eq!(self.buffers.evictable(), clean - pinned);
        assert_eq!(self.buffers.available(), usage.free + clean - pinned);
        assert_eq!(self.buffers.capacity(), self.capacity);
        assert_eq!(usage.pages() + self.outside.len() as u32, self.pages, "pages in all");
        let counters = self.buffers.counters();
        let expected = &mut self.expected;
        assert_eq!((counters.hits, counters.misses), (expected.hits, expected.misses));
        assert_eq!(counters.evictions, expected.evictions, "evictions");
        assert_eq!(counters.young_evictions, expected.young_evictions, "young evictions");
    }

    fn check_block(&self, block: usize) {
        let Some(Ref { id, held }) = self.model.block(block) else { return };
        let Some(held) = held else {
            assert_eq!(self.buffers.state(id), State::Ghost, "{id:?}");
            return assert_eq!(self.buffers.page(id), PageId::NONE);
        };
        let state = match held.life {
            Life::Filling => State::Filling,
            Life::Writing => State::Writing,
            Life::Clean => State::Clean,
        };
        assert_eq!(self.buffers.state(id), state, "{id:?}");
        assert_eq!(self.buffers.page(id), held.page, "{id:?}");
        assert_eq!(u32::from(self.buffers.pins(id)), held.pins, "{id:?}");
        self.model.check_content(block, self.buffers.page(id));
    }
}
