//! Recordings as tables: comma-separated values with a line of column names.
//!
//! Columns are found by name, in any order and case: `offset` and `length` in bytes, `op` (`r`,
//! `read`, `w`, `write`, `u` or `unknown`, in any case), and if there are several volumes, `volume`
//! (any text). Others, `timestamp` among them, are not looked at.

use std::collections::HashMap;
use std::io::{self, Read};

use ::csv::{ByteRecord, ErrorKind, Reader, ReaderBuilder, Trim};

use crate::records::{ReadError, Record};

/// Reads lines.
#[derive(Debug)]
pub(crate) struct Csv<R> {
    reader: Reader<R>,
    columns: Columns,
    /// Numbers of the volumes, in the order in which they were met.
    volumes: HashMap<Vec<u8>, u32>,
    line: ByteRecord,
}

#[derive(Clone, Copy, Debug)]
struct Columns {
    offset: usize,
    length: usize,
    op: usize,
    volume: Option<usize>,
}

impl<R: Read> Csv<R> {
    pub(crate) fn new(source: R) -> Result<Self, ReadError> {
        let mut reader = ReaderBuilder::new().trim(Trim::All).from_reader(source);
        let names = match reader.byte_headers() {
            Ok(names) => names.clone(),
            Err(e) => return Err(refused(e, &reader)),
        };
        let columns = Columns::find(&names)?;
        Ok(Self { reader, columns, volumes: HashMap::new(), line: ByteRecord::new() })
    }

    pub(crate) fn next(&mut self) -> Result<Option<Record>, ReadError> {
        match self.reader.read_byte_record(&mut self.line) {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(e) => return Err(refused(e, &self.reader)),
        }
        let byte = self.line.position().map_or(0, ::csv::Position::byte);
        self.parse().map(Some).map_err(|what| ReadError::Wrong { byte, what })
    }

    fn parse(&mut self) -> Result<Record, String> {
        let volume = match self.columns.volume {
            Some(column) => self.volume(column),
            None => 0,
        };
        Record {
            volume,
            offset: self.number("offset", self.columns.offset)?,
            length: self.number("length", self.columns.length)?,
            write: is_write(&self.line[self.columns.op])?,
        }
        .checked()
    }

    fn volume(&mut self, column: usize) -> u32 {
        let name = &self.line[column];
        if let Some(number) = self.volumes.get(name) {
            return *number;
        }
        let number = self.volumes.len() as u32;
        self.volumes.insert(name.into(), number);
        number
    }

    fn number(&self, name: &str, column: usize) -> Result<u64, String> {
        let text = String::from_utf8_lossy(&self.line[column]);
        text.parse().map_err(|_| format!("{name} '{text}' is not a number of bytes"))
    }
}

impl Columns {
    fn find(names: &ByteRecord) -> Result<Self, ReadError> {
        let find = |name: &str| {
            names.iter().position(|column| column.eq_ignore_ascii_case(name.as_bytes()))
        };
        let need = |name: &str| {
            find(name).ok_or_else(|| ReadError::Wrong {
                byte: 0,
                what: format!(
                    "no column '{name}' in the first line; offset, length and op must be"
                ),
            })
        };
        Ok(Self {
            offset: need("offset")?,
            length: need("length")?,
            op: need("op")?,
            volume: find("volume"),
        })
    }
}

fn is_write(op: &[u8]) -> Result<bool, String> {
    let is = |names: &[&str]| names.iter().any(|name| op.eq_ignore_ascii_case(name.as_bytes()));
    if is(&["r", "read", "u", "unknown"]) {
        Ok(false)
    } else if is(&["w", "write"]) {
        Ok(true)
    } else {
        let op = String::from_utf8_lossy(op);
        Err(format!("op '{op}'; it is r, read, w, write, u or unknown"))
    }
}

/// What the reader of lines found wrong.
fn refused<R: Read>(e: ::csv::Error, reader: &Reader<R>) -> ReadError {
    let byte = e.position().unwrap_or(reader.position()).byte();
    match e.into_kind() {
        ErrorKind::Io(error) => ReadError::Broken { byte, error },
        ErrorKind::UnequalLengths { expected_len, len, .. } => {
            let what = format!("{len} columns, but the first line has {expected_len}");
            ReadError::Wrong { byte, what }
        }
        other => ReadError::Broken { byte, error: io::Error::other(format!("{other:?}")) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(text: &str) -> Result<Vec<Record>, ReadError> {
        let mut csv = Csv::new(text.as_bytes())?;
        let mut records = Vec::new();
        while let Some(record) = csv.next()? {
            records.push(record);
        }
        Ok(records)
    }

    #[track_caller]
    fn assert_wrong(text: &str, at: u64, part: &str) {
        match read_all(text).expect_err("it is wrong") {
            ReadError::Wrong { byte, what } => {
                assert_eq!(byte, at, "{what}");
                assert!(what.contains(part), "{what}");
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn columns_are_found_by_name() {
        let text = "Length, OP ,timestamp,volume,offset,more\n\
                    512,w,1,sda,4096,x\n\
                    1, Read,,sdb , 7,\n\
                    2,unknown,zz,sda,0,\"a,b\"\n";
        let record = |volume, offset, length, write| Record { volume, offset, length, write };
        assert_eq!(
            read_all(text).expect("it is right"),
            [record(0, 4096, 512, true), record(1, 7, 1, false), record(0, 0, 2, false)]
        );
        let text = "offset,length,op\r\n0,1,R\r\n0,1,WRITE\r\n0,1,u\r\n";
        let writes: Vec<_> =
            read_all(text).expect("it is right").iter().map(|record| record.write).collect();
        assert_eq!(writes, [false, true, false]);
    }

    #[test]
    fn a_wrong_line_is_named_by_its_first_byte() {
        assert_wrong("", 0, "no column 'offset'");
        assert_wrong("offset,size,op\n", 0, "no column 'length'");
        assert_wrong("offset,length\n1,1\n", 0, "no column 'op'");
        let good = "offset,length,op\n0,1,r\n";
        for (line, part) in [
            ("0,0,r", "length 0"),
            ("0,x,r", "length 'x'"),
            ("-1,1,r", "offset '-1'"),
            ("0,1,trim", "op 'trim'"),
            ("18446744073709551615,1,r", "beyond"),
            ("99999999999999999999,1,r", "not a number"),
            ("0,1", "2 columns"),
        ] {
            assert_wrong(&format!("{good}{line}\n0,1,r\n"), 23, part);
        }
    }
}
