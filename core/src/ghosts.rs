//! Ghosts: the blocks that lost their page a short time ago, in the order in which they did.
//!
//! Nothing of a block is kept here but where its owner refers to it, so a ghost is four bytes in a
//! ring. Places are given out in order; one whose ghost has ended is a hole, passed over when the
//! oldest ghosts end. The ring has twice the places that there may be ghosts. When holes fill it up
//! all the same, the oldest ghost ends early: each is known for at least as many evictions as there
//! may be ghosts.

use alloc::boxed::Box;

use crate::buffer::BlockAddr;

/// The place of a ghost that has ended.
const HOLE: BlockAddr = BlockAddr(u32::MAX);

/// The memory of a ring.
#[derive(Debug)]
pub(crate) struct GhostStorage(Box<[BlockAddr]>);

impl GhostStorage {
    /// Memory for at most so many ghosts.
    pub(crate) fn new(ghosts: u32) -> Self {
        Self(core::iter::repeat_n(HOLE, 2 * ghosts as usize).collect())
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Ghosts<'a> {
    ring: &'a mut [BlockAddr],
    /// The place of the oldest ghost, if there is one.
    oldest: u32,
    /// Places from the oldest ghost on, holes included.
    span: u32,
    len: u32,
}

impl<'a> Ghosts<'a> {
    pub(crate) fn new(storage: &'a mut GhostStorage) -> Self {
        storage.0.fill(HOLE);
        Self { ring: &mut storage.0, oldest: 0, span: 0, len: 0 }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Whether a new ghost needs the place of the oldest.
    pub(crate) fn is_full(&self) -> bool {
        self.span as usize == self.ring.len()
    }

    /// The block at a place.
    pub(crate) fn block(&self, place: u32) -> BlockAddr {
        self.ring[place as usize]
    }

    /// The owner of the ghost at a place refers to it from elsewhere from now on.
    pub(crate) fn set_block(&mut self, place: u32, block: BlockAddr) {
        debug_assert_ne!(self.ring[place as usize], HOLE);
        self.ring[place as usize] = block;
    }

    /// A new ghost; returns its place.
    ///
    /// # Panics
    ///
    /// If the ring is full.
    pub(crate) fn push(&mut self, block: BlockAddr) -> u32 {
        assert!(!self.is_full(), "a ghost needs a place");
        let place = self.after(self.oldest, self.span);
        self.ring[place as usize] = block;
        self.span += 1;
        self.len += 1;
        place
    }

    /// The ghost at a place ends.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub(crate) fn remove(&mut self, place: u32) {
        let block = core::mem::replace(&mut self.ring[place as usize], HOLE);
        assert_ne!(block, HOLE, "no ghost at {place}");
        self.len -= 1;
        while self.span > 0 && self.ring[self.oldest as usize] == HOLE {
            self.oldest = self.after(self.oldest, 1);
            self.span -= 1;
        }
    }

    /// The oldest ghost ends.
    pub(crate) fn pop(&mut self) -> Option<BlockAddr> {
        (self.len > 0).then(|| {
            let block = self.block(self.oldest);
            self.remove(self.oldest);
            block
        })
    }

    /// The blocks, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = BlockAddr> + '_ {
        let all = (0..self.span).map(|step| self.block(self.after(self.oldest, step)));
        all.filter(|block| *block != HOLE)
    }

    /// The place so many steps on; not more than once around.
    fn after(&self, place: u32, steps: u32) -> u32 {
        let sum = place + steps;
        let places = self.ring.len() as u32;
        if sum < places { sum } else { sum - places }
    }
}

#[cfg(test)]
mod tests {
    use alloc::collections::VecDeque;

    use super::*;

    #[test]
    fn a_ring_behaves_as_a_queue_from_whose_middle_is_taken() {
        let mut storage = GhostStorage::new(8);
        let mut ghosts = Ghosts::new(&mut storage);
        // Place and block.
        let mut model: VecDeque<(u32, BlockAddr)> = VecDeque::new();
        let mut random = 1u64;
        let mut below = |n: usize| {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (random >> 33) as usize % n
        };
        let mut fullest = 0;
        for step in 0..20_000 {
            match below(5) {
                0 | 1 => {
                    if ghosts.is_full() || ghosts.len() == 8 {
                        assert_eq!(ghosts.pop(), model.pop_front().map(|(_, block)| block));
                    }
                    let block = BlockAddr(step);
                    model.push_back((ghosts.push(block), block));
                }
                2 if !model.is_empty() => {
                    // The youngest, more often than not: it leaves holes behind the oldest.
                    let at = (below(model.len()) + below(model.len() + 1)).min(model.len() - 1);
                    ghosts.remove(model.remove(at).expect("it is there").0);
                }
                3 if !model.is_empty() => {
                    let (place, block) = &mut model[0];
                    *block = BlockAddr(1 << 20 | step);
                    ghosts.set_block(*place, *block);
                }
                _ if below(20) == 0 => {
                    assert_eq!(ghosts.pop(), model.pop_front().map(|(_, block)| block));
                }
                _ => {}
            }
            fullest = fullest.max(ghosts.span);
            assert_eq!(ghosts.len() as usize, model.len());
            assert!(ghosts.iter().eq(model.iter().map(|(_, block)| *block)));
            assert!(model.iter().all(|(place, block)| ghosts.block(*place) == *block));
        }
        assert_eq!(fullest, 16, "the ring was full at times");
    }

    #[test]
    #[should_panic(expected = "no ghost")]
    fn a_ghost_ends_once() {
        let mut storage = GhostStorage::new(2);
        let mut ghosts = Ghosts::new(&mut storage);
        ghosts.push(BlockAddr(1));
        let place = ghosts.push(BlockAddr(2));
        ghosts.remove(place);
        ghosts.remove(place);
    }
}
