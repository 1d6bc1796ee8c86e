//! Fetches of what only the store has: how much of it at a time.
//!
//! A fetch takes what a task lacks, over gaps of what the cache has; and ahead of a stream, reads
//! of an object that follow each other, as much again as was read.

use super::read::{Source, level};
use super::request::span;
use super::task::Held;
use super::{Op, Shard};
use crate::block_set::BlockSet;
use crate::event::{Output, RequestKind};
use crate::limits::{BATCH_BLOCKS_MAX, LEAF_BLOCKS, REQUEST_BLOCKS_MAX};
use crate::onode::NIL;

/// What was read in so long a stream passes through RAM without a place in the log.
const STREAM_BLOCKS: usize = REQUEST_BLOCKS_MAX;
/// Blocks that need not be fetched do not cut a fetch in two if they are so few: a request of its
/// own costs more than they do.
const GAP_BLOCKS_MAX: usize = 8;

/// Leaves that a request needs at most, which were reserved for it.
const REQUEST_LEAVES: u32 = (REQUEST_BLOCKS_MAX / LEAF_BLOCKS + 2) as u32;

/// The blocks of a fetch.
struct Plan {
    first: u16,
    /// Wanted ones, those of the task and then those ahead, from `first` on.
    blocks: BlockSet,
    /// From `first` to the last one.
    count: usize,
}

impl Plan {
    fn add(&mut self, block: u16) {
        let at = usize::from(block - self.first);
        self.blocks.insert(at);
        self.count = at + 1;
    }

    /// Whether a block is near enough to be fetched with the others.
    fn reaches(&self, block: usize) -> bool {
        let at = block - usize::from(self.first);
        at < BATCH_BLOCKS_MAX && at - self.count <= GAP_BLOCKS_MAX
    }
}

impl Shard<'_> {
    /// Notes a read of these blocks of an object. It goes on with a stream if it begins where the
    /// last one ended, or in the block in which that ended.
    pub(super) fn note_read(&mut self, onode: u32, first: u16, count: usize) {
        let slot = self.onodes.get_mut(onode);
        let follows = slot.stream_end == first || slot.stream_end == first + 1;
        let before = if follows { slot.stream_run } else { 0 };
        slot.stream_run = before.saturating_add(count as u16);
        slot.stream_end = first + count as u16;
    }

    /// Starts a fetch of block `at` of a task, which only the store has, and of what else it lacks
    /// behind it.
    pub(super) fn fill_from_store(&mut self, task: u32, at: usize) -> usize {
        let onode = self.tasks.get(task).onode;
        let (keeps, bypasses) = (self.keeps_reads(task), self.bypasses(task));
        let mut plan = self.plan_missing(task, at);
        let run = if bypasses { 0 } else { self.stream_before(task) };
        self.read_ahead(task, &mut plan, run);
        let fill = self.fills.start(NIL, level(keeps)).expect("collect saw to it");
        let (mut next, mut wanted, mut fetched) = (at, 0, 0);
        let mut gaps = BlockSet::EMPTY;
        for index in 0..plan.count {
            let block = plan.first + index as u16;
            if !plan.blocks.contains(index) {
                gaps.insert(index);
                self.fills.get_mut(fill).add_gap();
                continue;
            }
            let held = &self.tasks.get(task).held;
            let found = (next..held.len()).find(|next| held[*next].block >= block);
            next = found.unwrap_or(held.len());
            let is_held = held.get(next).is_some_and(|held| held.block == block);
            let (leaf, position) = self.onodes.leaf_for(onode, block).expect("they were reserved");
            let buffer = self.onodes.ram(leaf, position);
            if buffer.is_some() && self.buffers.is_resident(buffer) {
                // A scrub passes over it.
                let buffer = self.fill_privately(fill, onode, leaf, position, 0);
                let page = self.buffers.page(buffer);
                self.tasks.get_mut(task).held[next].held = Held::Buffer(buffer, page);
            } else {
                let buffer = self.add_to_fill(fill, onode, leaf, position, 0);
                if is_held {
                    self.hold_buffer(task, next, buffer);
                }
            }
            fetched += 1;
            wanted += u64::from(is_held);
        }
        self.fills.get_mut(fill).admit = keeps && run < STREAM_BLOCKS;
        self.fills.get_mut(fill).scrub = bypasses;
        self.count(task, |traffic| {
            traffic.store_blocks += wanted;
            traffic.fetched_blocks += fetched;
        });
        let op = self.start_op(Op::Fill(fill));
        let volume = self.volumes[self.tasks.get(task).volume].id;
        let object = self.onodes.get(onode).object;
        let (first, count) = (plan.first, plan.count as u16);
        self.emit(Output::Fetch { op, volume, object, first, count, gaps });
        1
    }

    /// What a task lacks from block `at` on.
    fn plan_missing(&self, task: u32, at: usize) -> Plan {
        let held = &self.tasks.get(task).held;
        let mut plan = Plan { first: held[at].block, blocks: BlockSet::EMPTY, count: 0 };
        for block in &held[at..] {
            if !plan.reaches(block.block.into()) {
                break;
            }
            let missing = block.held == Held::Unresolved;
            if missing && self.find(task, block.block) == Source::Store {
                plan.add(block.block);
            }
        }
        plan
    }

    /// Blocks that were read in the stream that a task goes on with, before it.
    fn stream_before(&self, task: u32) -> usize {
        let task = self.tasks.get(task);
        let keeps = self.volumes[task.volume].mode.keeps_reads();
        if !keeps || task.request().kind == RequestKind::Write {
            return 0;
        }
        let count = span(&task.request()).1;
        usize::from(self.onodes.get(task.onode).stream_run).saturating_sub(count)
    }

    /// Adds blocks behind those that a task lacks: as many as were read in the stream before.
    fn read_ahead(&mut self, task: u32, plan: &mut Plan, run: usize) {
        let onode = self.tasks.get(task).onode;
        let object = self.onodes.get(onode).object;
        let end = self.volumes[self.tasks.get(task).volume].blocks_of(object) as usize;
        let spare = (self.buffers.available() as usize).saturating_sub(plan.count) / 4;
        let mut left = run.min(spare);
        let mut leaves = self.onodes.leaves_free().saturating_sub(REQUEST_LEAVES);
        let mut new_leaf = None;
        let mut block = usize::from(plan.first) + plan.count;
        while left > 0 && block < end && plan.reaches(block) {
            if self.source(onode, block as u16) == Source::Store {
                let leaf = Some(block / LEAF_BLOCKS);
                if new_leaf != leaf && self.onodes.block(onode, block as u16).is_none() {
                    if leaves == 0 {
                        break;
                    }
                    leaves -= 1;
                    new_leaf = leaf;
                }
                plan.add(block as u16);
                left -= 1;
            }
            block += 1;
        }
    }
}
