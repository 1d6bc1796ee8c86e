//! A shard in use allocates nothing: a million steps of reads, writes, zeroes, discards, flushes,
//! pushes and reclaim, under an allocator that counts.
//!
//! The device, the store and the keeper are arrays and flags here. Payload is a number for each
//! page, its checksum: the core never looks at more.
#![cfg(not(loom))]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::VecDeque;

use heeler_core::config::ShardConfig;
use heeler_core::counters::Counts;
use heeler_core::event::{
    Advice, Buffering, Input, Mode, Output, Reply, Request, RequestKind, Status, ToKeeper, ToShard,
};
use heeler_core::ids::{BLOCK_BYTES, BlockRef, Epoch, OpId, PageId, VolumeId};
use heeler_core::limits::{OP_PAGES_MAX, REQUEST_BLOCKS_MAX};
use heeler_core::recovery::{Recovered, RegionLayout};
use heeler_core::shard::{Shard, ShardStorage};
use heeler_core::time::{Duration, Instant};
use heeler_hw::crc32c;
use heeler_hw::sim::Rng;

thread_local! {
    /// What this thread asked of the allocator: allocations, frees.
    static CALLS: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

struct Counting;

fn count(allocations: u64, frees: u64) {
    CALLS.set((CALLS.get().0 + allocations, CALLS.get().1 + frees));
}

// SAFETY: all calls go to the system's allocator as they came. Counting touches a constant-sized
// thread local without a destructor, so it does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(1, 0);
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(0, 1);
        // SAFETY: the caller's promises are the same, and the memory came from `System`.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(1, 1);
        // SAFETY: the caller's promises are the same, and the memory came from `System`.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const VOLUME: VolumeId = VolumeId(1);
const OBJECT_SHIFT: u8 = 18;
const OBJECT_BYTES: u64 = 1 << OBJECT_SHIFT;
const OBJECTS: u64 = 24;
const SEGMENT_PAGES: u32 = 64;
const SEGMENTS: u32 = 16;
const SHARD_PAGES: u32 = 290;
const HEAT_PAGES: u32 = 64;
const TRANSIT_PAGES: u32 = 256;
const IN_FLIGHT: usize = 24;
const WARM_UP: u64 = 100_000;
const STEPS: u64 = 1_000_000;

/// Something that will be told to the shard.
#[derive(Clone, Copy)]
enum Pending {
    Read { op: OpId, at: u32, count: u32 },
    Loaded { op: OpId, at: u32 },
    Written(OpId),
    Filled { op: OpId, crc: u32 },
    Fetched { op: OpId, count: u16 },
    Queried { op: OpId, count: u16 },
    Taken(OpId),
    Release(OpId),
}

/// What the keeper waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cycle {
    Idle,
    Freezing,
    Pushing,
    Committing,
}

struct World<'a> {
    rng: Rng,
    now: u64,
    shard: Shard<'a>,
    /// The content of each page of the arena and of the region.
    pages: Vec<u32>,
    region: Vec<u32>,
    /// The pages of the record of heat, behind the region's log.
    heat: Vec<[u8; BLOCK_BYTES]>,
    transit: Vec<PageId>,
    pending: Vec<Pending>,
    /// Mail from the keeper stays in order.
    mail: VecDeque<ToShard>,
    in_flight: usize,
    next_id: u64,
    cycle: Cycle,
    open: Epoch,
    commits: u64,
    /// Changes wait for another push.
    wanted: bool,
    merges: u64,
    replies: u64,
    /// Of these, those of changes that waited for the store.
    late: u64,
}

fn config() -> ShardConfig {
    let layout = RegionLayout { region: [1; 16], segment_pages: SEGMENT_PAGES, segments: SEGMENTS };
    let config = ShardConfig {
        onodes: 24,
        leaves: 160,
        tasks: 64,
        adopted_max: TRANSIT_PAGES as usize,
        heat_pages: HEAT_PAGES,
        heat_every: Duration::from_millis(50),
        ..ShardConfig::for_region(layout, crc32c)
    };
    assert!(Shard::pages_min(&config) <= SHARD_PAGES as usize);
    config
}

impl<'a> World<'a> {
    fn new(storage: &'a mut ShardStorage) -> Self {
        let own: Vec<_> = (0..SHARD_PAGES).map(PageId).collect();
        let empty = Recovered {
            segment_seqs: vec![0; SEGMENTS as usize],
            next_seq: 1,
            next_segment_seq: 1,
            ..Recovered::default()
        };
        let mut world = Self {
            rng: Rng::new(1),
            now: 1,
            shard: Shard::new(config(), storage, &own, empty),
            pages: vec![0; (SHARD_PAGES + TRANSIT_PAGES) as usize],
            region: vec![0; (SEGMENTS * SEGMENT_PAGES) as usize],
            heat: vec![[0; BLOCK_BYTES]; HEAT_PAGES as usize],
            transit: (SHARD_PAGES..SHARD_PAGES + TRANSIT_PAGES).map(PageId).collect(),
            pending: Vec::with_capacity(4096),
            mail: VecDeque::with_capacity(64),
            in_flight: 0,
            next_id: 0,
            cycle: Cycle::Idle,
            open: Epoch::first_of_term(2),
            commits: 0,
            wanted: false,
            merges: 0,
            replies: 0,
            late: 0,
        };
        let attach = ToShard::Attach {
            volume: VOLUME,
            object_shift: OBJECT_SHIFT,
            blocks: OBJECTS * OBJECT_BYTES / BLOCK_BYTES as u64,
            open: world.open,
            committed: Epoch(world.open.0 - 1),
        };
        world.tell(Input::Keeper(attach));
        world
    }

    fn tell(&mut self, input: Input<'_>) {
        self.now += 1;
        self.shard.handle(Instant(self.now * 5_000), input).expect("drained, and tasks are left");
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(output) = self.shard.poll_output() {
            match output {
                Output::DeviceRead { op, at, count } => {
                    for (page, from) in self.shard.op_pages(op).iter().zip(at as usize..) {
                        self.pages[page.0 as usize] = self.region[from];
                    }
                    self.pending.push(Pending::Read { op, at, count });
                }
                Output::DeviceLoad { op, at } => self.pending.push(Pending::Loaded { op, at }),
                Output::DeviceWrite { op, at, header, .. } if at >= SEGMENTS * SEGMENT_PAGES => {
                    let first = (at - SEGMENTS * SEGMENT_PAGES) as usize;
                    for (index, page) in
                        self.heat[first..][..header as usize].iter_mut().enumerate()
                    {
                        self.shard.encode(op, index, page);
                    }
                    self.pending.push(Pending::Written(op));
                }
                Output::DeviceWrite { op, at, header, .. } => {
                    let mut bytes = [0; BLOCK_BYTES];
                    for index in 0..header as usize {
                        self.shard.encode(op, index, &mut bytes);
                    }
                    for (page, to) in self.shard.op_pages(op).iter().zip(at as usize..) {
                        self.region[to] = self.pages[page.0 as usize];
                    }
                    self.pending.push(Pending::Written(op));
                }
                Output::DeviceFlush { op } => self.pending.push(Pending::Written(op)),
                Output::Fill { op, dst, src, .. } => {
                    let old = if src.is_some() { self.pages[src.0 as usize] } else { 0 };
                    let crc = self.pages[dst.0 as usize].wrapping_mul(31).wrapping_add(old);
                    self.pages[dst.0 as usize] = crc;
                    self.pending.push(Pending::Filled { op, crc });
                    self.merges += 1;
                }
                Output::CopyPage { .. } | Output::PagesBack { .. } => {
                    panic!("memory is fixed here")
                }
                Output::Fetch { op, count, .. } => {
                    self.pending.push(Pending::Fetched { op, count });
                }
                Output::Query { op, count, .. } => {
                    self.pending.push(Pending::Queried { op, count });
                }
                Output::Batch { op, .. } => {
                    assert!(!self.shard.batch_runs().is_empty());
                    self.pending.push(Pending::Taken(op));
                    self.mail.push_back(ToShard::BatchDone { volume: VOLUME });
                }
                Output::Reply(reply) => self.answered(&reply),
                Output::HandBack { .. } => self.take_pages_back(),
                Output::Late(reply) => {
                    self.late += 1;
                    self.answered(&reply);
                }
                Output::Keeper(mail) => self.keeper(mail),
            }
        }
    }

    fn answered(&mut self, reply: &Reply) {
        assert_eq!(reply.status, Status::Ok);
        if reply.kind == RequestKind::Write {
            self.take_pages_back();
        }
        match reply.lease {
            Some(lease) => self.pending.push(Pending::Release(lease)),
            None => self.in_flight -= 1,
        }
        self.replies += 1;
    }

    fn take_pages_back(&mut self) {
        self.transit.extend(self.shard.reply_blocks().iter().map(|block| block.page));
    }

    fn keeper(&mut self, mail: ToKeeper) {
        match mail {
            ToKeeper::Dirtied { .. } | ToKeeper::Grown { .. } | ToKeeper::Pressure { .. } => {
                self.freeze();
            }
            ToKeeper::Sync { .. } => {
                self.wanted = true;
                self.freeze();
            }
            ToKeeper::Frozen { .. } => {
                self.cycle = Cycle::Pushing;
                self.mail.push_back(ToShard::Released { volume: VOLUME });
            }
            ToKeeper::Pushed { epoch, .. } => {
                self.cycle = Cycle::Committing;
                self.mail.push_back(ToShard::Committed { volume: VOLUME, epoch });
                self.commits += 1;
            }
        }
    }

    fn freeze(&mut self) {
        if self.cycle == Cycle::Idle {
            self.wanted = false;
            self.open = self.open.next();
            self.cycle = Cycle::Freezing;
            self.mail.push_back(ToShard::Freeze { volume: VOLUME, next: self.open });
        }
    }

    fn step(&mut self) {
        match self.rng.below(16) {
            0..5 => self.ask(),
            5..12 => self.complete(),
            12 => {
                if let Some(mail) = self.mail.pop_front() {
                    if matches!(mail, ToShard::Committed { .. }) {
                        self.cycle = Cycle::Idle;
                    }
                    self.tell(Input::Keeper(mail));
                }
                if self.wanted {
                    self.freeze();
                }
            }
            13 if self.rng.chance(1, 200) => self.freeze(),
            13 if self.rng.chance(1, 200) => {
                let mode = Mode::ALL[self.rng.index(Mode::ALL.len())];
                let (volume, buffering) = (VOLUME, Buffering::default());
                self.mail.push_back(ToShard::Settings { volume, mode, buffering, pinned: false });
            }
            _ => self.tell(Input::Turn),
        }
    }

    /// One of the things under way ends, any one.
    fn complete(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let index = self.rng.index(self.pending.len());
        let nothing: [Option<u32>; REQUEST_BLOCKS_MAX * 8] = [None; _];
        match self.pending.swap_remove(index) {
            Pending::Read { op, at, count } => {
                let mut crcs = [0; OP_PAGES_MAX];
                let crcs = &mut crcs[..count as usize];
                crcs.copy_from_slice(&self.region[at as usize..(at + count) as usize]);
                self.tell(Input::Device { op, ok: true, crcs });
            }
            Pending::Loaded { op, at } => {
                let page = self.heat[(at - SEGMENTS * SEGMENT_PAGES) as usize];
                self.tell(Input::Loaded { op, bytes: Some(&page) });
            }
            Pending::Written(op) => self.tell(Input::Device { op, ok: true, crcs: &[] }),
            Pending::Filled { op, crc } => self.tell(Input::Filled { op, crc }),
            Pending::Fetched { op, count } => {
                let crcs = &nothing[..usize::from(count)];
                self.tell(Input::Fetched { op, ok: true, crcs });
            }
            Pending::Queried { op, count } => {
                let data = &[false; REQUEST_BLOCKS_MAX][..usize::from(count)];
                self.tell(Input::Queried { op, ok: true, data });
            }
            Pending::Taken(op) => self.tell(Input::BatchTaken(op)),
            Pending::Release(lease) => {
                self.in_flight -= 1;
                self.tell(Input::Release(lease));
            }
        }
    }

    fn ask(&mut self) {
        if self.in_flight >= IN_FLIGHT {
            return;
        }
        let kind = match self.rng.below(32) {
            0..13 => RequestKind::Read,
            13..25 => RequestKind::Write,
            25 | 26 => RequestKind::Zero,
            27 => RequestKind::Discard,
            28 | 29 => RequestKind::Flush,
            30 => RequestKind::Cache,
            _ => RequestKind::Status,
        };
        let whole = matches!(kind, RequestKind::Zero | RequestKind::Discard);
        let (offset, len) = self.some_range(whole);
        let first = offset as usize / BLOCK_BYTES;
        let count = (offset as usize + len as usize).div_ceil(BLOCK_BYTES) - first;
        let mut blocks = [BlockRef::ZEROES; REQUEST_BLOCKS_MAX];
        let mut given = 0;
        if kind == RequestKind::Write {
            if self.transit.len() < count {
                return;
            }
            given = count;
            for block in &mut blocks[..count] {
                let page = self.transit.pop().expect("counted");
                self.pages[page.0 as usize] = self.rng.next_u64() as u32;
                *block = BlockRef { page, crc: self.pages[page.0 as usize] };
            }
        }
        // Half of everything goes to a few objects, so that there are hits.
        let most = if self.rng.chance(1, 2) { 8 } else { OBJECTS };
        let object = self.rng.below(most) as u32;
        let fua = self.rng.chance(1, 16);
        self.next_id += 1;
        self.in_flight += 1;
        let id = self.next_id;
        let advice = match self.rng.below(8) {
            0 => Advice::WillNeed,
            1 => Advice::DontNeed,
            2 => Advice::BypassClean,
            _ => Advice::None,
        };
        let request = Request { id, kind, fua, advice, volume: VOLUME, object, offset, len };
        self.tell(Input::Request(request, &blocks[..given]));
    }

    /// A range of an object; whole blocks if `blocks` says so, now and then all of it.
    fn some_range(&mut self, blocks: bool) -> (u32, u32) {
        if blocks && self.rng.chance(1, 16) {
            return (0, OBJECT_BYTES as u32);
        }
        let unit = if blocks || self.rng.chance(2, 3) { BLOCK_BYTES as u64 } else { 512 };
        let window = (REQUEST_BLOCKS_MAX * BLOCK_BYTES) as u64;
        let start = self.rng.below(OBJECT_BYTES / window) * window;
        let first = self.rng.below(window / unit);
        let len = 1 + self.rng.below((window / unit - first).min(8));
        ((start + first * unit) as u32, (len * unit) as u32)
    }
}

#[test]
fn a_shard_in_use_neither_allocates_nor_frees() {
    let mut storage = ShardStorage::new(&config(), SHARD_PAGES as usize);
    let mut world = World::new(&mut storage);
    for _ in 0..WARM_UP {
        world.step();
    }
    let (before, counters, commits) = (CALLS.get(), world.shard.counters(), world.commits);
    let then = world.shard.traffic();
    for _ in 0..STEPS {
        world.step();
    }
    let after = CALLS.get();
    assert_eq!(after, before, "allocations and frees in {STEPS} steps");
    assert!(before.0 > 0, "the allocator counts");

    // The test is about these; it must not pass because they never happened.
    let now = world.shard.counters();
    let traffic = world.shard.traffic().since(then);
    let happened = [
        ("replies", world.replies),
        ("late replies", world.late),
        ("merges", world.merges),
        ("commits", world.commits - commits),
        ("from RAM", traffic.ram_blocks),
        ("from NVMe", traffic.nvme_blocks),
        ("fetched", traffic.fetched_blocks),
        ("records", now.records - counters.records),
        ("flushes", now.flushes - counters.flushes),
        ("pushed", now.pushed_blocks - counters.pushed_blocks),
        ("moved", now.moved_blocks - counters.moved_blocks),
        ("dropped", now.dropped_blocks - counters.dropped_blocks),
    ];
    println!("{happened:?}");
    for (what, times) in happened {
        assert!(times > 100, "{what}: {times}");
    }
    assert_eq!((now.damaged_blocks, now.lost_blocks, now.device_errors), (0, 0, 0));
    world.shard.check();
}
