//! The names of a file of weights, by its format.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use safetensors::tensor::Metadata;
use safetensors::{Dtype as SafeDtype, SafeTensorError};
use zip::ZipArchive;

use super::super::pickle::{Data, Pickle, PickleError, PickleFault, TensorRef};
use super::super::{Dtype, WeightsError};
use super::{Input, Source, bytes_of, record};

/// What torch's older format begins with, as an integer.
const MAGIC: &[u8] = &[0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// The only version that it ever had.
const PROTOCOL: i64 = 1001;
/// Of a pickle, bytes that are read first. Those of torch's older format are followed by the
/// elements, which need not be in memory.
const HEAD: u64 = 1 << 20;

pub(super) type Opened = (BTreeMap<String, TensorRef>, Source);

/// What a file is that holds no weights in a form that is known.
pub(super) fn unknown(path: &Path, head: &[u8]) -> WeightsError {
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

pub(super) fn open_safetensors(
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
pub(super) fn open_zip(
    path: &Path,
    input: Box<dyn Input>,
    len: u64,
) -> Result<Opened, WeightsError> {
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

/// A bare pickle: torch's format before 1.6, or arrays within a pickle.
pub(super) fn open_pickle(
    path: &Path,
    mut input: Box<dyn Input>,
    len: u64,
) -> Result<Opened, WeightsError> {
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
