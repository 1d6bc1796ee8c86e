//! The control thread's mailboxes to and from every core.

use std::collections::VecDeque;
use std::sync::Arc;

use heeler_core::event::ToShard;
use heeler_core::ids::{OpId, PageId, ShardId};
use heeler_core::lending::Place;
use heeler_core::shard::Budget;

use crate::mail::{ExportInfo, FetchedPiece, FromControl, ToControl};
use crate::wires::ControlLink;

/// One core, and the mail for it that waits for the end of the turn, or for room: order is kept,
/// nothing is dropped.
#[derive(Debug)]
struct Link {
    core: ControlLink,
    overflow: VecDeque<FromControl>,
}

/// All cores. Shard `i` lives on core `i % cores`.
#[derive(Debug)]
pub(super) struct Links {
    links: Vec<Link>,
    shards: u16,
}

impl Links {
    pub(super) fn new(cores: Vec<ControlLink>, shards: u16) -> Self {
        assert!(!cores.is_empty(), "an appliance has a core");
        let link = |core| Link { core, overflow: VecDeque::new() };
        Self { links: cores.into_iter().map(link).collect(), shards }
    }

    pub(super) fn cores(&self) -> usize {
        self.links.len()
    }

    /// The next mail of a core.
    pub(super) fn pop(&mut self, core: usize) -> Option<ToControl> {
        self.links[core].core.from_core.pop().ok()
    }

    /// Whether a core has sent something, or there is room for what could not be sent.
    pub(super) fn has_news(&mut self) -> bool {
        self.links.iter_mut().any(|link| {
            let waits = !link.overflow.is_empty();
            link.core.from_core.has_news() || (waits && link.core.to_core.0.free() > 0)
        })
    }

    /// Whether everything has been sent.
    pub(super) fn is_drained(&self) -> bool {
        self.links.iter().all(|link| link.overflow.is_empty())
    }

    pub(super) fn send_to_core(&mut self, core: usize, mail: FromControl) {
        self.links[core].overflow.push_back(mail);
    }

    pub(super) fn send_to_all(&mut self, mail: impl Fn() -> FromControl) {
        for core in 0..self.links.len() {
            self.send_to_core(core, mail());
        }
    }

    pub(super) fn mail(&mut self, shard: ShardId, mail: ToShard) {
        self.send_to_core(self.core_of(shard), FromControl::Shard { shard, mail });
    }

    pub(super) fn mail_all_shards(&mut self, mail: ToShard) {
        for shard in 0..self.shards {
            self.mail(ShardId(shard), mail);
        }
    }

    pub(super) fn answer_fetch(
        &mut self,
        shard: ShardId,
        op: OpId,
        pieces: Option<Vec<FetchedPiece>>,
    ) {
        self.send_to_core(self.core_of(shard), FromControl::Fetched { shard, op, pieces });
    }

    pub(super) fn answer_query(&mut self, shard: ShardId, op: OpId, data: Option<Vec<bool>>) {
        self.send_to_core(self.core_of(shard), FromControl::Queried { shard, op, data });
    }

    pub(super) fn budget(&mut self, shard: usize, budget: Budget, hurry: bool) {
        let shard = ShardId(shard as u16);
        self.send_to_core(self.core_of(shard), FromControl::Budget { shard, budget, hurry });
    }

    pub(super) fn pages(&mut self, to: Place, pages: Vec<PageId>) {
        let core = match to {
            Place::Shard(shard) => self.core_of(ShardId(shard as u16)),
            Place::Core(core) => core,
        };
        self.send_to_core(core, FromControl::Pages { to, pages });
    }

    pub(super) fn exports(&mut self, exports: &Arc<[ExportInfo]>) {
        self.send_to_all(|| FromControl::Exports(exports.clone()));
    }

    /// Moves waiting mail into the mailboxes and wakes who got some. True if all of it went.
    pub(super) fn flush(&mut self) -> bool {
        for link in &mut self.links {
            let (to, bell) = &mut link.core.to_core;
            let mut pushed = false;
            while let Some(mail) = link.overflow.pop_front() {
                if let Err(mail) = to.push(mail) {
                    link.overflow.push_front(mail);
                    break;
                }
                pushed = true;
            }
            if pushed {
                bell.ring();
            }
        }
        self.is_drained()
    }

    pub(super) fn core_of(&self, shard: ShardId) -> usize {
        usize::from(shard.0) % self.links.len()
    }
}
