//! Rotation: which of four ways up an image stands.
//!
//! Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018. No key
//! encoder, no state: a linear classifier on Res5, and a label that is drawn or made with the view.

use serde::{Deserialize, Serialize};
#[cfg(feature = "train")]
use tch::{Kind, Tensor};

#[cfg(feature = "train")]
use super::parts::{cross_entropy, images};
use super::{
    Around, CROPS, Declare, Design, HeadDesign, Layer, Logits, PassDesign, Refused, TermDesign,
    refuse_unless,
};
#[cfg(feature = "train")]
use super::{Met, Method, Scores, Seen, StepError};
#[cfg(feature = "train")]
use crate::batch::Batch;
#[cfg(feature = "train")]
use crate::shim::step as shim;

/// Ways up.
const TURNS: i64 = 4;
/// Its one head.
const SCOPE: &str = "rotation";

/// The keys of Rotation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rotation {
    /// 4: every image in all four rotations (the paper). 1: in one, which is drawn with its view.
    pub rotations: i64,
}

impl Default for Rotation {
    fn default() -> Rotation {
        Rotation { rotations: TURNS }
    }
}

impl Declare for Rotation {
    fn design(&self, channels: [i64; 4]) -> Design {
        let head = HeadDesign {
            scope: SCOPE.to_owned(),
            whole: Layer::mlp(&[channels[3], TURNS]),
            width: TURNS,
            unit: false,
            ..HeadDesign::default()
        };
        let (scope, group) = (SCOPE.to_owned(), CROPS.to_owned());
        Design {
            groups: vec![CROPS.to_owned()],
            heads: vec![head],
            passes: vec![PassDesign { scope, group, images: self.rotations, is_made: true }],
            terms: vec![TermDesign { name: "res5/rotation".to_owned(), weight: 1.0 }],
            readings: vec!["loss", "accuracy"],
            logits: Logits { each: 4 * TURNS * self.rotations, ..Logits::default() },
            // Res5 tells ways up from each other, not classes: linear classifiers of OpenSelfSup's ResNet-50
            // reach 55 % on Res4 and 47 % on Res5.
            monitor_level: 4,
            ..Design::default()
        }
    }

    fn check(&self, run: &Around<'_>) -> Result<(), Refused> {
        let legal = [1, TURNS].contains(&self.rotations);
        refuse_unless(legal, "method.rotations", self.rotations, "1 or 4")?;
        let (drawn, expected) = match self.rotations {
            1 => (true, "one view without a grid, with rotate = true, since method.rotations is 1"),
            _ => (false, "one view without a grid, not rotated: the method makes all four"),
        };
        let fits = |group: &detco_shards::views::Group| {
            group.count == 1 && group.grid.is_none() && group.rotate == drawn
        };
        run.views(("views.crops", CROPS), fits, expected)
    }
}

#[cfg(feature = "train")]
impl Method for Rotation {
    fn student(&self, batch: &Batch) -> Result<Seen, StepError> {
        let crops = &batch.exactly(CROPS, 1)?[0];
        let n = crops.size()[0];
        if self.rotations == TURNS {
            let all: Vec<Tensor> = (0..TURNS).map(|turn| images::turned(crops, turn)).collect();
            let turns =
                Tensor::arange(TURNS, (Kind::Int64, crops.device())).expand([n, TURNS], false);
            return Ok(Seen { images: vec![images::side_by_side(&all)], labels: Some(turns) });
        }
        let notes = batch.notes(CROPS, 0)?;
        let turns: Vec<i64> = notes.iter().map(|note| i64::from(note.rotation)).collect();
        // Turned by turn, and put back in the batch's order.
        let mut order: Vec<i64> = (0..n).collect();
        order.sort_by_key(|sample| turns[*sample as usize]);
        let mut parts = Vec::new();
        for turn in 0..TURNS {
            let of: Vec<i64> = (0..n).filter(|sample| turns[*sample as usize] == turn).collect();
            let of = shim::upload(&Tensor::from_slice(&of), crops.device())?;
            parts.push(images::turned(&crops.index_select(0, &of), turn));
        }
        let mut back = vec![0; order.len()];
        for (place, sample) in (0..).zip(&order) {
            back[*sample as usize] = place;
        }
        let back = shim::upload(&Tensor::from_slice(&back), crops.device())?;
        let images = vec![Tensor::cat(&parts, 0).index_select(0, &back)];
        let turns = shim::upload(&Tensor::from_slice(&turns), crops.device())?;
        Ok(Seen { images, labels: Some(turns) })
    }

    fn score(&self, met: &Met<'_>) -> Scores {
        let logits = &met.outputs[0];
        let turns = met.labels.map(|labels| labels.flatten(0, -1));
        let turns = turns.expect("the student's images came with their turns");
        let (readings, gradient) = cross_entropy::score(logits, &turns, met.share);
        Scores { readings: readings.unsqueeze(0), gradients: vec![gradient] }
    }

    fn logits(&self, met: &Met<'_>) -> Vec<(String, Tensor)> {
        vec![("res5/rotation".to_owned(), met.outputs[0].shallow_clone())]
    }
}
