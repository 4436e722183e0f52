//! `detco-train`: the commands that need libtorch. `detco` hands over to it; called by hand it
//! knows the same command line.

use std::process::ExitCode;

use clap::Parser;
use detco::cli::{self, Cli, Command};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Train(args) => return cli::train::run(&args),
        Command::Eval(args) => cli::eval::run(&args),
        Command::Export(args) => cli::export::run(&args),
        _ => Err(anyhow::anyhow!("this command needs no libtorch: call `detco` instead")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::report(&error),
    }
}
