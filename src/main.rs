//! `detco`: the data plane's commands, and the handover of the others to `detco-train`.
//!
//! Nothing here may name libtorch: a test looks at the libraries this binary asks for.

use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use detco::cli::{self, Cli, Command};
use detco::profile::allocations::Counting;

/// `detco profile` tells how often an image asks for memory.
#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    cli::prepare();
    let command = Cli::parse().command;
    if let Err(error) = detco_shards::views::check_simd() {
        return cli::report(&error.into());
    }
    let result = match command {
        Command::Pack(args) => cli::pack::run(&args),
        Command::Inspect(args) => cli::inspect::run(&args),
        Command::Verify(args) => cli::verify::run(&args),
        Command::Views(args) => cli::views::run(&args),
        Command::Profile(args) => cli::profile::run(&args),
        Command::Plan(args) => cli::plan::run(&args),
        Command::Data(args) => cli::data::run(&args).unwrap_or_else(hand_over),
        Command::Guide(args) => cli::guide::run(&args),
        Command::Train(args) if args.print_config => cli::train::print_config(&args),
        Command::Train(_) | Command::Eval(_) | Command::Export(_) => hand_over(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::report(&error),
    }
}

/// Becomes `detco-train` with the same arguments: same process, same signals, same exit code.
fn hand_over() -> anyhow::Result<()> {
    let here = std::env::current_exe().context("cannot find this program's own path")?;
    let trainer = here.with_file_name("detco-train");
    if !trainer.is_file() {
        anyhow::bail!(
            "{} is missing: this command needs libtorch and lives there\n\
             hint: `cargo build --release` builds both; without the feature `train` detco packs, \
             inspects, verifies, profiles and shows views only",
            trainer.display()
        );
    }
    let mut command = std::process::Command::new(&trainer);
    command.args(std::env::args_os().skip(1)).envs(cli::libtorch_variables());
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start {}", trainer.display()))
}
