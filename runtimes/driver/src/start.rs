//! Starting: the cache device's own pages, the division of memory, and the recovery of a core's
//! shards.

use std::fmt;
use std::io;
use std::ops::Range;

use heeler_core::budget::{Rules, Target};
use heeler_core::buffer::PAGE_TABLE_BYTES;
use heeler_core::config::ShardConfig;
use heeler_core::ids::{CoreId, PageId, ShardId};
use heeler_core::lending::{Lending, Place, Setup};
use heeler_core::limits::{REQUEST_BLOCKS_MAX, SHARDS_MAX};
use heeler_core::onode::{META_UNIT_BYTES, ONODE_UNITS};
use heeler_core::recovery::{Need, Recovered, Recovery, RegionLayout};
use heeler_core::shard::{Shard, ShardStorage};
use heeler_core::wire::heat::RecordHead;
use heeler_core::wire::superblock::{
    REGIONS_PAGE, SUPERBLOCK_PAGES, Superblock, SuperblockError, TABLE_PAGES, VolumeTable,
};
use heeler_hw::{AlignedBuf, Arena, BlockFile, IoError, PAGE_BYTES, crc32c};

use crate::connection::CONNECTION_BYTES_MAX;
use crate::core_loop::HostedShard;
use crate::front::{CONNECTIONS_MAX, ConnectionBudget};

/// Why a cache device cannot be formatted, opened or written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheError {
    /// The device failed; what was tried.
    Io(&'static str, IoError),
    /// It does not begin as a cache does.
    NotACache,
    /// It was formatted by another version of heeler, of this format version.
    Version(u32),
    /// Both copies of this part are damaged.
    Damaged(&'static str),
    /// Too small to be formatted.
    TooSmall {
        /// Bytes that it has.
        bytes: u64,
        /// Bytes that are needed.
        needed: u64,
    },
    /// It has become smaller since it was formatted.
    Truncated {
        /// Bytes that it has.
        bytes: u64,
        /// Bytes that it was formatted for.
        needed: u64,
    },
    /// More shards than a cache can have, or none.
    Shards(u16),
    /// Headers in a shard's log are damaged that had been durable.
    DamagedLog {
        /// The shard.
        shard: u16,
        /// Damaged stretches.
        stretches: u64,
    },
}

impl fmt::Display for CacheError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(what, error) => write!(f, "could not {what}: {error}"),
            Self::NotACache => f.write_str(
                "not a heeler cache; nothing was touched (to use this device, clear its first 64 \
                 KiB, or name another one)",
            ),
            Self::Version(version) => write!(
                f,
                "format version {version} is not known to this program: use the version of heeler \
                 that wrote it, push its volumes, then format again"
            ),
            Self::Damaged(part) => write!(f, "both copies of the {part} are damaged"),
            Self::TooSmall { bytes, needed } => {
                write!(f, "{bytes} bytes are too few: a cache needs at least {needed}")
            }
            Self::Truncated { bytes, needed } => write!(
                f,
                "it has {bytes} bytes but was formatted for {needed}: it was cut or is another \
                 device"
            ),
            Self::Shards(shards) => write!(f, "{shards} shards: 1 to {SHARDS_MAX} are possible"),
            Self::DamagedLog { shard, stretches } => write!(
                f,
                "the log of shard {shard} is damaged in {stretches} places, and writes that were \
                 never pushed may be lost; nothing was changed. Keep this file, and serve the last \
                 pushed state from a new cache: name one with --cache, and add --takeover"
            ),
        }
    }
}

impl std::error::Error for CacheError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(_, error) => Some(error),
            _ => None,
        }
    }
}

/// A formatted cache device: its geometry and its volume table, each kept in two copies.
#[derive(Debug)]
pub struct CacheDevice<F> {
    file: F,
    superblock: Superblock,
    table: VolumeTable,
    /// The copy (0 or 1) that `table` was read from or written to.
    copy: usize,
}

impl<F: BlockFile> CacheDevice<F> {
    /// Makes the device an empty cache. What it held before is lost. `cache` is a random identity.
    ///
    /// # Errors
    ///
    /// [`CacheError`].
    pub fn format(file: F, cache: [u8; 16], shards: u16) -> Result<Self, CacheError> {
        if !(1..=SHARDS_MAX).contains(&usize::from(shards)) {
            return Err(CacheError::Shards(shards));
        }
        let bytes = file.size_bytes();
        let needed = Superblock::bytes_min(shards);
        let superblock = Superblock::layout(cache, shards, bytes)
            .ok_or(CacheError::TooSmall { bytes, needed })?;
        let table = VolumeTable { generation: 1, next_number: 1, rows: Vec::new() };
        // First without a superblock: a format that is cut short leaves no cache.
        let all = AlignedBuf::zeroed(REGIONS_PAGE as usize);
        write(&file, "clear the first pages", 0, &all)?;
        sync(&file)?;
        let mut page = AlignedBuf::zeroed(1);
        table.encode(&mut page, crc32c);
        write(&file, "write the volume table", TABLE_PAGES[0], &page)?;
        sync(&file)?;
        superblock.encode(&mut page, crc32c);
        for copy in SUPERBLOCK_PAGES {
            write(&file, "write the superblock", copy, &page)?;
        }
        sync(&file)?;
        Ok(Self { file, superblock, table, copy: 0 })
    }

    /// Opens a formatted device.
    ///
    /// # Errors
    ///
    /// [`CacheError`].
    pub fn open(file: F) -> Result<Self, CacheError> {
        let superblock = read_superblock(&file)?;
        let (bytes, needed) = (file.size_bytes(), superblock.device_bytes());
        if bytes < needed {
            return Err(CacheError::Truncated { bytes, needed });
        }
        let copies = TABLE_PAGES.map(|page| read_copy(&file, page, VolumeTable::decode));
        let newest = copies.into_iter().enumerate().filter_map(|(copy, table)| {
            // A copy that was never written, or was torn by a power cut, does not count.
            table.ok().map(|table| (table, copy))
        });
        let (table, copy) = newest
            .max_by_key(|(table, _)| table.generation)
            .ok_or(CacheError::Damaged("volume table"))?;
        Ok(Self { file, superblock, table, copy })
    }

    /// The device.
    pub fn file(&self) -> &F {
        &self.file
    }

    /// How it is laid out.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The volumes that it knows.
    pub fn table(&self) -> &VolumeTable {
        &self.table
    }

    /// Replaces the volume table, durably. The generation is the device's own matter. After an
    /// error the old table counts, or the new one.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn save_table(&mut self, table: &VolumeTable) -> Result<(), CacheError> {
        let table = VolumeTable { generation: self.table.generation + 1, ..table.clone() };
        let copy = 1 - self.copy;
        let mut page = AlignedBuf::zeroed(1);
        table.encode(&mut page, crc32c);
        write(&self.file, "write the volume table", TABLE_PAGES[copy], &page)?;
        sync(&self.file)?;
        self.table = table;
        self.copy = copy;
        Ok(())
    }

    /// What each shard might have of the memory, as its newest record of heat says; the default of
    /// one that has none, or none that can be read.
    pub fn shares(&self) -> Vec<Target> {
        (0..self.superblock.shards).map(|shard| self.share(shard).unwrap_or_default()).collect()
    }

    fn share(&self, shard: u16) -> Option<Target> {
        let Superblock { segment_pages, segments, heat_pages, .. } = self.superblock;
        let log = u64::from(segment_pages) * u64::from(segments);
        let area = self.superblock.region_page(shard) + log;
        let copy_pages = heat_pages / 2;
        let region = self.superblock.region_id(shard);
        let record = |copy: u32| {
            let mut page = AlignedBuf::zeroed(1);
            let at = area + u64::from(copy * copy_pages);
            self.file.read_at(at * PAGE_BYTES as u64, &mut page).ok()?;
            RecordHead::open(&page, region, copy_pages, crc32c)
        };
        let newest = (0..2).filter_map(record).max_by_key(|(generation, _)| *generation);
        newest.map(|(_, head)| head.share)
    }
}

fn read_superblock<F: BlockFile>(file: &F) -> Result<Superblock, CacheError> {
    if file.size_bytes() < u64::from(REGIONS_PAGE) * PAGE_BYTES as u64 {
        return Err(CacheError::NotACache);
    }
    let mut worst = CacheError::NotACache;
    for copy in SUPERBLOCK_PAGES {
        match read_copy(file, copy, Superblock::decode) {
            Ok(superblock) => return Ok(superblock),
            Err(CacheError::NotACache) => {}
            Err(error) => worst = error,
        }
    }
    Err(worst)
}

fn read_copy<F: BlockFile, T>(
    file: &F,
    page: u32,
    decode: fn(&[u8], heeler_core::ids::Crc32c) -> Result<T, SuperblockError>,
) -> Result<T, CacheError> {
    let mut bytes = AlignedBuf::zeroed(1);
    let offset = u64::from(page) * PAGE_BYTES as u64;
    file.read_at(offset, &mut bytes)
        .map_err(|error| CacheError::Io("read the superblock or volume table", error))?;
    decode(&bytes, crc32c).map_err(|error| match error {
        SuperblockError::Magic => CacheError::NotACache,
        SuperblockError::Version(version) => CacheError::Version(version),
        SuperblockError::Checksum | SuperblockError::Geometry => CacheError::Damaged("superblock"),
    })
}

fn write<F: BlockFile>(
    file: &F,
    what: &'static str,
    page: u32,
    bytes: &AlignedBuf,
) -> Result<(), CacheError> {
    let offset = u64::from(page) * PAGE_BYTES as u64;
    file.write_at(offset, bytes).map_err(|error| CacheError::Io(what, error))
}

fn sync<F: BlockFile>(file: &F) -> Result<(), CacheError> {
    file.sync().map_err(|error| CacheError::Io("flush the device", error))
}

/// Pages for what clients write, for each core, at least: some requests of the longest kind.
const TRANSIT_MIN: u32 = 8 * REQUEST_BLOCKS_MAX as u32;
/// Pages for what clients write, for all cores, beyond which more would help nobody (64 MiB).
const TRANSIT_ENOUGH: u64 = 16384;
/// Connections that there is always memory for.
const CONNECTIONS_MIN: u64 = 8;
/// Bytes of one connection's session, and of its tasks.
const SESSION_BYTES: u64 = 64 << 10;
/// Bytes on their way between the cores and the store: at least, and beyond which more would
/// help nobody.
const MOVING_BYTES: (u64, u64) = (16 << 20, 256 << 20);
/// Bytes that a shard takes whatever it may have: its tasks, records, fills and queues.
const SHARD_BYTES: u64 = 2 << 20;
/// Units of metadata of each shard at least.
const META_UNITS_MIN: u32 = 1024;
/// How many times its even share at the start a shard may have: its tables have room for that. So
/// all memory may grow to as many times what it was at the start.
const GROWTH_MAX: u32 = 4;

/// How memory is divided among cores and shards at the start.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How shards are built; the region's identity is set for each. The layout and `adopted_max`
    /// are not to be changed.
    pub config: ShardConfig,
    /// The store has all that the cache holds: a damaged log is emptied, not refused. Set it from
    /// the volume table.
    pub released: bool,
    superblock: Superblock,
    cores: u16,
    setup: Setup,
    /// Pages of the arena: at the start, and ever.
    pages: (u32, u32),
    memory_max: u64,
    /// Pages of each shard, beside those of its log.
    own: Vec<Range<u32>>,
    /// Pages of each core for what its clients write.
    transit: Vec<Range<u32>>,
    connections: u64,
    moving_bytes: u64,
}

impl Plan {
    /// Divides `memory` bytes, which may become `memory_max` later: as before, if `former` has what
    /// [`CacheDevice::shares`] found, or else evenly. What comes with the plan goes to the control
    /// thread.
    ///
    /// # Errors
    ///
    /// The number of bytes that is needed at least.
    pub fn new(
        superblock: &Superblock,
        cores: u16,
        memory: u64,
        memory_max: u64,
        former: &[Target],
    ) -> Result<(Self, Lending), u64> {
        let config = ShardConfig {
            heat_pages: superblock.heat_pages,
            ..ShardConfig::for_region(layout_of(superblock, 0), crc32c)
        };
        let memory_max = memory_max.min(memory.saturating_mul(GROWTH_MAX.into())).max(memory);
        let shares = Shares { superblock, cores, memory, memory_max };
        let needed = shares.bytes_min(&config);
        if memory < needed {
            return Err(needed);
        }
        let parts = Parts::new(cores, memory - needed);
        let adopted_max = parts.transit as usize * usize::from(cores);
        let config = ShardConfig { adopted_max, ..config };
        let setup = shares.setup(&config, &parts);
        let lending = Lending::new(setup, memory, former)?;
        let plan = Self {
            config,
            released: false,
            superblock: *superblock,
            cores,
            setup,
            pages: (lending.backed_pages(), shares.pages_max()),
            memory_max,
            own: (0..setup.shards).map(|shard| lending.start_of(Place::Shard(shard))).collect(),
            transit: (0..setup.cores).map(|core| lending.start_of(Place::Core(core))).collect(),
            connections: parts.connections,
            moving_bytes: parts.moving_bytes,
        };
        Ok((plan, lending))
    }

    /// The pages of the process, as many as there are at the start backed.
    ///
    /// # Errors
    ///
    /// The system has not enough memory.
    pub fn arena(&self) -> io::Result<Arena> {
        let arena = Arena::reserve(self.pages.1)?;
        arena.grow(self.pages.0)?;
        Ok(arena)
    }

    /// Bytes that memory may be changed to at most.
    #[must_use]
    pub fn memory_max(&self) -> u64 {
        self.memory_max
    }

    /// Room for connections.
    #[must_use]
    pub fn connections(&self) -> ConnectionBudget {
        ConnectionBudget::new(self.connections as usize)
    }

    /// Bytes of batches that one core may have on their way to the store.
    #[must_use]
    pub fn batch_bytes(&self) -> usize {
        self.moving_bytes as usize / 2 / usize::from(self.cores)
    }

    /// Bytes of fetched blocks on their way from the store.
    #[must_use]
    pub fn fetch_bytes(&self) -> usize {
        self.moving_bytes as usize / 2
    }

    /// Shards of the whole cache.
    #[must_use]
    pub fn shards(&self) -> u16 {
        self.superblock.shards
    }

    /// The shards of a core.
    pub fn shards_of(&self, core: CoreId) -> impl Iterator<Item = ShardId> + use<> {
        (core.0..self.superblock.shards).step_by(usize::from(self.cores)).map(ShardId)
    }

    /// A core's pages for what its clients write.
    #[must_use]
    pub fn transit_of(&self, core: CoreId) -> Vec<PageId> {
        self.transit[usize::from(core.0)].clone().map(PageId).collect()
    }

    fn pages_of(&self, shard: ShardId) -> Vec<PageId> {
        let shard = usize::from(shard.0);
        self.setup.fixed_of(shard).chain(self.own[shard].clone()).map(PageId).collect()
    }

    /// Memory for the lists of a core's shards.
    #[must_use]
    pub fn storage_of(&self, core: CoreId) -> Vec<ShardStorage> {
        let pages = self.setup.rules.most.pages + self.setup.fixed_pages;
        let storage = |_| ShardStorage::new(&self.config, pages as usize);
        self.shards_of(core).map(storage).collect()
    }

    /// Recovers and builds a core's shards. Blocks: nothing is served yet. `storage` is what
    /// [`storage_of`](Self::storage_of) gave for the core.
    ///
    /// # Errors
    ///
    /// The device could not make durable what recovery wrote.
    pub fn start_shards<'a, F: BlockFile>(
        &self,
        core: CoreId,
        file: &F,
        storage: &'a mut [ShardStorage],
    ) -> Result<Vec<HostedShard<'a>>, CacheError> {
        let mut hosted = Vec::with_capacity(storage.len());
        for (id, storage) in self.shards_of(core).zip(storage) {
            let layout = layout_of(&self.superblock, id.0);
            let first_page = self.superblock.region_page(id.0);
            let recovered = recover(file, layout, first_page, self.released)?;
            if recovered.damaged > 0 {
                let (shard, stretches) = (id.0, recovered.damaged);
                return Err(CacheError::DamagedLog { shard, stretches });
            }
            if recovered.torn > 0 || recovered.unreadable > 0 {
                log::warn!(
                    "shard {}: {} records were torn and are dropped, {} segments are unreadable",
                    id.0,
                    recovered.torn,
                    recovered.unreadable
                );
            }
            log::debug!("shard {}: {} entries recovered", id.0, recovered.entries.len());
            let config = ShardConfig { layout, ..self.config };
            let shard = Shard::new(config, storage, &self.pages_of(id), recovered);
            hosted.push(HostedShard { id, first_page, shard });
        }
        Ok(hosted)
    }
}

/// What is set aside for one purpose or another.
#[derive(Clone, Copy, Debug)]
struct Parts {
    /// Pages of each core.
    transit: u32,
    connections: u64,
    moving_bytes: u64,
}

impl Parts {
    /// The least, and parts of so many bytes more.
    fn new(cores: u16, spare: u64) -> Self {
        let transit = (spare / 32 / PAGE_BYTES as u64).min(TRANSIT_ENOUGH) / u64::from(cores);
        let connections = CONNECTIONS_MIN + spare / 8 / connection_bytes();
        let (least, enough) = MOVING_BYTES;
        Self {
            transit: TRANSIT_MIN + transit as u32,
            connections: connections.min(CONNECTIONS_MAX as u64 * u64::from(cores)),
            moving_bytes: (least + spare / 16).min(enough),
        }
    }
}

/// What is divided, and among whom.
#[derive(Clone, Copy, Debug)]
struct Shares<'a> {
    superblock: &'a Superblock,
    cores: u16,
    memory: u64,
    memory_max: u64,
}

impl Shares<'_> {
    fn pages_max(&self) -> u32 {
        pages_in(self.memory_max)
    }

    /// The least memory.
    fn bytes_min(&self, config: &ShardConfig) -> u64 {
        let least = Self { memory: 0, ..*self };
        let needed = least.setup(config, &Parts::new(self.cores, 0)).bytes_min();
        // And the tables for that much.
        let each = PAGE_TABLE_BYTES as u64 * u64::from(GROWTH_MAX);
        needed + needed * each / (PAGE_BYTES as u64 - each) + PAGE_BYTES as u64
    }

    fn setup(&self, config: &ShardConfig, parts: &Parts) -> Setup {
        let shards = u32::from(self.superblock.shards);
        let fixed_pages = Shard::pages_fixed(config) as u32;
        let floor = Target {
            pages: Shard::pages_min(config) as u32 - fixed_pages,
            meta_units: META_UNITS_MIN,
        };
        let most = Target {
            pages: (pages_in(self.memory) / shards).saturating_mul(GROWTH_MAX).max(floor.pages),
            meta_units: config.leaves as u32 + ONODE_UNITS * config.onodes as u32,
        };
        let table_pages = u64::from(most.pages) + config.adopted_max as u64;
        let tables = config.table_bytes() + table_pages * PAGE_TABLE_BYTES as u64;
        let aside = parts.connections * connection_bytes()
            + parts.moving_bytes
            + u64::from(shards) * (SHARD_BYTES + tables);
        Setup {
            rules: Rules {
                page_bytes: PAGE_BYTES as u64,
                unit_bytes: META_UNIT_BYTES as u64,
                floor,
                most,
            },
            shards: shards as usize,
            cores: usize::from(self.cores),
            fixed_pages,
            core_pages: parts.transit,
            chunk_pages: Arena::chunk_pages_of(self.pages_max()),
            aside_bytes: aside,
        }
    }
}

fn pages_in(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE_BYTES as u64).unwrap_or(u32::MAX).clamp(1, u32::MAX - 1)
}

fn connection_bytes() -> u64 {
    CONNECTION_BYTES_MAX as u64 + SESSION_BYTES
}

fn layout_of(superblock: &Superblock, shard: u16) -> RegionLayout {
    RegionLayout {
        region: superblock.region_id(shard),
        segment_pages: superblock.segment_pages,
        segments: superblock.segments,
    }
}

/// Runs recovery of one region that begins at page `first_page` of the device.
fn recover<F: BlockFile>(
    file: &F,
    layout: RegionLayout,
    first_page: u64,
    released: bool,
) -> Result<Recovered, CacheError> {
    let mut recovery = Recovery::new(layout, crc32c);
    let offset = |at: u32| (first_page + u64::from(at)) * PAGE_BYTES as u64;
    loop {
        match recovery.need() {
            Need::Read { at, count } => {
                let mut bytes = AlignedBuf::zeroed(count as usize);
                match file.read_at(offset(at), &mut bytes) {
                    Ok(()) => recovery.handle_read(Some(&bytes)),
                    Err(error) => {
                        log::warn!("cache device: page {at} of a region: {error}");
                        recovery.handle_read(None);
                    }
                }
            }
            Need::Write { at } => {
                let mut bytes = AlignedBuf::zeroed(recovery.bytes().len() / PAGE_BYTES);
                bytes.copy_from_slice(recovery.bytes());
                if let Err(error) = file.write_at(offset(at), &bytes) {
                    log::warn!("cache device: a footer was not written: {error}");
                }
                recovery.handle_written();
            }
            Need::Done if recovery.damaged() > 0 && released => {
                log::warn!("a damaged log of clean data is given up");
                recovery.give_up();
            }
            Need::Done => {
                sync(file)?;
                return Ok(recovery.finish());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use heeler_core::ids::VolumeId;
    use heeler_core::wire::heat::{PageHead, Part};
    use heeler_core::wire::superblock::{CACHE_VERSION, VolumeRow};
    use heeler_hw::sim::disk::{CrashKind, SimDisk};

    const CACHE: [u8; 16] = *b"cache identity 1";

    fn disk(seed: u64) -> SimDisk {
        SimDisk::new(Superblock::bytes_min(4) + (1 << 20), seed)
    }

    fn row(number: u32) -> VolumeRow {
        let bytes = [number as u8; 16];
        let number = VolumeId(number);
        VolumeRow { number, released: false, uuid: bytes, nonce: bytes, pending: [0; 16] }
    }

    #[test]
    fn what_was_formatted_opens_and_keeps_its_table() {
        let disk = disk(1);
        let formatted = CacheDevice::format(disk.clone(), CACHE, 4).unwrap();
        let mut table = formatted.table().clone();
        let mut device = CacheDevice::open(disk.clone()).unwrap();
        assert_eq!(device.superblock(), formatted.superblock());
        for number in 1..6 {
            table.next_number = number + 1;
            table.rows.push(row(number));
            device.save_table(&table).unwrap();
            let again = CacheDevice::open(disk.clone()).unwrap();
            assert_eq!((again.table().next_number, &again.table().rows), (number + 1, &table.rows));
        }
    }

    #[test]
    fn a_table_survives_a_power_cut_during_the_next_ones_write() {
        for seed in 0..50 {
            let disk = disk(seed);
            let mut device = CacheDevice::format(disk.clone(), CACHE, 4).unwrap();
            let old = VolumeTable { next_number: 2, rows: vec![row(1)], ..device.table().clone() };
            device.save_table(&old).unwrap();
            disk.fail_after(heeler_hw::IoKind::Flush, 0);
            let new = VolumeTable { next_number: 3, rows: vec![row(1), row(2)], ..old };
            assert!(matches!(device.save_table(&new), Err(CacheError::Io(..))));
            disk.crash(CrashKind::Power);
            let rows = CacheDevice::open(disk).unwrap().table().rows.len();
            assert!(rows == 1 || rows == 2, "{rows} rows");
        }
    }

    #[test]
    fn what_is_not_a_whole_cache_is_refused_with_the_reason() {
        let disk = disk(3);
        assert_eq!(CacheDevice::open(disk.clone()).unwrap_err(), CacheError::NotACache);
        CacheDevice::format(disk.clone(), CACHE, 4).unwrap();
        disk.flip_bit(0, 300);
        CacheDevice::open(disk.clone()).expect("the second copy counts");
        disk.flip_bit(1, 300);
        assert_eq!(CacheDevice::open(disk.clone()).unwrap_err(), CacheError::Damaged("superblock"));
        disk.flip_bit(1, 300);
        disk.flip_bit(2, 5000);
        assert_eq!(
            CacheDevice::open(disk.clone()).unwrap_err(),
            CacheError::Damaged("volume table")
        );
        disk.flip_bit(1, 8 * 8);
        assert_eq!(CacheDevice::open(disk).unwrap_err(), CacheError::Version(CACHE_VERSION ^ 1));

        let small = SimDisk::new(1 << 20, 1);
        let error = CacheDevice::format(small, CACHE, 4).unwrap_err();
        assert!(matches!(error, CacheError::TooSmall { bytes: 0x10_0000, .. }));
        let error = CacheDevice::format(SimDisk::new(1 << 20, 1), CACHE, 0).unwrap_err();
        assert_eq!(error, CacheError::Shards(0));
    }

    #[test]
    fn a_cut_device_is_refused() {
        let whole = disk(4);
        CacheDevice::format(whole.clone(), CACHE, 4).unwrap();
        let cut = SimDisk::new(whole.size_bytes() / 2, 1);
        let mut page = AlignedBuf::zeroed(1);
        whole.read_at(0, &mut page).unwrap();
        cut.write_at(0, &page).unwrap();
        assert!(matches!(CacheDevice::open(cut), Err(CacheError::Truncated { .. })));
    }

    fn write_record(disk: &SimDisk, shard: u16, copy: u32, generation: u64, pages: u32) {
        let superblock = *CacheDevice::open(disk.clone()).unwrap().superblock();
        let share = Target { pages, meta_units: 2000 };
        let parts_at = heeler_core::wire::heat::BUFFERS_AT;
        let record = RecordHead {
            pages: parts_at,
            ghosts_at: parts_at,
            referenced_at: parts_at,
            share,
            ..RecordHead::default()
        };
        let mut page = AlignedBuf::zeroed(1);
        record.encode(&mut page);
        let (region, part) = (superblock.region_id(shard), Part::Head);
        PageHead { region, generation, page: 0, part, records: 0 }.seal(&mut page, crc32c);
        let at = superblock.region_page(shard)
            + u64::from(superblock.segment_pages * superblock.segments)
            + u64::from(copy * superblock.heat_pages / 2);
        disk.write_at(at * PAGE_BYTES as u64, &page).unwrap();
    }

    #[test]
    fn memory_is_divided_as_the_newest_records_say() {
        let disk = disk(5);
        let device = CacheDevice::format(disk.clone(), CACHE, 4).unwrap();
        assert_eq!(device.shares(), [Target::default(); 4]);
        for (shard, copy, generation, pages) in
            [(0, 0, 8, 5000), (0, 1, 7, 1), (2, 0, 4, 1), (2, 1, 5, 10_000)]
        {
            write_record(&disk, shard, copy, generation, pages);
        }
        let shares = device.shares();
        assert_eq!(
            shares.iter().map(|share| share.pages).collect::<Vec<_>>(),
            [5000, 0, 10_000, 0]
        );
        let plan = |former: &[Target]| {
            let (plan, _) = Plan::new(device.superblock(), 2, 512 << 20, 1 << 30, former).unwrap();
            let pages = |shard| plan.pages_of(ShardId(shard)).len();
            [0, 1, 2, 3].map(pages)
        };
        let [a, b, c, d] = plan(&shares);
        assert!(b == d && c > 3 * a / 2 && a > 10 * b, "{a} {b} {c} {d}");
        let even = plan(&[]);
        assert!(even.iter().all(|pages| *pages == even[0]) && even[0] * 4 > a + b + c, "{even:?}");
    }

    #[test]
    fn every_page_has_one_owner() {
        let superblock = Superblock::layout(CACHE, 5, 1 << 30).unwrap();
        let needed = Plan::new(&superblock, 2, 0, 1 << 35, &[]).unwrap_err();
        assert_eq!(Plan::new(&superblock, 2, needed - 1, 1 << 35, &[]).unwrap_err(), needed);
        for memory in [needed, needed + (1 << 20), needed + (400 << 20), 1 << 34] {
            let (plan, lending) = Plan::new(&superblock, 2, memory, 1 << 35, &[]).unwrap();
            let mut all: Vec<PageId> =
                (0..2).flat_map(|core| plan.transit_of(CoreId(core))).collect();
            assert_eq!(all.len(), plan.config.adopted_max);
            all.extend((0..5).flat_map(|shard| plan.pages_of(ShardId(shard))));
            all.sort_unstable();
            assert!(all.windows(2).all(|pair| pair[0] < pair[1]), "no page twice");
            assert!(all.iter().all(|page| page.0 < lending.backed_pages()));
            let usage = lending.usage();
            assert!(
                usage.taken_bytes <= memory && usage.taken_bytes > memory / 10 * 9,
                "{usage:?}"
            );
        }
    }
}
