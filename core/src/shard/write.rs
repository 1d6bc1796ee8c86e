//! Writes: past the dirty limits, merged with old bytes at unaligned edges, into the log.

use super::index::addr;
use super::read::Collected;
use super::request::span;
use super::task::Held;
use super::{Op, Shard};
use crate::buffer::{BlockAddr, State};
use crate::event::{Advice, Output, Status};
use crate::ids::{BLOCK_BYTES, BlockRef, OpId, PageId};
use crate::limits::LEAF_BLOCKS;
use crate::onode::NIL;
use crate::policy::Level;
use crate::time::Duration;
use crate::wire::log::{Entry, EntryKind};
use crate::wlog::{RESERVED_SEGMENTS, RecordBlock, Role};

/// How often a record is written again before its data is given up.
const WRITE_TRIES: u8 = 3;
/// The longest that one block delays the next write, just below the hard limit.
const PACE_BLOCK_MAX: Duration = Duration::from_micros(400);

impl Shard<'_> {
    /// Starts or goes on with a write; `false`: it must wait for room.
    pub(super) fn try_write(&mut self, task: u32) -> bool {
        let request = self.tasks.get(task).request();
        let volume = self.tasks.get(task).volume;
        if !self.tasks.get(task).admitted && !self.admit_change(task, span(&request).1) {
            return false;
        }
        if self.tasks.get(task).onode == NIL {
            let Some(onode) = self.pin_onode(volume, request.object) else { return false };
            self.tasks.get_mut(task).onode = onode;
        }
        let onode = self.tasks.get(task).onode;
        if self.tasks.get(task).merged {
            return self.append(task);
        }
        if self.onodes.get(onode).merging {
            return false;
        }
        let block = BLOCK_BYTES as u32;
        if request.offset.is_multiple_of(block) && request.len.is_multiple_of(block) {
            return self.append(task);
        }
        self.want_edges(task);
        match self.collect(task) {
            Collected::Stalled => {
                self.tasks.get_mut(task).held.clear();
                return false;
            }
            Collected::All => {
                self.start_merging(task);
                self.merge_edges(task);
            }
            Collected::Waiting => self.start_merging(task),
        }
        true
    }

    /// The dirty limits: from the high mark on, each block delays the next write, in proportion; at
    /// the hard mark, or without log space, writers wait.
    pub(super) fn admit_change(&mut self, task: u32, blocks: usize) -> bool {
        let capacity = self.log.capacity();
        let mark = |percent: u32| capacity * u64::from(percent) / 100;
        if self.dirty_blocks >= mark(self.config.dirty_low_percent) {
            self.press();
        }
        let (high, hard) =
            (mark(self.config.dirty_high_percent), mark(self.config.dirty_hard_percent));
        if self.dirty_blocks + blocks as u64 > hard || self.now < self.pace_until {
            return false;
        }
        if self.dirty_blocks > high {
            let over = self.dirty_blocks - high;
            let pace = PACE_BLOCK_MAX.0 * over / (hard - high).max(1);
            self.pace_until = self.now + Duration(pace * blocks as u64);
        }
        self.tasks.get_mut(task).admitted = true;
        true
    }

    /// The bytes of block `at` of a write that are new.
    fn new_bytes(&self, task: u32, at: usize) -> (u16, u16) {
        let request = self.tasks.get(task).request();
        let start = request.offset as usize % BLOCK_BYTES;
        let end = start + request.len as usize;
        let from = start.saturating_sub(at * BLOCK_BYTES).min(BLOCK_BYTES);
        let to = (end - at * BLOCK_BYTES).min(BLOCK_BYTES);
        (from as u16, to as u16)
    }

    /// Asks for the old content of the first and last block where they are written in part.
    fn want_edges(&mut self, task: u32) {
        let (first, count) = span(&self.tasks.get(task).request());
        self.tasks.get_mut(task).held.clear();
        let whole = (0, BLOCK_BYTES as u16);
        if self.new_bytes(task, 0) != whole {
            self.want(task, first, 1);
        }
        let last = count - 1;
        if last > 0 && self.new_bytes(task, last) != whole {
            self.want(task, first + last as u16, 1);
        }
    }

    /// The old content is here: asks for the missing bytes to be copied into the write's pages.
    pub(super) fn merge_edges(&mut self, task: u32) {
        self.note_lost(task);
        if self.tasks.get(task).status != Status::Ok {
            self.release_held(task);
            self.tasks.get_mut(task).held.clear();
            self.stop_merging(task);
            return self.reply(task);
        }
        let (first, _) = span(&self.tasks.get(task).request());
        for index in 0..self.tasks.get(task).held.len() {
            let held = self.tasks.get(task).held[index];
            let at = usize::from(held.block - first);
            let src = match held.held {
                Held::Buffer(_, page) => page,
                _ => PageId::NONE,
            };
            let dst = self.tasks.get(task).payload[at].page;
            let keep = self.new_bytes(task, at);
            let op = self.start_op(Op::Merge(task, at as u8));
            self.tasks.get_mut(task).merges += 1;
            self.emit(Output::Fill { op, dst, src, keep });
        }
    }

    fn start_merging(&mut self, task: u32) {
        let onode = self.tasks.get(task).onode;
        self.onodes.get_mut(onode).merging = true;
        self.tasks.get_mut(task).merging = true;
    }

    pub(super) fn stop_merging(&mut self, task: u32) {
        if core::mem::take(&mut self.tasks.get_mut(task).merging) {
            let onode = self.tasks.get(task).onode;
            self.onodes.get_mut(onode).merging = false;
        }
    }

    pub(super) fn handle_merged(&mut self, op: OpId, crc: u32) {
        let Some(Op::Merge(task, at)) = self.end_op(op) else { return };
        let slot = self.tasks.get_mut(task);
        slot.payload[usize::from(at)].crc = crc;
        slot.merges -= 1;
        if slot.merges > 0 {
            return;
        }
        slot.merged = true;
        self.release_held(task);
        self.tasks.get_mut(task).held.clear();
        if !self.append(task) {
            // First in the queue: the others may be waiting for just this merge.
            self.tasks.push_front(&mut self.stalled_writes, task);
        }
    }

    /// Leaves and shadows that must be made before blocks `first..first + count` can change.
    pub(super) fn leaves_needed(&self, volume: usize, onode: u32, first: u16, count: usize) -> u32 {
        let end = usize::from(first) + count;
        let mut needed = 0;
        let mut block = usize::from(first);
        while block < end {
            let next = (block / LEAF_BLOCKS + 1) * LEAF_BLOCKS;
            match self.onodes.block(onode, block as u16) {
                None => needed += 1,
                Some((leaf, _)) => {
                    let parity = self.volumes[volume].closed_parity();
                    let closed =
                        parity.is_some_and(|parity| self.onodes.leaf(leaf).dirty[parity] != 0);
                    needed += u32::from(closed && self.onodes.leaf(leaf).shadow == NIL);
                }
            }
            block = next;
        }
        needed
    }

    /// Makes the leaves, and the shadows where closed blocks are overwritten.
    pub(super) fn make_leaf(&mut self, volume: usize, onode: u32, block: u16) -> (u32, usize) {
        let (leaf, index) = self.onodes.leaf_for(onode, block).expect("leaves were reserved");
        if self.is_closed_dirty(volume, leaf, index) {
            self.onodes.shadow_for(leaf).expect("leaves were reserved");
        }
        (leaf, index)
    }

    /// Whether what a client's task writes stays in RAM.
    fn keeps_writes(&self, task: u32) -> bool {
        let task = self.tasks.get(task);
        match task.request().advice {
            Advice::WillNeed => true,
            Advice::DontNeed | Advice::BypassClean | Advice::Salvage | Advice::Cut => false,
            Advice::None => self.volumes[task.volume].buffering.writes,
        }
    }

    /// Puts the write's blocks into the log; `false`: no room for (all of) them now.
    fn append(&mut self, task: u32) -> bool {
        let (first, count) = span(&self.tasks.get(task).request());
        let (volume, onode) = (self.tasks.get(task).volume, self.tasks.get(task).onode);
        let role = if self.keeps_writes(task) { Role::Writing } else { Role::Passing };
        while usize::from(self.tasks.get(task).appended) < count {
            let done = usize::from(self.tasks.get(task).appended);
            let from = first + done as u16;
            let needed = self.leaves_needed(volume, onode, from, count - done);
            if !self.reserve_leaves(needed) {
                return false;
            }
            let Some(room) = self.begin(count - done, false) else { return false };
            let state = &self.volumes[volume];
            let entry = Entry {
                volume: state.id,
                object: self.onodes.get(onode).object,
                first: from,
                count: room as u16,
                kind: EntryKind::Dirty,
                epoch: state.open,
            };
            let early = self.answers_from_ram(task, room);
            self.log.push_entry(entry, (!early).then_some(task));
            self.buffers.begin(count, true);
            for at in done..done + room {
                let block = self.tasks.get(task).payload[at];
                self.install((volume, onode), first + at as u16, block, role);
            }
            let slot = self.tasks.get_mut(task);
            slot.appended += room as u16;
            slot.early |= early;
            slot.records += u16::from(!early);
            slot.epoch = entry.epoch;
        }
        self.tasks.get_mut(task).owed = count as u16;
        self.stop_merging(task);
        self.count(task, |traffic| traffic.written_blocks += count as u64);
        self.unpin_task_onode(task);
        self.installed(task);
        true
    }

    /// Room in the open record; a full one is closed first.
    pub(super) fn begin(&mut self, blocks: usize, reclaim: bool) -> Option<usize> {
        if let Some(room) = self.log.begin(blocks, reclaim) {
            return Some(room);
        }
        if self.log.has_open() {
            self.write_record();
            return self.log.begin(blocks, reclaim);
        }
        None
    }

    /// One new version of a block: in RAM, in the log, dirty in the open epoch.
    fn install(&mut self, (volume, onode): (usize, u32), block: u16, new: BlockRef, role: Role) {
        let (leaf, index) = self.make_leaf(volume, onode, block);
        let hint = self.supersede(volume, leaf, index);
        let buffer = self
            .buffers
            .insert_writing(addr(leaf, index), new.page, hint)
            .expect("slots are always enough");
        self.marks[buffer.0 as usize] = NIL;
        let record = RecordBlock { crc: new.crc, buffer, role };
        let page = self.log.push_block(new.page, record);
        self.onodes.set_ram(leaf, index, buffer);
        self.onodes.leaf_mut(leaf).crc[index] = new.crc;
        self.set_log_page(leaf, index, page);
        self.set_dirty(volume, onode, leaf, index);
    }

    /// Puts a clean block that is in RAM only into the log too, if there is room to spare.
    pub(super) fn admit(&mut self, onode: u32, leaf: u32, index: usize) {
        let spare = self.log.free_segments() > RESERVED_SEGMENTS + 1;
        let slot = self.onodes.leaf(leaf);
        let (buffer, crc) = (self.onodes.ram(leaf, index), slot.crc[index]);
        let dirty = (slot.dirty[0] | slot.dirty[1]) & 1 << index != 0;
        let block = u16::from(slot.position) * LEAF_BLOCKS as u16 + index as u16;
        if !spare || dirty || self.begin(1, false).is_none() {
            return;
        }
        let known = self.onodes.get(onode);
        let Some(volume) = self.volume_index(known.volume) else { return };
        let entry = Entry {
            volume: known.volume,
            object: known.object,
            first: block,
            count: 1,
            kind: EntryKind::Clean,
            epoch: self.volumes[volume].committed,
        };
        self.log.push_entry(entry, None);
        self.buffers.pin(buffer);
        let record = RecordBlock { crc, buffer, role: Role::Pinned };
        let page = self.log.push_block(self.buffers.page(buffer), record);
        self.set_log_page(leaf, index, page);
    }

    /// Puts what a fetch brought into the log.
    pub(super) fn admit_fill(&mut self, fill: u32) {
        for at in 0..self.fills.get(fill).blocks.len() {
            let block = self.fills.get(fill).blocks[at];
            if block.is_gap() {
                continue;
            }
            let buffer = block.buffer;
            if self.buffers.state(buffer) != State::Clean || self.buffers.is_detached(buffer) {
                continue;
            }
            let (leaf, index) = super::index::place(block.addr);
            if self.onodes.leaf(leaf).nvme[index] == NIL {
                self.admit(block.onode, leaf, index);
            }
        }
    }

    /// Group commit: writes the open record, unless enough records are on their way already.
    pub(super) fn close_record(&mut self) {
        if self.log.is_ripe() {
            self.write_record();
        }
        if let Some(footer) = self.log.take_footer() {
            let op = self.start_op(Op::Footer);
            let (at, count) = (footer.at, footer.count);
            self.emit(Output::DeviceWrite { op, at, count, header: count });
        }
    }

    pub(super) fn write_record(&mut self) {
        let Some((slot, at, count)) = self.log.close() else { return };
        self.counters.records += 1;
        let op = self.start_op(Op::Record(slot));
        self.emit(Output::DeviceWrite { op, at, count, header: 1 });
    }

    /// A record's write ended.
    pub(super) fn record_done(&mut self, op: OpId, slot: usize, ok: bool) {
        let (_, at) = self.log.record_at(slot);
        if !ok {
            let record = self.log.record_mut(slot);
            record.failures += 1;
            if record.failures < WRITE_TRIES {
                let count = record.pages.len() as u32;
                self.emit(Output::DeviceWrite { op, at, count, header: 1 });
                return;
            }
        }
        self.end_op(op);
        self.unflushed = true;
        for index in 0..self.log.record(slot).blocks.len() {
            let block = self.log.record(slot).blocks[index];
            self.record_block_done(block, at + 1 + index as u32, ok);
        }
        for index in 0..self.log.record(slot).owners.len() {
            let task = self.log.record(slot).owners[index];
            if !ok {
                self.fail(task, Status::Io);
            }
            let state = self.tasks.get_mut(task);
            state.records -= 1;
            let count = span(&state.request()).1;
            if state.records == 0 && usize::from(state.appended) == count {
                self.logged(task);
            }
        }
        if !ok {
            self.note_failure(slot);
        }
        self.log.complete(slot);
    }

    /// Changes that were answered from RAM may be among those that the device did not take.
    fn note_failure(&mut self, slot: usize) {
        let (seq, _) = self.log.record_at(slot);
        for index in 0..self.log.record(slot).entries.len() {
            let volume = self.log.record(slot).entries[index].volume;
            if let Some(volume) = self.volume_index(volume) {
                let state = &mut self.volumes[volume];
                state.failed |= state.ram_seq > seq;
            }
        }
    }

    fn record_block_done(&mut self, block: RecordBlock, page: u32, ok: bool) {
        // Its leaf, or by now the leaf's shadow; nobody, if it has been written again.
        let owner = self.log.owner(page);
        if owner != NIL {
            let (leaf, index) = super::index::place(BlockAddr(owner));
            if ok {
                self.onodes.leaf_mut(leaf).moving &= !(1 << index);
            } else {
                self.lose_block(leaf, index);
            }
        }
        match block.role {
            Role::Writing => self.buffers.finish(block.buffer, Level::High),
            Role::Passing => {
                if !self.buffers.is_detached(block.buffer) {
                    let (leaf, index) = super::index::place(self.buffers.block(block.buffer));
                    self.drop_buffer(leaf, index);
                }
                self.buffers.finish(block.buffer, Level::Low);
            }
            Role::Pinned => self.buffers.unpin(block.buffer),
        }
    }

    /// The device would not take a block, however often it was tried: its newest version is lost,
    /// and says so when it is read. The writer is told.
    fn lose_block(&mut self, leaf: u32, index: usize) {
        let bit = 1u16 << index;
        let onode = self.onodes.leaf(leaf).onode;
        let dirty = self.onodes.leaf(leaf).dirty;
        self.drop_log_page(leaf, index);
        if (dirty[0] | dirty[1]) & bit == 0 {
            return;
        }
        self.counters.lost_blocks += 1;
        let volume = self.onodes.get(onode).volume;
        let volume = self.volume_index(volume).expect("a dirty block's volume is attached");
        self.clear_dirty(volume, leaf, 0, bit);
        self.clear_dirty(volume, leaf, 1, bit);
        self.drop_buffer(leaf, index);
        self.onodes.leaf_mut(leaf).bad |= bit;
    }
}
