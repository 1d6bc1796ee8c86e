//! The cache device's own pages: superblock, volume table, region superblocks. Byte-exact
//! description: FORMAT.md.

use super::bytes::{get_u16, get_u32, get_u64, get_uuid, put};
use crate::ids::{BLOCK_BYTES, Crc32c, VolumeId};
use crate::limits::{SHARDS_MAX, VOLUMES_MAX};

/// "HEELCACH"
pub const CACHE_MAGIC: u64 = u64::from_le_bytes(*b"HEELCACH");
/// "HEELVOLS"
pub const TABLE_MAGIC: u64 = u64::from_le_bytes(*b"HEELVOLS");
/// Version of the superblock, and so of the cache device's layout.
pub const CACHE_VERSION: u32 = 2;
/// Version of the volume table.
pub const TABLE_VERSION: u32 = 1;
/// Pages of the superblock's two copies.
pub const SUPERBLOCK_PAGES: [u32; 2] = [0, 1];
/// Pages of the volume table's two copies.
pub const TABLE_PAGES: [u32; 2] = [2, 3];
/// First page of the first region.
pub const REGIONS_PAGE: u32 = 16;
/// Pages of the smallest segment (256 KiB).
pub const SEGMENT_PAGES_MIN: u32 = 64;
/// Pages of the largest segment (8 MiB).
pub const SEGMENT_PAGES_MAX: u32 = 2048;
/// Segments of a region at least.
pub const SEGMENTS_MIN: u32 = 16;
/// Of a region, the part that is for its record of heat...
const HEAT_PART: u64 = 128;
/// ... but at least so many pages (1 MiB).
pub const HEAT_PAGES_MIN: u32 = 256;

/// What a formatted cache device looks like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// The cache's identity.
    pub cache: [u8; 16],
    /// Shard regions.
    pub shards: u16,
    /// Pages of one segment.
    pub segment_pages: u32,
    /// Segments of one region.
    pub segments: u32,
    /// Pages behind the segments of a region, for two copies of its record of heat.
    pub heat_pages: u32,
}

/// Why a cache device is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SuperblockError {
    /// No magic: not a heeler cache.
    Magic,
    /// Another format version.
    Version(u32),
    /// Damaged.
    Checksum,
    /// Numbers that make no sense together.
    Geometry,
}

impl Superblock {
    /// Lays out a device of `bytes` in `shards` regions. `None` when it is too small.
    #[must_use]
    pub fn layout(cache: [u8; 16], shards: u16, bytes: u64) -> Option<Self> {
        let pages = (bytes / BLOCK_BYTES as u64).checked_sub(u64::from(REGIONS_PAGE))?;
        // Pages of a region are numbered with four bytes: more than 16 TiB would lie idle.
        let region = (pages / u64::from(shards)).min(u64::from(u32::MAX));
        let heat_pages = ((region / HEAT_PART) as u32).next_multiple_of(2).max(HEAT_PAGES_MIN);
        let log = region.checked_sub(u64::from(heat_pages))?;
        let wanted = (log / 32).next_power_of_two().min(u64::from(SEGMENT_PAGES_MAX)) as u32;
        let segment_pages = wanted.max(SEGMENT_PAGES_MIN);
        let segments = u32::try_from(log / u64::from(segment_pages)).ok()?;
        let fits = segments >= SEGMENTS_MIN;
        fits.then_some(Self { cache, shards, segment_pages, segments, heat_pages })
    }

    /// Bytes that a cache of `shards` regions has at least.
    #[must_use]
    pub const fn bytes_min(shards: u16) -> u64 {
        let region = SEGMENTS_MIN * SEGMENT_PAGES_MIN + HEAT_PAGES_MIN;
        (REGIONS_PAGE as u64 + shards as u64 * region as u64) * BLOCK_BYTES as u64
    }

    /// Pages of one region's log.
    #[must_use]
    pub const fn log_pages(&self) -> u32 {
        self.segment_pages * self.segments
    }

    /// Pages of one region: its log, then its record of heat.
    #[must_use]
    pub const fn region_pages(&self) -> u32 {
        self.log_pages() + self.heat_pages
    }

    /// First page of a shard's region.
    #[must_use]
    pub const fn region_page(&self, shard: u16) -> u64 {
        REGIONS_PAGE as u64 + shard as u64 * self.region_pages() as u64
    }

    /// Bytes that the device must have.
    #[must_use]
    pub const fn device_bytes(&self) -> u64 {
        self.region_page(self.shards) * BLOCK_BYTES as u64
    }

    /// The identity of a shard's region: the cache's, with the shard's number mixed in.
    #[must_use]
    pub fn region_id(&self, shard: u16) -> [u8; 16] {
        let mut id = self.cache;
        for (byte, mix) in id[14..].iter_mut().zip(shard.to_le_bytes()) {
            *byte ^= mix;
        }
        id
    }

    /// Writes the superblock into a page.
    pub fn encode(&self, page: &mut [u8], crc32c: Crc32c) {
        page.fill(0);
        put(page, 0, &CACHE_MAGIC.to_le_bytes());
        put(page, 8, &CACHE_VERSION.to_le_bytes());
        put(page, 16, &self.cache);
        put(page, 32, &self.shards.to_le_bytes());
        put(page, 36, &self.segment_pages.to_le_bytes());
        put(page, 40, &self.segments.to_le_bytes());
        put(page, 44, &self.heat_pages.to_le_bytes());
        let crc = crc32c(0, page);
        put(page, 12, &crc.to_le_bytes());
    }

    /// Reads a superblock.
    pub fn decode(page: &[u8], crc32c: Crc32c) -> Result<Self, SuperblockError> {
        check_page(page, CACHE_MAGIC, CACHE_VERSION, crc32c)?;
        let superblock = Self {
            cache: get_uuid(page, 16),
            shards: get_u16(page, 32),
            segment_pages: get_u32(page, 36),
            segments: get_u32(page, 40),
            heat_pages: get_u32(page, 44),
        };
        let log_pages = superblock.segment_pages.checked_mul(superblock.segments);
        let pages = log_pages.and_then(|pages| pages.checked_add(superblock.heat_pages));
        let sound = (1..=SHARDS_MAX).contains(&usize::from(superblock.shards))
            && (SEGMENT_PAGES_MIN..=SEGMENT_PAGES_MAX).contains(&superblock.segment_pages)
            && superblock.segment_pages.is_power_of_two()
            && superblock.segments >= SEGMENTS_MIN
            && superblock.heat_pages >= HEAT_PAGES_MIN
            && superblock.heat_pages.is_multiple_of(2)
            && pages.is_some();
        if sound { Ok(superblock) } else { Err(SuperblockError::Geometry) }
    }
}

fn check_page(page: &[u8], magic: u64, known: u32, crc32c: Crc32c) -> Result<(), SuperblockError> {
    if page.len() < BLOCK_BYTES || get_u64(page, 0) != magic {
        return Err(SuperblockError::Magic);
    }
    let version = get_u32(page, 8);
    if version != known {
        return Err(SuperblockError::Version(version));
    }
    let crc = crc32c(crc32c(crc32c(0, &page[..12]), &[0; 4]), &page[16..BLOCK_BYTES]);
    if crc == get_u32(page, 12) { Ok(()) } else { Err(SuperblockError::Checksum) }
}

/// One volume that the cache knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeRow {
    /// Its number in the log.
    pub number: VolumeId,
    /// The volume was given back with everything pushed: nothing of it is dirty here.
    pub released: bool,
    /// Its identity in the store.
    pub uuid: [u8; 16],
    /// The nonce of our last claim.
    pub nonce: [u8; 16],
    /// The nonce of a claim that was being made.
    pub pending: [u8; 16],
}

/// The volume table: which volume numbers in the log mean which volume, and by which claim we
/// hold it. A number without a row is a volume that is no longer ours.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VolumeTable {
    /// Grows with every write; the copy with the higher one counts.
    pub generation: u64,
    /// The next number to give out.
    pub next_number: u32,
    /// The volumes, at most [`VOLUMES_MAX`].
    pub rows: alloc::vec::Vec<VolumeRow>,
}

const ROW_BYTES: usize = 64;

impl VolumeTable {
    /// Writes the table into a page.
    pub fn encode(&self, page: &mut [u8], crc32c: Crc32c) {
        assert!(self.rows.len() <= VOLUMES_MAX);
        page.fill(0);
        put(page, 0, &TABLE_MAGIC.to_le_bytes());
        put(page, 8, &TABLE_VERSION.to_le_bytes());
        put(page, 16, &self.generation.to_le_bytes());
        put(page, 24, &self.next_number.to_le_bytes());
        put(page, 28, &(self.rows.len() as u32).to_le_bytes());
        for (index, row) in self.rows.iter().enumerate() {
            let at = (index + 1) * ROW_BYTES;
            put(page, at, &row.number.0.to_le_bytes());
            put(page, at + 4, &[u8::from(row.released)]);
            put(page, at + 8, &row.uuid);
            put(page, at + 24, &row.nonce);
            put(page, at + 40, &row.pending);
        }
        let crc = crc32c(0, page);
        put(page, 12, &crc.to_le_bytes());
    }

    /// Reads a table.
    pub fn decode(page: &[u8], crc32c: Crc32c) -> Result<Self, SuperblockError> {
        check_page(page, TABLE_MAGIC, TABLE_VERSION, crc32c)?;
        let count = get_u32(page, 28) as usize;
        if count > VOLUMES_MAX {
            return Err(SuperblockError::Geometry);
        }
        let rows = (1..=count).map(|index| {
            let row = &page[index * ROW_BYTES..];
            VolumeRow {
                number: VolumeId(get_u32(row, 0)),
                released: row[4] != 0,
                uuid: get_uuid(row, 8),
                nonce: get_uuid(row, 24),
                pending: get_uuid(row, 40),
            }
        });
        Ok(Self {
            generation: get_u64(page, 16),
            next_number: get_u32(page, 24),
            rows: rows.collect(),
        })
    }
}

#[cfg(test)]
mod tests;
