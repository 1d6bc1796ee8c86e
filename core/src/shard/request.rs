//! Requests: checked, started, answered.

use super::read::{Collected, Source};
use super::task::{Held, TaskKind};
use super::{Op, Shard};
use crate::event::{Advice, Output, Rejected, Reply, Request, RequestKind, Status};
use crate::ids::{BLOCK_BYTES, BlockRef, OpId, PageId};
use crate::limits::REQUEST_BLOCKS_MAX;
use crate::onode::NIL;
use crate::policy::Hint;

/// Tasks kept back for pushes and reclaim, which must go on for requests to end.
const TASKS_RESERVED: usize = 16;
/// Stands for the volume of a task without one.
const NO_VOLUME: usize = usize::MAX;

/// First block and number of blocks that a byte range touches.
pub(super) fn span(request: &Request) -> (u16, usize) {
    let first = request.offset as usize / BLOCK_BYTES;
    let end = (request.offset as usize + request.len as usize).div_ceil(BLOCK_BYTES);
    (first as u16, end - first)
}

impl Shard<'_> {
    pub(super) fn handle_request(
        &mut self,
        request: Request,
        blocks: &[BlockRef],
    ) -> Result<(), Rejected> {
        if self.tasks.free() <= TASKS_RESERVED {
            return Err(Rejected);
        }
        let found = self.volume_index(request.volume);
        let saved = request.advice == Advice::Salvage;
        let volume = found.filter(|index| saved || !self.volumes[*index].gone);
        let kind = TaskKind::Client(request);
        let task = self.tasks.start(kind, volume.unwrap_or(NO_VOLUME), self.now);
        let task = task.expect("tasks are left");
        self.tasks.get_mut(task).payload.extend_from_slice(blocks).expect("a request's blocks");
        if let Some(volume) = volume {
            self.volumes[volume].tasks += 1;
        }
        if let Some(volume) = volume {
            if request.kind == RequestKind::Flush {
                self.flush(task);
            } else if self.is_valid(volume, &request, blocks.len()) {
                self.start_request(task, &request);
            } else {
                self.refuse(task, Status::Invalid);
            }
        } else {
            self.refuse(task, Status::Gone);
        }
        Ok(())
    }

    fn is_valid(&self, volume: usize, request: &Request, blocks: usize) -> bool {
        let blocks_max = self.volumes[volume].blocks_for(request.object, request.advice);
        let bytes = u64::from(blocks_max) * BLOCK_BYTES as u64;
        let end = u64::from(request.offset) + u64::from(request.len);
        if request.len == 0 || end > bytes {
            return false;
        }
        let count = span(request).1;
        match request.kind {
            RequestKind::Write => count <= REQUEST_BLOCKS_MAX && blocks == count,
            RequestKind::Read | RequestKind::Cache | RequestKind::Status => {
                count <= REQUEST_BLOCKS_MAX && blocks == 0
            }
            RequestKind::Zero | RequestKind::Discard => {
                let block = BLOCK_BYTES as u32;
                request.offset.is_multiple_of(block) && request.len.is_multiple_of(block)
            }
            RequestKind::Flush => false,
        }
    }

    fn start_request(&mut self, task: u32, request: &Request) {
        match request.kind {
            RequestKind::Read | RequestKind::Cache | RequestKind::Status => {
                if !self.stalled_reads.is_empty() || !self.try_read(task) {
                    self.stall_read(task);
                }
            }
            RequestKind::Write | RequestKind::Zero | RequestKind::Discard => {
                if !self.stalled_writes.is_empty() || !self.try_change(task) {
                    let mut stalled = self.stalled_writes.take();
                    self.tasks.push_back(&mut stalled, task);
                    self.stalled_writes = stalled;
                }
            }
            RequestKind::Flush => {}
        }
    }

    /// Starts a read; `false`: it must wait for room.
    pub(super) fn try_read(&mut self, task: u32) -> bool {
        let request = self.tasks.get(task).request();
        let volume = self.tasks.get(task).volume;
        if self.volumes[volume].gone && request.advice != Advice::Salvage {
            self.drop_change(task, Status::Gone);
            return true;
        }
        let keeps = self.volumes[volume].mode.keeps_reads() || self.bypasses(task);
        if request.kind == RequestKind::Cache && !keeps {
            // It would be fetched for nothing.
            self.reply(task);
            return true;
        }
        if self.tasks.get(task).onode == NIL {
            let Some(onode) = self.pin_onode(volume, request.object) else { return false };
            self.tasks.get_mut(task).onode = onode;
            let (first, count) = span(&request);
            if request.kind == RequestKind::Status {
                self.ask_status(task, first, count);
                return true;
            }
            self.want(task, first, count);
            self.note_read(self.tasks.get(task).onode, first, count);
        }
        match self.collect(task) {
            Collected::All => self.collected(task),
            Collected::Waiting => {}
            Collected::Stalled => return false,
        }
        true
    }

    /// Goes on with a change that can; `false`: it must wait for room.
    pub(super) fn try_change(&mut self, task: u32) -> bool {
        if self.volumes[self.tasks.get(task).volume].gone {
            self.drop_change(task, Status::Gone);
            return true;
        }
        match self.tasks.get(task).request().kind {
            RequestKind::Write => self.try_write(task),
            _ => self.try_discard(task),
        }
    }

    /// Gives up a change that waits for room.
    pub(super) fn drop_change(&mut self, task: u32, status: Status) {
        self.stop_merging(task);
        self.unpin_task_onode(task);
        self.fail(task, status);
        let slot = self.tasks.get(task);
        let (done, count) = (usize::from(slot.appended), span(&slot.request()).1);
        if done == 0 {
            return self.reply(task);
        }
        // Part of it is in the log, and those pages are the buffers' now: so are the others.
        for at in done..count {
            let page = self.tasks.get(task).payload[at].page;
            self.buffers.give_page(page);
        }
        let slot = self.tasks.get_mut(task);
        slot.appended = count as u16;
        slot.owed = count as u16;
        if slot.records == 0 {
            self.hand_back(task);
        }
    }

    pub(super) fn unpin_task_onode(&mut self, task: u32) {
        let onode = core::mem::replace(&mut self.tasks.get_mut(task).onode, NIL);
        if onode != NIL {
            self.unpin_onode(onode);
        }
    }

    /// Answers without having done anything; a write's pages go back as they came.
    pub(super) fn refuse(&mut self, task: u32, status: Status) {
        self.fail(task, status);
        self.reply(task);
    }

    /// Answers. The task ends when the reply has been polled and read, or with its lease.
    pub(super) fn reply(&mut self, task: u32) {
        self.unpin_task_onode(task);
        let (request, status) = (self.tasks.get(task).request(), self.tasks.get(task).status);
        let lends = self.tasks.get(task).lends;
        let lease = lends.then(|| self.start_op(Op::Lease(task)));
        self.emit(Output::Reply(Reply { id: request.id, kind: request.kind, status, lease }));
        let mut replies = self.replies.take();
        self.tasks.push_back(&mut replies, task);
        self.replies = replies;
    }

    /// The last polled reply has been read: its task ends, unless it lends pages.
    pub(super) fn end_replied(&mut self) {
        let Some(task) = self.replied.take() else { return };
        if !self.tasks.get(task).lends {
            self.end_task(task);
        }
    }

    /// Answers a read with the pages it holds.
    pub(super) fn reply_read(&mut self, task: u32) {
        self.note_lost(task);
        let count = self.tasks.get(task).held.len();
        self.count(task, |traffic| traffic.read_blocks += count as u64);
        if self.tasks.get(task).status != Status::Ok {
            self.release_held(task);
            return self.reply(task);
        }
        let task_ref = self.tasks.get_mut(task);
        task_ref.payload.clear();
        for at in 0..count {
            let page = match task_ref.held[at].held {
                Held::Buffer(_, page) => page,
                _ => PageId::NONE,
            };
            task_ref.payload.push(BlockRef { page, crc: 0 }).expect("as many as it holds");
        }
        task_ref.lends = true;
        self.reply(task);
    }

    /// The client has copied what was lent.
    pub(super) fn handle_release(&mut self, lease: OpId) {
        match self.end_op(lease) {
            Some(Op::Lease(task)) => {
                self.release_held(task);
                self.drop_passing(task);
                self.end_task(task);
            }
            Some(_) => panic!("release of something that is no lease"),
            None => {}
        }
    }

    /// Answers a change, or lets it wait for the store, with as many pages as it brought. If none
    /// can be had now, because all are pinned, it waits for them.
    pub(super) fn hand_back(&mut self, task: u32) {
        let volume = self.tasks.get(task).volume;
        let mut waits = self.awaits_commit(task);
        if waits && self.volumes[volume].gone {
            self.fail(task, Status::Gone);
            waits = false;
        }
        let owed = self.tasks.get(task).owed;
        let pages = owed == 0 || self.buffers.available() >= u32::from(owed);
        if !pages || waits && !self.has_waiter_room() {
            let mut owing = self.owing.take();
            self.tasks.push_back(&mut owing, task);
            self.owing = owing;
            return;
        }
        self.tasks.get_mut(task).payload.clear();
        for _ in 0..owed {
            let page = self.take_page(Hint::NEW).expect("counted above");
            let payload = &mut self.tasks.get_mut(task).payload;
            payload.push(BlockRef { page, crc: 0 }).expect("as many as it brought");
        }
        if waits {
            return self.wait_for_commit(task);
        }
        let state = &mut self.volumes[volume];
        state.acked_seq = state.acked_seq.max(self.tasks.get(task).seq);
        self.reply(task);
    }

    pub(super) fn retry_owing(&mut self) {
        let mut owing = self.owing.take();
        while let Some(task) = self.tasks.pop_front(&mut owing) {
            self.hand_back(task);
        }
    }

    /// Tries again what waits for room, oldest first, until one must go on waiting.
    pub(super) fn retry_stalled(&mut self) {
        while let Some(task) = self.stalled_reads.head() {
            self.tasks.pop_front(&mut self.stalled_reads);
            if !self.try_read(task) {
                self.tasks.push_front(&mut self.stalled_reads, task);
                break;
            }
        }
        while let Some(task) = self.stalled_writes.head() {
            self.tasks.pop_front(&mut self.stalled_writes);
            if self.try_change(task) {
                continue;
            }
            let since = self.tasks.get(task).since;
            let late = self.config.full_timeout.is_some_and(|limit| since + limit <= self.now);
            if late {
                self.drop_change(task, Status::Full);
                continue;
            }
            self.tasks.push_front(&mut self.stalled_writes, task);
            break;
        }
    }

    /// A status request: what is not known here is asked of the store.
    fn ask_status(&mut self, task: u32, first: u16, count: usize) {
        let onode = self.tasks.get(task).onode;
        let known = |block: u16| self.source(onode, block) != Source::Store;
        if (first..first + count as u16).all(known) {
            return self.answer_status(task, None);
        }
        let op = self.start_op(Op::Query(task));
        let volume = self.volumes[self.tasks.get(task).volume].id;
        let object = self.onodes.get(onode).object;
        self.emit(Output::Query { op, volume, object, first, count: count as u16 });
    }

    pub(super) fn handle_queried(&mut self, op: OpId, ok: bool, data: &[bool]) {
        let Some(Op::Query(task)) = self.end_op(op) else { return };
        if ok {
            self.answer_status(task, Some(data));
        } else {
            self.refuse(task, Status::Io);
        }
    }

    fn answer_status(&mut self, task: u32, store: Option<&[bool]>) {
        let (first, count) = span(&self.tasks.get(task).request());
        let onode = self.tasks.get(task).onode;
        self.tasks.get_mut(task).payload.clear();
        for index in 0..count {
            let hole = match self.source(onode, first + index as u16) {
                Source::Zero => true,
                Source::Store => !store.is_some_and(|store| store[index]),
                Source::Ram(_) | Source::Nvme(_) | Source::Lost => false,
            };
            let payload = &mut self.tasks.get_mut(task).payload;
            match payload.last_mut() {
                Some(last) if last.crc == u32::from(hole) => last.page.0 += 1,
                _ => payload
                    .push(BlockRef { page: PageId(1), crc: u32::from(hole) })
                    .expect("no more extents than blocks"),
            }
        }
        self.reply(task);
    }
}
