//! SwAV: the code of one view among prototypes is predicted from the other views.
//!
//! Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020, eqs. 2 to
//! 5. Two large views give codes, all views predict them. No teacher; codes are of the samples of all ranks, and of
//! earlier ones' from the queues.

use serde::{Deserialize, Serialize};
#[cfg(feature = "train")]
use tch::Tensor;

#[cfg(feature = "train")]
use super::parts::{images, sinkhorn, swapped};
use super::{
    Around, CROPS, Declare, Design, FrozenDesign, GLOBAL, HeadDesign, Layer, Logits, PassDesign,
    Reads, Refused, TermDesign, checks, refuse_unless,
};
#[cfg(feature = "train")]
use super::{Met, Method, Queues, Scores, Seen, StepError};
#[cfg(feature = "train")]
use crate::batch::Batch;
#[cfg(feature = "train")]
use crate::shim::{ShimError, step as shim};

/// The group of small views.
pub const SMALL: &str = "small";
/// Views that have codes: those of the group `crops`.
const ASSIGNED: i64 = 2;
/// The linear layer without offsets whose rows are the prototypes.
const PROTOTYPES: &str = "prototypes";
/// Their weights' name.
#[cfg(feature = "train")]
const WEIGHT: &str = "prototypes.5.1.weight";

/// The keys of SwAV.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Swav {
    /// Embedding size d.
    pub dim: i64,
    /// Size of the head's hidden layer.
    pub hidden: i64,
    /// Prototypes, K.
    pub prototypes: i64,
    /// Small views of a sample, as many as the group `small` has; 0: none, and no such group.
    pub small_crops: i64,
    /// Scores are divided by this where codes are predicted.
    pub temperature: f64,
    /// Scores are divided by this where codes are made, ε. The paper's authors advise 0.03 where the loss stays at
    /// ln K.
    pub epsilon: f64,
    /// Rounds of the Sinkhorn-Knopp algorithm.
    pub rounds: i64,
    /// Updates in which the prototypes stay as they are.
    pub freeze_updates: u64,
    /// Earlier samples that codes are made with, of each of both large views; the global batch must divide it. 0:
    /// none.
    pub queue: i64,
    /// Updates before they are.
    pub queue_from: u64,
}

impl Default for Swav {
    fn default() -> Swav {
        Swav {
            dim: 128,
            hidden: 2048,
            prototypes: 3000,
            small_crops: 6,
            temperature: 0.1,
            epsilon: 0.05,
            rounds: 3,
            freeze_updates: 313,
            queue: 0,
            queue_from: 0,
        }
    }
}

impl Swav {
    /// Views of a sample.
    fn views(&self) -> i64 {
        ASSIGNED + self.small_crops
    }
}

impl Declare for Swav {
    fn design(&self, channels: [i64; 4]) -> Design {
        let (c, d, h, scope) = (channels[3], self.dim, self.hidden, GLOBAL.to_owned());
        let embedding = HeadDesign {
            scope: scope.clone(),
            whole: vec![
                Layer::Linear { from: c, to: h, bias: true },
                Layer::Norm { width: h, shift: true },
                Layer::Relu,
                Layer::Linear { from: h, to: d, bias: true },
            ],
            width: d,
            is_scored: false,
            queues: ASSIGNED,
            ..HeadDesign::default()
        };
        let scores = HeadDesign {
            scope,
            own_name: Some(PROTOTYPES),
            reads: Reads::Head(GLOBAL),
            whole: vec![
                Layer::Unit { width: d },
                Layer::Linear { from: d, to: self.prototypes, bias: false },
            ],
            width: self.prototypes,
            unit: false,
            is_gathered: false,
            ..HeadDesign::default()
        };
        let pass = |(group, images): (&str, i64)| {
            let (scope, group) = (GLOBAL.to_owned(), group.to_owned());
            PassDesign { scope, group, images, is_made: true }
        };
        let groups = [(CROPS, ASSIGNED), (SMALL, self.small_crops)];
        let groups = || groups.into_iter().filter(|(_, images)| *images > 0);
        let k = self.prototypes;
        Design {
            groups: groups().map(|(group, _)| group.to_owned()).collect(),
            heads: vec![embedding, scores],
            passes: groups().map(pass).collect(),
            queue: self.queue,
            terms: vec![TermDesign { name: "res5/swav".to_owned(), weight: 1.0 }],
            readings: vec!["loss", "accuracy", "perplexity", "prototypes"],
            is_coupled: true,
            is_joint: true,
            frozen: Some(FrozenDesign { label: PROTOTYPES, updates: self.freeze_updates }),
            // Scores of all views, their softmax and its logarithm, codes and gradients; of the views with codes of all
            // ranks and of the queue, scores and codes.
            logits: Logits {
                each: 5 * self.views() * k,
                all: 4 * k,
                pairs: 0,
                once: 3 * k * self.queue,
            },
            lighter: "method.prototypes, method.queue",
            ..Design::default()
        }
    }

    fn check(&self, run: &Around<'_>) -> Result<(), Refused> {
        checks::width("method.dim", self.dim)?;
        let legal = |number: i64, most: i64| (2..=most).contains(&number);
        let (hidden, k) = (self.hidden, self.prototypes);
        refuse_unless(legal(hidden, 65_536), "method.hidden", hidden, "2 to 65536")?;
        refuse_unless(legal(k, 1 << 20), "method.prototypes", k, "2 to 1048576")?;
        let small = self.small_crops;
        refuse_unless((0..=64).contains(&small), "method.small_crops", small, "0 to 64")?;
        checks::temperature(self.temperature)?;
        let epsilon = self.epsilon;
        refuse_unless(epsilon.is_finite() && epsilon > 0.0, "method.epsilon", epsilon, "above 0")?;
        let rounds = self.rounds;
        refuse_unless((1..=1000).contains(&rounds), "method.rounds", rounds, "1 to 1000")?;
        if self.queue != 0 {
            checks::queue(self.queue, run.batch)?;
        }
        let plain = |group: &detco_shards::views::Group, count: i64| {
            i64::from(group.count) == count && group.grid.is_none() && !group.rotate
        };
        let reason = "two views without a grid";
        run.views(("views.crops", CROPS), |group| plain(group, ASSIGNED), reason)?;
        if small == 0 {
            return Ok(());
        }
        let reason = format!("{small} views without a grid, since method.small_crops is {small}");
        run.views(("views.small", SMALL), |group| plain(group, small), &reason)
    }
}

#[cfg(feature = "train")]
impl Method for Swav {
    /// Gives every prototype unit length.
    fn before(&self, student: &[(String, Tensor)]) -> Result<(), ShimError> {
        let Some((_, prototypes)) = student.iter().find(|(name, _)| name == WEIGHT) else {
            return Ok(());
        };
        let lengths = prototypes.norm_scalaropt_dim(2, [1], true).clamp_min(1e-12);
        shim::copy(&[prototypes.shallow_clone()], &[prototypes / lengths])
    }

    fn student(&self, batch: &Batch) -> Result<Seen, StepError> {
        let mut images = vec![images::side_by_side(batch.exactly(CROPS, ASSIGNED as usize)?)];
        if self.small_crops > 0 {
            let small = batch.exactly(SMALL, self.small_crops as usize)?;
            images.push(images::side_by_side(small));
        }
        Ok(Seen { images, labels: None })
    }

    fn score(&self, met: &Met<'_>) -> Scores {
        let (views, k) = (self.views(), self.prototypes);
        let scores = met.outputs[1].view([-1, views, k]); // [n, views, k]
        let (n, rank) = (scores.size()[0], met.rank);
        let all = met.all[0].view([-1, views, self.dim]); // [N, views, d]
        let prototypes = met.weight(WEIGHT).tr(); // [d, k]
        let has_queue = self.queue > 0 && met.step >= self.queue_from;
        let (mut codes, mut predictions) = (Vec::new(), Vec::new());
        for view in 0..ASSIGNED {
            let own = all.select(1, view); // [N, d]
            let (earlier, rows) = match has_queue {
                true => {
                    let queue = met.queues.all()[view as usize].tr(); // [queue, d]
                    (self.queue, Tensor::cat(&[queue, own], 0))
                }
                false => (0, own),
            };
            let scores = rows.matmul(&prototypes); // [queue + N, k]
            let first = earlier + rank * n;
            let of_view = sinkhorn::codes(&scores, self.epsilon, self.rounds);
            // Copies, so that those of the queue can go.
            codes.push(of_view.narrow(0, first, n).copy());
            predictions.push(scores.narrow(0, earlier, all.size()[0]).copy());
        }
        let of_all = (all.size()[0], met.share);
        let (loss, accuracy, gradient) = swapped::score(&scores, &codes, self.temperature, of_all);
        let predictions = Tensor::cat(&predictions, 0); // [2 N, k], the same on all ranks
        let perplexity = swapped::perplexity(&predictions, self.temperature);
        let readings = [loss, accuracy, perplexity, swapped::used(&predictions)];
        Scores { readings: Tensor::stack(&readings, 0).unsqueeze(0), gradients: vec![gradient] }
    }

    fn after(
        &self,
        queues: &mut Queues,
        gathered: &[Tensor],
        applied: &Tensor,
    ) -> Result<(), ShimError> {
        if self.queue == 0 {
            return Ok(());
        }
        let all = gathered[0].view([-1, self.views(), self.dim]);
        let of_views: Vec<Tensor> = (0..ASSIGNED).map(|view| all.select(1, view)).collect();
        queues.enqueue_if(&of_views, applied)
    }
}
