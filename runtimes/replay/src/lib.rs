//! Replaying recorded traces: how much of what real systems did would have been in RAM.
//!
//! [`Records`] reads a recording, [`Trace`] is what it touched, [`Run`] puts that through the
//! server's own cache, and [`Belady`] says what the best possible cache would have had. Time does
//! not count: what is replayed is the order.
#![deny(unsafe_code, missing_docs)]

mod belady;
mod btr;
mod csv;
mod footprint;
mod records;
mod run;
mod size;
mod trace;

pub use belady::Belady;
pub use records::{ReadError, Record, Records};
pub use run::Run;
pub use size::{CacheSize, SizeError};
pub use trace::{Hits, Trace};
