//! An S3 server on loopback, and a wire to it that can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
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
        site(scratch, self.port)
    }

    /// A site that reaches the server by a wire.
    pub(crate) fn site_by(&self, wire: &Wire, scratch: &Scratch) -> Site {
        site(scratch, wire.port)
    }
}

fn site(scratch: &Scratch, port: u16) -> Site {
    let endpoint = format!("http://127.0.0.1:{port}");
    let env = [
        ("AWS_ENDPOINT_URL", endpoint.as_str()),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
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

/// A TCP relay. While it is cut, connections end and new ones are closed at once.
pub(crate) struct Wire {
    port: u16,
    state: Arc<Mutex<WireState>>,
}

struct WireState {
    cut: bool,
    /// Both ends of everything that was relayed since the last cut.
    streams: Vec<TcpStream>,
}

impl Wire {
    /// A wire to the server.
    pub(crate) fn to(moto: &Moto) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let state = Arc::new(Mutex::new(WireState { cut: false, streams: Vec::new() }));
        let (shared, target) = (Arc::clone(&state), moto.port);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let mut state = shared.lock().expect("not poisoned");
                if state.cut {
                    continue;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    relay(from, to);
                    state.streams.push(from.try_clone().expect("a second handle"));
                }
            }
        });
        Self { port, state }
    }

    /// Cuts it.
    pub(crate) fn cut(&self) {
        let mut state = self.state.lock().expect("not poisoned");
        state.cut = true;
        for stream in state.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Mends it.
    pub(crate) fn mend(&self) {
        self.state.lock().expect("not poisoned").cut = false;
    }
}

fn relay(from: &TcpStream, to: &TcpStream) {
    let (mut from, mut to) =
        (from.try_clone().expect("a second handle"), to.try_clone().expect("a second handle"));
    thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
}
