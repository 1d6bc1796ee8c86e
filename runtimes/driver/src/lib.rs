//! What drives the core, without a runtime, a socket or a clock of its own: the loop of a data
//! core, generic over the block queue, and the loop of the control thread, generic over the store.
//!
//! The adapters move bytes between sockets and the loop's buffers, wake it and put it to sleep; the
//! simulation steps the very same loops.
#![deny(unsafe_code, missing_docs)]

pub mod adapter;
mod connection;
pub mod control;
pub mod core_loop;
mod device;
mod front;
pub mod mail;
mod post;
mod scrub;
pub mod start;
mod transit;
pub mod windows;
pub mod wires;

pub use connection::CONNECTION_BYTES_MAX;
pub use core_loop::{CoreLoop, CoreParts, HostedShard};
pub use front::{CONNECTIONS_MAX, ConnId, ConnectionBudget, OpenError};
