//! The loader: connects order, stream, decoder, views and slabs by threads and channels.
//!
//! ```text
//!               tasks (bounded)                 filled (bounded by the slabs)
//! dispatcher ────────────────────▶ workers ────────────────────────────────▶ Loader::next
//!     ▲  order, read-ahead            draw, decode, render into the slot          │ in step order
//!     └──────────────────────────────── free slabs ◀──────────────────────────────┘
//! ```
//!
//! One worker or sixteen give the same bytes: a view is drawn from the sample's identity, a slot
//! belongs to one sample, and batches leave in the order of their steps. Dropping the [`Loader`]
//! closes its channels, and the threads end.
//!
//! A batch holds its slab until it is dropped. A consumer that holds all of them and asks for another gets
//! [`PipelineError::AllHeld`].
//!
//! Host memory is `slabs × Layout::bytes()` + `workers × scratch` (a decoded frame and the
//! renderer's buffers) + [`TASKS_MAX`] tasks; the shards are page cache.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded, select};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::decode::{DecodeError, Decoder, Frame, Image, Part, probe};
use crate::format::ShardError;
use crate::limits;
use crate::order::{Cursor, Epoch, Order};
use crate::pipe::Pool;
use crate::slab::{Layout, NoMemory, Slab, Slot};
use crate::stats::{Mark, Snapshot, Stage, Stats, WorkerStats};
use crate::stream::remote::PinnedShard;
use crate::stream::{Sample, ShardSet};
use crate::trace::{Recorder, Trace};
use crate::views::{Note, Recipe, Renderer, SamplePlan};

mod views;

pub use views::Views;
pub(crate) use views::touch;

/// Samples handed out ahead of the workers, which is also the read-ahead: some 25 MB of ImageNet, so the disk
/// works while the workers do, and a slow sample never empties the channel.
pub const TASKS_MAX: usize = 256;

/// Tries at a substitute before a slot fails: with half of the data bad, one slot in 65,536 does.
const SUBSTITUTES_MAX: u32 = 16;

/// What happens when a sample cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadSample {
    /// The run ends and names the sample.
    Fail,
    /// The sample is counted, logged and replaced by another, within a budget.
    Skip,
}

/// Options of a loader.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// What is rendered of each sample.
    pub views: Views,
    /// Whether each sample's class is read with it, for [`Filled::labels`].
    pub labels: bool,
    /// Seed of the views.
    pub seed: u64,
    /// The order of the samples, and their batches.
    pub order: Order,
    /// The position to start from.
    pub start: Cursor,
    /// The epoch to end before.
    pub epochs: u32,
    /// This rank and the number of ranks; it reads its slice of each global batch.
    pub rank: (u32, u32),
    /// Worker threads; 0 means one per core.
    pub workers: usize,
    /// Batches that may be finished or in work ahead of the consumer, at least 1.
    pub batches_ahead: usize,
    /// Whether pictures far larger than all of their views are decoded at 1/2 or 1/4 of their size
    /// ([`crate::views::needed`] says when), for a mean error below a level. The plan decides, so that every worker makes the same pixels.
    pub reduce: bool,
    /// What happens when a sample cannot be decoded.
    pub on_bad_sample: OnBadSample,
    /// `Skip` ends the run when an epoch has more bad samples than this share of the data set; see
    /// [`bad_budget`].
    pub bad_share_max: f64,
    /// `Skip` ends the run after this many bad samples in a row, in the order of the run.
    pub bad_run_max: u32,
    /// The recording of the threads' spans, for a timeline.
    pub trace: Option<Arc<Trace>>,
    /// An injected delay, for tests of what reads the counters: each sample takes this much longer in a stage.
    /// Reading, getting (the dispatcher's work) and putting sleep; decoding and views compute.
    pub handicap: Option<(Stage, Duration)>,
}

impl LoaderOptions {
    /// Training: shuffled order, from the start, one rank, bad samples end the run.
    pub fn train(recipe: Recipe, order: Order, seed: u64, epochs: u32) -> LoaderOptions {
        LoaderOptions {
            views: Views::Recipe(recipe),
            labels: false,
            seed,
            order,
            start: Cursor::default(),
            epochs,
            rank: (0, 1),
            workers: 0,
            batches_ahead: 3,
            reduce: true,
            on_bad_sample: OnBadSample::Fail,
            bad_share_max: 0.001,
            bad_run_max: 100,
            trace: None,
            handicap: None,
        }
    }

    /// Evaluation: every sample once with its class, in the order of the shards, none decoded at less
    /// than its size, so that figures do not depend on the decoder. [`Recipe::center`] and
    /// [`Recipe::squash`] are usual views.
    pub fn evaluate(recipe: Recipe, order: Order) -> LoaderOptions {
        let train = LoaderOptions::train(recipe, order, 0, 1);
        LoaderOptions { labels: true, reduce: false, ..train }
    }
}

/// Bad samples that an epoch may have: this share of the data set's samples, rounded down, but at least one
/// if any are allowed, since skipping would otherwise mean nothing in a small set.
pub fn bad_budget(samples: u64, share: f64) -> u64 {
    let least = u64::from(share > 0.0);
    ((samples as f64 * share) as u64).max(least)
}

/// Why a sample could not be used.
#[derive(Debug, Error)]
pub enum SampleError {
    /// Its bytes could not be found.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// Its bytes cannot be decoded.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A panic: these bytes trigger a bug of this program or of the decoder.
    #[error("the decoder panicked: {message}")]
    Panicked {
        /// The panic's message.
        message: String,
    },
}

impl SampleError {
    /// Whether the sample's shard cannot be fetched. A substitute would make batches depend on the network, so
    /// this ends a run under either policy.
    fn is_lost(&self) -> bool {
        matches!(self, SampleError::Shard(error) if error.is_lost())
    }

    /// The error for a caught panic.
    pub(crate) fn panicked(panic: &(dyn Any + Send)) -> SampleError {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        SampleError::Panicked { message: text.unwrap_or("no message").to_string() }
    }
}

/// A bad sample and its substitute.
#[derive(Debug)]
pub struct BadSample {
    /// The sample.
    pub sample: u64,
    /// Its shard.
    pub shard: PathBuf,
    /// Its key (webdataset's `__key__`), empty if unknown.
    pub key: String,
    /// Byte offset of its image in the shard.
    pub offset: u64,
    /// What is wrong.
    pub error: SampleError,
    /// The sample that was read instead; none under [`OnBadSample::Fail`].
    pub substitute: Option<u64>,
    pub(crate) slot: usize,
}

impl BadSample {
    /// A hint on what to do, unless the shard could not be fetched.
    fn hint(&self) -> String {
        match &self.error {
            SampleError::Shard(ShardError::Remote { .. }) => String::new(),
            SampleError::Shard(_) => {
                "\nhint: data.on_bad_sample = \"skip\" goes on without it".to_owned()
            }
            _ => format!(
                "\nhint: data.on_bad_sample = \"skip\" goes on without it; {}",
                self.finders()
            ),
        }
    }

    /// The commands that find all images like this one.
    fn finders(&self) -> String {
        let folder = self.shard.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).display();
        format!(
            "`detco verify --decode {folder}` names all images that cannot be decoded, and \
             `detco pack --check` refuses them while packing"
        )
    }
}

/// Why a loader ended early.
#[derive(Debug, Error)]
pub enum PipelineError {
    /// A sample cannot be used and the policy is to fail.
    #[error("{shard}: sample {key:?} at byte {offset}: {error}{hint}", shard = .0.shard.display(), key = .0.key, offset = .0.offset, error = .0.error, hint = .0.hint())]
    Bad(Box<BadSample>),
    /// More samples are bad than the budget allows.
    #[error(
        "{bad} of {samples} samples are bad in epoch {epoch}: more than the budget of {budget} \
         (data.bad_share_max); the last one: {last}"
    )]
    TooManyBad {
        /// Bad samples of the epoch so far.
        bad: u64,
        /// Samples of the data set.
        samples: u64,
        /// The epoch.
        epoch: u32,
        /// The budget.
        budget: u64,
        /// The newest of them.
        last: String,
        /// Those of the batch that ended the run, the newest last.
        list: Vec<BadSample>,
    },
    /// A run of bad samples: a broken shard rather than a broken image.
    #[error("{run} bad samples in a row (data.bad_run_max): the last one: {last}")]
    BadRun {
        /// Length of the run.
        run: u32,
        /// The newest of them.
        last: String,
        /// Those of the batch that ended the run, the newest last.
        list: Vec<BadSample>,
    },
    /// The store of a sample's shard does not answer, or the cache has no room for the shard. Not a fault of the
    /// sample, so [`OnBadSample`] does not apply.
    #[error("sample {key:?} cannot be had: {error}", key = .0.key, error = .0.error)]
    Lost(Box<BadSample>),
    /// No substitute was found for a bad sample.
    #[error("{tries} substitutes for a bad sample were bad as well: the last one: {last}")]
    NoSubstitute {
        /// Samples tried.
        tries: u32,
        /// The newest of them.
        last: String,
        /// The bad samples of the batch that ended the run, the one without a substitute last.
        list: Vec<BadSample>,
    },
    /// The system refused a thread.
    #[error("cannot start a thread: {0}{hint}", hint = limits::of_threads(.0))]
    Thread(#[source] std::io::Error),
    /// There is no memory for the batches.
    #[error(
        "no memory for the {bytes} bytes of a batch of views: lower train.batch, the sizes of the views, or \
         data.batches_ahead"
    )]
    Memory {
        /// Bytes of one batch.
        bytes: u128,
    },
    /// The caller holds all batches, so no other can be made. Not final: once one is dropped the next call
    /// continues.
    #[error(
        "all {batches} batches are held by the caller and none can be made until one is dropped: copy what is to \
         be kept, or raise batches_ahead (data.batches_ahead) above the number of batches that are held"
    )]
    AllHeld {
        /// Number of batches that circulate.
        batches: usize,
    },
    /// The workers are gone before the end.
    #[error("the workers ended before epoch {epoch}, step {step} was finished")]
    Ended {
        /// Epoch that was waited for.
        epoch: u32,
        /// Step that was waited for.
        step: u64,
    },
}

impl From<NoMemory> for PipelineError {
    fn from(NoMemory { bytes }: NoMemory) -> PipelineError {
        PipelineError::Memory { bytes }
    }
}

impl PipelineError {
    /// The bad samples of the batch that ended the run, the decisive one last. That batch never leaves the
    /// loader.
    pub fn bad(&self) -> &[BadSample] {
        match self {
            PipelineError::Bad(bad) => std::slice::from_ref(bad),
            PipelineError::TooManyBad { list, .. }
            | PipelineError::BadRun { list, .. }
            | PipelineError::NoSubstitute { list, .. } => list,
            PipelineError::Lost(_)
            | PipelineError::Thread(_)
            | PipelineError::Memory { .. }
            | PipelineError::AllHeld { .. }
            | PipelineError::Ended { .. } => &[],
        }
    }
}

/// A finished batch of views. Dropping it frees its slab for the next batch.
#[derive(Debug)]
pub struct Filled {
    /// Its position in the run.
    pub cursor: Cursor,
    /// The samples it holds, substitutes included, in slot order.
    pub samples: Vec<u64>,
    /// Samples that could not be used, in slot order.
    pub bad: Vec<BadSample>,
    /// Read with the samples; empty where they were not asked for.
    classes: Vec<Class>,
    slab: Option<Slab>,
    free: Sender<Slab>,
    stats: Arc<Stats>,
    _holding: Option<Holding>,
}

/// The counter of batches that the consumer holds.
#[derive(Debug, Default)]
pub(crate) struct Holders(AtomicUsize);

/// Counts as one held batch until it is dropped.
#[derive(Debug)]
pub(crate) struct Holding(Arc<Holders>);

impl Holding {
    pub(crate) fn new(holders: &Arc<Holders>) -> Holding {
        holders.0.fetch_add(1, Ordering::Relaxed);
        Holding(Arc::clone(holders))
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Filled {
    /// Samples in the batch, n.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether the batch holds nothing (a rank beyond the batch).
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Its layout; `None` for an empty batch.
    pub fn layout(&self) -> Option<&Layout> {
        self.slab.as_ref().map(Slab::layout)
    }

    /// View `view` of a group, of all samples: `[n, h, w, 3]` or `[n, patches, p, p, 3]` bytes.
    ///
    /// # Panics
    /// Where the recipe has no such view.
    pub fn view(&self, group: &str, view: usize) -> &[u8] {
        let of = |slab: &Slab| slab.layout().expect(group, view);
        self.slab.as_ref().map_or(&[], |slab| slab.view(of(slab), self.samples.len()))
    }

    /// What was drawn for view `view` of a group, of the sample in this slot.
    ///
    /// # Panics
    /// Where the recipe has no such view, or the batch no such slot.
    pub fn note(&self, group: &str, view: usize, slot: usize) -> Note {
        assert!(slot < self.samples.len(), "slot {slot} of {}", self.samples.len());
        let slab = self.slab.as_ref().expect("a batch with samples has a slab");
        slab.note(slab.layout().expect(group, view), slot)
    }

    /// The class of each sample, in slot order; `None` where the shard has none. Empty unless
    /// [`LoaderOptions::labels`] asked for them: they are read with the samples.
    ///
    /// # Errors
    /// A class that is no number: see [`ShardSet::class`].
    pub fn labels(&self) -> Result<Vec<Option<u32>>, ShardError> {
        labels(&self.classes)
    }
}

pub(crate) fn labels(classes: &[Class]) -> Result<Vec<Option<u32>>, ShardError> {
    let shared = |error: &Arc<ShardError>| ShardError::Shared(Arc::clone(error));
    classes.iter().map(|class| class.as_ref().copied().map_err(shared)).collect()
}

impl Drop for Filled {
    fn drop(&mut self) {
        if let Some(slab) = self.slab.take() {
            let (start, found) = (Instant::now(), self.free.len());
            // The loader may be gone: then the slab is freed here.
            let _ = self.free.send(slab);
            self.stats.consumer().put.waited(start.elapsed(), found);
        }
    }
}

/// A sample's class, or the error of reading it.
pub(crate) type Class = Result<Option<u32>, Arc<ShardError>>;

/// A batch in work, shared by its slots.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) cursor: Cursor,
    /// Its number in the loader's sequence of batches.
    pub(crate) number: u64,
    /// Slot 0 in the global batch.
    first_slot: u64,
    pub(crate) samples: Vec<u64>,
    /// Locked for bad samples only.
    faults: Mutex<Vec<Fault>>,
    /// Labels by slot, read with the sample: a remote shard may be evicted before its batch arrives.
    classes: Mutex<Vec<Class>>,
}

#[derive(Debug)]
enum Fault {
    /// Bad, and replaced unless the policy is to fail.
    Bad(BadSample),
    /// Bad, and so was everything tried instead.
    NoSubstitute(BadSample),
    /// Its shard, or that of a substitute, cannot be fetched.
    Lost(BadSample),
}

impl Fault {
    fn slot(&self) -> usize {
        match self {
            Fault::Bad(sample) | Fault::NoSubstitute(sample) | Fault::Lost(sample) => sample.slot,
        }
    }
}

impl Work {
    /// Produces the sample of slot `index`, or a substitute, and notes bad samples. `make` fills the slot with a
    /// sample or returns why it cannot.
    pub(crate) fn settle(
        &self,
        index: usize,
        set: &ShardSet,
        options: &LoaderOptions,
        mut make: impl FnMut(u64) -> Result<(), SampleError>,
    ) {
        let sample = self.samples[index];
        let Err(error) = make(sample) else { return };
        let lost = error.is_lost();
        let mut bad = bad_sample(set, sample, index, error);
        if lost {
            return self.note(Fault::Lost(bad));
        }
        if options.on_bad_sample == OnBadSample::Fail {
            return self.note(Fault::Bad(bad));
        }
        for attempt in 0..SUBSTITUTES_MAX {
            let number = self.first_slot + index as u64;
            let substitute = options.order.substitute(self.cursor, number, attempt);
            match make(substitute) {
                Ok(()) => {
                    bad.substitute = Some(substitute);
                    return self.note(Fault::Bad(bad));
                }
                Err(error) if error.is_lost() => {
                    return self.note(Fault::Lost(bad_sample(set, substitute, index, error)));
                }
                Err(_) => {}
            }
        }
        self.note(Fault::NoSubstitute(bad));
    }

    /// Repeats [`Work::settle`] for a slot whose content turned out to be bad later.
    pub(crate) fn resettle(
        &self,
        index: usize,
        set: &ShardSet,
        options: &LoaderOptions,
        make: impl FnMut(u64) -> Result<(), SampleError>,
    ) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.retain(|fault| fault.slot() != index);
        drop(faults);
        self.settle(index, set, options, make);
    }

    fn classes(&self) -> MutexGuard<'_, Vec<Class>> {
        self.classes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the class of the sample in a slot.
    pub(crate) fn label(&self, index: usize, sample: &Sample<'_>) {
        self.classes()[index] = sample.class().map_err(Arc::new);
    }

    fn note(&self, fault: Fault) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
    }
}

fn bad_sample(set: &ShardSet, sample: u64, slot: usize, error: SampleError) -> BadSample {
    let (shard, key, offset) = set.place(sample).unwrap_or((Path::new(""), "", 0));
    let (shard, key) = (shard.to_path_buf(), key.to_string());
    BadSample { sample, shard, key, offset, error, substitute: None, slot }
}

/// Recycled memory of a batch, opened for many workers at once.
pub(crate) trait Room: Send + 'static {
    /// The right to write one of its samples.
    type Slot: Send;

    /// A slot for each of the first `n` samples, in their order.
    fn open(self, n: usize) -> Vec<Self::Slot>;
}

impl Room for Slab {
    type Slot = Slot;

    fn open(self, n: usize) -> Vec<Slot> {
        self.into_slots(n)
    }
}

#[derive(Debug)]
pub(crate) struct Task<S> {
    pub(crate) work: Arc<Work>,
    /// The sample's index in the batch.
    pub(crate) index: usize,
    pub(crate) slot: S,
    /// Keeps a remote shard mapped until the sample has been read.
    pub(crate) held: Option<Arc<PinnedShard>>,
}

/// A finished batch; without memory if the rank has no part in it.
#[derive(Debug)]
pub(crate) struct Finished<R> {
    pub(crate) work: Arc<Work>,
    pub(crate) room: Option<R>,
}

/// The next batch of the run, after the policy on bad samples.
pub(crate) struct Judged<R> {
    pub(crate) cursor: Cursor,
    pub(crate) samples: Vec<u64>,
    pub(crate) bad: Vec<BadSample>,
    pub(crate) classes: Vec<Class>,
    pub(crate) room: Option<R>,
}

/// Brings finished batches into the order of the run and applies the policy on bad samples.
#[derive(Debug)]
pub(crate) struct Sequence<R> {
    options: LoaderOptions,
    stats: Arc<Stats>,
    next: u64,
    at: Cursor,
    bad_in_epoch: u64,
    bad_run: u32,
    failed: bool,
    waiting: BTreeMap<u64, Finished<R>>,
    finished: Receiver<Finished<R>>,
    /// The batches that the consumer holds, and the number that circulate.
    held: (Arc<Holders>, usize),
    /// How long to wait for a consumer that holds all of them.
    patience: Duration,
}

/// How long to wait for a consumer that holds all batches, since another thread may be about to drop one:
/// longer than any step on a GPU and most on a CPU.
const PATIENCE: Duration = Duration::from_secs(30);

/// Batches of views in the order of the run.
#[derive(Debug)]
pub struct Loader {
    set: Arc<ShardSet>,
    stats: Arc<Stats>,
    slabs: usize,
    slab_bytes: usize,
    // The order of the fields is the order of dropping: channels close before the pool joins.
    sequence: Sequence<Slab>,
    tasks: Receiver<Task<Slot>>,
    free: Sender<Slab>,
    /// Ends waits for remote shards, during which a thread does not see its channels.
    ended: Arc<AtomicBool>,
    _stop: Sender<()>,
    _pool: Pool,
}

impl Loader {
    /// Starts the threads; the first batch is in work when this returns.
    pub fn start(set: Arc<ShardSet>, options: LoaderOptions) -> Result<Loader, PipelineError> {
        Loader::start_in(set, options, |layout| Ok(Slab::new(layout)?))
    }

    /// [`Loader::start`] with slabs from elsewhere, such as page-locked ones.
    ///
    /// # Errors
    /// [`PipelineError::Thread`], and what `slab` says.
    pub fn start_in<E: From<PipelineError>>(
        set: Arc<ShardSet>,
        options: LoaderOptions,
        mut slab: impl FnMut(Layout) -> Result<Slab, E>,
    ) -> Result<Loader, E> {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let workers = if options.workers == 0 { cores } else { options.workers };
        let (rank, world) = options.rank;
        let n = options.order.slots(0, rank, world).count();
        let layout = options.views.layout(n.max(1));
        // One more than may be ahead: the one that the consumer reads.
        let slabs = options.batches_ahead.max(1) + 1;
        // Before the channels, so that an error below closes them before it joins the threads.
        let mut pool = Pool::new();
        let (free, free_slabs) = bounded(slabs);
        for _ in 0..slabs {
            let sent = free.send(slab(layout.clone())?);
            assert!(sent.is_ok(), "the receiver lives in this function");
        }
        let (task_sender, tasks) = bounded::<Task<Slot>>(TASKS_MAX);
        let (finish, finished) = bounded::<Finished<Slab>>(slabs);
        let (stop, stopped) = bounded::<()>(0);
        let stats = Arc::new(Stats::new(workers));
        let ended = Arc::new(AtomicBool::new(false));
        for worker in 0..workers {
            let (set, tasks, finish) = (Arc::clone(&set), tasks.clone(), finish.clone());
            let (options, stats) = (options.clone(), Arc::clone(&stats));
            let ended = Arc::clone(&ended);
            let name = format!("detco-worker-{worker}");
            let recorder = options.trace.as_ref().map(|trace| trace.recorder(name.clone()));
            let body = move || {
                let stats = stats.worker(worker);
                Worker::new(&set, &options, stats, recorder, &ended).run(&tasks, &finish);
            };
            pool.start(name, body).map_err(PipelineError::Thread)?;
        }
        let rooms = Rooms { free: free_slabs, stopped, ended: Arc::clone(&ended) };
        let dispatcher = Dispatcher::new(&set, &options, rooms, task_sender, finish, &stats);
        let body = move || dispatcher.run();
        pool.start(DISPATCHER.into(), body).map_err(PipelineError::Thread)?;
        Ok(Loader {
            set,
            sequence: Sequence::new(options, finished, Arc::clone(&stats), slabs),
            stats,
            slabs,
            slab_bytes: layout.bytes(),
            tasks,
            free,
            ended,
            _stop: stop,
            _pool: pool,
        })
    }

    /// Sets how long a call waits while the caller holds all batches, before it returns
    /// [`PipelineError::AllHeld`]; half a minute by default.
    pub fn with_patience(mut self, patience: Duration) -> Loader {
        self.sequence.set_patience(patience);
        self
    }

    /// The data set being read.
    pub fn set(&self) -> &Arc<ShardSet> {
        &self.set
    }

    /// The counters at this moment.
    pub fn stats(&self) -> Snapshot {
        self.stats.snapshot()
    }

    /// The counters themselves, which another thread may read while this loader is waited for.
    pub fn counters(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// How many slabs circulate, and the bytes of one.
    pub fn slabs(&self) -> (usize, usize) {
        (self.slabs, self.slab_bytes)
    }
}

impl<R> Sequence<R> {
    /// A sequence over the batches of `finished`, from the options' start on.
    pub(crate) fn new(
        options: LoaderOptions,
        finished: Receiver<Finished<R>>,
        stats: Arc<Stats>,
        batches: usize,
    ) -> Sequence<R> {
        let (at, waiting) = (options.start, BTreeMap::new());
        let (next, bad_in_epoch, bad_run, failed) = (0, 0, 0, false);
        let (held, patience) = ((Arc::default(), batches), PATIENCE);
        Sequence {
            options,
            stats,
            next,
            at,
            bad_in_epoch,
            bad_run,
            failed,
            waiting,
            finished,
            held,
            patience,
        }
    }

    /// Sets how long to wait for a consumer that holds all batches.
    pub(crate) fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Counts a batch as held by the consumer until the result is dropped.
    pub(crate) fn holding(&self) -> Holding {
        Holding::new(&self.held.0)
    }

    /// The next batch; `None` at the end of the run and after an error.
    pub(crate) fn next(&mut self) -> Option<Result<Judged<R>, PipelineError>> {
        if self.failed {
            return None;
        }
        if self.options.order.is_empty(self.at.step) {
            self.at = Cursor { epoch: self.at.epoch + 1, step: 0 };
            self.bad_in_epoch = 0;
        }
        if self.at.epoch >= self.options.epochs {
            return None;
        }
        let finished = match self.receive() {
            Ok(finished) => finished,
            Err(RecvTimeoutError::Timeout) => {
                return Some(Err(PipelineError::AllHeld { batches: self.held.1 }));
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.failed = true;
                let Cursor { epoch, step } = self.at;
                return Some(Err(PipelineError::Ended { epoch, step }));
            }
        };
        let (samples, bad) = match self.judge(&finished.work) {
            Ok(judged) => judged,
            Err(error) => {
                self.failed = true;
                return Some(Err(error));
            }
        };
        self.next += 1;
        self.at.step += 1;
        let Finished { work, room } = finished;
        let classes = std::mem::take(&mut *work.classes());
        Some(Ok(Judged { cursor: work.cursor, samples, bad, classes, room }))
    }

    /// The next batch of the run. `Timeout` where none can come, since the consumer holds all of them.
    fn receive(&mut self) -> Result<Finished<R>, RecvTimeoutError> {
        loop {
            if let Some(finished) = self.waiting.remove(&self.next) {
                return Ok(finished);
            }
            let (start, found) = (Instant::now(), self.finished.len());
            let finished = self.wait();
            self.stats.consumer().get.waited(start.elapsed(), found);
            let finished = finished?;
            self.waiting.insert(finished.work.number, finished);
        }
    }

    fn wait(&self) -> Result<Finished<R>, RecvTimeoutError> {
        let (holders, batches) = &self.held;
        loop {
            match self.finished.recv_timeout(self.patience.max(Duration::from_millis(1))) {
                Err(RecvTimeoutError::Timeout) if holders.0.load(Ordering::Relaxed) < *batches => {}
                result => return result,
            }
        }
    }

    /// Applies the policy to a batch's bad samples in slot order, so that the result does not depend on the
    /// order of the workers.
    fn judge(&mut self, work: &Work) -> Result<(Vec<u64>, Vec<BadSample>), PipelineError> {
        let mut samples = work.samples.clone();
        let mut bad = Vec::new();
        let faults = &mut *work.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.sort_by_key(Fault::slot);
        let mut after = 0; // the slot after the last bad one
        for fault in faults.drain(..) {
            let sample = match fault {
                Fault::NoSubstitute(sample) => {
                    let (tries, last) = (SUBSTITUTES_MAX, describe(&sample));
                    bad.push(sample);
                    return Err(PipelineError::NoSubstitute { tries, last, list: bad });
                }
                Fault::Lost(sample) => return Err(PipelineError::Lost(Box::new(sample))),
                Fault::Bad(sample) => sample,
            };
            let Some(substitute) = sample.substitute else {
                return Err(PipelineError::Bad(Box::new(sample)));
            };
            samples[sample.slot] = substitute;
            self.bad_in_epoch += 1;
            let adjacent = sample.slot <= after;
            self.bad_run = if adjacent { self.bad_run + 1 } else { 1 };
            after = sample.slot + 1;
            let total = self.options.order.samples();
            let budget = bad_budget(total, self.options.bad_share_max);
            let last = describe(&sample);
            bad.push(sample);
            if self.bad_in_epoch > budget {
                return Err(PipelineError::TooManyBad {
                    bad: self.bad_in_epoch,
                    samples: total,
                    epoch: work.cursor.epoch,
                    budget,
                    last,
                    list: bad,
                });
            }
            if self.bad_run >= self.options.bad_run_max.max(1) {
                return Err(PipelineError::BadRun { run: self.bad_run, last, list: bad });
            }
        }
        if after < samples.len() {
            self.bad_run = 0;
        }
        Ok((samples, bad))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // What is queued is for nobody: workers need not make it before they end.
        while self.tasks.try_recv().is_ok() {}
        self.set.want(Vec::new(), 0);
    }
}

/// A bad sample that ended a run, and how to find those like it.
fn describe(bad: &BadSample) -> String {
    let hint = match &bad.error {
        SampleError::Shard(_) => String::new(),
        SampleError::Decode(_) | SampleError::Panicked { .. } => {
            format!("\nhint: {}", bad.finders())
        }
    };
    let shard = bad.shard.display();
    format!("{shard}: sample {:?} at byte {}: {}{hint}", bad.key, bad.offset, bad.error)
}

impl Iterator for Loader {
    type Item = Result<Filled, PipelineError>;

    fn next(&mut self) -> Option<Self::Item> {
        let judged = match self.sequence.next()? {
            Ok(judged) => judged,
            Err(error) => return Some(Err(error)),
        };
        let Judged { cursor, samples, bad, classes, room: slab } = judged;
        let (free, stats) = (self.free.clone(), Arc::clone(&self.stats));
        let _holding = slab.is_some().then(|| self.sequence.holding());
        Some(Ok(Filled { cursor, samples, bad, classes, slab, free, stats, _holding }))
    }
}

/// The name of the dispatcher's thread.
pub(crate) const DISPATCHER: &str = "detco-dispatcher";

/// The dispatcher's source of free memory, and its signals to stop.
pub(crate) struct Rooms<R> {
    pub(crate) free: Receiver<R>,
    pub(crate) stopped: Receiver<()>,
    /// Ends the dispatcher's waits for remote shards, during which it does not see its channels.
    pub(crate) ended: Arc<AtomicBool>,
}

/// The dispatcher: turns the order into tasks, as far ahead as free memory and [`TASKS_MAX`] allow. `F` is the
/// type of a finished batch.
pub(crate) struct Dispatcher<R: Room, F> {
    set: Arc<ShardSet>,
    options: LoaderOptions,
    rooms: Rooms<R>,
    tasks: Sender<Task<R::Slot>>,
    finish: Sender<Finished<F>>,
    stats: Arc<Stats>,
    recorder: Option<Recorder>,
    /// The shards last announced to the set, and their epoch.
    wanted: Option<(u32, std::ops::Range<usize>)>,
    /// The shards that are read, if the set is remote and they are read in order.
    rising: Option<Vec<u32>>,
}

impl<R: Room, F> Dispatcher<R, F> {
    pub(crate) fn new(
        set: &Arc<ShardSet>,
        options: &LoaderOptions,
        rooms: Rooms<R>,
        tasks: Sender<Task<R::Slot>>,
        finish: Sender<Finished<F>>,
        stats: &Arc<Stats>,
    ) -> Dispatcher<R, F> {
        let recorder = options.trace.as_ref().map(|trace| trace.recorder(DISPATCHER.into()));
        let (set, options, stats) = (Arc::clone(set), options.clone(), Arc::clone(stats));
        let rising = (set.is_remote() && options.order.is_sequential()).then(|| {
            let of = |sample| set.shard_of(sample);
            options.order.epoch(0).shards(0, set.shards().len(), &of)
        });
        let wanted = None;
        Dispatcher { set, options, rooms, tasks, finish, stats, recorder, wanted, rising }
    }

    pub(crate) fn run(mut self) {
        let order = self.options.order.clone();
        let (rank, world) = self.options.rank;
        let mut cursor = self.options.start;
        let mut epoch = order.epoch(cursor.epoch);
        let mut number = 0;
        while cursor.epoch < self.options.epochs {
            if order.is_empty(cursor.step) {
                cursor = Cursor { epoch: cursor.epoch + 1, step: 0 };
                epoch = order.epoch(cursor.epoch);
                continue;
            }
            self.want(&epoch, cursor);
            let slots = order.slots(cursor.step, rank, world);
            let samples: Vec<u64> =
                slots.clone().map(|slot| epoch.sample(cursor.step, slot)).collect();
            let faults = Mutex::new(Vec::new());
            let classes = if self.options.labels { samples.len() } else { 0 };
            let classes = Mutex::new(vec![Ok(None); classes]);
            let work = Work { cursor, number, first_slot: slots.start, samples, faults, classes };
            if !self.dispatch(Arc::new(work)) {
                return;
            }
            cursor.step += 1;
            number += 1;
        }
    }

    /// Announces the next shards to a remote set when they change. A sequential order announces them with each
    /// sample instead, since one batch may be of more shards than the cache holds.
    fn want(&mut self, epoch: &Epoch<'_>, cursor: Cursor) {
        if !self.set.is_remote() || self.rising.is_some() {
            return;
        }
        let shards = self.set.shards().len();
        let of = |sample| self.set.shard_of(sample);
        let reading = epoch.reading(cursor.step, shards, &of);
        let now = Some((cursor.epoch, reading.clone()));
        if self.wanted == now {
            return;
        }
        self.wanted = now;
        let mut all = epoch.shards(cursor.step, shards, &of);
        all.drain(..reading.start);
        if cursor.epoch + 1 < self.options.epochs {
            let mut seen = vec![false; shards];
            all.iter().for_each(|shard| seen[*shard as usize] = true);
            let next = self.options.order.epoch(cursor.epoch + 1).shards(0, shards, &of);
            all.extend(next.into_iter().filter(|shard| !seen[*shard as usize]));
        }
        self.set.want(all, reading.len() as u32);
    }

    /// Announces the next shards of a sequential order to a remote set, from this sample's on.
    fn want_from(&mut self, epoch: u32, sample: u64) {
        let Some(all) = &self.rising else { return };
        let shard = self.set.shard_of(sample) as u32;
        let at = all.partition_point(|other| *other < shard);
        let now = Some((epoch, at..at + 1));
        if self.wanted == now {
            return;
        }
        self.wanted = now;
        let again = if epoch + 1 < self.options.epochs { &all[..at] } else { &[] };
        self.set.want([&all[at..], again].concat(), 1);
    }

    /// Hands out the tasks of a batch; returns false when the loader is gone.
    fn dispatch(&mut self, work: Arc<Work>) -> bool {
        if work.samples.is_empty() {
            return self.finish.send(Finished { work, room: None }).is_ok();
        }
        let (start, found) = (Instant::now(), self.rooms.free.len());
        let room = select! {
            recv(self.rooms.free) -> room => room.ok(),
            recv(self.rooms.stopped) -> _ => None,
        };
        let mut end = Instant::now();
        self.stats.dispatcher().get.waited(end - start, found);
        self.span("wait for a slab", start, end, work.number);
        let Some(room) = room else { return false };
        for (index, slot) in room.open(work.samples.len()).into_iter().enumerate() {
            let sample = work.samples[index];
            self.want_from(work.cursor.epoch, sample);
            // Without its shard the worker meets the same error, and tells it as the sample's.
            let ended = &self.rooms.ended;
            let held = self.set.ready(sample, &|| ended.load(Ordering::Relaxed)).ok().flatten();
            if self.set.is_remote() {
                self.stats.shard_waited(end.elapsed());
            }
            if let Some((Stage::Get, time)) = self.options.handicap {
                std::thread::sleep(time);
            }
            let (start, found) = (Instant::now(), self.tasks.len());
            self.span("read ahead", end, start, sample);
            let task = Task { work: Arc::clone(&work), index, slot, held };
            if self.tasks.send(task).is_err() {
                return false;
            }
            end = Instant::now();
            self.stats.dispatcher().put.waited(end - start, found);
        }
        // Checked once a batch as well: with many free slabs the select above may not look.
        !matches!(self.rooms.stopped.try_recv(), Err(TryRecvError::Disconnected))
    }

    fn span(&mut self, name: &'static str, start: Instant, end: Instant, of: u64) {
        if let Some(recorder) = &mut self.recorder {
            recorder.span(name, start, end, of);
        }
    }
}

/// A worker: one thread's decoder, renderer and scratch memory, made before the first sample.
struct Worker<'a> {
    set: &'a ShardSet,
    options: &'a LoaderOptions,
    stats: &'a WorkerStats,
    recorder: Option<Recorder>,
    /// The beginning of the current stage.
    since: Mark,
    decoder: Decoder,
    renderer: Renderer,
    plan: SamplePlan,
    image: Image,
    ended: &'a AtomicBool,
}

impl<'a> Worker<'a> {
    fn new(
        set: &'a ShardSet,
        options: &'a LoaderOptions,
        stats: &'a WorkerStats,
        recorder: Option<Recorder>,
        ended: &'a AtomicBool,
    ) -> Worker<'a> {
        let (decoder, renderer) = (Decoder::new(), Renderer::new());
        let (since, plan, image) = (Mark::now(), SamplePlan::default(), Image::new());
        Worker { set, options, stats, recorder, since, decoder, renderer, plan, image, ended }
    }

    fn run(&mut self, tasks: &Receiver<Task<Slot>>, finish: &Sender<Finished<Slab>>) {
        self.since = Mark::now();
        loop {
            let (start, found) = (self.since.wall, tasks.len());
            let Ok(Task { work, index, mut slot, mut held }) = tasks.recv() else { return };
            self.lap(Stage::Get, work.samples[index]);
            self.stats.get().waited(self.since.wall - start, found);
            let (set, options) = (self.set, self.options);
            work.settle(index, set, options, |id| {
                let made = self.sample(id, &work, &mut slot);
                held = None; // its shard may go, before a substitute's is waited for
                made
            });
            let Some(slab) = slot.done() else { continue };
            let (start, found, number) = (self.since.wall, finish.len(), work.number);
            self.hold(Stage::Put);
            if finish.send(Finished { work, room: Some(slab) }).is_err() {
                return;
            }
            self.lap(Stage::Put, number);
            self.stats.put().waited(self.since.wall - start, found);
        }
    }

    /// Ends a stage and counts the time since the last one ended for it.
    fn lap(&mut self, stage: Stage, of: u64) {
        let start = self.since.wall;
        self.since = self.stats.lap(stage, self.since);
        if let Some(recorder) = &mut self.recorder {
            recorder.span(stage.name(), start, self.since.wall, of);
        }
    }

    /// Waits for the injected delay of a stage, if there is one.
    fn hold(&self, stage: Stage) {
        let Some((_, time)) = self.options.handicap.filter(|(held, _)| *held == stage) else {
            return;
        };
        if matches!(stage, Stage::Read | Stage::Put) {
            return std::thread::sleep(time);
        }
        let start = Mark::now().cpu;
        while u128::from(Mark::now().cpu - start) < time.as_nanos() {
            std::hint::spin_loop();
        }
    }

    fn sample(&mut self, id: u64, work: &Work, slot: &mut Slot) -> Result<(), SampleError> {
        let caught = catch_unwind(AssertUnwindSafe(|| self.render(id, work, slot)));
        caught.unwrap_or_else(|panic| {
            // What the panic left half-done is thrown away.
            (self.decoder, self.renderer) = (Decoder::new(), Renderer::new());
            self.image = Image::new();
            Err(SampleError::panicked(&*panic))
        })
    }

    fn render(&mut self, id: u64, work: &Work, slot: &mut Slot) -> Result<(), SampleError> {
        let sample = self.set.sample_until(id, &|| self.ended.load(Ordering::Relaxed))?;
        touch(sample.jpeg(), &self.options.views);
        self.hold(Stage::Read);
        self.lap(Stage::Read, id);
        let mut part = None;
        if !matches!(self.options.views, Views::Read) {
            let decoded = self.decode(id, work.cursor, sample.jpeg());
            self.hold(Stage::Decode);
            self.lap(Stage::Decode, id);
            match decoded {
                Ok(decoded) => part = Some(decoded),
                Err(error) => {
                    self.set.check_file(&sample)?;
                    return Err(error.into());
                }
            }
        }
        // Zeros in the place of a shard that shrank may decode as well.
        self.set.check(&sample)?;
        if let Some(part) = part {
            self.views(part, slot);
            self.hold(Stage::Views);
            self.lap(Stage::Views, id);
        }
        if self.options.labels {
            work.label(slot.index(), &sample);
        }
        self.stats.sample(sample.jpeg().len());
        Ok(())
    }

    /// Draws the views and decodes the part of the image that they need.
    fn decode(&mut self, id: u64, cursor: Cursor, jpeg: &[u8]) -> Result<Part, DecodeError> {
        let header = probe(jpeg)?;
        let (options, image) = (self.options, [header.width, header.height]);
        options.views.draw(image, (options.seed, cursor.epoch, id), &mut self.plan);
        let reduction = if options.reduce { u32::MAX } else { 1 };
        let wanted = Views::part(&self.plan, image, reduction);
        self.decoder.decode_part(jpeg, &header, wanted, &mut self.image)
    }

    /// Renders the views of the decoded part.
    fn views(&mut self, part: Part, slot: &mut Slot) {
        let frame = Frame { image: &self.image, part };
        for (number, plan) in self.plan.views.iter().enumerate() {
            self.renderer.view(frame, plan, slot.view(number));
            slot.note(number, &Note::of(plan));
        }
    }
}
