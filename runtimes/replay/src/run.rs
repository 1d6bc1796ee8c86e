//! A trace through the server's cache.

use heeler_core::cache::{Access, Cache, CacheStorage};
use heeler_core::policy::Policy;

use crate::trace::{Hits, Trace};

/// A cold cache that is being used. Its onodes never run out: pages alone bound it.
#[derive(Debug)]
pub struct Run<'a> {
    cache: Cache<'a>,
    hits: Hits,
}

impl<'a> Run<'a> {
    /// Memory for a run of `trace` in at most `pages` pages. One run after the other may use it.
    #[must_use]
    pub fn storage(trace: &Trace, pages: u32) -> CacheStorage {
        CacheStorage::new(pages, trace.objects(), trace.leaves())
    }

    /// A cache of `pages` pages (4 KiB), at most the storage's.
    #[must_use]
    pub fn new(storage: &'a mut CacheStorage, pages: u32, policy: Policy) -> Self {
        Self { cache: Cache::new(storage, pages, policy), hits: Hits::default() }
    }

    /// Replays a piece of a trace. Returns the references that were in it.
    pub fn feed(&mut self, accesses: &[Access]) -> u64 {
        let mut references = 0;
        for access in accesses {
            let hits = u64::from(self.cache.access(*access));
            self.hits.all += hits;
            if !access.write {
                self.hits.reads += hits;
            }
            references += u64::from(access.count);
        }
        references
    }

    /// What was found in the cache so far.
    #[must_use]
    pub fn hits(&self) -> Hits {
        self.hits
    }
}
