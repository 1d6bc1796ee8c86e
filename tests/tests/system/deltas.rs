//! What changed between snapshots, carried to another store; and parts of volumes, to and from
//! pipes.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::rig::{Scratch, Server, Site, assert_same, binary, run, said};

fn qemu_io(server: &Server<'_>, name: &str, commands: &[&str]) {
    let (uri, mut args) = (server.uri(name), vec!["-f", "raw"]);
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(&uri);
    run("qemu-io", &args);
}

fn refused(site: &Site, args: &[&str], why: &str) {
    let output = site.output(args);
    let text = said(&output);
    assert!(output.status.code() == Some(1) && text.contains(why), "{}: {text}", args.join(" "));
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1, "{text}");
}

/// A volume with three snapshots, the second larger and the third smaller than the one before; full
/// copies of them, and the deltas between.
fn history(site: &Site, scratch: &Scratch, server: &Server<'_>) {
    let text = |name: &str| scratch.text(name);
    let image = scratch.image("image", 96 << 20, 5);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    site.run(&["snapshot", "create", "disk0@a"]);
    let changes = ["write -P 5 3M 70k", "discard 8M 9M", "write -z 30M 5M", "write -P 6 200M 20M"];
    qemu_io(server, "disk0", &changes);
    site.run(&["volume", "resize", "disk0", "1200M"]);
    qemu_io(server, "disk0", &["write -P 7 1100M 3M"]);
    site.run(&["snapshot", "create", "disk0@b"]);
    site.run(&["volume", "resize", "disk0", "210M", "--force"]);
    qemu_io(server, "disk0", &["write -P 8 0 1M", "write -P 9 209M 1M"]);
    site.run(&["snapshot", "create", "disk0@c"]);
    qemu_io(server, "disk0", &["write -P 10 0 4M"]);
    for snapshot in ["a", "b", "c"] {
        let name = format!("disk0@{snapshot}");
        site.run(&["volume", "export", &name, &text(&format!("{snapshot}.raw"))]);
    }
    site.run(&["volume", "export", "disk0@b", &text("ab"), "--from", "disk0@a"]);
    site.run(&["volume", "export", "disk0@c", &text("bc"), "--from", "disk0@b"]);
    // Nothing is left served that was not before.
    assert!(!server.exports("disk0@a") && !server.exports("disk0@b"));
}

#[test]
fn a_full_copy_and_deltas_are_the_volume_on_another_store() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    history(&site, &scratch, &server);
    let text = |name: &str| scratch.text(name);
    // What did not change is not in it: 20 MiB and the small ones of it, not 96 MiB of image.
    let bytes = |name: &str| fs::metadata(scratch.at(name)).expect("a delta").len();
    assert!((23 << 20..25 << 20).contains(&bytes("ab")), "{}", bytes("ab"));
    assert!((2 << 20..3 << 20).contains(&bytes("bc")), "{}", bytes("bc"));
    let back = ["volume", "export", "disk0@a", &text("ca"), "--from", "disk0@c"];
    refused(&site, &back, "is the later one");
    let other = ["volume", "export", "disk0", &text("x"), "--from", "disk0@c"];
    refused(&site, &other, "is exported up to a snapshot");
    server.stop();

    let there = Site { data: scratch.at("b"), store: Vec::new(), env: Vec::new() };
    there.make_volume("disk0");
    let server = there.serve(&[]);
    there.run(&["volume", "import", &text("a.raw"), "copy"]);
    let import = |delta: &str| ["volume".to_string(), "import".into(), text(delta), "copy".into()];
    let ab = import("ab");
    let ab: Vec<&str> = ab.iter().map(String::as_str).collect();
    let bc = import("bc");
    let bc: Vec<&str> = bc.iter().map(String::as_str).collect();
    refused(&there, &ab, "has no snapshot 'a'");
    there.run(&["snapshot", "create", "copy@a"]);
    refused(&there, &bc, "has no snapshot 'b'");
    // One that is cut short, or damaged anywhere, changes nothing.
    let whole = fs::read(scratch.at("ab")).expect("the delta");
    fs::write(scratch.at("cut"), &whole[..whole.len() - 1]).expect("written");
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    fs::write(scratch.at("damaged"), &damaged).expect("written");
    refused(&there, &["volume", "import", &text("cut"), "copy"], "is cut short");
    refused(&there, &["volume", "import", &text("damaged"), "copy"], "damaged");
    qemu_io(&server, "copy", &["write -P 1 0 64k"]);
    refused(&there, &ab, "was written to since 'copy@a'");
    there.run(&[&ab[..], &["--force"]].concat());
    refused(&there, &ab, "has a snapshot 'b' already");
    there.run(&bc);
    for snapshot in ["a", "b", "c"] {
        let (name, file) = (format!("copy@{snapshot}"), text(&format!("{snapshot}2.raw")));
        there.run(&["volume", "export", &name, &file]);
        assert_same(&file, &text(&format!("{snapshot}.raw")));
    }
    there.run(&["volume", "export", "copy", &text("now.raw")]);
    assert_same(&text("now.raw"), &text("c.raw"));
    // Deltas of the copy are as good.
    there.run(&["volume", "export", "copy@c", &text("bc2"), "--from", "copy@b"]);
    assert_eq!(bytes("bc2"), bytes("bc"));
    server.stop();
    there.run_on_store(&["check", "--deep"]);
}

/// The importer or the server is killed at different moments: the volume says that it is half
/// imported, or is at one of the snapshots; the same command makes it whole.
#[test]
fn an_import_of_a_delta_that_is_killed_starts_over() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    history(&site, &scratch, &server);
    let text = |name: &str| scratch.text(name);
    site.run(&["volume", "import", &text("a.raw"), "copy"]);
    site.run(&["snapshot", "create", "copy@a"]);
    server.stop();
    let (ab, mut half) = (text("ab"), 0);
    for round in 0..8u64 {
        let server = site.serve(&[]);
        server.wait_for("copy");
        let mut import = site.start_doomed(&["volume", "import", &ab, "copy"]);
        thread::sleep(Duration::from_millis(30 + round * 15));
        if round % 2 == 0 {
            let _ = import.kill();
            let _ = import.wait();
            server.stop();
        } else {
            server.kill();
            let _ = import.wait();
        }
        let server = site.serve(&[]);
        server.wait_for("copy");
        let info = site.json(&["volume", "info", "copy"]);
        let tagged = info["tags"].as_array().is_some_and(|tags| !tags.is_empty());
        half += u32::from(tagged);
        let snapshots = site.json(&["snapshot", "list", "copy"]);
        let known = snapshots.as_array().map_or(0, Vec::len);
        if known == 1 && !tagged {
            let file = text("untouched.raw");
            site.run(&["volume", "export", "copy", &file, "--force"]);
            assert_same(&file, &text("a.raw"));
        }
        if known == 1 || tagged {
            site.run(&["volume", "import", &ab, "copy"]);
        }
        let info = site.json(&["volume", "info", "copy"]);
        assert_eq!(info["tags"], serde_json::json!([]));
        site.run(&["volume", "export", "copy@b", &text("b2.raw"), "--force"]);
        assert_same(&text("b2.raw"), &text("b.raw"));
        site.run(&["snapshot", "rollback", "copy@a"]);
        site.run(&["snapshot", "delete", "copy@b"]);
        server.stop();
    }
    eprintln!("{half} of 8 were half imported");
    site.run_on_store(&["check", "--deep"]);
}

#[test]
fn parts_of_volumes_go_through_pipes() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let server = site.serve(&[]);
    let heeler = |args: &[&str], input: &[u8]| {
        let mut command = Command::new(binary());
        command.args(args).arg("--data").arg(&site.data);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("the command starts");
        let mut stdin = process.stdin.take().expect("piped");
        // It may not want all of it.
        let _ = stdin.write_all(input);
        drop(stdin);
        process.wait_with_output().expect("it ends")
    };
    let data: Vec<u8> = (0..3_000_001u32).map(|at| (at % 251) as u8).collect();
    let written = heeler(&["volume", "write", "disk0", "--offset", "1234567"], &data);
    assert!(written.status.success(), "{}", said(&written));
    let length = data.len().to_string();
    let range = ["--offset", "1234567", "--length", &length];
    let read = heeler(&[&["volume", "read", "disk0"], &range[..]].concat(), &[]);
    assert!(read.status.success() && read.stdout == data);
    site.run(&["snapshot", "create", "disk0@a"]);
    heeler(&["volume", "write", "disk0", "--offset", "2M"], b"later");
    let read = heeler(&[&["volume", "read", "disk0@a"], &range[..]].concat(), &[]);
    assert!(read.status.success() && read.stdout == data, "a snapshot stays what it was");
    refused(&site, &["volume", "read", "disk0", "--offset", "2G"], "behind its end");
    let full = heeler(&["volume", "write", "disk0", "--offset", "1073741820"], b"too long");
    assert!(said(&full).contains("is full"), "{}", said(&full));
    site.run(&["volume", "push", "disk0"]);
    let object = site.json(&["volume", "object", "disk0", "0"]);
    let stretches = object["stretches"].as_array().expect("a list");
    let data: u64 = stretches
        .iter()
        .filter(|stretch| stretch["pack"].is_string())
        .map(|stretch| stretch["length_bytes"].as_u64().expect("a number"))
        .sum();
    assert_eq!(data, (4 << 20) - 1_234_567 / 4096 * 4096);
    refused(&site, &["volume", "object", "disk0", "256"], "they are numbered 0 to 255");
    server.stop();
}
