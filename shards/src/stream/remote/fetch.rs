//! Retries: fetches one object in as many attempts as patience allows, each from where the last one ended.

use std::time::{Duration, Instant};

use super::feed::{Came, Sink};
use super::store::{About, Failure, Object, Web};
use crate::cache::{self, Part};
use crate::format::{Cause, RemoteFault, ShardError};

/// Patience with a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Attempts without progress before a fetch fails.
    pub attempts: u32,
    /// Pause after the first of them. It doubles up to [`PAUSE_MAX`], with up to half of it left out at random.
    pub pause: Duration,
    /// How long a server may be silent before an attempt counts as failed.
    pub stall: Duration,
    /// How long a shard that is needed at once waits for room in the cache.
    pub room: Duration,
}

impl Default for Patience {
    /// About three minutes for a server that returns only errors.
    fn default() -> Patience {
        Patience {
            attempts: 10,
            pause: Duration::from_millis(250),
            stall: Duration::from_secs(30),
            room: Duration::from_secs(60),
        }
    }
}

/// The longest pause between two attempts.
pub const PAUSE_MAX: Duration = Duration::from_secs(30);

/// A server may ask for a longer one (`Retry-After`), up to this.
pub const AFTER_MAX: Duration = Duration::from_secs(120);

/// Bytes that count as progress: a server that drops the connection every few bytes would take forever.
const PROGRESS: u64 = 1 << 20;

/// How often a shard with the wrong digest is fetched, since the connection may be at fault.
const DIGEST_TRIES: u32 = 2;

/// The observer of a fetch.
pub(super) trait Watch {
    /// Bytes were received.
    fn came(&self, bytes: u64);
    /// An attempt failed: the number of attempts, and the cause.
    fn failed(&self, object: &Object, attempts: u32, cause: &Cause);
    /// Pauses; returns false when the prefetcher closes.
    fn pause(&self, pause: Duration) -> bool;
    /// The disk is full: evicts a file; returns whether another try is worthwhile.
    fn evicted(&self) -> Result<bool, ShardError>;
}

/// Attempts while opening: there a store that does not answer is more often misspelt than down, and the user
/// is waiting.
const OPENING: u32 = 5;

/// Repeats `attempt` until it succeeds, fails for good, or patience ends.
pub(super) fn again<T>(
    patience: &Patience,
    object: &Object,
    action: &'static str,
    mut attempt: impl FnMut() -> Result<T, Failure>,
) -> Result<T, ShardError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let (source, after) = match attempt() {
            Ok(done) => return Ok(done),
            Err(Failure::Here(error)) => return Err(error),
            Err(Failure::Final(fault)) => return Err(ShardError::remote(&object.url, fault)),
            Err(Failure::NoRanges) => (Cause::from("the server sends no ranges"), None),
            Err(Failure::Passing(source, after)) => (source, after),
        };
        if attempts >= patience.attempts.min(OPENING) {
            let fault = RemoteFault::Failed { action, offset: 0, attempts, source };
            return Err(ShardError::remote(&object.url, fault));
        }
        std::thread::sleep(pause(patience, attempts, after));
    }
}

/// Fetches a shard into a part and compares its digest with the manifest's, if there is one.
pub(super) fn shard(
    web: &Web,
    patience: &Patience,
    object: &Object,
    about: &About,
    sha256: Option<&str>,
    part: &mut Part,
    watch: &dyn Watch,
) -> Result<(), ShardError> {
    let fail = |fault| ShardError::remote(&object.url, fault);
    if part.have() > 0 && !about.is_known() {
        // What an earlier process left may be another object's: nothing tells.
        part.restart()?;
    }
    let (mut attempts, mut tries, mut most) = (0, 0, part.have());
    loop {
        if part.have() < about.bytes {
            let came = web.stream(object, about, &mut Filling { part, watch });
            // Of a server that begins anew each time, only what goes beyond the last time is progress.
            let progress = part.have().saturating_sub(most);
            most = most.max(part.have());
            if progress >= PROGRESS {
                attempts = 0;
            }
            let (source, after) = match came {
                Ok(_) if part.have() == about.bytes => continue,
                Ok(Came::Piece) if progress > 0 => continue,
                Ok(_) => (Cause::from("the connection ended early"), None),
                Err(Failure::Final(fault)) => return Err(fail(fault)),
                Err(Failure::Passing(source, after)) => (source, after),
                Err(Failure::NoRanges) => {
                    part.restart()?;
                    (Cause::from("the server sends objects from their beginning only"), None)
                }
                Err(Failure::Here(error)) if cache::is_full(&error) && watch.evicted()? => continue,
                Err(Failure::Here(error)) => return Err(error),
            };
            attempts += 1;
            watch.failed(object, attempts, &source);
            if attempts >= patience.attempts {
                let (action, offset) = ("fetch it", part.have());
                return Err(fail(RemoteFault::Failed { action, offset, attempts, source }));
            }
            if !watch.pause(pause(patience, attempts, after)) {
                return Err(fail(RemoteFault::Closed));
            }
            continue;
        }
        let Some(recorded) = sha256.or(about.sha256.as_deref()) else { return Ok(()) };
        let found = part.sha256();
        if found == recorded {
            return Ok(());
        }
        // What was fetched is not what was packed: nothing of it is kept.
        part.restart()?;
        tries += 1;
        if tries >= DIGEST_TRIES {
            if sha256.is_none() {
                return Err(fail(RemoteFault::Replaced));
            }
            let recorded = recorded.to_owned();
            return Err(fail(RemoteFault::Digest { found, recorded, tries }));
        }
    }
}

/// A part as the sink of a fetch.
struct Filling<'a> {
    part: &'a mut Part,
    watch: &'a dyn Watch,
}

impl Sink for Filling<'_> {
    fn have(&self) -> u64 {
        self.part.have()
    }

    fn restart(&mut self) -> Result<(), ShardError> {
        self.part.restart()
    }

    fn again(&mut self, bytes: u64) {
        self.watch.came(bytes);
    }

    fn take(&mut self, piece: &[u8]) -> Result<(), ShardError> {
        self.part.append(piece)?;
        self.watch.came(piece.len() as u64);
        Ok(())
    }
}

/// The pause after so many failed attempts: exponential back-off with jitter, so that ranks that failed
/// together do not retry together; at least what the server asks for, up to a limit.
fn pause(patience: &Patience, attempts: u32, after: Option<Duration>) -> Duration {
    let whole = patience.pause.saturating_mul(1 << (attempts - 1).min(16)).min(PAUSE_MAX);
    // Chance for servers' sake only: nothing of the data depends on it.
    let chance = std::hash::BuildHasher::hash_one(
        &std::collections::hash_map::RandomState::new(),
        Instant::now().elapsed(),
    );
    let pause = whole / 2 + (whole / 2).mul_f64((chance >> 11) as f64 / (1_u64 << 53) as f64);
    pause.max(after.unwrap_or_default().min(AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_within_a_half_and_end() {
        let patience = Patience { pause: Duration::from_millis(100), ..Patience::default() };
        for attempts in 1..40 {
            let whole = Duration::from_millis(100 << (attempts - 1).min(16)).min(PAUSE_MAX);
            for _ in 0..20 {
                let found = pause(&patience, attempts, None);
                assert!(found >= whole / 2 && found <= whole, "{attempts}: {found:?} of {whole:?}");
            }
        }
        let asked = |seconds| pause(&patience, 1, Some(Duration::from_secs(seconds)));
        assert_eq!((asked(7), asked(7000)), (Duration::from_secs(7), AFTER_MAX));
        assert!(asked(0) >= Duration::from_millis(50));
    }
}
