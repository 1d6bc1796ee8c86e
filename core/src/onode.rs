//! Onodes: the in-memory record of each object, and of each of its blocks.
//!
//! An onode has one slot for each 64 KiB of its object; a slot names a *leaf*, taken from a table
//! that is allocated once. A leaf says of each of its 16 blocks where the data is: in RAM (a
//! buffer), on NVMe (a page of the region, with the checksum), known to be zeroes, or nowhere here,
//! which means that the store knows. So a lookup is one hash probe and two array accesses.
//!
//! A leaf has two dirty masks, one for each of the two epochs that can be uncommitted. When a block
//! that belongs to a closed epoch is written again, its place moves to the leaf's *shadow* (a leaf
//! of its own) until that epoch is committed: log data is immutable, so a push never waits for a
//! writer nor a writer for a push.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::mem::MaybeUninit;

use crate::ages::{Ages, Stamp, WINDOWS};
use crate::buffer::BufferId;
use crate::ids::VolumeId;
use crate::limits::{LEAF_BLOCKS, ONODE_LEAVES};
use crate::list::{Link, Queue, queues};

/// No onode, no leaf, no page of the region.
pub const NIL: u32 = u32::MAX;

/// Bytes of the unit in which metadata is budgeted: a leaf takes one.
pub const META_UNIT_BYTES: usize = 256;
/// Units that an onode takes.
pub const ONODE_UNITS: u32 = 2;

const _: () = assert!(size_of::<Leaf>() <= META_UNIT_BYTES);
const _: () = assert!(size_of::<Onode>() <= ONODE_UNITS as usize * META_UNIT_BYTES);

/// Which of a leaf's sixteen blocks have a buffer, and which a ghost. These few bytes of all leaves
/// stay in the processor's caches, so that hit or miss is known without waiting for memory, and a
/// ghost ends without a look at the leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Present {
    buffers: u16,
    ghosts: u16,
}

/// The buffer or ghost of each of a leaf's blocks that has one: one cache line, apart from the rest
/// of the leaf, because a hit in RAM needs nothing else of it.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct Row([BufferId; LEAF_BLOCKS]);

/// Sixteen blocks of an object, but for what of them is in RAM.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// The page of the region that holds each block, or [`NIL`].
    pub nvme: [u32; LEAF_BLOCKS],
    /// CRC32C of each block whose data is in RAM or on NVMe.
    pub crc: [u32; LEAF_BLOCKS],
    /// Blocks that read as zeroes.
    pub zero: u16,
    /// Blocks of each of the two epochs (by parity) that the store does not have yet.
    pub dirty: [u16; 2],
    /// Blocks whose only copy was damaged: reading them is an error until they are written again.
    pub bad: u16,
    /// Shadow only: blocks whose place in the log is not written yet.
    pub moving: u16,
    /// Blocks of the closed epoch that the keeper has been given.
    pub sent: u16,
    /// Blocks read since reclaim last passed.
    pub referenced: u16,
    /// The leaf that keeps the closed epoch's version of blocks written again, or [`NIL`]. Of a
    /// free leaf: the next free one.
    pub shadow: u32,
    /// The onode; [`NIL`]: the leaf is free.
    pub onode: u32,
    /// Of a free leaf: the free one before.
    before: u32,
    /// Which of the onode's leaves this is.
    pub position: u8,
    /// This is another leaf's shadow.
    pub is_shadow: bool,
}

impl Leaf {
    const EMPTY: Self = Self {
        nvme: [NIL; LEAF_BLOCKS],
        crc: [0; LEAF_BLOCKS],
        zero: 0,
        dirty: [0; 2],
        bad: 0,
        moving: 0,
        sent: 0,
        referenced: 0,
        shadow: NIL,
        onode: NIL,
        before: NIL,
        position: 0,
        is_shadow: false,
    };

    /// Whether the leaf says nothing of any block.
    fn is_empty(&self) -> bool {
        self.zero == 0
            && self.dirty == [0; 2]
            && self.bad == 0
            && self.shadow == NIL
            && all_ones(self.nvme.iter().copied())
    }
}

impl Leaf {
    /// The use of a free leaf begins: it says nothing of its blocks, only what is said of them all
    /// may be left over.
    fn begin(&mut self, onode: u32, position: u8) {
        debug_assert!(self.has_no_places(), "a free leaf holds log pages");
        let Self { zero, dirty, bad, moving, sent, referenced, .. } = Self::EMPTY;
        (self.zero, self.dirty, self.bad) = (zero, dirty, bad);
        (self.moving, self.sent, self.referenced) = (moving, sent, referenced);
        (self.onode, self.position, self.is_shadow) = (onode, position, false);
        (self.shadow, self.before) = (NIL, NIL);
    }

    fn has_no_places(&self) -> bool {
        all_ones(self.nvme.iter().copied())
    }
}

/// Whether all are `u32::MAX`; without a branch for each.
fn all_ones(values: impl Iterator<Item = u32>) -> bool {
    values.fold(u32::MAX, |all, value| all & value) == u32::MAX
}

/// One object.
#[derive(Clone, Debug)]
pub struct Onode {
    /// The volume.
    pub volume: VolumeId,
    /// The object in the volume.
    pub object: u32,
    /// Leaves, or [`NIL`].
    pub leaves: [u32; ONODE_LEAVES],
    /// Requests and operations that refer to it.
    pub pins: u32,
    /// Leaf masks (either parity) that have a bit set, shadows included: 0 means clean.
    pub dirty_blocks: u32,
    /// Blocks that nothing is known of read as zeroes: the object was discarded whole.
    pub hole: bool,
    /// The discard of the whole object belongs to these uncommitted epochs.
    pub hole_dirty: [bool; 2],
    /// It is on the volume's list of dirty onodes of this parity.
    pub listed: [bool; 2],
    /// The next onode of that list.
    pub next_dirty: [u32; 2],
    /// A request that reads before it writes is under way: other changes wait.
    pub merging: bool,
    /// Where the last read ended, in blocks: to know a stream.
    pub stream_end: u16,
    /// Blocks of the current stream so far.
    pub stream_run: u16,
    /// Leaves and shadows.
    leaf_count: u16,
    /// Last use.
    used: Stamp,
    /// The next onode of the same bucket. Of a free onode: the next free one (and `next_dirty[0]`
    /// the one before).
    hash_next: u32,
}

impl Onode {
    const UNUSED: Self = Self {
        volume: VolumeId(NIL),
        object: 0,
        leaves: [NIL; ONODE_LEAVES],
        pins: 0,
        dirty_blocks: 0,
        hole: false,
        hole_dirty: [false; 2],
        listed: [false; 2],
        next_dirty: [NIL; 2],
        merging: false,
        stream_end: 0,
        stream_run: 0,
        leaf_count: 0,
        used: Stamp::ZERO,
        hash_next: NIL,
    };

    /// Whether the store lacks something of it.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty_blocks > 0 || self.hole_dirty != [false; 2]
    }
}

/// Links of the onode list.
#[derive(Debug)]
pub struct OnodeStorage {
    links: Box<[Link]>,
}

impl OnodeStorage {
    /// Memory for so many onodes.
    #[must_use]
    pub fn new(onodes: usize) -> Self {
        Self { links: (0..onodes).map(|_| Link::default()).collect() }
    }
}

/// Memory that the tables have and do not use.
#[derive(Debug)]
pub struct Spare<'a> {
    /// Of the onodes.
    pub onodes: &'a mut [MaybeUninit<Onode>],
    /// Of the leaves.
    pub leaves: &'a mut [MaybeUninit<Leaf>],
    /// Of what the leaves have in RAM.
    pub present: &'a mut [MaybeUninit<Present>],
    /// Of where it is.
    pub rows: &'a mut [MaybeUninit<Row>],
}

/// Counts, for the status.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OnodeCounters {
    /// Lookups that found their onode.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Onodes evicted.
    pub evictions: u64,
}

/// All onodes of a shard and their leaves. Evictable ones (clean, unpinned) are on one list, by
/// the time of their last release.
///
/// Both tables have address space for the most they may ever hold, and take memory as slots are
/// used for the first time. [`limit`](Self::set_limit) says how much they should take; packing
/// ([`top_leaf`](Self::top_leaf), [`pack_onode`](Self::pack_onode)) moves what lies highest into
/// free slots below, so that the end of a table can be given back.
#[derive(Debug)]
pub struct Onodes<'a> {
    onodes: Vec<Onode>,
    leaves: Vec<Leaf>,
    /// Of the leaves with the same numbers.
    present: Vec<Present>,
    /// Of the leaves with the same numbers.
    rows: Vec<Row>,
    /// Two or more for each onode, so that most have one of their own.
    buckets: Box<[u32]>,
    bucket_shift: u32,
    free_onode: u32,
    free_leaf: u32,
    onodes_used: u32,
    leaves_used: u32,
    limit: u32,
    lru: Queue<'a>,
    /// Leaves of the onodes on it.
    lru_leaves: u32,
    ages: Ages,
    counters: OnodeCounters,
}

impl<'a> Onodes<'a> {
    /// Empty tables, without a limit.
    #[must_use]
    pub fn new(storage: &'a mut OnodeStorage, leaves: usize) -> Self {
        let count = storage.links.len();
        let [lru] = queues(&mut storage.links);
        let buckets = (2 * count).next_power_of_two().max(2);
        Self {
            onodes: Vec::with_capacity(count),
            leaves: Vec::with_capacity(leaves),
            present: Vec::with_capacity(leaves),
            rows: Vec::with_capacity(leaves),
            buckets: core::iter::repeat_n(NIL, buckets).collect(),
            bucket_shift: u64::BITS - buckets.ilog2(),
            free_onode: NIL,
            free_leaf: NIL,
            onodes_used: 0,
            leaves_used: 0,
            limit: u32::MAX,
            lru,
            lru_leaves: 0,
            ages: Ages::new(),
            counters: OnodeCounters::default(),
        }
    }

    /// Time goes on: the present second, modulo 2^16.
    pub fn set_second(&mut self, second: u16) {
        self.ages.advance(second);
    }

    /// Leaves by the time since the last use of their onode.
    #[must_use]
    pub fn ages(&self) -> [u64; WINDOWS] {
        self.ages.windows(u64::from(self.leaves_used))
    }

    /// From now on the tables should take at most so many units. Nothing is dropped for it here.
    pub fn set_limit(&mut self, units: u32) {
        self.limit = units;
    }

    /// Units of what is in use.
    #[must_use]
    pub fn units_used(&self) -> u32 {
        self.leaves_used + ONODE_UNITS * self.onodes_used
    }

    /// Units of memory that the tables take, free slots between used ones included.
    #[must_use]
    pub fn units_held(&self) -> u32 {
        self.leaves.len() as u32 + ONODE_UNITS * self.onodes.len() as u32
    }

    /// Units of what is dirty or in use.
    #[must_use]
    pub fn units_unevictable(&self) -> u32 {
        self.units_used() - self.lru_leaves - ONODE_UNITS * self.lru.len()
    }

    /// Units above the limit that are in use.
    #[must_use]
    pub fn units_over(&self) -> u32 {
        self.units_used().saturating_sub(self.limit)
    }

    /// The memory behind the ends of the tables. It may be given back to the system: what it holds
    /// means nothing.
    pub fn spare(&mut self) -> Spare<'_> {
        Spare {
            onodes: self.onodes.spare_capacity_mut(),
            leaves: self.leaves.spare_capacity_mut(),
            present: self.present.spare_capacity_mut(),
            rows: self.rows.spare_capacity_mut(),
        }
    }

    /// The onode at a slot in use.
    #[must_use]
    pub fn get(&self, onode: u32) -> &Onode {
        &self.onodes[onode as usize]
    }

    /// The onode at a slot in use.
    pub fn get_mut(&mut self, onode: u32) -> &mut Onode {
        &mut self.onodes[onode as usize]
    }

    /// The leaf at a slot in use.
    #[must_use]
    pub fn leaf(&self, leaf: u32) -> &Leaf {
        &self.leaves[leaf as usize]
    }

    /// The leaf at a slot in use.
    pub fn leaf_mut(&mut self, leaf: u32) -> &mut Leaf {
        &mut self.leaves[leaf as usize]
    }

    /// The buffer of a block of a leaf in use, if it has one.
    #[must_use]
    #[inline]
    pub fn buffer(&self, leaf: u32, index: usize) -> Option<BufferId> {
        let buffers = self.present[leaf as usize].buffers;
        (buffers & 1 << index != 0).then(|| self.rows[leaf as usize].0[index])
    }

    /// The buffer or ghost of a block of a leaf in use, or [`BufferId::NONE`].
    #[must_use]
    pub fn ram(&self, leaf: u32, index: usize) -> BufferId {
        let Present { buffers, ghosts } = self.present[leaf as usize];
        if (buffers | ghosts) & 1 << index != 0 {
            self.rows[leaf as usize].0[index]
        } else {
            BufferId::NONE
        }
    }

    /// Changes the buffer or ghost of a block.
    pub fn set_ram(&mut self, leaf: u32, index: usize, buffer: BufferId) {
        let present = &mut self.present[leaf as usize];
        let bit = 1 << index;
        present.buffers &= !bit;
        present.ghosts &= !bit;
        if buffer.is_some() {
            *if buffer.is_buffer() { &mut present.buffers } else { &mut present.ghosts } |= bit;
            self.rows[leaf as usize].0[index] = buffer;
        }
    }

    fn has_ram(&self, leaf: u32) -> bool {
        self.present[leaf as usize] != Present::default()
    }

    /// Counts since the start.
    #[must_use]
    pub fn counters(&self) -> OnodeCounters {
        self.counters
    }

    /// Onodes in use, leaves in use.
    #[must_use]
    pub fn used(&self) -> (u32, u32) {
        (self.onodes_used, self.leaves_used)
    }

    /// Onodes that eviction would give.
    #[must_use]
    pub fn evictable(&self) -> u32 {
        self.lru.len()
    }

    /// Leaves that may be taken within the limit.
    #[must_use]
    pub fn leaves_free(&self) -> u32 {
        self.leaf_slots_free().min(self.limit.saturating_sub(self.units_used()))
    }

    /// Leaves that may be taken whatever the limit.
    #[must_use]
    pub fn leaf_slots_free(&self) -> u32 {
        self.leaves.capacity() as u32 - self.leaves_used
    }

    fn bucket(&self, volume: VolumeId, object: u32) -> usize {
        // Fibonacci hashing: the highest bits of the product spread neighbouring objects evenly.
        let key = u64::from(volume.0) << 32 | u64::from(object);
        let hash = (key ^ (key >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (hash >> self.bucket_shift) as usize
    }

    /// The object's onode, if it has one. No use of it.
    pub(crate) fn find(&self, volume: VolumeId, object: u32) -> Option<u32> {
        let mut index = self.buckets[self.bucket(volume, object)];
        while index != NIL {
            let onode = self.get(index);
            if onode.object == object && onode.volume == volume {
                return Some(index);
            }
            index = onode.hash_next;
        }
        None
    }

    /// The object's onode, if it has one. A use: of what is evictable, it goes last. The first use
    /// in a second decides; that order is fine enough for what lives for minutes, and makes the
    /// others cost a comparison.
    #[inline]
    pub fn lookup(&mut self, volume: VolumeId, object: u32) -> Option<u32> {
        let Some(index) = self.find(volume, object) else {
            self.counters.misses += 1;
            return None;
        };
        self.counters.hits += 1;
        if self.get(index).used != self.ages.now() {
            self.renew(index);
        }
        Some(index)
    }

    #[cold]
    fn renew(&mut self, index: u32) {
        let onode = &mut self.onodes[index as usize];
        self.ages.touch(&mut onode.used, u32::from(onode.leaf_count));
        self.lru.move_to_front(index);
    }

    /// Whether an onode may be made within the limit.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let full = self.onodes_used as usize == self.onodes.capacity();
        !full && self.units_used() + ONODE_UNITS <= self.limit
    }

    /// A new onode, pinned once, whatever the limit; `None` when the table is full: evict first.
    pub fn create(&mut self, volume: VolumeId, object: u32) -> Option<u32> {
        debug_assert!(self.find(volume, object).is_none());
        let index = self.take_onode()?;
        let bucket = self.bucket(volume, object);
        let next = self.buckets[bucket];
        let used = self.ages.now();
        let onode = self.get_mut(index);
        onode.volume = volume;
        onode.object = object;
        onode.hash_next = next;
        onode.pins = 1;
        onode.stream_end = 0;
        onode.stream_run = 0;
        onode.used = used;
        self.buckets[bucket] = index;
        self.onodes_used += 1;
        Some(index)
    }

    fn take_onode(&mut self) -> Option<u32> {
        let index = self.free_onode;
        if index != NIL {
            self.unlink_free_onode(index);
            return Some(index);
        }
        if self.onodes.len() == self.onodes.capacity() {
            return None;
        }
        self.onodes.push(Onode::UNUSED);
        Some(self.onodes.len() as u32 - 1)
    }

    fn link_free_onode(&mut self, index: u32) {
        let next = self.free_onode;
        if next != NIL {
            self.get_mut(next).next_dirty[0] = index;
        }
        *self.get_mut(index) = Onode { hash_next: next, ..Onode::UNUSED };
        self.free_onode = index;
    }

    fn unlink_free_onode(&mut self, index: u32) {
        let (next, before) = (self.get(index).hash_next, self.get(index).next_dirty[0]);
        match before {
            NIL => self.free_onode = next,
            _ => self.get_mut(before).hash_next = next,
        }
        if next != NIL {
            self.get_mut(next).next_dirty[0] = before;
        }
        *self.get_mut(index) = Onode::UNUSED;
    }

    /// One more user: takes it off the list of evictable onodes.
    pub fn pin(&mut self, index: u32) {
        let onode = self.get_mut(index);
        onode.pins += 1;
        if onode.pins == 1 {
            self.unlist(index);
        }
    }

    /// One user less. A clean onode without users becomes evictable, as the last to go.
    pub fn unpin(&mut self, index: u32) {
        let onode = self.get_mut(index);
        assert!(onode.pins > 0, "unpin of an onode nobody holds");
        onode.pins -= 1;
        self.settle(index);
    }

    /// Puts an onode on the list of evictable ones if it belongs there.
    pub fn settle(&mut self, index: u32) {
        let onode = self.get(index);
        let linked = onode.listed != [false; 2];
        let evictable = onode.pins == 0 && !onode.is_dirty() && !linked;
        if !evictable {
            self.unlist(index);
        } else if !self.lru.contains(index) {
            self.lru_leaves += u32::from(onode.leaf_count);
            self.lru.push_front(index);
        }
    }

    fn unlist(&mut self, index: u32) {
        if self.lru.remove(index) {
            self.lru_leaves -= u32::from(self.get(index).leaf_count);
        }
    }

    /// The onode to evict next.
    #[must_use]
    pub fn victim(&self) -> Option<u32> {
        self.lru.back()
    }

    /// Frees an onode that has no leaves left.
    pub fn remove(&mut self, index: u32) {
        let (volume, object) = (self.get(index).volume, self.get(index).object);
        let onode = self.get(index);
        assert!(onode.pins == 0 && !onode.is_dirty(), "removal of an onode in use");
        debug_assert!(onode.leaves.iter().all(|leaf| *leaf == NIL));
        debug_assert_eq!(onode.leaf_count, 0);
        let next = onode.hash_next;
        self.redirect(volume, object, index, next);
        self.unlist(index);
        self.link_free_onode(index);
        self.onodes_used -= 1;
        self.counters.evictions += 1;
    }

    /// Makes whoever in the object's bucket leads to `from` lead to `to`.
    fn redirect(&mut self, volume: VolumeId, object: u32, from: u32, to: u32) {
        let bucket = self.bucket(volume, object);
        if self.buckets[bucket] == from {
            self.buckets[bucket] = to;
            return;
        }
        let mut before = self.buckets[bucket];
        while self.get(before).hash_next != from {
            before = self.get(before).hash_next;
        }
        self.get_mut(before).hash_next = to;
    }

    /// Shortens the table of onodes by one if its last slot is free, or if its onode is evictable
    /// and there is a free slot below. `false`: it is not so now.
    pub fn pack_onode(&mut self) -> bool {
        let Some(last) = self.onodes.len().checked_sub(1) else { return false };
        let last = last as u32;
        if self.get(last).volume == VolumeId(NIL) {
            self.unlink_free_onode(last);
            self.onodes.pop();
            return true;
        }
        let to = self.free_onode;
        if to == NIL || !self.lru.contains(last) {
            return false;
        }
        self.unlink_free_onode(to);
        let onode = self.get(last).clone();
        self.redirect(onode.volume, onode.object, last, to);
        for leaf in onode.leaves.into_iter().filter(|leaf| *leaf != NIL) {
            self.leaf_mut(leaf).onode = to;
            let shadow = self.leaf(leaf).shadow;
            if shadow != NIL {
                self.leaf_mut(shadow).onode = to;
            }
        }
        self.lru.replace(last, to);
        *self.get_mut(to) = onode;
        self.onodes.pop();
        true
    }

    /// The leaf that holds a block, if there is one, and the block's place in it.
    #[must_use]
    pub fn block(&self, onode: u32, block: u16) -> Option<(u32, usize)> {
        let leaf = self.get(onode).leaves[usize::from(block) / LEAF_BLOCKS];
        (leaf != NIL).then_some((leaf, usize::from(block) % LEAF_BLOCKS))
    }

    /// The leaf for a block, made if there is none; `None` when no leaf is free.
    pub fn leaf_for(&mut self, onode: u32, block: u16) -> Option<(u32, usize)> {
        if let Some(found) = self.block(onode, block) {
            return Some(found);
        }
        let position = usize::from(block) / LEAF_BLOCKS;
        let leaf = self.take_leaf(onode, position as u8)?;
        self.get_mut(onode).leaves[position] = leaf;
        Some((leaf, usize::from(block) % LEAF_BLOCKS))
    }

    /// The leaf's shadow, made if there is none; `None` when no leaf is free.
    pub fn shadow_for(&mut self, leaf: u32) -> Option<u32> {
        let (shadow, onode, position) = {
            let leaf = self.leaf(leaf);
            (leaf.shadow, leaf.onode, leaf.position)
        };
        if shadow != NIL {
            return Some(shadow);
        }
        let shadow = self.take_leaf(onode, position)?;
        self.leaf_mut(shadow).is_shadow = true;
        self.leaf_mut(leaf).shadow = shadow;
        Some(shadow)
    }

    fn take_leaf(&mut self, onode: u32, position: u8) -> Option<u32> {
        let leaf = match self.free_leaf {
            NIL if self.leaves.len() == self.leaves.capacity() => return None,
            NIL => {
                self.leaves.push(Leaf::EMPTY);
                self.present.push(Present::default());
                self.rows.push(Row([BufferId::NONE; LEAF_BLOCKS]));
                self.leaves.len() as u32 - 1
            }
            free => {
                self.unlink_free_leaf(free);
                free
            }
        };
        self.leaves_used += 1;
        self.leaf_mut(leaf).begin(onode, position);
        let owner = &mut self.onodes[onode as usize];
        owner.leaf_count += 1;
        self.lru_leaves += u32::from(self.lru.contains(onode));
        self.ages.add_to(owner.used, 1);
        Some(leaf)
    }

    fn unlink_free_leaf(&mut self, leaf: u32) {
        let (next, before) = (self.leaf(leaf).shadow, self.leaf(leaf).before);
        match before {
            NIL => self.free_leaf = next,
            _ => self.leaf_mut(before).shadow = next,
        }
        if next != NIL {
            self.leaf_mut(next).before = before;
        }
    }

    /// Shortens the table of leaves by the free slots at its end. Returns the last leaf, which is
    /// in use, and a free one below it, if there is any: the owner may move the one to the other
    /// ([`move_leaf`](Self::move_leaf)) and tell those who refer to it.
    pub fn top_leaf(&mut self) -> Option<(u32, u32)> {
        while self.leaves.last()?.onode == NIL {
            self.unlink_free_leaf(self.leaves.len() as u32 - 1);
            self.leaves.pop();
            self.present.pop();
            self.rows.pop();
        }
        let last = self.leaves.len() as u32 - 1;
        (self.free_leaf != NIL).then_some((last, self.free_leaf))
    }

    /// Moves a leaf to a free slot. Nobody may hold its number but its onode, its buffers, its log
    /// pages; of these the onode is told here.
    pub fn move_leaf(&mut self, from: u32, to: u32) {
        self.unlink_free_leaf(to);
        let leaf = self.leaf(from).clone();
        debug_assert_eq!(self.get(leaf.onode).pins, 0, "a leaf moves while nobody uses it");
        let position = usize::from(leaf.position);
        if leaf.is_shadow {
            let main = self.get(leaf.onode).leaves[position];
            self.leaf_mut(main).shadow = to;
        } else {
            self.get_mut(leaf.onode).leaves[position] = to;
        }
        *self.leaf_mut(to) = leaf;
        *self.leaf_mut(from) = Leaf::EMPTY;
        self.present[to as usize] = core::mem::take(&mut self.present[from as usize]);
        self.rows[to as usize] = self.rows[from as usize];
        self.link_free_leaf(from);
    }

    /// Frees a leaf's shadow.
    pub fn free_shadow(&mut self, leaf: u32) {
        let shadow = self.leaf(leaf).shadow;
        self.leaf_mut(leaf).shadow = NIL;
        self.free_leaf(shadow);
    }

    /// Frees a leaf that says nothing any more; tells whether it did.
    pub fn free_if_empty(&mut self, leaf: u32) -> bool {
        if self.has_ram(leaf) {
            return false;
        }
        let slot = self.leaf(leaf);
        if !slot.is_empty() || slot.is_shadow {
            return false;
        }
        let (onode, position) = (slot.onode, slot.position);
        self.get_mut(onode).leaves[usize::from(position)] = NIL;
        self.free_leaf(leaf);
        true
    }

    fn free_leaf(&mut self, leaf: u32) {
        let slot = &self.leaves[leaf as usize];
        debug_assert!(slot.has_no_places(), "a freed leaf holds log pages");
        debug_assert!(!self.has_ram(leaf), "a freed leaf holds buffers");
        let owner = &mut self.onodes[slot.onode as usize];
        owner.leaf_count -= 1;
        self.lru_leaves -= u32::from(self.lru.contains(slot.onode));
        self.ages.remove(owner.used, 1);
        self.link_free_leaf(leaf);
        self.leaves_used -= 1;
    }

    fn link_free_leaf(&mut self, leaf: u32) {
        let next = self.free_leaf;
        if next != NIL {
            self.leaf_mut(next).before = leaf;
        }
        let slot = self.leaf_mut(leaf);
        slot.onode = NIL;
        slot.shadow = next;
        slot.before = NIL;
        self.free_leaf = leaf;
    }

    /// Slots of onodes that have been used: all onodes have numbers below.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.onodes.len() as u32
    }

    /// All onodes in use, in slot order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let used = |index: &u32| self.get(*index).volume != VolumeId(NIL);
        (0..self.onodes.len() as u32).filter(used)
    }
}

#[cfg(test)]
mod tests;
