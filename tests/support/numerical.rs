//! What tests that compare numbers share: errors, and libtorch's threads.

use tch::{Kind, Tensor};

/// `max |a - b| / max |b|`, in float64; not a number where either holds one that is none.
pub(crate) fn error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.detach().to_kind(Kind::Double), b.detach().to_kind(Kind::Double));
    let scale = b.abs().max().double_value(&[]).max(f64::MIN_POSITIVE);
    (a - b).abs().max().double_value(&[]) / scale
}

/// Gives libtorch one thread, so that both sides of a comparison sum in the same order, or as many as
/// `cargo xtask test --threads` asks for; returns how many.
pub(crate) fn set_threads() -> i32 {
    let asked = std::env::var_os("DETCO_TEST_THREADS");
    let threads =
        asked.map_or(1, |text| text.to_str().and_then(|text| text.parse().ok()).expect("a number"));
    tch::set_num_threads(threads);
    threads
}
