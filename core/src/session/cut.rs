//! How a client's request is cut into requests to shards: at objects, at 128 KiB, at blocks.

use super::{Issue, Payload};
use crate::event::{Advice, Request, RequestKind};
use crate::ids::{BLOCK_BYTES, BLOCK_SHIFT, ShardId, VolumeId, shard_of};
use crate::limits::REQUEST_BLOCKS_MAX;

/// log2 of the bytes that one request with data covers at most.
const UNIT_SHIFT_MAX: u32 = BLOCK_SHIFT + REQUEST_BLOCKS_MAX.ilog2();

const SLOT_BITS: u32 = 10;
const SERIAL_BITS: u32 = 14;
const CHUNK_BITS: u32 = 16;

/// Bits of [`Request::id`] that a session uses, from the lowest up; the others are zero.
pub const ID_BITS: u32 = SLOT_BITS + SERIAL_BITS + CHUNK_BITS;
/// Requests of one connection in flight at most.
pub const REQUESTS_MAX: u16 = 1 << SLOT_BITS;

const _: () = assert!(ID_BITS <= 40, "the driver keeps its connection number in the top 24 bits");
const _: () = assert!(REQUEST_BLOCKS_MAX.is_power_of_two());

/// What the session knows of the export it serves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Open {
    pub(super) volume: VolumeId,
    pub(super) bytes: u64,
    pub(super) read_only: bool,
    /// `base:allocation` was negotiated.
    pub(super) status: bool,
    object_shift: u32,
    /// log2 of the bytes that one request with data covers at most.
    unit_shift: u32,
}

impl Open {
    /// No export has been chosen.
    pub(super) const NONE: Self = Self {
        volume: VolumeId(0),
        bytes: 0,
        read_only: true,
        status: false,
        object_shift: 0,
        unit_shift: 0,
    };

    /// Whether an export has been chosen: no object has one byte.
    pub(super) fn is_chosen(&self) -> bool {
        self.object_shift != 0
    }

    pub(super) fn new(export: &super::Export, status: bool) -> Self {
        let object_shift = u32::from(export.object_shift);
        Self {
            volume: export.volume,
            bytes: export.bytes,
            read_only: export.read_only,
            status,
            object_shift,
            unit_shift: object_shift.min(UNIT_SHIFT_MAX),
        }
    }

    /// Bytes from `at` to the end of its object.
    pub(super) fn object_left(&self, at: u64) -> u64 {
        left_of(at, self.object_shift)
    }

    /// How many requests a read of these bytes becomes. `len` is not 0.
    pub(super) fn units(&self, offset: u64, len: u32) -> u64 {
        ((offset + u64::from(len) - 1) >> self.unit_shift) - (offset >> self.unit_shift) + 1
    }
}

/// Bytes from `at` to the next multiple of `1 << shift`, at least 1.
fn left_of(at: u64, shift: u32) -> u64 {
    (1 << shift) - (at & ((1 << shift) - 1))
}

/// What a client asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Read,
    Write,
    /// `allocate`: by writing zeroes, not by unmapping.
    Zero {
        allocate: bool,
    },
    Discard,
    /// `len` counts shards.
    Flush,
    Cache,
    /// `one`: the first extent is enough.
    Status {
        one: bool,
    },
}

impl Kind {
    /// Bytes of the volume change.
    #[inline]
    pub(super) fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Zero { .. } | Self::Discard)
    }

    /// Behind the end of the volume there is no space for it, rather than nothing.
    #[inline]
    pub(super) fn grows(self) -> bool {
        matches!(self, Self::Write | Self::Zero { .. })
    }
}

/// One request of the client, from its header to its last reply.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub(super) cookie: u64,
    pub(super) kind: Kind,
    pub(super) fua: bool,
    /// A read in several chunks whose data must be contiguous on the wire, in order.
    pub(super) exclusive: bool,
    /// The header of an exclusive read's reply is on the wire.
    pub(super) begun: bool,
    pub(super) offset: u64,
    pub(super) len: u32,
    /// How much of `len` has been given to shards, or given up.
    pub(super) cut: u32,
    /// Requests made of it so far. Exact for kinds that look at [`ChunkId::chunk`]; wraps for
    /// others.
    pub(super) chunks: u16,
    /// Requests that shards have not answered.
    pub(super) outstanding: u16,
    /// The first error, 0 for none.
    pub(super) error: u32,
    pub(super) serial: u16,
}

impl Op {
    /// A read, until [`Op::kind`] is set.
    #[inline]
    pub(super) fn new(cookie: u64, offset: u64, len: u32) -> Self {
        Self {
            cookie,
            kind: Kind::Read,
            fua: false,
            exclusive: false,
            begun: false,
            offset,
            len,
            cut: 0,
            chunks: 0,
            outstanding: 0,
            error: 0,
            serial: 0,
        }
    }

    /// Drops the blocks at the ends that are not wholly covered.
    pub(super) fn shrink_to_blocks(&mut self) {
        let block = BLOCK_BYTES as u64;
        let end = (self.offset + u64::from(self.len)) / block * block;
        self.offset = self.offset.next_multiple_of(block);
        self.len = end.saturating_sub(self.offset) as u32;
    }

    /// Its chunks are issued one at a time, in order.
    #[inline]
    pub(super) fn is_serial(&self) -> bool {
        self.exclusive || matches!(self.kind, Kind::Status { .. })
    }

    /// A request that covers so much was given to a shard.
    #[inline]
    pub(super) fn begin_chunk(&mut self, covers: u32) {
        self.cut += covers;
        self.chunks = self.chunks.wrapping_add(1);
        self.outstanding += 1;
    }

    /// Nothing is left to be given to shards or to be answered by them.
    #[inline]
    pub(super) fn is_finished(&self) -> bool {
        self.outstanding == 0 && self.cut == self.len
    }

    /// Keeps the first error.
    pub(super) fn fail(&mut self, errno: u32) {
        if self.error == 0 {
            self.error = errno;
        }
    }

    /// The next request to a shard, and how much of the op it covers. Something is left to cut.
    #[inline]
    pub(super) fn next_issue(&self, slot: u16, open: &Open, shards: u16) -> (Issue, u32) {
        debug_assert!(self.cut < self.len);
        let id = ChunkId { slot, serial: self.serial, chunk: self.chunks }.encode();
        if self.kind == Kind::Flush {
            return (flush_of(id, open.volume, ShardId(self.cut as u16)), 1);
        }
        let at = self.offset + u64::from(self.cut);
        let (kind, payload, covers) = self.piece(at, open);
        let object = (at >> open.object_shift) as u32;
        let mut offset = (at & ((1 << open.object_shift) - 1)) as u32;
        let mut len = covers;
        if kind == RequestKind::Status {
            let end = (offset + len).next_multiple_of(BLOCK_BYTES as u32);
            offset &= !(BLOCK_BYTES as u32 - 1);
            len = end - offset;
        }
        let advice = if kind == RequestKind::Cache { Advice::WillNeed } else { Advice::default() };
        let (fua, volume) = (self.fua, open.volume);
        let request = Request { id, kind, fua, advice, volume, object, offset, len };
        (Issue { shard: shard_of(open.volume, object, shards), request, payload }, covers)
    }

    /// Kind, payload and bytes of the piece that starts at `at`.
    #[inline]
    fn piece(&self, at: u64, open: &Open) -> (RequestKind, Payload, u32) {
        let left = self.len - self.cut;
        let within = |shift: u32, most: u32| left_of(at, shift).min(u64::from(most)) as u32;
        let unit = within(open.unit_shift, left);
        match self.kind {
            Kind::Read => (RequestKind::Read, Payload::None, unit),
            Kind::Write => (RequestKind::Write, Payload::Received, unit),
            Kind::Cache => (RequestKind::Cache, Payload::None, unit),
            Kind::Status { .. } => (RequestKind::Status, Payload::None, unit),
            Kind::Zero { allocate: true } => (RequestKind::Write, Payload::Zeroes, unit),
            Kind::Discard => (RequestKind::Discard, Payload::None, within(open.object_shift, left)),
            Kind::Zero { allocate: false } => {
                let whole = left & !(BLOCK_BYTES as u32 - 1);
                if whole == 0 || !at.is_multiple_of(BLOCK_BYTES as u64) {
                    (RequestKind::Write, Payload::Zeroes, within(BLOCK_SHIFT, left))
                } else {
                    (RequestKind::Zero, Payload::None, within(open.object_shift, whole))
                }
            }
            Kind::Flush => unreachable!("a flush is cut by shard, not by bytes"),
        }
    }

    /// Offset and bytes of a chunk of a read or status query, both cut at units.
    #[inline]
    pub(super) fn chunk_range(&self, chunk: u16, open: &Open) -> (u64, u32) {
        let unit = (self.offset >> open.unit_shift) + u64::from(chunk);
        let start = self.offset.max(unit << open.unit_shift);
        let end = (self.offset + u64::from(self.len)).min((unit + 1) << open.unit_shift);
        (start, (end - start) as u32)
    }
}

fn flush_of(id: u64, volume: VolumeId, shard: ShardId) -> Issue {
    let kind = RequestKind::Flush;
    let advice = Advice::default();
    let request = Request { id, kind, fua: false, advice, volume, object: 0, offset: 0, len: 0 };
    Issue { shard, request, payload: Payload::None }
}

/// What [`Request::id`] says: which op, and which chunk of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ChunkId {
    pub(super) slot: u16,
    /// Tells the ops of one slot apart.
    pub(super) serial: u16,
    pub(super) chunk: u16,
}

impl ChunkId {
    /// The serial number after `serial`.
    pub(super) fn next_serial(serial: u16) -> u16 {
        (serial + 1) & ((1 << SERIAL_BITS) - 1)
    }

    #[inline]
    fn encode(self) -> u64 {
        u64::from(self.serial) << (SLOT_BITS + CHUNK_BITS)
            | u64::from(self.slot) << CHUNK_BITS
            | u64::from(self.chunk)
    }

    /// `None` if no session ever gave out this number.
    #[inline]
    pub(super) fn decode(id: u64) -> Option<Self> {
        if id >> ID_BITS != 0 {
            return None;
        }
        Some(Self {
            slot: (id >> CHUNK_BITS) as u16 & (REQUESTS_MAX - 1),
            serial: (id >> (SLOT_BITS + CHUNK_BITS)) as u16,
            chunk: id as u16,
        })
    }
}
