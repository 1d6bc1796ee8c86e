//! The log of a shard: a ring of segments on NVMe that is filled by appending records.
//!
//! ```text
//! segment:  Free --open--> Open --seal--> Sealed --reclaim--> Retiring --flushed--> Free
//! record:   Free --begin--> Open --close--> InFlight --complete--> Free
//! ```
//!
//! Segments are used in order of position and freed in the same order, oldest first. That is what
//! makes recovery simple and safe: whenever an old version of a block is still in the log, all
//! newer ones are too, so the newest wins and nothing stale can come back.
//!
//! A record has its place from the moment it is begun, so the page of every block is known when the
//! block is appended. What is appended between two closes shares a record (group commit).

use alloc::boxed::Box;

use crate::buffer::{BlockAddr, BufferId};
use crate::ids::{Crc32c, PageId};
use crate::limits::{BATCH_BLOCKS_MAX, OP_PAGES_MAX};
use crate::onode::NIL;
use crate::recovery::RegionLayout;
use crate::wire::log::{
    Entry, FooterBuilder, FooterEntry, Head, RECORD_ENTRIES_MAX, encode_record, footer_pages,
    segment_entries_max,
};

/// Records in flight at most; one more is open. Few, so that load makes records larger instead.
pub const LOG_DEPTH: usize = 4;
/// Segments that only reclaim may open: what it needs to move one full segment out of the way.
pub const RESERVED_SEGMENTS: u32 = 3;

/// Pages that the log needs for headers and a footer, from the shard's share of the arena.
#[must_use]
pub const fn meta_pages(segment_pages: u32) -> usize {
    LOG_DEPTH + 1 + footer_pages(segment_entries_max(segment_pages), segment_pages as usize)
}

/// What becomes of a block's buffer when its record is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// It held new data: now it is clean.
    Writing,
    /// It held new data that is not kept in RAM.
    Passing,
    /// It was pinned for the record.
    Pinned,
}

/// One payload page of a record.
#[derive(Clone, Copy, Debug)]
pub struct RecordBlock {
    /// CRC32C of the page.
    pub crc: u32,
    /// Its buffer.
    pub buffer: BufferId,
    /// What to do when the record is written.
    pub role: Role,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum RecordState {
    Free,
    Open,
    InFlight,
}

/// A record from its first entry to the end of its write.
#[derive(Debug)]
pub struct RecordSlot {
    state: RecordState,
    seq: u64,
    at: u32,
    blocks_max: usize,
    /// The header page, then the payload.
    pub pages: heapless::Vec<PageId, OP_PAGES_MAX>,
    /// What belongs to each payload page.
    pub blocks: heapless::Vec<RecordBlock, BATCH_BLOCKS_MAX>,
    /// What it says.
    pub entries: heapless::Vec<Entry, RECORD_ENTRIES_MAX>,
    /// The tasks that wait for it.
    pub owners: heapless::Vec<u32, RECORD_ENTRIES_MAX>,
    /// How often the device failed to write it.
    pub failures: u8,
}

/// Where a segment is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SegmentState {
    /// Holds nothing.
    Free,
    /// Being filled.
    Open,
    /// Full.
    Sealed,
    /// Holds nothing that counts, but what replaced it may not be durable yet.
    Retiring,
}

/// One segment.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Which use of the segment this is; 0 when never used.
    pub seq: u64,
    /// Pages that some leaf refers to.
    pub live: u32,
    /// Device reads under way.
    pub readers: u32,
    /// Its state.
    pub state: SegmentState,
}

/// A footer on its way to the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FooterWrite {
    /// First page in the region.
    pub at: u32,
    /// Pages.
    pub count: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum FooterState {
    Idle,
    /// Encoded by builder `usize`; not yet handed out, or being written.
    Ready(usize, Head),
    InFlight(usize, Head),
}

/// The log.
#[derive(Debug)]
pub struct Log {
    layout: RegionLayout,
    crc32c: Crc32c,
    /// For each page of the region: the leaf and block it is live for, or [`NIL`].
    owners: Box<[u32]>,
    segments: Box<[Segment]>,
    head: u32,
    used: u32,
    tail: u32,
    free: u32,
    next_segment_seq: u64,
    next_seq: u64,
    durable_seq: u64,
    records: Box<[RecordSlot]>,
    header_pages: Box<[PageId]>,
    footer_pages: Box<[PageId]>,
    open: Option<usize>,
    builders: [FooterBuilder; 2],
    filling: usize,
    footer: FooterState,
}

impl Log {
    /// A log whose segments are in use as `segment_seqs` says (0: free). `pages` are
    /// [`meta_pages`] pages of the arena.
    #[must_use]
    pub fn new(
        layout: RegionLayout,
        crc32c: Crc32c,
        pages: &[PageId],
        segment_seqs: &[u64],
        next_seq: u64,
        next_segment_seq: u64,
    ) -> Self {
        assert_eq!(pages.len(), meta_pages(layout.segment_pages));
        assert_eq!(segment_seqs.len(), layout.segments as usize);
        let mut segments: Box<[Segment]> = segment_seqs
            .iter()
            .map(|seq| Segment {
                seq: *seq,
                live: 0,
                readers: 0,
                state: if *seq == 0 { SegmentState::Free } else { SegmentState::Sealed },
            })
            .collect();
        let used = || (0..layout.segments).filter(|index| segment_seqs[*index as usize] > 0);
        let newest = used().max_by_key(|index| segment_seqs[*index as usize]);
        let oldest = used().min_by_key(|index| segment_seqs[*index as usize]);
        let first = newest.map_or(0, |index| (index + 1) % layout.segments);
        // A segment inside the ring that the device could not read holds nothing, but the ring is
        // freed in order, so it waits for its turn.
        let mut index = oldest.unwrap_or(first);
        while index != first {
            segments[index as usize].state = SegmentState::Sealed;
            index = (index + 1) % layout.segments;
        }
        let builder = || {
            let entries = segment_entries_max(layout.segment_pages);
            FooterBuilder::with_capacity(entries, layout.segment_pages as usize)
        };
        let record = |_| RecordSlot {
            state: RecordState::Free,
            seq: 0,
            at: 0,
            blocks_max: 0,
            pages: heapless::Vec::new(),
            blocks: heapless::Vec::new(),
            entries: heapless::Vec::new(),
            owners: heapless::Vec::new(),
            failures: 0,
        };
        Self {
            layout,
            crc32c,
            owners: core::iter::repeat_n(NIL, (layout.segment_pages * layout.segments) as usize)
                .collect(),
            free: segments.iter().filter(|segment| segment.state == SegmentState::Free).count()
                as u32,
            segments,
            // Before the first segment is opened, the head is the one before it, full.
            head: (first + layout.segments - 1) % layout.segments,
            used: layout.segment_pages,
            tail: oldest.unwrap_or(first),
            next_segment_seq,
            next_seq,
            durable_seq: next_seq,
            records: (0..=LOG_DEPTH).map(record).collect(),
            header_pages: pages[..=LOG_DEPTH].into(),
            footer_pages: pages[LOG_DEPTH + 1..].into(),
            open: None,
            builders: [builder(), builder()],
            filling: 0,
            footer: FooterState::Idle,
        }
    }

    /// The leaf and block that a page of the region is live for, or [`NIL`].
    #[must_use]
    pub fn owner(&self, page: u32) -> u32 {
        self.owners[page as usize]
    }

    /// The page holds live data of a block.
    pub fn set_owner(&mut self, page: u32, addr: BlockAddr) {
        debug_assert_eq!(self.owners[page as usize], NIL);
        self.owners[page as usize] = addr.0;
        self.segment_mut(page).live += 1;
    }

    /// The page's data moved from one leaf to another.
    pub fn change_owner(&mut self, page: u32, addr: BlockAddr) {
        debug_assert_ne!(self.owners[page as usize], NIL);
        self.owners[page as usize] = addr.0;
    }

    /// The page's data counts no more.
    pub fn clear_owner(&mut self, page: u32) {
        debug_assert_ne!(self.owners[page as usize], NIL);
        self.owners[page as usize] = NIL;
        self.segment_mut(page).live -= 1;
    }

    /// The segment that a page of the region belongs to.
    pub fn segment_mut(&mut self, page: u32) -> &mut Segment {
        &mut self.segments[(page / self.layout.segment_pages) as usize]
    }

    /// All segments.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Pages of a segment.
    #[must_use]
    pub fn segment_pages(&self) -> u32 {
        self.layout.segment_pages
    }

    /// Blocks that the region holds when it is full.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        u64::from(self.layout.segments) * u64::from(self.layout.segment_pages)
    }

    /// Free segments.
    #[must_use]
    pub fn free_segments(&self) -> u32 {
        self.free
    }

    /// The oldest segment in use, if it is sealed.
    #[must_use]
    pub fn oldest(&self) -> Option<u32> {
        let sealed = self.segments[self.tail as usize].state == SegmentState::Sealed;
        sealed.then_some(self.tail)
    }

    /// The segment that new records go to.
    #[must_use]
    pub fn head(&self) -> u32 {
        self.head
    }

    /// The oldest segment in use.
    #[must_use]
    pub fn tail(&self) -> u32 {
        self.tail
    }

    /// Marks the oldest segment as empty but for durability.
    pub fn retire_oldest(&mut self) {
        let segment = &mut self.segments[self.tail as usize];
        assert!(segment.state == SegmentState::Sealed && segment.live == 0);
        segment.state = SegmentState::Retiring;
    }

    /// Frees the oldest segment: all that replaced its content is durable.
    pub fn free_oldest(&mut self) {
        let segment = &mut self.segments[self.tail as usize];
        assert!(segment.state == SegmentState::Retiring && segment.live == 0);
        assert_eq!(segment.readers, 0);
        segment.state = SegmentState::Free;
        self.free += 1;
        self.tail = (self.tail + 1) % self.layout.segments;
    }

    /// The number that the next record gets: everything appended so far has a lower one.
    #[must_use]
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Records below this number are written (perhaps not durable).
    #[must_use]
    pub fn completed_seq(&self) -> u64 {
        let busy = self.records.iter().filter(|record| record.state != RecordState::Free);
        busy.map(|record| record.seq).min().unwrap_or(self.next_seq)
    }

    /// Blocks of records that are not written yet.
    #[must_use]
    pub fn unwritten_blocks(&self) -> usize {
        let busy = self.records.iter().filter(|record| record.state != RecordState::Free);
        busy.map(|record| record.blocks.len()).sum()
    }

    /// Whether a page belongs to a record that is not written yet.
    #[must_use]
    pub fn is_unwritten(&self, page: u32) -> bool {
        self.records.iter().any(|record| {
            let end = record.at + record.pages.len() as u32;
            record.state != RecordState::Free && (record.at..end).contains(&page)
        })
    }

    /// Records below this number are durable.
    #[must_use]
    pub fn durable_seq(&self) -> u64 {
        self.durable_seq
    }

    /// A device flush ended that began when records below `seq` were written.
    pub fn set_durable(&mut self, seq: u64) {
        self.durable_seq = self.durable_seq.max(seq);
    }

    /// Sees to an open record with room for one more entry and, unless `blocks` is 0, at least one
    /// block; returns how many of `blocks` fit. `None`: all records are in flight, or there is no
    /// free segment. `reclaim` may open the reserved segments.
    pub fn begin(&mut self, blocks: usize, reclaim: bool) -> Option<usize> {
        if let Some(open) = self.open {
            let record = &self.records[open];
            let room = record.blocks_max - record.blocks.len();
            let fits = !record.entries.is_full() && (blocks == 0 || room > 0);
            return fits.then_some(room.min(blocks));
        }
        let slot = self.records.iter().position(|record| record.state == RecordState::Free)?;
        let blocks_max = match self.record_room() {
            Some(room) => room,
            None => {
                self.next_segment(reclaim)?;
                self.record_room().expect("an empty segment has room for a record")
            }
        };
        let at = self.head * self.layout.segment_pages + self.used;
        let record = &mut self.records[slot];
        record.state = RecordState::Open;
        record.seq = self.next_seq;
        record.at = at;
        record.blocks_max = blocks_max;
        record.failures = 0;
        record.pages.clear();
        record.pages.push(self.header_pages[slot]).expect("empty");
        record.blocks.clear();
        record.entries.clear();
        record.owners.clear();
        self.next_seq += 1;
        self.open = Some(slot);
        Some(blocks_max.min(blocks))
    }

    /// Payload pages that a record at the head can have; `None` when the segment is full.
    fn record_room(&self) -> Option<usize> {
        let builder = &self.builders[self.filling];
        let pages = self.layout.segment_pages as usize;
        let entries = builder.entries() + RECORD_ENTRIES_MAX;
        if entries > segment_entries_max(self.layout.segment_pages) {
            return None;
        }
        let limit = BATCH_BLOCKS_MAX.min(pages / 4);
        let footer = footer_pages(entries, builder.blocks() + limit);
        let room = pages.checked_sub(self.used as usize + 1 + footer)?.min(limit);
        // A small last record rather than unused pages: what reclaim moves must fit into the room
        // that it frees.
        (room > 0).then_some(room)
    }

    /// Seals the head and opens the segment after it.
    fn next_segment(&mut self, reclaim: bool) -> Option<()> {
        let reserved = if reclaim { 0 } else { RESERVED_SEGMENTS };
        if self.free <= reserved || self.footer != FooterState::Idle {
            return None;
        }
        if self.segments[self.head as usize].state == SegmentState::Open {
            self.seal();
        }
        self.head = (self.head + 1) % self.layout.segments;
        let segment = &mut self.segments[self.head as usize];
        assert_eq!(segment.state, SegmentState::Free, "the ring is freed in order");
        segment.state = SegmentState::Open;
        segment.seq = self.next_segment_seq;
        self.next_segment_seq += 1;
        self.free -= 1;
        self.used = 0;
        Some(())
    }

    fn seal(&mut self) {
        let builder = &self.builders[self.filling];
        let head = Head {
            page: (self.head + 1) * self.layout.segment_pages - 1,
            entries: builder.entries() as u32,
            blocks: builder.blocks() as u32,
            ..self.structure_head(self.next_seq)
        };
        self.footer = FooterState::Ready(self.filling, head);
        self.segments[self.head as usize].state = SegmentState::Sealed;
        self.filling ^= 1;
        self.builders[self.filling].clear();
    }

    fn structure_head(&self, seq: u64) -> Head {
        Head {
            region: self.layout.region,
            segment_seq: self.segments[self.head as usize].seq,
            seq,
            durable_seq: self.durable_seq,
            floor: self.segments[self.tail as usize].seq,
            page: 0,
            entries: 0,
            blocks: 0,
        }
    }

    /// Appends an entry to the open record; its blocks follow by [`Self::push_block`]. `owner` is
    /// told when the record is written.
    pub fn push_entry(&mut self, entry: Entry, owner: Option<u32>) {
        let record = &mut self.records[self.open.expect("begin first")];
        record.entries.push(entry).expect("begin left room");
        if let Some(owner) = owner {
            record.owners.push(owner).expect("no more owners than entries");
        }
    }

    /// Makes the last entry one block longer.
    pub fn extend_entry(&mut self) {
        let record = &mut self.records[self.open.expect("begin first")];
        record.entries.last_mut().expect("an entry was pushed").count += 1;
    }

    /// Appends one block of the last entry; returns its page in the region.
    pub fn push_block(&mut self, page: PageId, block: RecordBlock) -> u32 {
        let record = &mut self.records[self.open.expect("begin first")];
        assert!(record.blocks.len() < record.blocks_max);
        record.pages.push(page).expect("begin left room");
        record.blocks.push(block).expect("begin left room");
        record.at + record.blocks.len() as u32
    }

    /// Whether a record is open and, as far as group commit goes, may be closed now.
    #[must_use]
    pub fn is_ripe(&self) -> bool {
        let flying = self.records.iter().filter(|record| record.state == RecordState::InFlight);
        self.open.is_some() && flying.count() < LOG_DEPTH
    }

    /// Whether a record is open.
    #[must_use]
    pub fn has_open(&self) -> bool {
        self.open.is_some()
    }

    /// Closes the open record: it is to be written now. Returns its slot, place and page count.
    pub fn close(&mut self) -> Option<(usize, u32, u32)> {
        let slot = self.open.take()?;
        let record = &mut self.records[slot];
        record.state = RecordState::InFlight;
        let builder = &mut self.builders[self.filling];
        let mut page = record.at + 1;
        for entry in &record.entries {
            let at = if entry.pages() == 0 { record.at } else { page };
            builder.push(&FooterEntry { entry: *entry, page: at, seq: record.seq });
            page += entry.pages();
        }
        for block in &record.blocks {
            builder.push_crc(block.crc);
        }
        let count = record.pages.len() as u32;
        assert_eq!(page, record.at + count, "entries and blocks agree");
        self.used += count;
        Some((slot, record.at, count))
    }

    /// A record in flight.
    #[must_use]
    pub fn record(&self, slot: usize) -> &RecordSlot {
        &self.records[slot]
    }

    /// A record in flight.
    pub fn record_mut(&mut self, slot: usize) -> &mut RecordSlot {
        &mut self.records[slot]
    }

    /// A record's number and place.
    #[must_use]
    pub fn record_at(&self, slot: usize) -> (u64, u32) {
        (self.records[slot].seq, self.records[slot].at)
    }

    /// The record is written and dealt with.
    pub fn complete(&mut self, slot: usize) {
        assert_eq!(self.records[slot].state, RecordState::InFlight);
        self.records[slot].state = RecordState::Free;
    }

    /// Fills the header page of a closed record.
    pub fn encode_record(&self, slot: usize, page: &mut [u8]) {
        let record = &self.records[slot];
        let segment = &self.segments[(record.at / self.layout.segment_pages) as usize];
        let head = Head {
            segment_seq: segment.seq,
            page: record.at,
            entries: record.entries.len() as u32,
            blocks: record.blocks.len() as u32,
            ..self.structure_head(record.seq)
        };
        let crcs = record.blocks.iter().map(|block| block.crc);
        encode_record(&head, &record.entries, crcs, page, self.crc32c);
    }

    /// The footer to be written now, once for each sealed segment.
    pub fn take_footer(&mut self) -> Option<FooterWrite> {
        let FooterState::Ready(builder, head) = self.footer else { return None };
        self.footer = FooterState::InFlight(builder, head);
        let count = self.builders[builder].pages() as u32;
        Some(FooterWrite { at: head.page + 1 - count, count })
    }

    /// The pages of the footer in flight.
    #[must_use]
    pub fn footer_pages(&self) -> &[PageId] {
        let FooterState::InFlight(builder, _) = self.footer else { return &[] };
        &self.footer_pages[..self.builders[builder].pages()]
    }

    /// Fills page `index` of the footer in flight.
    pub fn encode_footer(&self, index: usize, page: &mut [u8]) {
        let FooterState::InFlight(builder, head) = self.footer else {
            panic!("no footer is being written")
        };
        self.builders[builder].encode(&head, index, page, self.crc32c);
    }

    /// The footer is written. If the device failed, recovery scans the segment instead.
    pub fn footer_done(&mut self) {
        assert!(matches!(self.footer, FooterState::InFlight(..)));
        self.footer = FooterState::Idle;
    }

    /// Recounts what is kept as counters. For debug checks and tests.
    pub fn check(&self) {
        let pages = self.layout.segment_pages as usize;
        for (index, segment) in self.segments.iter().enumerate() {
            let owners = &self.owners[index * pages..(index + 1) * pages];
            let live = owners.iter().filter(|owner| **owner != NIL).count();
            assert_eq!(live, segment.live as usize, "live pages of segment {index}");
        }
        let free = self.segments.iter().filter(|segment| segment.state == SegmentState::Free);
        assert_eq!(free.count(), self.free as usize);
    }
}

#[cfg(test)]
mod tests;
