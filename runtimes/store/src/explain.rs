//! What a failed try means, and what a person can do about it: in one line.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use object_store::client::{HttpError, HttpErrorKind};

use crate::{ErrorKind, StoreError};

/// Where requests go, for the text of their failures.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Target {
    /// This process.
    Memory,
    /// A directory.
    Directory(PathBuf),
    /// A bucket of an S3 service.
    S3 {
        /// Its name.
        bucket: String,
        /// URL of the service, or what stands for it.
        endpoint: String,
    },
}

/// What was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verb {
    Get,
    Put,
    /// A put that must not replace anything.
    Create,
    Delete,
    List,
}

impl Verb {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Put | Self::Create => "put",
            Self::Delete => "delete",
            Self::List => "list",
        }
    }

    /// What S3 calls the right to it.
    fn right(self) -> &'static str {
        match self {
            // Without the second, what is missing looks forbidden.
            Self::Get => "s3:GetObject and s3:ListBucket",
            Self::Put | Self::Create => "s3:PutObject",
            Self::Delete => "s3:DeleteObject",
            Self::List => "s3:ListBucket",
        }
    }
}

/// What a failed try did to the store.
enum Effect {
    /// Nothing, for this reason.
    None(ErrorKind),
    /// It may have been carried out, or may still be.
    Unknown,
}

/// A failure as the rest of heeler sees it.
pub(crate) fn explain(
    target: &Target,
    verb: Verb,
    key: &str,
    error: &object_store::Error,
) -> StoreError {
    let (effect, text) = match target {
        Target::S3 { bucket, endpoint } => s3(bucket, endpoint, verb, error),
        Target::Directory(path) => directory(&path.display().to_string(), verb, error),
        Target::Memory => (by_type(error), words(error)),
    };
    let kind = match (effect, verb) {
        (Effect::Unknown, Verb::Create) => ErrorKind::Timeout,
        (Effect::Unknown, _) => ErrorKind::Transient,
        (Effect::None(kind), _) => kind,
    };
    StoreError::new(kind, format!("{} {key}: {text}", verb.name()))
}

fn by_type(error: &object_store::Error) -> Effect {
    use object_store::Error as E;
    match error {
        E::NotFound { .. } => Effect::None(ErrorKind::NotFound),
        E::AlreadyExists { .. } => Effect::None(ErrorKind::AlreadyExists),
        E::InvalidPath { .. } | E::NotSupported { .. } | E::NotImplemented { .. } => {
            Effect::None(ErrorKind::Permanent)
        }
        _ => Effect::Unknown,
    }
}

fn directory(path: &str, verb: Verb, error: &object_store::Error) -> (Effect, String) {
    let Some(cause) = cause::<io::Error>(error) else { return (by_type(error), words(error)) };
    let change = if matches!(verb, Verb::Get | Verb::List) { "read" } else { "changed" };
    match cause.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => (
            Effect::None(ErrorKind::Refused),
            format!(
                "the store directory {path} cannot be {change} ({cause}); give this user the \
                 right to it, or name another with --store"
            ),
        ),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => (
            Effect::Unknown,
            format!("no room for the store directory {path} ({cause}); make room on its disk"),
        ),
        _ => (by_type(error), words(error)),
    }
}

fn s3(bucket: &str, endpoint: &str, verb: Verb, error: &object_store::Error) -> (Effect, String) {
    use object_store::Error as E;
    if let Some(http) = cause::<HttpError>(error)
        && http.kind() == HttpErrorKind::Connect
    {
        let text = format!(
            "no connection to {endpoint} ({}); is AWS_ENDPOINT_URL right, and the service up?",
            deepest(http)
        );
        return (Effect::None(ErrorKind::Transient), text);
    }
    let text = error.to_string();
    let refused = |text: String| (Effect::None(ErrorKind::Refused), text);
    if text.contains(BARE_REDIRECT) {
        return refused(wrong_region(bucket));
    }
    let code = tag(&text, "Code").unwrap_or_default();
    if let Some(text) = refusal(bucket, endpoint, code) {
        return refused(text);
    }
    let status = status(&text);
    match (error, status) {
        // What the service is for, it says with a code.
        (_, Some(403 | 401)) => refused(format!(
            "the access key may not do this in bucket '{bucket}' ({}); allow it {}",
            if code.is_empty() { "forbidden" } else { code },
            verb.right()
        )),
        // A put names no object that could be missing.
        (E::NotFound { .. }, _) if matches!(verb, Verb::Put | Verb::Create | Verb::List) => {
            refused(no_service(endpoint, 404))
        }
        (E::NotFound { .. }, _) => (Effect::None(ErrorKind::NotFound), "is not there".into()),
        // A refused precondition arrives wrapped in an error of the library. A bare 409 only says
        // that somebody else was at work on the key: that proves nothing about what is there now.
        (E::AlreadyExists { source, .. }, _) if source.is::<object_store::Error>() => {
            (Effect::None(ErrorKind::AlreadyExists), "is there already".into())
        }
        (E::AlreadyExists { .. }, _) => (Effect::Unknown, words(error)),
        (_, Some(408 | 425 | 429)) => (Effect::None(ErrorKind::Transient), busy(endpoint, code)),
        (_, Some(503)) => (Effect::Unknown, busy(endpoint, code)),
        (_, Some(405)) if code.is_empty() => refused(no_service(endpoint, 405)),
        (_, Some(400..=499 | 501)) => (Effect::None(ErrorKind::Permanent), words(error)),
        (E::InvalidPath { .. } | E::NotSupported { .. } | E::NotImplemented { .. }, _) => {
            (Effect::None(ErrorKind::Permanent), words(error))
        }
        _ => (Effect::Unknown, words(error)),
    }
}

/// What to do about an S3 error code that stands in the way of every request.
fn refusal(bucket: &str, endpoint: &str, code: &str) -> Option<String> {
    Some(match code {
        "NoSuchBucket" => format!(
            "there is no bucket '{bucket}' at {endpoint}; make it, or name another with --store"
        ),
        "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidSecurity" => format!(
            "{endpoint} does not accept the access key ({code}); check AWS_ACCESS_KEY_ID and \
             AWS_SECRET_ACCESS_KEY"
        ),
        "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" => format!(
            "{endpoint} does not accept the session token ({code}); get new credentials and set \
             AWS_SESSION_TOKEN"
        ),
        "RequestTimeTooSkewed" | "RequestExpired" => format!(
            "the clocks of this machine and of {endpoint} differ too much ({code}); set the clock \
             (timedatectl set-ntp true)"
        ),
        "AuthorizationHeaderMalformed" | "PermanentRedirect" => wrong_region(bucket),
        _ => return None,
    })
}

fn wrong_region(bucket: &str) -> String {
    format!("bucket '{bucket}' is in another region; set AWS_REGION to its region")
}

fn no_service(endpoint: &str, status: u16) -> String {
    format!("{endpoint} does not answer like an S3 service ({status}); check AWS_ENDPOINT_URL")
}

fn busy(endpoint: &str, code: &str) -> String {
    let code = if code.is_empty() { "busy" } else { code };
    format!("{endpoint} is overloaded or not ready ({code}); it is tried again")
}

/// The first error of a type in the chain of sources: the library wraps it in types of its own.
fn cause<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(e) = next {
        if let Some(found) = e.downcast_ref::<E>() {
            return Some(found);
        }
        next = e.source();
    }
    None
}

fn deepest(error: &dyn Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    one_line(&error.to_string())
}

fn words(error: &object_store::Error) -> String {
    let text = error.to_string();
    // Of a page of XML, what it is about.
    match (status(&text), tag(&text, "Code"), tag(&text, "Message")) {
        (Some(status), Some(code), message) => {
            one_line(&format!("{status} {code}: {}", message.unwrap_or("no message")))
        }
        _ => one_line(&text),
    }
}

fn one_line(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    words.chars().take(TEXT_CHARS_MAX).collect()
}

/// The HTTP status in an error's text: the library keeps the number in private types.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

/// The content of an element in an error's text.
fn tag<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    Some(rest.split_once(&format!("</{name}>"))?.0)
}

/// How the library begins to speak of a redirect that names no other place.
const BARE_REDIRECT: &str = "Received redirect without LOCATION";
/// A store's error page does not belong into a log line whole.
const TEXT_CHARS_MAX: usize = 400;

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(source: impl Into<Box<dyn Error + Send + Sync>>) -> object_store::Error {
        object_store::Error::Generic { store: "test", source: source.into() }
    }

    #[test]
    fn the_status_is_found_in_the_text() {
        assert_eq!(status("x: Server returned non-2xx status code: 503 Slow Down: y"), Some(503));
        assert_eq!(status("status code: "), None);
        assert_eq!(status("connection reset"), None);
    }

    #[test]
    fn a_page_becomes_a_line() {
        let page = "status code: 507 x: <?xml?><Error><Code>Full</Code>\n<Message>no\nroom\
                    </Message><Resource>/b</Resource></Error>";
        assert_eq!(words(&generic(page)), "507 Full: no room");
        assert!(words(&generic("word \n".repeat(1000))).len() == TEXT_CHARS_MAX);
    }

    #[test]
    fn a_directory_s_troubles_are_told_apart() {
        let target = Target::Directory("/srv/store".into());
        let failed = |verb, kind: io::ErrorKind| {
            let e = explain(&target, verb, "a", &generic(io::Error::from(kind)));
            (e.kind, e.text)
        };
        let (kind, text) = failed(Verb::Create, io::ErrorKind::StorageFull);
        assert_eq!(kind, ErrorKind::Timeout, "what was made before the disk was full may be there");
        assert!(text.contains("/srv/store") && text.contains("make room"), "{text}");
        assert_eq!(failed(Verb::Put, io::ErrorKind::StorageFull).0, ErrorKind::Transient);
        for kind in [io::ErrorKind::PermissionDenied, io::ErrorKind::ReadOnlyFilesystem] {
            let (kind, text) = failed(Verb::Create, kind);
            assert_eq!(kind, ErrorKind::Refused);
            assert!(text.contains("cannot be changed") && text.contains("--store"), "{text}");
        }
        let (_, text) = failed(Verb::Get, io::ErrorKind::PermissionDenied);
        assert!(text.contains("cannot be read"), "{text}");
    }
}
