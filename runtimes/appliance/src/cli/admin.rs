//! The command line of what changes a volume as a whole.

use clap::Args;

use super::StoreArgs;
use crate::size::Size;

/// Of `volume resize`.
#[derive(Args, Debug)]
pub(crate) struct ResizeArgs {
    /// Which
    pub(crate) name: String,
    /// The new size: a multiple of 4096
    pub(crate) size: Size,
    /// Also if there is data behind the new end: it is discarded. Snapshots keep theirs
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

/// Of `volume rename`.
#[derive(Args, Debug)]
pub(crate) struct RenameArgs {
    /// Which
    pub(crate) old: String,
    /// Its new name
    pub(crate) new: String,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}
