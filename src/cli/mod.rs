//! The command line: one file per subcommand.
//!
//! Two binaries share it. `detco` parses every command, so that `--help` and usage errors cost
//! nothing, and runs those of the data plane itself. For commands that need libtorch it executes
//! `detco-train` beside it, as cargo and git do with their subcommands, since loading libtorch takes a
//! quarter of a second warm and ten seconds cold.

pub mod composites;
pub mod data;
pub mod eval;
pub mod export;
pub mod guide;
pub mod inspect;
pub mod pack;
pub mod plan;
pub mod profile;
pub mod train;
pub mod verify;
pub mod views;

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use detco_shards::format::ShardError;
use detco_shards::stream::remote::RemoteOptions;

use crate::config::{self, Bytes, Data, cache_folder};
use crate::console::is_closed_output;
use crate::{data as shards, exit};

/// Self-supervised pre-training for detection: from a folder of images to a DetCo backbone.
///
/// Packs images into WebDataset shards, shows what the model will see, trains, evaluates, and exports the
/// backbone for detectron2, torchvision or timm.
#[derive(Parser, Debug)]
#[command(name = "detco", version, propagate_version = true, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
The way from images to a backbone:
  detco pack ILSVRC/train shards/train          class folders, a flat folder, a tar, ImageNet's tar of tars
  detco inspect shards/train                    what is in the shards
  detco verify shards/train                     every byte against the manifest
  detco views shards/train -o views.png         what the model is shown
  detco profile shards/train                    how many images a second, and what limits them
  detco plan --gpus 8 --step-ms 190             what a cluster would give, and what limits it first
  detco train detco-r50 --data shards/train --out runs/a
  detco train --resume runs/a                   after a kill, a reboot, a preemption
  detco train detco-r50 … --gpus 8              or by torchrun, srun, mpirun: see `detco train --help`
  detco eval knn runs/a --train shards/train --test shards/val
  detco export runs/a -o backbone.safetensors   or .pth, or --format detectron2
  detco guide                                   longer texts: data, training, clusters, …";

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Pack images into WebDataset shards.
    Pack(pack::Args),
    /// Show what shards hold.
    Inspect(inspect::Args),
    /// Check every byte of shards against their manifest.
    Verify(verify::Args),
    /// Draw a contact sheet of what the model is shown.
    Views(views::Args),
    /// Measure the data path and name what limits it.
    Profile(profile::Args),
    /// Predict the speed of a cluster and what limits it first.
    Plan(plan::Args),
    /// Train a backbone, or resume a run.
    Train(train::Args),
    /// Measure how good a backbone is.
    Eval(eval::Args),
    /// Prepare data for pre-training and evaluation.
    Data(data::Args),
    /// Export a run's backbone for other programs.
    Export(export::Args),
    /// Show a guide, or list them.
    Guide(guide::Args),
}

/// The cache for shards from URLs, in commands without a configuration.
#[derive(clap::Args, Debug, Clone)]
pub struct CacheArgs {
    /// Cache folder for shards fetched from URLs [default: detco in $XDG_CACHE_HOME or ~/.cache]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,

    /// Bound of the cache: bytes, or with a unit [default: 200GB]
    #[arg(long, value_name = "BYTES")]
    pub cache_size: Option<Bytes>,
}

impl CacheArgs {
    /// The options for reading from URLs.
    pub fn remote(&self) -> RemoteOptions {
        let folder = self.cache.clone().unwrap_or_else(cache_folder);
        shards::remote_in(&folder, self.cache_size.unwrap_or(Data::default().cache_size))
    }
}

/// Environment variables that libtorch and CUDA's libraries read when they start, with their values for this
/// program, without those that are set already. They are set by executing the program again, since setting a
/// variable while other threads read the environment is undefined behaviour.
pub fn libtorch_variables() -> Vec<(&'static str, &'static str)> {
    // torchrun sets it to 1 for what it starts.
    let always = [("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")];
    let missing = |(name, _): &(&str, &str)| config::variable(name).is_none();
    let differs = |(name, value): &(&str, &str)| config::variable(name).as_deref() != Some(value);
    let ours = always.into_iter().filter(differs);
    ours.chain(LIBTORCH_VARIABLES.iter().copied().filter(missing)).collect()
}

/// Defaults: a variable that the user has set is left alone.
const LIBTORCH_VARIABLES: &[(&str, &str)] = &[
    // Without it the sums of cuBLAS depend on what else runs. Of use where the run is deterministic.
    ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    // `dist::heartbeat` finds lost ranks, names them and ends with an exit code of its own. The threads of
    // ProcessGroupNCCL would abort the process instead: on a CUDA error, before it is reported; after a timeout; or
    // because of what an earlier start left in torchrun's store.
    ("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0"),
    ("TORCH_NCCL_DUMP_ON_TIMEOUT", "0"),
    ("TORCH_NCCL_ENABLE_MONITORING", "0"),
    // libtorch records every collective of a process in one table, and looks a group up in it before it takes
    // the table's lock: two threads that begin with groups of their own crash. Nobody reads the records here.
    ("TORCH_FR_BUFFER_SIZE", "0"),
    // Where a store is gone, c10d logs a page of stack frames at each of its ranks; they say it in a line.
    ("TORCH_CPP_LOG_LEVEL", "FATAL"),
];

/// Prints an error with its causes and returns the exit code. A reader that closes standard output early
/// (`detco inspect … | head`) is no error; any other broken pipe is.
pub fn report(error: &anyhow::Error) -> std::process::ExitCode {
    let io = |cause: &'_ (dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(is_closed_output)
    };
    if error.chain().any(io) {
        return std::process::ExitCode::SUCCESS;
    }
    note!("error: {}", describe(error));
    let shards = error.chain().find_map(|cause| cause.downcast_ref::<ShardError>());
    let code = shards.and_then(exit::of_shards).unwrap_or(exit::ERROR);
    std::process::ExitCode::from(code)
}

/// Catches SIGXFSZ; to be called first. A file that grows beyond `ulimit -f` is then an error like a full disk,
/// where the signal would end the process silently.
pub fn prepare() {
    let told = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    // Where no handler can be set, the signal does what it always did.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, told);
}

/// Checks before any work that the folder of an output file exists.
pub(crate) fn check_folder(file: &std::path::Path) -> anyhow::Result<()> {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
            anyhow::bail!(
                "cannot write {}: there is no folder {}",
                file.display(),
                folder.display()
            )
        }
        _ => Ok(()),
    }
}

/// Runs a command that uses libtorch. Its exceptions become errors, and out-of-memory errors get the hint.
#[cfg(feature = "train")]
fn with_libtorch<T>(hint: &str, body: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    use crate::shim::{is_out_of_memory, panics};

    let result = panics::caught(body).map_err(anyhow::Error::from).flatten();
    result.map_err(|error| {
        // One with a code of its own tells of another rank's end.
        let coded = error.downcast_ref::<crate::train::TrainError>();
        let coded = coded.is_some_and(|error| error.code().is_some());
        match describe(&error) {
            said if is_out_of_memory(&said) && !coded => anyhow::anyhow!("{said}\nhint: {hint}"),
            _ => error,
        }
    })
}

/// The error and its causes, one line each, without causes that a line before already contains.
fn describe(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str("\n  because: ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn memory_that_ends_is_an_error_with_a_hint() {
        let zeros = |edge: i64| Tensor::zeros([edge, edge], (Kind::Float, Device::Cpu));
        let too_large = with_libtorch("less", || Ok(zeros(1 << 28))).unwrap_err().to_string();
        assert!(too_large.starts_with("libtorch: "), "{too_large}");
        assert!(too_large.ends_with("\nhint: less"), "{too_large}");
        let other = with_libtorch("less", || Ok(zeros(2).matmul(&zeros(3)))).unwrap_err();
        assert!(!other.to_string().contains("hint"), "{other}");
        assert_eq!(with_libtorch("less", || Ok(1)).unwrap(), 1);
    }
}
