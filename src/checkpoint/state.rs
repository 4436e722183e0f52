//! `state.json`: where a run stands, with the checksums of the other files and its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use detco_shards::order::Cursor;
use serde::{Deserialize, Serialize};

use super::error::CheckpointError;
use crate::config::Config;

/// Version of `state.json`; a reader refuses any other.
pub const FORMAT: u32 = 1;

/// A file of a checkpoint, as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileRecord {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) crc32c: u32,
}

/// Where a run stands: what `state.json` holds beside the checksums.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// The resolved configuration.
    pub config: Config,
    /// The next batch to read.
    pub cursor: Cursor,
    /// Updates done since the start of the run.
    pub step: u64,
    /// [`detco_shards::stream::ShardSet::fingerprint`] of the data.
    pub fingerprint: u64,
    /// Samples of the data set.
    pub samples: u64,
    /// Ranks that the run began with: `train.accumulate` was stated for so many.
    pub ranks: usize,
    /// For each level and scope whose embeddings are collapsed: the step since which they have been. Empty
    /// before the first step.
    pub collapsing: Vec<Option<u64>>,
}

impl State {
    /// As `state.json` holds it, for ranks that do not see the run's folder.
    pub fn to_text(&self) -> String {
        let file = StateFile::new(self, Vec::new());
        serde_json::to_string(&file).expect("texts and numbers have a JSON form")
    }

    /// Reads [`State::to_text`] back.
    ///
    /// # Errors
    /// When it is not that.
    pub fn from_text(text: &str) -> Result<State, CheckpointError> {
        let path = PathBuf::from("rank 0's state");
        let file = serde_json::from_str::<StateFile>(text);
        let file = file.map_err(|error| CheckpointError::State {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        file.state(&path)
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StateFile {
    pub(super) format: u32,
    pub(super) detco: String,
    pub(super) step: u64,
    pub(super) epoch: u32,
    step_in_epoch: u64,
    data_fingerprint: String,
    data_samples: u64,
    #[serde(default = "one")]
    pub(super) ranks: usize,
    /// Older checkpoints have none, nor have those of runs that are not about to collapse.
    #[serde(default, skip_serializing_if = "is_nowhere")]
    pub(super) collapsing: Vec<Option<u64>>,
    pub(super) files: Vec<FileRecord>,
    /// TOML: the same text as `config.toml`, so that a checkpoint stands alone.
    pub(super) config: String,
    /// See [`entries_crc`]. Older checkpoints have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) crc32c: Option<u32>,
}

/// Ranks of a run whose checkpoints do not say.
fn one() -> usize {
    1
}

fn is_nowhere(collapsing: &[Option<u64>]) -> bool {
    collapsing.iter().all(Option::is_none)
}

impl StateFile {
    pub(super) fn new(state: &State, files: Vec<FileRecord>) -> StateFile {
        let mut file = StateFile {
            format: FORMAT,
            detco: env!("CARGO_PKG_VERSION").to_string(),
            step: state.step,
            epoch: state.cursor.epoch,
            step_in_epoch: state.cursor.step,
            data_fingerprint: format!("{:016x}", state.fingerprint),
            data_samples: state.samples,
            ranks: state.ranks,
            collapsing: state.collapsing.clone(),
            files,
            config: state.config.to_toml(),
            crc32c: None,
        };
        file.crc32c = Some(file.checksum());
        file
    }

    /// Of what it says, however it is laid out.
    fn checksum(&self) -> u32 {
        let bare = StateFile { crc32c: None, ..self.clone() };
        entries_crc(&serde_json::to_value(bare).expect("texts and numbers have a JSON form"))
    }

    pub(super) fn state(&self, path: &Path) -> Result<State, CheckpointError> {
        let fingerprint = u64::from_str_radix(&self.data_fingerprint, 16).map_err(|_| {
            let reason = "data_fingerprint is no hexadecimal number".into();
            CheckpointError::State { path: path.to_path_buf(), reason }
        })?;
        Ok(State {
            config: Config::from_checkpoint(&self.config, &path.display().to_string())?,
            cursor: Cursor { epoch: self.epoch, step: self.step_in_epoch },
            step: self.step,
            fingerprint,
            samples: self.data_samples,
            ranks: self.ranks.max(1),
            collapsing: self.collapsing.clone(),
        })
    }
}

/// CRC32C of the entries of a `state.json`, in the order of their names, without their own checksum. Of whatever
/// the file holds, not of what this program knows.
pub(super) fn entries_crc(file: &serde_json::Value) -> u32 {
    let entries: BTreeMap<&String, &serde_json::Value> =
        file.as_object().into_iter().flatten().filter(|(name, _)| *name != "crc32c").collect();
    crc32c::crc32c(&serde_json::to_vec(&entries).expect("JSON has a JSON form"))
}

pub(super) fn check_entries(file: &serde_json::Value, path: &Path) -> Result<(), CheckpointError> {
    let (expected, found) =
        (file.get("crc32c").and_then(serde_json::Value::as_u64), entries_crc(file));
    match expected {
        Some(expected) if expected != u64::from(found) => Err(CheckpointError::Damaged {
            path: path.to_path_buf(),
            what: "CRC32C of its entries",
            found: format!("{found:08x}"),
            expected: format!("{expected:08x}"),
        }),
        _ => Ok(()),
    }
}
