//! The order of samples: from `(seed, epoch, step, slot)` to a sample id, in integer arithmetic.
//!
//! A true permutation of all samples with O(1) state: a Feistel network keyed by seed and epoch
//! permutes the smallest power of four that holds the data set, and cycle walking (Black and
//! Rogaway, 2002) maps numbers outside of it back in. There is no array, buffer or file: the global batch
//! of any step of any epoch is computed from its number, so resuming costs nothing, and the number of
//! ranks, workers or restarts cannot change it.
//!
//! If the data set does not fit the disk, whole shards must be fetched and evicted, and the order is a
//! *windowed* shuffle: the shards are permuted and cut into windows of so many shards, and the samples of
//! each window are permuted as above. It is as deterministic, each sample comes once per epoch, and it takes
//! 12 bytes per shard; but it is not a uniform permutation of the samples. Over n samples in windows of w,
//! with batches of b no larger than w:
//!
//! - a sample is as likely in every window, since windows are drawn anew each epoch;
//! - two samples of one shard are always in one window. They meet in a batch with probability
//!   (b - 1)/(w - 1) at most, where a true shuffle has (b - 1)/(n - 1): n/w times as often. Two
//!   samples of different shards meet a little less often than in a true shuffle;
//! - a batch has no sample twice, and draws on all shards of its window equally.
//!
//! So it matters how shards were filled. Shards of shuffled images (`detco pack` shuffles) are each a
//! fair sample of the data, and batches are then nearly as mixed as in a true shuffle. Shards that
//! hold one class each make windows, and so queues of negatives, of few classes: take a window of as
//! many shards as the disk allows, or pack anew.

use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;

/// Eight rounds of a strong mixing function: four suffice for a pseudo-random permutation (Luby and
/// Rackoff, 1988); the rest is margin and costs nanoseconds.
const ROUNDS: usize = 8;

/// Least size of the permutation, 256 elements, so that even three samples are shuffled well.
const HALF_BITS_MIN: u32 = 4;

/// A position in a run, from which the order continues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// Finished epochs.
    pub epoch: u32,
    /// Finished global batches of this epoch.
    pub step: u64,
}

/// Why an order is impossible.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OrderError {
    /// No data.
    #[error("the shards hold no samples")]
    Empty,
    /// Dropping the last partial batch would drop everything.
    #[error(
        "{samples} samples are fewer than one global batch of {batch}: lower the batch or add data"
    )]
    Short {
        /// Samples in the data set.
        samples: u64,
        /// Samples of a global batch.
        batch: u64,
    },
    /// A batch of nothing.
    #[error("a batch of 0 samples")]
    NoBatch,
    /// A window of nothing.
    #[error("a window of 0 shards")]
    NoWindow,
}

/// The order of a data set: which samples make up each global batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Samples of an epoch.
    samples: u64,
    /// Samples of the data set; more than those of an epoch only where these are spaced evenly over it.
    of: u64,
    batch: u64,
    seed: Option<u64>,
    windows: Option<Arc<Windows>>,
}

/// The windows of a windowed shuffle.
#[derive(Debug, PartialEq, Eq)]
struct Windows {
    /// Number of the first sample of each shard, and of the sample after the last shard.
    first: Vec<u64>,
    /// Shards of a window; the last may have fewer.
    shards: usize,
}

impl Order {
    /// Shuffled by `seed`, anew each epoch; a last partial batch is dropped (which samples that
    /// leaves out changes with the epoch).
    pub fn shuffled(samples: u64, batch: u64, seed: u64) -> Result<Order, OrderError> {
        match (samples, batch) {
            (_, 0) => Err(OrderError::NoBatch),
            (0, _) => Err(OrderError::Empty),
            _ if samples < batch => Err(OrderError::Short { samples, batch }),
            _ => Ok(Order { samples, of: samples, batch, seed: Some(seed), windows: None }),
        }
    }

    /// As [`Order::shuffled`], within windows of shards: `shards` holds the number of samples of each, and
    /// `window` is the number of shards of a window. With all shards in one window it is
    /// [`Order::shuffled`].
    pub fn windowed(
        shards: &[u64],
        window: usize,
        batch: u64,
        seed: u64,
    ) -> Result<Order, OrderError> {
        let order = Order::shuffled(shards.iter().sum(), batch, seed)?;
        match window {
            0 => Err(OrderError::NoWindow),
            all if all >= shards.len() => Ok(order),
            window => {
                let mut first = Vec::with_capacity(shards.len() + 1);
                first.push(0);
                first.extend(shards.iter().scan(0, |sum, samples| {
                    *sum += samples;
                    Some(*sum)
                }));
                let windows = Some(Arc::new(Windows { first, shards: window }));
                Ok(Order { windows, ..order })
            }
        }
    }

    /// Every sample once, in the order of the shards; the last batch may be short. For evaluation.
    pub fn sequential(samples: u64, batch: u64) -> Result<Order, OrderError> {
        match (samples, batch) {
            (_, 0) => Err(OrderError::NoBatch),
            (0, _) => Err(OrderError::Empty),
            _ => Ok(Order { samples, of: samples, batch, seed: None, windows: None }),
        }
    }

    /// As [`Order::sequential`], but at most `most` samples, evenly spaced over the data set.
    pub fn spaced(samples: u64, most: u64, batch: u64) -> Result<Order, OrderError> {
        let all = Order::sequential(samples, batch)?;
        match most.min(samples) {
            0 => Err(OrderError::Empty),
            part => Ok(Order { samples: part, ..all }),
        }
    }

    /// Whether samples come in the order of the shards, so that one shard at a time is enough.
    pub fn is_sequential(&self) -> bool {
        self.seed.is_none()
    }

    /// Global batches of an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        match self.seed {
            Some(_) => self.samples / self.batch,
            None => self.samples.div_ceil(self.batch),
        }
    }

    /// Samples of an epoch, before a last partial batch is dropped.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Samples of the global batch of `step`: the batch, but for evaluation's last.
    pub fn len(&self, step: u64) -> u64 {
        self.samples.saturating_sub(step.saturating_mul(self.batch)).min(self.batch)
    }

    /// Whether the global batch of `step` holds nothing: the epoch ended before.
    pub fn is_empty(&self, step: u64) -> bool {
        step >= self.steps_per_epoch()
    }

    /// The slots of a global batch that `rank` of `world` takes: contiguous, balanced, all of them
    /// over all ranks.
    pub fn slots(&self, step: u64, rank: u32, world: u32) -> Range<u64> {
        let (n, world) = (u128::from(self.len(step)), u128::from(world.max(1)));
        let edge = |r: u32| (n * u128::from(r) / world) as u64; // at most n
        edge(rank)..edge(rank.saturating_add(1).min(world as u32))
    }

    /// The sample in `slot` of the global batch at `cursor`. With a windowed order use [`Order::epoch`] for many
    /// samples: making it takes time for each shard.
    ///
    /// # Panics
    /// When the cursor lies outside the epoch or the slot outside the batch.
    pub fn sample(&self, cursor: Cursor, slot: u64) -> u64 {
        self.epoch(cursor.epoch).sample(cursor.step, slot)
    }

    /// An epoch of this order.
    pub fn epoch(&self, epoch: u32) -> Epoch<'_> {
        let key = self.seed.map(|seed| mix(seed ^ mix(u64::from(epoch))));
        let windowed = key.zip(self.windows.as_deref());
        let windows_of_epoch = windowed.map(|(key, windows)| EpochWindows::new(windows, key));
        Epoch { order: self, key, windows_of_epoch }
    }

    /// The substitute for a bad sample at the `attempt`-th try, one of the samples that the order reads. It is a
    /// function of the same numbers as the order, so a resumed run takes the same substitutes.
    pub fn substitute(&self, cursor: Cursor, slot: u64, attempt: u32) -> u64 {
        let words = [u64::from(cursor.epoch), cursor.step, slot, u64::from(attempt)];
        let start = self.seed.unwrap_or(0) ^ 0x5355_4253_5449_5455; // its own stream: "SUBSTITU"
        let hash = words.iter().fold(start, |state, word| mix(state ^ mix(*word)));
        let epoch = self.epoch(cursor.epoch);
        match &epoch.windows_of_epoch {
            // Of the same window: another's shards are not here.
            Some(windows_of_epoch) => {
                let window = windows_of_epoch.window_at(cursor.step * self.batch + slot);
                windows_of_epoch.local(window, hash % windows_of_epoch.samples(window))
            }
            None if epoch.key.is_some() => hash % self.samples,
            None => epoch.at(hash % self.samples),
        }
    }
}

/// One epoch of an order: the same answers as the order's, faster where it is windowed.
#[derive(Debug)]
pub struct Epoch<'a> {
    order: &'a Order,
    /// Of the permutation; `None` when nothing is shuffled.
    key: Option<u64>,
    windows_of_epoch: Option<EpochWindows<'a>>,
}

impl Epoch<'_> {
    /// The sample in `slot` of the global batch of `step`.
    ///
    /// # Panics
    /// When the step lies outside the epoch or the slot outside the batch.
    pub fn sample(&self, step: u64, slot: u64) -> u64 {
        let order = self.order;
        assert!(!order.is_empty(step), "step {step} is past the epoch");
        assert!(slot < order.len(step), "slot {slot} of {}", order.len(step));
        self.at(step * order.batch + slot)
    }

    /// The sample at a position of the epoch, which is below the number of samples.
    fn at(&self, position: u64) -> u64 {
        let order = self.order;
        match (self.key, &self.windows_of_epoch) {
            (Some(key), None) => permute(position, order.samples, key),
            (Some(_), Some(windows_of_epoch)) => {
                let window = windows_of_epoch.window_at(position);
                let (start, samples) =
                    (windows_of_epoch.starts[window], windows_of_epoch.samples(window));
                windows_of_epoch
                    .local(window, permute(position - start, samples, windows_of_epoch.key(window)))
            }
            // Below `of`, since the position is below `samples`.
            (None, _) => {
                (u128::from(position) * u128::from(order.of) / u128::from(order.samples)) as u64
            }
        }
    }

    /// All shards in the order in which they are first needed from `step` on; those that are not
    /// needed any more come last. Of an order that goes through the shards one after the other, those
    /// that any sample is read of. `shard_of` says which shard holds a sample.
    pub fn shards(&self, step: u64, shards: usize, shard_of: &dyn Fn(u64) -> usize) -> Vec<u32> {
        match (self.key, &self.windows_of_epoch) {
            (_, Some(windows_of_epoch)) => windows_of_epoch.shards.clone(),
            (None, None) => {
                let (mut position, mut found) = (0, Vec::new());
                while position < self.order.samples {
                    let shard = shard_of(self.at(position));
                    found.push(shard as u32);
                    // The first position beyond it: samples rise, and so do their shards.
                    let mut beyond = self.order.samples;
                    while position < beyond {
                        let middle = position + (beyond - position) / 2;
                        match shard_of(self.at(middle)) == shard {
                            true => position = middle + 1,
                            false => beyond = middle,
                        }
                    }
                }
                found
            }
            (Some(_), None) => {
                let (mut seen, mut found) = (vec![false; shards], Vec::with_capacity(shards));
                let start = step.saturating_mul(self.order.batch).min(self.order.samples);
                // By then all but a few in a hundred shards have come up, if they are alike.
                let most = start.saturating_add(4 * shards as u64).min(self.order.samples);
                let first = (start..most).map(|position| shard_of(self.at(position)));
                for shard in first.chain(0..shards) {
                    if !std::mem::replace(&mut seen[shard], true) {
                        found.push(shard as u32);
                    }
                }
                found
            }
        }
    }

    /// The range of [`Epoch::shards`] from which the global batch of `step` is drawn: its windows, all shards of
    /// a true shuffle, or those that an evaluation reads.
    pub fn reading(
        &self,
        step: u64,
        shards: usize,
        shard_of: &dyn Fn(u64) -> usize,
    ) -> Range<usize> {
        let first = step * self.order.batch;
        let last = first + self.order.len(step).saturating_sub(1);
        match (self.key, &self.windows_of_epoch) {
            (_, Some(windows_of_epoch)) => {
                let (first, last) =
                    (windows_of_epoch.window_at(first), windows_of_epoch.window_at(last));
                windows_of_epoch.range(first).start..windows_of_epoch.range(last).end
            }
            (Some(_), None) => 0..shards,
            (None, None) => {
                let all = self.shards(0, shards, shard_of);
                let [first, last] = [first, last].map(|position| {
                    let shard = shard_of(self.at(position)) as u32;
                    all.partition_point(|other| *other < shard)
                });
                first..last + 1
            }
        }
    }
}

/// The windows of one epoch.
#[derive(Debug)]
struct EpochWindows<'a> {
    windows: &'a Windows,
    key: u64,
    /// The shards in their order, windows one after the other.
    shards: Vec<u32>,
    /// The position of the first sample of each window, and the number of all samples.
    starts: Vec<u64>,
}

impl<'a> EpochWindows<'a> {
    fn new(windows: &'a Windows, key: u64) -> EpochWindows<'a> {
        let shards = (windows.first.len() - 1) as u64;
        let key_of_shards = mix(key ^ 0x5348_4152_4453); // its own stream: "SHARDS"
        let shards: Vec<u32> =
            (0..shards).map(|place| permute(place, shards, key_of_shards) as u32).collect();
        let mut starts = vec![0];
        for window in shards.chunks(windows.shards) {
            let samples: u64 = window.iter().map(|shard| windows.samples(*shard)).sum();
            starts.push(starts[starts.len() - 1] + samples);
        }
        EpochWindows { windows, key, shards, starts }
    }

    /// The window that a position lies in.
    fn window_at(&self, position: u64) -> usize {
        // At least 1, since the first starts at 0; a window of empty shards has no position.
        self.starts.partition_point(|start| *start <= position) - 1
    }

    /// Its places in `shards`.
    fn range(&self, window: usize) -> Range<usize> {
        let size = self.windows.shards;
        window * size..((window + 1) * size).min(self.shards.len())
    }

    fn samples(&self, window: usize) -> u64 {
        self.starts[window + 1] - self.starts[window]
    }

    fn key(&self, window: usize) -> u64 {
        mix(self.key ^ mix(window as u64))
    }

    /// The sample with this number inside a window, below [`EpochWindows::samples`].
    fn local(&self, window: usize, mut number: u64) -> u64 {
        for shard in &self.shards[self.range(window)] {
            let samples = self.windows.samples(*shard);
            if number < samples {
                return self.windows.first[*shard as usize] + number;
            }
            number -= samples;
        }
        unreachable!("a number beyond the window's samples")
    }
}

impl Windows {
    fn samples(&self, shard: u32) -> u64 {
        self.first[shard as usize + 1] - self.first[shard as usize]
    }
}

/// Where `position` of `0..n` goes under the permutation that `key` selects: a bijection of `0..n`.
///
/// # Panics
/// When `position` is not below `n`.
pub fn permute(position: u64, n: u64, key: u64) -> u64 {
    assert!(position < n, "position {position} of {n}");
    let bits = u64::BITS - (n - 1).leading_zeros();
    let half = bits.div_ceil(2).max(HALF_BITS_MIN);
    let mask = (1u64 << half) - 1;
    let mut at = position;
    // The network permutes 0..4^half, of which 0..n is at least a quarter (or 1/256 for tiny n):
    // following its cycle from inside comes back inside, after four steps on average at most.
    loop {
        let (mut left, mut right) = (at >> half, at & mask);
        for round in 0..ROUNDS {
            let turned = left ^ (mix(right ^ mix(key.wrapping_add(round as u64))) & mask);
            (left, right) = (right, turned);
        }
        at = left << half | right;
        if at < n {
            return at;
        }
    }
}

/// splitmix64's output function (Steele, Lea and Flood, 2014) on `state + golden ratio`.
pub(crate) fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn global_batch(order: &Order, cursor: Cursor, world: u32) -> Vec<u64> {
        let slots = (0..world).flat_map(|rank| order.slots(cursor.step, rank, world));
        let epoch = order.epoch(cursor.epoch);
        slots.map(|slot| epoch.sample(cursor.step, slot)).collect()
    }

    /// Which shard holds a sample, for shards of so many samples.
    fn holder(shards: &[u64]) -> impl Fn(u64) -> usize {
        let shards = shards.to_vec();
        move |mut sample| {
            let mut at = 0;
            while sample >= shards[at] {
                sample -= shards[at];
                at += 1;
            }
            at
        }
    }

    proptest! {
        #[test]
        fn permute_is_a_bijection(n in 1u64..5000, key: u64) {
            let seen: HashSet<u64> = (0..n).map(|p| permute(p, n, key)).collect();
            prop_assert_eq!(seen.len() as u64, n);
            prop_assert!(seen.iter().all(|s| *s < n));
        }

        #[test]
        fn permute_stays_inside_huge_sets(n in 1u64..(1 << 62), key: u64, share in 0.0f64..1.0) {
            let position = ((n as f64 * share) as u64).min(n - 1);
            prop_assert!(permute(position, n, key) < n);
        }

        #[test]
        fn global_batches_do_not_depend_on_the_world_or_the_resume_point(
            samples in 1u64..400, batch in 1u64..40, seed: u64, epoch in 0u32..9,
            worlds in prop::collection::vec(1u32..17, 1..40),
        ) {
            prop_assume!(batch <= samples);
            let order = Order::shuffled(samples, batch, seed).unwrap();
            let mut seen = HashSet::new();
            for step in 0..order.steps_per_epoch() {
                let cursor = Cursor { epoch, step };
                let alone = global_batch(&order, cursor, 1);
                prop_assert_eq!(alone.len() as u64, batch);
                // A restart here, on another number of ranks, reads the same batch.
                let world = worlds[step as usize % worlds.len()];
                let again = Order::shuffled(samples, batch, seed).unwrap();
                prop_assert_eq!(&alone, &global_batch(&again, cursor, world));
                prop_assert!(alone.iter().all(|id| *id < samples && seen.insert(*id)), "repeated");
            }
            prop_assert_eq!(seen.len() as u64, samples / batch * batch);
        }

        /// Wall 5 for windows: any world, any restart; every sample once; and a batch draws on its
        /// windows' shards alone, which is what lets the others be elsewhere.
        #[test]
        fn windowed_batches_keep_all_promises(
            shards in prop::collection::vec(0u64..30, 1..20), window in 1usize..25,
            batch in 1u64..40, seed: u64, epoch in 0u32..9, worlds in prop::collection::vec(1u32..9, 1..10),
        ) {
            let samples: u64 = shards.iter().sum();
            prop_assume!(batch <= samples);
            let order = Order::windowed(&shards, window, batch, seed).unwrap();
            let holder = holder(&shards);
            let of_epoch = order.epoch(epoch);
            let sequence = of_epoch.shards(0, shards.len(), &holder);
            prop_assert_eq!(sequence.iter().collect::<HashSet<_>>().len(), shards.len());
            let (mut seen, mut before) = (HashSet::new(), 0..0);
            for step in 0..order.steps_per_epoch() {
                let cursor = Cursor { epoch, step };
                let alone = global_batch(&order, cursor, 1);
                prop_assert_eq!(alone.len() as u64, batch);
                let world = worlds[step as usize % worlds.len()];
                let again = Order::windowed(&shards, window, batch, seed).unwrap();
                prop_assert_eq!(&alone, &global_batch(&again, cursor, world));
                prop_assert_eq!(alone[0], order.sample(cursor, 0));
                prop_assert!(alone.iter().all(|id| *id < samples && seen.insert(*id)), "repeated");
                let reading = of_epoch.reading(step, shards.len(), &holder);
                prop_assert!(reading.start >= before.start && reading.end >= before.end);
                let here: HashSet<u32> = sequence[reading.clone()].iter().copied().collect();
                prop_assert!(alone.iter().all(|id| here.contains(&(holder(*id) as u32))));
                let substitute = order.substitute(cursor, 0, 3);
                prop_assert!(here.contains(&(holder(substitute) as u32)));
                before = reading;
            }
            prop_assert_eq!(seen.len() as u64, samples / batch * batch);
            if window >= shards.len() {
                prop_assert_eq!(order, Order::shuffled(samples, batch, seed).unwrap());
            }
        }

        #[test]
        fn evaluation_reads_every_sample_once(samples in 1u64..500, batch in 1u64..60, world in 1u32..9) {
            let order = Order::sequential(samples, batch).unwrap();
            let all: Vec<u64> = (0..order.steps_per_epoch())
                .flat_map(|step| global_batch(&order, Cursor { epoch: 0, step }, world))
                .collect();
            prop_assert_eq!(all, (0..samples).collect::<Vec<_>>());
        }

        #[test]
        fn a_spaced_part_spans_the_set(samples in 1u64..500, most in 1u64..600, batch in 1u64..60) {
            let order = Order::spaced(samples, most, batch).unwrap();
            let part: Vec<u64> = (0..order.steps_per_epoch())
                .flat_map(|step| global_batch(&order, Cursor { epoch: 0, step }, 1))
                .collect();
            prop_assert_eq!(part.len() as u64, most.min(samples));
            prop_assert_eq!(part[0], 0);
            let gaps: HashSet<u64> = part.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let gap = samples / most.min(samples);
            prop_assert!(gaps.iter().all(|g| *g == gap || *g == gap + 1), "{gaps:?}");
            prop_assert!(samples - part[part.len() - 1] <= gap + 1);
            // What takes the place of a bad one is of the part, too, and spread over it.
            let of_part: HashSet<u64> = part.iter().copied().collect();
            let instead: HashSet<u64> =
                (0..64).map(|attempt| order.substitute(Cursor::default(), 0, attempt)).collect();
            prop_assert!(instead.is_subset(&of_part), "{instead:?}");
            prop_assert!(part.len() < 8 || instead.len() > 4);
        }
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let order = |seed| Order::shuffled(1000, 100, seed).unwrap();
        let first = |seed, epoch| global_batch(&order(seed), Cursor { epoch, step: 0 }, 1);
        assert_ne!(first(1, 0), first(1, 1));
        assert_ne!(first(1, 0), first(2, 0));
        assert_eq!(first(1, 0), first(1, 0));
    }

    /// Chi-squared over (position, sample) pairs of a small set: every sample is as likely at
    /// every position. 11 × 11 cells, 100 degrees of freedom, mean 100, standard deviation 14.1.
    #[test]
    fn every_sample_is_equally_likely_everywhere() {
        let (n, keys) = (11u64, 20_000u64);
        let mut counts = vec![0u64; (n * n) as usize];
        for key in 0..keys {
            for position in 0..n {
                counts[(position * n + permute(position, n, mix(key))) as usize] += 1;
            }
        }
        let expected = keys as f64 / n as f64;
        let chi2: f64 = counts.iter().map(|c| (*c as f64 - expected).powi(2) / expected).sum();
        assert!((50.0..160.0).contains(&chi2), "chi-squared {chi2}");
    }

    /// Neighbours in the order are not neighbours in the shards: the mean distance of a true
    /// shuffle is n/3.
    #[test]
    fn neighbours_are_scattered() {
        let n = 100_000u64;
        let ids: Vec<u64> = (0..n).map(|p| permute(p, n, 42)).collect();
        let sum: f64 = ids.windows(2).map(|w| w[0].abs_diff(w[1]) as f64).sum();
        let share = sum / (n - 1) as f64 / n as f64;
        assert!((share - 1.0 / 3.0).abs() < 0.01, "mean distance {share} of the set");
    }

    /// What the module says of windows: 60 shards of 20 samples, windows of 6 shards (120 samples),
    /// batches of 24. Shard mates meet (b - 1)/(w - 1) = 0.1933 of the time, a true shuffle's
    /// (b - 1)/(n - 1) = 0.0192; all pairs meet as often as in a true shuffle, on average.
    #[test]
    fn shard_mates_meet_as_often_as_the_module_says() {
        let (shards, samples, batch, epochs) = (vec![20_u64; 60], 1200_u64, 24_u64, 400);
        let rates = |order: &Order| {
            let mut met = [0.0; 2];
            for epoch in 0..epochs {
                for step in 0..order.steps_per_epoch() {
                    let ids = global_batch(order, Cursor { epoch, step }, 1);
                    for (at, one) in ids.iter().enumerate() {
                        met[1] += at as f64;
                        met[0] +=
                            ids[..at].iter().filter(|other| *other / 20 == one / 20).count() as f64;
                    }
                }
            }
            let pairs = [60.0 * 20.0 * 19.0 / 2.0, 1200.0 * 1199.0 / 2.0];
            [met[0] / pairs[0] / f64::from(epochs), met[1] / pairs[1] / f64::from(epochs)]
        };
        let windowed = rates(&Order::windowed(&shards, 6, batch, 5).unwrap());
        assert!((windowed[0] - 23.0 / 119.0).abs() < 0.004, "{windowed:?}");
        let shuffled = rates(&Order::shuffled(samples, batch, 5).unwrap());
        assert!((shuffled[0] - 23.0 / 1199.0).abs() < 0.002, "{shuffled:?}");
        assert!((windowed[1] - shuffled[1]).abs() < 1e-9, "{windowed:?} {shuffled:?}");
    }

    /// Every sample is as likely in every window: 30 shards in 10 windows, 3,000 epochs; 9 degrees
    /// of freedom for each shard, mean 9, standard deviation 4.2, of the mean over shards 0.8.
    #[test]
    fn every_shard_is_equally_likely_in_every_window() {
        let (shards, epochs) = (vec![4_u64; 30], 3_000);
        let order = Order::windowed(&shards, 3, 4, 11).unwrap();
        let mut counts = [[0_u32; 10]; 30];
        for epoch in 0..epochs {
            let sequence = order.epoch(epoch).shards(0, 30, &|id| id as usize / 4);
            for (place, shard) in sequence.iter().enumerate() {
                counts[*shard as usize][place / 3] += 1;
            }
        }
        let expected = f64::from(epochs) / 10.0;
        let chi2 = |row: &[u32; 10]| -> f64 {
            row.iter().map(|count| (f64::from(*count) - expected).powi(2) / expected).sum()
        };
        let mean = counts.iter().map(chi2).sum::<f64>() / 30.0;
        assert!((5.0..13.0).contains(&mean), "chi-squared {mean}");
    }

    #[test]
    fn a_true_shuffle_needs_all_shards_and_says_which_first() {
        let order = Order::shuffled(1000, 10, 3).unwrap();
        let (of, epoch) = (|id: u64| (id / 50) as usize, order.epoch(2));
        let sequence = epoch.shards(4, 20, &of);
        assert_eq!(sequence[0] as usize, of(epoch.sample(4, 0)));
        let all: HashSet<u32> = sequence.iter().copied().collect();
        assert_eq!((all.len(), epoch.reading(4, 20, &of)), (20, 0..20));
        let order = Order::sequential(1000, 60).unwrap();
        let reading = |step| order.epoch(0).reading(step, 20, &of);
        assert_eq!([reading(0), reading(1), reading(16)], [0..2, 1..3, 19..20]);
        // Of few samples not all shards are needed.
        let order = Order::spaced(1000, 7, 3).unwrap();
        let epoch = order.epoch(0);
        assert_eq!(epoch.shards(0, 20, &of), [0, 2, 5, 8, 11, 14, 17]);
        assert_eq!([epoch.reading(0, 20, &of), epoch.reading(2, 20, &of)], [0..3, 6..7]);
    }

    #[test]
    fn orders_that_cannot_be_are_refused() {
        assert_eq!(Order::windowed(&[4, 4], 0, 2, 0), Err(OrderError::NoWindow));
        assert_eq!(Order::windowed(&[0, 0], 1, 2, 0), Err(OrderError::Empty));
        assert_eq!(Order::shuffled(0, 4, 0), Err(OrderError::Empty));
        assert_eq!(Order::shuffled(3, 4, 0), Err(OrderError::Short { samples: 3, batch: 4 }));
        assert_eq!(Order::shuffled(3, 0, 0), Err(OrderError::NoBatch));
        assert_eq!(Order::spaced(3, 0, 1), Err(OrderError::Empty));
    }
}
