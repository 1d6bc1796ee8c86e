//! One shard on a simulated device, with a store that has a block for every place. Everything is
//! answered at once. A life ends as if the process were killed; the device lasts longer.

use std::collections::VecDeque;

use heeler_core::budget::Target;
use heeler_core::config::ShardConfig;
use heeler_core::event::{Advice, Input, Output, Request, RequestKind, Status, ToKeeper, ToShard};
use heeler_core::ids::{BLOCK_BYTES, BlockRef, Epoch, OpId, PageId, VolumeId};
use heeler_core::policy::Policy;
use heeler_core::recovery::{Need, Recovered, Recovery, RegionLayout};
use heeler_core::shard::{Budget, Shard, ShardStorage};
use heeler_core::time::{Duration, Instant};
use heeler_core::wire::heat::RecordHead;
use heeler_hw::queue::BlockFile;
use heeler_hw::sim::SimDisk;
use heeler_hw::{AlignedBuf, Arena, crc32c};

pub(crate) const VOLUME: VolumeId = VolumeId(3);
pub(crate) const BLOCKS: u32 = 8192;
const OBJECT_SHIFT: u8 = 20;
const OBJECT_BLOCKS: u32 = 1 << (OBJECT_SHIFT - 12);
const TRANSIT: u32 = 64;
const COMMITTED: Epoch = Epoch::first_of_term(1);

/// What lasts.
pub(crate) struct Machine {
    pub(crate) disk: SimDisk,
    pub(crate) now: u64,
    pub(crate) policy: Policy,
    /// Pages of the shard.
    pub(crate) pages: u32,
    layout: RegionLayout,
    heat_pages: u32,
    /// What is read of the record is not what was written.
    pub(crate) spoils: bool,
    /// The store gives nothing from the start.
    pub(crate) store_fails: bool,
}

impl Machine {
    /// A blank device of so many segments of 256 KiB.
    pub(crate) fn new(policy: Policy, pages: u32, segments: u32) -> Self {
        let layout = RegionLayout { region: [7; 16], segment_pages: 64, segments };
        let heat_pages = 256;
        let bytes = u64::from(64 * segments + heat_pages) * BLOCK_BYTES as u64;
        let disk = SimDisk::new(bytes, 1);
        Self { disk, now: 1, policy, pages, layout, heat_pages, spoils: false, store_fails: false }
    }

    /// The pages of the record of heat.
    pub(crate) fn heat(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.layout.segment_pages * self.layout.segments);
        start..start + u64::from(self.heat_pages)
    }

    /// What the newest record says that the shard might have.
    pub(crate) fn share(&self) -> Target {
        let record = |copy: u64| {
            let half = u64::from(self.heat_pages / 2);
            let mut page = AlignedBuf::zeroed(1);
            let at = (self.heat().start + copy * half) * BLOCK_BYTES as u64;
            self.disk.read_at(at, &mut page).expect("a sound device");
            RecordHead::open(&page, self.layout.region, half as u32, crc32c)
        };
        let newest = (0..2).filter_map(record).max_by_key(|(generation, _)| *generation);
        newest.expect("a record").1.share
    }

    fn config(&self) -> ShardConfig {
        ShardConfig {
            policy: self.policy,
            heat_pages: self.heat_pages,
            heat_every: Duration::from_secs(1),
            adopted_max: TRANSIT as usize,
            ..ShardConfig::for_region(self.layout, crc32c)
        }
    }

    /// Starts, serves the volume, lets `run` do what it wants, and is killed.
    pub(crate) fn live<T>(&mut self, run: impl FnOnce(&mut Life<'_>) -> T) -> T {
        self.start(|life| {
            life.attach(VOLUME);
            run(life)
        })
    }

    /// The same, but serves nothing yet.
    pub(crate) fn start<T>(&mut self, run: impl FnOnce(&mut Life<'_>) -> T) -> T {
        let config = self.config();
        let fixed = Shard::pages_fixed(&config) as u32;
        let own: Vec<_> = (0..fixed + self.pages).map(PageId).collect();
        let transit = fixed + self.pages..fixed + self.pages + TRANSIT;
        let mut storage = ShardStorage::new(&config, own.len());
        let recovered = recover(&self.disk, self.layout);
        let mut life = Life {
            now: self.now,
            volume: VOLUME,
            arena: Arena::new(transit.end).expect("memory"),
            shard: Shard::new(config, &mut storage, &own, recovered),
            disk: self.disk.clone(),
            transit: transit.map(PageId).collect(),
            todo: VecDeque::new(),
            leases: Vec::new(),
            last: Vec::new(),
            fetches: Vec::new(),
            claims: Vec::new(),
            store_fails: self.store_fails,
            spoils: self.spoils,
        };
        let result = run(&mut life);
        life.shard.check();
        self.now = life.now;
        result
    }
}

fn recover(disk: &SimDisk, layout: RegionLayout) -> Recovered {
    let mut recovery = Recovery::new(layout, crc32c);
    loop {
        match recovery.need() {
            Need::Read { at, count } => {
                let mut bytes = AlignedBuf::zeroed(count as usize);
                disk.read_at(offset(at), &mut bytes).expect("a sound device");
                recovery.handle_read(Some(&bytes));
            }
            Need::Write { at } => {
                let mut bytes = AlignedBuf::zeroed(recovery.bytes().len() / BLOCK_BYTES);
                bytes.copy_from_slice(recovery.bytes());
                disk.write_at(offset(at), &bytes).expect("a sound device");
                recovery.handle_written();
            }
            Need::Done => return recovery.finish(),
        }
    }
}

fn offset(page: u32) -> u64 {
    u64::from(page) * BLOCK_BYTES as u64
}

/// What the store has at a block.
pub(crate) fn stored(block: u32) -> u64 {
    u64::from(block) << 8 | 1
}

/// From a start to a kill.
pub(crate) struct Life<'a> {
    now: u64,
    volume: VolumeId,
    arena: Arena,
    pub(crate) shard: Shard<'a>,
    disk: SimDisk,
    transit: Vec<PageId>,
    todo: VecDeque<Output>,
    leases: Vec<OpId>,
    /// What the last read gave: the first word of each block.
    last: Vec<u64>,
    /// Blocks of each fetch.
    pub(crate) fetches: Vec<u16>,
    /// The young pages that the shard said it had, at each read of data from the device.
    pub(crate) claims: Vec<u64>,
    pub(crate) store_fails: bool,
    spoils: bool,
}

impl Life<'_> {
    /// Serves a volume; requests are for it from now on.
    pub(crate) fn attach(&mut self, volume: VolumeId) {
        self.volume = volume;
        self.mail(ToShard::Attach {
            volume,
            object_shift: OBJECT_SHIFT,
            blocks: BLOCKS.into(),
            open: COMMITTED.next(),
            committed: COMMITTED,
        });
    }

    /// Says what the shard may have.
    pub(crate) fn allow(&mut self, pages: u32, meta_units: u32) {
        self.tell(Input::Budget(Budget { pages, meta_units, below: PageId::NONE }));
        self.settle();
    }

    fn mail(&mut self, mail: ToShard) {
        self.tell(Input::Keeper(mail));
        self.settle();
    }

    /// So many milliseconds go by.
    pub(crate) fn pass(&mut self, ms: u64) {
        self.now += ms * 1_000_000;
        self.settle();
    }

    /// Waits until so many records more have been written.
    pub(crate) fn wait_for_record(&mut self, more: u64) {
        let enough = self.shard.counters().heat_records + more;
        for _ in 0..1000 {
            if self.shard.counters().heat_records >= enough {
                return;
            }
            self.pass(500);
        }
        panic!("no record is written: {:?}", self.shard.counters());
    }

    /// Reads so many blocks; returns what each begins with.
    pub(crate) fn read(&mut self, first: u32, count: u32) -> Vec<u64> {
        self.request(RequestKind::Read, first, count, &[]);
        std::mem::take(&mut self.last)
    }

    pub(crate) fn write(&mut self, block: u32, content: u64) {
        let page = self.transit.pop().expect("a page");
        let bytes = bytes_of(content);
        self.arena.write(page, 0, &bytes);
        self.request(RequestKind::Write, block, 1, &[BlockRef { page, crc: crc32c(0, &bytes) }]);
    }

    pub(crate) fn discard(&mut self, block: u32) {
        self.request(RequestKind::Discard, block, 1, &[]);
    }

    pub(crate) fn save(&mut self) {
        self.tell(Input::Save);
        self.settle();
        assert!(self.shard.is_saved());
    }

    /// Whether a block is in RAM.
    pub(crate) fn is_in_ram(&self, block: u32) -> bool {
        let (object, at) = (block / OBJECT_BLOCKS, (block % OBJECT_BLOCKS) as u16);
        let onodes = self.shard.onodes();
        let onode = onodes.iter().find(|onode| {
            let onode = onodes.get(*onode);
            (onode.volume, onode.object) == (self.volume, object)
        });
        let place = onode.and_then(|onode| onodes.block(onode, at));
        place.is_some_and(|(leaf, index)| onodes.buffer(leaf, index).is_some())
    }

    fn request(&mut self, kind: RequestKind, first: u32, count: u32, blocks: &[BlockRef]) {
        let block = BLOCK_BYTES as u32;
        let (object, offset) = (first / OBJECT_BLOCKS, first % OBJECT_BLOCKS * block);
        let (advice, len, volume) = (Advice::None, count * block, self.volume);
        let request = Request { id: 1, kind, fua: false, advice, volume, object, offset, len };
        self.tell(Input::Request(request, blocks));
        self.settle();
    }

    fn tell(&mut self, input: Input<'_>) {
        self.now += 1000;
        self.shard.handle(Instant(self.now), input).expect("drained, and tasks are left");
        while let Some(output) = self.shard.poll_output() {
            match output {
                Output::Reply(reply) => {
                    assert_eq!(reply.status, Status::Ok);
                    let blocks = self.shard.reply_blocks().to_vec();
                    match reply.kind {
                        RequestKind::Write => {
                            self.transit.extend(blocks.iter().map(|block| block.page));
                        }
                        _ => self.last = blocks.iter().map(|block| self.word(block.page)).collect(),
                    }
                    self.leases.extend(reply.lease);
                }
                Output::DeviceWrite { op, header, .. } => {
                    let pages = self.shard.op_pages(op)[..header as usize].to_vec();
                    for (index, page) in pages.into_iter().enumerate() {
                        let shard = &self.shard;
                        self.arena.with_mut(page, |bytes| shard.encode(op, index, bytes));
                    }
                    self.todo.push_back(output);
                }
                output => self.todo.push_back(output),
            }
        }
    }

    fn word(&self, page: PageId) -> u64 {
        let mut bytes = [0; 8];
        if page.is_some() {
            self.arena.read(page, 0, &mut bytes);
        }
        u64::from_le_bytes(bytes)
    }

    /// Until nothing is left to do at this time.
    fn settle(&mut self) {
        loop {
            while let Some(lease) = self.leases.pop() {
                self.tell(Input::Release(lease));
            }
            while let Some(output) = self.todo.pop_front() {
                self.carry_out(output);
            }
            self.tell(Input::Turn);
            if !self.todo.is_empty() {
                continue;
            }
            match self.shard.poll_timeout() {
                Some(at) if at.0 <= self.now + 2_000_000 => self.now = self.now.max(at.0),
                _ => return,
            }
        }
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::DeviceRead { op, at, .. } => {
                self.claims.push(self.shard.budget_report().page_ages[0]);
                let pages = self.shard.op_pages(op).to_vec();
                for (page, from) in pages.iter().zip(at..) {
                    let mut bytes = AlignedBuf::zeroed(1);
                    self.disk.read_at(offset(from), &mut bytes).expect("a sound device");
                    self.arena.write(*page, 0, &bytes);
                }
                let crcs: Vec<_> = pages.iter().map(|page| self.arena.crc(*page)).collect();
                self.tell(Input::Device { op, ok: true, crcs: &crcs });
            }
            Output::DeviceLoad { op, at } => {
                let mut bytes = AlignedBuf::zeroed(1);
                let ok = self.disk.read_at(offset(at), &mut bytes).is_ok();
                bytes[4000] ^= u8::from(self.spoils);
                self.tell(Input::Loaded { op, bytes: ok.then_some(&bytes[..]) });
            }
            Output::DeviceWrite { op, at, .. } => {
                let pages = self.shard.op_pages(op).to_vec();
                for (page, to) in pages.into_iter().zip(at..) {
                    let mut bytes = AlignedBuf::zeroed(1);
                    self.arena.read(page, 0, &mut bytes);
                    self.disk.write_at(offset(to), &bytes).expect("a sound device");
                }
                self.tell(Input::Device { op, ok: true, crcs: &[] });
            }
            Output::DeviceFlush { op } => self.tell(Input::Device { op, ok: true, crcs: &[] }),
            Output::Fetch { op, object, first, count, .. } => {
                self.fetches.push(count);
                let pages = self.shard.op_pages(op).to_vec();
                let first = object * OBJECT_BLOCKS + u32::from(first);
                // Gaps have no page.
                let is_wanted = |page: &PageId| *page != PageId::NONE;
                for (page, block) in pages.iter().zip(first..).filter(|(page, _)| is_wanted(page)) {
                    self.arena.write(*page, 0, &bytes_of(stored(block)));
                }
                let crc = |page: &PageId| is_wanted(page).then(|| self.arena.crc(*page));
                let crcs: Vec<_> = pages.iter().map(crc).collect();
                self.tell(Input::Fetched { op, ok: !self.store_fails, crcs: &crcs });
            }
            Output::Keeper(ToKeeper::Dirtied { .. } | ToKeeper::Pressure { .. }) => {}
            output => panic!("{output:?} is not expected here"),
        }
    }
}

fn bytes_of(content: u64) -> Vec<u8> {
    content.to_le_bytes().repeat(BLOCK_BYTES / 8)
}
