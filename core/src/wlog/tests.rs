use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use super::*;
use crate::ids::{BLOCK_BYTES, Epoch, VolumeId};
use crate::limits::OBJECT_BLOCKS_MAX;
use crate::random::Random;
use crate::recovery::{Need, Recovered, Recovery};
use crate::wire::frame::tests::crc32c;
use crate::wire::log::EntryKind;

const SEGMENTS: u32 = 16;

fn layout(segment_pages: u32) -> RegionLayout {
    RegionLayout { region: [3; 16], segment_pages, segments: SEGMENTS }
}

fn new_log(layout: RegionLayout) -> Log {
    let pages: Vec<_> = (0..meta_pages(layout.segment_pages) as u32).map(PageId).collect();
    Log::new(layout, crc32c, &pages, &[0; SEGMENTS as usize], 1, 1)
}

/// The content of a payload page.
fn fill(page: PageId) -> [u8; BLOCK_BYTES] {
    let mut bytes = [0; BLOCK_BYTES];
    bytes.chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&page.0.to_le_bytes()));
    bytes
}

/// A log, the device it writes to, and what the test knows of both.
struct World {
    random: Random,
    log: Log,
    layout: RegionLayout,
    device: Vec<u8>,
    next_page: u32,
    /// Slots, numbers and places of records in flight.
    flying: Vec<(usize, u64)>,
    /// Entries by number of the record, and the segment use they are in.
    entries: Vec<(FooterEntry, u64)>,
    /// Live pages.
    live: BTreeMap<u32, BlockAddr>,
    /// Where the last record of the head ends.
    end: u32,
    head: (u32, u64),
    footers: u64,
    records: u64,
}

impl World {
    fn new(seed: u64, layout: RegionLayout) -> Self {
        Self {
            random: Random(seed),
            log: new_log(layout),
            layout,
            device: vec![0; (layout.segment_pages * SEGMENTS) as usize * BLOCK_BYTES],
            next_page: 1000,
            flying: Vec::new(),
            entries: Vec::new(),
            live: BTreeMap::new(),
            end: 0,
            head: (SEGMENTS - 1, 0),
            footers: 0,
            records: 0,
        }
    }

    fn put(&mut self, page: u32, bytes: &[u8]) {
        let at = page as usize * BLOCK_BYTES;
        self.device[at..at + BLOCK_BYTES].copy_from_slice(bytes);
    }

    /// Appends one entry of `blocks` payload pages, or as many as there is room for.
    fn append(&mut self, blocks: usize) {
        let reclaim = self.random.chance(1, 8);
        let Some(room) = self.log.begin(blocks, reclaim) else { return };
        assert!(room <= blocks && (room > 0 || blocks == 0));
        let kind = if blocks == 0 { EntryKind::Zeroes } else { EntryKind::Dirty };
        let count = if blocks == 0 { 1 + self.random.below(900) } else { room as u64 } as u16;
        let first = self.random.below((OBJECT_BLOCKS_MAX - usize::from(count) + 1) as u64) as u16;
        let object = self.random.below(50) as u32;
        let mut entry = Entry { volume: VolumeId(1), object, first, count, kind, epoch: Epoch(9) };
        // Sometimes block by block, as a fill that grows.
        let grows = blocks > 0 && self.random.chance(1, 4);
        entry.count = if grows { 1 } else { count };
        self.log.push_entry(entry, self.random.chance(1, 2).then_some(object));
        for at in 0..room {
            if grows && at > 0 {
                self.log.extend_entry();
            }
            let page = PageId(self.next_page);
            self.next_page += 1;
            let addr = BlockAddr(self.next_page);
            let crc = crc32c(0, &fill(page));
            let block = RecordBlock { crc, buffer: BufferId::NONE, role: Role::Writing };
            let place = self.log.push_block(page, block);
            self.log.set_owner(place, addr);
            assert_eq!(self.live.insert(place, addr), None);
        }
    }

    fn close(&mut self) {
        let ripe = self.log.is_ripe();
        assert_eq!(ripe, self.log.has_open() && self.flying.len() < LOG_DEPTH);
        if !ripe {
            return;
        }
        let (slot, at, count) = self.log.close().expect("it is ripe");
        let (seq, place) = self.log.record_at(slot);
        assert_eq!(place, at);
        let pages = self.layout.segment_pages;
        let (segment, head) = (at / pages, self.log.head());
        let use_seq = self.log.segments()[head as usize].seq;
        assert_eq!(segment, head, "records go to the head");
        if self.head != (head, use_seq) {
            assert_eq!(head, (self.head.0 + 1) % SEGMENTS, "in order of position");
            assert_eq!(use_seq, self.head.1 + 1);
            self.head = (head, use_seq);
            self.end = head * pages;
        }
        assert_eq!(at, self.end, "records follow each other");
        self.end += count;
        assert!(self.end < (head + 1) * pages, "there is room for a footer");
        let mut header = [0; BLOCK_BYTES];
        self.log.encode_record(slot, &mut header);
        self.put(at, &header);
        let payload = self.log.record(slot).pages[1..].to_vec();
        for (place, page) in (at + 1..).zip(payload) {
            self.put(place, &fill(page));
        }
        let mut page = at + 1;
        for entry in &self.log.record(slot).entries {
            let place = if entry.pages() == 0 { at } else { page };
            self.entries.push((FooterEntry { entry: *entry, page: place, seq }, use_seq));
            page += entry.pages();
        }
        self.flying.push((slot, seq));
        self.records += 1;
    }

    fn complete(&mut self) {
        if !self.flying.is_empty() {
            let index = self.random.below(self.flying.len() as u64) as usize;
            let (slot, _) = self.flying.swap_remove(index);
            self.log.complete(slot);
        }
        let open = u64::from(self.log.has_open());
        let lowest = self.flying.iter().map(|(_, seq)| *seq).min();
        assert_eq!(self.log.completed_seq(), lowest.unwrap_or(self.log.next_seq() - open));
    }

    fn footer(&mut self) {
        let Some(footer) = self.log.take_footer() else { return };
        let pages = self.layout.segment_pages;
        let segment = footer.at / pages;
        assert_eq!(footer.at + footer.count, (segment + 1) * pages, "at the segment's end");
        assert_eq!(self.log.footer_pages().len(), footer.count as usize);
        let last = self.entries.iter().filter(|(at, _)| at.page / pages == segment);
        let last = last.map(|(at, _)| at.page + at.entry.pages().max(1)).max();
        assert!(last.is_some_and(|last| last <= footer.at), "behind the records");
        for index in 0..footer.count {
            let mut page = [0; BLOCK_BYTES];
            self.log.encode_footer(index as usize, &mut page);
            self.put(footer.at + index, &page);
        }
        self.log.footer_done();
        self.footers += 1;
    }

    /// Drops some block, or moves it to another leaf.
    fn change_owner(&mut self) {
        let Some((&page, _)) = self.live.range(self.random.below(4096) as u32..).next() else {
            return;
        };
        if self.random.chance(1, 2) {
            let addr = BlockAddr(self.next_page);
            self.next_page += 1;
            self.log.change_owner(page, addr);
            self.live.insert(page, addr);
        } else {
            self.log.clear_owner(page);
            self.live.remove(&page);
        }
    }

    fn reclaim(&mut self) {
        let Some(oldest) = self.log.oldest() else { return };
        let pages = self.layout.segment_pages;
        let range = oldest * pages..(oldest + 1) * pages;
        while let Some((&page, _)) = self.live.range(range.clone()).next() {
            self.log.clear_owner(page);
            self.live.remove(&page);
        }
        assert_eq!(oldest, self.log.tail());
        self.log.retire_oldest();
        self.log.set_durable(self.log.completed_seq());
        self.log.free_oldest();
        self.entries.retain(|(at, _)| at.page / pages != oldest);
    }

    fn step(&mut self) {
        match self.random.below(16) {
            0..6 => {
                let blocks = [0, 1, 1, 2, 32, 256][self.random.below(6) as usize];
                self.append(blocks);
            }
            6..9 => self.close(),
            9..12 => self.complete(),
            12 | 13 => self.footer(),
            14 => self.change_owner(),
            _ if self.log.free_segments() < 6 => self.reclaim(),
            _ => {}
        }
        self.log.check();
        let live = self.log.segments().iter().map(|segment| segment.live as usize).sum::<usize>();
        assert_eq!(live, self.live.len());
    }

    fn recover(&mut self) -> Recovered {
        let mut recovery = Recovery::new(self.layout, crc32c);
        loop {
            match recovery.need() {
                Need::Read { at, count } => {
                    let range = at as usize * BLOCK_BYTES..(at + count) as usize * BLOCK_BYTES;
                    recovery.handle_read(Some(&self.device[range]));
                }
                Need::Write { at } => {
                    let bytes = recovery.bytes();
                    let from = at as usize * BLOCK_BYTES;
                    self.device[from..from + bytes.len()].copy_from_slice(bytes);
                    recovery.handle_written();
                }
                Need::Done => return recovery.finish(),
            }
        }
    }

    /// What recovery finds is what was appended, in the segments that are in use.
    fn check_recovery(&mut self) {
        let recovered = self.recover();
        assert_eq!(recovered.torn, 0);
        let pages = self.layout.segment_pages;
        let order = |at: &FooterEntry| (at.seq, at.page, at.entry.object, at.entry.first);
        let in_use = |at: &FooterEntry| {
            self.log.segments()[(at.page / pages) as usize].state != SegmentState::Free
        };
        let found = recovered.entries.iter().map(|entry| entry.at);
        let mut found: Vec<_> = found.filter(in_use).collect();
        found.sort_by_key(order);
        let mut expected: Vec<_> = self.entries.iter().map(|(at, _)| *at).collect();
        expected.sort_by_key(order);
        assert_eq!(found, expected);
        for entry in &recovered.entries {
            for index in 0..entry.at.entry.pages() {
                let at = (entry.at.page + index) as usize * BLOCK_BYTES;
                let crc = recovered.crcs[(entry.crc + index) as usize];
                assert_eq!(crc32c(0, &self.device[at..at + BLOCK_BYTES]), crc);
            }
        }
        assert!(recovered.next_seq >= self.log.next_seq());
    }
}

fn live(seed: u64, segment_pages: u32, steps: usize) {
    let mut world = World::new(seed, layout(segment_pages));
    for _ in 0..steps {
        world.step();
    }
    while world.log.has_open() {
        world.complete();
        world.close();
    }
    world.footer();
    assert!(world.footers > 0 && world.records > 0);
    world.check_recovery();
}

#[test]
fn random_records_and_footers_fit_and_come_back() {
    for seed in 0..5 {
        live(seed, 64, 6000);
        live(seed, 128, 3000);
    }
    live(99, 512, 3000);
}

/// Fills all segments but the reserved ones. Each record first gets one entry of up to `large`
/// blocks, then entries of `small` blocks until it is full.
fn fill_up(segment_pages: u32, large: usize, small: usize) {
    let mut log = new_log(layout(segment_pages));
    let mut ends = [0; SEGMENTS as usize];
    let mut footers = 0;
    while log.free_segments() > RESERVED_SEGMENTS {
        let blocks = if log.has_open() { small } else { large };
        if let Some(room) = log.begin(blocks, false) {
            let kind = if room == 0 { EntryKind::Zeroes } else { EntryKind::Dirty };
            let (volume, count) = (VolumeId(1), room.max(1) as u16);
            log.push_entry(
                Entry { volume, object: 0, first: 0, count, kind, epoch: Epoch(1) },
                None,
            );
            for _ in 0..room {
                let buffer = BufferId::NONE;
                let block = RecordBlock { crc: 0, buffer, role: Role::Pinned };
                log.push_block(PageId(5000), block);
            }
            continue;
        }
        let (slot, at, count) = log.close().expect("the record is full");
        ends[(at / segment_pages) as usize] = at + count;
        log.complete(slot);
        if let Some(footer) = log.take_footer() {
            let end = ends[(footer.at / segment_pages) as usize];
            assert!(footer.at >= end, "a footer at {} over a record up to {end}", footer.at);
            assert!(footer.count as usize + LOG_DEPTH < meta_pages(segment_pages));
            log.footer_done();
            footers += 1;
        }
    }
    assert!(footers > 5);
}

#[test]
fn full_records_leave_room_for_the_footer() {
    for segment_pages in [64, 128, 256, 1024, 2048] {
        for (large, small) in [(0, 0), (1, 1), (256, 0), (256, 1), (20, 0), (3, 2)] {
            fill_up(segment_pages, large, small);
        }
    }
}

#[test]
fn the_last_segments_are_reclaim_s() {
    let mut log = new_log(layout(64));
    let fill = |log: &mut Log, reclaim: bool| {
        let mut opened = 0;
        loop {
            let free = log.free_segments();
            if log.begin(0, reclaim).is_none() {
                return opened;
            }
            opened += free - log.free_segments();
            // A record of one page each: a segment takes about 60.
            let (slot, _, _) = log.close().expect("begun");
            log.complete(slot);
            if log.take_footer().is_some() {
                log.footer_done();
            }
        }
    };
    assert_eq!(fill(&mut log, false), SEGMENTS - RESERVED_SEGMENTS);
    assert_eq!(fill(&mut log, false), 0);
    assert_eq!(fill(&mut log, true), RESERVED_SEGMENTS);
    assert_eq!((log.free_segments(), log.oldest()), (0, Some(0)));
    log.retire_oldest();
    assert_eq!(log.oldest(), None, "one at a time");
    assert_eq!(fill(&mut log, true), 0, "a retiring segment is not free");
    log.free_oldest();
    assert_eq!(fill(&mut log, false), 0);
    assert_eq!(fill(&mut log, true), 1);
    assert_eq!((log.head(), log.tail()), (0, 1));
}

#[test]
fn a_log_goes_on_behind_what_recovery_found() {
    let pages: Vec<_> = (0..meta_pages(64) as u32).map(PageId).collect();
    // Used: 14, 15, 0, 1; of these 15 could not be read.
    let mut seqs = [0; SEGMENTS as usize];
    (seqs[14], seqs[0], seqs[1]) = (30, 32, 33);
    let mut log = Log::new(layout(64), crc32c, &pages, &seqs, 500, 50);
    assert_eq!(log.free_segments(), SEGMENTS - 4);
    assert_eq!((log.tail(), log.oldest()), (14, Some(14)));
    assert_eq!((log.next_seq(), log.durable_seq(), log.completed_seq()), (500, 500, 500));
    assert_eq!(log.begin(4, false), Some(4));
    assert_eq!((log.head(), log.segments()[2].seq), (2, 50));
    assert_eq!(log.record_at(0), (500, 128));
    for expected in [14, 15, 0, 1] {
        assert_eq!(log.oldest(), Some(expected), "also what could not be read waits for its turn");
        log.retire_oldest();
        log.free_oldest();
    }
    assert_eq!(log.oldest(), None, "the head is not sealed");
    log.check();
}
