//! The data directory and the cache file.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use heeler_core::wire::superblock::REGIONS_PAGE;
use heeler_driver::start::{CacheDevice, CacheError};
use heeler_hw::{AlignedBuf, BackingFile, BlockFile, FileError, IoError, PAGE_BYTES};

use crate::client::Bar;
use crate::settings::Settings;
use crate::size::Size;

/// How long a start waits for the lock of the cache, and how often it tries.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_AGAIN: Duration = Duration::from_millis(10);

/// The opened cache file, shared by the cores and the volume table.
#[derive(Clone, Debug)]
pub(crate) struct SharedFile(pub(crate) Arc<BackingFile>);

impl BlockFile for SharedFile {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut AlignedBuf) -> Result<(), IoError> {
        self.0.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &AlignedBuf) -> Result<(), IoError> {
        self.0.write_at(offset, buf)
    }

    fn sync(&self) -> Result<(), IoError> {
        self.0.sync()
    }
}

/// The data directory, for one server at a time.
#[derive(Debug)]
pub(crate) struct DataDir {
    _lock: File,
}

impl DataDir {
    /// Makes the directory if it is missing, and locks it.
    pub(crate) fn lock(path: &Path) -> Result<Self, String> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|e| format!("the data directory {} cannot be made: {e}", path.display()))?;
        let name = path.join("lock");
        let failed = |e: io::Error| format!("the lock file {}: {e}", name.display());
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&name)
            .map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let read = lock.read_to_string(&mut pid);
                let who = read.ok().filter(|_| !pid.is_empty()).map_or_else(
                    || "another process".into(),
                    |_| format!("process {}", pid.trim()),
                );
                return Err(format!(
                    "{who} serves from {} already; stop it, or name another directory with --data",
                    path.display()
                ));
            }
            Err(TryLockError::Error(e)) => return Err(failed(e)),
        }
        lock.set_len(0).and_then(|()| lock.rewind()).map_err(failed)?;
        writeln!(lock, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { _lock: lock })
    }
}

/// Opens the cache; makes the file and formats it where that is due. A device or a file whose first
/// pages are all zeroes counts as not formatted.
pub(crate) fn open_cache(settings: &Settings) -> Result<CacheDevice<SharedFile>, String> {
    let path = &settings.place.cache;
    let file = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => create(settings)?,
        _ => open_when_free(path).map_err(|e| format!("the cache: {e}"))?,
    };
    let file = SharedFile(Arc::new(file));
    let failed = |e: CacheError| format!("the cache {}: {e}", path.display());
    if is_blank(&file).map_err(|e| format!("the cache {}: {e}", path.display()))? {
        let identity = random().map_err(|e| format!("no randomness: {e}"))?;
        log::info!("formatting {} with {} shards", path.display(), settings.shards);
        return CacheDevice::format(file, identity, settings.shards).map_err(failed);
    }
    let device = CacheDevice::open(file).map_err(failed)?;
    let (has, wanted) = (device.superblock().shards, settings.shards);
    if has != wanted {
        log::info!("the cache was formatted with {has} shards, which stays so");
    }
    let bytes = device.file().size_bytes();
    if settings.cache_size_given && bytes != settings.cache_size.0 {
        log::warn!(
            "{} has {} and not {}: the size of a cache stays as it was made",
            path.display(),
            Size(bytes),
            settings.cache_size
        );
    }
    Ok(device)
}

/// Opens a cache that a server may have left a moment ago: the kernel keeps the lock until the last
/// operation of a process that has ended is over.
pub(crate) fn open_when_free(path: &Path) -> Result<BackingFile, FileError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match BackingFile::open(path) {
            Err(FileError::Locked(_)) if Instant::now() < deadline => {
                thread::sleep(LOCK_AGAIN);
            }
            result => return result,
        }
    }
}

fn create(settings: &Settings) -> Result<BackingFile, String> {
    let bytes = settings.cache_size.0 - settings.cache_size.0 % PAGE_BYTES as u64;
    let needed = heeler_core::wire::superblock::Superblock::bytes_min(settings.shards);
    if bytes < needed {
        return Err(format!(
            "--cache-size {} is too small: a cache of {} shards needs at least {}",
            settings.cache_size,
            settings.shards,
            Size(needed)
        ));
    }
    let path = &settings.place.cache;
    log::info!("making the cache file {} of {}", path.display(), Size(bytes));
    let bar = Bar::new("making the cache file");
    BackingFile::create(path, bytes, &mut |done, total| bar.set(done, total))
        .map_err(|e| format!("the cache file: {e}"))
}

fn is_blank(file: &SharedFile) -> Result<bool, IoError> {
    if file.size_bytes() < u64::from(REGIONS_PAGE) * PAGE_BYTES as u64 {
        return Ok(false);
    }
    let mut first = AlignedBuf::zeroed(REGIONS_PAGE as usize);
    file.read_at(0, &mut first)?;
    Ok(first.iter().all(|byte| *byte == 0))
}

/// Random bytes of the system.
pub(crate) fn random() -> Result<[u8; 16], getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_directory_has_one_server() {
        let path = std::env::temp_dir().join(format!("heeler-lock-{}", std::process::id()));
        let first = DataDir::lock(&path).expect("free");
        let error = DataDir::lock(&path).expect_err("taken");
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(first);
        DataDir::lock(&path).expect("free again");
        fs::remove_dir_all(&path).expect("ours");
    }
}
