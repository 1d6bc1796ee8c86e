//! A head: one state of a volume. The newest one is the volume.
//!
//! ```text
//! 0    magic         "HEELHEAD"
//! 8    version       u32 = 2
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
//! 113  flags         u8: 1 = released, 2 = reads are not buffered, 4 = writes are not buffered,
//!                    8 = pinned, 16 = read-only
//! 114  mode          u8: 0 = writeback, 1 = ram, 2 = writethrough, 3 = writearound, 4 = none,
//!                    5 = ephemeral
//! 115  name length   u8
//! 116  host length   u8
//! 117  tags          u8
//! 118  description   u16, its length
//! 120  sources       u32
//! 124  map pages     u32
//! 128  tail          u32
//! 132  snapshots     u32
//! 136  name, host, description (UTF-8)
//!      tags          each: length u8, UTF-8
//!      sources       20 bytes each: volume 16 bytes, number of its head u32
//!      map pages     16 bytes each: page u32, source u32, epoch u64; ascending
//!      tail          16 bytes each: epoch u64, n u32, header bytes u16, source u16
//!      snapshots     each: number u32, flags u8 (1 = being deleted), name length u8, 0 u16,
//!                    epoch u64, blocks u64, created u64, name; in order of number
//! ```
//!
//! The image is that of the map pages, and over it the packs of the tail, in their order. A map
//! page that is not listed is all zeroes. Source 0 is the volume itself, source k the k-th volume
//! listed: a snapshot from which this volume was cloned, or from which that one was. A snapshot is
//! the head of its number, which is kept.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use super::frame::{self, FormatError, Reader};
use super::names::{Nonce, Uuid, valid_name};
use super::pack;
use crate::event::{Buffering, Mode};
use crate::ids::{BLOCK_SHIFT, Crc32c, Epoch};
use crate::limits::{MAP_PAGE_BLOCKS, OBJECT_SHIFT_MAX, OBJECT_SHIFT_MIN};

/// Map pages of a volume at most.
pub const MAP_PAGES_MAX: u32 = 1 << 20;
/// Blocks of a volume at most (64 TiB).
pub const VOLUME_BLOCKS_MAX: u64 = MAP_PAGES_MAX as u64 * MAP_PAGE_BLOCKS as u64;
/// Bytes of an owner's host name at most.
pub const HOST_BYTES_MAX: usize = 255;
/// Bytes of a description at most.
pub const DESCRIPTION_BYTES_MAX: usize = 1024;
/// Tags of a volume at most.
pub const TAGS_MAX: usize = 32;
/// Bytes of a tag at most.
pub const TAG_BYTES_MAX: usize = 63;
/// Volumes at most that an image may lie in beside its own: how deep clones of clones go.
pub const SOURCES_MAX: usize = 64;
/// Snapshots of a volume at most.
pub const SNAPSHOTS_MAX: usize = 4096;

/// What an operator says of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// When a write is acknowledged, and what is kept.
    pub mode: Mode,
    /// What of the volume's data a cache keeps in RAM.
    pub buffering: Buffering,
    /// A cache keeps all of it.
    pub pinned: bool,
    /// Clients may not change it.
    pub read_only: bool,
    /// Free text, at most [`DESCRIPTION_BYTES_MAX`].
    pub description: String,
    /// At most [`TAGS_MAX`], each of 1 to [`TAG_BYTES_MAX`] bytes.
    pub tags: Vec<String>,
}

impl Settings {
    /// Why a volume cannot have these, in words.
    pub fn check(&self) -> Result<(), &'static str> {
        let plain = |text: &str| !text.chars().any(char::is_control);
        if self.description.len() > DESCRIPTION_BYTES_MAX || !plain(&self.description) {
            return Err("a description has at most 1024 bytes, on one line");
        }
        let tag = |tag: &String| (1..=TAG_BYTES_MAX).contains(&tag.len()) && plain(tag);
        if self.tags.len() > TAGS_MAX || !self.tags.iter().all(tag) {
            return Err("a volume has at most 32 tags, each of 1 to 63 bytes on one line");
        }
        Ok(())
    }
}

/// Another volume's snapshot in which a part of the image lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source {
    /// The volume.
    pub volume: Uuid,
    /// Number of the snapshot's head.
    pub number: u32,
}

/// A version of a map page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRef {
    /// Whose: see [`Head::volume_of`].
    pub source: u16,
    /// The epoch in its name.
    pub epoch: Epoch,
}

/// A pack that the map pages do not know yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TailPack {
    /// Whose: see [`Head::volume_of`].
    pub source: u16,
    /// The push that wrote it.
    pub epoch: Epoch,
    /// Which pack of that push.
    pub n: u32,
    /// Bytes of its header.
    pub header_bytes: u16,
}

/// A snapshot: the head of this number is kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// Number of the head.
    pub number: u32,
    /// That head's epoch.
    pub epoch: Epoch,
    /// Size in blocks then.
    pub blocks: u64,
    /// Seconds since 1970.
    pub created_unix_secs: u64,
    /// It is being deleted: nobody may clone it any more.
    pub deleting: bool,
}

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
    /// What an operator says of it.
    pub settings: Settings,
    /// The volume's name.
    pub name: String,
    /// The owner's host.
    pub host: String,
    /// Snapshots of other volumes in which the image lies: for a clone its parent, the parent's
    /// parent, and so on.
    pub sources: Vec<Source>,
    /// Versions of the map pages that exist.
    pub pages: BTreeMap<u32, PageRef>,
    /// Packs that lie over the map pages, in order.
    pub tail: Vec<TailPack>,
    /// Ascending by number.
    pub snapshots: Vec<Snapshot>,
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
            settings: Settings::default(),
            name: name.into(),
            host: String::new(),
            sources: Vec::new(),
            pages: BTreeMap::new(),
            tail: Vec::new(),
            snapshots: Vec::new(),
        }
    }

    /// Whether this head claimed the volume (or made it), rather than committed an image. Such
    /// a head is never deleted.
    #[must_use]
    pub const fn is_claim(&self) -> bool {
        self.number == self.term
    }

    /// Whether this head must stay when a newer one exists.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        let number = self.number;
        self.is_claim() || self.snapshots.iter().any(|snapshot| snapshot.number == number)
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

    /// Where a block of an object is in the map: its page, and its number there.
    #[must_use]
    pub const fn place_of(&self, object: u32, block: u16) -> (u32, u16) {
        let block = object as u64 * self.object_blocks() as u64 + block as u64;
        let (page, at) = (block / MAP_PAGE_BLOCKS as u64, block % MAP_PAGE_BLOCKS as u64);
        (page as u32, at as u16)
    }

    /// Whether the whole image lies in the volume's own objects.
    #[must_use]
    pub fn is_flat(&self) -> bool {
        self.pages.values().all(|at| at.source == 0) && self.tail.iter().all(|p| p.source == 0)
    }

    /// The volume that a source is.
    ///
    /// # Panics
    /// If the head does not list it.
    #[must_use]
    pub fn volume_of(&self, source: u16) -> Uuid {
        match source {
            0 => self.volume,
            _ => self.sources[usize::from(source) - 1].volume,
        }
    }

    /// Every source's volume, in order.
    #[must_use]
    pub fn volumes(&self) -> Vec<Uuid> {
        let sources = self.sources.iter().map(|source| source.volume);
        core::iter::once(self.volume).chain(sources).collect()
    }

    /// All bytes of the head.
    #[must_use]
    pub fn encode(&self, crc32c: Crc32c) -> Vec<u8> {
        assert!(self.host.len() <= HOST_BYTES_MAX, "the host name was cut where it came in");
        assert!(self.settings.check().is_ok(), "settings are checked where they come in");
        let mut bytes = frame::begin(MAGIC, VERSION);
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
        let Settings { mode, description, tags, .. } = &self.settings;
        let (name_len, host_len) = (self.name.len() as u8, self.host.len() as u8);
        let small =
            [self.object_shift, self.flags(), mode.code(), name_len, host_len, tags.len() as u8];
        bytes.extend_from_slice(&small);
        bytes.extend_from_slice(&(description.len() as u16).to_le_bytes());
        let counts = [self.sources.len(), self.pages.len(), self.tail.len(), self.snapshots.len()];
        for count in counts {
            bytes.extend_from_slice(&(count as u32).to_le_bytes());
        }
        for text in [&self.name, &self.host, description] {
            bytes.extend_from_slice(text.as_bytes());
        }
        for tag in tags {
            bytes.push(tag.len() as u8);
            bytes.extend_from_slice(tag.as_bytes());
        }
        self.encode_lists(&mut bytes);
        frame::seal(&mut bytes, crc32c);
        bytes
    }

    fn flags(&self) -> u8 {
        let Settings { buffering, pinned, read_only, .. } = &self.settings;
        [
            (self.released, FLAG_RELEASED),
            (!buffering.reads, FLAG_UNBUFFERED_READS),
            (!buffering.writes, FLAG_UNBUFFERED_WRITES),
            (*pinned, FLAG_PINNED),
            (*read_only, FLAG_READ_ONLY),
        ]
        .iter()
        .fold(0, |flags, &(set, flag)| if set { flags | flag } else { flags })
    }

    fn encode_lists(&self, bytes: &mut Vec<u8>) {
        for source in &self.sources {
            bytes.extend_from_slice(&source.volume.0);
            bytes.extend_from_slice(&source.number.to_le_bytes());
        }
        for (page, at) in &self.pages {
            bytes.extend_from_slice(&page.to_le_bytes());
            bytes.extend_from_slice(&u32::from(at.source).to_le_bytes());
            bytes.extend_from_slice(&at.epoch.0.to_le_bytes());
        }
        for pack in &self.tail {
            bytes.extend_from_slice(&pack.epoch.0.to_le_bytes());
            bytes.extend_from_slice(&pack.n.to_le_bytes());
            bytes.extend_from_slice(&pack.header_bytes.to_le_bytes());
            bytes.extend_from_slice(&pack.source.to_le_bytes());
        }
        for snapshot in &self.snapshots {
            let small = [u8::from(snapshot.deleting), snapshot.name.len() as u8, 0, 0];
            bytes.extend_from_slice(&snapshot.number.to_le_bytes());
            bytes.extend_from_slice(&small);
            for field in [snapshot.epoch.0, snapshot.blocks, snapshot.created_unix_secs] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
            bytes.extend_from_slice(snapshot.name.as_bytes());
        }
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
        let mut head = Self::read_fixed(&mut reader, volume, number)?;
        head.read_flags(&mut reader)?;
        head.settings.mode = match Mode::from_code(reader.u8()?) {
            Some(mode) => mode,
            None => return reader.bad(1, "mode"),
        };
        let (name_len, host_len, tags) = (reader.u8()?, reader.u8()?, reader.u8()?);
        let description_len = reader.u16()?;
        let mut counts = [0; 4];
        for count in &mut counts {
            *count = reader.u32()?;
        }
        head.name = text(&mut reader, name_len.into(), "name")?;
        if !valid_name(&head.name) {
            return reader.bad(name_len.into(), "name");
        }
        head.host = text(&mut reader, host_len.into(), "host")?;
        head.settings.description = text(&mut reader, description_len, "description")?;
        for _ in 0..tags {
            let len = reader.u8()?;
            head.settings.tags.push(text(&mut reader, len.into(), "tag")?);
        }
        if head.settings.check().is_err() {
            return reader.bad(0, "description or tags");
        }
        // Each entry consumes bytes that must be there, so the lists are bounded by the input.
        let [sources, pages, tail, snapshots] = counts;
        head.read_sources(&mut reader, sources)?;
        head.read_pages(&mut reader, pages)?;
        head.read_tail(&mut reader, tail)?;
        head.read_snapshots(&mut reader, snapshots)?;
        reader.end()?;
        Ok(head)
    }

    fn read_fixed(reader: &mut Reader<'_>, volume: Uuid, number: u32) -> Result<Self, FormatError> {
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
        Ok(Self {
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
            released: false,
            settings: Settings::default(),
            name: String::new(),
            host: String::new(),
            sources: Vec::new(),
            pages: BTreeMap::new(),
            tail: Vec::new(),
            snapshots: Vec::new(),
        })
    }

    fn read_flags(&mut self, reader: &mut Reader<'_>) -> Result<(), FormatError> {
        let flags = reader.u8()?;
        if flags & !FLAGS != 0 {
            return reader.bad(1, "flags");
        }
        self.released = flags & FLAG_RELEASED != 0;
        self.settings.buffering = Buffering {
            reads: flags & FLAG_UNBUFFERED_READS == 0,
            writes: flags & FLAG_UNBUFFERED_WRITES == 0,
        };
        self.settings.pinned = flags & FLAG_PINNED != 0;
        self.settings.read_only = flags & FLAG_READ_ONLY != 0;
        Ok(())
    }

    fn read_sources(&mut self, reader: &mut Reader<'_>, count: u32) -> Result<(), FormatError> {
        for _ in 0..count {
            let source = Source { volume: Uuid(reader.take()?), number: reader.u32()? };
            let known = self.volumes().contains(&source.volume);
            if known || source.number == 0 || self.sources.len() == SOURCES_MAX {
                return reader.bad(20, "source");
            }
            self.sources.push(source);
        }
        Ok(())
    }

    fn read_pages(&mut self, reader: &mut Reader<'_>, count: u32) -> Result<(), FormatError> {
        let mut least = 0;
        for _ in 0..count {
            let page = reader.u32()?;
            if !(least..self.page_count()).contains(&page) {
                return reader.bad(4, "map page");
            }
            least = page + 1;
            let source = reader.u32()?;
            if source as usize > self.sources.len() {
                return reader.bad(4, "source of a map page");
            }
            let at = PageRef { source: source as u16, epoch: Epoch(reader.u64()?) };
            if at.source == 0 && at.epoch > self.epoch {
                return reader.bad(8, "epoch of a map page");
            }
            self.pages.insert(page, at);
        }
        Ok(())
    }

    fn read_tail(&mut self, reader: &mut Reader<'_>, count: u32) -> Result<(), FormatError> {
        for _ in 0..count {
            let (epoch, n) = (Epoch(reader.u64()?), reader.u32()?);
            let (header_bytes, source) = (reader.u16()?, reader.u16()?);
            let possible = (pack::header_bytes(1, 0)..=pack::HEADER_BYTES_MAX)
                .contains(&header_bytes)
                && usize::from(source) <= self.sources.len()
                && (source > 0 || epoch <= self.epoch);
            if !possible {
                return reader.bad(16, "pack of the tail");
            }
            self.tail.push(TailPack { source, epoch, n, header_bytes });
        }
        Ok(())
    }

    fn read_snapshots(&mut self, reader: &mut Reader<'_>, count: u32) -> Result<(), FormatError> {
        let mut least = 1;
        for _ in 0..count {
            let number = reader.u32()?;
            let flags = reader.u8()?;
            let name_len = reader.u8()?;
            let zero = reader.u16()?;
            let possible = (least..=self.number).contains(&number)
                && flags & !SNAPSHOT_DELETING == 0
                && zero == 0
                && self.snapshots.len() < SNAPSHOTS_MAX;
            if !possible {
                return reader.bad(8, "snapshot");
            }
            least = number;
            let epoch = Epoch(reader.u64()?);
            let (blocks, created_unix_secs) = (reader.u64()?, reader.u64()?);
            let name = text(reader, name_len.into(), "name of a snapshot")?;
            if epoch > self.epoch || !valid_name(&name) {
                return reader.bad(name_len.into(), "name or epoch of a snapshot");
            }
            let deleting = flags & SNAPSHOT_DELETING != 0;
            let snapshot = Snapshot { name, number, epoch, blocks, created_unix_secs, deleting };
            self.snapshots.push(snapshot);
        }
        Ok(())
    }
}

/// Whether a volume may have objects of `1 << shift` bytes.
#[must_use]
pub const fn valid_object_shift(shift: u8) -> bool {
    OBJECT_SHIFT_MIN <= shift as u32 && shift as u32 <= OBJECT_SHIFT_MAX
}

fn text(reader: &mut Reader<'_>, len: u16, what: &'static str) -> Result<String, FormatError> {
    match core::str::from_utf8(reader.slice(len.into())?) {
        Ok(text) => Ok(text.into()),
        Err(_) => reader.bad(len.into(), what),
    }
}

const FLAG_RELEASED: u8 = 1;
const FLAG_UNBUFFERED_READS: u8 = 2;
const FLAG_UNBUFFERED_WRITES: u8 = 4;
const FLAG_PINNED: u8 = 8;
const FLAG_READ_ONLY: u8 = 16;
const FLAGS: u8 = 31;
const SNAPSHOT_DELETING: u8 = 1;
const MAGIC: [u8; 8] = *b"HEELHEAD";
const VERSION: u32 = 2;

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::wire::frame::tests::{crc32c, reseal};

    const VOLUME: Uuid = Uuid([0x5a; 16]);

    fn snapshot(number: u32, name: &str) -> Snapshot {
        Snapshot {
            name: name.into(),
            number,
            epoch: Epoch(1 << 32 | 3),
            blocks: 700,
            created_unix_secs: 9,
            deleting: number == 4,
        }
    }

    fn sample() -> Head {
        let epoch = Epoch(4 << 32 | 6);
        Head {
            number: 9,
            term: 4,
            epoch,
            cache: Uuid([1; 16]),
            nonce: Nonce([2; 16]),
            claimed_unix_secs: 2,
            written_unix_secs: 3,
            released: false,
            host: "host.example".into(),
            settings: Settings {
                mode: Mode::WriteThrough,
                pinned: true,
                description: "the \u{e9}tat of it".into(),
                tags: vec!["env=test".into(), "b".into()],
                ..Settings::default()
            },
            sources: vec![
                Source { volume: Uuid([7; 16]), number: 3 },
                Source { volume: Uuid([8; 16]), number: 1 },
            ],
            snapshots: vec![snapshot(3, "before"), snapshot(4, "after")],
            tail: vec![
                TailPack { source: 2, epoch: Epoch(99 << 32), n: 0, header_bytes: 76 },
                TailPack { source: 0, epoch, n: 7, header_bytes: 300 },
            ],
            pages: [
                (0, PageRef { source: 1, epoch: Epoch(77 << 32) }),
                (7, PageRef { source: 0, epoch }),
            ]
            .into(),
            ..Head::first(VOLUME, "disk0", 8 * MAP_PAGE_BLOCKS as u64, 22, 1)
        }
    }

    #[test]
    fn comes_back() {
        let mut heads = vec![sample(), Head::first(VOLUME, "a", 1, 16, 0)];
        for mode in Mode::ALL {
            let settings = Settings { mode: *mode, ..Settings::default() };
            heads.push(Head { settings, ..sample() });
        }
        for bits in 0..16 {
            let settings = Settings {
                buffering: Buffering { reads: bits & 1 == 0, writes: bits & 2 == 0 },
                pinned: bits & 4 == 0,
                read_only: bits & 8 == 0,
                ..Settings::default()
            };
            heads.push(Head { settings, ..sample() });
        }
        for head in heads {
            let bytes = head.encode(crc32c);
            assert_eq!(Head::decode(&bytes, VOLUME, head.number, crc32c), Ok(head));
        }
    }

    #[test]
    fn snapshots_and_claims_are_kept() {
        let kept = |number, term| Head { number, term, ..sample() }.is_kept();
        assert!(kept(4, 4) && kept(4, 1) && kept(3, 1));
        assert!(!kept(5, 4));
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
        let snapshots = good.len() - (32 + 6) - (32 + 5);
        let tail = snapshots - 32;
        let pages = tail - 32;
        let sources = pages - 40;
        let cases: [(usize, &[u8], usize, &'static str); 20] = [
            (16, &[1], 16, "volume"),
            (32, &[8], 32, "number"),
            (36, &[10], 36, "term"),
            (44, &[5], 40, "epoch"),
            (80, &[0; 8], 80, "size"),
            (112, &[23], 112, "object size"),
            (113, &[32], 113, "flags"),
            (114, &[6], 114, "mode"),
            (136, b"/", 136, "name"),
            (141, &[0xff], 141, "host"),
            (141 + 12, &[0xff], 141 + 12, "description"),
            (sources - 1, &[7], sources, "description or tags"),
            (sources + 20, &[7; 16], sources + 20, "source"),
            (pages + 16, &[8], pages + 16, "map page"),
            (pages + 4, &[3], pages + 4, "source of a map page"),
            (pages + 16 + 8, &[7], pages + 16 + 8, "epoch of a map page"),
            (tail + 14, &[3], tail, "pack of the tail"),
            (tail + 16 + 12, &[1, 0], tail + 16, "pack of the tail"),
            (snapshots + 38, &[2], snapshots + 38, "snapshot"),
            (snapshots + 4, &[2], snapshots, "snapshot"),
        ];
        for (at, value, error_at, what) in cases {
            let mut bytes = good.clone();
            bytes[at..at + value.len()].copy_from_slice(value);
            reseal(&mut bytes);
            let error = FormatError::Field { at: error_at, what };
            assert_eq!(Head::decode(&bytes, VOLUME, 9, crc32c), Err(error), "byte {at}");
        }
        let mut old = good.clone();
        old[8] = 1;
        assert_eq!(Head::decode(&old, VOLUME, 9, crc32c), Err(FormatError::Version(1)));
        let mut long = good.clone();
        long.push(0);
        reseal(&mut long);
        let trailing = FormatError::Trailing { at: good.len() };
        assert_eq!(Head::decode(&long, VOLUME, 9, crc32c), Err(trailing));
    }
}
