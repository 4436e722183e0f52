//! A thread with a decoder: a worker, or the submit thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};

use super::batch::{Place, Tray, lock};
use super::counts::Counters;
use super::engine::{Batched, By, Engine, Failure, Job, Way};
use super::loader::{Common, DeviceError};
use crate::decode::{DecodeError, probe};
use crate::pipeline::{Finished, SampleError, Task, Views, Work, touch};
use crate::stats::{Mark, Stage, WorkerStats};
use crate::stream::Sample;
use crate::trace::Recorder;
use crate::views::SamplePlan;

/// The name of the submit thread.
pub(super) const SUBMIT: &str = "detco-submit";

pub(super) type Outcome<E> = Result<Tray<E>, <E as Engine>::Error>;

/// One thread's decoder, made before the first sample.
pub(super) struct Hand<E: Engine> {
    common: Arc<Common<E>>,
    number: usize,
    worker: E::Worker,
    recorder: Option<Recorder>,
}

impl<E: Engine> Hand<E> {
    pub(super) fn new(
        common: &Arc<Common<E>>,
        number: usize,
        name: &str,
    ) -> Result<Hand<E>, DeviceError<E::Error>> {
        let worker = common.engine.worker(number).map_err(DeviceError::Engine)?;
        let recorder = common.options.trace.as_ref().map(|trace| trace.recorder(name.to_string()));
        Ok(Hand { common: Arc::clone(common), number, worker, recorder })
    }

    /// A worker's life.
    pub(super) fn work(
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
    pub(super) fn submit(
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
