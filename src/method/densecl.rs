//! DenseCL: MoCo v2, and beside it the cells of an image's map, each against its match in the other view.
//!
//! Wang et al., "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", CVPR 2021, eqs. 1 to 4. A
//! cell's match is the cell of the key encoder's Res5 that is nearest to it in direction: of the backbone's
//! features, not of the head's outputs.

use serde::{Deserialize, Serialize};
#[cfg(feature = "train")]
use tch::Tensor;

#[cfg(feature = "train")]
use super::parts::info_nce::{self, Term};
use super::{
    Around, CROPS, Declare, Design, EmaSchedule, GLOBAL, HeadDesign, Layer, Logits, PassDesign,
    Reads, Refused, TeacherDesign, TermDesign, checks, refuse_unless,
};
#[cfg(feature = "train")]
use super::{Met, Method, Queues, Scores, Seen, StepError};
#[cfg(feature = "train")]
use crate::batch::Batch;
#[cfg(feature = "train")]
use crate::shim::ShimError;

/// Its own head, on each cell of Res5.
const DENSE: &str = "dense";
/// The average of what that makes of an image: the keys of the dense queue.
const DENSE_MEAN: &str = "dense_mean";
/// The cells of Res5 themselves, by which cells find each other.
const MAP: &str = "map";

/// The keys of DenseCL.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Densecl {
    /// Embedding size d, of both heads.
    pub dim: i64,
    /// Logits are divided by this.
    pub temperature: f64,
    /// Weight of the dense term, λ; that of MoCo's term is 1 - λ.
    pub dense_weight: f64,
    /// Updates before the dense term counts: until then λ is 0. The authors advise 10,000 where it does not start
    /// to learn.
    pub dense_from: u64,
    /// Negative keys in each of both queues, k; the global batch must divide it.
    pub queue: i64,
    /// Fill the queues before the first change of a weight.
    pub fill_first: bool,
    /// Momentum of the key encoder, m.
    pub ema: f64,
    /// Whether it stays, or rises to 1.
    pub ema_schedule: EmaSchedule,
}

impl Default for Densecl {
    fn default() -> Densecl {
        Densecl {
            dim: 128,
            temperature: 0.2,
            dense_weight: 0.5,
            dense_from: 0,
            queue: 65_536,
            fill_first: false,
            ema: 0.999,
            ema_schedule: EmaSchedule::Constant,
        }
    }
}

impl Densecl {
    /// λ in the update with this number, from 0.
    fn dense_weight(&self, step: u64) -> f64 {
        if step < self.dense_from { 0.0 } else { self.dense_weight }
    }
}

impl Declare for Densecl {
    fn design(&self, channels: [i64; 4]) -> Design {
        let (c, d, scope) = (channels[3], self.dim, GLOBAL.to_owned());
        let head = |own_name, reads, whole, width| HeadDesign {
            scope: scope.clone(),
            own_name,
            reads,
            whole,
            width,
            ..HeadDesign::default()
        };
        let mlp = || Layer::mlp(&[c, c, d]);
        let heads = vec![
            head(None, Reads::Average, mlp(), d),
            // Of its keys, a sample's own rank needs its own.
            HeadDesign { is_gathered: false, ..head(Some(DENSE), Reads::Cells, mlp(), d) },
            HeadDesign {
                is_scored: false,
                ..head(Some(DENSE_MEAN), Reads::Mean(DENSE), Vec::new(), d)
            },
            HeadDesign {
                unit: false,
                is_scored: false,
                is_gathered: false,
                ..head(Some(MAP), Reads::Cells, Vec::new(), c)
            },
        ];
        let term = |name: &str, weight| TermDesign { name: name.to_owned(), weight };
        let (ema, schedule) = (self.ema, self.ema_schedule);
        Design {
            groups: vec![CROPS.to_owned()],
            heads,
            passes: vec![PassDesign { scope, group: CROPS.to_owned(), images: 1, is_made: false }],
            teacher: Some(TeacherDesign { ema, schedule, shuffles: true }),
            queue: self.queue,
            fill: if self.fill_first { self.queue } else { 0 },
            terms: vec![
                term("res5/gg", 1.0 - self.dense_weight),
                term("res5/dense", self.dense_weight),
            ],
            readings: vec!["loss", "positive", "negative", "accuracy"],
            // A term's, and their softmax: cells go by as many rows at a time as there are samples.
            logits: Logits { each: 2 * self.queue, ..Logits::default() },
            lighter: "method.queue, method.dim",
            ..Design::default()
        }
    }

    fn weigh(&self, step: u64, terms: &mut [TermDesign]) {
        let dense = self.dense_weight(step);
        for (term, weight) in terms.iter_mut().zip([1.0 - dense, dense]) {
            term.weight = weight;
        }
    }

    fn check(&self, run: &Around<'_>) -> Result<(), Refused> {
        checks::width("method.dim", self.dim)?;
        checks::temperature(self.temperature)?;
        let weight = self.dense_weight;
        refuse_unless((0.0..=1.0).contains(&weight), "method.dense_weight", weight, "0 to 1")?;
        checks::queue(self.queue, run.batch)?;
        checks::ema(self.ema)?;
        run.views(
            ("views.crops", CROPS),
            |group| group.count == 2 && group.grid.is_none() && !group.rotate,
            "two views without a grid: the query's and the key's",
        )
    }
}

#[cfg(feature = "train")]
impl Method for Densecl {
    fn student(&self, batch: &Batch) -> Result<Seen, StepError> {
        Ok(Seen { images: vec![batch.exactly(CROPS, 2)?[0].shallow_clone()], labels: None })
    }

    fn teacher(&self, batch: &Batch) -> Result<Seen, StepError> {
        Ok(Seen { images: vec![batch.exactly(CROPS, 2)?[1].shallow_clone()], labels: None })
    }

    fn score(&self, met: &Met<'_>) -> Scores {
        let dense = self.dense_weight(met.step);
        let (readings, mut gradients) =
            info_nce::score(&[self.global(met, 1.0 - dense)], self.temperature, met.share);
        let (queries, keys) = pairs(met);
        let n = met.outputs[0].size()[0];
        // As many rows at a time as there are samples: logits of all cells at once are 3 GB at ImageNet's settings.
        let (queries, keys) = (queries.split(n, 0), keys.split(n, 0));
        let weight = dense / queries.len() as f64;
        let queue = &met.queues.all()[1];
        let term = |(query, key)| Term { query, key, queue, weight };
        let terms: Vec<Term<'_>> = queries.iter().zip(&keys).map(term).collect();
        let (of_cells, pulls) = info_nce::score(&terms, self.temperature, met.share);
        gradients.push(Tensor::cat(&pulls, 0));
        let of_cells = of_cells.mean_dim([0_i64].as_slice(), true, None);
        Scores { readings: Tensor::cat(&[readings, of_cells], 0), gradients }
    }

    fn logits(&self, met: &Met<'_>) -> Vec<(String, Tensor)> {
        let (queries, keys) = pairs(met);
        let global = self.global(met, 1.0);
        let cells = Term { query: &queries, key: &keys, queue: &met.queues.all()[1], weight: 1.0 };
        let of =
            |term: &Term<'_>| info_nce::logits(term.query, term.key, term.queue, self.temperature);
        vec![("res5/gg".to_owned(), of(&global)), ("res5/dense".to_owned(), of(&cells))]
    }

    fn after(
        &self,
        queues: &mut Queues,
        gathered: &[Tensor],
        applied: &Tensor,
    ) -> Result<(), ShimError> {
        queues.enqueue_if(gathered, applied)
    }
}

#[cfg(feature = "train")]
impl Densecl {
    /// MoCo's term.
    fn global<'a>(&self, met: &Met<'a>, weight: f64) -> Term<'a> {
        let (query, key) = (&met.outputs[0], &met.targets[0]);
        Term { query, key, queue: &met.queues.all()[0], weight }
    }
}

/// The query's cells `[n cells, d]`, and for each the key's cell that matches it.
#[cfg(feature = "train")]
fn pairs(met: &Met<'_>) -> (Tensor, Tensor) {
    let [_, queries, _, map] = met.outputs else { return (Tensor::new(), Tensor::new()) };
    let [_, keys, _, other] = met.targets else { return (Tensor::new(), Tensor::new()) };
    let n = met.outputs[0].size()[0];
    let by_sample = |of: &Tensor| of.view([n, -1, of.size()[1]]); // [n, cells, c]
    let matched = matches(&by_sample(map), &by_sample(other)); // [n, cells]
    let places = matched.unsqueeze(2).expand([-1, -1, keys.size()[1]], false);
    let keys = by_sample(keys).gather(1, &places, false).flatten(0, 1);
    (queries.shallow_clone(), keys)
}

/// For each of a map's cells `[n, cells, c]` the cell of another map that is nearest to it by cosine, `[n, cells]`.
#[cfg(feature = "train")]
fn matches(map: &Tensor, other: &Tensor) -> Tensor {
    // The length of a query's cell changes nothing.
    let lengths = other.norm_scalaropt_dim(2, [2], true).clamp_min(1e-12);
    map.bmm(&(other / lengths).transpose(1, 2)).argmax(2, false)
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::draws::Draws;

    #[test]
    fn a_cell_matches_itself_and_the_nearest_direction_whatever_its_length() {
        let map = Draws::new(1, "map", 0).normal(&[3, 9, 16], 1.0).to_kind(Kind::Double);
        let own = Tensor::arange(9, (Kind::Int64, map.device())).expand([3, 9], false);
        assert!(matches(&map, &map).equal(&own));
        let lengths = Draws::new(2, "lengths", 0).uniform(&[3, 9, 1], 0.9) + 1.0;
        assert!(matches(&(&map * &lengths), &map).equal(&own));
        assert!(matches(&map, &(&map * lengths)).equal(&own));
        let turned = map.flip([1]);
        assert!(matches(&map, &turned).equal(&own.flip([1])));
    }
}
