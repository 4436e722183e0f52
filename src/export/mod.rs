//! Export of the backbone for other programs.
//!
//! torchvision's names are read by torchvision, timm, mmdetection, OpenSelfSup and this program's own
//! `--init`; detectron2 has its own names. Heads and queues are not exported, and the key encoder's
//! backbone only on request. [`configs`] writes folders with which those engines train detectors.

pub mod configs;
mod detectron2;
pub mod hints;
mod pickle;
mod pth;
mod safetensors;
pub(crate) mod whole;

use std::path::{Path, PathBuf};

use tch::{Device, Kind, TchError, Tensor};
use thiserror::Error;

pub use crate::export_format::{Format, Table};
use crate::weights::is_backbone;

/// Why weights could not be exported.
#[derive(Debug, Error)]
pub enum ExportError {
    /// The file could not be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The zip inside a `.pth` file could not be written.
    #[error("cannot write {path}: {source}")]
    Zip {
        /// The file.
        path: PathBuf,
        /// What the zip writer said.
        source: zip::result::ZipError,
    },
    /// The extension does not belong to the format.
    #[error("{path}: {format} weights are written as {expected}")]
    Extension {
        /// The file.
        path: PathBuf,
        /// Name of the format.
        format: &'static str,
        /// The extensions it has.
        expected: &'static str,
    },
    /// The checkpoint has no tensors of that encoder.
    #[error("there is no {prefix}conv1.weight among the tensors of the checkpoint")]
    NoBackbone {
        /// Prefix of the encoder's backbone.
        prefix: &'static str,
    },
    /// A tensor whose name torchvision's ResNets do not have.
    #[error("{tensor} is not a tensor of a torchvision ResNet backbone")]
    Foreign {
        /// Name of the tensor.
        tensor: String,
    },
    /// An element type that the format cannot hold.
    #[error("{tensor}: {format} files here hold no {kind:?} tensors")]
    Kind {
        /// Name of the tensor.
        tensor: String,
        /// Element type.
        kind: Kind,
        /// Name of the format.
        format: &'static str,
    },
    /// libtorch refused to hand out a tensor's bytes.
    #[error("{tensor}: {source}")]
    Torch {
        /// Name of the tensor.
        tensor: String,
        /// What libtorch said.
        source: TchError,
    },
}

/// Which of the two encoders.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoder {
    /// The one that is trained: what the papers evaluate.
    #[default]
    Query,
    /// Its moving average.
    Key,
}

impl Encoder {
    fn prefix(self) -> &'static str {
        match self {
            Encoder::Query => "query.backbone.",
            Encoder::Key => "key.backbone.",
        }
    }
}

/// The origin of the weights, stored in the file where the format has room for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Origin {
    /// Version of this program.
    pub detco: String,
    /// Backbone, as the config names it.
    pub backbone: String,
    /// `query` or `key`.
    pub encoder: String,
    /// Recipe or file the run was started from, where known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// The file of weights they were read from, where it was no run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Finished epochs.
    pub epoch: u32,
    /// Finished steps.
    pub step: u64,
}

impl Origin {
    /// A line for people.
    pub fn describe(&self) -> String {
        let Origin { detco, backbone, encoder, recipe, file, epoch, step } = self;
        match file {
            Some(file) => format!("detco {detco}: {backbone} of {file}"),
            None => {
                let what = recipe.as_deref().unwrap_or(backbone);
                format!("detco {detco}: {what}, {encoder} encoder, epoch {epoch}, step {step}")
            }
        }
    }
}

/// The backbone among a checkpoint's tensors, under torchvision's names, in ascending order.
///
/// # Errors
/// [`ExportError::NoBackbone`] when there is none, [`ExportError::Foreign`] for a tensor in it that
/// torchvision's ResNets do not have.
pub fn backbone(
    tensors: &[(String, Tensor)],
    encoder: Encoder,
) -> Result<Vec<(String, Tensor)>, ExportError> {
    let prefix = encoder.prefix();
    let mut found: Vec<(String, Tensor)> = tensors
        .iter()
        .filter_map(|(name, tensor)| {
            Some((name.strip_prefix(prefix)?.to_string(), tensor.shallow_clone()))
        })
        .collect();
    if !found.iter().any(|(name, _)| name == "conv1.weight") {
        return Err(ExportError::NoBackbone { prefix });
    }
    if let Some((name, _)) = found.iter().find(|(name, _)| !is_backbone(name)) {
        return Err(ExportError::Foreign { tensor: format!("{prefix}{name}") });
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// Writes a backbone (torchvision's names, any device) to `path`, whole or not at all: beside the
/// target first, then renamed over it. The extension chooses the container.
///
/// # Errors
/// [`ExportError`]; `path` is then as it was before.
pub fn write(
    path: &Path,
    format: Format,
    backbone: &[(String, Tensor)],
    origin: &Origin,
) -> Result<(), ExportError> {
    if let Some((name, _)) = backbone.iter().find(|(name, _)| !is_backbone(name)) {
        return Err(ExportError::Foreign { tensor: name.clone() });
    }
    container(path, format)?(path, backbone, origin)
}

/// Checks the extension before any work is done.
///
/// # Errors
/// [`ExportError::Extension`].
pub fn check(path: &Path, format: Format) -> Result<(), ExportError> {
    container(path, format).map(|_| ())
}

type Write = fn(&Path, &[(String, Tensor)], &Origin) -> Result<(), ExportError>;

fn container(path: &Path, format: Format) -> Result<Write, ExportError> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let wrong = |format, expected| {
        Err(ExportError::Extension { path: path.to_path_buf(), format, expected })
    };
    match (format, extension) {
        (Format::Torchvision, "safetensors") => Ok(safetensors::write),
        (Format::Torchvision | Format::Mmdet, "pth" | "pt") => Ok(pth::write),
        (Format::Detectron2, "pkl") => Ok(detectron2::write),
        (Format::Torchvision, _) => wrong("torchvision", ".safetensors, .pth or .pt"),
        (Format::Detectron2, _) => wrong("detectron2", ".pkl"),
        (Format::Mmdet, _) => wrong("mmdetection", ".pth"),
    }
}

/// A tensor's elements, row-major, little-endian.
pub(crate) fn bytes(name: &str, tensor: &Tensor) -> Result<Vec<u8>, ExportError> {
    let torch = |source| ExportError::Torch { tensor: name.to_string(), source };
    let tensor = tensor.detach().f_to(Device::Cpu).and_then(|t| t.f_contiguous()).map_err(torch)?;
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel()).map_err(torch)?;
    Ok(bytes)
}
