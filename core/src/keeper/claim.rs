//! How a keeper gets its volume.
//!
//! ```text
//! Listing -> Reading -> decide -> Remembering -> Creating -> Verifying -> claimed
//!    ^          | gone                             |  |         | a newer head
//!    +----------+---- another was faster ----------+  |         |
//!    +------------------------------------------------+---------+
//! ```

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::store::{Call, Fault, Io, Request, Task};
use super::{Listed, Output, Owner, Refusal, Start, StoreResult};
use crate::ids::Epoch;
use crate::wire::head::{HOST_BYTES_MAX, Head};
use crate::wire::names::{self, Nonce, ObjectName, Uuid};

/// How often others may get in between before we give up.
const ATTEMPTS_MAX: u32 = 16;

/// A claim under way.
#[derive(Debug)]
pub(super) struct Claim {
    takeover: bool,
    cache: Uuid,
    /// Claims that were this cache's.
    expected: Vec<Nonce>,
    nonce: Nonce,
    dirty_blocks: u64,
    log_epoch: Epoch,
    host: String,
    attempts: u32,
    /// What the driver has been asked to remember: whether contents are kept.
    remembered: Option<bool>,
    /// The head to create, and the one it follows.
    next: Option<(Head, Head)>,
}

/// What comes of a step.
#[derive(Debug)]
pub(super) enum Step {
    /// More steps follow.
    Wait,
    /// The volume is ours.
    Claimed {
        head: Box<Head>,
        /// The head before, if it is of no more use.
        superseded: Option<u32>,
        /// The cache's contents are good.
        ours: bool,
    },
    /// It is not.
    Refused(Refusal),
}

impl Claim {
    pub(super) fn new(start: &Start<'_>, io: &mut Io<'_>) -> Self {
        let mut end = start.host.len().min(HOST_BYTES_MAX);
        while !start.host.is_char_boundary(end) {
            end -= 1;
        }
        let claim = Self {
            takeover: start.takeover,
            cache: start.cache,
            expected: start.expected.into(),
            nonce: start.nonce,
            dirty_blocks: start.dirty_blocks,
            log_epoch: start.log_epoch,
            host: start.host[..end].into(),
            attempts: 0,
            remembered: None,
            next: None,
        };
        list(io, Task::ListHeads);
        claim
    }

    /// The nonce is noted; the create may go out.
    pub(super) fn handle_remembered(&mut self, io: &mut Io<'_>) {
        if self.remembered == Some(false) {
            // The contents are gone, and with them every claim that kept them.
            self.expected.clear();
            self.dirty_blocks = 0;
            self.log_epoch = Epoch::ZERO;
        }
        self.create(io);
    }

    pub(super) fn handle_done(
        &mut self,
        io: &mut Io<'_>,
        request: Request,
        result: StoreResult<'_>,
    ) -> Step {
        if let StoreResult::Failed { transient, note } = result {
            return self.fail(io, request, Fault { transient, note: Some(note) });
        }
        match (request.task, result) {
            (Task::ListHeads, StoreResult::Listed(keys)) => match newest(io.config.uuid, keys) {
                Some(number) => {
                    read(io, Task::ReadHead { number }, number);
                    Step::Wait
                }
                None => Step::Refused(Refusal::NoVolume),
            },
            (Task::ReadHead { number }, StoreResult::Got(bytes)) => {
                match Head::decode(bytes, io.config.uuid, number, io.config.crc32c) {
                    Ok(head) => self.decide(io, head),
                    Err(error) => {
                        let key = names::head_key(io.config.uuid, number);
                        Step::Refused(Refusal::Corrupt { key, error })
                    }
                }
            }
            // Superseded and deleted since it was listed.
            (Task::ReadHead { .. }, StoreResult::NotFound) => self.restart(io),
            (Task::Claim, StoreResult::Done) => {
                list(io, Task::VerifyClaim);
                Step::Wait
            }
            (Task::Claim, StoreResult::AlreadyExists) => {
                let number = self.number();
                read(io, Task::ConfirmClaim, number);
                Step::Wait
            }
            (Task::ConfirmClaim, StoreResult::NotFound) => {
                self.create(io);
                Step::Wait
            }
            (Task::ConfirmClaim, StoreResult::Got(bytes)) => {
                match Head::decode(bytes, io.config.uuid, self.number(), io.config.crc32c) {
                    Ok(head) if head.nonce == self.nonce => {
                        list(io, Task::VerifyClaim);
                        Step::Wait
                    }
                    Ok(_) => self.restart(io),
                    Err(_) => self.fail(io, request, Fault::WRONG),
                }
            }
            (Task::VerifyClaim, StoreResult::Listed(keys)) => {
                match newest(io.config.uuid, keys).cmp(&Some(self.number())) {
                    core::cmp::Ordering::Equal => self.claimed(),
                    core::cmp::Ordering::Greater => self.restart(io),
                    core::cmp::Ordering::Less => self.fail(io, request, Fault::WRONG),
                }
            }
            _ => self.fail(io, request, Fault::WRONG),
        }
    }

    fn fail(&mut self, io: &mut Io<'_>, request: Request, fault: Fault) -> Step {
        match (fault, request.task) {
            (Fault { transient: false, note: Some(note) }, task) => {
                io.store.note(io.now, task, fault);
                return Step::Refused(Refusal::Store { note });
            }
            (_, Task::Claim) => {
                let call = Call::Get(names::head_key(io.config.uuid, self.number()));
                io.store.instead(io.now, request, fault, Task::ConfirmClaim, call);
            }
            _ => io.again(request, fault),
        }
        Step::Wait
    }

    fn restart(&mut self, io: &mut Io<'_>) -> Step {
        self.attempts += 1;
        if self.attempts == ATTEMPTS_MAX {
            return Step::Refused(Refusal::Contended);
        }
        list(io, Task::ListHeads);
        Step::Wait
    }

    /// Whether the newest head may be followed by our claim.
    fn decide(&mut self, io: &mut Io<'_>, head: Head) -> Step {
        let ours = self.expected.contains(&head.nonce) || head.nonce == self.nonce;
        if !ours && !self.takeover {
            if self.dirty_blocks > 0 {
                let (dirty_blocks, owner) = (self.dirty_blocks, owner(&head));
                return Step::Refused(Refusal::Stale { dirty_blocks, owner });
            }
            if !head.released {
                return Step::Refused(Refusal::Owned(owner(&head)));
            }
        }
        let Some(number) = head.number.checked_add(1).filter(|&number| number < u32::MAX) else {
            return Step::Refused(Refusal::Exhausted);
        };
        if ours && self.log_epoch.term() > head.term {
            return Step::Refused(Refusal::StoreIsOlder);
        }
        let next = Head {
            number,
            term: number,
            cache: self.cache,
            nonce: self.nonce,
            claimed_unix_secs: io.unix_secs,
            written_unix_secs: io.unix_secs,
            released: false,
            host: self.host.clone(),
            ..head.clone()
        };
        self.next = Some((next, head));
        // Contents that were given up once do not come back.
        let keep = ours && self.remembered != Some(false);
        if self.remembered == Some(keep) {
            self.create(io);
        } else {
            self.remembered = Some(keep);
            io.out.push_back(Output::Remember { nonce: self.nonce, ours: keep });
        }
        Step::Wait
    }

    fn create(&mut self, io: &mut Io<'_>) {
        let (head, _) = self.next.as_ref().expect("decided before it is created");
        let bytes: Arc<[u8]> = head.encode(io.config.crc32c).into();
        io.store.put_bytes += bytes.len() as u64;
        io.start(
            Task::Claim,
            Call::Create { key: names::head_key(head.volume, head.number), bytes },
        );
    }

    fn number(&self) -> u32 {
        self.next.as_ref().expect("decided before it is created").0.number
    }

    fn claimed(&mut self) -> Step {
        let (head, before) = self.next.take().expect("decided before it is created");
        let superseded = (!before.is_kept()).then_some(before.number);
        Step::Claimed { head: Box::new(head), superseded, ours: self.remembered == Some(true) }
    }
}

/// Who has the volume, by a head.
pub(super) fn owner(head: &Head) -> Owner {
    Owner { host: head.host.clone(), cache: head.cache, since_unix_secs: head.claimed_unix_secs }
}

fn list(io: &mut Io<'_>, task: Task) {
    let prefix = names::head_prefix(io.config.uuid);
    io.start(task, Call::List(prefix));
}

fn read(io: &mut Io<'_>, task: Task, number: u32) {
    let key = names::head_key(io.config.uuid, number);
    io.start(task, Call::Get(key));
}

fn newest(volume: Uuid, listed: &[Listed<'_>]) -> Option<u32> {
    listed
        .iter()
        .filter_map(|Listed { key, .. }| match names::parse_key(key) {
            Some((of, ObjectName::Head { number })) if of == volume => Some(number),
            _ => None,
        })
        .max()
}
