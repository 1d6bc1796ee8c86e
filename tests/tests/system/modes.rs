//! The modes of a volume: what they promise is there after a kill and without the cache, they
//! change under load, and a store that is away stops nobody who does not wait for it.

use std::process::{Child, Command, Stdio};

use crate::durability::dirty;
use crate::hammer::Hammer;
use crate::rig::{Scratch, Server, Site, assert_begins, run, wait};
use crate::s3::{Moto, Wire};

const MODES: [&str; 6] = ["writeback", "ram", "writethrough", "writearound", "none", "ephemeral"];

fn set_mode(site: &Site, volume: &str, mode: &str) {
    site.run(&["volume", "set", volume, &format!("mode={mode}")]);
    assert_eq!(site.json(&["volume", "info", volume])["mode"], mode);
}

/// Writes one block of this byte in the background.
fn write_one(uri: &str, at: &str, byte: &str) -> Child {
    Command::new("qemu-io")
        .args(["-f", "raw", "-c", &format!("write -P {byte} {at} 4k"), uri])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("qemu-io starts")
}

fn assert_waits(writer: &mut Child) {
    assert!(writer.try_wait().expect("a child").is_none(), "it was answered");
}

fn assert_written(mut writer: Child) {
    let status = wait("the write is answered", || writer.try_wait().expect("a child"));
    assert!(status.success(), "the write: {status}");
}

fn puts(server: &Server<'_>) -> u64 {
    let status = server.site().json(&["status"]);
    status["store"]["puts"].as_u64().unwrap_or_else(|| panic!("no puts in {status}"))
}

/// Whatever was acknowledged in a weaker mode is in the store when the change is reported, and
/// what comes then when it is acknowledged.
#[test]
fn modes_change_under_load_and_nothing_is_lost() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let hammer = Hammer::new(&scratch);
    for (round, last) in ["writethrough", "none"].into_iter().enumerate() {
        let server = site.serve(&["--takeover"]);
        let mut running = hammer.start(&server.uri("disk0"), round as u64);
        for mode in MODES.iter().rev().chain(&[last]) {
            set_mode(&site, "disk0", mode);
            running.wait_for_hundreds(2);
        }
        server.kill();
        running.end();
        std::fs::remove_file(site.cache()).expect("the cache file");
        let server = site.serve(&["--takeover"]);
        assert_eq!(site.json(&["volume", "info", "disk0"])["mode"], last);
        hammer.check(&server.uri("disk0"));
        server.stop();
    }
    site.run_on_store(&["check", "--deep"]);
}

#[test]
fn the_store_has_what_its_modes_acknowledged() {
    for mode in ["writethrough", "writearound", "none"] {
        let scratch = Scratch::new();
        let site = Site::new(&scratch);
        site.run_on_store(&["volume", "create", "disk0", "--size", "64M", "--mode", mode]);
        let hammer = Hammer::new(&scratch);
        let server = site.serve(&[]);
        let before = puts(&server);
        assert_written(write_one(&server.uri("disk0"), "60M", "0x11"));
        // A pack and a head, before the answer.
        assert!(puts(&server) >= before + 2, "{mode}: the store was not asked");
        assert_eq!(dirty(&server), 0, "{mode}");
        let mut running = hammer.start(&server.uri("disk0"), 1);
        running.wait_for_hundreds(4);
        server.kill();
        running.end();
        std::fs::remove_file(site.cache()).expect("the cache file");
        let server = site.serve(&["--takeover"]);
        hammer.check(&server.uri("disk0"));
        server.stop();
    }
}

#[test]
fn ram_survives_a_kill_as_of_the_last_flush() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.run_on_store(&["volume", "create", "disk0", "--size", "64M", "--mode", "ram"]);
    let image = scratch.image("image", 48 << 20, 21);
    let server = site.serve(&[]);
    run("nbdcopy", &["--flush", &image, &server.uri("disk0")]);
    server.kill();
    let server = site.serve(&[]);
    assert_begins(&server.uri("disk0"), &image);
    server.stop();
}

#[test]
fn an_ephemeral_volume_stays_out_of_the_store_until_it_is_pushed() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.run_on_store(&["volume", "create", "disk0", "--size", "64M", "--mode", "ephemeral"]);
    site.make_volume("disk1");
    let image = scratch.dense("image", 2 << 20, 22);
    let server = site.serve(&[]);
    run("nbdcopy", &["--flush", &image, &server.uri("disk0")]);
    assert_written(write_one(&server.uri("disk1"), "0", "0x22"));
    // The other one came later, and its time has come.
    let dirty_of = |volume: &str| {
        site.json(&["volume", "info", volume])["dirty_bytes"].as_u64().expect("a number")
    };
    wait("the other volume is pushed", || (dirty_of("disk1") == 0).then_some(()));
    assert_eq!(dirty_of("disk0"), 2 << 20);
    server.push("disk0");
    assert_eq!(dirty_of("disk0"), 0);
    server.stop();
    std::fs::remove_file(site.cache()).expect("the cache file");
    let server = site.serve(&[]);
    assert_begins(&server.uri("disk0"), &image);
    server.stop();
}

#[test]
fn none_fetches_what_it_reads_every_time() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.run_on_store(&["volume", "create", "disk0", "--size", "64M", "--mode", "none"]);
    let image = scratch.dense("image", 4 << 20, 23);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    let fetched = || site.json(&["status"])["store"]["get_bytes"].as_u64().expect("a number");
    for _ in 0..2 {
        let before = fetched();
        assert_begins(&server.uri("disk0"), &image);
        assert!(fetched() >= before + (4 << 20), "it was kept");
    }
    server.stop();
}

#[test]
fn every_mode_serves_what_clients_wrote() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    for mode in MODES {
        set_mode(&site, "disk0", mode);
        let uri = format!("--uri={}", server.uri("disk0"));
        let load =
            ["--name=load", "--ioengine=nbd", "--thread", "--rw=randwrite", "--bsrange=512-64k"];
        let size = ["--bs_unaligned", "--size=8M", "--iodepth=16", "--verify=crc32c"];
        let end = ["--verify_fatal=1", "--verify_state_save=0", "--fsync=32", &uri];
        run("fio", &[&load[..], &size, &end].concat());
    }
    server.stop();
}

/// A writer that waits for the store gets no error, holds up no other volume, and goes on when its
/// mode comes to ask for less.
#[test]
fn only_those_wait_for_the_store_who_asked_for_it() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let wire = Wire::to(&moto);
    let site = moto.site_by(&wire, &scratch);
    for volume in ["disk0", "disk1"] {
        site.make_volume(volume);
    }
    let image = scratch.dense("image", 4 << 20, 24);
    let server = site.serve(&[]);
    set_mode(&site, "disk0", "writethrough");
    wire.cut();
    let mut first = write_one(&server.uri("disk0"), "0", "0x31");
    let mut copy = Command::new("nbdcopy")
        .args([&image, &server.uri("disk0")])
        .spawn()
        .expect("nbdcopy starts");
    run("nbdcopy", &["--flush", &image, &server.uri("disk1")]);
    assert_begins(&server.uri("disk1"), &image);
    assert_waits(&mut first);
    assert_waits(&mut copy);
    wire.mend();
    assert_written(first);
    assert_written(copy);
    wire.cut();
    let mut second = write_one(&server.uri("disk0"), "32M", "0x32");
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 60M 4k", "-c", "flush", &server.uri("disk1")]);
    assert_waits(&mut second);
    let mut set = site.start(&["volume", "set", "disk0", "mode=writeback"]);
    assert_written(second);
    assert_waits(&mut set);
    wire.mend();
    assert_written(set);
    server.stop();
    site.run_on_store(&["check", "--deep"]);
}
