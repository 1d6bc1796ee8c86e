//! Cuts: what lies behind the end that a volume is about to have is discarded, through the shards
//! as clients do it, so that nothing of it is left in RAM, in the log, or in the next image.

use std::collections::VecDeque;
use std::ops::Range;

use heeler_core::event::{Advice, Request, RequestKind, Status};
use heeler_core::ids::{BLOCK_BYTES, ShardId, VolumeId, shard_of};
use heeler_hw::BlockQueue;

use super::CoreLoop;
use crate::mail::ToControl;

/// The id of a cut's requests: no connection has it.
pub(super) const CUT_ID: u64 = u64::MAX - 2;
/// Requests of a cut under way in one shard at most. Where changes wait for the store, so many
/// share a commit.
const REQUESTS_MAX: u32 = 64;
/// Objects that one look passes over at most.
const LOOK_MAX: u32 = 4096;

/// The cuts of one shard, one after the other.
#[derive(Debug, Default)]
pub(super) struct Cuts {
    queue: VecDeque<Cut>,
}

#[derive(Debug)]
struct Cut {
    volume: VolumeId,
    object_blocks: u32,
    /// What has not been asked for.
    left: Range<u64>,
    /// Requests without an answer.
    waiting: u32,
    failed: bool,
    ticket: u64,
}

/// What a cut does next.
#[derive(Debug)]
enum Step {
    /// Nothing before a request is answered.
    Wait,
    /// It looks on in the next round.
    Later,
    /// It asks for this.
    Ask(Request),
    /// It is done.
    End,
}

impl Cuts {
    pub(super) fn push(
        &mut self,
        volume: VolumeId,
        object_blocks: u32,
        blocks: Range<u64>,
        ticket: u64,
    ) {
        let (waiting, failed) = (0, false);
        self.queue.push_back(Cut { volume, object_blocks, left: blocks, waiting, failed, ticket });
    }

    /// A request of the first one has been answered.
    pub(super) fn answered(&mut self, status: Status) {
        let cut = self.queue.front_mut().expect("a cut ends after its last request");
        cut.waiting -= 1;
        cut.failed |= status != Status::Ok;
    }
}

impl Cut {
    fn step(&mut self, shard: ShardId, shards: u16) -> Step {
        if self.failed {
            self.left.start = self.left.end;
        }
        if self.left.is_empty() {
            return if self.waiting == 0 { Step::End } else { Step::Wait };
        }
        if self.waiting == REQUESTS_MAX {
            return Step::Wait;
        }
        let object_blocks = u64::from(self.object_blocks);
        for _ in 0..LOOK_MAX {
            let from = self.left.start;
            let (object, first) = ((from / object_blocks) as u32, from % object_blocks);
            let end = (from - first + object_blocks).min(self.left.end);
            self.left.start = end;
            if shard_of(self.volume, object, shards) == shard {
                self.waiting += 1;
                return Step::Ask(self.request(object, first, end - from));
            }
            if self.left.is_empty() {
                break;
            }
        }
        Step::Later
    }

    fn request(&self, object: u32, first: u64, blocks: u64) -> Request {
        Request {
            id: CUT_ID,
            kind: RequestKind::Discard,
            fua: false,
            advice: Advice::Cut,
            volume: self.volume,
            object,
            offset: first as u32 * BLOCK_BYTES as u32,
            len: blocks as u32 * BLOCK_BYTES as u32,
        }
    }
}

impl<Q: BlockQueue> CoreLoop<'_, Q> {
    /// Goes on with a shard's cut; true if it has something to do in the next round.
    pub(super) fn step_cuts(&mut self, at: usize) -> bool {
        let (shards, host) = (self.shards, &mut self.hosts[at]);
        let Some(cut) = host.cuts.queue.front_mut() else { return false };
        match cut.step(host.id, shards) {
            Step::Wait => return false,
            Step::Later => {}
            Step::Ask(request) => self.ask(at, request, &[]),
            Step::End => {
                let (ticket, done) = (cut.ticket, !cut.failed);
                host.cuts.queue.pop_front();
                self.post.send_to_control(ToControl::Cut { ticket, done });
            }
        }
        true
    }
}
