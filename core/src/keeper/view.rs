//! A snapshot that is served: its head never changes, so it is claimed from nobody, and nothing is
//! written.

use alloc::boxed::Box;

use super::map::{Map, Wanted};
use super::open::Opening;
use super::store::{Call, Fault, Io, Request, Task};
use super::{Attached, Input, Output, Refusal, StoreResult};
use crate::event::ToShard;
use crate::wire::head::Head;
use crate::wire::names;

/// A snapshot on its way into the cache, or there.
#[derive(Debug)]
pub(super) struct View {
    number: u32,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Its head is being read.
    Reading,
    /// The headers of its tail are being read.
    Opening(Box<Head>, Opening),
    /// It is served.
    Open(Box<Head>, Map),
}

impl View {
    /// The snapshot whose head has this number.
    pub(super) fn new(io: &mut Io<'_>, number: u32) -> Self {
        let call = Call::Get(names::head_key(io.config.uuid, number));
        io.start(Task::ReadHead { number }, call);
        Self { number, state: State::Reading }
    }

    /// Whether it is served.
    pub(super) fn head(&self) -> Option<&Head> {
        if let State::Open(head, _) = &self.state { Some(head) } else { None }
    }

    /// Everything but the ends of store operations.
    pub(super) fn handle(&mut self, io: &mut Io<'_>, input: Input<'_>) {
        let (shard, op, object, blocks, gaps) = match input {
            Input::Fetch { shard, op, object, first, count, gaps } => {
                (shard, op, object, (first, count), Some(gaps))
            }
            Input::Query { shard, op, object, first, count } => {
                (shard, op, object, (first, count), None)
            }
            Input::Batch { batch, .. } => return io.out.push_back(Output::DropBatch(batch)),
            Input::PushNow { ticket } | Input::Edit { ticket, .. } => {
                return io.out.push_back(Output::PushDone { ticket, committed: false });
            }
            _ => return,
        };
        match &mut self.state {
            State::Open(head, map) => {
                map.want(io, head, Wanted::new(head, (shard, op), object, blocks, gaps));
            }
            _ if gaps.is_none() => io.out.push_back(Output::QueryFailed { shard, op }),
            _ => io.out.push_back(Output::FetchFailed { shard, op }),
        }
    }

    /// The end of a store operation. An error: the snapshot cannot be served.
    pub(super) fn handle_done(
        &mut self,
        io: &mut Io<'_>,
        request: Request,
        result: StoreResult<'_>,
    ) -> Result<(), Refusal> {
        match &mut self.state {
            State::Reading => return self.read(io, request, result),
            State::Opening(head, opening) => opening.handle_done(io, head, request, result)?,
            State::Open(head, map) => {
                let page = map.handle_done(io, head, request, result);
                assert!(page.is_none(), "nothing is folded into the pages of a snapshot");
            }
        }
        self.attach(io);
        Ok(())
    }

    fn read(
        &mut self,
        io: &mut Io<'_>,
        request: Request,
        result: StoreResult<'_>,
    ) -> Result<(), Refusal> {
        let key = || names::head_key(io.config.uuid, self.number);
        match result {
            StoreResult::Got(bytes) => {
                let head = Head::decode(bytes, io.config.uuid, self.number, io.config.crc32c);
                let head = head.map_err(|error| Refusal::Corrupt { key: key(), error })?;
                let opening = Opening::start(io, &head);
                self.state = State::Opening(Box::new(head), opening);
                self.attach(io);
                Ok(())
            }
            StoreResult::NotFound => Err(Refusal::Missing { key: key() }),
            StoreResult::Failed { transient: false, note } => Err(Refusal::Store { note }),
            StoreResult::Failed { transient, note } => {
                io.again(request, Fault { transient, note: Some(note) });
                Ok(())
            }
            _ => {
                io.again(request, Fault::WRONG);
                Ok(())
            }
        }
    }

    /// Serves it, if all of its map is there. What a cache has of it is good for ever.
    fn attach(&mut self, io: &mut Io<'_>) {
        let (head, map) = match core::mem::replace(&mut self.state, State::Reading) {
            State::Opening(head, mut opening) => match opening.finish(&head) {
                Some(opened) => (head, opened.map),
                None => return self.state = State::Opening(head, opening),
            },
            other => return self.state = other,
        };
        io.out.push_back(Output::Attached(Attached {
            volume: io.volume,
            name: head.name.clone(),
            blocks: head.blocks,
            object_shift: head.object_shift,
            created_unix_secs: head.written_unix_secs,
            settings: head.settings.clone(),
            parent: head.sources.first().copied(),
            ours: true,
            open: head.epoch.next(),
            committed: head.epoch,
        }));
        let mail = ToShard::Attach {
            volume: io.volume,
            object_shift: head.object_shift,
            blocks: head.blocks,
            open: head.epoch.next(),
            committed: head.epoch,
        };
        super::cycle::broadcast(io, mail);
        self.state = State::Open(head, map);
    }

    /// It is served no more.
    pub(super) fn let_go(&mut self, io: &mut Io<'_>) {
        if let State::Open(_, map) = &mut self.state {
            map.fail_all(io);
        }
    }
}
