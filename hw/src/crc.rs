//! CRC32C with the processor's instructions.

/// CRC32C (Castagnoli) of `bytes`, continuing from `crc` (0 to start). A
/// [`Crc32c`](heeler_core::ids::Crc32c).
#[must_use]
pub fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        let as_core_sees_it: heeler_core::ids::Crc32c = crc32c;
        // RFC 3720 B.4.
        assert_eq!(as_core_sees_it(0, &[0; 32]), 0x8a91_36aa);
        assert_eq!(as_core_sees_it(0, &[0xff; 32]), 0x62a8_ab43);
        assert_eq!(as_core_sees_it(0, b"123456789"), 0xe306_9283);
    }

    #[test]
    fn continues_where_it_stopped() {
        assert_eq!(crc32c(crc32c(0, b"1234"), b"56789"), crc32c(0, b"123456789"));
    }
}
