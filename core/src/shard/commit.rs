//! What a volume's mode means for the answers to its changes, and the changes that wait for the
//! store.
//!
//! ```text
//! a change is    in RAM --record written--> in the log --cut, push, commit--> in the store
//! answered here: ram, ephemeral             writeback                         the other modes
//! ```
//!
//! A change that waits for the store gives its pages back and ends its task, so that however long
//! the store is away, other volumes lack neither. All that is kept of it is a [`Waiter`]. One
//! `Sync` for each epoch makes the keeper push: all that wait share the commit.

use super::volume::{Phase, Volume};
use super::{Log, Shard};
use crate::event::{Buffering, Mode, Output, Reply, RequestKind, Status, ToKeeper};
use crate::ids::{Epoch, VolumeId};

/// Changes that can wait for the store without a task. Beyond that they keep their tasks.
pub(super) const WAITERS_MAX: usize = 4096;
/// Waiters that one turn answers.
const ANSWERS_MAX: usize = 128;
/// Of a shard's pages, the part that data acknowledged in RAM may take before it is written.
const RAM_PART: u32 = 8;

impl Mode {
    /// Changes are answered when the store has them.
    pub(crate) const fn waits_for_store(self) -> bool {
        matches!(self, Self::WriteThrough | Self::WriteAround | Self::None)
    }

    /// Changes are answered before they are written.
    pub(crate) const fn answers_from_ram(self) -> bool {
        matches!(self, Self::Ram | Self::Ephemeral)
    }

    /// What was written stays in the cache when the store has it.
    pub(crate) const fn keeps_writes(self) -> bool {
        !matches!(self, Self::WriteAround | Self::None)
    }

    /// What was read stays in the cache.
    pub(crate) const fn keeps_reads(self) -> bool {
        !matches!(self, Self::None)
    }
}

/// A change that is in the log and waits for the store.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiter {
    id: u64,
    kind: RequestKind,
    fua: bool,
    /// Index of the volume in the shard's table.
    volume: usize,
    epoch: Epoch,
    /// All of it is in records below this number.
    seq: u64,
}

impl Waiter {
    /// How it is answered now; `None`: not yet. It may have come to wait for less, when the mode
    /// was changed.
    fn verdict(&self, volume: &Volume, log: &Log) -> Option<Status> {
        if self.epoch <= volume.committed {
            return Some(Status::Ok);
        }
        if volume.gone {
            return Some(Status::Gone);
        }
        let held = volume.phase == Phase::Closing && self.epoch == volume.open;
        if volume.mode.waits_for_store() || held {
            return None;
        }
        let durable = log.durable_seq() >= self.seq;
        (durable || !self.fua || volume.mode == Mode::Ephemeral).then_some(Status::Ok)
    }
}

impl Shard<'_> {
    pub(super) fn set_settings(&mut self, volume: VolumeId, mode: Mode, buffering: Buffering) {
        let Some(index) = self.volume_index(volume) else { return };
        let state = &mut self.volumes[index];
        state.buffering = buffering;
        state.mode = mode;
        // Those that waited for the store may now wait for this.
        state.waiters_seq = self.log.next_seq();
    }

    /// Whether blocks of a change may be answered for before they are written. Beyond the bound a
    /// change waits for the log.
    pub(super) fn answers_from_ram(&self, task: u32, blocks: usize) -> bool {
        let task = self.tasks.get(task);
        let mode = self.volumes[task.volume].mode;
        let fua = task.request().fua && mode != Mode::Ephemeral;
        let room = self.buffers.capacity() / RAM_PART;
        mode.answers_from_ram() && !fua && self.log.unwritten_blocks() + blocks <= room as usize
    }

    /// All of a change is in RAM and has its place in the log. If no part of it is to be waited
    /// for, it is answered.
    pub(super) fn installed(&mut self, task: u32) {
        let seq = self.log.next_seq();
        let slot = self.tasks.get_mut(task);
        slot.seq = seq;
        let (volume, waits) = (slot.volume, slot.records > 0);
        if slot.early {
            self.volumes[volume].ram_seq = seq;
        }
        if !waits {
            self.acknowledge(task);
        }
    }

    /// Whether a change's answer waits for the store.
    pub(super) fn awaits_commit(&self, task: u32) -> bool {
        let task = self.tasks.get(task);
        let state = &self.volumes[task.volume];
        let waits = state.mode.waits_for_store() && task.epoch > state.committed;
        waits && task.status == Status::Ok
    }

    /// Whether one more change can wait without a task.
    pub(super) fn has_waiter_room(&self) -> bool {
        self.waiters.len() < WAITERS_MAX
    }

    /// The change's task ends; its answer waits for the store. Its pages, if it brought any, are in
    /// its payload.
    pub(super) fn wait_for_commit(&mut self, task: u32) {
        self.unpin_task_onode(task);
        let slot = self.tasks.get(task);
        let request = slot.request();
        let waiter = Waiter {
            id: request.id,
            kind: request.kind,
            fua: request.fua,
            volume: slot.volume,
            epoch: slot.epoch,
            seq: slot.seq,
        };
        let empty = slot.payload.is_empty();
        self.waiters.push_back(waiter);
        let state = &mut self.volumes[waiter.volume];
        state.waiters += 1;
        if waiter.epoch == state.open && !state.synced {
            state.synced = true;
            let volume = state.id;
            self.emit(Output::Keeper(ToKeeper::Sync { volume }));
        }
        if empty {
            return self.end_task(task);
        }
        self.emit(Output::HandBack { id: waiter.id });
        let mut replies = self.replies.take();
        self.tasks.push_back(&mut replies, task);
        self.replies = replies;
    }

    /// Answers those that need not wait any more, in order, if something has happened that they may
    /// have waited for.
    pub(super) fn answer_waiters(&mut self) {
        if !core::mem::take(&mut self.look_at_waiters) {
            return;
        }
        let mut left = ANSWERS_MAX;
        for _ in 0..self.waiters.len() {
            let waiter = self.waiters.pop_front().expect("as many as there are");
            let verdict = waiter.verdict(&self.volumes[waiter.volume], &self.log);
            match verdict {
                Some(status) if left > 0 => {
                    left -= 1;
                    self.answer_waiter(&waiter, status);
                }
                _ => {
                    self.look_at_waiters |= verdict.is_some();
                    self.waiters.push_back(waiter);
                }
            }
        }
        self.again |= self.look_at_waiters;
    }

    fn answer_waiter(&mut self, waiter: &Waiter, status: Status) {
        let state = &mut self.volumes[waiter.volume];
        state.waiters -= 1;
        if waiter.epoch > state.committed {
            state.acked_seq = state.acked_seq.max(waiter.seq);
        }
        let Waiter { id, kind, .. } = *waiter;
        self.emit(Output::Late(Reply { id, kind, status, lease: None }));
    }

    /// Whether a volume's changes wait for a device flush from here on; up to where.
    pub(super) fn waiters_need(volume: &Volume) -> Option<u64> {
        (volume.waiters > 0 && !volume.mode.waits_for_store()).then_some(volume.waiters_seq)
    }

    /// Tells the keepers which volumes have come to be dirty. Nobody waits for a push of what is
    /// ephemeral: only the want of room, or an operator, begins one.
    pub(super) fn tell_dirtied(&mut self) {
        for index in 0..self.volumes.len() {
            let state = &mut self.volumes[index];
            let ephemeral = state.mode == Mode::Ephemeral;
            if state.dirtied && !state.told && !state.gone && !ephemeral {
                state.told = true;
                let volume = state.id;
                self.emit(Output::Keeper(ToKeeper::Dirtied { volume }));
            }
        }
    }
}
