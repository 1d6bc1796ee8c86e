//! The control thread of a running server: turns the control loop, and answers the admin socket.

mod changes;
mod handover;
mod push;
mod rename;
mod resize;
mod salvage;
mod snapshot;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::future::pending;
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use heeler_core::counters::Counts;
use heeler_core::event::Buffering;
use heeler_core::ids::VolumeId;
use heeler_core::keeper::Edit;
use heeler_core::mailbox::Parker;
use heeler_core::policy::Policy;
use heeler_core::time::Instant;
use heeler_core::wire::head::{Head, Settings};
use heeler_core::wire::names::Uuid;
use heeler_core::wire::superblock::VolumeTable;
use heeler_driver::control::{Control, Event, TableIo, Ticket, VolumeStatus};
use heeler_driver::mail::{CoreStatus, ShardStatus};
use heeler_driver::start::CacheDevice;
use heeler_driver::wires;
use heeler_hw::topology;
use heeler_store::volumes::{self, NewVolume, VolumeError};
use heeler_store::{Fencing, Store};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, oneshot};

pub(crate) use self::resize::resize_stored;
use crate::api::{
    Answer, CacheInfo, CacheReport, CoreInfo, Deleted, Purged, Request, Resized, Scrubbed,
    ServerMemory, Status, VolumeInfo, VolumeLine,
};
use crate::counters;
use crate::files::SharedFile;
use crate::lines::{self, bytes};
use crate::setting::Setting;
use crate::size::{Memory, Size};
use crate::store_io::{Requests, Wake};

/// How often a push says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// How often it is looked whether clients are gone: one may just have said goodbye.
const PARTING_MAX: u32 = 5;
/// Bytes of the longest request line.
const REQUEST_BYTES_MAX: u64 = 64 << 10;

/// The volume table on the cache device.
#[derive(Debug)]
pub(crate) struct Table(pub(crate) CacheDevice<SharedFile>);

impl TableIo for Table {
    fn save(&mut self, table: &VolumeTable) -> Result<(), String> {
        self.0.save_table(table).map_err(|e| e.to_string())
    }
}

/// What does not change while the server runs.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) store_url: String,
    pub(crate) cache_path: String,
    pub(crate) device_bytes: u64,
    pub(crate) shards: u16,
    pub(crate) cpus: Vec<u32>,
    /// What memory may be changed to at most.
    pub(crate) memory_limit_bytes: u64,
    pub(crate) listen: Vec<String>,
}

/// The control loop and all who ask something of it. Everything runs on one thread; nothing is
/// borrowed across an await.
pub(crate) struct Server {
    control: RefCell<Control<Requests, Table>>,
    pub(crate) store: Store,
    /// Whether it keeps a second writer out; `None` until that is known.
    fencing: RefCell<Option<Fencing>>,
    wake: Wake,
    /// Who waits for the event with a ticket.
    waiters: RefCell<HashMap<Ticket, oneshot::Sender<Event>>>,
    /// A volume was served or refused.
    changed: Notify,
    /// Refused volumes of which it is being found out what is dirty.
    settling: RefCell<BTreeSet<Uuid>>,
    facts: Facts,
    start: std::time::Instant,
    draining: Cell<bool>,
    /// Held while a snapshot is deleted.
    deletions: tokio::sync::Mutex<()>,
    /// Held while a volume's size changes.
    resizes: tokio::sync::Mutex<()>,
    on_served: Box<dyn Fn(&VolumeStatus)>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("facts", &self.facts).finish_non_exhaustive()
    }
}

/// The monotonic clock of the control thread since `start`.
pub(crate) fn since(start: std::time::Instant) -> Instant {
    Instant(u64::try_from(start.elapsed().as_nanos()).expect("584 years"))
}

/// Why so much memory cannot be had.
pub(crate) fn too_much_memory(memory: Memory, limit: u64) -> String {
    format!("{memory} of memory is more than the {} that this process may have", Size(limit))
}

/// Seconds since 1970.
pub(crate) fn unix_secs() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Server {
    pub(crate) fn new(
        control: Control<Requests, Table>,
        store: Store,
        wake: Wake,
        facts: Facts,
        start: std::time::Instant,
        on_served: Box<dyn Fn(&VolumeStatus)>,
    ) -> Self {
        Self {
            control: RefCell::new(control),
            store,
            fencing: RefCell::default(),
            wake,
            waiters: RefCell::default(),
            changed: Notify::new(),
            settling: RefCell::default(),
            facts,
            start,
            draining: Cell::new(false),
            deletions: tokio::sync::Mutex::new(()),
            resizes: tokio::sync::Mutex::new(()),
            on_served,
        }
    }

    fn now(&self) -> Instant {
        since(self.start)
    }

    /// Turns the loop until everything has been drained and stopped.
    pub(crate) async fn run(
        self: Rc<Self>,
        mut parker: Parker,
        event: Arc<wires::Event>,
    ) -> io::Result<()> {
        // To the reactor an eventfd is like a pipe; a read takes the count and ends readiness.
        let rung = pipe::Receiver::from_owned_fd_unchecked(event.as_fd().try_clone_to_owned()?)?;
        loop {
            let now = self.now();
            let next = self.control.borrow_mut().turn(now);
            while let Some(event) = { self.control.borrow_mut().poll_event() } {
                if matches!(event, Event::Stopped) {
                    return Ok(());
                }
                self.pass_on(event);
            }
            let at_once = next.is_some_and(|next| next <= now);
            if at_once || !parker.prepare_park(|| self.control.borrow_mut().has_news()) {
                tokio::task::yield_now().await;
                continue;
            }
            let sleep = async {
                match next {
                    Some(next) => tokio::time::sleep(Duration::from_nanos((next - now).0)).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                ready = rung.readable() => {
                    ready?;
                    // It fails only if another wake-up was faster.
                    let _ = rung.try_read(&mut [0; 8]);
                }
                () = self.wake.notified() => {}
                () = sleep => {}
            }
            parker.awake();
        }
    }

    /// Begins the end; `run` returns when it is reached.
    pub(crate) fn drain(&self) {
        self.draining.set(true);
        self.control.borrow_mut().drain();
        self.wake.notify_one();
    }

    /// Claims a volume that the store has.
    pub(crate) fn add_volume(&self, volume: Uuid, name: &str, takeover: bool) {
        self.control.borrow_mut().add_volume(self.now(), volume, name, takeover);
        self.wake.notify_one();
    }

    /// The volumes that the store lists are all known.
    pub(crate) fn forget_unlisted(&self) {
        if let Err(e) = self.control.borrow_mut().forget_unlisted() {
            log::warn!("{e}");
        }
        self.wake.notify_one();
    }

    /// Waits until every volume is served or refused.
    pub(crate) async fn settled(&self) {
        while self.control.borrow().volumes().iter().any(|volume| self.is_settling(volume)) {
            self.changed.notified().await;
        }
    }

    /// The volumes that were lost to another owner, and why.
    pub(crate) fn lost(&self) -> Vec<String> {
        let volumes = self.control.borrow().volumes();
        let lost = volumes.into_iter().filter(|volume| volume.state == "fenced");
        lost.map(|volume| format!("volume {}: {}", volume.name, volume.reason.unwrap_or_default()))
            .collect()
    }

    /// Bytes that are not in the store, for the log of a drain.
    pub(crate) async fn dirty_bytes(&self) -> u64 {
        let shards = self.report_shards().await;
        bytes(shards.iter().map(|shard| shard.usage.dirty_blocks).sum())
    }

    fn pass_on(self: &Rc<Self>, event: Event) {
        let ticket = match &event {
            Event::Pushed { ticket, .. }
            | Event::Report { ticket, .. }
            | Event::Quiet { ticket }
            | Event::EditRefused { ticket, .. }
            | Event::Detached { ticket, .. }
            | Event::Dirty { ticket, .. }
            | Event::Cut { ticket, .. }
            | Event::Salvaged { ticket, .. } => *ticket,
            Event::Stale { volume } => return self.settle_stale(*volume),
            Event::Served { name } | Event::Refused { name, .. } => {
                let status = self.control.borrow().volumes();
                if let Some(status) = status.iter().find(|status| status.name == *name) {
                    (self.on_served)(status);
                }
                return self.changed.notify_waiters();
            }
            Event::Stopped => return,
        };
        if let Some(waiter) = self.waiters.borrow_mut().remove(&ticket) {
            // Nobody waits any more if the client has gone.
            let _ = waiter.send(event);
        }
    }

    fn wait_for(&self, ticket: Ticket) -> oneshot::Receiver<Event> {
        let (tx, rx) = oneshot::channel();
        self.waiters.borrow_mut().insert(ticket, tx);
        self.wake.notify_one();
        rx
    }

    async fn report(&self) -> Vec<CoreStatus> {
        let ticket = self.control.borrow_mut().report();
        match self.wait_for(ticket).await {
            Ok(Event::Report { cores, .. }) => cores,
            _ => Vec::new(),
        }
    }

    async fn report_shards(&self) -> Vec<ShardStatus> {
        shards_of(&self.report().await)
    }

    fn find(&self, name: &str) -> Option<VolumeStatus> {
        self.control.borrow().volumes().into_iter().find(|volume| volume.name == name)
    }

    async fn create(&self, new: &NewVolume<'_>) -> Result<(), String> {
        self.prepare_store().await.map_err(|e| e.to_string())?;
        let head = volumes::create(&self.store, new).await.map_err(|e| e.to_string())?;
        self.serve_made(&head).await
    }

    /// Claims a volume that was just made, and serves it.
    async fn serve_made(&self, head: &Head) -> Result<(), String> {
        let name = &head.name;
        self.add_volume(head.volume, name, false);
        let served = self.served(head.volume, name).await;
        served.map_err(|reason| format!("volume '{name}' was made, but is not served: {reason}"))
    }

    /// The volumes that this server knows. The store is not asked.
    fn own(&self, shards: &[ShardStatus]) -> Vec<VolumeLine> {
        let own = self.control.borrow().volumes();
        let line = |status: &VolumeStatus| {
            let mut line = lines::of_status(status);
            self.better(&mut line, status, shards);
            line
        };
        own.iter().map(line).collect()
    }

    /// Puts in what the server knows of one of its own volumes.
    fn better(&self, line: &mut VolumeLine, status: &VolumeStatus, shards: &[ShardStatus]) {
        lines::better(line, status, Some(dirty_of(shards, status.number)));
        line.push = Some(self.push_info(status, shards));
    }

    /// The volumes of the store, or, if it does not answer, those that this server knows.
    async fn list(&self, shards: &[ShardStatus]) -> Vec<VolumeLine> {
        let own = self.control.borrow().volumes();
        let mut lines: Vec<_> = match self.stored_volumes().await {
            Ok(listed) => listed.iter().map(lines::of_listed).collect(),
            Err(e) => {
                log::warn!("volumes cannot be listed: {e}");
                own.iter().map(lines::of_status).collect()
            }
        };
        for line in &mut lines {
            if let Some(status) = own.iter().find(|status| status.uuid.to_string() == line.uuid) {
                self.better(line, status, shards);
            }
        }
        lines
    }

    async fn info(&self, name: &str) -> Result<VolumeInfo, String> {
        let stored = self.stored_info(name).await;
        let status = self.find(name);
        let mut info = match (stored, &status) {
            (Ok(info), _) => lines::of_info(name, &info),
            (Err(_), Some(status)) => {
                VolumeInfo { line: lines::of_status(status), ..VolumeInfo::default() }
            }
            (Err(e), None) => return Err(e.to_string()),
        };
        if let Some(status) = status {
            let shards = self.report_shards().await;
            self.better(&mut info.line, &status, &shards);
            if let Some(settings) = &status.settings {
                info.mode = settings.mode.name().into();
                info.buffered_read = settings.buffering.reads;
                info.buffered_write = settings.buffering.writes;
            }
            if status.is_stranded() {
                info.stranded = Some(self.dirty_map(&status).await.info());
            }
        }
        Ok(info)
    }

    /// Changes a volume's settings: here at once, and in the store.
    async fn set(&self, name: &str, changes: &[Setting]) -> Result<(), String> {
        let served = self.find(name).filter(VolumeStatus::is_served);
        let Some((volume, now)) = served.and_then(|status| Some((status.uuid, status.settings?)))
        else {
            return set_stored(&self.store, name, changes).await;
        };
        let (was, mut next) = (now.read_only, now);
        Setting::apply(changes, &mut next);
        let now = next.read_only;
        if now == was {
            return self.edit(volume, name, &Edit::Settings(next)).await;
        }
        self.set_read_only(volume, name, next).await
    }

    /// Changes a volume that this server serves; done when the store has it.
    pub(crate) async fn edit(&self, volume: Uuid, name: &str, edit: &Edit) -> Result<(), String> {
        let ticket = self.control.borrow_mut().edit(self.now(), volume, edit);
        let ticket = ticket.ok_or_else(|| format!("volume '{name}' was removed"))?;
        match self.wait_for(ticket).await {
            Ok(Event::Pushed { committed: true, .. }) => Ok(()),
            Ok(Event::EditRefused { why, .. }) => Err(format!("volume '{name}': {why}")),
            _ => Err(format!("volume '{name}' was lost before the store had the change")),
        }
    }

    /// Reads all that the cache device holds of a volume, and says how far it is.
    async fn scrub(&self, name: &str, out: &mut Lines) -> Result<Scrubbed, String> {
        let served = self.find(name).filter(VolumeStatus::is_served);
        let volume = served.ok_or_else(|| no_volume(name))?;
        let lost = || format!("volume '{name}' was closed before the scrub was done");
        let state = async || counters::scrub_of(&self.report_shards().await, volume.number);
        let before = state().await.ok_or_else(lost)?;
        if before.running {
            return Err(format!("a scrub of volume '{name}' is under way"));
        }
        self.control.borrow_mut().scrub(volume.uuid);
        loop {
            // The question comes to the cores behind the order to scrub.
            let now = state().await.ok_or_else(lost)?;
            let found = now.found.since(before.found);
            let checked_bytes = bytes(found.sound_blocks + found.damaged_blocks);
            if !now.running {
                return Ok(Scrubbed {
                    checked_bytes,
                    damaged_blocks: found.damaged_blocks,
                    repaired_blocks: found.repaired_blocks,
                });
            }
            let progress = Answer::Progress {
                done_bytes: checked_bytes,
                total_bytes: (checked_bytes as f64 / now.part_done.max(0.001)) as u64,
            };
            out.send(&progress).await?;
            tokio::time::sleep(PROGRESS_EVERY).await;
        }
    }

    async fn delete(&self, name: &str, force: bool) -> Result<Deleted, String> {
        let Some(status) = self.find(name) else {
            return self.delete_stored(name, force).await;
        };
        let ours = status.is_served() || status.state == "deleting";
        if ours && !force {
            self.refuse_with_clients(name).await?;
        }
        if status.state == "served" {
            self.prepare_delete(name, force).await?;
        }
        if !ours {
            // Another's, or nobody's: the store says whether it may go.
            let deleted = self.delete_stored(name, force).await?;
            self.close(status.uuid).await;
            self.control.borrow_mut().finish_delete(status.uuid)?;
            self.forget_snapshots(status.uuid)?;
            self.wake.notify_one();
            return Ok(deleted);
        }
        self.close(status.uuid).await;
        let deleted = self.delete_stored(name, true).await?;
        self.control.borrow_mut().finish_delete(status.uuid)?;
        self.forget_snapshots(status.uuid)?;
        self.wake.notify_one();
        Ok(deleted)
    }

    /// An error if clients are connected.
    async fn refuse_with_clients(&self, name: &str) -> Result<(), String> {
        let mut connections = 0;
        for _ in 0..PARTING_MAX {
            connections = self.report().await.iter().map(|core| core.connections).sum::<u64>();
            if connections == 0 {
                break;
            }
            tokio::time::sleep(PROGRESS_EVERY).await;
        }
        match connections {
            0 => Ok(()),
            connections => Err(format!(
                "{connections} clients are connected to this server, maybe to '{name}': \
                 disconnect them, or use --force"
            )),
        }
    }

    /// Closes a volume to clients, and waits until nothing of it is on its way to the store.
    async fn close(&self, volume: Uuid) {
        let ticket = self.control.borrow_mut().begin_delete(volume);
        if let Some(ticket) = ticket {
            // It fails only if the loop has ended.
            let _ = self.wait_for(ticket).await;
        }
    }

    async fn delete_stored(&self, name: &str, force: bool) -> Result<Deleted, String> {
        let deleted = volumes::delete(&self.store, name, force, unix_secs()).await;
        deleted.map(|d| Deleted { objects: d.objects, bytes: d.bytes }).map_err(|e| e.to_string())
    }

    fn cache_info(&self, shards: &[ShardStatus]) -> CacheInfo {
        let mut info = CacheInfo {
            path: self.facts.cache_path.clone(),
            device_bytes: self.facts.device_bytes,
            shards: self.facts.shards,
            stranded_bytes: bytes(self.control.borrow().stranded_blocks()),
            server_memory: self.memory(),
            ..CacheInfo::default()
        };
        for shard in shards {
            let (usage, counts) = (&shard.usage, &shard.counts.all.counts);
            info.nvme_bytes += bytes(usage.nvme_blocks);
            info.nvme_capacity_bytes += bytes(usage.nvme_capacity);
            info.ram_bytes += bytes(usage.ram_blocks);
            info.ram_capacity_bytes += bytes(usage.ram_capacity);
            info.dirty_bytes += bytes(usage.dirty_blocks);
            info.onodes += usage.onodes;
            info.read_bytes += bytes(counts.traffic.read_blocks);
            info.read_ram_bytes += bytes(counts.traffic.ram_blocks);
            info.read_nvme_bytes += bytes(counts.traffic.nvme_blocks);
            info.fetched_bytes += bytes(counts.traffic.fetched_blocks);
            info.written_bytes += bytes(counts.traffic.written_blocks);
            info.pushed_bytes += bytes(counts.shard.pushed_blocks);
            info.moved_bytes += bytes(counts.shard.moved_blocks);
            info.dropped_bytes += bytes(counts.shard.dropped_blocks);
            info.device_flushes += counts.shard.flushes;
            info.device_errors += counts.shard.device_errors;
            info.damaged_blocks += counts.shard.damaged_blocks;
            info.lost_blocks += counts.shard.lost_blocks;
        }
        info
    }

    /// Everything that is counted, of all shards or one, and of all volumes or one.
    async fn cache_report(
        &self,
        volume: Option<&str>,
        shard: Option<u16>,
    ) -> Result<CacheReport, String> {
        let mut volumes = self.control.borrow().volumes();
        volumes.extend(self.control.borrow().views().into_iter().map(|(_, view)| view));
        if let Some(name) = volume {
            volumes.retain(|status| status.name == name);
            if volumes.is_empty() {
                return Err(no_volume(name));
            }
        }
        let mut shards = self.report_shards().await;
        if let Some(number) = shard {
            shards.retain(|status| status.shard.0 == number);
            if shards.is_empty() {
                let last = self.facts.shards - 1;
                return Err(format!("there is no shard {number}: they are numbered 0 to {last}"));
            }
        }
        let cache = self.cache_info(&shards);
        Ok(counters::report(cache, &shards, &volumes))
    }

    async fn purge(&self, force: bool) -> Result<Purged, String> {
        let before = self.cache_info(&self.report_shards().await);
        let dirty = before.dirty_bytes + before.stranded_bytes;
        if dirty > 0 && !force {
            return Err(format!(
                "{} are dirty ({dirty} bytes): push them with `heeler cache flush`, or drop them \
                 for ever with --force",
                Size(dirty)
            ));
        }
        let purged = self.control.borrow_mut().purge(self.now(), force)?;
        let after = self.cache_info(&self.report_shards().await);
        let dropped = before.dirty_bytes.saturating_sub(after.dirty_bytes);
        let held = |info: &CacheInfo| info.nvme_bytes + info.ram_bytes;
        Ok(Purged {
            dirty_bytes: dropped + bytes(purged.stranded_blocks),
            clean_bytes: held(&before).saturating_sub(held(&after)).saturating_sub(dropped),
        })
    }

    fn memory(&self) -> ServerMemory {
        let usage = self.control.borrow().memory_usage();
        ServerMemory {
            target_bytes: usage.total_bytes,
            taken_bytes: usage.taken_bytes,
            arena_bytes: usage.arena_bytes,
            pool_bytes: usage.pool_bytes,
            table_bytes: usage.table_bytes,
            resident_bytes: topology::resident_memory().unwrap_or(0),
        }
    }

    /// Changes the memory that the server takes, and says how far it is.
    async fn resize(&self, memory: Memory, out: &mut Lines) -> Result<Resized, String> {
        let before = self.memory();
        let limit = self.facts.memory_limit_bytes;
        let process = topology::memory_limit().map_err(|e| format!("the size of memory: {e}"))?;
        let bytes = memory.bytes(process);
        if bytes > limit {
            return Err(format!(
                "{memory} of memory is more than {}: a server can have what its process may have, \
                 and 4 times what it was started with",
                Size(limit)
            ));
        }
        let resized = self.control.borrow_mut().resize_memory(self.now(), bytes);
        resized.map_err(|needed| {
            let needed = needed.div_ceil(1 << 20);
            format!(
                "{memory} of memory is too little: what is set aside and in use needs {needed}M"
            )
        })?;
        self.wake.notify_one();
        let total = bytes.abs_diff(before.taken_bytes);
        while !self.control.borrow().memory_is_settled() {
            tokio::time::sleep(PROGRESS_EVERY).await;
            let done = self.memory().taken_bytes.abs_diff(before.taken_bytes).min(total);
            out.send(&Answer::Progress { done_bytes: done, total_bytes: total }).await?;
        }
        let now = self.memory();
        if now.target_bytes < bytes {
            return Err(format!(
                "the system had not enough memory; the server takes {} now",
                Size(now.target_bytes)
            ));
        }
        log::info!("memory was {}, is {}", Size(before.target_bytes), Size(now.target_bytes));
        Ok(Resized {
            old_bytes: before.target_bytes,
            new_bytes: now.target_bytes,
            resident_bytes: now.resident_bytes,
        })
    }

    async fn status(&self) -> Status {
        let cores = self.report().await;
        let shards = shards_of(&cores);
        let core = |(cpu, core): (&u32, &CoreStatus)| CoreInfo {
            cpu: *cpu,
            shards: core.shards.iter().map(|shard| shard.shard.0).collect(),
            connections: core.connections,
            requests: core.requests,
            mails: core.mails,
        };
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: self.start.elapsed().as_secs(),
            draining: self.draining.get(),
            listen: self.facts.listen.clone(),
            cores: self.facts.cpus.iter().zip(&cores).map(core).collect(),
            store: self.store_info(),
            cache: self.cache_info(&shards),
            volumes: self.own(&shards),
        }
    }

    async fn answer(&self, request: Request, out: &mut Lines) -> Result<Answer, String> {
        Ok(match request {
            Request::Store => done(&self.facts.store_url),
            Request::Status => done(&self.status().await),
            Request::VolumeCreate {
                name,
                size_bytes,
                object_bytes,
                mode,
                buffered_read: reads,
                buffered_write: writes,
            } => {
                let buffering = Buffering { reads, writes };
                let settings = Settings { mode, buffering, ..Settings::default() };
                let new = new_volume(&name, size_bytes, object_bytes, settings)?;
                done(&self.create(&new).await?)
            }
            Request::VolumeSet { name, settings } => done(&self.set(&name, &settings).await?),
            Request::VolumeManage { name, order } => self.manage(&name, order, out).await?,
            Request::VolumeScrub { name } => done(&self.scrub(&name, out).await?),
            Request::VolumeAttach { name, takeover } => done(&self.attach(&name, takeover).await?),
            Request::VolumeDetach { name } => done(&self.detach(&name, out).await?),
            Request::VolumeStay { name } => done(&self.stay(&name)?),
            Request::VolumeSalvage { name, path } => done(&self.salvage(&name, &path, out).await?),
            Request::VolumeForget { name, force } => done(&self.forget(&name, force).await?),
            Request::VolumeList => done(&self.list(&self.report_shards().await).await),
            Request::VolumeInfo { name } => done(&self.info(&name).await?),
            Request::VolumeDelete { name, force } => done(&self.delete(&name, force).await?),
            Request::VolumePush { name } => {
                let volume = self.find(&name);
                let volume = volume.ok_or_else(|| no_volume(&name))?;
                done(&self.push(&[volume], out).await?)
            }
            Request::VolumeFlatten { name } => done(&self.flatten(&name, out).await?),
            Request::VolumeTree => {
                let listed = volumes::list(&self.store).await.map_err(|e| e.to_string())?;
                done(&crate::snapshot::tree(&listed))
            }
            Request::SnapshotCreate { name } => done(&self.snapshot_create(&name.parse()?).await?),
            Request::SnapshotList { volume } => done(&self.snapshot_list(&volume).await?),
            Request::SnapshotDelete { name } => done(&self.snapshot_delete(&name.parse()?).await?),
            Request::SnapshotRollback { name, force } => {
                done(&self.snapshot_rollback(&name.parse()?, force, out).await?)
            }
            Request::SnapshotServe { name, stop } => {
                done(&self.snapshot_serve(&name.parse()?, stop).await?)
            }
            Request::Clone { from, name } => {
                done(&self.clone_snapshot(&from.parse()?, &name).await?)
            }
            Request::CacheInfo { volume, shard } => {
                done(&self.cache_report(volume.as_deref(), shard).await?)
            }
            Request::CacheResize { memory } => done(&self.resize(memory, out).await?),
            Request::CacheFlush => {
                let mut all = self.control.borrow().volumes();
                // Nothing of them can be pushed; `status` shows them.
                all.retain(|volume| matches!(volume.state, "starting" | "served" | "detaching"));
                done(&self.push(&all, out).await?)
            }
            Request::CachePurge { force } => done(&self.purge(force).await?),
            Request::CachePolicy { policy } => {
                let known = Policy::from_name(&policy);
                let policy = known.ok_or_else(|| format!("no policy is called '{policy}'"))?;
                self.control.borrow_mut().set_policy(policy);
                self.wake.notify_one();
                done(&())
            }
        })
    }

    /// Answers the requests of one client.
    async fn serve_client(&self, stream: UnixStream) -> Result<(), String> {
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let mut out = Lines(writer);
        loop {
            let mut line = String::new();
            let mut limited = tokio::io::AsyncReadExt::take(&mut reader, REQUEST_BYTES_MAX);
            let read = limited.read_line(&mut line).await.map_err(|e| e.to_string())?;
            if read == 0 {
                return Ok(());
            }
            let answer = match serde_json::from_str(&line) {
                Ok(request) => self.answer(request, &mut out).await.unwrap_or_else(Answer::Failed),
                Err(e) => Answer::Failed(format!("not a request: {e}")),
            };
            out.send(&answer).await?;
        }
    }

    /// Accepts clients of the admin socket for ever. Wants a tokio `LocalSet`.
    pub(crate) async fn listen(self: Rc<Self>, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let this = self.clone();
                    drop(tokio::task::spawn_local(async move {
                        if let Err(e) = this.serve_client(stream).await {
                            log::debug!("admin client: {e}");
                        }
                    }));
                }
                Err(e) => {
                    log::warn!("admin socket: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

/// The way back to a client.
struct Lines(tokio::net::unix::OwnedWriteHalf);

impl Lines {
    async fn send(&mut self, answer: &Answer) -> Result<(), String> {
        let mut line = serde_json::to_vec(answer).expect("answers are plain data");
        line.push(b'\n');
        self.0.write_all(&line).await.map_err(|e| e.to_string())
    }
}

fn no_volume(name: &str) -> String {
    format!("this server has no volume '{name}'; `heeler volume list` shows them")
}

fn done<T: serde::Serialize>(value: &T) -> Answer {
    Answer::Done(serde_json::to_value(value).expect("answers are plain data"))
}

/// Changes the settings of a volume that no server has.
pub(crate) async fn set_stored(
    store: &Store,
    name: &str,
    changes: &[Setting],
) -> Result<(), String> {
    let change = |head: &mut Head| {
        Setting::apply(changes, &mut head.settings);
        head.settings.check().map_err(VolumeError::Settings)
    };
    let set = volumes::edit(store, name, unix_secs(), change).await;
    set.map_err(|e| match e {
        VolumeError::InUse { name, host, .. } => format!(
            "volume '{name}' belongs to a server on '{host}': set it there (name its data \
             directory with --data), or stop that server"
        ),
        e => e.to_string(),
    })
}

/// What a volume is made from, or why there can be none like it.
pub(crate) fn new_volume(
    name: &str,
    size: u64,
    object: u64,
    settings: Settings,
) -> Result<NewVolume<'_>, String> {
    if size == 0 || !size.is_multiple_of(bytes(1)) {
        return Err(format!("{size} bytes: the size must be a multiple of 4096, and not 0"));
    }
    if !object.is_power_of_two() {
        return Err(format!("objects of {object} bytes: the size must be a power of two"));
    }
    let object_shift = object.trailing_zeros() as u8;
    let blocks = size / bytes(1);
    Ok(NewVolume { name, blocks, object_shift, unix_secs: unix_secs(), settings })
}

/// All shards, in order.
fn shards_of(cores: &[CoreStatus]) -> Vec<ShardStatus> {
    let mut shards: Vec<_> = cores.iter().flat_map(|core| core.shards.iter().cloned()).collect();
    shards.sort_by_key(|shard| shard.shard.0);
    shards
}

fn dirty_of(shards: &[ShardStatus], volume: VolumeId) -> u64 {
    counters::shares_of(shards, volume).map(|share| share.dirty_blocks).sum()
}

mod store;
#[cfg(test)]
mod tests;
