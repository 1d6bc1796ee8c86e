//! What every store must do, whatever it is made of.

use bytes::Bytes;
use futures_util::future::join_all;
use heeler_core::wire::head::Settings;
use heeler_store::check::check;
use heeler_store::volumes::{self, Listed, NewVolume, VolumeError};
use heeler_store::{Entry, ErrorKind, Fencing, PutPayload, Store, format};

/// A place that has stores by prefix.
pub(crate) trait Place {
    /// A client of the store at a prefix; the same store for the same prefix.
    fn store(&self, prefix: &str) -> Store;
}

/// Everything.
pub(crate) async fn keep(place: &impl Place) {
    objects(&place.store("objects")).await;
    prefixes(place).await;
    creates_that_race(place).await;
    whole_packs(&place.store("packs")).await;
    many_keys(&place.store("many")).await;
    what_was_written_is_there(place).await;
    puts_are_whole(place).await;
    probe_and_format(&place.store("format")).await;
    volumes_live(&place.store("volumes")).await;
}

fn text(text: &'static str) -> PutPayload {
    PutPayload::from_static(text.as_bytes())
}

async fn read(store: &Store, key: &str) -> Result<String, ErrorKind> {
    let bytes = store.get(key, None).await.map_err(|e| e.kind)?;
    Ok(String::from_utf8(bytes.to_vec()).expect("the test wrote text"))
}

async fn objects(store: &Store) {
    let pieces = ["ab", "", "cdef"].map(|piece| Bytes::from_static(piece.as_bytes()));
    store.put("v/one", pieces.into_iter().collect(), false).await.expect("puts");
    assert_eq!(read(store, "v/one").await.as_deref(), Ok("abcdef"));
    assert_eq!(&store.get("v/one", Some(2..5)).await.expect("gets")[..], b"cde");
    assert_eq!(&store.get("v/one", Some(0..6)).await.expect("gets")[..], b"abcdef");
    for past in [4..7, 6..7, 100..101] {
        let error = store.get("v/one", Some(past.clone())).await.expect_err("short");
        assert_eq!(error.kind, ErrorKind::Permanent, "{past:?}: {error}");
    }
    assert_eq!(read(store, "v/two").await, Err(ErrorKind::NotFound));
    let ranged = store.get("v/two", Some(0..1)).await.expect_err("missing");
    assert_eq!(ranged.kind, ErrorKind::NotFound, "{ranged}");

    store.put("v/two", text("new"), true).await.expect("creates");
    let again = store.put("v/two", text("newer"), true).await.expect_err("taken");
    assert_eq!(again.kind, ErrorKind::AlreadyExists, "{again}");
    assert_eq!(read(store, "v/two").await.as_deref(), Ok("new"), "what was there is unchanged");
    store.put("v/two", text("newest"), false).await.expect("overwrites");
    assert_eq!(read(store, "v/two").await.as_deref(), Ok("newest"));

    // A prefix is a folder, not the begin of a name.
    store.put("vv/three", text("x"), false).await.expect("puts");
    store.put("v/deep/er", text("x"), false).await.expect("puts");
    let entry = |key: &str, bytes| Entry { key: key.into(), bytes };
    let listed = store.list("v").await.expect("lists");
    assert_eq!(listed, [entry("v/deep/er", 1), entry("v/one", 6), entry("v/two", 6)]);
    assert_eq!(store.list("nothing").await, Ok(Vec::new()));

    store.delete("v/one").await.expect("deletes");
    store.delete("v/one").await.expect("deletes what is gone");
    assert_eq!(read(store, "v/one").await, Err(ErrorKind::NotFound));
    assert_eq!(store.list("v").await.expect("lists").len(), 2);
    // A name that is free again can be taken again.
    store.put("v/one", text("again"), true).await.expect("creates");
    assert_eq!(store.trouble().map(|trouble| trouble.text), None);
}

async fn prefixes(place: &impl Place) {
    let (one, other) = (place.store("prefix/one"), place.store("prefix/other"));
    one.put("a.b_c-d/e", text("one"), true).await.expect("creates");
    assert_eq!(read(&other, "a.b_c-d/e").await, Err(ErrorKind::NotFound));
    assert_eq!(other.list("a.b_c-d").await, Ok(Vec::new()));
    other.put("a.b_c-d/e", text("other"), true).await.expect("another object");
    let again = place.store("prefix/one");
    assert_eq!(read(&again, "a.b_c-d/e").await.as_deref(), Ok("one"));
    assert_eq!(again.list("a.b_c-d").await.expect("lists")[0].key, "a.b_c-d/e");
}

async fn creates_that_race(place: &impl Place) {
    let clients: Vec<Store> = (0..4).map(|_| place.store("race")).collect();
    for key in (0..40).map(|n| format!("head/{n:010}")) {
        let racers = clients.iter().enumerate().map(|(n, client)| {
            let key = &key;
            async move { client.put(key, PutPayload::from(vec![n as u8; 9000]), true).await }
        });
        let results = join_all(racers).await;
        let mut winners = Vec::new();
        for (n, result) in results.into_iter().enumerate() {
            match result {
                Ok(()) => winners.push(n as u8),
                Err(e) => assert_eq!(e.kind, ErrorKind::AlreadyExists, "{e}"),
            }
        }
        assert_eq!(winners.len(), 1, "{key} was created by {winners:?}");
        for client in &clients {
            let found = client.get(&key, None).await.expect("there");
            assert_eq!(found, vec![winners[0]; 9000], "{key} is not the winner's");
        }
    }
}

async fn whole_packs(store: &Store) {
    const BYTES: u64 = (8 << 20) + 4096;
    let pack: Vec<u8> = (0..BYTES as u32).map(|at| (at / 4096 + at % 251) as u8).collect();
    store.put("pack", PutPayload::from(pack.clone()), true).await.expect("creates");
    assert!(store.get("pack", None).await.expect("gets") == pack);
    // More at once than there are lanes, the last block among them.
    let reads = (0..100).map(|n| {
        let from = if n == 0 { BYTES - 4096 } else { n * 81_001 };
        let to = (from + 4096 * (1 + n % 20)).min(BYTES);
        async move { (from, store.get("pack", Some(from..to)).await) }
    });
    for (from, bytes) in join_all(reads).await {
        let bytes = bytes.expect("gets");
        assert!(bytes == pack[from as usize..][..bytes.len()], "at {from}");
    }
}

async fn many_keys(store: &Store) {
    // More than one page of a listing.
    let puts = (0..1100).map(|n| {
        let store = store.clone();
        async move { store.put(&format!("many/{n:04}"), PutPayload::from(vec![1]), false).await }
    });
    for result in join_all(puts).await {
        result.expect("puts");
    }
    let listed = store.list("many").await.expect("lists");
    assert_eq!(listed.len(), 1100);
    assert!(listed.is_sorted_by(|a, b| a.key < b.key));
    for result in join_all(listed.iter().map(|entry| store.delete(&entry.key))).await {
        result.expect("deletes");
    }
    assert_eq!(store.list("many").await, Ok(Vec::new()));
}

async fn what_was_written_is_there(place: &impl Place) {
    let (writer, reader) = (place.store("there"), place.store("there"));
    let checks = (0..30).map(|n| {
        let (writer, reader) = (&writer, &reader);
        async move {
            let key = format!("k/{n}");
            for content in ["first", "second, and longer"] {
                writer.put(&key, text(content), false).await.expect("puts");
                assert_eq!(read(reader, &key).await.as_deref(), Ok(content));
                let listed = reader.list("k").await.expect("lists");
                let bytes = content.len() as u64;
                assert!(listed.contains(&Entry { key: key.clone(), bytes }), "{key}");
            }
            writer.delete(&key).await.expect("deletes");
            assert_eq!(read(reader, &key).await, Err(ErrorKind::NotFound), "{key}");
            let listed = reader.list("k").await.expect("lists");
            assert!(listed.iter().all(|entry| entry.key != key), "{key}");
        }
    });
    join_all(checks).await;
}

/// A reader sees the old object or the new one, never parts of both.
async fn puts_are_whole(place: &impl Place) {
    const BYTES: usize = 1 << 20;
    let (writer, reader) = (place.store("whole"), place.store("whole"));
    let put = async |value: u8| writer.put("a", PutPayload::from(vec![value; BYTES]), false).await;
    put(0).await.expect("puts");
    let writes = async {
        for value in 1..20 {
            put(value).await.expect("puts");
        }
    };
    let reads = async {
        for _ in 0..20 {
            let bytes = reader.get("a", None).await.expect("gets");
            assert_eq!(bytes.len(), BYTES);
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a mixture");
        }
    };
    futures_util::join!(writes, reads);
}

async fn probe_and_format(store: &Store) {
    assert_eq!(format::check(store).await, Ok(false));
    let before = store.counters();
    assert_eq!(format::prepare(store).await, Ok(Fencing::On));
    let asked = store.counters();
    let requests = |c: heeler_store::Counters| c.gets + c.puts + c.deletes + c.lists;
    assert!(requests(asked) - requests(before) <= 20, "{asked:?}");
    assert_eq!(store.list("probe").await, Ok(Vec::new()));
    assert_eq!(read(store, "format").await.as_deref(), Ok("heeler-format 2\n"));
    assert_eq!(format::check(store).await, Ok(true));
    assert_eq!(format::prepare(store).await, Ok(Fencing::On));
}

async fn volumes_live(store: &Store) {
    let new = NewVolume {
        name: "disk0",
        blocks: 1 << 20,
        object_shift: 22,
        unix_secs: 1,
        settings: Settings::default(),
    };
    let made = volumes::create(store, &new).await.expect("creates");
    let again = volumes::create(store, &new).await;
    assert_eq!(again, Err(VolumeError::Exists("disk0".into())));
    let listed = volumes::list(store).await.expect("lists");
    assert_eq!(listed, [Listed { name: "disk0".into(), head: Ok(made.clone()) }]);
    let report = check(store, made.volume, true).await.expect("answers");
    assert_eq!((report.errors, report.orphans), (vec![], vec![]));
    volumes::delete(store, "disk0", false, 0).await.expect("deletes");
    for prefix in ["names", "volumes"] {
        assert_eq!(store.list(prefix).await, Ok(Vec::new()));
    }
}
