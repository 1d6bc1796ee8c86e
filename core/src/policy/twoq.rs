//! 2Q, the full version: warm_in (A1in) is a FIFO of what was seen once, its victims leave ghosts
//! on warm_out (A1out), and only what comes back while its ghost is there goes to hot (Am, an LRU).

use super::{Lens, List, Touched, percent};

/// warm_in's share of the pages, in percent, while hot wants the rest.
const KIN_PERCENT: u32 = 25;
/// Ghosts, in percent of the pages.
const KOUT_PERCENT: u32 = 50;

/// A use while in the FIFO says nothing new: correlated references are what warm_in absorbs.
pub(super) fn touched(list: List) -> Touched {
    match list {
        List::WarmIn => Touched::Stays,
        List::Hot => Touched::Front(List::Hot),
    }
}

pub(super) fn victim(lens: Lens) -> List {
    let kin = percent(lens.capacity, KIN_PERCENT).max(1);
    if lens.warm_in > kin { List::WarmIn } else { List::Hot }
}

pub(super) const fn ghosts_max(pages: u32) -> u32 {
    percent(pages, KOUT_PERCENT)
}
