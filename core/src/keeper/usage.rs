//! How much of each of the volume's own packs the image needs: what may be deleted, and what is
//! worth rewriting.
//!
//! A pack that was written in epoch e and lost its last block in epoch d is needed by the snapshots
//! with an epoch in [e, d), and by no other. The same is true of map pages. Packs of the tail count
//! as live, all of them, until a checkpoint folds them into the map pages.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::ids::{BLOCK_BYTES, Epoch};
use crate::wire::head::Snapshot;
use crate::wire::map_page::PackRef;
use crate::wire::names::ObjectName;

/// What is known of a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Use {
    /// Bytes of the object.
    bytes: u64,
    /// Known as soon as a map page has named it.
    header_bytes: u16,
    /// Blocks that map pages need.
    live: u32,
    /// The tail of the newest head names it.
    in_tail: bool,
    /// The newest image does not need it since this epoch.
    dead: Option<Epoch>,
}

/// The volume's own packs, and map pages that are kept for snapshots.
#[derive(Debug, Default)]
pub(super) struct Usage {
    packs: BTreeMap<(Epoch, u32), Use>,
    /// Versions of map pages that the newest image does not need since an epoch.
    pages: BTreeMap<(Epoch, u32), Epoch>,
}

/// Bytes of a volume's packs in the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StoreBytes {
    /// In packs that no snapshot holds back.
    pub packs: u64,
    /// Of these: blocks that the newest image needs, and all that is in the tail.
    pub live: u64,
    /// In packs that a snapshot holds back.
    pub held: u64,
}

impl Usage {
    /// All packs are counted anew.
    pub(super) fn forget_packs(&mut self) {
        self.packs.clear();
    }

    /// A pack that is in the store.
    pub(super) fn add(&mut self, epoch: Epoch, n: u32, bytes: u64) {
        self.packs.entry((epoch, n)).or_default().bytes = bytes;
    }

    /// The tail of the newest head names a pack.
    pub(super) fn enter_tail(&mut self, epoch: Epoch, n: u32) {
        self.packs.entry((epoch, n)).or_default().in_tail = true;
    }

    /// The map pages know a pack now; they were counted before. It is as of `epoch`.
    pub(super) fn leave_tail(&mut self, name: (Epoch, u32), epoch: Epoch) {
        let Some(known) = self.packs.get_mut(&name) else { return };
        known.in_tail = false;
        if known.live == 0 {
            known.dead = Some(epoch);
        }
    }

    /// A map page needs so many blocks of a pack.
    pub(super) fn count(&mut self, packs: &[(PackRef, u16)]) {
        for (pack, live) in packs {
            let known = self.packs.entry((pack.epoch, pack.n)).or_default();
            known.header_bytes = pack.header_bytes;
            known.live += u32::from(*live);
            known.dead = None;
        }
    }

    /// A map page that was counted is no longer part of the image, as of `epoch`.
    pub(super) fn discount(&mut self, packs: &[(PackRef, u16)], epoch: Epoch) {
        for (pack, live) in packs {
            let known = self.packs.get_mut(&(pack.epoch, pack.n)).expect("it was counted");
            known.live -= u32::from(*live);
            if known.live == 0 && !known.in_tail {
                known.dead = Some(epoch);
            }
        }
    }

    /// A snapshot of this epoch needs the pack.
    pub(super) fn note_snapshot(&mut self, name: (Epoch, u32), epoch: Epoch) {
        let known = self.packs.entry(name).or_default();
        if known.live == 0 && !known.in_tail {
            known.dead = known.dead.max(Some(epoch.next()));
        }
    }

    /// A version of a map page that only snapshots may need since `dead`.
    pub(super) fn note_page(&mut self, page: u32, epoch: Epoch, dead: Epoch) {
        self.pages.insert((epoch, page), dead);
    }

    /// Whether snapshots may need this version of a map page.
    pub(super) fn has_page(&self, page: u32, epoch: Epoch) -> bool {
        self.pages.contains_key(&(epoch, page))
    }

    /// Packs up to `newest` that nothing needs: all pages and snapshots have been counted.
    pub(super) fn take_orphans(&mut self, newest: Epoch) -> Vec<ObjectName> {
        let orphan = |&(epoch, _): &(Epoch, u32), known: &mut Use| {
            epoch <= newest && known.live == 0 && !known.in_tail && known.dead.is_none()
        };
        let gone = self.packs.extract_if(.., orphan);
        gone.map(|((epoch, n), _)| ObjectName::Pack { epoch, n }).collect()
    }

    /// What neither the newest image nor a snapshot needs; it is forgotten.
    pub(super) fn take_dead(&mut self, snapshots: &[Snapshot]) -> Vec<ObjectName> {
        let held = |from: Epoch, to: Epoch| {
            snapshots.iter().any(|snapshot| (from..to).contains(&snapshot.epoch))
        };
        let pack_gone = |&(epoch, _): &(Epoch, u32), known: &mut Use| {
            known.dead.is_some_and(|dead| !held(epoch, dead))
        };
        let packs = self.packs.extract_if(.., pack_gone);
        let mut gone: Vec<_> = packs.map(|((epoch, n), _)| ObjectName::Pack { epoch, n }).collect();
        let page_gone = |&(epoch, _): &(Epoch, u32), dead: &mut Epoch| !held(epoch, *dead);
        let pages = self.pages.extract_if(.., page_gone);
        gone.extend(pages.map(|((epoch, page), _)| ObjectName::Map { page, epoch }));
        gone
    }

    /// What the store holds.
    pub(super) fn bytes(&self, snapshots: &[Snapshot]) -> StoreBytes {
        let newest = newest(snapshots);
        let mut bytes = StoreBytes::default();
        for ((epoch, _), known) in &self.packs {
            if newest >= Some(*epoch) {
                bytes.held += known.bytes;
            } else {
                bytes.packs += known.bytes;
                bytes.live += known.live_bytes();
            }
        }
        bytes
    }

    /// Packs worth rewriting, the best first, until they give back `bytes`, so that together they
    /// have at most `blocks_max` live blocks: those that give back most for what is copied, and old
    /// ones rather than young ones, which are still losing blocks (Rosenblum and Ousterhout, "The
    /// Design and Implementation of a Log-Structured File System", SOSP 1991). None that a snapshot
    /// holds: that gains nothing.
    pub(super) fn victims(
        &self,
        snapshots: &[Snapshot],
        blocks_max: u32,
        bytes: u64,
    ) -> Vec<PackRef> {
        let newest = newest(snapshots);
        let mut worth = Vec::new();
        let ages = (1..=self.packs.len() as u64).rev();
        for (age, (&(epoch, n), known)) in ages.zip(&self.packs) {
            let (live, bytes) = (known.live_bytes(), known.bytes);
            // What the header takes is no garbage.
            let full = live + u64::from(known.header_bytes) >= bytes;
            if known.in_tail || known.live == 0 || full || newest >= Some(epoch) {
                continue;
            }
            // (1 - u) * age / (1 + u), in thousandths.
            let benefit = (bytes - live) * 1000 / (bytes + live) * age;
            let pack = PackRef { source: 0, epoch, n, header_bytes: known.header_bytes };
            worth.push((benefit, pack, known.live, bytes - live));
        }
        worth.sort_unstable_by(|a, b| b.cmp(a));
        let (mut left, mut wanted) = (blocks_max, bytes);
        let fits = |&(_, pack, live, garbage): &(u64, PackRef, u32, u64)| {
            left = left.checked_sub(live).filter(|_| wanted > 0)?;
            wanted = wanted.saturating_sub(garbage);
            Some(pack)
        };
        worth.iter().map_while(fits).collect()
    }
}

impl Use {
    fn live_bytes(&self) -> u64 {
        if self.in_tail { self.bytes } else { u64::from(self.live) * BLOCK_BYTES as u64 }
    }
}

/// The epoch of the last snapshot. It needs what the newest image has of that epoch or before.
fn newest(snapshots: &[Snapshot]) -> Option<Epoch> {
    snapshots.iter().map(|snapshot| snapshot.epoch).max()
}

#[cfg(test)]
mod tests {
    use alloc::string::String;
    use alloc::vec;

    use super::*;

    fn snapshot(epoch: u64) -> Snapshot {
        Snapshot {
            name: String::new(),
            number: 1,
            epoch: Epoch(epoch),
            blocks: 1,
            created_unix_secs: 0,
            deleting: false,
        }
    }

    fn pack(epoch: u64) -> PackRef {
        PackRef { source: 0, epoch: Epoch(epoch), n: 0, header_bytes: 100 }
    }

    fn name(epoch: u64) -> ObjectName {
        ObjectName::Pack { epoch: Epoch(epoch), n: 0 }
    }

    #[test]
    fn a_dead_pack_goes_when_no_snapshot_lies_in_its_life() {
        let mut usage = Usage::default();
        for epoch in [3, 5] {
            usage.add(Epoch(epoch), 0, 5000);
            usage.enter_tail(Epoch(epoch), 0);
        }
        usage.count(&[(pack(3), 1), (pack(5), 1)]);
        usage.leave_tail((Epoch(3), 0), Epoch(6));
        usage.leave_tail((Epoch(5), 0), Epoch(6));
        assert_eq!(usage.take_dead(&[]), []);
        usage.discount(&[(pack(3), 1), (pack(5), 1)], Epoch(9));
        // One before both, one that needs the first, one after both.
        let others = [snapshot(2), snapshot(9)];
        let mut snapshots = others.to_vec();
        snapshots.insert(1, snapshot(4));
        assert_eq!(usage.take_dead(&snapshots), [name(5)]);
        assert_eq!(usage.take_dead(&others), [name(3)]);
        assert_eq!(usage.bytes(&[]), StoreBytes::default());
    }

    #[test]
    fn orphans_go_and_what_is_newer_or_needed_stays() {
        let mut usage = Usage::default();
        for epoch in 1..=5 {
            usage.add(Epoch(epoch), 0, 5000);
        }
        usage.count(&[(pack(1), 1)]);
        usage.enter_tail(Epoch(2), 0);
        usage.note_snapshot((Epoch(3), 0), Epoch(3));
        assert_eq!(usage.take_orphans(Epoch(4)), [name(4)]);
        assert_eq!(usage.take_dead(&[snapshot(3)]), []);
        assert_eq!(usage.take_dead(&[]), [name(3)]);
        usage.note_page(7, Epoch(1), Epoch(3));
        assert_eq!(usage.take_dead(&[snapshot(2)]), []);
        let page = ObjectName::Map { page: 7, epoch: Epoch(1) };
        assert_eq!(usage.take_dead(&[snapshot(3)]), [page]);
    }

    #[test]
    fn what_gives_back_most_is_rewritten_first() {
        let mut usage = Usage::default();
        let full = 100 + 10 * BLOCK_BYTES as u64;
        for (epoch, live) in [(1, 10), (2, 2), (3, 8), (4, 1), (5, 3)] {
            usage.add(Epoch(epoch), 0, full);
            usage.count(&[(pack(epoch), live)]);
        }
        usage.enter_tail(Epoch(6), 0);
        assert_eq!(usage.victims(&[], 100, u64::MAX), [2, 4, 5, 3].map(pack));
        assert_eq!(usage.victims(&[], 5, u64::MAX), [2, 4].map(pack));
        assert_eq!(usage.victims(&[snapshot(3)], 100, u64::MAX), [4, 5].map(pack));
        // The first gives back 8 blocks, the second 9.
        let block = BLOCK_BYTES as u64;
        assert_eq!(usage.victims(&[], 100, 8 * block), [2].map(pack));
        assert_eq!(usage.victims(&[], 100, 9 * block), [2, 4].map(pack));
        let bytes = usage.bytes(&[snapshot(1)]);
        assert_eq!((bytes.held, bytes.packs), (full, 4 * full));
        assert_eq!(bytes.live, 14 * BLOCK_BYTES as u64);
        assert_eq!(vec![name(6)], {
            usage.leave_tail((Epoch(6), 0), Epoch(7));
            usage.take_dead(&[])
        });
    }
}
