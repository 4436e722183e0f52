//! `detco verify`: every byte of a folder of shards.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use detco_shards::format::verify::{self, Images, Report};
use detco_shards::stream::remote;
use indicatif::{HumanBytes, HumanCount, ProgressBar};

use crate::console::plural;

/// Check every byte of a folder of shards and name every fault
///
/// Checks the structure of each tar, the CRC-32C of each image and class, the SHA-256 of each
/// shard, each index against its shard, and all counts against manifest.json. Shards of other
/// programs, without a manifest, are checked for structure and index.
///
/// --decode also decodes every image, which finds those that would end training, and names shard, sample and
/// reason. `detco pack --check` does the same before the shards are written.
///
/// The exit code is 1 if anything is wrong.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  detco verify shards/train
  detco verify shards/train --decode                      # every image decoded once
  detco verify shards/train --json | jq '.faults[]'")]
pub struct Args {
    /// Folder of shards, or its URL, whose shards are fetched into the cache
    folder: PathBuf,

    /// Decode every image too
    #[arg(long)]
    decode: bool,

    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,

    /// Threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,

    #[command(flatten)]
    cache: super::CacheArgs,
}

/// Runs the command.
///
/// # Errors
///
/// The folder cannot be listed, or something in it is wrong.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = args.workers.map_or(cores, usize::from);
    let start = Instant::now();
    let report = watched(args, workers)?;
    if args.json {
        writeln!(crate::console::stdout(), "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        print(args, &report, start.elapsed())?;
    }
    match report.faults.len() {
        0 => Ok(()),
        1 => anyhow::bail!("1 fault in {}", shown(args)),
        faults => anyhow::bail!("{faults} faults in {}", shown(args)),
    }
}

fn watched(args: &Args, workers: usize) -> anyhow::Result<Report> {
    let read = AtomicU64::new(0);
    if !std::io::stderr().is_terminal() {
        return look(args, workers, &read);
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let painter = std::thread::Builder::new().spawn_scoped(scope, || {
            let bar = ProgressBar::new_spinner();
            let start = Instant::now();
            while !over.load(Ordering::Relaxed) {
                let bytes = read.load(Ordering::Relaxed);
                let rate = bytes as f64 / start.elapsed().as_secs_f64().max(1e-3) / 1e6;
                bar.set_message(format!("{} read, {rate:.0} MB/s", HumanBytes(bytes)));
                bar.tick();
                std::thread::park_timeout(Duration::from_millis(100));
            }
            bar.finish_and_clear();
        });
        let report = look(args, workers, &read);
        over.store(true, Ordering::Relaxed);
        // Where no thread could be started nothing is painted.
        if let Ok(painter) = painter {
            painter.thread().unpark();
        }
        report
    })
}

/// The folder or URL for messages, without secrets.
fn shown(args: &Args) -> String {
    remote::shown(&args.folder.display().to_string())
}

fn look(args: &Args, workers: usize, read: &AtomicU64) -> anyhow::Result<Report> {
    let url = args.folder.to_str().filter(|folder| remote::is_url(folder));
    let images = if args.decode { Images::Decode } else { Images::Read };
    Ok(match url {
        Some(url) => {
            remote::verify_with(&[url.to_owned()], &args.cache.remote(), images, workers, read)?
        }
        None => verify::folder_with(&args.folder, images, workers, read)?,
    })
}

fn print(args: &Args, report: &Report, took: Duration) -> std::io::Result<()> {
    let mut out = crate::console::stdout();
    for note in &report.notes {
        writeln!(out, "{note}")?;
    }
    for fault in &report.faults {
        write!(out, "{}", fault.file.display())?;
        if let Some(member) = &fault.member {
            write!(out, ": `{member}`")?;
        }
        if let Some(offset) = fault.offset {
            write!(out, ": offset {offset}")?;
        }
        writeln!(out, ": {}", fault.fault)?;
    }
    let verdict = if report.faults.is_empty() { "sound" } else { "NOT sound" };
    let against = if report.manifest {
        format!("{} checksums compared", HumanCount(report.checked))
    } else {
        "no manifest, so no checksums".to_owned()
    };
    writeln!(
        out,
        "{}: {verdict}: {} in {}, {}, {against}; {:.1} s, {:.0} MB/s",
        shown(args),
        plural(report.samples, "sample"),
        plural(report.shards, "shard"),
        HumanBytes(report.bytes),
        took.as_secs_f64(),
        report.bytes as f64 / took.as_secs_f64() / 1e6,
    )?;
    Ok(())
}
