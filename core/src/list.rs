//! Doubly linked lists of slot numbers, over lent memory.
//!
//! A table of slots keeps its links in an array of its own ([`Link`], 8 bytes for each slot), so
//! the values can be borrowed `&mut` while their slots are linked. [`queues`] makes up to three
//! lists over one array; a slot is on at most one of them, and its link says on which: that owner
//! tag is what makes removal from the middle safe to offer.
//!
//! The list itself is `intrusive-collections`' `LinkedList`; this module gives it links that are
//! indices. Every access to the array is bounds-checked: a bug can misorder a list, it cannot
//! corrupt memory.
#![allow(unsafe_code)]

use core::cell::Cell;
use core::num::NonZeroU32;

use intrusive_collections::linked_list::LinkedListOps;
use intrusive_collections::{Adapter, LinkOps, LinkedList, PointerOps};

/// Slots that one array of links has at most.
pub const SLOTS_MAX: usize = (1 << OWNER_SHIFT) - 1;
/// Lists that share one array of links at most.
pub const QUEUES_MAX: usize = 3;

const OWNER_SHIFT: u32 = 30;
const INDEX_MASK: u32 = (1 << OWNER_SHIFT) - 1;

/// What one slot needs to be on a list: its neighbours and the list it is on. The default is a
/// slot on no list.
///
/// Neighbours are kept as slot number + 1, so that zeroed memory is an unlinked slot.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Bits 0..30: towards the back. Bits 30..32: the owner, 0 while on no list.
    next: Cell<u32>,
    /// Towards the front.
    prev: Cell<u32>,
}

const _: () = assert!(size_of::<Link>() == 8);

impl Link {
    fn owner(&self) -> u32 {
        self.next.get() >> OWNER_SHIFT
    }
}

/// Slot number + 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Position(NonZeroU32);

impl Position {
    fn new(raw: u32) -> Option<Self> {
        NonZeroU32::new(raw & INDEX_MASK).map(Self)
    }

    fn raw(this: Option<Self>) -> u32 {
        this.map_or(0, |p| p.0.get())
    }

    fn of_index(index: usize) -> Self {
        debug_assert!(index < SLOTS_MAX);
        // The addition cannot reach zero: an array has at most SLOTS_MAX links.
        Self(NonZeroU32::MIN.saturating_add(index as u32))
    }

    fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

/// How a list finds and changes links: the array and this list's tag.
#[derive(Clone, Copy, Debug)]
struct Ops<'a> {
    links: &'a [Link],
    owner: u32,
}

impl Ops<'_> {
    fn link(&self, at: Position) -> &Link {
        &self.links[at.index()]
    }
}

// SAFETY: a link is acquired by at most one list: `acquire_link` refuses a link whose owner is not
// zero, and all lists over one array come from one call of `queues`, with different owners.
// Positions come from `Adapter::get_link` or from links, so they are in bounds and nothing here
// panics.
unsafe impl LinkOps for Ops<'_> {
    type LinkPtr = Position;

    unsafe fn acquire_link(&mut self, at: Position) -> bool {
        let link = self.link(at);
        if link.owner() != 0 {
            return false;
        }
        link.next.set(self.owner << OWNER_SHIFT);
        true
    }

    unsafe fn release_link(&mut self, at: Position) {
        self.link(at).next.set(0);
    }
}

// SAFETY: plain loads and stores of what the list asks for; `set_next` keeps the owner bits.
// Positions are in bounds, as above, so nothing panics.
unsafe impl LinkedListOps for Ops<'_> {
    unsafe fn next(&self, at: Position) -> Option<Position> {
        Position::new(self.link(at).next.get())
    }

    unsafe fn prev(&self, at: Position) -> Option<Position> {
        Position::new(self.link(at).prev.get())
    }

    unsafe fn set_next(&mut self, at: Position, next: Option<Position>) {
        let link = self.link(at);
        link.next.set(link.owner() << OWNER_SHIFT | Position::raw(next));
    }

    unsafe fn set_prev(&mut self, at: Position, prev: Option<Position>) {
        self.link(at).prev.set(Position::raw(prev));
    }
}

/// The "pointer" a list owns is the slot number; the raw form is the address of the slot's link.
#[derive(Clone, Copy, Debug)]
struct Slots<'a> {
    links: &'a [Link],
}

impl Slots<'_> {
    fn index_of(&self, link: *const Link) -> usize {
        (link.addr() - self.links.as_ptr().addr()) / size_of::<Link>()
    }
}

// SAFETY: `into_raw` gives the address of element `slot` of the array, `from_raw` turns exactly
// such addresses back into the number. It cannot panic: the address is not below the array's.
unsafe impl PointerOps for Slots<'_> {
    type Value = Link;
    type Pointer = u32;

    unsafe fn from_raw(&self, value: *const Link) -> u32 {
        self.index_of(value) as u32
    }

    fn into_raw(&self, slot: u32) -> *const Link {
        &raw const self.links[slot as usize]
    }
}

#[derive(Debug)]
struct SlotAdapter<'a> {
    ops: Ops<'a>,
    slots: Slots<'a>,
}

// SAFETY: `get_value` and `get_link` are inverse: element address <-> position, same array.
unsafe impl<'a> Adapter for SlotAdapter<'a> {
    type LinkOps = Ops<'a>;
    type PointerOps = Slots<'a>;

    unsafe fn get_value(&self, at: Position) -> *const Link {
        self.ops.link(at)
    }

    unsafe fn get_link(&self, value: *const Link) -> Position {
        Position::of_index(self.slots.index_of(value))
    }

    fn link_ops(&self) -> &Ops<'a> {
        &self.ops
    }

    fn link_ops_mut(&mut self) -> &mut Ops<'a> {
        &mut self.ops
    }

    fn pointer_ops(&self) -> &Slots<'a> {
        &self.slots
    }
}

/// Makes `N` empty lists over `links`, forgetting what the links said before.
///
/// # Panics
///
/// If there are more than [`SLOTS_MAX`] links.
pub fn queues<const N: usize>(links: &mut [Link]) -> [Queue<'_>; N] {
    const { assert!(N <= QUEUES_MAX) };
    assert!(links.len() <= SLOTS_MAX, "too many slots");
    links.fill(Link::default());
    let links = &*links;
    core::array::from_fn(|i| {
        let ops = Ops { links, owner: i as u32 + 1 };
        let list = LinkedList::new(SlotAdapter { ops, slots: Slots { links } });
        Queue { list, ops, len: 0 }
    })
}

/// One list of slots. Every operation is O(1), except dropping the list, which unlinks its slots.
///
/// # Panics
///
/// All that take a slot panic if it is outside the array; the pushes panic if it is already on a
/// list. Both are broken invariants of the caller.
#[derive(Debug)]
pub struct Queue<'a> {
    list: LinkedList<SlotAdapter<'a>>,
    /// The same as the list's own, which it does not show.
    ops: Ops<'a>,
    len: u32,
}

impl Queue<'_> {
    /// How many slots are on the list.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether no slot is on the list.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The slot at the front.
    #[must_use]
    pub fn front(&self) -> Option<u32> {
        self.list.front().clone_pointer()
    }

    /// The slot at the back.
    #[must_use]
    pub fn back(&self) -> Option<u32> {
        self.list.back().clone_pointer()
    }

    /// The slot behind `slot`; `None` if it is the last, or not on this list.
    #[must_use]
    pub fn next(&self, slot: u32) -> Option<u32> {
        let link = self.link(slot);
        if link.owner() != self.ops.owner {
            return None;
        }
        Position::new(link.next.get()).map(|p| p.index() as u32)
    }

    /// Whether `slot` is on this list.
    #[must_use]
    pub fn contains(&self, slot: u32) -> bool {
        self.link(slot).owner() == self.ops.owner
    }

    /// The slots, front to back.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        core::iter::successors(self.front(), |&slot| self.next(slot))
    }

    /// Puts `slot`, which is on no list, at the front.
    pub fn push_front(&mut self, slot: u32) {
        self.list.push_front(slot);
        self.len += 1;
    }

    /// Puts `slot`, which is on no list, at the back.
    pub fn push_back(&mut self, slot: u32) {
        self.list.push_back(slot);
        self.len += 1;
    }

    /// Takes the slot at the front.
    pub fn pop_front(&mut self) -> Option<u32> {
        let slot = self.list.pop_front()?;
        self.len -= 1;
        Some(slot)
    }

    /// Takes the slot at the back.
    pub fn pop_back(&mut self) -> Option<u32> {
        let slot = self.list.pop_back()?;
        self.len -= 1;
        Some(slot)
    }

    /// Takes `slot` off the list. `false`, and nothing changes, if it is not on this list.
    pub fn remove(&mut self, slot: u32) -> bool {
        if !self.contains(slot) {
            return false;
        }
        let link: *const Link = self.link(slot);
        // SAFETY: `link` points at an element of the array and its owner tag says that it is on
        // this very list.
        let removed = unsafe { self.list.cursor_mut_from_ptr(link) }.remove();
        debug_assert_eq!(removed, Some(slot));
        self.len -= 1;
        true
    }

    /// Puts `new`, which is on no list, at the place of `old`, which leaves. `false`, and nothing
    /// changes, if `old` is not on this list.
    pub fn replace(&mut self, old: u32, new: u32) -> bool {
        if !self.contains(old) {
            return false;
        }
        let link: *const Link = self.link(old);
        // SAFETY: `link` points at an element of the array and its owner tag says that it is on
        // this very list.
        let replaced = unsafe { self.list.cursor_mut_from_ptr(link) }.replace_with(new);
        debug_assert_eq!(replaced, Ok(old));
        true
    }

    /// Moves `slot` to the front. `false`, and nothing changes, if it is not on this list.
    pub fn move_to_front(&mut self, slot: u32) -> bool {
        if self.front() == Some(slot) {
            return true;
        }
        let found = self.remove(slot);
        if found {
            self.push_front(slot);
        }
        found
    }

    fn link(&self, slot: u32) -> &Link {
        &self.ops.links[slot as usize]
    }
}

#[cfg(test)]
mod tests {
    use alloc::collections::VecDeque;
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;
    use crate::random::Random;

    const SLOTS: u32 = 24;

    fn check(queue: &Queue<'_>, model: &VecDeque<u32>) {
        assert_eq!(queue.len() as usize, model.len());
        assert_eq!(queue.is_empty(), model.is_empty());
        assert_eq!(queue.front(), model.front().copied());
        assert_eq!(queue.back(), model.back().copied());
        assert!(queue.iter().eq(model.iter().copied()));
        for slot in 0..SLOTS {
            assert_eq!(queue.contains(slot), model.contains(&slot));
        }
    }

    fn model_run(seed: u64, steps: u32) {
        let mut random = Random(seed);
        let mut links = vec![Link::default(); SLOTS as usize];
        let mut queues: [Queue<'_>; 3] = queues(&mut links);
        let mut models: [VecDeque<u32>; 3] = Default::default();
        for _ in 0..steps {
            let q = random.below(3) as usize;
            let slot = random.below(SLOTS.into()) as u32;
            let free = !models.iter().any(|m| m.contains(&slot));
            let (queue, model) = (&mut queues[q], &mut models[q]);
            let found = model.iter().position(|&s| s == slot);
            let other = random.below(SLOTS.into()) as u32;
            let replaces = free && other != slot && model.contains(&other);
            match random.below(8) {
                7 if replaces => {
                    assert!(queue.replace(other, slot));
                    let at = model.iter().position(|s| *s == other).unwrap();
                    model[at] = slot;
                }
                0 | 1 if free => {
                    queue.push_front(slot);
                    model.push_front(slot);
                }
                2 | 3 if free => {
                    queue.push_back(slot);
                    model.push_back(slot);
                }
                4 => {
                    assert_eq!(queue.move_to_front(slot), found.is_some());
                    if let Some(i) = found {
                        model.remove(i);
                        model.push_front(slot);
                    }
                }
                5 => {
                    assert_eq!(queue.remove(slot), found.is_some());
                    found.map(|i| model.remove(i));
                }
                6 if random.below(2) == 0 => assert_eq!(queue.pop_front(), model.pop_front()),
                6 => assert_eq!(queue.pop_back(), model.pop_back()),
                _ => assert_eq!(
                    queue.next(slot),
                    found.and_then(|i| model.get(i + 1)).copied(),
                    "the slot behind {slot}"
                ),
            }
            for (queue, model) in queues.iter().zip(&models) {
                check(queue, model);
            }
        }
    }

    #[test]
    fn three_lists_behave_as_three_deques() {
        let (seeds, steps) = if cfg!(miri) { (1, 120) } else { (8, 20_000) };
        for seed in 0..seeds {
            model_run(seed, steps);
        }
    }

    #[test]
    fn a_list_does_not_remove_what_is_on_another() {
        let mut links = vec![Link::default(); 4];
        let [mut a, mut b] = queues(&mut links);
        a.push_back(1);
        b.push_back(2);
        assert!(!b.remove(1) && !a.remove(2) && !a.remove(3));
        assert!(!b.move_to_front(1));
        assert_eq!((a.len(), b.len()), (1, 1));
        assert_eq!((a.next(2), b.next(1)), (None, None));
    }

    #[test]
    #[should_panic(expected = "already linked")]
    fn a_slot_is_on_one_list_only() {
        let mut links = vec![Link::default(); 4];
        let [mut a, mut b] = queues(&mut links);
        a.push_back(1);
        b.push_back(1);
    }

    #[test]
    #[should_panic(expected = "out of bounds")]
    fn a_slot_outside_the_array_is_refused() {
        let mut links = vec![Link::default(); 4];
        let [mut a] = queues(&mut links);
        a.push_back(4);
    }

    #[test]
    fn links_left_by_forgotten_lists_are_usable_again() {
        let mut links = vec![Link::default(); 4];
        let [mut a, b] = queues(&mut links);
        (0..4).for_each(|slot| a.push_back(slot));
        core::mem::forget((a, b));
        let [mut a] = queues(&mut links);
        assert!(a.is_empty() && !a.contains(2));
        a.push_back(2);
        assert_eq!(a.iter().collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn a_dropped_list_leaves_its_slots_unlinked() {
        let mut links = vec![Link::default(); 4];
        let [mut a, mut b] = queues(&mut links);
        a.push_back(0);
        a.push_back(1);
        drop(a);
        b.push_back(1);
        assert_eq!(b.iter().collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn the_values_of_linked_slots_can_be_borrowed() {
        let mut values = vec![0u32; 4];
        let mut links = vec![Link::default(); 4];
        let [mut a] = queues(&mut links);
        for slot in 0..4 {
            a.push_front(slot);
            values[slot as usize] += 1;
            for value in &mut values {
                *value += 1;
            }
        }
        assert_eq!(a.iter().collect::<Vec<_>>(), [3, 2, 1, 0]);
        assert_eq!(values, [5, 5, 5, 5]);
    }
}
