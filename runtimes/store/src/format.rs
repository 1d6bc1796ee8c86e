//! The mark of a prefix that heeler uses: the object `format`, which says of what version
//! everything beside it is.

use object_store::PutPayload;

use heeler_core::wire::names::NAMES_PREFIX;

use crate::{ErrorKind, Fencing, Store, Unusable};

/// The version of what this heeler reads and writes.
pub const VERSION: u32 = 2;

/// Whether the prefix has the mark of this version; it may have none if there is no volume.
///
/// # Errors
/// If it belongs to another version or to something else, or the store fails.
pub async fn check(store: &Store) -> Result<bool, Unusable> {
    for last in [false, true] {
        match store.get(KEY, None).await {
            Ok(bytes) => return of_mark(&bytes).map(|()| true),
            Err(e) if e.kind == ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
        if store.list(NAMES_PREFIX).await?.is_empty() {
            return Ok(false);
        }
        if last {
            break;
        }
        // Whoever made a volume since has made the mark before.
    }
    Err(Unusable::Format(other_version("1")))
}

/// Makes sure that the store is fit for volumes, and that the prefix has the mark.
///
/// # Errors
/// If it is not, or the prefix belongs to another version or to something else.
pub async fn prepare(store: &Store) -> Result<Fencing, Unusable> {
    let marked = check(store).await?;
    let fencing = store.probe().await?;
    if !marked {
        match store.put(KEY, PutPayload::from(mark().into_bytes()), true).await {
            Ok(()) => log::info!("the store had no volumes: it is of format {VERSION} now"),
            // Another server was faster; of which version?
            Err(e) if e.kind == ErrorKind::AlreadyExists => {
                check(store).await?;
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(fencing)
}

fn of_mark(bytes: &[u8]) -> Result<(), Unusable> {
    if bytes == mark().as_bytes() {
        return Ok(());
    }
    let text = std::str::from_utf8(bytes).ok();
    let version = text.and_then(|text| text.strip_prefix(WORD)?.strip_suffix('\n')).map(str::trim);
    Err(Unusable::Format(match version {
        Some(version) if version.len() < 10 => other_version(version),
        _ => format!("the object '{KEY}' in it is not heeler's; name another prefix with --store"),
    }))
}

fn other_version(version: &str) -> String {
    format!(
        "it holds volumes of format {version}, and this heeler reads and writes format {VERSION}; \
         use the heeler that made them, or name another prefix with --store"
    )
}

fn mark() -> String {
    format!("{WORD} {VERSION}\n")
}

const KEY: &str = "format";
const WORD: &str = "heeler-format";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;

    async fn put(store: &Store, key: &str, text: &'static str) {
        store.put(key, PutPayload::from_static(text.as_bytes()), false).await.expect("puts");
    }

    #[tokio::test]
    async fn a_prefix_is_marked_once() {
        let store = memory();
        assert_eq!(check(&store).await, Ok(false));
        assert_eq!(prepare(&store).await, Ok(Fencing::On));
        assert_eq!(&store.get(KEY, None).await.expect("there")[..], b"heeler-format 2\n");
        put(&store, "names/disk0", "x").await;
        assert_eq!(check(&store).await, Ok(true));
        let puts = store.counters().puts;
        prepare(&store).await.expect("fit");
        assert_eq!(store.counters().puts, puts + 6, "the probe's alone");
    }

    #[tokio::test]
    async fn other_versions_and_strangers_are_refused() {
        for (text, says) in [
            ("heeler-format 3\n", "format 3, and this heeler reads and writes format 2"),
            ("heeler-format 22\n", "format 22"),
            ("mkfs.ext4\n", "not heeler's"),
            ("", "not heeler's"),
        ] {
            let store = memory();
            put(&store, KEY, text).await;
            for error in [check(&store).await.map(|_| ()), prepare(&store).await.map(|_| ())] {
                let error = error.expect_err(text).to_string();
                assert!(error.contains(says) && error.contains("--store"), "{text}: {error}");
            }
            assert_eq!(store.counters().puts, 1, "nothing is written beside it");
        }
    }

    #[tokio::test]
    async fn volumes_without_a_mark_are_of_the_first_version() {
        let store = memory();
        put(&store, "names/disk0", "x").await;
        let error = prepare(&store).await.expect_err("refused").to_string();
        assert!(error.contains("format 1"), "{error}");
    }
}
