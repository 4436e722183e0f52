//! Why a step was not made.

use thiserror::Error;

use crate::dist::DistError;
use crate::shim::ShimError;

/// Why a step was not made.
#[derive(Debug, Error)]
pub enum StepError {
    /// Another number of samples than configured; queues and BN groups would not come out even.
    #[error("a batch of {found} samples on rank {rank} of {size}, expected {expected}")]
    Samples {
        /// Samples in the batch.
        found: i64,
        /// `train.batch` over the ranks.
        expected: i64,
        /// This rank.
        rank: usize,
        /// Ranks in the world.
        size: usize,
    },
    /// The BN groups cannot be shared out.
    #[error(
        "{groups} BN groups do not divide into {size} ranks of {accumulate} micro-batches: \
         change model.bn_splits or train.accumulate"
    )]
    Groups {
        /// `model.bn_splits`.
        groups: i64,
        /// Ranks in the world.
        size: usize,
        /// `train.accumulate`.
        accumulate: i64,
    },
    /// The batch lacks views that the method reads.
    #[error("the batch has {found} views `{group}`, expected {expected}")]
    Views {
        /// The group.
        group: String,
        /// Views of it in the batch.
        found: usize,
        /// Views that the method reads.
        expected: usize,
    },
    /// The batch does not say what was drawn with its views.
    #[error("the batch does not say what was drawn with its views `{group}`")]
    Notes {
        /// The group.
        group: String,
    },
    /// A collective failed.
    #[error(transparent)]
    Dist(#[from] DistError),
    /// libtorch failed: out of memory, or a device that went away.
    #[error(transparent)]
    Shim(#[from] ShimError),
}
