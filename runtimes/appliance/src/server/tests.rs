use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use heeler_core::event::{Mode, ToKeeper, ToShard};
use heeler_core::ids::{CoreId, Epoch, ShardId};
use heeler_core::policy::Policy;
use heeler_core::wire::superblock::Superblock;
use heeler_driver::control::{Memory, Setup};
use heeler_driver::mail::{FromControl, ToControl, VolumeShare};
use heeler_driver::start::Plan;
use heeler_driver::windows::Spans;
use heeler_driver::wires::{CoreWires, wire};
use heeler_hw::BackingFile;
use heeler_store::{Place, StoreConfig};
use tokio::task::{LocalSet, spawn_local};

use super::*;
use crate::size;

/// Memory that the process may have.
const LIMIT: u64 = 1 << 30;

/// A core that has one shard, which is dirty until it is pushed or purged by force.
struct Core {
    wires: CoreWires,
    dirty: u64,
}

impl Core {
    async fn run(mut self) {
        loop {
            while let Ok(mail) = self.wires.from_control.pop() {
                let answer = match mail {
                    FromControl::Report { ticket } => Some(self.status(ticket)),
                    FromControl::Shard { shard, mail } => self.push(shard, mail),
                    FromControl::Purge { force: true } => {
                        self.dirty = 0;
                        None
                    }
                    FromControl::Cover { .. } => Some(ToControl::Covered),
                    FromControl::Drain => Some(ToControl::Drained(CoreId(0))),
                    FromControl::Stop => return,
                    _ => None,
                };
                if let Some(answer) = answer {
                    self.wires.to_control.0.push(answer).expect("room");
                    self.wires.to_control.1.ring();
                }
            }
            tokio::task::yield_now().await;
        }
    }

    fn status(&self, ticket: u64) -> ToControl {
        let usage =
            heeler_core::shard::ShardUsage { dirty_blocks: self.dirty, ..Default::default() };
        let share = VolumeShare {
            volume: VolumeId(1),
            dirty_blocks: self.dirty,
            traffic: Spans::default(),
            scrubbed: Default::default(),
            scrubbing: None,
        };
        let shard = ShardStatus {
            shard: ShardId(0),
            usage,
            buffers: Default::default(),
            budget: Default::default(),
            onodes_pinned: 0,
            policy: Policy::default(),
            counts: Spans::default(),
            volumes: vec![share],
        };
        let status = CoreStatus { shards: vec![shard], ..CoreStatus::default() };
        ToControl::Status { ticket, core: CoreId(0), status }
    }

    /// Plays the shard in a push of zeroes.
    fn push(&mut self, shard: ShardId, mail: ToShard) -> Option<ToControl> {
        let mail = match mail {
            ToShard::Freeze { volume, next } => {
                let epoch = Epoch(next.0 - 1);
                let frozen = ToKeeper::Frozen { volume, epoch, blocks: 0 };
                let frozen = ToControl::Keeper { shard, mail: frozen };
                self.wires.to_control.0.push(frozen).expect("room");
                ToKeeper::Pushed { volume, epoch }
            }
            ToShard::Committed { .. } => {
                self.dirty = 0;
                return None;
            }
            _ => return None,
        };
        Some(ToControl::Keeper { shard, mail })
    }
}

fn temporary(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("heeler-admin-{name}-{}", std::process::id()))
}

/// Runs a server on a store in memory, with a played core, and a client beside it.
fn with_server(name: &str, dirty: u64, client: impl AsyncFnOnce(&mut Client)) {
    let path = temporary(name);
    let file = BackingFile::create(&path, Superblock::bytes_min(1), &mut |_, _| {}).expect("file");
    let device = CacheDevice::format(SharedFile(Arc::new(file)), [3; 16], 1).expect("formats");
    let (mut cores, wires) = wire(1, true).expect("wires");
    let core = Core { wires: cores.remove(0), dirty };
    let needed = Plan::new(device.superblock(), 1, 0, LIMIT, &[]).expect_err("too little");
    let (plan, lending) = Plan::new(device.superblock(), 1, needed, LIMIT, &[]).expect("enough");
    let start = std::time::Instant::now();
    let mut count = 0;
    let setup = Setup {
        cache: Uuid([3; 16]),
        shards: 1,
        host: "here".into(),
        clock: (since(start), unix_secs()),
        random: Box::new(move || {
            count += 1;
            [count; 16]
        }),
        table: device.table().clone(),
        logged: BTreeMap::new(),
        memory: Memory {
            lending,
            arena: plan.arena().expect("memory"),
            fetch_bytes: 1 << 20,
            batch_bytes: 1 << 20,
        },
        push_after: heeler_core::time::Duration::from_secs(5),
        cores: wires.links,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(LocalSet::new().run_until(async {
        let store = Store::open(StoreConfig::new(Place::Memory)).expect("memory opens");
        let wake = Rc::new(Notify::new());
        let requests = Requests::new(store.clone(), wake.clone());
        let control = Control::new(setup, requests, Table(device));
        let facts = Facts {
            store_url: "memory://".into(),
            cache_path: "cache".into(),
            device_bytes: 1,
            shards: 1,
            cpus: vec![0],
            memory_limit_bytes: LIMIT,
            listen: vec![],
        };
        let server = Server::new(control, store, wake, facts, start, Box::new(|_| {}));
        let server = Rc::new(server);
        drop(spawn_local(core.run()));
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let serving = server.clone();
        drop(spawn_local(async move { serving.serve_client(theirs).await }));
        let (reader, writer) = ours.into_split();
        let mut talk = Client { reader: BufReader::new(reader), writer };
        let running = server.clone();
        let event = wires.event.expect("made with events");
        let run = spawn_local(async move { running.run(wires.parker, event).await });
        client(&mut talk).await;
        server.drain();
        run.await.expect("no panic").expect("stops");
    }));
    fs::remove_file(path).expect("ours");
}

struct Client {
    reader: BufReader<tokio::net::unix::OwnedReadHalf>,
    writer: tokio::net::unix::OwnedWriteHalf,
}

impl Client {
    async fn line(&mut self, line: &str) -> Answer {
        self.writer.write_all(format!("{line}\n").as_bytes()).await.expect("writes");
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line).await.expect("reads");
            match serde_json::from_str(&line).expect("an answer") {
                Answer::Progress { .. } => {}
                answer => return answer,
            }
        }
    }

    async fn ask<T: serde::de::DeserializeOwned>(&mut self, request: &Request) -> T {
        let line = serde_json::to_string(request).expect("plain data");
        match self.line(&line).await {
            Answer::Done(value) => serde_json::from_value(value).expect("the right kind"),
            other => panic!("{request:?}: {other:?}"),
        }
    }

    async fn refused(&mut self, request: &Request) -> String {
        let line = serde_json::to_string(request).expect("plain data");
        match self.line(&line).await {
            Answer::Failed(text) => text,
            other => panic!("{request:?}: {other:?}"),
        }
    }
}

fn create(size_bytes: u64) -> Request {
    Request::VolumeCreate {
        name: "disk1".into(),
        size_bytes,
        object_bytes: 4 << 20,
        mode: Mode::Ram,
        buffered_read: true,
        buffered_write: false,
    }
}

#[test]
fn a_volume_from_creation_to_deletion() {
    with_server("volume", 0, async |client| {
        assert_eq!(client.ask::<Vec<VolumeLine>>(&Request::VolumeList).await, []);
        client.ask::<()>(&create(1 << 30)).await;
        assert!(client.refused(&create(1 << 30)).await.contains("already"));
        assert!(client.refused(&create(1000)).await.contains("multiple of 4096"));
        let status: Status = client.ask(&Request::Status).await;
        let line = &status.volumes[0];
        assert_eq!((line.name.as_str(), line.state.as_str()), ("disk1", "served"));
        // The store, which knows the owners, is not asked for a status.
        assert_eq!((line.size_bytes, &line.owner), (1 << 30, &None));
        assert_eq!(status.store.url, "memory://");
        let name = || "disk1".to_string();
        client.ask::<()>(&Request::VolumePush { name: name() }).await;
        let info: VolumeInfo = client.ask(&Request::VolumeInfo { name: name() }).await;
        assert_eq!(info.line.push.expect("ours").phase, "clean");
        let deleted: Deleted =
            client.ask(&Request::VolumeDelete { name: name(), force: false }).await;
        assert_eq!(deleted.objects, 2);
        for gone in [
            Request::VolumeInfo { name: name() },
            Request::VolumeDelete { name: name(), force: true },
            Request::VolumePush { name: name() },
        ] {
            assert!(client.refused(&gone).await.contains("'disk1'"));
        }
    });
}

#[test]
fn a_purge_keeps_what_is_dirty_unless_forced() {
    with_server("purge", 3, async |client| {
        client.ask::<()>(&create(1 << 30)).await;
        let line = client.ask::<Vec<VolumeLine>>(&Request::VolumeList).await.remove(0);
        assert_eq!(line.dirty_bytes, Some(3 * 4096));
        let refused = client.refused(&Request::CachePurge { force: false }).await;
        assert!(refused.contains("12288 bytes") && refused.contains("--force"), "{refused}");
        let purged: Purged = client.ask(&Request::CachePurge { force: true }).await;
        assert_eq!(purged, Purged { dirty_bytes: 12288, clean_bytes: 0 });
        client.ask::<()>(&Request::CacheFlush).await;
        let info: CacheReport = client.ask(&Request::CacheInfo { volume: None, shard: None }).await;
        assert_eq!((info.cache.dirty_bytes, info.cache.shards), (0, 1));
    });
}

#[test]
fn the_cache_is_reported_by_volume_and_by_shard() {
    with_server("report", 3, async |client| {
        client.ask::<()>(&create(1 << 30)).await;
        let ask = |volume: Option<&str>, shard| Request::CacheInfo {
            volume: volume.map(String::from),
            shard,
        };
        let report: CacheReport = client.ask(&ask(None, None)).await;
        assert_eq!((report.by_shard.len(), report.by_volume.len()), (1, 1));
        assert_eq!(report.by_volume[0].name, "disk1");
        assert_eq!(report.by_volume[0].dirty_bytes, 3 * 4096);
        assert_eq!(report.memory.policy, Policy::default().name());
        let same: CacheReport = client.ask(&ask(Some("disk1"), Some(0))).await;
        assert_eq!(same, report);
        let unknown = client.refused(&ask(Some("disk2"), None)).await;
        assert!(unknown.contains("'disk2'"), "{unknown}");
        let beyond = client.refused(&ask(None, Some(1))).await;
        assert!(beyond.contains("no shard 1") && beyond.contains("0 to 0"), "{beyond}");
    });
}

#[test]
fn what_stays_in_ram_is_set_and_the_cache_is_scrubbed() {
    with_server("set", 0, async |client| {
        client.ask::<()>(&create(1 << 30)).await;
        let name = || "disk1".to_string();
        let info: VolumeInfo = client.ask(&Request::VolumeInfo { name: name() }).await;
        assert_eq!((info.buffered_read, info.buffered_write), (true, false));
        assert_eq!(info.mode, "ram");
        let mode = Setting::Mode(Mode::WriteThrough);
        let settings = vec![Setting::BufferedRead(false), mode, Setting::BufferedWrite(true)];
        client.ask::<()>(&Request::VolumeSet { name: name(), settings }).await;
        let info: VolumeInfo = client.ask(&Request::VolumeInfo { name: name() }).await;
        assert_eq!((info.buffered_read, info.buffered_write), (false, true));
        assert_eq!(info.mode, "writethrough");
        let head = info.line.head;
        let settings = vec![Setting::BufferedRead(false)];
        client.ask::<()>(&Request::VolumeSet { name: name(), settings }).await;
        let info: VolumeInfo = client.ask(&Request::VolumeInfo { name: name() }).await;
        assert_eq!(info.line.head, head, "nothing changed, so no head was written");
        let nothing = Scrubbed { checked_bytes: 0, damaged_blocks: 0, repaired_blocks: 0 };
        assert_eq!(client.ask::<Scrubbed>(&Request::VolumeScrub { name: name() }).await, nothing);
        for request in [
            Request::VolumeScrub { name: "disk2".into() },
            Request::VolumeSet { name: "disk2".into(), settings: vec![] },
        ] {
            assert!(client.refused(&request).await.contains("'disk2'"));
        }
    });
}

#[test]
fn nonsense_is_answered_and_the_connection_goes_on() {
    with_server("nonsense", 0, async |client| {
        for line in ["", "{}", "[1", "{\"request\":\"reboot\"}"] {
            let answer = client.line(line).await;
            assert!(matches!(&answer, Answer::Failed(text) if text.contains("not a request")));
        }
        assert_eq!(client.ask::<String>(&Request::Store).await, "memory://");
    });
}

#[test]
fn memory_is_resized_within_what_there_is() {
    with_server("resize", 0, async |client| {
        let resize = |bytes: u64| Request::CacheResize { memory: size::Memory::Bytes(Size(bytes)) };
        let refused = client.refused(&resize(LIMIT + 1)).await;
        assert!(refused.contains("1 GiB"), "{refused}");
        let refused = client.refused(&resize(1 << 20)).await;
        assert!(refused.contains("too little") && refused.contains("needs"), "{refused}");
        let resized: Resized = client.ask(&resize(256 << 20)).await;
        assert!(resized.old_bytes < resized.new_bytes && resized.new_bytes == 256 << 20);
        let status: Status = client.ask(&Request::Status).await;
        let memory = status.cache.server_memory;
        assert_eq!(memory.target_bytes, 256 << 20);
        assert!(memory.taken_bytes <= memory.target_bytes);
        assert!(memory.taken_bytes > memory.target_bytes * 3 / 4, "{memory:?}");
    });
}
