//! Training of the detector on maps, and its detections.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::DetectError;
use super::adamw::AdamW;
use super::features::Features;
use super::head::{Head, STRIDE};
use super::loss::loss;
use super::nms::{self, Candidate};
use super::sources::Scenes;
use super::targets::Targets;
use crate::draws::Draws;
use crate::eval::ap::Detection;

/// Scenes that are detected together.
const BATCH: usize = 100;

/// How the detector is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Channels of the detector: a multiple of 8.
    pub width: i64,
    /// Updates.
    pub steps: u32,
    /// Scenes an update.
    pub batch: usize,
    /// Largest learning rate: it rises linearly over `warm_up` steps and falls along a cosine to 0.
    pub lr: f64,
    /// Steps until the largest learning rate.
    pub warm_up: u32,
    /// Weight decay, decoupled.
    pub decay: f64,
    /// Largest learning rate of the backbone; none where it is frozen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backbone_lr: Option<f64>,
}

impl Default for Training {
    /// The prototype's.
    fn default() -> Self {
        Training {
            width: 64,
            steps: 1000,
            batch: 16,
            lr: 3e-3,
            warm_up: 50,
            decay: 1e-2,
            backbone_lr: None,
        }
    }
}

impl Training {
    /// The learning rate of a step, from 0, as a share of the largest.
    pub fn share(&self, step: u32) -> f64 {
        let rise = (f64::from(step + 1) / f64::from(self.warm_up.max(1))).min(1.0);
        let share = f64::from(step) / f64::from(self.steps.max(1));
        rise * 0.5 * (1.0 + (std::f64::consts::PI * share).cos())
    }
}

/// What gives the detector its maps.
pub trait Body {
    /// Maps of the detector's levels of these training scenes.
    ///
    /// # Errors
    /// When libtorch fails.
    fn maps(&mut self, rows: &[i64]) -> Result<Vec<Tensor>, DetectError>;

    /// Tensors that are trained with the detector.
    fn trained(&self) -> Vec<Tensor> {
        Vec::new()
    }

    /// Called after each update.
    ///
    /// # Errors
    /// When libtorch fails.
    fn settle(&mut self) -> Result<(), DetectError> {
        Ok(())
    }
}

/// A frozen backbone: maps that were computed once.
#[derive(Debug)]
pub struct Frozen<'a> {
    /// All maps.
    pub features: &'a Features,
    /// Levels that the detector reads.
    pub levels: &'a [u8],
}

impl Body for Frozen<'_> {
    fn maps(&mut self, rows: &[i64]) -> Result<Vec<Tensor>, DetectError> {
        let rows = Tensor::from_slice(rows).to_device(self.features.device());
        Ok(self.features.rows(self.levels, &rows))
    }
}

/// Trains a detector on these training scenes, in an order drawn from the seed; `tick` hears each update. Returns the
/// last loss.
///
/// # Errors
/// When the loss is not finite, or libtorch fails.
pub fn fit(
    head: &Head,
    body: &mut dyn Body,
    targets: &Targets,
    rows: &[i64],
    training: &Training,
    seed: u64,
    tick: &mut dyn FnMut(),
) -> Result<f64, DetectError> {
    let own = head.parameters().iter().map(|(_, tensor)| tensor.shallow_clone());
    let mut optimizers = [
        (AdamW::new(own, training.decay), training.lr),
        (AdamW::new(body.trained(), training.decay), training.backbone_lr.unwrap_or(0.0)),
    ];
    let device = head.parameters()[0].1.device();
    let [classes, distances] =
        [&targets.classes, &targets.distances].map(|of| of.to_device(device));
    let mut passes = Passes { rows, seed, pass: 0, left: Vec::new() };
    let mut last = 0.0;
    for step in 0..training.steps {
        let batch = passes.take(training.batch);
        let maps = body.maps(&batch)?;
        let at = Tensor::from_slice(&batch).to_device(device);
        let (logits, found) = head.forward(&maps);
        let [classes, distances] = [&classes, &distances].map(|of| of.index_select(0, &at));
        let loss = loss(&logits, &found, &classes, &distances);
        for (optimizer, _) in &mut optimizers {
            optimizer.zero_grad()?;
        }
        loss.backward();
        last = loss.double_value(&[]);
        if !last.is_finite() {
            return Err(DetectError::Diverged { step: step + 1 });
        }
        for (optimizer, lr) in &mut optimizers {
            optimizer.step(*lr * training.share(step));
        }
        body.settle()?;
        tick();
    }
    Ok(last)
}

/// The order of scenes: one permutation of them after the other.
struct Passes<'a> {
    rows: &'a [i64],
    seed: u64,
    pass: u64,
    left: Vec<i64>,
}

impl Passes<'_> {
    fn take(&mut self, count: usize) -> Vec<i64> {
        while self.left.len() < count {
            let order =
                Draws::new(self.seed, "detect.order", self.pass).permutation(self.rows.len());
            self.left.extend(order.into_iter().map(|at| self.rows[at as usize]));
            self.pass += 1;
        }
        self.left.drain(..count).collect()
    }
}

/// What a detector says of scenes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    /// Detections with their classes.
    pub by_class: Vec<Detection>,
    /// Detections of class 0, whose score is a cell's highest over all classes.
    pub one_class: Vec<Detection>,
}

/// Detects: `maps` gives those of the scenes from a number on, so many of them. Boxes are in pixels of the pictures that
/// the scenes were made of.
///
/// # Errors
/// When libtorch fails.
pub fn detect(
    head: &Head,
    maps: &mut dyn FnMut(usize, usize) -> Result<Vec<Tensor>, DetectError>,
    scenes: &Scenes,
) -> Result<Said, DetectError> {
    let mut said = Said::default();
    let cells = (head.grid() * head.grid()) as usize;
    for first in (0..scenes.len()).step_by(BATCH) {
        let count = BATCH.min(scenes.len() - first);
        let (logits, distances) = tch::no_grad(|| {
            let maps = maps(first, count)?;
            Ok::<_, DetectError>(head.forward(&maps))
        })?;
        let scores = floats(&logits.sigmoid())?;
        let distances = floats(&distances)?;
        let each = scores.len() / count;
        let scenes_of = scores.chunks_exact(each).zip(distances.chunks_exact(4 * cells));
        for (image, (scores, distances)) in (first..).zip(scenes_of) {
            let corners = boxes(distances, head.grid() as usize, scenes.size as f32);
            let scale = scenes.scenes[image].scale;
            let highest = |cell: usize| {
                scores[cell..].iter().step_by(cells).copied().fold(f32::NEG_INFINITY, f32::max)
            };
            let merged: Vec<f32> = (0..cells).map(highest).collect();
            for (scores, all) in [(scores, &mut said.by_class), (&merged[..], &mut said.one_class)]
            {
                let found = nms::detections(scores, &corners);
                all.extend(found.into_iter().map(|one| detection(image, one, scale)));
            }
        }
    }
    Ok(said)
}

fn floats(of: &Tensor) -> Result<Vec<f32>, DetectError> {
    let flat = of.to_device(tch::Device::Cpu).to_kind(Kind::Float).contiguous().view([-1]);
    Ok(Vec::<f32>::try_from(flat)?)
}

/// Corners of the cells' boxes, within the scene: distances are `[4, grid, grid]`.
fn boxes(distances: &[f32], grid: usize, size: f32) -> Vec<[f32; 4]> {
    let cells = grid * grid;
    let of = |cell: usize| {
        let [x, y] = [cell % grid, cell / grid].map(|at| (at as f32 + 0.5) * STRIDE as f32);
        let side = |side: usize| distances[side * cells + cell];
        [x - side(0), y - side(1), x + side(2), y + side(3)].map(|at| at.clamp(0.0, size))
    };
    (0..cells).map(of).collect()
}

fn detection(image: usize, found: Candidate, scale: f64) -> Detection {
    let [left, top, right, bottom] = found.corners.map(|at| f64::from(at) / scale);
    let bounds = [left, top, right - left, bottom - top];
    Detection { image, category: found.class, bounds, score: f64::from(found.score) }
}
