//! Store operations under way, and those that wait to be tried again.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::{BatchHandle, Config, Failure, Output, PackRead, StoreOp};
use crate::ids::{Epoch, VolumeId};
use crate::time::{Duration, Instant};
use crate::wire::head::PageRef;
use crate::wire::map_page::PackRef;

/// What an operation is for: says who hears of its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Task {
    /// Claim: which heads are there.
    ListHeads,
    /// Claim: the newest head.
    ReadHead { number: u32 },
    /// Claim: the create.
    Claim,
    /// Claim: what became of the create.
    ConfirmClaim,
    /// Claim: that no head is newer than ours.
    VerifyClaim,
    /// Cycle: a pack.
    PutPack { n: u32 },
    /// Checkpoint: a map page.
    PutPage { page: u32 },
    /// A map page, for fetches or the checkpoint.
    LoadPage { page: u32, at: PageRef },
    /// The header of a pack of the tail, by its place there.
    LoadTail { at: usize },
    /// The next head.
    Commit,
    /// What became of the next head.
    ConfirmCommit,
    /// Scan: what there is.
    ScanList,
    /// Scan: the head of a snapshot.
    ScanHead { number: u32 },
    /// Scan: a map page, of the newest image or of a snapshot of this epoch.
    ScanPage { page: u32, at: PageRef, snapshot: Option<Epoch> },
    /// Rewriting: the header of a pack.
    ReadVictim { pack: PackRef },
    /// Rewriting: blocks of packs.
    Gather,
    /// Rewriting: a pack of copies.
    PutCopy,
    /// Whether somebody has claimed the volume.
    Probe { number: u32 },
    /// Something superseded.
    Delete,
}

impl Task {
    /// Whether it belongs to garbage collection.
    pub(super) fn collects(self) -> bool {
        matches!(
            self,
            Self::ScanList
                | Self::ScanHead { .. }
                | Self::ScanPage { .. }
                | Self::ReadVictim { .. }
                | Self::Gather
                | Self::PutCopy
        )
    }

    fn what(self) -> &'static str {
        match self {
            Self::ListHeads | Self::VerifyClaim => "list heads",
            Self::ReadHead { .. } | Self::ConfirmClaim | Self::ConfirmCommit => "read head",
            Self::Probe { .. } => "look for another owner",
            Self::Claim | Self::Commit => "create head",
            Self::PutPack { .. } => "put pack",
            Self::PutPage { .. } => "put map page",
            Self::LoadPage { .. } => "read map page",
            Self::LoadTail { .. } => "read pack",
            Self::ScanList => "list",
            Self::ScanHead { .. } => "read head",
            Self::ScanPage { .. } => "read map page",
            Self::ReadVictim { .. } | Self::Gather => "read pack",
            Self::PutCopy => "put pack",
            Self::Delete => "delete",
        }
    }
}

/// What to ask of the store.
#[derive(Clone, Debug)]
pub(super) enum Call {
    Get(String),
    /// So many of the first bytes.
    GetFirst(String, u32),
    Put {
        key: String,
        meta: Arc<[u8]>,
        batches: Vec<BatchHandle>,
    },
    Create {
        key: String,
        bytes: Arc<[u8]>,
    },
    List(String),
    Delete(String),
    /// So many blocks, from these reads.
    Gather(u16, Vec<PackRead>),
}

/// An operation, as often as it is tried.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) task: Task,
    call: Call,
    pub(super) failures: u32,
}

/// How an operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Fault {
    /// Trying again may help.
    pub(super) transient: bool,
    /// The runtime's text; `None`: what came back was wrong.
    pub(super) note: Option<u32>,
}

impl Fault {
    /// The store gave something that cannot be.
    pub(super) const WRONG: Self = Self { transient: true, note: None };
}

#[derive(Debug)]
pub(super) struct Store {
    next: u64,
    under_way: BTreeMap<StoreOp, Request>,
    /// By the time to try again; the number keeps equal times apart.
    waiting: BTreeMap<(Instant, u64), Request>,
    random: u64,
    backoff: (Duration, Duration),
    pub(super) last_failure: Option<Failure>,
    /// Bytes put since the start.
    pub(super) put_bytes: u64,
}

impl Store {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            next: 0,
            under_way: BTreeMap::new(),
            waiting: BTreeMap::new(),
            random: config.seed,
            backoff: config.backoff,
            last_failure: None,
            put_bytes: 0,
        }
    }

    /// Starts an operation.
    pub(super) fn start(&mut self, out: &mut VecDeque<Output>, task: Task, call: Call) {
        self.issue(out, Request { task, call, failures: 0 });
    }

    /// The operation that has ended; `None` if nobody waits for it any more.
    pub(super) fn end(&mut self, op: StoreOp) -> Option<Request> {
        self.under_way.remove(&op)
    }

    /// Tries again, later.
    pub(super) fn again(&mut self, now: Instant, request: Request, fault: Fault) {
        self.note(now, request.task, fault);
        self.wait(now, request);
    }

    /// The same purpose by other means, later: for a create whose outcome must be read first.
    pub(super) fn instead(
        &mut self,
        now: Instant,
        request: Request,
        fault: Fault,
        task: Task,
        call: Call,
    ) {
        self.note(now, request.task, fault);
        self.wait(now, Request { task, call, failures: request.failures });
    }

    fn wait(&mut self, now: Instant, mut request: Request) {
        request.failures = request.failures.saturating_add(1);
        let (first, longest) = (self.backoff.0.0, self.backoff.1.0);
        let doublings = (request.failures - 1).min(32);
        let span = first.saturating_mul(1 << doublings).min(longest);
        // Between half and all of the span, so that many caches do not come back at once.
        let wait = span / 2 + self.random() % (span / 2 + 1);
        self.next += 1;
        self.waiting.insert((now + Duration(wait), self.next), request);
    }

    /// Notes a failure that is not tried again.
    pub(super) fn note(&mut self, now: Instant, task: Task, fault: Fault) {
        self.last_failure = Some(Failure { what: task.what(), at: now, note: fault.note });
    }

    /// Tries again what is due.
    pub(super) fn tick(&mut self, now: Instant, out: &mut VecDeque<Output>) {
        while let Some(first) = self.waiting.first_entry() {
            if first.key().0 > now {
                break;
            }
            let request = first.remove();
            self.issue(out, request);
        }
    }

    /// When something is due.
    pub(super) fn timeout(&self) -> Option<Instant> {
        self.waiting.keys().next().map(|&(at, _)| at)
    }

    /// Operations that wait to be tried again.
    pub(super) fn retrying(&self) -> usize {
        self.waiting.len()
    }

    /// Nobody waits for operations of these tasks any more.
    pub(super) fn cancel(&mut self, which: impl Fn(Task) -> bool) {
        self.under_way.retain(|_, request| !which(request.task));
        self.waiting.retain(|_, request| !which(request.task));
    }

    /// Nobody waits for anything any more.
    pub(super) fn forget(&mut self) {
        self.under_way.clear();
        self.waiting.clear();
    }

    fn issue(&mut self, out: &mut VecDeque<Output>, request: Request) {
        self.next += 1;
        let op = StoreOp(self.next);
        out.push_back(match request.call.clone() {
            Call::Get(key) => Output::Get { op, key, first: None },
            Call::GetFirst(key, bytes) => Output::Get { op, key, first: Some(bytes) },
            Call::Put { key, meta, batches } => Output::Put { op, key, meta, batches },
            Call::Create { key, bytes } => Output::Create { op, key, bytes },
            Call::Gather(blocks, reads) => Output::Gather { op, blocks, reads },
            Call::List(prefix) => Output::List { op, prefix },
            Call::Delete(key) => Output::Delete { op, key },
        });
        self.under_way.insert(op, request);
    }

    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.random;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

/// What the parts of a keeper act through, for the time of one `handle`.
pub(super) struct Io<'a> {
    pub(super) now: Instant,
    pub(super) config: &'a Config,
    /// The volume's number in this cache.
    pub(super) volume: VolumeId,
    /// Seconds since 1970.
    pub(super) unix_secs: u64,
    pub(super) out: &'a mut VecDeque<Output>,
    pub(super) store: &'a mut Store,
}

impl Io<'_> {
    /// Starts a store operation.
    pub(super) fn start(&mut self, task: Task, call: Call) {
        self.store.start(self.out, task, call);
    }

    /// Tries a store operation again, later.
    pub(super) fn again(&mut self, request: Request, fault: Fault) {
        self.store.again(self.now, request, fault);
    }
}
