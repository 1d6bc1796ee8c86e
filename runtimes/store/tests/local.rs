//! The stores that need no server: memory and a directory.

mod contract;

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use heeler_store::{Place, PutPayload, Store, StoreConfig};

/// Stores in this process, one for each prefix.
#[derive(Default)]
struct Memory(Mutex<HashMap<String, Store>>);

impl contract::Place for Memory {
    fn store(&self, prefix: &str) -> Store {
        let open = || Store::open(StoreConfig::new(Place::Memory)).expect("memory opens");
        self.0.lock().expect("not poisoned").entry(prefix.into()).or_insert_with(open).clone()
    }
}

/// A directory of this test's own; removed when the test succeeds.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("store-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory for the test");
        Self(path)
    }
}

impl contract::Place for Directory {
    fn store(&self, prefix: &str) -> Store {
        let url = format!("file://{}/{prefix}", self.0.display());
        let config = StoreConfig::parse(&url, Default::default()).expect("parses");
        Store::open(config).expect("opens")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    contract::keep(&Memory::default()).await;
}

#[tokio::test]
async fn a_directory_keeps_the_contract() {
    contract::keep(&Directory::new("contract")).await;
}

/// What a crash leaves of a put is neither listed nor in the way, and goes with time.
#[tokio::test]
async fn leftovers_of_a_directory_go() {
    let directory = Directory::new("leftovers");
    let store = contract::Place::store(&directory, "s");
    let key = "volumes/x/pack/0001";
    store.put(key, PutPayload::from_static(b"whole"), true).await.expect("creates");
    let at = |name: &str| directory.0.join("s/volumes/x/pack").join(name);
    let now = SystemTime::now();
    let old = now - Duration::from_secs(2 * 3600);
    for (name, time) in [("0001#1", old), ("0002#1", old), ("0002#2", now)] {
        let file = fs::File::create(at(name)).expect("a file");
        file.set_modified(time).expect("a file of that time");
    }
    assert_eq!(store.list("volumes").await.expect("lists").len(), 1);
    let next = "volumes/x/pack/0002";
    store.put(next, PutPayload::from_static(b"whole"), true).await.expect("creates");
    store.probe().await.expect("fit");
    assert!(!at("0001#1").exists() && !at("0002#1").exists(), "they would take room for ever");
    assert!(at("0002#2").exists(), "this one may be at work");
    assert_eq!(&store.get(key, None).await.expect("there")[..], b"whole");
}
