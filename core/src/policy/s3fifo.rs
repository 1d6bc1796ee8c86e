//! S3-FIFO: three FIFOs. warm_in is small and lets go quickly of what is not used a second time;
//! hot is large and reinserts what was used since it came; a use only counts.

use super::{Lens, List, Verdict, percent};

/// warm_in's share of the pages, in percent.
const SMALL_PERCENT: u32 = 10;
/// Uses while on warm_in that take a buffer to hot.
const PROMOTION_USES: u8 = 2;
/// Uses that are told apart.
pub(super) const USES_MAX: u8 = 3;

pub(super) fn victim(lens: Lens) -> List {
    if lens.warm_in >= small(lens.capacity) { List::WarmIn } else { List::Hot }
}

pub(super) fn verdict(list: List, uses: u8) -> Verdict {
    match (list, uses) {
        (List::WarmIn, PROMOTION_USES..) => Verdict::Spare(List::Hot, 0),
        (List::WarmIn, _) => Verdict::Evict { ghost: true },
        (List::Hot, 0) => Verdict::Evict { ghost: false },
        (List::Hot, uses) => Verdict::Spare(List::Hot, uses - 1),
    }
}

/// As many as hot may have buffers.
pub(super) const fn ghosts_max(pages: u32) -> u32 {
    pages.saturating_sub(small(pages))
}

const fn small(pages: u32) -> u32 {
    let small = percent(pages, SMALL_PERCENT);
    if small == 0 { 1 } else { small }
}
