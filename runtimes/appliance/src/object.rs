//! Where the store has an object of a volume, or of a snapshot.

use heeler_core::ids::BLOCK_BYTES;
use heeler_store::image::{self, Image, Stretch};
use heeler_store::{Store, snapshots, volumes};

use crate::api::{ObjectMap, ObjectStretch};
use crate::lines::bytes;
use crate::show;

/// Looks an object up, as of the last commit.
pub(crate) async fn find(store: &Store, name: &str, object: u32) -> Result<ObjectMap, String> {
    let snapshot = if name.contains('@') { Some(name.parse()?) } else { None };
    let head = async || match &snapshot {
        Some(snapshot) => snapshots::open(store, snapshot).await,
        None => volumes::named_head(store, name).await,
    };
    let newest = head().await.map_err(|e| e.to_string())?;
    let object_blocks = u64::from(newest.object_blocks());
    let first = u64::from(object) * object_blocks;
    let blocks = newest.blocks.saturating_sub(first).min(object_blocks);
    if blocks == 0 {
        let last = (newest.blocks - 1) / object_blocks;
        return Err(format!("'{name}' has no object {object}: they are numbered 0 to {last}"));
    }
    let stretches = image::of_newest(async || {
        let image = Image::open(store, head().await?).await?;
        image.stretches(store, first, blocks).await
    });
    let stretches = stretches.await.map_err(|e| e.to_string())?;
    let stretch = |Stretch { first, blocks, pack }| {
        let (pack, pack_offset_bytes) = pack.unzip();
        let (offset_bytes, length_bytes) = (bytes(first), bytes(blocks));
        ObjectStretch { offset_bytes, length_bytes, pack, pack_offset_bytes }
    };
    Ok(ObjectMap {
        object,
        offset_bytes: bytes(first),
        length_bytes: bytes(blocks),
        stretches: stretches.into_iter().map(stretch).collect(),
    })
}

/// The same, for people.
pub(crate) fn show(map: &ObjectMap) -> String {
    let mut rows = vec![["OFFSET", "LENGTH", "AT", "PACK"].map(String::from)];
    for stretch in &map.stretches {
        let at = stretch.pack_offset_bytes.map_or_else(|| "-".into(), |at| at.to_string());
        rows.push([
            stretch.offset_bytes.to_string(),
            stretch.length_bytes.to_string(),
            at,
            stretch.pack.clone().unwrap_or_else(|| "zeroes".into()),
        ]);
    }
    let end = map.offset_bytes + map.length_bytes;
    let blocks = map.length_bytes / BLOCK_BYTES as u64;
    let head =
        format!("object {}: bytes {} to {end}, {blocks} blocks", map.object, map.offset_bytes);
    format!("{head}\n{}", show::table(&rows))
}
