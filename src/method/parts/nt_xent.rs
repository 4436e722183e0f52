//! NT-Xent: each of 2m unit vectors against its partner, with all others as negatives.
//!
//! Chen et al., 2020 (SimCLR), eq. 1 and algorithm 1: the mean over all 2m rows.

use tch::Tensor;

/// Rows `first` to below `first + rows` of `all` `[2m, d]`, in which rows 2i and 2i + 1 are partners: readings `[4]`
/// (means over these rows of the loss, the positive logit, the negative logits, and whether the positive is above every
/// negative), and the gradient `[rows, d]` of the mean over all rows by these, times `share`.
///
/// With P the softmax of each row's logits, zero on the diagonal, the gradient by row i is
/// `(sum_j (P_ij + P_ji) z_j - 2 z_partner(i)) / (2 m t)`: a row's own loss, and those of all rows that have it among
/// their negatives or as their partner.
pub fn score(
    all: &Tensor,
    (first, rows): (i64, i64),
    temperature: f64,
    share: f64,
) -> (Tensor, Tensor) {
    tch::no_grad(|| {
        let (logits, partner) = logits(all, temperature);
        let (count, kind) = (all.size()[0], all.kind());
        let own = |of: &Tensor| of.narrow(0, first, rows);
        let softmax = logits.softmax(1, None); // [2m, 2m]
        let both = own(&softmax) + softmax.narrow(1, first, rows).tr(); // [rows, 2m]
        let partners = all.index_select(0, &partner);
        let pull = both.matmul(all) - own(&partners) * 2.0;
        let gradient = pull * (share / (count as f64 * temperature));

        let logits = own(&logits);
        let places = own(&partner).unsqueeze(1);
        let positive = logits.gather(1, &places, false).squeeze_dim(1); // [rows]
        let loss = logits.logsumexp([1_i64].as_slice(), false) - &positive;
        let negatives = logits.scatter_value(1, &places, f64::NEG_INFINITY);
        let above = positive.gt_tensor(&negatives.amax([1_i64].as_slice(), false)).to_kind(kind);
        // The mean over products with all rows, less those with itself and the partner.
        let sums = own(all).matmul(&all.sum_dim_intlist([0].as_slice(), false, None)) / temperature;
        let itself = own(all).square().sum_dim_intlist([1].as_slice(), false, None) / temperature;
        let negative = (sums - itself - &positive) / (count - 2).max(1) as f64;
        let means = [loss, positive, negative, above].map(|of| of.mean(None));
        (Tensor::stack(&means, 0), gradient)
    })
}

/// Logits `[2m, 2m]` of unit vectors with each other, minus infinity with themselves, and each row's partner.
pub fn logits(all: &Tensor, temperature: f64) -> (Tensor, Tensor) {
    let places = Tensor::arange(all.size()[0], (tch::Kind::Int64, all.device()));
    let itself = places.unsqueeze(1).eq_tensor(&places.unsqueeze(0));
    let logits = all.matmul(&all.tr()) / temperature;
    (logits.masked_fill(&itself, f64::NEG_INFINITY), places.bitwise_xor(1))
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Reduction};

    use super::*;
    use crate::draws::Draws;

    fn unit(rows: i64) -> Tensor {
        let x = Draws::new(1, "rows", 0).normal(&[rows, 6], 1.0).to_kind(Kind::Double);
        &x / x.norm_scalaropt_dim(2, [1], true)
    }

    fn number(t: &Tensor) -> f64 {
        t.double_value(&[])
    }

    /// Whole, and in parts as ranks score it: the loss is autograd's definition, and gradients are its own.
    #[test]
    fn the_score_is_the_definition_and_its_gradient() {
        let leaf = unit(8).set_requires_grad(true);
        let (z, partner) = logits(&leaf, 0.3);
        let defined = z.cross_entropy_loss(&partner, None::<&Tensor>, Reduction::Mean, -100, 0.0);
        (&defined * 3.0).backward();
        let all = leaf.detach();
        for ranks in [1, 2, 4] {
            let rows = 8 / ranks;
            let parts = (0..ranks).map(|rank| score(&all, (rank * rows, rows), 0.3, 3.0));
            let (readings, gradients): (Vec<_>, Vec<_>) = parts.unzip();
            let readings = Tensor::stack(&readings, 0).mean_dim(0, false, None);
            assert!((number(&readings.get(0)) - number(&defined)).abs() < 1e-12);
            let off = (Tensor::cat(&gradients, 0) - leaf.grad()).abs().max();
            assert!(number(&off) < 1e-12, "{ranks} ranks: {off:?}");
            let z = z.detach();
            let positive = z.gather(1, &partner.unsqueeze(1), false);
            assert!((number(&readings.get(1)) - number(&positive.mean(None))).abs() < 1e-12);
            let rest = z.where_self(&z.isfinite(), &z.zeros_like()).sum(None) - positive.sum(None);
            assert!((number(&readings.get(2)) - number(&rest) / 48.0).abs() < 1e-12);
        }
    }

    #[test]
    fn rows_that_are_alike_lose_the_logarithm_of_the_others() {
        let same = Tensor::ones([10, 4], (Kind::Double, tch::Device::Cpu)) / 2.0;
        let loss = score(&same, (0, 10), 0.1, 1.0).0.double_value(&[0]);
        assert!((loss - 9_f64.ln()).abs() < 1e-12, "{loss}");
    }
}
