//! Linear support vector machines on fixed features: one a class, as VOC 2007 is classified with.
//!
//! Rows, labels and costs in, average precisions out; where rows come from is not known here. [`solve`] finds the
//! minimum, [`protocol`] chooses a cost by cross-validation and tests, [`lowshot`] does it with few samples.

pub mod folds;
pub mod lowshot;
pub mod precision;
pub mod protocol;
pub mod solve;

use tch::{Kind, Tensor};
use thiserror::Error;

pub use protocol::{Difficult, Label, OfClass, Settings, Stage, evaluate};
pub use solve::{Fit, Gram, minimise};

/// Why there is no machine, or no figure.
#[derive(Debug, Error)]
pub enum SvmError {
    /// Targets or weights that are not one row a row of the Gram matrix.
    #[error(
        "{rows} rows, targets {targets:?}, weights {weights:?}: expected one row of each a row"
    )]
    Shape {
        /// Rows of the Gram matrix.
        rows: i64,
        /// Shape of the targets.
        targets: Vec<i64>,
        /// Shape of the weights.
        weights: Vec<i64>,
    },
    /// A feature, or a cost, is NaN or infinite.
    #[error("features or costs are not finite")]
    NotFinite,
    /// Rounding keeps a machine from its minimum.
    #[error(
        "a support vector machine is not at its minimum after {steps} Newton steps: its gradient is {left:.1e} of \
         its weights: lower the highest cost"
    )]
    NotConverged {
        /// Newton steps.
        steps: usize,
        /// Length of the gradient as a share of ‖w‖.
        left: f64,
    },
    /// Too few samples of a kind to cross-validate.
    #[error(
        "{positives} with the class and {negatives} without: cross-validation in {folds} folds needs at least {folds} \
         of both"
    )]
    Folds {
        /// Folds.
        folds: usize,
        /// Samples with the class.
        positives: usize,
        /// Samples without.
        negatives: usize,
    },
    /// As [`SvmError::Folds`], of a class by its place.
    #[error("class {class}: {source}")]
    Class {
        /// Place of the class.
        class: usize,
        /// Why.
        source: Box<SvmError>,
    },
    /// A class without a test sample.
    #[error("class {class}: no test sample has it")]
    NoTest {
        /// Place of the class.
        class: usize,
    },
    /// Labels and rows that do not match.
    #[error("class {class}: {labels} labels for {rows} rows of features")]
    Labels {
        /// Place of the class.
        class: usize,
        /// Labels.
        labels: usize,
        /// Rows.
        rows: i64,
    },
    /// No cost, or one that is none.
    #[error("cost {cost}: expected numbers above 0")]
    Cost {
        /// The cost.
        cost: f64,
    },
    /// A k that the samples do not have.
    #[error("k = {k}: expected 1 or more")]
    Shots {
        /// k.
        k: usize,
    },
    /// Too few samples to draw from.
    #[error(
        "class {class}: {positives} with the class and {negatives} without are fewer than k = {k} and 19 k = {}",
        19 * k
    )]
    TooFew {
        /// Place of the class.
        class: usize,
        /// k.
        k: usize,
        /// Samples with the class.
        positives: usize,
        /// Samples without.
        negatives: usize,
    },
}

/// Costs as OpenSelfSup's scripts list them, in their order: 1, 10, 100, 0.5⁴ … 0.5¹⁹.
pub fn costs_openselfsup() -> Vec<f64> {
    [1.0, 10.0, 100.0].into_iter().chain((4..20).map(|power| 0.5_f64.powi(power))).collect()
}

/// Costs as VISSL's configuration lists them.
pub const COSTS_VISSL: [f64; 11] =
    [0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0];

/// How much more a positive sample weighs than a negative one (`class_weight={1: 2, -1: 1}`).
pub const POSITIVE_WEIGHT: f64 = 2.0;

/// Rows over their length plus 1e-5, in float64.
pub fn normalised(rows: &Tensor) -> Tensor {
    let rows = rows.to_kind(Kind::Double);
    let length = rows.norm_scalaropt_dim(2.0, [1], true) + 1e-5;
    rows / length
}

/// Checks that each class has a label a row, and that costs are numbers above 0.
fn check(rows: &Tensor, labels: &[Vec<Label>], costs: &[f64]) -> Result<(), SvmError> {
    let rows = rows.size().first().copied().unwrap_or(0);
    for (class, of) in labels.iter().enumerate() {
        if i64::try_from(of.len()) != Ok(rows) {
            return Err(SvmError::Labels { class, labels: of.len(), rows });
        }
    }
    let bad = |cost: &&f64| !(cost.is_finite() && **cost > 0.0);
    match (costs.is_empty(), costs.iter().find(bad)) {
        (true, _) => Err(SvmError::Cost { cost: f64::NAN }),
        (_, Some(cost)) => Err(SvmError::Cost { cost: *cost }),
        _ => Ok(()),
    }
}

/// Columns of numbers, `[n, m]`, m lists of n.
fn columns(of: &[Vec<f64>], rows: usize) -> Tensor {
    let flat: Vec<f64> = of.concat();
    Tensor::from_slice(&flat).view([of.len() as i64, rows as i64]).transpose(0, 1).contiguous()
}

/// The columns of `[n, m]` as lists.
fn lists(of: &Tensor) -> Result<Vec<Vec<f64>>, SvmError> {
    let rows = usize::try_from(of.size()[0]).unwrap_or(0);
    let flat = Vec::<f64>::try_from(of.transpose(0, 1).contiguous().flatten(0, -1));
    let flat = flat.map_err(|_| SvmError::NotFinite)?;
    Ok(flat.chunks(rows.max(1)).map(<[f64]>::to_vec).collect())
}
