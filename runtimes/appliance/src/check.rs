//! `heeler check`: reads everything and changes nothing.

use std::fmt;

use heeler_core::ids::BLOCK_BYTES;
use heeler_core::recovery::{LogEntry, Need, Recovered, Recovery, RegionLayout};
use heeler_core::wire::log::EntryKind;
use heeler_core::wire::names::Uuid;
use heeler_core::wire::superblock::{Superblock, VolumeTable};
use heeler_driver::start::CacheDevice;
use heeler_hw::{AlignedBuf, BlockFile, FileError, IoError, crc32c};
use heeler_store::{Store, check, format, volumes};

use crate::cli::CheckArgs;
use crate::client::Bar;
use crate::files::open_when_free;
use crate::lines::bytes;
use crate::settings::Place;
use crate::size::Size;

/// Lines about one region or one volume at most.
const LINES_MAX: usize = 50;

/// Checks the cache and the volumes. An error when something is wrong, after all of it was printed.
pub(crate) fn check(place: &Place, args: &CheckArgs) -> Result<(), String> {
    let mut wrong = check_cache(place);
    let store = Store::open(place.store.clone()).map_err(|e| e.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("the runtime: {e}"))?;
    wrong += runtime.block_on(check_store(&store, args))?;
    match wrong {
        0 => Ok(()),
        1 => Err("1 thing is wrong".into()),
        _ => Err(format!("{wrong} things are wrong")),
    }
}

async fn check_store(store: &Store, args: &CheckArgs) -> Result<usize, String> {
    let mut wrong = 0;
    format::check(store).await.map_err(|e| e.to_string())?;
    let listed = volumes::list(store).await.map_err(|e| format!("the store: {e}"))?;
    for name in &args.volumes {
        if listed.iter().all(|volume| volume.name != *name) {
            println!("volume {name}: not in the store");
            wrong += 1;
        }
    }
    let wanted = |name: &String| args.volumes.is_empty() || args.volumes.contains(name);
    for volume in listed.iter().filter(|volume| wanted(&volume.name)) {
        let name = &volume.name;
        // Also of one whose head cannot be read: the check says more.
        let uuid = volumes::find(store, name).await;
        let report = match uuid {
            Ok(uuid) => check::check(store, uuid, args.deep).await,
            Err(e) => {
                println!("volume {name}: {e}");
                wrong += 1;
                continue;
            }
        };
        let report = report.map_err(|e| format!("volume {name}: {e}"))?;
        wrong += show(name, &report, args.deep);
    }
    Ok(wrong)
}

fn show(name: &str, report: &check::Report, deep: bool) -> usize {
    let checked = if deep { report.blocks_checked } else { 0 };
    println!(
        "volume {name}: {} map pages, {} in {} packs mapped, {} of blocks compared, {} errors",
        report.map_pages,
        Size(bytes(report.blocks_mapped)),
        report.packs,
        Size(bytes(checked)),
        report.errors.len()
    );
    print_some(&report.errors);
    if !report.orphans.is_empty() {
        println!(
            "  {} orphans of {} (overwritten, left by an interrupted push, or being pushed now; \
             harmless)",
            report.orphans.len(),
            Size(report.orphan_bytes)
        );
        print_some(&report.orphans);
    }
    report.errors.len()
}

fn print_some(lines: &[String]) {
    for line in lines.iter().take(LINES_MAX) {
        println!("    {line}");
    }
    if lines.len() > LINES_MAX {
        println!("    and {} more", lines.len() - LINES_MAX);
    }
}

/// Checks the cache file. Returns how many things are wrong.
fn check_cache(place: &Place) -> usize {
    let path = place.cache.display();
    if !place.cache.exists() {
        println!("cache {path}: none");
        return 0;
    }
    let file = match open_when_free(&place.cache) {
        Ok(file) => file,
        Err(FileError::Locked(_)) => {
            println!("cache {path}: in use by a running server; stop it to have this checked");
            return 1;
        }
        Err(e) => {
            println!("cache {path}: {e}");
            return 1;
        }
    };
    let device = match CacheDevice::open(file) {
        Ok(device) => device,
        Err(e) => {
            println!("cache {path}: {e}");
            return 1;
        }
    };
    let superblock = *device.superblock();
    println!(
        "cache {path}: {} shards of {}, {} volumes known",
        superblock.shards,
        Size(bytes(u64::from(superblock.log_pages()))),
        device.table().rows.len()
    );
    let bar = Bar::new("checking the cache");
    let mut wrong = 0;
    for shard in 0..superblock.shards {
        bar.set(u64::from(shard), u64::from(superblock.shards));
        let region = check_region(device.file(), &superblock, shard, device.table());
        println!("  shard {shard}: {region}");
        print_some(&region.errors);
        wrong += region.errors.len();
    }
    wrong
}

/// What was found in a shard's region.
#[derive(Debug, Default)]
struct Region {
    records: usize,
    blocks: u64,
    dirty_blocks: u64,
    clean_blocks: u64,
    torn: u64,
    errors: Vec<String>,
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} entries, {} of blocks compared ({} written, {} fetched), {} torn records dropped, \
             {} errors",
            self.records,
            Size(bytes(self.blocks)),
            Size(bytes(self.dirty_blocks)),
            Size(bytes(self.clean_blocks)),
            self.torn,
            self.errors.len()
        )
    }
}

fn check_region<F: BlockFile>(
    file: &F,
    superblock: &Superblock,
    shard: u16,
    table: &VolumeTable,
) -> Region {
    let first = superblock.region_page(shard);
    let layout = RegionLayout {
        region: superblock.region_id(shard),
        segment_pages: superblock.segment_pages,
        segments: superblock.segments,
    };
    let recovered = recover(file, layout, first);
    let mut region =
        Region { records: recovered.entries.len(), torn: recovered.torn, ..Region::default() };
    if recovered.damaged > 0 {
        region.errors.push(format!("{} damaged headers of durable records", recovered.damaged));
    }
    if recovered.unreadable > 0 {
        region.errors.push(format!("{} segments cannot be read", recovered.unreadable));
    }
    let mut entries: Vec<&LogEntry> =
        recovered.entries.iter().filter(|entry| entry.at.entry.pages() > 0).collect();
    entries.sort_by_key(|entry| entry.at.page);
    let pages = superblock.segment_pages;
    for entries in entries.chunk_by(|a, b| a.at.page / pages == b.at.page / pages) {
        let start = entries[0].at.page / pages * pages;
        match read(file, first, start, pages) {
            Ok(segment) => {
                for entry in entries {
                    check_entry(&mut region, entry, &recovered.crcs, (start, &segment), table);
                }
            }
            Err(e) => region.errors.push(format!("the segment at page {start}: {e}")),
        }
    }
    region
}

/// The recovery that a start would do, without writing.
fn recover<F: BlockFile>(file: &F, layout: RegionLayout, first: u64) -> Recovered {
    let mut recovery = Recovery::new(layout, crc32c);
    loop {
        match recovery.need() {
            Need::Read { at, count } => match read(file, first, at, count) {
                Ok(bytes) => recovery.handle_read(Some(&bytes)),
                Err(_) => recovery.handle_read(None),
            },
            Need::Write { .. } => recovery.handle_written(),
            Need::Done => return recovery.finish(),
        }
    }
}

fn read<F: BlockFile>(file: &F, first: u64, at: u32, count: u32) -> Result<AlignedBuf, IoError> {
    let mut buffer = AlignedBuf::zeroed(count as usize);
    file.read_at(bytes(first + u64::from(at)), &mut buffer)?;
    Ok(buffer)
}

fn check_entry(
    region: &mut Region,
    entry: &LogEntry,
    crcs: &[u32],
    (start, segment): (u32, &[u8]),
    table: &VolumeTable,
) {
    let at = &entry.at.entry;
    for index in 0..at.pages() {
        let page = entry.at.page + index;
        let from = (page - start) as usize * BLOCK_BYTES;
        region.blocks += 1;
        match at.kind {
            EntryKind::Clean => region.clean_blocks += 1,
            _ => region.dirty_blocks += 1,
        }
        if crc32c(0, &segment[from..from + BLOCK_BYTES]) == crcs[(entry.crc + index) as usize] {
            continue;
        }
        let row = table.rows.iter().find(|row| row.number == at.volume);
        let volume = row.map_or("a volume that is gone".into(), |row| Uuid(row.uuid).to_string());
        let fate = match at.kind {
            EntryKind::Clean => "fetched data: it will be fetched again",
            _ => "written data: lost, unless it was pushed or overwritten since",
        };
        region.errors.push(format!(
            "page {page}: block {} of object {} of {volume} does not match its checksum ({fate})",
            u32::from(at.first) + index,
            at.object
        ));
    }
}
