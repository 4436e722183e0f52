//! `detco profile`: measures the data path and names what limits it.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufWriter, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use detco_shards::device::Number;
use detco_shards::pipeline::{OnBadSample, bad_budget};
use detco_shards::stats::{CHANNELS, STAGES};
use detco_shards::stream::ShardSet;
use detco_shards::stream::remote::shown;
use detco_shards::trace::Trace;
use detco_shards::views::Recipe;
use indicatif::{HumanBytes, HumanCount, ProgressBar};

use crate::config::{Config, Decode, gpu};
use crate::console::plural;
use crate::data;
use crate::profile::cache;
use crate::profile::machine::Machine;
use crate::profile::measure::{Mode, Plan, Progress, Watch, measure};
use crate::profile::timeline::{self, Process, SPANS_MAX};
use crate::profile::verdict::{count, percent};
use crate::profile::{Data, Report, Run, Settings, Size, flops, html, ops, training};
use crate::source::who_decoded;

/// Measure the data path and name what limits it
///
/// Runs the loader as in training, with its threads, slabs and channels, and takes its batches as fast as they
/// come, or at the speed of a trainer (--consumer-rate, --consumer-gflops). Prints images per second, where
/// the workers' time goes and the waits at each channel, and ends with what limits the run and a number to act
/// on. Needs no GPU. See `detco guide profile`.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  detco profile shards/train                             # what this machine can feed
  detco profile shards/train --workers 1,2,4,8 --html profile.html
  detco profile shards/train --consumer-rate 1500        # would it feed a trainer that fast?
  detco profile shards/train --mode read --cold          # what the disk gives
  detco profile s3://bucket/train --set data.cache=new   # what the object store gives
  detco profile shards/train --json - | jq .verdict
  detco profile shards/train --trace trace.json          # for ui.perfetto.dev or chrome://tracing
  detco profile --run runs/a                             # why that run's GPU was idle

How to read it: who waits is not the bottleneck. `get` is the workers' waiting for samples, `put`
their waiting for room; the consumer's waiting is the GPU's. Where both wait, the thread between
them is slow. Warm runs read the data once before; of data larger than memory or 4 GiB the first
shards. With --cold each run lasts one pass over the data at most, since the second comes from
memory.")]
pub struct Args {
    /// Folder of shards, .tar file, glob or brace list, or URLs of those (see data.cache)
    #[arg(required_unless_present = "run", conflicts_with = "run")]
    data: Vec<String>,

    /// What is done with each sample
    #[arg(long, value_enum, default_value_t = ModeName::Detco, conflicts_with = "run")]
    mode: ModeName,

    /// The decoder, in place of the recipe's data.decode
    #[arg(long, value_name = "auto|cpu|nvjpeg", conflicts_with = "run")]
    decode: Option<Decode>,

    /// Numbers of worker threads, with a measurement for each [default: one per core]
    #[arg(long, value_name = "N,N,...", value_parser = workers, conflicts_with = "run")]
    workers: Option<Workers>,

    /// Length of each measurement, seconds
    #[arg(long, value_name = "S", default_value = "10",
          allow_negative_numbers = true, value_parser = seconds, conflicts_with = "run")]
    seconds: f64,

    /// Warm-up before it, seconds; it lasts until every slab has been used once
    #[arg(long, value_name = "S", default_value = "2",
          allow_negative_numbers = true, value_parser = seconds_or_none, conflicts_with = "run")]
    warm_up: f64,

    /// A built-in recipe by name, or a TOML file, for its views, batches_ahead and model
    #[arg(long, value_name = "NAME|FILE", default_value = "detco-r50", conflicts_with = "run")]
    recipe: String,

    /// Override a key of the recipe
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "run")]
    overrides: Vec<String>,

    /// Batch size, at most all samples. Small batches make short measurements steadier
    #[arg(long, value_name = "N", default_value_t = 64, conflicts_with = "run",
          value_parser = clap::value_parser!(u64).range(1..=65_536))]
    batch: u64,

    /// Simulate a trainer that takes this many images a second
    #[arg(long, value_name = "IMAGES/S",
          allow_negative_numbers = true, value_parser = positive, conflicts_with_all = ["consumer_gflops", "run"])]
    consumer_rate: Option<f64>,

    /// Simulate a trainer of the recipe's model on a device of this speed
    #[arg(long, value_name = "GFLOP/S",
          allow_negative_numbers = true, value_parser = positive, conflicts_with = "run")]
    consumer_gflops: Option<f64>,

    /// Empty the page cache before each run instead of filling it
    #[arg(long, conflicts_with = "run")]
    cold: bool,

    /// Write everything measured as JSON; `-` for standard output, in place of the text
    #[arg(long, value_name = "FILE|-")]
    json: Option<PathBuf>,

    /// Write an HTML page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Write a timeline of the threads for Perfetto or Chrome
    #[arg(long, value_name = "FILE", conflicts_with = "run")]
    trace: Option<PathBuf>,

    /// Profile a training run by the counters in its metrics instead of measuring
    #[arg(long, value_name = "RUN")]
    run: Option<PathBuf>,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum ModeName {
    /// Read the bytes
    Read,
    /// Decode the image
    Decode,
    /// Decode, one random resized crop, flip
    Supervised,
    /// Decode, all views of the recipe
    Detco,
}

impl From<ModeName> for Mode {
    fn from(name: ModeName) -> Mode {
        match name {
            ModeName::Read => Mode::Read,
            ModeName::Decode => Mode::Decode,
            ModeName::Supervised => Mode::Supervised,
            ModeName::Detco => Mode::Detco,
        }
    }
}

/// Numbers of workers, in the order of the runs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Workers(Vec<usize>);

/// Threads beyond this are a typing error.
const WORKERS_MAX: usize = 1024;

/// `1,2,4,8`.
fn workers(text: &str) -> Result<Workers, String> {
    let mut all = Vec::new();
    for word in text.split(',') {
        let number = word.trim().parse().ok().filter(|number| (1..=WORKERS_MAX).contains(number));
        let number = number.ok_or(format!("{word:?} is no number from 1 to {WORKERS_MAX}"))?;
        if all.contains(&number) {
            return Err(format!("{number} is there twice"));
        }
        all.push(number);
    }
    Ok(Workers(all))
}

fn number(text: &str, least: f64) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "expected a number".to_owned())?;
    if number.is_finite() && number >= least {
        Ok(number)
    } else {
        Err(format!("at least {least}"))
    }
}

/// A measured time: short enough to be meant, long enough for its windows.
fn seconds(text: &str) -> Result<f64, String> {
    number(text, 0.5).and_then(|s| if s <= 86_400.0 { Ok(s) } else { Err("at most a day".into()) })
}

fn seconds_or_none(text: &str) -> Result<f64, String> {
    number(text, 0.0).and_then(|s| if s <= 86_400.0 { Ok(s) } else { Err("at most a day".into()) })
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, 0.001)
}

/// Runs the command.
///
/// # Errors
///
/// Data, recipe or run that cannot be read, a file that cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let outputs = Outputs::open(args)?;
    let (report, processes) = match &args.run {
        Some(run) => (training::report(run)?, Vec::new()),
        None => profile(args)?,
    };
    let written = outputs.write(&report, &processes);
    let mut stdout = crate::console::stdout();
    match &written {
        Ok(Some(json)) => stdout.write_all(json.as_bytes())?,
        // What was measured is shown, also where a file could not be written.
        Ok(None) | Err(_) => stdout.write_all(text(&report, &processes, args).as_bytes())?,
    }
    written.map(|_| ())
}

/// Measures once for each number of workers.
fn profile(args: &Args) -> anyhow::Result<(Report, Vec<Process>)> {
    let config = Config::load(&args.recipe, &args.overrides)?;
    let recipe = config.training_views();
    let (spec, mut set, size) = cache::choose(&args.data, args.cold, &config.data)?;
    if args.cold && set.is_remote() {
        bail!(
            "--cold empties the page cache, which says little of shards from URLs: name an \
               empty folder with --set data.cache=DIR to measure fetching"
        );
    }
    let window = data::window(config.data.window, &set)?;
    let paths: Vec<PathBuf> = set.shards().iter().map(|shard| shard.path().to_path_buf()).collect();
    let machine = Machine::of(paths.first().map_or(Path::new("."), PathBuf::as_path));
    let mode = Mode::from(args.mode);
    let settings = settings(args, &config, mode);
    let all = args.workers.clone().unwrap_or(Workers(vec![machine.cores])).0;
    let live = Live::new();
    let mut ops = Default::default();
    if set.is_remote() {
        // Nothing is read beforehand: fetching is part of what is measured.
    } else if !args.cold {
        live.fill(&set)?;
        live.say("timing the views' operations".to_owned());
        ops = operations(&set, &recipe, mode, &config);
    }
    let (mut runs, mut processes) = (Vec::new(), Vec::new());
    for &workers in &all {
        if args.cold {
            drop(set); // pages that are mapped stay
            live.say("emptying the page cache".to_owned());
            cache::empty(&paths)?;
            set = data::open(&spec, &config.data)?;
        }
        // A share for each thread: the workers, the dispatcher, the consumer.
        let spans = SPANS_MAX / all.len() / (workers + 2);
        let trace = args.trace.as_ref().map(|_| Arc::new(Trace::new(spans)));
        let plan = Plan {
            mode,
            recipe: recipe.clone(),
            window,
            seed: config.seed,
            batch: args.batch,
            decode: args.decode.unwrap_or(config.data.decode),
            gpu: gpu(Number::Bf16, None),
            batches_ahead: config.data.batches_ahead,
            reduce: config.data.reduce,
            workers,
            seconds: args.seconds,
            warm_up: args.warm_up,
            consumer: settings.consumer_images_per_s,
            once: args.cold,
            trace: trace.clone(),
            handicap: None,
        };
        let shared = Arc::new(set);
        let show = |progress: &Progress| live.show(&plan, progress);
        let watch = live.bar.as_ref().map(|_| &show as &Watch<'_>);
        let mut run = measure(&shared, &plan, watch)?;
        set = Arc::into_inner(shared).context("the loader still holds the shards")?;
        run.ops.clone_from(&ops);
        runs.push(run);
        let name = format!("{}, {}", mode.name(), plural(workers as u64, "worker"));
        processes.extend(trace.map(|trace| Process { name, tracks: trace.take() }));
    }
    live.clear();
    let warnings = in_training(&config, &set, &size, &runs);
    let spec = args.data.iter().map(|word| shown(word)).collect();
    let data = Data { spec, run: None, size: Some(size) };
    let report = Report::new(data, Some(machine), settings, runs);
    let report = report.context("no number of workers")?;
    Ok((Report { warnings, ..report }, processes))
}

/// The warnings of `detco train` for this data and recipe, a sentence each.
fn in_training(config: &Config, set: &ShardSet, size: &Size, runs: &[Run]) -> Vec<String> {
    let mut all = Vec::new();
    if size.shards == size.shards_of {
        let window = data::window(config.data.window, set);
        let order = window
            .and_then(|window| data::order(window, set, config.train.batch as u64, config.seed));
        match order {
            Ok(order) => all.extend(data::oddities(config, set, &order)),
            Err(error) => all.push(format!("train will refuse this data: {error}")),
        }
    }
    let most = runs.iter().max_by_key(|run| run.bad_samples);
    let Some((most, first)) = most.and_then(|run| Some((run, run.bad_first.as_ref()?))) else {
        return all;
    };
    let (bad, samples) = (most.bad_samples, size.samples);
    let budget = bad_budget(samples, config.data.bad_share_max);
    let comes_to = match config.data.on_bad_sample {
        OnBadSample::Fail => "train will stop (data.on_bad_sample = \"fail\")".to_owned(),
        OnBadSample::Skip if bad > budget => {
            format!("train will stop: {budget} an epoch are allowed (data.bad_share_max)")
        }
        OnBadSample::Skip => "train will replace them (data.on_bad_sample = \"skip\")".to_owned(),
    };
    let (bad, samples) = (plural(bad, "bad sample"), HumanCount(samples));
    all.push(format!("{bad} among {samples}: {comes_to}. The first: {first}"));
    all
}

fn settings(args: &Args, config: &Config, mode: Mode) -> Settings {
    let flops = match mode {
        Mode::Supervised => flops::supervised(config),
        Mode::Read | Mode::Decode | Mode::Detco => flops::training(config),
    };
    let gflops = args.consumer_gflops.map(|gflops| [gflops, flops / 1e9]);
    Settings {
        mode: mode.name().to_owned(),
        recipe: args.recipe.clone(),
        batch: args.batch,
        cold: args.cold,
        seconds: args.seconds,
        warm_up: args.warm_up,
        consumer_images_per_s: args.consumer_rate.or(gflops.map(|[device, image]| device / image)),
        consumer_gflops: gflops,
    }
}

fn operations(
    set: &ShardSet,
    recipe: &Recipe,
    mode: Mode,
    config: &Config,
) -> std::collections::BTreeMap<String, f64> {
    use detco_shards::pipeline::Views;
    let (seed, reduction_max) = (config.seed, if config.data.reduce { u32::MAX } else { 1 });
    match mode.views(recipe) {
        Views::Recipe(recipe) => ops::measure(set, &recipe, seed, reduction_max),
        Views::Read | Views::Decode => Default::default(),
    }
}

/// The status line; none if standard error is not a terminal.
struct Live {
    bar: Option<ProgressBar>,
}

impl Live {
    fn new() -> Live {
        Live { bar: std::io::stderr().is_terminal().then(ProgressBar::new_spinner) }
    }

    fn say(&self, text: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text);
            bar.tick();
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Fills the page cache.
    fn fill(&self, set: &ShardSet) -> anyhow::Result<()> {
        let (read, over) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let painter = std::thread::Builder::new().spawn_scoped(scope, || {
                while !over.load(Ordering::Relaxed) {
                    let read = HumanBytes(read.load(Ordering::Relaxed));
                    self.say(format!("filling the page cache: {read}"));
                    std::thread::park_timeout(Duration::from_millis(100));
                }
            });
            let filled = cache::fill(set, &read);
            over.store(true, Ordering::Relaxed);
            // Where no thread could be started nothing is painted.
            if let Ok(painter) = painter {
                painter.thread().unpark();
            }
            Ok(filled?)
        })
    }

    fn show(&self, plan: &Plan, now: &Progress) {
        let mut line = format!("{}, {}: ", plan.mode.name(), plural(plan.workers as u64, "worker"));
        // Writing to a String cannot fail.
        let _ = match now.measuring {
            true => write!(line, "{:.0} of {:.0} s", now.seconds.min(plan.seconds), plan.seconds),
            false => write!(line, "warming up"),
        };
        let _ = write!(line, "  {} images/s ", count(now.images_per_s));
        let total = now.counted.nanos.iter().sum::<u64>().max(1);
        for stage in STAGES {
            let share = now.counted.nanos[stage as usize] as f64 / total as f64;
            if share >= 0.01 {
                let _ = write!(line, " {} {}", stage.name(), percent(share));
            }
        }
        self.say(line);
    }
}

/// The output files. They are opened before anything is measured, so that ten minutes of measuring do not end
/// with "no such folder".
struct Outputs {
    json: Option<Output>,
    html: Option<Output>,
    trace: Option<Output>,
    /// `--json -`.
    stdout: bool,
}

/// An output file being written under a temporary name.
struct Output {
    path: PathBuf,
    part: PathBuf,
    file: fs::File,
}

impl Outputs {
    fn open(args: &Args) -> anyhow::Result<Outputs> {
        let stdout = args.json.as_deref() == Some(Path::new("-"));
        let json = args.json.as_deref().filter(|_| !stdout);
        let named: Vec<&Path> =
            [json, args.html.as_deref(), args.trace.as_deref()].into_iter().flatten().collect();
        for (at, path) in named.iter().enumerate() {
            if named[..at].contains(path) {
                bail!("{} is named for two outputs", path.display());
            }
        }
        let open = |path: Option<&Path>| path.map(Output::open).transpose();
        Ok(Outputs {
            json: open(json)?,
            html: open(args.html.as_deref())?,
            trace: open(args.trace.as_deref())?,
            stdout,
        })
    }

    /// Writes all of them; returns the JSON if it is for standard output.
    fn write(self, report: &Report, processes: &[Process]) -> anyhow::Result<Option<String>> {
        let mut json = serde_json::to_string_pretty(report)?;
        json.push('\n');
        if let Some(output) = self.json {
            output.finish(|file| file.write_all(json.as_bytes()))?;
        }
        if let Some(output) = self.html {
            output.finish(|file| file.write_all(html::page(report).as_bytes()))?;
        }
        if let Some(output) = self.trace {
            output.finish(|file| timeline::write(processes, file))?;
        }
        Ok(self.stdout.then_some(json))
    }
}

impl Output {
    fn open(path: &Path) -> anyhow::Result<Output> {
        if path.is_dir() {
            bail!("{} is a folder: name a file to write", path.display());
        }
        super::check_folder(path)?;
        let mut name = path.file_name().context("an output needs a file name")?.to_owned();
        name.push(".part");
        let part = path.with_file_name(name);
        let file =
            fs::File::create(&part).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Output { path: path.to_path_buf(), part, file })
    }

    fn finish(
        self,
        write: impl FnOnce(&mut BufWriter<&fs::File>) -> std::io::Result<()>,
    ) -> anyhow::Result<()> {
        let mut writer = BufWriter::new(&self.file);
        let written = write(&mut writer).and_then(|()| writer.flush());
        drop(writer);
        written
            .and_then(|()| self.file.sync_all())
            .and_then(|()| fs::rename(&self.part, &self.path))
            .with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // After a rename there is nothing left under this name; after an error it is litter.
        let _ = fs::remove_file(&self.part);
    }
}

/// A note for a run with a cold cache that was served from memory all the same.
fn too_small_to_be_cold(run: &Run) -> Option<String> {
    let came = run.megabytes_per_s * 1e6 * run.seconds;
    let (came, disk) = (came as u64, run.disk_bytes);
    (disk < came / 2).then(|| {
        format!(
            "  note: of {} that came in {} were read from the disk meanwhile: the rest was in memory by \
             then, read ahead or while warming up. This is not what the disk gives: take more data\n",
            HumanBytes(came),
            HumanBytes(disk),
        )
    })
}

/// The report for a terminal.
fn text(report: &Report, processes: &[Process], args: &Args) -> String {
    let mut out = head(report);
    for run in &report.runs {
        out.push('\n');
        table(run, &mut out);
        out += &too_small_to_be_cold(run).filter(|_| report.settings.cold).unwrap_or_default();
    }
    if report.runs.len() > 1 {
        out.push('\n');
        scaling(report, &mut out);
    }
    let cut: u64 = processes.iter().map(Process::cut).sum();
    if cut > 0 {
        out += &format!("\nthe timeline leaves out {} later spans\n", HumanCount(cut));
    }
    for path in [&args.json, &args.html, &args.trace].into_iter().flatten() {
        out += &format!("\nwritten: {}", path.display());
    }
    if args.json.is_some() || args.html.is_some() || args.trace.is_some() {
        out.push('\n');
    }
    out += &format!("\n{}\n", report.verdict.text);
    for warning in &report.warnings {
        out += &format!("warning: {warning}\n");
    }
    out
}

fn head(report: &Report) -> String {
    let settings = &report.settings;
    let mut out = match (&report.data.run, &report.data.size) {
        (Some(run), _) => {
            format!("{}: batch {}, {}\n", run.display(), settings.batch, settings.recipe)
        }
        (None, size) => {
            let about = size.as_ref().map_or(String::new(), amount);
            let cache = if settings.cold { "cold" } else { "warm" };
            let spec = report.data.spec.join(" ");
            let (batch, recipe) = (settings.batch, &settings.recipe);
            format!("{spec}: {about}; page cache {cache}; batch {batch}, {recipe}\n")
        }
    };
    if let Some(machine) = &report.machine {
        let unknown = || "unknown".to_owned();
        let decoding = report.runs.first().map_or(machine.decoder, |run| &run.decoding);
        let memory = machine.memory_bytes.map_or_else(unknown, |b| HumanBytes(b).to_string());
        out += &format!(
            "{} of {}, {}, {memory} of memory, {}; decoding with {decoding}\n",
            plural(machine.cores as u64, "core"),
            machine.cpu.clone().unwrap_or_else(unknown),
            machine.simd,
            machine.file_system.clone().unwrap_or_else(unknown),
        );
    }
    if let Some(rate) = settings.consumer_images_per_s {
        out += &format!("consumer: takes {} images/s", count(rate));
        if let Some([device, image]) = settings.consumer_gflops {
            out += &format!(", {} GFLOP/s at {image:.1} GFLOP an image", count(device));
        }
        out.push('\n');
    }
    out
}

fn amount(size: &Size) -> String {
    let of = match size.shards_of {
        of if of == size.shards => String::new(),
        of => format!(" of {}", HumanCount(of)),
    };
    let shards = plural(size.shards, "shard");
    format!("{} samples in {shards}{of}, {}", HumanCount(size.samples), HumanBytes(size.bytes))
}

/// One run's figures.
fn table(run: &Run, out: &mut String) {
    let low = run.windows.iter().copied().fold(f64::INFINITY, f64::min);
    let high = run.windows.iter().copied().fold(0.0, f64::max);
    *out += &format!(
        "{}, {}, {:.1} s: {} images/s ({} to {}), {} MB/s\n",
        run.mode,
        plural(run.workers as u64, "worker"),
        run.seconds,
        count(run.images_per_s),
        count(low),
        count(high),
        count(run.megabytes_per_s),
    );
    if let Some(counts) = &run.decoded {
        *out += &format!("  decoded: {}\n", who_decoded(counts));
    }
    *out += "  stage       ms an image      on a CPU    of the time\n";
    for stage in STAGES {
        let Some(time) = run.stages.get(stage.name()) else { continue };
        *out += &format!(
            "  {:<8} {:>14.3} {:>13.3} {:>14}\n",
            stage.name(),
            time.wall_ms_per_image,
            time.cpu_ms_per_image,
            percent(time.share),
        );
    }
    if !run.channels.is_empty() {
        *out += "  channel    found   of   put waits p50     p90     p99   get waits p50     p90     p99\n";
    }
    for channel in CHANNELS {
        let Some(times) = run.channels.get(channel.name()) else { continue };
        *out += &format!("  {:<8} {:>7.1} {:>4}", channel.name(), times.occupancy, times.capacity);
        for end in [&times.put, &times.get] {
            *out +=
                &format!(" {:>15} {:>7} {:>7}", micros(end.p50), micros(end.p90), micros(end.p99));
        }
        out.push('\n');
    }
    if !run.ops.is_empty() {
        *out += "  operations measured apart, us an image:";
        let mut ops: Vec<_> = run.ops.iter().collect();
        ops.sort_by(|a, b| b.1.total_cmp(a.1));
        for (at, (name, micros)) in ops.into_iter().enumerate() {
            *out += if at % 5 == 0 { "\n    " } else { "  " };
            *out += &format!("{name} {micros:.0}");
        }
        out.push('\n');
    }
    remarks(run, out);
}

/// What came from URLs.
fn fetched(run: &Run, out: &mut String) {
    let Some(fetched) = &run.fetched else { return };
    let waits = &fetched.waits;
    *out += &format!(
        "  fetched {} MB/s: {}, {:.1} at a time, {} made again; a shard was waited for {} of the \
         time ({} waits, p50 {}, p99 {})\n",
        count(fetched.megabytes_per_s),
        plural(fetched.shards, "shard"),
        fetched.at_a_time,
        plural(fetched.failures, "attempt"),
        percent(fetched.wait_share),
        waits.count,
        micros(waits.p50),
        micros(waits.p99),
    );
}

fn remarks(run: &Run, out: &mut String) {
    fetched(run, out);
    let mut parts = vec![format!("consumer waited {}", percent(run.consumer.wait_share))];
    parts.push(format!("dispatcher busy {}", percent(run.dispatcher_busy)));
    if run.slabs.bytes > 0 {
        let (slabs, bytes) = (run.slabs, HumanBytes(run.slabs.bytes as u64));
        parts.push(format!("{} slabs of {bytes}, reused {} times", slabs.count, slabs.reuses));
    }
    if !run.channels.is_empty() {
        let faults = run.page_faults;
        let (major, minor) = (HumanCount(faults.major), HumanCount(faults.minor));
        parts.push(format!("{major} major and {minor} minor page faults"));
        parts.push(format!("{} from the disk", HumanBytes(run.disk_bytes)));
    }
    if let Some(allocations) = run.allocations_per_image {
        parts.push(format!("{allocations:.1} allocations an image"));
    }
    if run.bad_samples > 0 {
        parts.push(format!("{} bad and replaced", plural(run.bad_samples, "sample")));
    }
    for pair in parts.chunks(3) {
        *out += &format!("  {}\n", pair.join("; "));
    }
}

/// A time in microseconds with its unit, in seven characters.
fn micros(us: f64) -> String {
    match us {
        us if us < 1.0 => format!("{us:.2} us"),
        us if us < 1e3 => format!("{us:.0} us"),
        us if us < 1e6 => format!("{:.0} ms", us / 1e3),
        us => format!("{:.1} s", us / 1e6),
    }
}

fn scaling(report: &Report, out: &mut String) {
    *out += "workers  images/s   times the first   bottleneck\n";
    let first = report.runs.first().map_or(1.0, |run| run.images_per_s).max(f64::MIN_POSITIVE);
    for run in &report.runs {
        *out += &format!(
            "{:>7} {:>9} {:>17.2}   {}\n",
            run.workers,
            count(run.images_per_s),
            run.images_per_s / first,
            run.verdict.bottleneck,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_workers_are_numbers_that_make_sense() {
        assert_eq!(workers("1,2, 8"), Ok(Workers(vec![1, 2, 8])));
        for wrong in ["", "0", "1,,2", "two", "4,4", "-1", "100000", "1.5"] {
            assert!(workers(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_have_units() {
        let shown = [0.25, 12.0, 3_400.0, 2.5e6].map(micros);
        assert_eq!(shown, ["0.25 us", "12 us", "3 ms", "2.5 s"]);
    }
}
