//! What each client sees, and that what it wrote comes back.

use serde_json::Value;

use crate::rig::{
    Scratch, Server, Site, VOLUME_BYTES, assert_same, output, python, run, said, wait,
};

fn extents(uri: &str) -> Vec<(u64, u64, u64)> {
    let map: Value =
        serde_json::from_str(&run("nbdinfo", &["--map", "--json", uri])).expect("JSON");
    let number = |extent: &Value, name: &str| extent[name].as_u64().expect("a number");
    let extent = |e: &Value| (number(e, "offset"), number(e, "length"), number(e, "type"));
    map.as_array().expect("a list").iter().map(extent).collect()
}

#[test]
fn nbdinfo_shows_the_volume() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    site.make_volume("other");
    let server = site.serve(&[]);
    server.wait_for("other");
    for uri in [server.uri("disk0"), server.tcp_uri("disk0")] {
        let info: Value =
            serde_json::from_str(&run("nbdinfo", &["--json", &uri])).expect("nbdinfo prints JSON");
        let export = &info["exports"][0];
        assert_eq!(info["protocol"], "newstyle-fixed");
        assert_eq!(info["structured"], true);
        assert_eq!(export["export-size"], VOLUME_BYTES);
        assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
        assert_eq!(export["is_read_only"], false);
        for ability in ["cache", "flush", "fua", "multi_conn", "trim", "zero", "fast_zero", "df"] {
            assert_eq!(export[format!("can_{ability}")], true, "{ability}");
        }
        assert_eq!(export["block_size_minimum"], 1);
        assert_eq!(export["block_size_preferred"], 4096);
        assert_eq!(export["block_size_maximum"], 32 << 20);
    }
    let list = format!("nbd+unix:///?socket={}", server.socket().display());
    let list = run("nbdinfo", &["--list", "--json", &list]);
    let list: Value = serde_json::from_str(&list).expect("JSON");
    let mut names: Vec<_> =
        list["exports"].as_array().expect("a list").iter().map(|e| &e["export-name"]).collect();
    names.sort_by_key(|name| name.as_str());
    assert_eq!(names, ["disk0", "other"]);
    assert!(!output("nbdinfo", &[&server.uri("no-such-volume")]).status.success());
}

#[test]
fn the_allocation_map_follows_writes_pushes_and_discards() {
    const MIB: u64 = 1 << 20;
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let uri = server.uri("disk0");
    assert_eq!(extents(&uri), [(0, VOLUME_BYTES, 3)], "an empty volume");
    qemu_io(&server, "disk0", &["write -P 1 64M 1M", "write -P 1 200M 8M"]);
    let written = [
        (0, 64 * MIB, 3),
        (64 * MIB, MIB, 0),
        (65 * MIB, 135 * MIB, 3),
        (200 * MIB, 8 * MIB, 0),
        (208 * MIB, VOLUME_BYTES - 208 * MIB, 3),
    ];
    assert_eq!(extents(&uri), written, "dirty");
    server.push("disk0");
    assert_eq!(extents(&uri), written, "clean");
    qemu_io(&server, "disk0", &["discard 64M 1M", "write -z -u 201M 1M"]);
    let left = [
        (0, 200 * MIB, 3),
        (200 * MIB, MIB, 0),
        (201 * MIB, MIB, 3),
        (202 * MIB, 6 * MIB, 0),
        (208 * MIB, VOLUME_BYTES - 208 * MIB, 3),
    ];
    assert_eq!(extents(&uri), left, "discarded");
    server.push("disk0");
    site.run(&["cache", "purge"]);
    assert_eq!(extents(&uri), left, "known to the store alone");
}

#[test]
fn an_image_larger_than_cache_and_memory_comes_back() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let image = scratch.image("image", VOLUME_BYTES, 1);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    assert_same(&image, &server.uri("disk0"));
    server.push("disk0");
    run("nbdcopy", &[&server.tcp_uri("disk0"), &scratch.text("copy")]);
    run("cmp", &[&image, &scratch.text("copy")]);
    server.stop();
    let server = site.serve(&[]);
    assert_same(&image, &server.uri("disk0"));
    server.stop();
}

#[test]
fn qemu_img_converts_both_ways() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let (raw, qcow) = (scratch.image("raw", 96 << 20, 2), scratch.text("qcow2"));
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &raw, &qcow]);
    let uri = server.uri("disk0");
    run("qemu-img", &["convert", "-n", "-W", "-f", "qcow2", "-O", "raw", &qcow, &uri]);
    assert_same(&raw, &uri);
    let back = scratch.text("back.qcow2");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &server.tcp_uri("disk0"), &back]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &back, &raw]);
    server.stop();
}

/// Runs commands of `qemu-io`, which checks the patterns it is told to expect.
pub(crate) fn qemu_io(server: &Server<'_>, volume: &str, commands: &[&str]) {
    let uri = server.uri(volume);
    let mut args = vec!["-f", "raw", "-d", "unmap"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(&uri);
    let output = output("qemu-io", &args);
    let stdout = String::from_utf8_lossy(&output.stdout);
    let failed = !output.status.success() || stdout.contains("erification failed");
    assert!(!failed, "{commands:?}\n{}", said(&output));
}

#[test]
fn qemu_io_finds_its_patterns() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let write = [
        "write -P 0x11 0 64k",
        "write -P 0x22 511 3",
        "write -P 0x33 4095 4098",
        "aio_write -P 0x44 1M 4M",
        "aio_write -P 0x55 5M 1M",
        "aio_flush",
        "write -f -P 0x66 1537k 1",
        "write -z 2M 12345",
        "write -z -u 3M 64k",
        "discard 4M 128k",
        "write -P 0x77 1023M 1M",
        "flush",
    ];
    let read = [
        "read -P 0x11 0 511",
        "read -P 0x22 511 3",
        "read -P 0x11 514 3581",
        "read -P 0x33 4095 4098",
        "read -P 0x11 8193 57343",
        "read -P 0 64k 960k",
        "read -P 0x44 1M 513k",
        "read -P 0x66 1537k 1",
        "read -P 0 2M 12345",
        "read -P 0x44 2109497 1036231",
        "read -P 0 3M 64k",
        "read -P 0x44 3136k 960k",
        "read -P 0 4M 128k",
        "read -P 0x44 4224k 896k",
        "read -P 0x55 5M 1M",
        "read -P 0x77 1023M 1M",
    ];
    let server = site.serve(&[]);
    qemu_io(&server, "disk0", &write);
    qemu_io(&server, "disk0", &read);
    server.push("disk0");
    qemu_io(&server, "disk0", &read);
    server.kill();
    let server = site.serve(&[]);
    qemu_io(&server, "disk0", &read);
    server.stop();
}

#[test]
fn fio_verifies_what_it_writes() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let uri = format!("--uri={}", server.uri("disk0"));
    let job = |name: &str, more: &[&str]| {
        let name = format!("--name={name}");
        let common =
            [name.as_str(), "--ioengine=nbd", "--thread", uri.as_str(), "--verify_fatal=1"];
        run("fio", &[&common[..], &["--verify_state_save=0"], more].concat());
    };
    let random = ["--rw=randwrite", "--verify=crc32c", "--iodepth=32", "--randseed=7"];
    // More than the cache holds, then any sizes and offsets, then trims in between.
    job("blocks", &[&random[..], &["--bs=4k", "--size=96M"]].concat());
    job("any", &[&random[..], &["--bsrange=512-256k", "--blockalign=512", "--size=96M"]].concat());
    let fsync = ["--bs=16k", "--size=48M", "--offset=128M", "--fsync=32", "--verify_backlog=64"];
    job("fsync", &[&random[..], &fsync].concat());
    let trim = ["--rw=randtrimwrite", "--bs=64k", "--size=64M", "--iodepth=16"];
    job("trim", &trim);
    job("after", &["--rw=read", "--bs=64k", "--size=64M", "--iodepth=16"]);
    server.stop();
}

#[test]
fn several_fio_jobs_share_the_volume() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let uri = format!("--uri={}", server.tcp_uri("disk0"));
    let jobs =
        ["--name=four", "--ioengine=nbd", "--thread", "--numjobs=4", "--offset_increment=64M"];
    let load = ["--rw=randrw", "--bs=4k", "--size=64M", "--io_size=16M", "--iodepth=8"];
    let verify = ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=3"];
    run("fio", &[&jobs[..], &[&uri], &load, &verify].concat());
    server.stop();
}

#[test]
fn the_protocol_holds_against_libnbd_and_raw_bytes() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let socket = server.socket().to_str().expect("an ASCII path");
    python("conformance.py", &[&server.uri("disk0"), socket, "disk0"]);
    server.assert_alive();
    // Connections that were cut leave nothing behind: everything can still be pushed.
    server.push("disk0");
    wait("all connections are gone", || {
        let status = site.json(&["status"]);
        let cores = status["cores"].as_array().expect("a list");
        cores.iter().all(|core| core["connections"] == 0).then_some(())
    });
    server.stop();
}
