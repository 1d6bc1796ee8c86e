//! Answers as people read them.

use std::fmt::Write as _;

use crate::api::{
    CacheInfo, CacheReport, DirtyRange, MemoryInfo, PushInfo, ServerMemory, ShardCounts,
    ShardReport, Status, StrandedInfo, TrafficCounts, VolumeInfo, VolumeLine, VolumeReport,
    Windows,
};
use crate::setting::Switch;
use crate::size::Size;

/// A list of volumes; `long`: with what is said of them.
pub(crate) fn volumes(lines: &[VolumeLine], long: bool) -> String {
    if lines.is_empty() {
        return "no volumes; make one with `heeler volume create NAME --size SIZE`\n".into();
    }
    let head = ["NAME", "SIZE", "STATE", "DIRTY", "SINCE", "BACKLOG", "OWNER"];
    let mut rows = vec![head.map(String::from)];
    for line in lines {
        let push = line.push.as_ref();
        let dirty = push.filter(|push| push.dirty_seconds > 0);
        rows.push([
            line.name.clone(),
            Size(line.size_bytes).to_string(),
            line.state.clone(),
            line.dirty_bytes.map_or_else(|| "-".into(), |bytes| Size(bytes).to_string()),
            dirty.map_or_else(|| "-".into(), |push| format!("{} s", push.dirty_seconds)),
            push.map_or_else(|| "-".into(), backlog),
            line.owner.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    let mut text = table(&rows);
    if long {
        let head = ["NAME", "WRITABLE", "TAGS", "DESCRIPTION"].map(String::from);
        let row = |line: &VolumeLine| {
            let writable = if line.read_only { "no" } else { "yes" };
            let tags = if line.tags.is_empty() { "-".into() } else { line.tags.join(",") };
            [line.name.clone(), writable.into(), tags, line.description.clone()]
        };
        let rows: Vec<_> = std::iter::once(head).chain(lines.iter().map(row)).collect();
        text += &format!("\n{}", table(&rows));
    }
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
    row("mode", Some(info.mode.clone()));
    row("read-only", line.read_only.then(|| "yes".into()));
    row("description", Some(line.description.clone()).filter(|text| !text.is_empty()));
    row("tags", Some(line.tags.join(", ")).filter(|text| !text.is_empty()));
    let stays = |on: bool| Some(Switch::of(on).into());
    row("buffered read", stays(info.buffered_read));
    row("buffered write", stays(info.buffered_write));
    if let Some(push) = &line.push {
        row("push", Some(push.phase.clone()));
        row("backlog", Some(backlog(push)));
        row("dirty since", (push.dirty_seconds > 0).then(|| format!("{} s", push.dirty_seconds)));
        row("pushed", Some(format!("{} ({} put)", Size(push.pushed_bytes), Size(push.put_bytes))));
        row("retrying", (push.retrying > 0).then(|| push.retrying.to_string()));
        row("last failure", push.last_failure.clone());
    }
    if let Some(stranded) = &info.stranded {
        row("never pushed", Some(stranded_text(stranded)));
        for range in &stranded.first {
            let DirtyRange { offset_bytes, length_bytes, kind } = range;
            row("", Some(format!("{offset_bytes} {length_bytes} {kind}")));
        }
    }
    fields(&rows)
}

/// What is still to be put, and how long it takes.
fn backlog(push: &PushInfo) -> String {
    let rate = Size(push.bytes_per_second);
    match push.backlog_seconds {
        _ if push.backlog_bytes == 0 => "-".into(),
        None => Size(push.backlog_bytes).to_string(),
        Some(seconds) => format!("{}, {seconds} s at {rate}/s", Size(push.backlog_bytes)),
    }
}

fn stranded_text(stranded: &StrandedInfo) -> String {
    let first = stranded.first.len();
    let shown = if stranded.ranges > first as u64 {
        format!("; the first {first} (offset, length, kind)")
    } else {
        " (offset, length, kind)".into()
    };
    format!("{} in {} ranges{shown}:", Size(stranded.bytes), stranded.ranges)
}

/// How full the cache is.
pub(crate) fn cache(info: &CacheInfo) -> String {
    let of = |used, all| format!("{} of {} ({}%)", Size(used), Size(all), percent(used, all));
    let mut rows = vec![
        ("cache", format!("{}, {}, {} shards", info.path, Size(info.device_bytes), info.shards)),
        ("memory", server_memory(&info.server_memory)),
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

/// Everything that is counted of the cache.
pub(crate) fn report(report: &CacheReport) -> String {
    [
        cache(&report.cache),
        memory(&report.memory),
        ages(&report.memory),
        shard_windows(&report.windows),
        volume_windows(&report.by_volume),
        shards(&report.by_shard),
    ]
    .join("\n")
}

fn memory(memory: &MemoryInfo) -> String {
    fields(&[
        ("policy", memory.policy.clone()),
        (
            "buffers",
            format!(
                "{} ({}): warm_in {}, hot {}, writing {}, filling {}, detached {}, free {}",
                memory.buffers,
                Size(memory.buffer_bytes),
                Size(memory.warm_in_bytes),
                Size(memory.hot_bytes),
                Size(memory.writing_bytes),
                Size(memory.filling_bytes),
                Size(memory.detached_bytes),
                Size(memory.free_bytes)
            ),
        ),
        ("pinned", Size(memory.pinned_bytes).to_string()),
        ("warm_out", format!("{} ghosts", memory.warm_out)),
        (
            "onodes",
            format!(
                "{} ({} of metadata), {} of them pinned",
                memory.onodes,
                Size(memory.meta_bytes),
                memory.onodes_pinned
            ),
        ),
    ])
}

/// What is in RAM by the time since its last use.
fn ages(memory: &MemoryInfo) -> String {
    let names = ["1 s", "2 s", "6 s", "24 s", "2 min", "12 min", "longer"];
    let mut rows = vec![["USED WITHIN", "BUFFERS", "METADATA"].map(String::from)];
    let ages = memory.buffer_age_bytes.iter().zip(&memory.meta_age_bytes);
    rows.extend(names.iter().zip(ages).map(|(name, (buffers, meta))| {
        [(*name).into(), Size(*buffers).to_string(), Size(*meta).to_string()]
    }));
    table(&rows)
}

/// How one count of a window is shown.
type Row<T> = (&'static str, fn(&T) -> String);

/// What all shards did, a column for each window.
fn shard_windows(windows: &Windows<ShardCounts>) -> String {
    let rows: &[Row<ShardCounts>] = &[
        ("read", |counts| Size(counts.traffic.read_bytes).to_string()),
        ("buffer hits", |counts| Size(counts.traffic.buffer_hit_bytes).to_string()),
        ("buffer misses", |counts| Size(counts.traffic.buffer_miss_bytes).to_string()),
        ("hit ratio", |counts| hit_percent(&counts.traffic)),
        ("from NVMe", |counts| Size(counts.traffic.nvme_bytes).to_string()),
        ("from store", |counts| Size(counts.traffic.store_bytes).to_string()),
        ("zeroes", |counts| Size(counts.traffic.zero_bytes).to_string()),
        ("fetched", |counts| Size(counts.traffic.fetched_bytes).to_string()),
        ("written", |counts| Size(counts.traffic.written_bytes).to_string()),
        ("pushed", |counts| Size(counts.pushed_bytes).to_string()),
        ("moved", |counts| Size(counts.moved_bytes).to_string()),
        ("dropped", |counts| Size(counts.dropped_bytes).to_string()),
        ("evicted", |counts| counts.evictions.policy.to_string()),
        ("  for resizing", |counts| counts.evictions.resize.to_string()),
        ("  young", |counts| counts.evictions.young.to_string()),
        ("  with onode", |counts| counts.evictions.onode.to_string()),
        ("  discarded", |counts| counts.evictions.discard.to_string()),
        ("  purged", |counts| counts.evictions.purge.to_string()),
        ("promotions", |counts| counts.promotions.to_string()),
        ("onode hits", |counts| counts.onode_hits.to_string()),
        ("onode misses", |counts| counts.onode_misses.to_string()),
        ("onodes evicted", |counts| counts.onode_evictions.to_string()),
    ];
    let Windows { last_10s, last_5m, since_start } = windows;
    let head = |name: &str, seconds: f64| format!("{name} ({seconds:.0} s)");
    let mut lines = vec![[
        "WINDOW".into(),
        head("LAST 10 S", last_10s.seconds),
        head("LAST 5 MIN", last_5m.seconds),
        head("START", since_start.seconds),
    ]];
    lines.extend(rows.iter().map(|(name, show)| {
        let [short, long, all] = [last_10s, last_5m, since_start].map(|w| show(&w.counts));
        [(*name).into(), short, long, all]
    }));
    table(&lines)
}

/// What the clients of each volume used.
pub(crate) fn volume_windows(volumes: &[VolumeReport]) -> String {
    let head = ["VOLUME", "WINDOW", "READ", "HITS", "FROM NVME", "FROM STORE", "WRITTEN", "DIRTY"];
    let mut rows = vec![head.map(String::from)];
    for volume in volumes {
        let Windows { last_10s, last_5m, since_start } = &volume.windows;
        for (name, window) in [("10 s", last_10s), ("5 min", last_5m), ("start", since_start)] {
            let first = name == "10 s";
            let counts = &window.counts;
            rows.push([
                if first { volume.name.clone() } else { String::new() },
                name.into(),
                Size(counts.read_bytes).to_string(),
                hit_percent(counts),
                Size(counts.nvme_bytes).to_string(),
                Size(counts.store_bytes).to_string(),
                Size(counts.written_bytes).to_string(),
                if first { Size(volume.dirty_bytes).to_string() } else { String::new() },
            ]);
        }
    }
    table(&rows)
}

fn shards(shards: &[ShardReport]) -> String {
    let head = ["SHARD", "BUFFERS", "HOT", "DIRTY", "HITS 10 S", "HITS 5 MIN", "HITS", "EVICTED"];
    let mut rows = vec![head.map(String::from)];
    rows.extend(shards.iter().map(|shard| {
        let Windows { last_10s, last_5m, since_start } = &shard.windows;
        [
            shard.shard.to_string(),
            Size(shard.memory.buffer_bytes).to_string(),
            Size(shard.memory.hot_bytes).to_string(),
            Size(shard.dirty_bytes).to_string(),
            hit_percent(&last_10s.counts.traffic),
            hit_percent(&last_5m.counts.traffic),
            hit_percent(&since_start.counts.traffic),
            since_start.counts.evictions.policy.to_string(),
        ]
    }));
    table(&rows)
}

fn hit_percent(traffic: &TrafficCounts) -> String {
    match traffic.buffer_hits + traffic.buffer_misses {
        0 => "-".into(),
        needed => format!("{:.1}%", traffic.buffer_hits as f64 * 100.0 / needed as f64),
    }
}

fn server_memory(memory: &ServerMemory) -> String {
    format!(
        "{} of {} (pages {}, tables {}), resident {}",
        Size(memory.taken_bytes),
        Size(memory.target_bytes),
        Size(memory.arena_bytes),
        Size(memory.table_bytes),
        Size(memory.resident_bytes)
    )
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
        (
            "pushes",
            format!(
                "{} puts under way of {}, {} requests wait",
                store.puts_now, store.puts_max, store.waiting
            ),
        ),
    ];
    if store.fencing != "on" {
        rows.push(("fencing", store.fencing.clone()));
    }
    if let (Some(seconds), Some(failure)) = (store.failing_seconds, &store.failure) {
        rows.push(("store fails", format!("for {seconds} s: {failure}")));
    }
    if let (Some(seconds), Some(reason)) = (store.away_seconds, &store.away_reason) {
        rows.push(("store away", format!("for {seconds} s: {reason}")));
    }
    for core in &status.cores {
        rows.push((
            "core",
            format!(
                "processor {}: shards {:?}, {} connections, {} requests, {} mails",
                core.cpu, core.shards, core.connections, core.requests, core.mails
            ),
        ));
    }
    format!("{}{}\n{}", fields(&rows), cache(&status.cache), volumes(&status.volumes, false))
}

fn percent(part: u64, all: u64) -> u64 {
    (u128::from(part) * 100).checked_div(u128::from(all)).unwrap_or(0) as u64
}

fn fields(rows: &[(&str, String)]) -> String {
    let mut text = String::new();
    for (name, value) in rows {
        writeln!(text, "{name:<14} {value}").expect("text grows");
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
        let line = |name: &str, push: Option<PushInfo>| VolumeLine {
            name: name.into(),
            size_bytes: 16 << 30,
            state: "served".into(),
            dirty_bytes: push.as_ref().map(|push| push.backlog_bytes),
            push,
            ..VolumeLine::default()
        };
        let push = |backlog_seconds| PushInfo {
            dirty_seconds: 7,
            backlog_bytes: 4096,
            backlog_seconds,
            bytes_per_second: 2048,
            ..PushInfo::default()
        };
        let reason = Some("lost".into());
        let lines = [
            line("disk0", Some(push(None))),
            line("b", Some(push(Some(2)))),
            VolumeLine { reason, ..line("a", None) },
        ];
        assert_eq!(
            volumes(&lines, false),
            "NAME   SIZE    STATE   DIRTY  SINCE  BACKLOG                OWNER\n\
             disk0  16 GiB  served  4 KiB  7 s    4 KiB                  -\n\
             b      16 GiB  served  4 KiB  7 s    4 KiB, 2 s at 2 KiB/s  -\n\
             a      16 GiB  served  -      -      -                      -\n\
             a: lost\n"
        );
        assert!(volumes(&[], false).contains("heeler volume create"));
    }

    #[test]
    fn nothing_of_nothing_is_no_percent() {
        assert_eq!((percent(0, 0), percent(1, 4), percent(u64::MAX, u64::MAX)), (0, 25, 100));
    }
}
