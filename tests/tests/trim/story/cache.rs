//! A story of the memory half alone, as replays and benchmarks drive it: requests, whose blocks
//! come in by demand.

use std::collections::VecDeque;

use heeler_core::buffer::BufferId;
use heeler_core::cache::{Access, Cache, CacheStorage};
use heeler_core::policy::Policy;

use super::op::{Bytes, Op, PAGES_MAX, Told};
use super::place::{BLOCKS, LEAVES, OBJECT_BLOCKS, OBJECTS, number, references, volume_and_object};

pub(crate) fn run(bytes: &mut Bytes<'_>) {
    let pages = 1 + bytes.below(PAGES_MAX) as u32;
    let policy = bytes.policy();
    // Enough for all: nothing leaves but by the policy. Otherwise just enough for one object.
    let ample = bytes.below(2) == 0;
    let onodes = if ample { OBJECTS } else { 1 + bytes.below(OBJECTS) };
    let leaves = if ample { OBJECTS * LEAVES.len() } else { LEAVES.len() };
    let mut storage = CacheStorage::new(pages, onodes, leaves);
    let mut story = Story {
        cache: Cache::new(&mut storage, pages, policy),
        lru: (ample && policy == Policy::Lru).then(VecDeque::new),
        pages,
        asked: 0,
        told: Told::default(),
    };
    while !bytes.0.is_empty() {
        let op = bytes.op();
        story.told.0.push(op);
        match op {
            Op::Access { first, count, write, .. } => story.access(first, count, write),
            Op::Switch(policy) => {
                story.cache.set_policy(policy);
                assert_eq!(story.cache.policy(), policy);
                story.lru = None;
            }
            Op::Fill(block) => story.access(block, 1, false),
            Op::Write(block) => story.access(block, 1, true),
            _ => {}
        }
        story.resident();
    }
}

struct Story<'a> {
    cache: Cache<'a>,
    /// The blocks that LRU keeps, the last used in front, if nothing else ever took one away.
    lru: Option<VecDeque<usize>>,
    pages: u32,
    /// Blocks asked for.
    asked: u64,
    told: Told,
}

impl Story<'_> {
    fn access(&mut self, first: usize, count: usize, write: bool) {
        let (volume, object) = volume_and_object(first / OBJECT_BLOCKS);
        let before = self.resident();
        let access = Access { volume, object, first: number(first), count: count as u16, write };
        let hits = self.cache.access(access) as usize;
        self.asked += count as u64;
        let after = self.resident();
        let asked = first..first + count;
        let known = before[asked.clone()].iter().flatten().count();
        assert!(hits <= known, "{hits} hits, but {known} of the blocks were in RAM");
        assert!(count > 1 || hits == known, "the block was in RAM and is no hit");
        assert!(after[asked.end - 1].is_some(), "what was asked for last is there");
        for block in (0..BLOCKS).filter(|block| !asked.contains(block)) {
            let kept = after[block].is_none() || after[block] == before[block];
            assert!(kept, "block {block} came or moved, though nobody asked for it");
        }
        let Some(lru) = &mut self.lru else { return };
        let expected = asked.filter(|block| {
            let known = lru.iter().position(|other| other == block);
            lru.retain(|other| other != block);
            lru.push_front(*block);
            lru.truncate(self.pages as usize);
            known.is_some()
        });
        assert_eq!(hits, expected.count(), "hits of LRU");
        for (block, buffer) in after.iter().enumerate() {
            assert_eq!(buffer.is_some(), lru.contains(&block), "whether LRU has block {block}");
        }
    }

    /// The buffers that the blocks have; all that is always true is checked.
    fn resident(&self) -> Vec<Option<BufferId>> {
        let buffers = self.cache.buffers();
        let usage = buffers.usage();
        assert_eq!(buffers.recount(), usage, "what a recount says of the accounts");
        assert_eq!(usage.pages(), self.pages, "a page was lost or doubled");
        let counters = buffers.counters();
        assert_eq!(counters.hits + counters.misses, self.asked, "hits and misses");
        let mut found = references(self.cache.onodes(), buffers);
        let known = found.iter().flatten().count() as u32;
        found.iter_mut().for_each(|slot| *slot = slot.filter(|id| buffers.is_resident(*id)));
        let resident = found.iter().flatten().count() as u32;
        assert_eq!((usage.warm_in + usage.hot, usage.ghosts), (resident, known - resident));
        let mut pages: Vec<_> = found.iter().flatten().map(|id| buffers.page(*id)).collect();
        pages.sort();
        pages.dedup();
        assert_eq!(pages.len() as u32, resident, "two blocks have the same page");
        found
    }
}
