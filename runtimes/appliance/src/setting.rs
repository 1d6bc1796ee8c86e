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
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Setting {
    #[serde(with = "mode_name")]
    Mode(Mode),
    BufferedRead(bool),
    BufferedWrite(bool),
    ReadOnly(bool),
    Description(String),
    Tags(Vec<String>),
    AddTag(String),
    RemoveTag(String),
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
            match change {
                Self::Mode(mode) => settings.mode = *mode,
                Self::BufferedRead(reads) => settings.buffering.reads = *reads,
                Self::BufferedWrite(writes) => settings.buffering.writes = *writes,
                Self::ReadOnly(read_only) => settings.read_only = *read_only,
                Self::Description(text) => settings.description.clone_from(text),
                Self::Tags(tags) => settings.tags.clone_from(tags),
                Self::AddTag(tag) if settings.tags.contains(tag) => {}
                Self::AddTag(tag) => settings.tags.push(tag.clone()),
                Self::RemoveTag(tag) => settings.tags.retain(|known| known != tag),
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
        let list = || {
            let tags = value.split(',').map(str::trim).filter(|tag| !tag.is_empty());
            tags.map(String::from).collect()
        };
        match name {
            "read-only" => match value {
                "yes" => Ok(Self::ReadOnly(true)),
                "no" => Ok(Self::ReadOnly(false)),
                _ => Err(format!("'{value}' is neither yes nor no")),
            },
            "description" => Ok(Self::Description(value.into())),
            "tags" => Ok(Self::Tags(list())),
            "tag+" if !value.is_empty() => Ok(Self::AddTag(value.into())),
            "tag-" => Ok(Self::RemoveTag(value.into())),
            "mode" => parse_mode(value).map(Self::Mode),
            "buffered-read" => switch().map(Self::BufferedRead),
            "buffered-write" => switch().map(Self::BufferedWrite),
            _ => Err(format!(
                "'{name}' is none of mode, buffered-read, buffered-write, read-only, description, \
                 tags, tag+, tag-"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_come_and_go() {
        let mut settings = Settings::default();
        let texts = ["tags=db, eu,", "tag+=prod", "tag+=db", "tag-=eu", "description=the = one"];
        let changes: Vec<Setting> = texts.map(|text| text.parse().expect(text)).into();
        Setting::apply(&changes, &mut settings);
        assert_eq!(settings.tags, ["db", "prod"]);
        assert_eq!(settings.description, "the = one");
        Setting::apply(&["tags=".parse().expect("none")], &mut settings);
        assert!(settings.tags.is_empty());
        for text in ["tag+=", "read-only=on"] {
            text.parse::<Setting>().expect_err(text);
        }
    }

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
            ("size=on", "buffered-read, buffered-write, read-only"),
        ] {
            let error = text.parse::<Setting>().expect_err(text);
            assert!(error.contains(why), "{error}");
        }
    }
}
