//! A long run of the loader, to see what grows: memory, descriptors, the time a sample takes.
//!
//! ```text
//! cargo bench -p detco-shards --bench soak -- --seconds 3600 --workers 2 SHARDS
//! ```
//!
//! Takes sixty readings (one a minute in an hour) and prints a table. The verdict compares the last
//! sixth of the run (minutes 50 to 60 of an hour) with minutes 5 to 15, after the warm-up: memory of
//! our own (`RssAnon`; the shards' pages, `RssFile`, are the system's cache), open descriptors, and
//! throughput.
//!
//! # Throughput
//!
//! The clock alone cannot show a drift of 2 % on a machine whose other guests change its speed by
//! 30 % from second to second. So the run goes in turns of half a second: the loader makes a fixed
//! number of batches, stands still with all its slabs full, and a yardstick of the same kind of work
//! (`soak/yardstick.rs`: the same images each time, as many threads, decoders and renderers of its
//! own) measures what the machine is worth just then. What drifts is the loader's speed as a share of
//! the yardstick's, by the clock (images a second) and by CPU time (CPU ms an image). A reading is the
//! median over its turns, so that one in which the process was stopped does not count; the two parts
//! of the run are compared by the means of their readings, weighed by their turns, and `±` is twice
//! the standard error of that difference, from how far the readings scatter. A line through all
//! readings after the warm-up gives the slope an hour. An interval wider than ± 2 % decides nothing.
//!
//! What slowed both alike, loader and yardstick, would not show in the share; the table has both
//! rates as well.
//!
//! Ends with code 1 when memory grew, a descriptor was lost, or the loader became slower by more than
//! 2 % beyond doubt.
//!
//! Damaged samples are skipped within a budget of 2 %, so that a set with some exercises that way
//! too. As a test it runs for two seconds over images of its own.

#[path = "../tests/support/images.rs"]
mod images;
#[path = "soak/yardstick.rs"]
mod yardstick;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use detco_shards::format::writer::ShardWriter;
use detco_shards::order::Order;
use detco_shards::pipeline::{Loader, LoaderOptions, OnBadSample};
use detco_shards::stream::ShardSet;
use detco_shards::views::Recipe;
use rustix::time::{ClockId, clock_gettime};
use yardstick::Yardstick;

/// Readings of a run.
const READINGS: u32 = 60;

/// Growth of our own memory that counts as flat, in bytes and as a share: the allocator keeps a few
/// pages more or less of what it was given back.
const GROWTH_MAX: (f64, f64) = (2e6, 0.02);

/// The share of its speed, measured with the yardstick, that the loader may lose.
const SLOWER_MAX: f64 = 0.02;

/// Batches of a turn: a quarter of a second of two workers with a core each. The shorter a turn, the
/// more alike is what its two parts meet.
const TURN_BATCHES: usize = 4;

/// Images of the yardstick's part of a turn: half as long.
const YARDSTICK_IMAGES: u64 = 128;

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
    let fine = verdict(&readings, arguments.seconds as f64);
    // Two seconds of an unoptimised build say that it runs, and nothing about an hour.
    if fine || !arguments.measured { ExitCode::SUCCESS } else { ExitCode::FAILURE }
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

/// Work that was done, and what it took.
#[derive(Clone, Copy, Default)]
struct Work {
    images: u64,
    wall: Duration,
    cpu: Duration,
}

impl Work {
    /// Does it, and measures: `work` returns its images and when they were done.
    fn of(work: impl FnOnce() -> (u64, Instant)) -> Work {
        let (start, before) = (Instant::now(), cpu());
        let (images, end) = work();
        Work { images, wall: end - start, cpu: cpu() - before }
    }

    fn and(self, other: Work) -> Work {
        let (images, wall) = (self.images + other.images, self.wall + other.wall);
        Work { images, wall, cpu: self.cpu + other.cpu }
    }

    /// Images a second.
    fn rate(self) -> f64 {
        self.images as f64 / self.wall.as_secs_f64()
    }

    /// CPU seconds an image.
    fn cost(self) -> f64 {
        self.cpu.as_secs_f64() / self.images as f64
    }
}

/// CPU time of the other threads: what this one spends on watching them depends on how long they take.
fn cpu() -> Duration {
    let read = |clock| {
        let time = clock_gettime(clock);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    };
    read(ClockId::ProcessCPUTime).saturating_sub(read(ClockId::ThreadCPUTime))
}

/// What happened since the reading before, and the process at its end.
struct Reading {
    seconds: f64,
    turns: usize,
    loader: Work,
    yardstick: Work,
    /// Images a second and CPU time an image of the loader, as shares of the yardstick's: medians
    /// over the turns.
    rate: f64,
    cost: f64,
    bad: u64,
    process: Process,
}

struct Process {
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
    let (samples, workers, length) = (set.len(), arguments.workers, arguments.seconds);
    println!("{samples} samples, {workers} workers, batches of {batch}, {length} s");
    println!(
        "   time s  turns  images/s  yardstick   share  CPU ms/image  yardstick   share  \
         own MB  mapped MB  descriptors  threads  bad"
    );
    // A test's images are few, and its turns are to be so short that there are some.
    let (batches, images) =
        if arguments.measured { (TURN_BATCHES, YARDSTICK_IMAGES) } else { (2, 8) };
    let mut yardstick = Yardstick::new(set, images, workers, batch);
    let mut loader = Loader::start(Arc::clone(set), options).expect("threads");
    wait_for_stillness();
    let start = Instant::now();
    let every = Duration::from_secs(arguments.seconds) / READINGS;
    let mut readings = Vec::new();
    while start.elapsed() < every * READINGS {
        // After a pause of the whole process the next reading is a whole one again.
        let number = start.elapsed().as_nanos() / every.as_nanos() + 1;
        let end = every * u32::try_from(number).expect("at most READINGS");
        let (mut turns, mut bad) = (Vec::new(), 0);
        while turns.is_empty() || start.elapsed() < end {
            let made = Work::of(|| {
                let (images, damaged) = take(&mut loader, batches);
                bad += damaged;
                (images, wait_for_stillness())
            });
            turns.push((made, Work::of(|| (yardstick.measure(set), Instant::now()))));
        }
        readings.push(reading(start, &turns, bad));
        print_row(&readings[readings.len() - 1]);
    }
    readings
}

/// Takes so many batches: their images, and how many of those stand in for damaged ones.
fn take(loader: &mut Loader, batches: usize) -> (u64, u64) {
    let filled = loader.take(batches).map(|filled| {
        let filled = filled.expect("at most 2 % of the samples are damaged");
        (filled.len() as u64, filled.bad.len() as u64)
    });
    filled.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

/// Until every other thread sleeps, the loader's slabs being full; returns when that was seen first. A
/// worker that waits its turn for a core does not sleep, and one between two samples is not seen
/// asleep three times.
fn wait_for_stillness() -> Instant {
    let (mut still, mut first) = (0, Instant::now());
    while still < 3 {
        std::thread::sleep(Duration::from_millis(2));
        if !others_sleep() {
            still = 0;
            continue;
        }
        if still == 0 {
            first = Instant::now();
        }
        still += 1;
    }
    first
}

fn others_sleep() -> bool {
    let own = std::process::id().to_string();
    let threads = std::fs::read_dir("/proc/self/task").expect("this program needs Linux's /proc");
    threads.flatten().filter(|thread| thread.file_name() != *own).all(|thread| {
        // The second field is a name in brackets and may hold blanks; the state comes after it.
        let stat = std::fs::read_to_string(thread.path().join("stat"));
        stat.is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" S")))
    })
}

fn reading(start: Instant, turns: &[(Work, Work)], bad: u64) -> Reading {
    // The yardstick's threads end a moment after their work.
    wait_for_stillness();
    let sum = |of: fn(&(Work, Work)) -> Work| turns.iter().map(of).fold(Work::default(), Work::and);
    let share = |of: fn(Work) -> f64| {
        let mut shares: Vec<f64> = turns.iter().map(|turn| of(turn.0) / of(turn.1)).collect();
        shares.sort_by(f64::total_cmp);
        (shares[(shares.len() - 1) / 2] + shares[shares.len() / 2]) / 2.0
    };
    Reading {
        seconds: start.elapsed().as_secs_f64(),
        turns: turns.len(),
        loader: sum(|turn| turn.0),
        yardstick: sum(|turn| turn.1),
        rate: share(Work::rate),
        cost: share(Work::cost),
        bad,
        process: process(),
    }
}

fn process() -> Process {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).expect("a field of status");
        line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok()).expect("a number")
    };
    Process {
        anonymous: field("RssAnon:") * 1024,
        mapped: field("RssFile:") * 1024,
        descriptors: std::fs::read_dir("/proc/self/fd").expect("a folder").count(),
        threads: field("Threads:"),
    }
}

fn print_row(reading: &Reading) {
    let Reading { loader, yardstick, process, .. } = reading;
    println!(
        "{:9.1}  {:5}  {:8.1}  {:9.1}  {:6.4}  {:12.3}  {:9.3}  {:6.4}  {:6.1}  {:9.1}  {:11}  {:7}  {:3}",
        reading.seconds,
        reading.turns,
        loader.rate(),
        yardstick.rate(),
        reading.rate,
        loader.cost() * 1e3,
        yardstick.cost() * 1e3,
        reading.cost,
        process.anonymous as f64 / 1e6,
        process.mapped as f64 / 1e6,
        process.descriptors,
        process.threads,
        reading.bad,
    );
}

/// Compares the last sixth of the run with minutes 5 to 15 of an hour, and says so.
fn verdict(readings: &[Reading], length: f64) -> bool {
    let part = |from: f64, to: f64| -> Vec<&Reading> {
        let middle = |reading: &Reading| reading.seconds - length / f64::from(READINGS) / 2.0;
        let inside = from * length..to * length;
        readings.iter().filter(|reading| inside.contains(&middle(reading))).collect()
    };
    let (early, late) = (part(1.0 / 12.0, 0.25), part(5.0 / 6.0, 1.1));
    if early.len() < 3 || late.len() < 3 {
        println!("{} and {} readings are too few to compare", early.len(), late.len());
        return false;
    }
    let memory = |part: &[&Reading]| mean(part, |reading| reading.process.anonymous as f64);
    let (grown, before) = (memory(&late) - memory(&early), memory(&early));
    let flat = grown <= GROWTH_MAX.0 || grown <= GROWTH_MAX.1 * before;
    let most = |part: &[&Reading]| part.iter().map(|reading| reading.process.descriptors).max();
    let (some, more) = (most(&early).unwrap_or(0), most(&late).unwrap_or(0));
    let count = |of: fn(&Reading) -> u64| readings.iter().map(of).sum::<u64>();
    println!(
        "{} images, {} damaged ones skipped; minutes 50 to 60 of an hour against 5 to 15 ({} and {} \
         readings): memory {:+.2} MB ({:+.2} %, {}), descriptors {some} then {more} ({})",
        count(|reading| reading.loader.images),
        count(|reading| reading.bad),
        late.len(),
        early.len(),
        grown / 1e6,
        grown / before * 100.0,
        if flat { "flat" } else { "GROWS" },
        if some == more { "constant" } else { "NOT CONSTANT" },
    );
    let warm = part(1.0 / 12.0, 1.1);
    let speed = drift("images/s", [&early, &late, &warm], |reading| reading.rate);
    drift("CPU an image", [&early, &late, &warm], |reading| reading.cost);
    // An interval wider than what is asked for decides nothing, wherever it lies.
    let decided = speed.1 <= SLOWER_MAX;
    let slower = decided && speed.0 + speed.1 < -SLOWER_MAX;
    println!(
        "throughput: {}",
        match decided && speed.0 - speed.1 > -SLOWER_MAX {
            true => "steady",
            false if slower => "SLOWER",
            false => "not decided: the readings scatter too much",
        }
    );
    flat && some == more && !slower
}

fn mean(readings: &[&Reading], of: impl Fn(&Reading) -> f64) -> f64 {
    readings.iter().map(|reading| of(reading)).sum::<f64>() / readings.len() as f64
}

/// A mean in which every turn counts alike: a minute in which others left little has few, and they
/// scatter more.
fn by_turns(readings: &[&Reading], of: impl Fn(&Reading) -> f64) -> f64 {
    let weighed = |reading: &&Reading| of(reading) * reading.turns as f64;
    let turns: usize = readings.iter().map(|reading| reading.turns).sum();
    readings.iter().map(weighed).sum::<f64>() / turns as f64
}

/// The variance of a sum over readings, weighed by turns, from what is left of each: a share of all
/// turns times a number around 0. `fitted` numbers were fitted.
fn variance(readings: &[&Reading], fitted: usize, rest: impl Fn(&Reading) -> f64) -> f64 {
    let turns: usize = readings.iter().map(|reading| reading.turns).sum();
    let (n, share) = (readings.len() as f64, |one: &Reading| one.turns as f64 / turns as f64);
    let squares: f64 = readings.iter().map(|one| (share(one) * rest(one)).powi(2)).sum();
    squares * n / (n - fitted as f64)
}

/// How far a share moved from the first part to the second, and twice the standard error of that;
/// both printed, beside the slope of the third part.
fn drift(name: &str, parts: [&[&Reading]; 3], of: fn(&Reading) -> f64) -> (f64, f64) {
    let [early, late, warm] = parts;
    let of = |reading: &Reading| of(reading).ln();
    let spread = |part: &[&Reading]| {
        let center = by_turns(part, of);
        variance(part, 1, |reading| of(reading) - center)
    };
    let moved = (by_turns(late, of) - by_turns(early, of)).exp_m1();
    let error = 2.0 * (spread(early) + spread(late)).sqrt();

    let hours = |reading: &Reading| reading.seconds / 3600.0;
    let (x, y) = (by_turns(warm, hours), by_turns(warm, of));
    let from = |reading: &Reading| hours(reading) - x;
    let xx = by_turns(warm, |reading| from(reading).powi(2));
    let slope = by_turns(warm, |reading| from(reading) * (of(reading) - y)) / xx;
    let rest = |reading: &Reading| of(reading) - y - slope * from(reading);
    let slope_error = 2.0 * variance(warm, 2, |one| from(one) * rest(one)).sqrt() / xx;
    println!(
        "{name} as a share of the yardstick's: {:+.2} ± {:.2} %, slope {:+.2} ± {:.2} % an hour",
        moved * 100.0,
        error * 100.0,
        slope * 100.0,
        slope_error * 100.0,
    );
    (moved, error)
}
