//! One client's socket: a task that receives, and one that sends what the socket does not take at
//! once. All they know is buffers.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use heeler_hw::BlockQueue;
use rustix::net::{SendFlags, Shutdown};

use super::Runtime;
use super::core::Core;
use super::notify::Notify;
use crate::{ConnId, CoreLoop};

/// What the tasks of one connection share.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: ConnId,
    pub(super) reader: Notify,
    pub(super) writer: Notify,
    closed: Cell<bool>,
    /// A transmit buffer that the socket did not take at once, for the task that sends, and how
    /// much of it was sent.
    rest: RefCell<Option<(Vec<u8>, usize)>>,
    /// The socket once more, to send at once, and to shut it down while the tasks wait for it.
    socket: OwnedFd,
}

impl Link {
    /// Sends what there is, as far as the socket takes it at once. True if all of it went out, and
    /// there is room for more.
    pub(super) fn send_at_once<Q: BlockQueue>(&self, driver: &mut CoreLoop<'static, Q>) -> bool {
        // There is none while the task sends: the other buffer is not handed back before.
        let Some(buffer) = driver.take_tx(self.id) else { return false };
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // An error comes again when the task sends, and ends the connection there.
        let sent = rustix::net::send(&self.socket, &buffer, flags).unwrap_or(0);
        if sent == buffer.len() {
            driver.give_tx(self.id, buffer);
            return true;
        }
        *self.rest.borrow_mut() = Some((buffer, sent));
        self.writer.notify();
        false
    }
}

/// Serves a connection that was accepted, until it is closed.
pub(super) async fn serve<R: Runtime, Q: BlockQueue + 'static>(core: Rc<Core<Q>>, stream: OwnedFd) {
    let socket = stream.try_clone();
    let (socket, (receiver, sender)) =
        match socket.and_then(|socket| Ok((socket, R::connect(stream)?))) {
            Ok(both) => both,
            Err(error) => return log::warn!("a connection was dropped: {error}"),
        };
    let id = match core.driver().open() {
        Ok(id) => id,
        Err(error) => return log::warn!("a connection was refused: {error}"),
    };
    let link = Rc::new(Link {
        id,
        reader: Notify::default(),
        writer: Notify::default(),
        closed: Cell::new(false),
        rest: RefCell::new(None),
        socket,
    });
    core.links.borrow_mut()[id.index()] = Some(link.clone());
    R::spawn(receive::<R, Q>(core.clone(), link.clone(), receiver));
    send::<R, Q>(core, link, sender).await;
}

/// Fills the receive buffer whenever the loop wants bytes.
async fn receive<R: Runtime, Q: BlockQueue + 'static>(
    core: Rc<Core<Q>>,
    link: Rc<Link>,
    mut receiver: R::Receiver,
) {
    while !link.closed.get() {
        let wanted = core.driver().take_rx(link.id);
        let Some(buffer) = wanted else {
            link.reader.wait().await;
            continue;
        };
        let (result, buffer) = R::receive(&mut receiver, buffer).await;
        core.driver().give_rx(link.id, buffer);
        core.work.notify();
        if !matches!(result, Ok(1..)) {
            return;
        }
    }
}

/// Sends the transmit buffer whenever there is something in it, and closes at the end.
async fn send<R: Runtime, Q: BlockQueue + 'static>(
    core: Rc<Core<Q>>,
    link: Rc<Link>,
    mut sender: R::Sender,
) {
    loop {
        let rest = link.rest.take();
        let next = rest.or_else(|| core.driver().take_tx(link.id).map(|buffer| (buffer, 0)));
        match next {
            Some((buffer, sent)) => {
                let (result, buffer) = R::send(&mut sender, buffer, sent).await;
                if result.is_err() {
                    break;
                }
                core.driver().give_tx(link.id, buffer);
                core.work.notify();
            }
            None if core.driver().wants_close(link.id) => break,
            None => link.writer.wait().await,
        }
    }
    link.closed.set(true);
    core.driver().close(link.id);
    core.links.borrow_mut()[link.id.index()] = None;
    // Ends a receive that is under way. The client may have gone before.
    let _ = rustix::net::shutdown(&link.socket, Shutdown::Both);
    link.reader.notify();
    core.work.notify();
}
