//! What changed between two snapshots of a volume, as a file or a stream: a header, records in any
//! order, and an end that says how many there were.
//!
//! ```text
//! header    volume, base, snapshot, size                     192 bytes
//! record    kind, first block, blocks, checksums              32 bytes, then data
//! ...
//! record    the end
//! ```

use alloc::string::String;
use alloc::vec::Vec;

use super::frame::{self, FormatError};
use super::names::{Uuid, valid_name};
use crate::ids::{BLOCK_BYTES, Crc32c};

/// The first bytes.
pub const MAGIC: [u8; 8] = *b"HEELDLTA";
/// This version of the format.
pub const VERSION: u32 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 192;
/// Bytes of a record before its data.
pub const RECORD_BYTES: usize = 32;
/// Blocks of data in a record at most. None crosses a multiple of this.
pub const DATA_BLOCKS_MAX: u64 = 256;

/// Bytes in which a name stands.
const NAME_FIELD: usize = 64;
/// Bytes at the end of the header that say nothing.
const RESERVED_BYTES: usize = 16;
/// Where a record's header goes on behind its own checksum.
const CHECKED_FROM: usize = 4;

/// A snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Point {
    /// Number of its head: unique in the volume, for ever.
    pub number: u32,
    /// Its name.
    pub name: String,
}

/// The header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// The volume.
    pub volume: Uuid,
    /// Size in blocks as of `to`.
    pub blocks: u64,
    /// What must be there before.
    pub base: Point,
    /// What is there afterwards.
    pub to: Point,
}

impl Header {
    /// The header's bytes.
    ///
    /// # Panics
    ///
    /// If a name is none that a snapshot can have.
    #[must_use]
    pub fn encode(&self, crc32c: Crc32c) -> Vec<u8> {
        let mut bytes = frame::begin(MAGIC, VERSION);
        bytes.extend_from_slice(&self.volume.0);
        bytes.extend_from_slice(&self.blocks.to_le_bytes());
        bytes.extend_from_slice(&self.base.number.to_le_bytes());
        bytes.extend_from_slice(&self.to.number.to_le_bytes());
        for point in [&self.base, &self.to] {
            assert!(valid_name(&point.name), "the name of a snapshot");
            let mut field = [0; NAME_FIELD];
            field[0] = point.name.len() as u8;
            field[1..=point.name.len()].copy_from_slice(point.name.as_bytes());
            bytes.extend_from_slice(&field);
        }
        bytes.resize(HEADER_BYTES, 0);
        frame::seal(&mut bytes, crc32c);
        bytes
    }

    /// Reads the header.
    ///
    /// # Errors
    ///
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8; HEADER_BYTES], crc32c: Crc32c) -> Result<Self, FormatError> {
        let mut reader = frame::open(bytes, MAGIC, VERSION)?;
        frame::check(bytes, crc32c)?;
        let volume = Uuid(reader.take()?);
        let blocks = reader.u64()?;
        if blocks == 0 || blocks > u64::MAX / BLOCK_BYTES as u64 {
            return reader.bad(8, "size");
        }
        let (base, to) = (reader.u32()?, reader.u32()?);
        if base == 0 || base >= to {
            return reader.bad(8, "order of snapshots");
        }
        let base = Point { number: base, name: name(&mut reader)? };
        let to = Point { number: to, name: name(&mut reader)? };
        if reader.take()? != [0; RESERVED_BYTES] {
            return reader.bad(RESERVED_BYTES, "reserved bytes");
        }
        Ok(Self { volume, blocks, base, to })
    }
}

fn name(reader: &mut frame::Reader<'_>) -> Result<String, FormatError> {
    let field: [u8; NAME_FIELD] = reader.take()?;
    let len = usize::from(field[0]);
    if field.get(1 + len..).is_none_or(|rest| rest.iter().any(|byte| *byte != 0)) {
        return reader.bad(NAME_FIELD, "name");
    }
    let name = field.get(1..=len).and_then(|name| core::str::from_utf8(name).ok());
    match name.filter(|name| valid_name(name)) {
        Some(name) => Ok(name.into()),
        None => reader.bad(NAME_FIELD, "name"),
    }
}

/// What a record says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Record {
    /// The blocks have the data that follows.
    Data {
        /// The first block.
        block: u64,
        /// Blocks, 1 to [`DATA_BLOCKS_MAX`].
        blocks: u64,
        /// CRC32C of the data.
        crc: u32,
    },
    /// The blocks are zeroes.
    Zeroes {
        /// The first block.
        block: u64,
        /// Blocks, at least 1.
        blocks: u64,
    },
    /// Nothing follows.
    End {
        /// Records before this one.
        records: u64,
    },
}

impl Record {
    /// The record's header.
    #[must_use]
    pub fn encode(&self, crc32c: Crc32c) -> [u8; RECORD_BYTES] {
        let (kind, crc, block, count) = match *self {
            Self::Data { block, blocks, crc } => (1u8, crc, block, blocks),
            Self::Zeroes { block, blocks } => (2, 0, block, blocks),
            Self::End { records } => (3, 0, 0, records),
        };
        let mut bytes = [0; RECORD_BYTES];
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes[8] = kind;
        bytes[16..24].copy_from_slice(&block.to_le_bytes());
        bytes[24..].copy_from_slice(&count.to_le_bytes());
        let crc = crc32c(0, &bytes[CHECKED_FROM..]);
        bytes[..CHECKED_FROM].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the header of a record about a disk of `disk` blocks.
    ///
    /// # Errors
    ///
    /// What is wrong with the bytes.
    pub fn decode(
        bytes: &[u8; RECORD_BYTES],
        disk: u64,
        crc32c: Crc32c,
    ) -> Result<Self, FormatError> {
        let u32_at = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte]));
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if crc32c(0, &bytes[CHECKED_FROM..]) != u32_at(0) {
            return Err(FormatError::Checksum);
        }
        let (crc, block, blocks) = (u32_at(4), u64_at(16), u64_at(24));
        let bad = |at, what| Err(FormatError::Field { at, what });
        if bytes[9..16] != [0; 7] {
            return bad(9, "reserved bytes");
        }
        let record = match bytes[8] {
            1 => Self::Data { block, blocks, crc },
            2 => Self::Zeroes { block, blocks },
            3 => Self::End { records: blocks },
            _ => return bad(8, "kind"),
        };
        if !matches!(record, Self::Data { .. }) && crc != 0 {
            return bad(4, "checksum of no data");
        }
        if matches!(record, Self::End { .. }) {
            return if block == 0 { Ok(record) } else { bad(16, "first block") };
        }
        let inside = block.checked_add(blocks).is_some_and(|end| end <= disk);
        let fits = block % DATA_BLOCKS_MAX + blocks.min(DATA_BLOCKS_MAX + 1) <= DATA_BLOCKS_MAX;
        if blocks == 0 || !inside || (matches!(record, Self::Data { .. }) && !fits) {
            return bad(16, "range");
        }
        Ok(record)
    }

    /// Bytes of data behind the record's header.
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        match *self {
            Self::Data { blocks, .. } => blocks as usize * BLOCK_BYTES,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::tests::{crc32c, reseal};

    fn header() -> Header {
        let point = |number, name: &str| Point { number, name: name.into() };
        Header {
            volume: Uuid([7; 16]),
            blocks: 1000,
            base: point(3, "monday"),
            to: point(9, "tuesday"),
        }
    }

    fn encoded(header: &Header) -> [u8; HEADER_BYTES] {
        header.encode(crc32c).try_into().expect("its length")
    }

    #[test]
    fn a_header_comes_back() {
        let bytes = encoded(&header());
        assert_eq!(Header::decode(&bytes, crc32c), Ok(header()));
        assert_eq!(&bytes[..8], b"HEELDLTA");
        assert_eq!(bytes[32..40], 1000u64.to_le_bytes());
        assert_eq!((bytes[40], bytes[44], bytes[48], bytes[49]), (3, 9, 6, b'm'));
        assert_eq!((bytes[112], &bytes[113..120]), (7, &b"tuesday"[..]));
    }

    #[test]
    fn a_header_with_any_damage_is_refused() {
        let bytes = encoded(&header());
        for at in 0..HEADER_BYTES {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            assert!(Header::decode(&damaged, crc32c).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_header_that_makes_no_sense_is_refused() {
        let wrong = |at: usize, value: &[u8]| {
            let mut bytes = encoded(&header());
            bytes[at..at + value.len()].copy_from_slice(value);
            reseal(&mut bytes);
            Header::decode(&bytes, crc32c)
        };
        assert_eq!(wrong(16, &[7]), Ok(header()));
        for (at, value) in [
            (8, &[2][..]),
            (32, &[0; 8]),
            (32, &[0xff; 8]),
            (40, &[9]),
            (40, &[0]),
            (48, &[64]),
            (113, b"/"),
            (120, b"x"),
            (191, &[1]),
        ] {
            assert!(wrong(at, value).is_err(), "byte {at}");
        }
    }

    #[test]
    fn records_come_back() {
        for record in [
            Record::Data { block: 256, blocks: 256, crc: 0x0102_0304 },
            Record::Data { block: 999, blocks: 1, crc: 5 },
            Record::Zeroes { block: 0, blocks: 1000 },
            Record::End { records: 12 },
        ] {
            assert_eq!(Record::decode(&record.encode(crc32c), 1000, crc32c), Ok(record));
        }
        assert_eq!(Record::Data { block: 0, blocks: 2, crc: 0 }.data_bytes(), 8192);
        assert_eq!(Record::Zeroes { block: 0, blocks: 2 }.data_bytes(), 0);
    }

    #[test]
    fn records_that_cannot_be_are_refused() {
        for record in [
            Record::Data { block: 0, blocks: 257, crc: 0 },
            Record::Data { block: 255, blocks: 2, crc: 0 },
            Record::Data { block: 0, blocks: 0, crc: 0 },
            Record::Data { block: 999, blocks: 2, crc: 0 },
            Record::Zeroes { block: 0, blocks: 0 },
            Record::Zeroes { block: 0, blocks: 1001 },
            Record::Zeroes { block: u64::MAX, blocks: u64::MAX },
            Record::Data { block: u64::MAX, blocks: u64::MAX, crc: 0 },
        ] {
            let decoded = Record::decode(&record.encode(crc32c), 1000, crc32c);
            assert!(decoded.is_err(), "{record:?}");
        }
        let bytes = Record::End { records: 1 }.encode(crc32c);
        for at in 0..RECORD_BYTES {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            assert!(Record::decode(&damaged, 1000, crc32c).is_err(), "byte {at}");
        }
        for (at, value) in [(8, 0), (8, 4), (9, 1), (15, 1), (4, 1), (16, 1)] {
            let mut strange = bytes;
            strange[at] = value;
            let crc = crc32c(0, &strange[CHECKED_FROM..]);
            strange[..CHECKED_FROM].copy_from_slice(&crc.to_le_bytes());
            assert!(Record::decode(&strange, 1000, crc32c).is_err(), "byte {at}");
        }
    }
}
