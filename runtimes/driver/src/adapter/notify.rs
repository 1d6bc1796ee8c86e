//! A wake-up inside one thread.

use std::cell::Cell;
use std::fmt;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Wakes one waiting task. A call that comes while nobody waits is kept for the next wait.
#[derive(Default)]
pub(super) struct Notify {
    called: Cell<bool>,
    waker: Cell<Option<Waker>>,
}

impl Notify {
    pub(super) fn notify(&self) {
        self.called.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Returns once `notify` was called since the last return. One task waits at a time.
    pub(super) async fn wait(&self) {
        poll_fn(|context| {
            if self.called.take() {
                return Poll::Ready(());
            }
            self.waker.set(Some(context.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}

impl fmt::Debug for Notify {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notify").field("called", &self.called).finish_non_exhaustive()
    }
}
