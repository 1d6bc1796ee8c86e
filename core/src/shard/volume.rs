//! What a shard knows of a volume.

use super::task::Fifo;
use crate::counters::{Scrubbed, Traffic};
use crate::event::{Advice, Buffering, Mode};
use crate::ids::{Epoch, VolumeId};
use crate::onode::NIL;

/// Where a volume is in its push cycle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// No epoch is closed.
    Idle,
    /// Closed here; other shards may not have closed it: acknowledgements are held.
    Closing,
    /// Closed everywhere; waits until the log is durable up to `close_seq`.
    Closed,
    /// Batches go out.
    Pushing,
    /// All batches are out; waits for the commit.
    Pushed,
    /// Committed: dirty marks are being cleared, a slice at a time.
    Cleaning,
}

/// Where gathering is in the list of closed dirty onodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Cursor {
    pub(crate) onode: u32,
    pub(crate) block: u16,
}

#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) id: VolumeId,
    pub(crate) object_blocks: u32,
    pub(crate) blocks: u64,
    /// Clients may use so many of the blocks.
    pub(crate) limit: u64,
    pub(crate) open: Epoch,
    pub(crate) committed: Epoch,
    pub(crate) phase: Phase,
    /// Another owner has it: nothing is served.
    pub(crate) gone: bool,
    /// To be forgotten as soon as no task uses it.
    pub(crate) forget: bool,
    /// Tasks that use it.
    pub(crate) tasks: u32,
    /// Dirty blocks of each parity.
    pub(crate) dirty: [u64; 2],
    /// First onode of the list of dirty onodes of each parity.
    pub(crate) dirty_list: [u32; 2],
    /// The log must be durable up to here before the closed epoch is pushed.
    pub(crate) close_seq: u64,
    pub(crate) cursor: Cursor,
    /// Some blocks were passed over because they were being moved: go through the list again.
    pub(crate) again: bool,
    /// The list is gone through for the first time: discarded objects are told of now.
    pub(crate) first_pass: bool,
    /// Batches that the keeper has not stored.
    pub(crate) batches: u32,
    /// Push tasks that wait for the device.
    pub(crate) gathering: u32,
    /// The open epoch has dirty blocks.
    pub(crate) dirtied: bool,
    /// The keeper knows that.
    pub(crate) told: bool,
    /// The keeper has been asked to commit the open epoch.
    pub(crate) synced: bool,
    /// The keeper knows that the open epoch fills a pack.
    pub(crate) grown: bool,
    /// The keeper has been asked to hurry.
    pub(crate) pressed: bool,
    /// Writes whose acknowledgement waits until every shard has closed the epoch.
    pub(crate) held: Fifo,
    /// When changes are answered, and what is kept.
    pub(crate) mode: Mode,
    /// Changes that wait for the store without a task.
    pub(crate) waiters: u32,
    /// Those that came before the mode was changed are in records below this number.
    pub(crate) waiters_seq: u64,
    /// All changes that were answered from RAM are in records below this number.
    pub(crate) ram_seq: u64,
    /// All changes that were answered before the store had them are in records below this number.
    pub(crate) acked_seq: u64,
    /// The device did not take a record of it. The next FLUSH says so, for the changes that were
    /// answered before.
    pub(crate) failed: bool,
    /// What stays in RAM when a request says nothing else.
    pub(crate) buffering: Buffering,
    /// What clients used.
    pub(crate) traffic: Traffic,
    /// What scrubs found.
    pub(crate) scrubbed: Scrubbed,
}

impl Volume {
    pub(crate) fn new(
        id: VolumeId,
        object_shift: u8,
        blocks: u64,
        open: Epoch,
        committed: Epoch,
    ) -> Self {
        Self {
            id,
            object_blocks: 1 << (object_shift as u32 - crate::ids::BLOCK_SHIFT),
            blocks,
            limit: blocks,
            open,
            committed,
            phase: Phase::Idle,
            gone: false,
            forget: false,
            tasks: 0,
            dirty: [0; 2],
            dirty_list: [NIL; 2],
            close_seq: 0,
            cursor: Cursor { onode: NIL, block: 0 },
            again: false,
            first_pass: true,
            batches: 0,
            gathering: 0,
            dirtied: false,
            told: false,
            synced: false,
            grown: false,
            pressed: false,
            held: Fifo::new(),
            mode: Mode::default(),
            waiters: 0,
            waiters_seq: 0,
            ram_seq: 0,
            acked_seq: 0,
            failed: false,
            buffering: Buffering::default(),
            traffic: Traffic::default(),
            scrubbed: Scrubbed::default(),
        }
    }

    /// The parity of the closed, uncommitted epoch, if there is one.
    pub(crate) fn closed_parity(&self) -> Option<usize> {
        (self.phase != Phase::Idle).then(|| self.open.parity() ^ 1)
    }

    /// The closed epoch.
    pub(crate) const fn closed(&self) -> Epoch {
        Epoch(self.open.0 - 1)
    }

    /// Blocks of an object: the last one of a volume may be short.
    pub(crate) fn blocks_of(&self, object: u32) -> u32 {
        self.blocks_within(object, self.blocks)
    }

    /// Blocks of an object that a request may name.
    pub(crate) fn blocks_for(&self, object: u32, advice: Advice) -> u32 {
        self.blocks_within(object, if advice == Advice::Cut { self.blocks } else { self.limit })
    }

    fn blocks_within(&self, object: u32, end: u64) -> u32 {
        let start = u64::from(object) * u64::from(self.object_blocks);
        end.saturating_sub(start).min(u64::from(self.object_blocks)) as u32
    }
}
