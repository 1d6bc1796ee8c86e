//! A head: one state of a volume. The newest one is the volume.
//!
//! ```text
//! 0    magic         "HEELHEAD"
//! 8    version       u32 = 1
//! 12   crc           u32, CRC32C of bytes 16 to the end
//! 16   volume        16 bytes
//! 32   number        u32
//! 36   term          u32, number of the head by which the owner claimed the volume
//! 40   epoch         u64, the image is as of this epoch
//! 48   cache         16 bytes, the owner
//! 64   nonce         16 bytes, the owner's claim
//! 80   blocks        u64, size of the volume
//! 88   created       u64, seconds since 1970
//! 96   claimed       u64, seconds since 1970
//! 104  written       u64, seconds since 1970
//! 112  object shift  u8, log2 of the object size in bytes
//! 113  flags         u8: 1 = released, 2 = reads are not buffered, 4 = writes are not buffered
//! 114  name length   u8
//! 115  host length   u8
//! 116  map pages     u32
//! 120  snapshots     u32 = 0
//! 124  parents       u32 = 0
//! 128  name, host    UTF-8
//!      map pages     12 bytes each: page u32, epoch u64; ascending
//! ```
//!
//! A map page that is not listed is all zeroes. Lists of snapshots and parents come with a later
//! version.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use super::frame::{self, FormatError, Reader};
use super::names::{Nonce, Uuid, valid_name};
use crate::event::Buffering;
use crate::ids::{BLOCK_SHIFT, Crc32c, Epoch};
use crate::limits::{MAP_PAGE_BLOCKS, OBJECT_SHIFT_MAX, OBJECT_SHIFT_MIN};

/// Map pages of a volume at most.
pub const MAP_PAGES_MAX: u32 = 1 << 20;
/// Blocks of a volume at most (64 TiB).
pub const VOLUME_BLOCKS_MAX: u64 = MAP_PAGES_MAX as u64 * MAP_PAGE_BLOCKS as u64;
/// Bytes of an owner's host name at most.
pub const HOST_BYTES_MAX: usize = 255;

/// A head.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Head {
    /// The volume.
    pub volume: Uuid,
    /// Its place in the order of heads, from 1.
    pub number: u32,
    /// Number of the head that began this ownership.
    pub term: u32,
    /// The image is as of this epoch.
    pub epoch: Epoch,
    /// The owner's cache.
    pub cache: Uuid,
    /// The owner's claim.
    pub nonce: Nonce,
    /// Size in blocks, at least 1.
    pub blocks: u64,
    /// When the volume was made: seconds since 1970.
    pub created_unix_secs: u64,
    /// When it was claimed: seconds since 1970.
    pub claimed_unix_secs: u64,
    /// When this head was written: seconds since 1970.
    pub written_unix_secs: u64,
    /// log2 of the object size in bytes.
    pub object_shift: u8,
    /// The owner has given the volume up: anyone may claim it.
    pub released: bool,
    /// What of the volume's data a cache keeps in RAM.
    pub buffering: Buffering,
    /// The volume's name.
    pub name: String,
    /// The owner's host.
    pub host: String,
    /// Versions of the map pages that exist.
    pub pages: BTreeMap<u32, Epoch>,
}

impl Head {
    /// The first head of a new, empty, unowned volume.
    ///
    /// # Panics
    /// On a size, object size or name that no volume can have.
    #[must_use]
    pub fn first(volume: Uuid, name: &str, blocks: u64, object_shift: u8, unix_secs: u64) -> Self {
        assert!((1..=VOLUME_BLOCKS_MAX).contains(&blocks), "the size of a volume is bounded");
        assert!(valid_object_shift(object_shift), "the object size of a volume is bounded");
        assert!(valid_name(name), "names are checked where they come in");
        Self {
            volume,
            number: 1,
            term: 1,
            epoch: Epoch::ZERO,
            cache: Uuid::default(),
            nonce: Nonce::default(),
            blocks,
            created_unix_secs: unix_secs,
            claimed_unix_secs: unix_secs,
            written_unix_secs: unix_secs,
            object_shift,
            released: true,
            buffering: Buffering::default(),
            name: name.into(),
            host: String::new(),
            pages: BTreeMap::new(),
        }
    }

    /// Whether this head claimed the volume (or made it), rather than committed an image. Such
    /// a head is never deleted.
    #[must_use]
    pub const fn is_claim(&self) -> bool {
        self.number == self.term
    }

    /// Map pages that the volume's size asks for.
    #[must_use]
    pub const fn page_count(&self) -> u32 {
        self.blocks.div_ceil(MAP_PAGE_BLOCKS as u64) as u32
    }

    /// Blocks of one object.
    #[must_use]
    pub const fn object_blocks(&self) -> u32 {
        1 << (self.object_shift as u32 - BLOCK_SHIFT)
    }

    /// All bytes of the head.
    #[must_use]
    pub fn encode(&self, crc32c: Crc32c) -> Vec<u8> {
        assert!(self.host.len() <= HOST_BYTES_MAX, "the host name was cut where it came in");
        let mut bytes = frame::begin(MAGIC, VERSION);
        bytes.reserve_exact(
            FIXED_BYTES + self.name.len() + self.host.len() + self.pages.len() * PAGE_BYTES,
        );
        bytes.extend_from_slice(&self.volume.0);
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&self.term.to_le_bytes());
        bytes.extend_from_slice(&self.epoch.0.to_le_bytes());
        bytes.extend_from_slice(&self.cache.0);
        bytes.extend_from_slice(&self.nonce.0);
        for field in
            [self.blocks, self.created_unix_secs, self.claimed_unix_secs, self.written_unix_secs]
        {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        let flags = if self.released { FLAG_RELEASED } else { 0 }
            | if self.buffering.reads { 0 } else { FLAG_UNBUFFERED_READS }
            | if self.buffering.writes { 0 } else { FLAG_UNBUFFERED_WRITES };
        let (name_len, host_len) = (self.name.len() as u8, self.host.len() as u8);
        bytes.extend_from_slice(&[self.object_shift, flags, name_len, host_len]);
        for count in [self.pages.len() as u32, 0, 0] {
            bytes.extend_from_slice(&count.to_le_bytes());
        }
        bytes.extend_from_slice(self.name.as_bytes());
        bytes.extend_from_slice(self.host.as_bytes());
        for (page, epoch) in &self.pages {
            bytes.extend_from_slice(&page.to_le_bytes());
            bytes.extend_from_slice(&epoch.0.to_le_bytes());
        }
        frame::seal(&mut bytes, crc32c);
        bytes
    }

    /// Reads the head of `volume` with this number (known from its key).
    pub fn decode(
        bytes: &[u8],
        volume: Uuid,
        number: u32,
        crc32c: Crc32c,
    ) -> Result<Self, FormatError> {
        let mut reader = frame::open(bytes, MAGIC, VERSION)?;
        frame::check(bytes, crc32c)?;
        if Uuid(reader.take()?) != volume {
            return reader.bad(16, "volume");
        }
        if reader.u32()? != number || number == 0 {
            return reader.bad(4, "number");
        }
        let term = reader.u32()?;
        if !(1..=number).contains(&term) {
            return reader.bad(4, "term");
        }
        let epoch = Epoch(reader.u64()?);
        if epoch.term() > term {
            return reader.bad(8, "epoch");
        }
        let cache = Uuid(reader.take()?);
        let nonce = Nonce(reader.take()?);
        let blocks = reader.u64()?;
        if !(1..=VOLUME_BLOCKS_MAX).contains(&blocks) {
            return reader.bad(8, "size");
        }
        let created_unix_secs = reader.u64()?;
        let claimed_unix_secs = reader.u64()?;
        let written_unix_secs = reader.u64()?;
        let object_shift = reader.u8()?;
        if !valid_object_shift(object_shift) {
            return reader.bad(1, "object size");
        }
        let (released, buffering) = read_flags(&mut reader)?;
        let (name_len, host_len) = (reader.u8()?, reader.u8()?);
        let page_count = reader.u32()?;
        if reader.u64()? != 0 {
            return reader.bad(8, "snapshots or parents");
        }
        let name = text(&mut reader, name_len, "name")?;
        if !valid_name(&name) {
            return reader.bad(name_len.into(), "name");
        }
        let host = text(&mut reader, host_len, "host")?;
        let mut head = Self {
            volume,
            number,
            term,
            epoch,
            cache,
            nonce,
            blocks,
            created_unix_secs,
            claimed_unix_secs,
            written_unix_secs,
            object_shift,
            released,
            buffering,
            name,
            host,
            pages: BTreeMap::new(),
        };
        head.read_pages(&mut reader, page_count)?;
        reader.end()?;
        Ok(head)
    }

    fn read_pages(&mut self, reader: &mut Reader<'_>, count: u32) -> Result<(), FormatError> {
        // Each entry consumes bytes that must be there, so the map is bounded by the input.
        let mut least = 0;
        for _ in 0..count {
            let page = reader.u32()?;
            if !(least..self.page_count()).contains(&page) {
                return reader.bad(4, "map page");
            }
            least = page + 1;
            let epoch = Epoch(reader.u64()?);
            if epoch > self.epoch {
                return reader.bad(8, "epoch of a map page");
            }
            self.pages.insert(page, epoch);
        }
        Ok(())
    }
}

/// Whether a volume may have objects of `1 << shift` bytes.
#[must_use]
pub const fn valid_object_shift(shift: u8) -> bool {
    OBJECT_SHIFT_MIN <= shift as u32 && shift as u32 <= OBJECT_SHIFT_MAX
}

fn read_flags(reader: &mut Reader<'_>) -> Result<(bool, Buffering), FormatError> {
    let flags = reader.u8()?;
    if flags & !FLAGS != 0 {
        return reader.bad(1, "flags");
    }
    let buffering = Buffering {
        reads: flags & FLAG_UNBUFFERED_READS == 0,
        writes: flags & FLAG_UNBUFFERED_WRITES == 0,
    };
    Ok((flags & FLAG_RELEASED != 0, buffering))
}

fn text(reader: &mut Reader<'_>, len: u8, what: &'static str) -> Result<String, FormatError> {
    match core::str::from_utf8(reader.slice(len.into())?) {
        Ok(text) => Ok(text.into()),
        Err(_) => reader.bad(len.into(), what),
    }
}

const FIXED_BYTES: usize = 128;
const PAGE_BYTES: usize = 12;
const FLAG_RELEASED: u8 = 1;
const FLAG_UNBUFFERED_READS: u8 = 2;
const FLAG_UNBUFFERED_WRITES: u8 = 4;
const FLAGS: u8 = FLAG_RELEASED | FLAG_UNBUFFERED_READS | FLAG_UNBUFFERED_WRITES;
const MAGIC: [u8; 8] = *b"HEELHEAD";
const VERSION: u32 = 1;

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::wire::frame::tests::{crc32c, reseal};

    const VOLUME: Uuid = Uuid([0x5a; 16]);

    fn sample() -> Head {
        Head {
            number: 9,
            term: 4,
            epoch: Epoch(4 << 32 | 6),
            cache: Uuid([1; 16]),
            nonce: Nonce([2; 16]),
            claimed_unix_secs: 2,
            written_unix_secs: 3,
            released: false,
            host: "host.example".into(),
            pages: [(0, Epoch(4 << 32 | 6)), (7, Epoch(1))].into(),
            ..Head::first(VOLUME, "disk0", 8 * MAP_PAGE_BLOCKS as u64, 22, 1)
        }
    }

    #[test]
    fn comes_back() {
        let mut heads = vec![sample(), Head::first(VOLUME, "a", 1, 16, 0)];
        for (reads, writes) in [(true, false), (false, true), (false, false)] {
            heads.push(Head { buffering: Buffering { reads, writes }, ..sample() });
        }
        for head in heads {
            let bytes = head.encode(crc32c);
            assert_eq!(Head::decode(&bytes, VOLUME, head.number, crc32c), Ok(head));
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen() {
        let good = sample().encode(crc32c);
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            assert!(Head::decode(&bytes, VOLUME, 9, crc32c).is_err(), "byte {at}");
            let mut bytes = good[..at].to_vec();
            if at >= 16 {
                reseal(&mut bytes);
            }
            assert!(Head::decode(&bytes, VOLUME, 9, crc32c).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn bad_fields_are_named() {
        let good = sample().encode(crc32c);
        let pages_at = good.len() - 24;
        let cases: [(usize, &[u8], FormatError); 14] = [
            (8, &[2], FormatError::Version(2)),
            (16, &[1], FormatError::Field { at: 16, what: "volume" }),
            (32, &[8], FormatError::Field { at: 32, what: "number" }),
            (36, &[10], FormatError::Field { at: 36, what: "term" }),
            (44, &[5], FormatError::Field { at: 40, what: "epoch" }),
            (80, &[0; 8], FormatError::Field { at: 80, what: "size" }),
            (112, &[23], FormatError::Field { at: 112, what: "object size" }),
            (113, &[8], FormatError::Field { at: 113, what: "flags" }),
            (120, &[1], FormatError::Field { at: 120, what: "snapshots or parents" }),
            (128, b"/", FormatError::Field { at: 128, what: "name" }),
            (133, &[0xff], FormatError::Field { at: 133, what: "host" }),
            (pages_at, &[8], FormatError::Field { at: pages_at, what: "map page" }),
            (
                pages_at + 4,
                &[7],
                FormatError::Field { at: pages_at + 4, what: "epoch of a map page" },
            ),
            (116, &[0xff; 4], FormatError::Field { at: 0, what: "" }),
        ];
        for (at, value, error) in cases {
            let mut bytes = good.clone();
            bytes[at..at + value.len()].copy_from_slice(value);
            reseal(&mut bytes);
            let found = Head::decode(&bytes, VOLUME, 9, crc32c);
            if at == 116 {
                assert_eq!(found, Err(FormatError::Short { at: good.len() }));
            } else {
                assert_eq!(found, Err(error));
            }
        }
        let mut long = good.clone();
        long.push(0);
        reseal(&mut long);
        let trailing = FormatError::Trailing { at: good.len() };
        assert_eq!(Head::decode(&long, VOLUME, 9, crc32c), Err(trailing));
    }
}
