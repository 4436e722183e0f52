//! What the main thread is doing, for the threads that beat and watch.

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Move;
use crate::shim::c10d::Member;

/// Time for the main thread to end by itself before the process is ended; longer while it saves.
pub(super) const GRACE: Duration = Duration::from_secs(10);

/// How long a rank waits for others.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Ranks that keep others waiting for longer are named.
    pub slow: Duration,
    /// Ranks that keep others waiting for longer end the run.
    pub timeout: Duration,
}

/// What the main thread is doing, for the thread that sends the beats.
#[derive(Clone, Copy, Debug)]
pub(super) struct Doing {
    pub(super) step: u64,
    pub(super) what: Move,
    pub(super) since: Instant,
    pub(super) begun: u64,
    /// Since when it has been in a collective.
    pub(super) waiting: Option<Instant>,
    /// Whether collectives are only queued and waited for elsewhere, as on GPUs.
    pub(super) queued: bool,
    pub(super) limits: Limits,
}

impl Doing {
    /// Since when this rank may be waiting for others. Where collectives are queued that can be in
    /// whatever reads a result, so in any part of a step.
    pub(super) fn waits(&self) -> Option<Instant> {
        let own = [Move::Start, Move::Data, Move::Save, Move::Monitor].contains(&self.what);
        self.waiting.or((self.queued && !own).then_some(self.since))
    }

    /// How long this rank may continue after another has failed: while it saves, until its checkpoint is whole.
    pub(super) fn grace(&self) -> Duration {
        match self.what {
            Move::Save => self.limits.timeout.max(GRACE),
            _ => GRACE,
        }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) member: Member,
    pub(super) address: String,
    pub(super) doing: Mutex<Doing>,
    pub(super) ended: AtomicBool,
    /// When the store last answered.
    pub(super) answered: Mutex<Instant>,
    /// The reason that the first rank to fail gave.
    pub(super) failed: Mutex<Option<String>>,
    /// For each other rank the newest beat that this rank has read, and when it first read it. The ranks are read
    /// in turn, so that it is known since when a lost one has been silent.
    pub(super) heard: Mutex<Vec<Option<(u64, Instant)>>>,
}

impl Shared {
    pub(super) fn doing(&self) -> MutexGuard<'_, Doing> {
        self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn answered(&self) -> MutexGuard<'_, Instant> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn failed(&self) -> MutexGuard<'_, Option<String>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when the beat with this number has been the newest of a rank, as far as this rank has seen.
    pub(super) fn heard(&self, rank: usize, number: u64) -> Instant {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut heard[rank] {
            Some((last, since)) if *last == number => *since,
            place => place.insert((number, Instant::now())).1,
        }
    }
}
