//! Stores that are not as they should be: each is one line that says what to do.

use std::fs;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use crate::durability::dirty;
use crate::rig::{
    Scratch, Site, VOLUME_BYTES, assert_begins, assert_same, binary, run, said, wait,
};
use crate::s3::{Moto, Wire, refuser, site};

/// The one line that a command or a server ended with.
fn complaint(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}", said(output));
    let text = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = text.lines().filter(|line| line.starts_with("heeler: ")).collect();
    assert_eq!(said.len(), 1, "{text}");
    assert!(text.trim_end().ends_with(said[0]), "the complaint comes last: {text}");
    said[0].into()
}

/// A server that must not start says why, and ends with status 1.
fn refuses_to_serve(site: &Site, flags: &[&str]) -> String {
    let mut server = site.spawn(flags);
    let status = server.ended();
    assert_eq!(status.code(), Some(1), "{}", server.log());
    let log = server.log();
    log.lines().rfind(|line| line.starts_with("heeler: ")).expect(&log).into()
}

#[test]
fn a_service_that_refuses_says_what_to_do() {
    for (status, code, says) in [
        ("403 Forbidden", "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID"),
        ("403 Forbidden", "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ("403 Forbidden", "RequestTimeTooSkewed", "set the clock"),
        ("403 Forbidden", "AccessDenied", "s3:GetObject"),
        ("301 Moved Permanently", "PermanentRedirect", "set AWS_REGION"),
    ] {
        let scratch = Scratch::new();
        let site = site(&scratch, &refuser(status, code), "test", "test");
        for command in
            [&["volume", "list"][..], &["volume", "create", "disk0", "--size", "1G"], &["check"]]
        {
            let line = complaint(&site.output_on_store(command));
            assert!(line.contains(says), "{command:?}: {line}");
        }
        let line = refuses_to_serve(&site, &[]);
        assert!(line.contains(says), "{line}");
    }
}

#[test]
fn a_missing_bucket_is_named() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let mut site = moto.site(&scratch);
    site.store = vec!["--store".into(), "s3://dusks/some/prefix".into()];
    let line = complaint(&site.output_on_store(&["volume", "list"]));
    assert!(line.contains("there is no bucket 'dusks' at http://127.0.0.1:"), "{line}");
    assert!(refuses_to_serve(&site, &[]).contains("there is no bucket 'dusks'"));
}

#[test]
fn an_endpoint_where_nobody_listens_is_named_and_waited_for() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let wire = Wire::to(&moto);
    let site = moto.site_by(&wire, &scratch);
    wire.cut();
    let line = complaint(&site.output_on_store(&["volume", "list"]));
    assert!(line.contains("the store does not work"), "{line}");
    let server = site.spawn(&[]);
    wait("the status shows it", || {
        server.assert_alive();
        let output = site.output(&["status"]);
        String::from_utf8_lossy(&output.stdout).contains("store fails").then_some(())
    });
    wire.mend();
    server.wait_for("disk0");
    wait("the status shows that it is over", || {
        (!site.run(&["status"]).contains("store fails")).then_some(())
    });
    server.stop();
}

#[test]
fn a_prefix_of_another_format_is_left_alone() {
    for (key, content, says) in [
        ("format", "heeler-format 9\n", "format 9"),
        ("format", "something else", "not heeler's"),
        ("names/disk0", "heeler-name 1\n00000000000000000000000000000001\n", "format 1"),
    ] {
        let scratch = Scratch::new();
        let site = Site::new(&scratch);
        let path = site.store_dir().join(key);
        fs::create_dir_all(path.parent().expect("a directory")).expect("the store");
        fs::write(&path, content).expect("the object");
        for command in
            [&["volume", "list"][..], &["volume", "create", "disk1", "--size", "1G"], &["check"]]
        {
            let line = complaint(&site.output(command));
            assert!(line.contains(says) && line.contains("--store"), "{command:?}: {line}");
        }
        assert!(refuses_to_serve(&site, &[]).contains(says));
        let found = crate::rig::listing(&site.store_dir());
        assert_eq!(found.len(), 1, "nothing was written beside it: {found:?}");
    }
}

#[test]
fn a_store_is_marked_before_its_first_volume() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let mark = fs::read_to_string(site.store_dir().join("format")).expect("the mark");
    assert_eq!(mark, "heeler-format 2\n");
    let other = Site { data: scratch.at("b"), store: Vec::new(), env: Vec::new() };
    let server = other.serve(&[]);
    assert!(other.store_dir().join("format").exists());
    server.stop();
}

#[test]
fn a_directory_that_may_not_be_written_is_named() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    // As nobody in particular: for root nothing is read-only.
    let as_nobody = |args: &[&str]| {
        let store = format!("file://{}", site.store_dir().display());
        Command::new("unshare")
            .args(["--user", "timeout", "-k", "5", "60", &binary()])
            .args(args)
            .args(["--store", &store, "--data"])
            .arg(scratch.at("elsewhere"))
            .stdin(Stdio::null())
            .output()
            .expect("unshare(1) starts")
    };
    run("chmod", &["-R", "a-w", site.store_dir().to_str().expect("ASCII")]);
    let listed = as_nobody(&["volume", "list"]);
    assert!(listed.status.success(), "it can be read: {}", said(&listed));
    for command in [
        &["volume", "create", "disk1", "--size", "1G"][..],
        &["serve", "--cache-size", "128M", "--memory", "128M", "--listen", "tcp:127.0.0.1:0"],
    ] {
        let line = complaint(&as_nobody(command));
        let path = site.store_dir();
        assert!(line.contains(&path.display().to_string()), "{line}");
        assert!(line.contains("cannot be changed") && line.contains("--store"), "{line}");
    }
    run("chmod", &["-R", "u+w", site.store_dir().to_str().expect("ASCII")]);
}

#[test]
fn an_unknown_volume_is_said_to_be_unknown() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let stored = [
        &["volume", "info", "disk1"][..],
        &["volume", "delete", "disk1"],
        &["volume", "set", "disk1", "buffered-read=on"],
    ];
    for command in stored {
        let line = complaint(&site.output(command));
        assert!(line.contains("no volume 'disk1'") && line.contains("volume list"), "{line}");
    }
    let server = site.serve(&[]);
    for command in
        [&stored[..], &[&["volume", "push", "disk1"], &["volume", "scrub", "disk1"]]].concat()
    {
        let line = complaint(&site.output(command));
        assert!(line.contains("no volume 'disk1'") && line.contains("volume list"), "{line}");
    }
    server.stop();
}

#[test]
fn a_store_without_create_if_absent_needs_permission() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let wire = Wire::careless(&moto);
    let mut site = moto.site_by(&wire, &scratch);
    let line = complaint(&site.output_on_store(&["volume", "create", "disk0", "--size", "1G"]));
    assert!(line.contains("create-if-absent"), "{line}");
    let line = refuses_to_serve(&site, &[]);
    assert!(line.contains("overwrite") && line.contains("--single-writer-unsafe"), "{line}");

    site.store.push("--single-writer-unsafe".into());
    site.make_volume("disk0");
    let image = scratch.image("image", VOLUME_BYTES, 50);
    let server = site.serve(&[]);
    assert!(server.log().contains("fencing is off"), "{}", server.log());
    assert!(site.json(&["status"])["store"]["fencing"].as_str().expect("text").starts_with("off"));
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    server.push("disk0");
    // It cannot be kept out if it comes at the same moment; one that comes later is.
    let other = site.neighbour(&scratch, "b");
    let second = other.spawn_refused();
    second.stop();
    server.stop();
    fs::remove_file(site.cache()).expect("the cache file");
    let server = site.serve(&[]);
    assert_same(&image, &server.uri("disk0"));
    server.stop();
    site.run_on_store(&["check", "--deep"]);
    // A careful store needs no such thing.
    let mut careful = moto.site(&scratch);
    careful.data = scratch.at("c");
    careful.store = vec!["--store".into(), "s3://disks/other".into()];
    let server = careful.serve(&["--single-writer-unsafe"]);
    assert!(server.log().contains("is not needed"), "{}", server.log());
    assert_eq!(careful.json(&["status"])["store"]["fencing"], "on");
    server.stop();
}

#[test]
fn connections_that_went_dead_are_given_up() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let wire = Wire::to(&moto);
    let site = moto.site_by(&wire, &scratch);
    site.make_volume("disk0");
    let (first, second) =
        (scratch.dense("first", 4 << 20, 51), scratch.dense("second", 8 << 20, 52));
    let server = site.serve(&[]);
    let uri = server.uri("disk0");
    run("nbdcopy", &[&first, &uri]);
    server.push("disk0");
    wire.die();
    run("nbdcopy", &["--flush", &second, &uri]);
    assert_begins(&uri, &second);
    wait("the status shows it", || {
        let begin = Instant::now();
        let status = site.run(&["status"]);
        assert!(begin.elapsed().as_secs() < 30, "it waited for the store");
        status.contains("no answer").then_some(())
    });
    assert!(dirty(&server) > 0, "nothing can have been pushed");
    // The connections of before stay dead: only new ones can help.
    wire.mend();
    wait("everything is pushed", || (dirty(&server) == 0).then_some(()));
    server.stop();
    site.run_on_store(&["check", "--deep"]);
}

#[test]
fn a_full_disk_below_the_store_is_waited_for() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    let store = site.store_dir();
    fs::create_dir_all(&store).expect("a directory");
    let (first, second) =
        (scratch.dense("first", 8 << 20, 53), scratch.dense("second", 48 << 20, 54));
    // A small file system that only the server sees, and what goes through its process.
    let mount = "mount -t tmpfs -o size=64m none \"$0\" && exec \"$@\"";
    let root = fs::metadata("/proc/self").map(|meta| std::os::unix::fs::MetadataExt::uid(&meta));
    let mut by = vec!["unshare", "--mount", "sh", "-c", mount, store.to_str().expect("ASCII")];
    if root.expect("its owner") != 0 {
        by.insert(1, "--map-root-user");
    }
    let server = site.spawn_by(&by, &["--cache-size", "256M"]);
    server.wait_for("disk0");
    let uri = server.uri("disk0");
    let inside = |name: &str| format!("/proc/{}/root{}/{name}", server.id(), store.display());
    run("nbdcopy", &[&first, &uri]);
    server.push("disk0");
    fs::write(inside("filler"), vec![1; 40 << 20]).expect("room for now");
    run("nbdcopy", &["--flush", &second, &uri]);
    wait("the volume shows that there is no room", || {
        let info = site.json(&["volume", "info", "disk0"]);
        let failure = info["push"]["last_failure"].as_str().unwrap_or_default();
        failure.contains("make room").then_some(())
    });
    // A put that is small enough succeeds now and then.
    wait("the status shows it as well", || {
        site.run(&["status"]).contains("make room").then_some(())
    });
    assert!(dirty(&server) > 0, "not everything can have been pushed");
    assert_begins(&uri, &second);
    fs::remove_file(inside("filler")).expect("the filler");
    wait("everything is pushed", || (dirty(&server) == 0).then_some(()));
    assert_begins(&uri, &second);
    let url = format!("file://{}", inside("").trim_end_matches('/'));
    let cache = scratch.text("no-cache");
    site.run(&["check", "--deep", "--store", &url, "--cache", &cache]);
    server.stop();
}

#[test]
fn disks_live_on_ceph() {
    let Ok(endpoint) = std::env::var("HEELER_RGW") else {
        return eprintln!("HEELER_RGW is not set: not tested");
    };
    let scratch = Scratch::new();
    let mut site = site(&scratch, &endpoint, "testkey", "testsecret");
    site.store = vec!["--store".into(), format!("s3://disks/system-{}", std::process::id())];
    site.make_volume("disk0");
    let image = scratch.image("image", VOLUME_BYTES, 55);
    let server = site.serve(&[]);
    assert_eq!(site.json(&["status"])["store"]["fencing"], "on");
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    server.push("disk0");
    // A second server is kept out, and takes over when it is told to.
    let other = site.neighbour(&scratch, "b");
    let second = other.spawn_refused();
    second.stop();
    let second = other.serve(&["--takeover"]);
    assert_same(&image, &second.uri("disk0"));
    let push = site.output(&["volume", "push", "disk0"]);
    assert!(push.status.success() || said(&push).contains("fenced"), "{}", said(&push));
    drop(server);
    second.stop();
    site.run_on_store(&["check", "--deep"]);
    for (key, value, says) in [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", "nobody", "AWS_ACCESS_KEY_ID"),
    ] {
        let mut wrong = site.neighbour(&scratch, "c");
        wrong.env.push((key.into(), value.into()));
        assert!(refuses_to_serve(&wrong, &[]).contains(says));
    }
}
