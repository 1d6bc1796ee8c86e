//! One list, hot: the front on every use, victims from the back.

use super::{End, Lens, Level, List};

pub(super) fn place(level: Level) -> (List, End) {
    match level {
        Level::High => (List::Hot, End::Front),
        Level::Known | Level::Low => (List::Hot, End::Back),
    }
}

/// What another policy left on warm_in was used once only, and goes first.
pub(super) fn victim(lens: Lens) -> List {
    if lens.warm_in > 0 { List::WarmIn } else { List::Hot }
}
