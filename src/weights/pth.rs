//! Reads `.pth` files: a zip of one small pickle and one raw record a storage (torch ≥ 1.6).
//!
//! Only the storages of tensors that are asked for are read: a MoCo checkpoint's optimizer stays
//! on disk.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use tch::Tensor;
use zip::{CompressionMethod, ZipArchive};

use super::WeightsError;
use super::pickle::{self, TensorRef};

/// An opened `.pth` file.
pub(super) struct Pth {
    path: PathBuf,
    zip: ZipArchive<BufReader<File>>,
    /// The folder that torch puts all records in, with its slash.
    root: String,
    file_len: u64,
    /// The storage read last: neighbours in a state dict often share one.
    last: Option<(String, Vec<u8>)>,
}

impl Pth {
    pub(super) fn open(path: &Path) -> Result<Pth, WeightsError> {
        let read = |source| WeightsError::Read { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(read)?;
        let file_len = file.metadata().map_err(read)?.len();
        let zip = ZipArchive::new(BufReader::new(file))
            .map_err(|source| WeightsError::Zip { path: path.to_path_buf(), source })?;
        let root = zip
            .file_names_raw()
            .filter_map(|name| std::str::from_utf8(name).ok()?.strip_suffix("data.pkl"))
            .find(|root| root.ends_with('/') && root.matches('/').count() == 1)
            .map(str::to_string)
            .ok_or_else(|| WeightsError::NoPickle { path: path.to_path_buf() })?;
        Ok(Pth { path: path.to_path_buf(), zip, root, file_len, last: None })
    }

    /// The bytes of the pickle, for [`pickle::tensors`].
    pub(super) fn pickle(&mut self) -> Result<Vec<u8>, WeightsError> {
        if let Some(order) = self.record("byteorder")?
            && order != b"little"
        {
            return Err(WeightsError::ByteOrder { path: self.path.clone() });
        }
        let missing = WeightsError::NoPickle { path: self.path.clone() };
        self.record("data.pkl")?.ok_or(missing)
    }

    /// One tensor, contiguous, in its own element type.
    pub(super) fn tensor(
        &mut self,
        name: &str,
        tensor: &TensorRef<'_>,
    ) -> Result<Tensor, WeightsError> {
        let window = window(tensor).ok_or_else(|| WeightsError::Window {
            path: self.path.clone(),
            tensor: name.to_string(),
            offset: tensor.offset,
            size: tensor.size.clone(),
            stride: tensor.stride.clone(),
            storage: tensor.storage_len,
        })?;
        let key = format!("data/{}", tensor.key);
        let bytes = match self.last.take() {
            Some((last, bytes)) if last == key => bytes,
            _ => self.record(&key)?.unwrap_or_default(),
        };
        let need = window.storage_len * tensor.kind.elt_size_in_bytes();
        if bytes.len() < need {
            return Err(WeightsError::Storage {
                path: self.path.clone(),
                tensor: name.to_string(),
                record: key,
                need,
                have: bytes.len(),
            });
        }
        let torch = |source| WeightsError::Torch {
            path: self.path.clone(),
            tensor: name.to_string(),
            source,
        };
        // `bytes` holds at least `storage_len` elements: checked above.
        let storage =
            Tensor::f_from_data_size(&bytes, &[tensor.storage_len], tensor.kind).map_err(torch)?;
        let tensor = storage
            .f_as_strided(&tensor.size, &tensor.stride, tensor.offset)
            .and_then(|view| view.f_contiguous())
            .map_err(torch)?;
        self.last = Some((key, bytes));
        Ok(tensor)
    }

    /// The bytes of a record, or `None` where there is none of that name.
    fn record(&mut self, name: &str) -> Result<Option<Vec<u8>>, WeightsError> {
        let full = format!("{}{name}", self.root);
        let Some(index) = self.zip.index_for_name(&full) else { return Ok(None) };
        let zip = |source| WeightsError::Zip { path: self.path.clone(), source };
        let mut entry = self.zip.by_index(index).map_err(zip)?;
        // torch stores records as they are; with a compressed one the size is a mere claim.
        if entry.compression() != CompressionMethod::Stored || entry.size() > self.file_len {
            return Err(WeightsError::Record { path: self.path.clone(), record: full });
        }
        let mut bytes = Vec::new();
        entry
            .read_to_end(&mut bytes)
            .map_err(|source| WeightsError::Read { path: self.path.clone(), source })?;
        Ok(Some(bytes))
    }
}

struct Window {
    storage_len: usize,
}

/// Checks that the tensor lies inside its storage and is not larger than it, so that neither a
/// wild index nor a zero stride (a terabyte from one element) reaches libtorch.
fn window(tensor: &TensorRef<'_>) -> Option<Window> {
    let storage_len = usize::try_from(tensor.storage_len).ok()?;
    // The byte length must be a size as well.
    storage_len.checked_mul(tensor.kind.elt_size_in_bytes())?;
    if tensor.size.len() != tensor.stride.len() || tensor.offset < 0 {
        return None;
    }
    let (mut count, mut last) = (1_i64, tensor.offset);
    for (size, stride) in tensor.size.iter().zip(&tensor.stride) {
        if *size < 0 || *stride < 0 {
            return None;
        }
        count = count.checked_mul(*size)?;
        last = last.checked_add((size - 1).max(0).checked_mul(*stride)?)?;
    }
    let inside = count == 0 || (last < tensor.storage_len && count <= tensor.storage_len);
    inside.then_some(Window { storage_len })
}

/// The tensors that `choose` picks among the names in the file, under the names it gives them.
pub(super) fn read(
    path: &Path,
    choose: &super::Choose<'_>,
) -> Result<Vec<(String, Tensor)>, WeightsError> {
    let mut file = Pth::open(path)?;
    let bytes = file.pickle()?;
    let tensors = pickle::tensors(&bytes)
        .map_err(|source| WeightsError::Pickle { path: path.to_path_buf(), source })?;
    let names: Vec<&str> = tensors.keys().map(String::as_str).collect();
    choose(&names)?
        .into_iter()
        .filter_map(|(name, new)| tensors.get(&name).map(|tensor| (name, new, tensor)))
        .map(|(name, new, tensor)| Ok((new, file.tensor(&name, tensor)?)))
        .collect()
}
