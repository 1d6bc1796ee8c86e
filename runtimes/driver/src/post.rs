//! What a core sends to other threads. A full mailbox holds nothing up: what does not fit waits
//! here, in order, and is tried again in every turn.

use std::collections::VecDeque;
use std::fmt;

use heeler_core::ids::CoreId;
use heeler_core::mailbox::Sender;
use heeler_core::time::{Duration, Instant};

use crate::mail::{CoreMail, ToControl};
use crate::wires::Bell;

/// How long to wait when a mailbox is full: nothing says when it no longer is.
const FULL_FOR: Duration = Duration::from_millis(1);
/// Messages that a thread is not woken for at most, and how long they lie there at most. A wake-up
/// costs both sides a system call, and mostly a message comes soon that is worth it.
const SILENT_MAX: u32 = 16;
const SILENT_FOR: Duration = Duration::from_millis(1);

struct Outgoing<T> {
    sender: Sender<T>,
    bell: Bell,
    overflow: VecDeque<T>,
    /// The bell must be rung for something that was pushed.
    urgent: bool,
    /// Messages pushed since the bell was rung that do not ask for it.
    silent: u32,
    /// When it is rung for those all the same.
    due: Option<Instant>,
}

impl<T: Send> Outgoing<T> {
    fn new((sender, bell): (Sender<T>, Bell)) -> Self {
        Self { sender, bell, overflow: VecDeque::new(), urgent: false, silent: 0, due: None }
    }

    fn send(&mut self, message: T) {
        self.urgent |= self.push(message);
    }

    fn send_silently(&mut self, message: T) {
        self.silent += u32::from(self.push(message));
    }

    /// False if it waits here: what waited is urgent when it goes.
    fn push(&mut self, message: T) -> bool {
        if !self.overflow.is_empty() {
            self.overflow.push_back(message);
            return false;
        }
        let pushed = self.sender.push(message);
        pushed.map_err(|message| self.overflow.push_back(message)).is_ok()
    }

    /// Sends what waits, and rings if it must. Returns when to call again at the latest.
    fn flush(&mut self, now: Instant) -> Option<Instant> {
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
            self.urgent = true;
        }
        if self.silent > 0 && self.due.is_none() {
            self.due = Some(now + SILENT_FOR);
        }
        let enough = self.silent >= SILENT_MAX || self.due.is_some_and(|due| due <= now);
        if self.urgent || enough {
            (self.urgent, self.silent, self.due) = (false, 0, None);
            self.bell.ring();
        }
        let again = (!self.overflow.is_empty()).then_some(now + FULL_FOR);
        again.into_iter().chain(self.due).min()
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
        self.outgoing(core).send(mail);
    }

    /// As [`Self::send_to_core`], but nobody waits for it: the other core is not woken for this
    /// alone, or not at once.
    pub(crate) fn send_silently(&mut self, core: CoreId, mail: CoreMail) {
        self.outgoing(core).send_silently(mail);
    }

    fn outgoing(&mut self, core: CoreId) -> &mut Outgoing<CoreMail> {
        self.sent += 1;
        let outgoing = self.cores[usize::from(core.0)].as_mut();
        outgoing.expect("a core does not write to itself")
    }

    pub(crate) fn send_to_control(&mut self, mail: ToControl) {
        self.control.send(mail);
    }

    /// As [`Self::send_to_control`], but nobody waits for it.
    pub(crate) fn tell_control(&mut self, mail: ToControl) {
        self.control.send_silently(mail);
    }

    /// Messages sent to other cores.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    /// Sends what waits and rings the bells. Returns when to call again at the latest.
    pub(crate) fn flush(&mut self, now: Instant) -> Option<Instant> {
        let mut again = self.control.flush(now);
        for core in self.cores.iter_mut().flatten() {
            again = again.into_iter().chain(core.flush(now)).min();
        }
        again
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

    const NOW: Instant = Instant(5_000_000);

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
            let sent_all = post.flush(NOW).is_none();
            rounds += 1;
            while let Ok(CoreMail::Release { lease, .. }) = inbox.pop() {
                assert_eq!(lease.slot, got);
                got += 1;
            }
            assert!(!sent_all || got == 1000);
        }
        assert!(rounds > 1, "it did not fit at once");
        assert_eq!(post.flush(NOW), None);
        drop(inbox);
        (0..1000).for_each(|slot| post.send_to_core(CoreId(1), release(slot)));
        assert_eq!(post.flush(NOW), None, "what nobody takes is not kept");
    }

    #[test]
    fn silent_mail_is_rung_for_with_the_next_or_soon() {
        let (mut wires, _control) = wire(2, true).unwrap();
        let mut other = wires.remove(1);
        let event = other.event.clone().unwrap();
        let mut rung = || {
            let rung = rustix::io::read(&event, &mut [0; 8]).is_ok();
            assert!(other.parker.prepare_park(|| false));
            rung
        };
        assert!(!rung());
        let first = wires.remove(0);
        let mut post = Post::new(first.to_cores, first.to_control);
        let (core, later) = (CoreId(1), NOW + Duration::from_micros(900));

        post.send_silently(core, release(0));
        assert_eq!(post.flush(NOW), Some(NOW + SILENT_FOR));
        post.send_silently(core, release(1));
        assert_eq!(post.flush(later), Some(NOW + SILENT_FOR), "the first one counts");
        assert!(!rung());
        assert_eq!(post.flush(NOW + SILENT_FOR), None);
        assert!(rung(), "its time had come");

        post.send_silently(core, release(2));
        post.send_to_core(core, release(3));
        assert_eq!(post.flush(NOW), None);
        assert!(rung(), "another message came");

        (0..SILENT_MAX).for_each(|slot| post.send_silently(core, release(slot)));
        assert_eq!(post.flush(NOW), None);
        assert!(rung(), "they are many");
    }
}
