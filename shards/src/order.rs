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

mod permute;
mod windows;

use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;

pub(crate) use self::permute::mix;
pub use self::permute::permute;
use self::windows::{EpochWindows, Windows};

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

#[cfg(test)]
mod tests;
