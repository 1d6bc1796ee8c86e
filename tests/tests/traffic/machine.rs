//! A server whose clock is virtual: the core's own shards and keeper, over a device and a store
//! that keep of each block its checksum alone. Every write gives its blocks new checksums, so that
//! what is read can be told from what should have been.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use heeler_core::block_set::BlockSet;
use heeler_core::config::ShardConfig;
use heeler_core::event::{
    Advice, Input, Output, Reply, Request, RequestKind, Status, ToKeeper, ToShard,
};
use heeler_core::ids::{BLOCK_BYTES, BlockRef, Epoch, OpId, PageId, ShardId, VolumeId, shard_of};
use heeler_core::keeper::{self, BatchHandle, Keeper, Listed, PackRead, StoreOp, StoreResult};
use heeler_core::limits::REQUEST_BLOCKS_MAX;
use heeler_core::recovery::{Need, Recovered, Recovery, RegionLayout};
use heeler_core::shard::{Shard, ShardStorage};
use heeler_core::time::{Duration, Instant};
use heeler_core::wire::head::Head;
use heeler_core::wire::names::{self, Nonce, Uuid};
use heeler_core::wire::superblock::Superblock;
use heeler_core::wlog::meta_pages;
use heeler_hw::crc32c;

use crate::store::{Object, Store};

const UUID: Uuid = Uuid([7; 16]);
const VOLUME: VolumeId = VolumeId(1);
const OBJECT_SHIFT: u8 = 22;
const OBJECT_BYTES: u64 = 1 << OBJECT_SHIFT;
const REQUEST_BYTES_MAX: u64 = (REQUEST_BLOCKS_MAX * BLOCK_BYTES) as u64;
/// Pages for what clients write.
const TRANSIT_PAGES: u32 = 4096;
/// As the server has it: the most puts that its lanes let out.
const PUTS_MAX: usize = 16;
/// A push that nobody waits for is spread over so long.
const PUSH_AFTER: Duration = Duration::from_secs(5);
/// What the device takes for anything but a flush, and for that.
const DEVICE: Duration = Duration::from_micros(80);
const FLUSH: Duration = Duration::from_micros(300);
/// What the store takes to answer, and a byte on its way (100 MB/s).
const ANSWER: Duration = Duration::from_millis(20);
const BYTE_NANOS: u64 = 10;

/// What a server is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) shards: u16,
    /// Of the cache device.
    pub(crate) device_bytes: u64,
    /// For data in RAM, in all shards.
    pub(crate) ram_bytes: u64,
}

/// What was fetched for clients, in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Missed {
    /// Read, and not in the cache.
    pub(crate) reads: u64,
    /// Old content around what was written in part.
    pub(crate) edges: u64,
    /// Nobody asked for: read ahead.
    pub(crate) ahead: u64,
    /// Of these: read before they left the cache.
    pub(crate) ahead_used: u64,
}

enum Event {
    Device { shard: usize, op: OpId, write: Option<(u32, Vec<u32>)>, read: Option<(u32, usize)> },
    Store { op: StoreOp, job: Job },
    Fetch { shard: usize, op: OpId, reads: Vec<PackRead> },
}

enum Job {
    Get { key: String, first: Option<u32> },
    Put { key: String, object: Object },
    Create { key: String, object: Object },
    List { prefix: String },
    Delete { key: String },
    Gather { blocks: usize, reads: Vec<PackRead> },
}

/// A part of a request, cut for a shard.
#[derive(Clone, Copy)]
struct Part {
    shard: usize,
    request: Request,
}

pub(crate) struct Machine {
    pub(crate) now: Instant,
    pub(crate) store: Store,
    pub(crate) missed: Missed,
    pub(crate) keeper: Keeper,
    pub(crate) shards: Vec<Shard<'static>>,
    pub(crate) commits: u64,
    /// Checksums by page of memory, and by page of each shard's region.
    pages: Vec<u32>,
    device: Vec<Vec<u32>>,
    transit: Vec<PageId>,
    events: BTreeMap<(Instant, u64), Event>,
    sequence: u64,
    next_crc: u32,
    next_id: u64,
    batches: BTreeMap<BatchHandle, Vec<u32>>,
    next_batch: u64,
    /// What each fetch was for, by shard and slot of the operation.
    asked: BTreeMap<(usize, u32), (u32, u16, u16, BlockSet)>,
    /// Packs of a push that nobody waits for: until when, and when the next one goes.
    spread: Option<(Instant, Instant)>,
    packs: VecDeque<(StoreOp, Job, u64)>,
    hurried: bool,
    /// Requests that wait for tasks or pages.
    queue: VecDeque<Part>,
    /// Those that a shard has.
    unanswered: BTreeMap<u64, Part>,
    mail: VecDeque<(usize, ToShard)>,
    /// Blocks that were read ahead and not used: object and block.
    ahead: BTreeSet<(u32, u32)>,
    attached: bool,
    released: bool,
    pushed: bool,
}

/// An empty region, as recovery finds it.
fn empty_region(layout: RegionLayout) -> Recovered {
    let mut recovery = Recovery::new(layout, crc32c);
    loop {
        match recovery.need() {
            Need::Read { count, .. } => {
                recovery.handle_read(Some(&vec![0; count as usize * BLOCK_BYTES]));
            }
            Need::Write { .. } => recovery.handle_written(),
            Need::Done => return recovery.finish(),
        }
    }
}

/// A store with an empty volume in it.
pub(crate) fn empty_volume(bytes: u64) -> Store {
    let mut store = Store::default();
    let head = Head::first(UUID, "disk0", bytes.div_ceil(BLOCK_BYTES as u64), OBJECT_SHIFT, 1);
    let meta = head.encode(crc32c).into();
    store.put(&names::head_key(UUID, 1), Object { meta, crcs: Vec::new() });
    store
}

impl Machine {
    /// Starts a server with an empty cache on a store with a volume that nobody has.
    pub(crate) fn start(setup: Setup, store: Store, nonce: u8) -> Self {
        let Setup { shards, device_bytes, ram_bytes } = setup;
        let superblock = Superblock::layout([9; 16], shards, device_bytes).expect("large enough");
        let mut built = Vec::new();
        let mut next_page = 0;
        let mut pages = |count: u32| {
            next_page += count;
            (next_page - count..next_page).map(PageId).collect::<Vec<_>>()
        };
        for shard in 0..shards {
            let layout = RegionLayout {
                region: superblock.region_id(shard),
                segment_pages: superblock.segment_pages,
                segments: superblock.segments,
            };
            let config = ShardConfig {
                adopted_max: TRANSIT_PAGES as usize,
                ..ShardConfig::for_region(layout, crc32c)
            };
            let own = ram_bytes / u64::from(shards) / BLOCK_BYTES as u64;
            let count = own as u32 + meta_pages(layout.segment_pages) as u32;
            let storage = Box::leak(Box::new(ShardStorage::new(&config, count as usize)));
            built.push(Shard::new(config, storage, &pages(count), empty_region(layout)));
        }
        let transit = pages(TRANSIT_PAGES);
        let mut config = keeper::Config::new(UUID, shards, crc32c, 1);
        config.push_after = PUSH_AFTER;
        config.puts_max = PUTS_MAX;
        let region = superblock.region_pages() as usize;
        let mut machine = Self {
            now: Instant(0),
            store,
            missed: Missed::default(),
            keeper: Keeper::new(config),
            shards: built,
            commits: 0,
            pages: vec![0; next_page as usize],
            device: vec![vec![0; region]; shards.into()],
            transit,
            events: BTreeMap::new(),
            sequence: 0,
            next_crc: u32::from(nonce) << 24 | 1,
            next_id: 1,
            batches: BTreeMap::new(),
            next_batch: 1,
            asked: BTreeMap::new(),
            spread: None,
            packs: VecDeque::new(),
            hurried: false,
            queue: VecDeque::new(),
            unanswered: BTreeMap::new(),
            mail: VecDeque::new(),
            ahead: BTreeSet::new(),
            attached: false,
            released: false,
            pushed: false,
        };
        machine.claim(nonce);
        machine
    }

    fn claim(&mut self, nonce: u8) {
        let start = keeper::Start {
            volume: VOLUME,
            takeover: false,
            cache: Uuid([nonce; 16]),
            expected: &[],
            nonce: Nonce([nonce; 16]),
            dirty_blocks: 0,
            log_epoch: Epoch::ZERO,
            host: "simulated",
            unix_secs: 1,
        };
        self.tell_keeper(keeper::Input::Start(start));
        while !self.attached {
            assert!(self.step(Instant(u64::MAX)), "the claim comes to an end");
        }
    }

    /// A client asks for a range of the volume, now.
    pub(crate) fn ask(&mut self, offset: u64, len: u64, write: bool) {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let cut = end.min((at / REQUEST_BYTES_MAX + 1) * REQUEST_BYTES_MAX);
            let object = (at / OBJECT_BYTES) as u32;
            let request = Request {
                id: self.next_id,
                kind: if write { RequestKind::Write } else { RequestKind::Read },
                fua: false,
                advice: Advice::None,
                volume: VOLUME,
                object,
                offset: (at % OBJECT_BYTES) as u32,
                len: (cut - at) as u32,
            };
            self.next_id += 1;
            let shard = usize::from(shard_of(VOLUME, object, self.shards.len() as u16).0);
            self.queue.push_back(Part { shard, request });
            at = cut;
        }
        self.send_requests();
        self.turn();
    }

    /// Lets everything happen up to a time.
    pub(crate) fn run_until(&mut self, until: Instant) {
        while self.step(until) {}
    }

    /// Lets everything happen until all clients have their answers.
    pub(crate) fn answer_all(&mut self) {
        while !(self.unanswered.is_empty() && self.queue.is_empty()) {
            assert!(self.step(Instant(u64::MAX)), "every request is answered");
        }
    }

    /// Pushes what is dirty.
    pub(crate) fn push(&mut self) {
        self.pushed = false;
        self.tell_keeper(keeper::Input::PushNow { ticket: 1 });
        self.turn();
        while !self.pushed {
            assert!(self.step(Instant(u64::MAX)), "a push comes to an end");
        }
    }

    /// Pushes what is dirty and gives the volume up.
    pub(crate) fn release(mut self) -> Store {
        self.tell_keeper(keeper::Input::Detach);
        self.turn();
        while !self.released {
            assert!(self.step(Instant(u64::MAX)), "a release comes to an end");
        }
        self.store
    }

    fn turn(&mut self) {
        loop {
            while let Some((shard, mail)) = self.mail.pop_front() {
                self.tell(shard, Input::Keeper(mail));
            }
            for shard in 0..self.shards.len() {
                self.tell(shard, Input::Turn);
                while self.shards[shard].poll_timeout().is_some_and(|at| at <= self.now) {
                    self.tell(shard, Input::Turn);
                }
            }
            if self.mail.is_empty() {
                return;
            }
        }
    }

    /// The next thing that happens until a time; `false`: there is nothing, and it is that time.
    fn step(&mut self, until: Instant) -> bool {
        let event = self.events.first_key_value().map(|(key, _)| key.0);
        let shards = self.shards.iter().filter_map(Shard::poll_timeout);
        let pack = self.packs.front().map(|_| self.pack_due());
        let next = shards.chain(self.keeper.poll_timeout()).chain(event).chain(pack).min();
        let Some(next) = next.filter(|next| *next <= until) else {
            self.now = if until.0 == u64::MAX { self.now } else { until };
            return false;
        };
        self.now = self.now.max(next);
        if event == Some(next) {
            let (_, event) = self.events.pop_first().expect("just seen");
            self.happen(event);
        }
        if self.keeper.poll_timeout().is_some_and(|at| at <= self.now) {
            self.tell_keeper(keeper::Input::Tick);
        }
        self.put_packs();
        self.send_requests();
        self.turn();
        true
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Device { shard, op, write, read } => {
                if let Some((at, crcs)) = write {
                    self.device[shard][at as usize..][..crcs.len()].copy_from_slice(&crcs);
                }
                let mut crcs = Vec::new();
                if let Some((at, count)) = read {
                    crcs.extend_from_slice(&self.device[shard][at as usize..][..count]);
                    let pages = self.shards[shard].op_pages(op).to_vec();
                    pages.iter().zip(&crcs).for_each(|(page, crc)| self.set_page(*page, *crc));
                }
                self.tell(shard, Input::Device { op, ok: true, crcs: &crcs });
            }
            Event::Store { op, job } => self.end_job(op, job),
            Event::Fetch { shard, op, reads } => self.end_fetch(shard, op, &reads),
        }
    }

    fn set_page(&mut self, page: PageId, crc: u32) {
        self.pages[page.0 as usize] = crc;
    }

    fn new_crc(&mut self) -> u32 {
        self.next_crc += 1;
        self.next_crc
    }

    fn after(&mut self, span: Duration, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + span, self.sequence), event);
    }

    fn tell_keeper(&mut self, input: keeper::Input<'_>) {
        self.keeper.handle(self.now, input);
        while let Some(output) = self.keeper.poll_output() {
            self.do_for_keeper(output);
        }
    }

    fn tell(&mut self, shard: usize, input: Input<'_>) {
        self.shards[shard].handle(self.now, input).expect("it was drained, and has tasks");
        self.drain(shard);
    }

    /// Hands in what waits, in order, as far as there are tasks and pages.
    fn send_requests(&mut self) {
        while let Some(Part { shard, request }) = self.queue.front().copied() {
            let mut blocks = Vec::new();
            if request.kind == RequestKind::Write {
                let first = request.offset as usize / BLOCK_BYTES;
                let end = (request.offset + request.len) as usize;
                let count = end.div_ceil(BLOCK_BYTES) - first;
                if self.transit.len() < count {
                    return;
                }
                for page in self.transit.split_off(self.transit.len() - count) {
                    let crc = self.new_crc();
                    self.set_page(page, crc);
                    blocks.push(BlockRef { page, crc });
                }
            }
            self.unanswered.insert(request.id, Part { shard, request });
            if self.shards[shard].handle(self.now, Input::Request(request, &blocks)).is_err() {
                self.unanswered.remove(&request.id);
                self.transit.extend(blocks.iter().map(|block| block.page));
                return;
            }
            self.queue.pop_front();
            self.drain(shard);
        }
    }

    fn drain(&mut self, shard: usize) {
        let mut filled = Vec::new();
        let mut taken = Vec::new();
        let mut leases = Vec::new();
        while let Some(output) = self.shards[shard].poll_output() {
            match output {
                Output::DeviceRead { op, at, count } => {
                    let read = Some((at, count as usize));
                    self.after(DEVICE, Event::Device { shard, op, write: None, read });
                }
                Output::DeviceWrite { op, at, .. } => {
                    let pages = self.shards[shard].op_pages(op);
                    let crcs = pages.iter().map(|page| self.pages[page.0 as usize]).collect();
                    let write = Some((at, crcs));
                    self.after(DEVICE, Event::Device { shard, op, write, read: None });
                }
                Output::DeviceLoad { .. } => unreachable!("there is no record of heat"),
                Output::DeviceFlush { op } => {
                    self.after(FLUSH, Event::Device { shard, op, write: None, read: None });
                }
                Output::Fill { op, dst, .. } => {
                    let crc = self.new_crc();
                    self.set_page(dst, crc);
                    filled.push((op, crc));
                }
                Output::CopyPage { src, dst } => self.set_page(dst, self.pages[src.0 as usize]),
                Output::PagesBack { .. } | Output::Query { .. } | Output::Late(_) => {
                    unreachable!("nobody asked for it")
                }
                Output::Fetch { op, object, first, count, gaps, .. } => {
                    self.asked.insert((shard, op.slot), (object, first, count, gaps));
                    self.note_missed(object, (first, count), &gaps);
                    self.fetch(shard, op);
                }
                Output::Batch { op, epoch, .. } => {
                    self.take_batch(shard, epoch);
                    taken.push(op);
                }
                Output::HandBack { .. } => unreachable!("the volume is written back"),
                Output::Reply(reply) => {
                    leases.extend(reply.lease);
                    self.answered(shard, &reply);
                }
                Output::Keeper(mail) => {
                    self.hurried |= matches!(mail, ToKeeper::Pressure { .. });
                    self.tell_keeper(keeper::Input::Shard(ShardId(shard as u16), mail));
                }
            }
        }
        filled.into_iter().for_each(|(op, crc)| self.tell(shard, Input::Filled { op, crc }));
        taken.into_iter().for_each(|op| self.tell(shard, Input::BatchTaken(op)));
        leases.into_iter().for_each(|lease| self.tell(shard, Input::Release(lease)));
    }

    fn answered(&mut self, shard: usize, reply: &Reply) {
        assert_eq!(reply.status, Status::Ok, "nothing fails here");
        let part =
            self.unanswered.remove(&reply.id).expect("it was asked for, and is answered once");
        if reply.kind == RequestKind::Read {
            let r = part.request;
            let block_bytes = BLOCK_BYTES as u32;
            for block in r.offset / block_bytes..(r.offset + r.len).div_ceil(block_bytes) {
                self.missed.ahead_used += u64::from(self.ahead.remove(&(r.object, block)));
            }
        }
        if reply.kind == RequestKind::Write {
            let blocks = self.shards[shard].reply_blocks();
            self.transit.extend(blocks.iter().map(|block| block.page));
        }
    }

    fn fetch(&mut self, shard: usize, op: OpId) {
        let (object, first, count, gaps) = self.asked[&(shard, op.slot)];
        let shard = ShardId(shard as u16);
        self.tell_keeper(keeper::Input::Fetch { shard, op, object, first, count, gaps });
    }

    /// Tells whom each block of a fetch is for.
    fn note_missed(&mut self, object: u32, (first, count): (u16, u16), gaps: &BlockSet) {
        for block in u32::from(first)..u32::from(first) + u32::from(count) {
            if gaps.contains(block as usize - usize::from(first)) {
                continue;
            }
            let wants = |part: &&Part| {
                let Request { object: of, offset, len, .. } = part.request;
                let blocks = BLOCK_BYTES as u32;
                of == object && (offset / blocks..(offset + len).div_ceil(blocks)).contains(&block)
            };
            self.ahead.remove(&(object, block));
            let mut wanting = self.unanswered.values().filter(wants).map(|part| part.request.kind);
            match wanting.clone().find(|kind| *kind == RequestKind::Read) {
                Some(_) => self.missed.reads += 1,
                None if wanting.next().is_some() => self.missed.edges += 1,
                None => {
                    self.missed.ahead += 1;
                    self.ahead.insert((object, block));
                }
            }
        }
    }

    fn take_batch(&mut self, shard: usize, epoch: Epoch) {
        let blocks = self.shards[shard].batch_blocks();
        let crcs: Vec<u32> = blocks.iter().map(|block| block.crc).collect();
        for block in blocks {
            assert_eq!(block.crc, self.pages[block.page.0 as usize], "what a page holds");
        }
        let runs = self.shards[shard].batch_runs().to_vec();
        let batch = BatchHandle(self.next_batch);
        self.next_batch += 1;
        self.batches.insert(batch, crcs.clone());
        let shard = ShardId(shard as u16);
        self.tell_keeper(keeper::Input::Batch { shard, epoch, batch, runs: &runs, crcs: &crcs });
    }

    fn do_for_keeper(&mut self, output: keeper::Output) {
        match output {
            keeper::Output::Remember { .. } => {
                self.keeper.handle(self.now, keeper::Input::Remembered { volume: VOLUME });
            }
            keeper::Output::Attached(_) => self.attached = true,
            keeper::Output::Get { op, key, first } => {
                self.after(ANSWER, Event::Store { op, job: Job::Get { key, first } });
            }
            keeper::Output::Put { op, key, meta, batches } => {
                let crcs = batches.iter().flat_map(|batch| self.batches[batch].clone()).collect();
                let object = Object { meta, crcs };
                let (pack, bytes) = (!batches.is_empty(), object.bytes());
                let job = Job::Put { key, object };
                if pack {
                    self.packs.push_back((op, job, bytes));
                    self.put_packs();
                } else {
                    self.start_job(op, job, bytes);
                }
            }
            keeper::Output::Create { op, key, bytes } => {
                let object = Object { meta: bytes, crcs: Vec::new() };
                self.start_job(op, Job::Create { key, object }, 0);
            }
            keeper::Output::Gather { op, blocks, reads } => {
                let bytes = reads.iter().map(|read| u64::from(read.len)).sum();
                self.start_job(op, Job::Gather { blocks: blocks.into(), reads }, bytes);
            }
            keeper::Output::List { op, prefix } => self.start_job(op, Job::List { prefix }, 0),
            keeper::Output::Delete { op, key } => self.start_job(op, Job::Delete { key }, 0),
            keeper::Output::DropBatch(batch) => {
                self.batches.remove(&batch);
            }
            keeper::Output::ToShard(shard, mail) => self.mail(usize::from(shard.0), mail),
            keeper::Output::FetchPlan { shard, op, reads, .. } => {
                let bytes: u64 = reads.iter().map(|read| u64::from(read.len)).sum();
                let span = if reads.is_empty() { Duration(0) } else { took(bytes) };
                let shard = usize::from(shard.0);
                self.after(span, Event::Fetch { shard, op, reads });
            }
            keeper::Output::PushDone { committed, .. } => {
                assert!(committed);
                self.pushed = true;
            }
            keeper::Output::Released => self.released = true,
            output => panic!("nobody asked for {output:?}"),
        }
    }

    fn mail(&mut self, shard: usize, mail: ToShard) {
        match mail {
            ToShard::Freeze { .. } if shard == 0 => {
                let hurried = std::mem::take(&mut self.hurried);
                self.spread = (!hurried).then_some((self.now + PUSH_AFTER, self.now));
            }
            ToShard::Committed { .. } if shard == 0 => self.commits += 1,
            _ => {}
        }
        self.mail.push_back((shard, mail));
    }

    fn pack_due(&self) -> Instant {
        self.spread.map_or(self.now, |(_, next)| next)
    }

    /// Sends off the packs whose time has come, as the server's lanes do.
    fn put_packs(&mut self) {
        if self.hurried {
            self.spread = None;
        }
        while !self.packs.is_empty() && self.pack_due() <= self.now {
            let (op, job, bytes) = self.packs.pop_front().expect("just seen");
            if let Some((end, next)) = &mut self.spread {
                let backlog = self.keeper.status().backlog_bytes.max(bytes).max(1);
                let left = end.0.saturating_sub(self.now.0);
                *next = self.now + Duration((left as f64 * bytes as f64 / backlog as f64) as u64);
            }
            self.start_job(op, job, bytes);
        }
    }

    fn start_job(&mut self, op: StoreOp, job: Job, bytes: u64) {
        self.after(took(bytes), Event::Store { op, job });
    }

    fn end_job(&mut self, op: StoreOp, job: Job) {
        match job {
            Job::Get { key, first } => {
                let found = self.store.read_meta(&key, first);
                let result = found.as_deref().map_or(StoreResult::NotFound, StoreResult::Got);
                self.tell_keeper(keeper::Input::StoreDone { op, result });
            }
            Job::Put { key, object } => {
                self.store.put(&key, object);
                self.tell_keeper(keeper::Input::StoreDone { op, result: StoreResult::Done });
            }
            Job::Create { key, object } => {
                assert!(self.store.get(&key).is_none(), "there is one owner");
                self.store.put(&key, object);
                self.tell_keeper(keeper::Input::StoreDone { op, result: StoreResult::Done });
            }
            Job::List { prefix } => {
                let found = self.store.list(&prefix);
                let listed: Vec<_> =
                    found.iter().map(|(key, bytes)| Listed { key, bytes: *bytes }).collect();
                let result = StoreResult::Listed(&listed);
                self.tell_keeper(keeper::Input::StoreDone { op, result });
            }
            Job::Delete { key } => {
                self.store.delete(&key);
                self.tell_keeper(keeper::Input::StoreDone { op, result: StoreResult::Done });
            }
            Job::Gather { blocks, reads } => {
                let mut crcs = vec![0; blocks];
                for read in &reads {
                    self.store.counts.copy_gets.add(read.len.into());
                    for (at, crc) in self.read_pack(read).expect("a victim stays until then") {
                        crcs[at] = crc;
                    }
                }
                let batch = BatchHandle(self.next_batch);
                self.next_batch += 1;
                self.batches.insert(batch, crcs);
                let result = StoreResult::Gathered(batch);
                self.tell_keeper(keeper::Input::StoreDone { op, result });
            }
        }
    }

    /// Which blocks of a fetch a read brings, checked; `None`: there is no such pack.
    fn read_pack(&self, read: &PackRead) -> Option<Vec<(usize, u32)>> {
        let pack = self.store.get(&read.key)?;
        let first = (read.offset as usize - pack.meta.len()) / BLOCK_BYTES;
        let mut found = Vec::new();
        for part in &read.parts {
            let crcs = &pack.crcs[first + part.at as usize..][..part.crcs.len()];
            assert_eq!(crcs, part.crcs, "the blocks of {}", read.key);
            let places = usize::from(part.first)..;
            found.extend(places.zip(crcs.iter().copied()));
        }
        Some(found)
    }

    fn end_fetch(&mut self, shard: usize, op: OpId, reads: &[PackRead]) {
        let pages = self.shards[shard].op_pages(op).to_vec();
        let mut crcs = vec![None; pages.len()];
        for read in reads {
            let Some(found) = self.read_pack(read) else {
                // The pack was rewritten since.
                return self.fetch(shard, op);
            };
            self.store.counts.fetches.add(read.len.into());
            for (at, crc) in found {
                crcs[at] = Some(crc);
                self.set_page(pages[at], crc);
            }
        }
        self.tell(shard, Input::Fetched { op, ok: true, crcs: &crcs });
    }
}

fn took(bytes: u64) -> Duration {
    Duration(ANSWER.0 + bytes * BYTE_NANOS)
}
