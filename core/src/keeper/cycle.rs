//! One push: from the freeze to the last map page. The commit is the holder's business.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use super::map::{Known, Map};
use super::store::{Call, Io, Task};
use super::{BatchHandle, Output};
use crate::event::{PushRun, ToShard};
use crate::ids::{BLOCK_BYTES, Epoch, ShardId};
use crate::limits::{BATCH_BLOCKS_MAX, MAP_PAGE_BLOCKS, OBJECT_BLOCKS_MAX, PACK_BLOCKS_MAX};
use crate::time::{Duration, Instant};
use crate::wire::head::Head;
use crate::wire::map_page::{Data, MapPage, PackRef, Update};
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
    Mapping,
}

/// A batch on its way into a pack.
#[derive(Clone, Copy, Debug)]
struct Batch {
    shard: ShardId,
    handle: BatchHandle,
    blocks: u64,
}

/// The pack that is being filled.
#[derive(Debug, Default)]
struct Open {
    runs: Vec<pack::Run>,
    crcs: Vec<u32>,
    batches: Vec<Batch>,
    /// Blocks of the runs.
    blocks: u16,
    /// When it goes out as it is.
    deadline: Option<Instant>,
}

/// A pack that is complete.
#[derive(Debug)]
struct Sealed {
    n: u32,
    header: Arc<[u8]>,
    batches: Vec<Batch>,
}

/// Blocks of a map page that have changed.
#[derive(Clone, Copy, Debug)]
struct Change {
    first: u16,
    count: u16,
    /// `None`: zeroes.
    data: Option<Place>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    /// The pack.
    n: u32,
    /// First block in the pack.
    offset: u16,
    /// Index of the first block's CRC in the cycle's list.
    crc_at: u32,
}

/// A map page of the new image.
#[derive(Debug)]
pub(super) struct Staged {
    /// The page is all zeroes and needs no object.
    pub(super) empty: bool,
    /// Kept for after the commit, if there is room.
    pub(super) content: Option<Arc<MapPage>>,
}

/// A push under way.
#[derive(Debug)]
pub(super) struct Cycle {
    pub(super) epoch: Epoch,
    /// When its oldest block became dirty.
    pub(super) dirty_since: Option<Instant>,
    /// Who waits for it.
    pub(super) tickets: Vec<u64>,
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
    /// Header pages of each sealed pack.
    header_pages: Vec<u16>,
    /// CRCs of all data blocks.
    crcs: Vec<u32>,
    changes: BTreeMap<u32, Vec<Change>>,
    changed: bool,
    loading: BTreeMap<u32, Vec<Change>>,
    pages_putting: usize,
    /// The new image's pages, complete when the cycle is.
    pub(super) staged: BTreeMap<u32, Staged>,
}

impl Cycle {
    /// Asks all shards to close `epoch`.
    pub(super) fn start(
        io: &mut Io<'_>,
        epoch: Epoch,
        dirty_since: Option<Instant>,
        tickets: Vec<u64>,
    ) -> Self {
        let shards = io.config.shards;
        broadcast(io, ToShard::Freeze { volume: io.volume, next: epoch.next() });
        Self {
            epoch,
            dirty_since,
            tickets,
            stage: Stage::Freezing,
            shards: vec![Progress::Freezing; shards.into()],
            missing: shards,
            announced: 0,
            stored: 0,
            open: Open::default(),
            sealed: VecDeque::new(),
            putting: BTreeMap::new(),
            header_pages: Vec::new(),
            crcs: Vec::new(),
            changes: BTreeMap::new(),
            changed: false,
            loading: BTreeMap::new(),
            pages_putting: 0,
            staged: BTreeMap::new(),
        }
    }

    /// Whether mail of this shard is from before its freeze, so that this cycle covers what it
    /// speaks of.
    pub(super) fn covers(&self, shard: ShardId) -> bool {
        self.shards[usize::from(shard.0)] == Progress::Freezing
    }

    /// Whether anything in the image changes. Valid once the shards have pushed.
    pub(super) fn changed(&self) -> bool {
        self.changed
    }

    /// Blocks announced, and blocks in the store.
    pub(super) fn blocks(&self) -> (u64, u64) {
        (self.announced, self.stored)
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

    pub(super) fn handle_pushed(&mut self, io: &mut Io<'_>, shard: ShardId) {
        assert_eq!(self.stage, Stage::Packing, "shards push when all are frozen");
        self.advance(shard, Progress::Frozen, Progress::Pushed);
        if self.missing == 0 {
            self.seal(io);
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
        if self.open.crcs.len() + crcs.len() > PACK_BLOCKS_MAX {
            self.seal(io);
        }
        self.changed |= !runs.is_empty();
        let crc_base = self.crcs.len() as u32;
        self.crcs.extend_from_slice(crcs);
        let mut taken = 0;
        for run in runs {
            self.note(head, run, crc_base + taken);
            if !run.zero {
                taken += u32::from(run.count);
            }
        }
        assert_eq!(taken as usize, crcs.len(), "a batch has a CRC for each data block");
        let total: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
        // Zeroes need no put.
        self.stored += total - u64::from(taken);
        let batch = Batch { shard, handle, blocks: taken.into() };
        if taken == 0 {
            self.finish(io, batch);
            return;
        }
        self.open.crcs.extend_from_slice(crcs);
        self.open.batches.push(batch);
        self.open.deadline = Some(io.now + LINGER);
        if self.open.crcs.len() == PACK_BLOCKS_MAX {
            self.seal(io);
        }
    }

    /// Notes where a run of a batch will be. Its blocks go to the end of the open pack.
    fn note(&mut self, head: &Head, run: &PushRun, crc_at: u32) {
        let (first, count) = (u32::from(run.first), u32::from(run.count));
        assert!(count > 0 && first + count <= head.object_blocks(), "a run is inside its object");
        let block = u64::from(run.object) * u64::from(head.object_blocks()) + u64::from(first);
        let page = (block / MAP_PAGE_BLOCKS as u64) as u32;
        assert!(page < head.page_count(), "a run is inside the volume");
        let data = (!run.zero).then(|| {
            let offset = self.open.blocks;
            self.open.blocks += run.count;
            let joins =
                self.open.runs.last_mut().filter(|last| {
                    last.object == run.object && last.first + last.count == run.first
                });
            match joins {
                Some(last) => last.count += run.count,
                None => self.open.runs.push(pack::Run {
                    object: run.object,
                    first: run.first,
                    count: run.count,
                }),
            }
            Place { n: self.header_pages.len() as u32, offset, crc_at }
        });
        let first = (block % MAP_PAGE_BLOCKS as u64) as u16;
        self.changes.entry(page).or_default().push(Change { first, count: run.count, data });
    }

    /// Sends out packs that have waited long enough.
    pub(super) fn tick(&mut self, io: &mut Io<'_>) {
        if self.open.deadline.is_some_and(|at| at <= io.now) {
            self.seal(io);
        }
    }

    /// Completes the open pack, if there is anything in it.
    fn seal(&mut self, io: &mut Io<'_>) {
        let open = core::mem::take(&mut self.open);
        if open.batches.is_empty() {
            return;
        }
        let n = self.header_pages.len() as u32;
        let (volume, epoch) = (io.config.uuid, self.epoch);
        let header = pack::Header { volume, epoch, n, runs: open.runs, crcs: open.crcs };
        self.header_pages.push(header.pages());
        let header = header.encode(io.config.crc32c).into();
        self.sealed.push_back(Sealed { n, header, batches: open.batches });
        self.put_packs(io);
    }

    fn put_packs(&mut self, io: &mut Io<'_>) {
        while self.putting.len() < io.config.puts_max.max(1) {
            let Some(Sealed { n, header, batches }) = self.sealed.pop_front() else { return };
            let blocks: u64 = batches.iter().map(|batch| batch.blocks).sum();
            io.store.put_bytes += header.len() as u64 + blocks * BLOCK_BYTES as u64;
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

    /// Goes on as far as it can. True when the image is complete but for its head.
    pub(super) fn settle(&mut self, io: &mut Io<'_>, head: &Head, map: &mut Map) -> bool {
        let packed = self.stage == Stage::Packing && self.missing == 0;
        if packed && self.sealed.is_empty() && self.putting.is_empty() {
            self.stage = Stage::Mapping;
        }
        if self.stage != Stage::Mapping {
            return false;
        }
        while self.pages_putting + self.loading.len() < io.config.puts_max.max(1) {
            let Some((page, changes)) = self.changes.pop_first() else { break };
            match map.want_for_cycle(io, head, page) {
                Known::Page(base) => self.stage_page(io, page, &base, changes),
                Known::Loading => {
                    self.loading.insert(page, changes);
                }
            }
        }
        self.changes.is_empty() && self.loading.is_empty() && self.pages_putting == 0
    }

    /// A page that the cycle waited for.
    pub(super) fn handle_page_loaded(&mut self, io: &mut Io<'_>, page: u32, base: &MapPage) {
        let changes = self.loading.remove(&page).expect("the cycle waited for the page");
        self.stage_page(io, page, base, changes);
    }

    pub(super) fn handle_page_put(&mut self) {
        self.pages_putting -= 1;
    }

    fn stage_page(&mut self, io: &mut Io<'_>, page: u32, base: &MapPage, mut changes: Vec<Change>) {
        changes.sort_unstable_by_key(|change| change.first);
        let updates: Vec<_> = changes.iter().map(|change| self.update(change)).collect();
        let content = base.apply(&updates);
        let empty = content.is_empty();
        if !empty {
            let bytes = content.encode(io.config.uuid, page, self.epoch, io.config.crc32c);
            io.store.put_bytes += bytes.len() as u64;
            let call = Call::Put {
                key: names::map_key(io.config.uuid, page, self.epoch),
                meta: bytes.into(),
                batches: Vec::new(),
            };
            io.start(Task::PutPage { page }, call);
            self.pages_putting += 1;
        }
        let keep = !empty && self.staged.len() < io.config.pages_max;
        let content = keep.then(|| Arc::new(content));
        self.staged.insert(page, Staged { empty, content });
    }

    fn update(&self, change: &Change) -> Update<'_> {
        let data = change.data.map(|place| {
            let header_pages = self.header_pages[place.n as usize];
            let crc_at = place.crc_at as usize;
            Data {
                pack: PackRef { epoch: self.epoch, n: place.n, header_pages },
                offset: place.offset,
                crcs: &self.crcs[crc_at..crc_at + usize::from(change.count)],
            }
        });
        Update { first: change.first, count: change.count, data }
    }

    /// The volume is lost: lets go of all batches.
    pub(super) fn abandon(&mut self, io: &mut Io<'_>) {
        let open = core::mem::take(&mut self.open).batches;
        let sealed = self.sealed.drain(..).flat_map(|sealed| sealed.batches);
        let putting = core::mem::take(&mut self.putting).into_values().flatten();
        for batch in open.into_iter().chain(sealed).chain(putting) {
            io.out.push_back(Output::DropBatch(batch.handle));
        }
    }
}

/// The same mail to every shard.
pub(super) fn broadcast(io: &mut Io<'_>, mail: ToShard) {
    for shard in 0..io.config.shards {
        io.out.push_back(Output::ToShard(ShardId(shard), mail));
    }
}

const _: () = assert!(MAP_PAGE_BLOCKS.is_multiple_of(OBJECT_BLOCKS_MAX), "an object has one page");
