//! Errors of a loader, and the policy on bad samples.

use std::any::Any;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::decode::DecodeError;
use crate::format::ShardError;
use crate::limits;
use crate::slab::NoMemory;

/// What happens when a sample cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadSample {
    /// The run ends and names the sample.
    Fail,
    /// The sample is counted, logged and replaced by another, within a budget.
    Skip,
}

/// Bad samples that an epoch may have: this share of the data set's samples, rounded down, but at least one
/// if any are allowed, since skipping would otherwise mean nothing in a small set.
pub fn bad_budget(samples: u64, share: f64) -> u64 {
    let least = u64::from(share > 0.0);
    ((samples as f64 * share) as u64).max(least)
}

/// Why a sample could not be used.
#[derive(Debug, Error)]
pub enum SampleError {
    /// Its bytes could not be found.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// Its bytes cannot be decoded.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A panic: these bytes trigger a bug of this program or of the decoder.
    #[error("the decoder panicked: {message}")]
    Panicked {
        /// The panic's message.
        message: String,
    },
}

impl SampleError {
    /// Whether the sample's shard cannot be fetched. A substitute would make batches depend on the network, so
    /// this ends a run under either policy.
    pub(super) fn is_lost(&self) -> bool {
        matches!(self, SampleError::Shard(error) if error.is_lost())
    }

    /// The error for a caught panic.
    pub(crate) fn panicked(panic: &(dyn Any + Send)) -> SampleError {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        SampleError::Panicked { message: text.unwrap_or("no message").to_string() }
    }
}

/// A bad sample and its substitute.
#[derive(Debug)]
pub struct BadSample {
    /// The sample.
    pub sample: u64,
    /// Its shard.
    pub shard: PathBuf,
    /// Its key (webdataset's `__key__`), empty if unknown.
    pub key: String,
    /// Byte offset of its image in the shard.
    pub offset: u64,
    /// What is wrong.
    pub error: SampleError,
    /// The sample that was read instead; none under [`OnBadSample::Fail`].
    pub substitute: Option<u64>,
    pub(crate) slot: usize,
}

impl BadSample {
    /// A hint on what to do, unless the shard could not be fetched.
    fn hint(&self) -> String {
        match &self.error {
            SampleError::Shard(ShardError::Remote { .. }) => String::new(),
            SampleError::Shard(_) => {
                "\nhint: data.on_bad_sample = \"skip\" goes on without it".to_owned()
            }
            _ => format!(
                "\nhint: data.on_bad_sample = \"skip\" goes on without it; {}",
                self.finders()
            ),
        }
    }

    /// The commands that find all images like this one.
    fn finders(&self) -> String {
        let folder = self.shard.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).display();
        format!(
            "`detco verify --decode {folder}` names all images that cannot be decoded, and \
             `detco pack --check` refuses them while packing"
        )
    }
}

/// A bad sample that ended a run, and how to find those like it.
pub(super) fn describe(bad: &BadSample) -> String {
    let hint = match &bad.error {
        SampleError::Shard(_) => String::new(),
        SampleError::Decode(_) | SampleError::Panicked { .. } => {
            format!("\nhint: {}", bad.finders())
        }
    };
    let shard = bad.shard.display();
    format!("{shard}: sample {:?} at byte {}: {}{hint}", bad.key, bad.offset, bad.error)
}

/// Why a loader ended early.
#[derive(Debug, Error)]
pub enum PipelineError {
    /// A sample cannot be used and the policy is to fail.
    #[error("{shard}: sample {key:?} at byte {offset}: {error}{hint}", shard = .0.shard.display(), key = .0.key, offset = .0.offset, error = .0.error, hint = .0.hint())]
    Bad(Box<BadSample>),
    /// More samples are bad than the budget allows.
    #[error(
        "{bad} of {samples} samples are bad in epoch {epoch}: more than the budget of {budget} \
         (data.bad_share_max); the last one: {last}"
    )]
    TooManyBad {
        /// Bad samples of the epoch so far.
        bad: u64,
        /// Samples of the data set.
        samples: u64,
        /// The epoch.
        epoch: u32,
        /// The budget.
        budget: u64,
        /// The newest of them.
        last: String,
        /// Those of the batch that ended the run, the newest last.
        list: Vec<BadSample>,
    },
    /// A run of bad samples: a broken shard rather than a broken image.
    #[error("{run} bad samples in a row (data.bad_run_max): the last one: {last}")]
    BadRun {
        /// Length of the run.
        run: u32,
        /// The newest of them.
        last: String,
        /// Those of the batch that ended the run, the newest last.
        list: Vec<BadSample>,
    },
    /// The store of a sample's shard does not answer, or the cache has no room for the shard. Not a fault of the
    /// sample, so [`OnBadSample`] does not apply.
    #[error("sample {key:?} cannot be had: {error}", key = .0.key, error = .0.error)]
    Lost(Box<BadSample>),
    /// No substitute was found for a bad sample.
    #[error("{tries} substitutes for a bad sample were bad as well: the last one: {last}")]
    NoSubstitute {
        /// Samples tried.
        tries: u32,
        /// The newest of them.
        last: String,
        /// The bad samples of the batch that ended the run, the one without a substitute last.
        list: Vec<BadSample>,
    },
    /// The system refused a thread.
    #[error("cannot start a thread: {0}{hint}", hint = limits::of_threads(.0))]
    Thread(#[source] std::io::Error),
    /// There is no memory for the batches.
    #[error(
        "no memory for the {bytes} bytes of a batch of views: lower train.batch, the sizes of the views, or \
         data.batches_ahead"
    )]
    Memory {
        /// Bytes of one batch.
        bytes: u128,
    },
    /// The caller holds all batches, so no other can be made. Not final: once one is dropped the next call
    /// continues.
    #[error(
        "all {batches} batches are held by the caller and none can be made until one is dropped: copy what is to \
         be kept, or raise batches_ahead (data.batches_ahead) above the number of batches that are held"
    )]
    AllHeld {
        /// Number of batches that circulate.
        batches: usize,
    },
    /// The workers are gone before the end.
    #[error("the workers ended before epoch {epoch}, step {step} was finished")]
    Ended {
        /// Epoch that was waited for.
        epoch: u32,
        /// Step that was waited for.
        step: u64,
    },
}

impl From<NoMemory> for PipelineError {
    fn from(NoMemory { bytes }: NoMemory) -> PipelineError {
        PipelineError::Memory { bytes }
    }
}

impl PipelineError {
    /// The bad samples of the batch that ended the run, the decisive one last. That batch never leaves the
    /// loader.
    pub fn bad(&self) -> &[BadSample] {
        match self {
            PipelineError::Bad(bad) => std::slice::from_ref(bad),
            PipelineError::TooManyBad { list, .. }
            | PipelineError::BadRun { list, .. }
            | PipelineError::NoSubstitute { list, .. } => list,
            PipelineError::Lost(_)
            | PipelineError::Thread(_)
            | PipelineError::Memory { .. }
            | PipelineError::AllHeld { .. }
            | PipelineError::Ended { .. } => &[],
        }
    }
}
