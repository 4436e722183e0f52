//! Which sample comes when: `(seed, epoch, step, slot)` to a sample id, integers only.
//!
//! A true permutation of all samples with O(1) state: a Feistel network keyed by seed and epoch
//! permutes the smallest power of four that holds the data set, and cycle walking (Black and
//! Rogaway, 2002) brings what falls outside back in. No array, no buffer, no file: the global
//! batch of any step of any epoch is computed from its number, so resuming costs nothing and the
//! number of ranks, workers or restarts cannot change it (wall 5).

use std::ops::Range;

use thiserror::Error;

/// Eight rounds of a strong mixing function: four suffice for a pseudo-random permutation (Luby and
/// Rackoff, 1988); the rest is margin and costs nanoseconds.
const ROUNDS: usize = 8;

/// At least 256 elements are permuted and walked, so that even three samples are shuffled well.
const HALF_BITS_MIN: u32 = 4;

/// A position in a run: everything the order needs to go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// Passes over the data finished.
    pub epoch: u32,
    /// Global batches of this epoch finished.
    pub step: u64,
}

/// An order that cannot be.
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
}

/// The order of a data set: which samples make up each global batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Samples that come.
    samples: u64,
    /// Samples of the data set: more than come only where a part is spaced evenly over it.
    of: u64,
    batch: u64,
    seed: Option<u64>,
}

impl Order {
    /// Shuffled by `seed`, anew each epoch; a last partial batch is dropped (which samples that
    /// leaves out changes with the epoch).
    pub fn shuffled(samples: u64, batch: u64, seed: u64) -> Result<Order, OrderError> {
        match (samples, batch) {
            (_, 0) => Err(OrderError::NoBatch),
            (0, _) => Err(OrderError::Empty),
            _ if samples < batch => Err(OrderError::Short { samples, batch }),
            _ => Ok(Order { samples, of: samples, batch, seed: Some(seed) }),
        }
    }

    /// In the order of the shards, every sample once, the last batch short if need be: evaluation.
    pub fn sequential(samples: u64, batch: u64) -> Result<Order, OrderError> {
        match (samples, batch) {
            (_, 0) => Err(OrderError::NoBatch),
            (0, _) => Err(OrderError::Empty),
            _ => Ok(Order { samples, of: samples, batch, seed: None }),
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

    /// Global batches of an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        match self.seed {
            Some(_) => self.samples / self.batch,
            None => self.samples.div_ceil(self.batch),
        }
    }

    /// Samples that come in an epoch, before a last partial batch is dropped.
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

    /// The sample in `slot` of the global batch at `cursor`.
    ///
    /// # Panics
    /// When the cursor lies outside the epoch or the slot outside the batch.
    pub fn sample(&self, cursor: Cursor, slot: u64) -> u64 {
        assert!(!self.is_empty(cursor.step), "step {} is past the epoch", cursor.step);
        assert!(slot < self.len(cursor.step), "slot {slot} of {}", self.len(cursor.step));
        let position = cursor.step * self.batch + slot;
        match self.seed {
            Some(seed) => permute(position, self.samples, mix(seed ^ mix(u64::from(cursor.epoch)))),
            // Below `of`, since the position is below `samples`.
            None => (u128::from(position) * u128::from(self.of) / u128::from(self.samples)) as u64,
        }
    }

    /// The sample that takes the place of a bad one at the `attempt`-th try: as much a function of
    /// identity as the order itself, so a resumed run substitutes alike.
    pub fn substitute(&self, cursor: Cursor, slot: u64, attempt: u32) -> u64 {
        let words = [u64::from(cursor.epoch), cursor.step, slot, u64::from(attempt)];
        let start = self.seed.unwrap_or(0) ^ 0x5355_4253_5449_5455; // its own stream: "SUBSTITU"
        let hash = words.iter().fold(start, |state, word| mix(state ^ mix(*word)));
        hash % self.samples
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
        slots.map(|slot| order.sample(cursor, slot)).collect()
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

    #[test]
    fn orders_that_cannot_be_are_refused() {
        assert_eq!(Order::shuffled(0, 4, 0), Err(OrderError::Empty));
        assert_eq!(Order::shuffled(3, 4, 0), Err(OrderError::Short { samples: 3, batch: 4 }));
        assert_eq!(Order::shuffled(3, 0, 0), Err(OrderError::NoBatch));
        assert_eq!(Order::spaced(3, 0, 1), Err(OrderError::Empty));
    }
}
