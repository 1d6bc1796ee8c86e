//! The log's formats: record headers and segment footers. Byte-exact description: FORMAT.md.
//!
//! A record is one header page and its payload pages. A footer repeats all entries and checksums
//! of a sealed segment at its end, so that recovery reads a few pages instead of the segment.

use super::bytes::{get_u16, get_u32, get_u64, get_uuid, put};
use crate::ids::{BLOCK_BYTES, Crc32c, Epoch, VolumeId};
use crate::limits::{BATCH_BLOCKS_MAX, OBJECT_BLOCKS_MAX};

/// "HEELREC1"
pub const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"HEELREC1");
/// "HEELFTR1"
pub const FOOTER_MAGIC: u64 = u64::from_le_bytes(*b"HEELFTR1");
/// Version of both structures.
pub const LOG_VERSION: u32 = 1;
/// Bytes before the first entry, in both structures.
pub const HEAD_BYTES: usize = 80;
/// Bytes of an entry.
pub const ENTRY_BYTES: usize = 24;
/// Bytes of an entry in a footer: the entry, the page of its first block, 4 bytes of record number.
pub const FOOTER_ENTRY_BYTES: usize = ENTRY_BYTES + 12;
/// Entries of one record at most.
pub const RECORD_ENTRIES_MAX: usize = 120;
/// Numbers of records and of uses of segments stay below this (uses count from 1); whatever has
/// another one is not ours. So adding to them never overflows.
pub const SEQ_MAX: u64 = 1 << 62;

const _: () = assert!(
    HEAD_BYTES + RECORD_ENTRIES_MAX * ENTRY_BYTES + BATCH_BLOCKS_MAX * 4 <= BLOCK_BYTES,
    "a full record's header fits its page"
);

/// What an entry says of its blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum EntryKind {
    /// Data written by a client.
    Dirty = 1,
    /// Data fetched from the store, or moved by reclaim when it was clean.
    Clean = 2,
    /// The blocks read as zeroes.
    Zeroes = 3,
    /// Everything the log said of the volume before is void. Object and blocks mean nothing.
    Forget = 4,
    /// A superseded version of data, kept for the push under way. It comes after the version that
    /// superseded it, so recovery must not count it.
    Kept = 5,
}

/// One stretch of blocks of one object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The volume.
    pub volume: VolumeId,
    /// The object.
    pub object: u32,
    /// First block in the object.
    pub first: u16,
    /// Blocks.
    pub count: u16,
    /// What it says.
    pub kind: EntryKind,
    /// The epoch of the write; for clean data the epoch committed when it was logged.
    pub epoch: Epoch,
}

impl Entry {
    /// Payload pages that belong to the entry.
    #[must_use]
    pub const fn pages(&self) -> u32 {
        match self.kind {
            EntryKind::Dirty | EntryKind::Clean | EntryKind::Kept => self.count as u32,
            EntryKind::Zeroes | EntryKind::Forget => 0,
        }
    }

    /// Writes the entry into `bytes[..ENTRY_BYTES]`.
    pub fn encode(&self, bytes: &mut [u8]) {
        put(bytes, 0, &self.volume.0.to_le_bytes());
        put(bytes, 4, &self.object.to_le_bytes());
        put(bytes, 8, &self.first.to_le_bytes());
        put(bytes, 10, &self.count.to_le_bytes());
        put(bytes, 12, &[self.kind as u8, 0, 0, 0]);
        put(bytes, 16, &self.epoch.0.to_le_bytes());
    }

    /// Reads an entry; `None` for an unknown kind or a range outside the object.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let kind = match bytes[12] {
            1 => EntryKind::Dirty,
            2 => EntryKind::Clean,
            3 => EntryKind::Zeroes,
            4 => EntryKind::Forget,
            5 => EntryKind::Kept,
            _ => return None,
        };
        let entry = Self {
            volume: VolumeId(get_u32(bytes, 0)),
            object: get_u32(bytes, 4),
            first: get_u16(bytes, 8),
            count: get_u16(bytes, 10),
            kind,
            epoch: Epoch(get_u64(bytes, 16)),
        };
        let end = usize::from(entry.first) + usize::from(entry.count);
        let fits = kind == EntryKind::Forget || (entry.count > 0 && end <= OBJECT_BLOCKS_MAX);
        fits.then_some(entry)
    }
}

/// The fixed part of a record header or a footer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// The region's identity: a log of another cache is not ours.
    pub region: [u8; 16],
    /// The use of the segment: grows by one with each segment opened.
    pub segment_seq: u64,
    /// Record: its number. Footer: the number after the segment's last record.
    pub seq: u64,
    /// Records below this number were durable when this was written.
    pub durable_seq: u64,
    /// Segments used before this number were free when this was written.
    pub floor: u64,
    /// Page in the region where this structure lies.
    pub page: u32,
    /// Entries.
    pub entries: u32,
    /// Payload pages.
    pub blocks: u32,
}

/// Why a page is no valid header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogError {
    /// No magic: the page holds something else.
    Magic,
    /// A version this program does not know.
    Version(u32),
    /// Of another region, or another place in it.
    Foreign,
    /// Counts beyond what a structure can hold, or numbers that no log reaches.
    Counts,
    /// The checksum does not match: torn or damaged.
    Checksum,
    /// An entry that makes no sense.
    Entry,
}

fn encode_head(head: &Head, magic: u64, bytes: &mut [u8]) {
    put(bytes, 0, &magic.to_le_bytes());
    put(bytes, 8, &LOG_VERSION.to_le_bytes());
    put(bytes, 12, &[0; 4]);
    put(bytes, 16, &head.region);
    put(bytes, 32, &head.segment_seq.to_le_bytes());
    put(bytes, 40, &head.seq.to_le_bytes());
    put(bytes, 48, &head.durable_seq.to_le_bytes());
    put(bytes, 56, &head.page.to_le_bytes());
    put(bytes, 60, &head.entries.to_le_bytes());
    put(bytes, 64, &head.blocks.to_le_bytes());
    put(bytes, 68, &[0; 4]);
    put(bytes, 72, &head.floor.to_le_bytes());
}

fn decode_head(magic: u64, region: &[u8; 16], page: u32, bytes: &[u8]) -> Result<Head, LogError> {
    if bytes.len() < BLOCK_BYTES || get_u64(bytes, 0) != magic {
        return Err(LogError::Magic);
    }
    let version = get_u32(bytes, 8);
    if version != LOG_VERSION {
        return Err(LogError::Version(version));
    }
    let head = Head {
        region: get_uuid(bytes, 16),
        segment_seq: get_u64(bytes, 32),
        seq: get_u64(bytes, 40),
        durable_seq: get_u64(bytes, 48),
        floor: get_u64(bytes, 72),
        page: get_u32(bytes, 56),
        entries: get_u32(bytes, 60),
        blocks: get_u32(bytes, 64),
    };
    if head.region != *region || head.page != page {
        return Err(LogError::Foreign);
    }
    if !(1..=SEQ_MAX).contains(&head.segment_seq) || head.seq > SEQ_MAX {
        return Err(LogError::Counts);
    }
    Ok(head)
}

/// CRC32C of `bytes` with the four bytes at 12 taken as zero.
fn head_crc(crc32c: Crc32c, bytes: &[u8]) -> u32 {
    crc32c(crc32c(crc32c(0, &bytes[..12]), &[0; 4]), &bytes[16..])
}

/// Writes a record header: the fixed part, the entries, one CRC32C for each payload page.
pub fn encode_record(
    head: &Head,
    entries: &[Entry],
    crcs: impl Iterator<Item = u32>,
    page: &mut [u8],
    crc32c: Crc32c,
) {
    assert!(entries.len() <= RECORD_ENTRIES_MAX && head.entries as usize == entries.len());
    page.fill(0);
    encode_head(head, RECORD_MAGIC, page);
    let mut at = HEAD_BYTES;
    for entry in entries {
        entry.encode(&mut page[at..at + ENTRY_BYTES]);
        at += ENTRY_BYTES;
    }
    for crc in crcs {
        put(page, at, &crc.to_le_bytes());
        at += 4;
    }
    assert_eq!(at, HEAD_BYTES + entries.len() * ENTRY_BYTES + head.blocks as usize * 4);
    let crc = head_crc(crc32c, page);
    put(page, 12, &crc.to_le_bytes());
}

/// A checked record header, borrowing its page.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// The fixed part.
    pub head: Head,
    bytes: &'a [u8],
}

impl<'a> Record<'a> {
    /// Checks a page that should be the record header at `page` of `region`.
    pub fn decode(
        region: &[u8; 16],
        page: u32,
        bytes: &'a [u8],
        crc32c: Crc32c,
    ) -> Result<Self, LogError> {
        let head = decode_head(RECORD_MAGIC, region, page, bytes)?;
        if head.entries as usize > RECORD_ENTRIES_MAX || head.blocks as usize > BATCH_BLOCKS_MAX {
            return Err(LogError::Counts);
        }
        let bytes = &bytes[..BLOCK_BYTES];
        if get_u32(bytes, 12) != head_crc(crc32c, bytes) {
            return Err(LogError::Checksum);
        }
        let record = Self { head, bytes };
        let mut pages = 0;
        for index in 0..head.entries as usize {
            pages += Entry::decode(record.entry_bytes(index)).ok_or(LogError::Entry)?.pages();
        }
        if pages != head.blocks {
            return Err(LogError::Entry);
        }
        Ok(record)
    }

    fn entry_bytes(&self, index: usize) -> &'a [u8] {
        let at = HEAD_BYTES + index * ENTRY_BYTES;
        &self.bytes[at..at + ENTRY_BYTES]
    }

    /// The entries, in the order in which they were made.
    pub fn entries(self) -> impl Iterator<Item = Entry> + 'a {
        (0..self.head.entries as usize)
            .map(move |index| Entry::decode(self.entry_bytes(index)).expect("checked by decode"))
    }

    /// The CRC32C of payload page `index`.
    #[must_use]
    pub fn crc(&self, index: usize) -> u32 {
        assert!(index < self.head.blocks as usize);
        get_u32(self.bytes, HEAD_BYTES + self.head.entries as usize * ENTRY_BYTES + index * 4)
    }
}

/// One entry of a footer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FooterEntry {
    /// The entry.
    pub entry: Entry,
    /// Page in the region of its first payload page (of its header, when it has no payload).
    pub page: u32,
    /// Number of its record.
    pub seq: u64,
}

/// Pages that a footer of so many entries and payload pages takes.
#[must_use]
pub const fn footer_pages(entries: usize, blocks: usize) -> usize {
    (HEAD_BYTES + 8 + entries * FOOTER_ENTRY_BYTES + blocks * 4).div_ceil(BLOCK_BYTES)
}

/// Entries of a segment at most; one with more is sealed early. Bounds the footer.
#[must_use]
pub const fn segment_entries_max(segment_pages: u32) -> usize {
    let half = segment_pages as usize / 2;
    if half > 2 * RECORD_ENTRIES_MAX { half } else { 2 * RECORD_ENTRIES_MAX }
}

/// Collects the footer of the open segment while it fills, and encodes it when it is sealed.
///
/// The footer's bytes are a stream: entries, then checksums. The last page of the segment starts
/// with the fixed part and two checksums, then the stream begins; it goes on in the pages before
/// it, first to last, so the place of the fixed part is known without reading anything else.
#[derive(Debug)]
pub struct FooterBuilder {
    entries: alloc::vec::Vec<u8>,
    crcs: alloc::vec::Vec<u8>,
}

impl FooterBuilder {
    /// Room for so many entries and payload pages; nothing is allocated later.
    #[must_use]
    pub fn with_capacity(entries: usize, blocks: usize) -> Self {
        Self {
            entries: alloc::vec::Vec::with_capacity(entries * FOOTER_ENTRY_BYTES),
            crcs: alloc::vec::Vec::with_capacity(blocks * 4),
        }
    }

    /// Starts a new segment.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.crcs.clear();
    }

    /// Entries so far.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.entries.len() / FOOTER_ENTRY_BYTES
    }

    /// Payload pages so far.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.crcs.len() / 4
    }

    /// Adds an entry; its payload's checksums follow by [`Self::push_crc`].
    pub fn push(&mut self, entry: &FooterEntry) {
        assert!(self.entries.len() + FOOTER_ENTRY_BYTES <= self.entries.capacity());
        let mut bytes = [0; FOOTER_ENTRY_BYTES];
        entry.entry.encode(&mut bytes[..ENTRY_BYTES]);
        put(&mut bytes, ENTRY_BYTES, &entry.page.to_le_bytes());
        put(&mut bytes, ENTRY_BYTES + 4, &entry.seq.to_le_bytes());
        self.entries.extend_from_slice(&bytes);
    }

    /// Adds the checksum of the next payload page.
    pub fn push_crc(&mut self, crc: u32) {
        assert!(self.crcs.len() + 4 <= self.crcs.capacity());
        self.crcs.extend_from_slice(&crc.to_le_bytes());
    }

    /// Pages of the footer as it stands.
    #[must_use]
    pub fn pages(&self) -> usize {
        footer_pages(self.entries(), self.blocks())
    }

    /// Encodes page `index` of the footer's `self.pages()` pages.
    pub fn encode(&self, head: &Head, index: usize, page: &mut [u8], crc32c: Crc32c) {
        let pages = self.pages();
        assert!(index < pages);
        page.fill(0);
        if index + 1 < pages {
            self.stream(BLOCK_BYTES - HEAD_BYTES - 8 + index * BLOCK_BYTES, page);
            return;
        }
        encode_head(head, FOOTER_MAGIC, page);
        put(page, HEAD_BYTES, &crc32c(0, &self.entries).to_le_bytes());
        put(page, HEAD_BYTES + 4, &crc32c(0, &self.crcs).to_le_bytes());
        let fixed = crc32c(0, &page[..HEAD_BYTES + 8]);
        put(page, 12, &fixed.to_le_bytes());
        self.stream(0, &mut page[HEAD_BYTES + 8..]);
    }

    /// Copies the stream's bytes from `from` on into `out`.
    fn stream(&self, from: usize, out: &mut [u8]) {
        let mut done = 0;
        if from < self.entries.len() {
            done = (self.entries.len() - from).min(out.len());
            out[..done].copy_from_slice(&self.entries[from..from + done]);
        }
        let from = (from + done).saturating_sub(self.entries.len());
        if done < out.len() && from < self.crcs.len() {
            let rest = (self.crcs.len() - from).min(out.len() - done);
            out[done..done + rest].copy_from_slice(&self.crcs[from..from + rest]);
        }
    }
}

/// A checked footer.
#[derive(Debug)]
pub struct Footer {
    /// The fixed part.
    pub head: Head,
    entries: alloc::vec::Vec<u8>,
    crcs: alloc::vec::Vec<u8>,
}

impl Footer {
    /// How many pages the footer takes whose last page is `bytes`; checks the fixed part only.
    pub fn decode_pages(
        region: &[u8; 16],
        page: u32,
        bytes: &[u8],
        segment_pages: u32,
        crc32c: Crc32c,
    ) -> Result<(Head, u32), LogError> {
        let head = decode_head(FOOTER_MAGIC, region, page, bytes)?;
        let mut fixed = [0; HEAD_BYTES + 8];
        fixed.copy_from_slice(&bytes[..HEAD_BYTES + 8]);
        put(&mut fixed, 12, &[0; 4]);
        if get_u32(bytes, 12) != crc32c(0, &fixed) {
            return Err(LogError::Checksum);
        }
        let entries_max = segment_entries_max(segment_pages) as u32;
        if head.entries > entries_max || head.blocks > segment_pages {
            return Err(LogError::Counts);
        }
        let pages = footer_pages(head.entries as usize, head.blocks as usize) as u32;
        if pages > segment_pages {
            return Err(LogError::Counts);
        }
        Ok((head, pages))
    }

    /// Decodes a whole footer: all its pages, in the order in which they lie.
    pub fn decode(head: Head, bytes: &[u8], crc32c: Crc32c) -> Result<Self, LogError> {
        let pages = footer_pages(head.entries as usize, head.blocks as usize);
        if bytes.len() != pages * BLOCK_BYTES {
            return Err(LogError::Counts);
        }
        let last = &bytes[(pages - 1) * BLOCK_BYTES..];
        let entry_bytes = head.entries as usize * FOOTER_ENTRY_BYTES;
        let crc_bytes = head.blocks as usize * 4;
        let mut stream = alloc::vec::Vec::with_capacity(bytes.len());
        stream.extend_from_slice(&last[HEAD_BYTES + 8..]);
        stream.extend_from_slice(&bytes[..(pages - 1) * BLOCK_BYTES]);
        let crcs = stream[entry_bytes..entry_bytes + crc_bytes].to_vec();
        stream.truncate(entry_bytes);
        let sums = (get_u32(last, HEAD_BYTES), get_u32(last, HEAD_BYTES + 4));
        if sums != (crc32c(0, &stream), crc32c(0, &crcs)) {
            return Err(LogError::Checksum);
        }
        let footer = Self { head, entries: stream, crcs };
        let mut blocks = 0u64;
        for at in 0..head.entries as usize {
            let bytes = &footer.entries[at * FOOTER_ENTRY_BYTES..];
            blocks += u64::from(Entry::decode(bytes).ok_or(LogError::Entry)?.pages());
        }
        if blocks != u64::from(head.blocks) {
            return Err(LogError::Entry);
        }
        Ok(footer)
    }

    /// The entries, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = FooterEntry> + '_ {
        self.entries.chunks_exact(FOOTER_ENTRY_BYTES).map(|bytes| FooterEntry {
            entry: Entry::decode(bytes).expect("checked by decode"),
            page: get_u32(bytes, ENTRY_BYTES),
            seq: get_u64(bytes, ENTRY_BYTES + 4),
        })
    }

    /// CRC32C of payload page `index`, counted over all entries in order.
    #[must_use]
    pub fn crc(&self, index: usize) -> u32 {
        get_u32(&self.crcs, index * 4)
    }
}

#[cfg(test)]
mod tests;
