//! Settings of the server and of offline commands: from the command line, then from a TOML file of
//! the same names, then by default.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use heeler_core::limits::SHARDS_MAX;
use heeler_core::policy::Policy;
use heeler_store::{S3Options, Secret, StoreConfig};
use serde::{Deserialize, Deserializer};

use crate::cli::{ServeArgs, StoreArgs};
use crate::runtime::Runtime;
use crate::size::{Memory, Size};
use crate::span::PushAfter;

/// Where NBD clients connect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Listen {
    /// A Unix socket.
    Unix(PathBuf),
    /// HOST:PORT.
    Tcp(String),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let help = || format!("'{text}' is not an address; write unix:PATH or tcp:HOST:PORT");
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let address = text.strip_prefix("tcp:").ok_or_else(help)?;
        let (host, port) = address.rsplit_once(':').ok_or_else(help)?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(help());
        }
        Ok(Self::Tcp(address.into()))
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The TOML file. Names are those of the flags.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct File {
    data: Option<PathBuf>,
    cache: Option<PathBuf>,
    cache_size: Option<Size>,
    shards: Option<u16>,
    memory: Option<Memory>,
    store: Option<String>,
    single_writer_unsafe: bool,
    listen: Vec<Listen>,
    cores: Option<String>,
    runtime: Option<Runtime>,
    #[serde(deserialize_with = "policy")]
    policy: Option<Policy>,
    push_after: Option<PushAfter>,
    s3: FileS3,
}

fn policy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Policy>, D::Error> {
    let name = String::deserialize(deserializer)?;
    let known = Policy::from_name(&name).ok_or_else(|| {
        let names: Vec<_> = Policy::ALL.iter().map(|policy| policy.name()).collect();
        serde::de::Error::custom(format!("no policy is called '{name}': {}", names.join(", ")))
    });
    known.map(Some)
}

/// How to reach an S3 service; what is missing comes from the environment (`AWS_...`).
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct FileS3 {
    endpoint: Option<String>,
    region: Option<String>,
    access_key: Option<String>,
    secret_key: Option<String>,
    session_token: Option<String>,
    allow_http: Option<bool>,
    unsigned_payload: Option<bool>,
}

/// Where everything is.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The data directory, absolute.
    pub(crate) data: PathBuf,
    /// The cache file or device.
    pub(crate) cache: PathBuf,
    /// The store as it was named, for messages.
    pub(crate) store_url: String,
    /// The store.
    pub(crate) store: StoreConfig,
}

/// Of `serve`.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Where everything is.
    pub(crate) place: Place,
    /// Size of a cache file that has to be made.
    pub(crate) cache_size: Size,
    /// Whether that size was asked for.
    pub(crate) cache_size_given: bool,
    /// Shards of a cache that has to be formatted.
    pub(crate) shards: u16,
    /// What the server takes of memory; `None`: by default.
    pub(crate) memory: Option<Memory>,
    /// Where NBD clients connect.
    pub(crate) listen: Vec<Listen>,
    /// CPUs; `None`: all usable.
    pub(crate) cores: Option<String>,
    /// What they run on.
    pub(crate) runtime: Runtime,
    /// By which data leaves RAM.
    pub(crate) policy: Policy,
    /// How long a push waits for its first write to grow old.
    pub(crate) push_after: PushAfter,
    /// Take volumes from other owners.
    pub(crate) takeover: bool,
}

/// The flags that every command has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Common<'a> {
    /// `--data`.
    pub(crate) data: Option<&'a Path>,
    /// `--config`.
    pub(crate) config: Option<&'a Path>,
}

impl Common<'_> {
    /// The data directory alone: enough to reach a running server.
    pub(crate) fn data(&self) -> Result<PathBuf, String> {
        let file = self.file()?;
        self.data_of(&file)
    }

    /// Where everything is.
    pub(crate) fn place(&self, cache: Option<&Path>, store: &StoreArgs) -> Result<Place, String> {
        place(self.data_of(&self.file()?)?, &self.file()?, cache, store)
    }

    /// All settings of the server.
    pub(crate) fn settings(&self, args: &ServeArgs) -> Result<Settings, String> {
        let file = self.file()?;
        let data = self.data_of(&file)?;
        let cache_size = args.cache_size.or(file.cache_size);
        let shards = args.shards.or(file.shards).unwrap_or(SHARDS);
        if !(1..=SHARDS_MAX).contains(&usize::from(shards)) {
            return Err(format!("{shards} shards: 1 to {SHARDS_MAX} are possible"));
        }
        let mut listen =
            if args.listen.is_empty() { file.listen.clone() } else { args.listen.clone() };
        if listen.is_empty() {
            listen =
                vec![Listen::Unix(data.join("nbd.sock")), Listen::Tcp("127.0.0.1:10809".into())];
        }
        Ok(Settings {
            place: place(data, &file, args.cache.as_deref(), &args.store)?,
            cache_size: cache_size.unwrap_or(CACHE_SIZE),
            cache_size_given: cache_size.is_some(),
            shards,
            memory: args.memory.or(file.memory),
            listen,
            cores: args.cores.clone().or(file.cores),
            runtime: args.runtime.or(file.runtime).unwrap_or_default(),
            policy: args.policy.or(file.policy).unwrap_or_default(),
            push_after: args.push_after.or(file.push_after).unwrap_or_default(),
            takeover: args.takeover,
        })
    }

    fn file(&self) -> Result<File, String> {
        let Some(path) = self.config else { return Ok(File::default()) };
        let text = fs::read_to_string(path)
            .map_err(|e| format!("the settings file {} cannot be read: {e}", path.display()))?;
        toml::from_str(&text).map_err(|e| format!("the settings file {}: {e}", path.display()))
    }

    fn data_of(&self, file: &File) -> Result<PathBuf, String> {
        let data = self.data.map(Path::to_path_buf).or_else(|| file.data.clone());
        absolute(&data.unwrap_or_else(|| DATA.into()))
    }
}

fn place(
    data: PathBuf,
    file: &File,
    cache: Option<&Path>,
    store: &StoreArgs,
) -> Result<Place, String> {
    let cache = cache.map(Path::to_path_buf).or_else(|| file.cache.clone());
    let cache = absolute(&cache.unwrap_or_else(|| data.join("cache.img")))?;
    let url = store.store.clone().or_else(|| file.store.clone());
    let store_url = url.unwrap_or_else(|| format!("file://{}", data.join("store").display()));
    let s3 = &file.s3;
    let options = S3Options {
        endpoint: s3.endpoint.clone(),
        region: s3.region.clone(),
        access_key: s3.access_key.clone(),
        secret_key: s3.secret_key.clone().map(Secret),
        session_token: s3.session_token.clone().map(Secret),
        allow_http: s3.allow_http,
        unsigned_payload: s3.unsigned_payload,
    };
    let store_config = StoreConfig::parse(&store_url, options).map_err(|e| e.to_string())?;
    let single_writer_unsafe = store.single_writer_unsafe || file.single_writer_unsafe;
    let store = StoreConfig { single_writer_unsafe, ..store_config };
    Ok(Place { data, cache, store_url, store })
}

fn absolute(path: &Path) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|e| format!("the path '{}': {e}", path.display()))
}

const DATA: &str = "heeler-data";
const CACHE_SIZE: Size = Size(4 << 30);
const SHARDS: u16 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file(name: &str, text: &str, args: &ServeArgs) -> Result<Settings, String> {
        let path = std::env::temp_dir().join(format!("heeler-{}-{name}", std::process::id()));
        fs::write(&path, text).unwrap();
        let settings = Common { data: None, config: Some(&path) }.settings(args);
        fs::remove_file(&path).unwrap();
        settings
    }

    #[test]
    fn defaults_live_in_the_data_directory() {
        let common = Common { data: Some(Path::new("/d")), config: None };
        let settings = common.settings(&ServeArgs::default()).unwrap();
        assert_eq!(settings.place.cache, Path::new("/d/cache.img"));
        assert_eq!(settings.place.store_url, "file:///d/store");
        assert_eq!(settings.listen[0], Listen::Unix("/d/nbd.sock".into()));
        assert_eq!(settings.listen[1].to_string(), "tcp:127.0.0.1:10809");
        assert_eq!((settings.cache_size, settings.memory), (Size(4 << 30), None));
        assert_eq!((settings.shards, settings.cache_size_given), (8, false));
        assert_eq!(settings.policy, Policy::Reuse);
    }

    #[test]
    fn flags_win_over_the_file() {
        let text = "data = '/f'\nmemory = '2G'\ncache-size = 1073741824\nstore = 's3://b/p'\n\
                    listen = ['tcp:0.0.0.0:10809']\ncores = '0-1'\npolicy = '2q'\n\
                    push-after = '1s'\n[s3]\n\
                    endpoint = 'http://h:9'\n";
        let args = ServeArgs { memory: Some(Memory::Bytes(Size(7 << 20))), ..ServeArgs::default() };
        let settings = with_file("a", text, &args).unwrap();
        assert_eq!(settings.memory, Some(Memory::Bytes(Size(7 << 20))));
        assert_eq!((settings.cache_size, settings.cache_size_given), (Size(1 << 30), true));
        assert_eq!(settings.place.data, Path::new("/f"));
        assert_eq!(settings.listen, [Listen::Tcp("0.0.0.0:10809".into())]);
        assert_eq!((settings.cores.as_deref(), settings.policy), (Some("0-1"), Policy::TwoQ));
        assert_eq!(settings.push_after.to_string(), "1s");
        let heeler_store::Place::S3 { bucket, options, .. } = settings.place.store.place else {
            panic!("an S3 store")
        };
        assert_eq!((bucket.as_str(), options.endpoint.as_deref()), ("b", Some("http://h:9")));
    }

    #[test]
    fn doing_without_fencing_must_be_asked_for() {
        let unsafe_of = |text, args: &ServeArgs| {
            with_file("g", text, args).unwrap().place.store.single_writer_unsafe
        };
        let mut args = ServeArgs::default();
        assert!(!unsafe_of("", &args));
        assert!(unsafe_of("single-writer-unsafe = true", &args));
        args.store.single_writer_unsafe = true;
        assert!(unsafe_of("", &args));
    }

    #[test]
    fn what_a_file_gets_wrong_is_said() {
        for (name, text, says) in [
            ("b", "memroy = '2G'", "memroy"),
            ("c", "memory = 'lots'", "a size like"),
            ("d", "listen = ['10809']", "unix:PATH"),
            ("e", "store = 'nowhere'", "file:///absolute/path"),
            ("f", "policy = 'arc'", "reuse, lru, 2q, 2q-bluestore, s3fifo"),
            ("g", "push-after = 'soon'", "like 5s"),
        ] {
            let error = with_file(name, text, &ServeArgs::default()).expect_err(text);
            assert!(error.contains(says), "{error}");
        }
        let missing = Common { data: None, config: Some(Path::new("/nonexistent.toml")) };
        assert!(missing.data().expect_err("missing").contains("/nonexistent.toml"));
    }

    #[test]
    fn addresses_are_read() {
        for text in ["unix:/a", "tcp:127.0.0.1:1", "tcp:[::1]:10809", "tcp:host:65535"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        for text in ["unix:", "tcp:host", "tcp::1", "tcp:h:65536", "/a", ""] {
            text.parse::<Listen>().expect_err(text);
        }
    }
}
