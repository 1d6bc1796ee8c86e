//! `heeler snapshot ...`, `heeler clone ...` and `heeler volume tree`.

use heeler_core::keeper::Edit;
use heeler_store::snapshots::{self, SnapshotName};
use heeler_store::volumes;

use super::{Target, print, run};
use crate::api::{Request, SnapshotLine, TreeNode};
use crate::cli::StoreArgs;
use crate::cli::snapshot::{CloneArgs, SnapshotCommand};
use crate::client::{Bar, Server};
use crate::server::unix_secs;
use crate::settings::Common;
use crate::snapshot;

/// `heeler snapshot ...`.
pub(crate) fn snapshot(common: Common<'_>, command: &SnapshotCommand) -> Result<(), String> {
    match command {
        SnapshotCommand::Create { name, store } => create(common, name, store),
        SnapshotCommand::List { volume, json, store } => {
            let lines: Vec<SnapshotLine> = match Target::find(common, store, false)? {
                Target::Server(mut server) => {
                    server.ask(&Request::SnapshotList { volume: volume.clone() })?
                }
                Target::Store(store) => {
                    run(snapshot::list(&store, volume))?.map_err(|e| e.to_string())?
                }
            };
            print(*json, &lines, |lines| snapshot::show_list(volume, lines));
            Ok(())
        }
        SnapshotCommand::Delete { name, store } => delete(common, name, store),
        SnapshotCommand::Rollback { name, force, store } => rollback(common, name, *force, store),
        SnapshotCommand::Serve { name, stop } => {
            let mut server = Server::connect(&common.data()?)?;
            let request = Request::SnapshotServe { name: name.to_string(), stop: *stop };
            server.ask::<()>(&request)?;
            println!("{name} is {}", if *stop { "served no more" } else { "served, read-only" });
            Ok(())
        }
    }
}

fn create(common: Common<'_>, name: &SnapshotName, store: &StoreArgs) -> Result<(), String> {
    match Target::find(common, store, false)? {
        Target::Server(mut server) => {
            server.ask::<()>(&Request::SnapshotCreate { name: name.to_string() })?;
        }
        Target::Store(store) => {
            let edit = Edit::Snapshot(name.snapshot.clone());
            let made = run(snapshots::edit(&store, &name.volume, unix_secs(), &edit))?;
            made.map_err(snapshot::explain)?;
        }
    }
    println!("made snapshot {name}");
    Ok(())
}

fn delete(common: Common<'_>, name: &SnapshotName, store: &StoreArgs) -> Result<(), String> {
    match Target::find(common, store, false)? {
        Target::Server(mut server) => {
            server.ask::<()>(&Request::SnapshotDelete { name: name.to_string() })?;
        }
        Target::Store(store) => {
            let now = unix_secs();
            let edit = async |edit| snapshots::edit(&store, &name.volume, now, &edit).await;
            let deleted = run(snapshots::delete(&store, name, now, edit))?;
            deleted.map_err(snapshot::explain)?;
        }
    }
    println!("deleted snapshot {name}");
    Ok(())
}

fn rollback(
    common: Common<'_>,
    name: &SnapshotName,
    force: bool,
    store: &StoreArgs,
) -> Result<(), String> {
    match Target::find(common, store, false)? {
        Target::Server(mut server) => {
            let bar = Bar::new("pushing");
            let request = Request::SnapshotRollback { name: name.to_string(), force };
            server.ask_with::<()>(&request, &mut |done, total| bar.set(done, total))?;
        }
        Target::Store(store) => {
            let done = run(snapshots::rollback(&store, name, unix_secs()))?;
            done.map_err(snapshot::explain)?;
        }
    }
    println!("volume {} is what it was at {name}", name.volume);
    Ok(())
}

/// `heeler clone ...`.
pub(crate) fn clone(common: Common<'_>, args: &CloneArgs) -> Result<(), String> {
    let CloneArgs { from, name, store } = args;
    match Target::find(common, store, false)? {
        Target::Server(mut server) => {
            let request = Request::Clone { from: from.to_string(), name: name.clone() };
            server.ask::<()>(&request)?;
        }
        Target::Store(store) => {
            let made = run(snapshots::clone(&store, from, name, unix_secs()))?;
            made.map_err(snapshot::explain)?;
        }
    }
    println!("made volume {name}, a clone of {from}");
    Ok(())
}

/// `heeler volume flatten`.
pub(crate) fn flatten(common: Common<'_>, name: &str) -> Result<(), String> {
    let mut server = Server::connect(&common.data()?)?;
    let bar = Bar::new("copying");
    let request = Request::VolumeFlatten { name: name.into() };
    server.ask_with::<()>(&request, &mut |done, total| bar.set(done, total))?;
    println!("{name} needs its parent no more");
    Ok(())
}

/// `heeler volume tree`.
pub(crate) fn tree(common: Common<'_>, json: bool, store: &StoreArgs) -> Result<(), String> {
    let tree: Vec<TreeNode> = match Target::find(common, store, false)? {
        Target::Server(mut server) => server.ask(&Request::VolumeTree)?,
        Target::Store(store) => {
            snapshot::tree(&run(volumes::list(&store))?.map_err(|e| e.to_string())?)
        }
    };
    print(json, &tree, |tree| snapshot::show_tree(tree));
    Ok(())
}
