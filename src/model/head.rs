//! Projection heads: pooled features to embeddings.

use tch::Tensor;

use super::weights::{Builder, Init};
use crate::shapes;

#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn new(build: &mut Builder<'_>, name: &str, [from, to]: shapes::Linear) -> Linear {
        let init = Init::Linear { fan_in: from };
        Linear {
            weight: build.parameter(format!("{name}.weight"), &[to, from], init),
            bias: build.parameter(format!("{name}.bias"), &[to], init),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&self.bias))
    }
}

/// Linear layers with ReLU between them, named as torch names an `nn.Sequential` of them: `0`, `2`.
#[derive(Debug)]
pub(super) struct Mlp(Vec<Linear>);

impl Mlp {
    fn new(build: &mut Builder<'_>, name: &str, sizes: &[shapes::Linear]) -> Mlp {
        let layer = |(i, size): (usize, &shapes::Linear)| {
            Linear::new(build, &format!("{name}.{}", 2 * i), *size)
        };
        Mlp(sizes.iter().enumerate().map(layer).collect())
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let mut x = x.shallow_clone();
        for (i, layer) in self.0.iter().enumerate() {
            if i > 0 {
                x = x.relu_();
            }
            x = layer.forward(&x);
        }
        x
    }
}

/// One level's head of one scope.
#[derive(Debug)]
pub(super) enum Projection {
    /// On the features as they are: `[n, c]` or, of nine patches, `[n, 9c]`.
    Whole(Mlp),
    /// PIRL (Misra and van der Maaten, 2020): each patch by itself, then all together.
    Patches { patch: Mlp, join: Linear },
}

impl Projection {
    pub(super) fn new(
        build: &mut Builder<'_>,
        name: &str,
        sizes: &shapes::Projection,
    ) -> Projection {
        let shapes::Projection { each, whole } = sizes;
        match (each.as_slice(), whole.as_slice()) {
            ([_, ..], [join]) => Projection::Patches {
                patch: Mlp::new(build, &format!("{name}.patch"), each),
                join: Linear::new(build, &format!("{name}.join"), *join),
            },
            _ => Projection::Whole(Mlp::new(build, name, whole)),
        }
    }

    /// Features `[n, c]`, or of patches `[9n, c]` with the nine of a sample adjacent, to `[n, d]`,
    /// not yet of unit length. Patches stay in the order they come: never sorted back.
    pub(super) fn forward(&self, features: &Tensor, patches: i64) -> Tensor {
        match self {
            Projection::Whole(mlp) => {
                let (rows, c) = (features.size()[0], features.size()[1]);
                mlp.forward(&features.reshape([rows / patches, patches * c]))
            }
            Projection::Patches { patch, join } => {
                let each = patch.forward(features);
                let (rows, d) = (each.size()[0], each.size()[1]);
                join.forward(&each.reshape([rows / patches, patches * d]))
            }
        }
    }
}
