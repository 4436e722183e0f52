//! Distributed training: ranks, and the collectives between them.
//!
//! The step names only [`Collective`]; a world of one rank is a world like any other. [`world`] reads
//! rank and size from the environment, [`rendezvous`] is the rendezvous and checks that all ranks are about
//! to run the same training, [`c10d`] has the collectives on libtorch's own engine, [`heartbeat`] finds
//! dead and slow ranks, [`check`] compares what must be equal on all ranks, and [`launch`] starts ranks
//! on this machine.

pub mod c10d;
pub mod check;
pub mod heartbeat;
pub mod launch;
pub mod local;
pub mod rendezvous;
pub mod world;

use std::fmt::{self, Debug};

use tch::{TchError, Tensor};
use thiserror::Error;

use crate::shim::ShimError;
use heartbeat::Missing;

/// Why ranks could not work together.
#[derive(Debug, Error)]
pub enum DistError {
    /// Gradients could not be computed.
    #[error("backward failed: {source}")]
    Backward {
        /// What libtorch said.
        source: TchError,
    },
    /// A collective failed or timed out.
    #[error("step {step}, {size} ranks: {operation} failed: {missing}\n  because: {source}")]
    Collective {
        /// Ranks in the world.
        size: usize,
        /// The step it belongs to.
        step: u64,
        /// What was being done.
        operation: Operation,
        /// The ranks that did not take part.
        missing: Missing,
        /// What libtorch said.
        source: ShimError,
    },
    /// A wait for others failed.
    #[error("waiting for {awaited}: {missing}")]
    Awaited {
        /// What was waited for.
        awaited: String,
        /// The ranks that did not come.
        missing: Missing,
    },
    /// What must be equal on all ranks is not.
    #[error(
        "step {step}: {what} of rank {} differ from those of rank 0 (checksum {found:016x}, not \
         {expected:016x}): a fault of memory, network or program; go on from the last checkpoint",
        rank_list(ranks)
    )]
    Diverged {
        /// Updates done.
        step: u64,
        /// Queues, weights.
        what: &'static str,
        /// The ranks that differ.
        ranks: Vec<usize>,
        /// The checksum of the first of them.
        found: u64,
        /// Rank 0's.
        expected: u64,
    },
}

/// `1, 3`.
pub(crate) fn rank_list(ranks: &[usize]) -> String {
    let names: Vec<String> = ranks.iter().map(usize::to_string).collect();
    names.join(", ")
}

/// The phase that a rank is in: the parts of a step, and what happens between steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// Coming together.
    Start,
    /// Waiting for the next batch.
    Data,
    /// The EMA update of the key encoder.
    Follow,
    /// The keys' images are shuffled between ranks.
    Shuffle,
    /// The keys' embeddings.
    Keys,
    /// The keys' embeddings are shuffled back.
    Unshuffle,
    /// The queries' embeddings and their losses.
    Queries,
    /// The backward pass, and the averaging of gradients.
    Backward,
    /// The step's metrics.
    Report,
    /// The optimizer and the queues.
    Update,
    /// Comparing queues and weights.
    Check,
    /// Writing a checkpoint.
    Save,
    /// The kNN monitor.
    Monitor,
    /// The end of the run.
    Leave,
}

impl fmt::Display for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Move::Start => "the start",
            Move::Data => "waiting for data",
            Move::Follow => "following the query encoder",
            Move::Shuffle => "the shuffle of images",
            Move::Keys => "key forward",
            Move::Unshuffle => "bringing keys back",
            Move::Queries => "query forward",
            Move::Backward => "backward",
            Move::Report => "the step's report",
            Move::Update => "the update",
            Move::Check => "comparing queues",
            Move::Save => "saving",
            Move::Monitor => "the kNN monitor",
            Move::Leave => "the end of the run",
        })
    }
}

/// Collectives by name, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Making a process group.
    Group,
    /// Everybody's rows to everybody.
    Gather,
    /// Some rows to each.
    Exchange,
    /// The mean of tensors.
    Average,
    /// Backward with gradients averaged.
    Gradients,
    /// Rank 0's tensors to everybody.
    Broadcast,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Group => "making a process group",
            Operation::Gather => "gather",
            Operation::Exchange => "exchange",
            Operation::Average => "average",
            Operation::Gradients => "averaging gradients",
            Operation::Broadcast => "broadcast",
        })
    }
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

    /// Sends `send[r]` rows of `mine` `[n, …]` to each rank r, in order, and returns the
    /// `receive[r]` rows that came from each rank r, in order.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    fn exchange(&self, mine: &Tensor, send: &[i64], receive: &[i64]) -> Result<Tensor, DistError>;

    /// Replaces each tensor by its mean over the ranks, in place. All are of one type.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    fn average(&self, tensors: &mut [Tensor]) -> Result<(), DistError>;

    /// Runs backward from `loss`, the last of a step; when it returns, the gradients of
    /// `parameters` are means over the ranks. What earlier backward passes have left in them is
    /// averaged with them.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    fn backward(&self, loss: &Tensor, parameters: &[Tensor]) -> Result<(), DistError>;

    /// Overwrites the tensors by those of rank 0.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    fn broadcast(&self, tensors: &mut [Tensor]) -> Result<(), DistError>;

    /// Waits until rank 0 has come here, however long it takes, as long as it is alive.
    ///
    /// # Errors
    /// When a rank is lost.
    fn after_first(&self) -> Result<(), DistError>;

    /// Sets the phase of this rank, which ranks that wait for it can read.
    fn at(&self, step: u64, what: Move);

    /// Whether this rank was asked to stop.
    fn is_asked_to_stop(&self) -> bool;

    /// Bytes that this rank has sent to others, by the cost of ring algorithms.
    fn bytes_sent(&self) -> u64;
}
