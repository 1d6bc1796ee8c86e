//! Copying and comparing disks: many pieces at once, and what is surely done is known.

use std::collections::BTreeSet;
use std::io::Write;
use std::ops::Range;

use bytes::Bytes;
use futures_util::stream::{self, FuturesUnordered, StreamExt, TryStreamExt};

use super::disk::Disk;
use super::extents::{Extent, Extents, Piece};
use crate::client::Bar;

/// Bytes that are read and written at once.
const PIECE_BYTES: u64 = 1 << 20;
/// Pieces on their way at most.
const PIECES_MAX: usize = 16;
/// Bytes after which what is done is made durable, and noted.
const NOTE_BYTES: u64 = 64 << 20;
/// Zeroes amid data are looked for in such steps.
const BLOCK_BYTES: usize = 4096;
/// Fewer zeroes than these amid data are written as data.
const ZEROES_MIN: usize = 16 << 10;

/// A disk to copy to another.
#[derive(Debug)]
pub(crate) struct Copy<'a> {
    /// What is read.
    pub(crate) from: &'a Disk,
    /// Where `from` has data.
    pub(crate) extents: &'a Extents,
    /// What is written. It is no smaller than `from`.
    pub(crate) to: &'a Disk,
    /// All of `to` is zeroes, but for what this copy wrote before.
    pub(crate) blank: bool,
    /// Everything before this byte is there already.
    pub(crate) done_bytes: u64,
}

impl Copy<'_> {
    /// Copies. `note` is told, now and then, before which byte everything is there, durably.
    /// Returns how many bytes of data were written.
    pub(crate) async fn run(
        &self,
        bar: &Bar,
        mut note: impl FnMut(u64) -> Result<(), String>,
    ) -> Result<u64, String> {
        let size = self.from.size();
        let pieces = self.extents.pieces(self.done_bytes, size, PIECE_BYTES, !self.blank);
        let mut pieces = pieces.peekable();
        let total = self.extents.data_bytes(self.done_bytes);
        let (mut done, mut noted, mut written) = (0, 0, 0);
        let mut open = BTreeSet::new();
        let mut work = FuturesUnordered::new();
        loop {
            while work.len() < PIECES_MAX
                && let Some(piece) = pieces.next()
            {
                open.insert(piece.extent.at);
                work.push(async move { (piece, self.copy(piece).await) });
            }
            let Some((piece, result)) = work.next().await else {
                return Ok(written);
            };
            written += result?;
            open.remove(&piece.extent.at);
            done += if piece.data { piece.extent.len } else { 0 };
            bar.set(done, total);
            if done - noted >= NOTE_BYTES {
                noted = done;
                let next = pieces.peek().map_or(size, |piece| piece.extent.at);
                let all_before = open.first().copied().unwrap_or(next);
                self.to.flush().await?;
                note(all_before)?;
            }
        }
    }

    /// Copies a piece; how many bytes of data were written.
    async fn copy(&self, piece: Piece) -> Result<u64, String> {
        if !piece.data {
            return self.to.zero(piece.extent).await.map(|()| 0);
        }
        let data = self.from.read(piece.extent).await?;
        let mut written = 0;
        for (range, zeroes) in runs(&data) {
            let at = piece.extent.at + range.start as u64;
            let len = range.len() as u64;
            if !zeroes {
                self.to.write(at, data.slice(range)).await?;
                written += len;
            } else if !self.blank {
                self.to.zero(Extent { at, len }).await?;
            }
        }
        Ok(written)
    }
}

/// Writes a disk out from its first byte to its last. Returns how many bytes were data.
pub(crate) async fn stream(from: &Disk, out: &mut dyn Write, bar: &Bar) -> Result<u64, String> {
    let extents = from.extents().await?;
    let total = extents.data_bytes(0);
    let pieces = extents.pieces(0, from.size(), PIECE_BYTES, true);
    let read = async |piece: Piece| {
        let data = if piece.data { from.read(piece.extent).await? } else { Bytes::new() };
        Ok::<_, String>((piece.extent, data))
    };
    let mut all = stream::iter(pieces.map(read)).buffered(PIECES_MAX);
    let failed = |e| format!("standard output: {e}");
    let zeroes = vec![0; PIECE_BYTES as usize];
    let mut done = 0;
    while let Some((extent, data)) = all.try_next().await? {
        out.write_all(&data).map_err(failed)?;
        let mut left = extent.len as usize - data.len();
        while left > 0 {
            let some = left.min(zeroes.len());
            out.write_all(&zeroes[..some]).map_err(failed)?;
            left -= some;
        }
        done += data.len() as u64;
        bar.set(done, total);
    }
    out.flush().map_err(failed)?;
    Ok(done)
}

/// Compares two disks, of which the longer must go on with zeroes.
pub(crate) async fn compare(a: &Disk, b: &Disk, bar: &Bar) -> Result<(), String> {
    let extents = a.extents().await?.union(&b.extents().await?);
    let size = a.size().max(b.size());
    let total = extents.data_bytes(0);
    let pieces = extents.pieces(0, size, PIECE_BYTES, false);
    let both = async |piece: Piece| {
        let extent = piece.extent;
        let (a, b) = tokio::try_join!(a.read(extent), b.read(extent))?;
        Ok::<_, String>((extent, a, b))
    };
    let mut all = stream::iter(pieces.map(both)).buffered(PIECES_MAX);
    let mut done = 0;
    while let Some((extent, a, b)) = all.try_next().await? {
        if let Some(byte) = a.iter().zip(&b).position(|(a, b)| a != b) {
            return Err(format!("byte {} is not the same", extent.at + byte as u64));
        }
        done += extent.len;
        bar.set(done, total);
    }
    Ok(())
}

/// Cuts data into runs of zeroes and of others.
fn runs(data: &[u8]) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let add = |runs: &mut Vec<(Range<usize>, bool)>, range: Range<usize>, zeroes: bool| match runs
        .last_mut()
    {
        Some((last, kind)) if *kind == zeroes => last.end = range.end,
        _ => runs.push((range, zeroes)),
    };
    let mut at = 0;
    while at < data.len() {
        let blocks = data[at..].chunks(BLOCK_BYTES);
        let zeroes: usize = blocks.take_while(|block| is_zero(block)).map(<[u8]>::len).sum();
        let all = at + zeroes == data.len() && at == 0;
        let next = if zeroes == 0 { BLOCK_BYTES.min(data.len() - at) } else { zeroes };
        add(&mut runs, at..at + next, zeroes >= ZEROES_MIN || all);
        at += next;
    }
    runs
}

fn is_zero(block: &[u8]) -> bool {
    block.chunks(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use super::*;
    use crate::transfer::Format;
    use crate::transfer::image::Image;

    fn file(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("heeler-copy-{}-{name}", std::process::id()))
    }

    fn empty(path: &Path, size: u64) -> Disk {
        Disk::Image(Arc::new(Image::create(path, Format::Raw, size).unwrap()))
    }

    #[tokio::test]
    async fn what_is_noted_is_there() {
        let (from_path, to_path, again_path) = (file("from"), file("to"), file("again"));
        let size = 5 * NOTE_BYTES / 2 + 1000;
        let content: Vec<u8> = (0..size).map(|at| (at % 251 * (at >> 20 & 1)) as u8).collect();
        fs::write(&from_path, &content).unwrap();
        let from = Image::open(&from_path, Some(Format::Raw)).unwrap();
        let (from, to) = (Disk::Image(Arc::new(from)), empty(&to_path, size));
        let mut extents = Extents::default();
        extents.push(0, size);
        let copy = Copy { from: &from, extents: &extents, to: &to, blank: true, done_bytes: 0 };
        let mut notes = Vec::new();
        let same = |end: u64| {
            let end = end as usize;
            fs::read(&to_path).unwrap()[..end] == content[..end]
        };
        let note = |mark| {
            assert!(same(mark), "something before {mark} is missing");
            notes.push(mark);
            Ok(())
        };
        copy.run(&Bar::new("test"), note).await.unwrap();
        assert!(same(size));
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert!(notes[0] < notes[1], "{notes:?}");
        // From a note on, the rest is copied, and nothing else.
        let again = empty(&again_path, size);
        let done_bytes = notes[1];
        let copy = Copy { to: &again, done_bytes, ..copy };
        copy.run(&Bar::new("test"), |_| Ok(())).await.unwrap();
        let (done, rest) = (done_bytes as usize, fs::read(&again_path).unwrap());
        assert!(rest[..done].iter().all(|byte| *byte == 0));
        assert!(rest[done..] == content[done..]);
        for path in [from_path, to_path, again_path] {
            fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn long_runs_of_zeroes_are_found() {
        let mut data = vec![0; 1 << 20];
        data[100_000] = 1;
        data[110_000] = 1;
        data[500_000] = 1;
        assert_eq!(
            runs(&data),
            [
                (0..98_304, true),
                (98_304..110_592, false),
                (110_592..499_712, true),
                (499_712..503_808, false),
                (503_808..1 << 20, true),
            ]
        );
        assert_eq!(runs(&data[..100_000]), [(0..100_000, true)]);
        assert_eq!(runs(&[0; 100]), [(0..100, true)]);
        assert_eq!(runs(&[1; 5000]), [(0..5000, false)]);
        assert_eq!(runs(&[]), []);
    }

    #[test]
    fn short_runs_of_zeroes_are_data() {
        let mut data = vec![1; 64 << 10];
        data[8192..16384].fill(0);
        assert_eq!(runs(&data), [(0..64 << 10, false)]);
    }
}
