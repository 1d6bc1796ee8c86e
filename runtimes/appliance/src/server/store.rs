//! The store as the server sees it: fit or not, in trouble or not.

use std::time::Duration;

use heeler_store::volumes::{self, Info, Listed, VolumeError};
use heeler_store::{ErrorKind, Fencing, StoreError, Unusable, format};
use tokio::time::timeout;

use super::Server;
use crate::api::StoreInfo;

/// How long an answer waits for the store, if the server knows something without it.
const PATIENCE: Duration = Duration::from_secs(3);

impl Server {
    /// Makes sure that the store is fit and the prefix is ours, once.
    pub(crate) async fn prepare_store(&self) -> Result<(), Unusable> {
        if self.fencing.borrow().is_some() {
            return Ok(());
        }
        let fencing = format::prepare(&self.store).await?;
        match &fencing {
            Fencing::Off(what) => log::warn!(
                "fencing is off: {what}. Nothing keeps a second server from these volumes, and \
                 two would destroy them"
            ),
            Fencing::On if self.store.config().single_writer_unsafe => log::warn!(
                "--single-writer-unsafe is not needed: this store keeps a second writer out"
            ),
            Fencing::On => {}
        }
        *self.fencing.borrow_mut() = Some(fencing);
        Ok(())
    }

    /// The volumes of the store, if it answers soon.
    pub(super) async fn stored_volumes(&self) -> Result<Vec<Listed>, StoreError> {
        timeout(PATIENCE, volumes::list(&self.store)).await.unwrap_or_else(|_| Err(late()))
    }

    /// What the store holds of a volume, if it answers soon.
    pub(super) async fn stored_info(&self, name: &str) -> Result<Info, VolumeError> {
        let info = timeout(PATIENCE, volumes::info(&self.store, name)).await;
        info.unwrap_or_else(|_| Err(late().into()))
    }

    /// What was asked of the store, and how it keeps up.
    pub(super) fn store_info(&self) -> StoreInfo {
        let counters = self.store.counters();
        let lanes = self.control.borrow().lanes();
        let away = |since| (self.now() - since).0 / 1_000_000_000;
        let trouble = self.store.trouble();
        StoreInfo {
            url: self.facts.store_url.clone(),
            fencing: match &*self.fencing.borrow() {
                None => "not known yet".into(),
                Some(Fencing::On) => "on".into(),
                Some(Fencing::Off(what)) => format!("off: {what}"),
            },
            failing_seconds: trouble.as_ref().map(|trouble| trouble.since.elapsed().as_secs()),
            failure: trouble.map(|trouble| trouble.text),
            gets: counters.gets,
            get_bytes: counters.get_bytes,
            puts: counters.puts,
            put_bytes: counters.put_bytes,
            deletes: counters.deletes,
            lists: counters.lists,
            retries: counters.retries,
            failures: counters.failures,
            puts_max: lanes.window,
            puts_now: lanes.puts,
            waiting: lanes.waiting,
            away_seconds: lanes.away.as_ref().map(|found| away(found.since)),
            away_reason: lanes.away.map(|away| away.reason),
        }
    }
}

fn late() -> StoreError {
    StoreError::new(ErrorKind::Transient, format!("the store did not answer in {PATIENCE:?}"))
}
