//! Snapshots and clones as the store knows them.
//!
//! A snapshot is a head that is kept. A clone's first head has its image, in packs and map pages of
//! other volumes, so the snapshot must not go while the clone is there. Nothing locks: each side
//! says what it is about to do before it looks at what the other has said.
//!
//! ```text
//! clone:   record itself at every volume its image lies in -> read the parent's newest head: the
//!          snapshot is there, and is not being deleted -> first head -> name
//! delete:  mark the snapshot as being deleted (a commit) -> list the records: none -> drop it
//!          (a commit), else take the mark away
//! ```
//!
//! So either the clone sees the mark, or the deletion sees the record. What was cut short leaves a
//! mark, with which the snapshot can be deleted again, or a record of a volume without a head or
//! without a name. Such a record counts as a clone for an hour, since its clone may be about to be
//! made, and is removed when it is seen after that. Making a clone takes ten minutes at most.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use heeler_core::keeper::Edit;
use heeler_core::wire::head::{Head, PageRef, SOURCES_MAX, Settings, Snapshot, Source, TailPack};
use heeler_core::wire::names::{self, Nonce, ObjectName, Uuid};

use crate::volumes::{self, CRC32C, VolumeError, create_settled, named_head};
use crate::{ErrorKind, Store};

/// Making a clone takes this long at most.
const CLONE_TIME_MAX: Duration = Duration::from_secs(600);
/// A record of a volume without a head is removed when it is so old. The clocks of the hosts may
/// differ by less than this less [`CLONE_TIME_MAX`].
const RECORD_SECS_MAX: u64 = 3600;

/// A snapshot, as `VOLUME@SNAPSHOT`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct SnapshotName {
    /// The volume's name.
    pub volume: String,
    /// Its own.
    pub snapshot: String,
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.volume, self.snapshot)
    }
}

impl FromStr for SnapshotName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (volume, snapshot) = text.split_once('@').unwrap_or((text, ""));
        if !names::valid_name(volume) || !names::valid_name(snapshot) {
            return Err(format!(
                "'{text}' is not VOLUME@SNAPSHOT, each a letter or digit and up to 62 more of \
                 them, '.', '_' or '-'"
            ));
        }
        Ok(Self { volume: volume.into(), snapshot: snapshot.into() })
    }
}

/// A volume whose image lies in a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Clone {
    /// Number of the snapshot's head.
    pub number: u32,
    /// The volume.
    pub volume: Uuid,
    /// Its name; its UUID, if it has no head, or none that can be read.
    pub name: String,
}

/// The snapshot of this name, unless it is being deleted.
///
/// # Errors
/// `NoSnapshot` or `Deleting`.
pub fn find<'a>(head: &'a Head, name: &SnapshotName) -> Result<&'a Snapshot, VolumeError> {
    let found = head.snapshots.iter().find(|snapshot| snapshot.name == name.snapshot);
    match found {
        None => Err(VolumeError::NoSnapshot(name.clone())),
        Some(snapshot) if snapshot.deleting => Err(VolumeError::Deleting(name.clone())),
        Some(snapshot) => Ok(snapshot),
    }
}

/// The head that a snapshot is.
///
/// # Errors
/// `NoSnapshot`, `Deleting`, `Missing`, `Broken`, `Name` or `Store`.
pub async fn open(store: &Store, name: &SnapshotName) -> Result<Head, VolumeError> {
    let head = named_head(store, &name.volume).await?;
    kept_head(store, &head, find(&head, name)?.number, &name.volume).await
}

async fn kept_head(
    store: &Store,
    head: &Head,
    number: u32,
    name: &str,
) -> Result<Head, VolumeError> {
    if number == head.number {
        return Ok(head.clone());
    }
    let broken = |what| VolumeError::Broken { name: name.into(), what };
    match store.get(&names::head_key(head.volume, number), None).await {
        Ok(bytes) => Head::decode(&bytes, head.volume, number, CRC32C)
            .map_err(|e| broken(format!("head {number}, a snapshot: {e}"))),
        Err(e) if e.kind == ErrorKind::NotFound => {
            Err(broken(format!("head {number}, a snapshot, is missing; run `heeler check`")))
        }
        Err(e) => Err(e.into()),
    }
}

/// Changes a volume while nobody owns it.
///
/// # Errors
/// As [`volumes::edit`]; `Edit` if it cannot be changed so.
pub async fn edit(
    store: &Store,
    name: &str,
    unix_secs: u64,
    edit: &Edit,
) -> Result<(), VolumeError> {
    let change = |head: &mut Head| {
        edit.check(head).map_err(|why| VolumeError::Edit { name: name.into(), why })?;
        edit.apply(head);
        Ok(())
    };
    volumes::edit(store, name, unix_secs, change).await
}

/// Makes a volume with the image of a snapshot, that nobody owns. It is there at once, whatever its
/// size, and whoever owns the snapshot's volume.
///
/// # Errors
/// `NoSnapshot`, `Deleting`, `TooDeep`, `Exists`, `Missing`, `Broken`, `Name` or `Store`. After a
/// `Store` error of kind `Timeout` the clone may exist: list the volumes to see.
pub async fn clone(
    store: &Store,
    from: &SnapshotName,
    name: &str,
    unix_secs: u64,
) -> Result<Head, VolumeError> {
    let begun = Instant::now();
    if !names::valid_name(name) {
        return Err(VolumeError::Name(name.into()));
    }
    let parent = open(store, from).await?;
    let clone = first_head(&parent, volumes::random_uuid()?, name, unix_secs)
        .ok_or_else(|| VolumeError::TooDeep(from.clone()))?;
    let made = enter(store, from, clone.clone(), begun, unix_secs).await;
    match &made {
        Ok(_) => {}
        // The clone may be there.
        Err(VolumeError::Store(e)) if e.kind == ErrorKind::Timeout => {}
        Err(_) => {
            for Source { volume, number } in clone.sources {
                let key = names::child_key(volume, number, clone.volume);
                if let Err(e) = store.delete(&key).await {
                    log::warn!("the record of a clone that was not made stays behind: {e}");
                }
            }
        }
    }
    made
}

async fn enter(
    store: &Store,
    from: &SnapshotName,
    clone: Head,
    begun: Instant,
    unix_secs: u64,
) -> Result<Head, VolumeError> {
    for Source { volume, number } in &clone.sources {
        let key = names::child_key(*volume, *number, clone.volume);
        let record = names::encode_child(unix_secs).into();
        if !create_settled(store, &key, record).await? {
            let what = format!("{key} exists, though the clone's UUID is new");
            return Err(VolumeError::Broken { name: from.volume.clone(), what });
        }
    }
    // From here on a deletion sees the records; one that had begun before is seen here.
    let parent = clone.sources[0];
    let head = volumes::newest_head(store, parent.volume).await?;
    let head = head.ok_or_else(|| VolumeError::Missing(from.volume.clone()))?;
    let same = |snapshot: &&Snapshot| snapshot.number == parent.number;
    match head.snapshots.iter().find(same) {
        None => return Err(VolumeError::NoSnapshot(from.clone())),
        Some(snapshot) if snapshot.deleting => return Err(VolumeError::Deleting(from.clone())),
        Some(_) => {}
    }
    if begun.elapsed() > CLONE_TIME_MAX {
        let what = "the store is too slow to make a clone; try again";
        return Err(VolumeError::Owner(what.into()));
    }
    volumes::enter(store, clone).await
}

/// The first head of a clone; `None` if its image would lie in too many volumes.
fn first_head(parent: &Head, uuid: Uuid, name: &str, unix_secs: u64) -> Option<Head> {
    let itself = Source { volume: parent.volume, number: parent.number };
    let sources: Vec<Source> = std::iter::once(itself).chain(parent.sources.clone()).collect();
    let page = |(page, at): (&u32, &PageRef)| (*page, PageRef { source: at.source + 1, ..*at });
    let pack = |pack: &TailPack| TailPack { source: pack.source + 1, ..*pack };
    let Settings { mode, buffering, .. } = parent.settings;
    (sources.len() <= SOURCES_MAX).then(|| Head {
        settings: Settings { mode, buffering, ..Settings::default() },
        sources,
        pages: parent.pages.iter().map(page).collect(),
        tail: parent.tail.iter().map(pack).collect(),
        ..Head::first(uuid, name, parent.blocks, parent.object_shift, unix_secs)
    })
}

/// Makes a volume that nobody owns what it was when the snapshot was made. Snapshots stay, later
/// ones too; no cache believes what it has of the volume.
///
/// # Errors
/// `NoSnapshot`, `Deleting`, `InUse`, `Missing`, `Broken`, `Name` or `Store`; after a `Store` error
/// of kind `Timeout` it may be done.
pub async fn rollback(
    store: &Store,
    name: &SnapshotName,
    unix_secs: u64,
) -> Result<(), VolumeError> {
    let then = open(store, name).await?;
    let change = |head: &mut Head| {
        if (head.volume, find(head, name)?.number) != (then.volume, then.number) {
            return Err(VolumeError::NoSnapshot(name.clone()));
        }
        head.blocks = then.blocks;
        head.sources.clone_from(&then.sources);
        head.pages.clone_from(&then.pages);
        head.tail.clone_from(&then.tail);
        // The image is not that of the last claim any more.
        (head.cache, head.nonce) = (Uuid::default(), Nonce::default());
        Ok(())
    };
    volumes::edit(store, &name.volume, unix_secs, change).await
}

/// Deletes a snapshot that has no clones. `edit` changes the volume, by its owner or in the store.
///
/// # Errors
/// `HasClones`, `NoSnapshot`, `Missing`, `Broken`, `Name` or `Store`, and what `edit` says. After
/// any but the first the snapshot may be marked as being deleted; deleting it again goes on.
pub async fn delete(
    store: &Store,
    name: &SnapshotName,
    unix_secs: u64,
    edit: impl AsyncFn(Edit) -> Result<(), VolumeError>,
) -> Result<(), VolumeError> {
    let head = named_head(store, &name.volume).await?;
    let number = match find(&head, name) {
        Ok(snapshot) => Some(snapshot.number),
        Err(VolumeError::Deleting(_)) => {
            head.snapshots.iter().find(|s| s.name == name.snapshot).map(|s| s.number)
        }
        Err(e) => return Err(e),
    };
    let text = name.to_string();
    let refuse = async || refuse_with_clones(store, head.volume, number, &text, unix_secs).await;
    let mark = |deleting| Edit::MarkSnapshot { name: name.snapshot.clone(), deleting };
    refuse().await?;
    edit(mark(true)).await?;
    match refuse().await {
        Err(e @ VolumeError::HasClones { .. }) => {
            edit(mark(false)).await?;
            Err(e)
        }
        Err(e) => Err(e),
        Ok(()) => edit(Edit::DropSnapshot(name.snapshot.clone())).await,
    }
}

/// Before a volume is deleted: none of its snapshots has a clone, or will get one. `edit` changes
/// the volume, by its owner or in the store.
///
/// # Errors
/// `HasSnapshots` unless forced; `HasClones`, `Missing`, `Broken`, `Name` or `Store`, and what
/// `edit` says.
pub async fn prepare_delete(
    store: &Store,
    name: &str,
    force: bool,
    unix_secs: u64,
    edit: impl AsyncFn(Edit) -> Result<(), VolumeError>,
) -> Result<(), VolumeError> {
    let head = named_head(store, name).await?;
    let refuse = async || refuse_with_clones(store, head.volume, None, name, unix_secs).await;
    refuse().await?;
    let count = head.snapshots.len();
    if count > 0 && !force {
        return Err(VolumeError::HasSnapshots { name: name.into(), count });
    }
    let mark = async |deleting| {
        for snapshot in &head.snapshots {
            edit(Edit::MarkSnapshot { name: snapshot.name.clone(), deleting }).await?;
        }
        Ok(())
    };
    mark(true).await?;
    match refuse().await {
        Err(e @ VolumeError::HasClones { .. }) => mark(false).await.and(Err(e)),
        other => other,
    }
}

/// An error that names the clones of a snapshot (by the number of its head) or of a volume, if
/// there are any.
pub(crate) async fn refuse_with_clones(
    store: &Store,
    volume: Uuid,
    number: Option<u32>,
    name: &str,
    unix_secs: u64,
) -> Result<(), VolumeError> {
    let mut clones = clones(store, volume, unix_secs).await?;
    clones.retain(|clone| number.is_none_or(|number| clone.number == number));
    let clones: BTreeSet<String> = clones.into_iter().map(|clone| clone.name).collect();
    if clones.is_empty() {
        return Ok(());
    }
    Err(VolumeError::HasClones { name: name.into(), clones: clones.into_iter().collect() })
}

/// The volumes whose images lie in snapshots of this one. Records that clones left behind which
/// were never made, are gone, or were flattened, are removed.
///
/// # Errors
/// `Broken` or `Store`.
pub async fn clones(
    store: &Store,
    volume: Uuid,
    unix_secs: u64,
) -> Result<Vec<Clone>, VolumeError> {
    let mut clones = Vec::new();
    for entry in store.list(&names::child_prefix(volume)).await? {
        let Some((_, ObjectName::Child { number, clone })) = names::parse_key(&entry.key) else {
            continue;
        };
        let head = match volumes::newest_head(store, clone).await {
            Err(VolumeError::Broken { .. }) => Err(()),
            head => Ok(head?),
        };
        // The first head is the last thing but one that is made of a clone.
        let unsure = match &head {
            Ok(head) => head.as_ref().is_none_or(|head| head.number == 1),
            Err(()) => false,
        };
        let head = head.ok().flatten();
        if let Some(head) = head.as_ref().filter(|head| head.number > 1)
            && !needs(store, head, Source { volume, number }).await?
        {
            log::info!("{}: the clone was flattened; removed", entry.key);
            store.delete(&entry.key).await?;
            continue;
        }
        if unsure && is_left_behind(store, &entry.key, head.as_ref(), unix_secs).await? {
            continue;
        }
        let name = head.map_or_else(|| clone.to_string(), |head| head.name);
        clones.push(Clone { number, volume: clone, name });
    }
    Ok(clones)
}

/// Whether a volume's image, or that of one of its snapshots, lies in a snapshot, as far as can be
/// told. A clone's first head does, and none does again once none did.
async fn needs(store: &Store, head: &Head, source: Source) -> Result<bool, VolumeError> {
    if head.sources.contains(&source) {
        return Ok(true);
    }
    for snapshot in &head.snapshots {
        match kept_head(store, head, snapshot.number, &head.name).await {
            Ok(kept) if !kept.sources.contains(&source) => {}
            Ok(_) | Err(VolumeError::Broken { .. }) => return Ok(true),
            Err(e) => return Err(e),
        }
    }
    Ok(false)
}

/// Whether a record is of no use any more, because its volume has no head, or a first one that no
/// name points at; then both are gone now.
async fn is_left_behind(
    store: &Store,
    key: &str,
    head: Option<&Head>,
    unix_secs: u64,
) -> Result<bool, VolumeError> {
    if let Some(head) = head {
        match volumes::find(store, &head.name).await {
            Ok(named) if named == head.volume => return Ok(false),
            Ok(_) | Err(VolumeError::Missing(_)) => {}
            Err(e) => return Err(e),
        }
    }
    let begun = match store.get(key, None).await {
        Ok(bytes) => names::decode_child(&bytes),
        Err(e) if e.kind == ErrorKind::NotFound => return Ok(true),
        Err(e) => return Err(e.into()),
    };
    if begun.is_none_or(|begun| begun.saturating_add(RECORD_SECS_MAX) > unix_secs) {
        return Ok(false);
    }
    log::info!("{key}: the clone was not made, or is gone; removed");
    if let Some(head) = head {
        store.delete(&names::head_key(head.volume, head.number)).await?;
    }
    store.delete(key).await?;
    Ok(true)
}

/// All snapshots of other volumes in which the image of a head, or of one of its snapshots, lies.
pub(crate) async fn sources_of(store: &Store, head: &Head) -> Result<Vec<Source>, VolumeError> {
    let mut sources = head.sources.clone();
    for snapshot in &head.snapshots {
        match kept_head(store, head, snapshot.number, &head.name).await {
            Ok(kept) => sources.extend(kept.sources),
            // The record, if there is one, is removed when it is seen.
            Err(VolumeError::Broken { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    sources.sort_unstable_by_key(|source| (source.volume, source.number));
    sources.dedup();
    Ok(sources)
}

#[cfg(test)]
mod tests;
