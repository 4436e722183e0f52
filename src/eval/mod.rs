//! How good is the backbone: without training anything more on it; and average precision of anybody's detections.

pub mod ap;
pub mod attention;
pub mod classes;
pub mod detect;
pub mod features;
pub mod knn;
pub mod linear;
pub mod pictures;
pub mod rankme;
pub mod report;
pub mod svm;
pub mod voc;

use sha2::{Digest as _, Sha256};
use tch::{Kind, Tensor};

use crate::shim::ShimError;

/// SHA-256 of tensors, in hexadecimal: of their names in sorted order, their shapes and their elements. The same
/// backbone has the same one whatever file it was read from. A frozen backbone keeps it.
///
/// # Errors
/// When libtorch fails.
pub fn digest(tensors: &[(String, Tensor)]) -> Result<String, ShimError> {
    let mut sorted: Vec<&(String, Tensor)> = tensors.iter().collect();
    sorted.sort_by_key(|(name, _)| name.as_str());
    let mut hash = Sha256::new();
    for (name, tensor) in sorted {
        let flat = tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
        hash.update(format!("{name} {:?} {:?}\n", flat.kind(), flat.size()));
        let flat = flat.f_view(-1)?;
        // Counters are 64-bit integers; the rest is compared as the bits of float64, which every other kind fits.
        if flat.kind() == Kind::Int64 {
            let values = Vec::<i64>::try_from(&flat)?;
            values.iter().for_each(|value| hash.update(value.to_le_bytes()));
        } else {
            let values = Vec::<f64>::try_from(&flat.f_to_kind(Kind::Double)?)?;
            values.iter().for_each(|value| hash.update(value.to_le_bytes()));
        }
    }
    Ok(detco_shards::files::hex(&hash.finalize()))
}
