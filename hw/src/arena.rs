//! The arena: one mapping of 4 KiB pages for the whole process, aligned for DMA.
//!
//! # Reserved and backed
//!
//! The mapping reserves addresses for as many pages as there may ever be. Memory is in *chunks*,
//! and the first [`Arena::backed`] pages have it: only they may be used. [`Arena::grow`] backs more
//! chunks, [`Arena::shrink`] gives the memory of the last ones back to the system. Before that
//! their pages must be in nobody's hands, and every queue must have let go of them
//! ([`BlockQueue::cover`](crate::BlockQueue::cover)).
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
//! operation in flight is counted at its page, and a breach (a page without memory included)
//! panics with the page's number.** The simulation and all tests run that way. Bounds are checked
//! in every build.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;
#[cfg(debug_assertions)]
use std::sync::atomic::AtomicU16;
use std::sync::atomic::{AtomicU32, Ordering};

use heeler_core::ids::PageId;

use crate::crc::crc32c;
use crate::queue::PAGE_BYTES;

/// Bytes of the smallest chunk, and what chunks are aligned to: a multiple of a huge page, so that
/// no huge page lies in two chunks.
const CHUNK_BYTES_MIN: usize = 4 << 20;
/// Chunks of an arena at most: the kernel's limit for the fixed buffers of one io_uring.
const CHUNKS_MAX: usize = 1 << 14;
/// Pages of an arena at most: that many chunks of 1 GiB, the kernel's limit for one fixed buffer,
/// less one, since no page is numbered `u32::MAX`.
const PAGES_MAX: u32 = u32::MAX - 1;

/// A handle to the process's pages. Clones are cheap and name the same pages; the mapping goes
/// with the last of them.
#[derive(Clone)]
pub struct Arena(Arc<Mapping>);

struct Mapping {
    /// Where the mapping begins, and its size in bytes: room to align the pages is in it.
    whole: (NonNull<u8>, usize),
    /// The first page, aligned as a chunk.
    base: NonNull<u8>,
    /// Pages that have an address.
    pages: u32,
    chunk_pages: u32,
    /// The first of them, which have memory.
    backed: AtomicU32,
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
    /// Maps `pages` pages of zeroes (4 KiB each), all backed. Huge pages are asked for, not
    /// required.
    ///
    /// # Errors
    /// What mmap says; `InvalidInput` for no pages.
    pub fn new(pages: u32) -> io::Result<Self> {
        let arena = Self::reserve(pages)?;
        arena.0.backed.store(pages, Ordering::Relaxed);
        Ok(arena)
    }

    /// Reserves addresses for `pages` pages, of which none is backed yet. The last chunk may be
    /// short.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn reserve(pages: u32) -> io::Result<Self> {
        if pages == 0 || pages > PAGES_MAX {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let bytes = pages as usize * PAGE_BYTES;
        let whole_bytes = bytes + CHUNK_BYTES_MIN;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that
        // exists.
        let whole = unsafe { libc::mmap(ptr::null_mut(), whole_bytes, protection, flags, -1, 0) };
        if whole == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let whole = NonNull::new(whole.cast::<u8>()).expect("mmap does not map address 0 unasked");
        let skipped = whole.as_ptr().align_offset(CHUNK_BYTES_MIN).min(CHUNK_BYTES_MIN);
        // SAFETY: less than the room for it is skipped.
        let base = unsafe { whole.add(skipped) };
        if !cfg!(miri) {
            // SAFETY: the range is in the mapping made above. It is advice: a failure changes
            // nothing.
            unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        Ok(Self(Arc::new(Mapping {
            whole: (whole, whole_bytes),
            base,
            pages,
            chunk_pages: Self::chunk_pages_of(pages),
            backed: AtomicU32::new(0),
            #[cfg(debug_assertions)]
            uses: (0..pages).map(|_| AtomicU16::new(0)).collect(),
        })))
    }

    /// Pages of one chunk of an arena of so many pages, a power of two.
    #[must_use]
    pub fn chunk_pages_of(pages: u32) -> u32 {
        let bytes = (pages as usize * PAGE_BYTES).div_ceil(CHUNKS_MAX).next_power_of_two();
        (bytes.max(CHUNK_BYTES_MIN) / PAGE_BYTES) as u32
    }

    /// Pages that have an address: their ids are `0..pages`.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.0.pages
    }

    /// Pages that have memory: the first ones.
    #[must_use]
    pub fn backed(&self) -> u32 {
        // Relaxed: who uses a page has heard of it by a message.
        self.0.backed.load(Ordering::Relaxed)
    }

    /// Pages of one chunk, a power of two.
    #[must_use]
    pub fn chunk_pages(&self) -> u32 {
        self.0.chunk_pages
    }

    /// Backs pages up to `pages`, rounded up to a whole chunk, with zeroes. The memory is taken
    /// from the system at once where it can be, else when it is touched. One thread may do this.
    ///
    /// # Errors
    /// The system has not enough memory; nothing is changed.
    ///
    /// # Panics
    /// More pages than are reserved.
    pub fn grow(&self, pages: u32) -> io::Result<()> {
        assert!(pages <= self.0.pages, "{pages} pages of an arena of {}", self.0.pages);
        let (from, to) = (self.backed(), self.whole_chunks(pages));
        if from >= to {
            return Ok(());
        }
        if let Err(error) = self.advise(from..to, libc::MADV_POPULATE_WRITE) {
            // Anything else says that this kernel does not know the advice, and so takes the
            // memory later.
            if error.raw_os_error() == Some(libc::ENOMEM) {
                // It may have taken some of it.
                let _ = self.advise(from..to, libc::MADV_DONTNEED);
                return Err(error);
            }
        }
        self.0.backed.store(to, Ordering::Relaxed);
        Ok(())
    }

    /// Gives the memory of all pages from `pages`, rounded up to a whole chunk, back to the system.
    /// They are in nobody's hands. One thread may do this.
    ///
    /// # Errors
    /// What the kernel says; the pages are not backed any more all the same.
    pub fn shrink(&self, pages: u32) -> io::Result<()> {
        let (from, to) = (self.whole_chunks(pages), self.backed());
        if from >= to {
            return Ok(());
        }
        self.0.backed.store(from, Ordering::Relaxed);
        #[cfg(debug_assertions)]
        for page in from..to {
            let uses = self.0.uses[page as usize].load(Ordering::Relaxed);
            assert_eq!(uses, 0, "PageId({page}) is in use and loses its memory");
        }
        self.advise(from..to, libc::MADV_DONTNEED)
    }

    /// The pages rounded up to whole chunks, as far as there are any.
    fn whole_chunks(&self, pages: u32) -> u32 {
        pages.checked_next_multiple_of(self.0.chunk_pages).unwrap_or(u32::MAX).min(self.0.pages)
    }

    fn advise(&self, pages: Range<u32>, advice: libc::c_int) -> io::Result<()> {
        let at = self.at(PageId(pages.start), 0, PAGE_BYTES).cast();
        let bytes = pages.len() * PAGE_BYTES;
        // SAFETY: the range lies in the mapping. Nobody uses these pages (rule of the module), so
        // it does not matter that they may become zeroes.
        if !cfg!(miri) && unsafe { libc::madvise(at, bytes, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
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
            assert!(page.0 < self.backed(), "{page:?} is used and has no memory");
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

/// Gives the memory of all whole pages in `spare` back to the system, as far as it takes it. They
/// are zeroes afterwards.
pub fn give_back<T>(spare: &mut [MaybeUninit<T>]) {
    let bytes = spare.as_mut_ptr_range();
    let first = (bytes.start.addr()).next_multiple_of(PAGE_BYTES) - bytes.start.addr();
    let end = bytes.end.addr() / PAGE_BYTES * PAGE_BYTES;
    let len = end.saturating_sub(bytes.start.addr() + first);
    if len > 0 && !cfg!(miri) {
        // SAFETY: the range lies in `spare`, which is borrowed alone and may hold anything. It is
        // advice: a failure changes nothing.
        unsafe {
            let at = bytes.start.cast::<u8>().add(first);
            libc::madvise(at.cast(), len, libc::MADV_DONTNEED);
        }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena")
            .field("pages", &self.pages())
            .field("backed", &self.backed())
            .finish_non_exhaustive()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (whole, bytes) = self.whole;
        // SAFETY: the range was mapped by `Arena::reserve`; this is the last handle, and queues
        // hold one for as long as the kernel may use their pages.
        unsafe { libc::munmap(whole.as_ptr().cast(), bytes) };
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
    fn chunks_are_backed_and_given_back() {
        let arena = Arena::reserve(2500).unwrap();
        assert_eq!((arena.pages(), arena.backed(), arena.chunk_pages()), (2500, 0, 1024));
        arena.grow(1).unwrap();
        assert_eq!(arena.backed(), 1024);
        arena.grow(1025).unwrap();
        arena.grow(3).unwrap();
        assert_eq!(arena.backed(), 2048, "growing does not shrink");
        let (kept, lost) = (PageId(1023), PageId(1024));
        arena.write(kept, 0, b"kept");
        arena.write(lost, 0, b"lost");
        arena.shrink(1024).unwrap();
        arena.shrink(2000).unwrap();
        assert_eq!(arena.backed(), 1024, "shrinking does not grow");
        arena.grow(2500).unwrap();
        assert_eq!(arena.backed(), 2500, "the last chunk is short");
        assert!(arena.with(kept, |bytes| bytes.starts_with(b"kept")));
        assert!(cfg!(miri) || arena.with(lost, |bytes| bytes.iter().all(|&byte| byte == 0)));
        arena.shrink(0).unwrap();
        assert_eq!(arena.backed(), 0);
    }

    /// So that one io_uring has room for all of them, and the kernel takes each.
    #[test]
    fn a_large_arena_has_large_chunks() {
        if cfg!(miri) {
            return;
        }
        for (gigabytes, chunk_bytes) in [(1u32, 4 << 20), (64, 4 << 20), (65, 8 << 20)] {
            // Debug builds count the uses of every page.
            let pages = gigabytes << 18;
            let arena = Arena::reserve(pages).unwrap();
            assert_eq!(arena.chunk_pages() as usize * PAGE_BYTES, chunk_bytes);
            assert_eq!(arena.at(PageId(0), 0, 1).addr() % CHUNK_BYTES_MIN, 0);
        }
        let largest = (PAGES_MAX as usize * PAGE_BYTES).div_ceil(CHUNKS_MAX).next_power_of_two();
        assert_eq!(largest, 1 << 30);
    }

    #[test]
    fn what_is_given_back_is_zeroes_and_nothing_else_changes() {
        let mut bytes = vec![7u8; 4 * PAGE_BYTES];
        let page_starts = bytes.as_ptr().addr().next_multiple_of(PAGE_BYTES);
        let first = page_starts - bytes.as_ptr().addr();
        // SAFETY: initialised bytes may be treated as ones that need not be; nothing that is not
        // initialised is written.
        let spare: &mut [MaybeUninit<u8>] = unsafe { &mut *(&raw mut bytes[1..] as *mut _) };
        give_back(spare);
        give_back(&mut spare[..10]);
        let zeroes = bytes.iter().filter(|byte| **byte == 0).count();
        assert!(cfg!(miri) || zeroes >= 2 * PAGE_BYTES && zeroes.is_multiple_of(PAGE_BYTES));
        assert!(bytes[..first.max(1)].iter().all(|byte| *byte == 7));
    }

    #[cfg(debug_assertions)]
    #[test]
    #[should_panic(expected = "has no memory")]
    fn a_page_without_memory_is_not_used() {
        let arena = Arena::reserve(2048).unwrap();
        arena.grow(1024).unwrap();
        arena.fill_zero(PageId(1024), 0..1);
    }

    #[cfg(debug_assertions)]
    #[test]
    #[should_panic(expected = "loses its memory")]
    fn a_page_in_use_does_not_lose_its_memory() {
        let arena = Arena::new(2048).unwrap();
        arena.hold(PageId(1500), Access::Shared);
        let _ = arena.shrink(1024);
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
