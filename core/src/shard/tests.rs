//! What requests advise, and what a volume's defaults do, on one shard whose device and store
//! answer at once. A page is one number here: its content and its checksum.

mod modes;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec;
use alloc::vec::Vec;

mod handover;
mod resize;

use super::read::Source;
use super::*;
use crate::counters::{Counts, Scrubbed};
use crate::event::{Advice, Buffering, Mode, Reply, Request, RequestKind, ToKeeper, ToShard};
use crate::ids::{BLOCK_BYTES, Epoch};
use crate::policy::Policy;
use crate::recovery::RegionLayout;
use crate::wire::frame::tests::crc32c;

const VOLUME: VolumeId = VolumeId(3);
const OBJECT_SHIFT: u8 = 18;
const OBJECT_BLOCKS: u32 = 1 << (OBJECT_SHIFT - 12);
const OBJECTS: u32 = 24;
const SEGMENTS: u32 = 80;
const SHARD_PAGES: u32 = 320;
const TRANSIT_PAGES: u32 = 64;
const BLOCK: u32 = BLOCK_BYTES as u32;

struct World<'a> {
    now: u64,
    shard: Shard<'a>,
    pages: Vec<u32>,
    region: Vec<u32>,
    /// By object and block.
    store: BTreeMap<(u32, u16), u32>,
    transit: Vec<PageId>,
    todo: VecDeque<Output>,
    open: Epoch,
    /// What the last read gave.
    read: Vec<u32>,
    replies: u64,
    /// How each request ended, by its id.
    answers: BTreeMap<u64, Status>,
    /// How requests are to end.
    expected: Status,
    /// Pushes are never committed.
    stuck: bool,
}

fn config(policy: Policy) -> ShardConfig {
    let layout = RegionLayout { region: [1; 16], segment_pages: 64, segments: SEGMENTS };
    ShardConfig { tasks: 64, adopted_max: 64, policy, ..ShardConfig::for_region(layout, crc32c) }
}

fn storage(policy: Policy) -> ShardStorage {
    ShardStorage::new(&config(policy), SHARD_PAGES as usize)
}

impl<'a> World<'a> {
    fn new(storage: &'a mut ShardStorage, policy: Policy) -> Self {
        let own: Vec<_> = (0..SHARD_PAGES).map(PageId).collect();
        let empty = Recovered {
            segment_seqs: vec![0; SEGMENTS as usize],
            next_seq: 1,
            next_segment_seq: 1,
            ..Recovered::default()
        };
        let open = Epoch::first_of_term(2);
        let mut world = Self {
            now: 1,
            shard: Shard::new(config(policy), storage, &own, empty),
            pages: vec![0; (SHARD_PAGES + TRANSIT_PAGES) as usize],
            region: vec![0; 64 * SEGMENTS as usize],
            store: BTreeMap::new(),
            transit: (SHARD_PAGES..SHARD_PAGES + TRANSIT_PAGES).map(PageId).collect(),
            todo: VecDeque::new(),
            open,
            read: Vec::new(),
            replies: 0,
            answers: BTreeMap::new(),
            expected: Status::Ok,
            stuck: false,
        };
        let blocks = u64::from(OBJECTS * OBJECT_BLOCKS);
        let committed = Epoch(open.0 - 1);
        let (volume, object_shift) = (VOLUME, OBJECT_SHIFT);
        world.mail(ToShard::Attach { volume, object_shift, blocks, open, committed });
        world
    }

    fn mail(&mut self, mail: ToShard) {
        self.tell(Input::Keeper(mail));
        self.settle();
    }

    fn set(&mut self, reads: bool, writes: bool) {
        self.settings(Mode::default(), Buffering { reads, writes });
    }

    fn settings(&mut self, mode: Mode, buffering: Buffering) {
        self.mail(ToShard::Settings { volume: VOLUME, mode, buffering, pinned: false });
    }

    fn tell(&mut self, input: Input<'_>) {
        self.now += 1;
        self.shard.handle(Instant(self.now * 1000), input).expect("drained, and tasks are left");
        while let Some(output) = self.shard.poll_output() {
            match output {
                Output::Reply(reply) | Output::Late(reply) => self.answered(&reply),
                Output::HandBack { .. } => self.take_pages_back(),
                Output::Batch { op, .. } => {
                    self.take_batch();
                    self.todo.push_back(Output::Batch { op, volume: VOLUME, epoch: self.open });
                }
                output => self.todo.push_back(output),
            }
        }
    }

    fn answered(&mut self, reply: &Reply) {
        self.answers.insert(reply.id, reply.status);
        self.replies += 1;
        let blocks = self.shard.reply_blocks().to_vec();
        match reply.kind {
            RequestKind::Write => self.take_pages_back(),
            RequestKind::Read => {
                let content = |block: &BlockRef| match block.page {
                    PageId::NONE => 0,
                    page => self.pages[page.0 as usize],
                };
                self.read = blocks.iter().map(content).collect();
            }
            _ => {}
        }
        if let Some(lease) = reply.lease {
            // Released by whoever settles: the request's own call has not returned.
            self.todo.push_back(Output::DeviceFlush { op: lease });
        }
    }

    fn take_pages_back(&mut self) {
        self.transit.extend(self.shard.reply_blocks().iter().map(|block| block.page));
    }

    fn take_batch(&mut self) {
        let mut blocks = self.shard.batch_blocks().to_vec().into_iter();
        for run in self.shard.batch_runs().to_vec() {
            for block in run.first..run.first + run.count {
                if run.zero {
                    self.store.remove(&(run.object, block));
                    continue;
                }
                let page = blocks.next().expect("a page for each block").page;
                self.store.insert((run.object, block), self.pages[page.0 as usize]);
            }
        }
    }

    /// Goes on until nothing is left to do.
    fn settle(&mut self) {
        loop {
            while let Some(output) = self.todo.pop_front() {
                self.carry_out(output);
            }
            self.tell(Input::Turn);
            if self.todo.is_empty() && self.shard.poll_timeout().is_none() {
                self.shard.check();
                return;
            }
        }
    }

    fn carry_out(&mut self, output: Output) {
        let pages = |shard: &Shard<'_>, op| -> Vec<usize> {
            shard.op_pages(op).iter().map(|page| page.0 as usize).collect()
        };
        match output {
            Output::DeviceRead { op, at, .. } => {
                let mut crcs = Vec::new();
                for (page, from) in pages(&self.shard, op).into_iter().zip(at as usize..) {
                    self.pages[page] = self.region[from];
                    crcs.push(self.region[from]);
                }
                self.tell(Input::Device { op, ok: true, crcs: &crcs });
            }
            Output::DeviceWrite { op, at, .. } => {
                for (page, to) in pages(&self.shard, op).into_iter().zip(at as usize..) {
                    self.region[to] = self.pages[page];
                }
                self.tell(Input::Device { op, ok: true, crcs: &[] });
            }
            Output::DeviceFlush { op } if matches!(self.shard.op(op), Some(Op::Lease(_))) => {
                self.tell(Input::Release(op));
            }
            Output::DeviceFlush { op } => self.tell(Input::Device { op, ok: true, crcs: &[] }),
            Output::Fetch { op, object, first, .. } => {
                let mut crcs = Vec::new();
                for (page, block) in pages(&self.shard, op).into_iter().zip(first..) {
                    let stored = self.store.get(&(object, block)).copied();
                    self.pages[page] = stored.unwrap_or(self.pages[page]);
                    crcs.push(stored);
                }
                self.tell(Input::Fetched { op, ok: true, crcs: &crcs });
            }
            Output::Batch { op, .. } => {
                self.tell(Input::BatchTaken(op));
                self.tell(Input::Keeper(ToShard::BatchDone { volume: VOLUME }));
            }
            Output::Keeper(ToKeeper::Frozen { .. }) => {
                self.tell(Input::Keeper(ToShard::Released { volume: VOLUME }));
            }
            Output::Keeper(ToKeeper::Pushed { epoch, .. }) if !self.stuck => {
                self.tell(Input::Keeper(ToShard::Committed { volume: VOLUME, epoch }));
            }
            Output::Keeper(_) => {}
            output => panic!("{output:?} is not expected here"),
        }
    }

    fn push(&mut self) {
        self.open = self.open.next();
        self.mail(ToShard::Freeze { volume: VOLUME, next: self.open });
        assert_eq!(self.shard.usage().dirty_blocks, 0);
    }

    fn ask(&mut self, kind: RequestKind, advice: Advice, first: u32, count: u32) {
        let replies = self.replies;
        self.request(kind, advice, first, count);
        self.settle();
        assert_eq!(self.replies, replies + 1);
        assert_eq!(self.answers[&1], self.expected);
    }

    /// Hands a request in, and nothing more.
    fn request(&mut self, kind: RequestKind, advice: Advice, first: u32, count: u32) {
        self.request_as(1, (kind, false), advice, first, count);
    }

    /// The same, under a number of its own; `fua` beside the kind.
    fn request_as(
        &mut self,
        id: u64,
        (kind, fua): (RequestKind, bool),
        advice: Advice,
        first: u32,
        count: u32,
    ) {
        let mut blocks = Vec::new();
        if kind == RequestKind::Write {
            for block in first..first + count {
                let page = self.transit.pop().expect("a page");
                self.pages[page.0 as usize] = content(block);
                blocks.push(BlockRef { page, crc: content(block) });
            }
        }
        let (object, offset) = (first / OBJECT_BLOCKS, first % OBJECT_BLOCKS * BLOCK);
        let (volume, len) = (VOLUME, count * BLOCK);
        let request = Request { id, kind, fua, advice, volume, object, offset, len };
        self.tell(Input::Request(request, &blocks));
    }

    /// Goes on for some turns without carrying out what is to wait; returns that.
    fn turns(&mut self, count: usize, waits: impl Fn(&Output) -> bool) -> Vec<Output> {
        let mut waiting = Vec::new();
        for _ in 0..count {
            while let Some(output) = self.todo.pop_front() {
                if waits(&output) {
                    waiting.push(output);
                } else {
                    self.carry_out(output);
                }
            }
            self.tell(Input::Turn);
        }
        waiting
    }

    fn write(&mut self, advice: Advice, first: u32, count: u32) {
        self.ask(RequestKind::Write, advice, first, count);
    }

    /// Reads blocks, and tells how many of them each place gave.
    fn read(&mut self, advice: Advice, first: u32, count: u32) -> Traffic {
        let before = self.shard.traffic();
        self.ask(RequestKind::Read, advice, first, count);
        let expected: Vec<_> = (first..first + count).map(content).collect();
        assert_eq!(self.read, expected);
        self.shard.traffic().since(before)
    }

    fn store(&mut self, blocks: core::ops::Range<u32>) {
        for block in blocks {
            let place = (block / OBJECT_BLOCKS, (block % OBJECT_BLOCKS) as u16);
            self.store.insert(place, content(block));
        }
    }

    /// Spoils what the device holds of a block. Its number must be unique on it.
    fn spoil(&mut self, block: u32) {
        let at = self.region.iter().position(|page| *page == content(block));
        self.region[at.expect("the device has it")] = 1;
    }

    fn is_in_ram(&mut self, block: u32) -> bool {
        let onode = self.shard.onodes.lookup(VOLUME, block / OBJECT_BLOCKS);
        let place = (block % OBJECT_BLOCKS) as u16;
        onode.is_some_and(|onode| matches!(self.shard.source(onode, place), Source::Ram(_)))
    }

    fn scrubbed(&self) -> Scrubbed {
        self.shard.volume_scrubbed(VOLUME).expect("attached")
    }

    fn log_runs(&self) -> Vec<(u32, u16, u16)> {
        let (mut at, mut runs) = (ScrubAt::default(), Vec::new());
        loop {
            match self.shard.scan_log(VOLUME, &mut at) {
                Scan::Run(run) => runs.push((run.object, run.first, run.count)),
                Scan::Later => {}
                Scan::End => return runs,
            }
        }
    }
}

fn content(block: u32) -> u32 {
    1000 + block
}

fn from_ram(blocks: u64) -> Traffic {
    Traffic { read_blocks: blocks, ram_blocks: blocks, ..Traffic::default() }
}

fn from_nvme(blocks: u64) -> Traffic {
    Traffic { read_blocks: blocks, nvme_blocks: blocks, ..Traffic::default() }
}

fn from_store(blocks: u64) -> Traffic {
    let (read_blocks, store_blocks, fetched_blocks) = (blocks, blocks, blocks);
    Traffic { read_blocks, store_blocks, fetched_blocks, ..Traffic::default() }
}

#[test]
fn what_was_written_stays_unless_it_is_not_needed() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.write(Advice::None, 0, 8);
    world.write(Advice::DontNeed, 8, 8);
    assert_eq!(world.shard.usage().ram_blocks, 8);
    assert_eq!(world.read(Advice::None, 0, 8), from_ram(8));
    assert_eq!(world.read(Advice::None, 8, 8), from_nvme(8));
    // With the volume's default off it is the other way round.
    world.set(true, false);
    world.write(Advice::None, 32, 8);
    world.write(Advice::WillNeed, 40, 8);
    assert_eq!(world.read(Advice::None, 32, 8), from_nvme(8));
    assert_eq!(world.read(Advice::None, 40, 8), from_ram(8));
    let ram = world.shard.usage().ram_blocks;
    world.push();
    assert_eq!(world.store.len(), 32, "what left RAM is pushed from the log");
    assert_eq!(world.shard.usage().ram_blocks, ram, "and does not come back for that");
    assert!(world.store.iter().all(|((object, block), stored)| {
        *stored == content(object * OBJECT_BLOCKS + u32::from(*block))
    }));
}

#[test]
fn a_page_that_is_not_kept_is_readable_until_it_is_in_the_log() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    let page = world.transit.pop().expect("a page");
    world.pages[page.0 as usize] = content(5);
    let blocks = [BlockRef { page, crc: content(5) }];
    let request = |id, kind| Request {
        id,
        kind,
        fua: false,
        advice: Advice::DontNeed,
        volume: VOLUME,
        object: 0,
        offset: 5 * BLOCK,
        len: BLOCK,
    };
    world.tell(Input::Request(request(1, RequestKind::Write), &blocks));
    world.tell(Input::Request(request(2, RequestKind::Read), &[]));
    assert_eq!((world.replies, &world.read[..]), (1, &[content(5)][..]), "read before written");
    world.settle();
    assert_eq!(world.replies, 2);
    assert_eq!(world.shard.usage().ram_blocks, 0, "gone with the reader's lease");
    assert_eq!(world.read(Advice::None, 5, 1), from_nvme(1));
}

#[test]
fn what_was_read_stays_and_comes_into_the_log_unless_it_is_not_needed() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.store(0..256);
    assert_eq!(world.read(Advice::DontNeed, 4, 8), from_store(8));
    assert_eq!(world.shard.usage().nvme_blocks, 0);
    world.set(false, true);
    assert_eq!(world.read(Advice::None, 68, 8), from_store(8));
    assert_eq!(world.shard.usage().nvme_blocks, 0);
    world.ask(RequestKind::Cache, Advice::WillNeed, 132, 8);
    assert_eq!(world.shard.usage().nvme_blocks, 8);
    world.set(true, true);
    assert_eq!(world.read(Advice::None, 196, 8), from_store(8));
    assert_eq!(world.shard.usage().nvme_blocks, 16);
    assert_eq!(world.read(Advice::None, 132, 8), from_ram(8));
}

#[test]
fn what_is_not_needed_makes_room_first() {
    for &policy in Policy::ALL {
        let mut storage = storage(policy);
        let mut world = World::new(&mut storage, policy);
        world.store(0..OBJECTS * OBJECT_BLOCKS);
        for first in (0..64).step_by(8) {
            world.read(Advice::None, first, 8);
        }
        for first in (64..OBJECTS * OBJECT_BLOCKS).rev().step_by(8) {
            world.read(Advice::DontNeed, first - 7, 8);
        }
        let evictions = world.shard.buffers().counters().evictions;
        assert!(evictions > 1000, "{policy:?}: there was no room for all of it: {evictions}");
        for first in (0..64).step_by(8) {
            assert_eq!(world.read(Advice::None, first, 8), from_ram(8), "{policy:?}");
        }
    }
}

#[test]
fn a_scrub_passes_over_clean_data_in_ram() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.write(Advice::None, 0, 8);
    world.push();
    world.spoil(3);
    world.spoil(4);
    let ram = world.shard.usage().ram_blocks;
    assert_eq!(world.read(Advice::None, 0, 8), from_ram(8), "RAM is sound");
    // It is no client's traffic.
    assert_eq!(world.read(Advice::BypassClean, 0, 8), Traffic::default());
    let scrubbed = world.scrubbed();
    assert_eq!((scrubbed.sound_blocks, scrubbed.damaged_blocks), (6, 2));
    assert_eq!(scrubbed.repaired_blocks, 2);
    assert_eq!((world.shard.usage().ram_blocks, world.log_runs()), (ram, vec![(0, 0, 8)]));
    world.read(Advice::BypassClean, 0, 8);
    assert_eq!(
        world.scrubbed().since(scrubbed),
        Scrubbed { sound_blocks: 8, ..Scrubbed::default() }
    );
    assert_eq!(world.read(Advice::None, 0, 8), from_ram(8), "what was in RAM still is");
}

#[test]
fn a_scrub_fetches_what_is_damaged_and_not_in_ram() {
    let mut storage = storage(Policy::Lru);
    let mut world = World::new(&mut storage, Policy::Lru);
    world.store(0..512);
    for first in (0..512).step_by(8) {
        // Backwards, so that it is no stream.
        world.read(Advice::None, 504 - first, 8);
    }
    assert!(!world.is_in_ram(507));
    let runs = world.log_runs();
    world.spoil(507);
    world.ask(RequestKind::Cache, Advice::BypassClean, 504, 8);
    let damaged = Scrubbed { sound_blocks: 7, damaged_blocks: 1, repaired_blocks: 1 };
    assert_eq!((world.scrubbed(), world.log_runs()), (damaged, runs));
    world.ask(RequestKind::Cache, Advice::BypassClean, 504, 8);
    let sound = Scrubbed { sound_blocks: 8, ..Scrubbed::default() };
    assert_eq!(world.scrubbed().since(damaged), sound);
    // What the log never had is not read, and what it has no more is not brought back.
    let nvme = world.shard.usage().nvme_blocks;
    world.store(600..608);
    assert_eq!(world.read(Advice::BypassClean, 600, 8), Traffic::default());
    assert_eq!(world.shard.usage().nvme_blocks, nvme);
}

#[test]
fn a_scrub_takes_what_the_store_lacks_from_where_it_is() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.write(Advice::None, 0, 4);
    world.write(Advice::DontNeed, 4, 4);
    world.spoil(2);
    world.read(Advice::BypassClean, 0, 8);
    // Those in RAM are the newest there are; the others were read from the log.
    assert_eq!(world.scrubbed(), Scrubbed { sound_blocks: 4, ..Scrubbed::default() });
    assert_eq!(world.shard.counters().lost_blocks, 0);
}

#[test]
fn a_scan_finds_what_the_log_holds_of_a_volume() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    assert_eq!(world.log_runs(), []);
    world.write(Advice::None, 0, 32);
    world.write(Advice::None, 32, 8);
    world.write(Advice::None, 45, 2);
    world.write(Advice::None, 3 * OBJECT_BLOCKS + 63, 1);
    world.ask(RequestKind::Zero, Advice::None, 4, 1);
    assert_eq!(world.log_runs(), [(0, 0, 4), (0, 5, 32), (0, 37, 3), (0, 45, 2), (3, 63, 1)]);
    let mut at = ScrubAt::default();
    assert_eq!(world.shard.scan_log(VolumeId(9), &mut at), Scan::End);
}

/// Reclaim chose blocks of the closed epoch to move, the log had no room for them, and the push
/// that would have made room waited for the moves: the volume stood still.
#[test]
fn a_push_does_not_wait_for_a_move_that_cannot_end() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    let is_read = |output: &Output| matches!(output, Output::DeviceRead { .. });
    let is_frozen = |output: &Output| matches!(output, Output::Keeper(ToKeeper::Frozen { .. }));
    // Blocks at the tail of the log and in no RAM, then others until reclaim is about to begin.
    let (kept, other) = (0, OBJECT_BLOCKS);
    world.write(Advice::DontNeed, kept, 32);
    while world.shard.log().free_segments() > 5 {
        world.write(Advice::DontNeed, other, 32);
    }
    // The epoch is closed here but not everywhere: no push yet. The blocks are written again, so
    // the tail has what only a shadow knows, and reclaim begins to read it.
    world.open = world.open.next();
    world.tell(Input::Keeper(ToShard::Freeze { volume: VOLUME, next: world.open }));
    for first in [kept, other] {
        world.request(RequestKind::Write, Advice::DontNeed, first, 32);
    }
    let mut waiting = world.turns(20, |output| is_read(output) || is_frozen(output));
    let (frozen, moves): (Vec<_>, Vec<_>) = waiting.drain(..).partition(is_frozen);
    assert!(frozen.len() == 1 && !moves.is_empty(), "{frozen:?} {moves:?}");
    // The push goes through while the moves still wait.
    world.todo.extend(frozen);
    world.turns(200, |_| false);
    assert_eq!(world.shard.volume_is_pushing(VOLUME), Some(false));
    assert_eq!(world.store.get(&(0, 0)), Some(&content(kept)));
    world.todo.extend(moves);
    world.settle();
}

/// Zero ranges were forgotten only when the log went round. A client that discards much and writes
/// little came to a stop, for ever, when their table was full.
#[test]
fn discards_go_on_when_the_store_knows_the_ones_before() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    let presses = |output: &Output| matches!(output, Output::Keeper(ToKeeper::Pressure { .. }));
    for batch in 0..215 {
        for at in 0..40 {
            world.request(RequestKind::Zero, Advice::None, (batch * 40 + at) % 700, 1);
        }
        if !world.turns(4, presses).is_empty() {
            world.open = world.open.next();
            world.mail(ToShard::Freeze { volume: VOLUME, next: world.open });
        }
    }
    assert_eq!(world.replies, 8_600);
    assert!(world.shard.log().free_segments() > 8, "the log has not gone round");
}
