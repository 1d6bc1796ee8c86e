//! The tables, in Markdown.

use std::fmt::Write as _;

use crate::instructions::Counts;
use crate::measure::Sample;
use crate::subject::{QUICK_CACHE, SCHNELLRU, Subject, bytes_per_buffer, bytes_per_nvme_block};
use crate::workload::Kind;

/// Ghosts included.
const BYTES_PER_ENTRY_MAX: f64 = 64.0;
const BYTES_PER_NVME_BLOCK_MAX: f64 = 12.0;

/// What a run found.
pub struct Results<'a> {
    pub subjects: &'a [Subject],
    pub kinds: &'a [Kind],
    /// Rounds, of each kind, of each subject.
    pub samples: Vec<Vec<Vec<Sample>>>,
    /// Without valgrind there are none.
    pub counts: Option<Counts>,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

impl Results<'_> {
    /// Of all rounds, in order.
    fn values(&self, kind: usize, subject: usize, field: impl Fn(&Sample) -> f64) -> Vec<f64> {
        self.samples.iter().map(|round| field(&round[kind][subject])).collect()
    }

    fn median(&self, kind: usize, subject: usize, field: impl Fn(&Sample) -> f64) -> f64 {
        median(self.values(kind, subject, field))
    }

    fn subject(&self, name: &str) -> Option<usize> {
        self.subjects.iter().position(|subject| subject.name == name)
    }

    /// Bytes on the heap for each entry of the cache.
    fn bytes_per_entry(&self, kind: usize, subject: usize) -> f64 {
        self.median(kind, subject, |sample| sample.heap as f64)
            / self.kinds[kind].room().entries as f64
    }

    /// All tables.
    pub fn text(&self) -> String {
        let mut text = String::new();
        self.overview(&mut text);
        self.aims(&mut text);
        self.instructions(&mut text);
        self.details(&mut text);
        text
    }

    fn overview(&self, text: &mut String) {
        let mut head = vec!["ns per access, hit %".into()];
        head.extend(self.kinds.iter().map(|kind| kind.name().into()));
        let last = ["allocations", "bytes per entry", "on the heap"];
        head.extend(last.map(String::from));
        let rows = (0..self.subjects.len()).map(|subject| self.overview_row(subject));
        table(text, &head, rows);
    }

    fn overview_row(&self, subject: usize) -> Vec<String> {
        let mut row = vec![self.subjects[subject].name.clone()];
        for kind in 0..self.kinds.len() {
            let nanoseconds = self.median(kind, subject, |sample| sample.cpu);
            let hits = self.median(kind, subject, |sample| sample.hit_percent);
            row.push(format!("{nanoseconds:.1}, {hits:.2}"));
        }
        let allocations = (0..self.kinds.len())
            .map(|kind| self.median(kind, subject, |sample| sample.allocations))
            .fold(0.0, f64::max);
        row.push(format!("{allocations:.3}"));
        let large = self.kinds.iter().position(|kind| *kind == Kind::Zipf10);
        let heap = large.map(|kind| self.bytes_per_entry(kind, subject));
        let entry = self.subjects[subject].ours.map(bytes_per_buffer).or(heap);
        let bytes = |bytes: Option<f64>| bytes.map_or("-".into(), |bytes| format!("{bytes:.1}"));
        row.extend([bytes(entry), bytes(heap)]);
        row
    }

    /// heeler's first policy, the default, beside its bounds.
    fn aims(&self, text: &mut String) {
        let (Some(quick), Some(schnellru)) = (self.subject(QUICK_CACHE), self.subject(SCHNELLRU))
        else {
            return;
        };
        let Some(policy) = self.subjects[0].ours else { return };
        let mut rows = Vec::new();
        let mut aim = |what: &str, least: bool, bound: f64, ours: f64| {
            let met = if least { ours >= bound } else { ours <= bound };
            rows.push(vec![
                what.into(),
                format!("at {} {bound:.2}", if least { "least" } else { "most" }),
                format!("{ours:.2}"),
                if met { "met" } else { "**missed**" }.into(),
            ]);
        };
        let (cpu, hits) = (|sample: &Sample| sample.cpu, |sample: &Sample| sample.hit_percent);
        for (index, kind) in self.kinds.iter().enumerate() {
            let name = kind.name();
            let (who, bound) = match kind {
                Kind::Resident | Kind::Spread => (QUICK_CACHE, quick),
                Kind::Zipf10 | Kind::Zipf1 | Kind::Scan => (SCHNELLRU, schnellru),
            };
            let what = format!("{name}: ns, no more than {who}'s");
            aim(&what, false, self.median(index, bound, cpu), self.median(index, 0, cpu));
            if bound == schnellru {
                let what = format!("{name}: hit %, no less than {QUICK_CACHE}'s");
                aim(&what, true, self.median(index, quick, hits), self.median(index, 0, hits));
            }
            let allocations = self.median(index, 0, |sample| sample.allocations);
            aim(&format!("{name}: allocations"), false, 0.0, allocations);
        }
        let bytes = bytes_per_buffer(policy);
        aim("bytes per entry, ghosts included", false, BYTES_PER_ENTRY_MAX, bytes);
        let bytes = bytes_per_nvme_block();
        aim("bytes of RAM per block on NVMe", false, BYTES_PER_NVME_BLOCK_MAX, bytes);
        let _ = writeln!(text, "\n## Aims, for {}\n", self.subjects[0].name);
        table(text, &["aim", "bound", "heeler", ""].map(String::from), rows.into_iter());
    }

    fn instructions(&self, text: &mut String) {
        let Some(counts) = &self.counts else { return };
        let kinds: Vec<&str> = self
            .kinds
            .iter()
            .map(|kind| kind.name())
            .filter(|kind| counts.keys().any(|(of, _)| of == kind))
            .collect();
        let _ = writeln!(text, "\n## Instructions per access, counted by valgrind\n");
        let mut head = vec![String::new()];
        head.extend(kinds.iter().map(|kind| (*kind).into()));
        let rows = (0..self.subjects.len()).filter_map(|subject| {
            let name = &self.subjects[subject].name;
            let count = |kind: &&'static str| counts.get(&(*kind, name.clone()));
            kinds.iter().any(|kind| count(kind).is_some()).then(|| {
                let cells = kinds
                    .iter()
                    .map(|kind| count(kind).map_or("-".into(), |count| format!("{count:.1}")));
                std::iter::once(name.clone()).chain(cells).collect()
            })
        });
        table(text, &head, rows);
    }

    fn details(&self, text: &mut String) {
        for (kind, of) in self.kinds.iter().enumerate() {
            let _ = writeln!(text, "\n## {}\n", of.name());
            let head = ["", "CPU ns", "min-max", "wall ns", "hit %", "allocations"];
            let rows = (0..self.subjects.len()).map(|subject| {
                let mut cpu = self.values(kind, subject, |sample| sample.cpu);
                cpu.sort_by(f64::total_cmp);
                vec![
                    self.subjects[subject].name.clone(),
                    format!("{:.1}", median(cpu.clone())),
                    format!("{:.1}-{:.1}", cpu[0], cpu[cpu.len() - 1]),
                    format!("{:.1}", self.median(kind, subject, |sample| sample.wall)),
                    format!("{:.2}", self.median(kind, subject, |sample| sample.hit_percent)),
                    format!("{:.3}", self.median(kind, subject, |sample| sample.allocations)),
                ]
            });
            table(text, &head.map(String::from), rows);
        }
    }
}

/// A table whose columns, but for the first, are numbers.
fn table(text: &mut String, head: &[String], rows: impl Iterator<Item = Vec<String>>) {
    let _ = writeln!(text, "| {} |", head.join(" | "));
    let _ = writeln!(text, "|---{}|", "|---:".repeat(head.len() - 1));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
}

/// What stands above the tables in their file.
pub fn head(rounds: u32) -> String {
    format!(
        "\
# Costs of one access

Written by `make bench-core`. One thread, one run, medians of {rounds} rounds; in each round every
cache runs every workload once. Nanoseconds are the thread's CPU time. 12 M accesses, of which the
first third warms up and is not counted: look a key up, insert it if it is not there. Peers map u64
to u64, by their own `get` and `insert` and with their own hashes. heeler goes through its block
path: key k is block k % 1024 of object k / 1024, and an access finds the onode, the leaf and the
buffer as a request of a client does.

* `resident`: 4,096 keys that all fit, side by side, in random order
* `spread`: the same with each key in an object of its own
* `zipf10`: Zipf 0.99 over 1 M keys, shuffled, with 100,000 entries
* `zipf1`: zipf10 with 10,000 entries
* `scan`: as zipf10, but every tenth access is the next of a sequence that never ends

Bytes per entry: of a peer, what is on the heap after warming up on zipf10, by entry of the cache.
Of heeler, the buffers' tables, the ghosts and both their places in the leaves; the rest of a leaf
says what is on NVMe, 16 blocks to a leaf. On the heap it has all that for zipf10, where shuffled
keys are its worst case: nearly every key has a leaf of its own. Allocations are per access, of the
workload that has most.
"
    )
}
