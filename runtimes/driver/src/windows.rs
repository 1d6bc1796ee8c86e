//! What happened in the last 10 seconds and the last 5 minutes, without a timer.
//!
//! Time is cut into intervals of a fixed length. Whoever owns counts *stamps* them before the
//! first change in an interval. As they did not change since it began, the stamp says exactly what
//! they were then, and what they were at the start of every interval that passed without one. So
//! an idle owner need not wake up, and a window is exact but for its begin: it begins where an
//! interval does, 10 to 12 seconds ago, or 300 to 320.

use heeler_core::counters::{Counts, Traffic};
use heeler_core::onode::OnodeCounters;
use heeler_core::shard::ShardCounters;
use heeler_core::time::{Duration, Instant};
use heeler_core::{buffer, shard::Shard};

/// Length of the intervals, and so how often at most there is a stamp to make.
pub(crate) const INTERVAL: Duration = Duration::from_secs(2);
/// Stamps for the last 10 s: five whole intervals and the one that has begun.
const SHORT_STAMPS: usize = 6;
/// Length of the intervals for the last 5 min.
const LONG_INTERVAL: Duration = Duration::from_secs(20);
/// Stamps for the last 5 min.
const LONG_STAMPS: usize = 16;

/// Counts and how long it took to count them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Span<T> {
    /// How long ago it began.
    pub lasted: Duration,
    /// What was counted in it.
    pub counts: T,
}

/// Counts over three spans.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Spans<T> {
    /// The last 10 to 12 s, or since the start.
    pub short: Span<T>,
    /// The last 300 to 320 s, or since the start.
    pub long: Span<T>,
    /// Since the start.
    pub all: Span<T>,
}

impl<T: Counts> Spans<T> {
    /// What was counted here and there, in the longer of the two times.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        let plus = |a: Span<T>, b: Span<T>| Span {
            lasted: a.lasted.max(b.lasted),
            counts: a.counts.plus(b.counts),
        };
        Self {
            short: plus(self.short, other.short),
            long: plus(self.long, other.long),
            all: plus(self.all, other.all),
        }
    }
}

/// The latest stamps of some counts, for intervals of one length.
#[derive(Debug)]
struct Ring<T, const N: usize> {
    interval: Duration,
    /// Numbers of intervals, and the counts when they began.
    stamps: [(u64, T); N],
    newest: usize,
}

impl<T: Counts, const N: usize> Ring<T, N> {
    fn new(interval: Duration, start: Instant) -> Self {
        let first = (start.0 / interval.0, T::default());
        Self { interval, stamps: [first; N], newest: 0 }
    }

    fn stamp(&mut self, now: Instant, counts: T) {
        let interval = now.0 / self.interval.0;
        if interval > self.stamps[self.newest].0 {
            self.newest = (self.newest + 1) % N;
            self.stamps[self.newest] = (interval, counts);
        }
    }

    /// What was counted in the last `N - 1` whole intervals and the one that has begun.
    fn span(&self, now: Instant, start: Instant, counts: T) -> Span<T> {
        let first = (now.0 / self.interval.0).saturating_sub(N as u64 - 1);
        let kept = self.stamps.iter().filter(|(interval, _)| *interval >= first);
        // Without a stamp nothing changed since then.
        let then = kept.min_by_key(|(interval, _)| interval).map_or(counts, |(_, then)| *then);
        let begin = start.max(Instant(first * self.interval.0));
        Span { lasted: now - begin, counts: counts.since(then) }
    }
}

/// The past of some counts, in constant memory.
#[derive(Debug)]
pub struct Windows<T> {
    start: Instant,
    short: Ring<T, SHORT_STAMPS>,
    long: Ring<T, LONG_STAMPS>,
}

impl<T: Counts> Windows<T> {
    /// The past of counts that begin at 0.
    #[must_use]
    pub fn new(start: Instant) -> Self {
        Self { start, short: Ring::new(INTERVAL, start), long: Ring::new(LONG_INTERVAL, start) }
    }

    /// To be called before the counts change for the first time in an interval; more is no harm.
    pub fn stamp(&mut self, now: Instant, counts: T) {
        self.short.stamp(now, counts);
        self.long.stamp(now, counts);
    }

    /// What was counted, if the counts are now these.
    #[must_use]
    pub fn spans(&self, now: Instant, counts: T) -> Spans<T> {
        Spans {
            short: self.short.span(now, self.start, counts),
            long: self.long.span(now, self.start, counts),
            all: Span { lasted: now - self.start, counts },
        }
    }
}

/// Everything that a shard counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ShardCounts {
    /// What clients used.
    pub traffic: Traffic,
    /// What the shard did.
    pub shard: ShardCounters,
    /// Its buffers.
    pub buffers: buffer::Counters,
    /// Its onodes.
    pub onodes: OnodeCounters,
}

impl ShardCounts {
    /// Of this shard, now.
    #[must_use]
    pub fn of(shard: &Shard<'_>) -> Self {
        Self {
            traffic: shard.traffic(),
            shard: shard.counters(),
            buffers: shard.buffers().counters(),
            onodes: shard.onodes().counters(),
        }
    }
}

impl Counts for ShardCounts {
    fn zip(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            traffic: self.traffic.zip(other.traffic, &f),
            shard: self.shard.zip(other.shard, &f),
            buffers: self.buffers.zip(other.buffers, &f),
            onodes: self.onodes.zip(other.onodes, &f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant(0) + Duration::from_secs(seconds)
    }

    fn reads(blocks: u64) -> Traffic {
        Traffic { read_blocks: blocks, ..Traffic::default() }
    }

    /// Counts `per_second` in each of these seconds, and asks at the end of the last one.
    fn run(windows: &mut Windows<Traffic>, counts: &mut u64, seconds: std::ops::Range<u64>) {
        for second in seconds {
            windows.stamp(at(second), reads(*counts));
            *counts += 1;
        }
    }

    #[test]
    fn a_busy_owner_is_seen_to_the_interval() {
        let (mut windows, mut counts) = (Windows::new(at(0)), 0);
        run(&mut windows, &mut counts, 0..1000);
        let spans = windows.spans(at(1000), reads(counts));
        // Interval 500 has just begun: the five before it are seconds 990 to 999.
        assert_eq!((spans.short.lasted, spans.short.counts), (Duration::from_secs(10), reads(10)));
        assert_eq!((spans.long.lasted, spans.long.counts), (Duration::from_secs(300), reads(300)));
        assert_eq!((spans.all.lasted, spans.all.counts), (Duration::from_secs(1000), reads(1000)));
        run(&mut windows, &mut counts, 1000..1001);
        let spans = windows.spans(at(1001), reads(counts));
        assert_eq!((spans.short.lasted, spans.short.counts), (Duration::from_secs(11), reads(11)));
        assert_eq!((spans.long.lasted, spans.long.counts), (Duration::from_secs(301), reads(301)));
    }

    #[test]
    fn a_young_owner_shows_all_it_did() {
        let (mut windows, mut counts) = (Windows::new(at(7)), 0);
        run(&mut windows, &mut counts, 7..10);
        let spans = windows.spans(at(10), reads(counts));
        for span in [spans.short, spans.long, spans.all] {
            assert_eq!((span.lasted, span.counts), (Duration::from_secs(3), reads(3)));
        }
    }

    #[test]
    fn an_idle_owner_needs_no_stamp() {
        let (mut windows, mut counts) = (Windows::new(at(0)), 0);
        run(&mut windows, &mut counts, 0..100);
        // Nothing runs until somebody asks.
        let spans = windows.spans(at(109), reads(counts));
        assert_eq!(spans.short.counts, reads(2), "seconds 98 and 99");
        let spans = windows.spans(at(130), reads(counts));
        assert_eq!(spans.short.counts, reads(0));
        assert_eq!(spans.long.counts, reads(100));
        let spans = windows.spans(at(500), reads(counts));
        assert_eq!((spans.long.counts, spans.all.counts), (reads(0), reads(100)));
        // It goes on after a long sleep: what was before does not come back.
        run(&mut windows, &mut counts, 5000..5001);
        let spans = windows.spans(at(5001), reads(counts));
        assert_eq!((spans.short.counts, spans.long.counts), (reads(1), reads(1)));
        assert_eq!(spans.all.counts, reads(101));
    }

    #[test]
    fn sums_take_the_longer_time() {
        let span =
            |seconds, blocks| Span { lasted: Duration::from_secs(seconds), counts: reads(blocks) };
        let spans = |span| Spans { short: span, long: span, all: span };
        assert_eq!(spans(span(3, 1)).plus(spans(span(9, 5))), spans(span(9, 6)));
    }
}
