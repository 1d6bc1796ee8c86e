//! heeler: a write-back cache for virtual disks, run as an appliance.
#![deny(unsafe_code)]

mod api;
mod check;
mod cli;
mod client;
mod commands;
mod counters;
mod files;
mod lines;
mod object;
mod replay;
mod runtime;
mod serve;
mod server;
mod setting;
mod settings;
mod show;
mod size;
mod snapshot;
mod span;
mod store_io;
mod transfer;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::serve::Failure;
use crate::settings::Common;

fn main() -> ExitCode {
    let cli = Cli::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let (Failure::Usage(text) | Failure::Run(text)) = &failure;
            eprintln!("heeler: {text}");
            if matches!(failure, Failure::Usage(_)) { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    let common = Common { data: cli.data.as_deref(), config: cli.config.as_deref() };
    let done = match &cli.command {
        Command::Serve(args) => return serve::serve(&common.settings(args)?),
        Command::Volume { command } => commands::volume(common, command),
        Command::Snapshot { command } => commands::snapshot::snapshot(common, command),
        Command::Clone(args) => commands::snapshot::clone(common, args),
        Command::Cache { command } => commands::cache(common, command),
        Command::Status { json } => commands::status(common, *json),
        Command::Check(args) => {
            check::check(&common.place(args.cache.as_deref(), &args.store)?, args)
        }
        Command::Replay(args) => replay::replay(args),
    };
    done.map_err(Failure::Run)
}
