//! Writes a record: walks objects and ghosts, a slice at a time.

use super::{LOOK_SLICE, PAGE_EVERY, SLICE_EVERY, SLICE_PAGES, State};
use crate::cache::place;
use crate::event::Output;
use crate::ids::{BLOCK_BYTES, VolumeId};
use crate::limits::{LEAF_BLOCKS, ONODE_LEAVES};
use crate::onode::NIL;
use crate::policy::{Mark, Tag};
use crate::shard::{Op, Shard};
use crate::time::Duration;
use crate::wire::heat::{
    GhostHeat, LEARNED_PAGES, LeafHeat, ObjectHeat, PageHead, PageWriter, Part, RecordHead,
    encode_kind, kinds_of_page,
};

/// Where a record under way stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    part: Part,
    /// Ages that part the buffers into quarters, and the quarter that is looked for. Objects are
    /// gone through once for each: the hottest leaves come first.
    quarters: [u16; 3],
    quarter: usize,
    onode: u32,
    position: usize,
    ghost: Option<u32>,
    ghosts_left: u32,
    head: RecordHead,
    /// The page of the record that is the first of those being made.
    page: u32,
    /// Pages that are whole.
    staged: usize,
    writer: PageWriter,
    generation: u64,
}

impl Walk {
    fn copy(&self) -> u32 {
        (self.generation % 2) as u32
    }

    /// Whether what was used so many seconds ago belongs to the quarter that is looked for.
    fn is_quarter_of(&self, age: u16) -> bool {
        self.quarters.iter().filter(|end| age > **end).count() == self.quarter
    }

    /// The page behind those that are whole.
    fn end(&self) -> u32 {
        self.page + self.staged as u32
    }

    /// The part has ended; only the head is left after the last.
    fn next_part(&mut self) {
        let end = self.end();
        let (noted, next) = match self.part {
            Part::Buffers => (&mut self.head.ghosts_at, Part::Ghosts),
            Part::Ghosts => (&mut self.head.referenced_at, Part::Referenced),
            _ => (&mut self.head.pages, Part::Head),
        };
        *noted = end;
        self.part = next;
    }

    fn end_parts(&mut self) {
        while self.part != Part::Head {
            self.next_part();
        }
    }

    /// To the next place that a leaf can be at.
    fn next_leaf(&mut self) {
        self.position += 1;
        if self.position == ONODE_LEAVES {
            self.next_onode();
        }
    }

    fn next_onode(&mut self) {
        (self.onode, self.position) = (self.onode + 1, 0);
    }
}

impl Shard<'_> {
    pub(super) fn begin_record(&mut self) {
        self.heat.changes = self.heat_changes();
        let mut walk = Walk {
            part: Part::Buffers,
            quarters: self.buffers.age_quarters(),
            quarter: 0,
            onode: 0,
            position: 0,
            ghost: None,
            ghosts_left: 0,
            head: RecordHead::default(),
            page: 1,
            staged: 0,
            writer: PageWriter::new(),
            generation: self.heat.generation + 1,
        };
        for page in 1..=LEARNED_PAGES {
            for (at, kind) in kinds_of_page(page).enumerate() {
                let counts = self.buffers.learned().counts(kind);
                encode_kind(self.page_made(&walk), at, &counts);
            }
            self.close_page(&mut walk, Part::Learned);
        }
        self.heat.state = State::Saving(walk);
        self.again = true;
    }

    fn page_made(&mut self, walk: &Walk) -> &mut [u8] {
        &mut self.heat.bytes[walk.staged * BLOCK_BYTES..][..BLOCK_BYTES]
    }

    fn close_page(&mut self, walk: &mut Walk, part: Part) {
        let head = PageHead {
            region: self.config.layout.region,
            generation: walk.generation,
            page: walk.end(),
            part,
            records: walk.writer.records(),
        };
        let crc32c = self.config.crc32c;
        head.seal(self.page_made(walk), crc32c);
        walk.staged += 1;
        walk.writer = PageWriter::new();
    }

    pub(super) fn step_saving(&mut self, mut walk: Walk) {
        let mut looks = 0;
        while looks < LOOK_SLICE {
            if !walk.writer.has_room() {
                let part = walk.part;
                self.close_page(&mut walk, part);
                if walk.end() == self.heat.copy_pages {
                    // What does not fit is not known the next time.
                    walk.end_parts();
                }
            }
            if walk.staged == SLICE_PAGES || walk.part == Part::Head {
                return self.write_slice(walk);
            }
            let looked = match walk.part {
                Part::Buffers => self.save_leaf(&mut walk),
                Part::Ghosts => self.save_ghost(&mut walk),
                Part::Referenced => self.save_object(&mut walk),
                Part::Head | Part::Learned => panic!("these are not walked"),
            };
            match looked {
                Some(blocks) => looks += 1 + blocks,
                None => self.end_part(&mut walk),
            }
        }
        self.heat.state = State::Saving(walk);
        self.again = true;
    }

    fn end_part(&mut self, walk: &mut Walk) {
        if walk.writer.records() > 0 {
            let part = walk.part;
            self.close_page(walk, part);
        }
        walk.next_part();
        (walk.onode, walk.position) = (0, 0);
        walk.ghosts_left = self.buffers.ghost_places();
        if walk.end() == self.heat.copy_pages {
            walk.end_parts();
        }
    }

    /// Looks at the next leaf, and at so many buffers; `None`: there are no more.
    fn save_leaf(&mut self, walk: &mut Walk) -> Option<usize> {
        if walk.onode >= self.onodes.slots() {
            if walk.quarter == walk.quarters.len() {
                return None;
            }
            walk.quarter += 1;
            (walk.onode, walk.position) = (0, 0);
            return Some(0);
        }
        let onode = self.onodes.get(walk.onode);
        let (volume, object, leaf) = (onode.volume, onode.object, onode.leaves[walk.position]);
        if volume == VolumeId(NIL) {
            walk.next_onode();
            return Some(0);
        }
        let first = (walk.position * LEAF_BLOCKS) as u16;
        walk.next_leaf();
        if leaf == NIL {
            return Some(0);
        }
        let (buffers, warm, marks) = (0, 0, [Mark::NEW; LEAF_BLOCKS]);
        let mut found = LeafHeat { volume, object, first, buffers, warm, marks };
        let youngest = self.look_at_leaf(leaf, &mut found);
        if youngest.is_some_and(|age| walk.is_quarter_of(age)) {
            let mut writer = walk.writer;
            let fits = writer.push_leaf(self.page_made(walk), &found);
            debug_assert!(fits);
            walk.writer = writer;
        }
        Some(found.buffers.count_ones() as usize)
    }

    /// Notes what a leaf has in RAM; returns the age of the youngest.
    fn look_at_leaf(&self, leaf: u32, found: &mut LeafHeat) -> Option<u16> {
        let mut youngest = None;
        for index in 0..LEAF_BLOCKS {
            let Some(buffer) = self.onodes.buffer(leaf, index) else { continue };
            let hint = self.buffers.hint(buffer);
            found.buffers |= 1 << index;
            found.warm |= u16::from(hint.tag == Tag::WarmIn) << index;
            found.marks[index] = hint.mark;
            let age = self.buffers.age(buffer);
            youngest = Some(youngest.map_or(age, |youngest: u16| youngest.min(age)));
        }
        youngest
    }

    fn save_ghost(&mut self, walk: &mut Walk) -> Option<usize> {
        let found = self.buffers.look_at_ghost(walk.ghost).filter(|_| walk.ghosts_left > 0);
        let (next, ghost) = found?;
        walk.ghost = Some(next);
        walk.ghosts_left -= 1;
        let Some((addr, mark)) = ghost else { return Some(0) };
        let (leaf, index) = place(addr);
        let leaf = self.onodes.leaf(leaf);
        let onode = self.onodes.get(leaf.onode);
        let block = (usize::from(leaf.position) * LEAF_BLOCKS + index) as u16;
        let ghost = GhostHeat { volume: onode.volume, object: onode.object, block, mark };
        let mut writer = walk.writer;
        let fits = writer.push_ghost(self.page_made(walk), &ghost);
        debug_assert!(fits);
        walk.writer = writer;
        Some(1)
    }

    fn save_object(&mut self, walk: &mut Walk) -> Option<usize> {
        if walk.onode >= self.onodes.slots() {
            return None;
        }
        let onode = self.onodes.get(walk.onode);
        let mask = |leaf: &u32| if *leaf == NIL { 0 } else { self.onodes.leaf(*leaf).referenced };
        let mut referenced = [0; ONODE_LEAVES];
        for (mine, leaf) in referenced.iter_mut().zip(&onode.leaves) {
            *mine = mask(leaf);
        }
        let object = ObjectHeat { volume: onode.volume, object: onode.object, referenced };
        if onode.volume != VolumeId(NIL) && referenced != [0; ONODE_LEAVES] {
            let mut writer = walk.writer;
            let fits = writer.push_object(self.page_made(walk), &object);
            debug_assert!(fits);
            walk.writer = writer;
        }
        walk.next_onode();
        Some(ONODE_LEAVES)
    }

    /// Writes the pages that are whole, or when all are written the head.
    fn write_slice(&mut self, mut walk: Walk) {
        let mut at = walk.page;
        if walk.staged == 0 {
            // As of now: nothing that was written is younger.
            walk.head.clock = self.buffers.learned().clock();
            walk.head.share = self.share();
            (at, walk.page) = (0, 0);
            let head = walk.head;
            head.encode(self.page_made(&walk));
            self.close_page(&mut walk, Part::Head);
        }
        let op = self.start_op(Op::Heat);
        let count = walk.staged as u32;
        self.heat.in_flight = walk.staged;
        let at = self.heat.start + walk.copy() * self.heat.copy_pages + at;
        self.heat.state = State::Saving(walk);
        self.emit(Output::DeviceWrite { op, at, count, header: count });
    }

    pub(in crate::shard) fn heat_written(&mut self, ok: bool) {
        self.heat.in_flight = 0;
        self.again = true;
        let State::Saving(mut walk) = self.heat.state else { panic!("nothing was to be written") };
        if ok && walk.page > 0 {
            self.counters.heat_pages += walk.staged as u64;
            walk.page += walk.staged as u32;
            walk.staged = 0;
            self.heat.state = State::Saving(walk);
            let pause = if self.heat.closing { Duration(0) } else { SLICE_EVERY };
            self.heat.slice_at = self.now + pause;
            return;
        }
        // Done, or the device would not: then the other copy counts until the next time.
        self.heat.state = State::Idle;
        if ok {
            self.heat.generation = walk.generation;
            self.counters.heat_records += 1;
        }
        let rest = Duration(PAGE_EVERY.0 * u64::from(walk.head.pages));
        self.put_records_off(rest.max(self.config.heat_every));
    }
}
