//! BYOL: a student predicts what a teacher that follows it makes of the other view. No negatives.
//!
//! Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, eqs. 2 and 3. Two views with steps of their own; both go
//! through both encoders, each view with its own batch statistics. The teacher follows before a step, by the momentum of
//! that step, where the authors' code moves it after one: the same but for one step of the schedule.

use serde::{Deserialize, Serialize};
#[cfg(feature = "train")]
use tch::{Kind, Tensor};

use super::{
    Around, Declare, Design, EmaSchedule, GLOBAL, HeadDesign, Layer, Logits, PassDesign, Reads,
    Refused, TeacherDesign, TermDesign, checks, refuse_unless,
};
#[cfg(feature = "train")]
use super::{Met, Method, Scores, Seen, StepError};
#[cfg(feature = "train")]
use crate::batch::Batch;

/// The groups of views: one view each.
const VIEWS: [&str; 2] = ["first", "second"];
/// The student's last head, which the teacher has not.
const PREDICTOR: &str = "predictor";

/// The keys of BYOL.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Byol {
    /// Output size of projector and predictor.
    pub dim: i64,
    /// Size of their hidden layer.
    pub hidden: i64,
    /// What the loss is multiplied by. Where LARS adapts the step, it changes nothing; lightly's loss is a quarter
    /// of BYOL's.
    pub scale: f64,
    /// Momentum of the teacher, τ, in the first update.
    pub ema: f64,
    /// Whether it stays, or rises to 1.
    pub ema_schedule: EmaSchedule,
}

impl Default for Byol {
    fn default() -> Byol {
        Byol { dim: 256, hidden: 4096, scale: 1.0, ema: 0.99, ema_schedule: EmaSchedule::Cosine }
    }
}

impl Byol {
    /// Linear, batch normalisation, ReLU, linear: from `c` numbers to the embedding.
    fn layers(&self, c: i64) -> Vec<Layer> {
        vec![
            Layer::Linear { from: c, to: self.hidden, bias: true },
            Layer::Norm { width: self.hidden, shift: true },
            Layer::Relu,
            Layer::Linear { from: self.hidden, to: self.dim, bias: false },
        ]
    }
}

impl Declare for Byol {
    fn design(&self, channels: [i64; 4]) -> Design {
        let (scope, width) = (GLOBAL.to_owned(), self.dim);
        let own = HeadDesign { scope, width, is_gathered: false, ..HeadDesign::default() };
        let projector =
            HeadDesign { whole: self.layers(channels[3]), is_scored: false, ..own.clone() };
        let predictor = HeadDesign {
            own_name: Some(PREDICTOR),
            reads: Reads::Head(GLOBAL),
            whole: self.layers(self.dim),
            in_teacher: false,
            ..own
        };
        let pass = |group: &str| {
            let (scope, group) = (GLOBAL.to_owned(), group.to_owned());
            PassDesign { scope, group, images: 1, is_made: false }
        };
        // Named by the view from which the other one is predicted.
        let term = |view: &str| TermDesign { name: format!("res5/{view}"), weight: self.scale };
        let (ema, schedule) = (self.ema, self.ema_schedule);
        Design {
            groups: VIEWS.map(str::to_owned).to_vec(),
            heads: vec![projector, predictor],
            passes: VIEWS.map(pass).to_vec(),
            teacher: Some(TeacherDesign { ema, schedule, shuffles: false }),
            terms: VIEWS.map(term).to_vec(),
            readings: vec!["loss", "cosine", "target_std"],
            logits: Logits { each: 4 * self.dim, ..Logits::default() }, // outputs and gradients
            lighter: "method.hidden",
            ..Design::default()
        }
    }

    fn check(&self, run: &Around<'_>) -> Result<(), Refused> {
        checks::width("method.dim", self.dim)?;
        let hidden = self.hidden;
        refuse_unless((2..=65_536).contains(&hidden), "method.hidden", hidden, "2 to 65536")?;
        let scale = self.scale;
        refuse_unless(scale.is_finite() && scale > 0.0, "method.scale", scale, "above 0")?;
        checks::ema(self.ema)?;
        for (key, group) in [("views.first", VIEWS[0]), ("views.second", VIEWS[1])] {
            let fits = |group: &detco_shards::views::Group| {
                group.count == 1 && group.grid.is_none() && !group.rotate
            };
            run.views((key, group), fits, "one view without a grid")?;
        }
        Ok(())
    }
}

#[cfg(feature = "train")]
impl Method for Byol {
    /// The teacher sees the same.
    fn student(&self, batch: &Batch) -> Result<Seen, StepError> {
        let view = |group| batch.exactly(group, 1).map(|views| views[0].shallow_clone());
        let images = VIEWS.into_iter().map(view).collect::<Result<_, _>>()?;
        Ok(Seen { images, labels: None })
    }

    fn score(&self, met: &Met<'_>) -> Scores {
        // Of each view the projection, which is only looked at, and the prediction.
        let predictions = met.outputs.iter().skip(1).step_by(2);
        let (mut readings, mut gradients) = (Vec::new(), Vec::new());
        for (prediction, target) in predictions.zip(met.targets.iter().rev()) {
            let (reading, gradient) = score(prediction, target, self.scale * met.share);
            readings.push(reading);
            gradients.push(gradient);
        }
        Scores { readings: Tensor::stack(&readings, 0), gradients }
    }
}

/// The mean squared distance of unit vectors `[n, d]` from their targets, `2 - 2 cos`: readings `[3]` (it; the mean
/// cosine; the standard deviation of the targets, averaged over coordinates), and its gradient by the vectors times
/// `share`: -2 target / n.
#[cfg(feature = "train")]
fn score(prediction: &Tensor, target: &Tensor, share: f64) -> (Tensor, Tensor) {
    tch::no_grad(|| {
        let n = prediction.size()[0];
        let cosine = (prediction * target).sum_dim_intlist([1].as_slice(), false, None).mean(None);
        let loss = &cosine * -2.0 + 2.0;
        let wide = target.to_kind(Kind::Double);
        let mean = |of: &Tensor| of.mean_dim([0_i64].as_slice(), false, None);
        let spread = mean(&wide.square()) - mean(&wide).square();
        let spread = spread.clamp_min(0.0).sqrt().mean(None).to_kind(target.kind());
        (Tensor::stack(&[loss, cosine, spread], 0), target * (-2.0 * share / n as f64))
    })
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use super::*;
    use crate::draws::Draws;

    fn unit(name: &str) -> Tensor {
        let x = Draws::new(1, name, 0).normal(&[7, 5], 1.0).to_kind(Kind::Double);
        &x / x.norm_scalaropt_dim(2, [1], true)
    }

    /// The squared distance of the paper's eq. 2, by autograd.
    #[test]
    fn the_score_is_the_definition_and_its_gradient() {
        let (leaf, target) = (unit("prediction").set_requires_grad(true), unit("target"));
        let defined = (&leaf - &target).square().sum(None) / 7.0;
        (&defined * 0.25).backward();
        let (readings, gradient) = score(&leaf.detach(), &target, 0.25);
        let number = |t: &Tensor| t.double_value(&[]);
        assert!((number(&readings.get(0)) - number(&defined)).abs() < 1e-12);
        // On the sphere: along a vector itself the distance has a slope that the division by its length takes away.
        let along = |of: &Tensor| {
            let part = (of * &leaf.detach()).sum_dim_intlist([1].as_slice(), true, None);
            of - part * leaf.detach()
        };
        assert!(number(&(along(&gradient) - along(&leaf.grad())).abs().max()) < 1e-12);
        let (spread, double) = (number(&readings.get(2)), target.std_dim(0, false, false));
        assert!((spread - number(&double.mean(None))).abs() < 1e-9);
    }

    #[test]
    fn targets_that_are_alike_have_no_spread_and_the_loss_is_between_0_and_4() {
        let same = unit("one").get(0).expand([7, 5], false).contiguous();
        let found = Vec::<f64>::try_from(score(&same, &same, 1.0).0).unwrap();
        assert!(found[0].abs() < 1e-12 && (found[1] - 1.0).abs() < 1e-12 && found[2] < 1e-7);
        let opposite = score(&same, &-&same, 1.0).0.double_value(&[0]);
        assert!((opposite - 4.0).abs() < 1e-12);
    }
}
