//! 2Q as BlueStore has it. It differs from the full version in the shares, in lists that lend each
//! other what they do not use, and in that rewriting a block in the FIFO makes it young again.

use super::{Lens, List, Tag, Touched, percent, twoq};

/// warm_in's share of the resident buffers, in percent, while both lists want theirs.
const KIN_PERCENT: u32 = 50;

pub(super) fn touched(list: List, write: bool) -> Touched {
    match list {
        List::WarmIn if write => Touched::Front(List::WarmIn),
        _ => twoq::touched(list),
    }
}

/// Of what will be listed, the new buffer included, warm_in may have its share and hot the rest;
/// one of the two is too long. A list that is short of its share lends it to the other by this.
pub(super) fn victim(lens: Lens, incoming: Tag) -> List {
    let comes_to_hot = incoming >= Tag::WarmOut;
    let warm_in = lens.warm_in + u32::from(!comes_to_hot);
    let kin = percent(lens.warm_in + lens.hot, KIN_PERCENT);
    if warm_in > kin { List::WarmIn } else { List::Hot }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_list_gives_and_slack_is_lent() {
        let of = |warm_in, hot, incoming| {
            victim(Lens { warm_in, hot, capacity: warm_in + hot }, incoming)
        };
        // Of eight, four are warm_in's.
        assert_eq!(of(8, 0, Tag::New), List::WarmIn);
        assert_eq!(of(4, 4, Tag::New), List::WarmIn);
        assert_eq!(of(3, 5, Tag::New), List::Hot);
        assert_eq!(of(4, 4, Tag::WarmOut), List::Hot);
        assert_eq!(of(5, 3, Tag::WarmOut), List::WarmIn);
        assert_eq!(of(0, 8, Tag::New), List::Hot);
    }
}
