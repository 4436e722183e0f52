//! A small detector on a backbone's maps: what the maps are worth for detection, in minutes.
//!
//! One grid of stride 8, boxes as distances to their four sides (FCOS, Tian et al., ICCV 2019), focal loss (Lin et al.,
//! ICCV 2017) and GIoU loss (Rezatofighi et al., CVPR 2019). Nearly all weights are the backbone's, so that the
//! backbone decides. Frozen, its maps are computed once, and the detector is trained on them once a probe seed; or a
//! copy of the backbone is trained with it.
//! Scenes come from a [`sources::Source`]: composites, COCO or VOC.
//!
//! Random initialisations of the same architecture are measured with every backbone. They differ from each other
//! by more than probe seeds do, so that a difference to one of them alone says little.

pub mod adamw;
pub mod annotated;
pub mod composites;
pub mod features;
pub mod files;
pub mod fit;
pub mod head;
pub mod keep;
pub mod layout;
pub mod loss;
pub mod nms;
pub mod pictures;
pub mod run;
pub mod sources;
pub mod targets;
pub mod tuned;

use std::path::PathBuf;

use detco_shards::format::ShardError;
use detco_shards::limits;
use detco_shards::order::OrderError;
use detco_shards::pipeline::PipelineError;
use thiserror::Error;

use super::ap::ReadError;
use super::pictures::PictureError;
use crate::batch::BatchError;
use crate::console::plural;
use crate::model::ModelError;
use crate::shim::ShimError;

/// Why scenes cannot be made.
#[derive(Debug, Error)]
pub enum SceneError {
    /// A set has no picture.
    #[error("{which}: {source}")]
    Order {
        /// Which set.
        which: &'static str,
        /// Why.
        source: OrderError,
    },
    /// A picture of a set cannot be read or decoded.
    #[error("{which}: {source}")]
    Pipeline {
        /// Which set.
        which: &'static str,
        /// Why.
        source: Box<PipelineError>,
    },
    /// A class is no number.
    #[error("{which}: {source}")]
    Class {
        /// Which set.
        which: &'static str,
        /// Why.
        source: Box<ShardError>,
    },
    /// An object has no class.
    #[error("{which}: sample {key:?} in {shard} has no class: pack them from class folders")]
    NoClass {
        /// Which set.
        which: &'static str,
        /// The shard.
        shard: String,
        /// The sample's id in it.
        key: String,
    },
    /// A split is empty.
    #[error(
        "{} for training and {} for testing: both need at least one, and every {}th of a set that is \
         for both is for testing",
        plural(*train as u64, &what[..what.len() - 1]), plural(*test as u64, &what[..what.len() - 1]), least
    )]
    TooFew {
        /// What there is too little of, in plural.
        what: &'static str,
        /// Those for training.
        train: usize,
        /// Those for testing.
        test: usize,
        /// Every so many is for testing.
        least: usize,
    },
    /// A class of the test objects is none of the training objects.
    #[error("class {class} of the objects has no name: there are {names}")]
    Unnamed {
        /// The class's number.
        class: u32,
        /// Names.
        names: usize,
    },
    /// Two files list other categories.
    #[error("{} and {} list different categories", train.display(), test.display())]
    Categories {
        /// The file for training.
        train: PathBuf,
        /// The file for testing.
        test: PathBuf,
    },
    /// Annotations cannot be used.
    #[error(transparent)]
    Read(#[from] Box<ReadError>),
    /// An image cannot be read or decoded.
    #[error(transparent)]
    Picture(#[from] Box<PictureError>),
    /// There is no memory for the scenes.
    #[error(
        "no memory for {scenes} scenes of {size} x {size} pixels: --scenes and --size need less"
    )]
    Memory {
        /// Scenes.
        scenes: usize,
        /// Their edge.
        size: u32,
    },
    /// No thread can be started.
    #[error("cannot start a thread: {source}{}", limits::of_threads(source))]
    Thread {
        /// Why.
        source: std::io::Error,
    },
}

/// Why a detector could not be measured.
#[derive(Debug, Error)]
pub enum DetectError {
    /// Scenes cannot be made.
    #[error(transparent)]
    Scene(Box<SceneError>),
    /// Nothing is there to learn.
    #[error("no training scene has an object to learn")]
    NoObjects,
    /// A map of the backbone is not finite.
    #[error("the maps of Res{level} are not finite")]
    NotFinite {
        /// The level.
        level: u8,
    },
    /// The maps do not fit the detector's grid.
    #[error(
        "a map of {edge} x {edge} does not fit a grid of {grid} x {grid}: choose a --size that 32 divides"
    )]
    Grid {
        /// The map's edge.
        edge: i64,
        /// The grid's.
        grid: i64,
    },
    /// The detector's loss is not finite.
    #[error("the loss is not finite at step {step}: lower --lr")]
    Diverged {
        /// The step, from 1.
        step: u32,
    },
    /// The measurement changed the backbone.
    #[error("the backbone changed while it was measured frozen: {before} before, {after} after")]
    Changed {
        /// Its digest before.
        before: String,
        /// Its digest after.
        after: String,
    },
    /// The file of a finished reading cannot be written.
    #[error(transparent)]
    Keep(#[from] detco_shards::files::FileError),
    /// Images cannot be made of bytes.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A backbone cannot be made.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// libtorch failed.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// libtorch failed.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

impl From<SceneError> for DetectError {
    fn from(error: SceneError) -> DetectError {
        DetectError::Scene(Box::new(error))
    }
}

impl From<ReadError> for SceneError {
    fn from(error: ReadError) -> SceneError {
        SceneError::Read(Box::new(error))
    }
}
