//! What came of a replay, as people read it.

use heeler_core::ids::BLOCK_BYTES;

use crate::replay::report::{Mean, Outcome, Report, SizeReport, TraceReport};
use crate::show;
use crate::size::Size;

/// A table for each trace, and for several the mean of their shares of Belady.
pub(super) fn report(report: &Report) -> String {
    let mut tables: Vec<String> = report.traces.iter().map(trace).collect();
    if report.traces.len() > 1 {
        tables.push(format!(
            "share of Belady, mean of {} traces\n{}",
            report.traces.len(),
            means(&report.mean_share_of_belady)
        ));
    }
    tables.join("\n")
}

fn trace(trace: &TraceReport) -> String {
    let headings = ["SIZE", "BLOCKS", "POLICY", "HITS", "ALL", "READS", "OVER LRU", "OF BELADY"];
    let mut rows = vec![headings.map(String::from)];
    for size in &trace.sizes {
        rows.extend(size.policies.iter().map(|outcome| row(size, outcome)));
    }
    format!(
        "{}\nrequests {}, volumes {}, touches of blocks {} ({} reads), different blocks {} \
         ({})\n{}",
        trace.trace,
        trace.requests,
        trace.volumes,
        trace.references,
        percent(trace.read_references as f64 / trace.references as f64).trim_start(),
        trace.unique_blocks,
        Size(u64::from(trace.unique_blocks) * BLOCK_BYTES as u64),
        show::table(&rows)
    )
}

fn row(size: &SizeReport, outcome: &Outcome) -> [String; 8] {
    [
        size.size.clone(),
        size.blocks.to_string(),
        outcome.policy.clone(),
        outcome.hits.to_string(),
        percent(outcome.hit_ratio),
        optional(outcome.read_hit_ratio),
        format!("{:+7.2}", 100.0 * (outcome.hit_ratio - size.lru().hit_ratio)),
        optional(outcome.share_of_belady),
    ]
}

fn means(means: &[Mean]) -> String {
    let mut rows = vec![vec!["POLICY".to_owned()]];
    rows[0].extend(means.iter().map(|mean| mean.size.clone()));
    let policies = means.first().map_or(&[][..], |mean| &mean.policies);
    for (nth, policy) in policies.iter().enumerate() {
        let mut row = vec![policy.policy.clone()];
        row.extend(means.iter().map(|mean| optional(mean.policies[nth].share_of_belady)));
        rows.push(row);
    }
    show::table(&rows)
}

fn percent(ratio: f64) -> String {
    format!("{:6.2}%", 100.0 * ratio)
}

fn optional(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| format!("{:>6}", "-"), percent)
}

#[cfg(test)]
mod tests {
    use crate::replay::report::tests::example;

    use super::*;

    #[test]
    fn a_table_for_each_and_the_mean() {
        let text = report(&Report::new(vec![example("a", 1, 5, 10), example("b", 2, 3, 4)]));
        assert_eq!(
            text.lines().take(6).collect::<Vec<_>>(),
            [
                "a",
                "requests 20, volumes 1, touches of blocks 20 (50.00% reads), different blocks 10 \
                 (40 KiB)",
                "SIZE  BLOCKS  POLICY  HITS  ALL      READS    OVER LRU  OF BELADY",
                "4K    1       lru     1       5.00%    0.00%    +0.00    10.00%",
                "4K    1       other   5      25.00%   20.00%   +20.00    50.00%",
                "4K    1       belady  10     50.00%   50.00%   +45.00   100.00%",
            ]
        );
        let means = "share of Belady, mean of 2 traces\n\
                     POLICY  4K       20K\n\
                     lru      30.00%   30.00%\n\
                     other    62.50%   62.50%\n\
                     belady  100.00%  100.00%\n";
        assert!(text.ends_with(means), "{text}");
        assert!(!report(&Report::new(vec![example("a", 1, 5, 10)])).contains("mean"));
    }
}
