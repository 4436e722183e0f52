//! Exit codes: what each way to end is told to a shell or a scheduler, and which errors have a code of their own.
//!
//! The numbers are those of BSD's `sysexits.h`. Every mapping from the data plane's errors to a code is here.

use detco_shards::format::ShardError;
use detco_shards::pipeline::PipelineError;

/// Any error without a code of its own.
pub const ERROR: u8 = 1;
/// `train`: the data has more bad samples than `data.on_bad_sample` and its budget allow (`EX_DATAERR`).
pub const BAD_DATA: u8 = 65;
/// `train`: another rank was lost, or the store that holds the shards (`EX_UNAVAILABLE`). Starting again goes on
/// from the last checkpoint.
pub const LOST: u8 = 69;
/// `train`: the loss is not finite, the embeddings collapsed, or ranks hold different weights (`EX_SOFTWARE`).
pub const DIVERGED: u8 = 70;
/// `train` after SIGTERM, SIGINT, SIGHUP or SIGUSR1: a checkpoint was written, `--resume` goes on
/// (`EX_TEMPFAIL`).
pub const STOPPED: u8 = 75;

/// The table that `detco train --help` shows.
pub const TABLE: &str = "\
Exit codes:
  0        trained to the end
  1        an error without a code of its own: configuration, files, memory, device
  2        the command line is wrong
  65       the data: a sample cannot be used, or more than data.on_bad_sample = \"skip\" allows
  69       another rank was lost, or the store that holds the shards
  70       the loss is not finite, the embeddings collapsed, or ranks hold different weights
  75       a signal asked for the end; a checkpoint was written
  101      a fault of this program: please report what it printed
  128 + n  a second SIGINT or SIGTERM ended it at once (130, 143); of --gpus and --ranks:
           signal n ended a rank (137: killed, perhaps for its memory)
After 69, 75 and 128 + n the same command with --or-resume goes on.";

/// The code for shards that cannot be opened. A store that does not answer is lost; what lies at a URL and is
/// wrong is an error like that of a file.
pub fn of_shards(error: &ShardError) -> Option<u8> {
    error.is_unreachable().then_some(LOST)
}

/// The code for a loader that ended early.
pub fn of_pipeline(error: &PipelineError) -> Option<u8> {
    match error {
        PipelineError::Lost(_) => Some(LOST),
        PipelineError::Bad(_)
        | PipelineError::TooManyBad { .. }
        | PipelineError::BadRun { .. }
        | PipelineError::NoSubstitute { .. } => Some(BAD_DATA),
        PipelineError::Thread(_)
        | PipelineError::Memory { .. }
        | PipelineError::AllHeld { .. }
        | PipelineError::Ended { .. } => None,
    }
}
