//! What the cache asks of the store.
#![cfg(not(loom))]

mod machine;
mod store;
mod trace;

use std::collections::BTreeSet;
use std::path::Path;

use heeler_core::time::{Duration, Instant};
use machine::{Machine, Setup, empty_volume};
use store::Store;
use trace::Recorded;

const OBJECT: u64 = 4 << 20;
const BLOCK: u64 = 4096;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Filled { Objects, Blocks, Nothing }

fn filled(requests: &[Recorded], how: Filled) -> Store {
    let end = requests.iter().map(|r| r.offset + r.len).max().unwrap().next_multiple_of(OBJECT);
    let store = empty_volume(end);
    let unit = match how { Filled::Objects => OBJECT, Filled::Blocks => BLOCK, Filled::Nothing => return store };
    let mut units = BTreeSet::new();
    for r in requests {
        units.extend(r.offset / unit..=(r.offset + r.len - 1) / unit);
    }
    let setup = Setup { shards: 2, device_bytes: 1 << 30, ram_bytes: 64 << 20 };
    let mut machine = Machine::start(setup, store, 1);
    let mut list: Vec<(u64, u64)> = Vec::new();
    for u in units {
        match list.last_mut() { Some(l) if l.0 + l.1 == u && l.1 * unit < OBJECT => l.1 += 1, _ => list.push((u, 1)) }
    }
    for (i, (u, n)) in list.into_iter().enumerate() {
        machine.ask(u * unit, n * unit, true);
        if i % 16 == 0 { machine.answer_all(); }
    }
    machine.answer_all();
    let mut store = machine.release();
    store.reset();
    store
}

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |t| t.parse().unwrap())
}

#[test]
#[ignore]
fn recorded_traces() {
    let dir = std::env::var("HEELER_TRACES").unwrap();
    let names = std::env::var("TRACES").unwrap_or("cloudphysics_vm hplajw_week diskmon_sys1".into());
    for name in names.split(' ') {
        for how in [Filled::Objects, Filled::Blocks] {
        let mut requests = trace::read(&Path::new(&dir).join(format!("{name}.btr.zst")));
        requests.truncate(env("LIMIT", u64::MAX) as usize);
        let store = filled(&requests, how);
        let setup = Setup { shards: env("SHARDS", 2) as u16, device_bytes: env("DEVICE", 128) << 20, ram_bytes: env("RAM", 32) << 20 };
        let mut machine = Machine::start(setup, store, 2);
        machine.store.reset();
        let start = machine.now;
        let base = machine.store.bytes();
        for r in &requests {
            machine.run_until(start + Duration(r.at.0));
            machine.ask(r.offset, r.len, r.write);
        }
        machine.answer_all();
        machine.push();
        let end = machine.now + Duration::from_secs(60);
        machine.run_until(end);
        let read: u64 = requests.iter().filter(|r| !r.write).map(|r| r.len).sum();
        let written: u64 = requests.iter().filter(|r| r.write).map(|r| r.len).sum();
        let c = machine.store.counts;
        let m = machine.missed;
        let mb = |b: u64| b as f64 / 1e6;
        println!("{name} {how:?}: read {:.1} missed {:.1} edges {:.1} ahead {:.1} MB; written {:.1} MB", mb(read), mb(m.reads * BLOCK), mb(m.edges*BLOCK), mb(m.ahead*BLOCK), mb(written));
        println!("   get {:.1} MB ({:.2}x of missed reads, {:.2}x with edges) in {} gets: fetch {:?} meta {:?} copy {:?}", mb(c.gets().bytes), c.gets().bytes as f64 / (m.reads*BLOCK) as f64, c.gets().bytes as f64 / ((m.reads+m.edges)*BLOCK) as f64, c.gets().requests, c.fetches, c.meta_gets, c.copy_gets);
        println!("   put {:.1} MB ({:.2}x) in {}: packs {:?} copies {:?} pages {:?} heads {:?} commits {}", mb(c.puts().bytes), c.puts().bytes as f64 / written as f64, c.puts().requests, c.packs, c.copies, c.pages, c.heads, machine.commits);
        println!("   store {:.1} at start, peak {:.1} end {:.1} MB; {:?}", mb(base), mb(machine.store.bytes_peak), mb(machine.store.bytes()), machine.keeper.status().store);
        let _ = Instant(0);
        }
    }
}
