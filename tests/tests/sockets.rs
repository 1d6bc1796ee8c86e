//! Two cores of every runtime on real sockets and a real file, with a script in the place of the
//! control thread.
#![cfg(not(loom))]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use heeler_core::event::ToShard;
use heeler_core::ids::{CoreId, Epoch, ShardId, VolumeId};
use heeler_core::wire::superblock::Superblock;
use heeler_driver::adapter::{Listener, RunError};
use heeler_driver::mail::{ExportInfo, FromControl, ToControl};
use heeler_driver::start::{CacheDevice, CacheError, Plan};
use heeler_driver::wires::{ControlWires, CoreWires, wire};
use heeler_driver::{CoreLoop, CoreParts};
use heeler_hw::{Arena, BackingFile, UringQueue};

const SHARDS: u16 = 4;
const CORES: u16 = 2;
const BYTES: u64 = 16 << 20;
const VOLUME: VolumeId = VolumeId(1);

/// Sends to all cores.
fn tell_all(control: &mut ControlWires, mail: impl Fn() -> FromControl) {
    for link in &mut control.links {
        link.to_core.0.push(mail()).unwrap();
        link.to_core.1.ring();
    }
}

/// Attaches and exports the volume, answers fetches with zeroes, and in the end drains and stops.
fn control(mut control: ControlWires, ready: &mpsc::Sender<()>, finish: &AtomicBool) {
    let open = Epoch::first_of_term(1).next();
    for shard in 0..SHARDS {
        let link = &mut control.links[usize::from(shard % CORES)];
        let mail = ToShard::Attach {
            volume: VOLUME,
            object_shift: 20,
            blocks: BYTES / 4096,
            open,
            committed: Epoch::first_of_term(1),
        };
        link.to_core.0.push(FromControl::Shard { shard: ShardId(shard), mail }).unwrap();
    }
    let disk0 = ExportInfo {
        name: "disk0".into(),
        volume: VOLUME,
        bytes: BYTES,
        object_shift: 20,
        read_only: false,
    };
    tell_all(&mut control, || FromControl::Exports(Arc::new([disk0.clone()])));
    // The answer to this says that the cores have taken what came before.
    tell_all(&mut control, || FromControl::Report { ticket: 0 });
    let mut drained = 0;
    let mut draining = false;
    while drained < CORES {
        for link in &mut control.links {
            while let Ok(mail) = link.from_core.pop() {
                match mail {
                    ToControl::Fetch { shard, op, .. } => {
                        let mail = FromControl::Fetched { shard, op, pieces: Some(Vec::new()) };
                        link.to_core.0.push(mail).unwrap();
                        link.to_core.1.ring();
                    }
                    ToControl::Status { .. } => ready.send(()).unwrap(),
                    ToControl::Drained(_) => drained += 1,
                    _ => {}
                }
            }
        }
        if !draining && finish.load(Ordering::Acquire) {
            draining = true;
            tell_all(&mut control, || FromControl::Drain);
        }
        thread::sleep(Duration::from_micros(200));
    }
    tell_all(&mut control, || FromControl::Stop);
}

fn build(
    wires: CoreWires,
    file: &BackingFile,
    plan: &Plan,
    arena: &Arena,
) -> Result<CoreLoop<'static, UringQueue>, CacheError> {
    let core = wires.core;
    let storage = Box::leak(Box::new(plan.storage_of(core)));
    Ok(CoreLoop::new(CoreParts {
        wires,
        shards: SHARDS,
        hosted: plan.start_shards(core, file, storage)?,
        arena: arena.clone(),
        transit: plan.transit_of(core),
        connections: plan.connections(),
        batch_bytes: plan.batch_bytes(),
        queue: UringQueue::new(file, arena, 64).unwrap(),
    }))
}

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// Chooses the volume with simple replies.
fn handshake(stream: &mut dyn Stream) {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    let mut hello = vec![0, 0, 0, 3];
    hello.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\x05disk0");
    stream.write_all(&hello).unwrap();
    let mut export = [0; 10];
    stream.read_exact(&mut export).unwrap();
    assert_eq!(export[..8], BYTES.to_be_bytes());
}

fn request(stream: &mut dyn Stream, command: u16, offset: u64, len: u32, payload: &[u8]) {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, 0];
    bytes.extend(command.to_be_bytes());
    bytes.extend(7u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend(payload);
    stream.write_all(&bytes).unwrap();
}

fn reply(stream: &mut dyn Stream, len: usize) -> Vec<u8> {
    let mut head = [0; 16];
    stream.read_exact(&mut head).unwrap();
    assert_eq!(head[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Writes, flushes and reads back in its own part of the volume.
fn exercise(stream: &mut dyn Stream, at: u64, seed: u8) {
    handshake(stream);
    let pattern: Vec<u8> = (0..700_001u32).map(|n| (n / 3) as u8 ^ seed).collect();
    let len = pattern.len() as u32;
    request(stream, 1, at + 11, len, &pattern);
    reply(stream, 0);
    request(stream, 3, 0, 0, &[]);
    reply(stream, 0);
    for _ in 0..3 {
        request(stream, 0, at + 11, len, &[]);
        assert!(reply(stream, pattern.len()) == pattern);
    }
    for small in 0..200u64 {
        request(stream, 1, at + small * 4096, 4096, &pattern[..4096]);
    }
    (0..200).for_each(|_| drop(reply(stream, 0)));
    request(stream, 0, at + 199 * 4096, 4096, &[]);
    assert!(reply(stream, 4096) == pattern[..4096]);
}

#[derive(Clone, Copy, Debug)]
enum Runtime {
    Glommio,
    Monoio,
}

impl Runtime {
    fn run(
        self,
        listeners: Vec<Listener>,
        build: impl FnOnce() -> Result<CoreLoop<'static, UringQueue>, CacheError>,
    ) -> Result<(), RunError<CacheError>> {
        match self {
            Self::Glommio => heeler_glommio::run_core(None, listeners, build),
            Self::Monoio => heeler_monoio::run_core(None, listeners, build),
        }
    }
}

#[test]
fn glommio_serves_clients_on_unix_and_tcp_sockets_with_two_cores() {
    clients_are_served(Runtime::Glommio);
}

#[test]
fn monoio_serves_clients_on_unix_and_tcp_sockets_with_two_cores() {
    clients_are_served(Runtime::Monoio);
}

fn clients_are_served(runtime: Runtime) {
    let name = format!("heeler-{runtime:?}-{}", std::process::id());
    let scratch = Scratch(std::env::temp_dir().join(name));
    std::fs::create_dir_all(&scratch.0).unwrap();
    let bytes = Superblock::bytes_min(SHARDS) + (128 << 20);
    let file = BackingFile::create(&scratch.0.join("cache"), bytes, &mut |_, _| ()).unwrap();
    let device = CacheDevice::format(file, [3; 16], SHARDS).unwrap();
    let memory = Plan::new(device.superblock(), CORES, 0, 0).unwrap_err() + (40 << 20);
    let (plan, _lending) = Plan::new(device.superblock(), CORES, memory, memory).unwrap();
    let arena = plan.arena().unwrap();
    let socket = scratch.0.join("nbd.sock");
    let unix = Listener::Unix(UnixListener::bind(&socket).unwrap());
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let tcp = Listener::Tcp(tcp);
    let (wires, control_wires) = wire(usize::from(CORES), true).unwrap();
    let finish = AtomicBool::new(false);

    thread::scope(|scope| {
        for wires in wires {
            let listeners = vec![unix.try_clone().unwrap(), tcp.try_clone().unwrap()];
            let (device, plan, arena) = (&device, &plan, &arena);
            scope.spawn(move || {
                let core: CoreId = wires.core;
                runtime
                    .run(listeners, || build(wires, device.file(), plan, arena))
                    .unwrap_or_else(|error| panic!("{core:?}: {error}"));
            });
        }
        let (ready, when_ready) = mpsc::channel();
        let finish = &finish;
        scope.spawn(move || control(control_wires, &ready, finish));
        (0..CORES).for_each(|_| when_ready.recv().unwrap());
        let clients: Vec<_> = (0..6u8)
            .map(|n| {
                let socket = &socket;
                scope.spawn(move || {
                    let at = u64::from(n) << 20;
                    if n % 2 == 0 {
                        exercise(&mut UnixStream::connect(socket).unwrap(), at, n);
                    } else {
                        exercise(&mut TcpStream::connect(address).unwrap(), at, n);
                    }
                })
            })
            .collect();
        clients.into_iter().for_each(|client| client.join().unwrap());

        // An idle client is closed by the drain.
        let mut idle = UnixStream::connect(&socket).unwrap();
        handshake(&mut idle);
        idle.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let before = Instant::now();
        finish.store(true, Ordering::Release);
        assert_eq!(idle.read(&mut [0; 1]).unwrap(), 0, "the end of the stream");
        assert!(before.elapsed() < Duration::from_secs(20));
    });
}
