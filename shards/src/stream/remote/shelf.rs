//! The shards of a remote set: which are here, which are wanted next, who fetches them.
//!
//! A few threads fetch what [`Shelf::want`] listed, in its order, as far as the cache has room; a
//! shard that somebody waits for goes first. A shard is mapped when it is first read and unmapped
//! when the list has left it behind and nobody reads it any more; while it is mapped no process
//! evicts it.

use std::collections::{HashMap, VecDeque};
use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fetch::{self, Patience, Watch};
use super::store::{About, Object, Web};
use crate::cache::{self, Admitted, Cache, Dear, Hold, Part};
use crate::format::index::Ends;
use crate::format::map::Map;
use crate::format::{Blame, Cause, RemoteFault, ShardError};
use crate::stats::{WaitCounter, Waits};

/// How often a waiting thread looks for what other processes did, and whether it is still needed.
const GLANCE: Duration = Duration::from_millis(50);
/// How often room is asked for that nobody waits for, and how long an idle thread sleeps.
const NAP: Duration = Duration::from_millis(500);

/// A shard, as far as it is known without its bytes.
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
    /// Who is to blame where the shard is not what its index says: no index is taken that is not the
    /// one in the manifest.
    pub(super) fn blame(&self) -> Blame {
        self.sha256.as_ref().map_or(Blame::Either, |_| Blame::Shard)
    }
}

/// A cached shard that is being read: mapped, and kept from being evicted.
#[derive(Debug)]
pub struct Held {
    // Dropped in this order: the map, then what keeps its file.
    map: Map,
    _hold: Hold,
}

impl Deref for Held {
    type Target = Map;

    fn deref(&self) -> &Map {
        &self.map
    }
}

/// Where a shard is.
#[derive(Debug)]
enum Place {
    /// Not here, as far as we know.
    Away,
    /// A thread of ours is at it.
    Coming,
    /// In the cache, when we last looked.
    Cached,
    /// Mapped, and last asked for then.
    Here(Arc<Held>, Instant),
    /// It could not be had.
    Lost(Arc<ShardError>),
}

#[derive(Debug)]
struct State {
    places: Vec<Place>,
    /// When to look again for a shard that another process is fetching.
    look: Vec<Option<Instant>>,
    /// What will be read, in that order.
    wanted: Vec<u32>,
    /// Position of each shard in `wanted`; `u32::MAX` for those that are not.
    rank: Vec<u32>,
    /// So many of `wanted` are being read now.
    now: u32,
    /// What somebody waits for, and how many do.
    urgent: VecDeque<(u32, u32)>,
    /// What room is being asked for: meanwhile nothing that is needed later asks.
    asking: Vec<u32>,
    /// Until when nothing is fetched but what somebody waits for: there was no room.
    full: Option<Instant>,
    /// What somebody waits for, or did a moment ago, and there is no room for.
    refused: HashMap<u32, Refused>,
    /// When somebody waited for room in vain; none since anything came. Who waits now is told at
    /// once: a batch of a thousand samples waits once.
    in_vain: Option<Instant>,
    closing: bool,
}

/// How a shard that somebody waits for was refused room.
#[derive(Clone, Copy, Debug)]
struct Refused {
    since: Instant,
    last: Instant,
    /// Bytes that could not be evicted.
    kept: u64,
}

/// What was not asked for so long is unmapped, although it is on the list: whoever pauses (training,
/// while it is evaluated) does not keep others from the cache.
const REST: Duration = Duration::from_secs(2);

/// What was fetched, and how long readers waited for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteSnapshot {
    /// Bytes that came.
    pub bytes: u64,
    /// Shards that were fetched whole.
    pub shards: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Nanoseconds that threads spent fetching, added up.
    pub fetch_nanos: u64,
    /// Waits of readers for a shard that was not there.
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

/// The shards of a set, wherever they are.
#[derive(Debug)]
pub(crate) struct Shelf {
    items: Vec<Item>,
    cache: Cache,
    web: Web,
    patience: Patience,
    counters: Counters,
    notices: Notices,
    state: Mutex<State>,
    changed: Condvar,
}

/// What a person is told while shards do not come: at a second attempt's failure, and of all shards
/// no more than once in a while.
#[derive(Debug)]
struct Notices {
    tell: Option<fn(&str)>,
    last: Mutex<Option<Instant>>,
}

/// Between two notices.
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

/// What a fetching thread found to do.
enum Job {
    Fetch(u32),
    End,
}

/// What came of fetching.
enum Fetched {
    Here,
    Elsewhere,
    NoRoom(u64),
}

impl Shelf {
    pub(super) fn new(
        items: Vec<Item>,
        cache: Cache,
        web: Web,
        patience: Patience,
        tell: Option<fn(&str)>,
    ) -> Shelf {
        let state = State {
            places: items.iter().map(|_| Place::Away).collect(),
            look: vec![None; items.len()],
            wanted: Vec::new(),
            rank: vec![u32::MAX; items.len()],
            now: 0,
            urgent: VecDeque::new(),
            asking: Vec::new(),
            full: None,
            refused: HashMap::new(),
            in_vain: None,
            closing: false,
        };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let (counters, notices) = (Counters::default(), Notices { tell, last: Mutex::new(None) });
        Shelf { items, cache, web, patience, counters, notices, state, changed }
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

    /// Says what will be read, in that order, and that the first `now` of it are being read from now
    /// on. What is not in the list may be evicted; what could not be had is tried again, unless the list
    /// is the rest of the last one.
    pub(crate) fn want(&self, wanted: Vec<u32>, now: u32) {
        let mut state = self.lock();
        let state = &mut *state;
        state.rank.fill(u32::MAX);
        for (rank, shard) in (0..).zip(&wanted) {
            state.rank[*shard as usize] = rank;
        }
        // Whoever goes on along a list has nothing new to ask for.
        if wanted.is_empty() || !state.wanted.ends_with(&wanted) {
            for place in &mut state.places {
                if matches!(place, Place::Lost(_)) {
                    *place = Place::Away;
                }
            }
        }
        if wanted.is_empty() {
            // Whoever comes next has a patience of its own.
            (state.refused, state.in_vain) = (HashMap::new(), None);
        }
        (state.wanted, state.now, state.full) = (wanted, now, None);
        state.unmap(|rank, _| rank >= now);
        self.changed.notify_all();
    }

    /// A shard, mapped. Waits until it is here, or until `stop` says that nobody wants it any more.
    pub(crate) fn hold(
        &self,
        shard: u32,
        stop: &dyn Fn() -> bool,
    ) -> Result<Arc<Held>, ShardError> {
        let mut state = self.lock();
        let mut start = None;
        let found = loop {
            match &mut state.places[shard as usize] {
                Place::Here(held, asked) => {
                    *asked = Instant::now();
                    break Ok(Arc::clone(held));
                }
                Place::Lost(error) => break Err(ShardError::Shared(Arc::clone(error))),
                place @ Place::Cached => {
                    // Other shards are not waited for meanwhile; this one is, as if it were coming.
                    *place = Place::Coming;
                    drop(state);
                    let mapped = self.map(shard);
                    state = self.lock();
                    let (place, done) = match mapped {
                        Ok(Some(held)) => {
                            (Place::Here(Arc::clone(&held), Instant::now()), Some(Ok(held)))
                        }
                        // Evicted by another process, before it was needed.
                        Ok(None) => (Place::Away, None),
                        Err(error) => (Place::Cached, Some(Err(error))),
                    };
                    state.places[shard as usize] = place;
                    self.changed.notify_all();
                    if let Some(done) = done {
                        break done;
                    }
                }
                Place::Away | Place::Coming => {}
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
            let waited = self.changed.wait_timeout(state, GLANCE);
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

    /// Maps a cached shard; `None` when it is not there (any more).
    fn map(&self, shard: u32) -> Result<Option<Arc<Held>>, ShardError> {
        let item = &self.items[shard as usize];
        let Some(hold) = self.cache.take(&item.name, item.about.bytes)? else { return Ok(None) };
        let map = Map::open(&self.cache.path(&item.name))?;
        if let Some(ends) = &item.ends {
            let index = self.cache.path(&item.index);
            let checked = ends.check(map.bytes(), &index, Path::new(&item.object.url));
            checked.map_err(|error| error.blame(item.blame()))?;
            map.check()?;
        }
        map.images();
        Ok(Some(Arc::new(Held { map, _hold: hold })))
    }

    /// A fetching thread: until [`Shelf::close`].
    pub(super) fn run(&self) {
        while let Job::Fetch(shard) = self.job() {
            let start = Instant::now();
            let fetched = self.fetch(shard);
            let nanos = start.elapsed().as_nanos() as u64;
            self.counters.fetch_nanos.fetch_add(nanos, Ordering::Relaxed);
            self.fetched(shard, fetched);
        }
    }

    /// The next thing to fetch, waited for.
    fn job(&self) -> Job {
        let mut state = self.lock();
        loop {
            if state.closing {
                return Job::End;
            }
            let (next, soon) = state.next();
            if let Some(shard) = next {
                state.places[shard as usize] = Place::Coming;
                state.asking.push(shard);
                return Job::Fetch(shard);
            }
            let pause = if soon { GLANCE } else { NAP };
            let waited = self.changed.wait_timeout(state, pause);
            let (woken, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = woken;
            if timeout.timed_out() {
                state.unmap(|_, asked| asked.elapsed() >= REST);
            }
        }
    }

    fn fetched(&self, shard: u32, fetched: Result<Fetched, ShardError>) {
        let mut state = self.lock();
        let at = shard as usize;
        state.look[at] = None;
        state.asking.retain(|other| *other != shard);
        let soon = Instant::now() + GLANCE;
        let place = match fetched {
            Ok(Fetched::Here) => {
                state.settled(shard);
                Place::Cached
            }
            Ok(Fetched::Elsewhere) => {
                state.settled(shard);
                state.look[at] = Some(soon);
                Place::Away
            }
            Ok(Fetched::NoRoom(kept)) => {
                state.full = Some(Instant::now() + NAP);
                // Only what is waited for can be in trouble; what is wanted later just waits, and is
                // not overtaken.
                if state.is_urgent(shard) {
                    state.look[at] = Some(soon);
                    state.refuse(shard, kept);
                }
                Place::Away
            }
            Err(error) => {
                state.settled(shard);
                Place::Lost(Arc::new(error))
            }
        };
        state.places[at] = place;
        self.changed.notify_all();
    }

    fn fetch(&self, shard: u32) -> Result<Fetched, ShardError> {
        let item = &self.items[shard as usize];
        let dear = self.dear(shard);
        let mut admitted = self.cache.admit(&item.name, item.about.bytes, &dear)?;
        if matches!(admitted, Admitted::NoRoom { .. }) && self.lock().unmap_for(shard) {
            admitted = self.cache.admit(&item.name, item.about.bytes, &dear)?;
        }
        let mut part = match admitted {
            Admitted::Present => return Ok(Fetched::Here),
            Admitted::Elsewhere => return Ok(Fetched::Elsewhere),
            Admitted::NoRoom { kept } => return Ok(Fetched::NoRoom(kept)),
            Admitted::Part(part) => part,
        };
        self.lock().asking.retain(|other| *other != shard);
        self.changed.notify_all();
        let watch = Watching { shelf: self, name: &item.name, dear: &dear };
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

    /// How dear each file is while room is made for a shard: as the list was when this is called.
    fn dear(&self, shard: u32) -> impl Fn(&str) -> Dear + use<> {
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
            Some(rank) => Dear::After(rank.saturating_add(1)),
            // Not listed, but somebody waits for it.
            None if name == mine => Dear::After(0),
            None => Dear::No,
        }
    }

    /// Ends the fetching threads, and whoever waits.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.web.close();
        self.changed.notify_all();
    }
}

/// What becomes of a part whose fetch failed: what may still be gone on with stays.
pub(super) fn given_up(cache: &Cache, item: &Item, part: Part, error: ShardError) -> ShardError {
    use RemoteFault::{Closed, Failed};
    if let ShardError::Remote { fault, .. } = &error
        && matches!(**fault, Failed { .. } | Closed)
    {
        return error;
    }
    // A full disk is not made emptier by what cannot be finished. Of two errors the first is the one
    // to tell.
    let _ = part.discard();
    if !cache::is_full(&error) && !cache::is_limited(&error) {
        return error;
    }
    let folder = cache.folder().to_path_buf();
    let fault = RemoteFault::DiskFull { folder, source: error.into() };
    ShardError::remote(&item.object.url, fault)
}

impl State {
    /// What to fetch next; otherwise, whether to look again soon.
    fn next(&self) -> (Option<u32>, bool) {
        let now = Instant::now();
        // What comes ahead takes no room that somebody waits for.
        let full = self.full.is_some_and(|until| until > now)
            || self.urgent.iter().any(|(shard, _)| self.refused.contains_key(shard));
        let none = full || !self.asking.is_empty();
        let (mut soon, ahead) = (full, if none { &[] } else { self.wanted.as_slice() });
        for shard in self.urgent.iter().map(|(shard, _)| shard).chain(ahead).copied() {
            let at = shard as usize;
            if !matches!(self.places[at], Place::Away) {
                continue;
            }
            match self.look[at] {
                Some(look) if look > now => soon = true,
                _ => return (Some(shard), false),
            }
        }
        (None, soon)
    }

    /// Unmaps what nobody reads at this moment, where `may` agrees, by its place in the list and when
    /// it was asked for; whether there was any.
    fn unmap(&mut self, may: impl Fn(u32, Instant) -> bool) -> bool {
        let mut any = false;
        for (place, rank) in self.places.iter_mut().zip(&self.rank) {
            if let Place::Here(held, asked) = place
                && Arc::strong_count(held) == 1
                && may(*rank, *asked)
            {
                *place = Place::Cached;
                any = true;
            }
        }
        any
    }

    /// Unmaps for the room of a shard; whether anything was. Whoever waits keeps nothing that it does
    /// not read at this moment: otherwise processes that share a cache, one a little ahead of the
    /// other, could each hold what the other waits for.
    fn unmap_for(&mut self, shard: u32) -> bool {
        let now = if self.is_urgent(shard) { 0 } else { self.now };
        self.unmap(|rank, _| rank >= now)
    }

    fn is_urgent(&self, shard: u32) -> bool {
        self.urgent.iter().any(|(other, _)| *other == shard)
    }

    /// Somebody begins to wait for a shard.
    fn wait_for(&mut self, shard: u32) {
        match self.urgent.iter_mut().find(|(other, _)| *other == shard) {
            Some((_, waiting)) => *waiting += 1,
            None => self.urgent.push_back((shard, 1)),
        }
        if self.in_vain.is_some() && self.refused.contains_key(&shard) {
            // One look is all there will be.
            self.look[shard as usize] = None;
        }
    }

    /// Somebody has ended waiting for a shard, others may go on.
    fn waited_for(&mut self, shard: u32) {
        self.urgent.retain_mut(|(other, waiting)| {
            *waiting -= u32::from(*other == shard);
            *waiting > 0
        });
    }

    /// There was no room for a shard that somebody waits for.
    fn refuse(&mut self, shard: u32, kept: u64) {
        let last = Instant::now();
        let before = self.refused.get(&shard).filter(|before| before.last.elapsed() < REST);
        let since = before.map_or(last, |before| before.since);
        self.refused.insert(shard, Refused { since, last, kept });
    }

    /// A shard has come, comes elsewhere or will not come. Whoever waits for room waits anew: what is
    /// read or given up gives its room back.
    fn settled(&mut self, shard: u32) {
        self.refused.remove(&shard);
        let now = Instant::now();
        self.refused.values_mut().for_each(|refused| refused.since = now);
        self.in_vain = None;
    }

    /// The bytes that are kept, when a shard that has been asked for is to be waited for no longer:
    /// because it was refused all along, or because another was and this one is now.
    fn no_room(&mut self, shard: u32, asked: Instant, patience: Duration) -> Option<u64> {
        let lately = |refused: &&Refused| refused.last >= asked && refused.last.elapsed() < NAP;
        let refused = *self.refused.get(&shard).filter(lately)?;
        if self.in_vain.is_some_and(|at| at.elapsed() < patience) {
            return Some(refused.kept);
        }
        // What is coming ahead of its time will give its room back.
        let ahead =
            |(at, place): (u32, &Place)| matches!(place, Place::Coming) && !self.is_urgent(at);
        if refused.since.elapsed() < patience || (0..).zip(&self.places).any(ahead) {
            return None;
        }
        self.in_vain = Some(Instant::now());
        Some(refused.kept)
    }
}

/// Counts for the shelf what a fetch tells.
struct Watching<'a, D> {
    shelf: &'a Shelf,
    name: &'a str,
    dear: &'a D,
}

impl<D: Fn(&str) -> Dear> Watch for Watching<'_, D> {
    fn came(&self, bytes: u64) {
        self.shelf.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn failed(&self, object: &Object, attempts: u32, cause: &Cause) {
        self.shelf.counters.failures.fetch_add(1, Ordering::Relaxed);
        self.shelf.notices.failed(&object.url, attempts, cause);
    }

    fn pause(&self, pause: Duration) -> bool {
        let end = Instant::now() + pause;
        let mut state = self.shelf.lock();
        while !state.closing {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let waited = self.shelf.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    fn evicted(&self) -> Result<bool, ShardError> {
        self.shelf.cache.evict_one(self.name, self.dear)
    }
}
