//! The division of memory: how many pages and how much metadata each shard of a cache should have.
//!
//! All shards report what they have by age ([`BudgetReport`]). Memory is handed out by age window,
//! youngest first; within a window metadata comes first, then data, and if there is not enough for
//! a class, the shards that want least get all that they want. What a shard lost although it was
//! young (*pressure*) counts as if it still had it. A report ages while no other follows, since a
//! shard that does nothing reports nothing. So memory moves from what nobody touched for long to
//! who lacks it: an idle shard lends, and gets back as soon as it is under pressure itself.
//!
//! It settles: nothing moves unless somebody lacks something, nobody gets a little more, and one
//! round moves at most a sixteenth of all. Whatever the reports say, the targets never add up to
//! more than the total, and none is below the floors.

use alloc::vec::Vec;

use crate::ages::{WINDOW_ENDS, WINDOWS};
use crate::shard::BudgetReport;
use crate::time::{Duration, Instant};

/// The window with which the pressure of a shard competes that has its fair share: up to 24
/// seconds. One that has less competes with the youngest.
const PRESSURE_AGE: usize = 3;
/// The window with which a shard competes that had to evict onodes: up to 720 seconds.
const META_AGE: usize = 5;
/// One round moves at most this part of all.
const STEP_PART: u64 = 16;
/// Nobody gets more by less than this part of what it has.
const SMALL_PART: u64 = 32;
/// What nobody has is given out when it is more than this part of all.
const SPARE_BYTES_PART: u64 = 64;

/// What a shard may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Target {
    /// Pages, its log's own not counted.
    pub pages: u32,
    /// Metadata, in units ([`META_UNIT_BYTES`](crate::onode::META_UNIT_BYTES)).
    pub meta_units: u32,
}

/// What things cost, and what every shard has at least and at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    /// Bytes that a page costs, its part of the tables included.
    pub page_bytes: u64,
    /// Bytes that a unit of metadata costs.
    pub unit_bytes: u64,
    /// No target is below.
    pub floor: Target,
    /// No target is above: what the tables have room for.
    pub most: Target,
}

impl Rules {
    /// Bytes of a target.
    #[must_use]
    pub fn bytes(&self, target: Target) -> u64 {
        u64::from(target.pages) * self.page_bytes + u64::from(target.meta_units) * self.unit_bytes
    }

    /// Bytes that so many shards need at least.
    #[must_use]
    pub fn bytes_min(&self, shards: usize) -> u64 {
        shards as u64 * self.bytes(self.floor)
    }
}

/// The two classes of memory of a shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Meta,
    Data,
}

/// By urgency.
const CLASSES: [Class; 2] = [Class::Meta, Class::Data];

#[derive(Clone, Copy, Debug)]
struct Part {
    report: BudgetReport,
    reported: Instant,
    /// Pages that it lost since the last round although they were young.
    lost_pages: u64,
    /// It lost onodes since the last round.
    lost_onodes: bool,
    /// Units that it has for now, whatever is divided.
    kept_units: u32,
    target: Target,
    /// What it would have if all could be moved at once, in bytes by class.
    ideal: [u64; 2],
}

/// See the [module](self).
#[derive(Debug)]
pub struct Budget {
    rules: Rules,
    total_bytes: u64,
    parts: Vec<Part>,
}

impl Budget {
    /// A budget of `total_bytes` for so many shards, divided evenly: an eighth for metadata, the
    /// rest for pages.
    ///
    /// # Panics
    /// If that is less than [`Rules::bytes_min`], or there is no shard.
    #[must_use]
    pub fn new(rules: Rules, shards: usize, total_bytes: u64) -> Self {
        assert!(shards > 0, "a cache has a shard");
        let none = Part {
            report: BudgetReport::default(),
            reported: Instant(0),
            lost_pages: 0,
            lost_onodes: false,
            kept_units: 0,
            target: Target::default(),
            ideal: [0; 2],
        };
        let parts = core::iter::repeat_n(none, shards).collect();
        let mut budget = Self { rules, total_bytes: 0, parts };
        budget.set_total(Instant(0), total_bytes);
        let Rules { page_bytes, unit_bytes, floor, most } = rules;
        let spare = (total_bytes - rules.bytes_min(shards)) / shards as u64;
        let target = |floor: u32, most: u32, bytes: u64, each: u64| {
            let more = u32::try_from(bytes / each).unwrap_or(u32::MAX);
            floor.saturating_add(more).min(most.max(floor))
        };
        let meta_units = target(floor.meta_units, most.meta_units, spare / 8, unit_bytes);
        let spare = spare - u64::from(meta_units - floor.meta_units) * unit_bytes;
        let pages = target(floor.pages, most.pages, spare, page_bytes);
        for part in &mut budget.parts {
            part.target = Target { pages, meta_units };
        }
        budget
    }

    /// Divides anew, in proportion to what each shard had beyond the floor in a former life. Shards
    /// of which nothing is known had the floor; if that is so of all, nothing changes.
    pub fn resume(&mut self, former: &[Target]) {
        let Rules { floor, most, .. } = self.rules;
        let beyond = |target: Target| Target {
            pages: target.pages.min(most.pages).saturating_sub(floor.pages),
            meta_units: target.meta_units.min(most.meta_units).saturating_sub(floor.meta_units),
        };
        let had: u64 = former.iter().map(|former| self.rules.bytes(beyond(*former))).sum();
        if had == 0 {
            return;
        }
        let spare = self.total_bytes - self.rules.bytes_min(self.parts.len());
        let share = |floor: u32, most: u32, had_units: u32| {
            let units = u64::from(floor) + scale(spare, had_units.into(), had);
            units.min(most.max(floor).into()) as u32
        };
        for (shard, part) in self.parts.iter_mut().enumerate() {
            let former = former.get(shard).copied().unwrap_or(floor);
            let Target { pages, meta_units } = beyond(former);
            part.target = Target {
                pages: share(floor.pages, most.pages, pages),
                meta_units: share(floor.meta_units, most.meta_units, meta_units),
            };
        }
        debug_assert!(self.used_bytes() <= self.total_bytes, "the total is hard");
    }

    /// Bytes of all targets together at most.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Bytes of all targets together.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.parts.iter().map(|part| self.rules.bytes(part.target)).sum()
    }

    /// Changes the total. If it is less than the targets take, they take less at once; otherwise
    /// the next round moves.
    ///
    /// # Panics
    /// If it is less than [`Rules::bytes_min`].
    pub fn set_total(&mut self, now: Instant, total_bytes: u64) {
        let needed = self.rules.bytes_min(self.parts.len());
        assert!(total_bytes >= needed, "{total_bytes} bytes are less than the floor of {needed}");
        self.total_bytes = total_bytes;
        if self.used_bytes() > total_bytes {
            self.round(now);
        }
    }

    /// Whether a shard may have less than an even share.
    #[must_use]
    pub fn is_below_fair(&self, shard: usize) -> bool {
        self.rules.bytes(self.parts[shard].target) < self.fair_bytes()
    }

    fn fair_bytes(&self) -> u64 {
        self.total_bytes / self.parts.len() as u64
    }

    /// What a shard may have.
    #[must_use]
    pub fn target(&self, shard: usize) -> Target {
        self.parts[shard].target
    }

    /// The shard's target is to have so many units at least, before anything else is divided.
    pub fn keep_units(&mut self, shard: usize, units: u32) {
        self.parts[shard].kept_units = units;
    }

    /// Takes a shard's report, which counts until the next one comes.
    pub fn handle_report(&mut self, now: Instant, shard: usize, report: BudgetReport) {
        let part = &mut self.parts[shard];
        // Counts since the start: what is below the last one is a shard that began anew.
        let lost = report.young_evictions.saturating_sub(part.report.young_evictions);
        part.lost_pages = part.lost_pages.saturating_add(lost).min(u32::MAX.into());
        part.lost_onodes |= report.onode_evictions > part.report.onode_evictions;
        (part.report, part.reported) = (report, now);
    }

    /// Moves memory to who lacks it. True if a target has changed.
    pub fn round(&mut self, now: Instant) -> bool {
        let over = self.used_bytes().saturating_sub(self.total_bytes);
        let spare = self.total_bytes.saturating_sub(self.used_bytes());
        let much = spare > self.total_bytes / SPARE_BYTES_PART;
        if over == 0 && !much && !self.parts.iter().any(|part| part.lacks(&self.rules)) {
            return false;
        }
        self.divide(now);
        let before: Vec<Target> = self.parts.iter().map(|part| part.target).collect();
        self.step(over);
        for part in &mut self.parts {
            // It has been heard. Who still lacks something says so again.
            (part.lost_pages, part.lost_onodes) = (0, false);
        }
        debug_assert!(self.used_bytes() <= self.total_bytes, "the total is hard");
        self.parts.iter().zip(before).any(|(part, before)| part.target != before)
    }

    /// Sets the ideals: what each would have if all could be moved at once.
    fn divide(&mut self, now: Instant) {
        let mut left = self.total_bytes - self.rules.bytes_min(self.parts.len());
        for part in &mut self.parts {
            part.ideal = CLASSES.map(|class| self.rules.floor_bytes(class));
        }
        self.hand_out(&mut left, Class::Meta, |part| part.kept_units.into());
        for class in CLASSES {
            self.hand_out(&mut left, class, |part| part.min_units(class));
        }
        let rules = self.rules;
        let fair = self.fair_bytes();
        for age in 0..WINDOWS {
            let claim = |part: &Part| part.data_to_age(now, age, rules.bytes(part.target) < fair);
            self.hand_out(&mut left, Class::Meta, |part| part.meta_to_age(now, age));
            self.hand_out(&mut left, Class::Data, claim);
        }
        let pressure = |part: &Part| 1 + part.lost_pages;
        for _ in 0..self.parts.len() {
            // Each pass ends for good who has all that its tables have room for.
            let most = rules.most_bytes(Class::Data);
            let open = |part: &Part| part.ideal[Class::Data as usize] < most;
            let weights: u64 = self.parts.iter().filter(|part| open(part)).map(pressure).sum();
            let pot = left;
            for part in self.parts.iter_mut().filter(|part| open(part)) {
                let ideal = &mut part.ideal[Class::Data as usize];
                let more = scale(pot, 1 + part.lost_pages, weights);
                let more = more.min(most - *ideal);
                *ideal += more;
                left -= more;
            }
        }
    }

    /// Raises each shard's ideal for the class to so many units. If `left` is not enough, who wants
    /// less than an even share gets all of it, and the others share the rest evenly.
    fn hand_out(&mut self, left: &mut u64, class: Class, units: impl Fn(&Part) -> u64) {
        let (each, most) = (self.rules.each_bytes(class), self.rules.most_bytes(class));
        let want = |part: &Part| {
            let wanted = units(part).saturating_mul(each).min(most);
            wanted.saturating_sub(part.ideal[class as usize])
        };
        loop {
            let wanting = self.parts.iter().filter(|part| want(part) > 0).count() as u64;
            let Some(share) = left.checked_div(wanting) else { return };
            let modest = self.parts.iter().any(|part| (1..=share).contains(&want(part)));
            for part in &mut self.parts {
                let more = want(part);
                if !modest || more <= share {
                    let more = more.min(share);
                    part.ideal[class as usize] += more;
                    *left -= more;
                }
            }
            if !modest {
                return;
            }
        }
    }

    /// Goes a step from the targets towards the ideals, and at least `over` bytes down.
    fn step(&mut self, over: u64) {
        let rules = self.rules;
        let free = self.total_bytes.saturating_sub(self.used_bytes());
        let (mut up, mut down) = (0, 0);
        for part in &self.parts {
            for class in CLASSES {
                let (more, less) = part.difference(&rules, class);
                up += more;
                down += less;
            }
        }
        // What nobody had yet is given without a limit; it is taken from nobody. The ideals leave
        // at least what is over.
        let step = self.total_bytes / STEP_PART;
        let given = up.min(free + (down - over).min(step));
        let taken = over + given.saturating_sub(free);
        for part in &mut self.parts {
            for class in CLASSES {
                let (more, less) = part.difference(&rules, class);
                let each = rules.each_bytes(class);
                let units = part.target.units(class);
                *units += (scale(given, more, up) / each) as u32;
                *units -= scale_up(taken, less, down).div_ceil(each) as u32;
            }
        }
    }
}

impl Part {
    /// Whether it has less than it could use.
    fn lacks(&self, rules: &Rules) -> bool {
        let Self { report, target, .. } = self;
        let pages = self.lost_pages > 0 && target.pages < rules.most.pages;
        let meta = self.lost_onodes && target.meta_units < rules.most.meta_units;
        let pages_short = report.pages_min > target.pages;
        pages || meta || pages_short || report.meta_units_min > target.meta_units
    }

    fn min_units(&self, class: Class) -> u64 {
        u64::from(match class {
            Class::Meta => self.report.meta_units_min,
            Class::Data => self.report.pages_min,
        })
    }

    /// Metadata used within the window or a younger one. If some is lacked, more than it may have
    /// now: it may not have got that yet, as memory comes in whole chunks from the arena.
    fn meta_to_age(&self, now: Instant, age: usize) -> u64 {
        let target = u64::from(self.target.meta_units);
        let lacks = age >= META_AGE && self.lost_onodes;
        let wanted = if lacks { target + target / 8 + 1 } else { 0 };
        wanted.max(to_age(&self.report.meta_ages, now - self.reported, age))
    }

    /// Pages used within the window or a younger one, and those it lacks.
    fn data_to_age(&self, now: Instant, age: usize, below_fair: bool) -> u64 {
        let lacks = below_fair || age >= PRESSURE_AGE;
        let lacked = if lacks { self.lost_pages } else { 0 };
        lacked.saturating_add(to_age(&self.report.page_ages, now - self.reported, age))
    }

    /// Bytes that the ideal has more than the target (unless it is a little), or less.
    fn difference(&self, rules: &Rules, class: Class) -> (u64, u64) {
        let mut target = self.target;
        let now = u64::from(*target.units(class)) * rules.each_bytes(class);
        let ideal = self.ideal[class as usize];
        let more = ideal.saturating_sub(now);
        (if more > now / SMALL_PART { more } else { 0 }, now.saturating_sub(ideal))
    }
}

impl Target {
    fn units(&mut self, class: Class) -> &mut u32 {
        match class {
            Class::Meta => &mut self.meta_units,
            Class::Data => &mut self.pages,
        }
    }
}

impl Rules {
    fn each_bytes(&self, class: Class) -> u64 {
        match class {
            Class::Meta => self.unit_bytes,
            Class::Data => self.page_bytes,
        }
    }

    fn floor_bytes(&self, class: Class) -> u64 {
        let mut floor = self.floor;
        u64::from(*floor.units(class)) * self.each_bytes(class)
    }

    fn most_bytes(&self, class: Class) -> u64 {
        let (mut most, mut floor) = (self.most, self.floor);
        u64::from((*most.units(class)).max(*floor.units(class))) * self.each_bytes(class)
    }
}

/// Units in the window or a younger one, of what was reported so long ago.
fn to_age(ages: &[u64; WINDOWS], passed: Duration, age: usize) -> u64 {
    let seconds = |end: &u16| Duration::from_secs(u64::from(*end));
    let end = WINDOW_ENDS.get(age).map_or(Duration(u64::MAX), seconds);
    let begins = core::iter::once(Duration(0)).chain(WINDOW_ENDS.iter().map(seconds));
    let young = begins.zip(ages).filter(|(begin, _)| passed.0.saturating_add(begin.0) < end.0);
    young.map(|(_, units)| *units).fold(0, u64::saturating_add)
}

/// `whole * part / parts`, rounded down; 0 of nothing.
fn scale(whole: u64, part: u64, parts: u64) -> u64 {
    let share = u128::from(whole) * u128::from(part);
    share.checked_div(u128::from(parts)).map_or(0, |share| share as u64)
}

/// As [`scale`], rounded up.
fn scale_up(whole: u64, part: u64, parts: u64) -> u64 {
    let share = u128::from(whole) * u128::from(part);
    if parts == 0 { 0 } else { share.div_ceil(u128::from(parts)) as u64 }
}

#[cfg(test)]
mod tests;
