//! All client connections of a core, and the pages their writes travel in.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use heeler_core::event::{Reply, Request, RequestKind};
use heeler_core::ids::{BlockRef, CoreId, PageId, ShardId, VolumeId};
use heeler_core::session::{Export, ID_BITS, Issue, Payload, Reason, State};
use heeler_hw::Arena;

use crate::connection::{Connection, Received, session_config};
use crate::mail::ExportInfo;
use crate::transit::{Transit, pages_of};

/// Connections of one core at most.
pub const CONNECTIONS_MAX: usize = 64;

/// A request's id: the core (8 bits), the connection's slot (8), its generation (8), and below
/// them what the session put there.
const CORE_SHIFT: u32 = 56;
const SLOT_SHIFT: u32 = 48;
const GENERATION_SHIFT: u32 = 40;

const _: () = assert!(ID_BITS <= GENERATION_SHIFT);
const _: () = assert!(CONNECTIONS_MAX <= 1 << 8);

/// The core on which the request with this id came in.
pub(crate) fn core_of_id(id: u64) -> CoreId {
    CoreId((id >> CORE_SHIFT) as u16)
}

/// A connection of one core. Slots are reused; the generation tells a late call from a right one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct ConnId {
    slot: u8,
    generation: u8,
}

impl ConnId {
    /// A number below [`CONNECTIONS_MAX`] that no other open connection of the core has.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.slot)
    }
}

/// How many connections the memory set aside for them allows, all cores together. The cores share
/// it, since the kernel deals connections out as it likes.
#[derive(Clone, Debug)]
pub struct ConnectionBudget {
    left: Arc<AtomicUsize>,
    total: usize,
}

impl ConnectionBudget {
    /// Room for so many.
    #[must_use]
    pub fn new(total: usize) -> Self {
        Self { left: Arc::new(AtomicUsize::new(total)), total }
    }

    fn take(&self) -> Result<(), OpenError> {
        // Relaxed: it is a count, and orders nothing else.
        let less = |left: usize| left.checked_sub(1);
        let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        taken.map(|_| ()).map_err(|_| OpenError::NoMemory(self.total))
    }

    fn give_back(&self) {
        self.left.fetch_add(1, Ordering::Relaxed);
    }
}

/// Why a connection is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenError {
    /// The core has [`CONNECTIONS_MAX`] already.
    TooMany,
    /// So many connections are open, and there is memory for no more.
    NoMemory(usize),
    /// The appliance is going down.
    Draining,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany => write!(f, "{CONNECTIONS_MAX} connections are open on this core"),
            Self::NoMemory(open) => write!(
                f,
                "{open} connections are open, and --memory has room for no more; give the server \
                 more, or connect with fewer"
            ),
            Self::Draining => f.write_str("the server is shutting down"),
        }
    }
}

impl std::error::Error for OpenError {}

#[derive(Debug, Default)]
struct Slot {
    generation: u8,
    connection: Option<Box<Connection>>,
}

/// A request that is to go to a shard. Its pages are in [`Front::blocks`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Issued {
    pub(crate) shard: ShardId,
    pub(crate) request: Request,
}

#[derive(Debug)]
pub(crate) struct Front {
    core: CoreId,
    shards: u16,
    arena: Arena,
    slots: Vec<Slot>,
    open: usize,
    budget: ConnectionBudget,
    /// Connections that may have something to do.
    ready: VecDeque<usize>,
    /// Connections that wait for pages, in order.
    starving: VecDeque<usize>,
    /// Connections for which the adapter may have something to do.
    noted: VecDeque<ConnId>,
    transit: Transit,
    exports: Vec<Export>,
    /// Volumes that are being closed, and the number of the order.
    closing: Vec<(VolumeId, u64)>,
    draining: bool,
    requests: u64,
    /// The pages of the request that was issued last.
    pub(crate) blocks: Vec<BlockRef>,
}

/// For the adapter.
impl Front {
    pub(crate) fn new(
        core: CoreId,
        shards: u16,
        arena: Arena,
        transit: Vec<PageId>,
        budget: ConnectionBudget,
    ) -> Self {
        Self {
            core,
            shards,
            arena,
            slots: (0..CONNECTIONS_MAX).map(|_| Slot::default()).collect(),
            open: 0,
            budget,
            ready: VecDeque::with_capacity(CONNECTIONS_MAX),
            starving: VecDeque::with_capacity(CONNECTIONS_MAX),
            noted: VecDeque::with_capacity(CONNECTIONS_MAX),
            transit: Transit::new(transit),
            exports: Vec::new(),
            closing: Vec::new(),
            draining: false,
            requests: 0,
            blocks: Vec::with_capacity(heeler_core::limits::REQUEST_BLOCKS_MAX),
        }
    }

    pub(crate) fn open(&mut self) -> Result<ConnId, OpenError> {
        if self.draining {
            return Err(OpenError::Draining);
        }
        let free = self.slots.iter().position(|slot| slot.connection.is_none());
        let at = free.ok_or(OpenError::TooMany)?;
        self.budget.take()?;
        let slot = &mut self.slots[at];
        slot.generation = slot.generation.wrapping_add(1);
        let mut connection = Box::new(Connection::new(session_config(self.shards)));
        connection.put_out(&self.arena);
        slot.connection = Some(connection);
        self.open += 1;
        self.note(at);
        Ok(self.id_of(at))
    }

    /// The adapter is done with the connection: nothing can be received or sent any more.
    pub(crate) fn close(&mut self, id: ConnId) {
        let Some(at) = self.find(id) else { return };
        let connection = self.connection(at);
        let reason = connection.session.poll_closed().unwrap_or(Reason::HungUp);
        log::debug!("core {}: connection {at} closed: {reason}", self.core.0);
        let connection = self.connection(at);
        connection.session.handle_hangup();
        connection.gone = true;
        connection.held = None;
        connection.starving = false;
        self.starving.retain(|waiting| *waiting != at);
        self.free_if_done(at);
    }

    pub(crate) fn take_rx(&mut self, id: ConnId) -> Option<Vec<u8>> {
        let at = self.find(id)?;
        self.connection(at).take_rx()
    }

    pub(crate) fn give_rx(&mut self, id: ConnId, buffer: Vec<u8>) {
        let Some(at) = self.find(id) else { return };
        self.connection(at).give_rx(buffer);
        self.wake(at);
        self.note(at);
    }

    pub(crate) fn take_tx(&mut self, id: ConnId) -> Option<Vec<u8>> {
        let at = self.find(id)?;
        let buffer = self.connection(at).take_tx();
        if buffer.is_some() {
            self.wake(at);
        }
        buffer
    }

    pub(crate) fn give_tx(&mut self, id: ConnId, buffer: Vec<u8>) {
        let Some(at) = self.find(id) else { return };
        self.connection(at).give_tx(buffer);
        self.wake(at);
        self.note(at);
    }

    pub(crate) fn wants_close(&self, id: ConnId) -> bool {
        let connection = self.find(id).and_then(|at| self.slots[at].connection.as_ref());
        connection.is_none_or(|connection| connection.is_over())
    }

    pub(crate) fn poll_noted(&mut self) -> Option<ConnId> {
        while let Some(id) = self.noted.pop_front() {
            if let Some(at) = self.find(id) {
                self.connection(at).noted = false;
                return Some(id);
            }
        }
        None
    }
}

/// For the loop.
impl Front {
    pub(crate) fn open_connections(&self) -> usize {
        self.open
    }

    pub(crate) fn requests(&self) -> u64 {
        self.requests
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining
    }

    /// Pages that travel nowhere.
    pub(crate) fn free_pages(&self) -> usize {
        self.transit.free()
    }

    /// Where pages for what clients write are.
    pub(crate) fn transit(&mut self) -> &mut Transit {
        &mut self.transit
    }

    /// Whether a call of [`Self::next_fed`] or [`Self::next_ready`] would give something.
    pub(crate) fn has_work(&self) -> bool {
        !self.ready.is_empty() || self.first_fed().is_some()
    }

    pub(crate) fn ready_count(&self) -> usize {
        self.ready.len()
    }

    pub(crate) fn starving_count(&self) -> usize {
        self.starving.len()
    }

    /// The next connection that may have something to do.
    pub(crate) fn next_ready(&mut self) -> Option<usize> {
        let at = self.ready.pop_front()?;
        if let Some(connection) = &mut self.slots[at].connection {
            connection.ready = false;
        }
        Some(at)
    }

    /// The connection that waited longest for pages, if there are enough for it now.
    pub(crate) fn next_fed(&mut self) -> Option<usize> {
        let at = self.first_fed()?;
        self.starving.pop_front();
        let connection = self.connection(at);
        connection.starving = false;
        connection.granted = true;
        Some(at)
    }

    fn first_fed(&self) -> Option<usize> {
        let at = *self.starving.front()?;
        let connection = self.slots[at].connection.as_ref().expect("closing takes it off the list");
        (self.transit.free() >= connection.needs).then_some(at)
    }

    /// The connection's next request to a shard, if it has one now. `steps` bounds the work: it
    /// counts down to 0, and then the connection has to be looked at again.
    pub(crate) fn next_issue(&mut self, at: usize, steps: &mut u32) -> Option<Issued> {
        while *steps > 0 {
            *steps -= 1;
            let connection = self.slots[at].connection.as_mut()?;
            if !connection.may_go_on() {
                return None;
            }
            let held = connection.held.take();
            if let Some(issue) = held.or_else(|| connection.session.poll_request()) {
                return self.issue_polled(at, issue);
            }
            match connection.receive(&self.exports, &self.arena) {
                Received::Again => {}
                Received::Nothing => return None,
                Received::Write(issue) => return self.issue_received(at, issue),
            }
        }
        self.wake(at);
        None
    }

    fn issue_polled(&mut self, at: usize, issue: Issue) -> Option<Issued> {
        self.blocks.clear();
        if issue.payload == Payload::Zeroes {
            if !self.has_pages(at, pages_of(&issue.request)) {
                self.connection(at).held = Some(issue);
                return None;
            }
            self.transit.load(&self.arena, &issue.request, None, &mut self.blocks);
        }
        Some(self.issued(at, issue))
    }

    fn issue_received(&mut self, at: usize, issue: Issue) -> Option<Issued> {
        if !self.has_pages(at, pages_of(&issue.request)) {
            // The session offers it again.
            return None;
        }
        let Self { slots, transit, arena, blocks, .. } = self;
        let connection = slots[at].connection.as_mut().expect("it has just received");
        let payload = connection.payload(&issue).expect("it has just been seen");
        transit.load(arena, &issue.request, Some(payload), blocks);
        connection.payload_taken(&issue, arena);
        Some(self.issued(at, issue))
    }

    fn issued(&mut self, at: usize, issue: Issue) -> Issued {
        self.requests += 1;
        self.connection(at).outstanding += 1;
        let tag = u64::from(self.core.0) << CORE_SHIFT
            | (at as u64) << SLOT_SHIFT
            | u64::from(self.slots[at].generation) << GENERATION_SHIFT;
        let request = Request { id: tag | issue.request.id, ..issue.request };
        Issued { shard: issue.shard, request }
    }

    /// Whether the connection may take so many pages now; if not, it gets in line.
    fn has_pages(&mut self, at: usize, pages: usize) -> bool {
        let others_wait = !self.starving.is_empty();
        let enough = self.transit.free() >= pages;
        let connection = self.connection(at);
        let in_turn = std::mem::take(&mut connection.granted) || !others_wait;
        if in_turn && enough {
            return true;
        }
        connection.starving = true;
        connection.needs = pages;
        self.starving.push_back(at);
        false
    }

    /// The pages of a write whose answer will come later.
    pub(crate) fn handle_handed_back(&mut self, blocks: &[BlockRef]) {
        blocks.iter().for_each(|block| self.transit.give(block.page));
    }

    /// A shard's answer. The blocks of a read are copied before this returns.
    pub(crate) fn handle_reply(&mut self, reply: &Reply, blocks: &[BlockRef]) {
        let handed_back = reply.kind == RequestKind::Write;
        if handed_back {
            blocks.iter().for_each(|block| self.transit.give(block.page));
        }
        let at = (reply.id >> SLOT_SHIFT) as u8 as usize;
        let generation = (reply.id >> GENERATION_SHIFT) as u8;
        assert_eq!(generation, self.slots[at].generation, "a slot waits for all its answers");
        let connection = self.connection(at);
        connection.outstanding -= 1;
        if connection.gone {
            return self.free_if_done(at);
        }
        let inner = Reply { id: reply.id & ((1 << GENERATION_SHIFT) - 1), ..*reply };
        let blocks = if handed_back { &[] } else { blocks };
        connection.session.handle_reply(&inner, blocks);
        self.settle(at);
    }

    /// What sessions may open from now on. Those that serve something else are ended.
    pub(crate) fn set_exports(&mut self, exports: &[ExportInfo]) {
        self.exports = exports.iter().filter_map(as_seen_by_sessions).collect();
        for at in 0..self.slots.len() {
            let Some(connection) = &self.slots[at].connection else { continue };
            let volume = connection.session.volume();
            let Some(volume) = volume else { continue };
            match self.exports.iter().find(|export| export.volume == volume) {
                Some(export) => {
                    let connection = self.slots[at].connection.as_mut().expect("found above");
                    connection.session.handle_export(export);
                }
                None => self.shut_down(at),
            }
        }
    }

    /// [`Self::poll_closed`] is to say when no session uses the volume.
    pub(crate) fn close_volume(&mut self, volume: VolumeId, ticket: u64) {
        self.closing.retain(|(known, _)| *known != volume);
        self.closing.push((volume, ticket));
    }

    /// The number of an order to close a volume that nobody uses any more.
    pub(crate) fn poll_closed(&mut self) -> Option<u64> {
        let closed = self.closing.iter().position(|(volume, _)| !self.is_used(*volume))?;
        Some(self.closing.swap_remove(closed).1)
    }

    /// Whether a session may still ask for something of the volume, or waits for an answer.
    fn is_used(&self, volume: VolumeId) -> bool {
        self.slots.iter().filter_map(|slot| slot.connection.as_ref()).any(|connection| {
            let over = connection.session.state() == State::Closed && connection.outstanding == 0;
            connection.session.volume() == Some(volume) && !over
        })
    }

    /// Ends all sessions once what is under way is done, and takes no new ones.
    pub(crate) fn drain(&mut self) {
        self.draining = true;
        for at in 0..self.slots.len() {
            if self.slots[at].connection.is_some() {
                self.shut_down(at);
            }
        }
    }

    fn shut_down(&mut self, at: usize) {
        let connection = self.connection(at);
        if !connection.gone {
            connection.session.handle_shutdown();
            self.settle(at);
        }
    }

    /// After anything that may have changed what a session has to say or to ask.
    fn settle(&mut self, at: usize) {
        let connection = self.slots[at].connection.as_mut().expect("it is open");
        connection.put_out(&self.arena);
        self.wake(at);
        self.note(at);
    }

    fn find(&self, id: ConnId) -> Option<usize> {
        let slot = &self.slots[id.index()];
        let open = slot.connection.as_ref().is_some_and(|connection| !connection.gone);
        (open && slot.generation == id.generation).then_some(id.index())
    }

    fn connection(&mut self, at: usize) -> &mut Connection {
        self.slots[at].connection.as_mut().expect("the slot is in use")
    }

    fn id_of(&self, at: usize) -> ConnId {
        ConnId { slot: at as u8, generation: self.slots[at].generation }
    }

    fn free_if_done(&mut self, at: usize) {
        let connection = self.connection(at);
        if connection.gone && connection.outstanding == 0 {
            self.slots[at].connection = None;
            self.budget.give_back();
            self.ready.retain(|ready| *ready != at);
            self.open -= 1;
        }
    }

    /// The connection may have something to do.
    pub(crate) fn wake(&mut self, at: usize) {
        let Some(connection) = &mut self.slots[at].connection else { return };
        if !connection.ready && !connection.gone {
            connection.ready = true;
            self.ready.push_back(at);
        }
    }

    /// The adapter may have something to do for the connection.
    pub(crate) fn note(&mut self, at: usize) {
        let id = self.id_of(at);
        let Some(connection) = &mut self.slots[at].connection else { return };
        if !connection.noted && !connection.gone {
            connection.noted = true;
            self.noted.push_back(id);
        }
    }
}

fn as_seen_by_sessions(export: &ExportInfo) -> Option<Export> {
    let Ok(name) = export.name.as_str().try_into() else {
        log::error!("volume {:?}: the name is too long to be served", export.name);
        return None;
    };
    Some(Export {
        name,
        volume: export.volume,
        bytes: export.bytes,
        object_shift: export.object_shift,
        read_only: export.read_only,
    })
}
