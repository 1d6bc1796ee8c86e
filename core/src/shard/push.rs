//! Push: closing an epoch, handing its blocks to the keeper, and clearing the marks when it is
//! committed.
//!
//! ```text
//! Idle --Freeze--> Closing --Released--> Closed --log durable--> Pushing --all out--> Pushed
//!   ^                                                                                    |
//!   +---------------- Cleaning <----------------- Committed ----------------------------+
//! ```

use super::read::Collected;
use super::task::{Held, HeldBlock, TaskKind};
use super::volume::{Cursor, Phase};
use super::{Op, Shard};
use crate::buffer::BufferId;
use crate::event::{Output, PushRun, ToKeeper, ToShard};
use crate::ids::{BlockRef, Epoch, OpId, VolumeId};
use crate::limits::{LEAF_BLOCKS, ONODE_LEAVES, REQUEST_BLOCKS_MAX};
use crate::onode::NIL;
use crate::policy::Level;

/// Batches of a volume that the keeper may hold without having stored them.
const BATCHES_MAX: u32 = 16;
/// Onodes that one turn cleans after a commit.
const CLEAN_SLICE: usize = 64;
/// Blocks that one turn looks at for a push.
const GATHER_SLICE: usize = 4096;

impl Shard<'_> {
    pub(super) fn handle_keeper(&mut self, mail: ToShard) {
        match mail {
            ToShard::Attach { volume, object_shift, blocks, open, committed } => {
                self.attach(volume, object_shift, blocks, open, committed);
            }
            ToShard::Settings { volume, mode, buffering, pinned: _ } => {
                self.set_settings(volume, mode, buffering);
            }
            ToShard::Size { volume, blocks, limit } => self.set_size(volume, blocks, limit),
            ToShard::Freeze { volume, next } => self.close_epoch(volume, next),
            ToShard::Released { volume } => {
                if let Some(index) = self.volume_index(volume) {
                    assert_eq!(self.volumes[index].phase, Phase::Closing);
                    self.volumes[index].phase = Phase::Closed;
                    self.let_go(index);
                }
            }
            ToShard::BatchDone { volume } => {
                if let Some(index) = self.volume_index(volume) {
                    self.volumes[index].batches -= 1;
                }
            }
            ToShard::Committed { volume, epoch } => self.commit(volume, epoch),
            ToShard::Fenced { volume } | ToShard::Detach { volume } => {
                if let Some(index) = self.volume_index(volume) {
                    self.volumes[index].gone = true;
                    self.let_go(index);
                }
            }
            ToShard::Forget { volume } => self.forget(volume),
        }
        self.look_at_waiters = true;
        self.again = true;
    }

    /// Asks the keepers of all dirty volumes to hurry, once for each cycle.
    pub(super) fn press(&mut self) {
        for index in 0..self.volumes.len() {
            let state = &mut self.volumes[index];
            if state.dirtied && !state.pressed && !state.gone {
                state.pressed = true;
                let volume = state.id;
                self.emit(Output::Keeper(ToKeeper::Pressure { volume }));
            }
        }
    }

    fn close_epoch(&mut self, volume: VolumeId, next: Epoch) {
        let Some(index) = self.volume_index(volume) else { return };
        while self.volumes[index].phase == Phase::Cleaning {
            self.clean_slice(index);
        }
        let close_seq = self.log.next_seq();
        let state = &mut self.volumes[index];
        assert_eq!(state.phase, Phase::Idle, "one epoch is closed at a time");
        assert_eq!(state.open.next(), next, "epochs follow each other");
        let epoch = state.open;
        let parity = epoch.parity();
        state.phase = Phase::Closing;
        state.open = next;
        state.close_seq = close_seq;
        state.dirtied = false;
        state.told = false;
        state.synced = false;
        state.grown = false;
        state.pressed = false;
        let holes = state.dirty_list[parity] != NIL;
        let blocks = state.dirty[parity].max(u64::from(holes));
        self.emit(Output::Keeper(ToKeeper::Frozen { volume, epoch, blocks }));
    }

    fn commit(&mut self, volume: VolumeId, epoch: Epoch) {
        let Some(index) = self.volume_index(volume) else { return };
        assert_eq!(self.volumes[index].closed(), epoch, "the commit is of the closed epoch");
        self.let_go(index);
        let state = &mut self.volumes[index];
        assert_ne!(state.phase, Phase::Idle);
        state.committed = epoch;
        state.phase = Phase::Cleaning;
        state.cursor = Cursor { onode: state.dirty_list[epoch.parity()], block: 0 };
    }

    pub(super) fn clean_committed(&mut self) {
        for index in 0..self.volumes.len() {
            if self.volumes[index].phase == Phase::Cleaning {
                self.clean_slice(index);
                self.again = true;
            }
        }
    }

    pub(super) fn clean_slice(&mut self, volume: usize) {
        let parity = self.volumes[volume].closed().parity();
        for _ in 0..CLEAN_SLICE {
            let onode = self.volumes[volume].cursor.onode;
            if onode == NIL {
                let state = &mut self.volumes[volume];
                state.dirty_list[parity] = NIL;
                state.phase = Phase::Idle;
                return;
            }
            self.volumes[volume].cursor.onode = self.onodes.get(onode).next_dirty[parity];
            self.clean_onode(volume, onode, parity);
        }
    }

    fn clean_onode(&mut self, volume: usize, onode: u32, parity: usize) {
        let keeps = self.volumes[volume].mode.keeps_writes();
        let mut holds_data = false;
        for position in 0..ONODE_LEAVES {
            let leaf = self.onodes.get(onode).leaves[position];
            if leaf == NIL {
                continue;
            }
            let written = self.onodes.leaf(leaf).dirty[parity];
            self.clear_dirty(volume, leaf, parity, u16::MAX);
            let shadow = self.onodes.leaf(leaf).shadow;
            if shadow != NIL {
                self.clear_dirty(volume, shadow, parity, u16::MAX);
                self.drop_shadow(leaf);
            }
            if written != 0 && !keeps {
                (0..LEAF_BLOCKS).filter(|index| written & 1 << index != 0).for_each(|index| {
                    self.drop_block(leaf, index);
                });
                holds_data = true;
            }
            holds_data |= !self.onodes.free_if_empty(leaf);
        }
        let slot = self.onodes.get_mut(onode);
        slot.hole_dirty[parity] = false;
        slot.listed[parity] = false;
        if holds_data && slot.hole_dirty == [false; 2] {
            // Clean data was dropped, or may be from now on, and then "nothing is known" must not
            // read as zeroes: the store knows.
            slot.hole = false;
        }
        self.onodes.settle(onode);
    }

    pub(super) fn step_push(&mut self) {
        let volumes = self.volumes.len();
        let first = self.push_first;
        self.push_first = (first + 1) % volumes.max(1);
        for index in (0..volumes).map(|index| (first + index) % volumes) {
            let state = &mut self.volumes[index];
            if state.gone {
                continue;
            }
            if state.phase == Phase::Closed && self.log.durable_seq() >= state.close_seq {
                let parity = state.closed().parity();
                state.phase = Phase::Pushing;
                state.cursor = Cursor { onode: state.dirty_list[parity], block: 0 };
                state.again = false;
                state.first_pass = true;
            }
            if state.phase == Phase::Pushing {
                self.gather(index);
            }
        }
    }

    fn gather(&mut self, volume: usize) {
        let mut looked = 0;
        while looked < GATHER_SLICE {
            let state = &self.volumes[volume];
            let idle = state.gathering == 0;
            if state.cursor.onode == NIL {
                if idle {
                    self.gathered_all(volume);
                }
                return;
            }
            // One batch of a shard waits for the device at a time: clients need fills too.
            let room = state.batches < BATCHES_MAX
                && self.volumes.iter().all(|volume| volume.gathering == 0)
                && self.tasks.free() > 0
                && self.fills.free() > REQUEST_BLOCKS_MAX
                && self.buffers.available() as usize > 2 * REQUEST_BLOCKS_MAX;
            if !room {
                return;
            }
            looked += self.gather_batch(volume);
        }
        self.again = true;
    }

    fn gathered_all(&mut self, volume: usize) {
        let state = &mut self.volumes[volume];
        if core::mem::take(&mut state.again) {
            state.first_pass = false;
            let parity = state.closed().parity();
            state.cursor = Cursor { onode: state.dirty_list[parity], block: 0 };
            self.again = true;
            return;
        }
        state.phase = Phase::Pushed;
        let (volume, epoch) = (state.id, state.closed());
        self.emit(Output::Keeper(ToKeeper::Pushed { volume, epoch }));
    }

    /// Fills one batch from the cursor on; returns how many blocks it looked at.
    fn gather_batch(&mut self, volume: usize) -> usize {
        let parity = self.volumes[volume].closed().parity();
        let task = self.tasks.start(TaskKind::Push, volume, self.now).expect("tasks are left");
        self.volumes[volume].tasks += 1;
        let mut looked = 0;
        let mut fill = NIL;
        while !self.tasks.get(task).held.is_full() && looked < GATHER_SLICE {
            let Cursor { onode, block } = self.volumes[volume].cursor;
            if onode == NIL {
                break;
            }
            let object = self.onodes.get(onode).object;
            let end = self.volumes[volume].blocks_of(object);
            if u32::from(block) >= end {
                let next = self.onodes.get(onode).next_dirty[parity];
                self.volumes[volume].cursor = Cursor { onode: next, block: 0 };
                continue;
            }
            let (count, held, extra) = self.closed_block(volume, onode, block, &mut fill, end);
            looked += usize::from(count);
            self.volumes[volume].cursor.block += count;
            match held {
                Some(Held::Zero) => self.add_zeroes(task, object, block, count),
                Some(held) => {
                    let held = HeldBlock { held, object, block, extra };
                    self.tasks.get_mut(task).held.push(held).expect("checked above");
                }
                None => {}
            }
        }
        if fill != NIL {
            self.read_device(fill);
        }
        if self.tasks.get(task).held.is_empty() {
            self.end_task(task);
            return looked.max(1);
        }
        self.volumes[volume].gathering += 1;
        if self.wait_for_fills(task) == Collected::All {
            self.push_collected(task);
        }
        looked
    }

    fn add_zeroes(&mut self, task: u32, object: u32, block: u16, count: u16) {
        let held = &mut self.tasks.get_mut(task).held;
        if let Some(last) = held.last_mut() {
            let follows = u32::from(last.block) + last.extra == u32::from(block);
            if last.held == Held::Zero && last.object == object && follows {
                last.extra += u32::from(count);
                return;
            }
        }
        let zeroes = HeldBlock { held: Held::Zero, object, block, extra: u32::from(count) };
        held.push(zeroes).expect("checked by the caller");
    }

    /// What the closed epoch says of a block: how many blocks were looked at, where the data is
    /// held (nothing: the epoch does not have it), and its checksum.
    fn closed_block(
        &mut self,
        volume: usize,
        onode: u32,
        block: u16,
        fill: &mut u32,
        end: u32,
    ) -> (u16, Option<Held>, u32) {
        let parity = self.volumes[volume].closed().parity();
        let hole = self.volumes[volume].first_pass && self.onodes.get(onode).hole_dirty[parity];
        let hole = hole.then_some(Held::Zero);
        let Some((leaf, index)) = self.onodes.block(onode, block) else {
            let rest = LEAF_BLOCKS as u32 - u32::from(block) % LEAF_BLOCKS as u32;
            return (rest.min(end - u32::from(block)) as u16, hole, 0);
        };
        let bit = 1u16 << index;
        let shadow = self.onodes.leaf(leaf).shadow;
        let kept = shadow != NIL && self.onodes.leaf(shadow).dirty[parity] & bit != 0;
        let source = if kept { shadow } else { leaf };
        let slot = self.onodes.leaf_mut(source);
        if slot.dirty[parity] & bit == 0 {
            return (1, hole, 0);
        }
        if slot.sent & bit != 0 {
            return (1, None, 0);
        }
        slot.sent |= bit;
        if slot.zero & bit != 0 {
            return (1, Some(Held::Zero), 0);
        }
        if slot.moving & bit != 0 {
            slot.sent &= !bit;
            self.volumes[volume].again = true;
            return (1, None, 0);
        }
        let crc = slot.crc[index];
        let buffer = self.hold_version(onode, source, index, fill, false);
        let page = self.buffers.page(buffer);
        (1, Some(Held::Buffer(buffer, page)), crc)
    }

    /// Pins one version of a block in RAM: its buffer, or a fill from the log. `fill` collects
    /// neighbouring pages; a full or interrupted one is sent off. `shared`: others find the buffer,
    /// as they must while its block's place in the log is not written.
    pub(super) fn hold_version(
        &mut self,
        onode: u32,
        leaf: u32,
        index: usize,
        fill: &mut u32,
        shared: bool,
    ) -> BufferId {
        let slot = self.onodes.leaf(leaf);
        let (page, crc) = (slot.nvme[index], slot.crc[index]);
        if let Some(buffer) = self.onodes.buffer(leaf, index) {
            self.buffers.pin(buffer);
            return buffer;
        }
        assert_ne!(page, NIL, "a dirty block is in RAM or in the log");
        if *fill != NIL {
            let open = self.fills.get(*fill);
            let follows = open.at + open.pages.len() as u32 == page
                && page / self.log.segment_pages() == open.at / self.log.segment_pages();
            if !follows || open.pages.is_full() {
                self.read_device(*fill);
                *fill = NIL;
            }
        }
        if *fill == NIL {
            *fill = self.fills.start(page, Level::Low).expect("the caller saw to it");
            self.fills.get_mut(*fill).push = !shared;
        }
        // A kept version belongs to no reader.
        if shared && !self.onodes.leaf(leaf).is_shadow {
            let buffer = self.add_to_fill(*fill, onode, leaf, index, crc);
            self.buffers.pin(buffer);
            return buffer;
        }
        self.fill_privately(*fill, onode, leaf, index, crc)
    }

    /// A batch is complete: out with it.
    pub(super) fn push_collected(&mut self, task: u32) {
        let volume = self.tasks.get(task).volume;
        self.volumes[volume].gathering -= 1;
        let held = &self.tasks.get(task).held;
        // What could not be read is still dirty, so it is tried again; what is lost is no more.
        if held.iter().any(|block| matches!(block.held, Held::Unresolved | Held::Lost)) {
            self.volumes[volume].again = true;
            self.unsend(task);
        }
        let held = &self.tasks.get(task).held;
        let useful = held.iter().any(|block| matches!(block.held, Held::Zero | Held::Buffer(..)));
        if !useful || self.volumes[volume].gone {
            self.release_held(task);
            self.end_task(task);
            self.again = true;
            return;
        }
        self.volumes[volume].batches += 1;
        let (id, epoch) = (self.volumes[volume].id, self.volumes[volume].closed());
        let op = self.start_op(Op::Batch(task));
        self.emit(Output::Batch { op, volume: id, epoch });
        self.again = true;
    }

    /// Blocks that a batch could not get are not sent.
    fn unsend(&mut self, task: u32) {
        let volume = self.tasks.get(task).volume;
        let (id, parity) = (self.volumes[volume].id, self.volumes[volume].closed().parity());
        for at in 0..self.tasks.get(task).held.len() {
            let block = self.tasks.get(task).held[at];
            if !matches!(block.held, Held::Unresolved | Held::Lost) {
                continue;
            }
            let onode = self.onodes.lookup(id, block.object).expect("it is dirty");
            let Some((leaf, index)) = self.onodes.block(onode, block.block) else { continue };
            let shadow = self.onodes.leaf(leaf).shadow;
            for version in [leaf, shadow].into_iter().filter(|version| *version != NIL) {
                let slot = self.onodes.leaf_mut(version);
                if slot.dirty[parity] & 1 << index != 0 {
                    slot.sent &= !(1 << index);
                }
            }
        }
    }

    /// Writes down what a batch holds, for the driver to read.
    pub(super) fn describe_batch(&mut self, op: OpId) {
        let Some(Op::Batch(task)) = self.op(op) else { panic!("no batch") };
        self.batch_runs.clear();
        self.batch_blocks.clear();
        for block in &self.tasks.get(task).held {
            let HeldBlock { object, block: first, extra, .. } = *block;
            let run = match block.held {
                Held::Zero => PushRun { object, first, count: extra as u16, zero: true },
                Held::Buffer(_, page) => {
                    let block = BlockRef { page, crc: extra };
                    self.batch_blocks.push(block).expect("no more blocks than held");
                    PushRun { object, first, count: 1, zero: false }
                }
                Held::Unresolved | Held::Lost => continue,
            };
            if let Some(last) = self.batch_runs.last_mut() {
                let follows = last.object == run.object && last.first + last.count == run.first;
                if follows && !last.zero && !run.zero {
                    last.count += 1;
                    continue;
                }
            }
            self.batch_runs.push(run).expect("no more runs than held");
        }
        self.counters.pushed_blocks += self.batch_blocks.len() as u64;
    }

    pub(super) fn handle_batch_taken(&mut self, op: OpId) {
        match self.end_op(op) {
            Some(Op::Batch(task)) => {
                self.release_held(task);
                self.end_task(task);
                self.again = true;
            }
            Some(_) => panic!("not a batch"),
            None => {}
        }
    }
}
