//! What every runtime does alike: the tasks of a core and of its connections, over the few things
//! that a runtime does in its own way. A runtime is an implementation of [`Runtime`] and a
//! `run_core`.
//!
//! System calls are what a request costs most, and that shapes this module. Replies are sent at
//! once, and only what a socket does not take is left to a task. Of tasks that are ready again and
//! again, not every runtime looks at sockets in between, so the loop never wakes itself: to go on
//! at once it writes its own eventfd, and the wake-up comes through the kernel.

mod connection;
mod core;
mod listener;
mod notify;

use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use heeler_hw::BlockQueue;
use heeler_hw::topology::pin_to_cpu;

pub use listener::Listener;

use crate::CoreLoop;

/// A runtime of one thread: sockets, timers and sleep. All its tasks run on the thread that spawned
/// them.
pub trait Runtime: 'static {
    /// A socket to accept from.
    type Listener: 'static;
    /// The side of a connection that receives.
    type Receiver: 'static;
    /// The side of a connection that sends.
    type Sender: 'static;
    /// An eventfd to wait for.
    type Signal: 'static;

    /// Runs a task beside the others.
    fn spawn(task: impl Future<Output = ()> + 'static);

    /// Waits for so long. Dropping it ends the wait.
    fn sleep(span: Duration) -> impl Future<Output = ()>;

    /// Takes a listener over.
    ///
    /// # Errors
    ///
    /// The operating system's.
    fn listen(listener: Listener) -> io::Result<Self::Listener>;

    /// The next client.
    ///
    /// # Errors
    ///
    /// The operating system's; it can be tried again later.
    fn accept(listener: &Self::Listener) -> impl Future<Output = io::Result<OwnedFd>>;

    /// Takes a stream socket over.
    ///
    /// # Errors
    ///
    /// The operating system's.
    fn connect(socket: OwnedFd) -> io::Result<(Self::Receiver, Self::Sender)>;

    /// Receives what there is, waiting for it if there is nothing, and appends it to the buffer
    /// without making that larger. 0 bytes are the end of the stream.
    fn receive(
        receiver: &mut Self::Receiver,
        buffer: Vec<u8>,
    ) -> impl Future<Output = (io::Result<usize>, Vec<u8>)>;

    /// Sends all of the buffer from this byte on.
    fn send(
        sender: &mut Self::Sender,
        buffer: Vec<u8>,
        from: usize,
    ) -> impl Future<Output = (io::Result<()>, Vec<u8>)>;

    /// Takes an eventfd over. It blocks: it was made to.
    ///
    /// # Errors
    ///
    /// The operating system's.
    fn signal(event: OwnedFd) -> io::Result<Self::Signal>;

    /// Waits until the eventfd is written, and resets it.
    ///
    /// # Errors
    ///
    /// The operating system's.
    fn wait(signal: &mut Self::Signal) -> impl Future<Output = io::Result<()>>;
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

/// Binds the thread to `cpu` and builds the loop there: shards and queues never leave the thread
/// that made them. They live as long as the process, so their storage can be leaked.
///
/// # Errors
///
/// [`RunError`].
pub fn build<Q, E>(
    cpu: Option<u32>,
    build: impl FnOnce() -> Result<CoreLoop<'static, Q>, E>,
) -> Result<CoreLoop<'static, Q>, RunError<E>> {
    if let Some(cpu) = cpu {
        pin_to_cpu(cpu).map_err(|error| RunError::Pin(cpu, error))?;
    }
    build().map_err(RunError::Build)
}

/// What a runtime runs first: turns the loop and serves the listeners until the control thread says
/// stop.
///
/// # Errors
///
/// A listener or an eventfd could not be taken over.
pub async fn run<R: Runtime, Q: BlockQueue + 'static>(
    driver: CoreLoop<'static, Q>,
    listeners: Vec<Listener>,
) -> io::Result<()> {
    core::run::<R, Q>(Rc::new(core::Core::new(driver)), listeners).await
}
