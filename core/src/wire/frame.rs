//! What all structures in the store share: a magic, a format version, a CRC32C of all that
//! follows; and a reader that cannot run past the end.
//!
//! ```text
//! 0  magic    8 bytes
//! 8  version  u32
//! 12 crc      u32, CRC32C of bytes 16 to the end
//! 16 ...
//! ```

use alloc::vec::Vec;
use core::fmt;

use crate::ids::Crc32c;

/// Bytes before the structure's own fields.
pub const FRAME_BYTES: usize = 16;

/// What is wrong with a structure of the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FormatError {
    /// It ends before the field at this byte does.
    Short {
        /// Where the field begins.
        at: usize,
    },
    /// It is something else.
    Magic,
    /// A version that this build does not know.
    Version(u32),
    /// The CRC does not match the content.
    Checksum,
    /// A field has a value that it cannot have.
    Field {
        /// Where it begins, in bytes.
        at: usize,
        /// Its name.
        what: &'static str,
    },
    /// There are bytes behind the end.
    Trailing {
        /// Where they begin.
        at: usize,
    },
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short { at } => write!(f, "cut short: no field at byte {at}"),
            Self::Magic => f.write_str("wrong magic"),
            Self::Version(version) => write!(f, "unknown format version {version}"),
            Self::Checksum => f.write_str("checksum mismatch"),
            Self::Field { at, what } => write!(f, "bad {what} at byte {at}"),
            Self::Trailing { at } => write!(f, "extra bytes from byte {at} on"),
        }
    }
}

impl core::error::Error for FormatError {}

/// Begins a structure: [`seal`] completes it.
pub(crate) fn begin(magic: [u8; 8], version: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes
}

/// Writes the CRC of a complete structure.
pub(crate) fn seal(bytes: &mut [u8], crc32c: Crc32c) {
    let crc = crc32c(0, &bytes[FRAME_BYTES..]);
    bytes[12..FRAME_BYTES].copy_from_slice(&crc.to_le_bytes());
}

/// Checks magic and version; the reader stands at byte 16.
pub(crate) fn open(bytes: &[u8], magic: [u8; 8], version: u32) -> Result<Reader<'_>, FormatError> {
    let mut reader = Reader { bytes, at: 0 };
    if reader.take::<8>()? != magic {
        return Err(FormatError::Magic);
    }
    match reader.u32()? {
        found if found == version => {}
        found => return Err(FormatError::Version(found)),
    }
    reader.at = FRAME_BYTES;
    if bytes.len() < FRAME_BYTES { Err(FormatError::Short { at: 12 }) } else { Ok(reader) }
}

/// Checks the CRC of a whole structure that [`open`] has accepted.
pub(crate) fn check(bytes: &[u8], crc32c: Crc32c) -> Result<(), FormatError> {
    let stored = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
    if crc32c(0, &bytes[FRAME_BYTES..]) == stored { Ok(()) } else { Err(FormatError::Checksum) }
}

/// Reads little-endian fields one after another.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn slice(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let rest = &self.bytes[self.at..];
        let slice = rest.get(..len).ok_or(FormatError::Short { at: self.at })?;
        self.at += len;
        Ok(slice)
    }

    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut field = [0; N];
        field.copy_from_slice(self.slice(N)?);
        Ok(field)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(u8::from_le_bytes(self.take()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, FormatError> {
        Ok(u16::from_le_bytes(self.take()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    /// That `len` more bytes are there, before anything is allocated for them.
    pub(crate) fn require(&self, len: usize) -> Result<(), FormatError> {
        if self.bytes.len() - self.at < len {
            return Err(FormatError::Short { at: self.at });
        }
        Ok(())
    }

    /// That nothing is left.
    pub(crate) fn end(&self) -> Result<(), FormatError> {
        if self.at == self.bytes.len() {
            return Ok(());
        }
        Err(FormatError::Trailing { at: self.at })
    }

    /// An error about the field that was read last: `len` bytes long.
    pub(crate) fn bad<T>(&self, len: usize, what: &'static str) -> Result<T, FormatError> {
        Err(FormatError::Field { at: self.at - len, what })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// CRC32C, byte by byte.
    pub(crate) fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!crc, |crc, &byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
    }

    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut crc = byte as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };

    /// Makes the CRC right again after a test has changed a field.
    pub(crate) fn reseal(bytes: &mut [u8]) {
        seal(bytes, crc32c);
    }

    #[test]
    fn the_crc_is_castagnoli_s() {
        assert_eq!(crc32c(0, b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(crc32c(0, b"1234"), b"56789"), 0xe306_9283);
    }

    #[test]
    fn the_frame_is_checked() {
        let mut bytes = begin(*b"ABCDEFGH", 3);
        bytes.extend_from_slice(&[1, 2, 3]);
        seal(&mut bytes, crc32c);
        assert_eq!(check(&bytes, crc32c), Ok(()));
        assert_eq!(open(&bytes, *b"ABCDEFGX", 3).err(), Some(FormatError::Magic));
        assert_eq!(open(&bytes, *b"ABCDEFGH", 4).err(), Some(FormatError::Version(3)));
        assert_eq!(open(&bytes[..13], *b"ABCDEFGH", 3).err(), Some(FormatError::Short { at: 12 }));
        let mut reader = open(&bytes, *b"ABCDEFGH", 3).unwrap();
        assert_eq!(reader.u16(), Ok(0x201));
        assert_eq!(reader.end(), Err(FormatError::Trailing { at: 18 }));
        assert_eq!(reader.u16(), Err(FormatError::Short { at: 18 }));
        assert_eq!(reader.u8(), Ok(3));
        assert_eq!(reader.end(), Ok(()));
        bytes[18] ^= 1;
        assert_eq!(check(&bytes, crc32c), Err(FormatError::Checksum));
    }
}
