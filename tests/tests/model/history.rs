//! What each sector may hold: the oracle of the model test.
//!
//! Every write has a stamp of its own, and a time at which it was issued and acknowledged. A write
//! is *strictly older* than another if it was acknowledged before the other was issued. A sector
//! may hold a write's stamp unless a strictly newer write of the sector must be there: one that was
//! acknowledged (a read), promised to survive the end that came, or that an image's newest write
//! saw acknowledged (an image in the store).

use std::collections::BTreeMap;

use heeler_core::event::Mode;

/// Bytes of a sector: all writes are aligned to it.
pub(crate) const SECTOR: usize = 512;

/// What a write survives, and with it all that the ones before it do not.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Promise {
    Nothing,
    /// A kill.
    Logged,
    /// A power cut.
    Durable,
    /// The loss of the cache.
    Stored,
}

impl Promise {
    /// What a change is promised that is answered in a mode.
    pub(crate) fn of(mode: Mode, fua: bool) -> Self {
        match mode {
            Mode::WriteThrough | Mode::WriteAround | Mode::None => Self::Stored,
            Mode::WriteBack | Mode::Ram if fua => Self::Durable,
            Mode::WriteBack => Self::Logged,
            Mode::Ram | Mode::Ephemeral => Self::Nothing,
        }
    }
}

#[derive(Clone, Debug)]
struct Write {
    stamp: u64,
    issued: u64,
    acked: Option<u64>,
    promise: Promise,
}

/// All writes to all sectors. Stamp 0 is the beginning, and what zeroes and discards leave is a
/// stamp of its own that reads as zeroes.
pub(crate) struct History {
    sectors: Vec<Vec<Write>>,
    /// Stamps that read as zeroes.
    zeroes: std::collections::BTreeSet<u64>,
    ranges: BTreeMap<u64, (usize, usize)>,
}

impl History {
    pub(crate) fn new(sectors: usize) -> Self {
        let first = Write { stamp: 0, issued: 0, acked: Some(0), promise: Promise::Stored };
        Self { sectors: vec![vec![first]; sectors], zeroes: [0].into(), ranges: BTreeMap::new() }
    }

    pub(crate) fn sectors(&self) -> usize {
        self.sectors.len()
    }

    pub(crate) fn issue(&mut self, stamp: u64, first: usize, count: usize, zero: bool, now: u64) {
        if zero {
            self.zeroes.insert(stamp);
        }
        self.ranges.insert(stamp, (first, count));
        for sector in &mut self.sectors[first..first + count] {
            sector.push(Write { stamp, issued: now, acked: None, promise: Promise::Nothing });
        }
    }

    fn each(&mut self, stamp: u64, mut change: impl FnMut(&mut Write)) {
        let (first, count) = self.ranges[&stamp];
        for sector in &mut self.sectors[first..first + count] {
            for write in sector.iter_mut().filter(|write| write.stamp == stamp) {
                change(write);
            }
        }
    }

    pub(crate) fn ack(&mut self, stamp: u64, now: u64, promise: Promise) {
        self.each(stamp, |write| {
            write.acked = Some(now);
            write.promise = write.promise.max(promise);
        });
    }

    /// What was acknowledged at or before `since` is promised so much from now on.
    pub(crate) fn promise(&mut self, since: u64, promise: Promise) {
        for write in self.sectors.iter_mut().flatten() {
            if write.acked.is_some_and(|acked| acked <= since) {
                write.promise = write.promise.max(promise);
            }
        }
    }

    /// The writes that a sector's content can stem from.
    fn sources(&self, sector: usize, content: u64) -> impl Iterator<Item = &Write> {
        self.sectors[sector].iter().filter(move |write| {
            let zero = self.zeroes.contains(&write.stamp);
            if zero { content == 0 } else { write.stamp == content }
        })
    }

    /// Whether a sector may hold `content` when all writes for which `must` says so count.
    fn allowed(&self, sector: usize, content: u64, must: impl Fn(&Write) -> bool) -> bool {
        self.sources(sector, content).any(|source| {
            let Some(acked) = source.acked else { return true };
            !self.sectors[sector].iter().any(|newer| newer.issued > acked && must(newer))
        })
    }

    /// A read issued at `since` that is done now.
    pub(crate) fn may_read(&self, sector: usize, content: u64, since: u64) -> bool {
        self.allowed(sector, content, |write| write.acked.is_some_and(|acked| acked < since))
    }

    /// Whether a sector may hold `content` after an end that whoever was promised so much
    /// survives.
    pub(crate) fn may_survive(&self, sector: usize, content: u64, promise: Promise) -> bool {
        self.allowed(sector, content, |write| write.promise >= promise)
    }

    /// Checks that an image is a cut: it holds everything that was acknowledged before anything
    /// that it holds was issued, and everything that was promised to be there.
    pub(crate) fn check_image(&self, image: &[u64]) {
        let newest = image.iter().enumerate().filter_map(|(sector, content)| {
            // Of several possible sources the oldest proves least.
            self.sources(sector, *content).map(|write| write.issued).min()
        });
        let seen = newest.max().unwrap_or(0);
        for (sector, content) in image.iter().enumerate() {
            let must = |write: &Write| {
                write.acked.is_some_and(|acked| acked < seen) || write.promise == Promise::Stored
            };
            assert!(
                self.allowed(sector, *content, must),
                "sector {sector} of the image holds {content}, but a write acknowledged before \
                 {seen} is missing: {:?}",
                self.sectors[sector]
            );
        }
    }

    /// After a crash: what is there now is what counts from now on. Writes that a write seen there
    /// is older than are lost, and no write can take effect any more.
    ///
    /// Returns how many writes were lost although they had been acknowledged.
    pub(crate) fn settle(&mut self, contents: &[u64], now: u64) -> u64 {
        let mut lost_acked = 0;
        for (sector, content) in contents.iter().enumerate() {
            let source = self.sources(sector, *content).max_by_key(|write| write.issued);
            let source = source.expect("the content was checked").clone();
            let lost = |write: &Write| source.acked.is_some_and(|acked| write.issued > acked);
            let acked = |write: &&Write| lost(write) && write.acked.is_some();
            lost_acked += self.sectors[sector].iter().filter(acked).count() as u64;
            self.sectors[sector].retain(|write| !lost(write));
            for write in &mut self.sectors[sector] {
                write.acked = Some(write.acked.unwrap_or(now));
                if write.stamp == source.stamp {
                    write.acked = Some(now);
                    write.promise = write.promise.max(Promise::Durable);
                }
            }
        }
        lost_acked
    }

    pub(crate) fn explain(&self, sector: usize) -> String {
        format!("{:?}", self.sectors[sector])
    }
}
