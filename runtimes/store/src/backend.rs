//! One try of one request. [`Store`](crate::Store) adds lanes, timeouts and retries.

use std::fmt;
use std::ops::Range;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use futures_util::future::BoxFuture;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    ClientConfigKey, GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt, PutMode,
    PutPayload, RetryConfig,
};

use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::config::is_loopback;
use crate::explain::{Target, Verb, explain};
use crate::{ConfigError, ErrorKind, Place, S3Options, StoreConfig, StoreError};

/// One object in a listing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The whole key.
    pub key: String,
    /// Its length in bytes.
    pub bytes: u64,
}

/// What a store can do, one try each. Dropping a future abandons the request; whether it takes
/// effect is then unknown.
pub trait Backend: fmt::Debug + Send + Sync {
    /// The object's bytes, or those of a range (not empty), all of it or an error.
    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
    ) -> BoxFuture<'a, Result<Bytes, StoreError>>;

    /// Stores an object; with `create` only if there is none. Durable when `Ok`.
    fn put<'a>(
        &'a self,
        key: &'a str,
        payload: PutPayload,
        create: bool,
    ) -> BoxFuture<'a, Result<(), StoreError>>;

    /// Removes an object. It is no error if there is none.
    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), StoreError>>;

    /// All objects whose keys begin with `prefix` and a slash, sorted by key.
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>>;

    /// Removes what crashes have left of puts and no listing shows.
    fn sweep(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// A directory, an S3 bucket or this process's memory.
#[derive(Debug)]
pub(crate) struct Remote {
    inner: Arc<dyn ObjectStore>,
    /// Empty, or what every key in the bucket begins with.
    prefix: String,
    target: Target,
    /// For the begin of an answer, or a page of a listing.
    patience: Duration,
    bytes_per_second_min: u64,
}

impl Remote {
    /// Connects nothing yet, except that a directory is created.
    pub(crate) fn open(config: &StoreConfig) -> Result<Self, ConfigError> {
        let remote = |inner, prefix: &str, target| Self {
            inner,
            prefix: prefix.into(),
            target,
            patience: config.request_timeout,
            bytes_per_second_min: config.bytes_per_second_min,
        };
        match &config.place {
            Place::Memory => Ok(remote(Arc::new(InMemory::new()), "", Target::Memory)),
            Place::Directory(path) => {
                let unusable = |e: &dyn fmt::Display| {
                    ConfigError(format!(
                        "the store directory {} cannot be used: {e}; name another with --store",
                        path.display()
                    ))
                };
                create_directory(path).map_err(|e| unusable(&e))?;
                let files = LocalFileSystem::new_with_prefix(path).map_err(|e| unusable(&e))?;
                // Each put syncs the file and its directory before it succeeds.
                let files = Arc::new(files.with_fsync(true));
                Ok(remote(files, "", Target::Directory(path.clone())))
            }
            Place::S3 { bucket, prefix, options } => {
                let builder = s3_builder(bucket, options, config)?;
                let endpoint = builder
                    .get_config_value(&AmazonS3ConfigKey::Endpoint)
                    .unwrap_or_else(|| "AWS".into());
                let inner = builder.build().map_err(|e| {
                    ConfigError(format!("the S3 settings for bucket '{bucket}' do not work: {e}"))
                })?;
                let target = Target::S3 { bucket: bucket.clone(), endpoint };
                Ok(remote(Arc::new(inner), prefix, target))
            }
        }
    }

    fn path(&self, verb: &str, key: &str) -> Result<Path, StoreError> {
        let full =
            if self.prefix.is_empty() { key.into() } else { format!("{}/{key}", self.prefix) };
        Path::parse(full).map_err(|e| {
            StoreError::new(ErrorKind::Permanent, format!("{verb} {key}: not a key: {e}"))
        })
    }

    fn error(&self, verb: Verb, key: &str, e: &object_store::Error) -> StoreError {
        explain(&self.target, verb, key, e)
    }

    async fn in_time<T>(
        &self,
        verb: Verb,
        key: &str,
        answer: impl Future<Output = T>,
    ) -> Result<T, StoreError> {
        timeout(self.patience, answer).await.map_err(|_| {
            let (verb, patience) = (verb.name(), self.patience);
            StoreError::new(
                ErrorKind::Transient,
                format!("{verb} {key}: no answer in {patience:?}"),
            )
        })
    }

    async fn get_checked(
        &self,
        key: &str,
        path: &Path,
        range: Option<Range<u64>>,
    ) -> Result<Bytes, StoreError> {
        let options =
            GetOptions { range: range.clone().map(GetRange::Bounded), ..GetOptions::default() };
        // Its body has a time of its own, by its length.
        let result = match self.in_time(Verb::Get, key, self.inner.get_opts(path, options)).await? {
            Ok(result) => result,
            Err(e) => {
                let error = self.error(Verb::Get, key, &e);
                return Err(match range {
                    Some(range)
                        if !matches!(error.kind, ErrorKind::NotFound | ErrorKind::Refused) =>
                    {
                        self.explain_range(key, path, range.end, error).await
                    }
                    _ => error,
                });
            }
        };
        self.collect(key, range, result).await
    }

    async fn collect(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        result: GetResult,
    ) -> Result<Bytes, StoreError> {
        // Checked before the body is read: a store must not make us hold what we did not ask for.
        let wanted = range.map_or(result.meta.size, |range| range.end - range.start);
        let offered = result.range.end.saturating_sub(result.range.start);
        if offered != wanted {
            return Err(short(key, wanted, offered));
        }
        if wanted > GET_BYTES_MAX {
            return Err(StoreError::new(
                ErrorKind::Permanent,
                format!("get {key}: {wanted} bytes are more than any object of ours has"),
            ));
        }
        let limit = self.patience + Duration::from_secs(wanted / self.bytes_per_second_min);
        let bytes = timeout(limit, result.bytes()).await.unwrap_or_else(|_| {
            Err(object_store::Error::Generic {
                store: "the store",
                source: format!("stopped in the middle of an answer, for {limit:?}").into(),
            })
        });
        let bytes = bytes.map_err(|e| self.error(Verb::Get, key, &e))?;
        if bytes.len() as u64 != wanted {
            return Err(short(key, wanted, bytes.len() as u64));
        }
        Ok(bytes)
    }

    /// Stores report a range past the end in different ways; the size settles whether that was it.
    async fn explain_range(
        &self,
        key: &str,
        path: &Path,
        end: u64,
        error: StoreError,
    ) -> StoreError {
        match self.inner.head(path).await {
            Ok(meta) if meta.size < end => short(key, end, meta.size),
            _ => error,
        }
    }
}

impl Backend for Remote {
    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
    ) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        Box::pin(async move {
            let path = self.path("get", key)?;
            self.get_checked(key, &path, range).await
        })
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        payload: PutPayload,
        create: bool,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let path = self.path("put", key)?;
            let (verb, mode) = if create {
                (Verb::Create, PutMode::Create)
            } else {
                (Verb::Put, PutMode::Overwrite)
            };
            match self.inner.put_opts(&path, payload, mode.into()).await {
                Ok(_) => Ok(()),
                Err(e) => Err(self.error(verb, key, &e)),
            }
        })
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let path = self.path("delete", key)?;
            match self.inner.delete(&path).await {
                Ok(()) => Ok(()),
                Err(e) => {
                    let error = self.error(Verb::Delete, key, &e);
                    if error.kind == ErrorKind::NotFound { Ok(()) } else { Err(error) }
                }
            }
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        Box::pin(async move {
            let path = self.path("list", prefix)?;
            let strip = if self.prefix.is_empty() { 0 } else { self.prefix.len() + 1 };
            let mut listed = self.inner.list(Some(&path));
            let mut entries = Vec::new();
            loop {
                // A page of the listing at a time: long ones may take long, but not stall.
                let next = self.in_time(Verb::List, prefix, listed.try_next()).await?;
                let Some(meta) = next.map_err(|e| self.error(Verb::List, prefix, &e))? else {
                    break;
                };
                let key = meta.location.as_ref().get(strip..).unwrap_or_default().into();
                entries.push(Entry { key, bytes: meta.size });
            }
            entries.sort_unstable_by(|a, b| a.key.cmp(&b.key));
            Ok(entries)
        })
    }

    fn sweep(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let Target::Directory(path) = self.target.clone() else { return };
            // If it fails it will be done another time.
            let _ = spawn_blocking(move || sweep_directory(&path)).await;
        })
    }
}

/// Removes files that puts have begun long ago: they are called as the object, `#` and a number.
fn sweep_directory(path: &FilePath) {
    let Ok(entries) = std::fs::read_dir(path) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let begun = name.to_str().and_then(|name| name.rsplit_once('#'));
        let begun = begun.is_some_and(|(_, number)| number.parse::<u32>().is_ok());
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => sweep_directory(&path),
            Ok(meta) if begun && meta.is_file() => {
                let age = meta.modified().ok().and_then(|time| time.elapsed().ok());
                if age.is_some_and(|age| age > LEFTOVER_AGE) {
                    match std::fs::remove_file(&path) {
                        Ok(()) => log::info!("removed {}: left by a crash", path.display()),
                        Err(e) => log::warn!("{} stays behind: {e}", path.display()),
                    }
                }
            }
            _ => {}
        }
    }
}

/// Creates a directory and what is missing above it, durably: what is put into it must not be lost
/// because the directory itself was.
fn create_directory(path: &FilePath) -> std::io::Result<()> {
    let missing: Vec<&FilePath> = path.ancestors().take_while(|dir| !dir.exists()).collect();
    std::fs::create_dir_all(path)?;
    for parent in missing.iter().filter_map(|dir| dir.parent()) {
        std::fs::File::open(parent)?.sync_all()?;
    }
    Ok(())
}

fn short(key: &str, wanted: u64, got: u64) -> StoreError {
    StoreError::new(
        ErrorKind::Permanent,
        format!("get {key}: {wanted} bytes wanted, the object gives {got}"),
    )
}

fn s3_builder(
    bucket: &str,
    options: &S3Options,
    config: &StoreConfig,
) -> Result<AmazonS3Builder, ConfigError> {
    // The HTTP client takes its TLS provider from the process. If another one is installed, that
    // one serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(region) = &options.region {
        builder = builder.with_region(region);
    }
    if let Some(key) = &options.access_key {
        builder = builder.with_access_key_id(key);
    }
    if let Some(key) = &options.secret_key {
        builder = builder.with_secret_access_key(&key.0);
    }
    if let Some(token) = &options.session_token {
        builder = builder.with_token(&token.0);
    }
    let set = |builder: &AmazonS3Builder, key| builder.get_config_value(&key);
    let endpoint = set(&builder, AmazonS3ConfigKey::Endpoint);
    let loopback = endpoint.as_deref().is_some_and(is_loopback);
    let client = AmazonS3ConfigKey::Client;
    let environment =
        set(&builder, client(ClientConfigKey::AllowHttp)).is_some_and(|v| v == "true");
    let allow_http = options.allow_http.unwrap_or(loopback || environment);
    if let Some(endpoint) = &endpoint {
        check_endpoint(endpoint, allow_http)?;
        if set(&builder, AmazonS3ConfigKey::AccessKeyId).is_none() {
            return Err(ConfigError(format!(
                "no access key for {endpoint}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )));
        }
    }
    if set(&builder, AmazonS3ConfigKey::AccessKeyId).is_some()
        && set(&builder, AmazonS3ConfigKey::SecretAccessKey).is_none()
    {
        return Err(ConfigError(
            "an access key without its secret; set AWS_SECRET_ACCESS_KEY".into(),
        ));
    }
    // One try a call: only the store client knows which requests may be tried again, and how long
    // each may take.
    let once = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    Ok(builder
        .with_virtual_hosted_style_request(false)
        .with_disable_bulk_delete(true)
        .with_unsigned_payload(options.unsigned_payload.unwrap_or(loopback))
        .with_retry(once)
        .with_allow_http(allow_http)
        .with_config(client(ClientConfigKey::Timeout), millis(config.list_timeout))
        .with_config(client(ClientConfigKey::ConnectTimeout), millis(config.connect_timeout)))
}

/// As the client's settings want it.
fn millis(span: Duration) -> String {
    format!("{}ms", span.as_millis())
}

fn check_endpoint(endpoint: &str, allow_http: bool) -> Result<(), ConfigError> {
    if endpoint.starts_with("https://") || (endpoint.starts_with("http://") && allow_http) {
        return Ok(());
    }
    Err(ConfigError(if endpoint.starts_with("http://") {
        format!(
            "{endpoint} is not encrypted; write https://, or allow it with allow_http (or \
             AWS_ALLOW_HTTP=true)"
        )
    } else {
        format!("endpoint '{endpoint}' is not a URL; write https://HOST[:PORT]")
    }))
}

/// No put is at work for so long.
const LEFTOVER_AGE: Duration = Duration::from_secs(3600);
/// Above the largest object that heeler writes: the head of a volume of 64 TiB, with 12 MiB.
pub(crate) const GET_BYTES_MAX: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn builder(options: &S3Options) -> Result<AmazonS3Builder, ConfigError> {
        s3_builder("b", options, &StoreConfig::new(Place::Memory))
    }

    fn options(endpoint: &str) -> S3Options {
        S3Options {
            endpoint: Some(endpoint.into()),
            region: Some("r".into()),
            access_key: Some("k".into()),
            secret_key: Some(crate::Secret("s".into())),
            ..S3Options::default()
        }
    }

    #[test]
    fn unencrypted_endpoints_need_permission_off_loopback() {
        let refused = builder(&options("http://10.0.0.1:9000")).expect_err("refused").to_string();
        assert!(refused.contains("allow_http"), "{refused}");
        let allowed = S3Options { allow_http: Some(true), ..options("http://10.0.0.1:9000") };
        for fine in [allowed, options("http://127.0.0.1:1"), options("https://s3.example.com")] {
            builder(&fine).expect("usable").build().expect("builds");
        }
        let refused = builder(&options("s3.example.com")).expect_err("refused").to_string();
        assert!(refused.contains("https://HOST"), "{refused}");
    }

    #[test]
    fn files_are_synced() {
        let path = crate::store::tests::scratch("synced");
        let remote =
            Remote::open(&StoreConfig::new(Place::Directory(path.clone()))).expect("opens");
        assert!(format!("{remote:?}").contains("fsync: true"));
        std::fs::remove_dir_all(path).expect("removes");
    }
}
