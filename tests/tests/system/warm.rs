//! What was hot before a restart is hot after it. Requests are counted, not seconds; the load goes
//! on while what was hot is brought back, and what that costs is in the ratios.

use serde_json::Value;

use crate::rig::{Scratch, Server, Site, python, run, wait};

/// What is read and written: more than the memory, less than the cache.
const BYTES: u64 = 56 << 20;
const CACHE: &str = "512M";
/// Requests that a ratio is taken of: at ten thousand a second eight seconds.
const REQUESTS: u64 = 80_000;
/// The most of a hundred blocks that may be lost.
const POINTS: f64 = 2.0;
/// Ratios that differ by less are of a load that has settled.
const SETTLED: f64 = 0.5;

/// A load that goes on over restarts.
struct Load {
    kind: &'static str,
    requests: u64,
}

impl Load {
    /// Of a hundred blocks of the next requests, how many were in RAM, and how many there or on
    /// NVMe.
    fn ratios(&mut self, server: &Server<'_>) -> [f64; 2] {
        let before = needed(server.site());
        let numbers = [BYTES, self.requests, REQUESTS].map(|number| number.to_string());
        let [bytes, number, count] = numbers.each_ref().map(String::as_str);
        python("load.py", &[&server.uri("disk0"), self.kind, bytes, number, count]);
        self.requests += REQUESTS;
        let after = needed(server.site());
        let [ram, nvme, store] = [0, 1, 2].map(|at| after[at] - before[at]);
        let all = ram + nvme + store;
        [ram * 100.0 / all, (ram + nvme) * 100.0 / all]
    }

    /// The ratios when they no longer change by themselves, as they do while the policy learns and
    /// memory moves to where it is needed.
    fn settled(&mut self, server: &Server<'_>) -> [f64; 2] {
        let mut last = self.ratios(server);
        for _ in 0..20 {
            let next = self.ratios(server);
            if last.iter().zip(next).all(|(last, next)| (last - next).abs() < SETTLED) {
                return next;
            }
            last = next;
        }
        panic!("{} does not settle: {last:?}", self.kind);
    }
}

fn since_start(info: &Value) -> &Value {
    &info["windows"]["since_start"]
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Bytes needed by clients since the start: from RAM, from NVMe, from the store.
fn needed(site: &Site) -> [f64; 3] {
    let info = site.json(&["cache", "info"]);
    ["buffer_hit_bytes", "nvme_bytes", "store_bytes"].map(|name| number(&since_start(&info)[name]))
}

/// Records of heat written by each shard that has something in RAM.
fn records(site: &Site) -> Vec<f64> {
    let info = site.json(&["cache", "info"]);
    let shards = info["by_shard"].as_array().expect("shards");
    let used = shards.iter().filter(|shard| shard["memory"]["buffers"] != 0);
    used.map(|shard| number(&since_start(shard)["heat_records"])).collect()
}

/// A load before and after `kill -9`, and after an orderly end.
fn restarts(kind: &'static str, object_size: &str, memory: &str) {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    let create = ["volume", "create", "disk0", "--size", "1G", "--object-size", object_size];
    site.run_on_store(&create);
    let image = scratch.dense("image", BYTES, 8);
    let serve = || site.serve(&["--memory", memory, "--cache-size", CACHE]);
    let server = serve();
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    server.push("disk0");
    let mut load = Load { kind, requests: 0 };
    let before = load.settled(&server);
    assert!(before[0] > 30.0 && before[0] < 99.0, "{before:?}: memory plays a part");
    let so_far = records(&site);
    wait("every shard writes down what is hot", || {
        records(&site).iter().zip(&so_far).all(|(now, then)| now > then).then_some(())
    });
    let ram = number(&site.json(&["cache", "info"])["ram_bytes"]);
    server.kill();
    for clean in [false, true] {
        let server = serve();
        let after = load.ratios(&server);
        let info = site.json(&["cache", "info"]);
        let loaded = number(&since_start(&info)["warmed_bytes"]) * 100.0 / ram;
        println!("{kind} {object_size} {memory} clean: {clean}");
        println!(
            "before {before:.2?} % after {after:.2?} %, {loaded:.0} % of RAM was brought back"
        );
        for (before, after) in before.into_iter().zip(after) {
            assert!(after + POINTS >= before, "clean: {clean}: {before} %, then {after} %");
        }
        server.stop();
    }
    if kind != "mixed" {
        let server = serve();
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &image, &server.uri("disk0")]);
        server.stop();
    }
}

#[test]
fn a_loop_hits_as_before_after_a_restart() {
    restarts("loop", "64K", "128M");
}

/// Objects are large, and a few shards have most of them: what they had of the memory is theirs
/// again at once.
#[test]
fn uneven_shards_hit_as_before_after_a_restart() {
    restarts("zipf", "4M", "128M");
}

#[test]
fn more_memory_hits_as_before_after_a_restart() {
    restarts("zipf", "64K", "144M");
}

#[test]
fn reads_writes_and_streams_hit_as_before_after_a_restart() {
    restarts("mixed", "4M", "128M");
}
