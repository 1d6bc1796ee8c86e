//! S3 servers on loopback, and a wire to one that can be cut, go dead or forget conditions.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::rig::{Scratch, Site, free_port, wait};

/// The server; ended when dropped. Its buckets are in its memory.
pub(crate) struct Moto {
    process: Child,
    port: u16,
}

impl Moto {
    /// Starts it, with a bucket `disks`.
    pub(crate) fn start(scratch: &Scratch) -> Self {
        let binary = std::env::var("HEELER_MOTO").unwrap_or_else(|_| "moto_server".into());
        let port = free_port();
        let process = Command::new(&binary)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .current_dir(scratch.at("."))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{binary} does not start ({e}); HEELER_MOTO names it"));
        let moto = Self { process, port };
        wait(&format!("{binary} answers"), || TcpStream::connect(("127.0.0.1", port)).ok());
        moto.make_bucket("disks");
        moto
    }

    fn make_bucket(&self, bucket: &str) {
        let mut http = TcpStream::connect(("127.0.0.1", self.port)).expect("connects");
        let host = format!("Host: 127.0.0.1:{}", self.port);
        write!(http, "PUT /{bucket} HTTP/1.1\r\n{host}\r\nContent-Length: 0\r\n").expect("sends");
        write!(http, "Connection: close\r\n\r\n").expect("sends");
        let mut answer = String::new();
        http.read_to_string(&mut answer).expect("answers");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// A site whose store is a prefix of the bucket.
    pub(crate) fn site(&self, scratch: &Scratch) -> Site {
        site(scratch, &format!("http://127.0.0.1:{}", self.port), "test", "test")
    }

    /// A site that reaches the server by a wire.
    pub(crate) fn site_by(&self, wire: &Wire, scratch: &Scratch) -> Site {
        site(scratch, &format!("http://127.0.0.1:{}", wire.port), "test", "test")
    }
}

/// A site whose store is a prefix of the bucket `disks` of a service.
pub(crate) fn site(scratch: &Scratch, endpoint: &str, access_key: &str, secret_key: &str) -> Site {
    let env = [
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", access_key),
        ("AWS_SECRET_ACCESS_KEY", secret_key),
        ("AWS_ALLOW_HTTP", "true"),
    ];
    Site {
        data: scratch.at("a"),
        store: vec!["--store".into(), "s3://disks/some/prefix".into()],
        env: env.map(|(name, value)| (name.into(), value.into())).into(),
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A service that refuses every request with this error; its URL.
pub(crate) fn refuser(status: &'static str, code: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let body = format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>");
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len());
    let answer = format!("{head}Connection: close\r\n\r\n{body}");
    thread::spawn(move || {
        for mut client in listener.incoming().map_while(Result::ok) {
            let _ = client.read(&mut [0; 16384]);
            let _ = client.write_all(answer.as_bytes());
            let _ = client.shutdown(Shutdown::Write);
        }
    });
    format!("http://127.0.0.1:{port}")
}

/// A TCP relay. While it is cut, connections end and new ones are closed at once. A connection that
/// is open while it is dead, or is made then, stays open and never carries anything again.
pub(crate) struct Wire {
    port: u16,
    state: Arc<Mutex<WireState>>,
}

struct WireState {
    cut: bool,
    dead: bool,
    /// Both ends of everything that was relayed since the last cut, and whether it went dead.
    streams: Vec<(TcpStream, Arc<AtomicBool>)>,
}

/// What is done to the bytes on their way to the server.
type Change = fn(&mut [u8]);

impl Wire {
    /// A wire to the server.
    pub(crate) fn to(moto: &Moto) -> Self {
        Self::with(moto, |_| {})
    }

    /// A wire that makes the server ignore the condition of a create.
    pub(crate) fn careless(moto: &Moto) -> Self {
        const CONDITION: &[u8] = b"if-none-match";
        Self::with(moto, |bytes| {
            let at = bytes.windows(CONDITION.len()).position(|bytes| bytes == CONDITION);
            if let Some(at) = at {
                bytes[at..at + 2].copy_from_slice(b"xx");
            }
        })
    }

    fn with(moto: &Moto, change: Change) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let state =
            Arc::new(Mutex::new(WireState { cut: false, dead: false, streams: Vec::new() }));
        let (shared, target) = (Arc::clone(&state), moto.port);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let mut state = shared.lock().expect("not poisoned");
                if state.cut {
                    continue;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                let dead = Arc::new(AtomicBool::new(state.dead));
                let back: Change = |_| {};
                for (from, to, change) in [(&client, &server, change), (&server, &client, back)] {
                    relay(from, to, change, &dead);
                    let stream = from.try_clone().expect("a second handle");
                    state.streams.push((stream, Arc::clone(&dead)));
                }
            }
        });
        Self { port, state }
    }

    /// Cuts it.
    pub(crate) fn cut(&self) {
        let mut state = self.state.lock().expect("not poisoned");
        state.cut = true;
        for (stream, _) in state.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Lets it go dead.
    pub(crate) fn die(&self) {
        let mut state = self.state.lock().expect("not poisoned");
        state.dead = true;
        for (_, dead) in &state.streams {
            dead.store(true, Ordering::Relaxed);
        }
    }

    /// Mends it, for new connections.
    pub(crate) fn mend(&self) {
        let mut state = self.state.lock().expect("not poisoned");
        (state.cut, state.dead) = (false, false);
    }
}

fn relay(from: &TcpStream, to: &TcpStream, change: Change, dead: &Arc<AtomicBool>) {
    let (mut from, mut to) =
        (from.try_clone().expect("a second handle"), to.try_clone().expect("a second handle"));
    let dead = Arc::clone(dead);
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            change(&mut buffer[..read]);
            // What a dead connection took is lost.
            if !dead.load(Ordering::Relaxed) && to.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}
