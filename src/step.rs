//! One update of the model, in ten moves.
//!
//! Knows ranks only through [`Collective`]; a world of one takes the same path. The keys are made
//! before the queries (neither needs the other, and the key encoder follows the query encoder's
//! weights, which only move 9 changes): then a batch can be computed in micro-batches whose queries
//! all meet finished keys, and no query activation is held while keys are made.
//!
//! [`launch`] never waits for the device: whether the loss and the gradients are finite is decided
//! there, by a flag that every change of the state obeys, and what the step saw comes back as
//! [`Pending`], to be read when the next step is under way. [`update`] waits.

use tch::{Device, Kind, Tensor};
use thiserror::Error;

use crate::batch::Batch;
use crate::config::{CROPS, Config, PATCHES};
use crate::device::is_channels_last;
use crate::dist::local::Local;
use crate::dist::{Collective, DistError, Move};
use crate::loss::{Contrast, Embeddings, Pair, READINGS, Scale, Scores, contrast, score};
use crate::model::{Draws, Encoder, Model, Moments, Scope};
use crate::optim::Sgd;
use crate::shim::ShimError;
use crate::shim::step::{self as shim, Autocast, Download};

/// Why a step was not made.
#[derive(Debug, Error)]
pub enum StepError {
    /// Another number of samples than configured; queues and BN groups would not come out even.
    #[error("a batch of {found} samples on rank {rank} of {size}, expected {expected}")]
    Samples {
        /// Samples in the batch.
        found: i64,
        /// `train.batch` over the ranks.
        expected: i64,
        /// This rank.
        rank: usize,
        /// Ranks in the world.
        size: usize,
    },
    /// The BN groups cannot be shared out.
    #[error(
        "{groups} BN groups do not divide into {size} ranks of {accumulate} micro-batches: \
         change model.bn_splits or train.accumulate"
    )]
    Groups {
        /// `model.bn_splits`.
        groups: i64,
        /// Ranks in the world.
        size: usize,
        /// `train.accumulate`.
        accumulate: i64,
    },
    /// The batch has no pair of crops.
    #[error("the batch has no two views `crops`")]
    NoCrops,
    /// `model.local` is set and the batch has no patches.
    #[error("the model has local heads, the batch has no patches")]
    NoPatches,
    /// A collective failed.
    #[error(transparent)]
    Dist(#[from] DistError),
    /// libtorch failed: out of memory, or a device that went away.
    #[error(transparent)]
    Shim(#[from] ShimError),
}

/// Where in the run a step is.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Updates before this one, over the whole run: the address of the shuffle.
    pub step: u64,
    /// Learning rate of this update; at 0 it only fills the queues: no weight and no momentum
    /// changes.
    pub learning_rate: f64,
}

/// One of the loss's terms, averaged over the batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    /// Stage, 2 to 5.
    pub level: u8,
    /// Who met whom.
    pub pair: Pair,
    /// Cross-entropy, without the level's weight.
    pub loss: f64,
    /// Mean positive logit (divided by the temperature).
    pub positive_mean: f64,
    /// Mean negative logit.
    pub negative_mean: f64,
    /// Share of samples whose positive is above every negative.
    pub accuracy: f64,
}

/// How far the query embeddings of a level spread.
#[derive(Clone, Debug, PartialEq)]
pub struct Spread {
    /// Stage, 2 to 5.
    pub level: u8,
    /// Crops or patches.
    pub scope: Scope,
    /// Standard deviation over the batch of all ranks, averaged over the d coordinates; 1/sqrt(d) for
    /// directions spread evenly, 0 for a collapsed encoder.
    pub std: f64,
}

/// What one step saw, averaged over the ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Whether the update was made. If the loss or a gradient is not finite, it is not: weights,
    /// BN statistics, momentum and the keys in the queues are as before the step. Only the key encoder has
    /// moved: its EMA step comes first.
    pub applied: bool,
    /// The loss that was minimised: level weights times plain sums of the terms.
    pub loss: f64,
    /// Its terms, level by level, each gg, ll, gl; without patches gg alone.
    pub terms: Vec<Term>,
    /// Spread of the query embeddings: all levels of crops, then all of patches.
    pub embedding_std: Vec<Spread>,
    /// Euclidean length of all gradients together, before weight decay.
    pub gradient_norm: f64,
    /// Whether any rank was asked to stop before the ranks compared notes: all of them know after
    /// the same step.
    pub stop: bool,
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

/// [`update`], showing the terms with their logits to `watch`, once for each micro-batch.
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
    watch: &mut dyn FnMut(&[Contrast]),
) -> Result<StepReport, StepError> {
    let report = run(model, sgd, world, config, batch, at, Some(watch))?.wait()?;
    undo_if_refused(model, config, &report);
    Ok(report)
}

/// Gives the device one update to make and does not wait for it.
///
/// If [`Pending::wait`] says that the update was refused, the state is as [`StepReport::applied`] says, and the
/// queues' pointer has moved on, since the host does not wait: a caller that goes on takes it back
/// ([`crate::model::Queues::take_back`]), as [`update`] does.
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

/// Sees the terms of a micro-batch with their logits.
type Watch<'a> = &'a mut dyn FnMut(&[Contrast]);

fn run(
    model: &mut Model,
    sgd: &mut Sgd,
    world: &dyn Collective,
    config: &Config,
    batch: &Batch,
    at: At,
    mut watch: Option<Watch<'_>>,
) -> Result<Pending, StepError> {
    let cut = Cut::new(config, world, batch)?;
    let views = Views::of(batch, config.model.local)?;

    let now = |what| world.at(at.step + 1, what); // counted from 1, as in metrics

    now(Move::Follow);
    model.follow(config.loss.ema)?; // 1: the key encoder follows the query encoder
    now(Move::Shuffle);
    let shuffle = Shuffle::draw(config.seed, at.step, cut.samples, world, batch.device())?;
    let shuffled = views.key.map(|images| shuffle.send(world, images))?; // 2
    now(Move::Keys);
    let mut key_seen = Seen::default();
    let keys = tch::no_grad(|| cut.embed_all(&model.key, &shuffled, &mut key_seen))?; // 3
    now(Move::Unshuffle);
    let all_keys = shuffle.bring_back(world, &keys)?; // 4: every rank's, in the batch's order
    let keys = all_keys.narrow(world.rank() as i64 * cut.samples, cut.samples);

    sgd.zero_grad()?;
    let parameters: Vec<Tensor> = model.query.parameters().into_iter().map(|(_, p)| p).collect();
    let (mut seen, mut tally) = (Seen::default(), Tally::default());
    let (temperature, level_weights) = (config.loss.temperature, &config.loss.level_weights);
    let scale = Scale { temperature, level_weights, share: 1.0 / cut.parts as f64 };
    for part in 0..cut.parts {
        now(Move::Queries);
        let query = cut.embed(&model.query, &views.query, part, &mut seen)?; // 5
        let keys = keys.narrow(part * cut.rows, cut.rows);
        let values = query.detach();
        if let Some(watch) = &mut watch {
            tch::no_grad(|| watch(&contrast(&values, &keys, &model.queues, temperature)));
        }
        let scores = score(&values, &keys, &model.queues, scale); // 6
        let loss = with_gradients(&query, &scores.gradients);
        now(Move::Backward);
        if part + 1 < cut.parts {
            Local.backward(&loss, &[])?; // 7
        } else {
            world.backward(&loss, &parameters)?; // 7 and 8: averaged while backward goes on
        }
        tally.add(values, scores);
    }
    now(Move::Report);
    let (pending, applied) = tally.settle(world, config, sgd)?;
    now(Move::Update);
    if at.learning_rate > 0.0 {
        sgd.step(at.learning_rate, Some(&refusal(&applied)))?; // 9
    }
    let encoders = [&mut model.query, &mut model.key];
    settle(world, encoders, [&seen, &key_seen], &applied)?;
    model.queues.enqueue_if(&all_keys.global, &all_keys.local, &applied)?; // 10
    Ok(pending)
}

/// A scalar whose gradients with regard to the embeddings are these: what backward starts from.
fn with_gradients(query: &Embeddings, gradients: &Embeddings) -> Tensor {
    let dots = query.all().into_iter().zip(gradients.all()).map(|(q, g)| (q * g).sum(None));
    Tensor::stack(&dots.collect::<Vec<_>>(), 0).sum(None)
}

/// PyTorch's `found_inf` flag `[1]`: 1.0 skips the update.
fn refusal(applied: &Tensor) -> Tensor {
    applied.logical_not().to_kind(Kind::Float).reshape([1])
}

/// A pair of what exists for crops and perhaps for patches.
#[derive(Debug)]
struct Both<T> {
    global: T,
    local: Option<T>,
}

impl<T> Both<T> {
    fn map<U, E>(&self, mut f: impl FnMut(&T) -> Result<U, E>) -> Result<Both<U>, E> {
        Ok(Both { global: f(&self.global)?, local: self.local.as_ref().map(f).transpose()? })
    }
}

/// What each encoder sees.
#[derive(Debug)]
struct Views {
    query: Both<Tensor>,
    key: Both<Tensor>,
}

impl Views {
    fn of(batch: &Batch, local: bool) -> Result<Views, StepError> {
        let pair = |group| batch.views(group).filter(|views| views.len() == 2);
        let crops = pair(CROPS).ok_or(StepError::NoCrops)?;
        let patches = if local { Some(pair(PATCHES).ok_or(StepError::NoPatches)?) } else { None };
        let view = |i: usize| Both {
            global: crops[i].shallow_clone(),
            local: patches.map(|patches| patches[i].shallow_clone()),
        };
        Ok(Views { query: view(0), key: view(1) })
    }
}

/// How a rank's samples are cut into micro-batches of whole BN groups.
#[derive(Debug)]
struct Cut {
    /// Samples of this rank.
    samples: i64,
    /// Micro-batches.
    parts: i64,
    /// Samples of a micro-batch.
    rows: i64,
    /// BN groups of a micro-batch.
    groups: i64,
}

impl Cut {
    fn new(config: &Config, world: &dyn Collective, batch: &Batch) -> Result<Cut, StepError> {
        let (rank, size) = (world.rank(), world.size());
        let (found, expected) = (batch.len(), config.train.batch / size as i64);
        if found != expected || expected * size as i64 != config.train.batch {
            return Err(StepError::Samples { found, expected, rank, size });
        }
        let (groups, accumulate) = (config.model.bn_splits, config.train.accumulate);
        let shares = size as i64 * accumulate;
        if groups % shares != 0 || config.train.batch % groups != 0 {
            return Err(StepError::Groups { groups, size, accumulate });
        }
        let (rows, groups) = (found / accumulate, groups / shares);
        Ok(Cut { samples: found, parts: accumulate, rows, groups })
    }

    fn embed(
        &self,
        encoder: &Encoder,
        views: &Both<Tensor>,
        part: i64,
        seen: &mut Seen,
    ) -> Result<Embeddings, ShimError> {
        // Both scopes under one autocast: weights that learn are cast once. Those of the key encoder, which
        // autocast does not keep, are cast for each scope: 0.2 ms by their bytes.
        let _autocast =
            encoder.in_bf16().then(|| Autocast::enter(views.global.device())).transpose()?;
        let rows = |images: &Tensor| images.narrow(0, part * self.rows, self.rows);
        let global = rows(&views.global);
        let global = encoder.embed(&global, Scope::Global, self.groups, &mut seen.global)?;
        let local = views.local.as_ref().map(|patches| {
            encoder.embed(&rows(patches), Scope::Local, self.groups, &mut seen.local)
        });
        let local = local.transpose()?.unwrap_or_default();
        Ok(Embeddings { global, local })
    }

    /// All micro-batches, one after the other.
    fn embed_all(
        &self,
        encoder: &Encoder,
        views: &Both<Tensor>,
        seen: &mut Seen,
    ) -> Result<Embeddings, ShimError> {
        let parts = (0..self.parts).map(|part| self.embed(encoder, views, part, seen));
        let parts = parts.collect::<Result<Vec<Embeddings>, ShimError>>()?;
        let join = |of: fn(&Embeddings) -> &Vec<Tensor>| {
            (0..of(&parts[0]).len())
                .map(|i| Tensor::cat(&parts.iter().map(|p| &of(p)[i]).collect::<Vec<_>>(), 0))
                .collect()
        };
        Ok(Embeddings { global: join(|e| &e.global), local: join(|e| &e.local) })
    }
}

/// What batch normalisation saw in an encoder's two passes.
#[derive(Debug, Default)]
struct Seen {
    global: Moments,
    local: Moments,
}

impl Seen {
    fn both(&self) -> [&Moments; 2] {
        [&self.global, &self.local]
    }
}

/// Moves both encoders' running statistics towards what their passes saw on all ranks: the mean over all BN
/// groups. Ranks so have the same statistics after every step, whenever a checkpoint is written.
fn settle(
    world: &dyn Collective,
    encoders: [&mut Encoder; 2],
    seen: [&Seen; 2],
    applied: &Tensor,
) -> Result<(), StepError> {
    let passes = seen.iter().enumerate().flat_map(|(i, seen)| seen.both().map(|one| (i, one)));
    let found = passes.filter_map(|(i, pass)| Some(((i, pass), encoders[i].seen(pass)?)));
    let (whose, mut means): (Vec<(usize, &Moments)>, Vec<Tensor>) = found.unzip();
    world.average(&mut means)?; // one collective
    for ((i, pass), mean) in whose.into_iter().zip(means) {
        encoders[i].settle_if(pass, &mean, applied)?;
    }
    Ok(())
}

/// One permutation of the global batch: a sample's crop and its nine patches move together, to a
/// place in another BN group, perhaps on another rank. An image is sent to one rank alone.
#[derive(Debug)]
struct Shuffle {
    /// This rank's rows, ordered by the rank they go to and by their place there.
    leaving: Vec<i64>,
    /// How many go to each rank.
    send: Vec<i64>,
    /// How many come from each rank.
    receive: Vec<i64>,
    /// For each place of this rank, its row among those that have come.
    arrange: Vec<i64>,
    /// Where each sample of the global batch went.
    back: Tensor,
}

impl Shuffle {
    /// From seed and step alone, so that all ranks draw the same without a word.
    fn draw(
        seed: u64,
        step: u64,
        samples: i64,
        world: &dyn Collective,
        device: Device,
    ) -> Result<Shuffle, ShimError> {
        let order = permutation(seed, step, samples as usize * world.size());
        let mut back = vec![0_i64; order.len()];
        for (place, &sample) in order.iter().enumerate() {
            back[sample as usize] = place as i64;
        }
        let (mine, ranks) = (world.rank() as i64, 0..world.size() as i64);
        let count = |rows: &mut dyn Iterator<Item = bool>| rows.filter(|row| *row).count() as i64;
        // The samples whose key this rank makes, and the rank that each comes from.
        let here = &order[(mine * samples) as usize..((mine + 1) * samples) as usize];
        let receive: Vec<i64> = ranks
            .clone()
            .map(|rank| count(&mut here.iter().map(|sample| sample / samples == rank)))
            .collect();
        let places: Vec<i64> = (0..order.len() as i64)
            .filter(|place| order[*place as usize] / samples == mine)
            .collect();
        let send = ranks.map(|rank| count(&mut places.iter().map(|p| p / samples == rank)));
        let send = send.collect();
        let leaving = places.iter().map(|p| order[*p as usize] - mine * samples).collect();
        // They come rank by rank, those of one rank in the order of their places.
        let mut come = vec![0; receive.len()];
        let arrange = here
            .iter()
            .map(|sample| {
                let from = (sample / samples) as usize;
                come[from] += 1;
                receive[..from].iter().sum::<i64>() + come[from] - 1
            })
            .collect();
        let back = shim::upload(&Tensor::from_slice(&back), device)?;
        Ok(Shuffle { leaving, send, receive, arrange, back })
    }

    fn send(&self, world: &dyn Collective, images: &Tensor) -> Result<Tensor, StepError> {
        // Rows are picked as they lie in memory: what is picked otherwise comes out channels first.
        if is_channels_last(images) {
            let come = self.exchange(world, &images.movedim([-3], [-1]))?;
            return Ok(come.movedim([-1], [-3]));
        }
        self.exchange(world, images)
    }

    fn exchange(&self, world: &dyn Collective, rows: &Tensor) -> Result<Tensor, StepError> {
        let pick = |rows: &Tensor, index: &[i64]| -> Result<Tensor, StepError> {
            Ok(rows.index_select(0, &shim::upload(&Tensor::from_slice(index), rows.device())?))
        };
        let come = world.exchange(&pick(rows, &self.leaving)?, &self.send, &self.receive)?;
        // In a world of one they are in their places.
        if self.arrange.is_sorted() { Ok(come) } else { pick(&come, &self.arrange) }
    }

    /// Embeddings of all samples of all ranks, in the order of the batch; one collective for all
    /// levels and scopes.
    fn bring_back(
        &self,
        world: &dyn Collective,
        keys: &Embeddings,
    ) -> Result<Embeddings, DistError> {
        let side_by_side: Vec<&Tensor> = keys.global.iter().chain(&keys.local).collect();
        let all = world.gather(&Tensor::cat(&side_by_side, 1))?;
        let all = all.index_select(0, &self.back);
        let mut columns = all.split(keys.global[0].size()[1], 1);
        let local = columns.split_off(keys.global.len());
        Ok(Embeddings { global: columns, local })
    }
}

/// The order in which the key encoder sees the samples of a global batch at a step: place to
/// sample.
pub fn permutation(seed: u64, step: u64, samples: usize) -> Vec<i64> {
    Draws::new(seed, "shuffle", step).permutation(samples)
}

/// Collects readings on the device; they come to the host once a step.
#[derive(Debug, Default)]
struct Tally {
    /// `[terms, 4]` for each micro-batch.
    readings: Vec<Tensor>,
    queries: Vec<Embeddings>,
}

impl Tally {
    fn add(&mut self, query: Embeddings, scores: Scores) {
        self.readings.push(scores.readings);
        self.queries.push(query);
    }

    /// Mean, and mean square, of each coordinate of this rank's embeddings: `[2, d]` in float64, where their
    /// difference keeps the spread of embeddings that have all but collapsed.
    fn moments(&self, scope: Scope, index: usize) -> Tensor {
        let parts: Vec<&Tensor> =
            self.queries.iter().map(|query| &query.of(scope)[index]).collect();
        let all = Tensor::cat(&parts, 0).to_kind(Kind::Double);
        Tensor::stack(&[&all, &all.square()], 0).mean_dim(1, false, None)
    }

    /// What comes back to the host, and a truth value on the device: whether all losses and the
    /// gradients are finite, on all ranks.
    fn settle(
        &self,
        world: &dyn Collective,
        config: &Config,
        sgd: &Sgd,
    ) -> Result<(Pending, Tensor), StepError> {
        let local = config.model.local;
        let scopes: &[Scope] =
            if local { &[Scope::Global, Scope::Local] } else { &[Scope::Global] };
        let levels = 0..config.model.levels.len();
        let which = |scope: &Scope| levels.clone().map(|index| (*scope, index)).collect::<Vec<_>>();
        let spreads: Vec<(Scope, usize)> = scopes.iter().flat_map(which).collect();
        let length = sgd.gradient_norm()?.to_kind(Kind::Double);
        let mut means = tch::no_grad(|| {
            let terms = Tensor::stack(&self.readings, 0).mean_dim(0, false, None);
            let moments: Vec<Tensor> =
                spreads.iter().map(|(scope, index)| self.moments(*scope, *index)).collect();
            let stop = if world.is_asked_to_stop() { 1.0 } else { 0.0 };
            let rest = Tensor::stack(&[length.full_like(stop), length], 0);
            [terms.flatten(0, -1).to_kind(Kind::Double), Tensor::stack(&moments, 0), rest]
        });
        world.average(&mut means)?; // one collective
        let [terms, moments, rest] = means;
        let (readings, applied) = tch::no_grad(|| {
            let losses = terms.view([-1, READINGS as i64]).select(1, 0);
            let applied = Tensor::cat(&[losses, rest.narrow(0, 1, 1)], 0).isfinite().all();
            (Tensor::cat(&[&terms, &spread(&moments), &rest], 0), applied)
        });
        let pending = Pending {
            readings: Download::begin(&readings)?,
            pairs: Pair::all(local),
            levels: config.model.levels.clone(),
            level_weights: config.loss.level_weights.clone(),
            spreads,
        };
        Ok((pending, applied))
    }
}

/// Standard deviation over the batch of all ranks, averaged over the coordinates: `[levels]` of means and mean
/// squares `[levels, 2, d]`.
fn spread(moments: &Tensor) -> Tensor {
    let (mean, square) = (moments.select(1, 0), moments.select(1, 1));
    (square - mean.square()).clamp_min(0.0).sqrt().mean_dim(1, false, None)
}

/// What a step saw, on its way to the host.
#[derive(Debug)]
#[must_use = "whether the update was made is read by `wait`"]
pub struct Pending {
    readings: Download,
    pairs: &'static [Pair],
    levels: Vec<u8>,
    level_weights: Vec<f64>,
    spreads: Vec<(Scope, usize)>,
}

impl Pending {
    /// Waits until the device has made the update.
    ///
    /// # Errors
    /// When the device failed.
    pub fn wait(self) -> Result<StepReport, StepError> {
        let (pairs, levels) = (self.pairs, &self.levels);
        let host = Vec::<f64>::try_from(self.readings.wait()?)
            .expect("a vector of doubles on the host converts");
        let (of_terms, rest) = host.split_at(levels.len() * pairs.len() * READINGS);
        let names = levels.iter().flat_map(|level| pairs.iter().map(move |pair| (*level, *pair)));
        let term = |((level, pair), four): ((u8, Pair), &[f64])| Term {
            level,
            pair,
            loss: four[0],
            positive_mean: four[1],
            negative_mean: four[2],
            accuracy: four[3],
        };
        let terms: Vec<Term> = names.zip(of_terms.chunks_exact(READINGS)).map(term).collect();
        let weighted = terms.chunks(pairs.len()).zip(&self.level_weights);
        let loss = weighted
            .flat_map(|(terms, weight)| terms.iter().map(move |term| weight * term.loss))
            .sum();
        let embedding_std = self
            .spreads
            .iter()
            .zip(rest)
            .map(|(&(scope, index), &std)| Spread { level: levels[index], scope, std })
            .collect();
        let (stop, gradient_norm) = (rest[rest.len() - 2] > 0.0, rest[rest.len() - 1]);
        let applied = terms.iter().all(|term| term.loss.is_finite()) && gradient_norm.is_finite();
        Ok(StepReport { applied, loss, terms, embedding_std, gradient_norm, stop })
    }
}
