//! Opens files of weights and reads tensors from them: safetensors, torch's zip (1.6 and newer),
//! torch's format from before, and pickles that hold NumPy arrays (detectron2's).
//!
//! Knows bytes and no libtorch, so that it can be fuzzed without one. What is read of a file is no
//! more than its length, however often its tensors name the same bytes.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;
use safetensors::{Dtype as SafeDtype, SafeTensorError};
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{Data, Pickle, PickleError, PickleFault, TensorRef};
use super::{Dtype, WeightsError};

/// What torch's older format begins with, as an integer.
const MAGIC: &[u8] = &[0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// The only version that it ever had.
const PROTOCOL: i64 = 1001;
/// Of a pickle, bytes that are read first. Those of torch's older format are followed by the
/// elements, which need not be in memory.
const HEAD: u64 = 1 << 20;
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

/// What bytes of a pickle stand for.
type Unpack = fn(Vec<u8>) -> Vec<u8>;

/// Where bytes of a pickle are, and what they stand for. Those that stand for nothing are none, which
/// is too short for any tensor.
fn inline(data: &Data) -> (Range<usize>, Unpack) {
    match data {
        Data::Storage { .. } => (0..0, |raw| raw),
        Data::Inline(range) => (range.clone(), |raw| raw),
        Data::Latin1(range) => (range.clone(), |raw| latin1(&raw).unwrap_or_default()),
        Data::Escaped(range) => (range.clone(), |raw| escaped(&raw).unwrap_or_default()),
    }
}

/// The bytes that UTF-8 stands for, one a character.
fn latin1(text: &[u8]) -> Option<Vec<u8>> {
    std::str::from_utf8(text).ok()?.chars().map(|c| u8::try_from(c).ok()).collect()
}

/// The bytes that Latin-1 with `\u00ff` stands for, one a character.
fn escaped(mut text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    while let [first, rest @ ..] = text {
        if let (b'\\', [b'u', digits @ ..]) = (first, rest) {
            let number = std::str::from_utf8(digits.get(..4)?).ok()?;
            bytes.push(u8::try_from(u32::from_str_radix(number, 16).ok()?).ok()?);
            text = &digits[4..];
        } else {
            bytes.push(*first);
            text = rest;
        }
    }
    Some(bytes)
}

/// A tensor that is to be read.
struct Wanted<'a> {
    path: &'a Path,
    /// Bytes of the file.
    len: u64,
    name: &'a str,
    tensor: &'a TensorRef,
}

/// What was checked of a tensor: it lies in its storage and is not larger than it, so that neither a
/// wild index nor a zero stride (a terabyte from one element) is followed.
struct Window {
    dtype: Dtype,
    /// Elements of the storage.
    storage: usize,
    /// Elements of the tensor.
    count: usize,
}

impl Wanted<'_> {
    fn window(&self) -> Result<Window, WeightsError> {
        let tensor = self.tensor;
        let dtype = tensor.dtype.ok_or_else(|| WeightsError::Dtype {
            path: self.path.to_path_buf(),
            tensor: self.name.to_string(),
            dtype: tensor.dtype_name.clone(),
        })?;
        let product = || tensor.size.iter().try_fold(1_i64, |all, n| all.checked_mul(*n));
        let storage = match tensor.data {
            Data::Storage { len, .. } => Some(len),
            Data::Inline(_) | Data::Latin1(_) | Data::Escaped(_) => product(),
        };
        let storage = storage.unwrap_or(-1);
        let inside = count_inside(tensor, storage, dtype.bytes());
        let (storage, count) = inside.ok_or_else(|| WeightsError::Window {
            path: self.path.to_path_buf(),
            tensor: self.name.to_string(),
            offset: tensor.offset,
            size: tensor.size.clone(),
            stride: tensor.stride.clone(),
            storage,
        })?;
        Ok(Window { dtype, storage, count })
    }

    /// Whether the storage has as many bytes as its elements take.
    fn check(&self, bytes: &[u8], window: &Window) -> Result<(), WeightsError> {
        let (need, have) = (window.storage * window.dtype.bytes(), bytes.len());
        if have >= need {
            return Ok(());
        }
        Err(WeightsError::Storage {
            path: self.path.to_path_buf(),
            tensor: self.name.to_string(),
            record: match &self.tensor.data {
                Data::Storage { key, .. } => format!("data/{key}"),
                data => format!("at byte {}", inline(data).0.start),
            },
            need,
            have,
        })
    }

    /// Takes bytes from what may still be read.
    fn spend(&self, left: &mut u64, bytes: usize) -> Result<(), WeightsError> {
        *left = left.checked_sub(bytes as u64).ok_or_else(|| WeightsError::Repeated {
            path: self.path.to_path_buf(),
            tensor: self.name.to_string(),
            len: self.len,
        })?;
        Ok(())
    }

    /// The elements in row-major order, of a window that was checked.
    fn gather(&self, storage: &[u8], window: &Window) -> RawTensor {
        let (each, mut at) = (window.dtype.bytes(), self.tensor.offset);
        let size = self.tensor.size.clone();
        // An axis of one element may have any stride.
        let axes = size.iter().zip(&self.tensor.stride).filter(|(size, _)| **size != 1);
        let axes: Vec<(i64, i64)> = axes.map(|(size, stride)| (*size, *stride)).collect();
        let mut bytes = Vec::with_capacity(window.count * each);
        let mut index = vec![0; axes.len()];
        for _ in 0..window.count {
            let from = at as usize * each;
            bytes.extend_from_slice(&storage[from..from + each]);
            for (index, (size, stride)) in index.iter_mut().zip(&axes).rev() {
                *index += 1;
                at += stride;
                if *index < *size {
                    break;
                }
                at -= stride * size;
                *index = 0;
            }
        }
        RawTensor { dtype: window.dtype, size, bytes }
    }
}

/// Elements of the storage and of the tensor, if the tensor lies inside and is no larger.
fn count_inside(tensor: &TensorRef, storage: i64, each: usize) -> Option<(usize, usize)> {
    let len = usize::try_from(storage).ok()?;
    // The byte length must be a size as well.
    len.checked_mul(each)?;
    if tensor.size.len() != tensor.stride.len() || tensor.offset < 0 {
        return None;
    }
    let (mut count, mut last): (i64, i64) = (1, tensor.offset);
    for (size, stride) in tensor.size.iter().zip(&tensor.stride) {
        if *size < 0 || *stride < 0 {
            return None;
        }
        count = count.checked_mul(*size)?;
        last = last.checked_add((size - 1).max(0).checked_mul(*stride)?)?;
    }
    let inside = count == 0 || (last < storage && count <= storage);
    inside.then_some((len, usize::try_from(count).ok()?))
}

type Opened = (BTreeMap<String, TensorRef>, Source);

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

/// What a file is that holds no weights in a form that is known.
fn unknown(path: &Path, head: &[u8]) -> WeightsError {
    let text = String::from_utf8_lossy(head).trim_start().to_ascii_lowercase();
    let tar = |name: &str| head.starts_with(name.as_bytes());
    let what = if text.starts_with("version https://git-lfs") {
        "it is a pointer of Git LFS, not the file: `git lfs pull` brings that"
    } else if text.starts_with("<!doctype") || text.starts_with("<html") {
        "it is a web page: download the file itself"
    } else if ["sys_info\0", "storages\0", "tensors\0", "pickle\0"].into_iter().any(tar) {
        "it is a tar as torch wrote them before 0.1.10 (2017); save it again with torch: \
         torch.save(torch.load(\"old.pth\", map_location=\"cpu\", weights_only=False), \"new.pth\")"
    } else if head.get(257..262) == Some(b"ustar") {
        "it is a tar: unpack it and name the file inside"
    } else {
        match head {
            [0x1f, 0x8b, ..] => "it is compressed by gzip: unpack it first",
            [b'B', b'Z', b'h', ..] => "it is compressed by bzip2: unpack it first",
            [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is compressed by xz: unpack it first",
            [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is compressed by zstd: unpack it first",
            [0x89, b'H', b'D', b'F', ..] => "it is HDF5, which Keras writes",
            [] => "it is empty",
            _ => "its first bytes are those of none of these",
        }
    };
    WeightsError::UnknownFormat { path: path.to_path_buf(), what }
}

fn open_safetensors(
    path: &Path,
    mut input: Box<dyn Input>,
    len: u64,
) -> Result<Opened, WeightsError> {
    let refused = |source| WeightsError::Safetensors { path: path.to_path_buf(), source };
    let mut word = [0; 8];
    word.copy_from_slice(&bytes_of(path, &mut input, 0..8)?);
    let start = u64::from_le_bytes(word).checked_add(8).filter(|start| *start <= len);
    let start = start.ok_or_else(|| refused(SafeTensorError::InvalidHeaderLength))?;
    let header = bytes_of(path, &mut input, 8..start)?;
    // Checks that offsets, shapes and types agree.
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|error| refused(SafeTensorError::InvalidHeaderDeserialization(error)))?;
    if start.checked_add(metadata.data_len() as u64) != Some(len) {
        return Err(refused(SafeTensorError::MetadataIncompleteBuffer));
    }
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let size = info.shape.iter().map(|n| i64::try_from(*n)).collect::<Result<Vec<_>, _>>();
        let size = size.map_err(|_| refused(SafeTensorError::ValidationOverflow))?;
        let mut stride = vec![1; size.len()];
        for axis in (1..size.len()).rev() {
            stride[axis - 1] = i64::saturating_mul(stride[axis], size[axis].max(1));
        }
        let (from, to) = info.data_offsets;
        let data = Data::Inline(from + start as usize..to + start as usize);
        let (dtype, dtype_name) = (dtype_of(info.dtype), format!("{:?}", info.dtype));
        tensors.insert(name, TensorRef { dtype, dtype_name, data, offset: 0, size, stride });
    }
    Ok((tensors, Source::Ranges { input, storages: HashMap::new() }))
}

fn dtype_of(dtype: SafeDtype) -> Option<Dtype> {
    Some(match dtype {
        SafeDtype::F64 => Dtype::F64,
        SafeDtype::F32 => Dtype::F32,
        SafeDtype::F16 => Dtype::F16,
        SafeDtype::BF16 => Dtype::BF16,
        SafeDtype::I64 => Dtype::I64,
        SafeDtype::I32 => Dtype::I32,
        SafeDtype::I16 => Dtype::I16,
        SafeDtype::I8 => Dtype::I8,
        SafeDtype::U8 => Dtype::U8,
        SafeDtype::BOOL => Dtype::Bool,
        _ => return None,
    })
}

/// torch's zip: one pickle and one record a storage.
fn open_zip(path: &Path, input: Box<dyn Input>, len: u64) -> Result<Opened, WeightsError> {
    let mut zip = ZipArchive::new(input)
        .map_err(|source| WeightsError::Zip { path: path.to_path_buf(), source })?;
    let no_pickle = || WeightsError::NoPickle { path: path.to_path_buf() };
    let root = zip
        .file_names_raw()
        .filter_map(|name| std::str::from_utf8(name).ok()?.strip_suffix("data.pkl"))
        .find(|root| root.ends_with('/') && root.matches('/').count() == 1)
        .map(str::to_string)
        .ok_or_else(no_pickle)?;
    let order = record(path, &mut zip, len, &format!("{root}byteorder"))?;
    if order.is_some_and(|order| order != b"little") {
        return Err(WeightsError::ByteOrder { path: path.to_path_buf() });
    }
    let bytes = record(path, &mut zip, len, &format!("{root}data.pkl"))?.ok_or_else(no_pickle)?;
    let refused = |source| WeightsError::Pickle { path: path.to_path_buf(), source };
    let pickle = Pickle::load(&bytes, 0).map_err(refused)?;
    let tensors = pickle.tensors().map_err(|fault| refused(pickle.error(fault)))?;
    Ok((tensors, Source::Zip { zip: Box::new(zip), root }))
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

/// A bare pickle: torch's format before 1.6, or arrays within a pickle.
fn open_pickle(path: &Path, mut input: Box<dyn Input>, len: u64) -> Result<Opened, WeightsError> {
    let mut want = HEAD;
    loop {
        let head = bytes_of(path, &mut input, 0..want.min(len))?;
        match pickles(path, &head, &mut input, len) {
            Err(WeightsError::Pickle {
                source: PickleError { fault: PickleFault::Truncated { .. }, .. },
                ..
            }) if want < len => want = want.saturating_mul(8),
            Err(error) => return Err(error),
            Ok((tensors, storages)) => return Ok((tensors, Source::Ranges { input, storages })),
        }
    }
}

/// Tensors by name, and where each storage lies.
type Found = (BTreeMap<String, TensorRef>, HashMap<String, Range<u64>>);

/// The tensors of a file of pickles, of which `head` are the first bytes, and where its storages
/// are.
fn pickles(
    path: &Path,
    head: &[u8],
    input: &mut Box<dyn Input>,
    len: u64,
) -> Result<Found, WeightsError> {
    let refused = |source| WeightsError::Pickle { path: path.to_path_buf(), source };
    let load = |start| Pickle::load(head, start).map_err(refused);
    let expected =
        |pickle: &Pickle<'_>, expected| refused(pickle.error(PickleFault::Expected { expected }));
    let first = load(0)?;
    if first.as_long() != Some(MAGIC) {
        let tensors = first.tensors().map_err(|fault| refused(first.error(fault)))?;
        return Ok((tensors, HashMap::new()));
    }
    let version = load(first.end())?;
    if version.as_int() != Some(PROTOCOL) {
        return Err(expected(&version, "1001, the version of torch's format before 1.6"));
    }
    let system = load(version.end())?;
    if system.flag("little_endian") == Some(false) {
        return Err(WeightsError::ByteOrder { path: path.to_path_buf() });
    }
    let object = load(system.end())?;
    let keys = load(object.end())?;
    let list = keys.texts().ok_or_else(|| expected(&keys, "a list of the storages' keys"))?;
    let sizes: HashMap<&str, Option<usize>> = object.storages().collect();
    let mut storages = HashMap::new();
    let mut at = keys.end() as u64;
    for key in list {
        let each = sizes.get(key).copied().flatten();
        let each = each.ok_or_else(|| expected(&keys, "storages of known element types"))?;
        let word = bytes_of(path, input, at..at + 8)?;
        let count = <[u8; 8]>::try_from(word.as_slice()).ok().map(i64::from_le_bytes);
        let bytes = count.and_then(|count| u64::try_from(count).ok()?.checked_mul(each as u64));
        let end = bytes.and_then(|bytes| (at + 8).checked_add(bytes)).filter(|end| *end <= len);
        let end = end.ok_or_else(|| WeightsError::Short {
            path: path.to_path_buf(),
            key: key.to_string(),
            offset: at,
        })?;
        storages.insert(key.to_string(), at + 8..end);
        at = end;
    }
    let tensors = object.tensors().map_err(|fault| refused(object.error(fault)))?;
    Ok((tensors, storages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stands_for_bytes() {
        assert_eq!(latin1("a\u{ff}\0".as_bytes()), Some(vec![b'a', 255, 0]));
        assert_eq!(latin1("\u{100}".as_bytes()), None);
        assert_eq!(escaped(b"a\xff\\u0000\\u005cu\\x"), Some(b"a\xff\0\\u\\x".to_vec()));
        assert_eq!(escaped(b"\\u00"), None);
        assert_eq!(escaped(b"\\u0100"), None);
    }

    /// A pickle of two names for one array of 1 MB, again and again: the file is small, what it asks
    /// for is not.
    #[test]
    fn no_more_is_read_than_there_is() {
        let mut bytes = b"\x80\x03}(".to_vec();
        let array = [
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\x01btR(K\x01J\0\0\x10\0\x85"
                .as_slice(),
            b"cnumpy\ndtype\n(X\x02\0\0\0u1\x89\x88tR(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb",
            b"\x89B\0\0\x10\0",
            &vec![7; 1 << 20],
            b"tb",
        ];
        bytes.extend(b"X\x01\0\0\0a");
        bytes.extend(array.concat());
        bytes.extend(b"q\0");
        for name in b'b'..b'f' {
            bytes.extend([b'X', 1, 0, 0, 0, name, b'h', 0]);
        }
        bytes.extend(b"u.");
        let len = bytes.len();
        let mut file = WeightsFile::from_bytes(Path::new("x.pkl"), bytes).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
        assert!(file.is_same("a", "e"));
        let one = file.read(&["c"]).unwrap();
        assert_eq!((one[0].dtype, one[0].size.as_slice()), (Dtype::U8, &[1 << 20][..]));
        assert!(one[0].bytes.iter().all(|byte| *byte == 7));
        let error = file.read(&["a", "b", "c", "d", "e"]).unwrap_err();
        assert!(matches!(error, WeightsError::Repeated { .. }), "{error}");
        assert!(error.to_string().contains(&format!("the {len} bytes")), "{error}");
    }

    fn refusal(bytes: &[u8]) -> String {
        WeightsFile::from_bytes(Path::new("x"), bytes.to_vec()).unwrap_err().to_string()
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let safetensors = |header: &str, data: usize| {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.resize(bytes.len() + data, 0);
            bytes
        };
        let entry = |shape: &str, from: u64, to: u64| {
            format!(r#"{{"a":{{"dtype":"U8","shape":[{shape}],"data_offsets":[{from},{to}]}}}}"#)
        };
        let good = safetensors(&entry("2,3", 0, 6), 6);
        assert!(WeightsFile::from_bytes(Path::new("x"), good).is_ok());
        let huge = usize::MAX as u64;
        for bytes in [
            safetensors(&entry("2,3", 0, 6), 5),
            safetensors(&entry("2,3", 0, 6), 7),
            safetensors(&entry("2,3", 1, 7), 7),
            safetensors(&entry("2,3", 6, 0), 6),
            safetensors(&entry("9223372036854775807,2,9", 0, 6), 6),
            safetensors(&entry("0,18446744073709551615", 0, 0), 1),
            safetensors(&entry("2305843009213693951", 0, (1 << 61) - 1), 6),
            safetensors(&entry("", 0, huge), 6),
            safetensors("{", 0),
            [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat(),
            [(1_u64 << 40).to_le_bytes().as_slice(), b"{}"].concat(),
        ] {
            let said = refusal(&bytes);
            assert!(said.contains("is not a whole safetensors file"), "{said}");
        }
        // torch before 1.6: the list of keys without the storages' elements, and with a wrong count.
        let head = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}X\r\0\0\0little_endian\x88s.";
        let object =
            b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0kX\x03\0\0\0cpuK\x02NtQ.";
        let keys = b"\x80\x02]X\x01\0\0\0ka.";
        let legacy = |elements: &[u8]| [head.as_slice(), object, keys, elements].concat();
        let two = [2_i64.to_le_bytes().as_slice(), &[0; 8]].concat();
        assert!(WeightsFile::from_bytes(Path::new("x"), legacy(&two)).is_ok());
        for elements in
            [&two[..15], &two[..4], &[], &(-1_i64).to_le_bytes(), &i64::MAX.to_le_bytes()]
        {
            let said = refusal(&legacy(elements));
            assert!(said.contains("the storage \"k\" does not lie inside the file"), "{said}");
        }
        let said = refusal(&[head.as_slice(), object, b"\x80\x02]X\x01\0\0\0za."].concat());
        assert!(said.contains("storages of known element types"), "{said}");
        assert!(refusal(head).contains("truncated"));
    }
}
