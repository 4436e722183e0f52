//! Writes the `.pkl` that detectron2's checkpointer reads: `{"model": {name: array}, "__author__",
//! "matching_heuristics": True}`, with detectron2's names for a ResNet.
//!
//! `matching_heuristics` lets detectron2 match these names by their ends, whatever its model puts
//! before them (`backbone.bottom_up.`, `backbone.`).

use std::io::Write;
use std::path::Path;

use tch::{Kind, Tensor};

use super::pickle::Pickle;
use super::{ExportError, Origin, bytes, whole};

pub(super) fn write(
    path: &Path,
    tensors: &[(String, Tensor)],
    origin: &Origin,
) -> Result<(), ExportError> {
    let fault = |source| ExportError::Write { path: path.to_path_buf(), source };
    let mut pickle = Pickle::new(3); // the oldest with `bytes`
    pickle.empty_dict();
    pickle.mark();
    pickle.text("model");
    pickle.empty_dict();
    pickle.mark();
    whole::write(path, fault, |file| {
        for (name, tensor) in tensors {
            pickle.text(&rename(name));
            array(&mut pickle, name, tensor)?;
            file.write_all(&pickle.drain()).map_err(fault)?;
        }
        pickle.set_items();
        pickle.text("__author__");
        pickle.text(&origin.describe());
        pickle.text("matching_heuristics");
        pickle.bool(true);
        pickle.set_items();
        file.write_all(&pickle.stop()).map_err(fault)
    })
}

/// torchvision's name → detectron2's. The stem keeps its names below `stem.`, stages count from
/// Res2, a norm belongs to its convolution.
fn rename(name: &str) -> String {
    let mut parts: Vec<&str> = name.split('.').collect();
    let stage;
    match parts[0].strip_prefix("layer").and_then(|n| n.parse::<u32>().ok()) {
        Some(n) => {
            stage = format!("res{}", n + 1);
            parts[0] = &stage;
        }
        None => parts.insert(0, "stem"),
    }
    let mut renamed: Vec<String> = Vec::with_capacity(parts.len() + 1);
    let mut rest = parts.iter().peekable();
    while let Some(part) = rest.next() {
        match (*part, rest.peek()) {
            ("downsample", Some(index)) => {
                renamed.push("shortcut".into());
                if **index == "1" {
                    renamed.push("norm".into());
                }
                rest.next();
            }
            (part, _) => match part.strip_prefix("bn") {
                Some(n) => renamed.extend([format!("conv{n}"), "norm".into()]),
                None => renamed.push(part.into()),
            },
        }
    }
    renamed.join(".")
}

/// A NumPy array as NumPy itself pickles one: rebuilt empty, then given its state. The module is
/// `numpy.core`, which NumPy 1 has and NumPy 2 keeps for old pickles.
fn array(pickle: &mut Pickle, name: &str, tensor: &Tensor) -> Result<(), ExportError> {
    let kind = tensor.kind();
    let refused = || ExportError::Kind { tensor: name.to_string(), kind, format: "detectron2" };
    let dtype = match kind {
        Kind::Float => "f4",
        Kind::Int64 => "i8",
        _ => return Err(refused()),
    };
    let raw = bytes(name, tensor)?;
    let len = u32::try_from(raw.len()).map_err(|_| refused())?;
    pickle.global("numpy.core.multiarray", "_reconstruct");
    pickle.mark();
    pickle.global("numpy", "ndarray");
    pickle.ints(&[0]);
    pickle.bytes(1);
    pickle.extend(b"b");
    pickle.tuple();
    pickle.reduce();
    pickle.mark();
    pickle.int(1); // version of the state
    pickle.ints(&tensor.size());
    {
        pickle.global("numpy", "dtype");
        pickle.mark();
        pickle.text(dtype);
        pickle.bool(false);
        pickle.bool(true);
        pickle.tuple();
        pickle.reduce();
        pickle.mark();
        pickle.int(3); // version of the state
        pickle.text("<");
        pickle.none();
        pickle.none();
        pickle.none();
        pickle.int(-1);
        pickle.int(-1);
        pickle.int(0);
        pickle.tuple();
        pickle.build();
    }
    pickle.bool(false); // not Fortran order
    pickle.bytes(len);
    pickle.extend(&raw);
    pickle.tuple();
    pickle.build();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::rename;

    #[test]
    fn names_are_detectron2s() {
        for (ours, theirs) in [
            ("conv1.weight", "stem.conv1.weight"),
            ("bn1.running_mean", "stem.conv1.norm.running_mean"),
            ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
            ("layer3.22.bn3.bias", "res4.22.conv3.norm.bias"),
            ("layer4.0.downsample.0.weight", "res5.0.shortcut.weight"),
            ("layer4.0.downsample.1.running_var", "res5.0.shortcut.norm.running_var"),
        ] {
            assert_eq!(rename(ours), theirs);
        }
    }
}
