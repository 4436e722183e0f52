//! The state of an interrupted packing run: a plan, and a record for each shard.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::convert::Oddities;
use super::write::shard_name;
use super::{PackError, Skip, lock};
use crate::files::write_atomically;
use crate::format::ShardError;
use crate::format::manifest::{Manifest, Part, STATE_FOLDER, ShardRecord};

/// What must agree to continue a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Plan {
    pub(super) format: u32,
    pub(super) options: serde_json::Value,
    pub(super) source_sha256: String,
    pub(super) images: u64,
}

/// A shard that is written; `record` is `None` when all its images were skipped.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Done {
    pub(super) record: Option<ShardRecord>,
    pub(super) oddities: Oddities,
    /// Samples by class number.
    pub(super) classes: BTreeMap<u32, u64>,
    pub(super) skips: Vec<Skip>,
}

/// The state folder of a part, locked.
#[derive(Debug)]
pub(super) struct State {
    out: PathBuf,
    part: Part,
    folder: PathBuf,
    resume: bool,
    /// Held for the run: the system lets go of it however the process ends. `None` when an earlier
    /// run has finished: then nothing is written, and no state may make the output look unfinished.
    lock: Option<File>,
}

impl State {
    pub(super) fn open(out: &Path, part: Part, resume: bool) -> Result<State, PackError> {
        let manifest = out.join(part.file_name("manifest", "json"));
        let folder = out.join(STATE_FOLDER).join(part.file_name("part", "d"));
        let plan = folder.join("plan.json");
        if !resume && manifest.exists() {
            return Err(PackError::Finished { manifest });
        }
        if !resume && plan.exists() {
            return Err(PackError::Interrupted { out: out.to_path_buf() });
        }
        total_agrees(out, part)?;
        let mut state = State { out: out.to_path_buf(), part, folder, resume, lock: None };
        if !manifest.exists() {
            let folder = &state.folder;
            std::fs::create_dir_all(folder).map_err(ShardError::io(folder, "create"))?;
            state.lock = Some(lock(&folder.join("lock"), out)?);
            // Again, now that others see this part: of two that start at once one notices.
            total_agrees(out, part)?;
        }
        Ok(state)
    }

    /// The manifest, if an earlier run has finished.
    pub(super) fn finished(&self, plan: &Plan) -> Result<Option<(PathBuf, Manifest)>, PackError> {
        let path = self.out.join(self.part.file_name("manifest", "json"));
        if !path.exists() {
            return Ok(None);
        }
        let manifest = Manifest::read(&path)?;
        let was = Plan {
            format: manifest.format,
            options: manifest.options.clone(),
            source_sha256: manifest.source_sha256.clone(),
            images: plan.images,
        };
        self.compare(&was, plan)?;
        self.remove()?;
        Ok(Some((path, manifest)))
    }

    /// Writes the plan, or compares it with the one that is there.
    pub(super) fn agree(&self, plan: &Plan) -> Result<(), PackError> {
        let path = self.folder.join("plan.json");
        if self.resume && path.exists() {
            let was: Plan = read(&path)?;
            return self.compare(&was, plan);
        }
        write(&path, plan)
    }

    fn compare(&self, was: &Plan, now: &Plan) -> Result<(), PackError> {
        let differ = |what: &str, was: String, now: String| {
            Err(PackError::Mismatch { out: self.out.clone(), what: what.to_owned(), was, now })
        };
        if was.format != now.format {
            return differ("the format", was.format.to_string(), now.format.to_string());
        }
        // Turning to `skip` after a fault is what a user wants to do, and changes no shard that is
        // there: under `fail` it has no skips.
        let fields = now.options.as_object().into_iter().flatten();
        for (name, value) in fields.filter(|(name, _)| *name != "on_error") {
            let before = was.options.get(name).unwrap_or(&serde_json::Value::Null);
            if before != value {
                return differ(name, before.to_string(), value.to_string());
            }
        }
        if was.images != now.images {
            return differ("the number of images", was.images.to_string(), now.images.to_string());
        }
        if was.source_sha256 != now.source_sha256 {
            let short = |text: &str| text.chars().take(12).collect();
            let what = "the SHA-256 of names, sizes and classes in the source";
            return differ(what, short(&was.source_sha256), short(&now.source_sha256));
        }
        Ok(())
    }

    /// The record of a shard that is complete under its name.
    pub(super) fn done(&self, shard: u64) -> Result<Option<Done>, PackError> {
        let path = self.record_path(shard);
        if !self.resume || !path.exists() {
            return Ok(None);
        }
        let done: Done = read(&path)?;
        let Some(record) = &done.record else { return Ok(Some(done)) };
        let tar = self.out.join(&record.name);
        let bytes = match std::fs::metadata(&tar) {
            Ok(meta) => meta.len(),
            // Killed between the record and the name: the shard is written again.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ShardError::io(&tar, "open")(error).into()),
        };
        if bytes != record.bytes {
            return Err(PackError::Mismatch {
                out: self.out.clone(),
                what: format!("the size of {}", record.name),
                was: record.bytes.to_string(),
                now: bytes.to_string(),
            });
        }
        Ok(Some(done))
    }

    pub(super) fn record(&self, shard: u64, done: &Done) -> Result<(), PackError> {
        write(&self.record_path(shard), done)
    }

    /// Removes the state: the data set is finished.
    pub(super) fn remove(&self) -> Result<(), PackError> {
        let folder = &self.folder;
        match std::fs::remove_dir_all(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(ShardError::io(folder, "remove")(error).into());
            }
            _ => {}
        }
        // Other parts may be under way in there: then it stays.
        let _ = std::fs::remove_dir(self.out.join(STATE_FOLDER));
        Ok(())
    }

    fn record_path(&self, shard: u64) -> PathBuf {
        self.folder.join(shard_name(shard)).with_extension("json")
    }
}

impl Drop for State {
    /// Where nothing was begun, the output is left as it was found.
    fn drop(&mut self) {
        if self.lock.is_some() && !self.folder.join("plan.json").exists() {
            // What cannot be removed does no harm: the next run makes it again.
            let _ = self.remove();
        }
    }
}

/// Parts of another total, finished or not, would make no data set with this one, and their shards
/// would be in each other's way.
fn total_agrees(out: &Path, part: Part) -> Result<(), PackError> {
    for (folder, stem, extension) in
        [(out.to_path_buf(), "manifest", "json"), (out.join(STATE_FOLDER), "part", "d")]
    {
        let mut names = Vec::new();
        match std::fs::read_dir(&folder) {
            Ok(list) => {
                for entry in list {
                    names.push(entry.map_err(ShardError::io(&folder, "list"))?.file_name());
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(ShardError::io(&folder, "list")(error).into()),
        }
        names.sort();
        for name in names {
            let other = name.to_str().and_then(|name| Part::of_file(name, stem, extension));
            if let Some(Part { of, .. }) = other.filter(|other| other.of != part.of) {
                return Err(PackError::OtherParts { part, found: folder.join(name), of });
            }
        }
    }
    Ok(())
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, PackError> {
    let text = std::fs::read(path).map_err(ShardError::io(path, "read"))?;
    serde_json::from_slice(&text)
        .map_err(|source| PackError::State { path: path.to_path_buf(), source })
}

fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), PackError> {
    let text = serde_json::to_vec(value)
        .map_err(|source| PackError::State { path: path.to_path_buf(), source })?;
    Ok(write_atomically(path, &text).map_err(ShardError::from)?)
}
