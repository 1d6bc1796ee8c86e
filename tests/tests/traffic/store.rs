//! A store in memory that counts what is asked of it. Blocks of packs are kept as their checksums
//! alone, so terabytes of them would fit.

use std::collections::BTreeMap;
use std::sync::Arc;

use heeler_core::ids::BLOCK_BYTES;
use heeler_core::wire::names::{ObjectName, parse_key};
use heeler_core::wire::pack::FIRST_COPY;

/// One object: the bytes that mean something, and the checksums of the blocks behind them.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) meta: Arc<[u8]>,
    pub(crate) crcs: Vec<u32>,
}

impl Object {
    pub(crate) fn bytes(&self) -> u64 {
        (self.meta.len() + self.crcs.len() * BLOCK_BYTES) as u64
    }
}

/// Requests and their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Count {
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
}

impl Count {
    pub(crate) fn add(&mut self, bytes: u64) {
        self.requests += 1;
        self.bytes += bytes;
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self { requests: self.requests + other.requests, bytes: self.bytes + other.bytes }
    }
}

/// What was asked of the store, by what for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Counts {
    /// Ranged reads of packs for clients.
    pub(crate) fetches: Count,
    /// Map pages and heads that were read.
    pub(crate) meta_gets: Count,
    /// Reads of packs to copy what is live in them, their headers included.
    pub(crate) copy_gets: Count,
    /// Packs of pushes.
    pub(crate) packs: Count,
    /// Packs of copies.
    pub(crate) copies: Count,
    pub(crate) pages: Count,
    pub(crate) heads: Count,
    pub(crate) deletes: u64,
}

impl Counts {
    pub(crate) fn gets(&self) -> Count {
        self.fetches.plus(self.meta_gets).plus(self.copy_gets)
    }

    pub(crate) fn puts(&self) -> Count {
        self.packs.plus(self.copies).plus(self.pages).plus(self.heads)
    }
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Store {
    objects: BTreeMap<String, Object>,
    /// Bytes of all objects.
    bytes: u64,
    /// The most there ever were.
    pub(crate) bytes_peak: u64,
    pub(crate) counts: Counts,
}

impl Store {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Begins to count from nothing.
    pub(crate) fn reset(&mut self) {
        self.counts = Counts::default();
        self.bytes_peak = self.bytes;
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Object> {
        self.objects.get(key)
    }

    /// Counts the reading of the bytes before a pack's blocks, or of all of another object.
    pub(crate) fn read_meta(&mut self, key: &str, first: Option<u32>) -> Option<Arc<[u8]>> {
        let meta = self.objects.get(key)?.meta.clone();
        let bytes = first.map_or(meta.len(), |first| meta.len().min(first as usize));
        match parse_key(key) {
            Some((_, ObjectName::Pack { .. })) => self.counts.copy_gets.add(bytes as u64),
            _ => self.counts.meta_gets.add(bytes as u64),
        }
        Some(meta[..bytes].into())
    }

    pub(crate) fn put(&mut self, key: &str, object: Object) {
        let bytes = object.bytes();
        match parse_key(key) {
            Some((_, ObjectName::Pack { n, .. })) if n >= FIRST_COPY => {
                self.counts.copies.add(bytes);
            }
            Some((_, ObjectName::Pack { .. })) => self.counts.packs.add(bytes),
            Some((_, ObjectName::Map { .. })) => self.counts.pages.add(bytes),
            _ => self.counts.heads.add(bytes),
        }
        self.bytes += bytes;
        let before = self.objects.insert(key.into(), object);
        self.bytes -= before.map_or(0, |before| before.bytes());
        self.bytes_peak = self.bytes_peak.max(self.bytes);
    }

    pub(crate) fn delete(&mut self, key: &str) {
        self.counts.deletes += 1;
        self.bytes -= self.objects.remove(key).map_or(0, |gone| gone.bytes());
    }

    pub(crate) fn list(&self, prefix: &str) -> Vec<(String, u64)> {
        let found = self.objects.range(prefix.to_owned()..);
        found
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, object)| (key.clone(), object.bytes()))
            .collect()
    }
}
