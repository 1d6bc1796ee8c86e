//! The store as the control loop sees it: every request a task of the runtime.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::rc::Rc;

use bytes::Bytes;
use heeler_driver::control::{StoreAnswer, StoreIo, StoredObject, Token};
use heeler_store::{ErrorKind, PutPayload, Store, StoreError};
use tokio::sync::Notify;

/// Wakes the control loop.
pub(crate) type Wake = Rc<Notify>;

/// Requests to the store, and answers that have come. Wants a tokio `LocalSet`.
#[derive(Clone)]
pub(crate) struct Requests {
    store: Store,
    answers: Rc<RefCell<VecDeque<(Token, StoreAnswer)>>>,
    wake: Wake,
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Requests").field("answers", &self.answers.borrow().len()).finish()
    }
}

impl Requests {
    pub(crate) fn new(store: Store, wake: Wake) -> Self {
        Self { store, answers: Rc::default(), wake }
    }

    fn spawn(
        &self,
        token: Token,
        request: impl AsyncFnOnce(Store) -> Result<StoreAnswer, StoreError> + 'static,
    ) {
        let this = self.clone();
        drop(tokio::task::spawn_local(async move {
            let answer = request(this.store.clone()).await.unwrap_or_else(failed);
            this.answers.borrow_mut().push_back((token, answer));
            this.wake.notify_one();
        }));
    }
}

impl StoreIo for Requests {
    fn get(&mut self, token: Token, key: &str, range: Option<Range<u64>>) {
        let key = key.to_owned();
        self.spawn(token, async move |store| store.get(&key, range).await.map(StoreAnswer::Got));
    }

    fn put(&mut self, token: Token, key: &str, pieces: Vec<Bytes>, create: bool) {
        let key = key.to_owned();
        let payload = PutPayload::from_iter(pieces);
        self.spawn(token, async move |store| {
            store.put(&key, payload, create).await.map(|()| StoreAnswer::Done)
        });
    }

    fn delete(&mut self, token: Token, key: &str) {
        let key = key.to_owned();
        self.spawn(token, async move |store| store.delete(&key).await.map(|()| StoreAnswer::Done));
    }

    fn list(&mut self, token: Token, prefix: &str) {
        let prefix = prefix.to_owned();
        self.spawn(token, async move |store| {
            let entries = store.list(&prefix).await?;
            let objects = entries.into_iter();
            let objects = objects.map(|e| StoredObject { key: e.key, bytes: e.bytes });
            Ok(StoreAnswer::Listed(objects.collect()))
        });
    }

    fn poll(&mut self) -> Option<(Token, StoreAnswer)> {
        self.answers.borrow_mut().pop_front()
    }
}

fn failed(error: StoreError) -> StoreAnswer {
    let transient = match error.kind {
        ErrorKind::NotFound => return StoreAnswer::NotFound,
        ErrorKind::AlreadyExists => return StoreAnswer::AlreadyExists,
        // The store was fit when the server started, so somebody may put right what is wrong.
        ErrorKind::Transient | ErrorKind::Timeout | ErrorKind::Refused => true,
        ErrorKind::Permanent => false,
    };
    StoreAnswer::Failed { transient, text: error.text }
}
