//! The loop of the control thread: the keepers of all volumes, the store, the volume table, and
//! what an administrator asks for.
//!
//! Like the loop of a core it is not async, knows no clock and no runtime: [`Control::turn`] takes
//! the time, does what there is to do, and says when to come back. The store is behind
//! [`StoreIo`], the volume table behind [`TableIo`], so a simulation drives the same code.
//!
//! A volume's way in: claim by its keeper (its nonce noted in the table first) -> `Attach` to every
//! shard -> a report from every core, which proves that all of them know the volume -> exported.
//! The way out: all cores drained -> last push -> released in the store -> noted in the table.

mod fetch;
mod gather;
mod handover;
mod lanes;
mod links;
mod memory;
mod resize;
mod rows;
mod salvage;
mod store;
mod view;
mod volume;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use heeler_core::block_set::BlockSet;
use heeler_core::event::{ToKeeper, ToShard};
use heeler_core::ids::{CoreId, Epoch, OpId, ShardId, VolumeId};
use heeler_core::keeper::{
    self, BatchHandle, Edit, EditError, Input, Keeper, Listed, Output, PackRead, Refusal, Start,
    StoreOp, StoreResult,
};
use heeler_core::lending;
use heeler_core::policy::Policy;
use heeler_core::recovery::LogEntry;
use heeler_core::shard::{DirtyRun, SalvageAt};
use heeler_core::time::{Duration, Instant};
use heeler_core::wire::log::EntryKind;
use heeler_core::wire::names::{Nonce, Uuid};
use heeler_core::wire::superblock::VolumeTable;
use heeler_hw::crc32c;

use self::fetch::{Fetches, Read};
use self::gather::{Gathered, Gathers, Part};
pub use self::lanes::{Away, LanesStatus};
use self::lanes::{Lane, Lanes};
use self::links::Links;
use self::memory::Divided;
pub use self::memory::Memory;
use self::resize::Cuts;
use self::rows::Rows;
use self::store::Job;
pub use self::volume::{Geometry, VolumeStatus};
use self::volume::{State, Volume};
use crate::mail::{CoreStatus, ExportInfo, FetchedPiece, FromControl, ToControl};
use crate::wires::ControlLink;

/// Mails taken from one core in a turn, and answers taken from the store.
const TURN_MAX: usize = 256;
/// Plans of one fetch whose packs were gone before they could be read.
const PLANS_MAX: u32 = 4;
/// Texts of failures that are kept.
const NOTES_MAX: usize = 64;

/// Names a request to the store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Token(pub u64);

/// Names a request of an administrator.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Ticket(pub u64);

/// The store, as the loop sees it. Every request is answered once by `poll`, in any order; none
/// blocks. Keys are relative to the configured prefix.
pub trait StoreIo {
    /// Reads an object or a part of it.
    fn get(&mut self, token: Token, key: &str, range: Option<Range<u64>>);
    /// Writes an object of these pieces. With `create` only if there is none, and then it is sent
    /// to the store at most once.
    fn put(&mut self, token: Token, key: &str, pieces: Vec<Bytes>, create: bool);
    /// Removes an object; it is no error if there is none.
    fn delete(&mut self, token: Token, key: &str);
    /// Lists the keys below a prefix that ends in a slash.
    fn list(&mut self, token: Token, prefix: &str);
    /// An answer, if there is one.
    fn poll(&mut self) -> Option<(Token, StoreAnswer)>;
}

/// An object of a list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoredObject {
    /// Its key.
    pub key: String,
    /// Its bytes.
    pub bytes: u64,
}

/// How a request to the store ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreAnswer {
    /// Of get: all that was asked for.
    Got(Bytes),
    /// Of list: the keys.
    Listed(Vec<StoredObject>),
    /// Of put and delete: durable.
    Done,
    /// Of a create: there is one.
    AlreadyExists,
    /// Of get: there is none.
    NotFound,
    /// Anything else; whether it took effect is unknown.
    Failed {
        /// Trying again may help.
        transient: bool,
        /// What happened.
        text: String,
    },
}

/// The cache's volume table on its device.
pub trait TableIo {
    /// Makes the table durable before it returns.
    ///
    /// # Errors
    /// In words.
    fn save(&mut self, table: &VolumeTable) -> Result<(), String>;
}

/// What a cache's log holds of one volume number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Logged {
    /// Blocks of entries that were dirty when they were written. Some may have been pushed since.
    pub dirty_blocks: u64,
    /// The highest epoch.
    pub epoch: Epoch,
}

impl Default for Logged {
    fn default() -> Self {
        Self { dirty_blocks: 0, epoch: Epoch::ZERO }
    }
}

impl Logged {
    /// Adds what one shard's recovery found ([`Shard::recovered_entries`]) to what others found.
    ///
    /// [`Shard::recovered_entries`]: heeler_core::shard::Shard::recovered_entries
    pub fn add(found: &mut BTreeMap<VolumeId, Self>, entries: &[LogEntry]) {
        let mut void = BTreeMap::new();
        for LogEntry { at, .. } in entries {
            if at.entry.kind == EntryKind::Forget {
                let seq = void.entry(at.entry.volume).or_insert(at.seq);
                *seq = at.seq.max(*seq);
            }
        }
        for LogEntry { at, .. } in entries {
            let dirty = match at.entry.kind {
                EntryKind::Dirty | EntryKind::Zeroes => u64::from(at.entry.count),
                EntryKind::Clean => 0,
                EntryKind::Forget | EntryKind::Kept => continue,
            };
            if void.get(&at.entry.volume).is_none_or(|void| at.seq > *void) {
                let logged = found.entry(at.entry.volume).or_default();
                logged.dirty_blocks += dirty;
                logged.epoch = logged.epoch.max(at.entry.epoch);
            }
        }
    }
}

/// What the loop is built with.
pub struct Setup {
    /// The cache's identity.
    pub cache: Uuid,
    /// Shards of the cache.
    pub shards: u16,
    /// This host's name, shown to other servers.
    pub host: String,
    /// A point of the monotonic clock, and the wall clock there: seconds since 1970.
    pub clock: (Instant, u64),
    /// Random bytes, for nonces and seeds.
    pub random: Box<dyn FnMut() -> [u8; 16]>,
    /// The volume table.
    pub table: VolumeTable,
    /// What recovery found.
    pub logged: BTreeMap<VolumeId, Logged>,
    /// The memory that is divided.
    pub memory: Memory,
    /// A push starts so long after the first write that it will hold, and has as long again.
    pub push_after: Duration,
    /// The mailboxes: core `i` hosts the shards `i`, `i + cores`, ...
    pub cores: Vec<ControlLink>,
}

impl fmt::Debug for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Setup").field("cache", &self.cache).field("shards", &self.shards).finish()
    }
}

/// What an administrator hears of.
#[derive(Clone, Debug)]
pub enum Event {
    /// A volume is open to clients.
    Served {
        /// Its name.
        name: String,
    },
    /// A volume could not be had.
    Refused {
        /// Its name.
        name: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A volume was refused because the cache holds dirty blocks of it that the log alone knows:
    /// [`Control::take_in`] makes them known.
    Stale {
        /// Which.
        volume: Uuid,
    },
    /// The end of [`Control::detach`].
    Detached {
        /// Of the order.
        ticket: Ticket,
        /// It is given up, with everything pushed; `false`: it was kept, lost or removed.
        detached: bool,
    },
    /// The answer to [`Control::list_dirty`].
    Dirty {
        /// Of the question.
        ticket: Ticket,
        /// What was found.
        runs: Vec<DirtyRun>,
        /// Where to go on; `None`: there is no more.
        next: Option<SalvageAt>,
    },
    /// The answer to [`Control::read_dirty`].
    Salvaged {
        /// Of the question.
        ticket: Ticket,
        /// The blocks; `None`: not all of them can be read.
        bytes: Option<Vec<u8>>,
    },
    /// The end of [`Control::cut`].
    Cut {
        /// Of the order.
        ticket: Ticket,
        /// All of it reads as zeroes; `false`: the volume is not ours (any more).
        done: bool,
    },
    /// The end of [`Control::push`], [`Control::edit`] or [`Control::flatten`].
    Pushed {
        /// Of the request.
        ticket: Ticket,
        /// Everything that was dirty is in the store; `false`: the volume is not ours (any more).
        committed: bool,
    },
    /// The end of [`Control::edit`]: nothing changed.
    EditRefused {
        /// Of the request.
        ticket: Ticket,
        /// Why.
        why: EditError,
    },
    /// The answer to [`Control::report`], by core.
    Report {
        /// Of the request.
        ticket: Ticket,
        /// One for each core.
        cores: Vec<CoreStatus>,
    },
    /// After [`Control::begin_delete`]: nothing of the volume is on its way to the store.
    Quiet {
        /// Of the request.
        ticket: Ticket,
    },
    /// After [`Control::drain`]: everything is pushed and released, the cores have been told to
    /// leave.
    Stopped,
}

/// What a purge drops, apart from what the shards have in their volumes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Purged {
    /// Dirty blocks of volumes that this server does not serve.
    pub stranded_blocks: u64,
}

/// What a request to the store is for.
#[derive(Debug)]
enum Pending {
    Keeper { volume: Uuid, life: u64, op: StoreOp },
    Read(Read),
    Gather(Part),
}

/// What a report from all cores is for.
#[derive(Debug)]
enum Purpose {
    Admin,
    /// Every core knows the volume.
    Introduced {
        volume: Uuid,
        life: u64,
    },
}

/// What a shard asked for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    volume: VolumeId,
    object: u32,
    first: u16,
    count: u16,
    gaps: BlockSet,
    /// How often its reads have been planned.
    plans: u32,
}

/// A batch on its way.
#[derive(Debug)]
struct Batch {
    /// Of the keeper that it is for.
    life: u64,
    /// The core that it came from.
    /// `None`: it was gathered from the store.
    core: Option<usize>,
    bytes: Bytes,
}

#[derive(Debug)]
struct Gather {
    purpose: Purpose,
    cores: Vec<Option<CoreStatus>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Drain {
    No,
    /// So many cores have not finished.
    Cores(usize),
    Releasing,
    Stopping,
    Stopped,
}

/// See the [module](self).
///
/// * `turn` does what there is to do; `has_news` and the time it returned say when to call again;
/// * `poll_event` is drained after each turn;
/// * everything else is for the administrator and takes effect with the next turn.
pub struct Control<S, T> {
    cache: Uuid,
    shards: u16,
    host: String,
    clock: (Instant, u64),
    random: Box<dyn FnMut() -> [u8; 16]>,
    rows: Rows<T>,
    logged: BTreeMap<VolumeId, Logged>,
    links: Links,
    store: S,
    lanes: Lanes<Job>,
    push_after: Duration,
    volumes: Vec<Volume>,
    lives: u64,
    pending: BTreeMap<Token, Pending>,
    tokens: u64,
    memory: Divided,
    /// Batches on their way.
    batches: BTreeMap<BatchHandle, Batch>,
    handles: u64,
    fetches: Fetches,
    /// What each fetch under way is for.
    asked: HashMap<(ShardId, OpId), Asked>,
    gatherings: Gathers,
    gathers: BTreeMap<Ticket, Gather>,
    cuts: Cuts,
    tickets: u64,
    /// Texts of failures; the first one's number is `notes_first`.
    notes: VecDeque<String>,
    notes_first: u32,
    drain: Drain,
    events: VecDeque<Event>,
}

impl<S: fmt::Debug, T: fmt::Debug> fmt::Debug for Control<S, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("volumes", &self.volumes)
            .field("store", &self.store)
            .field("rows", &self.rows)
            .field("drain", &self.drain)
            .finish_non_exhaustive()
    }
}

impl<S: StoreIo, T: TableIo> Control<S, T> {
    /// A loop without volumes. What the log holds of numbers without a row is forgotten.
    #[must_use]
    pub fn new(setup: Setup, store: S, table: T) -> Self {
        let fetches = Fetches::new(setup.memory.fetch_bytes);
        // What waits in the lanes keeps batches of other volumes out.
        let spread_bytes_max = setup.memory.batch_bytes as u64 / 2;
        let mut links = Links::new(setup.cores, setup.shards);
        let memory = Divided::new(setup.memory, &mut links);
        let mut random = setup.random;
        let lanes = Lanes::new(spread_bytes_max, seed(&mut random));
        let mut control = Self {
            cache: setup.cache,
            shards: setup.shards,
            host: setup.host,
            clock: setup.clock,
            random,
            rows: Rows::new(setup.table, table),
            logged: setup.logged,
            links,
            store,
            lanes,
            push_after: setup.push_after,
            volumes: Vec::new(),
            lives: 0,
            pending: BTreeMap::new(),
            tokens: 0,
            batches: BTreeMap::new(),
            handles: 0,
            fetches,
            asked: HashMap::new(),
            gatherings: Gathers::default(),
            memory,
            gathers: BTreeMap::new(),
            cuts: Cuts::default(),
            tickets: 0,
            notes: VecDeque::new(),
            notes_first: 0,
            drain: Drain::No,
            events: VecDeque::new(),
        };
        let known: Vec<VolumeId> = control.rows.all().iter().map(|row| row.number).collect();
        let unknown = control.logged.keys().filter(|number| !known.contains(number));
        for number in unknown.copied().collect::<Vec<_>>() {
            control.forget(number);
        }
        control
    }

    /// One turn: mail, answers of the store, timers. Returns when to come back: `Some(now)` if
    /// more is waiting already, `None` if only mail or the store can bring something.
    pub fn turn(&mut self, now: Instant) -> Option<Instant> {
        let mut more = false;
        for core in 0..self.links.cores() {
            for _ in 0..TURN_MAX {
                let Some(mail) = self.links.pop(core) else { break };
                self.handle_mail(now, mail);
            }
        }
        for taken in 0..=TURN_MAX {
            if taken == TURN_MAX {
                more = true;
                break;
            }
            let Some((token, answer)) = self.store.poll() else { break };
            self.end_request(now, token, &answer);
            self.handle_answer(now, token, answer);
        }
        while let Some(read) = self.fetches.poll_due(now) {
            self.send_read(now, read);
        }
        while let Some(reads) = self.fetches.poll_begun(now) {
            reads.into_iter().for_each(|read| self.send_read(now, read));
        }
        for index in 0..self.volumes.len() {
            if self.volumes[index].keeper.poll_timeout().is_some_and(|due| due <= now) {
                self.feed(now, index, Input::Tick);
            }
        }
        self.step_drain(now);
        self.send_requests(now);
        let memory = self.memory.turn(now, &mut self.links);
        self.links.flush();
        if more || self.links.has_news() {
            return Some(now);
        }
        let keepers = self.volumes.iter().filter(|volume| !volume.is_over());
        let keepers = keepers.filter_map(|volume| volume.keeper.poll_timeout());
        let requests = self.fetches.poll_timeout().into_iter().chain(self.lanes.poll_timeout());
        keepers.chain(requests).chain(memory).min()
    }

    /// Whether a core has sent something: to be asked between announcing sleep and sleeping.
    #[must_use]
    pub fn has_news(&mut self) -> bool {
        self.links.has_news()
    }

    /// What happened since the last call.
    #[must_use]
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The store, to drive it.
    pub fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }

    /// The volume of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Uuid> {
        self.volumes.iter().find(|volume| volume.name == name).map(|volume| volume.uuid)
    }

    /// Every volume's figures.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeStatus> {
        let volumes = self.volumes.iter().filter(|volume| volume.view.is_none());
        volumes.map(|volume| volume.status(|note| self.note(note))).collect()
    }

    /// How requests to the store go.
    #[must_use]
    pub fn lanes(&self) -> LanesStatus {
        self.lanes.status()
    }

    /// Bytes a second of a volume's that were put in the last seconds.
    #[must_use]
    pub fn put_rate(&self, now: Instant, volume: Uuid) -> u64 {
        self.index(volume).map_or(0, |index| self.lanes.rate(now, self.volumes[index].life))
    }

    /// The volumes of the cache's table that are not known by name: those that the store did not
    /// list.
    #[must_use]
    pub fn unlisted(&self) -> Vec<Uuid> {
        let rows = self.rows.all().iter().map(|row| Uuid(row.uuid));
        rows.filter(|uuid| self.volumes.iter().all(|volume| volume.uuid != *uuid)).collect()
    }

    /// The store's list has been read to its end: forgets the volumes that it does not have, except
    /// those of which the cache holds something dirty.
    ///
    /// # Errors
    /// In words.
    pub fn forget_unlisted(&mut self) -> Result<(), String> {
        for volume in self.unlisted() {
            let row = self.rows.find(volume).expect("listed from the rows");
            let dirty = self.logged.get(&row.number).map_or(0, |logged| logged.dirty_blocks);
            if row.released || dirty == 0 {
                self.forget_row(volume)?;
            } else {
                log::error!(
                    "the cache holds {dirty} dirty blocks of volume {volume}, which is not in the \
                     store; check the store's address, or drop them: `heeler cache purge --force`"
                );
            }
        }
        Ok(())
    }

    /// Claims a volume that the store lists, and serves it when it is ours. With `takeover` also
    /// from another owner. Ends in [`Event::Served`] or [`Event::Refused`].
    pub fn add_volume(&mut self, now: Instant, volume: Uuid, name: &str, takeover: bool) {
        if self.volumes.iter().any(|known| known.uuid == volume) || self.drain != Drain::No {
            return;
        }
        let index = self.enter(volume, volume, name, takeover);
        self.start(now, index);
    }

    /// A volume or a view, and its keeper, which has been told nothing. `stored`: the volume in the
    /// store.
    fn enter(&mut self, uuid: Uuid, stored: Uuid, name: &str, takeover: bool) -> usize {
        self.lives += 1;
        let number = match self.rows.find(uuid) {
            Some(row) => row.number,
            None => self.rows.new_number(),
        };
        let nonce = self.rows.pending(uuid).unwrap_or_else(|| Nonce((self.random)()));
        let seed = seed(&mut self.random);
        let mut config = keeper::Config::new(stored, self.shards, crc32c, seed);
        config.push_after = self.push_after;
        // How many are under way is the lanes' business; what waits there is bounded by memory.
        config.puts_max = lanes::WINDOW_MAX as usize;
        self.volumes.push(Volume {
            uuid,
            name: name.into(),
            number,
            keeper: Keeper::new(config),
            life: self.lives,
            nonce,
            takeover,
            view: None,
            state: State::Starting,
            attached: None,
            in_shards: false,
            geometry: None,
            leaving: None,
            ops: 0,
            hurried: false,
        });
        self.volumes.len() - 1
    }

    /// Pushes everything that is dirty in the volume now. `None` if there is no such volume.
    pub fn push(&mut self, now: Instant, volume: Uuid) -> Option<Ticket> {
        let index = self.index(volume)?;
        let ticket = self.ticket();
        self.feed(now, index, Input::PushNow { ticket: ticket.0 });
        Some(ticket)
    }

    /// Copies what lies in other volumes, so that the volume is no clone any more.
    /// [`Event::Pushed`] says that it is done. `None` if there is no such volume.
    pub fn flatten(&mut self, now: Instant, volume: Uuid) -> Option<Ticket> {
        let index = self.index(volume)?;
        let ticket = self.ticket();
        self.feed(now, index, Input::Flatten { ticket: ticket.0 });
        Some(ticket)
    }

    /// Changes a volume, after a push of everything that is dirty now. [`Event::Pushed`] says that
    /// it is in the store. `None` if there is no such volume.
    pub fn edit(&mut self, now: Instant, volume: Uuid, edit: &Edit) -> Option<Ticket> {
        let index = self.index(volume)?;
        let ticket = self.ticket();
        if let (Some(attached), Edit::Settings(settings)) =
            (&mut self.volumes[index].attached, edit)
        {
            attached.settings.clone_from(settings);
        }
        self.feed(now, index, Input::Edit { edit, ticket: ticket.0 });
        Some(ticket)
    }

    /// Reads all that the cache device holds of the volume, to check it. Reports tell how far it is
    /// and what it found.
    pub fn scrub(&mut self, volume: Uuid) {
        if let Some(index) = self.index(volume) {
            let volume = self.volumes[index].number;
            self.links.send_to_all(|| FromControl::Scrub { volume });
        }
    }

    /// Changes what all memory together may be. It takes effect bit by bit;
    /// [`memory_is_settled`](Self::memory_is_settled) says when it has.
    ///
    /// # Errors
    /// The bytes that are needed at least.
    pub fn resize_memory(&mut self, now: Instant, bytes: u64) -> Result<(), u64> {
        self.memory.resize(now, &mut self.links, bytes)
    }

    /// How memory is used.
    #[must_use]
    pub fn memory_usage(&self) -> lending::Usage {
        self.memory.lending.usage()
    }

    /// Whether the last change of its size has been carried out.
    #[must_use]
    pub fn memory_is_settled(&self) -> bool {
        self.memory.lending.is_settled()
    }

    /// Asks every core for its figures. What was sent to the cores before has been taken by then.
    pub fn report(&mut self) -> Ticket {
        self.gather(Purpose::Admin)
    }

    /// Dirty blocks that the log alone holds: of volumes that the shards do not know.
    #[must_use]
    pub fn stranded_blocks(&self) -> u64 {
        let rows = self.rows.all().iter().filter(|row| !row.released);
        let unserved = rows.filter(|row| {
            let known = self.volumes.iter().find(|volume| volume.uuid.0 == row.uuid);
            known.is_none_or(|volume| !volume.in_shards)
        });
        unserved.filter_map(|row| self.logged.get(&row.number)).map(|log| log.dirty_blocks).sum()
    }

    /// Drops everything clean; with `force` everything, the contents of volumes that were refused
    /// or lost included, which are then claimed anew.
    ///
    /// # Errors
    /// In words.
    pub fn purge(&mut self, now: Instant, force: bool) -> Result<Purged, String> {
        let mut purged = Purged::default();
        if force {
            purged.stranded_blocks = self.stranded_blocks();
            for volume in self.unlisted() {
                self.empty(volume)?;
            }
            let unserved = |volume: &Volume| match &volume.state {
                State::Refused(_) | State::Fenced(_) => true,
                State::Starting => volume.attached.is_none(),
                _ => false,
            };
            let (gone, kept) = std::mem::take(&mut self.volumes).into_iter().partition(unserved);
            self.volumes = kept;
            let gone: Vec<Volume> = gone;
            // A snapshot that could not be served stays so until somebody asks again.
            for volume in gone.into_iter().filter(|volume| volume.view.is_none()) {
                let emptied = self.empty(volume.uuid);
                self.add_volume(now, volume.uuid, &volume.name, volume.takeover);
                emptied?;
            }
        }
        self.links.send_to_all(|| FromControl::Purge { force });
        Ok(purged)
    }

    /// Switches the replacement policy of every shard. Nothing is dropped for it.
    pub fn set_policy(&mut self, policy: Policy) {
        self.links.send_to_all(|| FromControl::Policy(policy));
    }

    /// Closes a volume to clients and stops its keeper, dirty or not. [`Event::Quiet`] says that
    /// nothing of it is on its way to the store any more; then the store's objects can go, and
    /// then [`Self::finish_delete`]. `None` if there is no such volume.
    pub fn begin_delete(&mut self, volume: Uuid) -> Option<Ticket> {
        let index = self.index(volume)?;
        let ticket = self.ticket();
        self.end_leaving(index, false);
        self.volumes[index].state = State::Deleting(ticket);
        let life = self.volumes[index].life;
        let own = |(handle, batch): (&BatchHandle, &Batch)| (batch.life == life).then_some(*handle);
        let own: Vec<BatchHandle> = self.batches.iter().filter_map(own).collect();
        self.drop_puts(index);
        own.into_iter().for_each(|batch| self.end_batch(batch));
        self.publish();
        self.settle_delete(index);
        Some(ticket)
    }

    /// The store has nothing of the volume any more: forgets what the cache holds.
    ///
    /// # Errors
    /// In words.
    pub fn finish_delete(&mut self, volume: Uuid) -> Result<(), String> {
        self.forget_row(volume)?;
        self.volumes.retain(|known| known.uuid != volume);
        Ok(())
    }

    /// Ends everything in order: no more requests, all that is dirty pushed, every volume
    /// released, the cores stopped. Ends in [`Event::Stopped`].
    pub fn drain(&mut self) {
        if self.drain == Drain::No {
            self.drain = Drain::Cores(self.links.cores());
            self.links.send_to_all(|| FromControl::Drain);
        }
    }

    fn index(&self, volume: Uuid) -> Option<usize> {
        self.volumes.iter().position(|known| known.uuid == volume)
    }

    fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    fn unix_secs(&self, now: Instant) -> u64 {
        self.clock.1 + (now - self.clock.0).0 / 1_000_000_000
    }

    /// The keeper's first input.
    fn start(&mut self, now: Instant, index: usize) {
        let Volume { uuid, number, nonce, takeover, .. } = self.volumes[index];
        let expected = self.rows.expected(uuid);
        let released = self.rows.find(uuid).is_none_or(|row| row.released);
        let logged = self.logged.get(&number).copied().unwrap_or_default();
        let host = self.host.clone();
        let start = Start {
            volume: number,
            takeover,
            cache: self.cache,
            expected: &expected,
            nonce,
            dirty_blocks: if released { 0 } else { logged.dirty_blocks },
            log_epoch: logged.epoch,
            host: &host,
            unix_secs: self.unix_secs(now),
        };
        self.feed(now, index, Input::Start(start));
    }

    /// Tells a keeper something and does what it says.
    fn feed(&mut self, now: Instant, index: usize, input: Input<'_>) {
        if matches!(self.volumes[index].state, State::Deleting(_)) {
            return;
        }
        self.note_hurry(index, &input);
        self.volumes[index].keeper.handle(now, input);
        let mut next = None;
        loop {
            while let Some(output) = self.volumes[index].keeper.poll_output() {
                next = self.act(now, index, output).or(next);
            }
            let Some(input) = next.take() else { return };
            self.note_hurry(index, &input);
            self.volumes[index].keeper.handle(now, input);
        }
    }

    /// Does what a keeper wants done. Returns what to tell it after all of it is done.
    fn act(&mut self, now: Instant, index: usize, output: Output) -> Option<Input<'static>> {
        match output {
            Output::Remember { nonce, ours } => return Some(self.remember(index, nonce, ours)),
            Output::Attached(attached) => return self.attached(index, attached),
            Output::Refused(refusal) => self.refused(index, &refusal),
            Output::Get { op, key, first } => self.keeper_get(now, index, op, key, first),
            Output::Put { op, key, meta, batches } => {
                self.keeper_put(now, index, op, key, meta, &batches);
            }
            Output::Create { op, key, bytes } => {
                let job = Job::Create { key, bytes: Bytes::from_owner(bytes) };
                self.keeper_ask(now, index, op, Lane::Head, job);
            }
            Output::Gather { op, blocks, reads } => {
                self.gather_blocks(now, index, op, blocks, reads);
            }
            Output::List { op, prefix } => {
                self.keeper_ask(now, index, op, Lane::Head, Job::List { prefix });
            }
            Output::Delete { op, key } => self.keeper_delete(now, index, op, key),
            Output::DropBatch(batch) => self.end_batch(batch),
            Output::ToShard(shard, mail) => {
                if shard == ShardId(0) {
                    self.note_push(now, index, mail);
                }
                self.links.mail(shard, mail);
                if matches!(mail, ToShard::Attach { .. }) && shard.0 + 1 == self.shards {
                    self.volumes[index].in_shards = true;
                    self.introduce(index);
                }
            }
            Output::FetchPlan { shard, op, reads, .. } => self.fetch(shard, op, reads),
            Output::FetchFailed { shard, op } => self.end_fetch(shard, op, None),
            Output::QueryAnswer { shard, op, data } => {
                self.links.answer_query(shard, op, Some(data));
            }
            Output::QueryFailed { shard, op } => self.links.answer_query(shard, op, None),
            Output::PushDone { ticket, committed } => {
                if let Some(next) = self.pushed_leaving(index, Ticket(ticket), committed) {
                    return next;
                }
                self.events.push_back(Event::Pushed { ticket: Ticket(ticket), committed });
            }
            Output::EditRefused { ticket, why } => {
                self.events.push_back(Event::EditRefused { ticket: Ticket(ticket), why });
            }
            Output::Resized { blocks } => self.resized(index, blocks),
            Output::Fenced { by } => self.fenced(index, by),
            Output::Released => self.released(index),
        }
        None
    }

    /// Notes the nonce of a claim. If contents are given up, the volume gets another number, and
    /// what was kept under the old one is forgotten.
    fn remember(&mut self, index: usize, nonce: Nonce, ours: bool) -> Input<'static> {
        let Volume { uuid, number, .. } = self.volumes[index];
        let known = self.rows.find(uuid).is_some();
        let saved = if ours || !known {
            self.rows.remember(uuid, number, nonce)
        } else {
            self.volumes[index].number = self.rows.new_number();
            let saved = self.rows.renumber(uuid, self.volumes[index].number, nonce);
            if saved.is_ok() {
                self.volumes[index].in_shards = false;
                self.forget(number);
            }
            saved
        };
        match saved {
            Ok(()) => Input::Remembered { volume: self.volumes[index].number },
            Err(reason) => {
                self.volumes[index].number = number;
                self.refuse(index, reason);
                Input::Detach
            }
        }
    }

    fn attached(&mut self, index: usize, attached: keeper::Attached) -> Option<Input<'static>> {
        let Volume { uuid, nonce, .. } = self.volumes[index];
        let kept = if attached.ours { "kept" } else { "empty" };
        log::info!(
            "volume {}: claimed, committed epoch {:#x}, cached contents {kept}",
            self.volumes[index].name,
            attached.committed.0
        );
        let volume = &mut self.volumes[index];
        if volume.view.is_some() {
            volume.attached = Some(attached);
            return None;
        }
        volume.name.clone_from(&attached.name);
        volume.attached = Some(attached);
        let Err(reason) = self.rows.attached(uuid, nonce) else { return None };
        // Without the table a later start could not tell that something is dirty.
        self.refuse(index, reason);
        Some(Input::Detach)
    }

    /// All shards have been told of the volume; asks the cores whether they have heard it.
    fn introduce(&mut self, index: usize) {
        let Volume { uuid, life, .. } = self.volumes[index];
        _ = self.gather(Purpose::Introduced { volume: uuid, life });
    }

    fn introduced(&mut self, volume: Uuid, life: u64) {
        let known =
            self.volumes.iter_mut().find(|known| (known.uuid, known.life) == (volume, life));
        if let Some(volume) = known.filter(|volume| volume.state == State::Starting) {
            volume.state = State::Served;
            let name = volume.name.clone();
            log::info!("volume {name}: served");
            self.events.push_back(Event::Served { name });
        }
        self.publish();
    }

    fn refused(&mut self, index: usize, refusal: &Refusal) {
        let mut reason = refusal.to_string();
        if let Refusal::Store { note } = refusal
            && let Some(text) = self.note(*note)
        {
            reason = format!("{reason} ({text})");
        }
        let Volume { uuid, number, in_shards, .. } = self.volumes[index];
        match refusal {
            Refusal::Stale { .. } => {
                reason += ", and so do `heeler volume forget` and `heeler cache purge --force`; \
                           `heeler volume salvage` saves them before";
                if !in_shards {
                    // How much it is comes to light soon, and then this comes again.
                    self.volumes[index].state = State::Refused(reason);
                    return self.events.push_back(Event::Stale { volume: uuid });
                }
            }
            // Nothing is dirty here, and what is clean will never be believed again.
            Refusal::Owned(_) if in_shards || self.logged.contains_key(&number) => {
                if let Err(e) = self.empty(uuid) {
                    log::warn!("volume {}: {e}", self.volumes[index].name);
                }
            }
            _ => {}
        }
        self.refuse(index, reason);
    }

    fn refuse(&mut self, index: usize, reason: String) {
        let volume = &mut self.volumes[index];
        log::error!("volume {}: not served: {reason}", volume.name);
        volume.state = State::Refused(reason.clone());
        let name = volume.name.clone();
        self.events.push_back(Event::Refused { name, reason });
    }

    fn fenced(&mut self, index: usize, by: Option<keeper::Owner>) {
        let by = by.map_or_else(|| "another server".into(), |owner| owner.to_string());
        let reason = format!(
            "taken by {by}; what was not pushed before stays in this cache: save it with `heeler \
             volume salvage`, then drop it with `heeler volume forget` or `heeler cache purge \
             --force`"
        );
        self.drop_puts(index);
        let volume = &mut self.volumes[index];
        log::error!("volume {}: {reason}", volume.name);
        volume.state = State::Fenced(reason);
        self.end_leaving(index, false);
        self.publish();
    }

    fn released(&mut self, index: usize) {
        self.drop_puts(index);
        let volume = &mut self.volumes[index];
        let (uuid, held) = (volume.uuid, volume.attached.is_some() && volume.view.is_none());
        if !matches!(volume.state, State::Refused(_)) {
            volume.state = State::Released;
        }
        if held {
            log::info!("volume {}: released", volume.name);
            if let Err(reason) = self.rows.released(uuid) {
                // The next start then takes the volume for one that may be dirty here.
                log::warn!("volume {}: {reason}", self.volumes[index].name);
            }
            self.rest(index);
        }
        self.end_leaving(index, held);
        self.publish();
    }

    fn fetch(&mut self, shard: ShardId, op: OpId, reads: Vec<PackRead>) {
        if reads.is_empty() {
            return self.end_fetch(shard, op, Some(Vec::new()));
        }
        self.fetches.add((shard, op), reads);
    }

    /// Asks where the blocks of a fetch are.
    fn plan_fetch(&mut self, now: Instant, shard: ShardId, op: OpId) {
        let asked = self.asked.get_mut(&(shard, op)).expect("a fetch is answered once");
        asked.plans += 1;
        let Asked { volume, object, first, count, gaps, .. } = *asked;
        match self.keeper_of(volume) {
            Some(index) => {
                self.feed(now, index, Input::Fetch { shard, op, object, first, count, gaps });
            }
            None => self.end_fetch(shard, op, None),
        }
    }

    /// The reads of a fetch have ended. If a pack was missing it has been rewritten since they
    /// were planned, and the keeper knows where its blocks are now.
    fn answer_fetch(&mut self, now: Instant, answer: fetch::Answer) {
        let fetch::Answer { shard, op, pieces, missing } = answer;
        if missing && self.asked.get(&(shard, op)).is_some_and(|asked| asked.plans < PLANS_MAX) {
            self.fetches.handle_copied((shard, op));
            return self.plan_fetch(now, shard, op);
        }
        if missing {
            log::error!("a fetch fails: a pack is missing in the store; run `heeler check`");
        }
        self.end_fetch(shard, op, pieces);
    }

    fn end_fetch(&mut self, shard: ShardId, op: OpId, pieces: Option<Vec<FetchedPiece>>) {
        self.asked.remove(&(shard, op));
        self.links.answer_fetch(shard, op, pieces);
    }

    /// A batch's bytes are no longer held.
    fn end_batch(&mut self, batch: BatchHandle) {
        if let Some(Batch { core: Some(core), bytes, .. }) = self.batches.remove(&batch) {
            self.links.send_to_core(core, FromControl::BatchesEnded { bytes: bytes.len() });
        }
    }

    fn gather_blocks(
        &mut self,
        now: Instant,
        index: usize,
        op: StoreOp,
        blocks: u16,
        reads: Vec<PackRead>,
    ) {
        self.volumes[index].ops += 1;
        let whose = (self.volumes[index].uuid, self.volumes[index].life, op);
        for part in self.gatherings.begin(whose, blocks, reads) {
            let (key, from) = (part.plan.key.clone(), part.plan.offset);
            let to = from + u64::from(part.plan.len);
            let job = Job::Get { key, range: Some(from..to) };
            self.ask(now, Pending::Gather(part), Lane::Read, job);
        }
    }

    fn gathered(&mut self, now: Instant, (volume, life, op): gather::Whose, end: Gathered) {
        let index = self.index(volume).filter(|i| self.volumes[*i].life == life);
        let Some(index) = index else { return };
        self.volumes[index].ops -= 1;
        if matches!(self.volumes[index].state, State::Deleting(_)) {
            return self.settle_delete(index);
        }
        match end {
            Gathered::Blocks(bytes) => {
                self.handles += 1;
                let batch = BatchHandle(self.handles);
                self.batches.insert(batch, Batch { life, core: None, bytes });
                let result = StoreResult::Gathered(batch);
                self.feed(now, index, Input::StoreDone { op, result });
            }
            Gathered::Failed { transient, text } => {
                self.feed_answer(now, index, op, StoreAnswer::Failed { transient, text });
            }
        }
    }

    fn handle_answer(&mut self, now: Instant, token: Token, answer: StoreAnswer) {
        match self.pending.remove(&token).expect("the store answers once") {
            Pending::Read(read) => {
                if let Some(answer) = self.fetches.handle(now, read, answer) {
                    self.answer_fetch(now, answer);
                }
            }
            Pending::Gather(part) => {
                if let Some((whose, end)) = self.gatherings.handle(&part, answer) {
                    self.gathered(now, whose, end);
                }
            }
            Pending::Keeper { volume, life, op } => {
                let index = self.index(volume).filter(|i| self.volumes[*i].life == life);
                let Some(index) = index else { return };
                self.volumes[index].ops -= 1;
                if matches!(self.volumes[index].state, State::Deleting(_)) {
                    return self.settle_delete(index);
                }
                self.feed_answer(now, index, op, answer);
            }
        }
    }

    fn feed_answer(&mut self, now: Instant, index: usize, op: StoreOp, answer: StoreAnswer) {
        let objects: Vec<Listed<'_>>;
        let result = match &answer {
            StoreAnswer::Got(bytes) => StoreResult::Got(bytes),
            StoreAnswer::Listed(listed) => {
                let listed = listed.iter();
                objects = listed.map(|o| Listed { key: &o.key, bytes: o.bytes }).collect();
                StoreResult::Listed(&objects)
            }
            StoreAnswer::Done => StoreResult::Done,
            StoreAnswer::AlreadyExists => StoreResult::AlreadyExists,
            StoreAnswer::NotFound => StoreResult::NotFound,
            StoreAnswer::Failed { transient, text } => {
                log::warn!("volume {}: {text}", self.volumes[index].name);
                StoreResult::Failed { transient: *transient, note: self.add_note(text) }
            }
        };
        self.feed(now, index, Input::StoreDone { op, result });
    }

    fn handle_mail(&mut self, now: Instant, mail: ToControl) {
        match mail {
            ToControl::Keeper { shard, mail } => {
                if let Some(index) = self.keeper_of(volume_of(&mail)) {
                    self.feed(now, index, Input::Shard(shard, mail));
                }
            }
            ToControl::Fetch { shard, op, volume, object, first, count, gaps } => {
                let asked = Asked { volume, object, first, count, gaps, plans: 0 };
                self.asked.insert((shard, op), asked);
                self.plan_fetch(now, shard, op);
            }
            ToControl::Query { shard, op, volume, object, first, count } => {
                match self.keeper_of(volume) {
                    Some(index) => {
                        let input = Input::Query { shard, op, object, first, count };
                        self.feed(now, index, input);
                    }
                    None => self.links.answer_query(shard, op, None),
                }
            }
            ToControl::Batch { shard, volume, epoch, runs, crcs, bytes } => {
                let core = self.links.core_of(shard);
                let Some(index) = self.keeper_of(volume) else {
                    let bytes = bytes.len();
                    return self.links.send_to_core(core, FromControl::BatchesEnded { bytes });
                };
                self.handles += 1;
                let batch = BatchHandle(self.handles);
                let (life, bytes) = (self.volumes[index].life, Bytes::from(bytes));
                self.batches.insert(batch, Batch { life, core: Some(core), bytes });
                let (runs, crcs) = (&runs, &crcs);
                self.feed(now, index, Input::Batch { shard, epoch, batch, runs, crcs });
            }
            ToControl::Budget { shard, report } => {
                let Self { memory, links, .. } = self;
                memory.handle_report(now, links, shard.0.into(), report);
            }
            ToControl::Pages { from, pages } => {
                self.memory.handle_pages(now, &mut self.links, from, &pages);
            }
            ToControl::Covered => self.memory.handle_covered(now, &mut self.links),
            ToControl::Copied { shard, op } => self.fetches.handle_copied((shard, op)),
            ToControl::Status { ticket, core, status } => {
                self.handle_status(Ticket(ticket), core, status);
            }
            ToControl::Closed { ticket } => self.handle_closed(now, Ticket(ticket)),
            ToControl::Dirty { ticket, runs, next } => {
                let ticket = Ticket(ticket);
                self.events.push_back(Event::Dirty { ticket, runs, next });
            }
            ToControl::Cut { ticket, done } => self.handle_cut(Ticket(ticket), done),
            ToControl::Salvaged { ticket, bytes } => {
                self.events.push_back(Event::Salvaged { ticket: Ticket(ticket), bytes });
            }
            ToControl::Drained(core) => {
                log::debug!("core {} is drained", core.0);
                if let Drain::Cores(left) = &mut self.drain {
                    *left -= 1;
                }
            }
        }
    }

    /// The volume of this number, unless it is being deleted.
    fn keeper_of(&self, number: VolumeId) -> Option<usize> {
        let found = self.volumes.iter().position(|volume| volume.number == number);
        found.filter(|index| !matches!(self.volumes[*index].state, State::Deleting(_)))
    }

    fn gather(&mut self, purpose: Purpose) -> Ticket {
        let ticket = self.ticket();
        let cores = (0..self.links.cores()).map(|_| None).collect();
        self.gathers.insert(ticket, Gather { purpose, cores });
        self.links.send_to_all(|| FromControl::Report { ticket: ticket.0 });
        ticket
    }

    fn handle_status(&mut self, ticket: Ticket, core: CoreId, status: CoreStatus) {
        let Some(gather) = self.gathers.get_mut(&ticket) else { return };
        gather.cores[usize::from(core.0)] = Some(status);
        if gather.cores.iter().any(Option::is_none) {
            return;
        }
        let gather = self.gathers.remove(&ticket).expect("found above");
        match gather.purpose {
            Purpose::Admin => {
                let cores = gather.cores.into_iter().flatten().collect();
                self.events.push_back(Event::Report { ticket, cores });
            }
            Purpose::Introduced { volume, life } => self.introduced(volume, life),
        }
    }

    /// Tells the cores which volumes may be opened.
    fn publish(&mut self) {
        // Volumes first: the first of all is what a client gets that names none.
        let of = |view| self.volumes.iter().filter(move |volume| volume.view.is_some() == view);
        let exports = of(false).chain(of(true)).filter_map(Volume::export);
        let exports: Arc<[ExportInfo]> = exports.collect();
        self.links.exports(&exports);
    }

    fn settle_delete(&mut self, index: usize) {
        if let (State::Deleting(ticket), 0) = (&self.volumes[index].state, self.volumes[index].ops)
        {
            self.events.push_back(Event::Quiet { ticket: *ticket });
        }
    }

    /// Gives up what the cache holds of a volume, but not the claims on it.
    fn empty(&mut self, volume: Uuid) -> Result<(), String> {
        if let Some(number) = self.rows.find(volume).map(|row| row.number) {
            self.rows.empty(volume)?;
            self.forget(number);
            let new = self.rows.find(volume).map_or(number, |row| row.number);
            if let Some(index) = self.index(volume) {
                (self.volumes[index].number, self.volumes[index].in_shards) = (new, false);
            }
        }
        Ok(())
    }

    /// Takes a volume out of the table and out of the shards.
    fn forget_row(&mut self, volume: Uuid) -> Result<(), String> {
        if let Some(number) = self.rows.find(volume).map(|row| row.number) {
            self.rows.remove(volume)?;
            self.forget(number);
        }
        Ok(())
    }

    /// Nothing under this number counts any more. The table says so already.
    fn forget(&mut self, number: VolumeId) {
        self.logged.remove(&number);
        self.links.mail_all_shards(ToShard::Forget { volume: number });
    }

    fn step_drain(&mut self, now: Instant) {
        if self.drain == Drain::Cores(0) {
            self.drain = Drain::Releasing;
            for index in 0..self.volumes.len() {
                self.feed(now, index, Input::Detach);
            }
        }
        if self.drain == Drain::Releasing && self.volumes.iter().all(Volume::is_over) {
            self.drain = Drain::Stopping;
            self.links.send_to_all(|| FromControl::Stop);
        }
        if self.drain == Drain::Stopping && self.links.flush() {
            self.drain = Drain::Stopped;
            self.events.push_back(Event::Stopped);
        }
    }

    fn add_note(&mut self, text: &str) -> u32 {
        if self.notes.back().is_none_or(|last| last != text) {
            if self.notes.len() == NOTES_MAX {
                self.notes.pop_front();
                self.notes_first = self.notes_first.wrapping_add(1);
            }
            self.notes.push_back(text.into());
        }
        self.notes_first.wrapping_add(self.notes.len() as u32 - 1)
    }

    fn note(&self, number: u32) -> Option<String> {
        self.notes.get(number.wrapping_sub(self.notes_first) as usize).cloned()
    }
}

/// A seed for what must differ between servers, but need not be a secret.
fn seed(random: &mut dyn FnMut() -> [u8; 16]) -> u64 {
    let mut seed = [0; 8];
    seed.copy_from_slice(&random()[..8]);
    u64::from_le_bytes(seed)
}

fn volume_of(mail: &ToKeeper) -> VolumeId {
    match *mail {
        ToKeeper::Dirtied { volume }
        | ToKeeper::Grown { volume }
        | ToKeeper::Pressure { volume }
        | ToKeeper::Sync { volume }
        | ToKeeper::Frozen { volume, .. }
        | ToKeeper::Pushed { volume, .. } => volume,
    }
}

#[cfg(test)]
mod tests;
