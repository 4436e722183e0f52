//! `detco-train`: the commands that need libtorch. `detco` hands over to it; called by hand it
//! knows the same command line.

use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use clap::Parser;
use detco::cli::{self, Cli, Command};

fn main() -> ExitCode {
    cli::prepare();
    // `detco` hands over with all of them set; called by hand, this program starts itself anew.
    let variables = cli::libtorch_variables();
    if !variables.is_empty() {
        return cli::report(&start_with(variables));
    }
    let result = match Cli::parse().command {
        Command::Train(args) => return cli::train::run(&args),
        Command::Eval(args) => cli::eval::run(&args),
        Command::Data(args) => cli::data::run_all(&args),
        Command::Export(args) => cli::export::run(&args),
        _ => Err(anyhow::anyhow!("this command needs no libtorch: call `detco` instead")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::report(&error),
    }
}

/// Becomes this program with these variables set; returns only with the error.
fn start_with(variables: Vec<(&str, &str)>) -> anyhow::Error {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => {
            return anyhow::Error::new(error).context("cannot find this program's own path");
        }
    };
    let mut command = std::process::Command::new(&program);
    let error = command.args(std::env::args_os().skip(1)).envs(variables).exec();
    anyhow::Error::new(error).context(format!("cannot start {}", program.display()))
}
