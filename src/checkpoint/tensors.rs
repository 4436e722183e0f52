//! Tensors of a checkpoint as safetensors, written one at a time and read back.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, View};
use tch::{Kind, Tensor};

use super::error::{CheckpointError, io_error};
use super::state::FileRecord;

pub(super) fn write_tensors(
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
pub(super) fn checksum_of(file: &mut File) -> io::Result<(u64, u32)> {
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
    pub(super) name: &'a str,
    pub(super) tensor: &'a Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
    failed: &'a RefCell<Option<String>>,
}

impl<'a> Stored<'a> {
    pub(super) fn new(
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

pub(super) fn parse_tensors(bytes: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
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
