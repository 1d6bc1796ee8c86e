//! Who had a volume, by its heads: heads that are claims are never deleted.

use heeler_core::wire::head::Head;
use heeler_core::wire::names::{self, Nonce, ObjectName, Uuid};

use crate::volumes::{CRC32C, VolumeError};
use crate::{ErrorKind, Store};

/// The claim that came next after the newest one made by one of `nonces`. Its image is the last one
/// that the owner of the nonces committed. `None` if none of them made a claim, or nobody made one
/// since.
///
/// # Errors
/// `Broken` or `Store`.
pub async fn claim_after(
    store: &Store,
    volume: Uuid,
    nonces: &[Nonce],
) -> Result<Option<Head>, VolumeError> {
    let listed = store.list(&names::head_prefix(volume)).await?;
    let mut numbers: Vec<u32> = listed
        .iter()
        .filter_map(|entry| match names::parse_key(&entry.key) {
            Some((_, ObjectName::Head { number })) => Some(number),
            _ => None,
        })
        .collect();
    numbers.sort_unstable();
    let mut next = None;
    for number in numbers.into_iter().rev() {
        let bytes = match store.get(&names::head_key(volume, number), None).await {
            Ok(bytes) => bytes,
            // Superseded since it was listed, so it was no claim.
            Err(e) if e.kind == ErrorKind::NotFound => continue,
            Err(e) => return Err(e.into()),
        };
        let head = Head::decode(&bytes, volume, number, CRC32C).map_err(|e| {
            VolumeError::Broken { name: volume.to_string(), what: format!("head {number}: {e}") }
        })?;
        if nonces.contains(&head.nonce) {
            return Ok(next);
        }
        if head.is_claim() {
            next = Some(head);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use heeler_core::ids::Epoch;

    use super::*;
    use crate::{Place, StoreConfig};

    const VOLUME: Uuid = Uuid([7; 16]);

    async fn put(store: &Store, number: u32, term: u32, nonce: u8, cycle: u64) {
        let head = Head {
            number,
            term,
            nonce: Nonce([nonce; 16]),
            epoch: Epoch((u64::from(term) << 32) + cycle),
            ..Head::first(VOLUME, "disk0", 100, 22, 5)
        };
        let key = names::head_key(VOLUME, number);
        store.put(&key, head.encode(CRC32C).into(), true).await.expect("a new head");
    }

    #[tokio::test]
    async fn the_claim_that_ended_an_ownership_is_found() {
        let store = Store::open(StoreConfig::new(Place::Memory)).expect("opens");
        // Ours, ours once more, another's with a commit, a third one's.
        put(&store, 2, 2, 1, 0).await;
        put(&store, 9, 9, 1, 0).await;
        put(&store, 20, 20, 2, 0).await;
        put(&store, 31, 31, 3, 0).await;
        put(&store, 32, 31, 3, 4).await;
        let after = async |nonce: u8| {
            let found = claim_after(&store, VOLUME, &[Nonce([nonce; 16])]).await;
            found.expect("readable").map(|head| head.number)
        };
        assert_eq!(after(1).await, Some(20));
        assert_eq!(after(2).await, Some(31));
        assert_eq!(after(3).await, None, "it has the volume still");
        assert_eq!(after(4).await, None, "it never had it");
    }
}
