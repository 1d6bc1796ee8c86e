//! `heeler serve`: from settings to running threads, and back to an orderly end.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use heeler_core::ids::VolumeId;
use heeler_core::lending::Lending;
use heeler_core::wire::head;
use heeler_core::wire::names::Uuid;
use heeler_driver::adapter::Listener;
use heeler_driver::control::{self as driver, Control, Logged, Setup, VolumeStatus};
use heeler_driver::start::{CacheDevice, Plan};
use heeler_driver::wires::{ControlWires, CoreWires, wire};
use heeler_driver::{ConnectionBudget, CoreLoop, CoreParts};
use heeler_hw::{Arena, BlockFile, UringQueue, topology};
use heeler_store::{ErrorKind, Store, StoreConfig, StoreError, Unusable, volumes};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

use crate::client::SOCKET;
use crate::files::{DataDir, SharedFile, open_cache, random};
use crate::lines::bytes;
use crate::runtime::Runtime;
use crate::server::{Facts, Server, Table, new_volume, since, too_much_memory, unix_secs};
use crate::settings::{Listen, Settings};
use crate::size::{Memory, Size};
use crate::store_io::Requests;

/// Memory that the server takes if it is not told otherwise, and may have that much.
const MEMORY: Size = Size(1 << 30);
/// Operations that one core has on the device at most.
const QUEUE_DEPTH: u32 = 256;
/// The volume that an empty store gets.
const FIRST_VOLUME: (&str, u64) = ("disk0", 16 << 30);
/// Pauses between tries to reach the store at the start.
const STORE_AGAIN: Duration = Duration::from_secs(2);
/// How much nicer threads are that carry bytes to the store and back, than those that serve.
const STORE_NICER: i32 = 15;
/// How often a drain says what it waits for.
const DRAIN_NEWS: Duration = Duration::from_secs(5);

/// Why the server did not start or did not end well.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It was told something that cannot be.
    Usage(String),
    /// Anything else.
    Run(String),
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Run(text)
    }
}

/// Serves until a signal ends it.
pub(crate) fn serve(settings: &Settings) -> Result<(), Failure> {
    settings.runtime.prepare();
    let _dir = DataDir::lock(&settings.place.data)?;
    let cpus = cpus(settings.cores.as_deref())?;
    let device = open_cache(settings)?;
    let cores = u16::try_from(cpus.len()).map_err(|_| "too many cores".to_string())?;
    let limit = topology::memory_limit().map_err(|e| format!("the size of memory: {e}"))?;
    let (mut plan, lending) = plan(settings.memory, limit, &device, cores)?;
    plan.config.policy = settings.policy;
    let arena = plan.arena().map_err(|e| {
        format!("memory: {e}; the system has not enough, choose less with --memory")
    })?;
    let listeners = listeners(&settings.listen)?;
    let admin = bind_unix(&settings.place.data.join(SOCKET))?;
    // A second try is for a connection that broke. What helps against more is to wait, and that is
    // the control thread's business.
    let store = StoreConfig { attempts: 2, ..settings.place.store.clone() };
    let store = Store::open(store).map_err(|e| e.to_string())?;
    let (wires, control) =
        wire(cpus.len(), true).map_err(|e| format!("the cores' mailboxes: {e}"))?;
    let file = device.file().clone();
    share_soon(0);
    let runtime = settings.runtime;
    let (threads, logged) = start_cores(runtime, &cpus, wires, &plan, &arena, &file, &listeners)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_start(|| share_soon(STORE_NICER))
        .build()
        .map_err(|e| format!("the control thread's runtime: {e}"))?;
    let batch_bytes = plan.batch_bytes() * cpus.len();
    let memory = driver::Memory { lending, arena, fetch_bytes: plan.fetch_bytes(), batch_bytes };
    let limit = plan.memory_max();
    let parts = Parts { device, store, control, logged, cpus, admin, memory, limit };
    let tasks = tokio::task::LocalSet::new();
    let result = runtime.block_on(tasks.run_until(control_thread(settings, parts)));
    for path in settings.listen.iter().filter_map(unix_path) {
        // The next start removes what stays.
        let _ = fs::remove_file(path);
    }
    let _ = fs::remove_file(settings.place.data.join(SOCKET));
    result?;
    for thread in threads {
        if thread.join().is_err() {
            return Err("a core's thread ended in a panic".to_string().into());
        }
    }
    println!("everything is in the store; bye");
    Ok(())
}

/// What the control thread is made of.
struct Parts {
    device: CacheDevice<SharedFile>,
    store: Store,
    control: ControlWires,
    logged: Found,
    cpus: Vec<u32>,
    admin: UnixListener,
    memory: driver::Memory,
    /// Bytes that memory may be changed to.
    limit: u64,
}

async fn control_thread(settings: &Settings, parts: Parts) -> Result<(), String> {
    let Parts { device, store, control: ControlWires { links, parker, event }, .. } = parts;
    let event = event.expect("made with events");
    let start = std::time::Instant::now();
    let superblock = *device.superblock();
    let facts = Facts {
        store_url: settings.place.store_url.clone(),
        cache_path: settings.place.cache.display().to_string(),
        device_bytes: device.file().size_bytes(),
        shards: superblock.shards,
        cpus: parts.cpus,
        memory_limit_bytes: parts.limit,
        listen: settings.listen.iter().map(Listen::to_string).collect(),
    };
    let memory = Size(parts.memory.lending.usage().total_bytes);
    println!("{}", banner(settings, &facts, memory));
    let setup = Setup {
        cache: Uuid(superblock.cache),
        shards: superblock.shards,
        host: host(),
        clock: (since(start), unix_secs()),
        random: Box::new(|| random().expect("the system gave randomness before")),
        table: device.table().clone(),
        logged: parts.logged,
        memory: parts.memory,
        push_after: span_of(settings.push_after.0),
        cores: links,
    };
    let wake = Rc::new(Notify::new());
    let requests = Requests::new(store.clone(), wake.clone());
    let control = Control::new(setup, requests, Table(device));
    let listen = settings.listen.clone();
    let on_served = Box::new(move |status: &VolumeStatus| println!("{}", news(&listen, status)));
    let server = Rc::new(Server::new(control, store, wake, facts, start, on_served));

    let failed = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    let admin = parts.admin;
    admin.set_nonblocking(true).map_err(failed("the admin socket"))?;
    let admin = tokio::net::UnixListener::from_std(admin).map_err(failed("the admin socket"))?;
    drop(tokio::task::spawn_local(server.clone().listen(admin)));
    let term = signal(SignalKind::terminate()).map_err(failed("signals"))?;
    let int = signal(SignalKind::interrupt()).map_err(failed("signals"))?;
    drop(tokio::task::spawn_local(end_by_signal(server.clone(), term, int)));
    let takeover = settings.takeover;
    let volumes = find_volumes(server.clone(), takeover);
    tokio::select! {
        ended = server.clone().run(parker, event) => ended.map_err(failed("the control thread"))?,
        fatal = volumes => return Err(fatal),
    }
    let lost = server.lost();
    if lost.is_empty() { Ok(()) } else { Err(lost.join("\n")) }
}

/// Claims the volumes of the store as soon as it answers. Returns only what makes it hopeless.
async fn find_volumes(server: Rc<Server>, takeover: bool) -> String {
    let store = &server.store;
    loop {
        match server.prepare_store().await {
            Ok(()) => break,
            Err(e) if e.may_pass() => wait_for_store(&e).await,
            Err(e) => return e.to_string(),
        }
    }
    let listed = loop {
        match volumes::list(store).await {
            Ok(listed) if listed.is_empty() => match create_first(store).await {
                Ok(()) => {}
                Err(e) => wait_for_store(&e.into()).await,
            },
            Ok(listed) => break listed,
            Err(e) => match Unusable::from(e) {
                e if e.may_pass() => wait_for_store(&e).await,
                e => return e.to_string(),
            },
        }
    };
    let mut whole = true;
    for volume in listed {
        match volume.head {
            Ok(head) => {
                server.add_volume(head.volume, &volume.name, takeover);
                server.serve_known_snapshots(&volume.name, &head);
            }
            Err(e) => {
                whole = false;
                log::error!("{e}");
            }
        }
    }
    if whole {
        server.forget_unlisted();
    }
    server.settled().await;
    println!("ready");
    std::future::pending().await
}

async fn create_first(store: &Store) -> Result<(), StoreError> {
    let (name, size) = FIRST_VOLUME;
    let new = new_volume(name, size, 4 << 20, head::Settings::default()).expect("a sound volume");
    match volumes::create(store, &new).await {
        Ok(_) => {
            log::info!("the store had no volume: made {name} of {}", Size(size));
            Ok(())
        }
        // Another server did the same at the same time.
        Err(volumes::VolumeError::Exists(_)) => Ok(()),
        Err(volumes::VolumeError::Store(e)) => Err(e),
        Err(e) => Err(StoreError::new(ErrorKind::Transient, e.to_string())),
    }
}

async fn wait_for_store(e: &Unusable) {
    log::error!("{e}; trying again");
    tokio::time::sleep(STORE_AGAIN).await;
}

/// The first signal drains, the second ends at once.
async fn end_by_signal(server: Rc<Server>, mut term: Signal, mut int: Signal) {
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    log::info!("draining; a second signal ends at once, and what is dirty stays in the cache");
    server.drain();
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            () = tokio::time::sleep(DRAIN_NEWS) => {
                let dirty = server.dirty_bytes().await;
                log::info!("draining: {} are not in the store yet", Size(dirty));
            }
        }
    }
    log::warn!("ended at once; what was dirty is in the cache and will be pushed after a start");
    process::exit(1);
}

/// Starts the data cores; returns when all have recovered their shards.
fn start_cores(
    runtime: Runtime,
    cpus: &[u32],
    wires: Vec<CoreWires>,
    plan: &Plan,
    arena: &Arena,
    file: &SharedFile,
    listeners: &[Listener],
) -> Result<(Vec<JoinHandle<()>>, Found), String> {
    let (report, reports) = mpsc::channel();
    let mut threads = Vec::with_capacity(cpus.len());
    let connections = plan.connections();
    for (&cpu, wires) in cpus.iter().zip(wires) {
        let clones = listeners.iter().map(Listener::try_clone).collect::<io::Result<Vec<_>>>();
        let listeners = clones.map_err(|e| format!("a core's listeners: {e}"))?;
        let (plan, arena, file) = (plan.clone(), arena.clone(), file.clone());
        let (report, built, connections) = (report.clone(), report.clone(), connections.clone());
        let core = move || {
            share_soon(0);
            let build = || build_core(wires, &plan, arena, connections, &file, &built);
            if let Err(e) = runtime.run_core(cpu, listeners, build) {
                let text = format!("core on processor {cpu}: {e}");
                // Nobody listens any more if it comes later than the start.
                if report.send(Err(text.clone())).is_err() {
                    log::error!("{text}");
                    process::exit(1);
                }
            }
        };
        let thread = thread::Builder::new().name(format!("core-{cpu}")).spawn(core);
        threads.push(thread.map_err(|e| format!("a core's thread: {e}"))?);
    }
    drop(report);
    let mut logged = Found::new();
    for _ in cpus {
        let found = reports.recv().map_err(|_| "a core ended at its start".to_string())??;
        for (volume, found) in found {
            let sum = logged.entry(volume).or_default();
            sum.dirty_blocks += found.dirty_blocks;
            sum.epoch = sum.epoch.max(found.epoch);
        }
    }
    Ok((threads, logged))
}

/// What the logs of some shards hold.
type Found = BTreeMap<VolumeId, Logged>;

/// Recovers a core's shards and builds its loop, on the core's own thread.
fn build_core(
    wires: CoreWires,
    plan: &Plan,
    arena: Arena,
    connections: ConnectionBudget,
    file: &SharedFile,
    report: &mpsc::Sender<Result<Found, String>>,
) -> Result<CoreLoop<'static, UringQueue>, String> {
    let core = wires.core;
    // Shards live as long as the process.
    let storage = Vec::leak(plan.storage_of(core));
    let hosted = plan.start_shards(core, file, storage).map_err(|e| format!("the cache: {e}"))?;
    let mut found = Found::new();
    for hosted in &hosted {
        Logged::add(&mut found, hosted.shard.recovered_entries());
    }
    let queue = UringQueue::new(&file.0, &arena, QUEUE_DEPTH)
        .map_err(|e| format!("io_uring for the cache: {e}; is it allowed on this system?"))?;
    let transit = plan.transit_of(core);
    let parts = CoreParts {
        wires,
        shards: plan.shards(),
        hosted,
        arena,
        transit,
        connections,
        batch_bytes: plan.batch_bytes(),
        queue,
    };
    let core = CoreLoop::new(parts);
    // It fails only if another core has failed, and the process is about to end.
    let _ = report.send(Ok(found));
    Ok(core)
}

fn cpus(list: Option<&str>) -> Result<Vec<u32>, String> {
    let usable = topology::usable_cpus().map_err(|e| format!("the processors: {e}"))?;
    let Some(list) = list else { return Ok(usable) };
    let wanted = topology::parse_core_list(list).map_err(|e| format!("--cores {list}: {e}"))?;
    match wanted.iter().find(|cpu| !usable.contains(cpu)) {
        Some(cpu) => {
            Err(format!("--cores {list}: processor {cpu} is not usable; usable are {usable:?}"))
        }
        None => Ok(wanted),
    }
}

fn plan(
    memory: Option<Memory>,
    limit: u64,
    device: &CacheDevice<SharedFile>,
    cores: u16,
) -> Result<(Plan, Lending), Failure> {
    let memory = memory.unwrap_or(if limit / 100 * 80 < MEMORY.0 {
        Memory::Percent(80)
    } else {
        Memory::Bytes(MEMORY)
    });
    let bytes = memory.bytes(limit);
    if bytes > limit {
        return Err(Failure::Usage(format!("--memory: {}", too_much_memory(memory, limit))));
    }
    let superblock = device.superblock();
    let (mut plan, lending) = Plan::new(superblock, cores, bytes, limit).map_err(|needed| {
        Failure::Usage(format!(
            "--memory {memory} is too small: {cores} cores and the {} shards of this cache need at \
             least {}M",
            superblock.shards,
            needed.div_ceil(1 << 20)
        ))
    })?;
    plan.released = device.table().rows.iter().all(|row| row.released);
    Ok((plan, lending))
}

fn listeners(listen: &[Listen]) -> Result<Vec<Listener>, String> {
    let bind = |listen: &Listen| match listen {
        Listen::Unix(path) => bind_unix(path).map(Listener::Unix),
        Listen::Tcp(address) => TcpListener::bind(address).map(Listener::Tcp).map_err(|e| {
            let help = if e.kind() == io::ErrorKind::AddrInUse {
                "; another server has it: choose another with --listen"
            } else {
                ""
            };
            format!("{listen}: {e}{help}")
        }),
    };
    listen.iter().map(bind).collect()
}

/// Binds a Unix socket for this user alone. A socket that nobody answers is a leftover, and goes.
fn bind_unix(path: &Path) -> Result<UnixListener, String> {
    let failed = |e: io::Error| format!("unix:{}: {e}", path.display());
    match UnixStream::connect(path) {
        Ok(_) => {
            return Err(format!("unix:{} is in use by another server", path.display()));
        }
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

fn unix_path(listen: &Listen) -> Option<&Path> {
    match listen {
        Listen::Unix(path) => Some(path),
        Listen::Tcp(_) => None,
    }
}

/// Makes this thread one for which clients wait no longer than they must.
fn share_soon(nicer: i32) {
    if let Err(e) = topology::share_soon(nicer) {
        log::debug!("a thread's time slice: {e}");
    }
}

/// A span of time for the core.
fn span_of(span: Duration) -> heeler_core::time::Duration {
    heeler_core::time::Duration(u64::try_from(span.as_nanos()).expect("at most an hour"))
}

fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "unknown".into() } else { name.trim().into() }
}

fn banner(settings: &Settings, facts: &Facts, memory: Size) -> String {
    let cpus: Vec<String> = facts.cpus.iter().map(u32::to_string).collect();
    format!(
        "heeler {} serves from {}\n  cache   {}, {}, {} shards\n  memory  {}, cores {} on {}\n  \
         store   {}\n  listen  {}",
        env!("CARGO_PKG_VERSION"),
        settings.place.data.display(),
        facts.cache_path,
        Size(facts.device_bytes),
        facts.shards,
        memory,
        cpus.join(","),
        settings.runtime.name(),
        facts.store_url,
        facts.listen.join(", "),
    )
}

/// What to say of a volume that was claimed, or was not.
fn news(listen: &[Listen], status: &VolumeStatus) -> String {
    if let Some(reason) = &status.reason {
        return format!("volume {}: not served: {reason}", status.name);
    }
    let name = &status.name;
    let mut text = format!("volume {name}: {}", Size(bytes(status.blocks)));
    for listen in listen {
        let (uri, client) = match listen {
            Listen::Unix(path) => {
                let path = path.display().to_string();
                (
                    format!("nbd+unix:///{name}?socket={}", percent(&path)),
                    format!("nbd-client -unix '{path}' -N {name} /dev/nbd0"),
                )
            }
            Listen::Tcp(address) => {
                let (host, port) = address.rsplit_once(':').expect("checked when it was read");
                (
                    format!("nbd://{address}/{name}"),
                    format!("nbd-client {host} {port} -N {name} /dev/nbd0"),
                )
            }
        };
        write!(
            text,
            "\n  nbdinfo '{uri}'\n  qemu-system-x86_64 -drive file='{uri}',format=raw,if=virtio\n  \
             {client}"
        )
        .expect("text grows");
    }
    text
}

fn percent(path: &str) -> String {
    let mut text = String::new();
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            write!(text, "%{byte:02X}").expect("text grows");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_survive_in_an_address() {
        assert_eq!(percent("/a b/c%.sock"), "/a%20b/c%25.sock");
    }

    #[test]
    fn a_leftover_socket_goes_and_a_living_one_stays() {
        let path = std::env::temp_dir().join(format!("heeler-{}.sock", process::id()));
        let first = bind_unix(&path).expect("free");
        assert!(bind_unix(&path).expect_err("in use").contains("in use"));
        drop(first);
        bind_unix(&path).expect("a leftover");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        fs::remove_file(&path).expect("ours");
    }

    #[test]
    fn cores_must_be_usable() {
        let usable = topology::usable_cpus().expect("some");
        assert_eq!(cpus(None).expect("all"), usable);
        assert_eq!(cpus(Some(&usable[0].to_string())).expect("one"), [usable[0]]);
        assert!(cpus(Some("1023")).expect_err("none").contains("1023"));
    }
}
