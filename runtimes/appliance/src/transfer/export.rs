//! `heeler volume export`.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::copy::{self, Copy};
use super::disk::Disk;
use super::extents::Extents;
use super::image::Image;
use super::nbd::Client;
use super::note::{Job, Note, Progress};
use super::place::{Format, NbdUrl, Place};
use super::{Site, beside};
use crate::api::{Request, VolumeInfo};
use crate::cli::ExportArgs;
use crate::client::Bar;
use crate::commands::{push, run};
use crate::settings::Common;
use crate::size::Size;

/// Copies a volume to a file or an NBD export.
pub(crate) fn export(common: Common<'_>, args: &ExportArgs) -> Result<(), String> {
    if let Some(from) = &args.from {
        return super::delta::export(common, args, from);
    }
    run(async {
        let mut site = Site::find(common)?;
        let (client, served) = site.open_any(&args.name).await?;
        let exported = copy_all(&mut site, args, client).await;
        site.close_any(&args.name, served).and(exported)
    })?
}

async fn copy_all(site: &mut Site, args: &ExportArgs, client: Client) -> Result<(), String> {
    let version = settle(site, &args.name)?;
    let source = Source { name: &args.name, disk: Disk::Nbd(client), version };
    let begin = Instant::now();
    let copied = match &args.target {
        Place::Stdout => to_stdout(args, &source).await?,
        Place::File(path) => to_file(args, path, &source).await?,
        Place::Nbd(url) => {
            let note = site.note("export", &args.name)?;
            to_nbd(args, url, &source, &note).await?
        }
    };
    let before = match copied.before {
        0 => String::new(),
        before => format!(", {} done before", Size(before)),
    };
    // Standard output may have the disk.
    eprintln!(
        "exported {} to {} in {:.1} s: {} copied, {} zeroes skipped{before}",
        args.name,
        args.target,
        begin.elapsed().as_secs_f64(),
        Size(copied.written),
        Size(source.disk.size() - copied.before - copied.written),
    );
    if source.version.is_none() || version_of(site, &args.name)? != source.version {
        eprintln!(
            "heeler: {} may have been written to meanwhile: then the copy is of no single \
                 moment",
            args.name
        );
    }
    Ok(())
}

/// What is exported.
struct Source<'a> {
    name: &'a str,
    disk: Disk,
    /// Changes whenever the volume does; `None` if that cannot be known.
    version: Option<String>,
}

impl Source<'_> {
    fn job(&self, to: String) -> Job {
        Job {
            from: format!("volume {}", self.name),
            from_bytes: self.disk.size(),
            from_version: self.version.clone().unwrap_or_default(),
            to,
        }
    }

    /// Copies everything, and says how a failure can be mended.
    async fn copy(
        &self,
        extents: &Extents,
        to: &Disk,
        progress: Progress,
        note: &Note,
        job: &Job,
    ) -> Result<Copied, String> {
        let Progress { blank, done_bytes } = progress;
        // What may change meanwhile cannot be gone on with.
        let save = |done_bytes| match &self.version {
            Some(_) => note.save(job, Progress { blank, done_bytes }),
            None => Ok(()),
        };
        save(done_bytes)?;
        let bar = Bar::new("exporting");
        let copy = Copy { from: &self.disk, extents, to, blank, done_bytes };
        let done = async {
            let written = copy.run(&bar, save).await?;
            to.flush().await?;
            Ok(written)
        };
        let written = done.await.map_err(|e: String| match &self.version {
            Some(_) => format!(
                "{e}\nheeler: the copy of {} is not whole: go on with --resume when that is put \
                 right",
                self.name
            ),
            None => e,
        })?;
        Ok(Copied { written, before: done_bytes })
    }
}

/// What was done.
struct Copied {
    written: u64,
    before: u64,
}

/// Pushes what is dirty, so that it can be known later whether the volume has changed.
fn settle(site: &mut Site, name: &str) -> Result<Option<String>, String> {
    if is_snapshot(name) {
        return version_of(site, name);
    }
    let info: VolumeInfo = site.server.ask(&Request::VolumeInfo { name: name.into() })?;
    let dirty = info.line.dirty_bytes.is_some_and(|dirty| dirty > 0);
    // Without a store the volume is exported all the same.
    if dirty && info.line.push.is_some_and(|push| push.retrying == 0) {
        push(&mut site.server, &Request::VolumePush { name: name.into() })?;
    }
    version_of(site, name)
}

fn version_of(site: &mut Site, name: &str) -> Result<Option<String>, String> {
    if is_snapshot(name) {
        return Ok(Some(String::new()));
    }
    let info: VolumeInfo = site.server.ask(&Request::VolumeInfo { name: name.into() })?;
    let clean = info.line.dirty_bytes == Some(0);
    Ok(clean.then(|| format!("{} epoch {}", info.line.uuid, info.line.epoch)))
}

fn is_snapshot(name: &str) -> bool {
    name.contains('@')
}

async fn to_stdout(args: &ExportArgs, source: &Source<'_>) -> Result<Copied, String> {
    only_raw(args)?;
    if args.resume {
        return Err("an export to standard output cannot be gone on with".into());
    }
    let bar = Bar::new("exporting");
    let written = copy::stream(&source.disk, &mut io::stdout().lock(), &bar).await?;
    Ok(Copied { written, before: 0 })
}

pub(super) fn only_raw(args: &ExportArgs) -> Result<(), String> {
    match args.format {
        Some(Format::Qcow2) => {
            Err(format!("{} takes the disk's bytes only: leave out --format", args.target))
        }
        _ => Ok(()),
    }
}

async fn to_file(args: &ExportArgs, path: &Path, source: &Source<'_>) -> Result<Copied, String> {
    let failed = |e: io::Error| format!("{}: {e}", path.display());
    let format = args.format.unwrap_or_else(|| Format::of_name(path));
    let (partial, size) = (beside(path, "partial"), source.disk.size());
    check_file(args, path, &partial)?;
    let note = Note::new(beside(path, "partial.json"));
    let to = std::path::absolute(path).map_err(failed)?;
    let job = source.job(format!("{} as {format:?}", to.display()));
    let (progress, image) = if args.resume {
        let progress = resume(source, &note, &job)?;
        (progress, Image::reopen(&partial, format, size)?)
    } else {
        note.remove()?;
        (Progress { blank: true, done_bytes: 0 }, Image::create(&partial, format, size)?)
    };
    let target = Disk::Image(Arc::new(image));
    let extents = source.disk.extents().await?;
    let copied = source.copy(&extents, &target, progress, &note, &job).await?;
    drop(target);
    fs::rename(&partial, path).map_err(failed)?;
    let folder = to.parent().map_or_else(|| File::open("/"), File::open);
    folder.and_then(|folder| folder.sync_all()).map_err(failed)?;
    note.remove()?;
    Ok(copied)
}

pub(super) fn check_file(args: &ExportArgs, path: &Path, partial: &Path) -> Result<(), String> {
    let shown = path.display();
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => {
            return Err(format!("{shown} is no file; export to - and redirect that"));
        }
        Ok(_) if !args.force && !args.resume => {
            return Err(format!("{shown} is there: replace it with --force"));
        }
        _ => {}
    }
    if partial.exists() && !args.force && !args.resume {
        return Err(format!(
            "{} is left of an export that was interrupted: go on with --resume, or start over with \
             --force",
            partial.display()
        ));
    }
    Ok(())
}

fn resume(source: &Source<'_>, note: &Note, job: &Job) -> Result<Progress, String> {
    if source.version.is_none() {
        return Err(format!(
            "{} is being written to: start over, with --force instead of --resume",
            source.name
        ));
    }
    note.resume(job).map_err(|e| format!("{}: {e}", source.name))
}

async fn to_nbd(
    args: &ExportArgs,
    url: &NbdUrl,
    source: &Source<'_>,
    note: &Note,
) -> Result<Copied, String> {
    only_raw(args)?;
    let client = Client::connect(url).await?;
    let size = source.disk.size();
    if client.is_read_only() {
        return Err(format!("{url} is read-only"));
    }
    if client.size() < size {
        return Err(format!(
            "{url} is too small: it has {} bytes, and {} has {size}",
            client.size(),
            source.name
        ));
    }
    let job = source.job(url.to_string());
    let progress = if args.resume {
        resume(source, note, &job)?
    } else {
        let blank = client.extents().await?.data_bytes(0) == 0;
        if !blank && !args.force {
            return Err(format!("{url} has data: overwrite it with --force"));
        }
        Progress { blank, done_bytes: 0 }
    };
    let extents = source.disk.extents().await?;
    let copied = source.copy(&extents, &Disk::Nbd(client), progress, note, &job).await?;
    note.remove()?;
    Ok(copied)
}
