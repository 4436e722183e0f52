//! Jigsaw: in which order an image's patches lie.
//!
//! Noroozi and Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles", ECCV 2016; with a
//! ResNet as Goyal et al., ICCV 2019, have it. No key encoder, no state: the label is the index of the permutation,
//! which is drawn with the view.

use detco_shards::views::{Group, Shuffle};
use serde::{Deserialize, Serialize};
#[cfg(feature = "train")]
use tch::Tensor;

#[cfg(feature = "train")]
use super::parts::cross_entropy;
use super::{
    Around, Declare, Design, HeadDesign, Layer, Logits, PATCHES, PassDesign, Refused, TermDesign,
    checks, refuse_unless,
};
#[cfg(feature = "train")]
use super::{Met, Method, Scores, Seen, StepError};
#[cfg(feature = "train")]
use crate::batch::Batch;
#[cfg(feature = "train")]
use crate::shim::step as shim;

/// Patches of a view.
const PATCHES_EACH: i64 = 9;
/// Its one head.
const SCOPE: &str = "jigsaw";

/// The keys of Jigsaw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Jigsaw {
    /// Permutations to tell apart, P, as many as `views.patches.grid.shuffle` says.
    pub permutations: i64,
    /// Numbers that a patch becomes before all nine are put side by side.
    pub hidden: i64,
}

impl Default for Jigsaw {
    fn default() -> Jigsaw {
        Jigsaw { permutations: 2000, hidden: 1000 }
    }
}

impl Declare for Jigsaw {
    fn design(&self, channels: [i64; 4]) -> Design {
        let (h, p, scope) = (self.hidden, self.permutations, SCOPE.to_owned());
        let head = HeadDesign {
            scope: scope.clone(),
            joined: PATCHES_EACH,
            each: vec![
                Layer::Linear { from: channels[3], to: h, bias: true },
                Layer::Norm { width: h, shift: true },
                Layer::Relu,
            ],
            whole: Layer::mlp(&[PATCHES_EACH * h, p]),
            width: p,
            unit: false,
            ..HeadDesign::default()
        };
        let group = PATCHES.to_owned();
        Design {
            groups: vec![PATCHES.to_owned()],
            heads: vec![head],
            passes: vec![PassDesign { scope, group, images: PATCHES_EACH, is_made: false }],
            terms: vec![TermDesign { name: "res5/jigsaw".to_owned(), weight: 1.0 }],
            readings: vec!["loss", "accuracy"],
            // Logits, their softmax and its logarithm, the target and the gradient.
            logits: Logits { each: 5 * p, ..Logits::default() },
            lighter: "method.permutations, method.hidden",
            ..Design::default()
        }
    }

    fn check(&self, run: &Around<'_>) -> Result<(), Refused> {
        checks::width("method.hidden", self.hidden)?;
        let p = self.permutations;
        refuse_unless((2..=10_000).contains(&p), "method.permutations", p, "2 to 10000")?;
        let reason = format!(
            "one view with a grid of 3 x 3 cells and shuffle = {p}, since method.permutations is {p}"
        );
        let fits = |group: &Group| {
            let set = group.grid.as_ref().map(|grid| grid.shuffle);
            let of_all = set == u32::try_from(p).ok().map(Shuffle::Set);
            group.count == 1 && group.images().0 == PATCHES_EACH as usize && of_all
        };
        run.views(("views.patches", PATCHES), fits, &reason)
    }
}

#[cfg(feature = "train")]
impl Method for Jigsaw {
    fn student(&self, batch: &Batch) -> Result<Seen, StepError> {
        let patches = &batch.exactly(PATCHES, 1)?[0];
        let missing = || StepError::Notes { group: PATCHES.to_owned() };
        let notes = batch.notes(PATCHES, 0)?;
        let orders = notes.iter().map(|note| note.permutation.map(i64::from).ok_or_else(missing));
        let orders = Tensor::from_slice(&orders.collect::<Result<Vec<i64>, StepError>>()?);
        let labels = Some(shim::upload(&orders, patches.device())?);
        Ok(Seen { images: vec![patches.shallow_clone()], labels })
    }

    fn score(&self, met: &Met<'_>) -> Scores {
        let orders = met.labels.expect("the student's images came with their order");
        let (readings, gradient) = cross_entropy::score(&met.outputs[0], orders, met.share);
        Scores { readings: readings.unsqueeze(0), gradients: vec![gradient] }
    }

    fn logits(&self, met: &Met<'_>) -> Vec<(String, Tensor)> {
        vec![("res5/jigsaw".to_owned(), met.outputs[0].shallow_clone())]
    }
}
