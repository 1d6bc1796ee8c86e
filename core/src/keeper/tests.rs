//! Keepers, model shards and a model store, under a seeded scheduler that delays, reorders, fails
//! and loses what it can. After every change of the store the image is decoded from scratch
//! and compared with the cut that its head names.

mod handover;
mod resize;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use super::*;
use crate::block_set::BlockSet;
use crate::event::{Buffering, Mode};
use crate::limits::{BATCH_BLOCKS_MAX, MAP_PAGE_BLOCKS};
use crate::wire::frame::tests::crc32c;
use crate::wire::head::{PageRef, Source, TailPack};
use crate::wire::map_page::MapPage;
use crate::wire::names::ObjectName;
use crate::wire::{names, pack};

const VOLUME: Uuid = Uuid([0x11; 16]);
const OBJECT_SHIFT: u8 = 18;
const OBJECT_BLOCKS: u32 = 64;
const PAGES: usize = 3;
const BLOCKS: usize = PAGES * MAP_PAGE_BLOCKS - 100;
const SHARDS: u16 = 3;
const CREDITS: u32 = 2;

/// A block's content; 0 is zeroes.
type Block = u64;

fn block_crc(block: Block) -> u32 {
    crc32c(0, &block.to_le_bytes())
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        ((self.next() >> 16) % bound as u64) as usize
    }

    fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// An object of the store: bytes of the core, and blocks behind them.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Object {
    meta: Vec<u8>,
    blocks: Vec<Block>,
}

impl Object {
    fn bytes(&self) -> u64 {
        (self.meta.len() + self.blocks.len() * 4096) as u64
    }
}

#[derive(Clone, Debug)]
enum Effect {
    Get(String, Option<u32>),
    Put(String, Object),
    Create(String, Object),
    List(String),
    Delete(String),
    Gather(u16, Vec<PackRead>),
}

#[derive(Clone, Debug)]
enum Answer {
    Got(Vec<u8>),
    Gathered(Vec<Block>),
    Listed(Vec<(String, u64)>),
    Done,
    AlreadyExists,
    NotFound,
    Failed,
}

#[derive(Debug)]
struct Pending {
    server: usize,
    life: u32,
    op: StoreOp,
    effect: Effect,
    /// What to answer once the effect has taken place.
    answer: Option<Answer>,
    /// The keeper has been told that it failed; it takes place later all the same.
    zombie: bool,
}

/// A shard as the keeper sees it.
#[derive(Default)]
struct ModelShard {
    settings: Option<(Mode, Buffering, bool)>,
    open_epoch: u64,
    open: BTreeMap<usize, Block>,
    closed: BTreeMap<usize, Block>,
    closed_epoch: u64,
    /// What of the closed epoch has not been handed over; `None`: not released.
    to_push: Option<VecDeque<(usize, Block)>>,
    credits: u32,
    mail: VecDeque<ToShard>,
    to_keeper: VecDeque<FromShard>,
    fenced: bool,
}

enum FromShard {
    Mail(ToKeeper),
    Batch(Epoch, u64, Vec<PushRun>, Vec<Block>),
}

/// A server: one keeper and its cache.
struct Server {
    life: u32,
    keeper: Keeper,
    shards: Vec<ModelShard>,
    batches: BTreeMap<u64, Vec<Block>>,
    next_batch: u64,
    /// The image, cut after cut.
    cut: Vec<Block>,
    frozen: u16,
    /// As the last `Committed` said.
    committed: Epoch,
    nonces: Vec<Nonce>,
    /// Outputs of note.
    attached: Option<Attached>,
    refused: Option<Refusal>,
    remembered: Vec<bool>,
    over: bool,
    fenced: bool,
    released: bool,
    done: Vec<(u64, bool)>,
    refusals: Vec<(u64, EditError)>,
    /// Size in blocks, since it was changed.
    resized: Option<u64>,
    fetches: BTreeMap<u32, (u32, u16, u16, BlockSet)>,
    next_fetch: u32,
    fetched: u32,
    creates: u32,
}

struct World {
    rng: Rng,
    now: Instant,
    objects: BTreeMap<String, Object>,
    pending: Vec<Pending>,
    servers: Vec<Server>,
    /// The image at each cut, by epoch.
    images: BTreeMap<Epoch, Vec<Block>>,
    nonces: u8,
    /// Percent of store operations that go wrong.
    faults: usize,
    /// Operations of these servers stay where they are.
    stalled: Vec<usize>,
    last_number: u32,
    commits: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let head = Head::first(VOLUME, "disk0", BLOCKS as u64, OBJECT_SHIFT, 5);
        let object = Object { meta: head.encode(crc32c), blocks: Vec::new() };
        Self {
            rng: Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            now: Instant(0),
            objects: [(names::head_key(VOLUME, 1), object)].into(),
            pending: Vec::new(),
            servers: Vec::new(),
            images: [(Epoch::ZERO, vec![0; BLOCKS])].into(),
            nonces: 0,
            faults: 0,
            stalled: Vec::new(),
            last_number: 1,
            commits: 0,
        }
    }

    fn config(&self, seed: u64) -> Config {
        Config {
            pages_max: 2,
            puts_max: 2,
            tail_packs_max: 3,
            tail_bytes_min: [0, 1 << 20][seed as usize % 2],
            long_push_bytes: 1 << 18,
            collect_after: 1 << 20,
            garbage_min: 1 << 19,
            copy_blocks_max: [100, 5000][seed as usize / 2 % 2],
            ..Config::new(VOLUME, SHARDS, crc32c, seed)
        }
    }

    fn add(&mut self) -> usize {
        self.servers.push(Server {
            life: 0,
            keeper: Keeper::new(self.config(7)),
            shards: (0..SHARDS).map(|_| ModelShard::default()).collect(),
            batches: BTreeMap::new(),
            next_batch: 0,
            cut: vec![0; BLOCKS],
            frozen: 0,
            committed: Epoch::ZERO,
            nonces: Vec::new(),
            attached: None,
            refused: None,
            remembered: Vec::new(),
            over: false,
            fenced: false,
            released: false,
            done: Vec::new(),
            refusals: Vec::new(),
            resized: None,
            fetches: BTreeMap::new(),
            next_fetch: 0,
            fetched: 0,
            creates: 0,
        });
        self.servers.len() - 1
    }

    /// Starts, or starts again after a crash: a new keeper over what the cache still holds.
    fn start(&mut self, s: usize, takeover: bool) {
        self.nonces += 1;
        let nonce = Nonce([self.nonces; 16]);
        let config = self.config(self.nonces.into());
        let server = &mut self.servers[s];
        server.life += 1;
        server.keeper = Keeper::new(config);
        server.batches.clear();
        server.fetches.clear();
        server.frozen = 0;
        server.attached = None;
        server.resized = None;
        server.refused = None;
        (server.over, server.fenced, server.released) = (false, false, false);
        let mut log_epoch = Epoch::ZERO;
        for shard in &mut server.shards {
            shard.mail.clear();
            shard.to_keeper.clear();
            shard.to_push = None;
            shard.fenced = false;
            log_epoch = log_epoch.max(Epoch(shard.open_epoch));
        }
        let dirty = server.shards.iter().map(|shard| shard.open.len() + shard.closed.len()).sum();
        let dirty: usize = dirty;
        let expected = server.nonces.clone();
        self.feed(
            s,
            Input::Start(Start {
                volume: VolumeId(s as u32),
                takeover,
                cache: Uuid([s as u8 + 1; 16]),
                expected: &expected,
                nonce,
                dirty_blocks: dirty as u64,
                log_epoch,
                host: "host.example",
                unix_secs: 1000,
            }),
        );
    }

    fn feed(&mut self, s: usize, input: Input<'_>) {
        self.servers[s].keeper.handle(self.now, input);
        let mut remembered = false;
        while let Some(output) = self.servers[s].keeper.poll_output() {
            remembered |= matches!(output, Output::Remember { .. });
            self.carry_out(s, output);
        }
        if remembered {
            self.feed(s, Input::Remembered { volume: VolumeId(s as u32) });
        }
    }

    fn carry_out(&mut self, s: usize, output: Output) {
        let server = &mut self.servers[s];
        let effect = match output {
            Output::Get { op, key, first } => (op, Effect::Get(key, first)),
            Output::Gather { op, blocks, reads } => (op, Effect::Gather(blocks, reads)),
            Output::List { op, prefix } => (op, Effect::List(prefix)),
            Output::Delete { op, key } => (op, Effect::Delete(key)),
            Output::Put { op, key, meta, batches } => {
                let blocks = batches.iter().flat_map(|batch| server.batches[&batch.0].clone());
                let object = Object { meta: meta.to_vec(), blocks: blocks.collect() };
                (op, Effect::Put(key, object))
            }
            Output::Create { op, key, bytes } => {
                server.creates += 1;
                (op, Effect::Create(key, Object { meta: bytes.to_vec(), blocks: Vec::new() }))
            }
            other => return self.note(s, other),
        };
        assert!(!server.over, "a keeper that is finished leaves the store alone");
        let (op, effect) = effect;
        let life = server.life;
        self.pending.push(Pending { server: s, life, op, effect, answer: None, zombie: false });
    }

    fn note(&mut self, s: usize, output: Output) {
        let server = &mut self.servers[s];
        match output {
            Output::Remember { nonce, ours } => {
                server.remembered.push(ours);
                if !ours {
                    server.nonces.clear();
                    server.shards = (0..SHARDS).map(|_| ModelShard::default()).collect();
                }
                server.nonces.push(nonce);
            }
            Output::Attached(attached) => {
                server.nonces.drain(..server.nonces.len() - 1);
                server.committed = attached.committed;
                server.cut = self.images[&attached.committed].clone();
                server.attached = Some(attached);
            }
            Output::Refused(refusal) => {
                server.refused = Some(refusal);
                server.over = true;
            }
            Output::DropBatch(batch) => {
                server.batches.remove(&batch.0).expect("a batch is dropped once");
            }
            Output::ToShard(shard, mail) => {
                if let (0, ToShard::Committed { epoch, .. }) = (shard.0, mail) {
                    server.committed = epoch;
                }
                server.shards[usize::from(shard.0)].mail.push_back(mail);
            }
            Output::FetchPlan { op, count, reads, .. } => self.check_fetch(s, op, count, &reads),
            Output::QueryAnswer { op, data, .. } => {
                let (object, first, count, _) = server.fetches.remove(&op.slot).unwrap();
                let image = &self.images[&server.committed];
                let base = (object * OBJECT_BLOCKS) as usize + usize::from(first);
                let blocks = &image[base..base + usize::from(count)];
                assert!(data.iter().copied().eq(blocks.iter().map(|&block| block != 0)));
                server.fetched += 1;
            }
            Output::FetchFailed { op, .. } | Output::QueryFailed { op, .. } => {
                server.fetches.remove(&op.slot).expect("one answer");
            }
            Output::PushDone { ticket, committed } => server.done.push((ticket, committed)),
            Output::EditRefused { ticket, why } => server.refusals.push((ticket, why)),
            Output::Resized { blocks } => server.resized = Some(blocks),
            Output::Fenced { .. } => (server.over, server.fenced) = (true, true),
            Output::Released => (server.over, server.released) = (true, true),
            other => panic!("not for here: {other:?}"),
        }
    }

    fn check_fetch(&mut self, s: usize, op: OpId, count: u16, reads: &[PackRead]) {
        let server = &mut self.servers[s];
        let (object, first, asked, gaps) = server.fetches.remove(&op.slot).unwrap();
        assert_eq!(count, asked);
        for part in reads.iter().flat_map(|read| &read.parts) {
            let blocks = usize::from(part.first)..usize::from(part.first) + part.crcs.len();
            assert!(blocks.into_iter().all(|at| !gaps.contains(at)), "nobody wants it");
        }
        let mut found = vec![0; count.into()];
        self.read(reads, &mut found);
        let server = &mut self.servers[s];
        let base = (object * OBJECT_BLOCKS) as usize + usize::from(first);
        let image = &self.images[&server.committed][base..base + usize::from(count)];
        for at in (0..count.into()).filter(|at| !gaps.contains(*at)) {
            assert_eq!(found[at], image[at], "block {at} of {count}");
        }
        server.fetched += 1;
    }

    fn read(&self, reads: &[PackRead], found: &mut [Block]) {
        for read in reads {
            let pack = &self.objects[&read.key];
            let skip = (read.offset as usize - pack.meta.len()) / 4096;
            let blocks = &pack.blocks[skip..skip + read.len as usize / 4096];
            for part in &read.parts {
                for (i, &crc) in part.crcs.iter().enumerate() {
                    let block = blocks[part.at as usize + i];
                    assert_eq!(block_crc(block), crc);
                    found[usize::from(part.first) + i] = block;
                }
            }
        }
    }

    // The shards.

    fn write(&mut self, s: usize, at: usize, block: Block) {
        let shard = self.shard_of(s, at);
        if shard.fenced {
            return;
        }
        if shard.open.is_empty() {
            let mail = ToKeeper::Dirtied { volume: VolumeId(s as u32) };
            shard.to_keeper.push_back(FromShard::Mail(mail));
        }
        shard.open.insert(at, block);
    }

    fn shard_of(&mut self, s: usize, at: usize) -> &mut ModelShard {
        let object = at / OBJECT_BLOCKS as usize;
        &mut self.servers[s].shards[object % usize::from(SHARDS)]
    }

    fn serves(&self, s: usize) -> bool {
        let server = &self.servers[s];
        let term = server.attached.as_ref().map(|attached| attached.open.term());
        !server.over && server.shards.iter().all(|s| Some(Epoch(s.open_epoch).term()) == term)
    }

    /// Takes one mail of one shard, or lets it hand over a batch.
    fn step_shard(&mut self, s: usize, i: usize) -> bool {
        let server = &mut self.servers[s];
        let shard = &mut server.shards[i];
        let Some(mail) = shard.mail.pop_front() else { return self.push_batch(s, i) };
        let volume = VolumeId(s as u32);
        match mail {
            ToShard::Attach { open, committed, .. } => {
                if Epoch(shard.closed_epoch) <= committed {
                    shard.closed.clear();
                }
                let newer = core::mem::take(&mut shard.open);
                shard.open = core::mem::take(&mut shard.closed);
                shard.open.extend(newer);
                shard.open_epoch = open.0;
                shard.credits = CREDITS;
                if !shard.open.is_empty() {
                    shard.to_keeper.push_back(FromShard::Mail(ToKeeper::Dirtied { volume }));
                }
            }
            ToShard::Settings { mode, buffering, pinned, .. } => {
                shard.settings = Some((mode, buffering, pinned));
            }
            ToShard::Freeze { next, .. } => {
                assert!(shard.closed.is_empty(), "one push at a time");
                let epoch = Epoch(shard.open_epoch);
                assert_eq!(next, epoch.next());
                shard.closed = core::mem::take(&mut shard.open);
                shard.closed_epoch = epoch.0;
                shard.open_epoch = next.0;
                let blocks = shard.closed.len() as u64;
                let mail = ToKeeper::Frozen { volume, epoch, blocks };
                shard.to_keeper.push_back(FromShard::Mail(mail));
                for (&at, &block) in &shard.closed {
                    server.cut[at] = block;
                }
                server.frozen += 1;
                if server.frozen == SHARDS {
                    server.frozen = 0;
                    self.images.insert(epoch, server.cut.clone());
                }
            }
            ToShard::Released { .. } => {
                let blocks = shard.closed.iter().map(|(&at, &block)| (at, block)).collect();
                shard.to_push = Some(blocks);
            }
            ToShard::BatchDone { .. } => shard.credits += 1,
            ToShard::Committed { epoch, .. } => {
                assert_eq!(epoch.0, shard.closed_epoch);
                assert_eq!(shard.credits, CREDITS, "all credit is back at the commit");
                shard.closed.clear();
            }
            ToShard::Fenced { .. } => {
                shard.fenced = true;
                shard.to_push = None;
            }
            ToShard::Size { blocks, .. } => {
                let mut dirty = shard.open.iter().chain(&shard.closed);
                assert!(dirty.all(|(at, block)| (*at as u64) < blocks || *block == 0));
            }
            ToShard::Detach { .. } | ToShard::Forget { .. } => panic!("the driver says so"),
        }
        true
    }

    fn push_batch(&mut self, s: usize, i: usize) -> bool {
        let limit = 1 + self.rng.below(BATCH_BLOCKS_MAX);
        let server = &mut self.servers[s];
        let shard = &mut server.shards[i];
        let Some(to_push) = &mut shard.to_push else { return false };
        let (volume, epoch) = (VolumeId(s as u32), Epoch(shard.closed_epoch));
        if to_push.is_empty() {
            shard.to_push = None;
            shard.to_keeper.push_back(FromShard::Mail(ToKeeper::Pushed { volume, epoch }));
            return true;
        }
        if shard.credits == 0 {
            return false;
        }
        shard.credits -= 1;
        let (mut runs, mut blocks): (Vec<PushRun>, Vec<Block>) = (Vec::new(), Vec::new());
        while let Some(&(at, block)) = to_push.front()
            && blocks.len() < limit
            && runs.len() < BATCH_BLOCKS_MAX
        {
            to_push.pop_front();
            let (object, first) = (at as u32 / OBJECT_BLOCKS, (at % OBJECT_BLOCKS as usize) as u16);
            let zero = block == 0;
            if !zero {
                blocks.push(block);
            }
            match runs.last_mut() {
                Some(run)
                    if run.object == object
                        && run.zero == zero
                        && run.first + run.count == first =>
                {
                    run.count += 1;
                }
                _ => runs.push(PushRun { object, first, count: 1, zero }),
            }
        }
        let handle = server.next_batch;
        server.next_batch += 1;
        server.batches.insert(handle, blocks.clone());
        server.shards[i].to_keeper.push_back(FromShard::Batch(epoch, handle, runs, blocks));
        true
    }

    fn step_mail(&mut self, s: usize, i: usize) -> bool {
        let Some(mail) = self.servers[s].shards[i].to_keeper.pop_front() else { return false };
        let shard = ShardId(i as u16);
        match mail {
            FromShard::Mail(mail) => self.feed(s, Input::Shard(shard, mail)),
            FromShard::Batch(epoch, handle, runs, blocks) => {
                let crcs: Vec<_> = blocks.iter().map(|&block| block_crc(block)).collect();
                let batch = BatchHandle(handle);
                self.feed(s, Input::Batch { shard, epoch, batch, runs: &runs, crcs: &crcs });
            }
        }
        true
    }

    fn fetch(&mut self, s: usize) {
        let object = self.rng.below(BLOCKS / OBJECT_BLOCKS as usize) as u32;
        let object = if self.rng.percent(50) { object % 8 } else { object };
        let first = self.rng.below(OBJECT_BLOCKS as usize) as u16;
        let count = 1 + self.rng.below(OBJECT_BLOCKS as usize - usize::from(first)) as u16;
        let server = &mut self.servers[s];
        server.next_fetch += 1;
        let op = OpId { slot: server.next_fetch, generation: 0 };
        let mut gaps = BlockSet::EMPTY;
        if self.rng.percent(50) {
            (0..count.into()).filter(|_| self.rng.percent(30)).for_each(|at| gaps.insert(at));
        }
        let server = &mut self.servers[s];
        server.fetches.insert(op.slot, (object, first, count, gaps));
        let shard = ShardId(0);
        let input = if self.rng.percent(20) {
            Input::Query { shard, op, object, first, count }
        } else {
            Input::Fetch { shard, op, object, first, count, gaps }
        };
        self.feed(s, input);
    }

    // The store.

    fn step_store(&mut self) -> bool {
        let free: Vec<usize> = (0..self.pending.len())
            .filter(|&i| !self.stalled.contains(&self.pending[i].server))
            .collect();
        if free.is_empty() {
            return false;
        }
        let i = free[self.rng.below(free.len())];
        let fault = self.rng.percent(self.faults);
        if self.pending[i].answer.is_none() {
            if fault && !self.pending[i].zombie {
                // Either it never takes place, or later than the keeper believes.
                let (s, life, op) =
                    (self.pending[i].server, self.pending[i].life, self.pending[i].op);
                if self.rng.percent(50) {
                    self.pending.swap_remove(i);
                } else {
                    self.pending[i].zombie = true;
                }
                self.answer(s, life, op, Answer::Failed);
                return true;
            }
            let answer = self.take_place(i);
            self.check();
            if self.pending[i].zombie {
                self.pending.swap_remove(i);
            } else {
                self.pending[i].answer = Some(answer);
            }
            return true;
        }
        let Pending { server, life, op, answer, .. } = self.pending.swap_remove(i);
        let answer = if fault { Answer::Failed } else { answer.unwrap() };
        self.answer(server, life, op, answer);
        true
    }

    fn take_place(&mut self, i: usize) -> Answer {
        match self.pending[i].effect.clone() {
            Effect::Get(key, first) => match self.objects.get(&key) {
                Some(object) => {
                    let len = first.map_or(object.meta.len(), |first| first as usize);
                    Answer::Got(object.meta[..len].to_vec())
                }
                None => Answer::NotFound,
            },
            Effect::Put(key, object) => {
                let before = self.objects.insert(key, object.clone());
                assert!(before.is_none_or(|before| before == object), "a name has one content");
                Answer::Done
            }
            Effect::Create(key, object) => {
                if self.objects.contains_key(&key) {
                    return Answer::AlreadyExists;
                }
                self.objects.insert(key, object);
                Answer::Done
            }
            Effect::Gather(blocks, reads) => {
                if reads.iter().any(|read| !self.objects.contains_key(&read.key)) {
                    return Answer::NotFound;
                }
                let mut found = vec![0; blocks.into()];
                self.read(&reads, &mut found);
                assert!(!found.contains(&0), "every block is in a read");
                Answer::Gathered(found)
            }
            Effect::List(prefix) => {
                let found = self.objects.iter().filter(|(key, _)| key.starts_with(&prefix));
                Answer::Listed(found.map(|(key, object)| (key.clone(), object.bytes())).collect())
            }
            Effect::Delete(key) => {
                self.objects.remove(&key).map_or(Answer::NotFound, |_| Answer::Done)
            }
        }
    }

    fn answer(&mut self, s: usize, life: u32, op: StoreOp, answer: Answer) {
        if self.servers[s].life != life {
            return;
        }
        let keys: Vec<Listed<'_>>;
        let result = match &answer {
            Answer::Got(bytes) => StoreResult::Got(bytes),
            Answer::Gathered(blocks) => {
                let server = &mut self.servers[s];
                let handle = server.next_batch;
                server.next_batch += 1;
                server.batches.insert(handle, blocks.clone());
                StoreResult::Gathered(BatchHandle(handle))
            }
            Answer::Listed(found) => {
                keys = found.iter().map(|(key, bytes)| Listed { key, bytes: *bytes }).collect();
                StoreResult::Listed(&keys)
            }
            Answer::Done => StoreResult::Done,
            Answer::AlreadyExists => StoreResult::AlreadyExists,
            Answer::NotFound => StoreResult::NotFound,
            Answer::Failed => StoreResult::Failed { transient: true, note: 1 },
        };
        self.feed(s, Input::StoreDone { op, result });
    }

    /// The image is the cut that the newest head names, and heads only go forward.
    fn check(&mut self) {
        let (head, image) = read_image(&self.objects);
        assert!(head.number >= self.last_number, "heads go forward");
        self.commits += head.number - self.last_number;
        self.last_number = head.number;
        let expected = self.images.get(&head.epoch).expect("only complete cuts are committed");
        assert!(image == *expected, "the image of head {} is not its cut", head.number);
        for snapshot in &head.snapshots {
            let (kept, image) = read_head(&self.objects, snapshot.number);
            assert_eq!((kept.epoch, kept.blocks), (snapshot.epoch, snapshot.blocks));
            assert!(image == self.images[&snapshot.epoch], "snapshot {}", snapshot.name);
        }
        // Whoever was attached last owns the newest head.
        let owner = self
            .servers
            .iter()
            .filter(|server| !server.released)
            .filter_map(|server| Some((server.attached.as_ref()?, server.nonces.last()?)))
            .max_by_key(|(attached, _)| attached.open.term());
        if let Some((attached, nonce)) = owner {
            let claimed = head.term > attached.open.term();
            assert!(claimed || head.nonce == *nonce, "an attached volume stays the owner's");
        }
    }

    // The scheduler.

    fn step(&mut self) {
        let s = self.rng.below(self.servers.len());
        let i = self.rng.below(SHARDS.into());
        let moved = match self.rng.below(4) {
            0 => self.step_shard(s, i),
            1 => self.step_mail(s, i),
            _ => self.step_store(),
        };
        if !moved {
            self.now = self.now + Duration::from_millis(self.rng.below(20) as u64);
            if self.servers[s].keeper.poll_timeout().is_some_and(|at| at <= self.now) {
                self.feed(s, Input::Tick);
            }
        }
    }

    fn run_until(&mut self, done: impl Fn(&Self) -> bool) {
        for _ in 0..2_000_000 {
            if done(self) {
                return;
            }
            self.step();
        }
        let status: Vec<_> = self.servers.iter().map(|server| server.keeper.status()).collect();
        panic!("it never happens: {status:?} {:?}", self.pending);
    }

    fn attach(&mut self, s: usize, takeover: bool) {
        self.start(s, takeover);
        self.run_until(|world| world.serves(s) || world.servers[s].over);
    }

    fn push(&mut self, s: usize, ticket: u64) {
        self.feed(s, Input::PushNow { ticket });
        self.run_until(|world| world.servers[s].done.iter().any(|done| done.0 == ticket));
    }

    fn newest(&self) -> Head {
        read_image(&self.objects).0
    }

    /// All that the shards hold, over the last cut.
    fn content(&self, s: usize) -> Vec<Block> {
        let mut content = self.images[&self.servers[s].committed].clone();
        for shard in &self.servers[s].shards {
            for (&at, &block) in shard.closed.iter().chain(&shard.open) {
                content[at] = block;
            }
        }
        content
    }

    fn write_some(&mut self, s: usize) {
        let spots = [1, 10, 300][self.rng.below(3)];
        let start = self.rng.below(BLOCKS);
        let zero = self.rng.percent(25);
        let span = if self.rng.percent(50) { spots * 3 } else { BLOCKS };
        for i in 0..spots {
            let at = if span == BLOCKS { self.rng.below(BLOCKS) } else { (start + i) % BLOCKS };
            let block = if zero { 0 } else { self.rng.next() | 1 };
            self.write(s, at, block);
        }
    }
}

/// Decodes a volume as any reader would.
fn read_image(objects: &BTreeMap<String, Object>) -> (Head, Vec<Block>) {
    let head = newest_head(objects);
    read_head(objects, head.number)
}

fn newest_head(objects: &BTreeMap<String, Object>) -> Head {
    let number = objects
        .keys()
        .filter_map(|key| match names::parse_key(key)? {
            (VOLUME, ObjectName::Head { number }) => Some(number),
            _ => None,
        })
        .max()
        .expect("there is always a head");
    let bytes = &objects[&names::head_key(VOLUME, number)].meta;
    Head::decode(bytes, VOLUME, number, crc32c).unwrap()
}

/// A head and its image.
fn read_head(objects: &BTreeMap<String, Object>, number: u32) -> (Head, Vec<Block>) {
    let bytes = &objects[&names::head_key(VOLUME, number)].meta;
    let head = Head::decode(bytes, VOLUME, number, crc32c).unwrap();
    // Behind the end of a volume that was larger once there is nothing.
    let mut image = vec![0; BLOCKS];
    let mut headers = BTreeMap::new();
    let volumes = head.volumes();
    for (&page, &at) in &head.pages {
        let key = names::map_key(head.volume_of(at.source), page, at.epoch);
        let object = objects.get(&key).expect("no page is missing");
        let volumes = (&volumes[..], at.source);
        let map = MapPage::decode(&object.meta, volumes, page, at.epoch, crc32c).unwrap();
        assert!(!map.is_empty());
        for piece in map.lookup(0, MAP_PAGE_BLOCKS as u16) {
            let Some(data) = piece.data else { continue };
            let volume = head.volume_of(data.pack.source);
            let key = names::pack_key(volume, data.pack.epoch, data.pack.n);
            let object = &objects[&key];
            let header = headers
                .entry(key)
                .or_insert_with(|| pack::Header::decode(&object.meta, crc32c).unwrap());
            assert_eq!(header.bytes(), data.pack.header_bytes);
            assert_eq!(object.meta.len(), usize::from(header.bytes()));
            for (i, &crc) in data.crcs.iter().enumerate() {
                let at = usize::from(data.offset) + i;
                let block = object.blocks[at];
                assert_eq!((block_crc(block), header.crcs[at]), (crc, crc));
                let first = page as usize * MAP_PAGE_BLOCKS + usize::from(piece.first);
                assert_eq!(pack_block(header, at), first + i, "a pack says what its blocks are");
                image[first + i] = block;
            }
        }
    }
    for tail in &head.tail {
        let volume = head.volume_of(tail.source);
        let object = &objects[&names::pack_key(volume, tail.epoch, tail.n)];
        let header = pack::Header::decode(&object.meta, crc32c).unwrap();
        assert_eq!((header.epoch, header.n), (tail.epoch, tail.n));
        assert_eq!(header.bytes(), tail.header_bytes);
        let mut data = object.blocks.iter();
        for run in &header.runs {
            for i in 0..run.count {
                let at = (run.object * OBJECT_BLOCKS) as usize + usize::from(run.first + i);
                image[at] = if run.zero { 0 } else { *data.next().unwrap() };
            }
        }
        assert!(data.next().is_none());
    }
    let end = head.blocks as usize;
    assert!(image[end.min(BLOCKS)..].iter().all(|block| *block == 0), "nothing behind the end");
    (head, image)
}

fn pack_block(header: &pack::Header, mut at: usize) -> usize {
    for run in header.runs.iter().filter(|run| !run.zero) {
        if at < usize::from(run.count) {
            return (run.object * OBJECT_BLOCKS) as usize + usize::from(run.first) + at;
        }
        at -= usize::from(run.count);
    }
    panic!("the pack has the block")
}

#[test]
fn random_work_with_faults_and_crashes() {
    let mut fetched = 0;
    for seed in 1..=SEEDS {
        std_print(seed);
        let mut world = World::new(seed);
        world.faults = [0, 5, 25][world.rng.below(3)];
        let s = world.add();
        world.attach(s, false);
        let mut tickets = 0;
        let mut snapshots: Vec<String> = Vec::new();
        for _ in 0..3000 {
            match world.rng.below(1000) {
                0..30 if world.serves(s) => world.write_some(s),
                30..33 if world.serves(s) => {
                    tickets += 1;
                    world.feed(s, Input::PushNow { ticket: tickets });
                }
                33..36 if world.serves(s) => {
                    let mail = ToKeeper::Pressure { volume: VolumeId(0) };
                    world.feed(s, Input::Shard(ShardId(1), mail));
                }
                36..60 if world.serves(s) => world.fetch(s),
                62..64 if world.serves(s) => {
                    tickets += 1;
                    let oldest = snapshots.first().cloned();
                    let edit = match oldest.filter(|_| snapshots.len() > 2) {
                        Some(name) => {
                            snapshots.remove(0);
                            let (edit, ticket) = (mark(&name), tickets);
                            world.feed(s, Input::Edit { edit: &edit, ticket });
                            tickets += 1;
                            Edit::DropSnapshot(name)
                        }
                        None => {
                            let name = alloc::format!("s{tickets}");
                            snapshots.push(name.clone());
                            Edit::Snapshot(name)
                        }
                    };
                    world.feed(s, Input::Edit { edit: &edit, ticket: tickets });
                }
                60..62 => {
                    let content = world.content(s);
                    world.attach(s, false);
                    let attached = world.servers[s].attached.as_ref();
                    assert!(attached.expect("our own volume").ours);
                    assert!(content == world.content(s), "a crash loses nothing the cache holds");
                }
                _ => world.step(),
            }
        }
        let content = world.content(s);
        world.feed(s, Input::Detach);
        world.run_until(|world| world.servers[s].over);
        assert!(world.servers[s].released);
        let (head, image) = read_image(&world.objects);
        assert!(head.released && image == content, "everything is in the store");
        assert!(world.servers[s].batches.is_empty() && world.servers[s].fetches.is_empty());
        fetched += world.servers[s].fetched;
    }
    assert!(fetched > 100, "fetches are answered: {fetched}");
}

fn mark(name: &str) -> Edit {
    Edit::MarkSnapshot { name: name.into(), deleting: true }
}

/// A snapshot is the cut that its edit made, whatever is written, folded and dropped after it;
/// dropped, nothing is left of its head.
#[test]
fn a_snapshot_stays_what_it_was() {
    let mut world = World::new(21);
    let s = world.add();
    world.attach(s, false);
    let edit = |world: &mut World, edit: Edit, ticket| {
        world.feed(s, Input::Edit { edit: &edit, ticket });
        world.run_until(|world| world.servers[s].done.contains(&(ticket, true)));
    };
    for at in 0..100 {
        world.write(s, at, 7);
    }
    edit(&mut world, Edit::Snapshot("a".into()), 1);
    let snapshot = world.newest().snapshots[0].clone();
    for ticket in 2..12 {
        for at in 0..100 {
            world.write(s, at * 3, ticket);
        }
        world.push(s, ticket);
    }
    world.run_until(|world| world.pending.is_empty());
    let (kept, image) = read_head(&world.objects, snapshot.number);
    assert_eq!(kept.snapshots.last(), Some(&snapshot), "a snapshot knows itself");
    assert!(image[..100].iter().all(|&block| block == 7) && image[100] == 0);
    assert!(world.newest().pages.values().all(|at| at.epoch > snapshot.epoch), "it was folded");
    edit(&mut world, mark("a"), 20);
    assert!(world.newest().snapshots[0].deleting);
    edit(&mut world, Edit::DropSnapshot("a".into()), 21);
    world.run_until(|world| world.pending.is_empty());
    assert!(!world.objects.contains_key(&names::head_key(VOLUME, snapshot.number)));
}

/// A view of a snapshot answers from its image, whatever became of the volume, and writes nothing.
#[test]
fn a_view_serves_what_the_snapshot_was() {
    let mut world = World::new(22);
    let s = world.add();
    world.attach(s, false);
    for ticket in 1..30 {
        for at in 0..60 {
            let block = if ticket % 7 == 0 { 0 } else { ticket };
            world.write(s, (at * 7 + ticket as usize * 31) % BLOCKS, block);
        }
        let edit = Edit::Snapshot(alloc::format!("s{ticket}"));
        world.feed(s, Input::Edit { edit: &edit, ticket });
        world.run_until(|world| world.servers[s].done.contains(&(ticket, true)));
    }
    world.run_until(|world| world.pending.is_empty());
    assert!(!world.newest().pages.is_empty(), "some of it was folded");
    for snapshot in world.newest().snapshots {
        let (head, image) = read_head(&world.objects, snapshot.number);
        let mut keeper = Keeper::new(world.config(1));
        let view = Input::View { volume: VolumeId(9), number: snapshot.number };
        let attached = drive_view(&mut keeper, &world.objects, view);
        let blocks = head.blocks;
        let all = attached.iter().filter(|output| match output {
            Output::Attached(attached) => attached.blocks == blocks,
            Output::ToShard(_, ToShard::Attach { volume, open, committed, .. }) => {
                (*volume, *committed) == (VolumeId(9), head.epoch) && open > committed
            }
            other => panic!("{other:?}"),
        });
        assert_eq!(all.count(), 1 + usize::from(SHARDS));
        for object in 0..12 {
            let op = OpId { slot: object, generation: 1 };
            let (shard, first, count) = (ShardId(0), 3, 50);
            let gaps = BlockSet::EMPTY;
            let fetch = Input::Fetch { shard, op, object, first, count, gaps };
            let answer = drive_view(&mut keeper, &world.objects, fetch);
            let [Output::FetchPlan { reads, .. }] = &answer[..] else { panic!("{answer:?}") };
            let mut crcs = vec![block_crc(0); count.into()];
            for part in reads.iter().flat_map(|read| &read.parts) {
                let at = usize::from(part.first);
                crcs[at..at + part.crcs.len()].copy_from_slice(&part.crcs);
            }
            let base = (object * OBJECT_BLOCKS) as usize + usize::from(first);
            let expected: Vec<_> = image[base..base + usize::from(count)].iter().collect();
            let expected: Vec<u32> = expected.into_iter().map(|block| block_crc(*block)).collect();
            assert_eq!(crcs, expected, "snapshot {}, object {object}", snapshot.name);
        }
        assert_eq!(drive_view(&mut keeper, &world.objects, Input::Detach), [Output::Released]);
    }
    // One that is not there, or not whole, is refused.
    let mut keeper = Keeper::new(world.config(1));
    let view = Input::View { volume: VolumeId(9), number: 4_000 };
    let refused = drive_view(&mut keeper, &world.objects, view);
    assert!(matches!(refused[..], [Output::Refused(Refusal::Missing { .. })]), "{refused:?}");
    let last = world.newest().snapshots.last().expect("made above").clone();
    let (head, _) = read_head(&world.objects, last.number);
    let gone = head.tail.last().expect("just pushed");
    world.objects.remove(&names::pack_key(VOLUME, gone.epoch, gone.n));
    let mut keeper = Keeper::new(world.config(1));
    let view = Input::View { volume: VolumeId(9), number: last.number };
    let refused = drive_view(&mut keeper, &world.objects, view);
    assert!(matches!(refused[..], [Output::Refused(Refusal::Missing { .. })]), "{refused:?}");
}

/// Feeds a view's keeper, and answers what it reads from these objects. Returns all else.
fn drive_view(
    keeper: &mut Keeper,
    objects: &BTreeMap<String, Object>,
    input: Input<'_>,
) -> Vec<Output> {
    let mut now = Instant(1);
    let mut outputs = Vec::new();
    keeper.handle(now, input);
    loop {
        let Some(output) = keeper.poll_output() else {
            let Some(next) = keeper.poll_timeout() else { return outputs };
            now = next;
            keeper.handle(now, Input::Tick);
            continue;
        };
        let Output::Get { op, key, first } = output else {
            outputs.push(output);
            continue;
        };
        let result = match objects.get(&key) {
            Some(object) => {
                let len = first.map_or(object.meta.len(), |first| first as usize);
                StoreResult::Got(&object.meta[..len.min(object.meta.len())])
            }
            None => StoreResult::NotFound,
        };
        keeper.handle(now, Input::StoreDone { op, result });
    }
}

#[test]
fn an_edit_that_cannot_be_is_refused() {
    let mut world = World::new(22);
    let s = world.add();
    world.attach(s, false);
    let number = world.newest().number;
    let long = Settings { description: "x".repeat(2000), ..Settings::default() };
    for (edit, why) in [
        (Edit::Snapshot("a/b".into()), EditError::Name),
        (Edit::Name(String::new()), EditError::Name),
        (Edit::DropSnapshot("a".into()), EditError::NoSnapshot),
        (
            Edit::Settings(long),
            EditError::Settings("a description has at most 1024 bytes, on one line"),
        ),
    ] {
        world.feed(s, Input::Edit { edit: &edit, ticket: 5 });
        assert_eq!(world.servers[s].refusals.pop(), Some((5, why)));
    }
    assert_eq!(world.newest().number, number);
    // Those under way count.
    let edit = Edit::Snapshot("a".into());
    world.feed(s, Input::Edit { edit: &edit, ticket: 6 });
    world.feed(s, Input::Edit { edit: &edit, ticket: 7 });
    assert_eq!(world.servers[s].refusals.pop(), Some((7, EditError::SnapshotExists)));
    // A mark that was taken away may have made room for a clone.
    let drop = Edit::DropSnapshot("a".into());
    world.feed(s, Input::Edit { edit: &drop, ticket: 8 });
    assert_eq!(world.servers[s].refusals.pop(), Some((8, EditError::NotMarked)));
}

/// Random overwrites, with snapshots that come and go: when all is quiet, the store holds at most
/// 1.5 times what the image needs, beside the tail.
#[test]
fn garbage_is_collected() {
    for seed in [30, 31] {
        std_print(seed);
        let mut world = World::new(seed);
        world.faults = [0, 10][seed as usize % 2];
        let s = world.add();
        world.attach(s, false);
        let spots = 3000;
        for ticket in 1..60 {
            for _ in 0..400 {
                let at = world.rng.below(spots) * 11;
                let block = world.rng.next() | 1;
                world.write(s, at, block);
            }
            let edit = match ticket % 20 {
                7 => Some(Edit::Snapshot(alloc::format!("s{ticket}"))),
                14 => {
                    let name = alloc::format!("s{}", ticket - 7);
                    Some(Edit::MarkSnapshot { name, deleting: true })
                }
                15 => Some(Edit::DropSnapshot(alloc::format!("s{}", ticket - 8))),
                _ => None,
            };
            match edit {
                Some(edit) => world.feed(s, Input::Edit { edit: &edit, ticket }),
                None => world.feed(s, Input::PushNow { ticket }),
            }
            world.run_until(|world| world.servers[s].done.iter().any(|done| done.0 == ticket));
        }
        let packs = |world: &World| -> u64 {
            let packs = world.objects.iter().filter(|(key, _)| key.contains("/pack/"));
            packs.map(|(_, object)| object.bytes()).sum()
        };
        let live = read_image(&world.objects).1.iter().filter(|&&block| block != 0).count();
        let in_tail = |world: &World| -> u64 {
            let tail = newest_head(&world.objects).tail;
            let keys = tail.iter().map(|pack| names::pack_key(VOLUME, pack.epoch, pack.n));
            keys.map(|key| world.objects[&key].bytes()).sum()
        };
        let live = live as u64 * 4096;
        world.run_until(|world| {
            let status = world.servers[s].keeper.status();
            if !world.pending.is_empty() || status.retrying > 0 {
                return false;
            }
            status.store.is_some_and(|store| {
                (store.packs - in_tail(world)) * 2 <= live * 3 && store.held == 0
            })
        });
        // With faults a put may come again after its pack was deleted: an orphan.
        let counted = world.servers[s].keeper.status().store.unwrap().packs;
        assert!(packs(&world) >= counted && (world.faults > 0 || packs(&world) == counted));
    }
}

/// What an owner left behind that never was committed goes, whatever its kind.
#[test]
fn orphans_of_a_dead_owner_are_deleted() {
    let mut world = World::new(40);
    let s = world.add();
    world.attach(s, false);
    for at in 0..600 {
        world.write(s, at * 11, 1 + at as u64);
    }
    world.push(s, 1);
    let epoch = world.newest().epoch;
    let object = Object { meta: vec![1, 2], blocks: vec![5; 9] };
    let orphans = [
        names::pack_key(VOLUME, epoch, 77),
        names::pack_key(VOLUME, epoch, pack::FIRST_COPY),
        names::map_key(VOLUME, 2, epoch),
    ];
    for key in &orphans {
        world.objects.insert(key.clone(), object.clone());
    }
    world.attach(s, false);
    for ticket in 2..6 {
        for at in 0..300 {
            world.write(s, at * 7, ticket);
        }
        world.push(s, ticket);
    }
    world.run_until(|world| orphans.iter().all(|key| !world.objects.contains_key(key)));
}

/// The same objects under another volume's name, a clone's first head over them, and its image.
fn clone_of(
    objects: &BTreeMap<String, Object>,
    parent: Uuid,
) -> (Head, BTreeMap<String, Object>, Vec<Block>) {
    let (kept, image) = read_image(objects);
    let mut found = BTreeMap::new();
    for (key, object) in objects {
        let mut object = object.clone();
        match names::parse_key(key).unwrap().1 {
            ObjectName::Head { .. } | ObjectName::Child { .. } => continue,
            ObjectName::Map { page, epoch } => {
                let map =
                    MapPage::decode(&object.meta, (&[VOLUME], 0), page, epoch, crc32c).unwrap();
                object.meta = map.encode(&[parent], page, epoch, crc32c);
            }
            ObjectName::Pack { .. } => {
                let header = pack::Header::decode(&object.meta, crc32c).unwrap();
                object.meta = pack::Header { volume: parent, ..header }.encode(crc32c);
            }
        }
        found.insert(key.replace(&VOLUME.to_string(), &parent.to_string()), object);
    }
    let pages = kept.pages.iter().map(|(&page, at)| (page, PageRef { source: 1, ..*at }));
    let clone = Head {
        sources: vec![Source { volume: parent, number: kept.number }],
        pages: pages.collect(),
        tail: kept.tail.iter().map(|pack| TailPack { source: 1, ..*pack }).collect(),
        epoch: Epoch::ZERO,
        ..Head::first(VOLUME, "clone", BLOCKS as u64, OBJECT_SHIFT, 5)
    };
    (clone, found, image)
}

/// A clone reads its parent's packs and pages; flattened, it needs nothing of them any more.
#[test]
fn a_clone_is_flattened() {
    const PARENT: Uuid = Uuid([0x22; 16]);
    for seed in [50, 51, 52, 53] {
        std_print(seed);
        let mut world = World::new(seed);
        let parent = world.add();
        world.attach(parent, false);
        for ticket in 1..8 {
            for _ in 0..300 {
                let at = world.rng.below(BLOCKS);
                let block = world.rng.next() | 1;
                world.write(parent, at, block);
            }
            world.push(parent, ticket);
        }
        world.feed(parent, Input::Detach);
        world.run_until(|world| world.servers[parent].released && world.pending.is_empty());
        let (clone, mut objects, image) = clone_of(&world.objects, PARENT);
        let meta = clone.encode(crc32c);
        objects.insert(names::head_key(VOLUME, 1), Object { meta, blocks: Vec::new() });
        world.objects = objects;
        world.last_number = 1;
        world.images = [(Epoch::ZERO, image)].into();
        let s = world.add();
        world.attach(s, false);
        for ticket in 1..5 {
            for _ in 0..100 {
                let at = world.rng.below(BLOCKS);
                world.write(s, at, ticket);
            }
            for _ in 0..20 {
                world.fetch(s);
            }
            world.push(s, ticket);
        }
        world.feed(s, Input::Flatten { ticket: 9 });
        world.run_until(|world| world.servers[s].done.contains(&(9, true)));
        assert_eq!(world.newest().sources, []);
        world.run_until(|world| world.pending.is_empty());
        let parent = PARENT.to_string();
        world.objects.retain(|key, _| !key.contains(&parent));
        world.check();
    }
}

/// What cannot be read of the newest packs is not guessed.
#[test]
fn a_damaged_tail_is_refused() {
    let mut world = World::new(23);
    let s = world.add();
    world.attach(s, false);
    world.write(s, 5, 1);
    world.push(s, 1);
    let pack = world.newest().tail[0];
    let key = names::pack_key(VOLUME, pack.epoch, pack.n);
    let good = world.objects[&key].clone();
    world.objects.get_mut(&key).unwrap().meta[70] ^= 1;
    world.last_number = 0;
    world.start(s, false);
    let blind = |world: &mut World| {
        while !world.servers[s].over {
            world.now = world.now + Duration::from_secs(1);
            world.feed(s, Input::Tick);
            for i in (0..world.pending.len()).rev() {
                let answer = world.take_place(i);
                let Pending { server, life, op, .. } = world.pending.swap_remove(i);
                world.answer(server, life, op, answer);
            }
        }
        world.servers[s].refused.take().unwrap()
    };
    let refusal = blind(&mut world);
    assert!(matches!(&refusal, Refusal::Corrupt { key: found, .. } if *found == key), "{refusal}");
    world.objects.remove(&key);
    world.start(s, false);
    assert_eq!(blind(&mut world), Refusal::Missing { key: key.clone() });
    world.objects.insert(key, good);
    world.attach(s, false);
    assert_eq!(world.content(s)[5], 1);
}

#[test]
fn a_second_owner_with_takeover_fences_the_first() {
    for seed in 1..=SEEDS {
        std_print(seed);
        let mut world = World::new(seed);
        world.faults = [0, 20][world.rng.below(2)];
        let (a, b) = (world.add(), world.add());
        world.attach(a, false);
        for _ in 0..world.rng.below(600) {
            if world.rng.percent(5) {
                world.write_some(a);
            }
            world.step();
        }
        if world.rng.percent(50) {
            // In the middle of a push.
            world.feed(a, Input::PushNow { ticket: 1 });
        }
        world.start(b, true);
        for _ in 0..4000 {
            let s = world.rng.below(2);
            if world.rng.percent(2) && world.serves(s) {
                world.write_some(s);
            }
            world.step();
        }
        world.run_until(|world| world.serves(b));
        for s in [a, b] {
            world.write(s, 5, 77);
            world.feed(s, Input::PushNow { ticket: 2 });
        }
        let ended = |world: &World, s: usize| world.servers[s].done.iter().any(|d| d.0 == 2);
        world.run_until(|world| ended(world, a) && ended(world, b));
        assert!(world.servers[a].fenced && !world.servers[b].fenced);
        assert!(world.servers[a].done.contains(&(2, false)));
        assert!(world.servers[a].batches.is_empty());
        let content = world.content(b);
        world.feed(b, Input::Detach);
        world.run_until(|world| world.servers[b].released && world.pending.is_empty());
        let (head, image) = read_image(&world.objects);
        assert!(image == content && head.cache == Uuid([2; 16]));
    }
}

#[test]
fn crashes_at_every_step_leave_the_old_image_or_the_new() {
    for crash_after in 0..200 {
        let mut world = World::new(3);
        let s = world.add();
        world.attach(s, false);
        for at in 0..700 {
            world.write(s, at * 60, 1 + at as u64);
        }
        world.feed(s, Input::PushNow { ticket: 1 });
        for _ in 0..crash_after * 5 {
            world.step();
        }
        let content = world.content(s);
        // `check` has compared the image after every step; now another host goes on from it.
        let (_, image) = read_image(&world.objects);
        let pushed = world.commits > 1;
        assert!(image == if pushed { content } else { vec![0; BLOCKS] });
        world.stalled.push(s);
        let other = world.add();
        world.attach(other, true);
        assert!(!world.servers[other].attached.as_ref().unwrap().ours);
        assert!(world.content(other) == image);
    }
}

#[test]
fn a_claim_without_takeover_is_refused_and_says_what_to_do() {
    let mut world = World::new(1);
    let (a, b) = (world.add(), world.add());
    world.attach(a, false);
    let before = world.objects.clone();
    world.attach(b, false);
    let refusal = world.servers[b].refused.clone().unwrap();
    let text = refusal.to_string();
    assert!(text.contains("host.example") && text.contains("--takeover"), "{text}");
    assert!(matches!(refusal, Refusal::Owned(owner) if owner.since_unix_secs == 1000));
    assert!(before == world.objects && world.servers[b].remembered.is_empty());
    // A volume that was given up is anyone's.
    world.feed(a, Input::Detach);
    world.run_until(|world| world.servers[a].released);
    world.attach(b, false);
    assert!(!world.servers[b].attached.as_ref().unwrap().ours);
    assert_eq!(world.servers[b].remembered, [false]);
    // And its first owner keeps nothing of it when it comes back.
    world.feed(b, Input::Detach);
    world.run_until(|world| world.servers[b].released);
    world.attach(a, false);
    assert_eq!(world.servers[a].remembered, [false, false]);
}

#[test]
fn a_cache_with_dirty_blocks_is_refused_when_the_image_has_moved_on() {
    let mut world = World::new(2);
    let (a, b) = (world.add(), world.add());
    world.attach(a, false);
    world.write(a, 9, 99);
    world.stalled.push(a);
    world.attach(b, true);
    world.write(b, 9, 88);
    world.push(b, 1);
    world.feed(b, Input::Detach);
    world.run_until(|world| world.servers[b].released);
    world.stalled.clear();
    world.attach(a, false);
    let refusal = world.servers[a].refused.clone().unwrap();
    assert!(matches!(refusal, Refusal::Stale { dirty_blocks: 1, .. }), "{refusal}");
    assert!(refusal.to_string().contains("4096 dirty bytes"), "{refusal}");
    world.attach(a, true);
    let attached = world.servers[a].attached.as_ref().unwrap();
    assert!(!attached.ours);
    assert_eq!(world.content(a)[9], 88);
}

/// A claimer reads the newest head and stalls; the owner commits on and deletes what it
/// supersedes; then the claimer's create of a number that is free again succeeds. It must not
/// count.
#[test]
fn a_claim_delayed_past_its_number_does_not_count() {
    let mut world = World::new(4);
    let (a, b) = (world.add(), world.add());
    world.attach(a, false);
    world.write(a, 1, 1);
    world.push(a, 1);
    world.start(b, true);
    let creating =
        |pending: &Pending| pending.server == b && matches!(pending.effect, Effect::Create(..));
    world.run_until(|world| world.pending.iter().any(creating));
    world.stalled.push(b);
    let number = world.newest().number + 1;
    for ticket in 2..5 {
        world.write(a, 1, ticket);
        world.push(a, ticket);
    }
    let key = names::head_key(VOLUME, number);
    world.run_until(|world| !world.objects.contains_key(&key));
    world.stalled.clear();
    let owned = world.newest().number;
    world.run_until(|world| world.serves(b));
    assert!(world.objects.contains_key(&key), "the create itself succeeded");
    assert!(world.servers[b].attached.as_ref().unwrap().open.term() > owned);
    assert_eq!(world.content(b)[1], 4);
}

#[test]
fn a_store_that_was_set_back_is_refused() {
    let mut world = World::new(5);
    let s = world.add();
    world.attach(s, false);
    let old = world.objects.clone();
    world.attach(s, false);
    world.objects = old;
    world.last_number = 1;
    // The claim that the cache made first is in the store, its second one is not.
    let nonce = world.newest().nonce;
    world.servers[s].nonces.push(nonce);
    world.start(s, false);
    world.run_until(|world| world.servers[s].over);
    assert_eq!(world.servers[s].refused, Some(Refusal::StoreIsOlder));
}

#[test]
fn nothing_dirty_makes_no_head_and_age_starts_a_push() {
    let mut world = World::new(6);
    let s = world.add();
    world.attach(s, false);
    let before = world.objects.clone();
    let creates = world.servers[s].creates;
    world.push(s, 1);
    assert_eq!(world.servers[s].done, [(1, true)]);
    assert!(before == world.objects && world.servers[s].creates == creates);

    world.write(s, 3, 33);
    let since = world.now;
    world.run_until(|world| world.servers[s].keeper.status().dirty_since.is_some());
    let dirtied = world.servers[s].keeper.status().dirty_since.unwrap();
    assert_eq!(world.servers[s].keeper.poll_timeout(), Some(dirtied + Duration::from_secs(5)));
    world.run_until(|world| world.newest().epoch > Epoch::ZERO);
    assert!(world.now - since >= Duration::from_secs(5));
    world.run_until(|world| world.servers[s].keeper.phase() == Phase::Clean);
    let status = world.servers[s].keeper.status();
    assert_eq!((status.backlog_bytes, status.pushed_bytes, status.dirty_since), (0, 4096, None));
}

/// What it makes free goes meanwhile. A push that is nearly over takes the checkpoint along.
#[test]
fn a_checkpoint_does_not_wait_for_the_end_of_a_long_push() {
    let mut world = World::new(12);
    let s = world.add();
    world.attach(s, false);
    for ticket in 1..3 {
        (0..40).for_each(|at| world.write(s, at * 3, ticket));
        world.push(s, ticket);
    }
    (0..40).for_each(|at| world.write(s, at * 3, 9));
    (0..3000).for_each(|at| world.write(s, 200 + at, 9));
    let committed = world.servers[s].committed;
    world.feed(s, Input::PushNow { ticket: 3 });
    world.run_until(|world| {
        let (head, status) = (world.newest(), world.servers[s].keeper.status());
        status.phase == Phase::Pushing && head.epoch == committed && head.tail.is_empty()
    });
    assert!(!world.newest().pages.is_empty() && world.servers[s].done.len() == 2);
    world.run_until(|world| world.servers[s].done.len() == 3);
    assert_eq!(read_image(&world.objects).1, world.content(s));
}

#[test]
fn overwritten_and_zeroed_blocks_leave_pages_and_heads_behind_to_be_deleted() {
    let mut world = World::new(8);
    let s = world.add();
    world.attach(s, false);
    for ticket in 1..6 {
        world.write(s, 5, 40 + ticket);
        world.write(s, MAP_PAGE_BLOCKS + 5, 50 + ticket);
        world.push(s, ticket);
    }
    for at in [5, MAP_PAGE_BLOCKS + 5] {
        world.write(s, at, 0);
    }
    world.write(s, 6, 66);
    world.push(s, 6);
    world.run_until(|world| world.pending.is_empty());
    // Folded into the pages by now or soon.
    world.write(s, 7, 77);
    world.push(s, 7);
    world.run_until(|world| world.pending.is_empty());
    let kinds = |kind: &str| world.objects.keys().filter(|key| key.contains(kind)).count();
    // Heads: the first, the claim, the newest. Map pages: the second one is all zeroes.
    assert_eq!((kinds("/head/"), kinds("/map/")), (3, 1));
    assert_eq!(world.newest().pages.len(), 1);
}

/// The shard's word that it is dirty is still on its way when the volume is given up.
#[test]
fn what_is_dirty_unknown_to_the_keeper_is_pushed_before_the_release() {
    let mut world = World::new(10);
    let s = world.add();
    world.attach(s, false);
    world.write(s, 5, 1);
    world.feed(s, Input::Detach);
    world.run_until(|world| world.servers[s].released);
    let (head, image) = read_image(&world.objects);
    assert!(head.released);
    assert_eq!(image[5], 1);
}

#[test]
fn pressure_starts_a_push_at_once() {
    let mut world = World::new(11);
    let s = world.add();
    world.attach(s, false);
    world.write(s, 5, 1);
    while world.step_mail(s, 0) {}
    assert_eq!(world.servers[s].keeper.phase(), Phase::Dirty);
    let mail = ToKeeper::Pressure { volume: VolumeId(0) };
    world.feed(s, Input::Shard(ShardId(2), mail));
    assert_eq!(world.servers[s].keeper.phase(), Phase::Pushing);
    world.run_until(|world| world.newest().epoch > Epoch::ZERO);
}

#[test]
fn settings_are_committed_and_known_to_the_next_owner() {
    let mut world = World::new(12);
    let s = world.add();
    world.attach(s, false);
    let number = world.newest().number;
    let buffering = Buffering { reads: true, writes: false };
    let settings = Settings { mode: Mode::Ram, buffering, pinned: true, ..Settings::default() };
    let edit = Edit::Settings(settings.clone());
    for ticket in [1, 2] {
        world.feed(s, Input::Edit { edit: &edit, ticket });
        world.run_until(|world| world.servers[s].done.contains(&(ticket, true)));
        let head = world.newest();
        assert_eq!((&head.settings, head.number), (&settings, number + 1), "once is enough");
    }
    world.attach(s, false);
    assert_eq!(world.servers[s].attached.as_ref().unwrap().settings, settings);
    let told = Some((Mode::Ram, buffering, true));
    world.run_until(|world| world.servers[s].shards.iter().all(|shard| shard.settings == told));
}

/// With the store gone, a miss fails after some attempts, and the push goes on for ever.
#[test]
fn without_the_store_fetches_fail_and_pushes_wait() {
    let mut world = World::new(9);
    let s = world.add();
    world.attach(s, false);
    world.write(s, 5, 1);
    world.push(s, 1);
    world.attach(s, false);
    world.faults = 100;
    world.write(s, 5, 2);
    world.feed(s, Input::PushNow { ticket: 2 });
    let op = OpId { slot: 1, generation: 0 };
    let (shard, object, first, count, gaps) = (ShardId(0), 0, 0, 8, BlockSet::EMPTY);
    world.servers[s].fetches.insert(1, (object, first, count, gaps));
    world.feed(s, Input::Fetch { shard, op, object, first, count, gaps });
    world.run_until(|world| world.servers[s].fetches.is_empty());
    for _ in 0..100_000 {
        world.step();
    }
    let status = world.servers[s].keeper.status();
    assert_eq!((status.phase, world.servers[s].done.len()), (Phase::Pushing, 1));
    assert!(status.last_failure.is_some() && status.dirty_since.is_some());
    world.faults = 0;
    world.run_until(|world| world.servers[s].done.len() == 2);
    assert_eq!(world.content(s)[5], 2);
}

const SEEDS: u64 = 60;

/// The seed stands in the output of a test that fails.
fn std_print(seed: u64) {
    extern crate std;
    std::println!("seed {seed}");
}
