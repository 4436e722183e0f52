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

mod dispatcher;
mod errors;
mod filled;
mod options;
mod sequence;
mod views;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};

use crate::pipe::Pool;
use crate::slab::{Layout, Slab, Slot};
use crate::stats::{Snapshot, Stats};
use crate::stream::ShardSet;

pub(crate) use dispatcher::{DISPATCHER, Dispatcher, Room, Rooms, Task};
pub use errors::{BadSample, OnBadSample, PipelineError, SampleError, bad_budget};
pub use filled::Filled;
pub(crate) use filled::{Class, Holding, labels};
pub use options::LoaderOptions;
pub(crate) use sequence::{Finished, Judged, Sequence, Work};
pub use views::Views;
pub(crate) use views::touch;

use worker::Worker;

/// Samples handed out ahead of the workers, which is also the read-ahead: some 25 MB of ImageNet, so the disk
/// works while the workers do, and a slow sample never empties the channel.
pub const TASKS_MAX: usize = 256;

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

impl Drop for Loader {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // What is queued is for nobody: workers need not make it before they end.
        while self.tasks.try_recv().is_ok() {}
        self.set.want(Vec::new(), 0);
    }
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
