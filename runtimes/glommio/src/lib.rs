//! A data core on glommio (io_uring).
//!
//! What glommio does with sockets is to try the system call first and to wait in its ring when the
//! socket has nothing. Its own files are not used: it does not know raw devices and misjudges
//! whether a device can be polled. The block queue has a ring of its own, and glommio waits for
//! that ring's eventfd.
#![deny(unsafe_code, missing_docs)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use futures_lite::AsyncWriteExt;
use glommio::io::BufferedFile;
use glommio::net::{TcpListener, TcpStream};
use glommio::{GlommioError, LocalExecutorBuilder, Placement};
use heeler_driver::CoreLoop;
use heeler_driver::adapter::{self, Listener, RunError, Runtime};
use heeler_hw::BlockQueue;
use rustix::buffer::spare_capacity;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{RecvFlags, recv};
use rustix::thread::{MembarrierCommand, membarrier};

/// Entries of each of the runtime's rings.
const RING_ENTRIES: usize = 256;
/// Bytes of buffers of the runtime's own, which only a look at what a socket has goes through.
const RUNTIME_BUFFERS: usize = 1 << 20;
/// After so long glommio takes the processor from tasks that are ready. It must not: its executor
/// takes a time that ran out before the first of them ran, as on a busy machine, for "none was
/// ready", and goes to sleep. All tasks here give way by themselves.
const TURN_MAX: Duration = Duration::from_secs(3600);
/// What glommio looks at to see whether the time ran out is whether anything came, and a cancelled
/// timer may come at the wrong moment too. So there always is a timer that ends such a sleep.
const SLEEP_MAX: Duration = Duration::from_millis(100);

/// glommio.
#[derive(Debug)]
struct Glommio;

impl Runtime for Glommio {
    type Listener = TcpListener;
    type Receiver = TcpStream;
    type Sender = TcpStream;
    type Signal = BufferedFile;

    fn spawn(task: impl Future<Output = ()> + 'static) {
        glommio::spawn_local(task).detach();
    }

    async fn sleep(span: Duration) {
        glommio::timer::sleep(span).await;
    }

    /// To accept, it is all the same what the socket is, and only a TCP listener can be taken over.
    fn listen(listener: Listener) -> io::Result<TcpListener> {
        let listener: OwnedFd = match listener {
            Listener::Unix(listener) => listener.into(),
            Listener::Tcp(listener) => listener.into(),
        };
        // For the time of an attempt to accept, glommio sets this and clears it again. The other
        // cores share it: one of them would find it cleared, and block.
        fcntl_setfl(&listener, fcntl_getfl(&listener)? | OFlags::NONBLOCK)?;
        Ok(own(listener))
    }

    async fn accept(listener: &TcpListener) -> io::Result<OwnedFd> {
        let stream = listener.accept().await.map_err(plain)?;
        borrow(&stream).try_clone_to_owned()
    }

    fn connect(socket: OwnedFd) -> io::Result<(TcpStream, TcpStream)> {
        Ok((own(socket.try_clone()?), own(socket)))
    }

    async fn receive(
        receiver: &mut TcpStream,
        mut buffer: Vec<u8>,
    ) -> (io::Result<usize>, Vec<u8>) {
        loop {
            match recv(borrow(receiver), spare_capacity(&mut buffer), RecvFlags::DONTWAIT) {
                Ok((count, _)) => return (Ok(count), buffer),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => return (Err(error.into()), buffer),
            }
            // Copies a byte, and leaves it where it is: there is no way just to wait.
            if let Err(error) = receiver.peek(&mut [0]).await {
                return (Err(plain(error)), buffer);
            }
        }
    }

    async fn send(
        sender: &mut TcpStream,
        buffer: Vec<u8>,
        from: usize,
    ) -> (io::Result<()>, Vec<u8>) {
        (sender.write_all(&buffer[from..]).await, buffer)
    }

    fn signal(event: OwnedFd) -> io::Result<BufferedFile> {
        Ok(own(event))
    }

    async fn wait(signal: &mut BufferedFile) -> io::Result<()> {
        signal.read_at(0, 8).await.map(drop).map_err(plain)
    }
}

/// What the operating system said.
fn plain(error: GlommioError<()>) -> io::Error {
    error.into()
}

/// Gives a descriptor to what closes it in the end.
#[allow(unsafe_code)]
fn own<T: FromRawFd>(fd: OwnedFd) -> T {
    // SAFETY: its owner gives it up here.
    unsafe { T::from_raw_fd(fd.into_raw_fd()) }
}

#[allow(unsafe_code)]
fn borrow(stream: &TcpStream) -> BorrowedFd<'_> {
    // SAFETY: the stream keeps it open, and is borrowed for as long.
    unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) }
}

/// To be called once, before there are threads: the first sleep of a process takes tens of
/// milliseconds otherwise, which it spends on telling all threads of the barriers it will use.
pub fn prepare() {
    if let Err(error) = membarrier(MembarrierCommand::RegisterPrivateExpedited) {
        log::debug!("memory barriers could not be announced: {error}");
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
    let executor = LocalExecutorBuilder::new(Placement::Unbound)
        .ring_depth(RING_ENTRIES)
        .io_memory(RUNTIME_BUFFERS)
        .preempt_timer(TURN_MAX)
        .make()
        .map_err(|error| RunError::Runtime(plain(error)))?;
    let run = async move {
        glommio::spawn_local(async {
            loop {
                glommio::timer::sleep(SLEEP_MAX).await;
            }
        })
        .detach();
        adapter::run::<Glommio, Q>(driver, listeners).await
    };
    executor.run(run).map_err(RunError::Runtime)
}
