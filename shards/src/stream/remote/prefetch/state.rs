//! The state of the shards of a remote set: what is fetched next, who waits, and what may be unmapped.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::PinnedShard;
use crate::format::ShardError;

/// How often a prefetch without room tries again, and how long an idle thread sleeps.
pub(super) const IDLE_POLL: Duration = Duration::from_millis(500);

/// Idle time after which a shard is unmapped even if it is in the list, so that a process that pauses
/// (training during an evaluation) does not keep others from evicting it.
pub(super) const UNMAP_AFTER: Duration = Duration::from_secs(2);

/// The state of a shard.
#[derive(Debug)]
pub(super) enum ShardState {
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

/// The state of all shards, and of the readers that wait for them.
#[derive(Debug)]
pub(super) struct State {
    pub(super) shards: Vec<ShardState>,
    /// When to check again for a shard that another process is fetching.
    pub(super) look: Vec<Option<Instant>>,
    /// Shards that will be read, in that order.
    pub(super) upcoming: Vec<u32>,
    /// Position of each shard in `upcoming`; `u32::MAX` for those that are not in it.
    pub(super) rank: Vec<u32>,
    /// How many of `upcoming`, from its beginning, are being read now.
    pub(super) now: u32,
    /// Shards that readers wait for, each with the number of its readers.
    pub(super) demand: VecDeque<(u32, u32)>,
    /// Shards for which room is being made; meanwhile no prefetch asks for room.
    pub(super) asking: Vec<u32>,
    /// Until when prefetching pauses, since there was no room.
    pub(super) full: Option<Instant>,
    /// Shards a reader waits for, or did a moment ago, that did not fit into the cache.
    pub(super) refused: HashMap<u32, Refused>,
    /// Time of the last no-room timeout, cleared when a shard arrives. Until then later readers fail at
    /// once, so that a batch of a thousand samples waits once.
    pub(super) last_no_room: Option<Instant>,
    pub(super) closing: bool,
}

/// A shard that a reader waits for and that got no room.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refused {
    since: Instant,
    last: Instant,
    /// Bytes that could not be evicted.
    kept: u64,
}

impl State {
    /// The state before anything is fetched, of so many shards.
    pub(super) fn new(shards: usize) -> State {
        State {
            shards: (0..shards).map(|_| ShardState::Absent).collect(),
            look: vec![None; shards],
            upcoming: Vec::new(),
            rank: vec![u32::MAX; shards],
            now: 0,
            demand: VecDeque::new(),
            asking: Vec::new(),
            full: None,
            refused: HashMap::new(),
            last_no_room: None,
            closing: false,
        }
    }

    /// The shard to fetch next; without one, whether to check again soon.
    pub(super) fn next(&self) -> (Option<u32>, bool) {
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
    pub(super) fn unmap(&mut self, may: impl Fn(u32, Instant) -> bool) -> bool {
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
    pub(super) fn unmap_for(&mut self, shard: u32) -> bool {
        let now = if self.is_demanded(shard) { 0 } else { self.now };
        self.unmap(|rank, _| rank >= now)
    }

    pub(super) fn is_demanded(&self, shard: u32) -> bool {
        self.demand.iter().any(|(other, _)| *other == shard)
    }

    /// A reader begins to wait for a shard.
    pub(super) fn wait_for(&mut self, shard: u32) {
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
    pub(super) fn waited_for(&mut self, shard: u32) {
        self.demand.retain_mut(|(other, waiting)| {
            *waiting -= u32::from(*other == shard);
            *waiting > 0
        });
    }

    /// Notes that there was no room for a shard that a reader waits for.
    pub(super) fn refuse(&mut self, shard: u32, kept: u64) {
        let last = Instant::now();
        let before = self.refused.get(&shard).filter(|before| before.last.elapsed() < UNMAP_AFTER);
        let since = before.map_or(last, |before| before.since);
        self.refused.insert(shard, Refused { since, last, kept });
    }

    /// Notes that a shard has arrived, is fetched by another process, or failed. Waits for room start
    /// anew, since shards that are read or given up free their room.
    pub(super) fn resolved(&mut self, shard: u32) {
        self.refused.remove(&shard);
        let now = Instant::now();
        self.refused.values_mut().for_each(|refused| refused.since = now);
        self.last_no_room = None;
    }

    /// Returns the bytes that cannot be evicted if a reader should give up waiting for room: because
    /// its shard was refused all the time, or because another was before and this one is now.
    pub(super) fn no_room(
        &mut self,
        shard: u32,
        asked: Instant,
        patience: Duration,
    ) -> Option<u64> {
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

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(24 * 3600);

    /// Whether the reader of a shard that is refused room gives up.
    fn gives_up(state: &mut State, shard: u32, patience: Duration) -> bool {
        let asked = Instant::now();
        state.refuse(shard, 7);
        state.no_room(shard, asked, patience) == Some(7)
    }

    /// At last: a machine may pause between a refusal and the look at it, for longer than counts as lately.
    fn gives_up_at_last(state: &mut State, shard: u32, patience: Duration) -> bool {
        (0..1000).any(|_| gives_up(state, shard, patience))
    }

    #[test]
    fn what_comes_ahead_is_waited_for_beyond_the_patience() {
        let mut state = State::new(3);
        state.shards[0] = ShardState::Fetching;
        state.wait_for(2);
        assert!(!gives_up_at_last(&mut state, 2, Duration::ZERO));
        state.shards[0] = ShardState::Cached;
        state.resolved(0);
        assert!(gives_up_at_last(&mut state, 2, Duration::ZERO));
    }

    #[test]
    fn readers_of_many_shards_wait_for_room_once() {
        let mut state = State::new(4);
        (1..4).for_each(|shard| state.wait_for(shard));
        assert!(!gives_up_at_last(&mut state, 1, LONG));
        assert!(gives_up_at_last(&mut state, 1, Duration::ZERO));
        // The others have not waited for long, and are told at once.
        assert!((2..4).all(|shard| gives_up_at_last(&mut state, shard, LONG)));
        // A shard that comes frees its room: all wait again.
        state.resolved(0);
        assert!((1..4).all(|shard| !gives_up_at_last(&mut state, shard, LONG)));
    }
}
