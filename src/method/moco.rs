//! MoCo v1, MoCo v2 and DetCo: lists of InfoNCE terms between a query encoder's outputs and those of a key
//! encoder that follows it.
//!
//! MoCo has one term, of crops at Res5. DetCo has three at each of four levels: crops, patches, and patches
//! against crops. He et al., 2020; Chen et al., 2020; Xie et al., 2021 (DetCo), eqs. 1 to 5.

use serde::{Deserialize, Serialize};
#[cfg(feature = "train")]
use tch::Tensor;

#[cfg(feature = "train")]
use super::parts::info_nce::{self, Contrast};
use super::{
    Around, Declare, Design, EmaSchedule, HeadDesign, Layer, Logits, PassDesign, Refused,
    TeacherDesign, TermDesign, checks, refuse_unless,
};
#[cfg(feature = "train")]
use super::{Met, Method, Queues, Scores, Seen, StepError};
#[cfg(feature = "train")]
use crate::batch::Batch;
#[cfg(feature = "train")]
use crate::shim::ShimError;

/// The group of views that is cropped: one for the query, one for the key.
pub const CROPS: &str = "crops";
/// The group of views that DetCo cuts into patches, likewise.
pub const PATCHES: &str = "patches";
/// Heads of crops.
pub const GLOBAL: &str = "global";
/// Heads of patch sets.
pub const LOCAL: &str = "local";

/// Patches of a sample.
const PATCHES_EACH: i64 = 9;

/// Shape of a global head, from c channels to the embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Head {
    /// One linear layer (MoCo v1).
    Linear,
    /// Linear c → c, ReLU, linear c → d (MoCo v2, DetCo).
    Mlp,
}

/// Shape of a local head, from the nine patches' features to the embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LocalHead {
    /// Concatenate, 9c → c → d: 50.6 M parameters on ResNet-50. The default.
    #[serde(rename = "9c-c")]
    Narrow,
    /// Concatenate, 9c → 9c → d: 455.7 M parameters on ResNet-50.
    #[serde(rename = "9c-9c")]
    Wide,
    /// PIRL: each patch c → c → d, concatenate, linear 9d → d (Misra and van der Maaten, 2020).
    #[serde(rename = "pirl")]
    Pirl,
}

/// The keys of MoCo and DetCo; the defaults are DetCo's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Moco {
    /// Stages with a head, from 2..=5: DetCo \[2, 3, 4, 5\], MoCo \[5\].
    pub levels: Vec<u8>,
    /// One weight for each of `levels` (DetCo: 0.1, 0.4, 0.7, 1.0 for Res2..Res5).
    pub level_weights: Vec<f64>,
    /// Whether there are jigsaw patches, local heads and the l↔l and g↔l losses.
    pub local: bool,
    /// Shape of the global heads.
    pub head: Head,
    /// Shape of the local heads.
    pub local_head: LocalHead,
    /// Embedding size d.
    pub dim: i64,
    /// Logits are divided by this (MoCo v2: 0.2; v1: 0.07).
    pub temperature: f64,
    /// Negative keys in each queue, k; the global batch must divide it.
    pub queue: i64,
    /// Fill the queues before the first change of a weight. They start with random directions
    /// (MoCo), from which every key is easily told apart if all keys are alike: a short run at a
    /// high rate collapses on that and loses its time coming back.
    pub fill_first: bool,
    /// Momentum of the key encoder, m: `key = m * key + (1 - m) * query`.
    pub ema: f64,
    /// Whether it stays, or rises to 1.
    pub ema_schedule: EmaSchedule,
}

impl Default for Moco {
    fn default() -> Moco {
        Moco {
            levels: vec![2, 3, 4, 5],
            level_weights: vec![0.1, 0.4, 0.7, 1.0],
            local: true,
            head: Head::Mlp,
            local_head: LocalHead::Narrow,
            dim: 128,
            temperature: 0.2,
            queue: 65_536,
            fill_first: false,
            ema: 0.999,
            ema_schedule: EmaSchedule::Constant,
        }
    }
}

/// Which queries meet which keys.
#[cfg_attr(not(feature = "train"), expect(dead_code, reason = "only training asks which meet"))]
#[derive(Clone, Copy, Debug)]
struct Pair {
    name: &'static str,
    /// Scope of the queries.
    query: &'static str,
    /// Scope of the keys and of the queue.
    key: &'static str,
}

/// DetCo's eqs. 2, 5 and 4: crops; patches; patches against crops. There is no term the other way round.
const PAIRS: [Pair; 3] = [
    Pair { name: "gg", query: GLOBAL, key: GLOBAL },
    Pair { name: "ll", query: LOCAL, key: LOCAL },
    Pair { name: "gl", query: LOCAL, key: GLOBAL },
];

impl Moco {
    /// All pairs, or, without patches, the first.
    fn pairs(&self) -> &'static [Pair] {
        if self.local { &PAIRS } else { &PAIRS[..1] }
    }

    /// Place of a scope's head of the level with this index among the outputs.
    #[cfg(feature = "train")]
    fn place(&self, scope: &str, index: usize) -> usize {
        if scope == GLOBAL { index } else { self.levels.len() + index }
    }

    /// The head of crops at a level of `c` channels.
    fn global_head(&self, level: u8, c: i64) -> HeadDesign {
        let whole = match self.head {
            Head::Linear => Layer::mlp(&[c, self.dim]),
            Head::Mlp => Layer::mlp(&[c, c, self.dim]),
        };
        let (scope, width) = (GLOBAL.to_owned(), self.dim);
        HeadDesign { scope, level, whole, width, ..HeadDesign::default() }
    }

    /// The head of patches at a level of `c` channels.
    fn local_head(&self, level: u8, c: i64) -> HeadDesign {
        let (all, d) = (PATCHES_EACH * c, self.dim);
        let (each, whole) = match self.local_head {
            LocalHead::Narrow => (Vec::new(), Layer::mlp(&[all, c, d])),
            LocalHead::Wide => (Vec::new(), Layer::mlp(&[all, all, d])),
            LocalHead::Pirl => (Layer::mlp(&[c, c, d]), Layer::mlp(&[PATCHES_EACH * d, d])),
        };
        let (scope, joined) = (LOCAL.to_owned(), PATCHES_EACH);
        HeadDesign { scope, level, joined, each, whole, width: d, ..HeadDesign::default() }
    }
}

impl Declare for Moco {
    fn design(&self, channels: [i64; 4]) -> Design {
        let at = |level: &u8| (*level, channels[usize::from(*level).clamp(2, 5) - 2]);
        let levels = || self.levels.iter().map(at);
        let global = levels().map(|(level, c)| self.global_head(level, c));
        let local = levels().filter(|_| self.local).map(|(level, c)| self.local_head(level, c));
        let pass = |scope: &str, group: &str, images| {
            let (scope, group) = (scope.to_owned(), group.to_owned());
            PassDesign { scope, group, images, is_made: false }
        };
        let mut passes = vec![pass(GLOBAL, CROPS, 1)];
        if self.local {
            passes.push(pass(LOCAL, PATCHES, PATCHES_EACH));
        }
        let terms = self.levels.iter().zip(&self.level_weights).flat_map(|(level, &weight)| {
            let name = move |pair: &Pair| format!("res{level}/{}", pair.name);
            self.pairs().iter().map(move |pair| TermDesign { name: name(pair), weight })
        });
        Design {
            groups: passes.iter().map(|pass| pass.group.clone()).collect(),
            heads: global.chain(local).collect(),
            passes,
            teacher: Some(TeacherDesign {
                ema: self.ema,
                schedule: self.ema_schedule,
                shuffles: true,
            }),
            queue: self.queue,
            fill: if self.fill_first { self.queue } else { 0 },
            terms: terms.collect(),
            readings: vec!["loss", "positive", "negative", "accuracy"],
            logits: Logits { each: 2 * self.queue, ..Logits::default() }, // of one term, and their softmax
            lighter: "method.queue, method.dim, or another method.local_head",
            ..Design::default()
        }
    }

    fn check(&self, run: &Around<'_>) -> Result<(), Refused> {
        checks::width("method.dim", self.dim)?;
        let ascending = self.levels.windows(2).all(|pair| pair[0] < pair[1]);
        let legal = !self.levels.is_empty() && self.levels.iter().all(|l| (2..=5).contains(l));
        let text = format!("{:?}", self.levels);
        refuse_unless(ascending && legal, "method.levels", text, "ascending, from 2 to 5")?;
        let weights = &self.level_weights;
        let (key, text) = ("method.level_weights", format!("{weights:?}"));
        let same = weights.len() == self.levels.len();
        refuse_unless(same, key, &text, "one weight for each of method.levels")?;
        let finite = weights.iter().all(|w| w.is_finite() && *w >= 0.0);
        refuse_unless(finite, key, &text, "finite, not negative")?;
        checks::queue(self.queue, run.batch)?;
        checks::temperature(self.temperature)?;
        checks::ema(self.ema)?;
        let reason = "two views without a grid: the query's and the key's";
        run.views(
            ("views.crops", CROPS),
            |group| group.count == 2 && group.grid.is_none() && !group.rotate,
            reason,
        )?;
        let reason = "two views with a grid of 3 x 3 cells, since method.local is true";
        match self.local {
            true => run.views(
                ("views.patches", PATCHES),
                |group| group.count == 2 && group.images().0 == PATCHES_EACH as usize,
                reason,
            ),
            false => Ok(()),
        }
    }
}

#[cfg(feature = "train")]
impl Method for Moco {
    fn student(&self, batch: &Batch) -> Result<Seen, StepError> {
        self.views(batch, 0)
    }

    fn teacher(&self, batch: &Batch) -> Result<Seen, StepError> {
        self.views(batch, 1)
    }

    fn score(&self, met: &Met<'_>) -> Scores {
        let terms = self.terms(met);
        let (mut readings, mut gradients) = (Vec::new(), Vec::new());
        gradients.resize_with(met.outputs.len(), || None::<Tensor>);
        // One pair at a time: its terms, at all levels, are of one shape.
        for (number, pair) in self.pairs().iter().enumerate() {
            let of_pair: Vec<_> =
                terms.iter().skip(number).step_by(self.pairs().len()).copied().collect();
            let (reading, pulls) = info_nce::score(&of_pair, self.temperature, met.share);
            readings.push(reading);
            for (index, pull) in pulls.into_iter().enumerate() {
                match &mut gradients[self.place(pair.query, index)] {
                    Some(sum) => *sum += pull,
                    none => *none = Some(pull),
                }
            }
        }
        let readings = Tensor::stack(&readings, 1).flatten(0, 1);
        Scores { readings, gradients: gradients.into_iter().flatten().collect() }
    }

    fn logits(&self, met: &Met<'_>) -> Vec<(String, Tensor)> {
        let names = self.levels.iter().flat_map(|level| {
            self.pairs().iter().map(move |pair| format!("res{level}/{}", pair.name))
        });
        names.zip(self.contrast(met)).map(|(name, term)| (name, term.logits)).collect()
    }

    fn after(
        &self,
        queues: &mut Queues,
        targets: &[Tensor],
        applied: &Tensor,
    ) -> Result<(), ShimError> {
        queues.enqueue_if(targets, applied)
    }
}

#[cfg(feature = "train")]
impl Moco {
    /// One view of each group.
    fn views(&self, batch: &Batch, view: usize) -> Result<Seen, StepError> {
        let groups: &[&str] = if self.local { &[CROPS, PATCHES] } else { &[CROPS] };
        let one = |group: &&str| Ok(batch.exactly(group, 2)?[view].shallow_clone());
        let images = groups.iter().map(one).collect::<Result<Vec<Tensor>, StepError>>()?;
        Ok(Seen { images, labels: None })
    }

    /// Level by level, each with its pairs.
    fn terms<'a>(&self, met: &Met<'a>) -> Vec<info_nce::Term<'a>> {
        let (outputs, targets, queues) = (met.outputs, met.targets, met.queues.all());
        let levels = self.level_weights.iter().enumerate();
        let of = |(index, &weight): (usize, &f64), pair: &Pair| {
            let key = self.place(pair.key, index);
            let query = &outputs[self.place(pair.query, index)];
            info_nce::Term { query, key: &targets[key], queue: &queues[key], weight }
        };
        levels.flat_map(|level| self.pairs().iter().map(move |pair| of(level, pair))).collect()
    }

    /// All terms by their definition, in the order of [`Design::terms`].
    pub fn contrast(&self, met: &Met<'_>) -> Vec<Contrast> {
        info_nce::contrast(&self.terms(met), self.temperature)
    }
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::config::Config;
    use crate::model::{Draws, Model};

    /// Losses, readings and gradients against autograd on the definition, in float64 and float32,
    /// at mild and at sharp temperatures.
    #[test]
    fn scores_are_the_definition_and_its_gradient() {
        let sets = ["method.levels=[4, 5]", "method.level_weights=[0.5, 2.0]", "method.dim=16"];
        let more = [
            "train.batch=8",
            "method.queue=48",
            "model.bn_splits=4",
            "model.backbone=resnet18",
            "model.width=4",
        ];
        let sets: Vec<String> = sets.iter().chain(&more).map(ToString::to_string).collect();
        let config = Config::load("detco-r50", &sets).unwrap();
        for (kind, bound) in [(Kind::Double, 1e-12), (Kind::Float, 2e-6)] {
            for temperature in [0.2, 0.07, 0.001] {
                let moco: &Moco = config.method.as_a().unwrap();
                let moco = Moco { temperature, ..moco.clone() };
                let mut model = Model::new(&config, Device::Cpu).unwrap();
                model.convert(kind);
                let unit = |name: &str| {
                    let x = Draws::new(1, name, 0).normal(&[6, 16], 1.0).to_kind(kind);
                    &x / x.norm_scalaropt_dim(2, [1], true)
                };
                let draw = |side: &str| {
                    ["g0", "g1", "l0", "l1"].map(|name| unit(&format!("{side}.{name}")))
                };
                let (query, key) = (draw("query"), draw("key"));
                query.iter().for_each(|leaf| drop(leaf.set_requires_grad(true)));
                let met = |outputs, share| {
                    let (targets, queues) = (key.as_slice(), &model.queues);
                    Met { share, ..Met::new(outputs, targets, queues) }
                };
                let terms = moco.contrast(&met(&query, 1.0));
                (info_nce::total(&terms) / 2.0).backward();
                let values = query.each_ref().map(Tensor::detach);
                let scores = moco.score(&met(&values, 0.5));
                compare(&terms, &query, &scores, bound);
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
        assert_eq!(scores.readings.size(), [terms.len() as i64, 4]);
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
        for (leaf, gradient) in leaves.iter().zip(&scores.gradients) {
            close(gradient, &leaf.grad(), "gradient");
        }
    }
}
