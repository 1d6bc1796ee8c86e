use alloc::vec;
use alloc::vec::Vec;

use super::*;
use crate::random::Random;
use crate::wire::frame::tests::crc32c;

fn mark(random: &mut Random) -> Mark {
    Mark::from_bytes(random.next() as u32)
}

fn leaf(random: &mut Random) -> LeafHeat {
    let buffers = random.next() as u16;
    LeafHeat {
        volume: VolumeId(random.below(5) as u32),
        object: random.next() as u32,
        first: random.below(64) as u16 * 16,
        buffers,
        warm: random.next() as u16 & buffers,
        marks: core::array::from_fn(|index| match buffers & 1 << index {
            0 => Mark::NEW,
            _ => mark(random),
        }),
    }
}

fn ghost(random: &mut Random, before: Option<GhostHeat>) -> GhostHeat {
    let follows = before.filter(|ghost| ghost.block < 1023 && random.chance(3, 4));
    let fresh = GhostHeat {
        volume: VolumeId(random.below(5) as u32),
        object: random.below(9) as u32,
        block: random.below(1024) as u16,
        mark: mark(random),
    };
    follows.map_or(fresh, |before| GhostHeat { block: before.block + 1, ..before })
}

fn object(random: &mut Random) -> ObjectHeat {
    let volume = VolumeId(random.below(5) as u32);
    let referenced = core::array::from_fn(|_| random.next() as u16 & random.next() as u16 & 0x11);
    ObjectHeat { volume, object: random.next() as u32, referenced }
}

fn sealed(page: &mut [u8], part: Part, records: u16) {
    PageHead { region: [7; 16], generation: 9, page: 5, part, records }.seal(page, crc32c);
}

/// Pushes until the page is full; returns what fitted.
fn fill<T: Copy>(mut next: impl FnMut() -> T, mut push: impl FnMut(&T) -> bool) -> Vec<T> {
    let mut all = Vec::new();
    loop {
        let one = next();
        if !push(&one) {
            return all;
        }
        all.push(one);
    }
}

#[test]
fn records_are_read_as_they_were_written() {
    let mut random = Random(5);
    for _ in 0..50 {
        let mut page = vec![0xa5; BLOCK_BYTES];
        let mut writer = PageWriter::new();
        let leaves = fill(|| leaf(&mut random), |leaf| writer.push_leaf(&mut page, leaf));
        sealed(&mut page, Part::Buffers, writer.records());
        let head = PageHead::open(&page, crc32c).expect("sound");
        assert_eq!((head.generation, head.part, head.page), (9, Part::Buffers, 5));
        let mut reader = PageReader::new(head.records);
        let found: Vec<_> = core::iter::from_fn(|| reader.next_leaf(&page)).collect();
        assert!(leaves.len() > 40 && found == leaves);

        let (mut writer, mut last) = (PageWriter::new(), None);
        let next = || *last.insert(ghost(&mut random, last));
        let ghosts = fill(next, |ghost| writer.push_ghost(&mut page, ghost));
        assert!(usize::from(writer.records()) < ghosts.len(), "neighbours share a record");
        let mut reader = PageReader::new(writer.records());
        assert!(core::iter::from_fn(|| reader.next_ghost(&page)).eq(ghosts));

        let mut writer = PageWriter::new();
        let objects = fill(|| object(&mut random), |object| writer.push_object(&mut page, object));
        let mut reader = PageReader::new(writer.records());
        assert!(core::iter::from_fn(|| reader.next_object(&page)).eq(objects));
    }
}

#[test]
fn what_was_learned_is_read_as_it_was_written() {
    let counts = |kind: usize| -> KindCounts {
        core::array::from_fn(|row| core::array::from_fn(|age| (kind * 100 + row * 50 + age) as u64))
    };
    let mut kinds = 0;
    for page_number in 1..=LEARNED_PAGES {
        let mut page = vec![0; BLOCK_BYTES];
        for (at, kind) in kinds_of_page(page_number).enumerate() {
            encode_kind(&mut page, at, &counts(kind));
        }
        sealed(&mut page, Part::Learned, 0);
        for (at, kind) in kinds_of_page(page_number).enumerate() {
            assert_eq!((kind, decode_kind(&page, at)), (kinds, counts(kind)));
            kinds += 1;
        }
    }
    assert_eq!(kinds, KINDS);
    assert!(kinds_of_page(LEARNED_PAGES + 1).is_empty() && kinds_of_page(u32::MAX).is_empty());
}

#[test]
fn a_head_whose_parts_overlap_is_refused() {
    let clock = Clock { now: 5, threshold: 6, new_allowed: 7 };
    let share = Target { pages: 8, meta_units: 9 };
    let head = RecordHead { pages: 20, ghosts_at: 8, referenced_at: 12, clock, share };
    let decoded = |head: RecordHead, pages_max: u32| {
        let mut page = vec![0xa5; BLOCK_BYTES];
        head.encode(&mut page);
        RecordHead::decode(&page, pages_max)
    };
    assert_eq!(decoded(head, 20), Some(head));
    assert_eq!(decoded(head, 19), None);
    assert_eq!(decoded(RecordHead { ghosts_at: 3, ..head }, 20), None);
    assert_eq!(decoded(RecordHead { ghosts_at: 13, ..head }, 20), None);
    assert_eq!(decoded(RecordHead { referenced_at: 21, ..head }, 20), None);
}

#[test]
fn only_the_first_page_of_the_regions_own_record_is_a_head() {
    let record = RecordHead { pages: 20, ghosts_at: 8, referenced_at: 12, ..RecordHead::default() };
    let opened = |region: [u8; 16], page: u32, part: Part| {
        let mut bytes = vec![0; BLOCK_BYTES];
        record.encode(&mut bytes);
        PageHead { region, generation: 9, page, part, records: 0 }.seal(&mut bytes, crc32c);
        RecordHead::open(&bytes, [7; 16], 20, crc32c)
    };
    assert_eq!(opened([7; 16], 0, Part::Head), Some((9, record)));
    assert_eq!(opened([6; 16], 0, Part::Head), None);
    assert_eq!(opened([7; 16], 1, Part::Head), None);
    assert_eq!(opened([7; 16], 0, Part::Buffers), None);
}

#[test]
fn every_flipped_byte_of_a_page_is_seen() {
    let mut page = vec![0x5a; BLOCK_BYTES];
    sealed(&mut page, Part::Ghosts, 3);
    for at in 0..BLOCK_BYTES {
        page[at] ^= 4;
        assert_eq!(PageHead::open(&page, crc32c), None, "byte {at}");
        page[at] ^= 4;
    }
    assert!(PageHead::open(&page, crc32c).is_some());
    assert_eq!(PageHead::open(&page[..4095], crc32c), None);
}

#[test]
fn any_bytes_are_read_without_a_panic_and_to_an_end() {
    let mut random = Random(8);
    for _ in 0..300 {
        let few = random.chance(1, 2);
        let byte = |random: &mut Random| random.next() as u8 & if few { 1 } else { 0xff };
        let page: Vec<u8> = (0..BLOCK_BYTES).map(|_| byte(&mut random)).collect();
        let records = random.next() as u16;
        let mut reader = PageReader::new(records);
        let leaves = core::iter::from_fn(|| reader.next_leaf(&page));
        assert!(leaves.map(|leaf| assert!(leaf.first <= 1008)).count() <= BLOCK_BYTES);
        let mut reader = PageReader::new(records);
        let ghosts = core::iter::from_fn(|| reader.next_ghost(&page));
        assert!(ghosts.map(|ghost| assert!(ghost.block < 1024)).count() <= BLOCK_BYTES);
        let mut reader = PageReader::new(records);
        assert!(core::iter::from_fn(|| reader.next_object(&page)).count() <= BLOCK_BYTES);
        let _ = RecordHead::decode(&page, u32::MAX);
    }
}
