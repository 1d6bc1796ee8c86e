//! Volumes as the store knows them: create, find, list, delete.
//!
//! A volume exists when its name does. Creating writes head 1, then the name; deleting removes
//! the heads from the oldest to the newest, then everything else, then (of a clone) its records at
//! other volumes, then the name. So a command that was cut short leaves a whole volume, or a name
//! without a head that can be deleted again, or (of a creation) a lone head that nothing points at.
//!
//! A name counts if the volume's newest head says the same: renaming writes the new name, then a
//! head, then removes the old name, so at any time one of them counts, and the other one is kept
//! from others.

use std::collections::BTreeSet;
use std::fmt;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use heeler_core::ids::{BLOCK_BYTES, Crc32c};
use heeler_core::keeper::{Edit, EditError};
use heeler_core::limits::NAME_BYTES_MAX;
use heeler_core::wire::head::{
    Head, SOURCES_MAX, Settings, Source, VOLUME_BLOCKS_MAX, valid_object_shift,
};
use heeler_core::wire::names::{self, ObjectName, Uuid};
use object_store::PutPayload;

use crate::snapshots::{self, SnapshotName};
use crate::{ErrorKind, Store, StoreError};

/// The checksum of everything in the store.
pub const CRC32C: Crc32c = crc32c::crc32c_append;

/// What a volume is made from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewVolume<'a> {
    /// Its name.
    pub name: &'a str,
    /// Size in blocks of 4 KiB.
    pub blocks: u64,
    /// log2 of the object size in bytes.
    pub object_shift: u8,
    /// Now: seconds since 1970.
    pub unix_secs: u64,
    /// What its operator says of it.
    pub settings: Settings,
}

/// One line of a list of volumes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    /// The name.
    pub name: String,
    /// The volume's newest head, or why there is none to show.
    pub head: Result<Head, VolumeError>,
}

/// What the store holds of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Info {
    /// The newest head.
    pub head: Head,
    /// Packs, those not used any more included.
    pub packs: u64,
    /// Their bytes.
    pub pack_bytes: u64,
    /// All objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What a deletion removed, the name not counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Deleted {
    /// Objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Why something could not be done to a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VolumeError {
    /// No volume can be called so.
    Name(String),
    /// No volume can have this size, in blocks.
    Size(u64),
    /// No volume can have objects of this size: log2 of the bytes.
    ObjectSize(u8),
    /// No volume can have these settings; why.
    Settings(&'static str),
    /// There is a volume of this name.
    Exists(String),
    /// There is no volume of this name.
    Missing(String),
    /// The name belongs to a renaming that was cut short.
    Renaming {
        /// The name.
        name: String,
        /// What the volume is called.
        volume: String,
    },
    /// A server has the volume.
    InUse {
        /// The volume's name.
        name: String,
        /// The server's host.
        host: String,
        /// Since when: seconds since 1970.
        since_unix_secs: u64,
    },
    /// What the store holds under the name is not a volume; what is wrong.
    Broken {
        /// The volume's name, or its UUID where no name is known.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// A volume has no such snapshot.
    NoSnapshot(SnapshotName),
    /// The snapshot is being deleted.
    Deleting(SnapshotName),
    /// The image of a snapshot lies in as many volumes as it can.
    TooDeep(SnapshotName),
    /// What is to be deleted has clones.
    HasClones {
        /// A volume or a snapshot.
        name: String,
        /// The clones' names.
        clones: Vec<String>,
    },
    /// A volume to be deleted has so many snapshots.
    HasSnapshots {
        /// The volume's name.
        name: String,
        /// How many.
        count: usize,
    },
    /// A volume cannot be changed so.
    Edit {
        /// The volume's name.
        name: String,
        /// Why.
        why: EditError,
    },
    /// What the volume's owner says.
    Owner(String),
    /// The store failed.
    Store(StoreError),
}

impl fmt::Display for VolumeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(
                f,
                "'{name}' cannot be a volume's name: letters, digits, '.', '_' and '-', a letter \
                 or digit first, at most {NAME_BYTES_MAX} bytes"
            ),
            Self::Size(blocks) => write!(
                f,
                "a volume cannot have {blocks} blocks of {BLOCK_BYTES} bytes: 1 to \
                 {VOLUME_BLOCKS_MAX}"
            ),
            Self::ObjectSize(shift) => {
                write!(f, "objects cannot have 2^{shift} bytes: a power of two, 64K to 4M")
            }
            Self::Settings(why) => f.write_str(why),
            Self::Exists(name) => write!(f, "there is a volume '{name}' already"),
            Self::Missing(name) => {
                write!(f, "there is no volume '{name}'; `heeler volume list` shows them")
            }
            Self::Renaming { name, volume } => write!(
                f,
                "'{name}' is kept for volume '{volume}', whose renaming was cut short: `heeler \
                 volume rename {volume} {name}` goes on, `heeler volume rename {name} {volume}` \
                 gives it free"
            ),
            Self::InUse { name, host, since_unix_secs } => write!(
                f,
                "volume '{name}' belongs to a server on '{host}' since {since_unix_secs} (seconds \
                 since 1970); stop that server, or use --force if it is gone for ever"
            ),
            Self::Broken { name, what } => write!(f, "volume '{name}' is broken: {what}"),
            Self::NoSnapshot(SnapshotName { volume, snapshot }) => write!(
                f,
                "volume '{volume}' has no snapshot '{snapshot}': see `heeler snapshot list \
                 {volume}`"
            ),
            Self::Deleting(name) => write!(
                f,
                "snapshot '{name}' is being deleted: finish that with `heeler snapshot delete \
                 {name}`"
            ),
            Self::TooDeep(name) => write!(
                f,
                "'{name}' lies in {SOURCES_MAX} other volumes already, a clone of a clone each: \
                 flatten its volume first, then make another snapshot"
            ),
            Self::HasClones { name, clones } => {
                let (some, more) = clones.split_at(clones.len().min(CLONES_SHOWN));
                write!(f, "'{name}' has clones: {}", some.join(", "))?;
                if !more.is_empty() {
                    write!(f, " and {} more", more.len())?;
                }
                f.write_str("; delete or flatten them first")
            }
            Self::HasSnapshots { name, count } => write!(
                f,
                "volume '{name}' has {count} snapshots: delete them first, or use --force"
            ),
            Self::Edit { name, why } => write!(f, "volume '{name}': {why}"),
            Self::Owner(text) => f.write_str(text),
            Self::Store(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for VolumeError {}

impl From<StoreError> for VolumeError {
    fn from(e: StoreError) -> Self {
        Self::Store(e)
    }
}

/// Makes an empty volume that nobody owns.
///
/// # Errors
/// Nothing is left behind, unless the store fails again while that is cleaned up. After a
/// `Store` error of kind `Timeout` the volume may exist: list the volumes to see.
pub async fn create(store: &Store, new: &NewVolume<'_>) -> Result<Head, VolumeError> {
    if !names::valid_name(new.name) {
        return Err(VolumeError::Name(new.name.into()));
    }
    if !(1..=VOLUME_BLOCKS_MAX).contains(&new.blocks) {
        return Err(VolumeError::Size(new.blocks));
    }
    if !valid_object_shift(new.object_shift) {
        return Err(VolumeError::ObjectSize(new.object_shift));
    }
    new.settings.check().map_err(VolumeError::Settings)?;
    let uuid = random_uuid()?;
    let head = Head::first(uuid, new.name, new.blocks, new.object_shift, new.unix_secs);
    let head = Head { settings: new.settings.clone(), ..head };
    enter(store, head).await
}

/// Makes a volume of its first head: writes that, then the name.
pub(crate) async fn enter(store: &Store, head: Head) -> Result<Head, VolumeError> {
    let head_key = names::head_key(head.volume, head.number);
    let name = Bytes::from(names::encode_name(head.volume));
    let created = match create_settled(store, &head_key, head.encode(CRC32C).into()).await {
        Ok(true) => create_settled(store, &names::name_key(&head.name), name).await,
        Ok(false) => {
            let what = "its first head exists, though its UUID is new".into();
            return Err(VolumeError::Broken { name: head.name, what });
        }
        Err(e) => Err(e),
    };
    let error = match created {
        Ok(true) => return Ok(head),
        Ok(false) => taken(store, &head.name).await,
        // The name may be there: without the head it would name a broken volume.
        Err(e) if e.kind == ErrorKind::Timeout => return Err(e.into()),
        Err(e) => e.into(),
    };
    if let Err(e) = store.delete(&head_key).await {
        log::warn!("a head that nothing points at stays behind: {e}");
    }
    Err(error)
}

/// Why a name cannot be given to a volume.
async fn taken(store: &Store, name: &str) -> VolumeError {
    let head = async { newest_head(store, find(store, name).await?).await };
    match head.await {
        Ok(Some(head)) if head.name != name => {
            VolumeError::Renaming { name: name.into(), volume: head.name }
        }
        _ => VolumeError::Exists(name.into()),
    }
}

/// Renames a volume. `edit` changes its head, by its owner or in the store. What was cut short goes
/// on when it is asked for again.
///
/// # Errors
/// `Exists` or `Renaming`: the new name is taken. `Missing`, `Broken`, `Name` or `Store`, and what
/// `edit` says. After `Store` and `Owner` it may be renamed: list the volumes to see.
pub async fn rename(
    store: &Store,
    old: &str,
    new: &str,
    edit: impl AsyncFn(Edit) -> Result<(), VolumeError>,
) -> Result<(), VolumeError> {
    if !names::valid_name(new) {
        return Err(VolumeError::Name(new.into()));
    }
    let volume = find(store, old).await?;
    let head = newest_head(store, volume).await.map_err(|e| renamed(e, old))?;
    match head.map(|head| head.name) {
        // It was done but for this.
        Some(name) if name == new && old != new => {
            return Ok(store.delete(&names::name_key(old)).await?);
        }
        Some(name) if name == old && old != new => {}
        Some(name) if name == old => return Ok(()),
        _ => return Err(VolumeError::Missing(old.into())),
    }
    let (old_key, new_key) = (names::name_key(old), names::name_key(new));
    let content = Bytes::from(names::encode_name(volume));
    let made = create_settled(store, &new_key, content).await?;
    if !made && find(store, new).await? != volume {
        return Err(taken(store, new).await);
    }
    match edit(Edit::Name(new.into())).await {
        Ok(()) => Ok(store.delete(&old_key).await?),
        // Nothing has changed: the new name must not stay.
        Err(
            e @ (VolumeError::InUse { .. } | VolumeError::Edit { .. } | VolumeError::Missing(_)),
        ) => {
            store.delete(&new_key).await?;
            Err(e)
        }
        Err(e) => Err(e),
    }
}

/// Changes a volume while nobody owns it: `change` gets the newest head, with the number and time
/// of the next one, and makes of it what shall be. Nothing is written if it stays as it was.
///
/// # Errors
/// `InUse`: its owner must be asked. What `change` says. `Missing`, `Broken`, `Name` or `Store`;
/// after a `Store` error of kind `Timeout` it may be changed.
pub async fn edit(
    store: &Store,
    name: &str,
    unix_secs: u64,
    change: impl Fn(&mut Head) -> Result<(), VolumeError>,
) -> Result<(), VolumeError> {
    for _ in 0..HEAD_ATTEMPTS {
        let head = named_head(store, name).await?;
        if !head.released {
            return Err(VolumeError::InUse {
                name: name.into(),
                host: head.host,
                since_unix_secs: head.claimed_unix_secs,
            });
        }
        let next = head.number.checked_add(1).filter(|number| *number < u32::MAX);
        let Some(number) = next else {
            let what = "its heads have used up all numbers".into();
            return Err(VolumeError::Broken { name: name.into(), what });
        };
        let unchanged = Head { number, written_unix_secs: unix_secs, ..head.clone() };
        let mut next = unchanged.clone();
        change(&mut next)?;
        if next == unchanged {
            return Ok(());
        }
        let superseded = superseded(&head, &next);
        let key = names::head_key(next.volume, number);
        // Whoever claims the volume meanwhile makes the same head, and one of us loses.
        if create_settled(store, &key, next.encode(CRC32C).into()).await? {
            for number in superseded {
                if let Err(e) = store.delete(&names::head_key(head.volume, number)).await {
                    log::warn!("a superseded head stays behind: {e}");
                }
            }
            return Ok(());
        }
    }
    let what = "its heads change faster than they can be read".into();
    Err(VolumeError::Broken { name: name.into(), what })
}

/// Heads that are of no more use when `next` has followed `head`: that one, and those of snapshots
/// that were dropped.
fn superseded(head: &Head, next: &Head) -> BTreeSet<u32> {
    let kept = |number| next.snapshots.iter().any(|snapshot| snapshot.number == number);
    let dropped = head.snapshots.iter().map(|snapshot| snapshot.number);
    // A claim is never deleted.
    let old = dropped.chain([head.number]).filter(|&n| !kept(n) && n != head.term);
    old.collect()
}

/// The volume that a name stands for.
///
/// # Errors
/// `Missing`, `Broken`, `Name` or `Store`.
pub async fn find(store: &Store, name: &str) -> Result<Uuid, VolumeError> {
    if !names::valid_name(name) {
        return Err(VolumeError::Name(name.into()));
    }
    match store.get(&names::name_key(name), None).await {
        Ok(bytes) => names::decode_name(&bytes).ok_or_else(|| VolumeError::Broken {
            name: name.into(),
            what: format!("the object {} is not a name", names::name_key(name)),
        }),
        Err(e) if e.kind == ErrorKind::NotFound => Err(VolumeError::Missing(name.into())),
        Err(e) => Err(e.into()),
    }
}

/// The newest head of a volume, `None` if it has no head.
///
/// # Errors
/// `Broken` or `Store`.
pub async fn newest_head(store: &Store, volume: Uuid) -> Result<Option<Head>, VolumeError> {
    let broken = |what| VolumeError::Broken { name: volume.to_string(), what };
    // An owner at work deletes a head soon after it has made the next one.
    for _ in 0..HEAD_ATTEMPTS {
        let listed = store.list(&names::head_prefix(volume)).await?;
        let numbers = listed.iter().filter_map(|entry| match names::parse_key(&entry.key) {
            Some((_, ObjectName::Head { number })) => Some(number),
            _ => None,
        });
        let Some(number) = numbers.max() else { return Ok(None) };
        match store.get(&names::head_key(volume, number), None).await {
            Ok(bytes) => {
                return match Head::decode(&bytes, volume, number, CRC32C) {
                    Ok(head) => Ok(Some(head)),
                    Err(e) => Err(broken(format!("head {number}: {e}"))),
                };
            }
            Err(e) if e.kind == ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(broken("its heads change faster than they can be read".into()))
}

/// All volumes, by name. One that is broken is listed with what is wrong.
///
/// # Errors
/// When the store fails.
pub async fn list(store: &Store) -> Result<Vec<Listed>, StoreError> {
    let entries = store.list(names::NAMES_PREFIX).await?;
    let listed = entries.iter().filter_map(|entry| entry.key.strip_prefix(names::NAMES_PREFIX));
    stream::iter(listed.map(|name| async move {
        match named_head(store, name).await {
            Err(VolumeError::Store(e)) => Err(e),
            head => Ok(Listed { name: name.into(), head }),
        }
    }))
    .buffered(store.config().reads_max)
    // A name that went since it was listed.
    .try_filter(|listed| std::future::ready(!matches!(listed.head, Err(VolumeError::Missing(_)))))
    .try_collect()
    .await
}

/// What the store holds of a volume.
///
/// # Errors
/// `Missing`, `Broken`, `Name` or `Store`.
pub async fn info(store: &Store, name: &str) -> Result<Info, VolumeError> {
    let head = named_head(store, name).await?;
    let mut info = Info { packs: 0, pack_bytes: 0, objects: 0, bytes: 0, head };
    for entry in store.list(&names::volume_prefix(info.head.volume)).await? {
        info.objects += 1;
        info.bytes += entry.bytes;
        if let Some((_, ObjectName::Pack { .. })) = names::parse_key(&entry.key) {
            info.packs += 1;
            info.pack_bytes += entry.bytes;
        }
    }
    Ok(info)
}

/// Removes a volume that has no clones. With `force` also one that has snapshots, that a server has
/// or that is broken; a server that is still running then loses its ground, and may write objects
/// that nobody will find.
///
/// # Errors
/// `InUse`, `HasSnapshots` and `Broken` unless forced; `HasClones`, `Missing`, `Name` and `Store`.
/// After `Store` the volume is whole, or has lost its heads; deleting it again goes on.
pub async fn delete(
    store: &Store,
    name: &str,
    force: bool,
    unix_secs: u64,
) -> Result<Deleted, VolumeError> {
    let mut deleted = Deleted::default();
    match find(store, name).await {
        Ok(volume) => {
            let head = match newest_head(store, volume).await {
                Ok(Some(head)) if head.name != name => {
                    return Err(VolumeError::Missing(name.into()));
                }
                Ok(Some(head)) if !head.released && !force => {
                    return Err(VolumeError::InUse {
                        name: name.into(),
                        host: head.host,
                        since_unix_secs: head.claimed_unix_secs,
                    });
                }
                Err(VolumeError::Broken { .. }) if force => None,
                head => head.map_err(|e| renamed(e, name))?,
            };
            let owned = head.as_ref().is_none_or(|head| !head.released);
            let mut sources = Vec::new();
            if let Some(head) = &head {
                sources = snapshots::sources_of(store, head).await?;
            }
            if owned {
                snapshots::refuse_with_clones(store, volume, None, name, unix_secs).await?;
            } else {
                let edit = async |edit| snapshots::edit(store, name, unix_secs, &edit).await;
                snapshots::prepare_delete(store, name, force, unix_secs, edit).await?;
            }
            delete_objects(store, volume, &mut deleted).await?;
            for Source { volume: parent, number } in sources {
                store.delete(&names::child_key(parent, number, volume)).await?;
            }
        }
        Err(VolumeError::Broken { .. }) if force => {}
        Err(e) => return Err(e),
    }
    store.delete(&names::name_key(name)).await?;
    Ok(deleted)
}

async fn delete_objects(
    store: &Store,
    volume: Uuid,
    deleted: &mut Deleted,
) -> Result<(), StoreError> {
    // Listed again, because an owner may have been at work.
    for _ in 0..DELETE_ROUNDS {
        let entries = store.list(&names::volume_prefix(volume)).await?;
        if entries.is_empty() {
            break;
        }
        let heads = names::head_prefix(volume);
        // Sorted by key, so the newest head goes last.
        for entry in entries.iter().filter(|entry| entry.key.starts_with(&heads)) {
            store.delete(&entry.key).await?;
        }
        stream::iter(entries.iter().filter(|entry| !entry.key.starts_with(&heads)))
            .map(|entry| store.delete(&entry.key))
            .buffer_unordered(store.config().writes_max)
            .try_collect::<()>()
            .await?;
        deleted.objects += entries.len() as u64;
        deleted.bytes += entries.iter().map(|entry| entry.bytes).sum::<u64>();
    }
    Ok(())
}

/// The newest head of the volume that a name stands for.
///
/// # Errors
/// `Missing`, `Broken`, `Name` or `Store`.
pub async fn named_head(store: &Store, name: &str) -> Result<Head, VolumeError> {
    let volume = find(store, name).await?;
    match newest_head(store, volume).await {
        Ok(Some(head)) if head.name == name => Ok(head),
        // Of a renaming that is under way, or was cut short.
        Ok(Some(_)) => Err(VolumeError::Missing(name.into())),
        Ok(None) => Err(VolumeError::Broken {
            name: name.into(),
            what: "it has no head: its deletion was cut short. Delete it again".into(),
        }),
        Err(e) => Err(renamed(e, name)),
    }
}

/// The same error, about the volume by its name.
fn renamed(error: VolumeError, name: &str) -> VolumeError {
    match error {
        VolumeError::Broken { what, .. } => VolumeError::Broken { name: name.into(), what },
        other => other,
    }
}

/// Creates an object whose bytes no other creator would write, and finds out what became of a
/// create without an answer. `false`: there is another one.
///
/// Fails with `Timeout` as long as the object may be there.
pub(crate) async fn create_settled(
    store: &Store,
    key: &str,
    bytes: Bytes,
) -> Result<bool, StoreError> {
    let mut unknown: Option<StoreError> = None;
    for _ in 0..CREATE_ATTEMPTS {
        let error = match store.put(key, PutPayload::from(bytes.clone()), true).await {
            Ok(()) => return Ok(true),
            Err(e) => e,
        };
        match error.kind {
            ErrorKind::AlreadyExists if unknown.is_none() => return Ok(false),
            ErrorKind::AlreadyExists | ErrorKind::Timeout => {
                let unknown = unknown.insert(StoreError { kind: ErrorKind::Timeout, ..error });
                match store.get(key, None).await {
                    Ok(found) => return Ok(found == bytes),
                    Err(e) if e.kind == ErrorKind::NotFound => {}
                    Err(_) => return Err(unknown.clone()),
                }
            }
            // An earlier try may still take effect.
            _ => return Err(unknown.unwrap_or(error)),
        }
    }
    Err(unknown.expect("only unknown outcomes lead to another try"))
}

pub(crate) fn random_uuid() -> Result<Uuid, StoreError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|e| StoreError::new(ErrorKind::Permanent, format!("no randomness: {e}")))?;
    // Version 4, variant 1 (RFC 9562).
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(Uuid(bytes))
}

/// Listings of heads before the reader gives up.
const HEAD_ATTEMPTS: u32 = 5;
/// Creates of one object at most.
const CREATE_ATTEMPTS: u32 = 3;
/// Listings of a volume that is deleted while its owner runs.
const DELETE_ROUNDS: u32 = 3;
/// Clones that an error names.
const CLONES_SHOWN: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Fault, Faulty, Rates};
    use crate::testing::{keys, memory};
    use crate::{Place, StoreConfig};

    fn new() -> NewVolume<'static> {
        NewVolume {
            name: "disk0",
            blocks: 1 << 20,
            object_shift: 22,
            unix_secs: 77,
            settings: Settings::default(),
        }
    }

    async fn put_head(store: &Store, head: &Head) {
        let key = names::head_key(head.volume, head.number);
        store.put(&key, head.encode(CRC32C).into(), true).await.expect("creates");
    }

    #[tokio::test]
    async fn a_volume_from_creation_to_deletion() {
        let store = memory();
        assert_eq!(list(&store).await, Ok(Vec::new()));
        let made = create(&store, &new()).await.expect("creates");
        assert!(made.released && made.number == 1 && made.name == "disk0");
        assert_eq!(find(&store, "disk0").await, Ok(made.volume));
        let listed = Listed { name: "disk0".into(), head: Ok(made.clone()) };
        assert_eq!(list(&store).await, Ok(vec![listed]));

        let next = Head { number: 2, written_unix_secs: 99, ..made.clone() };
        put_head(&store, &next).await;
        let pack = names::key(made.volume, ObjectName::Pack { epoch: made.epoch, n: 0 });
        store.put(&pack, vec![0; 100].into(), false).await.expect("puts");
        let info = info(&store, "disk0").await.expect("there");
        assert_eq!(info.head, next);
        assert_eq!((info.packs, info.pack_bytes, info.objects), (1, 100, 3));

        let deleted = delete(&store, "disk0", false, 77).await.expect("deletes");
        assert_eq!((deleted.objects, deleted.bytes), (3, info.bytes));
        assert_eq!(keys(&store).await, [""; 0]);
        let again = delete(&store, "disk0", true, 77).await;
        assert_eq!(again, Err(VolumeError::Missing("disk0".into())));
    }

    #[tokio::test]
    async fn settings_are_changed_while_nobody_owns_the_volume() {
        let store = memory();
        let settings = Settings { pinned: true, ..Settings::default() };
        let named = NewVolume { settings: settings.clone(), ..new() };
        let made = create(&store, &named).await.expect("creates");
        assert_eq!(made.settings, settings);
        let off = |head: &mut Head| {
            head.settings.read_only = true;
            Ok(())
        };
        for _ in 0..2 {
            edit(&store, "disk0", 78, off).await.expect("sets");
        }
        let on = |head: &mut Head| {
            head.settings = Settings::default();
            Ok(())
        };
        edit(&store, "disk0", 79, on).await.expect("sets");
        let head = info(&store, "disk0").await.expect("there").head;
        let expected = Head {
            number: 3,
            written_unix_secs: 79,
            settings: Settings::default(),
            ..made.clone()
        };
        assert_eq!(head, expected);
        // The first head, which counts as a claim, stays; the second was superseded.
        let heads = store.list(&names::head_prefix(made.volume)).await.expect("lists");
        assert_eq!(heads.len(), 2);
        put_head(&store, &Head { number: 4, term: 4, released: false, ..head }).await;
        let refused = edit(&store, "disk0", 80, off).await;
        assert!(matches!(refused, Err(VolumeError::InUse { .. })), "{refused:?}");
    }

    #[tokio::test]
    async fn what_no_volume_can_be_is_refused() {
        let store = memory();
        let cases = [
            NewVolume { name: "a/b", ..new() },
            NewVolume { blocks: 0, ..new() },
            NewVolume { blocks: VOLUME_BLOCKS_MAX + 1, ..new() },
            NewVolume { object_shift: 23, ..new() },
            NewVolume {
                settings: Settings { tags: vec![String::new()], ..Settings::default() },
                ..new()
            },
        ];
        for case in cases {
            create(&store, &case).await.expect_err("refused");
        }
        assert_eq!(store.counters().puts, 0);
        assert_eq!(find(&store, "../x").await, Err(VolumeError::Name("../x".into())));
    }

    #[tokio::test]
    async fn a_taken_name_leaves_nothing_behind() {
        let store = memory();
        create(&store, &new()).await.expect("creates");
        let before = keys(&store).await;
        let again = create(&store, &NewVolume { blocks: 5, ..new() }).await;
        assert_eq!(again, Err(VolumeError::Exists("disk0".into())));
        assert_eq!(keys(&store).await, before);
    }

    #[tokio::test(start_paused = true)]
    async fn a_create_without_an_answer_is_settled() {
        use Fault::*;
        // Requests: head, (its settling,) name, (its settling).
        for faults in [
            vec![Some(Lost), None, None],
            vec![None, Some(Lost)],
            vec![None, Some(HangsAfter)],
            vec![Some(Hangs), None, None, Some(Hangs), None, None],
        ] {
            let backend = Faulty::memory(1, Rates::default()).first(faults.clone());
            let store = Store::with_backend(StoreConfig::new(Place::Memory), Box::new(backend));
            let made = create(&store, &new()).await.unwrap_or_else(|e| panic!("{faults:?}: {e}"));
            assert_eq!(info(&store, "disk0").await.expect("there").head, made);
        }
        // The name is refused for good: the head must not stay.
        let faults = [vec![None], vec![Some(Refused); 4]].concat();
        let backend = Faulty::memory(1, Rates::default()).first(faults);
        let store = Store::with_backend(StoreConfig::new(Place::Memory), Box::new(backend));
        create(&store, &new()).await.expect_err("refused");
        assert_eq!(keys(&store).await, [""; 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn creations_under_faults_leave_whole_volumes() {
        let rates = Rates { refused: 100, hangs: 60, lost: 60, hangs_after: 60 };
        let mut made = 0;
        for seed in 0..300 {
            let backend = Faulty::memory(seed, rates);
            let store = Store::with_backend(StoreConfig::new(Place::Memory), Box::new(backend));
            let result = create(&store, &new()).await;
            let found = loop {
                match named_head(&store, "disk0").await {
                    Err(VolumeError::Store(_)) => {}
                    found => break found,
                }
            };
            match result {
                Ok(head) => assert_eq!(found, Ok(head), "seed {seed}"),
                Err(VolumeError::Store(e)) if e.kind == ErrorKind::Timeout => {
                    assert!(!matches!(found, Err(VolumeError::Broken { .. })), "seed {seed}");
                }
                Err(e) => {
                    assert_eq!(
                        found,
                        Err(VolumeError::Missing("disk0".into())),
                        "seed {seed}: {e}"
                    );
                }
            }
            made += u32::from(store.counters().failures == 0);
        }
        assert!(made > 100, "{made} of 300 met no failure");
    }

    #[tokio::test]
    async fn a_volume_is_renamed() {
        let store = memory();
        let made = create(&store, &new()).await.expect("creates");
        create(&store, &NewVolume { name: "other", ..new() }).await.expect("creates");
        let to = async |new: &str| {
            let edit = async |edit| snapshots::edit(&store, "disk0", 78, &edit).await;
            rename(&store, "disk0", new, edit).await
        };
        assert_eq!(to("other").await, Err(VolumeError::Exists("other".into())));
        assert_eq!(to("a/b").await, Err(VolumeError::Name("a/b".into())));
        assert_eq!(to("disk0").await, Ok(()));
        assert_eq!(to("disk1").await, Ok(()));
        assert_eq!(named_head(&store, "disk1").await.expect("renamed").volume, made.volume);
        assert_eq!(find(&store, "disk0").await, Err(VolumeError::Missing("disk0".into())));
        // A server has it: nothing changes.
        let head = named_head(&store, "disk1").await.expect("there");
        let claim = Head { number: 3, term: 3, released: false, ..head };
        put_head(&store, &claim).await;
        let edit = async |edit| snapshots::edit(&store, "disk1", 78, &edit).await;
        let refused = rename(&store, "disk1", "disk2", edit).await;
        assert!(matches!(refused, Err(VolumeError::InUse { .. })), "{refused:?}");
        assert_eq!(find(&store, "disk2").await, Err(VolumeError::Missing("disk2".into())));
    }

    /// Whatever fails, there is one name by which the volume can be had, and renaming goes on.
    #[tokio::test(start_paused = true)]
    async fn renamings_under_faults_leave_one_name() {
        let rates = Rates { refused: 100, hangs: 60, lost: 60, hangs_after: 60 };
        let mut halves = 0;
        for seed in 0..300 {
            let backend = Faulty::memory(seed, rates);
            let store = Store::with_backend(StoreConfig::new(Place::Memory), Box::new(backend));
            let Ok(made) = create(&store, &new()).await else { continue };
            let to_disk1 = async || {
                let edit = async |edit| snapshots::edit(&store, "disk0", 78, &edit).await;
                rename(&store, "disk0", "disk1", edit).await
            };
            let first = to_disk1().await;
            let listed = loop {
                if let Ok(listed) = list(&store).await {
                    break listed;
                }
            };
            let [Listed { name, head: Ok(head) }] = &listed[..] else {
                panic!("seed {seed}: {listed:?}");
            };
            assert_eq!((name, head.volume), (&head.name, made.volume), "seed {seed}");
            assert!(first.is_err() || name == "disk1", "seed {seed}");
            halves += u32::from(first.is_err());
            while name == "disk0" && to_disk1().await.is_err() {
                if named_head(&store, "disk1").await.is_ok() {
                    break;
                }
            }
            let found = loop {
                match named_head(&store, "disk1").await {
                    Err(VolumeError::Store(_)) => {}
                    found => break found,
                }
            };
            assert_eq!(found.expect("renamed").volume, made.volume, "seed {seed}");
        }
        assert!(halves > 5, "some were cut short: {halves}");
    }

    #[tokio::test]
    async fn a_server_s_volume_needs_force() {
        let store = memory();
        let made = create(&store, &new()).await.expect("creates");
        let claim =
            Head { number: 2, term: 2, released: false, host: "east".into(), ..made.clone() };
        put_head(&store, &claim).await;
        let error = delete(&store, "disk0", false, 77).await.expect_err("in use").to_string();
        assert!(error.contains("'east'") && error.contains("--force"), "{error}");
        assert_eq!(info(&store, "disk0").await.expect("there").head, claim);
        delete(&store, "disk0", true, 77).await.expect("forced");
        assert_eq!(keys(&store).await, [""; 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deletion_cut_short_goes_on() {
        for faults in 0..8 {
            let place = StoreConfig { attempts: 1, ..StoreConfig::new(Place::Memory) };
            // Creation asks twice. Of the deletion, the n-th request fails.
            let mut plan = vec![None; 3 + faults];
            plan.push(Some(Fault::Refused));
            let backend = Faulty::memory(1, Rates::default()).first(plan);
            let store = Store::with_backend(place, Box::new(backend));
            let made = create(&store, &new()).await.expect("creates");
            put_head(&store, &Head { number: 2, ..made.clone() }).await;
            delete(&store, "disk0", false, 77).await.expect_err("cut short");
            let listed = list(&store).await.expect("lists");
            match &listed[0].head {
                Ok(head) => assert_eq!(head.number, 2, "the newest head goes last"),
                Err(e) => assert!(e.to_string().contains("Delete it again"), "{e}"),
            }
            delete(&store, "disk0", false, 77).await.expect("goes on");
            assert_eq!(keys(&store).await, [""; 0]);
        }
    }

    #[tokio::test]
    async fn what_is_broken_is_shown_and_only_deleted_by_force() {
        let store = memory();
        let made = create(&store, &new()).await.expect("creates");
        let next = names::head_key(made.volume, 2);
        store.put(&next, vec![1, 2, 3].into(), false).await.expect("puts");
        store.put("names/junk", PutPayload::from_static(b"?"), false).await.expect("puts");
        let listed = list(&store).await.expect("lists");
        assert_eq!(listed.len(), 2);
        for Listed { name, head } in listed {
            let error = head.expect_err("broken").to_string();
            assert!(error.contains(&format!("volume '{name}' is broken")), "{error}");
            delete(&store, &name, false, 77).await.expect_err("needs force");
            delete(&store, &name, true, 77).await.expect("forced");
        }
        assert_eq!(keys(&store).await, [""; 0]);
    }
}
