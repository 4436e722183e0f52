//! `detco train`.

use std::path::PathBuf;

use anyhow::{Context, bail};

use crate::config::{Config, RECIPES};

/// Train a backbone from a built-in recipe or a TOML file, or go on with a run.
///
/// The resolved configuration, metrics (JSON lines and TensorBoard), and checkpoints go to the
/// run's folder. SIGINT or SIGTERM write a checkpoint and end with code 75; after any kill
/// `--resume` goes on from the last checkpoint, on a CPU to the same bits.
#[derive(clap::Args, Debug)]
#[command(after_long_help = after_help())]
pub struct Args {
    /// A built-in recipe's name, or a TOML file.
    #[arg(required_unless_present = "resume", conflicts_with = "resume")]
    pub recipe: Option<String>,

    /// Shards: folders, globs, brace lists or tars (in place of the config's data.shards).
    #[arg(long, value_name = "SHARDS", num_args = 1..)]
    pub data: Vec<String>,

    /// Folder of the new run.
    #[arg(long, value_name = "RUN", conflicts_with = "resume")]
    pub out: Option<PathBuf>,

    /// Go on with this run from its latest checkpoint.
    #[arg(long, value_name = "RUN")]
    pub resume: Option<PathBuf>,

    /// Override a key of the config: `--set train.batch=64`. May be repeated. With --resume only
    /// keys that do not change the mathematics of the run.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,

    /// Start the query backbone from these weights: safetensors or .pth, ours, torchvision's or
    /// MoCo's.
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    pub init: Option<PathBuf>,

    /// The same bits from the same seed on the same GPU, more slowly (train.deterministic).
    #[arg(long)]
    pub deterministic: bool,

    /// Open the shards, make the model, print samples, steps, learning rates and the memory that a
    /// step will need, and end without writing anything.
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
        "\nEvery key with its meaning: src/recipes/detco-r50.toml, or --print-config.\n\n\
         Exit codes: 0 trained to the end, 1 error, 2 usage, 65 too many bad samples,\n\
         70 diverged or collapsed, 75 stopped by a signal after writing a checkpoint.",
    );
    text
}

/// `--set` arguments of a run that goes on.
#[cfg(feature = "train")]
fn overrides(args: &Args) -> Vec<String> {
    let more = args.deterministic.then(|| "train.deterministic=true".to_string());
    args.overrides.iter().cloned().chain(more).collect()
}

/// The configuration that the arguments describe.
fn resolve(args: &Args) -> anyhow::Result<Config> {
    let Some(recipe) = &args.recipe else { bail!("name a recipe or a TOML file") };
    let mut config = Config::load(recipe, &args.overrides)?;
    if !args.data.is_empty() {
        config.data.shards = args.data.clone();
    }
    if args.init.is_some() {
        config.model.init = args.init.clone();
    }
    config.train.deterministic |= args.deterministic;
    Ok(config)
}

/// `--print-config`.
pub fn print_config(args: &Args) -> anyhow::Result<()> {
    let config = match &args.resume {
        None => resolve(args)?,
        Some(run) => {
            let path = run.join("config.toml");
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            Config::from_toml(&text, &path.display().to_string())?
        }
    };
    print!("{}", config.to_toml());
    Ok(())
}

/// `detco train`: the exit code says how it ended.
#[cfg(feature = "train")]
pub fn run(args: &Args) -> std::process::ExitCode {
    use crate::train::{self, Outcome, Start};
    use std::process::ExitCode;

    if args.dry_run {
        return match resolve(args).and_then(|config| Ok(crate::dry_run::report(&config)?)) {
            Ok(text) => {
                print!("{text}");
                ExitCode::SUCCESS
            }
            Err(error) => super::report(&error),
        };
    }

    let start = match &args.resume {
        Some(run) => Ok(Start::Resume {
            run: run.clone(),
            overrides: overrides(args),
            data: args.data.clone(),
        }),
        None => resolve(args).and_then(|config| match &args.out {
            Some(run) => Ok(Start::New { run: run.clone(), config: Box::new(config) }),
            None => bail!("name the folder of the new run: --out RUN"),
        }),
    };
    match start.and_then(|start| Ok(train::train(start)?)) {
        Ok(Outcome::Finished) => ExitCode::SUCCESS,
        Ok(Outcome::Stopped) => ExitCode::from(super::EXIT_STOPPED),
        Err(error) => {
            let code = error.downcast_ref::<train::TrainError>().and_then(train::TrainError::code);
            let usual = super::report(&error);
            code.map_or(usual, ExitCode::from)
        }
    }
}
