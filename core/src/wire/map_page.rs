//! A map page: where the blocks of one 64 MiB part of a volume lie in the store.
//!
//! A volume's blocks are numbered through all objects: block b of object o is number
//! o * (blocks of an object) + b. Map page p describes numbers p * 16384 to p * 16384 + 16383.
//!
//! ```text
//! 0   magic    "HEELMAPP"
//! 8   version  u32 = 1
//! 12  crc      u32, CRC32C of bytes 16 to the end
//! 16  volume   16 bytes
//! 32  page     u32
//! 36  packs    u32
//! 40  epoch    u64, the push that wrote this version
//! 48  runs     u32
//! 52  blocks   u32
//! 56  packs    16 bytes each, ascending: epoch u64, n u32, header pages u16, live blocks u16
//!     runs     8 bytes each, ascending: first block u16, blocks - 1 u16, index of the pack u16,
//!              offset in the pack u16 (in blocks, behind the header pages)
//!     CRCs     u32 each: CRC32C of each mapped block, in order of the runs
//! ```
//!
//! Blocks in no run are zeroes. "Live" counts the blocks of the pack that this page maps.

use alloc::vec;
use alloc::vec::Vec;

use super::frame::{self, FormatError, Reader};
use super::names::Uuid;
use super::pack::HEADER_PAGES_MAX;
use crate::ids::{Crc32c, Epoch};
use crate::limits::{MAP_PAGE_BLOCKS, PACK_BLOCKS_MAX};

/// A pack, as a map page knows it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PackRef {
    /// The push that wrote it.
    pub epoch: Epoch,
    /// Which pack of that push.
    pub n: u32,
    /// Pages before its first block.
    pub header_pages: u16,
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
    /// Where they are; `None`: they are zeroes.
    pub data: Option<Data<'a>>,
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
    /// Index in `packs`.
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
                    Piece { first: at, count: until - at, data: None }
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
        let mut builder = Builder::default();
        let (mut at, mut next) = (0, 0);
        for update in updates {
            assert!(at <= update.first && update.count > 0, "updates ascend and do not overlap");
            next = self.copy(&mut builder, next, at, update.first);
            if let Some(data) = update.data {
                assert_eq!(data.crcs.len(), usize::from(update.count), "a CRC for each block");
                builder.push(update.first, &data);
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
            if at < run.end().min(to)
                && let Some(data) = self.clip(run, at, to).data
            {
                builder.push(at, &data);
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
        let crc_at = usize::from(run.crc_at) + usize::from(skip);
        let crcs = &self.crcs[crc_at..crc_at + usize::from(end - from)];
        let pack = self.packs[usize::from(run.slot)].0;
        let data = Data { pack, offset: run.offset + skip, crcs };
        Piece { first: from, count: end - from, data: Some(data) }
    }

    /// All bytes of the page.
    #[must_use]
    pub fn encode(&self, volume: Uuid, page: u32, epoch: Epoch, crc32c: Crc32c) -> Vec<u8> {
        let mut bytes = frame::begin(MAGIC, VERSION);
        let variable = self.packs.len() * 16 + self.runs.len() * 8 + self.crcs.len() * 4;
        bytes.reserve_exact(FIXED_BYTES + variable);
        bytes.extend_from_slice(&volume.0);
        bytes.extend_from_slice(&page.to_le_bytes());
        bytes.extend_from_slice(&(self.packs.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&epoch.0.to_le_bytes());
        bytes.extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(self.crcs.len() as u32).to_le_bytes());
        for (pack, live) in &self.packs {
            bytes.extend_from_slice(&pack.epoch.0.to_le_bytes());
            bytes.extend_from_slice(&pack.n.to_le_bytes());
            bytes.extend_from_slice(&pack.header_pages.to_le_bytes());
            bytes.extend_from_slice(&live.to_le_bytes());
        }
        for run in &self.runs {
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

    /// Reads the version `epoch` of page `page` of `volume` (known from its key).
    pub fn decode(
        bytes: &[u8],
        volume: Uuid,
        page: u32,
        epoch: Epoch,
        crc32c: Crc32c,
    ) -> Result<Self, FormatError> {
        let mut reader = frame::open(bytes, MAGIC, VERSION)?;
        frame::check(bytes, crc32c)?;
        if Uuid(reader.take()?) != volume {
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
        reader.require(packs * 16 + runs * 8 + blocks * 4)?;
        let mut found = Self { packs: Vec::with_capacity(packs), ..Self::default() };
        found.read_packs(&mut reader, packs, epoch)?;
        found.read_runs(&mut reader, runs, blocks)?;
        found.crcs = (0..blocks).map(|_| reader.u32()).collect::<Result<_, _>>()?;
        reader.end()?;
        Ok(found)
    }

    fn read_packs(
        &mut self,
        reader: &mut Reader<'_>,
        count: usize,
        newest: Epoch,
    ) -> Result<(), FormatError> {
        for _ in 0..count {
            let pack = PackRef {
                epoch: Epoch(reader.u64()?),
                n: reader.u32()?,
                header_pages: reader.u16()?,
            };
            let live = reader.u16()?;
            let ascends = self
                .packs
                .last()
                .is_none_or(|(last, _)| (last.epoch, last.n) < (pack.epoch, pack.n));
            let possible = pack.epoch <= newest
                && (1..=HEADER_PAGES_MAX).contains(&pack.header_pages)
                && (1..=PACK_BLOCKS_MAX).contains(&live.into());
            if !ascends || !possible {
                return reader.bad(16, "pack");
            }
            self.packs.push((pack, live));
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
        for run in &mut runs {
            run.slot = renumbered[usize::from(run.slot)];
        }
        MapPage { packs, runs, crcs: self.crcs }
    }
}

const FIXED_BYTES: usize = 56;
const MAGIC: [u8; 8] = *b"HEELMAPP";
const VERSION: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::tests::{crc32c, reseal};

    const VOLUME: Uuid = Uuid([3; 16]);
    const NEWEST: Epoch = Epoch(1 << 40);

    fn decode(bytes: &[u8]) -> Result<MapPage, FormatError> {
        MapPage::decode(bytes, VOLUME, 5, NEWEST, crc32c)
    }

    fn pack(epoch: u64, n: u32) -> PackRef {
        PackRef { epoch: Epoch(epoch), n, header_pages: 1 }
    }

    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    /// One block as the model knows it: pack, offset, CRC.
    type Cell = Option<(PackRef, u16, u32)>;

    fn cells(page: &MapPage, first: u16, count: u16) -> Vec<Cell> {
        let mut cells = Vec::new();
        for piece in page.lookup(first, count) {
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
                        let pack = pack(round, random(&mut rng) as u32 % 2);
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
                assert_eq!(cells(&page, 0, MAP_PAGE_BLOCKS as u16), model, "seed {seed}");
                check_packs(&page, &model);
                let bytes = page.encode(VOLUME, 5, NEWEST, crc32c);
                assert_eq!(decode(&bytes).as_ref(), Ok(&page), "seed {seed}");
                let first = random(&mut rng) % span;
                let count = random(&mut rng) % (MAP_PAGE_BLOCKS as u64 - first);
                let part = &model[first as usize..(first + count) as usize];
                assert_eq!(cells(&page, first as u16, count as u16), part, "seed {seed}");
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

    fn sample() -> MapPage {
        let crcs = [9; 4];
        let data = |epoch, offset, crcs| Some(Data { pack: pack(epoch, 0), offset, crcs });
        MapPage::default().apply(&[
            Update { first: 10, count: 2, data: data(7, 0, &crcs[..2]) },
            Update { first: 12, count: 4, data: data(6, 2, &crcs) },
        ])
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen() {
        let good = sample().encode(VOLUME, 5, NEWEST, crc32c);
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
        let good = sample().encode(VOLUME, 5, NEWEST, crc32c);
        let field = |at, what| FormatError::Field { at, what };
        let runs = 56 + 32;
        let cases: [(usize, &[u8], FormatError); 13] = [
            (8, &[2], FormatError::Version(2)),
            (16, &[0], field(16, "volume")),
            (32, &[6], field(32, "page")),
            (40, &[1], field(40, "epoch")),
            (52, &[1, 64], field(52, "number of blocks")),
            (48, &[7], field(48, "number of runs or packs")),
            (36, &[3], field(48, "number of runs or packs")),
            (56, &[8], field(72, "pack")),
            (56 + 12, &[0], field(56, "pack")),
            (56 + 14, &[5], field(runs + 16, "number of mapped blocks")),
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
