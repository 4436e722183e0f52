//! The wiring for batches whose pixels are made where the model is: order, stream, decode, views,
//! into device memory.
//!
//! ```text
//!               tasks (bounded)               filled                      rendered
//! dispatcher ────────────────────▶ workers ───────────▶ submit thread ───────────────▶ DeviceLoader::next
//!     ▲  order, read-ahead            probe, draw,        batch decoder,                   │ in step order
//!     │                               decode or defer     render, event                    │
//!     └─────────────────────────────────── free buffers ◀──────────────────────────────────┘
//! ```
//!
//! The same order, cursor, views and policy on bad samples as [`pipeline`](crate::pipeline): the
//! two share the code that decides them, so the same options give the same samples, substitutes and
//! errors. What differs is who decodes and renders, and that stands behind one narrow trait,
//! [`Engine`]: [`Host`] does it with the CPU's code into host memory (the oracle, and what the tests
//! of this wiring run on), `Cuda` does it on a GPU.
//!
//! A worker looks at an image's header and takes one of three ways. What looks fit for the batch
//! decoder (baseline JPEG, for the hardware engine) is left for the submit thread, as far as the
//! [share](Share) says and where the decoder, which is [asked](Engine::takes), takes it; what the
//! device decodes one by one is decoded at once; the rest, and whatever the device refuses, is
//! decoded by the CPU in its place. The way changes neither order nor batch nor plan, and is
//! [counted](Counts). A batch that the batch decoder refuses is decoded
//! again image by image, so one bad image is found, judged and replaced as everywhere.
//!
//! Dropping the loader closes its channels, and the threads end.

#[cfg(feature = "nvjpeg")]
mod cuda;
mod host;
mod resolve;
mod share;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use serde::Serialize;
use thiserror::Error;

#[cfg(feature = "nvjpeg")]
use crate::cuda::{CudaError, Device, Stream};
use crate::decode::{Components, DecodeError, Format, Probe, probe};
use crate::format::ShardError;
use crate::order::Cursor;
use crate::pipe::Pool;
use crate::pipeline::{
    BadSample, Class, DISPATCHER, Dispatcher, Finished, Holding, Judged, LoaderOptions,
    PipelineError, Room, Rooms, SampleError, Sequence, TASKS_MAX, Task, Views, Work, labels, touch,
};
use crate::slab::Layout;
use crate::stats::{Mark, Snapshot, Stage, Stats, WorkerStats};
use crate::stream::{Sample, ShardSet};
use crate::trace::Recorder;
use crate::views::{Note, SamplePlan};

#[cfg(feature = "nvjpeg")]
pub use cuda::{Cuda, CudaBuffers, GpuError};
pub use host::{Host, HostBuffers};
pub use resolve::{Decode, Decoding, Number, Setup, Unavailable};
pub use share::{Share, balance};

use share::Meter;

/// Bytes of a decoded image, on average, that memory is first planned with: ImageNet's have 0.55 MB.
const FRAME_BYTES: usize = 640 << 10;

/// Bytes on the device that a batch is first given: its views, and decoded images of a usual size.
/// Where images are larger it grows.
pub fn bytes(layout: &Layout, number: Number) -> usize {
    layout.pixels() * number.bytes() + layout.n() * FRAME_BYTES
}

/// Batches that a loader has memory for: those ahead, and the one that the consumer reads.
pub fn batches_held(batches_ahead: usize) -> usize {
    batches_ahead.max(1) + 1
}

/// Where the views of a batch lie on its device: numbers channels last, normalised. Made by the engines
/// of this crate only: who reads the addresses relies on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pointers {
    views: Vec<u64>,
    layout: Layout,
    number: Number,
}

impl Pointers {
    /// The address of each view of all groups, in order: `[n, ...]` of its section's shape.
    pub fn views(&self) -> &[u64] {
        &self.views
    }

    /// What the views are. A short batch fills the first samples.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What the numbers are.
    pub fn number(&self) -> Number {
        self.number
    }

    /// The address of view `view` of a group, if there is such.
    pub fn view(&self, group: &str, view: usize) -> Option<u64> {
        self.layout.number(group, view).map(|number| self.views[number])
    }
}

/// The decoder for an image, chosen by its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By the batch decoder, or alone.
    Batch,
    /// Alone, on the device.
    Single,
    /// By the CPU.
    Cpu,
}

impl Way {
    /// Chooses by the header. PNG, CMYK, RGB, chroma sampled by more than two (4:1:1, 4:1:0), arithmetic and
    /// lossless coding and baseline images in several scans go to the CPU: nvJPEG refuses them, or its pixels
    /// are not Pillow's, or it was not tried.
    ///
    /// Truncated JPEGs go to the CPU decoder too: decoders differ on them, and one must decide.
    pub fn of(header: &Probe, bytes: &[u8]) -> Way {
        let known = header.format == Format::Jpeg
            && matches!(header.components, Components::Ycc | Components::Gray)
            && header.sampling <= 2
            && !(header.arithmetic || header.layout.lossless)
            && (header.progressive || header.layout.one_scan)
            && bytes.windows(2).rposition(|pair| pair == [0xFF, 0xD9]).is_some();
        match (known, header.progressive) {
            (false, _) => Way::Cpu,
            (true, true) => Way::Single,
            (true, false) => Way::Batch,
        }
    }
}

/// Who decoded an image in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The device.
    Device,
    /// The CPU, in the device's place.
    Cpu,
}

/// Why [`Engine::decode`] left no image.
#[derive(Debug)]
pub enum Failure<E> {
    /// The bytes: the policy on bad samples decides.
    Sample(DecodeError),
    /// The device: the run ends.
    Engine(E),
}

impl<E> From<DecodeError> for Failure<E> {
    fn from(error: DecodeError) -> Failure<E> {
        Failure::Sample(error)
    }
}

/// An image to decode.
///
/// Made by the loader only: engines rely on it that bytes and header belong together.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// Which sample of the batch.
    pub(crate) slot: usize,
    /// The image's bytes: a slice of the map.
    pub(crate) jpeg: &'a [u8],
    /// What its header says.
    pub(crate) header: Probe,
}

/// Whether the batch decoder did its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batched {
    /// The images are decoded, or will be before they are rendered.
    Done,
    /// One of them cannot be decoded so, and it does not say which: none counts as decoded.
    Refused,
}

/// A device that decodes and renders batches.
///
/// Three threads of different kinds call it: workers decode into [`Engine::Buffers`], several at
/// once, each into slots of its own; then the submit thread, alone, decodes what was left to it and
/// renders; then the consumer reads. `recycle` comes before the next batch.
pub trait Engine: fmt::Debug + Send + Sync + 'static {
    /// Why the device cannot go on.
    type Error: std::error::Error + Send + Sync + 'static;
    /// What one batch needs: decoded frames, and views for the consumer.
    type Buffers: fmt::Debug + Send + Sync + 'static;
    /// What one thread decodes with. Made before the first sample.
    type Worker: Send + 'static;

    /// Allocates what a batch needs, for so many threads that decode into it.
    fn buffers(&self, layout: &Layout, threads: usize) -> Result<Self::Buffers, Self::Error>;

    /// Makes what thread `number` decodes with; anew after it panicked.
    fn worker(&self, number: usize) -> Result<Self::Worker, Self::Error>;

    /// Bytes of the device's memory that the buffers of one batch hold.
    fn bytes(buffers: &Self::Buffers) -> usize;

    /// Whether there is a batch decoder.
    fn batches(&self) -> bool;

    /// Prepares buffers for the next batch; their readers are done, or will be in the device's order.
    fn recycle(&self, buffers: &mut Self::Buffers) -> Result<(), Self::Error>;

    /// Decodes one image into its slot. What was in the slot before is gone, also on error.
    fn decode(
        &self,
        worker: &mut Self::Worker,
        buffers: &Self::Buffers,
        job: Job<'_>,
    ) -> Result<By, Failure<Self::Error>>;

    /// Whether the batch decoder supports this baseline image. Called by the workers, which have the time to
    /// check all of it: one bad image may fail a batch.
    fn takes(&self, worker: &mut Self::Worker, job: Job<'_>) -> Result<bool, Self::Error>;

    /// Decodes images together that were all taken. With `wait` it returns when they are decoded, for measuring.
    fn decode_batch(
        &self,
        worker: &mut Self::Worker,
        buffers: &Self::Buffers,
        jobs: &[Job<'_>],
        wait: bool,
    ) -> Result<Batched, Self::Error>;

    /// Renders the plans of slots 0, 1, ... The consumer may have the buffers when this returns,
    /// and orders its own work behind it by the device's means.
    fn render(
        &self,
        worker: &mut Self::Worker,
        buffers: &mut Self::Buffers,
        plans: &[&SamplePlan],
    ) -> Result<(), Self::Error>;

    /// What the device said of the first image or batch that it refused although it takes such ones.
    fn refusal(&self) -> Option<String> {
        None
    }

    /// Where the views of a batch lie as normalised numbers; none where they are no such numbers.
    fn pointers(buffers: &Self::Buffers) -> Option<Pointers>;

    /// The GPU, where the device is one.
    #[cfg(feature = "nvjpeg")]
    fn gpu(&self) -> Option<&Arc<Device>> {
        None
    }

    /// Lets what is queued on `stream` from now on wait until the views are rendered.
    #[cfg(feature = "nvjpeg")]
    fn wait_on(_buffers: &Self::Buffers, _stream: &Stream) -> Result<(), CudaError> {
        Ok(())
    }

    /// Has the next batch in these buffers wait for what is queued on `stream` now.
    #[cfg(feature = "nvjpeg")]
    fn release_on(_buffers: &Self::Buffers, _stream: &Stream) -> Result<(), CudaError> {
        Ok(())
    }
}

/// Who decoded how many images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Counts {
    /// Images that the batch decoder decoded.
    pub batched: u64,
    /// Images that the device decoded one by one.
    pub single: u64,
    /// Images that the CPU decoded in the device's place.
    pub cpu: u64,
    /// Batches that the batch decoder refused; their images are counted where they went.
    pub refused: u64,
    /// Share of what the batch decoder takes that goes there; none while it is measured.
    pub share: Option<f64>,
}

impl Counts {
    /// What was counted after `earlier`, and the share as it is now.
    pub fn since(self, earlier: Counts) -> Counts {
        Counts {
            batched: self.batched - earlier.batched,
            single: self.single - earlier.single,
            cpu: self.cpu - earlier.cpu,
            refused: self.refused - earlier.refused,
            share: self.share,
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    batched: AtomicU64,
    single: AtomicU64,
    cpu: AtomicU64,
    refused: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// Options of a device loader.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Everything that [`Loader`](crate::pipeline::Loader) has as well. `batches_ahead` bounds the
    /// buffers on the device; `reduce` is without effect: all of a picture is decoded.
    pub loader: LoaderOptions,
    /// How the load is shared between the batch decoder and the workers.
    pub share: Share,
}

/// Why a device loader ended early.
#[derive(Debug, Error)]
pub enum DeviceError<E: std::error::Error + 'static> {
    /// What ends a [`Loader`](crate::pipeline::Loader) as well.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// The device failed.
    #[error("the device pipeline failed: {0}")]
    Engine(#[source] E),
}

/// A batch on the device. Dropping it frees its buffers for the next batch.
#[derive(Debug)]
pub struct DeviceBatch<E: Engine> {
    /// Where it stands in the run.
    pub cursor: Cursor,
    /// The samples it holds, substitutes included, in slot order.
    pub samples: Vec<u64>,
    /// Samples that could not be used, in slot order.
    pub bad: Vec<BadSample>,
    /// Read with the samples; empty where they were not asked for.
    classes: Vec<Class>,
    layout: Layout,
    tray: Option<Tray<E>>,
    free: Sender<Tray<E>>,
    stats: Arc<Stats>,
    _holding: Option<Holding>,
}

impl<E: Engine> DeviceBatch<E> {
    /// Samples in the batch, n.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether the batch holds nothing (a rank beyond the batch).
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// What was drawn for view `view` of a group, of the sample in this slot.
    ///
    /// # Panics
    /// Where the recipe has no such view, or the batch no such slot.
    pub fn note(&self, group: &str, view: usize, slot: usize) -> Note {
        assert!(slot < self.samples.len(), "slot {slot} of {}", self.samples.len());
        let tray = self.tray.as_ref().expect("a batch with samples has buffers");
        Note::of(&lock(&tray.plans[slot]).views[self.layout.expect(group, view)])
    }

    /// The class of each sample, in slot order, as
    /// [`Filled::labels`](crate::pipeline::Filled::labels).
    ///
    /// # Errors
    /// A class that is no number.
    pub fn labels(&self) -> Result<Vec<Option<u32>>, ShardError> {
        labels(&self.classes)
    }

    /// Where the views lie as normalised numbers; none in an empty batch, or from an engine that does not
    /// normalise. Valid until the batch is dropped; of a GPU's, for work that is queued behind
    /// `DeviceBatch::wait_on`.
    pub fn pointers(&self) -> Option<Pointers> {
        E::pointers(self.buffers()?)
    }

    /// Lets what is queued on `stream` from now on wait until the views are rendered. The host does
    /// not wait.
    ///
    /// # Errors
    /// When the driver fails.
    #[cfg(feature = "nvjpeg")]
    pub fn wait_on(&self, stream: &Stream) -> Result<(), CudaError> {
        self.buffers().map_or(Ok(()), |buffers| E::wait_on(buffers, stream))
    }

    /// Gives the buffers back behind what is queued on `stream` now: the next batch overwrites them
    /// only when that is done. Call it after the last use, before dropping; a GPU's batch that is dropped
    /// without makes the host wait for the whole device before its buffers are used again.
    ///
    /// # Errors
    /// When the driver fails.
    #[cfg(feature = "nvjpeg")]
    pub fn release_on(&self, stream: &Stream) -> Result<(), CudaError> {
        self.buffers().map_or(Ok(()), |buffers| E::release_on(buffers, stream))
    }

    /// The engine's buffers, which hold the views; none in an empty batch.
    pub fn buffers(&self) -> Option<&E::Buffers> {
        self.tray.as_ref().map(|tray| &tray.buffers)
    }
}

impl<E: Engine> Drop for DeviceBatch<E> {
    fn drop(&mut self) {
        if let Some(tray) = self.tray.take() {
            let (start, found) = (Instant::now(), self.free.len());
            // The loader may be gone: then the buffers are freed here.
            let _ = self.free.send(tray);
            self.stats.consumer().put.waited(start.elapsed(), found);
        }
    }
}

/// All of one batch that circulates.
#[derive(Debug)]
struct Tray<E: Engine> {
    engine: Arc<E>,
    buffers: E::Buffers,
    /// By slot: what is to be rendered. Locked by one worker at a time, so never waited for.
    plans: Vec<Mutex<SamplePlan>>,
    /// Slots left to the batch decoder, with the sample that is in each.
    deferred: Mutex<Vec<(usize, u64)>>,
    /// The first of what made the device fail.
    failed: Mutex<Option<E::Error>>,
}

impl<E: Engine> Tray<E> {
    fn fail(&self, error: E::Error) {
        lock(&self.failed).get_or_insert(error);
    }
}

/// The right to fill one slot of a tray.
#[derive(Debug)]
struct Place<E: Engine>(Arc<Tray<E>>);

impl<E: Engine> Room for Tray<E> {
    type Slot = Place<E>;

    fn open(mut self, n: usize) -> Vec<Place<E>> {
        assert!((1..=self.plans.len()).contains(&n), "{n} slots of {}", self.plans.len());
        if let Err(error) = self.engine.recycle(&mut self.buffers) {
            self.fail(error);
        }
        let shared = Arc::new(self);
        (0..n).map(|_| Place(Arc::clone(&shared))).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic in a worker is caught and judged; what it left behind is overwritten.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Outcome<E> = Result<Tray<E>, <E as Engine>::Error>;

/// Batches of views on a device, in the order of the run.
#[derive(Debug)]
pub struct DeviceLoader<E: Engine> {
    set: Arc<ShardSet>,
    stats: Arc<Stats>,
    common: Arc<Common<E>>,
    layout: Layout,
    /// How many circulate, and the bytes of one at the start.
    buffers: (usize, usize),
    failed: bool,
    // The order of the fields is the order of dropping: channels close before the pool joins.
    sequence: Sequence<Outcome<E>>,
    tasks: Receiver<Task<Place<E>>>,
    free: Sender<Tray<E>>,
    _stop: Sender<()>,
    _pool: Pool,
}

/// What all threads share.
#[derive(Debug)]
struct Common<E: Engine> {
    set: Arc<ShardSet>,
    options: LoaderOptions,
    engine: Arc<E>,
    counters: Counters,
    meter: Meter,
    /// Tells threads that wait for a remote shard, and hear no channel meanwhile.
    ended: Arc<AtomicBool>,
}

impl<E: Engine> DeviceLoader<E> {
    /// Allocates the buffers and starts the threads; the first batch is in work when this returns.
    ///
    /// # Errors
    /// [`DeviceError::Engine`] where the device has no room or fails, [`PipelineError::Thread`].
    pub fn start(
        set: Arc<ShardSet>,
        engine: E,
        options: DeviceOptions,
    ) -> Result<DeviceLoader<E>, DeviceError<E::Error>> {
        let DeviceOptions { loader: options, share } = options;
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let workers = if options.workers == 0 { cores } else { options.workers };
        let (rank, world) = options.rank;
        let n = options.order.slots(0, rank, world).count().max(1);
        let layout = options.views.layout(n);
        let trays = batches_held(options.batches_ahead);
        let engine = Arc::new(engine);
        let share = if engine.batches() { share } else { Share::Fixed(0.0) };
        let common = Arc::new(Common {
            set: Arc::clone(&set),
            options: options.clone(),
            engine: Arc::clone(&engine),
            counters: Counters::default(),
            meter: Meter::new(share, workers),
            ended: Arc::new(AtomicBool::new(false)),
        });
        // Before the channels, so that an error below closes them before it joins the threads.
        let mut pool = Pool::new();
        let (free, free_trays) = bounded(trays);
        let mut bytes = 0;
        for _ in 0..trays {
            // The workers, and the submit thread.
            let tray = tray(&engine, &layout, workers + 1)?;
            bytes = E::bytes(&tray.buffers);
            let sent = free.send(tray);
            assert!(sent.is_ok(), "the receiver lives in this function");
        }
        let (task_sender, tasks) = bounded(TASKS_MAX);
        let (filled_sender, filled) = bounded(trays);
        let (finish, finished) = bounded(trays);
        let (stop, stopped) = bounded::<()>(0);
        let ended = Arc::clone(&common.ended);
        let stats = Arc::new(Stats::new(workers));
        for worker in 0..workers {
            let name = format!("detco-worker-{worker}");
            let mut hand = Hand::new(&common, worker, &name)?;
            let (tasks, filled, stats) = (tasks.clone(), filled_sender.clone(), Arc::clone(&stats));
            let body = move || hand.work(&tasks, &filled, stats.worker(worker));
            pool.start(name, body).map_err(PipelineError::Thread)?;
        }
        drop(filled_sender);
        let mut hand = Hand::new(&common, workers, SUBMIT)?;
        let send = finish.clone();
        let body = move || hand.submit(&filled, &send);
        pool.start(SUBMIT.into(), body).map_err(PipelineError::Thread)?;
        let rooms = Rooms { free: free_trays, stopped, ended: Arc::clone(&ended) };
        let dispatcher = Dispatcher::new(&set, &options, rooms, task_sender, finish, &stats);
        pool.start(DISPATCHER.into(), move || dispatcher.run()).map_err(PipelineError::Thread)?;
        let sequence = Sequence::new(options, finished, Arc::clone(&stats), trays);
        let (buffers, failed, _stop, _pool) = ((trays, bytes), false, stop, pool);
        Ok(DeviceLoader {
            set,
            stats,
            common,
            layout,
            buffers,
            failed,
            sequence,
            tasks,
            free,
            _stop,
            _pool,
        })
    }

    /// See [`Loader::with_patience`](crate::pipeline::Loader::with_patience).
    pub fn with_patience(mut self, patience: Duration) -> DeviceLoader<E> {
        self.sequence.set_patience(patience);
        self
    }

    /// The data set being read.
    pub fn set(&self) -> &Arc<ShardSet> {
        &self.set
    }

    /// The device.
    pub fn engine(&self) -> &Arc<E> {
        &self.common.engine
    }

    /// The counters of the threads at this moment.
    pub fn stats(&self) -> Snapshot {
        self.stats.snapshot()
    }

    /// The counters themselves, to be read while this loader is being waited for.
    pub fn counters(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// How many batches' buffers circulate, and the bytes of the device's memory that one has.
    pub fn slabs(&self) -> (usize, usize) {
        self.buffers
    }

    /// Who decoded how many images, at this moment.
    pub fn counts(&self) -> Counts {
        let Counters { batched, single, cpu, refused } = &self.common.counters;
        let [batched, single, cpu, refused] =
            [batched, single, cpu, refused].map(|counter| counter.load(Ordering::Relaxed));
        Counts { batched, single, cpu, refused, share: self.common.meter.share() }
    }

    /// What the device said of the first image or batch that it refused although it takes such ones.
    /// A few damaged files are no matter; a decoder that fails for all of them shows here.
    pub fn refusal(&self) -> Option<String> {
        self.common.engine.refusal()
    }
}

fn tray<E: Engine>(
    engine: &Arc<E>,
    layout: &Layout,
    threads: usize,
) -> Result<Tray<E>, DeviceError<E::Error>> {
    let (n, buffers) = (layout.n(), engine.buffers(layout, threads).map_err(DeviceError::Engine)?);
    let plans = (0..n).map(|_| Mutex::new(SamplePlan::default())).collect();
    let (deferred, failed) = (Mutex::new(Vec::with_capacity(n)), Mutex::new(None));
    Ok(Tray { engine: Arc::clone(engine), buffers, plans, deferred, failed })
}

impl<E: Engine> Drop for DeviceLoader<E> {
    fn drop(&mut self) {
        self.common.ended.store(true, Ordering::Relaxed);
        self.set.want(Vec::new(), 0);
        // What is queued is for nobody: workers need not make it before they end.
        while self.tasks.try_recv().is_ok() {}
    }
}

impl<E: Engine> Iterator for DeviceLoader<E> {
    type Item = Result<DeviceBatch<E>, DeviceError<E::Error>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let Judged { cursor, samples, bad, classes, room } = match self.sequence.next()? {
            Ok(judged) => judged,
            Err(error) => return Some(Err(error.into())),
        };
        let tray = match room.transpose() {
            Ok(tray) => tray,
            Err(error) => {
                self.failed = true;
                return Some(Err(DeviceError::Engine(error)));
            }
        };
        let (free, stats) = (self.free.clone(), Arc::clone(&self.stats));
        let layout = self.layout.clone();
        let _holding = tray.is_some().then(|| self.sequence.holding());
        Some(Ok(DeviceBatch { cursor, samples, bad, classes, layout, tray, free, stats, _holding }))
    }
}

/// The name of the submit thread.
const SUBMIT: &str = "detco-submit";

/// One thread's decoder, made before the first sample.
struct Hand<E: Engine> {
    common: Arc<Common<E>>,
    number: usize,
    worker: E::Worker,
    recorder: Option<Recorder>,
}

impl<E: Engine> Hand<E> {
    fn new(
        common: &Arc<Common<E>>,
        number: usize,
        name: &str,
    ) -> Result<Hand<E>, DeviceError<E::Error>> {
        let worker = common.engine.worker(number).map_err(DeviceError::Engine)?;
        let recorder = common.options.trace.as_ref().map(|trace| trace.recorder(name.to_string()));
        Ok(Hand { common: Arc::clone(common), number, worker, recorder })
    }

    /// A worker's life.
    fn work(
        &mut self,
        tasks: &Receiver<Task<Place<E>>>,
        filled: &Sender<(Arc<Work>, Tray<E>)>,
        stats: &WorkerStats,
    ) {
        let common = Arc::clone(&self.common);
        let mut laps = Laps { stats, since: Mark::now() };
        loop {
            let (start, found) = (laps.since.wall, tasks.len());
            let Ok(task) = tasks.recv() else { return };
            let Task { work, index, slot: Place(tray), mut held } = task;
            self.lap(&mut laps, Stage::Get, work.samples[index]);
            stats.get().waited(laps.since.wall - start, found);
            work.settle(index, &common.set, &common.options, |id| {
                let made = self
                    .guarded(&tray, |hand| hand.sample(id, index, &work, &tray, Some(&mut laps)));
                held = None; // its shard may go, before a substitute's is waited for
                made
            });
            let Some(tray) = Arc::into_inner(tray) else { continue };
            let (start, found, number) = (laps.since.wall, filled.len(), work.number);
            if filled.send((work, tray)).is_err() {
                return;
            }
            self.lap(&mut laps, Stage::Put, number);
            stats.put().waited(laps.since.wall - start, found);
        }
    }

    fn lap(&mut self, laps: &mut Laps<'_>, stage: Stage, of: u64) -> Duration {
        let start = laps.since.wall;
        laps.since = laps.stats.lap(stage, laps.since);
        if let Some(recorder) = &mut self.recorder {
            recorder.span(stage.name(), start, laps.since.wall, of);
        }
        laps.since.wall - start
    }

    /// Turns a panic into a bad sample.
    fn guarded(
        &mut self,
        tray: &Tray<E>,
        make: impl FnOnce(&mut Self) -> Result<(), SampleError>,
    ) -> Result<(), SampleError> {
        let caught = catch_unwind(AssertUnwindSafe(|| make(self)));
        caught.unwrap_or_else(|panic| {
            // What the panic left half-done is thrown away.
            match self.common.engine.worker(self.number) {
                Ok(worker) => self.worker = worker,
                Err(error) => tray.fail(error),
            }
            Err(SampleError::panicked(&*panic))
        })
    }

    /// Decodes a sample into its slot, or leaves it to the batch decoder, and draws its plan. Laps
    /// are a worker's; the submit thread has none, and leaves nothing to itself.
    fn sample(
        &mut self,
        id: u64,
        slot: usize,
        work: &Work,
        tray: &Tray<E>,
        mut laps: Option<&mut Laps<'_>>,
    ) -> Result<(), SampleError> {
        let common = Arc::clone(&self.common);
        let (set, options) = (&common.set, &common.options);
        let sample = set.sample_until(id, &|| common.ended.load(Ordering::Relaxed))?;
        touch(sample.jpeg(), &options.views);
        if let Some(laps) = laps.as_deref_mut() {
            self.lap(laps, Stage::Read, id);
        }
        let mut defer = false;
        if !matches!(options.views, Views::Read) {
            let header = probe(sample.jpeg()).or_else(|error| {
                set.check_file(&sample)?;
                Err(SampleError::from(error))
            })?;
            let (share, at) = (common.meter.current(), (work.cursor.epoch, id));
            let way = Way::of(&header, sample.jpeg());
            let job = Job { slot, jpeg: sample.jpeg(), header };
            let wanted = laps.is_some() && way == Way::Batch && share.takes(at);
            defer = wanted && self.takes(tray, job);
            if !defer {
                self.decode(tray, job).or_else(|error| {
                    set.check_file(&sample)?;
                    Err(SampleError::from(error))
                })?;
            }
            if let Some(laps) = laps.as_deref_mut() {
                let spent = self.lap(laps, Stage::Decode, id);
                // What the batch decoder does not take, a larger share would not give it either.
                if !defer && way != Way::Cpu {
                    common.meter.single(spent, way == Way::Batch && !wanted);
                }
            }
            let image = [header.width, header.height];
            let at = (options.seed, work.cursor.epoch, id);
            options.views.draw(image, at, &mut lock(&tray.plans[slot]));
        }
        // Zeros in the place of a shard that shrank may decode as well.
        set.check(&sample)?;
        if options.labels {
            work.label(slot, &sample);
        }
        if defer {
            lock(&tray.deferred).push((slot, id));
        }
        if let Some(laps) = laps {
            self.lap(laps, Stage::Views, id);
            laps.stats.sample(sample.jpeg().len());
        }
        Ok(())
    }

    /// Whether the batch decoder takes an image. A device that fails ends the run.
    fn takes(&mut self, tray: &Tray<E>, job: Job<'_>) -> bool {
        let taken = self.common.engine.takes(&mut self.worker, job);
        taken.unwrap_or_else(|error| {
            tray.fail(error);
            false
        })
    }

    /// Decodes one image. A device that fails ends the run, not the sample.
    fn decode(&mut self, tray: &Tray<E>, job: Job<'_>) -> Result<(), DecodeError> {
        let counters = &self.common.counters;
        match self.common.engine.decode(&mut self.worker, &tray.buffers, job) {
            Ok(By::Device) => Counters::add(&counters.single, 1),
            Ok(By::Cpu) => Counters::add(&counters.cpu, 1),
            Err(Failure::Sample(error)) => return Err(error),
            Err(Failure::Engine(error)) => tray.fail(error),
        }
        Ok(())
    }

    /// The submit thread's life.
    fn submit(
        &mut self,
        filled: &Receiver<(Arc<Work>, Tray<E>)>,
        finish: &Sender<Finished<Outcome<E>>>,
    ) {
        while let Ok((work, tray)) = filled.recv() {
            let start = Instant::now();
            let outcome = self.render(&work, tray);
            if let Some(recorder) = &mut self.recorder {
                recorder.span("submit", start, Instant::now(), work.number);
            }
            if finish.send(Finished { work, room: Some(outcome) }).is_err() {
                return;
            }
        }
    }

    fn render(&mut self, work: &Work, mut tray: Tray<E>) -> Outcome<E> {
        let mut deferred = std::mem::take(&mut *lock(&tray.deferred));
        // Workers come in any order; the device is given the same batch each time.
        deferred.sort_unstable();
        if lock(&tray.failed).is_none() && !deferred.is_empty() {
            self.deferred(work, &tray, &deferred)?;
        }
        deferred.clear();
        *lock(&tray.deferred) = deferred; // its memory is used again
        if let Some(error) = lock(&tray.failed).take() {
            return Err(error);
        }
        let Tray { plans, buffers, .. } = &mut tray;
        let plans: Vec<&SamplePlan> = plans[..work.samples.len()]
            .iter_mut()
            .map(|plan| &*plan.get_mut().unwrap_or_else(PoisonError::into_inner))
            .collect();
        self.common.engine.render(&mut self.worker, buffers, &plans)?;
        Ok(tray)
    }

    /// Decodes what the workers left to the batch decoder; if that refuses, one by one.
    fn deferred(
        &mut self,
        work: &Work,
        tray: &Tray<E>,
        deferred: &[(usize, u64)],
    ) -> Result<(), E::Error> {
        let common = Arc::clone(&self.common);
        let ended = || common.ended.load(Ordering::Relaxed);
        // A worker found all of them before; a shard that changed since is found below.
        let samples: Vec<(usize, Sample<'_>)> = deferred
            .iter()
            .filter_map(|(slot, id)| Some((*slot, common.set.sample_until(*id, &ended).ok()?)))
            .collect();
        let mut jobs = Vec::with_capacity(samples.len());
        for (slot, sample) in &samples {
            if let Ok(header) = probe(sample.jpeg()) {
                jobs.push(Job { slot: *slot, jpeg: sample.jpeg(), header });
            }
        }
        let wait = common.meter.share().is_none();
        let start = Instant::now();
        let mut outcome = Batched::Refused;
        if jobs.len() == deferred.len() {
            outcome = common.engine.decode_batch(&mut self.worker, &tray.buffers, &jobs, wait)?;
        }
        let intact = |(_, sample): &(usize, Sample<'_>)| common.set.check(sample).is_ok();
        let again: Vec<usize> = match outcome {
            Batched::Done if samples.iter().all(intact) => {
                Counters::add(&common.counters.batched, jobs.len());
                if wait {
                    common.meter.batch(jobs.len(), start.elapsed());
                }
                Vec::new()
            }
            Batched::Done | Batched::Refused => {
                Counters::add(&common.counters.refused, 1);
                deferred.iter().map(|(slot, _)| *slot).collect()
            }
        };
        for slot in again {
            work.resettle(slot, &common.set, &common.options, |id| {
                self.guarded(tray, |hand| hand.sample(id, slot, work, tray, None))
            });
        }
        Ok(())
    }
}

/// A worker's counters and when the stage in work began.
struct Laps<'a> {
    stats: &'a WorkerStats,
    since: Mark,
}
