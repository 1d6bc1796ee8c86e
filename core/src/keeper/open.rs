//! Between the claim and the first request: the headers of the tail's packs are read, because they
//! are the newest part of the map.

use alloc::collections::BTreeMap;

use super::changes::Changes;
use super::map::Map;
use super::store::{Call, Fault, Io, Request, Task};
use super::{Refusal, StoreResult};
use crate::ids::BLOCK_BYTES;
use crate::wire::frame::FormatError;
use crate::wire::head::{Head, TailPack};
use crate::wire::{names, pack};

/// Headers that are read at the same time at most.
const LOADS_MAX: usize = 16;

/// An image whose tail is being read.
#[derive(Debug)]
pub(super) struct Opening {
    /// What begins next, and what has come, by place in the tail.
    next: usize,
    headers: BTreeMap<usize, pack::Header>,
    failures: u32,
}

/// An image that is complete.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) map: Map,
    /// Bytes of data in the tail's packs.
    pub(super) tail_bytes: u64,
}

impl Opening {
    /// Begins to read. [`finish`](Self::finish) says when all is there: maybe at once.
    pub(super) fn start(io: &mut Io<'_>, head: &Head) -> Self {
        let mut opening = Self { next: 0, headers: BTreeMap::new(), failures: 0 };
        for _ in 0..LOADS_MAX {
            opening.read_next(io, head);
        }
        opening
    }

    fn read_next(&mut self, io: &mut Io<'_>, head: &Head) {
        if let Some(pack) = head.tail.get(self.next) {
            let key = names::pack_key(head.volume_of(pack.source), pack.epoch, pack.n);
            let call = Call::GetFirst(key, pack.header_bytes.into());
            io.start(Task::LoadTail { at: self.next }, call);
            self.next += 1;
        }
    }

    /// The end of a read. An error: the image cannot be had.
    pub(super) fn handle_done(
        &mut self,
        io: &mut Io<'_>,
        head: &Head,
        request: Request,
        result: StoreResult<'_>,
    ) -> Result<(), Refusal> {
        let Task::LoadTail { at } = request.task else { unreachable!("only headers are read") };
        let key = || {
            let pack = head.tail[at];
            names::pack_key(head.volume_of(pack.source), pack.epoch, pack.n)
        };
        let refusal = match result {
            StoreResult::Got(bytes) => match header(bytes, io, head, at) {
                Ok(header) => {
                    self.headers.insert(at, header);
                    self.read_next(io, head);
                    return Ok(());
                }
                Err(error) => Refusal::Corrupt { key: key(), error },
            },
            StoreResult::Failed { transient, note } => {
                io.again(request, Fault { transient, note: Some(note) });
                return Ok(());
            }
            _ => Refusal::Missing { key: key() },
        };
        self.failures += 1;
        if self.failures == io.config.load_attempts_max {
            return Err(refusal);
        }
        io.again(request, Fault::WRONG);
        Ok(())
    }

    /// The image, if all of it is there.
    pub(super) fn finish(&mut self, head: &Head) -> Option<Opened> {
        if self.headers.len() < head.tail.len() {
            return None;
        }
        let mut opened = Opened { map: Map::default(), tail_bytes: 0 };
        for (pack, header) in head.tail.iter().zip(self.headers.values()) {
            let changes = changes(head, *pack, header).expect("checked when it came");
            opened.map.absorb(&changes);
            opened.tail_bytes += (header.crcs.len() * BLOCK_BYTES) as u64;
        }
        Some(opened)
    }
}

/// What a pack of the tail changes; `None` if no pack of ours would say that.
fn changes(head: &Head, pack: TailPack, header: &pack::Header) -> Option<Changes> {
    let object_blocks = head.object_blocks();
    let inside = |run: &pack::Run| u32::from(run.first) + u32::from(run.count) <= object_blocks;
    let mut changes = Changes::default();
    changes.add(head, pack, header);
    (header.runs.iter().all(inside) && changes.sort()).then_some(changes)
}

fn header(bytes: &[u8], io: &Io<'_>, head: &Head, at: usize) -> Result<pack::Header, FormatError> {
    let pack = head.tail[at];
    let header = pack::Header::decode(bytes, io.config.crc32c)?;
    let same = header.volume == head.volume_of(pack.source)
        && (header.epoch, header.n) == (pack.epoch, pack.n)
        && header.bytes() == pack.header_bytes;
    if !same {
        return Err(FormatError::Field { at: 16, what: "identity of a pack" });
    }
    match changes(head, pack, &header) {
        Some(_) => Ok(header),
        None => Err(FormatError::Field { at: pack::FIXED_BYTES, what: "run" }),
    }
}
