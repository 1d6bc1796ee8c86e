//! What a core sends to other threads. A full mailbox holds nothing up: what does not fit waits
//! here, in order, and is tried again in every turn.

use std::collections::VecDeque;
use std::fmt;

use heeler_core::ids::CoreId;
use heeler_core::mailbox::Sender;

use crate::mail::{CoreMail, ToControl};
use crate::wires::Bell;

struct Outgoing<T> {
    sender: Sender<T>,
    bell: Bell,
    overflow: VecDeque<T>,
    /// Something was pushed since the bell was rung.
    pushed: bool,
}

impl<T: Send> Outgoing<T> {
    fn new((sender, bell): (Sender<T>, Bell)) -> Self {
        Self { sender, bell, overflow: VecDeque::new(), pushed: false }
    }

    fn send(&mut self, message: T) {
        if !self.overflow.is_empty() {
            return self.overflow.push_back(message);
        }
        match self.sender.push(message) {
            Ok(()) => self.pushed = true,
            Err(message) => self.overflow.push_back(message),
        }
    }

    /// Sends what waits and rings. True if nothing waits any more.
    fn flush(&mut self) -> bool {
        while let Some(message) = self.overflow.pop_front() {
            if let Err(message) = self.sender.push(message) {
                if self.sender.is_closed() {
                    // The process is ending; nobody will ever take it.
                    self.overflow.clear();
                } else {
                    self.overflow.push_front(message);
                }
                break;
            }
            self.pushed = true;
        }
        if std::mem::take(&mut self.pushed) {
            self.bell.ring();
        }
        self.overflow.is_empty()
    }
}

/// The outgoing mail of a core.
pub(crate) struct Post {
    cores: Vec<Option<Outgoing<CoreMail>>>,
    control: Outgoing<ToControl>,
    sent: u64,
}

impl Post {
    pub(crate) fn new(
        cores: Vec<Option<(Sender<CoreMail>, Bell)>>,
        control: (Sender<ToControl>, Bell),
    ) -> Self {
        let cores = cores.into_iter().map(|core| core.map(Outgoing::new)).collect();
        Self { cores, control: Outgoing::new(control), sent: 0 }
    }

    pub(crate) fn send_to_core(&mut self, core: CoreId, mail: CoreMail) {
        self.sent += 1;
        let outgoing = self.cores[usize::from(core.0)].as_mut();
        outgoing.expect("a core does not write to itself").send(mail);
    }

    pub(crate) fn send_to_control(&mut self, mail: ToControl) {
        self.control.send(mail);
    }

    /// Messages sent to other cores.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    /// Sends what waits and rings the bells. True if nothing waits any more.
    pub(crate) fn flush(&mut self) -> bool {
        let mut all = self.control.flush();
        for core in self.cores.iter_mut().flatten() {
            all &= core.flush();
        }
        all
    }
}

impl fmt::Debug for Post {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Post").field("sent", &self.sent).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wires::wire;
    use heeler_core::ids::{OpId, ShardId};

    fn release(slot: u32) -> CoreMail {
        CoreMail::Release { shard: ShardId(0), lease: OpId { slot, generation: 0 } }
    }

    #[test]
    fn a_full_mailbox_delays_and_keeps_the_order() {
        let (mut wires, _control) = wire(2, false).unwrap();
        let mut inbox = wires[1].from_cores[0].take().unwrap();
        let first = wires.remove(0);
        let mut post = Post::new(first.to_cores, first.to_control);
        (0..1000).for_each(|slot| post.send_to_core(CoreId(1), release(slot)));
        let mut got = 0;
        let mut rounds = 0;
        while got < 1000 {
            let sent_all = post.flush();
            rounds += 1;
            while let Ok(CoreMail::Release { lease, .. }) = inbox.pop() {
                assert_eq!(lease.slot, got);
                got += 1;
            }
            assert!(!sent_all || got == 1000);
        }
        assert!(rounds > 1, "it did not fit at once");
        assert!(post.flush());
        drop(inbox);
        (0..1000).for_each(|slot| post.send_to_core(CoreId(1), release(slot)));
        assert!(post.flush(), "what nobody takes is not kept");
    }
}
