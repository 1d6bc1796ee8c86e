//! Durability: what waits for a device flush, and what waits for a cut.
//!
//! A client's FLUSH covers what was acknowledged before it, so it waits for the first device flush
//! that begins after it came; a FUA write for the first that begins after its record is written.
//! All who wait share one flush.

use super::task::TaskKind;
use super::volume::Phase;
use super::{Op, Shard};
use crate::event::{Output, RequestKind, Status};

impl Shard<'_> {
    /// A change is in the log.
    pub(super) fn logged(&mut self, task: u32) {
        let fua = self.tasks.get(task).request().fua;
        if fua && self.tasks.get(task).status == Status::Ok {
            self.await_flush(task);
        } else {
            self.acknowledge(task);
        }
    }

    /// The task goes on after the next device flush.
    pub(super) fn await_flush(&mut self, task: u32) {
        if !self.unflushed {
            if !self.flushing {
                return self.after_flush(task, true);
            }
            // The flush under way began after all that was written.
            let mut flushed = self.flushed.take();
            self.tasks.push_back(&mut flushed, task);
            self.flushed = flushed;
            return;
        }
        let mut barrier = self.barrier.take();
        self.tasks.push_back(&mut barrier, task);
        self.barrier = barrier;
    }

    fn after_flush(&mut self, task: u32, ok: bool) {
        if !ok {
            self.fail(task, Status::Io);
        }
        match self.tasks.get(task).kind {
            TaskKind::Client(request) if request.kind == RequestKind::Flush => self.reply(task),
            _ => self.acknowledge(task),
        }
    }

    /// Starts a device flush if somebody waits for one that can help.
    pub(super) fn start_flush(&mut self) {
        if self.flushing {
            return;
        }
        let (completed, durable) = (self.log.completed_seq(), self.log.durable_seq());
        let helps = |need: u64| durable < need && need <= completed;
        let closing = |volume: &super::volume::Volume| {
            matches!(volume.phase, Phase::Closing | Phase::Closed) && helps(volume.close_seq)
        };
        let wanted = !self.barrier.is_empty()
            || self.volumes.iter().any(closing)
            || self.reclaim.need().is_some_and(helps);
        if !wanted {
            return;
        }
        self.flushing = true;
        self.unflushed = false;
        self.flushed = self.barrier.take();
        self.counters.flushes += 1;
        let op = self.start_op(Op::Flush(completed));
        self.emit(Output::DeviceFlush { op });
    }

    pub(super) fn flush_done(&mut self, seq: u64, ok: bool) {
        self.flushing = false;
        if ok {
            self.log.set_durable(seq);
        } else {
            // What was written is still not durable; whoever waits from now on tries again.
            self.unflushed = true;
        }
        let mut flushed = self.flushed.take();
        while let Some(task) = self.tasks.pop_front(&mut flushed) {
            self.after_flush(task, ok);
        }
    }

    /// A change is as durable as was asked. Its answer waits if it belongs to an epoch that opened
    /// here before every shard had closed the one before: no image may hold a write that was issued
    /// after this answer, but not this one.
    fn acknowledge(&mut self, task: u32) {
        let (volume, epoch) = (self.tasks.get(task).volume, self.tasks.get(task).epoch);
        let state = &mut self.volumes[volume];
        if state.phase == Phase::Closing && epoch == state.open && !state.gone {
            let mut held = state.held.take();
            self.tasks.push_back(&mut held, task);
            self.volumes[volume].held = held;
            return;
        }
        self.hand_back(task);
    }

    /// Every shard has closed the epoch: the held answers go out.
    pub(super) fn let_go(&mut self, volume: usize) {
        let mut held = self.volumes[volume].held.take();
        while let Some(task) = self.tasks.pop_front(&mut held) {
            self.hand_back(task);
        }
    }
}
