use super::*;
use crate::random::Random;

const RULES: Rules = Rules {
    page_bytes: 4160,
    unit_bytes: 256,
    floor: Target { pages: 100, meta_units: 64 },
    most: Target { pages: 20_000, meta_units: 30_000 },
};

fn at(seconds: u64) -> Instant {
    Instant(0) + Duration::from_secs(seconds)
}

/// A shard that uses all its pages all the time and could use as many more.
fn busy(budget: &Budget, shard: usize) -> BudgetReport {
    let Target { pages, .. } = budget.target(shard);
    let mut report = BudgetReport { pages, ..BudgetReport::default() };
    report.page_ages[0] = pages.into();
    report.young_evictions = evicted(budget, shard) + u64::from(pages);
    report
}

/// What the shard has said.
fn evicted(budget: &Budget, shard: usize) -> u64 {
    budget.parts[shard].report.young_evictions
}

fn check(budget: &Budget, shards: usize) {
    assert!(budget.used_bytes() <= budget.total_bytes(), "the total is hard");
    for shard in 0..shards {
        let Target { pages, meta_units } = budget.target(shard);
        assert!(pages >= RULES.floor.pages && meta_units >= RULES.floor.meta_units, "a floor");
        assert!(pages <= RULES.most.pages && meta_units <= RULES.most.meta_units, "the tables");
    }
}

fn moved_bytes(before: &[Target], budget: &Budget) -> u64 {
    let lost = |(shard, before): (usize, &Target)| {
        let now = budget.target(shard);
        u64::from(before.pages.saturating_sub(now.pages)) * RULES.page_bytes
            + u64::from(before.meta_units.saturating_sub(now.meta_units)) * RULES.unit_bytes
    };
    before.iter().enumerate().map(lost).sum()
}

#[test]
fn whatever_is_reported_the_total_and_the_floors_hold() {
    let mut random = Random(5);
    for _ in 0..300 {
        let shards = 1 + random.below(9) as usize;
        let least = RULES.bytes_min(shards);
        let some_total = |random: &mut Random| least + random.below(40 << 20);
        let mut budget = Budget::new(RULES, shards, some_total(&mut random));
        let mut now = Instant(0);
        check(&budget, shards);
        for _ in 0..60 {
            now = now + Duration::from_millis(random.below(20_000));
            let before: Vec<Target> = (0..shards).map(|shard| budget.target(shard)).collect();
            if random.below(8) == 0 {
                let total = some_total(&mut random);
                budget.set_total(now, total);
                check(&budget, shards);
                continue;
            }
            let mut number = || match random.below(4) {
                0 => 0,
                1 => random.below(100),
                2 => random.below(30_000),
                _ => random.below(u64::MAX),
            };
            let report = BudgetReport {
                pages: number() as u32,
                meta_units: number() as u32,
                page_ages: core::array::from_fn(|_| number()),
                meta_ages: core::array::from_fn(|_| number()),
                pages_min: number() as u32,
                meta_units_held: number() as u32,
                meta_units_min: number() as u32,
                onode_evictions: number(),
                young_evictions: number(),
            };
            budget.handle_report(now, random.below(shards as u64) as usize, report);
            budget.round(now);
            check(&budget, shards);
            // Rounding to whole pages may add one for each.
            let most = budget.total_bytes() / STEP_PART + shards as u64 * 2 * RULES.page_bytes;
            assert!(moved_bytes(&before, &budget) <= most, "a round is a step");
        }
    }
}

#[test]
fn nothing_moves_while_nobody_lacks_anything() {
    let mut budget = Budget::new(RULES, 4, 16 << 20);
    let even = budget.target(0);
    for second in 1..100 {
        for shard in 0..4 {
            let young_evictions = evicted(&budget, shard);
            budget.handle_report(
                at(second),
                shard,
                BudgetReport { young_evictions, ..busy(&budget, shard) },
            );
            assert!(!budget.round(at(second)));
        }
    }
    assert_eq!(budget.target(3), even);
}

#[test]
fn an_idle_shard_lends_and_gets_back() {
    let mut budget = Budget::new(RULES, 4, 16 << 20);
    let even = budget.target(0);
    for shard in 0..4 {
        budget.handle_report(at(0), shard, busy(&budget, shard));
    }
    // All others sleep, and say nothing more.
    for second in 30..60 {
        budget.handle_report(at(second), 2, busy(&budget, 2));
        budget.round(at(second));
    }
    let lent = budget.target(2);
    assert!(lent.pages > even.pages * 3, "{lent:?} of {even:?}");
    assert!(budget.target(0).pages < even.pages / 2, "{:?}", budget.target(0));
    // One of them wakes up.
    let rounds = (60..200).position(|second| {
        budget.handle_report(at(second), 2, busy(&budget, 2));
        budget.handle_report(at(second), 0, busy(&budget, 0));
        budget.round(at(second));
        budget.target(0).pages >= even.pages
    });
    assert!(rounds.is_some_and(|rounds| rounds <= 30), "{rounds:?}");
    for shard in [1, 3] {
        assert!(budget.target(shard).pages < even.pages / 2, "these sleep on");
    }
}

#[test]
fn equal_demand_settles() {
    let mut budget = Budget::new(RULES, 2, 16 << 20);
    for second in 0..60 {
        budget.handle_report(at(second), 0, busy(&budget, 0));
        budget.round(at(second));
    }
    assert!(budget.target(0).pages > 3000 && budget.target(1).pages < 900);
    let mut moves = 0;
    for second in 60..160 {
        for shard in 0..2 {
            budget.handle_report(at(second), shard, busy(&budget, shard));
        }
        if budget.round(at(second)) && second > 110 {
            moves += 1;
        }
    }
    assert_eq!(moves, 0, "it has settled");
    let (a, b) = (budget.target(0).pages, budget.target(1).pages);
    assert!(a.abs_diff(b) < a / 8, "{a} and {b}");
}

#[test]
fn of_one_age_metadata_is_kept_first() {
    let total = RULES.bytes_min(1) + 100 * RULES.page_bytes + 1000 * RULES.unit_bytes;
    let mut budget = Budget::new(RULES, 1, 2 * total);
    let mut report = BudgetReport::default();
    (report.meta_ages[4], report.page_ages[4]) = (1064, 5000);
    budget.handle_report(at(0), 0, report);
    budget.set_total(at(0), total);
    assert_eq!(budget.target(0), Target { pages: 200, meta_units: 1064 });
    // What is younger comes before it.
    report.page_ages = [5000, 0, 0, 0, 0, 0, 0];
    let mut budget = Budget::new(RULES, 1, 2 * total);
    budget.handle_report(at(0), 0, report);
    budget.set_total(at(0), total);
    let Target { pages, meta_units } = budget.target(0);
    assert_eq!(meta_units, RULES.floor.meta_units);
    assert!(pages > 250, "{pages}");
}

#[test]
fn metadata_that_is_evicted_grows_at_the_cost_of_old_data() {
    for (age, grows) in [(0, false), (6, true)] {
        let mut budget = Budget::new(RULES, 1, 16 << 20);
        let start = budget.target(0).meta_units;
        for second in 0..50 {
            let Target { pages, meta_units } = budget.target(0);
            let mut report = BudgetReport { pages, meta_units, ..BudgetReport::default() };
            report.onode_evictions = second;
            report.meta_ages[0] = meta_units.into();
            report.page_ages[age] = pages.into();
            budget.handle_report(at(second), 0, report);
            budget.round(at(second));
        }
        let now = budget.target(0).meta_units;
        assert_eq!(now > start * 2, grows, "{now} of {start}");
    }
}

/// What a shard might have more was an eighth beyond what it used. It does not use more before the
/// memory is there, which the arena gives back in whole chunks only: if these were larger, none was
/// given back, and a small server knew hardly anything of a large device.
#[test]
fn what_metadata_should_have_grows_while_it_waits_for_memory() {
    let mut budget = Budget::new(RULES, 2, 16 << 20);
    let Target { pages, meta_units } = budget.target(0);
    for second in 0..40 {
        let mut report = BudgetReport { pages, meta_units, ..BudgetReport::default() };
        report.onode_evictions = second;
        report.meta_ages[0] = meta_units.into();
        report.page_ages[0] = u64::from(pages) / 2;
        for shard in 0..2 {
            budget.handle_report(at(second), shard, report);
        }
        budget.round(at(second));
    }
    let now = budget.target(0).meta_units;
    assert!(now > meta_units * 3, "{now} of {meta_units}");
}

#[test]
fn what_a_shard_cannot_do_without_comes_before_all_ages() {
    let mut budget = Budget::new(RULES, 2, 4 << 20);
    let even = budget.target(0).pages;
    let mut report = busy(&budget, 1);
    report.page_ages[0] = 1_000_000;
    budget.handle_report(at(0), 1, report);
    let pages_min = even + 50;
    budget.handle_report(at(0), 0, BudgetReport { pages_min, ..BudgetReport::default() });
    for second in 0..20 {
        budget.round(at(second));
    }
    assert!(budget.target(0).pages + budget.target(0).pages / 30 >= pages_min);
}

fn targets(budget: &Budget, shards: usize) -> Vec<Target> {
    (0..shards).map(|shard| budget.target(shard)).collect()
}

/// Shards that began with even shares took as long to be as hot as before as memory took to move.
#[test]
fn a_later_life_divides_as_the_one_before() {
    let mut budget = Budget::new(RULES, 3, 16 << 20);
    for second in 0..60 {
        let report = busy(&budget, 1);
        budget.handle_report(at(second), 1, report);
        budget.round(at(second));
    }
    let before = targets(&budget, 3);
    assert!(before[1].pages > 5 * before[0].pages, "{before:?}");
    let mut later = Budget::new(RULES, 3, 16 << 20);
    later.resume(&before);
    for (before, later) in before.iter().zip(targets(&later, 3)) {
        assert!(before.pages.abs_diff(later.pages) <= before.pages / 32, "{before:?} {later:?}");
    }
}

#[test]
fn whatever_the_shares_were_the_total_and_the_floors_hold() {
    let mut random = Random(6);
    for _ in 0..1000 {
        let shards = 1 + random.below(9) as usize;
        let total = RULES.bytes_min(shards) + random.below(40 << 20);
        let mut budget = Budget::new(RULES, shards, total);
        let even = targets(&budget, shards);
        let few = random.below(2) == 0;
        let some = |random: &mut Random| {
            random.next() as u32 >> if few { 18 } else { random.below(33).min(31) }
        };
        let share = |_| Target { pages: some(&mut random), meta_units: some(&mut random) };
        let former: Vec<Target> = (0..shards).map(share).collect();
        budget.resume(&former[..random.below(shards as u64 + 1) as usize]);
        check(&budget, shards);
        budget.resume(&[RULES.floor, Target::default()]);
        check(&budget, shards);
        let mut fresh = Budget::new(RULES, shards, total);
        fresh.resume(&[RULES.floor, Target::default()]);
        assert_eq!(targets(&fresh, shards), even, "nothing is known");
    }
}

#[test]
fn who_had_nothing_begins_with_the_least_when_others_had_something() {
    let mut budget = Budget::new(RULES, 3, 16 << 20);
    budget.resume(&[Target { pages: 300, meta_units: 100 }, Target::default()]);
    assert_eq!([budget.target(1), budget.target(2)], [RULES.floor; 2]);
    let Target { pages, meta_units } = budget.target(0);
    let bytes = RULES.bytes(Target { pages: pages - 100, meta_units: meta_units - 64 });
    let spare = (16 << 20) - RULES.bytes_min(3);
    assert!(bytes <= spare && bytes + RULES.page_bytes + RULES.unit_bytes > spare, "all of it");
    assert_eq!((pages - 100) / (meta_units - 64), 200 / 36, "as it was divided");
}

#[test]
#[should_panic(expected = "less than the floor")]
fn less_than_the_floors_is_refused() {
    let _ = Budget::new(RULES, 2, RULES.bytes_min(2) - 1);
}
