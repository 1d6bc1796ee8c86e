//! What every [`BlockQueue`] has to do, asked of the real queue on a file in the temporary
//! directory (which must support direct I/O) and of the simulated one.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use heeler_core::ids::PageId;
use heeler_core::limits::OP_PAGES_MAX;
use heeler_hw::sim::{Rng, SimDisk, SimQueue};
use heeler_hw::{
    AlignedBuf, Arena, BackingFile, BlockFile, BlockQueue, Completion, Full, Io, IoErrorKind,
    IoKind, UringQueue,
};

const DISK_PAGES: u64 = 1024;
const ARENA_PAGES: u32 = 2048;
const DEPTH: usize = 32;

/// A device under test, its queues, and a way to let time pass for it.
trait Rig {
    type Queue: BlockQueue;
    type File: BlockFile;
    fn file(&self) -> &Self::File;
    fn queue(&self, arena: &Arena) -> Self::Queue;
    fn wait(&self, queue: &Self::Queue);
}

struct Real(BackingFile);

impl Real {
    fn new(name: &str) -> Self {
        let name = format!("heeler-hw-conformance-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = BackingFile::create(&path, DISK_PAGES * 4096, &mut |_, _| ()).unwrap();
        // The open file lives on without a name, and nothing is left behind by a failed test.
        std::fs::remove_file(&path).unwrap();
        Self(file)
    }
}

impl Rig for Real {
    type Queue = UringQueue;
    type File = BackingFile;

    fn file(&self) -> &BackingFile {
        &self.0
    }

    fn queue(&self, arena: &Arena) -> UringQueue {
        UringQueue::new(&self.0, arena, DEPTH as u32).unwrap()
    }

    fn wait(&self, queue: &UringQueue) {
        wait_readable(queue.event_fd().unwrap());
    }
}

/// Waits as a runtime does: reads the eventfd when it is readable; the caller reaps after.
#[allow(unsafe_code)]
fn wait_readable(fd: RawFd) {
    const TOO_LONG_MS: i32 = 20_000;
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, on the stack.
    let ready = unsafe { libc::poll(&raw mut poll, 1, TOO_LONG_MS) };
    assert_eq!(ready, 1, "no completion came");
    let mut count = 0;
    // SAFETY: the kernel writes the count.
    assert_eq!(unsafe { libc::eventfd_read(fd, &raw mut count) }, 0);
}

struct Simulated(SimDisk);

impl Rig for Simulated {
    type Queue = SimQueue;
    type File = SimDisk;

    fn file(&self) -> &SimDisk {
        &self.0
    }

    fn queue(&self, arena: &Arena) -> SimQueue {
        self.0.queue(arena, DEPTH)
    }

    fn wait(&self, _: &SimQueue) {
        assert!(self.0.step(), "nothing to wait for");
    }
}

/// One queue and what it needs.
struct Bench<'a, R: Rig> {
    rig: &'a R,
    queue: R::Queue,
    arena: Arena,
}

impl<'a, R: Rig> Bench<'a, R> {
    fn new(rig: &'a R) -> Self {
        let arena = Arena::new(ARENA_PAGES).unwrap();
        Self { rig, queue: rig.queue(&arena), arena }
    }

    fn push(&mut self, token: u64, kind: IoKind, first: u64, pages: &[PageId]) {
        self.queue.push(Io { token, kind, offset: first * 4096, pages }).unwrap();
    }

    fn next(&mut self) -> Completion {
        loop {
            if let Some(completion) = self.queue.reap() {
                return completion;
            }
            self.rig.wait(&self.queue);
        }
    }

    /// One operation, done at once.
    fn run(&mut self, kind: IoKind, first: u64, pages: &[PageId]) -> Completion {
        self.push(77, kind, first, pages);
        self.queue.submit().unwrap();
        let completion = self.next();
        assert_eq!(completion.token, 77);
        completion
    }

    /// All that is in flight, by token.
    fn drain(&mut self) -> BTreeMap<u64, Completion> {
        let mut done = BTreeMap::new();
        while self.queue.in_flight() > 0 {
            let completion = self.next();
            assert!(done.insert(completion.token, completion).is_none(), "completed twice");
        }
        assert_eq!(self.queue.reap(), None);
        done
    }

    fn fill(&self, page: PageId, byte: u8) {
        self.arena.with_mut(page, |bytes| bytes.fill(byte));
    }

    /// The page's only byte value.
    fn byte_of(&self, page: PageId) -> u8 {
        self.arena.with(page, |bytes| {
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{page:?} is mixed");
            bytes[0]
        })
    }
}

fn ids(pages: impl IntoIterator<Item = u32>) -> Vec<PageId> {
    pages.into_iter().map(PageId).collect()
}

fn vectored<R: Rig>(rig: &R) {
    let mut bench = Bench::new(rig);
    // Scattered, neighbours, backwards, alone.
    let from = ids([9, 3, 4, 5, 100, 99, 98, 700]);
    for (i, &page) in from.iter().enumerate() {
        bench.fill(page, i as u8 + 1);
    }
    assert_eq!(bench.run(IoKind::Write, 10, &from).result, Ok(()));
    let to = ids([20, 22, 21, 30, 31, 32, 33, 40]);
    assert_eq!(bench.run(IoKind::Read, 10, &to).result, Ok(()));
    let got: Vec<u8> = to.iter().map(|&page| bench.byte_of(page)).collect();
    assert_eq!(got, [1, 2, 3, 4, 5, 6, 7, 8]);

    let mut buf = AlignedBuf::zeroed(2);
    rig.file().read_at(11 * 4096, &mut buf).unwrap();
    assert_eq!((buf[0], buf[8191]), (2, 3), "plain reads see the same");
}

fn unwritten_pages_are_zeroes<R: Rig>(rig: &R) {
    let mut bench = Bench::new(rig);
    bench.fill(PageId(1), 9);
    assert_eq!(bench.run(IoKind::Read, DISK_PAGES - 1, &ids([1])).result, Ok(()));
    assert_eq!(bench.byte_of(PageId(1)), 0);
}

/// The largest operation, all apart and all together.
fn largest<R: Rig>(rig: &R) {
    let mut bench = Bench::new(rig);
    let count = OP_PAGES_MAX as u32;
    let apart = ids((0..count).map(|i| i * 3));
    let together = ids(1000..1000 + count);
    for (i, &page) in apart.iter().enumerate() {
        bench.fill(page, (i % 251) as u8);
    }
    assert_eq!(bench.run(IoKind::Write, 5, &apart).result, Ok(()));
    assert_eq!(bench.run(IoKind::Read, 5, &together).result, Ok(()));
    for (i, &page) in together.iter().enumerate() {
        assert_eq!(bench.byte_of(page), (i % 251) as u8, "page {i}");
    }
    assert_eq!(bench.run(IoKind::Write, 600, &together).result, Ok(()));
    assert_eq!(bench.run(IoKind::Read, 600, &apart).result, Ok(()));
    assert_eq!(bench.byte_of(apart[250]), 250);
}

fn outside_is_invalid<R: Rig>(rig: &R) {
    let mut bench = Bench::new(rig);
    let pages = ids([1, 2]);
    bench.fill(pages[0], 1);
    assert_eq!(bench.queue.size_bytes(), DISK_PAGES * 4096);
    for (token, offset) in
        [(0, DISK_PAGES * 4096 - 4096), (1, 512), (2, u64::MAX - 4095), (3, DISK_PAGES * 8192)]
    {
        for kind in [IoKind::Read, IoKind::Write] {
            bench.queue.push(Io { token, kind, offset, pages: &pages }).unwrap();
            bench.queue.submit().unwrap();
            // The thread that waits is woken for this as for anything.
            if bench.queue.event_fd().is_some() {
                rig.wait(&bench.queue);
            }
            let completion = bench.queue.reap().expect("it was woken");
            assert_eq!(completion.token, token);
            assert_eq!(completion.result.unwrap_err().kind(), IoErrorKind::Invalid);
        }
    }
    bench.fill(pages[0], 2);
    let last = ids([3]);
    assert_eq!(bench.run(IoKind::Read, DISK_PAGES - 1, &last).result, Ok(()));
    assert_eq!(bench.byte_of(last[0]), 0, "nothing of it was written");
}

fn full<R: Rig>(rig: &R) {
    let mut bench = Bench::new(rig);
    assert_eq!(bench.queue.capacity(), DEPTH);
    for i in 0..DEPTH as u64 {
        bench.push(i, IoKind::Read, i, &ids([i as u32]));
    }
    let page = ids([500]);
    let more = Io { token: 99, kind: IoKind::Read, offset: 0, pages: &page };
    assert_eq!(bench.queue.push(more), Err(Full));
    bench.queue.submit().unwrap();
    assert_eq!(bench.queue.push(more), Err(Full), "in flight until reaped");
    let first = bench.next();
    assert_eq!(bench.queue.push(more), Ok(()));
    bench.queue.submit().unwrap();
    let done = bench.drain();
    let expected: Vec<u64> = (0..DEPTH as u64).filter(|&t| t != first.token).chain([99]).collect();
    assert_eq!(done.keys().copied().collect::<Vec<_>>(), expected);
}

/// Writes on the same pages at the same time: each page is wholly of one of them; the next write
/// after they are done wins.
fn overlap<R: Rig>(rig: &R) {
    let mut bench = Bench::new(rig);
    for round in 0..20 {
        let (a, b) = (ids(0..4), ids(10..14));
        a.iter().for_each(|&page| bench.fill(page, 1));
        b.iter().for_each(|&page| bench.fill(page, 2));
        bench.push(1, IoKind::Write, 50, &a);
        bench.push(2, IoKind::Write, 52, &b);
        bench.queue.submit().unwrap();
        assert!(bench.drain().values().all(|completion| completion.result.is_ok()));
        let back = ids(20..26);
        assert_eq!(bench.run(IoKind::Read, 50, &back).result, Ok(()));
        let got: Vec<u8> = back.iter().map(|&page| bench.byte_of(page)).collect();
        assert_eq!((&got[..2], &got[4..]), (&[1, 1][..], &[2, 2][..]), "round {round}");
        assert!(got[2..4].iter().all(|byte| [1, 2].contains(byte)));

        assert_eq!(bench.run(IoKind::Write, 51, &ids([0, 1])).result, Ok(()));
        assert_eq!(bench.run(IoKind::Read, 51, &back[..2]).result, Ok(()));
        assert_eq!([bench.byte_of(back[0]), bench.byte_of(back[1])], [1, 1]);
    }
}

fn flush<R: Rig>(rig: &R) {
    let mut bench = Bench::new(rig);
    bench.fill(PageId(1), 1);
    bench.push(1, IoKind::Write, 0, &ids([1]));
    bench.push(2, IoKind::Flush, 0, &[]);
    bench.push(3, IoKind::Flush, 0, &[]);
    bench.queue.submit().unwrap();
    let done = bench.drain();
    assert!((1..4).all(|token| done[&token].result == Ok(())));
    assert_eq!(bench.run(IoKind::Flush, 0, &[]).result, Ok(()));
}

/// Nothing is started by `push` alone, and nothing waits for more than `submit`.
fn starts_at_submit<R: Rig>(rig: &R) {
    let mut bench = Bench::new(rig);
    bench.fill(PageId(1), 1);
    bench.push(1, IoKind::Write, 300, &ids([1]));
    assert_eq!(bench.queue.reap(), None);
    let mut buf = AlignedBuf::zeroed(1);
    rig.file().read_at(300 * 4096, &mut buf).unwrap();
    assert_eq!(buf[0], 0);
    bench.queue.submit().unwrap();
    assert_eq!(bench.next(), Completion { token: 1, result: Ok(()) });
    rig.file().read_at(300 * 4096, &mut buf).unwrap();
    assert_eq!(buf[0], 1);
}

/// Random operations with many in flight, against a model of the disk. Those in flight at a time
/// touch different pages of the disk.
fn many_in_flight<R: Rig>(rig: &R, seed: u64) {
    let mut bench = Bench::new(rig);
    let mut rng = Rng::new(seed);
    let mut model = vec![0u8; DISK_PAGES as usize];
    let lane = DISK_PAGES / DEPTH as u64;
    let room = ARENA_PAGES / DEPTH as u32;
    // What each lane has in flight: the kind, the first page on the disk, the arena pages.
    let mut lanes: Vec<Option<(IoKind, u64, Vec<PageId>)>> = vec![None; DEPTH];
    let (mut started, mut done) = (0, 0);
    while done < 3000 {
        for (i, slot) in lanes.iter_mut().enumerate().filter(|(_, slot)| slot.is_none()) {
            if started == 3000 || rng.chance(1, 3) {
                continue;
            }
            let count = 1 + rng.below(lane.min(12));
            let first = i as u64 * lane + rng.below(lane - count + 1);
            let mut pages = ids((0..room).map(|p| i as u32 * room + p));
            rng.shuffle(&mut pages);
            pages.truncate(count as usize);
            let kind = if rng.chance(1, 2) { IoKind::Write } else { IoKind::Read };
            for (at, &page) in (first as usize..).zip(&pages) {
                let byte = rng.below(256) as u8;
                bench.fill(page, byte);
                if kind == IoKind::Write {
                    model[at] = byte;
                }
            }
            bench.push(i as u64, kind, first, &pages);
            *slot = Some((kind, first, pages));
            started += 1;
        }
        bench.queue.submit().unwrap();
        let completion = bench.next();
        assert_eq!(completion.result, Ok(()));
        done += 1;
        let (kind, first, pages) = lanes[completion.token as usize].take().unwrap();
        if kind == IoKind::Read {
            for (at, &page) in (first as usize..).zip(&pages) {
                assert_eq!(bench.byte_of(page), model[at], "page {at} of the disk");
            }
        }
    }
    let mut buf = AlignedBuf::zeroed(DISK_PAGES as usize);
    rig.file().read_at(0, &mut buf).unwrap();
    assert!(buf.chunks(4096).zip(&model).all(|(page, &byte)| page.iter().all(|&b| b == byte)));
}

/// Queues of several cores on one device see each other's completed writes.
fn two_queues<R: Rig>(rig: &R) {
    let (mut one, mut two) = (Bench::new(rig), Bench::new(rig));
    one.fill(PageId(5), 42);
    assert_eq!(one.run(IoKind::Write, 7, &ids([5])).result, Ok(()));
    assert_eq!(two.run(IoKind::Read, 7, &ids([8])).result, Ok(()));
    assert_eq!(two.byte_of(PageId(8)), 42);
    assert_eq!(one.queue.reap(), None);
}

macro_rules! conformance {
    ($($name:ident $(($arg:expr))?),* $(,)?) => {
        mod real {
            use super::*;
            $(#[test] fn $name() { super::$name(&Real::new(stringify!($name)) $(, $arg)?); })*
        }
        mod simulated {
            use super::*;
            $(#[test] fn $name() {
                for seed in 0..10 {
                    super::$name(&Simulated(SimDisk::new(DISK_PAGES * 4096, seed)) $(, $arg)?);
                }
            })*
        }
    };
}

conformance!(
    vectored,
    unwritten_pages_are_zeroes,
    largest,
    outside_is_invalid,
    full,
    overlap,
    flush,
    starts_at_submit,
    many_in_flight(11),
    two_queues,
);

/// The ring belongs to a thread, the file to the process: each core makes a queue of its own.
#[test]
fn real_queues_on_two_threads() {
    let rig = Real::new("threads");
    let arena = Arena::new(64).unwrap();
    std::thread::scope(|scope| {
        for core in 0..2u32 {
            let (rig, arena) = (&rig, &arena);
            scope.spawn(move || {
                let mut bench = Bench { rig, queue: rig.queue(arena), arena: arena.clone() };
                let (from, to) = (PageId(core * 32), PageId(core * 32 + 1));
                for round in 0..200u64 {
                    let at = u64::from(core) * 500 + round;
                    bench.fill(from, round as u8);
                    assert_eq!(bench.run(IoKind::Write, at, &[from]).result, Ok(()));
                    assert_eq!(bench.run(IoKind::Read, at, &[to]).result, Ok(()));
                    assert_eq!(bench.byte_of(to), round as u8);
                }
            });
        }
    });
}
