//! Discards and zeroes: through RAM, log and, at the next push, the store.

use super::request::span;
use super::{Shard, ZERO_RANGES_MAX, ZeroRange};
use crate::limits::{LEAF_BLOCKS, ONODE_LEAVES};
use crate::onode::NIL;
use crate::wire::log::{Entry, EntryKind};

/// Zero ranges that are forgotten at a time, when there is room for no more.
const ZERO_SLICE: usize = 16;

impl Shard<'_> {
    /// Makes a range of blocks read as zeroes; `false`: it must wait for room.
    pub(super) fn try_discard(&mut self, task: u32) -> bool {
        let request = self.tasks.get(task).request();
        let volume = self.tasks.get(task).volume;
        if self.tasks.get(task).onode == NIL {
            let Some(onode) = self.pin_onode(volume, request.object) else { return false };
            self.tasks.get_mut(task).onode = onode;
        }
        let onode = self.tasks.get(task).onode;
        let (first, count) = span(&request);
        if !self.has_zero_room() || self.onodes.get(onode).merging {
            return false;
        }
        let whole = count == self.volumes[volume].blocks_of(request.object) as usize;
        let needed = if whole {
            self.shadows_needed(volume, onode)
        } else {
            self.leaves_needed(volume, onode, first, count)
        };
        if !self.reserve_leaves(needed) {
            return false;
        }
        if self.begin(0, false).is_none() {
            return false;
        }
        let state = &self.volumes[volume];
        let (object, epoch) = (request.object, state.open);
        let entry = Entry {
            volume: state.id,
            object,
            first,
            count: count as u16,
            kind: EntryKind::Zeroes,
            epoch,
        };
        let early = self.answers_from_ram(task, 0);
        self.log.push_entry(entry, (!early).then_some(task));
        self.note_zero_range(&entry);
        let before = self.resident_blocks();
        if whole {
            self.zero_object(volume, onode);
        } else {
            self.zero_blocks(volume, onode, first, count);
        }
        self.counters.discarded_blocks += before - self.resident_blocks();
        let slot = self.tasks.get_mut(task);
        slot.appended = count as u16;
        slot.early = early;
        slot.records = u16::from(!early);
        slot.epoch = epoch;
        self.unpin_task_onode(task);
        self.installed(task);
        true
    }

    /// Whether one more zero range can be remembered. Those that the store knows of need not be, so
    /// the oldest go; if none can, the keepers are asked to push.
    fn has_zero_room(&mut self) -> bool {
        if self.zero_ranges.len() < ZERO_RANGES_MAX {
            return true;
        }
        for _ in 0..ZERO_SLICE {
            let Some(range) = self.zero_ranges.front().copied() else { break };
            if self.is_to_be_repeated(&range) {
                break;
            }
            self.zero_ranges.pop_front();
        }
        if self.zero_ranges.len() < ZERO_RANGES_MAX {
            return true;
        }
        self.press();
        false
    }

    /// Remembers where the log says that blocks are zeroes: reclaim must say it again before that
    /// place is used anew, if the store has not heard of it by then.
    pub(super) fn note_zero_range(&mut self, entry: &Entry) {
        let head = self.log.head();
        let segment_seq = self.log.segments()[head as usize].seq;
        self.zero_ranges.push_back(ZeroRange {
            segment_seq,
            volume: entry.volume,
            object: entry.object,
            first: entry.first,
            count: entry.count,
        });
    }

    /// Shadows that must be made before all blocks of an object can change.
    fn shadows_needed(&self, volume: usize, onode: u32) -> u32 {
        let Some(parity) = self.volumes[volume].closed_parity() else { return 0 };
        let leaves = self.onodes.get(onode).leaves.iter().filter(|leaf| **leaf != NIL);
        let needs = |leaf: &&u32| {
            let leaf = self.onodes.leaf(**leaf);
            leaf.dirty[parity] != 0 && leaf.shadow == NIL
        };
        leaves.filter(needs).count() as u32
    }

    fn zero_object(&mut self, volume: usize, onode: u32) {
        let open = self.volumes[volume].open.parity();
        for position in 0..ONODE_LEAVES {
            let leaf = self.onodes.get(onode).leaves[position];
            if leaf == NIL {
                continue;
            }
            for index in 0..LEAF_BLOCKS {
                let block = (position * LEAF_BLOCKS + index) as u16;
                self.make_leaf(volume, onode, block);
                self.supersede(volume, leaf, index);
            }
            self.clear_dirty(volume, leaf, open, u16::MAX);
            self.onodes.free_if_empty(leaf);
        }
        let slot = self.onodes.get_mut(onode);
        slot.hole = true;
        slot.hole_dirty[open] = true;
        self.list_dirty(volume, onode);
    }

    fn zero_blocks(&mut self, volume: usize, onode: u32, first: u16, count: usize) {
        for block in first..first + count as u16 {
            if self.onodes.get(onode).hole && self.onodes.block(onode, block).is_none() {
                continue;
            }
            let (leaf, index) = self.make_leaf(volume, onode, block);
            self.supersede(volume, leaf, index);
            self.onodes.leaf_mut(leaf).zero |= 1 << index;
            self.set_dirty(volume, onode, leaf, index);
        }
    }
}
