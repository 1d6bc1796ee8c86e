//! What came of a replay: the document of `--json`, and what is printed and drawn.

use heeler_replay::{Hits, Trace};
use serde::Serialize;

/// What the bound is called among the policies.
pub(super) const BELADY: &str = "belady";

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) traces: Vec<TraceReport>,
    /// Over all traces, for each size; a trace on which nothing can be hit is left out.
    pub(super) mean_share_of_belady: Vec<Mean>,
}

#[derive(Debug, Serialize)]
pub(super) struct TraceReport {
    pub(super) trace: String,
    pub(super) requests: u64,
    pub(super) volumes: usize,
    /// Touches of blocks (4 KiB).
    pub(super) references: u64,
    /// Those of reads.
    pub(super) read_references: u64,
    /// Different blocks.
    pub(super) unique_blocks: u32,
    pub(super) sizes: Vec<SizeReport>,
}

#[derive(Debug, Serialize)]
pub(super) struct SizeReport {
    /// As it was asked for.
    pub(super) size: String,
    pub(super) blocks: u32,
    /// Of the different blocks of the trace.
    pub(super) share: f64,
    /// LRU first, Belady last.
    pub(super) policies: Vec<Outcome>,
}

#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    pub(super) policy: String,
    pub(super) hits: u64,
    pub(super) read_hits: u64,
    pub(super) hit_ratio: f64,
    /// None without reads.
    pub(super) read_hit_ratio: Option<f64>,
    /// None if Belady has no hit.
    pub(super) share_of_belady: Option<f64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Mean {
    pub(super) size: String,
    pub(super) policies: Vec<MeanOutcome>,
}

#[derive(Debug, Serialize)]
pub(super) struct MeanOutcome {
    pub(super) policy: String,
    pub(super) share_of_belady: Option<f64>,
}

impl Report {
    /// Of traces that were replayed by the same policies in the same sizes.
    pub(super) fn new(traces: Vec<TraceReport>) -> Self {
        let sizes = traces.first().map_or(&[][..], |trace| &trace.sizes);
        let mean_of = |at: usize, nth: usize, policy: &Outcome| MeanOutcome {
            policy: policy.policy.clone(),
            share_of_belady: mean(
                traces.iter().filter_map(|trace| trace.sizes[at].policies[nth].share_of_belady),
            ),
        };
        let means = sizes.iter().enumerate().map(|(at, size)| Mean {
            size: size.size.clone(),
            policies: size
                .policies
                .iter()
                .enumerate()
                .map(|(nth, policy)| mean_of(at, nth, policy))
                .collect(),
        });
        let mean_share_of_belady = means.collect();
        Self { traces, mean_share_of_belady }
    }
}

impl TraceReport {
    /// Before any replay.
    pub(super) fn new(name: String, trace: &Trace) -> Self {
        Self {
            trace: name,
            requests: trace.requests(),
            volumes: trace.volumes(),
            references: trace.references(),
            read_references: trace.read_references(),
            unique_blocks: trace.unique_blocks(),
            sizes: Vec::new(),
        }
    }
}

impl SizeReport {
    /// Before any replay in a cache of `blocks` pages, in which Belady has `best`.
    pub(super) fn new(size: String, blocks: u32, trace: &Trace, best: Hits) -> Self {
        let mut report = Self {
            size,
            blocks,
            share: f64::from(blocks) / f64::from(trace.unique_blocks()),
            policies: Vec::new(),
        };
        report.policies.push(outcome(BELADY, trace, best, best));
        report
    }

    /// The hits of one more policy.
    pub(super) fn add(&mut self, policy: &str, trace: &Trace, hits: Hits) {
        let best = self.belady();
        let best = Hits { all: best.hits, reads: best.read_hits };
        let last = self.policies.len() - 1;
        self.policies.insert(last, outcome(policy, trace, hits, best));
    }

    pub(super) fn lru(&self) -> &Outcome {
        &self.policies[0]
    }

    pub(super) fn belady(&self) -> &Outcome {
        self.policies.last().expect("it is there from the start")
    }
}

fn outcome(policy: &str, trace: &Trace, hits: Hits, best: Hits) -> Outcome {
    Outcome {
        policy: policy.into(),
        hits: hits.all,
        read_hits: hits.reads,
        hit_ratio: hits.all as f64 / trace.references() as f64,
        read_hit_ratio: share(hits.reads, trace.read_references()),
        share_of_belady: share(hits.all, best.all),
    }
}

fn share(part: u64, all: u64) -> Option<f64> {
    (all > 0).then(|| part as f64 / all as f64)
}

fn mean(of: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = of.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
pub(super) mod tests {
    use heeler_replay::Record;

    use super::*;

    /// Ten writes and ten reads of ten blocks, with made-up hits.
    pub(in crate::replay) fn example(name: &str, lru: u64, other: u64, best: u64) -> TraceReport {
        let records = (0..20)
            .map(|n| Ok(Record { volume: 0, offset: n % 10 * 4096, length: 4096, write: n < 10 }));
        let trace = Trace::new(records).expect("a trace");
        let mut report = TraceReport::new(name.into(), &trace);
        for (size, blocks) in [("4K", 1), ("20K", 5)] {
            let hits = |all| Hits { all, reads: all / 2 };
            let mut of_size = SizeReport::new(size.into(), blocks, &trace, hits(best));
            of_size.add("lru", &trace, hits(lru));
            of_size.add("other", &trace, hits(other));
            report.sizes.push(of_size);
        }
        report
    }

    #[test]
    fn lru_is_first_and_belady_last() {
        let size = &example("a", 1, 5, 10).sizes[1];
        let names: Vec<_> = size.policies.iter().map(|outcome| &*outcome.policy).collect();
        assert_eq!(names, ["lru", "other", "belady"]);
        assert_eq!((size.lru().hits, size.belady().hits, size.share), (1, 10, 0.5));
        let other = &size.policies[1];
        assert_eq!((other.hit_ratio, other.read_hit_ratio), (0.25, Some(0.2)));
        assert_eq!((other.share_of_belady, size.belady().share_of_belady), (Some(0.5), Some(1.0)));
    }

    #[test]
    fn means_leave_out_what_nobody_can_hit() {
        let report =
            Report::new(vec![example("a", 1, 5, 10), example("b", 2, 3, 4), example("c", 0, 0, 0)]);
        let shares: Vec<_> = report.mean_share_of_belady[0]
            .policies
            .iter()
            .map(|policy| policy.share_of_belady)
            .collect();
        assert_eq!(shares, [Some(0.3), Some(0.625), Some(1.0)]);
        let nothing = Report::new(vec![example("c", 0, 0, 0)]);
        assert_eq!(nothing.mean_share_of_belady[0].policies[0].share_of_belady, None);
    }

    #[test]
    fn the_document_has_every_figure() {
        let json = serde_json::to_value(Report::new(vec![example("a", 1, 5, 10)])).expect("data");
        let trace = &json["traces"][0];
        assert_eq!(trace["references"], 20);
        assert_eq!(trace["unique_blocks"], 10);
        assert_eq!(trace["sizes"][0]["blocks"], 1);
        assert_eq!(trace["sizes"][0]["policies"][1]["policy"], "other");
        assert_eq!(trace["sizes"][0]["policies"][1]["hits"], 5);
        assert_eq!(json["mean_share_of_belady"][1]["size"], "20K");
    }
}
