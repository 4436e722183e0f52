//! Reads a backbone from other people's files, for `detco train --init` and `detco eval`.
//!
//! In: `.safetensors`, `.pth` (torch's zip and its format from before 1.6) or `.pkl`, from this
//! program, torchvision, MoCo, detectron2 or anything that saved a ResNet under some prefix. Out:
//! torchvision's names, `f32`, heads and `fc` dropped. Foreign files are data: nothing in them is
//! run, and nothing in them panics. What reads them needs no libtorch.

mod file;
mod names;
mod pickle;
#[cfg(feature = "train")]
mod read;

use std::path::PathBuf;

use thiserror::Error;

pub use file::{RawTensor, WeightsFile};
pub use names::{Choice, is_backbone};
pub use pickle::{PickleError, PickleFault};
#[cfg(feature = "train")]
pub use read::{Backbone, read_backbone, shape};

/// An element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the names are the types'")]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Dtype {
    /// Bytes an element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 => 2,
            Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
        }
    }
}

impl WeightsFile {
    /// Chooses the backbone to read: the one behind `prefix`, or else the one that was trained.
    /// Returns its prefix and its names, in the file and in torchvision.
    ///
    /// # Errors
    /// [`WeightsError`] when there is none, or several of which none is the one.
    pub fn backbone(&self, prefix: Option<&str>) -> Result<Choice, WeightsError> {
        let all: Vec<&str> = self.names().collect();
        names::choose(self.path(), &all, prefix, &|one, other| self.is_same(one, other))
    }
}

/// Why weights could not be read.
#[derive(Debug, Error)]
pub enum WeightsError {
    /// A folder that is neither a run's nor a checkpoint's.
    #[error("{path} is a folder without a checkpoint: name a run's folder, or a file of weights")]
    Folder {
        /// The folder.
        path: PathBuf,
    },
    /// The file could not be opened or read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither safetensors nor anything of torch's.
    #[error("{path} is no file of weights (.safetensors, .pth or .pkl): {what}")]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// What it looks like, and what to do.
        what: &'static str,
    },
    /// A damaged zip.
    #[error("{path} is not a whole .pth file: {source}")]
    Zip {
        /// The file.
        path: PathBuf,
        /// What the zip reader said.
        source: zip::result::ZipError,
    },
    /// A zip without `<name>/data.pkl`.
    #[error("{path} is a zip, but not one that torch.save wrote: it holds no <name>/data.pkl")]
    NoPickle {
        /// The file.
        path: PathBuf,
    },
    /// Written on a big-endian machine.
    #[error("{path} was written on a big-endian machine, which is not supported")]
    ByteOrder {
        /// The file.
        path: PathBuf,
    },
    /// A record that torch would not have written so.
    #[error("{path}: the record {record} is compressed; torch stores records as they are")]
    Record {
        /// The file.
        path: PathBuf,
        /// Name in the zip.
        record: String,
    },
    /// The pickle in a `.pth` file is damaged.
    #[error("{path}: {source}")]
    Pickle {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: PickleError,
    },
    /// A damaged safetensors file.
    #[error("{path} is not a whole safetensors file: {source}")]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        source: safetensors::SafeTensorError,
    },
    /// A storage that is shorter than its tensor.
    #[error("{path}: {tensor} needs {need} bytes, the record {record} holds {have}")]
    Storage {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Name of the storage's record.
        record: String,
        /// Bytes the storage should have.
        need: usize,
        /// Bytes it has.
        have: usize,
    },
    /// A file of torch before 1.6 that ends within its elements.
    #[error(
        "{path}: offset {offset}: the storage {key:?} does not lie inside the file: is the file whole?"
    )]
    Short {
        /// The file.
        path: PathBuf,
        /// The storage's key.
        key: String,
        /// Where it should begin.
        offset: u64,
    },
    /// Tensors that would take more than the file holds.
    #[error(
        "{path}: with {tensor}, more would be read than the {len} bytes that the file has: its \
         tensors name the same bytes again and again"
    )]
    Repeated {
        /// The file.
        path: PathBuf,
        /// The tensor that is too much.
        tensor: String,
        /// Bytes of the file.
        len: u64,
    },
    /// A name that the file does not have.
    #[error("{path} holds no tensor {tensor}")]
    NoTensor {
        /// The file.
        path: PathBuf,
        /// The name.
        tensor: String,
    },
    /// A tensor that reaches beyond its storage.
    #[error(
        "{path}: {tensor} (offset {offset}, size {size:?}, stride {stride:?}) does not lie inside \
         its storage of {storage} elements"
    )]
    Window {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// First element.
        offset: i64,
        /// Size of each dimension.
        size: Vec<i64>,
        /// Stride of each dimension, in elements.
        stride: Vec<i64>,
        /// Elements of the storage.
        storage: i64,
    },
    /// An element type that weights do not have.
    #[error("{path}: {tensor} has the element type {dtype}, which weights do not have")]
    Dtype {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// The element type, as the file names it.
        dtype: String,
    },
    /// No ResNet, whatever stands before its names.
    #[error(
        "{path} holds no ResNet backbone: no conv1.weight and layer1.0.conv1.weight behind one prefix \
         (nor the names of detectron2, of transformers, or numbers of an nn.Sequential); it holds {held}"
    )]
    NoBackbone {
        /// The file.
        path: PathBuf,
        /// The first names in the file, and how many there are.
        held: String,
    },
    /// Several backbones, none of which is the one to take.
    #[error(
        "{path} holds several ResNet backbones, below {known}\nhint: --init-prefix names the one to \
         read"
    )]
    Ambiguous {
        /// The file.
        path: PathBuf,
        /// Their prefixes.
        known: String,
    },
    /// Nothing below the prefix that was asked for.
    #[error("{path} holds no ResNet backbone below {prefix:?}, but below {known}")]
    NoSuchPrefix {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        prefix: String,
        /// Those that there are.
        known: String,
    },
    /// Inside the backbone, but not of a torchvision ResNet.
    #[error(
        "{path}: {tensor} does not belong to a torchvision ResNet: another network (SE blocks, \
         deep stem, …)?"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Name of the tensor in the file.
        tensor: String,
    },
    /// NaN or infinity among the weights.
    #[error("{path}: {tensor} holds values that are not finite")]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
    },
    /// libtorch refused.
    #[cfg(feature = "train")]
    #[error("{path}: {tensor}: {source}")]
    Torch {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What libtorch said.
        source: Box<tch::TchError>,
    },
}
