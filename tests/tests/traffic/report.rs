//! Replays a recording and says what it cost.

use std::collections::BTreeSet;
use std::fmt;

use heeler_core::time::{Duration, Instant};

use crate::machine::{Machine, Missed, Setup, empty_volume};
use crate::store::{Counts, Store};
use crate::trace::Recorded;

pub(crate) const BLOCK: u64 = 4096;
const OBJECT: u64 = 4 << 20;
/// An import's server.
const IMPORTER: Setup = Setup { shards: 2, device_bytes: 1 << 30, ram_bytes: 64 << 20 };

/// What the store held before the recording began.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Image {
    /// All of the objects that it touches: a disk that is full.
    Objects,
    /// The blocks that it touches and no others: there is little live data, so garbage weighs most.
    Blocks,
}

impl Image {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Objects => "whole objects",
            Self::Blocks => "blocks",
        }
    }

    /// Writes it, as an import does.
    pub(crate) fn store(self, requests: &[Recorded]) -> Store {
        let end = requests.iter().map(Recorded::end).max();
        let end = end.expect("a recording has requests").next_multiple_of(OBJECT);
        let unit = if self == Self::Objects { OBJECT } else { BLOCK };
        let units: BTreeSet<u64> = requests
            .iter()
            .flat_map(|request| request.offset / unit..request.end().div_ceil(unit))
            .collect();
        let mut machine = Machine::start(IMPORTER, empty_volume(end), 1);
        let mut units = units.into_iter().peekable();
        while let Some(first) = units.next() {
            let mut last = first;
            while (last + 1 - first) * unit < OBJECT && units.next_if_eq(&(last + 1)).is_some() {
                last += 1;
            }
            machine.ask(first * unit, (last + 1 - first) * unit, true);
            machine.answer_all();
        }
        let mut store = machine.release();
        store.reset();
        store
    }
}

/// What a recording cost. All in bytes, but for the counts of requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) read: u64,
    pub(crate) written: u64,
    missed: Missed,
    pub(crate) counts: Counts,
    store_before: u64,
    pub(crate) store_peak: u64,
    store_after: u64,
}

impl Cost {
    /// Replays requests at their times, and pushes what is dirty at the end.
    pub(crate) fn of(requests: &[Recorded], setup: Setup, store: Store) -> Self {
        let mut machine = Machine::start(setup, store, 2);
        machine.store.reset();
        let (begin, store_before) = (machine.now, machine.store.bytes());
        for request in requests {
            machine.run_until(begin + Duration(request.at.0));
            machine.ask(request.offset, request.len, request.write);
        }
        machine.answer_all();
        machine.push();
        let rest: Instant = machine.now + Duration::from_secs(60);
        machine.run_until(rest);
        let sum = |write: bool| {
            let some = requests.iter().filter(|request| request.write == write);
            some.map(|request| request.len).sum()
        };
        Self {
            read: sum(false),
            written: sum(true),
            missed: machine.missed,
            counts: machine.store.counts,
            store_before,
            store_peak: machine.store.bytes_peak,
            store_after: machine.store.bytes(),
        }
    }

    /// What clients read and the cache had not, or only because it had read ahead.
    pub(crate) fn needed(&self) -> u64 {
        (self.missed.reads + self.missed.ahead_used) * BLOCK
    }

    pub(crate) fn get_ratio(&self) -> f64 {
        self.counts.gets().bytes as f64 / self.needed() as f64
    }

    pub(crate) fn put_ratio(&self) -> f64 {
        self.counts.puts().bytes as f64 / self.written as f64
    }
}

/// Heading of the lines that costs are written as.
pub(crate) const HEADING: &str = "\
| trace, image | read | missed | of it read ahead | edges | got | / missed | gets | of it for GC \
| written | put | / written | puts | store before, most, after |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|";

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let (gets, puts) = (self.counts.gets(), self.counts.puts());
        write!(f, "{:.0} | {:.0} |", mb(self.read), mb(self.needed()))?;
        write!(f, " {:.0} |", mb(self.missed.ahead_used * BLOCK))?;
        write!(f, " {:.0} | {:.0} |", mb(self.missed.edges * BLOCK), mb(gets.bytes))?;
        write!(f, " **{:.2}** | {} |", self.get_ratio(), gets.requests)?;
        write!(f, " {:.0} MB |", mb(self.counts.copy_gets.bytes))?;
        write!(f, " {:.0} | {:.0} |", mb(self.written), mb(puts.bytes))?;
        write!(f, " **{:.2}** | {} |", self.put_ratio(), puts.requests)?;
        let [before, most, after] = [self.store_before, self.store_peak, self.store_after].map(mb);
        write!(f, " {before:.0}, {most:.0}, {after:.0} |")
    }
}
