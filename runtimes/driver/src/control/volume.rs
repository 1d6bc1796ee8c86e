//! A volume as the control thread sees it.

use heeler_core::ids::{BLOCK_BYTES, VolumeId};
use heeler_core::keeper::{self, Attached, Keeper, Phase};
use heeler_core::wire::head::{Settings, Source};
use heeler_core::wire::names::{Nonce, Uuid};

use super::handover::Leaving;
use crate::mail::ExportInfo;

/// Where a volume stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum State {
    /// Being claimed, or being introduced to the shards.
    Starting,
    /// Clients may open it.
    Served,
    /// Not ours; why.
    Refused(String),
    /// Lost to another owner; whom.
    Fenced(String),
    /// Given up with everything pushed.
    Released,
    /// To be deleted; its keeper is told nothing any more.
    Deleting(super::Ticket),
}

/// How large a volume is, and how it is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size in blocks.
    pub blocks: u64,
    /// log2 of the object size in bytes.
    pub object_shift: u8,
}

/// A volume and its keeper.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) uuid: Uuid,
    /// By which the store listed it, then that of its head.
    pub(super) name: String,
    pub(super) number: VolumeId,
    pub(super) keeper: Keeper,
    /// Tells answers to this keeper from those to an earlier one of the same volume.
    pub(super) life: u64,
    pub(super) nonce: Nonce,
    pub(super) takeover: bool,
    /// It is this snapshot, served read-only.
    pub(super) view: Option<Source>,
    pub(super) state: State,
    pub(super) attached: Option<Attached>,
    /// The shards know its number.
    pub(super) in_shards: bool,
    /// Of one that was never ours, but of which the shards know something.
    pub(super) geometry: Option<Geometry>,
    /// It is being given up.
    pub(super) leaving: Option<Leaving>,
    /// Store operations under way.
    pub(super) ops: usize,
    /// Somebody waits for the next push.
    pub(super) hurried: bool,
}

impl Volume {
    /// Whether the keeper has nothing more to do.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Deleting(_))
            || matches!(self.keeper.phase(), Phase::Released | Phase::Refused | Phase::Fenced)
    }

    pub(super) fn export(&self) -> Option<ExportInfo> {
        let open = self.state == State::Served && self.leaving.is_none_or(|left| left.is_open());
        let attached = self.attached.as_ref().filter(|_| open)?;
        Some(ExportInfo {
            name: self.name.clone(),
            volume: self.number,
            bytes: attached.blocks * BLOCK_BYTES as u64,
            object_shift: attached.object_shift,
            read_only: self.view.is_some() || attached.settings.read_only,
        })
    }

    pub(super) fn status(&self, note: impl Fn(u32) -> Option<String>) -> VolumeStatus {
        let keeper = self.keeper.status();
        let (word, reason) = match &self.state {
            State::Starting => ("starting", None),
            State::Served if self.leaving.is_some() => ("detaching", None),
            State::Served => ("served", None),
            State::Refused(why) => ("refused", Some(why.clone())),
            State::Fenced(by) => ("fenced", Some(by.clone())),
            State::Released => ("detached", None),
            State::Deleting(_) => ("deleting", None),
        };
        let attached = self.attached.as_ref();
        let blocks = attached.map(|attached| attached.blocks);
        let shift = attached.map(|attached| attached.object_shift);
        VolumeStatus {
            uuid: self.uuid,
            name: self.name.clone(),
            number: self.number,
            state: word,
            reason,
            blocks: blocks.or(self.geometry.map(|geometry| geometry.blocks)).unwrap_or(0),
            object_shift: shift.or(self.geometry.map(|g| g.object_shift)).unwrap_or(0),
            in_shards: self.in_shards,
            created_unix_secs: self.attached.as_ref().map_or(0, |a| a.created_unix_secs),
            settings: self.attached.as_ref().map(|attached| attached.settings.clone()),
            parent: self.attached.as_ref().and_then(|attached| attached.parent),
            last_failure: keeper.last_failure.map(|failure| {
                let text = failure.note.and_then(note);
                let why = text.unwrap_or_else(|| "the answer makes no sense".into());
                format!("{}: {why}", failure.what)
            }),
            keeper,
        }
    }
}

impl VolumeStatus {
    /// Whether the volume is this server's.
    #[must_use]
    pub fn is_served(&self) -> bool {
        matches!(self.state, "served" | "detaching")
    }

    /// Whether the cache may hold dirty blocks that it cannot push: the volume was lost, or is
    /// another's.
    #[must_use]
    pub fn is_stranded(&self) -> bool {
        self.in_shards && matches!(self.state, "refused" | "fenced")
    }
}

/// What a volume's status is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeStatus {
    /// Its identity in the store.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Its number in this cache.
    pub number: VolumeId,
    /// starting, served, detaching, refused, fenced, detached or deleting.
    pub state: &'static str,
    /// Of refused and fenced: why, and what to do.
    pub reason: Option<String>,
    /// Size in blocks; 0 as long as that is not known.
    pub blocks: u64,
    /// log2 of the object size in bytes; 0 as long as that is not known.
    pub object_shift: u8,
    /// The shards know what the cache holds of it.
    pub in_shards: bool,
    /// Seconds since 1970; 0 until it was ours.
    pub created_unix_secs: u64,
    /// What an operator says of it; `None` until it was ours.
    pub settings: Option<Settings>,
    /// Of a clone: the snapshot that it was made from.
    pub parent: Option<Source>,
    /// The keeper's figures.
    pub keeper: keeper::Status,
    /// The last store operation that failed, also when it is over.
    pub last_failure: Option<String>,
}
