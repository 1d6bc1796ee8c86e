//! Counts that only grow, and by how much they grew between two times.

use crate::{buffer, onode, shard};

/// A set of counts, all of which only grow.
pub trait Counts: Copy + Default {
    /// The set of `f` of each count of this set and the same one of `other`.
    #[must_use]
    fn zip(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self;

    /// What was counted since the counts were `earlier`.
    #[must_use]
    fn since(self, earlier: Self) -> Self {
        self.zip(earlier, |now, then| now - then)
    }

    /// What was counted here and there.
    #[must_use]
    fn plus(self, other: Self) -> Self {
        self.zip(other, |here, there| here + there)
    }
}

/// Says that a struct is a set of counts. It must name every field: a literal has to be complete.
macro_rules! counts {
    ($of:path { $($field:ident),* $(,)? }) => {
        impl Counts for $of {
            fn zip(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
                Self { $($field: f(self.$field, other.$field)),* }
            }
        }
    };
}

/// Blocks that clients used, by where they were. A block has 4 KiB.
///
/// What requests needed is `ram + zero + nvme + store`: what they read, what NBD_CMD_CACHE asked
/// for, and the old content of blocks that were written in part.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// Read by clients.
    pub read_blocks: u64,
    /// Needed, and in RAM or already on the way there.
    pub ram_blocks: u64,
    /// Needed, and known to be zeroes.
    pub zero_blocks: u64,
    /// Needed, and read from NVMe.
    pub nvme_blocks: u64,
    /// Needed, and fetched from the store.
    pub store_blocks: u64,
    /// Fetched from the store, readahead included.
    pub fetched_blocks: u64,
    /// Written by clients.
    pub written_blocks: u64,
}

counts!(Traffic {
    read_blocks,
    ram_blocks,
    zero_blocks,
    nvme_blocks,
    store_blocks,
    fetched_blocks,
    written_blocks,
});

/// What scrubs of a volume found in the log: the reads with
/// [`Advice::BypassClean`](crate::event::Advice).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Scrubbed {
    /// Read, and as they should be.
    pub sound_blocks: u64,
    /// Not to be read, or damaged.
    pub damaged_blocks: u64,
    /// Of these: there again, from RAM or the store.
    pub repaired_blocks: u64,
}

counts!(Scrubbed { sound_blocks, damaged_blocks, repaired_blocks });

counts!(shard::ShardCounters {
    records,
    flushes,
    pushed_blocks,
    moved_blocks,
    dropped_blocks,
    resized_blocks,
    onode_evicted_blocks,
    discarded_blocks,
    purged_blocks,
    warmed_blocks,
    heat_records,
    heat_pages,
    device_errors,
    damaged_blocks,
    lost_blocks,
    stale_answers,
});

counts!(buffer::Counters { hits, misses, evictions, young_evictions, promotions });

counts!(onode::OnodeCounters { hits, misses, evictions });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_and_sums_are_taken_field_by_field() {
        let then = Traffic { read_blocks: 1, written_blocks: 5, ..Traffic::default() };
        let now = Traffic { read_blocks: 4, ram_blocks: 2, written_blocks: 5, ..then };
        let since = Traffic { read_blocks: 3, ram_blocks: 2, ..Traffic::default() };
        assert_eq!(now.since(then), since);
        assert_eq!(then.plus(since), now);
    }
}
