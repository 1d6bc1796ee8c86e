//! Snapshots that are served, read-only, beside the volumes: `VOLUME@SNAPSHOT`.
//!
//! A cache knows each by an identity and a number of its own, so its contents stay for ever, and
//! survive restarts like any volume's.

use heeler_core::keeper::Input;
use heeler_core::time::Instant;
use heeler_core::wire::head::Source;
use heeler_core::wire::names::{Uuid, view_uuid};

use super::volume::VolumeStatus;
use super::{Control, Drain, StoreIo, TableIo};

impl<S: StoreIo, T: TableIo> Control<S, T> {
    /// Serves a snapshot under this name, whoever has its volume. Ends as
    /// [`add_volume`](Self::add_volume) does.
    ///
    /// # Errors
    /// In words.
    pub fn add_view(&mut self, now: Instant, of: Source, name: &str) -> Result<(), String> {
        let view = identity(of);
        if self.volumes.iter().any(|known| known.uuid == view) {
            return Ok(());
        }
        if self.drain != Drain::No {
            return Err("the server is shutting down".into());
        }
        self.rows.add_view(view)?;
        let index = self.enter(view, of.volume, name, false);
        self.volumes[index].view = Some(of);
        let volume = self.volumes[index].number;
        self.feed(now, index, Input::View { volume, number: of.number });
        Ok(())
    }

    /// Serves a snapshot no more, and forgets what the cache holds of it. Clients are disconnected.
    ///
    /// # Errors
    /// In words.
    pub fn remove_view(&mut self, now: Instant, of: Source) -> Result<(), String> {
        let view = identity(of);
        let Some(index) = self.index(view) else { return Ok(()) };
        self.feed(now, index, Input::Detach);
        self.forget_row(view)?;
        self.volumes.retain(|known| known.uuid != view);
        self.publish();
        Ok(())
    }

    /// The same, of all snapshots of a volume.
    ///
    /// # Errors
    /// In words.
    pub fn remove_views_of(&mut self, now: Instant, volume: Uuid) -> Result<(), String> {
        let views = self.volumes.iter().filter_map(|known| known.view);
        let views: Vec<Source> = views.filter(|view| view.volume == volume).collect();
        views.into_iter().try_for_each(|view| self.remove_view(now, view))
    }

    /// Whether the cache has served this snapshot, and nobody has ended that.
    #[must_use]
    pub fn knows_view(&self, of: Source) -> bool {
        self.rows.find(identity(of)).is_some()
    }

    /// The snapshots that are served or were to be, and their figures.
    #[must_use]
    pub fn views(&self) -> Vec<(Source, VolumeStatus)> {
        let views = self.volumes.iter().filter_map(|volume| Some((volume.view?, volume)));
        views.map(|(of, view)| (of, view.status(|note| self.note(note)))).collect()
    }
}

fn identity(of: Source) -> Uuid {
    view_uuid(of.volume, of.number)
}
