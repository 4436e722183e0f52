//! Random schedules of kills: does a run with its ranks shot at make every sample once?
//!
//! ```text
//! cargo bench --bench kills -- --schedules 50 [--seed 1]
//! ```
//!
//! A schedule starts a run of three epochs on one to four ranks, signals a rank at a random moment
//! (SIGKILL four times of five, else SIGTERM), from its first instants on, and starts it again on
//! another number of ranks, up to six times; then it lets it finish. It is right if every global
//! batch is the one of an undisturbed run, no sample comes twice in an epoch, metrics hold every
//! step once, and every survivor ends by itself with code 69 after a SIGKILL, 75 after a SIGTERM (or 0,
//! where the run was over first). What took how long is printed, a line a schedule. As a test it
//! makes one schedule.

#[expect(dead_code, reason = "the tests use more of it")]
#[path = "../tests/support/mod.rs"]
mod support;
#[expect(dead_code, reason = "the tests use more of it")]
#[path = "../tests/support/world.rs"]
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use detco::model::Draws;
use support::{detco_ok, shards};
use world::{Ranks, batches, losses, new_run};

const RANKS_MAX: u64 = 4;
const LEGS_MAX: u64 = 6;
/// A rank that ends by itself takes some seconds to see who is lost; past this it hangs.
const END_MAX: Duration = Duration::from_secs(60);
const SETS: &[&str] = &[
    "--or-resume",
    "--start-timeout",
    "20",
    "--set",
    "train.epochs=3",
    "--set",
    "checkpoint.every_steps=2",
    "--set",
    "dist.timeout_seconds=20",
    "--set",
    "dist.slow_seconds=10",
];

type Batches = BTreeMap<(u64, u64), Vec<u64>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |name: &str, default: u64| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)?.parse().ok()).unwrap_or(default)
    };
    let (schedules, seed) = (number("--schedules", 1), number("--seed", 1));
    let (folder, data) = shards(43); // 172 samples: 7 steps an epoch, 4 samples left over
    let whole = folder.path().join("whole");
    detco_ok(&new_run(&data, &whole, SETS));
    let expected = batches(&whole);
    let mut wrong = 0;
    for schedule in 0..schedules {
        let run = folder.path().join(format!("run{schedule}"));
        let draws = Draws::new(seed, "kills", schedule);
        let started = Instant::now();
        let (legs, faults) = shoot(folder.path(), &data, &run, draws, &expected);
        let verdict = if faults.is_empty() { "right".to_string() } else { faults.join("; ") };
        let seconds = started.elapsed().as_secs_f64();
        println!("{schedule:>3}  {seconds:>5.1} s  {}  {verdict}", legs.join(" "));
        wrong += usize::from(!faults.is_empty());
        std::fs::remove_dir_all(&run).expect("the run's folder was made above");
    }
    println!("{} of {schedules} schedules right (seed {seed})", schedules as usize - wrong);
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One schedule: what was done, `ranks-killed@milliseconds`, and what was wrong.
fn shoot(
    folder: &Path,
    data: &Path,
    run: &Path,
    mut draws: Draws,
    expected: &Batches,
) -> (Vec<String>, Vec<String>) {
    let args = new_run(data, run, SETS);
    let (mut legs, mut faults) = (Vec::new(), Vec::new());
    for _ in 0..1 + draws.below(LEGS_MAX) {
        let size = 1 + draws.below(RANKS_MAX) as usize;
        let shot = draws.below(size as u64) as usize;
        let signal = if draws.below(5) == 0 { "TERM" } else { "KILL" };
        let wait = Duration::from_millis(draws.below(12_000));
        let mut ranks = Ranks::start(folder, &vec![args.clone(); size]);
        std::thread::sleep(wait);
        if ranks.children[shot].try_wait().expect("a child").is_none() {
            ranks.signal(shot, signal);
        }
        legs.push(format!("{size}-{signal}{shot}@{}", wait.as_millis()));
        let (killed, deadline) = (signal == "KILL", Instant::now() + END_MAX);
        for rank in 0..size {
            let code = loop {
                match ranks.children[rank].try_wait().expect("a child") {
                    Some(status) => break status.code(),
                    None if Instant::now() > deadline => break Some(-1),
                    None => std::thread::sleep(Duration::from_millis(10)),
                }
            };
            // The signal may find the run over, or come before the program listens.
            let fine = match code {
                Some(0) => true,
                Some(69) => killed || rank != shot,
                Some(75) => !killed,
                None => rank == shot,
                Some(_) => false,
            };
            if !fine {
                let said = ranks.said(rank);
                let last = said.lines().rev().take(3).collect::<Vec<_>>().join(" / ");
                faults.push(format!("{}: rank {rank} ended with {code:?}: {last}", legs.join(" ")));
            }
        }
    }
    detco_ok(&args);
    let found = batches(run);
    if found != *expected {
        faults.push("other batches than those of an undisturbed run".into());
    }
    for epoch in 0..3 {
        let of = found.iter().filter(|((e, _), _)| *e == epoch).flat_map(|(_, batch)| batch);
        let samples: Vec<u64> = of.copied().collect();
        if samples.iter().collect::<BTreeSet<_>>().len() != samples.len() {
            faults.push(format!("a sample came twice in epoch {epoch}"));
        }
    }
    if losses(run).len() != expected.len() {
        faults.push("metrics do not hold every step once".into());
    }
    (legs, faults)
}
