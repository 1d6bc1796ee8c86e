//! Cores that are stepped by hand on a simulated disk, with a script in the place of the control
//! thread and clients that speak raw NBD.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use heeler_core::event::{Buffering, Mode, PushRun, ToKeeper, ToShard};
use heeler_core::ids::{CoreId, Epoch, ShardId, VolumeId};
use heeler_core::lending::{Lending, Output, Place};
use heeler_core::shard::{Budget, DirtyRun, SalvageAt};
use heeler_core::time::{Duration, Instant};
use heeler_core::wire::superblock::Superblock;
use heeler_driver::mail::{CoreStatus, ExportInfo, FetchedPiece, FromControl, ToControl};
use heeler_driver::start::{CacheDevice, Plan};
use heeler_driver::wires::{ControlWires, wire};
use heeler_driver::{ConnId, CoreLoop, CoreParts};
use heeler_hw::Arena;
use heeler_hw::sim::disk::{SimDisk, SimQueue};
use heeler_hw::sim::rng::Rng;

pub(crate) const VOLUME: VolumeId = VolumeId(2);
pub(crate) const VOLUME_BYTES: u64 = 8 << 20;
pub(crate) const OBJECT_SHIFT: u8 = 18;
pub(crate) const SHARDS: u16 = 4;
pub(crate) const COMMITTED: Epoch = Epoch::first_of_term(1);
pub(crate) const OPEN: Epoch = COMMITTED.next();
/// What memory may become.
const MEMORY_MAX: u64 = 256 << 20;
/// Steps after which something that should come to rest is taken to hang.
const STEPS_MAX: usize = 200_000;

/// A batch of a push.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) shard: ShardId,
    pub(crate) runs: Vec<PushRun>,
    pub(crate) crcs: Vec<u32>,
    pub(crate) bytes: Vec<u8>,
}

/// What the script heard from the cores.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) keeper: Vec<(ShardId, ToKeeper)>,
    pub(crate) batches: Vec<Batch>,
    pub(crate) statuses: Vec<CoreStatus>,
    pub(crate) drained: Vec<CoreId>,
    pub(crate) fetches: usize,
    /// Orders to close a volume that were carried out.
    pub(crate) closed: Vec<u64>,
    /// Dirty blocks that were listed, with their shard, and what was read of them.
    pub(crate) dirty: Vec<(ShardId, DirtyRun)>,
    pub(crate) salvaged: Vec<Option<Vec<u8>>>,
}

pub(crate) struct Rig {
    pub(crate) rng: Rng,
    pub(crate) now: Instant,
    pub(crate) disk: SimDisk,
    pub(crate) cores: Vec<CoreLoop<'static, SimQueue>>,
    pub(crate) clients: Vec<Client>,
    pub(crate) heard: Heard,
    /// Blocks that the store holds: by object and block.
    pub(crate) store: BTreeMap<(u32, u16), Bytes>,
    /// The store does not answer reads.
    pub(crate) store_fails: bool,
    /// The store takes nothing: no push begins.
    pub(crate) store_away: bool,
    control: ControlWires,
    open: Epoch,
    /// A push cycle is under way; so many shards have not answered its present step.
    cycle: Option<u16>,
    /// Writes wait for one.
    wanted: bool,
    /// Fetches wait here for a random time.
    fetches: Vec<(usize, FromControl)>,
    /// Divides the memory.
    pub(crate) lending: Lending,
    arena: Arena,
    /// Mail that finds no room.
    mail: Vec<VecDeque<FromControl>>,
}

pub(crate) fn new_disk(seed: u64) -> SimDisk {
    let disk = SimDisk::new(Superblock::bytes_min(SHARDS) + (8 << 20), seed);
    CacheDevice::format(disk.clone(), [7; 16], SHARDS).unwrap();
    disk
}

impl Rig {
    /// An appliance on a formatted disk, with the volume attached and exported.
    pub(crate) fn new(disk: SimDisk, cores: u16, seed: u64) -> Self {
        let device = CacheDevice::open(disk.clone()).unwrap();
        let superblock = *device.superblock();
        let needed = Plan::new(&superblock, cores, 0, MEMORY_MAX, &[]).unwrap_err();
        let (plan, lending) = Plan::new(&superblock, cores, needed, MEMORY_MAX, &[]).unwrap();
        let arena = plan.arena().unwrap();
        let (wires, control) = wire(usize::from(cores), false).unwrap();
        let build = |wires: heeler_driver::wires::CoreWires| {
            let core = wires.core;
            let storage = Box::leak(Box::new(plan.storage_of(core)));
            CoreLoop::new(CoreParts {
                wires,
                shards: SHARDS,
                hosted: plan.start_shards(core, device.file(), storage).unwrap(),
                arena: arena.clone(),
                transit: plan.transit_of(core),
                connections: plan.connections(),
                batch_bytes: plan.batch_bytes(),
                queue: disk.queue(&arena, 16),
            })
        };
        let mut rig = Self {
            rng: Rng::new(seed),
            now: Instant(0),
            disk: disk.clone(),
            cores: wires.into_iter().map(build).collect(),
            clients: Vec::new(),
            heard: Heard::default(),
            store: BTreeMap::new(),
            store_fails: false,
            store_away: false,
            control,
            open: OPEN,
            cycle: None,
            wanted: false,
            fetches: Vec::new(),
            lending,
            arena: arena.clone(),
            mail: (0..cores).map(|_| VecDeque::new()).collect(),
        };
        rig.divide();
        let blocks = VOLUME_BYTES / 4096;
        rig.tell_shards(ToShard::Attach {
            volume: VOLUME,
            object_shift: OBJECT_SHIFT,
            blocks,
            open: OPEN,
            committed: COMMITTED,
        });
        rig.export(true);
        rig.settle();
        rig
    }

    pub(crate) fn tell(&mut self, core: usize, mail: FromControl) {
        self.mail[core].push_back(mail);
        self.post(core);
    }

    /// Puts what waits into the core's mailbox, as far as there is room.
    fn post(&mut self, core: usize) {
        let sender = &mut self.control.links[core].to_core.0;
        while sender.free() > 0
            && let Some(mail) = self.mail[core].pop_front()
        {
            sender.push(mail).unwrap();
        }
    }

    pub(crate) fn tell_shards(&mut self, mail: ToShard) {
        for shard in 0..SHARDS {
            let core = usize::from(shard) % self.cores.len();
            self.tell(core, FromControl::Shard { shard: ShardId(shard), mail });
        }
    }

    /// How the volume is served from now on.
    pub(crate) fn set_mode(&mut self, mode: Mode) {
        let (volume, buffering) = (VOLUME, Buffering::default());
        self.tell_shards(ToShard::Settings { volume, mode, buffering, pinned: false });
    }

    /// Begins a push cycle, as a keeper would.
    pub(crate) fn push(&mut self) {
        if self.cycle.is_none() && !self.store_away {
            self.wanted = false;
            self.cycle = Some(SHARDS);
            self.tell_shards(ToShard::Freeze { volume: VOLUME, next: self.open.next() });
        }
    }

    fn hear_of_push(&mut self, mail: ToKeeper) {
        match mail {
            ToKeeper::Pressure { .. } => self.push(),
            ToKeeper::Sync { .. } => {
                self.wanted = true;
                self.push();
            }
            ToKeeper::Dirtied { .. } | ToKeeper::Grown { .. } => {}
            ToKeeper::Frozen { epoch, .. } => {
                if self.answered(epoch) {
                    self.cycle = Some(SHARDS);
                    self.tell_shards(ToShard::Released { volume: VOLUME });
                }
            }
            ToKeeper::Pushed { epoch, .. } => {
                if self.answered(epoch) {
                    self.cycle = None;
                    self.open = epoch.next();
                    self.tell_shards(ToShard::Committed { volume: VOLUME, epoch });
                    if self.wanted {
                        self.push();
                    }
                }
            }
        }
    }

    /// Whether that was the last shard's answer.
    fn answered(&mut self, epoch: Epoch) -> bool {
        assert_eq!(epoch, self.open);
        let left = self.cycle.as_mut().expect("a cycle is under way");
        *left -= 1;
        *left == 0
    }

    /// Takes a batch into the store.
    fn take_batch(&mut self, batch: &Batch) {
        let mut data = batch.bytes.chunks_exact(4096).zip(&batch.crcs);
        for run in &batch.runs {
            for block in run.first..run.first + run.count {
                if run.zero {
                    self.store.remove(&(run.object, block));
                    continue;
                }
                let (page, crc) = data.next().expect("a page for each block");
                assert_eq!(heeler_hw::crc32c(0, page), *crc);
                self.store.insert((run.object, block), Bytes::copy_from_slice(page));
            }
        }
        assert!(data.next().is_none(), "a block for each page");
    }

    /// Exports the volume, or nothing.
    pub(crate) fn export(&mut self, listed: bool) {
        let disk0 = ExportInfo {
            name: "disk0".into(),
            volume: VOLUME,
            bytes: VOLUME_BYTES,
            object_shift: OBJECT_SHIFT,
            read_only: false,
        };
        for core in 0..self.cores.len() {
            let exports = if listed { vec![disk0.clone()] } else { Vec::new() };
            self.tell(core, FromControl::Exports(exports.into()));
        }
    }

    /// Asks a shard for all that is dirty from there on.
    pub(crate) fn list_dirty(&mut self, shard: ShardId, at: SalvageAt) {
        let (volume, ticket) = (VOLUME, shard.0.into());
        let core = usize::from(shard.0) % self.cores.len();
        self.tell(core, FromControl::ListDirty { shard, volume, at, ticket });
    }

    /// Connects a client to a core and lets it choose the volume.
    pub(crate) fn connect(&mut self, core: usize, structured: bool) -> usize {
        let id = self.cores[core].open().unwrap();
        self.clients.push(Client::new(core, id, structured));
        let client = self.clients.len() - 1;
        self.settle();
        assert!(self.clients[client].ready, "the handshake went through");
        client
    }

    /// Steps until nothing happens any more, by itself or with time.
    pub(crate) fn settle(&mut self) {
        for _ in 0..STEPS_MAX {
            if !self.step() {
                return;
            }
        }
        panic!("it does not come to rest: {:?}", self.cores);
    }

    /// Steps until the client has its answers.
    pub(crate) fn finish(&mut self, client: usize) -> Vec<Done> {
        for _ in 0..STEPS_MAX {
            if self.clients[client].pending.is_empty() {
                return std::mem::take(&mut self.clients[client].done);
            }
            assert!(self.step(), "nothing happens, and answers are missing");
        }
        panic!("no answer: {:?}", self.clients[client].pending);
    }

    /// One turn of each core, in any order, and some of what surrounds them. False: all is quiet.
    pub(crate) fn step(&mut self) -> bool {
        let mut active = false;
        let mut next: Option<Instant> = None;
        let mut order: Vec<usize> = (0..self.cores.len()).collect();
        self.rng.shuffle(&mut order);
        for core in order {
            if let Some(when) = self.cores[core].turn(self.now) {
                active |= when <= self.now;
                next = Some(next.map_or(when, |next| next.min(when)));
            }
            while self.cores[core].poll_noted().is_some() {}
        }
        for client in &mut self.clients {
            active |= client.step(&mut self.cores[client.core], &mut self.rng);
        }
        active |= self.control_step();
        let due = self.rng.index(4);
        for _ in 0..due {
            active |= self.disk.step();
        }
        active |= self.disk.pending() > 0 || !self.fetches.is_empty();
        if !active {
            // Somebody may have written to a core that had its turn before.
            active = self.cores.iter_mut().any(|core| !core.prepare_park());
            self.cores.iter_mut().for_each(CoreLoop::awake);
        }
        if !active && let Some(when) = next {
            self.now = when;
            return true;
        }
        self.now = self.now + Duration::from_micros(10);
        active
    }

    fn control_step(&mut self) -> bool {
        let mut active = false;
        for core in 0..self.cores.len() {
            active |= !self.mail[core].is_empty();
            self.post(core);
            while let Ok(mail) = self.control.links[core].from_core.pop() {
                active = true;
                self.hear(core, mail);
            }
        }
        if self.lending.is_vacating() && self.rng.chance(1, 20) {
            self.lending.remind();
            self.divide();
        }
        if !self.fetches.is_empty() && self.rng.chance(1, 2) {
            let at = self.rng.index(self.fetches.len());
            let (core, mail) = self.fetches.remove(at);
            self.tell(core, mail);
        }
        active
    }

    fn hear(&mut self, core: usize, mail: ToControl) {
        match mail {
            ToControl::Keeper { shard, mail } => {
                self.heard.keeper.push((shard, mail));
                self.hear_of_push(mail);
            }
            ToControl::Fetch { shard, op, object, first, count, gaps, .. } => {
                self.heard.fetches += 1;
                let wanted = (0..count).filter(|at| !gaps.contains(usize::from(*at)));
                let piece = |at: u16| {
                    let bytes = self.store.get(&(object, first + at))?.clone();
                    Some(FetchedPiece { at, bytes })
                };
                let pieces = (!self.store_fails).then(|| wanted.filter_map(piece).collect());
                self.fetches.push((core, FromControl::Fetched { shard, op, pieces }));
            }
            ToControl::Query { shard, op, object, first, count, .. } => {
                let holds = |at| self.store.contains_key(&(object, first + at));
                let data = Some((0..count).map(holds).collect());
                self.fetches.push((core, FromControl::Queried { shard, op, data }));
            }
            ToControl::Batch { shard, runs, crcs, bytes, .. } => {
                let batch = Batch { shard, runs, crcs, bytes };
                self.take_batch(&batch);
                self.heard.batches.push(batch);
                let mail = ToShard::BatchDone { volume: VOLUME };
                self.tell(core, FromControl::Shard { shard, mail });
                let bytes = self.heard.batches.last().map_or(0, |batch| batch.bytes.len());
                self.tell(core, FromControl::BatchesEnded { bytes });
            }
            ToControl::Budget { shard, report } => {
                self.lending.handle_report(self.now, shard.0.into(), report);
                self.lending.round(self.now);
                self.divide();
            }
            ToControl::Pages { from, pages } => {
                self.lending.handle_pages(from, &pages);
                self.divide();
            }
            ToControl::Covered => {
                self.lending.handle_covered();
                self.divide();
            }
            ToControl::Copied { .. } => {}
            ToControl::Status { status, .. } => self.heard.statuses.push(status),
            ToControl::Closed { ticket } => self.heard.closed.push(ticket),
            ToControl::Dirty { ticket, runs, next } => {
                let shard = ShardId(ticket as u16);
                self.heard.dirty.extend(runs.into_iter().map(|run| (shard, run)));
                if let Some(at) = next {
                    self.list_dirty(shard, at);
                }
            }
            ToControl::Salvaged { bytes, .. } => self.heard.salvaged.push(bytes),
            ToControl::Cut { .. } => {}
            ToControl::Drained(core) => self.heard.drained.push(core),
        }
    }

    /// Changes what memory may be.
    pub(crate) fn resize(&mut self, bytes: u64) {
        self.lending.resize(self.now, bytes).unwrap();
        self.divide();
    }

    /// Carries out how memory is divided.
    pub(crate) fn divide(&mut self) {
        let cores = self.cores.len();
        while let Some(output) = self.lending.poll_output() {
            match output {
                Output::Budget { shard, target, below, hurry } => {
                    let budget =
                        Budget { pages: target.pages, meta_units: target.meta_units, below };
                    let mail = FromControl::Budget { shard: ShardId(shard as u16), budget, hurry };
                    self.tell(shard % cores, mail);
                }
                Output::Below(page) => {
                    (0..cores).for_each(|core| self.tell(core, FromControl::Below(page)));
                }
                Output::Pages { to, pages } => {
                    let (Place::Shard(place) | Place::Core(place)) = to;
                    self.tell(place % cores, FromControl::Pages { to, pages });
                }
                Output::Cover { pages } => {
                    (0..cores).for_each(|core| self.tell(core, FromControl::Cover { pages }));
                }
                Output::Grow { pages } => {
                    self.arena.grow(pages).unwrap();
                    self.lending.handle_grown(self.now, true);
                }
                Output::Shrink { pages } => self.arena.shrink(pages).unwrap(),
            }
        }
    }

    /// Everything is where it belongs when nothing is under way.
    pub(crate) fn check(&mut self, transit: usize) {
        self.settle();
        for core in &self.cores {
            assert_eq!(core.free_transit_pages(), transit, "transit pages are all back");
            for (_, shard) in core.shards() {
                shard.check();
                assert_eq!(shard.usage().tasks, 0, "no task is left");
            }
        }
    }
}

/// How a request of a client ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Done {
    pub(crate) cookie: u64,
    pub(crate) error: u32,
    /// Of a read.
    pub(crate) bytes: Vec<u8>,
}

#[derive(Debug)]
struct Pending {
    offset: u64,
    bytes: Vec<u8>,
    error: u32,
}

/// A client at one connection.
pub(crate) struct Client {
    pub(crate) core: usize,
    pub(crate) id: ConnId,
    pub(crate) done: Vec<Done>,
    pub(crate) closed: bool,
    structured: bool,
    ready: bool,
    to_send: Vec<u8>,
    rx: Option<Vec<u8>>,
    inbox: Vec<u8>,
    pending: BTreeMap<u64, Pending>,
    cookie: u64,
}

impl Client {
    fn new(core: usize, id: ConnId, structured: bool) -> Self {
        let mut to_send = vec![0, 0, 0, 3];
        if structured {
            to_send.extend(option(8, &[]));
        }
        to_send.extend(option(1, b"disk0"));
        Self {
            core,
            id,
            done: Vec::new(),
            closed: false,
            structured,
            ready: false,
            to_send,
            rx: None,
            inbox: Vec::new(),
            pending: BTreeMap::new(),
            cookie: 0,
        }
    }

    pub(crate) fn read(&mut self, offset: u64, len: usize) -> u64 {
        self.request(0, offset, len as u32, &[])
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> u64 {
        self.request(1, offset, bytes.len() as u32, bytes)
    }

    pub(crate) fn flush(&mut self) -> u64 {
        self.request(3, 0, 0, &[])
    }

    pub(crate) fn trim(&mut self, offset: u64, len: u32) -> u64 {
        self.request(4, offset, len, &[])
    }

    pub(crate) fn write_zeroes(&mut self, offset: u64, len: u32) -> u64 {
        self.request(6, offset, len, &[])
    }

    pub(crate) fn disconnect(&mut self) {
        self.request(2, 0, 0, &[]);
        self.pending.remove(&self.cookie);
    }

    fn request(&mut self, command: u16, offset: u64, len: u32, payload: &[u8]) -> u64 {
        self.cookie += 1;
        self.to_send.extend([0x25, 0x60, 0x95, 0x13, 0, 0]);
        self.to_send.extend(command.to_be_bytes());
        self.to_send.extend(self.cookie.to_be_bytes());
        self.to_send.extend(offset.to_be_bytes());
        self.to_send.extend(len.to_be_bytes());
        self.to_send.extend(payload);
        let bytes = vec![0; if command == 0 { len as usize } else { 0 }];
        self.pending.insert(self.cookie, Pending { offset, bytes, error: 0 });
        self.cookie
    }

    /// Moves some bytes in both directions.
    fn step(&mut self, core: &mut CoreLoop<'_, SimQueue>, rng: &mut Rng) -> bool {
        if self.closed {
            return false;
        }
        let mut active = false;
        if let Some(tx) = core.take_tx(self.id) {
            self.inbox.extend_from_slice(&tx);
            core.give_tx(self.id, tx);
            active = true;
        }
        if self.rx.is_none() {
            self.rx = core.take_rx(self.id);
        }
        if !self.to_send.is_empty()
            && let Some(mut rx) = self.rx.take()
        {
            let room = rx.capacity() - rx.len();
            assert!(room > 0, "bytes are asked for, and there is room");
            let most = self.to_send.len().min(room);
            let some = if rng.chance(1, 2) { most } else { 1 + rng.index(most) };
            rx.extend(self.to_send.drain(..some));
            core.give_rx(self.id, rx);
            active = true;
        }
        self.take_answers();
        if core.wants_close(self.id) {
            core.close(self.id);
            self.closed = true;
            active = true;
        }
        active
    }

    fn take_answers(&mut self) {
        if !self.ready {
            let greeting = 18 + if self.structured { 20 } else { 0 } + 10;
            if self.inbox.len() < greeting {
                return;
            }
            let export = &self.inbox[greeting - 10..];
            assert_eq!(export[..8], VOLUME_BYTES.to_be_bytes());
            self.inbox.drain(..greeting);
            self.ready = true;
        }
        while self.take_answer().is_some() {}
    }

    fn take_answer(&mut self) -> Option<()> {
        let magic: [u8; 4] = self.inbox.get(..4)?.try_into().unwrap();
        match u32::from_be_bytes(magic) {
            0x6744_6698 => self.take_simple(),
            0x668e_33ef => self.take_chunk(),
            magic => panic!("{magic:x} is no reply"),
        }
    }

    fn take_simple(&mut self) -> Option<()> {
        let head: [u8; 16] = self.inbox.get(..16)?.try_into().unwrap();
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        let pending = &self.pending[&cookie];
        let len = if error == 0 { pending.bytes.len() } else { 0 };
        assert!(!self.structured || pending.bytes.is_empty(), "reads are answered in chunks");
        let bytes = self.inbox.get(16..16 + len)?.to_vec();
        self.inbox.drain(..16 + len);
        self.pending.remove(&cookie);
        self.done.push(Done { cookie, error, bytes });
        Some(())
    }

    fn take_chunk(&mut self) -> Option<()> {
        let head: [u8; 20] = self.inbox.get(..20)?.try_into().unwrap();
        let kind = u16::from_be_bytes(head[6..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
        let len = u32::from_be_bytes(head[16..].try_into().unwrap()) as usize;
        let data = self.inbox.get(20..20 + len)?.to_vec();
        self.inbox.drain(..20 + len);
        let pending = self.pending.get_mut(&cookie).expect("an answer to a request");
        match kind {
            0 => {}
            1 => {
                let at = u64::from_be_bytes(data[..8].try_into().unwrap()) - pending.offset;
                let at = at as usize;
                pending.bytes[at..at + len - 8].copy_from_slice(&data[8..]);
            }
            2 => {}
            32769 => pending.error = u32::from_be_bytes(data[..4].try_into().unwrap()),
            kind => panic!("chunk of type {kind}"),
        }
        if head[5] & 1 != 0 {
            let Pending { bytes, error, .. } = self.pending.remove(&cookie).unwrap();
            self.done.push(Done { cookie, error, bytes });
        }
        Some(())
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}
