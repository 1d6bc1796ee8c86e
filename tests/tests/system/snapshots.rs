//! Snapshots, clones and rollbacks with real clients, while they write, and through crashes.

use std::time::Instant;

use crate::rig::{
    Random, Scratch, Server, Site, assert_begins, assert_same, output, refused, run, said, stamps,
};
use crate::writer::Writer;

fn check(site: &Site) {
    site.run_on_store(&["check", "--deep"]);
}

#[test]
fn snapshots_are_consistent_cuts_while_clients_write() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let mut writer = Writer::start("cut.py", &["run", &server.uri("disk0")]);
    let mut before = 0;
    for round in 0..8 {
        writer.wait_for_hundreds(3);
        let name = format!("disk0@s{round}");
        site.run(&["snapshot", "create", &name]);
        site.run(&["snapshot", "serve", &name]);
        let there = stamps(&server.uri(&name));
        assert!(there > before, "snapshot {round} has {there} stamps, the one before {before}");
        before = there;
    }
    drop(writer);
    // None of them changes, whatever is written after it and whatever happens to the server.
    let counts = |server: &Server<'_>| {
        [0, 3, 7].map(|round| stamps(&server.uri(&format!("disk0@s{round}"))))
    };
    let known = counts(&server);
    assert_eq!(known[2], before);
    server.kill();
    let server = site.serve(&[]);
    server.wait_for("disk0@s7");
    assert_eq!(counts(&server), known, "served again after the restart");
    server.stop();
    check(&site);
}

#[test]
fn a_snapshot_is_read_only_and_gone_when_deleted() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.ext4("image");
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    site.run(&["snapshot", "create", "disk0@v1"]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 64M", &server.uri("disk0")]);
    site.run(&["snapshot", "serve", "disk0@v1"]);
    let view = server.uri("disk0@v1");
    assert_begins(&view, &image);
    let copy = scratch.text("copy");
    run("nbdcopy", &[&view, &copy]);
    run("e2fsck", &["-fn", &copy]);
    for change in ["write 0 4k", "discard 0 64k", "write -z 0 64k"] {
        let changed = output("qemu-io", &["-f", "raw", "-c", change, &view]);
        assert_eq!(changed.status.code(), Some(1), "{change}: {}", said(&changed));
    }
    assert_begins(&view, &image);
    let list = site.json(&["snapshot", "list", "disk0"]);
    assert_eq!((&list[0]["name"], &list[0]["served"]), (&"v1".into(), &true.into()));
    refused(&site, &["snapshot", "create", "disk0@v1"], "a snapshot of this name already");
    refused(&site, &["snapshot", "serve", "disk0@v2"], "has no snapshot 'v2'");
    refused(&site, &["volume", "delete", "disk0"], "has 1 snapshots");
    site.run(&["snapshot", "delete", "disk0@v1"]);
    assert!(!server.exports("disk0@v1"));
    server.stop();
    check(&site);
}

#[test]
fn clones_are_volumes_of_their_own() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.image("image", 64 << 20, 51);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    site.run(&["snapshot", "create", "disk0@v1"]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 64M", &server.uri("disk0")]);
    site.run(&["clone", "disk0@v1", "web"]);
    assert_begins(&server.uri("web"), &image);
    run("qemu-io", &["-f", "raw", "-c", "write -P 9 16M 1M", &server.uri("web")]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 9 16M 1M", &image]);
    // A clone of the clone, before anything of it was pushed by age.
    site.run(&["snapshot", "create", "web@a"]);
    site.run(&["clone", "web@a", "deep"]);
    run("qemu-io", &["-f", "raw", "-c", "write -z 16M 1M", &server.uri("web")]);
    assert_begins(&server.uri("deep"), &image);
    let tree = site.run(&["volume", "tree"]);
    let names: Vec<_> = tree.split_whitespace().filter(|word| !word.contains("GiB")).collect();
    let shape: Vec<_> =
        names.iter().filter(|w| ["disk0", "@v1", "web", "@a", "deep"].contains(w)).collect();
    assert_eq!(shape, [&"disk0", &"@v1", &"web", &"@a", &"deep"], "{tree}");
    refused(&site, &["snapshot", "delete", "disk0@v1"], "has clones: deep, web;");
    refused(&site, &["volume", "delete", "web", "--force"], "has clones: deep;");
    server.kill();
    // What a cache held of the clones is theirs after a crash too.
    let server = site.serve(&[]);
    server.wait_for("deep");
    assert_begins(&server.uri("deep"), &image);
    site.run(&["volume", "delete", "deep"]);
    site.run(&["volume", "delete", "web", "--force"]);
    site.run(&["snapshot", "delete", "disk0@v1"]);
    server.stop();
    check(&site);
}

/// A flattened clone has all it needs: its parent can go.
#[test]
fn a_flattened_clone_needs_no_parent() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.ext4("image");
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    site.run(&["snapshot", "create", "disk0@v1"]);
    site.run(&["clone", "disk0@v1", "web"]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 40M 1M", &server.uri("web")]);
    refused(&site, &["snapshot", "delete", "disk0@v1"], "has clones: web");
    refused(&site, &["volume", "flatten", "disk0"], "is no clone");
    site.run(&["volume", "flatten", "web"]);
    site.run(&["snapshot", "delete", "disk0@v1"]);
    site.run(&["volume", "delete", "disk0", "--force"]);
    // Nothing of it comes out of the cache.
    site.run(&["cache", "flush"]);
    site.run(&["cache", "purge", "--force"]);
    let changed = format!("{image}.changed");
    std::fs::copy(&image, &changed).expect("copies");
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 40M 1M", &changed]);
    assert_begins(&server.uri("web"), &changed);
    server.stop();
    check(&site);
}

#[test]
fn a_hundred_clones_of_one_snapshot() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.dense("image", 8 << 20, 52);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    site.run(&["snapshot", "create", "disk0@v1"]);
    // Another host makes them, while the owner goes on.
    let other = site.neighbour(&scratch, "b");
    for number in 0..100 {
        other.run_on_store(&["clone", "disk0@v1", &format!("c{number}")]);
    }
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 8M", &server.uri("disk0")]);
    server.push("disk0");
    refused(&site, &["snapshot", "delete", "disk0@v1"], "and 95 more; delete or flatten");
    let tree = site.json(&["volume", "tree"]);
    assert_eq!(tree[0]["snapshots"][0]["clones"].as_array().map(Vec::len), Some(100));
    server.stop();
    check(&site);
}

#[test]
fn a_rollback_brings_back_what_was() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.image("image", 32 << 20, 53);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    site.run(&["snapshot", "create", "disk0@v1"]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 40M", &server.uri("disk0")]);
    site.run(&["snapshot", "create", "disk0@v2"]);
    let mut writer = Writer::start("cut.py", &["run", &server.uri("disk0")]);
    writer.wait_for_hundreds(1);
    refused(&site, &["snapshot", "rollback", "disk0@v1"], "clients are connected");
    refused(&site, &["snapshot", "rollback", "disk0@v9", "--force"], "has no snapshot 'v9'");
    writer.wait_for_hundreds(1);
    site.run(&["snapshot", "rollback", "disk0@v1", "--force"]);
    drop(writer);
    assert_begins(&server.uri("disk0"), &image);
    run("qemu-io", &["-f", "raw", "-c", "write -P 8 0 1M", &server.uri("disk0")]);
    server.kill();
    let server = site.serve(&[]);
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 8 0 1M", &server.uri("disk0")]);
    // Later snapshots are still there.
    site.run(&["snapshot", "rollback", "disk0@v2"]);
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 7 0 40M", &server.uri("disk0")]);
    server.stop();
    site.run_on_store(&["snapshot", "rollback", "disk0@v1"]);
    let server = site.serve(&[]);
    assert_begins(&server.uri("disk0"), &image);
    server.stop();
    check(&site);
}

/// The server dies at some moment of every command. What it says of snapshots and clones afterwards
/// is whole, and what was cut short can be done again.
#[test]
fn crashes_in_the_middle() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.dense("image", 4 << 20, 54);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    site.run(&["snapshot", "create", "disk0@v1"]);
    server.stop();
    let mut random = Random(54);
    for round in 0..12 {
        let server = site.serve(&[]);
        let clone = format!("c{round}");
        let commands: [&[&str]; 4] = [
            &["snapshot", "create", "disk0@v2"],
            &["snapshot", "delete", "disk0@v2"],
            &["clone", "disk0@v1", &clone],
            &["snapshot", "rollback", "disk0@v1", "--force"],
        ];
        let command = commands[round % commands.len()];
        let begun = Instant::now();
        let after = std::time::Duration::from_micros(random.next() % 60_000);
        std::thread::scope(|scope| {
            let running = scope.spawn(|| site.output(command));
            while begun.elapsed() < after {
                std::thread::yield_now();
            }
            server.kill();
            running.join().expect("it ends");
        });
        let server = site.serve(&[]);
        assert_begins(&server.uri("disk0"), &image);
        let listed = site.json(&["snapshot", "list", "disk0"]);
        let listed = listed.as_array().expect("a list");
        assert!(listed.iter().any(|snapshot| snapshot["name"] == "v1"), "{listed:?}");
        if listed.iter().any(|snapshot| snapshot["name"] == "v2") && round % 4 == 1 {
            site.run(&["snapshot", "delete", "disk0@v2"]);
        }
        if server.exports(&clone) {
            assert_begins(&server.uri(&clone), &image);
            site.run(&["volume", "delete", &clone]);
        }
        server.stop();
        check(&site);
    }
}

#[test]
fn a_clone_of_a_snapshot_whose_volume_another_server_has() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.dense("image", 8 << 20, 55);
    let first = site.serve(&[]);
    run("nbdcopy", &[&image, &first.uri("disk0")]);
    site.run(&["snapshot", "create", "disk0@v1"]);
    let other = site.neighbour(&scratch, "b");
    let second = other.spawn(&[]);
    crate::rig::wait("the second server is there", || {
        second.assert_alive();
        second.log().contains("ready").then_some(())
    });
    other.run(&["clone", "disk0@v1", "web"]);
    other.run(&["snapshot", "serve", "disk0@v1"]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 8M", &first.uri("disk0")]);
    first.push("disk0");
    assert_begins(&second.uri("web"), &image);
    assert_begins(&second.uri("disk0@v1"), &image);
    refused(&site, &["snapshot", "delete", "disk0@v1"], "has clones: web;");
    // Its owner alone changes a volume.
    refused(&other, &["snapshot", "create", "disk0@v2"], "belongs to a server");
    refused(&other, &["snapshot", "rollback", "disk0@v1"], "belongs to a server");
    let copy = scratch.text("copy");
    run("nbdcopy", &[&second.uri("web"), &copy]);
    run("nbdcopy", &[&second.uri("disk0@v1"), &scratch.text("view")]);
    assert_same(&copy, &scratch.text("view"));
    other.run(&["volume", "delete", "web"]);
    site.run(&["snapshot", "delete", "disk0@v1"]);
    second.stop();
    first.stop();
    check(&site);
}
