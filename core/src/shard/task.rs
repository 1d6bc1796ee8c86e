//! Tasks: everything a shard does that takes more than one step.

use alloc::boxed::Box;

use crate::buffer::BufferId;
use crate::event::{Request, Status};
use crate::ids::{BlockRef, Epoch, PageId};
use crate::limits::REQUEST_BLOCKS_MAX;
use crate::onode::NIL;
use crate::time::Instant;

/// What a task is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TaskKind {
    /// A client's request.
    Client(Request),
    /// A batch of a push.
    Push,
    /// Live blocks of the segment that reclaim empties.
    Move,
}

/// Where a block of a task is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Held {
    /// Not looked for yet.
    Unresolved,
    /// It reads as zeroes.
    Zero,
    /// In a buffer that the task has pinned; perhaps still being filled.
    Buffer(BufferId, PageId),
    /// It cannot be had.
    Lost,
}

/// A block that a task holds, and which block it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeldBlock {
    pub(crate) held: Held,
    pub(crate) object: u32,
    pub(crate) block: u16,
    /// Push: CRC32C. Move: the page of the region that it lay in.
    pub(crate) extra: u32,
}

#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) kind: TaskKind,
    /// Index of the volume in the shard's table.
    pub(crate) volume: usize,
    pub(crate) onode: u32,
    pub(crate) held: heapless::Vec<HeldBlock, REQUEST_BLOCKS_MAX>,
    /// Write: its pages. Any: the blocks of the reply.
    pub(crate) payload: heapless::Vec<BlockRef, REQUEST_BLOCKS_MAX>,
    /// Blocks appended to the log so far.
    pub(crate) appended: u16,
    /// Records that are not written yet.
    pub(crate) records: u16,
    /// Merges under way.
    pub(crate) merges: u16,
    /// It keeps other changes off its object, because it reads before it writes.
    pub(crate) merging: bool,
    /// Its unaligned edges hold whole blocks now.
    pub(crate) merged: bool,
    /// It has passed the dirty limits.
    pub(crate) admitted: bool,
    /// A part of it is not waited for: the mode did not ask for that then.
    pub(crate) early: bool,
    /// The epoch of its last block.
    pub(crate) epoch: Epoch,
    /// A change: it is in records below this number. A FLUSH: so are those it waits for.
    pub(crate) seq: u64,
    pub(crate) status: Status,
    /// Pages to hand back.
    pub(crate) owed: u16,
    /// The reply lends what it holds; the task ends with the lease.
    pub(crate) lends: bool,
    /// When it came.
    pub(crate) since: Instant,
    next: u32,
}

impl Task {
    const fn idle(next: u32) -> Self {
        Self {
            kind: TaskKind::Move,
            volume: 0,
            onode: NIL,
            held: heapless::Vec::new(),
            payload: heapless::Vec::new(),
            appended: 0,
            records: 0,
            merges: 0,
            merging: false,
            merged: false,
            admitted: false,
            early: false,
            epoch: Epoch::ZERO,
            seq: 0,
            status: Status::Ok,
            owed: 0,
            lends: false,
            since: Instant(0),
            next,
        }
    }

    /// The client's request; the task must be one.
    pub(crate) fn request(&self) -> Request {
        match self.kind {
            TaskKind::Client(request) => request,
            TaskKind::Push | TaskKind::Move => panic!("not a client's task"),
        }
    }
}

/// A queue of tasks, first in first out. A task is in one queue at a time.
#[derive(Debug)]
pub(crate) struct Fifo {
    head: u32,
    tail: u32,
}

impl Fifo {
    pub(crate) const fn new() -> Self {
        Self { head: NIL, tail: NIL }
    }

    pub(crate) const fn head(&self) -> Option<u32> {
        if self.head == NIL { None } else { Some(self.head) }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.head == NIL
    }

    /// Takes the whole queue.
    pub(crate) const fn take(&mut self) -> Self {
        let taken = Self { head: self.head, tail: self.tail };
        self.head = NIL;
        self.tail = NIL;
        taken
    }
}

/// All tasks of a shard: a table that is allocated once.
#[derive(Debug)]
pub(crate) struct Tasks {
    slots: Box<[Task]>,
    free: u32,
    used: u32,
}

impl Tasks {
    pub(crate) fn new(count: usize) -> Self {
        let next = |index: usize| if index + 1 == count { NIL } else { index as u32 + 1 };
        Self { slots: (0..count).map(|index| Task::idle(next(index))).collect(), free: 0, used: 0 }
    }

    pub(crate) fn free(&self) -> usize {
        self.slots.len() - self.used as usize
    }

    pub(crate) fn get(&self, task: u32) -> &Task {
        &self.slots[task as usize]
    }

    pub(crate) fn get_mut(&mut self, task: u32) -> &mut Task {
        &mut self.slots[task as usize]
    }

    /// A fresh task; `None` when all are in use.
    pub(crate) fn start(&mut self, kind: TaskKind, volume: usize, now: Instant) -> Option<u32> {
        let index = self.free;
        if index == NIL {
            return None;
        }
        let task = self.get_mut(index);
        let free = task.next;
        task.kind = kind;
        task.volume = volume;
        task.onode = NIL;
        task.held.clear();
        task.payload.clear();
        task.appended = 0;
        task.records = 0;
        task.merges = 0;
        task.merging = false;
        task.merged = false;
        task.admitted = false;
        task.early = false;
        task.epoch = Epoch::ZERO;
        task.seq = 0;
        task.status = Status::Ok;
        task.owed = 0;
        task.lends = false;
        task.since = now;
        self.free = free;
        self.used += 1;
        Some(index)
    }

    pub(crate) fn end(&mut self, index: u32) {
        let free = self.free;
        self.get_mut(index).next = free;
        self.free = index;
        self.used -= 1;
    }

    pub(crate) fn push_back(&mut self, fifo: &mut Fifo, index: u32) {
        self.get_mut(index).next = NIL;
        if fifo.tail == NIL {
            fifo.head = index;
        } else {
            self.get_mut(fifo.tail).next = index;
        }
        fifo.tail = index;
    }

    pub(crate) fn push_front(&mut self, fifo: &mut Fifo, index: u32) {
        self.get_mut(index).next = fifo.head;
        if fifo.tail == NIL {
            fifo.tail = index;
        }
        fifo.head = index;
    }

    pub(crate) fn pop_front(&mut self, fifo: &mut Fifo) -> Option<u32> {
        let index = fifo.head()?;
        fifo.head = self.get(index).next;
        if fifo.head == NIL {
            fifo.tail = NIL;
        }
        Some(index)
    }
}
