//! Recorded requests with their times (BTR1: see README.md on `heeler replay`).

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use heeler_core::time::Instant;

/// A request of one virtual disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recorded {
    pub(crate) at: Instant,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) write: bool,
}

/// Where a disk ends is where the next one begins.
const ALIGN: u64 = 4 << 20;

/// All requests of a recording. Several volumes of it lie one behind the other on one disk.
pub(crate) fn read(path: &Path) -> Vec<Recorded> {
    let file = std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut bytes = Vec::new();
    zstd::Decoder::new(file).unwrap().read_to_end(&mut bytes).expect("a whole zstd stream");
    let word = |record: &[u8], at: usize| u64::from_le_bytes(record[at..at + 8].try_into().unwrap());
    let records: Vec<_> = bytes
        .chunks_exact(24)
        .map(|record| {
            let recorded = Recorded {
                at: Instant(word(record, 0) * 1000),
                offset: word(record, 8),
                len: word(record, 16) & 0xffff_ffff,
                write: record[20] == 1,
            };
            (u16::from_le_bytes([record[22], record[23]]), recorded)
        })
        .collect();
    let mut sizes: BTreeMap<u16, u64> = BTreeMap::new();
    for (volume, record) in &records {
        let size = sizes.entry(*volume).or_default();
        *size = (*size).max((record.offset + record.len).next_multiple_of(ALIGN));
    }
    let mut begin = 0;
    let mut begins: BTreeMap<u16, u64> = BTreeMap::new();
    for (volume, size) in sizes {
        begins.insert(volume, begin);
        begin += size;
    }
    let moved = |(volume, record): (u16, Recorded)| Recorded {
        offset: record.offset + begins[&volume],
        ..record
    };
    records.into_iter().map(moved).collect()
}
