//! Reads: collecting the blocks that a task needs, pinned in RAM.
//!
//! ```text
//! Unresolved --in RAM--> Buffer (pinned)          --filled--> has it
//!            --zeroes--> Zero
//!            --NVMe / store--> fill started, Buffer (pinned)
//! a fill ends: zeroes -> Zero; damaged or superseded -> Unresolved again; lost -> Lost
//! ```
//!
//! Only one fill runs for a block: later readers find its buffer and wait for the same fill.

use super::index::{addr, place};
use super::task::{Held, HeldBlock, TaskKind};
use super::{Op, Shard};
use crate::buffer::{BufferId, State};
use crate::event::{Advice, Output, RequestKind, Status};
use crate::ids::OpId;
use crate::limits::LEAF_BLOCKS;
use crate::onode::NIL;
use crate::policy::{Hint, Level};

/// The fill found zeroes in the store.
const MARK_ZERO: u32 = NIL - 1;
/// The data is gone.
const MARK_LOST: u32 = NIL - 2;
/// Look for the block again.
const MARK_AGAIN: u32 = NIL - 3;

/// Where a block is to be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Source {
    Ram(BufferId),
    Zero,
    Nvme(u32),
    Store,
    Lost,
}

/// How collecting went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Collected {
    /// The task holds all its blocks.
    All,
    /// It waits for a fill.
    Waiting,
    /// No page, leaf or fill for it now. It holds nothing.
    Stalled,
}

/// How dear what is filled is to its reader.
pub(super) fn level(keeps: bool) -> Level {
    if keeps { Level::High } else { Level::Low }
}

impl Shard<'_> {
    /// Where a block is.
    pub(super) fn source(&self, onode: u32, block: u16) -> Source {
        let hole = self.onodes.get(onode).hole;
        let unknown = if hole { Source::Zero } else { Source::Store };
        let Some((leaf, index)) = self.onodes.block(onode, block) else { return unknown };
        if let Some(buffer) = self.onodes.buffer(leaf, index) {
            return Source::Ram(buffer);
        }
        let leaf = self.onodes.leaf(leaf);
        let bit = 1u16 << index;
        if leaf.zero & bit != 0 {
            Source::Zero
        } else if leaf.bad & bit != 0 {
            Source::Lost
        } else if leaf.nvme[index] != NIL {
            Source::Nvme(leaf.nvme[index])
        } else {
            unknown
        }
    }

    /// Where a client's task finds a block: a scrub passes over clean data in RAM.
    pub(super) fn find(&self, task: u32, block: u16) -> Source {
        let onode = self.tasks.get(task).onode;
        let source = self.source(onode, block);
        let Source::Ram(buffer) = source else { return source };
        if !self.bypasses(task) || self.buffers.state(buffer) != State::Clean {
            return source;
        }
        let (leaf, index) = self.onodes.block(onode, block).expect("it is in RAM");
        let slot = self.onodes.leaf(leaf);
        let page = slot.nvme[index];
        let dirty = (slot.dirty[0] | slot.dirty[1]) & 1 << index != 0;
        match page {
            _ if dirty => source,
            NIL => Source::Store,
            page if self.log.is_unwritten(page) => source,
            page => Source::Nvme(page),
        }
    }

    /// Whether a client's task is a scrub.
    pub(super) fn bypasses(&self, task: u32) -> bool {
        self.tasks.get(task).request().advice == Advice::BypassClean
    }

    /// Whether what a client's task reads stays in RAM, and in the log.
    pub(super) fn keeps_reads(&self, task: u32) -> bool {
        let task = self.tasks.get(task);
        let mode = self.volumes[task.volume].mode;
        match task.request().advice {
            Advice::WillNeed | Advice::None if !mode.keeps_reads() => false,
            Advice::WillNeed => true,
            Advice::DontNeed | Advice::Salvage | Advice::Cut => false,
            Advice::None => self.volumes[task.volume].buffering.reads,
            // What a scrub of the cache fetches again belongs there.
            Advice::BypassClean => task.request().kind == RequestKind::Cache,
        }
    }

    /// Collects every unresolved block of a client's task. On `Waiting` the task is in a fill's
    /// queue and `resume` goes on with it.
    pub(super) fn collect(&mut self, task: u32) -> Collected {
        let held = &self.tasks.get(task).held;
        let wanted = held.iter().filter(|block| block.held == Held::Unresolved).count();
        let leaves = (wanted / LEAF_BLOCKS + 2) as u32;
        let enough = self.buffers.available() as usize >= wanted && self.fills.free() >= wanted;
        if wanted > 0 && (!enough || !self.reserve_leaves(leaves)) {
            self.release_held(task);
            for block in &mut self.tasks.get_mut(task).held {
                block.held = Held::Unresolved;
            }
            return Collected::Stalled;
        }
        self.buffers.begin(self.tasks.get(task).held.len(), false);
        let onode = self.tasks.get(task).onode;
        let keeps = self.keeps_reads(task);
        let mut at = 0;
        while at < self.tasks.get(task).held.len() {
            let block = self.tasks.get(task).held[at];
            if block.held != Held::Unresolved {
                at += 1;
                continue;
            }
            at += match self.find(task, block.block) {
                Source::Zero => {
                    self.count(task, |traffic| traffic.zero_blocks += 1);
                    self.hold(task, at, Held::Zero)
                }
                Source::Lost => self.hold(task, at, Held::Lost),
                Source::Ram(buffer) => {
                    self.count(task, |traffic| traffic.ram_blocks += 1);
                    if keeps {
                        self.hit(onode, block.block, buffer);
                    }
                    self.hold_buffer(task, at, buffer)
                }
                Source::Nvme(page) => self.fill_from_device(task, at, page),
                Source::Store => self.fill_from_store(task, at),
            };
        }
        self.wait_for_fills(task)
    }

    fn hold(&mut self, task: u32, at: usize, held: Held) -> usize {
        self.tasks.get_mut(task).held[at].held = held;
        1
    }

    pub(super) fn hold_buffer(&mut self, task: u32, at: usize, buffer: BufferId) -> usize {
        self.buffers.pin(buffer);
        let page = self.buffers.page(buffer);
        self.hold(task, at, Held::Buffer(buffer, page))
    }

    /// A block was found in RAM: the policy hears of it, and if it came from the store and is
    /// wanted a second time, it earns a place in the log.
    fn hit(&mut self, onode: u32, block: u16, buffer: BufferId) {
        self.buffers.touch(buffer);
        let Some((leaf, index)) = self.onodes.block(onode, block) else { return };
        let slot = self.onodes.leaf_mut(leaf);
        let second = slot.referenced & 1 << index != 0;
        slot.referenced |= 1 << index;
        let only_in_ram = slot.nvme[index] == NIL && self.buffers.state(buffer) == State::Clean;
        if second && only_in_ram {
            self.admit(onode, leaf, index);
        }
    }

    /// Starts a fill for the blocks from `at` on that lie in neighbouring pages of one segment.
    fn fill_from_device(&mut self, task: u32, at: usize, page: u32) -> usize {
        let onode = self.tasks.get(task).onode;
        let (keeps, bypasses) = (self.keeps_reads(task), self.bypasses(task));
        let fill = self.fills.start(page, level(keeps)).expect("collect saw to it");
        self.fills.get_mut(fill).scrub = bypasses;
        let segment = page / self.log.segment_pages();
        let mut count = 0;
        while let Some(block) = self.tasks.get(task).held.get(at + count).copied() {
            let next = page + count as u32;
            let follows = block.held == Held::Unresolved
                && self.find(task, block.block) == Source::Nvme(next)
                && next / self.log.segment_pages() == segment;
            if !follows {
                break;
            }
            let (leaf, index) = self.onodes.block(onode, block.block).expect("it is on NVMe");
            let crc = self.onodes.leaf(leaf).crc[index];
            if bypasses {
                let buffer = self.fill_privately(fill, onode, leaf, index, crc);
                let page = self.buffers.page(buffer);
                self.hold(task, at + count, Held::Buffer(buffer, page));
            } else {
                self.onodes.leaf_mut(leaf).referenced |= u16::from(keeps) << index;
                let buffer = self.add_to_fill(fill, onode, leaf, index, crc);
                self.hold_buffer(task, at + count, buffer);
            }
            count += 1;
        }
        self.count(task, |traffic| traffic.nvme_blocks += count as u64);
        self.read_device(fill);
        count
    }

    /// Adds a block without a buffer to a fill: takes a page and inserts a filling buffer.
    pub(super) fn add_to_fill(
        &mut self,
        fill: u32,
        onode: u32,
        leaf: u32,
        index: usize,
        crc: u32,
    ) -> BufferId {
        self.buffers.miss();
        let mut hint = self.drop_buffer(leaf, index);
        if self.fills.get(fill).level == Level::Low {
            // That the block comes back is no use of it.
            hint = Hint::NEW;
        }
        // The leaf must outlive the eviction below even if it now says nothing.
        self.onodes.leaf_mut(leaf).bad |= 1 << index;
        let page = self.take_page(hint).expect("collect saw to it");
        self.onodes.leaf_mut(leaf).bad &= !(1 << index);
        let buffer = self
            .buffers
            .insert_filling(addr(leaf, index), page, hint)
            .expect("slots are always enough");
        self.onodes.set_ram(leaf, index, buffer);
        self.push_fill(fill, onode, addr(leaf, index), buffer, crc);
        buffer
    }

    /// Adds a block to a fill whose buffer, pinned, lives for one task only: nobody else finds it,
    /// and what is known of the block stays as it is.
    pub(super) fn fill_privately(
        &mut self,
        fill: u32,
        onode: u32,
        leaf: u32,
        index: usize,
        crc: u32,
    ) -> BufferId {
        let page = self.take_page(Hint::NEW).expect("the caller saw to it");
        let buffer = self.buffers.insert_private(addr(leaf, index), page);
        let buffer = buffer.expect("slots are always enough");
        self.push_fill(fill, onode, addr(leaf, index), buffer, crc);
        buffer
    }

    pub(super) fn push_fill(
        &mut self,
        fill: u32,
        onode: u32,
        addr: crate::buffer::BlockAddr,
        buffer: BufferId,
        crc: u32,
    ) {
        self.onodes.pin(onode);
        self.marks[buffer.0 as usize] = fill;
        let page = self.buffers.page(buffer);
        let slot = self.fills.get_mut(fill);
        slot.pages.push(page).expect("a fill is no larger than a batch");
        let block = super::fill::FillBlock { addr, buffer, onode, crc };
        slot.blocks.push(block).expect("a fill is no larger than a batch");
    }

    pub(super) fn read_device(&mut self, fill: u32) {
        let (at, count) = (self.fills.get(fill).at, self.fills.get(fill).pages.len() as u32);
        self.log.segment_mut(at).readers += 1;
        let op = self.start_op(Op::Fill(fill));
        self.emit(Output::DeviceRead { op, at, count });
    }

    /// Looks through what a task holds: fills that ended well, badly, or not yet.
    pub(super) fn wait_for_fills(&mut self, task: u32) -> Collected {
        for at in 0..self.tasks.get(task).held.len() {
            let Held::Buffer(buffer, _) = self.tasks.get(task).held[at].held else { continue };
            let mark = self.marks[buffer.0 as usize];
            if self.buffers.state(buffer) == State::Filling && mark < MARK_AGAIN {
                let mut waiters = self.fills.get_mut(mark).waiters.take();
                self.tasks.push_back(&mut waiters, task);
                self.fills.get_mut(mark).waiters = waiters;
                return Collected::Waiting;
            }
            let held = match mark {
                MARK_ZERO => Held::Zero,
                MARK_LOST => Held::Lost,
                MARK_AGAIN => Held::Unresolved,
                _ => continue,
            };
            self.buffers.unpin(buffer);
            self.tasks.get_mut(task).held[at].held = held;
        }
        let held = &self.tasks.get(task).held;
        if held.iter().any(|block| block.held == Held::Unresolved) {
            return match self.tasks.get(task).kind {
                TaskKind::Client(_) => self.collect(task),
                // A push or a move looks at its blocks again when it runs the next time.
                TaskKind::Push | TaskKind::Move => Collected::All,
            };
        }
        Collected::All
    }

    /// Lets go of every buffer that a task holds.
    pub(super) fn release_held(&mut self, task: u32) {
        for at in 0..self.tasks.get(task).held.len() {
            if let Held::Buffer(buffer, _) = self.tasks.get(task).held[at].held {
                self.buffers.unpin(buffer);
            }
        }
    }

    /// What a client has read and the volume's mode does not keep leaves RAM, unless others use it
    /// or the store lacks it.
    pub(super) fn drop_passing(&mut self, task: u32) {
        if self.volumes[self.tasks.get(task).volume].mode.keeps_reads() {
            return;
        }
        for at in 0..self.tasks.get(task).held.len() {
            let Held::Buffer(buffer, _) = self.tasks.get(task).held[at].held else { continue };
            let clean = self.buffers.state(buffer) == State::Clean;
            if !clean || self.buffers.is_detached(buffer) || self.buffers.pins(buffer) > 0 {
                continue;
            }
            let (leaf, index) = place(self.buffers.block(buffer));
            let dirty = self.onodes.leaf(leaf).dirty;
            if (dirty[0] | dirty[1]) & 1 << index == 0 {
                self.drop_buffer(leaf, index);
                self.onodes.free_if_empty(leaf);
            }
        }
    }

    /// A device read ended.
    pub(super) fn device_fill_done(&mut self, fill: u32, ok: bool, crcs: &[u32]) {
        let at = self.fills.get(fill).at;
        self.log.segment_mut(at).readers -= 1;
        for index in 0..self.fills.get(fill).blocks.len() {
            let block = self.fills.get(fill).blocks[index];
            let sound = ok && crcs.get(index) == Some(&block.crc);
            let (leaf, position) = place(block.addr);
            let current = self.is_current(block.buffer);
            let mark = if sound {
                NIL
            } else {
                self.damaged(at + index as u32, block.addr, block.onode, ok)
            };
            if mark != NIL && current {
                self.drop_buffer(leaf, position);
            }
            self.count_scrubbed(fill, block.onode, |scrubbed| {
                scrubbed.sound_blocks += u64::from(sound);
                scrubbed.damaged_blocks += u64::from(!sound);
            });
            self.end_fill_block(fill, block, mark);
        }
        self.note_warmed(fill, ok);
        self.wake_fill(fill);
    }

    /// A page of the region does not hold what it should, or (`read` false) could not be read. What
    /// was clean is forgotten and fetched again; what has moved on is looked for again. What was
    /// dirty and could not be read may be there the next time; what was dirty and is damaged is
    /// lost and says so.
    fn damaged(
        &mut self,
        page: u32,
        addr: crate::buffer::BlockAddr,
        onode: u32,
        read: bool,
    ) -> u32 {
        self.counters.damaged_blocks += u64::from(read);
        if self.log.owner(page) != addr.0 {
            return MARK_AGAIN;
        }
        let (leaf, index) = place(addr);
        let bit = 1u16 << index;
        let (object, block) = {
            let slot = self.onodes.leaf(leaf);
            (self.onodes.get(slot.onode).object, usize::from(slot.position) * LEAF_BLOCKS + index)
        };
        let dirty = self.onodes.leaf(leaf).dirty;
        if (dirty[0] | dirty[1]) & bit == 0 {
            log::warn!("object {object} block {block}: damaged on the cache device, repairing it");
            self.drop_log_page(leaf, index);
            self.repair(onode, leaf, index);
            return MARK_AGAIN;
        }
        if !read {
            log::error!("object {object} block {block}: the cache device cannot be read");
            return MARK_LOST;
        }
        log::error!(
            "object {object} block {block}: damaged on the cache device before it was pushed; \
             reading it is an error until it is written again"
        );
        self.counters.lost_blocks += 1;
        let volume = self.onodes.get(onode).volume;
        let volume = self.volume_index(volume).expect("a dirty block's volume is attached");
        self.drop_log_page(leaf, index);
        self.clear_dirty(volume, leaf, 0, bit);
        self.clear_dirty(volume, leaf, 1, bit);
        self.onodes.leaf_mut(leaf).bad |= bit;
        MARK_LOST
    }

    /// The store's answer to a fetch.
    pub(super) fn handle_fetched(&mut self, op: OpId, ok: bool, crcs: &[Option<u32>]) {
        let Some(Op::Fill(fill)) = self.end_op(op) else { return };
        for index in 0..self.fills.get(fill).blocks.len() {
            let block = self.fills.get(fill).blocks[index];
            if block.is_gap() {
                continue;
            }
            let (leaf, position) = place(block.addr);
            let current = self.is_current(block.buffer);
            let mark = match (ok, crcs.get(index).copied().flatten()) {
                (true, Some(crc)) => {
                    if current {
                        self.onodes.leaf_mut(leaf).crc[position] = crc;
                    }
                    NIL
                }
                (true, None) => MARK_ZERO,
                (false, _) => MARK_LOST,
            };
            self.count_scrubbed(fill, block.onode, |scrubbed| {
                scrubbed.repaired_blocks += u64::from(ok);
            });
            if mark != NIL && current {
                if mark == MARK_ZERO {
                    self.onodes.leaf_mut(leaf).zero |= 1 << position;
                }
                self.drop_buffer(leaf, position);
                self.onodes.free_if_empty(leaf);
            }
            self.end_fill_block(fill, block, mark);
        }
        if ok && self.fills.get(fill).admit {
            self.admit_fill(fill);
        }
        self.note_warmed(fill, ok);
        self.wake_fill(fill);
    }

    /// Whether a block still refers to the buffer that is being filled for it. If it does not, its
    /// leaf may be gone.
    fn is_current(&self, buffer: BufferId) -> bool {
        !self.buffers.is_detached(buffer)
    }

    fn end_fill_block(&mut self, fill: u32, block: super::fill::FillBlock, mark: u32) {
        self.marks[block.buffer.0 as usize] = mark;
        let level = self.fills.get(fill).level;
        self.buffers.finish(block.buffer, level);
        self.onodes.unpin(block.onode);
    }

    fn wake_fill(&mut self, fill: u32) {
        let mut waiters = self.fills.get_mut(fill).waiters.take();
        self.fills.end(fill);
        while let Some(task) = self.tasks.pop_front(&mut waiters) {
            match self.wait_for_fills(task) {
                Collected::All => self.collected(task),
                Collected::Waiting => {}
                Collected::Stalled => self.stall_read(task),
            }
        }
    }

    pub(super) fn stall_read(&mut self, task: u32) {
        let mut stalled = self.stalled_reads.take();
        self.tasks.push_back(&mut stalled, task);
        self.stalled_reads = stalled;
    }

    /// A task has all its blocks.
    pub(super) fn collected(&mut self, task: u32) {
        match self.tasks.get(task).kind {
            TaskKind::Push => self.push_collected(task),
            TaskKind::Move => self.move_collected(task),
            TaskKind::Client(request) => match request.kind {
                RequestKind::Read => self.reply_read(task),
                RequestKind::Write => self.merge_edges(task),
                RequestKind::Cache => {
                    self.note_lost(task);
                    self.release_held(task);
                    self.reply(task);
                }
                kind => panic!("{kind:?} collects nothing"),
            },
        }
    }

    /// A task with a block that cannot be had fails. If its volume was lost meanwhile, that is why.
    pub(super) fn note_lost(&mut self, task: u32) {
        let slot = self.tasks.get(task);
        if slot.held.iter().any(|block| block.held == Held::Lost) {
            let saved = slot.request().advice == Advice::Salvage;
            let gone = self.volumes[slot.volume].gone && !saved;
            self.fail(task, if gone { Status::Gone } else { Status::Io });
        }
    }

    /// Makes a task want blocks `first..first + count` of its object.
    pub(super) fn want(&mut self, task: u32, first: u16, count: usize) {
        let task = self.tasks.get_mut(task);
        let object = task.request().object;
        for block in first..first + count as u16 {
            let block = HeldBlock { held: Held::Unresolved, object, block, extra: 0 };
            task.held.push(block).expect("a request has at most that many blocks");
        }
    }
}
