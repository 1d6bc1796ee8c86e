//! Deltas: what changed between two snapshots, as a file.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use heeler_core::ids::BLOCK_BYTES;
use heeler_core::wire::delta::{
    DATA_BLOCKS_MAX, HEADER_BYTES, Header, MAGIC, Point, RECORD_BYTES, Record,
};
use heeler_core::wire::names::Uuid;
use heeler_store::snapshots::SnapshotName;
use heeler_store::volumes::CRC32C;

use super::export::{check_file, only_raw};
use super::nbd::Client;
use super::place::Place;
use super::{Site, beside};
use crate::api::{Changes, Order, Request};
use crate::cli::ExportArgs;
use crate::client::{Bar, Server};
use crate::commands::run;
use crate::settings::Common;
use crate::size::Size;

/// Reads under way at the same time at most.
const READS_MAX: usize = 8;

/// Everything that differs between two images of a volume.
pub(super) fn changes(
    server: &mut Server,
    volume: &str,
    from: &str,
    to: Option<&str>,
) -> Result<Changes, String> {
    let mut ask = |page| {
        let (from, to) = (from.into(), to.map(String::from));
        let order = Order::Changes { from, to, page };
        server.ask::<Changes>(&Request::VolumeManage { name: volume.into(), order })
    };
    let mut all = ask(0)?;
    while let Some(page) = all.next {
        let more = ask(page)?;
        all.changes.extend(more.changes);
        all.next = more.next;
    }
    Ok(all)
}

/// Writes what changed from a snapshot to a later one.
pub(super) fn export(
    common: Common<'_>,
    args: &ExportArgs,
    from: &SnapshotName,
) -> Result<(), String> {
    let to: SnapshotName = args.name.parse().map_err(|e| {
        format!("{e}; what changed since {from} is exported up to a snapshot, so make one")
    })?;
    if to.volume != from.volume {
        return Err(format!("'{from}' and '{to}' are of different volumes"));
    }
    only_raw(args)?;
    run(async {
        let mut site = Site::find(common)?;
        let begin = Instant::now();
        let changed = changes(&mut site.server, &to.volume, &from.snapshot, Some(&to.snapshot))?;
        let point = |number, name: &str| Point { number, name: name.into() };
        let header = Header {
            volume: Uuid::parse(&changed.uuid).ok_or("the server's answer makes no sense")?,
            blocks: changed.to_blocks,
            base: point(changed.from, &from.snapshot),
            to: point(changed.to, &to.snapshot),
        };
        if header.base.number == header.to.number {
            return Err(format!("'{from}' and '{to}' are the same snapshot"));
        }
        let (client, served) = site.open_any(&args.name).await?;
        let written = write(args, &header, &changed, &client).await;
        site.close_any(&args.name, served)?;
        let (data, zeroes) = written?;
        eprintln!(
            "exported what changed from {from} to {to} to {} in {:.1} s: {} of data, {} of zeroes",
            args.target,
            begin.elapsed().as_secs_f64(),
            Size(data),
            Size(zeroes),
        );
        Ok(())
    })?
}

/// Writes a delta; returns its bytes of data and of zeroes.
async fn write(
    args: &ExportArgs,
    header: &Header,
    changed: &Changes,
    client: &Client,
) -> Result<(u64, u64), String> {
    match &args.target {
        Place::Stdout => {
            let mut out = io::stdout().lock();
            write_to(&mut out, "standard output", header, changed, client).await
        }
        Place::Nbd(url) => Err(format!("{url}: a delta is a file, no disk")),
        Place::File(path) => {
            let failed = |e: io::Error| format!("{}: {e}", path.display());
            let partial = beside(path, "partial");
            check_file(args, path, &partial)?;
            let file = File::create(&partial).map_err(failed)?;
            let mut out = BufWriter::new(file);
            let shown = partial.display().to_string();
            let written = write_to(&mut out, &shown, header, changed, client).await?;
            let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
            file.sync_all().map_err(failed)?;
            fs::rename(&partial, path).map_err(failed)?;
            let to = std::path::absolute(path).map_err(failed)?;
            let folder = to.parent().map_or_else(|| File::open("/"), File::open);
            folder.and_then(|folder| folder.sync_all()).map_err(failed)?;
            Ok(written)
        }
    }
}

async fn write_to(
    out: &mut dyn Write,
    shown: &str,
    header: &Header,
    changed: &Changes,
    client: &Client,
) -> Result<(u64, u64), String> {
    let failed = |e: io::Error| format!("{shown}: {e}");
    out.write_all(&header.encode(CRC32C)).map_err(failed)?;
    let bar = Bar::new("exporting");
    let total: u64 = changed.changes.iter().map(|(_, blocks, _)| blocks * BYTES).sum();
    let (mut records, mut data, mut zeroes) = (0, 0, 0);
    let pieces = changed.changes.iter().flat_map(|&change| pieces(change));
    let mut read = stream::iter(pieces)
        .map(async |(first, blocks, zero)| {
            if zero {
                return Ok((first, blocks, None));
            }
            let bytes = client.read(first * BYTES, (blocks * BYTES) as usize).await?;
            let empty = bytes.iter().all(|byte| *byte == 0);
            Ok::<_, String>((first, blocks, (!empty).then_some(bytes)))
        })
        .buffered(READS_MAX);
    while let Some(piece) = read.next().await {
        let (block, blocks, bytes) = piece?;
        let record = match &bytes {
            Some(bytes) => Record::Data { block, blocks, crc: CRC32C(0, bytes) },
            None => Record::Zeroes { block, blocks },
        };
        out.write_all(&record.encode(CRC32C)).map_err(failed)?;
        out.write_all(bytes.as_deref().unwrap_or_default()).map_err(failed)?;
        records += 1;
        *(if bytes.is_some() { &mut data } else { &mut zeroes }) += blocks * BYTES;
        bar.set(data + zeroes, total);
    }
    out.write_all(&Record::End { records }.encode(CRC32C)).map_err(failed)?;
    out.flush().map_err(failed)?;
    Ok((data, zeroes))
}

/// A change, cut into what one record can say.
fn pieces((first, blocks, zero): (u64, u64, bool)) -> impl Iterator<Item = (u64, u64, bool)> {
    let end = first + blocks;
    let mut at = first;
    std::iter::from_fn(move || {
        let step =
            if zero { end - at } else { (DATA_BLOCKS_MAX - at % DATA_BLOCKS_MAX).min(end - at) };
        at += step;
        (step > 0).then_some((at - step, step, zero))
    })
}

/// Whether a file begins as a delta does.
pub(super) fn is_delta(path: &Path) -> bool {
    let mut magic = [0; MAGIC.len()];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && magic == MAGIC
}

/// A delta that is being read.
#[derive(Debug)]
pub(super) struct Reader {
    file: BufReader<File>,
    shown: String,
    pub(super) header: Header,
    records: u64,
}

/// A change that a delta makes.
#[derive(Debug)]
pub(super) enum Piece {
    Data(u64, Bytes),
    Zeroes(u64, u64),
}

impl Reader {
    /// Opens a delta and reads its header.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let shown = path.display().to_string();
        let file = File::open(path).map_err(|e| format!("{shown}: {e}"))?;
        let mut file = BufReader::with_capacity(1 << 20, file);
        let mut bytes = [0; HEADER_BYTES];
        file.read_exact(&mut bytes).map_err(|e| cut_short(&shown, &e))?;
        let header = Header::decode(&bytes, CRC32C).map_err(|e| format!("{shown}: {e}"))?;
        Ok(Self { file, shown, header, records: 0 })
    }

    /// The next change, at a byte of the volume; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<Piece>, String> {
        let Self { file, shown, header, records } = self;
        let mut bytes = [0; RECORD_BYTES];
        file.read_exact(&mut bytes).map_err(|e| cut_short(shown, &e))?;
        let record = Record::decode(&bytes, header.blocks, CRC32C);
        let record = record.map_err(|e| format!("{shown}: record {records}: {e}"))?;
        let mut data = vec![0; record.data_bytes()];
        file.read_exact(&mut data).map_err(|e| cut_short(shown, &e))?;
        *records += 1;
        match record {
            Record::Data { block, crc, .. } if CRC32C(0, &data) == crc => {
                Ok(Some(Piece::Data(block * BYTES, data.into())))
            }
            Record::Data { block, .. } => {
                Err(format!("{shown} is damaged: the data of block {block}"))
            }
            Record::Zeroes { block, blocks } => {
                Ok(Some(Piece::Zeroes(block * BYTES, blocks * BYTES)))
            }
            Record::End { records: all } if all + 1 == *records => {
                let more = file.read(&mut [0]).map_err(|e| format!("{shown}: {e}"))?;
                if more == 0 { Ok(None) } else { Err(format!("{shown} goes on behind its end")) }
            }
            Record::End { .. } => Err(format!("{shown} is damaged: it lacks records")),
        }
    }
}

fn cut_short(shown: &str, e: &io::Error) -> String {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => format!("{shown} is cut short: export it again"),
        _ => format!("{shown}: {e}"),
    }
}

const BYTES: u64 = BLOCK_BYTES as u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_cut_where_records_end() {
        let cut = |change| pieces(change).collect::<Vec<_>>();
        assert_eq!(cut((250, 10, true)), [(250, 10, true)]);
        assert_eq!(cut((250, 10, false)), [(250, 6, false), (256, 4, false)]);
        let long = cut((0, 600, false));
        assert_eq!(long, [(0, 256, false), (256, 256, false), (512, 88, false)]);
    }
}
