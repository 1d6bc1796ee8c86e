//! Requests to the store: from keepers and fetches, through the lanes, and back.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use heeler_core::event::{ToKeeper, ToShard};
use heeler_core::keeper::{BatchHandle, Input, StoreOp};
use heeler_core::time::Instant;
use heeler_core::wire::names::{ObjectName, parse_key};

use super::fetch::Read;
use super::lanes::{End, Lane};
use super::volume::Volume;
use super::{Control, Pending, StoreAnswer, StoreIo, TableIo, Token};

/// What is asked of the store.
#[derive(Debug)]
pub(super) enum Job {
    Get { key: String, range: Option<Range<u64>> },
    Put { key: String, pieces: Vec<Bytes> },
    Create { key: String, bytes: Bytes },
    List { prefix: String },
    Delete { key: String },
}

impl<S: StoreIo, T: TableIo> Control<S, T> {
    /// What a keeper asks. It goes out when the lanes say so.
    pub(super) fn keeper_ask(
        &mut self,
        now: Instant,
        index: usize,
        op: StoreOp,
        lane: Lane,
        job: Job,
    ) {
        let volume = &mut self.volumes[index];
        volume.ops += 1;
        let pending = Pending::Keeper { volume: volume.uuid, life: volume.life, op };
        self.ask(now, pending, lane, job);
    }

    /// Heads are part of claims and commits; for anything else a client may wait.
    pub(super) fn keeper_get(
        &mut self,
        now: Instant,
        index: usize,
        op: StoreOp,
        key: String,
        first: Option<u32>,
    ) {
        let head = matches!(parse_key(&key), Some((_, ObjectName::Head { .. })));
        let lane = if head { Lane::Head } else { Lane::Read };
        let range = first.map(|first| 0..u64::from(first));
        self.keeper_ask(now, index, op, lane, Job::Get { key, range });
    }

    pub(super) fn keeper_put(
        &mut self,
        now: Instant,
        index: usize,
        op: StoreOp,
        key: String,
        meta: Arc<[u8]>,
        batches: &[BatchHandle],
    ) {
        let blocks = batches.iter().map(|batch| self.batches[batch].bytes.clone());
        let pieces: Vec<_> = std::iter::once(Bytes::from_owner(meta)).chain(blocks).collect();
        let volume = &self.volumes[index];
        let lane = Lane::Push {
            flow: volume.life,
            bytes: pieces.iter().map(|piece| piece.len() as u64).sum(),
            backlog: (!batches.is_empty()).then(|| volume.keeper.status().backlog_bytes),
        };
        self.keeper_ask(now, index, op, lane, Job::Put { key, pieces });
    }

    pub(super) fn keeper_delete(&mut self, now: Instant, index: usize, op: StoreOp, key: String) {
        let lane = Lane::Push { flow: self.volumes[index].life, bytes: 0, backlog: None };
        self.keeper_ask(now, index, op, lane, Job::Delete { key });
    }

    /// A request of anybody.
    pub(super) fn ask(&mut self, now: Instant, pending: Pending, lane: Lane, job: Job) {
        let token = self.token(pending);
        self.lanes.add(now, token, lane, job);
    }

    /// A ranged read of a pack, for a fetch.
    pub(super) fn send_read(&mut self, now: Instant, read: Read) {
        let (key, from) = (read.plan.key.clone(), read.plan.offset);
        let to = from + u64::from(read.plan.len);
        let job = Job::Get { key, range: Some(from..to) };
        self.ask(now, Pending::Read(read), Lane::Read, job);
    }

    fn token(&mut self, pending: Pending) -> Token {
        self.tokens += 1;
        self.pending.insert(Token(self.tokens), pending);
        Token(self.tokens)
    }

    /// Sends out what may go to the store now.
    pub(super) fn send_requests(&mut self, now: Instant) {
        while let Some((token, text)) = self.lanes.poll_overdue(now) {
            self.handle_answer(now, token, StoreAnswer::Failed { transient: true, text });
        }
        while let Some((token, job)) = self.lanes.poll_ready(now) {
            match job {
                Job::Get { key, range } => self.store.get(token, &key, range),
                Job::Put { key, pieces } => self.store.put(token, &key, pieces, false),
                Job::Create { key, bytes } => self.store.put(token, &key, vec![bytes], true),
                Job::List { prefix } => self.store.list(token, &prefix),
                Job::Delete { key } => self.store.delete(token, &key),
            }
        }
    }

    /// Tells the lanes how a request ended.
    pub(super) fn end_request(&mut self, now: Instant, token: Token, answer: &StoreAnswer) {
        let end = match answer {
            StoreAnswer::Failed { transient: true, text } => End::Failed(text),
            _ => End::Answered,
        };
        self.lanes.handle_end(now, token, end);
    }

    /// Follows the pushes of a volume by what its shards are told. One that nobody waits for has as
    /// long as its oldest block waited for it to begin.
    pub(super) fn note_push(&mut self, now: Instant, index: usize, mail: ToShard) {
        let volume = &mut self.volumes[index];
        match mail {
            ToShard::Freeze { .. } => {
                let hurried = std::mem::take(&mut volume.hurried);
                let since = volume.keeper.status().dirty_since.unwrap_or(now);
                let end = (since + self.push_after + self.push_after).min(now + self.push_after);
                self.lanes.begin_push(now, volume.life, (!hurried).then_some(end));
            }
            ToShard::Committed { .. } => self.lanes.end_push(volume.life),
            _ => {}
        }
    }

    /// Notes what makes a push one that somebody waits for: the one that runs, and the next.
    pub(super) fn note_hurry(&mut self, index: usize, input: &Input<'_>) {
        let hurries = match input {
            Input::Shard(_, mail) => !matches!(
                mail,
                ToKeeper::Dirtied { .. }
                    | ToKeeper::Grown { .. }
                    | ToKeeper::Frozen { .. }
                    | ToKeeper::Pushed { .. }
            ),
            Input::Start(_)
            | Input::Remembered { .. }
            | Input::Batch { .. }
            | Input::Fetch { .. }
            | Input::Query { .. }
            | Input::StoreDone { .. }
            | Input::Tick => false,
            _ => true,
        };
        if hurries {
            let volume = &mut self.volumes[index];
            volume.hurried = true;
            self.lanes.hurry(volume.life);
        }
    }

    /// The volume's puts that have not gone out never will.
    pub(super) fn drop_puts(&mut self, index: usize) {
        let Volume { life, .. } = self.volumes[index];
        for token in self.lanes.cancel(life) {
            self.pending.remove(&token);
            self.volumes[index].ops -= 1;
        }
    }
}
