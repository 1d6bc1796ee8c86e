//! Scrubs: finds what the log holds of a volume. Who wants it checked asks for it by
//! `RequestKind::Cache` with `Advice::BypassClean`, and then for what was found.

use super::Shard;
use crate::buffer::State;
use crate::counters::Scrubbed;
use crate::ids::VolumeId;
use crate::limits::{LEAF_BLOCKS, ONODE_LEAVES, REQUEST_BLOCKS_MAX};
use crate::onode::NIL;

/// Onodes that one call looks at.
const LOOK_SLICE: u32 = 256;

/// Where a scrub is. What is cached all the while it runs is found, unless the table of onodes is
/// packed meanwhile; what comes or goes may be found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ScrubAt {
    onode: u32,
    block: u16,
}

/// Neighbouring blocks that the log holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogRun {
    /// The object.
    pub object: u32,
    /// First block in the object.
    pub first: u16,
    /// Blocks: no more than a request has.
    pub count: u16,
}

/// What a look at some of the onodes gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scan {
    /// These are next.
    Run(LogRun),
    /// Nothing yet: look again.
    Later,
    /// There is no more.
    End,
}

impl Shard<'_> {
    /// The next blocks of a volume that lie in the log; `at` moves behind them.
    #[must_use]
    pub fn scan_log(&self, volume: VolumeId, at: &mut ScrubAt) -> Scan {
        for _ in 0..LOOK_SLICE {
            if at.onode >= self.onodes.slots() {
                return Scan::End;
            }
            if self.onodes.get(at.onode).volume == volume
                && let Some(run) = self.run_from(at.onode, at.block)
            {
                at.block = run.first + run.count;
                return Scan::Run(run);
            }
            *at = ScrubAt { onode: at.onode + 1, block: 0 };
        }
        Scan::Later
    }

    /// How far a scrub is: (done, of so much), in onodes.
    #[must_use]
    pub fn scrub_progress(&self, at: ScrubAt) -> (u32, u32) {
        (at.onode, self.onodes.slots())
    }

    /// What scrubs of a volume found since it was attached; `None` when it is not attached.
    #[must_use]
    pub fn volume_scrubbed(&self, volume: VolumeId) -> Option<Scrubbed> {
        self.volume_index(volume).map(|index| self.volumes[index].scrubbed)
    }

    pub(super) fn count_scrubbed(&mut self, fill: u32, onode: u32, add: impl Fn(&mut Scrubbed)) {
        if !self.fills.get(fill).scrub {
            return;
        }
        if let Some(volume) = self.volume_index(self.onodes.get(onode).volume) {
            add(&mut self.volumes[volume].scrubbed);
        }
    }

    /// A scrub found a clean block damaged in the log. If it is in RAM too, it comes from there.
    pub(super) fn repair(&mut self, onode: u32, leaf: u32, index: usize) {
        let buffer = self.onodes.ram(leaf, index);
        if !buffer.is_some() || self.buffers.state(buffer) != State::Clean {
            return;
        }
        self.admit(onode, leaf, index);
        let volume = self.volume_index(self.onodes.get(onode).volume);
        if self.onodes.leaf(leaf).nvme[index] != NIL
            && let Some(volume) = volume
        {
            self.volumes[volume].scrubbed.repaired_blocks += 1;
        }
    }

    fn run_from(&self, onode: u32, from: u16) -> Option<LogRun> {
        let in_log = |block: &u16| {
            let found = self.onodes.block(onode, *block);
            found.is_some_and(|(leaf, index)| self.onodes.leaf(leaf).nvme[index] != NIL)
        };
        let end = (ONODE_LEAVES * LEAF_BLOCKS) as u16;
        let first = (from..end).find(in_log)?;
        let most = end.min(first + REQUEST_BLOCKS_MAX as u16);
        let count = (first..most).take_while(in_log).count() as u16;
        Some(LogRun { object: self.onodes.get(onode).object, first, count })
    }
}
