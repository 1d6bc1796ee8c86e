//! One client connection as the loop sees it: a session, and the bytes on their way in and out.

use heeler_core::limits::NBD_REQUEST_BYTES_MAX;
use heeler_core::session::{Config, Issue, Next, Out, RX_BYTES_MIN, Session, State};
use heeler_hw::Arena;

/// Bytes of the receive buffer: room for the largest write to a shard behind what is left of
/// another.
const RX_BYTES: usize = 2 * RX_BYTES_MIN;
/// Bytes of replies that may wait in the transmit buffer while requests are still taken.
const TX_WAITING_BYTES: usize = 512 << 10;

const _: () = assert!(TX_WAITING_BYTES < NBD_REQUEST_BYTES_MAX as usize);

/// Requests of one client in progress, and of their parts at shards, at most.
const REQUESTS: u16 = 128;
/// Bytes of one client's reads in progress at most. Both transmit buffers have room for them.
const READ_BYTES: u32 = 2 << 20;

/// How the sessions of a cache with `shards` shards are built.
pub(crate) const fn session_config(shards: u16) -> Config {
    Config { requests_max: REQUESTS, chunks_max: REQUESTS, shards, tx_window_bytes: READ_BYTES }
}

/// Bytes of memory that one connection takes at most, beside its session.
pub const CONNECTION_BYTES_MAX: usize = RX_BYTES + 2 * tx_bytes();

const fn tx_bytes() -> usize {
    TX_WAITING_BYTES + session_config(1).tx_bytes_max()
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) session: Session,
    /// What was received; done with up to `taken`. Empty while the adapter has it.
    rx: Vec<u8>,
    taken: usize,
    /// While the adapter has the buffer: how many bytes were in it.
    lent: Option<usize>,
    wants_rx: bool,
    /// What goes out next.
    tx: Vec<u8>,
    /// The other buffer; `None` while the adapter sends it.
    spare: Option<Vec<u8>>,
    tx_room: usize,
    /// Zeroes to write, for which there were no pages.
    pub(crate) held: Option<Issue>,
    /// Requests at shards without an answer.
    pub(crate) outstanding: u32,
    /// The adapter has closed it. It stays until all answers have come.
    pub(crate) gone: bool,
    /// It is in the queue of connections to look at.
    pub(crate) ready: bool,
    /// It is in the queue of connections that wait for pages.
    pub(crate) starving: bool,
    /// Pages that it waits for.
    pub(crate) needs: usize,
    /// It is its turn to take pages, although others wait.
    pub(crate) granted: bool,
    /// It is in the queue of connections for the adapter to look at.
    pub(crate) noted: bool,
}

/// What received bytes led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Received {
    /// Look again.
    Again,
    /// Nothing until something happens.
    Nothing,
    /// A write whose payload has come.
    Write(Issue),
}

impl Connection {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            session: Session::new(config),
            rx: Vec::with_capacity(RX_BYTES),
            taken: 0,
            lent: None,
            wants_rx: true,
            tx: Vec::with_capacity(tx_bytes()),
            spare: Some(Vec::with_capacity(tx_bytes())),
            tx_room: config.tx_bytes_max(),
            held: None,
            outstanding: 0,
            gone: false,
            ready: false,
            starving: false,
            needs: 0,
            granted: false,
            noted: false,
        }
    }

    /// Whether requests may be taken: whatever they lead to fits into the transmit buffer.
    pub(crate) fn may_go_on(&self) -> bool {
        !self.gone && !self.starving && self.tx.capacity() - self.tx.len() >= self.tx_room
    }

    /// Lets the session take received bytes, once.
    pub(crate) fn receive(
        &mut self,
        exports: &[heeler_core::session::Export],
        arena: &Arena,
    ) -> Received {
        if self.lent.is_some() || self.wants_rx {
            return Received::Nothing;
        }
        let taken = self.session.handle_bytes(&self.rx[self.taken..], exports);
        self.taken += taken.consumed;
        self.put_out(arena);
        match taken.next {
            Next::Again => Received::Again,
            Next::Wait | Next::Closed => Received::Nothing,
            Next::Payload(issue) if self.payload(&issue).is_some() => Received::Write(issue),
            Next::Payload(_) | Next::Bytes => {
                self.wants_rx = true;
                Received::Nothing
            }
        }
    }

    /// The payload of a write, if all of it has come.
    pub(crate) fn payload(&self, issue: &Issue) -> Option<&[u8]> {
        self.rx.get(self.taken..self.taken + issue.request.len as usize)
    }

    /// The payload of a write has been copied.
    pub(crate) fn payload_taken(&mut self, issue: &Issue, arena: &Arena) {
        self.taken += issue.request.len as usize;
        self.session.handle_payload(issue.request.len);
        self.put_out(arena);
    }

    /// Copies what the session puts out to the transmit buffer.
    pub(crate) fn put_out(&mut self, arena: &Arena) {
        let tx = &mut self.tx;
        while let Some(out) = self.session.poll_output() {
            match out {
                Out::Bytes(bytes) => tx.extend_from_slice(bytes),
                Out::Page { page, from, to } => arena.with(page, |bytes| {
                    tx.extend_from_slice(&bytes[usize::from(from)..usize::from(to)]);
                }),
                Out::Zeroes(len) => tx.resize(tx.len() + len as usize, 0),
            }
        }
        debug_assert!(self.tx.len() <= tx_bytes(), "the session keeps to its bound");
    }

    /// Lends the receive buffer out if bytes are needed: there is room behind what is in it.
    pub(crate) fn take_rx(&mut self) -> Option<Vec<u8>> {
        let over = matches!(self.session.state(), State::Draining | State::Closed);
        if !self.wants_rx || self.lent.is_some() || self.gone || over {
            return None;
        }
        if self.taken == self.rx.len() {
            self.rx.clear();
            self.taken = 0;
        } else if self.rx.capacity() - self.rx.len() < RX_BYTES_MIN {
            // What is left is less than one write: the session wants more bytes for it.
            self.rx.copy_within(self.taken.., 0);
            self.rx.truncate(self.rx.len() - self.taken);
            self.taken = 0;
        }
        self.lent = Some(self.rx.len());
        Some(std::mem::take(&mut self.rx))
    }

    /// Takes the receive buffer back. No more bytes than before: the client has gone.
    pub(crate) fn give_rx(&mut self, buffer: Vec<u8>) {
        let Some(before) = self.lent.take() else { return };
        self.wants_rx = false;
        self.rx = buffer;
        if self.rx.len() <= before && self.session.state() != State::Draining {
            self.session.handle_hangup();
        }
    }

    pub(crate) fn take_tx(&mut self) -> Option<Vec<u8>> {
        if self.tx.is_empty() || self.gone {
            return None;
        }
        let empty = self.spare.take()?;
        Some(std::mem::replace(&mut self.tx, empty))
    }

    pub(crate) fn give_tx(&mut self, mut buffer: Vec<u8>) {
        buffer.clear();
        self.spare = Some(buffer);
    }

    /// Whether the session has ended and everything it said is sent.
    pub(crate) fn is_over(&self) -> bool {
        self.session.state() == State::Closed && self.tx.is_empty() && self.spare.is_some()
    }
}
