//! The arena: one mapping of 4 KiB pages for the whole process, aligned for DMA.
//!
//! # Who may touch a page
//!
//! The arena does not allocate. Pages are numbers ([`PageId`]), and whoever holds a number owns the
//! page or borrows it by a rule stated where the number was handed over:
//!
//! * a page that somebody writes (by copying into it, or as the target of a device read in flight)
//!   is touched by nobody else;
//! * a page that is shared (lent to a reply, source of a device write in flight) is only read.
//!
//! The type system does not see this rule, and the soundness of the safe methods below rests on
//! it: page numbers cross cores and device queues in messages, where no borrow can follow them.
//! So the rule is checked instead: **in builds with debug assertions every access and every device
//! operation in flight is counted at its page, and a breach panics with the page's number.** The
//! simulation and all tests run that way. Bounds are checked in every build.

use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;
#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicU16, Ordering};

use heeler_core::ids::PageId;

use crate::crc::crc32c;
use crate::queue::PAGE_BYTES;

/// A handle to the process's pages. Clones are cheap and name the same pages; the mapping goes
/// with the last of them.
#[derive(Clone)]
pub struct Arena(Arc<Mapping>);

struct Mapping {
    base: NonNull<u8>,
    pages: u32,
    /// How each page is used at this moment: 0, a number of readers, or [`WRITER`].
    #[cfg(debug_assertions)]
    uses: Box<[AtomicU16]>,
}

#[cfg(debug_assertions)]
const WRITER: u16 = u16::MAX;

/// How a page is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    /// Read, by any number of users at a time.
    Shared,
    /// Written, by one user.
    Exclusive,
}

/// Ends a use of a page when dropped, even by a panic.
struct Use<'a> {
    arena: &'a Arena,
    page: PageId,
    access: Access,
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.arena.release(self.page, self.access);
    }
}

// SAFETY: the mapping belongs to no thread; accesses from several threads keep to the ownership
// rule of the module, under which no two of them race.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Arena {
    /// Maps `pages` pages of zeroes (4 KiB each). Memory is taken when a page is first touched, or
    /// at once when a ring registers the arena. Huge pages are asked for, not required.
    ///
    /// # Errors
    /// What mmap says; `InvalidInput` for no pages.
    pub fn new(pages: u32) -> io::Result<Self> {
        if pages == 0 || pages == u32::MAX {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let bytes = pages as usize * PAGE_BYTES;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that
        // exists.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        if !cfg!(miri) {
            // SAFETY: the range is the mapping made above. It is advice: a failure changes nothing.
            unsafe { libc::madvise(base, bytes, libc::MADV_HUGEPAGE) };
        }
        let base = NonNull::new(base.cast()).expect("mmap does not map address 0 unasked");
        Ok(Self(Arc::new(Mapping {
            base,
            pages,
            #[cfg(debug_assertions)]
            uses: (0..pages).map(|_| AtomicU16::new(0)).collect(),
        })))
    }

    /// Number of pages: their ids are `0..pages`.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.0.pages
    }

    /// Copies bytes of the page, from byte `from` on, to `out`.
    ///
    /// # Panics
    /// Out of the page or of the arena.
    pub fn read(&self, page: PageId, from: usize, out: &mut [u8]) {
        let at = self.at(page, from, out.len());
        let _use = self.enter(page, Access::Shared);
        // SAFETY: `at` has checked the source; `out` is a unique borrow, and nobody writes the page
        // (module rule), so they do not overlap.
        unsafe { ptr::copy_nonoverlapping(at, out.as_mut_ptr(), out.len()) }
    }

    /// Copies `data` into the page, from byte `at` on.
    ///
    /// # Panics
    /// Out of the page or of the arena.
    pub fn write(&self, page: PageId, at: usize, data: &[u8]) {
        let at = self.at(page, at, data.len());
        let _use = self.enter(page, Access::Exclusive);
        // SAFETY: `at` has checked the target; nobody else touches the page (module rule), so
        // `data` does not lie in it.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), at, data.len()) }
    }

    /// Copies the bytes `range` of page `src` to the same place of page `dst`.
    ///
    /// # Panics
    /// Out of the page or of the arena, or `dst` is `src`.
    pub fn copy(&self, dst: PageId, src: PageId, range: Range<usize>) {
        assert_ne!(dst, src, "a page is not copied to itself");
        let len = range.end.checked_sub(range.start).expect("a range that ends after its start");
        let (to, from) = (self.at(dst, range.start, len), self.at(src, range.start, len));
        let _target = self.enter(dst, Access::Exclusive);
        let _source = self.enter(src, Access::Shared);
        // SAFETY: both ends are checked, in different pages; nobody else touches `dst`, nobody
        // writes `src` (module rule).
        unsafe { ptr::copy_nonoverlapping(from, to, len) }
    }

    /// Makes the bytes `range` of the page zero.
    ///
    /// # Panics
    /// Out of the page or of the arena.
    pub fn fill_zero(&self, page: PageId, range: Range<usize>) {
        let len = range.end.checked_sub(range.start).expect("a range that ends after its start");
        let at = self.at(page, range.start, len);
        let _use = self.enter(page, Access::Exclusive);
        // SAFETY: `at` has checked the target; nobody else touches the page (module rule).
        unsafe { ptr::write_bytes(at, 0, len) }
    }

    /// CRC32C of the page's 4096 bytes.
    #[must_use]
    pub fn crc(&self, page: PageId) -> u32 {
        self.with(page, |bytes| crc32c(0, bytes))
    }

    /// Shows the page to `f`, which must not write it by another call.
    ///
    /// # Panics
    /// Out of the arena.
    pub fn with<R>(&self, page: PageId, f: impl FnOnce(&[u8; PAGE_BYTES]) -> R) -> R {
        let at = self.at(page, 0, PAGE_BYTES);
        let _use = self.enter(page, Access::Shared);
        // SAFETY: checked, initialised (by the kernel, with zeroes, at first), of alignment 1, and
        // nobody writes it while `f` runs (module rule).
        f(unsafe { &*at.cast() })
    }

    /// Lends the page to `f`, which must not touch it by another call.
    ///
    /// # Panics
    /// Out of the arena.
    pub fn with_mut<R>(&self, page: PageId, f: impl FnOnce(&mut [u8; PAGE_BYTES]) -> R) -> R {
        let at = self.at(page, 0, PAGE_BYTES);
        let _use = self.enter(page, Access::Exclusive);
        // SAFETY: as in `with`, and nobody else touches the page while `f` runs (module rule).
        f(unsafe { &mut *at.cast() })
    }

    /// The address of `len` bytes at byte `from` of the page, which lie inside the page.
    pub(crate) fn at(&self, page: PageId, from: usize, len: usize) -> *mut u8 {
        assert!(page.0 < self.0.pages, "{page:?} of an arena of {} pages", self.0.pages);
        assert!(from <= PAGE_BYTES && len <= PAGE_BYTES - from, "{len} bytes at {from} of a page");
        // SAFETY: the offset is inside the mapping, by the assertions.
        unsafe { self.0.base.as_ptr().add(page.0 as usize * PAGE_BYTES + from) }
    }

    /// Starts a use of the page that lasts beyond the call, by a device. In builds without debug
    /// assertions this checks the bounds only.
    pub(crate) fn hold(&self, page: PageId, access: Access) {
        assert!(page.0 < self.0.pages, "{page:?} of an arena of {} pages", self.0.pages);
        #[cfg(debug_assertions)]
        {
            let taken = |now: u16| match access {
                Access::Shared => now.checked_add(1).filter(|&readers| readers < WRITER),
                Access::Exclusive => (now == 0).then_some(WRITER),
            };
            // Relaxed: this is a counter. The order of accesses comes from the messages that carry
            // the page; an order made here would hide races from the tools that look for them.
            let uses = &self.0.uses[page.0 as usize];
            let result = uses.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken);
            if let Err(now) = result {
                let by = if now == WRITER { "a writer" } else { "readers" };
                panic!("{page:?} is wanted for {access:?} access and in use by {by}");
            }
        }
        #[cfg(not(debug_assertions))]
        let _ = access;
    }

    /// Ends a use.
    pub(crate) fn release(&self, page: PageId, access: Access) {
        #[cfg(debug_assertions)]
        {
            let uses = &self.0.uses[page.0 as usize];
            match access {
                Access::Shared => uses.fetch_sub(1, Ordering::Relaxed),
                Access::Exclusive => uses.swap(0, Ordering::Relaxed),
            };
        }
        #[cfg(not(debug_assertions))]
        let _ = (page, access);
    }

    fn enter(&self, page: PageId, access: Access) -> Use<'_> {
        self.hold(page, access);
        Use { arena: self, page, access }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("pages", &self.0.pages).finish_non_exhaustive()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `Arena::new`; this is the last handle, and queues hold
        // one for as long as the kernel may use their pages.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.pages as usize * PAGE_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: PageId = PageId(0);
    const B: PageId = PageId(2);

    #[test]
    fn starts_as_zeroes_and_keeps_what_is_written() {
        let arena = Arena::new(3).unwrap();
        assert!(arena.with(A, |bytes| bytes.iter().all(|&byte| byte == 0)));
        arena.write(A, 4090, b"abcdef");
        arena.write(B, 0, b"xyz");
        let mut out = [0; 4];
        arena.read(A, 4092, &mut out);
        assert_eq!(&out, b"cdef");
        assert!(arena.with(PageId(1), |bytes| bytes.iter().all(|&byte| byte == 0)));
        assert_eq!(arena.crc(B), arena.with(B, |bytes| crc32c(0, bytes)));
        assert_ne!(arena.crc(B), arena.crc(PageId(1)));
    }

    #[test]
    fn copies_and_zeroes_ranges_only() {
        let arena = Arena::new(3).unwrap();
        arena.with_mut(A, |bytes| bytes.fill(7));
        arena.with_mut(B, |bytes| bytes.fill(9));
        arena.copy(B, A, 10..20);
        arena.copy(B, A, 4096..4096);
        arena.fill_zero(B, 18..30);
        arena.with(B, |bytes| {
            for (i, &byte) in bytes.iter().enumerate() {
                let expected = match i {
                    10..18 => 7,
                    18..30 => 0,
                    _ => 9,
                };
                assert_eq!(byte, expected, "byte {i}");
            }
        });
    }

    #[test]
    fn pages_are_aligned_for_direct_io() {
        let arena = Arena::new(2).unwrap();
        assert_eq!(arena.at(PageId(1), 0, PAGE_BYTES).addr() % PAGE_BYTES, 0);
    }

    #[test]
    fn threads_share_the_pages() {
        let arena = Arena::new(2).unwrap();
        let theirs = arena.clone();
        std::thread::spawn(move || theirs.write(A, 0, b"far")).join().unwrap();
        let mut out = [0; 3];
        arena.read(A, 0, &mut out);
        assert_eq!(&out, b"far");
    }

    #[test]
    #[should_panic(expected = "of an arena of 2 pages")]
    fn refuses_a_page_that_is_not_there() {
        Arena::new(2).unwrap().fill_zero(PageId(2), 0..1);
    }

    #[test]
    #[should_panic(expected = "of a page")]
    fn refuses_bytes_beyond_the_page() {
        Arena::new(2).unwrap().write(A, 4095, b"ab");
    }

    #[test]
    #[should_panic(expected = "not copied to itself")]
    fn refuses_to_copy_a_page_to_itself() {
        Arena::new(2).unwrap().copy(A, A, 0..1);
    }

    #[test]
    fn refuses_to_have_no_pages() {
        assert_eq!(Arena::new(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[cfg(debug_assertions)]
    #[test]
    fn a_breach_of_ownership_is_seen() {
        use std::panic::{AssertUnwindSafe, catch_unwind};
        let arena = Arena::new(2).unwrap();
        let breach = |f: &dyn Fn()| catch_unwind(AssertUnwindSafe(f)).is_err();

        assert!(breach(&|| arena.with(A, |_| arena.write(A, 0, b"x"))));
        assert!(breach(&|| drop(arena.with_mut(A, |_| arena.crc(A)).to_string())));
        arena.hold(A, Access::Shared);
        assert!(!breach(&|| arena.with(A, |_| ())), "reading is shared");
        assert!(breach(&|| arena.fill_zero(A, 0..1)), "a device write is under way");
        arena.release(A, Access::Shared);
        arena.hold(A, Access::Exclusive);
        assert!(breach(&|| arena.with(A, |_| ())), "a device read is under way");
        arena.release(A, Access::Exclusive);
        assert!(!breach(&|| arena.write(A, 0, b"x")), "the panics above have left no use behind");
    }
}
