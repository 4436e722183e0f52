//! The prefetcher of a remote set: the state of each shard, the order of prefetching, and the threads
//! that fetch.
//!
//! A few threads fetch the shards that [`Prefetcher::set_upcoming`] listed, in its order, as far as the cache has
//! room; a shard that a reader waits for goes first. A shard is mapped when it is first read, and
//! unmapped when it is no longer in the list and no longer read. While it is mapped no process evicts
//! it.

mod report;
mod state;

use std::collections::HashMap;
use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fetch::{self, Patience, Watch};
use super::store::{About, Object, Web};
use crate::cache::{self, Admitted, Cache, Part, Pin, Priority};
use crate::format::index::Ends;
use crate::format::map::Map;
use crate::format::{Blame, Cause, RemoteFault, ShardError};

pub use self::report::RemoteSnapshot;
use self::report::{Counters, Notices};
use self::state::{IDLE_POLL, ShardState, State, UNMAP_AFTER};

/// How often a waiting thread checks what other processes did, and whether it is still needed.
const POLL: Duration = Duration::from_millis(50);

/// What is known of a shard before it is fetched.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) object: Object,
    pub(super) about: About,
    pub(super) sha256: Option<String>,
    /// Its name in the cache, and that of its index.
    pub(super) name: String,
    pub(super) index: String,
    /// What its index says; `None` where the shard itself was walked.
    pub(super) ends: Option<Ends>,
}

impl Item {
    /// Which file is wrong where shard and index disagree. With a checksum in the manifest it is the
    /// shard, since the index was checked too.
    pub(super) fn blame(&self) -> Blame {
        self.sha256.as_ref().map_or(Blame::Either, |_| Blame::Shard)
    }
}

/// A cached shard that is being read: mapped, and pinned in the cache.
#[derive(Debug)]
pub struct PinnedShard {
    // Dropped in this order: the map, then the pin on its file.
    map: Map,
    _pin: Pin,
}

impl Deref for PinnedShard {
    type Target = Map;

    fn deref(&self) -> &Map {
        &self.map
    }
}

/// Fetches the shards of a remote set ahead of its readers.
#[derive(Debug)]
pub(crate) struct Prefetcher {
    items: Vec<Item>,
    cache: Cache,
    web: Web,
    patience: Patience,
    counters: Counters,
    notices: Notices,
    state: Mutex<State>,
    changed: Condvar,
}

/// The next task of a fetching thread.
enum Job {
    Fetch(u32),
    End,
}

/// The result of fetching a shard.
enum Fetched {
    /// It is in the cache.
    Here,
    /// Another process or thread is fetching it.
    Elsewhere,
    /// It does not fit: so many bytes cannot be evicted.
    NoRoom(u64),
}

impl Prefetcher {
    pub(super) fn new(
        items: Vec<Item>,
        cache: Cache,
        web: Web,
        patience: Patience,
        tell: Option<fn(&str)>,
    ) -> Prefetcher {
        let (state, changed) = (Mutex::new(State::new(items.len())), Condvar::new());
        let (counters, notices) = (Counters::default(), Notices::new(tell));
        Prefetcher { items, cache, web, patience, counters, notices, state, changed }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bound of the cache in bytes.
    pub(crate) fn room(&self) -> u64 {
        self.cache.bound()
    }

    /// Counters at this moment.
    pub(crate) fn snapshot(&self) -> RemoteSnapshot {
        self.counters.snapshot()
    }

    /// Sets the shards that will be read, in that order; the first `now` of them are being read from now
    /// on. Other shards may be evicted. Shards that could not be fetched are tried again, unless the list
    /// is the rest of the one before.
    pub(crate) fn set_upcoming(&self, upcoming: Vec<u32>, now: u32) {
        let mut state = self.lock();
        let state = &mut *state;
        state.rank.fill(u32::MAX);
        for (rank, shard) in (0..).zip(&upcoming) {
            state.rank[*shard as usize] = rank;
        }
        // The rest of the same list asks for nothing new.
        if upcoming.is_empty() || !state.upcoming.ends_with(&upcoming) {
            for shard_state in &mut state.shards {
                if matches!(shard_state, ShardState::Failed(_)) {
                    *shard_state = ShardState::Absent;
                }
            }
        }
        if upcoming.is_empty() {
            // The next reader gets a patience of its own.
            (state.refused, state.last_no_room) = (HashMap::new(), None);
        }
        (state.upcoming, state.now, state.full) = (upcoming, now, None);
        state.unmap(|rank, _| rank >= now);
        self.changed.notify_all();
    }

    /// Returns a shard mapped and pinned. Waits until it has been fetched, or until `stop` says that it is
    /// no longer needed.
    pub(crate) fn pin(
        &self,
        shard: u32,
        stop: &dyn Fn() -> bool,
    ) -> Result<Arc<PinnedShard>, ShardError> {
        let mut state = self.lock();
        let mut start = None;
        let found = loop {
            match &mut state.shards[shard as usize] {
                ShardState::Mapped(held, asked) => {
                    *asked = Instant::now();
                    break Ok(Arc::clone(held));
                }
                ShardState::Failed(error) => break Err(ShardError::Shared(Arc::clone(error))),
                shard_state @ ShardState::Cached => {
                    // Mapped without the lock: readers of other shards go on, those of this one wait.
                    *shard_state = ShardState::Fetching;
                    drop(state);
                    let mapped = self.map(shard);
                    state = self.lock();
                    let (shard_state, done) = match mapped {
                        Ok(Some(held)) => {
                            (ShardState::Mapped(Arc::clone(&held), Instant::now()), Some(Ok(held)))
                        }
                        // Another process evicted it in between.
                        Ok(None) => (ShardState::Absent, None),
                        Err(error) => (ShardState::Cached, Some(Err(error))),
                    };
                    state.shards[shard as usize] = shard_state;
                    self.changed.notify_all();
                    if let Some(done) = done {
                        break done;
                    }
                }
                ShardState::Absent | ShardState::Fetching => {}
            }
            let item = &self.items[shard as usize];
            let (bytes, bound) = (item.about.bytes, self.cache.bound());
            if state.closing || stop() {
                break Err(ShardError::remote(&item.object.url, RemoteFault::Closed));
            }
            if let Some(start) = start
                && let Some(kept) = state.no_room(shard, start, self.patience.room)
            {
                let fault = RemoteFault::NoRoom { bytes, kept, bound };
                break Err(ShardError::remote(&item.object.url, fault));
            }
            if start.is_none() {
                start = Some(Instant::now());
                state.wait_for(shard);
                self.changed.notify_all();
            }
            let waited = self.changed.wait_timeout(state, POLL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        if start.is_some() {
            state.waited_for(shard);
        }
        drop(state);
        if let Some(start) = start {
            self.counters.waits.waited(start.elapsed(), 0);
        }
        found
    }

    /// Maps a cached shard; `None` if it is not in the cache any more.
    fn map(&self, shard: u32) -> Result<Option<Arc<PinnedShard>>, ShardError> {
        let item = &self.items[shard as usize];
        let Some(pin) = self.cache.take(&item.name, item.about.bytes)? else { return Ok(None) };
        let map = Map::open(&self.cache.path(&item.name))?;
        if let Some(ends) = &item.ends {
            let index = self.cache.path(&item.index);
            let checked = ends.check(map.bytes(), &index, Path::new(&item.object.url));
            checked.map_err(|error| error.blame(item.blame()))?;
            map.check()?;
        }
        map.images();
        Ok(Some(Arc::new(PinnedShard { map, _pin: pin })))
    }

    /// The loop of a fetching thread, until [`Prefetcher::close`].
    pub(super) fn run(&self) {
        while let Job::Fetch(shard) = self.job() {
            let start = Instant::now();
            let fetched = self.fetch(shard);
            let nanos = start.elapsed().as_nanos() as u64;
            self.counters.fetch_nanos.fetch_add(nanos, Ordering::Relaxed);
            self.fetched(shard, fetched);
        }
    }

    /// Waits for the next task.
    fn job(&self) -> Job {
        let mut state = self.lock();
        loop {
            if state.closing {
                return Job::End;
            }
            let (next, soon) = state.next();
            if let Some(shard) = next {
                state.shards[shard as usize] = ShardState::Fetching;
                state.asking.push(shard);
                return Job::Fetch(shard);
            }
            let pause = if soon { POLL } else { IDLE_POLL };
            let waited = self.changed.wait_timeout(state, pause);
            let (woken, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = woken;
            if timeout.timed_out() {
                state.unmap(|_, asked| asked.elapsed() >= UNMAP_AFTER);
            }
        }
    }

    fn fetched(&self, shard: u32, fetched: Result<Fetched, ShardError>) {
        let mut state = self.lock();
        let at = shard as usize;
        state.look[at] = None;
        state.asking.retain(|other| *other != shard);
        let soon = Instant::now() + POLL;
        let shard_state = match fetched {
            Ok(Fetched::Here) => {
                state.resolved(shard);
                ShardState::Cached
            }
            Ok(Fetched::Elsewhere) => {
                state.resolved(shard);
                state.look[at] = Some(soon);
                ShardState::Absent
            }
            Ok(Fetched::NoRoom(kept)) => {
                state.full = Some(Instant::now() + IDLE_POLL);
                // Only a shard with waiting readers can fail for want of room; a prefetch waits, and
                // keeps its shard_state in the order.
                if state.is_demanded(shard) {
                    state.look[at] = Some(soon);
                    state.refuse(shard, kept);
                }
                ShardState::Absent
            }
            Err(error) => {
                state.resolved(shard);
                ShardState::Failed(Arc::new(error))
            }
        };
        state.shards[at] = shard_state;
        self.changed.notify_all();
    }

    fn fetch(&self, shard: u32) -> Result<Fetched, ShardError> {
        let item = &self.items[shard as usize];
        let priority = self.priority(shard);
        let mut admitted = self.cache.admit(&item.name, item.about.bytes, &priority)?;
        if matches!(admitted, Admitted::NoRoom { .. }) && self.lock().unmap_for(shard) {
            admitted = self.cache.admit(&item.name, item.about.bytes, &priority)?;
        }
        let mut part = match admitted {
            Admitted::Present => return Ok(Fetched::Here),
            Admitted::Elsewhere => return Ok(Fetched::Elsewhere),
            Admitted::NoRoom { kept } => return Ok(Fetched::NoRoom(kept)),
            Admitted::Part(part) => part,
        };
        self.lock().asking.retain(|other| *other != shard);
        self.changed.notify_all();
        let watch = Watching { prefetcher: self, name: &item.name, priority: &priority };
        let (web, patience, sha256) = (&self.web, &self.patience, item.sha256.as_deref());
        let come =
            fetch::shard(web, patience, &item.object, &item.about, sha256, &mut part, &watch);
        if let Err(error) = come.and_then(|()| part.flush()) {
            return Err(given_up(&self.cache, item, part, error));
        }
        part.finish()?;
        self.counters.shards.fetch_add(1, Ordering::Relaxed);
        Ok(Fetched::Here)
    }

    /// The eviction priority of each file while room is made for a shard, by the list as it is now.
    fn priority(&self, shard: u32) -> impl Fn(&str) -> Priority + use<> {
        let state = self.lock();
        let ranks: HashMap<String, u32> = self
            .items
            .iter()
            .zip(&state.rank)
            .filter(|(_, rank)| **rank != u32::MAX)
            .map(|(item, rank)| (item.name.clone(), *rank))
            .collect();
        let mine = self.items[shard as usize].name.clone();
        move |name: &str| match ranks.get(name) {
            Some(rank) => Priority::NeededAfter(rank.saturating_add(1)),
            // Not listed, but a reader waits for it.
            None if name == mine => Priority::NeededAfter(0),
            None => Priority::Unneeded,
        }
    }

    /// Ends the fetching threads and all waiting.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.web.close();
        self.changed.notify_all();
    }
}

/// Handles a part whose fetch failed: it stays if a later attempt can continue it. Returns the error to
/// report.
pub(super) fn given_up(cache: &Cache, item: &Item, part: Part, error: ShardError) -> ShardError {
    use RemoteFault::{Closed, Failed};
    if let ShardError::Remote { fault, .. } = &error
        && matches!(**fault, Failed { .. } | Closed)
    {
        return error;
    }
    // A part that cannot be finished should not fill the disk. Of two errors the first is reported.
    let _ = part.discard();
    if !cache::is_full(&error) && !cache::is_limited(&error) {
        return error;
    }
    let folder = cache.folder().to_path_buf();
    let fault = RemoteFault::DiskFull { folder, source: error.into() };
    ShardError::remote(&item.object.url, fault)
}

/// Passes what a fetch reports to the prefetcher's counters and notices.
struct Watching<'a, D> {
    prefetcher: &'a Prefetcher,
    name: &'a str,
    priority: &'a D,
}

impl<D: Fn(&str) -> Priority> Watch for Watching<'_, D> {
    fn came(&self, bytes: u64) {
        self.prefetcher.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn failed(&self, object: &Object, attempts: u32, cause: &Cause) {
        self.prefetcher.counters.failures.fetch_add(1, Ordering::Relaxed);
        self.prefetcher.notices.failed(&object.url, attempts, cause);
    }

    fn pause(&self, pause: Duration) -> bool {
        let end = Instant::now() + pause;
        let mut state = self.prefetcher.lock();
        while !state.closing {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let waited = self.prefetcher.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    fn evicted(&self) -> Result<bool, ShardError> {
        self.prefetcher.cache.evict_one(self.name, self.priority)
    }
}
