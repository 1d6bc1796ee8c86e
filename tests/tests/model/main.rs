//! The model test: whole lives of a server against a model of what its clients were promised.
//!
//! Random reads, unaligned writes, zeroes, discards, flushes and pushes run on shards and a keeper
//! over a simulated device and store, whose operations end in any order. A life ends in a kill, a
//! power cut (un-flushed writes are torn and lost), a release, or the loss of the cache; the next
//! one reads everything. At every commit the image in the store is decoded from its bytes and must
//! be a consistent cut.
//!
//! `HEELER_SEEDS=N` runs N seeds from `HEELER_SEED` on (default 0); a failure prints its seed.
#![cfg(not(loom))]

mod history;
mod store;
mod world;

use heeler_core::event::Mode;
use heeler_hw::sim::Rng;
use world::{End, Stats, World};

fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("HEELER_SEED").unwrap_or(0);
    first..first + number("HEELER_SEEDS").unwrap_or(default)
}

/// Names the seed when a run fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "failed with seed {}: run it alone with HEELER_SEED={} HEELER_SEEDS=1",
                self.0, self.0
            );
        }
    }
}

fn run(seed: u64, ends: &[End], rots: bool, resizes: bool, modes: bool) -> Stats {
    let mut rng = Rng::new(seed ^ 0x5eed);
    let mut world = World::new(seed, 12 + rng.index(16));
    world.rots = rots;
    world.resizes = resizes;
    world.modes = modes;
    lives(world, seed, rng, ends)
}

fn run_sized(seed: u64, ends: &[End]) -> Stats {
    let mut rng = Rng::new(seed ^ 0x5eed);
    let mut world = World::new(seed, 12 + rng.index(16));
    world.sizes = true;
    world.modes = seed.is_multiple_of(3);
    lives(world, seed, rng, ends)
}

fn lives(mut world: World, seed: u64, mut rng: Rng, ends: &[End]) -> Stats {
    let _seed = Seed(seed);
    world.churns = rng.chance(1, 3);
    world.store.fail_one_in = [0, 0, 30, 8][rng.index(4)];
    let mut last = None;
    for _ in 0..2 + rng.index(4) {
        let end = ends[rng.index(ends.len())];
        let steps = [300, 1500, 4000][rng.index(3)];
        world.live(last, steps, end);
        last = Some(end);
    }
    world.live(last, 0, End::Kill);
    world.stats
}

fn add(sum: &mut Stats, one: Stats) {
    sum.lives += one.lives;
    sum.writes += one.writes;
    sum.reads += one.reads;
    sum.flushes += one.flushes;
    sum.commits += one.commits;
    sum.moved += one.moved;
    sum.torn += one.torn;
    sum.fetched += one.fetched;
    sum.merges += one.merges;
    sum.rotten += one.rotten;
    sum.damaged += one.damaged;
    sum.copied += one.copied;
    sum.given_back += one.given_back;
    sum.mode_changes += one.mode_changes;
    sum.grown += one.grown;
    sum.shrunk += one.shrunk;
    sum.lost += one.lost;
    sum.cells.extend(one.cells);
}

#[test]
fn what_was_promised_survives_every_end() {
    let mut sum = Stats::default();
    for seed in seeds(2000) {
        let ends = [End::Kill, End::PowerCut, End::Release, End::CacheLost];
        add(&mut sum, run(seed, &ends, false, seed % 2 == 1, false));
    }
    println!("{sum:?}");
    // The test is about these; it must not pass because they never happened.
    let few = sum.lives < 100;
    assert!(few || sum.commits > 0 && sum.fetched > 0 && sum.torn > 0 && sum.merges > 0, "{sum:?}");
    assert!(few || sum.copied > 0 && sum.given_back > 0, "{sum:?}");
}

#[test]
fn every_mode_keeps_its_promise_at_every_end() {
    let ends = [End::Kill, End::PowerCut, End::Release, End::CacheLost];
    let mut sum = Stats::default();
    for seed in seeds(1000) {
        add(&mut sum, run(seed, &ends, false, seed % 2 == 1, true));
    }
    println!("{sum:?}");
    let few = sum.lives < 300;
    assert!(few || sum.mode_changes > 0 && sum.lost > 0, "{sum:?}");
    assert!(few || sum.cells.len() == Mode::ALL.len() * ends.len(), "{sum:?}");
}

#[test]
fn damage_to_clean_blocks_is_never_served() {
    let mut sum = Stats::default();
    for seed in seeds(500) {
        add(
            &mut sum,
            run(seed, &[End::Kill, End::PowerCut, End::Release], true, seed % 2 == 1, false),
        );
    }
    println!("{sum:?}");
    let few = sum.lives < 100;
    assert!(few || sum.rotten > 0 && sum.damaged > 0, "{sum:?}");
}

/// Nothing of what stays is lost, and nothing of what was cut off comes back.
#[test]
fn a_volume_of_changing_size_keeps_its_promises() {
    let ends = [End::Kill, End::PowerCut, End::Release, End::CacheLost];
    let mut sum = Stats::default();
    for seed in seeds(600) {
        add(&mut sum, run_sized(seed, &ends));
    }
    println!("{sum:?}");
    let few = sum.lives < 100;
    assert!(few || sum.grown > 100 && sum.shrunk > 100, "{sum:?}");
}

/// Lives in which something was lost once, and what; with bits flipping or not.
const REGRESSIONS: [(u64, bool, &str); 7] = [
    (7, false, "an old version, moved by reclaim, outlived in the log the one that replaced it"),
    (9, false, "a footer lost in a power cut hid a segment of flushed records"),
    (4, false, "of two entries in one record the older one was recovered"),
    (34, false, "zeroes under a closed epoch's data were not logged again by reclaim"),
    (205, false, "a moved block, written again, was pushed from a place not yet written"),
    (453, true, "moves of clean blocks took the last segments, and the log stood still"),
    (1859, true, "a footer that outlived its records in a power cut was believed"),
];

#[test]
fn what_was_lost_once_is_not_lost_again() {
    let ends = [End::Kill, End::PowerCut, End::Release, End::CacheLost];
    for (seed, rots, lost) in REGRESSIONS {
        println!("seed {seed}: {lost}");
        run(seed, if rots { &ends[..3] } else { &ends }, rots, false, false);
    }
}
