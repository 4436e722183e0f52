//! The loader of batches on a device: its options, its threads and their channels.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use thiserror::Error;

use super::batch::{DeviceBatch, Place, Tray, tray};
use super::batches_held;
use super::counts::{Counters, Counts};
use super::engine::Engine;
use super::share::{Meter, Share};
use super::worker::{Hand, Outcome, SUBMIT};
use crate::pipe::Pool;
use crate::pipeline::{
    DISPATCHER, Dispatcher, Judged, LoaderOptions, PipelineError, Rooms, Sequence, TASKS_MAX, Task,
};
use crate::slab::Layout;
use crate::stats::{Snapshot, Stats};
use crate::stream::ShardSet;

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
pub(super) struct Common<E: Engine> {
    pub(super) set: Arc<ShardSet>,
    pub(super) options: LoaderOptions,
    pub(super) engine: Arc<E>,
    pub(super) counters: Counters,
    pub(super) meter: Meter,
    /// Tells threads that wait for a remote shard, and hear no channel meanwhile.
    pub(super) ended: Arc<AtomicBool>,
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
