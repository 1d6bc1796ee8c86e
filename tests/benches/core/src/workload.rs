//! The accesses: made before any clock runs, the same for every subject and in every run.

/// Different keys of the Zipf workloads.
const KEYS: usize = 1_000_000;
const ZIPF_EXPONENT: f64 = 0.99;
/// Keys of the workloads that only hit.
const RESIDENT_KEYS: u64 = 4096;
/// A key's object is its number divided by this.
pub const OBJECT_BLOCKS: u64 = 1024;
/// heeler's leaves.
const LEAF_BLOCKS: usize = 16;
/// Entries of the large cache, at which bytes per entry are taken.
const ENTRIES: usize = 100_000;

/// What a cache has room for. The peers only know entries.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub entries: usize,
    /// Objects of which something is cached.
    pub objects: usize,
    /// Leaves of which something is cached, or was a short time ago.
    pub leaves: usize,
}

impl Room {
    /// For buffers and ghosts of as many entries as in zipf10, and next to nothing else.
    pub const BUFFERS: Self = Self { entries: ENTRIES, objects: 1, leaves: 1 };
    /// For a cache full of neighbours, and three times as many ghosts.
    pub const NEIGHBOURS: Self = Self {
        entries: ENTRIES,
        objects: 4 * ENTRIES / OBJECT_BLOCKS as usize + 4,
        leaves: 4 * ENTRIES / LEAF_BLOCKS + 4,
    };
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Kind {
    /// 4,096 keys that all fit, side by side, in random order
    Resident,
    /// The same with each key in an object of its own
    Spread,
    /// Zipf 0.99 over 1 M keys, 100 K entries
    Zipf10,
    /// The same with 10 K entries
    Zipf1,
    /// Zipf and 100 K entries, where every tenth access is the next of a sequence that never ends
    Scan,
}

impl Kind {
    pub const ALL: [Self; 5] =
        [Self::Resident, Self::Spread, Self::Zipf10, Self::Zipf1, Self::Scan];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Resident => "resident",
            Self::Spread => "spread",
            Self::Zipf10 => "zipf10",
            Self::Zipf1 => "zipf1",
            Self::Scan => "scan",
        }
    }

    /// The room that the cache has.
    pub const fn room(self) -> Room {
        // Room to spare for what only hits: some caches keep what was seen once to a part of
        // theirs.
        let resident = 2 * RESIDENT_KEYS as usize;
        let leaves = KEYS / LEAF_BLOCKS;
        let objects = KEYS / OBJECT_BLOCKS as usize + 1;
        match self {
            Self::Resident => Room { entries: resident, objects: 4096, leaves: 256 },
            Self::Spread => Room { entries: resident, objects: 4096, leaves: 4096 },
            Self::Zipf10 => Room { entries: ENTRIES, objects, leaves },
            Self::Zipf1 => Room { entries: KEYS / 100, objects, leaves },
            // Twice the cache of what passes through it: its ghosts, too.
            Self::Scan => Room {
                entries: ENTRIES,
                objects: 2 * objects,
                leaves: leaves + 2 * ENTRIES / LEAF_BLOCKS,
            },
        }
    }

    /// The keys of `accesses` accesses.
    pub fn keys(self, accesses: usize) -> Vec<u32> {
        let mut random = Random(1);
        match self {
            Self::Resident => (0..accesses).map(|_| random.below(RESIDENT_KEYS) as u32).collect(),
            Self::Spread => {
                let own: Vec<u32> = (0..RESIDENT_KEYS as u32)
                    .map(|i| (u64::from(i) * OBJECT_BLOCKS + random.below(OBJECT_BLOCKS)) as u32)
                    .collect();
                (0..accesses).map(|_| own[random.below(RESIDENT_KEYS) as usize]).collect()
            }
            Self::Zipf10 | Self::Zipf1 => zipf(accesses, &mut random),
            Self::Scan => {
                let mut keys = zipf(accesses, &mut random);
                for (i, key) in keys.iter_mut().enumerate().filter(|(i, _)| i % 10 == 9) {
                    *key = (KEYS + i / 10) as u32;
                }
                keys
            }
        }
    }
}

/// Keys by Zipf's law. Which key is how popular is shuffled, so that neighbours have nothing in
/// common: the worst case for a cache that keeps its records by neighbourhood.
fn zipf(accesses: usize, random: &mut Random) -> Vec<u32> {
    let mut keys: Vec<u32> = (0..KEYS as u32).collect();
    for i in (1..KEYS).rev() {
        keys.swap(i, random.below(i as u64 + 1) as usize);
    }
    let mut sum = 0.0;
    let sums: Vec<f64> = (1..=KEYS)
        .map(|rank| {
            sum += (rank as f64).powf(-ZIPF_EXPONENT);
            sum
        })
        .collect();
    let draw = |_| {
        let at = random.unit() * sum;
        keys[sums.partition_point(|sum| *sum <= at).min(KEYS - 1)]
    };
    (0..accesses).map(draw).collect()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// In 0..1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}
