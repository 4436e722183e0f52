//! Reads a backbone from other people's files, for `detco train --init` and `detco eval`.
//!
//! In: `.safetensors` or `.pth` (zip), from this program, torchvision, MoCo v1/v2 or anything that
//! saved a torchvision ResNet under a prefix. Out: torchvision's names, `f32`, heads and `fc`
//! dropped. Foreign files are data: nothing in them is run, and nothing in them panics.

mod pickle;
mod pth;

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use tch::{Kind, TchError, Tensor};
use thiserror::Error;

use crate::config::{self, Backbone, Stem};

pub use pickle::{PickleError, PickleFault};

/// Where programs keep their backbone. The first prefix with a `conv1.weight` behind it is taken.
const PREFIXES: &[&str] = &[
    // detco: exports have torchvision's bare names, checkpoints the encoder's.
    "",
    "query.backbone.",
    // MoCo v1 and v2, with and without DistributedDataParallel; the key encoder is never taken.
    "module.encoder_q.",
    "encoder_q.",
    // OpenSelfSup, mmselfsup, and the weights the DetCo authors released.
    "backbone.",
    "module.backbone.",
    "module.",
    "model.",
    "encoder.",
];

/// Picks, from all names of a file, those to read, each with the name it gets.
pub(crate) type Choose<'a> = dyn Fn(&[&str]) -> Result<Vec<(String, String)>, WeightsError> + 'a;

/// Why weights could not be read.
#[derive(Debug, Error)]
pub enum WeightsError {
    /// A folder, perhaps a run's.
    #[error("{path} is a folder: name a file; `detco export` writes a run's backbone to one")]
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
    /// Neither safetensors nor a torch zip.
    #[error("{path} is neither a safetensors file nor a .pth file of torch 1.6 or newer")]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// A bare pickle: torch's format before 1.6, or detectron2's.
    #[error(
        "{path} is a bare pickle (torch before 1.6, or a detectron2 .pkl), which is not supported; \
         save it again with torch 1.6 or newer: \
         torch.save(torch.load(\"old.pth\", map_location=\"cpu\"), \"new.pth\")"
    )]
    BarePickle {
        /// The file.
        path: PathBuf,
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
    /// The pickle in a `.pth` file is damaged or no state dict.
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
    /// No ResNet under any known prefix.
    #[error(
        "{path} holds no ResNet backbone: there is no conv1.weight, bare or below one of {prefixes}; \
         it holds {held}"
    )]
    NoBackbone {
        /// The file.
        path: PathBuf,
        /// The prefixes that were tried.
        prefixes: String,
        /// The first names in the file, and how many there are.
        held: String,
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
    #[error("{path}: {tensor}: {source}")]
    Torch {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What libtorch said.
        source: TchError,
    },
}

/// Reads the backbone of a weights file: torchvision's names (`conv1.weight`,
/// `layer1.0.bn1.running_mean`, …) in ascending order, `f32` on the CPU, `num_batches_tracked` as
/// `i64` (0 where the file is older than that buffer). Heads and `fc` are dropped. Whether names
/// and shapes fit a model is the model's question.
///
/// # Errors
/// [`WeightsError`] naming the file and the tensor.
pub fn read_backbone(path: &Path) -> Result<Vec<(String, Tensor)>, WeightsError> {
    if path.is_dir() {
        return Err(WeightsError::Folder { path: path.to_path_buf() });
    }
    let choose = |names: &[&str]| choose(path, names);
    let mut tensors = match sniff(path)? {
        Format::Safetensors => read_safetensors(path, &choose)?,
        Format::Zip => pth::read(path, &choose)?,
        Format::BarePickle => {
            return Err(WeightsError::BarePickle { path: path.to_path_buf() });
        }
        Format::Unknown => return Err(WeightsError::UnknownFormat { path: path.to_path_buf() }),
    };
    for (name, tensor) in &mut tensors {
        *tensor = normal(path, name, tensor)?;
    }
    let missing: Vec<String> = tensors
        .iter()
        .filter_map(|(name, _)| name.strip_suffix("running_mean"))
        .map(|norm| format!("{norm}num_batches_tracked"))
        .filter(|counter| !tensors.iter().any(|(name, _)| name == counter))
        .collect();
    let zero = || Tensor::from(0_i64);
    tensors.extend(missing.into_iter().map(|name| (name, zero())));
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(tensors)
}

enum Format {
    Safetensors,
    Zip,
    BarePickle,
    Unknown,
}

/// By content, not by name: people rename.
fn sniff(path: &Path) -> Result<Format, WeightsError> {
    let mut head = Vec::new();
    File::open(path)
        .and_then(|file| file.take(9).read_to_end(&mut head))
        .map_err(|source| WeightsError::Read { path: path.to_path_buf(), source })?;
    Ok(match head[..] {
        [b'P', b'K', 3, 4, ..] => Format::Zip,
        [.., b'{'] if head.len() == 9 => Format::Safetensors,
        [0x80, 2..=5, ..] => Format::BarePickle,
        _ => Format::Unknown,
    })
}

/// Which tensors to read, and what to call them: (name in the file, torchvision's name).
fn choose(path: &Path, names: &[&str]) -> Result<Vec<(String, String)>, WeightsError> {
    let anchored =
        |prefix: &str| names.iter().any(|name| name.strip_prefix(prefix) == Some("conv1.weight"));
    let Some(prefix) = PREFIXES.iter().find(|prefix| anchored(prefix)) else {
        let mut held = names.iter().take(3).copied().collect::<Vec<_>>().join(", ");
        if names.len() > 3 {
            // Writing to a String cannot fail.
            let _ = write!(held, ", … ({} tensors)", names.len());
        } else if names.is_empty() {
            held.push_str("no tensors");
        }
        let prefixes = PREFIXES[1..].join(" ");
        return Err(WeightsError::NoBackbone { path: path.to_path_buf(), prefixes, held });
    };
    let mut chosen = Vec::new();
    for name in names {
        let Some(bare) = name.strip_prefix(prefix) else { continue };
        if is_backbone(bare) {
            chosen.push((name.to_string(), bare.to_string()));
        } else if ["conv1.", "bn1.", "layer"].iter().any(|start| bare.starts_with(start)) {
            let tensor = name.to_string();
            return Err(WeightsError::Foreign { path: path.to_path_buf(), tensor });
        }
    }
    Ok(chosen)
}

/// Whether a name is one of a torchvision ResNet's without its `fc`.
pub fn is_backbone(name: &str) -> bool {
    let numbered = |part: &str, word: &str, most: &str| {
        part.strip_prefix(word).is_some_and(|n| n.len() == 1 && "1" <= n && n <= most)
    };
    let norm = |part: &str| {
        matches!(part, "weight" | "bias" | "running_mean" | "running_var" | "num_batches_tracked")
    };
    let parts: Vec<&str> = name.split('.').collect();
    match parts[..] {
        ["conv1", "weight"] => true,
        ["bn1", leaf] => norm(leaf),
        [layer, block, ref rest @ ..] => {
            let block = !block.is_empty() && block.bytes().all(|byte| byte.is_ascii_digit());
            numbered(layer, "layer", "4")
                && block
                && match *rest {
                    [conv, "weight"] if numbered(conv, "conv", "3") => true,
                    [bn, leaf] if numbered(bn, "bn", "3") => norm(leaf),
                    ["downsample", "0", "weight"] => true,
                    ["downsample", "1", leaf] => norm(leaf),
                    _ => false,
                }
        }
        _ => false,
    }
}

/// The network that a backbone's tensors are of: which ResNet, which stem, which width. As
/// evaluation needs it: no patches, one head. `None` for other depths.
pub fn shape(backbone: &[(String, Tensor)]) -> Option<config::Model> {
    let find = |wanted: &str| backbone.iter().find(|(name, _)| name == wanted).map(|(_, t)| t);
    let blocks = [1, 2, 3, 4].map(|stage| {
        let conv = |block: &i32| format!("layer{stage}.{block}.conv1.weight");
        (0..).take_while(|block| find(&conv(block)).is_some()).count()
    });
    let bottleneck = find("layer1.0.conv3.weight").is_some();
    let resnet = match (blocks, bottleneck) {
        ([2, 2, 2, 2], false) => Backbone::Resnet18,
        ([3, 4, 6, 3], false) => Backbone::Resnet34,
        ([3, 4, 6, 3], true) => Backbone::Resnet50,
        ([3, 4, 23, 3], true) => Backbone::Resnet101,
        _ => return None,
    };
    let (width, stem) = match find("conv1.weight")?.size()[..] {
        [width, 3, 7, 7] => (width, Stem::Imagenet),
        [width, 3, 3, 3] => (width, Stem::Cifar),
        _ => return None,
    };
    Some(config::Model {
        backbone: resnet,
        stem,
        width,
        levels: vec![5],
        local: false,
        ..config::Model::default()
    })
}

fn read_safetensors(
    path: &Path,
    choose: &Choose<'_>,
) -> Result<Vec<(String, Tensor)>, WeightsError> {
    let bytes = std::fs::read(path)
        .map_err(|source| WeightsError::Read { path: path.to_path_buf(), source })?;
    let refused = |source| WeightsError::Safetensors { path: path.to_path_buf(), source };
    // Checks that header, offsets, shapes and file length agree.
    let file = safetensors::SafeTensors::deserialize(&bytes).map_err(refused)?;
    let mut tensors = Vec::new();
    for (name, new) in choose(&file.names())? {
        let view = file.tensor(&name).map_err(refused)?;
        let dtype = || WeightsError::Dtype {
            path: path.to_path_buf(),
            tensor: name.clone(),
            dtype: format!("{:?}", view.dtype()),
        };
        let kind = kind(view.dtype()).ok_or_else(dtype)?;
        let size = view.shape().iter().map(|n| i64::try_from(*n)).collect::<Result<Vec<_>, _>>();
        let tensor = Tensor::f_from_data_size(view.data(), &size.map_err(|_| dtype())?, kind)
            .map_err(|source| WeightsError::Torch {
                path: path.to_path_buf(),
                tensor: name.clone(),
                source,
            })?;
        tensors.push((new, tensor));
    }
    Ok(tensors)
}

fn kind(dtype: safetensors::Dtype) -> Option<Kind> {
    use safetensors::Dtype;
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        _ => return None,
    })
}

/// `f32` for weights and statistics, `i64` for counters; finite.
fn normal(path: &Path, name: &str, tensor: &Tensor) -> Result<Tensor, WeightsError> {
    let counter = name.ends_with("num_batches_tracked");
    let kind = tensor.kind();
    let fits = match kind {
        Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16 => !counter,
        Kind::Int64 | Kind::Int => counter,
        _ => false,
    };
    if !fits {
        return Err(WeightsError::Dtype {
            path: path.to_path_buf(),
            tensor: name.to_string(),
            dtype: format!("{kind:?}"),
        });
    }
    let torch =
        |source| WeightsError::Torch { path: path.to_path_buf(), tensor: name.to_string(), source };
    let target = if counter { Kind::Int64 } else { Kind::Float };
    let normal = tensor.f_to_kind(target).map_err(torch)?;
    if !counter {
        let finite = normal.f_isfinite().and_then(|mask| mask.f_all()).map_err(torch)?;
        if i64::try_from(finite).map_err(torch)? == 0 {
            return Err(WeightsError::NotFinite {
                path: path.to_path_buf(),
                tensor: name.to_string(),
            });
        }
    }
    Ok(normal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_a_resnet_and_no_others() {
        for name in [
            "conv1.weight",
            "bn1.num_batches_tracked",
            "layer1.0.conv3.weight",
            "layer4.22.bn2.running_var",
            "layer2.0.downsample.0.weight",
            "layer2.0.downsample.1.bias",
        ] {
            assert!(is_backbone(name), "{name}");
        }
        for name in [
            "fc.weight",
            "conv1.bias",
            "layer5.0.conv1.weight",
            "layer1.0.conv4.weight",
            "layer1..conv1.weight",
            "layer1.0.se.weight",
            "layer1.0.downsample.0.bias",
            "layer1.0",
            "",
        ] {
            assert!(!is_backbone(name), "{name}");
        }
    }

    #[test]
    fn the_query_encoder_is_chosen_and_the_key_encoder_left() {
        let names = ["module.encoder_k.conv1.weight", "module.encoder_q.conv1.weight"];
        let names = [names[0], names[1], "module.encoder_q.fc.0.weight", "module.queue"];
        let chosen = choose(Path::new("x"), &names).unwrap();
        assert_eq!(chosen, [(names[1].to_string(), "conv1.weight".to_string())]);
        let error = choose(Path::new("x"), &["conv1.weight", "layer1.0.se.weight"]).unwrap_err();
        assert!(error.to_string().contains("layer1.0.se.weight"), "{error}");
        let error = choose(Path::new("x"), &["a", "b", "c", "d"]).unwrap_err();
        assert!(error.to_string().contains("a, b, c, … (4 tensors)"), "{error}");
    }
}
