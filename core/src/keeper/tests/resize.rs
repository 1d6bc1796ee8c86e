//! Volumes that grow and shrink while they are written, and crash in between.

use super::*;

impl World {
    /// Blocks that clients may use: a volume grows for them when that is committed, and shrinks
    /// before.
    fn blocks(&self, s: usize) -> usize {
        let server = &self.servers[s];
        let attached = server.attached.as_ref().map_or(0, |attached| attached.blocks);
        server.resized.unwrap_or(attached) as usize
    }

    /// What shards do with what lies behind a new end.
    fn discard_from(&mut self, s: usize, blocks: usize) {
        let content = self.content(s);
        for (at, _) in content.iter().enumerate().skip(blocks).filter(|(_, block)| **block != 0) {
            self.write(s, at, 0);
        }
    }

    fn resize(&mut self, s: usize, blocks: usize, ticket: u64) {
        self.discard_from(s, blocks);
        let edit = Edit::Blocks(blocks as u64);
        self.feed(s, Input::Edit { edit: &edit, ticket });
    }

    fn write_below(&mut self, s: usize, end: usize) {
        let start = self.rng.below(end);
        let span = [1, 10, 300][self.rng.below(3)].min(end - start);
        let scattered = self.rng.percent(50);
        for i in 0..span {
            let at = if scattered { self.rng.below(end) } else { start + i };
            let block = self.rng.next() | 1;
            self.write(s, at, block);
        }
    }
}

/// Whatever the order of writes, sizes, snapshots, checkpoints, faults and crashes: every image is
/// its cut, as large as its head says, with nothing behind its end (`check` and `read_head` say so
/// after every step), and what is cut off does not come back when the volume grows.
#[test]
fn a_volume_that_changes_its_size_has_what_was_written_and_no_more() {
    let mut sizes = 0;
    // In the last one a snapshot is made while garbage is counted: what it needed was deleted once.
    for seed in (1..=SEEDS / 4).chain([21]) {
        std_print(seed);
        let mut world = World::new(seed);
        world.faults = [0, 5, 25][world.rng.below(3)];
        let s = world.add();
        world.attach(s, false);
        let mut ticket = 0;
        let mut snapshots = 0;
        // A shrinking that is under way: clients are kept from the rest.
        let mut limit = None;
        for _ in 0..3000 {
            let end = limit.unwrap_or(BLOCKS).min(world.blocks(s).max(1));
            if limit.is_some_and(|limit| world.servers[s].resized == Some(limit as u64)) {
                limit = None;
            }
            match world.rng.below(1000) {
                0..30 if world.serves(s) => world.write_below(s, end),
                30..33 if world.serves(s) => {
                    ticket += 1;
                    world.feed(s, Input::PushNow { ticket });
                }
                33..50 if world.serves(s) => world.fetch(s),
                50..53 if world.serves(s) && snapshots < 5 => {
                    (ticket, snapshots) = (ticket + 1, snapshots + 1);
                    let edit = Edit::Snapshot(alloc::format!("s{ticket}"));
                    world.feed(s, Input::Edit { edit: &edit, ticket });
                }
                53..60 if world.serves(s) && limit.is_none() => {
                    ticket += 1;
                    let (now, page) = (world.blocks(s), MAP_PAGE_BLOCKS);
                    let exact = [page, 2 * page, BLOCKS][world.rng.below(3)];
                    let size = 1 + world.rng.below(BLOCKS);
                    let size = if world.rng.percent(30) { exact } else { size };
                    if size < now {
                        limit = Some(size);
                    }
                    if size != now {
                        world.resize(s, size, ticket);
                        // Two changes of the size do not run at the same time.
                        world.run_until(|world| {
                            let server = &world.servers[s];
                            server.done.iter().any(|done| done.0 == ticket) || server.over
                        });
                        sizes += 1;
                    }
                }
                60..62 => {
                    let content = world.content(s);
                    world.attach(s, false);
                    limit = None;
                    assert!(content == world.content(s), "a crash loses nothing the cache holds");
                }
                _ => world.step(),
            }
        }
        let content = world.content(s);
        world.feed(s, Input::Detach);
        world.run_until(|world| world.servers[s].over);
        let (head, image) = read_image(&world.objects);
        assert!(head.released && image == content, "everything is in the store");
    }
    assert!(sizes > 50, "sizes change: {sizes}");
}

/// A crash anywhere between the discard and the commit leaves the old size or the new one; in the
/// old one nothing is older than it was.
#[test]
fn a_crash_while_a_volume_shrinks_leaves_the_old_size_or_the_new() {
    let (mut old, mut new) = (0, 0);
    for crash_after in 0..150 {
        let mut world = World::new(50 + crash_after % 3);
        let s = world.add();
        world.attach(s, false);
        for at in 0..700 {
            world.write(s, at * 60, 1 + at as u64);
        }
        world.push(s, 1);
        let size = MAP_PAGE_BLOCKS + 77;
        world.resize(s, size, 2);
        for _ in 0..crash_after * 3 {
            world.step();
        }
        world.stalled.push(s);
        let (head, image) = read_image(&world.objects);
        let other = world.add();
        world.attach(other, true);
        assert!(world.content(other) == image);
        assert!(image[..size].iter().step_by(60).all(|block| *block != 0), "what stays is there");
        match world.blocks(other) {
            BLOCKS => {
                assert!(image.iter().step_by(60).take(700).all(|block| *block != 0));
                old += 1;
            }
            blocks => {
                assert_eq!((blocks, head.blocks), (size, size as u64));
                new += 1;
            }
        }
        // What was cut off does not come back.
        world.resize(other, BLOCKS, 3);
        world.run_until(|world| world.servers[other].done.contains(&(3, true)));
        assert!(read_image(&world.objects).1 == image);
    }
    assert!(old > 10 && new > 10, "both are tried: {old}, {new}");
}

/// Pages and packs that only the cut-off part needed go, but for snapshots.
#[test]
fn what_was_cut_off_is_collected() {
    let mut world = World::new(60);
    let s = world.add();
    world.attach(s, false);
    let fill = |world: &mut World, tickets: core::ops::Range<u64>| {
        for ticket in tickets {
            for at in 0..600 {
                let block = world.rng.next() | 1;
                world.write(s, (at * 80) % BLOCKS, block);
            }
            world.push(s, ticket);
        }
    };
    fill(&mut world, 1..8);
    let edit = |world: &mut World, edit: Edit, ticket| {
        world.feed(s, Input::Edit { edit: &edit, ticket });
        world.run_until(|world| world.servers[s].done.contains(&(ticket, true)));
    };
    edit(&mut world, Edit::Snapshot("full".into()), 20);
    let full = read_image(&world.objects).1;
    world.resize(s, 1000, 21);
    world.run_until(|world| world.servers[s].done.contains(&(21, true)));
    let settled = |world: &World| {
        let status = world.servers[s].keeper.status();
        world.pending.is_empty() && status.store.is_some()
    };
    world.run_until(settled);
    let number = world.newest().snapshots[0].number;
    assert!(read_head(&world.objects, number).1 == full, "the snapshot has its size and content");
    edit(&mut world, mark("full"), 22);
    edit(&mut world, Edit::DropSnapshot("full".into()), 23);
    for ticket in 30..40 {
        (0..100).for_each(|at| world.write(s, at, ticket));
        world.push(s, ticket);
    }
    world.run_until(|world| settled(world) && world.newest().tail.len() < 3);
    let (head, image) = read_image(&world.objects);
    let live = image.iter().filter(|block| **block != 0).count() as u64 * 4096;
    let of = |kind: &str| {
        let found = world.objects.iter().filter(|(key, _)| key.contains(kind));
        found.map(|(_, object)| object.bytes()).sum::<u64>()
    };
    assert!(of("/pack/") < live + (2 << 20), "{} of packs for {live}", of("/pack/"));
    let pages = world.objects.keys().filter(|key| key.contains("/map/")).count();
    assert!(pages <= head.pages.len() && head.blocks == 1000, "{pages} map pages");
}
