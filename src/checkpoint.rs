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

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, View};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};
use thiserror::Error;

use crate::config::{Config, ConfigError};
use detco_shards::limits;
use detco_shards::order::Cursor;

/// Version of `state.json`; a reader refuses any other.
pub const FORMAT: u32 = 1;

/// File names inside a checkpoint, in the order they are written.
const MODEL: &str = "model.safetensors";
const OPTIM: &str = "optim.safetensors";
const STATE: &str = "state.json";

/// Why a checkpoint could not be written or read.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The system refused.
    #[error("cannot {what} {path}: {source}{limit}", limit = limits::of_file(what, source))]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The run has none, or not this one.
    #[error("{run} holds no checkpoint{which}{known}")]
    Missing {
        /// The run's folder.
        run: PathBuf,
        /// The one asked for, if any.
        which: String,
        /// Those that are there.
        known: String,
    },
    /// `state.json` is no JSON.
    #[error("{path}: {reason}: the checkpoint is damaged")]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// `state.json` is not what this program writes.
    #[error("{path}: {reason}")]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of the checkpoint is not the one that was written.
    #[error("{path}: {what} is {found}, expected {expected}: the checkpoint is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which property differs.
        what: &'static str,
        /// What it is.
        found: String,
        /// What `state.json` says.
        expected: String,
    },
    /// Tensors that cannot be stored or read.
    #[error("{path}: {reason}")]
    Tensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The config inside does not pass this program's checks.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl CheckpointError {
    /// Whether there was no room for it: a disk, a quota or `ulimit -f`.
    pub fn is_no_room(&self) -> bool {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        match self {
            CheckpointError::Io { source, .. } => {
                matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge)
            }
            _ => false,
        }
    }

    /// Whether the checkpoint is not as it was written, so that an older one may be: files that are missing, or
    /// that the disk cannot read. A file that is whole and not ours to read is no damage.
    fn is_damage(&self) -> bool {
        use io::ErrorKind::{IsADirectory, NotADirectory, NotFound};
        match self {
            CheckpointError::Io { source, .. } => {
                let unreadable = [Errno::IO, Errno::NODATA, Errno::BADMSG, Errno::NXIO];
                matches!(source.kind(), NotFound | IsADirectory | NotADirectory)
                    || Errno::from_io_error(source).is_some_and(|errno| unreadable.contains(&errno))
            }
            CheckpointError::Damaged { .. } | CheckpointError::Broken { .. } => true,
            _ => false,
        }
    }
}

/// A file of a checkpoint, as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRecord {
    name: String,
    bytes: u64,
    crc32c: u32,
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
struct StateFile {
    format: u32,
    detco: String,
    step: u64,
    epoch: u32,
    step_in_epoch: u64,
    data_fingerprint: String,
    data_samples: u64,
    #[serde(default = "one")]
    ranks: usize,
    /// Older checkpoints have none, nor have those of runs that are not about to collapse.
    #[serde(default, skip_serializing_if = "is_nowhere")]
    collapsing: Vec<Option<u64>>,
    files: Vec<FileRecord>,
    /// TOML: the same text as `config.toml`, so that a checkpoint stands alone.
    config: String,
    /// See [`entries_crc`]. Older checkpoints have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crc32c: Option<u32>,
}

/// Ranks of a run whose checkpoints do not say.
fn one() -> usize {
    1
}

fn is_nowhere(collapsing: &[Option<u64>]) -> bool {
    collapsing.iter().all(Option::is_none)
}

impl StateFile {
    fn new(state: &State, files: Vec<FileRecord>) -> StateFile {
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

    fn state(&self, path: &Path) -> Result<State, CheckpointError> {
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
fn entries_crc(file: &serde_json::Value) -> u32 {
    let entries: BTreeMap<&String, &serde_json::Value> =
        file.as_object().into_iter().flatten().filter(|(name, _)| *name != "crc32c").collect();
    crc32c::crc32c(&serde_json::to_vec(&entries).expect("JSON has a JSON form"))
}

fn check_entries(file: &serde_json::Value, path: &Path) -> Result<(), CheckpointError> {
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

/// A checkpoint that was found and whose `state.json` was read.
#[derive(Clone, Debug)]
pub struct Saved {
    /// Its folder.
    pub folder: PathBuf,
    /// Where the run stood.
    pub state: State,
    files: Vec<FileRecord>,
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
    fn check(&self, name: &str) -> Result<(), CheckpointError> {
        let path = self.folder.join(name);
        let found = File::open(&path).and_then(|mut file| checksum_of(&mut file));
        self.compare(name, found.map_err(io_error("read", &path))?)
    }

    /// A file as it was written.
    fn bytes(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
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

fn read(folder: &Path) -> Result<Saved, CheckpointError> {
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

fn write_tensors(
    folder: &Path,
    name: &str,
    tensors: &[(String, Tensor)],
) -> Result<FileRecord, CheckpointError> {
    let path = folder.join(name);
    let fault = |reason: String| CheckpointError::Tensors { path: path.clone(), reason };
    let failed = RefCell::new(None);
    let stored = tensors.iter().map(|(name, tensor)| Stored::new(name, tensor, &failed));
    let stored = stored.collect::<Result<Vec<_>, String>>().map_err(fault)?;
    let views = stored.into_iter().map(|stored| (stored.name, stored));
    // As readable as any file: the library keeps its own to the owner.
    let usual = File::create(&path).and_then(|file| Ok(file.metadata()?.permissions()));
    let usual = usual.map_err(io_error("create", &path))?;
    safetensors::serialize_to_file(views, None, &path).map_err(|error| match error {
        SafeTensorError::IoError(source) => io_error("write", &path)(source),
        other => fault(other.to_string()),
    })?;
    if let Some(reason) = failed.into_inner() {
        return Err(fault(reason));
    }
    let read = File::open(&path).and_then(|mut file| {
        file.set_permissions(usual)?;
        file.sync_all()?;
        checksum_of(&mut file)
    });
    let (bytes, crc32c) = read.map_err(io_error("write", &path))?;
    Ok(FileRecord { name: name.to_string(), bytes, crc32c })
}

/// Bytes of a file and their CRC32C.
fn checksum_of(file: &mut File) -> io::Result<(u64, u32)> {
    let (mut buffer, mut bytes, mut crc) = (vec![0; 1 << 20], 0, 0);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok((bytes, crc));
        }
        bytes += read as u64;
        crc = crc32c::crc32c_append(crc, &buffer[..read]);
    }
}

/// A tensor whose bytes are brought to the host when they are written, one tensor at a time: a model may
/// be as large as what memory is left.
struct Stored<'a> {
    name: &'a str,
    tensor: &'a Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
    failed: &'a RefCell<Option<String>>,
}

impl<'a> Stored<'a> {
    fn new(
        name: &'a str,
        tensor: &'a Tensor,
        failed: &'a RefCell<Option<String>>,
    ) -> Result<Stored<'a>, String> {
        let dtype = match tensor.kind() {
            Kind::Float => Dtype::F32,
            Kind::Double => Dtype::F64,
            Kind::Int64 => Dtype::I64,
            other => return Err(format!("{name}: cannot store the type {other:?}")),
        };
        let shape = tensor.size().iter().map(|edge| *edge as usize).collect();
        Ok(Stored { name, tensor, dtype, shape, failed })
    }
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let flat = self.tensor.detach().to_device(tch::Device::Cpu).contiguous();
        let mut bytes = vec![0; self.data_len()];
        if let Err(error) = flat.f_copy_data_u8(&mut bytes, flat.numel()) {
            *self.failed.borrow_mut() = Some(format!("{}: {error}", self.name));
        }
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

fn parse_tensors(bytes: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let file = safetensors::SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let mut tensors = Vec::with_capacity(file.len());
    for (name, view) in file.iter() {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            Dtype::I64 => Kind::Int64,
            other => return Err(format!("{name}: unexpected type {other:?}")),
        };
        let shape: Vec<i64> = view.shape().iter().map(|edge| *edge as i64).collect();
        let tensor = Tensor::f_from_data_size(view.data(), &shape, kind)
            .map_err(|error| format!("{name}: {error}"))?;
        tensors.push((name.to_string(), tensor));
    }
    Ok(tensors)
}

/// Writes and flushes a new file.
fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let mut file = File::create(path).map_err(io_error("create", path))?;
    file.write_all(bytes).map_err(io_error("write", path))?;
    file.sync_all().map_err(io_error("flush", path))
}

/// Flushes a folder's entries.
fn sync_folder(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(io_error("flush", path))
}

/// Writes a file of the run whole: sibling, flush, rename, flush the folder.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    write_file(&part, bytes)?;
    fs::rename(&part, path).map_err(io_error("rename", &part))?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_folder(parent),
        _ => Ok(()),
    }
}

/// An [`io::Error`] with what was tried on which path.
pub fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_path_buf();
    move |source| CheckpointError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

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
