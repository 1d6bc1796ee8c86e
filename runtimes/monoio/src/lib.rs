//! A data core on monoio (io_uring). The runtime owns the sockets, the timers and the sleep; all
//! that is done happens in the turns of the driver's loop.
//!
//! System calls are what a request costs most, and that shapes this crate. The eventfds of the
//! block queue and of the mailboxes are waited for by reads in the ring, without asking first
//! whether they are readable. Replies are sent at once, and only what a socket does not take is
//! left to a task. And since monoio 0.2 enters the kernel after every step of its main future that
//! wakes a task, the loop is a task too. One that wakes itself runs again before sockets are looked
//! at, so the loop never does: to go on at once it writes its own eventfd.
#![deny(unsafe_code, missing_docs)]

mod connection;
mod core;
mod notify;

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::rc::Rc;

use heeler_driver::CoreLoop;
use heeler_hw::BlockQueue;
use heeler_hw::topology::pin_to_cpu;
use monoio::{IoUringDriver, RuntimeBuilder};

/// Entries of the runtime's ring.
const RING_ENTRIES: u32 = 1024;

/// Where clients come in. Every core accepts from a duplicate of its own, and the kernel shares
/// the connections out.
#[derive(Debug)]
pub enum Listener {
    /// A Unix socket.
    Unix(UnixListener),
    /// A TCP port.
    Tcp(TcpListener),
}

impl Listener {
    /// A duplicate, for another core.
    ///
    /// # Errors
    ///
    /// The process has too many open files.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(listener) => Self::Unix(listener.try_clone()?),
            Self::Tcp(listener) => Self::Tcp(listener.try_clone()?),
        })
    }
}

/// Why a core did not run, or ended before it was told to.
#[derive(Debug)]
pub enum RunError<E> {
    /// The thread could not be bound to this processor.
    Pin(u32, io::Error),
    /// The runtime could not be set up.
    Runtime(io::Error),
    /// The loop could not be built.
    Build(E),
}

impl<E: fmt::Display> fmt::Display for RunError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pin(cpu, error) => {
                write!(f, "could not bind a thread to processor {cpu}: {error}")
            }
            Self::Runtime(error) => write!(f, "could not set up io_uring for sockets: {error}"),
            Self::Build(error) => error.fmt(f),
        }
    }
}

impl<E: std::error::Error + 'static> std::error::Error for RunError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Pin(_, error) | Self::Runtime(error) => Some(error),
            Self::Build(error) => Some(error),
        }
    }
}

/// Runs a data core on the calling thread, bound to `cpu`, until the control thread says stop.
/// `build` is called on that thread: shards and queues never leave the thread that made them. They
/// live as long as the process, so their storage can be leaked.
///
/// # Errors
///
/// [`RunError`].
pub fn run_core<Q, E>(
    cpu: Option<u32>,
    listeners: Vec<Listener>,
    build: impl FnOnce() -> Result<CoreLoop<'static, Q>, E>,
) -> Result<(), RunError<E>>
where
    Q: BlockQueue + 'static,
{
    if let Some(cpu) = cpu {
        pin_to_cpu(cpu).map_err(|error| RunError::Pin(cpu, error))?;
    }
    let driver = build().map_err(RunError::Build)?;
    let mut runtime = RuntimeBuilder::<IoUringDriver>::new()
        .with_entries(RING_ENTRIES)
        .enable_timer()
        .build()
        .map_err(RunError::Runtime)?;
    let core = Rc::new(core::Core::new(driver));
    let run = async move { monoio::spawn(core::run(core, listeners)).await };
    runtime.block_on(run).map_err(RunError::Runtime)
}
