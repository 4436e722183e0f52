//! Swapped prediction: the code of one view from the scores of the others, and how many prototypes are in use.
//!
//! Caron et al., 2020 (SwAV), eqs. 1 and 2.

use tch::{Kind, Tensor};

/// Swapped prediction of codes `[n, k]` of the first views from the scores `[n, views, k]` of all others: the loss
/// (the mean cross-entropy over these pairs of views), the share of pairs in which the likeliest prototype is that of
/// the code, and the gradient `[n views, k]` by the scores of the mean over all ranks' samples, times `share`:
/// `(softmax - code) / (t n pairs)` of each pair.
pub fn score(
    scores: &Tensor,
    codes: &[Tensor],
    temperature: f64,
    (all, share): (i64, f64),
) -> (Tensor, Tensor, Tensor) {
    tch::no_grad(|| {
        let (n, views, kind) = (scores.size()[0], scores.size()[1], scores.kind());
        let pairs = codes.len() as i64 * (views - 1);
        let log_p = (scores / temperature).log_softmax(2, None);
        let likeliest = log_p.argmax(2, false); // [n, views]
        let (first, of) = (codes.len() as i64, (kind, scores.device()));
        let mut right = Tensor::zeros([n], of);
        let mut wanted = Vec::new();
        for view in 0..views {
            let mut sum = Tensor::zeros([n, scores.size()[2]], of);
            for (_, code) in (0..).zip(codes).filter(|(own, _)| *own != view) {
                let hit = likeliest.select(1, view).eq_tensor(&code.argmax(1, false));
                right += hit.to_kind(kind);
                sum += code;
            }
            wanted.push(sum);
        }
        let wanted = Tensor::stack(&wanted, 1); // [n, views, k]: codes that this view predicts
        let loss = -(&wanted * &log_p).sum(None) / (n * pairs) as f64;
        // Codes that a view predicts: all, but for its own.
        let own = Tensor::full([first], (first - 1) as f64, of);
        let others = Tensor::full([views - first], first as f64, of);
        let mut gradient = log_p.exp() * Tensor::cat(&[own, others], 0).view([1, -1, 1]);
        let mut gradient = gradient.g_sub_(&wanted);
        let factor = share / (temperature * (all * pairs) as f64);
        let gradient = gradient.g_mul_scalar_(factor).flatten(0, 1);
        (loss, right.mean(None) / pairs as f64, gradient)
    })
}

/// Prototypes in use, by what is predicted: the exponential of the entropy of the mean softmax of scores `[b, k]`, from
/// 1 (one for all) to k.
pub fn perplexity(scores: &Tensor, temperature: f64) -> Tensor {
    let mean = (scores / temperature).softmax(1, None).mean_dim([0_i64].as_slice(), false, None);
    (-(&mean * mean.clamp_min(1e-30).log()).sum(None)).exp()
}

/// Prototypes that are the nearest of at least one row.
pub fn used(scores: &Tensor) -> Tensor {
    let mut used = Tensor::zeros([scores.size()[1]], (Kind::Float, scores.device()));
    let used = used.index_fill_(0, &scores.argmax(1, false), 1.0);
    used.sum(None).to_kind(scores.kind())
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::super::sinkhorn;
    use super::*;
    use crate::draws::Draws;

    fn draw(name: &str, shape: &[i64]) -> Tensor {
        Draws::new(1, name, 0).normal(shape, 1.0).to_kind(Kind::Double)
    }

    fn number(t: &Tensor) -> f64 {
        t.double_value(&[])
    }

    /// The paper's eq. 2, pair by pair, by autograd: with small views and without, whole and as two ranks score it.
    #[test]
    fn the_score_is_the_definition_and_its_gradient() {
        for views in [2, 5] {
            let leaf = draw("scores", &[6, views, 7]).set_requires_grad(true);
            let codes = ["a", "b"].map(|name| draw(name, &[6, 7]).softmax(1, None));
            let mut defined = Tensor::zeros([], (Kind::Double, Device::Cpu));
            for (i, code) in (0..).zip(&codes) {
                for view in (0..views).filter(|view| *view != i) {
                    let log_p = (leaf.select(1, view) / 0.2).log_softmax(1, None);
                    defined -= (code * log_p).sum(None) / 6.0 / (2 * (views - 1)) as f64;
                }
            }
            (&defined * 2.0).backward();
            for ranks in [1, 2] {
                let n = 6 / ranks;
                let parts = (0..ranks).map(|rank| {
                    let own = |of: &Tensor| of.detach().narrow(0, rank * n, n);
                    score(&own(&leaf), &codes.each_ref().map(own), 0.2, (6, 2.0))
                });
                let parts: Vec<_> = parts.collect();
                let loss = parts.iter().map(|part| number(&part.0)).sum::<f64>() / ranks as f64;
                assert!((loss - number(&defined)).abs() < 1e-12);
                let gradients: Vec<&Tensor> = parts.iter().map(|part| &part.2).collect();
                let off = Tensor::cat(&gradients, 0) - leaf.grad().flatten(0, 1);
                assert!(number(&off.abs().max()) < 1e-12, "{views} views, {ranks} ranks");
            }
        }
    }

    #[test]
    fn scores_that_say_nothing_lose_the_logarithm_of_the_prototypes() {
        let none = Tensor::zeros([4, 8, 3000], (Kind::Double, Device::Cpu));
        let code = || sinkhorn::codes(&draw("code", &[4, 3000]), 0.05, 3);
        let (loss, _, gradient) = score(&none, &[code(), code()], 0.1, (4, 1.0));
        assert!((number(&loss) - 3000_f64.ln()).abs() < 1e-9, "{loss:?}");
        // What pulls and what pushes is as much.
        assert!(number(&gradient.sum(None)).abs() < 1e-12);
    }

    #[test]
    fn prototypes_in_use_are_counted() {
        let even = Tensor::eye(8, (Kind::Double, Device::Cpu));
        assert!((number(&perplexity(&even, 0.01)) - 8.0).abs() < 1e-6);
        assert_eq!(number(&used(&even)), 8.0);
        let one = even.get(3).expand([8, 8], false).contiguous();
        assert!((number(&perplexity(&one, 0.01)) - 1.0).abs() < 1e-6);
        assert_eq!(number(&used(&one)), 1.0);
    }
}
