//! One size of memory for everything, hard, and changed while clients are at work.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::rig::{Scratch, Server, Site, run, said, wait};

/// What the process takes beside its memory: code, stacks, runtimes, TLS.
const CONSTANT: u64 = 64 << 20;
/// Connections that read and write at the same time.
const CONNECTIONS: usize = 6;

/// Bytes of a line of /proc/PID/status.
fn status(server: &Server<'_>, name: &str) -> u64 {
    let path = format!("/proc/{}/status", server.id());
    let text = fs::read_to_string(path).expect("the server runs");
    let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("Linux");
    let number = line.trim().strip_suffix("kB").expect("kB").trim();
    number.parse::<u64>().expect("a number") << 10
}

/// Clients with deep queues, for so many seconds.
fn load(scratch: &Scratch, server: &Server<'_>, seconds: u32) -> Child {
    let uri = server.uri("disk0");
    let jobs = format!("--numjobs={CONNECTIONS}");
    let time = format!("--runtime={seconds}");
    let directory = format!("--directory={}", scratch.text(""));
    let mut fio = Command::new("fio");
    fio.args(["--name=load", "--ioengine=nbd", &format!("--uri={uri}"), "--rw=randrw"]);
    fio.args(["--bsrange=4k-256k", "--size=768m", "--iodepth=32", "--time_based"]);
    fio.args([&jobs, &time, &directory, "--thread", "--group_reporting"]);
    fio.stdout(Stdio::null()).spawn().expect("fio starts")
}

/// The process takes no more than it may, now.
fn assert_within(server: &Server<'_>, memory: u64) {
    let resident = status(server, "VmRSS:");
    assert!(resident <= memory / 20 * 21 + CONSTANT, "{resident} resident of {memory}");
}

#[test]
fn the_process_takes_what_it_was_given_under_any_load_and_after_a_resize() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    let server = site.serve(&["--memory", "256M"]);
    let target = |site: &Site| {
        let info = site.json(&["cache", "info"]);
        info["server_memory"]["target_bytes"].as_u64().expect("a size")
    };
    assert_eq!(target(&site), 256 << 20);
    let mut fio = load(&scratch, &server, 14);
    let watch = |memory: u64| {
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(100));
            assert_within(&server, memory);
        }
    };
    watch(256 << 20);
    let said = site.run(&["cache", "resize", "640M"]);
    assert!(said.starts_with("memory was 256 MiB, is 640 MiB"), "{said}");
    watch(640 << 20);
    let large = status(&server, "VmRSS:");
    site.run(&["cache", "resize", "200M"]);
    assert_eq!(target(&site), 200 << 20);
    watch(200 << 20);
    assert!(status(&server, "VmRSS:") + (200 << 20) < large, "memory went back to the system");
    assert!(fio.wait().expect("fio ends").success(), "clients notice nothing");
    assert!(status(&server, "VmHWM:") <= (640 << 20) / 20 * 21 + CONSTANT);
    server.stop();
}

#[test]
fn sizes_that_cannot_be_are_refused_with_what_can() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    for (size, code, says) in [("10M", 2, "at least"), ("100T", 2, "may have"), ("0%", 2, "1%")] {
        let output = site.output(&["serve", "--memory", size]);
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(said(&output).contains(says), "{}", said(&output));
    }
    let server = site.serve(&["--memory", "128M"]);
    for (size, says) in [("10M", "needs"), ("100T", "4 times")] {
        let output = site.output(&["cache", "resize", size]);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(said(&output).contains(says), "{}", said(&output));
    }
    server.stop();
}

/// Connections beyond what memory allows are refused, and the others go on.
#[test]
fn there_are_as_many_connections_as_memory_allows() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    let server = site.serve(&["--memory", "128M"]);
    let connect = || std::os::unix::net::UnixStream::connect(server.socket()).expect("accepts");
    let held: Vec<_> = (0..40).map(|_| connect()).collect();
    wait("a refusal", || server.log().contains("has room for no more").then_some(()));
    drop(held);
    server.wait_for("disk0");
    run("nbdinfo", &[&server.uri("disk0")]);
    server.stop();
}
