//! SimCLR: two views of an image find each other among all views of the batch.
//!
//! Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020. No key encoder,
//! no queue: the negatives are the other samples' outputs, of all ranks, and have gradients.

use serde::{Deserialize, Serialize};

#[cfg(feature = "train")]
use super::parts::{images, nt_xent};
use super::{
    Around, CROPS, Declare, Design, GLOBAL, HeadDesign, Layer, Logits, PassDesign, Refused,
    TermDesign, checks,
};
#[cfg(feature = "train")]
use super::{Met, Method, Scores, Seen, StepError};
#[cfg(feature = "train")]
use crate::batch::Batch;

/// Views of a sample.
const VIEWS: i64 = 2;

/// The keys of SimCLR.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Simclr {
    /// Embedding size d.
    pub dim: i64,
    /// Whether both linear layers of the head are followed by a batch normalisation (the paper's code), and so have
    /// no offsets of their own.
    pub norm: bool,
    /// Logits are divided by this (ImageNet 0.1; CIFAR 0.5).
    pub temperature: f64,
}

impl Default for Simclr {
    fn default() -> Simclr {
        Simclr { dim: 128, norm: true, temperature: 0.1 }
    }
}

impl Simclr {
    /// Two layers on the pooled Res5 of `c` channels: c → c → d.
    fn head(&self, c: i64) -> HeadDesign {
        let d = self.dim;
        let whole = match self.norm {
            true => vec![
                Layer::Linear { from: c, to: c, bias: false },
                Layer::Norm { width: c, shift: true },
                Layer::Relu,
                Layer::Linear { from: c, to: d, bias: false },
                Layer::Norm { width: d, shift: false },
            ],
            false => Layer::mlp(&[c, c, d]),
        };
        HeadDesign { scope: GLOBAL.to_owned(), whole, width: d, ..HeadDesign::default() }
    }
}

impl Declare for Simclr {
    fn design(&self, channels: [i64; 4]) -> Design {
        let (scope, group) = (GLOBAL.to_owned(), CROPS.to_owned());
        Design {
            groups: vec![CROPS.to_owned()],
            heads: vec![self.head(channels[3])],
            passes: vec![PassDesign { scope, group, images: VIEWS, is_made: true }],
            terms: vec![TermDesign { name: "res5/nt_xent".to_owned(), weight: 1.0 }],
            readings: vec!["loss", "positive", "negative", "accuracy"],
            is_coupled: true,
            // Logits of all with all, and their softmax.
            logits: Logits { pairs: 2 * VIEWS * VIEWS, ..Logits::default() },
            ..Design::default()
        }
    }

    fn check(&self, run: &Around<'_>) -> Result<(), Refused> {
        checks::width("method.dim", self.dim)?;
        checks::temperature(self.temperature)?;
        let fits = |group: &detco_shards::views::Group| {
            group.count == 2 && group.grid.is_none() && !group.rotate
        };
        run.views(("views.crops", CROPS), fits, "two views without a grid")
    }
}

#[cfg(feature = "train")]
impl Method for Simclr {
    fn student(&self, batch: &Batch) -> Result<Seen, StepError> {
        let views = batch.exactly(CROPS, 2)?;
        Ok(Seen { images: vec![images::side_by_side(views)], labels: None })
    }

    fn score(&self, met: &Met<'_>) -> Scores {
        let rows = met.outputs[0].size()[0];
        let own = (met.rank * rows, rows);
        let (readings, gradient) = nt_xent::score(&met.all[0], own, self.temperature, met.share);
        Scores { readings: readings.unsqueeze(0), gradients: vec![gradient] }
    }
}
