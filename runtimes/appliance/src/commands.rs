//! The commands beside `serve` and `check`. They ask the running server; what concerns only the
//! store is done without one too.

mod admin;
mod handover;
pub(crate) mod snapshot;

use std::io::{self, Write};

use serde::Serialize;

use crate::api::{
    CacheReport, Deleted, Purged, Request, Resized, Scrubbed, Status, VolumeInfo, VolumeLine,
};
use crate::cli::{CacheCommand, StoreArgs, VolumeCommand};
use crate::client::{Bar, Server};
use crate::lines;
use crate::server::{new_volume, set_stored, unix_secs};
use crate::setting::Setting;
use crate::settings::Common;
use crate::show;
use crate::size::Size;
use crate::transfer;
use heeler_core::event::Buffering;
use heeler_core::wire::head::Settings;
use heeler_store::{Fencing, Place, Store, Unusable, format, volumes};

/// `heeler status`.
pub(crate) fn status(common: Common<'_>, json: bool) -> Result<(), String> {
    let status: Status = Server::connect(&common.data()?)?.ask(&Request::Status)?;
    print(json, &status, show::status);
    Ok(())
}

/// `heeler cache ...`.
pub(crate) fn cache(common: Common<'_>, command: &CacheCommand) -> Result<(), String> {
    let mut server = Server::connect(&common.data()?)?;
    match command {
        CacheCommand::Info { json, volume, shard } => {
            let request = Request::CacheInfo { volume: volume.clone(), shard: *shard };
            let report: CacheReport = server.ask(&request)?;
            print(*json, &report, |report| match volume {
                Some(_) => show::volume_windows(&report.by_volume),
                None => show::report(report),
            });
        }
        CacheCommand::Resize { memory } => {
            let request = Request::CacheResize { memory: *memory };
            let bar = Bar::new("resizing");
            let resized: Resized =
                server.ask_with(&request, &mut |done, total| bar.set(done, total))?;
            drop(bar);
            println!(
                "memory was {}, is {}; the server takes {}",
                Size(resized.old_bytes),
                Size(resized.new_bytes),
                Size(resized.resident_bytes)
            );
        }
        CacheCommand::Flush => {
            push(&mut server, &Request::CacheFlush)?;
            println!("everything that was dirty is in the store");
        }
        CacheCommand::Policy { policy } => {
            let policy = policy.name().to_string();
            server.ask::<()>(&Request::CachePolicy { policy: policy.clone() })?;
            println!("data leaves RAM by {policy} from now on");
        }
        CacheCommand::Purge { force } => {
            let purged: Purged = server.ask(&Request::CachePurge { force: *force })?;
            println!(
                "dropped {} bytes of clean and {} bytes of dirty data",
                purged.clean_bytes, purged.dirty_bytes
            );
        }
    }
    Ok(())
}

/// `heeler volume ...`.
pub(crate) fn volume(common: Common<'_>, command: &VolumeCommand) -> Result<(), String> {
    match command {
        VolumeCommand::Create {
            name,
            size,
            object_size,
            mode,
            buffered_read,
            buffered_write,
            store,
        } => {
            let buffering =
                Buffering { reads: (*buffered_read).into(), writes: (*buffered_write).into() };
            let settings = Settings { mode: *mode, buffering, ..Settings::default() };
            create(common, name, (*size, *object_size), settings, store)?;
        }
        VolumeCommand::List { json, long, tag, store } => {
            let mut lines: Vec<VolumeLine> = match Target::find(common, store, false)? {
                Target::Server(mut server) => server.ask(&Request::VolumeList)?,
                Target::Store(store) => {
                    let listed = run(volumes::list(&store))?.map_err(|e| e.to_string())?;
                    listed.iter().map(lines::of_listed).collect()
                }
            };
            lines.retain(|line| tag.as_ref().is_none_or(|tag| line.tags.contains(tag)));
            print(*json, &lines, |lines| show::volumes(lines, *long));
        }
        VolumeCommand::Flatten { name } => snapshot::flatten(common, name)?,
        VolumeCommand::Tree { json, store } => snapshot::tree(common, *json, store)?,
        VolumeCommand::Info { name, json, store } => {
            let info: VolumeInfo = match Target::find(common, store, false)? {
                Target::Server(mut server) => {
                    server.ask(&Request::VolumeInfo { name: name.clone() })?
                }
                Target::Store(store) => {
                    let info = run(volumes::info(&store, name))?.map_err(|e| e.to_string())?;
                    lines::of_info(name, &info)
                }
            };
            print(*json, &info, show::volume);
        }
        VolumeCommand::Delete { name, force, store } => delete(common, name, *force, store)?,
        VolumeCommand::Set { name, settings, store } => set(common, name, settings, store)?,
        VolumeCommand::Read(args) => transfer::read(common, args)?,
        VolumeCommand::Write(args) => transfer::write(common, args)?,
        VolumeCommand::Object(args) => admin::object(common, args)?,
        VolumeCommand::Rename(args) => admin::rename(common, args)?,
        VolumeCommand::Resize(args) => admin::resize(common, args)?,
        VolumeCommand::Import(args) => transfer::import(common, args)?,
        VolumeCommand::Export(args) => transfer::export(common, args)?,
        VolumeCommand::Scrub { name } => scrub(&mut Server::connect(&common.data()?)?, name)?,
        VolumeCommand::Attach { name, takeover } => handover::attach(common, name, *takeover)?,
        VolumeCommand::Detach { name, cancel } => handover::detach(common, name, *cancel)?,
        VolumeCommand::Salvage { name, file } => handover::salvage(common, name, file)?,
        VolumeCommand::Forget { name, force } => handover::forget(common, name, *force)?,
        VolumeCommand::Push { name } => push_volume(&mut Server::connect(&common.data()?)?, name)?,
    }
    Ok(())
}

fn create(
    common: Common<'_>,
    name: &str,
    (size, object_size): (Size, Size),
    settings: Settings,
    store: &StoreArgs,
) -> Result<(), String> {
    match Target::find(common, store, true)? {
        Target::Server(mut server) => server.ask(&Request::VolumeCreate {
            name: name.into(),
            size_bytes: size.0,
            object_bytes: object_size.0,
            mode: settings.mode,
            buffered_read: settings.buffering.reads,
            buffered_write: settings.buffering.writes,
        })?,
        Target::Store(store) => {
            let new = new_volume(name, size.0, object_size.0, settings)?;
            run(volumes::create(&store, &new))?.map_err(|e| e.to_string())?;
        }
    }
    println!("made volume {name} of {size}");
    Ok(())
}

fn delete(common: Common<'_>, name: &str, force: bool, store: &StoreArgs) -> Result<(), String> {
    let deleted: Deleted = match Target::find(common, store, false)? {
        Target::Server(mut server) => {
            server.ask(&Request::VolumeDelete { name: name.into(), force })?
        }
        Target::Store(store) => {
            let deleted = run(volumes::delete(&store, name, force, unix_secs()))?;
            let deleted = deleted.map_err(|e| e.to_string())?;
            Deleted { objects: deleted.objects, bytes: deleted.bytes }
        }
    };
    println!("deleted volume {name}: {} objects of {}", deleted.objects, Size(deleted.bytes));
    Ok(())
}

fn set(
    common: Common<'_>,
    name: &str,
    settings: &[Setting],
    store: &StoreArgs,
) -> Result<(), String> {
    match Target::find(common, store, false)? {
        Target::Server(mut server) => {
            server.ask(&Request::VolumeSet { name: name.into(), settings: settings.into() })?
        }
        Target::Store(store) => run(set_stored(&store, name, settings))??,
    }
    println!("volume {name} is set");
    Ok(())
}

fn scrub(server: &mut Server, name: &str) -> Result<(), String> {
    let bar = Bar::new("scrubbing");
    let request = Request::VolumeScrub { name: name.into() };
    let found: Scrubbed = server.ask_with(&request, &mut |done, total| bar.set(done, total))?;
    drop(bar);
    println!(
        "checked {} of {name}: {} blocks damaged, {} repaired",
        Size(found.checked_bytes),
        found.damaged_blocks,
        found.repaired_blocks
    );
    if found.damaged_blocks > found.repaired_blocks {
        return Err("some damaged blocks had not been pushed, or could not be fetched: the \
                    server's log names them"
            .into());
    }
    Ok(())
}

/// Who does what concerns only the store.
enum Target {
    Server(Server),
    Store(Store),
}

impl Target {
    /// The server, if one runs, unless another store than its own was named.
    fn find(common: Common<'_>, args: &StoreArgs, create: bool) -> Result<Self, String> {
        let place = common.place(None, args)?;
        if let Some(mut server) = Server::find(&place.data)?
            && (args.store.is_none() || server.ask::<String>(&Request::Store)? == place.store_url)
        {
            return Ok(Self::Server(Server::connect(&place.data)?));
        }
        match &place.store.place {
            Place::Memory => {
                return Err("the memory store lives only in a server; start one first".into());
            }
            Place::Directory(path) if !create && !path.exists() => {
                return Err(format!(
                    "there is no store at {}; name it with --store, or the data directory with \
                     --data",
                    path.display()
                ));
            }
            _ => {}
        }
        let store = Store::open(place.store).map_err(|e| e.to_string())?;
        let usable = async {
            // A store with the mark was proven fit when it was made.
            if !format::check(&store).await? && create {
                let _: Fencing = format::prepare(&store).await?;
            }
            Ok::<_, Unusable>(())
        };
        run(usable)?.map_err(|e| e.to_string())?;
        Ok(Self::Store(store))
    }
}

fn push_volume(server: &mut Server, name: &str) -> Result<(), String> {
    push(server, &Request::VolumePush { name: name.into() })?;
    println!("everything that was dirty in {name} is in the store");
    Ok(())
}

pub(crate) fn push(server: &mut Server, request: &Request) -> Result<(), String> {
    let bar = Bar::new("pushing");
    server.ask_with(request, &mut |done, total| bar.set(done, total))
}

fn print<T: Serialize>(json: bool, value: &T, show: impl Fn(&T) -> String) {
    let text = if json {
        serde_json::to_string_pretty(value).expect("answers are plain data") + "\n"
    } else {
        show(value)
    };
    // Whoever reads may have read enough.
    let _ = io::stdout().write_all(text.as_bytes());
}

pub(crate) fn run<T>(work: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(|e| format!("the runtime: {e}"))?.block_on(work))
}
