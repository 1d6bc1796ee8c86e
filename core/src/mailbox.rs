//! What crosses cores: a bounded mailbox from one core to another, and the doorbell of a core that
//! sleeps. Nothing else in the core is shared between threads.
//!
//! A message that arrived happened after everything its sender did before `push`: a page's number
//! in a message hands the page's content over with it.
//!
//! Sleeping, without a lost wake-up:
//!
//! ```text
//! consumer                                 producer
//! prepare_park: set the flag, fence,       push to the mailbox
//!   look at every mailbox                  must_ring: fence, take the flag
//! nothing there: sleep on the eventfd      it was set: write the eventfd
//! awake: clear the flag
//! ```
//!
//! The two fences have an order. If the producer's is first, the consumer sees the message; else
//! the producer sees the flag.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use core::fmt;
use core::mem::MaybeUninit;

use crate::sync::{Arc, AtomicBool, AtomicUsize, Line, Ordering, UnsafeCell, fence};

/// Makes a mailbox for `capacity` messages, a power of two.
///
/// # Panics
///
/// If `capacity` is not a power of two.
#[must_use]
pub fn mailbox<T: Send>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    assert!(capacity.is_power_of_two(), "a mailbox's capacity is a power of two");
    let slots = (0..capacity).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect();
    let ring = Arc::new(Ring {
        head: Line(AtomicUsize::new(0)),
        tail: Line(AtomicUsize::new(0)),
        sender_gone: AtomicBool::new(false),
        receiver_gone: AtomicBool::new(false),
        slots,
    });
    (Sender { ring: ring.clone(), tail: 0, head_seen: 0 }, Receiver { ring, head: 0, tail_seen: 0 })
}

/// Positions count messages since the start and wrap around; message `n` is in slot
/// `n % capacity`. The slots `head..tail` hold messages and belong to the receiver, all others to
/// the sender.
struct Ring<T> {
    /// Written by the receiver: what it has taken.
    head: Line<AtomicUsize>,
    /// Written by the sender: what it has put.
    tail: Line<AtomicUsize>,
    sender_gone: AtomicBool,
    receiver_gone: AtomicBool,
    slots: Box<[UnsafeCell<MaybeUninit<T>>]>,
}

// SAFETY: a slot is touched by the one side that owns it; ownership passes by a release store of
// `tail` or `head` that the other side acquires. There is one sender and one receiver, and both
// need `&mut self`. Messages change thread, hence `T: Send`.
unsafe impl<T: Send> Sync for Ring<T> {}

impl<T> Ring<T> {
    fn slot(&self, position: usize) -> &UnsafeCell<MaybeUninit<T>> {
        &self.slots[position & (self.slots.len() - 1)]
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // Both sides are gone; the last reference has acquired what they did.
        let tail = self.tail.0.load(Ordering::Relaxed);
        let mut head = self.head.0.load(Ordering::Relaxed);
        while head != tail {
            // SAFETY: `head..tail` hold messages that nobody took.
            self.slot(head).with_mut(|slot| unsafe { (*slot).assume_init_drop() });
            head = head.wrapping_add(1);
        }
    }
}

/// The end that puts messages in. Dropping it closes the mailbox; ring the receiver's doorbell
/// after that too.
pub struct Sender<T> {
    ring: Arc<Ring<T>>,
    tail: usize,
    /// `head` when last looked at: at or before the real one.
    head_seen: usize,
}

impl<T: Send> Sender<T> {
    /// Puts a message in. Ring the doorbell after the last one of a turn.
    ///
    /// # Errors
    ///
    /// The message, if the mailbox is full.
    pub fn push(&mut self, message: T) -> Result<(), T> {
        if self.free() == 0 {
            return Err(message);
        }
        // SAFETY: the slot is not in `head..tail`, so it is the sender's, and holds no message.
        self.ring.slot(self.tail).with_mut(|slot| unsafe { (*slot).write(message) });
        self.tail = self.tail.wrapping_add(1);
        self.ring.tail.0.store(self.tail, Ordering::Release);
        Ok(())
    }

    /// How many messages can be put in for sure. At least one, if there is room for one.
    pub fn free(&mut self) -> usize {
        let free = self.free_as_seen();
        if free > 0 {
            return free;
        }
        self.head_seen = self.ring.head.0.load(Ordering::Acquire);
        self.free_as_seen()
    }

    /// Whether the receiver is gone: nobody will take what is put in.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.ring.receiver_gone.load(Ordering::Acquire)
    }

    fn free_as_seen(&self) -> usize {
        self.ring.slots.len() - self.tail.wrapping_sub(self.head_seen)
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.ring.sender_gone.store(true, Ordering::Release);
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("tail", &self.tail).finish_non_exhaustive()
    }
}

/// Why there is no message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PopError {
    /// None now.
    Empty,
    /// None ever again: all that was sent has been taken, and the sender is gone.
    Closed,
}

/// The end that takes messages out.
pub struct Receiver<T> {
    ring: Arc<Ring<T>>,
    head: usize,
    /// `tail` when last looked at: at or before the real one.
    tail_seen: usize,
}

impl<T: Send> Receiver<T> {
    /// Takes the oldest message.
    ///
    /// # Errors
    ///
    /// [`PopError`] if there is none.
    pub fn pop(&mut self) -> Result<T, PopError> {
        if self.head == self.tail_seen {
            // Before `tail`: what a sender put in before it went must be seen.
            let gone = self.ring.sender_gone.load(Ordering::Acquire);
            self.tail_seen = self.ring.tail.0.load(Ordering::Acquire);
            if self.head == self.tail_seen {
                return Err(if gone { PopError::Closed } else { PopError::Empty });
            }
        }
        // SAFETY: the slot is in `head..tail`, so it is the receiver's and holds a message, which
        // is read once, since `head` goes on.
        let message = self.ring.slot(self.head).with(|slot| unsafe { (*slot).assume_init_read() });
        self.head = self.head.wrapping_add(1);
        self.ring.head.0.store(self.head, Ordering::Release);
        Ok(message)
    }

    /// Whether `pop` would say anything else than [`PopError::Empty`]: what a core that wants to
    /// sleep asks of each of its mailboxes in [`Parker::prepare_park`].
    #[must_use]
    pub fn has_news(&self) -> bool {
        self.ring.tail.0.load(Ordering::Acquire) != self.head
            || self.ring.sender_gone.load(Ordering::Acquire)
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.ring.receiver_gone.store(true, Ordering::Release);
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("head", &self.head).finish_non_exhaustive()
    }
}

/// Makes the doorbell of one core: the core keeps the [`Parker`], each sender to it gets a clone of
/// the [`Doorbell`]. The eventfd that goes with it is the caller's.
#[must_use]
pub fn doorbell() -> (Doorbell, Parker) {
    let parked = Arc::new(Line(AtomicBool::new(false)));
    (Doorbell { parked: parked.clone() }, Parker { parked })
}

/// The senders' side of a core's doorbell.
#[derive(Clone, Debug)]
pub struct Doorbell {
    parked: Arc<Line<AtomicBool>>,
}

impl Doorbell {
    /// Whether the core sleeps, or is about to, and this caller is the one to wake it. Call it
    /// after the pushes (or the drop of a sender) that the core must see; on `true` write its
    /// eventfd. Only one of several senders is told.
    #[must_use]
    pub fn must_ring(&self) -> bool {
        // Pairs with the fence in `prepare_park`.
        fence(Ordering::SeqCst);
        // The load keeps the line shared while the core is awake, which is the usual case.
        self.parked.0.load(Ordering::Relaxed) && self.parked.0.swap(false, Ordering::Relaxed)
    }
}

/// A core's own side of its doorbell.
#[derive(Debug)]
pub struct Parker {
    parked: Arc<Line<AtomicBool>>,
}

impl Parker {
    /// Says that the core is about to sleep, then asks `has_news` to look at every mailbox.
    /// `true`: sleep until the eventfd is written or a deadline, then call [`awake`](Self::awake).
    /// `false`: there is news, do not sleep. (The eventfd may be written nevertheless: the next
    /// sleep then ends at once, which is harmless.)
    #[must_use]
    pub fn prepare_park(&mut self, has_news: impl FnOnce() -> bool) -> bool {
        // A sender may be late with its `swap`, from the last time. A swap here too puts the two in
        // an order that loom sees as well, and costs nothing beside the sleep.
        self.parked.0.swap(true, Ordering::Relaxed);
        // Pairs with the fence in `must_ring`.
        fence(Ordering::SeqCst);
        if has_news() {
            self.awake();
            return false;
        }
        true
    }

    /// The core no longer sleeps: senders need not ring.
    pub fn awake(&mut self) {
        self.parked.0.store(false, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    extern crate std;

    use alloc::vec;
    use alloc::vec::Vec;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn messages_come_out_in_order_and_full_gives_them_back() {
        let (mut tx, mut rx) = mailbox(4);
        assert_eq!(rx.pop(), Err(PopError::Empty));
        let mut next = 0;
        for round in 0..10 {
            let sent: Vec<u32> = (0..4).map(|i| round * 4 + i).collect();
            assert_eq!(tx.free(), 4);
            sent.iter().for_each(|&n| tx.push(n).unwrap());
            assert_eq!((tx.free(), tx.push(99)), (0, Err(99)));
            for _ in 0..4 {
                assert_eq!(rx.pop(), Ok(next));
                next += 1;
            }
        }
    }

    #[test]
    fn positions_wrap_around() {
        let (mut tx, mut rx) = mailbox(2);
        let start = usize::MAX - 2;
        tx.ring.head.0.store(start, Ordering::Relaxed);
        tx.ring.tail.0.store(start, Ordering::Relaxed);
        (tx.tail, tx.head_seen, rx.head, rx.tail_seen) = (start, start, start, start);
        for n in 0..8 {
            tx.push(n).unwrap();
            tx.push(n + 100).unwrap();
            assert_eq!(tx.push(0), Err(0));
            assert_eq!((rx.pop(), rx.pop()), (Ok(n), Ok(n + 100)));
        }
    }

    #[test]
    fn what_was_sent_before_the_sender_went_still_comes() {
        let (mut tx, mut rx) = mailbox(2);
        tx.push(1).unwrap();
        drop(tx);
        assert!(rx.has_news());
        assert_eq!((rx.pop(), rx.pop()), (Ok(1), Err(PopError::Closed)));
    }

    #[test]
    fn what_nobody_took_is_dropped_once() {
        let value = Arc::new(());
        let (mut tx, mut rx) = mailbox(4);
        (0..3).for_each(|_| tx.push(value.clone()).unwrap());
        drop(rx.pop().unwrap());
        assert_eq!(Arc::strong_count(&value), 3);
        assert!(!tx.is_closed());
        drop(rx);
        assert!(tx.is_closed());
        drop(tx);
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn only_a_parked_core_is_rung_and_by_one() {
        let (bell, mut parker) = doorbell();
        let other = bell.clone();
        assert!(!bell.must_ring());
        assert!(!parker.prepare_park(|| true));
        assert!(!bell.must_ring());
        assert!(parker.prepare_park(|| false));
        assert_eq!([bell.must_ring(), other.must_ring()], [true, false]);
        assert!(parker.prepare_park(|| false));
        parker.awake();
        assert!(!bell.must_ring());
    }

    /// Two producers and a consumer that sleeps whenever it can. A lost message breaks the sums or
    /// the order, a lost wake-up ends in the timeout.
    #[test]
    fn threads_lose_no_message_and_no_wake_up() {
        const MESSAGES: u64 = if cfg!(miri) { 100 } else { 200_000 };
        let (bell, mut parker) = doorbell();
        let (txs, mut rxs): (Vec<_>, Vec<_>) = (0..2).map(|_| mailbox::<u64>(8)).unzip();
        let consumer = thread::current();
        let producers: Vec<_> = txs
            .into_iter()
            .map(|mut tx| {
                let (bell, consumer) = (bell.clone(), consumer.clone());
                thread::spawn(move || {
                    let ring = || _ = bell.must_ring().then(|| consumer.unpark());
                    for n in 0..MESSAGES {
                        while tx.push(n).is_err() {
                            thread::yield_now();
                        }
                        ring();
                    }
                    drop(tx);
                    ring();
                })
            })
            .collect();
        let mut next = vec![0u64; rxs.len()];
        while !rxs.is_empty() {
            let mut i = 0;
            while i < rxs.len() {
                match rxs[i].pop() {
                    Ok(n) => {
                        assert_eq!(n, next[i]);
                        next[i] += 1;
                    }
                    Err(PopError::Empty) => i += 1,
                    Err(PopError::Closed) => {
                        assert_eq!(next[i], MESSAGES);
                        rxs.remove(i);
                        next.remove(i);
                    }
                }
            }
            if !rxs.is_empty() && parker.prepare_park(|| rxs.iter().any(Receiver::has_news)) {
                let before = std::time::Instant::now();
                thread::park_timeout(Duration::from_secs(30));
                assert!(before.elapsed() < Duration::from_secs(30), "a wake-up was lost");
                parker.awake();
            }
        }
        producers.into_iter().for_each(|producer| producer.join().unwrap());
    }
}
