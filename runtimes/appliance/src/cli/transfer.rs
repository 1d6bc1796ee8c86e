//! The command line of transfers.

use clap::Args;

use crate::size::Size;
use crate::transfer::{Format, Place};

/// Of `volume import`.
#[derive(Args, Debug)]
pub(crate) struct ImportArgs {
    /// What is read: a raw or qcow2 file, nbd://HOST:PORT/EXPORT, or
    /// nbd+unix:///EXPORT?socket=PATH
    #[arg(value_name = "SRC")]
    pub(crate) source: Place,
    /// The volume, which is made
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
    /// Overwrite a volume that is there
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
