//! Codes of equal use: the assignment of samples to prototypes by the Sinkhorn-Knopp algorithm.
//!
//! Caron et al., 2020 (SwAV), eqs. 3 to 5; Cuturi, 2013.

use tch::Tensor;

/// Codes `[b, k]` of scores `[b, k]`: after `rounds` rounds, each of which gives every prototype the same share of all
/// samples and then every sample a sum of 1. A smaller `epsilon` makes them sharper.
///
/// In logarithms, so that no exponential overflows or vanishes, however small `epsilon` is.
pub fn codes(scores: &Tensor, epsilon: f64, rounds: i64) -> Tensor {
    tch::no_grad(|| {
        let mut log = scores / epsilon;
        for _ in 0..rounds {
            // Constants, as the share's size, fall out with the next sum.
            let of_prototypes = log.logsumexp([0_i64].as_slice(), true);
            let mut even = log.g_sub_(&of_prototypes);
            let of_samples = even.logsumexp([1_i64].as_slice(), true);
            log = even.g_sub_(&of_samples);
        }
        log.exp_()
    })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::draws::Draws;

    fn scores(b: i64, k: i64) -> Tensor {
        Draws::new(1, "scores", 0).normal(&[b, k], 0.3).to_kind(Kind::Double).clamp(-1.0, 1.0)
    }

    fn worst(t: &Tensor) -> f64 {
        t.abs().max().double_value(&[])
    }

    /// As the paper writes it: a matrix of exponentials, its rows and columns divided by their sums in turn.
    #[test]
    fn codes_are_their_definition() {
        let scores = scores(12, 5);
        let mut q = (&scores / 0.3).exp().tr(); // [k, b]
        q = &q / q.sum(None);
        for _ in 0..3 {
            q = &q / q.sum_dim_intlist([1].as_slice(), true, None) / 5.0;
            q = &q / q.sum_dim_intlist([0].as_slice(), true, None) / 12.0;
        }
        assert!(worst(&(codes(&scores, 0.3, 3) - (q * 12.0).tr())) < 1e-12);
    }

    #[test]
    fn every_sample_has_a_sum_of_1_and_prototypes_come_to_equal_shares() {
        let scores = scores(24, 6);
        let sums = |q: &Tensor, dim: i64| q.sum_dim_intlist([dim].as_slice(), false, None);
        let three = codes(&scores, 0.05, 3);
        assert!(worst(&(sums(&three, 1) - 1.0)) < 1e-12);
        let off = worst(&(sums(&three, 0) - 4.0));
        assert!(off < 2.0, "nearly: {off}");
        assert!(worst(&(sums(&codes(&scores, 0.05, 300), 0) - 4.0)) < 0.01 * off.max(1e-3));
        // A number that is added to all scores changes nothing.
        assert!(worst(&(codes(&(&scores + 7.0), 0.05, 3) - three)) < 1e-9);
    }

    /// Where a matrix of exponentials has infinities, or rows of zeros: others' codes were not numbers here.
    #[test]
    fn a_small_epsilon_gives_numbers_in_float32() {
        for epsilon in [0.05, 0.03, 0.005, 0.0005] {
            let found = codes(&scores(16, 8).to_kind(Kind::Float), epsilon, 3);
            assert!(bool::try_from(found.isfinite().all()).unwrap(), "{epsilon}");
            let sums = found.sum_dim_intlist([1].as_slice(), false, None);
            assert!(worst(&(sums - 1.0)) < 1e-5, "{epsilon}");
        }
    }

    #[test]
    fn scores_that_say_nothing_give_even_codes() {
        let found = codes(&Tensor::zeros([4, 10], (Kind::Double, Device::Cpu)), 0.05, 3);
        assert!(worst(&(found - 0.1)) < 1e-12);
    }
}
