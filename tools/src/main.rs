//! `cargo xtask`: set-up, tests, checks and the demo of detco. Run it without arguments for help.
//!
//! Small on purpose: on a fresh machine it is compiled before anything else happens.

use std::process::ExitCode;

use anyhow::{Result, bail};

mod check;
mod demo;
mod gpu_check;
mod layers;
mod objects;
mod peers;
mod setup;
mod shell;
mod ships;
mod test;
mod tidy;

const HELP: &str = "\
cargo xtask <command>

  setup             make .venv with the pinned wheels (libtorch, and the oracles of the tests);
                    the other commands run it by themselves
  demo [options]    the whole job on small images: pack, train, kill, resume, evaluate, export
    --images DIR      your own images, one folder a class, instead of generated ones
    --out DIR         where to put everything (default: .demo)
    --fresh           start anew, even if an unfinished demo could go on
  test [arguments]  cargo test --workspace [arguments], then the tests that need what few machines have
                    (a GPU, ::1, the superuser, DETCO_TEST_IMAGES): those are run or said to be skipped
    --cpu LEVEL       only the numerical tests, with libtorch, oneDNN, MKL and our own vector code held
                      to sse4, avx2 or avx512
    --threads N       only the numerical tests, with N threads in libtorch
  peers [options]   other loaders and detco on the same images and cores: images/s, side by side
    --images DIR      what to decode: a folder of JPEGs, in class folders or not
    --task T1,T2,T3   decode; one crop of 224; the four views of DetCo (default: all)
    --peers A,B       some of those that --list names (default: all)
    --rounds N        everybody in turn so many times (default: 3)
    --workers 1,2     each on a core of its own (default: 1,2)
    --seconds S       of a run (default: 8)
    --record FILE     write the tables, what ran and where, as Markdown
    --list            who there is, and what is installed
  gpu-check DIR     what a machine with a GPU and no Rust needs to test and measure: binaries, tests,
                    benches, shards, and the script to run there
    --images IMAGES   a folder of JPEGs to measure with
  check             format, lints, documentation, benches as tests, the rules of this repository
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &[String]) -> Result<ExitCode> {
    let root = shell::root();
    let (command, rest) = match arguments {
        [] => ("help", arguments),
        [command, rest @ ..] => (command.as_str(), rest),
    };
    match command {
        "help" | "-h" | "--help" => eprint!("{HELP}"),
        "demo" => return demo::run(&root, rest),
        "peers" => peers::run(&root, rest)?,
        "gpu-check" => gpu_check::run(&root, rest)?,
        "test" => test::test(&root, rest)?,
        "setup" | "check" if !rest.is_empty() => {
            bail!("`cargo xtask {command}` takes no arguments, and got {}", rest.join(" "))
        }
        "setup" => {
            let ready = setup::run(&root)?;
            eprintln!(
                "set-up: complete; libtorch {} in {}",
                ready.version,
                ready.libtorch.display()
            );
            eprintln!("        Python for tests: {}", ready.python.display());
        }
        "check" => check::check(&root)?,
        other => bail!("unknown command {other:?}\n\n{HELP}"),
    }
    Ok(ExitCode::SUCCESS)
}
