//! The buffer table of a shard: which blocks are in RAM, in which pages, and which leaves next.
//!
//! A buffer is one block. Its life:
//!
//! ```text
//! insert_filling --> Filling --finish--> Clean --evict--> Ghost or gone
//! insert_writing --> Writing --finish-----^  |              |
//!                                            +---discard----+--> gone
//! ```
//!
//! * `Filling` and `Writing` buffers are on no list: nothing in flight is ever evicted.
//! * `Clean` buffers are on warm_in or hot, and leave from the back as the policy says.
//! * A `Ghost` is a clean buffer that lost its page: only its place in time is kept, so that the
//!   block is known if it comes back soon.
//!
//! A pinned clean buffer keeps its place, because a pin is no use (uses are `touch`) and most pins
//! are gone long before the place matters. If eviction meets it at the back, it leaves the list and
//! comes back with its last unpin: on warm_in at the back, where it was; on hot at the front, since
//! the last release is a use. So a pin costs eviction at most one extra step.
//!
//! To replace a block's buffer: see that `available` is enough, `discard` what the block had, only
//! then `take_page` and insert with the hint that `discard` returned. The other way round the
//! eviction may drop the very ghost that was hit.
//!
//! The owner refers to buffers by [`BufferId`] and is referred to by [`BlockAddr`]; the two must
//! agree. Whatever an eviction takes away is returned to it as [`Evicted`].

mod warm;

use alloc::boxed::Box;

use crate::ages::{Ages, Stamp, WINDOWS};
use crate::ghosts::{GhostStorage, Ghosts};
use crate::ids::PageId;
use crate::list::{Link, Queue, queues};
use crate::policy::{End, Hint, Lens, Level, List, Mark, Policy, Reuse, Tag, Touched, Verdict};

/// Seconds since its last use up to which a buffer was evicted young: the table is too small for
/// what is asked of it.
pub const YOUNG_SECONDS: u16 = 24;

/// A slot of the buffer table; or, with the highest bit set, a ghost's place. So whether a block is
/// in RAM shows without a look at the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct BufferId(pub u32);

impl BufferId {
    /// No buffer.
    pub const NONE: Self = Self(u32::MAX);
    const GHOST: u32 = 1 << 31;

    /// Whether this names a buffer or a ghost.
    #[must_use]
    pub const fn is_some(self) -> bool {
        self.0 != u32::MAX
    }

    /// Whether this names a buffer: something with a page, while the reference is good.
    #[must_use]
    #[inline]
    pub const fn is_buffer(self) -> bool {
        self.0 & Self::GHOST == 0
    }

    const fn ghost(place: u32) -> Self {
        Self(place | Self::GHOST)
    }

    /// The place of a ghost.
    const fn place(self) -> Option<u32> {
        if self.is_buffer() || !self.is_some() { None } else { Some(self.0 & !Self::GHOST) }
    }
}

/// Where the owner keeps its reference to a buffer. Means nothing to the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct BlockAddr(pub u32);

/// What a slot of the table is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Nothing.
    Free,
    /// A page on its way from the device or the store.
    Filling,
    /// New data on its way to the log; readable.
    Writing,
    /// Data that can be dropped.
    Clean,
    /// No page: seen a short time ago.
    Ghost,
}

/// No free page, and nothing that could be evicted for one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoPage;

/// What an eviction took from the owner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Evicted {
    /// This block's buffer lost its page.
    pub block: BlockAddr,
    /// It is this ghost now; `None`: gone, the owner forgets it.
    pub ghost: Option<BufferId>,
    /// This other block's ghost is gone, to keep the number of ghosts bounded.
    pub dropped: Option<BlockAddr>,
}

/// A page for the owner to use, and what it cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub struct Taken {
    /// The page; its old content means nothing.
    pub page: PageId,
    /// The owner's references that end with it.
    pub evicted: Option<Evicted>,
}

/// How many pages are where. A page has 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// In no buffer.
    pub free: u32,
    /// Clean on warm_in.
    pub warm_in: u32,
    /// Clean on hot.
    pub hot: u32,
    /// On warm_in or hot, but pinned.
    pub pinned_listed: u32,
    /// Clean and pinned, met by an eviction: on no list until the last unpin.
    pub pinned_unlisted: u32,
    /// Being filled.
    pub filling: u32,
    /// Being written.
    pub writing: u32,
    /// Discarded while pinned, filling or writing.
    pub detached: u32,
    /// Ghosts; they have no page.
    pub ghosts: u32,
}

impl Usage {
    /// Pages that the table holds, free ones included.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.free
            + self.warm_in
            + self.hot
            + self.pinned_unlisted
            + self.filling
            + self.writing
            + self.detached
    }
}

/// What happened since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Touches: blocks read from RAM.
    pub hits: u64,
    /// Blocks that were not in RAM, as told by the owner.
    pub misses: u64,
    /// Buffers that lost their page to another.
    pub evictions: u64,
    /// Of these: used less than [`YOUNG_SECONDS`] before.
    pub young_evictions: u64,
    /// Buffers that became hot because their ghost was there.
    pub promotions: u64,
}

/// What a hit and the choice of a victim need of a buffer: eight bytes, apart from the rest, so
/// that those of a whole shard stay in the processor's caches.
#[derive(Clone, Copy, Debug)]
struct Life {
    state: State,
    tag: Tag,
    /// Its last use, if it has a page.
    used: Stamp,
    mark: Mark,
}

/// The rest. 12 bytes, beside 8 for its link and 4 on the stack of free pages.
#[derive(Clone, Copy, Debug)]
struct Slot {
    page: PageId,
    /// Of a free slot: the next free one.
    block: BlockAddr,
    pins: u16,
    /// The owner has let go; the page is given back when nobody uses it.
    detached: bool,
}

const _: () = assert!(size_of::<Life>() == 8 && size_of::<Slot>() == 12);

impl Life {
    const FREE: Self =
        Self { state: State::Free, tag: Tag::New, used: Stamp::ZERO, mark: Mark::NEW };

    fn is_clean_and_hot(&self) -> bool {
        self.state == State::Clean && self.tag == Tag::Hot
    }
}

impl Slot {
    const FREE: Self = Self { page: PageId::NONE, block: BlockAddr(0), pins: 0, detached: false };
}

/// Bytes of tables for one page of a shard: its buffer in four arrays, a mark that the shard keeps
/// for it, and the ghosts that any policy has for it.
pub const PAGE_TABLE_BYTES: usize = {
    let buffer = size_of::<Link>() + size_of::<Life>() + size_of::<Slot>() + size_of::<PageId>();
    let mark = size_of::<u32>();
    let pages = 1 << 16;
    let ghosts = Policy::ghosts_of_any(pages as u32) as usize * GhostStorage::GHOST_BYTES;
    buffer + mark + ghosts.div_ceil(pages)
};

/// The memory of a buffer table.
#[derive(Debug)]
pub struct BufferStorage {
    links: Box<[Link]>,
    lives: Box<[Life]>,
    slots: Box<[Slot]>,
    free_pages: Box<[PageId]>,
    ghosts: GhostStorage,
}

impl BufferStorage {
    /// Memory for so many slots: see [`slots_for`](Self::slots_for).
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self {
            links: core::iter::repeat_n(Link::default(), slots).collect(),
            lives: core::iter::repeat_n(Life::FREE, slots).collect(),
            slots: core::iter::repeat_n(Slot::FREE, slots).collect(),
            free_pages: core::iter::repeat_n(PageId::NONE, slots).collect(),
            ghosts: GhostStorage::new(Policy::ghosts_of_any(slots as u32)),
        }
    }

    /// Slots that are always enough for a shard with `pages` pages of its own and at most
    /// `adopted` pages that came in from elsewhere and are not yet paid back.
    #[must_use]
    pub const fn slots_for(pages: usize, adopted: usize) -> usize {
        pages + adopted
    }
}

/// The buffers of a shard. No call allocates; all are O(1), see the module about pins.
#[derive(Debug)]
pub struct Buffers<'a> {
    lives: &'a mut [Life],
    /// Of the buffers with the same numbers.
    slots: &'a mut [Slot],
    warm_in: Queue<'a>,
    hot: Queue<'a>,
    warm_out: Ghosts<'a>,
    /// A stack: the first `usage.free` are free pages.
    free_pages: &'a mut [PageId],
    /// Head of the chain of free slots, or `slots.len()`.
    free_slot: u32,
    policy: Policy,
    /// Pages that the table should hold, by which the policy measures its lists.
    capacity: u32,
    ghosts_max: u32,
    reuse: Reuse,
    /// The slot that the hand of `Policy::Reuse` comes to next.
    hand: u32,
    ages: Ages,
    /// `warm_in`, `hot` and `ghosts` in it are filled in when asked: the lists know them.
    usage: Usage,
    counters: Counters,
}

impl<'a> Buffers<'a> {
    /// An empty table in `storage` with `pages` as its free pages.
    ///
    /// # Panics
    ///
    /// If `storage` has fewer slots than there are pages.
    #[must_use]
    pub fn new(storage: &'a mut BufferStorage, pages: &[PageId], policy: Policy) -> Self {
        let BufferStorage { links, lives, slots, free_pages, ghosts } = storage;
        assert!(pages.len() <= slots.len(), "more pages than slots");
        let [warm_in, hot] = queues(links);
        for (i, slot) in slots.iter_mut().enumerate() {
            slot.block = BlockAddr(i as u32 + 1);
        }
        lives.fill(Life::FREE);
        free_pages[..pages.len()].copy_from_slice(pages);
        let own_pages = pages.len() as u32;
        Self {
            lives,
            slots,
            warm_in,
            hot,
            warm_out: Ghosts::new(ghosts),
            free_pages,
            free_slot: 0,
            policy,
            capacity: own_pages,
            ghosts_max: policy.ghosts_max(own_pages),
            reuse: Reuse::new(own_pages),
            hand: 0,
            ages: Ages::new(),
            usage: Usage { free: own_pages, ..Usage::default() },
            counters: Counters::default(),
        }
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Switches the policy; no buffer is dropped for it.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
        self.ghosts_max = policy.ghosts_max(self.capacity);
    }

    /// The touches and inserts from now on are of a read or write of so many blocks.
    pub fn begin(&mut self, blocks: usize, write: bool) {
        self.reuse.begin(blocks, write);
    }

    /// Time goes on: the present second, modulo 2^16.
    pub fn set_second(&mut self, second: u16) {
        self.ages.advance(second);
    }

    /// Pages by the time since their last use, free ones left out.
    #[must_use]
    pub fn ages(&self) -> [u64; WINDOWS] {
        self.ages.windows(u64::from(self.usage().pages() - self.usage.free))
    }

    /// One page more, for good.
    pub fn grow(&mut self, page: PageId) {
        self.give_page(page);
        self.set_capacity(self.capacity + 1);
    }

    /// A page that was taken does not come back.
    pub fn lose_page(&mut self) {
        self.set_capacity(self.capacity - 1);
    }

    /// Pages that the table should hold: those it was given and has not lost. While pages are in
    /// use elsewhere, or in for others, it holds a few less or more.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The free page at a place of the free list, which has as many as there are free pages.
    #[must_use]
    pub fn free_page_at(&self, at: u32) -> Option<PageId> {
        (at < self.usage.free).then(|| self.free_pages[at as usize])
    }

    /// Takes the free page at a place of the free list; another one comes to that place.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn take_free_page_at(&mut self, at: u32) -> PageId {
        assert!(at < self.usage.free);
        self.usage.free -= 1;
        let page = self.free_pages[at as usize];
        self.free_pages[at as usize] = self.free_pages[self.usage.free as usize];
        page
    }

    /// Drops a ghost if there are more than the policy keeps; its owner forgets it.
    pub fn drop_ghost_above(&mut self) -> Option<BlockAddr> {
        if self.warm_out.len() > self.ghosts_max { self.expire_ghost() } else { None }
    }

    fn set_capacity(&mut self, pages: u32) {
        self.capacity = pages;
        self.reuse.set_capacity(pages);
        self.ghosts_max = self.policy.ghosts_max(pages);
    }

    /// Takes a page for use: a free one, or else that of the policy's next victim. `incoming` is
    /// what is known of the block that it is for.
    ///
    /// # Errors
    ///
    /// [`NoPage`] when every page is in flight or pinned. Nothing changed.
    pub fn take_page(&mut self, incoming: Hint) -> Result<Taken, NoPage> {
        let evicted = match self.usage.free {
            0 => Some(self.evict_for(incoming.tag).ok_or(NoPage)?),
            _ => None,
        };
        self.usage.free -= 1;
        Ok(Taken { page: self.free_pages[self.usage.free as usize], evicted })
    }

    /// Takes a page into the free list: one that was taken before, or one that replaces it.
    ///
    /// # Panics
    ///
    /// If the table then has more free pages than slots.
    pub fn give_page(&mut self, page: PageId) {
        debug_assert!(page.is_some());
        self.free_pages[self.usage.free as usize] = page;
        self.usage.free += 1;
    }

    /// Moves the page of the policy's next victim to the free list. `None`: there is no victim.
    pub fn evict(&mut self) -> Option<Evicted> {
        self.evict_for(Tag::New)
    }

    fn evict_for(&mut self, incoming: Tag) -> Option<Evicted> {
        if self.evictable() == 0 {
            return None;
        }
        let (id, ghost) = self.pop_victim(incoming)?;
        let Slot { block, page, pins, detached } = self.slots[id as usize];
        let Life { state, used, mark, .. } = self.lives[id as usize];
        debug_assert!(state == State::Clean && pins == 0 && !detached);
        self.counters.young_evictions += u64::from(self.ages.age(used) < YOUNG_SECONDS);
        self.ages.remove(used, 1);
        self.free_slot(id);
        let (ghost, dropped) = match ghost && self.ghosts_max > 0 {
            true => self.make_ghost(block, mark),
            false => (None, self.drop_ghost_above()),
        };
        self.counters.evictions += 1;
        self.give_page(page);
        Some(Evicted { block, ghost, dropped })
    }

    /// Free pages.
    #[must_use]
    pub fn free_pages(&self) -> u32 {
        self.usage.free
    }

    /// Pages that evictions would give: clean, unpinned.
    #[must_use]
    pub fn evictable(&self) -> u32 {
        self.warm_in.len() + self.hot.len() - self.usage.pinned_listed
    }

    /// How many times [`take_page`](Self::take_page) will succeed if nothing else is called.
    #[must_use]
    pub fn available(&self) -> u32 {
        self.free_pages() + self.evictable()
    }

    /// A buffer for `page`, into which the block's data is on its way. `hint`: what `discard`
    /// returned for the block's buffer before, else [`Hint::NEW`].
    ///
    /// `None` if there is no slot; cannot be if the storage has `slots_for` slots.
    pub fn insert_filling(
        &mut self,
        block: BlockAddr,
        page: PageId,
        hint: Hint,
    ) -> Option<BufferId> {
        let id = self.insert(block, page, hint, State::Filling)?;
        self.usage.filling += 1;
        Some(id)
    }

    /// A buffer for `page`, which holds new data of the block. Otherwise as `insert_filling`.
    pub fn insert_writing(
        &mut self,
        block: BlockAddr,
        page: PageId,
        hint: Hint,
    ) -> Option<BufferId> {
        let id = self.insert(block, page, hint, State::Writing)?;
        self.usage.writing += 1;
        Some(id)
    }

    /// A filling buffer that no block refers to, pinned once: it ends with its last pin, and is no
    /// use of its block. Otherwise as `insert_filling`.
    pub fn insert_private(&mut self, block: BlockAddr, page: PageId) -> Option<BufferId> {
        let life = self.begin_life(State::Filling)?;
        let id = self.put(life, Slot { page, block, pins: 1, detached: true });
        self.usage.detached += 1;
        Some(id)
    }

    /// The buffer's data has arrived, or is in the log: it is clean from now on. If it has been
    /// discarded in between it ends here, or with its last pin.
    ///
    /// A fill that failed ends by `discard`, then `finish`.
    ///
    /// # Panics
    ///
    /// If the buffer is neither filling nor writing.
    pub fn finish(&mut self, id: BufferId, level: Level) {
        let life = &mut self.lives[id.0 as usize];
        let rewritten = life.state == State::Writing;
        let in_flight = match life.state {
            State::Filling => &mut self.usage.filling,
            State::Writing => &mut self.usage.writing,
            state => panic!("finish of {id:?}, which is {state:?}"),
        };
        life.state = State::Clean;
        let slot = &self.slots[id.0 as usize];
        if slot.detached {
            if slot.pins == 0 {
                self.end_detached(id.0);
            }
            return;
        }
        *in_flight -= 1;
        let hint = Hint { tag: life.tag, mark: life.mark };
        let (list, end) = self.policy.place(hint, level);
        match hint.tag {
            Tag::New => {}
            Tag::WarmOut => self.counters.promotions += u64::from(list == List::Hot),
            Tag::WarmIn | Tag::Hot => {
                if rewritten {
                    match self.policy.touched(list, true) {
                        Touched::Counts { most } => life.mark.count(most),
                        Touched::Learns => self.reuse.used(&mut life.mark),
                        Touched::Stays | Touched::Front(_) => {}
                    }
                }
            }
        }
        self.link(id.0, list, end);
    }

    /// Removes a buffer or a ghost: the owner's reference ends. Returns the hint for a buffer of
    /// the same block, and its page if it had one that nobody uses. A page in use
    /// (pinned, filling, writing) is given to the free list when that ends; the number stays good
    /// for `unpin`, `finish` and `page` until then.
    ///
    /// # Panics
    ///
    /// If it is free or was discarded before.
    pub fn discard(&mut self, id: BufferId) -> (Hint, Option<PageId>) {
        if let Some(place) = id.place() {
            let mark = self.warm_out.remove(place);
            return (Hint { tag: Tag::WarmOut, mark }, None);
        }
        let slot = self.slots[id.0 as usize];
        let life = self.lives[id.0 as usize];
        let hint = Hint { tag: life.tag, mark: life.mark };
        assert!(!slot.detached, "discarded twice: {id:?}");
        match life.state {
            State::Free | State::Ghost => panic!("discard of {id:?}, which is free"),
            State::Filling => self.usage.filling -= 1,
            State::Writing => self.usage.writing -= 1,
            State::Clean => {
                let listed = self.unlink(id.0);
                if slot.pins == 0 {
                    debug_assert!(listed);
                    self.ages.remove(life.used, 1);
                    self.free_slot(id.0);
                    return (hint, Some(slot.page));
                }
                *if listed {
                    &mut self.usage.pinned_listed
                } else {
                    &mut self.usage.pinned_unlisted
                } -= 1;
            }
        }
        self.slots[id.0 as usize].detached = true;
        self.usage.detached += 1;
        (hint, None)
    }

    /// The block was read from this buffer. Counts a hit; moves a clean buffer as the policy says.
    pub fn touch(&mut self, id: BufferId) {
        self.used(id, false);
    }

    /// The block was written and its buffer's page took the new data at once, with no time in
    /// flight. Otherwise as [`touch`](Self::touch).
    pub fn rewrite(&mut self, id: BufferId) {
        self.used(id, true);
    }

    #[inline]
    pub(crate) fn used(&mut self, id: BufferId, write: bool) {
        debug_assert!(self.is_resident(id));
        self.counters.hits += 1;
        let life = &mut self.lives[id.0 as usize];
        self.ages.touch(&mut life.used, 1);
        if life.state != State::Clean {
            return;
        }
        // A listed buffer's tag says which list. One that is unlisted, being pinned or detached,
        // has its place decided when it is listed again; that it was used stays counted.
        let on = if life.tag == Tag::Hot { List::Hot } else { List::WarmIn };
        match self.policy.touched(on, write) {
            Touched::Stays => {}
            Touched::Counts { most } => life.mark.count(most),
            Touched::Learns => {
                self.reuse.used(&mut life.mark);
                if on != List::Hot {
                    self.move_to_front(id.0, on, List::Hot);
                }
            }
            Touched::Front(list) => self.move_to_front(id.0, on, list),
        }
    }

    #[inline(never)]
    fn move_to_front(&mut self, id: u32, on: List, to: List) {
        let queue = match on {
            List::WarmIn => &mut self.warm_in,
            List::Hot => &mut self.hot,
        };
        if on == to {
            queue.move_to_front(id);
        } else if queue.remove(id) {
            self.push(id, to, End::Front);
        }
    }

    /// A block was wanted and not in RAM.
    pub fn miss(&mut self) {
        self.counters.misses += 1;
    }

    /// Keeps the buffer's page where it is until as many `unpin`s.
    ///
    /// # Panics
    ///
    /// If it has no page, or 65,535 pins already.
    pub fn pin(&mut self, id: BufferId) {
        assert!(self.is_resident(id), "pin of {id:?}, which has no page");
        let slot = &mut self.slots[id.0 as usize];
        slot.pins = slot.pins.checked_add(1).expect("pins are bounded by leases");
        if slot.pins == 1 && self.is_listed(id.0) {
            self.usage.pinned_listed += 1;
        }
    }

    /// Takes back one pin.
    ///
    /// # Panics
    ///
    /// If it is not pinned.
    pub fn unpin(&mut self, id: BufferId) {
        let slot = &mut self.slots[id.0 as usize];
        slot.pins = slot.pins.checked_sub(1).expect("unpin of a buffer that is pinned");
        if slot.pins > 0 || self.lives[id.0 as usize].state != State::Clean {
            return;
        }
        if slot.detached {
            self.end_detached(id.0);
        } else if self.is_listed(id.0) {
            self.usage.pinned_listed -= 1;
        } else {
            self.usage.pinned_unlisted -= 1;
            match self.lives[id.0 as usize].tag {
                Tag::Hot => self.push(id.0, List::Hot, End::Front),
                _ => self.push(id.0, List::WarmIn, End::Back),
            }
        }
    }

    /// Whether the buffer has a page.
    #[must_use]
    pub fn is_resident(&self, id: BufferId) -> bool {
        !matches!(self.state(id), State::Free | State::Ghost)
    }

    /// The buffer's page, or [`PageId::NONE`] for a ghost.
    #[must_use]
    pub fn page(&self, id: BufferId) -> PageId {
        if !id.is_buffer() {
            return PageId::NONE;
        }
        self.slots[id.0 as usize].page
    }

    /// What the buffer or ghost is.
    #[must_use]
    pub fn state(&self, id: BufferId) -> State {
        if !id.is_buffer() {
            return State::Ghost;
        }
        self.lives[id.0 as usize].state
    }

    /// The owner refers to the buffer or ghost from another place from now on.
    pub fn set_block(&mut self, id: BufferId, block: BlockAddr) {
        match id.place() {
            Some(place) => self.warm_out.set_block(place, block),
            None => self.slots[id.0 as usize].block = block,
        }
    }

    /// The data of a clean, unpinned buffer is in another page from now on; returns the old one.
    pub fn set_page(&mut self, id: BufferId, page: PageId) -> PageId {
        let slot = &mut self.slots[id.0 as usize];
        debug_assert!(self.lives[id.0 as usize].state == State::Clean && slot.pins == 0);
        core::mem::replace(&mut slot.page, page)
    }

    /// Slots of the table, for a walk over all buffers.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    /// The owner's reference that was given when the buffer was inserted.
    #[must_use]
    pub fn block(&self, id: BufferId) -> BlockAddr {
        match id.place() {
            Some(place) => self.warm_out.block(place),
            None => self.slots[id.0 as usize].block,
        }
    }

    /// The buffer's tag. While filling or writing: the hint it was inserted with.
    #[must_use]
    pub fn tag(&self, id: BufferId) -> Tag {
        if !id.is_buffer() {
            return Tag::WarmOut;
        }
        self.lives[id.0 as usize].tag
    }

    /// How many pins the buffer has.
    #[must_use]
    pub fn pins(&self, id: BufferId) -> u16 {
        self.slots[id.0 as usize].pins
    }

    /// Whether the owner has discarded the buffer and somebody still uses its page.
    #[must_use]
    pub fn is_detached(&self, id: BufferId) -> bool {
        id.is_buffer() && self.slots[id.0 as usize].detached
    }

    /// What happened since the start.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Where the pages are, as accounted.
    #[must_use]
    pub fn usage(&self) -> Usage {
        Usage {
            warm_in: self.warm_in.len(),
            hot: self.hot.len(),
            ghosts: self.warm_out.len(),
            ..self.usage
        }
    }

    /// Where the pages are, counted slot by slot: equals [`usage`](Self::usage). O(slots), for
    /// tests and debug checks.
    ///
    /// # Panics
    ///
    /// If a slot is on a list that does not fit its state and tag.
    #[must_use]
    pub fn recount(&self) -> Usage {
        let ghosts = self.warm_out.iter().count() as u32;
        let mut usage = Usage { free: self.usage.free, ghosts, ..Usage::default() };
        for (i, (slot, life)) in self.slots.iter().zip(&*self.lives).enumerate() {
            let i = i as u32;
            let lists = [&self.warm_in, &self.hot].map(|list| list.contains(i));
            let pinned = slot.pins > 0;
            let listed = match (life.state, slot.detached) {
                (State::Clean, false) => life.tag,
                _ => Tag::New,
            };
            match (life.state, lists) {
                (State::Free | State::Ghost, _) => {}
                _ if slot.detached => usage.detached += 1,
                (State::Filling, _) => usage.filling += 1,
                (State::Writing, _) => usage.writing += 1,
                (State::Clean, [true, _]) => usage.warm_in += 1,
                (State::Clean, [_, true]) => usage.hot += 1,
                (State::Clean, _) => usage.pinned_unlisted += 1,
            }
            let on_list = lists.contains(&true);
            usage.pinned_listed += u32::from(on_list && pinned);
            assert!(on_list || listed == Tag::New || pinned, "slot {i} is on no list");
            let expected = [Tag::WarmIn, Tag::Hot].map(|tag| on_list && tag == listed);
            assert_eq!(lists, expected, "slot {i} is {life:?} {slot:?}");
        }
        usage
    }

    fn insert(
        &mut self,
        block: BlockAddr,
        page: PageId,
        hint: Hint,
        state: State,
    ) -> Option<BufferId> {
        let life = self.begin_life(state)?;
        let Hint { tag, mut mark } = hint;
        if self.policy == Policy::Reuse && matches!(tag, Tag::New | Tag::WarmOut) {
            self.reuse.comes_in(&mut mark, tag == Tag::WarmOut);
        }
        let slot = Slot { page, block, ..Slot::FREE };
        Some(self.put(Life { tag, mark, ..life }, slot))
    }

    /// The life of a block of which nothing is known, used now; `None`: no slot is free.
    fn begin_life(&mut self, state: State) -> Option<Life> {
        self.slots.get(self.free_slot as usize)?;
        Some(Life { state, used: self.ages.add(1), ..Life::FREE })
    }

    /// Puts it into the next free slot.
    fn put(&mut self, life: Life, slot: Slot) -> BufferId {
        debug_assert!(slot.page.is_some());
        let id = self.free_slot;
        debug_assert_eq!(self.lives[id as usize].state, State::Free);
        self.lives[id as usize] = life;
        self.free_slot = core::mem::replace(&mut self.slots[id as usize], slot).block.0;
        BufferId(id)
    }

    fn free_slot(&mut self, id: u32) {
        self.lives[id as usize].state = State::Free;
        self.slots[id as usize] = Slot { block: BlockAddr(self.free_slot), ..Slot::FREE };
        self.free_slot = id;
    }

    /// Nobody uses a discarded buffer's page any more.
    fn end_detached(&mut self, id: u32) {
        self.usage.detached -= 1;
        let page = self.slots[id as usize].page;
        self.ages.remove(self.lives[id as usize].used, 1);
        self.free_slot(id);
        self.give_page(page);
    }

    /// The policy's next victim that is not pinned, off its list, and whether it leaves a ghost.
    /// Pinned ones it meets leave their lists, so each pin is met once; one that the policy spares
    /// pays for it with uses, so the cost of all evictions is bounded by that of all uses.
    fn pop_victim(&mut self, incoming: Tag) -> Option<(u32, bool)> {
        loop {
            let (warm_in, hot) = (self.warm_in.len(), self.hot.len());
            let lens = Lens { warm_in, hot, capacity: self.capacity };
            let list = self.policy.victim(lens, incoming)?;
            if list == List::Hot && self.policy == Policy::Reuse {
                return Some((self.take_by_hand(), true));
            }
            let id = match list {
                List::WarmIn => self.warm_in.pop_back()?,
                List::Hot => self.hot.pop_back()?,
            };
            if self.slots[id as usize].pins > 0 {
                self.usage.pinned_listed -= 1;
                self.usage.pinned_unlisted += 1;
                continue;
            }
            let uses = &mut self.lives[id as usize].mark.uses;
            match self.policy.verdict(list, *uses) {
                Verdict::Evict { ghost } => return Some((id, ghost)),
                Verdict::Spare(list, left) => {
                    *uses = left;
                    self.push(id, list, End::Front);
                }
            }
        }
    }

    /// The hand goes round the slots until it comes to a buffer on hot that the policy gives up, or
    /// has passed over so many that the least of them must do. The next buffer takes the victim's
    /// slot, so the hand comes to it last. There must be a victim.
    fn take_by_hand(&mut self) -> u32 {
        let Self { lives, reuse, .. } = self;
        let mut at = self.hand as usize;
        let mut passed = 0;
        // The index before the slot, so that comparing them takes no branch.
        let mut least = u64::MAX;
        loop {
            let slot = at;
            at = if slot + 1 == lives.len() { 0 } else { slot + 1 };
            let life = &mut lives[slot];
            if !life.is_clean_and_hot() {
                continue;
            }
            let index = reuse.index(&mut life.mark);
            least = least.min(u64::from(index) << 32 | slot as u64);
            if !reuse.passes(index, passed) {
                break;
            }
            passed += 1;
        }
        self.hand = at as u32;
        self.reuse.took(passed);
        // One that is pinned is passed over for the next that is not.
        let mut victim = least as u32;
        while self.slots[victim as usize].pins > 0
            || !self.lives[victim as usize].is_clean_and_hot()
        {
            victim = self.hand;
            self.hand = if victim + 1 == self.slots() { 0 } else { victim + 1 };
        }
        self.hot.remove(victim);
        victim
    }

    /// A ghost of `block`, and the block whose ghost ended for it.
    fn make_ghost(
        &mut self,
        block: BlockAddr,
        mark: Mark,
    ) -> (Option<BufferId>, Option<BlockAddr>) {
        let full = self.warm_out.is_full() || self.warm_out.len() >= self.ghosts_max;
        let dropped = if full { self.expire_ghost() } else { None };
        (Some(BufferId::ghost(self.warm_out.push(block, mark.without_uses()))), dropped)
    }

    /// The oldest ghost ends.
    fn expire_ghost(&mut self) -> Option<BlockAddr> {
        let (block, mark) = self.warm_out.pop()?;
        self.reuse.expired(mark);
        Some(block)
    }

    fn is_listed(&self, id: u32) -> bool {
        self.warm_in.contains(id) || self.hot.contains(id)
    }

    /// Links a buffer that has become clean.
    fn link(&mut self, id: u32, list: List, end: End) {
        self.push(id, list, end);
        self.usage.pinned_listed += u32::from(self.slots[id as usize].pins > 0);
    }

    fn push(&mut self, id: u32, list: List, end: End) {
        let (queue, tag) = match list {
            List::WarmIn => (&mut self.warm_in, Tag::WarmIn),
            List::Hot => (&mut self.hot, Tag::Hot),
        };
        self.lives[id as usize].tag = tag;
        match end {
            End::Front => queue.push_front(id),
            End::Back => queue.push_back(id),
        }
    }

    /// Takes a clean buffer off its list; `false` if it is on none.
    fn unlink(&mut self, id: u32) -> bool {
        self.warm_in.remove(id) || self.hot.remove(id)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;
    use crate::random::Random;

    /// An owner of buffers that does what a shard does: one reference for each block, kept in step
    /// with what the table says.
    struct Owner<'a> {
        table: Buffers<'a>,
        refs: Vec<Option<BufferId>>,
        in_flight: Vec<BufferId>,
        pins: Vec<(BufferId, PageId)>,
    }

    impl<'a> Owner<'a> {
        fn new(storage: &'a mut BufferStorage, pages: u32, blocks: usize, policy: Policy) -> Self {
            let pages: Vec<_> = (0..pages).map(|i| PageId(1000 + i)).collect();
            Self {
                table: Buffers::new(storage, &pages, policy),
                refs: vec![None; blocks],
                in_flight: Vec::new(),
                pins: Vec::new(),
            }
        }

        fn evicted(&mut self, evicted: Option<Evicted>) {
            let Some(evicted) = evicted else { return };
            if let Some(block) = evicted.dropped {
                self.refs[block.0 as usize].take().expect("a reference to the ghost");
            }
            let old = core::mem::replace(&mut self.refs[evicted.block.0 as usize], evicted.ghost);
            assert!(old.is_some_and(BufferId::is_buffer));
            assert!(evicted.ghost.is_none_or(|ghost| !ghost.is_buffer()));
        }

        fn take_page(&mut self, incoming: Hint) -> Option<PageId> {
            let available = self.table.available();
            let taken = self.table.take_page(incoming).ok();
            assert_eq!(taken.is_some(), available > 0);
            taken.map(|taken| {
                self.evicted(taken.evicted);
                taken.page
            })
        }

        fn discard(&mut self, block: usize) -> Hint {
            let Some(id) = self.refs[block].take() else { return Hint::NEW };
            let (hint, page) = self.table.discard(id);
            if let Some(page) = page {
                self.table.give_page(page);
            }
            hint
        }

        /// Starts to fill or write a block; `None` if there is no page.
        fn start(&mut self, block: usize, write: bool) -> Option<BufferId> {
            if self.table.available() == 0 {
                return None;
            }
            let hint = self.discard(block);
            let page = self.take_page(hint).expect("a page is available");
            let addr = BlockAddr(block as u32);
            let id = if write {
                self.table.insert_writing(addr, page, hint)
            } else {
                self.table.insert_filling(addr, page, hint)
            };
            self.refs[block] = id;
            Some(id.expect("slots_for is enough"))
        }

        /// A read as a shard does it: a hit, or a fill that is done at once.
        fn read(&mut self, block: usize) {
            if let Some(id) = self.resident(block) {
                self.table.touch(id);
                return;
            }
            self.table.miss();
            let id = self.start(block, false).expect("a page");
            self.table.finish(id, Level::High);
        }

        fn resident(&self, block: usize) -> Option<BufferId> {
            self.refs[block].filter(|&id| self.table.is_resident(id))
        }

        fn tag(&self, block: usize) -> Option<Tag> {
            self.refs[block].map(|id| self.table.tag(id))
        }

        fn blocks_of(&self, queue: &Queue<'_>) -> Vec<u32> {
            queue.iter().map(|i| self.table.block(BufferId(i)).0).collect()
        }

        fn warm_in(&self) -> Vec<u32> {
            self.blocks_of(&self.table.warm_in)
        }

        fn warm_out(&self) -> Vec<u32> {
            let mut blocks: Vec<_> = self.table.warm_out.iter().map(|block| block.0).collect();
            blocks.reverse();
            blocks
        }

        fn hot(&self) -> Vec<u32> {
            self.blocks_of(&self.table.hot)
        }

        /// Everything that is always true.
        fn check(&self, pages: u32) {
            let table = &self.table;
            assert_eq!(table.recount(), table.usage());
            assert_eq!(table.usage().pages(), pages, "a page was lost or doubled");
            let free = &table.free_pages[..table.usage.free as usize];
            let held = table.slots.iter().map(|slot| slot.page).filter(|page| page.is_some());
            let mut all: Vec<_> = free.iter().copied().chain(held).collect();
            all.sort();
            assert!(all.iter().map(|page| page.0).eq(1000..1000 + pages));
            for (slot, life) in table.slots.iter().zip(&*table.lives) {
                assert_ne!(life.state, State::Ghost);
                let has_page = life.state != State::Free;
                assert_eq!(slot.page.is_some(), has_page, "{slot:?}");
                assert!(has_page || slot.pins == 0, "{slot:?}");
            }
            for (block, id) in self.refs.iter().enumerate() {
                let Some(id) = *id else { continue };
                assert_eq!(table.block(id), BlockAddr(block as u32));
                assert!(table.state(id) != State::Free && !table.is_detached(id));
            }
            let owned = |slot: &&Slot| slot.page.is_some() && !slot.detached;
            let referenced = self.refs.iter().flatten().filter(|id| id.is_buffer()).count();
            assert_eq!(table.slots.iter().filter(owned).count(), referenced);
            for &(id, page) in &self.pins {
                assert_eq!(table.page(id), page, "the page of a pinned buffer changed");
            }
            for &id in &self.in_flight {
                assert!(matches!(table.state(id), State::Filling | State::Writing));
            }
        }
    }

    fn random_step(random: &mut Random, owner: &mut Owner<'_>) {
        let block = random.index(owner.refs.len());
        match random.index(16) {
            0..4 => match owner.resident(block) {
                Some(id) => owner.table.touch(id),
                None => {
                    let id = owner.start(block, false);
                    owner.in_flight.extend(id);
                }
            },
            4..6 => {
                let id = owner.start(block, true);
                owner.in_flight.extend(id);
            }
            6..10 if !owner.in_flight.is_empty() => {
                let id = owner.in_flight.swap_remove(random.index(owner.in_flight.len()));
                let level = [Level::Low, Level::High][random.index(2)];
                owner.table.finish(id, level);
            }
            10 | 11 if owner.pins.len() < 12 => {
                if let Some(id) = owner.resident(block) {
                    owner.table.pin(id);
                    owner.pins.push((id, owner.table.page(id)));
                }
            }
            12 | 13 if !owner.pins.is_empty() => {
                let (id, _) = owner.pins.swap_remove(random.index(owner.pins.len()));
                owner.table.unpin(id);
            }
            14 => _ = owner.discard(block),
            15 => {
                let evicted = owner.table.evict();
                owner.evicted(evicted);
            }
            _ => {}
        }
    }

    #[test]
    fn random_operations_keep_every_page_and_reference_accounted() {
        let (seeds, steps) = if cfg!(miri) { (2, 150) } else { (60, 3_000) };
        for seed in 0..seeds {
            let mut random = Random(seed);
            let pages = 1 + random.index(12) as u32;
            let switching = seed % 3 == 0;
            let mut policy = Policy::ALL[random.index(Policy::ALL.len())];
            let mut storage = BufferStorage::new(BufferStorage::slots_for(pages as usize, 0));
            let mut owner = Owner::new(&mut storage, pages, 30, policy);
            for _ in 0..steps {
                if switching && random.index(100) == 0 {
                    policy = Policy::ALL[random.index(Policy::ALL.len())];
                    owner.table.set_policy(policy);
                }
                let before = owner.table.usage().ghosts;
                random_step(&mut random, &mut owner);
                owner.check(pages);
                let ghosts = owner.table.usage().ghosts;
                assert!(ghosts <= policy.ghosts_max(pages).max(before), "ghosts are not bounded");
                if !switching && policy == Policy::Lru {
                    assert_eq!((ghosts, owner.table.usage().warm_in), (0, 0));
                }
            }
            for id in core::mem::take(&mut owner.in_flight) {
                owner.table.finish(id, Level::High);
            }
            for (id, _) in core::mem::take(&mut owner.pins) {
                owner.table.unpin(id);
            }
            owner.check(pages);
            assert_eq!(owner.table.available(), pages, "a page is stuck (seed {seed})");
        }
    }

    fn storage() -> BufferStorage {
        BufferStorage::new(BufferStorage::slots_for(64, 64))
    }

    #[test]
    fn a_block_that_comes_back_while_a_ghost_becomes_hot() {
        let mut storage = storage();
        let mut owner = Owner::new(&mut storage, 4, 32, Policy::TwoQBluestore);
        (0..4).for_each(|block| owner.read(block));
        assert_eq!(owner.warm_in(), [3, 2, 1, 0]);
        // A second use while in the FIFO changes nothing.
        owner.read(0);
        assert_eq!((owner.warm_in(), owner.hot()), (vec![3, 2, 1, 0], vec![]));
        // Two more: 0 and 1 become ghosts, and two is all that four pages may have.
        owner.read(4);
        owner.read(5);
        assert_eq!(owner.warm_in(), [5, 4, 3, 2]);
        assert_eq!(owner.warm_out(), [1, 0]);
        // The page for 6 makes a ghost of 2 and drops that of 0.
        owner.read(6);
        assert_eq!(owner.warm_out(), [2, 1]);
        assert_eq!(owner.tag(0), None);
        // 1 is still a ghost: hot. Its ghost is gone, and the page came from 3.
        owner.read(1);
        assert_eq!(owner.hot(), [1]);
        assert_eq!(owner.warm_in(), [6, 5, 4]);
        assert_eq!(owner.warm_out(), [3, 2]);
        assert_eq!(owner.table.counters().promotions, 1);
        // 0 is not: it starts again.
        owner.read(0);
        assert_eq!(owner.tag(0), Some(Tag::WarmIn));
        let counters = owner.table.counters();
        assert_eq!((counters.hits, counters.misses, counters.evictions), (1, 9, 5));
        owner.check(4);
    }

    #[test]
    fn hot_is_lru_and_leaves_no_ghost() {
        let mut storage = storage();
        let mut owner = Owner::new(&mut storage, 8, 64, Policy::TwoQBluestore);
        // Twelve in a FIFO of eight: 0..4 are ghosts, then hot.
        (0..12).for_each(|block| owner.read(block));
        (0..4).for_each(|block| owner.read(block));
        assert_eq!(owner.hot(), [3, 2, 1, 0]);
        assert_eq!(owner.warm_in(), [11, 10, 9, 8]);
        owner.read(0);
        assert_eq!(owner.hot(), [0, 3, 2, 1]);
        // The ghosts are 4..8: as they come back hot would have more than its half, and pays.
        owner.read(7);
        assert_eq!((owner.warm_in(), owner.hot()), (vec![11, 10, 9, 8], vec![7, 0, 3, 2]));
        owner.read(6);
        assert_eq!((owner.warm_in(), owner.hot()), (vec![11, 10, 9, 8], vec![6, 7, 0, 3]));
        assert_eq!(owner.tag(1), None);
        owner.check(8);
    }

    #[test]
    fn a_rewrite_keeps_what_was_known_of_the_block() {
        let mut storage = storage();
        let mut owner = Owner::new(&mut storage, 4, 32, Policy::TwoQBluestore);
        (0..3).for_each(|block| owner.read(block));
        // On warm_in: to the front of it.
        let id = owner.start(0, true).unwrap();
        assert_eq!((owner.table.state(id), owner.warm_in()), (State::Writing, vec![2, 1]));
        owner.table.finish(id, Level::High);
        assert_eq!(owner.warm_in(), [0, 2, 1]);
        // On hot: stays hot.
        (3..6).for_each(|block| owner.read(block));
        owner.read(1);
        owner.read(2);
        assert_eq!(owner.hot(), [2, 1]);
        let id = owner.start(1, true).unwrap();
        owner.table.finish(id, Level::Low);
        assert_eq!(owner.hot(), [1, 2]);
        // Written again before the first write was done: the hint goes through.
        let first = owner.start(1, true).unwrap();
        let second = owner.start(1, true).unwrap();
        assert!(owner.table.is_detached(first));
        owner.table.finish(second, Level::High);
        owner.table.finish(first, Level::High);
        assert_eq!(owner.table.state(first), State::Free);
        assert_eq!(owner.tag(1), Some(Tag::Hot));
        owner.check(4);
    }

    #[test]
    fn what_is_cheap_to_lose_is_lost_first() {
        for policy in [Policy::Lru, Policy::TwoQBluestore] {
            let mut storage = storage();
            let mut owner = Owner::new(&mut storage, 4, 32, policy);
            (0..3).for_each(|block| owner.read(block));
            let id = owner.start(3, false).unwrap();
            owner.table.finish(id, Level::Low);
            owner.read(4);
            assert_eq!(owner.resident(3), None);
            assert!((0..3).all(|block| owner.resident(block).is_some()));
        }
    }

    #[test]
    fn lru_evicts_what_was_used_longest_ago() {
        let mut storage = storage();
        let mut owner = Owner::new(&mut storage, 3, 32, Policy::Lru);
        (0..3).for_each(|block| owner.read(block));
        owner.read(0);
        assert_eq!(owner.hot(), [0, 2, 1]);
        owner.read(3);
        assert_eq!(owner.hot(), [3, 0, 2]);
        assert_eq!(owner.table.usage().ghosts, 0);
    }

    #[test]
    fn one_pass_over_ten_caches_leaves_hot_as_it_was() {
        let mut storage = storage();
        let mut owner = Owner::new(&mut storage, 64, 2_000, Policy::TwoQBluestore);
        // Enough to push 0..32 out of the FIFO, and not out of the ghosts.
        (0..96).for_each(|block| owner.read(block));
        (0..32).for_each(|block| owner.read(block));
        let hot = owner.hot();
        assert_eq!(hot.len(), 32);
        (1_000..1_640).for_each(|block| owner.read(block));
        assert_eq!(owner.hot(), hot);
        owner.check(64);
    }

    #[test]
    fn what_is_in_flight_or_pinned_is_never_evicted() {
        let mut storage = storage();
        let mut owner = Owner::new(&mut storage, 4, 32, Policy::TwoQBluestore);
        let filling = owner.start(0, false).unwrap();
        let writing = owner.start(1, true).unwrap();
        owner.read(2);
        owner.read(3);
        let [pinned, other] = [2, 3].map(|block| owner.resident(block).unwrap());
        owner.table.pin(pinned);
        assert_eq!((owner.table.available(), owner.table.evictable()), (1, 1));
        owner.table.pin(other);
        assert_eq!(owner.table.take_page(Hint::NEW), Err(NoPage));
        // The refusal changed nothing: both are still listed.
        assert_eq!(owner.warm_in(), [3, 2]);
        owner.table.unpin(other);
        let page = owner.table.page(other);
        assert_eq!(owner.take_page(Hint::NEW), Some(page));
        // 2 was met by the eviction, and goes next as soon as it can.
        assert_eq!(owner.table.usage().pinned_unlisted, 1);
        owner.table.give_page(page);
        owner.read(4);
        owner.table.unpin(pinned);
        assert_eq!(owner.warm_in(), [4, 2]);
        owner.table.finish(filling, Level::High);
        owner.table.finish(writing, Level::High);
        assert_eq!(owner.warm_in(), [1, 0, 4, 2]);
        owner.check(4);
    }

    #[test]
    fn a_hot_buffer_is_young_after_a_long_pin() {
        let mut storage = storage();
        let mut owner = Owner::new(&mut storage, 3, 32, Policy::Lru);
        (0..3).for_each(|block| owner.read(block));
        let id = owner.resident(0).unwrap();
        owner.table.pin(id);
        owner.table.pin(id);
        owner.read(3);
        assert_eq!(owner.hot(), [3, 2]);
        owner.table.unpin(id);
        assert_eq!(owner.hot(), [3, 2]);
        owner.table.unpin(id);
        assert_eq!(owner.hot(), [0, 3, 2]);
        owner.check(3);
    }

    #[test]
    fn a_discarded_page_comes_back_when_its_last_user_is_done() {
        let mut storage = storage();
        let mut owner = Owner::new(&mut storage, 2, 8, Policy::TwoQBluestore);
        // Clean and pinned.
        owner.read(0);
        let id = owner.resident(0).unwrap();
        owner.table.pin(id);
        assert_eq!(owner.table.discard(id), (Hint { tag: Tag::WarmIn, ..Hint::NEW }, None));
        owner.refs[0] = None;
        assert!(owner.table.page(id).is_some() && owner.table.is_detached(id));
        assert_eq!(owner.table.available(), 1);
        owner.table.unpin(id);
        assert_eq!((owner.table.state(id), owner.table.free_pages()), (State::Free, 2));
        // A fill that failed while somebody holds the page.
        let id = owner.start(1, false).unwrap();
        owner.table.pin(id);
        owner.discard(1);
        owner.table.finish(id, Level::High);
        assert_eq!(owner.table.free_pages(), 1);
        owner.table.unpin(id);
        assert_eq!(owner.table.free_pages(), 2);
        owner.check(2);
    }

    #[test]
    fn a_switched_policy_drains_what_the_other_left() {
        let mut storage = storage();
        let mut owner = Owner::new(&mut storage, 4, 32, Policy::TwoQBluestore);
        (0..6).for_each(|block| owner.read(block));
        owner.read(0);
        assert_eq!((owner.warm_in(), owner.hot()), (vec![5, 4, 3], vec![0]));
        owner.table.set_policy(Policy::Lru);
        owner.read(3);
        assert_eq!((owner.warm_in(), owner.hot()), (vec![5, 4], vec![3, 0]));
        (6..9).for_each(|block| owner.read(block));
        assert_eq!((owner.warm_in(), owner.hot()), (vec![], vec![8, 7, 6, 3]));
        assert_eq!(owner.warm_out(), []);
        owner.check(4);
    }

    #[test]
    fn a_policy_is_known_by_its_name() {
        for &policy in Policy::ALL {
            assert_eq!(Policy::from_name(policy.name()), Some(policy));
        }
        assert_eq!(Policy::from_name("arc"), None);
    }
}
