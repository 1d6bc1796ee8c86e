//! Every bound of the core, in one place, with the relations between them checked at compile time.

use crate::ids::BLOCK_BYTES;

/// Blocks of one leaf of an onode (64 KiB).
pub const LEAF_BLOCKS: usize = 16;
/// Leaves of one onode: the largest object has 4 MiB.
pub const ONODE_LEAVES: usize = 64;
/// Blocks of the largest object.
pub const OBJECT_BLOCKS_MAX: usize = LEAF_BLOCKS * ONODE_LEAVES;
/// log2 of the largest object, in bytes.
pub const OBJECT_SHIFT_MAX: u32 = 22;
/// log2 of the smallest object, in bytes.
pub const OBJECT_SHIFT_MIN: u32 = 16;
/// Blocks that one request to a shard covers at most (128 KiB). A front end cuts what clients ask
/// for at multiples of this, so every call into a shard does bounded work.
pub const REQUEST_BLOCKS_MAX: usize = 32;
/// Blocks that one log record, one pull or one batch of a push carries at most (1 MiB).
pub const BATCH_BLOCKS_MAX: usize = 256;
/// Pages that one device operation names at most: a record's header and its blocks.
pub const OP_PAGES_MAX: usize = BATCH_BLOCKS_MAX + 1;
/// Blocks of one pack in the store at most (8 MiB).
pub const PACK_BLOCKS_MAX: usize = 2048;
/// Runs of blocks in one pack at most, runs of zeroes included.
pub const PACK_RUNS_MAX: usize = 4096;
/// Blocks that one map page of the store describes (64 MiB).
pub const MAP_PAGE_BLOCKS: usize = 16384;
/// Pages that a shard gives back at a time at most.
pub const PAGES_BACK_MAX: usize = 64;
/// Shards of a cache at most.
pub const SHARDS_MAX: usize = 64;
/// Volumes that one cache knows at most (rows of its volume table).
pub const VOLUMES_MAX: usize = 63;
/// Bytes of the longest NBD request.
pub const NBD_REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Bytes of the name of a volume or a snapshot at most.
pub const NAME_BYTES_MAX: usize = 63;
/// Bytes of an export's name at most: a volume's, or a snapshot's behind its volume's and an `@`.
pub const EXPORT_NAME_BYTES_MAX: usize = 2 * NAME_BYTES_MAX + 1;

const _: () = assert!(OBJECT_BLOCKS_MAX * BLOCK_BYTES == 1 << OBJECT_SHIFT_MAX);
const _: () = assert!(OBJECT_BLOCKS_MAX.is_multiple_of(REQUEST_BLOCKS_MAX));
const _: () = assert!(REQUEST_BLOCKS_MAX.is_multiple_of(LEAF_BLOCKS));
const _: () = assert!((1usize << OBJECT_SHIFT_MIN) >= LEAF_BLOCKS * BLOCK_BYTES);
const _: () = assert!(MAP_PAGE_BLOCKS.is_multiple_of(OBJECT_BLOCKS_MAX));
const _: () = assert!(PACK_BLOCKS_MAX.is_multiple_of(BATCH_BLOCKS_MAX));
