//! What a step saw: its losses, how far outputs spread, and whether the update was made.
//!
//! Readings are collected on the device and come to the host once a step.

use tch::{Kind, Tensor};

use crate::dist::Collective;
use crate::method::{Design, Scores, StepError, TermDesign};
use crate::optim::Sgd;
use crate::shim::step::Download;

/// One of the loss's terms, averaged over the batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    /// What metrics call it: `res5/gg`.
    pub name: String,
    /// The term itself, without its weight.
    pub loss: f64,
    /// What was read of it, the loss first: `positive`, `accuracy`.
    pub readings: Vec<(&'static str, f64)>,
}

impl Term {
    /// What was read under a name; not a number where nothing was.
    pub fn reading(&self, name: &str) -> f64 {
        let found = self.readings.iter().find(|(known, _)| *known == name);
        found.map_or(f64::NAN, |(_, value)| *value)
    }
}

/// How far the query embeddings of a level spread.
#[derive(Clone, Debug, PartialEq)]
pub struct Spread {
    /// Stage, 2 to 5.
    pub level: u8,
    /// The head: its scope, `global`, or what it is called where a scope has several.
    pub scope: String,
    /// Standard deviation over the batch of all ranks, averaged over the d coordinates; 1/sqrt(d) for
    /// directions spread evenly, 0 for a collapsed encoder.
    pub std: f64,
    /// Coordinates, d.
    pub width: i64,
}

/// What one step saw, averaged over the ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Whether the update was made. If the loss or a gradient is not finite, it is not: weights,
    /// BN statistics, momentum and the keys in the queues are as before the step. Only the key encoder has
    /// moved, whose EMA step comes first, and what the method does before a step is done (SwAV's prototypes
    /// have unit length).
    pub applied: bool,
    /// The loss that was minimised: the sum of the terms times their weights.
    pub loss: f64,
    /// Its terms, in the method's order.
    pub terms: Vec<Term>,
    /// Spread of the outputs of unit length, in the method's order.
    pub embedding_std: Vec<Spread>,
    /// Euclidean length of all gradients together, before weight decay.
    pub gradient_norm: f64,
    /// Whether any rank was asked to stop before the ranks compared notes: all of them know after
    /// the same step.
    pub stop: bool,
}

/// Collects readings on the device; they come to the host once a step.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// `[terms, readings]`, each a mean over as many samples as the others.
    readings: Vec<Tensor>,
    /// The student's outputs whose spread is watched, for each micro-batch.
    outputs: Vec<Vec<Tensor>>,
}

impl Tally {
    /// What was read of a loss; its gradients are handed on.
    pub(crate) fn read(&mut self, scores: Scores) -> Vec<Tensor> {
        self.readings.push(scores.readings);
        scores.gradients
    }

    /// A micro-batch's outputs.
    pub(crate) fn add(&mut self, design: &Design, outputs: &[Tensor]) {
        let watched = design.outputs().zip(outputs).filter(|(head, _)| head.unit);
        self.outputs.push(watched.map(|(_, output)| output.shallow_clone()).collect());
    }

    /// Mean, and mean square, of each coordinate of this rank's outputs of one watched head: `[2, d]` in float64, where
    /// their difference keeps the spread of outputs that have all but collapsed.
    fn moments(&self, index: usize) -> Tensor {
        let parts: Vec<&Tensor> = self.outputs.iter().map(|outputs| &outputs[index]).collect();
        let all = Tensor::cat(&parts, 0).to_kind(Kind::Double);
        Tensor::stack(&[&all, &all.square()], 0).mean_dim(1, false, None)
    }

    /// What comes back to the host, and a truth value on the device: whether all losses and the
    /// gradients are finite, on all ranks.
    pub(crate) fn settle(
        &self,
        world: &dyn Collective,
        design: &Design,
        sgd: &Sgd,
    ) -> Result<(Pending, Tensor), StepError> {
        let watched = design.watched();
        let length = sgd.gradient_norm()?.to_kind(Kind::Double);
        let mut means = tch::no_grad(|| {
            let terms = Tensor::stack(&self.readings, 0).mean_dim(0, false, None);
            let stop = if world.is_asked_to_stop() { 1.0 } else { 0.0 };
            let rest = Tensor::stack(&[length.full_like(stop), length], 0);
            let moments = match watched.as_slice() {
                [] => rest.narrow(0, 0, 0),
                some => {
                    let each = (0..some.len()).map(|index| self.moments(index));
                    Tensor::stack(&each.collect::<Vec<_>>(), 0)
                }
            };
            [terms.flatten(0, -1).to_kind(Kind::Double), moments, rest]
        });
        world.average(&mut means)?; // one collective
        let [terms, moments, rest] = means;
        let (readings, applied) = tch::no_grad(|| {
            let losses = terms.view([-1, design.readings.len() as i64]).select(1, 0);
            let applied = Tensor::cat(&[losses, rest.narrow(0, 1, 1)], 0).isfinite().all();
            let spread = if watched.is_empty() { moments } else { spread(&moments) };
            (Tensor::cat(&[&terms, &spread, &rest], 0), applied)
        });
        let pending = Pending {
            readings: Download::begin(&readings)?,
            terms: design.terms.clone(),
            names: design.readings.clone(),
            spreads: watched
                .into_iter()
                .map(|(head, label)| (head.level, label, head.width))
                .collect(),
        };
        Ok((pending, applied))
    }
}

/// Standard deviation over the batch of all ranks, averaged over the coordinates: `[heads]` of means and mean
/// squares `[heads, 2, d]`.
fn spread(moments: &Tensor) -> Tensor {
    let (mean, square) = (moments.select(1, 0), moments.select(1, 1));
    (square - mean.square()).clamp_min(0.0).sqrt().mean_dim(1, false, None)
}

/// What a step saw, on its way to the host.
#[derive(Debug)]
#[must_use = "whether the update was made is read by `wait`"]
pub struct Pending {
    readings: Download,
    terms: Vec<TermDesign>,
    names: Vec<&'static str>,
    /// Level, name and width of each output that is watched.
    spreads: Vec<(u8, String, i64)>,
}

impl Pending {
    /// Waits until the device has made the update.
    ///
    /// # Errors
    /// When the device failed.
    pub fn wait(self) -> Result<StepReport, StepError> {
        let host = Vec::<f64>::try_from(self.readings.wait()?)
            .expect("a vector of doubles on the host converts");
        let columns = self.names.len();
        let (of_terms, rest) = host.split_at(self.terms.len() * columns);
        let weights: Vec<f64> = self.terms.iter().map(|term| term.weight).collect();
        let term = |(design, values): (TermDesign, &[f64])| {
            let readings = self.names.iter().copied().zip(values.iter().copied()).collect();
            Term { name: design.name, loss: values[0], readings }
        };
        let terms: Vec<Term> =
            self.terms.into_iter().zip(of_terms.chunks_exact(columns)).map(term).collect();
        let loss = weights.iter().zip(&terms).map(|(weight, term)| weight * term.loss).sum();
        let spread = |((level, scope, width), &std): ((u8, String, i64), &f64)| Spread {
            level,
            scope,
            std,
            width,
        };
        let embedding_std = self.spreads.into_iter().zip(rest).map(spread).collect();
        let (stop, gradient_norm) = (rest[rest.len() - 2] > 0.0, rest[rest.len() - 1]);
        let applied = terms.iter().all(|term| term.loss.is_finite()) && gradient_norm.is_finite();
        Ok(StepReport { applied, loss, terms, embedding_std, gradient_norm, stop })
    }
}
