//! Where images come from and go to: paths and NBD URLs.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use url::Url;

/// The port of NBD where a URL names none.
const PORT: u16 = 10809;

/// One end of a transfer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// A file.
    File(PathBuf),
    /// An export of an NBD server.
    Nbd(NbdUrl),
    /// `-`: standard output.
    Stdout,
}

/// An export of an NBD server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct NbdUrl {
    /// Where the server listens.
    pub(crate) address: Address,
    /// The export's name.
    pub(crate) export: String,
}

/// Where an NBD server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Address {
    /// `HOST:PORT`.
    Tcp(String),
    /// A socket's path.
    Unix(PathBuf),
}

impl FromStr for Place {
    type Err = String;

    /// `-`, `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`, or a path.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once("://") {
            _ if text == "-" => Ok(Self::Stdout),
            Some(("nbd" | "nbd+unix", _)) => NbdUrl::parse(text).map(Self::Nbd),
            Some((scheme @ ("nbds" | "nbds+unix"), _)) => {
                Err(format!("{scheme}:// is NBD over TLS, which heeler does not know"))
            }
            Some((scheme, _)) if !scheme.contains('/') => Err(format!(
                "{scheme}:// is not known; give a file, nbd://HOST:PORT/EXPORT or \
                 nbd+unix:///EXPORT?socket=PATH"
            )),
            _ if text.is_empty() => Err("the name is empty".into()),
            _ => Ok(Self::File(text.into())),
        }
    }
}

impl NbdUrl {
    fn parse(text: &str) -> Result<Self, String> {
        let url = Url::parse(text).map_err(|e| format!("{text}: {e}"))?;
        let path = url.path();
        let path = percent_decode_str(path.strip_prefix('/').unwrap_or(path));
        let export = path.decode_utf8().map_err(|_| format!("{text}: the export's name"))?;
        let socket = url.query_pairs().find(|(name, _)| name == "socket");
        let address = match (url.scheme(), socket, url.host_str()) {
            ("nbd+unix", Some((_, socket)), _) => Address::Unix(socket.into_owned().into()),
            ("nbd+unix", None, _) => {
                return Err(format!("{text}: ?socket=PATH must say where the server listens"));
            }
            (_, _, Some(host)) if !host.is_empty() => {
                Address::Tcp(format!("{host}:{}", url.port().unwrap_or(PORT)))
            }
            _ => return Err(format!("{text}: the host is missing")),
        };
        Ok(Self { address, export: export.into_owned() })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Nbd(url) => url.fmt(f),
            Self::Stdout => f.write_str("standard output"),
        }
    }
}

impl fmt::Display for NbdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Tcp(address) => write!(f, "nbd://{address}/{}", self.export),
            Address::Unix(path) => {
                write!(f, "nbd+unix:///{}?socket={}", self.export, path.display())
            }
        }
    }
}

/// What an image file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Format {
    /// The disk's bytes, one for one
    Raw,
    /// QEMU's
    Qcow2,
}

impl Format {
    /// What a name asks for.
    pub(crate) fn of_name(path: &Path) -> Self {
        let qcow2 = ["qcow2", "qcow"].iter().any(|known| path.extension() == Some(known.as_ref()));
        if qcow2 { Self::Qcow2 } else { Self::Raw }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nbd(address: Address, export: &str) -> Place {
        Place::Nbd(NbdUrl { address, export: export.into() })
    }

    #[test]
    fn places_are_files_urls_and_standard_output() {
        let tcp = |text: &str| Address::Tcp(text.into());
        for (text, place) in [
            ("-", Place::Stdout),
            ("a.raw", Place::File("a.raw".into())),
            ("dir/odd://name", Place::File("dir/odd://name".into())),
            ("nbd://h/disk0", nbd(tcp("h:10809"), "disk0")),
            ("nbd://h:1", nbd(tcp("h:1"), "")),
            ("nbd://[::1]:7/web@mon", nbd(tcp("[::1]:7"), "web@mon")),
            (
                "nbd+unix:///a%20b?socket=/x/y%3F.sock",
                nbd(Address::Unix("/x/y?.sock".into()), "a b"),
            ),
        ] {
            assert_eq!(text.parse(), Ok(place), "{text}");
        }
    }

    #[test]
    fn a_wrong_url_says_what_is_wrong_with_it() {
        for (text, wrong) in [
            ("", "empty"),
            ("nbds://h/x", "TLS"),
            ("s3://bucket/x", "not known"),
            ("nbd+unix:///x", "socket"),
            ("nbd:///x", "host"),
            ("nbd://h:99999/x", "port"),
        ] {
            let error = text.parse::<Place>().expect_err(text);
            assert!(error.contains(wrong), "{text}: {error}");
        }
    }

    #[test]
    fn the_end_of_a_name_asks_for_a_format() {
        assert_eq!(Format::of_name(Path::new("a.qcow2")), Format::Qcow2);
        assert_eq!(Format::of_name(Path::new("a.qcow2.img")), Format::Raw);
        assert_eq!(Format::of_name(Path::new("qcow2")), Format::Raw);
    }
}
