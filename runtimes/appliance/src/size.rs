//! Sizes as people write and read them: `4G`, `512M`, `4.0 GiB`.

use std::fmt;
use std::str::FromStr;

use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize};

/// A number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    /// Digits and a unit: `K`, `M`, `G`, `T` or `P`, powers of 1024, with or without `iB` or `B`.
    fn from_str(text: &str) -> Result<Self, String> {
        let help = || format!("'{text}' is not a size; write it like 512M, 4G or 1T");
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let number: u64 = text[..digits].parse().map_err(|_| help())?;
        let unit = text[digits..].trim_start().to_ascii_uppercase();
        let unit = unit.strip_suffix("IB").or_else(|| unit.strip_suffix('B')).unwrap_or(&unit);
        let shift = match unit {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            "P" => 50,
            _ => return Err(help()),
        };
        let bytes = number.checked_mul(1 << shift);
        bytes.map(Self).ok_or_else(|| format!("'{text}' is more than can be counted"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let mut unit = 0;
        while unit + 1 < units.len() && self.0 >> (10 * (unit + 1)) > 0 {
            unit += 1;
        }
        let scale = 1u64 << (10 * unit);
        if self.0.is_multiple_of(scale) {
            write!(f, "{} {}", self.0 / scale, units[unit])
        } else {
            write!(f, "{:.1} {}", self.0 as f64 / scale as f64, units[unit])
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    /// A number of bytes, or text as above.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bytes_or_text(deserializer, "a size like 512M or 4G")
    }
}

fn bytes_or_text<'de, D: Deserializer<'de>, T: FromStr + From<Size>>(
    deserializer: D,
    expected: &str,
) -> Result<T, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Bytes(u64),
        Text(String),
    }
    match Written::deserialize(deserializer)? {
        Written::Bytes(bytes) => Ok(Size(bytes).into()),
        Written::Text(text) => {
            text.parse().map_err(|_| D::Error::invalid_value(Unexpected::Str(&text), &expected))
        }
    }
}

/// How much memory the server takes: bytes, or a share of what it may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(into = "String")]
pub(crate) enum Memory {
    Bytes(Size),
    Percent(u8),
}

impl Memory {
    /// Bytes, if the process may have `limit` of them.
    pub(crate) fn bytes(self, limit: u64) -> u64 {
        match self {
            Self::Bytes(size) => size.0,
            Self::Percent(percent) => limit / 100 * u64::from(percent),
        }
    }
}

impl FromStr for Memory {
    type Err = String;

    /// A size, or a number of percent.
    fn from_str(text: &str) -> Result<Self, String> {
        let Some(percent) = text.strip_suffix('%') else { return text.parse().map(Self::Bytes) };
        match percent.parse() {
            Ok(percent @ 1..=100) => Ok(Self::Percent(percent)),
            _ => Err(format!("'{text}' is not a share; write 1% to 100%, or a size like 4G")),
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(size) => size.fmt(f),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl From<Memory> for String {
    /// Exactly, for another program.
    fn from(memory: Memory) -> Self {
        match memory {
            Memory::Bytes(size) => size.0.to_string(),
            Memory::Percent(percent) => format!("{percent}%"),
        }
    }
}

impl From<Size> for Memory {
    fn from(size: Size) -> Self {
        Self::Bytes(size)
    }
}

impl<'de> Deserialize<'de> for Memory {
    /// As a size, or text as above.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bytes_or_text(deserializer, "a size like 4G or a share like 50%")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("4G", 4 << 30),
            ("512M", 512 << 20),
            ("64k", 64 << 10),
            ("4 GiB", 4 << 30),
            ("1tb", 1 << 40),
            ("4096", 4096),
            ("0", 0),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "G", "4X", "-1", "1.5G", "4GG", "99999999999P"] {
            text.parse::<Size>().expect_err(text);
        }
    }

    #[test]
    fn sizes_are_shown() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4 << 30, "4 GiB"),
            ((3 << 30) / 2, "1.5 GiB"),
            (4097 << 10, "4.0 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn memory_is_a_size_or_a_share() {
        assert_eq!("4G".parse(), Ok(Memory::Bytes(Size(4 << 30))));
        assert_eq!("50%".parse(), Ok(Memory::Percent(50)));
        for text in ["0%", "101%", "-1%", "1.5%", "%", "", "50 %"] {
            text.parse::<Memory>().expect_err(text);
        }
        assert_eq!(Memory::Percent(50).bytes(1 << 30), (1 << 30) / 100 * 50);
        for memory in [Memory::Percent(7), Memory::Bytes(Size(1_234_567))] {
            let text = serde_json::to_string(&memory).unwrap();
            assert_eq!(serde_json::from_str::<Memory>(&text).unwrap(), memory);
        }
    }
}
