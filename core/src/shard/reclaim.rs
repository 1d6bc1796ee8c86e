//! Reclaim: makes room in the log by emptying its oldest segment.
//!
//! ```text
//! Idle --few free segments--> Emptying --nothing live--> Retiring --durable--> Idle
//! ```
//!
//! Of each live page of the oldest segment: dirty blocks move to the head of the log; so do clean
//! ones that were read since reclaim last passed, while there is room; other clean ones are
//! dropped. A moved block stays pinned in RAM until its new record is written, so readers never see
//! a page that is not there yet. The segment is free only when everything that replaced its
//! content is durable: a power cut must find one or the other.

use super::index::place;
use super::read::Collected;
use super::task::{Fifo, Held, HeldBlock, TaskKind};
use super::{Shard, ZeroRange};
use crate::ids::Epoch;
use crate::limits::{LEAF_BLOCKS, REQUEST_BLOCKS_MAX};
use crate::onode::NIL;
use crate::wire::log::{Entry, EntryKind};
use crate::wlog::{RESERVED_SEGMENTS, RecordBlock, Role};

/// Pages that one turn looks at.
const SLICE: u32 = 512;
/// Moves under way at most.
const MOVES_MAX: u32 = 4;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Idle,
    /// Looking at this page of this segment next; clean pages that may still be moved.
    Emptying {
        segment: u32,
        page: u32,
        clean_moves: u32,
    },
    /// Empty; the log must be durable up to here.
    Retiring(u64),
}

#[derive(Debug)]
pub(super) struct Reclaim {
    state: State,
    /// Moves that are being read or wait for the log.
    moves: u32,
    /// Moves whose blocks are in RAM and that wait for the log.
    ready: Fifo,
    /// Going on until the high watermark.
    running: bool,
}

impl Reclaim {
    pub(super) const fn new() -> Self {
        let ready = Fifo::new();
        Self { state: State::Idle, moves: 0, ready, running: false }
    }

    /// Up to where the log must be durable for reclaim to go on.
    pub(super) const fn need(&self) -> Option<u64> {
        match self.state {
            State::Retiring(seq) => Some(seq),
            _ => None,
        }
    }
}

impl Shard<'_> {
    /// The free segments below which reclaim starts, and up to which it goes on.
    fn watermarks(&self) -> (u32, u32) {
        let segments = self.log.segments().len() as u32;
        let low = (RESERVED_SEGMENTS + 2).max(segments / 16);
        (low, low + (segments / 32).max(2))
    }

    pub(super) fn step_reclaim(&mut self) {
        self.append_ready_moves();
        match self.reclaim.state {
            State::Idle => self.choose_segment(),
            State::Emptying { segment, page, clean_moves } => {
                self.empty_segment(segment, page, clean_moves);
            }
            State::Retiring(need) => {
                let readers = self.log.segments()[self.log.tail() as usize].readers;
                if self.log.durable_seq() >= need && readers == 0 {
                    self.log.free_oldest();
                    self.reclaim.state = State::Idle;
                    self.again = true;
                }
            }
        }
    }

    fn choose_segment(&mut self) {
        let (low, high) = self.watermarks();
        let free = self.log.free_segments();
        let limit = if self.reclaim.running { high } else { low };
        self.reclaim.running = free < limit;
        if !self.reclaim.running {
            return;
        }
        let Some(segment) = self.log.oldest() else { return };
        if self.room_to_gain() <= free {
            // All that is left is dirty: moving it round the ring would free nothing.
            self.reclaim.running = false;
            return;
        }
        if self.holds_unattached(segment) {
            return;
        }
        // Moving all of a segment would free nothing: at most half of it is kept for being hot.
        let clean_moves = self.log.segment_pages() / 2;
        self.reclaim.state = State::Emptying { segment, page: 0, clean_moves };
        self.again = true;
    }

    /// Free segments there would be if nothing but what is dirty were in the log, written as
    /// densely as small records allow.
    fn room_to_gain(&self) -> u32 {
        let dense = u64::from(self.log.segment_pages()) * 4 / 5;
        let needed = self.dirty_blocks.div_ceil(dense) as u32 + 1;
        (self.log.segments().len() as u32).saturating_sub(needed)
    }

    /// Whether a segment has entries of volumes that wait to be attached.
    fn holds_unattached(&self, segment: u32) -> bool {
        let pages = self.log.segment_pages();
        self.recovered.iter().any(|entry| entry.at.page / pages == segment)
    }

    fn empty_segment(&mut self, segment: u32, mut page: u32, mut clean_moves: u32) {
        let pages = self.log.segment_pages();
        let start = segment * pages;
        let stop = (page + SLICE).min(pages);
        while page < stop {
            let at = start + page;
            let owner = self.log.owner(at);
            if owner == NIL {
                page += 1;
                continue;
            }
            if self.keeps(owner, clean_moves) {
                if !self.can_move() {
                    break;
                }
                let (next, moved) = self.start_move(at, start + stop, clean_moves);
                clean_moves = clean_moves.saturating_sub(moved);
                page = next - start;
                continue;
            }
            let (leaf, index) = place(crate::buffer::BlockAddr(owner));
            self.drop_log_page(leaf, index);
            self.onodes.free_if_empty(leaf);
            self.counters.dropped_blocks += 1;
            page += 1;
        }
        self.reclaim.state = State::Emptying { segment, page, clean_moves };
        if page < pages {
            self.again |= page == stop;
            return;
        }
        if self.reclaim.moves > 0 {
            return;
        }
        if self.log.segments()[segment as usize].live > 0 {
            // A move found its block changed under way: look once more.
            self.reclaim.state = State::Emptying { segment, page: 0, clean_moves: 0 };
            self.again = true;
            return;
        }
        if self.repeat_zero_ranges(segment) {
            self.log.retire_oldest();
            self.reclaim.state = State::Retiring(self.log.next_seq());
            self.again = true;
        }
    }

    /// Whether a live page must, or may, be moved.
    fn keeps(&mut self, owner: u32, clean_moves: u32) -> bool {
        let (leaf, index) = place(crate::buffer::BlockAddr(owner));
        let bit = 1u16 << index;
        let slot = self.onodes.leaf_mut(leaf);
        if (slot.dirty[0] | slot.dirty[1]) & bit != 0 {
            return true;
        }
        let hot = slot.referenced & bit != 0;
        hot && clean_moves > 0 && self.log.free_segments() > RESERVED_SEGMENTS
    }

    fn can_move(&self) -> bool {
        self.reclaim.moves < MOVES_MAX
            && self.tasks.free() > 0
            && self.fills.free() > REQUEST_BLOCKS_MAX
            && self.buffers.available() as usize > 2 * REQUEST_BLOCKS_MAX
    }

    /// Collects blocks to move from page `at` on; returns the page to look at next and how many
    /// clean blocks were taken.
    fn start_move(&mut self, at: u32, end: u32, clean_moves: u32) -> (u32, u32) {
        let task = self.tasks.start(TaskKind::Move, usize::MAX, self.now).expect("can_move");
        let mut page = at;
        let mut clean = 0;
        let mut fill = NIL;
        while page < end && !self.tasks.get(task).held.is_full() {
            let owner = self.log.owner(page);
            if owner == NIL || !self.keeps(owner, clean_moves - clean.min(clean_moves)) {
                break;
            }
            let (leaf, index) = place(crate::buffer::BlockAddr(owner));
            let slot = self.onodes.leaf_mut(leaf);
            slot.referenced &= !(1 << index);
            clean += u32::from((slot.dirty[0] | slot.dirty[1]) & 1 << index == 0);
            let onode = slot.onode;
            let block = (usize::from(slot.position) * LEAF_BLOCKS + index) as u16;
            let object = self.onodes.get(onode).object;
            let buffer = self.hold_version(onode, leaf, index, &mut fill, true);
            let held = Held::Buffer(buffer, self.buffers.page(buffer));
            let block = HeldBlock { held, object, block, extra: page };
            self.tasks.get_mut(task).held.push(block).expect("checked above");
            page += 1;
        }
        if fill != NIL {
            self.read_device(fill);
        }
        self.reclaim.moves += 1;
        if self.wait_for_fills(task) == Collected::All {
            self.move_collected(task);
        }
        (page, clean)
    }

    /// The blocks of a move are in RAM.
    pub(super) fn move_collected(&mut self, task: u32) {
        let mut ready = core::mem::replace(&mut self.reclaim.ready, Fifo::new());
        self.tasks.push_back(&mut ready, task);
        self.reclaim.ready = ready;
        self.again = true;
    }

    fn append_ready_moves(&mut self) {
        while let Some(task) = self.reclaim.ready.head() {
            while (self.tasks.get(task).appended as usize) < self.tasks.get(task).held.len() {
                let at = usize::from(self.tasks.get(task).appended);
                if !self.append_moved(task, at) {
                    return;
                }
                self.tasks.get_mut(task).appended += 1;
            }
            let mut ready = core::mem::replace(&mut self.reclaim.ready, Fifo::new());
            self.tasks.pop_front(&mut ready);
            self.reclaim.ready = ready;
            self.reclaim.moves -= 1;
            self.end_task(task);
            self.again = true;
        }
    }

    /// Appends one moved block; `false`: the log has no room now.
    fn append_moved(&mut self, task: u32, at: usize) -> bool {
        let held = self.tasks.get(task).held[at];
        let Held::Buffer(buffer, page) = held.held else { return true };
        let owner = self.log.owner(held.extra);
        if owner == NIL {
            // Written again, discarded or dropped meanwhile.
            self.buffers.unpin(buffer);
            return true;
        }
        let (leaf, index) = place(crate::buffer::BlockAddr(owner));
        let slot = self.onodes.leaf(leaf);
        let clean = (slot.dirty[0] | slot.dirty[1]) & 1 << index == 0;
        if clean && self.log.free_segments() <= RESERVED_SEGMENTS {
            // The room that was there when it was chosen is gone, and it can be fetched again.
            self.buffers.unpin(buffer);
            self.drop_log_page(leaf, index);
            self.counters.dropped_blocks += 1;
            return true;
        }
        if self.begin(1, true).is_none() {
            return false;
        }
        let slot = self.onodes.leaf_mut(leaf);
        if slot.is_shadow {
            slot.moving |= 1 << index;
        }
        let (onode, crc, kept) = (slot.onode, slot.crc[index], slot.is_shadow);
        let id = self.onodes.get(onode).volume;
        let volume = self.volume_index(id).expect("an indexed volume is attached");
        let dirty = self.dirty_epoch(volume, leaf, index);
        let entry = Entry {
            volume: id,
            object: held.object,
            first: held.block,
            count: 1,
            kind: match dirty {
                _ if kept => EntryKind::Kept,
                Some(_) => EntryKind::Dirty,
                None => EntryKind::Clean,
            },
            epoch: dirty.unwrap_or(self.volumes[volume].committed),
        };
        self.log.push_entry(entry, None);
        let record = RecordBlock { crc, buffer, role: Role::Pinned };
        let new = self.log.push_block(page, record);
        self.drop_log_page(leaf, index);
        self.set_log_page(leaf, index, new);
        self.counters.moved_blocks += 1;
        true
    }

    /// Says again, at the head of the log, which blocks of the segment's zero ranges still read as
    /// zeroes and are not so in the store. `false`: the log has no room now.
    fn repeat_zero_ranges(&mut self, segment: u32) -> bool {
        let seq = self.log.segments()[segment as usize].seq;
        while let Some(range) = self.zero_ranges.front().copied() {
            if range.segment_seq > seq {
                break;
            }
            let end = range.first + range.count;
            let mut at = range.first;
            while at < end {
                let Some((run, epoch)) = self.zero_run(&range, at, end) else {
                    at += 1;
                    continue;
                };
                // It will be said again and again until the store knows.
                self.press();
                let first = at;
                at += run;
                if self.begin(0, true).is_none() {
                    let front = self.zero_ranges.front_mut().expect("looked at");
                    front.first = first;
                    front.count = end - first;
                    return false;
                }
                let entry = Entry {
                    volume: range.volume,
                    object: range.object,
                    first,
                    count: run,
                    kind: EntryKind::Zeroes,
                    epoch,
                };
                self.log.push_entry(entry, None);
                self.note_zero_range(&entry);
            }
            self.zero_ranges.pop_front();
        }
        true
    }

    /// Whether a zero range has blocks that the store lacks.
    pub(super) fn is_to_be_repeated(&mut self, range: &ZeroRange) -> bool {
        let end = range.first + range.count;
        (range.first..end).any(|block| self.zero_run(range, block, end).is_some())
    }

    /// How many blocks from `at` on are zeroes that the store lacks, all of one epoch.
    fn zero_run(&mut self, range: &ZeroRange, at: u16, end: u16) -> Option<(u16, Epoch)> {
        let volume = self.volume_index(range.volume)?;
        let onode = self.onodes.lookup(range.volume, range.object)?;
        let epoch = self.zero_epoch(volume, onode, at)?;
        let same = |block: &u16| self.zero_epoch(volume, onode, *block) == Some(epoch);
        Some(((at..end).take_while(same).count() as u16, epoch))
    }

    fn zero_epoch(&self, volume: usize, onode: u32, block: u16) -> Option<Epoch> {
        let state = &self.volumes[volume];
        let open = state.open.parity();
        if let Some((leaf, index)) = self.onodes.block(onode, block) {
            let bit = 1u16 << index;
            let slot = self.onodes.leaf(leaf);
            if slot.zero & bit != 0 {
                return self.dirty_epoch(volume, leaf, index);
            }
            if slot.nvme[index] != NIL || slot.bad & bit != 0 {
                return None;
            }
        }
        let holes = self.onodes.get(onode).hole_dirty;
        if holes[open] {
            Some(state.open)
        } else if holes[open ^ 1] {
            Some(state.closed())
        } else {
            None
        }
    }
}
