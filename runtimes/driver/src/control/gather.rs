//! Gathering: blocks out of many packs, verified, side by side in memory, so that they can go out
//! as one pack. Each keeper does one at a time, of at most 8 MiB.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use heeler_core::ids::BLOCK_BYTES;
use heeler_core::keeper::{PackRead, StoreOp};
use heeler_core::wire::names::Uuid;

use super::StoreAnswer;
use super::fetch::pieces;

/// Whose it is: a volume, its life, and the operation.
pub(super) type Whose = (Uuid, u64, StoreOp);

/// A read of a pack for a gathering.
#[derive(Debug)]
pub(super) struct Part {
    gather: u64,
    pub(super) plan: PackRead,
}

/// How a gathering ended.
#[derive(Debug)]
pub(super) enum Gathered {
    Blocks(Bytes),
    Failed { transient: bool, text: String },
}

#[derive(Debug)]
struct Gather {
    whose: Whose,
    blocks: BytesMut,
    left: usize,
    failure: Option<(bool, String)>,
}

/// Those under way.
#[derive(Debug, Default)]
pub(super) struct Gathers {
    gathers: BTreeMap<u64, Gather>,
    next: u64,
}

impl Gathers {
    /// Begins one; its reads must be sent to the store.
    pub(super) fn begin(&mut self, whose: Whose, blocks: u16, reads: Vec<PackRead>) -> Vec<Part> {
        let gather = self.next;
        self.next += 1;
        let blocks = BytesMut::zeroed(usize::from(blocks) * BLOCK_BYTES);
        assert!(!reads.is_empty(), "there is something to gather");
        let left = reads.len();
        self.gathers.insert(gather, Gather { whose, blocks, left, failure: None });
        reads.into_iter().map(|plan| Part { gather, plan }).collect()
    }

    /// The store's answer to a read. `Some` if that was the last one.
    pub(super) fn handle(&mut self, part: &Part, answer: StoreAnswer) -> Option<(Whose, Gathered)> {
        let gather = self.gathers.get_mut(&part.gather).expect("it ends with its last read");
        let failure = match answer {
            StoreAnswer::Got(bytes) => match pieces(&part.plan, &bytes) {
                Ok(pieces) => {
                    for piece in pieces {
                        let at = usize::from(piece.at) * BLOCK_BYTES;
                        gather.blocks[at..at + piece.bytes.len()].copy_from_slice(&piece.bytes);
                    }
                    None
                }
                Err(why) => Some((true, format!("pack {} {why}", part.plan.key))),
            },
            StoreAnswer::Failed { transient, text } => Some((transient, text)),
            _ => Some((true, format!("pack {} is missing in the store", part.plan.key))),
        };
        gather.failure = gather.failure.take().or(failure);
        gather.left -= 1;
        if gather.left > 0 {
            return None;
        }
        let gather = self.gathers.remove(&part.gather).expect("just seen");
        let end = match gather.failure {
            None => Gathered::Blocks(gather.blocks.freeze()),
            Some((transient, text)) => Gathered::Failed { transient, text },
        };
        Some((gather.whose, end))
    }
}
