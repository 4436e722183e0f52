//! Linear classification on frozen features, by three protocols: MoCo's, OpenSelfSup's of each level, and logistic
//! regression on features that are made once.

pub mod heads;
pub mod newton;

mod cached;
mod sgd;
mod state;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use detco_shards::format::ShardError;
use detco_shards::order::OrderError;
use detco_shards::pipeline::PipelineError;
use detco_shards::stream::ShardSet;
use tch::{Kind, TchError, Tensor};
use thiserror::Error;

pub use self::cached::top1_of_rows;
pub use self::sgd::Sgd;
use crate::eval::classes::{Classes, NothingInCommon};
use crate::eval::features::{FeaturesError, Look, Pool};
use crate::model::Encoder;
use crate::shim::ShimError;

/// Why there is no figure.
#[derive(Debug, Error)]
pub enum LinearError {
    /// Samples gave no features.
    #[error(transparent)]
    Features(#[from] FeaturesError),
    /// A set is too small.
    #[error("the {which} set cannot be read: {source}")]
    Order {
        /// `train` or `test`.
        which: &'static str,
        /// Why.
        source: OrderError,
    },
    /// Each test sample would count as wrong.
    #[error(
        "no class of the test set is in the train set: {} there, {} here. The names are those of the \
         class folders that the sets were packed from",
        .0.train,
        .0.test
    )]
    NothingInCommon(NothingInCommon),
    /// One class cannot be told from another.
    #[error("the train set has {0} class: a classifier needs two")]
    Classes(usize),
    /// A training sample of a class that the set does not name.
    #[error(
        "{shard}: sample {key:?} has the class {class}, and the train set names {count} classes"
    )]
    Class {
        /// The shard.
        shard: String,
        /// The sample's key in it.
        key: String,
        /// Its class.
        class: u32,
        /// Classes of the set.
        count: i64,
    },
    /// Nothing to choose with.
    #[error(
        "the train set has {samples} samples: to choose among several {what} one in {one_in} is held out, which takes \
         {one_in} or more"
    )]
    Few {
        /// Samples.
        samples: usize,
        /// One in so many is held out.
        one_in: u64,
        /// Of what there are several.
        what: &'static str,
    },
    /// Weights or features that are no numbers.
    #[error(
        "the features of Res{level} of the {which} set are not finite: the backbone has diverged"
    )]
    NotFinite {
        /// The level.
        level: u8,
        /// `train` or `test`.
        which: &'static str,
    },
    /// A state of something else.
    #[error(
        "{path} is the state of another evaluation (other weights, data or settings): name another --state, or remove it"
    )]
    State {
        /// The file.
        path: PathBuf,
    },
    /// A state that cannot be written or read.
    #[error("cannot {verb} {path}: {source}")]
    Io {
        /// `read`, `write`.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// libtorch failed, as where memory ends.
    #[error(transparent)]
    Shim(#[from] ShimError),
}

impl From<TchError> for LinearError {
    fn from(error: TchError) -> LinearError {
        LinearError::Shim(error.into())
    }
}

impl From<ShardError> for LinearError {
    fn from(error: ShardError) -> LinearError {
        LinearError::Features(error.into())
    }
}

impl From<PipelineError> for LinearError {
    fn from(error: PipelineError) -> LinearError {
        LinearError::Features(FeaturesError::Pipeline(Box::new(error)))
    }
}

/// How classifiers are trained.
#[derive(Clone, Debug, PartialEq)]
pub enum How {
    /// By SGD on augmented images.
    Sgd(Sgd),
    /// To the minimum of a logistic regression, on features of image centres that are made once. The cost C is the one
    /// of these that is best on a tenth of the training samples, then all of them are used.
    Cached {
        /// Costs in rising order.
        costs: Vec<f64>,
    },
}

/// What is measured, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearOptions {
    /// How classifiers are trained.
    pub how: How,
    /// Levels, one classifier each: 2 for Res2 to 5 for Res5.
    pub levels: Vec<u8>,
    /// How their maps become rows.
    pub pool: Pool,
    /// How test samples are looked at, and the training samples of [`How::Cached`].
    pub look: Look,
    /// With [`How::Cached`], at most this many samples of each set, evenly spaced; 0 means all.
    pub samples_max: u64,
    /// Draws the classifiers, the order and the views.
    pub seed: u64,
}

/// Labelled sets, and which class of one is which of the other.
#[derive(Clone, Debug)]
pub struct Sets {
    /// Classifiers learn from these.
    pub train: Arc<ShardSet>,
    /// And are measured on these.
    pub test: Arc<ShardSet>,
    /// Their classes.
    pub classes: Classes,
}

impl Sets {
    /// Compares the classes of two sets.
    ///
    /// # Errors
    /// [`LinearError::NothingInCommon`].
    pub fn new(train: Arc<ShardSet>, test: Arc<ShardSet>) -> Result<Sets, LinearError> {
        let classes = Classes::compare(train.classes(), test.classes());
        let classes = classes.map_err(LinearError::NothingInCommon)?;
        Ok(Sets { train, test, classes })
    }
}

/// A setting that was tried: a learning rate, or a cost.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Tried {
    /// The learning rate for a batch of 256, or the cost C.
    pub value: f64,
    /// Top-1 on the training samples held out, in percent; none where nothing was to be chosen.
    pub held_out: Option<f64>,
    /// Top-1 on the test set at the end, in percent; none where it was not measured.
    pub top1: Option<f64>,
    /// The loss at the end, or the objective.
    pub loss: f64,
}

/// What was found at one level.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The level.
    pub level: u8,
    /// Numbers of a row.
    pub width: i64,
    /// What was tried.
    pub tried: Vec<Tried>,
    /// Which of these was chosen.
    pub chosen: usize,
    /// Of each test sample, whether its class has the largest logit, at the end.
    pub hits: Vec<bool>,
    /// Test samples whose class is among the five largest logits, in percent; none up to five classes.
    pub top5: Option<f64>,
    /// The best top-1 after any epoch and the number of that epoch from 1: chosen on the test set.
    pub best: Option<(f64, u32)>,
}

impl Outcome {
    /// Top-1 on the test set in percent.
    pub fn top1(&self) -> f64 {
        let right = self.hits.iter().filter(|hit| **hit).count();
        100.0 * right as f64 / self.hits.len() as f64
    }
}

/// Costs C that are tried unless others are named: decades.
pub fn usual_costs() -> Vec<f64> {
    (-6..=5).map(|power| 10_f64.powi(power)).collect()
}

/// How far it is: what is done, of how many, and in which part.
pub type Watch<'a> = &'a mut dyn FnMut(&str, u64, u64);

/// Trains and measures.
///
/// # Errors
/// [`LinearError`], naming the sample where it is one sample's fault.
pub fn evaluate(
    encoder: &Encoder,
    sets: &Sets,
    options: &LinearOptions,
    watch: Watch<'_>,
) -> Result<Vec<Outcome>, LinearError> {
    match &options.how {
        How::Cached { costs } => cached::run(encoder, sets, options, costs, watch),
        How::Sgd(how) => sgd::run(encoder, sets, options, how, watch),
    }
}

/// Classes of the training set as 0 to below their number.
#[derive(Debug)]
struct Numbering {
    known: HashMap<u32, i64>,
}

impl Numbering {
    fn of(classes: impl IntoIterator<Item = u32>) -> Result<Numbering, LinearError> {
        let mut sorted: Vec<u32> = classes.into_iter().collect();
        sorted.sort_unstable();
        sorted.dedup();
        match sorted.len() {
            0 | 1 => Err(LinearError::Classes(sorted.len())),
            _ => Ok(Numbering { known: sorted.into_iter().zip(0..).collect() }),
        }
    }

    fn len(&self) -> i64 {
        self.known.len() as i64
    }

    /// -1 for a class that the training set has not: always wrong.
    fn place(&self, class: u32) -> i64 {
        self.known.get(&class).copied().unwrap_or(-1)
    }
}

/// For each row of logits `[n, k]` whether the class has the largest, and whether it is among the five largest. Of equal
/// ones the first counts as larger, as in kNN.
fn hits(logits: &Tensor, classes: &[i64]) -> Result<(Vec<bool>, Vec<bool>), TchError> {
    let k = logits.size()[1] as usize;
    let values = Vec::<f64>::try_from(
        logits
            .f_to_device(tch::Device::Cpu)?
            .f_to_kind(Kind::Double)?
            .f_contiguous()?
            .f_view(-1)?,
    )?;
    let (mut first, mut five) =
        (Vec::with_capacity(classes.len()), Vec::with_capacity(classes.len()));
    for (row, class) in values.chunks(k.max(1)).zip(classes) {
        let rank = usize::try_from(*class).ok().and_then(|class| {
            let own = *row.get(class)?;
            let before = |(other, value): &(usize, &f64)| {
                **value > own || (**value == own && *other < class) || value.is_nan()
            };
            (!own.is_nan()).then(|| row.iter().enumerate().filter(before).count())
        });
        first.push(rank == Some(0));
        five.push(rank.is_some_and(|rank| rank < 5));
    }
    Ok((first, five))
}

fn percent(hits: &[bool]) -> f64 {
    100.0 * hits.iter().filter(|hit| **hit).count() as f64 / hits.len() as f64
}

fn check_finite(rows: &Tensor, level: u8, which: &'static str) -> Result<(), LinearError> {
    let finite = rows.f_isfinite()?.f_all()?;
    match bool::try_from(finite)? {
        true => Ok(()),
        false => Err(LinearError::NotFinite { level, which }),
    }
}
