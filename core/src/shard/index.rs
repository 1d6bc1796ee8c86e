//! The index: every reference between onodes, leaves, buffers and pages of the log is made and
//! broken here, so that all of them and their counts change together.

use super::{Shard, volume::Phase};
use crate::cache;
pub(super) use crate::cache::{addr, place};
use crate::event::{Mode, Output, ToKeeper};
use crate::ids::{Epoch, PageId};
use crate::limits::{LEAF_BLOCKS, PACK_BLOCKS_MAX};
use crate::onode::NIL;
use crate::policy::Hint;

impl Shard<'_> {
    /// The onode of an object, pinned; made if there is none. `None`: every onode is in use or
    /// dirty, and the keepers are asked to push.
    pub(super) fn pin_onode(&mut self, volume: usize, object: u32) -> Option<u32> {
        let id = self.volumes[volume].id;
        if let Some(onode) = self.onodes.lookup(id, object) {
            self.onodes.pin(onode);
            return Some(onode);
        }
        if !self.onodes.has_room() && self.evict_onode().is_none() {
            self.press();
            return None;
        }
        self.onodes.create(id, object)
    }

    pub(super) fn unpin_onode(&mut self, onode: u32) {
        self.onodes.unpin(onode);
    }

    /// Evicts the onode released longest ago, with all it says of clean blocks.
    pub(super) fn evict_onode(&mut self) -> Option<()> {
        let before = self.resident_blocks();
        self.drop_victim()?;
        self.counters.onode_evicted_blocks += before - self.resident_blocks();
        Some(())
    }

    /// The same, whatever for.
    pub(super) fn drop_victim(&mut self) -> Option<()> {
        let victim = self.onodes.victim()?;
        self.drop_leaves(victim);
        self.onodes.remove(victim);
        Some(())
    }

    /// Blocks in RAM.
    pub(super) fn resident_blocks(&self) -> u64 {
        let usage = self.buffers.usage();
        u64::from(usage.pages() - usage.free - usage.detached)
    }

    /// Drops all that is known of an object. Its dirty marks must be gone.
    pub(super) fn drop_leaves(&mut self, onode: u32) {
        for position in 0..crate::limits::ONODE_LEAVES {
            let leaf = self.onodes.get(onode).leaves[position];
            if leaf == NIL {
                continue;
            }
            for index in 0..LEAF_BLOCKS {
                self.drop_block(leaf, index);
            }
            self.onodes.free_if_empty(leaf);
        }
        self.onodes.get_mut(onode).hole = false;
    }

    /// Drops all that is known of one block, but for its dirty marks.
    pub(super) fn drop_block(&mut self, leaf: u32, index: usize) {
        self.drop_buffer(leaf, index);
        self.drop_log_page(leaf, index);
        let slot = self.onodes.leaf_mut(leaf);
        slot.zero &= !(1 << index);
        slot.bad &= !(1 << index);
        slot.referenced &= !(1 << index);
    }

    /// Ends the leaf's reference to a buffer or ghost; returns the hint for the next one.
    pub(super) fn drop_buffer(&mut self, leaf: u32, index: usize) -> Hint {
        cache::drop_buffer(&mut self.onodes, &mut self.buffers, leaf, index)
    }

    pub(super) fn drop_log_page(&mut self, leaf: u32, index: usize) {
        let page = self.onodes.leaf(leaf).nvme[index];
        if page != NIL {
            self.onodes.leaf_mut(leaf).nvme[index] = NIL;
            self.log.clear_owner(page);
            self.nvme_blocks -= 1;
        }
    }

    pub(super) fn set_log_page(&mut self, leaf: u32, index: usize, page: u32) {
        debug_assert_eq!(self.onodes.leaf(leaf).nvme[index], NIL);
        self.onodes.leaf_mut(leaf).nvme[index] = page;
        self.log.set_owner(page, addr(leaf, index));
        self.nvme_blocks += 1;
    }

    /// A page for a block of which so much is known. What an eviction takes away is forgotten here.
    pub(super) fn take_page(&mut self, incoming: Hint) -> Option<PageId> {
        let taken = self.buffers.take_page(incoming).ok()?;
        if let Some(evicted) = taken.evicted {
            cache::forget_evicted(&mut self.onodes, evicted);
        }
        Some(taken.page)
    }

    /// Whether a block still belongs to the closed epoch, so that its place must be kept.
    pub(super) fn is_closed_dirty(&self, volume: usize, leaf: u32, index: usize) -> bool {
        let parity = self.volumes[volume].closed_parity();
        parity.is_some_and(|parity| self.onodes.leaf(leaf).dirty[parity] & 1 << index != 0)
    }

    /// Makes place for a new version of a block in the open epoch: the closed epoch's version moves
    /// to the leaf's shadow (which must exist if there is one), any other is dropped. Returns the
    /// hint for the new buffer.
    pub(super) fn supersede(&mut self, volume: usize, leaf: u32, index: usize) -> Hint {
        let bit = 1u16 << index;
        if self.is_closed_dirty(volume, leaf, index) {
            let parity = self.volumes[volume].open.parity() ^ 1;
            let shadow = self.onodes.leaf(leaf).shadow;
            assert_ne!(shadow, NIL, "the shadow is made before anything changes");
            let slot = self.onodes.leaf_mut(leaf);
            slot.dirty[parity] &= !bit;
            let (page, crc, zero) = (slot.nvme[index], slot.crc[index], slot.zero & bit);
            let sent = slot.sent & bit;
            slot.nvme[index] = NIL;
            slot.sent &= !bit;
            let kept = self.onodes.leaf_mut(shadow);
            kept.dirty[parity] |= bit;
            kept.nvme[index] = page;
            kept.crc[index] = crc;
            kept.zero |= zero;
            kept.sent |= sent;
            if page != NIL {
                if self.log.is_unwritten(page) {
                    self.onodes.leaf_mut(shadow).moving |= bit;
                }
                self.log.change_owner(page, addr(shadow, index));
            }
        } else {
            self.drop_log_page(leaf, index);
        }
        let slot = self.onodes.leaf_mut(leaf);
        slot.zero &= !bit;
        slot.bad &= !bit;
        self.drop_buffer(leaf, index)
    }

    /// Marks a block as one that the store does not have, in the open epoch.
    pub(super) fn set_dirty(&mut self, volume: usize, onode: u32, leaf: u32, index: usize) {
        let parity = self.volumes[volume].open.parity();
        let bit = 1u16 << index;
        let mask = &mut self.onodes.leaf_mut(leaf).dirty[parity];
        if *mask & bit != 0 {
            return;
        }
        *mask |= bit;
        self.onodes.get_mut(onode).dirty_blocks += 1;
        self.volumes[volume].dirty[parity] += 1;
        self.dirty_blocks += 1;
        self.list_dirty(volume, onode);
        let state = &mut self.volumes[volume];
        let full = state.dirty[parity] >= PACK_BLOCKS_MAX as u64;
        if full && !state.grown && state.mode != Mode::Ephemeral {
            state.grown = true;
            let volume = state.id;
            self.emit(Output::Keeper(ToKeeper::Grown { volume }));
        }
    }

    /// Puts an onode on its volume's list of the open epoch.
    pub(super) fn list_dirty(&mut self, volume: usize, onode: u32) {
        let state = &mut self.volumes[volume];
        let parity = state.open.parity();
        let slot = self.onodes.get_mut(onode);
        if !slot.listed[parity] {
            slot.listed[parity] = true;
            slot.next_dirty[parity] = state.dirty_list[parity];
            state.dirty_list[parity] = onode;
            self.onodes.settle(onode);
        }
        state.dirtied = true;
    }

    /// Clears the dirty marks `mask` of a leaf (or shadow) in one epoch.
    pub(super) fn clear_dirty(&mut self, volume: usize, leaf: u32, parity: usize, mask: u16) {
        let slot = self.onodes.leaf_mut(leaf);
        let cleared = (slot.dirty[parity] & mask).count_ones();
        slot.dirty[parity] &= !mask;
        slot.sent &= !mask;
        let onode = slot.onode;
        self.onodes.get_mut(onode).dirty_blocks -= cleared;
        self.volumes[volume].dirty[parity] -= u64::from(cleared);
        self.dirty_blocks -= u64::from(cleared);
    }

    /// Frees a leaf's shadow and the pages it keeps; its dirty marks must be cleared.
    pub(super) fn drop_shadow(&mut self, leaf: u32) {
        let shadow = self.onodes.leaf(leaf).shadow;
        if shadow == NIL {
            return;
        }
        debug_assert_eq!(self.onodes.leaf(shadow).dirty, [0; 2]);
        for index in 0..LEAF_BLOCKS {
            self.drop_log_page(shadow, index);
        }
        self.onodes.free_shadow(leaf);
    }

    /// The epoch that a dirty block's version belongs to.
    pub(super) fn dirty_epoch(&self, volume: usize, leaf: u32, index: usize) -> Option<Epoch> {
        let bit = 1u16 << index;
        let slot = self.onodes.leaf(leaf);
        let state = &self.volumes[volume];
        let open = state.open.parity();
        if slot.dirty[open] & bit != 0 {
            Some(state.open)
        } else if slot.dirty[open ^ 1] & bit != 0 {
            debug_assert!(state.phase != Phase::Idle);
            Some(state.closed())
        } else {
            None
        }
    }

    /// Makes sure that so many leaves can be taken, evicting onodes if need be; else all that is
    /// not in use is dirty, and the keepers are asked to push. What has been evicted is made use of
    /// even when the shard has more than its share: that is worked off elsewhere.
    pub(super) fn reserve_leaves(&mut self, count: u32) -> bool {
        let before = self.onodes.units_used();
        while self.onodes.leaves_free() < count {
            let paid = before - self.onodes.units_used() >= count;
            if paid && self.onodes.leaf_slots_free() >= count {
                return true;
            }
            if self.evict_onode().is_none() {
                self.press();
                return false;
            }
        }
        true
    }
}
