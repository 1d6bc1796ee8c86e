//! The steps of a story, and how bytes tell them.

use heeler_core::limits::LEAF_BLOCKS;
use heeler_core::policy::{Level, Policy};

use super::place::{OBJECT_BLOCKS, OBJECTS};

/// Pages of the largest table.
pub(crate) const PAGES_MAX: usize = 24;

/// One step of a story.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    /// A request that is done at once. What is not there comes in by demand.
    Access {
        first: usize,
        count: usize,
        write: bool,
        level: Level,
    },
    /// Of what is clean, one block is written where it is.
    Rewrite(usize),
    /// Begins to fill a block that is not in RAM.
    Fill(usize),
    /// Of what has a page, one block is read again into a buffer that nobody refers to.
    Private(usize),
    /// Begins to write a block.
    Write(usize),
    /// Of what is under way, one thing ends well.
    Finish(usize, Level),
    /// Of what is under way, one thing ends; a fill has failed, and its buffer is dropped.
    Fail(usize),
    /// Of what has a page, one buffer is pinned.
    Pin(usize),
    /// Of all pins, one is taken back.
    Unpin(usize),
    Discard {
        first: usize,
        count: usize,
    },
    /// Gives so many pages away, evicting for them, and counts on having them back.
    Lend(u32),
    /// So many pages come back, or come from elsewhere for a time.
    Return(u32),
    /// Has so many pages less from now on.
    Shrink(u32),
    /// Has so many pages more from now on.
    Grow(u32),
    Switch(Policy),
    /// Evicts so many buffers at most.
    Trim(u32),
    PinOnode(usize),
    UnpinOnode(usize),
    EvictOnode,
    /// Seconds pass.
    Wait(u32),
    /// Drops so many ghosts at most, if there are too many.
    DropGhosts(u32),
    /// Of what is clean and not pinned, one block moves to another page.
    Move(usize),
    /// Gives one free page away for good, by its place.
    Vacate(usize),
    /// From now on, onodes and leaves should take so many units.
    Limit(u32),
    /// Packs so many places of their tables.
    Pack(u32),
}

/// The bytes of a story; zeroes after their end.
pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

impl Bytes<'_> {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        usize::from(*first) % bound
    }

    fn block(&mut self) -> usize {
        self.below(OBJECTS) * OBJECT_BLOCKS + self.below(OBJECT_BLOCKS)
    }

    /// First block, number of blocks: within one object, without the gap before its last leaf.
    fn range(&mut self) -> (usize, usize) {
        let first = self.block();
        let within = first % OBJECT_BLOCKS;
        let gap = OBJECT_BLOCKS - LEAF_BLOCKS;
        let end = if within < gap { gap } else { OBJECT_BLOCKS };
        (first, (1 + self.below(2 * LEAF_BLOCKS)).min(end - within))
    }

    pub(crate) fn policy(&mut self) -> Policy {
        Policy::ALL[self.below(Policy::ALL.len())]
    }

    fn level(&mut self) -> Level {
        if self.below(4) == 0 { Level::Low } else { Level::High }
    }

    pub(crate) fn op(&mut self) -> Op {
        match self.below(48) {
            0..8 => {
                let (first, count) = self.range();
                Op::Access { first, count, write: self.below(4) == 0, level: self.level() }
            }
            8..12 => Op::Fill(self.block()),
            12..16 => Op::Write(self.block()),
            16..22 => Op::Finish(self.below(256), self.level()),
            22 => Op::Fail(self.below(256)),
            23 => Op::Rewrite(self.below(256)),
            24 | 25 => Op::Pin(self.below(256)),
            26 | 27 => Op::Unpin(self.below(256)),
            28 => {
                let (first, count) = self.range();
                Op::Discard { first, count }
            }
            29 => Op::Lend(1 + self.below(PAGES_MAX) as u32),
            30 => Op::Return(1 + self.below(PAGES_MAX) as u32),
            31 => Op::Shrink(1 + self.below(PAGES_MAX) as u32),
            32 => Op::Grow(1 + self.below(PAGES_MAX) as u32),
            33 => Op::Vacate(self.below(256)),
            34 => Op::Move(self.below(256)),
            35 => Op::Switch(self.policy()),
            36 => Op::Trim(1 + self.below(8) as u32),
            37 => Op::DropGhosts(1 + self.below(8) as u32),
            38 => Op::PinOnode(self.below(OBJECTS)),
            39 => Op::UnpinOnode(self.below(256)),
            40 => Op::EvictOnode,
            41 => Op::Limit(self.below(32) as u32),
            42 => Op::Pack(1 + self.below(8) as u32),
            43 => Op::Private(self.below(256)),
            // Numbers that are free mean this.
            _ => Op::Wait([1, 2, 10, 200, 1500][self.below(5)]),
        }
    }
}

/// Tells the story if it ends badly.
#[derive(Default)]
pub(crate) struct Told(pub(crate) Vec<Op>);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the story:");
            self.0.iter().for_each(|op| eprintln!("{op:?}"));
        }
    }
}
