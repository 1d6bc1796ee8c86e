//! What a store must offer, proven before it is trusted: a create is refused where the key is taken
//! and changes nothing there, of creates that race one wins, what was written is read and listed at
//! once, and parts of objects can be read.

use futures_util::future::join_all;
use object_store::PutPayload;

use crate::{ErrorKind, Store, StoreError, Unusable};

/// How the store keeps a second writer out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fencing {
    /// By refusing to create what is there.
    On,
    /// Not at all, which the user has allowed; what it does instead.
    Off(String),
}

/// A test that the store did not pass.
enum Failed {
    /// The store does not keep the rule of creates; what it did.
    Creates(String),
    /// For any other reason.
    Other(Unusable),
}

impl From<StoreError> for Failed {
    fn from(e: StoreError) -> Self {
        Self::Other(e.into())
    }
}

impl Store {
    /// Proves that the store is fit for volumes, with a dozen small requests; leaves nothing.
    /// Where it does not keep the rule of creates, and the settings allow that, creates are looked
    /// up before they are put from now on. Also removes what crashes have left of puts, where the
    /// store does not do so by itself.
    ///
    /// A race that is lost rarely can pass; a store that ignores the condition cannot.
    ///
    /// # Errors
    /// With the failed request or with what the store did wrong.
    pub async fn probe(&self) -> Result<Fencing, Unusable> {
        let mut number = [0; 16];
        getrandom::fill(&mut number).map_err(|e| {
            StoreError::new(ErrorKind::Permanent, format!("no randomness for a key: {e}"))
        })?;
        let key = format!("{PREFIX}/{:032x}", u128::from_le_bytes(number));
        let race = format!("{key}-race");
        let mut result = self.probe_with(&key, &race).await;
        for deleted in join_all([self.delete(&key), self.delete(&race)]).await {
            match deleted {
                Err(e) if e.kind == ErrorKind::Refused && result.is_ok() => result = Err(e.into()),
                Err(e) => log::warn!("the probe's key stays behind: {e}"),
                Ok(()) => {}
            }
        }
        self.sweep().await;
        result
    }

    async fn probe_with(&self, key: &str, race: &str) -> Result<Fencing, Unusable> {
        let fencing = match self.probe_creates(key, race).await {
            Ok(()) => Fencing::On,
            Err(Failed::Creates(what)) if self.config().single_writer_unsafe => Fencing::Off(what),
            Err(Failed::Creates(what)) => {
                return Err(Unusable::Unfit(format!("{what}. {NEEDS_CREATES}")));
            }
            Err(Failed::Other(e)) => return Err(e),
        };
        self.look_before_creates(fencing != Fencing::On);
        if fencing != Fencing::On {
            self.write(key, FIRST.into()).await?;
        }
        self.probe_reads(key).await?;
        Ok(fencing)
    }

    async fn probe_creates(&self, key: &str, race: &str) -> Result<(), Failed> {
        match self.create(key, FIRST.into()).await {
            // After an unknown outcome the key may hold the first bytes or nothing. A plain put
            // settles it, and the next create must still be refused.
            Err(e) if e.kind == ErrorKind::Timeout => self.write(key, FIRST.into()).await?,
            Err(e) if e.kind == ErrorKind::AlreadyExists => {
                return Err(Failed::Creates(format!("it refused a create of a new key: {e}")));
            }
            Err(e) if e.kind == ErrorKind::Permanent => {
                return Err(Failed::Creates(format!("it does not know such creates: {e}")));
            }
            result => result?,
        }
        match self.create(key, PutPayload::from_static(b"second")).await {
            Ok(()) => {
                return Err(Failed::Creates(
                    "it let a create overwrite an object that was there".into(),
                ));
            }
            Err(e) if e.kind == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e.into()),
        }
        let found = self.read_back(key).await.map_err(Failed::Other)?;
        if found != FIRST {
            return Err(Failed::Creates(
                "it refused a create of an object that was there, but changed the object".into(),
            ));
        }
        self.probe_race(race).await
    }

    async fn probe_race(&self, key: &str) -> Result<(), Failed> {
        let racers = (0..RACERS)
            .map(|n| async move { (n, self.create(key, PutPayload::from(vec![n])).await) });
        let mut winner = None;
        for (n, result) in join_all(racers).await {
            match result {
                Ok(()) if winner.is_some() => {
                    return Err(Failed::Creates("it let two creates of one key succeed".into()));
                }
                Ok(()) => winner = Some(n),
                Err(e) if e.kind == ErrorKind::AlreadyExists => {}
                // An unknown outcome may have been the winner: then this race shows nothing.
                Err(e) if e.kind == ErrorKind::Timeout => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
        let found = self.read_back(key).await.map_err(Failed::Other)?;
        if winner.is_none_or(|n| found[..] != [n]) {
            return Err(Failed::Creates(
                "the winner of a race of creates is not what the object holds".into(),
            ));
        }
        Ok(())
    }

    async fn probe_reads(&self, key: &str) -> Result<(), Unusable> {
        let unfit = |what: &str| Err(Unusable::Unfit(what.into()));
        if self.read_back(key).await? != FIRST {
            return unfit("it does not give what was just written");
        }
        let part = self.get(key, Some(1..3)).await;
        if part.as_deref() != Ok(&FIRST[1..3]) {
            let text = part.err().map_or_else(String::new, |e| format!(": {e}"));
            return unfit(&format!("it does not give parts of an object (Range){text}"));
        }
        let listed = self.list(PREFIX).await?;
        if !listed.iter().any(|entry| entry.key == key && entry.bytes == FIRST.len() as u64) {
            return unfit("it does not list what was just written");
        }
        Ok(())
    }

    async fn read_back(&self, key: &str) -> Result<Vec<u8>, Unusable> {
        match self.get(key, None).await {
            Ok(bytes) => Ok(bytes.to_vec()),
            Err(e) if e.kind == ErrorKind::NotFound => {
                Err(Unusable::Unfit("it does not find what was just written".into()))
            }
            Err(e) => Err(e.into()),
        }
    }
}

/// Where the probe's keys are.
const PREFIX: &str = "probe";
const FIRST: &[u8] = b"first";
/// Creates that are started at once.
const RACERS: u8 = 4;
const NEEDS_CREATES: &str = "Without create-if-absent (If-None-Match: *) two servers could own one \
                             volume: use another store, or, if there will never be a second \
                             server, --single-writer-unsafe";

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::time::Duration;

    use bytes::Bytes;
    use futures_util::future::BoxFuture;
    use tokio::time::sleep;

    use super::*;
    use crate::fault::{Faulty, Rates};
    use crate::{Backend, Entry, Place, StoreConfig};

    #[tokio::test(start_paused = true)]
    async fn the_probe_sees_through_faults() {
        let rates = Rates { refused: 50, hangs: 50, lost: 50, hangs_after: 50 };
        let mut fit = 0;
        for seed in 0..200 {
            let backend = Faulty::memory(seed, rates);
            let store = Store::with_backend(StoreConfig::new(Place::Memory), Box::new(backend));
            match store.probe().await {
                Ok(Fencing::On) => fit += 1,
                Err(Unusable::Store(_)) => {}
                other => panic!("seed {seed}: {other:?}"),
            }
        }
        assert!(fit > 50, "{fit} of 200");
    }

    /// Breaks one rule.
    #[derive(Debug)]
    struct Careless(Faulty, Carelessness);

    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Carelessness {
        Overwrites,
        RefusesAndOverwrites,
        /// Looks, then acts: right in sequence, wrong in a race.
        Races,
        /// Knows no conditions.
        Unable,
        ReadsLate,
        IgnoresRanges,
        ListsLate,
        KeepsAll,
    }

    use Carelessness::*;

    impl Backend for Careless {
        fn get<'a>(
            &'a self,
            key: &'a str,
            range: Option<Range<u64>>,
        ) -> BoxFuture<'a, Result<Bytes, StoreError>> {
            Box::pin(async move {
                match (self.1, &range) {
                    (ReadsLate, _) => Err(StoreError::new(ErrorKind::NotFound, "later")),
                    (IgnoresRanges, Some(_)) => {
                        Err(StoreError::new(ErrorKind::Permanent, "2 bytes wanted"))
                    }
                    _ => self.0.get(key, range).await,
                }
            })
        }

        fn put<'a>(
            &'a self,
            key: &'a str,
            payload: PutPayload,
            create: bool,
        ) -> BoxFuture<'a, Result<(), StoreError>> {
            Box::pin(async move {
                let exists = || Err(StoreError::new(ErrorKind::AlreadyExists, "exists"));
                let careful = !matches!(self.1, Overwrites | RefusesAndOverwrites | Races | Unable);
                if careful {
                    return self.0.put(key, payload, create).await;
                }
                let taken = create && self.0.get(key, None).await.is_ok();
                match self.1 {
                    Races if taken => return exists(),
                    Unable if create => {
                        return Err(StoreError::new(ErrorKind::Permanent, "not implemented"));
                    }
                    _ => {}
                }
                sleep(Duration::from_millis(1)).await;
                self.0.put(key, payload, false).await?;
                if taken && self.1 == RefusesAndOverwrites { exists() } else { Ok(()) }
            })
        }

        fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), StoreError>> {
            Box::pin(async move {
                match self.1 {
                    KeepsAll => Err(StoreError::new(ErrorKind::Refused, "may not delete")),
                    _ => self.0.delete(key).await,
                }
            })
        }

        fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
            Box::pin(async move {
                match self.1 {
                    ListsLate => Ok(Vec::new()),
                    _ => self.0.list(prefix).await,
                }
            })
        }
    }

    fn careless(how: Carelessness, single_writer_unsafe: bool) -> Store {
        let backend = Careless(Faulty::memory(1, Rates::default()), how);
        let config = StoreConfig { single_writer_unsafe, ..StoreConfig::new(Place::Memory) };
        Store::with_backend(config, Box::new(backend))
    }

    #[tokio::test(start_paused = true)]
    async fn careless_stores_are_refused() {
        for (how, word) in [
            (Overwrites, "overwrite"),
            (RefusesAndOverwrites, "changed"),
            (Races, "two creates"),
            (Unable, "does not know"),
        ] {
            let store = careless(how, false);
            let error = store.probe().await.expect_err("unfit").to_string();
            assert!(error.contains(word), "{how:?}: {error}");
            assert!(error.contains("--single-writer-unsafe"), "{how:?}: {error}");
            assert_eq!(store.list(PREFIX).await, Ok(Vec::new()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_writer_can_do_without_creates_but_not_without_the_rest() {
        for how in [Overwrites, RefusesAndOverwrites, Races, Unable] {
            let store = careless(how, true);
            let fencing = store.probe().await.expect("allowed");
            assert!(matches!(fencing, Fencing::Off(_)), "{how:?}");
            assert_eq!(store.list(PREFIX).await, Ok(Vec::new()));
            // It looks before it puts, so at least a second server that came before is found.
            store.put("head", FIRST.into(), true).await.expect("new");
            let again = store.put("head", PutPayload::from_static(b"second"), true).await;
            assert_eq!(again.expect_err("taken").kind, ErrorKind::AlreadyExists, "{how:?}");
            assert_eq!(store.get("head", None).await.as_deref(), Ok(FIRST), "{how:?}");
        }
        for single_writer_unsafe in [false, true] {
            for (how, word) in [
                (ReadsLate, "does not find"),
                (IgnoresRanges, "parts"),
                (ListsLate, "does not list"),
                (KeepsAll, "may not delete"),
            ] {
                let store = careless(how, single_writer_unsafe);
                let error = store.probe().await.expect_err("unfit").to_string();
                assert!(error.contains(word), "{how:?}: {error}");
            }
        }
    }

    #[tokio::test]
    async fn what_is_allowed_but_not_needed_is_not_done() {
        let config = StoreConfig { single_writer_unsafe: true, ..StoreConfig::new(Place::Memory) };
        let store = Store::open(config).expect("opens");
        assert_eq!(store.probe().await, Ok(Fencing::On));
        let before = store.counters();
        store.put("head", FIRST.into(), true).await.expect("new");
        assert_eq!(store.counters().gets, before.gets, "a create needs no look");
    }
}
