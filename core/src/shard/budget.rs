//! The shard's share of memory: pages of the arena, and metadata.
//!
//! The share changes while the shard runs. It is worked towards in slices, one a turn: cold clean
//! data leaves first, as the policy says; data in pages that are to be given back moves to others;
//! the tables of metadata are packed, so that their ends are free.

use super::Shard;
use crate::ages::WINDOWS;
use crate::budget::Target;
use crate::buffer::{BufferId, Buffers, State};
use crate::cache::{addr, forget_ghost};
use crate::event::Output;
use crate::ids::PageId;
use crate::limits::{LEAF_BLOCKS, PAGES_BACK_MAX};
use crate::onode::{NIL, Spare};
use crate::policy::{Hint, Policy};

/// Buffer slots or free pages that one turn looks at.
const LOOK_SLICE: u32 = 1024;
/// Onodes that one turn evicts, and places of the tables that it packs.
const META_SLICE: usize = 32;

/// What a shard may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Budget {
    /// Pages, those of the log's own headers left out.
    pub pages: u32,
    /// Units of metadata ([`META_UNIT_BYTES`](crate::onode::META_UNIT_BYTES)).
    pub meta_units: u32,
    /// Pages with this number or a higher one are to be given back.
    pub below: PageId,
}

/// What a shard has, and how old it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BudgetReport {
    /// Pages, those of the log's own headers left out.
    pub pages: u32,
    /// The least it works with.
    pub pages_min: u32,
    /// Pages in use by the time since their last use ([`WINDOW_ENDS`](crate::ages::WINDOW_ENDS)).
    pub page_ages: [u64; WINDOWS],
    /// Metadata in use, in units.
    pub meta_units: u32,
    /// Metadata that memory is taken for, in units: more than is in use, while it is not packed.
    pub meta_units_held: u32,
    /// The least: of what is dirty or in use.
    pub meta_units_min: u32,
    /// Metadata in use by the time since its last use.
    pub meta_ages: [u64; WINDOWS],
    /// Pages evicted since the start although they had been used a short time before.
    pub young_evictions: u64,
    /// Onodes evicted since the start to make room for others.
    pub onode_evictions: u64,
}

/// Where the walk over all pages is that looks for those to give back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Walk {
    /// Nothing is looked for.
    No,
    /// At this place of the free list.
    Free(u32),
    /// At this buffer slot.
    Buffers(u32),
}

/// Where the work towards the budget is.
#[derive(Debug)]
pub(super) struct Progress {
    budget: Budget,
    walk: Walk,
    /// Pages that are nobody's now.
    back: heapless::Vec<PageId, PAGES_BACK_MAX>,
    /// They have been told of.
    told: bool,
}

impl Progress {
    pub(super) fn new(pages: u32) -> Self {
        let budget = Budget { pages, meta_units: u32::MAX, below: PageId::NONE };
        Self { budget, walk: Walk::No, back: heapless::Vec::new(), told: false }
    }
}

impl Shard<'_> {
    /// The pages of the `PagesBack` that was just polled.
    #[must_use]
    pub fn pages_back(&self) -> &[PageId] {
        &self.progress.back
    }

    /// What the shard has and how old it is. Costs about a thousand additions.
    #[must_use]
    pub fn budget_report(&self) -> BudgetReport {
        let usage = self.buffers.usage();
        let in_use = usage.pages() - usage.free - usage.warm_in - usage.hot + usage.pinned_listed;
        let pages_min = Self::pages_min(&self.config) - Self::pages_fixed(&self.config);
        let onodes = self.onodes.counters();
        let mut page_ages = self.buffers.ages();
        if self.is_cold() {
            // Nobody else should have the pages for what is to be brought back.
            let counted: u64 = page_ages.iter().sum();
            page_ages[0] += u64::from(self.buffers.capacity()).saturating_sub(counted);
        }
        BudgetReport {
            pages: self.buffers.capacity(),
            pages_min: (pages_min as u32).max(in_use),
            page_ages,
            meta_units: self.onodes.units_used(),
            meta_units_held: self.onodes.units_held(),
            meta_units_min: self.onodes.units_unevictable(),
            meta_ages: self.onodes.ages(),
            young_evictions: self.buffers.counters().young_evictions,
            onode_evictions: onodes.evictions,
        }
    }

    /// The memory behind the ends of the tables of metadata. It may be given back to the system:
    /// what it holds means nothing.
    pub fn spare_meta(&mut self) -> Spare<'_> {
        self.onodes.spare()
    }

    /// Every time it is told, it looks once through all pages for those to give back; what is in
    /// use then stays, until it is told again.
    pub(super) fn set_budget(&mut self, budget: Budget) {
        if budget.below.is_some() {
            self.progress.walk = Walk::Free(0);
        }
        self.progress.budget = budget;
        self.onodes.set_limit(budget.meta_units);
        self.again = true;
    }

    /// What the shard may have, as it was told last.
    pub(super) fn share(&self) -> Target {
        let Budget { pages, meta_units, .. } = self.progress.budget;
        Target { pages, meta_units }
    }

    pub(super) fn set_policy(&mut self, policy: Policy) {
        self.buffers.set_policy(policy);
        self.again = true;
    }

    pub(super) fn take_in_pages(&mut self, pages: &[PageId]) {
        for page in pages {
            self.buffers.grow(*page);
        }
        self.again = true;
    }

    /// What was given back last has been taken away.
    pub(super) fn end_told(&mut self) {
        if core::mem::take(&mut self.progress.told) {
            self.progress.back.clear();
        }
    }

    pub(super) fn step_budget(&mut self) {
        self.drop_ghosts();
        self.shrink();
        self.vacate();
        self.shrink_meta();
        if !self.progress.back.is_empty() && !self.progress.told {
            self.progress.told = true;
            self.again |= self.progress.back.is_full();
            self.emit(Output::PagesBack { count: self.progress.back.len() as u32 });
        }
    }

    /// Ghosts beyond what the policy keeps, after it was switched or the share became smaller.
    fn drop_ghosts(&mut self) {
        for _ in 0..LOOK_SLICE {
            let Some(block) = self.buffers.drop_ghost_above() else { return };
            forget_ghost(&mut self.onodes, block);
        }
        self.again = true;
    }

    /// Gives back pages above the share, evicting if need be.
    fn shrink(&mut self) {
        while self.buffers.capacity() > self.progress.budget.pages {
            if self.progress.back.is_full() {
                self.again = true;
                return;
            }
            let evicts = self.buffers.free_pages() == 0;
            let Some(page) = self.take_page(Hint::NEW) else { return };
            self.counters.resized_blocks += u64::from(evicts);
            self.give_back(page);
        }
    }

    /// A page that has been taken out of the table leaves for good.
    fn give_back(&mut self, page: PageId) {
        self.buffers.lose_page();
        self.progress.back.push(page).expect("the caller sees to it");
    }

    /// Gives back pages that lie too high: free ones at once, those with clean data after it has
    /// moved.
    fn vacate(&mut self) {
        let below = self.progress.budget.below;
        for _ in 0..LOOK_SLICE {
            if self.progress.back.is_full() {
                break;
            }
            match self.progress.walk {
                Walk::No => return,
                Walk::Free(at) => self.progress.walk = self.vacate_free(at, below),
                Walk::Buffers(slot) if slot == self.buffers.slots() => {
                    self.progress.walk = Walk::No;
                    return;
                }
                Walk::Buffers(slot) => {
                    self.vacate_buffer(BufferId(slot), below);
                    self.progress.walk = Walk::Buffers(slot + 1);
                }
            }
        }
        self.again = true;
    }

    fn vacate_free(&mut self, at: u32, below: PageId) -> Walk {
        match self.buffers.free_page_at(at) {
            None => Walk::Buffers(0),
            Some(page) if page < below => Walk::Free(at + 1),
            Some(page) => {
                self.buffers.take_free_page_at(at);
                self.give_back(page);
                Walk::Free(at)
            }
        }
    }

    fn vacate_buffer(&mut self, buffer: BufferId, below: PageId) {
        let movable = |table: &Buffers<'_>| {
            let page = table.page(buffer);
            let clean = table.state(buffer) == State::Clean && table.pins(buffer) == 0;
            clean && page.is_some() && page >= below
        };
        while movable(&self.buffers) && !self.progress.back.is_full() {
            let Some(page) = self.take_page(Hint::NEW) else { return };
            if page >= below {
                self.give_back(page);
            } else if movable(&self.buffers) {
                let src = self.buffers.set_page(buffer, page);
                self.emit(Output::CopyPage { src, dst: page });
                self.give_back(src);
            } else {
                // It was itself what was evicted for the page.
                self.buffers.give_page(page);
            }
        }
    }

    /// Evicts onodes above the share, and packs the tables.
    fn shrink_meta(&mut self) {
        for _ in 0..META_SLICE {
            if self.onodes.units_over() == 0 {
                break;
            }
            if self.evict_onode().is_none() {
                // What is left is in use, or dirty: that ends by a push.
                self.press();
                return;
            }
            self.again = true;
        }
        for _ in 0..META_SLICE {
            let loose = self.onodes.units_held() > self.onodes.units_used();
            let over = self.onodes.units_held() > self.progress.budget.meta_units;
            if !(loose && over && (self.pack_leaf() || self.onodes.pack_onode())) {
                return;
            }
        }
        self.again = true;
    }

    /// Moves the last leaf to a free slot below it; `false`: not now.
    fn pack_leaf(&mut self) -> bool {
        let Some((from, to)) = self.onodes.top_leaf() else { return false };
        if self.onodes.get(self.onodes.leaf(from).onode).pins > 0 {
            return false;
        }
        self.onodes.move_leaf(from, to);
        for index in 0..LEAF_BLOCKS {
            let (buffer, page) = (self.onodes.ram(to, index), self.onodes.leaf(to).nvme[index]);
            if buffer.is_some() {
                self.buffers.set_block(buffer, addr(to, index));
            }
            if page != NIL {
                self.log.change_owner(page, addr(to, index));
            }
        }
        true
    }
}
