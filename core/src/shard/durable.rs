//! Durability: what waits for a device flush, and what waits for a cut.
//!
//! A client's FLUSH covers what was acknowledged before it, so it waits for the first device flush
//! that begins after it came; a FUA write for the first that begins after its record is written.
//! What was acknowledged in RAM must be written before that flush begins. All who wait share one
//! flush.

use super::task::TaskKind;
use super::volume::Phase;
use super::{Op, Shard};
use crate::event::{Mode, Output, RequestKind, Status};

impl Shard<'_> {
    /// A change is in the log: all that it waited for.
    pub(super) fn logged(&mut self, task: u32) {
        let slot = self.tasks.get(task);
        let mode = self.volumes[slot.volume].mode;
        if slot.early && !mode.answers_from_ram() && self.log.completed_seq() < slot.seq {
            // The mode was changed when a part of it had been appended: now that counts too.
            return self.await_records(task);
        }
        let flushes = !mode.waits_for_store() && mode != Mode::Ephemeral;
        if slot.request().fua && flushes && slot.status == Status::Ok {
            self.await_flush(task);
        } else {
            self.acknowledge(task);
        }
    }

    /// A client's FLUSH: what was answered before it becomes durable. What was answered when the
    /// store had it is so already.
    pub(super) fn flush(&mut self, task: u32) {
        let state = &self.volumes[self.tasks.get(task).volume];
        if state.mode == Mode::Ephemeral {
            return self.reply(task);
        }
        if self.log.durable_seq() >= state.acked_seq {
            return self.reply_flush(task);
        }
        if self.log.completed_seq() < state.ram_seq {
            self.tasks.get_mut(task).seq = state.ram_seq;
            return self.await_records(task);
        }
        self.await_flush(task);
    }

    /// The task goes on when all records below its number are written.
    fn await_records(&mut self, task: u32) {
        let mut unwritten = self.unwritten.take();
        self.tasks.push_back(&mut unwritten, task);
        self.unwritten = unwritten;
    }

    pub(super) fn retry_unwritten(&mut self) {
        let completed = self.log.completed_seq();
        while let Some(task) = self.unwritten.head() {
            if self.tasks.get(task).seq > completed {
                return;
            }
            self.tasks.pop_front(&mut self.unwritten);
            match self.tasks.get(task).request().kind {
                RequestKind::Flush => self.await_flush(task),
                _ => self.logged(task),
            }
        }
    }

    fn reply_flush(&mut self, task: u32) {
        let volume = self.tasks.get(task).volume;
        if core::mem::take(&mut self.volumes[volume].failed) {
            self.fail(task, Status::Io);
        }
        self.reply(task);
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
            TaskKind::Client(request) if request.kind == RequestKind::Flush => {
                self.reply_flush(task)
            }
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
            || self.volumes.iter().filter_map(Self::waiters_need).any(helps)
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
        self.look_at_waiters = true;
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

    /// A change is as durable as was asked, but for the store. Its answer waits if it belongs to an
    /// epoch that opened here before every shard had closed the one before: no image may hold a
    /// write that was issued after this answer, but not this one.
    pub(super) fn acknowledge(&mut self, task: u32) {
        let (volume, epoch) = (self.tasks.get(task).volume, self.tasks.get(task).epoch);
        let state = &mut self.volumes[volume];
        let held = state.phase == Phase::Closing && epoch == state.open && !state.gone;
        if held && !self.awaits_commit(task) {
            let state = &mut self.volumes[volume];
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
