//! Where the blocks of a story are: in onodes, leaves and buffers.

use heeler_core::buffer::{BlockAddr, BufferId, Buffers};
use heeler_core::ids::VolumeId;
use heeler_core::limits::{LEAF_BLOCKS, ONODE_LEAVES};
use heeler_core::onode::{NIL, Onodes};

/// Objects of the story, and the blocks of each that it uses.
pub(crate) const OBJECTS: usize = 4;
/// See [`OBJECTS`].
pub(crate) const OBJECT_BLOCKS: usize = LEAVES.len() * LEAF_BLOCKS;
/// All blocks, object by object.
pub(crate) const BLOCKS: usize = OBJECTS * OBJECT_BLOCKS;
/// Which leaves of an object its blocks are in: two that follow each other, and the last.
pub(crate) const LEAVES: [usize; 3] = [0, 1, ONODE_LEAVES - 1];

pub(crate) fn volume_and_object(object: usize) -> (VolumeId, u32) {
    (VolumeId((object / 2) as u32), (object % 2) as u32)
}

/// The number of a block in its object.
pub(crate) fn number(block: usize) -> u16 {
    let within = block % OBJECT_BLOCKS;
    (LEAVES[within / LEAF_BLOCKS] * LEAF_BLOCKS + within % LEAF_BLOCKS) as u16
}

pub(crate) fn addr(leaf: u32, index: usize) -> BlockAddr {
    BlockAddr(leaf * LEAF_BLOCKS as u32 + index as u32)
}

/// The block that an address means, by what leaf and onode say.
pub(crate) fn block_at(onodes: &Onodes<'_>, at: BlockAddr) -> usize {
    let leaf = onodes.leaf(at.0 / LEAF_BLOCKS as u32);
    assert_ne!(leaf.onode, NIL, "{at:?} is in a free leaf");
    let onode = onodes.get(leaf.onode);
    let object = onode.volume.0 as usize * 2 + onode.object as usize;
    let place = LEAVES.iter().position(|leaves| *leaves == usize::from(leaf.position));
    let place = place.expect("a leaf that the story uses");
    object * OBJECT_BLOCKS + place * LEAF_BLOCKS + at.0 as usize % LEAF_BLOCKS
}

/// The buffer or ghost of each block, as the onodes say. The buffers must say the same.
pub(crate) fn references(onodes: &Onodes<'_>, buffers: &Buffers<'_>) -> Vec<Option<BufferId>> {
    let mut found = vec![None; BLOCKS];
    let mut leaves = 0;
    for onode in onodes.iter() {
        for (position, leaf) in onodes.get(onode).leaves.iter().copied().enumerate() {
            if leaf == NIL {
                continue;
            }
            leaves += 1;
            let slot = onodes.leaf(leaf);
            assert_eq!((slot.onode, usize::from(slot.position)), (onode, position));
            let ids = (0..LEAF_BLOCKS).map(|index| (index, onodes.ram(leaf, index)));
            for (index, id) in ids.filter(|(_, id)| id.is_some()) {
                assert_eq!(buffers.block(id), addr(leaf, index), "what {id:?} is for");
                assert!(!buffers.is_detached(id), "{id:?} is detached");
                found[block_at(onodes, addr(leaf, index))] = Some(id);
            }
        }
    }
    assert_eq!(onodes.used(), (onodes.iter().count() as u32, leaves), "onodes, leaves");
    found
}
