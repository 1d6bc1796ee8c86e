//! Files whose content follows from their names and versions.
//!
//! Each of several threads loads the file system in its way, and says on stdout what is safe from
//! then on, whatever happens to the machine:
//!
//! | thread | does | says |
//! |---|---|---|
//! | names | writes a file, syncs it, renames it over an old one | `safe name ID VERSION` |
//! | logs | appends to a file and syncs it | `safe log ID BYTES`, `drop log ID` |
//! | records | writes over a part of a file, syncs it, then the next | `safe record ID VERSION` |
//! | churn | see [`crate::folder`]; syncs nothing | nothing |

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use heeler_hw::sim::Rng;

use crate::folder;

/// Threads of each kind.
const THREADS: u64 = 2;
/// Files of a names thread.
const NAMES: u64 = 12;
const NAME_BYTES_MAX: u64 = 96 << 10;
/// A log ends when it is as long as this.
const LOG_BYTES: u64 = 4 << 20;
const APPEND_BYTES_MAX: u64 = 24 << 10;
/// The content of a log is made in pieces of this size.
const PIECE: u64 = 4096;
/// Records of a records thread, and the files they are in, each in a folder of its own: a file
/// system puts folders far from each other.
const RECORDS: u64 = 128;
const FOLDERS: u64 = 8;
const RECORD_BYTES: usize = 4096;
/// What a names file and a record begin with: id and version, then bytes in all.
const HEADER_BYTES: usize = 24;

/// What a thread does in a folder: which thread of its kind it is, and until when.
type Work = fn(&Path, u64, Instant, Rng) -> io::Result<()>;
const KINDS: [(&str, Work); 4] =
    [("names", names), ("logs", logs), ("records", records), ("churn", folder::churn)];

/// Writes below `dir` for so many seconds.
pub(crate) fn write(dir: &str, seconds: u64, seed: u64) -> Result<(), String> {
    let dir = Path::new(dir);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut rng = Rng::new(seed);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for thread in 0..THREADS {
            for (kind, work) in KINDS {
                let rng = rng.fork();
                threads.push(scope.spawn(move || {
                    let done = work(dir, thread, end, rng);
                    done.map_err(|error| format!("{kind}, thread {thread}: {error}"))
                }));
            }
        }
        threads.into_iter().try_for_each(|thread| thread.join().expect("no thread panics"))
    })
}

/// Says something in one piece, so that the lines of threads do not mix.
fn say(line: &str) -> io::Result<()> {
    io::stdout().lock().write_all(format!("{line}\n").as_bytes())
}

/// Bytes that follow from a kind, a number and a version.
fn content(kind: &str, id: u64, version: u64, bytes: usize) -> Vec<u8> {
    let kind = kind.bytes().fold(0u64, |sum, byte| sum * 256 + u64::from(byte));
    let mut rng = Rng::new(kind ^ Rng::new(id).next_u64() ^ Rng::new(!version).next_u64());
    let mut content = vec![0; bytes];
    rng.fill(&mut content);
    content
}

/// The content with a header that says what it is.
fn stamped(kind: &str, id: u64, version: u64, bytes: usize) -> Vec<u8> {
    let mut content = content(kind, id, version, bytes);
    for (field, value) in content.chunks_mut(8).zip([id, version, bytes as u64]) {
        field.copy_from_slice(&value.to_le_bytes());
    }
    content
}

/// The version that these bytes are, if they are one of this kind and number.
fn version(kind: &str, id: u64, bytes: &[u8]) -> Option<u64> {
    let field = bytes.get(8..16)?.try_into().expect("8 bytes");
    let version = u64::from_le_bytes(field);
    (bytes == stamped(kind, id, version, bytes.len())).then_some(version)
}

/// A folder that is there from now on, whatever happens.
fn safe_folder(dir: &Path, name: &str) -> io::Result<PathBuf> {
    let folder = dir.join(name);
    fs::create_dir_all(&folder)?;
    File::open(dir)?.sync_all()?;
    Ok(folder)
}

fn names(dir: &Path, thread: u64, end: Instant, mut rng: Rng) -> io::Result<()> {
    let place = &safe_folder(dir, "names")?;
    let new = place.join(format!("new-{thread}"));
    for round in 1.. {
        let id = thread * NAMES + rng.below(NAMES);
        let bytes = HEADER_BYTES as u64 + rng.below(NAME_BYTES_MAX);
        let file = File::create(&new)?;
        (&file).write_all(&stamped("name", id, round, bytes as usize))?;
        file.sync_all()?;
        fs::rename(&new, place.join(format!("name-{id}")))?;
        File::open(place)?.sync_all()?;
        say(&format!("safe name {id} {round}"))?;
        if Instant::now() >= end {
            break;
        }
    }
    Ok(())
}

/// Bytes of a log from a position on.
fn log_content(id: u64, from: u64, bytes: u64) -> Vec<u8> {
    let pieces = from / PIECE..(from + bytes).div_ceil(PIECE);
    let mut all = Vec::new();
    for piece in pieces {
        all.extend(content("log", id, piece, PIECE as usize));
    }
    let skipped = (from % PIECE) as usize;
    all[skipped..skipped + bytes as usize].to_vec()
}

fn logs(dir: &Path, thread: u64, end: Instant, mut rng: Rng) -> io::Result<()> {
    let place = &safe_folder(dir, "logs")?;
    let mut id = thread;
    while Instant::now() < end {
        let path = place.join(format!("log-{id}"));
        let mut file = File::create(&path)?;
        file.sync_all()?;
        File::open(place)?.sync_all()?;
        let mut len = 0;
        while len < LOG_BYTES && Instant::now() < end {
            let bytes = 1 + rng.below(APPEND_BYTES_MAX);
            file.write_all(&log_content(id, len, bytes))?;
            len += bytes;
            if rng.chance(2, 3) {
                file.sync_data()?;
                say(&format!("safe log {id} {len}"))?;
            }
        }
        if Instant::now() < end {
            // First said and then done: nobody expects it from the first moment it may be gone.
            say(&format!("drop log {id}"))?;
            fs::remove_file(&path)?;
        }
        id += THREADS;
    }
    Ok(())
}

/// Where a record is, below the folder of all: its file, and its place in it.
fn record_place(id: u64) -> (String, u64) {
    let (thread, slot) = (id / RECORDS, id % RECORDS);
    let file = format!("records-{}/records-{thread}", slot % FOLDERS);
    (file, slot / FOLDERS * RECORD_BYTES as u64)
}

/// Writes records round and round; each write begins when the one before it is safe.
fn records(dir: &Path, thread: u64, end: Instant, _: Rng) -> io::Result<()> {
    let mut files = Vec::new();
    for folder in 0..FOLDERS {
        safe_folder(dir, &format!("records-{folder}"))?;
        files.push(File::create(dir.join(record_place(thread * RECORDS + folder).0))?);
    }
    let write = |id, version| {
        let record = stamped("record", id, version, RECORD_BYTES);
        files[(id % FOLDERS) as usize].write_all_at(&record, record_place(id).1)
    };
    for slot in 0..RECORDS {
        write(thread * RECORDS + slot, 0)?;
    }
    for (folder, file) in files.iter().enumerate() {
        file.sync_all()?;
        File::open(dir.join(format!("records-{folder}")))?.sync_all()?;
    }
    for round in 1.. {
        let id = thread * RECORDS + round % RECORDS;
        write(id, round)?;
        files[(id % FOLDERS) as usize].sync_data()?;
        say(&format!("safe record {id} {round}"))?;
        if Instant::now() >= end {
            break;
        }
    }
    Ok(())
}

/// Whether everything that was said to be safe is there. `said` is a file with what [`write`] said,
/// among other lines.
pub(crate) fn check(dir: &str, said: &str) -> Result<(), String> {
    let text = fs::read_to_string(said).map_err(|error| format!("{said}: {error}"))?;
    let mut safe: BTreeMap<(&str, u64), u64> = BTreeMap::new();
    let mut dropped = BTreeSet::new();
    // What comes after the last newline is half a line.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for line in whole.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["safe", kind, id, value] => {
                let value: u64 = value.parse().map_err(|_| format!("'{line}' is no claim"))?;
                let id = id.parse().map_err(|_| format!("'{line}' is no claim"))?;
                let known = safe.entry((kind, id)).or_default();
                *known = value.max(*known);
            }
            ["drop", kind, id] => {
                dropped.insert((kind, id.parse().map_err(|_| format!("'{line}' is no claim"))?));
            }
            _ => {}
        }
    }
    safe.retain(|claim, _| !dropped.contains(claim));
    let mut counts = BTreeMap::from([("name", 0), ("log", 0), ("record", 0)]);
    let mut wrong = Vec::new();
    for (&(kind, id), &least) in &safe {
        match examine(Path::new(dir), kind, id, least) {
            Ok(_) => *counts.get_mut(kind).expect("a kind") += 1,
            Err(error) => wrong.push(format!("{kind} {id}, {least} is safe: {error}")),
        }
    }
    for thread in 0..THREADS {
        // Before the first claim its files need not be there.
        if safe.keys().any(|(kind, id)| *kind == "record" && id / RECORDS == thread) {
            let ordered = in_order(Path::new(dir), thread);
            wrong.extend(ordered.err().map(|error| format!("records of {thread}: {error}")));
        }
    }
    if !wrong.is_empty() {
        return Err(wrong.join("\n"));
    }
    let [names, logs, records] = ["name", "log", "record"].map(|kind| counts[kind]);
    println!("{names} names, {logs} logs and {records} records as they were said to be");
    Ok(())
}

/// Whether the records of a thread are of its last rounds, without a gap.
fn in_order(dir: &Path, thread: u64) -> Result<(), String> {
    let mut versions = Vec::new();
    for id in thread * RECORDS..(thread + 1) * RECORDS {
        versions.push(examine(dir, "record", id, 0).map_err(|error| format!("{id}: {error}"))?);
    }
    let newest = versions.iter().max().expect("there are records");
    for back in 0..RECORDS.min(*newest) {
        let round = newest - back;
        let there = versions[(round % RECORDS) as usize];
        if there != round {
            return Err(format!("{there} is there and not {round}, but also {newest}"));
        }
    }
    Ok(())
}

/// Whether one claim holds: the least version, or the least length of a log. The version that is
/// there; of a log, that length.
fn examine(dir: &Path, kind: &str, id: u64, least: u64) -> Result<u64, String> {
    let (path, range): (PathBuf, _) = match kind {
        "name" => (dir.join(format!("names/name-{id}")), None),
        "log" => (dir.join(format!("logs/log-{id}")), Some((0, least))),
        "record" => {
            let (path, at) = record_place(id);
            (dir.join(path), Some((at, RECORD_BYTES as u64)))
        }
        _ => return Err("nothing of that kind is written".into()),
    };
    let read = || {
        let mut file = File::open(&path)?;
        let mut bytes = Vec::new();
        match range {
            None => drop(file.read_to_end(&mut bytes)?),
            Some((at, len)) => {
                bytes.resize(len as usize, 0);
                file.read_exact_at(&mut bytes, at)?;
            }
        }
        io::Result::Ok(bytes)
    };
    let bytes = read().map_err(|error| format!("{}: {error}", path.display()))?;
    if kind == "log" {
        let wanted = log_content(id, 0, least);
        let differs = bytes.iter().zip(&wanted).position(|(a, b)| a != b);
        return differs.map_or(Ok(least), |at| Err(format!("differs from byte {at} on")));
    }
    match version(kind, id, &bytes) {
        None => Err(format!("{} bytes, but not of one version of it", bytes.len())),
        Some(found) if found < least => Err(format!("there is version {found}")),
        Some(found) => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that goes with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("rig-tool-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).expect("a folder");
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_is_missing_old_or_mixed_is_found() {
        let scratch = Scratch::new("files");
        let dir = &scratch.0;
        for kind in ["names", "logs"] {
            fs::create_dir(dir.join(kind)).expect("a folder");
        }
        let holds = |claim: &str| {
            fs::write(dir.join("said"), format!("{claim}\nsafe name 99 9")).expect("written");
            let text = |name: &str| dir.join(name).to_str().expect("ASCII").to_owned();
            check(&text(""), &text("said"))
        };
        assert!(holds("safe name 3 7").unwrap_err().contains("No such file"));
        fs::write(dir.join("names/name-3"), stamped("name", 3, 7, 100)).expect("written");
        assert_eq!(holds("safe name 3 7\nsafe name 3 5"), Ok(()));
        assert!(holds("safe name 3 8").unwrap_err().contains("there is version 7"));
        fs::copy(dir.join("names/name-3"), dir.join("names/name-4")).expect("copied");
        assert!(holds("safe name 4 1").unwrap_err().contains("not of one version"));

        fs::write(dir.join("logs/log-1"), log_content(1, 0, 9000)).expect("written");
        assert_eq!(holds("safe log 1 9000"), Ok(()));
        assert_eq!(log_content(1, 5000, 3000), log_content(1, 0, 9000)[5000..8000]);
        assert!(holds("safe log 1 9001").is_err());
        assert_eq!(holds("safe log 1 9001\ndrop log 1"), Ok(()));
        let mut torn = log_content(1, 0, 9000);
        torn[8000] ^= 1;
        fs::write(dir.join("logs/log-1"), torn).expect("written");
        assert!(holds("safe log 1 9000").unwrap_err().contains("from byte 8000"));

        write(dir.to_str().expect("ASCII"), 0, 1).expect("writes");
        let put = |id: u64, content: &[u8]| {
            let (file, at) = record_place(id);
            let file = File::options().write(true).open(dir.join(file)).expect("it is there");
            file.write_all_at(content, at).expect("written");
        };
        let record = |id, version| stamped("record", id, version, RECORD_BYTES);
        assert_eq!(holds("safe record 1 1"), Ok(()));
        assert!(holds("safe record 2 1").unwrap_err().contains("there is version 0"));
        put(3, &record(3, 3));
        assert!(holds("safe record 1 1").unwrap_err().contains("0 is there and not 2"));
        put(2, &record(2, 2));
        assert_eq!(holds("safe record 1 1"), Ok(()));
        put(2, &[&record(2, 2)[..512], &record(2, 130)[512..]].concat());
        assert!(holds("safe record 2 2").unwrap_err().contains("not of one version"));
    }

    #[test]
    fn what_was_written_passes_the_check() {
        let scratch = Scratch::new("load");
        let dir = scratch.0.to_str().expect("ASCII");
        write(dir, 0, 1).expect("writes");
        assert!(scratch.0.join("records-7/records-1").exists());
    }
}
