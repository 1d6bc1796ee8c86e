//! What the cache holds of volumes that are not its own any more: found, named, read out.

use heeler_core::event::ToShard;
use heeler_core::ids::{Epoch, ShardId};
use heeler_core::shard::{DirtyRun, SalvageAt};
use heeler_core::wire::names::{Nonce, Uuid};

use super::volume::{Geometry, State};
use super::{Control, StoreIo, TableIo, Ticket};
use crate::mail::FromControl;

impl<S: StoreIo, T: TableIo> Control<S, T> {
    /// The nonces of the cache's claims on a volume, as far as its table knows them.
    #[must_use]
    pub fn claims(&self, volume: Uuid) -> Vec<Nonce> {
        self.rows.expected(volume)
    }

    /// Dirty blocks of a volume that the log alone holds. Some may have been pushed since.
    #[must_use]
    pub fn logged_blocks(&self, volume: Uuid) -> u64 {
        let row = self.rows.find(volume).filter(|row| !row.released);
        row.and_then(|row| self.logged.get(&row.number)).map_or(0, |logged| logged.dirty_blocks)
    }

    /// Lets the shards take in what the log holds of a volume that was refused, so that what is
    /// dirty of it can be named and read. Nothing of it is served. `committed`: the epoch of the
    /// last image that this cache committed, or zero, if that is not known.
    pub fn take_in(&mut self, volume: Uuid, geometry: Geometry, committed: Epoch) {
        let Some(index) = self.index(volume) else { return };
        let refused = matches!(self.volumes[index].state, State::Refused(_));
        if !refused || self.volumes[index].in_shards {
            return;
        }
        let number = self.volumes[index].number;
        let newest = self.logged.get(&number).map_or(Epoch::ZERO, |logged| logged.epoch);
        self.links.mail_all_shards(ToShard::Attach {
            volume: number,
            object_shift: geometry.object_shift,
            blocks: geometry.blocks,
            open: committed.max(newest).next(),
            committed,
        });
        self.links.mail_all_shards(ToShard::Fenced { volume: number });
        let volume = &mut self.volumes[index];
        (volume.in_shards, volume.geometry) = (true, Some(geometry));
    }

    /// Asks a shard for some of a volume's dirty blocks. [`Event::Dirty`](super::Event::Dirty) is
    /// the answer. `None` if there is no such volume, or no such shard.
    pub fn list_dirty(&mut self, volume: Uuid, shard: ShardId, at: SalvageAt) -> Option<Ticket> {
        let volume = self.volumes[self.index(volume)?].number;
        let ticket = self.ticket();
        let mail = FromControl::ListDirty { shard, volume, at, ticket: ticket.0 };
        self.send_to_shard(shard, mail)?;
        Some(ticket)
    }

    /// Reads dirty data of a volume that is not served.
    /// [`Event::Salvaged`](super::Event::Salvaged) is the answer. `None` if there is no such
    /// volume, or no such shard.
    pub fn read_dirty(&mut self, volume: Uuid, shard: ShardId, run: DirtyRun) -> Option<Ticket> {
        let volume = self.volumes[self.index(volume)?].number;
        let ticket = self.ticket();
        self.send_to_shard(shard, FromControl::ReadDirty { shard, volume, run, ticket: ticket.0 })?;
        Some(ticket)
    }

    fn send_to_shard(&mut self, shard: ShardId, mail: FromControl) -> Option<()> {
        let core = (shard.0 < self.shards).then(|| self.links.core_of(shard))?;
        self.links.send_to_core(core, mail);
        Some(())
    }
}
