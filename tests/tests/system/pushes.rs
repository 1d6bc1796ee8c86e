//! When pushes start, what they ask of the store, and how they are seen.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use crate::durability::dirty;
use crate::rig::{Scratch, Site, run, wait};
use crate::s3::{Moto, Wire};

/// What was asked of the store so far. Asking for it asks nothing of the store.
fn asked(site: &Site) -> Vec<u64> {
    let store = &site.json(&["status"])["store"];
    let names = ["gets", "puts", "deletes", "lists", "retries"];
    names.iter().map(|name| store[*name].as_u64().expect("a count")).collect()
}

#[test]
fn idle_and_clean_asks_nothing_of_the_store() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    let volumes = ["disk0", "disk1", "disk2"];
    volumes.iter().for_each(|volume| site.make_volume(volume));
    let server = site.serve(&[]);
    let image = scratch.dense("image", 4 << 20, 70);
    for volume in volumes {
        server.wait_for(volume);
        run("nbdcopy", &[&image, &server.uri(volume)]);
    }
    site.run(&["cache", "flush"]);
    // What a commit supersedes is deleted after it.
    wait("nothing is under way", || {
        let store = &site.json(&["status"])["store"];
        (store["puts_now"] == 0 && store["waiting"] == 0).then_some(())
    });
    let before = asked(&site);
    std::thread::sleep(Duration::from_secs(10));
    assert_eq!(asked(&site), before);
    server.stop();
}

#[test]
fn a_push_starts_when_it_is_told() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.dense("image", 1 << 20, 71);
    let server = site.serve(&["--push-after", "1h"]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    // Longer than by default.
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(dirty(&server), 1 << 20);
    let push = &site.json(&["status"])["volumes"][0]["push"];
    assert!(push["dirty_seconds"].as_u64() >= Some(6), "{push}");
    assert_eq!(push["backlog_bytes"], 1 << 20);
    server.stop();
    let server = site.serve(&["--push-after", "100ms"]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    wait("it is pushed", || (dirty(&server) == 0).then_some(()));
    let push = &site.json(&["status"])["volumes"][0]["push"];
    assert_eq!((&push["backlog_bytes"], &push["backlog_seconds"]), (&0.into(), &0.into()));
    server.stop();
    let refused = site.output(&["serve", "--push-after", "soon"]);
    assert_eq!(refused.status.code(), Some(2));
}

#[test]
fn a_push_says_how_far_it_is() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let site = moto.site(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&["--push-after", "1h"]);
    let bytes = 12 << 20;
    run("nbdcopy", &[&scratch.dense("image", bytes, 72), &server.uri("disk0")]);
    let mut socket = UnixStream::connect(site.data.join("admin.sock")).expect("the admin socket");
    socket.write_all(b"{\"request\":\"volume-push\",\"name\":\"disk0\"}\n").expect("asked");
    let mut before = (0, 0);
    for line in BufReader::new(socket).lines() {
        let line: Value = serde_json::from_str(&line.expect("an answer")).expect("JSON");
        let Some(progress) = line.get("progress") else {
            assert!(line.get("done").is_some(), "{line}");
            break;
        };
        let number = |name: &str| progress[name].as_u64().expect("a number");
        let now = (number("done_bytes"), number("total_bytes"));
        assert!(now.0 >= before.0 && now.1 >= before.1, "{before:?} {now:?}");
        assert!(now.0 <= now.1 && now.1 <= bytes, "{now:?}");
        before = now;
    }
    assert_eq!(dirty(&server), 0);
    server.stop();
}

#[test]
fn many_volumes_do_not_hammer_a_store_that_is_away() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let wire = Wire::to(&moto);
    let site = moto.site_by(&wire, &scratch);
    let volumes = ["disk0", "disk1", "disk2", "disk3"];
    volumes.iter().for_each(|volume| site.make_volume(volume));
    let server = site.serve(&["--push-after", "100ms"]);
    volumes.iter().for_each(|volume| server.wait_for(volume));
    let image = scratch.dense("image", 1 << 20, 73);
    wire.cut();
    volumes.iter().for_each(|volume| _ = run("nbdcopy", &[&image, &server.uri(volume)]));
    wait("it is seen that the store is away", || {
        let store = &site.json(&["status"])["store"];
        (store["away_seconds"].is_u64() && store["waiting"].as_u64() >= Some(2)).then_some(())
    });
    assert!(site.run(&["status"]).contains("store away"));
    let requests = |site: &Site| asked(site)[..4].iter().sum::<u64>();
    let before = requests(&site);
    std::thread::sleep(Duration::from_secs(10));
    let tries = requests(&site) - before;
    assert!(tries <= 8, "{tries} in ten seconds, one every half second to five");
    wire.mend();
    wait("everything is pushed", || (dirty(&server) == 0).then_some(()));
    let store = &site.json(&["status"])["store"];
    assert!(store["away_seconds"].is_null() && store["waiting"] == 0, "{store}");
    server.stop();
}
