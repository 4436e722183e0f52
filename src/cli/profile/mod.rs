//! `detco profile`: measures the data path and names what limits it.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use detco_shards::device::Number;
use detco_shards::pipeline::{OnBadSample, bad_budget};
use detco_shards::stream::ShardSet;
use detco_shards::stream::remote::shown;
use detco_shards::trace::Trace;
use detco_shards::views::Recipe;
use indicatif::HumanCount;

use self::live::Live;
use self::numbers::{Workers, positive, seconds, seconds_or_none, workers};
use self::outputs::Outputs;
use self::text::text;
use crate::config::{Config, Decode, gpu};
use crate::console::plural;
use crate::data;
use crate::profile::machine::Machine;
use crate::profile::measure::{Mode, Plan, Progress, Watch, measure};
use crate::profile::timeline::{Process, SPANS_MAX};
use crate::profile::{Data, Report, Run, Settings, Size, cache, flops, ops, training};

mod live;
mod numbers;
mod outputs;
mod text;

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
