//! Tests of orders.

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
