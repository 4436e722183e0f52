//! A long run of the loader, to see what grows: memory, descriptors, the time a sample takes.
//!
//! ```text
//! cargo bench -p detco-shards --bench soak -- --seconds 3600 --workers 2 SHARDS
//! ```
//!
//! Samples the process sixty times (once a minute in an hour) and prints a table. The verdict
//! compares the last sixth of the run (minutes 50 to 60 of an hour) with minutes 5 to 15, after the
//! warm-up: memory of our own (`RssAnon`; the shards' pages, `RssFile`, are the system's cache),
//! open descriptors, images a second by the clock, and CPU time an image, which other programs on
//! the machine disturb less. Ends with code 1 when memory grew or a descriptor was lost.
//!
//! Damaged samples are skipped within a budget of 2 %, so that a set with some exercises that way
//! too. As a test it runs for two seconds over images of its own.

#[path = "../tests/support/images.rs"]
mod images;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use detco_shards::format::writer::ShardWriter;
use detco_shards::order::Order;
use detco_shards::pipeline::{Loader, LoaderOptions, OnBadSample};
use detco_shards::stream::ShardSet;
use detco_shards::views::Recipe;

/// Readings of a run.
const READINGS: u32 = 60;

/// Growth of our own memory that counts as flat, in bytes and as a share: the allocator keeps a few
/// pages more or less of what it was given back.
const GROWTH_MAX: (f64, f64) = (2e6, 0.02);

/// Images a second may fall by this share; other programs on the machine can do that as well, so
/// the verdict names it and the exit code leaves it out.
const SLOWER_MAX: f64 = 0.02;

/// `/proc/self/stat` counts in these, on every Linux that this runs on.
const TICK: Duration = Duration::from_millis(10);

struct Arguments {
    measured: bool,
    seconds: u64,
    workers: usize,
    batch: u64,
    shards: Vec<String>,
}

fn main() -> ExitCode {
    let Some(arguments) = arguments() else {
        eprintln!("usage: soak [--seconds N] [--workers N] [--batch N] SHARDS...");
        return ExitCode::from(2);
    };
    let folder = tempfile::tempdir().expect("a folder");
    let shards = if arguments.shards.is_empty() {
        write_shards(folder.path());
        vec![folder.path().display().to_string()]
    } else {
        arguments.shards.clone()
    };
    let set = match ShardSet::open(&shards) {
        Ok(set) => Arc::new(set),
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let readings = run(&set, &arguments);
    // Two seconds of an unoptimised build say that it runs, and nothing about an hour.
    if verdict(&readings) || !arguments.measured { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn arguments() -> Option<Arguments> {
    let measured = std::env::args().any(|argument| argument == "--bench");
    let batch = if measured { 64 } else { 4 };
    let mut found = Arguments { measured, seconds: 2, workers: 2, batch, shards: Vec::new() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next()?.parse::<u64>().ok().filter(|number| *number > 0);
        match word.as_str() {
            "--seconds" => found.seconds = number()?,
            "--workers" => found.workers = usize::try_from(number()?).ok()?,
            "--batch" => found.batch = number()?,
            // What cargo says of its own accord.
            "--bench" | "--test" => {}
            flag if flag.starts_with('-') => return None,
            _ => found.shards.push(word),
        }
    }
    Some(found)
}

/// 128 samples, one of them damaged.
fn write_shards(folder: &Path) {
    let files = images::jpegs(16);
    let mut shard = ShardWriter::create(folder, "000000.tar").expect("a shard");
    for (number, file) in files.iter().cycle().take(128).enumerate() {
        let end = if number == 17 { file.len() / 2 } else { file.len() };
        shard.append(&format!("{number:06}.jpg"), &file[..end]).expect("a member");
    }
    shard.finish().expect("a file").seal().expect("a shard");
}

/// The process at one moment.
struct Reading {
    seconds: f64,
    images: u64,
    bad: u64,
    cpu: Duration,
    anonymous: u64,
    mapped: u64,
    descriptors: usize,
    threads: u64,
}

fn run(set: &Arc<ShardSet>, arguments: &Arguments) -> Vec<Reading> {
    let batch = arguments.batch.min(set.len());
    let order = Order::shuffled(set.len(), batch, 1).expect("at least one sample");
    let options = LoaderOptions {
        workers: arguments.workers,
        on_bad_sample: OnBadSample::Skip,
        bad_share_max: 0.02,
        ..LoaderOptions::train(Recipe::detco(), order, 1, u32::MAX)
    };
    println!(
        "{} samples, {} workers, batches of {batch}, {} s",
        set.len(),
        arguments.workers,
        arguments.seconds
    );
    println!("   time s   images/s  CPU ms/image  own MB  mapped MB  descriptors  threads  bad");
    let start = Instant::now();
    let every = Duration::from_secs(arguments.seconds) / READINGS;
    let (mut images, mut bad) = (0, 0);
    let mut readings = vec![read(start, images, bad)];
    let loader = Loader::start(Arc::clone(set), options).expect("threads");
    for filled in loader {
        let filled = filled.expect("at most 2 % of the samples are damaged");
        images += filled.len() as u64;
        bad += filled.bad.len() as u64;
        drop(filled);
        if start.elapsed() >= every * readings.len() as u32 {
            readings.push(read(start, images, bad));
            print_row(&readings);
        }
        if start.elapsed() >= every * READINGS {
            break;
        }
    }
    readings
}

fn read(start: Instant, images: u64, bad: u64) -> Reading {
    let text =
        |path: &str| std::fs::read_to_string(path).expect("this program needs Linux's /proc");
    let status = text("/proc/self/status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).expect("a field of status");
        line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok()).expect("a number")
    };
    // The second field is a name in brackets and may hold blanks; utime is the 14th, stime the
    // 15th.
    let stat = text("/proc/self/stat");
    let after = stat.rsplit_once(')').expect("a name in brackets").1;
    let ticks: u32 = after
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|word| word.parse::<u32>().expect("a number"))
        .sum();
    Reading {
        seconds: start.elapsed().as_secs_f64(),
        images,
        bad,
        cpu: TICK * ticks,
        anonymous: field("RssAnon:") * 1024,
        mapped: field("RssFile:") * 1024,
        descriptors: std::fs::read_dir("/proc/self/fd").expect("a folder").count(),
        threads: field("Threads:"),
    }
}

fn print_row(readings: &[Reading]) {
    let [.., before, now] = readings else { return };
    println!(
        "{:9.1}  {:9.1}  {:12.3}  {:6.1}  {:9.1}  {:11}  {:7}  {:3}",
        now.seconds,
        rate(before, now),
        cpu_per_image(before, now) * 1e3,
        now.anonymous as f64 / 1e6,
        now.mapped as f64 / 1e6,
        now.descriptors,
        now.threads,
        now.bad - before.bad,
    );
}

fn rate(from: &Reading, to: &Reading) -> f64 {
    (to.images - from.images) as f64 / (to.seconds - from.seconds)
}

fn cpu_per_image(from: &Reading, to: &Reading) -> f64 {
    (to.cpu - from.cpu).as_secs_f64() / (to.images - from.images) as f64
}

/// Compares the last sixth of the run with minutes 5 to 15 of an hour, and says so.
fn verdict(readings: &[Reading]) -> bool {
    let n = readings.len();
    let (early, late) = (&readings[n / 12..=n / 4], &readings[n * 5 / 6..]);
    let ([first, .., second], [third, .., last]) = (early, late) else {
        println!("{n} readings are too few to compare");
        return false;
    };
    let memory = |part: &[Reading]| {
        part.iter().map(|reading| reading.anonymous as f64).sum::<f64>() / part.len() as f64
    };
    let (grown, before) = (memory(late) - memory(early), memory(early));
    let faster = rate(third, last) / rate(first, second) - 1.0;
    let dearer = cpu_per_image(third, last) / cpu_per_image(first, second) - 1.0;
    let descriptors = |part: &[Reading]| part.iter().map(|reading| reading.descriptors).max();
    let (some, more) = (descriptors(early).unwrap_or(0), descriptors(late).unwrap_or(0));
    let flat = grown <= GROWTH_MAX.0 || grown <= GROWTH_MAX.1 * before;
    println!(
        "{} images, {} damaged ones skipped; {:.0} to {:.0} s against {:.0} to {:.0} s: \
         memory {:+.2} MB ({:+.2} %, {}), descriptors {some} then {more} ({}), \
         images/s {:+.2} % ({}), CPU an image {:+.2} %",
        last.images,
        last.bad,
        third.seconds,
        last.seconds,
        first.seconds,
        second.seconds,
        grown / 1e6,
        grown / before * 100.0,
        if flat { "flat" } else { "GROWS" },
        if some == more { "constant" } else { "NOT CONSTANT" },
        faster * 100.0,
        if faster > -SLOWER_MAX { "steady" } else { "SLOWER" },
        dearer * 100.0,
    );
    flat && some == more
}
