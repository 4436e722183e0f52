//! The world: ranks and what they do together.
//!
//! The step names only [`Collective`]; a world of one is a world like any other.

pub mod local;

use std::fmt::Debug;

use tch::{TchError, Tensor};
use thiserror::Error;

/// Why ranks could not work together.
#[derive(Debug, Error)]
pub enum DistError {
    /// A collective failed or timed out.
    #[error("rank {rank} of {size}: {operation} failed: {source}")]
    Collective {
        /// This rank.
        rank: usize,
        /// Ranks in the world.
        size: usize,
        /// What was being done.
        operation: &'static str,
        /// What libtorch said.
        source: TchError,
    },
}

/// What a step needs from the other ranks. All ranks must make the same calls in the same order.
pub trait Collective: Debug {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Ranks in the world, at least 1.
    fn size(&self) -> usize;

    /// Every rank's tensor, `[n, …]` each, one after the other: `[size * n, …]`. No gradient flows.
    ///
    /// # Errors
    /// When a rank is lost or slow, or the shapes differ.
    fn gather(&self, mine: &Tensor) -> Result<Tensor, DistError>;

    /// Replaces each tensor by its mean over the ranks, in place.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    fn average(&self, tensors: &mut [Tensor]) -> Result<(), DistError>;
}
