//! `heeler volume import` of a delta: brings a volume from one snapshot to the next.
//!
//! The volume says that it is half imported (by a tag) from before the first change until the new
//! snapshot is there. What was interrupted starts over from the base, to which the volume is taken
//! back then.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};

use super::Site;
use super::delta::{self, Piece, Reader};
use super::nbd::Client;
use crate::api::{Order, Request, SnapshotLine, Status, VolumeInfo};
use crate::cli::ImportArgs;
use crate::client::Bar;
use crate::commands::run;
use crate::setting::Setting;
use crate::settings::Common;
use crate::size::Size;

/// Says that a volume is neither what it was nor what it is to be.
const TAG: &str = "half-imported";
/// Changes under way at the same time at most.
const WRITES_MAX: usize = 8;
/// A client that says goodbye may be seen for so long.
const PARTING: Duration = Duration::from_millis(200);
/// Bytes of a block.
const BLOCK_BYTES: u64 = 4096;

/// Applies a delta to a volume.
pub(super) fn apply(common: Common<'_>, args: &ImportArgs, path: &Path) -> Result<(), String> {
    if args.size.is_some() || args.verify || args.format.is_some() {
        return Err("--size, --format and --verify are for disks; this is a delta".into());
    }
    run(async {
        let begin = Instant::now();
        // Before anything is changed: all of it is there.
        let total = check(path)?;
        let mut site = Site::find(common)?;
        let name = &args.name;
        let reader = Reader::open(path)?;
        let to = reader.header.to.name.clone();
        let set = |change| Request::VolumeSet { name: name.clone(), settings: vec![change] };
        if prepare(&mut site, args, &reader)? {
            site.server.ask::<()>(&set(Setting::AddTag(TAG.into())))?;
            let applied = async {
                let bytes = reader.header.blocks * BLOCK_BYTES;
                let order = Order::Resize { size_bytes: bytes, force: true };
                let resize = Request::VolumeManage { name: name.clone(), order };
                site.server.ask::<()>(&resize)?;
                let client = site.open(name).await?;
                copy(reader, &client, total).await?;
                client.flush().await?;
                drop(client);
                site.server.ask::<()>(&Request::SnapshotCreate { name: format!("{name}@{to}") })
            };
            applied.await.map_err(|e| {
                format!(
                    "{e}\nheeler: {name} is half imported, and tagged so: run the same command \
                     again when that is put right"
                )
            })?;
        }
        site.server.ask::<()>(&set(Setting::RemoveTag(TAG.into())))?;
        println!(
            "imported {} into volume {name} in {:.1} s: it is at {name}@{to} now, {} were changed",
            path.display(),
            begin.elapsed().as_secs_f64(),
            Size(total),
        );
        Ok(())
    })?
}

/// Reads all of a delta; returns how much it changes.
fn check(path: &Path) -> Result<u64, String> {
    let mut reader = Reader::open(path)?;
    let mut total = 0;
    while let Some(piece) = reader.next()? {
        total += match piece {
            Piece::Data(_, data) => data.len() as u64,
            Piece::Zeroes(_, len) => len,
        };
    }
    Ok(total)
}

/// Sees that the volume is what the delta builds on, or makes it so. False: it is what the delta
/// makes of it already.
fn prepare(site: &mut Site, args: &ImportArgs, reader: &Reader) -> Result<bool, String> {
    let (name, header) = (&args.name, &reader.header);
    let (base, to) = (&header.base.name, &header.to.name);
    let info: VolumeInfo = site.server.ask(&Request::VolumeInfo { name: name.clone() })?;
    if info.line.read_only {
        return Err(format!(
            "volume '{name}' is read-only: `heeler volume set {name} read-only=no`"
        ));
    }
    let half = info.line.tags.iter().any(|tag| tag == TAG);
    let known: Vec<SnapshotLine> =
        site.server.ask(&Request::SnapshotList { volume: name.clone() })?;
    let find = |name: &str| known.iter().find(|snapshot| snapshot.name == name);
    match find(to) {
        Some(_) if half => return Ok(false),
        Some(_) => {
            return Err(format!("volume '{name}' has a snapshot '{to}' already: nothing to do"));
        }
        None => {}
    }
    let own = info.line.uuid == header.volume.to_string();
    match find(base) {
        Some(snapshot) if !own || snapshot.head == header.base.number => {}
        Some(_) => {
            return Err(format!(
                "the delta builds on an earlier '{name}@{base}' than the one that is there"
            ));
        }
        None => {
            return Err(format!(
                "volume '{name}' has no snapshot '{base}', on which the delta builds: import the \
                 delta that leads to it first, or a full copy, and make the snapshot"
            ));
        }
    }
    if !args.force {
        refuse_with_clients(site, name)?;
    }
    crate::commands::push(&mut site.server, &Request::VolumePush { name: name.clone() })?;
    let changed = delta::changes(&mut site.server, name, base, None)?;
    let same = changed.changes.is_empty() && changed.from_blocks == changed.to_blocks;
    if same {
        return Ok(true);
    }
    if !half && !args.force {
        return Err(format!(
            "volume '{name}' was written to since '{name}@{base}', on which the delta builds: give \
             that up with --force"
        ));
    }
    let back = Request::SnapshotRollback { name: format!("{name}@{base}"), force: args.force };
    site.server.ask::<()>(&back)?;
    Ok(true)
}

/// An error if clients are connected, apart from those that have just said goodbye.
fn refuse_with_clients(site: &mut Site, name: &str) -> Result<(), String> {
    for last in [false, false, false, false, true] {
        let status: Status = site.server.ask(&Request::Status)?;
        let connections: u64 = status.cores.iter().map(|core| core.connections).sum();
        if connections == 0 {
            break;
        }
        if last {
            return Err(format!(
                "{connections} clients are connected to this server, maybe to '{name}': disconnect \
                 them, or use --force"
            ));
        }
        thread::sleep(PARTING);
    }
    Ok(())
}

async fn copy(mut reader: Reader, client: &Client, total: u64) -> Result<(), String> {
    let bar = Bar::new("importing");
    let mut done = 0;
    let pieces = std::iter::from_fn(move || reader.next().transpose());
    let mut written = stream::iter(pieces)
        .map(async |piece| match piece? {
            Piece::Data(at, data) => {
                let len = data.len() as u64;
                client.write(at, data).await.map(|()| len)
            }
            Piece::Zeroes(at, len) => client.zero(at, len).await.map(|()| len),
        })
        .buffer_unordered(WRITES_MAX);
    while let Some(len) = written.next().await {
        done += len?;
        bar.set(done, total);
    }
    Ok(())
}
