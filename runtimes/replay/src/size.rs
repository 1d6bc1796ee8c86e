//! How large a cache is replayed.

use std::fmt;

use heeler_core::ids::BLOCK_BYTES;

/// Millionths in a whole.
const WHOLE: u64 = 1_000_000;
/// Decimal places of a percentage of which the last is a millionth.
const PLACES: usize = 4;

/// The size of a cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheSize {
    /// Millionths of the blocks that the trace touches, above 0 and at most a million.
    Share(u32),
    /// Bytes, at least a block.
    Bytes(u64),
}

/// Why a size is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SizeError {
    /// Not a number, or one with more than four decimal places.
    NoNumber,
    /// Nothing, or more than everything.
    Outside,
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoNumber => "write it like 5%, 0.1% or 64M, with at most four decimal places",
            Self::Outside => "it must be above 0% and at most 100%, or at least one block (4K)",
        })
    }
}

impl std::error::Error for SizeError {}

impl CacheSize {
    /// A percentage: the text before the percent sign.
    ///
    /// # Errors
    ///
    /// If it is no number, or not above 0 and at most 100.
    pub fn percent(text: &str) -> Result<Self, SizeError> {
        let (whole, places) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(places) || places.len() > PLACES {
            return Err(SizeError::NoNumber);
        }
        let millionths: u64 =
            format!("{whole}{places:0<PLACES$}").parse().map_err(|_| SizeError::Outside)?;
        match u32::try_from(millionths) {
            Ok(millionths) if (1..=WHOLE).contains(&u64::from(millionths)) => {
                Ok(Self::Share(millionths))
            }
            _ => Err(SizeError::Outside),
        }
    }

    /// A number of bytes, of which whole blocks are used.
    ///
    /// # Errors
    ///
    /// If it is less than a block.
    pub fn bytes(bytes: u64) -> Result<Self, SizeError> {
        if bytes < BLOCK_BYTES as u64 { Err(SizeError::Outside) } else { Ok(Self::Bytes(bytes)) }
    }

    /// Pages of the cache for a trace that touches so many different blocks: a share is rounded up.
    /// Never more than there are blocks: a larger cache does nothing else.
    #[must_use]
    pub fn pages(self, unique_blocks: u32) -> u32 {
        let blocks = u64::from(unique_blocks);
        let pages = match self {
            Self::Share(millionths) => (blocks * u64::from(millionths)).div_ceil(WHOLE),
            Self::Bytes(bytes) => (bytes / BLOCK_BYTES as u64).min(blocks),
        };
        pages as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_are_exact() {
        for (text, millionths) in [
            ("1", 10_000),
            ("100", 1_000_000),
            ("100.0000", 1_000_000),
            ("0.1", 1_000),
            ("0.0001", 1),
            ("12.5", 125_000),
        ] {
            assert_eq!(CacheSize::percent(text), Ok(CacheSize::Share(millionths)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", ".", "1.", ".5", "a", "-1", "+1", "1e2", "0.00001", " 1", "1.5.5"] {
            assert_eq!(CacheSize::percent(text), Err(SizeError::NoNumber), "{text}");
        }
        for text in ["0", "0.0000", "100.0001", "101", "99999999999999999999"] {
            assert_eq!(CacheSize::percent(text), Err(SizeError::Outside), "{text}");
        }
        assert_eq!(CacheSize::bytes(0), Err(SizeError::Outside));
        assert_eq!(CacheSize::bytes(4095), Err(SizeError::Outside));
    }

    #[test]
    fn pages_are_rounded_up_and_bounded() {
        let share = |millionths, blocks| CacheSize::Share(millionths).pages(blocks);
        assert_eq!(share(10_000, 100), 1);
        assert_eq!(share(10_000, 101), 2);
        assert_eq!(share(1, 3), 1);
        assert_eq!(share(1_000_000, u32::MAX), u32::MAX);
        let bytes = |bytes, blocks| CacheSize::Bytes(bytes).pages(blocks);
        assert_eq!(bytes(3 * 4096 - 1, 100), 2);
        assert_eq!(bytes(u64::MAX, 100), 100);
    }
}
