//! Salvage: finds what is dirty of a volume that is gone. Who wants to save it asks for it by
//! `RequestKind::Read` with `Advice::Salvage`.

use super::Shard;
use crate::ids::VolumeId;
use crate::limits::REQUEST_BLOCKS_MAX;
use crate::onode::NIL;

/// Onodes that one call looks at.
const LOOK_SLICE: u32 = 32;

/// Where a search is. It goes from the last onode to the first, since packing moves onodes to lower
/// places only: what is dirty all the while it runs is found, some of it maybe twice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SalvageAt {
    /// Onodes that have not been looked at.
    left: u32,
    /// The next block of the last of them.
    block: u16,
}

impl Default for SalvageAt {
    /// The start.
    fn default() -> Self {
        Self { left: u32::MAX, block: 0 }
    }
}

/// What is to be had of dirty blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DirtyKind {
    /// Data.
    Data,
    /// They read as zeroes.
    Zero,
    /// Nothing: they were damaged on the device.
    Lost,
}

/// Neighbouring blocks that the store lacks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyRun {
    /// The object.
    pub object: u32,
    /// First block in the object.
    pub first: u16,
    /// Blocks; of data no more than a request has.
    pub count: u16,
    /// What they are.
    pub kind: DirtyKind,
}

/// What a look at some of the onodes gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DirtyScan {
    /// These are next.
    Run(DirtyRun),
    /// Nothing yet: look again.
    Later,
    /// There is no more.
    End,
}

impl Shard<'_> {
    /// The next dirty blocks of a volume; `at` moves behind them.
    #[must_use]
    pub fn scan_dirty(&self, volume: VolumeId, at: &mut SalvageAt) -> DirtyScan {
        let Some(index) = self.volume_index(volume) else { return DirtyScan::End };
        at.left = at.left.min(self.onodes.slots());
        for _ in 0..LOOK_SLICE {
            let Some(onode) = at.left.checked_sub(1) else { return DirtyScan::End };
            if self.onodes.get(onode).volume == volume
                && let Some(run) = self.dirty_run(index, onode, at.block)
            {
                at.block = run.first + run.count;
                return DirtyScan::Run(run);
            }
            *at = SalvageAt { left: onode, block: 0 };
        }
        DirtyScan::Later
    }

    fn dirty_run(&self, volume: usize, onode: u32, from: u16) -> Option<DirtyRun> {
        let object = self.onodes.get(onode).object;
        let end = self.volumes[volume].blocks_of(object) as u16;
        let (first, kind) =
            (from..end).find_map(|block| Some((block, self.dirty_kind(onode, block)?)))?;
        let most = match kind {
            DirtyKind::Data => end.min(first + REQUEST_BLOCKS_MAX as u16),
            DirtyKind::Zero | DirtyKind::Lost => end,
        };
        let same = |block: &u16| self.dirty_kind(onode, *block) == Some(kind);
        let count = (first..most).take_while(same).count() as u16;
        Some(DirtyRun { object, first, count, kind })
    }

    /// What is to be had of a block, if it is dirty.
    fn dirty_kind(&self, onode: u32, block: u16) -> Option<DirtyKind> {
        let hole = self.onodes.get(onode).hole_dirty != [false; 2];
        let hole = hole.then_some(DirtyKind::Zero);
        let Some((leaf, index)) = self.onodes.block(onode, block) else { return hole };
        let (slot, bit) = (self.onodes.leaf(leaf), 1u16 << index);
        if slot.bad & bit != 0 {
            return Some(DirtyKind::Lost);
        }
        let dirty = (slot.dirty[0] | slot.dirty[1]) & bit != 0;
        let zero = slot.zero & bit != 0;
        match (dirty, zero) {
            (true, true) => Some(DirtyKind::Zero),
            (true, false) => Some(DirtyKind::Data),
            // What is known of the block is clean, unless only the object's hole is known of it.
            (false, true) => None,
            (false, false) if slot.nvme[index] != NIL => None,
            (false, false) => hole,
        }
    }
}
