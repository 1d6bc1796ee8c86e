//! Spans of time as people write them: `5s`, `500ms`, `2min`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// How long a push may wait for its first write to grow old: at least 100 ms, at most an hour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PushAfter(pub(crate) Duration);

impl FromStr for PushAfter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match humantime::parse_duration(text) {
            Ok(span) if (LEAST..=MOST).contains(&span) => Ok(Self(span)),
            Ok(_) => Err(format!("'{text}': a push can wait from 100ms to 1h")),
            Err(_) => Err(format!("'{text}' is not a span of time; write it like 5s or 500ms")),
        }
    }
}

impl fmt::Display for PushAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl Default for PushAfter {
    fn default() -> Self {
        Self(Duration::from_secs(5))
    }
}

impl<'de> Deserialize<'de> for PushAfter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

const LEAST: Duration = Duration::from_millis(100);
const MOST: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_and_written() {
        for (text, millis) in [("5s", 5000), ("100ms", 100), ("1h", 3_600_000), ("1m 30s", 90_000)]
        {
            let span: PushAfter = text.parse().expect(text);
            assert_eq!(span.0, Duration::from_millis(millis));
            assert_eq!(span.to_string(), text);
        }
        for text in ["", "5", "soon", "99ms", "2h", "-1s"] {
            text.parse::<PushAfter>().expect_err(text);
        }
    }
}
