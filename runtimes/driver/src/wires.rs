//! The mailboxes and doorbells between the threads of one appliance: every pair of data cores has
//! one mailbox in each direction, and so has every data core with the control thread.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use heeler_core::ids::CoreId;
use heeler_core::mailbox::{Doorbell, Parker, Receiver, Sender, doorbell, mailbox};
use rustix::event::{EventfdFlags, eventfd};

use crate::mail::{CoreMail, FromControl, ToControl};

/// Messages that one mailbox between threads holds. What does not fit waits at the sender.
const MAILBOX_MESSAGES: usize = 256;

/// An eventfd on which a sleeping thread waits.
pub struct Event(OwnedFd);

impl Event {
    /// A new one; reading it does not block.
    ///
    /// # Errors
    ///
    /// The process has too many open files.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes it readable.
    pub fn ring(&self) {
        // The only error is a full counter, and that is readable too. (The kernel wants the
        // machine's byte order; any number but 0 does.)
        let _ = rustix::io::write(&self.0, &1u64.to_le_bytes());
    }

    /// Makes it unreadable until the next ring.
    pub fn clear(&self) {
        // The only error is that nobody rang.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Event").field(&self.0).finish()
    }
}

/// Wakes one thread, if it sleeps.
#[derive(Clone, Debug)]
pub struct Bell {
    doorbell: Doorbell,
    event: Option<Arc<Event>>,
}

impl Bell {
    /// To be called after the messages that the thread must see have been pushed.
    pub fn ring(&self) {
        if self.doorbell.must_ring()
            && let Some(event) = &self.event
        {
            event.ring();
        }
    }
}

/// The ends of a data core.
#[derive(Debug)]
pub struct CoreWires {
    /// The core.
    pub core: CoreId,
    /// By the other core's number; `None` at the core's own.
    pub to_cores: Vec<Option<(Sender<CoreMail>, Bell)>>,
    /// By the other core's number; `None` at the core's own.
    pub from_cores: Vec<Option<Receiver<CoreMail>>>,
    /// To the control thread.
    pub to_control: (Sender<ToControl>, Bell),
    /// From the control thread.
    pub from_control: Receiver<FromControl>,
    /// The core's own side of its bell.
    pub parker: Parker,
    /// What its bell rings.
    pub event: Option<Arc<Event>>,
}

/// The control thread's ends to one data core.
#[derive(Debug)]
pub struct ControlLink {
    /// To the core.
    pub to_core: (Sender<FromControl>, Bell),
    /// From the core.
    pub from_core: Receiver<ToControl>,
}

/// The ends of the control thread.
#[derive(Debug)]
pub struct ControlWires {
    /// By the core's number.
    pub links: Vec<ControlLink>,
    /// The thread's own side of its bell.
    pub parker: Parker,
    /// What its bell rings.
    pub event: Option<Arc<Event>>,
}

/// Makes the wires of an appliance with `cores` data cores. With `events` the bells have eventfds;
/// a simulation, which steps the cores itself, needs none.
///
/// # Errors
///
/// The process has too many open files.
pub fn wire(cores: usize, events: bool) -> io::Result<(Vec<CoreWires>, ControlWires)> {
    let new_bell = || -> io::Result<(Bell, Parker)> {
        let event = if events { Some(Arc::new(Event::new()?)) } else { None };
        let (doorbell, parker) = doorbell();
        Ok((Bell { doorbell, event }, parker))
    };
    let (control_bell, control_parker) = new_bell()?;
    let mut links = Vec::with_capacity(cores);
    let mut wires: Vec<CoreWires> = Vec::with_capacity(cores);
    let mut bells = Vec::with_capacity(cores);
    for core in 0..cores {
        let (bell, parker) = new_bell()?;
        let (to_control, from_core) = mailbox(MAILBOX_MESSAGES);
        let (to_core, from_control) = mailbox(MAILBOX_MESSAGES);
        links.push(ControlLink { to_core: (to_core, bell.clone()), from_core });
        wires.push(CoreWires {
            core: CoreId(core as u16),
            to_cores: (0..cores).map(|_| None).collect(),
            from_cores: (0..cores).map(|_| None).collect(),
            to_control: (to_control, control_bell.clone()),
            from_control,
            parker,
            event: bell.event.clone(),
        });
        bells.push(bell);
    }
    for from in 0..cores {
        for to in (0..cores).filter(|to| *to != from) {
            let (tx, rx) = mailbox(MAILBOX_MESSAGES);
            wires[from].to_cores[to] = Some((tx, bells[to].clone()));
            wires[to].from_cores[from] = Some(rx);
        }
    }
    let control = ControlWires { links, parker: control_parker, event: control_bell.event.clone() };
    Ok((wires, control))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_wakes_the_core_it_is_for() {
        let (mut wires, mut control) = wire(3, true).unwrap();
        assert!(wires[1].parker.prepare_park(|| false));
        let (to_core, bell) = &mut control.links[1].to_core;
        to_core.push(FromControl::Report { ticket: 7 }).unwrap();
        bell.ring();
        let mut number = [0; 8];
        for (core, wires) in wires.iter().enumerate() {
            let event = wires.event.as_ref().unwrap();
            assert_eq!(rustix::io::read(event, &mut number).is_ok(), core == 1, "core {core}");
        }
        assert!(matches!(wires[1].from_control.pop(), Ok(FromControl::Report { ticket: 7 })));
    }

    #[test]
    fn every_pair_of_cores_is_joined() {
        let (mut wires, _control) = wire(3, false).unwrap();
        for from in 0..3 {
            for to in (0..3).filter(|to| *to != from) {
                let lease = heeler_core::ids::OpId { slot: from as u32, generation: to as u32 };
                let shard = heeler_core::ids::ShardId(0);
                let (tx, _) = wires[from].to_cores[to].as_mut().unwrap();
                tx.push(CoreMail::Release { shard, lease }).unwrap();
                let got = wires[to].from_cores[from].as_mut().unwrap().pop();
                assert!(matches!(got, Ok(CoreMail::Release { lease: l, .. }) if l == lease));
            }
        }
    }
}
