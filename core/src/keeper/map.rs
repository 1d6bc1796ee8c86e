//! The committed image: the map pages in memory, what the packs of the tail lay over them, and the
//! fetches and queries that both answer.
//!
//! ```text
//! live     packs committed since the checkpoint that runs began (or since the last one)
//! frozen   packs that the checkpoint folds into the pages; empty when none runs
//! pages    map pages, as far as they are in memory
//! ```

use alloc::collections::BTreeMap;
use alloc::collections::btree_map::Entry;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use super::changes::Changes;
use super::store::{Call, Fault, Io, Request, Task};
use super::{Output, PackPart, PackRead, StoreResult};
use crate::block_set::BlockSet;
use crate::ids::{BLOCK_BYTES, OpId, ShardId};
use crate::limits::MAP_PAGE_BLOCKS;
use crate::wire::head::Head;
use crate::wire::map_page::{Data, MapPage, Piece};
use crate::wire::names;

/// Unwanted blocks that are read along rather than cut a client's read in two.
const GAP_BLOCKS_MAX: u16 = 8;

/// A fetch or a query.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) shard: ShardId,
    pub(super) op: OpId,
    /// The map page, and the first block in it.
    pub(super) page: u32,
    pub(super) first: u16,
    pub(super) count: u16,
    /// Of a fetch: blocks that nobody wants. `None`: it is a query.
    pub(super) gaps: Option<BlockSet>,
}

impl Wanted {
    /// `blocks` of an object: the first, and how many.
    pub(super) fn new(
        head: &Head,
        (shard, op): (ShardId, OpId),
        object: u32,
        (first, count): (u16, u16),
        gaps: Option<BlockSet>,
    ) -> Self {
        let inside = u32::from(first) + u32::from(count) <= head.object_blocks();
        assert!(inside, "a fetch is inside its object");
        let (page, first) = head.place_of(object, first);
        Self { shard, op, page, first, count, gaps }
    }
}

/// What a page is, as far as it is known.
#[derive(Debug)]
pub(super) enum Known {
    /// In memory (or all zeroes).
    Page(Arc<MapPage>),
    /// On its way.
    Loading,
}

/// A page that came, and who waits for it.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) page: u32,
    pub(super) content: Arc<MapPage>,
    pub(super) checkpoint: bool,
    pub(super) rewrite: bool,
}

#[derive(Debug, Default)]
pub(super) struct Map {
    live: BTreeMap<u32, MapPage>,
    frozen: BTreeMap<u32, MapPage>,
    /// With the time of the last use, in uses.
    pages: BTreeMap<u32, (Arc<MapPage>, u64)>,
    by_use: BTreeMap<u64, u32>,
    uses: u64,
    loads: BTreeMap<u32, Load>,
}

#[derive(Debug, Default)]
struct Load {
    waiters: Vec<Wanted>,
    /// The checkpoint waits, too.
    checkpoint: bool,
    /// A rewriting waits, too.
    rewrite: bool,
    failures: u32,
}

impl Map {
    /// Packs of the tail are part of the image from now on.
    pub(super) fn absorb(&mut self, changes: &Changes) {
        changes.apply(&mut self.live);
    }

    /// A checkpoint begins: what lies over the pages now is to be folded into them.
    pub(super) fn freeze(&mut self) -> Vec<u32> {
        assert!(self.frozen.is_empty(), "one checkpoint runs at a time");
        self.frozen = core::mem::take(&mut self.live);
        self.frozen.keys().copied().collect()
    }

    /// What the checkpoint folds into a page.
    pub(super) fn frozen(&self, page: u32) -> Option<&MapPage> {
        self.frozen.get(&page)
    }

    /// The checkpoint is committed: the pages have what lay over them.
    pub(super) fn thaw(&mut self) {
        self.frozen = BTreeMap::new();
    }

    /// The volume has lost the pages from this one on: nothing was in them.
    pub(super) fn cut(&mut self, pages: u32) {
        self.live.split_off(&pages);
        self.frozen.split_off(&pages);
        for (_, used) in self.pages.split_off(&pages).into_values() {
            self.by_use.remove(&used);
        }
    }

    /// Bytes of the pages that a checkpoint would write now, as far as they can be guessed.
    pub(super) fn checkpoint_bytes(&self) -> u64 {
        let of_page = |(page, over): (&u32, &MapPage)| {
            let base = self.pages.get(page).map_or(0, |(base, _)| base.encoded_bytes());
            (over.encoded_bytes() + base) as u64
        };
        self.live.iter().map(of_page).sum()
    }

    /// Answers a fetch or a query, maybe later.
    pub(super) fn want(&mut self, io: &mut Io<'_>, head: &Head, wanted: Wanted) {
        let Wanted { page, first, count, .. } = wanted;
        let covered = |over: &BTreeMap<u32, MapPage>| {
            over.get(&page).is_some_and(|over| over.covers(first, count))
        };
        if covered(&self.live) {
            return self.answer(io, head, &wanted, &MapPage::default());
        }
        match self.find(io, head, page) {
            Known::Page(base) => self.answer(io, head, &wanted, &base),
            Known::Loading => self.load(page).waiters.push(wanted),
        }
    }

    /// Pages that packs of the tail lie over.
    pub(super) fn overlaid(&self) -> impl Iterator<Item = u32> + '_ {
        self.live.keys().chain(self.frozen.keys()).copied()
    }

    /// All of a page, as the image has it.
    pub(super) fn look_through<'a>(&'a self, page: u32, base: &'a MapPage) -> Vec<Piece<'a>> {
        MapPage::look_through(&self.layers(page, base), 0, MAP_PAGE_BLOCKS as u16)
    }

    fn layers<'a>(&'a self, page: u32, base: &'a MapPage) -> Vec<&'a MapPage> {
        let over = [self.live.get(&page), self.frozen.get(&page)];
        over.into_iter().flatten().chain([base]).collect()
    }

    /// A page for a rewriting; if it is on its way, `handle_done` will say so.
    pub(super) fn want_for_rewrite(&mut self, io: &mut Io<'_>, head: &Head, page: u32) -> Known {
        let known = self.find(io, head, page);
        if let Known::Loading = known {
            self.load(page).rewrite = true;
        }
        known
    }

    /// A page for the checkpoint; if it is on its way, `handle_done` will say so.
    pub(super) fn want_for_checkpoint(&mut self, io: &mut Io<'_>, head: &Head, page: u32) -> Known {
        let known = self.find(io, head, page);
        if let Known::Loading = known {
            self.load(page).checkpoint = true;
        }
        known
    }

    fn answer(&self, io: &mut Io<'_>, head: &Head, wanted: &Wanted, base: &MapPage) {
        answer(io, head, wanted, &self.layers(wanted.page, base));
    }

    /// A commit has made this the page; `None`: it is not in memory, or all zeroes.
    pub(super) fn replace(&mut self, page: u32, content: Option<Arc<MapPage>>, pages_max: usize) {
        if let Some((_, used)) = self.pages.remove(&page) {
            self.by_use.remove(&used);
        }
        if let Some(content) = content {
            self.insert(page, content, pages_max);
        }
    }

    /// The end of a load. Gives the page back if somebody other than fetches waits for it.
    pub(super) fn handle_done(
        &mut self,
        io: &mut Io<'_>,
        head: &Head,
        request: Request,
        result: StoreResult<'_>,
    ) -> Option<Loaded> {
        let Task::LoadPage { page, at } = request.task else {
            unreachable!("only loads come here")
        };
        if head.pages.get(&page) != Some(&at) {
            // Superseded, and maybe deleted, while it was on its way.
            return self.reload(io, head, page);
        }
        let content = match result {
            StoreResult::Got(bytes) => {
                let crc32c = io.config.crc32c;
                let volumes = head.volumes();
                MapPage::decode(bytes, (&volumes, at.source), page, at.epoch, crc32c)
                    .map_err(|_| Fault::WRONG)
            }
            StoreResult::Failed { transient, note } => Err(Fault { transient, note: Some(note) }),
            _ => Err(Fault::WRONG),
        };
        match content {
            Ok(content) => {
                let content = Arc::new(content);
                self.insert(page, content.clone(), io.config.pages_max);
                self.finish(io, head, page, content)
            }
            Err(fault) => {
                self.fail(io, request, page, fault);
                None
            }
        }
    }

    /// The volume is lost: no fetch will be answered any more.
    pub(super) fn fail_all(&mut self, io: &mut Io<'_>) {
        for (_, load) in core::mem::take(&mut self.loads) {
            load.waiters.iter().for_each(|wanted| refuse(io, wanted));
        }
    }

    fn find(&mut self, io: &mut Io<'_>, head: &Head, page: u32) -> Known {
        let Some(&at) = head.pages.get(&page) else {
            return Known::Page(Arc::default());
        };
        if let Some((content, used)) = self.pages.get_mut(&page) {
            self.uses += 1;
            self.by_use.remove(used);
            self.by_use.insert(self.uses, page);
            *used = self.uses;
            return Known::Page(content.clone());
        }
        if let Entry::Vacant(slot) = self.loads.entry(page) {
            slot.insert(Load::default());
            let key = names::map_key(head.volume_of(at.source), page, at.epoch);
            io.start(Task::LoadPage { page, at }, Call::Get(key));
        }
        Known::Loading
    }

    fn load(&mut self, page: u32) -> &mut Load {
        self.loads.get_mut(&page).expect("a page that is loading has a load")
    }

    /// Drops the least recently used pages beyond the limit; the newest always stays.
    fn insert(&mut self, page: u32, content: Arc<MapPage>, pages_max: usize) {
        self.uses += 1;
        self.by_use.insert(self.uses, page);
        let before = self.pages.insert(page, (content, self.uses));
        debug_assert!(before.is_none(), "a page in memory is not loaded");
        while self.pages.len() > pages_max.max(1) {
            let (_, oldest) = self.by_use.pop_first().expect("every page has a last use");
            self.pages.remove(&oldest);
        }
    }

    fn finish(
        &mut self,
        io: &mut Io<'_>,
        head: &Head,
        page: u32,
        content: Arc<MapPage>,
    ) -> Option<Loaded> {
        let load = self.loads.remove(&page).expect("the load that ends is there");
        load.waiters.iter().for_each(|wanted| self.answer(io, head, wanted, &content));
        let Load { checkpoint, rewrite, .. } = load;
        (checkpoint || rewrite).then_some(Loaded { page, content, checkpoint, rewrite })
    }

    fn reload(&mut self, io: &mut Io<'_>, head: &Head, page: u32) -> Option<Loaded> {
        let current = match head.pages.get(&page) {
            None => Some(Arc::default()),
            Some(_) => self.pages.get(&page).map(|(content, _)| content.clone()),
        };
        if let Some(content) = current {
            return self.finish(io, head, page, content);
        }
        let at = head.pages[&page];
        let key = names::map_key(head.volume_of(at.source), page, at.epoch);
        io.start(Task::LoadPage { page, at }, Call::Get(key));
        None
    }

    /// Checkpoint and rewriting wait for ever, clients do not.
    fn fail(&mut self, io: &mut Io<'_>, request: Request, page: u32, fault: Fault) {
        let load = self.load(page);
        load.failures += 1;
        if load.failures >= io.config.load_attempts_max || !fault.transient {
            load.failures = 0;
            load.waiters.drain(..).for_each(|wanted| refuse(io, &wanted));
        }
        if load.checkpoint || load.rewrite || !load.waiters.is_empty() {
            io.again(request, fault);
        } else {
            io.store.note(io.now, request.task, fault);
            self.loads.remove(&page);
        }
    }
}

/// A fetch or query that cannot be answered.
pub(super) fn refuse(io: &mut Io<'_>, wanted: &Wanted) {
    let (shard, op) = (wanted.shard, wanted.op);
    io.out.push_back(if wanted.gaps.is_none() {
        Output::QueryFailed { shard, op }
    } else {
        Output::FetchFailed { shard, op }
    });
}

fn answer(io: &mut Io<'_>, head: &Head, wanted: &Wanted, layers: &[&MapPage]) {
    let &Wanted { shard, op, first, count, gaps, .. } = wanted;
    let found = MapPage::look_through(layers, first, count);
    let Some(gaps) = gaps else {
        let mut data = vec![false; count.into()];
        for piece in found.iter().filter(|piece| piece.data.is_some()) {
            let at = usize::from(piece.first - first);
            data[at..at + usize::from(piece.count)].fill(true);
        }
        io.out.push_back(Output::QueryAnswer { shard, op, data });
        return;
    };
    let pieces = found.iter().filter_map(|piece| Some((piece.data?, piece.first - first)));
    let wanted = pieces.flat_map(|(data, first)| without(&gaps, data, first));
    let reads = plan(wanted.collect(), GAP_BLOCKS_MAX, |data| {
        names::pack_key(head.volume_of(data.pack.source), data.pack.epoch, data.pack.n)
    });
    io.out.push_back(Output::FetchPlan { shard, op, count, reads });
}

/// The parts of a piece that are wanted, each with its first block in the fetch.
fn without<'a>(
    gaps: &BlockSet,
    data: Data<'a>,
    first: u16,
) -> impl Iterator<Item = (Data<'a>, u16)> {
    let mut at = 0;
    core::iter::from_fn(move || {
        let is_gap = |index: &usize| gaps.contains(usize::from(first) + index);
        let begin = (at..data.crcs.len()).find(|index| !is_gap(index))?;
        let end = (begin..data.crcs.len()).find(is_gap).unwrap_or(data.crcs.len());
        at = end;
        let (offset, crcs) = (data.offset + begin as u16, &data.crcs[begin..end]);
        Some((Data { offset, crcs, ..data }, first + begin as u16))
    })
}

/// Turns pieces (with their first block in the fetch) into as few reads as is sensible: gaps of up
/// to `gap_max` blocks are read along.
pub(super) fn plan(
    mut pieces: Vec<(Data<'_>, u16)>,
    gap_max: u16,
    key: impl Fn(&Data<'_>) -> String,
) -> Vec<PackRead> {
    pieces.sort_unstable_by_key(|(data, _)| (data.pack, data.offset));
    let mut reads = Vec::new();
    let mut start = 0;
    while start < pieces.len() {
        let begin = pieces[start].0;
        let mut end = begin.offset;
        let near = pieces[start..].iter().take_while(|(data, _)| {
            let joins = data.pack == begin.pack && data.offset <= end + gap_max;
            if joins {
                end = end.max(data.offset + data.crcs.len() as u16);
            }
            joins
        });
        let parts: Vec<_> = near
            .map(|(data, first)| PackPart {
                at: (data.offset - begin.offset).into(),
                first: *first,
                crcs: data.crcs.into(),
            })
            .collect();
        start += parts.len();
        reads.push(PackRead {
            key: key(&begin),
            offset: u64::from(begin.pack.header_bytes)
                + u64::from(begin.offset) * BLOCK_BYTES as u64,
            len: u32::from(end - begin.offset) * BLOCK_BYTES as u32,
            parts,
        });
    }
    reads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Epoch;
    use crate::wire::map_page::PackRef;

    #[test]
    fn reads_join_over_small_gaps_in_one_pack() {
        let crcs = [7; 4];
        let data = |n, offset, count: usize| Data {
            pack: PackRef { source: 0, epoch: Epoch(1), n, header_bytes: 76 },
            offset,
            crcs: &crcs[..count],
        };
        let pieces = vec![
            (data(1, 40, 2), 0),
            (data(0, 10, 1), 2),
            (data(1, 30, 2), 8),
            (data(1, 51, 1), 20),
            (data(0, 11, 4), 30),
        ];
        let reads = plan(pieces, GAP_BLOCKS_MAX, |data| alloc::format!("{}", data.pack.n));
        let shape: Vec<_> = reads
            .iter()
            .map(|read| {
                let parts: Vec<_> = read.parts.iter().map(|part| (part.at, part.first)).collect();
                (read.key.as_str(), (read.offset - 76) / 4096, read.len / 4096, parts)
            })
            .collect();
        let expected = [
            ("0", 10, 5, vec![(0, 2), (1, 30)]),
            ("1", 30, 12, vec![(0, 8), (10, 0)]),
            ("1", 51, 1, vec![(0, 20)]),
        ];
        assert_eq!(shape, expected);
    }
}
