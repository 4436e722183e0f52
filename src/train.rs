//! The training loop, one screen; the only place that knows everything.
//!
//! A run is a folder. [`train`] opens it (new, or where its last checkpoint left off), then repeats:
//! take a batch, make an update, write down what it saw, save when due. On CPUs a run that was killed
//! or stopped and resumed on as many ranks has the same losses and weights, bit for bit, as one that was not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use detco_shards::device::Counts;
use detco_shards::format::ShardError;
use detco_shards::limits;
use detco_shards::order::{Cursor, Order};
use detco_shards::pipeline::{BadSample, LoaderOptions, PipelineError, Views, bad_budget};
use detco_shards::stats::Snapshot;
use detco_shards::stream::ShardSet;
use indicatif::HumanCount;
use rustix::io::Errno;
use tch::{Device, Tensor};
use thiserror::Error;

use crate::checkpoint::{self, CheckpointError, Saved, State};
use crate::config::{self, Config, ConfigError};
use crate::console::plural;
use crate::data::{self, DataError};
use crate::device::{self, DeviceError, Found};
use crate::disk::Disk;
use crate::dist::c10d::C10d;
use crate::dist::local::Local;
use crate::dist::meeting::{Card, Meeting, MeetingError};
use crate::dist::world::{Launcher, WorldError};
use crate::dist::{self, Collective, DistError, Move};
use crate::eval::knn::{self, KnnError, KnnOptions};
use crate::exit;
use crate::feed::{self, Fed, Feed, FeedError, Wait};
use crate::metrics::{self, Metrics, MetricsError, Progress, Record, names};
use crate::model::{Encoder, Model, ModelError};
use crate::optim::Sgd;
use crate::profile::training;
use crate::schedule::{ema, learning_rate, steps_in_all};
use crate::shim::ShimError;
use crate::shim::c10d::Member;
use crate::shim::panics::caught;
use crate::source::{Source, SourceError, Starter, Taken, who_decoded};
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
        /// Goes on if the folder does hold checkpoints, of a run with this configuration.
        or_resume: bool,
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
    #[error(transparent)]
    Data(#[from] DataError),
    #[error("{0}")]
    Pipeline(#[source] Box<PipelineError>),
    #[error(transparent)]
    Source(SourceError),
    #[error(transparent)]
    Feed(#[from] FeedError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Step(#[from] StepError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error("{file} does not start this model: {source}")]
    Init { file: PathBuf, source: ModelError },
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
        "this would change the mathematics of the run: {changes}. Only data.* (but not data.window, \
         data.reduce, and data.decode if a GPU may decode), checkpoint.*, monitor.*, dist.* (but \
         dist.compress), train.device, train.deterministic, train.threads and train.steps_max may change.\n\
         hint: to change them, start a new run with --init"
    )]
    ResumeChanges { changes: String },
    #[error(
        "{source}\nhint: the run's configuration names it, as seen from the folder where the run was \
         started; --data SHARDS says where the data is now"
    )]
    ResumedData { source: ShardError },
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
    #[error("rank 0 has found no checkpoint in {run}")]
    NothingSaved { run: PathBuf },
    #[error(transparent)]
    World(#[from] WorldError),
    #[error(transparent)]
    Meeting(#[from] MeetingError),
    #[error(transparent)]
    Dist(#[from] DistError),
    #[error("{batch} samples do not divide into {size} ranks (train.batch)")]
    RankBatch { batch: i64, size: usize },
    #[error(
        "{size} ranks cannot share {groups} BN groups: model.bn_splits must be a multiple of the \
         ranks"
    )]
    RankGroups { groups: i64, size: usize },
    #[error("rank {local_rank} of this machine has no GPU of its own: libtorch finds {gpus}")]
    RankGpu { local_rank: usize, gpus: i64 },
    #[error("no room for a checkpoint: {disk}")]
    NoRoom { disk: Disk },
    #[error("cannot start a thread: {0}{hint}", hint = limits::of_threads(.0))]
    Threads(#[source] std::io::Error),
    #[error("cannot listen for signals: {0}")]
    Signals(#[source] std::io::Error),
    #[error("cannot {what} {path}: {source}{limit}", limit = limits::of_file(what, source))]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
}

impl From<PipelineError> for TrainError {
    fn from(error: PipelineError) -> TrainError {
        TrainError::Pipeline(Box::new(error))
    }
}

impl From<SourceError> for TrainError {
    fn from(error: SourceError) -> TrainError {
        match error {
            SourceError::Pipeline(error) => TrainError::Pipeline(error),
            #[cfg(feature = "nvjpeg")]
            error => TrainError::Source(error),
        }
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
            TrainError::NotFinite { .. } | TrainError::Collapsed { .. } => Some(exit::DIVERGED),
            TrainError::Dist(error)
            | TrainError::Step(StepError::Dist(error))
            | TrainError::Meeting(MeetingError::Dist(error)) => match error {
                // This rank's own.
                DistError::Collective { source, .. } if source.is_out_of_memory() => None,
                DistError::Collective { .. } | DistError::Awaited { .. } => Some(exit::LOST),
                DistError::Diverged { .. } => Some(exit::DIVERGED),
                DistError::Backward { .. } => None,
            },
            // A port that is taken stays taken.
            TrainError::Meeting(MeetingError::Store { verb: "serve", .. }) => None,
            TrainError::Meeting(
                MeetingError::Missing { .. }
                | MeetingError::Name { .. }
                | MeetingError::Store { .. }
                | MeetingError::Silent { .. },
            ) => Some(exit::LOST),
            TrainError::Shards(error) | TrainError::ResumedData { source: error } => {
                exit::of_shards(error)
            }
            TrainError::Pipeline(error) => exit::of_pipeline(error),
            TrainError::Knn(error) => match &**error {
                KnnError::Pipeline(error) => exit::of_pipeline(error),
                KnnError::Shards(error) => exit::of_shards(error),
                _ => None,
            },
            _ => None,
        }
    }
}

/// Trains until the end, a signal, or an error; with the ranks that have come to `meeting`.
pub fn train(start: Start, meeting: Option<Meeting>) -> Result<Outcome, TrainError> {
    train_from(start, meeting, &|config, found| Ok(feed::decoding(config, found)?.into()))
}

/// Says who decodes for a run of this config on this device.
pub type Decoder<'a> = &'a dyn Fn(&Config, &Found) -> Result<Starter, ConfigError>;

/// As [`train`], with batches from whom `decoder` names. For tests: no GPU is needed to train from
/// the twin of one.
#[doc(hidden)]
pub fn train_from(
    start: Start,
    meeting: Option<Meeting>,
    decoder: Decoder<'_>,
) -> Result<Outcome, TrainError> {
    let tell = |error: &TrainError| {
        if let Some(meeting) = &meeting {
            meeting.fail(&error.to_string());
        }
    };
    let plan = Plan::make(start, meeting.as_ref()).inspect_err(tell)?;
    // Not before: a signal ends a process at once that still waits for a server or for other ranks.
    let stop = listen().inspect_err(tell)?;
    let mut entrance = Entrance { meeting, world: None };
    // What libtorch throws is an error here, so that the others are told of it like of any.
    let opened = caught(|| Run::open(plan, &mut entrance, &stop, decoder));
    let mut run = match opened.map_err(TrainError::Shim).flatten() {
        Ok(run) => run,
        Err(error) => {
            entrance.fail(&error.to_string());
            return Err(error);
        }
    };
    match caught(|| go_on(&mut run, &stop)).map_err(TrainError::Shim).flatten() {
        Ok(outcome) => {
            run.world.leave();
            Ok(outcome)
        }
        Err(error) => {
            run.world.fail(&error.to_string());
            // Threads of the process group may wait for a lost rank: they are not joined.
            std::mem::forget(run);
            Err(error)
        }
    }
}

fn go_on(run: &mut Run, stop: &AtomicBool) -> Result<Outcome, TrainError> {
    if run.at_epoch_end() {
        run.monitor_again(stop)?; // new, or stopped before the monitor was done
    }
    if run.step == 0 {
        run.save(Due::ByPlan)?; // the untrained network: what everything later is compared with
    }
    let outcome = loop {
        if run.monitor_owed {
            break Outcome::Stopped; // resumed, the run begins with it
        }
        if run.is_finished() {
            break Outcome::Finished;
        }
        if run.stop || run.world.size() == 1 && stop.load(Ordering::Relaxed) {
            break Outcome::Stopped;
        }
        let (taken, mut wait) = run.next()?; // the only place that waits for data
        run.quarantine(&taken)?;
        let fed = run.feed.take(taken, &mut wait)?; // a slab is free for the workers from here on
        run.update(fed, wait)?; // looks at what the update before has seen
        run.check()?;
        if run.at_epoch_end() {
            run.look()?;
            run.monitor_knn(stop)?;
        }
        if run.is_due() {
            run.save(Due::ByPlan)?;
        }
    };
    run.save(Due::AtTheEnd)?;
    let Some(lead) = &run.lead else { return Ok(outcome) };
    lead.progress.finish();
    if let Some(counts) = run.source.counts() {
        note!("decoded: {}", who_decoded(&counts));
        if let Some(refusal) = run.source.refusal() {
            note!("the GPU first refused an image with: {refusal}");
        }
    }
    if run.replaced > 0 {
        let (bad, path) =
            (plural(run.replaced, "bad sample"), run.folder.join(file_of(QUARANTINE, 0)));
        note!("{bad} replaced by others: see {}", path.display());
    }
    match outcome {
        Outcome::Finished => {
            note!("finished: {} in {}", plural(run.step, "update"), run.folder.display());
            if run.step == run.opened_at {
                note!("nothing was left to do; {}", run.how_to_go_on());
            }
        }
        Outcome::Stopped => note!(
            "stopped after step {}; go on with `detco train --resume {}`{}",
            run.step,
            run.folder.display(),
            if run.world.size() > 1 { ", its ranks started as these were" } else { "" }
        ),
    }
    Ok(outcome)
}

/// What all ranks agree upon before they are brought together.
struct Plan {
    folder: PathBuf,
    /// As it is saved: `train.accumulate` is the one that the run began with.
    config: Config,
    set: Arc<ShardSet>,
    /// Where the run goes on.
    state: Option<State>,
    /// Rank 0's checkpoint.
    saved: Option<Resumed>,
}

/// What a run goes on from, chosen while nobody else can change it.
struct Resumed {
    saved: Saved,
    /// Names of later checkpoints, which are damaged.
    damaged: Vec<String>,
    lock: File,
}

impl Plan {
    fn make(start: Start, meeting: Option<&Meeting>) -> Result<Plan, TrainError> {
        let is_first = meeting.is_none_or(Meeting::is_first);
        let saved = if is_first { find(&start)? } else { None };
        let state = saved.as_ref().map(|resumed| resumed.saved.state.clone());
        let state = match meeting {
            None => state,
            Some(meeting) => {
                let text = is_first.then(|| state.as_ref().map_or(String::new(), State::to_text));
                let text = meeting.first_says("state", text.as_deref())?;
                (!text.is_empty()).then(|| State::from_text(&text)).transpose()?
            }
        };
        let (folder, mut config) = match (start, &state) {
            (Start::New { run, config, .. }, None) => (run, *config),
            (Start::New { run, config, .. }, Some(state)) => {
                (run, harmless(&state.config, *config)?)
            }
            (Start::Resume { run, overrides, data }, Some(state)) => {
                let config = resumed_config(&state.config, &overrides, data)?;
                (run, config)
            }
            (Start::Resume { run, .. }, None) => return Err(TrainError::NothingSaved { run }),
        };
        config.validate()?;
        if config.data.shards.is_empty() {
            return Err(TrainError::NoData);
        }
        let set = data::open(&config.data.shards, &config.data);
        let set = Arc::new(set.map_err(|source| match &state {
            // Not a folder that this command has named.
            Some(state) if state.config.data.shards == config.data.shards => {
                TrainError::ResumedData { source }
            }
            _ => TrainError::Shards(source),
        })?);
        if let Some(state) = &state {
            check_data(&set, state)?;
        }
        config.data.window = window(&config, &set, meeting)?;
        if let Some(meeting) = meeting {
            // What `auto` comes to: GPUs and CPUs have no network in common.
            let mut common = config.clone();
            common.train.device = match device::find(config.train.device)?.device {
                Device::Cpu => config::Device::Cpu,
                _ => config::Device::Cuda,
            };
            meeting.compare(&Card::new(&common, set.len(), set.fingerprint()))?;
        }
        Ok(Plan { folder, config, set, state, saved })
    }
}

/// What the window comes to. It is written down with the run, since the order must not change when
/// the run goes on elsewhere, and it is rank 0's on every rank, however large their caches are.
fn window(
    config: &Config,
    set: &ShardSet,
    meeting: Option<&Meeting>,
) -> Result<config::Window, TrainError> {
    let Some(meeting) = meeting else { return Ok(data::window(config.data.window, set)?) };
    let mut window = config.data.window;
    if meeting.is_first() {
        window = data::window(window, set)?;
        meeting.first_says("window", Some(&window.to_string()))?;
    } else {
        let text = meeting.first_says("window", None)?;
        window = text.parse().map_err(|reason: &str| {
            let (key, value, reason) = ("data.window", text, reason.to_string());
            ConfigError::Value { key, value, reason }
        })?;
    }
    Ok(data::window(window, set)?)
}

/// The checkpoint that a run goes on from, if it is to go on.
fn find(start: &Start) -> Result<Option<Resumed>, TrainError> {
    let (Start::Resume { run, .. } | Start::New { run, .. }) = start;
    match (checkpoint::list(run)?.is_empty(), start) {
        (true, Start::New { .. }) => Ok(None),
        (false, Start::New { or_resume: false, .. }) => {
            Err(TrainError::RunExists { run: run.clone() })
        }
        (true, Start::Resume { .. }) => {
            checkpoint::open(run, None)?; // whose error says that there is none
            Ok(None)
        }
        (false, _) => newest_intact(run).map(Some),
    }
}

/// Takes the run, so that its checkpoints stay as they are, and chooses the newest that is whole; says
/// which are not.
fn newest_intact(run: &Path) -> Result<Resumed, TrainError> {
    let lock = lock(run)?;
    let (saved, faults) = checkpoint::open_intact(run)?;
    for (_, fault) in &faults {
        note!("warning: {fault}");
    }
    if !faults.is_empty() {
        note!("warning: the run goes on from {} before it", saved.folder.display());
    }
    let damaged = faults.into_iter().map(|(name, _)| name).collect();
    Ok(Resumed { saved, damaged, lock })
}

/// The world that a run is made in.
enum World {
    One(Local),
    Several(Box<C10d>),
}

impl std::ops::Deref for World {
    type Target = dyn Collective;

    fn deref(&self) -> &Self::Target {
        match self {
            World::One(world) => world,
            World::Several(world) => world.as_ref(),
        }
    }
}

impl World {
    fn fail(&self, message: &str) {
        if let World::Several(world) = self {
            world.fail(message);
        }
    }

    fn leave(self) {
        if let World::Several(world) = self {
            world.leave();
        }
    }

    /// Bad samples of an epoch over all ranks, with `more` of this one.
    fn count_bad(&self, epoch: u32, more: u64) -> Result<u64, TrainError> {
        match self {
            World::One(_) => Ok(more), // its loader counts
            World::Several(world) => Ok(world.count(&format!("bad/{epoch}"), more)?),
        }
    }
}

/// The way into a run, as far as it has come: who has to be told where it ends here.
struct Entrance {
    meeting: Option<Meeting>,
    world: Option<Box<C10d>>,
}

impl Entrance {
    fn fail(self, message: &str) {
        if let Some(meeting) = self.meeting {
            meeting.fail(message);
        }
        if let Some(world) = self.world {
            world.fail(message);
            // Its threads may wait for others: they are not joined.
            std::mem::forget(world);
        }
    }
}

/// Everything of a run that is open.
struct Run {
    folder: PathBuf,
    /// With the micro-batches that this number of ranks makes.
    config: Config,
    feed: Feed,
    /// As it is saved.
    saved_config: Config,
    /// Ranks that the run began with.
    begun_ranks: usize,
    world: World,
    found: Found,
    set: Arc<ShardSet>,
    order: Order,
    source: Source,
    model: Model,
    sgd: Sgd,
    /// What rank 0 alone does.
    lead: Option<Lead>,
    /// The next batch.
    cursor: Cursor,
    /// Updates made, the one under way among them.
    step: u64,
    /// The last update, until it has been looked at: a device works on it while the host prepares
    /// the next.
    under_way: Option<UnderWay>,
    /// Bad samples of this rank in whose place others came.
    replaced: u64,
    /// Whether some rank was asked to stop, as all have learned after the same step.
    stop: bool,
    /// Updates made before the run was opened.
    opened_at: u64,
    /// Whether the last kNN was broken off, as all ranks know.
    monitor_owed: bool,
    /// For each spread of the report: the step since which it has been below the threshold.
    collapsing: Vec<Option<u64>>,
    window: Window,
}

/// What rank 0 alone does: it writes everything that a run leaves.
struct Lead {
    metrics: Metrics,
    progress: Progress,
    monitor: Option<Monitor>,
    _lock: File,
}

impl Lead {
    fn open(
        folder: &Path,
        config: &Config,
        steps_per_epoch: u64,
        resumed: Option<(u64, File)>,
    ) -> Result<Lead, TrainError> {
        let (resumed, lock) = match resumed {
            None => {
                let lock = lock(folder)?;
                // Another process may have begun and ended here meanwhile.
                if !checkpoint::list(folder)?.is_empty() {
                    return Err(TrainError::RunExists { run: folder.to_path_buf() });
                }
                (None, lock)
            }
            Some((step, lock)) => (Some(step), lock),
        };
        let path = folder.join("config.toml");
        if let Some(edits) = resumed.and_then(|_| edits(&path, config)) {
            note!("warning: {}: {edits}", path.display());
            note!("warning: this file is a copy that no run reads; it is written anew");
        }
        checkpoint::write_whole(&path, config.to_toml().as_bytes())?;
        let steps = steps_in_all(config, steps_per_epoch);
        let begin = match resumed {
            None => metrics::Start::New,
            Some(step) => metrics::Start::Resume { step },
        };
        let metrics = Metrics::open(folder, begin)?;
        let batch = config.train.batch as u64;
        let progress = Progress::new(metrics::Plan { epochs: config.train.epochs, steps, batch });
        Ok(Lead { metrics, progress, monitor: Monitor::open(config)?, _lock: lock })
    }
}

/// What somebody has changed of the mathematics in a run's copy of its configuration.
fn edits(path: &Path, config: &Config) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    match Config::from_checkpoint(&text, "it") {
        Ok(copy) => match harmless(config, copy) {
            Err(TrainError::ResumeChanges { changes }) => Some(changes),
            _ => None,
        },
        Err(error) => Some(error.to_string()),
    }
}

/// Why a checkpoint is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    /// The first, and by `checkpoint.*`.
    ByPlan,
    /// The run ends, or stops.
    AtTheEnd,
}

/// An update that the device has been given, and where the run stood after it.
struct UnderWay {
    pending: Pending,
    /// How long its batch was waited for.
    wait: Wait,
    step: u64,
    epoch: u32,
    learning_rate: f64,
}

/// The kNN monitor's sets.
pub(crate) struct Monitor {
    train: Arc<ShardSet>,
    test: Arc<ShardSet>,
}

/// How far everything that is counted had come.
#[derive(Debug)]
struct Mark {
    at: Instant,
    /// Updates given to the device.
    step: u64,
    /// The loader's counters.
    loader: Snapshot,
    /// Who had decoded how many images.
    decoded: Option<Counts>,
    /// Bytes sent to other ranks.
    sent: u64,
}

impl Mark {
    fn now(source: &Source, sent: u64, step: u64) -> Mark {
        let (at, loader, decoded) = (Instant::now(), source.stats(), source.counts());
        Mark { at, step, loader, decoded, sent }
    }
}

/// What happened since metrics were last written.
#[derive(Debug)]
struct Window {
    start: Mark,
    /// How long its updates' batches were waited for.
    waited: Duration,
    /// Its end, taken before the next batch is waited for, which belongs to the next window.
    end: Option<Mark>,
}

impl Window {
    fn from(start: Mark) -> Window {
        Window { start, waited: Duration::ZERO, end: None }
    }
}

impl Run {
    fn open(
        plan: Plan,
        entrance: &mut Entrance,
        stop: &Arc<AtomicBool>,
        decoder: Decoder<'_>,
    ) -> Result<Run, TrainError> {
        let Plan { folder, config: saved_config, set, state, saved } = plan;
        let spec = entrance.meeting.as_ref().map(|meeting| meeting.spec().clone());
        let member = spec.as_ref().map_or(Member { rank: 0, size: 1 }, |spec| spec.member);
        let (local_rank, local_size) =
            spec.as_ref().map_or((0, 1), |spec| (spec.local_rank, spec.local_size));
        let by_slurm = spec.is_some_and(|spec| spec.launcher == Launcher::Slurm);
        let begun_ranks = state.as_ref().map_or(member.size, |state| state.ranks);
        let mut config = saved_config.clone();
        config.train.accumulate = micro_batches(&config, begun_ranks, member.size)?;
        let found = device(config.train.device, member, local_rank, by_slurm)?;
        let device = found.device;
        let decoding = decoder(&config, &found)?;
        device::set_numerics(&config.train)?;
        if config.train.threads > 0 {
            tch::set_num_threads(config.train.threads);
        }
        device::check_threads().map_err(TrainError::Threads)?;
        let order = data::order(config.data.window, &set, config.train.batch as u64, config.seed)?;
        fs::create_dir_all(&folder).map_err(io_error("create", &folder))?;
        let step = state.as_ref().map_or(0, |state| state.step);
        let cursor = state.as_ref().map_or(Cursor::default(), |state| state.cursor);
        let resumed = state.is_some();
        let collapsing = state.map_or_else(Vec::new, |state| state.collapsing);
        let (saved, damaged, lock) = match saved {
            None => (None, Vec::new(), None),
            Some(Resumed { saved, damaged, lock }) => (Some(saved), damaged, Some((step, lock))),
        };
        if member.rank == 0 {
            tell_room(&config, &folder, resumed)?;
        }
        let open_lead = || Lead::open(&folder, &saved_config, order.steps_per_epoch(), lock);
        let lead = (member.rank == 0).then(open_lead).transpose()?;
        if resumed {
            cut_lines(&folder, member, step)?;
        }

        let mut model = Model::new(&config, device)?;
        let mut sgd = Sgd::of(model.query.parameters(), &config.optim);
        if let Some(saved) = &saved {
            model.load(&saved.model_tensors()?)?;
            sgd.load(&saved.optim_tensors()?)?;
            if !damaged.is_empty() {
                checkpoint::set_aside(&folder, &damaged, saved)?;
            }
        } else if lead.is_some() {
            start_from(&mut model, &config.model)?;
        }
        if let Some(meeting) = entrance.meeting.take() {
            let world = C10d::new(meeting, device, &config.dist, Arc::clone(stop))?;
            let world = entrance.world.insert(Box::new(world));
            share_state(world.as_ref(), &mut model, &sgd)?;
        }
        let options = loader_options(&config, order.clone(), cursor, member, local_size);
        let decoded_by = decoding.to_string();
        let copied_by = match device {
            Device::Cuda(index) => Some(index as u32),
            _ => None,
        };
        let source = decoding.start(&set, options, feed::share(&config), copied_by)?;
        let feed = Feed::new(&config, device, &source, member.size)?;
        let world = entrance.world.take().map_or(World::One(Local), World::Several);
        let window = Window::from(Mark::now(&source, world.bytes_sent(), step));
        let run = Run {
            folder,
            config,
            feed,
            saved_config,
            begun_ranks,
            world,
            found,
            set,
            order,
            source,
            model,
            sgd,
            lead,
            cursor,
            step,
            under_way: None,
            replaced: 0,
            stop: false,
            opened_at: step,
            collapsing,
            monitor_owed: false,
            window,
        };
        if run.lead.is_some() {
            run.say_hello(resumed, &decoded_by);
        } else if local_rank == 0 {
            // Another machine may have what this one lacks.
            note!("rank {}: decoding with {decoded_by}", run.world.rank());
        }
        Ok(run)
    }

    fn say_hello(&self, resumed: bool, decoded_by: &str) {
        let ranks = match (self.world.size(), self.config.train.accumulate) {
            (1, 1) => String::new(),
            (1, parts) => format!(", in {parts} micro-batches"),
            (ranks, 1) => format!(", {ranks} ranks"),
            (ranks, parts) => format!(", {ranks} ranks of {parts} micro-batches"),
        };
        note!(
            "{} {}: {} samples, {} steps an epoch, batch {}{ranks}, on {}, decoding with {decoded_by}",
            if resumed { "resuming" } else { "training in" },
            self.folder.display(),
            self.set.len(),
            self.order.steps_per_epoch(),
            self.config.train.batch,
            self.found.describe(),
        );
        for warning in data::oddities(&self.config, &self.set, &self.order) {
            note!("warning: {warning}");
        }
    }

    fn is_finished(&self) -> bool {
        let most = self.config.train.steps_max;
        self.cursor.epoch >= self.config.train.epochs || (most > 0 && self.step >= most)
    }

    /// What to do with a run that has ended and is to go on.
    fn how_to_go_on(&self) -> String {
        if self.cursor.epoch < self.config.train.epochs {
            let most = self.config.train.steps_max;
            return format!("train.steps_max = {most} ended it: --set train.steps_max=N goes on");
        }
        let (epochs, run) = (self.config.train.epochs, self.folder.display());
        format!(
            "its learning rate has come to the end of {epochs} epochs. To train on from its backbone, \
             start a new run: --init {run} --out NEW --set train.epochs=N"
        )
    }

    /// The next batch, and how long it was waited for.
    fn next(&mut self) -> Result<(Taken, Wait), TrainError> {
        self.world.at(self.step + 1, Move::Data);
        if self.lead.is_some() && self.is_noted(self.step) {
            self.window.end = Some(self.mark());
        }
        let mut wait = Wait::begin(self.found.device)?;
        let Cursor { epoch, step } = self.cursor;
        let next = self.source.next();
        let taken = next.unwrap_or_else(|| Err(PipelineError::Ended { epoch, step }.into()));
        let taken = match taken {
            Ok(taken) => taken,
            Err(error) => {
                // Nobody has seen those that end the run.
                if let SourceError::Pipeline(ended) = &error {
                    self.list_bad(ended.bad())?;
                }
                return Err(error.into());
            }
        };
        wait.handed_out();
        Ok((taken, wait))
    }

    /// Gives the device the next update; meanwhile looks at the one before.
    fn update(&mut self, fed: Fed, wait: Wait) -> Result<(), TrainError> {
        let (learning_rate, epoch) = (self.learning_rate(), self.cursor.epoch);
        let at = At { step: self.step, learning_rate };
        if let Some(teacher) = self.config.design().teacher {
            // Of all epochs, wherever train.steps_max ends them.
            let each = self.order.steps_per_epoch();
            let steps = u64::from(self.config.train.epochs).saturating_mul(each);
            self.model.set_ema(ema(teacher, self.step, steps));
        }
        let Run { model, sgd, config, world, feed, .. } = self;
        let pending = step::launch(model, sgd, &**world, config, &fed.batch, at)?;
        feed.give_back(fed)?;
        self.step += 1;
        self.cursor.step += 1;
        if self.order.is_empty(self.cursor.step) {
            self.cursor = Cursor { epoch: self.cursor.epoch + 1, step: 0 };
        }
        let under_way = UnderWay { pending, wait, step: self.step, epoch, learning_rate };
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
        let UnderWay { pending, wait, step, epoch, learning_rate } = done;
        let report = pending.wait()?;
        self.window.waited += wait.read()?;
        if !report.applied {
            return Err(TrainError::NotFinite {
                step,
                loss: report.loss,
                gradient_norm: report.gradient_norm,
                last_good: self.last_good(step - 1),
            });
        }
        self.stop |= report.stop;
        self.watch(&report, step)?;
        self.note(&report, (step, epoch), learning_rate)
    }

    /// Ends the run when a level's embeddings have stayed collapsed.
    fn watch(&mut self, report: &StepReport, step: u64) -> Result<(), TrainError> {
        let share = self.config.monitor.collapse_share;
        self.collapsing.resize(report.embedding_std.len(), None);
        for (since, spread) in self.collapsing.iter_mut().zip(&report.embedding_std) {
            if spread.std >= share / (spread.width as f64).sqrt() {
                *since = None;
                continue;
            }
            let since = *since.get_or_insert(step);
            if step - since + 1 >= self.config.monitor.collapse_steps {
                return Err(TrainError::Collapsed {
                    step,
                    since,
                    level: spread.level,
                    scope: spread.scope.clone(),
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
        if !self.is_noted(step) || self.lead.is_none() {
            return Ok(());
        }
        let mut record = Record::new(step, epoch);
        record.push(names::LOSS, report.loss);
        record.push(names::LR, learning_rate);
        let end = self.window.end.take().unwrap_or_else(|| self.mark());
        self.push_rates(&mut record, &end);
        self.window = Window::from(end);
        record.push(names::GRADIENT_NORM, report.gradient_norm);
        for term in &report.terms {
            for (reading, value) in &term.readings {
                record.push(names::reading(reading, &term.name), *value);
            }
        }
        for spread in &report.embedding_std {
            let name = names::embedding_std(spread.level, &spread.scope);
            record.push(name, spread.std);
        }
        if let Some(lead) = &mut self.lead {
            lead.metrics.write(&record)?;
            lead.progress.update(&record);
        }
        Ok(())
    }

    /// Whether metrics are written of the update with this number.
    fn is_noted(&self, step: u64) -> bool {
        step.is_multiple_of(self.config.monitor.every_steps)
    }

    fn mark(&self) -> Mark {
        Mark::now(&self.source, self.world.bytes_sent(), self.step)
    }

    /// What the updates of the window took.
    fn push_rates(&self, record: &mut Record, end: &Mark) {
        let Window { start, waited, .. } = &self.window;
        let steps = end.step.saturating_sub(start.step);
        if steps == 0 {
            return;
        }
        let seconds = (end.at - start.at).as_secs_f64().max(1e-9);
        let images = steps as f64 * self.config.train.batch as f64;
        record.push(names::IMAGES_PER_SECOND, images / seconds);
        // A GPU's clock and the host's differ by the work that is queued.
        record.push(names::WAIT_SHARE, (waited.as_secs_f64() / seconds).min(1.0));
        let workers = self.source.counters().workers();
        training::push(record, &end.loader.since(&start.loader), workers, seconds);
        if let (Some(now), Some(before)) = (&end.decoded, start.decoded) {
            training::push_decoded(record, &now.since(before));
        }
        if self.world.size() > 1 {
            let bytes = end.sent.saturating_sub(start.sent) as f64;
            record.push(names::MEGABYTES_SENT, bytes / 1e6 / steps as f64);
        }
    }

    /// Compares queues and weights of all ranks when that is due.
    fn check(&self) -> Result<(), TrainError> {
        let every = self.config.dist.check_steps;
        if self.world.size() == 1 || every == 0 || !self.step.is_multiple_of(every) {
            return Ok(());
        }
        self.world.at(self.step, Move::Check);
        let queues: Vec<Tensor> =
            self.model.queues.all().iter().map(Tensor::shallow_clone).collect();
        let weights = self.model.encoders().flat_map(Encoder::parameters);
        let weights: Vec<Tensor> = weights.map(|(_, tensor)| tensor).collect();
        let mut groups = vec![("queues", queues), ("weights", weights)];
        groups.retain(|(_, tensors)| !tensors.is_empty());
        Ok(dist::check::compare(&*self.world, self.step, &groups)?)
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

    /// Rank 0 saves, the others wait for it. Where there is no room, training goes on as long as an older
    /// checkpoint is whole and another save will come.
    fn save(&mut self, due: Due) -> Result<(), TrainError> {
        self.look()?;
        self.world.at(self.step, Move::Save);
        if let Some(lead) = &mut self.lead {
            // Metrics first: a checkpoint promises that its steps are written down.
            lead.metrics.sync()?;
            match (self.write(), due) {
                (Err(TrainError::Checkpoint(error)), Due::ByPlan) if error.is_no_room() => {
                    self.go_on_unsaved(error)?;
                }
                (written, _) => written?,
            }
        }
        Ok(self.world.after_first()?)
    }

    /// Warns that a checkpoint was not written, unless there is none to go back to.
    fn go_on_unsaved(&self, error: CheckpointError) -> Result<(), TrainError> {
        let names = checkpoint::list(&self.folder)?;
        let Some(newest) = names.last() else { return Err(error.into()) };
        note!("warning: {error}");
        note!(
            "warning: no checkpoint of step {} was written; training goes on, and a kill now goes back to \
             {newest}. Make room, or lower checkpoint.keep",
            self.step
        );
        Ok(())
    }

    fn write(&self) -> Result<(), TrainError> {
        let state = State {
            config: self.saved_config.clone(),
            ranks: self.begun_ranks,
            cursor: self.cursor,
            step: self.step,
            fingerprint: self.set.fingerprint(),
            samples: self.set.len(),
            collapsing: self.collapsing.clone(),
        };
        checkpoint::save(&self.folder, &state, &self.model.tensors(), &self.sgd.tensors())?;
        Ok(())
    }

    /// Whether the kNN monitor is to be run after this epoch: before the first, and every
    /// `monitor.knn_every_epochs`.
    fn is_monitored(&self) -> bool {
        let every = self.config.monitor.knn_every_epochs;
        let last = self.cursor.epoch >= self.config.train.epochs;
        let wanted = every > 0 && !self.config.monitor.knn_test.is_empty();
        wanted && (self.cursor.epoch.is_multiple_of(every) || last)
    }

    /// Runs kNN if this epoch is due.
    fn monitor_knn(&mut self, stop: &AtomicBool) -> Result<(), TrainError> {
        if !self.is_monitored() {
            return Ok(());
        }
        self.world.at(self.step, Move::Monitor);
        self.run_knn(stop)?;
        self.end_knn()
    }

    /// Waits until rank 0 has run kNN, or a signal has broken it off there; then all ranks know.
    fn end_knn(&mut self) -> Result<(), TrainError> {
        self.world.after_first()?;
        let owed = Tensor::from(i64::from(self.monitor_owed)).to_device(self.found.device);
        self.world.broadcast(&mut [owed.shallow_clone()])?;
        self.monitor_owed = owed.int64_value(&[]) != 0;
        Ok(())
    }

    /// Where a run begins or goes on between two epochs: runs kNN unless its result is written down already.
    /// The checkpoint's statistics are averages.
    fn monitor_again(&mut self, stop: &AtomicBool) -> Result<(), TrainError> {
        if !self.is_monitored() {
            return Ok(());
        }
        self.world.at(self.step, Move::Monitor);
        if self.lead.as_ref().is_some_and(|lead| !lead.metrics.had(names::KNN_TOP1)) {
            self.run_knn(stop)?;
        }
        self.end_knn()
    }

    /// On rank 0; the others have nothing to do. A signal breaks it off; then the run owes it.
    fn run_knn(&mut self, stop: &AtomicBool) -> Result<(), TrainError> {
        let Some(lead) = &mut self.lead else { return Ok(()) };
        let Some(monitor) = &lead.monitor else { return Ok(()) };
        let options = KnnOptions {
            size: self.config.crop_size(),
            samples_max: self.config.monitor.knn_samples_max,
            workers: self.config.data.workers,
            on_bad_sample: self.config.data.on_bad_sample,
            bad_share_max: self.config.data.bad_share_max,
            bad_run_max: self.config.data.bad_run_max,
            ..KnnOptions::default()
        };
        let started = Instant::now();
        let (train, test) = (&monitor.train, &monitor.test);
        let mut go_on = |_, _| match stop.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        let report = knn::evaluate_watched(&self.model.query, train, test, &options, &mut go_on);
        self.monitor_owed = matches!(report, Err(KnnError::Stopped { .. }));
        if self.monitor_owed {
            return Ok(());
        }
        let report = report?;
        let mut record = Record::new(self.step, self.cursor.epoch);
        record.push(names::KNN_TOP1, report.top1);
        if let Some(top5) = report.top5 {
            record.push(names::KNN_TOP5, top5);
        }
        lead.metrics.write(&record)?;
        let seconds = started.elapsed().as_secs_f64();
        let (epoch, top1) = (self.cursor.epoch, report.top1);
        lead.progress.note(&format!("epoch {epoch}: kNN top-1 {top1:.2} % ({seconds:.1} s)"));
        self.window = Window::from(self.mark());
        Ok(())
    }

    /// Appends what the batch was made of to `samples.jsonl`, if asked to, and its bad samples to
    /// `quarantine.jsonl`.
    fn quarantine(&mut self, taken: &Taken) -> Result<(), TrainError> {
        if self.config.monitor.samples {
            let Cursor { epoch, step } = taken.cursor();
            let (rank, size) = (self.world.rank() as u32, self.world.size() as u32);
            let slot = self.order.slots(step, rank, size).start;
            let (at, samples) = (self.step + 1, taken.samples());
            let line = serde_json::json!({
                "step": at, "rank": rank, "epoch": epoch, "batch": step, "slot": slot, "samples": samples,
            });
            self.append(SAMPLES, &format!("{line}\n"))?;
        }
        let Some(last) = taken.bad().last() else { return Ok(()) };
        self.replaced += taken.bad().len() as u64;
        self.list_bad(taken.bad())?;
        let (epoch, samples) = (taken.cursor().epoch, self.set.len());
        let bad = self.world.count_bad(epoch, taken.bad().len() as u64)?;
        let budget = bad_budget(samples, self.config.data.bad_share_max);
        if self.world.size() > 1 && bad > budget {
            // Those of this batch are in the list already.
            let (last, list) = (last.error.to_string(), Vec::new());
            return Err(
                PipelineError::TooManyBad { bad, samples, epoch, budget, last, list }.into()
            );
        }
        Ok(())
    }

    /// Adds to `quarantine.jsonl` what the next update was to be made of.
    fn list_bad(&self, samples: &[BadSample]) -> Result<(), TrainError> {
        let mut lines = String::new();
        for bad in samples {
            let line = serde_json::json!({
                "step": self.step + 1,
                "rank": self.world.rank(),
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
        self.append(QUARANTINE, &lines)
    }

    /// Adds to this rank's file of that name.
    fn append(&self, name: &str, lines: &str) -> Result<(), TrainError> {
        if lines.is_empty() {
            return Ok(());
        }
        let path = self.folder.join(file_of(name, self.world.rank()));
        let file = OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| file.write_all(lines.as_bytes()))
            .map_err(io_error("append to", &path))
    }
}

/// Bad samples of a run, one JSON object a line.
const QUARANTINE: &str = "quarantine";
/// Which samples each step was made of, one JSON object a line.
const SAMPLES: &str = "samples";

/// Ranks do not write into each other's files: `samples.jsonl`, `samples.1.jsonl`.
fn file_of(name: &str, rank: usize) -> String {
    if rank == 0 { format!("{name}.jsonl") } else { format!("{name}.{rank}.jsonl") }
}

/// Drops the lines of steps after `step`, which are about to be made again: those of this rank, and on the
/// last rank those of ranks that there were before as well.
fn cut_lines(folder: &Path, member: Member, step: u64) -> Result<(), TrainError> {
    for name in [QUARANTINE, SAMPLES] {
        cut(&folder.join(file_of(name, member.rank)), member.rank, step)?;
        let gone = (member.size..).map(|rank| (rank, folder.join(file_of(name, rank))));
        let last = member.rank + 1 == member.size;
        // Ranks leave no gaps, but for those that had nothing to write: look a few further.
        for (rank, path) in gone.take(RANKS_BEFORE).filter(|(_, path)| last && path.exists()) {
            cut(&path, rank, step)?;
        }
    }
    Ok(())
}

/// Ranks beyond this world's whose files are looked for.
const RANKS_BEFORE: usize = 4096;

/// Keeps the lines of steps up to `step`. Lines from before steps were counted from 1 here, as everywhere, name
/// no rank: they are counted on.
fn cut(path: &Path, rank: usize, step: u64) -> Result<(), TrainError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("read", path)(error)),
    };
    let before = |line: &str| {
        let mut value = serde_json::from_str::<serde_json::Value>(line).ok()?;
        let from_0 = value.get("rank").is_none();
        let at = value.get("step")?.as_u64()?.checked_add(u64::from(from_0))?;
        if from_0 {
            (value["step"], value["rank"]) = (at.into(), rank.into());
        }
        (at <= step).then(|| format!("{value}\n"))
    };
    let kept: String = text.lines().filter_map(before).collect();
    Ok(checkpoint::write_whole(path, kept.as_bytes())?)
}

/// Rank 0's weights, statistics, queues and momentum on all ranks.
fn share_state(world: &dyn Collective, model: &mut Model, sgd: &Sgd) -> Result<(), TrainError> {
    let mut tensors = model.tensors();
    for (_, tensor) in tensors.iter_mut().chain(&mut sgd.tensors()) {
        world.broadcast(std::slice::from_mut(tensor))?;
    }
    Ok(model.load(&tensors)?) // for the queues' pointer, which is no tensor of the model
}

/// Whether a new run can write its first checkpoint.
pub(crate) fn check_room(disk: &Disk) -> Result<(), TrainError> {
    match disk.free < disk.each {
        true => Err(TrainError::NoRoom { disk: disk.clone() }),
        false => Ok(()),
    }
}

/// Says at the start where the disk has no room for all checkpoints. A run that goes on has some already.
fn tell_room(config: &Config, folder: &Path, resumed: bool) -> Result<(), TrainError> {
    let Some(disk) = Disk::of(config, folder) else { return Ok(()) };
    if !resumed {
        check_room(&disk)?;
    }
    let needed = if resumed { disk.each } else { disk.most() };
    if disk.free < needed {
        note!("warning: {disk}: lower checkpoint.keep, or make room");
    }
    Ok(())
}

/// Starts both encoders' backbones from the file that the configuration names, if it names one.
pub(crate) fn start_from(model: &mut Model, config: &config::Model) -> Result<(), TrainError> {
    let Some(file) = &config.init else { return Ok(()) };
    let backbone = weights::read_backbone(file, config.init_prefix.as_deref())?;
    let refused = |source| TrainError::Init { file: file.clone(), source };
    model.start_from(&backbone.tensors).map_err(refused)?;
    note!("the backbone starts from {}: {}", file.display(), backbone.describe());
    Ok(())
}

/// What a config comes to on each of so many ranks that begin a run.
pub(crate) fn config_of_rank(config: &Config, ranks: usize) -> Result<Config, TrainError> {
    let mut config = config.clone();
    config.train.accumulate = micro_batches(&config, ranks, ranks)?;
    Ok(config)
}

/// Micro-batches of an update on each of `ranks` ranks: as few as keep a micro-batch no larger than
/// it was on the ranks that the run began with.
fn micro_batches(config: &Config, begun_ranks: usize, ranks: usize) -> Result<i64, TrainError> {
    let (batch, groups) = (config.train.batch, config.model.bn_splits);
    let (size, ranks) = (ranks, ranks as i64);
    if batch % ranks != 0 {
        return Err(TrainError::RankBatch { batch, size });
    }
    let least = begun_ranks as i64 * config.train.accumulate;
    let mut parts = (1..=groups / ranks).filter(|parts| groups % (ranks * parts) == 0);
    // Where that would be smaller than a BN group, a group it is.
    let fits = parts.clone().find(|parts| ranks * parts >= least);
    fits.or_else(|| parts.next_back()).ok_or(TrainError::RankGroups { groups, size })
}

impl fmt::Display for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [train, test] = [&self.train, &self.test].map(|set| HumanCount(set.len()));
        write!(f, "{test} samples against {train}")
    }
}

impl Monitor {
    /// Opens the sets that the config names; none where it asks for no monitor.
    pub(crate) fn open(config: &Config) -> Result<Option<Monitor>, TrainError> {
        let monitor = &config.monitor;
        if monitor.knn_every_epochs > 0 && monitor.knn_test.is_empty() {
            note!("warning: monitor.knn_test names no labelled shards: no kNN is measured");
        }
        if monitor.knn_every_epochs == 0 || monitor.knn_test.is_empty() {
            return Ok(None);
        }
        let train = match monitor.knn_train.as_slice() {
            [] => &config.data.shards,
            shards => shards,
        };
        let train = Arc::new(data::open(train, &config.data)?);
        let test = Arc::new(data::open(&monitor.knn_test, &config.data)?);
        train.one_numbering()?;
        test.one_numbering()?;
        for note in knn::compare(&train, &test)?.notes() {
            note!("kNN monitor: {note}");
        }
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
    harmless(saved, config)
}

/// The wanted config, if it leaves the saved one's mathematics alone.
fn harmless(saved: &Config, mut config: Config) -> Result<Config, TrainError> {
    if config.data.window == config::Window::Auto {
        config.data.window = saved.data.window; // what it came to when the run began
    }
    let mut allowed = saved.clone();
    allowed.data = config.data.clone();
    allowed.data.window = saved.data.window; // the order is mathematics, and so are pixels
    allowed.data.reduce = saved.data.reduce;
    if decoded_by(&config) != decoded_by(saved) {
        allowed.data.decode = saved.data.decode;
    }
    allowed.checkpoint = config.checkpoint.clone();
    allowed.monitor = config.monitor.clone();
    allowed.dist = config.dist.clone();
    allowed.dist.compress = saved.dist.compress;
    allowed.train.device = config.train.device;
    allowed.train.deterministic = config.train.deterministic;
    allowed.train.threads = config.train.threads;
    allowed.train.steps_max = config.train.steps_max;
    match allowed == config {
        true => Ok(config),
        false => Err(TrainError::ResumeChanges { changes: changes(&allowed, &config) }),
    }
}

/// Who decodes: a GPU's pixels differ from a CPU's by a level here and there.
fn decoded_by(config: &Config) -> config::Decode {
    match (config.data.decode, config.train.device) {
        (config::Decode::Auto, config::Device::Cpu) => config::Decode::Cpu,
        (decode, _) => decode,
    }
}

/// `train.epochs: the run has 1, now 20`, for each key whose value differs.
fn changes(saved: &Config, now: &Config) -> String {
    let (saved, now) = (saved.flat(), now.flat());
    let keys: BTreeSet<&String> = saved.keys().chain(now.keys()).collect();
    let changed = keys.into_iter().filter_map(|key| {
        let value = |of: &BTreeMap<String, String>| of.get(key).cloned().unwrap_or("none".into());
        let (had, has) = (value(&saved), value(&now));
        (had != has).then(|| format!("{key}: the run has {had}, now {has}"))
    });
    changed.collect::<Vec<_>>().join("; ")
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

fn loader_options(
    config: &Config,
    order: Order,
    start: Cursor,
    member: Member,
    local_size: usize,
) -> LoaderOptions {
    // The ranks of a machine share its cores.
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let workers = match config.data.workers {
        0 if local_size > 1 => (cores() / local_size).max(1),
        workers => workers,
    };
    LoaderOptions {
        views: Views::Recipe(config.training_views()),
        labels: false,
        seed: config.seed,
        order,
        start,
        epochs: config.train.epochs,
        rank: (member.rank as u32, member.size as u32),
        workers,
        batches_ahead: config.data.batches_ahead,
        reduce: config.data.reduce,
        on_bad_sample: config.data.on_bad_sample,
        bad_share_max: config.data.bad_share_max,
        bad_run_max: config.data.bad_run_max,
        trace: None,
        handicap: None,
    }
}

/// Each rank of a machine takes a GPU of its own.
pub(crate) fn device(
    wanted: config::Device,
    member: Member,
    local_rank: usize,
    by_slurm: bool,
) -> Result<Found, TrainError> {
    let found = device::find(wanted)?;
    if member.size == 1 || !found.device.is_cuda() {
        return Ok(found);
    }
    let gpus = tch::Cuda::device_count();
    let index = match gpus {
        // Slurm with `--gpus-per-task` shows each rank its own and no other.
        1 if by_slurm => 0,
        _ if (local_rank as i64) < gpus => local_rank,
        _ => return Err(TrainError::RankGpu { local_rank, gpus }),
    };
    Ok(Found { device: Device::Cuda(index), missing: None })
}

/// Takes the run for this process; the system gives it back however the process ends.
fn lock(folder: &Path) -> Result<File, TrainError> {
    let path = folder.join(".lock");
    let file = File::create(&path).map_err(io_error("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(TrainError::InUse { run: folder.to_path_buf() }),
        // As on some network shares: a run that is started twice there is not noticed.
        Err(fs::TryLockError::Error(error)) if has_no_locks(&error) => {
            note!("warning: {} cannot be locked, its file system has no locks", folder.display());
            Ok(file)
        }
        Err(fs::TryLockError::Error(error)) => Err(io_error("lock", &path)(error)),
    }
}

fn has_no_locks(error: &std::io::Error) -> bool {
    let none = [Errno::NOLCK, Errno::OPNOTSUPP, Errno::NOSYS];
    Errno::from_io_error(error).is_some_and(|errno| none.contains(&errno))
}

/// A flag that SIGINT, SIGTERM, SIGHUP and SIGUSR1 raise; a second one of the first two ends the process. A
/// SIGHUP that `nohup` has the process ignore stays ignored.
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
    let once = [signal_hook::consts::SIGUSR1, signal_hook::consts::SIGHUP];
    for signal in once.into_iter().filter(|signal| !dist::launch::is_ignored(*signal)) {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(TrainError::Signals)?;
    }
    Ok(stop)
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_path_buf();
    move |source| TrainError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Micro-batches on each number of ranks, of a run that began on `begun`.
    fn parts(sets: &[&str], begun: usize, ranks: &[usize]) -> Vec<Option<i64>> {
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let config = Config::load("detco-r50", &sets).unwrap();
        ranks.iter().map(|ranks| micro_batches(&config, begun, *ranks).ok()).collect()
    }

    #[test]
    fn fewer_ranks_make_more_micro_batches_of_the_same_size() {
        // Eight BN groups: three ranks cannot share them, nor can sixteen.
        let found = parts(&[], 8, &[8, 4, 2, 1, 3, 16]);
        assert_eq!(found, [Some(1), Some(2), Some(4), Some(8), None, None]);
        // Begun alone, a micro-batch may be the whole batch; asked for, it is a quarter.
        assert_eq!(parts(&[], 1, &[1, 2, 8]), [Some(1), Some(1), Some(1)]);
        assert_eq!(parts(&["train.accumulate=4"], 1, &[1, 2, 8]), [Some(4), Some(2), Some(1)]);
        // Three ranks of twelve groups: at least the four parts it began with, six in all.
        let twelve = ["model.bn_splits=12", "train.batch=48", "method.queue=4800"];
        assert_eq!(parts(&twelve, 4, &[1, 2, 3, 4, 5]), [Some(4), Some(2), Some(2), Some(1), None]);
    }
}
