//! The file or block device under a cache: opened once for the process, locked, without the page
//! cache.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::queue::{BlockFile, IoError, IoErrorKind, PAGE_BYTES, range_fits};

/// Bytes written at a time when a file is created.
const CREATE_STEP: usize = 4 << 20;

/// Bytes of whole pages, aligned for direct I/O.
pub struct AlignedBuf {
    /// One page more than asked for, so that an aligned run of the wanted length fits in.
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// `pages` pages (4 KiB each) of zeroes.
    #[must_use]
    pub fn zeroed(pages: usize) -> Self {
        let len = pages * PAGE_BYTES;
        let bytes = vec![0; len + PAGE_BYTES];
        let start = bytes.as_ptr().align_offset(PAGE_BYTES);
        Self { bytes, start, len }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len).finish_non_exhaustive()
    }
}

/// Why a cache file could not be made or opened. Each says which file, and what to do where
/// something can be done.
#[derive(Debug)]
pub enum FileError {
    /// Something is already there.
    Exists(PathBuf),
    /// Another process, or another part of this one, has it open.
    Locked(PathBuf),
    /// Neither a regular file nor a block device.
    NotBlocks(PathBuf),
    /// The filesystem does not do direct I/O.
    NotDirect(PathBuf),
    /// The filesystem has no room for so many bytes.
    NoSpace(PathBuf, u64),
    /// Anything else, with what was tried.
    Os(PathBuf, &'static str, io::Error),
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exists(path) => write!(f, "{} exists already", path.display()),
            Self::Locked(path) => write!(f, "{} is in use by another process", path.display()),
            Self::NotBlocks(path) => {
                write!(f, "{} is neither a regular file nor a block device", path.display())
            }
            Self::NotDirect(path) => write!(
                f,
                "the filesystem of {} does not support O_DIRECT: put the file on ext4, xfs or \
                 btrfs, or use a block device",
                path.display()
            ),
            Self::NoSpace(path, bytes) => write!(
                f,
                "no room for {bytes} bytes at {}: free some, or choose a smaller size",
                path.display()
            ),
            Self::Os(path, what, error) => {
                write!(f, "could not {what} {}: {error}", path.display())
            }
        }
    }
}

impl std::error::Error for FileError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Os(_, _, error) => Some(error),
            _ => None,
        }
    }
}

/// An open, locked file or block device. Every queue made from it shares the one open file
/// description, and with it the lock: the kernel drops the lock when the last of them, and the last
/// operation in flight, is gone. So a process that was killed cannot write to the file any more
/// once another one has opened it.
#[derive(Debug)]
pub struct BackingFile {
    file: File,
    path: PathBuf,
    size: u64,
}

impl BackingFile {
    /// Makes a file of `bytes` bytes (a multiple of 4096) of zeroes and opens it. The zeroes are
    /// really written, so that later writes change no metadata and cannot run out of space.
    /// `progress` is told (bytes written, bytes in all) from time to time. The file gets its name
    /// when it is whole: what an interrupted run leaves behind is never taken for a cache.
    ///
    /// # Errors
    /// [`FileError`]; what was begun is removed.
    ///
    /// # Panics
    /// A size that is no multiple of 4096, or 0.
    pub fn create(
        path: &Path,
        bytes: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, FileError> {
        assert!(bytes > 0 && bytes.is_multiple_of(PAGE_BYTES as u64), "a file of whole pages");
        match fs::symlink_metadata(path) {
            Ok(_) => return Err(FileError::Exists(path.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(FileError::Os(path.into(), "look at", error)),
        }
        let unfinished = unfinished_name(path);
        let file = open_direct(&unfinished, OpenOptions::new().create(true).mode(0o600))?;
        lock(&file, &unfinished)?;
        let filled = fill(&file, path, bytes, progress).and_then(|()| publish(&unfinished, path));
        if let Err(error) = filled {
            // The error that matters is the first one.
            let _ = fs::remove_file(&unfinished);
            return Err(error);
        }
        Ok(Self { file, path: path.into(), size: bytes })
    }

    /// Opens and locks a file or a block device for direct I/O.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let os = |what| move |error| FileError::Os(path.into(), what, error);
        let file_type = fs::metadata(path).map_err(os("open"))?.file_type();
        if !file_type.is_file() && !file_type.is_block_device() {
            return Err(FileError::NotBlocks(path.into()));
        }
        let mut file = open_direct(path, &mut OpenOptions::new())?;
        lock(&file, path)?;
        // Of a block device the metadata has no size; the end of it can be sought.
        let end = file.seek(SeekFrom::End(0)).map_err(os("find the size of"))?;
        Ok(Self { file, path: path.into(), size: end - end % PAGE_BYTES as u64 })
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A second descriptor of the same open file.
    pub(crate) fn duplicate(&self) -> io::Result<File> {
        self.file.try_clone()
    }
}

impl BlockFile for BackingFile {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut AlignedBuf) -> Result<(), IoError> {
        if !range_fits(offset, buf.len(), self.size) {
            return Err(IoErrorKind::Invalid.into());
        }
        Ok(self.file.read_exact_at(buf, offset)?)
    }

    fn write_at(&self, offset: u64, buf: &AlignedBuf) -> Result<(), IoError> {
        if !range_fits(offset, buf.len(), self.size) {
            return Err(IoErrorKind::Invalid.into());
        }
        Ok(self.file.write_all_at(buf, offset)?)
    }

    fn sync(&self) -> Result<(), IoError> {
        Ok(self.file.sync_data()?)
    }
}

fn unfinished_name(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".unfinished");
    name.into()
}

fn open_direct(path: &Path, options: &mut OpenOptions) -> Result<File, FileError> {
    let options = options.read(true).write(true).custom_flags(libc::O_DIRECT);
    options.open(path).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => FileError::NotDirect(path.into()),
        _ => FileError::Os(path.into(), "open", error),
    })
}

fn lock(file: &File, path: &Path) -> Result<(), FileError> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => FileError::Locked(path.into()),
        TryLockError::Error(error) => FileError::Os(path.into(), "lock", error),
    })
}

/// Makes `file` `bytes` bytes of zeroes. Errors speak of `path`.
fn fill(
    file: &File,
    path: &Path,
    bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), FileError> {
    let failed = |what| {
        move |error: io::Error| match IoError::from_errno(error.raw_os_error().unwrap_or(0)).kind()
        {
            IoErrorKind::NoSpace => FileError::NoSpace(path.into(), bytes),
            _ => FileError::Os(path.into(), what, error),
        }
    };
    file.set_len(0).map_err(failed("empty"))?;
    if free_bytes(file).map_err(failed("find the room for"))? < bytes {
        return Err(FileError::NoSpace(path.into(), bytes));
    }
    allocate(file, bytes).map_err(failed("allocate"))?;
    let zeroes = AlignedBuf::zeroed(CREATE_STEP / PAGE_BYTES);
    let mut written = 0;
    while written < bytes {
        let step = (bytes - written).min(CREATE_STEP as u64) as usize;
        file.write_all_at(&zeroes[..step], written).map_err(failed("write"))?;
        written += step as u64;
        progress(written, bytes);
    }
    file.sync_all().map_err(failed("sync"))
}

/// Bytes that the file's filesystem has left for this user. Asked first, because an allocation that
/// fails in the end has taken everything from everybody else for a while.
#[allow(unsafe_code)]
fn free_bytes(file: &File) -> io::Result<u64> {
    let mut answer = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: a call on an open descriptor; the kernel fills the answer.
    if unsafe { libc::fstatvfs(file.as_raw_fd(), answer.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it is filled.
    let answer = unsafe { answer.assume_init() };
    Ok(answer.f_bavail.saturating_mul(answer.f_frsize))
}

/// Reserves the space at once, so that a full filesystem is found before gigabytes are written.
/// Where the filesystem cannot, the writes will find out. (`posix_fallocate` would then write
/// single bytes, which direct I/O refuses.)
#[allow(unsafe_code)]
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    let too_large = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let length = libc::off_t::try_from(bytes).map_err(too_large)?;
    loop {
        // SAFETY: a call on an open descriptor, with numbers only.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => return Ok(()),
            _ => return Err(error),
        }
    }
}

/// Gives the finished file its name, durably.
fn publish(unfinished: &Path, path: &Path) -> Result<(), FileError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::rename(unfinished, path)
        .and_then(|()| File::open(directory)?.sync_all())
        .map_err(|error| FileError::Os(path.into(), "name", error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    /// A path of its own in the temporary directory, removed at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("heeler-hw-{}-{name}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    #[test]
    fn a_created_file_is_whole_allocated_and_opens_again() {
        let scratch = Scratch::new("create");
        let bytes = (CREATE_STEP + 3 * PAGE_BYTES) as u64;
        let mut steps = Vec::new();
        let file = BackingFile::create(&scratch.0, bytes, &mut |done, all| steps.push((done, all)))
            .unwrap();
        assert_eq!(steps, [(CREATE_STEP as u64, bytes), (bytes, bytes)]);
        assert_eq!(file.size_bytes(), bytes);
        assert!(fs::metadata(&scratch.0).unwrap().blocks() * 512 >= bytes, "really allocated");
        assert!(!unfinished_name(&scratch.0).exists());

        let mut buf = AlignedBuf::zeroed(2);
        buf.fill(0xa5);
        file.write_at(bytes - 8192, &buf).unwrap();
        file.sync().unwrap();
        drop(file);

        let file = BackingFile::open(&scratch.0).unwrap();
        assert_eq!(file.size_bytes(), bytes);
        let mut back = AlignedBuf::zeroed(3);
        file.read_at(bytes - 3 * 4096, &mut back).unwrap();
        assert!(back[..4096].iter().all(|&byte| byte == 0));
        assert_eq!(back[4096..], buf[..]);
    }

    #[test]
    fn addresses_outside_are_invalid() {
        let scratch = Scratch::new("outside");
        let file = BackingFile::create(&scratch.0, 8192, &mut |_, _| ()).unwrap();
        let mut buf = AlignedBuf::zeroed(1);
        for offset in [512, 8192, u64::MAX - 4095] {
            assert_eq!(file.read_at(offset, &mut buf).unwrap_err().kind(), IoErrorKind::Invalid);
            assert_eq!(file.write_at(offset, &buf).unwrap_err().kind(), IoErrorKind::Invalid);
        }
    }

    #[test]
    fn one_holder_at_a_time() {
        let scratch = Scratch::new("lock");
        let first = BackingFile::create(&scratch.0, 4096, &mut |_, _| ()).unwrap();
        assert!(matches!(BackingFile::open(&scratch.0), Err(FileError::Locked(_))));
        let queue_end = first.duplicate().unwrap();
        drop(first);
        assert!(matches!(BackingFile::open(&scratch.0), Err(FileError::Locked(_))));
        drop(queue_end);
        BackingFile::open(&scratch.0).unwrap();
    }

    #[test]
    fn never_replaces_what_is_there() {
        let scratch = Scratch::new("exists");
        fs::write(&scratch.0, b"precious").unwrap();
        let made = BackingFile::create(&scratch.0, 4096, &mut |_, _| ());
        assert!(matches!(made, Err(FileError::Exists(_))));
        assert_eq!(fs::read(&scratch.0).unwrap(), b"precious");
    }

    #[test]
    fn a_full_filesystem_is_said_and_leaves_nothing() {
        let scratch = Scratch::new("full");
        let error = BackingFile::create(&scratch.0, 1 << 43, &mut |_, _| ()).unwrap_err();
        assert!(matches!(error, FileError::NoSpace(_, _)), "{error}");
        assert!(!scratch.0.exists() && !unfinished_name(&scratch.0).exists());
    }

    #[test]
    fn what_is_not_a_block_store_is_refused_with_advice() {
        assert!(matches!(BackingFile::open(Path::new("/")), Err(FileError::NotBlocks(_))));
        assert!(matches!(BackingFile::open(Path::new("/dev/null")), Err(FileError::NotBlocks(_))));
        let error = BackingFile::open(Path::new("/proc/self/comm")).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("/proc/self/comm") && text.contains("O_DIRECT"), "{text}");
    }
}
