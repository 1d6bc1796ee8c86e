//! Brings back what was hot: statistics and ghosts at once, blocks by reading them, the hottest
//! first, into free pages only. A client's request never waits for it longer than for a few reads.

use super::{LOOK_SLICE, State};
use crate::block_set::BlockSet;
use crate::cache::addr;
use crate::config::ShardConfig;
use crate::event::Output;
use crate::ids::{BLOCK_BYTES, VolumeId};
use crate::limits::{BATCH_BLOCKS_MAX, LEAF_BLOCKS, ONODE_LEAVES, REQUEST_BLOCKS_MAX};
use crate::onode::NIL;
use crate::policy::{Hint, Level, Tag};
use crate::shard::fill::FILLS_MAX;
use crate::shard::read::Source;
use crate::shard::{Op, Shard};
use crate::wire::heat::{
    BUFFERS_AT, GhostHeat, LeafHeat, ObjectHeat, PageHead, PageReader, Part, RecordHead,
    decode_kind, kinds_of_page,
};

/// Reads of the device under way, before those of one more leaf.
const READS_MAX: u32 = 8;
/// Fetches from the store under way, likewise.
const FETCHES_MAX: u32 = 1;
/// Fills that clients have no use for now; the rest is theirs.
const FILLS_SPARE: usize = FILLS_MAX * 3 / 4;
/// Free pages that are left to clients.
const PAGES_SPARE: u32 = REQUEST_BLOCKS_MAX as u32;

/// What is done in which order; the pages of the buffers are gone through twice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Learned,
    Referenced,
    Ghosts,
    /// Blocks that are in the log.
    Read,
    /// Blocks that only the store has, if they were used more than once.
    Fetch,
}

/// Where warming stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Warming {
    generation: u64,
    head: RecordHead,
    phase: Phase,
    /// The page to read next, and the end of those of the phase.
    page: u32,
    end: u32,
    reader: PageReader,
}

impl Warming {
    pub(super) fn new(generation: u64, head: RecordHead, phase: Phase) -> Self {
        let (page, end) = Self::pages(&head, phase);
        Self { generation, head, phase, page, end, reader: PageReader::EMPTY }
    }

    fn pages(head: &RecordHead, phase: Phase) -> (u32, u32) {
        match phase {
            Phase::Learned => (1, BUFFERS_AT),
            Phase::Referenced => (head.referenced_at, head.pages),
            Phase::Ghosts => (head.ghosts_at, head.referenced_at),
            Phase::Read | Phase::Fetch => (BUFFERS_AT, head.ghosts_at),
        }
    }

    fn part(&self) -> Part {
        match self.phase {
            Phase::Learned => Part::Learned,
            Phase::Referenced => Part::Referenced,
            Phase::Ghosts => Part::Ghosts,
            Phase::Read | Phase::Fetch => Part::Buffers,
        }
    }

    fn next_phase(&self) -> Option<Self> {
        let next = match self.phase {
            Phase::Learned => Phase::Referenced,
            Phase::Referenced => Phase::Ghosts,
            Phase::Ghosts => Phase::Read,
            Phase::Read => Phase::Fetch,
            Phase::Fetch => return None,
        };
        Some(Self::new(self.generation, self.head, next))
    }
}

/// Neighbouring blocks that one fill brings in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    fill: u32,
    /// Of the last block, the onode and the block; or its page in the region.
    last: Last,
    count: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Last {
    Page(u32),
    Block(u32, u16),
}

impl Shard<'_> {
    /// A page of the record; what is not as it should be is passed over.
    pub(super) fn take_in_page(&mut self, mut warming: Warming, bytes: Option<&[u8]>) {
        let ShardConfig { layout, crc32c, .. } = self.config;
        let wanted = |head: &PageHead| {
            head.region == layout.region
                && head.generation == warming.generation
                && head.page + 1 == warming.page
                && head.part == warming.part()
        };
        let head = bytes.and_then(|bytes| PageHead::open(bytes, crc32c)).filter(wanted);
        if let Some((head, bytes)) = head.zip(bytes) {
            if warming.phase == Phase::Learned {
                for (at, kind) in kinds_of_page(head.page).enumerate() {
                    self.buffers.learned_mut().set_counts(kind, &decode_kind(bytes, at));
                }
            }
            self.heat.bytes[..BLOCK_BYTES].copy_from_slice(bytes);
            warming.reader = PageReader::new(head.records);
        }
        self.heat.state = State::Warming(warming);
    }

    pub(super) fn step_warming(&mut self, mut warming: Warming) {
        if self.heat.closing {
            return self.end_run();
        }
        for _ in 0..LOOK_SLICE {
            if matches!(warming.phase, Phase::Read | Phase::Fetch) {
                let failed = warming.phase == Phase::Fetch && self.heat.store_failed;
                if failed || self.is_full() {
                    self.end_run();
                    return self.end_warming();
                }
                if self.must_wait(warming.phase) {
                    // Goes on when a fill has ended. A fetch goes on growing then: whoever wants a
                    // block of it waits for the one before it too, and gets are large.
                    if warming.phase == Phase::Read {
                        self.end_run();
                    }
                    self.heat.state = State::Warming(warming);
                    return;
                }
            }
            if self.warm_next(&mut warming) {
                continue;
            }
            if warming.page < warming.end {
                let page = warming.page;
                warming.page += 1;
                self.end_run();
                self.heat.state = State::Warming(warming);
                return self.load_heat((warming.generation % 2) as u32, page);
            }
            if warming.phase == Phase::Learned {
                self.buffers.learned_mut().resume(warming.head.clock);
            }
            match warming.next_phase() {
                Some(next) => warming = next,
                None => {
                    self.end_run();
                    return self.end_warming();
                }
            }
        }
        self.end_run();
        self.heat.state = State::Warming(warming);
        self.again = true;
    }

    /// Whether all pages are in use, but for those that are left to clients.
    fn is_full(&self) -> bool {
        self.buffers.free_pages() <= PAGES_SPARE
    }

    fn must_wait(&self, phase: Phase) -> bool {
        let most = if phase == Phase::Fetch { FETCHES_MAX } else { READS_MAX };
        self.heat.fills >= most || self.fills.free() < FILLS_SPARE || !self.stalled_reads.is_empty()
    }

    /// Takes in one more of what the page says; `false`: nothing is left.
    fn warm_next(&mut self, warming: &mut Warming) -> bool {
        let page = &self.heat.bytes[..BLOCK_BYTES];
        match warming.phase {
            Phase::Learned => false,
            Phase::Referenced => {
                let found = warming.reader.next_object(page);
                found.map(|object| self.refer_to(&object)).is_some()
            }
            Phase::Ghosts => {
                let found = warming.reader.next_ghost(page);
                found.map(|ghost| self.warm_ghost(&ghost)).is_some()
            }
            Phase::Read | Phase::Fetch => {
                let found = warming.reader.next_leaf(page);
                found.map(|leaf| self.warm_leaf(&leaf, warming.phase)).is_some()
            }
        }
    }

    /// The volume's place in the table, if its turn has come and it has so many blocks there.
    fn warming_volume(&self, id: VolumeId) -> Option<usize> {
        let volume = self.volume_index(id).filter(|_| self.heat.warming.contains(&id))?;
        (!self.volumes[volume].gone).then_some(volume)
    }

    /// The object's onode, pinned; made if `make` and there is room. To look for it is no use.
    fn warm_onode(&mut self, id: VolumeId, object: u32, make: bool) -> Option<u32> {
        match self.onodes.find(id, object) {
            Some(onode) => {
                self.onodes.pin(onode);
                Some(onode)
            }
            None if make && self.onodes.has_room() => self.onodes.create(id, object),
            None => None,
        }
    }

    fn refer_to(&mut self, found: &ObjectHeat) {
        if self.warming_volume(found.volume).is_none() {
            return;
        }
        let Some(onode) = self.onodes.find(found.volume, found.object) else { return };
        for position in 0..ONODE_LEAVES {
            let leaf = self.onodes.get(onode).leaves[position];
            if leaf != NIL {
                self.onodes.leaf_mut(leaf).referenced |= found.referenced[position];
            }
        }
    }

    fn warm_ghost(&mut self, ghost: &GhostHeat) {
        let GhostHeat { volume: id, object, block, mark } = *ghost;
        let Some(volume) = self.warming_volume(id) else { return };
        let beyond = u32::from(block) >= self.volumes[volume].blocks_of(object);
        if beyond || !self.buffers.has_ghost_room() {
            return;
        }
        let Some(onode) = self.warm_onode(id, object, true) else { return };
        if let Some((leaf, index)) = self.warm_place(onode, block) {
            if !self.onodes.ram(leaf, index).is_some() {
                let ghost = self.buffers.restore_ghost(addr(leaf, index), mark);
                self.onodes.set_ram(leaf, index, ghost);
            }
            self.onodes.free_if_empty(leaf);
        }
        self.onodes.unpin(onode);
    }

    /// The place of a block in its leaf, which is made if there is room for it.
    fn warm_place(&mut self, onode: u32, block: u16) -> Option<(u32, usize)> {
        let room = self.onodes.block(onode, block).is_some() || self.onodes.leaves_free() > 0;
        if room { self.onodes.leaf_for(onode, block) } else { None }
    }

    fn warm_leaf(&mut self, found: &LeafHeat, phase: Phase) {
        let Some(volume) = self.warming_volume(found.volume) else { return };
        let blocks = self.volumes[volume].blocks_of(found.object);
        let fetches = phase == Phase::Fetch;
        let Some(onode) = self.warm_onode(found.volume, found.object, fetches) else { return };
        for index in (0..LEAF_BLOCKS).filter(|index| found.buffers & 1 << index != 0) {
            let block = found.first + index as u16;
            if u32::from(block) >= blocks || self.is_full() {
                break;
            }
            let tag = if found.warm & 1 << index != 0 { Tag::WarmIn } else { Tag::Hot };
            let hint = Hint { tag, mark: found.marks[index] };
            match self.source(onode, block) {
                Source::Nvme(page) if !fetches => {
                    self.warm_block(onode, block, Last::Page(page), hint);
                }
                Source::Store if fetches && self.buffers.policy().has_come_back(hint) => {
                    self.warm_block(onode, block, Last::Block(onode, block), hint);
                }
                _ => {}
            }
        }
        self.onodes.unpin(onode);
    }

    /// Adds a block to the fill that brings in its neighbour, or begins one.
    fn warm_block(&mut self, onode: u32, block: u16, at: Last, hint: Hint) {
        let Some((leaf, index)) = self.warm_place(onode, block) else { return };
        let joins = self.heat.run.filter(|run| self.follows(run, at));
        let run = match joins {
            Some(run) => Run { last: at, count: run.count + 1, ..run },
            None => {
                self.end_run();
                let from = if let Last::Page(page) = at { page } else { NIL };
                let fill = self.fills.start(from, Level::Known).expect("some are spare");
                self.fills.get_mut(fill).warms = true;
                Run { fill, last: at, count: 1 }
            }
        };
        self.drop_buffer(leaf, index);
        let crc = if let Last::Page(_) = at { self.onodes.leaf(leaf).crc[index] } else { 0 };
        let page = self.take_page(hint).expect("some are free");
        let addr = addr(leaf, index);
        let buffer = self.buffers.insert_filling(addr, page, hint);
        let buffer = buffer.expect("slots are always enough");
        self.onodes.set_ram(leaf, index, buffer);
        self.push_fill(run.fill, onode, addr, buffer, crc);
        self.counters.warmed_blocks += 1;
        self.heat.run = Some(run);
    }

    /// Whether a block can be had by the same operation as the one before.
    fn follows(&self, run: &Run, at: Last) -> bool {
        match (run.last, at) {
            (Last::Page(last), Last::Page(page)) => {
                let segment = self.log.segment_pages();
                page == last + 1
                    && page / segment == last / segment
                    && run.count < REQUEST_BLOCKS_MAX
            }
            (Last::Block(onode, last), Last::Block(same, block)) => {
                onode == same && block == last + 1 && run.count < BATCH_BLOCKS_MAX
            }
            _ => false,
        }
    }

    /// Starts the fill that was put together.
    pub(super) fn end_run(&mut self) {
        let Some(Run { fill, last, count }) = self.heat.run.take() else { return };
        self.heat.fills += 1;
        let Last::Block(onode, last) = last else { return self.read_device(fill) };
        let op = self.start_op(Op::Fill(fill));
        let onode = self.onodes.get(onode);
        let (volume, object) = (onode.volume, onode.object);
        let (first, count) = (last + 1 - count as u16, count as u16);
        self.emit(Output::Fetch { op, volume, object, first, count, gaps: BlockSet::EMPTY });
    }

    /// A fill has ended.
    pub(in crate::shard) fn note_warmed(&mut self, fill: u32, ok: bool) {
        if self.fills.get(fill).warms {
            self.heat.fills -= 1;
            self.heat.store_failed |= !ok && self.fills.get(fill).at == NIL;
            self.again = true;
        }
    }
}
