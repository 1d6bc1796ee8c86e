//! One pass over ten times the cache leaves what is hot as it was: every block that was a hit
//! before the pass is a hit after it.
#![cfg(not(loom))]

use heeler_core::cache::{Access, Cache, CacheStorage};
use heeler_core::ids::VolumeId;
use heeler_core::limits::OBJECT_BLOCKS_MAX;
use heeler_core::policy::Policy;

const PAGES: u32 = 1_000;
const HOT_BLOCKS: u32 = 300;
/// Blocks asked for once between two uses of the hot ones: others run too.
const COLD_BLOCKS: u32 = 600;
const WARM_ROUNDS: u32 = 12;
const SCAN_BLOCKS: u32 = 10 * PAGES;

const HOT: VolumeId = VolumeId(1);
const COLD: VolumeId = VolumeId(2);
const SCANNED: VolumeId = VolumeId(3);

/// Asks for blocks of a volume; returns how many were in RAM.
fn access(cache: &mut Cache<'_>, volume: VolumeId, block: u32, count: u16, write: bool) -> u32 {
    let object = block / OBJECT_BLOCKS_MAX as u32;
    let first = (block % OBJECT_BLOCKS_MAX as u32) as u16;
    cache.access(Access { volume, object, first, count, write })
}

/// Asks for every hot block, each in a leaf of its own; returns which were in RAM.
fn use_hot(cache: &mut Cache<'_>) -> Vec<bool> {
    (0..HOT_BLOCKS).map(|block| access(cache, HOT, 16 * block, 1, false) == 1).collect()
}

/// Uses the hot blocks again and again between others, scans, and tells which hot blocks were hits
/// before the scan and which after it.
fn hits_around_scan(policy: Policy, count: u16, write: bool) -> (Vec<bool>, Vec<bool>) {
    let mut storage = CacheStorage::new(PAGES, 64, 8_192);
    let mut cache = Cache::new(&mut storage, PAGES, policy);
    for round in 0..WARM_ROUNDS {
        use_hot(&mut cache);
        for block in 0..COLD_BLOCKS {
            access(&mut cache, COLD, round * COLD_BLOCKS + block, 1, false);
        }
    }
    let before = use_hot(&mut cache);
    for block in (0..SCAN_BLOCKS).step_by(usize::from(count)) {
        let hits = access(&mut cache, SCANNED, block, count, write);
        assert_eq!(hits, 0, "a scan asks for everything once");
    }
    (before, use_hot(&mut cache))
}

#[test]
fn a_scan_leaves_hot_blocks_alone() {
    for policy in [Policy::default(), Policy::TwoQ, Policy::TwoQBluestore] {
        // Block by block, in requests as large as a shard takes, and written.
        for (count, write) in [(1, false), (8, false), (8, true)] {
            let name = policy.name();
            let (before, after) = hits_around_scan(policy, count, write);
            let hits = before.iter().filter(|hit| **hit).count() as u32;
            assert!(hits >= HOT_BLOCKS * 9 / 10, "{name}: {hits} of {HOT_BLOCKS} became hot");
            let lost = before.iter().zip(&after).filter(|(before, after)| **before && !**after);
            assert_eq!(lost.count(), 0, "{name}: hot blocks lost to a scan, {count} at a time");
        }
    }
}

/// The scan above would wash a cache that does not resist it.
#[test]
fn a_scan_washes_lru() {
    let (before, after) = hits_around_scan(Policy::Lru, 1, false);
    assert!(before.iter().all(|hit| *hit), "all were hits before");
    assert!(after.iter().all(|hit| !hit), "none are left");
}
