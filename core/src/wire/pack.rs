//! A pack: data blocks of many objects, written by one put. It says itself what its blocks are,
//! so that a lost map can be rebuilt.
//!
//! ```text
//! 0   magic         "HEELPACK"
//! 8   version       u32 = 1
//! 12  crc           u32, CRC32C of bytes 16 to the end of the header pages
//! 16  volume        16 bytes
//! 32  epoch         u64
//! 40  n             u32
//! 44  header pages  u32, as many 4 KiB pages as the header needs
//! 48  runs          u32
//! 52  blocks        u32
//! 56  0             u64
//! 64  runs          8 bytes each: object u32, first block u16, blocks u16
//!     block CRCs    u32 each
//!     zeroes        to a multiple of 4096
//! header pages * 4096: the blocks, in the order of the runs
//! ```

use alloc::vec::Vec;

use super::frame::{self, FRAME_BYTES, FormatError};
use super::names::Uuid;
use crate::ids::{BLOCK_BYTES, Crc32c, Epoch};
use crate::limits::{OBJECT_BLOCKS_MAX, PACK_BLOCKS_MAX};

/// Header pages of a pack at most: every block a run of its own.
pub const HEADER_PAGES_MAX: u16 = header_pages(PACK_BLOCKS_MAX, PACK_BLOCKS_MAX);

/// Consecutive blocks of a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The object.
    pub object: u32,
    /// First block in the object.
    pub first: u16,
    /// Blocks, at least 1.
    pub count: u16,
}

/// The header of a pack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Whose blocks.
    pub volume: Uuid,
    /// The push they belong to.
    pub epoch: Epoch,
    /// Which pack of that push.
    pub n: u32,
    /// What the blocks are, in order.
    pub runs: Vec<Run>,
    /// CRC32C of each block; 1 to [`PACK_BLOCKS_MAX`].
    pub crcs: Vec<u32>,
}

impl Header {
    /// Pages before the first block.
    #[must_use]
    pub fn pages(&self) -> u16 {
        header_pages(self.runs.len(), self.crcs.len())
    }

    /// The header's bytes, a whole number of pages: the blocks follow.
    #[must_use]
    pub fn encode(&self, crc32c: Crc32c) -> Vec<u8> {
        let blocks: usize = self.runs.iter().map(|run| usize::from(run.count)).sum();
        assert_eq!(blocks, self.crcs.len(), "a pack has a CRC for each block of its runs");
        assert!((1..=PACK_BLOCKS_MAX).contains(&blocks), "a pack has 1 to 2048 blocks");
        let pages = self.pages();
        let mut bytes = frame::begin(MAGIC, VERSION);
        bytes.reserve_exact(usize::from(pages) * BLOCK_BYTES - bytes.len());
        bytes.extend_from_slice(&self.volume.0);
        bytes.extend_from_slice(&self.epoch.0.to_le_bytes());
        for field in [self.n, pages.into(), self.runs.len() as u32, blocks as u32, 0, 0] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        for run in &self.runs {
            bytes.extend_from_slice(&run.object.to_le_bytes());
            bytes.extend_from_slice(&run.first.to_le_bytes());
            bytes.extend_from_slice(&run.count.to_le_bytes());
        }
        for crc in &self.crcs {
            bytes.extend_from_slice(&crc.to_le_bytes());
        }
        bytes.resize(usize::from(pages) * BLOCK_BYTES, 0);
        frame::seal(&mut bytes, crc32c);
        bytes
    }

    /// How many header pages a pack has, from its first [`FIXED_BYTES`] bytes (not yet covered by
    /// a check of the CRC, but bounded).
    pub fn peek_pages(bytes: &[u8]) -> Result<u16, FormatError> {
        let mut reader = frame::open(bytes, MAGIC, VERSION)?;
        reader.slice(28)?;
        match reader.u32()? {
            pages @ 1.. if pages <= HEADER_PAGES_MAX.into() => Ok(pages as u16),
            _ => reader.bad(4, "number of header pages"),
        }
    }

    /// Reads a header; `bytes` may go on with the blocks.
    pub fn decode(bytes: &[u8], crc32c: Crc32c) -> Result<Self, FormatError> {
        let pages = Self::peek_pages(bytes)?;
        let len = usize::from(pages) * BLOCK_BYTES;
        let bytes = bytes.get(..len).ok_or(FormatError::Short { at: bytes.len() })?;
        frame::check(bytes, crc32c)?;
        let mut reader = frame::open(bytes, MAGIC, VERSION)?;
        let volume = Uuid(reader.take()?);
        let epoch = Epoch(reader.u64()?);
        let n = reader.u32()?;
        reader.u32()?;
        let run_count = reader.u32()? as usize;
        let blocks = reader.u32()? as usize;
        if !(1..=PACK_BLOCKS_MAX).contains(&blocks) {
            return reader.bad(4, "number of blocks");
        }
        if !(1..=blocks).contains(&run_count) || header_pages(run_count, blocks) != pages {
            return reader.bad(8, "number of runs");
        }
        if reader.u64()? != 0 {
            return reader.bad(8, "reserved field");
        }
        let mut runs = Vec::with_capacity(run_count);
        let mut seen = 0;
        for _ in 0..run_count {
            let run = Run { object: reader.u32()?, first: reader.u16()?, count: reader.u16()? };
            seen += usize::from(run.count);
            let end = usize::from(run.first) + usize::from(run.count);
            if run.count == 0 || end > OBJECT_BLOCKS_MAX || seen > blocks {
                return reader.bad(8, "run");
            }
            runs.push(run);
        }
        if seen != blocks {
            return reader.bad(8, "run");
        }
        let crcs = (0..blocks).map(|_| reader.u32()).collect::<Result<_, _>>()?;
        if reader.slice(len - reader.at())?.iter().any(|&byte| byte != 0) {
            return Err(FormatError::Trailing { at: FIXED_BYTES + run_count * 8 + blocks * 4 });
        }
        Ok(Self { volume, epoch, n, runs, crcs })
    }
}

/// Pages that the header of a pack with so many runs and blocks takes.
#[must_use]
pub const fn header_pages(runs: usize, blocks: usize) -> u16 {
    (FIXED_BYTES + runs * 8 + blocks * 4).div_ceil(BLOCK_BYTES) as u16
}

/// Bytes before the runs.
pub const FIXED_BYTES: usize = FRAME_BYTES + 48;
const MAGIC: [u8; 8] = *b"HEELPACK";
const VERSION: u32 = 1;

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::wire::frame::tests::{crc32c, reseal};

    fn sample(runs: u16) -> Header {
        Header {
            volume: Uuid([7; 16]),
            epoch: Epoch(0x1_0000_0005),
            n: 3,
            runs: (0..runs)
                .map(|i| Run { object: i.into(), first: i % 1000, count: 1 + i % 3 })
                .collect(),
            crcs: (0..runs).flat_map(|i| vec![u32::from(i) * 77; usize::from(1 + i % 3)]).collect(),
        }
    }

    #[test]
    fn comes_back() {
        for runs in [1, 2, 300, 1000] {
            let header = sample(runs);
            let mut bytes = header.encode(crc32c);
            assert_eq!(bytes.len(), usize::from(header.pages()) * BLOCK_BYTES);
            assert_eq!(Header::peek_pages(&bytes[..FIXED_BYTES]), Ok(header.pages()));
            assert_eq!(Header::decode(&bytes, crc32c).as_ref(), Ok(&header));
            bytes.extend_from_slice(&[0xaa; 5000]);
            assert_eq!(Header::decode(&bytes, crc32c), Ok(header), "blocks follow");
        }
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let bytes = sample(3).encode(crc32c);
        for at in (0..200).chain(4000..4096) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            assert!(Header::decode(&bytes, crc32c).is_err(), "byte {at}");
        }
    }

    #[test]
    fn bad_fields_are_named() {
        let good = sample(3).encode(crc32c);
        let cases: [(usize, u32, FormatError); 6] = [
            (0, 0, FormatError::Magic),
            (8, 2, FormatError::Version(2)),
            (44, 0, FormatError::Field { at: 44, what: "number of header pages" }),
            (44, 8, FormatError::Field { at: 44, what: "number of header pages" }),
            (52, 7, FormatError::Field { at: 64 + 16, what: "run" }),
            (48, u32::MAX, FormatError::Field { at: 48, what: "number of runs" }),
        ];
        for (at, value, error) in cases {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            reseal(&mut bytes);
            assert_eq!(Header::decode(&bytes, crc32c), Err(error));
        }
        assert_eq!(Header::decode(&good[..4095], crc32c), Err(FormatError::Short { at: 4095 }));
        assert_eq!(Header::decode(&[], crc32c), Err(FormatError::Short { at: 0 }));
    }
}
