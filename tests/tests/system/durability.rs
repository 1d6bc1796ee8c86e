//! What survives: kill -9, a lost cache, an orderly end, other cores.

use std::fs;
use std::process::{Command, Stdio};

use crate::hammer::Hammer;
use crate::rig::{Scratch, Server, Site, VOLUME_BYTES, assert_same, cpus, run, wait};
use crate::s3::Moto;

/// Dirty bytes, as the server counts them.
pub(crate) fn dirty(server: &Server<'_>) -> u64 {
    let info = server.site().json(&["cache", "info"]);
    info["dirty_bytes"].as_u64().unwrap_or_else(|| panic!("no dirty_bytes in {info}"))
}

fn a_file_system_survives_a_kill(site: &Site, scratch: &Scratch) {
    let image = scratch.ext4("ext4");
    let bytes = fs::metadata(&image).expect("the image").len().to_string();
    site.run_on_store(&["volume", "create", "disk0", "--size", &bytes]);
    let server = site.serve(&[]);
    run("nbdcopy", &["--flush", &image, &server.uri("disk0")]);
    server.kill();
    let server = site.serve(&[]);
    let copy = scratch.text("copy");
    run("nbdcopy", &[&server.uri("disk0"), &copy]);
    run("cmp", &[&image, &copy]);
    run("e2fsck", &["-fn", &copy]);
    server.stop();
}

#[test]
fn a_file_system_survives_a_kill_on_a_directory() {
    let scratch = Scratch::new();
    a_file_system_survives_a_kill(&Site::new(&scratch), &scratch);
}

#[test]
fn a_file_system_survives_a_kill_on_s3() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    a_file_system_survives_a_kill(&moto.site(&scratch), &scratch);
}

#[test]
fn kills_lose_no_acknowledged_write() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let hammer = Hammer::new(&scratch);
    for (round, hundreds) in [3, 40, 15, 80].into_iter().enumerate() {
        let server = site.serve(&[]);
        hammer.check(&server.uri("disk0"));
        let mut running = hammer.start(&server.uri("disk0"), round as u64);
        running.wait_for_hundreds(hundreds);
        server.kill();
        running.end();
    }
    let server = site.serve(&[]);
    hammer.check(&server.uri("disk0"));
    server.push("disk0");
    hammer.check(&server.uri("disk0"));
    server.stop();
    fs::remove_file(site.cache()).expect("the cache file");
    let server = site.serve(&[]);
    hammer.check(&server.uri("disk0"));
    server.stop();
}

#[test]
fn fio_with_fsync_survives_a_kill() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let uri = server.uri("disk0");
    let common = [
        "--name=load",
        "--ioengine=nbd",
        "--thread",
        "--bs=4k",
        "--size=32M",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_state_save=0",
    ];
    let to = |uri: &str| format!("--uri={uri}");
    let fill = ["--rw=write", "--do_verify=0"];
    run("fio", &[&common[..], &fill, &[&to(&uri)]].concat());
    let mut fio = Command::new("fio")
        .args(common)
        .args(["--rw=randwrite", "--norandommap", "--time_based", "--runtime=100", "--fsync=16"])
        .args(["--do_verify=0", &to(&uri)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("fio starts");
    let log_before = logged(&server);
    wait("fio has written", || (logged(&server) > log_before + (16 << 20)).then_some(()));
    server.kill();
    fio.wait().expect("fio ends with the connection");
    let server = site.serve(&[]);
    // Every block holds one of the blocks written there, whole: each carries its place and a CRC.
    run(
        "fio",
        &[&common[..], &["--rw=read", "--verify_fatal=1", &to(&server.uri("disk0"))]].concat(),
    );
    server.stop();
}

/// Bytes that clients wrote since the server started.
fn logged(server: &Server<'_>) -> u64 {
    let info = server.site().json(&["cache", "info"]);
    info["written_bytes"].as_u64().unwrap_or_else(|| panic!("no written_bytes in {info}"))
}

#[test]
fn a_pushed_volume_does_not_need_its_cache() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.image("image", VOLUME_BYTES, 3);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    server.push("disk0");
    assert_eq!(dirty(&server), 0);
    server.kill();
    fs::remove_file(site.cache()).expect("the cache file");
    // Nobody knows that nothing was left in the lost cache: the volume has to be taken.
    let server = site.serve(&["--takeover"]);
    assert_same(&image, &server.uri("disk0"));
    server.stop();
    let server = site.serve(&[]);
    assert_same(&image, &server.uri("disk0"));
    server.stop();
}

#[test]
fn a_lost_cache_leaves_the_last_epoch() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let (first, second) =
        (scratch.image("first", 32 << 20, 4), scratch.image("second", 8 << 20, 5));
    let server = site.serve(&[]);
    run("nbdcopy", &[&first, &server.uri("disk0")]);
    server.push("disk0");
    run("nbdcopy", &[&second, &server.uri("disk0")]);
    server.kill();
    fs::remove_file(site.cache()).expect("the cache file");
    let server = site.serve(&["--takeover"]);
    let copy = scratch.text("copy");
    run("nbdcopy", &[&server.uri("disk0"), &copy]);
    // Either epoch may be the last: what is there is all of the one or all of the other.
    let second_then_first = scratch.text("both");
    fs::copy(&first, &second_then_first).expect("a copy");
    let over = format!("of={second_then_first}");
    run("dd", &[&format!("if={second}"), &over, "conv=notrunc", "status=none", "bs=1M"]);
    let is = |image: &str| {
        let args = ["compare", "-f", "raw", "-F", "raw", image, &copy];
        crate::rig::output("qemu-img", &args).status.success()
    };
    assert!(is(&first) || is(&second_then_first), "neither of both images");
    server.stop();
}

#[test]
fn an_orderly_end_pushes_everything() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.image("image", 48 << 20, 6);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    server.stop();
    let server = site.serve(&[]);
    assert_eq!(dirty(&server), 0, "after an orderly end");
    assert_same(&image, &server.uri("disk0"));
    server.stop();
    // Released: another cache may have it at once.
    let other = site.neighbour(&scratch, "b");
    let server = other.serve(&[]);
    assert_same(&image, &server.uri("disk0"));
    server.stop();
    let report = site.run_on_store(&["check", "--deep"]);
    assert!(!report.is_empty());
}

#[test]
fn an_orderly_end_under_load_fails_no_acknowledged_write() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let hammer = Hammer::new(&scratch);
    let server = site.serve(&[]);
    let mut running = hammer.start(&server.uri("disk0"), 9);
    running.wait_for_hundreds(20);
    server.stop();
    running.end();
    fs::remove_file(site.cache()).expect("the cache file");
    let server = site.serve(&[]);
    hammer.check(&server.uri("disk0"));
    server.stop();
}

#[test]
fn a_cache_serves_on_any_cores() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let hammer = Hammer::new(&scratch);
    let (one, all) = (&cpus()[0], cpus().join(","));
    for (round, cores) in [one, &all, &all, one].into_iter().enumerate() {
        let server = site.serve(&["--cores", cores]);
        hammer.check(&server.uri("disk0"));
        let mut running = hammer.start(&server.uri("disk0"), round as u64);
        running.wait_for_hundreds(10);
        server.kill();
        running.end();
    }
}
