//! BTR1: records of 24 bytes, little endian, and nothing else.
//!
//! | bytes | field |
//! |---|---|
//! | 0-7 | time in microseconds |
//! | 8-15 | byte offset on the volume |
//! | 16-19 | length in bytes |
//! | 20 | operation: 0 read, 1 write, 2 unknown |
//! | 21 | flags about the recording |
//! | 22-23 | volume |

use std::io::{self, Read};

use crate::records::{ReadError, Record};

const RECORD_BYTES: usize = 24;

/// Reads records.
#[derive(Debug)]
pub(crate) struct Btr<R> {
    source: R,
    /// Of the record that comes next.
    byte: u64,
}

impl<R: Read> Btr<R> {
    pub(crate) fn new(source: R) -> Self {
        Self { source, byte: 0 }
    }

    pub(crate) fn next(&mut self) -> Result<Option<Record>, ReadError> {
        let mut bytes = [0; RECORD_BYTES];
        let byte = self.byte;
        let wrong = |what| ReadError::Wrong { byte, what };
        match self.fill(&mut bytes)? {
            0 => return Ok(None),
            RECORD_BYTES => {}
            short => {
                return Err(wrong(format!("a record cut short: {short} of {RECORD_BYTES} bytes")));
            }
        }
        self.byte += RECORD_BYTES as u64;
        parse(&bytes).map(Some).map_err(wrong)
    }

    /// As many bytes as there are.
    fn fill(&mut self, bytes: &mut [u8]) -> Result<usize, ReadError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.source.read(&mut bytes[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(ReadError::Broken { byte: self.byte + filled as u64, error });
                }
            }
        }
        Ok(filled)
    }
}

fn parse(bytes: &[u8; RECORD_BYTES]) -> Result<Record, String> {
    let (mut offset, mut length, mut volume) = ([0; 8], [0; 4], [0; 2]);
    offset.copy_from_slice(&bytes[8..16]);
    length.copy_from_slice(&bytes[16..20]);
    volume.copy_from_slice(&bytes[22..24]);
    let write = match bytes[20] {
        0 | 2 => false,
        1 => true,
        other => {
            return Err(format!("operation {other}; it is 0 (read), 1 (write) or 2 (unknown)"));
        }
    };
    Record {
        volume: u16::from_le_bytes(volume).into(),
        offset: u64::from_le_bytes(offset),
        length: u32::from_le_bytes(length).into(),
        write,
    }
    .checked()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(offset: u64, length: u32, op: u8, volume: u16) -> Vec<u8> {
        let mut bytes = 77u64.to_le_bytes().to_vec();
        bytes.extend(offset.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend([op, 0]);
        bytes.extend(volume.to_le_bytes());
        bytes
    }

    fn read_all(bytes: &[u8]) -> Result<Vec<Record>, ReadError> {
        let mut btr = Btr::new(bytes);
        let mut records = Vec::new();
        while let Some(record) = btr.next()? {
            records.push(record);
        }
        Ok(records)
    }

    #[track_caller]
    fn assert_wrong(bytes: &[u8], at: u64, part: &str) {
        match read_all(bytes).expect_err("it is wrong") {
            ReadError::Wrong { byte, what } => {
                assert_eq!(byte, at, "{what}");
                assert!(what.contains(part), "{what}");
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn every_field_is_read() {
        let all = [bytes(0x1234_5678_9abc, 0x1_0203, 1, 0x405), bytes(1, 2, 2, 0)].concat();
        assert_eq!(
            read_all(&all).expect("it is right"),
            [
                Record { volume: 0x405, offset: 0x1234_5678_9abc, length: 0x1_0203, write: true },
                Record { volume: 0, offset: 1, length: 2, write: false },
            ]
        );
    }

    #[test]
    fn a_wrong_record_is_named_by_its_first_byte() {
        let good = [bytes(0, 4096, 0, 0), bytes(0, 4096, 1, 1)].concat();
        let with = |more: &[u8]| [&good, more].concat();
        assert_wrong(&with(&bytes(0, 0, 0, 0)), 48, "length 0");
        assert_wrong(&with(&bytes(0, 1, 3, 0)), 48, "operation 3");
        assert_wrong(&with(&bytes(u64::MAX, 1, 0, 0)), 48, "beyond");
        assert_wrong(&with(&[0; 23]), 48, "cut short: 23 of 24");
        assert_wrong(&[0; 1], 0, "cut short");
    }
}
