//! `heeler replay`: recorded traces through the cache.

mod chart;
mod report;
mod text;

use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::Path;

use heeler_core::policy::Policy;
use heeler_replay::{Belady, Records, Run, Trace};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{ReplayArgs, ReplaySize};
use crate::replay::report::{Report, SizeReport, TraceReport};

/// Requests between two steps of the progress bar.
const STEP_REQUESTS: usize = 1 << 16;

/// Replays every trace by every policy in every size, and prints and draws what came of it.
pub(crate) fn replay(args: &ReplayArgs) -> Result<(), String> {
    let policies = policies(&args.policy);
    let failed = |path: &Path, e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    // All at once, so that a wrong name is known before the work is done.
    let mut files = Vec::new();
    for path in &args.traces {
        files.push((path, File::open(path).map_err(|e| failed(path, &e))?));
    }
    let mut traces = Vec::new();
    for (path, file) in files {
        let name = path.display().to_string();
        let trace = read(&name, file).map_err(|e| failed(path, &e))?;
        traces.push(replay_one(name, &trace, &policies, &args.size));
    }
    let report = Report::new(traces);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).expect("plain data"));
    } else {
        print!("{}", text::report(&report));
    }
    if let Some(path) = &args.svg {
        std::fs::write(path, chart::draw(&report)).map_err(|e| failed(path, &e))?;
    }
    Ok(())
}

/// LRU, to compare with, and then what was asked for, or all.
fn policies(asked: &[Policy]) -> Vec<Policy> {
    let asked = if asked.is_empty() { Policy::ALL } else { asked };
    let mut policies = vec![Policy::Lru];
    for policy in asked {
        if !policies.contains(policy) {
            policies.push(*policy);
        }
    }
    policies
}

fn read(name: &str, file: File) -> Result<Trace, heeler_replay::ReadError> {
    let bytes = file.metadata().map_or(0, |metadata| metadata.len());
    let bar = bar(format!("reading {name}"), "{bytes}/{total_bytes}", bytes);
    let trace = Trace::new(Records::new(name, bar.wrap_read(file))?);
    bar.finish_and_clear();
    trace
}

fn replay_one(
    name: String,
    trace: &Trace,
    policies: &[Policy],
    sizes: &[ReplaySize],
) -> TraceReport {
    let runs = (sizes.len() * (policies.len() + 1)) as u64;
    let bar = bar(format!("replaying {name}"), "{percent}%", runs * trace.references());
    let pages = |size: &ReplaySize| size.size.pages(trace.unique_blocks());
    let pages_max = sizes.iter().map(pages).max().expect("there is a size");
    let mut storage = Run::storage(trace, pages_max);
    let belady = Belady::new(trace);
    let mut report = TraceReport::new(name, trace);
    for size in sizes {
        let best = belady.hits(pages(size));
        bar.inc(trace.references());
        let mut report_size = SizeReport::new(size.text.clone(), pages(size), trace, best);
        for policy in policies {
            let mut run = Run::new(&mut storage, pages(size), *policy);
            for accesses in trace.accesses().chunks(STEP_REQUESTS) {
                bar.inc(run.feed(accesses));
            }
            report_size.add(policy.name(), trace, run.hits());
        }
        report.sizes.push(report_size);
    }
    bar.finish_and_clear();
    report
}

/// A bar on a terminal; nothing elsewhere.
fn bar(label: String, units: &str, length: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(&format!("{{msg}} [{{bar:30}}] {units} {{eta}}"));
    ProgressBar::new(length).with_message(label).with_style(style.expect("the template is sound"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lru_is_always_there_and_nothing_twice() {
        let all = policies(&[]);
        assert_eq!((all[0], all.len()), (Policy::Lru, Policy::ALL.len()));
        assert!(Policy::ALL.iter().all(|policy| all.contains(policy)));
        assert_eq!(policies(&[Policy::TwoQ, Policy::TwoQ]), [Policy::Lru, Policy::TwoQ]);
        assert_eq!(policies(&[Policy::Lru]), [Policy::Lru]);
    }
}
