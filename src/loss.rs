//! InfoNCE over levels and scopes: DetCo's twelve terms.
//!
//! Pure. van den Oord et al., 2018; He et al., 2020 (MoCo), eq. 1; Xie et al., 2021 (DetCo),
//! eqs. 1 to 5.

use std::fmt;

use tch::{Kind, Reduction, Tensor};

use crate::model::{Queues, Scope};

/// Which query meets which key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pair {
    /// Crop query, crop key, crop negatives (DetCo, eq. 2).
    GlobalGlobal,
    /// Patch query, patch key, patch negatives (eq. 5).
    LocalLocal,
    /// Patch query, crop key, crop negatives (eq. 4). There is no term the other way round.
    GlobalLocal,
}

impl Pair {
    /// All of them, or, without patches, the first.
    pub fn all(local: bool) -> &'static [Pair] {
        const ALL: [Pair; 3] = [Pair::GlobalGlobal, Pair::LocalLocal, Pair::GlobalLocal];
        if local { &ALL } else { &ALL[..1] }
    }

    fn query(self) -> Scope {
        match self {
            Pair::GlobalGlobal => Scope::Global,
            Pair::LocalLocal | Pair::GlobalLocal => Scope::Local,
        }
    }

    fn key(self) -> Scope {
        match self {
            Pair::LocalLocal => Scope::Local,
            Pair::GlobalGlobal | Pair::GlobalLocal => Scope::Global,
        }
    }
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pair::GlobalGlobal => "gg",
            Pair::LocalLocal => "ll",
            Pair::GlobalLocal => "gl",
        })
    }
}

/// Embeddings of the same n samples, `[n, d]` for each level; `local` is empty without patches.
#[derive(Debug)]
pub struct Embeddings {
    /// Of crops.
    pub global: Vec<Tensor>,
    /// Of patch sets.
    pub local: Vec<Tensor>,
}

impl Embeddings {
    /// Those of one scope.
    pub fn of(&self, scope: Scope) -> &[Tensor] {
        match scope {
            Scope::Global => &self.global,
            Scope::Local => &self.local,
        }
    }

    /// Samples `start` to below `start + length`.
    pub fn narrow(&self, start: i64, length: i64) -> Embeddings {
        let part = |of: &[Tensor]| of.iter().map(|t| t.narrow(0, start, length)).collect();
        Embeddings { global: part(&self.global), local: part(&self.local) }
    }
}

/// One of the terms: a level and a pair.
#[derive(Debug)]
pub struct Contrast {
    /// Position in the model's levels.
    pub index: usize,
    /// Who meets whom.
    pub pair: Pair,
    /// `[n, 1 + k]`, the positive in column 0, divided by the temperature.
    pub logits: Tensor,
    /// Mean cross-entropy with column 0 as the class, a scalar.
    pub loss: Tensor,
}

/// All terms, level by level, each in the order of [`Pair::all`].
pub fn contrast(
    query: &Embeddings,
    key: &Embeddings,
    queues: &Queues,
    temperature: f64,
) -> Vec<Contrast> {
    let pairs = Pair::all(!query.local.is_empty());
    let levels = 0..query.global.len();
    let of = |index: usize, pair: &Pair| {
        let negatives = &queues.rings(pair.key())[index];
        let (q, k) = (&query.of(pair.query())[index], &key.of(pair.key())[index]);
        let logits = logits(q, k, negatives, temperature);
        let loss = info_nce(&logits);
        Contrast { index, pair: *pair, logits, loss }
    };
    levels.flat_map(|index| pairs.iter().map(move |pair| of(index, pair))).collect()
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

/// The loss of DetCo, eq. 1: level weights times plain sums of the terms. A scalar.
pub fn total(terms: &[Contrast], level_weights: &[f64]) -> Tensor {
    let weighted: Vec<Tensor> =
        terms.iter().map(|term| &term.loss * level_weights[term.index]).collect();
    Tensor::stack(&weighted, 0).sum(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Draws;

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
