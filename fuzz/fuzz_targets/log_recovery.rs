//! Any bytes as a region of the log, also with sound checksums: recovery ends, never panics, writes
//! only where a footer may lie, and what it returns lies in the region.
#![no_main]

use heeler_core::ids::{BLOCK_BYTES, Epoch, VolumeId};
use heeler_core::recovery::{Need, Recovered, Recovery, RegionLayout};
use heeler_core::wire::log::{
    Entry, EntryKind, FooterBuilder, FooterEntry, Head, RECORD_ENTRIES_MAX, encode_record,
};
use libfuzzer_sys::fuzz_target;

const PAGES: u32 = 64;
const SEGMENTS: u32 = 16;
const LAYOUT: RegionLayout =
    RegionLayout { region: [5; 16], segment_pages: PAGES, segments: SEGMENTS };

fuzz_target!(|data: &[u8]| {
    let mut data = Data(data);
    let mut region = vec![0; (PAGES * SEGMENTS) as usize * BLOCK_BYTES];
    let broken = if data.byte() == 0 { u32::from(data.byte()) % SEGMENTS } else { SEGMENTS };
    while !data.0.is_empty() {
        put_something(&mut data, &mut region);
    }
    recover(&mut region, broken);
    // What the first one left is another strange region.
    recover(&mut region, SEGMENTS);
});

/// The fuzzer's bytes; zeroes after their end.
struct Data<'a>(&'a [u8]);

impl Data<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// Mostly a small number, now and then any.
    fn number(&mut self) -> u64 {
        let small = u64::from(self.byte());
        if small < 250 { small } else { u64::from_le_bytes([0; 8].map(|_| self.byte())) }
    }

    fn entry(&mut self) -> Entry {
        let kinds = [
            EntryKind::Dirty,
            EntryKind::Clean,
            EntryKind::Zeroes,
            EntryKind::Forget,
            EntryKind::Kept,
        ];
        Entry {
            volume: VolumeId(u32::from(self.byte())),
            object: u32::from(self.byte()),
            first: self.short() % 800,
            count: u16::from(self.byte()),
            kind: kinds[usize::from(self.byte()) % kinds.len()],
            epoch: Epoch(self.number()),
        }
    }

    /// The fixed part of a structure at `page`. The use number is mostly what the ring would have.
    fn head(&mut self, page: u32) -> Head {
        let lap = self.number();
        let segment = u64::from(page / PAGES);
        Head {
            region: LAYOUT.region,
            segment_seq: lap.wrapping_mul(u64::from(SEGMENTS)).wrapping_add(segment + 1),
            seq: self.number(),
            durable_seq: self.number(),
            floor: self.number(),
            page,
            entries: 0,
            blocks: 0,
        }
    }
}

/// A checksum that tells pages apart and costs little. It need not be a good one: what is sound is
/// decided by the fuzzer anyway.
fn crc(crc: u32, bytes: &[u8]) -> u32 {
    let words = bytes.chunks(8).map(|word| {
        let mut raw = [0; 8];
        raw[..word.len()].copy_from_slice(word);
        u64::from_le_bytes(raw)
    });
    let mix = |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (words.fold(u64::from(crc), mix) >> 32) as u32
}

/// One thing in the region: a record, a footer, raw bytes, or a flipped bit.
fn put_something(data: &mut Data<'_>, region: &mut [u8]) {
    let kind = data.byte();
    let page = u32::from(data.short()) % (PAGES * SEGMENTS);
    let at = page as usize * BLOCK_BYTES;
    match kind % 8 {
        0..3 => put_record(data, page, region),
        3..6 => put_footer(data, page / PAGES, region),
        6 => region[at + usize::from(data.short()) % BLOCK_BYTES] ^= 1 << (data.byte() % 8),
        _ => {
            let from = usize::from(data.short()) % BLOCK_BYTES;
            let len = usize::from(data.byte()).min(data.0.len()).min(BLOCK_BYTES - from);
            let (head, tail) = data.0.split_at(len);
            region[at + from..][..len].copy_from_slice(head);
            data.0 = tail;
        }
    }
}

/// A sealed record whose blocks are whatever lies behind it.
fn put_record(data: &mut Data<'_>, page: u32, region: &mut [u8]) {
    let mut entries = Vec::new();
    let mut blocks = 0;
    let most = if data.byte().is_multiple_of(8) { RECORD_ENTRIES_MAX } else { 3 };
    for _ in 0..usize::from(data.byte()) % (most + 1) {
        let entry = data.entry();
        if blocks + entry.pages() <= 256 {
            blocks += entry.pages();
            entries.push(entry);
        }
    }
    let head = Head { entries: entries.len() as u32, blocks, ..data.head(page) };
    let (before, payload) = region.split_at_mut((page as usize + 1) * BLOCK_BYTES);
    let pages = payload.chunks_exact(BLOCK_BYTES).map(|page| crc(0, page));
    let crcs = pages.chain(core::iter::repeat(0)).take(blocks as usize);
    encode_record(&head, &entries, crcs, &mut before[page as usize * BLOCK_BYTES..], crc);
}

/// A sealed footer of arbitrary entries.
fn put_footer(data: &mut Data<'_>, segment: u32, region: &mut [u8]) {
    let mut builder = FooterBuilder::with_capacity(300, 2000);
    let most = if data.byte().is_multiple_of(8) { 300 } else { 3 };
    for _ in 0..usize::from(data.short()) % (most + 1) {
        let entry = data.entry();
        if builder.blocks() + entry.pages() as usize > 2000 {
            break;
        }
        let page = segment * PAGES + u32::from(data.byte());
        builder.push(&FooterEntry { entry, page, seq: data.number() });
        (0..entry.pages()).for_each(|_| builder.push_crc(7));
    }
    let last = (segment + 1) * PAGES - 1;
    let (entries, blocks) = (builder.entries() as u32, builder.blocks() as u32);
    let head = Head { entries, blocks, ..data.head(last) };
    let pages = builder.pages();
    for index in 0..pages {
        let at = (last as usize + 1 - pages + index) * BLOCK_BYTES;
        builder.encode(&head, index, &mut region[at..at + BLOCK_BYTES], crc);
    }
}

fn recover(region: &mut [u8], broken: u32) {
    let mut recovery = Recovery::new(LAYOUT, crc);
    for _ in 0..8 * SEGMENTS {
        match recovery.need() {
            Need::Read { at, count } => {
                assert!(count > 0 && at / PAGES == (at + count - 1) / PAGES);
                let range = at as usize * BLOCK_BYTES..(at + count) as usize * BLOCK_BYTES;
                recovery.handle_read((at / PAGES != broken).then(|| &region[range]));
            }
            Need::Write { at } => {
                let bytes = recovery.bytes();
                let pages = (bytes.len() / BLOCK_BYTES) as u32;
                assert!(pages > 0 && (at + pages).is_multiple_of(PAGES) && pages <= PAGES);
                region[at as usize * BLOCK_BYTES..][..bytes.len()].copy_from_slice(bytes);
                recovery.handle_written();
            }
            Need::Done => {
                return check(&recovery.finish());
            }
        }
    }
    panic!("recovery does not end");
}

fn check(recovered: &Recovered) {
    assert_eq!(recovered.segment_seqs.len(), SEGMENTS as usize);
    for entry in &recovered.entries {
        let at = entry.at;
        let pages = at.entry.pages();
        let segment = (at.page / PAGES) as usize;
        assert!(recovered.segment_seqs[segment] > 0, "an entry in a free segment");
        assert!(at.page + pages <= (segment as u32 + 1) * PAGES);
        assert!(entry.crc as usize + pages as usize <= recovered.crcs.len());
    }
    for seq in &recovered.segment_seqs {
        assert!(*seq < recovered.next_segment_seq);
    }
    for volume in 0..4 {
        let _ = recovered.volume(VolumeId(volume));
    }
}
