//! Whole cores, from the bytes of a client to the simulated disk and back.

mod rig;

use std::collections::BTreeMap;
use std::ops::Range;

use heeler_core::counters::{Counts, Scrubbed, Traffic};
use heeler_core::event::{Mode, ToKeeper, ToShard};
use heeler_core::ids::{ShardId, VolumeId, shard_of};
use heeler_core::policy::Policy;
use heeler_core::shard::{DirtyKind, DirtyRun, SalvageAt, ShardCounters};
use heeler_core::time::Duration;
use heeler_driver::OpenError;
use heeler_driver::mail::FromControl;
use heeler_driver::windows::Spans;
use heeler_hw::IoKind;
use heeler_hw::sim::disk::CrashKind;
use rig::{OBJECT_SHIFT, OPEN, Rig, SHARDS, VOLUME, VOLUME_BYTES, new_disk};

/// Transit pages of a core in the smallest arena.
const TRANSIT: usize = 256;

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    heeler_hw::sim::rng::Rng::new(seed).fill(&mut bytes);
    bytes
}

fn ok(rig: &mut Rig, client: usize) {
    for done in rig.finish(client) {
        assert_eq!(done.error, 0, "request {}", done.cookie);
    }
}

#[test]
fn what_is_written_is_read_back() {
    for (cores, structured) in [(1, false), (1, true), (2, false), (2, true)] {
        let mut rig = Rig::new(new_disk(1), cores, 1);
        let client = rig.connect(0, structured);
        let bytes = pattern(9, 300_000);
        rig.clients[client].write(70_001, &bytes);
        ok(&mut rig, client);
        rig.clients[client].flush();
        rig.clients[client].read(70_001, 300_000);
        let done = rig.finish(client);
        assert!(done.iter().all(|done| done.error == 0));
        assert!(done.iter().find(|done| done.cookie == 3).unwrap().bytes == bytes);
        rig.clients[client].read(0, 70_001);
        assert!(rig.finish(client)[0].bytes.iter().all(|byte| *byte == 0));
        rig.check(TRANSIT);
        let mails: u64 = rig.cores.iter().map(|core| core.status().mails).sum();
        assert_eq!(mails > 0, cores > 1, "the other core's shards were asked by mail");
    }
}

#[test]
fn flushed_writes_survive_a_power_cut() {
    for seed in 0..8 {
        let disk = new_disk(seed);
        let mut rig = Rig::new(disk.clone(), 2, seed);
        let client = rig.connect(0, true);
        let bytes = pattern(seed, 1 << 20);
        rig.clients[client].write(1000, &bytes);
        ok(&mut rig, client);
        rig.clients[client].flush();
        ok(&mut rig, client);
        // What is under way when the power goes changes nothing of that.
        rig.clients[client].write(4 << 20, &bytes);
        for _ in 0..20 {
            rig.step();
        }
        disk.crash(CrashKind::Power);
        drop(rig);
        // Another number of cores finds the same shards.
        let mut rig = Rig::new(disk, 1, seed);
        let client = rig.connect(0, true);
        rig.clients[client].read(1000, bytes.len());
        let done = rig.finish(client);
        assert!(done[0].error == 0 && done[0].bytes == bytes, "seed {seed}");
        rig.check(TRANSIT);
    }
}

/// Requests of several clients that do not overlap while they are under way, against a model.
#[test]
fn random_requests_agree_with_a_model() {
    random_requests(0..6, false, false);
}

#[test]
fn clients_see_no_mode_change() {
    random_requests(20..32, false, true);
}

/// With the store away, a client whose writes wait for it must not keep what others need.
#[test]
fn writes_that_wait_for_the_store_hold_neither_pages_nor_tasks() {
    for cores in [1, 2] {
        let mut rig = Rig::new(new_disk(13), cores, 13);
        let client = rig.connect(0, true);
        rig.store_away = true;
        rig.set_mode(Mode::WriteThrough);
        rig.settle();
        let data = pattern(6, 4 << 20);
        rig.clients[client].write(0, &data);
        rig.clients[client].trim(6 << 20, 1 << 20);
        // Four times as much as there are pages for, and no answer.
        rig.settle();
        assert!(rig.clients[client].done.is_empty());
        rig.check(TRANSIT);
        rig.store_away = false;
        rig.push();
        ok(&mut rig, client);
        rig.clients[client].read(0, 4 << 20);
        assert!(rig.finish(client)[0].bytes == data);
        rig.check(TRANSIT);
    }
}

/// Shards and cores give pages back and get others all the time. In builds with debug assertions
/// the arena sees who uses a page that has no memory, or that another uses.
#[test]
fn nobody_notices_that_the_memory_changes_its_size() {
    random_requests(10..16, true, false);
}

fn random_requests(seeds: Range<u64>, resize: bool, modes: bool) {
    for seed in seeds {
        let cores = 1 + (seed % 3) as u16;
        let mut rig = Rig::new(new_disk(seed), cores, seed);
        for client in 0..3 {
            rig.connect(client % usize::from(cores), client % 2 == 0);
        }
        let mut model = pattern(seed, VOLUME_BYTES as usize);
        model[VOLUME_BYTES as usize / 2..].fill(0);
        for block in 0..VOLUME_BYTES / 2 / 4096 {
            let at = block as usize * 4096;
            let bytes = bytes::Bytes::copy_from_slice(&model[at..at + 4096]);
            let blocks_of_object = 1 << (OBJECT_SHIFT - 12);
            let place = ((block / blocks_of_object) as u32, (block % blocks_of_object) as u16);
            rig.store.insert(place, bytes);
        }
        let mut busy: BTreeMap<(usize, u64), (usize, usize)> = BTreeMap::new();
        let mut sizes = Vec::new();
        for round in 0..600 {
            if resize && round % 40 == 0 {
                sizes.push(rig.lending.usage().arena_bytes);
                let more = rig.rng.below(2) * rig.rng.below(96 << 20);
                rig.resize(rig.lending.bytes_min() + more);
            }
            if modes && round % 60 == 0 {
                let mode = Mode::ALL[rig.rng.index(Mode::ALL.len())];
                rig.set_mode(mode);
            }
            let client = rig.rng.index(3);
            let most = if rig.rng.chance(1, 8) { 400_000 } else { 20_000 };
            let len = 1 + rig.rng.index(most);
            let at = rig.rng.index(VOLUME_BYTES as usize - len);
            let free = busy.values().all(|(from, to)| at + len <= *from || at >= *to);
            if free {
                let cookie = start(&mut rig, &mut model, client, at, len);
                busy.insert((client, cookie), (at, at + len));
            }
            for _ in 0..rig.rng.index(8) {
                rig.step();
            }
            take_done(&mut rig, &model, &mut busy);
        }
        rig.settle();
        take_done(&mut rig, &model, &mut busy);
        assert!(busy.is_empty(), "seed {seed}: answers are missing: {busy:?}");
        assert!(rig.heard.fetches > 0);
        assert!(!resize || sizes.iter().max() > sizes.iter().min(), "the size changed");
        rig.check(TRANSIT);
        if resize {
            rig.resize(rig.lending.bytes_min());
            for _ in 0..20_000 {
                if !rig.lending.is_settled() {
                    rig.step();
                }
            }
            let usage = rig.lending.usage();
            assert!(rig.lending.is_settled() && usage.taken_bytes <= usage.total_bytes);
            rig.check(TRANSIT);
        }
    }
}

fn start(rig: &mut Rig, model: &mut [u8], client: usize, at: usize, len: usize) -> u64 {
    let choice = rig.rng.below(8);
    let seed = rig.rng.next_u64();
    let client = &mut rig.clients[client];
    let (first, last) = (at.next_multiple_of(4096), (at + len) / 4096 * 4096);
    match choice {
        0..3 => {
            let bytes = pattern(seed, len);
            model[at..at + len].copy_from_slice(&bytes);
            client.write(at as u64, &bytes)
        }
        3 => {
            model[at..at + len].fill(0);
            client.write_zeroes(at as u64, len as u32)
        }
        4 => {
            if first < last {
                model[first..last].fill(0);
            }
            client.trim(at as u64, len as u32)
        }
        _ => client.read(at as u64, len),
    }
}

fn take_done(rig: &mut Rig, model: &[u8], busy: &mut BTreeMap<(usize, u64), (usize, usize)>) {
    for client in 0..rig.clients.len() {
        for done in std::mem::take(&mut rig.clients[client].done) {
            let (from, to) = busy.remove(&(client, done.cookie)).unwrap();
            assert_eq!(done.error, 0);
            assert!(done.bytes.is_empty() || done.bytes == model[from..to], "{from}..{to}");
        }
    }
}

#[test]
fn more_writes_than_there_are_pages_get_them_in_turn() {
    let mut rig = Rig::new(new_disk(5), 1, 5);
    let bytes = pattern(5, 1 << 20);
    for client in 0..4 {
        rig.connect(0, true);
        for part in 0..2u64 {
            rig.clients[client].write((client as u64 * 2 + part) << 20, &bytes);
        }
    }
    let mut short = false;
    for _ in 0..400 {
        rig.step();
        short |= rig.cores[0].free_transit_pages() < 32;
    }
    assert!(short, "the pages were short");
    (0..4).for_each(|client| ok(&mut rig, client));
    rig.clients[0].read(7 << 20, 1 << 20);
    assert!(rig.finish(0)[0].bytes == bytes);
    rig.check(TRANSIT);
}

#[test]
fn a_connection_that_breaks_takes_nothing_with_it() {
    for seed in 0..20 {
        let mut rig = Rig::new(new_disk(seed), 2, seed);
        let (broken, other) = (rig.connect(0, true), rig.connect(0, true));
        let bytes = pattern(seed, 200_000);
        for at in 0..4u64 {
            rig.clients[broken].write(at << 20, &bytes);
            rig.clients[broken].read((at << 20) + 500_000, 300_000);
        }
        for _ in 0..rig.rng.index(60) {
            rig.step();
        }
        let id = rig.clients[broken].id;
        rig.cores[0].close(id);
        rig.clients[broken].closed = true;
        rig.cores[0].close(id);
        rig.clients[other].write(6 << 20, &bytes);
        ok(&mut rig, other);
        rig.check(TRANSIT);
        assert_eq!(rig.cores[0].status().connections, 1, "the slot is free again");
    }
}

#[test]
fn a_client_that_says_goodbye_is_closed_after_its_answers() {
    let mut rig = Rig::new(new_disk(2), 2, 2);
    let client = rig.connect(1, false);
    rig.clients[client].write(5, &pattern(1, 500_000));
    rig.clients[client].disconnect();
    ok(&mut rig, client);
    rig.check(TRANSIT);
    assert!(rig.clients[client].closed);
    assert_eq!(rig.cores[1].status().connections, 0);
}

#[test]
fn draining_finishes_what_is_under_way_and_takes_no_more() {
    let mut rig = Rig::new(new_disk(3), 2, 3);
    let client = rig.connect(0, true);
    rig.clients[client].write(0, &pattern(1, 4096));
    ok(&mut rig, client);
    rig.clients[client].flush();
    rig.step();
    for core in 0..2 {
        rig.tell(core, FromControl::Drain);
    }
    rig.settle();
    assert!(rig.clients[client].closed);
    assert_eq!(rig.cores[0].open(), Err(OpenError::Draining));
    assert_eq!(rig.heard.drained.len(), 2);
    rig.check(TRANSIT);
    rig.tell(0, FromControl::Stop);
    rig.settle();
    assert!(rig.cores[0].is_stopped() && !rig.cores[1].is_stopped());
}

/// What is drained has written down what is hot, and another number of cores reads it back.
#[test]
fn what_was_in_ram_is_there_after_a_drain() {
    let disk = new_disk(12);
    let mut rig = Rig::new(disk.clone(), 2, 12);
    let client = rig.connect(0, true);
    let bytes = pattern(12, 200 * 4096);
    rig.clients[client].write(0, &bytes);
    ok(&mut rig, client);
    (0..2).for_each(|core| rig.tell(core, FromControl::Drain));
    while rig.heard.drained.len() < 2 {
        assert!(rig.step(), "it does not drain");
    }
    drop(rig);
    let mut rig = Rig::new(disk, 1, 13);
    let warmed: u64 = rig.cores[0].shards().map(|(_, shard)| shard.counters().warmed_blocks).sum();
    assert_eq!(warmed, 200);
    let client = rig.connect(0, true);
    rig.clients[client].read(0, bytes.len());
    assert!(rig.finish(client)[0].bytes == bytes);
    let hits: u64 = rig.cores[0].shards().map(|(_, shard)| shard.traffic().ram_blocks).sum();
    assert_eq!(hits, 200);
    rig.check(TRANSIT);
}

#[test]
fn a_volume_that_is_no_longer_exported_loses_its_clients() {
    let mut rig = Rig::new(new_disk(4), 1, 4);
    let client = rig.connect(0, true);
    rig.export(false);
    rig.settle();
    assert!(rig.clients[client].closed);
    rig.check(TRANSIT);
}

#[test]
fn a_volume_is_closed_when_its_last_request_is_answered() {
    for seed in 0..8 {
        let mut rig = Rig::new(new_disk(seed), 2, seed);
        let (busy, other) = (rig.connect(0, true), rig.connect(1, false));
        for ticket in [1, 2] {
            (0..2).for_each(|core| rig.tell(core, FromControl::Close { volume: VOLUME, ticket }));
        }
        rig.settle();
        assert!(rig.heard.closed.is_empty(), "its clients are there");
        let bytes = pattern(seed, 500_000);
        rig.clients[busy].write(0, &bytes);
        rig.clients[busy].read(3 << OBJECT_SHIFT, 100_000);
        rig.clients[other].write(4 << 20, &bytes[..9000]);
        (0..rig.rng.index(60)).for_each(|_| _ = rig.step());
        rig.export(false);
        while rig.heard.closed.len() < 2 {
            assert!(rig.step(), "seed {seed}: it is not closed");
            let shards = rig.cores.iter().flat_map(|core| core.shards());
            let tasks: u64 = shards.map(|(_, shard)| shard.usage().tasks).sum();
            assert!(rig.heard.closed.len() < 2 || tasks == 0, "seed {seed}: something runs");
        }
        assert_eq!(rig.heard.closed, [2, 2], "the second order took the place of the first");
        rig.settle();
        assert!(rig.clients.iter().all(|client| client.closed));
        rig.check(TRANSIT);
    }
}

#[test]
fn what_is_dirty_of_a_lost_volume_is_listed_and_read() {
    let mut rig = Rig::new(new_disk(5), 2, 5);
    let client = rig.connect(0, true);
    let bytes = pattern(5, 3 << OBJECT_SHIFT);
    rig.clients[client].write(0, &bytes);
    rig.clients[client].trim(4 << OBJECT_SHIFT, 3 * 4096);
    ok(&mut rig, client);
    rig.tell_shards(ToShard::Fenced { volume: VOLUME });
    (0..SHARDS).for_each(|shard| rig.list_dirty(ShardId(shard), SalvageAt::default()));
    rig.settle();
    let found = std::mem::take(&mut rig.heard.dirty);
    let mut saved = vec![0; bytes.len()];
    for (shard, run) in found {
        if run.kind == DirtyKind::Zero {
            assert_eq!((run.object, run.first, run.count), (4, 0, 3));
            continue;
        }
        let core = usize::from(shard.0) % 2;
        rig.tell(core, FromControl::ReadDirty { shard, volume: VOLUME, run, ticket: 1 });
        rig.settle();
        let blocks = rig.heard.salvaged.pop().expect("an answer").expect("readable");
        let at = (run.object << OBJECT_SHIFT) as usize + usize::from(run.first) * 4096;
        saved[at..at + blocks.len()].copy_from_slice(&blocks);
    }
    assert!(saved == bytes);
    let gone = DirtyRun { object: 0, first: 0, count: 1, kind: DirtyKind::Data };
    rig.tell_shards(ToShard::Forget { volume: VOLUME });
    rig.settle();
    let shard = shard_of(VOLUME, 0, SHARDS);
    let core = usize::from(shard.0) % 2;
    rig.tell(core, FromControl::ReadDirty { shard, volume: VOLUME, run: gone, ticket: 1 });
    rig.settle();
    assert!(rig.heard.salvaged == [None]);
    rig.check(TRANSIT);
}

#[test]
fn a_push_carries_the_blocks_that_were_written() {
    let mut rig = Rig::new(new_disk(6), 2, 6);
    let client = rig.connect(0, true);
    let bytes = pattern(6, 40 * 4096);
    rig.clients[client].write(3 << OBJECT_SHIFT, &bytes);
    ok(&mut rig, client);
    assert!(rig.heard.keeper.iter().any(|(_, mail)| matches!(mail, ToKeeper::Dirtied { .. })));
    rig.push();
    rig.settle();
    let told = |wanted: fn(&ToKeeper) -> u64| -> u64 {
        rig.heard.keeper.iter().map(|(_, mail)| wanted(mail)).sum()
    };
    let frozen = told(|mail| match mail {
        ToKeeper::Frozen { epoch: OPEN, blocks, .. } => *blocks,
        _ => 0,
    });
    assert_eq!(frozen, 40);
    let pushed = told(|mail| u64::from(matches!(mail, ToKeeper::Pushed { epoch: OPEN, .. })));
    assert_eq!(pushed, u64::from(SHARDS));
    let owner = shard_of(VOLUME, 3, SHARDS);
    assert!(rig.heard.batches.iter().all(|batch| batch.shard == owner));
    let stored: Vec<u8> = (0..40).flat_map(|block| rig.store[&(3, block)].to_vec()).collect();
    assert!(stored == bytes && rig.store.len() == 40);
    rig.check(TRANSIT);
    rig.tell(0, FromControl::Report { ticket: 1 });
    rig.tell(1, FromControl::Report { ticket: 1 });
    rig.settle();
    let shares = rig.heard.statuses.iter().flat_map(|status| &status.shards);
    let shares: Vec<_> = shares.flat_map(|shard| &shard.volumes).collect();
    assert_eq!(shares.len(), usize::from(SHARDS));
    assert!(shares.iter().all(|share| (share.volume, share.dirty_blocks) == (VOLUME, 0)));
}

/// What the shards counted for the volume in the last 10 s, the last 5 min and since the start.
fn traffic(rig: &mut Rig) -> [Traffic; 3] {
    rig.heard.statuses.clear();
    for core in 0..2 {
        rig.tell(core, FromControl::Report { ticket: 1 });
    }
    rig.settle();
    let shards = rig.heard.statuses.iter().flat_map(|status| &status.shards);
    let (mut of_shards, mut of_volume) = (Spans::default(), Spans::default());
    for shard in shards {
        of_shards = of_shards.plus(shard.counts);
        of_volume = shard.volumes.iter().fold(of_volume, |sum, share| sum.plus(share.traffic));
    }
    let of_shards = [of_shards.short, of_shards.long, of_shards.all];
    let of_shards = of_shards.map(|span| span.counts.traffic);
    let of_volume = [of_volume.short, of_volume.long, of_volume.all].map(|span| span.counts);
    assert_eq!(of_shards, of_volume, "there is one volume");
    of_volume
}

#[test]
fn what_happened_is_told_apart_by_when_and_an_idle_core_sleeps() {
    let mut rig = Rig::new(new_disk(9), 2, 9);
    let client = rig.connect(0, true);
    rig.clients[client].write(0, &pattern(3, 40 * 4096));
    ok(&mut rig, client);
    rig.clients[client].read(0, 8 * 4096);
    ok(&mut rig, client);
    let early = Traffic { read_blocks: 8, ram_blocks: 8, written_blocks: 40, ..Traffic::default() };
    assert_eq!(traffic(&mut rig), [early; 3]);
    rig.now = rig.now + Duration::from_secs(60);
    for core in &mut rig.cores {
        assert_eq!(core.turn(rig.now), None, "nothing wakes an idle core");
    }
    rig.clients[client].read(4096, 4096);
    ok(&mut rig, client);
    let late = Traffic { read_blocks: 1, ram_blocks: 1, ..Traffic::default() };
    assert_eq!(traffic(&mut rig), [late, early.plus(late), early.plus(late)]);
    rig.now = rig.now + Duration::from_secs(400);
    assert_eq!(traffic(&mut rig), [Traffic::default(), Traffic::default(), early.plus(late)]);
}

#[test]
fn a_scrub_reads_all_that_the_log_holds_of_a_volume() {
    let mut rig = Rig::new(new_disk(11), 2, 11);
    let client = rig.connect(0, true);
    rig.clients[client].write(0, &pattern(3, 300 * 4096));
    ok(&mut rig, client);
    rig.push();
    rig.settle();
    for core in 0..2 {
        rig.tell(core, FromControl::Scrub { volume: VOLUME });
        rig.tell(core, FromControl::Scrub { volume: VolumeId(9) });
        rig.tell(core, FromControl::Report { ticket: 1 });
    }
    // A client's requests have their turn meanwhile.
    rig.clients[client].read(0, 8 * 4096);
    ok(&mut rig, client);
    rig.settle();
    for core in 0..2 {
        rig.tell(core, FromControl::Report { ticket: 2 });
    }
    rig.settle();
    let shares = |from: usize| {
        let statuses = rig.heard.statuses[from..from + 2].iter();
        let shares = statuses.flat_map(|status| &status.shards).flat_map(|shard| &shard.volumes);
        shares.map(|share| (share.scrubbing.is_some(), share.scrubbed)).collect::<Vec<_>>()
    };
    assert!(shares(0).iter().any(|(running, _)| *running));
    assert!(shares(2).iter().all(|(running, _)| !running));
    let found = shares(2).iter().fold(Scrubbed::default(), |sum, (_, found)| sum.plus(*found));
    assert_eq!(found, Scrubbed { sound_blocks: 300, ..Scrubbed::default() });
    rig.check(TRANSIT);
}

#[test]
fn what_leaves_ram_is_told_apart_by_what_for() {
    let mut rig = Rig::new(new_disk(10), 1, 10);
    let client = rig.connect(0, true);
    rig.clients[client].write(0, &pattern(3, 40 * 4096));
    ok(&mut rig, client);
    rig.clients[client].trim(4 * 4096, 10 * 4096);
    ok(&mut rig, client);
    rig.push();
    rig.settle();
    let counted = |rig: &Rig| {
        let shards = rig.cores[0].shards().map(|(_, shard)| shard.counters());
        shards.fold(ShardCounters::default(), Counts::plus)
    };
    let counters = counted(&rig);
    assert_eq!((counters.discarded_blocks, counters.purged_blocks), (10, 0));
    rig.tell(0, FromControl::Purge { force: false });
    rig.settle();
    let counters = counted(&rig);
    assert_eq!((counters.discarded_blocks, counters.purged_blocks), (10, 30));
    assert_eq!(counters.onode_evicted_blocks, 0);
    rig.check(TRANSIT);
}

#[test]
fn a_switched_policy_drops_nothing() {
    let mut rig = Rig::new(new_disk(12), 1, 12);
    let client = rig.connect(0, true);
    let data = pattern(5, 40 * 4096);
    rig.clients[client].write(0, &data);
    ok(&mut rig, client);
    let in_ram = |rig: &Rig| {
        let usages = rig.cores[0].shards().map(|(_, shard)| shard.buffers().usage());
        usages.map(|usage| usage.warm_in + usage.hot).sum::<u32>()
    };
    let before = in_ram(&rig);
    for policy in Policy::ALL.iter().rev() {
        rig.tell(0, FromControl::Policy(*policy));
        rig.settle();
        assert!(rig.cores[0].shards().all(|(_, shard)| shard.buffers().policy() == *policy));
        assert_eq!(in_ram(&rig), before, "blocks in RAM");
    }
    rig.clients[client].read(0, 40 * 4096);
    assert_eq!(rig.finish(client)[0].bytes, data);
    rig.check(TRANSIT);
}

#[test]
fn what_the_store_cannot_give_is_an_error_of_that_read_only() {
    let mut rig = Rig::new(new_disk(7), 2, 7);
    let client = rig.connect(0, true);
    rig.store_fails = true;
    rig.clients[client].read(12_345, 50_000);
    assert_eq!(rig.finish(client)[0].error, 5);
    rig.store_fails = false;
    rig.clients[client].read(12_345, 50_000);
    assert_eq!(rig.finish(client)[0].error, 0);
    rig.check(TRANSIT);
}

#[test]
fn a_failed_device_read_is_an_error_of_that_read_only() {
    let disk = new_disk(8);
    let mut rig = Rig::new(disk.clone(), 2, 8);
    let client = rig.connect(0, true);
    rig.clients[client].write(0, &pattern(3, 12_288));
    ok(&mut rig, client);
    drop(rig);
    // Nothing is in RAM any more.
    let mut rig = Rig::new(disk, 2, 8);
    let client = rig.connect(0, true);
    rig.disk.fail_after(IoKind::Read, 0);
    rig.clients[client].read(0, 8192);
    assert_eq!(rig.finish(client)[0].error, 5);
    rig.clients[client].read(8192, 4096);
    assert!(rig.finish(client)[0].bytes == pattern(3, 12_288)[8192..]);
    // What was lost can be written again.
    rig.clients[client].write(0, &pattern(4, 8192));
    ok(&mut rig, client);
    rig.clients[client].read(0, 8192);
    assert!(rig.finish(client)[0].bytes == pattern(4, 8192));
    rig.check(TRANSIT);
}

#[test]
fn a_core_with_mail_does_not_sleep() {
    let mut rig = Rig::new(new_disk(9), 1, 9);
    assert!(rig.cores[0].prepare_park());
    rig.cores[0].awake();
    rig.tell(0, FromControl::Report { ticket: 1 });
    assert!(!rig.cores[0].prepare_park());
    rig.settle();
    let id = rig.cores[0].open().unwrap();
    let mut rx = rig.cores[0].take_rx(id).unwrap();
    rx.extend([0, 0, 0, 3]);
    rig.cores[0].give_rx(id, rx);
    assert!(!rig.cores[0].prepare_park(), "bytes have come");
}
