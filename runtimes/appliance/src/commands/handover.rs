//! `heeler volume attach`, `detach`, `salvage` and `forget`.

use std::path::{self, Path};

use crate::api::{Purged, Request, Salvaged};
use crate::client::{Bar, Server};
use crate::settings::Common;
use crate::size::Size;

/// `heeler volume attach`.
pub(super) fn attach(common: Common<'_>, name: &str, takeover: bool) -> Result<(), String> {
    let mut server = Server::connect(&common.data()?)?;
    server.ask::<()>(&Request::VolumeAttach { name: name.into(), takeover })?;
    println!("volume {name} is served");
    Ok(())
}

/// `heeler volume detach`.
pub(super) fn detach(common: Common<'_>, name: &str, cancel: bool) -> Result<(), String> {
    let mut server = Server::connect(&common.data()?)?;
    if cancel {
        server.ask::<()>(&Request::VolumeStay { name: name.into() })?;
        println!("volume {name} stays");
        return Ok(());
    }
    let bar = Bar::new("pushing");
    let request = Request::VolumeDetach { name: name.into() };
    server.ask_with::<()>(&request, &mut |done, total| bar.set(done, total))?;
    drop(bar);
    println!("volume {name} is detached; everything is in the store");
    Ok(())
}

/// `heeler volume salvage`.
pub(super) fn salvage(common: Common<'_>, name: &str, file: &Path) -> Result<(), String> {
    let mut server = Server::connect(&common.data()?)?;
    // The server has a directory of its own.
    let path = path::absolute(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let request = Request::VolumeSalvage { name: name.into(), path: path.clone() };
    let bar = Bar::new("saving");
    let saved: Salvaged = server.ask_with(&request, &mut |done, total| bar.set(done, total))?;
    drop(bar);
    println!(
        "saved {} of data and {} of zeroes in {} ranges to {}, listed in {}",
        Size(saved.data_bytes),
        Size(saved.zero_bytes),
        saved.ranges,
        path.display(),
        saved.map.display()
    );
    if saved.lost_bytes > 0 {
        return Err(format!(
            "{} cannot be read from the cache device: the list calls them lost",
            Size(saved.lost_bytes)
        ));
    }
    Ok(())
}

/// `heeler volume forget`.
pub(super) fn forget(common: Common<'_>, name: &str, force: bool) -> Result<(), String> {
    let mut server = Server::connect(&common.data()?)?;
    let dropped: Purged = server.ask(&Request::VolumeForget { name: name.into(), force })?;
    println!(
        "the cache holds nothing of {name} any more; {} were dirty",
        Size(dropped.dirty_bytes)
    );
    Ok(())
}
