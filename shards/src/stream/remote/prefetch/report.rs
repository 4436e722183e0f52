//! Reports of the prefetcher: counters, and notices to the user.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::format::Cause;
use crate::stats::{WaitCounter, Waits};

/// Counters of fetching, and of the readers' waiting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteSnapshot {
    /// Bytes received.
    pub bytes: u64,
    /// Shards fetched completely.
    pub shards: u64,
    /// Failed attempts.
    pub failures: u64,
    /// Nanoseconds that threads spent fetching, added up.
    pub fetch_nanos: u64,
    /// Waits of readers for a shard that was not there yet.
    pub waits: Waits,
}

impl RemoteSnapshot {
    /// What was counted since an earlier snapshot.
    pub fn since(&self, earlier: &RemoteSnapshot) -> RemoteSnapshot {
        RemoteSnapshot {
            bytes: self.bytes - earlier.bytes,
            shards: self.shards - earlier.shards,
            failures: self.failures - earlier.failures,
            fetch_nanos: self.fetch_nanos - earlier.fetch_nanos,
            waits: self.waits.since(&earlier.waits),
        }
    }
}

/// The counters behind a [`RemoteSnapshot`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) bytes: AtomicU64,
    pub(super) shards: AtomicU64,
    pub(super) failures: AtomicU64,
    pub(super) fetch_nanos: AtomicU64,
    pub(super) waits: WaitCounter,
}

impl Counters {
    /// The counters at this moment.
    pub(super) fn snapshot(&self) -> RemoteSnapshot {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut waits = Waits::default();
        self.waits.add_to(&mut waits);
        RemoteSnapshot {
            bytes: of(&self.bytes),
            shards: of(&self.shards),
            failures: of(&self.failures),
            fetch_nanos: of(&self.fetch_nanos),
            waits,
        }
    }
}

/// Notices for the user about failing downloads: from the second failed attempt on, and over all shards
/// at most one every [`NOTICE_EVERY`].
#[derive(Debug)]
pub(super) struct Notices {
    tell: Option<fn(&str)>,
    last: Mutex<Option<Instant>>,
}

/// Least time between two notices.
const NOTICE_EVERY: Duration = Duration::from_secs(30);

impl Notices {
    pub(super) fn new(tell: Option<fn(&str)>) -> Notices {
        Notices { tell, last: Mutex::new(None) }
    }

    pub(super) fn failed(&self, url: &str, attempts: u32, cause: &Cause) {
        let Some(tell) = self.tell.filter(|_| attempts >= 2) else { return };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() >= NOTICE_EVERY) {
            *last = Some(Instant::now());
            tell(&format!("{url}: {attempts} attempts failed, trying again: {cause}"));
        }
    }
}
