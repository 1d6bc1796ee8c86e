//! The memory half alone: onodes and buffers as a shard has them, without log, device and store.
//!
//! A replay of a trace, the benchmarks and the fuzzer drive it. What a shard does with a block that
//! is in RAM, and with one that is not, is done here with the same tables in the same order; only
//! that data comes at once. A shard takes a rewritten block off its list until the log has it, and
//! lists it anew; here it has no time in flight and is used where it is.

use crate::buffer::{BlockAddr, BufferId, BufferStorage, Buffers, Evicted};
use crate::ids::{PageId, VolumeId};
use crate::limits::LEAF_BLOCKS;
use crate::onode::{NIL, OnodeStorage, Onodes};
use crate::policy::{Hint, Level, Policy};

/// Room for the tables of a [`Cache`]. Everything is allocated here and by [`Cache::new`].
#[derive(Debug)]
pub struct CacheStorage {
    buffers: BufferStorage,
    onodes: OnodeStorage,
    leaves: usize,
}

impl CacheStorage {
    /// Room for so many pages, onodes (objects) and leaves (64 KiB each).
    #[must_use]
    pub fn new(pages: u32, onodes: usize, leaves: usize) -> Self {
        let slots = BufferStorage::slots_for(pages as usize, 0);
        Self { buffers: BufferStorage::new(slots), onodes: OnodeStorage::new(onodes), leaves }
    }
}

/// Blocks of one object that a client asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// The volume.
    pub volume: VolumeId,
    /// The object.
    pub object: u32,
    /// First block in the object.
    pub first: u16,
    /// Blocks.
    pub count: u16,
    /// They are written, not read.
    pub write: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Cache<'a> {
    onodes: Onodes<'a>,
    buffers: Buffers<'a>,
    /// Stands for the time by which onodes are ordered: one for each new onode.
    second: u16,
}

impl<'a> Cache<'a> {
    /// An empty cache of `pages` pages, numbered from 0.
    ///
    /// # Panics
    ///
    /// If the storage was made for fewer pages, or there is none.
    #[must_use]
    pub fn new(storage: &'a mut CacheStorage, pages: u32, policy: Policy) -> Self {
        assert!(pages > 0, "a cache has a page");
        let CacheStorage { buffers, onodes, leaves } = storage;
        let onodes = Onodes::new(onodes, *leaves);
        let numbers: alloc::vec::Vec<_> = (0..pages).map(PageId).collect();
        Self { onodes, buffers: Buffers::new(buffers, &numbers, policy), second: 0 }
    }

    /// One request. Returns how many of its blocks were in RAM; the others are brought in.
    ///
    /// # Panics
    ///
    /// If there are no onodes or leaves for what is in RAM: the storage was made too small.
    #[inline]
    pub fn access(&mut self, access: Access) -> u32 {
        let Access { volume, object, first, count, write } = access;
        let onode = match self.onodes.lookup(volume, object) {
            Some(onode) => onode,
            None => self.create_onode(volume, object),
        };
        self.buffers.begin(usize::from(count), write);
        let mut hits = 0;
        for block in first..first + count {
            match self.resident(onode, block) {
                Some(buffer) => {
                    self.buffers.used(buffer, write);
                    hits += 1;
                }
                None => self.fill(onode, block, write),
            }
        }
        hits
    }

    /// Switches the policy; no buffer is dropped for it.
    pub fn set_policy(&mut self, policy: Policy) {
        self.buffers.set_policy(policy);
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.buffers.policy()
    }

    /// The buffers.
    #[must_use]
    pub fn buffers(&self) -> &Buffers<'a> {
        &self.buffers
    }

    /// The onodes.
    #[must_use]
    pub fn onodes(&self) -> &Onodes<'a> {
        &self.onodes
    }

    /// The buffer of a block that is in RAM.
    #[inline]
    fn resident(&self, onode: u32, block: u16) -> Option<BufferId> {
        let (leaf, index) = self.onodes.block(onode, block)?;
        self.onodes.buffer(leaf, index)
    }

    #[inline(never)]
    fn fill(&mut self, onode: u32, block: u16, write: bool) {
        self.buffers.miss();
        let hint = self.drop_ghost(onode, block);
        let taken = self.buffers.take_page(hint).expect("nothing is in flight for long");
        if let Some(evicted) = taken.evicted {
            forget_evicted(&mut self.onodes, evicted);
        }
        let (leaf, index) = loop {
            match self.onodes.leaf_for(onode, block) {
                Some(place) => break place,
                None => {
                    self.onodes.pin(onode);
                    self.evict_onode();
                    self.onodes.unpin(onode);
                }
            }
        };
        let addr = addr(leaf, index);
        let buffer = match write {
            true => self.buffers.insert_writing(addr, taken.page, hint),
            false => self.buffers.insert_filling(addr, taken.page, hint),
        };
        let buffer = buffer.expect("slots are always enough");
        self.onodes.set_ram(leaf, index, buffer);
        self.buffers.finish(buffer, Level::High);
    }

    fn drop_ghost(&mut self, onode: u32, block: u16) -> Hint {
        let Some((leaf, index)) = self.onodes.block(onode, block) else { return Hint::NEW };
        drop_buffer(&mut self.onodes, &mut self.buffers, leaf, index)
    }

    #[cold]
    fn create_onode(&mut self, volume: VolumeId, object: u32) -> u32 {
        self.second = self.second.wrapping_add(1);
        self.onodes.set_second(self.second);
        loop {
            match self.onodes.create(volume, object) {
                Some(onode) => {
                    self.onodes.unpin(onode);
                    return onode;
                }
                None => self.evict_onode(),
            }
        }
    }

    fn evict_onode(&mut self) {
        let victim = self.onodes.victim().expect("an onode that is not in use");
        for leaf in self.onodes.get(victim).leaves {
            if leaf == NIL {
                continue;
            }
            for index in 0..LEAF_BLOCKS {
                drop_buffer(&mut self.onodes, &mut self.buffers, leaf, index);
            }
            self.onodes.free_if_empty(leaf);
        }
        self.onodes.remove(victim);
    }
}

/// The address by which buffers and log pages refer to a block.
pub(crate) fn addr(leaf: u32, index: usize) -> BlockAddr {
    BlockAddr(leaf * LEAF_BLOCKS as u32 + index as u32)
}

/// The leaf and the block of it that an address means.
pub(crate) fn place(addr: BlockAddr) -> (u32, usize) {
    (addr.0 / LEAF_BLOCKS as u32, addr.0 as usize % LEAF_BLOCKS)
}

/// Ends a leaf's reference to a buffer or ghost; returns the hint for the next one.
pub(crate) fn drop_buffer(
    onodes: &mut Onodes<'_>,
    buffers: &mut Buffers<'_>,
    leaf: u32,
    index: usize,
) -> Hint {
    let buffer = onodes.ram(leaf, index);
    if !buffer.is_some() {
        return Hint::NEW;
    }
    onodes.set_ram(leaf, index, BufferId::NONE);
    let (hint, page) = buffers.discard(buffer);
    if let Some(page) = page {
        buffers.give_page(page);
    }
    hint
}

/// Ends the references to what an eviction took away.
pub(crate) fn forget_evicted(onodes: &mut Onodes<'_>, evicted: Evicted) {
    let (leaf, index) = place(evicted.block);
    onodes.set_ram(leaf, index, evicted.ghost.unwrap_or(BufferId::NONE));
    if evicted.ghost.is_none() {
        onodes.free_if_empty(leaf);
    }
    if let Some(dropped) = evicted.dropped {
        forget_ghost(onodes, dropped);
    }
}

/// Ends the reference to a ghost that is gone.
pub(crate) fn forget_ghost(onodes: &mut Onodes<'_>, block: BlockAddr) {
    let (leaf, index) = place(block);
    onodes.set_ram(leaf, index, BufferId::NONE);
    onodes.free_if_empty(leaf);
}
