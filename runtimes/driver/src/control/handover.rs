//! Giving a volume up while the server runs, and getting one: the orders of an administrator.
//!
//! ```text
//! Served --detach--> Pushing --little left--> Closing --no session left--> Releasing --> Released
//!    ^                  |                        |                           |
//!    +------------------+--------- stay ---------+----- if not too late -----+
//! ```
//!
//! Clients are served while most of what is dirty is pushed; they are disconnected, each after the
//! answers it waits for, when so little is left that the rest takes no time.

use heeler_core::event::ToShard;
use heeler_core::keeper::{Input, Phase};
use heeler_core::time::Instant;
use heeler_core::wire::names::Uuid;

use super::volume::State;
use super::{Control, Drain, Event, StoreIo, TableIo, Ticket};
use crate::mail::FromControl;

/// A push of so little is the last one before clients are disconnected.
const LAST_BYTES: u64 = 16 << 20;

/// A volume that is being given up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Leaving {
    /// Of the order.
    ticket: Ticket,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Clients are served while this push runs. `before`: the bytes that were pushed before it;
    /// `last`: those of the push before.
    Pushing { push: Ticket, before: u64, last: u64 },
    /// Clients are being disconnected: on so many cores.
    Closing { order: Ticket, cores: usize },
    /// The keeper has been told.
    Releasing,
}

impl Leaving {
    /// Whether clients may still use the volume.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Pushing { .. })
    }
}

impl<S: StoreIo, T: TableIo> Control<S, T> {
    /// Claims a volume, as [`add_volume`](Self::add_volume) does, also one that was refused, lost
    /// or given up before. `dirty_blocks`: what the shards hold of it that was never pushed.
    /// [`Event::Served`] or [`Event::Refused`] tell the end, unless it is served already.
    ///
    /// # Errors
    /// In words.
    pub fn attach(
        &mut self,
        now: Instant,
        volume: Uuid,
        name: &str,
        takeover: bool,
        dirty_blocks: u64,
    ) -> Result<(), String> {
        if self.drain != Drain::No {
            return Err("the server is shutting down".into());
        }
        let Some(index) = self.index(volume) else {
            self.add_volume(now, volume, name, takeover);
            return Ok(());
        };
        match &self.volumes[index].state {
            State::Served if self.volumes[index].leaving.is_some() => Err(format!(
                "volume '{name}' is being detached; wait, or keep it with `heeler volume detach \
                 {name} --cancel`"
            )),
            State::Starting | State::Served => Ok(()),
            State::Deleting(_) => Err(format!("volume '{name}' is being deleted")),
            State::Refused(_) | State::Fenced(_) | State::Released => {
                let old = self.volumes.remove(index);
                if old.in_shards {
                    let logged = self.logged.entry(old.number).or_default();
                    logged.dirty_blocks = dirty_blocks;
                    let open = old.attached.map_or(logged.epoch, |attached| attached.open);
                    logged.epoch = logged.epoch.max(open);
                }
                let index = self.enter(volume, volume, name, takeover);
                let new = &mut self.volumes[index];
                (new.in_shards, new.geometry) = (old.in_shards, old.geometry);
                self.start(now, index);
                Ok(())
            }
        }
    }

    /// Gives a volume up: pushes what is dirty, disconnects clients, and releases it in the store.
    /// [`Event::Detached`] tells the end.
    ///
    /// # Errors
    /// In words.
    pub fn detach(&mut self, now: Instant, volume: Uuid) -> Result<Ticket, String> {
        let index = self.index(volume).filter(|index| self.volumes[*index].state == State::Served);
        let index = index.ok_or("this server does not serve it")?;
        if self.volumes[index].leaving.is_some() || self.drain != Drain::No {
            return Err("it is being detached already".into());
        }
        let (ticket, push) = (self.ticket(), self.ticket());
        let before = self.volumes[index].keeper.status().pushed_bytes;
        let stage = Stage::Pushing { push, before, last: u64::MAX };
        self.volumes[index].leaving = Some(Leaving { ticket, stage });
        self.feed(now, index, Input::PushNow { ticket: push.0 });
        Ok(ticket)
    }

    /// Keeps a volume that is being given up.
    ///
    /// # Errors
    /// In words: it is too late, or it is not being given up.
    pub fn stay(&mut self, now: Instant, volume: Uuid) -> Result<(), String> {
        let index = self.index(volume);
        let leaving = index.and_then(|index| Some((index, self.volumes[index].leaving?)));
        let (index, leaving) = leaving.ok_or("it is not being detached")?;
        if leaving.stage == Stage::Releasing {
            self.feed(now, index, Input::Stay);
            if self.volumes[index].keeper.phase() == Phase::Releasing {
                return Err("it is too late: it is being released; attach it again".into());
            }
        }
        self.end_leaving(index, false);
        self.publish();
        Ok(())
    }

    /// Gives up what the cache holds of a volume that is not served, dirty or not, and the volume's
    /// place in the cache's table.
    ///
    /// # Errors
    /// In words.
    pub fn forget_volume(&mut self, volume: Uuid) -> Result<(), String> {
        let index = self.index(volume).ok_or("this server does not know it")?;
        match self.volumes[index].state {
            State::Refused(_) | State::Fenced(_) | State::Released => {
                self.forget_row(volume)?;
                self.volumes.remove(index);
                Ok(())
            }
            _ => Err("it is in use".into()),
        }
    }

    /// A push has ended; true if it was one of a volume on its way out. Returns what its keeper is
    /// to be told.
    pub(super) fn pushed_leaving(
        &mut self,
        index: usize,
        ticket: Ticket,
        committed: bool,
    ) -> Option<Option<Input<'static>>> {
        let leaving = self.volumes[index].leaving?;
        let Stage::Pushing { push, before, last } = leaving.stage else { return None };
        if push != ticket {
            return None;
        }
        if !committed {
            // The volume is lost, and the keeper says so next.
            return Some(None);
        }
        let after = self.volumes[index].keeper.status().pushed_bytes;
        let pushed = after - before;
        // What the last push took was written meanwhile, so it says how much is dirty now. Clients
        // that write as fast as the store takes it are not waited for.
        let again = pushed > LAST_BYTES && pushed <= last / 2;
        let order = self.ticket();
        let stage = if again {
            Stage::Pushing { push: order, before: after, last: pushed }
        } else {
            Stage::Closing { order, cores: self.links.cores() }
        };
        self.volumes[index].leaving = Some(Leaving { stage, ..leaving });
        if again {
            return Some(Some(Input::PushNow { ticket: order.0 }));
        }
        self.publish();
        let volume = self.volumes[index].number;
        self.links.send_to_all(|| FromControl::Close { volume, ticket: order.0 });
        Some(None)
    }

    /// A core says that no session uses a volume any more.
    pub(super) fn handle_closed(&mut self, now: Instant, ticket: Ticket) {
        let closing = |volume: &super::Volume| match volume.leaving?.stage {
            Stage::Closing { order, cores } if order == ticket => Some(cores),
            _ => None,
        };
        let found = self.volumes.iter().enumerate();
        let found = found.filter_map(|(index, volume)| Some((index, closing(volume)?))).next();
        let Some((index, cores)) = found else { return };
        let leaving = self.volumes[index].leaving.as_mut().expect("found above");
        if cores > 1 {
            leaving.stage = Stage::Closing { order: ticket, cores: cores - 1 };
            return;
        }
        leaving.stage = Stage::Releasing;
        self.feed(now, index, Input::Detach);
    }

    /// Tells whoever ordered it that a volume is given up, or is not.
    pub(super) fn end_leaving(&mut self, index: usize, detached: bool) {
        if let Some(leaving) = self.volumes[index].leaving.take() {
            self.events.push_back(Event::Detached { ticket: leaving.ticket, detached });
        }
    }

    /// The shards keep what is clean, and serve it no more.
    pub(super) fn rest(&mut self, index: usize) {
        if self.volumes[index].in_shards {
            let volume = self.volumes[index].number;
            self.links.mail_all_shards(ToShard::Detach { volume });
        }
    }
}
