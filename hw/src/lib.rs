//! What heeler needs of the machine: an arena of DMA pages, block queues, CRC32C, processors and
//! memory limits, and the simulated twin of what can fail.
//!
//! The real parts ([`uring`], [`mod@file`]) and the simulated ones ([`sim`]) stand behind the same
//! traits ([`queue`]) and pass the same conformance suite, so that what runs in a simulation is the
//! very code that runs on a device.
#![deny(unsafe_code, missing_docs)]

#[allow(unsafe_code)]
pub mod arena;
pub mod crc;
pub mod file;
pub mod queue;
pub mod sim;
#[allow(unsafe_code)]
pub mod topology;
#[allow(unsafe_code)]
pub mod uring;

pub use arena::Arena;
pub use crc::crc32c;
pub use file::{AlignedBuf, BackingFile, FileError};
pub use queue::{
    BlockFile, BlockQueue, Completion, Full, Io, IoError, IoErrorKind, IoKind, PAGE_BYTES,
};
pub use uring::UringQueue;
