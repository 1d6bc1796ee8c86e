//! The loop of a data core: shards, a block queue, client connections and mailboxes, driven in
//! turns. It knows no runtime, no socket and no clock.
//!
//! An adapter owns a [`CoreLoop`] on one thread and
//!
//! * calls [`CoreLoop::turn`] whenever something may have happened: a completion, mail, bytes, or
//!   the time that the last turn named;
//! * after it asks [`CoreLoop::poll_noted`] which connections it can do something for: fill their
//!   receive buffers, send their transmit buffers, close them;
//! * sleeps between turns, by [`CoreLoop::prepare_park`] and [`CoreLoop::awake`].

mod cut;
mod memory;
mod salvage;

use std::collections::VecDeque;
use std::fmt;
use std::mem;
use std::sync::Arc;

use heeler_core::counters::Traffic;
use heeler_core::event::{Input, Output, Rejected, Reply, Request, Status, ToShard};
use heeler_core::ids::{CoreId, OpId, PageId, ShardId, VolumeId};
use heeler_core::lending::Place;
use heeler_core::limits::BATCH_BLOCKS_MAX;
use heeler_core::mailbox::{Parker, PopError, Receiver};
use heeler_core::shard::Shard;
use heeler_core::time::{Duration, Instant};
use heeler_hw::{Arena, BlockQueue, IoKind, PAGE_BYTES};

use self::cut::{CUT_ID, Cuts};
use self::memory::{Batches, Reports};
use self::salvage::{SALVAGE_ID, Saves};
use crate::device::{Device, DeviceOp, Done};
use crate::front::{ConnId, ConnectionBudget, Front, Issued, OpenError, core_of_id};
use crate::mail::{
    Blocks, CoreMail, CoreStatus, FetchedPiece, FromControl, ShardStatus, ToControl, VolumeShare,
};
use crate::post::Post;
use crate::scrub::{SCRUB_ID, Scrub, Step};
use crate::windows::{INTERVAL, ShardCounts, Windows};
use crate::wires::{CoreWires, Event};

/// Rounds of one turn: what a round makes possible the next one does, so that all of it goes to
/// the device in one submission.
const ROUNDS_MAX: usize = 4;
/// Requests taken from one connection before the others have their turn.
const ISSUES_MAX: usize = 32;
/// Steps of a session before the others have their turn.
const STEPS_MAX: u32 = 256;
/// Messages taken from one mailbox before the others have their turn.
const MAIL_MAX: usize = 64;
/// How long to wait when the kernel is short of something: nothing says when it no longer is.
const RETRY_AFTER: Duration = Duration::from_millis(1);

/// A shard and where its region lies.
#[derive(Debug)]
pub struct HostedShard<'a> {
    /// Its number.
    pub id: ShardId,
    /// First page of its region on the device.
    pub first_page: u64,
    /// The shard.
    pub shard: Shard<'a>,
}

/// What a loop is made of.
#[derive(Debug)]
pub struct CoreParts<'a, Q> {
    /// Its mailboxes.
    pub wires: CoreWires,
    /// Shards of the whole cache.
    pub shards: u16,
    /// Those of this core: `i`, `i + cores`, `i + 2 * cores` and so on, for core `i`.
    pub hosted: Vec<HostedShard<'a>>,
    /// The process's pages.
    pub arena: Arena,
    /// Pages for what clients of this core write, handed over for good.
    pub transit: Vec<PageId>,
    /// Room for connections, shared by all cores.
    pub connections: ConnectionBudget,
    /// Bytes of batches that this core may have on their way to the store.
    pub batch_bytes: usize,
    /// The core's queue on the cache device.
    pub queue: Q,
}

#[derive(Debug)]
struct Host<'a> {
    id: ShardId,
    /// First byte of the region.
    region: u64,
    shard: Shard<'a>,
    /// It was told something since its last `Input::Turn`.
    touched: bool,
    /// Requests that found all tasks in use, in order.
    backlog: VecDeque<(Request, Blocks)>,
    /// What the shard counted in the past.
    past: Windows<ShardCounts>,
    /// The volumes that the shard was told of, and what it counted for them.
    volumes: Vec<(VolumeId, Windows<Traffic>)>,
    /// Scrubs, which have their turn one after the other.
    scrubs: VecDeque<Scrub>,
    /// What is to be saved of volumes that are gone.
    saves: Saves,
    /// What is to be discarded of volumes that get smaller.
    cuts: Cuts,
    /// What it says of its memory.
    reports: Reports,
}

impl Host<'_> {
    /// Before anything happens at `now`.
    fn stamp(&mut self, now: Instant) {
        self.past.stamp(now, ShardCounts::of(&self.shard));
        for (volume, past) in &mut self.volumes {
            if let Some(traffic) = self.shard.volume_traffic(*volume) {
                past.stamp(now, traffic);
            }
        }
    }

    fn note_volume(&mut self, now: Instant, mail: ToShard) {
        match mail {
            ToShard::Attach { volume, .. }
                if self.volumes.iter().all(|(known, _)| *known != volume) =>
            {
                self.volumes.push((volume, Windows::new(now)));
            }
            ToShard::Forget { volume } => self.volumes.retain(|(known, _)| *known != volume),
            _ => {}
        }
    }

    /// The request of the scrub whose turn it is has been answered.
    fn scrub_answered(&mut self, status: Status) {
        let scrub = self.scrubs.front_mut().expect("a scrub ends after its last request");
        scrub.answered();
        if status == Status::Gone {
            self.scrubs.pop_front();
        }
    }

    fn status(&self, now: Instant) -> ShardStatus {
        let onodes = self.shard.onodes();
        let share = |(volume, past): &(VolumeId, Windows<Traffic>)| {
            let traffic = self.shard.volume_traffic(*volume)?;
            Some(VolumeShare {
                volume: *volume,
                dirty_blocks: self.shard.volume_dirty_blocks(*volume)?,
                traffic: past.spans(now, traffic),
                scrubbed: self.shard.volume_scrubbed(*volume)?,
                scrubbing: self
                    .scrubs
                    .iter()
                    .find(|scrub| scrub.volume == *volume)
                    .map(|scrub| self.shard.scrub_progress(scrub.at)),
            })
        };
        ShardStatus {
            shard: self.id,
            usage: self.shard.usage(),
            buffers: self.shard.buffers().usage(),
            budget: self.shard.budget_report(),
            onodes_pinned: u64::from(onodes.used().0 - onodes.evictable()),
            policy: self.shard.buffers().policy(),
            counts: self.past.spans(now, ShardCounts::of(&self.shard)),
            volumes: self.volumes.iter().filter_map(share).collect(),
        }
    }
}

/// What a shard is told because of what it wanted, as soon as its outputs are drained.
#[derive(Clone, Copy, Debug)]
enum Answer {
    Filled(OpId, u32),
    Release(OpId),
}

/// See the module.
pub struct CoreLoop<'a, Q> {
    core: CoreId,
    cores: usize,
    now: Instant,
    arena: Arena,
    device: Device<Q>,
    hosts: Vec<Host<'a>>,
    front: Front,
    batches: Batches,
    post: Post,
    from_cores: Vec<Option<Receiver<CoreMail>>>,
    from_control: Option<Receiver<FromControl>>,
    parker: Parker,
    event: Option<Arc<Event>>,
    /// When the shards' counts are to be stamped next, if anything happens then.
    stamp_at: Instant,
    /// The shards were told to write down what is hot.
    saving: bool,
    shards: u16,
    drained: bool,
    stopped: bool,
    answers: VecDeque<Answer>,
    crcs: Vec<u32>,
    fetched: Vec<Option<u32>>,
    loaded: Vec<u8>,
}

/// For the adapter.
impl<'a, Q: BlockQueue> CoreLoop<'a, Q> {
    /// The loop of one core.
    ///
    /// # Panics
    ///
    /// If the hosted shards are not those of the core, or a region ends behind the device's end.
    #[must_use]
    pub fn new(parts: CoreParts<'a, Q>) -> Self {
        let CoreParts { wires, shards, hosted, arena, transit, connections, batch_bytes, queue } =
            parts;
        let cores = wires.to_cores.len();
        let own = (usize::from(wires.core.0)..usize::from(shards)).step_by(cores);
        assert!(own.eq(hosted.iter().map(|hosted| usize::from(hosted.id.0))), "shards of a core");
        let host = |HostedShard { id, first_page, shard }| {
            let region = first_page * PAGE_BYTES as u64;
            Host {
                id,
                region,
                shard,
                touched: true,
                backlog: VecDeque::new(),
                past: Windows::new(Instant(0)),
                volumes: Vec::new(),
                scrubs: VecDeque::new(),
                saves: Saves::default(),
                cuts: Cuts::default(),
                reports: Reports::default(),
            }
        };
        Self {
            core: wires.core,
            cores,
            now: Instant(0),
            device: Device::new(queue),
            hosts: hosted.into_iter().map(host).collect(),
            front: Front::new(wires.core, shards, arena.clone(), transit, connections),
            batches: Batches::new(batch_bytes),
            arena,
            post: Post::new(wires.to_cores, wires.to_control),
            from_cores: wires.from_cores,
            from_control: Some(wires.from_control),
            parker: wires.parker,
            event: wires.event,
            stamp_at: Instant(0),
            saving: false,
            shards,
            drained: false,
            stopped: false,
            answers: VecDeque::new(),
            crcs: Vec::with_capacity(BATCH_BLOCKS_MAX),
            fetched: Vec::with_capacity(BATCH_BLOCKS_MAX),
            loaded: Vec::with_capacity(PAGE_BYTES),
        }
    }

    /// Does what can be done now, in bounded work, and starts device operations. Returns when to
    /// come back even if nothing happens; `now` means at once, after others had their turn.
    pub fn turn(&mut self, now: Instant) -> Option<Instant> {
        self.now = self.now.max(now);
        self.stamp();
        let mut busy = true;
        for _ in 0..ROUNDS_MAX {
            busy = self.take_completions();
            busy |= self.take_requests();
            busy |= self.take_mail();
            busy |= self.settle_shards();
            if !busy {
                break;
            }
        }
        busy |= self.send_batch();
        self.retry_device();
        self.device.start_flush();
        let submitted = self.device.submit();
        let saving = self.report_drained();
        self.report_closed();
        self.report_memory();
        let post_again = self.post.flush(self.now);
        if busy || saving || self.front.has_work() {
            return Some(self.now);
        }
        let retry = (!submitted).then_some(self.now + RETRY_AFTER);
        let timeouts = self.hosts.iter().filter_map(|host| host.shard.poll_timeout());
        timeouts.chain(retry).chain(post_again).min().map(|at| at.max(self.now))
    }

    /// A connection was accepted. Its greeting is ready.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: hang up.
    pub fn open(&mut self) -> Result<ConnId, OpenError> {
        self.front.open()
    }

    /// The adapter is done with the connection. What it was asked for goes on; nobody hears of it.
    pub fn close(&mut self, id: ConnId) {
        self.front.close(id);
    }

    /// Whether the connection has come to its end and everything it has to say is sent.
    #[must_use]
    pub fn wants_close(&self, id: ConnId) -> bool {
        self.front.wants_close(id)
    }

    /// Lends the connection's receive buffer, if bytes are needed: append received ones up to its
    /// capacity, and hand it back.
    #[must_use]
    pub fn take_rx(&mut self, id: ConnId) -> Option<Vec<u8>> {
        self.front.take_rx(id)
    }

    /// Hands the receive buffer back. Without new bytes: the client sends no more.
    pub fn give_rx(&mut self, id: ConnId, buffer: Vec<u8>) {
        self.front.give_rx(id, buffer);
    }

    /// Lends what is to be sent. `None` if there is nothing, or the last is not handed back yet.
    #[must_use]
    pub fn take_tx(&mut self, id: ConnId) -> Option<Vec<u8>> {
        self.front.take_tx(id)
    }

    /// Hands a transmit buffer back; all of it was sent.
    pub fn give_tx(&mut self, id: ConnId, buffer: Vec<u8>) {
        self.front.give_tx(id, buffer);
    }

    /// A connection for which [`take_rx`](Self::take_rx), [`take_tx`](Self::take_tx) or
    /// [`wants_close`](Self::wants_close) may have something. Drain it after each turn.
    #[must_use]
    pub fn poll_noted(&mut self) -> Option<ConnId> {
        self.front.poll_noted()
    }

    /// Says that the core is about to sleep. `true`: sleep until the core's event or the queue's
    /// is readable, a connection was given something, or the time that the last turn named; then
    /// call [`awake`](Self::awake). `false`: there is work.
    #[must_use]
    pub fn prepare_park(&mut self) -> bool {
        let Self { parker, front, from_cores, from_control, .. } = self;
        !front.has_work()
            && parker.prepare_park(|| {
                from_cores.iter().flatten().any(Receiver::has_news)
                    || from_control.iter().any(Receiver::has_news)
            })
    }

    /// The core no longer sleeps.
    pub fn awake(&mut self) {
        self.parker.awake();
    }

    /// What other threads ring when there is mail.
    #[must_use]
    pub fn event(&self) -> Option<&Arc<Event>> {
        self.event.as_ref()
    }

    /// The block queue, whose eventfd says that operations have ended.
    #[must_use]
    pub fn queue(&self) -> &Q {
        self.device.queue()
    }

    /// Whether the control thread told the loop to end.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// The core's shards, for checks.
    pub fn shards(&self) -> impl Iterator<Item = (ShardId, &Shard<'a>)> {
        self.hosts.iter().map(|host| (host.id, &host.shard))
    }

    /// Transit pages that are in no request.
    #[must_use]
    pub fn free_transit_pages(&self) -> usize {
        self.front.free_pages()
    }

    /// What the core reports to the control thread.
    #[must_use]
    pub fn status(&self) -> CoreStatus {
        CoreStatus {
            shards: self.hosts.iter().map(|host| host.status(self.now)).collect(),
            connections: self.front.open_connections() as u64,
            requests: self.front.requests(),
            mails: self.post.sent(),
        }
    }
}

/// The parts of a turn.
impl<Q: BlockQueue> CoreLoop<'_, Q> {
    /// Keeps what the shards have counted, once in each interval in which there is a turn.
    fn stamp(&mut self) {
        if self.now < self.stamp_at {
            return;
        }
        for host in &mut self.hosts {
            host.stamp(self.now);
        }
        self.stamp_at = Instant((self.now.0 / INTERVAL.0 + 1) * INTERVAL.0);
    }

    fn take_completions(&mut self) -> bool {
        let mut any = false;
        while let Some(done) = self.device.reap() {
            any = true;
            match done {
                Done::Op(op, ok) => self.end_device_op(op, ok),
                Done::Flush(ok) => {
                    while let Some((host, op)) = self.device.next_flushed() {
                        self.tell(host, Input::Device { op, ok, crcs: &[] });
                    }
                }
            }
        }
        any
    }

    fn end_device_op(&mut self, done: DeviceOp, ok: bool) {
        let DeviceOp { host, op, kind, .. } = done;
        if self.hosts[host].shard.is_load(op) {
            return self.end_load(host, op, ok);
        }
        let mut crcs = mem::take(&mut self.crcs);
        crcs.clear();
        if ok && kind == IoKind::Read {
            let pages = self.hosts[host].shard.op_pages(op);
            crcs.extend(pages.iter().map(|page| self.arena.crc(*page)));
        }
        self.tell(host, Input::Device { op, ok, crcs: &crcs });
        self.crcs = crcs;
    }

    /// Shows a page to the shard that asked for it.
    fn end_load(&mut self, host: usize, op: OpId, ok: bool) {
        let page = self.hosts[host].shard.op_pages(op)[0];
        // The page may be wanted for the next read before the shard has answered.
        let mut loaded = mem::take(&mut self.loaded);
        loaded.resize(PAGE_BYTES, 0);
        self.arena.read(page, 0, &mut loaded);
        self.tell(host, Input::Loaded { op, bytes: ok.then_some(&loaded) });
        self.loaded = loaded;
    }

    /// Connections that waited for pages come first, then all others in turn.
    fn take_requests(&mut self) -> bool {
        let mut any = false;
        for _ in 0..self.front.starving_count() {
            let Some(at) = self.front.next_fed() else { break };
            any |= self.pump(at);
        }
        for _ in 0..self.front.ready_count() {
            let Some(at) = self.front.next_ready() else { break };
            any |= self.pump(at);
        }
        any
    }

    /// Takes requests from one connection. True if there was one.
    fn pump(&mut self, at: usize) -> bool {
        let mut steps = STEPS_MAX;
        for count in 0..ISSUES_MAX {
            let Some(Issued { shard, request }) = self.front.next_issue(at, &mut steps) else {
                self.front.note(at);
                return count > 0;
            };
            let blocks = mem::take(&mut self.front.blocks);
            let core = usize::from(shard.0) % self.cores;
            if core == usize::from(self.core.0) {
                self.ask(self.host_of(shard), request, &blocks);
            } else {
                let (from, blocks) = (self.core, Blocks::new(&blocks));
                let mail = CoreMail::Request { from, shard, request, blocks };
                self.post.send_to_core(CoreId(core as u16), mail);
            }
            self.front.blocks = blocks;
        }
        self.front.wake(at);
        self.front.note(at);
        true
    }

    fn take_mail(&mut self) -> bool {
        let mut any = false;
        for core in 0..self.from_cores.len() {
            for _ in 0..MAIL_MAX {
                let Some(mail) = pop(&mut self.from_cores[core]) else { break };
                any = true;
                self.take_core_mail(mail);
            }
        }
        for _ in 0..MAIL_MAX {
            let Some(mail) = pop(&mut self.from_control) else { break };
            any = true;
            self.take_control_mail(mail);
        }
        if self.from_control.is_none() && !self.stopped {
            log::error!("core {}: the control thread has gone", self.core.0);
            self.stopped = true;
        }
        any
    }

    fn take_core_mail(&mut self, mail: CoreMail) {
        match mail {
            CoreMail::Request { from, shard, request, blocks } => {
                debug_assert_eq!(from, core_of_id(request.id));
                self.ask(self.host_of(shard), request, blocks.as_slice());
            }
            CoreMail::Reply { shard, reply, blocks } => {
                self.front.handle_reply(&reply, blocks.as_slice());
                if let Some(lease) = reply.lease {
                    let core = CoreId((usize::from(shard.0) % self.cores) as u16);
                    self.post.send_silently(core, CoreMail::Release { shard, lease });
                }
            }
            CoreMail::HandedBack { blocks } => self.front.handle_handed_back(blocks.as_slice()),
            CoreMail::Release { shard, lease } => {
                self.tell(self.host_of(shard), Input::Release(lease));
            }
        }
    }

    fn take_control_mail(&mut self, mail: FromControl) {
        match mail {
            FromControl::Shard { shard, mail } => {
                let host = self.host_of(shard);
                self.hosts[host].note_volume(self.now, mail);
                self.tell(host, Input::Keeper(mail));
            }
            FromControl::Fetched { shard, op, pieces } => {
                self.take_fetched(self.host_of(shard), op, pieces);
            }
            FromControl::Queried { shard, op, data } => {
                let (ok, data) = (data.is_some(), data.unwrap_or_default());
                self.tell(self.host_of(shard), Input::Queried { op, ok, data: &data });
            }
            FromControl::Exports(exports) => self.front.set_exports(&exports),
            FromControl::Policy(policy) => {
                for host in 0..self.hosts.len() {
                    self.tell(host, Input::Policy(policy));
                }
            }
            FromControl::Purge { force } => {
                for host in 0..self.hosts.len() {
                    self.tell(host, Input::Purge { force });
                }
            }
            FromControl::Scrub { volume } => {
                for host in &mut self.hosts {
                    host.scrubs.push_back(Scrub::new(volume));
                }
            }
            FromControl::Close { volume, ticket } => self.front.close_volume(volume, ticket),
            FromControl::ListDirty { shard, volume, at, ticket } => {
                self.list_dirty(self.host_of(shard), volume, at, ticket);
            }
            FromControl::ReadDirty { shard, volume, run, ticket } => {
                let host = self.host_of(shard);
                self.hosts[host].saves.push(ticket, volume, run);
            }
            FromControl::Cut { volume, object_blocks, blocks, ticket } => {
                for host in &mut self.hosts {
                    host.cuts.push(volume, object_blocks, blocks.clone(), ticket);
                }
            }
            FromControl::Report { ticket } => {
                let (core, status) = (self.core, self.status());
                self.post.send_to_control(ToControl::Status { ticket, core, status });
            }
            FromControl::Drain => self.front.drain(),
            FromControl::Budget { shard, budget, hurry } => {
                let host = self.host_of(shard);
                self.hosts[host].reports.set_hurry(hurry);
                self.tell(host, Input::Budget(budget));
            }
            FromControl::Below(page) => self.front.transit().set_below(page),
            FromControl::Pages { to, pages } => self.take_in_pages(to, &pages),
            FromControl::Cover { pages } => {
                self.device.cover(pages);
                self.post.send_to_control(ToControl::Covered);
            }
            FromControl::BatchesEnded { bytes } => self.batches.end(bytes),
            FromControl::Stop => self.stopped = true,
        }
    }

    /// Copies what the store gave into the pages that wait for it.
    fn take_fetched(&mut self, host: usize, op: OpId, pieces: Option<Vec<FetchedPiece>>) {
        let pages = self.hosts[host].shard.op_pages(op);
        let mut crcs = mem::take(&mut self.fetched);
        crcs.clear();
        crcs.resize(pages.len(), None);
        let ok = pieces.is_some_and(|pieces| {
            pieces.iter().all(|piece| copy_piece(&self.arena, pages, piece, &mut crcs))
        });
        self.tell(host, Input::Fetched { op, ok, crcs: &crcs });
        self.fetched = crcs;
        self.post.tell_control(ToControl::Copied { op, shard: self.hosts[host].id });
    }

    /// Ends the turn of every shard that was told something or whose time has come.
    fn settle_shards(&mut self) -> bool {
        let mut any = false;
        for at in 0..self.hosts.len() {
            self.retry_backlog(at);
            any |= self.step_scrub(at);
            any |= self.step_saves(at);
            any |= self.step_cuts(at);
            let host = &self.hosts[at];
            if host.touched || host.shard.poll_timeout().is_some_and(|when| when <= self.now) {
                self.tell(at, Input::Turn);
                self.hosts[at].touched = false;
                any = true;
            }
        }
        any
    }

    /// Goes on with a shard's scrub; true if it has something to do in the next round.
    fn step_scrub(&mut self, at: usize) -> bool {
        let host = &mut self.hosts[at];
        let Some(scrub) = host.scrubs.front_mut() else { return false };
        match scrub.step(&host.shard) {
            Step::Wait => return false,
            Step::Later => {}
            Step::Ask(request) => self.ask(at, request, &[]),
            Step::End => _ = host.scrubs.pop_front(),
        }
        true
    }

    fn retry_backlog(&mut self, at: usize) {
        while let Some((request, blocks)) = self.hosts[at].backlog.pop_front() {
            if self.feed(at, Input::Request(request, blocks.as_slice())).is_err() {
                self.hosts[at].backlog.push_front((request, blocks));
                return;
            }
        }
    }

    fn retry_device(&mut self) {
        while let Some(DeviceOp { host, op, .. }) = self.device.waiting() {
            if !self.device.retry(self.hosts[host].shard.op_pages(op)) {
                return;
            }
        }
        while let Some(DeviceOp { host, op, .. }) = self.device.waiting_push() {
            if !self.device.start_push_read(self.hosts[host].shard.op_pages(op)) {
                return;
            }
        }
    }

    /// Without connections, what is hot is what it was with the last of them: the shards write it
    /// down before the core says that it has drained.
    fn report_drained(&mut self) -> bool {
        let idle = self.front.is_draining() && self.front.open_connections() == 0;
        if !idle || self.drained || self.hosts.iter().any(|host| !host.backlog.is_empty()) {
            return false;
        }
        if !mem::replace(&mut self.saving, true) {
            (0..self.hosts.len()).for_each(|host| self.tell(host, Input::Save));
            return true;
        }
        if self.hosts.iter().all(|host| host.shard.is_saved()) {
            self.drained = true;
            self.post.send_to_control(ToControl::Drained(self.core));
        }
        false
    }
}

/// Talking to shards.
impl<Q: BlockQueue> CoreLoop<'_, Q> {
    fn host_of(&self, shard: ShardId) -> usize {
        let host = usize::from(shard.0) / self.cores;
        assert_eq!(self.hosts[host].id, shard, "shard i lives on core i % cores");
        host
    }

    /// Hands a request in, behind those that wait.
    fn ask(&mut self, at: usize, request: Request, blocks: &[heeler_core::ids::BlockRef]) {
        let behind = !self.hosts[at].backlog.is_empty();
        if behind || self.feed(at, Input::Request(request, blocks)).is_err() {
            self.hosts[at].backlog.push_back((request, Blocks::new(blocks)));
        }
    }

    /// Hands in anything but a request.
    fn tell(&mut self, at: usize, input: Input<'_>) {
        self.feed(at, input).expect("only requests are refused by a shard that is drained");
    }

    /// Hands one input in and carries out all that follows from it.
    fn feed(&mut self, at: usize, input: Input<'_>) -> Result<(), Rejected> {
        self.hosts[at].shard.handle(self.now, input)?;
        self.hosts[at].touched = true;
        self.drain_outputs(at);
        while let Some(answer) = self.answers.pop_front() {
            let input = match answer {
                Answer::Filled(op, crc) => Input::Filled { op, crc },
                Answer::Release(lease) => Input::Release(lease),
            };
            let taken = self.hosts[at].shard.handle(self.now, input);
            taken.expect("only requests are refused by a shard that is drained");
            self.drain_outputs(at);
        }
        Ok(())
    }

    fn drain_outputs(&mut self, at: usize) {
        while let Some(output) = self.hosts[at].shard.poll_output() {
            self.carry_out(at, output);
        }
    }

    fn carry_out(&mut self, at: usize, output: Output) {
        let host = &self.hosts[at];
        let shard = host.id;
        match output {
            Output::DeviceRead { op, at: page, count } => {
                self.start_device_op(at, op, IoKind::Read, page, count);
            }
            Output::DeviceLoad { op, at: page } => {
                self.start_device_op(at, op, IoKind::Read, page, 1);
            }
            Output::DeviceWrite { op, at: page, count, header } => {
                let pages = &host.shard.op_pages(op)[..header as usize];
                for (index, page) in pages.iter().enumerate() {
                    self.arena.with_mut(*page, |bytes| host.shard.encode(op, index, bytes));
                }
                self.start_device_op(at, op, IoKind::Write, page, count);
            }
            Output::DeviceFlush { op } => self.device.want_flush(at, op),
            Output::Fill { op, dst, src, keep } => {
                let crc = fill(&self.arena, dst, src, keep);
                self.answers.push_back(Answer::Filled(op, crc));
            }
            Output::CopyPage { src, dst } => self.arena.copy(dst, src, 0..PAGE_BYTES),
            Output::PagesBack { .. } => {
                let (from, pages) =
                    (Place::Shard(shard.0.into()), host.shard.pages_back().to_vec());
                self.post.send_to_control(ToControl::Pages { from, pages });
            }
            Output::Fetch { op, volume, object, first, count, gaps } => {
                self.post.send_to_control(ToControl::Fetch {
                    shard,
                    op,
                    volume,
                    object,
                    first,
                    count,
                    gaps,
                });
            }
            Output::Query { op, volume, object, first, count } => {
                self.post.send_to_control(ToControl::Query {
                    shard,
                    op,
                    volume,
                    object,
                    first,
                    count,
                });
            }
            Output::Batch { op, volume, epoch } => self.take_batch(at, op, volume, epoch),
            Output::Reply(reply) => self.pass_on(at, reply),
            Output::HandBack { id } => self.hand_back(at, id),
            Output::Late(reply) => self.pass_on_late(at, reply),
            Output::Keeper(mail) => self.tell_keeper(at, mail),
        }
    }

    fn start_device_op(&mut self, at: usize, op: OpId, kind: IoKind, page: u32, count: u32) {
        let host = &self.hosts[at];
        let pages = host.shard.op_pages(op);
        debug_assert_eq!(pages.len(), count as usize);
        let offset = host.region + u64::from(page) * PAGE_BYTES as u64;
        let push_pages = if host.shard.is_for_push(op) { pages.len() } else { 0 };
        self.device.push(DeviceOp { host: at, op, kind, offset, push_pages }, pages);
    }

    /// Brings the pages of a write that goes on waiting to the core it came from.
    fn hand_back(&mut self, at: usize, id: u64) {
        let core = core_of_id(id);
        let blocks = self.hosts[at].shard.reply_blocks();
        if core == self.core {
            self.front.handle_handed_back(blocks);
        } else {
            let blocks = Blocks::new(blocks);
            self.post.send_to_core(core, CoreMail::HandedBack { blocks });
        }
    }

    /// Brings a reply without blocks to the connection that asked.
    fn pass_on_late(&mut self, at: usize, reply: Reply) {
        if reply.id == CUT_ID {
            return self.hosts[at].cuts.answered(reply.status);
        }
        let core = core_of_id(reply.id);
        if core == self.core {
            return self.front.handle_reply(&reply, &[]);
        }
        let (shard, blocks) = (self.hosts[at].id, Blocks::new(&[]));
        self.post.send_to_core(core, CoreMail::Reply { shard, reply, blocks });
    }

    /// Brings a reply to the connection that asked, here or on another core.
    fn pass_on(&mut self, at: usize, reply: Reply) {
        match reply.id {
            SCRUB_ID => return self.hosts[at].scrub_answered(reply.status),
            SALVAGE_ID => return self.saved(at, reply),
            CUT_ID => return self.hosts[at].cuts.answered(reply.status),
            _ => {}
        }
        let host = &self.hosts[at];
        let core = core_of_id(reply.id);
        if core != self.core {
            let blocks = Blocks::new(host.shard.reply_blocks());
            let mail = CoreMail::Reply { shard: host.id, reply, blocks };
            return self.post.send_to_core(core, mail);
        }
        self.front.handle_reply(&reply, host.shard.reply_blocks());
        if let Some(lease) = reply.lease {
            self.answers.push_back(Answer::Release(lease));
        }
    }
}

impl<Q> fmt::Debug for CoreLoop<'_, Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoreLoop")
            .field("core", &self.core)
            .field("now", &self.now)
            .field("front", &self.front)
            .finish_non_exhaustive()
    }
}

/// The next message. The receiver is dropped once the sender has gone.
fn pop<T: Send>(receiver: &mut Option<Receiver<T>>) -> Option<T> {
    match receiver.as_mut()?.pop() {
        Ok(message) => Some(message),
        Err(PopError::Empty) => None,
        Err(PopError::Closed) => {
            *receiver = None;
            None
        }
    }
}

/// Carries out an `Output::Fill` and returns the page's checksum.
fn fill(arena: &Arena, dst: PageId, src: PageId, keep: (u16, u16)) -> u32 {
    for range in [0..usize::from(keep.0), usize::from(keep.1)..PAGE_BYTES] {
        if src.is_some() {
            arena.copy(dst, src, range);
        } else {
            arena.fill_zero(dst, range);
        }
    }
    arena.crc(dst)
}

/// Copies whole blocks of a fetch to their pages and notes their checksums. False if they do not
/// fit: the pages then hold anything.
fn copy_piece(
    arena: &Arena,
    pages: &[PageId],
    piece: &FetchedPiece,
    crcs: &mut [Option<u32>],
) -> bool {
    let first = usize::from(piece.at);
    let blocks = piece.bytes.chunks_exact(PAGE_BYTES);
    let fits = first + blocks.len() <= pages.len() && blocks.remainder().is_empty();
    if fits {
        for (at, block) in (first..).zip(blocks) {
            arena.write(pages[at], 0, block);
            crcs[at] = Some(arena.crc(pages[at]));
        }
    }
    fits
}
