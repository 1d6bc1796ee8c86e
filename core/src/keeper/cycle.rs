//! One push: from the freeze to the last pack. The commit is the holder's business.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use super::changes::Changes;
use super::store::{Call, Io, Task};
use super::{BatchHandle, Edit, Output};
use crate::event::{PushRun, ToShard};
use crate::ids::{BLOCK_BYTES, Epoch, ShardId};
use crate::limits::{
    BATCH_BLOCKS_MAX, MAP_PAGE_BLOCKS, OBJECT_BLOCKS_MAX, PACK_BLOCKS_MAX, PACK_RUNS_MAX,
};
use crate::time::{Duration, Instant};
use crate::wire::head::{Head, TailPack};
use crate::wire::names;
use crate::wire::pack;

/// A pack that is not full waits so long for another batch. Shards that have used up their
/// credit send no more before it goes out.
const LINGER: Duration = Duration::from_millis(10);

/// How far a shard is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Progress {
    Freezing,
    Frozen,
    Pushed,
}

/// Where the cycle is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Freezing,
    Packing,
}

/// A batch on its way into a pack.
#[derive(Clone, Copy, Debug)]
struct Batch {
    shard: ShardId,
    handle: BatchHandle,
    /// Those that are zeroes included.
    blocks: u64,
}

/// A batch that waits for its pack to be full.
#[derive(Debug)]
struct Gathered {
    batch: Batch,
    runs: Vec<PushRun>,
    crcs: Vec<u32>,
}

/// The pack that is being filled.
#[derive(Debug, Default)]
struct Open {
    batches: Vec<Gathered>,
    /// Of all of them.
    runs: usize,
    data_blocks: usize,
    /// When it goes out as it is.
    deadline: Option<Instant>,
}

/// A pack that is complete.
#[derive(Debug)]
struct Sealed {
    n: u32,
    header: Arc<[u8]>,
    batches: Vec<Batch>,
    data_blocks: usize,
}

/// A push under way.
#[derive(Debug)]
pub(super) struct Cycle {
    pub(super) epoch: Epoch,
    /// When its oldest block became dirty.
    pub(super) dirty_since: Option<Instant>,
    /// Who waits for it.
    pub(super) tickets: Vec<u64>,
    /// What its commit changes of the volume beside its blocks.
    pub(super) edits: Vec<Edit>,
    stage: Stage,
    shards: Vec<Progress>,
    /// Shards that have not come as far as the stage asks.
    missing: u16,
    /// Blocks that the shards have announced, and how many of them are in the store.
    announced: u64,
    stored: u64,
    open: Open,
    sealed: VecDeque<Sealed>,
    /// By number of the pack.
    putting: BTreeMap<u32, Vec<Batch>>,
    /// Those that were sealed, in order: the tail grows by them. And the bytes of each.
    pub(super) packs: Vec<TailPack>,
    pub(super) pack_bytes: Vec<u64>,
    /// What they change of the image.
    pub(super) changes: Changes,
    data_bytes: u64,
}

impl Cycle {
    /// Asks all shards to close `epoch`.
    pub(super) fn start(
        io: &mut Io<'_>,
        epoch: Epoch,
        dirty_since: Option<Instant>,
        tickets: Vec<u64>,
        edits: Vec<Edit>,
    ) -> Self {
        let shards = io.config.shards;
        broadcast(io, ToShard::Freeze { volume: io.volume, next: epoch.next() });
        Self {
            epoch,
            dirty_since,
            tickets,
            edits,
            stage: Stage::Freezing,
            shards: vec![Progress::Freezing; shards.into()],
            missing: shards,
            announced: 0,
            stored: 0,
            open: Open::default(),
            sealed: VecDeque::new(),
            putting: BTreeMap::new(),
            packs: Vec::new(),
            pack_bytes: Vec::new(),
            changes: Changes::default(),
            data_bytes: 0,
        }
    }

    /// Whether mail of this shard is from before its freeze, so that this cycle covers what it
    /// speaks of.
    pub(super) fn covers(&self, shard: ShardId) -> bool {
        self.shards[usize::from(shard.0)] == Progress::Freezing
    }

    /// Whether its commit changes anything. Valid once the shards have pushed.
    pub(super) fn changed(&self) -> bool {
        !self.packs.is_empty() || !self.edits.is_empty()
    }

    /// Bytes of data in its packs.
    pub(super) fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Blocks announced, and blocks in the store.
    pub(super) fn blocks(&self) -> (u64, u64) {
        (self.announced, self.stored)
    }

    /// Bytes that the shards have announced and that are not in the store yet.
    pub(super) fn backlog_bytes(&self) -> u64 {
        self.announced.saturating_sub(self.stored) * BLOCK_BYTES as u64
    }

    /// When a pack goes out though it is not full.
    pub(super) fn timeout(&self) -> Option<Instant> {
        self.open.deadline
    }

    pub(super) fn handle_frozen(&mut self, io: &mut Io<'_>, shard: ShardId, blocks: u64) {
        self.advance(shard, Progress::Freezing, Progress::Frozen);
        self.announced += blocks;
        if self.missing == 0 {
            self.stage = Stage::Packing;
            self.missing = io.config.shards;
            broadcast(io, ToShard::Released { volume: io.volume });
        }
    }

    pub(super) fn handle_pushed(&mut self, io: &mut Io<'_>, head: &Head, shard: ShardId) {
        assert_eq!(self.stage, Stage::Packing, "shards push when all are frozen");
        self.advance(shard, Progress::Frozen, Progress::Pushed);
        if self.missing == 0 {
            self.seal(io, head);
        }
    }

    fn advance(&mut self, shard: ShardId, from: Progress, to: Progress) {
        let progress = &mut self.shards[usize::from(shard.0)];
        assert_eq!(*progress, from, "a shard goes through a push once, in order");
        *progress = to;
        self.missing -= 1;
    }

    pub(super) fn handle_batch(
        &mut self,
        io: &mut Io<'_>,
        head: &Head,
        (shard, handle): (ShardId, BatchHandle),
        runs: &[PushRun],
        crcs: &[u32],
    ) {
        assert_eq!(self.stage, Stage::Packing, "batches come when all shards are frozen");
        assert_eq!(self.shards[usize::from(shard.0)], Progress::Frozen, "and before Pushed");
        assert!(crcs.len() <= BATCH_BLOCKS_MAX, "a batch is bounded");
        let full = self.open.data_blocks + crcs.len() > PACK_BLOCKS_MAX
            || self.open.runs + runs.len() > PACK_RUNS_MAX;
        if full {
            self.seal(io, head);
        }
        let mut data_blocks = 0;
        let mut blocks = 0;
        for run in runs {
            let end = u32::from(run.first) + u32::from(run.count);
            assert!(run.count > 0 && end <= head.object_blocks(), "a run is inside its object");
            blocks += u64::from(run.count);
            data_blocks += if run.zero { 0 } else { usize::from(run.count) };
        }
        assert_eq!(data_blocks, crcs.len(), "a batch has a CRC for each data block");
        let batch = Batch { shard, handle, blocks };
        if blocks == 0 {
            return self.finish(io, batch);
        }
        self.open.batches.push(Gathered { batch, runs: runs.into(), crcs: crcs.into() });
        self.open.runs += runs.len();
        self.open.data_blocks += data_blocks;
        self.open.deadline = Some(io.now + LINGER);
        if self.open.data_blocks == PACK_BLOCKS_MAX {
            self.seal(io, head);
        }
    }

    /// Sends out packs that have waited long enough.
    pub(super) fn tick(&mut self, io: &mut Io<'_>, head: &Head) {
        if self.open.deadline.is_some_and(|at| at <= io.now) {
            self.seal(io, head);
        }
    }

    /// Completes the open pack, if there is anything in it.
    fn seal(&mut self, io: &mut Io<'_>, head: &Head) {
        let mut gathered = core::mem::take(&mut self.open).batches;
        if gathered.is_empty() {
            return;
        }
        // A shard goes through its objects one by one: so neighbours stay together.
        gathered.sort_by_key(|gathered| gathered.batch.shard);
        let n = self.packs.len() as u32;
        let (volume, epoch) = (io.config.uuid, self.epoch);
        let runs = joined(gathered.iter().flat_map(|gathered| &gathered.runs));
        let crcs = gathered.iter().flat_map(|gathered| &gathered.crcs).copied().collect();
        let header = pack::Header { volume, epoch, n, runs, crcs };
        let tail = TailPack { source: 0, epoch, n, header_bytes: header.bytes() };
        let bytes = header.encode(io.config.crc32c).into();
        self.changes.add(head, tail, &header);
        self.packs.push(tail);
        let data_blocks = header.crcs.len();
        let data_bytes = (data_blocks * BLOCK_BYTES) as u64;
        self.data_bytes += data_bytes;
        self.pack_bytes.push(u64::from(tail.header_bytes) + data_bytes);
        let batches = gathered.iter().map(|gathered| gathered.batch).collect();
        self.sealed.push_back(Sealed { n, header: bytes, batches, data_blocks });
        self.put_packs(io);
    }

    fn put_packs(&mut self, io: &mut Io<'_>) {
        while self.putting.len() < io.config.puts_max.max(1) {
            let Some(sealed) = self.sealed.pop_front() else { return };
            let Sealed { n, header, batches, data_blocks } = sealed;
            io.store.put_bytes += (header.len() + data_blocks * BLOCK_BYTES) as u64;
            let call = Call::Put {
                key: names::pack_key(io.config.uuid, self.epoch, n),
                meta: header,
                batches: batches.iter().map(|batch| batch.handle).collect(),
            };
            self.putting.insert(n, batches);
            io.start(Task::PutPack { n }, call);
        }
    }

    pub(super) fn handle_pack_put(&mut self, io: &mut Io<'_>, n: u32) {
        let batches = self.putting.remove(&n).expect("the pack was being put");
        batches.into_iter().for_each(|batch| self.finish(io, batch));
        self.put_packs(io);
    }

    fn finish(&mut self, io: &mut Io<'_>, batch: Batch) {
        self.stored += batch.blocks;
        io.out.push_back(Output::DropBatch(batch.handle));
        io.out.push_back(Output::ToShard(batch.shard, ToShard::BatchDone { volume: io.volume }));
    }

    /// Whether all packs are in the store.
    pub(super) fn is_stored(&self) -> bool {
        let packed = self.stage == Stage::Packing && self.missing == 0;
        packed && self.sealed.is_empty() && self.putting.is_empty()
    }

    /// The volume is lost: lets go of all batches.
    pub(super) fn abandon(&mut self, io: &mut Io<'_>) {
        let open = core::mem::take(&mut self.open).batches;
        let open = open.into_iter().map(|gathered| gathered.batch);
        let sealed = self.sealed.drain(..).flat_map(|sealed| sealed.batches);
        let putting = core::mem::take(&mut self.putting).into_values().flatten();
        for batch in open.chain(sealed).chain(putting) {
            io.out.push_back(Output::DropBatch(batch.handle));
        }
    }
}

/// The runs of a pack: those that follow each other as one.
fn joined<'a>(runs: impl Iterator<Item = &'a PushRun>) -> Vec<pack::Run> {
    let mut joined: Vec<pack::Run> = Vec::new();
    for &PushRun { object, first, count, zero } in runs {
        let joins = joined.last_mut().filter(|last| {
            last.object == object && last.first + last.count == first && last.zero == zero
        });
        match joins {
            Some(last) => last.count += count,
            None => joined.push(pack::Run { object, first, count, zero }),
        }
    }
    joined
}

/// The same mail to every shard.
pub(super) fn broadcast(io: &mut Io<'_>, mail: ToShard) {
    for shard in 0..io.config.shards {
        io.out.push_back(Output::ToShard(ShardId(shard), mail));
    }
}

const _: () = assert!(MAP_PAGE_BLOCKS.is_multiple_of(OBJECT_BLOCKS_MAX), "an object has one page");
