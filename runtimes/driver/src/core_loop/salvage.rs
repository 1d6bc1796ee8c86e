//! Salvage: dirty blocks of volumes that are gone, on their way to whoever wants to save them.

use std::collections::VecDeque;

use heeler_core::event::{Advice, Reply, Request, RequestKind, Status};
use heeler_core::ids::{BLOCK_BYTES, VolumeId};
use heeler_core::shard::{DirtyRun, DirtyScan, SalvageAt};
use heeler_hw::{BlockQueue, PAGE_BYTES};

use super::{Answer, CoreLoop};
use crate::mail::ToControl;

/// The id of a salvage's requests: no connection has it.
pub(super) const SALVAGE_ID: u64 = u64::MAX - 1;
/// Runs in one answer at most.
const RUNS_MAX: usize = 256;

/// What is to be read in one shard, one after the other, so that clients hardly notice.
#[derive(Debug, Default)]
pub(super) struct Saves {
    queue: VecDeque<(u64, Request)>,
    /// The first one has been handed in.
    waiting: bool,
}

impl Saves {
    pub(super) fn push(&mut self, ticket: u64, volume: VolumeId, run: DirtyRun) {
        let request = Request {
            id: SALVAGE_ID,
            kind: RequestKind::Read,
            fua: false,
            advice: Advice::Salvage,
            volume,
            object: run.object,
            offset: u32::from(run.first) * BLOCK_BYTES as u32,
            len: u32::from(run.count) * BLOCK_BYTES as u32,
        };
        self.queue.push_back((ticket, request));
    }

    /// What to ask for now.
    fn next(&mut self) -> Option<Request> {
        if self.waiting {
            return None;
        }
        let (_, request) = self.queue.front()?;
        self.waiting = true;
        Some(*request)
    }

    /// The first one has been answered.
    fn end(&mut self) -> u64 {
        self.waiting = false;
        self.queue.pop_front().expect("a salvage's requests are answered once").0
    }
}

impl<Q: BlockQueue> CoreLoop<'_, Q> {
    /// Answers with what a bounded look at the shard finds.
    pub(super) fn list_dirty(
        &mut self,
        host: usize,
        volume: VolumeId,
        mut at: SalvageAt,
        ticket: u64,
    ) {
        let shard = &self.hosts[host].shard;
        let mut runs = Vec::new();
        let next = loop {
            if runs.len() == RUNS_MAX {
                break Some(at);
            }
            match shard.scan_dirty(volume, &mut at) {
                DirtyScan::Run(run) => runs.push(run),
                DirtyScan::Later => break Some(at),
                DirtyScan::End => break None,
            }
        };
        self.post.send_to_control(ToControl::Dirty { ticket, runs, next });
    }

    /// Goes on with what is to be saved; true if something was asked for.
    pub(super) fn step_saves(&mut self, at: usize) -> bool {
        let Some(request) = self.hosts[at].saves.next() else { return false };
        self.ask(at, request, &[]);
        true
    }

    /// Copies what was read out of the arena.
    pub(super) fn saved(&mut self, at: usize, reply: Reply) {
        let bytes = (reply.status == Status::Ok).then(|| {
            let blocks = self.hosts[at].shard.reply_blocks();
            let mut bytes = vec![0; blocks.len() * PAGE_BYTES];
            for (block, to) in blocks.iter().zip(bytes.chunks_exact_mut(PAGE_BYTES)) {
                if block.page.is_some() {
                    self.arena.with(block.page, |from| to.copy_from_slice(from));
                }
            }
            bytes
        });
        if let Some(lease) = reply.lease {
            self.answers.push_back(Answer::Release(lease));
        }
        let ticket = self.hosts[at].saves.end();
        self.post.send_to_control(ToControl::Salvaged { ticket, bytes });
    }

    /// Tells of volumes that no session uses any more.
    pub(super) fn report_closed(&mut self) {
        while let Some(ticket) = self.front.poll_closed() {
            self.post.send_to_control(ToControl::Closed { ticket });
        }
    }
}
