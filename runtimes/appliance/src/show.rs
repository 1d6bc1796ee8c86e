//! Answers as people read them.

use std::fmt::Write as _;

use crate::api::{CacheInfo, Status, VolumeInfo, VolumeLine};
use crate::size::Size;

/// A list of volumes.
pub(crate) fn volumes(lines: &[VolumeLine]) -> String {
    if lines.is_empty() {
        return "no volumes; make one with `heeler volume create NAME --size SIZE`\n".into();
    }
    let mut rows = vec![["NAME", "SIZE", "STATE", "DIRTY", "OWNER"].map(String::from)];
    for line in lines {
        rows.push([
            line.name.clone(),
            Size(line.size_bytes).to_string(),
            line.state.clone(),
            line.dirty_bytes.map_or_else(|| "-".into(), |bytes| Size(bytes).to_string()),
            line.owner.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    let mut text = table(&rows);
    for line in lines {
        if let Some(reason) = &line.reason {
            text += &format!("{}: {reason}\n", line.name);
        }
    }
    text
}

/// Everything about a volume.
pub(crate) fn volume(info: &VolumeInfo) -> String {
    let line = &info.line;
    let mut rows = vec![
        ("name", line.name.clone()),
        ("uuid", line.uuid.clone()),
        ("size", Size(line.size_bytes).to_string()),
        ("objects of", Size(line.object_bytes).to_string()),
        ("state", line.state.clone()),
    ];
    let mut row = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    row("reason", line.reason.clone());
    row("owner", line.owner.clone());
    row("head", Some(line.head.to_string()));
    row("epoch", Some(format!("{:#x}", line.epoch)));
    row("dirty", line.dirty_bytes.map(|bytes| Size(bytes).to_string()));
    row(
        "in the store",
        Some(format!(
            "{} in {} objects ({} in {} packs)",
            Size(info.stored_bytes),
            info.objects,
            Size(info.pack_bytes),
            info.packs
        )),
    );
    if let Some(push) = &info.push {
        row("push", Some(push.phase.clone()));
        row("backlog", Some(Size(push.backlog_bytes).to_string()));
        row("dirty since", (push.dirty_seconds > 0).then(|| format!("{} s", push.dirty_seconds)));
        row("pushed", Some(format!("{} ({} put)", Size(push.pushed_bytes), Size(push.put_bytes))));
        row("retrying", (push.retrying > 0).then(|| push.retrying.to_string()));
        row("last failure", push.last_failure.clone());
    }
    fields(&rows)
}

/// How full the cache is.
pub(crate) fn cache(info: &CacheInfo) -> String {
    let of = |used, all| format!("{} of {} ({}%)", Size(used), Size(all), percent(used, all));
    let mut rows = vec![
        ("cache", format!("{}, {}, {} shards", info.path, Size(info.device_bytes), info.shards)),
        ("nvme", of(info.nvme_bytes, info.nvme_capacity_bytes)),
        ("ram", of(info.ram_bytes, info.ram_capacity_bytes)),
        ("dirty", Size(info.dirty_bytes).to_string()),
        (
            "reads",
            format!(
                "{} ({}% from RAM, {}% from NVMe), fetched {}",
                Size(info.read_bytes),
                percent(info.read_ram_bytes, info.read_bytes),
                percent(info.read_nvme_bytes, info.read_bytes),
                Size(info.fetched_bytes)
            ),
        ),
        ("writes", format!("{}, pushed {}", Size(info.written_bytes), Size(info.pushed_bytes))),
        (
            "reclaim",
            format!("moved {}, dropped {}", Size(info.moved_bytes), Size(info.dropped_bytes)),
        ),
        ("flushes", info.device_flushes.to_string()),
    ];
    if info.stranded_bytes > 0 {
        let text = format!("{} of volumes that are not served", Size(info.stranded_bytes));
        rows.push(("stranded", text));
    }
    if info.device_errors + info.damaged_blocks + info.lost_blocks > 0 {
        rows.push((
            "errors",
            format!(
                "{} of the device, {} damaged blocks, {} of them lost",
                info.device_errors, info.damaged_blocks, info.lost_blocks
            ),
        ));
    }
    fields(&rows)
}

/// Everything at a glance.
pub(crate) fn status(status: &Status) -> String {
    let store = &status.store;
    let mut rows = vec![
        (
            "heeler",
            format!(
                "{}, process {}, up {} s{}",
                status.version,
                status.pid,
                status.uptime_seconds,
                if status.draining { ", draining" } else { "" }
            ),
        ),
        ("listen", status.listen.join(", ")),
        (
            "store",
            format!(
                "{}: {} gets ({}), {} puts ({}), {} retries, {} failures",
                store.url,
                store.gets,
                Size(store.get_bytes),
                store.puts,
                Size(store.put_bytes),
                store.retries,
                store.failures
            ),
        ),
    ];
    for core in &status.cores {
        rows.push((
            "core",
            format!(
                "processor {}: shards {:?}, {} connections, {} requests, {} mails",
                core.cpu, core.shards, core.connections, core.requests, core.mails
            ),
        ));
    }
    format!("{}{}\n{}", fields(&rows), cache(&status.cache), volumes(&status.volumes))
}

fn percent(part: u64, all: u64) -> u64 {
    (u128::from(part) * 100).checked_div(u128::from(all)).unwrap_or(0) as u64
}

fn fields(rows: &[(&str, String)]) -> String {
    let mut text = String::new();
    for (name, value) in rows {
        writeln!(text, "{name:<13} {value}").expect("text grows");
    }
    text
}

/// Rows of as many cells each, in columns.
pub(crate) fn table(rows: &[impl AsRef<[String]>]) -> String {
    let columns = rows.first().map_or(0, |row| row.as_ref().len());
    let width = |column: usize| rows.iter().map(|row| row.as_ref()[column].len()).max();
    let widths: Vec<usize> = (0..columns).filter_map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<_> = row
            .as_ref()
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_line_up() {
        let line = |name: &str, dirty| VolumeLine {
            name: name.into(),
            size_bytes: 16 << 30,
            state: "served".into(),
            dirty_bytes: dirty,
            ..VolumeLine::default()
        };
        let reason = Some("lost".into());
        let lines = [line("disk0", Some(4096)), VolumeLine { reason, ..line("a", None) }];
        assert_eq!(
            volumes(&lines),
            "NAME   SIZE    STATE   DIRTY  OWNER\n\
             disk0  16 GiB  served  4 KiB  -\n\
             a      16 GiB  served  -      -\n\
             a: lost\n"
        );
        assert!(volumes(&[]).contains("heeler volume create"));
    }

    #[test]
    fn nothing_of_nothing_is_no_percent() {
        assert_eq!((percent(0, 0), percent(1, 4), percent(u64::MAX, u64::MAX)), (0, 25, 100));
    }
}
