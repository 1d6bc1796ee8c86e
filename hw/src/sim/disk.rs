//! A disk that exists in memory only, and fails when told to.
//!
//! What it promises is what a real disk promises, and no more:
//!
//! * operations that were submitted complete in any order ([`SimDisk::step`] does one of them,
//!   chosen at random), on any of the queues;
//! * a completed write is read back, and survives the death of the process;
//! * it survives a power cut only once a flush is done that was submitted after it completed;
//! * of everything else a crash leaves any part: [`SimDisk::crash`] chooses page by page, and tears
//!   some pages at a multiple of 512 bytes.
//!
//! There is no clock: an operation takes as long as the test likes.

use std::cell::{Ref, RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::rc::Rc;

use heeler_core::ids::PageId;

use crate::arena::Arena;
use crate::file::AlignedBuf;
use crate::queue::{
    BlockFile, BlockQueue, Completion, Full, Io, IoError, IoErrorKind, IoKind, PAGE_BYTES,
    range_fits,
};
use crate::sim::rng::Rng;

/// What a device writes at once, whatever happens.
const SECTOR_BYTES: usize = 512;

/// What happens to the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CrashKind {
    /// The process dies. Completed writes stay; of those in flight any part is done.
    Process,
    /// The power goes. Flushed writes stay; of all others any part is left.
    Power,
}

/// Operations that the disk was asked for, failed ones among them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Pages of all reads.
    pub pages_read: u64,
    /// Pages of all writes.
    pub pages_written: u64,
}

/// A simulated disk. Clones are handles to the same disk.
#[derive(Clone)]
pub struct SimDisk(Rc<RefCell<State>>);

/// One core's queue on a [`SimDisk`].
pub struct SimQueue {
    disk: SimDisk,
    arena: Arena,
    number: usize,
    capacity: usize,
}

type Contents = Rc<[u8; PAGE_BYTES]>;
/// Pages by number; a page that is absent is zeroes.
type Image = BTreeMap<u64, Contents>;

struct State {
    /// Size in pages.
    size: u64,
    rng: Rng,
    /// What a read returns.
    now: Image,
    /// What a power cut cannot take.
    durable: Image,
    /// Completed page writes that are not durable, oldest first.
    volatile: Vec<VolatileWrite>,
    /// Completed page writes since the beginning: the last number in `volatile`, if it has any.
    written: u64,
    ops: Vec<Op>,
    queues: Vec<QueueState>,
    faults: Faults,
    counts: Counts,
}

struct VolatileWrite {
    number: u64,
    page: u64,
    contents: Contents,
}

/// An operation that is not completed.
struct Op {
    queue: usize,
    token: u64,
    kind: IoKind,
    /// First page on the disk.
    first: u64,
    pages: Vec<PageId>,
    arena: Arena,
    /// Of a submitted operation: `State::written` at that moment.
    submitted: Option<u64>,
}

#[derive(Default)]
struct QueueState {
    done: VecDeque<Completion>,
    in_flight: usize,
}

#[derive(Default)]
struct Faults {
    /// Operations of a kind until one fails.
    countdown: BTreeMap<IoKind, u64>,
    /// One in so many operations of a kind fails.
    one_in: BTreeMap<IoKind, u64>,
    /// Pages that cannot be read until they are written.
    broken: BTreeSet<u64>,
    unplugged: bool,
}

impl SimDisk {
    /// A disk of `size` bytes (a multiple of 4096) of zeroes, whose chances are determined by
    /// `seed`.
    ///
    /// # Panics
    /// A size that is no multiple of 4096.
    #[must_use]
    pub fn new(size: u64, seed: u64) -> Self {
        assert!(size.is_multiple_of(PAGE_BYTES as u64), "a disk of whole pages");
        Self(Rc::new(RefCell::new(State {
            size: size / PAGE_BYTES as u64,
            rng: Rng::new(seed),
            now: Image::new(),
            durable: Image::new(),
            volatile: Vec::new(),
            written: 0,
            ops: Vec::new(),
            queues: Vec::new(),
            faults: Faults::default(),
            counts: Counts::default(),
        })))
    }

    /// Another disk, with what a power cut could not take of this one.
    #[must_use]
    pub fn durable_copy(&self) -> Self {
        let state = self.state();
        let copy = Self::new(state.size * PAGE_BYTES as u64, 0);
        copy.state_mut().now = state.durable.clone();
        copy.state_mut().durable = state.durable.clone();
        copy
    }

    /// A queue of `capacity` operations on this disk.
    #[must_use]
    pub fn queue(&self, arena: &Arena, capacity: usize) -> SimQueue {
        let mut state = self.state_mut();
        state.queues.push(QueueState::default());
        let number = state.queues.len() - 1;
        SimQueue { disk: self.clone(), arena: arena.clone(), number, capacity }
    }

    /// Carries out one submitted operation, any one. False if there is none.
    pub fn step(&self) -> bool {
        let mut state = self.state_mut();
        let ready: Vec<usize> =
            (0..state.ops.len()).filter(|&i| state.ops[i].submitted.is_some()).collect();
        if ready.is_empty() {
            return false;
        }
        let chosen = ready[state.rng.index(ready.len())];
        let op = state.ops.remove(chosen);
        let result = state.carry_out(&op);
        op.release_pages();
        state.queues[op.queue].done.push_back(Completion { token: op.token, result });
        true
    }

    /// Submitted operations that are not carried out yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.state().ops.iter().filter(|op| op.submitted.is_some()).count()
    }

    /// The machine stops at this instant. All operations are gone, without completions; queues made
    /// before are empty and pages of the arena free. Faults stay as they are.
    pub fn crash(&self, kind: CrashKind) {
        let mut state = self.state_mut();
        // How much survives is a property of the crash as much as of each page, so that all or
        // nothing happens too.
        let luck = state.rng.below(5);
        if kind == CrashKind::Power {
            state.now = state.durable.clone();
            for write in std::mem::take(&mut state.volatile) {
                state.apply_by_chance(write.page, &write.contents, luck);
            }
        }
        let mut ops = std::mem::take(&mut state.ops);
        state.rng.shuffle(&mut ops);
        for op in ops {
            if op.kind == IoKind::Write && op.submitted.is_some() {
                state.write_by_chance(&op, luck);
            }
            op.release_pages();
        }
        for queue in &mut state.queues {
            *queue = QueueState::default();
        }
        if kind == CrashKind::Power {
            // What has survived is on the medium.
            state.volatile.clear();
            state.durable = state.now.clone();
        }
    }

    /// After `operations` more operations of this kind, one fails.
    pub fn fail_after(&self, kind: IoKind, operations: u64) {
        self.state_mut().faults.countdown.insert(kind, operations);
    }

    /// From now on one in `one_in` operations of this kind fails at random; 0: none.
    pub fn fail_one_in(&self, kind: IoKind, one_in: u64) {
        let mut state = self.state_mut();
        match one_in {
            0 => state.faults.one_in.remove(&kind),
            _ => state.faults.one_in.insert(kind, one_in),
        };
    }

    /// These pages of the disk cannot be read until they are written again.
    pub fn break_pages(&self, pages: Range<u64>) {
        self.state_mut().faults.broken.extend(pages);
    }

    /// Whether the disk is gone: every operation fails.
    pub fn set_unplugged(&self, unplugged: bool) {
        self.state_mut().faults.unplugged = unplugged;
    }

    /// Changes one bit of a page of the disk, for good.
    ///
    /// # Panics
    /// A page past the end of the disk, or a bit past the end of the page.
    pub fn flip_bit(&self, page: u64, bit: usize) {
        let mut state = self.state_mut();
        assert!(page < state.size && bit < PAGE_BYTES * 8, "bit {bit} of page {page}");
        let flip = |contents: &mut Contents| Rc::make_mut(contents)[bit / 8] ^= 1 << (bit % 8);
        let State { now, durable, volatile, .. } = &mut *state;
        flip(now.entry(page).or_insert_with(zeroes));
        flip(durable.entry(page).or_insert_with(zeroes));
        for write in volatile.iter_mut().filter(|write| write.page == page) {
            flip(&mut write.contents);
        }
    }

    /// Changes a random bit of a random page that was written, and says which page. `None` if none
    /// was.
    pub fn flip_random_bit(&self) -> Option<u64> {
        let (page, bit) = {
            let mut state = self.state_mut();
            let written = state.now.len();
            if written == 0 {
                return None;
            }
            let nth = state.rng.index(written);
            let bit = state.rng.index(PAGE_BYTES * 8);
            (*state.now.keys().nth(nth).expect("an index of the map"), bit)
        };
        self.flip_bit(page, bit);
        Some(page)
    }

    /// What the disk was asked for since the beginning.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    fn state(&self) -> Ref<'_, State> {
        self.0.borrow()
    }

    fn state_mut(&self) -> RefMut<'_, State> {
        self.0.borrow_mut()
    }
}

impl State {
    fn carry_out(&mut self, op: &Op) -> Result<(), IoError> {
        self.count(op.kind, op.pages.len());
        let fault = self.fault(op.kind, op.first..op.first + op.pages.len() as u64);
        match op.kind {
            IoKind::Read => self.read(op, fault.is_err()),
            IoKind::Write if fault.is_err() => self.write_by_chance(op, 2),
            IoKind::Write => {
                for (at, contents) in op.writes() {
                    self.write(at, contents);
                }
            }
            IoKind::Flush if fault.is_err() => {}
            IoKind::Flush => self.make_durable(op.submitted.expect("it was chosen for that")),
        }
        fault
    }

    fn count(&mut self, kind: IoKind, pages: usize) {
        let (operations, all_pages) = match kind {
            IoKind::Read => (&mut self.counts.reads, Some(&mut self.counts.pages_read)),
            IoKind::Write => (&mut self.counts.writes, Some(&mut self.counts.pages_written)),
            IoKind::Flush => (&mut self.counts.flushes, None),
        };
        *operations += 1;
        if let Some(all_pages) = all_pages {
            *all_pages += pages as u64;
        }
    }

    /// Whether the operation is one that fails.
    fn fault(&mut self, kind: IoKind, pages: Range<u64>) -> Result<(), IoError> {
        let faults = &mut self.faults;
        if faults.unplugged {
            return Err(IoErrorKind::Gone.into());
        }
        let mut fails = kind == IoKind::Read && faults.broken.range(pages).next().is_some();
        if let Some(left) = faults.countdown.get_mut(&kind) {
            if *left == 0 {
                fails = true;
                faults.countdown.remove(&kind);
            } else {
                *left -= 1;
            }
        }
        if let Some(&one_in) = faults.one_in.get(&kind) {
            fails |= self.rng.chance(1, one_in);
        }
        if fails { Err(IoErrorKind::Io.into()) } else { Ok(()) }
    }

    /// A failed read leaves rubbish, so that nobody takes what it leaves for an answer.
    fn read(&mut self, op: &Op, failed: bool) {
        op.release_pages();
        for (at, &page) in (op.first..).zip(&op.pages) {
            op.arena.with_mut(page, |bytes| match self.now.get(&at) {
                _ if failed => self.rng.fill(bytes),
                Some(contents) => *bytes = **contents,
                None => bytes.fill(0),
            });
        }
        op.hold_pages();
    }

    /// Writes one page, completely.
    fn write(&mut self, page: u64, contents: Contents) {
        self.faults.broken.remove(&page);
        self.written += 1;
        self.now.insert(page, Rc::clone(&contents));
        self.volatile.push(VolatileWrite { number: self.written, page, contents });
    }

    /// Does any part of a write.
    fn write_by_chance(&mut self, op: &Op, luck: u64) {
        let mut writes: Vec<_> = op.writes().collect();
        self.rng.shuffle(&mut writes);
        for (page, contents) in writes {
            self.apply_by_chance(page, &contents, luck);
        }
    }

    /// Writes a page, or part of it, or not, with `luck` in 4 for the whole of it.
    fn apply_by_chance(&mut self, page: u64, contents: &Contents, luck: u64) {
        if self.rng.chance(1, 8) {
            let mut torn = self.now.get(&page).cloned().unwrap_or_else(zeroes);
            let sectors = Rc::make_mut(&mut torn).chunks_mut(SECTOR_BYTES);
            for (old, new) in sectors.zip(contents.chunks(SECTOR_BYTES)) {
                if self.rng.chance(1, 2) {
                    old.copy_from_slice(new);
                }
            }
            self.write(page, torn);
        } else if self.rng.chance(luck, 4) {
            self.write(page, Rc::clone(contents));
        }
    }

    /// Makes the page writes durable that were completed up to number `last`.
    fn make_durable(&mut self, last: u64) {
        let count = self.volatile.partition_point(|write| write.number <= last);
        for write in self.volatile.drain(..count) {
            self.durable.insert(write.page, write.contents);
        }
    }
}

impl Op {
    /// The pages of a write: where to, and what.
    fn writes(&self) -> impl Iterator<Item = (u64, Contents)> {
        let contents = |&page| self.arena.with(page, |bytes| Rc::new(*bytes));
        (self.first..).zip(self.pages.iter().map(contents))
    }

    fn hold_pages(&self) {
        for &page in &self.pages {
            self.arena.hold(page, self.kind.access());
        }
    }

    fn release_pages(&self) {
        for &page in &self.pages {
            self.arena.release(page, self.kind.access());
        }
    }
}

impl BlockQueue for SimQueue {
    fn push(&mut self, io: Io<'_>) -> Result<(), Full> {
        if self.in_flight() >= self.capacity {
            return Err(Full);
        }
        let mut state = self.disk.state_mut();
        let fits = io.fits(state.size * PAGE_BYTES as u64);
        let queue = &mut state.queues[self.number];
        queue.in_flight += 1;
        if !fits {
            let result = Err(IoErrorKind::Invalid.into());
            queue.done.push_back(Completion { token: io.token, result });
            return Ok(());
        }
        io.hold_pages(&self.arena);
        state.ops.push(Op {
            queue: self.number,
            token: io.token,
            kind: io.kind,
            first: io.offset / PAGE_BYTES as u64,
            pages: io.pages.to_vec(),
            arena: self.arena.clone(),
            submitted: None,
        });
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        let mut state = self.disk.state_mut();
        let written = state.written;
        for op in state.ops.iter_mut().filter(|op| op.queue == self.number) {
            op.submitted.get_or_insert(written);
        }
        Ok(())
    }

    fn reap(&mut self) -> Option<Completion> {
        let mut state = self.disk.state_mut();
        let queue = &mut state.queues[self.number];
        let completion = queue.done.pop_front()?;
        queue.in_flight -= 1;
        Some(completion)
    }

    /// Only checks that what is let go of is not in use.
    fn cover(&mut self, pages: u32) {
        let state = self.disk.state();
        let mut own = state.ops.iter().filter(|op| op.queue == self.number);
        let used = own.find_map(|op| op.pages.iter().find(|page| page.0 >= pages));
        assert_eq!(used, None, "a page in flight is let go of");
    }

    fn event_fd(&self) -> Option<RawFd> {
        None
    }

    fn in_flight(&self) -> usize {
        self.disk.state().queues[self.number].in_flight
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }
}

/// As a program at start has it: each call is a completed operation.
impl BlockFile for SimDisk {
    fn size_bytes(&self) -> u64 {
        self.state().size * PAGE_BYTES as u64
    }

    fn read_at(&self, offset: u64, buf: &mut AlignedBuf) -> Result<(), IoError> {
        let pages = self.pages_of(offset, buf.len())?;
        let mut state = self.state_mut();
        state.count(IoKind::Read, buf.len() / PAGE_BYTES);
        state.fault(IoKind::Read, pages.clone())?;
        for (at, bytes) in pages.zip(buf.chunks_mut(PAGE_BYTES)) {
            match state.now.get(&at) {
                Some(contents) => bytes.copy_from_slice(&**contents),
                None => bytes.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &AlignedBuf) -> Result<(), IoError> {
        let pages = self.pages_of(offset, buf.len())?;
        let mut state = self.state_mut();
        state.count(IoKind::Write, buf.len() / PAGE_BYTES);
        let fault = state.fault(IoKind::Write, pages.clone());
        for (at, bytes) in pages.zip(buf.chunks(PAGE_BYTES)) {
            let mut contents = zeroes();
            Rc::make_mut(&mut contents).copy_from_slice(bytes);
            match fault {
                Ok(()) => state.write(at, contents),
                Err(_) => state.apply_by_chance(at, &contents, 2),
            }
        }
        fault
    }

    fn sync(&self) -> Result<(), IoError> {
        let mut state = self.state_mut();
        state.count(IoKind::Flush, 0);
        state.fault(IoKind::Flush, 0..0)?;
        let written = state.written;
        state.make_durable(written);
        Ok(())
    }
}

impl SimDisk {
    fn pages_of(&self, offset: u64, len: usize) -> Result<Range<u64>, IoError> {
        if !range_fits(offset, len, self.size_bytes()) {
            return Err(IoErrorKind::Invalid.into());
        }
        let page = PAGE_BYTES as u64;
        Ok(offset / page..(offset + len as u64) / page)
    }
}

fn zeroes() -> Contents {
    Rc::new([0; PAGE_BYTES])
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("SimDisk")
            .field("pages", &state.size)
            .field("volatile", &state.volatile.len())
            .field("ops", &state.ops.len())
            .field("counts", &state.counts)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for SimQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimQueue")
            .field("number", &self.number)
            .field("in_flight", &self.in_flight())
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}
