//! A shard: the state machine that owns a fixed set of objects. The only type a runtime sees.
//!
//! Drive it so: `handle` one input, drain `poll_output` to `None`, and so on; at the end of a turn
//! hand it `Input::Turn`, drain, and come back when `poll_timeout` says or something happens.
//! A call does bounded work and allocates nothing. After `new`, the shard holds all memory it will
//! ever use.
//!
//! Which file does what: `request` takes requests in and answers them, `read` collects blocks
//! (`fill` brings them in), `write` puts them into the log, `discard` takes them away, `durable`
//! waits for flushes, `commit` for the store, `push` hands closed epochs to the keeper, `reclaim`
//! makes room in the log, `attach` takes in what recovery found, `heat` brings back what was in
//! RAM, `scrub` finds what is to be checked, `salvage` what is to be saved, `index` keeps every
//! reference to a block consistent.

mod attach;
mod budget;
mod commit;
mod discard;
mod durable;
mod fill;
mod heat;
mod index;
mod push;
mod read;
mod reclaim;
mod request;
mod salvage;
mod scrub;
mod stream;
mod task;
mod volume;
mod write;

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::buffer::{BufferStorage, Buffers};
use crate::config::ShardConfig;
use crate::counters::Traffic;
use crate::event::{Advice, Input, Output, PushRun, Rejected, Status};
use crate::ids::{BlockRef, OpId, PageId, VolumeId};
use crate::limits::{REQUEST_BLOCKS_MAX, VOLUMES_MAX};
use crate::onode::{NIL, OnodeStorage, Onodes};
use crate::recovery::{LogEntry, Recovered};
use crate::time::Instant;
use crate::wlog::{LOG_DEPTH, Log, meta_pages};
use budget::Progress;
pub use budget::{Budget, BudgetReport};
use commit::{WAITERS_MAX, Waiter};
use fill::{FILLS_MAX, Fills};
use heat::Heat;
use reclaim::Reclaim;
pub use salvage::{DirtyKind, DirtyRun, DirtyScan, SalvageAt};
pub use scrub::{LogRun, Scan, ScrubAt};
use task::{Fifo, Tasks};
use volume::Volume;

/// Outputs that can wait to be drained. One input can answer every task, start every fill and
/// write every record.
const OUTBOX: usize = 1024;
/// Zero ranges that the log holds and that may have to be written again by reclaim.
const ZERO_RANGES_MAX: usize = 8192;

/// The memory that a shard's lists are linked in, lent to it for its life.
#[derive(Debug)]
pub struct ShardStorage {
    slots: usize,
    buffers: BufferStorage,
    onodes: OnodeStorage,
}

impl ShardStorage {
    /// Memory for a shard that will have at most `pages` pages of the arena.
    #[must_use]
    pub fn new(config: &ShardConfig, pages: usize) -> Self {
        let slots = BufferStorage::slots_for(pages, config.adopted_max);
        let onodes = OnodeStorage::new(config.onodes);
        Self { slots, buffers: BufferStorage::new(slots), onodes }
    }
}

/// What an operation in flight belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Op {
    /// A record being written.
    Record(usize),
    /// A footer being written.
    Footer,
    /// A device flush; records below the number were written when it began.
    Flush(u64),
    /// A fill from the device or the store.
    Fill(u32),
    /// A task's question which blocks the store holds.
    Query(u32),
    /// A merge of old and new bytes for a block of a task.
    Merge(u32, u8),
    /// A batch being copied away.
    Batch(u32),
    /// Pages lent to a client.
    Lease(u32),
    /// Pages of the record of heat.
    Heat,
}

/// Counts for the status. Blocks have 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ShardCounters {
    /// Records written to the log.
    pub records: u64,
    /// Device flushes.
    pub flushes: u64,
    /// Blocks handed to the keeper.
    pub pushed_blocks: u64,
    /// Blocks moved by reclaim.
    pub moved_blocks: u64,
    /// Blocks dropped from NVMe by reclaim.
    pub dropped_blocks: u64,
    /// Blocks dropped from RAM because the shard's share of memory became smaller.
    pub resized_blocks: u64,
    /// Blocks dropped from RAM with the onode of their object, when it made room for another.
    pub onode_evicted_blocks: u64,
    /// Blocks dropped from RAM because they were discarded, or their volume was removed.
    pub discarded_blocks: u64,
    /// Blocks dropped from RAM by a purge.
    pub purged_blocks: u64,
    /// Blocks brought back into RAM after a start because they were there before it.
    pub warmed_blocks: u64,
    /// Records of heat written.
    pub heat_records: u64,
    /// Pages of them.
    pub heat_pages: u64,
    /// Device reads or writes that failed.
    pub device_errors: u64,
    /// Blocks whose checksum did not match.
    pub damaged_blocks: u64,
    /// Dirty blocks that were lost to that.
    pub lost_blocks: u64,
    /// Answers for operations that had ended.
    pub stale_answers: u64,
}

/// How full a shard is. Blocks and pages have 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ShardUsage {
    /// Blocks that the store lacks.
    pub dirty_blocks: u64,
    /// Blocks on NVMe.
    pub nvme_blocks: u64,
    /// Blocks that fit on NVMe.
    pub nvme_capacity: u64,
    /// Blocks in RAM.
    pub ram_blocks: u64,
    /// Pages that the shard holds.
    pub ram_capacity: u64,
    /// Onodes.
    pub onodes: u64,
    /// Tasks under way.
    pub tasks: u64,
}

/// A zero range in the log.
#[derive(Clone, Copy, Debug)]
struct ZeroRange {
    segment_seq: u64,
    volume: VolumeId,
    object: u32,
    first: u16,
    count: u16,
}

/// See the module.
#[derive(Debug)]
pub struct Shard<'a> {
    config: ShardConfig,
    now: Instant,
    /// Its second, modulo 2^16.
    second: u16,
    buffers: Buffers<'a>,
    onodes: Onodes<'a>,
    log: Log,
    tasks: Tasks,
    fills: Fills,
    ops: slab::Slab<(u32, Op)>,
    generation: u32,
    /// For each buffer slot: the fill it waits for, or how that ended.
    marks: Box<[u32]>,
    volumes: heapless::Vec<Volume, VOLUMES_MAX>,
    /// Entries that recovery found, until their volume is attached or forgotten.
    recovered: Vec<LogEntry>,
    recovered_crcs: Vec<u32>,
    zero_ranges: alloc::collections::VecDeque<ZeroRange>,
    reclaim: Reclaim,
    heat: Heat,
    progress: Progress,
    dirty_blocks: u64,
    nvme_blocks: u64,
    /// Writes that wait for room, in order.
    stalled_writes: Fifo,
    /// Reads that wait for pages, in order.
    stalled_reads: Fifo,
    /// Tasks that wait for a device flush that has not begun.
    barrier: Fifo,
    /// Tasks that wait for the flush under way.
    flushed: Fifo,
    /// Tasks that wait until certain records are written, in order.
    unwritten: Fifo,
    /// Changes that wait for the store, in order.
    waiters: alloc::collections::VecDeque<Waiter>,
    /// Something happened that they may have waited for.
    look_at_waiters: bool,
    /// Records were written since the last flush began.
    unflushed: bool,
    /// Tasks whose replies are in the outbox, in order.
    replies: Fifo,
    /// Volumes whose log entries are to be voided.
    forgets: heapless::Vec<VolumeId, VOLUMES_MAX>,
    /// Answers that wait for pages to hand back.
    owing: Fifo,
    flushing: bool,
    /// No write passes before this time.
    pace_until: Instant,
    /// Something is left to do at once.
    again: bool,
    outbox: heapless::Deque<Output, OUTBOX>,
    /// The task whose reply was polled last; it ends with the next poll.
    replied: Option<u32>,
    /// The volume whose push has its turn first.
    push_first: usize,
    batch_runs: heapless::Vec<PushRun, REQUEST_BLOCKS_MAX>,
    batch_blocks: heapless::Vec<BlockRef, REQUEST_BLOCKS_MAX>,
    counters: ShardCounters,
    traffic: Traffic,
}

impl<'a> Shard<'a> {
    /// A shard with these pages of the arena, after recovery.
    ///
    /// # Panics
    ///
    /// If there are fewer pages than [`Self::pages_min`].
    #[must_use]
    pub fn new(
        config: ShardConfig,
        storage: &'a mut ShardStorage,
        pages: &[PageId],
        recovered: Recovered,
    ) -> Self {
        assert!(pages.len() >= Self::pages_min(&config), "too few pages for a shard");
        let (fixed, own) = pages.split_at(Self::pages_fixed(&config));
        let (meta, heat_pages) = fixed.split_at(meta_pages(config.layout.segment_pages));
        let slots = storage.slots;
        Self {
            config,
            now: Instant(0),
            second: 0,
            buffers: Buffers::new(&mut storage.buffers, own, config.policy),
            onodes: Onodes::new(&mut storage.onodes, config.leaves),
            log: Log::new(
                config.layout,
                config.crc32c,
                meta,
                &recovered.segment_seqs,
                recovered.next_seq,
                recovered.next_segment_seq,
            ),
            tasks: Tasks::new(config.tasks),
            fills: Fills::new(),
            ops: slab::Slab::with_capacity(2 * config.tasks + FILLS_MAX + LOG_DEPTH + 3),
            generation: 0,
            marks: core::iter::repeat_n(NIL, slots).collect(),
            volumes: heapless::Vec::new(),
            recovered: attach::without_void(recovered.entries),
            recovered_crcs: recovered.crcs,
            zero_ranges: alloc::collections::VecDeque::with_capacity(ZERO_RANGES_MAX),
            reclaim: Reclaim::new(),
            heat: Heat::new(&config, heat_pages),
            progress: Progress::new(own.len() as u32),
            dirty_blocks: 0,
            nvme_blocks: 0,
            stalled_writes: Fifo::new(),
            stalled_reads: Fifo::new(),
            barrier: Fifo::new(),
            flushed: Fifo::new(),
            unwritten: Fifo::new(),
            waiters: alloc::collections::VecDeque::with_capacity(WAITERS_MAX),
            look_at_waiters: false,
            unflushed: false,
            replies: Fifo::new(),
            forgets: heapless::Vec::new(),
            owing: Fifo::new(),
            flushing: false,
            pace_until: Instant(0),
            again: false,
            outbox: heapless::Deque::new(),
            replied: None,
            push_first: 0,
            batch_runs: heapless::Vec::new(),
            batch_blocks: heapless::Vec::new(),
            counters: ShardCounters::default(),
            traffic: Traffic::default(),
        }
    }

    /// Pages of the arena that a shard keeps for itself, the first of those that it is given: for
    /// headers of the log, and for the record of heat.
    #[must_use]
    pub const fn pages_fixed(config: &ShardConfig) -> usize {
        meta_pages(config.layout.segment_pages) + Heat::pages_of(config)
    }

    /// Pages of the arena that a shard needs at least: those fixed, and enough to collect several
    /// requests at once.
    #[must_use]
    pub fn pages_min(config: &ShardConfig) -> usize {
        Self::pages_fixed(config) + 8 * REQUEST_BLOCKS_MAX
    }

    /// Takes one input.
    ///
    /// # Errors
    ///
    /// [`Rejected`], with nothing changed, if outputs have not been drained, or a request finds all
    /// tasks in use: hand it in again after the next reply.
    pub fn handle(&mut self, now: Instant, input: Input<'_>) -> Result<(), Rejected> {
        self.end_replied();
        if !self.outbox.is_empty() {
            return Err(Rejected);
        }
        self.set_now(now);
        self.end_told();
        match input {
            Input::Request(request, blocks) => return self.handle_request(request, blocks),
            Input::Release(lease) => self.handle_release(lease),
            Input::Device { op, ok, crcs } => self.handle_device(op, ok, crcs),
            Input::Loaded { op, bytes } => self.handle_loaded(op, bytes),
            Input::Filled { op, crc } => self.handle_merged(op, crc),
            Input::Fetched { op, ok, crcs } => self.handle_fetched(op, ok, crcs),
            Input::Queried { op, ok, data } => self.handle_queried(op, ok, data),
            Input::BatchTaken(op) => self.handle_batch_taken(op),
            Input::Keeper(mail) => self.handle_keeper(mail),
            Input::Purge { force } => self.purge(force),
            Input::Budget(budget) => self.set_budget(budget),
            Input::Policy(policy) => self.set_policy(policy),
            Input::Pages(pages) => self.take_in_pages(pages),
            Input::Save => self.save(),
            Input::Turn => self.settle(),
        }
        Ok(())
    }

    fn set_now(&mut self, now: Instant) {
        self.now = self.now.max(now);
        let second = self.now.seconds() as u16;
        if second != self.second {
            self.second = second;
            self.buffers.set_second(second);
            self.onodes.set_second(second);
        }
    }

    /// The next thing to do. Changes after every `handle`; drain it to `None`.
    #[must_use]
    pub fn poll_output(&mut self) -> Option<Output> {
        self.end_replied();
        let output = self.outbox.pop_front();
        if let Some(Output::Batch { op, .. }) = output {
            self.describe_batch(op);
        }
        if let Some(Output::Reply(_) | Output::HandBack { .. }) = output {
            self.replied = self.tasks.pop_front(&mut self.replies);
        }
        output
    }

    /// When to hand in `Input::Turn` even if nothing happens. Valid after draining.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.again {
            return Some(self.now);
        }
        let stalled = self.stalled_writes.head();
        let since = stalled.map(|head| self.tasks.get(head).since);
        let full = since.zip(self.config.full_timeout).map(|(since, timeout)| since + timeout);
        let pace = stalled.filter(|_| self.pace_until > self.now).map(|_| self.pace_until);
        [full, pace, self.heat_timeout()].into_iter().flatten().min()
    }

    /// The pages of a device operation or a fetch that was just polled.
    #[must_use]
    pub fn op_pages(&self, op: OpId) -> &[PageId] {
        match self.op(op) {
            Some(Op::Record(slot)) => &self.log.record(slot).pages,
            Some(Op::Footer) => self.log.footer_pages(),
            Some(Op::Fill(fill)) => &self.fills.get(fill).pages,
            Some(Op::Heat) => self.heat.op_pages(),
            _ => &[],
        }
    }

    /// Whether a device read that was just polled is for a push: no client waits for it, so those
    /// of clients go first.
    #[must_use]
    pub fn is_for_push(&self, op: OpId) -> bool {
        matches!(self.op(op), Some(Op::Fill(fill)) if self.fills.get(fill).push)
    }

    /// Fills page `index` of a write's header pages.
    pub fn encode(&self, op: OpId, index: usize, page: &mut [u8]) {
        match self.op(op) {
            Some(Op::Record(slot)) => self.log.encode_record(slot, page),
            Some(Op::Footer) => self.log.encode_footer(index, page),
            Some(Op::Heat) => self.heat.encode(index, page),
            _ => panic!("encode of an operation without header pages"),
        }
    }

    /// The blocks of the reply that was just polled: of a read the lent pages, of a write the pages
    /// handed back, of a status the extents.
    #[must_use]
    pub fn reply_blocks(&self) -> &[BlockRef] {
        self.replied.map_or(&[], |task| &self.tasks.get(task).payload)
    }

    /// The runs of the batch that was just polled.
    #[must_use]
    pub fn batch_runs(&self) -> &[PushRun] {
        &self.batch_runs
    }

    /// The data blocks of the batch that was just polled, in the order of its runs.
    #[must_use]
    pub fn batch_blocks(&self) -> &[BlockRef] {
        &self.batch_blocks
    }

    /// Counts since the start.
    #[must_use]
    pub fn counters(&self) -> ShardCounters {
        self.counters
    }

    /// What the clients of all volumes used since the start.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// What the clients of one volume used since it was attached; `None` when it is not attached.
    #[must_use]
    pub fn volume_traffic(&self, volume: VolumeId) -> Option<Traffic> {
        self.volumes.iter().find(|known| known.id == volume).map(|known| known.traffic)
    }

    /// How full the shard is.
    #[must_use]
    pub fn usage(&self) -> ShardUsage {
        let ram = self.buffers.usage();
        ShardUsage {
            dirty_blocks: self.dirty_blocks,
            nvme_blocks: self.nvme_blocks,
            nvme_capacity: self.log.capacity(),
            ram_blocks: u64::from(ram.pages() - ram.free),
            ram_capacity: u64::from(ram.pages()),
            onodes: u64::from(self.onodes.used().0),
            tasks: (self.config.tasks - self.tasks.free()) as u64,
        }
    }

    /// Dirty blocks of one volume; `None` when it is not attached.
    #[must_use]
    pub fn volume_dirty_blocks(&self, volume: VolumeId) -> Option<u64> {
        let volume = self.volumes.iter().find(|known| known.id == volume)?;
        Some(volume.dirty.iter().sum())
    }

    /// What recovery found of volumes that have been neither attached nor forgotten.
    #[must_use]
    pub fn recovered_entries(&self) -> &[LogEntry] {
        &self.recovered
    }

    /// The buffers, for status and checks.
    #[must_use]
    pub fn buffers(&self) -> &Buffers<'a> {
        &self.buffers
    }

    /// The onodes, for status and checks.
    #[must_use]
    pub fn onodes(&self) -> &Onodes<'a> {
        &self.onodes
    }

    /// The log, for status and checks.
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Everything that can be done without an answer from outside, in bounded slices. The order
    /// matters: what frees comes before what waits.
    fn settle(&mut self) {
        self.again = false;
        self.clean_committed();
        self.step_budget();
        self.step_reclaim();
        self.step_push();
        self.answer_waiters();
        self.retry_unwritten();
        self.retry_owing();
        self.retry_stalled();
        self.tell_dirtied();
        self.close_record();
        self.start_flush();
        self.forget_volumes();
        self.step_heat();
    }

    fn emit(&mut self, output: Output) {
        self.outbox.push_back(output).expect("OUTBOX holds the outputs of any input");
    }

    fn start_op(&mut self, op: Op) -> OpId {
        assert!(self.ops.len() < self.ops.capacity(), "operations are bounded");
        self.generation = self.generation.wrapping_add(1);
        let slot = self.ops.insert((self.generation, op));
        OpId { slot: slot as u32, generation: self.generation }
    }

    fn op(&self, op: OpId) -> Option<Op> {
        let (generation, found) = self.ops.get(op.slot as usize)?;
        (*generation == op.generation).then_some(*found)
    }

    /// Ends an operation; `None` if it had ended before: a late answer, counted and dropped.
    fn end_op(&mut self, op: OpId) -> Option<Op> {
        let found = self.op(op);
        match found {
            Some(_) => {
                self.ops.remove(op.slot as usize);
            }
            None => self.counters.stale_answers += 1,
        }
        found
    }

    /// Counts something for a task's volume and for the shard, if a client wanted it.
    fn count(&mut self, task: u32, add: impl Fn(&mut Traffic)) {
        let advice = self.tasks.get(task).request().advice;
        if matches!(advice, Advice::BypassClean | Advice::Salvage) {
            return;
        }
        let volume = self.tasks.get(task).volume;
        add(&mut self.volumes[volume].traffic);
        add(&mut self.traffic);
    }

    fn handle_device(&mut self, id: OpId, ok: bool, crcs: &[u32]) {
        if !ok {
            self.counters.device_errors += 1;
        }
        if let Some(Op::Record(slot)) = self.op(id) {
            return self.record_done(id, slot, ok);
        }
        match self.end_op(id) {
            Some(Op::Footer) => self.log.footer_done(),
            Some(Op::Flush(seq)) => self.flush_done(seq, ok),
            Some(Op::Fill(fill)) => self.device_fill_done(fill, ok, crcs),
            Some(Op::Heat) => self.heat_written(ok),
            Some(_) => panic!("a device answered for something else"),
            None => {}
        }
    }

    fn volume_index(&self, volume: VolumeId) -> Option<usize> {
        self.volumes.iter().position(|known| known.id == volume)
    }

    fn end_task(&mut self, task: u32) {
        let volume = self.tasks.get(task).volume;
        if volume < self.volumes.len() {
            self.volumes[volume].tasks -= 1;
        }
        self.tasks.end(task);
    }

    fn fail(&mut self, task: u32, status: Status) {
        let task = self.tasks.get_mut(task);
        if task.status == Status::Ok {
            task.status = status;
        }
    }

    /// Recounts everything that is kept as a counter. Slow; for tests and debug builds.
    pub fn check(&self) {
        assert_eq!(self.buffers.recount(), self.buffers.usage());
        self.log.check();
        let live: u64 = self.log.segments().iter().map(|segment| u64::from(segment.live)).sum();
        assert_eq!(live, self.nvme_blocks, "blocks on NVMe");
        let mut dirty = 0;
        for onode in self.onodes.iter() {
            let mut of_onode = 0;
            for leaf in self.onodes.get(onode).leaves.iter().filter(|leaf| **leaf != NIL) {
                let leaf = self.onodes.leaf(*leaf);
                of_onode += leaf.dirty[0].count_ones() + leaf.dirty[1].count_ones();
                assert_eq!(leaf.dirty[0] & leaf.dirty[1], 0, "a block is dirty in one epoch");
                if leaf.shadow != NIL {
                    let shadow = self.onodes.leaf(leaf.shadow);
                    of_onode += shadow.dirty[0].count_ones() + shadow.dirty[1].count_ones();
                }
            }
            assert_eq!(of_onode, self.onodes.get(onode).dirty_blocks, "dirty blocks of an onode");
            dirty += u64::from(of_onode);
        }
        assert_eq!(dirty, self.dirty_blocks, "dirty blocks");
        let by_volume: u64 =
            self.volumes.iter().map(|volume| volume.dirty[0] + volume.dirty[1]).sum();
        assert_eq!(dirty, by_volume, "dirty blocks by volume");
    }
}

#[cfg(test)]
mod tests;
