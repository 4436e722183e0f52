//! Everything needed to go on, one atomic directory.
//!
//! ```text
//! RUN/config.toml                       the resolved configuration
//! RUN/checkpoints/step-000001200/       one checkpoint, whole or absent
//!   state.json                          cursor, step, fingerprint of the data, config, checksums
//!   model.safetensors                   both encoders, BN statistics, queues and their pointer
//!   optim.safetensors                   SGD's momentum
//! RUN/checkpoints/latest                link to the newest
//! ```
//!
//! A checkpoint is written as `.step-….part`, each file flushed to disk, then renamed, then the
//! parent flushed: a kill at any moment leaves the checkpoint before it. Random numbers need no
//! state: every draw is a function of the seed and its place in the run (wall 4).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use self::files::{sync_folder, write_file};
use self::saved::{MODEL, OPTIM, STATE, read};
use self::state::StateFile;
use self::tensors::write_tensors;
use rustix::io::Errno;
use tch::Tensor;

mod error;
mod files;
mod saved;
mod state;
mod tensors;

pub use error::{CheckpointError, io_error};
pub use files::write_whole;
pub use saved::Saved;
pub use state::{FORMAT, State};

/// The newest checkpoint of a run whose files are all as they were written, and the names of those after it
/// with what is wrong with them.
///
/// # Errors
/// When there is none; what is wrong with the newest where none is whole; at once where one is whole but
/// not for this program.
pub fn open_intact(run: &Path) -> Result<(Saved, Vec<(String, CheckpointError)>), CheckpointError> {
    let mut damaged = Vec::new();
    for name in list(run)?.iter().rev() {
        let saved = read(&run.join("checkpoints").join(name)).and_then(|saved| {
            for file in [MODEL, OPTIM] {
                saved.check(file)?;
            }
            Ok(saved)
        });
        match saved {
            Ok(saved) => return Ok((saved, damaged)),
            Err(error) if error.is_damage() => damaged.push((name.clone(), error)),
            Err(error) => return Err(error),
        }
    }
    match damaged.into_iter().next() {
        Some((_, newest)) => Err(newest),
        None => open(run, None).map(|saved| (saved, Vec::new())), // which says that there is none
    }
}

/// Renames damaged checkpoints, whose names will be needed again, and points `latest` at the one that a run goes on
/// from. Nothing is removed.
///
/// # Errors
/// When they cannot be renamed.
pub fn set_aside(run: &Path, damaged: &[String], saved: &Saved) -> Result<(), CheckpointError> {
    let parent = run.join("checkpoints");
    for name in damaged {
        let named = |n: u64| parent.join(format!("damaged-{n}-{name}"));
        let mut number = 1;
        while named(number).exists() {
            number += 1;
        }
        let (from, to) = (parent.join(name), named(number));
        fs::rename(&from, &to).map_err(io_error("rename", &from))?;
    }
    point_latest(&parent, &name_of(saved.state.step))
}

/// Opens a run's checkpoint: `which` is `None` or `latest` for the newest, a name (`step-000001200`)
/// or a step number.
pub fn open(run: &Path, which: Option<&str>) -> Result<Saved, CheckpointError> {
    let all = list(run)?;
    let wanted = match which {
        None | Some("latest") => None,
        Some(name) => Some(name.parse::<u64>().map(name_of).unwrap_or(name.to_string())),
    };
    let name = match &wanted {
        None => all.last(),
        Some(wanted) => all.iter().find(|name| *name == wanted),
    };
    let name = name.ok_or_else(|| CheckpointError::Missing {
        run: run.to_path_buf(),
        which: wanted.map(|wanted| format!(" {wanted:?}")).unwrap_or_default(),
        known: match all.as_slice() {
            [] => String::new(),
            names => format!("; there is {}", names.join(", ")),
        },
    })?;
    read(&run.join("checkpoints").join(name))
}

/// Names of a run's checkpoints, oldest first. Unfinished ones are not among them.
pub fn list(run: &Path) -> Result<Vec<String>, CheckpointError> {
    let folder = run.join("checkpoints");
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("list", &folder)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io_error("list", &folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // The names sort as their steps do; the state file is inside before the rename.
        let step = name.strip_prefix("step-").and_then(|digits| digits.parse::<u64>().ok());
        names.extend(step.map(|step| (step, name)));
    }
    names.sort();
    Ok(names.into_iter().map(|(_, name)| name).collect())
}

fn name_of(step: u64) -> String {
    format!("step-{step:09}")
}

/// Writes a checkpoint of `run`, points `latest` at it and removes all but the newest `keep`.
/// Returns its folder. A checkpoint of the same step stays as it is: it holds the same state.
pub fn save(
    run: &Path,
    state: &State,
    model: &[(String, Tensor)],
    optim: &[(String, Tensor)],
) -> Result<PathBuf, CheckpointError> {
    let parent = run.join("checkpoints");
    fs::create_dir_all(&parent).map_err(io_error("create", &parent))?;
    let name = name_of(state.step);
    let folder = parent.join(&name);
    if !folder.exists() {
        let part = parent.join(format!(".{name}.part"));
        if part.exists() {
            fs::remove_dir_all(&part).map_err(io_error("remove", &part))?;
        }
        // What is half written gives its room back.
        write_part(&part, state, model, optim).inspect_err(|_| drop(fs::remove_dir_all(&part)))?;
        fs::rename(&part, &folder).map_err(io_error("rename", &part))?;
        sync_folder(&parent)?;
    }
    point_latest(&parent, &name)?;
    prune(run, state.config.checkpoint.keep)?;
    Ok(folder)
}

fn write_part(
    part: &Path,
    state: &State,
    model: &[(String, Tensor)],
    optim: &[(String, Tensor)],
) -> Result<(), CheckpointError> {
    fs::create_dir(part).map_err(io_error("create", part))?;
    let files = vec![write_tensors(part, MODEL, model)?, write_tensors(part, OPTIM, optim)?];
    let file = StateFile::new(state, files);
    let path = part.join(STATE);
    let text = serde_json::to_vec_pretty(&file).map_err(|error| CheckpointError::State {
        path: path.clone(),
        reason: error.to_string(),
    })?;
    write_file(&path, &text)?;
    sync_folder(part)
}

/// A link is made beside and renamed over the old one, so that `latest` always resolves. It is for people: this
/// program reads the names, so a file system without links (exFAT, some network shares) goes without.
fn point_latest(parent: &Path, name: &str) -> Result<(), CheckpointError> {
    let part = parent.join(".latest.part");
    match fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io_error("remove", &part)(error));
        }
        _ => {}
    }
    match std::os::unix::fs::symlink(name, &part) {
        Err(error) if has_no_links(&error) => return Ok(()),
        linked => linked.map_err(io_error("link", &part))?,
    }
    let latest = parent.join("latest");
    fs::rename(&part, &latest).map_err(io_error("rename", &part))?;
    sync_folder(parent)
}

/// Whether a file system says that it has no links: EPERM, where a folder that may not be written to is EACCES.
fn has_no_links(error: &io::Error) -> bool {
    let none = [Errno::PERM, Errno::OPNOTSUPP, Errno::NOSYS];
    Errno::from_io_error(error).is_some_and(|errno| none.contains(&errno))
}

/// Removes all but the newest `keep`: renamed first, so that a kill leaves no half checkpoint.
fn prune(run: &Path, keep: usize) -> Result<(), CheckpointError> {
    let parent = run.join("checkpoints");
    let names = list(run)?;
    let (old, _) = names.split_at(names.len().saturating_sub(keep.max(1)));
    for name in old {
        let part = parent.join(format!(".{name}.part"));
        let folder = parent.join(name);
        fs::rename(&folder, &part).map_err(io_error("rename", &folder))?;
        fs::remove_dir_all(&part).map_err(io_error("remove", &part))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use detco_shards::order::Cursor;
    use tch::Kind;

    use super::state::entries_crc;
    use super::*;
    use crate::config::Config;

    fn state(step: u64) -> State {
        let mut config = Config::load("detco-small", &[]).unwrap();
        config.checkpoint.keep = 2;
        let cursor = Cursor { epoch: 3, step: 7 };
        let collapsing = vec![None, Some(step)];
        State {
            config,
            cursor,
            step,
            fingerprint: u64::MAX - 1,
            samples: 999,
            ranks: 4,
            collapsing,
        }
    }

    fn tensors() -> Vec<(String, Tensor)> {
        let weight = Tensor::arange(6, (Kind::Float, tch::Device::Cpu)).reshape([2, 3]);
        let pointer = Tensor::from_slice(&[i64::MAX]);
        vec![("a.weight".into(), weight.tr()), ("pointer".into(), pointer)]
    }

    #[test]
    fn what_is_saved_comes_back_whole() {
        let run = tempfile::tempdir().unwrap();
        save(run.path(), &state(12), &tensors(), &[]).unwrap();
        let saved = open(run.path(), None).unwrap();
        assert_eq!(saved.state, state(12));
        let back = saved.model_tensors().unwrap();
        assert_eq!(back.len(), 2);
        for (name, tensor) in tensors() {
            let (_, found) = back.iter().find(|(other, _)| *other == name).unwrap();
            assert_eq!(found.size(), tensor.size());
            assert!(found.equal(&tensor), "{name}");
        }
        assert!(saved.optim_tensors().unwrap().is_empty());
        let mode = |name: &str| fs::metadata(saved.folder.join(name)).unwrap().permissions();
        assert_eq!(mode(MODEL), mode(STATE));
    }

    #[test]
    fn the_newest_are_kept_and_latest_resolves() {
        let run = tempfile::tempdir().unwrap();
        for step in [5, 50, 500] {
            save(run.path(), &state(step), &tensors(), &[]).unwrap();
        }
        assert_eq!(list(run.path()).unwrap(), ["step-000000050", "step-000000500"]);
        let latest = fs::canonicalize(run.path().join("checkpoints/latest")).unwrap();
        assert!(latest.ends_with("step-000000500"), "{}", latest.display());
        assert_eq!(open(run.path(), Some("50")).unwrap().state.step, 50);
        assert_eq!(open(run.path(), Some("latest")).unwrap().state.step, 500);
        let error = open(run.path(), Some("5")).unwrap_err().to_string();
        assert!(error.contains("step-000000005") && error.contains("step-000000500"), "{error}");
    }

    #[test]
    fn an_unfinished_checkpoint_is_not_seen_and_is_replaced() {
        let run = tempfile::tempdir().unwrap();
        let part = run.path().join("checkpoints/.step-000000009.part");
        fs::create_dir_all(&part).unwrap();
        fs::write(part.join(MODEL), b"half").unwrap();
        assert!(matches!(open(run.path(), None), Err(CheckpointError::Missing { .. })));
        save(run.path(), &state(9), &tensors(), &[]).unwrap();
        assert_eq!(open(run.path(), None).unwrap().model_tensors().unwrap().len(), 2);
    }

    #[test]
    fn a_damaged_checkpoint_is_passed_over_and_set_aside() {
        let run = tempfile::tempdir().unwrap();
        let none = open_intact(run.path()).unwrap_err();
        assert!(matches!(none, CheckpointError::Missing { .. }));
        let folders = [5, 50].map(|step| save(run.path(), &state(step), &tensors(), &[]).unwrap());
        assert_eq!(open_intact(run.path()).unwrap().0.state.step, 50);
        let cut = |folder: &Path, file: &str| {
            let path = folder.join(file);
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            bytes
        };
        for file in [MODEL, OPTIM, STATE] {
            let bytes = cut(&folders[1], file);
            let (saved, damaged) = open_intact(run.path()).unwrap();
            assert_eq!((saved.state.step, damaged.len()), (5, 1), "{file}");
            assert_eq!(damaged[0].0, "step-000000050");
            let said = damaged[0].1.to_string();
            assert!(said.contains(file) && said.contains("is damaged"), "{said}");
            fs::write(folders[1].join(file), bytes).unwrap();
        }
        let path = folders[1].join(STATE);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("lr = 0.03", "lr = 0.09")).unwrap();
        let (_, damaged) = open_intact(run.path()).unwrap();
        let said = damaged[0].1.to_string();
        assert!(said.contains("CRC32C of its entries"), "{said}");
        // One of an older program has no checksum.
        let mut older: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(older.as_object_mut().unwrap().remove("crc32c").is_some());
        fs::write(&path, older.to_string()).unwrap();
        assert!(open_intact(run.path()).unwrap().1.is_empty());
        // One of a newer program is no damage, also with what this one does not know.
        older["format"] = 2.into();
        older["crc32c"] = entries_crc(&older).into();
        fs::write(&path, older.to_string()).unwrap();
        assert!(matches!(open_intact(run.path()), Err(CheckpointError::State { .. })));
        fs::write(&path, text).unwrap();

        cut(&folders[1], MODEL);
        let (saved, damaged) = open_intact(run.path()).unwrap();
        let names: Vec<String> = damaged.into_iter().map(|(name, _)| name).collect();
        set_aside(run.path(), &names, &saved).unwrap();
        let latest = fs::canonicalize(run.path().join("checkpoints/latest")).unwrap();
        assert!(latest.ends_with("step-000000005"), "{}", latest.display());
        assert_eq!(list(run.path()).unwrap(), ["step-000000005"]);
        assert!(run.path().join("checkpoints/damaged-1-step-000000050").join(MODEL).is_file());
        save(run.path(), &state(50), &tensors(), &[]).unwrap();
        assert_eq!(open_intact(run.path()).unwrap().0.state.step, 50);
        for name in list(run.path()).unwrap() {
            cut(&run.path().join("checkpoints").join(name), MODEL);
        }
        let error = open_intact(run.path()).unwrap_err().to_string();
        assert!(error.contains("step-000000050") && error.contains("is damaged"), "{error}");
    }

    #[test]
    fn damage_is_named() {
        let run = tempfile::tempdir().unwrap();
        let folder = save(run.path(), &state(1), &tensors(), &[]).unwrap();
        let path = folder.join(MODEL);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        let error = open(run.path(), None).unwrap().model_tensors().unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains("CRC32C"), "{error}");
        fs::write(&path, &bytes[..10]).unwrap();
        let error = open(run.path(), None).unwrap().model_tensors().unwrap_err().to_string();
        assert!(error.contains("size in bytes is 10"), "{error}");
        let path = folder.join(STATE);
        let mut value: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        value["format"] = 2.into();
        value["crc32c"] = entries_crc(&value).into();
        fs::write(&path, value.to_string()).unwrap();
        let error = open(run.path(), None).unwrap_err().to_string();
        assert!(error.contains("format is 2, this program reads 1"), "{error}");
    }
}
