//! What the cache asks of the store: bytes and requests for what clients read and write, and what
//! the store holds meanwhile.
//!
//! A server with a virtual clock (see `machine`) replays requests at their times, so the figures
//! are the same on every machine.
#![cfg(not(loom))]

mod machine;
mod report;
mod store;
mod trace;

use std::path::Path;

use heeler_core::time::Duration;
use machine::{Machine, Setup, empty_volume};
use report::{BLOCK, Cost, HEADING, Image};
use trace::Recorded;

const MIB: u64 = 1 << 20;
/// A cache of 128 MiB with little memory.
const CACHE: Setup = Setup { shards: 2, device_bytes: 128 * MIB, ram_bytes: 32 * MIB };
const SMALL: Setup = Setup { shards: 2, device_bytes: 16 * MIB, ram_bytes: 8 * MIB };

/// A store with a volume that is written from end to end, and whoever wrote it gone.
fn full_volume(bytes: u64) -> store::Store {
    let whole = Recorded { at: heeler_core::time::Instant(0), offset: 0, len: bytes, write: true };
    Image::Objects.store(&[whole])
}

/// A server that reads with an empty cache.
fn reader(bytes: u64) -> Machine {
    let mut machine = Machine::start(SMALL, full_volume(bytes), 2);
    machine.store.reset();
    machine
}

fn ask(machine: &mut Machine, offset: u64, len: u64, write: bool) {
    machine.ask(offset, len, write);
    machine.answer_all();
}

#[test]
fn a_stream_is_read_in_few_gets() {
    let mut machine = reader(16 * MIB);
    // As from a partition that is not aligned.
    for offset in (0..16 * MIB - 64 * 1024).step_by(64 * 1024) {
        ask(&mut machine, offset + 512, 64 * 1024, false);
    }
    let gets = machine.store.counts.fetches;
    assert!(gets.requests <= 40, "{gets:?} for 256 reads");
    assert!(gets.bytes <= 17 * MIB, "{gets:?} for 16 MiB");
}

#[test]
fn what_the_cache_has_of_a_stream_does_not_cut_it() {
    let mut machine = reader(16 * MIB);
    for offset in (0..4 * MIB).step_by(16 * BLOCK as usize) {
        ask(&mut machine, offset, BLOCK, true);
    }
    machine.store.reset();
    for offset in (0..4 * MIB).step_by(64 * 1024) {
        ask(&mut machine, offset, 64 * 1024, false);
    }
    let gets = machine.store.counts.fetches;
    assert!(gets.requests <= 16, "{gets:?} for 64 reads");
}

#[test]
fn lone_reads_get_what_they_ask_for() {
    let mut machine = reader(64 * MIB);
    for number in 0..500 {
        ask(&mut machine, number * 7919 % (64 * MIB / BLOCK) * BLOCK, BLOCK, false);
    }
    let gets = machine.store.counts.fetches;
    assert!(gets.bytes <= 500 * BLOCK * 11 / 10, "{gets:?} for 500 blocks");
}

#[test]
fn what_lies_together_on_the_disk_does_so_in_packs() {
    let mut machine = Machine::start(SMALL, empty_volume(16 * MIB), 1);
    // Requests of all four objects, so of both shards, in turn.
    for offset in (0..MIB).step_by(64 * 1024) {
        (0..4).for_each(|object| machine.ask(object * 4 * MIB + offset, 64 * 1024, true));
        machine.answer_all();
    }
    let mut machine = Machine::start(SMALL, machine.release(), 2);
    machine.store.reset();
    for object in 0..4 {
        ask(&mut machine, object * 4 * MIB, 128 * 1024, false);
    }
    let gets = machine.store.counts.fetches;
    assert_eq!((gets.requests, gets.bytes), (4, 4 * 128 * 1024), "each in one piece");
}

#[test]
fn a_mixed_load_costs_little_more_than_it_must() {
    let requests = trace::mixed(20_000, 96 * MIB);
    let store = Image::Blocks.store(&requests);
    let cost = Cost::of(&requests, SMALL, store);
    println!("{HEADING}\n| mixed | {cost}");
    assert!(cost.get_ratio() <= 1.5, "{:.2} of what was missed", cost.get_ratio());
    assert!(cost.put_ratio() <= 1.3, "{:.2} of what was written", cost.put_ratio());
    assert!(cost.counts.copies.requests > 0, "garbage was collected");
    assert!(cost.needed() > cost.read / 4, "the cache is small");
}

/// Random writes of 4 KiB as fast as they are taken. What a push replaces goes when the next one is
/// under way: so the most that the store holds is what is live, the garbage that is left alone
/// (40 %), and the last two pushes, one of which has not replaced anything yet.
#[test]
fn the_store_never_holds_much_more_than_what_is_live() {
    let size = 256 * MIB;
    let setup = Setup { device_bytes: 1 << 30, ..CACHE };
    let mut machine = Machine::start(setup, full_volume(size), 2);
    machine.store.reset();
    let mut random = trace::Random(88_172_645_463_325_252);
    for _ in 0..6 {
        let written = 200 * MIB;
        let pushed = machine.store.counts.packs.bytes;
        machine.store.bytes_peak = 0;
        for number in 0..written / BLOCK {
            machine.ask(random.below(size / BLOCK) * BLOCK, BLOCK, true);
            if number % 64 == 0 {
                machine.answer_all();
            }
        }
        machine.answer_all();
        machine.push();
        let push = machine.store.counts.packs.bytes - pushed;
        let most = size * 14 / 10 + 2 * push;
        assert!(machine.store.bytes_peak <= most, "{} of {most}", machine.store.bytes_peak);
    }
    let rest = machine.now + Duration::from_secs(60);
    machine.run_until(rest);
    let ratio = machine.store.bytes() as f64 / size as f64;
    assert!(ratio <= 1.5, "{ratio:.2} of what is live, at rest");
    let put = machine.store.counts.puts().bytes as f64 / (6 * 200 * MIB) as f64;
    assert!(put <= 1.3, "{put:.2} of what was written");
}

/// `make bench-traffic TRACES="..."`: the recordings that are named (`.btr.zst`), each over both
/// kinds of image.
#[test]
fn recorded_traces() {
    let paths = std::env::var("HEELER_TRAFFIC").unwrap_or_default();
    println!("{HEADING}");
    for path in paths.split_whitespace() {
        let requests = trace::read(Path::new(path));
        let file = Path::new(path).file_name().expect("a file").to_string_lossy();
        let name = file.split('.').next().expect("a name").to_owned();
        for image in [Image::Objects, Image::Blocks] {
            let cost = Cost::of(&requests, CACHE, image.store(&requests));
            println!("| {name}, {} | {cost}", image.name());
        }
    }
}
