//! The command line of snapshots and clones.

use clap::{Args, Subcommand};
use heeler_store::snapshots::SnapshotName;

use super::StoreArgs;

/// Of `snapshot`.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Make a snapshot of a volume, also while clients write
    Create {
        /// Of which volume, and its own name
        #[arg(value_name = "VOLUME@SNAPSHOT")]
        name: SnapshotName,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// List the snapshots of a volume
    List {
        /// Which volume
        volume: String,
        /// As JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Delete a snapshot that has no clones
    Delete {
        /// Which
        #[arg(value_name = "VOLUME@SNAPSHOT")]
        name: SnapshotName,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Make a volume what it was when the snapshot was made; what was written since is lost, all
    /// snapshots stay
    Rollback {
        /// To which
        #[arg(value_name = "VOLUME@SNAPSHOT")]
        name: SnapshotName,
        /// Also while clients are connected: they are disconnected
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Serve a snapshot read-only, as the export VOLUME@SNAPSHOT, from now on and after restarts
    Serve {
        /// Which
        #[arg(value_name = "VOLUME@SNAPSHOT")]
        name: SnapshotName,
        /// Serve it no more, and drop what is cached of it
        #[arg(long)]
        stop: bool,
    },
}

/// Of `clone`.
#[derive(Args, Debug)]
pub(crate) struct CloneArgs {
    /// The snapshot
    #[arg(value_name = "VOLUME@SNAPSHOT")]
    pub(crate) from: SnapshotName,
    /// The new volume
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Cli, Command};

    #[test]
    fn snapshots_are_named_behind_their_volume() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        let Command::Clone(args) = parse("heeler clone golden@v1 web").unwrap().command else {
            panic!()
        };
        assert_eq!((args.from.to_string().as_str(), args.name.as_str()), ("golden@v1", "web"));
        for line in [
            "heeler clone golden web",
            "heeler snapshot create golden",
            "heeler snapshot create golden@",
            "heeler snapshot delete @v1",
            "heeler snapshot rollback a@b@c",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
