//! Writes `.safetensors`: a length, a JSON header, the bytes
//! (<https://github.com/huggingface/safetensors#format>).
//!
//! Written by hand rather than through the crate, whose metadata is a `HashMap`: the same weights
//! shall give the same file.

use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use super::{ExportError, Origin, bytes, whole};

pub(super) fn write(
    path: &Path,
    tensors: &[(String, Tensor)],
    origin: &Origin,
) -> Result<(), ExportError> {
    let fault = |source| ExportError::Write { path: path.to_path_buf(), source };
    // Wide elements first, then by name: every tensor then starts at a multiple of its element.
    let mut order: Vec<&(String, Tensor)> = tensors.iter().collect();
    order.sort_by_key(|(name, tensor)| {
        (std::cmp::Reverse(tensor.kind().elt_size_in_bytes()), name.as_str())
    });
    // Values are strings by the format; "format": "pt" is what Hugging Face's loaders look for.
    let origin = serde_json::to_string(origin).map_err(|error| fault(error.into()))?;
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt", "detco": origin }));
    let mut end = 0;
    for (name, tensor) in &order {
        let start = end;
        end += tensor.numel() * tensor.kind().elt_size_in_bytes();
        let entry = json!({
            "dtype": dtype(name, tensor.kind())?,
            "shape": tensor.size(),
            "data_offsets": [start, end],
        });
        header.insert(name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    whole::write(path, fault, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(fault)?;
        file.write_all(&header).map_err(fault)?;
        for (name, tensor) in order {
            file.write_all(&bytes(name, tensor)?).map_err(fault)?;
        }
        Ok(())
    })
}

fn dtype(name: &str, kind: Kind) -> Result<&'static str, ExportError> {
    match kind {
        Kind::Float => Ok("F32"),
        Kind::Int64 => Ok("I64"),
        kind => Err(ExportError::Kind { tensor: name.to_string(), kind, format: "safetensors" }),
    }
}
