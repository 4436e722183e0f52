//! The sequence of batches: brings finished ones into the order of the run and applies the policy on bad samples.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::errors::describe;
use super::filled::{Class, Holders, Holding};
use super::{BadSample, LoaderOptions, OnBadSample, PipelineError, SampleError, bad_budget};
use crate::order::Cursor;
use crate::stats::Stats;
use crate::stream::{Sample, ShardSet};

/// Tries at a substitute before a slot fails: with half of the data bad, one slot in 65,536 does.
const SUBSTITUTES_MAX: u32 = 16;

/// How long to wait for a consumer that holds all batches, since another thread may be about to drop one:
/// longer than any step on a GPU and most on a CPU.
const PATIENCE: Duration = Duration::from_secs(30);

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
    /// A batch to be made, of these samples from slot `first_slot` of the global batch on. With `labels` it keeps
    /// the class of each.
    pub(super) fn new(
        cursor: Cursor,
        number: u64,
        first_slot: u64,
        samples: Vec<u64>,
        labels: bool,
    ) -> Work {
        let faults = Mutex::new(Vec::new());
        let classes = if labels { samples.len() } else { 0 };
        let classes = Mutex::new(vec![Ok(None); classes]);
        Work { cursor, number, first_slot, samples, faults, classes }
    }

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
