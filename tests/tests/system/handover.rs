//! Volumes that move between servers that go on running: detach, attach, take over, salvage.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::hammer::Hammer;
use crate::rig::{
    Random, Scratch, Server, Site, VOLUME, VOLUME_BYTES, assert_begins, binary, run, said, wait,
};
use crate::s3::{Moto, Wire};

fn state(site: &Site) -> String {
    let volumes = site.json(&["volume", "list"]);
    let disk0 = volumes.as_array().expect("a list").iter().find(|line| line["name"] == "disk0");
    disk0.expect("it stays listed")["state"].as_str().expect("a state").into()
}

/// A command that fails, with one line that says why.
fn refused(site: &Site, args: &[&str]) -> String {
    let output = site.output(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", said(&output));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
    text
}

/// What the cache holds of the volume and cannot push: bytes.
fn stranded(site: &Site) -> u64 {
    let info = site.json(&["volume", "info", "disk0"]);
    info["stranded"]["bytes"].as_u64().unwrap_or(0)
}

/// Two sites on one store.
fn pair(scratch: &Scratch) -> (Site, Site) {
    let site = Site::new(scratch);
    site.make_volume("disk0");
    let other = site.neighbour(scratch, "b");
    (site, other)
}

#[test]
fn a_clean_volume_is_detached_in_a_second_and_comes_back_with_its_cache() {
    let scratch = Scratch::new();
    let (site, other) = pair(&scratch);
    let image = scratch.dense("image", 8 << 20, 60);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    server.push("disk0");
    let fetched = || site.json(&["cache", "info"])["fetched_bytes"].as_u64().expect("a number");
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        site.run(&["volume", "detach", "disk0"]);
        best = best.min(start.elapsed());
        assert_eq!(state(&site), "detached");
        assert!(!server.exports("disk0"));
        site.run(&["volume", "attach", "disk0"]);
        assert_begins(&server.uri("disk0"), &image);
    }
    assert!(best < Duration::from_secs(1), "{best:?}");
    assert_eq!(fetched(), 0, "nobody had it between, so all of it was there");
    site.run(&["volume", "detach", "disk0"]);
    site.run(&["volume", "detach", "disk0"]);
    let second = other.serve(&[]);
    let owned = refused(&site, &["volume", "attach", "disk0"]);
    assert!(owned.contains("detach it there"), "{owned}");
    let newer = scratch.dense("newer", 2 << 20, 61);
    run("nbdcopy", &[&newer, &second.uri("disk0")]);
    other.run(&["volume", "detach", "disk0"]);
    site.run(&["volume", "attach", "disk0"]);
    assert_begins(&server.uri("disk0"), &newer);
    assert!(fetched() > 0, "what it held is not believed");
    server.stop();
    second.stop();
}

#[test]
fn a_volume_made_elsewhere_can_be_attached() {
    let scratch = Scratch::new();
    let (site, other) = pair(&scratch);
    // The second server has looked for volumes when it says that it cannot have this one.
    let (first, second) = (site.serve(&[]), other.spawn_refused());
    site.run(&["volume", "create", "late", "--size", VOLUME]);
    let image = scratch.dense("image", 2 << 20, 62);
    run("nbdcopy", &[&image, &first.uri("late")]);
    for (args, why) in [
        (&["volume", "attach", "late"][..], "detach it there"),
        (&["volume", "attach", "nobody"], "no volume 'nobody'"),
        (&["volume", "detach", "late"], "does not serve"),
        (&["volume", "detach", "disk0"], "does not serve"),
        (&["volume", "salvage", "disk0", "x"], "nothing to salvage"),
    ] {
        let text = refused(&other, args);
        assert!(text.contains(why), "{args:?}: {text}");
    }
    let text = refused(&site, &["volume", "forget", "late"]);
    assert!(text.contains("volume detach late"), "{text}");
    let text = refused(&site, &["volume", "detach", "late", "--cancel"]);
    assert!(text.contains("not being detached"), "{text}");
    site.run(&["volume", "detach", "late"]);
    other.run(&["volume", "attach", "late"]);
    assert_begins(&second.uri("late"), &image);
    first.stop();
    second.stop();
}

#[test]
fn a_detach_waits_for_the_store_and_can_be_called_off() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let wire = Wire::to(&moto);
    let site = moto.site_by(&wire, &scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let (first, second) =
        (scratch.dense("first", 4 << 20, 63), scratch.dense("second", 4 << 20, 64));
    wire.cut();
    run("nbdcopy", &[&first, &server.uri("disk0")]);
    let detach = || {
        let mut command = Command::new(binary());
        command.args(["volume", "detach", "disk0", "--data"]).arg(&site.data);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let process = command.spawn().expect("it starts");
        wait("the volume is on its way out", || (state(&site) == "detaching").then_some(()));
        process
    };
    // Whoever ordered it goes away.
    let mut process = detach();
    assert_begins(&server.uri("disk0"), &first);
    let again = refused(&site, &["volume", "detach", "disk0"]);
    assert!(again.contains("already"), "{again}");
    run("kill", &["-INT", &process.id().to_string()]);
    process.wait().expect("it ends");
    wait("the volume stays", || (state(&site) == "served").then_some(()));
    // Somebody else calls it off.
    let process = detach();
    site.run(&["volume", "detach", "disk0", "--cancel"]);
    let output = process.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("was not detached: it is served"), "{}", said(&output));
    run("nbdcopy", &[&second, &server.uri("disk0")]);
    // Clients that stay until the end are told by a closed connection.
    let hammer = Hammer::new(&scratch);
    let mut process = detach();
    wire.mend();
    assert!(process.wait().expect("it ends").success());
    assert_eq!(state(&site), "detached");
    site.run(&["volume", "attach", "disk0"]);
    assert_begins(&server.uri("disk0"), &second);
    run("qemu-io", &["-f", "raw", "-c", "discard 0 64M", &server.uri("disk0")]);
    let mut running = hammer.start(&server.uri("disk0"), 1);
    running.wait_for_hundreds(3);
    site.run(&["volume", "detach", "disk0"]);
    running.end();
    site.run(&["volume", "attach", "disk0"]);
    hammer.check(&server.uri("disk0"));
    server.stop();
}

/// The dirty blocks of `image` at `at` are in a salvaged image, and its list names them.
fn assert_salvaged(saved: &str, image: &str, at: u64) {
    let list = fs::read_to_string(format!("{saved}.map")).expect("the list");
    let lines = list.lines().filter(|line| !line.starts_with('#'));
    let ranges: Vec<Vec<&str>> = lines.map(|line| line.split(' ').collect()).collect();
    let bytes = fs::metadata(image).expect("the image").len();
    let data = [at.to_string(), bytes.to_string(), "data".into()];
    assert!(ranges.iter().any(|range| range[..] == data), "{list}");
    assert!(ranges.iter().any(|range| range[..] == ["16777216", "4194304", "zero"]), "{list}");
    assert_eq!(ranges.len(), 2, "{list}");
    assert_eq!(fs::metadata(saved).expect("the image").len(), VOLUME_BYTES);
    let (skip, count) = (format!("skip={at}"), format!("count={bytes}"));
    let cut = format!("{saved}.cut");
    let of = format!("of={cut}");
    let from = format!("if={saved}");
    let flags = "iflag=skip_bytes,count_bytes";
    run("dd", &[&from, &of, "bs=64K", &skip, &count, flags, "status=none"]);
    run("cmp", &[image, &cut]);
}

#[test]
fn what_a_lost_volume_left_is_named_and_saved_and_given_up() {
    let scratch = Scratch::new();
    let (site, other) = pair(&scratch);
    let (pushed, lost) = (scratch.dense("pushed", 8 << 20, 65), scratch.dense("lost", 1 << 20, 66));
    let first = site.serve(&[]);
    run("nbdcopy", &[&pushed, &first.uri("disk0")]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 16M 4M", &first.uri("disk0")]);
    first.push("disk0");
    let second = other.spawn(&[]);
    wait("the second server is there", || other.output(&["status"]).status.success().then_some(()));
    other.run(&["volume", "attach", "disk0", "--takeover"]);
    let newer = scratch.dense("newer", 1 << 20, 67);
    run("nbdcopy", &[&newer, &second.uri("disk0")]);
    other.run(&["volume", "push", "disk0"]);
    // The first does not know yet: it takes what it can never push.
    let at = 3 << 20;
    let write = format!("write -s {lost} {at} 1M");
    run(
        "qemu-io",
        &["-f", "raw", "-c", &write, "-c", "discard 16M 4M", "-c", "flush", &first.uri("disk0")],
    );
    wait("the first server says that it was fenced", || (state(&site) == "fenced").then_some(()));
    assert!(!first.exports("disk0"));
    assert_eq!(stranded(&site), 5 << 20);
    let saved = scratch.text("saved");
    site.run(&["volume", "salvage", "disk0", &saved]);
    assert_salvaged(&saved, &lost, at);
    let again = refused(&site, &["volume", "salvage", "disk0", &saved]);
    assert!(again.contains("exists"), "{again}");
    let kept = refused(&site, &["volume", "attach", "disk0"]);
    assert!(kept.contains("salvage") && kept.contains("5242880"), "{kept}");
    // The log still has it after a crash, and it is refused, named and saved as before.
    first.kill();
    let first = site.spawn(&[]);
    wait("the stale cache is refused", || {
        first.assert_alive();
        let known = site.output(&["status"]).status.success() && state(&site) == "refused";
        (known && stranded(&site) > 0).then_some(())
    });
    assert_eq!(stranded(&site), 5 << 20);
    let saved = scratch.text("saved again");
    site.run(&["volume", "salvage", "disk0", &saved]);
    assert_salvaged(&saved, &lost, at);
    let kept = refused(&site, &["volume", "forget", "disk0"]);
    assert!(kept.contains("--force"), "{kept}");
    site.run(&["volume", "forget", "disk0", "--force"]);
    let info: Value = site.json(&["cache", "info"]);
    assert_eq!((&info["dirty_bytes"], &info["stranded_bytes"]), (&0.into(), &0.into()));
    other.run(&["volume", "detach", "disk0"]);
    site.run(&["volume", "attach", "disk0"]);
    assert_begins(&first.uri("disk0"), &newer);
    first.stop();
    second.stop();
}

#[test]
fn a_killed_owner_that_had_pushed_everything_comes_back_without_a_word() {
    let scratch = Scratch::new();
    let (site, other) = pair(&scratch);
    let image = scratch.dense("image", 4 << 20, 68);
    let first = site.serve(&[]);
    run("nbdcopy", &[&image, &first.uri("disk0")]);
    first.push("disk0");
    first.kill();
    let second = other.serve(&["--takeover"]);
    let newer = scratch.dense("newer", 2 << 20, 69);
    run("nbdcopy", &[&newer, &second.uri("disk0")]);
    second.stop();
    // Its log calls it dirty, but the other's claim says that it was pushed.
    let first = site.serve(&[]);
    assert_begins(&first.uri("disk0"), &newer);
    first.stop();
}

/// How a volume leaves a server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Move {
    /// It is detached, under a writer.
    Detach,
    /// The server is killed after a push, and the other takes over.
    Kill,
    /// The other takes over, and the server hears of it.
    TakeOver,
}

/// Moves of the drill.
const MOVES: u64 = 50;

#[test]
fn a_writer_moves_back_and_forth_and_finds_what_it_wrote() {
    let scratch = Scratch::new();
    let (site, other) = pair(&scratch);
    let sites = [&site, &other];
    let mut servers: [Option<Server<'_>>; 2] = [Some(site.serve(&[])), Some(other.spawn(&[]))];
    wait("the second server is there", || other.output(&["status"]).status.success().then_some(()));
    let hammer = Hammer::new(&scratch);
    let mut random = Random(70);
    for round in 0..MOVES {
        let (from, to) = ((round % 2) as usize, ((round + 1) % 2) as usize);
        let how = match random.next() % 8 {
            0 => Move::Kill,
            1 => Move::TakeOver,
            _ => Move::Detach,
        };
        let owner = servers[from].as_ref().expect("it runs");
        let uri = owner.uri("disk0");
        hammer.check(&uri);
        let mut running = hammer.start(&uri, round);
        running.wait_for_hundreds(1 + random.next() as usize % 8);
        match how {
            Move::Detach => {
                sites[from].run(&["volume", "detach", "disk0"]);
                running.end();
                sites[to].run(&["volume", "attach", "disk0"]);
            }
            Move::Kill | Move::TakeOver => {
                running.mark();
                owner.push("disk0");
                running.wait_for_hundreds(1);
                if how == Move::Kill {
                    servers[from].take().expect("it runs").kill();
                }
                sites[to].run(&["volume", "attach", "disk0", "--takeover"]);
                running.end();
                // Whatever it holds is older than the image.
                if how == Move::Kill {
                    servers[from] = Some(sites[from].spawn(&[]));
                }
                wait("the former owner knows", || {
                    let asked = sites[from].output(&["status"]).status.success();
                    let known = || matches!(&state(sites[from])[..], "fenced" | "refused");
                    (asked && known()).then_some(())
                });
                give_up(&scratch, sites[from], round);
            }
        }
    }
    for server in servers.into_iter().flatten() {
        if server.exports("disk0") {
            hammer.check(&server.uri("disk0"));
        }
        server.stop();
    }
    site.run_on_store(&["check", "--deep"]);
}

/// Saves what a former owner could not push, and gives it up.
fn give_up(scratch: &Scratch, site: &Site, round: u64) {
    if stranded(site) > 0 {
        let saved = scratch.text(&format!("saved{round}"));
        site.run(&["volume", "salvage", "disk0", &saved]);
        fs::remove_file(&saved).expect("an image");
    }
    site.run(&["volume", "forget", "disk0", "--force"]);
}
