//! The low-shot protocol: machines from k positive and 19 k negative samples a class, several times.
//!
//! As FAIR's challenge, OpenSelfSup and VISSL have it: the same machine as [`super::protocol`], difficult samples left
//! out throughout, and one cost for all classes, the one with the best mean over trials *in the test*. What that is
//! worth is seen beside a cost that nobody chose ([`OfShots::fixed`]).

use std::ops::ControlFlow;

use tch::Tensor;

use super::protocol::{Label, Set, Stage, kept, sign, tested, weight};
use super::{Gram, SvmError, check, columns, lists, minimise, normalised};
use crate::draws::Draws;

/// k in the published tables.
pub const SHOTS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 96];
/// Negative samples for each positive one.
const NEGATIVES: usize = 19;

/// The samples of one trial: of each class a label a training row, [`Label::Difficult`] for those left out.
pub type Trial = Vec<Vec<Label>>;

/// Draws a trial from labels of the whole training set, by (seed, k, class, trial) alone.
///
/// # Errors
/// [`SvmError::Shots`], [`SvmError::TooFew`].
pub fn draw(labels: &[Vec<Label>], k: usize, seed: u64, trial: u64) -> Result<Trial, SvmError> {
    if k == 0 {
        return Err(SvmError::Shots { k });
    }
    let of_class = |(class, labels): (usize, &Vec<Label>)| {
        let of = |kind: Label| (0..labels.len()).filter(move |row| labels[*row] == kind);
        let pools: [Vec<usize>; 2] = [Label::Present, Label::Absent].map(|kind| of(kind).collect());
        let [positives, negatives] = [pools[0].len(), pools[1].len()];
        if positives < k || negatives < k.saturating_mul(NEGATIVES) {
            return Err(SvmError::TooFew { class, k, positives, negatives });
        }
        let mut drawn = vec![Label::Difficult; labels.len()];
        let counts = [(Label::Present, k), (Label::Absent, NEGATIVES * k)];
        for (pool, (label, count)) in pools.iter().zip(counts) {
            let mut draws = Draws::new(seed, &format!("low-shot {k} {class} {label:?}"), trial);
            for place in draws.permutation(pool.len()).into_iter().take(count) {
                drawn[pool[place as usize]] = label; // of a permutation of 0..len
            }
        }
        Ok(drawn)
    };
    labels.iter().enumerate().map(of_class).collect()
}

/// Mean, extremes and deviation over trials of the mean average precision, in percent.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Spread {
    /// Cost of all machines.
    pub cost: f64,
    /// Mean.
    pub mean: f64,
    /// Lowest.
    pub min: f64,
    /// Highest.
    pub max: f64,
    /// Deviation, over n as NumPy's `std` has it.
    pub std: f64,
    /// The trials themselves.
    pub trials: Vec<f64>,
}

/// What was found with k positive samples a class.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct OfShots {
    /// Positive samples a class.
    pub k: usize,
    /// At the cost with the best mean in the test, as published.
    pub test: Spread,
    /// At a cost that was fixed before.
    pub fixed: Spread,
    /// Mean over trials, in percent, a cost.
    pub curve: Vec<f64>,
}

/// The protocol's free choices.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Costs of which the test chooses; of equally good ones the first.
    pub costs: Vec<f64>,
    /// The cost of [`OfShots::fixed`].
    pub fixed: f64,
}

/// Trains and tests machines on the trials of each k. `rows` are the training set's features; `watch` hears of each
/// step, and may ask for the end, which gives none.
///
/// # Errors
/// [`SvmError`], of a class by its place.
pub fn evaluate(
    rows: &Tensor,
    trials: &[(usize, Vec<Trial>)],
    test: &Set<'_>,
    settings: &Settings,
    watch: &mut dyn FnMut(Stage) -> ControlFlow<()>,
) -> Result<Option<Vec<OfShots>>, SvmError> {
    check(test.rows, test.labels, &settings.costs)?;
    check(test.rows, &[], &[settings.fixed])?;
    let mut costs = settings.costs.clone();
    costs.push(settings.fixed);
    let total = 1 + trials.len() * costs.len();
    let rows = normalised(rows);
    let gram = Gram::of(&rows);
    let cross = normalised(test.rows).matmul(&rows.transpose(0, 1)).g_add_scalar_(1.0);
    drop(rows);
    let mut done = 1;
    if watch(Stage { done, total }).is_break() {
        return Ok(None);
    }
    let mut found = Vec::with_capacity(trials.len());
    for (k, of) in trials {
        let mut tick = || {
            done += 1;
            watch(Stage { done, total })
        };
        let Some(figures) = figures(&gram, &cross, of, test, &costs, &mut tick)? else {
            return Ok(None);
        };
        found.push(of_shots(*k, &figures, settings));
    }
    Ok(Some(found))
}

/// Mean average precision in percent of each trial, a cost.
fn figures(
    gram: &Gram,
    cross: &Tensor,
    trials: &[Trial],
    test: &Set<'_>,
    costs: &[f64],
    tick: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Option<Vec<Vec<f64>>>, SvmError> {
    let targets: Vec<Vec<f64>> = trials.iter().flatten().map(|labels| kept(labels)).collect();
    for (column, of) in targets.iter().enumerate() {
        if of.len() != gram.len() {
            let (labels, rows) = (of.len(), gram.len() as i64);
            return Err(SvmError::Labels {
                class: column % test.labels.len().max(1),
                labels,
                rows,
            });
        }
    }
    // Rows that any machine sees.
    let seen = |row: &i64| targets.iter().any(|of| of[*row as usize] != 0.0);
    let seen: Vec<i64> = (0..gram.len() as i64).filter(seen).collect();
    let of_seen = |of: &Vec<f64>, change: fn(f64) -> f64| {
        seen.iter().map(|row| change(of[*row as usize])).collect::<Vec<f64>>()
    };
    let signs: Vec<Vec<f64>> = targets.iter().map(|of| of_seen(of, sign)).collect();
    let weights: Vec<Vec<f64>> = targets.iter().map(|of| of_seen(of, weight)).collect();
    let (signs, weights) = (columns(&signs, seen.len()), columns(&weights, seen.len()));
    let seen = Tensor::from_slice(&seen);
    let (gram, cross) = (gram.part(&seen), cross.index_select(1, &seen));
    let mut rising: Vec<usize> = (0..costs.len()).collect();
    rising.sort_by(|a, b| costs[*a].total_cmp(&costs[*b]));
    let classes = test.labels.len();
    let mut figures = vec![vec![0.0; costs.len()]; trials.len()];
    let mut dual: Option<Tensor> = None;
    for at in rising {
        let fit = minimise(&gram, &signs, &(&weights * costs[at]), dual.as_ref())?;
        for (column, values) in lists(&cross.matmul(&fit.dual))?.iter().enumerate() {
            let (trial, class) = (column / classes, column % classes);
            let ap = tested(values, &test.labels[class]).ok_or(SvmError::NoTest { class })?;
            figures[trial][at] += 100.0 * ap / classes as f64;
        }
        dual = Some(fit.dual);
        if tick().is_break() {
            return Ok(None);
        }
    }
    Ok(Some(figures))
}

/// The last cost of `figures` is the fixed one.
fn of_shots(k: usize, figures: &[Vec<f64>], settings: &Settings) -> OfShots {
    let of = |at: usize| figures.iter().map(|trial| trial[at]).collect::<Vec<f64>>();
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len().max(1) as f64;
    let spread = |at: usize, cost: f64| {
        let trials = of(at);
        let mean = mean(&trials);
        let square = trials.iter().map(|one| (one - mean).powi(2)).sum::<f64>();
        Spread {
            cost,
            mean,
            min: trials.iter().copied().fold(f64::INFINITY, f64::min),
            max: trials.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            std: (square / trials.len().max(1) as f64).sqrt(),
            trials,
        }
    };
    let n = settings.costs.len();
    let curve: Vec<f64> = (0..n).map(|at| mean(&of(at))).collect();
    let best = (0..n).fold(0, |best, at| if curve[at] > curve[best] { at } else { best });
    OfShots { k, test: spread(best, settings.costs[best]), fixed: spread(n, settings.fixed), curve }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_have_their_counts_and_addresses() {
        let label = |row: usize, class: usize| match (row * 7 + class) % 10 {
            0 => Label::Difficult,
            1..=3 => Label::Present,
            _ => Label::Absent,
        };
        let of = |class| (0..400).map(|row| label(row, class)).collect::<Vec<Label>>();
        let labels = vec![of(0), of(1)];
        let trial = draw(&labels, 4, 1, 0).unwrap();
        for (drawn, labels) in trial.iter().zip(&labels) {
            let count = |kind| drawn.iter().filter(|one| **one == kind).count();
            assert_eq!([count(Label::Present), count(Label::Absent)], [4, 76]);
            let right =
                |(drawn, label): (&Label, &Label)| *drawn == Label::Difficult || drawn == label;
            assert!(drawn.iter().zip(labels).all(right));
        }
        assert_eq!(trial, draw(&labels, 4, 1, 0).unwrap());
        assert_ne!(trial, draw(&labels, 4, 1, 1).unwrap());
        assert_ne!(trial, draw(&labels, 4, 2, 0).unwrap());
        let error = draw(&labels, 20, 1, 0).unwrap_err().to_string();
        assert!(error.contains("are fewer than k = 20 and 19 k = 380"), "{error}");
    }
}
