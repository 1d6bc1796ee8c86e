//! The command line of transfers.

use clap::Args;
use heeler_store::snapshots::SnapshotName;

use crate::size::Size;
use crate::transfer::{Format, Place};

/// Of `volume import`.
#[derive(Args, Debug)]
pub(crate) struct ImportArgs {
    /// What is read: a raw or qcow2 file, nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH,
    /// or a delta (of `volume export --from`), which brings a volume from one snapshot to the next
    #[arg(value_name = "SRC")]
    pub(crate) source: Place,
    /// The volume, which is made; of a delta, one that has the snapshot on which the delta builds
    pub(crate) name: String,
    /// Size of the volume, rounded up to 4096 [default: as SRC]
    #[arg(long)]
    pub(crate) size: Option<Size>,
    /// As for `volume create`
    #[arg(long, value_name = "SIZE", default_value = "4M")]
    pub(crate) object_size: Size,
    /// What the file is [default: as its content says]
    #[arg(long)]
    pub(crate) format: Option<Format>,
    /// Overwrite a volume that is there; of a delta: what was written since that snapshot
    #[arg(long, conflicts_with = "resume")]
    pub(crate) force: bool,
    /// Go on with an import that was interrupted
    #[arg(long)]
    pub(crate) resume: bool,
    /// Read all of the volume back at the end, and compare it with SRC
    #[arg(long)]
    pub(crate) verify: bool,
}

/// Of `volume export`.
#[derive(Args, Debug)]
pub(crate) struct ExportArgs {
    /// Which: a volume, or a snapshot as VOLUME@SNAPSHOT
    pub(crate) name: String,
    /// What is written: a file, nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH, or - for
    /// standard output
    #[arg(value_name = "DST")]
    pub(crate) target: Place,
    /// Only what has changed since this snapshot of the volume, as a delta that `volume import`
    /// applies; then the first argument is a later snapshot of it
    #[arg(long, value_name = "VOLUME@SNAPSHOT", conflicts_with_all = ["format", "resume"])]
    pub(crate) from: Option<SnapshotName>,
    /// What the file becomes [default: as its name says, raw if it says nothing]
    #[arg(long)]
    pub(crate) format: Option<Format>,
    /// Replace a file that is there, or overwrite what the NBD export has
    #[arg(long, conflicts_with = "resume")]
    pub(crate) force: bool,
    /// Go on with an export that was interrupted
    #[arg(long)]
    pub(crate) resume: bool,
}
