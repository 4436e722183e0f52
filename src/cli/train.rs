//! `detco train`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::bail;

use crate::config::{Config, RECIPES};
use crate::console::stdout;
use crate::exit;

/// Train a backbone from a built-in recipe or a TOML file, or resume a run.
///
/// The resolved configuration, metrics (JSON lines and TensorBoard) and checkpoints are written to the run's
/// folder. On SIGINT, SIGTERM, SIGHUP or SIGUSR1 the run writes a checkpoint and ends with code 75. After any kill
/// `--resume` continues from the newest whole checkpoint, on a CPU with the same bits.
///
/// --gpus N uses several GPUs of this machine. Started by torchrun, srun, mpirun or a PyTorchJob, every process
/// finds its rank in the environment; where these start one process per machine or pod, --gpus N makes it N
/// ranks there. --gpus 1 and --ranks 1 train alone in any environment. See `detco guide training` and
/// `detco guide cluster`.
#[derive(clap::Args, Debug)]
#[command(after_long_help = after_help())]
pub struct Args {
    /// A built-in recipe's name, or a TOML file.
    #[arg(required_unless_present = "resume", conflicts_with = "resume")]
    pub recipe: Option<String>,

    /// Shards: folders, globs, brace lists or tars, or URLs of those (in place of the config's
    /// data.shards). Shards behind URLs (s3://, gs://, az://, http://, https://) go through the cache:
    /// data.cache, data.cache_size, data.window.
    #[arg(long, value_name = "SHARDS", num_args = 1..)]
    pub data: Vec<String>,

    /// Folder of the new run.
    #[arg(long, value_name = "RUN", conflicts_with = "resume")]
    pub out: Option<PathBuf>,

    /// Resume this run from its latest checkpoint.
    #[arg(long, value_name = "RUN")]
    pub resume: Option<PathBuf>,

    /// With --out: if the folder already holds checkpoints of this very run, resume from the latest, so
    /// that one command both starts and resumes a run.
    #[arg(long, requires = "out")]
    pub or_resume: bool,

    /// Train on this many GPUs of this machine, one process each; 1 trains alone in any environment.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub gpus: Option<u16>,

    /// Train in this many processes on this machine's CPUs; 1 trains alone in any environment.
    #[arg(
        long, value_name = "N", conflicts_with = "gpus",
        value_parser = clap::value_parser!(u16).range(1..=64)
    )]
    pub ranks: Option<u16>,

    /// How long several ranks wait for each other at the start.
    #[arg(
        long, value_name = "SECONDS", default_value_t = 300,
        value_parser = clap::value_parser!(u64).range(1..=604_800)
    )]
    pub start_timeout: u64,

    /// Override a key of the config: `--set train.batch=64`. May be repeated. With --resume only keys
    /// that do not change the mathematics of the run are allowed.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,

    /// Start both encoders' backbones from these weights: .safetensors, .pth (of any torch) or .pkl;
    /// ours, torchvision's, MoCo's, detectron2's, or those of any program whose ResNet has
    /// torchvision's layers, under any prefix. Nothing in the file is executed.
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    pub init: Option<PathBuf>,

    /// With --init: the prefix of the backbone's names, where the file holds several backbones and you
    /// want another than the trained one (`module.encoder_k.`).
    #[arg(long, value_name = "PREFIX", conflicts_with = "resume")]
    pub init_prefix: Option<String>,

    /// Give the same bits for the same seed on the same GPU, more slowly (train.deterministic). Where libtorch
    /// has no such operation it warns and continues.
    #[arg(long)]
    pub deterministic: bool,

    /// Print samples, steps, learning rates, the memory of a step on each of --gpus or --ranks, and the room
    /// that checkpoints need in --out; open the data, but write nothing.
    #[arg(long, conflicts_with = "resume")]
    pub dry_run: bool,

    /// Print the resolved configuration as TOML and end.
    #[arg(long)]
    pub print_config: bool,
}

fn after_help() -> String {
    let mut text = String::from("Built-in recipes:\n");
    for (name, about, _) in RECIPES {
        text.push_str(&format!("  {name:<15} {about}\n"));
    }
    text.push_str(
        "\nEvery key with its meaning: src/recipes/detco-r50.toml, or --print-config.\n\n",
    );
    text.push_str(exit::TABLE);
    text
}

/// `--set` arguments, and what --gpus, --ranks and --deterministic say.
fn overrides(args: &Args) -> Vec<String> {
    let device = match (args.gpus, args.ranks) {
        (Some(_), _) => Some("train.device=cuda"),
        (None, Some(_)) => Some("train.device=cpu"),
        (None, None) => None,
    };
    let deterministic = args.deterministic.then_some("train.deterministic=true");
    let more = [device, deterministic].into_iter().flatten().map(String::from);
    args.overrides.iter().cloned().chain(more).collect()
}

/// The configuration that the arguments describe.
fn resolve(args: &Args) -> anyhow::Result<Config> {
    let Some(recipe) = &args.recipe else { bail!("name a recipe or a TOML file") };
    let mut config = Config::load(recipe, &overrides(args))?;
    if !args.data.is_empty() {
        config.data.shards = args.data.clone();
    }
    if args.init.is_some() {
        config.model.init = args.init.clone();
    }
    if args.init_prefix.is_some() {
        config.model.init_prefix = args.init_prefix.clone();
    }
    if let (None, Some(prefix)) = (&config.model.init, &config.model.init_prefix) {
        bail!("--init-prefix {prefix:?} belongs to a file of weights: name it with --init");
    }
    config.train.deterministic |= args.deterministic;
    Ok(config)
}

/// `--print-config`.
pub fn print_config(args: &Args) -> anyhow::Result<()> {
    let config = match &args.resume {
        None => resolve(args)?,
        Some(run) => Config::of_run(run)?.with_overrides(&overrides(args))?,
    };
    Ok(write!(stdout(), "{}", config.to_toml())?)
}

/// `detco train`: the exit code says how it ended.
#[cfg(feature = "train")]
pub fn run(args: &Args) -> std::process::ExitCode {
    use std::process::ExitCode;

    if args.dry_run {
        let report = || {
            let ranks = args.gpus.or(args.ranks).map_or(1, usize::from);
            let text = crate::dry_run::report(&resolve(args)?, ranks, args.out.as_deref())?;
            Ok(write!(stdout(), "{text}")?)
        };
        return match super::with_libtorch(MEMORY_HINT, report) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => super::report(&error),
        };
    }

    use crate::dist::launch;
    use crate::dist::world::World;
    use crate::shim::c10d;

    let spec = match place(args) {
        Ok(World::Launch(wanted)) => {
            let patience = std::time::Duration::from_secs(args.start_timeout);
            return match launch::run(&wanted, patience) {
                Ok(code) => ExitCode::from(code),
                Err(error) => super::report(&error.into()),
            };
        }
        Ok(World::Rank(spec)) => Some(spec),
        Ok(World::Alone) => None,
        Err(error) => return super::report(&error.into()),
    };
    let rank = spec.as_ref().map(|spec| spec.member.rank);
    match super::with_libtorch(MEMORY_HINT, || train_as(args, spec)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let code = error.downcast_ref::<crate::train::TrainError>();
            let code = code.and_then(crate::train::TrainError::code);
            let _always_an_error = super::report(&match rank {
                Some(rank) => anyhow::anyhow!("rank {rank}: {}", super::describe(&error)),
                None => error,
            });
            // At once: threads of a process group may wait for a lost rank, and those of a loader be in
            // the middle of a driver's call, which a library's destructors would end badly.
            c10d::exit(i32::from(code.unwrap_or(exit::ERROR)))
        }
    }
}

/// The hint for a run that is out of memory.
#[cfg(feature = "train")]
const MEMORY_HINT: &str = "--dry-run says what a step needs, and which train.accumulate=K makes it fit: the batch \
    and its BN groups stay the same";

/// The role of this process by --gpus, --ranks and the environment.
#[cfg(feature = "train")]
fn place(args: &Args) -> Result<crate::dist::world::World, crate::dist::world::WorldError> {
    use std::io::IsTerminal;

    use crate::dist::world::{Asked, decide, passed_over};

    let asked = |flag, number: Option<u16>| {
        number.map(|number| Asked { flag, number: usize::from(number) })
    };
    let asked = asked("--gpus", args.gpus).or_else(|| asked("--ranks", args.ranks));
    let variable = &crate::config::variable;
    if let Some(size) = passed_over(variable, asked) {
        // Every other process of the launcher does the same.
        note!(
            "warning: alone in a world of {size} that the environment describes, as the command line says"
        );
    }
    decide(variable, asked, std::io::stdin().is_terminal())
}

/// Trains as a rank, or alone; returns the exit code.
#[cfg(feature = "train")]
fn train_as(args: &Args, spec: Option<crate::dist::world::Spec>) -> anyhow::Result<u8> {
    use std::time::Duration;

    use crate::dist::rendezvous::Rendezvous;
    use crate::train::{self, Outcome, Start, TrainError};

    let start = match &args.resume {
        Some(run) => {
            Start::Resume { run: run.clone(), overrides: overrides(args), data: args.data.clone() }
        }
        None => {
            let config = Box::new(resolve(args)?);
            let Some(run) = &args.out else { bail!("name the folder of the new run: --out RUN") };
            Start::New { run: run.clone(), config, or_resume: args.or_resume }
        }
    };
    let patience = Duration::from_secs(args.start_timeout);
    let rendezvous = spec.map(|spec| Rendezvous::join(spec, patience, exit::LOST));
    let rendezvous = rendezvous.transpose().map_err(TrainError::from)?;
    Ok(match train::train(start, rendezvous)? {
        Outcome::Finished => 0,
        Outcome::Stopped => exit::STOPPED,
    })
}
