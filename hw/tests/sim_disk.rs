//! What a simulated disk loses in a crash, what it never loses, and that it fails as told.

use std::collections::BTreeSet;

use heeler_core::ids::PageId;
use heeler_hw::sim::{CrashKind, Rng, SimDisk, SimQueue};
use heeler_hw::{AlignedBuf, Arena, BlockFile, BlockQueue, Completion, Io, IoErrorKind, IoKind};

const PAGES: u64 = 64;
const SEEDS: u64 = 400;

struct Bench {
    disk: SimDisk,
    queue: SimQueue,
    arena: Arena,
}

impl Bench {
    fn new(seed: u64) -> Self {
        let arena = Arena::new(PAGES as u32).unwrap();
        let disk = SimDisk::new(PAGES * 4096, seed);
        Self { queue: disk.queue(&arena, 64), disk, arena }
    }

    /// Submits a write of `byte` to `count` pages, from arena pages of the same numbers.
    fn start_write(&mut self, token: u64, first: u64, count: u64, byte: u8) {
        let pages: Vec<_> = (first as u32..(first + count) as u32).map(PageId).collect();
        pages.iter().for_each(|&page| self.arena.with_mut(page, |bytes| bytes.fill(byte)));
        self.start(Io { token, kind: IoKind::Write, offset: first * 4096, pages: &pages });
    }

    fn start_flush(&mut self, token: u64) {
        self.start(Io { token, kind: IoKind::Flush, offset: 0, pages: &[] });
    }

    fn start(&mut self, io: Io<'_>) {
        self.queue.push(io).unwrap();
        self.queue.submit().unwrap();
    }

    /// Completes all that is in flight.
    fn settle(&mut self) -> Vec<Completion> {
        while self.disk.step() {}
        std::iter::from_fn(|| self.queue.reap()).collect()
    }

    fn write(&mut self, first: u64, count: u64, byte: u8) {
        self.start_write(1, first, count, byte);
        assert_eq!(self.settle(), [Completion { token: 1, result: Ok(()) }]);
    }

    fn flush(&mut self) {
        self.start_flush(2);
        assert_eq!(self.settle(), [Completion { token: 2, result: Ok(()) }]);
    }

    fn page(&self, page: u64) -> Page {
        let mut buf = AlignedBuf::zeroed(1);
        self.disk.read_at(page * 4096, &mut buf).unwrap();
        let torn_at_sectors =
            buf.chunks(512).all(|sector| sector.iter().all(|&byte| byte == sector[0]));
        assert!(torn_at_sectors, "page {page} is torn inside a sector");
        let sectors: BTreeSet<u8> = buf.chunks(512).map(|sector| sector[0]).collect();
        match sectors.len() {
            1 => Page::Whole(buf[0]),
            _ => Page::Torn(sectors),
        }
    }
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Page {
    Whole(u8),
    Torn(BTreeSet<u8>),
}

#[test]
fn a_killed_process_loses_no_completed_write() {
    for seed in 0..SEEDS {
        let mut bench = Bench::new(seed);
        bench.write(0, 8, 1);
        bench.start_write(9, 8, 8, 2);
        bench.disk.crash(CrashKind::Process);
        assert!((0..8).all(|page| bench.page(page) == Page::Whole(1)), "seed {seed}");
        assert_eq!((bench.queue.reap(), bench.queue.in_flight()), (None, 0));
    }
}

/// Over many seeds a write in flight is seen done, not done, done in part, and torn.
#[test]
fn of_a_write_in_flight_any_part_is_left() {
    for kind in [CrashKind::Process, CrashKind::Power] {
        let (mut all, mut none, mut part, mut torn) = (0, 0, 0, 0);
        for seed in 0..SEEDS {
            let mut bench = Bench::new(seed);
            bench.write(0, 4, 1);
            bench.flush();
            bench.start_write(9, 0, 4, 2);
            bench.disk.crash(kind);
            let pages: Vec<Page> = (0..4).map(|page| bench.page(page)).collect();
            for page in &pages {
                let old_or_new = match page {
                    Page::Whole(byte) => [1, 2].contains(byte),
                    Page::Torn(bytes) => *bytes == BTreeSet::from([1, 2]),
                };
                assert!(old_or_new, "seed {seed}: {pages:?}");
            }
            if pages.iter().any(|page| matches!(page, Page::Torn(_))) {
                torn += 1;
            } else {
                match pages.iter().filter(|&page| *page == Page::Whole(2)).count() {
                    4 => all += 1,
                    0 => none += 1,
                    _ => part += 1,
                }
            }
        }
        let least = [all, none, part, torn].into_iter().min();
        assert!(least > Some(20), "{kind:?}: all {all} none {none} part {part} torn {torn}");
    }
}

#[test]
fn a_power_cut_takes_no_flushed_write_and_any_other() {
    let (mut kept, mut lost) = (0, 0);
    for seed in 0..SEEDS {
        let mut bench = Bench::new(seed);
        bench.write(0, 8, 1);
        bench.flush();
        bench.write(4, 8, 2);
        bench.disk.crash(CrashKind::Power);
        assert!((0..4).all(|page| bench.page(page) == Page::Whole(1)), "seed {seed}");
        for page in 4..12 {
            match (bench.page(page), page < 8) {
                (Page::Whole(2), _) => kept += 1,
                (Page::Whole(1), true) | (Page::Whole(0), false) => lost += 1,
                (Page::Torn(_), _) => {}
                (other, _) => panic!("seed {seed}, page {page}: {other:?}"),
            }
        }
        // What has survived one cut survives the next.
        let before: Vec<Page> = (0..12).map(|page| bench.page(page)).collect();
        bench.disk.crash(CrashKind::Power);
        assert_eq!((0..12).map(|page| bench.page(page)).collect::<Vec<_>>(), before);
    }
    assert!(kept > 500 && lost > 500, "kept {kept}, lost {lost}");
}

/// Writes survive out of order: a later one can stay where an earlier one is lost.
#[test]
fn a_power_cut_keeps_no_order() {
    let later_alone = (0..SEEDS).any(|seed| {
        let mut bench = Bench::new(seed);
        bench.write(0, 1, 1);
        bench.write(1, 1, 2);
        bench.disk.crash(CrashKind::Power);
        (bench.page(0), bench.page(1)) == (Page::Whole(0), Page::Whole(2))
    });
    assert!(later_alone);
}

/// A process that dies takes nothing from the device's own cache, nor does it make it durable.
#[test]
fn a_killed_process_makes_nothing_durable() {
    let lost = (0..SEEDS).any(|seed| {
        let mut bench = Bench::new(seed);
        bench.write(0, 1, 1);
        bench.disk.crash(CrashKind::Process);
        assert_eq!(bench.page(0), Page::Whole(1));
        bench.disk.crash(CrashKind::Power);
        bench.page(0) == Page::Whole(0)
    });
    assert!(lost);
}

/// A flush covers what was completed when it was submitted, on every queue, and nothing else.
#[test]
fn a_flush_covers_what_was_completed_before_it() {
    let mut lost = 0;
    for seed in 0..SEEDS {
        let mut bench = Bench::new(seed);
        bench.write(0, 1, 1);
        let mut other = bench.disk.queue(&bench.arena, 4);
        bench.start_write(3, 1, 1, 1);
        other.push(Io { token: 4, kind: IoKind::Flush, offset: 0, pages: &[] }).unwrap();
        other.submit().unwrap();
        assert!(bench.disk.step());
        let write_was_first = bench.queue.reap().is_some();
        bench.settle();
        assert_eq!(other.reap(), Some(Completion { token: 4, result: Ok(()) }));
        bench.disk.crash(CrashKind::Power);
        assert_eq!(bench.page(0), Page::Whole(1), "seed {seed}");
        // The write that was in flight with the flush is not covered, even if it was done first.
        lost += u32::from(write_was_first && bench.page(1) != Page::Whole(1));
    }
    assert!(lost > 50, "{lost}");
}

#[test]
fn a_failed_flush_makes_nothing_durable() {
    let lost = (0..SEEDS).filter(|&seed| {
        let mut bench = Bench::new(seed);
        bench.write(0, 1, 1);
        bench.disk.fail_after(IoKind::Flush, 0);
        bench.start_flush(2);
        assert_eq!(bench.settle()[0].result.unwrap_err().kind(), IoErrorKind::Io);
        bench.disk.crash(CrashKind::Power);
        bench.page(0) == Page::Whole(0)
    });
    assert!(lost.count() > 50);
}

#[test]
fn completions_come_in_any_order() {
    let orders: BTreeSet<Vec<u64>> = (0..SEEDS)
        .map(|seed| {
            let mut bench = Bench::new(seed);
            (0..4).for_each(|token| bench.start_write(token, token, 1, 1));
            assert_eq!(bench.disk.pending(), 4);
            bench.settle().iter().map(|completion| completion.token).collect()
        })
        .collect();
    assert_eq!(orders.len(), 24, "every order of four");
}

#[test]
fn faults_come_as_told() {
    let mut bench = Bench::new(5);
    let results = |bench: &mut Bench, kind| -> Vec<bool> {
        let page = [PageId(60)];
        (0..4)
            .map(|token| {
                bench.start(Io { token, kind, offset: 0, pages: &page });
                bench.settle()[0].result.is_ok()
            })
            .collect()
    };
    bench.disk.fail_after(IoKind::Read, 2);
    assert_eq!(results(&mut bench, IoKind::Write), [true; 4]);
    assert_eq!(results(&mut bench, IoKind::Read), [true, true, false, true]);

    bench.disk.fail_one_in(IoKind::Write, 1);
    assert_eq!(results(&mut bench, IoKind::Write), [false; 4]);
    bench.disk.fail_one_in(IoKind::Write, 0);
    assert_eq!(results(&mut bench, IoKind::Write), [true; 4]);

    bench.disk.break_pages(0..1);
    assert_eq!(results(&mut bench, IoKind::Read), [false; 4]);
    assert_eq!(results(&mut bench, IoKind::Write), [true; 4]);
    assert_eq!(results(&mut bench, IoKind::Read), [true; 4], "written again");

    bench.disk.set_unplugged(true);
    bench.start_flush(9);
    assert_eq!(bench.settle()[0].result.unwrap_err().kind(), IoErrorKind::Gone);
    bench.disk.set_unplugged(false);
    assert_eq!(results(&mut bench, IoKind::Read), [true; 4]);

    let counts = bench.disk.counts();
    assert_eq!((counts.reads, counts.writes, counts.flushes), (16, 16, 1));
    assert_eq!((counts.pages_read, counts.pages_written), (16, 16));
}

#[test]
fn a_failed_read_leaves_rubbish() {
    let mut bench = Bench::new(6);
    bench.write(0, 1, 7);
    bench.disk.fail_after(IoKind::Read, 0);
    bench.start(Io { token: 1, kind: IoKind::Read, offset: 0, pages: &[PageId(9)] });
    assert!(bench.settle()[0].result.is_err());
    bench.arena.with(PageId(9), |bytes| assert!(*bytes != [7; 4096] && *bytes != [0; 4096]));
}

#[test]
fn a_flipped_bit_is_one_bit_and_stays() {
    let mut bench = Bench::new(7);
    assert_eq!(bench.disk.flip_random_bit(), None, "nothing was written");
    bench.write(3, 1, 0);
    assert_eq!(bench.disk.flip_random_bit(), Some(3));
    let mut buf = AlignedBuf::zeroed(1);
    for _ in 0..2 {
        bench.disk.read_at(3 * 4096, &mut buf).unwrap();
        assert_eq!(buf.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
        bench.flush();
        bench.disk.crash(CrashKind::Power);
    }
    bench.disk.flip_bit(5, 4096 * 8 - 1);
    bench.disk.read_at(5 * 4096, &mut buf).unwrap();
    assert_eq!(buf[4095], 0x80);
}

/// While an operation is in flight its pages are the device's.
#[cfg(debug_assertions)]
#[test]
fn pages_in_flight_are_not_to_be_touched() {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let mut bench = Bench::new(8);
    bench.start_write(1, 0, 1, 1);
    bench.start(Io { token: 2, kind: IoKind::Read, offset: 0, pages: &[PageId(9)] });
    let breach = |f: &dyn Fn()| catch_unwind(AssertUnwindSafe(f)).is_err();
    assert!(!breach(&|| bench.arena.with(PageId(0), |_| ())), "a write only reads");
    assert!(breach(&|| bench.arena.fill_zero(PageId(0), 0..1)));
    assert!(breach(&|| bench.arena.with(PageId(9), |_| ())));
    bench.disk.crash(CrashKind::Process);
    bench.arena.fill_zero(PageId(0), 0..1);
    bench.arena.fill_zero(PageId(9), 0..1);
}

/// The same seed and the same calls give the same disk, bit for bit.
#[test]
fn one_seed_one_run() {
    let run = |seed| {
        let mut bench = Bench::new(seed);
        let mut rng = Rng::new(3);
        bench.disk.fail_one_in(IoKind::Write, 9);
        let mut log = Vec::new();
        for round in 0..300u64 {
            let room = bench.queue.capacity() - bench.queue.in_flight();
            match rng.below(6) {
                0 if room > 0 => bench.start_flush(round),
                1 | 2 if bench.disk.pending() == 0 => {
                    bench.start_write(round, rng.below(60), 4, round as u8);
                }
                3 if rng.chance(1, 5) => bench.disk.crash(CrashKind::Power),
                4 if rng.chance(1, 5) => bench.disk.crash(CrashKind::Process),
                _ => drop(bench.disk.step()),
            }
            log.extend(std::iter::from_fn(|| bench.queue.reap()));
        }
        bench.settle();
        let mut buf = AlignedBuf::zeroed(PAGES as usize);
        bench.disk.read_at(0, &mut buf).unwrap();
        (log, buf.to_vec())
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
