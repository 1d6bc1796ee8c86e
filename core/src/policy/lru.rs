//! One list, hot: the front on every use, victims from the back.

use super::{End, Level, List};

pub(super) fn place(level: Level) -> (List, End) {
    match level {
        Level::High => (List::Hot, End::Front),
        Level::Low => (List::Hot, End::Back),
    }
}

pub(super) fn touched() -> Option<List> {
    Some(List::Hot)
}

/// What 2Q left on warm_in was used once only, and goes first.
pub(super) fn victim(warm_in: u32, hot: u32) -> Option<List> {
    match (warm_in, hot) {
        (0, 0) => None,
        (0, _) => Some(List::Hot),
        _ => Some(List::WarmIn),
    }
}
