//! Features of a frozen backbone: maps of Res2..Res5 of the centre of each image, pooled to rows.

mod file;

use std::path::Path;
use std::sync::Arc;

use detco_shards::format::ShardError;
use detco_shards::order::{Order, OrderError};
use detco_shards::pipeline::{Filled, Loader, LoaderOptions, OnBadSample, PipelineError};
use detco_shards::stream::ShardSet;
use detco_shards::views::{IMAGE, Recipe};
use tch::{Device, TchError, Tensor};
use thiserror::Error;

pub use file::{FileError, Wanted, write};

use crate::batch::{self, BatchError};
use crate::model::Encoder;
use crate::shim::{ShimError, norm};

/// The levels of a ResNet, Res2 to Res5.
pub const LEVELS: [u8; 4] = [2, 3, 4, 5];

/// Numbers that a map keeps at most under [`Pool::Grid`]: those of VISSL's and OpenSelfSup's probes.
const GRID_NUMBERS: i64 = 9216;

/// How a map `[n, c, h, w]` becomes rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// The average over all places: `[n, c]`.
    Average,
    /// The averages over s x s windows, at most 9,216 numbers a map: `[n, c * s * s]`, in the order c, y, x.
    ///
    /// Of maps of the shapes that a ResNet-50 has at 224 pixels the windows are those of VISSL and OpenSelfSup, which
    /// overlap (`AvgPool2d` with kernels 16, 13, 8, 6 and strides 8, 5, 3, 1). Other maps are cut into the largest
    /// s x s for which c * s * s is at most 9,216 (`AdaptiveAvgPool2d`).
    Grid,
}

/// Kernel and stride of [`Pool::Grid`] by channels and side of the map.
const WINDOWS: [([i64; 2], [i64; 2]); 4] =
    [([256, 56], [16, 8]), ([512, 28], [13, 5]), ([1024, 14], [8, 3]), ([2048, 7], [6, 1])];

impl Pool {
    /// Rows of a map `[n, c, h, w]`.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    pub fn rows(self, map: &Tensor) -> Result<Tensor, ShimError> {
        let Pool::Grid = self else { return norm::average(map) };
        let (_, channels, height, width) = map.size4()?;
        let known =
            WINDOWS.iter().find(|(shape, _)| *shape == [channels, height] && height == width);
        let pooled = match known {
            Some((_, [kernel, stride])) => {
                let (kernel, stride) = ([*kernel; 2], [*stride; 2]);
                map.f_avg_pool2d(kernel, stride, [0, 0], false, true, None::<i64>)?
            }
            None => {
                let side = (GRID_NUMBERS / channels.max(1)).isqrt().max(1);
                map.f_adaptive_avg_pool2d([side.min(height), side.min(width)])?
            }
        };
        Ok(pooled.f_contiguous()?.f_flatten(1, -1)?)
    }

    /// Its name in reports: `average` or `grid`.
    pub fn name(self) -> &'static str {
        match self {
            Pool::Average => "average",
            Pool::Grid => "grid",
        }
    }
}

/// Why samples gave no features.
#[derive(Debug, Error)]
pub enum FeaturesError {
    /// A sample without a class.
    #[error(
        "{shard}: sample {key:?} of the {which} set has no class: evaluation needs labelled samples (pack \
         class folders, or add .cls members)"
    )]
    NoClass {
        /// Which set: `train` or `test`.
        which: &'static str,
        /// The shard.
        shard: String,
        /// The sample's key in it.
        key: String,
    },
    /// A set of one sample, which has no variance.
    #[error(
        "statistics of batch normalisation need at least 2 samples, the {which} set has {samples}"
    )]
    Few {
        /// Which set: `train`.
        which: &'static str,
        /// How many it has.
        samples: u64,
    },
    /// A set has no order.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// A sample cannot be read.
    #[error(transparent)]
    Shards(#[from] ShardError),
    /// A sample cannot be decoded.
    #[error("{0}")]
    Pipeline(#[source] Box<PipelineError>),
    /// Bytes make no batch.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// libtorch refused.
    #[error("{0}")]
    Torch(#[from] TchError),
    /// libtorch failed, as where memory ends.
    #[error(transparent)]
    Shim(#[from] ShimError),
}

/// How the samples of a set are looked at.
#[derive(Clone, Debug, PartialEq)]
pub struct Look {
    /// Edge of the images that the network sees, in pixels.
    pub size: u32,
    /// Share of an image's short edge that is looked at, centred. By default 224/256, the usual
    /// one for ImageNet, and all of it where the network sees less than 96 pixels: small images
    /// have no border to spare (MoCo's CIFAR notebook crops nothing).
    pub share: Option<f32>,
    /// Decode threads; 0 means one a core.
    pub workers: usize,
    /// What becomes of a sample that cannot be decoded. Skipped, another one counts twice.
    pub on_bad_sample: OnBadSample,
    /// Skip: the end comes with a larger share of bad samples in a set.
    pub bad_share_max: f64,
    /// Skip: the end comes with as many bad samples in a row.
    pub bad_run_max: u32,
}

impl Default for Look {
    fn default() -> Self {
        Look {
            size: 224,
            share: None,
            workers: 0,
            on_bad_sample: OnBadSample::Fail,
            bad_share_max: 0.001,
            bad_run_max: 100,
        }
    }
}

impl Look {
    /// Share of an image's short edge that is looked at.
    pub fn share(&self) -> f32 {
        self.share.unwrap_or(if self.size < 96 { 1.0 } else { 0.875 })
    }
}

/// Some samples of a set, one batch after another.
#[derive(Debug)]
pub struct Passed {
    /// Their ids in the set.
    pub ids: Vec<u64>,
    /// Their classes; none for a sample without.
    pub classes: Vec<Option<u32>>,
    /// Their maps, from Res2 on, `[n, c, h, w]`.
    pub maps: Vec<Tensor>,
}

/// Sends the samples of a set, in an order, through a frozen encoder and hands each batch's maps to `take`. No level
/// above `top` is computed.
///
/// # Errors
/// [`FeaturesError`], naming the sample where it is one sample's fault, and what `take` returns.
pub fn pass<E: From<FeaturesError>>(
    encoder: &Encoder,
    (set, order): (&Arc<ShardSet>, Order),
    look: &Look,
    top: u8,
    take: &mut dyn FnMut(Passed) -> Result<(), E>,
) -> Result<(), E> {
    let device = device_of(encoder);
    for filled in load(set, order, look)? {
        let filled = filled.map_err(pipeline)?;
        let classes = filled.labels().map_err(FeaturesError::from)?;
        let images = images(&filled, look, device)?;
        let maps = encoder.maps_up_to(&images, top).map_err(FeaturesError::from)?;
        take(Passed { ids: filled.samples.to_vec(), classes: classes.to_vec(), maps })?;
    }
    Ok(())
}

fn load(set: &Arc<ShardSet>, order: Order, look: &Look) -> Result<Loader, FeaturesError> {
    let recipe = Recipe::center(look.size, look.share().into());
    let loading = LoaderOptions {
        workers: look.workers,
        on_bad_sample: look.on_bad_sample,
        bad_share_max: look.bad_share_max,
        bad_run_max: look.bad_run_max,
        ..LoaderOptions::evaluate(recipe, order)
    };
    Loader::start(Arc::clone(set), loading).map_err(pipeline)
}

fn pipeline(error: PipelineError) -> FeaturesError {
    FeaturesError::Pipeline(Box::new(error))
}

fn images(filled: &Filled, look: &Look, device: Device) -> Result<Tensor, FeaturesError> {
    let bytes = filled.view(IMAGE, 0);
    Ok(batch::images(bytes, filled.len(), look.size as usize, device)?)
}

/// Images of a batch whose statistics [`recompute_bn`] takes.
pub const BN_BATCH: u64 = 64;
/// Batches of which it takes them, at most.
pub const BN_BATCHES: usize = 200;

/// Puts statistics of a set's images, as evaluation sees them, in the place of an encoder's running ones: of 200
/// batches of 64 drawn without replacement, or of as many whole ones as there are. Returns the number of images.
///
/// # Errors
/// [`FeaturesError::Few`], and as [`pass`].
pub fn recompute_bn(
    encoder: &mut Encoder,
    (which, set): (&'static str, &Arc<ShardSet>),
    look: &Look,
) -> Result<u64, FeaturesError> {
    let samples = set.len();
    if samples < 2 {
        return Err(FeaturesError::Few { which, samples });
    }
    let order = Order::shuffled(samples, BN_BATCH.min(samples), 0)?;
    let device = device_of(encoder);
    let mut count = 0;
    let batches = load(set, order, look)?.take(BN_BATCHES).map(|filled| {
        let filled = filled.map_err(pipeline)?;
        count += filled.len() as u64;
        images(&filled, look, device)
    });
    encoder.recompute_statistics(batches)?;
    Ok(count)
}

/// Where an encoder's tensors live.
pub fn device_of(encoder: &Encoder) -> Device {
    encoder.parameters().first().map_or(Device::Cpu, |(_, tensor)| tensor.device())
}

/// The class of a sample, or an error that names the sample; `which` is its set.
///
/// # Errors
/// [`FeaturesError::NoClass`].
pub fn class_of(
    set: &ShardSet,
    which: &'static str,
    id: u64,
    class: Option<u32>,
) -> Result<u32, FeaturesError> {
    class.ok_or_else(|| {
        let (shard, key) = place_of(set, id);
        FeaturesError::NoClass { which, shard, key }
    })
}

/// The shard and the key of a sample, for messages.
pub fn place_of(set: &ShardSet, id: u64) -> (String, String) {
    let (shard, key, _) = set.place(id).unwrap_or((Path::new(""), "", 0));
    (shard.display().to_string(), key.to_owned())
}

/// Rows of several levels, and their classes.
#[derive(Debug)]
pub struct Rows {
    /// Classes, a row each.
    pub classes: Vec<u32>,
    /// Of each level that was asked for `[n, d]`, float32, where the encoder is.
    pub levels: Vec<Tensor>,
}

/// Features of labelled samples, held in memory: 4 d bytes a sample and level. `tick` hears of the samples done.
///
/// # Errors
/// As [`pass`], and what `tick` returns.
pub fn rows<E: From<FeaturesError>>(
    encoder: &Encoder,
    (which, set): (&'static str, &Arc<ShardSet>),
    order: Order,
    look: &Look,
    (levels, pool): (&[u8], Pool),
    tick: &mut dyn FnMut(u64) -> Result<(), E>,
) -> Result<Rows, E> {
    let mut classes = Vec::new();
    let mut parts: Vec<Vec<Tensor>> = levels.iter().map(|_| Vec::new()).collect();
    let top = levels.iter().copied().max().unwrap_or(5);
    pass(encoder, (set, order), look, top, &mut |passed: Passed| {
        for (id, class) in passed.ids.iter().zip(&passed.classes) {
            classes.push(class_of(set, which, *id, *class)?);
        }
        for (level, parts) in levels.iter().zip(&mut parts) {
            let rows = pool.rows(&passed.maps[usize::from(*level) - 2]);
            parts.push(rows.map_err(FeaturesError::from)?);
        }
        tick(passed.ids.len() as u64)
    })?;
    let joined =
        parts.iter().filter(|parts| !parts.is_empty()).map(|parts| Tensor::f_cat(parts, 0));
    let levels = joined.collect::<Result<_, _>>().map_err(FeaturesError::from)?;
    Ok(Rows { classes, levels })
}
