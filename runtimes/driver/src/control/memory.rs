//! The memory of the process: what the machine that divides it decides is carried out here.

use heeler_core::ids::PageId;
use heeler_core::lending::{Lending, Output, Place};
use heeler_core::shard::{Budget, BudgetReport};
use heeler_core::time::{Duration, Instant};
use heeler_hw::Arena;

use super::links::Links;
use crate::mail::FromControl;

/// How often shards are told again to give back pages that lose their memory.
const REMIND_EVERY: Duration = Duration::from_millis(50);

/// What the control thread needs to divide memory.
#[derive(Debug)]
pub struct Memory {
    /// Decides.
    pub lending: Lending,
    /// The pages of the process.
    pub arena: Arena,
    /// Bytes of fetched blocks on their way to the cores at most.
    pub fetch_bytes: usize,
    /// Bytes of batches on their way to the store at most, of all cores together.
    pub batch_bytes: usize,
}

/// The memory as the control thread has it.
#[derive(Debug)]
pub(super) struct Divided {
    pub(super) lending: Lending,
    arena: Arena,
    remind_at: Option<Instant>,
}

impl Divided {
    pub(super) fn new(memory: Memory, links: &mut Links) -> Self {
        let Memory { lending, arena, .. } = memory;
        let mut this = Self { lending, arena, remind_at: None };
        this.carry_out(Instant(0), links);
        this
    }

    /// Does what is due, and returns when to come back.
    pub(super) fn turn(&mut self, now: Instant, links: &mut Links) -> Option<Instant> {
        if !self.lending.is_vacating() {
            self.remind_at = None;
        } else if self.remind_at.is_none_or(|at| at <= now) {
            if self.remind_at.is_some() {
                self.lending.remind();
                self.carry_out(now, links);
            }
            self.remind_at = Some(now + REMIND_EVERY);
        }
        self.remind_at
    }

    pub(super) fn handle_report(
        &mut self,
        now: Instant,
        links: &mut Links,
        shard: usize,
        report: BudgetReport,
    ) {
        self.lending.handle_report(now, shard, report);
        self.lending.round(now);
        self.carry_out(now, links);
    }

    pub(super) fn handle_pages(
        &mut self,
        now: Instant,
        links: &mut Links,
        from: Place,
        pages: &[PageId],
    ) {
        self.lending.handle_pages(from, pages);
        self.carry_out(now, links);
    }

    pub(super) fn handle_covered(&mut self, now: Instant, links: &mut Links) {
        self.lending.handle_covered();
        self.carry_out(now, links);
    }

    /// Changes the total.
    ///
    /// # Errors
    /// The bytes that are needed at least.
    pub(super) fn resize(
        &mut self,
        now: Instant,
        links: &mut Links,
        bytes: u64,
    ) -> Result<(), u64> {
        self.lending.resize(now, bytes)?;
        self.carry_out(now, links);
        Ok(())
    }

    fn carry_out(&mut self, now: Instant, links: &mut Links) {
        while let Some(output) = self.lending.poll_output() {
            match output {
                Output::Budget { shard, target, below, hurry } => {
                    let budget =
                        Budget { pages: target.pages, meta_units: target.meta_units, below };
                    links.budget(shard, budget, hurry);
                }
                Output::Below(page) => links.send_to_all(|| FromControl::Below(page)),
                Output::Pages { to, pages } => links.pages(to, pages),
                Output::Cover { pages } => links.send_to_all(|| FromControl::Cover { pages }),
                Output::Grow { pages } => {
                    let grown = self.arena.grow(pages);
                    if let Err(e) = &grown {
                        log::error!("the system has not enough memory for this size: {e}");
                    }
                    self.lending.handle_grown(now, grown.is_ok());
                }
                Output::Shrink { pages } => {
                    if let Err(e) = self.arena.shrink(pages) {
                        log::error!("memory could not be given back to the system: {e}");
                    }
                }
            }
        }
    }
}
