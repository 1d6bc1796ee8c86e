//! Times of one subject on one workload.

use std::hint::black_box;

use rustix::time::{ClockId, clock_gettime};

use crate::allocator;
use crate::subject::{Run, Subject};
use crate::workload::Kind;

/// What one pass over a workload took.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Of this thread, in nanoseconds per access.
    pub cpu: f64,
    /// Nanoseconds per access.
    pub wall: f64,
    /// Of all timed accesses.
    pub hit_percent: f64,
    pub allocations: f64,
    /// Bytes on the heap after warming up.
    pub heap: u64,
}

fn nanoseconds(clock: ClockId) -> f64 {
    let now = clock_gettime(clock);
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}

/// Runs all keys; the first third warms up and is not measured.
pub fn sample(subject: &Subject, kind: Kind, keys: &[u32]) -> Sample {
    let (warm, keys) = keys.split_at(keys.len() / 3);
    let bytes_before = allocator::bytes();
    let mut sample = None;
    (subject.lend)(kind.room(), &mut |cache| {
        cache.run(warm);
        let heap = allocator::bytes() - bytes_before;
        let allocations = allocator::allocations();
        let (wall, cpu) = (nanoseconds(ClockId::Monotonic), nanoseconds(ClockId::ThreadCPUTime));
        let hits = timed(cache, keys);
        let (wall, cpu) =
            (nanoseconds(ClockId::Monotonic) - wall, nanoseconds(ClockId::ThreadCPUTime) - cpu);
        let accesses = keys.len() as f64;
        sample = Some(Sample {
            cpu: cpu / accesses,
            wall: wall / accesses,
            hit_percent: hits as f64 * 100.0 / accesses,
            allocations: (allocator::allocations() - allocations) as f64 / accesses,
            heap,
        });
    });
    sample.expect("a cache was lent")
}

/// A function of its own, by whose name valgrind knows what to count.
#[inline(never)]
fn timed(cache: &mut dyn Run, keys: &[u32]) -> u64 {
    black_box(cache.run(black_box(keys)))
}
