//! `heeler volume read` and `heeler volume write`: a part of a volume, from and to pipes.

use std::io::{self, Read, Write};

use super::Site;
use super::nbd::Client;
use crate::cli::RangeArgs;
use crate::commands::run;
use crate::settings::Common;

/// Bytes of a request.
const PIECE_BYTES: u64 = 1 << 20;

/// Where a range ends, if it is inside the disk.
fn end(args: &RangeArgs, client: &Client) -> Result<u64, String> {
    let (from, size) = (args.offset.0, client.size());
    let end = args.length.map_or(Some(size), |length| from.checked_add(length.0));
    end.filter(|end| from <= *end && *end <= size)
        .ok_or_else(|| format!("'{}' has {size} bytes: that is behind its end", args.name))
}

/// Copies a part of a volume or of a snapshot to standard output.
pub(crate) fn read(common: Common<'_>, args: &RangeArgs) -> Result<(), String> {
    run(async {
        let mut site = Site::find(common)?;
        let (client, served) = site.open_any(&args.name).await?;
        let copied = async {
            let (mut at, end) = (args.offset.0, end(args, &client)?);
            let mut out = io::stdout().lock();
            while at < end {
                let len = (end - at).min(PIECE_BYTES);
                let bytes = client.read(at, len as usize).await?;
                out.write_all(&bytes).map_err(|e| format!("standard output: {e}"))?;
                at += len;
            }
            out.flush().map_err(|e| format!("standard output: {e}"))
        };
        let copied = copied.await;
        site.close_any(&args.name, served).and(copied)
    })?
}

/// Writes standard input into a volume; it is durable when this ends.
pub(crate) fn write(common: Common<'_>, args: &RangeArgs) -> Result<(), String> {
    run(async {
        let site = Site::find(common)?;
        let client = site.open(&args.name).await?;
        if client.is_read_only() {
            return Err(format!("'{}' is read-only", args.name));
        }
        let (mut at, end) = (args.offset.0, end(args, &client)?);
        let mut input = io::stdin().lock();
        while at < end {
            let mut piece = Vec::new();
            let mut limited = (&mut input).take((end - at).min(PIECE_BYTES));
            limited.read_to_end(&mut piece).map_err(|e| format!("standard input: {e}"))?;
            if piece.is_empty() {
                break;
            }
            let len = piece.len() as u64;
            client.write(at, piece.into()).await?;
            at += len;
        }
        client.flush().await?;
        let more = args.length.is_none() && at == end;
        if more && input.read(&mut [0]).map_err(|e| format!("standard input: {e}"))? > 0 {
            return Err(format!("'{}' is full: there is more on standard input", args.name));
        }
        eprintln!("wrote {} bytes at {}", at - args.offset.0, args.offset.0);
        Ok(())
    })?
}
