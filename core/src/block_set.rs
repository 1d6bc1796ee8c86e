//! A set of the blocks of one fetch.

use crate::limits::BATCH_BLOCKS_MAX;

/// Some of the blocks of a fetch or a batch, each by its distance from the first one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BlockSet([u64; BATCH_BLOCKS_MAX / 64]);

impl BlockSet {
    /// None.
    pub const EMPTY: Self = Self([0; BATCH_BLOCKS_MAX / 64]);

    /// Adds one.
    ///
    /// # Panics
    /// If no fetch has so many.
    pub fn insert(&mut self, at: usize) {
        self.0[at / 64] |= 1 << (at % 64);
    }

    /// Whether it is among them.
    #[must_use]
    pub fn contains(&self, at: usize) -> bool {
        self.0.get(at / 64).is_some_and(|word| word & 1 << (at % 64) != 0)
    }
}

const _: () = assert!(BATCH_BLOCKS_MAX.is_multiple_of(64));
