//! What runs in the rig's guest beside the appliance: writers whose work can be checked, and a disk
//! that forgets what was not flushed.

mod blocks;
mod disk;
mod files;
mod folder;

use std::process::ExitCode;

const USAGE: &str = "\
usage: rig-tool files write DIR SECONDS SEED   load a file system; say on stdout what is safe in it
       rig-tool files check DIR SAID           all of that is there
       rig-tool blocks write DEVICE STATE SECONDS SEED   load a block device until it fails
       rig-tool blocks check DEVICE STATE      it has what was flushed
       rig-tool disk SOCKET FILE EVICT SEED [lying]      serve a disk with a volatile cache";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["files", "write", dir, seconds, seed] => files::write(dir, number(seconds), number(seed)),
        ["files", "check", dir, said] => files::check(dir, said),
        ["blocks", "write", device, state, seconds, seed] => {
            blocks::write(device, state, number(seconds), number(seed))
        }
        ["blocks", "check", device, state] => blocks::check(device, state),
        ["disk", socket, file, evict, seed] => {
            disk::serve(socket, file, number(evict), number(seed), false)
        }
        ["disk", socket, file, evict, seed, "lying"] => {
            disk::serve(socket, file, number(evict), number(seed), true)
        }
        _ => Err(USAGE.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

/// A number among the arguments.
fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("'{text}' is not a number\n{USAGE}"))
}
