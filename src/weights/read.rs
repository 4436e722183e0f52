//! Tensors of a foreign backbone, as this program's models take them.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use tch::{Kind, Tensor};

use super::{Choice, Dtype, WeightsError, WeightsFile};
use crate::config::{self, Backbone as Resnet, Stem};

/// A backbone that was read from a file.
#[derive(Debug)]
pub struct Backbone {
    /// torchvision's names (`conv1.weight`, `layer1.0.bn1.running_mean`, …) in ascending order, `f32`
    /// on the CPU; `num_batches_tracked` as `i64`, 0 where the file is older than that buffer.
    pub tensors: Vec<(String, Tensor)>,
    /// Where it stood in the file.
    choice: Choice,
    /// Element types that were made `f32`.
    converted: BTreeSet<Dtype>,
}

impl Backbone {
    /// What was read, for the person watching: `120 tensors below "module.encoder_q." (chosen before
    /// "module.encoder_k."; --init-prefix chooses another)`.
    pub fn describe(&self) -> String {
        let Choice { prefix, others, named_by, names } = &self.choice;
        let mut text = format!("{} tensors", names.len());
        if !prefix.is_empty() {
            text.push_str(&format!(" below {prefix:?}"));
        }
        if let Some(first) = others.first() {
            let more = match others.len() {
                1 => String::new(),
                n => format!(" and {} more", n - 1),
            };
            text.push_str(&format!(
                " (chosen before {first:?}{more}; --init-prefix chooses another)"
            ));
        }
        if let Some(named_by) = named_by {
            text.push_str(&format!(", {named_by}"));
        }
        let name = |dtype: &Dtype| match dtype {
            Dtype::F64 => "float64",
            Dtype::F16 => "float16",
            _ => "bfloat16",
        };
        if !self.converted.is_empty() {
            let from: Vec<&str> = self.converted.iter().map(name).collect();
            text.push_str(&format!(", converted from {} to float32", from.join(" and ")));
        }
        text
    }
}

/// Reads the backbone of a weights file: the one behind `prefix`, or else the one that was trained.
/// Heads and `fc` are dropped. Whether names and shapes fit a model is the model's question.
///
/// # Errors
/// [`WeightsError`] naming the file and the tensor.
pub fn read_backbone(path: &Path, prefix: Option<&str>) -> Result<Backbone, WeightsError> {
    let mut file = WeightsFile::open(path)?;
    let choice = file.backbone(prefix)?;
    let wanted: Vec<&str> = choice.names.iter().map(|(name, _)| name.as_str()).collect();
    let mut tensors = Vec::with_capacity(wanted.len());
    let mut converted = BTreeSet::new();
    for ((_, name), raw) in choice.names.iter().zip(file.read(&wanted)?) {
        let torch = |source: tch::TchError| WeightsError::Torch {
            path: path.to_path_buf(),
            tensor: name.clone(),
            source: Box::new(source),
        };
        let tensor = Tensor::f_from_data_size(&raw.bytes, &raw.size, kind(raw.dtype));
        tensors.push((name.clone(), normal(path, name, &tensor.map_err(torch)?)?));
        if matches!(raw.dtype, Dtype::F64 | Dtype::F16 | Dtype::BF16) {
            converted.insert(raw.dtype);
        }
    }
    let there: HashSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    let missing: Vec<String> = tensors
        .iter()
        .filter_map(|(name, _)| name.strip_suffix("running_mean"))
        .map(|norm| format!("{norm}num_batches_tracked"))
        .filter(|counter| !there.contains(counter.as_str()))
        .collect();
    let zero = || Tensor::from(0_i64);
    tensors.extend(missing.into_iter().map(|name| (name, zero())));
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(Backbone { tensors, choice, converted })
}

fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::Bool => Kind::Bool,
    }
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
    let torch = |source: tch::TchError| WeightsError::Torch {
        path: path.to_path_buf(),
        tensor: name.to_string(),
        source: Box::new(source),
    };
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

/// The network that a backbone's tensors are of: which ResNet, which stem, which width. `None` for other depths.
pub fn shape(backbone: &[(String, Tensor)]) -> Option<config::Model> {
    let find = |wanted: &str| backbone.iter().find(|(name, _)| name == wanted).map(|(_, t)| t);
    let blocks = [1, 2, 3, 4].map(|stage| {
        let conv = |block: &i32| format!("layer{stage}.{block}.conv1.weight");
        (0..).take_while(|block| find(&conv(block)).is_some()).count()
    });
    let bottleneck = find("layer1.0.conv3.weight").is_some();
    let resnet = match (blocks, bottleneck) {
        ([2, 2, 2, 2], false) => Resnet::Resnet18,
        ([3, 4, 6, 3], false) => Resnet::Resnet34,
        ([3, 4, 6, 3], true) => Resnet::Resnet50,
        ([3, 4, 23, 3], true) => Resnet::Resnet101,
        _ => return None,
    };
    let (width, stem) = match find("conv1.weight")?.size()[..] {
        [width, 3, 7, 7] => (width, Stem::Imagenet),
        [width, 3, 3, 3] => (width, Stem::Cifar),
        _ => return None,
    };
    Some(config::Model { backbone: resnet, stem, width, ..config::Model::default() })
}
