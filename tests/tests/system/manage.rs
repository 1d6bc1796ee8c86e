//! Volumes that are resized, renamed, described and made read-only while clients use them, and
//! through crashes.

use std::thread;
use std::time::Duration;

use crate::rig::{Scratch, Server, Site, VOLUME_BYTES, refused, run, stamps};
use crate::writer::Writer;

const MIB: u64 = 1 << 20;

fn qemu_io(uri: &str, commands: &[&str]) {
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(uri);
    let text = run("qemu-io", &args);
    assert!(!text.contains("verification failed"), "{commands:?}: {text}");
}

fn size(server: &Server<'_>, name: &str) -> u64 {
    run("nbdinfo", &["--size", &server.uri(name)]).trim().parse().expect("a number")
}

#[test]
fn a_volume_grows_and_shrinks_under_its_writers() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let uri = server.uri("disk0");
    let mut writer = Writer::start("cut.py", &["run", &uri]);
    writer.wait_for_hundreds(2);
    site.run(&["volume", "resize", "disk0", "2G"]);
    assert_eq!(size(&server, "disk0"), 2 * VOLUME_BYTES);
    qemu_io(&uri, &["write -P 6 1500M 8M", "write -P 7 700M 1M", "flush"]);
    let mut edge = Writer::start("edge.py", &[&uri, &(1600 * MIB).to_string()]);
    edge.wait_for("write ok read ok");
    refused(&site, &["volume", "resize", "disk0", "800M"], "8392704 bytes of data behind byte");
    refused(&site, &["volume", "resize", "disk0", "5000"], "a multiple of 4096");
    site.run(&["volume", "resize", "disk0", "800M", "--force"]);
    edge.wait_for("write ENOSPC read EINVAL");
    drop(edge);
    assert_eq!(size(&server, "disk0"), 800 * MIB);
    writer.wait_for_hundreds(2);
    // What was cut off does not come back, and what was not is there.
    site.run(&["volume", "resize", "disk0", "2G"]);
    qemu_io(&uri, &["read -P 0 1500M 8M", "read -P 0 1600M 1M", "read -P 7 700M 1M"]);
    site.run(&["volume", "resize", "disk0", "768M"]);
    writer.wait_for_hundreds(1);
    drop(writer);
    let there = stamps(&uri);
    server.kill();
    let server = site.serve(&[]);
    assert_eq!((size(&server, "disk0"), stamps(&server.uri("disk0"))), (768 * MIB, there));
    qemu_io(&server.uri("disk0"), &["read -P 7 700M 1M"]);
    server.stop();
    site.run_on_store(&["check", "--deep"]);
    // Without a server a volume only grows.
    refused(&site, &["volume", "resize", "disk0", "512M"], "start one, or attach");
    site.run_on_store(&["volume", "resize", "disk0", "1G"]);
    let server = site.serve(&[]);
    assert_eq!(size(&server, "disk0"), VOLUME_BYTES);
    qemu_io(&server.uri("disk0"), &["read -P 7 700M 1M", "read -P 0 768M 256M"]);
    server.stop();
}

/// Killed at different moments of it: the volume has its old size or the new one, what stays is
/// there, and what was to go is there, or zeroes, and zeroes when the volume has shrunk.
#[test]
fn a_server_killed_while_a_volume_shrinks_leaves_the_old_size_or_the_new() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let mut outcomes = Vec::new();
    for round in 0..8u64 {
        let server = site.serve(&[]);
        let uri = server.uri("disk0");
        qemu_io(&uri, &["write -P 5 0 8M", "write -P 6 600M 64M", "write -P 7 500M 12M", "flush"]);
        let mut resize = site.start_doomed(&["volume", "resize", "disk0", "513M", "--force"]);
        thread::sleep(Duration::from_millis(round * round * 4));
        server.kill();
        let _ = resize.wait();
        let server = site.serve(&[]);
        let uri = server.uri("disk0");
        let now = size(&server, "disk0");
        qemu_io(&uri, &["read -P 5 0 8M", "read -P 7 500M 12M"]);
        assert!(now == VOLUME_BYTES || now == 513 * MIB, "round {round}: {now}");
        outcomes.push(now);
        if now != VOLUME_BYTES {
            site.run(&["volume", "resize", "disk0", "1G"]);
            qemu_io(&uri, &["read -P 0 513M 511M"]);
        }
        server.stop();
        site.run_on_store(&["check", "--deep", "disk0"]);
    }
    eprintln!("sizes after the kills: {outcomes:?}");
}

#[test]
fn a_rollback_restores_the_size_too() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let uri = server.uri("disk0");
    qemu_io(&uri, &["write -P 5 1000M 4M", "write -P 4 0 4M"]);
    site.run(&["snapshot", "create", "disk0@large"]);
    site.run(&["volume", "resize", "disk0", "100M", "--force"]);
    site.run(&["snapshot", "create", "disk0@small"]);
    site.run(&["snapshot", "rollback", "disk0@large"]);
    assert_eq!(size(&server, "disk0"), VOLUME_BYTES);
    qemu_io(&uri, &["read -P 5 1000M 4M", "read -P 4 0 4M"]);
    site.run(&["snapshot", "rollback", "disk0@small"]);
    assert_eq!(size(&server, "disk0"), 100 * MIB);
    site.run(&["volume", "resize", "disk0", "1G"]);
    qemu_io(&uri, &["read -P 0 100M 924M", "read -P 4 0 4M"]);
    site.run(&["snapshot", "serve", "disk0@large"]);
    assert_eq!(size(&server, "disk0@large"), VOLUME_BYTES);
    server.stop();
    site.run_on_store(&["check", "--deep"]);
}

fn names(site: &Site) -> Vec<String> {
    let text = site.run_on_store(&["volume", "list", "--json"]);
    let lines: serde_json::Value = serde_json::from_str(&text).expect("a list");
    let names = lines.as_array().expect("a list").iter();
    names.map(|line| line["name"].as_str().expect("a name").into()).collect()
}

#[test]
fn a_renamed_volume_keeps_its_clients_snapshots_and_clones() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    site.make_volume("web");
    let server = site.serve(&[]);
    let uri = server.uri("web");
    let mut writer = Writer::start("cut.py", &["run", &uri]);
    writer.wait_for_hundreds(1);
    site.run(&["snapshot", "create", "web@a"]);
    site.run(&["snapshot", "serve", "web@a"]);
    site.run(&["clone", "web@a", "kid"]);
    refused(&site, &["volume", "rename", "web", "kid"], "there is a volume 'kid' already");
    refused(&site, &["volume", "rename", "nope", "x"], "there is no volume 'nope'");
    refused(&site, &["volume", "rename", "web", "a/b"], "cannot be a volume's name");
    site.run(&["volume", "rename", "web", "www"]);
    writer.wait_for_hundreds(2);
    assert_eq!(names(&site), ["disk0", "kid", "www"]);
    assert!(!server.exports("web") && !server.exports("web@a"));
    assert!(server.exports("www") && server.exports("www@a"));
    let at_snapshot = stamps(&server.uri("www@a"));
    let tree = site.run(&["volume", "tree"]);
    let place = |word: &str| tree.find(word).unwrap_or_else(|| panic!("{word}: {tree}"));
    assert!(place("www") < place("@a") && place("@a") < place("kid"), "{tree}");
    refused(&site, &["snapshot", "delete", "www@a"], "has clones: kid;");
    // Another server of the same store: its names are taken, and it cannot rename ours.
    let other = site.neighbour(&scratch, "b");
    refused(&other, &["volume", "rename", "www", "x"], "belongs to a server");
    assert_eq!(names(&site), ["disk0", "kid", "www"]);
    // The old name is free again.
    site.run(&["volume", "create", "web", "--size", "64M"]);
    drop(writer);
    let there = stamps(&server.uri("www"));
    server.kill();
    let server = site.serve(&[]);
    server.wait_for("www");
    server.wait_for("www@a");
    assert_eq!(stamps(&server.uri("www")), there);
    assert_eq!(stamps(&server.uri("www@a")), at_snapshot);
    assert_eq!(size(&server, "web"), 64 * MIB);
    server.stop();
    site.run_on_store(&["volume", "rename", "web", "zzz"]);
    assert_eq!(names(&site), ["disk0", "kid", "www", "zzz"]);
    site.run_on_store(&["check", "--deep"]);
}

/// Killed anywhere in it, a volume has one name, and renaming goes on.
#[test]
fn a_renaming_cut_short_leaves_one_name() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    site.make_volume("web");
    for round in 0..8u64 {
        let server = site.serve(&[]);
        server.wait_for("web");
        let mut rename = site.start_doomed(&["volume", "rename", "web", "www"]);
        thread::sleep(Duration::from_millis(round));
        server.kill();
        let _ = rename.wait();
        let now = names(&site);
        assert!(now == ["disk0", "web"] || now == ["disk0", "www"], "round {round}: {now:?}");
        let server = site.serve(&[]);
        server.wait_for(&now[1]);
        if now[1] == "web" {
            site.run(&["volume", "rename", "web", "www"]);
        } else {
            // The old name may be left: it is no volume, and can be had.
            let _ = site.output(&["volume", "rename", "web", "www"]);
        }
        assert_eq!(names(&site), ["disk0", "www"]);
        site.run(&["volume", "rename", "www", "web"]);
        server.stop();
        assert!(site.run_on_store(&["volume", "list"]).contains("web"));
    }
    // What is left of one that was cut short in the store says what to do.
    let kept = site.store_dir().join("names/web");
    std::fs::copy(&kept, site.store_dir().join("names/half")).expect("a second name");
    assert_eq!(names(&site), ["disk0", "web"]);
    let create = ["volume", "create", "half", "--size", "1M"];
    refused(&site, &create, "`heeler volume rename half web` gives it free");
    refused(&site, &["volume", "delete", "half"], "there is no volume 'half'");
    site.run_on_store(&["volume", "rename", "half", "web"]);
    site.run_on_store(&create);
}

#[test]
fn a_volume_becomes_read_only_and_clean_under_its_writers() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&["--push-after", "60s"]);
    let uri = server.uri("disk0");
    let mut writer = Writer::start("cut.py", &["run", &uri]);
    let mut edge = Writer::start("edge.py", &[&uri, &(900 * MIB).to_string()]);
    edge.wait_for("write ok read ok");
    writer.wait_for_hundreds(2);
    let words = ["read-only=yes", "description=the web server", "tags=db,eu", "tag+=prod"];
    site.run(&[&["volume", "set", "disk0"], &words[..]].concat());
    let info = site.json(&["volume", "info", "disk0"]);
    assert_eq!((&info["dirty_bytes"], &info["read_only"]), (&0.into(), &true.into()), "{info}");
    edge.wait_for("write EPERM read ok");
    let _ = writer.end();
    let there = stamps(&uri);
    assert!(run("nbdinfo", &[&uri]).contains("is_read_only: true"));
    server.kill();
    let server = site.serve(&[]);
    assert!(run("nbdinfo", &[&server.uri("disk0")]).contains("is_read_only: true"));
    assert_eq!(stamps(&server.uri("disk0")), there);
    let long = site.run(&["volume", "list", "--long", "--tag", "prod"]);
    assert!(long.contains("db,eu,prod") && long.contains("the web server"), "{long}");
    assert!(!site.run(&["volume", "list", "--tag", "asia"]).contains("disk0"));
    let mut edge = Writer::start("edge.py", &[&server.uri("disk0"), "0"]);
    // A client that came to a read-only volume is told by its own library.
    edge.wait_for("write EPERM read ok");
    site.run(&["volume", "set", "disk0", "read-only=no", "tag-=eu"]);
    qemu_io(&server.uri("disk0"), &["write -P 9 900M 1M", "read -P 9 900M 1M"]);
    assert!(site.run(&["volume", "info", "disk0"]).contains("db, prod"));
    let long = ["volume", "set", "disk0", &format!("tag+={}", "x".repeat(64))];
    refused(&site, &long, "at most 32 tags, each of 1 to 63 bytes");
    server.stop();
    site.run_on_store(&["volume", "set", "disk0", "read-only=yes"]);
    let server = site.serve(&[]);
    assert!(run("nbdinfo", &[&server.uri("disk0")]).contains("is_read_only: true"));
    server.stop();
}
