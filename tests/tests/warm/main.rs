//! What was hot before a restart is hot after it, whatever ended the process; and what the record
//! of it says can make nothing wrong.
#![cfg(not(loom))]

mod machine;

use heeler_core::budget::Target;
use heeler_core::ids::VolumeId;
use heeler_core::policy::Policy;
use heeler_hw::sim::Rng;
use machine::{BLOCKS, Life, Machine, VOLUME, stored};

/// Pages of RAM: an eighth of the volume.
const PAGES: u32 = 1024;
/// More than the volume has blocks.
const SEGMENTS: u32 = 192;
/// Requests that a ratio is taken of: few enough that refilling RAM would show.
const REQUESTS: u64 = 6000;

/// Blocks by Zipf's law, spread over the volume.
struct Zipf {
    /// Sums of the weights of the ranks, in parts of 2^32.
    sums: Vec<u64>,
    rng: Rng,
}

impl Zipf {
    fn new(seed: u64) -> Self {
        let weight = |rank: u32| ((1u64 << 40) as f64 / f64::from(rank + 1).powf(0.9)) as u64;
        let mut sum = 0;
        let sums = (0..BLOCKS).map(|rank| {
            sum += weight(rank);
            sum
        });
        Self { sums: sums.collect(), rng: Rng::new(seed) }
    }

    fn next(&mut self) -> u32 {
        let dice = self.rng.below(*self.sums.last().expect("some"));
        let rank = self.sums.partition_point(|sum| *sum <= dice) as u32;
        // An odd factor permutes the numbers below a power of two.
        rank.wrapping_mul(2_654_435_761) % BLOCKS
    }
}

/// Hits in RAM, and in RAM or on NVMe, of so many requests, in thousandths.
fn ratios(life: &mut Life<'_>, zipf: &mut Zipf, requests: u64) -> [u64; 2] {
    let before = life.shard.traffic();
    for _ in 0..requests {
        let block = zipf.next();
        assert_eq!(life.read(block, 1), [stored(block)]);
        life.pass(1);
    }
    let after = life.shard.traffic();
    let hits = after.ram_blocks - before.ram_blocks;
    let stored = after.store_blocks - before.store_blocks;
    [hits * 1000 / requests, (requests - stored) * 1000 / requests]
}

/// How a server ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// It does not.
    No,
    Kill,
    Clean,
}

/// Ratios of the same requests, after a long time and such an end.
fn ratios_after(end: End, mut machine: Machine) -> [u64; 2] {
    let mut zipf = Zipf::new(1);
    let went_on = machine.live(|life| {
        ratios(life, &mut zipf, 40_000);
        life.wait_for_record(1);
        // A kill comes some time after the record.
        ratios(life, &mut zipf, 500);
        match end {
            End::No => return Some(ratios(life, &mut zipf, REQUESTS)),
            End::Kill => {}
            End::Clean => life.save(),
        }
        None
    });
    went_on.unwrap_or_else(|| machine.live(|life| ratios(life, &mut zipf, REQUESTS)))
}

#[test]
fn the_hit_ratio_is_the_same_after_a_restart() {
    for &policy in Policy::ALL {
        let ratios = |end| ratios_after(end, Machine::new(policy, PAGES, SEGMENTS));
        let before = ratios(End::No);
        for end in [End::Kill, End::Clean] {
            let after = ratios(end);
            println!("{} {before:?} {end:?} {after:?}", policy.name());
            for (before, after) in before.into_iter().zip(after) {
                assert!(after + 10 >= before, "{} {end:?}: {before} {after}", policy.name());
            }
        }
    }
}

#[test]
fn without_a_record_a_restart_is_seen() {
    let mut machine = Machine::new(Policy::Reuse, PAGES, SEGMENTS);
    let before = ratios_after(End::No, Machine::new(Policy::Reuse, PAGES, SEGMENTS));
    machine.spoils = true;
    let after = ratios_after(End::Clean, machine);
    assert!(before[0] > after[0] + 40, "{before:?} {after:?}");
}

#[test]
fn ghosts_and_what_was_learned_come_back() {
    for policy in [Policy::Reuse, Policy::TwoQ, Policy::S3Fifo] {
        let mut machine = Machine::new(policy, PAGES, SEGMENTS);
        let mut zipf = Zipf::new(2);
        let before = machine.live(|life| {
            ratios(life, &mut zipf, 20_000);
            life.save();
            life.shard.buffers().usage()
        });
        let after = machine.live(|life| life.shard.buffers().usage());
        assert_eq!(before.ghosts, after.ghosts, "{}", policy.name());
        // Some pages are left to clients.
        let spare = 32 + before.free;
        assert!(before.warm_in + before.hot <= after.warm_in + after.hot + spare, "{after:?}");
        assert!(after.warm_in <= before.warm_in && after.hot <= before.hot);
    }
}

#[test]
fn with_less_memory_the_hottest_come_back() {
    for policy in [Policy::Reuse, Policy::Lru] {
        let mut machine = Machine::new(policy, PAGES, SEGMENTS);
        let blocks = |part: u32| (0..200).map(move |at| part * 208 + at * 37 % 200 + at % 3 * 2048);
        machine.live(|life| {
            // Twice, so that nothing is new any more.
            for part in [0, 1, 2, 3].into_iter().flat_map(blocks) {
                life.read(part, 1);
            }
            for part in [2, 0, 3, 1] {
                life.pass(20_000);
                blocks(part).for_each(|block| _ = life.read(block, 1));
            }
            life.save();
        });
        machine.pages = 256 + 32 + 200;
        machine.live(|life| {
            let in_ram =
                [2, 0, 3, 1].map(|part| blocks(part).filter(|&b| life.is_in_ram(b)).count());
            assert!(in_ram[2] == 200 && in_ram[3] == 200 && in_ram[0] == 0, "{in_ram:?}");
        });
    }
}

#[test]
fn what_only_the_store_has_is_fetched_in_large_gets_if_it_came_back() {
    let mut machine = Machine::new(Policy::Reuse, PAGES, SEGMENTS);
    let stream = |life: &mut Life<'_>, first: u32| {
        (first..first + 512).step_by(32).for_each(|block| _ = life.read(block, 32));
    };
    machine.live(|life| {
        stream(life, 0);
        // Time goes on, by uses.
        for round in 0..40u32 {
            (0..64).for_each(|block| _ = life.read(4096 + (round + block) % 80, 1));
        }
        stream(life, 0);
        // Seen once.
        (1024..1280).step_by(32).for_each(|block| _ = life.read(block, 32));
        life.save();
    });
    machine.live(|life| {
        // Of the stream two thirds came by readahead. For these the second read was the third use:
        // they went to the log by it.
        assert_eq!(life.fetches, [32; 6]);
        // The first request of what was seen once was not known to begin a stream: it is on NVMe.
        assert_eq!(life.shard.counters().warmed_blocks, 512 + 80 + 32);
        assert!((0..512).all(|block| life.is_in_ram(block)));
        assert!((1056..1280).all(|block| !life.is_in_ram(block)), "seen once");
    });
}

#[test]
fn a_store_that_fails_ends_the_fetches_and_nothing_else() {
    let mut machine = Machine::new(Policy::Lru, PAGES, SEGMENTS);
    machine.live(|life| {
        // A stream stays out of the log, the other blocks do not.
        (0..512).step_by(32).for_each(|block| _ = life.read(block, 32));
        (0..200).for_each(|block| _ = life.read(4096 + block * 7, 1));
        life.save();
    });
    machine.store_fails = true;
    machine.live(|life| {
        assert_eq!(life.fetches.len(), 2, "the first, and what was put together meanwhile");
        assert!((0..200).all(|block| life.is_in_ram(4096 + block * 7)));
        life.store_fails = false;
        (0..BLOCKS).for_each(|block| assert_eq!(life.read(block, 1), [stored(block)]));
        life.wait_for_record(1);
    });
}

#[test]
fn an_old_record_brings_no_old_data_back() {
    let mut machine = Machine::new(Policy::Reuse, PAGES, SEGMENTS);
    machine.live(|life| {
        for _ in 0..3 {
            (0..600).for_each(|block| _ = life.read(block * 3, 1));
        }
        life.wait_for_record(1);
        for block in (0..600).map(|block| block * 3) {
            match block % 4 {
                0 => life.write(block, 7 << 40 | u64::from(block)),
                1 => life.discard(block),
                _ => {}
            }
        }
    });
    for _ in 0..2 {
        machine.live(|life| {
            assert!(life.shard.counters().warmed_blocks > 100);
            for block in (0..600).map(|block| block * 3) {
                let expected = match block % 4 {
                    0 => 7 << 40 | u64::from(block),
                    1 => 0,
                    _ => stored(block),
                };
                assert_eq!(life.read(block, 1), [expected], "block {block}");
            }
        });
    }
}

#[test]
fn a_damaged_record_is_passed_over_page_by_page() {
    let mut machine = Machine::new(Policy::Reuse, PAGES, SEGMENTS);
    let mut zipf = Zipf::new(4);
    machine.live(|life| {
        ratios(life, &mut zipf, 8000);
        life.save();
    });
    let mut rng = Rng::new(9);
    let mut warmed = Vec::new();
    for _ in 0..6 {
        warmed.push(machine.live(|life| {
            let warmed = life.shard.counters().warmed_blocks;
            (0..BLOCKS)
                .step_by(97)
                .for_each(|block| assert_eq!(life.read(block, 1), [stored(block)]));
            warmed
        }));
        for page in machine.heat() {
            if rng.chance(1, 3) {
                machine.disk.flip_bit(page, rng.index(4096 * 8));
            }
        }
    }
    assert!(warmed[0] > 500 && warmed[5] < warmed[0], "{warmed:?}");
    for page in machine.heat() {
        machine.disk.break_pages(page..page + 1);
    }
    machine.live(|life| assert_eq!(life.shard.counters().warmed_blocks, 0));
}

#[test]
fn who_does_nothing_writes_nothing() {
    let mut machine = Machine::new(Policy::Reuse, PAGES, SEGMENTS);
    let mut zipf = Zipf::new(5);
    machine.live(|life| {
        ratios(life, &mut zipf, 5000);
        let records = life.shard.counters().heat_records;
        assert!((2..6).contains(&records), "one a second, after two: {records}");
        life.wait_for_record(1);
        life.pass(60_000);
        let before = life.shard.counters().heat_pages;
        (0..100).for_each(|_| life.pass(60_000));
        assert_eq!(life.shard.counters().heat_pages, before);
        assert_eq!(life.shard.poll_timeout(), None);
    });
    machine.live(|life| {
        (0..100).for_each(|_| life.pass(60_000));
        assert_eq!(life.shard.counters().heat_pages, 0, "to read what was hot changes nothing");
    });
}

#[test]
fn a_record_says_what_the_shard_might_have() {
    let mut machine = Machine::new(Policy::Reuse, PAGES, SEGMENTS);
    for share in
        [Target { pages: 1700, meta_units: 5000 }, Target { pages: 1500, meta_units: 7000 }]
    {
        machine.live(|life| {
            life.allow(share.pages, share.meta_units);
            (0..100).for_each(|block| _ = life.read(block * 7, 1));
            life.save();
        });
        assert_eq!(machine.share(), share);
    }
}

/// Shards that were quicker to read what had been hot took the pages of the others away, and these
/// had no room for it any more.
#[test]
fn a_shard_claims_all_its_pages_until_what_was_hot_is_back() {
    let mut machine = Machine::new(Policy::Reuse, PAGES, SEGMENTS);
    let claimed = |life: &Life<'_>| life.shard.budget_report().page_ages[0];
    machine.start(|life| {
        life.pass(100_000);
        assert_eq!(claimed(life), PAGES.into(), "nothing is known yet");
        life.attach(VOLUME);
        assert_eq!(claimed(life), 0, "there was nothing");
        (0..100).for_each(|block| _ = life.read(block * 7, 1));
        life.save();
    });
    machine.start(|life| {
        life.attach(VOLUME);
        assert!(life.claims.len() == 100 && life.claims.iter().all(|claim| *claim == PAGES.into()));
        assert_eq!(claimed(life), 100, "what is back, and no more");
    });
}

/// What is hot of a volume that a slow store lets wait is not in a record that is made meanwhile.
#[test]
fn a_record_waits_for_volumes_to_be_attached_but_not_for_ever() {
    let mut machine = Machine::new(Policy::Reuse, PAGES, SEGMENTS);
    machine.live(|life| {
        (0..300).for_each(|block| _ = life.read(block * 7, 1));
        life.save();
    });
    let other = |life: &mut Life<'_>, seconds: u64| {
        life.attach(VolumeId(9));
        for second in 0..seconds {
            (0..8).for_each(|block| _ = life.read(second as u32 * 8 + block, 1));
            life.pass(1000);
        }
    };
    machine.start(|life| {
        other(life, 50);
        assert_eq!(life.shard.counters().heat_records, 0);
        life.save();
    });
    machine.start(|life| {
        other(life, 50);
        life.attach(VOLUME);
        assert!((0..300).all(|block| life.is_in_ram(block * 7)), "as it was");
    });
    machine.start(|life| {
        other(life, 100);
        assert!(life.shard.counters().heat_records > 10, "not for ever");
    });
}
