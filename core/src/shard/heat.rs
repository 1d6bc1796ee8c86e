//! Heat: what is in RAM, in which order, and what the policy knows, so that it is there again after
//! a restart.
//!
//! ```text
//! Idle --a volume was attached--> Finding --newest record--> Warming --all, or RAM is full--> Idle
//!      --enough has changed-----> Saving ---its head is written-----------------------------> Idle
//! ```
//!
//! A record names blocks and holds no data: what it says is asked of the index, and read and
//! checked like any other block. So an old record can make nothing wrong, and nothing waits for a
//! record to be durable. Two copies alternate; the head, written last, makes one count.
//!
//! A record is written in slices while the shard goes on, so it shows no single moment. It is
//! written only after something changed, and so seldom that it takes a bounded rate of the device.
//!
//! `save` walks the tables and writes, `warm` reads and brings back.

mod save;
mod warm;

use alloc::boxed::Box;

use super::{Op, Shard};
use crate::config::ShardConfig;
use crate::event::Output;
use crate::ids::{BLOCK_BYTES, OpId, PageId, VolumeId};
use crate::limits::VOLUMES_MAX;
use crate::time::{Duration, Instant};
use crate::wire::heat::RecordHead;
use save::Walk;
use warm::{Phase, Run, Warming};

/// Pages that are written at a time.
pub(super) const SLICE_PAGES: usize = 4;
/// Blocks, or places of the tables, that one turn looks at.
const LOOK_SLICE: usize = 512;
/// Time between two slices.
const SLICE_EVERY: Duration = Duration::from_millis(1);
/// Time that a page written puts the next record off: a record takes at most 512 KiB a second.
const PAGE_EVERY: Duration = Duration::from_millis(8);
/// Of the shard's pages, the part that must have changed for a record to be written soon...
const CHANGED_PART: u64 = 128;
/// ... and how many times longer it waits if less has.
const LAZY: u64 = 12;
/// How long the record waits for volumes that have something in the log and are not attached yet:
/// they are not in the next one.
const ATTACH_MAX: Duration = Duration::from_secs(60);
/// Uses that count as one change: they change what is known of a buffer, not that it is there.
const USES_OF_CHANGE: u64 = 8;

#[derive(Clone, Copy, Debug)]
enum State {
    Idle,
    /// Reading the head of a copy; the newest one so far.
    Finding {
        copy: u32,
        newest: Option<(u64, RecordHead)>,
    },
    Warming(Warming),
    Saving(Walk),
}

#[derive(Debug)]
pub(super) struct Heat {
    /// First page of the region's area, and pages of each copy. None: nothing is kept.
    start: u32,
    copy_pages: u32,
    /// What is written from or read to.
    pages: Box<[PageId]>,
    /// The pages being made, or the one being read.
    bytes: Box<[u8]>,
    /// Pages of the operation under way; 0: there is none.
    in_flight: usize,
    state: State,
    /// Of the newest record.
    generation: u64,
    /// What was learned in a former life has been taken over, if anything was found.
    resumed: bool,
    /// Volumes that were attached and wait for their turn.
    cold: heapless::Vec<VolumeId, VOLUMES_MAX>,
    /// Volumes whose turn it is.
    warming: heapless::Vec<VolumeId, VOLUMES_MAX>,
    /// The fill being put together.
    run: Option<Run>,
    /// Fills under way.
    fills: u32,
    /// The store could not give what was asked of it.
    store_failed: bool,
    /// When the first volume was attached.
    since: Instant,
    /// Changes when the last record was begun.
    changes: u64,
    /// When no record is begun before.
    rest_until: Instant,
    /// The next slice is not written before.
    slice_at: Instant,
    /// The shard is about to end: one more record, and no warming.
    closing: bool,
}

impl Heat {
    pub(super) fn new(config: &ShardConfig, pages: &[PageId]) -> Self {
        let layout = &config.layout;
        Self {
            start: layout.segment_pages * layout.segments,
            copy_pages: config.heat_pages / 2,
            pages: pages.into(),
            bytes: core::iter::repeat_n(0, pages.len() * BLOCK_BYTES).collect(),
            in_flight: 0,
            state: State::Idle,
            generation: 0,
            resumed: false,
            cold: heapless::Vec::new(),
            warming: heapless::Vec::new(),
            run: None,
            fills: 0,
            store_failed: false,
            since: Instant(0),
            changes: 0,
            rest_until: Instant(0),
            slice_at: Instant(0),
            closing: false,
        }
    }

    /// Pages that it needs.
    pub(super) const fn pages_of(config: &ShardConfig) -> usize {
        if config.heat_pages == 0 { 0 } else { SLICE_PAGES }
    }

    pub(super) fn op_pages(&self) -> &[PageId] {
        &self.pages[..self.in_flight]
    }

    pub(super) fn encode(&self, index: usize, page: &mut [u8]) {
        page.copy_from_slice(&self.bytes[index * BLOCK_BYTES..][..BLOCK_BYTES]);
    }

    /// A volume was attached: what was hot of it is brought back. Of more than there can be at a
    /// time, as they come and go, some stay cold.
    pub(super) fn note_attached(&mut self, volume: VolumeId) {
        if self.copy_pages > 0 && !self.cold.contains(&volume) {
            self.cold.push(volume).ok();
        }
    }
}

impl Shard<'_> {
    /// The next step of a record or of warming; at the end of a turn, after all that clients wait
    /// for.
    pub(super) fn step_heat(&mut self) {
        if self.heat.copy_pages == 0 || self.heat.in_flight > 0 {
            return;
        }
        match self.heat.state {
            State::Idle if !self.heat.cold.is_empty() && !self.heat.closing => {
                self.heat.warming = core::mem::take(&mut self.heat.cold);
                self.heat.state = State::Finding { copy: 0, newest: None };
                self.load_heat(0, 0);
            }
            State::Idle if self.record_is_due() => self.begin_record(),
            State::Idle | State::Finding { .. } => {}
            State::Warming(warming) => self.step_warming(warming),
            State::Saving(walk) if self.now >= self.heat.slice_at => self.step_saving(walk),
            State::Saving(_) => {}
        }
    }

    /// When the next step is to be taken even if nothing happens.
    pub(super) fn heat_timeout(&self) -> Option<Instant> {
        if self.heat.in_flight > 0 {
            return None;
        }
        match self.heat.state {
            State::Idle => self.record_at(),
            State::Saving(_) => Some(self.heat.slice_at),
            State::Finding { .. } | State::Warming(_) => None,
        }
    }

    /// The shard is about to end: writes what is hot down, if it has changed since that was done.
    /// [`is_saved`](Self::is_saved) says when it has ended.
    pub(super) fn save(&mut self) {
        self.heat.closing = true;
        self.heat.slice_at = self.now;
        self.again = true;
    }

    /// Whether nothing is left to do of `Input::Save`.
    #[must_use]
    pub fn is_saved(&self) -> bool {
        let saving = matches!(self.heat.state, State::Saving(_));
        let idle = matches!(self.heat.state, State::Idle);
        self.heat.closing && !saving && !(idle && self.record_is_due())
    }

    /// Whether an operation that was polled reads a page whose bytes the shard wants to see.
    #[must_use]
    pub fn is_load(&self, op: OpId) -> bool {
        self.op(op) == Some(Op::Heat) && !matches!(self.heat.state, State::Saving(_))
    }

    /// Whether what was hot before the start is not all there yet.
    pub(super) fn is_cold(&self) -> bool {
        let warming = matches!(self.heat.state, State::Finding { .. } | State::Warming(_));
        self.heat.copy_pages > 0 && (warming || self.heat.fills > 0 || !self.heat.resumed)
    }

    /// Something like the number of pages that have changed, and uses.
    fn heat_changes(&self) -> u64 {
        let buffers = self.buffers.counters();
        let dropped = self.counters.discarded_blocks + self.counters.purged_blocks;
        buffers.misses
            + buffers.evictions
            + self.traffic.written_blocks
            + dropped
            + buffers.hits / USES_OF_CHANGE
    }

    /// When a record is to be begun, if nothing else changes.
    fn record_at(&self) -> Option<Instant> {
        let changes = self.heat_changes() - self.heat.changes;
        // Before the first search it is not known which copy is the older one.
        if changes == 0 || !self.heat.resumed {
            return None;
        }
        if !self.recovered.is_empty() && self.now - self.heat.since < ATTACH_MAX {
            return Some(self.heat.since + ATTACH_MAX);
        }
        if self.heat.closing {
            return Some(self.now);
        }
        let enough = changes >= u64::from(self.buffers.capacity()) / CHANGED_PART;
        let lazy = Duration(self.config.heat_every.0 * LAZY);
        Some(self.heat.rest_until + if enough { Duration(0) } else { lazy })
    }

    fn record_is_due(&self) -> bool {
        self.record_at().is_some_and(|at| at <= self.now)
    }

    /// Reads a page of a copy.
    fn load_heat(&mut self, copy: u32, page: u32) {
        let op = self.start_op(Op::Heat);
        self.heat.in_flight = 1;
        let at = self.heat.start + copy * self.heat.copy_pages + page;
        self.emit(Output::DeviceLoad { op, at });
    }

    /// What was read, if it could be.
    pub(super) fn handle_loaded(&mut self, op: OpId, bytes: Option<&[u8]>) {
        let Some(Op::Heat) = self.end_op(op) else { return };
        self.heat.in_flight = 0;
        self.again = true;
        match self.heat.state {
            State::Finding { copy, newest } => self.note_copy(copy, newest, bytes),
            State::Warming(warming) => self.take_in_page(warming, bytes),
            State::Idle | State::Saving(_) => panic!("nothing was to be read"),
        }
    }

    /// The head of a copy, if it could be read.
    fn note_copy(&mut self, copy: u32, newest: Option<(u64, RecordHead)>, bytes: Option<&[u8]>) {
        let ShardConfig { layout, crc32c, .. } = self.config;
        let record = bytes
            .and_then(|bytes| RecordHead::open(bytes, layout.region, self.heat.copy_pages, crc32c));
        let older = |(generation, _): &(u64, RecordHead)| {
            record.is_none_or(|(other, _)| *generation >= other)
        };
        let newest = newest.filter(older).or(record);
        if copy == 0 {
            self.heat.state = State::Finding { copy: 1, newest };
            return self.load_heat(1, 0);
        }
        let Some((generation, head)) = newest else { return self.end_warming() };
        self.heat.generation = self.heat.generation.max(generation);
        let phase = if self.heat.resumed { Phase::Referenced } else { Phase::Learned };
        self.heat.state = State::Warming(Warming::new(generation, head, phase));
    }

    fn end_warming(&mut self) {
        self.heat.state = State::Idle;
        if !core::mem::replace(&mut self.heat.resumed, true) {
            self.heat.since = self.now;
        }
        self.heat.store_failed = false;
        self.heat.warming.clear();
        // Volumes that come a moment later find the record as it is.
        self.put_records_off(Duration(2 * self.config.heat_every.0));
        self.again = true;
    }

    fn put_records_off(&mut self, span: Duration) {
        self.heat.rest_until = self.now + span;
    }
}
