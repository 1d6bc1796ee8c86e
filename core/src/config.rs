//! What a shard is built with.

use crate::ids::Crc32c;
use crate::list::Link;
use crate::policy::Policy;
use crate::recovery::RegionLayout;
use crate::time::Duration;

/// The settings of one shard. Sizes are derived from them once; nothing grows later.
#[derive(Clone, Copy, Debug)]
pub struct ShardConfig {
    /// Its region of the cache device.
    pub layout: RegionLayout,
    /// Objects it can know at once.
    pub onodes: usize,
    /// Leaves (64 KiB each) it can know at once.
    pub leaves: usize,
    /// Requests and internal tasks under way at most.
    pub tasks: usize,
    /// Pages that requests may have handed over at once.
    pub adopted_max: usize,
    /// Pages behind the log for two copies of the record of heat; 0: none is kept.
    pub heat_pages: u32,
    /// Time between two records of heat at least.
    pub heat_every: Duration,
    /// Which buffers to drop first.
    pub policy: Policy,
    /// Dirty share of the region, in percent: from here on the keeper is asked to push.
    pub dirty_low_percent: u32,
    /// From here on writers are slowed.
    pub dirty_high_percent: u32,
    /// From here on writers wait.
    pub dirty_hard_percent: u32,
    /// How long a writer waits for space before it is told that there is none; `None`: for ever.
    pub full_timeout: Option<Duration>,
    /// Checksum of the core's own structures.
    pub crc32c: Crc32c,
}

impl ShardConfig {
    /// Defaults for a region: a leaf for every four blocks of it (random 4 KiB writes use one leaf
    /// for few blocks), an onode for every eight leaves.
    #[must_use]
    pub fn for_region(layout: RegionLayout, crc32c: Crc32c) -> Self {
        let blocks = layout.segment_pages as usize * layout.segments as usize;
        let leaves = (blocks / 4).max(1024);
        Self {
            layout,
            onodes: (leaves / 8).max(256),
            leaves,
            tasks: 256,
            adopted_max: 4096,
            heat_pages: 0,
            heat_every: Duration::from_secs(5),
            policy: Policy::default(),
            dirty_low_percent: 20,
            dirty_high_percent: 40,
            dirty_hard_percent: 55,
            full_timeout: None,
            crc32c,
        }
    }

    /// Bytes of the tables that a shard takes whatever its share of memory is: what is where in its
    /// region, and how onodes are found.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        let blocks = u64::from(self.layout.segment_pages) * u64::from(self.layout.segments);
        let onodes = self.onodes as u64;
        let word = size_of::<u32>() as u64;
        blocks * word + onodes.next_power_of_two() * word + onodes * size_of::<Link>() as u64
    }
}
