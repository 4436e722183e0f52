//! Rates over time, of counts that were taken every so often.

use std::time::{Duration, Instant};

/// Number of equal parts of the measured time, for each of which images/s are given.
const WINDOWS: usize = 5;

/// A moment, and the images finished by then.
pub(super) type Tick = (Instant, u64);

/// Images finished by a moment, between the ticks around it.
fn images_at(ticks: &[Tick], moment: Instant) -> f64 {
    let after = ticks.partition_point(|(at, _)| *at <= moment);
    match (after.checked_sub(1).map(|before| ticks[before]), ticks.get(after)) {
        (Some((from, low)), Some((to, high))) => {
            let share = (moment - from).as_secs_f64() / (*to - from).as_secs_f64().max(1e-9);
            low as f64 + share * (high - low) as f64
        }
        (Some((_, images)), None) | (None, Some(&(_, images))) => images as f64,
        (None, None) => 0.0,
    }
}

/// Images a second of [`WINDOWS`] equal parts.
pub(super) fn windows(ticks: &[Tick], start: Instant, end: Instant) -> Vec<f64> {
    let length = (end - start).as_secs_f64() / WINDOWS as f64;
    let edge = |i: usize| images_at(ticks, start + Duration::from_secs_f64(length * i as f64));
    (0..WINDOWS).map(|i| (edge(i + 1) - edge(i)) / length.max(1e-9)).collect()
}

/// Images a second over time up to `end`, in at most 120 steps of at least a tenth of a second;
/// times count from `zero`.
pub(super) fn series(ticks: &[Tick], zero: Instant, end: Instant) -> Vec<[f64; 2]> {
    const STEPS_MAX: f64 = 120.0;
    let Some((first, _)) = ticks.first() else { return Vec::new() };
    let length = end.saturating_duration_since(*first).as_secs_f64();
    let before = zero.saturating_duration_since(*first).as_secs_f64();
    let step = (length / STEPS_MAX).max(0.1);
    let steps = (length / step) as usize;
    let images = |i: usize| images_at(ticks, *first + Duration::from_secs_f64(step * i as f64));
    (1..=steps).map(|i| [step * i as f64 - before, (images(i) - images(i - 1)) / step]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_and_series_follow_the_counts() {
        let begin = Instant::now();
        let at = |seconds: f64| begin + Duration::from_secs_f64(seconds);
        // 100 images/s for a second, then 50.
        let ticks: Vec<Tick> = (0..=40)
            .map(|i| f64::from(i) * 0.05)
            .map(|s| (at(s), (100.0 * s.min(1.0) + 50.0 * (s - 1.0).max(0.0)).round() as u64))
            .collect();
        let found = windows(&ticks, at(0.5), at(1.5));
        assert_eq!(found.len(), WINDOWS);
        for (rate, expected) in found.iter().zip([100.0, 100.0, 75.0, 50.0, 50.0]) {
            assert!((rate - expected).abs() < 4.0, "{found:?}");
        }
        let series = series(&ticks, at(1.0), at(2.0));
        assert!(series.len() >= 19 && series[0][0] < -0.85, "{series:?}");
        assert!((series[2][1] - 100.0).abs() < 1.0 && (series[15][1] - 50.0).abs() < 6.0);
        assert_eq!(images_at(&[], begin), 0.0);
        assert_eq!(images_at(&ticks, at(9.0)), 150.0);
    }
}
