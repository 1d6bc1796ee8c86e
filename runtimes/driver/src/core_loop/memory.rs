//! A core's part in the division of memory: reports, pages that come and go, and a bound for the
//! batches that wait for the store.

use std::collections::VecDeque;

use heeler_core::event::{Input, PushRun, ToKeeper};
use heeler_core::ids::{BLOCK_BYTES, BlockRef, Epoch, OpId, PageId, VolumeId};
use heeler_core::lending::Place;
use heeler_core::shard::BudgetReport;
use heeler_core::time::{Duration, Instant};
use heeler_hw::BlockQueue;
use heeler_hw::arena::give_back;

use super::CoreLoop;
use crate::mail::ToControl;

/// Time between two reports of a shard.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// The same for one that lacks pages and has less than others.
const HURRY_EVERY: Duration = Duration::from_millis(50);
/// Such a shard is one that lost this part of its pages since its last report.
const LACK_PART: u64 = 32;

/// What a shard says of its memory. It reports in turns that happen anyway: who does nothing,
/// says nothing.
#[derive(Debug, Default)]
pub(super) struct Reports {
    last: BudgetReport,
    at: Option<Instant>,
    hurry: bool,
    /// Units of metadata that had memory when some was given back last, or since.
    units_held: u32,
}

impl Reports {
    pub(super) fn set_hurry(&mut self, hurry: bool) {
        self.hurry = hurry;
        // The share has changed: what follows from it is news.
        self.at = None;
    }

    /// Whether it is time, for a shard with so many pages that lost so many young ones by now.
    fn is_due(&self, now: Instant, pages: u32, young_evictions: u64) -> bool {
        let Some(at) = self.at else { return true };
        let lost = young_evictions - self.last.young_evictions;
        let lacks = self.hurry && lost > u64::from(pages) / LACK_PART;
        now - at >= if lacks { HURRY_EVERY } else { REPORT_EVERY }
    }
}

/// What waits until batches before it have been stored.
#[derive(Debug)]
enum Waiting {
    /// A batch that is not copied yet. Its pages stay as they are until then.
    Batch { host: usize, op: OpId, volume: VolumeId, epoch: Epoch, copy: BatchCopy },
    /// A shard has no more batches of the volume: to be said after the last one.
    Pushed { host: usize, volume: VolumeId, epoch: Epoch },
}

#[derive(Debug)]
struct BatchCopy {
    runs: Vec<PushRun>,
    blocks: Vec<BlockRef>,
}

/// Batches on their way to the store.
#[derive(Debug)]
pub(super) struct Batches {
    waiting: VecDeque<Waiting>,
    bytes: usize,
    bytes_max: usize,
}

impl Batches {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { waiting: VecDeque::new(), bytes: 0, bytes_max }
    }

    /// So many bytes are no longer held.
    pub(super) fn end(&mut self, bytes: usize) {
        self.bytes = self.bytes.checked_sub(bytes).expect("no more ends than was sent");
    }

    /// What may be sent now. One batch always may.
    fn next(&mut self) -> Option<Waiting> {
        if let Waiting::Batch { copy, .. } = self.waiting.front()? {
            let bytes = copy.blocks.len() * BLOCK_BYTES;
            if self.bytes > 0 && self.bytes + bytes > self.bytes_max {
                return None;
            }
            self.bytes += bytes;
        }
        self.waiting.pop_front()
    }
}

impl<Q: BlockQueue> CoreLoop<'_, Q> {
    /// Sends what the shards have to say of their memory, and pages that the transit no longer
    /// wants.
    pub(super) fn report_memory(&mut self) {
        let now = self.now;
        for host in self.hosts.iter_mut() {
            let counters = host.shard.buffers().counters();
            let pages = host.shard.buffers().capacity();
            if !host.reports.is_due(now, pages, counters.young_evictions) {
                continue;
            }
            let report = host.shard.budget_report();
            host.reports.at = Some(now);
            if report == host.reports.last {
                continue;
            }
            if report.meta_units_held < host.reports.units_held {
                let spare = host.shard.spare_meta();
                give_back(spare.onodes);
                give_back(spare.leaves);
                give_back(spare.rows);
            }
            host.reports.units_held = report.meta_units_held;
            host.reports.last = report;
            self.post.send_to_control(ToControl::Budget { shard: host.id, report });
        }
        let pages = self.front.transit().take_back();
        if !pages.is_empty() {
            let from = Place::Core(self.core.0.into());
            self.post.send_to_control(ToControl::Pages { from, pages });
        }
    }

    pub(super) fn take_in_pages(&mut self, to: Place, pages: &[PageId]) {
        match to {
            Place::Shard(shard) => {
                let host = shard / self.cores;
                assert_eq!(
                    usize::from(self.hosts[host].id.0),
                    shard,
                    "shard i lives on core i % n"
                );
                self.tell(host, Input::Pages(pages));
            }
            Place::Core(_) => pages.iter().for_each(|page| self.front.transit().give(*page)),
        }
    }

    /// Takes a shard's `Output::Batch`.
    pub(super) fn take_batch(&mut self, host: usize, op: OpId, volume: VolumeId, epoch: Epoch) {
        let shard = &self.hosts[host].shard;
        let (runs, blocks) = (shard.batch_runs().to_vec(), shard.batch_blocks().to_vec());
        let copy = BatchCopy { runs, blocks };
        self.batches.waiting.push_back(Waiting::Batch { host, op, volume, epoch, copy });
    }

    /// Passes a shard's mail to its keeper on, behind the batches that it speaks of.
    pub(super) fn tell_keeper(&mut self, host: usize, mail: ToKeeper) {
        if let ToKeeper::Pushed { volume, epoch } = mail {
            return self.batches.waiting.push_back(Waiting::Pushed { host, volume, epoch });
        }
        let shard = self.hosts[host].id;
        self.post.send_to_control(ToControl::Keeper { shard, mail });
    }

    /// Sends a batch, if there is one and room for it, and what is said behind it. No more in a
    /// turn: copying takes time, and clients wait for the next turn. True if there was anything.
    pub(super) fn send_batch(&mut self) -> bool {
        let mut any = false;
        while let Some(next) = self.batches.next() {
            any = true;
            match next {
                Waiting::Batch { host, op, volume, epoch, copy } => {
                    self.copy_batch(host, volume, epoch, copy);
                    self.tell(host, Input::BatchTaken(op));
                    break;
                }
                Waiting::Pushed { host, volume, epoch } => {
                    let (shard, mail) = (self.hosts[host].id, ToKeeper::Pushed { volume, epoch });
                    self.post.send_to_control(ToControl::Keeper { shard, mail });
                }
            }
        }
        any
    }

    fn copy_batch(&mut self, host: usize, volume: VolumeId, epoch: Epoch, copy: BatchCopy) {
        let BatchCopy { runs, blocks } = copy;
        let crcs = blocks.iter().map(|block| block.crc).collect();
        let mut bytes = Vec::with_capacity(blocks.len() * BLOCK_BYTES);
        for block in blocks {
            self.arena.with(block.page, |page| bytes.extend_from_slice(page));
        }
        let shard = self.hosts[host].id;
        self.post.send_to_control(ToControl::Batch { shard, volume, epoch, runs, crcs, bytes });
    }
}
