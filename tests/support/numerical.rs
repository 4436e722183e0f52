//! What tests that compare numbers share: pictures, errors, and libtorch's threads.

use detco::model::Draws;
use tch::{Kind, Tensor};

/// Images `[..., 3, edge, edge]` that differ as photographs do: large blobs of colour, and noise on top.
/// Pure noise would give every sample nearly the same features, and gradients that are nothing but
/// rounding. Views of the same pictures have the same blobs.
pub(crate) fn picture(mut blobs: Draws, mut noise: Draws, shape: &[i64]) -> Tensor {
    let (edge, n) = (shape[shape.len() - 1], shape[..shape.len() - 3].iter().product::<i64>());
    let blobs = blobs.normal(&[n, 3, 4, 4], 1.0);
    let blobs = blobs.upsample_bilinear2d([edge, edge], false, None, None);
    (blobs + noise.normal(&[n, 3, edge, edge], 0.3)).reshape(shape)
}

/// `max |a - b| / max |b|`, in float64; not a number where either holds one that is none.
pub(crate) fn error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.detach().to_kind(Kind::Double), b.detach().to_kind(Kind::Double));
    let scale = b.abs().max().double_value(&[]).max(f64::MIN_POSITIVE);
    (a - b).abs().max().double_value(&[]) / scale
}

/// Gives libtorch one thread, or as many as `cargo xtask test --threads` asks for; returns how many.
pub(crate) fn set_threads() -> i32 {
    let asked = std::env::var_os("DETCO_TEST_THREADS");
    let threads =
        asked.map_or(1, |text| text.to_str().and_then(|text| text.parse().ok()).expect("a number"));
    tch::set_num_threads(threads);
    threads
}
