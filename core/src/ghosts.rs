//! Ghosts: the blocks that lost their page a short time ago, in the order in which they did.
//!
//! Of a block nothing is kept here but where its owner refers to it and the policy's mark, so a
//! ghost is eight bytes in a ring. Places are given out in order; one whose ghost has ended is a
//! hole, passed over when the oldest ghosts end. When holes fill the ring up, the oldest ghost ends
//! early: each is known for at least as many evictions as there are places.

use alloc::boxed::Box;

use crate::buffer::BlockAddr;
use crate::policy::Mark;

/// The place of a ghost that has ended.
const HOLE: BlockAddr = BlockAddr(u32::MAX);

/// Places beyond the number of ghosts, so that holes do not fill a small ring up.
const SPARE_PLACES: usize = 4096;

/// The memory of a ring.
#[derive(Debug)]
pub(crate) struct GhostStorage(Box<[(BlockAddr, Mark)]>);

impl GhostStorage {
    /// Bytes of one ghost.
    pub(crate) const GHOST_BYTES: usize = size_of::<(BlockAddr, Mark)>();

    /// Memory for at most so many ghosts.
    pub(crate) fn new(ghosts: u32) -> Self {
        Self::with_places(ghosts as usize + SPARE_PLACES)
    }

    fn with_places(places: usize) -> Self {
        Self(core::iter::repeat_n((HOLE, Mark::NEW), places).collect())
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Ghosts<'a> {
    ring: &'a mut [(BlockAddr, Mark)],
    /// The place of the oldest ghost, if there is one.
    oldest: u32,
    /// Places from the oldest ghost on, holes included.
    span: u32,
    len: u32,
}

impl<'a> Ghosts<'a> {
    pub(crate) fn new(storage: &'a mut GhostStorage) -> Self {
        storage.0.fill((HOLE, Mark::NEW));
        Self { ring: &mut storage.0, oldest: 0, span: 0, len: 0 }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Places from the oldest ghost to the youngest, holes included.
    pub(crate) fn span(&self) -> u32 {
        self.span
    }

    /// Whether a new ghost needs the place of the oldest.
    pub(crate) fn is_full(&self) -> bool {
        self.span as usize == self.ring.len()
    }

    /// The block at a place.
    pub(crate) fn block(&self, place: u32) -> BlockAddr {
        self.ring[place as usize].0
    }

    /// The owner of the ghost at a place refers to it from elsewhere from now on.
    pub(crate) fn set_block(&mut self, place: u32, block: BlockAddr) {
        debug_assert_ne!(self.block(place), HOLE);
        self.ring[place as usize].0 = block;
    }

    /// A new ghost; returns its place.
    ///
    /// # Panics
    ///
    /// If the ring is full.
    pub(crate) fn push(&mut self, block: BlockAddr, mark: Mark) -> u32 {
        assert!(!self.is_full(), "a ghost needs a place");
        let place = self.after(self.oldest, self.span);
        self.ring[place as usize] = (block, mark);
        self.span += 1;
        self.len += 1;
        place
    }

    /// The ghost at a place ends; returns its mark.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub(crate) fn remove(&mut self, place: u32) -> Mark {
        let (block, mark) = self.ring[place as usize];
        self.ring[place as usize].0 = HOLE;
        assert_ne!(block, HOLE, "no ghost at {place}");
        self.len -= 1;
        while self.span > 0 && self.block(self.oldest) == HOLE {
            self.oldest = self.after(self.oldest, 1);
            self.span -= 1;
        }
        mark
    }

    /// The oldest ghost ends.
    pub(crate) fn pop(&mut self) -> Option<(BlockAddr, Mark)> {
        (self.len > 0).then(|| {
            let block = self.block(self.oldest);
            (block, self.remove(self.oldest))
        })
    }

    /// The blocks, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = BlockAddr> + '_ {
        let all = (0..self.span).map(|step| self.block(self.after(self.oldest, step)));
        all.filter(|block| *block != HOLE)
    }

    /// What is at a place of the ring, and the place after it; `None` inside: a hole. A place that
    /// is out of use, or none, stands for the oldest. `None`: it is behind the youngest, and the
    /// ring is not full.
    pub(crate) fn look(&self, place: Option<u32>) -> Option<(u32, Option<(BlockAddr, Mark)>)> {
        let places = self.ring.len() as u32;
        let place = place.unwrap_or(self.oldest);
        let steps = if place < self.oldest { place + places } else { place } - self.oldest;
        if steps == self.span {
            return None;
        }
        let place = if steps < self.span { place } else { self.oldest };
        let (block, mark) = self.ring[place as usize];
        Some((self.after(place, 1), (block != HOLE).then_some((block, mark))))
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
    use crate::random::Random;

    #[test]
    fn a_ring_behaves_as_a_queue_from_whose_middle_is_taken() {
        let mut storage = GhostStorage::with_places(16);
        let mut ghosts = Ghosts::new(&mut storage);
        // Place and block.
        let mut model: VecDeque<(u32, BlockAddr)> = VecDeque::new();
        let mut random = Random(1);
        let mut below = |n| random.index(n);
        let mut fullest = 0;
        for step in 0..20_000 {
            match below(5) {
                0 | 1 => {
                    if ghosts.is_full() || ghosts.len() == 8 {
                        let popped = ghosts.pop().map(|(block, _)| block);
                        assert_eq!(popped, model.pop_front().map(|(_, block)| block));
                    }
                    let block = BlockAddr(step);
                    model.push_back((ghosts.push(block, Mark::NEW), block));
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
                    let popped = ghosts.pop().map(|(block, _)| block);
                    assert_eq!(popped, model.pop_front().map(|(_, block)| block));
                }
                _ => {}
            }
            fullest = fullest.max(ghosts.span);
            assert_eq!(ghosts.len() as usize, model.len());
            assert!(ghosts.iter().eq(model.iter().map(|(_, block)| *block)));
            let mut place = None;
            let looks = core::iter::from_fn(|| {
                let (next, ghost) = ghosts.look(place)?;
                place = Some(next);
                Some(ghost.map(|(block, _)| block))
            });
            // Round a full ring the end is where it began.
            let looks = looks.take(ghosts.span as usize).flatten();
            assert!(looks.eq(model.iter().map(|(_, block)| *block)));
            assert!(model.iter().all(|(place, block)| ghosts.block(*place) == *block));
        }
        assert_eq!(fullest, 16, "the ring was full at times");
    }

    #[test]
    #[should_panic(expected = "no ghost")]
    fn a_ghost_ends_once() {
        let mut storage = GhostStorage::with_places(2);
        let mut ghosts = Ghosts::new(&mut storage);
        ghosts.push(BlockAddr(1), Mark::NEW);
        let place = ghosts.push(BlockAddr(2), Mark::NEW);
        ghosts.remove(place);
        ghosts.remove(place);
    }
}
