//! The volume grows and shrinks, as a server makes it.

use super::*;

/// How far a change of the size is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sizing {
    /// There is none.
    Rest,
    /// Shards are being told to keep clients from what is to go, down to this many bytes.
    Limiting(usize),
    /// It is being discarded; the next byte.
    Cutting(usize),
    /// A discard is being handed in.
    Asking,
    /// A commit is to say it.
    Committing,
}

impl Life<'_, '_> {
    /// Goes on with the change, or begins one.
    pub(super) fn change_size(&mut self) {
        match self.sizing {
            Sizing::Rest if self.limit < self.size => {
                let is_size = |mail: &ToShard| matches!(mail, ToShard::Size { .. });
                if !self.to_shard.iter().flatten().any(is_size) {
                    self.limit = self.size;
                }
            }
            Sizing::Rest if self.world.rng.chance(1, 40) => self.begin_size(),
            Sizing::Rest | Sizing::Asking | Sizing::Committing => {}
            Sizing::Limiting(target) => {
                let is_size = |mail: &ToShard| matches!(mail, ToShard::Size { .. });
                if !self.to_shard.iter().flatten().any(is_size) {
                    self.sizing = Sizing::Cutting(target);
                }
            }
            Sizing::Cutting(next) if next < self.size => self.cut(next),
            Sizing::Cutting(_) if self.cuts.is_empty() => self.commit_size(self.limit),
            Sizing::Cutting(_) => {}
        }
    }

    fn begin_size(&mut self) {
        let rng = &mut self.world.rng;
        let target = (1 + rng.index(self.world.volume_bytes / BLOCK_BYTES)) * BLOCK_BYTES;
        if target > self.size {
            return self.commit_size(target);
        }
        let (volume, blocks) = (self.world.volume, (self.size / BLOCK_BYTES) as u64);
        let limit = (target / BLOCK_BYTES) as u64;
        for mails in &mut self.to_shard {
            mails.push_back(ToShard::Size { volume, blocks, limit });
        }
        self.limit = target;
        self.sizing = Sizing::Limiting(target);
    }

    /// Discards what is to go of one object.
    fn cut(&mut self, at: usize) {
        if self.requests.len() + self.leases.len() >= 24 {
            return;
        }
        let end = (at / OBJECT_BYTES * OBJECT_BYTES + OBJECT_BYTES).min(self.size);
        let stamp = self.stamp();
        let now = self.world.now;
        self.world.history.issue(stamp, at / SECTOR, (end - at) / SECTOR, true, now);
        self.sizing = Sizing::Asking;
        let id = self.next_request;
        self.cuts.insert(id);
        self.send(RequestKind::Discard, false, at, end - at, Asked::Change { stamp, fua: false });
        self.sizing = Sizing::Cutting(end);
    }

    fn commit_size(&mut self, bytes: usize) {
        let (ticket, now) = (self.next_request, self.now());
        self.next_request += 1;
        self.pushes.insert(ticket, self.world.now);
        self.sizing = Sizing::Committing;
        let edit = Edit::Blocks((bytes / BLOCK_BYTES) as u64);
        self.keeper.handle(now, keeper::Input::Edit { edit: &edit, ticket });
        self.drain_keeper();
    }

    /// A commit says it. Clients may use what is new when all shards know of it.
    pub(super) fn resized(&mut self, blocks: u64) {
        let bytes = blocks as usize * BLOCK_BYTES;
        assert!(matches!(self.sizing, Sizing::Committing));
        if bytes > self.size {
            self.world.stats.grown += 1;
        } else {
            self.world.stats.shrunk += 1;
        }
        self.size = bytes;
        self.limit = self.limit.min(bytes);
        self.sizing = Sizing::Rest;
    }
}
