//! The threads: one beats and reads the others' beats, one watches the first.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::missing::Missing;
use super::others::{Beat, FAILED, Others, key, look_at_one};
use super::state::{Doing, GRACE, Limits, Shared};
use super::{BEAT, GONE, LOOKED_AT, SILENT};
use crate::shim::ShimError;
use crate::shim::c10d::{self, Member, Store};

/// Ends the process when the store has not answered for longer than ranks wait for each other.
pub(super) fn guard(shared: &Shared, exit_code: u8) {
    loop {
        thread::park_timeout(BEAT);
        if shared.ended.load(Ordering::Relaxed) {
            return;
        }
        let timeout = shared.doing().limits.timeout;
        if shared.answered().elapsed() > timeout + GRACE {
            end(shared, &Missing::Store { address: shared.address.clone() }, exit_code);
        }
    }
}

pub(super) fn beat(store: &Store, shared: &Shared, number: u64) -> Result<(), ShimError> {
    let Doing { step, what, since, begun, .. } = *shared.doing();
    let busy_ms = since.elapsed().as_millis() as u64;
    let beat = Beat { number, step, what: what.to_string(), busy_ms, begun };
    let text = serde_json::to_vec(&beat).expect("numbers and a text have a JSON form");
    store.set(&key(shared.member.rank), &text)
}

/// The body of the thread that sends beats and checks those of others.
pub(super) fn run(store: &Store, shared: &Shared, exit_code: u8) {
    let mut others = Others::new(shared.member);
    let mut reported = None; // the wait that was reported last, and its length then
    let mut broken: Option<Instant> = None;
    for number in 1.. {
        thread::park_timeout(BEAT);
        if shared.ended.load(Ordering::Relaxed) {
            return;
        }
        let alive = beat(store, shared, number).and_then(|()| store.get(FAILED));
        if alive.is_ok() {
            *shared.answered() = Instant::now();
        }
        match &alive {
            Ok(Some(message)) => {
                let message = String::from_utf8_lossy(message).into_owned();
                shared.failed().get_or_insert(message);
            }
            Ok(None) => broken = None,
            Err(_) => {}
        }
        let grace = shared.doing().grace();
        if !matches!(alive, Ok(None)) && broken.get_or_insert_with(Instant::now).elapsed() > grace {
            let reason = shared.failed().clone().map_or_else(
                || Missing::Store { address: shared.address.clone() },
                |message| Missing::Ended { message },
            );
            end(shared, &reason, exit_code);
        }
        look_at_one(store, shared, number);
        let doing = *shared.doing();
        let Doing { queued, limits, begun, .. } = doing;
        let from = watched_from(limits).min(if queued { LOOKED_AT } else { Duration::MAX });
        let Some(since) = doing.waits().filter(|since| since.elapsed() > from) else {
            others = Others::new(shared.member);
            continue;
        };
        if others.look(store, shared).is_err() {
            continue; // counted above
        }
        let waited = since.elapsed();
        let due = match reported {
            Some((wait, length)) if wait == since => waited > 2 * length,
            _ => waited > limits.slow,
        };
        let missing = others.missing(SILENT, begun);
        // Outside of a collective it may be this rank's own work that takes long.
        if due && (doing.waiting.is_some() || missing != Missing::Nobody) {
            reported = Some((since, waited));
            report(shared, &missing, waited);
        }
        let silent = || others.missing(GONE.min(limits.timeout), begun);
        let gone = queued && matches!(silent(), Missing::Silent(_));
        if gone || waited > limits.timeout + GRACE {
            end(shared, &others.missing(SILENT, begun), exit_code);
        }
    }
}

/// The length of a wait after which the others' beats are read: early enough to know which are silent when
/// a report is due.
fn watched_from(limits: Limits) -> Duration {
    (limits.slow / 2).min(limits.slow.saturating_sub(SILENT + 2 * BEAT))
}

/// Reports the ranks that keep others waiting. Only the lowest rank that is not among them reports.
fn report(shared: &Shared, missing: &Missing, waited: Duration) {
    let Member { rank, size } = shared.member;
    let named = missing.ranks();
    let speaker = (0..size).find(|rank| !named.contains(rank));
    if speaker != Some(rank) {
        return;
    }
    let Doing { step, what, limits, .. } = *shared.doing();
    let (waited, timeout) = (waited.as_secs_f64(), limits.timeout.as_secs());
    note!(
        "rank {rank} of {size} has waited {waited:.0} s at {what} of step {step} (the run ends at \
         {timeout} s): {missing}"
    );
}

fn end(shared: &Shared, missing: &Missing, exit_code: u8) -> ! {
    let Member { rank, size } = shared.member;
    let Doing { step, what, .. } = *shared.doing();
    note!("error: rank {rank} of {size}, at {what} of step {step}, ends: {missing}");
    c10d::exit(i32::from(exit_code))
}
