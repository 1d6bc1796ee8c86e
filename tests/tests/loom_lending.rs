//! Every interleaving (up to the preemption bound) of a resize and of the lending that follows from
//! it: two cores with a shard each, the control thread, mail both ways. Run by `cargo loom`.
//!
//! The machine that decides, and the mailboxes, are the server's own. A page is a cell here: loom
//! reports a use of it that does not come after its hand-over, or after its memory came back.
#![cfg(loom)]

use heeler_core::budget::{Rules, Target};
use heeler_core::ids::{BLOCK_BYTES, PageId};
use heeler_core::lending::{Lending, Output, Place, Setup};
use heeler_core::mailbox::{Receiver, Sender, mailbox};
use heeler_core::time::Instant;
use loom::cell::UnsafeCell;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

const PAGES: usize = 4;
const CORES: usize = 2;
const PAGE: u64 = BLOCK_BYTES as u64;

/// Wakes one thread for mail. Every message rings: when a bell may stay silent is a model of its
/// own.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_one();
    }

    /// Until the next ring, or the last if it was not waited for.
    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.changed.wait(rung).unwrap();
        }
        *rung = false;
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
    control: (Sender<ToControl>, Arc<Bell>),
    bell: Arc<Bell>,
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
                Err(_) => self.bell.wait(),
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
    cores: Vec<(Sender<ToCore>, Arc<Bell>)>,
    inboxes: Vec<Receiver<ToControl>>,
    bell: Arc<Bell>,
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
                self.bell.wait();
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
    let lending = Lending::new(setup, 5 * PAGE, &[]).unwrap();
    assert_eq!(lending.backed_pages(), PAGES as u32);
    let memory = Arc::new(Memory::new());
    let (mut threads, mut cores, mut inboxes) = (Vec::new(), Vec::new(), Vec::new());
    let control_bell = Arc::new(Bell::default());
    for number in 0..CORES {
        let (to_core, inbox) = mailbox(8);
        let (to_control, from_core) = mailbox(4);
        let pages: Vec<PageId> = lending.start_of(Place::Shard(number)).map(PageId).collect();
        assert_eq!(pages.len(), 2);
        let bell = Arc::new(Bell::default());
        let (memory, control) = (memory.clone(), (to_control, control_bell.clone()));
        let ours = bell.clone();
        let core = Core { number, memory, pages, inbox, control, bell: ours, bug };
        threads.push(thread::spawn(move || core.run()));
        cores.push((to_core, bell));
        inboxes.push(from_core);
    }
    let mut control = Control { lending, memory, cores, inboxes, bell: control_bell, bug };
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

/// With two preemptions: these models are long.
fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(model);
}

#[test]
fn a_page_that_loses_its_memory_is_in_nobodys_hands() {
    check(|| model(Bug::None, false));
}

#[test]
fn a_page_that_comes_back_is_in_one_place() {
    check(|| model(Bug::None, true));
}

/// The model sees what it is for.
#[test]
#[should_panic]
fn it_is_seen_if_a_core_is_not_awaited() {
    check(|| model(Bug::NoAnswerAwaited, false));
}

/// The model sees what it is for.
#[test]
#[should_panic]
fn it_is_seen_if_a_page_is_used_after_it_was_given_back() {
    check(|| model(Bug::UsedAfterwards, false));
}
