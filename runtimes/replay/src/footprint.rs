//! The blocks of a trace, numbered densely in the order in which they are first touched.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use heeler_core::limits::{LEAF_BLOCKS, ONODE_LEAVES};

/// Different blocks of a trace at most (1 TiB): what the tables of one cache can number.
const BLOCKS_MAX: u32 = 1 << 28;
const NONE: u32 = u32::MAX;

/// Numbers of the blocks that were touched, kept by leaves of 16 neighbours.
#[derive(Debug, Default)]
pub(crate) struct Footprint {
    leaf_of: HashMap<(u32, u64), u32>,
    leaves: Vec<[u32; LEAF_BLOCKS]>,
    objects: HashSet<(u32, u64)>,
    blocks: u32,
}

impl Footprint {
    /// The number of a block, a new one if it was never touched before. `None` if there are none
    /// left.
    pub(crate) fn number(&mut self, volume: u32, block: u64) -> Option<u32> {
        let leaf = block / LEAF_BLOCKS as u64;
        let index = match self.leaf_of.entry((volume, leaf)) {
            Entry::Occupied(entry) => *entry.get(),
            Entry::Vacant(entry) => {
                self.objects.insert((volume, leaf / ONODE_LEAVES as u64));
                self.leaves.push([NONE; LEAF_BLOCKS]);
                *entry.insert(self.leaves.len() as u32 - 1)
            }
        };
        let number = &mut self.leaves[index as usize][(block % LEAF_BLOCKS as u64) as usize];
        if *number == NONE {
            if self.blocks == BLOCKS_MAX {
                return None;
            }
            *number = self.blocks;
            self.blocks += 1;
        }
        Some(*number)
    }

    /// Different blocks so far.
    pub(crate) fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Different leaves (64 KiB) so far.
    pub(crate) fn leaves(&self) -> usize {
        self.leaves.len()
    }

    /// Different objects (4 MiB) so far.
    pub(crate) fn objects(&self) -> usize {
        self.objects.len()
    }

    /// Different volumes so far.
    pub(crate) fn volumes(&self) -> usize {
        self.objects.iter().map(|(volume, _)| volume).collect::<HashSet<_>>().len()
    }
}
