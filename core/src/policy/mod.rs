//! Which clean buffer leaves RAM first. A policy only decides; [`Buffers`](crate::buffer::Buffers)
//! owns the lists and does what it says.

mod lru;
mod twoq;

/// What a buffer's past says about it, lowest first. The tag of a removed buffer is the hint for
/// the one that replaces it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Tag {
    /// Never listed.
    New,
    /// On warm_in, the FIFO of what was seen once.
    WarmIn,
    /// On warm_out: a ghost, left warm_in a short time ago and has no data.
    WarmOut,
    /// On hot, the LRU list of what came back.
    Hot,
}

/// How dear a buffer is to its owner when it becomes clean.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Cheap to lose: goes where the next victims come from.
    Low,
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

/// The replacement policy of a buffer table. It can be switched at any time: what the other policy
/// left on the lists drains by eviction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Policy {
    /// Least recently used.
    Lru,
    /// 2Q (Johnson, Shasha: "2Q: a low overhead high performance buffer management replacement
    /// algorithm", VLDB 1994), with BlueStore's rules.
    #[default]
    TwoQ,
}

impl Policy {
    /// The policy that a configuration calls `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "lru" => Some(Self::Lru),
            "2q" => Some(Self::TwoQ),
            _ => None,
        }
    }

    /// What a configuration calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::TwoQ => "2q",
        }
    }

    /// Where a buffer goes that becomes clean.
    pub(crate) fn place(self, hint: Tag, level: Level) -> (List, End) {
        match self {
            Self::Lru => lru::place(level),
            Self::TwoQ => twoq::place(hint, level),
        }
    }

    /// Where a buffer on `list` goes that is read: the front of a list, or nowhere.
    pub(crate) fn touched(self, list: List) -> Option<List> {
        match self {
            Self::Lru => lru::touched(),
            Self::TwoQ => twoq::touched(list),
        }
    }

    /// From which list to evict, given how many buffers each holds.
    pub(crate) fn victim(self, warm_in: u32, hot: u32) -> Option<List> {
        match self {
            Self::Lru => lru::victim(warm_in, hot),
            Self::TwoQ => twoq::victim(warm_in, hot),
        }
    }

    /// Whether what is evicted from `list` leaves a ghost.
    pub(crate) fn leaves_ghost(self, list: List) -> bool {
        self == Self::TwoQ && list == List::WarmIn
    }

    /// How many ghosts there may be in a cache of `pages` pages.
    pub(crate) const fn ghosts_max(self, pages: u32) -> u32 {
        match self {
            Self::Lru => 0,
            Self::TwoQ => twoq::ghosts_max(pages),
        }
    }
}
