//! The server's cache against numbers that others have computed: hits to the last one, for every
//! policy that has a definition, and for Belady's MIN.
//!
//! `tests/traces` holds a few recordings and their numbers. `HEELER_TRACES` may name a folder with
//! more: recordings `NAME.btr.zst` and a `reference.csv` like the one here. The numbers say what
//! they are by these names: `lru`, `2q` (full, A1in 25 %, ghosts 50 %), `ceph2q` (ours:
//! `2q-bluestore`), `s3fifo` (small queue 10 %) and `opt` (MIN).
#![cfg(not(loom))]

mod naive;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use heeler_core::policy::Policy;
use heeler_hw::sim::Rng;
use heeler_replay::{Belady, CacheSize, Hits, ReadError, Record, Records, Run, Trace};

use crate::naive::{Naive, Touch};

/// The policies by the names of the reference.
const POLICIES: &[(&str, Policy)] = &[
    ("lru", Policy::Lru),
    ("2q", Policy::TwoQ),
    ("ceph2q", Policy::TwoQBluestore),
    ("s3fifo", Policy::S3Fifo),
];

/// Whose numbers count: those of another simulator differ in the rules.
const SOURCE: &str = "own";

/// The recordings that `mix_visible` is made of, in this order: several volumes in one cache.
const MIX: &[&str] = &["cloudphysics_vm", "hplajw_week", "diskmon_sys1", "arc_p3", "arc_p12"];

/// One row of the numbers.
struct Row {
    trace: String,
    fraction: String,
    pages: u32,
    policy: String,
    references: u64,
    unique_blocks: u32,
    hits: u64,
    /// As it is written: six decimal places, or nothing.
    read_hit_ratio: String,
}

impl Row {
    /// A line that is about us.
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split(',').collect();
        let [trace, fraction, pages, policy, references, unique, hits, _, reads, source] =
            fields[..]
        else {
            panic!("a row of ten fields: {line}");
        };
        let known = policy == "opt" || POLICIES.iter().any(|(name, _)| *name == policy);
        (known && source == SOURCE).then(|| Self {
            trace: trace.into(),
            fraction: fraction.into(),
            pages: pages.parse().expect("pages"),
            policy: policy.into(),
            references: references.parse().expect("references"),
            unique_blocks: unique.parse().expect("blocks"),
            hits: hits.parse().expect("hits"),
            read_hit_ratio: reads.into(),
        })
    }

    /// The same size as a user gives it.
    fn size(&self) -> CacheSize {
        let fractions =
            [("0.001", "0.1"), ("0.01", "1"), ("0.05", "5"), ("0.1", "10"), ("0.2", "20")];
        let (_, percent) = fractions
            .into_iter()
            .find(|(fraction, _)| *fraction == self.fraction)
            .unwrap_or_else(|| panic!("the size {} is known", self.fraction));
        CacheSize::percent(percent).expect("a size")
    }
}

fn rows(folder: &Path) -> BTreeMap<String, Vec<Row>> {
    let path = folder.join("reference.csv");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    let mut rows: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for row in text.lines().skip(1).filter_map(Row::parse) {
        rows.entry(row.trace.clone()).or_default().push(row);
    }
    rows
}

fn records(folder: &Path, name: &str) -> Vec<Record> {
    let path = folder.join(name).with_extension("btr.zst");
    let file = File::open(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    let records = Records::new(&path.to_string_lossy(), file).expect("a recording");
    records.collect::<Result<_, _>>().unwrap_or_else(|e| panic!("{path:?}: {e}"))
}

/// Requests of several recordings, interleaved so that all begin and end together: request `k` of
/// `n` is at time `(k + 0.5) / n`.
fn mixed(folder: &Path) -> Vec<Record> {
    let mut timed = Vec::new();
    let mut volumes = 0;
    for name in MIX {
        let records = records(folder, name);
        for (k, record) in records.iter().enumerate() {
            let time = (k as f64 + 0.5) / records.len() as f64;
            timed.push((time, Record { volume: volumes + record.volume, ..*record }));
        }
        volumes += records.iter().map(|record| record.volume + 1).max().expect("a volume");
    }
    timed.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    timed.into_iter().map(|(_, record)| record).collect()
}

fn trace(records: &[Record]) -> Trace {
    Trace::new(records.iter().map(|record| Ok::<_, ReadError>(*record))).expect("a trace")
}

fn replay(trace: &Trace, pages: u32, policy: Policy) -> Hits {
    let mut storage = Run::storage(trace, pages);
    let mut run = Run::new(&mut storage, pages, policy);
    assert_eq!(run.feed(trace.accesses()), trace.references());
    run.hits()
}

/// Compares all rows of a recording; returns how many.
fn compare(trace: &Trace, rows: &[Row]) -> usize {
    let belady = Belady::new(trace);
    for row in rows {
        let what = format!("{} at {} by {}", row.trace, row.fraction, row.policy);
        assert_eq!(trace.references(), row.references, "references of {what}");
        assert_eq!(trace.unique_blocks(), row.unique_blocks, "blocks of {what}");
        assert_eq!(row.size().pages(trace.unique_blocks()), row.pages, "pages of {what}");
        let hits = match POLICIES.iter().find(|(name, _)| *name == row.policy) {
            Some((_, policy)) => replay(trace, row.pages, *policy),
            None => belady.hits(row.pages),
        };
        assert_eq!(hits.all, row.hits, "hits of {what}");
        if !row.read_hit_ratio.is_empty() {
            let ratio = hits.reads as f64 / trace.read_references() as f64;
            assert_eq!(format!("{ratio:.6}"), row.read_hit_ratio, "hits of reads of {what}");
        }
    }
    rows.len()
}

fn compare_all(folder: &Path) -> usize {
    let mut compared = 0;
    for (name, rows) in rows(folder) {
        let records = if name == "mix_visible" { mixed(folder) } else { records(folder, &name) };
        let rows = compare(&trace(&records), &rows);
        println!("{name}: {rows} rows agree");
        compared += rows;
    }
    compared
}

#[test]
fn every_policy_has_the_reference_s_hits() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("traces");
    assert_eq!(compare_all(&folder), 100, "four recordings, five sizes, five policies");
}

/// Takes about a minute, and needs the recordings.
#[test]
fn every_policy_has_the_reference_s_hits_on_other_recordings() {
    let Some(folder) = std::env::var_os("HEELER_TRACES").map(PathBuf::from) else {
        println!("skipped: HEELER_TRACES names no folder of recordings");
        return;
    };
    let compared = compare_all(&folder);
    assert!(compared > 0, "{folder:?} has numbers to compare with");
    println!("{compared} rows agree");
}

/// Requests of several volumes, reads and writes, of all lengths and alignments: a hot part, runs
/// that come again, and scans.
fn generated(seed: u64) -> Vec<Record> {
    let mut rng = Rng::new(seed);
    let mut scan = 0;
    let mut record = |rng: &mut Rng| {
        let volume = rng.below(3) as u32;
        let write = rng.below(3) == 0;
        let length = 1 + rng.below(40_000);
        let offset = match rng.below(10) {
            0..=4 => rng.below(1 << 20),
            5..=7 => rng.below(16) << 22 | rng.below(1 << 18),
            8 => ((1 + rng.below(16)) << 22) - rng.below(length).max(1),
            _ => {
                scan += length;
                (1 << 30) + scan
            }
        };
        Record { volume, offset, length, write }
    };
    (0..3000).map(|_| record(&mut rng)).collect()
}

fn naive(records: &[Record], pages: u32, touch: Touch) -> Hits {
    let mut cache = Naive::new(pages);
    let mut hits = Hits::default();
    for record in records {
        for block in record.offset / 4096..=(record.offset + record.length - 1) / 4096 {
            if touch(&mut cache, u64::from(record.volume) << 48 | block, record.write) {
                hits.all += 1;
                hits.reads += u64::from(!record.write);
            }
        }
    }
    hits
}

#[test]
fn every_policy_does_what_its_rules_say() {
    let rules: [(Policy, Touch); 4] = [
        (Policy::Lru, Naive::lru),
        (Policy::TwoQ, Naive::two_q),
        (Policy::TwoQBluestore, Naive::two_q_bluestore),
        (Policy::S3Fifo, Naive::s3_fifo),
    ];
    for seed in 0..4 {
        let records = generated(seed);
        let trace = trace(&records);
        let belady = Belady::new(&trace);
        for pages in [2, 3, 9, 10, 64, 333, 1000] {
            for (policy, touch) in rules {
                let hits = replay(&trace, pages, policy);
                let what = format!("{} in {pages} pages, seed {seed}", policy.name());
                assert_eq!(hits, naive(&records, pages, touch), "{what}");
                assert!(hits.all <= belady.hits(pages).all, "{what}: more than the best");
            }
        }
    }
}
