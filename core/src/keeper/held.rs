//! A volume that is ours: when to push, the commit, the release, and what is superseded.
//!
//! A head takes in all that is ready when it is made: a push, a checkpoint, edits.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::checkpoint::Checkpoint;
use super::claim;
use super::collect::{Collect, Folded};
use super::cycle::{Cycle, broadcast};
use super::map::{Loaded, Map, Wanted};
use super::open::Opened;
use super::store::{Call, Fault, Io, Request, Task};
use super::{Edit, Input, Output, Owner, Phase, StoreBytes, StoreResult};
use crate::event::{ToKeeper, ToShard};
use crate::ids::{BLOCK_BYTES, Epoch, ShardId};
use crate::time::{Duration, Instant};
use crate::wire::head::{Head, Settings};
use crate::wire::names;

/// Superseded objects that are deleted at the same time at most.
const DELETES_MAX: usize = 4;
/// Failures of a deletion that are not the last.
const DELETE_ATTEMPTS_MAX: u32 = 4;
/// A tail is folded into the map pages when it has so many times the bytes that these take.
const TAIL_RATIO: u64 = 16;

/// A volume that is ours.
#[derive(Debug)]
pub(super) struct Held {
    /// The newest head.
    pub(super) head: Head,
    /// Writes belong to this epoch.
    open: Epoch,
    /// The image is as of this epoch (later than the head's, if nothing changed since).
    committed: Epoch,
    /// As of the last edit; the head has them when that is committed.
    settings: Settings,
    map: Map,
    cycle: Option<Cycle>,
    checkpoint: Option<Checkpoint>,
    /// Its pages are in the store.
    folded: bool,
    /// The names of map pages that were written in this term have lower epochs.
    next_page_epoch: Epoch,
    /// Bytes of data in the tail's packs.
    tail_bytes: u64,
    collect: Collect,
    /// Who waits for a flattening.
    flatteners: Vec<u64>,
    /// The head that is being created.
    next: Option<Next>,
    /// When the oldest block that no cycle covers became dirty.
    dirty_since: Option<Instant>,
    /// When it was last seen, or asked, whether the volume is still ours.
    proved: Instant,
    /// A cycle must start, without waiting for age.
    wanted: bool,
    /// Who waits for the next cycle.
    tickets: Vec<u64>,
    /// What the next cycle's commit changes.
    edits: Vec<Edit>,
    detaching: bool,
    released: bool,
    superseded: VecDeque<String>,
    deleting: usize,
    pushed_bytes: u64,
}

/// A head that is being created.
#[derive(Debug)]
struct Next {
    head: Head,
    /// The push that runs is in it.
    pushes: bool,
    /// The checkpoint's pages are in it.
    folds: bool,
}

/// What a head is made for; a checkpoint's pages are in it if they are ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Commit {
    Push,
    Checkpoint,
    Release,
}

/// Whether the volume stays ours.
#[derive(Debug)]
pub(super) enum Fate {
    Held,
    Released,
    Fenced(Option<Owner>),
}

impl Held {
    /// The volume has just been claimed by `head`.
    pub(super) fn new(now: Instant, head: Head, superseded: Option<u32>, opened: Opened) -> Self {
        let key = superseded.map(|number| names::head_key(head.volume, number));
        Self {
            open: Epoch::first_of_term(head.term),
            committed: head.epoch,
            settings: head.settings.clone(),
            next_page_epoch: Epoch::first_of_term(head.term),
            head,
            map: opened.map,
            cycle: None,
            checkpoint: None,
            folded: false,
            tail_bytes: opened.tail_bytes,
            collect: Collect::new(),
            flatteners: Vec::new(),
            next: None,
            dirty_since: None,
            proved: now,
            wanted: false,
            tickets: Vec::new(),
            edits: Vec::new(),
            detaching: false,
            released: false,
            superseded: key.into_iter().collect(),
            deleting: 0,
            pushed_bytes: 0,
        }
    }

    /// Tells the shards to serve the volume.
    pub(super) fn attach(&self, io: &mut Io<'_>) {
        let mail = ToShard::Attach {
            volume: io.volume,
            object_shift: self.head.object_shift,
            blocks: self.head.blocks,
            open: self.open,
            committed: self.committed,
        };
        broadcast(io, mail);
        if self.settings != Settings::default() {
            self.tell_settings(io);
        }
    }

    fn tell_settings(&self, io: &mut Io<'_>) {
        let Settings { mode, buffering, pinned, .. } = self.settings;
        broadcast(io, ToShard::Settings { volume: io.volume, mode, buffering, pinned });
    }

    pub(super) fn open(&self) -> Epoch {
        self.open
    }

    pub(super) fn committed(&self) -> Epoch {
        self.committed
    }

    pub(super) fn pushed_bytes(&self) -> u64 {
        self.pushed_bytes
    }

    pub(super) fn store_bytes(&self) -> Option<StoreBytes> {
        self.collect.store_bytes()
    }

    pub(super) fn flatten_pages(&self) -> Option<(u64, u64)> {
        self.collect.flatten_pages(&self.head)
    }

    pub(super) fn dirty_since(&self) -> Option<Instant> {
        self.cycle.as_ref().and_then(|cycle| cycle.dirty_since).or(self.dirty_since)
    }

    /// Bytes of the running push, and how many of them are not in the store yet.
    pub(super) fn push_bytes(&self) -> (u64, u64) {
        let (announced, stored) = self.cycle.as_ref().map_or((0, 0), Cycle::blocks);
        let block = BLOCK_BYTES as u64;
        (announced * block, announced.saturating_sub(stored) * block)
    }

    pub(super) fn phase(&self) -> Phase {
        match (&self.cycle, &self.next) {
            (Some(_), _) => Phase::Pushing,
            (None, Some(next)) if !next.head.released => Phase::Pushing,
            (None, Some(_)) => Phase::Releasing,
            (None, None) if self.released => Phase::Releasing,
            (None, None) if self.dirty_since.is_some() => Phase::Dirty,
            (None, None) => Phase::Clean,
        }
    }

    pub(super) fn timeout(&self, push_after: Duration) -> Option<Instant> {
        match &self.cycle {
            Some(cycle) => cycle.timeout(),
            None if self.next.is_some() || self.released => None,
            None => self.dirty_since.map(|since| since + push_after),
        }
    }

    /// Everything but the ends of store operations.
    pub(super) fn handle(&mut self, io: &mut Io<'_>, input: Input<'_>) {
        match input {
            Input::Shard(shard, mail) => self.handle_mail(io, shard, mail),
            Input::Batch { shard, epoch, batch, runs, crcs } => {
                let cycle = self.cycle.as_mut().expect("batches come in a push");
                assert_eq!(cycle.epoch, epoch, "batches are of the closed epoch");
                cycle.handle_batch(io, &self.head, (shard, batch), runs, crcs);
            }
            Input::Fetch { shard, op, object, first, count, gaps } => {
                let blocks = (first, count);
                let wanted = Wanted::new(&self.head, (shard, op), object, blocks, Some(gaps));
                self.map.want(io, &self.head, wanted);
            }
            Input::Query { shard, op, object, first, count } => {
                let wanted = Wanted::new(&self.head, (shard, op), object, (first, count), None);
                self.map.want(io, &self.head, wanted);
            }
            Input::PushNow { ticket } => {
                self.tickets.push(ticket);
                self.wanted = true;
            }
            Input::Edit { edit, ticket } => self.edit(io, edit, ticket),
            Input::Flatten { ticket } => {
                self.flatteners.push(ticket);
                self.collect.flatten();
            }
            Input::Detach => {
                // The last cycle starts now, so that it covers what is dirty without our knowing.
                self.wanted |= !self.detaching;
                self.detaching = true;
            }
            Input::Stay => {
                // A release that is on its way to the store cannot be called back.
                self.detaching &= self.phase() == Phase::Releasing;
            }
            Input::Tick => {
                if let Some(cycle) = &mut self.cycle {
                    cycle.tick(io, &self.head);
                }
            }
            Input::Start(_)
            | Input::View { .. }
            | Input::Remembered { .. }
            | Input::StoreDone { .. } => {
                unreachable!("handled by the keeper itself")
            }
        }
    }

    /// The change is part of the next cycle's commit, so that it has its place among the writes.
    fn edit(&mut self, io: &mut Io<'_>, edit: &Edit, ticket: u64) {
        let mut head = self.head.clone();
        let under_way = self.cycle.iter().flat_map(|cycle| &cycle.edits);
        under_way.chain(&self.edits).for_each(|before| before.apply(&mut head));
        if let Err(why) = edit.check(&head) {
            return io.out.push_back(Output::EditRefused { ticket, why });
        }
        if let Edit::Settings(settings) = edit {
            self.settings.clone_from(settings);
            self.tell_settings(io);
        }
        let before = head.clone();
        edit.apply(&mut head);
        if head != before {
            self.edits.push(edit.clone());
        }
        self.tickets.push(ticket);
        self.wanted = true;
    }

    fn handle_mail(&mut self, io: &mut Io<'_>, shard: ShardId, mail: ToKeeper) {
        assert!(shard.0 < io.config.shards, "mail comes from our shards");
        // What a shard says before it freezes is covered by the cycle that freezes it.
        let covering = self.cycle.as_mut().filter(|cycle| cycle.covers(shard));
        match mail {
            ToKeeper::Dirtied { .. } => {
                let since = covering.map_or(&mut self.dirty_since, |cycle| &mut cycle.dirty_since);
                since.get_or_insert(io.now);
                self.probe(io);
            }
            ToKeeper::Grown { .. } | ToKeeper::Pressure { .. } | ToKeeper::Sync { .. } => {
                self.wanted |= covering.is_none();
            }
            ToKeeper::Frozen { epoch, blocks, .. } => {
                running(&mut self.cycle, epoch).handle_frozen(io, shard, blocks);
            }
            ToKeeper::Pushed { epoch, .. } => {
                let cycle = running(&mut self.cycle, epoch);
                cycle.handle_pushed(io, &self.head, shard);
            }
        }
    }

    /// The first write after a rest asks whether the volume is still ours, so that an owner which
    /// was fenced meanwhile does not take writes until its next commit.
    fn probe(&mut self, io: &mut Io<'_>) {
        let rested = self.proved + io.config.push_after < io.now;
        if rested && self.cycle.is_none() && self.next.is_none() {
            self.proved = io.now;
            let number = self.head.number.saturating_add(1);
            let key = names::head_key(self.head.volume, number);
            io.start(Task::Probe { number }, Call::Get(key));
        }
    }

    /// The end of a store operation.
    pub(super) fn handle_done(
        &mut self,
        io: &mut Io<'_>,
        request: Request,
        result: StoreResult<'_>,
    ) -> Fate {
        match (request.task, result) {
            (Task::Delete, StoreResult::Failed { transient: true, .. })
                if request.failures < DELETE_ATTEMPTS_MAX && !self.released =>
            {
                io.again(request, fault(result));
            }
            // What stays behind is found by the next owner's scan.
            (Task::Delete, _) => self.deleting -= 1,
            (Task::Probe { number }, StoreResult::Got(bytes)) => {
                let found = Head::decode(bytes, self.head.volume, number, io.config.crc32c);
                if let Some(found) = found.ok().filter(|found| found.nonce != self.head.nonce) {
                    return Fate::Fenced(Some(claim::owner(&found)));
                }
            }
            // What cannot be read now is left to the next commit.
            (Task::Probe { .. }, _) => {}
            (Task::LoadPage { .. }, _) => {
                if let Some(loaded) = self.map.handle_done(io, &self.head, request, result) {
                    self.handle_loaded(io, &loaded);
                }
            }
            (Task::PutPack { n }, StoreResult::Done) => {
                self.cycle.as_mut().expect("packs belong to a push").handle_pack_put(io, n);
            }
            (Task::PutPage { .. }, StoreResult::Done) => {
                self.checkpoint.as_mut().expect("it puts map pages").handle_put();
            }
            (task, _) if task.collects() => {
                self.collect.handle_done(io, &self.head, request, result);
            }
            (Task::Commit, StoreResult::Done) => self.committed_next(io),
            (Task::Commit, StoreResult::AlreadyExists) => {
                let call = Call::Get(self.next_key());
                io.start(Task::ConfirmCommit, call);
            }
            (Task::Commit, result) => {
                // Whether it took effect is unknown: look before trying again.
                let call = Call::Get(self.next_key());
                io.store.instead(io.now, request, fault(result), Task::ConfirmCommit, call);
            }
            (Task::ConfirmCommit, StoreResult::NotFound) => self.create_next(io),
            (Task::ConfirmCommit, StoreResult::Got(bytes)) => {
                return self.confirm(io, request, bytes);
            }
            (_, result) => io.again(request, fault(result)),
        }
        Fate::Held
    }

    fn handle_loaded(&mut self, io: &mut Io<'_>, loaded: &Loaded) {
        let (page, base) = (loaded.page, &loaded.content);
        if loaded.checkpoint {
            let checkpoint = self.checkpoint.as_mut().expect("it waits for the page");
            checkpoint.handle_loaded(io, &self.head, &self.map, page, base);
        }
        if loaded.rewrite {
            self.collect.handle_loaded(&self.head, &self.map, page, base);
        }
    }

    /// The head with our next number: ours, or another owner's claim.
    fn confirm(&mut self, io: &mut Io<'_>, request: Request, bytes: &[u8]) -> Fate {
        let Next { head: next, .. } = self.next.as_ref().expect("a commit is under way");
        match Head::decode(bytes, next.volume, next.number, io.config.crc32c) {
            Ok(found) if found.nonce == next.nonce && found.epoch == next.epoch => {
                self.committed_next(io);
                Fate::Held
            }
            Ok(found) => Fate::Fenced(Some(claim::owner(&found))),
            Err(_) => {
                io.again(request, Fault::WRONG);
                Fate::Held
            }
        }
    }

    /// Starts what can start. After every input.
    pub(super) fn settle(&mut self, io: &mut Io<'_>) -> Fate {
        self.collect_some(io);
        if !self.step_if_free(io) {
            return Fate::Fenced(None);
        }
        let was_folded = self.folded;
        if let Some(checkpoint) = &mut self.checkpoint {
            self.folded = checkpoint.settle(io, &self.head, &mut self.map);
        }
        if self.folded && !was_folded && !self.step_if_free(io) {
            return Fate::Fenced(None);
        }
        self.delete(io);
        if self.released && self.deleting == 0 { Fate::Released } else { Fate::Held }
    }

    fn step_if_free(&mut self, io: &mut Io<'_>) -> bool {
        self.next.is_some() || self.released || self.step(io)
    }

    /// The next cycle or commit, if it is time for one. False if there are no numbers left.
    fn step(&mut self, io: &mut Io<'_>) -> bool {
        if let Some(cycle) = &self.cycle {
            if !cycle.is_stored() {
                // What the checkpoint makes free need not wait for the end of a long push, nor will
                // the push wait for this head.
                let long = cycle.backlog_bytes() > io.config.long_push_bytes;
                return !(self.folded && long) || self.commit(io, Commit::Checkpoint);
            }
            if cycle.changed() || self.folded {
                return self.commit(io, Commit::Push);
            }
            self.finish_cycle(io);
        }
        let due = self
            .dirty_since
            .is_some_and(|since| self.detaching || since + io.config.push_after <= io.now);
        if self.wanted || due {
            self.start_cycle(io);
        } else if self.folded {
            return self.commit(io, Commit::Checkpoint);
        } else if self.detaching && self.checkpoint.is_none() {
            return self.commit(io, Commit::Release);
        }
        true
    }

    /// Garbage collection, unless the volume is being given up.
    fn collect_some(&mut self, io: &mut Io<'_>) {
        if self.detaching {
            return self.collect.abandon(io);
        }
        let folding = self.checkpoint.as_ref().map(Checkpoint::epoch);
        let gone = self.collect.settle(io, &self.head, &mut self.map, folding);
        self.superseded.extend(gone.into_iter().map(|name| names::key(self.head.volume, name)));
        if self.collect.is_ready() {
            self.start_checkpoint();
        }
        if !self.flatteners.is_empty() && self.collect.has_flattened(&self.head) {
            self.edits.push(Edit::Flattened);
            self.tickets.append(&mut self.flatteners);
            self.wanted = true;
        }
    }

    fn start_cycle(&mut self, io: &mut Io<'_>) {
        self.wanted = false;
        let tickets = core::mem::take(&mut self.tickets);
        let edits = core::mem::take(&mut self.edits);
        let cycle = Cycle::start(io, self.open, self.dirty_since.take(), tickets, edits);
        self.open = self.open.next();
        self.cycle = Some(cycle);
    }

    /// Creates the next head. False if there are no numbers left.
    fn commit(&mut self, io: &mut Io<'_>, what: Commit) -> bool {
        let Some(number) = self.head.number.checked_add(1) else { return false };
        let mut head = Head {
            number,
            written_unix_secs: io.unix_secs,
            epoch: self.committed,
            released: what == Commit::Release,
            ..self.head.clone()
        };
        if let Some(checkpoint) = self.checkpoint.as_ref().filter(|_| self.folded) {
            checkpoint.put_into(&mut head);
        }
        let pushes = what == Commit::Push;
        if let Some(cycle) = self.cycle.as_ref().filter(|_| pushes) {
            head.epoch = cycle.epoch;
            head.tail.extend_from_slice(&cycle.packs);
            cycle.edits.iter().for_each(|edit| edit.apply(&mut head));
        }
        self.next = Some(Next { head, pushes, folds: self.folded });
        self.create_next(io);
        true
    }

    fn create_next(&mut self, io: &mut Io<'_>) {
        let Next { head, .. } = self.next.as_ref().expect("a commit is under way");
        let bytes: Arc<[u8]> = head.encode(io.config.crc32c).into();
        io.store.put_bytes += bytes.len() as u64;
        io.start(Task::Commit, Call::Create { key: self.next_key(), bytes });
    }

    fn next_key(&self) -> String {
        let Next { head, .. } = self.next.as_ref().expect("a commit is under way");
        names::head_key(head.volume, head.number)
    }

    /// The next head is the newest: the image is its.
    fn committed_next(&mut self, io: &mut Io<'_>) {
        self.proved = io.now;
        let Next { head, pushes, folds } = self.next.take().expect("a commit is under way");
        let before = core::mem::replace(&mut self.head, head);
        self.supersede_heads(&before);
        if self.head.blocks != before.blocks {
            self.resized(io, &before);
        }
        if folds {
            let checkpoint = self.checkpoint.take().expect("it was in the head");
            self.folded = false;
            self.tail_bytes -= checkpoint.tail_bytes();
            let tail = &before.tail[..checkpoint.packs()];
            let folded = checkpoint.finish(&mut self.map, io.config.pages_max);
            self.collect.handle_checkpoint(&folded, tail, before.epoch.next());
            for Folded { page, .. } in folded {
                self.supersede_page(&before, page);
            }
        }
        if let Some(cycle) = self.cycle.as_mut().filter(|_| pushes) {
            if !cycle.packs.is_empty() {
                assert!(cycle.changes.sort(), "a push has each block once");
                self.map.absorb(&cycle.changes);
            }
            if self.head.blocks < before.blocks {
                self.map.cut(self.head.page_count());
            }
            self.tail_bytes += cycle.data_bytes();
            self.collect.handle_push(&cycle.packs, &cycle.pack_bytes);
            self.finish_cycle(io);
        }
        self.collect.handle_commit();
        self.released = self.head.released;
        let long = self.head.tail.len() >= io.config.tail_packs_max;
        let large = self.tail_bytes >= io.config.tail_bytes_min
            && self.tail_bytes >= TAIL_RATIO * self.map.checkpoint_bytes();
        if long || large {
            self.start_checkpoint();
        }
    }

    /// The newest head has another size than the one before. Pages that were cut off are empty:
    /// what was in them had been discarded. What their packs were needed for is counted anew.
    fn resized(&mut self, io: &mut Io<'_>, before: &Head) {
        let blocks = self.head.blocks;
        broadcast(io, ToShard::Size { volume: io.volume, blocks, limit: blocks });
        io.out.push_back(Output::Resized { blocks });
        if blocks > before.blocks {
            return;
        }
        let pages = self.head.page_count();
        let gone: Vec<u32> = before.pages.range(pages..).map(|(page, _)| *page).collect();
        gone.into_iter().for_each(|page| self.supersede_page(before, page));
        let staged = self.checkpoint.as_mut().map(|checkpoint| checkpoint.cut(pages));
        let keys = staged.into_iter().flatten();
        self.superseded
            .extend(keys.map(|(page, epoch)| names::map_key(before.volume, page, epoch)));
        self.collect.recount(io);
    }

    /// The head before this one, and those of snapshots that were dropped, are of no more use.
    fn supersede_heads(&mut self, before: &Head) {
        let dropped = before.snapshots.iter().map(|snapshot| snapshot.number);
        let numbers = dropped.chain([before.number]).filter(|number| {
            let kept = self.head.snapshots.iter().any(|snapshot| snapshot.number == *number);
            // A claim is never deleted.
            !kept && *number != before.term
        });
        let keys: Vec<_> = numbers.map(|number| names::head_key(before.volume, number)).collect();
        self.superseded.extend(keys);
    }

    /// A page has a newer version. Snapshots may need the one before.
    fn supersede_page(&mut self, before: &Head, page: u32) {
        let Some(at) = before.pages.get(&page).filter(|at| at.source == 0) else { return };
        if self.head.snapshots.iter().any(|snapshot| snapshot.epoch >= at.epoch) {
            self.collect.note_page(page, at.epoch, before.epoch.next());
        } else {
            self.superseded.push_back(names::map_key(before.volume, page, at.epoch));
        }
    }

    /// Begins to fold the tail into the map pages, and to write where copied blocks lie now.
    fn start_checkpoint(&mut self) {
        if self.checkpoint.is_some() || self.detaching || self.released {
            return;
        }
        // The pages are named by an epoch of this term that is committed, each only once.
        if self.committed < self.next_page_epoch {
            self.wanted |= self.cycle.is_none();
            return;
        }
        self.next_page_epoch = self.committed.next();
        let copied = self.collect.take_ready();
        self.checkpoint = Some(Checkpoint::start(
            &self.head,
            &mut self.map,
            self.committed,
            self.tail_bytes,
            copied,
        ));
    }

    /// Everything of the cycle is in the image.
    fn finish_cycle(&mut self, io: &mut Io<'_>) {
        let cycle = self.cycle.take().expect("a push ends once");
        self.committed = cycle.epoch;
        self.pushed_bytes += cycle.blocks().1 * BLOCK_BYTES as u64;
        broadcast(io, ToShard::Committed { volume: io.volume, epoch: cycle.epoch });
        for ticket in cycle.tickets {
            io.out.push_back(Output::PushDone { ticket, committed: true });
        }
        if self.collect.is_ready() {
            self.start_checkpoint();
        }
    }

    fn delete(&mut self, io: &mut Io<'_>) {
        while self.deleting < DELETES_MAX {
            let Some(key) = self.superseded.pop_front() else { return };
            self.deleting += 1;
            io.start(Task::Delete, Call::Delete(key));
        }
    }

    /// The volume is another's: lets go of everything.
    pub(super) fn fence(&mut self, io: &mut Io<'_>) {
        let mut tickets = core::mem::take(&mut self.tickets);
        if let Some(mut cycle) = self.cycle.take() {
            cycle.abandon(io);
            tickets.append(&mut cycle.tickets);
        }
        tickets.append(&mut self.flatteners);
        self.collect.abandon(io);
        // First, so that what fails because of it is known to.
        broadcast(io, ToShard::Fenced { volume: io.volume });
        self.map.fail_all(io);
        for ticket in tickets {
            io.out.push_back(Output::PushDone { ticket, committed: false });
        }
    }

    /// The volume is given up: whoever still asks gets no answer from the image.
    pub(super) fn let_go(&mut self, io: &mut Io<'_>) {
        self.map.fail_all(io);
        let tickets = core::mem::take(&mut self.tickets).into_iter();
        for ticket in tickets.chain(core::mem::take(&mut self.flatteners)) {
            io.out.push_back(Output::PushDone { ticket, committed: false });
        }
    }
}

fn running(cycle: &mut Option<Cycle>, epoch: Epoch) -> &mut Cycle {
    let cycle = cycle.as_mut().expect("shards answer a push");
    assert_eq!(cycle.epoch, epoch, "shards answer the push that runs");
    cycle
}

pub(super) fn fault(result: StoreResult<'_>) -> Fault {
    match result {
        StoreResult::Failed { transient, note } => Fault { transient, note: Some(note) },
        _ => Fault::WRONG,
    }
}
