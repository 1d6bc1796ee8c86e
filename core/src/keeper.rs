//! A volume's keeper: owns the volume's image in the store. It claims the volume, cuts epochs,
//! packs what the shards push, writes map pages and heads, and tells where fetched blocks lie.
//!
//! One keeper for each volume, on the control thread. It may allocate; payload never enters it:
//! batches are handles, reads are plans. Names of store objects are keys relative to the
//! configured prefix (see [`names`](crate::wire::names)).
//!
//! # Driving it
//!
//! `Keeper::handle(now, input)`, then `Keeper::poll_output()` until `None`, then
//! `Keeper::poll_timeout()` says when to send [`Input::Tick`]. Inputs may come in any order;
//! a late answer to a store operation is never wrong.
//!
//! * Every store output carries a [`StoreOp`] and is answered exactly once by
//!   [`Input::StoreDone`]. The runtime may try a few times by itself before it answers
//!   [`StoreResult::Failed`], except for [`Output::Create`], which it sends at most once: the
//!   keeper itself finds out what became of a create without an answer. The keeper retries
//!   for ever.
//! * [`Input::Batch`]: the runtime has copied a batch's blocks and named them by a
//!   [`BatchHandle`]. It keeps the bytes until [`Output::DropBatch`].
//! * [`Input::Fetch`] and [`Input::Query`] get one answer each, maybe after other outputs.
//!   Mail to shards must stay in order, and in order with fetch plans: a plan that comes before
//!   [`ToShard::Committed`] is of the image before it.
//!
//! # A push cycle
//!
//! ```text
//! Freeze to all shards -> all Frozen -> Released to all -> batches, packs put, BatchDone
//!   -> all Pushed, all packs put -> head n+1 created, its tail names the packs
//!   -> Committed to all -> superseded head deleted
//! ```
//!
//! Packs say themselves what they hold, so the tail is the newest part of the map. When it has
//! grown long, a checkpoint folds it into the map pages, beside the pushes: pages loaded, changed
//! copies put, named by the next head, superseded ones deleted.
//!
//! # Who owns a volume
//!
//! Creating head n+1 is both the commit and the claim, so a second owner and a commit can never
//! both succeed. A claim's head (number == term) is never deleted: the create by which a
//! former owner would commit meets it for ever. Other heads are deleted once superseded, so
//! a claim whose create was delayed for long could succeed at a number that had been used and
//! deleted; therefore a claim lists the heads again after its create and counts only if none is
//! newer.

mod changes;
mod checkpoint;
mod claim;
mod collect;
mod cycle;
mod edit;
mod held;
mod map;
mod open;
mod rewrite;
mod scan;
mod store;
#[cfg(test)]
mod tests;
mod usage;
mod view;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

pub use self::changes::Changes;
use self::claim::{Claim, Step};
pub use self::edit::{Edit, EditError};
use self::held::{Fate, Held};
use self::open::Opening;
use self::store::{Io, Request, Store};
pub use self::usage::StoreBytes;
use self::view::View;
use crate::block_set::BlockSet;
use crate::event::{PushRun, ToKeeper, ToShard};
use crate::ids::{Crc32c, Epoch, OpId, ShardId, VolumeId};
use crate::time::{Duration, Instant};
use crate::wire::head::{Head, Settings, Source};
use crate::wire::names::{Nonce, Uuid};

/// What a keeper needs to know from the start.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The volume in the store.
    pub uuid: Uuid,
    /// Shards of the cache: 1 to [`SHARDS_MAX`](crate::limits::SHARDS_MAX).
    pub shards: u16,
    /// Checksum of the core's own metadata.
    pub crc32c: Crc32c,
    /// Seed of the jitter in retries.
    pub seed: u64,
    /// A push starts so long after the first write it will contain.
    pub push_after: Duration,
    /// Map pages kept in memory, beside those in use.
    pub pages_max: usize,
    /// Packs or map pages that are put at the same time at most, at least 1.
    pub puts_max: usize,
    /// Packs that the map pages do not know yet at most; more may come while they are folded in.
    pub tail_packs_max: usize,
    /// Bytes of data in such packs, below which only their number counts.
    pub tail_bytes_min: u64,
    /// A checkpoint that is ready during a push has a head of its own if the push still has more
    /// than so many bytes to go; else it is part of the push's.
    pub long_push_bytes: u64,
    /// Garbage is looked for when pushes have put so many bytes since the volume was claimed; more
    /// for a volume with many map pages.
    pub collect_after: u64,
    /// Packs are rewritten when they have more garbage than so many percent of what is live, and
    /// more than so many bytes.
    pub garbage_percent: u32,
    /// See `garbage_percent`.
    pub garbage_min: u64,
    /// Blocks that one rewriting copies at most: it holds 40 bytes for each.
    pub copy_blocks_max: usize,
    /// First and longest wait before a failed store operation is tried again.
    pub backoff: (Duration, Duration),
    /// Failures of a map page's load after which the fetches that wait for it fail; and packs
    /// of the tail that are not what they should be after which the volume is refused.
    pub load_attempts_max: u32,
}

impl Config {
    /// The defaults: push after 5 s, 256 map pages, 4 puts, tails of 256 packs or from 16 MiB on,
    /// waits of 100 ms to 10 s, 4 attempts.
    #[must_use]
    pub const fn new(uuid: Uuid, shards: u16, crc32c: Crc32c, seed: u64) -> Self {
        Self {
            uuid,
            shards,
            crc32c,
            seed,
            push_after: Duration::from_secs(5),
            pages_max: 256,
            puts_max: 4,
            tail_packs_max: 256,
            tail_bytes_min: 16 << 20,
            long_push_bytes: 8 << 20,
            collect_after: 16 << 20,
            garbage_percent: 40,
            garbage_min: 8 << 20,
            copy_blocks_max: 16384,
            backoff: (Duration::from_millis(100), Duration::from_secs(10)),
            load_attempts_max: 4,
        }
    }
}

/// A claim of the volume, asked for once in a keeper's life.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    /// The volume's number in this cache.
    pub volume: VolumeId,
    /// Take the volume from a living or dead owner, and give up what this cache may hold of it
    /// if the image has moved on without it.
    pub takeover: bool,
    /// This cache.
    pub cache: Uuid,
    /// The nonces under which this cache may hold the volume: those of its volume table.
    pub expected: &'a [Nonce],
    /// A fresh random number for this claim.
    pub nonce: Nonce,
    /// Dirty blocks of the volume that the cache's log holds.
    pub dirty_blocks: u64,
    /// The highest epoch of the volume in the cache's log.
    pub log_epoch: Epoch,
    /// Name of this host, shown to whoever is refused; cut to 255 bytes.
    pub host: &'a str,
    /// Wall clock at `now`: seconds since 1970.
    pub unix_secs: u64,
}

/// The runtime's name for the copied blocks of one batch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct BatchHandle(pub u64);

/// A store operation under way. Never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct StoreOp(pub u64);

/// What a keeper is told.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Claim the volume. Ends in [`Output::Attached`] or [`Output::Refused`].
    Start(Start<'a>),
    /// Serve a snapshot of the volume, read-only, and nothing else in the keeper's life. Ends in
    /// [`Output::Attached`] or [`Output::Refused`]. Nothing is claimed, and nothing written.
    View {
        /// The snapshot's number in this cache.
        volume: VolumeId,
        /// Number of its head.
        number: u32,
    },
    /// [`Output::Remember`] is durable. `volume`: the volume's number from now on.
    Remembered {
        /// A new number if the cached contents were given up, else the same.
        volume: VolumeId,
    },
    /// Mail from a shard.
    Shard(ShardId, ToKeeper),
    /// `Output::Batch` of a shard, copied.
    Batch {
        /// Whose.
        shard: ShardId,
        /// Of which epoch.
        epoch: Epoch,
        /// Names the copy.
        batch: BatchHandle,
        /// What the blocks are.
        runs: &'a [PushRun],
        /// CRC32C of each data block, in order.
        crcs: &'a [u32],
    },
    /// `Output::Fetch` of a shard. Answered by [`Output::FetchPlan`] or [`Output::FetchFailed`].
    Fetch {
        /// Whose.
        shard: ShardId,
        /// Comes back in the answer.
        op: OpId,
        /// The object.
        object: u32,
        /// First block in the object.
        first: u16,
        /// Blocks.
        count: u16,
        /// Those that nobody wants.
        gaps: BlockSet,
    },
    /// `Output::Query` of a shard. Answered by [`Output::QueryAnswer`] or
    /// [`Output::QueryFailed`].
    Query {
        /// Whose.
        shard: ShardId,
        /// Comes back in the answer.
        op: OpId,
        /// The object.
        object: u32,
        /// First block in the object.
        first: u16,
        /// Blocks.
        count: u16,
    },
    /// Push and commit everything that is dirty now. Answered by [`Output::PushDone`].
    PushNow {
        /// Comes back in the answer.
        ticket: u64,
    },
    /// Changes the volume, after a push of everything that is dirty now. It is in the head, and so
    /// counts for later owners, when [`Output::PushDone`] answers; [`Output::EditRefused`] if it
    /// cannot be.
    Edit {
        /// The change.
        edit: &'a Edit,
        /// Comes back in the answer.
        ticket: u64,
    },
    /// Copies what lies in other volumes, so that this one is no clone any more. Answered by
    /// [`Output::PushDone`], maybe much later.
    Flatten {
        /// Comes back in the answer.
        ticket: u64,
    },
    /// Push what is dirty and give the volume up. Ends in [`Output::Released`] (or
    /// [`Output::Fenced`]); at once if the volume has not been claimed yet. The front ends must
    /// have stopped writing.
    Detach,
    /// Keep the volume after all, if it is not too late: it is while [`Keeper::phase`] says
    /// [`Phase::Releasing`] after this.
    Stay,
    /// The end of a store operation.
    StoreDone {
        /// Which.
        op: StoreOp,
        /// How it ended.
        result: StoreResult<'a>,
    },
    /// The time that `poll_timeout` named has come. Harmless at any other time.
    Tick,
}

/// An object of a list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Listed<'a> {
    /// Its key.
    pub key: &'a str,
    /// Its bytes.
    pub bytes: u64,
}

/// How a store operation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StoreResult<'a> {
    /// Of Get: what was asked for.
    Got(&'a [u8]),
    /// Of List: the keys, in any order; keys that are none of ours do no harm.
    Listed(&'a [Listed<'a>]),
    /// Of Gather: the blocks are here.
    Gathered(BatchHandle),
    /// Of Put, Create, Delete: done and durable.
    Done,
    /// Of Create: there is one already.
    AlreadyExists,
    /// Of Get, Delete: there is none.
    NotFound,
    /// Anything else, a timeout included: whether it took effect is unknown.
    Failed {
        /// Trying again may help; `false`: credentials, permissions, configuration.
        transient: bool,
        /// The runtime's number for the text of the error: shown in [`Status`].
        note: u32,
    },
}

/// What a keeper wants done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// Note durably, in the cache's volume table, that `nonce` may be ours; then
    /// [`Input::Remembered`]. With `ours` false what the cache holds of the volume is of no use
    /// (the driver has said so by `takeover`, or it was clean): give the volume a
    /// new number, so that all of it is forgotten, and note `nonce` alone.
    Remember {
        /// The claim's nonce.
        nonce: Nonce,
        /// Cached contents are kept, and so are the nonces known before.
        ours: bool,
    },
    /// The volume is ours. `ToShard::Attach` follows for every shard; the volume table may
    /// forget all nonces but this claim's.
    Attached(Attached),
    /// The volume is not ours; the keeper is finished.
    Refused(Refusal),
    /// Read an object.
    Get {
        /// Answered by [`Input::StoreDone`].
        op: StoreOp,
        /// What.
        key: String,
        /// Only so many of its first bytes; `None`: all.
        first: Option<u32>,
    },
    /// Write an object: `meta`, then the blocks of each batch. It may exist, with the same bytes.
    Put {
        /// Answered by [`Input::StoreDone`].
        op: StoreOp,
        /// Where.
        key: String,
        /// The first bytes.
        meta: Arc<[u8]>,
        /// The rest: all blocks of these, in order.
        batches: Vec<BatchHandle>,
    },
    /// Write an object if there is none (atomically), at most once.
    Create {
        /// Answered by [`Input::StoreDone`].
        op: StoreOp,
        /// Where.
        key: String,
        /// All of it.
        bytes: Arc<[u8]>,
    },
    /// Read blocks of packs, check every CRC, and keep them, in order, under a handle of a batch:
    /// part `first` of a read is where its blocks go among the `blocks`.
    Gather {
        /// Answered by [`Input::StoreDone`].
        op: StoreOp,
        /// How many blocks there are.
        blocks: u16,
        /// What to read.
        reads: Vec<PackRead>,
    },
    /// All keys with a prefix.
    List {
        /// Answered by [`Input::StoreDone`].
        op: StoreOp,
        /// Ends in a slash.
        prefix: String,
    },
    /// Remove an object.
    Delete {
        /// Answered by [`Input::StoreDone`].
        op: StoreOp,
        /// What.
        key: String,
    },
    /// The batch's bytes are of no more use (a put of them that still runs does not matter).
    DropBatch(BatchHandle),
    /// Mail to a shard.
    ToShard(ShardId, ToShard),
    /// Where the blocks of a fetch are. The runtime carries out the reads, checks every CRC and
    /// gives the data to the shard.
    FetchPlan {
        /// Whose.
        shard: ShardId,
        /// Of the fetch.
        op: OpId,
        /// Blocks of the fetch.
        count: u16,
        /// What to read; wanted blocks of the fetch that are in none of them are zeroes.
        reads: Vec<PackRead>,
    },
    /// The map could not be read: the fetch fails.
    FetchFailed {
        /// Whose.
        shard: ShardId,
        /// Of the fetch.
        op: OpId,
    },
    /// For each block of a query, whether the store holds data.
    QueryAnswer {
        /// Whose.
        shard: ShardId,
        /// Of the query.
        op: OpId,
        /// One for each block.
        data: Vec<bool>,
    },
    /// The map could not be read: the query fails.
    QueryFailed {
        /// Whose.
        shard: ShardId,
        /// Of the query.
        op: OpId,
    },
    /// The end of [`Input::PushNow`], [`Input::Edit`] or [`Input::Flatten`].
    PushDone {
        /// Of the request.
        ticket: u64,
        /// Everything is in the store and committed; `false`: the volume was lost before.
        committed: bool,
    },
    /// The end of [`Input::Edit`]: nothing changed.
    EditRefused {
        /// Of the request.
        ticket: u64,
        /// Why.
        why: EditError,
    },
    /// The volume has so many blocks from now on; the shards have been told.
    Resized {
        /// Size in blocks.
        blocks: u64,
    },
    /// Another owner has the volume: nothing is put any more; the shards have been told. The
    /// keeper is finished, but goes on answering fetches (they fail).
    Fenced {
        /// Who, if the head could be read.
        by: Option<Owner>,
    },
    /// The volume is given up in the store; the keeper is finished.
    Released,
}

/// One ranged read of a pack, for one fetch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackRead {
    /// The pack.
    pub key: String,
    /// First byte.
    pub offset: u64,
    /// Bytes: a multiple of the block size.
    pub len: u32,
    /// Which of the blocks read are wanted. Between them there may be others.
    pub parts: Vec<PackPart>,
}

/// Wanted blocks of a [`PackRead`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackPart {
    /// Index of the first one in the read, in blocks.
    pub at: u32,
    /// Which block of the fetch it is.
    pub first: u16,
    /// CRC32C of each block: as many as there are blocks.
    pub crcs: Vec<u32>,
}

/// A claimed volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attached {
    /// The volume's number in this cache.
    pub volume: VolumeId,
    /// The volume's name.
    pub name: String,
    /// Size in blocks.
    pub blocks: u64,
    /// log2 of the object size in bytes.
    pub object_shift: u8,
    /// Seconds since 1970.
    pub created_unix_secs: u64,
    /// What an operator says of it.
    pub settings: Settings,
    /// Of a clone: the snapshot that it was made from.
    pub parent: Option<Source>,
    /// What the cache held of the volume is still good.
    pub ours: bool,
    /// Writes belong to this epoch.
    pub open: Epoch,
    /// The store's image is as of this epoch.
    pub committed: Epoch,
}

/// Who has a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Name of the host.
    pub host: String,
    /// The cache.
    pub cache: Uuid,
    /// Since when: seconds since 1970.
    pub since_unix_secs: u64,
}

/// Why a volume was not claimed. Its text says what to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Another owner has it and has not released it.
    Owned(Owner),
    /// The cache holds dirty blocks, and the image has moved on without them.
    Stale {
        /// How many.
        dirty_blocks: u64,
        /// Who had the volume since.
        owner: Owner,
    },
    /// The store has no head of it.
    NoVolume,
    /// The newest head, or a part of its image, cannot be read.
    Corrupt {
        /// Which.
        key: String,
        /// What is wrong with it.
        error: crate::wire::frame::FormatError,
    },
    /// Data of the newest image is not in the store.
    Missing {
        /// Which object.
        key: String,
    },
    /// The cache knows of later heads than the store: it was set back, or is another store.
    StoreIsOlder,
    /// Others claim it again and again.
    Contended,
    /// Its heads have used up all numbers.
    Exhausted,
    /// The store refuses, and trying again would not help.
    Store {
        /// The runtime's number for the text of the error.
        note: u32,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owned(owner) => write!(
                f,
                "owned by {owner}; detach it there, or take it with --takeover (what that \
                 server has not pushed yet will not be in it)"
            ),
            Self::Stale { dirty_blocks, owner } => write!(
                f,
                "this cache holds {} dirty bytes that were never pushed, and the volume has since \
                 been written by {owner}; they cannot be merged: --takeover gives them up",
                dirty_blocks * crate::ids::BLOCK_BYTES as u64
            ),
            Self::NoVolume => f.write_str("the store has no head of this volume"),
            Self::Corrupt { key, error } => write!(
                f,
                "{key} cannot be read: {error}; run `heeler check`, and if the server is older \
                 than the volume, update it"
            ),
            Self::Missing { key } => {
                write!(f, "{key} is missing in the store; run `heeler check`")
            }
            Self::StoreIsOlder => f.write_str(
                "the store's image is older than this cache's: it was set back or is another \
                 store; check the store's address",
            ),
            Self::Contended => f.write_str("other servers are claiming it; try again"),
            Self::Exhausted => f.write_str("no number is left for another head"),
            Self::Store { .. } => f.write_str("the store refuses access; check its settings"),
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (cache {}) since {} unix", self.host, self.cache, self.since_unix_secs)
    }
}

/// What a keeper is doing, for people.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Not started.
    Idle,
    /// Claiming the volume.
    Claiming,
    /// Nothing to push.
    Clean,
    /// Blocks are dirty; no push is running.
    Dirty,
    /// A push is running.
    Pushing,
    /// Writing the released head.
    Releasing,
    /// Given up.
    Released,
    /// Never got it.
    Refused,
    /// Lost it.
    Fenced,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::Claiming => "claiming",
            Self::Clean => "clean",
            Self::Dirty => "dirty",
            Self::Pushing => "pushing",
            Self::Releasing => "releasing",
            Self::Released => "released",
            Self::Refused => "refused",
            Self::Fenced => "fenced",
        })
    }
}

/// The last store operation that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What was tried.
    pub what: &'static str,
    /// When.
    pub at: Instant,
    /// The runtime's number for the text; `None`: the bytes that came back were wrong.
    pub note: Option<u32>,
}

/// A keeper's figures.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status {
    /// What it is doing.
    pub phase: Phase,
    /// The image in the store is as of this epoch.
    pub committed: Epoch,
    /// Number of the newest head.
    pub head: u32,
    /// Bytes of the running push that are not in the store yet.
    pub backlog_bytes: u64,
    /// Bytes of the running push.
    pub push_bytes: u64,
    /// When the oldest block that is not committed became dirty, as far as is known.
    pub dirty_since: Option<Instant>,
    /// Store operations that wait to be tried again.
    pub retrying: usize,
    /// The last failure, also when it is over.
    pub last_failure: Option<Failure>,
    /// Bytes of blocks committed since the start.
    pub pushed_bytes: u64,
    /// Bytes put since the start, headers, map pages and copies included.
    pub put_bytes: u64,
    /// What the store holds, once it has been counted.
    pub store: Option<StoreBytes>,
    /// Of a flattening: map pages, and how many of them have not been copied.
    pub flatten_pages: Option<(u64, u64)>,
}

/// The machine: see the [module](self).
///
/// * `handle` takes everything from outside; `poll_output` is then drained to `None`;
/// * `poll_timeout` says when to come back;
/// * `status` and `phase` are for people.
#[derive(Debug)]
pub struct Keeper {
    config: Config,
    volume: VolumeId,
    /// Wall clock at a point of the monotonic one.
    clock: (Instant, u64),
    state: State,
    store: Store,
    out: VecDeque<Output>,
}

#[derive(Debug)]
enum State {
    Idle,
    Claiming(Box<Claim>),
    Opening(Box<Claimed>),
    Held(Box<Held>),
    /// A snapshot.
    Viewing(Box<View>),
    /// Released, Refused or Fenced, with what was last committed and the newest head then.
    Over(Phase, Epoch, u32),
}

/// A volume that is ours, but whose image is not complete here.
#[derive(Debug)]
struct Claimed {
    opening: Opening,
    head: Head,
    superseded: Option<u32>,
    ours: bool,
    /// It is to be given up again as soon as it is complete.
    detach: bool,
}

impl Keeper {
    /// A keeper that waits for [`Input::Start`].
    ///
    /// # Panics
    /// On a number of shards that no cache has.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let shards = usize::from(config.shards);
        assert!((1..=crate::limits::SHARDS_MAX).contains(&shards), "a cache has 1 to 64 shards");
        Self {
            store: Store::new(&config),
            config,
            volume: VolumeId(0),
            clock: (Instant(0), 0),
            state: State::Idle,
            out: VecDeque::new(),
        }
    }

    /// Takes one input. Work is bounded by the input and by the packs and map pages that it
    /// makes ready to go out.
    ///
    /// # Panics
    /// If a shard breaks the order of a push, or a second `Start` comes.
    pub fn handle(&mut self, now: Instant, input: Input<'_>) {
        if let Input::Start(start) = &input {
            self.clock = (now, start.unix_secs);
            self.volume = start.volume;
        }
        if let Input::Remembered { volume } | Input::View { volume, .. } = input {
            self.volume = volume;
        }
        let mut state = core::mem::replace(&mut self.state, State::Idle);
        let mut io = self.io(now);
        if matches!(input, Input::Tick) {
            io.store.tick(now, io.out);
        }
        state = match (state, input) {
            (State::Idle, Input::Start(start)) => {
                State::Claiming(Box::new(Claim::new(&start, &mut io)))
            }
            (State::Idle, Input::View { number, .. }) => {
                State::Viewing(Box::new(View::new(&mut io, number)))
            }
            (_, Input::Start(_) | Input::View { .. }) => panic!("a keeper has one volume, once"),
            (state, Input::StoreDone { op, result }) => match io.store.end(op) {
                Some(request) => finish(&mut io, state, request, result),
                None => {
                    // Nobody waits for the blocks any more.
                    if let StoreResult::Gathered(batch) = result {
                        io.out.push_back(Output::DropBatch(batch));
                    }
                    state
                }
            },
            (State::Claiming(mut claim), Input::Remembered { .. }) => {
                claim.handle_remembered(&mut io);
                State::Claiming(claim)
            }
            (state, Input::Remembered { .. }) => state,
            (State::Opening(mut claimed), Input::Detach) => {
                claimed.detach = true;
                State::Opening(claimed)
            }
            (State::Viewing(mut view), Input::Detach) => {
                view.let_go(&mut io);
                let head = view.head().map_or((Epoch::ZERO, 0), |head| (head.epoch, head.number));
                io.store.forget();
                io.out.push_back(Output::Released);
                State::Over(Phase::Released, head.0, head.1)
            }
            (State::Viewing(mut view), input) => {
                view.handle(&mut io, input);
                State::Viewing(view)
            }
            (State::Held(mut held), input) => {
                held.handle(&mut io, input);
                State::Held(held)
            }
            (state, input) => turn_away(&mut io, state, input),
        };
        if let State::Held(mut held) = state {
            let fate = held.settle(&mut io);
            state = follow(&mut io, held, fate);
        }
        self.state = state;
    }

    /// The next thing to do. Drain after every `handle`.
    #[must_use]
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// When [`Input::Tick`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let held = match &self.state {
            State::Held(held) => held.timeout(self.config.push_after),
            _ => None,
        };
        held.into_iter().chain(self.store.timeout()).min()
    }

    /// What it is doing.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match &self.state {
            State::Idle => Phase::Idle,
            State::Claiming(_) | State::Opening(_) => Phase::Claiming,
            State::Held(held) => held.phase(),
            State::Viewing(view) if view.head().is_none() => Phase::Claiming,
            State::Viewing(_) => Phase::Clean,
            State::Over(phase, ..) => *phase,
        }
    }

    /// Its figures.
    #[must_use]
    pub fn status(&self) -> Status {
        let held = if let State::Held(held) = &self.state { Some(held) } else { None };
        let (committed, head) = match &self.state {
            State::Held(held) => (held.committed(), held.head.number),
            State::Over(_, committed, head) => (*committed, *head),
            State::Opening(claimed) => (claimed.head.epoch, claimed.head.number),
            State::Viewing(view) => {
                view.head().map_or((Epoch::ZERO, 0), |head| (head.epoch, head.number))
            }
            State::Idle | State::Claiming(_) => (Epoch::ZERO, 0),
        };
        let (push_bytes, backlog_bytes) = held.map_or((0, 0), |held| held.push_bytes());
        Status {
            phase: self.phase(),
            committed,
            head,
            backlog_bytes,
            push_bytes,
            dirty_since: held.and_then(|held| held.dirty_since()),
            retrying: self.store.retrying(),
            last_failure: self.store.last_failure,
            pushed_bytes: held.map_or(0, |held| held.pushed_bytes()),
            put_bytes: self.store.put_bytes,
            store: held.and_then(|held| held.store_bytes()),
            flatten_pages: held.and_then(|held| held.flatten_pages()),
        }
    }

    fn io(&mut self, now: Instant) -> Io<'_> {
        let elapsed_secs = (now - self.clock.0).0 / Duration::from_secs(1).0;
        Io {
            now,
            config: &self.config,
            volume: self.volume,
            unix_secs: self.clock.1 + elapsed_secs,
            out: &mut self.out,
            store: &mut self.store,
        }
    }
}

/// The end of a store operation that somebody waits for.
fn finish(io: &mut Io<'_>, state: State, request: Request, result: StoreResult<'_>) -> State {
    match state {
        State::Claiming(mut claim) => match claim.handle_done(io, request, result) {
            Step::Wait => State::Claiming(claim),
            Step::Claimed { head, superseded, ours } => {
                let opening = Opening::start(io, &head);
                let head = *head;
                attach(io, Box::new(Claimed { opening, head, superseded, ours, detach: false }))
            }
            Step::Refused(refusal) => refuse(io, refusal),
        },
        State::Opening(mut claimed) => {
            let done = claimed.opening.handle_done(io, &claimed.head, request, result);
            match done {
                Ok(()) => attach(io, claimed),
                Err(refusal) => refuse(io, refusal),
            }
        }
        State::Held(mut held) => {
            let fate = held.handle_done(io, request, result);
            follow(io, held, fate)
        }
        State::Viewing(mut view) => match view.handle_done(io, request, result) {
            Ok(()) => State::Viewing(view),
            Err(refusal) => refuse(io, refusal),
        },
        State::Idle | State::Over(..) => unreachable!("the store was told to forget"),
    }
}

fn refuse(io: &mut Io<'_>, refusal: Refusal) -> State {
    io.store.forget();
    io.out.push_back(Output::Refused(refusal));
    State::Over(Phase::Refused, Epoch::ZERO, 0)
}

/// Serves a claimed volume, if its image is complete.
fn attach(io: &mut Io<'_>, mut claimed: Box<Claimed>) -> State {
    let Some(opened) = claimed.opening.finish(&claimed.head) else {
        return State::Opening(claimed);
    };
    let Claimed { head, superseded, ours, detach, .. } = *claimed;
    let mut held = Box::new(Held::new(io.now, head, superseded, opened));
    io.out.push_back(Output::Attached(Attached {
        volume: io.volume,
        name: held.head.name.clone(),
        blocks: held.head.blocks,
        object_shift: held.head.object_shift,
        created_unix_secs: held.head.created_unix_secs,
        settings: held.head.settings.clone(),
        parent: held.head.sources.first().copied(),
        ours,
        open: held.open(),
        committed: held.committed(),
    }));
    held.attach(io);
    if detach {
        held.handle(io, Input::Detach);
    }
    State::Held(held)
}

fn follow(io: &mut Io<'_>, mut held: Box<Held>, fate: Fate) -> State {
    let (phase, end) = match fate {
        Fate::Held => return State::Held(held),
        Fate::Released => {
            held.let_go(io);
            (Phase::Released, Output::Released)
        }
        Fate::Fenced(by) => {
            held.fence(io);
            (Phase::Fenced, Output::Fenced { by })
        }
    };
    io.store.forget();
    io.out.push_back(end);
    State::Over(phase, held.committed(), held.head.number)
}

/// What a keeper without a volume says.
fn turn_away(io: &mut Io<'_>, state: State, input: Input<'_>) -> State {
    match input {
        Input::Batch { batch, .. } => io.out.push_back(Output::DropBatch(batch)),
        Input::Fetch { shard, op, .. } => io.out.push_back(Output::FetchFailed { shard, op }),
        Input::Query { shard, op, .. } => io.out.push_back(Output::QueryFailed { shard, op }),
        Input::PushNow { ticket } | Input::Edit { ticket, .. } | Input::Flatten { ticket } => {
            io.out.push_back(Output::PushDone { ticket, committed: false });
        }
        Input::Detach if matches!(state, State::Idle | State::Claiming(_)) => {
            io.store.forget();
            io.out.push_back(Output::Released);
            return State::Over(Phase::Released, Epoch::ZERO, 0);
        }
        _ => {}
    }
    state
}
