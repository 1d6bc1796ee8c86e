//! The store goes away and comes back.

use crate::durability::dirty;
use crate::hammer::Hammer;
use crate::rig::{Scratch, VOLUME_BYTES, assert_begins, assert_same, run, wait};
use crate::s3::{Moto, Wire};

#[test]
fn an_image_goes_to_s3_and_back() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let site = moto.site(&scratch);
    site.make_volume("disk0");
    let image = scratch.image("image", VOLUME_BYTES, 10);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    assert_same(&image, &server.uri("disk0"));
    server.stop();
    std::fs::remove_file(site.cache()).expect("the cache file");
    let server = site.serve(&[]);
    assert_same(&image, &server.uri("disk0"));
    server.stop();
    site.run_on_store(&["check", "--deep"]);
}

#[test]
fn writes_are_absorbed_while_the_store_is_gone() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let wire = Wire::to(&moto);
    let site = moto.site_by(&wire, &scratch);
    site.make_volume("disk0");
    let (first, second) =
        (scratch.dense("first", 4 << 20, 11), scratch.dense("second", 8 << 20, 12));
    let server = site.serve(&[]);
    let uri = server.uri("disk0");
    run("nbdcopy", &[&first, &uri]);
    server.push("disk0");
    wire.cut();
    assert_begins(&uri, &first);
    run("nbdcopy", &["--flush", &second, &uri]);
    assert_begins(&uri, &second);
    assert!(dirty(&server) > 0, "nothing can have been pushed");
    wait("the volume shows that its pushes fail", || {
        let info = site.json(&["volume", "info", "disk0"]);
        info["push"]["last_failure"].is_string().then_some(())
    });
    wire.mend();
    wait("everything is pushed", || (dirty(&server) == 0).then_some(()));
    assert_begins(&uri, &second);
    server.stop();
    site.run_on_store(&["check", "--deep"]);
}

#[test]
fn dirty_data_waits_for_the_store_across_a_kill() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let wire = Wire::to(&moto);
    let site = moto.site_by(&wire, &scratch);
    site.make_volume("disk0");
    let hammer = Hammer::new(&scratch);
    let server = site.serve(&[]);
    let mut running = hammer.start(&server.uri("disk0"), 1);
    running.wait_for_hundreds(3);
    wire.cut();
    running.wait_for_hundreds(5);
    server.kill();
    running.end();
    // The store is unreachable at the start: the server waits for it, and can be asked.
    let server = site.spawn(&[]);
    wait("the server can be asked", || {
        server.assert_alive();
        site.output(&["status"]).status.success().then_some(())
    });
    assert!(!server.exports("disk0"), "who owns the volume is not known yet");
    wire.mend();
    server.wait_for("disk0");
    hammer.check(&server.uri("disk0"));
    server.push("disk0");
    server.stop();
}
