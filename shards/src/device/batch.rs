//! Batches on a device, and the buffers that circulate between threads and consumer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam::channel::Sender;

use super::engine::{Engine, Pointers};
use super::loader::DeviceError;
#[cfg(feature = "nvjpeg")]
use crate::cuda::{CudaError, Stream};
use crate::format::ShardError;
use crate::order::Cursor;
use crate::pipeline::{BadSample, Class, Holding, Room, labels};
use crate::slab::Layout;
use crate::stats::Stats;
use crate::views::{Note, SamplePlan};

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
    pub(super) classes: Vec<Class>,
    pub(super) layout: Layout,
    pub(super) tray: Option<Tray<E>>,
    pub(super) free: Sender<Tray<E>>,
    pub(super) stats: Arc<Stats>,
    pub(super) _holding: Option<Holding>,
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
pub(super) struct Tray<E: Engine> {
    engine: Arc<E>,
    pub(super) buffers: E::Buffers,
    /// By slot: what is to be rendered. Locked by one worker at a time, so never waited for.
    pub(super) plans: Vec<Mutex<SamplePlan>>,
    /// Slots left to the batch decoder, with the sample that is in each.
    pub(super) deferred: Mutex<Vec<(usize, u64)>>,
    /// The first of what made the device fail.
    pub(super) failed: Mutex<Option<E::Error>>,
}

pub(super) fn tray<E: Engine>(
    engine: &Arc<E>,
    layout: &Layout,
    threads: usize,
) -> Result<Tray<E>, DeviceError<E::Error>> {
    let (n, buffers) = (layout.n(), engine.buffers(layout, threads).map_err(DeviceError::Engine)?);
    let plans = (0..n).map(|_| Mutex::new(SamplePlan::default())).collect();
    let (deferred, failed) = (Mutex::new(Vec::with_capacity(n)), Mutex::new(None));
    Ok(Tray { engine: Arc::clone(engine), buffers, plans, deferred, failed })
}

impl<E: Engine> Tray<E> {
    pub(super) fn fail(&self, error: E::Error) {
        lock(&self.failed).get_or_insert(error);
    }
}

/// The right to fill one slot of a tray.
#[derive(Debug)]
pub(super) struct Place<E: Engine>(pub(super) Arc<Tray<E>>);

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

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a worker is caught and judged; what it left behind is overwritten.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
