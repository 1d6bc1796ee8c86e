//! A data core on monoio (io_uring).
//!
//! The eventfds of the block queue and of the mailboxes are waited for by reads in the ring,
//! without asking first whether they are readable. And since monoio 0.2 enters the kernel after
//! every step of its main future that wakes a task, the loop is a task too.
#![deny(unsafe_code, missing_docs)]

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use heeler_driver::CoreLoop;
use heeler_driver::adapter::{self, Listener, RunError, Runtime};
use heeler_hw::BlockQueue;
use monoio::buf::{IoBuf, IoBufMut};
use monoio::io::{AsyncReadRent, AsyncWriteRentExt, OwnedReadHalf, OwnedWriteHalf, Splitable};
use monoio::net::{TcpListener, UnixListener, UnixStream};
use monoio::{IoUringDriver, RuntimeBuilder};

/// Entries of the runtime's ring.
const RING_ENTRIES: u32 = 1024;

/// monoio.
#[derive(Debug)]
struct Monoio;

/// monoio's listeners.
enum Accepting {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// An eventfd, and what is read from it.
struct Signal {
    event: monoio::fs::File,
    counter: Vec<u8>,
}

impl Runtime for Monoio {
    type Listener = Accepting;
    type Receiver = OwnedReadHalf<UnixStream>;
    type Sender = OwnedWriteHalf<UnixStream>;
    type Signal = Signal;

    fn spawn(task: impl Future<Output = ()> + 'static) {
        drop(monoio::spawn(task));
    }

    async fn sleep(span: Duration) {
        monoio::time::sleep(span).await;
    }

    fn listen(listener: Listener) -> io::Result<Accepting> {
        Ok(match listener {
            Listener::Unix(listener) => Accepting::Unix(UnixListener::from_std(listener)?),
            Listener::Tcp(listener) => Accepting::Tcp(TcpListener::from_std(listener)?),
        })
    }

    async fn accept(listener: &Accepting) -> io::Result<OwnedFd> {
        let fd = match listener {
            Accepting::Unix(listener) => listener.accept().await?.0.into_raw_fd(),
            Accepting::Tcp(listener) => listener.accept().await?.0.into_raw_fd(),
        };
        Ok(owned(fd))
    }

    fn connect(socket: OwnedFd) -> io::Result<(Self::Receiver, Self::Sender)> {
        // To a byte stream it is all the same what carries it.
        Ok(UnixStream::from_std(StdStream::from(socket))?.into_split())
    }

    async fn receive(
        receiver: &mut Self::Receiver,
        buffer: Vec<u8>,
    ) -> (io::Result<usize>, Vec<u8>) {
        let (filled, capacity) = (buffer.len(), buffer.capacity());
        let (result, slice) = receiver.read(buffer.slice_mut(filled..capacity)).await;
        (result, slice.into_inner())
    }

    async fn send(
        sender: &mut Self::Sender,
        buffer: Vec<u8>,
        from: usize,
    ) -> (io::Result<()>, Vec<u8>) {
        let (result, slice) = sender.write_all(buffer.slice(from..)).await;
        (result.map(drop), slice.into_inner())
    }

    fn signal(event: OwnedFd) -> io::Result<Signal> {
        let event = monoio::fs::File::from_std(File::from(event))?;
        Ok(Signal { event, counter: vec![0; 8] })
    }

    async fn wait(signal: &mut Signal) -> io::Result<()> {
        let (result, counter) = signal.event.read_at(std::mem::take(&mut signal.counter), 0).await;
        signal.counter = counter;
        result.map(drop)
    }
}

/// Runs a data core on the calling thread, bound to `cpu`, until the control thread says stop.
/// `build` is called on that thread.
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
    let driver = adapter::build(cpu, build)?;
    let mut runtime = RuntimeBuilder::<IoUringDriver>::new()
        .with_entries(RING_ENTRIES)
        .enable_timer()
        .build()
        .map_err(RunError::Runtime)?;
    let run = async move { monoio::spawn(adapter::run::<Monoio, Q>(driver, listeners)).await };
    runtime.block_on(run).map_err(RunError::Runtime)
}

#[allow(unsafe_code)]
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the stream that it was taken out of gave it up.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
