//! What the admin socket carries: one JSON value a line. A client sends one request and reads lines
//! until one is not progress.

use std::path::PathBuf;

use heeler_core::ages::WINDOWS;
use heeler_core::event::Mode;
use serde::{Deserialize, Serialize};

use crate::setting::{Setting, mode_name};
use crate::size::Memory;

/// What is asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Which store the server uses: its URL.
    Store,
    /// [`Status`].
    Status,
    /// Answered by nothing.
    VolumeCreate {
        name: String,
        size_bytes: u64,
        object_bytes: u64,
        #[serde(with = "mode_name")]
        mode: Mode,
        buffered_read: bool,
        buffered_write: bool,
    },
    /// A list of [`VolumeLine`].
    VolumeList,
    /// [`VolumeInfo`].
    VolumeInfo { name: String },
    /// [`Deleted`].
    VolumeDelete { name: String, force: bool },
    /// Answered by nothing, when it is done.
    VolumePush { name: String },
    /// Answered by nothing, when the store has it.
    VolumeSet { name: String, settings: Vec<Setting> },
    /// As the order says.
    VolumeManage { name: String, order: Order },
    /// [`Scrubbed`], when it is done.
    VolumeScrub { name: String },
    /// Answered by nothing, when it is done.
    VolumeFlatten { name: String },
    /// A list of [`TreeNode`].
    VolumeTree,
    /// Answered by nothing, when the store has it. Here and below: `VOLUME@SNAPSHOT`.
    SnapshotCreate { name: String },
    /// A list of [`SnapshotLine`].
    SnapshotList { volume: String },
    /// Answered by nothing.
    SnapshotDelete { name: String },
    /// Answered by nothing, when it is done.
    SnapshotRollback { name: String, force: bool },
    /// Answered by nothing, when clients can open it or cannot any more.
    SnapshotServe { name: String, stop: bool },
    /// Answered by nothing, when it is served.
    Clone { from: String, name: String },
    /// Answered by nothing, when the volume is served.
    VolumeAttach { name: String, takeover: bool },
    /// Answered by nothing, when it is done. It is called off if the client goes.
    VolumeDetach { name: String },
    /// Calls a detach off. Answered by nothing.
    VolumeStay { name: String },
    /// [`Salvaged`], when it is done. The path is absolute.
    VolumeSalvage { name: String, path: PathBuf },
    /// [`Purged`].
    VolumeForget { name: String, force: bool },
    /// [`CacheReport`], of one shard or of all; of one volume or of all.
    CacheInfo { volume: Option<String>, shard: Option<u16> },
    /// [`Resized`], when it is done.
    CacheResize { memory: Memory },
    /// Answered by nothing, when it is done.
    CacheFlush,
    /// [`Purged`].
    CachePurge { force: bool },
    /// Answered by nothing.
    CachePolicy { policy: String },
}

/// What is to be done with a volume as a whole, or said of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// Answered by nothing, when clients can open it with its new size.
    Resize { size_bytes: u64, force: bool },
    /// Answered by nothing, when clients can open it by its new name.
    Rename { to: String },
    /// An [`ObjectMap`], also of `VOLUME@SNAPSHOT`.
    Object { object: u32 },
    /// [`Changes`] between two snapshots, or a snapshot and the volume as it is now, from a map
    /// page on.
    Changes { from: String, to: Option<String>, page: u32 },
}

/// One line of an answer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// Not done yet.
    Progress { done_bytes: u64, total_bytes: u64 },
    /// The end, and what was asked for.
    Done(serde_json::Value),
    /// The end: it could not be done.
    Failed(String),
}

/// A volume in a list.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct VolumeLine {
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) size_bytes: u64,
    pub(crate) object_bytes: u64,
    /// Of a server's own volume: starting, served, detaching, refused, fenced, detached, deleting;
    /// else free, owned or broken.
    pub(crate) state: String,
    /// Of refused, fenced and broken: why, and what to do.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) reason: Option<String>,
    /// Host of the owner, if there is one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) owner: Option<String>,
    pub(crate) created_unix_secs: u64,
    /// Number of the newest head.
    pub(crate) head: u32,
    /// The store's image is as of this epoch.
    pub(crate) epoch: u64,
    /// What its operator says of it.
    #[serde(default)]
    pub(crate) description: String,
    #[serde(default)]
    pub(crate) tags: Vec<String>,
    /// Clients may not change it.
    #[serde(default)]
    pub(crate) read_only: bool,
    /// What the store lacks; only a server knows.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) dirty_bytes: Option<u64>,
    /// Of a server's own volume.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) push: Option<PushInfo>,
}

/// Everything about a volume.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct VolumeInfo {
    #[serde(flatten)]
    pub(crate) line: VolumeLine,
    /// Objects in the store, and their bytes.
    pub(crate) objects: u64,
    pub(crate) stored_bytes: u64,
    pub(crate) packs: u64,
    pub(crate) pack_bytes: u64,
    /// When a write is acknowledged, and what is kept.
    pub(crate) mode: String,
    /// Whether what was read, and what was written, stays in RAM.
    pub(crate) buffered_read: bool,
    pub(crate) buffered_write: bool,
    /// What the cache holds of a volume that it lost, or was refused, and cannot push.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) stranded: Option<StrandedInfo>,
}

/// Dirty blocks that cannot be pushed.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct StrandedInfo {
    pub(crate) bytes: u64,
    /// How many ranges there are. The first ones follow.
    pub(crate) ranges: u64,
    pub(crate) first: Vec<DirtyRange>,
}

/// Neighbouring dirty blocks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct DirtyRange {
    pub(crate) offset_bytes: u64,
    pub(crate) length_bytes: u64,
    /// data, zero or lost.
    pub(crate) kind: String,
}

/// What a salvage wrote.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Salvaged {
    /// Bytes of data, of zeroes, and of what could not be read.
    pub(crate) data_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) lost_bytes: u64,
    pub(crate) ranges: u64,
    /// The list of them.
    pub(crate) map: PathBuf,
}

/// A snapshot in a list.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotLine {
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    pub(crate) created_unix_secs: u64,
    /// Number of the head that it is.
    pub(crate) head: u32,
    /// A deletion was begun.
    pub(crate) deleting: bool,
    /// Clients of this server can open it.
    pub(crate) served: bool,
    /// Volumes whose content lies in it.
    pub(crate) clones: Vec<String>,
}

/// Where the store has an object of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ObjectMap {
    pub(crate) object: u32,
    /// Where it lies in the volume.
    pub(crate) offset_bytes: u64,
    pub(crate) length_bytes: u64,
    pub(crate) stretches: Vec<ObjectStretch>,
}

/// A part of an object.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ObjectStretch {
    /// In the volume.
    pub(crate) offset_bytes: u64,
    pub(crate) length_bytes: u64,
    /// The pack that has it, and where; nothing, if it is all zeroes.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) pack: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) pack_offset_bytes: Option<u64>,
}

/// Where two images of a volume differ.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Changes {
    pub(crate) uuid: String,
    /// Numbers of their heads.
    pub(crate) from: u32,
    pub(crate) to: u32,
    /// Their sizes in blocks.
    pub(crate) from_blocks: u64,
    pub(crate) to_blocks: u64,
    /// First block, blocks, and whether they are zeroes now.
    pub(crate) changes: Vec<(u64, u64, bool)>,
    /// The map page to go on with.
    pub(crate) next: Option<u32>,
}

/// A volume in the tree.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct TreeNode {
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    /// Host of the owner, if there is one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) owner: Option<String>,
    pub(crate) snapshots: Vec<TreeSnapshot>,
}

/// A snapshot in the tree.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct TreeSnapshot {
    pub(crate) name: String,
    pub(crate) clones: Vec<TreeNode>,
}

/// How the pushes of a volume go.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct PushInfo {
    /// idle, claiming, clean, dirty, pushing, ...
    pub(crate) phase: String,
    /// Bytes that are still to be put, and how long that takes at the rate of the last seconds, if
    /// there is one. Dirty bytes that are put count as dirty until the commit.
    pub(crate) backlog_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) backlog_seconds: Option<u64>,
    /// That rate.
    pub(crate) bytes_per_second: u64,
    /// Age of the oldest block that is not committed. With the volume's dirty bytes: what would be
    /// lost now with the cache device.
    pub(crate) dirty_seconds: u64,
    /// Store operations that wait to be tried again.
    pub(crate) retrying: u64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) last_failure: Option<String>,
    /// Bytes of blocks committed since the start, and bytes put for it.
    pub(crate) pushed_bytes: u64,
    pub(crate) put_bytes: u64,
}

/// What a deletion removed from the store.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Deleted {
    pub(crate) objects: u64,
    pub(crate) bytes: u64,
}

/// What a scrub found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Scrubbed {
    /// Read from the cache device.
    pub(crate) checked_bytes: u64,
    /// Of these: not to be read, or not as their checksums say.
    pub(crate) damaged_blocks: u64,
    /// Of these: there again, from RAM or the store. The others had not been pushed yet, or the
    /// store could not give them.
    pub(crate) repaired_blocks: u64,
}

/// What a purge dropped.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Purged {
    pub(crate) dirty_bytes: u64,
    pub(crate) clean_bytes: u64,
}

/// What a resize did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Resized {
    /// The size before, and now.
    pub(crate) old_bytes: u64,
    pub(crate) new_bytes: u64,
    /// What the process takes now.
    pub(crate) resident_bytes: u64,
}

/// What the server takes of memory.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ServerMemory {
    /// What it may take, as it was told.
    pub(crate) target_bytes: u64,
    /// What it takes at most now.
    pub(crate) taken_bytes: u64,
    /// Of these: pages for data, for logs and for what clients write.
    pub(crate) arena_bytes: u64,
    /// Of these: pages that no shard has.
    pub(crate) pool_bytes: u64,
    /// Of these: the shards' tables and their metadata.
    pub(crate) table_bytes: u64,
    /// What the system says that the process takes.
    pub(crate) resident_bytes: u64,
}

/// How full the cache is.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct CacheInfo {
    pub(crate) path: String,
    pub(crate) device_bytes: u64,
    pub(crate) shards: u16,
    pub(crate) server_memory: ServerMemory,
    pub(crate) nvme_bytes: u64,
    pub(crate) nvme_capacity_bytes: u64,
    pub(crate) ram_bytes: u64,
    pub(crate) ram_capacity_bytes: u64,
    pub(crate) dirty_bytes: u64,
    /// Dirty, but of volumes that this server does not have (any more).
    pub(crate) stranded_bytes: u64,
    pub(crate) onodes: u64,
    /// Since the start. Reads by where they were found.
    pub(crate) read_bytes: u64,
    pub(crate) read_ram_bytes: u64,
    pub(crate) read_nvme_bytes: u64,
    pub(crate) fetched_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) pushed_bytes: u64,
    pub(crate) moved_bytes: u64,
    pub(crate) dropped_bytes: u64,
    pub(crate) device_flushes: u64,
    pub(crate) device_errors: u64,
    pub(crate) damaged_blocks: u64,
    pub(crate) lost_blocks: u64,
}

/// Everything that is counted of the cache. Where BlueStore counts the same, the name is the same.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct CacheReport {
    #[serde(flatten)]
    pub(crate) cache: CacheInfo,
    /// Of all shards together.
    pub(crate) memory: MemoryInfo,
    pub(crate) windows: Windows<ShardCounts>,
    pub(crate) by_shard: Vec<ShardReport>,
    pub(crate) by_volume: Vec<VolumeReport>,
}

/// Everything that is counted of one shard.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ShardReport {
    pub(crate) shard: u16,
    pub(crate) dirty_bytes: u64,
    pub(crate) memory: MemoryInfo,
    pub(crate) windows: Windows<ShardCounts>,
}

/// Everything that is counted of one volume.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct VolumeReport {
    pub(crate) name: String,
    pub(crate) dirty_bytes: u64,
    pub(crate) windows: Windows<TrafficCounts>,
}

/// What is in RAM now.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct MemoryInfo {
    pub(crate) policy: String,
    pub(crate) onodes: u64,
    /// Dirty or in use: not to be evicted now.
    pub(crate) onodes_pinned: u64,
    /// Blocks in RAM, and their bytes. They are on a list, or in flight, or pinned by a read.
    pub(crate) buffers: u64,
    pub(crate) buffer_bytes: u64,
    pub(crate) warm_in_bytes: u64,
    pub(crate) hot_bytes: u64,
    /// Ghosts: blocks that were on warm_in a short time ago. They have no bytes.
    pub(crate) warm_out: u64,
    pub(crate) writing_bytes: u64,
    pub(crate) filling_bytes: u64,
    /// In use by reads, on a list or not.
    pub(crate) pinned_bytes: u64,
    /// Replaced or discarded, but still in use.
    pub(crate) detached_bytes: u64,
    /// In no buffer.
    pub(crate) free_bytes: u64,
    /// Of onodes and what they say of blocks.
    pub(crate) meta_bytes: u64,
    /// The bytes of buffers and of metadata by the time since their last use: less than 1 s, 1 to
    /// 2, 2 to 6, 6 to 24, 24 to 120, 120 to 720, longer.
    pub(crate) buffer_age_bytes: [u64; WINDOWS],
    pub(crate) meta_age_bytes: [u64; WINDOWS],
}

/// The same counts over three spans of time.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Windows<T> {
    pub(crate) last_10s: Window<T>,
    pub(crate) last_5m: Window<T>,
    pub(crate) since_start: Window<T>,
}

/// Counts over some time.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Window<T> {
    /// How long ago it began: 10 to 12, 300 to 320, or less if the server is younger. From there
    /// the counts are exact.
    pub(crate) seconds: f64,
    #[serde(flatten)]
    pub(crate) counts: T,
}

/// What clients used. A buffer is a block of 4 KiB.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct TrafficCounts {
    /// Read by clients.
    pub(crate) read_bytes: u64,
    /// Needed (read, asked for by NBD_CMD_CACHE, or written in part), and in RAM or on the way.
    pub(crate) buffer_hits: u64,
    pub(crate) buffer_hit_bytes: u64,
    /// Needed, and taken from NVMe or the store.
    pub(crate) buffer_misses: u64,
    pub(crate) buffer_miss_bytes: u64,
    /// Of the misses: from NVMe, from the store.
    pub(crate) nvme_bytes: u64,
    pub(crate) store_bytes: u64,
    /// Needed, and known to be zeroes: neither hit nor miss.
    pub(crate) zero_bytes: u64,
    /// Fetched from the store, readahead included.
    pub(crate) fetched_bytes: u64,
    pub(crate) written_bytes: u64,
}

/// What shards did.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ShardCounts {
    #[serde(flatten)]
    pub(crate) traffic: TrafficCounts,
    /// Lookups of objects.
    pub(crate) onode_hits: u64,
    pub(crate) onode_misses: u64,
    pub(crate) onode_evictions: u64,
    /// Buffers that became hot because their ghost was there.
    pub(crate) promotions: u64,
    /// Buffers that lost their place in RAM, by what for.
    pub(crate) evictions: Evictions,
    pub(crate) records: u64,
    pub(crate) device_flushes: u64,
    pub(crate) pushed_bytes: u64,
    pub(crate) moved_bytes: u64,
    pub(crate) dropped_bytes: u64,
    pub(crate) device_errors: u64,
    pub(crate) damaged_blocks: u64,
    pub(crate) lost_blocks: u64,
}

/// Buffers that lost their place in RAM. Those that new data replaced are not among them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Evictions {
    /// To make room for another buffer, as the policy says.
    pub(crate) policy: u64,
    /// Because the shard's share of memory became smaller, as the policy says.
    pub(crate) resize: u64,
    /// Of both: in use less than 24 s before. The cache is too small for what is asked of it.
    pub(crate) young: u64,
    /// With their onode, to make room for another object.
    pub(crate) onode: u64,
    /// Discarded, zeroed, or of a volume that was removed.
    pub(crate) discard: u64,
    /// By `heeler cache purge`.
    pub(crate) purge: u64,
}

/// What one core did.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct CoreInfo {
    pub(crate) cpu: u32,
    pub(crate) shards: Vec<u16>,
    pub(crate) connections: u64,
    pub(crate) requests: u64,
    pub(crate) mails: u64,
}

/// What was asked of the store.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct StoreInfo {
    pub(crate) url: String,
    /// Whether the store keeps a second writer out: on; off, and why; or not known yet.
    pub(crate) fencing: String,
    /// How long no request has succeeded, and what the last failure was.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) failing_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) failure: Option<String>,
    pub(crate) gets: u64,
    pub(crate) get_bytes: u64,
    pub(crate) puts: u64,
    pub(crate) put_bytes: u64,
    pub(crate) deletes: u64,
    pub(crate) lists: u64,
    pub(crate) retries: u64,
    pub(crate) failures: u64,
    /// Puts and deletes that may be under way now, by how the store keeps up, and those that are.
    pub(crate) puts_max: u32,
    pub(crate) puts_now: u32,
    /// Requests that wait for their turn, or for the store to come back.
    pub(crate) waiting: u64,
    /// For how long the store has not answered, if so, and what it said last.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) away_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) away_reason: Option<String>,
}

/// Everything at a glance.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) uptime_seconds: u64,
    pub(crate) draining: bool,
    pub(crate) listen: Vec<String>,
    pub(crate) cores: Vec<CoreInfo>,
    pub(crate) store: StoreInfo,
    pub(crate) cache: CacheInfo,
    pub(crate) volumes: Vec<VolumeLine>,
}
