//! The pages that carry what clients write from a core's connections to the shards. A write hands
//! its pages over and gets as many back with its reply, so the pool never changes its size. Pages
//! whose memory is to be given back are exchanged for others when they are free.

use heeler_core::event::Request;
use heeler_core::ids::{BLOCK_BYTES, BlockRef, PageId};
use heeler_hw::{Arena, crc32c};

#[derive(Debug)]
pub(crate) struct Transit {
    free: Vec<PageId>,
    total: usize,
    /// Pages from here on are not to be used any more.
    below: PageId,
    /// Such pages, to be given back.
    back: Vec<PageId>,
}

/// Pages that a write covers.
pub(crate) fn pages_of(request: &Request) -> usize {
    (request.offset as usize % BLOCK_BYTES + request.len as usize).div_ceil(BLOCK_BYTES)
}

impl Transit {
    pub(crate) fn new(pages: Vec<PageId>) -> Self {
        Self { total: pages.len(), free: pages, below: PageId::NONE, back: Vec::new() }
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes a page: one that comes back, or one that replaces one given back.
    pub(crate) fn give(&mut self, page: PageId) {
        assert!(page.is_some() && self.free.len() < self.total, "as many come back as went");
        if page < self.below {
            self.free.push(page);
        } else {
            self.back.push(page);
        }
    }

    /// Pages from `below` on are to be given back.
    pub(crate) fn set_below(&mut self, below: PageId) {
        self.below = below;
        let (back, free) = self.free.drain(..).partition(|page| *page >= below);
        self.free = free;
        self.back.extend::<Vec<PageId>>(back);
    }

    /// Pages that are nobody's now.
    pub(crate) fn take_back(&mut self) -> Vec<PageId> {
        std::mem::take(&mut self.back)
    }

    /// Puts the bytes of a write (zeroes for `None`) into pages, at their places in the blocks, and
    /// lists these in `blocks`. The checksum of a block that is not wholly covered means nothing,
    /// and neither do the other bytes of its page: the shard merges them. There are pages enough.
    pub(crate) fn load(
        &mut self,
        arena: &Arena,
        request: &Request,
        bytes: Option<&[u8]>,
        blocks: &mut Vec<BlockRef>,
    ) {
        blocks.clear();
        let len = request.len as usize;
        let mut done = 0;
        let mut at = request.offset as usize % BLOCK_BYTES;
        while done < len {
            let part = (BLOCK_BYTES - at).min(len - done);
            let page = self.free.pop().expect("the caller has seen that there are enough");
            let crc = match bytes {
                Some(bytes) => {
                    let bytes = &bytes[done..done + part];
                    arena.write(page, at, bytes);
                    if part == BLOCK_BYTES { crc32c(0, bytes) } else { 0 }
                }
                None => {
                    arena.fill_zero(page, at..at + part);
                    if part == BLOCK_BYTES { arena.crc(page) } else { 0 }
                }
            };
            blocks.push(BlockRef { page, crc });
            done += part;
            at = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use heeler_core::event::{Advice, RequestKind};
    use heeler_core::ids::VolumeId;

    fn write(offset: u32, len: u32) -> Request {
        let (kind, volume) = (RequestKind::Write, VolumeId(1));
        Request {
            id: 0,
            kind,
            fua: false,
            advice: Advice::default(),
            volume,
            object: 0,
            offset,
            len,
        }
    }

    #[test]
    fn bytes_lie_where_they_lie_in_their_blocks() {
        let arena = Arena::new(4).unwrap();
        let mut transit = Transit::new((0..4).map(PageId).collect());
        let bytes: Vec<u8> = (0..9000u32).map(|n| n as u8 | 1).collect();
        let request = write(8192 + 4000, 9000);
        assert_eq!(pages_of(&request), 4);
        let mut blocks = Vec::new();
        transit.load(&arena, &request, Some(&bytes), &mut blocks);
        assert_eq!((blocks.len(), transit.free()), (4, 0));
        let mut together = Vec::new();
        for block in &blocks {
            arena.with(block.page, |page| together.extend_from_slice(page));
        }
        assert_eq!(together[4000..13000], bytes[..]);
        for whole in [1, 2] {
            assert_eq!(blocks[whole].crc, arena.crc(blocks[whole].page));
        }
        blocks.iter().for_each(|block| transit.give(block.page));
        assert_eq!(transit.free(), 4);
    }

    #[test]
    fn pages_that_lose_their_memory_are_exchanged() {
        let arena = Arena::new(8).unwrap();
        let mut transit = Transit::new((0..4).map(PageId).collect());
        let mut blocks = Vec::new();
        transit.load(&arena, &write(0, 4096), Some(&[1; 4096]), &mut blocks);
        assert_eq!(blocks[0].page, PageId(3));
        transit.set_below(PageId(2));
        assert_eq!((transit.take_back(), transit.free()), (vec![PageId(2)], 2));
        transit.give(blocks[0].page);
        assert_eq!((transit.take_back(), transit.free()), (vec![PageId(3)], 2));
        transit.set_below(PageId(8));
        [PageId(6), PageId(7)].into_iter().for_each(|page| transit.give(page));
        assert_eq!((transit.take_back(), transit.free()), (vec![], 4));
    }

    #[test]
    fn zeroes_cover_what_a_page_held() {
        let arena = Arena::new(1).unwrap();
        arena.with_mut(PageId(0), |page| page.fill(9));
        let mut transit = Transit::new(vec![PageId(0)]);
        let mut blocks = Vec::new();
        transit.load(&arena, &write(4096 + 10, 20), None, &mut blocks);
        arena.with(PageId(0), |page| {
            assert!(page[10..30].iter().all(|byte| *byte == 0));
            assert_eq!((page[9], page[30]), (9, 9));
        });
    }
}
