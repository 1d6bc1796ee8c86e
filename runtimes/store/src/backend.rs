//! One try of one request. [`Store`](crate::Store) adds lanes, timeouts and retries.

use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use futures_util::future::BoxFuture;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::{HttpError, HttpErrorKind};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    ClientConfigKey, GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt, PutMode,
    PutPayload, RetryConfig,
};

use crate::config::is_loopback;
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
}

/// A directory, an S3 bucket or this process's memory.
#[derive(Debug)]
pub(crate) struct Remote {
    inner: Arc<dyn ObjectStore>,
    /// Empty, or what every key in the bucket begins with.
    prefix: String,
    service: Service,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Service {
    S3,
    Other,
}

impl Remote {
    /// Connects nothing yet, except that a directory is created.
    pub(crate) fn open(config: &StoreConfig) -> Result<Self, ConfigError> {
        let other = |inner| Self { inner, prefix: String::new(), service: Service::Other };
        match &config.place {
            Place::Memory => Ok(other(Arc::new(InMemory::new()))),
            Place::Directory(path) => {
                let unusable = |e: &dyn fmt::Display| {
                    ConfigError(format!(
                        "the store directory {} cannot be used: {e}",
                        path.display()
                    ))
                };
                create_directory(path).map_err(|e| unusable(&e))?;
                let files = LocalFileSystem::new_with_prefix(path).map_err(|e| unusable(&e))?;
                // Each put syncs the file and its directory before it succeeds.
                Ok(other(Arc::new(files.with_fsync(true))))
            }
            Place::S3 { bucket, prefix, options } => Ok(Self {
                inner: Arc::new(s3_builder(bucket, options, config)?.build().map_err(|e| {
                    ConfigError(format!("the S3 settings for bucket '{bucket}' do not work: {e}"))
                })?),
                prefix: prefix.clone(),
                service: Service::S3,
            }),
        }
    }

    fn path(&self, verb: &str, key: &str) -> Result<Path, StoreError> {
        let full =
            if self.prefix.is_empty() { key.into() } else { format!("{}/{key}", self.prefix) };
        Path::parse(full).map_err(|e| {
            StoreError::new(ErrorKind::Permanent, format!("{verb} {key}: not a key: {e}"))
        })
    }

    fn error(&self, verb: &str, key: &str, create: bool, e: &object_store::Error) -> StoreError {
        let kind = match (classify(e, self.service), create) {
            (Effect::Unknown, true) => ErrorKind::Timeout,
            (Effect::Unknown, false) => ErrorKind::Transient,
            (Effect::None(kind), _) => kind,
        };
        let words: String = e.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        let words = words.chars().take(ERROR_CHARS_MAX).collect::<String>();
        StoreError::new(kind, format!("{verb} {key}: {words}"))
    }

    async fn get_checked(
        &self,
        key: &str,
        path: &Path,
        range: Option<Range<u64>>,
    ) -> Result<Bytes, StoreError> {
        let options =
            GetOptions { range: range.clone().map(GetRange::Bounded), ..GetOptions::default() };
        let result = match self.inner.get_opts(path, options).await {
            Ok(result) => result,
            Err(e) => {
                let error = self.error("get", key, false, &e);
                return Err(match range {
                    Some(range) if error.kind != ErrorKind::NotFound => {
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
        let bytes = result.bytes().await.map_err(|e| self.error("get", key, false, &e))?;
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
            let mode = if create { PutMode::Create } else { PutMode::Overwrite };
            match self.inner.put_opts(&path, payload, mode.into()).await {
                Ok(_) => Ok(()),
                Err(e) => {
                    let mut error = self.error("put", key, create, &e);
                    if error.kind == ErrorKind::NotFound {
                        // A put names no object that could be missing: it is the bucket.
                        error.kind = ErrorKind::Permanent;
                    }
                    Err(error)
                }
            }
        })
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let path = self.path("delete", key)?;
            match self.inner.delete(&path).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(e) => Err(self.error("delete", key, false, &e)),
            }
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        Box::pin(async move {
            let path = self.path("list", prefix)?;
            let strip = if self.prefix.is_empty() { 0 } else { self.prefix.len() + 1 };
            let mut entries: Vec<Entry> = self
                .inner
                .list(Some(&path))
                .map_ok(|meta| Entry {
                    key: meta.location.as_ref().get(strip..).unwrap_or_default().into(),
                    bytes: meta.size,
                })
                .try_collect()
                .await
                .map_err(|e| self.error("list", prefix, false, &e))?;
            entries.sort_unstable_by(|a, b| a.key.cmp(&b.key));
            Ok(entries)
        })
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

/// What a failed try did to the store.
enum Effect {
    /// Nothing, for this reason.
    None(ErrorKind),
    /// It may have been carried out, or may still be.
    Unknown,
}

fn classify(error: &object_store::Error, service: Service) -> Effect {
    use object_store::Error as E;
    match error {
        E::NotFound { .. } => Effect::None(ErrorKind::NotFound),
        // A refused precondition arrives wrapped in an error of the library. A bare 409 only says
        // that somebody else was at work on the key: that proves nothing about what is there now.
        E::AlreadyExists { source, .. } => match service {
            Service::S3 if !source.is::<object_store::Error>() => Effect::Unknown,
            _ => Effect::None(ErrorKind::AlreadyExists),
        },
        E::PermissionDenied { .. }
        | E::Unauthenticated { .. }
        | E::InvalidPath { .. }
        | E::NotSupported { .. }
        | E::NotImplemented { .. }
        | E::UnknownConfigurationKey { .. } => Effect::None(ErrorKind::Permanent),
        _ => classify_chain(error),
    }
}

/// Looks for the reason in the chain of sources: the library wraps it in types of its own.
fn classify_chain(error: &(dyn Error + 'static)) -> Effect {
    let mut next = Some(error);
    while let Some(e) = next {
        if let Some(http) = e.downcast_ref::<HttpError>()
            && http.kind() == HttpErrorKind::Connect
        {
            return Effect::None(ErrorKind::Transient);
        }
        if let Some(io) = e.downcast_ref::<std::io::Error>()
            && matches!(
                io.kind(),
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
            )
        {
            return Effect::None(ErrorKind::Permanent);
        }
        next = e.source();
    }
    match status(&error.to_string()) {
        Some(408 | 425 | 429) => Effect::None(ErrorKind::Transient),
        Some(400..=499 | 501) => Effect::None(ErrorKind::Permanent),
        _ => Effect::Unknown,
    }
}

/// The HTTP status in an error's text: the library keeps the number in private types.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
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
    // One try a call: only the store client knows which requests may be tried again.
    let once = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    Ok(builder
        .with_virtual_hosted_style_request(false)
        .with_disable_bulk_delete(true)
        .with_unsigned_payload(options.unsigned_payload.unwrap_or(loopback))
        .with_retry(once)
        .with_allow_http(allow_http)
        .with_config(client(ClientConfigKey::Timeout), millis(config.request_timeout))
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

/// Above the largest object that heeler writes: the head of a volume of 64 TiB, with 12 MiB.
pub(crate) const GET_BYTES_MAX: u64 = 16 << 20;
/// A store's error page does not belong into a log line whole.
const ERROR_CHARS_MAX: usize = 400;

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

    #[test]
    fn the_status_is_found_in_the_text() {
        assert_eq!(status("x: Server returned non-2xx status code: 503 Slow Down: y"), Some(503));
        assert_eq!(status("status code: "), None);
        assert_eq!(status("connection reset"), None);
    }
}
