//! A backend that misbehaves, for tests: what a seed says fails, hangs, or succeeds without
//! saying so.

use std::ops::Range;
use std::sync::Mutex;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use object_store::PutPayload;

use crate::backend::Remote;
use crate::{Backend, Entry, ErrorKind, Place, StoreConfig, StoreError};

/// How often requests go wrong, each of 1000.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rates {
    /// Fails with `Transient` before it has any effect.
    pub refused: u32,
    /// Never answers and has no effect.
    pub hangs: u32,
    /// Takes effect, but the answer is lost: `Timeout` for a create, else `Transient`.
    pub lost: u32,
    /// Takes effect and never answers.
    pub hangs_after: u32,
}

/// What happens to one request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// As [`Rates::refused`].
    Refused,
    /// As [`Rates::hangs`].
    Hangs,
    /// As [`Rates::lost`].
    Lost,
    /// As [`Rates::hangs_after`].
    HangsAfter,
}

/// A backend around another one, which stays healthy.
#[derive(Debug)]
pub struct Faulty {
    inner: Box<dyn Backend>,
    plan: Mutex<Plan>,
}

#[derive(Debug)]
struct Plan {
    rates: Rates,
    random: u64,
    /// Faults of the next requests, first one last; they come before the random ones.
    next: Vec<Option<Fault>>,
}

impl Faulty {
    /// A faulty store in memory. The same seed and the same requests give the same faults.
    #[must_use]
    pub fn memory(seed: u64, rates: Rates) -> Self {
        let memory = Remote::open(&StoreConfig::new(Place::Memory)).expect("memory always opens");
        Self::around(Box::new(memory), seed, rates)
    }

    /// Faults in front of `inner`.
    #[must_use]
    pub fn around(inner: Box<dyn Backend>, seed: u64, rates: Rates) -> Self {
        let sum = rates.refused + rates.hangs + rates.lost + rates.hangs_after;
        assert!(sum <= 1000, "more faults than requests");
        // Never zero, and far from zero for the small seeds that people choose.
        let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 63;
        Self { inner, plan: Mutex::new(Plan { rates, random, next: Vec::new() }) }
    }

    /// The same, with these faults (`None`: none) for the first requests.
    #[must_use]
    pub fn first(self, mut faults: Vec<Option<Fault>>) -> Self {
        faults.reverse();
        self.plan.lock().expect("no panic holds it").next = faults;
        self
    }

    fn draw(&self) -> Option<Fault> {
        self.plan.lock().expect("no panic holds it").draw()
    }

    /// Carries `request` out, or not, as the next fault says.
    async fn spoil<T>(
        &self,
        create: bool,
        request: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let fault = self.draw();
        match fault {
            None => request.await,
            Some(Fault::Refused) => Err(StoreError::new(ErrorKind::Transient, "injected: refused")),
            Some(Fault::Hangs) => std::future::pending().await,
            Some(Fault::Lost) => {
                // A request that fails by itself loses only its failure.
                request.await?;
                let kind = if create { ErrorKind::Timeout } else { ErrorKind::Transient };
                Err(StoreError::new(kind, "injected: the answer is lost"))
            }
            Some(Fault::HangsAfter) => {
                request.await?;
                std::future::pending().await
            }
        }
    }
}

impl Plan {
    fn draw(&mut self) -> Option<Fault> {
        if let Some(fault) = self.next.pop() {
            return fault;
        }
        // Xorshift (Marsaglia 2003).
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let mut draw = (self.random >> 32) as u32 % 1000;
        let Rates { refused, hangs, lost, hangs_after } = self.rates;
        for (rate, fault) in [
            (refused, Fault::Refused),
            (hangs, Fault::Hangs),
            (lost, Fault::Lost),
            (hangs_after, Fault::HangsAfter),
        ] {
            if draw < rate {
                return Some(fault);
            }
            draw -= rate;
        }
        None
    }
}

impl Backend for Faulty {
    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
    ) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        Box::pin(self.spoil(false, self.inner.get(key, range)))
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        payload: PutPayload,
        create: bool,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(self.spoil(create, self.inner.put(key, payload, create)))
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(self.spoil(false, self.inner.delete(key)))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<Entry>, StoreError>> {
        Box::pin(self.spoil(false, self.inner.list(prefix)))
    }
}
