//! One TOML file to one validated [`Config`]: built-in recipes by name, a file on top, `--set` on
//! top of that. Unknown keys are errors that name the nearest valid one.
//!
//! Never touches tensors, shards or the network: reading a config costs nothing and can be tested
//! without data. It is also the only place that reads the environment.

use std::collections::BTreeMap;

use detco_shards::views::Recipe;
use serde::{Deserialize, Serialize};

use self::merge::flatten;
use crate::method::{Chosen, Design};

mod check;
mod environment;
mod error;
mod merge;
mod read;
mod recipes;
mod tables;
mod units;

pub use crate::method::{CROPS, PATCHES};
pub use detco_shards::device::Decode;
pub use detco_shards::pipeline::OnBadSample;
pub use environment::{cache_folder, gpu, store_environment, variable};
pub use error::ConfigError;
pub use recipes::RECIPES;
pub use tables::{
    Backbone, Checkpoint, Compress, Data, Device, Dist, Layout, Model, Monitor, Optim, Optimizer,
    Precision, Schedule, SchedulePer, Stem, Train,
};
pub use units::{Bytes, Window};

/// Everything a run is: the resolved configuration, written into the run's folder as `config.toml`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The built-in recipe that a file builds upon, `detco-r50` if it names none: its values hold
    /// where the file is silent. In a resolved configuration, where it came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Seed of order, views, initial weights, queues and shuffles.
    pub seed: u64,
    /// Where samples come from, and what happens to bad ones.
    pub data: Data,
    /// Backbone and BN groups.
    pub model: Model,
    /// What is learnt: the method's name and its keys.
    pub method: Chosen,
    /// SGD and its schedule.
    pub optim: Optim,
    /// Length, batch, device, numerics.
    pub train: Train,
    /// What ranks do together.
    pub dist: Dist,
    /// When to save, how many to keep.
    pub checkpoint: Checkpoint,
    /// What to watch while training.
    pub monitor: Monitor,
    /// The groups of views, and what may be drawn for them: a `[[views]]` table each.
    pub views: Recipe,
}

impl Config {
    /// The resolved configuration as TOML, every key written out.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("every field of Config has a TOML form")
    }

    /// What the method declares, on this backbone.
    pub fn design(&self) -> Design {
        self.method.design(self.model.channels())
    }

    /// The groups of views that training reads.
    pub fn training_views(&self) -> Recipe {
        let groups = self.design().groups;
        self.views.only(&groups.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Side of an image in pixels: of the first group that training reads.
    pub fn crop_size(&self) -> u32 {
        self.training_views().groups.first().map_or(0, |group| group.size)
    }

    /// Side of a patch in pixels, where training reads patches.
    pub fn patch_size(&self) -> Option<u32> {
        let views = self.training_views();
        views.groups.iter().find_map(|group| Some(group.grid.as_ref()?.patch))
    }

    /// All values as TOML by their keys, such as `train.epochs` and `views.crops.steps.gray.p`.
    pub fn flat(&self) -> BTreeMap<String, String> {
        let mut keys = BTreeMap::new();
        if let Ok(table) = self.to_toml().parse() {
            flatten("", &toml::Value::Table(table), &mut keys);
        }
        keys
    }

    /// Learning rate before the schedule: linear in the global batch (Goyal et al., 2017).
    pub fn base_lr(&self) -> f64 {
        self.optim.lr * self.train.batch as f64 / self.optim.lr_batch as f64
    }
}
