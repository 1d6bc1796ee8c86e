//! Pure codecs: bytes to values and back. No decoder panics on any input.

pub mod frame;
pub mod head;
pub mod map_page;
pub mod names;
pub mod nbd;
pub mod pack;
