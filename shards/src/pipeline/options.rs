//! Options of a loader.

use std::sync::Arc;
use std::time::Duration;

use super::{OnBadSample, Views};
use crate::order::{Cursor, Order};
use crate::stats::Stage;
use crate::trace::Trace;
use crate::views::Recipe;

/// Options of a loader.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// What is rendered of each sample.
    pub views: Views,
    /// Whether each sample's class is read with it, for [`Filled::labels`](super::Filled::labels).
    pub labels: bool,
    /// Seed of the views.
    pub seed: u64,
    /// The order of the samples, and their batches.
    pub order: Order,
    /// The position to start from.
    pub start: Cursor,
    /// The epoch to end before.
    pub epochs: u32,
    /// This rank and the number of ranks; it reads its slice of each global batch.
    pub rank: (u32, u32),
    /// Worker threads; 0 means one per core.
    pub workers: usize,
    /// Batches that may be finished or in work ahead of the consumer, at least 1.
    pub batches_ahead: usize,
    /// Whether pictures far larger than all of their views are decoded at 1/2 or 1/4 of their size
    /// ([`crate::views::needed`] says when), for a mean error below a level. The plan decides, so that
    /// every worker makes the same pixels.
    pub reduce: bool,
    /// What happens when a sample cannot be decoded.
    pub on_bad_sample: OnBadSample,
    /// `Skip` ends the run when an epoch has more bad samples than this share of the data set; see
    /// [`bad_budget`](super::bad_budget).
    pub bad_share_max: f64,
    /// `Skip` ends the run after this many bad samples in a row, in the order of the run.
    pub bad_run_max: u32,
    /// The recording of the threads' spans, for a timeline.
    pub trace: Option<Arc<Trace>>,
    /// An injected delay, for tests of what reads the counters: each sample takes this much longer in a stage.
    /// Reading, getting (the dispatcher's work) and putting sleep; decoding and views compute.
    pub handicap: Option<(Stage, Duration)>,
}

impl LoaderOptions {
    /// Training: shuffled order, from the start, one rank, bad samples end the run.
    pub fn train(recipe: Recipe, order: Order, seed: u64, epochs: u32) -> LoaderOptions {
        LoaderOptions {
            views: Views::Recipe(recipe),
            labels: false,
            seed,
            order,
            start: Cursor::default(),
            epochs,
            rank: (0, 1),
            workers: 0,
            batches_ahead: 3,
            reduce: true,
            on_bad_sample: OnBadSample::Fail,
            bad_share_max: 0.001,
            bad_run_max: 100,
            trace: None,
            handicap: None,
        }
    }

    /// Evaluation: every sample once with its class, in the order of the shards, none decoded at less
    /// than its size, so that figures do not depend on the decoder. [`Recipe::center`] and
    /// [`Recipe::squash`] are usual views.
    pub fn evaluate(recipe: Recipe, order: Order) -> LoaderOptions {
        let train = LoaderOptions::train(recipe, order, 0, 1);
        LoaderOptions { labels: true, reduce: false, ..train }
    }
}
