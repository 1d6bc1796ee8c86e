//! The client against real S3 servers on loopback: `moto_server`, from `PATH` or named by
//! `HEELER_MOTO`, and Ceph's gateway, named by `HEELER_RGW`. Not among the default tests, because
//! of that: `tests/ceph cargo test -p heeler-store --test s3`.

mod contract;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use heeler_store::{ErrorKind, PutPayload, S3Options, Secret, Store, StoreConfig, format};

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

    fn service(&self) -> Service {
        Service::at(&format!("http://127.0.0.1:{}", self.port), "test", "test")
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Stores by prefix in the bucket `disks` of a service.
struct Service(S3Options);

impl Service {
    fn at(endpoint: &str, access_key: &str, secret_key: &str) -> Self {
        Self(S3Options {
            endpoint: Some(endpoint.into()),
            region: Some("us-east-1".into()),
            access_key: Some(access_key.into()),
            secret_key: Some(Secret(secret_key.into())),
            ..S3Options::default()
        })
    }

    fn open(&self, url: &str) -> Store {
        Store::open(StoreConfig::parse(url, self.0.clone()).expect("parses")).expect("opens")
    }
}

impl contract::Place for Service {
    fn store(&self, prefix: &str) -> Store {
        self.open(&format!("s3://disks/{prefix}"))
    }
}

/// Ceph's gateway, if the tests were started beside one (`tests/ceph`).
fn ceph() -> Option<String> {
    std::env::var("HEELER_RGW").ok()
}

#[tokio::test]
async fn moto_keeps_the_contract() {
    let moto = Moto::start();
    contract::keep(&moto.service()).await;
}

#[tokio::test]
async fn ceph_keeps_the_contract() {
    let Some(endpoint) = ceph() else { return eprintln!("HEELER_RGW is not set: not tested") };
    for unsigned_payload in [false, true] {
        let mut service = Service::at(&endpoint, "testkey", "testsecret");
        service.0.unsigned_payload = Some(unsigned_payload);
        // Every run has keys of its own: the gateway may be another run's too.
        struct Run(Service, String);
        impl contract::Place for Run {
            fn store(&self, prefix: &str) -> Store {
                self.0.open(&format!("s3://disks/{}/{prefix}", self.1))
            }
        }
        let run = format!("{}-{unsigned_payload}", std::process::id());
        contract::keep(&Run(service, run)).await;
    }
}

#[tokio::test]
async fn ceph_s_refusals_are_explained() {
    let Some(endpoint) = ceph() else { return eprintln!("HEELER_RGW is not set: not tested") };
    for (key, secret, url, says) in [
        ("nobody", "testsecret", "s3://disks/x", "AWS_ACCESS_KEY_ID"),
        ("testkey", "wrong", "s3://disks/x", "AWS_SECRET_ACCESS_KEY"),
        ("testkey", "testsecret", "s3://no-such-bucket/x", "no bucket 'no-such-bucket'"),
    ] {
        let store = Service::at(&endpoint, key, secret).open(url);
        let get = store.get("a", None).await.expect_err("refused");
        let put = store.put("a", PutPayload::from_static(b"x"), true).await.expect_err("refused");
        let list = store.list("a").await.expect_err("refused");
        let delete = store.delete("a").await.expect_err("refused");
        for e in [get, put, list, delete] {
            assert_eq!(e.kind, ErrorKind::Refused, "{e}");
            assert!(e.text.contains(says) && !e.text.contains('\n'), "{e}");
        }
        let error = format::prepare(&store).await.expect_err("refused").to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[tokio::test]
async fn a_missing_bucket_and_a_silent_service_are_told_apart() {
    let moto = Moto::start();
    let missing = moto.service().open("s3://no-such-bucket");
    let error = missing.put("a", PutPayload::from_static(b"x"), true).await.expect_err("no bucket");
    assert_eq!(error.kind, ErrorKind::Refused, "{error}");
    assert!(error.text.contains("there is no bucket 'no-such-bucket'"), "{error}");

    // Nobody listens: certainly no effect, so even a create is tried again.
    let config = StoreConfig { attempts: 2, ..moto.service().open("s3://disks").config().clone() };
    let endpoint = format!("http://127.0.0.1:{}", moto.port);
    drop(moto);
    let gone = Store::open(config).expect("opens");
    let error = gone.put("a", PutPayload::from_static(b"x"), true).await.expect_err("gone");
    assert_eq!(error.kind, ErrorKind::Transient, "{error}");
    assert!(error.text.contains(&endpoint) && error.text.contains("AWS_ENDPOINT_URL"), "{error}");
    assert_eq!(gone.counters().retries, 1);
    assert_eq!(gone.trouble().expect("in trouble").text, error.text);
}
