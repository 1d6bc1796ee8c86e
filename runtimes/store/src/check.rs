//! The offline check of a volume's images in the store, that of the newest head and those of its
//! snapshots: from the head through every map page and the tail to every pack, and in a deep check
//! to every block.
//!
//! Meant for a volume that nobody is writing: what a running owner has put but not committed
//! looks like orphans.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use heeler_core::ids::{BLOCK_BYTES, Epoch};
use heeler_core::keeper::Changes;
use heeler_core::limits::MAP_PAGE_BLOCKS;
use heeler_core::wire::head::{Head, PageRef, TailPack};
use heeler_core::wire::map_page::{Data, MapPage};
use heeler_core::wire::names::{self, ObjectName, Uuid};
use heeler_core::wire::pack::Header;

use crate::backend::GET_BYTES_MAX;
use crate::volumes::CRC32C;
use crate::{ErrorKind, Store, StoreError};

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// The newest head, if it can be read.
    pub head: Option<Head>,
    /// Map pages that the newest head names.
    pub map_pages: u64,
    /// Blocks that the newest image has in packs.
    pub blocks_mapped: u64,
    /// Packs with blocks of any image.
    pub packs: u64,
    /// Blocks that were read and compared with their checksums (deep check).
    pub blocks_checked: u64,
    /// What is wrong: one line each, at most one for a pack or a map page and kind of damage.
    pub errors: Vec<String>,
    /// Keys of the volume's objects that no image needs.
    pub orphans: Vec<String>,
    /// Their bytes.
    pub orphan_bytes: u64,
}

/// Checks a volume. `deep` reads every pack and verifies every block; otherwise of packs only those
/// that the map pages do not know yet are read, of the others the lengths are compared with what
/// the map says. A deep check holds the checksums of the whole map in memory: 4 bytes for each
/// mapped block and 16 for each stretch.
///
/// # Errors
/// When the store fails in a way that says nothing about the image. Damage is no error: it is in
/// the report.
pub async fn check(store: &Store, volume: Uuid, deep: bool) -> Result<Report, StoreError> {
    let mut check = Check {
        store,
        volume,
        deep,
        volumes: BTreeSet::new(),
        listed: BTreeMap::new(),
        used: BTreeMap::new(),
        pages: BTreeSet::new(),
        complete: true,
        report: Report::default(),
    };
    check.list(volume).await?;
    if let Some(head) = check.newest_head().await? {
        check.older_heads(&head).await?;
        check.image(&head, true).await?;
        for snapshot in &head.snapshots {
            if let Some(kept) = check.head(snapshot.number).await? {
                check.image(&kept, false).await?;
            } else {
                check.complete = false;
            }
        }
        check.report.packs = check.used.len() as u64;
        check.sizes();
        if deep {
            check.payload(&head).await?;
        }
        check.orphans();
        check.report.head = Some(head);
    }
    check.report.orphans.sort_unstable();
    Ok(check.report)
}

struct Check<'a> {
    store: &'a Store,
    volume: Uuid,
    deep: bool,
    /// Those that have been listed: a clone's image lies in others too.
    volumes: BTreeSet<Uuid>,
    /// Of each head, map page and pack in the store: its bytes.
    listed: BTreeMap<(Uuid, ObjectName), u64>,
    /// What the images need of each pack, by volume, epoch and number.
    used: BTreeMap<(Uuid, Epoch, u32), Use>,
    /// Map pages that an image needs.
    pages: BTreeSet<(Uuid, ObjectName)>,
    /// Every image could be read to its last stretch, so that what is in none of them is in use
    /// nowhere.
    complete: bool,
    report: Report,
}

/// What the images need of a pack.
#[derive(Default)]
struct Use {
    header_bytes: u16,
    blocks: u64,
    /// One more than the last block needed.
    end: u16,
    /// The pack is there and long enough.
    whole: bool,
    /// For a deep check.
    stretches: Vec<Stretch>,
    /// Of the stretches' blocks, in order.
    crcs: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Stretch {
    /// Number of the first block in the volume.
    first: u64,
    /// Its place in the pack.
    offset: u16,
    count: u16,
}

/// An object, or why it cannot be had.
type Fetched = Result<Bytes, String>;

impl Check<'_> {
    async fn list(&mut self, volume: Uuid) -> Result<(), StoreError> {
        if !self.volumes.insert(volume) {
            return Ok(());
        }
        for entry in self.store.list(&names::volume_prefix(volume)).await? {
            match names::parse_key(&entry.key) {
                Some((_, name)) => {
                    self.listed.insert((volume, name), entry.bytes);
                }
                None if volume == self.volume => {
                    self.report.orphans.push(entry.key);
                    self.report.orphan_bytes += entry.bytes;
                }
                None => {}
            }
        }
        Ok(())
    }

    async fn newest_head(&mut self) -> Result<Option<Head>, StoreError> {
        let Some(number) = self.head_numbers().last().copied() else {
            self.report.errors.push("there is no head".into());
            return Ok(None);
        };
        self.head(number).await
    }

    fn head_numbers(&self) -> Vec<u32> {
        let number = |&(volume, name): &(Uuid, ObjectName)| match name {
            ObjectName::Head { number } if volume == self.volume => Some(number),
            _ => None,
        };
        self.listed.keys().filter_map(number).collect()
    }

    async fn head(&mut self, number: u32) -> Result<Option<Head>, StoreError> {
        let fetched = self.fetch(self.volume, ObjectName::Head { number }).await?;
        let head = fetched.and_then(|bytes| {
            Head::decode(&bytes, self.volume, number, CRC32C).map_err(|e| e.to_string())
        });
        Ok(self.note(head, || format!("head {number}")))
    }

    /// Heads by which the volume was claimed stay for ever, so that no former owner can commit.
    async fn older_heads(&mut self, newest: &Head) -> Result<(), StoreError> {
        let numbers = self.head_numbers();
        if !numbers.contains(&newest.term) {
            self.report.errors.push(format!(
                "head {}, the owner's claim, is missing: a former owner could commit there",
                newest.term
            ));
        }
        for number in numbers {
            let kept = newest.snapshots.iter().any(|snapshot| snapshot.number == number);
            if number == newest.number || kept {
                continue;
            }
            if let Some(head) = self.head(number).await?
                && !head.is_claim()
            {
                self.orphan(ObjectName::Head { number });
            }
        }
        Ok(())
    }

    /// Goes through one image; `newest`: its blocks are counted.
    async fn image(&mut self, head: &Head, newest: bool) -> Result<(), StoreError> {
        for source in &head.sources {
            self.list(source.volume).await?;
            let record = ObjectName::Child { number: source.number, clone: head.volume };
            if !self.listed.contains_key(&(source.volume, record)) {
                let key = names::key(source.volume, record);
                self.report.errors.push(format!(
                    "{key} is missing: the snapshot that the image lies in can be deleted"
                ));
            }
        }
        let overlays = self.tail(head).await?;
        let missing = overlays.keys().filter(|page| !head.pages.contains_key(page));
        let mut wanted: Vec<(u32, Option<PageRef>)> = missing.map(|page| (*page, None)).collect();
        wanted.extend(head.pages.iter().map(|(&page, &at)| (page, Some(at))));
        for some in wanted.chunks(FETCHES_MAX) {
            let fetched: Vec<Option<Fetched>> = stream::iter(some)
                .map(async |&(page, at)| {
                    let Some(PageRef { source, epoch }) = at else { return Ok(None) };
                    let name = ObjectName::Map { page, epoch };
                    self.fetch(head.volume_of(source), name).await.map(Some)
                })
                .buffered(FETCHES_MAX)
                .try_collect()
                .await?;
            for (&(page, at), fetched) in some.iter().zip(fetched) {
                let base = match (at, fetched) {
                    (Some(at), Some(fetched)) => self.base(head, page, at, fetched),
                    _ => Some(MapPage::default()),
                };
                let Some(base) = base else { continue };
                let whole = overlays.get(&page).map(|over| base.apply(&over.updates()));
                self.map_page(head, page, &whole.unwrap_or(base), newest);
            }
        }
        if newest {
            self.report.map_pages = head.pages.len() as u64;
        }
        Ok(())
    }

    /// What the packs of the tail lay over the pages.
    async fn tail(&mut self, head: &Head) -> Result<BTreeMap<u32, MapPage>, StoreError> {
        let mut overlays = BTreeMap::new();
        let mut headers = stream::iter(&head.tail)
            .map(async |pack| {
                let range = 0..u64::from(pack.header_bytes);
                let volume = head.volume_of(pack.source);
                let key = names::pack_key(volume, pack.epoch, pack.n);
                let fetched = match self.store.get(&key, Some(range)).await {
                    Ok(bytes) => Ok(bytes),
                    Err(e) if e.kind == ErrorKind::NotFound => Err("is missing".into()),
                    Err(e) => return Err(e),
                };
                Ok((pack, key, fetched))
            })
            .buffered(FETCHES_MAX);
        let mut errors = Vec::new();
        let mut used = Vec::new();
        while let Some((pack, key, fetched)) = headers.try_next().await? {
            match fetched.and_then(|bytes| tail_header(head, *pack, &bytes)) {
                Ok(changes) => changes.apply(&mut overlays),
                Err(e) => errors.push(format!("{key}: {e}")),
            }
            used.push((head.volume_of(pack.source), pack));
        }
        drop(headers);
        for (volume, pack) in used {
            let of_pack = self.used.entry((volume, pack.epoch, pack.n)).or_default();
            of_pack.header_bytes = pack.header_bytes;
        }
        self.complete &= errors.is_empty();
        self.report.errors.extend(errors);
        Ok(overlays)
    }

    fn base(&mut self, head: &Head, page: u32, at: PageRef, fetched: Fetched) -> Option<MapPage> {
        self.pages.insert((head.volume_of(at.source), ObjectName::Map { page, epoch: at.epoch }));
        let map = fetched.and_then(|bytes| {
            MapPage::decode(&bytes, (&head.volumes(), at.source), page, at.epoch, CRC32C)
                .map_err(|e| e.to_string())
        });
        let map = self.note(map, || format!("map page {page} of epoch {}", at.epoch.0));
        self.complete &= map.is_some();
        map
    }

    fn map_page(&mut self, head: &Head, page: u32, map: &MapPage, newest: bool) {
        let base = u64::from(page) * MAP_PAGE_BLOCKS as u64;
        let mut outside = 0;
        for piece in map.lookup(0, MAP_PAGE_BLOCKS as u16) {
            let Some(data) = piece.data else { continue };
            let first = base + u64::from(piece.first);
            let end = first + u64::from(piece.count);
            outside += end.saturating_sub(first.max(head.blocks));
            self.use_blocks(head, first, &data);
            if newest {
                self.report.blocks_mapped += u64::from(piece.count);
            }
        }
        if outside > 0 {
            self.report
                .errors
                .push(format!("map page {page}: {outside} blocks behind the end of the volume"));
        }
    }

    fn use_blocks(&mut self, head: &Head, first: u64, data: &Data<'_>) {
        let pack = data.pack;
        let volume = head.volume_of(pack.source);
        let stretch = Stretch { first, offset: data.offset, count: data.crcs.len() as u16 };
        let used = self
            .used
            .entry((volume, pack.epoch, pack.n))
            .or_insert_with(|| Use { header_bytes: pack.header_bytes, ..Use::default() });
        if used.header_bytes != pack.header_bytes {
            self.report.errors.push(format!(
                "{}: map pages disagree about its header: {} and {} bytes",
                names::pack_key(volume, pack.epoch, pack.n),
                used.header_bytes,
                pack.header_bytes
            ));
        }
        used.blocks += u64::from(stretch.count);
        used.end = used.end.max(data.offset + stretch.count);
        // Most of a snapshot is the same in the newest image.
        if self.deep && !used.stretches.contains(&stretch) {
            used.stretches.push(stretch);
            used.crcs.extend_from_slice(data.crcs);
        }
    }

    /// That every pack is there and long enough.
    fn sizes(&mut self) {
        for (&(volume, epoch, n), used) in &mut self.used {
            let needed = u64::from(used.header_bytes) + u64::from(used.end) * BLOCK_BYTES as u64;
            let lacks = match self.listed.get(&(volume, ObjectName::Pack { epoch, n })) {
                None => "is missing".into(),
                Some(&bytes) if bytes < needed => {
                    format!("has {bytes} bytes instead of {needed}")
                }
                Some(_) => {
                    used.whole = true;
                    continue;
                }
            };
            let key = names::pack_key(volume, epoch, n);
            let blocks = used.blocks;
            self.report.errors.push(format!("{key} {lacks}; the map needs {blocks} of its blocks"));
        }
    }

    async fn payload(&mut self, head: &Head) -> Result<(), StoreError> {
        let mut packs = stream::iter(self.used.iter().filter(|(_, used)| used.whole))
            .map(async |(&(volume, epoch, n), used)| {
                let fetched = self.fetch(volume, ObjectName::Pack { epoch, n }).await?;
                Ok::<_, StoreError>((volume, epoch, n, used, fetched))
            })
            .buffered(PACKS_MAX);
        let mut found = Vec::new();
        let mut checked = 0;
        while let Some((volume, epoch, n, used, fetched)) = packs.try_next().await? {
            let key = names::pack_key(volume, epoch, n);
            let header = fetched.and_then(|bytes| {
                let header = Header::decode(&bytes, CRC32C).map_err(|e| e.to_string())?;
                if (header.volume, header.epoch, header.n) != (volume, epoch, n) {
                    return Err("its header is that of another pack".into());
                }
                Ok((header, bytes))
            });
            match header {
                Err(e) => found.push(format!("{key}: {e}")),
                Ok((header, bytes)) => {
                    checked += used.crcs.len() as u64;
                    let damage = check_pack(head, &header, &bytes, used);
                    found.extend(damage.into_iter().map(|damage| format!("{key}: {damage}")));
                }
            }
        }
        drop(packs);
        self.report.blocks_checked = checked;
        self.report.errors.extend(found);
        Ok(())
    }

    fn orphans(&mut self) {
        let unused = |&(volume, name): &(Uuid, ObjectName)| match name {
            _ if volume != self.volume || !self.complete => false,
            ObjectName::Head { .. } | ObjectName::Child { .. } => false,
            ObjectName::Map { .. } => !self.pages.contains(&(volume, name)),
            ObjectName::Pack { epoch, n } => !self.used.contains_key(&(volume, epoch, n)),
        };
        let names: Vec<_> = self.listed.keys().filter(|name| unused(name)).copied().collect();
        for (_, name) in names {
            self.orphan(name);
        }
    }

    fn orphan(&mut self, name: ObjectName) {
        self.report.orphan_bytes += self.listed.get(&(self.volume, name)).copied().unwrap_or(0);
        self.report.orphans.push(names::key(self.volume, name));
    }

    /// A whole object. What is wrong with this object is inside, a store that does not answer is
    /// an error.
    async fn fetch(&self, volume: Uuid, name: ObjectName) -> Result<Fetched, StoreError> {
        let bytes = self.listed.get(&(volume, name)).copied().unwrap_or(0);
        if bytes > GET_BYTES_MAX {
            return Ok(Err(format!("has {bytes} bytes, more than any object of ours")));
        }
        match self.store.get(&names::key(volume, name), None).await {
            Ok(bytes) => Ok(Ok(bytes)),
            Err(e) if e.kind == ErrorKind::NotFound => Ok(Err("is missing".into())),
            Err(e) => Err(e),
        }
    }

    fn note<T>(&mut self, result: Result<T, String>, what: impl Fn() -> String) -> Option<T> {
        result.map_err(|e| self.report.errors.push(format!("{}: {e}", what()))).ok()
    }
}

/// What a pack of the tail changes of the image.
fn tail_header(head: &Head, pack: TailPack, bytes: &[u8]) -> Result<Changes, String> {
    let header = Header::decode(bytes, CRC32C).map_err(|e| e.to_string())?;
    let found = (header.volume, header.epoch, header.n, header.bytes());
    if found != (head.volume_of(pack.source), pack.epoch, pack.n, pack.header_bytes) {
        return Err("its header is that of another pack".into());
    }
    let mut changes = Changes::default();
    changes.add(head, pack, &header);
    if changes.sort() { Ok(changes) } else { Err("its header has a block twice".into()) }
}

/// Compares a pack's blocks with its header, and its header with what the map says.
fn check_pack(head: &Head, header: &Header, bytes: &[u8], used: &Use) -> Vec<String> {
    let start = usize::from(header.bytes());
    let expected = start + header.crcs.len() * BLOCK_BYTES;
    if bytes.len() != expected {
        return vec![format!("it has {} bytes, its header says {expected}", bytes.len())];
    }
    if header.bytes() != used.header_bytes {
        return vec![format!(
            "its header has {} bytes, the map says {}",
            header.bytes(),
            used.header_bytes
        )];
    }
    // The listing promised as much, but that was another answer of the store.
    if header.crcs.len() < usize::from(used.end) {
        return vec![format!("it has {} blocks, the map needs {}", header.crcs.len(), used.end)];
    }
    let per_object = u64::from(head.object_blocks());
    let places: Vec<u64> = header
        .runs
        .iter()
        .filter(|run| !run.zero)
        .flat_map(|run| {
            let first = u64::from(run.object) * per_object + u64::from(run.first);
            first..first + u64::from(run.count)
        })
        .collect();
    let mut strange = Tally::default();
    let mut differs = Tally::default();
    let mut damaged = Tally::default();
    let mut crcs = used.crcs.iter();
    for stretch in &used.stretches {
        for (i, &crc) in (0..stretch.count).zip(&mut crcs) {
            let block = stretch.first + u64::from(i);
            let at = usize::from(stretch.offset + i);
            let payload = &bytes[start + at * BLOCK_BYTES..][..BLOCK_BYTES];
            strange.add(places[at] != block, block);
            differs.add(header.crcs[at] != crc, block);
            damaged.add(CRC32C(0, payload) != crc, block);
        }
    }
    [
        strange.line(head, "are other blocks according to its header"),
        differs.line(head, "have another checksum in its header than in the map"),
        damaged.line(head, "do not match their checksum"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// How many blocks have a kind of damage, and the first of them.
#[derive(Default)]
struct Tally {
    count: u64,
    first: u64,
}

impl Tally {
    fn add(&mut self, bad: bool, block: u64) {
        if bad {
            self.first = if self.count == 0 { block } else { self.first.min(block) };
            self.count += 1;
        }
    }

    fn line(&self, head: &Head, what: &str) -> Option<String> {
        let per_object = u64::from(head.object_blocks());
        (self.count > 0).then(|| {
            format!(
                "{} blocks {what}, first block {} of object {}",
                self.count,
                self.first % per_object,
                self.first / per_object
            )
        })
    }
}

/// Map pages that are fetched at once.
const FETCHES_MAX: usize = 16;
/// Packs in memory at once.
const PACKS_MAX: usize = 4;

#[cfg(test)]
mod tests {
    use heeler_core::wire::head::{Settings, Snapshot, Source};
    use heeler_core::wire::map_page::{PackRef, Update};
    use heeler_core::wire::pack::{Run, header_bytes};
    use object_store::PutPayload;

    use super::*;
    use crate::volumes::{self, NewVolume};
    use crate::{Place, StoreConfig};

    const EPOCH: Epoch = Epoch(2 << 32 | 1);

    /// A volume of 1.5 map pages with one committed push: pack 0 has blocks 3..7 of object 2 and
    /// block 0 of object 20 (which is in map page 1), pack 1 has blocks 1023 of object 4 and 0 of
    /// object 5.
    struct Image {
        store: Store,
        head: Head,
    }

    fn block(seed: u8) -> Vec<u8> {
        (0..BLOCK_BYTES).map(|i| (i as u8).wrapping_mul(7) ^ seed).collect()
    }

    fn run(object: u32, first: u16, count: u16) -> Run {
        Run { object, first, count, zero: false }
    }

    fn crc(seed: u8) -> u32 {
        CRC32C(0, &block(seed))
    }

    impl Image {
        async fn new() -> Self {
            let store = Store::open(StoreConfig::new(Place::Memory)).expect("memory opens");
            let blocks = MAP_PAGE_BLOCKS as u64 * 3 / 2;
            let new = NewVolume {
                name: "disk0",
                blocks,
                object_shift: 22,
                unix_secs: 1,
                settings: Settings::default(),
            };
            let made = volumes::create(&store, &new).await.expect("creates");
            let claim = Head { number: 2, term: 2, ..made };
            let head = Head {
                number: 3,
                epoch: EPOCH,
                pages: [0, 1].map(|page| (page, PageRef { source: 0, epoch: EPOCH })).into(),
                ..claim.clone()
            };
            let image = Self { store, head };
            image.put_pack(0, vec![run(2, 3, 4), run(20, 0, 1)], &[1, 2, 3, 4, 5]).await;
            image.put_pack(1, vec![run(4, 1023, 1), run(5, 0, 1)], &[6, 7]).await;
            image.put_map(0, &[(2 * 1024 + 3, 0, 0, &[1, 2, 3, 4]), (5 * 1024 - 1, 1, 0, &[6, 7])]);
            image.put_map(1, &[(4 * 1024, 0, 4, &[5])]);
            image.put_head(&claim);
            image.put_head(&image.head);
            image
        }

        fn put(&self, name: ObjectName, bytes: Vec<u8>) {
            let key = names::key(self.head.volume, name);
            // Nothing waits in a store that is memory.
            futures_util::FutureExt::now_or_never(self.store.put(
                &key,
                PutPayload::from(bytes),
                false,
            ))
            .expect("memory answers at once")
            .expect("puts");
        }

        async fn put_pack(&self, n: u32, runs: Vec<Run>, seeds: &[u8]) {
            let crcs = seeds.iter().map(|&seed| crc(seed)).collect();
            let header = Header { volume: self.head.volume, epoch: EPOCH, n, runs, crcs };
            let mut bytes = header.encode(CRC32C);
            bytes.extend(seeds.iter().flat_map(|&seed| block(seed)));
            self.put(ObjectName::Pack { epoch: EPOCH, n }, bytes);
        }

        /// Runs as (first block in the page, pack, offset, seeds).
        fn put_map(&self, page: u32, runs: &[(u16, u32, u16, &[u8])]) {
            let crcs: Vec<Vec<u32>> =
                runs.iter().map(|run| run.3.iter().map(|&seed| crc(seed)).collect()).collect();
            let updates: Vec<Update<'_>> = runs
                .iter()
                .zip(&crcs)
                .map(|(&(first, n, offset, _), crcs)| Update {
                    first,
                    count: crcs.len() as u16,
                    data: Some(Data { pack: pack_ref(n), offset, crcs }),
                })
                .collect();
            let map = MapPage::default().apply(&updates);
            let bytes = map.encode(&[self.head.volume], page, EPOCH, CRC32C);
            self.put(ObjectName::Map { page, epoch: EPOCH }, bytes);
        }

        fn put_head(&self, head: &Head) {
            self.put(ObjectName::Head { number: head.number }, head.encode(CRC32C));
        }

        async fn get(&self, name: ObjectName) -> Vec<u8> {
            let key = names::key(self.head.volume, name);
            self.store.get(&key, None).await.expect("gets").to_vec()
        }

        async fn delete(&self, name: ObjectName) {
            self.store.delete(&names::key(self.head.volume, name)).await.expect("deletes");
        }

        async fn check(&self, deep: bool) -> Report {
            check(&self.store, self.head.volume, deep).await.expect("memory does not fail")
        }

        /// The one error that both checks, or only the deep one, report.
        async fn expect(&self, shallow: bool, words: &str) {
            let report = self.check(true).await;
            assert_eq!(report.errors.len(), 1, "{words}: {:?}", report.errors);
            assert!(report.errors[0].contains(words), "{words}: {:?}", report.errors);
            assert_eq!(self.check(false).await.errors.len(), usize::from(shallow), "{words}");
        }
    }

    /// Pack 0 has two runs and 5 blocks, the others two runs and 2 blocks.
    fn pack_ref(n: u32) -> PackRef {
        let header_bytes = header_bytes(2, if n == 0 { 5 } else { 2 });
        PackRef { source: 0, epoch: EPOCH, n, header_bytes }
    }

    const HEADER: usize = header_bytes(2, 5) as usize;

    fn pack(n: u32) -> ObjectName {
        ObjectName::Pack { epoch: EPOCH, n }
    }

    #[tokio::test]
    async fn a_good_image_has_no_errors() {
        let image = Image::new().await;
        for deep in [false, true] {
            let report = image.check(deep).await;
            let expected = Report {
                head: Some(image.head.clone()),
                map_pages: 2,
                blocks_mapped: 7,
                packs: 2,
                blocks_checked: if deep { 7 } else { 0 },
                ..Report::default()
            };
            assert_eq!(report, expected);
        }
    }

    /// A snapshot needs the old map and its packs, the newest image a pack over the map.
    #[tokio::test]
    async fn snapshots_and_the_tail_are_checked() {
        let image = Image::new().await;
        let epoch = Epoch(EPOCH.0 + 1);
        let snapshot = Snapshot {
            name: "a".into(),
            number: 3,
            epoch: EPOCH,
            blocks: image.head.blocks,
            created_unix_secs: 5,
            deleting: false,
        };
        let runs = vec![Run { zero: true, ..run(2, 0, 1024) }, run(20, 0, 1)];
        let header = Header { volume: image.head.volume, epoch, n: 0, runs, crcs: vec![crc(9)] };
        let bytes = [header.encode(CRC32C), block(9)].concat();
        let name = ObjectName::Pack { epoch, n: 0 };
        image.put(name, bytes.clone());
        let tail = vec![TailPack { source: 0, epoch, n: 0, header_bytes: header.bytes() }];
        let snapshots = vec![snapshot];
        let newest = Head { number: 4, epoch, tail, snapshots, ..image.head.clone() };
        image.put_head(&newest);
        let report = image.check(true).await;
        assert_eq!((&report.errors[..], &report.orphans[..]), (&[][..], &[][..]));
        // Of the newest: blocks 1023 of object 4 and 0 of 5, and the new one.
        assert_eq!((report.blocks_mapped, report.packs, report.blocks_checked), (3, 3, 8));
        let mut damaged = bytes.clone();
        damaged[70] ^= 1;
        image.put(name, damaged);
        let report = image.check(false).await;
        assert!(report.errors[0].ends_with("checksum mismatch"), "{:?}", report.errors);
        image.put(name, bytes);
        image.delete(pack(0)).await;
        image.expect(true, "is missing; the map needs 5 of its blocks").await;
    }

    /// A clone's image lies in its parent, and lacks what that has lost.
    #[tokio::test]
    async fn a_clone_is_checked_in_its_parent() {
        let image = Image::new().await;
        let volume = Uuid([0xc1; 16]);
        let clone = Head {
            number: 1,
            term: 1,
            epoch: Epoch::ZERO,
            volume,
            sources: vec![Source { volume: image.head.volume, number: 3 }],
            pages: [0, 1].map(|page| (page, PageRef { source: 1, epoch: EPOCH })).into(),
            ..image.head.clone()
        };
        let key = names::head_key(volume, 1);
        image.store.put(&key, clone.encode(CRC32C).into(), true).await.expect("puts");
        image.put(ObjectName::Child { number: 3, clone: volume }, vec![b'?']);
        let report = check(&image.store, volume, true).await.expect("memory does not fail");
        assert_eq!((&report.errors[..], &report.orphans[..]), (&[][..], &[][..]));
        assert_eq!((report.blocks_mapped, report.blocks_checked), (7, 7));
        image.delete(pack(1)).await;
        let report = check(&image.store, volume, true).await.expect("memory does not fail");
        assert_eq!(report.errors.len(), 1, "{:?}", report.errors);
    }

    #[tokio::test]
    async fn what_no_image_needs_is_an_orphan() {
        let image = Image::new().await;
        let volume = image.head.volume;
        let old = Head { number: 4, written_unix_secs: 5, ..image.head.clone() };
        let newest = Head { number: 5, ..old.clone() };
        image.put_head(&old);
        image.put_head(&newest);
        image.put(pack(9), vec![0; 10]);
        image.put(ObjectName::Map { page: 1, epoch: Epoch(7) }, vec![0; 20]);
        let strange = format!("{}notes.txt", names::volume_prefix(volume));
        image.store.put(&strange, vec![0; 30].into(), false).await.expect("puts");
        let report = image.check(true).await;
        assert_eq!(report.errors, [""; 0]);
        let mut expected = [3, 4].map(|n| names::head_key(volume, n)).to_vec();
        expected.push(names::map_key(volume, 1, Epoch(7)));
        expected.push(strange);
        expected.push(names::pack_key(volume, EPOCH, 9));
        assert_eq!(report.orphans, expected);
        let heads = (old.encode(CRC32C).len() + image.head.encode(CRC32C).len()) as u64;
        assert_eq!(report.orphan_bytes, 60 + heads);
    }

    #[tokio::test]
    async fn damage_to_packs_is_found() {
        let image = Image::new().await;
        let good = image.get(pack(0)).await;
        let with = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            bytes
        };
        image.put(pack(0), with(HEADER + 2 * BLOCK_BYTES + 17));
        let first = "1 blocks do not match their checksum, first block 5 of object 2";
        image.expect(false, first).await;
        image.put(pack(0), with(HEADER + 4 * BLOCK_BYTES));
        image.expect(false, "first block 0 of object 20").await;
        image.put(pack(0), with(70));
        image.expect(false, "checksum mismatch").await;
        image.put(pack(0), good[..good.len() - 1].to_vec());
        image.expect(true, "has 20579 bytes instead of 20580; the map needs 5 of its blocks").await;
        image.put(pack(0), [&good[..], &[0]].concat());
        image.expect(false, "its header says 20580").await;
        image.put(pack(0), image.get(pack(1)).await.repeat(3));
        image.expect(false, "that of another pack").await;
        image.put(pack(0), vec![0; GET_BYTES_MAX as usize + 1]);
        image.expect(false, "more than any object of ours").await;
        image.put(pack(0), good[..BLOCK_BYTES].to_vec());
        image.expect(true, "has 4096 bytes instead of 20580").await;
        assert_eq!(image.check(true).await.orphans, [""; 0], "damaged is not unused");
        image.delete(pack(0)).await;
        image.expect(true, "is missing; the map needs 5 of its blocks").await;
        assert_eq!(image.check(true).await.blocks_checked, 2);
    }

    #[tokio::test]
    async fn packs_that_are_not_what_the_map_says_are_found() {
        let image = Image::new().await;
        image.put_pack(1, vec![run(4, 1023, 1), run(6, 0, 1)], &[6, 7]).await;
        image.expect(false, "1 blocks are other blocks according to its header").await;
        image.put_pack(1, vec![run(4, 1023, 1), run(5, 0, 1)], &[6, 8]).await;
        let report = image.check(true).await;
        assert_eq!(report.errors.len(), 2, "{:?}", report.errors);
        assert!(report.errors[0].contains("have another checksum in its header than in the map"));
        assert!(
            report.errors[1].contains("do not match their checksum, first block 0 of object 5")
        );
    }

    #[tokio::test]
    async fn damage_to_the_map_is_found() {
        let image = Image::new().await;
        let page = ObjectName::Map { page: 1, epoch: EPOCH };
        let good = image.get(page).await;
        let mut bytes = good.clone();
        bytes[70] ^= 1;
        image.put(page, bytes);
        image.expect(true, "map page 1 of epoch 8589934593: checksum mismatch").await;
        image.put(pack(9), vec![0; 10]);
        let orphans = image.check(true).await.orphans;
        assert_eq!(orphans, [""; 0], "the damaged page may need any pack");
        image.delete(pack(9)).await;
        image.delete(page).await;
        image.expect(true, "is missing").await;
        image.put(page, good);
        assert_eq!(image.check(true).await.errors, [""; 0]);
        // One block inside the volume, one behind it.
        image.put_pack(2, vec![run(23, 1023, 1), run(24, 0, 1)], &[8, 9]).await;
        let end = MAP_PAGE_BLOCKS as u16 / 2;
        image.put_map(1, &[(4 * 1024, 0, 4, &[5]), (end - 1, 2, 0, &[8, 9])]);
        image.expect(true, "map page 1: 1 blocks behind the end of the volume").await;
    }

    #[tokio::test]
    async fn damage_to_heads_is_found() {
        let image = Image::new().await;
        let claim = ObjectName::Head { number: 2 };
        let good = image.get(claim).await;
        image.put(claim, good[..50].to_vec());
        image.expect(true, "head 2:").await;
        image.delete(claim).await;
        image.expect(true, "head 2, the owner's claim, is missing").await;
        image.put(ObjectName::Head { number: 3 }, vec![0; 200]);
        let report = image.check(true).await;
        assert_eq!((report.head, &report.orphans[..]), (None, &[][..]));
        assert_eq!(report.errors, ["head 3: wrong magic"]);
        for number in 1..=3 {
            image.delete(ObjectName::Head { number }).await;
        }
        assert_eq!(image.check(true).await.errors, ["there is no head"]);
    }
}
