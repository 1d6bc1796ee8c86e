//! The policies, written down once more as plainly as they can be: to have numbers for traces that
//! are not in the tables.

use std::collections::{HashMap, VecDeque};

/// A cache by one of the policies' rules. Blocks are any numbers.
#[derive(Debug, Default)]
pub(crate) struct Naive {
    pages: usize,
    /// Front: came last.
    warm_in: VecDeque<u64>,
    hot: VecDeque<u64>,
    ghosts: VecDeque<u64>,
    uses: HashMap<u64, u8>,
}

/// A touch of a block; `true` for a write. Returns whether it was in the cache.
pub(crate) type Touch = fn(&mut Naive, u64, bool) -> bool;

/// Takes `block` off a list, if it is there.
fn take(list: &mut VecDeque<u64>, block: u64) -> bool {
    let at = list.iter().position(|other| *other == block);
    at.and_then(|at| list.remove(at)).is_some()
}

impl Naive {
    pub(crate) fn new(pages: u32) -> Self {
        Self { pages: pages as usize, ..Self::default() }
    }

    fn resident(&self) -> usize {
        self.warm_in.len() + self.hot.len()
    }

    fn renew_in_hot(&mut self, block: u64) -> bool {
        let there = take(&mut self.hot, block);
        if there {
            self.hot.push_front(block);
        }
        there
    }

    fn leave_ghost(&mut self, block: u64, ghosts_max: usize) {
        self.ghosts.push_front(block);
        self.ghosts.truncate(ghosts_max);
    }

    /// A block that was missing and has room now.
    fn insert(&mut self, block: u64, was_ghost: bool) {
        let list = if was_ghost { &mut self.hot } else { &mut self.warm_in };
        list.push_front(block);
    }

    pub(crate) fn lru(&mut self, block: u64, _write: bool) -> bool {
        if self.renew_in_hot(block) {
            return true;
        }
        self.hot.push_front(block);
        self.hot.truncate(self.pages);
        false
    }

    /// A quarter of the pages for what was seen once, ghosts of half as many blocks.
    pub(crate) fn two_q(&mut self, block: u64, _write: bool) -> bool {
        if self.renew_in_hot(block) || self.warm_in.contains(&block) {
            return true;
        }
        let was_ghost = take(&mut self.ghosts, block);
        if self.resident() == self.pages {
            if self.warm_in.len() > (self.pages / 4).max(1) || self.hot.is_empty() {
                let victim = self.warm_in.pop_back().expect("it is full");
                self.leave_ghost(victim, self.pages / 2);
            } else {
                self.hot.pop_back();
            }
        }
        self.insert(block, was_ghost);
        false
    }

    /// Inserts first and then trims each list to its half, or to what the other leaves it. A write
    /// to what is in the FIFO makes it young again.
    pub(crate) fn two_q_bluestore(&mut self, block: u64, write: bool) -> bool {
        if self.renew_in_hot(block) {
            return true;
        }
        if self.warm_in.contains(&block) {
            if write {
                take(&mut self.warm_in, block);
                self.warm_in.push_front(block);
            }
            return true;
        }
        let was_ghost = take(&mut self.ghosts, block);
        self.insert(block, was_ghost);
        if self.resident() > self.pages {
            let mut warm_in_max = self.pages / 2;
            let mut hot_max = self.pages - warm_in_max;
            if self.hot.len() < hot_max {
                warm_in_max += hot_max - self.hot.len();
            } else if self.warm_in.len() < warm_in_max {
                hot_max += warm_in_max - self.warm_in.len();
            }
            while self.warm_in.len() > warm_in_max {
                let victim = self.warm_in.pop_back().expect("it is too long");
                self.ghosts.push_front(victim);
            }
            self.hot.truncate(hot_max);
            self.ghosts.truncate(self.pages / 2);
        }
        false
    }

    /// A tenth of the pages for what was seen once, ghosts as many as the rest; two uses there earn
    /// a place in the main queue, and up to three are remembered.
    pub(crate) fn s3_fifo(&mut self, block: u64, _write: bool) -> bool {
        if self.warm_in.contains(&block) || self.hot.contains(&block) {
            let uses = self.uses.entry(block).or_default();
            *uses = (*uses + 1).min(3);
            return true;
        }
        let was_ghost = take(&mut self.ghosts, block);
        let small = (self.pages / 10).max(1);
        while self.resident() == self.pages {
            if self.warm_in.len() >= small {
                let victim = self.warm_in.pop_back().expect("it is long enough");
                if self.uses.remove(&victim).unwrap_or(0) >= 2 {
                    self.hot.push_front(victim);
                } else {
                    self.leave_ghost(victim, self.pages - small);
                }
            } else {
                let victim = self.hot.pop_back().expect("the other list is short");
                match self.uses.remove(&victim).unwrap_or(0) {
                    0 => {}
                    uses => {
                        self.uses.insert(victim, uses - 1);
                        self.hot.push_front(victim);
                    }
                }
            }
        }
        self.insert(block, was_ghost);
        false
    }
}
