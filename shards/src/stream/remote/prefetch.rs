//! The prefetcher of a remote set: the state of each shard, the order of prefetching, and the threads
//! that fetch.
//!
//! A few threads fetch the shards that [`Prefetcher::set_upcoming`] listed, in its order, as far as the cache has
//! room; a shard that a reader waits for goes first. A shard is mapped when it is first read, and
//! unmapped when it is no longer in the list and no longer read. While it is mapped no process evicts
//! it.

use std::collections::{HashMap, VecDeque};
use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fetch::{self, Patience, Watch};
use super::store::{About, Object, Web};
use crate::cache::{self, Admitted, Cache, Part, Pin, Priority};
use crate::format::index::Ends;
use crate::format::map::Map;
use crate::format::{Blame, Cause, RemoteFault, ShardError};
use crate::stats::{WaitCounter, Waits};

/// How often a waiting thread checks what other processes did, and whether it is still needed.
const POLL: Duration = Duration::from_millis(50);
/// How often a prefetch without room tries again, and how long an idle thread sleeps.
const IDLE_POLL: Duration = Duration::from_millis(500);

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

/// The state of a shard.
#[derive(Debug)]
enum ShardState {
    /// Not in the cache, as far as is known.
    Absent,
    /// A thread of this process fetches or maps it.
    Fetching,
    /// In the cache when it was last looked up.
    Cached,
    /// Mapped; the time of the last request.
    Mapped(Arc<PinnedShard>, Instant),
    /// Could not be fetched.
    Failed(Arc<ShardError>),
}

#[derive(Debug)]
struct State {
    shards: Vec<ShardState>,
    /// When to check again for a shard that another process is fetching.
    look: Vec<Option<Instant>>,
    /// Shards that will be read, in that order.
    upcoming: Vec<u32>,
    /// Position of each shard in `upcoming`; `u32::MAX` for those that are not in it.
    rank: Vec<u32>,
    /// How many of `upcoming`, from its beginning, are being read now.
    now: u32,
    /// Shards that readers wait for, each with the number of its readers.
    demand: VecDeque<(u32, u32)>,
    /// Shards for which room is being made; meanwhile no prefetch asks for room.
    asking: Vec<u32>,
    /// Until when prefetching pauses, since there was no room.
    full: Option<Instant>,
    /// Shards a reader waits for, or did a moment ago, that did not fit into the cache.
    refused: HashMap<u32, Refused>,
    /// Time of the last no-room timeout, cleared when a shard arrives. Until then later readers fail at
    /// once, so that a batch of a thousand samples waits once.
    last_no_room: Option<Instant>,
    closing: bool,
}

/// A shard that a reader waits for and that got no room.
#[derive(Clone, Copy, Debug)]
struct Refused {
    since: Instant,
    last: Instant,
    /// Bytes that could not be evicted.
    kept: u64,
}

/// Idle time after which a shard is unmapped even if it is in the list, so that a process that pauses
/// (training during an evaluation) does not keep others from evicting it.
const UNMAP_AFTER: Duration = Duration::from_secs(2);

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

#[derive(Debug, Default)]
struct Counters {
    bytes: AtomicU64,
    shards: AtomicU64,
    failures: AtomicU64,
    fetch_nanos: AtomicU64,
    waits: WaitCounter,
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

/// Notices for the user about failing downloads: from the second failed attempt on, and over all shards
/// at most one every [`NOTICE_EVERY`].
#[derive(Debug)]
struct Notices {
    tell: Option<fn(&str)>,
    last: Mutex<Option<Instant>>,
}

/// Least time between two notices.
const NOTICE_EVERY: Duration = Duration::from_secs(30);

impl Notices {
    fn failed(&self, url: &str, attempts: u32, cause: &Cause) {
        let Some(tell) = self.tell.filter(|_| attempts >= 2) else { return };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() >= NOTICE_EVERY) {
            *last = Some(Instant::now());
            tell(&format!("{url}: {attempts} attempts failed, trying again: {cause}"));
        }
    }
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
        let state = State {
            shards: items.iter().map(|_| ShardState::Absent).collect(),
            look: vec![None; items.len()],
            upcoming: Vec::new(),
            rank: vec![u32::MAX; items.len()],
            now: 0,
            demand: VecDeque::new(),
            asking: Vec::new(),
            full: None,
            refused: HashMap::new(),
            last_no_room: None,
            closing: false,
        };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let (counters, notices) = (Counters::default(), Notices { tell, last: Mutex::new(None) });
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
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut waits = Waits::default();
        self.counters.waits.add_to(&mut waits);
        RemoteSnapshot {
            bytes: of(&self.counters.bytes),
            shards: of(&self.counters.shards),
            failures: of(&self.counters.failures),
            fetch_nanos: of(&self.counters.fetch_nanos),
            waits,
        }
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

impl State {
    /// The shard to fetch next; without one, whether to check again soon.
    fn next(&self) -> (Option<u32>, bool) {
        let now = Instant::now();
        // A prefetch takes no room that a reader waits for.
        let full = self.full.is_some_and(|until| until > now)
            || self.demand.iter().any(|(shard, _)| self.refused.contains_key(shard));
        let none = full || !self.asking.is_empty();
        let (mut soon, ahead) = (full, if none { &[] } else { self.upcoming.as_slice() });
        for shard in self.demand.iter().map(|(shard, _)| shard).chain(ahead).copied() {
            let at = shard as usize;
            if !matches!(self.shards[at], ShardState::Absent) {
                continue;
            }
            match self.look[at] {
                Some(look) if look > now => soon = true,
                _ => return (Some(shard), false),
            }
        }
        (None, soon)
    }

    /// Unmaps the shards that nobody reads at this moment and that `may` selects, by their position in the
    /// list and the time of their last request; returns whether there were any.
    fn unmap(&mut self, may: impl Fn(u32, Instant) -> bool) -> bool {
        let mut any = false;
        for (shard_state, rank) in self.shards.iter_mut().zip(&self.rank) {
            if let ShardState::Mapped(held, asked) = shard_state
                && Arc::strong_count(held) == 1
                && may(*rank, *asked)
            {
                *shard_state = ShardState::Cached;
                any = true;
            }
        }
        any
    }

    /// Unmaps shards to make room for another; returns whether there were any. For a shard with waiting
    /// readers everything goes that is not read at this moment: otherwise two processes that share a
    /// cache, one a little ahead of the other, could each pin what the other waits for.
    fn unmap_for(&mut self, shard: u32) -> bool {
        let now = if self.is_demanded(shard) { 0 } else { self.now };
        self.unmap(|rank, _| rank >= now)
    }

    fn is_demanded(&self, shard: u32) -> bool {
        self.demand.iter().any(|(other, _)| *other == shard)
    }

    /// A reader begins to wait for a shard.
    fn wait_for(&mut self, shard: u32) {
        match self.demand.iter_mut().find(|(other, _)| *other == shard) {
            Some((_, waiting)) => *waiting += 1,
            None => self.demand.push_back((shard, 1)),
        }
        if self.last_no_room.is_some() && self.refused.contains_key(&shard) {
            // There will be one attempt only.
            self.look[shard as usize] = None;
        }
    }

    /// A reader has stopped waiting for a shard; others may still wait.
    fn waited_for(&mut self, shard: u32) {
        self.demand.retain_mut(|(other, waiting)| {
            *waiting -= u32::from(*other == shard);
            *waiting > 0
        });
    }

    /// Notes that there was no room for a shard that a reader waits for.
    fn refuse(&mut self, shard: u32, kept: u64) {
        let last = Instant::now();
        let before = self.refused.get(&shard).filter(|before| before.last.elapsed() < UNMAP_AFTER);
        let since = before.map_or(last, |before| before.since);
        self.refused.insert(shard, Refused { since, last, kept });
    }

    /// Notes that a shard has arrived, is fetched by another process, or failed. Waits for room start
    /// anew, since shards that are read or given up free their room.
    fn resolved(&mut self, shard: u32) {
        self.refused.remove(&shard);
        let now = Instant::now();
        self.refused.values_mut().for_each(|refused| refused.since = now);
        self.last_no_room = None;
    }

    /// Returns the bytes that cannot be evicted if a reader should give up waiting for room: because
    /// its shard was refused all the time, or because another was before and this one is now.
    fn no_room(&mut self, shard: u32, asked: Instant, patience: Duration) -> Option<u64> {
        let lately =
            |refused: &&Refused| refused.last >= asked && refused.last.elapsed() < IDLE_POLL;
        let refused = *self.refused.get(&shard).filter(lately)?;
        if self.last_no_room.is_some_and(|at| at.elapsed() < patience) {
            return Some(refused.kept);
        }
        // A prefetch in flight will free its room: keep waiting.
        let ahead = |(at, shard_state): (u32, &ShardState)| {
            matches!(shard_state, ShardState::Fetching) && !self.is_demanded(at)
        };
        if refused.since.elapsed() < patience || (0..).zip(&self.shards).any(ahead) {
            return None;
        }
        self.last_no_room = Some(Instant::now());
        Some(refused.kept)
    }
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
