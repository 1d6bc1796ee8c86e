//! 2Q as BlueStore has it: warm_in is a FIFO of what was seen once, its victims leave ghosts on
//! warm_out, and only what comes back while its ghost is there becomes hot.

use super::{End, Level, List, Tag};

/// warm_in's share of the resident buffers, in percent, while both lists want theirs.
const KIN_PERCENT: u32 = 50;
/// Ghosts, in percent of the pages.
const KOUT_PERCENT: u32 = 50;

pub(super) fn place(hint: Tag, level: Level) -> (List, End) {
    match (hint, level) {
        (Tag::New, Level::High) => (List::WarmIn, End::Front),
        (Tag::New, Level::Low) => (List::WarmIn, End::Back),
        // Rewritten while in the FIFO: young again (plain 2Q would keep its place).
        (Tag::WarmIn, _) => (List::WarmIn, End::Front),
        // The only promotion.
        (Tag::WarmOut, _) => (List::Hot, End::Front),
        (Tag::Hot, _) => (List::Hot, End::Front),
    }
}

/// A use while in the FIFO says nothing new: correlated references are what warm_in absorbs.
pub(super) fn touched(list: List) -> Option<List> {
    match list {
        List::WarmIn => None,
        List::Hot => Some(List::Hot),
    }
}

/// Of what stays after the eviction, warm_in may have its share and hot the rest; one of the two is
/// too long. A list that is short of its share lends it to the other by this: as long as hot is
/// short, warm_in is the one too long, and the other way round.
pub(super) fn victim(warm_in: u32, hot: u32) -> Option<List> {
    let stay = (warm_in + hot).checked_sub(1)?;
    let kin = (u64::from(stay) * u64::from(KIN_PERCENT) / 100) as u32;
    Some(if warm_in > kin { List::WarmIn } else { List::Hot })
}

pub(super) const fn ghosts_max(pages: u32) -> u32 {
    (pages as u64 * KOUT_PERCENT as u64 / 100) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_list_gives_and_slack_is_lent() {
        assert_eq!(victim(0, 0), None);
        assert_eq!(victim(1, 0), Some(List::WarmIn));
        assert_eq!(victim(0, 1), Some(List::Hot));
        // Of eight, seven stay: three for warm_in, four for hot.
        assert_eq!(victim(8, 0), Some(List::WarmIn));
        assert_eq!(victim(4, 4), Some(List::WarmIn));
        assert_eq!(victim(3, 5), Some(List::Hot));
        assert_eq!(victim(0, 8), Some(List::Hot));
    }

    #[test]
    fn a_victim_comes_from_a_list_that_has_one() {
        for warm_in in 0..40 {
            for hot in 0..40 {
                match victim(warm_in, hot) {
                    None => assert_eq!((warm_in, hot), (0, 0)),
                    Some(List::WarmIn) => assert!(warm_in > 0),
                    Some(List::Hot) => assert!(hot > 0),
                }
            }
        }
    }

    #[test]
    fn only_a_ghost_is_promoted() {
        use End::{Back, Front};
        assert_eq!(place(Tag::New, Level::High), (List::WarmIn, Front));
        assert_eq!(place(Tag::New, Level::Low), (List::WarmIn, Back));
        for level in [Level::Low, Level::High] {
            assert_eq!(place(Tag::WarmIn, level), (List::WarmIn, Front));
            assert_eq!(place(Tag::WarmOut, level), (List::Hot, Front));
            assert_eq!(place(Tag::Hot, level), (List::Hot, Front));
        }
    }
}
