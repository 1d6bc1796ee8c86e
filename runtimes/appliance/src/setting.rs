//! What can be set of a volume.

use std::str::FromStr;

use clap::ValueEnum;
use heeler_core::event::Mode;
use heeler_core::wire::head::Settings;
use serde::{Deserialize, Serialize};

/// On or off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

impl Switch {
    pub(crate) fn of(on: bool) -> &'static str {
        if on { "on" } else { "off" }
    }
}

impl From<Switch> for bool {
    fn from(switch: Switch) -> Self {
        switch == Switch::On
    }
}

/// One change of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Setting {
    #[serde(with = "mode_name")]
    Mode(Mode),
    BufferedRead(bool),
    BufferedWrite(bool),
}

/// A mode as its name.
pub(crate) mod mode_name {
    use heeler_core::event::Mode;
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(crate) fn serialize<S: Serializer>(mode: &Mode, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(mode.name())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Mode, D::Error> {
        let name = String::deserialize(from)?;
        super::parse_mode(&name).map_err(de::Error::custom)
    }
}

/// The mode that is called so.
pub(crate) fn parse_mode(name: &str) -> Result<Mode, String> {
    Mode::from_name(name).ok_or_else(|| {
        let names: Vec<_> = Mode::ALL.iter().map(|mode| mode.name()).collect();
        format!("no mode is called '{name}'; there are {}", names.join(", "))
    })
}

impl Setting {
    /// Makes these changes, the last of them counting most.
    pub(crate) fn apply(changes: &[Self], settings: &mut Settings) {
        for change in changes {
            match *change {
                Self::Mode(mode) => settings.mode = mode,
                Self::BufferedRead(reads) => settings.buffering.reads = reads,
                Self::BufferedWrite(writes) => settings.buffering.writes = writes,
            }
        }
    }
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("not NAME=VALUE")?;
        let switch = || match value {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(format!("'{value}' is neither on nor off")),
        };
        match name {
            "mode" => parse_mode(value).map(Self::Mode),
            "buffered-read" => switch().map(Self::BufferedRead),
            "buffered-write" => switch().map(Self::BufferedWrite),
            _ => Err(format!("'{name}' is none of mode, buffered-read, buffered-write")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read() {
        assert_eq!("buffered-read=on".parse(), Ok(Setting::BufferedRead(true)));
        let off: Setting = "buffered-write=off".parse().expect("a setting");
        let mut settings = Settings::default();
        Setting::apply(&[Setting::BufferedWrite(true), off], &mut settings);
        assert!(settings.buffering.reads && !settings.buffering.writes);
        for mode in Mode::ALL {
            let setting: Setting = format!("mode={}", mode.name()).parse().expect("a mode");
            let text = serde_json::to_string(&setting).expect("plain data");
            assert_eq!(serde_json::from_str::<Setting>(&text).expect("the same"), setting);
            Setting::apply(&[setting], &mut settings);
            assert_eq!(settings.mode, *mode);
        }
        for (text, why) in [
            ("buffered-write", "NAME=VALUE"),
            ("mode=safe", "writeback, ram, writethrough, writearound, none, ephemeral"),
            ("buffered-write=no", "'no' is neither"),
            ("size=on", "buffered-read, buffered-write"),
        ] {
            let error = text.parse::<Setting>().expect_err(text);
            assert!(error.contains(why), "{error}");
        }
    }
}
