//! The client against a real S3 server on loopback: `moto_server`, from `PATH` or named by
//! `HEELER_MOTO`. Not among the default tests, because of that:
//! `cargo test -p heeler-store --test s3`.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use heeler_core::wire::head::Settings;
use heeler_store::check::check;
use heeler_store::volumes::{self, Listed, NewVolume, VolumeError};
use heeler_store::{ErrorKind, Place, PutPayload, S3Options, Secret, Store, StoreConfig};

/// A server of this test's own, ended with it.
struct Moto {
    process: Child,
    port: u16,
}

impl Moto {
    fn start() -> Self {
        let binary = std::env::var("HEELER_MOTO").unwrap_or_else(|_| "moto_server".into());
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = free.local_addr().expect("bound").port();
        drop(free);
        let process = Command::new(&binary)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{binary} does not start ({e}); set HEELER_MOTO"));
        let moto = Self { process, port };
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "{binary} does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        moto.make_bucket("disks");
        moto
    }

    fn make_bucket(&self, bucket: &str) {
        let mut http = TcpStream::connect(("127.0.0.1", self.port)).expect("connects");
        write!(
            http,
            "PUT /{bucket} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nContent-Length: 0\r\nConnection: \
             close\r\n\r\n",
            self.port
        )
        .expect("sends");
        let mut answer = String::new();
        http.read_to_string(&mut answer).expect("answers");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    fn options(&self) -> S3Options {
        S3Options {
            endpoint: Some(format!("http://127.0.0.1:{}", self.port)),
            region: Some("us-east-1".into()),
            access_key: Some("test".into()),
            secret_key: Some(Secret("test".into())),
            ..S3Options::default()
        }
    }

    fn store(&self, url: &str) -> Store {
        let config = StoreConfig::parse(url, self.options()).expect("parses");
        Store::open(config).expect("opens")
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn s3_keeps_the_contract() {
    let moto = Moto::start();
    let store = moto.store("s3://disks/some/prefix");
    store.probe().await.expect("fit");
    let pieces = ["ab", "cdef"].map(|piece| bytes::Bytes::from_static(piece.as_bytes()));
    store.put("v/one", pieces.into_iter().collect(), true).await.expect("creates");
    assert_eq!(&store.get("v/one", None).await.expect("gets")[..], b"abcdef");
    assert_eq!(&store.get("v/one", Some(2..5)).await.expect("gets")[..], b"cde");
    for past in [4..7, 6..7, 100..101] {
        let error = store.get("v/one", Some(past)).await.expect_err("short");
        assert_eq!(error.kind, ErrorKind::Permanent, "{error}");
    }
    let error = store.get("v/two", None).await.expect_err("missing");
    assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
    let error = store.put("v/one", PutPayload::from_static(b"x"), true).await.expect_err("taken");
    assert_eq!(error.kind, ErrorKind::AlreadyExists, "{error}");
    assert_eq!(&store.get("v/one", None).await.expect("gets")[..], b"abcdef");

    // The prefix is part of no key, and keys outside it are not seen.
    let listed = store.list("v").await.expect("lists");
    assert_eq!(listed.iter().map(|e| (&e.key[..], e.bytes)).collect::<Vec<_>>(), [("v/one", 6)]);
    let whole = moto.store("s3://disks");
    assert_eq!(whole.list("v").await, Ok(Vec::new()));
    assert_eq!(whole.list("some").await.expect("lists")[0].key, "some/prefix/v/one");
    store.delete("v/one").await.expect("deletes");
    store.delete("v/one").await.expect("deletes what is gone");
    assert_eq!(whole.list("some").await, Ok(Vec::new()));
}

#[tokio::test]
async fn s3_takes_a_whole_pack_and_lists_many_keys() {
    let moto = Moto::start();
    let store = moto.store("s3://disks");
    let pack: Vec<u8> = (0..(8 << 20) + 4096).map(|i: u32| (i / 4096) as u8).collect();
    store.put("pack", PutPayload::from(pack.clone()), true).await.expect("creates");
    assert!(store.get("pack", None).await.expect("gets") == pack);
    let last = store.get("pack", Some(8 << 20..(8 << 20) + 4096)).await.expect("gets");
    assert!(last == pack[8 << 20..]);
    // More than one page of a listing.
    let puts = (0..1100).map(|n| {
        let store = store.clone();
        async move { store.put(&format!("many/{n:04}"), PutPayload::new(), false).await }
    });
    for result in futures_util::future::join_all(puts).await {
        result.expect("puts");
    }
    let listed = store.list("many").await.expect("lists");
    assert_eq!(listed.len(), 1100);
    assert!(listed.is_sorted_by(|a, b| a.key < b.key));
}

#[tokio::test]
async fn s3_failures_are_told_apart() {
    let moto = Moto::start();
    let missing = moto.store("s3://no-such-bucket");
    let error = missing.put("a", PutPayload::from_static(b"x"), true).await.expect_err("no bucket");
    assert_eq!(error.kind, ErrorKind::Permanent, "{error}");
    assert!(error.text.contains("NoSuchBucket"), "{error}");

    // Nobody listens: certainly no effect, so even a create is tried again.
    let config = StoreConfig { attempts: 2, ..moto.store("s3://disks").config().clone() };
    drop(moto);
    let gone = Store::open(config).expect("opens");
    let error = gone.put("a", PutPayload::from_static(b"x"), true).await.expect_err("gone");
    assert_eq!(error.kind, ErrorKind::Transient, "{error}");
    assert_eq!(gone.counters().retries, 1);
}

#[tokio::test]
async fn a_lost_answer_to_a_create_is_unknown() {
    // Takes the request and hangs up instead of answering.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut buffer = [0; 4096];
            let _ = connection.expect("connects").read(&mut buffer);
        }
    });
    let options = S3Options {
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        region: Some("us-east-1".into()),
        access_key: Some("test".into()),
        secret_key: Some(Secret("test".into())),
        ..S3Options::default()
    };
    let place = Place::S3 { bucket: "disks".into(), prefix: String::new(), options };
    let store = Store::open(StoreConfig { attempts: 3, ..StoreConfig::new(place) }).expect("opens");
    let error = store.put("a", PutPayload::from_static(b"x"), true).await.expect_err("lost");
    assert_eq!((error.kind, store.counters().retries), (ErrorKind::Timeout, 0), "{error}");
    let error = store.put("a", PutPayload::from_static(b"x"), false).await.expect_err("lost");
    assert_eq!((error.kind, store.counters().retries), (ErrorKind::Transient, 2), "{error}");
}

#[tokio::test]
async fn s3_holds_volumes() {
    let moto = Moto::start();
    let store = moto.store("s3://disks/prefix");
    let new = NewVolume {
        name: "disk0",
        blocks: 1 << 20,
        object_shift: 22,
        unix_secs: 1,
        settings: Settings::default(),
    };
    let made = volumes::create(&store, &new).await.expect("creates");
    let again = volumes::create(&store, &new).await;
    assert_eq!(again, Err(VolumeError::Exists("disk0".into())));
    let listed = volumes::list(&store).await.expect("lists");
    assert_eq!(listed, [Listed { name: "disk0".into(), head: Ok(made.clone()) }]);
    let report = check(&store, made.volume, true).await.expect("answers");
    assert_eq!((report.errors, report.orphans), (vec![], vec![]));
    volumes::delete(&store, "disk0", false).await.expect("deletes");
    assert_eq!(moto.store("s3://disks").list("prefix").await, Ok(Vec::new()));
}
