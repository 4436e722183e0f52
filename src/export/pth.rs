//! Writes `.pth` files that `torch.load(weights_only=True)` reads, with `mmap=True` as well: a zip
//! of stored records, 64-byte aligned, one folder deep. Format: torch's `torch/serialization.py`
//! and `caffe2/serialize/inline_container.cc`.
//!
//! The root is a plain dict. `torch::pickle_save` would tag it with a type that `weights_only`
//! refuses.

use std::io::{Cursor, Write};
use std::path::Path;

use tch::{Kind, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::pickle::Pickle;
use super::{ExportError, Origin, bytes, whole};

/// The folder that holds all records; torch reads its name from the file, whatever it is.
const ROOT: &str = "backbone";

/// torch aligns storages so that they can be used where they are mapped.
const ALIGNMENT: u16 = 64;

pub(super) fn write(
    path: &Path,
    tensors: &[(String, Tensor)],
    origin: &Origin,
) -> Result<(), ExportError> {
    let fault = |source| ExportError::Write { path: path.to_path_buf(), source };
    let zip_fault = |source| ExportError::Zip { path: path.to_path_buf(), source };
    let pickle = state_dict(tensors)?;
    let origin = serde_json::to_vec_pretty(origin).map_err(|error| fault(error.into()))?;
    whole::write(path, fault, |file| {
        // In memory: where a disk is full the writer would complain by itself.
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let mut record = |name: &str, data: &[u8]| {
            let options = SimpleFileOptions::default()
                .compression_method(CompressionMethod::Stored)
                .with_alignment(ALIGNMENT)
                .large_file(data.len() >= u32::MAX as usize);
            zip.start_file(format!("{ROOT}/{name}"), options).map_err(zip_fault)?;
            zip.write_all(data).map_err(fault)
        };
        record("data.pkl", &pickle)?;
        record("byteorder", b"little")?;
        for (index, (name, tensor)) in tensors.iter().enumerate() {
            record(&format!("data/{index}"), &bytes(name, tensor)?)?;
        }
        // Version 3 of the container is what torch has written since 1.6.
        record("version", b"3\n")?;
        // Readers ask for records by name, so one more is of no harm to them.
        record("detco.json", &origin)?;
        file.write_all(zip.finish().map_err(zip_fault)?.get_ref()).map_err(fault)
    })
}

fn state_dict(tensors: &[(String, Tensor)]) -> Result<Vec<u8>, ExportError> {
    let mut pickle = Pickle::new(2);
    pickle.empty_dict();
    pickle.mark();
    for (index, (name, tensor)) in tensors.iter().enumerate() {
        let size = tensor.size();
        pickle.text(name);
        pickle.global("torch._utils", "_rebuild_tensor_v2");
        pickle.mark();
        {
            pickle.mark();
            pickle.text("storage");
            pickle.global("torch", storage(name, tensor.kind())?);
            pickle.text(&index.to_string());
            pickle.text("cpu");
            pickle.int(size.iter().product());
            pickle.tuple();
            pickle.persistent();
        }
        pickle.int(0); // offset in the storage
        pickle.ints(&size);
        pickle.ints(&row_major(&size));
        pickle.bool(false); // requires_grad
        pickle.global("collections", "OrderedDict"); // backward hooks: none
        pickle.empty_tuple();
        pickle.reduce();
        pickle.tuple();
        pickle.reduce();
    }
    pickle.set_items();
    Ok(pickle.stop())
}

/// Strides of a row-major tensor, in elements.
fn row_major(size: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; size.len()];
    for dimension in (1..size.len()).rev() {
        strides[dimension - 1] = strides[dimension] * size[dimension].max(1);
    }
    strides
}

fn storage(name: &str, kind: Kind) -> Result<&'static str, ExportError> {
    match kind {
        Kind::Float => Ok("FloatStorage"),
        Kind::Int64 => Ok("LongStorage"),
        kind => Err(ExportError::Kind { tensor: name.to_string(), kind, format: ".pth" }),
    }
}
