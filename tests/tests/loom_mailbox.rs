//! Every interleaving (up to the preemption bound) of what crosses cores. Run by `cargo loom`.
//!
//! Loom knows its own atomics, cells and locks only, treats each SeqCst access as AcqRel (the
//! mailbox uses SeqCst fences, which it does model), and reports a wait that nobody ends as a
//! deadlock, an access without a happens-before as a causality violation, and an `Arc` that is
//! never dropped as a leak.
#![cfg(loom)]

use heeler_core::mailbox::{Doorbell, Parker, PopError, Receiver, Sender, doorbell, mailbox};
use loom::cell::UnsafeCell;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// An eventfd: a write makes the present or the next read return.
#[derive(Default)]
struct EventFd {
    written: Mutex<bool>,
    changed: Condvar,
}

impl EventFd {
    fn write(&self) {
        *self.written.lock().unwrap() = true;
        self.changed.notify_one();
    }

    fn read(&self) {
        let mut written = self.written.lock().unwrap();
        while !*written {
            written = self.changed.wait(written).unwrap();
        }
        *written = false;
    }
}

fn ring(bell: &Doorbell, eventfd: &EventFd) {
    if bell.must_ring() {
        eventfd.write();
    }
}

/// The next message of one of `inboxes`, sleeping until there is one. Closed mailboxes are
/// removed; `None` when all are.
fn receive(
    inboxes: &mut Vec<Receiver<u32>>,
    parker: &mut Parker,
    eventfd: &EventFd,
) -> Option<u32> {
    while !inboxes.is_empty() {
        let mut i = 0;
        while i < inboxes.len() {
            match inboxes[i].pop() {
                Ok(message) => return Some(message),
                Err(PopError::Empty) => i += 1,
                Err(PopError::Closed) => drop(inboxes.remove(i)),
            }
        }
        if !inboxes.is_empty() && parker.prepare_park(|| inboxes.iter().any(Receiver::has_news)) {
            eventfd.read();
            parker.awake();
        }
    }
    None
}

fn push_until_taken(tx: &mut Sender<u32>, message: u32) {
    while tx.push(message).is_err() {
        thread::yield_now();
    }
}

/// Three messages through a ring of two: none is lost, doubled or overtaken, and a slot is not
/// written again before it was read.
#[test]
fn messages_arrive_once_and_in_order_around_the_ring() {
    loom::model(|| {
        let (mut tx, mut rx) = mailbox(2);
        let producer = thread::spawn(move || {
            (0..3).for_each(|n| push_until_taken(&mut tx, n));
        });
        let mut expected = 0;
        while expected < 3 {
            match rx.pop() {
                Ok(n) => {
                    assert_eq!(n, expected);
                    expected += 1;
                }
                Err(PopError::Empty) => thread::yield_now(),
                Err(PopError::Closed) => panic!("closed after {expected} messages"),
            }
        }
        producer.join().unwrap();
        assert_eq!(rx.pop(), Err(PopError::Closed));
    });
}

/// A push into a full ring gives the message back and changes nothing; a push succeeds only after
/// a pop has made room, and `free` never promises more than `push` keeps.
#[test]
fn a_full_mailbox_refuses_and_keeps_what_it_has() {
    loom::model(|| {
        let (mut tx, mut rx) = mailbox(1);
        tx.push(1).unwrap();
        let producer = thread::spawn(move || {
            let free = tx.free();
            let pushed = tx.push(2);
            assert!(free == 0 || pushed.is_ok());
            pushed
        });
        assert_eq!(rx.pop(), Ok(1));
        match producer.join().unwrap() {
            Ok(()) => assert_eq!(rx.pop(), Ok(2)),
            Err(message) => assert_eq!(message, 2),
        }
        assert_eq!(rx.pop(), Err(PopError::Closed));
    });
}

/// A consumer that sleeps whenever it sees nothing is woken for each of two messages, whichever
/// way the pushes fall between its flag, its look and its sleep. (It knows how many to expect, so
/// the close wakes nobody.)
#[test]
fn a_push_wakes_a_core_that_parks() {
    loom::model(|| {
        let eventfd = Arc::new(EventFd::default());
        let (bell, mut parker) = doorbell();
        let (mut tx, rx) = mailbox(2);
        let producer = {
            let eventfd = eventfd.clone();
            thread::spawn(move || {
                for n in 0..2 {
                    tx.push(n).unwrap();
                    ring(&bell, &eventfd);
                }
                // Kept, so that no close comes to the rescue of a lost wake-up.
                tx
            })
        };
        let mut inboxes = vec![rx];
        for n in 0..2 {
            assert_eq!(receive(&mut inboxes, &mut parker, &eventfd), Some(n));
        }
        drop(producer.join().unwrap());
    });
}

/// Two producers with a mailbox each share one doorbell: the one that is not told to ring may rely
/// on the other's ring.
#[test]
fn two_producers_wake_one_core() {
    loom::model(|| {
        let eventfd = Arc::new(EventFd::default());
        let (bell, mut parker) = doorbell();
        let (txs, mut inboxes): (Vec<_>, Vec<_>) = (0..2).map(|_| mailbox(1)).unzip();
        let mut producers = Vec::new();
        for (mut tx, n) in txs.into_iter().zip([1, 2]) {
            let (eventfd, bell) = (eventfd.clone(), bell.clone());
            producers.push(thread::spawn(move || {
                tx.push(n).unwrap();
                ring(&bell, &eventfd);
                tx
            }));
        }
        let sum: u32 = (0..2).map(|_| receive(&mut inboxes, &mut parker, &eventfd).unwrap()).sum();
        assert_eq!(sum, 3);
        producers.into_iter().for_each(|producer| drop(producer.join().unwrap()));
    });
}

/// A sender that goes right after its last message: the receiver gets all that was sent, then
/// `Closed`, and is woken for it if it sleeps.
#[test]
fn the_last_message_comes_before_the_close() {
    loom::model(|| {
        let eventfd = Arc::new(EventFd::default());
        let (bell, mut parker) = doorbell();
        let (mut tx, rx) = mailbox(2);
        let producer = {
            let eventfd = eventfd.clone();
            thread::spawn(move || {
                tx.push(1).unwrap();
                tx.push(2).unwrap();
                drop(tx);
                ring(&bell, &eventfd);
            })
        };
        let mut inboxes = vec![rx];
        for expected in [Some(1), Some(2), None] {
            assert_eq!(receive(&mut inboxes, &mut parker, &eventfd), expected);
        }
        producer.join().unwrap();
    });
}

/// A receiver that goes while messages come: each message is dropped once, taken or not (loom
/// reports an `Arc` that stays), and the sender can see that it talks to nobody.
#[test]
fn a_receiver_that_goes_leaks_nothing() {
    loom::model(|| {
        let (mut tx, mut rx) = mailbox(2);
        let producer = thread::spawn(move || {
            for _ in 0..2 {
                assert!(tx.push(Arc::new(())).is_ok());
            }
            tx
        });
        drop(rx.pop());
        drop(rx);
        let tx = producer.join().unwrap();
        assert!(tx.is_closed());
    });
}

/// A page goes to another core by its number, is changed there and comes back: each side sees
/// what the other wrote, and neither touches the page while it is away.
#[test]
fn a_page_is_handed_over_with_its_content() {
    struct Arena([UnsafeCell<u64>; 2]);
    // SAFETY: a page is touched by the thread that has its number: what the model checks.
    unsafe impl Sync for Arena {}
    impl Arena {
        fn read(&self, page: u32) -> u64 {
            // SAFETY: the caller has the page's number; loom checks it.
            self.0[page as usize].with(|p| unsafe { *p })
        }

        fn write(&self, page: u32, value: u64) {
            // SAFETY: the caller has the page's number; loom checks it.
            self.0[page as usize].with_mut(|p| unsafe { *p = value });
        }
    }

    loom::model(|| {
        let arena = Arc::new(Arena([UnsafeCell::new(0), UnsafeCell::new(0)]));
        let (mut to_shard, mut requests) = mailbox::<u32>(2);
        let (mut to_session, mut replies) = mailbox::<u32>(2);
        let shard = {
            let arena = arena.clone();
            thread::spawn(move || {
                let page = loop {
                    match requests.pop() {
                        Ok(page) => break page,
                        Err(_) => thread::yield_now(),
                    }
                };
                assert_eq!(arena.read(page), 7);
                // The reply hands as many pages back; here the same one.
                arena.write(page, 8);
                to_session.push(page).unwrap();
            })
        };
        arena.write(1, 7);
        to_shard.push(1).unwrap();
        // The other page is still ours.
        arena.write(0, 1);
        let page = loop {
            match replies.pop() {
                Ok(page) => break page,
                Err(_) => thread::yield_now(),
            }
        };
        assert_eq!((page, arena.read(page)), (1, 8));
        shard.join().unwrap();
    });
}
