//! Which clean buffer leaves RAM first. A policy only decides; [`Buffers`](crate::buffer::Buffers)
//! owns the lists and does what it says.
//!
//! All policies share three lists: *warm_in*, where a block begins; *hot*, where it goes when it
//! has shown that it comes back; and *warm_out*, the ghosts of blocks that left. They differ
//! in what a use does, in which list gives the next victim, and in whether that victim is let off.

mod lru;
mod reuse;
mod s3fifo;
mod twoq;
mod twoq_bluestore;

pub(crate) use reuse::Reuse;

/// What a buffer's past says about it, lowest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Tag {
    /// Never listed.
    New,
    /// On warm_in.
    WarmIn,
    /// On warm_out: a ghost, left warm_in a short time ago and has no data.
    WarmOut,
    /// On hot.
    Hot,
}

/// What a policy remembers of a buffer or ghost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mark {
    /// Its last use, in units of [`Reuse`].
    used: u16,
    /// Its kind, as [`Reuse`] tells them apart.
    kind: u8,
    /// Uses since it came to its list, as far as they count.
    pub(crate) uses: u8,
}

impl Mark {
    /// Nothing is known.
    pub const NEW: Self = Self { used: 0, kind: 0, uses: 0 };

    /// As the record of heat has it.
    pub(crate) const fn to_bytes(self) -> [u8; 4] {
        let used = self.used.to_le_bytes();
        [used[0], used[1], self.kind, self.uses]
    }

    /// The mark that has these bytes, read as a little-endian number.
    pub(crate) const fn from_bytes(bytes: u32) -> Self {
        let [first, second, kind, uses] = bytes.to_le_bytes();
        Self { used: u16::from_le_bytes([first, second]), kind, uses }
    }

    /// The same of a ghost.
    pub(crate) fn without_uses(self) -> Self {
        Self { uses: 0, ..self }
    }

    /// One use more; of many that are counted already, nothing is written.
    pub(crate) fn count(&mut self, most: u8) {
        if self.uses < most {
            self.uses += 1;
        }
    }
}

/// What is known of a block whose buffer or ghost was removed, for the buffer that replaces it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hint {
    /// Where it was.
    pub tag: Tag,
    /// What else a policy remembers.
    pub mark: Mark,
}

impl Hint {
    /// Nothing is known.
    pub const NEW: Self = Self { tag: Tag::New, mark: Mark::NEW };
}

/// How dear a buffer is to its owner when it becomes clean.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Cheap to lose: goes where the next victims come from.
    Low,
    /// It was there before a restart: goes to the list it was on, behind all that is there.
    Known,
    /// As every other.
    High,
}

/// The lists that hold data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum List {
    /// Seen once.
    WarmIn,
    /// Came back.
    Hot,
}

/// Where on a list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Farthest from eviction.
    Front,
    /// Next to be evicted.
    Back,
}

/// What a use does to a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Touched {
    /// Nothing.
    Stays,
    /// It is counted, up to so many, and judged by it when its turn to leave comes.
    Counts {
        /// So many.
        most: u8,
    },
    /// [`Reuse`] learns from it; it goes to hot if it is not there.
    Learns,
    /// It moves to the front of this list.
    Front(List),
}

/// What happens to the buffer at the back of a list, whose turn it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// It leaves; a ghost stays behind or not.
    Evict {
        /// A ghost stays.
        ghost: bool,
    },
    /// It goes to the front of this list with this count, and the next one is looked at.
    Spare(List, u8),
}

/// How many buffers are where: what a policy decides by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Lens {
    /// Clean buffers on warm_in.
    pub(crate) warm_in: u32,
    /// Clean buffers on hot.
    pub(crate) hot: u32,
    /// Pages of the table, free and in flight ones included.
    pub(crate) capacity: u32,
}

/// The replacement policy of a buffer table. It can be switched at any time: what the other policy
/// left on the lists drains by eviction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Policy {
    /// Least recently used.
    Lru,
    /// 2Q, the full version (Johnson, Shasha: "2Q: a low overhead high performance buffer
    /// management replacement algorithm", VLDB 1994).
    TwoQ,
    /// 2Q with BlueStore's rules.
    TwoQBluestore,
    /// S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction",
    /// SOSP 2023).
    S3Fifo,
    /// Learned reuse, ours: one list, and a hand that takes what promises the fewest hits.
    #[default]
    Reuse,
}

impl Policy {
    /// Every policy.
    pub const ALL: &[Self] =
        &[Self::Reuse, Self::Lru, Self::TwoQ, Self::TwoQBluestore, Self::S3Fifo];

    /// The policy that a configuration calls `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|policy| policy.name() == name)
    }

    /// What a configuration calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::TwoQ => "2q",
            Self::TwoQBluestore => "2q-bluestore",
            Self::S3Fifo => "s3fifo",
            Self::Reuse => "reuse",
        }
    }

    /// Where a buffer goes that becomes clean.
    pub(crate) fn place(self, hint: Hint, level: Level) -> (List, End) {
        if level == Level::Known {
            let list = if hint.tag == Tag::Hot { List::Hot } else { List::WarmIn };
            return (list, End::Back);
        }
        match self {
            Self::Lru => lru::place(level),
            Self::TwoQ | Self::TwoQBluestore | Self::S3Fifo => place_by_past(hint.tag, level),
            Self::Reuse => reuse::place(level),
        }
    }

    /// What a read of a buffer on `list` does, or its rewriting if the old data counted as used.
    pub(crate) fn touched(self, list: List, write: bool) -> Touched {
        match self {
            Self::Lru => Touched::Front(List::Hot),
            Self::TwoQ => twoq::touched(list),
            Self::TwoQBluestore => twoq_bluestore::touched(list, write),
            Self::S3Fifo => Touched::Counts { most: s3fifo::USES_MAX },
            Self::Reuse => Touched::Learns,
        }
    }

    /// From which list to evict to make room for a buffer with that hint; `None`: both are empty.
    pub(crate) fn victim(self, lens: Lens, incoming: Tag) -> Option<List> {
        let wanted = match self {
            Self::Lru | Self::Reuse => lru::victim(lens),
            Self::TwoQ => twoq::victim(lens),
            Self::TwoQBluestore => twoq_bluestore::victim(lens, incoming),
            Self::S3Fifo => s3fifo::victim(lens),
        };
        match (lens.warm_in, lens.hot) {
            (0, 0) => None,
            (0, _) => Some(List::Hot),
            (_, 0) => Some(List::WarmIn),
            _ => Some(wanted),
        }
    }

    /// What becomes of the buffer at the back of `list`, which was used so often there.
    pub(crate) fn verdict(self, list: List, uses: u8) -> Verdict {
        match self {
            Self::Lru => Verdict::Evict { ghost: false },
            // On hot the hand decides, see `Reuse`.
            Self::Reuse => Verdict::Evict { ghost: true },
            Self::TwoQ | Self::TwoQBluestore => Verdict::Evict { ghost: list == List::WarmIn },
            Self::S3Fifo => s3fifo::verdict(list, uses),
        }
    }

    /// Whether a block of which so much is known was used more than once.
    pub(crate) fn has_come_back(self, hint: Hint) -> bool {
        match self {
            Self::Lru => true,
            Self::TwoQ | Self::TwoQBluestore => hint.tag == Tag::Hot,
            Self::S3Fifo => hint.tag == Tag::Hot || hint.mark.uses > 0,
            Self::Reuse => reuse::has_come_back(hint.mark),
        }
    }

    /// How many ghosts there may be in a cache of `pages` pages.
    pub(crate) const fn ghosts_max(self, pages: u32) -> u32 {
        match self {
            Self::Lru => 0,
            Self::TwoQ | Self::TwoQBluestore => twoq::ghosts_max(pages),
            Self::S3Fifo => s3fifo::ghosts_max(pages),
            Self::Reuse => reuse::ghosts_max(pages),
        }
    }

    /// The most ghosts that any policy keeps in a cache of `pages` pages.
    pub(crate) const fn ghosts_of_any(pages: u32) -> u32 {
        let mut most = 0;
        let mut at = 0;
        while at < Self::ALL.len() {
            let ghosts = Self::ALL[at].ghosts_max(pages);
            if ghosts > most {
                most = ghosts;
            }
            at += 1;
        }
        most
    }
}

/// What is new begins on warm_in, a rewritten block goes to the front of its list, and only a ghost
/// is promoted.
fn place_by_past(hint: Tag, level: Level) -> (List, End) {
    match (hint, level) {
        (Tag::New, Level::Low) => (List::WarmIn, End::Back),
        (Tag::New | Tag::WarmIn, _) => (List::WarmIn, End::Front),
        (Tag::WarmOut | Tag::Hot, _) => (List::Hot, End::Front),
    }
}

/// A share of `of` in percent, rounded down.
const fn percent(of: u32, percent: u32) -> u32 {
    (of as u64 * percent as u64 / 100) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_before_a_restart_goes_behind_what_has_come_since() {
        for &policy in Policy::ALL {
            let place = |tag| policy.place(Hint { tag, ..Hint::NEW }, Level::Known);
            assert_eq!(place(Tag::Hot), (List::Hot, End::Back));
            assert_eq!(place(Tag::WarmIn), (List::WarmIn, End::Back));
        }
    }

    #[test]
    fn only_a_ghost_is_promoted() {
        use End::{Back, Front};
        for policy in [Policy::TwoQ, Policy::TwoQBluestore, Policy::S3Fifo] {
            let place = |tag, level| policy.place(Hint { tag, ..Hint::NEW }, level);
            assert_eq!(place(Tag::New, Level::High), (List::WarmIn, Front));
            assert_eq!(place(Tag::New, Level::Low), (List::WarmIn, Back));
            for level in [Level::Low, Level::High] {
                assert_eq!(place(Tag::WarmIn, level), (List::WarmIn, Front));
                assert_eq!(place(Tag::WarmOut, level), (List::Hot, Front));
                assert_eq!(place(Tag::Hot, level), (List::Hot, Front));
            }
        }
    }
}
