//! Disks that come into volumes from files and NBD servers, and go out again.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::rig::{Scratch, Server, Site, assert_same, output, run, said, wait};

const MIB: u64 = 1 << 20;

/// Another NBD server, with one export without a name.
struct Exporter {
    process: Child,
    socket: PathBuf,
}

impl Exporter {
    /// QEMU's.
    fn start(scratch: &Scratch, image: &str, format: &str, flags: &[&str]) -> Self {
        let flags = [&["-t", "-f", format], flags, &[image, "-k"]].concat();
        Self::run(scratch, "qemu-nbd", &flags, &[])
    }

    /// One that serves a raw file, with filters between.
    fn nbdkit(scratch: &Scratch, image: &str, flags: &[&str], settings: &[&str]) -> Self {
        let flags = [&["-f"], flags, &["-U"]].concat();
        Self::run(scratch, "nbdkit", &flags, &[&["file", image], settings].concat())
    }

    /// Starts a program that takes the path of its socket between other arguments.
    fn run(scratch: &Scratch, program: &str, before: &[&str], behind: &[&str]) -> Self {
        let socket = scratch.at("other.sock");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(program);
        command.args(before).arg(&socket).args(behind).stdin(Stdio::null());
        let process = command.spawn().unwrap_or_else(|e| panic!("{program}: {e}"));
        let exporter = Self { process, socket };
        wait(&format!("{program} answers"), || {
            output("nbdinfo", &["--size", &exporter.uri()]).status.success().then_some(())
        });
        exporter
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn site(scratch: &Scratch) -> Site {
    let site = Site::new(scratch);
    site.make_volume("disk0");
    site
}

/// A command that must fail, and say why.
fn refused(site: &Site, args: &[&str], why: &str) {
    let output = site.output(args);
    assert_eq!(output.status.code(), Some(1), "{}: {}", args.join(" "), said(&output));
    let text = said(&output);
    assert!(text.contains(why), "{}: {text}", args.join(" "));
}

fn size(site: &Site, volume: &str) -> u64 {
    site.json(&["volume", "info", volume])["size_bytes"].as_u64().expect("a number")
}

/// Waits until a transfer has noted that it has begun to copy.
fn wait_for_note(note: &Path) {
    wait(&format!("{} says how far it is", note.display()), || {
        let note: Value = serde_json::from_slice(&fs::read(note).ok()?).ok()?;
        (note["done_bytes"].as_u64()? > 0).then_some(())
    });
}

fn kill(mut process: Child) {
    assert!(process.try_wait().expect("its status").is_none(), "it was done before");
    process.kill().expect("it runs");
    process.wait().expect("it ends");
}

#[test]
fn raw_images_come_in_and_go_out_sparse() {
    let scratch = Scratch::new();
    let site = site(&scratch);
    let server = site.serve(&[]);
    let image = scratch.image("image", 100 * MIB, 11);
    let said = site.run(&["volume", "import", &image, "a", "--verify"]);
    assert!(said.contains("verified"), "{said}");
    assert_same(&image, &server.uri("a"));
    assert_eq!(site.json(&["volume", "info", "a"])["dirty_bytes"], 0, "an import ends with a push");
    let copy = scratch.text("copy");
    site.run(&["volume", "export", "a", &copy]);
    run("cmp", &[&image, &copy]);
    let blocks = |path: &str| fs::metadata(path).expect("a file").blocks();
    assert!(blocks(&copy) <= blocks(&image) + 2048, "holes are kept");
    assert!(!scratch.at("copy.partial").exists());
    assert!(!scratch.at("copy.partial.json").exists());
    refused(&site, &["volume", "export", "a", &copy], "is there");
    site.run(&["volume", "export", "a", &copy, "--force"]);
    let streamed = site.output(&["volume", "export", "a", "-"]);
    assert!(streamed.status.success());
    assert!(streamed.stdout == fs::read(&image).expect("the image"), "the stream is another");
    server.stop();
}

#[test]
fn sizes_are_rounded_up_to_blocks() {
    let scratch = Scratch::new();
    let site = site(&scratch);
    let server = site.serve(&[]);
    let image = scratch.dense("image", 3 * MIB + 1234, 12);
    let said = site.run(&["volume", "import", &image, "a", "--verify"]);
    assert!(said.contains("no multiple"), "{said}");
    assert_eq!(size(&site, "a"), 3 * MIB + 4096);
    site.run(&["volume", "import", &image, "b", "--size", "8M", "--object-size", "64K"]);
    assert_eq!(size(&site, "b"), 8 * MIB);
    assert_same(&image, &server.uri("b"));
    refused(&site, &["volume", "import", &image, "c", "--size", "2M"], "less than");
    let copy = scratch.text("copy");
    site.run(&["volume", "export", "a", &copy]);
    assert_eq!(fs::metadata(&copy).expect("a file").len(), 3 * MIB + 4096);
    assert_same(&image, &copy);
    server.stop();
}

#[test]
fn qcow2_images_come_in_and_go_out() {
    let scratch = Scratch::new();
    let site = site(&scratch);
    let server = site.serve(&[]);
    let raw = scratch.image("raw", 100 * MIB, 13);
    let (packed, out) = (scratch.text("packed"), scratch.text("out.qcow2"));
    run("qemu-img", &["convert", "-c", "-O", "qcow2", &raw, &packed]);
    site.run(&["volume", "import", &packed, "a", "--verify"]);
    assert_same(&raw, &server.uri("a"));
    site.run(&["volume", "export", "a", &out]);
    run("qemu-img", &["check", "-f", "qcow2", &out]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &raw, &out]);
    for options in ["compat=0.10", "preallocation=metadata", "cluster_size=4096", "extended_l2=off"]
    {
        let image = scratch.text("variant");
        run("qemu-img", &["convert", "-O", "qcow2", "-o", options, &raw, &image]);
        site.run(&["volume", "import", &image, "b", "--verify"]);
        assert_same(&raw, &server.uri("b"));
        site.run(&["volume", "delete", "b", "--force"]);
    }
    server.stop();
}

#[test]
fn nbd_servers_give_and_take_disks() {
    let scratch = Scratch::new();
    let site = site(&scratch);
    let server = site.serve(&[]);
    let (raw, qcow2) = (scratch.image("raw", 64 * MIB, 14), scratch.text("qcow2"));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &qcow2]);
    let other = Exporter::start(&scratch, &qcow2, "qcow2", &[]);
    site.run(&["volume", "import", &other.uri(), "a", "--verify"]);
    drop(other);
    assert_same(&raw, &server.uri("a"));
    // From this server to itself, over TCP.
    site.run(&["volume", "import", &server.tcp_uri("a"), "b", "--size", "80M"]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", &qcow2, "90M"]);
    let other = Exporter::start(&scratch, &qcow2, "qcow2", &[]);
    site.run(&["volume", "export", "b", &other.uri()]);
    assert_same(&raw, &other.uri());
    refused(&site, &["volume", "export", "b", &other.uri()], "has data");
    // What is there is overwritten, also by zeroes.
    let second = scratch.image("second", 64 * MIB, 15);
    site.run(&["volume", "import", &second, "b", "--force", "--verify"]);
    site.run(&["volume", "export", "b", &other.uri(), "--force"]);
    assert_same(&second, &other.uri());
    refused(&site, &["volume", "export", "disk0", &other.uri()], "too small");
    drop(other);
    let other = Exporter::start(&scratch, &qcow2, "qcow2", &["-r"]);
    refused(&site, &["volume", "export", "b", &other.uri(), "--force"], "read-only");
    server.stop();
}

#[test]
fn nbd_servers_that_can_do_little_will_do() {
    let scratch = Scratch::new();
    let site = site(&scratch);
    let server = site.serve(&[]);
    let (raw, other) = (scratch.image("raw", 24 * MIB, 23), scratch.dense("other", 32 * MIB, 24));
    // Simple replies, no map of what is allocated, no zeroes but written ones.
    let simple = ["--no-sr", "--filter=noextents", "--filter=nozero"];
    let nbdkit = Exporter::nbdkit(&scratch, &raw, &simple, &[]);
    site.run(&["volume", "import", &nbdkit.uri(), "a", "--verify"]);
    drop(nbdkit);
    assert_same(&raw, &server.uri("a"));
    let nbdkit = Exporter::nbdkit(&scratch, &other, &simple, &[]);
    refused(&site, &["volume", "export", "a", &nbdkit.uri()], "has data");
    site.run(&["volume", "export", "a", &nbdkit.uri(), "--force"]);
    drop(nbdkit);
    run("cmp", &["-n", &(24 * MIB).to_string(), &raw, &other]);
    // Structured replies, without a map.
    let nbdkit = Exporter::nbdkit(&scratch, &raw, &["--filter=noextents"], &[]);
    site.run(&["volume", "import", &nbdkit.uri(), "b", "--size", "32M", "--verify"]);
    drop(nbdkit);
    // One that fails later, by structured and simple replies.
    for flags in [&["--filter=error"][..], &["--no-sr", "--filter=error"]] {
        let nbdkit = Exporter::nbdkit(&scratch, &other, flags, &["error-pread-rate=20%"]);
        refused(&site, &["volume", "import", &nbdkit.uri(), "b", "--force"], "input/output error");
    }
    server.stop();
}

#[test]
fn an_interrupted_import_goes_on() {
    let scratch = Scratch::new();
    let site = site(&scratch);
    let server = site.serve(&[]);
    let image = scratch.dense("image", 320 * MIB, 16);
    let note = site.data.join("transfers/import-a.json");
    let import = site.start_doomed(&["volume", "import", &image, "a"]);
    wait_for_note(&note);
    kill(import);
    refused(&site, &["volume", "import", &image, "a"], "--resume");
    let other = scratch.dense("other", 320 * MIB, 17);
    refused(&site, &["volume", "import", &other, "a", "--resume"], "not of");
    let said = site.run(&["volume", "import", &image, "a", "--resume", "--verify"]);
    assert!(said.contains("done before"), "{said}");
    assert!(!note.exists(), "nothing is left to go on with");
    refused(&site, &["volume", "import", &image, "a", "--resume"], "nothing is known");
    server.stop();
}

#[test]
fn a_server_that_dies_leaves_an_import_to_go_on_with() {
    let scratch = Scratch::new();
    let site = site(&scratch);
    let server = site.serve(&[]);
    let image = scratch.dense("image", 320 * MIB, 18);
    let note = site.data.join("transfers/import-a.json");
    let mut import = site.start_doomed(&["volume", "import", &image, "a"]);
    wait_for_note(&note);
    server.kill();
    let status = wait("the import ends", || import.try_wait().expect("its status"));
    assert_eq!(status.code(), Some(1));
    let server = site.serve(&[]);
    server.wait_for("a");
    let said = site.run(&["volume", "import", &image, "a", "--resume", "--verify"]);
    assert!(said.contains("done before"), "{said}");
    server.stop();
}

#[test]
fn an_import_does_not_go_on_with_another_content() {
    let scratch = Scratch::new();
    let site = site(&scratch);
    let server = site.serve(&[]);
    let image = scratch.dense("image", 320 * MIB, 19);
    let import = site.start_doomed(&["volume", "import", &image, "a"]);
    wait_for_note(&site.data.join("transfers/import-a.json"));
    kill(import);
    let file = File::options().write(true).open(&image).expect("the image");
    file.write_all_at(b"changed", 100).expect("a change");
    refused(&site, &["volume", "import", &image, "a", "--resume"], "has changed");
    site.run(&["volume", "import", &image, "a", "--force", "--verify"]);
    server.stop();
}

#[test]
fn an_interrupted_export_goes_on() {
    let scratch = Scratch::new();
    let site = site(&scratch);
    let server = site.serve(&[]);
    let image = scratch.dense("image", 400 * MIB, 20);
    site.run(&["volume", "import", &image, "a"]);
    for name in ["out.raw", "out.qcow2"] {
        let path = scratch.text(name);
        let partial = scratch.at(&format!("{name}.partial"));
        let export = site.start_doomed(&["volume", "export", "a", &path]);
        wait_for_note(&scratch.at(&format!("{name}.partial.json")));
        kill(export);
        assert!(partial.exists() && !scratch.at(name).exists());
        refused(&site, &["volume", "export", "a", &path], "--resume");
        let done = site.output(&["volume", "export", "a", &path, "--resume"]);
        assert!(done.status.success() && said(&done).contains("done before"), "{}", said(&done));
        assert!(!partial.exists());
        if name.ends_with("qcow2") {
            // Clusters that a killed export leaves without use are no damage.
            let check = output("qemu-img", &["check", "-f", "qcow2", &path]);
            assert!(matches!(check.status.code(), Some(0 | 3)), "{}", said(&check));
        }
        run("qemu-img", &["compare", "-f", "raw", &image, &path]);
    }
    server.stop();
}

#[test]
fn an_export_does_not_go_on_when_the_volume_has_changed() {
    let scratch = Scratch::new();
    let site = site(&scratch);
    let server = site.serve(&[]);
    let image = scratch.dense("image", 320 * MIB, 21);
    site.run(&["volume", "import", &image, "a"]);
    let path = scratch.text("out");
    let export = site.start_doomed(&["volume", "export", "a", &path]);
    wait_for_note(&scratch.at("out.partial.json"));
    kill(export);
    write(&server, "a");
    refused(&site, &["volume", "export", "a", &path, "--resume"], "has changed");
    site.run(&["volume", "export", "a", &path, "--force"]);
    assert_same(&path, &server.uri("a"));
    server.stop();
}

fn write(server: &Server<'_>, volume: &str) {
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 1M 64k", &server.uri(volume)]);
}

#[test]
fn wrong_inputs_are_named_and_leave_nothing() {
    let scratch = Scratch::new();
    let site = site(&scratch);
    let server = site.serve(&[]);
    let raw = scratch.image("raw", 32 * MIB, 22);
    let import = |source: &str, why: &str| refused(&site, &["volume", "import", source, "a"], why);
    import(&scratch.text("missing"), "No such file");
    import(site.data.to_str().expect("ASCII"), "neither a file");
    File::create(scratch.at("empty")).expect("a file");
    import(&scratch.text("empty"), "empty");
    fs::write(scratch.at("no.qcow2"), b"text").expect("a file");
    import(&scratch.text("no.qcow2"), "--format raw");
    fs::write(scratch.at("torn"), b"QFI\xfb\0\0\0\x03").expect("a file");
    assert_eq!(
        site.output(&["volume", "import", &scratch.text("torn"), "a"]).status.code(),
        Some(1)
    );
    let (image, cut) = (scratch.text("image"), scratch.text("cut"));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &image]);
    fs::copy(&image, &cut).expect("a copy");
    let file = File::options().write(true).open(&cut).expect("a file");
    file.set_len(file.metadata().expect("a file").len() / 2).expect("a shorter file");
    import(&cut, "cut short");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &image, "-F", "qcow2", &cut]);
    import(&cut, "overlay");
    run("qemu-img", &["convert", "-O", "vmdk", &raw, &cut]);
    import(&cut, "VMDK");
    import("nbd+unix:///?socket=/no/such/socket", "No such file");
    import(&server.uri("other"), "no export 'other'");
    import(&format!("nbd+unix:///?socket={}", site.data.join("admin.sock").display()), "answer");
    let volumes = site.json(&["volume", "list"]);
    assert_eq!(volumes.as_array().expect("a list").len(), 1, "{volumes}");

    site.run(&["volume", "create", "small", "--size", "1M"]);
    refused(&site, &["volume", "import", &raw, "small", "--force"], "too small");
    refused(&site, &["volume", "import", &raw, "small"], "--force");
    refused(&site, &["volume", "import", &raw, "a", "--resume"], "no volume");
    refused(&site, &["volume", "export", "a", &scratch.text("out")], "no export 'a'");
    refused(&site, &["volume", "export", "small", "/no/such/folder/out"], "No such file");
    refused(&site, &["volume", "export", "small", "/dev/null"], "is no file");
    let stream = ["volume", "export", "small", "-", "--format", "qcow2"];
    refused(&site, &stream, "--format");
    assert!(!scratch.at("out").exists() && !scratch.at("out.partial").exists());
    server.stop();
}
