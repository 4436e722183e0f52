//! The training loop, one screen; the only place that knows everything.
//!
//! A run is a folder. [`train`] opens it (new, or where its last checkpoint left off), then repeats:
//! take a batch, make an update, write down what it saw, save when due. On a CPU a run that was
//! killed and resumed has the same losses and weights, bit for bit, as one that was not.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use detco_shards::format::ShardError;
use detco_shards::order::{Cursor, Order, OrderError};
use detco_shards::pipeline::{Filled, Loader, LoaderOptions, PipelineError, Views};
use detco_shards::stats::Snapshot;
use detco_shards::stream::ShardSet;
use thiserror::Error;

use crate::batch::{Batch, BatchError, Feeder, Form, Sections};
use crate::checkpoint::{self, CheckpointError, State};
use crate::config::{Config, ConfigError};
use crate::device::{self, DeviceError};
use crate::dist::local::Local;
use crate::eval::knn::{self, KnnError, KnnOptions};
use crate::metrics::{self, Metrics, MetricsError, Plan, Progress, Record, names};
use crate::model::{Model, ModelError};
use crate::optim::Sgd;
use crate::profile::training;
use crate::schedule::learning_rate;
use crate::shim::ShimError;
use crate::step::{self, At, Pending, StepError, StepReport};
use crate::weights::{self, WeightsError};

/// How a run begins.
#[derive(Debug)]
pub enum Start {
    /// In a new folder.
    New {
        /// The folder; it may exist but must hold no checkpoint.
        run: PathBuf,
        /// The resolved configuration.
        config: Box<Config>,
    },
    /// From the last checkpoint of a run.
    Resume {
        /// The run's folder.
        run: PathBuf,
        /// `--set` arguments: only keys that leave the mathematics of the run alone.
        overrides: Vec<String>,
        /// Where the same data lies now; empty means where it was.
        data: Vec<String>,
    },
}

/// How a run ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All epochs, or `train.steps_max` steps, are done.
    Finished,
    /// A signal asked for the end; a checkpoint was written.
    Stopped,
}

/// Why a run ended early.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say what the variants and fields are")]
pub enum TrainError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Shards(#[from] ShardError),
    #[error("{source} (train.batch)")]
    Order { source: OrderError },
    #[error("{0}")]
    Pipeline(#[source] Box<PipelineError>),
    #[error(transparent)]
    Batch(#[from] BatchError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Step(#[from] StepError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error("the kNN monitor failed: {0}")]
    Knn(#[source] Box<KnnError>),
    #[error("{0}")]
    Weights(#[source] Box<WeightsError>),
    #[error("no shards: name them with --data, or in the config under data.shards")]
    NoData,
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Shim(#[from] ShimError),
    #[error(
        "{run} already holds checkpoints: go on with `detco train --resume {run}`, or name another \
         folder"
    )]
    RunExists { run: PathBuf },
    #[error("{run} is in use by another process")]
    InUse { run: PathBuf },
    #[error(
        "the data is not what the run was started with: {found_samples} samples, fingerprint \
         {found:016x}; the checkpoint names {expected_samples} samples, {expected:016x}"
    )]
    DataChanged { found: u64, found_samples: u64, expected: u64, expected_samples: u64 },
    #[error(
        "--set with --resume would change the mathematics of the run: only data.*, checkpoint.*, \
         monitor.*, train.device, train.deterministic, train.threads and train.steps_max may change. \
         Start a new run with --init to go another way"
    )]
    ResumeChanges,
    #[error(
        "step {step}: the loss or a gradient is not finite (loss {loss}, gradient norm \
         {gradient_norm}). The last good checkpoint is {last_good}\nhint: lower optim.lr"
    )]
    NotFinite { step: u64, loss: f64, gradient_norm: f64, last_good: String },
    #[error(
        "collapse: since step {since} the {scope} embeddings of Res{level} spread less than \
         {share} of what even directions would (standard deviation {std:.2e} at step {step}). The \
         last good checkpoint is {last_good}\nhint: lower optim.lr, or set \
         monitor.collapse_share = 0 to go on"
    )]
    Collapsed {
        step: u64,
        since: u64,
        level: u8,
        scope: String,
        std: f64,
        share: f64,
        last_good: String,
    },
    #[error("cannot listen for signals: {0}")]
    Signals(#[source] std::io::Error),
    #[error("cannot {what} {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
}

impl From<PipelineError> for TrainError {
    fn from(error: PipelineError) -> TrainError {
        TrainError::Pipeline(Box::new(error))
    }
}

impl From<WeightsError> for TrainError {
    fn from(error: WeightsError) -> TrainError {
        TrainError::Weights(Box::new(error))
    }
}

impl From<KnnError> for TrainError {
    fn from(error: KnnError) -> TrainError {
        TrainError::Knn(Box::new(error))
    }
}

impl TrainError {
    /// The exit code of its own, if it has one.
    pub fn code(&self) -> Option<u8> {
        match self {
            TrainError::NotFinite { .. } | TrainError::Collapsed { .. } => {
                Some(crate::cli::EXIT_DIVERGED)
            }
            TrainError::Pipeline(error) => match **error {
                PipelineError::Thread(_) | PipelineError::Ended { .. } => None,
                _ => Some(crate::cli::EXIT_BAD_DATA),
            },
            _ => None,
        }
    }
}

/// Trains until the end, a signal, or an error.
pub fn train(start: Start) -> Result<Outcome, TrainError> {
    let stop = listen()?;
    let mut run = Run::open(start)?;
    if run.step == 0 {
        run.monitor_knn()?;
        run.save()?; // the untrained network: what everything later is compared with
    }
    let outcome = loop {
        if run.is_finished() {
            break Outcome::Finished;
        }
        if stop.load(Ordering::Relaxed) {
            break Outcome::Stopped;
        }
        let (filled, waited) = run.next()?; // the only place that waits for data
        let batch = run.batch(&filled)?;
        run.quarantine(&filled)?;
        drop(filled); // its slab is free for the workers while the step runs
        run.update(&batch, waited)?; // looks at what the update before has seen
        if run.at_epoch_end() {
            run.look()?;
            run.monitor_knn()?;
        }
        if run.is_due() {
            run.save()?;
        }
    };
    run.save()?;
    run.progress.finish();
    match outcome {
        Outcome::Finished => {
            eprintln!("finished: {} updates in {}", run.step, run.folder.display())
        }
        Outcome::Stopped => eprintln!(
            "stopped after step {}; go on with `detco train --resume {}`",
            run.step,
            run.folder.display()
        ),
    }
    Ok(outcome)
}

/// Everything of a run that is open.
struct Run {
    folder: PathBuf,
    config: Config,
    feeder: Feeder,
    set: Arc<ShardSet>,
    order: Order,
    loader: Loader,
    model: Model,
    sgd: Sgd,
    metrics: Metrics,
    progress: Progress,
    monitor: Option<Monitor>,
    /// The next batch.
    cursor: Cursor,
    /// Updates made, the one under way among them.
    step: u64,
    /// The last update, until it has been looked at: a device works on it while the host prepares
    /// the next.
    under_way: Option<UnderWay>,
    /// For each spread of the report: the step since which it has been below the threshold.
    collapsing: Vec<Option<u64>>,
    window: Window,
    _lock: File,
}

/// An update that the device has been given, and where the run stood after it.
struct UnderWay {
    pending: Pending,
    step: u64,
    epoch: u32,
    /// Of the update after it.
    learning_rate: f64,
}

/// The kNN monitor's sets.
struct Monitor {
    train: Arc<ShardSet>,
    test: Arc<ShardSet>,
}

/// What happened since metrics were last written.
#[derive(Debug)]
struct Window {
    start: Instant,
    waited: Duration,
    samples: u64,
    /// The loader's counters at the start.
    loader: Snapshot,
}

impl Window {
    fn new(loader: &Loader) -> Window {
        let (start, loader) = (Instant::now(), loader.stats());
        Window { start, waited: Duration::ZERO, samples: 0, loader }
    }
}

impl Run {
    fn open(start: Start) -> Result<Run, TrainError> {
        let (folder, config, saved) = match start {
            Start::New { run, config } => {
                if !checkpoint::list(&run)?.is_empty() {
                    return Err(TrainError::RunExists { run });
                }
                (run, *config, None)
            }
            Start::Resume { run, overrides, data } => {
                let saved = checkpoint::open(&run, None)?;
                let config = resumed_config(&saved.state.config, &overrides, data)?;
                (run, config, Some(saved))
            }
        };
        config.validate()?;
        if config.data.shards.is_empty() {
            return Err(TrainError::NoData);
        }
        let set = Arc::new(ShardSet::open(&config.data.shards)?);
        if let Some(state) = saved.as_ref().map(|saved| &saved.state) {
            check_data(&set, state)?;
        }
        let found = device::find(config.train.device)?;
        let device = found.device;
        device::set_numerics(&config.train)?;
        if config.train.threads > 0 {
            tch::set_num_threads(config.train.threads);
        }
        let order = Order::shuffled(set.len(), config.train.batch as u64, config.seed)
            .map_err(|source| TrainError::Order { source })?;
        fs::create_dir_all(&folder).map_err(io_error("create", &folder))?;
        let lock = lock(&folder)?;
        checkpoint::write_whole(&folder.join("config.toml"), config.to_toml().as_bytes())?;

        let mut model = Model::new(&config, device)?;
        let mut sgd =
            Sgd::new(model.query.parameters(), config.optim.momentum, config.optim.weight_decay);
        let (mut cursor, mut step) = (Cursor::default(), 0);
        if let Some(saved) = &saved {
            model.load(&saved.model_tensors()?)?;
            sgd.load(&saved.optim_tensors()?)?;
            (cursor, step) = (saved.state.cursor, saved.state.step);
            cut_quarantine(&folder, step)?;
        } else if let Some(init) = &config.model.init {
            model.start_from(&weights::read_backbone(init)?)?;
        }
        if config.data.decode == config::Decode::Nvjpeg {
            let (key, value) = ("data.decode", "nvjpeg".to_owned());
            let reason = "the trainer decodes on the CPU; `detco profile` can do both".to_owned();
            return Err(ConfigError::Value { key, value, reason }.into());
        }
        let feeder = Feeder::new(Form::of(&config, device), pixels_of_a_batch(&config))?;
        let loader = Loader::start(Arc::clone(&set), loader_options(&config, order, cursor))?;
        let steps = u64::from(config.train.epochs) * order.steps_per_epoch();
        let steps = match config.train.steps_max {
            0 => steps,
            most => steps.min(most),
        };
        let begin = match saved {
            None => metrics::Start::New,
            Some(_) => metrics::Start::Resume { step },
        };
        let metrics = Metrics::open(&folder, begin)?;
        let batch = config.train.batch as u64;
        let progress = Progress::new(Plan { epochs: config.train.epochs, steps, batch });
        let monitor = Monitor::open(&config)?;
        eprintln!(
            "{} {}: {} samples, {} steps an epoch, batch {}, on {}, decoding with {}",
            if saved.is_some() { "resuming" } else { "training in" },
            folder.display(),
            set.len(),
            order.steps_per_epoch(),
            config.train.batch,
            found.describe(),
            detco_shards::decode::Decoder::new().name(),
        );
        let window = Window::new(&loader);
        let collapsing = Vec::new();
        let run = Run {
            folder,
            config,
            feeder,
            set,
            order,
            loader,
            model,
            sgd,
            metrics,
            progress,
            monitor,
            cursor,
            step,
            under_way: None,
            collapsing,
            window,
            _lock: lock,
        };
        Ok(run)
    }

    fn is_finished(&self) -> bool {
        let most = self.config.train.steps_max;
        self.cursor.epoch >= self.config.train.epochs || (most > 0 && self.step >= most)
    }

    /// The next batch, and how long it was waited for.
    fn next(&mut self) -> Result<(Filled, Duration), TrainError> {
        let start = Instant::now();
        let filled = self.loader.next().unwrap_or({
            let Cursor { epoch, step } = self.cursor;
            Err(PipelineError::Ended { epoch, step })
        })?;
        Ok((filled, start.elapsed()))
    }

    fn batch(&mut self, filled: &Filled) -> Result<Batch, TrainError> {
        let views = &self.config.views;
        let patch = views.local.as_ref().filter(|_| self.config.model.local);
        let sections = Sections {
            global: [filled.global(0), filled.global(1)],
            local: patch.map(|_| [filled.local(0), filled.local(1)]),
            n: filled.len(),
            size: views.global.size as usize,
            patch: patch.map_or(0, |local| local.patch as usize),
        };
        Ok(self.feeder.batch(sections)?)
    }

    /// Gives the device the next update; meanwhile looks at the one before.
    fn update(&mut self, batch: &Batch, waited: Duration) -> Result<(), TrainError> {
        let at = At { step: self.step, learning_rate: self.learning_rate() };
        let Run { model, sgd, config, .. } = self;
        let pending = step::launch(model, sgd, &Local, config, batch, at)?;
        self.step += 1;
        self.cursor.step += 1;
        if self.order.is_empty(self.cursor.step) {
            self.cursor = Cursor { epoch: self.cursor.epoch + 1, step: 0 };
        }
        self.window.waited += waited;
        self.window.samples += self.config.train.batch as u64;
        let (step, epoch) = (self.step, self.cursor.epoch);
        let under_way = UnderWay { pending, step, epoch, learning_rate: self.learning_rate() };
        match self.under_way.replace(under_way) {
            Some(before) => self.look_at(before),
            None => Ok(()),
        }
    }

    /// Waits for the update under way, if there is one, and looks at it. What is saved or evaluated
    /// has been looked at.
    fn look(&mut self) -> Result<(), TrainError> {
        match self.under_way.take() {
            Some(last) => self.look_at(last),
            None => Ok(()),
        }
    }

    /// Ends the run if the update was refused or the embeddings collapsed; writes metrics.
    fn look_at(&mut self, done: UnderWay) -> Result<(), TrainError> {
        let UnderWay { pending, step, epoch, learning_rate } = done;
        let report = pending.wait()?;
        if !report.applied {
            return Err(TrainError::NotFinite {
                step: step - 1,
                loss: report.loss,
                gradient_norm: report.gradient_norm,
                last_good: self.last_good(step - 1),
            });
        }
        self.watch(&report, step)?;
        self.note(&report, (step, epoch), learning_rate)
    }

    /// Ends the run when a level's embeddings have stayed collapsed.
    fn watch(&mut self, report: &StepReport, step: u64) -> Result<(), TrainError> {
        let share = self.config.monitor.collapse_share;
        let threshold = share / (self.config.model.dim as f64).sqrt();
        self.collapsing.resize(report.embedding_std.len(), None);
        for (since, spread) in self.collapsing.iter_mut().zip(&report.embedding_std) {
            if spread.std >= threshold {
                *since = None;
                continue;
            }
            let since = *since.get_or_insert(step);
            if step - since + 1 >= self.config.monitor.collapse_steps {
                return Err(TrainError::Collapsed {
                    step,
                    since,
                    level: spread.level,
                    scope: spread.scope.to_string(),
                    std: spread.std,
                    share,
                    last_good: self.last_good(since),
                });
            }
        }
        Ok(())
    }

    /// The newest checkpoint from before `step`, for an error message.
    fn last_good(&self, step: u64) -> String {
        let names = checkpoint::list(&self.folder).unwrap_or_default();
        let before = |name: &&String| {
            name.trim_start_matches("step-").parse::<u64>().is_ok_and(|saved| saved <= step)
        };
        names.iter().rev().find(before).cloned().unwrap_or_else(|| "gone".into())
    }

    /// Writes metrics when they are due.
    fn note(
        &mut self,
        report: &StepReport,
        (step, epoch): (u64, u32),
        learning_rate: f64,
    ) -> Result<(), TrainError> {
        if !step.is_multiple_of(self.config.monitor.every_steps) {
            return Ok(());
        }
        let seconds = self.window.start.elapsed().as_secs_f64().max(1e-9);
        let mut record = Record::new(step, epoch);
        record.push(names::LOSS, report.loss);
        record.push(names::LR, learning_rate);
        record.push(names::IMAGES_PER_SECOND, self.window.samples as f64 / seconds);
        record.push(names::WAIT_SHARE, self.window.waited.as_secs_f64() / seconds);
        let (counted, workers) = (self.loader.stats(), self.loader.counters().workers());
        training::push(&mut record, &counted.since(&self.window.loader), workers, seconds);
        record.push(names::GRADIENT_NORM, report.gradient_norm);
        for term in &report.terms {
            let (level, pair) = (term.level, term.pair.to_string());
            record.push(names::term(level, &pair), term.loss);
            record.push(names::positive(level, &pair), term.positive_mean);
            record.push(names::negative(level, &pair), term.negative_mean);
            record.push(names::accuracy(level, &pair), term.accuracy);
        }
        for spread in &report.embedding_std {
            let name = names::embedding_std(spread.level, &spread.scope.to_string());
            record.push(name, spread.std);
        }
        self.metrics.write(&record)?;
        self.progress.update(&record);
        self.window = Window::new(&self.loader);
        Ok(())
    }

    /// Of the next update.
    fn learning_rate(&self) -> f64 {
        let Cursor { epoch, step } = self.cursor;
        learning_rate(&self.config, epoch, step, self.order.steps_per_epoch())
    }

    fn at_epoch_end(&self) -> bool {
        self.cursor.step == 0
    }

    fn is_due(&self) -> bool {
        let every = &self.config.checkpoint;
        let epochs = u64::from(every.every_epochs);
        let by_epoch = epochs > 0
            && self.at_epoch_end()
            && u64::from(self.cursor.epoch).is_multiple_of(epochs);
        let by_step = every.every_steps > 0 && self.step.is_multiple_of(every.every_steps);
        by_epoch || by_step
    }

    fn save(&mut self) -> Result<(), TrainError> {
        self.look()?;
        // Metrics first: a checkpoint promises that its steps are written down.
        self.metrics.sync()?;
        let state = State {
            config: self.config.clone(),
            cursor: self.cursor,
            step: self.step,
            fingerprint: self.set.fingerprint(),
            samples: self.set.len(),
        };
        checkpoint::save(&self.folder, &state, &self.model.tensors(), &self.sgd.tensors())?;
        Ok(())
    }

    /// Runs kNN if this epoch is due: before the first, and every `monitor.knn_every_epochs`.
    fn monitor_knn(&mut self) -> Result<(), TrainError> {
        let every = self.config.monitor.knn_every_epochs;
        let Some(monitor) = self.monitor.as_ref() else { return Ok(()) };
        let last = self.cursor.epoch >= self.config.train.epochs;
        if !self.cursor.epoch.is_multiple_of(every.max(1)) && !last {
            return Ok(());
        }
        let options = KnnOptions {
            size: self.config.views.global.size,
            samples_max: self.config.monitor.knn_samples_max,
            workers: self.config.data.workers,
            on_bad_sample: self.config.data.on_bad_sample,
            bad_share_max: self.config.data.bad_share_max,
            bad_run_max: self.config.data.bad_run_max,
            ..KnnOptions::default()
        };
        let started = Instant::now();
        let (train, test) = (&monitor.train, &monitor.test);
        let report = knn::evaluate(&self.model.query, train, test, &options)?;
        let mut record = Record::new(self.step, self.cursor.epoch);
        record.push(names::KNN_TOP1, report.top1);
        self.metrics.write(&record)?;
        let seconds = started.elapsed().as_secs_f64();
        let (epoch, top1) = (self.cursor.epoch, report.top1);
        self.progress.note(&format!("epoch {epoch}: kNN top-1 {top1:.2} % ({seconds:.1} s)"));
        self.window = Window::new(&self.loader);
        Ok(())
    }

    /// Appends the batch's bad samples to `quarantine.jsonl`.
    fn quarantine(&self, filled: &Filled) -> Result<(), TrainError> {
        if filled.bad.is_empty() {
            return Ok(());
        }
        let path = self.folder.join(QUARANTINE);
        let mut lines = String::new();
        for bad in &filled.bad {
            let line = serde_json::json!({
                "step": self.step,
                "sample": bad.sample,
                "shard": bad.shard.display().to_string(),
                "key": bad.key,
                "offset": bad.offset,
                "reason": bad.error.to_string(),
                "substitute": bad.substitute,
            });
            lines.push_str(&line.to_string());
            lines.push('\n');
        }
        let file = OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| file.write_all(lines.as_bytes()))
            .map_err(io_error("append to", &path))
    }
}

/// Bad samples of a run, one JSON object a line.
const QUARANTINE: &str = "quarantine.jsonl";

/// Drops the lines of steps that are about to be made again.
fn cut_quarantine(folder: &Path, step: u64) -> Result<(), TrainError> {
    let path = folder.join(QUARANTINE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("read", &path)(error)),
    };
    let before = |line: &&str| {
        let value = serde_json::from_str::<serde_json::Value>(line).ok();
        value.and_then(|value| value["step"].as_u64()).is_some_and(|at| at < step)
    };
    let kept: String = text.lines().filter(before).flat_map(|line| [line, "\n"]).collect();
    Ok(checkpoint::write_whole(&path, kept.as_bytes())?)
}

impl Monitor {
    fn open(config: &Config) -> Result<Option<Monitor>, TrainError> {
        let monitor = &config.monitor;
        if monitor.knn_every_epochs == 0 || monitor.knn_test.is_empty() {
            return Ok(None);
        }
        let train = match monitor.knn_train.as_slice() {
            [] => &config.data.shards,
            shards => shards,
        };
        let train = Arc::new(ShardSet::open(train)?);
        let test = Arc::new(ShardSet::open(&monitor.knn_test)?);
        Ok(Some(Monitor { train, test }))
    }
}

/// The saved config with overrides, if those leave the mathematics alone.
fn resumed_config(
    saved: &Config,
    overrides: &[String],
    data: Vec<String>,
) -> Result<Config, TrainError> {
    let mut config = saved.with_overrides(overrides)?;
    if !data.is_empty() {
        config.data.shards = data;
    }
    let mut allowed = saved.clone();
    allowed.data = config.data.clone();
    allowed.checkpoint = config.checkpoint.clone();
    allowed.monitor = config.monitor.clone();
    allowed.train.device = config.train.device;
    allowed.train.deterministic = config.train.deterministic;
    allowed.train.threads = config.train.threads;
    allowed.train.steps_max = config.train.steps_max;
    if allowed == config { Ok(config) } else { Err(TrainError::ResumeChanges) }
}

fn check_data(set: &ShardSet, state: &State) -> Result<(), TrainError> {
    if set.fingerprint() == state.fingerprint && set.len() == state.samples {
        return Ok(());
    }
    Err(TrainError::DataChanged {
        found: set.fingerprint(),
        found_samples: set.len(),
        expected: state.fingerprint,
        expected_samples: state.samples,
    })
}

/// Bytes of the two views of a batch.
fn pixels_of_a_batch(config: &Config) -> usize {
    let image = |edge: u32| 3 * edge as usize * edge as usize;
    let patches = config.views.local.as_ref().filter(|_| config.model.local);
    let sample = image(config.views.global.size) + patches.map_or(0, |l| 9 * image(l.patch));
    2 * config.train.batch as usize * sample
}

fn loader_options(config: &Config, order: Order, start: Cursor) -> LoaderOptions {
    let mut recipe = config.views.clone();
    if !config.model.local {
        recipe.local = None;
    }
    LoaderOptions {
        views: Views::Train(recipe),
        seed: config.seed,
        order,
        start,
        epochs: config.train.epochs,
        rank: (0, 1),
        workers: config.data.workers,
        batches_ahead: config.data.batches_ahead,
        on_bad_sample: config.data.on_bad_sample,
        bad_share_max: config.data.bad_share_max,
        bad_run_max: config.data.bad_run_max,
        trace: None,
        handicap: None,
    }
}

/// Takes the run for this process; the system gives it back however the process ends.
fn lock(folder: &Path) -> Result<File, TrainError> {
    let path = folder.join(".lock");
    let file = File::create(&path).map_err(io_error("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(TrainError::InUse { run: folder.to_path_buf() }),
        Err(fs::TryLockError::Error(error)) => Err(io_error("lock", &path)(error)),
    }
}

/// A flag that SIGINT and SIGTERM raise; a second signal ends the process at once.
fn listen() -> Result<Arc<AtomicBool>, TrainError> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // In this order: the first signal finds the flag down and raises it.
        let at_once = signal_hook::flag::register_conditional_shutdown(
            signal,
            128 + signal,
            Arc::clone(&stop),
        );
        at_once
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(TrainError::Signals)?;
    }
    Ok(stop)
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_path_buf();
    move |source| TrainError::Io { what, path, source }
}
