//! A pack: data blocks of many objects, written by one put. It says itself what its blocks are,
//! so the packs of the newest pushes are the map of what they hold.
//!
//! ```text
//! 0   magic         "HEELPACK"
//! 8   version       u32 = 2
//! 12  crc           u32, CRC32C of bytes 16 to the end of the header
//! 16  volume        16 bytes
//! 32  epoch         u64
//! 40  n             u32
//! 44  header bytes  u32, 64 + 8 * runs + 4 * blocks
//! 48  runs          u32
//! 52  blocks        u32, of the runs that are not zeroes
//! 56  0             u64
//! 64  runs          8 bytes each: object u32, first block u16, blocks u16 (+ 32768: zeroes)
//!     block CRCs    u32 each
//!     the blocks, in the order of the runs; runs of zeroes have none
//! ```

use alloc::vec::Vec;

use super::frame::{self, FRAME_BYTES, FormatError};
use super::names::Uuid;
use crate::ids::{Crc32c, Epoch};
use crate::limits::{OBJECT_BLOCKS_MAX, PACK_BLOCKS_MAX, PACK_RUNS_MAX};

/// Bytes of a pack's header at most.
pub const HEADER_BYTES_MAX: u16 = header_bytes(PACK_RUNS_MAX, PACK_BLOCKS_MAX);

/// From here on the packs of an epoch are copies that garbage collection made of the image as of
/// that epoch; below, the packs of the push.
pub const FIRST_COPY: u32 = 1 << 31;

/// Consecutive blocks of a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The object.
    pub object: u32,
    /// First block in the object.
    pub first: u16,
    /// Blocks, at least 1.
    pub count: u16,
    /// They read as zeroes, and the pack has no data for them.
    pub zero: bool,
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
    /// What the blocks are, in order; 1 to [`PACK_RUNS_MAX`].
    pub runs: Vec<Run>,
    /// CRC32C of each data block; at most [`PACK_BLOCKS_MAX`].
    pub crcs: Vec<u32>,
}

impl Header {
    /// Bytes before the first block.
    #[must_use]
    pub fn bytes(&self) -> u16 {
        header_bytes(self.runs.len(), self.crcs.len())
    }

    /// The header: the blocks follow.
    #[must_use]
    pub fn encode(&self, crc32c: Crc32c) -> Vec<u8> {
        let data = self.runs.iter().filter(|run| !run.zero);
        let blocks: usize = data.map(|run| usize::from(run.count)).sum();
        assert_eq!(blocks, self.crcs.len(), "a pack has a CRC for each block of its runs");
        assert!(blocks <= PACK_BLOCKS_MAX, "a pack has at most 2048 blocks");
        assert!((1..=PACK_RUNS_MAX).contains(&self.runs.len()), "a pack has 1 to 4096 runs");
        let header = self.bytes();
        let mut bytes = frame::begin(MAGIC, VERSION);
        bytes.reserve_exact(usize::from(header) - bytes.len());
        bytes.extend_from_slice(&self.volume.0);
        bytes.extend_from_slice(&self.epoch.0.to_le_bytes());
        for field in [self.n, header.into(), self.runs.len() as u32, blocks as u32, 0, 0] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        for run in &self.runs {
            let count = run.count | if run.zero { ZERO_BIT } else { 0 };
            bytes.extend_from_slice(&run.object.to_le_bytes());
            bytes.extend_from_slice(&run.first.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
        }
        for crc in &self.crcs {
            bytes.extend_from_slice(&crc.to_le_bytes());
        }
        frame::seal(&mut bytes, crc32c);
        bytes
    }

    /// How many bytes the header of a pack has, from its first [`FIXED_BYTES`] bytes (not yet
    /// covered by a check of the CRC, but bounded).
    pub fn peek_bytes(bytes: &[u8]) -> Result<u16, FormatError> {
        let mut reader = frame::open(bytes, MAGIC, VERSION)?;
        reader.slice(28)?;
        match reader.u32()? {
            len if (header_bytes(1, 0)..=HEADER_BYTES_MAX).contains(&(len as u16))
                && len <= u16::MAX.into() =>
            {
                Ok(len as u16)
            }
            _ => reader.bad(4, "number of header bytes"),
        }
    }

    /// Reads a header; `bytes` may go on with the blocks.
    pub fn decode(bytes: &[u8], crc32c: Crc32c) -> Result<Self, FormatError> {
        let header = Self::peek_bytes(bytes)?;
        let bytes = bytes.get(..header.into()).ok_or(FormatError::Short { at: bytes.len() })?;
        frame::check(bytes, crc32c)?;
        let mut reader = frame::open(bytes, MAGIC, VERSION)?;
        let volume = Uuid(reader.take()?);
        let epoch = Epoch(reader.u64()?);
        let n = reader.u32()?;
        reader.u32()?;
        let run_count = reader.u32()? as usize;
        let blocks = reader.u32()? as usize;
        if blocks > PACK_BLOCKS_MAX {
            return reader.bad(4, "number of blocks");
        }
        if !(1..=PACK_RUNS_MAX).contains(&run_count) || header_bytes(run_count, blocks) != header {
            return reader.bad(8, "number of runs");
        }
        if reader.u64()? != 0 {
            return reader.bad(8, "reserved field");
        }
        let mut runs = Vec::with_capacity(run_count);
        let mut seen = 0;
        for _ in 0..run_count {
            let (object, first, count) = (reader.u32()?, reader.u16()?, reader.u16()?);
            let run = Run { object, first, count: count & !ZERO_BIT, zero: count & ZERO_BIT != 0 };
            seen += if run.zero { 0 } else { usize::from(run.count) };
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
        reader.end()?;
        Ok(Self { volume, epoch, n, runs, crcs })
    }
}

/// Bytes that the header of a pack with so many runs and data blocks takes.
#[must_use]
pub const fn header_bytes(runs: usize, blocks: usize) -> u16 {
    (FIXED_BYTES + runs * 8 + blocks * 4) as u16
}

/// Bytes before the runs.
pub const FIXED_BYTES: usize = FRAME_BYTES + 48;
const ZERO_BIT: u16 = 1 << 15;
const MAGIC: [u8; 8] = *b"HEELPACK";
const VERSION: u32 = 2;

const _: () = assert!(FIXED_BYTES + PACK_RUNS_MAX * 8 + PACK_BLOCKS_MAX * 4 <= u16::MAX as usize);
const _: () = assert!(OBJECT_BLOCKS_MAX < ZERO_BIT as usize);

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::wire::frame::tests::{crc32c, reseal};

    fn sample(runs: u16) -> Header {
        let zero = |i: u16| i % 4 == 3;
        Header {
            volume: Uuid([7; 16]),
            epoch: Epoch(0x1_0000_0005),
            n: 3,
            runs: (0..runs)
                .map(|i| Run { object: i.into(), first: i % 1000, count: 1 + i % 3, zero: zero(i) })
                .collect(),
            crcs: (0..runs)
                .filter(|&i| !zero(i))
                .flat_map(|i| vec![u32::from(i) * 77; usize::from(1 + i % 3)])
                .collect(),
        }
    }

    #[test]
    fn comes_back() {
        for runs in [1, 2, 300, 1000] {
            let header = sample(runs);
            let mut bytes = header.encode(crc32c);
            assert_eq!(bytes.len(), usize::from(header.bytes()));
            assert_eq!(Header::peek_bytes(&bytes[..FIXED_BYTES]), Ok(header.bytes()));
            assert_eq!(Header::decode(&bytes, crc32c).as_ref(), Ok(&header));
            bytes.extend_from_slice(&[0xaa; 5000]);
            assert_eq!(Header::decode(&bytes, crc32c), Ok(header), "blocks follow");
        }
        let zeroes = Run { object: 5, first: 0, count: 1024, zero: true };
        let header = Header { runs: vec![zeroes], crcs: Vec::new(), ..sample(1) };
        assert_eq!(Header::decode(&header.encode(crc32c), crc32c), Ok(header));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen() {
        let good = sample(9).encode(crc32c);
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            assert!(Header::decode(&bytes, crc32c).is_err(), "byte {at}");
            assert!(Header::decode(&good[..at], crc32c).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn bad_fields_are_named() {
        let good = sample(3).encode(crc32c);
        let field = |at, what| FormatError::Field { at, what };
        let cases: [(usize, u32, FormatError); 7] = [
            (0, 0, FormatError::Magic),
            (8, 1, FormatError::Version(1)),
            (44, 71, field(44, "number of header bytes")),
            (44, u32::from(HEADER_BYTES_MAX) + 1, field(44, "number of header bytes")),
            (44, 1 << 16 | 100, field(44, "number of header bytes")),
            (68, 0x0009_0000, field(64, "run")),
            (48, u32::MAX, field(48, "number of runs")),
        ];
        for (at, value, error) in cases {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            reseal(&mut bytes);
            assert_eq!(Header::decode(&bytes, crc32c), Err(error), "byte {at}");
        }
        assert_eq!(Header::decode(&[], crc32c), Err(FormatError::Short { at: 0 }));
    }
}
