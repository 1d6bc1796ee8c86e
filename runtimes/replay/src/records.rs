//! Recordings of what was read and written, request by request.

use std::fmt;
use std::io::{self, BufReader, Read};

use crate::btr::Btr;
use crate::csv::Csv;

/// One past the last byte of a volume that the cache can address: 2^32 objects of 4 MiB.
const VOLUME_BYTES_MAX: u64 = 1 << 54;
/// Of one request: no recording has longer ones but by mistake.
const REQUEST_BYTES_MAX: u64 = u32::MAX as u64;

/// One request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// The volume, a number of the recording. Each has an address space of its own.
    pub volume: u32,
    /// The first byte.
    pub offset: u64,
    /// Bytes, at least one and less than 4 GiB. `offset + length` is at most 2^54 (16 PiB).
    pub length: u64,
    /// It was a write. What is not known to be one counts as a read.
    pub write: bool,
}

impl Record {
    /// Refuses what no disk can be asked, in words.
    pub(crate) fn checked(self) -> Result<Self, String> {
        if self.length == 0 {
            return Err("a request of length 0".into());
        }
        if self.length > REQUEST_BYTES_MAX {
            return Err(format!("a request of {} bytes; 4 GiB are too many", self.length));
        }
        match self.offset.checked_add(self.length) {
            Some(end) if end <= VOLUME_BYTES_MAX => Ok(self),
            _ => Err(format!(
                "a request of {} bytes at {}, beyond the 16 PiB of a volume",
                self.length, self.offset
            )),
        }
    }
}

/// Why a recording cannot be read.
#[derive(Debug)]
pub enum ReadError {
    /// Its name does not say what it is.
    Name,
    /// The text or the records are wrong from this byte on (of the uncompressed recording).
    Wrong {
        /// Where the record that is wrong begins.
        byte: u64,
        /// What is wrong.
        what: String,
    },
    /// It cannot be read or decompressed any further than this byte (of the uncompressed one).
    Broken {
        /// How much could be read.
        byte: u64,
        /// Why not more.
        error: io::Error,
    },
    /// It holds no requests.
    Empty,
    /// It is longer than can be replayed.
    Long,
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name => f.write_str(
                "not a trace: its name must end in .btr or .csv, or in .btr.zst or .csv.zst if it \
                 is compressed",
            ),
            Self::Wrong { byte, what } => write!(f, "byte {byte}: {what}"),
            Self::Broken { byte, error } => write!(f, "byte {byte}: cannot be read on: {error}"),
            Self::Empty => f.write_str("a trace without requests"),
            Self::Long => f.write_str(
                "longer than can be replayed (2^32 touches of blocks, 1 TiB of different ones); \
                 replay a part of it",
            ),
        }
    }
}

impl std::error::Error for ReadError {}

/// The requests of a recording, in its order, until the first error. Memory does not grow with its
/// length.
#[derive(Debug)]
pub struct Records<R: Read>(Format<R>);

#[derive(Debug)]
enum Format<R: Read> {
    Btr(Btr<Plain<R>>),
    Csv(Box<Csv<Plain<R>>>),
}

impl<R: Read> Records<R> {
    /// The recording called `name`, whose bytes are `source`. The name says what it is: `.btr` or
    /// `.csv`, and `.zst` after it for a zstd stream of that.
    ///
    /// # Errors
    ///
    /// [`ReadError::Name`]; [`ReadError::Wrong`] for a CSV without the columns it needs; and what
    /// the source says.
    pub fn new(name: &str, source: R) -> Result<Self, ReadError> {
        let (plain_name, compressed) = match name.strip_suffix(".zst") {
            Some(plain_name) => (plain_name, true),
            None => (name, false),
        };
        let plain = || Plain::new(source, compressed);
        if plain_name.ends_with(".btr") {
            Ok(Self(Format::Btr(Btr::new(plain()?))))
        } else if plain_name.ends_with(".csv") {
            Ok(Self(Format::Csv(Box::new(Csv::new(plain()?)?))))
        } else {
            Err(ReadError::Name)
        }
    }
}

impl<R: Read> Iterator for Records<R> {
    type Item = Result<Record, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.0 {
            Format::Btr(btr) => btr.next().transpose(),
            Format::Csv(csv) => csv.next().transpose(),
        }
    }
}

/// The uncompressed bytes of a recording.
#[allow(missing_debug_implementations, reason = "the decoder has none")]
pub(crate) enum Plain<R: Read> {
    Raw(BufReader<R>),
    Zstd(BufReader<zstd::Decoder<'static, BufReader<R>>>),
}

impl<R: Read> fmt::Debug for Plain<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw(_) => "Raw",
            Self::Zstd(_) => "Zstd",
        })
    }
}

impl<R: Read> Plain<R> {
    fn new(source: R, compressed: bool) -> Result<Self, ReadError> {
        if !compressed {
            return Ok(Self::Raw(BufReader::new(source)));
        }
        let decoder =
            zstd::Decoder::new(source).map_err(|error| ReadError::Broken { byte: 0, error })?;
        Ok(Self::Zstd(BufReader::new(decoder)))
    }
}

impl<R: Read> Read for Plain<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Raw(source) => source.read(buffer),
            Self::Zstd(source) => source.read(buffer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(offset: u64, length: u64) -> Record {
        Record { volume: 0, offset, length, write: false }
    }

    #[test]
    fn requests_that_no_disk_can_be_asked_are_refused() {
        for (offset, length) in [(0, 1), ((1 << 54) - 1, 1), (0, (1 << 32) - 1)] {
            record(offset, length).checked().expect("inside");
        }
        for (offset, length) in [(0, 0), (1 << 54, 1), (u64::MAX, 1), (0, 1 << 32)] {
            record(offset, length).checked().expect_err("outside");
        }
    }

    #[test]
    fn the_name_says_what_it_is() {
        for name in ["a.btr", "b.csv", "c.d/e.btr.zst", "f.csv.zst"] {
            let text = "offset,length,op\n";
            let zstd = name.ends_with(".zst").then(|| zstd::encode_all(text.as_bytes(), 0));
            let bytes = zstd.map_or(text.into(), |bytes| bytes.expect("memory"));
            Records::new(name, &*bytes).expect(name);
        }
        for name in ["", "a", "a.zst", "a.btr.gz", "btr"] {
            let error = Records::new(name, io::empty()).expect_err(name);
            assert!(matches!(error, ReadError::Name), "{name}: {error}");
        }
    }

    /// 1000 records, compressed in blocks of their own, so that much comes out before the end.
    fn compressed() -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 3).expect("memory");
        for number in 0..1000u64 {
            let mut record = [0; 24];
            record[8..16].copy_from_slice(&(number << 12).to_le_bytes());
            record[16] = 1;
            io::Write::write_all(&mut encoder, &record).expect("memory");
            io::Write::flush(&mut encoder).expect("memory");
        }
        encoder.finish().expect("memory")
    }

    /// The records that are read, and the error at the end.
    fn read_all(bytes: &[u8]) -> (usize, Option<ReadError>) {
        let mut read = 0;
        for record in Records::new("a.btr.zst", bytes).expect("a stream") {
            match record {
                Ok(record) => {
                    assert_eq!((record.offset, record.length), (read << 12, 1));
                    read += 1;
                }
                Err(e) => return (read as usize, Some(e)),
            }
        }
        (read as usize, None)
    }

    #[test]
    fn a_broken_stream_is_read_up_to_where_it_breaks() {
        let whole = compressed();
        assert!(matches!(read_all(&whole), (1000, None)));
        for length in [1, 3, whole.len() / 2, whole.len() - 1] {
            let (read, error) = read_all(&whole[..length]);
            let Some(ReadError::Broken { byte, .. }) = error else { panic!("{length}: {error:?}") };
            assert_eq!(byte / 24, read as u64, "cut at {length}");
        }
        let mut damaged = whole.clone();
        let middle = damaged.len() / 2;
        damaged[middle..middle + 64].fill(0xff);
        assert!(matches!(read_all(&damaged), (1..1000, Some(ReadError::Broken { .. }))));
        let more = [&*whole, b"more"].concat();
        assert!(matches!(read_all(&more), (1000, Some(ReadError::Broken { byte: 24_000, .. }))));
    }

    #[test]
    fn damage_is_an_error_and_nothing_worse() {
        let csv = b"offset,length,op,volume\n4096,512,r,a\n0,1,write,\"b\"\n".repeat(3);
        for (name, whole) in [("a.btr.zst", compressed()), ("a.csv", csv)] {
            for at in 0..whole.len().min(2000) {
                let mut damaged = whole.clone();
                damaged[at] ^= 1 << (at % 8);
                let Ok(records) = Records::new(name, &*damaged) else { continue };
                let read = records.take_while(Result::is_ok).count();
                assert!(read <= 1000, "{name}, byte {at}: {read} records");
            }
        }
    }
}
