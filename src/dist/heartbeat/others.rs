//! The beats of the other ranks, as this one has read them.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::missing::{LastSeen, Missing};
use super::state::Shared;
use crate::shim::ShimError;
use crate::shim::c10d::{Member, Store};

/// The store's key under which the first rank that fails gives its reason.
pub(super) const FAILED: &str = "failed";

/// A beat, as it is written into the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Beat {
    /// Number of the beat, by which readers tell a new one.
    pub(super) number: u64,
    pub(super) step: u64,
    pub(super) what: String,
    pub(super) busy_ms: u64,
    /// Collectives begun.
    pub(super) begun: u64,
}

pub(super) fn key(rank: usize) -> String {
    format!("beat/{rank}")
}

/// The last beat of a rank; none before its first, or of another program.
pub(super) fn beat_of(store: &Store, rank: usize) -> Result<Option<Beat>, ShimError> {
    Ok(store.get(&key(rank))?.and_then(|text| serde_json::from_slice(&text).ok()))
}

/// Reads the beat of one other rank, of another one each time.
pub(super) fn look_at_one(store: &Store, shared: &Shared, number: u64) {
    let Member { rank, size } = shared.member;
    let other = (number % size as u64) as usize;
    if other == rank {
        return;
    }
    // Where the store is gone the next beat will tell.
    if let Ok(Some(beat)) = beat_of(store, other) {
        shared.heard(other, beat.number);
    }
}

/// The beats of the other ranks, as this one has read them.
#[derive(Debug)]
pub(in crate::dist) struct Others {
    member: Member,
    /// The last beat of each rank.
    seen: Vec<Option<Seen>>,
}

#[derive(Clone, Debug)]
struct Seen {
    pub(super) beat: Beat,
    /// Since when it has been the newest that this rank has seen.
    pub(super) heard: Instant,
    /// Since when a newer one has been looked for without a pause: a process that was itself stopped, with all
    /// others, knows nothing of them.
    pub(super) looked: Instant,
}

impl Others {
    pub(super) fn new(member: Member) -> Others {
        Others { member, seen: vec![None; member.size] }
    }

    /// Reads all beats; returns the reason of a rank that failed.
    pub(super) fn look(
        &mut self,
        store: &Store,
        shared: &Shared,
    ) -> Result<Option<String>, ShimError> {
        if let Some(message) = store.get(FAILED)? {
            let message = String::from_utf8_lossy(&message).into_owned();
            return Ok(Some(shared.failed().get_or_insert(message).clone()));
        }
        for rank in (0..self.member.size).filter(|rank| *rank != self.member.rank) {
            let Some(beat) = beat_of(store, rank)? else { continue };
            let seen = &mut self.seen[rank];
            if seen.as_ref().is_none_or(|seen| seen.beat.number != beat.number) {
                let heard = shared.heard(rank, beat.number);
                *seen = Some(Seen { beat, heard, looked: Instant::now() });
            }
        }
        Ok(None)
    }

    /// The ranks that are silent for longer than `silent`, else those that have begun fewer collectives than
    /// `begun`.
    pub(super) fn missing(&self, silent: Duration, begun: u64) -> Missing {
        let last_seen = |of: &dyn Fn(&Beat, Duration) -> bool| -> Vec<LastSeen> {
            let heard = self.seen.iter().enumerate();
            heard
                .filter_map(|(rank, seen)| {
                    let Seen { beat, heard, looked } = seen.as_ref()?;
                    let silent = heard.elapsed();
                    of(beat, looked.elapsed()).then(|| LastSeen {
                        rank,
                        step: beat.step,
                        what: beat.what.clone(),
                        busy_ms: beat.busy_ms + silent.as_millis() as u64,
                        silent_ms: silent.as_millis() as u64,
                    })
                })
                .collect()
        };
        let lost = last_seen(&|_, age| age >= silent);
        if !lost.is_empty() {
            return Missing::Silent(lost);
        }
        match last_seen(&|beat, _| beat.begun < begun) {
            late if late.is_empty() => Missing::Nobody,
            late => Missing::Late(late),
        }
    }
}
