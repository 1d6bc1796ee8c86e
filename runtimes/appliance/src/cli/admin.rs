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

/// Of `volume read` and `volume write`.
#[derive(Args, Debug)]
pub(crate) struct RangeArgs {
    /// Which; to read also VOLUME@SNAPSHOT
    pub(crate) name: String,
    /// First byte
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub(crate) offset: Size,
    /// How much at most [default: all there is]
    #[arg(long, value_name = "SIZE")]
    pub(crate) length: Option<Size>,
}

/// Of `volume object`.
#[derive(Args, Debug)]
pub(crate) struct ObjectArgs {
    /// Which volume, or VOLUME@SNAPSHOT
    pub(crate) name: String,
    /// Which object, counted from 0
    pub(crate) object: u32,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}
