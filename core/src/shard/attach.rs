//! Attaching a volume takes in what recovery found of it; forgetting it voids all the log says.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use super::volume::{Phase, Volume};
use super::{Shard, ZERO_RANGES_MAX, ZeroRange};
use crate::ids::{Epoch, VolumeId};
use crate::limits::ONODE_LEAVES;
use crate::onode::NIL;
use crate::recovery::LogEntry;
use crate::wire::log::{Entry, EntryKind};

/// What recovery found, without what was forgotten since: nobody will ever attach that, and what
/// waits to be attached keeps reclaim away from its segments.
pub(super) fn without_void(mut entries: Vec<LogEntry>) -> Vec<LogEntry> {
    let mut void: BTreeMap<VolumeId, u64> = BTreeMap::new();
    for LogEntry { at, .. } in &entries {
        if at.entry.kind == EntryKind::Forget {
            let seq = void.entry(at.entry.volume).or_insert(at.seq);
            *seq = at.seq.max(*seq);
        }
    }
    entries.retain(|LogEntry { at, .. }| {
        let forgotten = void.get(&at.entry.volume).is_some_and(|void| at.seq <= *void);
        !forgotten && !matches!(at.entry.kind, EntryKind::Forget | EntryKind::Kept)
    });
    entries
}

impl Shard<'_> {
    /// Serves a volume from now on. Of each block the version of the highest epoch counts, among
    /// those the one logged last; what is newer than the committed epoch is dirty.
    pub(super) fn attach(
        &mut self,
        id: VolumeId,
        object_shift: u8,
        blocks: u64,
        open: Epoch,
        committed: Epoch,
    ) {
        assert!(open > committed);
        if let Some(index) = self.volume_index(id) {
            return self.attach_again(index, object_shift, blocks, open, committed);
        }
        let volume = Volume::new(id, object_shift, blocks, open, committed);
        let free = self.volumes.iter().position(|slot| slot.id == VolumeId(NIL));
        let index = match free {
            Some(index) => {
                self.volumes[index] = volume;
                index
            }
            None => {
                self.volumes.push(volume).expect("the volume table has no more rows");
                self.volumes.len() - 1
            }
        };
        let mut entries = self.take_recovered(id);
        // Entries of one record are in the order in which they were made: a stable sort of the
        // reversed list puts the last one first.
        entries.reverse();
        entries.sort_by_key(|entry| core::cmp::Reverse((entry.at.entry.epoch, entry.at.seq)));
        for entry in &entries {
            self.take_in(index, entry);
        }
        self.settle_recovered(index);
        self.zero_ranges.make_contiguous().sort_by_key(|range| range.segment_seq);
        if self.recovered.is_empty() {
            self.recovered_crcs = Vec::new();
        }
    }

    /// Serves a volume again that was given up with everything pushed: what is cached is clean, and
    /// nobody changed the image since.
    fn attach_again(
        &mut self,
        index: usize,
        object_shift: u8,
        blocks: u64,
        open: Epoch,
        committed: Epoch,
    ) {
        while self.volumes[index].phase == Phase::Cleaning {
            self.clean_slice(index);
        }
        let before = &self.volumes[index];
        let given_up = before.gone && !before.forget && before.phase == Phase::Idle;
        assert!(given_up && before.dirty == [0; 2], "a volume is attached once");
        let traffic = before.traffic;
        let again = Volume::new(before.id, object_shift, blocks, open, committed);
        assert_eq!(before.object_blocks, again.object_blocks, "objects keep their size");
        self.volumes[index] = Volume { tasks: before.tasks, traffic, ..again };
    }

    /// The volume has so many blocks now, and clients may use some of them. When it loses blocks,
    /// they have been discarded, and that is committed.
    pub(super) fn set_size(&mut self, id: VolumeId, blocks: u64, limit: u64) {
        assert!(limit <= blocks, "a limit is inside the volume");
        if let Some(index) = self.volume_index(id) {
            let state = &mut self.volumes[index];
            (state.blocks, state.limit) = (blocks, limit);
        }
    }

    /// The entries of a volume that count, out of those that wait.
    fn take_recovered(&mut self, id: VolumeId) -> Vec<LogEntry> {
        let (mut ours, others): (Vec<_>, Vec<_>) = core::mem::take(&mut self.recovered)
            .into_iter()
            .partition(|entry| entry.at.entry.volume == id);
        self.recovered = others;
        let is_forget = |entry: &&LogEntry| entry.at.entry.kind == EntryKind::Forget;
        let void = ours.iter().filter(is_forget).map(|entry| entry.at.seq).max().unwrap_or(0);
        ours.retain(|entry| entry.at.seq > void && entry.at.entry.kind != EntryKind::Kept);
        ours
    }

    /// Takes in one entry, after all that are newer.
    fn take_in(&mut self, volume: usize, entry: &LogEntry) {
        // The volume may have been larger. What is behind its end is nothing; what is not counts:
        // without it an older version would.
        let room = self.volumes[volume].blocks_of(entry.at.entry.object) as u16;
        let Some(room) = room.checked_sub(entry.at.entry.first).filter(|room| *room > 0) else {
            return;
        };
        let mut clipped = *entry;
        clipped.at.entry.count = entry.at.entry.count.min(room);
        let (entry, at) = (&clipped, clipped.at.entry);
        let dirty = at.epoch > self.volumes[volume].committed;
        let found = self.onodes.lookup(at.volume, at.object);
        let onode = match found {
            Some(onode) => {
                self.onodes.pin(onode);
                onode
            }
            None if !dirty && !self.onodes.has_room() => return,
            None => match self.onodes.create(at.volume, at.object) {
                Some(onode) => onode,
                None => {
                    assert!(!dirty, "all dirty objects fitted before, so they fit again");
                    return;
                }
            },
        };
        if !self.onodes.get(onode).hole {
            match at.kind {
                EntryKind::Zeroes => self.take_in_zeroes(volume, onode, entry, dirty),
                EntryKind::Dirty | EntryKind::Clean => {
                    self.take_in_data(volume, onode, entry, dirty);
                }
                EntryKind::Forget | EntryKind::Kept => {}
            }
        }
        self.onodes.unpin(onode);
    }

    fn take_in_data(&mut self, volume: usize, onode: u32, entry: &LogEntry, dirty: bool) {
        let at = entry.at.entry;
        for offset in 0..at.count {
            let Some((leaf, index)) = self.undecided(onode, at.first + offset, dirty) else {
                continue;
            };
            let page = entry.at.page + u32::from(offset);
            let crc = self.recovered_crcs[entry.crc as usize + usize::from(offset)];
            self.onodes.leaf_mut(leaf).crc[index] = crc;
            self.set_log_page(leaf, index, page);
            if dirty {
                self.set_dirty(volume, onode, leaf, index);
            }
        }
    }

    fn take_in_zeroes(&mut self, volume: usize, onode: u32, entry: &LogEntry, dirty: bool) {
        let at = entry.at.entry;
        if dirty {
            self.note_recovered_zeroes(entry);
        }
        if at.first == 0 && u32::from(at.count) == self.volumes[volume].blocks_of(at.object) {
            let parity = self.volumes[volume].open.parity();
            let slot = self.onodes.get_mut(onode);
            slot.hole = true;
            if dirty {
                slot.hole_dirty[parity] = true;
                self.list_dirty(volume, onode);
            }
            return;
        }
        for block in at.first..at.first + at.count {
            let Some((leaf, index)) = self.undecided(onode, block, dirty) else { continue };
            self.onodes.leaf_mut(leaf).zero |= 1 << index;
            if dirty {
                self.set_dirty(volume, onode, leaf, index);
            }
        }
    }

    fn note_recovered_zeroes(&mut self, entry: &LogEntry) {
        let Entry { volume, object, first, count, .. } = entry.at.entry;
        let segment = entry.at.page / self.log.segment_pages();
        let segment_seq = self.log.segments()[segment as usize].seq;
        self.zero_ranges.push_back(ZeroRange { segment_seq, volume, object, first, count });
        if self.zero_ranges.len() > ZERO_RANGES_MAX {
            log::debug!("more zero ranges in the log than a running shard would make");
        }
    }

    /// The place of a block that no newer entry decided. `None` too when a clean block finds the
    /// shard's share of memory used up: then the cache knows less, that is all.
    fn undecided(&mut self, onode: u32, block: u16, dirty: bool) -> Option<(u32, usize)> {
        let room = self.onodes.block(onode, block).is_some() || self.onodes.leaves_free() > 0;
        if !dirty && !room {
            return None;
        }
        let place = self.onodes.leaf_for(onode, block);
        assert!(!dirty || place.is_some(), "all dirty leaves fitted before, so they fit again");
        let (leaf, index) = place?;
        let slot = self.onodes.leaf(leaf);
        let decided = slot.nvme[index] != NIL || slot.zero & 1 << index != 0;
        (!decided).then_some((leaf, index))
    }

    /// A hole that the store knows of served to hide older entries; now the store tells.
    fn settle_recovered(&mut self, volume: usize) {
        let id = self.volumes[volume].id;
        for onode in 0..self.onodes.slots() {
            if self.onodes.get(onode).volume != id {
                continue;
            }
            for position in 0..ONODE_LEAVES {
                let leaf = self.onodes.get(onode).leaves[position];
                if leaf != NIL {
                    self.onodes.free_if_empty(leaf);
                }
            }
            let slot = self.onodes.get_mut(onode);
            if slot.hole_dirty == [false; 2] {
                slot.hole = false;
            }
        }
    }

    /// Stops serving a volume and voids all the log says of it, as soon as nothing is under way.
    pub(super) fn forget(&mut self, id: VolumeId) {
        match self.volume_index(id) {
            Some(index) => {
                let state = &mut self.volumes[index];
                state.gone = true;
                state.forget = true;
                self.let_go(index);
            }
            None => {
                self.recovered.retain(|entry| entry.at.entry.volume != id);
                self.note_forget(id);
            }
        }
    }

    fn note_forget(&mut self, id: VolumeId) {
        if !self.forgets.contains(&id) {
            self.forgets.push(id).expect("no more volumes than rows");
        }
    }

    pub(super) fn forget_volumes(&mut self) {
        for index in 0..self.volumes.len() {
            let state = &self.volumes[index];
            if !state.forget || state.tasks > 0 || state.waiters > 0 || self.volume_is_pinned(index)
            {
                continue;
            }
            let id = state.id;
            let before = self.resident_blocks();
            self.drop_volume(index, true);
            self.counters.discarded_blocks += before - self.resident_blocks();
            let slot = &mut self.volumes[index];
            *slot = Volume::new(VolumeId(NIL), 16, 0, Epoch(1), Epoch::ZERO);
            slot.gone = true;
            self.note_forget(id);
        }
        self.log_forgets();
    }

    /// Logs what is to be forgotten, in a record of its own: it voids all records before it.
    fn log_forgets(&mut self) {
        while let Some(volume) = self.forgets.last().copied() {
            self.write_record();
            if self.log.begin(0, true).is_none() {
                return;
            }
            let entry = Entry {
                volume,
                object: 0,
                first: 0,
                count: 0,
                kind: EntryKind::Forget,
                epoch: Epoch::ZERO,
            };
            self.log.push_entry(entry, None);
            self.write_record();
            self.forgets.pop();
        }
    }

    fn volume_is_pinned(&self, volume: usize) -> bool {
        let id = self.volumes[volume].id;
        let mut of_volume = self.onodes.iter().map(|onode| self.onodes.get(onode));
        of_volume.any(|onode| onode.volume == id && onode.pins > 0)
    }

    /// Drops everything that is known of a volume, dirty or not.
    fn drop_volume(&mut self, volume: usize, remove: bool) {
        let id = self.volumes[volume].id;
        for onode in 0..self.onodes.slots() {
            if self.onodes.get(onode).volume != id {
                continue;
            }
            for position in 0..ONODE_LEAVES {
                let leaf = self.onodes.get(onode).leaves[position];
                if leaf == NIL {
                    continue;
                }
                for parity in 0..2 {
                    self.clear_dirty(volume, leaf, parity, u16::MAX);
                    let shadow = self.onodes.leaf(leaf).shadow;
                    if shadow != NIL {
                        self.clear_dirty(volume, shadow, parity, u16::MAX);
                    }
                }
                self.drop_shadow(leaf);
            }
            let slot = self.onodes.get_mut(onode);
            slot.hole_dirty = [false; 2];
            self.drop_leaves(onode);
            if remove {
                self.onodes.get_mut(onode).listed = [false; 2];
                self.onodes.remove(onode);
            }
        }
        self.zero_ranges.retain(|range| range.volume != id);
    }

    /// Drops clean contents; with `force` dirty ones too, and for good.
    pub(super) fn purge(&mut self, force: bool) {
        let before = self.resident_blocks();
        if force {
            for index in 0..self.volumes.len() {
                let id = self.volumes[index].id;
                if id != VolumeId(NIL) {
                    self.drop_volume(index, false);
                    self.note_forget(id);
                }
            }
            self.log_forgets();
        }
        while self.drop_victim().is_some() {}
        self.counters.purged_blocks += before - self.resident_blocks();
        self.again = true;
    }

    /// Whether a volume is in the middle of a push cycle, for status and tests.
    #[must_use]
    pub fn volume_is_pushing(&self, id: VolumeId) -> Option<bool> {
        let index = self.volume_index(id)?;
        Some(self.volumes[index].phase != Phase::Idle)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::wire::log::FooterEntry;

    fn entry(volume: u32, seq: u64, kind: EntryKind) -> LogEntry {
        let entry = Entry {
            volume: VolumeId(volume),
            object: 0,
            first: 0,
            count: 1,
            kind,
            epoch: Epoch(1),
        };
        LogEntry { at: FooterEntry { entry, page: 2, seq }, crc: 0 }
    }

    /// Nobody attaches a forgotten volume. What recovery kept for it kept reclaim from its segments
    /// until the next start: a log full of such had no room for a write.
    #[test]
    fn what_was_forgotten_is_not_kept_for_anybody() {
        use EntryKind::{Clean, Dirty, Forget, Kept, Zeroes};
        let found = vec![
            entry(1, 3, Dirty),
            entry(1, 9, Forget),
            entry(2, 4, Dirty),
            entry(1, 5, Forget),
            entry(1, 8, Zeroes),
            entry(1, 10, Clean),
            entry(2, 11, Kept),
        ];
        let left = without_void(found);
        assert_eq!(left, [entry(2, 4, Dirty), entry(1, 10, Clean)]);
    }
}
