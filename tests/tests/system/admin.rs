//! The command line: what it prints, what it refuses, how it ends.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::durability::dirty;
use crate::rig::{Scratch, Site, VOLUME, VOLUME_BYTES, assert_begins, run, said};

#[test]
fn usage_errors_end_with_2_and_failures_with_1() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    for args in [
        &["fly"][..],
        &["serve", "--memory", "lots"],
        &["serve", "--memory", "4K"],
        &["serve", "--listen", "10809"],
        &["volume", "create", "disk0"],
        &["volume", "create", "disk0", "--size", "-1"],
        &["cache"],
    ] {
        assert_eq!(site.output(args).status.code(), Some(2), "{args:?}");
    }
    for args in [
        &["status"][..],
        &["cache", "info"],
        &["volume", "push", "disk0"],
        &["volume", "info", "nobody"],
        &["volume", "delete", "nobody"],
        &["volume", "create", "disk0", "--size", "1000"],
        &["volume", "create", "disk/0", "--size", VOLUME],
        &["serve", "--cores", "4095"],
        &["serve", "--store", "gopher://x"],
        &["serve", "--config", "/nonexistent.toml"],
    ] {
        let output = site.output(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", said(&output));
        assert!(!output.stderr.is_empty(), "{args:?} fails without a word");
        assert!(!said(&output).contains("panicked"), "{args:?}: {}", said(&output));
    }
    assert!(site.run(&["--version"]).starts_with("heeler "));
    assert!(site.run(&["serve", "--help"]).contains("--takeover"));
}

#[test]
fn volumes_are_administered_with_and_without_a_server() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.run(&["volume", "create", "disk0", "--size", VOLUME]);
    volumes_are_listed(&site, 1);
    let server = site.serve(&[]);
    let twice = site.output(&["volume", "create", "disk0", "--size", VOLUME]);
    assert_eq!(twice.status.code(), Some(1), "{}", said(&twice));
    site.run(&["volume", "create", "small", "--size", "64M", "--object-size", "256K"]);
    server.wait_for("small");
    volumes_are_listed(&site, 2);
    let image = scratch.dense("image", 6 << 20, 50);
    run("nbdcopy", &[&image, &server.uri("small")]);
    assert_begins(&server.uri("small"), &image);
    site.run(&["volume", "push", "small"]);
    let info = site.json(&["volume", "info", "small"]);
    assert_eq!(info["name"], "small");
    assert_eq!(info["size_bytes"], 64 << 20);
    assert_eq!(info["object_bytes"], 256 << 10);
    site.run(&["volume", "delete", "small", "--force"]);
    assert!(!server.exports("small"), "deleted");
    volumes_are_listed(&site, 1);
    server.stop();
    volumes_are_listed(&site, 1);
    site.run(&["volume", "delete", "disk0"]);
    volumes_are_listed(&site, 0);
}

fn volumes_are_listed(site: &Site, count: usize) {
    let list = site.json(&["volume", "list"]);
    let list = list.as_array().unwrap_or_else(|| panic!("not a list: {list}"));
    assert_eq!(list.len(), count, "{list:?}");
    if count > 0 {
        assert_eq!(list[0]["name"], "disk0");
        assert_eq!(list[0]["size_bytes"], VOLUME_BYTES);
        assert!(site.run(&["volume", "list"]).contains("disk0"));
    }
}

#[test]
fn the_cache_is_inspected_flushed_and_purged() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let mode = fs::metadata(site.data.join("admin.sock")).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let image = scratch.dense("image", 16 << 20, 51);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    site.run(&["cache", "flush"]);
    assert_eq!(dirty(&server), 0);
    assert!(site.run(&["cache", "info"]).contains("iB"));
    assert!(site.run(&["status"]).contains("disk0"));
    site.json(&["status"]);
    site.run(&["cache", "purge"]);
    assert_begins(&server.uri("disk0"), &image);
    let more = scratch.dense("more", 16 << 20, 52);
    run("nbdcopy", &[&more, &server.uri("disk0")]);
    let purge = site.output(&["cache", "purge"]);
    // The background may have been faster with the push.
    if dirty(&server) > 0 {
        assert_eq!(purge.status.code(), Some(1), "{}", said(&purge));
    }
    assert_begins(&server.uri("disk0"), &more);
    server.stop();
}

#[test]
fn the_cache_is_counted_by_volume_by_shard_and_by_time() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    site.make_volume("idle");
    let server = site.serve(&[]);
    let image = scratch.dense("image", 4 << 20, 54);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    assert_begins(&server.uri("disk0"), &image);
    let info = site.json(&["cache", "info"]);
    let windows = ["last_10s", "last_5m", "since_start"];
    let sum = |lists: &str, window: &str, name: &str| -> u64 {
        let parts = info[lists].as_array().unwrap_or_else(|| panic!("no {lists} in {info}"));
        parts.iter().filter_map(|part| part["windows"][window][name].as_u64()).sum()
    };
    for name in ["buffer_hit_bytes", "buffer_miss_bytes", "written_bytes", "read_bytes"] {
        for window in windows {
            let all = info["windows"][window][name].as_u64().expect("a count");
            assert_eq!(all, sum("by_shard", window, name), "{name} {window}");
            assert_eq!(all, sum("by_volume", window, name), "{name} {window}");
        }
    }
    assert_eq!(info["windows"]["since_start"]["written_bytes"], 4 << 20);
    assert_eq!(
        info["by_shard"].as_array().map(Vec::len),
        info["shards"].as_u64().map(|n| n as usize)
    );
    let one = site.json(&["cache", "info", "--volume", "idle", "--shard", "0"]);
    assert_eq!(one["by_volume"][0]["windows"]["since_start"]["written_bytes"], 0);
    assert_eq!(
        (one["by_volume"].as_array().map(Vec::len), &one["by_shard"][0]["shard"]),
        (Some(1), &0.into())
    );
    let text = site.run(&["cache", "info"]);
    for word in ["LAST 10 S", "LAST 5 MIN", "hit ratio", "disk0", "idle", "policy"] {
        assert!(text.contains(word), "no {word} in\n{text}");
    }
    assert!(site.run(&["cache", "info", "--volume", "disk0"]).starts_with("VOLUME"));
    for args in [&["--volume", "nobody"], &["--shard", "99"]] {
        let refused = site.output(&[&["cache", "info"][..], args].concat());
        assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    }
    server.stop();
}

#[test]
fn what_stays_in_ram_is_set_while_clients_are_attached() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    // Small objects spread a small image over all shards: all of it has room in RAM.
    let create = ["volume", "create", "disk0", "--size", VOLUME, "--object-size", "64K"];
    site.run(&[&create[..], &["--buffered-read", "off"]].concat());
    let stays = |site: &Site| {
        let info = site.json(&["volume", "info", "disk0"]);
        [&info["buffered_read"], &info["buffered_write"]].map(|on| on.as_bool().expect("a switch"))
    };
    assert_eq!(stays(&site), [false, true]);
    site.run(&["volume", "set", "disk0", "buffered-read=on"]);
    assert_eq!(stays(&site), [true, true]);
    let server = site.serve(&[]);
    let image = scratch.dense("image", 1 << 20, 55);
    let hits = |site: &Site| {
        let info = site.json(&["cache", "info"]);
        info["windows"]["since_start"]["buffer_hit_bytes"].as_u64().expect("a count")
    };
    site.run(&["volume", "set", "disk0", "buffered-write=off", "buffered-read=off"]);
    run("nbdcopy", &["--flush", &image, &server.uri("disk0")]);
    assert_begins(&server.uri("disk0"), &image);
    assert_eq!(hits(&site), 0, "nothing stayed");
    site.run(&["volume", "set", "disk0", "buffered-write=on"]);
    run("nbdcopy", &["--flush", &image, &server.uri("disk0")]);
    assert_begins(&server.uri("disk0"), &image);
    assert_eq!(hits(&site), 1 << 20, "all of it stayed");
    server.stop();
    let server = site.serve(&[]);
    assert_eq!(stays(&site), [false, true]);
    assert!(site.run(&["volume", "info", "disk0"]).contains("buffered read  off"));
    server.stop();
    let wrong = site.output(&["volume", "set", "disk0", "buffered-write=maybe"]);
    assert_eq!(wrong.status.code(), Some(2), "{}", said(&wrong));
}

#[test]
fn the_defaults_serve_a_disk() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    let settings = scratch.text("settings.toml");
    fs::write(&settings, "memory = '192M'\ncache-size = '256M'\nshards = 2\n").expect("settings");
    let server = site.spawn(&["--config", &settings, "--memory", "160M"]);
    server.wait_for("disk0");
    assert_eq!(run("nbdinfo", &["--size", &server.uri("disk0")]).trim(), (16u64 << 30).to_string());
    let log = server.log();
    for word in ["disk0", "nbd+unix://", "cache.img", "store"] {
        assert!(log.contains(word), "'{word}' is not in:\n{log}");
    }
    server.stop();
}

#[test]
fn a_second_signal_ends_at_once_and_loses_nothing() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.dense("image", 16 << 20, 53);
    let mut server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    server.terminate();
    server.terminate();
    server.ended();
    drop(server);
    let server = site.serve(&[]);
    assert_begins(&server.uri("disk0"), &image);
    server.stop();
}
