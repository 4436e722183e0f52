//! [`TrainError`]: why a run ended early, and the exit code that says so.

use std::path::{Path, PathBuf};

use detco_shards::format::ShardError;
use detco_shards::limits;
use detco_shards::pipeline::PipelineError;
use thiserror::Error;

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::data::DataError;
use crate::device::DeviceError;
use crate::disk::Disk;
use crate::dist::DistError;
use crate::dist::rendezvous::RendezvousError;
use crate::dist::world::WorldError;
use crate::eval::features::FeaturesError;
use crate::eval::knn::KnnError;
use crate::exit;
use crate::feed::FeedError;
use crate::metrics::MetricsError;
use crate::model::ModelError;
use crate::shim::ShimError;
use crate::source::SourceError;
use crate::step::StepError;
use crate::weights::WeightsError;

/// Why a run ended early.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say what the variants and fields are")]
pub enum TrainError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Shards(Box<ShardError>),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error("{0}")]
    Pipeline(#[source] Box<PipelineError>),
    #[error(transparent)]
    Source(SourceError),
    #[error(transparent)]
    Feed(#[from] FeedError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Step(#[from] StepError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error("{file} does not start this model: {source}")]
    Init { file: PathBuf, source: Box<ModelError> },
    #[error("the kNN monitor failed: {0}")]
    Knn(#[source] Box<KnnError>),
    #[error("{0}")]
    Weights(#[source] Box<WeightsError>),
    #[error("no shards: name them with --data, or in the config under data.shards")]
    NoData,
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Shim(#[from] ShimError),
    #[error(
        "{run} already holds checkpoints: go on with `detco train --resume {run}`, or name another \
         folder"
    )]
    RunExists { run: PathBuf },
    #[error("{run} is in use by another process")]
    InUse { run: PathBuf },
    #[error(
        "the data is not what the run was started with: {found_samples} samples, fingerprint \
         {found:016x}; the checkpoint names {expected_samples} samples, {expected:016x}"
    )]
    DataChanged { found: u64, found_samples: u64, expected: u64, expected_samples: u64 },
    #[error(
        "this would change the mathematics of the run: {changes}. Only data.* (but not data.window, \
         data.reduce, and data.decode if a GPU may decode), checkpoint.*, monitor.*, dist.* (but \
         dist.compress), train.device, train.deterministic, train.threads and train.steps_max may change.\n\
         hint: to change them, start a new run with --init"
    )]
    ResumeChanges { changes: String },
    #[error(
        "{source}\nhint: the run's configuration names it, as seen from the folder where the run was \
         started; --data SHARDS says where the data is now"
    )]
    ResumedData { source: Box<ShardError> },
    #[error(
        "step {step}: the loss or a gradient is not finite (loss {loss}, gradient norm \
         {gradient_norm}). The last good checkpoint is {last_good}\nhint: lower optim.lr"
    )]
    NotFinite { step: u64, loss: f64, gradient_norm: f64, last_good: String },
    #[error(
        "collapse: since step {since} the {scope} embeddings of Res{level} spread less than \
         {share} of what even directions would (standard deviation {std:.2e} at step {step}). The \
         last good checkpoint is {last_good}\nhint: lower optim.lr, or set \
         monitor.collapse_share = 0 to go on"
    )]
    Collapsed {
        step: u64,
        since: u64,
        level: u8,
        scope: String,
        std: f64,
        share: f64,
        last_good: String,
    },
    #[error("rank 0 has found no checkpoint in {run}")]
    NothingSaved { run: PathBuf },
    #[error(transparent)]
    World(#[from] WorldError),
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
    #[error(transparent)]
    Dist(#[from] DistError),
    #[error("{batch} samples do not divide into {size} ranks (train.batch)")]
    RankBatch { batch: i64, size: usize },
    #[error(
        "{size} ranks cannot share {groups} BN groups: model.bn_splits must be a multiple of the \
         ranks"
    )]
    RankGroups { groups: i64, size: usize },
    #[error("rank {local_rank} of this machine has no GPU of its own: libtorch finds {gpus}")]
    RankGpu { local_rank: usize, gpus: i64 },
    #[error("no room for a checkpoint: {disk}")]
    NoRoom { disk: Disk },
    #[error("cannot start a thread: {0}{hint}", hint = limits::of_threads(.0))]
    Threads(#[source] std::io::Error),
    #[error("cannot listen for signals: {0}")]
    Signals(#[source] std::io::Error),
    #[error("cannot {what} {path}: {source}{limit}", limit = limits::of_file(what, source))]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
}

impl From<ShardError> for TrainError {
    fn from(error: ShardError) -> TrainError {
        TrainError::Shards(Box::new(error))
    }
}

impl From<PipelineError> for TrainError {
    fn from(error: PipelineError) -> TrainError {
        TrainError::Pipeline(Box::new(error))
    }
}

impl From<SourceError> for TrainError {
    fn from(error: SourceError) -> TrainError {
        match error {
            SourceError::Pipeline(error) => TrainError::Pipeline(error),
            #[cfg(feature = "nvjpeg")]
            error => TrainError::Source(error),
        }
    }
}

impl From<WeightsError> for TrainError {
    fn from(error: WeightsError) -> TrainError {
        TrainError::Weights(Box::new(error))
    }
}

impl From<KnnError> for TrainError {
    fn from(error: KnnError) -> TrainError {
        TrainError::Knn(Box::new(error))
    }
}

impl TrainError {
    /// The exit code of its own, if it has one.
    pub fn code(&self) -> Option<u8> {
        match self {
            TrainError::NotFinite { .. } | TrainError::Collapsed { .. } => Some(exit::DIVERGED),
            TrainError::Dist(error)
            | TrainError::Step(StepError::Dist(error))
            | TrainError::Rendezvous(RendezvousError::Dist(error)) => match error {
                // This rank's own.
                DistError::Collective { source, .. } if source.is_out_of_memory() => None,
                DistError::Collective { .. } | DistError::Awaited { .. } => Some(exit::LOST),
                DistError::Diverged { .. } => Some(exit::DIVERGED),
                DistError::Backward { .. } => None,
            },
            // A port that is taken stays taken.
            TrainError::Rendezvous(RendezvousError::Store { verb: "serve", .. }) => None,
            TrainError::Rendezvous(
                RendezvousError::Missing { .. }
                | RendezvousError::Name { .. }
                | RendezvousError::Store { .. }
                | RendezvousError::Silent { .. },
            ) => Some(exit::LOST),
            TrainError::Shards(error) | TrainError::ResumedData { source: error } => {
                exit::of_shards(error)
            }
            TrainError::Pipeline(error) => exit::of_pipeline(error),
            TrainError::Knn(error) => match &**error {
                KnnError::Features(FeaturesError::Pipeline(error)) => exit::of_pipeline(error),
                KnnError::Features(FeaturesError::Shards(error)) => exit::of_shards(error),
                _ => None,
            },
            _ => None,
        }
    }
}

pub(super) fn io_error(
    what: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_path_buf();
    move |source| TrainError::Io { what, path, source }
}
