//! Names that come and go: what keeps a file system's journal busy.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::time::Instant;

use heeler_hw::sim::Rng;

/// Names in a folder, and folders.
const NAMES: u64 = 16;
const FOLDERS: u64 = 4;
const BYTES_MAX: u64 = 64 << 10;

/// Makes, fills, cuts, links, renames and removes files and folders in any order.
pub(crate) fn churn(dir: &Path, thread: u64, end: Instant, mut rng: Rng) -> io::Result<()> {
    while Instant::now() < end {
        let mut pick = || {
            let folder = dir.join(format!("churn-{thread}-{}", rng.below(FOLDERS)));
            (folder.join(format!("file-{}", rng.below(NAMES))), folder)
        };
        let ((one, folder), (other, _)) = (pick(), pick());
        let bytes = rng.below(BYTES_MAX);
        let done = match rng.below(9) {
            0 | 1 => fs::create_dir_all(&folder),
            2 | 3 => fs::write(&one, vec![b'.'; bytes as usize]),
            4 => append(&one, bytes),
            5 => File::options().write(true).open(&one).and_then(|file| file.set_len(bytes)),
            6 => fs::rename(&one, &other),
            7 => fs::hard_link(&one, &other),
            _ => fs::remove_file(&one),
        };
        match done {
            Ok(()) => {}
            // What is there and what is not is chance.
            Err(error) => match error.kind() {
                ErrorKind::NotFound | ErrorKind::AlreadyExists => {}
                _ => return Err(error),
            },
        }
        if rng.chance(1, 60) {
            let _ = fs::remove_dir_all(&folder);
        }
    }
    Ok(())
}

fn append(path: &Path, bytes: u64) -> io::Result<()> {
    File::options().append(true).open(path)?.write_all(&vec![b'+'; bytes as usize])
}
