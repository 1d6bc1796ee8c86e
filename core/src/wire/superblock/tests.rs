use alloc::vec;
use alloc::vec::Vec;

use super::*;
use crate::wire::frame::tests::crc32c;

const CACHE: [u8; 16] = *b"the cache's name";

fn superblock() -> Superblock {
    Superblock::layout(CACHE, 8, 10 << 30).expect("large enough")
}

fn encoded(superblock: &Superblock) -> Vec<u8> {
    let mut page = vec![0xa5; BLOCK_BYTES];
    superblock.encode(&mut page, crc32c);
    page
}

/// Changes bytes and makes the checksum right again.
fn spoil(page: &mut [u8], at: usize, bytes: &[u8]) {
    put(page, at, bytes);
    put(page, 12, &[0; 4]);
    let crc = crc32c(0, page);
    put(page, 12, &crc.to_le_bytes());
}

#[test]
fn a_layout_fits_its_device_and_wastes_little() {
    for shards in [1, 2, 3, 8, SHARDS_MAX as u16] {
        let least = Superblock::bytes_min(shards);
        assert_eq!(Superblock::layout(CACHE, shards, least - 1), None);
        let mut bytes = least;
        while bytes < 1 << 47 {
            for bytes in [bytes, bytes + 4095, bytes + bytes / 3] {
                let found = Superblock::layout(CACHE, shards, bytes).expect("large enough");
                assert_eq!(Superblock::decode(&encoded(&found), crc32c), Ok(found), "{bytes}");
                assert!(found.device_bytes() <= bytes);
                let regions = REGIONS_PAGE as u64..found.region_page(shards);
                let starts = (0..shards).map(|shard| found.region_page(shard));
                assert!(starts.eq(regions.step_by(found.region_pages() as usize)));
                // At most a segment of each region is left over, but for what a page number of
                // four bytes cannot reach.
                let segment = u64::from(found.segment_pages) * BLOCK_BYTES as u64;
                let wasted = bytes - found.device_bytes();
                let reach = u64::from(u32::MAX) * u64::from(shards) * BLOCK_BYTES as u64;
                let limit = (segment + 4096) * u64::from(shards) + bytes.saturating_sub(reach);
                assert!(wasted <= limit, "{wasted} of {bytes} in {shards} regions");
            }
            bytes *= 2;
        }
    }
}

#[test]
fn regions_have_names_of_their_own() {
    let superblock = superblock();
    let mut ids: Vec<_> = (0..SHARDS_MAX as u16).map(|shard| superblock.region_id(shard)).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), SHARDS_MAX);
}

#[test]
fn every_flipped_byte_of_a_superblock_is_seen() {
    let mut page = encoded(&superblock());
    for at in 0..BLOCK_BYTES {
        page[at] ^= 1 << (at % 8);
        let found = Superblock::decode(&page, crc32c);
        match at {
            0..8 => assert_eq!(found, Err(SuperblockError::Magic)),
            8..12 => assert!(matches!(found, Err(SuperblockError::Version(_)))),
            _ => assert_eq!(found, Err(SuperblockError::Checksum)),
        }
        page[at] ^= 1 << (at % 8);
    }
    assert_eq!(Superblock::decode(&page, crc32c), Ok(superblock()));
    assert_eq!(Superblock::decode(&page[..4095], crc32c), Err(SuperblockError::Magic));
    assert_eq!(Superblock::decode(&[0; 4096], crc32c), Err(SuperblockError::Magic));
}

#[test]
fn a_sealed_superblock_that_makes_no_sense_is_refused() {
    let refused = |at: usize, bytes: &[u8]| {
        let mut page = encoded(&superblock());
        spoil(&mut page, at, bytes);
        Superblock::decode(&page, crc32c).expect_err("spoiled")
    };
    for version in [1, CACHE_VERSION as u8 + 1] {
        assert_eq!(refused(8, &[version]), SuperblockError::Version(version.into()));
    }
    for shards in [0, SHARDS_MAX as u16 + 1, u16::MAX] {
        assert_eq!(refused(32, &shards.to_le_bytes()), SuperblockError::Geometry);
    }
    for segment_pages in [0, SEGMENT_PAGES_MIN / 2, 96, SEGMENT_PAGES_MAX * 2, u32::MAX] {
        assert_eq!(refused(36, &segment_pages.to_le_bytes()), SuperblockError::Geometry);
    }
    for segments in [0, SEGMENTS_MIN - 1, u32::MAX] {
        assert_eq!(refused(40, &segments.to_le_bytes()), SuperblockError::Geometry);
    }
    for heat_pages in [0, HEAT_PAGES_MIN - 2, HEAT_PAGES_MIN + 1, u32::MAX - 1] {
        assert_eq!(refused(44, &heat_pages.to_le_bytes()), SuperblockError::Geometry);
    }
    // The volume table's page is no superblock.
    let mut page = [0; BLOCK_BYTES];
    VolumeTable::default().encode(&mut page, crc32c);
    assert_eq!(Superblock::decode(&page, crc32c), Err(SuperblockError::Magic));
}

fn row(number: u32) -> VolumeRow {
    let id = |salt: u32| {
        let mut id = [salt as u8; 16];
        id[..4].copy_from_slice(&number.to_le_bytes());
        id
    };
    VolumeRow {
        number: VolumeId(number),
        released: number.is_multiple_of(3),
        uuid: id(1),
        nonce: id(2),
        pending: id(3),
    }
}

#[test]
fn a_volume_table_decodes_to_what_was_encoded() {
    for count in [0, 1, 2, VOLUMES_MAX as u32] {
        let table = VolumeTable {
            generation: 1 << 60 | u64::from(count),
            next_number: count + 7,
            rows: (0..count).map(row).collect(),
        };
        let mut page = vec![0xa5; BLOCK_BYTES];
        table.encode(&mut page, crc32c);
        assert_eq!(VolumeTable::decode(&page, crc32c).as_ref(), Ok(&table));
        for at in 0..BLOCK_BYTES {
            page[at] ^= 0x10;
            assert!(VolumeTable::decode(&page, crc32c).is_err(), "byte {at}");
            page[at] ^= 0x10;
        }
        for rows in [VOLUMES_MAX as u32 + 1, u32::MAX] {
            let mut page = page.clone();
            spoil(&mut page, 28, &rows.to_le_bytes());
            assert_eq!(VolumeTable::decode(&page, crc32c), Err(SuperblockError::Geometry));
        }
    }
}
