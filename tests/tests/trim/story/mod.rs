//! Stories of the memory half: bytes tell what happens, and a naive model says what must be true.
//! The tests tell random ones, the fuzzer looks for bad ones.

mod cache;
mod machine;
mod model;
mod op;
mod place;

/// Runs the story that `bytes` tell.
///
/// # Panics
///
/// If anything is not as the model says.
pub(crate) fn run(bytes: &[u8]) {
    let mut bytes = op::Bytes(bytes);
    match bytes.below(8) {
        0 => cache::run(&mut bytes),
        _ => machine::run(&mut bytes),
    }
}
