//! `heeler volume import`.

use std::sync::Arc;
use std::time::Instant;

use heeler_core::event::Mode;

use super::copy::{self, Copy};
use super::disk::Disk;
use super::extents::Extent;
use super::image::Image;
use super::nbd::Client;
use super::note::{Job, Note, Progress};
use super::place::Place;
use super::{Site, delta};
use crate::api::{Request, VolumeInfo};
use crate::cli::ImportArgs;
use crate::client::{Bar, Server};
use crate::commands::{push, run};
use crate::settings::Common;
use crate::size::Size;

/// The unit of volume sizes.
const BLOCK_BYTES: u64 = 4096;

/// Copies a disk into a volume.
pub(crate) fn import(common: Common<'_>, args: &ImportArgs) -> Result<(), String> {
    if let Place::File(path) = &args.source
        && delta::is_delta(path)
    {
        return super::apply::apply(common, args, path);
    }
    run(async {
        let (source, version) = open_source(args).await?;
        // Before anything is made: a damaged image is found by it.
        let extents = source.extents().await?;
        let mut site = Site::find(common)?;
        let size = volume_size(args, source.size())?;
        let anew = prepare(&mut site, args, size)?;
        let name = &args.name;
        let target = open_target(&mut site, name, size).await?;
        let note = site.note("import", name)?;
        let job = Job {
            from: source_name(args, &source),
            from_bytes: source.size(),
            from_version: version,
            to: format!("volume {name} {}", target.uuid),
        };
        let progress = match anew {
            Some(blank) => Progress { blank, done_bytes: 0 },
            None => note.resume(&job).map_err(|e| format!("{name}: {e}"))?,
        };
        note.save(&job, progress)?;
        let copy = Copy {
            from: &source,
            extents: &extents,
            to: &target.disk,
            blank: progress.blank,
            done_bytes: progress.done_bytes,
        };
        transfer(&mut site.server, args, &copy, &note, &job).await.map_err(|e| {
            format!("{e}\nheeler: {name} is not whole: go on with --resume when that is put right")
        })?;
        note.remove()
    })?
}

/// What is read, and what changes whenever it does.
async fn open_source(args: &ImportArgs) -> Result<(Disk, String), String> {
    match &args.source {
        Place::File(path) => {
            let image = Image::open(path, args.format)?;
            let version = image.version().to_string();
            Ok((Disk::Image(Arc::new(image)), version))
        }
        Place::Nbd(url) => Ok((Disk::Nbd(Client::connect(url).await?), String::new())),
        Place::Stdout => Err("standard input cannot be imported: it does not say its size, and \
                              cannot be read twice"
            .into()),
    }
}

fn source_name(args: &ImportArgs, source: &Disk) -> String {
    match source {
        Disk::Image(image) => image.path().display().to_string(),
        Disk::Nbd(_) => args.source.to_string(),
    }
}

/// Bytes of the volume.
fn volume_size(args: &ImportArgs, source: u64) -> Result<u64, String> {
    let asked = args.size.map_or(source, |size| size.0);
    if asked < source {
        return Err(format!(
            "--size {} is less than the {source} bytes of {}",
            Size(asked),
            args.source
        ));
    }
    let size = asked.checked_next_multiple_of(BLOCK_BYTES);
    let size = size.ok_or_else(|| format!("{asked} bytes are more than a volume can have"))?;
    if size != asked {
        println!("{asked} bytes are no multiple of {BLOCK_BYTES}: the volume has {size}");
    }
    Ok(size)
}

/// Makes the volume, or sees that it is there. Returns whether it is all zeroes, or `None` if a
/// note says so.
fn prepare(site: &mut Site, args: &ImportArgs, size: u64) -> Result<Option<bool>, String> {
    let name = &args.name;
    match (site.volume(name), args.force, args.resume) {
        (None, _, false) => {
            site.server.ask::<()>(&Request::VolumeCreate {
                name: name.clone(),
                size_bytes: size,
                object_bytes: args.object_size.0,
                buffered_read: true,
                buffered_write: true,
                mode: Mode::default(),
            })?;
            Ok(Some(true))
        }
        (None, _, true) => Err(format!("there is no volume '{name}' whose import could go on")),
        (Some(_), false, false) => Err(format!(
            "volume '{name}' is there: go on with an import that was interrupted with --resume, or \
             overwrite it with --force"
        )),
        (Some(volume), ..) if volume.size_bytes < size => Err(format!(
            "volume '{name}' is too small: it has {} bytes, and {} has {size}",
            volume.size_bytes, args.source
        )),
        (Some(_), force, _) => Ok(force.then_some(false)),
    }
}

/// The volume, opened.
struct Target {
    disk: Disk,
    uuid: String,
}

async fn open_target(site: &mut Site, name: &str, size: u64) -> Result<Target, String> {
    let client = site.open(name).await?;
    if client.is_read_only() {
        return Err(format!("volume '{name}' is read-only"));
    }
    if client.size() < size {
        return Err(format!("volume '{name}' is too small: {} bytes", client.size()));
    }
    let info: VolumeInfo = site.server.ask(&Request::VolumeInfo { name: name.into() })?;
    Ok(Target { disk: Disk::Nbd(client), uuid: info.line.uuid })
}

async fn transfer(
    server: &mut Server,
    args: &ImportArgs,
    copy: &Copy<'_>,
    note: &Note,
    job: &Job,
) -> Result<(), String> {
    let begin = Instant::now();
    let Copy { from: source, to: target, blank, done_bytes, .. } = *copy;
    let bar = Bar::new("importing");
    let written =
        copy.run(&bar, |done_bytes| note.save(job, Progress { blank, done_bytes })).await?;
    drop(bar);
    if let Disk::Image(image) = source {
        image.check_unchanged()?;
    }
    // What lies behind the end of the source, if the volume was there before.
    if !blank {
        let tail = Extent { at: source.size(), len: target.size() - source.size() };
        target.zero(tail).await?;
    }
    target.flush().await?;
    push(server, &Request::VolumePush { name: args.name.clone() })?;
    if args.verify {
        let bar = Bar::new("verifying");
        copy::compare(source, target, &bar)
            .await
            .map_err(|e| format!("{} is not as {}: {e}", args.name, args.source))?;
    }
    let skipped = source.size() - done_bytes - written;
    println!(
        "imported {} into volume {} in {:.1} s: {} copied, {} zeroes skipped{}{}",
        args.source,
        args.name,
        begin.elapsed().as_secs_f64(),
        Size(written),
        Size(skipped),
        if done_bytes > 0 { format!(", {} done before", Size(done_bytes)) } else { String::new() },
        if args.verify { ", verified" } else { "" },
    );
    Ok(())
}
