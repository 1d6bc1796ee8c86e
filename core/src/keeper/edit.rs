//! Changes of a volume beside its blocks. They come into force with a commit.

use alloc::string::String;
use core::fmt;

use crate::wire::head::{Head, SNAPSHOTS_MAX, Settings, Snapshot, VOLUME_BLOCKS_MAX};
use crate::wire::names::valid_name;

/// A change of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Edit {
    /// What an operator says of it. The shards hear of it at once.
    Settings(Settings),
    /// Its name. The object that makes the name known is not the keeper's business.
    Name(String),
    /// Its size in blocks. When it loses some, they have been discarded before: the image has
    /// nothing there.
    Blocks(u64),
    /// A snapshot of this name: the image as of a cut that is made now.
    Snapshot(String),
    /// Whether a snapshot is being deleted: then nobody may clone it any more.
    MarkSnapshot {
        /// Its name.
        name: String,
        /// Whether it is.
        deleting: bool,
    },
    /// The snapshot of this name, which is being deleted, is no more.
    DropSnapshot(String),
    /// Nothing of the image lies in other volumes any more: it is no clone. The keeper makes this
    /// change itself, at the end of a flattening.
    Flattened,
}

/// Why a volume cannot be changed so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EditError {
    /// There is a snapshot of this name.
    SnapshotExists,
    /// There is no snapshot of this name.
    NoSnapshot,
    /// The snapshot was not marked as being deleted, so it may have clones.
    NotMarked,
    /// It has as many snapshots as it can have.
    TooManySnapshots,
    /// A name has 1 to 63 letters, digits, `.`, `_`, `-`.
    Name,
    /// A part of the image lies in another volume.
    NotFlat,
    /// No volume can have so many blocks.
    Size(u64),
    /// What is wrong with the settings.
    Settings(&'static str),
}

impl fmt::Display for EditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SnapshotExists => f.write_str("there is a snapshot of this name already"),
            Self::NoSnapshot => f.write_str("there is no snapshot of this name"),
            Self::NotMarked => f.write_str("the snapshot is not being deleted any more"),
            Self::TooManySnapshots => write!(f, "a volume has at most {SNAPSHOTS_MAX} snapshots"),
            Self::Name => f.write_str("a name has 1 to 63 letters, digits, '.', '_' or '-'"),
            Self::NotFlat => f.write_str("it needs its parent: flatten it first"),
            Self::Size(blocks) => write!(
                f,
                "a volume has 1 to {VOLUME_BLOCKS_MAX} blocks of 4096 bytes, not {blocks}"
            ),
            Self::Settings(why) => f.write_str(why),
        }
    }
}

impl core::error::Error for EditError {}

impl Edit {
    /// Whether a head can be changed so.
    pub fn check(&self, head: &Head) -> Result<(), EditError> {
        let exists = |name: &String| head.snapshots.iter().any(|known| known.name == *name);
        let marked = |name: &String| head.snapshots.iter().any(|s| s.name == *name && s.deleting);
        match self {
            Self::Settings(settings) => settings.check().map_err(EditError::Settings),
            Self::Name(name) if !valid_name(name) => Err(EditError::Name),
            Self::Name(_) => Ok(()),
            Self::Blocks(blocks) if !(1..=VOLUME_BLOCKS_MAX).contains(blocks) => {
                Err(EditError::Size(*blocks))
            }
            Self::Blocks(_) => Ok(()),
            Self::Snapshot(name) if !valid_name(name) => Err(EditError::Name),
            Self::Snapshot(name) if exists(name) => Err(EditError::SnapshotExists),
            Self::Snapshot(_) if head.snapshots.len() == SNAPSHOTS_MAX => {
                Err(EditError::TooManySnapshots)
            }
            Self::Snapshot(_) => Ok(()),
            Self::MarkSnapshot { name, .. } | Self::DropSnapshot(name) if !exists(name) => {
                Err(EditError::NoSnapshot)
            }
            Self::DropSnapshot(name) if !marked(name) => Err(EditError::NotMarked),
            Self::MarkSnapshot { .. } | Self::DropSnapshot(_) => Ok(()),
            Self::Flattened if head.is_flat() => Ok(()),
            Self::Flattened => Err(EditError::NotFlat),
        }
    }

    /// Changes a head that has its own number and epoch already.
    pub fn apply(&self, head: &mut Head) {
        match self {
            Self::Settings(settings) => head.settings.clone_from(settings),
            Self::Name(name) => head.name.clone_from(name),
            Self::Blocks(blocks) => {
                head.blocks = *blocks;
                let pages = head.page_count();
                head.pages.retain(|page, _| *page < pages);
                // A snapshot of the same commit is this very head.
                let (number, same) = (head.number, head.snapshots.iter_mut());
                same.filter(|s| s.number == number).for_each(|s| s.blocks = *blocks);
            }
            Self::Snapshot(name) => head.snapshots.push(Snapshot {
                name: name.clone(),
                number: head.number,
                epoch: head.epoch,
                blocks: head.blocks,
                created_unix_secs: head.written_unix_secs,
                deleting: false,
            }),
            Self::MarkSnapshot { name, deleting } => {
                let snapshots = head.snapshots.iter_mut();
                snapshots.filter(|known| known.name == *name).for_each(|s| s.deleting = *deleting);
            }
            Self::DropSnapshot(name) => head.snapshots.retain(|known| known.name != *name),
            Self::Flattened => head.sources.clear(),
        }
    }
}
