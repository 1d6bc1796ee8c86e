//! The names of things: every index is a type of its own, four bytes wide.

use core::fmt;

/// Bytes of one block: the unit of validity, dirtiness, checksum and RAM.
pub const BLOCK_BYTES: usize = 4096;
/// log2 of [`BLOCK_BYTES`].
pub const BLOCK_SHIFT: u32 = 12;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $int:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "#{}"), self.0)
            }
        }
    };
}

id!(
    /// One 4 KiB page of the arena. Whoever holds the number owns the page, or borrows it by a
    /// rule stated where the number was handed over. [`PageId::NONE`] stands for "no page".
    PageId, u32
);
id!(
    /// A volume's number in this cache: given out once, never used again, so that log entries of
    /// a deleted volume can never be taken for another's.
    VolumeId, u32
);
id!(
    /// A shard of the cache: fixed at format time.
    ShardId, u16
);
id!(
    /// A core of the appliance (its position in the list of cores, not the CPU number).
    CoreId, u16
);
id!(
    /// A cut through a volume's writes. The high 32 bits are the term (the number of the head by
    /// which this owner claimed the volume), the low 32 bits count push cycles inside the term, so
    /// epochs never repeat, whoever owns the volume.
    Epoch, u64
);

impl PageId {
    /// No page.
    pub const NONE: Self = Self(u32::MAX);

    /// Whether this names a page.
    #[must_use]
    pub const fn is_some(self) -> bool {
        self.0 != u32::MAX
    }
}

impl Epoch {
    /// Before every epoch of every owner.
    pub const ZERO: Self = Self(0);

    /// The first epoch of a term.
    #[must_use]
    pub const fn first_of_term(term: u32) -> Self {
        Self((term as u64) << 32 | 1)
    }

    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The term: the number of the head that claimed the volume.
    #[must_use]
    pub const fn term(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// 0 or 1: which of a leaf's two dirty masks this epoch uses. At most two epochs of a volume
    /// are uncommitted at a time, and they are neighbours.
    #[must_use]
    pub const fn parity(self) -> usize {
        (self.0 & 1) as usize
    }
}

/// An operation in flight. Slots are reused; the generation tells a late answer from a right one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct OpId {
    /// Slot in the table of operations.
    pub slot: u32,
    /// How often the slot was used before.
    pub generation: u32,
}

/// One block of a request: the arena page that holds it and the CRC32C of its 4096 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockRef {
    /// The page, or [`PageId::NONE`] for a block of zeroes (in replies).
    pub page: PageId,
    /// CRC32C of the block; meaningless for [`PageId::NONE`].
    pub crc: u32,
}

impl BlockRef {
    /// No page: a block of zeroes.
    pub const ZEROES: Self = Self { page: PageId::NONE, crc: 0 };
}

/// Computes CRC32C of `bytes`, continuing from `crc` (0 to start). Given by the platform, which
/// knows the processor's instructions; the core calls it for its own metadata only.
pub type Crc32c = fn(crc: u32, bytes: &[u8]) -> u32;

/// The shard that owns an object, in a cache of `shards` shards. Part of the on-disk format: a
/// change makes formatted caches unreadable.
///
/// The mixer is SplitMix64's finalizer (Steele, Lea, Flood: "Fast splittable pseudorandom number
/// generators", OOPSLA 2014).
#[must_use]
pub const fn shard_of(volume: VolumeId, object: u32, shards: u16) -> ShardId {
    let mut x = ((volume.0 as u64) << 32 | object as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ShardId(((x ^ (x >> 31)) % shards as u64) as u16)
}
