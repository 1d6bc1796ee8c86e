//! A scrub of a volume in one shard: one request after the other, until the shard knows of no more.

use heeler_core::event::{Advice, Request, RequestKind};
use heeler_core::ids::{BLOCK_BYTES, VolumeId};
use heeler_core::shard::{LogRun, Scan, ScrubAt, Shard};

/// The id of a scrub's requests: no connection has it.
pub(crate) const SCRUB_ID: u64 = u64::MAX;

/// See the module. One request is under way at a time, so clients hardly notice.
#[derive(Debug)]
pub(crate) struct Scrub {
    pub(crate) volume: VolumeId,
    pub(crate) at: ScrubAt,
    /// Its request has not been answered.
    waiting: bool,
}

/// What a scrub does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Nothing before its request is answered.
    Wait,
    /// It looks on in the next turn.
    Later,
    /// It asks for this.
    Ask(Request),
    /// It is done.
    End,
}

impl Scrub {
    pub(crate) fn new(volume: VolumeId) -> Self {
        Self { volume, at: ScrubAt::default(), waiting: false }
    }

    pub(crate) fn answered(&mut self) {
        self.waiting = false;
    }

    pub(crate) fn step(&mut self, shard: &Shard<'_>) -> Step {
        if self.waiting {
            return Step::Wait;
        }
        match shard.scan_log(self.volume, &mut self.at) {
            Scan::Later => Step::Later,
            Scan::End => Step::End,
            Scan::Run(run) => {
                self.waiting = true;
                Step::Ask(request(self.volume, run))
            }
        }
    }
}

fn request(volume: VolumeId, run: LogRun) -> Request {
    let LogRun { object, first, count } = run;
    Request {
        id: SCRUB_ID,
        kind: RequestKind::Cache,
        fua: false,
        advice: Advice::BypassClean,
        volume,
        object,
        offset: u32::from(first) * BLOCK_BYTES as u32,
        len: u32::from(count) * BLOCK_BYTES as u32,
    }
}
