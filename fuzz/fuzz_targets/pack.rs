//! Any bytes as a pack: an error or a header, never a panic; and a header encodes to the same
//! bytes.
#![no_main]

use heeler_core::wire::pack::Header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // Without a checksum to guess, the fuzzer reaches the fields.
    let mut bytes = data.to_vec();
    if let Some(crc) = bytes.get_mut(12..16) {
        crc.fill(0);
    }
    if let Ok(header) = Header::decode(&bytes, |_, _| 0) {
        let data = header.runs.iter().filter(|run| !run.zero);
        let blocks: usize = data.map(|run| usize::from(run.count)).sum();
        assert_eq!(blocks, header.crcs.len());
        let encoded = header.encode(|_, _| 0);
        assert_eq!(encoded, bytes[..encoded.len()]);
    }
});
