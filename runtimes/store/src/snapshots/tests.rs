//! Clones, deletions and rollbacks on a store in memory, cut short at every request, and at once.

use heeler_core::ids::Epoch;
use heeler_core::wire::head::Settings;

use super::*;
use crate::check;
use crate::fault::{Fault, Faulty, Rates};
use crate::testing::{keys, memory};
use crate::volumes::NewVolume;
use crate::{Place, PutPayload, StoreConfig};

/// When most of this happens, and when nothing that was left behind counts any more.
const NOW: u64 = 1_000_000;
const LATER: u64 = NOW + RECORD_SECS_MAX;

fn name(text: &str) -> SnapshotName {
    text.parse().expect("a name")
}

/// `golden` with snapshots `v1` and `v2`.
async fn golden(store: &Store) -> Head {
    let new = NewVolume {
        name: "golden",
        blocks: 1 << 20,
        object_shift: 22,
        unix_secs: NOW,
        settings: Settings { description: "the first".into(), ..Settings::default() },
    };
    let made = volumes::create(store, &new).await.expect("creates");
    for (number, snapshot) in [(2, "v1"), (3, "v2")] {
        let edits = |head: &mut Head| {
            // As if an owner had pushed something before each.
            head.epoch = Epoch(1 << 32 | u64::from(number));
            head.pages.insert(number, PageRef { source: 0, epoch: head.epoch });
            head.tail.push(TailPack { source: 0, epoch: head.epoch, n: 0, header_bytes: 76 });
            Edit::Snapshot(snapshot.into()).apply(head);
            Ok(())
        };
        volumes::edit(store, "golden", NOW, edits).await.expect("edits");
    }
    Head { number: 3, ..made }
}

async fn delete_snapshot(store: &Store, snapshot: &str, at: u64) -> Result<(), VolumeError> {
    let name = name(snapshot);
    let edits = async |change| edit(store, &name.volume, at, &change).await;
    delete(store, &name, at, edits).await
}

#[tokio::test]
async fn a_clone_has_the_image_of_its_snapshot() {
    let store = memory();
    let golden = golden(&store).await;
    let made = clone(&store, &name("golden@v1"), "web", NOW).await.expect("clones");
    let parent = Source { volume: golden.volume, number: 2 };
    assert_eq!((made.sources.as_slice(), made.number, made.released), (&[parent][..], 1, true));
    assert_eq!(made.pages[&2], PageRef { source: 1, epoch: Epoch(1 << 32 | 2) });
    assert_eq!((made.tail.len(), made.tail[0].source), (1, 1));
    assert_eq!(made.settings, Settings::default(), "a description is the parent's own");
    let again = clone(&store, &name("golden@v1"), "web", NOW).await;
    assert_eq!(again, Err(VolumeError::Exists("web".into())));
    let held = clones(&store, golden.volume, LATER).await.expect("lists");
    let web = Clone { number: 2, volume: made.volume, name: "web".into() };
    assert_eq!(held, [web], "the one that was not made left nothing");

    // A clone of the clone lies in both.
    edit(&store, "web", NOW, &Edit::Snapshot("a".into())).await.expect("edits");
    let deep = clone(&store, &name("web@a"), "deep", NOW).await.expect("clones");
    assert_eq!(deep.sources, [Source { volume: made.volume, number: 2 }, parent]);
    assert_eq!(deep.pages[&2].source, 2);
    assert_eq!(clones(&store, golden.volume, LATER).await.expect("lists").len(), 2);
    let report = check::check(&store, deep.volume, false).await.expect("checks");
    assert!(!report.errors.iter().any(|e| e.contains("/child/")), "{:?}", report.errors);
    let record = names::child_key(golden.volume, 2, deep.volume);
    store.delete(&record).await.expect("deletes");
    let report = check::check(&store, deep.volume, false).await.expect("checks");
    assert!(report.errors[0].starts_with(&record), "{:?}", report.errors);
}

#[tokio::test]
async fn what_has_clones_is_not_deleted() {
    let store = memory();
    let golden = golden(&store).await;
    clone(&store, &name("golden@v1"), "web", NOW).await.expect("clones");
    let clones = vec!["web".to_string()];
    let refused = VolumeError::HasClones { name: "golden@v1".into(), clones: clones.clone() };
    assert_eq!(delete_snapshot(&store, "golden@v1", LATER).await, Err(refused.clone()));
    assert!(refused.to_string().contains("'golden@v1' has clones: web; delete"), "{refused}");
    let head = named_head(&store, "golden").await.expect("there");
    assert!(head.snapshots.iter().all(|snapshot| !snapshot.deleting));
    for force in [false, true] {
        let refused = VolumeError::HasClones { name: "golden".into(), clones: clones.clone() };
        let deleted = volumes::delete(&store, "golden", force, LATER).await;
        assert_eq!(deleted, Err(refused), "force {force}");
    }
    // The other one has none; and later snapshots stay when one before them goes.
    delete_snapshot(&store, "golden@v2", NOW).await.expect("deletes");
    volumes::delete(&store, "web", false, NOW).await.expect("deletes");
    delete_snapshot(&store, "golden@v1", NOW).await.expect("its clone took its record along");
    let missing = delete_snapshot(&store, "golden@v1", NOW).await;
    assert_eq!(missing, Err(VolumeError::NoSnapshot(name("golden@v1"))));
    let kept = [1, named_head(&store, "golden").await.expect("there").number];
    let heads = kept.map(|number| names::head_key(golden.volume, number));
    assert_eq!(keys(&store).await, [&heads[..], &["names/golden".into()]].concat());
}

/// A flattened clone lets go of its parent, but not while a snapshot of its own lies there.
#[tokio::test]
async fn a_flattened_clone_lets_go_of_its_parent() {
    let store = memory();
    let golden = golden(&store).await;
    clone(&store, &name("golden@v1"), "web", NOW).await.expect("clones");
    edit(&store, "web", NOW, &Edit::Snapshot("old".into())).await.expect("edits");
    let flatten = |head: &mut Head| {
        head.pages.clear();
        head.tail.clear();
        head.sources.clear();
        Ok(())
    };
    volumes::edit(&store, "web", NOW, flatten).await.expect("edits");
    assert_eq!(clones(&store, golden.volume, LATER).await.expect("lists").len(), 1);
    delete_snapshot(&store, "web@old", NOW).await.expect("deletes");
    assert_eq!(clones(&store, golden.volume, LATER).await.expect("lists"), []);
    delete_snapshot(&store, "golden@v1", NOW).await.expect("nobody needs it");
}

#[tokio::test]
async fn a_volume_with_snapshots_needs_force() {
    let store = memory();
    golden(&store).await;
    let refused = volumes::delete(&store, "golden", false, NOW).await;
    assert_eq!(refused, Err(VolumeError::HasSnapshots { name: "golden".into(), count: 2 }));
    volumes::delete(&store, "golden", true, NOW).await.expect("forced");
    assert_eq!(keys(&store).await, [""; 0]);
}

#[tokio::test]
async fn a_chain_of_clones_ends_where_a_head_does() {
    let store = memory();
    golden(&store).await;
    let mut from = name("golden@v1");
    for depth in 1..=SOURCES_MAX {
        let next = format!("c{depth}");
        clone(&store, &from, &next, NOW).await.expect("clones");
        edit(&store, &next, NOW, &Edit::Snapshot("s".into())).await.expect("edits");
        from = name(&format!("{next}@s"));
    }
    let refused = clone(&store, &from, "deeper", NOW).await.expect_err("too deep").to_string();
    assert!(refused.contains("flatten"), "{refused}");
}

#[tokio::test]
async fn a_rollback_is_believed_by_no_cache() {
    let store = memory();
    let golden = golden(&store).await;
    let grown = |head: &mut Head| {
        head.blocks *= 2;
        head.nonce = Nonce([7; 16]);
        head.cache = Uuid([8; 16]);
        Ok(())
    };
    volumes::edit(&store, "golden", NOW, grown).await.expect("edits");
    let before = named_head(&store, "golden").await.expect("there");
    rollback(&store, &name("golden@v1"), NOW).await.expect("rolls back");
    let then = open(&store, &name("golden@v1")).await.expect("kept");
    let head = named_head(&store, "golden").await.expect("there");
    assert_eq!((&head.pages, &head.tail, head.blocks), (&then.pages, &then.tail, then.blocks));
    assert_eq!((head.nonce, head.cache), (Nonce::default(), Uuid::default()));
    assert_eq!((head.number, head.epoch), (before.number + 1, before.epoch), "epochs ascend");
    assert_eq!((head.volume, &head.snapshots), (golden.volume, &before.snapshots));
    let owned = Head { number: 6, term: 6, released: false, ..head };
    let key = names::head_key(owned.volume, 6);
    store.put(&key, owned.encode(CRC32C).into(), true).await.expect("claims");
    let refused = rollback(&store, &name("golden@v1"), NOW).await;
    assert!(matches!(refused, Err(VolumeError::InUse { .. })), "{refused:?}");
}

/// A store whose first requests after the preparations go through, and then none for a while: what
/// a crash leaves behind.
async fn crashing(after: usize) -> (Store, Head) {
    let config = StoreConfig { attempts: 1, ..StoreConfig::new(Place::Memory) };
    let prepared = {
        let store = memory();
        golden(&store).await;
        store.counters()
    };
    let before = (prepared.gets + prepared.puts + prepared.deletes + prepared.lists) as usize;
    let plan = [vec![None; before + after], vec![Some(Fault::Refused); 100]].concat();
    let backend = Faulty::memory(1, Rates::default()).first(plan);
    let store = Store::with_backend(config, Box::new(backend));
    let golden = golden(&store).await;
    (store, golden)
}

/// The store answers again.
async fn recover(store: &Store) {
    // What was left of the requests that go through, then those that do not.
    while store.list("nothing/").await.is_ok() {}
    while store.list("nothing/").await.is_err() {}
}

#[tokio::test]
async fn a_clone_cut_short_is_whole_or_keeps_nothing() {
    let mut whole = 0;
    for after in 0..40 {
        let (store, golden) = crashing(after).await;
        let made = clone(&store, &name("golden@v1"), "web", NOW).await;
        recover(&store).await;
        match named_head(&store, "web").await {
            Ok(head) => {
                assert_eq!(head.sources.len(), 1);
                assert_eq!(clones(&store, golden.volume, LATER).await.expect("lists").len(), 1);
                delete_snapshot(&store, "golden@v1", LATER).await.expect_err("it has a clone");
                whole += 1;
            }
            Err(e) => {
                assert_eq!(e, VolumeError::Missing("web".into()), "after {after}");
                made.expect_err("not made");
                // At first it may be on its way still, after that the snapshot can go.
                let _ = clones(&store, golden.volume, NOW + 1).await.expect("lists");
                delete_snapshot(&store, "golden@v1", LATER).await.expect("nothing holds it");
                volumes::delete(&store, "golden", true, LATER).await.expect("deletes");
                assert_eq!(keys(&store).await, [""; 0], "after {after}");
            }
        }
    }
    assert!((10..40).contains(&whole), "{whole} of 40 were made");
}

#[tokio::test]
async fn a_deletion_cut_short_goes_on() {
    for after in 0..30 {
        let (store, _) = crashing(after).await;
        let deleted = delete_snapshot(&store, "golden@v1", NOW).await;
        recover(&store).await;
        let head = named_head(&store, "golden").await.expect("whole");
        if let Some(left) = head.snapshots.iter().find(|snapshot| snapshot.name == "v1") {
            deleted.expect_err("cut short");
            let made = clone(&store, &name("golden@v1"), "web", NOW).await;
            assert_eq!(made.is_err(), left.deleting, "after {after}");
            if made.is_ok() {
                volumes::delete(&store, "web", false, NOW).await.expect("deletes");
            }
            delete_snapshot(&store, "golden@v1", NOW).await.expect("goes on");
        }
        rollback(&store, &name("golden@v2"), NOW).await.expect("the other one is whole");
    }
}

#[tokio::test]
async fn a_rollback_cut_short_is_done_or_not() {
    for after in 0..12 {
        let (store, _) = crashing(after).await;
        let done = rollback(&store, &name("golden@v1"), NOW).await;
        recover(&store).await;
        let head = named_head(&store, "golden").await.expect("whole");
        let pages = head.pages.len();
        assert!(pages == 1 || pages == 2 && done.is_err(), "after {after}: {pages}");
        rollback(&store, &name("golden@v1"), NOW).await.expect("again");
    }
}

/// Clones and deletions at the same time, their requests failing, hanging and answered late in
/// hundreds of ways: never a clone without its snapshot.
#[tokio::test(start_paused = true)]
async fn clones_and_deletions_at_once() {
    let (mut cloned, mut deleted) = (0, 0);
    for seed in 0..300 {
        let store = memory();
        golden(&store).await;
        let entries = keys(&store).await;
        let rates = Rates { refused: 150, hangs: 0, lost: 60, hangs_after: 0 };
        let inner = Faulty::memory(seed, rates).first(vec![None; entries.len()]);
        let faulty = Store::with_backend(StoreConfig::new(Place::Memory), Box::new(inner));
        for key in entries {
            let bytes = store.get(&key, None).await.expect("listed");
            faulty.put(&key, PutPayload::from(bytes), false).await.expect("copied");
        }
        let from = name("golden@v1");
        let delayed = async |steps: u64| {
            tokio::time::sleep(Duration::from_millis(steps * 7)).await;
            delete_snapshot(&faulty, "golden@v1", NOW).await
        };
        let (made, gone) = tokio::join!(clone(&faulty, &from, "web", NOW), delayed(seed % 8));
        let head = loop {
            if let Ok(head) = named_head(&faulty, "golden").await {
                break head;
            }
        };
        let web = loop {
            match named_head(&faulty, "web").await {
                Err(VolumeError::Store(_)) => {}
                web => break web,
            }
        };
        let there = find(&head, &from).is_ok();
        if web.is_ok() {
            assert!(head.snapshots.iter().any(|s| s.name == "v1"), "seed {seed}: lost its image");
            assert!(gone.is_err(), "seed {seed}");
        }
        if made.is_ok() {
            assert!(web.is_ok(), "seed {seed}");
        }
        cloned += u32::from(web.is_ok());
        deleted += u32::from(!there);
    }
    assert!(cloned > 20 && deleted > 20, "{cloned} cloned, {deleted} deleted");
}
