//! One update of the model, in ten moves.
//!
//! Knows ranks only through [`Collective`], a world of one takes the same path, and knows no method but by
//! what [`Method`](crate::method::Method) says. The teacher's outputs (keys) are made before the student's
//! (queries): neither needs the other, and the key encoder follows the query encoder's weights, which only
//! move 9 changes. Then a batch can be computed in micro-batches whose queries all meet finished keys, and
//! no query activation is held while keys are made.
//!
//! [`launch`] never waits for the device: whether the loss and the gradients are finite is decided
//! there, by a flag that every change of the state obeys, and what the step saw comes back as
//! [`Pending`], to be read when the next step is under way. [`update`] waits.

use tch::{Kind, Tensor};

use crate::batch::Batch;
use crate::config::Config;
use crate::dist::local::Local;
use crate::dist::{Collective, Move};
use crate::method::parts::shuffle::Shuffle;
use crate::method::{Design, Met, Seen};
use crate::micro::{Coupled, Cut, settle};
use crate::model::Model;
use crate::optim::Sgd;
use crate::report::Tally;

pub use crate::method::StepError;
pub use crate::method::parts::shuffle::permutation;
pub use crate::report::{Pending, Spread, StepReport, Term};

/// Where in the run a step is.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Updates before this one, over the whole run: the address of the shuffle.
    pub step: u64,
    /// Learning rate of this update; at 0 it only fills the queues: no weight and no momentum
    /// changes.
    pub learning_rate: f64,
}

/// Makes one update and waits for what it saw.
///
/// # Errors
/// When the batch does not fit the config, or a collective fails.
pub fn update(
    model: &mut Model,
    sgd: &mut Sgd,
    world: &dyn Collective,
    config: &Config,
    batch: &Batch,
    at: At,
) -> Result<StepReport, StepError> {
    let report = launch(model, sgd, world, config, batch, at)?.wait()?;
    undo_if_refused(model, config, &report);
    Ok(report)
}

/// Sees logits by their terms' names, once for each micro-batch.
pub type Watch<'a> = &'a mut dyn FnMut(&[(String, Tensor)]);

/// [`update`], showing the [logits](crate::method::Method::logits) to `watch`, once for each micro-batch.
///
/// # Errors
/// As [`update`].
pub fn update_watched(
    model: &mut Model,
    sgd: &mut Sgd,
    world: &dyn Collective,
    config: &Config,
    batch: &Batch,
    at: At,
    watch: Watch<'_>,
) -> Result<StepReport, StepError> {
    let report = run(model, sgd, world, config, batch, at, Some(watch))?.wait()?;
    undo_if_refused(model, config, &report);
    Ok(report)
}

/// Gives the device one update to make and does not wait for it.
///
/// If [`Pending::wait`] says that the update was refused, the state is as [`StepReport::applied`] says, and the
/// queues' pointer has moved on, since the host does not wait: a caller that goes on takes it back
/// ([`crate::method::Queues::take_back`]), as [`update`] does.
///
/// # Errors
/// As [`update`].
pub fn launch(
    model: &mut Model,
    sgd: &mut Sgd,
    world: &dyn Collective,
    config: &Config,
    batch: &Batch,
    at: At,
) -> Result<Pending, StepError> {
    run(model, sgd, world, config, batch, at, None)
}

fn undo_if_refused(model: &mut Model, config: &Config, report: &StepReport) {
    if !report.applied {
        model.queues.take_back(config.train.batch);
    }
}

fn run(
    model: &mut Model,
    sgd: &mut Sgd,
    world: &dyn Collective,
    config: &Config,
    batch: &Batch,
    at: At,
    mut watch: Option<Watch<'_>>,
) -> Result<Pending, StepError> {
    let (method, mut design) = (config.method.trained(), model.design.clone());
    config.method.weigh(at.step, &mut design.terms);
    let cut = Cut::new(&design, config, world, batch)?;
    let seen = method.student(batch)?;
    let now = |what| world.at(at.step + 1, what); // counted from 1, as in metrics
    let (mut of_query, mut of_key) = (cut.statistics(), cut.statistics());

    let named = model.query.parameters();
    let weights: Vec<(String, Tensor)> =
        named.iter().map(|(name, weight)| (name.clone(), weight.detach())).collect();
    let parameters: Vec<Tensor> = named.into_iter().map(|(_, p)| p).collect();
    tch::no_grad(|| method.before(&weights))?;

    let mut keys = Keys::default();
    if let (Some(teacher), Some(_)) = (design.teacher, &model.key) {
        let of_teacher = method.teacher(batch)?;
        now(Move::Follow);
        model.follow(teacher.ema)?; // 1: the key encoder follows the query encoder
        now(Move::Shuffle);
        let draw = || Shuffle::draw(config.seed, at.step, cut.samples, world, batch.device());
        let shuffle = teacher.shuffles.then(draw).transpose()?;
        let send = |images: &Tensor| match &shuffle {
            Some(shuffle) => shuffle.send(world, images), // 2
            None => Ok(images.shallow_clone()),
        };
        let images = of_teacher.images.iter().map(send).collect::<Result<_, _>>()?;
        let shuffled = Seen { images, labels: None };
        now(Move::Keys);
        let encoder = model.key.as_ref();
        let made = || encoder.map(|key| cut.embed_all(key, &shuffled, &mut of_key)).transpose();
        let made = tch::no_grad(made)?.unwrap_or_default(); // 3
        now(Move::Unshuffle);
        keys = Keys::bring_back(world, &design, shuffle.as_ref(), made, cut.samples)?; // 4
    }

    sgd.zero_grad()?;
    let mut tally = Tally::default();
    let mut coupled = Coupled::default();
    let met = |share| Met {
        step: at.step,
        outputs: &[],
        all: &[],
        weights: &weights,
        rank: world.rank() as i64,
        labels: None,
        targets: &[],
        queues: &model.queues,
        share,
    };
    if design.is_coupled {
        now(Move::Queries);
        coupled = Coupled::look(&cut, &model.query, &seen, &mut of_query, world)?;
        let rest = Met { targets: &keys.own, ..met(1.0) };
        let scores = method.score(&coupled.met(&seen, world, rest));
        coupled.gradients = Some(tally.read(scores));
    }
    for part in 0..cut.parts {
        now(Move::Queries);
        let query = match coupled.held.take() {
            Some(query) => query,
            None => cut.embed(&model.query, &seen, part, &mut of_query)?, // 5
        };
        let outputs: Vec<Tensor> = query.iter().map(Tensor::detach).collect();
        let labels = seen.labels.as_ref().map(|labels| cut.share_of(labels, part));
        let (labels, targets) = (labels.as_ref(), &cut.share(&keys.own, part));
        let met = Met { outputs: &outputs, labels, targets, ..met(1.0 / cut.parts as f64) };
        if let Some(watch) = &mut watch {
            tch::no_grad(|| watch(&method.logits(&met)));
        }
        let gradients = match &coupled.gradients {
            Some(gradients) => cut.share(gradients, part),
            None => tally.read(method.score(&met)), // 6
        };
        tally.add(&design, &outputs);
        drop(outputs);
        let scored = design.outputs().zip(query).filter(|(head, _)| head.is_scored);
        let loss = with_gradients(scored.map(|(_, output)| output), &gradients);
        now(Move::Backward);
        if part + 1 < cut.parts {
            Local.backward(&loss, &[])?; // 7
        } else {
            world.backward(&loss, &parameters)?; // 7 and 8: averaged while backward goes on
        }
    }
    if let Some(frozen) = design.frozen.as_ref().filter(|frozen| at.step < frozen.updates) {
        sgd.forget(|name| name.split('.').next() == Some(frozen.label))?;
    }
    now(Move::Report);
    let (pending, applied) = tally.settle(world, &design, sgd)?;
    now(Move::Update);
    if at.learning_rate > 0.0 {
        sgd.step(at.learning_rate, Some(&refusal(&applied)))?; // 9
    }
    settle(world, model, &[of_query, of_key], &applied)?;
    let gathered = if design.teacher.is_some() { keys.gathered } else { coupled.into_gathered() };
    method.after(&mut model.queues, &gathered, &applied)?; // 10
    Ok(pending)
}

/// The teacher's outputs.
#[derive(Debug, Default)]
struct Keys {
    /// All of them, of this rank's samples.
    own: Vec<Tensor>,
    /// Of the heads whose outputs are gathered, those of all ranks in the batch's order.
    gathered: Vec<Tensor>,
}

impl Keys {
    /// From the ranks that have made them.
    fn bring_back(
        world: &dyn Collective,
        design: &Design,
        shuffle: Option<&Shuffle>,
        made: Vec<Tensor>,
        samples: i64,
    ) -> Result<Keys, StepError> {
        let is_gathered: Vec<bool> = design.targets().map(|head| head.is_gathered).collect();
        let of = |gathered: bool| -> Vec<Tensor> {
            let all = made.iter().zip(&is_gathered).filter(|(_, is)| **is == gathered);
            all.map(|(output, _)| output.shallow_clone()).collect()
        };
        let (all, rest) = (of(true), of(false));
        let Some(shuffle) = shuffle else {
            let gathered = all.iter().map(|output| world.gather(output));
            return Ok(Keys { gathered: gathered.collect::<Result<_, _>>()?, own: made });
        };
        let home = if rest.is_empty() { rest } else { shuffle.send_home(world, &rest)? };
        let gathered = if all.is_empty() { all } else { shuffle.bring_back(world, &all)? };
        let mine = world.rank() as i64 * samples;
        let narrowed: Vec<Tensor> =
            gathered.iter().map(|output| output.narrow(0, mine, samples)).collect();
        let (mut narrowed, mut home) = (narrowed.into_iter(), home.into_iter());
        let own =
            is_gathered.iter().filter_map(|is| if *is { narrowed.next() } else { home.next() });
        Ok(Keys { own: own.collect(), gathered })
    }
}

/// A scalar whose gradients with regard to the outputs are these: what backward starts from.
fn with_gradients(outputs: impl Iterator<Item = Tensor>, gradients: &[Tensor]) -> Tensor {
    let dots = outputs.zip(gradients).map(|(output, gradient)| (output * gradient).sum(None));
    Tensor::stack(&dots.collect::<Vec<_>>(), 0).sum(None)
}

/// PyTorch's `found_inf` flag `[1]`: 1.0 skips the update.
fn refusal(applied: &Tensor) -> Tensor {
    applied.logical_not().to_kind(Kind::Float).reshape([1])
}
