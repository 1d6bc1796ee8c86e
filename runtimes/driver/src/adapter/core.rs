//! One core on a runtime: the task that turns the loop, those that hear of completions and mail,
//! and those that accept.

use std::cell::{RefCell, RefMut};
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use heeler_core::time::Instant;
use heeler_hw::BlockQueue;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::connection::{Link, serve};
use super::listener::tune;
use super::notify::Notify;
use super::{Listener, Runtime};
use crate::{CONNECTIONS_MAX, CoreLoop};

/// Wait after an accept that failed: most often the process has too many open files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Turns at most before sockets and timers are looked at.
const TURNS_MAX: usize = 8;

/// What the tasks of one core share.
#[derive(Debug)]
pub(super) struct Core<Q> {
    driver: RefCell<CoreLoop<'static, Q>>,
    pub(super) links: RefCell<Vec<Option<Rc<Link>>>>,
    /// A turn may find something to do.
    pub(super) work: Notify,
    start: std::time::Instant,
}

impl<Q: BlockQueue + 'static> Core<Q> {
    pub(super) fn new(driver: CoreLoop<'static, Q>) -> Self {
        Self {
            driver: RefCell::new(driver),
            links: RefCell::new((0..CONNECTIONS_MAX).map(|_| None).collect()),
            work: Notify::default(),
            start: std::time::Instant::now(),
        }
    }

    /// The loop. Not to be held across an await.
    pub(super) fn driver(&self) -> RefMut<'_, CoreLoop<'static, Q>> {
        self.driver.borrow_mut()
    }

    fn now(&self) -> Instant {
        let nanoseconds = self.start.elapsed().as_nanos();
        Instant(u64::try_from(nanoseconds).expect("584 years"))
    }

    /// Turns the loop until nothing more comes of it, or others should have their turn. Returns
    /// when to come back, as the last turn did.
    fn turn(&self, now: Instant) -> Option<Instant> {
        for _ in 0..TURNS_MAX {
            let next = self.driver().turn(now);
            if !self.pass_on() {
                return next;
            }
        }
        Some(now)
    }

    /// Sends replies, and wakes the tasks of connections that may have something to do. True if
    /// that made room for more replies.
    fn pass_on(&self) -> bool {
        let mut room = false;
        let mut driver = self.driver();
        while let Some(id) = driver.poll_noted() {
            if let Some(link) = &self.links.borrow()[id.index()]
                && link.id == id
            {
                room |= link.send_at_once(&mut driver);
                link.reader.notify();
                if driver.wants_close(id) {
                    link.writer.notify();
                }
            }
        }
        room
    }
}

/// Runs a core until the control thread stops it.
pub(super) async fn run<R: Runtime, Q: BlockQueue + 'static>(
    core: Rc<Core<Q>>,
    listeners: Vec<Listener>,
) -> io::Result<()> {
    let event = core.driver().event().cloned();
    let event = event.ok_or_else(|| io::Error::other("a core needs an event to be woken by"))?;
    let completions = core.driver().queue().event_fd();
    R::spawn(hear::<R, Q>(core.clone(), signal::<R>(event.as_fd().try_clone_to_owned()?)?));
    if let Some(completions) = completions {
        R::spawn(hear::<R, Q>(core.clone(), signal::<R>(duplicate(completions)?)?));
    }
    for listener in listeners {
        let is_tcp = listener.is_tcp();
        R::spawn(accept::<R, Q>(core.clone(), R::listen(listener)?, is_tcp));
    }
    loop {
        let now = core.now();
        let next = core.turn(now);
        if core.driver().is_stopped() {
            return Ok(());
        }
        let at_once = next.is_some_and(|when| when <= now);
        if at_once || !core.driver().prepare_park() {
            // Everybody else has a turn first, sockets too. A task that wakes itself could get
            // ahead of them all, so this goes through the kernel.
            event.ring();
            core.work.wait().await;
            continue;
        }
        match next {
            Some(when) => {
                first_of(core.work.wait(), R::sleep(Duration::from_nanos((when - now).0))).await;
            }
            None => core.work.wait().await,
        }
        core.driver().awake();
    }
}

/// Waits for one of them.
async fn first_of(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    poll_fn(|context| {
        if one.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        other.as_mut().poll(context)
    })
    .await;
}

/// An eventfd that is waited for. The ring waits only for a descriptor that may block; otherwise
/// the read would fail at once. Nobody else reads it.
fn signal<R: Runtime>(event: OwnedFd) -> io::Result<R::Signal> {
    fcntl_setfl(&event, fcntl_getfl(&event)? - OFlags::NONBLOCK)?;
    R::signal(event)
}

/// Wakes the loop whenever the eventfd is written.
async fn hear<R: Runtime, Q: BlockQueue + 'static>(core: Rc<Core<Q>>, mut signal: R::Signal) {
    loop {
        if let Err(error) = R::wait(&mut signal).await
            && error.kind() != io::ErrorKind::Interrupted
        {
            log::error!("completions and mail can no longer be waited for: {error}");
            std::process::abort();
        }
        core.work.notify();
    }
}

/// Serves whoever comes.
async fn accept<R: Runtime, Q: BlockQueue + 'static>(
    core: Rc<Core<Q>>,
    listener: R::Listener,
    is_tcp: bool,
) {
    loop {
        match R::accept(&listener).await {
            Ok(socket) => {
                if is_tcp && let Err(error) = tune(&socket) {
                    log::debug!("a connection could not be tuned: {error}");
                }
                R::spawn(serve::<R, Q>(core.clone(), socket));
            }
            Err(error) => {
                log::warn!("could not accept a connection: {error}");
                R::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// A second descriptor of an open file.
#[allow(unsafe_code)]
fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the caller holds the owner of the descriptor, the block queue, while this runs.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}
