//! The record of heat in a region of the cache device: which blocks are in RAM, which were there a
//! short time ago, and what the policy has learned. Byte-exact description: FORMAT.md.
//!
//! It is advice: it names blocks, and no data. So its pages are written without a flush, each
//! stands for itself, and one that is damaged or of another record is passed over.

use super::bytes::{get_u16, get_u32, get_u64, get_uuid, put};
use crate::budget::Target;
use crate::ids::{BLOCK_BYTES, Crc32c, VolumeId};
use crate::limits::{LEAF_BLOCKS, OBJECT_BLOCKS_MAX, ONODE_LEAVES};
use crate::policy::Mark;

/// "HEELHEAT"
pub const HEAT_MAGIC: u64 = u64::from_le_bytes(*b"HEELHEAT");
/// Version of a page.
pub const HEAT_VERSION: u32 = 1;
/// The pages behind the head that hold what was learned.
pub const LEARNED_PAGES: u32 = 3;
/// The first page of the buffers.
pub const BUFFERS_AT: u32 = 1 + LEARNED_PAGES;
/// Kinds of buffers that the policy tells apart.
pub const KINDS: usize = 32;
/// Classes of age that it tells apart.
pub const AGES: usize = 16;

const CONTENT: usize = 64;
const KINDS_OF_PAGE: usize = 11;
const KIND_BYTES: usize = 2 * AGES * 8;
const LEAF_HEAD: usize = 14;
const GHOST_HEAD: usize = 12;
const OBJECT_HEAD: usize = 16;
const MARK_BYTES: usize = 4;
const RECORD_BYTES_MAX: usize = OBJECT_HEAD + 2 * ONODE_LEAVES;

const _: () = assert!(RECORD_BYTES_MAX >= LEAF_HEAD + LEAF_BLOCKS * MARK_BYTES);
const _: () = assert!(KINDS.div_ceil(KINDS_OF_PAGE) == LEARNED_PAGES as usize);
const _: () = assert!(CONTENT + KINDS_OF_PAGE * KIND_BYTES <= BLOCK_BYTES);

/// What the pages of a record hold, in their order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// The record's first page, written last.
    Head = 1,
    /// What the policy has counted.
    Learned,
    /// Leaves with buffers, the hottest first.
    Buffers,
    /// Ghosts, the oldest first.
    Ghosts,
    /// Which blocks in the log were read since reclaim passed.
    Referenced,
}

/// What every page begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageHead {
    /// The region.
    pub region: [u8; 16],
    /// Of the record: grows by one with each.
    pub generation: u64,
    /// Which page of the record.
    pub page: u32,
    /// What it holds.
    pub part: Part,
    /// How many of them.
    pub records: u16,
}

impl PageHead {
    /// Completes a page whose content is in place.
    pub fn seal(&self, page: &mut [u8], crc32c: Crc32c) {
        page[..CONTENT].fill(0);
        put(page, 0, &HEAT_MAGIC.to_le_bytes());
        put(page, 8, &HEAT_VERSION.to_le_bytes());
        put(page, 16, &self.region);
        put(page, 32, &self.generation.to_le_bytes());
        put(page, 40, &self.page.to_le_bytes());
        put(page, 44, &[self.part as u8]);
        put(page, 46, &self.records.to_le_bytes());
        let crc = crc32c(0, page);
        put(page, 12, &crc.to_le_bytes());
    }

    /// Reads it; `None`: it is no page of heat, or a damaged one.
    #[must_use]
    pub fn open(page: &[u8], crc32c: Crc32c) -> Option<Self> {
        if page.len() != BLOCK_BYTES
            || get_u64(page, 0) != HEAT_MAGIC
            || get_u32(page, 8) != HEAT_VERSION
        {
            return None;
        }
        let crc = crc32c(crc32c(crc32c(0, &page[..12]), &[0; 4]), &page[16..]);
        if crc != get_u32(page, 12) {
            return None;
        }
        let parts = [Part::Head, Part::Learned, Part::Buffers, Part::Ghosts, Part::Referenced];
        Some(Self {
            region: get_uuid(page, 16),
            generation: get_u64(page, 32),
            page: get_u32(page, 40),
            part: parts.into_iter().find(|part| *part as u8 == page[44])?,
            records: get_u16(page, 46),
        })
    }
}

/// The policy's time, and what else it needs to go on with what it has learned.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Clock {
    /// The time.
    pub now: u16,
    /// The index from which on buffers are passed over.
    pub threshold: u32,
    /// New blocks that move time on.
    pub new_allowed: u32,
}

/// The first page of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RecordHead {
    /// Pages of the record.
    pub pages: u32,
    /// The first page of ghosts.
    pub ghosts_at: u32,
    /// The first page of what was referenced.
    pub referenced_at: u32,
    /// The policy's time.
    pub clock: Clock,
    /// What the shard might have of the memory.
    pub share: Target,
}

impl RecordHead {
    /// Writes it into a page that is then to be sealed.
    pub fn encode(&self, page: &mut [u8]) {
        page.fill(0);
        put(page, CONTENT, &self.pages.to_le_bytes());
        put(page, CONTENT + 4, &self.ghosts_at.to_le_bytes());
        put(page, CONTENT + 8, &self.referenced_at.to_le_bytes());
        put(page, CONTENT + 12, &self.clock.now.to_le_bytes());
        put(page, CONTENT + 16, &self.clock.threshold.to_le_bytes());
        put(page, CONTENT + 20, &self.clock.new_allowed.to_le_bytes());
        put(page, CONTENT + 24, &self.share.pages.to_le_bytes());
        put(page, CONTENT + 28, &self.share.meta_units.to_le_bytes());
    }

    /// Reads the head of a record of at most `pages_max` pages.
    #[must_use]
    pub fn decode(page: &[u8], pages_max: u32) -> Option<Self> {
        let head = Self {
            pages: get_u32(page, CONTENT),
            ghosts_at: get_u32(page, CONTENT + 4),
            referenced_at: get_u32(page, CONTENT + 8),
            clock: Clock {
                now: get_u16(page, CONTENT + 12),
                threshold: get_u32(page, CONTENT + 16),
                new_allowed: get_u32(page, CONTENT + 20),
            },
            share: Target {
                pages: get_u32(page, CONTENT + 24),
                meta_units: get_u32(page, CONTENT + 28),
            },
        };
        let bounds = [BUFFERS_AT, head.ghosts_at, head.referenced_at, head.pages, pages_max];
        bounds.is_sorted().then_some(head)
    }

    /// Reads the first page of a copy of a region's record, and its generation. `None`: there is no
    /// record in this copy, or a damaged one.
    #[must_use]
    pub fn open(
        page: &[u8],
        region: [u8; 16],
        pages_max: u32,
        crc32c: Crc32c,
    ) -> Option<(u64, Self)> {
        let head = PageHead::open(page, crc32c)?;
        let is_first = head.region == region && head.part == Part::Head && head.page == 0;
        let record = Self::decode(page, pages_max).filter(|_| is_first)?;
        Some((head.generation, record))
    }
}

/// What was counted of one kind, by age: how many came back, and how many were given up.
pub type KindCounts = [[u64; AGES]; 2];

/// The kinds that a page of what was learned holds: page 1 of a record is the first.
#[must_use]
pub fn kinds_of_page(page: u32) -> core::ops::Range<usize> {
    let first = (page as usize).saturating_sub(1).saturating_mul(KINDS_OF_PAGE).min(KINDS);
    first..(first + KINDS_OF_PAGE).min(KINDS)
}

/// Writes the `at`th kind of a page.
pub fn encode_kind(page: &mut [u8], at: usize, counts: &KindCounts) {
    for (index, count) in counts.iter().flatten().enumerate() {
        put(page, CONTENT + at * KIND_BYTES + index * 8, &count.to_le_bytes());
    }
}

/// Reads the `at`th kind of a page; `at` is below the length of [`kinds_of_page`].
#[must_use]
pub fn decode_kind(page: &[u8], at: usize) -> KindCounts {
    let start = CONTENT + at * KIND_BYTES;
    let count = |row: usize, age: usize| get_u64(page, start + (row * AGES + age) * 8);
    core::array::from_fn(|row| core::array::from_fn(|age| count(row, age)))
}

/// Sixteen neighbouring blocks of which some are in RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeafHeat {
    /// The volume.
    pub volume: VolumeId,
    /// The object.
    pub object: u32,
    /// The first of the blocks, a multiple of 16.
    pub first: u16,
    /// Those in RAM.
    pub buffers: u16,
    /// Of these, those on warm_in; the others are on hot.
    pub warm: u16,
    /// What is remembered of those in RAM.
    pub marks: [Mark; LEAF_BLOCKS],
}

/// A block that was in RAM a short time ago.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GhostHeat {
    /// The volume.
    pub volume: VolumeId,
    /// The object.
    pub object: u32,
    /// The block in the object.
    pub block: u16,
    /// What is remembered of it.
    pub mark: Mark,
}

/// Which blocks of an object were read since reclaim passed, by leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ObjectHeat {
    /// The volume.
    pub volume: VolumeId,
    /// The object.
    pub object: u32,
    /// A mask for each leaf.
    pub referenced: [u16; ONODE_LEAVES],
}

/// Fills a page with records of one part.
#[derive(Clone, Copy, Debug)]
pub struct PageWriter {
    at: usize,
    records: u16,
    /// Where the last run of ghosts begins, and the ghost that would continue it.
    run: Option<(usize, VolumeId, u32, u16)>,
}

impl PageWriter {
    /// Nothing is in the page yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { at: CONTENT, records: 0, run: None }
    }

    /// Records in the page.
    #[must_use]
    pub const fn records(&self) -> u16 {
        self.records
    }

    /// Whether there is room for any one record more.
    #[must_use]
    pub const fn has_room(&self) -> bool {
        self.at + RECORD_BYTES_MAX <= BLOCK_BYTES
    }

    /// Takes room for a record; `None`: there is none.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let at = self.at;
        (at + bytes <= BLOCK_BYTES).then(|| {
            self.at += bytes;
            at
        })
    }

    /// Appends a leaf; `false`: it does not fit.
    pub fn push_leaf(&mut self, page: &mut [u8], leaf: &LeafHeat) -> bool {
        let marks = leaf.buffers.count_ones() as usize;
        let Some(at) = self.take(LEAF_HEAD + marks * MARK_BYTES) else { return false };
        put(page, at, &leaf.volume.0.to_le_bytes());
        put(page, at + 4, &leaf.object.to_le_bytes());
        put(page, at + 8, &leaf.first.to_le_bytes());
        put(page, at + 10, &leaf.buffers.to_le_bytes());
        put(page, at + 12, &leaf.warm.to_le_bytes());
        let resident = (0..LEAF_BLOCKS).filter(|index| leaf.buffers & 1 << index != 0);
        for (slot, index) in resident.enumerate() {
            put(page, at + LEAF_HEAD + slot * MARK_BYTES, &leaf.marks[index].to_bytes());
        }
        self.records += 1;
        true
    }

    /// Appends a ghost; `false`: it does not fit.
    pub fn push_ghost(&mut self, page: &mut [u8], ghost: &GhostHeat) -> bool {
        let GhostHeat { volume, object, block, mark } = *ghost;
        let joins = self.run.filter(|(_, v, o, next)| (*v, *o, *next) == (volume, object, block));
        let run = match joins {
            Some((run, ..)) => {
                let Some(at) = self.take(MARK_BYTES) else { return false };
                put(page, run + 10, &(get_u16(page, run + 10) + 1).to_le_bytes());
                put(page, at, &mark.to_bytes());
                run
            }
            None => {
                let Some(at) = self.take(GHOST_HEAD + MARK_BYTES) else { return false };
                put(page, at, &volume.0.to_le_bytes());
                put(page, at + 4, &object.to_le_bytes());
                put(page, at + 8, &block.to_le_bytes());
                put(page, at + 10, &1u16.to_le_bytes());
                put(page, at + GHOST_HEAD, &mark.to_bytes());
                self.records += 1;
                at
            }
        };
        self.run = Some((run, volume, object, block + 1));
        true
    }

    /// Appends an object; `false`: it does not fit.
    pub fn push_object(&mut self, page: &mut [u8], object: &ObjectHeat) -> bool {
        let named = || object.referenced.iter().enumerate().filter(|(_, mask)| **mask != 0);
        let Some(at) = self.take(OBJECT_HEAD + named().count() * 2) else { return false };
        let leaves = named().fold(0u64, |leaves, (leaf, _)| leaves | 1 << leaf);
        put(page, at, &object.volume.0.to_le_bytes());
        put(page, at + 4, &object.object.to_le_bytes());
        put(page, at + 8, &leaves.to_le_bytes());
        for (slot, (_, mask)) in named().enumerate() {
            put(page, at + OBJECT_HEAD + slot * 2, &mask.to_le_bytes());
        }
        self.records += 1;
        true
    }
}

impl Default for PageWriter {
    fn default() -> Self {
        Self::new()
    }
}

/// Takes the records of one part out of a page, one by one. What does not fit the page ends it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageReader {
    at: usize,
    records: u16,
    /// Of the run of ghosts under way: the next one, and how many follow.
    run: (VolumeId, u32, u16, u16),
}

impl PageReader {
    /// At the first of so many records.
    #[must_use]
    pub const fn new(records: u16) -> Self {
        Self { at: CONTENT, records, run: (VolumeId(0), 0, 0, 0) }
    }

    /// Nothing to read.
    pub const EMPTY: Self = Self::new(0);

    /// The bytes of the next piece of a record; `None`: there are no more.
    fn take<'p>(&mut self, page: &'p [u8], bytes: usize) -> Option<&'p [u8]> {
        let piece = page.get(self.at..self.at + bytes);
        self.at += bytes;
        if piece.is_none() {
            *self = Self::EMPTY;
        }
        piece
    }

    fn begin<'p>(&mut self, page: &'p [u8], bytes: usize) -> Option<&'p [u8]> {
        self.records = self.records.checked_sub(1)?;
        self.take(page, bytes)
    }

    /// The next leaf.
    pub fn next_leaf(&mut self, page: &[u8]) -> Option<LeafHeat> {
        let head = self.begin(page, LEAF_HEAD)?;
        let buffers = get_u16(head, 10);
        let mut marks = [Mark::NEW; LEAF_BLOCKS];
        for index in (0..LEAF_BLOCKS).filter(|index| buffers & 1 << index != 0) {
            marks[index] = Mark::from_bytes(get_u32(self.take(page, MARK_BYTES)?, 0));
        }
        Some(LeafHeat {
            volume: VolumeId(get_u32(head, 0)),
            object: get_u32(head, 4),
            first: get_u16(head, 8) % OBJECT_BLOCKS_MAX as u16 / 16 * 16,
            buffers,
            warm: get_u16(head, 12) & buffers,
            marks,
        })
    }

    /// The next ghost.
    pub fn next_ghost(&mut self, page: &[u8]) -> Option<GhostHeat> {
        if self.run.3 == 0 {
            let head = self.begin(page, GHOST_HEAD)?;
            let block = get_u16(head, 8) % OBJECT_BLOCKS_MAX as u16;
            self.run = (VolumeId(get_u32(head, 0)), get_u32(head, 4), block, get_u16(head, 10));
        }
        let (volume, object, block, left) = self.run;
        if left == 0 || usize::from(block) == OBJECT_BLOCKS_MAX {
            *self = Self::EMPTY;
            return None;
        }
        let mark = Mark::from_bytes(get_u32(self.take(page, MARK_BYTES)?, 0));
        self.run = (volume, object, block + 1, left - 1);
        Some(GhostHeat { volume, object, block, mark })
    }

    /// The next object.
    pub fn next_object(&mut self, page: &[u8]) -> Option<ObjectHeat> {
        let head = self.begin(page, OBJECT_HEAD)?;
        let leaves = get_u64(head, 8);
        let mut referenced = [0; ONODE_LEAVES];
        for leaf in (0..ONODE_LEAVES).filter(|leaf| leaves & 1 << leaf != 0) {
            referenced[leaf] = get_u16(self.take(page, 2)?, 0);
        }
        Some(ObjectHeat {
            volume: VolumeId(get_u32(head, 0)),
            object: get_u32(head, 4),
            referenced,
        })
    }
}

#[cfg(test)]
mod tests;
