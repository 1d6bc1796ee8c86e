//! The volume table: which number in the log is which volume, and by which claim it is ours.

use heeler_core::ids::VolumeId;
use heeler_core::limits::VOLUMES_MAX;
use heeler_core::wire::names::{Nonce, Uuid};
use heeler_core::wire::superblock::{VolumeRow, VolumeTable};

use super::TableIo;

/// The table in memory; every change is durable before it is acted upon.
#[derive(Debug)]
pub(super) struct Rows<T> {
    table: VolumeTable,
    io: T,
}

impl<T: TableIo> Rows<T> {
    pub(super) fn new(table: VolumeTable, io: T) -> Self {
        Self { table, io }
    }

    pub(super) fn all(&self) -> &[VolumeRow] {
        &self.table.rows
    }

    pub(super) fn find(&self, volume: Uuid) -> Option<&VolumeRow> {
        self.table.rows.iter().find(|row| row.uuid == volume.0)
    }

    /// A number that was never given out before.
    pub(super) fn new_number(&mut self) -> VolumeId {
        let number = self.table.next_number.max(1);
        self.table.next_number = number.checked_add(1).expect("a cache knows 2^32 volumes");
        VolumeId(number)
    }

    /// The claims by which this cache may hold the volume.
    pub(super) fn expected(&self, volume: Uuid) -> Vec<Nonce> {
        let row = self.find(volume);
        let nonces = row.into_iter().flat_map(|row| [row.nonce, row.pending]);
        nonces.filter(|nonce| *nonce != NONE).map(Nonce).collect()
    }

    /// The nonce of a claim that was begun and whose end is not known. It is used again, so that
    /// two are enough to know every head that may be ours, however often a claim is cut short.
    pub(super) fn pending(&self, volume: Uuid) -> Option<Nonce> {
        self.find(volume).map(|row| row.pending).filter(|nonce| *nonce != NONE).map(Nonce)
    }

    /// A claim by this nonce may become ours, and keeps the cached contents.
    pub(super) fn remember(
        &mut self,
        volume: Uuid,
        number: VolumeId,
        nonce: Nonce,
    ) -> Result<(), String> {
        let mut row = self.find(volume).copied().unwrap_or(new_row(volume, number));
        row.pending = nonce.0;
        self.put(row)
    }

    /// A claim by this nonce may become ours, and the contents kept under other numbers are void.
    pub(super) fn renumber(
        &mut self,
        volume: Uuid,
        number: VolumeId,
        nonce: Nonce,
    ) -> Result<(), String> {
        self.put(VolumeRow { pending: nonce.0, ..new_row(volume, number) })
    }

    /// A snapshot is served from now on. Nothing of it is ever dirty, nor claimed.
    pub(super) fn add_view(&mut self, view: Uuid) -> Result<(), String> {
        if self.find(view).is_some() {
            return Ok(());
        }
        let number = self.new_number();
        self.put(VolumeRow { released: true, ..new_row(view, number) })
    }

    /// The claim by this nonce is ours.
    pub(super) fn attached(&mut self, volume: Uuid, nonce: Nonce) -> Result<(), String> {
        let row = *self.find(volume).expect("a claim is remembered before it is made");
        self.put(VolumeRow { nonce: nonce.0, pending: NONE, released: false, ..row })
    }

    /// The volume was given up with everything pushed.
    pub(super) fn released(&mut self, volume: Uuid) -> Result<(), String> {
        let row = *self.find(volume).expect("a volume that was ours has a row");
        self.put(VolumeRow { released: true, ..row })
    }

    /// Nothing of the volume's contents is kept; claims stay known.
    pub(super) fn empty(&mut self, volume: Uuid) -> Result<(), String> {
        let number = self.new_number();
        let row = *self.find(volume).expect("emptied volumes have a row");
        self.put(VolumeRow { number, released: true, ..row })
    }

    /// Nothing of the volume is kept.
    pub(super) fn remove(&mut self, volume: Uuid) -> Result<(), String> {
        self.change(|rows| {
            rows.retain(|row| row.uuid != volume.0);
            Ok(())
        })
    }

    fn put(&mut self, row: VolumeRow) -> Result<(), String> {
        self.change(|rows| {
            match rows.iter().position(|known| known.uuid == row.uuid) {
                Some(known) => rows[known] = row,
                None if rows.len() == VOLUMES_MAX => {
                    return Err(format!(
                        "this cache knows {VOLUMES_MAX} volumes, which is all it can; delete one"
                    ));
                }
                None => rows.push(row),
            }
            Ok(())
        })
    }

    /// Changes the rows in memory only if the device has them.
    fn change(
        &mut self,
        f: impl FnOnce(&mut Vec<VolumeRow>) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut next = self.table.clone();
        f(&mut next.rows)?;
        next.generation += 1;
        self.io.save(&next).map_err(|e| format!("the volume table cannot be written: {e}"))?;
        self.table = next;
        Ok(())
    }
}

const NONE: [u8; 16] = [0; 16];

fn new_row(volume: Uuid, number: VolumeId) -> VolumeRow {
    VolumeRow { number, released: false, uuid: volume.0, nonce: NONE, pending: NONE }
}
