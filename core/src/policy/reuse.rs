//! Learned reuse: what is evicted is what, judging by others of its kind and age, would give the
//! fewest hits for the time it would stay.
//!
//! Every buffer has a *kind* - how often its block came back so far, whether it was last read or
//! written, by a long or a short request - and the time of its last use. For each kind the policy
//! counts at which ages blocks came back, and at which they were given up. Ghosts are counted too,
//! so what is learned does not depend on what was kept. From the counts follows an *index* for each
//! kind and age: the best rate of hits per time that keeping such a buffer from now on can give.
//! (Hit density: Beckmann, Chen, Cidon: "LHD: improving cache hit rate by maximizing hit density",
//! NSDI 2018. The best rate over all times of stopping is the index of Gittins: "Bandit processes
//! and dynamic allocation indices", J. R. Stat. Soc. B, 1979.)
//!
//! All buffers are on one list, hot, and a hand goes round them. It passes over those with an index
//! above a threshold, takes the first that is not, and moves the threshold so that it passes over a
//! few for each that it takes. A use relinks nothing, and neither does the hand: it goes by the
//! slots of the table, in which a new buffer takes the place of the one that left for it. What is
//! cheap to lose is on warm_in until it is used, and goes before all others.
//!
//! Time is counted in uses, in parts of the cache's size. A block that comes in for the first time
//! moves it on only as long as others come back now and then; so it stands still in a scan, and
//! what was hot before the scan is not older after it. Integers only, no randomness, no clock.

use alloc::boxed::Box;

use super::{End, Level, List, Mark, percent};
use crate::wire::heat::{AGES, Clock, KINDS, KindCounts};

/// Ghosts, in percent of the pages.
const GHOST_PERCENT: u32 = 200;
/// The most times that a block came back that are told apart. A kind is that number, and whether
/// the block was written, and by a long request.
const LIVES_MAX: u8 = 7;
/// Blocks of the longest request that counts as short.
const SHORT_BLOCKS: usize = 4;
/// Units of time in as many uses as the cache has pages. Age classes are octaves of units, the
/// first one holds 0 and 1.
const UNITS: u32 = 64;
/// Blocks that may come in for the first time, and move time on, for each one that came back. Up to
/// a whole cache of them can be saved up.
const NEW_FOR_EACH_BACK: u32 = 16;
/// Uses that are no more units apart are one use: requests that are not aligned touch a block
/// twice.
const SAME_USE: u16 = 6;
/// Buffers that the hand passes over for each that it takes: what is aimed at, and the limit.
const PASSES: u32 = 8;
const PASSES_MAX: u32 = 16;
/// The counts of a kind lose this part (as a power of two) whenever its index is made anew.
const DECAY_SHIFT: u32 = 8;
/// One event, in the counts.
const EVENT: u64 = 1 << 12;
/// A count that reaches this halves all of them. Counts lose a part with misses only, and what
/// follows from them must fit into 64 bits however long everything hits.
const COUNT_MAX: u64 = 1 << 37;
/// What all kinds together count beside a kind's own, in events at age 0.
const PRIOR: u64 = 256;
/// The threshold and the index at age 0 while nothing is known.
const INDEX_START: u32 = 1 << 12;
/// The least threshold.
const THRESHOLD_MIN: u32 = 1 << 9;

impl Mark {
    fn kind(self) -> usize {
        usize::from(self.kind) % KINDS
    }
}

/// By kind: the same with one life more, without the bits of a request.
const ONE_LIFE_MORE: [u8; KINDS] = {
    let mut next = [0; KINDS];
    let mut kind = 0;
    while kind < KINDS {
        let lives = kind as u8 >> 2;
        next[kind] = if lives < LIVES_MAX { lives + 1 } else { LIVES_MAX } << 2;
        kind += 1;
    }
    next
};

type Counts = [[u64; AGES]; KINDS];

/// What the policy knows of the whole cache.
#[derive(Debug)]
pub(crate) struct Reuse {
    capacity: u32,
    /// Time in units.
    now: u16,
    /// Uses until the next unit; and what that was when `new_allowed` was brought up to date.
    left: u32,
    left_then: u32,
    /// Blocks that move time on although they come in for the first time.
    new_allowed: u32,
    /// Misses since an index was made.
    misses: u32,
    /// The kind whose turn it is.
    turn: usize,
    threshold: u32,
    /// Of the request under way: the kind bits that are not the number of lives.
    request: u8,
    /// By kind and age: how many came back at it.
    back: Box<Counts>,
    /// By kind and age: how many were given up at it.
    given_up: Box<Counts>,
    /// Of all kinds together: how many came back in each age, and how many reached it.
    all: [(u64, u64); AGES],
    index: Box<[[u32; AGES]; KINDS]>,
}

impl Reuse {
    pub(crate) fn new(capacity: u32) -> Self {
        // Nothing is known yet: what was used longest ago goes first.
        let index = core::array::from_fn(|age| INDEX_START / (age as u32 + 1));
        Self {
            capacity,
            now: 0,
            left: unit(capacity),
            left_then: unit(capacity),
            new_allowed: 0,
            misses: 0,
            turn: 0,
            threshold: INDEX_START,
            request: 0,
            back: Box::new([[0; AGES]; KINDS]),
            given_up: Box::new([[0; AGES]; KINDS]),
            all: [(0, 0); AGES],
            index: Box::new([index; KINDS]),
        }
    }

    pub(crate) fn set_capacity(&mut self, capacity: u32) {
        self.capacity = capacity;
    }

    /// The uses from now on are of a request of so many blocks.
    pub(crate) fn begin(&mut self, blocks: usize, write: bool) {
        self.request = u8::from(write) << 1 | u8::from(blocks > SHORT_BLOCKS);
    }

    /// A block comes back: it is in RAM, or its ghost is there.
    #[inline]
    pub(crate) fn used(&mut self, mark: &mut Mark) {
        let age = self.now.wrapping_sub(mark.used);
        self.back[mark.kind()][octave(age)] += EVENT;
        mark.used = self.now;
        let next = ONE_LIFE_MORE[mark.kind()] | self.request;
        mark.kind = if age > SAME_USE { next } else { mark.kind };
        self.tick();
    }

    /// A block comes in; of a ghost what was remembered of it is known.
    pub(crate) fn comes_in(&mut self, mark: &mut Mark, ghost: bool) {
        if ghost {
            self.used(mark);
        } else {
            *mark = Mark { used: self.now, kind: self.request, ..*mark };
            self.allow_new();
            if self.new_allowed > 0 {
                self.new_allowed -= 1;
                self.left_then -= 1;
                self.tick();
            }
        }
        self.misses += 1;
        if self.misses >= (self.capacity / 8 + 16) / KINDS as u32 {
            self.misses = 0;
            self.learn();
        }
    }

    fn tick(&mut self) {
        self.left -= 1;
        if self.left == 0 {
            self.begin_unit();
        }
    }

    #[cold]
    fn begin_unit(&mut self) {
        self.allow_new();
        self.now = self.now.wrapping_add(1);
        self.left = unit(self.capacity);
        self.left_then = self.left;
        self.bound_counts();
    }

    fn bound_counts(&mut self) {
        let full = |counts: &Counts| counts.iter().flatten().any(|count| *count >= COUNT_MAX);
        if full(&self.back) || full(&self.given_up) {
            for counts in [&mut self.back, &mut self.given_up] {
                counts.iter_mut().flatten().for_each(|count| *count /= 2);
            }
        }
    }

    /// Brings `new_allowed` up to date with the blocks that came back.
    fn allow_new(&mut self) {
        let back = self.left_then - self.left;
        self.left_then = self.left;
        self.new_allowed = (self.new_allowed + back * NEW_FOR_EACH_BACK).min(self.capacity);
    }

    /// The index of the buffer that the hand has come to.
    pub(crate) fn index(&self, mark: &mut Mark) -> u32 {
        let mut age = self.now.wrapping_sub(mark.used);
        if age > u16::MAX / 2 {
            // So that it never wraps round and looks young.
            age = u16::MAX / 2;
            mark.used = self.now.wrapping_sub(age);
        }
        self.index[mark.kind()][octave(age)]
    }

    /// Whether the hand passes over a buffer with that index, of which so many were passed over
    /// before.
    pub(crate) fn passes(&self, index: u32, passed: u32) -> bool {
        index > self.threshold && passed < PASSES_MAX
    }

    /// A buffer was taken after so many were passed over.
    pub(crate) fn took(&mut self, passed: u32) {
        let error = i64::from(passed.min(3 * PASSES)) - i64::from(PASSES);
        let threshold = i64::from(self.threshold) * (512 + error) / 512;
        self.threshold = threshold.clamp(THRESHOLD_MIN.into(), u32::MAX.into()) as u32;
    }

    /// A ghost became too old.
    pub(crate) fn expired(&mut self, mark: Mark) {
        let age = octave(self.now.wrapping_sub(mark.used));
        self.given_up[mark.kind()][age] += EVENT;
    }

    /// Makes one kind's index anew; all kinds have had their turn in about an eighth of the cache's
    /// size in misses.
    fn learn(&mut self) {
        if self.turn == 0 {
            self.sum_kinds();
        }
        let kind = self.turn;
        self.turn = (kind + 1) % KINDS;
        self.make_index(kind);
        for counts in [&mut self.back[kind], &mut self.given_up[kind]] {
            for count in counts {
                *count -= *count >> DECAY_SHIFT;
            }
        }
    }

    fn make_index(&mut self, kind: usize) {
        let chance = self.chances(kind);
        for from in 0..AGES {
            let (mut alive, mut hits, mut time, mut best) = (1u64 << 24, 0, 0, 0);
            for (age, chance) in chance.iter().enumerate().skip(from) {
                let hit = (alive * chance) >> 24;
                hits += hit;
                time += (alive - hit / 2) * width(age);
                alive -= hit;
                best = best.max((hits << 28) / time.max(1));
            }
            self.index[kind][from] = best as u32;
        }
    }

    /// What was counted of a kind.
    pub(crate) fn counts(&self, kind: usize) -> KindCounts {
        [self.back[kind], self.given_up[kind]]
    }

    /// Takes over what was counted of a kind in a former life; [`resume`](Self::resume) follows.
    pub(crate) fn set_counts(&mut self, kind: usize, counts: &KindCounts) {
        let [back, given_up] = counts.map(|counts| counts.map(|count| count.min(COUNT_MAX)));
        (self.back[kind], self.given_up[kind]) = (back, given_up);
    }

    /// The time, and what else a later life needs to go on.
    pub(crate) fn clock(&self) -> Clock {
        let Self { now, threshold, new_allowed, .. } = *self;
        Clock { now, threshold, new_allowed }
    }

    /// Goes on where a former life stood.
    pub(crate) fn resume(&mut self, clock: Clock) {
        self.now = clock.now;
        self.threshold = clock.threshold.max(THRESHOLD_MIN);
        self.new_allowed = clock.new_allowed.min(self.capacity);
        self.left = unit(self.capacity);
        self.left_then = self.left;
        self.sum_kinds();
        (0..KINDS).for_each(|kind| self.make_index(kind));
    }

    /// The chances that a block of a kind comes back within each age, once it has reached it; 24
    /// bits behind the point. Where little is known of the kind, all kinds and its own chance at
    /// the age before help out.
    fn chances(&self, kind: usize) -> [u64; AGES] {
        let own = self.reached(kind);
        let mut chance = [0u64; AGES];
        let mut common = 0;
        for age in 0..AGES {
            let (back, reached) = self.all[age];
            common = (back << 12).checked_div(reached).unwrap_or(common);
            let weight = (EVENT * PRIOR / width(age)).max(1);
            let before = if age > 0 { chance[age - 1] >> 12 } else { common };
            let (back, reached) = own[age];
            let back = (back << 12) + (common + before) / 2 * weight;
            chance[age] = ((back << 12) / (reached + weight)).min(1 << 24);
        }
        chance
    }

    fn sum_kinds(&mut self) {
        self.all = [(0, 0); AGES];
        for kind in 0..KINDS {
            let reached = self.reached(kind);
            for (sum, (back, reached)) in self.all.iter_mut().zip(reached) {
                *sum = (sum.0 + back, sum.1 + reached);
            }
        }
    }

    /// By age: how many of a kind came back in it, and how many reached it. Of those given up in
    /// it, half count as having reached it.
    fn reached(&self, kind: usize) -> [(u64, u64); AGES] {
        let mut reached = [(0, 0); AGES];
        let mut later = 0;
        for age in (0..AGES).rev() {
            let (back, given_up) = (self.back[kind][age], self.given_up[kind][age]);
            reached[age] = (back, later + back + given_up / 2);
            later += back + given_up;
        }
        reached
    }
}

/// Whether a block of that kind was used more than once.
pub(super) fn has_come_back(mark: Mark) -> bool {
    mark.kind() >> 2 > 0
}

/// Uses in a unit of time.
fn unit(capacity: u32) -> u32 {
    (capacity / UNITS).max(1)
}

fn octave(age: u16) -> usize {
    (age | 1).ilog2() as usize
}

/// Units in an octave.
fn width(octave: usize) -> u64 {
    (1u64 << octave).max(2)
}

/// What is cheap to lose does not come under the hand: it waits on warm_in, whose back goes first.
pub(super) fn place(level: Level) -> (List, End) {
    match level {
        Level::High | Level::Known => (List::Hot, End::Front),
        Level::Low => (List::WarmIn, End::Back),
    }
}

pub(super) const fn ghosts_max(pages: u32) -> u32 {
    percent(pages, GHOST_PERCENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Enough hits without a miss made the counts so large that the index wrapped round: what was
    /// used most looked as if it were never used again.
    #[test]
    fn counts_stay_sound_however_long_everything_hits() {
        let mut reuse = Reuse::new(64);
        let mut marks: [Mark; 64] = [Mark::NEW; 64];
        marks.iter_mut().for_each(|mark| reuse.comes_in(mark, false));
        // As after some hours of it.
        reuse.back.iter_mut().for_each(|kind| kind[0] = (1 << 40) - EVENT);
        for _ in 0..16 {
            marks.iter_mut().for_each(|mark| reuse.used(mark));
        }
        reuse.sum_kinds();
        for kind in 0..KINDS {
            assert!(reuse.chances(kind)[0] > 1 << 23, "kind {kind} nearly always comes back");
        }
    }

    #[test]
    fn a_later_life_goes_on_with_what_was_learned() {
        let mut reuse = Reuse::new(256);
        let mut marks = [Mark::NEW; 300];
        for round in 0..400 {
            for (at, mark) in marks.iter_mut().enumerate() {
                reuse.begin(1 + at % 9, at % 5 == 0);
                match (at + round) % 7 {
                    0 => reuse.comes_in(mark, false),
                    1 => reuse.expired(*mark),
                    _ => reuse.used(mark),
                }
            }
        }
        let mut later = Reuse::new(256);
        (0..KINDS).for_each(|kind| later.set_counts(kind, &reuse.counts(kind)));
        later.resume(reuse.clock());
        reuse.resume(reuse.clock());
        assert_eq!(later.index, reuse.index);
        assert_eq!(later.clock(), reuse.clock());
        assert_ne!(later.index, Reuse::new(256).index, "something was learned");
        let mut mark = marks[7];
        assert_eq!(later.index(&mut mark), reuse.index(&mut mark));
    }

    #[test]
    fn no_counts_of_a_former_life_overflow() {
        let mut reuse = Reuse::new(1 << 20);
        (0..KINDS).for_each(|kind| reuse.set_counts(kind, &[[u64::MAX; AGES]; 2]));
        reuse.resume(Clock { now: u16::MAX, threshold: u32::MAX, new_allowed: u32::MAX });
        reuse.bound_counts();
        reuse.comes_in(&mut Mark::NEW.clone(), false);
    }
}
