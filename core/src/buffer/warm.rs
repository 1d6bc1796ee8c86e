//! What of the table outlives the process: see `shard/heat`.

use super::{BlockAddr, BufferId, Buffers};
use crate::policy::{Hint, Mark, Reuse};

impl Buffers<'_> {
    /// What is known of the block of a buffer.
    pub(crate) fn hint(&self, id: BufferId) -> Hint {
        let life = &self.lives[id.0 as usize];
        Hint { tag: life.tag, mark: life.mark }
    }

    /// Seconds since the last use of a buffer.
    pub(crate) fn age(&self, id: BufferId) -> u16 {
        self.ages.age(self.lives[id.0 as usize].used)
    }

    /// Three ages in seconds that part the buffers into quarters.
    pub(crate) fn age_quarters(&self) -> [u16; 3] {
        self.ages.quarters()
    }

    /// What the policy has learned.
    pub(crate) fn learned(&self) -> &Reuse {
        &self.reuse
    }

    /// What the policy has learned.
    pub(crate) fn learned_mut(&mut self) -> &mut Reuse {
        &mut self.reuse
    }

    /// Places of the ring of ghosts that a walk over it looks at.
    pub(crate) fn ghost_places(&self) -> u32 {
        self.warm_out.span()
    }

    /// The ghost at a place of the ring, if there is one, and the place to look at next. Without a
    /// place: the oldest. `None`: there are no more.
    pub(crate) fn look_at_ghost(
        &self,
        place: Option<u32>,
    ) -> Option<(u32, Option<(BlockAddr, Mark)>)> {
        self.warm_out.look(place)
    }

    /// Whether there may be one ghost more.
    pub(crate) fn has_ghost_room(&self) -> bool {
        !self.warm_out.is_full() && self.warm_out.len() < self.ghosts_max
    }

    /// A ghost of a block that is not in RAM, as the youngest. There must be room.
    pub(crate) fn restore_ghost(&mut self, block: BlockAddr, mark: Mark) -> BufferId {
        BufferId::ghost(self.warm_out.push(block, mark))
    }
}
