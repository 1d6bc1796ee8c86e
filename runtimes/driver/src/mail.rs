//! What crosses threads: between data cores, and between a data core and the control thread.
//! Everything goes by the single-producer single-consumer mailboxes of the core.

use std::ops::Range;
use std::sync::Arc;

use heeler_core::block_set::BlockSet;
use heeler_core::buffer;
use heeler_core::counters::{Scrubbed, Traffic};
use heeler_core::event::{PushRun, Reply, Request, ToKeeper, ToShard};
use heeler_core::ids::{BlockRef, CoreId, Epoch, OpId, PageId, ShardId, VolumeId};
use heeler_core::lending::Place;
use heeler_core::limits::REQUEST_BLOCKS_MAX;
use heeler_core::policy::Policy;
use heeler_core::shard::{Budget, BudgetReport, DirtyRun, SalvageAt, ShardUsage};

use crate::windows::{ShardCounts, Spans};

/// Up to one request's blocks, by value: pages cross cores by their numbers.
#[derive(Clone, Debug)]
pub struct Blocks {
    len: u16,
    refs: [BlockRef; REQUEST_BLOCKS_MAX],
}

impl Blocks {
    /// Copies a list of at most [`REQUEST_BLOCKS_MAX`] blocks.
    #[must_use]
    pub fn new(blocks: &[BlockRef]) -> Self {
        let mut refs = [BlockRef::ZEROES; REQUEST_BLOCKS_MAX];
        refs[..blocks.len()].copy_from_slice(blocks);
        Self { len: blocks.len() as u16, refs }
    }

    /// The blocks.
    #[must_use]
    pub fn as_slice(&self) -> &[BlockRef] {
        &self.refs[..usize::from(self.len)]
    }
}

/// From one data core to another.
#[derive(Clone, Debug)]
pub enum CoreMail {
    /// A request for a shard of the receiving core.
    Request {
        /// Who asks, and so where the reply goes.
        from: CoreId,
        /// The shard.
        shard: ShardId,
        /// The request.
        request: Request,
        /// A write's pages, handed over.
        blocks: Blocks,
    },
    /// The answer. A read's pages are lent until `Release`.
    Reply {
        /// The shard that answers.
        shard: ShardId,
        /// The answer.
        reply: Reply,
        /// Its blocks.
        blocks: Blocks,
    },
    /// Pages of a write whose answer will come later.
    HandedBack {
        /// As many as it brought.
        blocks: Blocks,
    },
    /// The pages lent by a reply are no longer used.
    Release {
        /// The shard that lent them.
        shard: ShardId,
        /// The lease.
        lease: OpId,
    },
}

/// One exported volume, as the sessions see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportInfo {
    /// Its name.
    pub name: String,
    /// Its number in this cache.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub bytes: u64,
    /// log2 of its object size.
    pub object_shift: u8,
    /// Writes are refused.
    pub read_only: bool,
}

/// What a core reports.
#[derive(Clone, Debug, Default)]
pub struct CoreStatus {
    /// Each shard of the core.
    pub shards: Vec<ShardStatus>,
    /// Open connections.
    pub connections: u64,
    /// Requests taken from clients.
    pub requests: u64,
    /// Messages sent to other cores.
    pub mails: u64,
}

/// What a shard reports.
#[derive(Clone, Debug)]
pub struct ShardStatus {
    /// The shard.
    pub shard: ShardId,
    /// How full it is.
    pub usage: ShardUsage,
    /// Where its pages are.
    pub buffers: buffer::Usage,
    /// What it has of memory, and how old that is.
    pub budget: BudgetReport,
    /// Onodes that cannot be evicted now: dirty or in use.
    pub onodes_pinned: u64,
    /// Which buffers leave RAM first.
    pub policy: Policy,
    /// What happened.
    pub counts: Spans<ShardCounts>,
    /// Each volume that the shard was told of.
    pub volumes: Vec<VolumeShare>,
}

/// What a shard reports of a volume.
#[derive(Clone, Copy, Debug)]
pub struct VolumeShare {
    /// The volume.
    pub volume: VolumeId,
    /// Its dirty blocks in this shard.
    pub dirty_blocks: u64,
    /// What its clients used.
    pub traffic: Spans<Traffic>,
    /// What scrubs found.
    pub scrubbed: Scrubbed,
    /// A scrub is under way: how far it is (done, of so much).
    pub scrubbing: Option<(u32, u32)>,
}

/// From a data core to the control thread.
#[derive(Debug)]
pub enum ToControl {
    /// Mail for the keeper of the volume named in it.
    Keeper {
        /// From this shard.
        shard: ShardId,
        /// The mail.
        mail: ToKeeper,
    },
    /// A shard's `Output::Fetch`.
    Fetch {
        /// The shard.
        shard: ShardId,
        /// Its operation.
        op: OpId,
        /// The volume.
        volume: VolumeId,
        /// The object.
        object: u32,
        /// First block.
        first: u16,
        /// Blocks.
        count: u16,
        /// Those that nobody wants.
        gaps: BlockSet,
    },
    /// A shard's `Output::Query`.
    Query {
        /// The shard.
        shard: ShardId,
        /// Its operation.
        op: OpId,
        /// The volume.
        volume: VolumeId,
        /// The object.
        object: u32,
        /// First block.
        first: u16,
        /// Blocks.
        count: u16,
    },
    /// A shard's `Output::Batch`, copied out of the arena.
    Batch {
        /// The shard.
        shard: ShardId,
        /// The volume.
        volume: VolumeId,
        /// The closed epoch.
        epoch: Epoch,
        /// Its runs.
        runs: Vec<PushRun>,
        /// CRC32C of each data block.
        crcs: Vec<u32>,
        /// The data blocks, one after the other.
        bytes: Vec<u8>,
    },
    /// What a shard has of memory, and what it lacks.
    Budget {
        /// The shard.
        shard: ShardId,
        /// Its report.
        report: BudgetReport,
    },
    /// Pages that are nobody's now.
    Pages {
        /// Who had them.
        from: Place,
        /// Their numbers.
        pages: Vec<PageId>,
    },
    /// The answer to [`FromControl::Cover`].
    Covered,
    /// The blocks of an answer to a fetch have been copied to their pages.
    Copied {
        /// The shard.
        shard: ShardId,
        /// Its operation.
        op: OpId,
    },
    /// The answer to [`FromControl::Report`].
    Status {
        /// The question's number.
        ticket: u64,
        /// The core.
        core: CoreId,
        /// Its state.
        status: CoreStatus,
    },
    /// The answer to [`FromControl::Close`]: no session of this core uses the volume, and no
    /// request of one is under way.
    Closed {
        /// The order's number.
        ticket: u64,
    },
    /// The answer to [`FromControl::ListDirty`].
    Dirty {
        /// The question's number.
        ticket: u64,
        /// What was found.
        runs: Vec<DirtyRun>,
        /// Where to go on; `None`: there is no more.
        next: Option<SalvageAt>,
    },
    /// The answer to [`FromControl::ReadDirty`].
    Salvaged {
        /// The question's number.
        ticket: u64,
        /// The blocks; `None`: not all of them can be read.
        bytes: Option<Vec<u8>>,
    },
    /// The answer to [`FromControl::Cut`], from each shard.
    Cut {
        /// The order's number.
        ticket: u64,
        /// All of it reads as zeroes.
        done: bool,
    },
    /// The core has finished draining: no connection is left and no request is under way.
    Drained(CoreId),
}

/// A stretch of fetched blocks.
#[derive(Clone, Debug)]
pub struct FetchedPiece {
    /// First block of the fetch (counted from the fetch's own first) that it holds.
    pub at: u16,
    /// Whole blocks, each verified against the map's checksum.
    pub bytes: bytes::Bytes,
}

/// From the control thread to a data core.
#[derive(Debug)]
pub enum FromControl {
    /// Mail for a shard.
    Shard {
        /// The shard.
        shard: ShardId,
        /// The mail.
        mail: ToShard,
    },
    /// The answer to a fetch. Blocks in no piece are zeroes. `None`: the store could not give them.
    Fetched {
        /// The shard.
        shard: ShardId,
        /// Its operation.
        op: OpId,
        /// What came.
        pieces: Option<Vec<FetchedPiece>>,
    },
    /// The answer to a query: for each block whether the store holds data. `None`: unknown.
    Queried {
        /// The shard.
        shard: ShardId,
        /// Its operation.
        op: OpId,
        /// One for each block.
        data: Option<Vec<bool>>,
    },
    /// The volumes that sessions may open from now on. Connections to a volume that is no longer
    /// listed are closed.
    Exports(Arc<[ExportInfo]>),
    /// The replacement policy of every shard from now on.
    Policy(Policy),
    /// A shard's share of memory from now on.
    Budget {
        /// The shard.
        shard: ShardId,
        /// Its share.
        budget: Budget,
        /// It has less than others: it is to report at once when it lacks pages.
        hurry: bool,
    },
    /// Transit pages with this number or a higher one are to be given back; others come for them.
    Below(PageId),
    /// Pages for a shard, or for the core's transit.
    Pages {
        /// Whose they are from now on.
        to: Place,
        /// Their numbers.
        pages: Vec<PageId>,
    },
    /// The queue is to cover so many pages of the arena and to let go of all others.
    Cover {
        /// Pages.
        pages: u32,
    },
    /// So many bytes of batches are no longer held.
    BatchesEnded {
        /// Bytes.
        bytes: usize,
    },
    /// Drop clean contents of every shard, or with `force` everything.
    Purge {
        /// Dirty blocks too.
        force: bool,
    },
    /// Read all that the log holds of a volume in this core's shards, to check it.
    Scrub {
        /// The volume.
        volume: VolumeId,
    },
    /// Say [`ToControl::Closed`] as soon as no session uses the volume, which is not listed (any
    /// more). Another order for the same volume takes the place of this one.
    Close {
        /// The volume.
        volume: VolumeId,
        /// Comes back in the answer.
        ticket: u64,
    },
    /// List some of the dirty blocks that a shard has of a volume.
    ListDirty {
        /// The shard.
        shard: ShardId,
        /// The volume.
        volume: VolumeId,
        /// From where on.
        at: SalvageAt,
        /// Comes back in the answer.
        ticket: u64,
    },
    /// Read dirty data of a volume that is gone.
    ReadDirty {
        /// The shard.
        shard: ShardId,
        /// The volume.
        volume: VolumeId,
        /// What to read: data.
        run: DirtyRun,
        /// Comes back in the answer.
        ticket: u64,
    },
    /// Discard what this core's shards have of a range of blocks, though clients may not use it.
    Cut {
        /// The volume.
        volume: VolumeId,
        /// Blocks of one of its objects.
        object_blocks: u32,
        /// The blocks.
        blocks: Range<u64>,
        /// Comes back in the answer of each shard.
        ticket: u64,
    },
    /// Report the core's state.
    Report {
        /// Comes back in the answer.
        ticket: u64,
    },
    /// Take no more requests, finish those under way, close all connections, then say `Drained`.
    Drain,
    /// Leave the loop.
    Stop,
}
