use alloc::vec;
use alloc::vec::Vec;

use super::*;
use crate::wire::frame::tests::crc32c;

const REGION: [u8; 16] = *b"a region's name!";
const SEGMENT_PAGES: u32 = 256;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// An entry of at most `blocks` payload pages.
    fn entry(&mut self, blocks: usize) -> Entry {
        let kinds = [
            EntryKind::Dirty,
            EntryKind::Clean,
            EntryKind::Zeroes,
            EntryKind::Forget,
            EntryKind::Kept,
        ];
        let kind = kinds[self.below(if blocks == 0 { 2 } else { 5 }) as usize];
        let kind = match kind {
            EntryKind::Dirty if blocks == 0 => EntryKind::Zeroes,
            EntryKind::Clean if blocks == 0 => EntryKind::Forget,
            kind => kind,
        };
        let most = match kind {
            EntryKind::Zeroes | EntryKind::Forget => OBJECT_BLOCKS_MAX,
            _ => blocks.min(32),
        };
        let count = 1 + self.below(most as u64) as u16;
        let first = self.below((OBJECT_BLOCKS_MAX - usize::from(count) + 1) as u64) as u16;
        Entry {
            volume: VolumeId(self.next() as u32),
            object: self.next() as u32,
            first,
            count,
            kind,
            epoch: Epoch(self.next()),
        }
    }

    fn head(&mut self) -> Head {
        Head {
            region: REGION,
            segment_seq: self.below(SEQ_MAX),
            seq: self.below(SEQ_MAX),
            durable_seq: self.next(),
            floor: self.next(),
            page: self.next() as u32,
            entries: 0,
            blocks: 0,
        }
    }

    /// A header page, and what was put into it.
    fn record(&mut self) -> (Head, Vec<Entry>, Vec<u32>, Vec<u8>) {
        let mut entries = Vec::new();
        let mut blocks = 0;
        for _ in 0..self.below(RECORD_ENTRIES_MAX as u64 + 1) {
            let entry = self.entry(BATCH_BLOCKS_MAX - blocks);
            blocks += entry.pages() as usize;
            entries.push(entry);
        }
        let crcs: Vec<u32> = (0..blocks).map(|_| self.next() as u32).collect();
        let (entries_len, blocks) = (entries.len() as u32, blocks as u32);
        let head = Head { entries: entries_len, blocks, ..self.head() };
        let mut page = vec![0xa5; BLOCK_BYTES];
        encode_record(&head, &entries, crcs.iter().copied(), &mut page, crc32c);
        (head, entries, crcs, page)
    }
}

fn decode<'a>(head: &Head, page: &'a [u8]) -> Result<Record<'a>, LogError> {
    Record::decode(&REGION, head.page, page, crc32c)
}

/// Makes the checksum of a changed record header right again.
fn reseal(page: &mut [u8]) {
    let crc = head_crc(crc32c, page);
    put(page, 12, &crc.to_le_bytes());
}

#[test]
fn a_record_decodes_to_what_was_encoded() {
    let mut random = Random(1);
    for _ in 0..300 {
        let (head, entries, crcs, page) = random.record();
        let record = decode(&head, &page).expect("a sound record");
        assert_eq!(record.head, head);
        assert!(record.entries().eq(entries.iter().copied()));
        assert!((0..crcs.len()).all(|index| record.crc(index) == crcs[index]));
    }
}

#[test]
fn every_flipped_bit_of_a_record_is_seen() {
    let mut random = Random(2);
    for _ in 0..4 {
        let (head, _, _, mut page) = random.record();
        for at in 0..page.len() {
            let flip = 1 << random.below(8);
            page[at] ^= flip;
            assert!(decode(&head, &page).is_err(), "byte {at}");
            page[at] ^= flip;
        }
        assert!(decode(&head, &page).is_ok());
    }
}

#[test]
fn a_record_of_another_place_is_not_ours() {
    let (head, _, _, page) = Random(3).record();
    let other = [1; 16];
    assert_eq!(Record::decode(&other, head.page, &page, crc32c).err(), Some(LogError::Foreign));
    let elsewhere = Record::decode(&REGION, head.page ^ 1, &page, crc32c);
    assert_eq!(elsewhere.err(), Some(LogError::Foreign));
    assert_eq!(decode(&head, &page[..BLOCK_BYTES - 1]).err(), Some(LogError::Magic));
    assert_eq!(decode(&head, &[0; BLOCK_BYTES]).err(), Some(LogError::Magic));
}

#[test]
fn a_sealed_record_that_makes_no_sense_is_refused() {
    let (head, _, _, page) = Random(4).record();
    assert!(head.entries > 1, "the test needs an entry to spoil");
    let spoiled = |at: usize, bytes: &[u8]| {
        let mut page = page.clone();
        put(&mut page, at, bytes);
        reseal(&mut page);
        decode(&head, &page).err()
    };
    let over = (RECORD_ENTRIES_MAX as u32 + 1).to_le_bytes();
    assert_eq!(spoiled(8, &2u32.to_le_bytes()), Some(LogError::Version(2)));
    assert_eq!(spoiled(60, &over), Some(LogError::Counts));
    assert_eq!(spoiled(60, &u32::MAX.to_le_bytes()), Some(LogError::Counts));
    let over = (BATCH_BLOCKS_MAX as u32 + 1).to_le_bytes();
    assert_eq!(spoiled(64, &over), Some(LogError::Counts));
    assert_eq!(spoiled(32, &(SEQ_MAX + 1).to_le_bytes()), Some(LogError::Counts));
    assert_eq!(spoiled(40, &u64::MAX.to_le_bytes()), Some(LogError::Counts));
    // One payload page more or less than the entries say.
    let blocks = (head.blocks + 1).min(BATCH_BLOCKS_MAX as u32 - 1);
    assert_eq!(spoiled(64, &blocks.to_le_bytes()), Some(LogError::Entry));
    // An unknown kind; a range that leaves the object; no blocks at all.
    assert_eq!(spoiled(HEAD_BYTES + 12, &[0]), Some(LogError::Entry));
    assert_eq!(spoiled(HEAD_BYTES + 12, &[6]), Some(LogError::Entry));
    let range = [0xff, 0x03, 2, 0, EntryKind::Zeroes as u8];
    assert_eq!(spoiled(HEAD_BYTES + 8, &range), Some(LogError::Entry));
    let empty = [0, 0, 0, 0, EntryKind::Zeroes as u8];
    assert_eq!(spoiled(HEAD_BYTES + 8, &empty), Some(LogError::Entry));
}

/// A footer's pages, and what was put into it.
struct Sealed {
    head: Head,
    entries: Vec<FooterEntry>,
    crcs: Vec<u32>,
    bytes: Vec<u8>,
}

fn sealed(random: &mut Random, entries: usize, blocks_max: usize) -> Sealed {
    let mut builder = FooterBuilder::with_capacity(entries, blocks_max);
    let mut pushed = Vec::new();
    let mut crcs = Vec::new();
    for _ in 0..entries {
        let entry = random.entry(blocks_max - crcs.len());
        let at = FooterEntry { entry, page: random.next() as u32, seq: random.next() };
        builder.push(&at);
        for _ in 0..entry.pages() {
            crcs.push(random.next() as u32);
            builder.push_crc(crcs[crcs.len() - 1]);
        }
        pushed.push(at);
    }
    assert_eq!((builder.entries(), builder.blocks()), (entries, crcs.len()));
    let (count, blocks) = (entries as u32, crcs.len() as u32);
    let head = Head { entries: count, blocks, ..random.head() };
    let mut bytes = vec![0xa5; builder.pages() * BLOCK_BYTES];
    for (index, page) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
        builder.encode(&head, index, page, crc32c);
    }
    Sealed { head, entries: pushed, crcs, bytes }
}

/// Reads a footer as recovery does: its last page, then all of it.
fn open(sealed: &Sealed, bytes: &[u8]) -> Result<Footer, LogError> {
    let last = &bytes[bytes.len() - BLOCK_BYTES..];
    let page = sealed.head.page;
    let (head, pages) = Footer::decode_pages(&REGION, page, last, SEGMENT_PAGES, crc32c)?;
    let from = bytes.len().checked_sub(pages as usize * BLOCK_BYTES).ok_or(LogError::Counts)?;
    Footer::decode(head, &bytes[from..], crc32c)
}

fn check_same(footer: &Footer, sealed: &Sealed) {
    assert_eq!(footer.head, sealed.head);
    assert!(footer.entries().eq(sealed.entries.iter().copied()));
    assert!((0..sealed.crcs.len()).all(|index| footer.crc(index) == sealed.crcs[index]));
}

#[test]
fn a_footer_decodes_to_what_was_encoded() {
    let mut random = Random(5);
    let mut pages = [0; 8];
    for _ in 0..200 {
        let entries = random.below(segment_entries_max(SEGMENT_PAGES) as u64 + 1) as usize;
        let sealed = sealed(&mut random, entries, SEGMENT_PAGES as usize);
        pages[sealed.bytes.len() / BLOCK_BYTES] += 1;
        check_same(&open(&sealed, &sealed.bytes).expect("a sound footer"), &sealed);
    }
    assert!(pages[1] > 0 && pages[2] > 0 && pages[3] > 0, "{pages:?}");
}

#[test]
fn footers_on_the_edge_of_a_page_decode() {
    // Entries that end just before, at and behind the end of the last page, and of the one before.
    let mut random = Random(6);
    let first = (BLOCK_BYTES - HEAD_BYTES - 8) / FOOTER_ENTRY_BYTES;
    let second = (2 * BLOCK_BYTES - HEAD_BYTES - 8) / FOOTER_ENTRY_BYTES;
    for entries in [0, 1, first - 1, first, first + 1, second, second + 1] {
        for blocks in [0, 1, 200] {
            let sealed = sealed(&mut random, entries, blocks);
            check_same(&open(&sealed, &sealed.bytes).expect("a sound footer"), &sealed);
        }
    }
}

#[test]
fn a_flipped_byte_of_a_footer_is_seen_or_means_nothing() {
    let mut random = Random(7);
    let mut sealed = sealed(&mut random, 180, 220);
    assert!(sealed.bytes.len() > BLOCK_BYTES);
    let used = HEAD_BYTES + 8 + 180 * FOOTER_ENTRY_BYTES + sealed.crcs.len() * 4;
    let mut seen = 0;
    for at in 0..sealed.bytes.len() {
        let flip = 1 << random.below(8);
        sealed.bytes[at] ^= flip;
        match open(&sealed, &sealed.bytes) {
            Ok(footer) => check_same(&footer, &sealed),
            Err(_) => seen += 1,
        }
        sealed.bytes[at] ^= flip;
    }
    assert_eq!(seen, used, "every byte that says something is covered");
}

#[test]
fn a_footer_names_no_more_than_a_segment_holds() {
    let mut random = Random(8);
    let sealed = sealed(&mut random, 100, 100);
    let last = &sealed.bytes[sealed.bytes.len() - BLOCK_BYTES..];
    let pages = |at: usize, value: u32, segment_pages: u32| {
        let mut last = last.to_vec();
        put(&mut last, at, &value.to_le_bytes());
        put(&mut last, 12, &[0; 4]);
        let fixed = crc32c(0, &last[..HEAD_BYTES + 8]);
        put(&mut last, 12, &fixed.to_le_bytes());
        let found = Footer::decode_pages(&REGION, sealed.head.page, &last, segment_pages, crc32c);
        found.map(|(_, pages)| pages)
    };
    let most = segment_entries_max(SEGMENT_PAGES) as u32;
    assert!(pages(60, most, SEGMENT_PAGES).is_ok());
    assert_eq!(pages(60, most + 1, SEGMENT_PAGES), Err(LogError::Counts));
    assert_eq!(pages(60, u32::MAX, SEGMENT_PAGES), Err(LogError::Counts));
    assert!(pages(64, SEGMENT_PAGES, SEGMENT_PAGES).is_ok());
    assert_eq!(pages(64, SEGMENT_PAGES + 1, SEGMENT_PAGES), Err(LogError::Counts));
    assert_eq!(pages(64, u32::MAX, SEGMENT_PAGES), Err(LogError::Counts));
    assert_eq!(pages(60, most, 1), Err(LogError::Counts));
    let short = Footer::decode(sealed.head, &sealed.bytes[BLOCK_BYTES..], crc32c);
    assert_eq!(short.err(), Some(LogError::Counts));
}
