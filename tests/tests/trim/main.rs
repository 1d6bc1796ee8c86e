//! Trims: stories of what a shard does with onodes and buffers, compared with a naive model at each
//! step. The fuzz target `trim` looks for bad ones by coverage; here they are random, and those on
//! file (`fuzz/regressions/trim`) are told again.
#![cfg(not(loom))]

mod story;

use heeler_hw::sim::Rng;

/// Names the story when it ends badly.
struct Name(String);

impl Drop for Name {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed: {}", self.0);
        }
    }
}

#[test]
fn random_stories_end_well() {
    for seed in 0..800 {
        let _name = Name(format!("seed {seed}"));
        let mut rng = Rng::new(seed);
        let mut bytes = vec![0; 40 + rng.index(4_000)];
        rng.fill(&mut bytes);
        story::run(&bytes);
    }
}

#[test]
fn regressions_stay_fixed() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/regressions/trim");
    let mut told = 0;
    for entry in std::fs::read_dir(folder).expect("the folder of regressions") {
        let path = entry.expect("a readable entry").path();
        let _name = Name(path.display().to_string());
        story::run(&std::fs::read(&path).expect("a readable file"));
        told += 1;
    }
    assert!(told > 0, "{folder} is empty");
}
