//! Volumes as lists show them: what the store says, and what the server knows better.

use heeler_core::ids::BLOCK_BYTES;
use heeler_core::wire::head::Head;
use heeler_driver::control::VolumeStatus;
use heeler_store::volumes::{Info, Listed};

use crate::api::{VolumeInfo, VolumeLine};

/// Bytes of so many blocks.
pub(crate) const fn bytes(blocks: u64) -> u64 {
    blocks * BLOCK_BYTES as u64
}

/// A volume by its newest head.
pub(crate) fn of_head(name: &str, head: &Head) -> VolumeLine {
    VolumeLine {
        name: name.into(),
        uuid: head.volume.to_string(),
        size_bytes: bytes(head.blocks),
        object_bytes: 1 << head.object_shift,
        state: if head.released { "free" } else { "owned" }.into(),
        owner: (!head.released).then(|| head.host.clone()),
        created_unix_secs: head.created_unix_secs,
        head: head.number,
        epoch: head.epoch.0,
        description: head.settings.description.clone(),
        tags: head.settings.tags.clone(),
        read_only: head.settings.read_only,
        ..VolumeLine::default()
    }
}

/// A volume as the store lists it.
pub(crate) fn of_listed(listed: &Listed) -> VolumeLine {
    match &listed.head {
        Ok(head) => of_head(&listed.name, head),
        Err(e) => VolumeLine {
            name: listed.name.clone(),
            state: "broken".into(),
            reason: Some(e.to_string()),
            ..VolumeLine::default()
        },
    }
}

/// What the store holds of a volume.
pub(crate) fn of_info(name: &str, info: &Info) -> VolumeInfo {
    VolumeInfo {
        line: of_head(name, &info.head),
        objects: info.objects,
        stored_bytes: info.bytes,
        packs: info.packs,
        pack_bytes: info.pack_bytes,
        mode: info.head.settings.mode.name().into(),
        buffered_read: info.head.settings.buffering.reads,
        buffered_write: info.head.settings.buffering.writes,
        ..VolumeInfo::default()
    }
}

/// A volume of which only the server knows.
pub(crate) fn of_status(status: &VolumeStatus) -> VolumeLine {
    let mut line = VolumeLine {
        name: status.name.clone(),
        uuid: status.uuid.to_string(),
        size_bytes: bytes(status.blocks),
        object_bytes: if status.blocks > 0 { 1 << status.object_shift } else { 0 },
        created_unix_secs: status.created_unix_secs,
        ..VolumeLine::default()
    };
    better(&mut line, status, None);
    line
}

/// Puts in what the server knows of one of its own volumes.
pub(crate) fn better(line: &mut VolumeLine, status: &VolumeStatus, dirty_blocks: Option<u64>) {
    line.state = status.state.into();
    line.reason.clone_from(&status.reason);
    if let Some(settings) = &status.settings {
        line.description.clone_from(&settings.description);
        line.tags.clone_from(&settings.tags);
        line.read_only = settings.read_only;
    }
    if status.is_served() {
        line.size_bytes = bytes(status.blocks);
        line.head = status.keeper.head;
        line.epoch = status.keeper.committed.0;
    }
    if status.in_shards {
        line.dirty_bytes = dirty_blocks.map(bytes);
    }
}
