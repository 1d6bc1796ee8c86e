//! Any bytes as a map page: an error or a page, never a panic; a page encodes to the same bytes,
//! can be looked up as a whole, and takes updates.
#![no_main]

use heeler_core::ids::Epoch;
use heeler_core::limits::MAP_PAGE_BLOCKS;
use heeler_core::wire::map_page::{Data, MapPage, PackRef, Update};
use heeler_core::wire::names::Uuid;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // Without a checksum to guess, the fuzzer reaches the fields.
    let mut bytes = data.to_vec();
    if let Some(crc) = bytes.get_mut(12..16) {
        crc.fill(0);
    }
    let Some(fixed) = bytes.get(..64) else { return };
    let mut volumes = vec![Uuid(fixed[16..32].try_into().unwrap())];
    // The volumes that the page names, as a head that lists them would.
    for name in bytes[64..].chunks_exact(16).take(fixed[56].into()) {
        volumes.push(Uuid(name.try_into().unwrap()));
    }
    let page = u32::from_le_bytes(fixed[32..36].try_into().unwrap());
    let epoch = Epoch(u64::from_le_bytes(fixed[40..48].try_into().unwrap()));
    let Ok(map) = MapPage::decode(&bytes, (&volumes, 0), page, epoch, |_, _| 0) else { return };
    // A volume that is named and has no pack is left out, and a page encodes to the same then.
    let encoded = map.encode(&volumes, page, epoch, |_, _| 0);
    let again = MapPage::decode(&encoded, (&volumes, 0), page, epoch, |_, _| 0).expect("ours");
    assert_eq!((again, encoded.len() <= bytes.len()), (map.clone(), true));
    let blocks: u32 =
        map.lookup(0, MAP_PAGE_BLOCKS as u16).map(|piece| u32::from(piece.count)).sum();
    assert_eq!(blocks, MAP_PAGE_BLOCKS as u32);

    // Overwrite a stretch; the result must still be a page.
    let first = (bytes.len() * 7919 % (MAP_PAGE_BLOCKS - 300)) as u16;
    let Some(next) = epoch.0.checked_add(1).map(Epoch) else { return };
    let pack = PackRef { epoch: next, n: u32::MAX, source: 0, header_bytes: 76 };
    let crcs = [1; 300];
    let new = Data { pack, offset: 5, crcs: &crcs };
    let after = map.apply(&[Update { first, count: 300, data: Some(new) }]);
    assert!(after.lookup(first, 300).all(|piece| piece.data.is_some_and(|d| d.pack.epoch == next)));
    let encoded = after.encode(&volumes, page, next, |_, _| 0);
    assert_eq!(MapPage::decode(&encoded, (&volumes, 0), page, next, |_, _| 0), Ok(after.clone()));
    // What lies over the page comes to the same as what was applied to it.
    let over = MapPage::default().overlay(&[Update { first, count: 300, data: Some(new) }]);
    assert_eq!(map.apply(&over.updates()), after);
});
