//! What an S3 service may answer, and what is made of it; services that stop answering.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use heeler_store::{ErrorKind, Place, PutPayload, S3Options, Secret, Store, StoreConfig};

/// A service that does the same with every request.
fn service(answer: impl Fn(&mut TcpStream, &str) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    thread::spawn(move || {
        let mut open = Vec::new();
        for stream in listener.incoming().map_while(Result::ok) {
            let mut stream = stream;
            let mut buffer = [0; 16384];
            let read = stream.read(&mut buffer).unwrap_or(0);
            answer(&mut stream, &String::from_utf8_lossy(&buffer[..read]));
            // It does not hang up unless it was told so.
            open.push(stream);
        }
    });
    format!("http://127.0.0.1:{port}")
}

fn store(endpoint: &str, change: impl FnOnce(StoreConfig) -> StoreConfig) -> Store {
    let options = S3Options {
        endpoint: Some(endpoint.into()),
        region: Some("us-east-1".into()),
        access_key: Some("test".into()),
        secret_key: Some(Secret("test".into())),
        ..S3Options::default()
    };
    let place = Place::S3 { bucket: "disks".into(), prefix: "p".into(), options };
    let config = StoreConfig { attempts: 1, ..StoreConfig::new(place) };
    Store::open(change(config)).expect("opens")
}

/// One that answers every request with this status, and this code in a page of XML.
fn refuser(status: &str, code: &str) -> String {
    let body = match code {
        "" => String::new(),
        _ => format!(
            "<?xml version=\"1.0\"?>\n<Error><Code>{code}</Code><Message>some\nwords</Message>\
             <RequestId>1</RequestId></Error>"
        ),
    };
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    service(move |stream, _| {
        let _ = stream.write_all(format!("{head}{body}").as_bytes());
        let _ = stream.shutdown(std::net::Shutdown::Write);
    })
}

fn payload() -> PutPayload {
    PutPayload::from_static(b"x")
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    for (status, code, says) in [
        ("403 Forbidden", "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID"),
        ("403 Forbidden", "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ("400 Bad Request", "ExpiredToken", "set AWS_SESSION_TOKEN"),
        ("403 Forbidden", "RequestTimeTooSkewed", "set the clock"),
        ("404 Not Found", "NoSuchBucket", "there is no bucket 'disks' at http://127.0.0.1:"),
        ("400 Bad Request", "AuthorizationHeaderMalformed", "set AWS_REGION"),
        ("301 Moved Permanently", "PermanentRedirect", "set AWS_REGION"),
        ("403 Forbidden", "AccessDenied", "may not do this in bucket 'disks' (AccessDenied)"),
        ("403 Forbidden", "", "may not do this in bucket 'disks' (forbidden)"),
        ("405 Method Not Allowed", "", "check AWS_ENDPOINT_URL"),
    ] {
        let store = store(&refuser(status, code), |config| config);
        let get = store.get("k", None).await.expect_err(code);
        let part = store.get("k", Some(0..1)).await.expect_err(code);
        let put = store.put("k", payload(), false).await.expect_err(code);
        let create = store.put("k", payload(), true).await.expect_err(code);
        let delete = store.delete("k").await.expect_err(code);
        let list = store.list("k").await.expect_err(code);
        for e in [get, part, put, create, delete, list] {
            assert_eq!(e.kind, ErrorKind::Refused, "{status} {code}: {e}");
            assert!(e.text.contains(says) && !e.text.contains('\n'), "{status} {code}: {e}");
        }
    }
}

#[tokio::test]
async fn a_forbidden_request_names_the_right_that_it_needs() {
    let store = store(&refuser("403 Forbidden", "AccessDenied"), |config| config);
    let errors = [
        (store.get("k", None).await.expect_err("denied"), "s3:GetObject"),
        (store.put("k", payload(), true).await.expect_err("denied"), "s3:PutObject"),
        (store.delete("k").await.expect_err("denied"), "s3:DeleteObject"),
        (store.list("k").await.expect_err("denied"), "s3:ListBucket"),
    ];
    for (e, right) in errors {
        assert!(e.text.contains(right), "{e}");
    }
}

#[tokio::test]
async fn what_may_pass_is_no_refusal() {
    for (status, code, create) in [
        // It may have been carried out before it failed.
        ("503 Service Unavailable", "SlowDown", ErrorKind::Timeout),
        ("503 Service Unavailable", "", ErrorKind::Timeout),
        ("500 Internal Server Error", "InternalError", ErrorKind::Timeout),
        ("502 Bad Gateway", "", ErrorKind::Timeout),
        ("429 Too Many Requests", "", ErrorKind::Transient),
        ("408 Request Timeout", "RequestTimeout", ErrorKind::Transient),
        // Somebody else is at work on the key: proves nothing about what is there.
        ("409 Conflict", "ConditionalRequestConflict", ErrorKind::Timeout),
    ] {
        let store = store(&refuser(status, code), |config| config);
        let e = store.put("k", payload(), true).await.expect_err(code);
        assert_eq!(e.kind, create, "{status} {code}: {e}");
        let e = store.get("k", None).await.expect_err(code);
        assert_eq!(e.kind, ErrorKind::Transient, "{status} {code}: {e}");
        assert!(!e.text.contains('\n'), "{e}");
    }
    let missing = store(&refuser("404 Not Found", "NoSuchKey"), |config| config);
    let e = missing.get("k", None).await.expect_err("missing");
    assert_eq!(e.kind, ErrorKind::NotFound, "{e}");
    missing.delete("k").await.expect("it is gone");
}

#[tokio::test]
async fn a_name_that_nobody_has_is_an_endpoint_to_check() {
    let store = store("https://nobody.invalid", |config| config);
    let e = store.get("k", None).await.expect_err("no such host");
    assert_eq!(e.kind, ErrorKind::Transient, "{e}");
    assert!(
        e.text.contains("https://nobody.invalid") && e.text.contains("AWS_ENDPOINT_URL"),
        "{e}"
    );
}

#[tokio::test]
async fn a_lost_answer_to_a_create_is_unknown() {
    // Takes the request and hangs up instead of answering.
    let endpoint = service(|stream, _| {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    });
    let store = store(&endpoint, |config| StoreConfig { attempts: 3, ..config });
    let error = store.put("a", payload(), true).await.expect_err("lost");
    assert_eq!((error.kind, store.counters().retries), (ErrorKind::Timeout, 0), "{error}");
    let error = store.put("a", payload(), false).await.expect_err("lost");
    assert_eq!((error.kind, store.counters().retries), (ErrorKind::Transient, 2), "{error}");
}

/// Patience of a test: what hangs must end in a time that depends on nothing but the settings.
const PATIENCE: Duration = Duration::from_millis(300);

fn impatient(config: StoreConfig) -> StoreConfig {
    StoreConfig { request_timeout: PATIENCE, bytes_per_second_min: 100 << 20, ..config }
}

#[tokio::test]
async fn a_service_that_hangs_holds_nobody_for_ever() {
    let silent = service(|_, _| {});
    let stops = service(|stream, _| {
        // The begin of an answer, and then nothing.
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\nLast-Modified: Mon, 01 Jan 2024 \
                    00:00:00 GMT\r\nETag: \"x\"\r\n\r\nsome";
        let _ = stream.write_all(head.as_bytes());
    });
    for endpoint in [silent, stops] {
        let store = store(&endpoint, impatient);
        let begin = Instant::now();
        let get = store.get("k", None).await.expect_err("hangs").kind;
        let list = store.list("k").await.expect_err("hangs").kind;
        assert_eq!((get, list), (ErrorKind::Transient, ErrorKind::Transient));
        assert!(begin.elapsed() < PATIENCE * 20, "{:?}", begin.elapsed());
    }
}

#[tokio::test]
async fn a_put_that_hangs_is_given_up() {
    let store = store(&service(|_, _| {}), impatient);
    let begin = Instant::now();
    // More than the buffers of a connection take.
    let large = PutPayload::from(vec![7; 16 << 20]);
    assert_eq!(store.put("k", large, false).await.expect_err("hangs").kind, ErrorKind::Transient);
    assert_eq!(store.put("k", payload(), true).await.expect_err("hangs").kind, ErrorKind::Timeout);
    assert_eq!(store.delete("k").await.expect_err("hangs").kind, ErrorKind::Transient);
    assert!(begin.elapsed() < PATIENCE * 20, "{:?}", begin.elapsed());
    assert!(store.trouble().expect("in trouble").text.contains("no answer"));
}
