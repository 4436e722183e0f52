//! One measurement: the loader runs as in training, a consumer takes its batches, and the counters are
//! read at the beginning and the end of the measured time.

mod ticks;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;
use std::time::{Duration, Instant};

use detco_shards::device::{Counts, Decode, Setup, Share, Unavailable};
use detco_shards::limits;
use detco_shards::pipeline::{BadSample, LoaderOptions, OnBadSample, TASKS_MAX, Views};
use detco_shards::stats::{Channel, Snapshot, Stage, Stats};
use detco_shards::stream::ShardSet;
use detco_shards::stream::remote::RemoteSnapshot;
use detco_shards::trace::{Recorder, Trace};
use detco_shards::views::Recipe;
use thiserror::Error;

use crate::config::Window;
use crate::data::{self, DataError};
use crate::source::{Source, SourceError};

use self::ticks::{Tick, series, windows};
use super::machine::Paging;
use super::verdict::{CONTENT, Consumer, Evidence};
use super::{ConsumerTime, Fetched, PageFaults, Run, Slabs, allocations, channels, per_image};

/// Interval of counting images for the windows and the series.
const TICK: Duration = Duration::from_millis(20);
/// With a cold cache, the most of the data set that the warm-up may read.
const COLD_WARM_UP: f64 = 0.25;

/// With a cold cache, the least number of measured batches.
const COLD_BATCHES: u64 = 3;

/// What is done with each sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Read its bytes.
    Read,
    /// Decode it.
    Decode,
    /// Render one random resized crop with a flip.
    Supervised,
    /// Render the recipe's views.
    Detco,
}

impl Mode {
    /// Its name in reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Read => "read",
            Mode::Decode => "decode",
            Mode::Supervised => "supervised",
            Mode::Detco => "detco",
        }
    }

    /// The views that the loader is asked for.
    pub fn views(self, recipe: &Recipe) -> Views {
        match self {
            Mode::Read => Views::Read,
            Mode::Decode => Views::Decode,
            Mode::Supervised => {
                let size = recipe.groups.first().map_or(224, |group| group.size);
                Views::Recipe(Recipe::supervised(size))
            }
            Mode::Detco => Views::Recipe(recipe.clone()),
        }
    }
}

/// The settings of a measurement.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is done with each sample.
    pub mode: Mode,
    /// The recipe of the views.
    pub recipe: Recipe,
    /// The window of the shuffle, as [`crate::data::window`] returned it.
    pub window: Window,
    /// Seed of the order and the views.
    pub seed: u64,
    /// Samples of a batch; at most as many as there are.
    pub batch: u64,
    /// The decoder.
    pub decode: Decode,
    /// The settings for opening a GPU.
    pub gpu: Setup,
    /// Batches that may be ahead of the consumer.
    pub batches_ahead: usize,
    /// See [`LoaderOptions::reduce`].
    pub reduce: bool,
    /// Threads that read, decode and render.
    pub workers: usize,
    /// Length of the measured time.
    pub seconds: f64,
    /// Length of the time before it. It goes on until every slab has been used.
    pub warm_up: f64,
    /// Images/s of the simulated consumer; `None` takes them as fast as they come.
    pub consumer: Option<f64>,
    /// Whether every sample is read at most once, since a second read would come from memory.
    pub once: bool,
    /// Records a timeline of the measured time.
    pub trace: Option<Arc<Trace>>,
    /// See [`LoaderOptions::handicap`].
    pub handicap: Option<(Stage, Duration)>,
}

/// Why a measurement failed.
#[derive(Debug, Error)]
pub enum MeasureError {
    /// The loader ended with an error.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The system refused a thread.
    #[error("cannot start a thread: {0}{hint}", hint = limits::of_threads(.0))]
    Thread(#[source] std::io::Error),
    /// The requested decoder is not available.
    #[error(transparent)]
    Decode(#[from] Unavailable),
    /// The data has no order with these settings.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The data ended before enough was measured.
    #[error(
        "{samples} samples are too few: a cold cache is cold once, and {COLD_BATCHES} batches must \
         be left after a quarter of them; take a smaller --batch, or more data"
    )]
    TooShort {
        /// Samples of the data set.
        samples: u64,
    },
}

/// A callback for progress.
pub type Watch<'a> = dyn Fn(&Progress) + Sync + 'a;

/// The progress of a measurement.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Whether the measured time has begun.
    pub measuring: bool,
    /// Seconds since the start, or since the measured time began.
    pub seconds: f64,
    /// Images a second since the last call.
    pub images_per_s: f64,
    /// The counters since the last call.
    pub counted: Snapshot,
}

/// Measures once. The callback is called about ten times a second, from another thread.
///
/// # Errors
/// The data is too short, or the loader fails. Samples that cannot be used are replaced and counted.
pub fn measure(
    set: &Arc<ShardSet>,
    plan: &Plan,
    watch: Option<&Watch<'_>>,
) -> Result<Run, MeasureError> {
    let plan = &Plan { batch: plan.batch.min(set.len()), ..plan.clone() };
    let order = data::order(plan.window, set, plan.batch, plan.seed)?;
    let options = LoaderOptions {
        views: plan.mode.views(&plan.recipe),
        workers: plan.workers,
        batches_ahead: plan.batches_ahead,
        reduce: plan.reduce,
        epochs: if plan.once { 1 } else { u32::MAX },
        on_bad_sample: OnBadSample::Skip,
        bad_share_max: 1.0,
        bad_run_max: u32::MAX,
        trace: plan.trace.clone(),
        handicap: plan.handicap,
        ..LoaderOptions::train(plan.recipe.clone(), order.clone(), plan.seed, 1)
    };
    let decoding = plan.decode.resolve(&plan.gpu, &options.views)?;
    let decoder = decoding.to_string();
    let loader = Source::start(set, options, decoding, Share::Measure, None)?;
    let meter = Meter::new(Arc::clone(loader.counters()));
    let found = std::thread::scope(|scope| {
        let clock = Builder::new().name("detco-clock".into());
        let clock = clock.spawn_scoped(scope, || meter.run(watch)).map_err(MeasureError::Thread)?;
        let taken = Taker::new(plan, loader, &meter, order.steps_per_epoch()).run();
        meter.over.store(true, Ordering::Relaxed);
        clock.thread().unpark();
        // A panic of `watch` goes on here.
        let ticks = clock.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        taken.map(|taken| taken.map(|taken| (taken, ticks)))
    })?;
    match found {
        Some((taken, ticks)) if !plan.once || taken.batches >= COLD_BATCHES => {
            Ok(Run { decoding: decoder, ..taken.into_run(plan, &ticks) })
        }
        _ => Err(MeasureError::TooShort { samples: set.len() }),
    }
}

/// Counts images at short intervals beside the consumer, which may be asleep or waiting.
struct Meter {
    stats: Arc<Stats>,
    begin: Instant,
    measuring: AtomicBool,
    over: AtomicBool,
}

impl Meter {
    fn new(stats: Arc<Stats>) -> Meter {
        let (measuring, over) = (AtomicBool::new(false), AtomicBool::new(false));
        Meter { stats, begin: Instant::now(), measuring, over }
    }

    fn run(&self, watch: Option<&Watch<'_>>) -> Vec<Tick> {
        const WATCH_EVERY: usize = 5;
        let mut ticks = Vec::with_capacity(4096);
        let (mut last, mut since) = (self.stats.snapshot(), self.begin);
        let mut measured_from = None;
        while !self.over.load(Ordering::Relaxed) {
            ticks.push((Instant::now(), self.stats.samples()));
            if let Some(watch) = watch.filter(|_| ticks.len().is_multiple_of(WATCH_EVERY)) {
                let (now, counters) = (Instant::now(), self.stats.snapshot());
                let counted = counters.since(&last);
                let measuring = self.measuring.load(Ordering::Relaxed);
                if measuring {
                    measured_from.get_or_insert(now);
                }
                watch(&Progress {
                    measuring,
                    seconds: (now - measured_from.unwrap_or(self.begin)).as_secs_f64(),
                    images_per_s: counted.samples as f64 / (now - since).as_secs_f64(),
                    counted,
                });
                (last, since) = (counters, now);
            }
            std::thread::park_timeout(TICK);
        }
        ticks.push((Instant::now(), self.stats.samples()));
        ticks
    }
}

/// Everything that is counted, at one moment.
struct Moment {
    at: Instant,
    counters: Snapshot,
    paging: Paging,
    allocations: Option<u64>,
    fetched: Option<RemoteSnapshot>,
}

impl Moment {
    fn now(loader: &Source) -> Moment {
        let (paging, allocations) = (Paging::now(), allocations::count());
        let fetched = loader.set().fetched();
        Moment { at: Instant::now(), counters: loader.stats(), paging, allocations, fetched }
    }
}

/// The consumer: takes batches, and for each is busy as long as a trainer of its speed would be.
struct Taker<'a> {
    plan: &'a Plan,
    loader: Source,
    meter: &'a Meter,
    recorder: Option<Recorder>,
    /// Batches of a run that reads everything once.
    batches_of: u64,
    batches_seen: u64,
    start: Option<Moment>,
    busy: Duration,
    batches: u64,
    bad: Bad,
    /// Whether the newest batch was not there at once.
    starved: bool,
}

/// Samples that could not be used, each counted once however often it was drawn.
#[derive(Default)]
struct Bad {
    samples: HashSet<u64>,
    /// The first of them, and its reason.
    first: Option<String>,
}

impl Bad {
    fn add(&mut self, found: &[BadSample]) {
        for bad in found {
            self.samples.insert(bad.sample);
            self.first.get_or_insert_with(|| {
                let BadSample { shard, key, offset, error, .. } = bad;
                format!("{}: sample {key:?} at byte {offset}: {error}", shard.display())
            });
        }
    }
}

/// What was counted between two moments.
struct Taken {
    start: Moment,
    end: Moment,
    busy: Duration,
    batches: u64,
    bad: Bad,
    slabs: (usize, usize),
    decoded: Option<Counts>,
}

impl<'a> Taker<'a> {
    fn new(plan: &'a Plan, loader: Source, meter: &'a Meter, batches_of: u64) -> Taker<'a> {
        let recorder = plan.trace.as_ref().map(|trace| trace.recorder("consumer".into()));
        let busy = Duration::ZERO;
        Taker {
            plan,
            loader,
            meter,
            recorder,
            batches_of,
            batches_seen: 0,
            start: None,
            busy,
            batches: 0,
            bad: Bad::default(),
            starved: false,
        }
    }

    /// `None` when the data ended before the measured time began.
    fn run(mut self) -> Result<Option<Taken>, MeasureError> {
        let mut before = Instant::now();
        loop {
            self.begin_if_warm();
            let Some(batch) = self.loader.next() else { break };
            let batch = batch?;
            let (step, samples) = (batch.cursor().step, batch.samples().len());
            self.bad.add(batch.bad());
            self.span("wait", before, step);
            // Longer than it takes to hand a batch over.
            self.starved = before.elapsed() > Duration::from_millis(1);
            self.batches_seen += 1;
            if self.start.is_some() {
                self.batches += 1;
            }
            before = Instant::now();
            self.loader.pass(batch)?;
            let going_on = self.step(samples);
            self.span("step", before, self.batches_seen);
            before = Instant::now();
            if !going_on {
                break;
            }
        }
        if let Some(trace) = &self.plan.trace {
            trace.stop();
        }
        let end = Moment::now(&self.loader);
        let (busy, batches, bad) = (self.busy, self.batches, self.bad);
        let slabs = self.loader.slabs();
        let decoded = self.loader.counts();
        Ok(self.start.take().map(|start| Taken { start, end, busy, batches, bad, slabs, decoded }))
    }

    fn span(&mut self, name: &'static str, start: Instant, of: u64) {
        if let Some(recorder) = &mut self.recorder {
            recorder.span(name, start, Instant::now(), of);
        }
    }

    /// Simulates the step on a batch; returns false when the measured time is over. As in training, the slab
    /// is free as soon as the step begins.
    fn step(&mut self, samples: usize) -> bool {
        let length = self.plan.consumer.map_or(0.0, |rate| samples as f64 / rate);
        let end = Instant::now() + Duration::from_secs_f64(length.min(1e6));
        loop {
            self.begin_if_warm();
            let now = Instant::now();
            if self
                .start
                .as_ref()
                .is_some_and(|start| (now - start.at).as_secs_f64() >= self.plan.seconds)
            {
                return false;
            }
            let left = end.saturating_duration_since(now);
            if left.is_zero() {
                return true;
            }
            // In short pieces, so that both edges of the measured time are met.
            std::thread::sleep(left.min(TICK));
            if self.start.is_some() {
                self.busy += now.elapsed();
            }
        }
    }

    /// Begins the measured time when the warm-up is over and every slab has been written once: the
    /// first touch of its pages is not steady state.
    fn begin_if_warm(&mut self) {
        if self.start.is_some() {
            return;
        }
        let (seconds, plan) = (self.meter.begin.elapsed().as_secs_f64(), self.plan);
        let (slabs, _) = self.loader.slabs();
        let finished = self.meter.stats.samples();
        let touched = finished >= slabs as u64 * plan.batch;
        // Before a slower consumer all slabs but one are full; a faster one waits.
        let ahead = finished.saturating_sub(self.batches_seen * plan.batch);
        let settled = self.starved || ahead >= (slabs as u64 - 1) * plan.batch;
        let mut warm = seconds >= plan.warm_up && touched && settled;
        // A very slow pipeline is measured all the same.
        warm |= seconds >= plan.warm_up + plan.seconds;
        if plan.once {
            let spent = self.batches_seen as f64 >= self.batches_of as f64 * COLD_WARM_UP;
            warm |= spent && seconds > 0.0;
        }
        if warm {
            self.start = Some(Moment::now(&self.loader));
            self.meter.measuring.store(true, Ordering::Relaxed);
            if let Some(trace) = &self.plan.trace {
                trace.start();
            }
        }
    }
}

impl Taken {
    fn into_run(self, plan: &Plan, ticks: &[Tick]) -> Run {
        let seconds = (self.end.at - self.start.at).as_secs_f64().max(1e-9);
        let counted = self.end.counters.since(&self.start.counters);
        let (wall_ms, cpu_ms) = per_image(&counted, plan.workers, seconds);
        let waited = 1.0 - (self.busy.as_secs_f64() / seconds).min(1.0);
        let finished = counted.samples as f64 / seconds;
        let images_per_s = match plan.consumer {
            Some(rate) if waited < CONTENT => rate * (1.0 - waited),
            _ => finished,
        };
        let image_bytes = counted.bytes as f64 / counted.samples.max(1) as f64;
        let paging = self.end.paging.since(self.start.paging);
        let evidence = Evidence {
            workers: plan.workers,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            images_per_s,
            megabytes_per_s: images_per_s * image_bytes / 1e6,
            wall_ms,
            cpu_ms,
            dispatcher_busy: 1.0 - (counted.dispatcher_nanos() as f64 / 1e9 / seconds).min(1.0),
            shard_wait: (counted.shard_nanos as f64 / 1e9 / seconds).min(1.0),
            from_disk: Some(paging.major > 0 || paging.disk_bytes > 0),
            consumer: match plan.consumer {
                Some(images_per_s) => Consumer::Simulated { images_per_s },
                None => Consumer::Eager,
            },
            consumer_wait: waited,
        };
        let fetched = self.end.fetched.as_ref().zip(self.start.fetched.as_ref());
        let fetched = fetched.map(|(end, start)| {
            let fetched = end.since(start);
            Fetched {
                megabytes_per_s: fetched.bytes as f64 / 1e6 / seconds,
                shards: fetched.shards,
                failures: fetched.failures,
                at_a_time: fetched.fetch_nanos as f64 / 1e9 / seconds,
                wait_share: evidence.shard_wait,
                waits: (&fetched.waits).into(),
            }
        });
        let (slabs, slab_bytes) = self.slabs;
        let allocations = self.end.allocations.zip(self.start.allocations);
        let images = counted.samples.max(1) as f64;
        let taken = |counters: &Snapshot| counters.channel(Channel::Slabs).get.count();
        let reused = |counters: &Snapshot| taken(counters).saturating_sub(slabs as u64);
        let reuses = reused(&self.end.counters) - reused(&self.start.counters);
        Run {
            windows: windows(ticks, self.start.at, self.end.at),
            series: series(ticks, self.start.at, self.end.at),
            channels: channels(&counted, [TASKS_MAX, slabs, slabs]),
            page_faults: PageFaults { major: paging.major, minor: paging.minor },
            disk_bytes: paging.disk_bytes,
            allocations_per_image: allocations.map(|(end, start)| (end - start) as f64 / images),
            slabs: Slabs { count: slabs, bytes: slab_bytes, reuses },
            consumer: ConsumerTime { batches: self.batches, wait_share: waited },
            fetched,
            bad_samples: self.bad.samples.len() as u64,
            bad_first: self.bad.first,
            decoded: self.decoded,
            ..Run::of(plan.mode.name(), seconds, counted.samples, &evidence)
        }
    }
}
