//! InfoNCE: a query against its key and a queue of negatives.
//!
//! Written down twice. [`score`] trains: it gives the gradients of the queries themselves, and holds
//! the logits of one term at a time, `[n, k]`, where an automatic gradient would keep those of all.
//! [`contrast`] is the definition, with the logits whole, for whoever wants to look at them.
//!
//! Pure. van den Oord et al., 2018; He et al., 2020 (MoCo), eq. 1.

use tch::{Kind, Reduction, Tensor};

/// Queries `[n, d]` that meet keys `[n, d]` and the negatives of a queue `[d, k]`.
#[derive(Clone, Copy, Debug)]
pub struct Term<'a> {
    /// The queries.
    pub query: &'a Tensor,
    /// Their keys.
    pub key: &'a Tensor,
    /// The negatives.
    pub queue: &'a Tensor,
    /// Weight in the loss.
    pub weight: f64,
}

/// A term by its definition.
#[derive(Debug)]
pub struct Contrast {
    /// `[n, 1 + k]`, the positive in column 0, divided by the temperature.
    pub logits: Tensor,
    /// Mean cross-entropy with column 0 as the class, a scalar.
    pub loss: Tensor,
    /// Weight in the loss.
    pub weight: f64,
}

/// Terms by their definition.
pub fn contrast(terms: &[Term<'_>], temperature: f64) -> Vec<Contrast> {
    let of = |term: &Term<'_>| {
        let logits = logits(term.query, term.key, term.queue, temperature);
        let loss = info_nce(&logits);
        Contrast { logits, loss, weight: term.weight }
    };
    terms.iter().map(of).collect()
}

/// Queries and their keys `[n, d]`, negatives `[d, k]`, to logits `[n, 1 + k]`.
pub fn logits(query: &Tensor, key: &Tensor, negatives: &Tensor, temperature: f64) -> Tensor {
    let positive = (query * key).sum_dim_intlist([1].as_slice(), true, None); // [n, 1]
    let negative = query.matmul(negatives); // [n, d] x [d, k] -> [n, k]
    Tensor::cat(&[positive, negative], 1) / temperature // [n, 1 + k]
}

/// Mean cross-entropy of logits `[n, 1 + k]` with column 0 as the class.
pub fn info_nce(logits: &Tensor) -> Tensor {
    let class = Tensor::zeros([logits.size()[0]], (Kind::Int64, logits.device()));
    logits.cross_entropy_loss(&class, None::<&Tensor>, Reduction::Mean, -100, 0.0)
}

/// The sum of all terms times their weights, a scalar.
pub fn total(terms: &[Contrast]) -> Tensor {
    let weighted: Vec<Tensor> = terms.iter().map(|term| &term.loss * term.weight).collect();
    Tensor::stack(&weighted, 0).sum(None)
}

/// Terms of one shape and their gradients, without a graph and without more than one term's logits at a time:
/// readings `[terms, 4]` (the loss; the mean positive logit; the mean negative logit; the share of samples whose
/// positive is above every negative), and the gradients of the weighted sum by each term's queries, times `share`.
///
/// With `z` the negatives' logits of a sample, `p = softmax(z)`, `m = log sum exp z` and `z0` the
/// positive's, a cross-entropy with the positive as the class is `log(1 + exp(m - z0))`, and has by the query
/// the gradient `sigmoid(m - z0) (sum_j p_j queue_j - key) / t`: one product of the `[n, k]` probabilities with
/// the queue. Keys and queues have no gradient.
///
/// The positive stays apart since it would give each row an odd length, of which a GPU's products are slow.
pub fn score(terms: &[Term<'_>], temperature: f64, share: f64) -> (Tensor, Vec<Tensor>) {
    tch::no_grad(|| {
        let stacked = |of: fn(&Term<'_>) -> Tensor| {
            Tensor::stack(&terms.iter().map(of).collect::<Vec<_>>(), 0) // [terms, n, d]
        };
        let query = stacked(|term| term.query.shallow_clone());
        let key = stacked(|term| term.key.shallow_clone());
        let (n, kind) = (query.size()[1], query.kind());
        let mean = |of: &Tensor, dim: i64| of.mean_dim([dim].as_slice(), false, None);
        let sum = |of: &Tensor, dim: i64| of.sum_dim_intlist([dim].as_slice(), false, None);
        let scaled = &query / temperature;
        let positive = sum(&(&scaled * &key), 2); // [terms, n]
        // The mean of products is the product of means.
        let centres: Vec<Tensor> = terms.iter().map(|term| mean(term.queue, 1)).collect();
        let negative_mean = sum(&(mean(&scaled, 1) * Tensor::stack(&centres, 0)), 1); // [terms]

        // One term's logits and their softmax: the only memory of that size, used again for each term.
        let logits = Tensor::empty([n, terms[0].queue.size()[1]], (kind, query.device()));
        let softmax = logits.empty_like();
        let largest = |of: &Tensor| of.amax([1_i64].as_slice(), false);
        let (mut tops, mut top_shares, mut pulls) = (Vec::new(), Vec::new(), Vec::new());
        for (index, term) in terms.iter().enumerate() {
            let _ = scaled.get(index as i64).mm_out(&logits, term.queue); // [n, d] x [d, k] -> [n, k]
            let _ = logits.internal_softmax_out(&softmax, 1, false);
            tops.push(largest(&logits));
            top_shares.push(largest(&softmax));
            pulls.push(softmax.mm(&term.queue.tr())); // [n, k] x [k, d] -> [n, d]
        }
        let [top, top_share, pull] = [tops, top_shares, pulls].map(|all| Tensor::stack(&all, 0));
        // log sum exp of the negatives, less the positive, [terms, n]. Logits are large and near each other:
        // their difference comes first.
        let margin = (&top - &positive) - top_share.log();
        let loss = margin.logaddexp(&margin.zeros_like());
        let gradient = margin.sigmoid().unsqueeze(2) * (pull - &key); // [terms, n, d]
        let first = positive.gt_tensor(&top);
        let first = first.to_kind(kind);
        let readings = [mean(&loss, 1), mean(&positive, 1), negative_mean, mean(&first, 1)];
        let readings = Tensor::stack(&readings, 1);
        let factor = share / (n as f64 * temperature);
        let weighted = terms.iter().enumerate();
        let weighted =
            weighted.map(|(index, term)| gradient.get(index as i64) * (factor * term.weight));
        (readings, weighted.collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draws::Draws;

    /// The definition, in loops over f64.
    #[test]
    fn info_nce_is_its_definition() {
        let (n, d, k, temperature) = (5_usize, 4_usize, 7_usize, 0.3);
        let [query, key, ring] = [("q", [n, d]), ("k", [n, d]), ("r", [d, k])]
            .map(|(name, s)| Draws::new(1, name, 0).normal(&[s[0] as i64, s[1] as i64], 0.7));
        let at = |t: &Tensor, i: usize, j: usize| t.double_value(&[i as i64, j as i64]);
        let found = logits(&query, &key, &ring, temperature);
        let mut loss = 0.0;
        for row in 0..n {
            let dot = |other: &dyn Fn(usize) -> f64| {
                (0..d).map(|i| at(&query, row, i) * other(i)).sum::<f64>() / temperature
            };
            let mut expected = vec![dot(&|i| at(&key, row, i))];
            expected.extend((0..k).map(|column| dot(&|i| at(&ring, i, column))));
            for (column, expected) in expected.iter().enumerate() {
                assert!((at(&found, row, column) - expected).abs() < 1e-5);
            }
            let sum: f64 = expected.iter().map(|z| z.exp()).sum();
            loss += (sum.ln() - expected[0]) / n as f64;
        }
        assert!((info_nce(&found).double_value(&[]) - loss).abs() < 1e-5);
    }
}
