//! A map page: where the blocks of one 64 MiB part of a volume lie in the store.
//!
//! A volume's blocks are numbered through all objects: block b of object o is number
//! o * (blocks of an object) + b. Map page p describes numbers p * 16384 to p * 16384 + 16383.
//!
//! ```text
//! 0   magic    "HEELMAPP"
//! 8   version  u32 = 2
//! 12  crc      u32, CRC32C of bytes 16 to the end
//! 16  volume   16 bytes, that wrote this version
//! 32  page     u32
//! 36  packs    u32
//! 40  epoch    u64, in the name of this version
//! 48  runs     u32
//! 52  blocks   u32
//! 56  volumes  u32, whose packs are named, other than the one that wrote
//! 60  0        u32
//! 64  volumes  16 bytes each
//!     packs    20 bytes each: epoch u64, n u32, volume u16 (0: that wrote, k: the k-th of the
//!              list), header bytes u16, live blocks u16, 0 u16; ascending by (volume, epoch, n)
//!     runs     8 bytes each, ascending: first block u16, blocks - 1 u16, index of the pack u16,
//!              offset in the pack u16 (in blocks, behind the header)
//!     CRCs     u32 each: CRC32C of each mapped block, in order of the runs
//! ```
//!
//! Blocks in no run are zeroes. "Live" counts the blocks of the pack that this page maps. In memory
//! a volume is known by its place among a head's sources.
//!
//! The same type in memory also stands for what packs of the tail lay over a page
//! ([`MapPage::overlay`]): it knows zeroes apart from blocks of which it says nothing, and is never
//! encoded.

use alloc::vec;
use alloc::vec::Vec;

use super::frame::{self, FormatError, Reader};
use super::names::Uuid;
use super::pack::{self, HEADER_BYTES_MAX};
use crate::ids::{Crc32c, Epoch};
use crate::limits::{MAP_PAGE_BLOCKS, PACK_BLOCKS_MAX};

/// A pack, as a map page knows it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PackRef {
    /// Whose it is: 0 for the volume itself, else its place among the head's sources, from 1.
    pub source: u16,
    /// The push that wrote it.
    pub epoch: Epoch,
    /// Which pack of that push.
    pub n: u32,
    /// Bytes before its first block.
    pub header_bytes: u16,
}

/// A change of a page: blocks that now lie elsewhere, or are zeroes.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// First block in the page.
    pub first: u16,
    /// Blocks, at least 1.
    pub count: u16,
    /// Where they are; `None`: they are zeroes.
    pub data: Option<Data<'a>>,
}

/// Blocks in a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Data<'a> {
    /// The pack.
    pub pack: PackRef,
    /// First block in the pack.
    pub offset: u16,
    /// CRC32C of each block.
    pub crcs: &'a [u32],
}

/// A stretch of blocks that [`MapPage::lookup`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece<'a> {
    /// First block in the page.
    pub first: u16,
    /// Blocks.
    pub count: u16,
    /// Where they are; `None`: they are zeroes, or not known here.
    pub data: Option<Data<'a>>,
    /// Of an overlay: it says what they are. Of a page: they have data.
    pub known: bool,
}

/// A map page in memory.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MapPage {
    /// Ascending; each has live blocks.
    packs: Vec<(PackRef, u16)>,
    /// Ascending, not overlapping.
    runs: Vec<Run>,
    /// In order of the runs.
    crcs: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Run {
    first: u16,
    count: u16,
    /// Index in `packs`, or [`ZEROES`].
    slot: u16,
    offset: u16,
    /// Index of the first block's CRC.
    crc_at: u16,
}

impl Run {
    fn end(&self) -> u16 {
        self.first + self.count
    }
}

impl MapPage {
    /// Whether all blocks are zeroes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Each pack and how many of its blocks this page maps.
    pub fn packs(&self) -> impl Iterator<Item = (PackRef, u16)> + '_ {
        self.packs.iter().copied()
    }

    /// What lies where: pieces that together are the `count` blocks from `first` on, in order.
    pub fn lookup(&self, first: u16, count: u16) -> impl Iterator<Item = Piece<'_>> + '_ {
        assert!(usize::from(first) + usize::from(count) <= MAP_PAGE_BLOCKS, "inside the page");
        let (mut at, end) = (first, first + count);
        let mut next = self.runs.partition_point(|run| run.end() <= first);
        core::iter::from_fn(move || {
            if at == end {
                return None;
            }
            let piece = match self.runs.get(next) {
                Some(run) if run.first <= at => {
                    next += 1;
                    self.clip(run, at, end)
                }
                run => {
                    let until = run.map_or(end, |run| run.first.min(end));
                    Piece { first: at, count: until - at, data: None, known: false }
                }
            };
            at += piece.count;
            Some(piece)
        })
    }

    /// The page after `updates`, which are ascending and do not overlap. Work is linear in the
    /// page and the updates, but for a sort of the packs.
    #[must_use]
    pub fn apply(&self, updates: &[Update<'_>]) -> Self {
        self.rebuild(updates, false)
    }

    /// As [`apply`](Self::apply), but blocks that became zeroes are known as such: for what lies
    /// over a page.
    #[must_use]
    pub fn overlay(&self, updates: &[Update<'_>]) -> Self {
        self.rebuild(updates, true)
    }

    /// The updates that make of a page what lies under this overlay.
    #[must_use]
    pub fn updates(&self) -> Vec<Update<'_>> {
        let update = |run: &Run| {
            let data = self.clip(run, run.first, run.end()).data;
            Update { first: run.first, count: run.count, data }
        };
        self.runs.iter().map(update).collect()
    }

    /// The page with blocks copied elsewhere: `moved` says where a block of a pack lies now, `None`
    /// if it was not copied.
    #[must_use]
    pub fn relocate(&self, moved: impl Fn(PackRef, u16) -> Option<(PackRef, u16)>) -> Self {
        let mut builder = Builder::default();
        for run in &self.runs {
            let piece = self.clip(run, run.first, run.end());
            let data = piece.data.expect("a page, and no overlay");
            for (at, crc) in (0..).zip(data.crcs) {
                let place = (data.pack, data.offset + at);
                let (pack, offset) = moved(place.0, place.1).unwrap_or(place);
                let data = Data { pack, offset, crcs: core::slice::from_ref(crc) };
                builder.push(run.first + at, &data);
            }
        }
        builder.finish()
    }

    /// Looks through overlays, the topmost first, to the page under them.
    #[must_use]
    pub fn look_through<'a>(layers: &[&'a Self], first: u16, count: u16) -> Vec<Piece<'a>> {
        let mut found = Vec::new();
        look_into(layers, first, count, &mut found);
        found
    }

    /// Whether every block of a stretch is known here.
    #[must_use]
    pub fn covers(&self, first: u16, count: u16) -> bool {
        self.lookup(first, count).all(|piece| piece.known)
    }

    /// Blocks that are mapped.
    #[must_use]
    pub fn mapped(&self) -> u16 {
        self.crcs.len() as u16
    }

    /// Bytes that the page has when it is encoded.
    #[must_use]
    pub fn encoded_bytes(&self) -> usize {
        FIXED_BYTES + self.packs.len() * PACK_BYTES + self.runs.len() * 8 + self.crcs.len() * 4
    }

    fn rebuild(&self, updates: &[Update<'_>], zeroes: bool) -> Self {
        let mut builder = Builder::default();
        let (mut at, mut next) = (0, 0);
        for update in updates {
            assert!(at <= update.first && update.count > 0, "updates ascend and do not overlap");
            next = self.copy(&mut builder, next, at, update.first);
            if let Some(data) = update.data {
                assert_eq!(data.crcs.len(), usize::from(update.count), "a CRC for each block");
                builder.push(update.first, &data);
            } else if zeroes {
                builder.push_zeroes(update.first, update.count);
            }
            at = update.first + update.count;
        }
        assert!(usize::from(at) <= MAP_PAGE_BLOCKS, "updates end inside the page");
        self.copy(&mut builder, next, at, MAP_PAGE_BLOCKS as u16);
        builder.finish()
    }

    /// Copies what runs from the `next`-th on have in `from..to`; returns the first run that may
    /// reach beyond.
    fn copy(&self, builder: &mut Builder, mut next: usize, from: u16, to: u16) -> usize {
        while let Some(run) = self.runs.get(next) {
            if run.first >= to {
                break;
            }
            let at = run.first.max(from);
            if at < run.end().min(to) {
                let piece = self.clip(run, at, to);
                match piece.data {
                    Some(data) => builder.push(at, &data),
                    None => builder.push_zeroes(at, piece.count),
                }
            }
            if run.end() > to {
                break;
            }
            next += 1;
        }
        next
    }

    /// The part of a run from block `from` on, before `to`.
    fn clip(&self, run: &Run, from: u16, to: u16) -> Piece<'_> {
        let (skip, end) = (from - run.first, run.end().min(to));
        if run.slot == ZEROES {
            return Piece { first: from, count: end - from, data: None, known: true };
        }
        let crc_at = usize::from(run.crc_at) + usize::from(skip);
        let crcs = &self.crcs[crc_at..crc_at + usize::from(end - from)];
        let pack = self.packs[usize::from(run.slot)].0;
        let data = Data { pack, offset: run.offset + skip, crcs };
        Piece { first: from, count: end - from, data: Some(data), known: true }
    }

    /// All bytes of the page. `volumes`: the writer, then the head's other sources.
    #[must_use]
    pub fn encode(&self, volumes: &[Uuid], page: u32, epoch: Epoch, crc32c: Crc32c) -> Vec<u8> {
        // In order of the sources, as the packs are.
        let mut named: Vec<u16> = Vec::new();
        for (pack, _) in &self.packs {
            if pack.source > 0 && named.last() != Some(&pack.source) {
                named.push(pack.source);
            }
        }
        let mut bytes = frame::begin(MAGIC, VERSION);
        bytes.reserve_exact(self.encoded_bytes() + named.len() * 16 - bytes.len());
        bytes.extend_from_slice(&volumes[0].0);
        bytes.extend_from_slice(&page.to_le_bytes());
        bytes.extend_from_slice(&(self.packs.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&epoch.0.to_le_bytes());
        for count in [self.runs.len(), self.crcs.len(), named.len(), 0] {
            bytes.extend_from_slice(&(count as u32).to_le_bytes());
        }
        for &source in &named {
            bytes.extend_from_slice(&volumes[usize::from(source)].0);
        }
        for (pack, live) in &self.packs {
            let volume = named.partition_point(|&source| source < pack.source);
            let volume = if pack.source == 0 { 0 } else { volume as u16 + 1 };
            bytes.extend_from_slice(&pack.epoch.0.to_le_bytes());
            bytes.extend_from_slice(&pack.n.to_le_bytes());
            for field in [volume, pack.header_bytes, *live, 0] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
        }
        for run in &self.runs {
            assert_ne!(run.slot, ZEROES, "an overlay is not written");
            for field in [run.first, run.count - 1, run.slot, run.offset] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
        }
        for crc in &self.crcs {
            bytes.extend_from_slice(&crc.to_le_bytes());
        }
        frame::seal(&mut bytes, crc32c);
        bytes
    }

    /// Reads the version `epoch` of page `page`, written by `volumes[source]` (all known from its
    /// key and the head).
    pub fn decode(
        bytes: &[u8],
        (volumes, source): (&[Uuid], u16),
        page: u32,
        epoch: Epoch,
        crc32c: Crc32c,
    ) -> Result<Self, FormatError> {
        let mut reader = frame::open(bytes, MAGIC, VERSION)?;
        frame::check(bytes, crc32c)?;
        if Uuid(reader.take()?) != volumes[usize::from(source)] {
            return reader.bad(16, "volume");
        }
        if reader.u32()? != page {
            return reader.bad(4, "page");
        }
        let packs = reader.u32()? as usize;
        if Epoch(reader.u64()?) != epoch {
            return reader.bad(8, "epoch");
        }
        let runs = reader.u32()? as usize;
        let blocks = reader.u32()? as usize;
        if blocks > MAP_PAGE_BLOCKS {
            return reader.bad(4, "number of blocks");
        }
        if runs > blocks || packs > runs {
            return reader.bad(8, "number of runs or packs");
        }
        let others = reader.u32()? as usize;
        if reader.u32()? != 0 || others >= volumes.len() {
            return reader.bad(8, "number of volumes");
        }
        reader.require(others * 16 + packs * PACK_BYTES + runs * 8 + blocks * 4)?;
        let mut sources = vec![source];
        for _ in 0..others {
            let volume = Uuid(reader.take()?);
            match volumes.iter().position(|known| *known == volume) {
                Some(at) if !sources.contains(&(at as u16)) => sources.push(at as u16),
                _ => return reader.bad(16, "volume of packs"),
            }
        }
        let mut found = Self { packs: Vec::with_capacity(packs), ..Self::default() };
        found.read_packs(&mut reader, packs, &sources, epoch)?;
        found.read_runs(&mut reader, runs, blocks)?;
        found.crcs = (0..blocks).map(|_| reader.u32()).collect::<Result<_, _>>()?;
        reader.end()?;
        Ok(found)
    }

    fn read_packs(
        &mut self,
        reader: &mut Reader<'_>,
        count: usize,
        sources: &[u16],
        newest: Epoch,
    ) -> Result<(), FormatError> {
        let mut last = None;
        for _ in 0..count {
            let (epoch, n) = (Epoch(reader.u64()?), reader.u32()?);
            let (volume, header_bytes) = (reader.u16()?, reader.u16()?);
            let (live, zero) = (reader.u16()?, reader.u16()?);
            let key = (volume, epoch, n);
            let possible = last.is_none_or(|last| last < key)
                && (volume > 0 || epoch <= newest)
                && (pack::header_bytes(1, 1)..=HEADER_BYTES_MAX).contains(&header_bytes)
                && (1..=PACK_BLOCKS_MAX).contains(&live.into())
                && zero == 0;
            let Some(&source) = sources.get(usize::from(volume)).filter(|_| possible) else {
                return reader.bad(PACK_BYTES, "pack");
            };
            last = Some(key);
            self.packs.push((PackRef { source, epoch, n, header_bytes }, live));
        }
        Ok(())
    }

    fn read_runs(
        &mut self,
        reader: &mut Reader<'_>,
        count: usize,
        blocks: usize,
    ) -> Result<(), FormatError> {
        self.runs.reserve_exact(count);
        let mut live = vec![0u32; self.packs.len()];
        let (mut free, mut seen) = (0, 0);
        for _ in 0..count {
            let (first, more) = (reader.u16()?, reader.u16()?);
            let (slot, offset) = (reader.u16()?, reader.u16()?);
            let length = usize::from(more) + 1;
            let (end, pack_end) = (usize::from(first) + length, usize::from(offset) + length);
            let fits = end <= MAP_PAGE_BLOCKS && pack_end <= PACK_BLOCKS_MAX;
            if usize::from(first) < free || !fits || seen + length > blocks {
                return reader.bad(8, "run");
            }
            let Some(mapped) = live.get_mut(usize::from(slot)) else {
                return reader.bad(4, "index of a pack");
            };
            *mapped += length as u32;
            let count = length as u16;
            self.runs.push(Run { first, count, slot, offset, crc_at: seen as u16 });
            (free, seen) = (end, seen + length);
        }
        let counted = self.packs.iter().map(|&(_, live)| u32::from(live)).eq(live);
        if seen != blocks || !counted {
            return reader.bad(0, "number of mapped blocks");
        }
        Ok(())
    }
}

/// Builds a page from data in ascending order. Packs stand in order of appearance, maybe twice,
/// until the end.
#[derive(Default)]
struct Builder {
    packs: Vec<(PackRef, u16)>,
    runs: Vec<Run>,
    crcs: Vec<u32>,
}

impl Builder {
    fn push(&mut self, first: u16, data: &Data<'_>) {
        let count = data.crcs.len() as u16;
        let crc_at = self.crcs.len() as u16;
        self.crcs.extend_from_slice(data.crcs);
        if let (Some(run), Some((pack, live))) = (self.runs.last_mut(), self.packs.last_mut())
            && *pack == data.pack
            && run.slot != ZEROES
        {
            // The last run is always of the last pack.
            *live += count;
            if run.end() == first && run.offset + run.count == data.offset {
                run.count += count;
                return;
            }
        } else {
            self.packs.push((data.pack, count));
        }
        let slot = (self.packs.len() - 1) as u16;
        self.runs.push(Run { first, count, slot, offset: data.offset, crc_at });
    }

    fn push_zeroes(&mut self, first: u16, count: u16) {
        match self.runs.last_mut() {
            Some(run) if run.slot == ZEROES && run.end() == first => run.count += count,
            _ => {
                let crc_at = self.crcs.len() as u16;
                self.runs.push(Run { first, count, slot: ZEROES, offset: 0, crc_at });
            }
        }
    }

    /// Sorts the packs, makes each unique, and renumbers the runs.
    fn finish(self) -> MapPage {
        let mut order: Vec<u16> = (0..self.packs.len() as u16).collect();
        order.sort_unstable_by_key(|&slot| self.packs[usize::from(slot)].0);
        let mut packs: Vec<(PackRef, u16)> = Vec::new();
        let mut renumbered = vec![0u16; order.len()];
        for slot in order {
            let (pack, live) = self.packs[usize::from(slot)];
            match packs.last_mut() {
                Some((last, sum)) if *last == pack => *sum += live,
                _ => packs.push((pack, live)),
            }
            renumbered[usize::from(slot)] = (packs.len() - 1) as u16;
        }
        let mut runs = self.runs;
        for run in runs.iter_mut().filter(|run| run.slot != ZEROES) {
            run.slot = renumbered[usize::from(run.slot)];
        }
        MapPage { packs, runs, crcs: self.crcs }
    }
}

fn look_into<'a>(layers: &[&'a MapPage], first: u16, count: u16, found: &mut Vec<Piece<'a>>) {
    let Some((top, below)) = layers.split_first() else { return };
    for piece in top.lookup(first, count) {
        if piece.known || below.is_empty() {
            found.push(piece);
        } else {
            look_into(below, piece.first, piece.count, found);
        }
    }
}

/// The slot of a run of zeroes.
const ZEROES: u16 = u16::MAX;
const FIXED_BYTES: usize = 64;
const PACK_BYTES: usize = 20;
const MAGIC: [u8; 8] = *b"HEELMAPP";
const VERSION: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::tests::{crc32c, reseal};

    /// The page's own, and two others.
    const VOLUMES: [Uuid; 3] = [Uuid([3; 16]), Uuid([5; 16]), Uuid([4; 16])];
    const NEWEST: Epoch = Epoch(1 << 40);

    fn decode(bytes: &[u8]) -> Result<MapPage, FormatError> {
        MapPage::decode(bytes, (&VOLUMES, 0), 5, NEWEST, crc32c)
    }

    fn pack(epoch: u64, n: u32) -> PackRef {
        PackRef { source: 0, epoch: Epoch(epoch), n, header_bytes: 76 }
    }

    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    /// One block as the model knows it: pack, offset, CRC.
    type Cell = Option<(PackRef, u16, u32)>;

    fn cells(layers: &[&MapPage], first: u16, count: u16) -> Vec<Cell> {
        let mut cells = Vec::new();
        for piece in MapPage::look_through(layers, first, count) {
            assert_eq!(usize::from(piece.first - first), cells.len());
            for i in 0..piece.count {
                cells.push(
                    piece.data.map(|data| (data.pack, data.offset + i, data.crcs[usize::from(i)])),
                );
            }
        }
        cells
    }

    fn check_packs(page: &MapPage, model: &[Cell]) {
        for (pack, live) in page.packs() {
            let mapped = model.iter().flatten().filter(|cell| cell.0 == pack).count();
            assert_eq!(mapped, usize::from(live));
        }
        let total: usize = page.packs().map(|(_, live)| usize::from(live)).sum();
        assert_eq!(total, model.iter().flatten().count());
    }

    #[test]
    fn random_updates_against_cells() {
        for seed in 1..=60u64 {
            let mut rng = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            // Dense seeds touch a small part of the page again and again.
            let span = if seed % 2 == 0 { MAP_PAGE_BLOCKS as u64 } else { 300 };
            let mut page = MapPage::default();
            // The same in two layers: what is over the page is folded into it now and then.
            let (mut under, mut over) = (MapPage::default(), MapPage::default());
            let mut model: Vec<Cell> = vec![None; MAP_PAGE_BLOCKS];
            for round in 1..=20 {
                let crcs: Vec<u32> = (0..2048).map(|_| random(&mut rng) as u32).collect();
                let mut updates = Vec::new();
                let mut at = random(&mut rng) % 40;
                let mut offset = 0;
                while at < span {
                    let count = (1 + random(&mut rng) % 20).min(span - at) as u16;
                    let data = (!random(&mut rng).is_multiple_of(4)).then(|| {
                        offset = (offset + random(&mut rng) as u16 % 3) % 1900;
                        let crcs = &crcs[usize::from(offset)..][..usize::from(count)];
                        let source = random(&mut rng) as u16 % 3;
                        let pack = pack(round, random(&mut rng) as u32 % 2);
                        let pack = PackRef { source, ..pack };
                        let data = Data { pack, offset, crcs };
                        offset += count;
                        data
                    });
                    updates.push(Update { first: at as u16, count, data });
                    for i in 0..count {
                        let found = data
                            .map(|data| (data.pack, data.offset + i, data.crcs[usize::from(i)]));
                        model[at as usize + usize::from(i)] = found;
                    }
                    let far = span / 4;
                    at += u64::from(count)
                        + [0, random(&mut rng) % 5, random(&mut rng) % far]
                            [(random(&mut rng) % 3) as usize];
                }
                page = page.apply(&updates);
                over = over.overlay(&updates);
                if random(&mut rng).is_multiple_of(4) {
                    under = under.apply(&over.updates());
                    over = MapPage::default();
                    assert_eq!(under, page, "seed {seed}");
                }
                for update in &updates {
                    assert!(over.is_empty() || over.covers(update.first, update.count));
                }
                let all = MAP_PAGE_BLOCKS as u16;
                assert_eq!(cells(&[&page], 0, all), model, "seed {seed}");
                assert_eq!(cells(&[&over, &under], 0, all), model, "seed {seed}");
                check_packs(&page, &model);
                let bytes = page.encode(&VOLUMES, 5, NEWEST, crc32c);
                assert_eq!(decode(&bytes).as_ref(), Ok(&page), "seed {seed}");
                let first = random(&mut rng) % span;
                let count = random(&mut rng) % (MAP_PAGE_BLOCKS as u64 - first);
                let part = &model[first as usize..(first + count) as usize];
                assert_eq!(cells(&[&page], first as u16, count as u16), part, "seed {seed}");
            }
            let all = Update { first: 0, count: MAP_PAGE_BLOCKS as u16, data: None };
            assert!(page.apply(&[all]).is_empty());
        }
    }

    #[test]
    fn neighbours_become_one_run() {
        let crcs = [1, 2, 3, 4, 5];
        let data = |offset, crcs| Some(Data { pack: pack(1, 0), offset, crcs });
        let page = MapPage::default().apply(&[
            Update { first: 10, count: 2, data: data(0, &crcs[..2]) },
            Update { first: 12, count: 3, data: data(2, &crcs[2..]) },
        ]);
        assert_eq!(page.runs.len(), 1);
        let page = page.apply(&[Update { first: 11, count: 1, data: None }]);
        let starts: Vec<_> =
            page.runs.iter().map(|run| (run.first, run.count, run.offset)).collect();
        assert_eq!(starts, [(10, 1, 0), (12, 3, 2)]);
        assert_eq!(page.crcs, [1, 3, 4, 5]);
    }

    #[test]
    fn moved_blocks_lie_elsewhere_and_the_others_stay() {
        let crcs = [1, 2, 3, 4];
        let data = |n, offset, crcs| Some(Data { pack: pack(1, n), offset, crcs });
        let page = MapPage::default().apply(&[
            Update { first: 0, count: 4, data: data(0, 7, &crcs) },
            Update { first: 90, count: 1, data: data(1, 0, &crcs[..1]) },
        ]);
        // The middle two are copied, side by side.
        let copied = |from: PackRef, offset: u16| {
            (from.n == 0 && (8..10).contains(&offset)).then(|| (pack(2, 5), offset - 8))
        };
        let after = page.relocate(copied);
        let places: Vec<_> = after
            .lookup(0, 91)
            .filter_map(|piece| piece.data.map(|d| (piece.first, d.pack.n, d.offset, d.crcs.len())))
            .collect();
        assert_eq!(places, [(0, 0, 7, 1), (1, 5, 0, 2), (3, 0, 10, 1), (90, 1, 0, 1)]);
        assert_eq!(after.crcs, page.crcs);
        let live: Vec<_> = after.packs().map(|(pack, live)| (pack.n, live)).collect();
        assert_eq!(live, [(0, 2), (1, 1), (5, 2)]);
    }

    #[test]
    fn a_clone_reads_pages_of_its_parent() {
        let crcs = [1, 2];
        let data =
            |source| Some(Data { pack: PackRef { source, ..pack(1, 0) }, offset: 0, crcs: &crcs });
        let update = |first, source| Update { first, count: 2, data: data(source) };
        // The parent's page has blocks of its own and of its own parent.
        let page = MapPage::default().apply(&[update(0, 0), update(9, 1)]);
        let bytes = page.encode(&[VOLUMES[1], VOLUMES[2]], 5, NEWEST, crc32c);
        let found = MapPage::decode(&bytes, (&VOLUMES, 1), 5, NEWEST, crc32c).unwrap();
        assert_eq!(found, MapPage::default().apply(&[update(0, 1), update(9, 2)]));
        let stranger = [VOLUMES[0], VOLUMES[1]];
        let error = FormatError::Field { at: 64, what: "volume of packs" };
        assert_eq!(MapPage::decode(&bytes, (&stranger, 1), 5, NEWEST, crc32c), Err(error));
    }

    fn sample() -> MapPage {
        let crcs = [9; 4];
        let data = |source, epoch, offset, crcs| {
            let pack = PackRef { source, ..pack(epoch, 0) };
            Some(Data { pack, offset, crcs })
        };
        MapPage::default().apply(&[
            Update { first: 10, count: 2, data: data(0, 7, 0, &crcs[..2]) },
            Update { first: 12, count: 4, data: data(2, 6, 2, &crcs) },
        ])
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen() {
        let good = sample().encode(&VOLUMES, 5, NEWEST, crc32c);
        assert_eq!(good.len(), sample().encoded_bytes() + 16);
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            assert!(decode(&bytes).is_err(), "byte {at}");
            let mut bytes = good[..at].to_vec();
            if at >= 16 {
                reseal(&mut bytes);
            }
            assert!(decode(&bytes).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn bad_fields_are_named() {
        let good = sample().encode(&VOLUMES, 5, NEWEST, crc32c);
        let field = |at, what| FormatError::Field { at, what };
        let packs = 64 + 16;
        let runs = packs + 40;
        let cases: [(usize, &[u8], FormatError); 16] = [
            (8, &[1], FormatError::Version(1)),
            (16, &[0], field(16, "volume")),
            (32, &[6], field(32, "page")),
            (40, &[1], field(40, "epoch")),
            (52, &[1, 64], field(52, "number of blocks")),
            (48, &[7], field(48, "number of runs or packs")),
            (36, &[3], field(48, "number of runs or packs")),
            (56, &[3], field(56, "number of volumes")),
            (64, &[3; 16], field(64, "volume of packs")),
            (packs + 32, &[0, 0], field(packs + 20, "pack")),
            (packs + 14, &[0, 0], field(packs, "pack")),
            (packs + 16, &[0], field(packs, "pack")),
            (packs + 36, &[5], field(runs + 16, "number of mapped blocks")),
            (runs + 8, &[11], field(runs + 8, "run")),
            (runs + 12, &[2], field(runs + 12, "index of a pack")),
            (runs + 14, &[0xfd, 0x07], field(runs + 8, "run")),
        ];
        for (at, value, error) in cases {
            let mut bytes = good.clone();
            bytes[at..at + value.len()].copy_from_slice(value);
            reseal(&mut bytes);
            assert_eq!(decode(&bytes), Err(error), "byte {at}");
        }
    }
}
