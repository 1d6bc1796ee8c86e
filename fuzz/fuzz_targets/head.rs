//! Any bytes as a head: an error or a head, never a panic; and a head encodes to the same bytes.
#![no_main]

use heeler_core::wire::head::Head;
use heeler_core::wire::names::Uuid;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // Without a checksum to guess, the fuzzer reaches the fields.
    let mut bytes = data.to_vec();
    if let Some(crc) = bytes.get_mut(12..16) {
        crc.fill(0);
    }
    let volume = bytes.get(16..32).map_or(Uuid::default(), |id| Uuid(id.try_into().unwrap()));
    let number = bytes.get(32..36).map_or(1, |at| u32::from_le_bytes(at.try_into().unwrap()));
    if let Ok(head) = Head::decode(&bytes, volume, number, |_, _| 0) {
        assert!(head.pages.keys().all(|&page| page < head.page_count()));
        assert_eq!(head.encode(|_, _| 0), bytes);
    }
});
