//! Load split between the batch decoder and the workers, which decode one by one beside it.
//!
//! Which images go there is a function of epoch, sample and share, so a fixed share gives the same
//! pixels in every run, with any number of workers, also where the two decoders differ by a rounding.
//! A measured share depends on the machine's load in the first seconds, so runs that must be repeatable bit by
//! bit fix it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::order::mix;

/// How suitable images are split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Share {
    /// Half and half until some hundred images of each way are timed, then what keeps both busy.
    #[default]
    Measure,
    /// This share, from 0 to 1, goes to the batch decoder.
    Fixed(f64),
}

/// Images of each way whose time is taken: about two batches, so a second or less.
const MEASURED_MIN: u64 = 512;

/// Images of each way before that: decoders allocate as they see their first ones.
const WARM_UP: u64 = 64;

/// Images of both ways together after which what was timed is enough: one of them is rare, and its
/// share does not matter much.
const MEASURED_MAX: u64 = 16_384;

/// The share while it is measured.
const AT_FIRST: f64 = 0.5;

/// The share of what the batch decoder takes that should go to it, so that it and the workers are
/// done at the same time: from the images a second that each decodes, and the share `eligible` of
/// all images that the batch decoder takes.
///
/// Of all images, b/(b+s) go to the one that decodes b a second beside the one that decodes s.
/// Where fewer are eligible all of those go. A decoder that does nothing gets nothing.
pub fn balance(batched_per_s: f64, single_per_s: f64, eligible: f64) -> f64 {
    let positive = |rate: f64| if rate.is_finite() { rate.max(0.0) } else { 0.0 };
    let (batched, single) = (positive(batched_per_s), positive(single_per_s));
    let eligible = positive(eligible).min(1.0);
    if batched == 0.0 || eligible == 0.0 {
        return 0.0;
    }
    (batched / (batched + single) / eligible).min(1.0)
}

/// A share, as the test of one sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Portion(f64);

impl Portion {
    /// Whether a sample of an epoch belongs to it.
    pub(super) fn takes(self, (epoch, sample): (u32, u64)) -> bool {
        // 53 bits: the largest hash is still below 1.
        let hash = mix(sample ^ mix(u64::from(epoch))) >> 11;
        (hash as f64) < self.0 * (1_u64 << 53) as f64
    }
}

/// Measures both decoders until the share is known.
#[derive(Debug)]
pub(super) struct Meter {
    /// The bits of the share; [`UNKNOWN`] while it is measured.
    share: AtomicU64,
    workers: usize,
    measured: Mutex<Measured>,
}

/// The bits of no share: a NaN.
const UNKNOWN: u64 = u64::MAX;

#[derive(Debug, Default)]
struct Measured {
    batched: Timed,
    single: Timed,
    /// Of the single ones, those that the batch decoder would have taken.
    single_eligible: u64,
}

#[derive(Debug, Default)]
struct Timed {
    seen: u64,
    images: u64,
    time: Duration,
}

impl Timed {
    fn add(&mut self, images: u64, time: Duration) {
        // The first ones only warm up.
        if self.seen >= WARM_UP {
            self.images += images;
            self.time += time;
        }
        self.seen += images;
    }

    fn per_s(&self) -> f64 {
        self.images as f64 / self.time.as_secs_f64()
    }
}

impl Meter {
    /// A meter for this many workers.
    pub(super) fn new(share: Share, workers: usize) -> Meter {
        let share = match share {
            Share::Measure => UNKNOWN,
            Share::Fixed(share) => share.clamp(0.0, 1.0).to_bits(),
        };
        Meter { share: AtomicU64::new(share), workers, measured: Mutex::default() }
    }

    /// The share, once it is known.
    pub(super) fn share(&self) -> Option<f64> {
        let bits = self.share.load(Ordering::Relaxed);
        (bits != UNKNOWN).then(|| f64::from_bits(bits))
    }

    /// The share to use now.
    pub(super) fn current(&self) -> Portion {
        Portion(self.share().unwrap_or(AT_FIRST))
    }

    /// A worker took this long for one image; whether the batch decoder would have taken it.
    pub(super) fn single(&self, time: Duration, eligible: bool) {
        if self.share().is_none() {
            let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
            measured.single.add(1, time);
            measured.single_eligible += u64::from(eligible);
            self.settle(&measured);
        }
    }

    /// The batch decoder took this long for so many images.
    pub(super) fn batch(&self, images: usize, time: Duration) {
        if self.share().is_none() {
            let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
            measured.batched.add(images as u64, time);
            self.settle(&measured);
        }
    }

    fn settle(&self, measured: &Measured) {
        let Measured { batched, single, single_eligible } = measured;
        let few = batched.images < MEASURED_MIN || single.images < MEASURED_MIN;
        if few && batched.seen + single.seen < MEASURED_MAX {
            return;
        }
        let all = (batched.seen + single.seen) as f64;
        let eligible = (batched.seen + single_eligible) as f64 / all;
        // Workers decode beside each other.
        let single = single.per_s() * self.workers as f64;
        let share = balance(batched.per_s(), single, eligible);
        self.share.store(share.to_bits(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_decoders_are_done_at_the_same_time() {
        for (batched, single, eligible, share) in [
            (3000.0, 1000.0, 1.0, 0.75),
            (1000.0, 3000.0, 1.0, 0.25),
            (1000.0, 1000.0, 0.8, 0.625),
            // A third is eligible, two thirds would be its part: all of the third.
            (2000.0, 1000.0, 1.0 / 3.0, 1.0),
            (1000.0, 0.0, 1.0, 1.0),
            (0.0, 1000.0, 1.0, 0.0),
            (0.0, 0.0, 1.0, 0.0),
            (1000.0, 1000.0, 0.0, 0.0),
            (f64::NAN, 1000.0, 1.0, 0.0),
            (f64::INFINITY, 1000.0, 1.0, 0.0),
        ] {
            let found = balance(batched, single, eligible);
            assert!((found - share).abs() < 1e-12, "{batched}, {single}, {eligible}: {found}");
        }
    }

    #[test]
    fn a_portion_takes_its_share_and_the_same_samples_each_time() {
        for share in [0.0, 0.1, 0.5, 0.9, 1.0] {
            let portion = Portion(share);
            let taken = (0..20_000).filter(|id| portion.takes((3, *id))).count() as f64;
            assert!((taken / 20_000.0 - share).abs() < 0.02, "{share}: {taken}");
        }
        let taken = |epoch| (0..100).filter(|id| Portion(0.5).takes((epoch, *id))).collect();
        let (one, again, other): (Vec<u64>, Vec<u64>, Vec<u64>) = (taken(1), taken(1), taken(2));
        assert!(one == again && one != other);
        // What a smaller share takes, a larger one takes as well.
        assert!((0..1000).all(|id| !Portion(0.3).takes((0, id)) || Portion(0.6).takes((0, id))));
    }

    #[test]
    fn the_share_is_measured_after_a_warm_up_and_then_stays() {
        let meter = Meter::new(Share::Measure, 4);
        // The first images of each way are slow, and do not count.
        meter.batch(WARM_UP as usize, Duration::from_secs(60));
        for _ in 0..WARM_UP {
            meter.single(Duration::from_secs(60), true);
        }
        assert_eq!((meter.share(), meter.current()), (None, Portion(AT_FIRST)));
        // Four workers at 500 a second each, beside 6,000 a second.
        meter.batch(600, Duration::from_millis(100));
        for _ in 0..MEASURED_MIN {
            assert_eq!(meter.share(), None);
            meter.single(Duration::from_millis(2), true);
        }
        let share = meter.share().expect("both were timed");
        assert!((share - 0.75).abs() < 1e-9, "{share}");
        meter.batch(600, Duration::from_secs(600));
        assert_eq!(meter.share(), Some(share));
        assert_eq!(Meter::new(Share::Fixed(2.0), 1).share(), Some(1.0));
        // Measuring ends, also where one of them has nothing to do.
        let idle = Meter::new(Share::Measure, 1);
        for _ in 0..MEASURED_MAX {
            assert_eq!(idle.share(), None);
            idle.single(Duration::from_millis(2), false);
        }
        assert_eq!(idle.share(), Some(0.0));
    }
}
