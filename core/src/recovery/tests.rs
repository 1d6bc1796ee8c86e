use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use super::*;
use crate::wire::frame::tests::crc32c;
use crate::wire::log::{Entry, RECORD_ENTRIES_MAX, encode_record};

mod lives;

const PAGES: u32 = 64;
const SEGMENTS: u32 = 16;
const LAYOUT: RegionLayout =
    RegionLayout { region: *b"a region's name!", segment_pages: PAGES, segments: SEGMENTS };
const VOLUME: VolumeId = VolumeId(7);

/// An entry, where it lies, and the checksums of its blocks.
type Found = (FooterEntry, Vec<u32>);

/// What a log on the device does, by hand: the tests say what is in which page.
#[derive(Clone)]
struct Region {
    bytes: Vec<u8>,
    segment: u32,
    used: u32,
    segment_seq: u64,
    next_seq: u64,
    durable_seq: u64,
    floor: u64,
    footer: Vec<(FooterEntry, Vec<u32>)>,
    /// Everything that was written.
    written: Vec<Found>,
}

/// A write: its page, and the bytes.
type Write = (u32, Vec<u8>);

impl Region {
    fn new() -> Self {
        Self {
            bytes: vec![0; (PAGES * SEGMENTS) as usize * BLOCK_BYTES],
            segment: 0,
            used: 0,
            segment_seq: 1,
            next_seq: 1,
            durable_seq: 0,
            floor: 1,
            footer: Vec::new(),
            written: Vec::new(),
        }
    }

    fn put(&mut self, (page, bytes): &Write) {
        let at = *page as usize * BLOCK_BYTES;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn page_mut(&mut self, page: u32) -> &mut [u8] {
        let at = page as usize * BLOCK_BYTES;
        &mut self.bytes[at..at + BLOCK_BYTES]
    }

    fn head(&self, seq: u64, page: u32) -> Head {
        Head {
            region: LAYOUT.region,
            segment_seq: self.segment_seq,
            seq,
            durable_seq: self.durable_seq,
            floor: self.floor,
            page,
            entries: 0,
            blocks: 0,
        }
    }

    /// The next record: of each entry the kind, the object and the blocks.
    fn make_record(&mut self, parts: &[(EntryKind, u32, u16)]) -> Write {
        let (at, seq) = (self.segment * PAGES + self.used, self.next_seq);
        let mut bytes = vec![0; BLOCK_BYTES];
        let mut entries = Vec::new();
        let mut crcs = Vec::new();
        for (kind, object, count) in parts {
            let (kind, object, count) = (*kind, *object, *count);
            let epoch = Epoch(3);
            let entry = Entry { volume: VOLUME, object, first: 0, count, kind, epoch };
            let mut of_entry = Vec::new();
            for block in 0..entry.pages() {
                let fill = [seq.to_le_bytes(), u64::from(object << 16 | block).to_le_bytes()];
                let page = fill.concat().repeat(BLOCK_BYTES / 16);
                of_entry.push(crc32c(0, &page));
                bytes.extend(page);
            }
            let page = if entry.pages() == 0 { at } else { at + 1 + crcs.len() as u32 };
            crcs.extend(&of_entry);
            entries.push(entry);
            let found = (FooterEntry { entry, page, seq }, of_entry);
            self.footer.push(found.clone());
            self.written.push(found);
        }
        let (blocks, count) = (crcs.len() as u32, entries.len() as u32);
        let head = Head { entries: count, blocks, ..self.head(seq, at) };
        encode_record(&head, &entries, crcs.into_iter(), &mut bytes[..BLOCK_BYTES], crc32c);
        self.used += 1 + blocks;
        self.next_seq += 1;
        assert!(self.used <= PAGES - 2);
        (at, bytes)
    }

    /// Writes a record; returns its page.
    fn record(&mut self, parts: &[(EntryKind, u32, u16)]) -> u32 {
        let write = self.make_record(parts);
        self.put(&write);
        write.0
    }

    /// The footer of the open segment.
    fn make_footer(&mut self) -> Write {
        let mut builder = FooterBuilder::with_capacity(240, PAGES as usize);
        for (entry, crcs) in self.footer.drain(..) {
            builder.push(&entry);
            crcs.into_iter().for_each(|crc| builder.push_crc(crc));
        }
        let last = (self.segment + 1) * PAGES - 1;
        let (entries, blocks) = (builder.entries() as u32, builder.blocks() as u32);
        let head = Head { entries, blocks, ..self.head(self.next_seq, last) };
        let mut bytes = vec![0; builder.pages() * BLOCK_BYTES];
        for (index, page) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            builder.encode(&head, index, page, crc32c);
        }
        (last + 1 - builder.pages() as u32, bytes)
    }

    /// Goes on in the next segment.
    fn open_next(&mut self) {
        self.segment = (self.segment + 1) % SEGMENTS;
        self.segment_seq += 1;
        self.used = 0;
        self.footer.clear();
    }

    /// Writes the footer and goes on in the next segment.
    fn seal(&mut self) {
        let write = self.make_footer();
        self.put(&write);
        self.open_next();
    }

    /// All records so far are durable, as the records from now on say.
    fn flush(&mut self) {
        self.durable_seq = self.next_seq;
    }

    /// Three records of data, zeroes and clean data.
    fn fill(&mut self) {
        self.record(&[(EntryKind::Dirty, 1, 3), (EntryKind::Zeroes, 2, 900)]);
        self.record(&[(EntryKind::Clean, 3, 1), (EntryKind::Dirty, 4, 16)]);
        self.record(&[(EntryKind::Dirty, 5, 1)]);
    }

    /// A log of so many sealed segments and an open one, durable but for the last record.
    fn filled(sealed: u32) -> Self {
        let mut region = Self::new();
        for _ in 0..sealed {
            region.fill();
            region.flush();
            region.seal();
        }
        region.fill();
        region.flush();
        region.record(&[(EntryKind::Dirty, 6, 2)]);
        region
    }

    /// Whether the payload of an entry is what it should be.
    fn holds(&self, (at, crcs): &Found) -> bool {
        let pages = self.bytes.chunks_exact(BLOCK_BYTES).skip(at.page as usize);
        pages.zip(crcs).all(|(page, crc)| crc32c(0, page) == *crc)
    }

    fn recover(&mut self) -> Recovered {
        self.recover_without(&[]).0
    }

    /// Recovers; the device cannot read the segments in `broken`. Also tells which pages were read.
    fn recover_without(&mut self, broken: &[u32]) -> (Recovered, Vec<(u32, u32)>) {
        let mut recovery = Recovery::new(LAYOUT, crc32c);
        let mut reads = Vec::new();
        loop {
            match recovery.need() {
                Need::Read { at, count } => {
                    reads.push((at, count));
                    assert!(reads.len() < 100, "recovery ends");
                    let range = at as usize * BLOCK_BYTES..(at + count) as usize * BLOCK_BYTES;
                    let ok = !broken.contains(&(at / PAGES));
                    recovery.handle_read(ok.then_some(&self.bytes[range]));
                }
                Need::Write { at } => {
                    let bytes = recovery.bytes().to_vec();
                    self.put(&(at, bytes));
                    recovery.handle_written();
                }
                Need::Done => return (recovery.finish(), reads),
            }
        }
    }

    /// What was written, but for records whose header is in `lost`.
    fn expected(&self, lost: &[u64]) -> Vec<Found> {
        let kept = |found: &&Found| !lost.contains(&found.0.seq);
        in_order(self.written.iter().filter(kept).cloned().collect())
    }
}

fn in_order(mut found: Vec<Found>) -> Vec<Found> {
    found.sort_by_key(|(at, _)| (at.seq, at.page, at.entry.object));
    found
}

/// The entries with their checksums.
fn found(recovered: &Recovered) -> Vec<Found> {
    let entries = recovered.entries.iter().map(|entry| {
        let crcs = &recovered.crcs[entry.crc as usize..][..entry.at.entry.pages() as usize];
        (entry.at, crcs.to_vec())
    });
    in_order(entries.collect())
}

#[test]
fn an_empty_region_holds_nothing() {
    let mut region = Region::new();
    let (recovered, reads) = region.recover_without(&[]);
    assert!(recovered.entries.is_empty() && recovered.crcs.is_empty());
    assert_eq!(recovered.segment_seqs, [0; SEGMENTS as usize]);
    assert!(recovered.next_seq > 0 && recovered.next_segment_seq > 0);
    assert_eq!((recovered.torn, recovered.unreadable), (0, 0));
    let scanned = reads.iter().filter(|(_, count)| *count == PAGES).count();
    assert_eq!(scanned, 2, "an unused segment is not read");
    assert!(region.bytes.iter().all(|byte| *byte == 0), "nor written");
}

#[test]
fn sealed_and_open_segments_come_back_whole() {
    for sealed in [0, 1, 2, 5, SEGMENTS - 3] {
        let mut region = Region::filled(sealed);
        let expected = region.expected(&[]);
        let (recovered, reads) = region.recover_without(&[]);
        assert_eq!(found(&recovered), expected);
        assert_eq!((recovered.torn, recovered.unreadable), (0, 0));
        assert!(recovered.next_seq >= region.next_seq);
        assert!(recovered.next_segment_seq > region.segment_seq);
        for segment in 0..=sealed {
            assert_eq!(recovered.segment_seqs[segment as usize], u64::from(segment) + 1);
        }
        let scanned = reads.iter().filter(|(_, count)| *count == PAGES).count();
        assert_eq!(scanned, 2, "footers tell of the others");
        let dirty: u64 = expected
            .iter()
            .filter(|(at, _)| at.entry.kind != EntryKind::Clean)
            .map(|(at, _)| u64::from(at.entry.count))
            .sum();
        assert_eq!(recovered.volume(VOLUME), (Epoch(3), dirty));
        assert_eq!(recovered.volume(VolumeId(8)), (Epoch::ZERO, 0));
    }
}

#[test]
fn a_forgotten_volume_has_nothing_dirty() {
    let mut region = Region::filled(1);
    region.record(&[(EntryKind::Forget, 0, 0)]);
    assert_eq!(region.clone().recover().volume(VOLUME), (Epoch::ZERO, 0));
    region.record(&[(EntryKind::Dirty, 1, 2), (EntryKind::Kept, 2, 4)]);
    assert_eq!(region.recover().volume(VOLUME), (Epoch(3), 2));
}

#[test]
fn a_torn_record_is_dropped_and_what_follows_counts() {
    // Any page of the middle record: its header, its clean block, its dirty blocks.
    for page in 0..18 {
        let mut region = Region::filled(2);
        let torn = region.record(&[(EntryKind::Clean, 3, 1), (EntryKind::Dirty, 4, 16)]);
        region.record(&[(EntryKind::Dirty, 9, 1)]);
        let seq = region.next_seq - 2;
        region.page_mut(torn + page)[4000] ^= 1;
        let recovered = region.recover();
        assert_eq!(found(&recovered), region.expected(&[seq]), "page {page}");
        // A torn header tells nothing, not even that it was one.
        assert_eq!(recovered.torn, u64::from(page > 0));
        assert!(recovered.next_seq >= region.next_seq);
    }
}

#[test]
fn a_durable_record_is_not_torn_but_damaged() {
    // The payload of the open segment's first record, which the last record says is durable: the
    // entry stays, with its checksum, so that a read finds the damage.
    let mut region = Region::filled(2);
    region.page_mut(2 * PAGES + 1)[9] ^= 1;
    let recovered = region.recover();
    assert_eq!(found(&recovered), region.expected(&[]));
    assert_eq!(recovered.torn, 0);
}

#[test]
fn a_damaged_header_of_a_durable_record_is_told_every_time() {
    // The header of the open segment's first record: nobody knows what that record said.
    let mut region = Region::filled(2);
    region.page_mut(2 * PAGES)[100] ^= 1;
    let before = region.bytes.clone();
    assert_eq!(region.recover().damaged, 1);
    assert_eq!(region.recover().damaged, 1);
    assert!(region.bytes == before, "a damaged log is left as it is");
    region.page_mut(2 * PAGES)[100] ^= 1;
    let recovered = region.recover();
    assert_eq!(recovered.damaged, 0);
    assert_eq!(found(&recovered), region.expected(&[]));
}

#[test]
fn a_damaged_log_that_was_given_up_stays_empty() {
    let mut region = Region::filled(2);
    region.page_mut(2 * PAGES)[100] ^= 1;
    let mut recovery = Recovery::new(LAYOUT, crc32c);
    loop {
        match recovery.need() {
            Need::Read { at, count } => {
                let range = at as usize * BLOCK_BYTES..(at + count) as usize * BLOCK_BYTES;
                recovery.handle_read(Some(&region.bytes[range]));
            }
            Need::Write { at } => {
                let bytes = recovery.bytes().to_vec();
                region.put(&(at, bytes));
                recovery.handle_written();
            }
            Need::Done if recovery.damaged() > 0 => recovery.give_up(),
            Need::Done => break,
        }
    }
    let first = recovery.finish();
    assert!(first.entries.is_empty());
    let again = region.recover();
    assert_eq!((again.damaged, again.entries.len()), (0, 0));
    assert!(again.next_segment_seq >= first.next_segment_seq && again.next_seq >= first.next_seq);
}

#[test]
fn a_dropped_record_stays_dropped() {
    let mut region = Region::filled(2);
    let torn = region.record(&[(EntryKind::Dirty, 8, 4)]);
    let seq = region.next_seq - 1;
    region.page_mut(torn + 2)[7] ^= 1;
    let first = region.recover();
    assert_eq!(found(&first), region.expected(&[seq]));
    // The next life writes one record; then the torn one becomes readable.
    let newest = (0..SEGMENTS).max_by_key(|at| first.segment_seqs[*at as usize]).unwrap();
    region.segment = newest;
    region.open_next();
    region.segment_seq = first.next_segment_seq;
    region.next_seq = first.next_seq;
    region.flush();
    region.record(&[(EntryKind::Dirty, 9, 1)]);
    region.page_mut(torn + 2)[7] ^= 1;
    assert_eq!(found(&region.recover()), region.expected(&[seq]));
}

#[test]
fn recovering_twice_finds_the_same() {
    for torn in [None, Some(1), Some(20)] {
        let mut region = Region::filled(3);
        if let Some(page) = torn {
            region.page_mut(3 * PAGES + page)[0] ^= 1;
        }
        let first = region.recover();
        let second = region.recover();
        let third = region.recover();
        for later in [second, third] {
            assert_eq!(found(&later), found(&first));
            assert!(later.next_seq >= first.next_seq);
            assert!(later.next_segment_seq >= first.next_segment_seq);
            let used = |of: &Recovered| of.segment_seqs.iter().filter(|seq| **seq > 0).count();
            assert_eq!(used(&later), used(&first), "no segment is used up by a restart");
        }
    }
}

#[test]
fn older_uses_of_the_open_segment_do_not_count() {
    let mut region = Region::filled(SEGMENTS - 1);
    // Around: the first segments are free again, and the first one is being filled.
    let footer = region.make_footer();
    region.put(&footer);
    region.flush();
    let in_first = |found: &Found| found.0.page < PAGES;
    assert!(region.written.iter().any(in_first));
    region.written.retain(|found| found.0.page >= 3 * PAGES);
    region.floor = 4;
    region.open_next();
    region.record(&[(EntryKind::Dirty, 20, 1)]);
    let expected = region.expected(&[]);
    let recovered = region.recover();
    assert_eq!(found(&recovered), expected);
    assert_eq!(recovered.segment_seqs[0], u64::from(SEGMENTS) + 1);
    assert!(recovered.segment_seqs[1..3].iter().all(|seq| *seq == 0 || *seq > 17), "free");
    assert!((3..16).all(|at| recovered.segment_seqs[at] == at as u64 + 1));
}

#[test]
fn segments_below_the_floor_are_free() {
    let mut region = Region::filled(6);
    region.floor = 5;
    region.flush();
    region.record(&[(EntryKind::Dirty, 9, 1)]);
    region.written.retain(|found| found.0.page >= 4 * PAGES);
    let recovered = region.recover();
    assert_eq!(found(&recovered), region.expected(&[]));
    assert_eq!(recovered.segment_seqs[..5], [0, 0, 0, 0, 5]);
}

#[test]
fn a_damaged_footer_is_made_again() {
    for segment in 0..5 {
        for at in [0, 13, 70, 90, 120] {
            let mut region = Region::filled(5);
            region.page_mut((segment + 1) * PAGES - 1)[at] ^= 4;
            let (recovered, reads) = region.recover_without(&[]);
            assert_eq!(found(&recovered), region.expected(&[]), "segment {segment}, byte {at}");
            assert!(reads.contains(&(segment * PAGES, PAGES)));
            let (again, reads) = region.recover_without(&[]);
            assert_eq!(found(&again), found(&recovered));
            assert!(reads.len() < 2 * SEGMENTS as usize + 4);
        }
    }
}

#[test]
fn a_footer_lost_inside_the_ring_is_made_again() {
    // A power cut lost the footer of one segment and spared those of the ones after it. In the
    // first lap there are zeroes in its place, later the footer of the lap before.
    for segment in 0..5 {
        let mut region = Region::filled(5);
        region.page_mut((segment + 1) * PAGES - 1).fill(0);
        assert_eq!(found(&region.recover()), region.expected(&[]), "segment {segment}");
    }
    for lost in 0..4 {
        let mut region = Region::filled(SEGMENTS - 1);
        let footer = region.make_footer();
        region.put(&footer);
        region.flush();
        region.floor = 8;
        region.written.retain(|found| found.0.page >= 7 * PAGES);
        region.open_next();
        for segment in 0..4 {
            region.fill();
            region.flush();
            if segment == lost {
                region.open_next();
            } else {
                region.seal();
            }
        }
        region.fill();
        assert_eq!(found(&region.recover()), region.expected(&[]), "segment {lost} of lap 2");
    }
}

#[test]
fn what_the_device_cannot_read_is_counted_and_the_rest_served() {
    for broken in 0..6 {
        let mut region = Region::filled(5);
        let (recovered, _) = region.recover_without(&[broken]);
        region.written.retain(|found| found.0.page / PAGES != broken);
        assert_eq!(found(&recovered), region.expected(&[]), "segment {broken}");
        assert!(recovered.unreadable > 0);
    }
}

#[test]
fn a_segment_of_many_small_entries_comes_back() {
    // The most that a segment takes: two full records of entries without payload.
    for sealed in [false, true] {
        let mut region = Region::filled(1);
        region.seal();
        for _ in 0..2 {
            let parts: Vec<_> = (0..RECORD_ENTRIES_MAX as u32)
                .map(|object| (EntryKind::Zeroes, object, 1))
                .collect();
            region.record(&parts);
        }
        if sealed {
            region.seal();
        }
        let expected = region.expected(&[]);
        assert_eq!(found(&region.recover()), expected);
        assert_eq!(found(&region.recover()), expected);
    }
}

#[test]
fn a_log_of_another_region_is_not_ours() {
    let mut region = Region::filled(3);
    let mut recovery = Recovery::new(RegionLayout { region: [1; 16], ..LAYOUT }, crc32c);
    while let Need::Read { at, count } = recovery.need() {
        let range = at as usize * BLOCK_BYTES..(at + count) as usize * BLOCK_BYTES;
        recovery.handle_read(Some(&region.bytes[range]));
    }
    let recovered = recovery.finish();
    assert!(recovered.entries.is_empty());
    assert!(recovered.segment_seqs.iter().all(|seq| *seq == 0));
    assert_eq!(found(&region.recover()), region.expected(&[]));
}
