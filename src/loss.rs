//! InfoNCE over levels and scopes: DetCo's twelve terms.
//!
//! Written down twice. [`score`] trains: it gives the gradients of the query embeddings themselves,
//! and holds the logits of one term at a time, `[n, k]`, where an automatic gradient would keep
//! those of all twelve. [`contrast`] is the definition, with the logits whole, for whoever wants to
//! look at them.
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

    /// All tensors, crops first.
    pub fn all(&self) -> Vec<Tensor> {
        self.global.iter().chain(&self.local).map(Tensor::shallow_clone).collect()
    }

    /// The same values without their history.
    pub fn detach(&self) -> Embeddings {
        let detached = |of: &[Tensor]| of.iter().map(Tensor::detach).collect();
        Embeddings { global: detached(&self.global), local: detached(&self.local) }
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

/// Readings of a term, in the order of [`Scores::readings`].
pub const READINGS: usize = 4;

/// What a training step wants of the terms.
#[derive(Debug)]
pub struct Scores {
    /// `[terms, 4]`, in the order of [`contrast`]: loss; mean positive logit; mean negative logit;
    /// share of samples whose positive is above every negative.
    pub readings: Tensor,
    /// Of the [`total`] loss, by each query embedding, in its shape.
    pub gradients: Embeddings,
}

/// Scales of [`score`].
#[derive(Clone, Copy, Debug)]
pub struct Scale<'a> {
    /// Logits are divided by this.
    pub temperature: f64,
    /// One weight for each level.
    pub level_weights: &'a [f64],
    /// Share of the update that these samples are: gradients are multiplied by it, readings not.
    pub share: f64,
}

/// Terms and their gradients, without a graph and without more than one term's logits at a time.
///
/// With `z` the negatives' logits of a sample, `p = softmax(z)`, `m = log sum exp z` and `z0` the
/// positive's, a cross-entropy with the positive as the class is `log(1 + exp(m - z0))`, and has by the query
/// the gradient `sigmoid(m - z0) (sum_j p_j queue_j - key) / t`: one product of the `[n, k]` probabilities with
/// the queue. Keys and queues have no gradient.
///
/// The positive stays apart since it would give each row an odd length, of which a GPU's products are slow.
pub fn score(query: &Embeddings, key: &Embeddings, queues: &Queues, scale: Scale<'_>) -> Scores {
    tch::no_grad(|| {
        let levels = query.global.len();
        let mut readings = Vec::new();
        let (mut global, mut local): (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
        for &pair in Pair::all(!query.local.is_empty()) {
            let (queries, keys) = (query.of(pair.query()), key.of(pair.key()));
            let (reading, gradient) = score_pair(queries, keys, queues.rings(pair.key()), scale);
            readings.push(reading);
            let sum = if pair.query() == Scope::Global { &mut global } else { &mut local };
            match sum.is_empty() {
                true => sum.extend(gradient.unbind(0)),
                false => {
                    sum.iter_mut().zip(gradient.unbind(0)).for_each(|(sum, more)| *sum += more)
                }
            }
        }
        let terms = (levels * readings.len()) as i64;
        let readings = Tensor::stack(&readings, 1).reshape([terms, READINGS as i64]);
        Scores { readings, gradients: Embeddings { global, local } }
    })
}

/// One pair at all levels: readings `[levels, 4]` and gradients `[levels, n, d]`.
fn score_pair(
    queries: &[Tensor],
    keys: &[Tensor],
    rings: &[Tensor],
    scale: Scale<'_>,
) -> (Tensor, Tensor) {
    let (query, key) = (Tensor::stack(queries, 0), Tensor::stack(keys, 0)); // [levels, n, d]
    let (levels, n, kind) = (query.size()[0], query.size()[1], query.kind());
    let mean = |of: &Tensor, dim: i64| of.mean_dim([dim].as_slice(), false, None);
    let sum = |of: &Tensor, dim: i64| of.sum_dim_intlist([dim].as_slice(), false, None);
    let scaled = &query / scale.temperature;
    let positive = sum(&(&scaled * &key), 2); // [levels, n]
    // The mean of products is the product of means.
    let centres: Vec<Tensor> = rings.iter().map(|ring| mean(ring, 1)).collect();
    let negative_mean = sum(&(mean(&scaled, 1) * Tensor::stack(&centres, 0)), 1); // [levels]

    // One term's logits and their softmax: the only memory of that size, used again for each level.
    let logits = Tensor::empty([n, rings[0].size()[1]], (kind, query.device()));
    let softmax = logits.empty_like();
    let largest = |of: &Tensor| of.amax([1_i64].as_slice(), false);
    let (mut tops, mut top_shares, mut pulls) = (Vec::new(), Vec::new(), Vec::new());
    for (level, ring) in rings.iter().enumerate() {
        let _ = scaled.get(level as i64).mm_out(&logits, ring); // [n, d] x [d, k] -> [n, k]
        let _ = logits.internal_softmax_out(&softmax, 1, false);
        tops.push(largest(&logits));
        top_shares.push(largest(&softmax));
        pulls.push(softmax.mm(&ring.tr())); // [n, k] x [k, d] -> [n, d]
    }
    let [top, top_share, pull] = [tops, top_shares, pulls].map(|all| Tensor::stack(&all, 0));
    // log sum exp of the negatives, less the positive, [levels, n]. Logits are large and near each other:
    // their difference comes first.
    let margin = (&top - &positive) - top_share.log();
    let loss = margin.logaddexp(&margin.zeros_like());
    let gradient = margin.sigmoid().unsqueeze(2) * (pull - &key); // [levels, n, d]
    let first = positive.gt_tensor(&top);
    let first = first.to_kind(kind);
    let readings = [mean(&loss, 1), mean(&positive, 1), negative_mean, mean(&first, 1)];
    let readings = Tensor::stack(&readings, 1);
    let factor = scale.share / (n as f64 * scale.temperature);
    let weighted: Vec<Tensor> = (0..levels)
        .map(|level| gradient.get(level) * (factor * scale.level_weights[level as usize]))
        .collect();
    (readings, Tensor::stack(&weighted, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::model::{Draws, Model};

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

    /// Losses, readings and gradients against autograd on the definition, in float64 and float32,
    /// at mild and at sharp temperatures.
    #[test]
    fn scores_are_the_definition_and_its_gradient() {
        let sets = ["model.levels=[4, 5]", "loss.level_weights=[0.5, 2.0]", "model.dim=16"];
        let more = [
            "train.batch=8",
            "loss.queue=48",
            "model.bn_splits=4",
            "model.backbone=resnet18",
            "model.width=4",
        ];
        let sets: Vec<String> = sets.iter().chain(&more).map(ToString::to_string).collect();
        let config = Config::load("detco-r50", &sets).unwrap();
        for (kind, bound) in [(Kind::Double, 1e-12), (Kind::Float, 2e-6)] {
            for temperature in [0.2, 0.07, 0.001] {
                let mut model = Model::new(&config, tch::Device::Cpu).unwrap();
                model.convert(kind);
                let unit = |name: &str| {
                    let x = Draws::new(1, name, 0).normal(&[6, 16], 1.0).to_kind(kind);
                    &x / x.norm_scalaropt_dim(2, [1], true)
                };
                let draw = |side: &str| Embeddings {
                    global: (0..2).map(|l| unit(&format!("{side}.g{l}"))).collect(),
                    local: (0..2).map(|l| unit(&format!("{side}.l{l}"))).collect(),
                };
                let (query, key) = (draw("query"), draw("key"));
                let leaves = query.all();
                leaves.iter().for_each(|leaf| drop(leaf.set_requires_grad(true)));
                let terms = contrast(&query, &key, &model.queues, temperature);
                (total(&terms, &config.loss.level_weights) / 2.0).backward();
                let weights = &config.loss.level_weights;
                let scale = Scale { temperature, level_weights: weights, share: 0.5 };
                let scores = score(&query.detach(), &key, &model.queues, scale);
                compare(&terms, &leaves, &scores, bound);
            }
        }
    }

    fn compare(terms: &[Contrast], leaves: &[Tensor], scores: &Scores, bound: f64) {
        let number = |t: &Tensor| t.to_kind(Kind::Double).double_value(&[]);
        let close = |found: &Tensor, expected: &Tensor, what: &str| {
            let off = number(&(found - expected).abs().max());
            let off = off / number(&expected.abs().max()).max(1e-3);
            assert!(off < bound, "{what}: {off:e}");
        };
        assert_eq!(scores.readings.size(), [terms.len() as i64, READINGS as i64]);
        for (row, term) in terms.iter().enumerate() {
            let found = |column| scores.readings.get(row as i64).get(column);
            let positive = term.logits.select(1, 0);
            let negative = term.logits.narrow(1, 1, term.logits.size()[1] - 1);
            let first = positive.gt_tensor(&negative.amax([1_i64].as_slice(), false));
            close(&found(0), &term.loss.detach(), "loss");
            close(&found(1), &positive.detach().mean(None), "positive");
            close(&found(2), &negative.detach().mean(None), "negative");
            close(&found(3), &first.to_kind(term.loss.kind()).mean(None), "accuracy");
        }
        for (leaf, gradient) in leaves.iter().zip(scores.gradients.all()) {
            close(&gradient, &leaf.grad(), "gradient");
        }
    }
}
