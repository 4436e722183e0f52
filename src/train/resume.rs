//! What may change when a run goes on: settings that leave its mathematics alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::error::TrainError;
use crate::config::{self, Config};

/// The saved config with overrides, if those leave the mathematics alone.
pub(super) fn resumed_config(
    saved: &Config,
    overrides: &[String],
    data: Vec<String>,
) -> Result<Config, TrainError> {
    let mut config = saved.with_overrides(overrides)?;
    if !data.is_empty() {
        config.data.shards = data;
    }
    harmless(saved, config)
}

/// The wanted config, if it leaves the saved one's mathematics alone.
pub(super) fn harmless(saved: &Config, mut config: Config) -> Result<Config, TrainError> {
    if config.data.window == config::Window::Auto {
        config.data.window = saved.data.window; // what it came to when the run began
    }
    let mut allowed = saved.clone();
    allowed.data = config.data.clone();
    allowed.data.window = saved.data.window; // the order is mathematics, and so are pixels
    allowed.data.reduce = saved.data.reduce;
    if decoded_by(&config) != decoded_by(saved) {
        allowed.data.decode = saved.data.decode;
    }
    allowed.checkpoint = config.checkpoint.clone();
    allowed.monitor = config.monitor.clone();
    allowed.dist = config.dist.clone();
    allowed.dist.compress = saved.dist.compress;
    allowed.train.device = config.train.device;
    allowed.train.deterministic = config.train.deterministic;
    allowed.train.threads = config.train.threads;
    allowed.train.steps_max = config.train.steps_max;
    match allowed == config {
        true => Ok(config),
        false => Err(TrainError::ResumeChanges { changes: changes(&allowed, &config) }),
    }
}

/// Who decodes: a GPU's pixels differ from a CPU's by a level here and there.
pub(super) fn decoded_by(config: &Config) -> config::Decode {
    match (config.data.decode, config.train.device) {
        (config::Decode::Auto, config::Device::Cpu) => config::Decode::Cpu,
        (decode, _) => decode,
    }
}

/// `train.epochs: the run has 1, now 20`, for each key whose value differs.
pub(super) fn changes(saved: &Config, now: &Config) -> String {
    let (saved, now) = (saved.flat(), now.flat());
    let keys: BTreeSet<&String> = saved.keys().chain(now.keys()).collect();
    let changed = keys.into_iter().filter_map(|key| {
        let value = |of: &BTreeMap<String, String>| of.get(key).cloned().unwrap_or("none".into());
        let (had, has) = (value(&saved), value(&now));
        (had != has).then(|| format!("{key}: the run has {had}, now {has}"))
    });
    changed.collect::<Vec<_>>().join("; ")
}

/// What somebody has changed of the mathematics in a run's copy of its configuration.
pub(super) fn edits(path: &Path, config: &Config) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    match Config::from_checkpoint(&text, "it") {
        Ok(copy) => match harmless(config, copy) {
            Err(TrainError::ResumeChanges { changes }) => Some(changes),
            _ => None,
        },
        Err(error) => Some(error.to_string()),
    }
}
