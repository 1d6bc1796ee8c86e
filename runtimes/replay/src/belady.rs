//! The best that a cache can do which fetches on demand: Belady's MIN, which knows the future.

use crate::trace::{Hits, Trace};

/// A block that is not touched again.
const NEVER: u32 = u32::MAX;

/// The future of a trace: what MIN decides by.
///
/// MIN fetches what is missing and gives up the block whose next use is farthest away; every missed
/// block takes a page, even if it is never used again. No policy that does this much hits more.
#[derive(Debug)]
pub struct Belady<'a> {
    trace: &'a Trace,
    /// For each reference, the next one to the same block, or [`NEVER`].
    next_use: Vec<u32>,
}

impl<'a> Belady<'a> {
    /// Looks ahead. Takes 4 bytes for each reference.
    #[must_use]
    pub fn new(trace: &'a Trace) -> Self {
        let mut next_use = vec![NEVER; trace.blocks.len()];
        let mut last = vec![NEVER; trace.unique_blocks() as usize];
        for (at, &block) in (0..).zip(&trace.blocks) {
            let before = std::mem::replace(&mut last[block as usize], at);
            if before != NEVER {
                next_use[before as usize] = at;
            }
        }
        Self { trace, next_use }
    }

    /// What MIN finds in a cache of `pages` pages, at least one. Time O(references).
    ///
    /// Residents are kept as the set of the references at which they are used next: the victim is
    /// the greatest. Those that are not used again are only counted.
    #[must_use]
    pub fn hits(&self, pages: u32) -> Hits {
        let blocks = &self.trace.blocks;
        let mut hits = Hits::default();
        let mut resident = vec![false; self.trace.unique_blocks() as usize];
        let mut coming = Set::new(blocks.len());
        let (mut used, mut useless) = (0u32, 0u32);
        let mut at = 0;
        for access in self.trace.accesses() {
            for _ in 0..access.count {
                let block = blocks[at] as usize;
                if resident[block] {
                    hits.all += 1;
                    hits.reads += u64::from(!access.write);
                    coming.remove(at);
                } else if used < pages {
                    used += 1;
                } else if useless > 0 {
                    useless -= 1;
                } else {
                    let farthest = coming.take_greatest().expect("the cache is full of them");
                    resident[blocks[farthest] as usize] = false;
                }
                let next = self.next_use[at];
                resident[block] = next != NEVER;
                if next == NEVER {
                    useless += 1;
                } else {
                    coming.insert(next as usize);
                }
                at += 1;
            }
        }
        hits
    }
}

/// A set of small numbers that knows its greatest: a bitmap, and bitmaps of which words of the one
/// below are not empty. Every operation takes one step a level, and 2^32 numbers make six.
#[derive(Debug)]
struct Set {
    /// The numbers first, a single word last.
    levels: Vec<Vec<u64>>,
}

impl Set {
    fn new(numbers: usize) -> Self {
        let mut levels = vec![vec![0; numbers.div_ceil(64).max(1)]];
        while let Some(words) = levels.last().map(Vec::len).filter(|words| *words > 1) {
            levels.push(vec![0; words.div_ceil(64)]);
        }
        Self { levels }
    }

    fn insert(&mut self, mut number: usize) {
        for level in &mut self.levels {
            level[number / 64] |= 1 << (number % 64);
            number /= 64;
        }
    }

    fn remove(&mut self, mut number: usize) {
        for level in &mut self.levels {
            let word = &mut level[number / 64];
            *word &= !(1 << (number % 64));
            if *word != 0 {
                return;
            }
            number /= 64;
        }
    }

    fn take_greatest(&mut self) -> Option<usize> {
        let mut index = 0;
        for level in self.levels.iter().rev() {
            index = index * 64 + level[index].checked_ilog2()? as usize;
        }
        self.remove(index);
        Some(index)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crate::records::Record;

    use super::*;

    struct Rng(u64);

    impl Rng {
        /// SplitMix64.
        fn below(&mut self, bound: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut x = self.0;
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (x ^ (x >> 31)) % bound
        }
    }

    fn trace(of: &[(u64, bool)]) -> Trace {
        let records = of.iter().map(|&(block, write)| {
            Ok(Record { volume: 0, offset: block * 4096, length: 4096, write })
        });
        Trace::new(records).expect("a trace")
    }

    /// MIN as it is described: looks through the future for every resident.
    fn naive(of: &[(u64, bool)], pages: usize) -> Hits {
        let mut hits = Hits::default();
        let mut resident: Vec<u64> = Vec::new();
        for (at, &(block, write)) in of.iter().enumerate() {
            if resident.contains(&block) {
                hits.all += 1;
                hits.reads += u64::from(!write);
                continue;
            }
            if resident.len() == pages {
                let next = |block: &u64| of[at..].iter().position(|(other, _)| other == block);
                let distance = |index: &usize| next(&resident[*index]).unwrap_or(usize::MAX);
                let victim = (0..pages).max_by_key(distance).expect("there is one");
                resident.swap_remove(victim);
            }
            resident.push(block);
        }
        hits
    }

    #[test]
    fn it_agrees_with_the_definition() {
        for seed in 0..60 {
            let mut rng = Rng(seed);
            let (length, blocks) = (1 + rng.below(400), 1 + rng.below(40));
            let of: Vec<_> = (0..length).map(|_| (rng.below(blocks), rng.below(3) == 0)).collect();
            let trace = trace(&of);
            let belady = Belady::new(&trace);
            for pages in [1, 2, 3, 7, 20, 40] {
                assert_eq!(
                    belady.hits(pages),
                    naive(&of, pages as usize),
                    "seed {seed}, {pages} pages"
                );
            }
        }
    }

    #[test]
    fn what_is_used_last_leaves_first() {
        // a b c, and then a b for ever: with two pages, c costs one of them once.
        let of: Vec<_> = [0, 1, 2, 0, 1, 0, 1].map(|block| (block, false)).into();
        let trace = trace(&of);
        assert_eq!(Belady::new(&trace).hits(2), Hits { all: 3, reads: 3 });
        assert_eq!(Belady::new(&trace).hits(3), Hits { all: 4, reads: 4 });
    }

    #[test]
    fn a_set_knows_its_greatest() {
        let mut rng = Rng(1);
        for size in [1, 64, 65, 5000, 300_000] {
            let mut set = Set::new(size);
            let mut model = BTreeSet::new();
            assert_eq!(set.take_greatest(), None);
            for _ in 0..3000 {
                let number = rng.below(size as u64) as usize;
                match rng.below(5) {
                    0 | 1 => {
                        set.insert(number);
                        model.insert(number);
                    }
                    2 => {
                        set.remove(number);
                        model.remove(&number);
                    }
                    _ => assert_eq!(set.take_greatest(), model.pop_last()),
                }
            }
        }
    }
}
