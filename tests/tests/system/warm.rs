//! What was hot before a restart is hot after it. The same requests are counted before and after:
//! chance plays no part.

use serde_json::Value;

use crate::rig::{Scratch, Server, Site, run, wait};

/// Requests of one run, and what is read by them: more than the memory, less than the cache.
const REQUESTS: &str = "20000";
const BYTES: u64 = 80 << 20;
/// The most of a hundred requests that may be lost.
const POINTS: f64 = 2.0;

/// Some blocks often and most seldom, always the same ones in the same order.
fn zipf(scratch: &Scratch, server: &Server<'_>) {
    let uri = format!("--uri={}", server.uri("disk0"));
    let (size, requests) = (format!("--size={BYTES}"), format!("--number_ios={REQUESTS}"));
    let directory = format!("--directory={}", scratch.text(""));
    let mut args =
        vec!["--name=zipf", "--ioengine=nbd", "--rw=randread", "--bs=4k", "--norandommap"];
    args.extend(["--random_distribution=zipf:0.3", "--randseed=11", "--iodepth=8", "--thread"]);
    args.extend([uri.as_str(), &size, &requests, &directory]);
    run("fio", &args);
}

/// Bytes needed by clients since the start: from RAM, from NVMe, from the store.
fn needed(site: &Site) -> [f64; 3] {
    let counts = &site.json(&["cache", "info"])["windows"]["since_start"];
    ["buffer_hit_bytes", "nvme_bytes", "store_bytes"]
        .map(|name| counts[name].as_f64().unwrap_or_else(|| panic!("no {name} in {counts}")))
}

/// Of a hundred blocks of such a run, how many were in RAM, and how many there or on NVMe.
fn measured(scratch: &Scratch, server: &Server<'_>) -> [f64; 2] {
    let before = needed(server.site());
    // Together still less than a minute, while blocks are brought back in the first second or two.
    (0..4).for_each(|_| zipf(scratch, server));
    let after = needed(server.site());
    let [ram, nvme, store] = [0, 1, 2].map(|at| after[at] - before[at]);
    let all = ram + nvme + store;
    assert!(all > 70e6, "{all} bytes were read");
    [ram * 100.0 / all, (ram + nvme) * 100.0 / all]
}

/// Records of heat that each shard has written.
fn records(site: &Site) -> Vec<u64> {
    let info = site.json(&["cache", "info"]);
    let count = |shard: &Value| shard["windows"]["since_start"]["heat_records"].as_u64();
    let shards = info["by_shard"].as_array().expect("shards");
    shards.iter().map(|shard| count(shard).expect("a count")).collect()
}

#[test]
fn the_hit_ratio_is_the_same_after_a_crash_and_an_orderly_end() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    // Small objects: every shard has about as much to do as any other.
    let small = ["volume", "create", "disk0", "--size", "1G", "--object-size", "64K"];
    site.run_on_store(&small);
    let image = scratch.dense("image", BYTES, 8);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    server.push("disk0");
    (0..2).for_each(|_| zipf(&scratch, &server));
    let so_far = records(&site);
    let before = measured(&scratch, &server);
    assert!(before[0] > 30.0 && before[0] < 99.0, "{before:?}: memory plays a part");
    wait("every shard writes down what is hot", || {
        records(&site).iter().zip(&so_far).all(|(now, then)| now > then).then_some(())
    });
    server.kill();
    for clean in [false, true] {
        let server = site.serve(&[]);
        let after = measured(&scratch, &server);
        println!("{before:?} {after:?}");
        for (before, after) in before.into_iter().zip(after) {
            assert!(after + POINTS >= before, "clean: {clean}: {before} %, then {after} %");
        }
        server.stop();
    }
    let server = site.serve(&[]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &image, &server.uri("disk0")]);
    server.stop();
}
