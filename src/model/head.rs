//! Heads: pooled features to outputs.

use tch::Tensor;

use super::encoder::{unit, widened};
use super::norm::{BatchNorm, Moments, Norm, Settling};
use super::weights::{Builder, Init};
use crate::method::design::{HeadDesign, Layer, Reads};

#[derive(Debug)]
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    fn new(build: &mut Builder<'_>, name: &str, [from, to]: [i64; 2], bias: bool) -> Linear {
        let init = Init::Linear { fan_in: from };
        Linear {
            weight: build.parameter(format!("{name}.weight"), &[to, from], init),
            bias: bias.then(|| build.parameter(format!("{name}.bias"), &[to], init)),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}

#[derive(Debug)]
enum Step {
    Linear(Linear),
    Norm(BatchNorm),
    Relu,
    Unit,
}

/// Layers, named as torch names an `nn.Sequential` of them: `0`, `1`, ...
#[derive(Debug)]
struct Sequential(Vec<Step>);

impl Sequential {
    fn new(build: &mut Builder<'_>, name: &str, layers: &[Layer]) -> Sequential {
        let mut layer = |(i, layer): (usize, &Layer)| match *layer {
            Layer::Linear { from, to, bias } => {
                Step::Linear(Linear::new(build, &format!("{name}.{i}"), [from, to], bias))
            }
            Layer::Norm { width, shift } => {
                Step::Norm(BatchNorm::with_shift(build, &format!("{name}.{i}"), width, shift))
            }
            Layer::Relu => Step::Relu,
            Layer::Unit { .. } => Step::Unit,
        };
        Sequential(layers.iter().enumerate().map(&mut layer).collect())
    }

    fn forward(&self, x: &Tensor, norm: &mut Norm<'_>) -> Tensor {
        let mut x = x.shallow_clone();
        for step in &self.0 {
            x = match step {
                Step::Linear(linear) => linear.forward(&x),
                Step::Norm(bn) => bn.forward_rows(&x, norm),
                Step::Relu => x.relu_(),
                Step::Unit => unit(&widened(x)),
            };
        }
        x
    }

    fn norms(&self) -> impl Iterator<Item = &BatchNorm> {
        self.0.iter().filter_map(|step| match step {
            Step::Norm(bn) => Some(bn),
            Step::Linear(_) | Step::Relu | Step::Unit => None,
        })
    }
}

/// A head.
#[derive(Debug)]
pub(super) struct Projection {
    pub(super) scope: String,
    /// As [`HeadDesign::label`].
    pub(super) label: String,
    pub(super) level: u8,
    pub(super) reads: Reads,
    pub(super) unit: bool,
    pub(super) is_scored: bool,
    joined: i64,
    each: Option<Sequential>,
    whole: Sequential,
}

impl Projection {
    pub(super) fn new(build: &mut Builder<'_>, head: &HeadDesign) -> Projection {
        let name = head.name();
        let each = (!head.each.is_empty())
            .then(|| Sequential::new(build, &format!("{name}.patch"), &head.each));
        let whole = match (&each, head.whole.as_slice()) {
            // One layer behind those of patches has a name and no number.
            (Some(_), &[Layer::Linear { from, to, bias }]) => {
                let join = Linear::new(build, &format!("{name}.join"), [from, to], bias);
                Sequential(vec![Step::Linear(join)])
            }
            (Some(_), layers) => Sequential::new(build, &format!("{name}.join"), layers),
            (None, layers) => Sequential::new(build, &name, layers),
        };
        let (scope, label) = (head.scope.clone(), head.label().to_owned());
        let HeadDesign { level, reads, unit, is_scored, joined, .. } = *head;
        Projection { scope, label, level, reads, unit, is_scored, joined, each, whole }
    }

    /// Features `[images * n, c]`, those of a sample adjacent, to `[images / joined * n, width]`, not yet of
    /// unit length. Patches stay in the order they come: never sorted back.
    pub(super) fn forward(&self, features: &Tensor, norm: &mut Norm<'_>) -> Tensor {
        let each = match &self.each {
            Some(each) => each.forward(features, norm),
            None => features.shallow_clone(),
        };
        let (rows, c) = (each.size()[0], each.size()[1]);
        self.whole.forward(&each.reshape([rows / self.joined, self.joined * c]), norm)
    }

    /// Every normalisation that took part in a pass.
    pub(super) fn settling(&self, moments: &Moments) -> Vec<Settling> {
        let each = self.each.iter().flat_map(Sequential::norms);
        each.chain(self.whole.norms()).filter_map(|bn| bn.settling(moments)).collect()
    }
}
