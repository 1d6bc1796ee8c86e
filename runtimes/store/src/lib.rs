//! The object store behind heeler: a client with explicit limits, the administration of volumes
//! in the store, and the offline check.
//!
//! Everything here runs on the control thread (or in a command of its own), never on a data core.
//! [`Store`] is the client; [`volumes`] creates, lists and deletes volumes, [`snapshots`] does so
//! with snapshots and clones; [`lineage`] says whose volumes were; [`image`] where the
//! blocks of a head lie, and how two heads differ; [`check`] reads a volume's image
//! from its head down to the blocks; [`mod@format`] marks what a prefix is for; [`fault`] makes a
//! store misbehave, for tests.
#![deny(unsafe_code, missing_docs)]

mod backend;
pub mod check;
mod config;
mod error;
mod explain;
pub mod fault;
pub mod format;
pub mod image;
pub mod lineage;
mod probe;
pub mod snapshots;
mod store;
#[cfg(test)]
mod testing;
pub mod volumes;

pub use backend::{Backend, Entry};
pub use config::{ConfigError, Place, S3Options, Secret, StoreConfig};
pub use error::{ErrorKind, StoreError, Unusable};
pub use object_store::PutPayload;
pub use probe::Fencing;
pub use store::{Counters, Store, Trouble};
