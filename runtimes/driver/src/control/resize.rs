//! A volume's size, name and whether it can be written, while clients use it.
//!
//! The size: it is the keeper's head that says it; what lies behind an
//! earlier end is discarded by the shards before.

use std::collections::BTreeMap;
use std::ops::Range;

use heeler_core::event::ToShard;
use heeler_core::wire::names::Uuid;

use super::{Control, Event, StoreIo, TableIo, Ticket};
use crate::mail::FromControl;

/// Cuts under way: how many shards have not answered, and whether all others have done it.
pub(super) type Cuts = BTreeMap<Ticket, (u16, bool)>;

impl<S: StoreIo, T: TableIo> Control<S, T> {
    /// Keeps clients from the blocks of a volume from `limit` on, until its size changes; `None`:
    /// no longer. False if there is no such volume.
    pub fn limit(&mut self, volume: Uuid, limit: Option<u64>) -> bool {
        let Some(index) = self.index(volume) else { return false };
        let (volume, attached) = (self.volumes[index].number, &self.volumes[index].attached);
        let Some(blocks) = attached.as_ref().map(|attached| attached.blocks) else { return false };
        let limit = limit.unwrap_or(blocks).min(blocks);
        self.links.mail_all_shards(ToShard::Size { volume, blocks, limit });
        true
    }

    /// Discards blocks that clients are kept from. [`Event::Cut`] is the end. `None` if there is no
    /// such volume.
    pub fn cut(&mut self, volume: Uuid, blocks: Range<u64>) -> Option<Ticket> {
        let volume = &self.volumes[self.index(volume)?];
        let shift = u32::from(volume.attached.as_ref()?.object_shift);
        let (volume, object_blocks) = (volume.number, 1 << (shift - heeler_core::ids::BLOCK_SHIFT));
        let ticket = self.ticket();
        self.cuts.insert(ticket, (self.shards, true));
        self.links.send_to_all(|| FromControl::Cut {
            volume,
            object_blocks,
            blocks: blocks.clone(),
            ticket: ticket.0,
        });
        Some(ticket)
    }

    /// A volume has another name from now on: its head says so. Clients that connect use that, also
    /// for its snapshots.
    pub fn rename(&mut self, volume: Uuid, name: &str) {
        for known in &mut self.volumes {
            let of_it = known.view.is_some_and(|of| of.volume == volume);
            if let Some((_, snapshot)) = known.name.split_once('@').filter(|_| of_it) {
                known.name = format!("{name}@{snapshot}");
            } else if known.uuid == volume {
                log::info!("volume {}: is called {name} now", known.name);
                known.name = name.into();
            }
        }
        self.publish();
    }

    /// Whether clients may change a volume, from now on; it is not noted anywhere.
    pub fn set_read_only(&mut self, volume: Uuid, read_only: bool) {
        let found = self.index(volume).and_then(|index| self.volumes[index].attached.as_mut());
        if let Some(attached) = found {
            attached.settings.read_only = read_only;
            self.publish();
        }
    }

    /// One shard has cut.
    pub(super) fn handle_cut(&mut self, ticket: Ticket, done: bool) {
        let Some((left, all)) = self.cuts.get_mut(&ticket) else { return };
        *left -= 1;
        *all &= done;
        if *left == 0 {
            let (_, done) = self.cuts.remove(&ticket).expect("found above");
            self.events.push_back(Event::Cut { ticket, done });
        }
    }

    /// A head with another size is committed, and the shards have been told. Clients are when every
    /// core knows that they were.
    pub(super) fn resized(&mut self, index: usize, blocks: u64) {
        let volume = &mut self.volumes[index];
        let attached = volume.attached.as_mut().expect("only a volume that is ours changes");
        log::info!("volume {}: {} blocks, now {blocks}", volume.name, attached.blocks);
        attached.blocks = blocks;
        self.introduce(index);
    }
}
