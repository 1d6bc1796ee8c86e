//! Every interleaving (up to the preemption bound) of a resize and of the lending that follows from
//! it: two cores with a shard each, the control thread, mail both ways. Run by `cargo loom`.
//!
//! The machine that decides, and the mailboxes, are the server's own. A page is a cell here: loom
//! reports a use of it that does not come after its hand-over, or after its memory came back.
#![cfg(loom)]

use heeler_core::budget::{Rules, Target};
use heeler_core::ids::{BLOCK_BYTES, PageId};
use heeler_core::lending::{Lending, Output, Place, Setup};
use heeler_core::mailbox::{Doorbell, Parker, Receiver, Sender, doorbell, mailbox};
use heeler_core::time::Instant;
use loom::cell::UnsafeCell;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

const PAGES: usize = 4;
const CORES: usize = 2;
const PAGE: u64 = BLOCK_BYTES as u64;

/// An eventfd: a write makes the present or the next read return.
#[derive(Default)]
struct EventFd {
    written: Mutex<bool>,
    changed: Condvar,
}

impl EventFd {
    fn write(&self) {
        *self.written.lock().unwrap() = true;
        self.changed.notify_one();
    }

    fn read(&self) {
        let mut written = self.written.lock().unwrap();
        while !*written {
            written = self.changed.wait(written).unwrap();
        }
        *written = false;
    }
}

/// Wakes a thread for mail.
#[derive(Clone)]
struct Bell(Doorbell, Arc<EventFd>);

impl Bell {
    fn new() -> (Self, Sleeper) {
        let (bell, parker) = doorbell();
        let eventfd = Arc::new(EventFd::default());
        (Self(bell, eventfd.clone()), Sleeper(parker, eventfd))
    }

    fn ring(&self) {
        if self.0.must_ring() {
            self.1.write();
        }
    }
}

/// The thread that a bell wakes.
struct Sleeper(Parker, Arc<EventFd>);

impl Sleeper {
    fn sleep_unless(&mut self, has_news: impl FnOnce() -> bool) {
        if self.0.prepare_park(has_news) {
            self.1.read();
            self.0.awake();
        }
    }
}

/// What is done wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bug {
    None,
    /// The control thread does not wait until all cores have let go of a chunk.
    NoAnswerAwaited,
    /// A shard uses a page once more after it gave it back.
    UsedAfterwards,
}

/// Content of each page, and whether each core's queue covers it.
struct Memory {
    pages: [UnsafeCell<u64>; PAGES],
    covered: [[UnsafeCell<bool>; PAGES]; CORES],
}

// SAFETY: a page is touched by the thread that has its number; what a core covers by that core, and
// by the control thread after the core has said that it let go: what the model checks.
unsafe impl Sync for Memory {}

impl Memory {
    fn new() -> Self {
        let covered = || std::array::from_fn(|_| UnsafeCell::new(true));
        Self {
            pages: std::array::from_fn(|_| UnsafeCell::new(0)),
            covered: std::array::from_fn(|_| covered()),
        }
    }

    fn write(&self, page: PageId, value: u64) {
        // SAFETY: the caller has the page's number; loom checks it.
        self.pages[page.0 as usize].with_mut(|p| unsafe { *p = value });
    }

    fn cover(&self, core: usize, pages: u32) {
        for (page, covered) in self.covered[core].iter().enumerate() {
            // SAFETY: the caller is the core; loom checks it.
            covered.with_mut(|p| unsafe { *p = page < pages as usize });
        }
    }

    /// The system takes the page's memory away.
    fn lose(&self, page: PageId) {
        for covered in &self.covered {
            // SAFETY: the core has let go; loom checks it.
            let covered = covered[page.0 as usize].with(|p| unsafe { *p });
            assert!(!covered, "memory is lost that a queue covers");
        }
        self.write(page, 0);
    }
}

enum ToCore {
    Budget { pages: usize, below: PageId },
    Pages(Vec<PageId>),
    Cover(u32),
    Stop,
}

enum ToControl {
    Pages(Vec<PageId>),
    Covered,
}

/// One core with one shard: uses all that it has, and does what it is told.
struct Core {
    number: usize,
    memory: Arc<Memory>,
    pages: Vec<PageId>,
    inbox: Receiver<ToCore>,
    control: (Sender<ToControl>, Bell),
    sleeper: Sleeper,
    bug: Bug,
}

impl Core {
    fn run(mut self) -> Vec<PageId> {
        loop {
            match self.inbox.pop() {
                Ok(ToCore::Budget { pages, below }) => self.give_back(pages, below),
                Ok(ToCore::Pages(more)) => {
                    more.iter().for_each(|page| self.memory.write(*page, 9));
                    self.pages.extend(more);
                }
                Ok(ToCore::Cover(count)) => {
                    self.memory.cover(self.number, count);
                    self.send(ToControl::Covered);
                }
                Ok(ToCore::Stop) => return self.pages,
                Err(_) => self.sleeper.sleep_unless(|| self.inbox.has_news()),
            }
        }
    }

    fn give_back(&mut self, most: usize, below: PageId) {
        let mut back: Vec<PageId> = Vec::new();
        while let Some(last) = self.pages.iter().copied().max()
            && (last >= below || self.pages.len() > most)
        {
            self.pages.retain(|page| *page != last);
            self.memory.write(last, 7);
            back.push(last);
        }
        let late = back.last().copied().filter(|_| self.bug == Bug::UsedAfterwards);
        if !back.is_empty() {
            self.send(ToControl::Pages(back));
        }
        if let Some(late) = late {
            self.memory.write(late, 8);
        }
    }

    fn send(&mut self, mail: ToControl) {
        assert!(self.control.0.push(mail).is_ok(), "there is room for all of it");
        self.control.1.ring();
    }
}

/// The control thread's side of the wires.
struct Control {
    lending: Lending,
    memory: Arc<Memory>,
    cores: Vec<(Sender<ToCore>, Bell)>,
    inboxes: Vec<Receiver<ToControl>>,
    sleeper: Sleeper,
    bug: Bug,
}

impl Control {
    fn carry_out(&mut self) {
        while let Some(output) = self.lending.poll_output() {
            match output {
                Output::Budget { shard, target, below, .. } => {
                    self.send(shard, ToCore::Budget { pages: target.pages as usize, below });
                }
                Output::Pages { to: Place::Shard(shard), pages } => {
                    self.send(shard, ToCore::Pages(pages));
                }
                Output::Pages { to: Place::Core(_), .. } => unreachable!("cores keep nothing"),
                Output::Below(_) => {}
                Output::Grow { pages } => {
                    (self.lending.backed_pages()..pages)
                        .for_each(|page| self.memory.write(PageId(page), 1));
                    self.lending.handle_grown(Instant(0), true);
                }
                Output::Cover { pages } => {
                    (0..CORES).for_each(|core| self.send(core, ToCore::Cover(pages)));
                    if self.bug == Bug::NoAnswerAwaited {
                        (0..CORES).for_each(|_| self.lending.handle_covered());
                    }
                }
                Output::Shrink { pages } => {
                    (pages..PAGES as u32).for_each(|page| self.memory.lose(PageId(page)));
                }
            }
        }
    }

    fn send(&mut self, core: usize, mail: ToCore) {
        let (to_core, bell) = &mut self.cores[core];
        assert!(to_core.push(mail).is_ok(), "there is room for all of it");
        bell.ring();
    }

    fn resize(&mut self, total_bytes: u64) {
        self.lending.resize(Instant(0), total_bytes).unwrap();
        self.carry_out();
    }

    /// Takes mail until the last resize is carried out.
    fn run(&mut self) {
        while !self.lending.is_settled() {
            let mut news = false;
            for core in 0..CORES {
                let mail = self.inboxes[core].pop();
                news |= mail.is_ok();
                match mail {
                    Ok(ToControl::Pages(pages)) => {
                        self.lending.handle_pages(Place::Shard(core), &pages);
                    }
                    Ok(ToControl::Covered) if self.bug == Bug::NoAnswerAwaited => {}
                    Ok(ToControl::Covered) => self.lending.handle_covered(),
                    Err(_) => {}
                }
                self.carry_out();
            }
            if !news && !self.lending.is_settled() {
                self.sleeper.sleep_unless(|| self.inboxes.iter().any(Receiver::has_news));
            }
        }
    }
}

/// Four pages, two for each shard. The server is resized so that the last page loses its memory and
/// each shard has to do with one; and, if wanted, back to four while that is under way.
fn model(bug: Bug, and_up: bool) {
    let page = Target { pages: 1, meta_units: 0 };
    let setup = Setup {
        rules: Rules {
            page_bytes: PAGE,
            unit_bytes: 1,
            floor: page,
            most: Target { pages: 3, ..page },
        },
        shards: CORES,
        cores: CORES,
        fixed_pages: 0,
        core_pages: 0,
        chunk_pages: 1,
        aside_bytes: 0,
    };
    let lending = Lending::new(setup, 5 * PAGE).unwrap();
    assert_eq!(lending.backed_pages(), PAGES as u32);
    let memory = Arc::new(Memory::new());
    let (mut threads, mut cores, mut inboxes) = (Vec::new(), Vec::new(), Vec::new());
    let (control_bell, sleeper) = Bell::new();
    for number in 0..CORES {
        let (to_core, inbox) = mailbox(8);
        let (to_control, from_core) = mailbox(4);
        let pages: Vec<PageId> = lending.start_of(Place::Shard(number)).map(PageId).collect();
        assert_eq!(pages.len(), 2);
        let (bell, sleeper) = Bell::new();
        let (memory, control) = (memory.clone(), (to_control, control_bell.clone()));
        let core = Core { number, memory, pages, inbox, control, sleeper, bug };
        threads.push(thread::spawn(move || core.run()));
        cores.push((to_core, bell));
        inboxes.push(from_core);
    }
    let mut control = Control { lending, memory, cores, inboxes, sleeper, bug };
    control.resize(3 * PAGE);
    if and_up {
        control.resize(5 * PAGE);
    }
    control.run();
    (0..CORES).for_each(|core| control.send(core, ToCore::Stop));
    let held = threads.into_iter().flat_map(|thread| thread.join().unwrap());
    let mut all: Vec<PageId> = held.collect();
    for from_core in &mut control.inboxes {
        while let Ok(ToControl::Pages(pages)) = from_core.pop() {
            all.extend(pages);
        }
    }
    all.sort_unstable();
    all.dedup();
    let backed = control.lending.backed_pages();
    assert!(if and_up { backed == 4 } else { backed < 4 });
    assert!(all.iter().all(|page| page.0 < backed), "{all:?}");
    let pooled = control.lending.usage().pool_bytes / PAGE;
    assert_eq!(all.len() as u64 + pooled, backed.into(), "{all:?} and {pooled} in the pool");
}

#[test]
fn a_page_that_loses_its_memory_is_in_nobodys_hands() {
    loom::model(|| model(Bug::None, false));
}

#[test]
fn a_page_that_comes_back_is_in_one_place() {
    loom::model(|| model(Bug::None, true));
}

/// The model sees what it is for.
#[test]
#[should_panic]
fn it_is_seen_if_a_core_is_not_awaited() {
    loom::model(|| model(Bug::NoAnswerAwaited, false));
}

/// The model sees what it is for.
#[test]
#[should_panic]
fn it_is_seen_if_a_page_is_used_after_it_was_given_back() {
    loom::model(|| model(Bug::UsedAfterwards, false));
}
