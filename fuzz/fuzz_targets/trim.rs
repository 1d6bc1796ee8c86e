//! Any bytes as a story of the memory half: accesses, fills, writes, pins, discards, trims, pages
//! lent, switched policies. What onodes and buffers say must always be what a naive model says.
#![no_main]

use libfuzzer_sys::fuzz_target;

// The ordinary tests tell such stories too, and those on file again.
#[path = "../../tests/tests/trim/story/mod.rs"]
mod story;

fuzz_target!(|data: &[u8]| story::run(data));
