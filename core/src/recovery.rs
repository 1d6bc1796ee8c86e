//! Recovery: what a shard's log holds after a stop, a crash or a power cut.
//!
//! The log is a ring of segments, used in order of position. Sealed segments end in a footer; at
//! most two segments were being filled when the process ended (the open one and one whose footer
//! was on its way). Recovery reads every footer, then scans page by page those segments whose
//! footer cannot be trusted: the two after the newest footer, any whose footer is damaged, and any
//! with records that were not durable when the newest record was written. A scan accepts a record
//! only if its header and every payload page match their checksums, so a torn one is dropped and
//! what comes after it still counts. Scanned segments get a new footer, so that no later recovery
//! believes a record that this one dropped.

use alloc::vec;
use alloc::vec::Vec;

use crate::ids::{BLOCK_BYTES, Crc32c};
use crate::wire::log::{Footer, FooterBuilder, FooterEntry, Head, LogError, Record};

/// Where a region's log lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionLayout {
    /// The region's identity.
    pub region: [u8; 16],
    /// Pages of a segment.
    pub segment_pages: u32,
    /// Segments.
    pub segments: u32,
}

/// What recovery wants next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// Read `count` pages at page `at` of the region and hand them to `handle_read`; `ok = false`
    /// when the device could not.
    Read {
        /// First page.
        at: u32,
        /// Pages.
        count: u32,
    },
    /// Write `bytes()` at page `at`, then call `handle_written`.
    Write {
        /// First page.
        at: u32,
    },
    /// Flush the device, then take the result by `finish`.
    Done,
}

/// One entry of the log that counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogEntry {
    /// The entry and its place.
    pub at: FooterEntry,
    /// Index of its first payload page's checksum in [`Recovered::crcs`].
    pub crc: u32,
}

/// What the log holds.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Use number of each segment; 0 for a free one.
    pub segment_seqs: Vec<u64>,
    /// Every valid entry, in no particular order.
    pub entries: Vec<LogEntry>,
    /// Checksums of their payload pages.
    pub crcs: Vec<u32>,
    /// The number of the next record.
    pub next_seq: u64,
    /// The use number of the next segment.
    pub next_segment_seq: u64,
    /// Records dropped because they were torn or damaged.
    pub torn: u64,
    /// Segments that the device could not read.
    pub unreadable: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Reading the last page of segment n.
    Tail(u32),
    /// Reading the whole footer of segment n.
    Footer(u32, Head),
    /// Reading segment n whole, from the position in the scan list.
    Scan(usize),
    /// Writing the new footer of the segment just scanned.
    Seal(usize),
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Tail {
    Unused,
    Damaged,
    Sealed(Head),
}

/// The recovery machine: ask `need`, do it, tell it, until `Need::Done`.
#[derive(Debug)]
pub struct Recovery {
    layout: RegionLayout,
    crc32c: Crc32c,
    state: State,
    tails: Vec<Tail>,
    footers: Vec<Option<Footer>>,
    scan: Vec<u32>,
    builder: FooterBuilder,
    seal: Vec<u8>,
    floor: u64,
    durable_seq: u64,
    out: Recovered,
}

impl Recovery {
    /// Starts recovery of one region.
    #[must_use]
    pub fn new(layout: RegionLayout, crc32c: Crc32c) -> Self {
        let pages = layout.segment_pages as usize;
        Self {
            layout,
            crc32c,
            state: State::Tail(0),
            tails: vec![Tail::Unused; layout.segments as usize],
            footers: (0..layout.segments).map(|_| None).collect(),
            scan: Vec::new(),
            builder: FooterBuilder::with_capacity(pages, pages),
            seal: Vec::new(),
            floor: 0,
            durable_seq: 0,
            out: Recovered {
                segment_seqs: vec![0; layout.segments as usize],
                next_seq: 1,
                next_segment_seq: 1,
                ..Recovered::default()
            },
        }
    }

    /// What to do next.
    #[must_use]
    pub fn need(&self) -> Need {
        let pages = self.layout.segment_pages;
        match self.state {
            State::Tail(segment) => Need::Read { at: (segment + 1) * pages - 1, count: 1 },
            State::Footer(segment, head) => {
                let count = crate::wire::log::footer_pages(
                    head.entries as usize,
                    head.blocks as usize,
                ) as u32;
                Need::Read { at: (segment + 1) * pages - count, count }
            }
            State::Scan(index) => Need::Read { at: self.scan[index] * pages, count: pages },
            State::Seal(index) => {
                let count = (self.seal.len() / BLOCK_BYTES) as u32;
                Need::Write { at: (self.scan[index] + 1) * pages - count }
            }
            State::Done => Need::Done,
        }
    }

    /// The bytes of `Need::Write`: a multiple of the block size.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.seal
    }

    /// Takes what was read; `None` when the device failed.
    pub fn handle_read(&mut self, bytes: Option<&[u8]>) {
        match self.state {
            State::Tail(segment) => self.handle_tail(segment, bytes),
            State::Footer(segment, head) => self.handle_footer(segment, head, bytes),
            State::Scan(index) => self.handle_scan(index, bytes),
            State::Seal(_) | State::Done => panic!("recovery was given bytes it did not ask for"),
        }
    }

    /// The footer asked for by `Need::Write` is written (or could not be: then the next recovery
    /// scans the segment again).
    pub fn handle_written(&mut self) {
        let State::Seal(index) = self.state else { panic!("recovery asked for no write") };
        self.next_scan(index + 1);
    }

    /// The result.
    #[must_use]
    pub fn finish(mut self) -> Recovered {
        assert_eq!(self.state, State::Done);
        let floor = self.floor;
        let dead = |seq: u64| seq < floor;
        for seq in &mut self.out.segment_seqs {
            if dead(*seq) {
                *seq = 0;
            }
        }
        let segment_pages = self.layout.segment_pages;
        let seqs = &self.out.segment_seqs;
        self.out.entries.retain(|entry| seqs[(entry.at.page / segment_pages) as usize] != 0);
        self.out
    }

    fn handle_tail(&mut self, segment: u32, bytes: Option<&[u8]>) {
        let page = (segment + 1) * self.layout.segment_pages - 1;
        let Some(bytes) = bytes else {
            self.out.unreadable += 1;
            self.tails[segment as usize] = Tail::Damaged;
            return self.next_tail(segment + 1);
        };
        let limit = self.layout.segment_pages;
        match Footer::decode_pages(&self.layout.region, page, bytes, limit, self.crc32c) {
            Ok((head, _)) => self.state = State::Footer(segment, head),
            // A page without our mark: payload never lies there, so the segment was never sealed.
            Err(LogError::Magic) if bytes.iter().all(|byte| *byte == 0) => {
                self.next_tail(segment + 1);
            }
            Err(_) => {
                self.tails[segment as usize] = Tail::Damaged;
                self.next_tail(segment + 1);
            }
        }
    }

    fn handle_footer(&mut self, segment: u32, head: Head, bytes: Option<&[u8]>) {
        let footer = bytes.and_then(|bytes| Footer::decode(head, bytes, self.crc32c).ok());
        match footer.filter(|footer| self.in_segment(segment, footer)) {
            Some(footer) => {
                self.note(&head);
                self.tails[segment as usize] = Tail::Sealed(head);
                self.footers[segment as usize] = Some(footer);
            }
            None => self.tails[segment as usize] = Tail::Damaged,
        }
        self.next_tail(segment + 1);
    }

    /// Whether every payload page that a footer names lies in its segment.
    fn in_segment(&self, segment: u32, footer: &Footer) -> bool {
        let start = segment * self.layout.segment_pages;
        let end = start + self.layout.segment_pages;
        footer.entries().all(|entry| {
            entry.page >= start
                && entry.page.checked_add(entry.entry.pages()).is_some_and(|last| last <= end)
        })
    }

    fn note(&mut self, head: &Head) {
        self.floor = self.floor.max(head.floor);
        self.durable_seq = self.durable_seq.max(head.durable_seq);
        self.out.next_segment_seq = self.out.next_segment_seq.max(head.segment_seq + 1);
    }

    fn next_tail(&mut self, segment: u32) {
        if segment < self.layout.segments {
            self.state = State::Tail(segment);
            return;
        }
        self.choose_scans();
        self.next_scan(0);
    }

    /// Which segments to scan: the two after the newest footer, and every damaged one.
    fn choose_scans(&mut self) {
        let count = self.layout.segments;
        let newest = (0..count)
            .filter_map(|segment| match self.tails[segment as usize] {
                Tail::Sealed(head) => Some((head.segment_seq, segment)),
                _ => None,
            })
            .max();
        let first = newest.map_or(0, |(_, segment)| segment + 1);
        let open = [first % count, (first + 1) % count];
        self.scan = open.to_vec();
        for segment in 0..count {
            if self.tails[segment as usize] == Tail::Damaged && !open.contains(&segment) {
                self.scan.push(segment);
            }
        }
    }

    /// Goes on with the scan list; at its end adds the sealed segments that may hold records which
    /// were never made durable, and when none is left takes in the footers.
    fn next_scan(&mut self, index: usize) {
        if index == self.scan.len() {
            let unsure = (0..self.layout.segments).find(|segment| {
                let footer = self.footers[*segment as usize].as_ref();
                footer.is_some_and(|footer| footer.head.seq > self.durable_seq)
                    && !self.scan.contains(segment)
            });
            match unsure {
                Some(segment) => self.scan.push(segment),
                None => return self.take_footers(),
            }
        }
        self.state = State::Scan(index);
    }

    fn take_footers(&mut self) {
        for segment in 0..self.layout.segments as usize {
            let Some(footer) = self.footers[segment].take() else { continue };
            self.out.segment_seqs[segment] = footer.head.segment_seq;
            self.out.next_seq = self.out.next_seq.max(footer.head.seq);
            let mut crc = 0;
            for at in footer.entries() {
                self.out.entries.push(LogEntry { at, crc: self.out.crcs.len() as u32 });
                for _ in 0..at.entry.pages() {
                    self.out.crcs.push(footer.crc(crc));
                    crc += 1;
                }
            }
        }
        self.state = State::Done;
    }

    fn handle_scan(&mut self, index: usize, bytes: Option<&[u8]>) {
        let segment = self.scan[index];
        let Some(bytes) = bytes else {
            self.out.unreadable += 1;
            return self.next_scan(index + 1);
        };
        let newest = self.newest_use(segment, bytes);
        let sealed = match self.tails[segment as usize] {
            Tail::Sealed(head) => head.segment_seq,
            _ => 0,
        };
        let Some(seq) = newest.filter(|seq| *seq >= sealed) else {
            // Nothing newer than the footer: an old use, sealed and durable long ago.
            return self.next_scan(index + 1);
        };
        self.footers[segment as usize] = None;
        let end = self.accept_records(segment, seq, bytes);
        self.out.segment_seqs[segment as usize] = seq;
        self.out.next_segment_seq = self.out.next_segment_seq.max(seq + 1);
        self.encode_seal(segment, seq, end);
        self.state = State::Seal(index);
    }

    /// The highest use number among the valid headers of a segment.
    fn newest_use(&self, segment: u32, bytes: &[u8]) -> Option<u64> {
        let start = segment * self.layout.segment_pages;
        let headers = bytes.chunks_exact(BLOCK_BYTES).zip(start..).filter_map(|(page, at)| {
            Record::decode(&self.layout.region, at, page, self.crc32c).ok()
        });
        headers.map(|record| record.head.segment_seq).max()
    }

    /// Takes in the whole records of one use of a segment; returns the number after the last.
    fn accept_records(&mut self, segment: u32, seq: u64, bytes: &[u8]) -> u64 {
        let start = segment * self.layout.segment_pages;
        let pages = self.layout.segment_pages as usize;
        self.builder.clear();
        let mut end = 0;
        let mut at = 0;
        while at < pages {
            let page = &bytes[at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES];
            let region = self.layout.region;
            let record = Record::decode(&region, start + at as u32, page, self.crc32c);
            let Some(record) = record.ok().filter(|record| record.head.segment_seq == seq) else {
                at += 1;
                continue;
            };
            end = end.max(record.head.seq + 1);
            self.note(&record.head);
            if !self.payload_matches(&record, at + 1, bytes) {
                self.out.torn += 1;
                at += 1;
                continue;
            }
            self.accept(&record, start + at as u32);
            at += 1 + record.head.blocks as usize;
        }
        self.out.next_seq = self.out.next_seq.max(end);
        end
    }

    fn payload_matches(&self, record: &Record<'_>, at: usize, bytes: &[u8]) -> bool {
        (0..record.head.blocks as usize).all(|index| {
            let from = (at + index) * BLOCK_BYTES;
            let page = bytes.get(from..from + BLOCK_BYTES);
            page.is_some_and(|page| (self.crc32c)(0, page) == record.crc(index))
        })
    }

    fn accept(&mut self, record: &Record<'_>, header: u32) {
        let mut block = 0;
        for entry in record.entries() {
            let page = if entry.pages() == 0 { header } else { header + 1 + block as u32 };
            let at = FooterEntry { entry, page, seq: record.head.seq };
            self.builder.push(&at);
            self.out.entries.push(LogEntry { at, crc: self.out.crcs.len() as u32 });
            for _ in 0..entry.pages() {
                self.builder.push_crc(record.crc(block));
                self.out.crcs.push(record.crc(block));
                block += 1;
            }
        }
    }

    fn encode_seal(&mut self, segment: u32, seq: u64, end: u64) {
        let head = Head {
            region: self.layout.region,
            segment_seq: seq,
            seq: end,
            durable_seq: 0,
            floor: self.floor,
            page: (segment + 1) * self.layout.segment_pages - 1,
            entries: self.builder.entries() as u32,
            blocks: self.builder.blocks() as u32,
        };
        let pages = self.builder.pages();
        self.seal.clear();
        self.seal.resize(pages * BLOCK_BYTES, 0);
        for (index, page) in self.seal.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            self.builder.encode(&head, index, page, self.crc32c);
        }
    }
}
