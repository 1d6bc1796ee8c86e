//! Whole lives of a log: random records, flushes and reuse of segments, ended by power cuts that
//! lose or tear whatever was not flushed.

use super::*;
use crate::random::Random;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Recovery finds it if all of it is there.
    Written,
    /// Recovery must find it.
    Durable,
    /// Its segment was freed: recovery may find it until that is known, and nobody needs it.
    Freed,
}

/// An entry that recovery may find.
#[derive(Debug)]
struct Known {
    found: Found,
    state: State,
}

fn key(found: &Found) -> (u64, u32, u32) {
    (found.0.seq, found.0.page, found.0.entry.object)
}

struct World {
    random: Random,
    /// The log; its bytes are what is durable.
    log: Region,
    /// Written, not flushed.
    pending: Vec<Write>,
    /// Use numbers of the segments in use.
    uses: Vec<u64>,
    tail: u32,
    /// By number of the record and place in it.
    known: BTreeMap<(u64, u32, u32), Known>,
    torn: u64,
    lost_footers: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut uses = vec![0; SEGMENTS as usize];
        uses[0] = 1;
        Self {
            random: Random(seed),
            log: Region::new(),
            pending: Vec::new(),
            uses,
            tail: 0,
            known: BTreeMap::new(),
            torn: 0,
            lost_footers: 0,
        }
    }

    fn flush(&mut self) {
        for write in core::mem::take(&mut self.pending) {
            self.log.put(&write);
        }
        self.log.flush();
        for known in self.known.values_mut() {
            if known.state == State::Written {
                known.state = State::Durable;
            }
        }
    }

    /// Frees the oldest segment: all that replaced it is durable.
    fn free_oldest(&mut self) {
        self.flush();
        let tail = self.tail;
        self.uses[tail as usize] = 0;
        for known in self.known.values_mut() {
            if known.found.0.page / PAGES == tail {
                known.state = State::Freed;
            }
        }
        self.tail = (tail + 1) % SEGMENTS;
    }

    fn next_segment(&mut self) {
        let next = (self.log.segment + 1) % SEGMENTS;
        while (self.tail + SEGMENTS - next) % SEGMENTS <= 3 && self.tail != self.log.segment {
            self.free_oldest();
        }
        self.log.open_next();
        self.uses[self.log.segment as usize] = self.log.segment_seq;
        self.log.floor = self.uses[self.tail as usize];
    }

    fn record(&mut self) {
        if self.log.used + 24 > PAGES - 2 {
            let footer = self.log.make_footer();
            self.pending.push(footer);
            self.next_segment();
        }
        let kinds = [EntryKind::Dirty, EntryKind::Clean, EntryKind::Zeroes];
        let mut parts = Vec::new();
        for object in 0..1 + self.random.below(4) as u32 {
            let kind = kinds[self.random.below(3) as usize];
            parts.push((kind, object, 1 + self.random.below(5) as u16));
        }
        let write = self.log.make_record(&parts);
        self.pending.push(write);
        for found in self.log.written.drain(..) {
            self.known.insert(key(&found), Known { found, state: State::Written });
        }
    }

    /// Of each write that was not flushed all, nothing or some pages are there.
    fn power_cut(&mut self) {
        let footers_fare_worse = self.random.chance(1, 2);
        for (at, bytes) in core::mem::take(&mut self.pending) {
            let is_footer = (at + (bytes.len() / BLOCK_BYTES) as u32).is_multiple_of(PAGES);
            let fate = self.random.below(3);
            if fate == 0 || is_footer && footers_fare_worse && self.random.chance(1, 2) {
                self.lost_footers += u64::from(is_footer);
                continue;
            }
            for (page, bytes) in (at..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
                if fate == 1 || self.random.chance(3, 4) {
                    self.log.put(&(page, bytes.to_vec()));
                }
            }
        }
    }

    /// Recovers, checks what came back, and goes on behind it as the log does.
    fn restart(&mut self) {
        let recovered = self.log.recover();
        self.torn += recovered.torn;
        let mut known = core::mem::take(&mut self.known);
        for found in found(&recovered) {
            assert!(found.0.seq < recovered.next_seq);
            let was = known.remove(&key(&found));
            let was = was.unwrap_or_else(|| panic!("came back from the dead: {:?}", found.0));
            assert_eq!(was.found, found);
            assert!(
                was.state != State::Written || self.log.holds(&found),
                "never durable, and not there"
            );
            self.known.insert(key(&found), Known { state: State::Durable, ..was });
        }
        let missing = known.values().find(|known| known.state == State::Durable);
        assert!(missing.is_none(), "durable, but lost: {missing:?}");
        let seqs = &recovered.segment_seqs;
        assert!(seqs.iter().all(|seq| *seq < recovered.next_segment_seq));
        let used = || (0..SEGMENTS).filter(|at| seqs[*at as usize] > 0);
        let newest = used().max_by_key(|at| seqs[*at as usize]);
        self.tail = used().min_by_key(|at| seqs[*at as usize]).unwrap_or(0);
        self.uses.clone_from(seqs);
        self.log.segment = newest.unwrap_or(SEGMENTS - 1);
        self.log.segment_seq = recovered.next_segment_seq - 1;
        self.log.next_seq = recovered.next_seq;
        self.log.durable_seq = recovered.next_seq;
        self.next_segment();
    }
}

#[test]
fn what_was_flushed_comes_back_and_what_was_lost_does_not() {
    let (mut torn, mut lost_footers) = (0, 0);
    for seed in 0..50 {
        let mut world = World::new(seed);
        for _ in 0..8 {
            let steps = [5, 40, 150][world.random.below(3) as usize];
            // Some lives hardly ever flush: many segments are lost at once.
            let rarely = [6, 40, 1000][world.random.below(3) as usize];
            for _ in 0..steps {
                world.record();
                if world.random.chance(1, rarely) {
                    world.flush();
                }
            }
            world.power_cut();
            world.restart();
        }
        torn += world.torn;
        lost_footers += world.lost_footers;
    }
    assert!(torn > 50 && lost_footers > 50, "{torn} {lost_footers}");
}
