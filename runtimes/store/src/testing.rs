//! Stores for the tests of this package.

use heeler_core::wire::names;

use crate::{Place, Store, StoreConfig};

/// An empty store in memory.
pub(crate) fn memory() -> Store {
    Store::open(StoreConfig::new(Place::Memory)).expect("memory opens")
}

/// The keys of everything of volumes and names.
pub(crate) async fn keys(store: &Store) -> Vec<String> {
    let mut keys = Vec::new();
    for prefix in [names::VOLUMES_PREFIX, names::NAMES_PREFIX] {
        keys.extend(store.list(prefix).await.expect("lists").into_iter().map(|e| e.key));
    }
    keys
}
