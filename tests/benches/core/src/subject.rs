//! What is measured: heeler's cache and its peers, each behind the same two lines of code.

use heeler_core::buffer::BlockAddr;
use heeler_core::cache::{self, CacheStorage};
use heeler_core::ids::VolumeId;
use heeler_core::limits::{LEAF_BLOCKS, OBJECT_BLOCKS_MAX};
use heeler_core::onode::{Leaf, Onode, Present, Row};
use heeler_core::policy::Policy;

use crate::allocator;
use crate::workload::{OBJECT_BLOCKS, Room};

/// A cache under test.
trait Access {
    /// Looks `key` up and inserts it if it is not there; tells whether it was.
    fn access(&mut self, key: u64) -> bool;
}

/// Many accesses for one virtual call.
pub trait Run {
    /// Accesses the keys in order; returns how many were there.
    fn run(&mut self, keys: &[u32]) -> u64;
}

impl<C: Access> Run for C {
    fn run(&mut self, keys: &[u32]) -> u64 {
        keys.iter().map(|key| u64::from(self.access(u64::from(*key)))).sum()
    }
}

/// Makes a cache and lends it.
type Lend = Box<dyn Fn(Room, &mut dyn FnMut(&mut dyn Run))>;

pub struct Subject {
    pub name: String,
    /// It is heeler's, with this policy.
    pub ours: Option<Policy>,
    pub lend: Lend,
}

/// What a block in heeler's RAM takes, in bytes: its buffer, the ghosts for each buffer, and their
/// places in the leaves. The leaves' other parts belong to what is on NVMe, in RAM or not.
pub fn bytes_per_buffer(policy: Policy) -> f64 {
    let entries = Room::BUFFERS.entries;
    let before = allocator::bytes();
    let room = Room::BUFFERS;
    let mut storage = CacheStorage::new(entries as u32, room.objects, room.leaves);
    let cache = cache::Cache::new(&mut storage, entries as u32, policy);
    let tables = allocator::bytes() - before;
    drop(cache);
    let places = 1.0 + ghosts_per_buffer(policy);
    let place_bytes = (size_of::<Row>() + size_of::<Present>()) as f64 / LEAF_BLOCKS as f64;
    tables as f64 / entries as f64 + places * place_bytes
}

/// What a block on NVMe takes in RAM, in bytes, when all of its object is there: its part of a
/// leaf, the row for its buffer that the leaf has whether it is used or not, its part of the onode,
/// and the log's reference back to it.
pub fn bytes_per_nvme_block() -> f64 {
    let leaf = size_of::<Leaf>() + size_of::<Row>() + size_of::<Present>();
    let back = size_of::<BlockAddr>() as f64;
    leaf as f64 / LEAF_BLOCKS as f64 + size_of::<Onode>() as f64 / OBJECT_BLOCKS_MAX as f64 + back
}

/// After a scan, which leaves as many ghosts as there can be.
fn ghosts_per_buffer(policy: Policy) -> f64 {
    let Room { entries, objects, leaves } = Room::NEIGHBOURS;
    let mut storage = CacheStorage::new(entries as u32, objects, leaves);
    let mut cache = cache::Cache::new(&mut storage, entries as u32, policy);
    cache.run(&(0..4 * entries as u32).collect::<Vec<_>>());
    f64::from(cache.buffers().usage().ghosts) / entries as f64
}

impl Subject {
    fn heeler(policy: Policy) -> Self {
        let lend = move |room: Room, user: &mut dyn FnMut(&mut dyn Run)| {
            let pages = room.entries as u32;
            let mut storage = CacheStorage::new(pages, room.objects, room.leaves);
            user(&mut cache::Cache::new(&mut storage, pages, policy));
        };
        Self { name: format!("heeler-{}", policy.name()), ours: Some(policy), lend: Box::new(lend) }
    }

    fn peer<C: Access>(name: &str, make: impl Fn(usize) -> C + 'static) -> Self {
        let lend = move |room: Room, user: &mut dyn FnMut(&mut dyn Run)| {
            user(&mut make(room.entries));
        };
        Self { name: name.into(), ours: None, lend: Box::new(lend) }
    }
}

/// Everything that can be measured; heeler's default policy first.
pub fn all() -> Vec<Subject> {
    let default = Policy::default();
    let others = Policy::ALL.iter().copied().filter(|policy| *policy != default);
    let ours = std::iter::once(default).chain(others).map(Subject::heeler);
    ours.chain(peers()).collect()
}

fn peers() -> Vec<Subject> {
    vec![
        Subject::peer(QUICK_CACHE, quick_cache::unsync::Cache::<u64, u64>::new),
        Subject::peer("quick_cache-sync", quick_cache::sync::Cache::<u64, u64>::new),
        Subject::peer(SCHNELLRU, |capacity| {
            schnellru::LruMap::<u64, u64>::new(schnellru::ByLength::new(capacity as u32))
        }),
        Subject::peer("lru", |capacity| {
            lru::LruCache::<u64, u64>::new(capacity.try_into().expect("a cache holds something"))
        }),
        Subject::peer("hashlink", hashlink::LruCache::<u64, u64>::new),
        Subject::peer("mini-moka", |capacity| {
            mini_moka::unsync::Cache::<u64, u64>::new(capacity as u64)
        }),
        Subject::peer("moka", |capacity| moka::sync::Cache::<u64, u64>::new(capacity as u64)),
        Subject::peer("foyer", |capacity| foyer(capacity, foyer_memory::LruConfig::default())),
        Subject::peer("foyer-s3fifo", |capacity| {
            foyer(capacity, foyer_memory::S3FifoConfig::default())
        }),
    ]
}

/// The peers that bounds are taken from.
pub const QUICK_CACHE: &str = "quick_cache";
pub const SCHNELLRU: &str = "schnellru";

type Foyer = foyer_memory::Cache<u64, u64>;

/// One shard: there is one thread.
fn foyer(capacity: usize, eviction: impl Into<foyer_memory::EvictionConfig>) -> Foyer {
    foyer_memory::CacheBuilder::new(capacity).with_shards(1).with_eviction_config(eviction).build()
}

impl Access for cache::Cache<'_> {
    fn access(&mut self, key: u64) -> bool {
        let (object, first) = (key / OBJECT_BLOCKS, (key % OBJECT_BLOCKS) as u16);
        let access = cache::Access {
            volume: VolumeId(0),
            object: object as u32,
            first,
            count: 1,
            write: false,
        };
        self.access(access) == 1
    }
}

/// Implements `Access` by the peer's own `get` and `insert`.
macro_rules! get_then_insert {
    ($($cache:ty),* $(,)?) => {$(
        impl Access for $cache {
            fn access(&mut self, key: u64) -> bool {
                let hit = self.get(&key).is_some();
                if !hit {
                    self.insert(key, key);
                }
                hit
            }
        }
    )*};
}

get_then_insert! {
    quick_cache::unsync::Cache<u64, u64>,
    quick_cache::sync::Cache<u64, u64>,
    schnellru::LruMap<u64, u64>,
    hashlink::LruCache<u64, u64>,
    mini_moka::unsync::Cache<u64, u64>,
    moka::sync::Cache<u64, u64>,
    Foyer,
}

impl Access for lru::LruCache<u64, u64> {
    fn access(&mut self, key: u64) -> bool {
        let hit = self.get(&key).is_some();
        if !hit {
            self.put(key, key);
        }
        hit
    }
}
