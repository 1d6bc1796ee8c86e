//! A store in memory whose operations end in any order, fail, lose answers, and outlive the
//! process that asked for them.

use std::collections::BTreeMap;

use heeler_core::ids::BLOCK_BYTES;
use heeler_core::keeper::PackRead;
use heeler_hw::sim::Rng;

#[derive(Clone, Debug)]
pub(crate) enum StoreOpKind {
    /// So many of the first bytes, or all.
    Get(Option<u32>),
    Put(Vec<u8>),
    Create(Vec<u8>),
    List,
    Delete,
    /// So many blocks, from these reads.
    Gather(u16, Vec<PackRead>),
}

#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) token: u64,
    pub(crate) key: String,
    pub(crate) kind: StoreOpKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Got(Vec<u8>),
    Listed(Vec<(String, u64)>),
    Gathered(Vec<u8>),
    Done,
    AlreadyExists,
    NotFound,
    Failed,
}

#[derive(Default)]
pub(crate) struct SimStore {
    pub(crate) objects: BTreeMap<String, Vec<u8>>,
    pub(crate) pending: Vec<Pending>,
    /// Writes of processes that are dead, on their way through the network.
    ghosts: Vec<Pending>,
    /// One in so many operations fails; 0: none.
    pub(crate) fail_one_in: u64,
}

impl SimStore {
    pub(crate) fn submit(&mut self, token: u64, key: String, kind: StoreOpKind) {
        self.pending.push(Pending { token, key, kind });
    }

    /// Ends one operation, any one.
    pub(crate) fn step(&mut self, rng: &mut Rng) -> Option<(u64, Answer)> {
        if !self.ghosts.is_empty() && rng.chance(1, 4) {
            let ghost = self.ghosts.swap_remove(rng.index(self.ghosts.len()));
            self.apply(&ghost);
        }
        if self.pending.is_empty() {
            return None;
        }
        let op = self.pending.swap_remove(rng.index(self.pending.len()));
        if self.fail_one_in > 0 && rng.chance(1, self.fail_one_in) {
            if rng.chance(1, 2) {
                self.apply(&op);
            }
            return Some((op.token, Answer::Failed));
        }
        let answer = self.apply(&op);
        Some((op.token, answer))
    }

    fn apply(&mut self, op: &Pending) -> Answer {
        match &op.kind {
            StoreOpKind::Get(first) => {
                let Some(bytes) = self.objects.get(&op.key) else { return Answer::NotFound };
                let len = first.map_or(bytes.len(), |first| bytes.len().min(first as usize));
                Answer::Got(bytes[..len].to_vec())
            }
            StoreOpKind::Put(bytes) => {
                self.objects.insert(op.key.clone(), bytes.clone());
                Answer::Done
            }
            StoreOpKind::Create(bytes) => {
                if self.objects.contains_key(&op.key) {
                    return Answer::AlreadyExists;
                }
                self.objects.insert(op.key.clone(), bytes.clone());
                Answer::Done
            }
            StoreOpKind::List => {
                let found = self.objects.iter().filter(|(key, _)| key.starts_with(&op.key));
                Answer::Listed(found.map(|(key, b)| (key.clone(), b.len() as u64)).collect())
            }
            StoreOpKind::Gather(blocks, reads) => {
                if reads.iter().any(|read| !self.objects.contains_key(&read.key)) {
                    return Answer::NotFound;
                }
                let mut gathered = vec![0; usize::from(*blocks) * BLOCK_BYTES];
                for read in reads {
                    let pack = &self.objects[&read.key][read.offset as usize..];
                    for part in &read.parts {
                        let bytes = part.crcs.len() * BLOCK_BYTES;
                        let (to, from) = (usize::from(part.first), part.at as usize);
                        gathered[to * BLOCK_BYTES..][..bytes]
                            .copy_from_slice(&pack[from * BLOCK_BYTES..][..bytes]);
                    }
                }
                Answer::Gathered(gathered)
            }
            StoreOpKind::Delete => {
                self.objects.remove(&op.key);
                Answer::Done
            }
        }
    }

    /// The process is gone: each of its operations may still happen, later.
    pub(crate) fn crash(&mut self, rng: &mut Rng) {
        for op in std::mem::take(&mut self.pending) {
            if rng.chance(1, 2) {
                self.ghosts.push(op);
            }
        }
    }
}
