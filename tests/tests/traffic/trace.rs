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

impl Recorded {
    /// The byte behind its last one.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// Where a disk ends is where the next one begins.
const ALIGN: u64 = 4 << 20;

/// All requests of a recording. Several volumes of it lie one behind the other on one disk.
pub(crate) fn read(path: &Path) -> Vec<Recorded> {
    let file = std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut bytes = Vec::new();
    zstd::Decoder::new(file).unwrap().read_to_end(&mut bytes).expect("a whole zstd stream");
    let word =
        |record: &[u8], at: usize| u64::from_le_bytes(record[at..at + 8].try_into().unwrap());
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
        *size = (*size).max(record.end().next_multiple_of(ALIGN));
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

/// A load of many kinds: streams that are not aligned, lone reads, and writes, nearly all to
/// an eighth of the disk.
pub(crate) fn mixed(requests: u64, disk_bytes: u64) -> Vec<Recorded> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let blocks = disk_bytes / 4096;
    let mut all = Vec::new();
    let mut stream = 0;
    let mut at = 0;
    while (all.len() as u64) < requests {
        at += random.below(20_000_000);
        let block = random.below(blocks - 16);
        let hot = if random.below(16) == 0 { block } else { block / 8 };
        let (offset, len, write) = match random.below(10) {
            0..4 => {
                let ends = random.below(40) == 0 || stream + (128 << 10) > disk_bytes;
                stream = if ends { block / 2 * 4096 + 512 } else { stream + (64 << 10) };
                (stream, 64 << 10, false)
            }
            4..6 => (block * 4096, 8192, false),
            6..9 => (hot * 4096, 4096 * (1 + random.below(4)), true),
            _ => (block / 8 * 4096, 64 << 10, true),
        };
        all.push(Recorded { at: Instant(at), offset, len: len.min(disk_bytes - offset), write });
    }
    all
}

/// Xorshift (Marsaglia 2003): the same numbers everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
