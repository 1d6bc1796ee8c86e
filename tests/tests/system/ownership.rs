//! One volume, two servers: the second is refused, or it takes over and the first changes nothing
//! any more.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::durability::dirty;
use crate::rig::{Scratch, Site, VOLUME, assert_begins, listing, run, said, wait};

/// What the store holds, without the names of volumes, which nobody changes.
fn store(site: &Site) -> BTreeMap<PathBuf, u64> {
    listing(&site.store_dir())
}

#[test]
fn a_second_server_is_refused() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.dense("image", 4 << 20, 20);
    let first = site.serve(&[]);
    run("nbdcopy", &[&image, &first.uri("disk0")]);
    let other = site.neighbour(&scratch, "b");
    let second = other.spawn_refused();
    assert!(!second.exports("disk0"), "two owners");
    assert_begins(&first.uri("disk0"), &image);
    first.push("disk0");
    second.stop();
    first.stop();
}

#[test]
fn a_takeover_fences_the_first_server() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let (old, lost) = (scratch.dense("old", 8 << 20, 21), scratch.dense("lost", 8 << 20, 22));
    let first = site.serve(&[]);
    run("nbdcopy", &[&old, &first.uri("disk0")]);
    first.push("disk0");
    let other = site.neighbour(&scratch, "b");
    let second = other.serve(&["--takeover"]);
    assert_begins(&second.uri("disk0"), &old);
    second.push("disk0");
    let before = store(&site);
    // The first does not know yet. It may take writes, but no push of them can be committed.
    let _ = crate::rig::output("nbdcopy", &[&lost, &first.uri("disk0")]);
    let push = site.output(&["volume", "push", "disk0"]);
    assert_eq!(push.status.code(), Some(1), "{}", said(&push));
    wait("the first server says that it was fenced", || {
        first.assert_alive();
        site.run(&["status"]).contains("fenced").then_some(())
    });
    assert_begins(&second.uri("disk0"), &old);
    first.terminate();
    let mut first = first;
    first.ended();
    let after = store(&site);
    for (path, hash) in &before {
        assert_eq!(after.get(path), Some(hash), "{} was changed", path.display());
    }
    // What it had put before it knew is in nobody's image; it never gets a head.
    for path in after.keys().filter(|path| !before.contains_key(*path)) {
        assert!(!path.components().any(|part| part.as_os_str() == "head"), "{}", path.display());
    }
    second.stop();
    // Back again, with dirty data of before: never pushed, never served.
    let first = site.spawn(&[]);
    wait("the stale cache is refused", || {
        first.assert_alive();
        first.log().contains("cannot be merged").then_some(())
    });
    assert!(!first.exports("disk0"));
    let refused = site.output(&["cache", "purge"]);
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    drop(first);
    let second = other.serve(&[]);
    assert_begins(&second.uri("disk0"), &old);
    second.stop();
}

#[test]
fn a_released_volume_moves_to_another_server_and_back() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let other = site.neighbour(&scratch, "b");
    let sites = [&site, &other];
    for round in 0..4 {
        let image = scratch.dense("image", 2 << 20, 30 + round as u64);
        let server = sites[round % 2].serve(&[]);
        run("nbdcopy", &[&image, &server.uri("disk0")]);
        assert!(dirty(&server) <= 2 << 20);
        server.stop();
        // Nothing that this cache still holds of earlier rounds may be believed.
        let server = sites[(round + 1) % 2].serve(&[]);
        assert_begins(&server.uri("disk0"), &image);
        server.stop();
    }
}

#[test]
fn a_cache_of_another_store_is_not_believed() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let (ours, theirs) = (scratch.dense("ours", 2 << 20, 40), scratch.dense("theirs", 4 << 20, 41));
    let server = site.serve(&[]);
    run("nbdcopy", &[&ours, &server.uri("disk0")]);
    server.stop();
    let other = Site { data: scratch.at("b"), store: Vec::new(), env: Vec::new() };
    other.make_volume("disk0");
    let server = other.serve(&[]);
    run("nbdcopy", &[&theirs, &server.uri("disk0")]);
    server.stop();
    // The same names, other volumes.
    std::fs::copy(other.cache(), site.cache()).expect("the cache file");
    let server = site.serve(&[]);
    assert_begins(&server.uri("disk0"), &ours);
    server.stop();
}

#[test]
fn one_data_directory_has_one_server() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.run(&["volume", "create", "disk0", "--size", VOLUME]);
    let server = site.serve(&[]);
    let mut second = site.spawn(&[]);
    assert_eq!(second.ended().code(), Some(1), "{}", second.log());
    server.assert_alive();
    assert!(server.exports("disk0"), "the second has taken its socket away");
    server.stop();
}
