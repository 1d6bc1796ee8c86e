//! The hand-over of memory between shards, cores and the system: the control thread's side.
//!
//! Every page of the arena is in exactly one place: with a shard, with a core (the pages that carry
//! what clients write), in the pool here, or in a message between them. A [`Budget`] says what each
//! shard may have; what a shard has beyond it comes back, goes to the pool, and from there to who
//! has too little. The memory of the arena follows what all of them may have together:
//!
//! ```text
//! less: nobody may have pages from a bound on -> these come back to the pool -> the last chunk is
//!       whole in the pool -> every core lets go of it (Cover, handle_covered) -> Shrink
//! more: Grow -> handle_grown: its pages are in the pool -> Cover
//! ```
//!
//! All together never takes more than the total: the backed pages, what the shards' tables may take
//! (those of pages give nothing back), and what the runtime set aside. A shard is allowed more than
//! before only when there is room for it in the tables.

use alloc::collections::{BTreeSet, VecDeque};
use alloc::vec::Vec;
use core::ops::Range;

use crate::budget::{Budget, Rules, Target};
use crate::ids::{BLOCK_BYTES, PageId};
use crate::shard::BudgetReport;
use crate::time::Instant;

/// Pages of one message at most.
pub const PAGES_MAX: usize = 64;
/// Pages that are backed in one step: 16 MiB, so that no core is kept for long.
const GROW_PAGES: u32 = 4096;
/// The arena grows when it gains this part of itself, unless the total was raised.
const GAIN_PART: u32 = 64;
/// Metadata is taken from a shard by this part at a time.
const META_PART: u32 = 16;
/// Tries to make the tables' share fit what the shards may have. Each brings it closer by the
/// ratio of a page to its part of the tables.
const FITS_MAX: usize = 8;

/// Who has pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// A shard.
    Shard(usize),
    /// A core.
    Core(usize),
}

/// What to tell whom.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// The shard should hold no more than this, and no page from `below` on.
    Budget {
        /// The shard.
        shard: usize,
        /// What it may have.
        target: Target,
        /// The first page that it may not have; [`PageId::NONE`]: it may have all.
        below: PageId,
        /// It has less than an even share: it should report at once when it lacks pages.
        hurry: bool,
    },
    /// No core should hold a page from this one on; [`PageId::NONE`]: all may be held.
    Below(PageId),
    /// These pages are for that place.
    Pages {
        /// For whom.
        to: Place,
        /// At most [`PAGES_MAX`].
        pages: Vec<PageId>,
    },
    /// Back the arena's pages up to this number, then call [`Lending::handle_grown`].
    Grow {
        /// Whole chunks.
        pages: u32,
    },
    /// Every core's queue is to cover so many pages; each answers ([`Lending::handle_covered`]).
    Cover {
        /// Whole chunks.
        pages: u32,
    },
    /// Give the memory of all pages from this number on back to the system.
    Shrink {
        /// Whole chunks.
        pages: u32,
    },
}

/// What memory there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Setup {
    /// What shards may have. A page costs its own bytes and its part of the tables.
    pub rules: Rules,
    /// Shards of the cache.
    pub shards: usize,
    /// Data cores.
    pub cores: usize,
    /// Pages that each shard keeps for ever: the log's.
    pub fixed_pages: u32,
    /// Pages of each core.
    pub core_pages: u32,
    /// Pages of a chunk of the arena, a power of two.
    pub chunk_pages: u32,
    /// Bytes set aside for all that is neither a page nor grows with what shards may have.
    pub aside_bytes: u64,
}

/// How memory is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Bytes that everything may take.
    pub total_bytes: u64,
    /// Bytes that everything takes at most now.
    pub taken_bytes: u64,
    /// Of these: pages.
    pub arena_bytes: u64,
    /// Of these: the shards' tables, as far as they grow with what shards may have.
    pub table_bytes: u64,
    /// Bytes of pages that nobody has.
    pub pool_bytes: u64,
}

#[derive(Clone, Copy, Debug)]
struct Account {
    /// Pages that it has, as far as sent and come back.
    pages: u32,
    /// What it was told that it may have.
    target: Target,
    /// What its tables may take: for pages the most that it was ever told; of metadata, what it
    /// did not give back since.
    peak: Target,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Idle,
    /// The runtime backs pages up to here.
    Growing(u32),
    /// So many cores have not answered yet that they cover so many pages.
    Covering {
        pages: u32,
        answers: usize,
    },
}

/// See the [module](self).
#[derive(Debug)]
pub struct Lending {
    setup: Setup,
    total_bytes: u64,
    budget: Budget,
    shards: Vec<Account>,
    /// Pages of each core.
    cores: Vec<u32>,
    pool: BTreeSet<u32>,
    /// Pages of each chunk that are in the pool.
    pooled: Vec<u32>,
    /// Pages that can be used.
    backed: u32,
    /// Pages that have memory: more than `backed` while cores let go of some.
    resident: u32,
    /// Nobody should have a page from here on.
    bound: u32,
    step: Step,
    /// The total was raised, and the arena has not grown with it yet.
    raised: bool,
    outbox: VecDeque<Output>,
}

impl Setup {
    /// Pages that are not the shards' to have more or less of.
    fn kept_pages(&self) -> u32 {
        self.shards as u32 * self.fixed_pages + self.cores as u32 * self.core_pages
    }

    /// Bytes that are not. The arena is in whole chunks: up to one more than there is use for.
    fn kept_bytes(&self) -> u64 {
        let pages = u64::from(self.kept_pages()) + u64::from(self.chunk_pages);
        self.aside_bytes + pages * BLOCK_BYTES as u64
    }

    fn page_table_bytes(&self) -> u64 {
        self.rules.page_bytes - BLOCK_BYTES as u64
    }

    fn table_bytes(&self, target: Target) -> u64 {
        u64::from(target.pages) * self.page_table_bytes()
            + u64::from(target.meta_units) * self.rules.unit_bytes
    }

    /// The least total at the start.
    #[must_use]
    pub fn bytes_min(&self) -> u64 {
        self.kept_bytes() + self.rules.bytes_min(self.shards)
    }

    /// The pages that a shard keeps. They are the first of the arena, so it can shrink whatever
    /// they hold.
    #[must_use]
    pub fn fixed_of(&self, shard: usize) -> Range<u32> {
        let first = shard as u32 * self.fixed_pages;
        first..first + self.fixed_pages
    }
}

/// For the runtime.
impl Lending {
    /// Divides `total_bytes`: as they were divided in a former life, as far as `former` has the
    /// shards' shares ([`Budget::resume`]), or evenly.
    ///
    /// # Errors
    /// The bytes that are needed at least.
    pub fn new(setup: Setup, total_bytes: u64, former: &[Target]) -> Result<Self, u64> {
        if total_bytes < setup.bytes_min() {
            return Err(setup.bytes_min());
        }
        let mut budget = Budget::new(setup.rules, setup.shards, total_bytes - setup.kept_bytes());
        budget.resume(former);
        let account = |shard| {
            let target = budget.target(shard);
            Account { pages: target.pages, target, peak: target }
        };
        let mut this = Self {
            setup,
            total_bytes,
            shards: (0..setup.shards).map(account).collect(),
            cores: core::iter::repeat_n(setup.core_pages, setup.cores).collect(),
            budget,
            pool: BTreeSet::new(),
            pooled: Vec::new(),
            backed: 0,
            resident: 0,
            bound: 0,
            step: Step::Idle,
            raised: false,
            outbox: VecDeque::new(),
        };
        let used = this.used_pages();
        this.add_backed(this.whole_chunks(used));
        this.bound = this.backed;
        (0..used).for_each(|page| this.leave_pool(page));
        (0..setup.shards).for_each(|shard| this.tell(shard));
        Ok(this)
    }

    /// The pages that a place has at the start, beside those that it keeps. Not to be asked later.
    #[must_use]
    pub fn start_of(&self, place: Place) -> Range<u32> {
        let fixed = self.setup.shards as u32 * self.setup.fixed_pages;
        let each = self.setup.core_pages;
        match place {
            Place::Core(core) => fixed + core as u32 * each..fixed + (core as u32 + 1) * each,
            Place::Shard(shard) => {
                let before: u32 = self.shards[..shard].iter().map(|account| account.pages).sum();
                let first = self.setup.kept_pages() + before;
                first..first + self.shards[shard].pages
            }
        }
    }

    /// What a shard was last told that it may have.
    #[must_use]
    pub fn target(&self, shard: usize) -> Target {
        self.shards[shard].target
    }

    /// Pages that are to be backed at the start.
    #[must_use]
    pub fn backed_pages(&self) -> u32 {
        self.backed
    }

    /// How memory is used.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let page = BLOCK_BYTES as u64;
        Usage {
            total_bytes: self.total_bytes,
            taken_bytes: self.taken_bytes(),
            arena_bytes: u64::from(self.resident) * page,
            table_bytes: self.tables(|account| account.peak),
            pool_bytes: self.pool.len() as u64 * page,
        }
    }

    /// Whether a change of the total has been carried out.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.step == Step::Idle && self.bound == self.backed && !self.raised
    }

    /// The least total from now on.
    #[must_use]
    pub fn bytes_min(&self) -> u64 {
        let floor = self.setup.rules.floor.pages;
        let floors = self.shards.len() as u64 * u64::from(floor) * BLOCK_BYTES as u64;
        self.setup.kept_bytes() + floors + self.tables(|account| account.peak)
    }

    /// Changes the total.
    ///
    /// # Errors
    /// The bytes that are needed at least.
    pub fn resize(&mut self, now: Instant, total_bytes: u64) -> Result<(), u64> {
        if total_bytes < self.bytes_min() {
            return Err(self.bytes_min());
        }
        self.raised = total_bytes > self.total_bytes;
        self.total_bytes = total_bytes;
        self.round(now);
        Ok(())
    }

    /// Takes a shard's report; [`round`](Self::round) draws the conclusions. Metadata that it no
    /// longer holds has been given back to the system.
    pub fn handle_report(&mut self, now: Instant, shard: usize, report: BudgetReport) {
        let Account { target, peak, .. } = &mut self.shards[shard];
        peak.meta_units = peak.meta_units.min(report.meta_units_held.max(target.meta_units));
        // What is taken away comes back late, so it is taken in small parts.
        let held = report.meta_units_held.min(peak.meta_units);
        self.budget.keep_units(shard, held - held / META_PART);
        self.budget.handle_report(now, shard, report);
    }

    /// Moves memory to who lacks it.
    pub fn round(&mut self, now: Instant) {
        self.fit(now);
        self.budget.round(now);
        self.fit(now);
        self.settle();
    }

    /// These pages came back.
    ///
    /// # Panics
    /// If they were not there.
    pub fn handle_pages(&mut self, from: Place, pages: &[PageId]) {
        let count = pages.len() as u32;
        let held = self.held(from);
        *held = held.checked_sub(count).expect("no more comes back than was lent");
        for page in pages {
            self.enter_pool(page.0);
        }
        self.settle();
    }

    /// Whether pages are to come back that lose their memory. Shards look for these once when they
    /// are told; [`remind`](Self::remind) tells them again, now and then.
    #[must_use]
    pub fn is_vacating(&self) -> bool {
        self.bound < self.backed
    }

    /// Tells all shards again what they may have.
    pub fn remind(&mut self) {
        (0..self.shards.len()).for_each(|shard| self.tell(shard));
    }

    /// The end of an [`Output::Grow`]. If the system had not enough memory, the total is what is
    /// taken now.
    pub fn handle_grown(&mut self, now: Instant, ok: bool) {
        let Step::Growing(pages) = self.step else { panic!("nothing grows") };
        if !ok {
            self.step = Step::Idle;
            self.raised = false;
            self.total_bytes = self.taken_bytes();
            return self.round(now);
        }
        self.add_backed(pages);
        self.cover(pages);
        self.settle();
    }

    /// A core covers what it was told last.
    pub fn handle_covered(&mut self) {
        let Step::Covering { pages, answers } = &mut self.step else { panic!("nobody was asked") };
        *answers -= 1;
        if *answers > 0 {
            return;
        }
        if *pages < self.resident {
            self.resident = *pages;
            self.outbox.push_back(Output::Shrink { pages: *pages });
        }
        self.step = Step::Idle;
        self.settle();
    }

    /// What to do now. Drain it after each call.
    #[must_use]
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outbox.pop_front()
    }
}

/// How much of what.
impl Lending {
    /// Pages that somebody may have.
    fn used_pages(&self) -> u32 {
        let lent = |shard| self.budget.target(shard).pages;
        self.setup.kept_pages() + (0..self.shards.len()).map(lent).sum::<u32>()
    }

    fn whole_chunks(&self, pages: u32) -> u32 {
        pages.next_multiple_of(self.setup.chunk_pages)
    }

    fn tables(&self, of: impl Fn(&Account) -> Target) -> u64 {
        self.shards.iter().map(|account| self.setup.table_bytes(of(account))).sum()
    }

    /// Bytes that everything takes, with what the runtime is about to back.
    fn taken_bytes(&self) -> u64 {
        let pages = if let Step::Growing(pages) = self.step { pages } else { self.resident };
        self.bytes_with(pages) + self.tables(|account| account.peak)
    }

    /// Bytes with so many pages backed, without the tables.
    fn bytes_with(&self, pages: u32) -> u64 {
        self.setup.aside_bytes + u64::from(pages) * BLOCK_BYTES as u64
    }

    /// Gives the budget what is left when the tables of all shards are as large as they have been.
    fn fit(&mut self, now: Instant) {
        for _ in 0..FITS_MAX {
            let unused = |(shard, account): (usize, &Account)| {
                let target = self.budget.target(shard);
                self.setup.table_bytes(Target {
                    pages: account.peak.pages.saturating_sub(target.pages),
                    meta_units: account.peak.meta_units.saturating_sub(target.meta_units),
                })
            };
            let unused: u64 = self.shards.iter().enumerate().map(unused).sum();
            let left = self.total_bytes.saturating_sub(self.setup.kept_bytes() + unused);
            let left = left.max(self.setup.rules.bytes_min(self.shards.len()));
            self.budget.set_total(now, left);
        }
    }

    /// What the shard may have, as far as the tables may grow now.
    fn allowed(&self, shard: usize) -> Target {
        let (wanted, peak) = (self.budget.target(shard), self.shards[shard].peak);
        let mut room = self.total_bytes.saturating_sub(self.taken_bytes());
        let mut allow = |wanted: u32, peak: u32, each: u64| {
            let more = u64::from(wanted.saturating_sub(peak));
            let more = room.checked_div(each).map_or(more, |fit| more.min(fit));
            room -= more * each;
            wanted.min(peak + more as u32)
        };
        let units = (wanted.meta_units, peak.meta_units);
        let meta_units = allow(units.0, units.1, self.setup.rules.unit_bytes);
        let pages = allow(wanted.pages, peak.pages, self.setup.page_table_bytes());
        Target { pages, meta_units }
    }

    /// Up to where pages may be used: less than are backed if what shards may have needs the memory
    /// elsewhere.
    fn wanted_bound(&self) -> u32 {
        let after = |(shard, account): (usize, &Account)| {
            let Target { pages, meta_units } = self.budget.target(shard);
            self.setup.table_bytes(Target {
                pages: pages.max(account.peak.pages),
                meta_units: meta_units.max(account.peak.meta_units),
            })
        };
        let tables: u64 = self.shards.iter().enumerate().map(after).sum();
        if self.bytes_with(self.backed) + tables <= self.total_bytes {
            return self.backed;
        }
        self.whole_chunks(self.used_pages()).min(self.backed)
    }
}

/// What happens.
impl Lending {
    fn settle(&mut self) {
        let bound = self.wanted_bound();
        let moved = bound != self.bound;
        if moved {
            self.bound = bound;
            self.outbox.push_back(Output::Below(self.below()));
        }
        for shard in 0..self.shards.len() {
            let target = self.allowed(shard);
            let account = &mut self.shards[shard];
            if moved || target != account.target {
                account.target = target;
                account.peak.pages = account.peak.pages.max(target.pages);
                account.peak.meta_units = account.peak.meta_units.max(target.meta_units);
                self.tell(shard);
            }
        }
        if self.step == Step::Idle {
            self.shrink();
        }
        if self.step == Step::Idle {
            self.grow();
        }
        self.lend();
    }

    fn tell(&mut self, shard: usize) {
        let (target, below) = (self.shards[shard].target, self.below());
        let hurry = self.budget.is_below_fair(shard);
        self.outbox.push_back(Output::Budget { shard, target, below, hurry });
    }

    fn below(&self) -> PageId {
        if self.bound < self.backed { PageId(self.bound) } else { PageId::NONE }
    }

    /// Takes the chunks at the end that are whole in the pool and not to be used out of use.
    fn shrink(&mut self) {
        let chunk = self.setup.chunk_pages;
        let mut end = self.backed;
        while end > self.bound && self.pooled[(end / chunk) as usize - 1] == chunk {
            end -= chunk;
        }
        if end < self.backed {
            (end..self.backed).for_each(|page| self.leave_pool(page));
            self.backed = end;
            self.cover(end);
        }
    }

    fn grow(&mut self) {
        let wanted = self.whole_chunks(self.used_pages());
        let gain = wanted.saturating_sub(self.backed);
        if gain == 0 {
            self.raised = false;
        }
        let worth = self.raised || gain > self.backed / GAIN_PART;
        let next = wanted.min(self.whole_chunks(self.backed + GROW_PAGES.min(gain)));
        let fits = self.bytes_with(next) + self.tables(|account| account.peak) <= self.total_bytes;
        if gain > 0 && worth && fits && self.bound == self.backed {
            self.step = Step::Growing(next);
            self.outbox.push_back(Output::Grow { pages: next });
        }
    }

    fn cover(&mut self, pages: u32) {
        self.step = Step::Covering { pages, answers: self.cores.len() };
        self.outbox.push_back(Output::Cover { pages });
    }

    /// Gives what is in the pool to who has too little, first to the cores, which serve all.
    fn lend(&mut self) {
        while self.pool.first().is_some_and(|page| *page < self.bound) {
            let Some((to, missing)) = self.neediest() else { return };
            let mut pages = Vec::with_capacity(PAGES_MAX.min(missing as usize));
            while pages.len() < pages.capacity()
                && let Some(page) = self.pool.first().copied().filter(|page| *page < self.bound)
            {
                self.leave_pool(page);
                pages.push(PageId(page));
            }
            *self.held(to) += pages.len() as u32;
            self.outbox.push_back(Output::Pages { to, pages });
        }
    }

    /// Who has least of what it may have, and how many pages it lacks.
    fn neediest(&self) -> Option<(Place, u32)> {
        let full = self.setup.core_pages;
        let mut cores = self.cores.iter().enumerate();
        if let Some((core, pages)) = cores.find(|(_, pages)| **pages < full) {
            return Some((Place::Core(core), full - pages));
        }
        let shards = self.shards.iter().enumerate();
        let lacking = shards.filter(|(_, account)| account.pages < account.target.pages);
        let part = |account: &Account| {
            u64::from(account.pages) * u64::from(u32::MAX) / u64::from(account.target.pages)
        };
        let (shard, account) = lacking.min_by_key(|(_, account)| part(account))?;
        Some((Place::Shard(shard), account.target.pages - account.pages))
    }

    fn held(&mut self, place: Place) -> &mut u32 {
        match place {
            Place::Shard(shard) => &mut self.shards[shard].pages,
            Place::Core(core) => &mut self.cores[core],
        }
    }

    /// Pages up to this number are backed now, and in the pool.
    fn add_backed(&mut self, pages: u32) {
        self.pooled.resize((pages / self.setup.chunk_pages) as usize, 0);
        (self.backed..pages).for_each(|page| self.enter_pool(page));
        (self.backed, self.resident) = (pages, pages);
    }

    fn enter_pool(&mut self, page: u32) {
        assert!(self.pool.insert(page), "PageId({page}) was in the pool");
        self.pooled[(page / self.setup.chunk_pages) as usize] += 1;
    }

    fn leave_pool(&mut self, page: u32) {
        assert!(self.pool.remove(&page), "PageId({page}) was not in the pool");
        self.pooled[(page / self.setup.chunk_pages) as usize] -= 1;
    }
}

#[cfg(test)]
mod tests;
