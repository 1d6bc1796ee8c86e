//! A core's block queue as its shards use it: which operation is whose, what waits for room in the
//! queue, and device flushes shared by all shards that wait for one.

use std::collections::VecDeque;

use heeler_core::ids::{OpId, PageId};
use heeler_hw::{BlockQueue, Io, IoKind};
use slab::Slab;

/// Reads for pushes that are in flight at most, and pages of theirs, but for a single larger one. A
/// client's read then waits for no more of them than for another client's.
const PUSH_READS_MAX: (usize, usize) = (2, 32);
/// The token of a device flush; all others are keys of `Device::ops`.
const FLUSH_TOKEN: u64 = u64::MAX;

/// One operation of a shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct DeviceOp {
    /// Position of the shard among those of the core.
    pub(crate) host: usize,
    pub(crate) op: OpId,
    pub(crate) kind: IoKind,
    /// Bytes from the start of the device.
    pub(crate) offset: u64,
    /// Of a read for a push: its pages. Others are not counted.
    pub(crate) push_pages: usize,
}

/// What has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Done {
    /// A read or a write.
    Op(DeviceOp, bool),
    /// The flush for [`Device::next_flushed`].
    Flush(bool),
}

#[derive(Debug)]
pub(crate) struct Device<Q> {
    queue: Q,
    ops: Slab<DeviceOp>,
    /// What found the queue full, in order.
    backlog: VecDeque<DeviceOp>,
    /// Reads for pushes that wait for earlier ones.
    push_reads: VecDeque<DeviceOp>,
    /// Of those in flight: how many, and their pages.
    push_running: (usize, usize),
    /// Who asked for a flush since the one in flight was pushed. Only a later one covers them.
    flush_wanted: Vec<(usize, OpId)>,
    /// Whom the flush in flight, or the one that just ended, covers.
    flush_riders: Vec<(usize, OpId)>,
    flushing: bool,
}

impl<Q: BlockQueue> Device<Q> {
    pub(crate) fn new(queue: Q) -> Self {
        let depth = queue.capacity();
        Self {
            queue,
            ops: Slab::with_capacity(depth),
            backlog: VecDeque::with_capacity(depth),
            push_reads: VecDeque::with_capacity(depth),
            push_running: (0, 0),
            flush_wanted: Vec::new(),
            flush_riders: Vec::new(),
            flushing: false,
        }
    }

    pub(crate) fn queue(&self) -> &Q {
        &self.queue
    }

    /// The queue is to cover so many pages of the arena.
    pub(crate) fn cover(&mut self, pages: u32) {
        self.queue.cover(pages);
    }

    /// Starts a read or a write; one that finds the queue full waits its turn.
    pub(crate) fn push(&mut self, op: DeviceOp, pages: &[PageId]) {
        if op.push_pages > 0 {
            self.push_reads.push_back(op);
        } else if !self.backlog.is_empty() || !self.try_push(op, pages) {
            self.backlog.push_back(op);
        }
    }

    /// The read for a push that may start now, when nothing else waits.
    pub(crate) fn waiting_push(&self) -> Option<DeviceOp> {
        let (ops, pages) = self.push_running;
        let first = self.push_reads.front().filter(|_| self.backlog.is_empty())?;
        let (ops_max, pages_max) = PUSH_READS_MAX;
        let room = ops == 0 || ops < ops_max && pages + first.push_pages <= pages_max;
        room.then_some(*first)
    }

    /// Starts the read that [`Self::waiting_push`] named.
    pub(crate) fn start_push_read(&mut self, pages: &[PageId]) -> bool {
        let Some(op) = self.waiting_push() else { return false };
        let pushed = self.try_push(op, pages);
        if pushed {
            self.push_reads.pop_front();
            self.push_running.0 += 1;
            self.push_running.1 += op.push_pages;
        }
        pushed
    }

    /// The operation that waits first.
    pub(crate) fn waiting(&self) -> Option<DeviceOp> {
        self.backlog.front().copied()
    }

    /// Tries the operation that waits first again.
    pub(crate) fn retry(&mut self, pages: &[PageId]) -> bool {
        let Some(op) = self.waiting() else { return false };
        let pushed = self.try_push(op, pages);
        if pushed {
            self.backlog.pop_front();
        }
        pushed
    }

    fn try_push(&mut self, op: DeviceOp, pages: &[PageId]) -> bool {
        let entry = self.ops.vacant_entry();
        let io = Io { token: entry.key() as u64, kind: op.kind, offset: op.offset, pages };
        let pushed = self.queue.push(io).is_ok();
        if pushed {
            entry.insert(op);
        }
        pushed
    }

    /// Asks for a flush that begins after this call.
    pub(crate) fn want_flush(&mut self, host: usize, op: OpId) {
        self.flush_wanted.push((host, op));
    }

    /// Pushes the flush that is wanted, if none is in flight.
    pub(crate) fn start_flush(&mut self) {
        if self.flushing || self.flush_wanted.is_empty() {
            return;
        }
        assert!(self.flush_riders.is_empty(), "the riders of the last flush were told");
        let io = Io { token: FLUSH_TOKEN, kind: IoKind::Flush, offset: 0, pages: &[] };
        if self.queue.push(io).is_ok() {
            std::mem::swap(&mut self.flush_wanted, &mut self.flush_riders);
            self.flushing = true;
        }
    }

    /// One operation that has ended. After a flush [`Self::next_flushed`] says whose.
    pub(crate) fn reap(&mut self) -> Option<Done> {
        let completion = self.queue.reap()?;
        let ok = match completion.result {
            Ok(()) => true,
            Err(error) => {
                log::warn!("cache device: {error}");
                false
            }
        };
        if completion.token == FLUSH_TOKEN {
            self.flushing = false;
            return Some(Done::Flush(ok));
        }
        let op = self.ops.remove(completion.token as usize);
        if op.push_pages > 0 {
            self.push_running.0 -= 1;
            self.push_running.1 -= op.push_pages;
        }
        Some(Done::Op(op, ok))
    }

    /// One of those who waited for the flush that ended.
    pub(crate) fn next_flushed(&mut self) -> Option<(usize, OpId)> {
        debug_assert!(!self.flushing);
        self.flush_riders.pop()
    }

    /// Starts all that was pushed. False: the kernel wants to be asked again later.
    pub(crate) fn submit(&mut self) -> bool {
        match self.queue.submit() {
            Ok(()) => true,
            Err(error) => {
                log::debug!("cache device: submission waits: {error}");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use heeler_hw::Arena;
    use heeler_hw::sim::disk::SimDisk;

    const fn op(slot: u32) -> OpId {
        OpId { slot, generation: 1 }
    }

    #[test]
    fn a_flush_covers_those_who_asked_before_it_began() {
        let disk = SimDisk::new(1 << 20, 1);
        let mut device = Device::new(disk.queue(&Arena::new(1).unwrap(), 4));
        device.want_flush(0, op(1));
        device.want_flush(1, op(2));
        device.start_flush();
        device.want_flush(0, op(3));
        device.start_flush();
        assert!(device.submit());
        assert_eq!((disk.pending(), disk.counts().flushes), (1, 0));
        assert!(disk.step());
        assert_eq!(device.reap(), Some(Done::Flush(true)));
        let mut told: Vec<_> = std::iter::from_fn(|| device.next_flushed()).collect();
        told.sort_by_key(|(_, op)| op.slot);
        assert_eq!(told, [(0, op(1)), (1, op(2))]);
        device.start_flush();
        assert!(device.submit() && disk.step());
        assert_eq!(device.reap(), Some(Done::Flush(true)));
        assert_eq!(device.next_flushed(), Some((0, op(3))));
        assert_eq!(disk.counts().flushes, 2);
    }

    #[test]
    fn reads_for_pushes_are_few_and_those_of_clients_overtake_them() {
        let arena = Arena::new(256).unwrap();
        let disk = SimDisk::new(4 << 20, 1);
        let mut device = Device::new(disk.queue(&arena, 64));
        let pages: Vec<PageId> = (0..256).map(PageId).collect();
        let read = |n: u32, push_pages| DeviceOp {
            host: 0,
            op: op(n),
            kind: IoKind::Read,
            offset: 0,
            push_pages,
        };
        let sizes = [1, 1, 1, 31, 64];
        (0..5).for_each(|n| device.push(read(n, sizes[n as usize]), &[]));
        let start = |device: &mut Device<_>| {
            let mut started = Vec::new();
            while let Some(op) = device.waiting_push() {
                let first = 34 * op.op.slot as usize;
                assert!(device.start_push_read(&pages[first..first + op.push_pages]));
                started.push(op.op.slot);
            }
            started
        };
        assert_eq!(start(&mut device), [0, 1]);
        device.push(read(9, 0), &pages[255..]);
        let mut ended = Vec::new();
        let mut end_one = |device: &mut Device<_>| {
            assert!(device.submit() && disk.step());
            let Some(Done::Op(op, true)) = device.reap() else { panic!("it has ended") };
            ended.push(op.op.slot);
            op.push_pages > 0
        };
        while !end_one(&mut device) {}
        while device.push_running.0 > 0 {
            end_one(&mut device);
        }
        assert_eq!(start(&mut device), [2, 3], "as many pages as may be");
        (0..2).for_each(|_| _ = end_one(&mut device));
        assert_eq!(start(&mut device), [4], "a large one goes alone");
        end_one(&mut device);
        ended.sort_unstable();
        assert_eq!(ended, [0, 1, 2, 3, 4, 9]);
    }

    #[test]
    fn what_finds_the_queue_full_goes_later_in_order() {
        let arena = Arena::new(3).unwrap();
        let disk = SimDisk::new(1 << 20, 1);
        let mut device = Device::new(disk.queue(&arena, 1));
        let write = |n: u32| DeviceOp {
            host: 0,
            op: op(n),
            kind: IoKind::Write,
            offset: u64::from(n) << 12,
            push_pages: 0,
        };
        for n in 0..3 {
            device.push(write(n), &[PageId(n)]);
        }
        for n in 0..3 {
            assert_eq!(device.waiting().map(|op| op.op.slot), (n < 2).then_some(n + 1));
            assert!(!device.retry(&[PageId(n)]));
            assert!(device.submit() && disk.step());
            assert_eq!(device.reap(), Some(Done::Op(write(n), true)));
            assert_eq!(device.retry(&[PageId(n + 1)]), n < 2);
        }
    }
}
