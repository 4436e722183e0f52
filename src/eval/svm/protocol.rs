//! The published protocol on rows of features: a cost a class by 3-fold cross-validation, then a test.
//!
//! As OpenSelfSup's, mmselfsup's and VISSL's scripts do it, which came from FAIR's benchmark:
//! - rows over their length plus 1e-5;
//! - `LinearSVC` with squared hinge, positive samples twice as heavy, the bias regularised;
//! - of each class the cost with the highest mean of three folds' average precision, the first one of equals. Folds
//!   are stratified and follow the order of samples; this average precision is scikit-learn's step sum;
//! - machines of the chosen costs, trained on all samples, are tested by another average precision, the area below
//!   the curve made monotone.
//!
//! An asymmetry belongs to it: samples that show a class only as a difficult object count as negative ones in
//! training and are left out in the test ([`Difficult::AsPublished`]).

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::precision::{interpolated, step_sum};
use super::{Gram, POSITIVE_WEIGHT, SvmError, check, columns, folds, lists, minimise, normalised};

/// Whether a sample shows a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Label {
    /// It does.
    Present,
    /// It does not.
    Absent,
    /// Only in objects marked as difficult.
    Difficult,
}

/// What becomes of difficult samples in training. The test leaves them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Difficult {
    /// They are negative ones, as in the published numbers.
    AsPublished,
    /// They are left out of training too.
    Ignore,
}

/// The protocol's free choices.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Costs to choose from; of equally good ones the first.
    pub costs: Vec<f64>,
    /// Folds of the cross-validation.
    pub folds: usize,
    /// Difficult samples in training.
    pub difficult: Difficult,
}

/// What was found of a class.
#[derive(Clone, Debug, PartialEq)]
pub struct OfClass {
    /// Average precision in the test, in percent.
    pub ap: f64,
    /// The chosen cost.
    pub cost: f64,
    /// Mean average precision of the folds, in percent, a cost.
    pub curve: Vec<f64>,
    /// Training samples that show it.
    pub positives: usize,
}

/// How far the work is, in its own units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Steps done: a cost each, and the test.
    pub done: usize,
    /// Steps in all.
    pub total: usize,
}

/// A set: rows `[n, d]` as the network gives them, and of each class a label a row.
#[derive(Debug)]
pub struct Set<'a> {
    /// Features.
    pub rows: &'a Tensor,
    /// Labels.
    pub labels: &'a [Vec<Label>],
}

/// Targets of training: 1, -1, and 0 for what is left out.
fn target(label: Label, difficult: Difficult) -> f64 {
    match (label, difficult) {
        (Label::Present, _) => 1.0,
        (Label::Absent, _) | (Label::Difficult, Difficult::AsPublished) => -1.0,
        (Label::Difficult, Difficult::Ignore) => 0.0,
    }
}

/// Weights cᵢ over the cost of targets 1, -1, 0.
pub(super) fn weight(target: f64) -> f64 {
    if target > 0.0 { POSITIVE_WEIGHT } else { target.abs() }
}

/// Targets 1 and -1 for the solver, which leaves out by weights.
pub(super) fn sign(target: f64) -> f64 {
    if target > 0.0 { 1.0 } else { -1.0 }
}

/// Chooses costs on `train`, trains, and tests on `test`. `watch` hears of each step and may ask for the end, which
/// gives none.
///
/// # Errors
/// [`SvmError`], of a class by its place.
pub fn evaluate(
    train: &Set<'_>,
    test: &Set<'_>,
    settings: &Settings,
    watch: &mut dyn FnMut(Stage) -> ControlFlow<()>,
) -> Result<Option<Vec<OfClass>>, SvmError> {
    check(train.rows, train.labels, &settings.costs)?;
    check(test.rows, test.labels, &settings.costs)?;
    let classes = train.labels.len();
    let total = settings.costs.len() + 2;
    let rows = normalised(train.rows);
    let gram = Gram::of(&rows);
    let targets: Vec<Vec<f64>> = train
        .labels
        .iter()
        .map(|labels| labels.iter().map(|label| target(*label, settings.difficult)).collect())
        .collect();
    if watch(Stage { done: 1, total }).is_break() {
        return Ok(None);
    }
    let Some(curves) = curves(&gram, &targets, settings, &mut |done| watch(Stage { done, total }))?
    else {
        return Ok(None);
    };
    // The first of the highest, as argmax has it.
    let best = |curve: &Vec<f64>| {
        (0..curve.len()).fold(0, |best, at| if curve[at] > curve[best] { at } else { best })
    };
    let costs: Vec<f64> = curves.iter().map(|curve| settings.costs[best(curve)]).collect();
    let n = gram.len();
    let signs: Vec<Vec<f64>> =
        targets.iter().map(|of| of.iter().copied().map(sign).collect()).collect();
    let weights: Vec<Vec<f64>> = targets
        .iter()
        .zip(&costs)
        .map(|(of, cost)| of.iter().map(|target| cost * weight(*target)).collect())
        .collect();
    let fit = minimise(&gram, &columns(&signs, n), &columns(&weights, n), None)?;
    let decisions = lists(&fit.decide(&rows, &normalised(test.rows)))?;
    let mut found = Vec::with_capacity(classes);
    for (class, curve) in curves.into_iter().enumerate() {
        let labels = test.labels.get(class).map_or(&[][..], Vec::as_slice);
        let ap = tested(&decisions[class], labels).ok_or(SvmError::NoTest { class })?;
        let positives = targets[class].iter().filter(|target| **target > 0.0).count();
        found.push(OfClass { ap: 100.0 * ap, cost: costs[class], curve, positives });
    }
    let _ = watch(Stage { done: total, total }); // there is nothing left to stop
    Ok(Some(found))
}

/// Average precision of a test: difficult samples are left out.
pub(super) fn tested(values: &[f64], labels: &[Label]) -> Option<f64> {
    let kept = || values.iter().zip(labels).filter(|(_, label)| **label != Label::Difficult);
    let values: Vec<f64> = kept().map(|(value, _)| *value).collect();
    let is_positive: Vec<bool> = kept().map(|(_, label)| *label == Label::Present).collect();
    interpolated(&values, &is_positive)
}

/// Mean average precision over folds, in percent, of each class and cost. All classes and folds are one problem of
/// the solver's, along rising costs.
fn curves(
    gram: &Gram,
    targets: &[Vec<f64>],
    settings: &Settings,
    watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Vec<Vec<f64>>>, SvmError> {
    let (mut signs, mut weights, mut held) = (Vec::new(), Vec::new(), Vec::new());
    for (class, of) in targets.iter().enumerate() {
        let kept: Vec<usize> = (0..of.len()).filter(|at| of[*at] != 0.0).collect();
        let is_positive: Vec<bool> = kept.iter().map(|at| of[*at] > 0.0).collect();
        let in_fold = folds::stratified(&is_positive, settings.folds)
            .map_err(|source| SvmError::Class { class, source: Box::new(source) })?;
        for fold in 0..settings.folds {
            let out: Vec<usize> = kept
                .iter()
                .zip(&in_fold)
                .filter(|(_, of)| **of == fold)
                .map(|(at, _)| *at)
                .collect();
            let mut seen: Vec<f64> = of.iter().copied().map(weight).collect();
            out.iter().for_each(|at| seen[*at] = 0.0);
            signs.push(of.iter().copied().map(sign).collect());
            weights.push(seen);
            held.push(out);
        }
    }
    let (signs, weights) = (columns(&signs, gram.len()), columns(&weights, gram.len()));
    let mut rising: Vec<usize> = (0..settings.costs.len()).collect();
    rising.sort_by(|a, b| settings.costs[*a].total_cmp(&settings.costs[*b]));
    let mut curves = vec![vec![0.0; settings.costs.len()]; targets.len()];
    let mut dual: Option<Tensor> = None;
    for (done, at) in rising.into_iter().enumerate() {
        let fit = minimise(gram, &signs, &(&weights * settings.costs[at]), dual.as_ref())?;
        for (column, values) in lists(&fit.decisions)?.into_iter().enumerate() {
            let (class, out) = (column / settings.folds, &held[column]);
            let values: Vec<f64> = out.iter().map(|row| values[*row]).collect();
            let is_positive: Vec<bool> = out.iter().map(|row| targets[class][*row] > 0.0).collect();
            // Each fold has its share of positive samples.
            let ap = step_sum(&values, &is_positive).unwrap_or(0.0);
            curves[class][at] += 100.0 * ap / settings.folds as f64;
        }
        dual = Some(fit.dual);
        if watch(done + 2).is_break() {
            return Ok(None);
        }
    }
    Ok(Some(curves))
}

/// Labels as targets of training for few samples: difficult ones are left out.
pub(super) fn kept(labels: &[Label]) -> Vec<f64> {
    labels.iter().map(|label| target(*label, Difficult::Ignore)).collect()
}
