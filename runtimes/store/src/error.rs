//! How a request to the store fails.

use std::fmt;

/// What a failure means to the caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorKind {
    /// There is no such key.
    NotFound,
    /// A create found the key taken. What was there is unchanged.
    AlreadyExists,
    /// Worth trying again later: the store cannot be reached, is overloaded, or answered with an
    /// error of its own.
    Transient,
    /// Nothing of this kind will succeed until somebody changes something: credentials, rights, the
    /// bucket, the clock. The text says what. It had no effect.
    Refused,
    /// Trying again will not help: an object that is shorter than what was asked of it, a request
    /// that the store does not understand.
    Permanent,
    /// A create whose outcome is unknown: it may have happened, or may still happen. Read the key
    /// before trying again.
    Timeout,
}

/// A failed request: what it means, and the store's own words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreError {
    /// What it means.
    pub kind: ErrorKind,
    /// Verb, key and the store's words.
    pub text: String,
}

impl StoreError {
    /// An error of this kind with this text.
    pub fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for StoreError {}

/// Why a store cannot be trusted with volumes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Unusable {
    /// A request failed for a reason of its own.
    Store(StoreError),
    /// The store does not keep a rule that heeler needs; what it did.
    Unfit(String),
    /// What is at the prefix is not of this heeler's format.
    Format(String),
}

impl Unusable {
    /// Whether it may pass without anybody's doing.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        let Self::Store(e) = self else { return false };
        matches!(e.kind, ErrorKind::Transient | ErrorKind::Timeout)
    }
}

impl From<StoreError> for Unusable {
    fn from(e: StoreError) -> Self {
        Self::Store(e)
    }
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(e) => write!(f, "the store does not work: {e}"),
            Self::Unfit(what) | Self::Format(what) => {
                write!(f, "the store cannot be used: {what}")
            }
        }
    }
}

impl std::error::Error for Unusable {}
