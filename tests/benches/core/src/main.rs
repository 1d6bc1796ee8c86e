//! Costs of one access: heeler's cache beside caches that other programs use. One thread, all in
//! one run, on the same keys; see RESULTS-core.md.

mod allocator;
mod instructions;
mod measure;
mod report;
mod subject;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use report::Results;
use subject::Subject;
use workload::Kind;

/// A third of them warms up.
const ACCESSES: usize = 12_000_000;

/// Measures heeler's cache and its peers, one access at a time.
#[derive(Parser, Debug)]
struct Options {
    /// Rounds; the tables show medians
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only these policies and peers
    #[arg(long, value_delimiter = ',', value_name = "A,B")]
    subjects: Vec<String>,
    /// Only these workloads
    #[arg(long, value_delimiter = ',', value_enum, value_name = "A,B")]
    workloads: Vec<Kind>,
    /// Record the instruction counts as what later runs are compared with
    #[arg(long)]
    accept: bool,
    /// Write the tables there, too
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Access once and say nothing, for valgrind
    #[arg(long, hide = true)]
    count: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let kinds =
        if options.workloads.is_empty() { Kind::ALL.to_vec() } else { options.workloads.clone() };
    match subjects(&options.subjects).and_then(|subjects| run(&options, &subjects, &kinds)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench-core: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Those that are named, or all.
fn subjects(names: &[String]) -> Result<Vec<Subject>, String> {
    let mut subjects = subject::all();
    let known: Vec<&str> = subjects.iter().map(|subject| subject.name.as_str()).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(format!("no subject is called {name}; there are {}", known.join(", ")));
    }
    subjects.retain(|subject| names.is_empty() || names.contains(&subject.name));
    Ok(subjects)
}

fn run(options: &Options, subjects: &[Subject], kinds: &[Kind]) -> Result<ExitCode, String> {
    if options.count {
        for kind in kinds {
            let keys = kind.keys(instructions::ACCESSES);
            for subject in subjects {
                measure::sample(subject, *kind, &keys);
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    let counts = if instructions::valgrind_is_there() {
        eprintln!("counting instructions");
        Some(instructions::count(subjects, kinds)?)
    } else {
        eprintln!("no valgrind: instructions are not counted");
        None
    };
    let samples = rounds(options.rounds, subjects, kinds);
    let results = Results { subjects, kinds, samples, counts };
    let text = results.text();
    println!("{text}");
    if let Some(out) = &options.out {
        let text = format!("{}\n{text}", report::head(options.rounds));
        std::fs::write(out, text).map_err(|error| format!("{}: {error}", out.display()))?;
    }
    let Some(counts) = &results.counts else { return Ok(ExitCode::SUCCESS) };
    if options.accept {
        instructions::accept(counts, subjects)?;
        return Ok(ExitCode::SUCCESS);
    }
    let worse = instructions::regressions(counts)?;
    worse.iter().for_each(|line| eprintln!("worse than recorded: {line}"));
    Ok(if worse.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Samples by round, kind and subject. A round runs everything once, so that what disturbs the
/// machine for a while disturbs all alike.
fn rounds(rounds: u32, subjects: &[Subject], kinds: &[Kind]) -> Vec<Vec<Vec<measure::Sample>>> {
    let keys: Vec<Vec<u32>> = kinds.iter().map(|kind| kind.keys(ACCESSES)).collect();
    (1..=rounds)
        .map(|round| {
            eprintln!("round {round} of {rounds}");
            let of_kind = |(kind, keys): (&Kind, &Vec<u32>)| {
                subjects.iter().map(|subject| measure::sample(subject, *kind, keys)).collect()
            };
            kinds.iter().zip(&keys).map(of_kind).collect()
        })
        .collect()
}
