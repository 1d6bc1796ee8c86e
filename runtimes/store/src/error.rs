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
    /// Trying again will not help: refused credentials, no such bucket, an object that is shorter
    /// than what was asked of it.
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
