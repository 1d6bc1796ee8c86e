//! The whole of a server in one thread: shards and a keeper from the core, a simulated device and
//! store, and a client that remembers what it was told.
//!
//! One life lasts from a start to a crash or a release. The device, the store and the volume table
//! last longer.

mod sizes;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::mem;

use heeler_core::block_set::BlockSet;
use heeler_core::config::ShardConfig;
use heeler_core::event::{
    Advice, Buffering, Input, Mode, Output, PushRun, Reply, Request, RequestKind, Status, ToKeeper,
    ToShard,
};
use heeler_core::ids::{BLOCK_BYTES, BlockRef, Epoch, OpId, PageId, ShardId, VolumeId, shard_of};
use heeler_core::keeper::{
    self, BatchHandle, Changes, Edit, Keeper, Listed, PackRead, StoreOp, StoreResult,
};
use heeler_core::policy::Policy;
use heeler_core::recovery::{Need, Recovered, Recovery, RegionLayout};
use heeler_core::shard::{Budget, Shard, ShardStorage};
use heeler_core::time::{Duration, Instant};
use heeler_core::wire::head::{Head, Settings};
use heeler_core::wire::map_page::MapPage;
use heeler_core::wire::names::{self, Nonce, Uuid};
use heeler_core::wire::pack;
use heeler_core::wire::superblock::Superblock;
use heeler_hw::queue::{BlockFile, BlockQueue, Io, IoKind};
use heeler_hw::sim::{CrashKind, Rng, SimDisk, SimQueue};
use heeler_hw::{AlignedBuf, Arena, crc32c};

use crate::history::{History, Promise, SECTOR};
use crate::store::{Answer, SimStore, StoreOpKind};

use self::sizes::Sizing;

pub(crate) const SHARDS: u16 = 2;
const OBJECT_SHIFT: u8 = 18;
const OBJECT_BYTES: usize = 1 << OBJECT_SHIFT;
const UUID: Uuid = Uuid([7; 16]);
const SECTORS_OF_BLOCK: usize = BLOCK_BYTES / SECTOR;
const PAGES_PER_SHARD: u32 = 290;
const TRANSIT_PAGES: u32 = 256;
/// Pages that shards are given and lose again while they run.
const EXTRA_PAGES: u32 = 96;
/// Number of the first of them.
const EXTRA_FIRST: u32 = SHARDS as u32 * PAGES_PER_SHARD + TRANSIT_PAGES + 8;

/// How a life ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum End {
    Kill,
    PowerCut,
    /// Everything is pushed and the volume given back.
    Release,
    /// The process is killed and its cache device never seen again.
    CacheLost,
}

/// What lasts.
pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) disk: SimDisk,
    pub(crate) store: SimStore,
    pub(crate) history: History,
    pub(crate) now: u64,
    superblock: Superblock,
    volume: VolumeId,
    nonces: Vec<Nonce>,
    released: bool,
    next_stamp: u64,
    volume_bytes: usize,
    /// What survived the last end is known.
    settled: bool,
    pub(crate) stats: Stats,
    /// Bits flip in clean blocks on the device.
    pub(crate) rots: bool,
    /// The client mostly writes and hardly ever flushes, and pushes are rare: the log goes round.
    pub(crate) churns: bool,
    /// The shards' shares of memory and their policies change all the time, and what is hot is
    /// written down. If not, all is as it was when the regressions were found.
    pub(crate) resizes: bool,
    /// The volume's mode changes all the time.
    pub(crate) modes: bool,
    /// So does its size.
    pub(crate) sizes: bool,
}

/// What happened, so that a test can say that something did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stats {
    pub(crate) lives: u64,
    pub(crate) writes: u64,
    pub(crate) reads: u64,
    pub(crate) flushes: u64,
    pub(crate) commits: u64,
    pub(crate) moved: u64,
    pub(crate) torn: u64,
    pub(crate) fetched: u64,
    pub(crate) merges: u64,
    pub(crate) rotten: u64,
    pub(crate) damaged: u64,
    pub(crate) copied: u64,
    pub(crate) given_back: u64,
    pub(crate) warmed: u64,
    pub(crate) heat_records: u64,
    pub(crate) mode_changes: u64,
    pub(crate) grown: u64,
    pub(crate) shrunk: u64,
    /// Writes that were acknowledged, promised no more, and did not survive.
    pub(crate) lost: u64,
    /// Lives that ended so in a mode, by its code.
    pub(crate) cells: BTreeMap<(u8, End), ()>,
}

impl World {
    pub(crate) fn new(seed: u64, objects: usize) -> Self {
        let mut rng = Rng::new(seed);
        let bytes = Superblock::bytes_min(SHARDS);
        let superblock = Superblock::layout([9; 16], SHARDS, bytes).expect("large enough");
        let blocks = objects * OBJECT_BYTES / BLOCK_BYTES - rng.index(20);
        let mut store = SimStore::default();
        let head = Head::first(UUID, "disk0", blocks as u64, OBJECT_SHIFT, 1);
        store.objects.insert(names::head_key(UUID, 1), head.encode(crc32c));
        let volume_bytes = blocks * BLOCK_BYTES;
        Self {
            disk: SimDisk::new(bytes, rng.next_u64()),
            history: History::new(volume_bytes / SECTOR),
            rng,
            store,
            now: 1,
            superblock,
            volume: VolumeId(1),
            nonces: Vec::new(),
            released: true,
            next_stamp: 1,
            volume_bytes,
            settled: true,
            stats: Stats::default(),
            rots: false,
            churns: false,
            resizes: false,
            modes: false,
            sizes: false,
        }
    }

    /// Recovers a region; `write` says whether to change it as recovery wants.
    fn recover(&self, shard: u16, write: bool) -> Recovered {
        self.recover_from(&self.disk, shard, write)
    }

    fn recover_from(&self, disk: &SimDisk, shard: u16, write: bool) -> Recovered {
        let layout = RegionLayout {
            region: self.superblock.region_id(shard),
            segment_pages: self.superblock.segment_pages,
            segments: self.superblock.segments,
        };
        let base = self.superblock.region_page(shard);
        let byte = |page: u32| (base + u64::from(page)) * BLOCK_BYTES as u64;
        let mut recovery = Recovery::new(layout, crc32c);
        loop {
            match recovery.need() {
                Need::Read { at, count } => {
                    let mut buffer = AlignedBuf::zeroed(count as usize);
                    let ok = disk.read_at(byte(at), &mut buffer).is_ok();
                    recovery.handle_read(ok.then_some(&buffer[..]));
                }
                Need::Write { at } => {
                    let pages = recovery.bytes().len() / BLOCK_BYTES;
                    let mut buffer = AlignedBuf::zeroed(pages);
                    buffer.copy_from_slice(recovery.bytes());
                    if write {
                        disk.write_at(byte(at), &buffer).expect("no faults at start");
                    }
                    recovery.handle_written();
                }
                Need::Done => break,
            }
        }
        recovery.finish()
    }

    /// The image in the store, decoded from nothing but its bytes: one stamp for each sector.
    pub(crate) fn image(&self) -> Vec<u64> {
        let prefix = names::head_prefix(UUID);
        let newest = self.store.objects.keys().filter(|key| key.starts_with(&prefix)).max();
        let key = newest.expect("a volume has a head");
        let number = key.rsplit('/').next().and_then(|n| n.parse().ok()).expect("a number");
        let head =
            Head::decode(&self.store.objects[key], UUID, number, crc32c).expect("a sound head");
        let mut image = vec![0; self.volume_bytes / SECTOR];
        let mut overlays = BTreeMap::new();
        for tail in &head.tail {
            let bytes = &self.store.objects[&names::pack_key(UUID, tail.epoch, tail.n)];
            let header = pack::Header::decode(bytes, crc32c).expect("a sound pack");
            let mut changes = Changes::default();
            changes.add(&head, *tail, &header);
            assert!(changes.sort(), "a pack has each block once");
            changes.apply(&mut overlays);
        }
        let pages: BTreeSet<u32> = head.pages.keys().chain(overlays.keys()).copied().collect();
        for page in &pages {
            let base = head.pages.get(page).map(|at| {
                let bytes = &self.store.objects[&names::map_key(UUID, *page, at.epoch)];
                MapPage::decode(bytes, (&[UUID], 0), *page, at.epoch, crc32c).expect("a sound map")
            });
            let over = overlays.get(page).map(MapPage::updates).unwrap_or_default();
            let map = base.unwrap_or_default().apply(&over);
            for piece in map.lookup(0, heeler_core::limits::MAP_PAGE_BLOCKS as u16) {
                let Some(data) = piece.data else { continue };
                let pack =
                    &self.store.objects[&names::pack_key(UUID, data.pack.epoch, data.pack.n)];
                for at in 0..usize::from(piece.count) {
                    let from = usize::from(data.pack.header_bytes)
                        + (usize::from(data.offset) + at) * BLOCK_BYTES;
                    let block = &pack[from..from + BLOCK_BYTES];
                    assert_eq!(crc32c(0, block), data.crcs[at], "a block of a pack");
                    let first = (usize::from(piece.first) + at) * SECTORS_OF_BLOCK;
                    for sector in 0..SECTORS_OF_BLOCK {
                        image[first + sector] = stamp_of(&block[sector * SECTOR..]);
                    }
                }
            }
        }
        image
    }

    /// Checks the image in the store against everything that was ever acknowledged.
    pub(crate) fn check_image(&self) {
        if self.settled {
            self.history.check_image(&self.image());
        }
    }

    /// One life: a check of what the end of the last one left, `steps` random events, the end.
    pub(crate) fn live(&mut self, last: Option<End>, steps: usize, end: End) {
        self.stats.lives += 1;
        let mut recovered: Vec<_> = (0..SHARDS).map(|shard| self.recover(shard, true)).collect();
        self.disk.sync().expect("no faults at start");
        assert!(recovered.iter().all(|found| found.damaged == 0), "no header is damaged here");
        self.stats.torn += recovered.iter().map(|found| found.torn).sum::<u64>();
        let arena = Arena::new(EXTRA_FIRST + EXTRA_PAGES).unwrap();
        let configs: Vec<_> = (0..SHARDS).map(|shard| self.shard_config(shard)).collect();
        let mut storage: Vec<_> = configs
            .iter()
            .map(|config| ShardStorage::new(config, (PAGES_PER_SHARD + EXTRA_PAGES) as usize))
            .collect();
        let log: Vec<_> = recovered.iter().map(|found| found.volume(self.volume)).collect();
        let mut shards = Vec::new();
        for (index, storage) in storage.iter_mut().enumerate() {
            let first = index as u32 * PAGES_PER_SHARD;
            let pages: Vec<_> = (first..first + PAGES_PER_SHARD).map(PageId).collect();
            let found = mem::take(&mut recovered[index]);
            shards.push(Shard::new(configs[index], storage, &pages, found));
        }
        let queue = self.disk.queue(&arena, 4096);
        let first = u32::from(SHARDS) * PAGES_PER_SHARD;
        let transit = (first..first + TRANSIT_PAGES).map(PageId).collect();
        let seed = self.rng.next_u64();
        let mut config = keeper::Config::new(UUID, SHARDS, crc32c, seed);
        let after = if self.churns { 40 } else { 5 };
        config.push_after = Duration::from_millis(after);
        config.pages_max = 2;
        (config.tail_packs_max, config.tail_bytes_min) = (5, 1 << 20);
        (config.collect_after, config.garbage_min) = (1 << 18, 1 << 18);
        config.long_push_bytes = 1 << 17;
        config.copy_blocks_max = 200;
        config.backoff = (Duration::from_micros(500), Duration::from_millis(5));
        config.load_attempts_max = u32::MAX;
        let mut life = Life {
            world: self,
            arena,
            shards,
            queue,
            keeper: Keeper::new(config),
            attached: false,
            over: None,
            io: BTreeMap::new(),
            next_token: 1,
            store_ops: BTreeMap::new(),
            fetches: Vec::new(),
            asked: BTreeMap::new(),
            batches: BTreeMap::new(),
            next_batch: 1,
            to_shard: vec![VecDeque::new(); usize::from(SHARDS)],
            to_keeper: vec![VecDeque::new(); usize::from(SHARDS)],
            transit,
            requests: BTreeMap::new(),
            next_request: 1,
            flushes: BTreeMap::new(),
            pushes: BTreeMap::new(),
            leases: Vec::new(),
            scanned: Vec::new(),
            pool: (EXTRA_FIRST..EXTRA_FIRST + EXTRA_PAGES).map(PageId).collect(),
            modes: vec![Mode::default(); usize::from(SHARDS)],
            size: 0,
            limit: 0,
            sizing: Sizing::Rest,
            cuts: BTreeSet::new(),
        };
        life.start(&log);
        if let Some(last) = last {
            if last == End::CacheLost {
                // Up to the claim the dead server's commit could still come through.
                life.world.settled = true;
                life.world.check_image();
                let (image, now) = (life.world.image(), life.world.now);
                life.world.stats.lost += life.world.history.settle(&image, now);
            }
            life.check_after(last);
        }
        life.run(steps);
        life.note_stats();
        if steps > 0 {
            let mode = life.modes[0];
            life.world.stats.cells.insert((mode.code(), end), ());
        }
        match end {
            End::Kill | End::CacheLost => {
                drop(life);
                self.disk.crash(CrashKind::Process);
            }
            End::PowerCut => {
                drop(life);
                self.disk.crash(CrashKind::Power);
            }
            End::Release => {
                life.release();
                drop(life);
                self.released = true;
                self.disk.crash(CrashKind::Process);
            }
        }
        let mut rng = self.rng.fork();
        self.store.crash(&mut rng);
        self.now += 1;
        self.check_image();
        self.settled = false;
        if end == End::CacheLost {
            self.disk = SimDisk::new(self.superblock.device_bytes(), self.rng.next_u64());
            self.superblock.cache = core::array::from_fn(|_| self.rng.below(256) as u8);
            self.nonces.clear();
        }
    }

    fn shard_config(&self, shard: u16) -> ShardConfig {
        let layout = RegionLayout {
            region: self.superblock.region_id(shard),
            segment_pages: self.superblock.segment_pages,
            segments: self.superblock.segments,
        };
        ShardConfig {
            onodes: 24,
            leaves: 160,
            tasks: 64,
            adopted_max: TRANSIT_PAGES as usize,
            // Written and read all the time: it must change nothing that a client sees.
            heat_pages: if self.resizes { self.superblock.heat_pages } else { 0 },
            heat_every: Duration::from_micros(100),
            policy: if self.resizes { Policy::default() } else { Policy::TwoQBluestore },
            ..ShardConfig::for_region(layout, crc32c)
        }
    }
}

/// The stamp of a sector: repeated all through it, so that a torn one is seen.
pub(crate) fn stamp_of(bytes: &[u8]) -> u64 {
    let words = bytes[..SECTOR].chunks_exact(8);
    let mut words = words.map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    let stamp = words.next().unwrap();
    assert!(words.all(|word| word == stamp), "a torn sector");
    stamp
}

/// What the client waits for.
enum Asked {
    Read { at: usize, since: u64 },
    Change { stamp: u64, fua: bool },
    Flush(u64),
    Other,
    Scan,
}

struct Life<'w, 'a> {
    world: &'w mut World,
    arena: Arena,
    shards: Vec<Shard<'a>>,
    queue: SimQueue,
    keeper: Keeper,
    attached: bool,
    over: Option<&'static str>,
    /// Device operations: which shard's, and the pages of a read.
    io: BTreeMap<u64, (usize, OpId, Vec<PageId>)>,
    next_token: u64,
    store_ops: BTreeMap<u64, StoreOp>,
    /// Fetch plans to be carried out: shard, operation, pages, reads.
    fetches: Vec<(usize, OpId, Vec<PackRead>)>,
    /// What each fetch was for, by shard and slot of the operation.
    asked: BTreeMap<(usize, u32), (u32, u16, u16, BlockSet)>,
    batches: BTreeMap<BatchHandle, Vec<u8>>,
    next_batch: u64,
    to_shard: Vec<VecDeque<ToShard>>,
    to_keeper: Vec<VecDeque<FromShard>>,
    transit: Vec<PageId>,
    requests: BTreeMap<u64, Asked>,
    next_request: u64,
    /// Flushes: when issued, parts to come.
    flushes: BTreeMap<u64, (u64, usize)>,
    /// `PushNow` tickets: when asked.
    pushes: BTreeMap<u64, u64>,
    leases: Vec<(usize, OpId)>,
    /// What a scan has read.
    scanned: Vec<u64>,
    /// Pages that are no shard's.
    pool: Vec<PageId>,
    /// The mode that each shard has heard of last.
    modes: Vec<Mode>,
    /// Bytes of the volume, and how many of them clients use.
    size: usize,
    limit: usize,
    sizing: Sizing,
    /// Requests that discard what is to be cut off.
    cuts: BTreeSet<u64>,
}

#[derive(Clone)]
enum FromShard {
    Mail(ToKeeper),
    Batch { op_volume: VolumeId, epoch: Epoch, runs: Vec<PushRun>, crcs: Vec<u32>, bytes: Vec<u8> },
    Fetch { op: OpId, object: u32, first: u16, count: u16, gaps: BlockSet },
    Query { op: OpId, object: u32, first: u16, count: u16 },
}

impl Life<'_, '_> {
    fn now(&self) -> Instant {
        Instant(self.world.now * 1000)
    }

    fn start(&mut self, log: &[(Epoch, u64)]) {
        let nonce = Nonce(core::array::from_fn(|_| self.world.rng.below(256) as u8));
        let expected = self.world.nonces.clone();
        let dirty = if self.world.released { 0 } else { log.iter().map(|of| of.1).sum() };
        let start = keeper::Start {
            volume: self.world.volume,
            takeover: expected.is_empty(),
            cache: Uuid(self.world.superblock.cache),
            expected: &expected,
            nonce,
            dirty_blocks: dirty,
            log_epoch: log.iter().map(|of| of.0).max().unwrap_or(Epoch::ZERO),
            host: "sim",
            unix_secs: 1,
        };
        let now = self.now();
        self.keeper.handle(now, keeper::Input::Start(start));
        self.drain_keeper();
        self.pump(100_000, |life| life.attached && life.to_shard.iter().all(VecDeque::is_empty));
        self.world.released = false;
    }

    /// Lets everything happen, in random order, until `done`.
    fn pump(&mut self, limit: usize, done: impl Fn(&Self) -> bool) {
        for _ in 0..limit {
            if done(self) {
                return;
            }
            self.event(false);
        }
        for shard in &self.shards {
            eprintln!("{:?} {:?}", shard.usage(), shard.buffers().usage());
            for segment in shard.log().segments() {
                eprintln!("  {segment:?}");
            }
        }
        let (requests, leases) = (self.requests.len(), self.leases.len());
        panic!("stuck: {requests} requests, {leases} leases, {:?}", self.keeper.status());
    }

    /// Reads everything and checks it against what had to survive.
    fn check_after(&mut self, last: End) {
        let mut contents = vec![0; self.world.history.sectors()];
        // Behind its end there is nothing.
        for start in (0..self.size).step_by(32 * BLOCK_BYTES) {
            let len = (self.size - start).min(32 * BLOCK_BYTES);
            self.send(RequestKind::Read, false, start, len, Asked::Scan);
            self.pump(50_000, |life| life.requests.is_empty());
            let scanned = mem::take(&mut self.scanned);
            let first = start / SECTOR;
            contents[first..first + scanned.len()].copy_from_slice(&scanned);
        }
        let history = &mut self.world.history;
        for (sector, content) in contents.iter().enumerate() {
            let ok = match last {
                End::Kill => history.may_survive(sector, *content, Promise::Logged),
                // What the image held has been settled as durable.
                End::PowerCut | End::CacheLost => {
                    history.may_survive(sector, *content, Promise::Durable)
                }
                End::Release => history.may_survive(sector, *content, Promise::Stored),
            };
            let why = history.explain(sector);
            assert!(ok, "after {last:?} sector {sector} holds {content}: {why}");
        }
        self.world.stats.lost += history.settle(&contents, self.world.now);
        self.world.settled = true;
        self.world.check_image();
    }

    fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            if let Some(why) = self.over {
                panic!("the volume was lost: {why}");
            }
            self.event(true);
        }
    }

    fn release(&mut self) {
        self.pump(200_000, |life| life.requests.is_empty());
        let now = self.now();
        self.keeper.handle(now, keeper::Input::Detach);
        self.drain_keeper();
        self.pump(200_000, |life| life.over.is_some());
        assert_eq!(self.over, Some("released"));
        let volume = self.world.volume;
        self.pump(200_000, |life| {
            life.to_shard.iter().all(VecDeque::is_empty)
                && life.shards.iter().all(|shard| shard.volume_is_pushing(volume) == Some(false))
        });
        self.world.history.promise(self.world.now, Promise::Stored);
        for shard in &self.shards {
            assert_eq!(shard.usage().dirty_blocks, 0, "nothing is dirty after a release");
        }
    }

    fn note_stats(&mut self) {
        for shard in &self.shards {
            shard.check();
            self.world.stats.moved += shard.counters().moved_blocks;
            self.world.stats.fetched += shard.traffic().fetched_blocks;
            self.world.stats.warmed += shard.counters().warmed_blocks;
            self.world.stats.heat_records += shard.counters().heat_records;
            self.world.stats.damaged += shard.counters().damaged_blocks;
            assert_eq!(shard.counters().lost_blocks, 0, "no dirty block is damaged here");
        }
    }

    /// Something happens.
    fn event(&mut self, clients: bool) {
        self.world.now += 1;
        match self.world.rng.below(20) {
            0..5 if clients && self.attached => self.ask(),
            0..8 => self.device(),
            8..11 => self.store(),
            11..13 => self.mail_to_shard(),
            13..15 => self.mail_to_keeper(),
            15 => self.fetch(),
            16 if self.world.rng.chance(1, 2) => self.release_lease(),
            16 if self.world.rots => self.rot(),
            19 if clients && self.attached && self.world.sizes => self.change_size(),
            18 if self.world.resizes && self.world.rng.chance(1, 6) => self.budget(),
            17 if self.world.rng.chance(1, 8) => {
                self.world.now += self.world.rng.below(4000);
                let now = self.now();
                self.keeper.handle(now, keeper::Input::Tick);
                self.drain_keeper();
            }
            _ => {
                let shard = self.world.rng.index(self.shards.len());
                self.tell(shard, Input::Turn);
            }
        }
    }

    /// A shard's share of memory changes, or its policy.
    fn budget(&mut self) {
        let shard = self.world.rng.index(self.shards.len());
        let rng = &mut self.world.rng;
        if rng.chance(1, 8) {
            let policy = Policy::ALL[rng.index(Policy::ALL.len())];
            return self.tell(shard, Input::Policy(policy));
        }
        let below = match rng.below(3) {
            0 => PageId(EXTRA_FIRST + rng.below(u64::from(EXTRA_PAGES)) as u32),
            _ => PageId::NONE,
        };
        let budget = Budget {
            pages: 256 + rng.below(120) as u32,
            meta_units: 40 + rng.below(200) as u32,
            below,
        };
        self.tell(shard, Input::Budget(budget));
        let room = budget.pages.saturating_sub(self.shards[shard].budget_report().pages);
        let (given, kept) =
            mem::take(&mut self.pool).into_iter().partition::<Vec<_>, _>(|page| *page < below);
        let (given, rest) = given.split_at(given.len().min(room as usize));
        self.pool = [&kept, rest].concat();
        self.tell(shard, Input::Pages(given));
    }

    fn tell(&mut self, shard: usize, input: Input<'_>) {
        let now = self.now();
        self.shards[shard].handle(now, input).expect("drained, and tasks are left");
        self.drain_shard(shard);
    }

    fn page_bytes(&self, page: PageId) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        if page.is_some() {
            self.arena.read(page, 0, &mut bytes);
        }
        bytes
    }

    fn drain_shard(&mut self, shard: usize) {
        let mut merges = Vec::new();
        let mut taken = Vec::new();
        while let Some(output) = self.shards[shard].poll_output() {
            match output {
                Output::DeviceRead { op, at, count } => {
                    let pages = self.shards[shard].op_pages(op).to_vec();
                    assert_eq!(pages.len(), count as usize);
                    self.push_io(shard, op, IoKind::Read, at, pages);
                }
                Output::DeviceLoad { op, at } => {
                    let pages = self.shards[shard].op_pages(op).to_vec();
                    self.push_io(shard, op, IoKind::Read, at, pages);
                }
                Output::DeviceWrite { op, at, count, header } => {
                    let pages = self.shards[shard].op_pages(op).to_vec();
                    assert_eq!(pages.len(), count as usize);
                    for (index, page) in pages.iter().take(header as usize).enumerate() {
                        let (arena, from) = (&self.arena, &self.shards[shard]);
                        arena.with_mut(*page, |bytes| from.encode(op, index, bytes));
                    }
                    self.push_io(shard, op, IoKind::Write, at, pages);
                }
                Output::DeviceFlush { op } => self.push_io(shard, op, IoKind::Flush, 0, Vec::new()),
                Output::Fill { op, dst, src, keep } => {
                    let mut bytes = self.page_bytes(src);
                    let new = self.page_bytes(dst);
                    let keep = usize::from(keep.0)..usize::from(keep.1);
                    bytes[keep.clone()].copy_from_slice(&new[keep]);
                    self.arena.write(dst, 0, &bytes);
                    merges.push((op, crc32c(0, &bytes)));
                    self.world.stats.merges += 1;
                }
                Output::CopyPage { src, dst } => {
                    self.arena.copy(dst, src, 0..BLOCK_BYTES);
                    self.world.stats.copied += 1;
                }
                Output::PagesBack { count } => {
                    let pages = self.shards[shard].pages_back();
                    assert_eq!(pages.len(), count as usize);
                    self.world.stats.given_back += u64::from(count);
                    for page in pages {
                        // Whoever still uses it reads what no client has written.
                        self.arena.write(*page, 0, &[0xee; BLOCK_BYTES]);
                        assert!(!self.pool.contains(page), "{page:?} is given back twice");
                        self.pool.push(*page);
                    }
                }
                Output::Fetch { op, object, first, count, gaps, .. } => {
                    self.asked.insert((shard, op.slot), (object, first, count, gaps));
                    let fetch = FromShard::Fetch { op, object, first, count, gaps };
                    self.to_keeper[shard].push_back(fetch);
                }
                Output::Query { op, object, first, count, .. } => {
                    self.to_keeper[shard].push_back(FromShard::Query { op, object, first, count });
                }
                Output::Batch { op, volume, epoch } => {
                    let runs = self.shards[shard].batch_runs().to_vec();
                    let blocks = self.shards[shard].batch_blocks().to_vec();
                    let mut bytes = Vec::new();
                    for block in &blocks {
                        let page = self.page_bytes(block.page);
                        assert_eq!(crc32c(0, &page), block.crc, "a pushed block");
                        bytes.extend(page);
                    }
                    let crcs = blocks.iter().map(|block| block.crc).collect();
                    self.to_keeper[shard].push_back(FromShard::Batch {
                        op_volume: volume,
                        epoch,
                        runs,
                        crcs,
                        bytes,
                    });
                    taken.push(op);
                }
                Output::HandBack { .. } => {
                    let blocks = self.shards[shard].reply_blocks();
                    self.transit.extend(blocks.iter().map(|block| block.page));
                }
                Output::Reply(reply) | Output::Late(reply) => {
                    let blocks = self.shards[shard].reply_blocks().to_vec();
                    self.answered(shard, &reply, &blocks);
                }
                Output::Keeper(mail) => self.to_keeper[shard].push_back(FromShard::Mail(mail)),
            }
        }
        for (op, crc) in merges {
            self.tell(shard, Input::Filled { op, crc });
        }
        for op in taken {
            self.tell(shard, Input::BatchTaken(op));
        }
    }

    fn push_io(&mut self, shard: usize, op: OpId, kind: IoKind, at: u32, pages: Vec<PageId>) {
        let token = self.next_token;
        self.next_token += 1;
        let base = self.world.superblock.region_page(shard as u16);
        let offset =
            if kind == IoKind::Flush { 0 } else { (base + u64::from(at)) * BLOCK_BYTES as u64 };
        self.queue.push(Io { token, kind, offset, pages: &pages }).expect("a deep queue");
        let pages = if kind == IoKind::Read { pages } else { Vec::new() };
        self.io.insert(token, (shard, op, pages));
    }

    fn device(&mut self) {
        self.queue.submit().unwrap();
        self.world.disk.step();
        while let Some(done) = self.queue.reap() {
            let (shard, op, pages) = self.io.remove(&done.token).expect("asked for");
            let ok = done.result.is_ok();
            if self.shards[shard].is_load(op) {
                let bytes = ok.then(|| self.page_bytes(pages[0]));
                self.tell(shard, Input::Loaded { op, bytes: bytes.as_deref() });
                continue;
            }
            let crcs: Vec<u32> = if ok {
                pages.iter().map(|page| self.arena.crc(*page)).collect()
            } else {
                Vec::new()
            };
            self.tell(shard, Input::Device { op, ok, crcs: &crcs });
            if self.world.rng.chance(1, 2) {
                self.tell(shard, Input::Turn);
            }
        }
    }

    fn store(&mut self) {
        let World { store, rng, .. } = &mut *self.world;
        let Some((token, answer)) = store.step(rng) else { return };
        let op = self.store_ops.remove(&token).expect("asked for");
        let keys: Vec<Listed<'_>> = match &answer {
            Answer::Listed(found) => {
                found.iter().map(|(key, bytes)| Listed { key, bytes: *bytes }).collect()
            }
            _ => Vec::new(),
        };
        let result = match &answer {
            Answer::Got(bytes) => StoreResult::Got(bytes),
            Answer::Listed(_) => StoreResult::Listed(&keys),
            Answer::Gathered(bytes) => {
                let batch = BatchHandle(self.next_batch);
                self.next_batch += 1;
                self.batches.insert(batch, bytes.clone());
                StoreResult::Gathered(batch)
            }
            Answer::Done => StoreResult::Done,
            Answer::AlreadyExists => StoreResult::AlreadyExists,
            Answer::NotFound => StoreResult::NotFound,
            Answer::Failed => StoreResult::Failed { transient: true, note: 0 },
        };
        let now = self.now();
        self.keeper.handle(now, keeper::Input::StoreDone { op, result });
        self.drain_keeper();
    }

    fn store_op(&mut self, op: StoreOp, key: String, kind: StoreOpKind) {
        let token = self.next_token;
        self.next_token += 1;
        self.store_ops.insert(token, op);
        self.world.store.submit(token, key, kind);
    }

    fn drain_keeper(&mut self) {
        while let Some(output) = self.keeper.poll_output() {
            match output {
                keeper::Output::Remember { nonce, ours } => {
                    if ours {
                        self.world.nonces.push(nonce);
                    } else {
                        self.world.nonces = vec![nonce];
                        self.world.volume = VolumeId(self.world.volume.0 + 1);
                    }
                    let (now, volume) = (self.now(), self.world.volume);
                    self.keeper.handle(now, keeper::Input::Remembered { volume });
                }
                keeper::Output::Attached(attached) => {
                    self.size = attached.blocks as usize * BLOCK_BYTES;
                    self.limit = self.size;
                    self.attached = true;
                }
                keeper::Output::Resized { blocks } => self.resized(blocks),
                keeper::Output::Refused(refusal) => panic!("refused: {refusal}"),
                keeper::Output::Get { op, key, first } => {
                    self.store_op(op, key, StoreOpKind::Get(first));
                }
                keeper::Output::Put { op, key, meta, batches } => {
                    let mut bytes = meta.to_vec();
                    for batch in batches {
                        bytes.extend(&self.batches[&batch]);
                    }
                    self.store_op(op, key, StoreOpKind::Put(bytes));
                }
                keeper::Output::Create { op, key, bytes } => {
                    self.store_op(op, key, StoreOpKind::Create(bytes.to_vec()));
                }
                keeper::Output::List { op, prefix } => {
                    self.store_op(op, prefix, StoreOpKind::List);
                }
                keeper::Output::Gather { op, blocks, reads } => {
                    self.store_op(op, String::new(), StoreOpKind::Gather(blocks, reads));
                }
                keeper::Output::Delete { op, key } => self.store_op(op, key, StoreOpKind::Delete),
                keeper::Output::DropBatch(batch) => {
                    self.batches.remove(&batch);
                }
                keeper::Output::ToShard(shard, mail) => {
                    if matches!(mail, ToShard::Committed { .. }) && shard == ShardId(0) {
                        self.world.stats.commits += 1;
                        self.world.check_image();
                    }
                    self.to_shard[usize::from(shard.0)].push_back(mail);
                }
                keeper::Output::FetchPlan { shard, op, reads, .. } => {
                    self.fetches.push((usize::from(shard.0), op, reads));
                }
                keeper::Output::QueryAnswer { shard, op, data } => {
                    self.tell(usize::from(shard.0), Input::Queried { op, ok: true, data: &data });
                }
                keeper::Output::FetchFailed { shard, op } => {
                    self.tell(usize::from(shard.0), Input::Fetched { op, ok: false, crcs: &[] });
                }
                keeper::Output::QueryFailed { shard, op } => {
                    self.tell(usize::from(shard.0), Input::Queried { op, ok: false, data: &[] });
                }
                keeper::Output::PushDone { ticket, committed } => {
                    assert!(committed);
                    let asked = self.pushes.remove(&ticket).expect("asked for");
                    self.world.history.promise(asked, Promise::Stored);
                    self.world.check_image();
                }
                keeper::Output::EditRefused { why, .. } => panic!("refused: {why}"),
                keeper::Output::Fenced { .. } => self.over = Some("fenced"),
                keeper::Output::Released => self.over = Some("released"),
            }
        }
    }

    /// A bit flips in a clean block of the oldest segment, which is sealed and durable.
    fn rot(&mut self) {
        let index = self.world.rng.index(self.shards.len());
        let shard = &self.shards[index];
        let Some(segment) = shard.log().oldest() else { return };
        let pages = shard.log().segment_pages();
        let page = segment * pages + self.world.rng.below(u64::from(pages)) as u32;
        let owner = shard.log().owner(page);
        if owner == heeler_core::onode::NIL {
            return;
        }
        let leaf = shard.onodes().leaf(owner / 16);
        if (leaf.dirty[0] | leaf.dirty[1]) & 1 << (owner % 16) != 0 {
            return;
        }
        let at = self.world.superblock.region_page(index as u16) + u64::from(page);
        let bit = self.world.rng.index(BLOCK_BYTES * 8);
        // Damage to a record of which the log does not say that it is durable, now or after a power
        // cut, cannot be told from a torn write.
        let torn = |world: &World| {
            let durable = world.resizes.then(|| world.disk.durable_copy());
            let after =
                durable.map_or(0, |disk| world.recover_from(&disk, index as u16, false).torn);
            (world.recover(index as u16, false).torn, after)
        };
        let before = torn(self.world);
        self.world.disk.flip_bit(at, bit);
        let after = torn(self.world);
        if after.0 > before.0 || after.1 > before.1 {
            self.world.disk.flip_bit(at, bit);
            return;
        }
        self.world.stats.rotten += 1;
    }

    fn mail_to_shard(&mut self) {
        let shard = self.world.rng.index(self.shards.len());
        if let Some(mail) = self.to_shard[shard].pop_front() {
            if let ToShard::Settings { mode, .. } = mail {
                self.world.stats.mode_changes += u64::from(mode != self.modes[shard]);
                self.modes[shard] = mode;
            }
            self.tell(shard, Input::Keeper(mail));
        }
    }

    fn mail_to_keeper(&mut self) {
        let shard = self.world.rng.index(self.shards.len());
        let Some(mail) = self.to_keeper[shard].pop_front() else { return };
        let (now, id) = (self.now(), ShardId(shard as u16));
        match mail {
            FromShard::Mail(mail) => self.keeper.handle(now, keeper::Input::Shard(id, mail)),
            FromShard::Batch { op_volume, epoch, runs, crcs, bytes } => {
                assert_eq!(op_volume, self.world.volume);
                let batch = BatchHandle(self.next_batch);
                self.next_batch += 1;
                self.batches.insert(batch, bytes);
                let input =
                    keeper::Input::Batch { shard: id, epoch, batch, runs: &runs, crcs: &crcs };
                self.keeper.handle(now, input);
            }
            FromShard::Fetch { op, object, first, count, gaps } => {
                let input = keeper::Input::Fetch { shard: id, op, object, first, count, gaps };
                self.keeper.handle(now, input);
            }
            FromShard::Query { op, object, first, count } => {
                let input = keeper::Input::Query { shard: id, op, object, first, count };
                self.keeper.handle(now, input);
            }
        }
        self.drain_keeper();
    }

    /// Carries out a fetch plan.
    fn fetch(&mut self) {
        if self.fetches.is_empty() {
            return;
        }
        let (shard, op, reads) = self.fetches.remove(0);
        let pages = self.shards[shard].op_pages(op).to_vec();
        let mut crcs = vec![None; pages.len()];
        if reads.iter().any(|read| !self.world.store.objects.contains_key(&read.key)) {
            // The pack was rewritten since: where is it now?
            let (object, first, count, gaps) = self.asked[&(shard, op.slot)];
            let shard = ShardId(shard as u16);
            let now = self.now();
            let input = keeper::Input::Fetch { shard, op, object, first, count, gaps };
            self.keeper.handle(now, input);
            return self.drain_keeper();
        }
        for read in reads {
            let pack = &self.world.store.objects[&read.key];
            let bytes = &pack[read.offset as usize..read.offset as usize + read.len as usize];
            for part in read.parts {
                for (at, crc) in part.crcs.iter().enumerate() {
                    let from = (part.at as usize + at) * BLOCK_BYTES;
                    let block = &bytes[from..from + BLOCK_BYTES];
                    assert_eq!(crc32c(0, block), *crc, "a fetched block");
                    let index = usize::from(part.first) + at;
                    self.arena.write(pages[index], 0, block);
                    crcs[index] = Some(*crc);
                }
            }
        }
        self.tell(shard, Input::Fetched { op, ok: true, crcs: &crcs });
        self.tell(shard, Input::Turn);
    }

    fn release_lease(&mut self) {
        if !self.leases.is_empty() {
            let index = self.world.rng.index(self.leases.len());
            let (shard, lease) = self.leases.swap_remove(index);
            self.tell(shard, Input::Release(lease));
        }
    }

    /// The client asks for something.
    fn ask(&mut self) {
        if self.requests.len() + self.leases.len() >= 24 {
            return;
        }
        let choice = self.world.rng.below(100);
        if self.world.churns && choice < 92 {
            return if choice < 6 { self.ask_zero() } else { self.ask_write() };
        }
        if self.world.churns && choice < 99 {
            return;
        }
        if self.world.churns && self.world.modes {
            return self.ask_push();
        }
        match self.world.rng.below(100) {
            0..50 => self.ask_write(),
            50..80 => {
                let (at, len) = self.some_range();
                self.send(
                    RequestKind::Read,
                    false,
                    at,
                    len,
                    Asked::Read { at, since: self.world.now },
                );
                self.world.stats.reads += 1;
            }
            80..88 => self.ask_zero(),
            88..94 => self.ask_flush(),
            94..96 => {
                let (at, len) = self.some_range();
                self.send(RequestKind::Cache, false, at, len, Asked::Other);
            }
            96..98 => {
                let (at, len) = self.some_range();
                self.send(RequestKind::Status, false, at, len, Asked::Other);
            }
            _ => self.ask_push(),
        }
    }

    /// A push, by itself or with other settings.
    fn ask_push(&mut self) {
        let (ticket, now) = (self.next_request, self.now());
        self.next_request += 1;
        self.pushes.insert(ticket, self.world.now);
        let rng = &mut self.world.rng;
        let buffering = Buffering { reads: rng.chance(2, 3), writes: rng.chance(2, 3) };
        let modes = if self.world.modes { Mode::ALL } else { &Mode::ALL[..1] };
        let mode = modes[rng.index(modes.len())];
        let edit = Edit::Settings(Settings { mode, buffering, ..Settings::default() });
        let input = match rng.chance(1, 3) {
            true => keeper::Input::Edit { edit: &edit, ticket },
            false => keeper::Input::PushNow { ticket },
        };
        self.keeper.handle(now, input);
        self.drain_keeper();
    }

    /// A range of sectors that one request may have, in bytes of the volume.
    fn some_range(&mut self) -> (usize, usize) {
        let rng = &mut self.world.rng;
        let window = 32 * BLOCK_BYTES;
        let windows = self.limit.div_ceil(window);
        // Half of everything goes to an eighth of the volume.
        let windows = if rng.chance(1, 2) { windows.div_ceil(8) } else { windows };
        let start = rng.index(windows) * window;
        let end = (start + window).min(self.limit);
        let unit = if rng.chance(1, 3) { SECTOR } else { BLOCK_BYTES };
        let units = (end - start) / unit;
        let first = rng.index(units);
        let most = (units - first).min(if rng.chance(1, 4) { units } else { 8 });
        (start + first * unit, (1 + rng.index(most)) * unit)
    }

    fn stamp(&mut self) -> u64 {
        self.world.next_stamp += 1;
        self.world.next_stamp
    }

    fn ask_write(&mut self) {
        let (at, len) = self.some_range();
        let blocks = (at + len).div_ceil(BLOCK_BYTES) - at / BLOCK_BYTES;
        if self.transit.len() < blocks {
            return;
        }
        let stamp = self.stamp();
        let fua = !self.world.churns && self.world.rng.chance(1, 16);
        let now = self.world.now;
        self.world.history.issue(stamp, at / SECTOR, len / SECTOR, false, now);
        self.send(RequestKind::Write, fua, at, len, Asked::Change { stamp, fua });
        self.world.stats.writes += 1;
    }

    fn ask_zero(&mut self) {
        let objects = self.limit.div_ceil(OBJECT_BYTES);
        let object = self.world.rng.index(objects);
        let start = object * OBJECT_BYTES;
        let blocks = (self.limit - start).min(OBJECT_BYTES) / BLOCK_BYTES;
        let (first, count) = if self.world.rng.chance(1, 4) {
            (0, blocks)
        } else {
            let first = self.world.rng.index(blocks);
            (first, 1 + self.world.rng.index((blocks - first).min(40)))
        };
        let (at, len) = (start + first * BLOCK_BYTES, count * BLOCK_BYTES);
        let stamp = self.stamp();
        let (kind, fua, now) = (
            if self.world.rng.chance(1, 2) { RequestKind::Zero } else { RequestKind::Discard },
            !self.world.churns && self.world.rng.chance(1, 16),
            self.world.now,
        );
        self.world.history.issue(stamp, at / SECTOR, len / SECTOR, true, now);
        self.send(kind, fua, at, len, Asked::Change { stamp, fua });
    }

    fn ask_flush(&mut self) {
        let flush = self.next_request;
        self.next_request += 1;
        self.flushes.insert(flush, (self.world.now, self.shards.len()));
        for shard in 0..self.shards.len() {
            self.send_to(shard, RequestKind::Flush, false, 0, 0, &[], Asked::Flush(flush));
        }
        self.world.stats.flushes += 1;
    }

    fn send(&mut self, kind: RequestKind, fua: bool, at: usize, len: usize, asked: Asked) {
        let object = (at / OBJECT_BYTES) as u32;
        let shard = shard_of(self.world.volume, object, SHARDS);
        let mut blocks = Vec::new();
        if let (RequestKind::Write, Asked::Change { stamp, .. }) = (kind, &asked) {
            let first = at / BLOCK_BYTES * BLOCK_BYTES;
            for start in (first..at + len).step_by(BLOCK_BYTES) {
                let page = self.transit.pop().expect("checked before");
                // Outside the range there is rubbish, as in a page that was used before.
                let mut bytes = vec![0xee; BLOCK_BYTES];
                let (from, to) =
                    (start.max(at) - start, (start + BLOCK_BYTES).min(at + len) - start);
                for word in bytes[from..to].chunks_exact_mut(8) {
                    word.copy_from_slice(&stamp.to_le_bytes());
                }
                self.arena.write(page, 0, &bytes);
                blocks.push(BlockRef { page, crc: crc32c(0, &bytes) });
            }
        }
        let offset = at % OBJECT_BYTES;
        let shard = usize::from(shard.0);
        self.send_to(
            shard,
            kind,
            fua,
            offset + object as usize * OBJECT_BYTES,
            len,
            &blocks,
            asked,
        );
    }

    /// Mostly none.
    fn some_advice(&mut self) -> Advice {
        if matches!(self.sizing, Sizing::Asking) {
            return Advice::Cut;
        }
        match self.world.rng.below(12) {
            0 => Advice::WillNeed,
            1 => Advice::DontNeed,
            2 => Advice::BypassClean,
            _ => Advice::None,
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a request has that many parts")]
    fn send_to(
        &mut self,
        shard: usize,
        kind: RequestKind,
        fua: bool,
        at: usize,
        len: usize,
        blocks: &[BlockRef],
        asked: Asked,
    ) {
        let id = self.next_request;
        self.next_request += 1;
        let request = Request {
            id,
            kind,
            fua,
            advice: self.some_advice(),
            volume: self.world.volume,
            object: (at / OBJECT_BYTES) as u32,
            offset: (at % OBJECT_BYTES) as u32,
            len: len as u32,
        };
        self.requests.insert(id, asked);
        let now = self.now();
        if self.shards[shard].handle(now, Input::Request(request, blocks)).is_err() {
            panic!("24 requests fit into 64 tasks");
        }
        self.drain_shard(shard);
    }

    fn answered(&mut self, shard: usize, reply: &Reply, blocks: &[BlockRef]) {
        let asked = self.requests.remove(&reply.id).expect("asked for, and answered once");
        self.cuts.remove(&reply.id);
        assert_eq!(reply.status, Status::Ok, "no device fails here");
        if let Some(lease) = reply.lease {
            self.leases.push((shard, lease));
        }
        let now = self.world.now;
        match asked {
            Asked::Read { at, since } => self.check_read(at, since, blocks),
            Asked::Scan => {
                for block in blocks {
                    let bytes = self.page_bytes(block.page);
                    self.scanned.extend(bytes.chunks_exact(SECTOR).map(stamp_of));
                }
            }
            Asked::Change { stamp, fua } => {
                self.transit.extend(blocks.iter().map(|block| block.page));
                let promise = Promise::of(self.modes[shard], fua);
                self.world.history.ack(stamp, now, promise);
            }
            Asked::Flush(flush) => {
                let entry = self.flushes.get_mut(&flush).expect("asked for");
                entry.1 -= 1;
                if self.modes[shard] == Mode::Ephemeral {
                    // It promises nothing, whatever the other parts do.
                    entry.0 = 1;
                }
                if entry.1 == 0 {
                    let since = self.flushes.remove(&flush).expect("looked up").0;
                    self.world.history.promise(since - 1, Promise::Durable);
                }
            }
            Asked::Other => {}
        }
    }

    fn check_read(&mut self, at: usize, since: u64, blocks: &[BlockRef]) {
        let first = at / BLOCK_BYTES * SECTORS_OF_BLOCK;
        for (index, block) in blocks.iter().enumerate() {
            let bytes = self.page_bytes(block.page);
            for part in 0..SECTORS_OF_BLOCK {
                let sector = first + index * SECTORS_OF_BLOCK + part;
                let content = stamp_of(&bytes[part * SECTOR..]);
                assert!(
                    self.world.history.may_read(sector, content, since),
                    "sector {sector} reads as {content} at {since}: {}",
                    self.world.history.explain(sector)
                );
            }
        }
    }
}
