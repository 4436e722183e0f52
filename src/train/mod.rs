//! The training loop, one screen; the only place that knows everything.
//!
//! A run is a folder. [`train`] opens it (new, or where its last checkpoint left off), then repeats:
//! take a batch, make an update, write down what it saw, save when due. On CPUs a run that was killed
//! or stopped and resumed on as many ranks has the same losses and weights, bit for bit, as one that was not.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use detco_shards::order::{Cursor, Order};
use detco_shards::pipeline::PipelineError;
use detco_shards::stream::ShardSet;
use tch::Tensor;

use self::plan::Plan;
use self::process::listen;
use self::rates::Window;
use self::samples::{QUARANTINE, file_of};
use self::save::Due;
use self::world::{Entrance, World};
use crate::config::{Config, ConfigError};
use crate::console::plural;
use crate::device::Found;
use crate::dist::rendezvous::Rendezvous;
use crate::dist::{self, Move};
use crate::feed::{self, Fed, Feed, Wait};
use crate::metrics::{Metrics, Progress};
use crate::model::{Encoder, Model};
use crate::optim::Sgd;
use crate::schedule::{ema, learning_rate};
use crate::shim::panics::caught;
use crate::source::{Source, SourceError, Starter, Taken, who_decoded};
use crate::step::{self, At, Pending};

mod error;
mod knn;
mod open;
mod plan;
mod process;
mod rates;
mod resume;
mod samples;
mod save;
mod world;

pub use error::TrainError;
pub(crate) use knn::Monitor;
pub(crate) use open::start_from;
pub(crate) use process::{config_of_rank, device};
pub(crate) use save::check_room;

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

/// Trains until the end, a signal, or an error; with the ranks that have come to `rendezvous`.
pub fn train(start: Start, rendezvous: Option<Rendezvous>) -> Result<Outcome, TrainError> {
    train_from(start, rendezvous, &|config, found| Ok(feed::decoding(config, found)?.into()))
}

/// Says who decodes for a run of this config on this device.
pub type Decoder<'a> = &'a dyn Fn(&Config, &Found) -> Result<Starter, ConfigError>;

/// As [`train`], with batches from whom `decoder` names. For tests: no GPU is needed to train from
/// the twin of one.
#[doc(hidden)]
pub fn train_from(
    start: Start,
    rendezvous: Option<Rendezvous>,
    decoder: Decoder<'_>,
) -> Result<Outcome, TrainError> {
    let tell = |error: &TrainError| {
        if let Some(rendezvous) = &rendezvous {
            rendezvous.fail(&error.to_string());
        }
    };
    let plan = Plan::make(start, rendezvous.as_ref()).inspect_err(tell)?;
    // Not before: a signal ends a process at once that still waits for a server or for other ranks.
    let stop = listen().inspect_err(tell)?;
    let mut entrance = Entrance { rendezvous, world: None };
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

/// An update that the device has been given, and where the run stood after it.
struct UnderWay {
    pending: Pending,
    /// How long its batch was waited for.
    wait: Wait,
    step: u64,
    epoch: u32,
    learning_rate: f64,
}

impl Run {
    fn is_finished(&self) -> bool {
        let most = self.config.train.steps_max;
        self.cursor.epoch >= self.config.train.epochs || (most > 0 && self.step >= most)
    }

    fn at_epoch_end(&self) -> bool {
        self.cursor.step == 0
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

    /// What to do with a run that has ended and is to go on.
    fn how_to_go_on(&self) -> String {
        if self.cursor.epoch < self.config.train.epochs {
            let most = self.config.train.steps_max;
            return format!("train.steps_max = {most} ended it: --set train.steps_max=N goes on");
        }
        let epochs = plural(u64::from(self.config.train.epochs), "epoch");
        let run = self.folder.display();
        format!(
            "its learning rate has come to the end of {epochs}. To train on from its backbone, \
             start a new run: --init {run} --out NEW --set train.epochs=N"
        )
    }
}
