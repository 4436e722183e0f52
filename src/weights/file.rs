//! Opens files of weights and reads tensors from them: safetensors, torch's zip (1.6 and newer),
//! torch's format from before, and pickles that hold NumPy arrays (detectron2's).
//!
//! Knows bytes and no libtorch, so that it can be fuzzed without one. What is read of a file is no
//! more than its length, however often its tensors name the same bytes.

mod open;
#[cfg(test)]
mod tests;
mod window;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use zip::{CompressionMethod, ZipArchive};

use super::pickle::{Data, TensorRef};
use super::{Dtype, WeightsError};
use open::{open_pickle, open_safetensors, open_zip, unknown};
use window::{Wanted, inline};

/// What may be read beyond a file's length: small tensors that share a storage.
const SLACK: u64 = 1 << 20;

/// Bytes with a position: a file, or memory.
trait Input: Read + Seek + Send {}

impl<T: Read + Seek + Send> Input for T {}

/// A tensor's elements, row-major, little-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Size of each dimension.
    pub size: Vec<i64>,
    /// The elements.
    pub bytes: Vec<u8>,
}

/// An opened file of weights: what it holds is known, no element has been read.
pub struct WeightsFile {
    path: PathBuf,
    /// Bytes of the file.
    len: u64,
    tensors: BTreeMap<String, TensorRef>,
    source: Source,
}

impl fmt::Debug for WeightsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, tensors) = (&self.path, self.tensors.len());
        f.debug_struct("WeightsFile").field("path", path).field("tensors", &tensors).finish()
    }
}

/// Where the elements are.
enum Source {
    /// Storages are records `ROOT/data/KEY`.
    Zip { zip: Box<ZipArchive<Box<dyn Input>>>, root: String },
    /// Storages are these bytes of the file.
    Ranges { input: Box<dyn Input>, storages: HashMap<String, Range<u64>> },
}

impl WeightsFile {
    /// Opens a file and reads its names; of a run's folder or a checkpoint's, that of its model.
    ///
    /// # Errors
    /// [`WeightsError`] naming the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<WeightsFile, WeightsError> {
        if path.is_dir() {
            let files = ["checkpoints/latest/model.safetensors", "model.safetensors"];
            let file = files.into_iter().map(|file| path.join(file)).find(|file| file.is_file());
            let file = file.ok_or_else(|| WeightsError::Folder { path: path.to_path_buf() })?;
            return WeightsFile::open(&file);
        }
        let read = |source| WeightsError::Read { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(read)?;
        let len = file.metadata().map_err(read)?.len();
        WeightsFile::read_names(path, Box::new(std::io::BufReader::new(file)), len)
    }

    /// As [`WeightsFile::open`], of bytes in memory; `path` names them in errors.
    ///
    /// # Errors
    /// As [`WeightsFile::open`].
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<WeightsFile, WeightsError> {
        let len = bytes.len() as u64;
        WeightsFile::read_names(path, Box::new(Cursor::new(bytes)), len)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of its tensors, ascending.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether two names stand for the same elements.
    pub fn is_same(&self, one: &str, other: &str) -> bool {
        match (self.tensors.get(one), self.tensors.get(other)) {
            (Some(one), Some(other)) => one == other,
            _ => false,
        }
    }

    /// By content, not by name: people rename.
    fn read_names(
        path: &Path,
        mut input: Box<dyn Input>,
        len: u64,
    ) -> Result<WeightsFile, WeightsError> {
        let head = bytes_of(path, &mut input, 0..len.min(512))?;
        let (tensors, source) = match head[..] {
            [b'P', b'K', 3, 4, ..] => open_zip(path, input, len)?,
            [_, _, _, _, _, _, _, _, b'{', ..] => open_safetensors(path, input, len)?,
            [0x80, 0..=5, ..] => open_pickle(path, input, len)?,
            // Protocol 0 or 1, which begin with any opcode: perhaps.
            [b'(' | b'}' | b']' | b'c', ..] => {
                open_pickle(path, input, len).map_err(|_| unknown(path, &head))?
            }
            _ => return Err(unknown(path, &head)),
        };
        Ok(WeightsFile { path: path.to_path_buf(), len, tensors, source })
    }

    /// Reads the tensors of these names, in their order.
    ///
    /// # Errors
    /// [`WeightsError`] naming the file and the tensor.
    pub fn read(&mut self, names: &[&str]) -> Result<Vec<RawTensor>, WeightsError> {
        let mut wanted = Vec::with_capacity(names.len());
        for (place, name) in names.iter().enumerate() {
            let tensor = self.tensors.get(*name).ok_or_else(|| WeightsError::NoTensor {
                path: self.path.clone(),
                tensor: name.to_string(),
            })?;
            wanted.push((place, Wanted { path: &self.path, len: self.len, name, tensor }));
        }
        // Storages that several tensors share are read once.
        wanted.sort_by_cached_key(|(_, wanted)| format!("{:?}", wanted.tensor.data));
        let (mut to_fetch, mut to_keep) = (self.len + SLACK, self.len + SLACK);
        let mut read: Vec<Option<RawTensor>> = vec![None; names.len()];
        let mut storage: Option<(&Data, Vec<u8>)> = None;
        for (place, wanted) in &wanted {
            let window = wanted.window()?;
            let bytes = match storage.take() {
                Some((data, bytes)) if *data == wanted.tensor.data => bytes,
                _ => {
                    let bytes = self.source.elements(wanted)?;
                    wanted.spend(&mut to_fetch, bytes.len())?;
                    bytes
                }
            };
            wanted.check(&bytes, &window)?;
            wanted.spend(&mut to_keep, window.count * window.dtype.bytes())?;
            read[*place] = Some(wanted.gather(&bytes, &window));
            storage = Some((&wanted.tensor.data, bytes));
        }
        Ok(read.into_iter().flatten().collect())
    }
}

impl Source {
    /// The bytes of the storage that a tensor is a window on; none where the file has no such
    /// storage.
    fn elements(&mut self, wanted: &Wanted<'_>) -> Result<Vec<u8>, WeightsError> {
        match (self, &wanted.tensor.data) {
            (Source::Zip { zip, root }, Data::Storage { key, .. }) => {
                let name = format!("{root}data/{key}");
                Ok(record(wanted.path, zip, wanted.len, &name)?.unwrap_or_default())
            }
            (Source::Ranges { input, storages }, Data::Storage { key, .. }) => {
                match storages.get(key) {
                    Some(range) => bytes_of(wanted.path, input, range.clone()),
                    None => Ok(Vec::new()),
                }
            }
            (Source::Ranges { input, .. }, data) => {
                let (range, decode) = inline(data);
                let raw = bytes_of(wanted.path, input, range.start as u64..range.end as u64)?;
                Ok(decode(raw))
            }
            // An array in the pickle of a zip, where weights are storages.
            (Source::Zip { zip, root }, data) => {
                let (range, decode) = inline(data);
                let pickle = record(wanted.path, zip, wanted.len, &format!("{root}data.pkl"))?;
                let raw = pickle.as_deref().and_then(|pickle| pickle.get(range));
                Ok(decode(raw.unwrap_or_default().to_vec()))
            }
        }
    }
}

/// These bytes of the file.
fn bytes_of(
    path: &Path,
    input: &mut Box<dyn Input>,
    range: Range<u64>,
) -> Result<Vec<u8>, WeightsError> {
    let len = range.end.saturating_sub(range.start);
    let mut bytes = Vec::new();
    let read = input.seek(SeekFrom::Start(range.start)).and_then(|_| {
        // As many as there are: what the file claims is no reason to take memory.
        input.take(len).read_to_end(&mut bytes)
    });
    read.map_err(|source| WeightsError::Read { path: path.to_path_buf(), source })?;
    Ok(bytes)
}

/// The bytes of a record, or `None` where there is none of that name.
fn record(
    path: &Path,
    zip: &mut ZipArchive<Box<dyn Input>>,
    len: u64,
    name: &str,
) -> Result<Option<Vec<u8>>, WeightsError> {
    let Some(index) = zip.index_for_name(name) else { return Ok(None) };
    let refused = |source| WeightsError::Zip { path: path.to_path_buf(), source };
    let mut entry = zip.by_index(index).map_err(refused)?;
    // torch stores records as they are; with a compressed one the size is a mere claim.
    if entry.compression() != CompressionMethod::Stored || entry.size() > len {
        return Err(WeightsError::Record { path: path.to_path_buf(), record: name.to_string() });
    }
    let mut bytes = Vec::new();
    entry
        .read_to_end(&mut bytes)
        .map_err(|source| WeightsError::Read { path: path.to_path_buf(), source })?;
    Ok(Some(bytes))
}
