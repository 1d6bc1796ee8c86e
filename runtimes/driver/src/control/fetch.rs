//! Fetches: the reads of packs that a keeper planned, verified block by block. What they may take
//! of memory is bounded: from when it is asked for until a core has copied it.

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytes::Bytes;
use heeler_core::ids::{BLOCK_BYTES, OpId, ShardId};
use heeler_core::keeper::PackRead;
use heeler_core::time::{Duration, Instant};
use heeler_hw::crc32c;

use super::StoreAnswer;
use crate::mail::FetchedPiece;

/// How long a read that fails is tried again before its fetch fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Wait before a failed read is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Tries of a read whose bytes do not match their checksums.
const WRONG_MAX: u32 = 3;

/// A ranged read of a pack that is under way or waits to be tried again.
#[derive(Debug)]
pub(super) struct Read {
    fetch: u64,
    pub(super) plan: PackRead,
    since: Instant,
    wrong: u32,
}

/// The answer to a shard.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) shard: ShardId,
    pub(super) op: OpId,
    pub(super) pieces: Option<Vec<FetchedPiece>>,
    /// A pack was not there: it may have been rewritten since the fetch was planned.
    pub(super) missing: bool,
}

#[derive(Debug)]
struct Fetch {
    answer: Answer,
    left: usize,
}

/// The fetches under way.
#[derive(Debug)]
pub(super) struct Fetches {
    fetches: BTreeMap<u64, Fetch>,
    next: u64,
    /// Bytes of each fetch that has begun and whose blocks have not been copied, and of all.
    held: HashMap<(ShardId, OpId), usize>,
    held_bytes: usize,
    bytes_max: usize,
    /// Fetches that wait until there is room.
    queued: VecDeque<((ShardId, OpId), Vec<PackRead>)>,
    /// Reads that failed, by the time they are due.
    waiting: Vec<(Instant, Read)>,
}

impl Fetches {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            fetches: BTreeMap::new(),
            next: 0,
            held: HashMap::new(),
            held_bytes: 0,
            bytes_max,
            queued: VecDeque::new(),
            waiting: Vec::new(),
        }
    }

    /// Takes a fetch of at least one read; [`poll_begun`](Self::poll_begun) begins it.
    pub(super) fn add(&mut self, whose: (ShardId, OpId), reads: Vec<PackRead>) {
        self.queued.push_back((whose, reads));
    }

    /// The reads of the next fetch for which there is room; each must be sent to the store. One
    /// fetch always has room.
    pub(super) fn poll_begun(&mut self, now: Instant) -> Option<Vec<Read>> {
        let (_, reads) = self.queued.front()?;
        let bytes: usize = reads.iter().map(|read| read.len as usize).sum();
        if self.held_bytes > 0 && self.held_bytes + bytes > self.bytes_max {
            return None;
        }
        let ((shard, op), reads) = self.queued.pop_front().expect("just seen");
        self.held.insert((shard, op), bytes);
        self.held_bytes += bytes;
        let fetch = self.next;
        self.next += 1;
        let answer = Answer { shard, op, pieces: Some(Vec::new()), missing: false };
        self.fetches.insert(fetch, Fetch { answer, left: reads.len() });
        Some(reads.into_iter().map(|plan| Read { fetch, plan, since: now, wrong: 0 }).collect())
    }

    /// A core has copied the blocks of an answer.
    pub(super) fn handle_copied(&mut self, whose: (ShardId, OpId)) {
        // Answers without blocks are not counted.
        self.held_bytes -= self.held.remove(&whose).unwrap_or(0);
    }

    /// The store's answer to a read. `Some` if that was the last one of its fetch.
    pub(super) fn handle(
        &mut self,
        now: Instant,
        mut read: Read,
        answer: StoreAnswer,
    ) -> Option<Answer> {
        let failure = match answer {
            StoreAnswer::Got(bytes) => match pieces(&read.plan, &bytes) {
                Ok(pieces) => return self.end(read.fetch, Some(pieces)),
                Err(why) => why,
            },
            StoreAnswer::Failed { transient: true, .. } if now - read.since < PATIENCE => {
                self.waiting.push((now + RETRY_AFTER, read));
                return None;
            }
            StoreAnswer::Failed { text, .. } => {
                log::error!("a fetch fails: {text}");
                return self.end(read.fetch, None);
            }
            _ => {
                log::debug!("pack {} is gone since a fetch was planned", read.plan.key);
                let fetch = self.fetches.get_mut(&read.fetch).expect("a read belongs to a fetch");
                fetch.answer.missing = true;
                return self.end(read.fetch, None);
            }
        };
        read.wrong += 1;
        if read.wrong < WRONG_MAX {
            log::warn!("pack {} {failure}; trying again", read.plan.key);
            self.waiting.push((now + RETRY_AFTER, read));
            return None;
        }
        log::error!("pack {} {failure}; run `heeler check`", read.plan.key);
        self.end(read.fetch, None)
    }

    /// A read whose time has come.
    pub(super) fn poll_due(&mut self, now: Instant) -> Option<Read> {
        let index = self.waiting.iter().position(|(due, _)| *due <= now)?;
        Some(self.waiting.swap_remove(index).1)
    }

    /// When to come back.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.waiting.iter().map(|(due, _)| *due).min()
    }

    fn end(&mut self, number: u64, pieces: Option<Vec<FetchedPiece>>) -> Option<Answer> {
        let fetch = self.fetches.get_mut(&number).expect("a fetch ends with its last read");
        match (&mut fetch.answer.pieces, pieces) {
            (Some(all), Some(mut pieces)) => all.append(&mut pieces),
            (all, _) => *all = None,
        }
        fetch.left -= 1;
        if fetch.left > 0 {
            return None;
        }
        self.fetches.remove(&number).map(|fetch| fetch.answer)
    }
}

/// The wanted blocks of a read, each compared with its checksum.
pub(super) fn pieces(plan: &PackRead, bytes: &Bytes) -> Result<Vec<FetchedPiece>, String> {
    if bytes.len() != plan.len as usize {
        return Err(format!("gave {} bytes of {} asked for", bytes.len(), plan.len));
    }
    let mut pieces = Vec::with_capacity(plan.parts.len());
    for part in &plan.parts {
        let from = part.at as usize * BLOCK_BYTES;
        let part_bytes = bytes.slice(from..from + part.crcs.len() * BLOCK_BYTES);
        for (index, (block, crc)) in part_bytes.chunks(BLOCK_BYTES).zip(&part.crcs).enumerate() {
            if crc32c(0, block) != *crc {
                let at = plan.offset + (from + index * BLOCK_BYTES) as u64;
                return Err(format!("has a damaged block at byte {at}"));
            }
        }
        pieces.push(FetchedPiece { at: part.first, bytes: part_bytes });
    }
    Ok(pieces)
}
