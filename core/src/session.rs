//! The server's side of one NBD connection.
//!
//! A [`Session`] reads what the client sent, cuts it into requests to shards, and turns the shards'
//! replies into what goes back. It knows no socket and never touches payload: it says how many of
//! the received bytes belong to a request, and which pages belong to a reply.
//!
//! | state | left when | to |
//! |---|---|---|
//! | Greeting | the client's flags came | Haggling |
//! | Haggling | an export was chosen | Transmission |
//! | | ABORT | Draining |
//! | Transmission | DISC, or [`Session::handle_shutdown`] | Draining |
//! | Draining | every request has been answered | Closed |
//! | any | malformed bytes, [`Session::handle_hangup`] | Closed |
//!
//! The contract is one mutation, then drain: after each `handle_*` call [`Session::poll_output`] is
//! called until it gives `None`. [`Session::poll_request`] is called until `None` after each
//! `handle_*` call for which there is room (see [`Config::tx_bytes_max`]).
//!
//! Nothing is allocated after [`Session::new`].

mod cut;
mod haggle;
#[cfg(test)]
mod tests;

use core::fmt;

use slab::Slab;

use crate::event::{Reply, Request, Status};
use crate::ids::{BLOCK_BYTES, BlockRef, PageId, ShardId, VolumeId};
use crate::limits::{EXPORT_NAME_BYTES_MAX, NBD_REQUEST_BYTES_MAX, REQUEST_BLOCKS_MAX, SHARDS_MAX};
use crate::wire::nbd::{
    BASE_ALLOCATION_ID, CHUNK_HEADER_BYTES, REQUEST_BYTES, RequestHeader, STATE_HOLE_ZERO, chunk,
    chunk_header, command, errno, flag, greeting, handshake, simple_reply,
};
use cut::{ChunkId, Kind, Op, Open};
use haggle::Haggle;

pub use cut::{ID_BITS, REQUESTS_MAX};
pub use haggle::OPTION_BYTES_MAX;

/// Bytes that a receive buffer must be able to hold: the longest payload of one request to a shard,
/// with the header before it. The longest option is shorter.
pub const RX_BYTES_MIN: usize = REQUEST_BYTES + REQUEST_BLOCKS_MAX * BLOCK_BYTES;
/// Bytes of headers that one reply, or one chunk of a reply with data, has at most.
const HEADER_BYTES_MAX: u32 = 32;
/// Bytes besides payload that one call puts out at most.
const OUT_BYTES_MAX: usize = 512;
/// Extents in one answer to BLOCK_STATUS at most; the client asks again for the rest.
const EXTENTS_MAX: usize = 32;

const _: () = assert!(RX_BYTES_MIN > OPTION_BYTES_MAX + 16);
const _: () = assert!(OUT_BYTES_MAX >= CHUNK_HEADER_BYTES + 4 + 8 * EXTENTS_MAX);

/// How a session is built.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Requests of the client in progress at most, 1 to [`REQUESTS_MAX`].
    pub requests_max: u16,
    /// Requests to shards in flight at most, at least 1.
    pub chunks_max: u16,
    /// Shards of the cache.
    pub shards: u16,
    /// Bytes of reads in flight at most, at least [`Config::TX_WINDOW_MIN`].
    pub tx_window_bytes: u32,
}

impl Config {
    /// The smallest [`Config::tx_window_bytes`]: one read of the longest kind.
    pub const TX_WINDOW_MIN: u32 = (REQUEST_BLOCKS_MAX * BLOCK_BYTES) as u32 + HEADER_BYTES_MAX;

    /// Bytes that a session puts out at most when it is given no more bytes and asked for no more
    /// requests. A driver that calls [`Session::handle_bytes`] and [`Session::poll_request`] only
    /// while this much is free in its transmit buffer finds room for every output.
    #[must_use]
    pub const fn tx_bytes_max(&self) -> usize {
        self.tx_window_bytes as usize
            + self.requests_max as usize * HEADER_BYTES_MAX as usize
            + OUT_BYTES_MAX
    }
}

/// A volume, or a snapshot, as clients see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Export {
    /// Its name.
    pub name: heapless::String<EXPORT_NAME_BYTES_MAX>,
    /// Its number.
    pub volume: VolumeId,
    /// Its size.
    pub bytes: u64,
    /// log2 of its object size in bytes.
    pub object_shift: u8,
    /// Changes are refused.
    pub read_only: bool,
}

/// A request to a shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Issue {
    /// To which shard.
    pub shard: ShardId,
    /// The request. Its id has no bit set above the lowest [`ID_BITS`].
    pub request: Request,
    /// What its pages hold.
    pub payload: Payload,
}

/// What a request's pages hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Payload {
    /// It takes no pages.
    None,
    /// `len` bytes of zeroes, at `offset`.
    Zeroes,
    /// The next `len` received bytes, at `offset`.
    Received,
}

/// What became of received bytes.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    /// So many from the front are done with.
    pub consumed: usize,
    /// What can happen next.
    pub next: Next,
}

/// What can happen after [`Session::handle_bytes`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Nothing until more bytes have come.
    Bytes,
    /// Another call at once.
    Again,
    /// Nothing until [`Session::poll_request`] gave a request or a reply came.
    Wait,
    /// The bytes after the consumed ones are this write's payload, `request.len` of them. The
    /// driver copies them into pages when it has both, issues the write, and says so by
    /// [`Session::handle_payload`]. Until then every call gives the same answer.
    Payload(Issue),
    /// Nothing any more: the rest of what is received means nothing.
    Closed,
}

/// What goes to the client, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Out<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// The bytes `from..to` of a page that the reply lent.
    Page {
        /// The page.
        page: PageId,
        /// First byte.
        from: u16,
        /// The byte after the last.
        to: u16,
    },
    /// So many zeroes.
    Zeroes(u32),
}

/// Where a session stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// The greeting is out; the client's flags have not come.
    Greeting,
    /// Options are negotiated.
    Haggling,
    /// Requests are served.
    Transmission,
    /// No request is taken any more; those in progress are finished.
    Draining,
    /// Nothing comes out any more. The connection can be closed once [`Session::in_flight`] is 0.
    Closed,
}

/// Why a session came to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// The client said goodbye.
    Disconnected,
    /// The client gave up the negotiation.
    Aborted,
    /// The client named an unknown export in a way that has no error reply.
    UnknownExport,
    /// The client does not speak the protocol.
    Malformed(&'static str),
    /// A read failed after its reply had begun, and the protocol has no way to say so.
    Torn,
    /// The connection broke.
    HungUp,
    /// The server is going away.
    Shutdown,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disconnected => f.write_str("client disconnected"),
            Self::Aborted => f.write_str("client aborted the negotiation"),
            Self::UnknownExport => f.write_str("client asked for an unknown export"),
            Self::Malformed(what) => write!(f, "protocol violated: {what}"),
            Self::Torn => f.write_str("a read failed after its reply had begun"),
            Self::HungUp => f.write_str("connection lost"),
            Self::Shutdown => f.write_str("server shut down"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Greeting,
    Haggling(Haggle),
    Transmission,
    Draining(Reason),
    Closed(Reason),
}

/// Whose payload the received bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Intake {
    /// Nobody's: a request's header comes next.
    Header,
    /// Of this op.
    Write(u16),
    /// Of a refused write: thrown away, then the error is answered.
    Refused { left: u32, cookie: u64, errno: u32 },
}

/// One NBD connection. See the module's text.
#[derive(Debug)]
pub struct Session {
    config: Config,
    phase: Phase,
    /// The client declined the padding after EXPORT_NAME's answer.
    no_zeroes: bool,
    /// Structured replies were negotiated.
    structured: bool,
    /// The volume for which `base:allocation` was chosen.
    status_of: Option<VolumeId>,
    open: Open,
    ops: Slab<Op>,
    serial: u16,
    /// The op that is being cut. One at a time: no header is read while there is one.
    cutting: Option<u16>,
    intake: Intake,
    /// Requests that shards have not answered.
    in_flight: u32,
    /// Bytes of the reads in flight, with their headers.
    reserved_bytes: u32,
    /// The extents found by the status query that is being cut.
    extents: heapless::Vec<(u32, bool), EXTENTS_MAX>,
    strays: u64,
    out: heapless::Vec<u8, OUT_BYTES_MAX>,
    /// `out` has been given to the driver.
    out_given: bool,
    lent: Lent,
}

impl Session {
    /// A session at the start of a connection: its greeting is ready in
    /// [`poll_output`](Self::poll_output).
    ///
    /// # Panics
    ///
    /// If a value of `config` is out of the range its text gives.
    #[must_use]
    pub fn new(config: Config) -> Self {
        assert!((1..=REQUESTS_MAX).contains(&config.requests_max), "requests_max");
        assert!(config.chunks_max >= 1, "chunks_max");
        assert!((1..=SHARDS_MAX).contains(&usize::from(config.shards)), "shards");
        assert!(config.tx_window_bytes >= Config::TX_WINDOW_MIN, "tx_window_bytes");
        let mut session = Self {
            config,
            phase: Phase::Greeting,
            no_zeroes: false,
            structured: false,
            status_of: None,
            open: Open::NONE,
            ops: Slab::with_capacity(usize::from(config.requests_max)),
            serial: 0,
            cutting: None,
            intake: Intake::Header,
            in_flight: 0,
            reserved_bytes: 0,
            extents: heapless::Vec::new(),
            strays: 0,
            out: heapless::Vec::new(),
            out_given: false,
            lent: Lent::default(),
        };
        session.put(&greeting(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES));
        session
    }

    /// Where the session stands.
    #[must_use]
    pub fn state(&self) -> State {
        match self.phase {
            Phase::Greeting => State::Greeting,
            Phase::Haggling(_) => State::Haggling,
            Phase::Transmission => State::Transmission,
            Phase::Draining(_) => State::Draining,
            Phase::Closed(_) => State::Closed,
        }
    }

    /// Why the session was closed, once it is.
    #[must_use]
    pub fn poll_closed(&self) -> Option<Reason> {
        match self.phase {
            Phase::Closed(reason) => Some(reason),
            _ => None,
        }
    }

    /// Requests to shards without an answer. Their replies are still to be handed in after the
    /// session was closed; they put nothing out.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// The volume that is served, once an export was chosen.
    #[must_use]
    pub fn volume(&self) -> Option<VolumeId> {
        self.open.is_chosen().then_some(self.open.volume)
    }

    /// The export that is served has changed: requests that come from now on are judged by this.
    pub fn handle_export(&mut self, export: &Export) {
        assert_eq!(self.volume(), Some(export.volume), "the export that is served");
        self.open.bytes = export.bytes;
        self.open.read_only = export.read_only;
    }

    /// Replies that belonged to no request in flight and were dropped.
    #[must_use]
    pub fn strays(&self) -> u64 {
        self.strays
    }

    /// Takes received bytes: at most one option or one request for each call. `exports` is what can
    /// be served now; it is looked at only while options are negotiated.
    #[inline]
    pub fn handle_bytes(&mut self, rx: &[u8], exports: &[Export]) -> Taken {
        self.start_mutation();
        match self.phase {
            Phase::Transmission => self.take_transmission(rx),
            Phase::Greeting => self.take_client_flags(rx),
            Phase::Haggling(at) => self.take_haggling(at, rx, exports),
            Phase::Draining(_) | Phase::Closed(_) => {
                Taken { consumed: rx.len(), next: Next::Closed }
            }
        }
    }

    /// The write that [`Next::Payload`] offered has been issued, with its `bytes` of payload.
    ///
    /// # Panics
    ///
    /// If no write was offered, or `bytes` is not its length.
    #[inline]
    pub fn handle_payload(&mut self, bytes: u32) {
        self.start_mutation();
        let Intake::Write(slot) = self.intake else { panic!("no payload was asked for") };
        let op = &mut self.ops[usize::from(slot)];
        let (_, covers) = op.next_issue(slot, &self.open, self.config.shards);
        assert_eq!(bytes, covers, "a write is issued whole");
        op.begin_chunk(covers);
        self.in_flight += 1;
        if op.cut == op.len {
            self.intake = Intake::Header;
        }
    }

    /// The next request to a shard, if one can be issued now. Writes with received payload do not
    /// come out here but by [`Next::Payload`]. It counts as issued: its reply must be handed in.
    #[inline]
    #[must_use]
    pub fn poll_request(&mut self) -> Option<Issue> {
        let slot = self.cutting?;
        let alone = self.ops.len() == 1;
        let op = &mut self.ops[usize::from(slot)];
        let in_turn = match op.kind {
            Kind::Status { .. } => op.outstanding == 0,
            _ => !op.exclusive || (alone && op.outstanding == 0),
        };
        if !in_turn || self.in_flight >= u32::from(self.config.chunks_max) {
            return None;
        }
        let (issue, covers) = op.next_issue(slot, &self.open, self.config.shards);
        if op.kind == Kind::Read {
            let bytes = covers + HEADER_BYTES_MAX;
            if bytes > self.config.tx_window_bytes - self.reserved_bytes {
                return None;
            }
            self.reserved_bytes += bytes;
        }
        op.begin_chunk(covers);
        self.in_flight += 1;
        // An op whose chunks are taken in turn keeps the place until its last reply.
        if op.cut == op.len && !op.is_serial() {
            self.cutting = None;
        }
        Some(issue)
    }

    /// A shard's answer. `blocks`: the pages that a read lends, the extents that a status query
    /// found, else empty. The pages are used until [`poll_output`](Self::poll_output) gave `None`.
    ///
    /// # Panics
    ///
    /// If a read that went well does not come with the blocks it covers.
    #[inline]
    pub fn handle_reply(&mut self, reply: &Reply, blocks: &[BlockRef]) {
        self.start_mutation();
        let Some((id, op)) = self.find_chunk(reply.id) else {
            self.strays += 1;
            return;
        };
        op.outstanding -= 1;
        if reply.status != Status::Ok {
            op.fail(errno_of(reply.status, op.kind));
        }
        let op = *op;
        self.in_flight -= 1;
        if op.kind == Kind::Read {
            let (_, len) = op.chunk_range(id.chunk, &self.open);
            self.reserved_bytes -= len + HEADER_BYTES_MAX;
        }
        if matches!(self.phase, Phase::Closed(_)) {
            return;
        }
        if op.error != 0 && op.kind != Kind::Write {
            self.give_up(id.slot);
        }
        match op.kind {
            Kind::Read if op.exclusive => self.end_exclusive(id, blocks),
            Kind::Read => self.end_read(id, blocks),
            Kind::Status { one } => self.end_status(id, one, blocks),
            _ => self.end_if_finished(id.slot),
        }
    }

    /// The connection is gone: nothing can be received or sent any more.
    pub fn handle_hangup(&mut self) {
        self.out.clear();
        self.lent.left = 0;
        self.close(Reason::HungUp);
    }

    /// The server is going away: no request is taken any more, those in progress are finished. A
    /// write whose payload has not wholly come is not.
    pub fn handle_shutdown(&mut self) {
        self.start_mutation();
        match self.phase {
            Phase::Greeting | Phase::Haggling(_) => self.close(Reason::Shutdown),
            Phase::Transmission => {
                self.phase = Phase::Draining(Reason::Shutdown);
                if let Intake::Write(slot) = self.intake {
                    let op = &mut self.ops[usize::from(slot)];
                    op.fail(errno::ESHUTDOWN);
                    op.cut = op.len;
                    self.end_if_finished(slot);
                }
                self.intake = Intake::Header;
            }
            Phase::Draining(_) | Phase::Closed(_) => {}
        }
    }

    /// What goes to the client next. Valid after any other call; `None` when all is given.
    #[inline]
    #[must_use]
    pub fn poll_output(&mut self) -> Option<Out<'_>> {
        if !self.out_given && !self.out.is_empty() {
            self.out_given = true;
            return Some(Out::Bytes(&self.out));
        }
        if self.lent.left > 0 {
            return Some(self.lent.take());
        }
        if let Phase::Draining(reason) = self.phase
            && self.ops.is_empty()
        {
            self.phase = Phase::Closed(reason);
        }
        None
    }
}

/// Taking requests.
impl Session {
    #[inline]
    fn take_transmission(&mut self, rx: &[u8]) -> Taken {
        match self.intake {
            Intake::Header => {}
            Intake::Write(slot) => return self.take_payload(slot, rx),
            Intake::Refused { left, cookie, errno } => return self.refuse(left, cookie, errno, rx),
        }
        if self.cutting.is_some() || self.ops.len() == usize::from(self.config.requests_max) {
            return Taken { consumed: 0, next: Next::Wait };
        }
        let Some((header, rest)) = rx.split_first_chunk::<REQUEST_BYTES>() else {
            return Taken { consumed: 0, next: Next::Bytes };
        };
        let Ok(header) = RequestHeader::decode(header) else {
            return self.violate("no request magic");
        };
        self.accept(&header);
        match self.intake {
            // What is offered at once needs no second call.
            Intake::Write(slot) => {
                let taken = self.take_payload(slot, rest);
                Taken { consumed: REQUEST_BYTES + taken.consumed, next: taken.next }
            }
            _ => Taken { consumed: REQUEST_BYTES, next: Next::Again },
        }
    }

    #[inline]
    fn take_payload(&mut self, slot: u16, rx: &[u8]) -> Taken {
        let op = &mut self.ops[usize::from(slot)];
        if op.error == 0 {
            if self.in_flight >= u32::from(self.config.chunks_max) {
                return Taken { consumed: 0, next: Next::Wait };
            }
            let (issue, _) = op.next_issue(slot, &self.open, self.config.shards);
            return Taken { consumed: 0, next: Next::Payload(issue) };
        }
        // A part of it failed: the rest is of no use.
        let skipped = rx.len().min((op.len - op.cut) as usize);
        op.cut += skipped as u32;
        if op.cut < op.len {
            return Taken { consumed: skipped, next: Next::Bytes };
        }
        self.intake = Intake::Header;
        self.end_if_finished(slot);
        Taken { consumed: skipped, next: Next::Again }
    }

    fn refuse(&mut self, left: u32, cookie: u64, errno: u32, rx: &[u8]) -> Taken {
        let skipped = rx.len().min(left as usize);
        let left = left - skipped as u32;
        if left > 0 {
            self.intake = Intake::Refused { left, cookie, errno };
            return Taken { consumed: skipped, next: Next::Bytes };
        }
        self.intake = Intake::Header;
        self.put(&simple_reply(cookie, errno));
        Taken { consumed: skipped, next: Next::Again }
    }

    #[inline]
    fn accept(&mut self, header: &RequestHeader) {
        if header.command == command::DISC {
            self.phase = Phase::Draining(Reason::Disconnected);
            return;
        }
        match self.judge(header) {
            Err(errno) if header.command == command::WRITE && header.len > 0 => {
                self.intake = Intake::Refused { left: header.len, cookie: header.cookie, errno };
            }
            Err(errno) => {
                let structured = matches!(header.command, command::READ | command::BLOCK_STATUS);
                self.put_end(header.cookie, structured, errno);
            }
            Ok(op) if op.len == 0 => self.put_end(op.cookie, op.kind == Kind::Read, 0),
            Ok(op) => self.begin(op),
        }
    }

    /// Turns a header into an op, or says by an error number why not.
    #[inline]
    fn judge(&self, header: &RequestHeader) -> Result<Op, u32> {
        let &RequestHeader { flags, command, cookie, offset, len } = header;
        let mut op = Op::new(cookie, offset, len);
        let mut allowed = flag::FUA;
        match command {
            command::READ => {
                if self.structured {
                    allowed |= flag::DF;
                }
            }
            command::WRITE => op.kind = Kind::Write,
            command::FLUSH => return self.judge_flush(op, flags),
            command::TRIM => op.kind = Kind::Discard,
            command::CACHE => op.kind = Kind::Cache,
            command::WRITE_ZEROES => {
                allowed |= flag::NO_HOLE | flag::FAST_ZERO;
                op.kind = Kind::Zero { allocate: flags & flag::NO_HOLE != 0 };
            }
            command::BLOCK_STATUS if self.open.status => {
                allowed |= flag::REQ_ONE;
                op.kind = Kind::Status { one: flags & flag::REQ_ONE != 0 };
            }
            _ => return Err(errno::EINVAL),
        }
        if flags & !allowed != 0 {
            return Err(errno::EINVAL);
        }
        self.judge_range(&op)?;
        op.fua = flags & flag::FUA != 0 && op.kind.changes();
        match op.kind {
            Kind::Read => op.exclusive = self.is_exclusive(&op, flags),
            Kind::Zero { allocate: true } if flags & flag::FAST_ZERO != 0 => {
                return Err(errno::ENOTSUP);
            }
            Kind::Discard => op.shrink_to_blocks(),
            Kind::Status { .. } if len == 0 => return Err(errno::EINVAL),
            Kind::Status { .. } => {
                op.len = self.open.object_left(offset).min(u64::from(len)) as u32;
            }
            _ => {}
        }
        Ok(op)
    }

    fn judge_flush(&self, mut op: Op, flags: u16) -> Result<Op, u32> {
        if op.offset != 0 || op.len != 0 || flags & !flag::FUA != 0 {
            return Err(errno::EINVAL);
        }
        op.kind = Kind::Flush;
        op.len = u32::from(self.config.shards);
        Ok(op)
    }

    #[inline]
    fn judge_range(&self, op: &Op) -> Result<(), u32> {
        if op.kind.changes() && self.open.read_only {
            return Err(errno::EPERM);
        }
        let inside =
            op.offset.checked_add(u64::from(op.len)).is_some_and(|end| end <= self.open.bytes);
        if !inside {
            return Err(if op.kind.grows() { errno::ENOSPC } else { errno::EINVAL });
        }
        let carries = matches!(op.kind, Kind::Read | Kind::Write);
        if carries && op.len > NBD_REQUEST_BYTES_MAX {
            return Err(errno::EINVAL);
        }
        Ok(())
    }

    /// Whether the data of a read must be contiguous although it comes from several requests: a
    /// simple reply has one header, and so has a structured one when the client asks for it.
    #[inline]
    fn is_exclusive(&self, op: &Op, flags: u16) -> bool {
        (!self.structured || flags & flag::DF != 0)
            && op.len > 0
            && self.open.units(op.offset, op.len) > 1
    }

    #[inline]
    fn begin(&mut self, mut op: Op) {
        debug_assert!(self.ops.len() < self.ops.capacity());
        self.serial = ChunkId::next_serial(self.serial);
        op.serial = self.serial;
        let kind = op.kind;
        let slot = self.ops.insert(op) as u16;
        match kind {
            Kind::Write => self.intake = Intake::Write(slot),
            _ => self.cutting = Some(slot),
        }
        if matches!(kind, Kind::Status { .. }) {
            self.extents.clear();
        }
    }
}

/// Answering.
impl Session {
    /// The op in flight that a reply belongs to.
    #[inline]
    fn find_chunk(&mut self, id: u64) -> Option<(ChunkId, &mut Op)> {
        let id = ChunkId::decode(id)?;
        let op = self.ops.get_mut(usize::from(id.slot))?;
        let known = op.serial == id.serial && op.outstanding > 0;
        let counted = !matches!(op.kind, Kind::Read | Kind::Status { .. }) || id.chunk < op.chunks;
        (known && counted).then_some((id, op))
    }

    /// Cuts no more of an op.
    fn give_up(&mut self, slot: u16) {
        let op = &mut self.ops[usize::from(slot)];
        op.cut = op.len;
        if self.cutting == Some(slot) {
            self.cutting = None;
        }
    }

    /// Takes an op off when its last answer has come.
    #[inline]
    fn finish(&mut self, slot: u16) -> Option<Op> {
        if !self.ops[usize::from(slot)].is_finished() {
            return None;
        }
        if self.cutting == Some(slot) {
            self.cutting = None;
        }
        Some(self.ops.remove(usize::from(slot)))
    }

    #[inline]
    fn end_if_finished(&mut self, slot: u16) {
        if let Some(op) = self.finish(slot) {
            self.put_end(op.cookie, false, op.error);
        }
    }

    /// A read whose chunks can be told apart on the wire, or that has only one.
    #[inline]
    fn end_read(&mut self, id: ChunkId, blocks: &[BlockRef]) {
        let op = self.ops[usize::from(id.slot)];
        let done = self.finish(id.slot).is_some();
        if op.error != 0 {
            if done {
                self.put_end(op.cookie, true, op.error);
            }
            return;
        }
        let (offset, len) = op.chunk_range(id.chunk, &self.open);
        let hole = !blocks.iter().any(|block| block.page.is_some());
        if !self.structured {
            self.put(&simple_reply(op.cookie, 0));
        } else if hole {
            self.put(&chunk_header(op.cookie, chunk::OFFSET_HOLE, done, 12));
            self.put(&offset.to_be_bytes());
            self.put(&len.to_be_bytes());
            return;
        } else {
            self.put(&chunk_header(op.cookie, chunk::OFFSET_DATA, done, 8 + len));
            self.put(&offset.to_be_bytes());
        }
        self.lent.lend(blocks, offset, len);
    }

    /// A read whose chunks come one after the other under a single header.
    fn end_exclusive(&mut self, id: ChunkId, blocks: &[BlockRef]) {
        let op = &mut self.ops[usize::from(id.slot)];
        let begun = core::mem::replace(&mut op.begun, true);
        let op = *op;
        self.finish(id.slot);
        if op.error != 0 {
            if begun {
                self.close(Reason::Torn);
            } else {
                self.put_end(op.cookie, true, op.error);
            }
            return;
        }
        if !begun && self.structured {
            self.put(&chunk_header(op.cookie, chunk::OFFSET_DATA, true, 8 + op.len));
            self.put(&op.offset.to_be_bytes());
        } else if !begun {
            self.put(&simple_reply(op.cookie, 0));
        }
        let (offset, len) = op.chunk_range(id.chunk, &self.open);
        self.lent.lend(blocks, offset, len);
    }

    fn end_status(&mut self, id: ChunkId, one: bool, blocks: &[BlockRef]) {
        let op = self.ops[usize::from(id.slot)];
        let (offset, len) = op.chunk_range(id.chunk, &self.open);
        if op.error == 0 && !self.gather_extents(one, offset, len, blocks) {
            self.give_up(id.slot);
        }
        if self.finish(id.slot).is_none() {
            return;
        }
        if op.error != 0 || self.extents.is_empty() {
            let error = if op.error != 0 { op.error } else { errno::EIO };
            return self.put_end(op.cookie, true, error);
        }
        let bytes = 4 + 8 * self.extents.len() as u32;
        self.put(&chunk_header(op.cookie, chunk::BLOCK_STATUS, true, bytes));
        self.put(&BASE_ALLOCATION_ID.to_be_bytes());
        for at in 0..self.extents.len() {
            let (len, hole) = self.extents[at];
            self.put(&len.to_be_bytes());
            self.put(&(if hole { STATE_HOLE_ZERO } else { 0 }).to_be_bytes());
        }
    }

    /// Appends what was found in a chunk of a status query to the extents found before it. False
    /// when the answer is complete as it is: there is no room or no wish for more, or the chunk is
    /// not wholly described.
    fn gather_extents(&mut self, one: bool, offset: u64, len: u32, blocks: &[BlockRef]) -> bool {
        let room = if one { 1 } else { EXTENTS_MAX };
        // The first block may begin before the range; the last may end after it.
        let mut skip = offset % BLOCK_BYTES as u64;
        let mut left = len;
        for extent in blocks {
            let bytes = (u64::from(extent.page.0) * BLOCK_BYTES as u64).saturating_sub(skip);
            let bytes = bytes.min(u64::from(left)) as u32;
            skip = 0;
            if bytes == 0 {
                continue;
            }
            let hole = extent.crc != 0;
            let full = self.extents.len() == room;
            match self.extents.last_mut() {
                Some((last, kind)) if *kind == hole => *last += bytes,
                _ if full => return false,
                _ => self.extents.push((bytes, hole)).expect("room was checked"),
            }
            left -= bytes;
        }
        left == 0
    }

    /// Ends a request without data. `structured`: its command is answered in chunks where that was
    /// negotiated.
    #[inline]
    fn put_end(&mut self, cookie: u64, structured: bool, errno: u32) {
        if !(structured && self.structured) {
            self.put(&simple_reply(cookie, errno));
        } else if errno == 0 {
            self.put(&chunk_header(cookie, chunk::NONE, true, 0));
        } else {
            // The error number, and a message of no bytes.
            self.put(&chunk_header(cookie, chunk::ERROR, true, 6));
            self.put(&errno.to_be_bytes());
            self.put(&0u16.to_be_bytes());
        }
    }

    /// Ends the session. The ops stay, so that late replies find theirs.
    fn close(&mut self, reason: Reason) {
        if !matches!(self.phase, Phase::Closed(_)) {
            self.phase = Phase::Closed(reason);
        }
        self.cutting = None;
        self.intake = Intake::Header;
    }

    fn violate(&mut self, what: &'static str) -> Taken {
        self.close(Reason::Malformed(what));
        Taken { consumed: 0, next: Next::Closed }
    }

    #[inline]
    fn start_mutation(&mut self) {
        assert!(
            (self.out_given || self.out.is_empty()) && self.lent.left == 0,
            "the output is drained between two calls"
        );
        self.out.clear();
        self.out_given = false;
    }

    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes).expect("OUT_BYTES_MAX covers the longest answer");
    }
}

fn errno_of(status: Status, kind: Kind) -> u32 {
    match status {
        // It was inside the volume when it was taken.
        Status::Invalid if kind.grows() => errno::ENOSPC,
        Status::Ok => 0,
        Status::Io => errno::EIO,
        Status::Full => errno::ENOSPC,
        Status::Gone => errno::ESHUTDOWN,
        Status::Invalid => errno::EINVAL,
    }
}

/// The payload of the reply that is being put out.
#[derive(Debug, Default)]
struct Lent {
    blocks: heapless::Vec<BlockRef, REQUEST_BLOCKS_MAX>,
    next: usize,
    /// First byte in the next block.
    from: u32,
    /// Bytes to go.
    left: u32,
}

impl Lent {
    #[inline]
    fn lend(&mut self, blocks: &[BlockRef], offset: u64, len: u32) {
        self.from = (offset % BLOCK_BYTES as u64) as u32;
        let covering = (self.from + len).div_ceil(BLOCK_BYTES as u32) as usize;
        assert_eq!(blocks.len(), covering, "a read is answered with the blocks it covers");
        self.blocks.clear();
        self.blocks.extend_from_slice(blocks).expect("chunks end at multiples of their length");
        self.next = 0;
        self.left = len;
    }

    /// The next piece. There is one.
    #[inline]
    fn take(&mut self) -> Out<'static> {
        let page = self.blocks[self.next].page;
        let from = self.from;
        let mut len = self.take_block();
        if page.is_some() {
            return Out::Page { page, from: from as u16, to: (from + len) as u16 };
        }
        while self.left > 0 && !self.blocks[self.next].page.is_some() {
            len += self.take_block();
        }
        Out::Zeroes(len)
    }

    #[inline]
    fn take_block(&mut self) -> u32 {
        let len = (BLOCK_BYTES as u32 - self.from).min(self.left);
        self.next += 1;
        self.from = 0;
        self.left -= len;
        len
    }
}
