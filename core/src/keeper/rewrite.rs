//! Rewriting: blocks that the image needs are copied out of packs that hold little else, so that
//! these packs can go; or out of other volumes' packs, so that a clone needs them no more.
//!
//! ```text
//! Headers (of victims) -> Pages (which of their blocks are live) -> Copies (read, put as packs)
//!   -> Ready: the next checkpoint writes where the blocks lie now
//! ```
//!
//! The image may change meanwhile: what was overwritten is not found where it was, and its copy is
//! of no use. Nothing waits for it; if it is cut short, its packs are orphans.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::held::fault;
use super::map::{Known, Map, plan};
use super::store::{Call, Io, Request, Task};
use super::{BatchHandle, Output, StoreResult};
use crate::ids::{BLOCK_BYTES, Epoch};
use crate::limits::{MAP_PAGE_BLOCKS, PACK_BLOCKS_MAX};
use crate::wire::head::Head;
use crate::wire::map_page::{Data, MapPage, PackRef};
use crate::wire::names;
use crate::wire::pack::{self, FIRST_COPY};

/// Unwanted blocks that are read along (64 KiB): nobody waits, and many of these packs hold one
/// live block here and one there.
const GAP_BLOCKS_MAX: u16 = 16;

/// Where blocks lie that were copied: by where they lay.
pub(super) type Moves = BTreeMap<(PackRef, u16), (PackRef, u16)>;

/// A live block of a victim.
#[derive(Clone, Copy, Debug)]
struct Live {
    /// Number in the volume.
    block: u64,
    pack: PackRef,
    offset: u16,
    crc: u32,
}

/// What is copied.
#[derive(Debug)]
enum Aim {
    /// These packs.
    Packs(BTreeSet<PackRef>),
    /// All packs of other volumes.
    Foreign,
}

#[derive(Debug)]
pub(super) struct Rewrite {
    aim: Aim,
    headers_left: usize,
    /// Pages to look at, and the one that is on its way.
    todo: BTreeSet<u32>,
    loading: Option<u32>,
    /// Pages that must be written anew.
    pages: Vec<u32>,
    /// Live blocks that have not been copied, from the last one on.
    live: Vec<Live>,
    blocks_max: usize,
    copying: Option<Copying>,
    /// In the names of the copies.
    epoch: Epoch,
    moves: Moves,
}

/// One pack of copies.
#[derive(Debug)]
struct Copying {
    blocks: Vec<Live>,
    /// In its name.
    n: u32,
    batch: Option<BatchHandle>,
    /// Bytes of its header.
    header_bytes: u16,
}

impl Rewrite {
    /// Copies what is live of these packs.
    pub(super) fn packs(io: &mut Io<'_>, head: &Head, victims: Vec<PackRef>) -> Self {
        for pack in &victims {
            let key = names::pack_key(head.volume, pack.epoch, pack.n);
            let call = Call::GetFirst(key, pack.header_bytes.into());
            io.start(Task::ReadVictim { pack: *pack }, call);
        }
        let headers_left = victims.len();
        Self::new(io, head, Aim::Packs(victims.into_iter().collect()), headers_left)
    }

    /// Copies what lies in other volumes, from page `first` on.
    pub(super) fn foreign(io: &Io<'_>, head: &Head, map: &Map, first: u32) -> Self {
        let mut rewrite = Self::new(io, head, Aim::Foreign, 0);
        rewrite.todo = head.pages.range(first..).map(|(page, _)| *page).collect();
        rewrite.todo.extend(map.overlaid().filter(|page| *page >= first));
        rewrite
    }

    fn new(io: &Io<'_>, head: &Head, aim: Aim, headers_left: usize) -> Self {
        Self {
            aim,
            headers_left,
            todo: BTreeSet::new(),
            loading: None,
            pages: Vec::new(),
            live: Vec::new(),
            blocks_max: io.config.copy_blocks_max,
            copying: None,
            epoch: head.epoch,
            moves: Moves::new(),
        }
    }

    /// The header of a victim says in which pages its blocks may be.
    pub(super) fn handle_header(
        &mut self,
        io: &mut Io<'_>,
        head: &Head,
        request: Request,
        result: StoreResult<'_>,
    ) {
        let header = match result {
            StoreResult::Got(bytes) => pack::Header::decode(bytes, io.config.crc32c).ok(),
            StoreResult::Failed { .. } => return io.again(request, fault(result)),
            _ => None,
        };
        self.headers_left -= 1;
        // A damaged victim stays as it is: `heeler check` tells of it.
        let Some(header) = header else { return };
        for run in header.runs.iter().filter(|run| !run.zero) {
            let (page, _) = head.place_of(run.object, run.first);
            if head.pages.contains_key(&page) {
                self.todo.insert(page);
            }
        }
    }

    /// A page that it waited for.
    pub(super) fn handle_loaded(&mut self, head: &Head, map: &Map, page: u32, base: &MapPage) {
        if self.loading == Some(page) {
            self.loading = None;
            self.look_at(head, map, page, base);
        }
    }

    fn look_at(&mut self, head: &Head, map: &Map, page: u32, base: &MapPage) {
        let before = self.live.len();
        let first = u64::from(page) * MAP_PAGE_BLOCKS as u64;
        for piece in map.look_through(page, base) {
            let Some(data) = piece.data else { continue };
            let wanted = match &self.aim {
                Aim::Packs(victims) => victims.contains(&data.pack),
                Aim::Foreign => data.pack.source > 0,
            };
            if !wanted {
                continue;
            }
            for (at, crc) in (0..).zip(data.crcs) {
                let block = first + u64::from(piece.first) + u64::from(at);
                let offset = data.offset + at;
                self.live.push(Live { block, pack: data.pack, offset, crc: *crc });
            }
        }
        let borrowed = head.pages.get(&page).is_some_and(|at| at.source > 0);
        if self.live.len() > before || (borrowed && matches!(self.aim, Aim::Foreign)) {
            self.pages.push(page);
        }
    }

    /// Goes on as far as it can. True when all copies are in the store.
    pub(super) fn settle(
        &mut self,
        io: &mut Io<'_>,
        head: &Head,
        map: &mut Map,
        copies: &mut u32,
    ) -> bool {
        if self.headers_left > 0 || self.copying.is_some() {
            return false;
        }
        while self.loading.is_none() && self.live.len() < self.blocks_max {
            let Some(page) = self.todo.pop_first() else { break };
            match map.want_for_rewrite(io, head, page) {
                Known::Page(base) => self.look_at(head, map, page, &base),
                Known::Loading => self.loading = Some(page),
            }
        }
        if self.loading.is_some() {
            return false;
        }
        if self.live.is_empty() {
            return true;
        }
        self.copy_some(io, head, copies);
        false
    }

    fn copy_some(&mut self, io: &mut Io<'_>, head: &Head, copies: &mut u32) {
        let from = self.live.len().saturating_sub(PACK_BLOCKS_MAX);
        let mut blocks = self.live.split_off(from);
        blocks.sort_unstable_by_key(|live| live.block);
        let pieces = blocks.iter().zip(0..).map(|(live, at)| {
            let crcs = core::slice::from_ref(&live.crc);
            (Data { pack: live.pack, offset: live.offset, crcs }, at)
        });
        let reads = plan(pieces.collect(), GAP_BLOCKS_MAX, |data| {
            let PackRef { source, epoch, n, .. } = data.pack;
            names::pack_key(head.volume_of(source), epoch, n)
        });
        io.start(Task::Gather, Call::Gather(blocks.len() as u16, reads));
        let n = FIRST_COPY + *copies;
        self.copying = Some(Copying { blocks, n, batch: None, header_bytes: 0 });
        *copies += 1;
    }

    /// The blocks are here: they go out as a pack.
    pub(super) fn handle_gathered(
        &mut self,
        io: &mut Io<'_>,
        head: &Head,
        request: Request,
        result: StoreResult<'_>,
    ) {
        let copying = self.copying.as_mut().expect("the blocks are gathered for a copy");
        match result {
            StoreResult::Gathered(batch) => {
                copying.batch = Some(batch);
                let header = copying.header(head, self.epoch);
                copying.header_bytes = header.bytes();
                let key = names::pack_key(head.volume, self.epoch, copying.n);
                let meta: Arc<[u8]> = header.encode(io.config.crc32c).into();
                let bytes = meta.len() + copying.blocks.len() * BLOCK_BYTES;
                io.store.put_bytes += bytes as u64;
                io.start(Task::PutCopy, Call::Put { key, meta, batches: [batch].into() });
            }
            // What cannot be read stays where it is.
            _ if request.failures >= io.config.load_attempts_max => self.copying = None,
            result => io.again(request, fault(result)),
        }
    }

    /// A pack of copies is in the store. Returns its name and bytes.
    pub(super) fn handle_put(&mut self, io: &mut Io<'_>) -> (Epoch, u32, u64) {
        let copying = self.copying.take().expect("a copy was put");
        let Copying { n, header_bytes, .. } = copying;
        let pack = PackRef { source: 0, epoch: self.epoch, n, header_bytes };
        for (at, live) in (0..).zip(&copying.blocks) {
            self.moves.insert((live.pack, live.offset), (pack, at));
        }
        io.out.extend(copying.batch.map(Output::DropBatch));
        let bytes = u64::from(header_bytes) + (copying.blocks.len() * BLOCK_BYTES) as u64;
        (pack.epoch, pack.n, bytes)
    }

    /// What the checkpoint writes: the pages, and where blocks lie now; and of a flattening the
    /// page to go on with, if there is one.
    pub(super) fn finish(self) -> (Vec<u32>, Moves, Option<u32>) {
        (self.pages, self.moves, self.todo.first().copied())
    }

    /// It is given up.
    pub(super) fn abandon(self, io: &mut Io<'_>) {
        let batch = self.copying.and_then(|copying| copying.batch);
        io.out.extend(batch.map(Output::DropBatch));
    }
}

impl Copying {
    fn header(&self, head: &Head, epoch: Epoch) -> pack::Header {
        let object_blocks = u64::from(head.object_blocks());
        let mut runs: Vec<pack::Run> = Vec::new();
        for live in &self.blocks {
            let object = (live.block / object_blocks) as u32;
            let first = (live.block % object_blocks) as u16;
            match runs.last_mut() {
                Some(run) if run.object == object && run.first + run.count == first => {
                    run.count += 1;
                }
                _ => runs.push(pack::Run { object, first, count: 1, zero: false }),
            }
        }
        let crcs = self.blocks.iter().map(|live| live.crc).collect();
        pack::Header { volume: head.volume, epoch, n: self.n, runs, crcs }
    }
}
