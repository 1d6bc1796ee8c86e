//! What the shards count, as it is shown.

use heeler_core::ages::WINDOWS;
use heeler_core::counters::{Counts, Scrubbed, Traffic};
use heeler_core::ids::VolumeId;
use heeler_core::onode::META_UNIT_BYTES;
use heeler_driver::control::VolumeStatus;
use heeler_driver::mail::{ShardStatus, VolumeShare};
use heeler_driver::windows::{self, Span, Spans};

use crate::api::{
    CacheInfo, CacheReport, Evictions, MemoryInfo, ShardCounts, ShardReport, TrafficCounts,
    VolumeReport, Window, Windows,
};
use crate::lines::bytes;

/// Everything that these shards counted, and what they counted of these volumes.
pub(crate) fn report(
    cache: CacheInfo,
    shards: &[ShardStatus],
    volumes: &[VolumeStatus],
) -> CacheReport {
    let all = shards.iter().map(|shard| shard.counts);
    CacheReport {
        cache,
        memory: shards.iter().map(memory).fold(MemoryInfo::default(), add_memory),
        windows: windows(&all.fold(Spans::default(), Spans::plus), shard_counts),
        by_shard: shards.iter().map(of_shard).collect(),
        by_volume: volumes.iter().map(|volume| of_volume(shards, volume)).collect(),
    }
}

fn of_shard(shard: &ShardStatus) -> ShardReport {
    ShardReport {
        shard: shard.shard.0,
        dirty_bytes: bytes(shard.usage.dirty_blocks),
        memory: memory(shard),
        windows: windows(&shard.counts, shard_counts),
    }
}

fn of_volume(shards: &[ShardStatus], volume: &VolumeStatus) -> VolumeReport {
    let shares = || shares_of(shards, volume.number);
    let traffic = shares().map(|share| share.traffic).fold(Spans::default(), Spans::plus);
    VolumeReport {
        name: volume.name.clone(),
        dirty_bytes: shares().map(|share| bytes(share.dirty_blocks)).sum(),
        windows: windows(&traffic, traffic_counts),
    }
}

/// What the shards have of a volume.
pub(crate) fn shares_of(
    shards: &[ShardStatus],
    volume: VolumeId,
) -> impl Iterator<Item = &VolumeShare> {
    shards.iter().flat_map(|shard| &shard.volumes).filter(move |share| share.volume == volume)
}

/// Where the scrub of a volume stands.
#[derive(Debug)]
pub(crate) struct ScrubState {
    pub(crate) running: bool,
    /// Between 0 and 1.
    pub(crate) part_done: f64,
    /// By this scrub and those before.
    pub(crate) found: Scrubbed,
}

/// Where the scrub of a volume stands, if the shards have the volume.
pub(crate) fn scrub_of(shards: &[ShardStatus], volume: VolumeId) -> Option<ScrubState> {
    let shares = || shares_of(shards, volume);
    shares().next()?;
    let part = |(done, all): (u32, u32)| f64::from(done) / f64::from(all.max(1));
    let parts = shares().map(|share| share.scrubbing.map_or(1.0, part));
    Some(ScrubState {
        running: shares().any(|share| share.scrubbing.is_some()),
        part_done: parts.sum::<f64>() / shares().count() as f64,
        found: shares().map(|share| share.scrubbed).fold(Scrubbed::default(), Scrubbed::plus),
    })
}

fn memory(shard: &ShardStatus) -> MemoryInfo {
    let pages = |count: u32| bytes(u64::from(count));
    let usage = &shard.buffers;
    let units = |count: u64| count * META_UNIT_BYTES as u64;
    let resident = usage.pages() - usage.free;
    MemoryInfo {
        policy: shard.policy.name().into(),
        onodes: shard.usage.onodes,
        onodes_pinned: shard.onodes_pinned,
        buffers: resident.into(),
        buffer_bytes: pages(resident),
        warm_in_bytes: pages(usage.warm_in),
        hot_bytes: pages(usage.hot),
        warm_out: usage.ghosts.into(),
        writing_bytes: pages(usage.writing),
        filling_bytes: pages(usage.filling),
        pinned_bytes: pages(usage.pinned_listed + usage.pinned_unlisted),
        detached_bytes: pages(usage.detached),
        free_bytes: pages(usage.free),
        meta_bytes: units(shard.budget.meta_units.into()),
        buffer_age_bytes: shard.budget.page_ages.map(bytes),
        meta_age_bytes: shard.budget.meta_ages.map(units),
    }
}

fn add(a: [u64; WINDOWS], b: [u64; WINDOWS]) -> [u64; WINDOWS] {
    std::array::from_fn(|i| a[i] + b[i])
}

fn add_memory(sum: MemoryInfo, one: MemoryInfo) -> MemoryInfo {
    MemoryInfo {
        policy: one.policy,
        onodes: sum.onodes + one.onodes,
        onodes_pinned: sum.onodes_pinned + one.onodes_pinned,
        buffers: sum.buffers + one.buffers,
        buffer_bytes: sum.buffer_bytes + one.buffer_bytes,
        warm_in_bytes: sum.warm_in_bytes + one.warm_in_bytes,
        hot_bytes: sum.hot_bytes + one.hot_bytes,
        warm_out: sum.warm_out + one.warm_out,
        writing_bytes: sum.writing_bytes + one.writing_bytes,
        filling_bytes: sum.filling_bytes + one.filling_bytes,
        pinned_bytes: sum.pinned_bytes + one.pinned_bytes,
        detached_bytes: sum.detached_bytes + one.detached_bytes,
        free_bytes: sum.free_bytes + one.free_bytes,
        meta_bytes: sum.meta_bytes + one.meta_bytes,
        buffer_age_bytes: add(sum.buffer_age_bytes, one.buffer_age_bytes),
        meta_age_bytes: add(sum.meta_age_bytes, one.meta_age_bytes),
    }
}

fn windows<T: Counts, U>(spans: &Spans<T>, show: impl Fn(&T) -> U) -> Windows<U> {
    let window = |span: &Span<T>| Window {
        seconds: (span.lasted.0 / 1_000_000) as f64 / 1000.0,
        counts: show(&span.counts),
    };
    Windows {
        last_10s: window(&spans.short),
        last_5m: window(&spans.long),
        since_start: window(&spans.all),
    }
}

fn traffic_counts(traffic: &Traffic) -> TrafficCounts {
    let misses = traffic.nvme_blocks + traffic.store_blocks;
    TrafficCounts {
        read_bytes: bytes(traffic.read_blocks),
        buffer_hits: traffic.ram_blocks,
        buffer_hit_bytes: bytes(traffic.ram_blocks),
        buffer_misses: misses,
        buffer_miss_bytes: bytes(misses),
        nvme_bytes: bytes(traffic.nvme_blocks),
        store_bytes: bytes(traffic.store_blocks),
        zero_bytes: bytes(traffic.zero_blocks),
        fetched_bytes: bytes(traffic.fetched_blocks),
        written_bytes: bytes(traffic.written_blocks),
    }
}

fn shard_counts(counts: &windows::ShardCounts) -> ShardCounts {
    ShardCounts {
        traffic: traffic_counts(&counts.traffic),
        onode_hits: counts.onodes.hits,
        onode_misses: counts.onodes.misses,
        onode_evictions: counts.onodes.evictions,
        promotions: counts.buffers.promotions,
        evictions: Evictions {
            policy: counts.buffers.evictions - counts.shard.resized_blocks,
            resize: counts.shard.resized_blocks,
            young: counts.buffers.young_evictions,
            onode: counts.shard.onode_evicted_blocks,
            discard: counts.shard.discarded_blocks,
            purge: counts.shard.purged_blocks,
        },
        records: counts.shard.records,
        device_flushes: counts.shard.flushes,
        pushed_bytes: bytes(counts.shard.pushed_blocks),
        moved_bytes: bytes(counts.shard.moved_blocks),
        dropped_bytes: bytes(counts.shard.dropped_blocks),
        warmed_bytes: bytes(counts.shard.warmed_blocks),
        heat_records: counts.shard.heat_records,
        heat_bytes: bytes(counts.shard.heat_pages),
        device_errors: counts.shard.device_errors,
        damaged_blocks: counts.shard.damaged_blocks,
        lost_blocks: counts.shard.lost_blocks,
    }
}
