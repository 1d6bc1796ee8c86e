//! The boundary of a shard: all that goes in and all that comes out. Small `Copy` values; lists of
//! pages travel beside them as slices (in) and getters (out), so nothing here allocates.

use crate::block_set::BlockSet;
use crate::ids::{Epoch, OpId, VolumeId};
use crate::policy::Policy;
use crate::shard::Budget;

/// What a front end asks of one object. One request covers at most
/// [`REQUEST_BLOCKS_MAX`](crate::limits::REQUEST_BLOCKS_MAX) blocks of one object, except
/// `Zero` and `Discard`, which may cover the whole object, and `Flush`, which covers the shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestKind {
    /// Bytes of the object. The reply lends pages.
    Read,
    /// New bytes. The request hands its pages over; the reply hands as many back.
    Write,
    /// Make whole blocks read as zeroes.
    Zero,
    /// Make whole blocks unallocated (they read as zeroes).
    Discard,
    /// Everything acknowledged before is durable when the reply comes. `object`, `offset` and
    /// `len` mean nothing.
    Flush,
    /// Bring the blocks into the cache (NBD_CMD_CACHE).
    Cache,
    /// Which blocks hold data. The reply's blocks are extents: see [`Extent`].
    Status,
}

/// What a request says of the use that its data will be of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Advice {
    /// Nothing: as the volume's [`Buffering`] says.
    #[default]
    None,
    /// It will be needed: it stays in RAM, whatever the volume's defaults are.
    WillNeed,
    /// It will not. What is written leaves RAM as soon as it is in the log. What is read is the
    /// next to leave, unless it was there already, and does not come into the log.
    DontNeed,
    /// It is to be checked: clean data in RAM is passed over, and read from the log or the store.
    /// What is being written, and what the store lacks, is taken from where it is. What is known of
    /// the use of the blocks stays as it is.
    BypassClean,
    /// It is to be saved from a volume that is gone: dirty blocks are read all the same.
    Salvage,
    /// It is a discard of what lies beyond the end that the volume is about to have.
    Cut,
}

/// Which of a volume's data stays in RAM when a request says nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Buffering {
    /// What was read.
    pub reads: bool,
    /// What was written, once it is in the log.
    pub writes: bool,
}

impl Default for Buffering {
    /// Everything stays.
    fn default() -> Self {
        Self { reads: true, writes: true }
    }
}

/// When a volume's writes are acknowledged, what a FLUSH means, and what the cache keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// Acknowledged in the log; a FLUSH makes the log durable.
    #[default]
    WriteBack,
    /// Acknowledged in RAM, which is bounded; a FLUSH makes the log durable.
    Ram,
    /// Acknowledged when the store has committed it.
    WriteThrough,
    /// As `WriteThrough`, and what was written is not kept.
    WriteAround,
    /// As `WriteAround`, and what was read is not kept either.
    None,
    /// Acknowledged in RAM; a FLUSH does nothing: scratch disks.
    Ephemeral,
}

impl Mode {
    /// All of them, in the order of their codes.
    pub const ALL: &'static [Self] = &[
        Self::WriteBack,
        Self::Ram,
        Self::WriteThrough,
        Self::WriteAround,
        Self::None,
        Self::Ephemeral,
    ];

    /// What operators call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::WriteBack => "writeback",
            Self::Ram => "ram",
            Self::WriteThrough => "writethrough",
            Self::WriteAround => "writearound",
            Self::None => "none",
            Self::Ephemeral => "ephemeral",
        }
    }

    /// The mode that operators call so.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|mode| mode.name() == name)
    }

    /// Its number in a head.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The mode of a number in a head.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }
}

/// One request to a shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Comes back in the reply; means nothing to the shard.
    pub id: u64,
    /// What to do.
    pub kind: RequestKind,
    /// The reply waits until the change is durable (Write, Zero, Discard).
    pub fua: bool,
    /// What use its data will be of (Read, Write, Cache).
    pub advice: Advice,
    /// Of which volume.
    pub volume: VolumeId,
    /// Of which object.
    pub object: u32,
    /// First byte in the object. Zero and Discard: a multiple of the block size.
    pub offset: u32,
    /// Bytes. Zero and Discard: a multiple of the block size.
    pub len: u32,
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// Done.
    Ok,
    /// Device or store could not give the data, or a checksum failed (EIO).
    Io,
    /// The cache stayed full longer than the configured time (ENOSPC).
    Full,
    /// The volume is fenced, detached or unknown to the shard (ESHUTDOWN).
    Gone,
    /// The request is malformed: out of range, misaligned (EINVAL).
    Invalid,
}

/// One stretch of a `Status` reply, carried in a `BlockRef` as (page = blocks, crc = kind).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Length in blocks.
    pub blocks: u32,
    /// No data: reads as zeroes.
    pub hole: bool,
}

/// The answer to a request. Its list of blocks is read by `Shard::reply_blocks` until the next
/// `handle`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reply {
    /// The request's `id`.
    pub id: u64,
    /// The request's kind.
    pub kind: RequestKind,
    /// How it ended.
    pub status: Status,
    /// Read: the pages in `reply_blocks` are lent until `Input::Release` names this.
    pub lease: Option<OpId>,
}

/// From a volume's keeper to each shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ToShard {
    /// The volume is ours: serve it. Log entries with an epoch above `committed` are dirty.
    Attach {
        /// The volume.
        volume: VolumeId,
        /// log2 of the object size in bytes.
        object_shift: u8,
        /// Size in blocks.
        blocks: u64,
        /// Writes belong to this epoch from now on.
        open: Epoch,
        /// The store's image is as of this epoch.
        committed: Epoch,
    },
    /// How the volume is served from now on. Until it is told, all is as by default.
    Settings {
        /// The volume.
        volume: VolumeId,
        /// When writes are acknowledged, and what is kept.
        mode: Mode,
        /// What stays in RAM.
        buffering: Buffering,
        /// All of it stays on NVMe.
        pinned: bool,
    },
    /// The volume's size, after `Attach`.
    Size {
        /// The volume.
        volume: VolumeId,
        /// Size in blocks.
        blocks: u64,
        /// Clients may use so many of them: less, when the others are about to be cut off.
        limit: u64,
    },
    /// Close the open epoch: writes belong to `next` from now on, and their acknowledgements wait
    /// for `Released`. Answered by `Frozen` when all writes of the closed epoch are durable.
    Freeze {
        /// The volume.
        volume: VolumeId,
        /// The epoch that is open from now on.
        next: Epoch,
    },
    /// Every shard has closed the epoch: let the held acknowledgements go, and push the closed
    /// epoch's blocks (in batches, then `Pushed`).
    Released {
        /// The volume.
        volume: VolumeId,
    },
    /// A batch is in the store (or will never be asked about again): its credit is free.
    BatchDone {
        /// The volume.
        volume: VolumeId,
    },
    /// The store's image is as of `epoch`: its blocks are clean.
    Committed {
        /// The volume.
        volume: VolumeId,
        /// The committed epoch.
        epoch: Epoch,
    },
    /// Another owner has the volume: refuse everything from now on, keep what is dirty.
    Fenced {
        /// The volume.
        volume: VolumeId,
    },
    /// The volume was given up, with everything pushed: refuse everything from now on, and keep
    /// what is clean until `Attach` says that it is still good, or `Forget` that it is not.
    Detach {
        /// The volume.
        volume: VolumeId,
    },
    /// Forget the volume and all its blocks, dirty ones too.
    Forget {
        /// The volume.
        volume: VolumeId,
    },
}

/// From a shard to a volume's keeper. Batches, fetches and queries are outputs of their own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ToKeeper {
    /// The volume has dirty blocks in this shard (sent when the open epoch gets its first).
    Dirtied {
        /// The volume.
        volume: VolumeId,
    },
    /// The open epoch has got enough dirty blocks in this shard to fill a pack: a push is worth its
    /// while.
    Grown {
        /// The volume.
        volume: VolumeId,
    },
    /// The shard is short of clean space: push now.
    Pressure {
        /// The volume.
        volume: VolumeId,
    },
    /// Writes wait for the store: push and commit now (sent once for each epoch).
    Sync {
        /// The volume.
        volume: VolumeId,
    },
    /// The epoch is closed here. Sent at once, before the closed epoch is durable.
    Frozen {
        /// The volume.
        volume: VolumeId,
        /// The closed epoch.
        epoch: Epoch,
        /// Its dirty blocks in this shard.
        blocks: u64,
    },
    /// All blocks of the closed epoch have been handed over in batches.
    Pushed {
        /// The volume.
        volume: VolumeId,
        /// The closed epoch.
        epoch: Epoch,
    },
}

/// One stretch of blocks in a batch of a push. Data runs take their blocks, in order, from the
/// batch's list of blocks; zero runs take none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PushRun {
    /// The object.
    pub object: u32,
    /// First block in the object.
    pub first: u16,
    /// Blocks.
    pub count: u16,
    /// The blocks read as zeroes.
    pub zero: bool,
}

/// What a shard is told.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// A client's request. `blocks`: for a write the pages that cover it, else empty.
    Request(Request, &'a [crate::ids::BlockRef]),
    /// The pages lent by a reply are no longer used.
    Release(OpId),
    /// A device operation is done. `crcs` of a read: CRC32C of each page read.
    Device {
        /// Which.
        op: OpId,
        /// Whether it did all of what was asked.
        ok: bool,
        /// Of a read: the CRC32C of each page, in order. Else empty.
        crcs: &'a [u32],
    },
    /// The answer to `Output::DeviceLoad`.
    Loaded {
        /// Which.
        op: OpId,
        /// The page's bytes; `None`: the device could not give them.
        bytes: Option<&'a [u8]>,
    },
    /// `Output::Fill` has been carried out; the CRC32C of the whole destination page.
    Filled {
        /// Which.
        op: OpId,
        /// CRC32C of the page.
        crc: u32,
    },
    /// The answer to `Output::Fetch`. `crcs[i]` is `None` where block i is zeroes (its page was
    /// not touched), else the CRC32C of what the page now holds.
    Fetched {
        /// Which.
        op: OpId,
        /// Whether the store gave it.
        ok: bool,
        /// One for each block.
        crcs: &'a [Option<u32>],
    },
    /// The answer to `Output::Query`: for each block, whether the store holds data.
    Queried {
        /// Which.
        op: OpId,
        /// Whether the map could be read.
        ok: bool,
        /// One for each block.
        data: &'a [bool],
    },
    /// `Output::Batch` has been copied away: its pages are free again.
    BatchTaken(OpId),
    /// Mail from a volume's keeper.
    Keeper(ToShard),
    /// Throw away everything clean (`force`: dirty too) of all volumes.
    Purge {
        /// Dirty blocks too.
        force: bool,
    },
    /// The shard's share of memory from now on.
    Budget(Budget),
    /// The replacement policy from now on; nothing is dropped for it.
    Policy(Policy),
    /// Pages that are the shard's from now on.
    Pages(&'a [crate::ids::PageId]),
    /// The shard is about to end, and no client is left: write down what is hot, so that it is
    /// there after the next start. `Shard::is_saved` says when that has been done.
    Save,
    /// The end of a turn, or the time `poll_timeout` named: close the open record, start what
    /// waits.
    Turn,
}

/// What a shard wants done. Device addresses are pages of the shard's region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    /// Read `count` pages from page `at` into `Shard::op_pages(op)`.
    DeviceRead {
        /// Answered by `Input::Device`.
        op: OpId,
        /// First page in the region.
        at: u32,
        /// Pages.
        count: u32,
    },
    /// Read page `at` into the page of `Shard::op_pages(op)`, and show its bytes to the shard.
    DeviceLoad {
        /// Answered by `Input::Loaded`.
        op: OpId,
        /// The page in the region.
        at: u32,
    },
    /// Write `Shard::op_pages(op)` at page `at`. With `header`, first call
    /// `Shard::encode(op, i, bytes)` for each of the first `header` pages of the list.
    DeviceWrite {
        /// Answered by `Input::Device`.
        op: OpId,
        /// First page in the region.
        at: u32,
        /// Pages.
        count: u32,
        /// How many of the first pages the core itself fills.
        header: u32,
    },
    /// Make all completed writes durable.
    DeviceFlush {
        /// Answered by `Input::Device`.
        op: OpId,
    },
    /// Copy all bytes outside `keep` from page `src` (zeroes for `PageId::NONE`) to `dst`,
    /// then checksum `dst`. Answered by `Input::Filled`, at once.
    Fill {
        /// Answered by `Input::Filled`.
        op: OpId,
        /// Page to complete.
        dst: crate::ids::PageId,
        /// Page with the old bytes.
        src: crate::ids::PageId,
        /// The new bytes, kept as they are in `dst`: `keep.0..keep.1`; all others are copied.
        keep: (u16, u16),
    },
    /// Copy all of page `src` to page `dst`, at once. Nobody else uses either.
    CopyPage {
        /// Page with the bytes.
        src: crate::ids::PageId,
        /// Page to fill.
        dst: crate::ids::PageId,
    },
    /// The pages of `Shard::pages_back()` are no longer the shard's.
    PagesBack {
        /// How many there are.
        count: u32,
    },
    /// Fill `Shard::op_pages(op)` from the store's image: `count` blocks of the object, but for the
    /// gaps, which have no page.
    Fetch {
        /// Answered by `Input::Fetched`.
        op: OpId,
        /// The volume.
        volume: VolumeId,
        /// The object.
        object: u32,
        /// First block in the object.
        first: u16,
        /// Blocks.
        count: u16,
        /// Blocks among them, counted from the first one, that nobody wants.
        gaps: BlockSet,
    },
    /// Which of `count` blocks the store's image holds.
    Query {
        /// Answered by `Input::Queried`.
        op: OpId,
        /// The volume.
        volume: VolumeId,
        /// The object.
        object: u32,
        /// First block in the object.
        first: u16,
        /// Blocks.
        count: u16,
    },
    /// Hand `Shard::batch_runs(op)` and the blocks `Shard::batch_blocks(op)` to the volume's
    /// keeper. Answered by `Input::BatchTaken` as soon as the bytes are copied.
    Batch {
        /// Answered by `Input::BatchTaken`.
        op: OpId,
        /// The volume.
        volume: VolumeId,
        /// The closed epoch they belong to.
        epoch: Epoch,
    },
    /// The answer to a request.
    Reply(Reply),
    /// A write waits for the store: as many pages as it brought, in `Shard::reply_blocks`, are
    /// handed back ahead of its answer, so that other clients' writes can have them.
    HandBack {
        /// The request's `id`.
        id: u64,
    },
    /// The answer to a change that waited for the store. It has no blocks.
    Late(Reply),
    /// Mail to the keeper of the volume named in it.
    Keeper(ToKeeper),
}

/// Why a shard did not take an input: its outbox has not been drained. Nothing changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rejected;
