//! Instructions per access, counted by valgrind: the same on a busy machine as on an idle one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Command;

use crate::subject::{QUICK_CACHE, SCHNELLRU, Subject};
use crate::workload::Kind;

/// Valgrind is some fifty times slower than the machine. Two thirds of them are counted.
pub const ACCESSES: usize = 1_500_000;
/// A count may be this much above the recorded one.
const TOLERANCE: f64 = 1.03;
/// What was recorded, beside this program's manifest.
const RECORDED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.txt");
const HEAD: &str = "\
# Instructions per access of heeler's cache under valgrind: workload, subject, count.
# `make bench-core` fails when a count is more than 3 % higher; --accept writes this file.
";

/// By workload and subject.
pub type Counts = BTreeMap<(&'static str, String), f64>;

pub fn valgrind_is_there() -> bool {
    Command::new("valgrind").arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Counts heeler's policies and the peers that bounds are taken from.
pub fn count(subjects: &[Subject], kinds: &[Kind]) -> Result<Counts, String> {
    let mut counts = Counts::new();
    for &kind in kinds.iter().filter(|kind| matches!(kind, Kind::Resident | Kind::Zipf10)) {
        for subject in subjects {
            if subject.ours.is_some() || [QUICK_CACHE, SCHNELLRU].contains(&subject.name.as_str()) {
                let count = count_one(&subject.name, kind)?;
                counts.insert((kind.name(), subject.name.clone()), count);
            }
        }
    }
    Ok(counts)
}

/// Runs this program again, below valgrind.
fn count_one(subject: &str, kind: Kind) -> Result<f64, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .args(["--collect-atstart=no", "--toggle-collect=*measure::timed*"])
        .arg(program)
        .args(["--count", "--subjects", subject, "--workloads", kind.name()])
        .output()
        .map_err(|error| format!("valgrind: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let counted: f64 = said
        .lines()
        .find_map(|line| line.split_once("Collected : "))
        .filter(|_| output.status.success())
        .and_then(|(_, number)| number.trim().parse().ok())
        .ok_or_else(|| format!("valgrind counted nothing of {subject}:\n{said}"))?;
    Ok(counted / (ACCESSES - ACCESSES / 3) as f64)
}

/// What heeler's counts have become worse by, in words: a line for each.
pub fn regressions(counts: &Counts) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(RECORDED)
        .map_err(|error| format!("{RECORDED}: {error}: record the counts by --accept"))?;
    let mut worse = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let [workload, subject, recorded] = line.split(' ').collect::<Vec<_>>()[..] else {
            return Err(format!("{RECORDED}: not workload, subject, count: {line}"));
        };
        let recorded: f64 =
            recorded.parse().map_err(|_| format!("{RECORDED}: not a number: {line}"))?;
        let counted = counts.iter().find(|((kind, name), _)| *kind == workload && name == subject);
        if let Some((_, count)) = counted
            && *count > recorded * TOLERANCE
        {
            worse.push(format!("{subject} on {workload}: {count:.1}, recorded {recorded}"));
        }
    }
    Ok(worse)
}

/// Records heeler's counts as what later runs are compared with.
pub fn accept(counts: &Counts, subjects: &[Subject]) -> Result<(), String> {
    let mut text = String::from(HEAD);
    for ((workload, name), count) in counts {
        if subjects.iter().any(|subject| subject.ours.is_some() && subject.name == *name) {
            writeln!(text, "{workload} {name} {count:.1}").expect("a string takes it");
        }
    }
    std::fs::write(RECORDED, text).map_err(|error| format!("{RECORDED}: {error}"))
}
