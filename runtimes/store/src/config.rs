//! Where the store is and how hard it may be driven.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// A value that must not reach a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// How to reach an S3 service. What is `None` is taken from the environment (`AWS_ENDPOINT_URL`,
/// `AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`,
/// `AWS_ALLOW_HTTP`).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct S3Options {
    /// URL of the service. AWS if given nowhere.
    pub endpoint: Option<String>,
    /// Region name.
    pub region: Option<String>,
    /// Access key.
    pub access_key: Option<String>,
    /// Secret key.
    pub secret_key: Option<Secret>,
    /// Token of temporary credentials.
    pub session_token: Option<Secret>,
    /// Talk HTTP without TLS. An endpoint on a loopback address needs no permission.
    pub allow_http: Option<bool>,
    /// Leave the payload out of the signature, which saves hashing every byte. Unless given: only
    /// on a loopback address.
    pub unsigned_payload: Option<bool>,
}

/// Where the objects are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// A directory; created if missing.
    Directory(PathBuf),
    /// A bucket of an S3 service, which must exist.
    S3 {
        /// Its name.
        bucket: String,
        /// All keys begin with this and a slash, unless empty.
        prefix: String,
        /// How to reach it.
        options: S3Options,
    },
    /// This process; gone when the last clone of the store is dropped.
    Memory,
}

/// Where the store is, and every limit of the client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreConfig {
    /// Where the objects are.
    pub place: Place,
    /// Gets and listings in flight at most.
    pub reads_max: usize,
    /// Puts and deletes in flight at most. A lane of its own, so that a push never keeps a
    /// waiting reader out.
    pub writes_max: usize,
    /// How often a request is tried before its failure is reported. A create is tried again only
    /// where the first try certainly had no effect.
    pub attempts: u32,
    /// Pause before the second try; doubled before each further one. Each pause is drawn between
    /// half of this and all of it.
    pub backoff_first: Duration,
    /// Longest pause.
    pub backoff_max: Duration,
    /// How long one try of a request may take, and besides what its bytes take at
    /// `bytes_per_second_min`. Of a listing, each page.
    pub request_timeout: Duration,
    /// Slower than this a try is given up.
    pub bytes_per_second_min: u64,
    /// How long a whole listing may take.
    pub list_timeout: Duration,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// Use a store that does not keep the rule of creates. Then nothing keeps two servers from
    /// writing to one volume.
    pub single_writer_unsafe: bool,
}

/// A store that cannot be used as it was named; the text says what to change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigError(pub String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

impl StoreConfig {
    /// Reads `file:///absolute/path`, `s3://bucket[/prefix]` or `memory://`, with the default
    /// limits. `options` matter for S3 only.
    ///
    /// # Errors
    /// With what is wrong and what to write instead.
    pub fn parse(url: &str, options: S3Options) -> Result<Self, ConfigError> {
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err(ConfigError(format!("store '{url}' is not a URL; write {FORMS}")));
        };
        let place = match scheme {
            "file" => Place::Directory(directory(rest)?),
            "s3" => bucket(rest, options)?,
            "memory" if rest.is_empty() => Place::Memory,
            "memory" => {
                return Err(ConfigError(format!(
                    "nothing may follow memory:// (found '{rest}'): it has no name and no path"
                )));
            }
            _ => {
                return Err(ConfigError(format!(
                    "store '{url}' has the unknown scheme '{scheme}'; write {FORMS}"
                )));
            }
        };
        Ok(Self::new(place))
    }

    /// The default limits for this place.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self {
            place,
            reads_max: 32,
            writes_max: 8,
            attempts: 4,
            backoff_first: Duration::from_millis(100),
            backoff_max: Duration::from_secs(2),
            request_timeout: Duration::from_secs(10),
            bytes_per_second_min: 256 << 10,
            list_timeout: Duration::from_secs(300),
            connect_timeout: Duration::from_secs(5),
            single_writer_unsafe: false,
        }
    }
}

/// Whether an endpoint's URL names this machine by a loopback address.
pub(crate) fn is_loopback(endpoint: &str) -> bool {
    let rest = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    let authority = rest.split('/').next().unwrap_or_default();
    let host = match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn directory(path: &str) -> Result<PathBuf, ConfigError> {
    if !path.starts_with('/') {
        return Err(ConfigError(format!(
            "the path in 'file://{path}' is not absolute; write file:///absolute/path (three \
             slashes)"
        )));
    }
    Ok(PathBuf::from(path))
}

fn bucket(rest: &str, options: S3Options) -> Result<Place, ConfigError> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(ConfigError("no bucket; write s3://bucket or s3://bucket/prefix".into()));
    }
    if bucket.contains([':', '@', '?']) {
        return Err(ConfigError(format!(
            "'{bucket}' is not a bucket; the service's address goes into the endpoint setting or \
             AWS_ENDPOINT_URL, keys into the environment"
        )));
    }
    let prefix = prefix.trim_matches('/');
    object_store::path::Path::parse(prefix)
        .map_err(|e| ConfigError(format!("the prefix '{prefix}' cannot be used: {e}")))?;
    Ok(Place::S3 { bucket: bucket.into(), prefix: prefix.into(), options })
}

const FORMS: &str = "file:///absolute/path, s3://bucket/prefix or memory://";

#[cfg(test)]
mod tests {
    use super::*;

    fn place(url: &str) -> Result<Place, ConfigError> {
        StoreConfig::parse(url, S3Options::default()).map(|config| config.place)
    }

    #[test]
    fn urls_name_places() {
        assert_eq!(place("file:///a/b c"), Ok(Place::Directory("/a/b c".into())));
        assert_eq!(place("memory://"), Ok(Place::Memory));
        let s3 = |bucket: &str, prefix: &str| {
            Ok(Place::S3 {
                bucket: bucket.into(),
                prefix: prefix.into(),
                options: S3Options::default(),
            })
        };
        assert_eq!(place("s3://disks"), s3("disks", ""));
        assert_eq!(place("s3://disks/a/b/"), s3("disks", "a/b"));
    }

    #[test]
    fn wrong_urls_are_refused_with_advice() {
        for (url, advice) in [
            ("/var/store", "file:///absolute/path"),
            ("file://relative", "three slashes"),
            ("gopher://x", "unknown scheme 'gopher'"),
            ("s3://", "s3://bucket"),
            ("s3://key:secret@bucket/x", "AWS_ENDPOINT_URL"),
            ("s3://bucket/a/../b", "prefix"),
            ("memory://x", "no name"),
        ] {
            let error = place(url).expect_err(url).to_string();
            assert!(error.contains(advice), "{url}: {error}");
        }
    }

    #[test]
    fn loopback_is_recognised() {
        for yes in ["http://127.0.0.1:9000", "http://localhost", "http://[::1]:80/x"] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in ["http://10.0.0.1", "https://s3.example.com", "http://127.0.0.1.example.com"] {
            assert!(!is_loopback(no), "{no}");
        }
    }

    #[test]
    fn secrets_do_not_reach_logs() {
        let options = S3Options { secret_key: Some(Secret("hush".into())), ..S3Options::default() };
        assert!(!format!("{options:?}").contains("hush"));
    }
}
