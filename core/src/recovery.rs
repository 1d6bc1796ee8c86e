//! Recovery: what a shard's log holds after a stop, a crash or a power cut.
//!
//! The log is a ring of segments, used in order of position, so their use numbers ascend around the
//! ring. Sealed segments end in a footer. Recovery reads every footer, then scans page by page
//! those segments whose footer cannot be trusted:
//!
//! * the two after the newest footer: the open one, and one whose footer was on its way;
//! * those with a damaged footer, or one that is out of order: its successor is from an earlier
//!   lap, so the footer of this lap never became durable;
//! * those with records that were not durable when the newest record was written.
//!
//! A scan accepts a record only if its header and every payload page match their checksums, so a
//! torn one is dropped and what comes after it still counts. Scanned segments get a new footer, so
//! that no later recovery believes a record that this one dropped.
//!
//! A power cut can leave whole segments of records that this recovery does not find, further on in
//! the ring. They must not come back later. So the next numbers skip all that these can have, and a
//! *fence*, an empty sealed segment, makes that known before anything is written after it.

use alloc::vec;
use alloc::vec::Vec;

use crate::ids::{BLOCK_BYTES, Crc32c, Epoch, VolumeId};
use crate::wire::log::{
    EntryKind, Footer, FooterBuilder, FooterEntry, Head, LogError, Record, footer_pages,
    segment_entries_max,
};

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
    /// Stretches of the log whose headers are damaged though they were durable: what they held is
    /// not known, so what an older record says of any block may be wrong. Not to be served.
    pub damaged: u64,
}

impl Recovered {
    /// The highest epoch of a volume's entries, and how many blocks were written or zeroed in it
    /// that may not be in the store: more than there are, where blocks were written again.
    #[must_use]
    pub fn volume(&self, volume: VolumeId) -> (Epoch, u64) {
        let ours = || self.entries.iter().filter(move |entry| entry.at.entry.volume == volume);
        let is_forget = |entry: &&LogEntry| entry.at.entry.kind == EntryKind::Forget;
        let void = ours().filter(is_forget).map(|entry| entry.at.seq).max().unwrap_or(0);
        let mut epoch = Epoch::ZERO;
        let mut blocks = 0;
        for entry in ours().filter(|entry| entry.at.seq > void) {
            epoch = epoch.max(entry.at.entry.epoch);
            if matches!(entry.at.entry.kind, EntryKind::Dirty | EntryKind::Zeroes) {
                blocks += u64::from(entry.at.entry.count);
            }
        }
        (epoch, blocks)
    }
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
    /// Writing the footer of an empty segment.
    Fence(u32),
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Tail {
    Unused,
    Damaged,
    Sealed(Head),
}

/// A segment to scan, and which of its uses count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Scan {
    segment: u32,
    /// Use numbers in here fit its place in the ring.
    between: (u64, u64),
    /// So do those after the newest footer.
    open: bool,
    /// The use that a sound footer names, though its records may not be durable.
    sealed: Option<u64>,
}

/// The recovery machine: ask `need`, do it, tell it, until `Need::Done`.
#[derive(Debug)]
pub struct Recovery {
    layout: RegionLayout,
    crc32c: Crc32c,
    state: State,
    tails: Vec<Tail>,
    footers: Vec<Option<Footer>>,
    scan: Vec<Scan>,
    newest: u64,
    /// Uses with damaged headers, and how many stretches of each.
    damaged: Vec<(u64, u64)>,
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
        let entries = segment_entries_max(layout.segment_pages);
        Self {
            layout,
            crc32c,
            state: State::Tail(0),
            tails: vec![Tail::Unused; layout.segments as usize],
            footers: (0..layout.segments).map(|_| None).collect(),
            scan: Vec::new(),
            newest: 0,
            damaged: Vec::new(),
            builder: FooterBuilder::with_capacity(entries, pages),
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
                let count = footer_pages(head.entries as usize, head.blocks as usize) as u32;
                Need::Read { at: (segment + 1) * pages - count, count }
            }
            State::Scan(index) => Need::Read { at: self.scan[index].segment * pages, count: pages },
            State::Seal(index) => {
                let count = (self.seal.len() / BLOCK_BYTES) as u32;
                Need::Write { at: (self.scan[index].segment + 1) * pages - count }
            }
            State::Fence(segment) => Need::Write { at: (segment + 1) * pages - 1 },
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
            State::Seal(_) | State::Fence(_) | State::Done => {
                panic!("recovery was given bytes it did not ask for")
            }
        }
    }

    /// The footer asked for by `Need::Write` is written (or could not be: then the next recovery
    /// scans the segment again).
    pub fn handle_written(&mut self) {
        match self.state {
            State::Seal(index) => self.next_scan(index + 1),
            State::Fence(_) => self.state = State::Done,
            _ => panic!("recovery asked for no write"),
        }
    }

    /// Damaged stretches of the log, once `need` says `Done`: see [`Recovered::damaged`].
    #[must_use]
    pub fn damaged(&self) -> u64 {
        self.out.damaged
    }

    /// Gives up all that a damaged log holds: it is known that the store has it too. A fence makes
    /// this durable; `need` says what to write.
    ///
    /// # Panics
    ///
    /// If recovery is not done.
    pub fn give_up(&mut self) {
        assert_eq!(self.state, State::Done, "only a whole recovery is given up");
        let seq = self.out.next_segment_seq;
        self.out.next_segment_seq += 1;
        self.out.entries.clear();
        self.out.crcs.clear();
        self.out.segment_seqs.fill(0);
        self.out.segment_seqs[0] = seq;
        self.out.damaged = 0;
        self.floor = seq;
        self.builder.clear();
        self.encode_seal(0, seq, self.out.next_seq);
        self.state = State::Fence(0);
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
            (start..end).contains(&entry.page)
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

    /// Which segments to scan: the two after the newest footer, and those out of order.
    fn choose_scans(&mut self) {
        let count = self.layout.segments;
        let sealed = |segment: u32| match self.tails[segment as usize] {
            Tail::Sealed(head) => Some(head.segment_seq),
            Tail::Unused | Tail::Damaged => None,
        };
        let newest = (0..count).filter_map(|segment| Some((sealed(segment)?, segment))).max();
        self.newest = newest.map_or(0, |(seq, _)| seq);
        let first = newest.map_or(0, |(_, segment)| (segment + 1) % count);
        let mut scan = Vec::new();
        let mut before = 0;
        for step in 0..count {
            let segment = (first + step) % count;
            let seq = sealed(segment);
            let in_order = seq.is_some_and(|seq| seq > before);
            // The first lap begins at the first segment, so those before the newest were used.
            let unused = self.tails[segment as usize] == Tail::Unused
                && before == 0
                && newest.is_none_or(|(_, newest)| segment > newest);
            let open = step < 2;
            if open || !(in_order || unused) {
                let later = (step + 1..count).filter_map(|step| sealed((first + step) % count));
                let after = later.filter(|seq| *seq > before).min().unwrap_or(before);
                scan.push(Scan { segment, between: (before, after), open, sealed: None });
            }
            before = before.max(seq.unwrap_or(0));
        }
        self.scan = scan;
    }

    /// Goes on with the scan list; at its end adds the sealed segments that may hold records which
    /// were never made durable, and when none is left takes in the footers.
    fn next_scan(&mut self, index: usize) {
        if index == self.scan.len() {
            let unsure = (0..self.layout.segments).find_map(|segment| {
                let footer = self.footers[segment as usize].as_ref()?;
                let known = self.scan.iter().any(|scan| scan.segment == segment);
                let seq = footer.head.segment_seq;
                (footer.head.seq > self.durable_seq && !known).then_some((segment, seq))
            });
            let Some((segment, seq)) = unsure else { return self.take_footers() };
            let between = (seq - 1, seq + 1);
            self.scan.push(Scan { segment, between, open: false, sealed: Some(seq) });
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
        self.raise_fence();
    }

    /// Skips the numbers that lost records can have, and sees to it that they stay lost.
    fn raise_fence(&mut self) {
        let live = self.damaged.iter().filter(|(seq, _)| *seq >= self.floor);
        self.out.damaged = live.map(|(_, gaps)| gaps).sum();
        let (segments, pages) = (self.layout.segments, self.layout.segment_pages);
        self.out.next_segment_seq += u64::from(segments);
        self.out.next_seq += u64::from(segments) * u64::from(pages);
        let seqs = &self.out.segment_seqs;
        let used = (0..segments).filter(|segment| seqs[*segment as usize] > 0);
        let newest = used.max_by_key(|segment| seqs[*segment as usize]);
        let Some(newest) = newest.filter(|_| self.out.damaged == 0) else {
            self.state = State::Done;
            return;
        };
        // An empty newest segment is the last recovery's fence: it is raised, not followed by
        // another.
        let empty = !self.out.entries.iter().any(|entry| entry.at.page / pages == newest);
        let fence = if empty { newest } else { (newest + 1) % segments };
        let held = seqs[fence as usize];
        if !empty && held > 0 && held >= self.floor {
            // The ring is full: what comes after the newest segment is the oldest, all found.
            self.state = State::Done;
            return;
        }
        let seq = self.out.next_segment_seq;
        self.out.next_segment_seq += 1;
        self.out.segment_seqs[fence as usize] = seq;
        self.out.entries.retain(|entry| entry.at.page / pages != fence);
        self.builder.clear();
        self.encode_seal(fence, seq, self.out.next_seq);
        self.state = State::Fence(fence);
    }

    fn handle_scan(&mut self, index: usize, bytes: Option<&[u8]>) {
        let scan = self.scan[index];
        let segment = scan.segment;
        let Some(bytes) = bytes else {
            self.out.unreadable += 1;
            return self.next_scan(index + 1);
        };
        // A footer can outlive all its records in a power cut: then the segment is empty.
        let Some(seq) = self.newest_use(&scan, bytes).or(scan.sealed) else {
            // Nothing newer than the footer, if it has one: an old use, durable long ago.
            return self.next_scan(index + 1);
        };
        self.footers[segment as usize] = None;
        let (end, gaps) = self.accept_records(segment, seq, bytes);
        self.out.segment_seqs[segment as usize] = seq;
        self.out.next_segment_seq = self.out.next_segment_seq.max(seq + 1);
        // The oldest use of the ring, in the place of the open one, may have been free, and what is
        // missing of it overwritten.
        let reused = scan.open && seq < self.newest;
        if gaps > 0 && !reused {
            // Left as it is, so that the damage is seen again.
            self.damaged.push((seq, gaps));
            return self.next_scan(index + 1);
        }
        self.encode_seal(segment, seq, end);
        self.state = State::Seal(index);
    }

    /// The highest use number that fits the segment, among its valid headers.
    fn newest_use(&self, scan: &Scan, bytes: &[u8]) -> Option<u64> {
        let start = scan.segment * self.layout.segment_pages;
        let headers = bytes.chunks_exact(BLOCK_BYTES).zip(start..).filter_map(|(page, at)| {
            Record::decode(&self.layout.region, at, page, self.crc32c).ok()
        });
        let (after, before) = scan.between;
        let fits = |seq: &u64| scan.open && *seq > self.newest || *seq > after && *seq < before;
        headers.map(|record| record.head.segment_seq).filter(fits).max()
    }

    /// Takes in the whole records of one use of a segment; returns the number after the last, and
    /// how many gaps there are before durable ones.
    fn accept_records(&mut self, segment: u32, seq: u64, bytes: &[u8]) -> (u64, u64) {
        let start = segment * self.layout.segment_pages;
        let pages = self.layout.segment_pages as usize;
        self.builder.clear();
        self.note_headers(start, seq, bytes);
        let mut end = 0;
        let mut at = 0;
        let mut expected = 0;
        let mut gaps = 0;
        while at < pages {
            let page = &bytes[at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES];
            let region = self.layout.region;
            let record = Record::decode(&region, start + at as u32, page, self.crc32c);
            let Some(record) = record.ok().filter(|record| record.head.segment_seq == seq) else {
                at += 1;
                continue;
            };
            end = end.max(record.head.seq + 1);
            // Records leave no gaps, and all before a durable one are durable too.
            if at > expected && record.head.seq < self.durable_seq {
                gaps += 1;
            }
            expected = at + 1 + record.head.blocks as usize;
            let entries = self.builder.entries() + record.head.entries as usize;
            let blocks = self.builder.blocks() + record.head.blocks as usize;
            let used = at + 1 + record.head.blocks as usize;
            // Else no log of ours wrote it, and the new footer would overwrite payload.
            let fits = entries <= segment_entries_max(self.layout.segment_pages)
                && used + footer_pages(entries, blocks) <= pages;
            // A durable record cannot be torn: if a block of it does not match, it is damaged, and
            // whoever reads it will be told.
            let whole =
                record.head.seq < self.durable_seq || self.payload_matches(&record, at + 1, bytes);
            if !fits || !whole {
                self.out.torn += 1;
                at += 1;
                continue;
            }
            self.accept(&record, start + at as u32);
            at += 1 + record.head.blocks as usize;
        }
        self.out.next_seq = self.out.next_seq.max(end);
        (end, gaps)
    }

    /// Learns from all headers of one use of a segment what was durable when they were written.
    fn note_headers(&mut self, start: u32, seq: u64, bytes: &[u8]) {
        for (page, at) in bytes.chunks_exact(BLOCK_BYTES).zip(start..) {
            let record = Record::decode(&self.layout.region, at, page, self.crc32c);
            if let Some(record) = record.ok().filter(|record| record.head.segment_seq == seq) {
                self.note(&record.head);
            }
        }
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

#[cfg(test)]
mod tests;
