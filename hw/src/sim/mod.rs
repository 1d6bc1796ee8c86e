//! The simulated twin of what can fail: a disk with faults and crashes, and the randomness that
//! drives it. Deterministic: one seed, one run.

pub mod disk;
pub mod rng;

pub use disk::{Counts, CrashKind, SimDisk, SimQueue};
pub use rng::Rng;
