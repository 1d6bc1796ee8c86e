//! What can be set of a volume.

use std::str::FromStr;

use clap::ValueEnum;
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
    BufferedRead(bool),
    BufferedWrite(bool),
}

impl Setting {
    /// Makes these changes, the last of them counting most.
    pub(crate) fn apply(changes: &[Self], settings: &mut Settings) {
        for change in changes {
            match *change {
                Self::BufferedRead(reads) => settings.buffering.reads = reads,
                Self::BufferedWrite(writes) => settings.buffering.writes = writes,
            }
        }
    }
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("not NAME=on or NAME=off")?;
        let value = match value {
            "on" => true,
            "off" => false,
            _ => return Err(format!("'{value}' is neither on nor off")),
        };
        match name {
            "buffered-read" => Ok(Self::BufferedRead(value)),
            "buffered-write" => Ok(Self::BufferedWrite(value)),
            _ => Err(format!("'{name}' is none of buffered-read, buffered-write")),
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
        for (text, why) in [
            ("buffered-write", "NAME=on"),
            ("buffered-write=no", "'no' is neither"),
            ("size=on", "buffered-read, buffered-write"),
        ] {
            let error = text.parse::<Setting>().expect_err(text);
            assert!(error.contains(why), "{error}");
        }
    }
}
