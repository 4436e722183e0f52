//! What all ranks agree upon before they are brought together: configuration, data, and the checkpoint to go on from.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use detco_shards::stream::ShardSet;
use tch::Device;

use super::Start;
use super::error::TrainError;
use super::process::lock;
use super::resume::{harmless, resumed_config};
use crate::checkpoint::{self, Saved, State};
use crate::config::{self, Config, ConfigError};
use crate::data;
use crate::device;
use crate::dist::rendezvous::{Card, Rendezvous};

/// What all ranks agree upon before they are brought together.
pub(super) struct Plan {
    pub(super) folder: PathBuf,
    /// As it is saved: `train.accumulate` is the one that the run began with.
    pub(super) config: Config,
    pub(super) set: Arc<ShardSet>,
    /// Where the run goes on.
    pub(super) state: Option<State>,
    /// Rank 0's checkpoint.
    pub(super) saved: Option<Resumed>,
}

/// What a run goes on from, chosen while nobody else can change it.
pub(super) struct Resumed {
    pub(super) saved: Saved,
    /// Names of later checkpoints, which are damaged.
    pub(super) damaged: Vec<String>,
    pub(super) lock: File,
}

impl Plan {
    pub(super) fn make(start: Start, rendezvous: Option<&Rendezvous>) -> Result<Plan, TrainError> {
        let is_first = rendezvous.is_none_or(Rendezvous::is_first);
        let saved = if is_first { find(&start)? } else { None };
        let state = saved.as_ref().map(|resumed| resumed.saved.state.clone());
        let state = match rendezvous {
            None => state,
            Some(rendezvous) => {
                let text = is_first.then(|| state.as_ref().map_or(String::new(), State::to_text));
                let text = rendezvous.first_says("state", text.as_deref())?;
                (!text.is_empty()).then(|| State::from_text(&text)).transpose()?
            }
        };
        let (folder, mut config) = match (start, &state) {
            (Start::New { run, config, .. }, None) => (run, *config),
            (Start::New { run, config, .. }, Some(state)) => {
                (run, harmless(&state.config, *config)?)
            }
            (Start::Resume { run, overrides, data }, Some(state)) => {
                let config = resumed_config(&state.config, &overrides, data)?;
                (run, config)
            }
            (Start::Resume { run, .. }, None) => return Err(TrainError::NothingSaved { run }),
        };
        config.validate()?;
        if config.data.shards.is_empty() {
            return Err(TrainError::NoData);
        }
        let set = data::open(&config.data.shards, &config.data);
        let set = Arc::new(set.map_err(|source| match &state {
            // Not a folder that this command has named.
            Some(state) if state.config.data.shards == config.data.shards => {
                TrainError::ResumedData { source: Box::new(source) }
            }
            _ => TrainError::from(source),
        })?);
        if let Some(state) = &state {
            check_data(&set, state)?;
        }
        config.data.window = window(&config, &set, rendezvous)?;
        if let Some(rendezvous) = rendezvous {
            // What `auto` comes to: GPUs and CPUs have no network in common.
            let mut common = config.clone();
            common.train.device = match device::find(config.train.device)?.device {
                Device::Cpu => config::Device::Cpu,
                _ => config::Device::Cuda,
            };
            rendezvous.compare(&Card::new(&common, set.len(), set.fingerprint()))?;
        }
        Ok(Plan { folder, config, set, state, saved })
    }
}

/// What the window comes to. It is written down with the run, since the order must not change when
/// the run goes on elsewhere, and it is rank 0's on every rank, however large their caches are.
pub(super) fn window(
    config: &Config,
    set: &ShardSet,
    rendezvous: Option<&Rendezvous>,
) -> Result<config::Window, TrainError> {
    let Some(rendezvous) = rendezvous else { return Ok(data::window(config.data.window, set)?) };
    let mut window = config.data.window;
    if rendezvous.is_first() {
        window = data::window(window, set)?;
        rendezvous.first_says("window", Some(&window.to_string()))?;
    } else {
        let text = rendezvous.first_says("window", None)?;
        window = text.parse().map_err(|reason: &str| {
            let (key, value, reason) = ("data.window", text, reason.to_string());
            ConfigError::Value { key, value, reason }
        })?;
    }
    Ok(data::window(window, set)?)
}

/// The checkpoint that a run goes on from, if it is to go on.
pub(super) fn find(start: &Start) -> Result<Option<Resumed>, TrainError> {
    let (Start::Resume { run, .. } | Start::New { run, .. }) = start;
    match (checkpoint::list(run)?.is_empty(), start) {
        (true, Start::New { .. }) => Ok(None),
        (false, Start::New { or_resume: false, .. }) => {
            Err(TrainError::RunExists { run: run.clone() })
        }
        (true, Start::Resume { .. }) => {
            checkpoint::open(run, None)?; // whose error says that there is none
            Ok(None)
        }
        (false, _) => newest_intact(run).map(Some),
    }
}

/// Takes the run, so that its checkpoints stay as they are, and chooses the newest that is whole; says
/// which are not.
fn newest_intact(run: &Path) -> Result<Resumed, TrainError> {
    let lock = lock(run)?;
    let (saved, faults) = checkpoint::open_intact(run)?;
    for (_, fault) in &faults {
        note!("warning: {fault}");
    }
    if !faults.is_empty() {
        note!("warning: the run goes on from {} before it", saved.folder.display());
    }
    let damaged = faults.into_iter().map(|(name, _)| name).collect();
    Ok(Resumed { saved, damaged, lock })
}

fn check_data(set: &ShardSet, state: &State) -> Result<(), TrainError> {
    if set.fingerprint() == state.fingerprint && set.len() == state.samples {
        return Ok(());
    }
    Err(TrainError::DataChanged {
        found: set.fingerprint(),
        found_samples: set.len(),
        expected: state.fingerprint,
        expected_samples: state.samples,
    })
}
