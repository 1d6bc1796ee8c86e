//! What a block device can do: [`BlockQueue`] for a core at work, [`BlockFile`] for the plain
//! reads and writes at start and by offline tools.

use std::fmt;
use std::io;
use std::os::fd::RawFd;

use heeler_core::ids::{BLOCK_BYTES, PageId};
use heeler_core::limits::OP_PAGES_MAX;

use crate::arena::{Access, Arena};
use crate::file::AlignedBuf;

/// Bytes of one arena page, and the alignment of every device address.
pub const PAGE_BYTES: usize = BLOCK_BYTES;

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum IoKind {
    /// Device to pages.
    Read,
    /// Pages to device. Not durable before a later `Flush` is done.
    Write,
    /// Makes durable the writes whose completions were *reaped* before this was pushed, and
    /// promises nothing of others.
    Flush,
}

/// One operation. From `push` until its completion is reaped its pages belong to the device: of a
/// read they are touched by nobody, of a write they are only read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Io<'a> {
    /// Comes back in the completion.
    pub token: u64,
    /// What to do.
    pub kind: IoKind,
    /// Where on the device, in bytes, a multiple of 4096. Of a flush: 0.
    pub offset: u64,
    /// 1 to [`OP_PAGES_MAX`] pages. Of a flush: none.
    pub pages: &'a [PageId],
}

/// How an operation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// The operation's token.
    pub token: u64,
    /// All of it was done, or why not. After an error of a write any part of it may be on the
    /// device; after an error of a read the pages hold anything.
    pub result: Result<(), IoError>,
}

/// The queue holds as many operations as it can: reap first. The operation was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// A queue of operations on one block device, used by one thread. Operations run side by side and
/// complete in any order.
pub trait BlockQueue {
    /// Takes an operation. The list of pages is copied. It starts at the next `submit`. An address
    /// that is misaligned or past the end of the device is answered by a completion of kind
    /// [`IoErrorKind::Invalid`].
    ///
    /// # Errors
    /// [`Full`] when [`capacity`](Self::capacity) operations are in flight.
    ///
    /// # Panics
    /// For a number of pages that no operation may have.
    fn push(&mut self, io: Io<'_>) -> Result<(), Full>;

    /// Starts all that was pushed, in one call into the kernel.
    ///
    /// # Errors
    /// The kernel is short of something. Nothing is lost: what did not start waits for the next
    /// call.
    fn submit(&mut self) -> io::Result<()>;

    /// One operation that is done, if there is one. Never blocks.
    fn reap(&mut self) -> Option<Completion>;

    /// The arena's backed pages are, or are about to be, the first `pages` of it: makes ready for
    /// cheap transfers of those, and lets go of all others, none of which is in flight. A page that
    /// is backed and not covered can be used all the same.
    fn cover(&mut self, pages: u32);

    /// An eventfd that becomes readable when an operation is done. Whoever waits on it reads it
    /// first (it does not block) and reaps to `None` after. A simulated queue has none.
    fn event_fd(&self) -> Option<RawFd>;

    /// Operations pushed and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Operations that can be in flight.
    fn capacity(&self) -> usize;

    /// Size of the device in bytes, a multiple of 4096.
    fn size_bytes(&self) -> u64;
}

/// Plain blocking access to a block device: for superblocks at start and for offline tools.
pub trait BlockFile {
    /// Size of the device in bytes, a multiple of 4096.
    fn size_bytes(&self) -> u64;

    /// Fills `buf` from byte `offset`, a multiple of 4096.
    ///
    /// # Errors
    /// The device's, or `Invalid` for an address past the end or misaligned.
    fn read_at(&self, offset: u64, buf: &mut AlignedBuf) -> Result<(), IoError>;

    /// Writes `buf` at byte `offset`, a multiple of 4096. Durable after [`sync`](Self::sync).
    ///
    /// # Errors
    /// As `read_at`.
    fn write_at(&self, offset: u64, buf: &AlignedBuf) -> Result<(), IoError>;

    /// Makes all writes that returned before durable.
    ///
    /// # Errors
    /// The device's.
    fn sync(&self) -> Result<(), IoError>;
}

/// What sort of error it is: all that a state machine should ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum IoErrorKind {
    /// The device could not do it.
    Io,
    /// The filesystem under the file is full.
    NoSpace,
    /// The device is no longer there.
    Gone,
    /// The operation makes no sense: past the end, misaligned.
    Invalid,
}

/// Why an operation failed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct IoError {
    kind: IoErrorKind,
    errno: i32,
}

impl IoError {
    /// From the kernel's error number.
    #[must_use]
    pub fn from_errno(errno: i32) -> Self {
        let kind = match errno {
            libc::ENOSPC | libc::EDQUOT => IoErrorKind::NoSpace,
            libc::ENODEV | libc::ENXIO | libc::ESHUTDOWN | libc::ENOMEDIUM => IoErrorKind::Gone,
            libc::EINVAL | libc::EFBIG | libc::EOVERFLOW => IoErrorKind::Invalid,
            _ => IoErrorKind::Io,
        };
        Self { kind, errno }
    }

    /// The sort of error.
    #[must_use]
    pub fn kind(&self) -> IoErrorKind {
        self.kind
    }
}

impl From<IoErrorKind> for IoError {
    /// With the kernel's usual number for that sort.
    fn from(kind: IoErrorKind) -> Self {
        let errno = match kind {
            IoErrorKind::Io => libc::EIO,
            IoErrorKind::NoSpace => libc::ENOSPC,
            IoErrorKind::Gone => libc::ENODEV,
            IoErrorKind::Invalid => libc::EINVAL,
        };
        Self { kind, errno }
    }
}

impl From<io::Error> for IoError {
    fn from(error: io::Error) -> Self {
        Self::from_errno(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.errno).fmt(f)
    }
}

impl fmt::Debug for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({self})", self.kind)
    }
}

impl std::error::Error for IoError {}

impl Io<'_> {
    /// Whether the operation can be carried out on a device of `size` bytes.
    ///
    /// # Panics
    /// For a number of pages that no operation may have.
    pub(crate) fn fits(&self, size: u64) -> bool {
        match self.kind {
            IoKind::Flush => {
                assert!(self.pages.is_empty() && self.offset == 0, "a flush has no address");
                true
            }
            IoKind::Read | IoKind::Write => {
                let pages = self.pages.len();
                assert!((1..=OP_PAGES_MAX).contains(&pages), "an operation of {pages} pages");
                range_fits(self.offset, pages * PAGE_BYTES, size)
            }
        }
    }

    /// Marks the pages as used by the device.
    pub(crate) fn hold_pages(&self, arena: &Arena) {
        for &page in self.pages {
            arena.hold(page, self.kind.access());
        }
    }
}

impl IoKind {
    /// How the device uses the pages of such an operation.
    pub(crate) fn access(self) -> Access {
        if self == Self::Read { Access::Exclusive } else { Access::Shared }
    }
}

/// Whether `len` bytes at `offset` are aligned and inside a device of `size` bytes.
pub(crate) fn range_fits(offset: u64, len: usize, size: u64) -> bool {
    let end = offset.checked_add(len as u64);
    offset.is_multiple_of(PAGE_BYTES as u64) && end.is_some_and(|end| end <= size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_a_kind_and_the_systems_text() {
        let error = IoError::from_errno(libc::ENOSPC);
        assert_eq!(error.kind(), IoErrorKind::NoSpace);
        assert!(error.to_string().contains("No space left"), "{error}");
        assert_eq!(IoError::from_errno(libc::EREMOTEIO).kind(), IoErrorKind::Io);
        for kind in [IoErrorKind::Io, IoErrorKind::NoSpace, IoErrorKind::Gone, IoErrorKind::Invalid]
        {
            let error = IoError::from(kind);
            assert_eq!(IoError::from_errno(error.errno), error);
        }
    }

    #[test]
    fn addresses_are_checked_without_overflow() {
        assert!(range_fits(4096, 4096, 8192));
        assert!(!range_fits(4096, 8192, 8192));
        assert!(!range_fits(512, 4096, 8192));
        assert!(!range_fits(u64::MAX - 4095, 4096, 8192));
    }
}
