//! The client: lanes, timeouts, retries and counters around a backend.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use object_store::PutPayload;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::backend::Remote;
use crate::{Backend, ConfigError, Entry, ErrorKind, StoreConfig, StoreError};

/// The store as the rest of heeler sees it. Clones share everything: lanes, counters, connections.
/// Wants a tokio runtime with time (and I/O, for S3) enabled.
#[derive(Clone, Debug)]
pub struct Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    backend: Box<dyn Backend>,
    config: StoreConfig,
    reads: Semaphore,
    writes: Semaphore,
    counted: Counted,
    /// State of the generator of pauses.
    jitter: AtomicU64,
}

#[derive(Debug, Default)]
struct Counted {
    gets: AtomicU64,
    get_bytes: AtomicU64,
    puts: AtomicU64,
    put_bytes: AtomicU64,
    deletes: AtomicU64,
    lists: AtomicU64,
    retries: AtomicU64,
    failures: AtomicU64,
}

/// What has been asked of the store since it was opened. Bytes are payload of successful requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Gets begun.
    pub gets: u64,
    /// Bytes got.
    pub get_bytes: u64,
    /// Puts begun, creates included.
    pub puts: u64,
    /// Bytes put.
    pub put_bytes: u64,
    /// Deletes begun.
    pub deletes: u64,
    /// Listings begun.
    pub lists: u64,
    /// Tries after the first.
    pub retries: u64,
    /// Requests that ended in a failure other than `NotFound` and `AlreadyExists`.
    pub failures: u64,
}

/// Why a store cannot be trusted with volumes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProbeError {
    /// A request failed for a reason of its own.
    Store(StoreError),
    /// The store does not keep the rule on which ownership rests; what it did.
    Unfit(String),
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(e) => write!(f, "the store does not work: {e}"),
            Self::Unfit(what) => write!(
                f,
                "the store cannot be used: {what}. heeler needs a store that honours \
                 create-if-absent (If-None-Match: *), otherwise two servers could own one volume"
            ),
        }
    }
}

impl std::error::Error for ProbeError {}

impl Store {
    /// Opens the store. A directory is created; nothing is asked of a remote store yet (see
    /// [`Self::probe`]).
    ///
    /// # Errors
    /// With settings that cannot work, saying what to change.
    pub fn open(config: StoreConfig) -> Result<Self, ConfigError> {
        let remote = Remote::open(&config)?;
        Ok(Self::with_backend(config, Box::new(remote)))
    }

    /// A client with these limits for another backend; `config.place` does not matter.
    ///
    /// # Panics
    /// With a limit of zero.
    #[must_use]
    pub fn with_backend(config: StoreConfig, backend: Box<dyn Backend>) -> Self {
        assert!(config.reads_max > 0 && config.writes_max > 0 && config.attempts > 0);
        // Any odd number will do where the system has no randomness to give.
        let seed = getrandom::u64().unwrap_or(0x9e37_79b9_7f4a_7c15) | 1;
        Self {
            shared: Arc::new(Shared {
                backend,
                reads: Semaphore::new(config.reads_max),
                writes: Semaphore::new(config.writes_max),
                config,
                counted: Counted::default(),
                jitter: AtomicU64::new(seed),
            }),
        }
    }

    /// The settings it was opened with.
    #[must_use]
    pub fn config(&self) -> &StoreConfig {
        &self.shared.config
    }

    /// What has been asked so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let counted = &self.shared.counted;
        let read = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Counters {
            gets: read(&counted.gets),
            get_bytes: read(&counted.get_bytes),
            puts: read(&counted.puts),
            put_bytes: read(&counted.put_bytes),
            deletes: read(&counted.deletes),
            lists: read(&counted.lists),
            retries: read(&counted.retries),
            failures: read(&counted.failures),
        }
    }

    /// An object's bytes, or those of a range: all that was asked for, or an error.
    ///
    /// # Errors
    /// `NotFound`, `Transient` or `Permanent`.
    ///
    /// # Panics
    /// With an empty range.
    pub async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        assert!(range.as_ref().is_none_or(|range| range.start < range.end), "empty range");
        let shared = &*self.shared;
        add(&shared.counted.gets, 1);
        let limit = shared.config.request_timeout;
        let bytes = self
            .run(&shared.reads, limit, "get", key, false, || shared.backend.get(key, range.clone()))
            .await?;
        add(&shared.counted.get_bytes, bytes.len() as u64);
        Ok(bytes)
    }

    /// Stores an object; with `create` only if there is none. Durable when `Ok`.
    ///
    /// # Errors
    /// `Transient` or `Permanent`; with `create` also `AlreadyExists`, and `Timeout` where the
    /// outcome is unknown: such a create is never tried again here, because its own first try
    /// could make the second one look refused.
    pub async fn put(
        &self,
        key: &str,
        payload: PutPayload,
        create: bool,
    ) -> Result<(), StoreError> {
        let shared = &*self.shared;
        add(&shared.counted.puts, 1);
        let bytes = payload.content_length() as u64;
        let limit = shared.config.request_timeout;
        self.run(&shared.writes, limit, "put", key, create, || {
            shared.backend.put(key, payload.clone(), create)
        })
        .await?;
        add(&shared.counted.put_bytes, bytes);
        Ok(())
    }

    /// Removes an object. It is no error if there is none.
    ///
    /// # Errors
    /// `Transient` or `Permanent`.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let shared = &*self.shared;
        add(&shared.counted.deletes, 1);
        let limit = shared.config.request_timeout;
        self.run(&shared.writes, limit, "delete", key, false, || shared.backend.delete(key)).await
    }

    /// All objects whose keys begin with `prefix` and a slash, sorted by key.
    ///
    /// # Errors
    /// `Transient` or `Permanent`.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Entry>, StoreError> {
        let shared = &*self.shared;
        add(&shared.counted.lists, 1);
        let limit = shared.config.list_timeout;
        self.run(&shared.reads, limit, "list", prefix, false, || shared.backend.list(prefix)).await
    }

    /// Proves that the store works and that a create is refused where the key is taken: one after
    /// another, and when several race for one key. Leaves nothing behind.
    ///
    /// A race that is lost rarely can pass; a store that ignores the condition cannot.
    ///
    /// # Errors
    /// With the failed request or with what the store did wrong.
    pub async fn probe(&self) -> Result<(), ProbeError> {
        let mut number = [0; 16];
        getrandom::fill(&mut number).map_err(|e| {
            ProbeError::Store(StoreError::new(ErrorKind::Permanent, format!("no randomness: {e}")))
        })?;
        let key = format!("probe/{:032x}", u128::from_le_bytes(number));
        let race = format!("{key}-race");
        let result = match self.probe_serial(&key).await {
            Ok(()) => self.probe_race(&race).await,
            failed => failed,
        };
        for key in [&key, &race] {
            if let Err(e) = self.delete(key).await {
                log::warn!("the probe's key stays behind: {e}");
            }
        }
        result
    }

    async fn probe_serial(&self, key: &str) -> Result<(), ProbeError> {
        match self.put(key, PutPayload::from_static(b"first"), true).await {
            // After an unknown outcome the key may hold the first bytes or nothing. A plain put
            // settles it, and the next create must still be refused.
            Err(e) if e.kind == ErrorKind::Timeout => {
                self.put(key, PutPayload::from_static(b"first"), false).await
            }
            Err(e) if e.kind == ErrorKind::AlreadyExists => {
                return Err(ProbeError::Unfit(format!("it refused a create of a new key: {e}")));
            }
            result => result,
        }
        .map_err(ProbeError::Store)?;
        match self.put(key, PutPayload::from_static(b"second"), true).await {
            Ok(()) => {
                return Err(ProbeError::Unfit(
                    "it let a create overwrite an object that was there".into(),
                ));
            }
            Err(e) if e.kind == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(ProbeError::Store(e)),
        }
        let found = self.get(key, None).await.map_err(ProbeError::Store)?;
        if &found[..] != b"first" {
            return Err(ProbeError::Unfit(
                "it refused a create of an object that was there, but changed the object".into(),
            ));
        }
        Ok(())
    }

    async fn probe_race(&self, key: &str) -> Result<(), ProbeError> {
        let racers = (0..PROBE_RACERS)
            .map(|n| async move { (n, self.put(key, PutPayload::from(vec![n]), true).await) });
        let mut winner = None;
        for (n, result) in join_all(racers).await {
            match result {
                Ok(()) if winner.is_some() => {
                    return Err(ProbeError::Unfit("it let two creates of one key succeed".into()));
                }
                Ok(()) => winner = Some(n),
                Err(e) if e.kind == ErrorKind::AlreadyExists => {}
                // An unknown outcome may have been the winner: then this race shows nothing.
                Err(e) if e.kind == ErrorKind::Timeout => return Ok(()),
                Err(e) => return Err(ProbeError::Store(e)),
            }
        }
        let found = self.get(key, None).await.map_err(ProbeError::Store)?;
        if winner.is_none_or(|n| found[..] != [n]) {
            return Err(ProbeError::Unfit(
                "the winner of a race of creates is not what the object holds".into(),
            ));
        }
        Ok(())
    }

    /// Tries until it succeeds, fails for good, or `attempts` are used up. The lane is held while
    /// a try runs, not during a pause.
    async fn run<T, F>(
        &self,
        lane: &Semaphore,
        limit: Duration,
        verb: &str,
        key: &str,
        create: bool,
        request: impl Fn() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let shared = &*self.shared;
        let mut pause = shared.config.backoff_first;
        let mut attempt = 1;
        loop {
            let permit = lane.acquire().await.expect("lanes are never closed");
            let result = timeout(limit, request()).await.unwrap_or_else(|_| {
                let kind = if create { ErrorKind::Timeout } else { ErrorKind::Transient };
                Err(StoreError::new(kind, format!("{verb} {key}: no answer in {limit:?}")))
            });
            drop(permit);
            let Err(error) = result else { return result };
            match error.kind {
                ErrorKind::NotFound | ErrorKind::AlreadyExists => return Err(error),
                ErrorKind::Transient if attempt < shared.config.attempts => {}
                _ => {
                    add(&shared.counted.failures, 1);
                    return Err(error);
                }
            }
            log::debug!("try {attempt}: {error}");
            add(&shared.counted.retries, 1);
            sleep(self.jittered(pause)).await;
            pause = (pause * 2).min(shared.config.backoff_max);
            attempt += 1;
        }
    }

    /// Between half of `pause` and all of it.
    fn jittered(&self, pause: Duration) -> Duration {
        // Xorshift (Marsaglia 2003). Two callers that draw the same number do no harm.
        let mut x = self.shared.jitter.load(Ordering::Relaxed);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.shared.jitter.store(x, Ordering::Relaxed);
        pause / 2 + (pause / 2).mul_f64(x as f64 / u64::MAX as f64)
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Creates that the probe starts at once.
const PROBE_RACERS: u8 = 4;

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::Place;
    use crate::fault::{Fault, Faulty, Rates};

    /// A directory of this test's own.
    pub(crate) fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("heeler-store-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("creates a scratch directory");
        path
    }

    fn memory() -> Store {
        Store::open(StoreConfig::new(Place::Memory)).expect("memory opens")
    }

    fn faulty(faults: &[Option<Fault>]) -> Store {
        let backend = Faulty::memory(1, Rates::default()).first(faults.to_vec());
        Store::with_backend(StoreConfig::new(Place::Memory), Box::new(backend))
    }

    fn bytes(text: &'static str) -> PutPayload {
        PutPayload::from_static(text.as_bytes())
    }

    async fn text(store: &Store, key: &str) -> Result<String, ErrorKind> {
        let bytes = store.get(key, None).await.map_err(|e| e.kind)?;
        Ok(String::from_utf8(bytes.to_vec()).expect("the test wrote text"))
    }

    async fn round_trip(store: &Store) {
        let pieces = ["ab", "", "cdef"].map(|piece| Bytes::from_static(piece.as_bytes()));
        store.put("v/one", pieces.into_iter().collect(), false).await.expect("puts");
        assert_eq!(text(store, "v/one").await.as_deref(), Ok("abcdef"));
        assert_eq!(&store.get("v/one", Some(2..5)).await.expect("gets")[..], b"cde");
        for past in [4..7, 6..7, 100..101] {
            let error = store.get("v/one", Some(past.clone())).await.expect_err("short");
            assert_eq!(error.kind, ErrorKind::Permanent, "{past:?}: {error}");
        }
        assert_eq!(text(store, "v/two").await, Err(ErrorKind::NotFound));
        let ranged = store.get("v/two", Some(0..1)).await.expect_err("missing");
        assert_eq!(ranged.kind, ErrorKind::NotFound);

        store.put("v/two", bytes("new"), true).await.expect("creates");
        let again = store.put("v/two", bytes("newer"), true).await.expect_err("taken");
        assert_eq!(again.kind, ErrorKind::AlreadyExists);
        assert_eq!(text(store, "v/two").await.as_deref(), Ok("new"));
        store.put("v/two", bytes("newest"), false).await.expect("overwrites");
        assert_eq!(text(store, "v/two").await.as_deref(), Ok("newest"));

        store.put("vv/three", bytes("x"), false).await.expect("puts");
        let listed = store.list("v").await.expect("lists");
        let entry = |key: &str, bytes| Entry { key: key.into(), bytes };
        assert_eq!(listed, [entry("v/one", 6), entry("v/two", 6)]);
        assert_eq!(store.list("nothing").await, Ok(Vec::new()));
        store.delete("v/one").await.expect("deletes");
        store.delete("v/one").await.expect("deletes what is gone");
        assert_eq!(text(store, "v/one").await, Err(ErrorKind::NotFound));
    }

    #[tokio::test]
    async fn memory_keeps_the_contract() {
        let store = memory();
        round_trip(&store).await;
        store.probe().await.expect("fit");
        assert_eq!(store.list("probe").await, Ok(Vec::new()));
        let other = memory();
        assert_eq!(text(&other, "v/two").await, Err(ErrorKind::NotFound));
    }

    #[tokio::test]
    async fn a_directory_keeps_the_contract() {
        let path = scratch("contract");
        let open = || {
            let url = format!("file://{}/deep/er", path.display());
            let config = StoreConfig::parse(&url, Default::default()).expect("parses");
            Store::open(config).expect("opens")
        };
        let store = open();
        round_trip(&store).await;
        store.probe().await.expect("fit");
        assert_eq!(store.list("probe").await, Ok(Vec::new()));
        assert_eq!(text(&open(), "v/two").await.as_deref(), Ok("newest"));
        // What a crash leaves of a put is neither listed nor in the way of the next one.
        std::fs::write(path.join("deep/er/v/four#1"), "half").expect("writes");
        assert_eq!(store.list("v").await.expect("lists").len(), 1);
        store.put("v/four", bytes("whole"), true).await.expect("creates");
        assert_eq!(text(&store, "v/four").await.as_deref(), Ok("whole"));
        std::fs::remove_dir_all(path).expect("removes");
    }

    #[tokio::test]
    async fn an_unusable_directory_is_named() {
        let path = scratch("unusable");
        let file = path.join("file");
        std::fs::write(&file, "").expect("writes");
        let error = Store::open(StoreConfig::new(Place::Directory(file.join("x"))))
            .expect_err("a file is no directory");
        assert!(error.to_string().contains("unusable") && error.to_string().contains("file/x"));
        std::fs::remove_dir_all(path).expect("removes");
    }

    #[tokio::test(start_paused = true)]
    async fn gets_puts_and_deletes_are_tried_again() {
        use Fault::*;
        let store = faulty(&[Some(Refused), Some(Lost), Some(Hangs), None]);
        store.put("a", bytes("x"), false).await.expect("the fourth try succeeds");
        assert_eq!(store.counters().retries, 3);
        let store = faulty(&[None, Some(HangsAfter), Some(Refused), None]);
        store.put("a", bytes("x"), false).await.expect("puts");
        assert_eq!(text(&store, "a").await.as_deref(), Ok("x"));
        let store = faulty(&[None, Some(Lost)]);
        store.put("a", bytes("x"), false).await.expect("puts");
        store.delete("a").await.expect("deletes");
        let counters = store.counters();
        assert_eq!((counters.retries, counters.deletes, counters.failures), (1, 1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn tries_and_pauses_are_bounded() {
        let store = faulty(&[Some(Fault::Refused); 4]);
        let start = tokio::time::Instant::now();
        let error = store.get("a", None).await.expect_err("gives up");
        assert_eq!(error.kind, ErrorKind::Transient);
        let pauses = start.elapsed();
        assert!(pauses >= Duration::from_millis(350) && pauses <= Duration::from_millis(710));
        assert_eq!(store.counters().failures, 1);
        // Nothing was tried a fifth time: the next request meets a healthy store.
        assert_eq!(text(&store, "a").await, Err(ErrorKind::NotFound));
    }

    #[tokio::test(start_paused = true)]
    async fn a_create_of_unknown_outcome_is_not_repeated() {
        for (fault, there) in
            [(Fault::Lost, true), (Fault::HangsAfter, true), (Fault::Hangs, false)]
        {
            let store = faulty(&[Some(fault)]);
            let error = store.put("a", bytes("x"), true).await.expect_err("unknown");
            assert_eq!(error.kind, ErrorKind::Timeout, "{fault:?}");
            assert_eq!(store.counters().retries, 0, "{fault:?}");
            assert_eq!(text(&store, "a").await.is_ok(), there, "{fault:?}");
        }
        let store = faulty(&[Some(Fault::Refused), None]);
        store.put("a", bytes("x"), true).await.expect("a refused try has no effect");
        assert_eq!(store.counters().retries, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn lanes_are_bounded_and_separate() {
        let config = StoreConfig {
            reads_max: 1,
            writes_max: 2,
            attempts: 1,
            ..StoreConfig::new(Place::Memory)
        };
        let hang = vec![Some(Fault::Hangs); 2];
        let backend = Faulty::memory(1, Rates::default()).first(hang);
        let store = Store::with_backend(config, Box::new(backend));
        let start = tokio::time::Instant::now();
        let put = |key| {
            let store = store.clone();
            async move {
                let result = store.put(key, bytes("x"), false).await;
                (result.is_ok(), start.elapsed())
            }
        };
        let writes = join_all([put("a"), put("b"), put("c")]);
        let read = async {
            tokio::task::yield_now().await;
            let kind = store.get("a", None).await.expect_err("missing").kind;
            (kind, start.elapsed())
        };
        let (writes, read) = futures_util::join!(writes, read);
        let limit = store.config().request_timeout;
        assert_eq!(read, (ErrorKind::NotFound, Duration::ZERO), "reads do not queue behind writes");
        assert!(!writes[0].0 && !writes[1].0);
        assert!(writes[2].0 && writes[2].1 >= limit, "the third write waited for the lane");
    }

    #[tokio::test(start_paused = true)]
    async fn the_probe_sees_through_faults() {
        let rates = Rates { refused: 50, hangs: 50, lost: 50, hangs_after: 50 };
        let mut fit = 0;
        for seed in 0..200 {
            let backend = Faulty::memory(seed, rates);
            let store = Store::with_backend(StoreConfig::new(Place::Memory), Box::new(backend));
            match store.probe().await {
                Ok(()) => fit += 1,
                Err(ProbeError::Store(_)) => {}
                Err(unfit) => panic!("seed {seed}: {unfit}"),
            }
        }
        assert!(fit > 50, "{fit} of 200");
    }

    /// Breaks the rule of creates in one of three ways.
    #[derive(Debug)]
    struct Careless(Faulty, Carelessness);

    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Carelessness {
        Overwrites,
        RefusesAndOverwrites,
        /// Looks, then acts: right in sequence, wrong in a race.
        Races,
    }

    impl Backend for Careless {
        fn get<'a>(
            &'a self,
            key: &'a str,
            range: Option<Range<u64>>,
        ) -> futures_util::future::BoxFuture<'a, Result<Bytes, StoreError>> {
            self.0.get(key, range)
        }

        fn put<'a>(
            &'a self,
            key: &'a str,
            payload: PutPayload,
            create: bool,
        ) -> futures_util::future::BoxFuture<'a, Result<(), StoreError>> {
            Box::pin(async move {
                let taken = create && self.0.get(key, None).await.is_ok();
                let exists = || Err(StoreError::new(ErrorKind::AlreadyExists, "exists"));
                if taken && self.1 == Carelessness::Races {
                    return exists();
                }
                sleep(Duration::from_millis(1)).await;
                self.0.put(key, payload, false).await?;
                if taken && self.1 == Carelessness::RefusesAndOverwrites {
                    exists()
                } else {
                    Ok(())
                }
            })
        }

        fn delete<'a>(
            &'a self,
            key: &'a str,
        ) -> futures_util::future::BoxFuture<'a, Result<(), StoreError>> {
            self.0.delete(key)
        }

        fn list<'a>(
            &'a self,
            prefix: &'a str,
        ) -> futures_util::future::BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
            self.0.list(prefix)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_probe_refuses_careless_stores() {
        use Carelessness::*;
        for (how, word) in
            [(Overwrites, "overwrite"), (RefusesAndOverwrites, "changed"), (Races, "two creates")]
        {
            let backend = Careless(Faulty::memory(1, Rates::default()), how);
            let store = Store::with_backend(StoreConfig::new(Place::Memory), Box::new(backend));
            let error = store.probe().await.expect_err("unfit");
            assert!(error.to_string().contains(word), "{how:?}: {error}");
            assert_eq!(store.list("probe").await, Ok(Vec::new()));
        }
    }

    #[tokio::test]
    async fn counters_count_payload() {
        let store = memory();
        store.put("a", bytes("12345"), false).await.expect("puts");
        store.get("a", Some(1..3)).await.expect("gets");
        store.get("b", None).await.expect_err("missing");
        store.list("a").await.expect("lists");
        let expected = Counters {
            gets: 2,
            get_bytes: 2,
            puts: 1,
            put_bytes: 5,
            lists: 1,
            ..Counters::default()
        };
        assert_eq!(store.counters(), expected);
    }
}
