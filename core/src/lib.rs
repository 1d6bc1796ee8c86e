//! The core of heeler: every state machine of a write-back cache for virtual disks, without a
//! clock, a socket, a device or a thread.
#![no_std]
#![deny(unsafe_code, missing_docs)]

extern crate alloc;

pub mod ages;
pub mod block_set;
pub mod budget;
pub mod buffer;
pub mod cache;
pub mod config;
pub mod counters;
pub mod event;
mod ghosts;
pub mod ids;
pub mod keeper;
pub mod lending;
pub mod limits;
pub mod list;
pub mod mailbox;
pub mod onode;
pub mod policy;
#[cfg(test)]
mod random;
pub mod recovery;
pub mod session;
pub mod shard;
mod sync;
pub mod time;
pub mod wire;
pub mod wlog;
