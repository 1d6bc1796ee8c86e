//! What is known of a transfer that is not done: a small file, by which it can be resumed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What is copied to where.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    /// What is read, its size, and what changes whenever it does.
    pub(crate) from: String,
    pub(crate) from_bytes: u64,
    pub(crate) from_version: String,
    /// What is written.
    pub(crate) to: String,
}

/// How far a transfer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// What is written was all zeroes when the transfer began.
    pub(crate) blank: bool,
    /// Everything before this byte is there, durably.
    pub(crate) done_bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    #[serde(flatten)]
    job: Job,
    #[serde(flatten)]
    progress: Progress,
}

/// The file.
#[derive(Debug)]
pub(crate) struct Note(PathBuf);

impl Note {
    /// At a path; nothing is written yet.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Notes how far the transfer is.
    pub(crate) fn save(&self, job: &Job, progress: Progress) -> Result<(), String> {
        let state = State { job: job.clone(), progress };
        let text = serde_json::to_vec_pretty(&state).expect("plain data");
        replace(&self.0, &text).map_err(|e| format!("{}: {e}", self.0.display()))
    }

    /// How far the transfer was when it was interrupted, if it can go on.
    pub(crate) fn resume(&self, job: &Job) -> Result<Progress, String> {
        let anew = "start over, with --force instead of --resume";
        let text = match fs::read(&self.0) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(format!("nothing is known of an interrupted transfer: {anew}"));
            }
            Err(e) => return Err(format!("{}: {e}", self.0.display())),
        };
        let state: State = serde_json::from_slice(&text)
            .map_err(|e| format!("{}: {e}; {anew}", self.0.display()))?;
        let was = &state.job;
        if was.from != job.from {
            Err(format!("the interrupted transfer was of {}, not of {}", was.from, job.from))
        } else if was.to != job.to {
            Err(format!("the interrupted transfer was to {}, not to {}", was.to, job.to))
        } else if (was.from_bytes, &was.from_version) != (job.from_bytes, &job.from_version) {
            Err(format!("{} has changed since the transfer began: {anew}", job.from))
        } else {
            Ok(state.progress)
        }
    }

    /// The transfer is done, or given up.
    pub(crate) fn remove(&self) -> Result<(), String> {
        match fs::remove_file(&self.0) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(format!("{}: {e}", self.0.display()))
            }
            _ => Ok(()),
        }
    }
}

/// Writes a file so that there is the old one or the new one, whatever happens.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = path.with_added_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_is_resumed_only_if_nothing_has_changed() {
        let path = std::env::temp_dir().join(format!("heeler-note-{}", std::process::id()));
        let note = Note::new(path);
        let job = Job {
            from: "/a".into(),
            from_bytes: 100,
            from_version: "1.5".into(),
            to: "uuid".into(),
        };
        let progress = Progress { blank: true, done_bytes: 50 };
        assert!(note.resume(&job).unwrap_err().contains("nothing is known"));
        note.save(&job, Progress { blank: true, done_bytes: 0 }).unwrap();
        note.save(&job, progress).unwrap();
        assert_eq!(note.resume(&job), Ok(progress));
        for (other, why) in [
            (Job { from: "/b".into(), ..job.clone() }, "was of /a, not of /b"),
            (Job { to: "other".into(), ..job.clone() }, "was to uuid, not to other"),
            (Job { from_bytes: 101, ..job.clone() }, "/a has changed"),
            (Job { from_version: "1.6".into(), ..job.clone() }, "/a has changed"),
        ] {
            let error = note.resume(&other).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        note.remove().unwrap();
        note.remove().unwrap();
        assert!(note.resume(&job).is_err());
    }
}
