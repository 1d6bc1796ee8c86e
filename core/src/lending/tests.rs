use alloc::collections::BTreeSet;
use alloc::vec;

use super::*;
use crate::random::Random;
use crate::time::Duration;

const CHUNK: u32 = 64;
const SHARDS: usize = 3;
const CORES: usize = 2;

const SETUP: Setup = Setup {
    rules: Rules {
        page_bytes: 4096 + 64,
        unit_bytes: 256,
        floor: Target { pages: 20, meta_units: 16 },
        most: Target { pages: 3000, meta_units: 4000 },
    },
    shards: SHARDS,
    cores: CORES,
    fixed_pages: 5,
    core_pages: 30,
    chunk_pages: CHUNK,
    aside_bytes: 1 << 20,
};

/// What a place does with its pages.
#[derive(Default)]
struct Holder {
    pages: BTreeSet<u32>,
    most: u32,
    below: u32,
}

/// Cores, shards and an arena that do what they are told, late.
struct World {
    lending: Lending,
    shards: Vec<Holder>,
    cores: Vec<Holder>,
    /// Messages to the places, and cores that have to answer.
    mail: VecDeque<(Place, Vec<PageId>)>,
    answers: VecDeque<u32>,
    covered: u32,
    growing: Option<u32>,
    resident: u32,
    evictions: u64,
    now: Instant,
}

impl World {
    fn new(total: u64) -> Self {
        let lending = Lending::new(SETUP, total, &[]).unwrap();
        let holder = |place, most| Holder {
            pages: lending.start_of(place).collect(),
            most,
            below: u32::MAX,
        };
        let shard = |shard| holder(Place::Shard(shard), lending.target(shard).pages);
        let resident = lending.backed_pages();
        Self {
            shards: (0..SHARDS).map(shard).collect(),
            cores: (0..CORES).map(|core| holder(Place::Core(core), 30)).collect(),
            mail: VecDeque::new(),
            answers: VecDeque::new(),
            covered: resident,
            growing: None,
            resident,
            evictions: 0,
            now: Instant(0),
            lending,
        }
    }

    fn carry_out(&mut self) {
        while let Some(output) = self.lending.poll_output() {
            match output {
                Output::Budget { shard, target, below, .. } => {
                    assert!(target.pages >= 20 && target.meta_units >= 16, "a floor: {target:?}");
                    (self.shards[shard].most, self.shards[shard].below) = (target.pages, below.0);
                }
                Output::Below(page) => self.cores.iter_mut().for_each(|core| core.below = page.0),
                Output::Pages { to, pages } => {
                    assert!((1..=PAGES_MAX).contains(&pages.len()));
                    self.mail.push_back((to, pages));
                }
                Output::Grow { pages } => self.growing = Some(pages),
                Output::Cover { pages } => {
                    assert!(self.answers.is_empty(), "one thing after the other");
                    self.answers.extend(vec![pages; CORES]);
                }
                Output::Shrink { pages } => {
                    assert!(self.answers.is_empty() && self.covered == pages);
                    self.resident = pages;
                }
            }
        }
        self.check();
    }

    /// Every page is in one place, and nobody has one without memory.
    fn check(&self) {
        let mut all: Vec<u32> = (0..SHARDS).flat_map(|shard| SETUP.fixed_of(shard)).collect();
        let holders = self.shards.iter().chain(&self.cores);
        all.extend(holders.flat_map(|holder| holder.pages.iter().copied()));
        all.extend(self.mail.iter().flat_map(|(_, pages)| pages.iter().map(|page| page.0)));
        all.extend(&self.lending.pool);
        all.sort_unstable();
        let usable = self.lending.backed_pages();
        assert!(all.iter().copied().eq(0..usable), "{} pages of {usable}", all.len());
        assert!(usable <= self.resident);
    }

    fn give_back(&mut self, place: Place, random: &mut Random) {
        let holder = match place {
            Place::Shard(shard) => &mut self.shards[shard],
            Place::Core(core) => &mut self.cores[core],
        };
        let mut back: Vec<PageId> = Vec::new();
        while back.len() < PAGES_MAX {
            let last = holder.pages.last().copied();
            let high = last.filter(|page| *page >= holder.below);
            let surplus = holder.pages.len() > holder.most as usize && random.below(4) > 0;
            let Some(page) = high.or(last.filter(|_| surplus)) else { break };
            holder.pages.remove(&page);
            back.push(PageId(page));
        }
        self.lending.handle_pages(place, &back);
    }

    fn deliver(&mut self) {
        let Some((place, pages)) = self.mail.pop_front() else { return };
        let holder = match place {
            Place::Shard(shard) => &mut self.shards[shard],
            Place::Core(core) => &mut self.cores[core],
        };
        holder.pages.extend(pages.iter().map(|page| page.0));
    }

    fn answer(&mut self) {
        if let Some(pages) = self.answers.pop_front() {
            self.covered = pages;
            self.lending.handle_covered();
        }
    }

    fn grow(&mut self, ok: bool) {
        if let Some(pages) = self.growing.take() {
            self.resident = if ok { pages } else { self.resident };
            self.lending.handle_grown(self.now, ok);
        }
    }

    fn report(&mut self, random: &mut Random) {
        let shard = random.below(SHARDS as u64) as usize;
        let held = self.shards[shard].pages.len() as u64;
        let mut report = BudgetReport { pages: held as u32, ..BudgetReport::default() };
        let most = self.lending.target(shard).meta_units;
        report.meta_units_held = random.below(u64::from(most) + 1) as u32;
        report.page_ages[random.below(7) as usize] = held;
        self.evictions += random.below(3) * random.below(1000);
        report.young_evictions = self.evictions;
        report.onode_evictions = self.evictions / 7;
        self.lending.handle_report(self.now, shard, report);
        self.lending.round(self.now);
    }

    fn step(&mut self, random: &mut Random) {
        self.now = self.now + Duration::from_millis(random.below(500));
        match random.below(6) {
            0 => self.give_back(place(random.below(5) as usize), random),
            1 | 2 => self.deliver(),
            3 => self.answer(),
            4 => self.grow(random.below(10) > 0),
            _ => self.report(random),
        }
        self.carry_out();
    }

    /// Lets everything that is under way end.
    fn calm(&mut self, random: &mut Random) {
        for round in 0..500 {
            self.give_back(place(round % 5), random);
            self.carry_out();
            self.deliver();
            self.answer();
            self.carry_out();
            self.grow(true);
            self.carry_out();
        }
        assert!(self.mail.is_empty() && self.answers.is_empty() && self.growing.is_none());
        assert!(self.lending.is_settled());
    }
}

fn place(number: usize) -> Place {
    if number < SHARDS { Place::Shard(number) } else { Place::Core(number - SHARDS) }
}

#[test]
fn every_page_is_in_one_place_and_the_total_is_never_passed() {
    for seed in 0..20 {
        let mut random = Random(seed);
        let mut world = World::new(SETUP.bytes_min() + random.below(8 << 20));
        for step in 0..1500 {
            if step % 300 == 150 {
                let total = world.lending.bytes_min() + random.below(8 << 20);
                world.lending.resize(world.now, total).unwrap();
                world.carry_out();
            }
            let before = world.lending.usage().taken_bytes;
            world.step(&mut random);
            let usage = world.lending.usage();
            assert!(usage.taken_bytes <= usage.total_bytes.max(before), "seed {seed}: {usage:?}");
        }
        world.calm(&mut random);
        let usage = world.lending.usage();
        assert!(usage.taken_bytes <= usage.total_bytes, "seed {seed}: {usage:?}");
        for holder in world.shards.iter().chain(&world.cores) {
            assert!(holder.pages.len() as u32 <= holder.most, "seed {seed}");
            assert!(holder.pages.iter().all(|page| *page < holder.below), "seed {seed}");
        }
        assert!(world.cores.iter().all(|core| core.pages.len() == 30), "seed {seed}");
    }
}

#[test]
fn a_resize_is_followed_down_and_up() {
    let mut random = Random(1);
    let small = SETUP.bytes_min() + (1 << 20);
    let mut world = World::new(8 << 20);
    let at_start = world.lending.usage();
    assert!(at_start.taken_bytes > 7 << 20, "{at_start:?}");
    for (total, least) in [(small, small * 3 / 4), (8 << 20, 7 << 20), (16 << 20, 15 << 20)] {
        world.lending.resize(world.now, total).unwrap();
        world.carry_out();
        world.calm(&mut random);
        let usage = world.lending.usage();
        assert!((least..=total).contains(&usage.taken_bytes), "{total}: {usage:?}");
        assert_eq!(usage.arena_bytes, u64::from(world.resident) * 4096);
    }
}

#[test]
fn memory_that_the_system_does_not_have_is_not_asked_for_again() {
    let mut world = World::new(4 << 20);
    let before = world.lending.usage();
    world.lending.resize(world.now, 12 << 20).unwrap();
    world.carry_out();
    world.grow(false);
    world.carry_out();
    assert_eq!(world.growing, None);
    assert!(world.lending.is_settled());
    assert_eq!(world.lending.usage().arena_bytes, before.arena_bytes);
    assert!(world.lending.usage().total_bytes < 5 << 20);
}

#[test]
fn too_little_is_refused_with_what_is_needed() {
    let needed = SETUP.bytes_min();
    assert_eq!(Lending::new(SETUP, needed - 1, &[]).unwrap_err(), needed);
    let mut world = World::new(needed);
    world.carry_out();
    let now = world.now;
    assert!(world.lending.resize(now, world.lending.bytes_min() - 1).is_err());
    world.lending.resize(now, world.lending.bytes_min()).unwrap();
}

#[test]
#[should_panic(expected = "was in the pool")]
fn a_page_that_comes_back_twice_is_noticed() {
    let mut world = World::new(4 << 20);
    let pages = [PageId(100), PageId(100)];
    world.lending.handle_pages(Place::Shard(0), &pages);
}
