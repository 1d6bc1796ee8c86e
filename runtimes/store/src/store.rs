//! The client: lanes, timeouts, retries and counters around a backend.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use object_store::PutPayload;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::backend::{GET_BYTES_MAX, Remote};
use crate::explain::Verb;
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
    /// Creates look first.
    looks: AtomicBool,
    troubles: Mutex<Troubles>,
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

/// The store fails, and no request of the kind has succeeded since.
#[derive(Clone, Debug)]
pub struct Trouble {
    /// Since when.
    pub since: Instant,
    /// What the last failure was.
    pub text: String,
}

/// Kept apart, because a full or read-only store can be read all the same.
#[derive(Debug, Default)]
struct Troubles {
    reads: Option<Trouble>,
    writes: Option<Trouble>,
}

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
                looks: AtomicBool::new(config.single_writer_unsafe),
                troubles: Mutex::default(),
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

    /// What is wrong with the store now, by the requests so far.
    #[must_use]
    pub fn trouble(&self) -> Option<Trouble> {
        let troubles = self.shared.troubles.lock().expect("no panic holds it");
        troubles.writes.clone().or_else(|| troubles.reads.clone())
    }

    /// An object's bytes, or those of a range: all that was asked for, or an error.
    ///
    /// # Errors
    /// `NotFound`, `Transient`, `Refused` or `Permanent`.
    ///
    /// # Panics
    /// With an empty range.
    pub async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        assert!(range.as_ref().is_none_or(|range| range.start < range.end), "empty range");
        let shared = &*self.shared;
        add(&shared.counted.gets, 1);
        let wanted = range.as_ref().map_or(GET_BYTES_MAX, |range| range.end - range.start);
        let limit = self.limit(wanted);
        let bytes = self
            .run(&shared.reads, limit, Verb::Get, key, || shared.backend.get(key, range.clone()))
            .await?;
        add(&shared.counted.get_bytes, bytes.len() as u64);
        Ok(bytes)
    }

    /// Stores an object; with `create` only if there is none. Durable when `Ok`.
    ///
    /// # Errors
    /// `Transient`, `Refused` or `Permanent`; with `create` also `AlreadyExists`, and `Timeout`
    /// where the outcome is unknown: such a create is never tried again here, because its own
    /// first try could make the second one look refused.
    pub async fn put(
        &self,
        key: &str,
        payload: PutPayload,
        create: bool,
    ) -> Result<(), StoreError> {
        if !create {
            return self.write(key, payload).await;
        }
        if !self.shared.looks.load(Ordering::Relaxed) {
            return self.create(key, payload).await;
        }
        match self.get(key, Some(0..1)).await {
            Ok(_) => Err(StoreError::new(
                ErrorKind::AlreadyExists,
                format!("put {key}: is there already"),
            )),
            Err(e) if e.kind == ErrorKind::NotFound => self.write(key, payload).await,
            Err(e) => Err(e),
        }
    }

    /// A put that replaces what is there.
    pub(crate) async fn write(&self, key: &str, payload: PutPayload) -> Result<(), StoreError> {
        self.put_as(Verb::Put, key, payload).await
    }

    /// A put that the store refuses if anything is there.
    pub(crate) async fn create(&self, key: &str, payload: PutPayload) -> Result<(), StoreError> {
        self.put_as(Verb::Create, key, payload).await
    }

    async fn put_as(&self, verb: Verb, key: &str, payload: PutPayload) -> Result<(), StoreError> {
        let shared = &*self.shared;
        add(&shared.counted.puts, 1);
        let bytes = payload.content_length() as u64;
        self.run(&shared.writes, self.limit(bytes), verb, key, || {
            shared.backend.put(key, payload.clone(), verb == Verb::Create)
        })
        .await?;
        add(&shared.counted.put_bytes, bytes);
        Ok(())
    }

    /// How long a request that carries so many bytes may take.
    fn limit(&self, bytes: u64) -> Duration {
        let config = &self.shared.config;
        config.request_timeout + Duration::from_secs(bytes / config.bytes_per_second_min)
    }

    /// Removes an object. It is no error if there is none.
    ///
    /// # Errors
    /// `Transient`, `Refused` or `Permanent`.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let shared = &*self.shared;
        add(&shared.counted.deletes, 1);
        let limit = self.limit(0);
        self.run(&shared.writes, limit, Verb::Delete, key, || shared.backend.delete(key)).await
    }

    /// All objects whose keys begin with `prefix` and a slash, sorted by key.
    ///
    /// # Errors
    /// `Transient`, `Refused` or `Permanent`.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Entry>, StoreError> {
        let shared = &*self.shared;
        add(&shared.counted.lists, 1);
        let limit = shared.config.list_timeout;
        self.run(&shared.reads, limit, Verb::List, prefix, || shared.backend.list(prefix)).await
    }

    /// Removes what crashes have left of puts and no listing shows.
    pub(crate) async fn sweep(&self) {
        self.shared.backend.sweep().await;
    }

    /// Whether creates look for the key first, and then put: see [`Self::probe`].
    pub(crate) fn look_before_creates(&self, look: bool) {
        self.shared.looks.store(look, Ordering::Relaxed);
    }

    /// Tries until it succeeds, fails for good, or `attempts` are used up. The lane is held while
    /// a try runs, not during a pause.
    async fn run<T, F>(
        &self,
        lane: &Semaphore,
        limit: Duration,
        verb: Verb,
        key: &str,
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
                let create = verb == Verb::Create;
                let kind = if create { ErrorKind::Timeout } else { ErrorKind::Transient };
                let verb = verb.name();
                Err(StoreError::new(kind, format!("{verb} {key}: no answer in {limit:?}")))
            });
            drop(permit);
            self.note(verb, result.as_ref().err());
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

    /// Keeps the trouble of the store up to date by the outcome of a try.
    fn note(&self, verb: Verb, error: Option<&StoreError>) {
        let mut troubles = self.shared.troubles.lock().expect("no panic holds it");
        let Troubles { reads, writes } = &mut *troubles;
        match error.map(|e| (e.kind, &e.text)) {
            Some((ErrorKind::Transient | ErrorKind::Timeout | ErrorKind::Refused, text)) => {
                let trouble = if matches!(verb, Verb::Get | Verb::List) { reads } else { writes };
                let since = trouble.as_ref().map_or_else(Instant::now, |trouble| trouble.since);
                *trouble = Some(Trouble { since, text: text.clone() });
            }
            // It answered. What takes a put takes everything; a full store takes deletes.
            _ => match verb {
                Verb::Get | Verb::List => *reads = None,
                Verb::Put | Verb::Create => (*reads, *writes) = (None, None),
                Verb::Delete => {}
            },
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

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use futures_util::future::join_all;

    use super::*;
    use crate::Place;
    use crate::fault::{Fault, Faulty, Rates};
    use crate::testing::memory;

    /// A directory of this test's own.
    pub(crate) fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("heeler-store-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("creates a scratch directory");
        path
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
    async fn trouble_lasts_until_the_same_kind_succeeds() {
        let hangs = Some(Fault::Hangs);
        let faults = [hangs, None, None, None, hangs, None];
        let backend = Faulty::memory(1, Rates::default()).first(faults.to_vec());
        let config = StoreConfig { attempts: 1, ..StoreConfig::new(Place::Memory) };
        let store = Store::with_backend(config, Box::new(backend));
        let trouble = || store.trouble().map(|trouble| trouble.text);
        store.put("a", bytes("x"), false).await.expect_err("hangs");
        assert!(trouble().is_some_and(|text| text.contains("put a: no answer")));
        store.list("a").await.expect("lists");
        store.delete("a").await.expect("deletes");
        assert!(trouble().is_some(), "a full store can be read, and deleted from");
        store.put("a", bytes("x"), false).await.expect("puts");
        assert_eq!(trouble(), None);
        store.get("a", None).await.expect_err("hangs");
        assert!(trouble().is_some_and(|text| text.contains("get a")));
        store.get("a", None).await.expect("gets");
        assert_eq!(trouble(), None);
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
