//! Ages: how much was last used how long ago.
//!
//! Every item remembers the second of its last use, and a ring of counters, one for each of the
//! last seconds, says how much has that second. A use moves the item's weight from one counter to
//! another, so it costs O(1), and nothing is ever scanned. (BlueStore's age bins, with the bin
//! found by number instead of by a shared pointer.)
//!
//! What was not used for longer than the ring is not counted: it is what is left of the total. A
//! second's number has 16 bits. An item that lay untouched for 18 hours may therefore be taken for
//! a young one when it leaves; that makes a statistic wrong by one item, and nothing else rests on
//! it.

use alloc::boxed::Box;

/// Ages in seconds at which the windows of [`Ages::windows`] end; the last one has no end.
pub const WINDOW_ENDS: [u16; WINDOWS - 1] = [1, 2, 6, 24, 120, 720];
/// Windows of age.
pub const WINDOWS: usize = 7;
/// Seconds that are counted one by one.
const RING: usize = 1024;

const _: () = assert!((WINDOW_ENDS[WINDOWS - 2] as usize) < RING && RING.is_power_of_two());

/// The second of an item's last use, modulo 2^16.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stamp(u16);

impl Stamp {
    pub(crate) const ZERO: Self = Self(0);
}

/// See the module.
#[derive(Debug)]
pub struct Ages {
    ring: Box<[u32]>,
    now: u16,
}

impl Ages {
    /// Nothing counted, at second 0.
    #[must_use]
    pub fn new() -> Self {
        Self { ring: core::iter::repeat_n(0, RING).collect(), now: 0 }
    }

    /// The present second.
    #[must_use]
    pub fn now(&self) -> Stamp {
        Stamp(self.now)
    }

    /// Seconds go on, one second by the other: `second` is the present one, modulo 2^16.
    pub fn advance(&mut self, second: u16) {
        let passed = usize::from(second.wrapping_sub(self.now)).min(RING);
        for back in 0..passed {
            self.ring[usize::from(second.wrapping_sub(back as u16)) % RING] = 0;
        }
        self.now = second;
    }

    /// Counts a new item, used now.
    pub fn add(&mut self, weight: u32) -> Stamp {
        self.ring[usize::from(self.now) % RING] += weight;
        Stamp(self.now)
    }

    /// An item, last used then, weighs more from now on.
    pub fn add_to(&mut self, stamp: Stamp, weight: u32) {
        if usize::from(self.age(stamp)) < RING {
            self.ring[usize::from(stamp.0) % RING] += weight;
        }
    }

    /// An item is no longer counted.
    pub fn remove(&mut self, stamp: Stamp, weight: u32) {
        if usize::from(self.age(stamp)) < RING {
            let bin = &mut self.ring[usize::from(stamp.0) % RING];
            *bin = bin.saturating_sub(weight);
        }
    }

    /// An item is used now.
    pub fn touch(&mut self, stamp: &mut Stamp, weight: u32) {
        if stamp.0 != self.now {
            self.remove(*stamp, weight);
            *stamp = self.add(weight);
        }
    }

    /// Seconds since an item was used.
    #[must_use]
    pub fn age(&self, stamp: Stamp) -> u16 {
        self.now.wrapping_sub(stamp.0)
    }

    /// Three ages in seconds that part what is counted into quarters, the youngest first.
    #[must_use]
    pub fn quarters(&self) -> [u16; 3] {
        let bin = |age: u16| u64::from(self.ring[usize::from(self.now.wrapping_sub(age)) % RING]);
        let total: u64 = (0..RING as u16).map(bin).sum();
        let mut quarters = [RING as u16; 3];
        let (mut sum, mut next) = (0, 0);
        for age in 0..RING as u16 {
            sum += bin(age);
            while next < 3 && 4 * sum >= (next as u64 + 1) * total {
                quarters[next] = age;
                next += 1;
            }
        }
        quarters
    }

    /// How much of `total` was last used in each window: less than a second ago, one to two, up to
    /// 6, 24, 120, 720 seconds, and longer.
    #[must_use]
    pub fn windows(&self, total: u64) -> [u64; WINDOWS] {
        let mut windows = [0; WINDOWS];
        let mut begin = 0;
        for (window, end) in windows.iter_mut().zip(WINDOW_ENDS) {
            let bin = |age: u16| self.ring[usize::from(self.now.wrapping_sub(age)) % RING];
            *window = (begin..end).map(|age| u64::from(bin(age))).sum();
            begin = end;
        }
        windows[WINDOWS - 1] = total.saturating_sub(windows.iter().sum());
        windows
    }
}

impl Default for Ages {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;
    use crate::random::Random;

    #[test]
    fn quarters_part_what_is_counted() {
        let mut ages = Ages::new();
        assert_eq!(ages.quarters(), [0; 3]);
        for (second, weight) in [(10, 1), (20, 1), (30, 1), (40, 1)] {
            ages.advance(second);
            ages.add(weight);
        }
        assert_eq!(ages.quarters(), [0, 10, 20]);
        ages.add(5);
        assert_eq!(ages.quarters(), [0, 0, 10]);
    }

    #[test]
    fn windows_equal_a_recount_of_all_items() {
        let mut ages = Ages::new();
        let mut items: Vec<(u32, Stamp, u32)> = Vec::new();
        let mut random = Random(1);
        let mut below = |n| random.below(n);
        let mut second = 65_000u32;
        ages.advance(second as u16);
        for _ in 0..20_000 {
            match below(8) {
                0..3 => {
                    let weight = 1 + below(9) as u32;
                    items.push((second, ages.add(weight), weight));
                }
                3..5 if !items.is_empty() => {
                    let at = below(items.len() as u64) as usize;
                    let (used, stamp, weight) = &mut items[at];
                    ages.touch(stamp, *weight);
                    *used = second;
                }
                5 if !items.is_empty() => {
                    let (_, stamp, weight) = items.swap_remove(below(items.len() as u64) as usize);
                    ages.remove(stamp, weight);
                }
                6 => {
                    second += [0, 1, 1, 2, 5, 30][below(6) as usize];
                    ages.advance(second as u16);
                }
                _ => {}
            }
            let mut expected = [0; WINDOWS];
            for (used, _, weight) in &items {
                let age = second - used;
                let window = WINDOW_ENDS.iter().position(|end| age < u32::from(*end));
                expected[window.unwrap_or(WINDOWS - 1)] += u64::from(*weight);
            }
            assert_eq!(ages.windows(expected.iter().sum()), expected);
        }
    }

    #[test]
    fn a_pause_longer_than_the_ring_makes_everything_old() {
        let mut ages = Ages::new();
        let mut stamp = ages.add(5);
        ages.advance(5_000);
        assert_eq!(ages.windows(5), [0, 0, 0, 0, 0, 0, 5]);
        ages.touch(&mut stamp, 5);
        assert_eq!(ages.windows(5), [5, 0, 0, 0, 0, 0, 0]);
        assert_eq!(ages.age(stamp), 0);
    }
}
