//! `detco`: from a folder of images to a DetCo backbone.

pub mod cli;
pub mod config;

#[cfg(feature = "train")]
pub mod batch;
#[cfg(feature = "train")]
pub mod checkpoint;
#[cfg(feature = "train")]
pub mod dist;
#[cfg(feature = "train")]
pub mod eval;
#[cfg(feature = "train")]
pub mod export;
#[cfg(feature = "train")]
pub mod loss;
#[cfg(feature = "train")]
pub mod metrics;
#[cfg(feature = "train")]
pub mod model;
#[cfg(feature = "train")]
pub mod optim;
#[cfg(feature = "train")]
pub mod schedule;
#[cfg(feature = "train")]
pub mod step;
#[cfg(feature = "train")]
pub mod train;
#[cfg(feature = "train")]
pub mod weights;
