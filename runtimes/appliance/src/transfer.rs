//! `heeler volume import` and `heeler volume export`: disks from elsewhere into volumes, and back,
//! through the running server's own NBD socket.

mod apply;
mod copy;
mod delta;
mod disk;
mod export;
mod extents;
mod image;
mod import;
mod nbd;
mod note;
mod place;
mod range;

use std::fs;
use std::path::{Path, PathBuf};

pub(crate) use self::export::export;
pub(crate) use self::import::import;
pub(crate) use self::place::{Format, Place};
pub(crate) use self::range::{read, write};

use self::nbd::Client;
use self::note::Note;
use self::place::{Address, NbdUrl};
use crate::api::{Request, SnapshotLine, Status, VolumeLine};
use crate::client::Server;
use crate::settings::{Common, Listen};

/// Names the folder, in the data directory, of what is known of interrupted transfers.
const NOTES: &str = "transfers";

/// The running server, and what it said of itself.
struct Site {
    data: PathBuf,
    server: Server,
    address: Address,
    volumes: Vec<VolumeLine>,
}

impl Site {
    fn find(common: Common<'_>) -> Result<Self, String> {
        let data = common.data()?;
        let mut server = Server::connect(&data)?;
        let status: Status = server.ask(&Request::Status)?;
        let listen = status.listen.iter().filter_map(|text| text.parse().ok());
        let address = address(listen).ok_or("the server does not say where it listens")?;
        Ok(Self { data, server, address, volumes: status.volumes })
    }

    fn volume(&self, name: &str) -> Option<&VolumeLine> {
        self.volumes.iter().find(|volume| volume.name == name)
    }

    /// Opens an export of the server.
    async fn open(&self, export: &str) -> Result<Client, String> {
        let url = NbdUrl { address: self.address.clone(), export: export.into() };
        Client::connect(&url).await
    }

    /// Opens a volume, or a snapshot, which is served for it; then `true`, if it was not before.
    async fn open_any(&mut self, name: &str) -> Result<(Client, bool), String> {
        let Some((volume, snapshot)) = name.split_once('@') else {
            return Ok((self.open(name).await?, false));
        };
        let list = Request::SnapshotList { volume: volume.into() };
        let known: Vec<SnapshotLine> = self.server.ask(&list)?;
        let serve = !known.iter().any(|line| line.name == snapshot && line.served);
        if serve {
            self.server.ask::<()>(&Request::SnapshotServe { name: name.into(), stop: false })?;
        }
        Ok((self.open(name).await?, serve))
    }

    /// What was opened by [`open_any`](Self::open_any) is not used any more.
    fn close_any(&mut self, name: &str, served: bool) -> Result<(), String> {
        if served {
            self.server.ask::<()>(&Request::SnapshotServe { name: name.into(), stop: true })?;
        }
        Ok(())
    }

    /// Where it is noted how far a transfer is.
    fn note(&self, what: &str, name: &str) -> Result<Note, String> {
        let folder = self.data.join(NOTES);
        fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        Ok(Note::new(folder.join(format!("{what}-{name}.json"))))
    }
}

/// The best of the places where a server listens.
fn address(listen: impl Iterator<Item = Listen>) -> Option<Address> {
    let addresses = listen.map(|listen| match listen {
        Listen::Unix(path) => Address::Unix(path),
        Listen::Tcp(address) => Address::Tcp(address),
    });
    addresses.min_by_key(|address| matches!(address, Address::Tcp(_)))
}

/// A path with something behind its name.
fn beside(path: &Path, end: &str) -> PathBuf {
    path.with_added_extension(end)
}
