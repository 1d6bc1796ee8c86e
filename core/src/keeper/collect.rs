//! Garbage collection: what is in the store and of no use goes, and packs that hold little of use
//! are rewritten.
//!
//! ```text
//! Idle --enough was pushed--> Scanning --all counted--> Idle
//! Idle --too much garbage, or a flattening--> Rewriting --copies put--> Ready
//!   --a checkpoint takes the copies in--> Folding --its head is committed--> Idle
//! ```
//!
//! Nothing here is waited for by a push, and nothing is lost with it: it holds only what a scan
//! would find again.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::StoreResult;
use super::map::Map;
use super::rewrite::{Moves, Rewrite};
use super::scan::Scan;
use super::store::{Io, Request, Task};
use super::usage::{StoreBytes, Usage};
use crate::ids::Epoch;
use crate::wire::head::{Head, TailPack};
use crate::wire::map_page::{MapPage, PackRef};
use crate::wire::names::ObjectName;

/// Everything is counted when so many bytes were pushed for each map page that is read for it.
const PAGE_COST: u64 = 512 << 10;

/// A map page that a checkpoint wrote anew, with the volume's own packs before and after.
#[derive(Debug)]
pub(super) struct Folded {
    pub(super) page: u32,
    pub(super) before: Vec<(PackRef, u16)>,
    pub(super) after: Vec<(PackRef, u16)>,
}

#[derive(Debug)]
enum State {
    Idle,
    Scanning(Box<Scan>),
    Rewriting(Box<Rewrite>),
    Ready(Vec<u32>, Moves),
    Folding,
}

#[derive(Debug)]
pub(super) struct Collect {
    usage: Usage,
    /// Everything has been counted.
    known: bool,
    state: State,
    /// Packs of copies that were named in this term.
    copies: u32,
    /// Bytes that pushes have put in this term.
    pushed_bytes: u64,
    /// The last rewriting gained nothing: no other before something has changed.
    stalled: bool,
    /// What was counted has changed, or there is time again: look for what to do. Looking goes
    /// through all packs, so it is not done for every input of the keeper.
    due: bool,
    /// What the store held when that was done last.
    bytes: StoreBytes,
    /// A flattening: the page to go on with, and pages of other volumes that are left.
    flatten: Option<u32>,
}

impl Collect {
    pub(super) fn new() -> Self {
        Self {
            usage: Usage::default(),
            known: false,
            state: State::Idle,
            copies: 0,
            pushed_bytes: 0,
            stalled: false,
            due: false,
            bytes: StoreBytes::default(),
            flatten: None,
        }
    }

    /// What the store held as of the last commit, if it is known.
    pub(super) fn store_bytes(&self) -> Option<StoreBytes> {
        self.known.then_some(self.bytes)
    }

    /// A head is committed: packs and snapshots may have come and gone.
    pub(super) fn handle_commit(&mut self) {
        self.due = true;
    }

    /// Copies everything that lies in other volumes, bit by bit.
    pub(super) fn flatten(&mut self) {
        self.flatten.get_or_insert(0);
        self.due = true;
    }

    /// Gives up what is under way: a release does not wait for it.
    pub(super) fn abandon(&mut self, io: &mut Io<'_>) {
        match core::mem::replace(&mut self.state, State::Idle) {
            State::Idle => return,
            State::Rewriting(rewrite) => rewrite.abandon(io),
            // The checkpoint that takes the copies in goes on.
            State::Folding => {
                self.state = State::Folding;
                return;
            }
            State::Scanning(_) | State::Ready(..) => {}
        }
        io.store.cancel(Task::collects);
    }

    /// What is in use has changed in a way that nobody has counted: everything is counted anew, and
    /// soon.
    pub(super) fn recount(&mut self, io: &mut Io<'_>) {
        self.abandon(io);
        self.usage.forget_packs();
        self.known = false;
        (self.stalled, self.due) = (false, true);
        self.pushed_bytes = self.pushed_bytes.max(io.config.collect_after);
        // What it had copied is lost.
        if self.flatten.is_some() {
            self.flatten = Some(0);
        }
    }

    /// A push is committed.
    pub(super) fn handle_push(&mut self, packs: &[TailPack], bytes: &[u64]) {
        self.stalled = false;
        self.pushed_bytes += bytes.iter().sum::<u64>();
        if self.known || matches!(self.state, State::Scanning(_)) {
            for (pack, bytes) in packs.iter().zip(bytes) {
                self.usage.add(pack.epoch, pack.n, *bytes);
                self.usage.enter_tail(pack.epoch, pack.n);
            }
        }
    }

    /// A checkpoint is committed; it folded these packs of the tail. What it left out is dead from
    /// `epoch` on: the one after the epoch of the last head that had it. (A head without a push has
    /// the same epoch as the one before it.)
    pub(super) fn handle_checkpoint(&mut self, pages: &[Folded], tail: &[TailPack], epoch: Epoch) {
        let counted = |folded: &&Folded| match &self.state {
            State::Scanning(scan) => scan.has_counted(folded.page),
            _ => self.known,
        };
        let (counted, missed): (Vec<&Folded>, Vec<&Folded>) = pages.iter().partition(counted);
        // A scan will not see them any more, but a snapshot that was made meanwhile may need them.
        for (pack, _) in missed.iter().flat_map(|folded| &folded.before) {
            self.usage.note_snapshot((pack.epoch, pack.n), Epoch(epoch.0 - 1));
        }
        counted.iter().for_each(|folded| self.usage.count(&folded.after));
        counted.iter().for_each(|folded| self.usage.discount(&folded.before, epoch));
        for pack in tail.iter().filter(|pack| pack.source == 0) {
            self.usage.leave_tail((pack.epoch, pack.n), epoch);
        }
        if matches!(self.state, State::Folding) {
            self.state = State::Idle;
        }
    }

    /// A version of a map page that only snapshots need from `dead` on.
    pub(super) fn note_page(&mut self, page: u32, epoch: Epoch, dead: Epoch) {
        self.usage.note_page(page, epoch, dead);
    }

    /// What a checkpoint is to take in, if something waits for one.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready(..))
    }

    pub(super) fn take_ready(&mut self) -> (Vec<u32>, Moves) {
        match core::mem::replace(&mut self.state, State::Folding) {
            State::Ready(pages, moves) => (pages, moves),
            other => {
                self.state = other;
                (Vec::new(), Moves::new())
            }
        }
    }

    /// The end of one of its operations.
    pub(super) fn handle_done(
        &mut self,
        io: &mut Io<'_>,
        head: &Head,
        request: Request,
        result: StoreResult<'_>,
    ) {
        match (&mut self.state, request.task) {
            (
                State::Scanning(scan),
                Task::ScanList | Task::ScanHead { .. } | Task::ScanPage { .. },
            ) => scan.handle_done(io, head, &mut self.usage, request, result),
            (State::Rewriting(rewrite), Task::ReadVictim { .. }) => {
                rewrite.handle_header(io, head, request, result);
            }
            (State::Rewriting(rewrite), Task::Gather) => {
                rewrite.handle_gathered(io, head, request, result);
            }
            (State::Rewriting(rewrite), Task::PutCopy) => match result {
                StoreResult::Done => {
                    let (epoch, n, bytes) = rewrite.handle_put(io);
                    if self.known {
                        self.usage.add(epoch, n, bytes);
                    }
                }
                result => io.again(request, super::held::fault(result)),
            },
            _ => unreachable!("what is given up is cancelled"),
        }
    }

    /// A page that a rewriting waited for.
    pub(super) fn handle_loaded(&mut self, head: &Head, map: &Map, page: u32, base: &MapPage) {
        if let State::Rewriting(rewrite) = &mut self.state {
            rewrite.handle_loaded(head, map, page, base);
        }
    }

    /// Goes on as far as it can; what it returns is of no use to anybody. `folding`: the epoch in
    /// the names of map pages that no head names yet.
    pub(super) fn settle(
        &mut self,
        io: &mut Io<'_>,
        head: &Head,
        map: &mut Map,
        folding: Option<Epoch>,
    ) -> Vec<ObjectName> {
        let mut gone = Vec::new();
        match &mut self.state {
            State::Idle => {}
            State::Scanning(scan) => {
                if scan.settle(io, head)
                    && let State::Scanning(scan) = core::mem::replace(&mut self.state, State::Idle)
                {
                    gone = scan.finish(head, &mut self.usage, folding);
                    self.known = true;
                    self.due = true;
                }
            }
            State::Rewriting(rewrite) => {
                if rewrite.settle(io, head, map, &mut self.copies)
                    && let State::Rewriting(rewrite) =
                        core::mem::replace(&mut self.state, State::Idle)
                {
                    self.copied(*rewrite);
                }
            }
            State::Ready(..) | State::Folding => {}
        }
        if core::mem::take(&mut self.due) {
            if self.known {
                gone.extend(self.usage.take_dead(&head.snapshots));
                self.bytes = self.usage.bytes(&head.snapshots);
            }
            if matches!(self.state, State::Idle) {
                self.begin(io, head, map);
            }
        }
        gone
    }

    fn copied(&mut self, rewrite: Rewrite) {
        let (pages, moves, next) = rewrite.finish();
        self.due = true;
        if self.flatten.is_some() {
            self.flatten = Some(next.unwrap_or(u32::MAX));
        }
        if moves.is_empty() && pages.is_empty() {
            self.stalled = true;
        } else {
            self.state = State::Ready(pages, moves);
        }
    }

    /// Starts what is to be done.
    fn begin(&mut self, io: &mut Io<'_>, head: &Head, map: &Map) {
        if let Some(first) = self.flatten.filter(|first| *first < u32::MAX) {
            self.state = State::Rewriting(Box::new(Rewrite::foreign(io, head, map, first)));
            return;
        }
        if !self.known {
            let reading = head.pages.len() as u64 * PAGE_COST;
            if self.pushed_bytes >= io.config.collect_after.max(reading) {
                self.state = State::Scanning(Box::new(Scan::start(io, head)));
            }
            return;
        }
        let StoreBytes { packs, live, .. } = self.bytes;
        let garbage = packs.saturating_sub(live);
        let allowed = live * u64::from(io.config.garbage_percent) / 100;
        if self.stalled || garbage <= allowed.max(io.config.garbage_min) {
            return;
        }
        // To three quarters of what is allowed: every block that is copied costs, and others die
        // meanwhile.
        let excess = garbage - allowed / 4 * 3;
        let blocks_max = io.config.copy_blocks_max as u32;
        let victims = self.usage.victims(&head.snapshots, blocks_max, excess);
        if victims.is_empty() {
            self.stalled = true;
            return;
        }
        self.state = State::Rewriting(Box::new(Rewrite::packs(io, head, victims)));
    }

    /// Whether a flattening has come to its end: nothing lies in other volumes. Says so once.
    pub(super) fn has_flattened(&mut self, head: &Head) -> bool {
        let all = self.flatten == Some(u32::MAX) && matches!(self.state, State::Idle);
        let done = all && head.is_flat();
        if done {
            self.flatten = None;
        }
        done
    }

    /// Pages that a flattening has to look at, and how many of them it has not.
    pub(super) fn flatten_pages(&self, head: &Head) -> Option<(u64, u64)> {
        let first = self.flatten?;
        Some((head.pages.len() as u64, head.pages.range(first..).count() as u64))
    }
}
