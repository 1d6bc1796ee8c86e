//! Fills: reads of the device or the store into buffers, one for all who wait for the same blocks.

use alloc::boxed::Box;

use super::task::Fifo;
use crate::buffer::{BlockAddr, BufferId};
use crate::ids::PageId;
use crate::limits::BATCH_BLOCKS_MAX;
use crate::onode::NIL;
use crate::policy::Level;

/// Fills under way at most.
pub(crate) const FILLS_MAX: usize = 64;

/// One block of a fill.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FillBlock {
    pub(crate) addr: BlockAddr,
    pub(crate) buffer: BufferId,
    /// The onode, pinned once for the block.
    pub(crate) onode: u32,
    /// CRC32C that the device must give; meaningless for a fetch.
    pub(crate) crc: u32,
}

impl FillBlock {
    /// Stands for a block that is not fetched with those around it.
    pub(crate) const GAP: Self =
        Self { addr: BlockAddr(NIL), buffer: BufferId(NIL), onode: NIL, crc: 0 };

    pub(crate) fn is_gap(&self) -> bool {
        self.onode == NIL
    }
}

#[derive(Debug)]
pub(crate) struct Fill {
    /// First page in the region, or [`NIL`] for a fetch from the store.
    pub(crate) at: u32,
    /// One for each block; that of a gap is none.
    pub(crate) pages: heapless::Vec<PageId, BATCH_BLOCKS_MAX>,
    pub(crate) blocks: heapless::Vec<FillBlock, BATCH_BLOCKS_MAX>,
    pub(crate) waiters: Fifo,
    pub(crate) level: Level,
    /// Put what came into the log too.
    pub(crate) admit: bool,
    /// It is for a scrub.
    pub(crate) scrub: bool,
    /// It brings back what was in RAM before a restart.
    pub(crate) warms: bool,
    /// It is for a push: nobody else waits for it.
    pub(crate) push: bool,
    next: u32,
}

impl Fill {
    /// Leaves out a block between those that are fetched.
    pub(crate) fn add_gap(&mut self) {
        self.pages.push(PageId::NONE).expect("a fill is no larger than a batch");
        self.blocks.push(FillBlock::GAP).expect("a fill is no larger than a batch");
    }
}

#[derive(Debug)]
pub(crate) struct Fills {
    slots: Box<[Fill]>,
    free: u32,
    used: usize,
}

impl Fills {
    pub(crate) fn new() -> Self {
        let next = |index: usize| if index + 1 == FILLS_MAX { NIL } else { index as u32 + 1 };
        let fill = |index| Fill {
            at: NIL,
            pages: heapless::Vec::new(),
            blocks: heapless::Vec::new(),
            waiters: Fifo::new(),
            level: Level::High,
            admit: false,
            scrub: false,
            warms: false,
            push: false,
            next: next(index),
        };
        Self { slots: (0..FILLS_MAX).map(fill).collect(), free: 0, used: 0 }
    }

    pub(crate) fn free(&self) -> usize {
        FILLS_MAX - self.used
    }

    pub(crate) fn get(&self, fill: u32) -> &Fill {
        &self.slots[fill as usize]
    }

    pub(crate) fn get_mut(&mut self, fill: u32) -> &mut Fill {
        &mut self.slots[fill as usize]
    }

    pub(crate) fn start(&mut self, at: u32, level: Level) -> Option<u32> {
        let index = self.free;
        if index == NIL {
            return None;
        }
        let fill = self.get_mut(index);
        let free = fill.next;
        fill.at = at;
        fill.level = level;
        fill.admit = false;
        fill.scrub = false;
        fill.warms = false;
        fill.push = false;
        fill.pages.clear();
        fill.blocks.clear();
        self.free = free;
        self.used += 1;
        Some(index)
    }

    pub(crate) fn end(&mut self, index: u32) {
        let free = self.free;
        let fill = self.get_mut(index);
        debug_assert!(fill.waiters.is_empty());
        fill.next = free;
        self.free = index;
        self.used -= 1;
    }
}
