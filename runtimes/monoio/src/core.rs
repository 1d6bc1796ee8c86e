//! One core on monoio: the task that turns the loop, those that hear of completions and mail, and
//! those that accept.

use std::cell::{RefCell, RefMut};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use heeler_core::time::Instant;
use heeler_driver::{CONNECTIONS_MAX, CoreLoop};
use heeler_hw::BlockQueue;
use monoio::net::{TcpListener, UnixListener};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::Listener;
use crate::connection::{Link, serve};
use crate::notify::Notify;

/// Wait after an accept that failed: most often the process has too many open files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Turns at most before sockets and timers are looked at.
const TURNS_MAX: usize = 8;

/// What the tasks of one core share.
#[derive(Debug)]
pub(crate) struct Core<Q> {
    driver: RefCell<CoreLoop<'static, Q>>,
    pub(crate) links: RefCell<Vec<Option<Rc<Link>>>>,
    /// A turn may find something to do.
    pub(crate) work: Notify,
    start: std::time::Instant,
}

impl<Q: BlockQueue + 'static> Core<Q> {
    pub(crate) fn new(driver: CoreLoop<'static, Q>) -> Self {
        Self {
            driver: RefCell::new(driver),
            links: RefCell::new((0..CONNECTIONS_MAX).map(|_| None).collect()),
            work: Notify::default(),
            start: std::time::Instant::now(),
        }
    }

    /// The loop. Not to be held across an await.
    pub(crate) fn driver(&self) -> RefMut<'_, CoreLoop<'static, Q>> {
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
pub(crate) async fn run<Q: BlockQueue + 'static>(
    core: Rc<Core<Q>>,
    listeners: Vec<Listener>,
) -> io::Result<()> {
    let event = core.driver().event().cloned();
    let event = event.ok_or_else(|| io::Error::other("a core needs an event to be woken by"))?;
    let completions = core.driver().queue().event_fd();
    monoio::spawn(hear(core.clone(), event.as_fd().try_clone_to_owned()?)?);
    if let Some(completions) = completions {
        monoio::spawn(hear(core.clone(), duplicate(completions)?)?);
    }
    for listener in listeners {
        match listener {
            Listener::Unix(listener) => {
                let listener = UnixListener::from_std(listener)?;
                monoio::spawn(accept_unix(core.clone(), listener));
            }
            Listener::Tcp(listener) => {
                let listener = TcpListener::from_std(listener)?;
                monoio::spawn(accept_tcp(core.clone(), listener));
            }
        }
    }
    loop {
        let now = core.now();
        let next = core.turn(now);
        if core.driver().is_stopped() {
            return Ok(());
        }
        let at_once = next.is_some_and(|when| when <= now);
        if at_once || !core.driver().prepare_park() {
            // Everybody else has a turn first, sockets too. A task that wakes itself would get
            // ahead of them all, so this goes through the kernel.
            event.ring();
            core.work.wait().await;
            continue;
        }
        match next {
            Some(when) => {
                let span = Duration::from_nanos((when - now).0);
                let _ = monoio::time::timeout(span, core.work.wait()).await;
            }
            None => core.work.wait().await,
        }
        core.driver().awake();
    }
}

/// Wakes the loop whenever the eventfd is written.
fn hear<Q: BlockQueue + 'static>(
    core: Rc<Core<Q>>,
    event: OwnedFd,
) -> io::Result<impl Future<Output = ()> + 'static> {
    // The ring waits only for a descriptor that may block; otherwise the read would fail at once.
    // Nobody else reads it.
    fcntl_setfl(&event, fcntl_getfl(&event)? - OFlags::NONBLOCK)?;
    let event = monoio::fs::File::from_std(File::from(event))?;
    Ok(async move {
        let mut counter = vec![0; 8];
        loop {
            let (result, buffer) = event.read_at(counter, 0).await;
            counter = buffer;
            if let Err(error) = result
                && error.kind() != io::ErrorKind::Interrupted
            {
                log::error!("completions and mail can no longer be waited for: {error}");
                std::process::abort();
            }
            core.work.notify();
        }
    })
}

async fn accept_unix<Q: BlockQueue + 'static>(core: Rc<Core<Q>>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(monoio::spawn(serve(core.clone(), stream))),
            Err(error) => {
                log::warn!("could not accept a connection: {error}");
                monoio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

async fn accept_tcp<Q: BlockQueue + 'static>(core: Rc<Core<Q>>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // Small replies go out at once; a client that vanished is noticed in the end.
                let tuned = stream.set_nodelay(true).and_then(|()| {
                    let seconds = Some(Duration::from_secs(60));
                    stream.set_tcp_keepalive(seconds, Some(Duration::from_secs(10)), Some(6))
                });
                if let Err(error) = tuned {
                    log::debug!("{peer}: {error}");
                }
                drop(monoio::spawn(serve(core.clone(), stream)));
            }
            Err(error) => {
                log::warn!("could not accept a connection: {error}");
                monoio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// A second descriptor of an open file.
#[allow(unsafe_code)]
pub(crate) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: both callers hold the owner of the descriptor while this runs.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}
