//! A volume whose size changes while it is used, and what the log says of one that was larger.

use super::*;
use crate::recovery::LogEntry;
use crate::wire::log::{Entry, EntryKind, FooterEntry};

const BLOCKS: u64 = (OBJECTS * OBJECT_BLOCKS) as u64;

impl World<'_> {
    fn size(&mut self, blocks: u64, limit: u64) {
        self.mail(ToShard::Size { volume: VOLUME, blocks, limit });
    }

    fn refused(&mut self, kind: RequestKind, first: u32, count: u32) {
        self.expected = Status::Invalid;
        self.ask(kind, Advice::None, first, count);
        if kind == RequestKind::Write {
            assert_eq!(self.transit.len(), TRANSIT_PAGES as usize, "its pages came back");
        }
        self.expected = Status::Ok;
    }
}

#[test]
fn what_is_to_be_cut_off_is_kept_from_clients_and_discarded() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    // Of an object in the middle of which the end will be: in RAM, in the log, in the store only.
    let end = 3 * OBJECT_BLOCKS + 10;
    world.store(end - 5..end + 30);
    world.write(Advice::None, end - 5, 10);
    world.push();
    world.write(Advice::DontNeed, end + 6, 4);
    world.size(BLOCKS, u64::from(end));
    for kind in [RequestKind::Read, RequestKind::Write, RequestKind::Discard, RequestKind::Cache] {
        world.refused(kind, end, 1);
        world.refused(kind, end - 1, 2);
        world.refused(kind, 4 * OBJECT_BLOCKS, 1);
    }
    world.read(Advice::None, end - 5, 5);
    world.write(Advice::None, end - 2, 2);
    world.ask(RequestKind::Discard, Advice::Cut, end, 4 * OBJECT_BLOCKS - end);
    world.push();
    assert!(world.store.keys().all(|(object, at)| object * OBJECT_BLOCKS + u32::from(*at) < end));
    world.size(end.into(), end.into());
    world.read(Advice::None, end - 5, 5);
    world.refused(RequestKind::Read, end - 1, 2);
    // It grows again: nothing comes back.
    world.size(BLOCKS, BLOCKS);
    world.ask(RequestKind::Read, Advice::None, end, 30);
    assert_eq!(world.read, [0; 30]);
    world.write(Advice::None, end, 4);
    world.read(Advice::None, end, 4);
}

/// A newer version of some blocks lies in one entry with blocks behind the end. It was left out as
/// a whole once, and then an older version of the blocks before the end was served.
#[test]
fn what_the_log_has_across_the_end_counts_up_to_it() {
    let mut storage = storage(Policy::default());
    let entry = |seq, first, count, page, kind| {
        let epoch = Epoch(seq);
        let entry = Entry { volume: VOLUME, object: 0, first, count, kind, epoch };
        LogEntry { at: FooterEntry { entry, page, seq }, crc: page }
    };
    let entries = vec![
        entry(1, 0, 16, 0, EntryKind::Dirty),
        entry(2, 8, 16, 16, EntryKind::Dirty),
        entry(3, 12, 30, 32, EntryKind::Zeroes),
        entry(4, 20, 4, 40, EntryKind::Dirty),
    ];
    let own: Vec<_> = (0..SHARD_PAGES).map(PageId).collect();
    let mut segment_seqs = vec![0; SEGMENTS as usize];
    segment_seqs[0] = 1;
    let recovered = Recovered {
        segment_seqs,
        entries,
        crcs: (500..600).collect(),
        next_seq: 9,
        next_segment_seq: 2,
        ..Recovered::default()
    };
    let mut shard = Shard::new(config(Policy::default()), &mut storage, &own, recovered);
    let mail = ToShard::Attach {
        volume: VOLUME,
        object_shift: OBJECT_SHIFT,
        blocks: 14,
        open: Epoch(10),
        committed: Epoch(9),
    };
    shard.handle(Instant(1), Input::Keeper(mail)).expect("mail is taken");
    let onode = shard.onodes.lookup(VOLUME, 0).expect("the log has some of it");
    let crc = |block| {
        let (leaf, index) = shard.onodes.block(onode, block)?;
        let leaf = shard.onodes.leaf(leaf);
        (leaf.nvme[index] != NIL).then_some(leaf.crc[index])
    };
    assert_eq!((crc(0), crc(7)), (Some(500), Some(507)));
    assert_eq!((crc(8), crc(11)), (Some(516), Some(519)), "the newer one");
    assert_eq!(shard.source(onode, 13), Source::Zero);
    assert_eq!((crc(14), crc(20)), (None, None), "behind the end there is nothing");
}
