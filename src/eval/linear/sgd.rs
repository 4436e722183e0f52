//! Classifiers trained by SGD on augmented images: all learning rates and levels on one pass of the backbone.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use detco_shards::order::{Cursor, Order};
use detco_shards::pipeline::{Filled, Loader, LoaderOptions};
use detco_shards::stream::ShardSet;
use detco_shards::views::{IMAGE, Recipe, STD, Step, Steps};
use sha2::{Digest as _, Sha256};
use tch::{Kind, Tensor};

use super::heads::{Heads, Training};
use super::{
    LinearError, LinearOptions, Numbering, Outcome, Sets, Tried, Watch, check_finite, hits,
    percent, state,
};
use crate::batch;
use crate::draws::Draws;
use crate::eval::features::{self, FeaturesError, Passed, class_of, device_of, place_of};
use crate::model::Encoder;

/// Samples that go through the network together where nothing is trained.
const BATCH: u64 = 128;
/// Of this many training samples one is held out to choose the learning rate.
const HELD_OUT: u64 = 20;
/// Rows of the test set that are held rather than made anew: up to this many bytes.
const HELD_BYTES_MAX: u64 = 4 << 30;

/// SGD on augmented images.
#[derive(Clone, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rates for a batch of 256, one classifier each; they are scaled by the batch.
    pub rates: Vec<f64>,
    /// Samples of an update.
    pub batch: u64,
    /// Passes over the training set.
    pub epochs: u32,
    /// Epochs after which the rates are divided by ten.
    pub milestones: Vec<u32>,
    /// Whether the momentum of 0.9 is Nesterov's.
    pub nesterov: bool,
    /// Weight decay.
    pub weight_decay: f64,
    /// Whether rows are batch-normalised before the classifiers, without weights.
    pub norm: bool,
    /// Whether colours are changed: jitter of 0.4 in brightness, contrast and saturation, and AlexNet's lighting.
    pub colours: bool,
    /// Whether the test set is measured after each epoch, or only at the end.
    pub each_epoch: bool,
    /// Folder of a file that the evaluation goes on from when it was broken off.
    pub state: Option<PathBuf>,
}

/// Standard deviation of lighting's draws, and the colours' covariance: eigenvalues and vectors on values of 0 to 1
/// (Krizhevsky et al., 2012, section 4.1; the numbers that OpenSelfSup's probe of levels uses).
const LIGHTING: f64 = 0.1;
const LIGHTING_VALUES: [f32; 3] = [0.2175, 0.0188, 0.0045];
const LIGHTING_VECTORS: [[f32; 3]; 3] =
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]];

impl Sgd {
    /// The training views: torchvision's `RandomResizedCrop` and flip, and colours.
    fn recipe(&self, size: u32) -> Recipe {
        let mut recipe = Recipe::supervised(size);
        if let (true, Some(Steps::Own(steps))) =
            (self.colours, recipe.group_mut(IMAGE).map(|group| &mut group.steps))
        {
            let [brightness, contrast, saturation] = [0.4; 3];
            steps.push(Step::Jitter { p: 1.0, brightness, contrast, saturation, hue: 0.0 });
        }
        recipe
    }

    fn factor(&self, epoch: u32) -> f64 {
        0.1_f64.powi(self.milestones.iter().filter(|at| epoch >= **at).count() as i32)
    }
}

/// Lighting's offset of each image, `[n, 3, 1, 1]`, in normalised values. Summed here and not by a matrix product, whose
/// rounding depends on how many images there are: an image's offset is its own in any batch.
fn lighting(seed: u64, epoch: u32, samples: &[u64]) -> Result<Tensor, tch::TchError> {
    let name = format!("lighting {epoch}");
    let mut offsets = Vec::with_capacity(3 * samples.len());
    for id in samples {
        let drawn = Vec::<f32>::try_from(Draws::new(seed, &name, *id).normal(&[3], LIGHTING))?;
        for (vector, std) in LIGHTING_VECTORS.iter().zip(STD) {
            let parts = vector.iter().zip(LIGHTING_VALUES).zip(&drawn);
            offsets.push(parts.map(|((v, value), draw)| v * value * draw).sum::<f32>() / std);
        }
    }
    Tensor::from_slice(&offsets).f_view([samples.len() as i64, 3, 1, 1])
}

/// What has been reached at one level.
pub(super) struct Level {
    pub(super) level: u8,
    pub(super) heads: Heads,
    /// Of each learning rate the last batch's loss.
    pub(super) losses: Vec<f64>,
    /// Of each learning rate the best top-1, and after which epoch; 0 for none yet.
    pub(super) best: Vec<(f64, u32)>,
}

struct Probe<'a> {
    encoder: &'a Encoder,
    sets: &'a Sets,
    options: &'a LinearOptions,
    how: &'a Sgd,
    numbering: Numbering,
    held_out: HashSet<u64>,
    held_order: Option<Order>,
    test_order: Order,
    /// The test set's rows, where they are held.
    test: Option<Vec<Tensor>>,
    test_classes: Vec<i64>,
}

pub(super) fn run(
    encoder: &Encoder,
    sets: &Sets,
    options: &LinearOptions,
    how: &Sgd,
    watch: Watch<'_>,
) -> Result<Vec<Outcome>, LinearError> {
    let mut probe = Probe::new(encoder, sets, options, how)?;
    let n = sets.train.len();
    let order = Order::shuffled(n, how.batch.min(n), options.seed)
        .map_err(|source| LinearError::Order { which: "train", source })?;
    let steps = order.steps_per_epoch();
    let mut levels = probe.levels()?;
    let key = probe.key()?;
    let file = how.state.as_deref().map(|folder| folder.join("linear.safetensors"));
    let finished = match &file {
        Some(file) => state::restore(file, &key, &mut levels)?,
        None => 0,
    };
    let total = steps * u64::from(how.epochs);
    let loading = LoaderOptions {
        labels: true,
        workers: options.look.workers,
        start: Cursor { epoch: finished, step: 0 },
        ..LoaderOptions::train(how.recipe(options.look.size), order, options.seed, how.epochs)
    };
    let loader = (finished < how.epochs).then(|| Loader::start(Arc::clone(&sets.train), loading));
    for filled in loader.transpose()?.into_iter().flatten() {
        let filled = filled?;
        let Cursor { epoch, step } = filled.cursor;
        probe.update(&filled, &mut levels)?;
        let done = u64::from(epoch) * steps + step + 1;
        watch("updates", done, total);
        if done == total.div_ceil(100) {
            probe.warn_of_rates(&levels);
        }
        if step + 1 < steps {
            continue;
        }
        if how.each_epoch {
            probe.measure_epoch(&mut levels, epoch + 1)?;
        }
        if let Some(file) = &file {
            state::save(file, &key, epoch + 1, &levels)?;
        }
    }
    probe.finish(levels, watch)
}

impl<'a> Probe<'a> {
    fn new(
        encoder: &'a Encoder,
        sets: &'a Sets,
        options: &'a LinearOptions,
        how: &'a Sgd,
    ) -> Result<Probe<'a>, LinearError> {
        let train = |source| LinearError::Order { which: "train", source };
        let n = sets.train.len();
        let chooses = how.rates.len() > 1;
        if chooses && n < HELD_OUT {
            let samples = n as usize;
            return Err(LinearError::Few { samples, one_in: HELD_OUT, what: "learning rates" });
        }
        let held_order =
            chooses.then(|| Order::spaced(n, n / HELD_OUT, BATCH)).transpose().map_err(train)?;
        let ids = |order: &Order| -> HashSet<u64> {
            let (epoch, steps) = (order.epoch(0), order.steps_per_epoch());
            let of = |step| (0..order.len(step)).map(move |slot| (step, slot));
            (0..steps).flat_map(of).map(|(step, slot)| epoch.sample(step, slot)).collect()
        };
        let held_out = held_order.as_ref().map(ids).unwrap_or_default();
        let test_order = Order::sequential(sets.test.len(), BATCH)
            .map_err(|source| LinearError::Order { which: "test", source })?;
        let numbering =
            Numbering::of(classes_of(&sets.train)?.into_iter().map(|c| sets.classes.of_train(c)))?;
        Ok(Probe {
            encoder,
            sets,
            options,
            how,
            numbering,
            held_out,
            held_order,
            test_order,
            test: None,
            test_classes: Vec::new(),
        })
    }

    /// Classifiers as they begin.
    fn levels(&self) -> Result<Vec<Level>, LinearError> {
        let device = device_of(self.encoder);
        let (channels, size) = (3, i64::from(self.options.look.size));
        let black = Tensor::f_zeros([1, channels, size, size], (Kind::Float, device))?;
        let maps = self.encoder.maps(&black)?;
        let scale = self.how.batch as f64 / 256.0;
        let make = |level: &u8| {
            let width = self.options.pool.rows(&maps[usize::from(*level) - 2])?.size()[1];
            let training = Training {
                rates: self.how.rates.iter().map(|rate| rate * scale).collect(),
                momentum: 0.9,
                nesterov: self.how.nesterov,
                weight_decay: self.how.weight_decay,
                norm: self.how.norm,
            };
            let (seed, name) = (self.options.seed, format!("linear res{level}"));
            let shape = (self.numbering.len(), width);
            let heads = Heads::draw(training, shape, (seed, &name), (Kind::Float, device))?;
            Ok(Level {
                level: *level,
                heads,
                losses: Vec::new(),
                best: vec![(0.0, 0); self.how.rates.len()],
            })
        };
        self.options.levels.iter().map(make).collect()
    }

    /// One update of all classifiers.
    fn update(&self, filled: &Filled, levels: &mut [Level]) -> Result<(), LinearError> {
        let device = device_of(self.encoder);
        let labels = filled.labels()?;
        let (mut at, mut classes) = (Vec::new(), Vec::new());
        for ((slot, id), class) in (0_i64..).zip(&filled.samples).zip(labels) {
            let class = class_of(&self.sets.train, "train", *id, class)?;
            if !self.held_out.contains(id) {
                at.push(slot);
                let place = self.numbering.place(self.sets.classes.of_train(class));
                if place < 0 {
                    let (shard, key) = place_of(&self.sets.train, *id);
                    return Err(LinearError::Class {
                        shard,
                        key,
                        class,
                        count: self.numbering.len(),
                    });
                }
                classes.push(place);
            }
        }
        if at.is_empty() {
            return Ok(());
        }
        let edge = self.options.look.size as usize;
        let images = batch::images(filled.view(IMAGE, 0), filled.len(), edge, device);
        let mut images = images.map_err(FeaturesError::from)?;
        if self.how.colours {
            let offsets = lighting(self.options.seed, filled.cursor.epoch, &filled.samples)?;
            images = images.f_add(&offsets.f_to_device(device)?)?;
        }
        if at.len() < filled.len() {
            images = images.f_index_select(0, &Tensor::from_slice(&at).f_to_device(device)?)?;
        }
        let classes = Tensor::from_slice(&classes).f_to_device(device)?;
        let top = self.options.levels.iter().copied().max().unwrap_or(5);
        let maps = self.encoder.maps_up_to(&images, top)?;
        let factor = self.how.factor(filled.cursor.epoch);
        for level in levels {
            let rows = self.options.pool.rows(&maps[usize::from(level.level) - 2])?;
            if level.losses.is_empty() {
                check_finite(&rows, level.level, "train")?;
            }
            level.losses = level.heads.step(&rows, &classes, factor)?;
        }
        Ok(())
    }

    fn warn_of_rates(&self, levels: &[Level]) {
        let chance = (self.numbering.len() as f64).ln();
        for level in levels {
            let high = self.how.rates.iter().zip(&level.losses);
            let high = high.filter(|(_, loss)| loss.is_nan() || **loss > chance);
            let rates: Vec<String> = high.map(|(rate, _)| rate.to_string()).collect();
            if !rates.is_empty() {
                note!(
                    "note: Res{}: after a hundredth of the updates the loss is above that of guessing at the learning \
                     rate {}: too high for these features",
                    level.level,
                    rates.join(", ")
                );
            }
        }
    }

    /// Hits of each rate and level on the samples of an order: `[level][rate] -> (first, five)`.
    fn measure(
        &self,
        (which, set): (&'static str, &Arc<ShardSet>),
        order: Order,
        levels: &mut [Level],
    ) -> Result<Vec<Vec<Hits>>, LinearError> {
        let mut found: Vec<Vec<Hits>> = levels
            .iter()
            .map(|_| self.how.rates.iter().map(|_| Hits::default()).collect())
            .collect();
        let top = self.options.levels.iter().copied().max().unwrap_or(5);
        features::pass(
            self.encoder,
            (set, order),
            &self.options.look,
            top,
            &mut |passed: Passed| {
                let mut classes = Vec::new();
                for (id, class) in passed.ids.iter().zip(&passed.classes) {
                    let class = class_of(set, which, *id, *class)?;
                    let class = if which == "train" {
                        self.sets.classes.of_train(class)
                    } else {
                        self.sets.classes.of_test(class)
                    };
                    classes.push(self.numbering.place(class));
                }
                for (level, found) in levels.iter_mut().zip(&mut found) {
                    let rows =
                        self.options.pool.rows(&passed.maps[usize::from(level.level) - 2])?;
                    add_hits(&level.heads.logits(&rows)?, &classes, found)?;
                }
                Ok::<_, LinearError>(())
            },
        )?;
        Ok(found)
    }

    /// Hits on the test set.
    fn measure_test(&mut self, levels: &mut [Level]) -> Result<Vec<Vec<Hits>>, LinearError> {
        let (set, order) = (&self.sets.test, self.test_order.clone());
        let bytes: u64 =
            levels.iter().map(|level| 4 * order.samples() * level.width() as u64).sum();
        if !self.how.each_epoch || bytes > HELD_BYTES_MAX {
            return self.measure(("test", set), order, levels);
        }
        if self.test.is_none() {
            let asked = (&self.options.levels[..], self.options.pool);
            let look = &self.options.look;
            let tick = &mut |_| Ok::<_, LinearError>(());
            let rows = features::rows(self.encoder, ("test", set), order, look, asked, tick)?;
            for (rows, level) in rows.levels.iter().zip(&self.options.levels) {
                check_finite(rows, *level, "test")?;
            }
            let place = |class: &u32| self.numbering.place(self.sets.classes.of_test(*class));
            self.test_classes = rows.classes.iter().map(place).collect();
            self.test = Some(rows.levels);
        }
        let mut found = Vec::new();
        for (level, rows) in levels.iter_mut().zip(self.test.iter().flatten()) {
            let mut of_level: Vec<Hits> = self.how.rates.iter().map(|_| Hits::default()).collect();
            let mut start = 0;
            for rows in rows.f_split(BATCH as i64, 0)? {
                let end = start + rows.size()[0] as usize;
                add_hits(
                    &level.heads.logits(&rows)?,
                    &self.test_classes[start..end],
                    &mut of_level,
                )?;
                start = end;
            }
            found.push(of_level);
        }
        Ok(found)
    }

    fn measure_epoch(&mut self, levels: &mut [Level], epoch: u32) -> Result<(), LinearError> {
        let found = self.measure_test(levels)?;
        for (level, found) in levels.iter_mut().zip(&found) {
            for (best, hits) in level.best.iter_mut().zip(found) {
                let top1 = percent(&hits.first);
                if best.1 == 0 || top1 > best.0 {
                    *best = (top1, epoch);
                }
            }
        }
        Ok(())
    }

    fn finish(
        &mut self,
        mut levels: Vec<Level>,
        watch: Watch<'_>,
    ) -> Result<Vec<Outcome>, LinearError> {
        let held = match self.held_order.clone() {
            Some(order) => Some(self.measure(("train", &self.sets.train), order, &mut levels)?),
            None => None,
        };
        watch("tests", 0, 1);
        let test = self.measure_test(&mut levels)?;
        watch("tests", 1, 1);
        let mut outcomes = Vec::new();
        for (i, (level, mut test)) in levels.into_iter().zip(test).enumerate() {
            let of_rate = |(j, rate): (usize, &f64)| Tried {
                value: *rate,
                held_out: held.as_ref().map(|held| percent(&held[i][j].first)),
                top1: Some(percent(&test[j].first)),
                loss: level.losses.get(j).copied().unwrap_or(f64::NAN),
            };
            let tried: Vec<Tried> = self.how.rates.iter().enumerate().map(of_rate).collect();
            let mut chosen = 0;
            for (j, one) in tried.iter().enumerate() {
                if one.held_out > tried[chosen].held_out {
                    chosen = j;
                }
            }
            let Hits { first, five } = std::mem::take(&mut test[chosen]);
            outcomes.push(Outcome {
                level: level.level,
                width: level.width(),
                tried,
                chosen,
                top5: (self.numbering.len() > 5).then(|| percent(&five)),
                hits: first,
                best: self.how.each_epoch.then(|| level.best[chosen]),
            });
        }
        Ok(outcomes)
    }

    /// What a state belongs to: weights, data and settings.
    fn key(&self) -> Result<String, LinearError> {
        let weights = crate::eval::digest(&self.encoder.backbone_tensors())?;
        let Sets { train, test, .. } = self.sets;
        let how = Sgd { state: None, ..self.how.clone() };
        let mut look = self.options.look.clone();
        look.workers = 0;
        let LinearOptions { levels, pool, seed, .. } = self.options;
        let all = format!(
            "{weights} {:x} {:x} {how:?} {levels:?} {pool:?} {look:?} {seed}",
            train.fingerprint(),
            test.fingerprint()
        );
        Ok(detco_shards::files::hex(&Sha256::digest(all)))
    }
}

impl Level {
    fn width(&self) -> i64 {
        self.heads.width()
    }
}

#[derive(Debug, Default)]
struct Hits {
    first: Vec<bool>,
    five: Vec<bool>,
}

/// Adds what logits `[n, rates, classes]` hit.
fn add_hits(logits: &Tensor, classes: &[i64], found: &mut [Hits]) -> Result<(), LinearError> {
    for (j, found) in found.iter_mut().enumerate() {
        let (first, five) = hits(&logits.f_select(1, j as i64)?, classes)?;
        found.first.extend(first);
        found.five.extend(five);
    }
    Ok(())
}

/// The classes that a set's samples may have: its manifest's, or those that its samples have.
fn classes_of(set: &Arc<ShardSet>) -> Result<Vec<u32>, LinearError> {
    if !set.classes().is_empty() {
        return Ok((0..set.classes().len() as u32).collect());
    }
    let mut classes = HashSet::new();
    for id in 0..set.len() {
        classes.insert(class_of(set, "train", id, set.class(id)?)?);
    }
    Ok(classes.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Variances of the channels: those of independent draws along the three vectors.
    #[test]
    fn lighting_has_the_colours_covariance_and_an_address() {
        let samples: Vec<u64> = (0..4000).collect();
        let offsets = lighting(7, 2, &samples).unwrap();
        assert_eq!(offsets.size(), [4000, 3, 1, 1]);
        let offsets = offsets.view([4000, 3]);
        for (channel, (vector, std)) in (0..).zip(LIGHTING_VECTORS.iter().zip(STD)) {
            let along = vector.iter().zip(LIGHTING_VALUES).map(|(v, value)| (v * value).powi(2));
            let expected = LIGHTING * f64::from(along.sum::<f32>().sqrt() / std);
            let of = offsets.select(1, channel).to_kind(Kind::Double);
            let (found, mean) = (of.std(true).double_value(&[]), of.mean(Kind::Double));
            assert!((found / expected - 1.0).abs() < 0.05, "{found}, expected {expected}");
            assert!(mean.double_value(&[]).abs() < 0.06 * expected, "{mean}");
        }
        let alone = lighting(7, 2, &[1234]).unwrap().view([3]);
        assert_eq!(alone, offsets.get(1234));
        assert_ne!(lighting(7, 3, &[1234]).unwrap().view([3]), alone);
        assert_ne!(lighting(8, 2, &[1234]).unwrap().view([3]), alone);
    }
}
