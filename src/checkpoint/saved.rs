//! [`Saved`]: a checkpoint that was found, and its files held against what was written.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use tch::Tensor;

use super::error::{CheckpointError, io_error};
use super::state::{FORMAT, FileRecord, State, StateFile, check_entries};
use super::tensors::{checksum_of, parse_tensors};

/// A checkpoint that was found and whose `state.json` was read.
#[derive(Clone, Debug)]
pub struct Saved {
    /// Its folder.
    pub folder: PathBuf,
    /// Where the run stood.
    pub state: State,
    pub(super) files: Vec<FileRecord>,
}

impl Saved {
    /// Both encoders, BN statistics, queues: `query.backbone.conv1.weight`, `queue.global.5`, ...
    pub fn model_tensors(&self) -> Result<Vec<(String, Tensor)>, CheckpointError> {
        self.tensors(MODEL)
    }

    /// SGD's momentum under the parameters' names.
    pub fn optim_tensors(&self) -> Result<Vec<(String, Tensor)>, CheckpointError> {
        self.tensors(OPTIM)
    }

    fn tensors(&self, name: &str) -> Result<Vec<(String, Tensor)>, CheckpointError> {
        let path = self.folder.join(name);
        let bytes = self.bytes(name)?;
        parse_tensors(&bytes)
            .map_err(|reason| CheckpointError::Tensors { path: path.clone(), reason })
    }

    /// Reads a file through, without keeping it, and holds it against what was written.
    pub(super) fn check(&self, name: &str) -> Result<(), CheckpointError> {
        let path = self.folder.join(name);
        let found = File::open(&path).and_then(|mut file| checksum_of(&mut file));
        self.compare(name, found.map_err(io_error("read", &path))?)
    }

    /// A file as it was written.
    pub(super) fn bytes(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let path = self.folder.join(name);
        let bytes = fs::read(&path).map_err(io_error("read", &path))?;
        self.compare(name, (bytes.len() as u64, crc32c::crc32c(&bytes)))?;
        Ok(bytes)
    }

    /// Holds a file's size and CRC32C against those in `state.json`.
    fn compare(&self, name: &str, (bytes, crc): (u64, u32)) -> Result<(), CheckpointError> {
        let path = self.folder.join(name);
        let record = self.files.iter().find(|file| file.name == name).ok_or_else(|| {
            let reason = format!("names no file {name}");
            CheckpointError::State { path: self.folder.join(STATE), reason }
        })?;
        let damaged = |what, found: String, expected: String| {
            Err(CheckpointError::Damaged { path: path.clone(), what, found, expected })
        };
        if bytes != record.bytes {
            return damaged("size in bytes", bytes.to_string(), record.bytes.to_string());
        }
        if crc != record.crc32c {
            return damaged("CRC32C", format!("{crc:08x}"), format!("{:08x}", record.crc32c));
        }
        Ok(())
    }
}

/// File names inside a checkpoint, in the order they are written.
pub(super) const MODEL: &str = "model.safetensors";
pub(super) const OPTIM: &str = "optim.safetensors";
pub(super) const STATE: &str = "state.json";

pub(super) fn read(folder: &Path) -> Result<Saved, CheckpointError> {
    let path = folder.join(STATE);
    let fault = |reason: String| CheckpointError::State { path: path.clone(), reason };
    let text = fs::read(&path).map_err(io_error("read", &path))?;
    let value = serde_json::from_slice::<serde_json::Value>(&text);
    let value = value.map_err(|error| {
        let reason = format!("is no JSON: {error}");
        CheckpointError::Broken { path: path.clone(), reason }
    })?;
    check_entries(&value, &path)?;
    let format = value.get("format").and_then(serde_json::Value::as_u64);
    if format != Some(u64::from(FORMAT)) {
        let found = format.map_or("absent".to_string(), |format| format.to_string());
        return Err(fault(format!("format is {found}, this program reads {FORMAT}")));
    }
    let file: StateFile =
        serde_json::from_value(value).map_err(|error| fault(error.to_string()))?;
    let state = file.state(&path)?;
    Ok(Saved { folder: folder.to_path_buf(), state, files: file.files })
}
