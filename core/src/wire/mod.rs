//! Pure codecs: bytes to values and back. No decoder panics on any input.

pub(crate) mod bytes;
pub mod delta;
pub mod frame;
pub mod head;
pub mod heat;
pub mod log;
pub mod map_page;
pub mod names;
pub mod nbd;
pub mod pack;
pub mod superblock;
