//! What things are called in the store. All keys are relative to the configured prefix:
//!
//! ```text
//! volumes/<uuid>/pack/<epoch>-<n>       uuid: 32 hex digits; epoch: 16; n: 8
//! volumes/<uuid>/map/<page>-<epoch>     page: 8 hex digits
//! volumes/<uuid>/head/<number>          number: 10 decimal digits
//! volumes/<uuid>/child/<number>-<uuid>  of the snapshot <number>; the clone's uuid
//! names/<name>                          "heeler-name 1\n<uuid>\n"
//! ```

use alloc::format;
use alloc::string::String;
use core::fmt;

use crate::ids::Epoch;
use crate::limits::NAME_BYTES_MAX;

/// A volume or a cache, everywhere and for ever. Shown as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Uuid(pub [u8; 16]);

/// One claim of a volume: random, so that an owner knows its own head from any other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Nonce(pub [u8; 16]);

macro_rules! show_hex {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    )*};
}

show_hex!(Uuid, Nonce);

impl Uuid {
    /// Reads 32 lower-case hex digits; `None` for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.as_bytes();
        let mut bytes = [0; 16];
        if text.len() != 32 {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
            *byte = hex_digit(pair[0])? << 4 | hex_digit(pair[1])?;
        }
        Some(Self(bytes))
    }
}

/// An object of a volume, by the last two parts of its key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ObjectName {
    /// A pack: written in `epoch`, the `n`-th there.
    Pack {
        /// Epoch of its blocks.
        epoch: Epoch,
        /// Counts from 0 in the epoch.
        n: u32,
    },
    /// A version of a map page.
    Map {
        /// Which part of the volume.
        page: u32,
        /// The push that wrote this version.
        epoch: Epoch,
    },
    /// A head.
    Head {
        /// Its number.
        number: u32,
    },
    /// Says that the image of another volume lies in a snapshot of this one.
    Child {
        /// Number of the snapshot's head.
        number: u32,
        /// The other volume: a clone, or a clone of a clone.
        clone: Uuid,
    },
}

/// `volumes/`: the prefix of all volumes.
pub const VOLUMES_PREFIX: &str = "volumes/";
/// `names/`: the prefix of all names.
pub const NAMES_PREFIX: &str = "names/";

/// The prefix of everything of a volume, with its closing slash.
#[must_use]
pub fn volume_prefix(volume: Uuid) -> String {
    format!("{VOLUMES_PREFIX}{volume}/")
}

/// The prefix of a volume's heads, with its closing slash.
#[must_use]
pub fn head_prefix(volume: Uuid) -> String {
    format!("{VOLUMES_PREFIX}{volume}/head/")
}

/// The prefix of the records of a volume's clones, with its closing slash.
#[must_use]
pub fn child_prefix(volume: Uuid) -> String {
    format!("{VOLUMES_PREFIX}{volume}/child/")
}

/// The key of a clone's record.
#[must_use]
pub fn child_key(volume: Uuid, number: u32, clone: Uuid) -> String {
    key(volume, ObjectName::Child { number, clone })
}

/// The content of a clone's record.
#[must_use]
pub fn encode_child(unix_secs: u64) -> String {
    format!("{CHILD_FIRST_LINE}{unix_secs}\n")
}

/// When a clone was begun, in seconds since 1970; `None` if the bytes are not what
/// [`encode_child`] makes.
#[must_use]
pub fn decode_child(bytes: &[u8]) -> Option<u64> {
    let text = core::str::from_utf8(bytes).ok()?;
    let digits = text.strip_prefix(CHILD_FIRST_LINE)?.strip_suffix('\n')?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// The identity under which a cache knows a snapshot that it serves. No volume has it: theirs are
/// of version 4, this is of version 8 (RFC 9562).
#[must_use]
pub fn view_uuid(volume: Uuid, number: u32) -> Uuid {
    let mut bytes = volume.0;
    for (byte, mix) in bytes[12..].iter_mut().zip(number.to_le_bytes()) {
        *byte ^= mix;
    }
    bytes[6] = bytes[6] & 0x0f | 0x80;
    Uuid(bytes)
}

/// The key of a head.
#[must_use]
pub fn head_key(volume: Uuid, number: u32) -> String {
    key(volume, ObjectName::Head { number })
}

/// The key of a pack.
#[must_use]
pub fn pack_key(volume: Uuid, epoch: Epoch, n: u32) -> String {
    key(volume, ObjectName::Pack { epoch, n })
}

/// The key of a version of a map page.
#[must_use]
pub fn map_key(volume: Uuid, page: u32, epoch: Epoch) -> String {
    key(volume, ObjectName::Map { page, epoch })
}

/// The key of any object of a volume.
#[must_use]
pub fn key(volume: Uuid, name: ObjectName) -> String {
    let prefix = VOLUMES_PREFIX;
    match name {
        ObjectName::Pack { epoch, n } => format!("{prefix}{volume}/pack/{:016x}-{n:08x}", epoch.0),
        ObjectName::Map { page, epoch } => {
            format!("{prefix}{volume}/map/{page:08x}-{:016x}", epoch.0)
        }
        ObjectName::Head { number } => format!("{prefix}{volume}/head/{number:010}"),
        ObjectName::Child { number, clone } => {
            format!("{prefix}{volume}/child/{number:010}-{clone}")
        }
    }
}

/// The volume and the object that a key names; `None` for a key that [`key`] never makes.
#[must_use]
pub fn parse_key(text: &str) -> Option<(Uuid, ObjectName)> {
    let (uuid, rest) = text.strip_prefix(VOLUMES_PREFIX)?.split_once('/')?;
    let volume = Uuid::parse(uuid)?;
    let (kind, last) = rest.split_once('/')?;
    let name = match kind {
        "pack" => {
            let (epoch, n) = last.split_once('-')?;
            ObjectName::Pack { epoch: Epoch(parse_hex(epoch, 16)?), n: parse_hex(n, 8)? as u32 }
        }
        "map" => {
            let (page, epoch) = last.split_once('-')?;
            ObjectName::Map {
                page: parse_hex(page, 8)? as u32,
                epoch: Epoch(parse_hex(epoch, 16)?),
            }
        }
        "head" => ObjectName::Head { number: parse_number(last)? },
        "child" => {
            let (number, clone) = last.split_once('-')?;
            ObjectName::Child { number: parse_number(number)?, clone: Uuid::parse(clone)? }
        }
        _ => return None,
    };
    Some((volume, name))
}

/// Whether a volume may be called so: letters, digits, `.`, `_`, `-`; a letter or digit first;
/// at most [`NAME_BYTES_MAX`] bytes.
#[must_use]
pub fn valid_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    name.len() <= NAME_BYTES_MAX
        && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.bytes().all(plain)
}

/// The key under which a name is kept.
#[must_use]
pub fn name_key(name: &str) -> String {
    format!("{NAMES_PREFIX}{name}")
}

/// The content of a name's object.
#[must_use]
pub fn encode_name(volume: Uuid) -> String {
    format!("{NAME_FIRST_LINE}{volume}\n")
}

/// The volume that a name's object points at; `None` if the bytes are not what
/// [`encode_name`] makes.
#[must_use]
pub fn decode_name(bytes: &[u8]) -> Option<Uuid> {
    let text = core::str::from_utf8(bytes).ok()?;
    Uuid::parse(text.strip_prefix(NAME_FIRST_LINE)?.strip_suffix('\n')?)
}

fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

fn parse_number(text: &str) -> Option<u32> {
    let digits = text.len() == 10 && text.bytes().all(|b| b.is_ascii_digit());
    if digits { text.parse().ok() } else { None }
}

fn parse_hex(text: &str, digits: usize) -> Option<u64> {
    if text.len() != digits {
        return None;
    }
    text.bytes().try_fold(0, |value, byte| Some(value << 4 | u64::from(hex_digit(byte)?)))
}

const NAME_FIRST_LINE: &str = "heeler-name 1\n";
const CHILD_FIRST_LINE: &str = "heeler-child 1\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back() {
        let volume = Uuid(core::array::from_fn(|i| i as u8 * 17));
        let names = [
            ObjectName::Pack { epoch: Epoch(0x1234_5678_9abc_def0), n: 7 },
            ObjectName::Map { page: 0xfedc, epoch: Epoch(u64::MAX) },
            ObjectName::Head { number: u32::MAX },
            ObjectName::Head { number: 1 },
            ObjectName::Child { number: 12, clone: Uuid([0xc1; 16]) },
        ];
        for name in names {
            assert_eq!(parse_key(&key(volume, name)), Some((volume, name)));
        }
        assert_eq!(
            map_key(volume, 1, Epoch(2)),
            "volumes/00112233445566778899aabbccddeeff/map/00000001-0000000000000002"
        );
        assert!(key(volume, names[2]).starts_with(&head_prefix(volume)));
    }

    #[test]
    fn a_view_has_an_identity_of_its_own() {
        let volume = Uuid(*b"0123456789abcdef");
        let views = [1, 2, 256, u32::MAX].map(|number| view_uuid(volume, number));
        for (at, view) in views.iter().enumerate() {
            assert!(!views[..at].contains(view) && view.0[6] >> 4 == 8, "{view}");
        }
    }

    #[test]
    fn strange_keys_are_nobody_s() {
        let prefix = volume_prefix(Uuid([0xab; 16]));
        for last in [
            "head/1",
            "head/0000000001/",
            "head/+000000001",
            "head/4294967296",
            "map/00000001-1",
            "pack/0000000000000001",
            "pack/000000000000000G-00000001",
            "other/0000000001",
            "child/0000000001",
            "child/1-00112233445566778899aabbccddeeff",
            "child/0000000001-00112233445566778899AABBCCDDEEFF",
            "",
        ] {
            assert_eq!(parse_key(&format!("{prefix}{last}")), None, "{last}");
        }
        assert_eq!(parse_key("volumes/AB/head/0000000001"), None);
    }

    #[test]
    fn names() {
        let volume = Uuid([9; 16]);
        assert_eq!(decode_name(encode_name(volume).as_bytes()), Some(volume));
        assert_eq!(decode_name(b"heeler-name 2\n"), None);
        assert_eq!(decode_name(b"\xff"), None);
        assert_eq!(decode_child(encode_child(u64::MAX).as_bytes()), Some(u64::MAX));
        for wrong in ["heeler-child 2\n1\n", "heeler-child 1\n\n", "heeler-child 1\n+1\n"] {
            assert_eq!(decode_child(wrong.as_bytes()), None, "{wrong}");
        }
        assert!(valid_name("disk0") && valid_name("a.b_c-d"));
        assert!(
            !valid_name("") && !valid_name(".a") && !valid_name("a/b") && !valid_name("\u{e9}")
        );
        assert!(!valid_name(&"a".repeat(NAME_BYTES_MAX + 1)));
    }
}
