//! A volume's mode in the model: drawn at random, changed while clients write, and what it
//! promises.

use heeler_core::event::{Buffering, Mode, ToShard};
use heeler_core::keeper;

use crate::history::Promise;
use crate::world::Life;

/// What a change promises when it is answered in a mode.
pub(crate) fn promise(mode: Mode, fua: bool) -> Promise {
    match mode {
        Mode::WriteThrough | Mode::WriteAround | Mode::None => Promise::Stored,
        Mode::WriteBack | Mode::Ram if fua => Promise::Durable,
        Mode::WriteBack => Promise::Logged,
        Mode::Ram | Mode::Ephemeral => Promise::Nothing,
    }
}

impl Life<'_, '_> {
    /// Any mode.
    pub(crate) fn draw_mode(&mut self) -> Mode {
        Mode::ALL[self.world.rng.index(Mode::ALL.len())]
    }

    /// The mode is changed, and the client told when all that was answered before is as durable as
    /// the new one promises.
    pub(crate) fn change_mode(&mut self, mode: Mode) {
        self.tell_mode(mode);
        let ticket = self.ticket();
        let now = self.now();
        self.keeper.handle(now, keeper::Input::PushNow { ticket });
        self.drain_keeper();
        self.world.stats.mode_changes += 1;
    }

    /// The mails by which the shards hear of it.
    pub(crate) fn tell_mode(&mut self, mode: Mode) {
        let (volume, buffering) = (self.world.volume, Buffering::default());
        for mails in &mut self.to_shard {
            mails.push_back(ToShard::Settings { volume, mode, buffering, pinned: false });
        }
    }
}
