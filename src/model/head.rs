//! Projection heads: pooled features to embeddings.

use tch::Tensor;

use super::weights::{Builder, Init};
use crate::config::{Head, LocalHead};

#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn new(build: &mut Builder<'_>, name: &str, from: i64, to: i64) -> Linear {
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
    fn new(build: &mut Builder<'_>, name: &str, sizes: &[i64]) -> Mlp {
        let layer = |(i, pair): (usize, &[i64])| {
            Linear::new(build, &format!("{name}.{}", 2 * i), pair[0], pair[1])
        };
        Mlp(sizes.windows(2).enumerate().map(layer).collect())
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
    pub(super) fn global(
        build: &mut Builder<'_>,
        name: &str,
        head: Head,
        c: i64,
        d: i64,
    ) -> Projection {
        let sizes: &[i64] = match head {
            Head::Linear => &[c, d],
            Head::Mlp => &[c, c, d],
        };
        Projection::Whole(Mlp::new(build, name, sizes))
    }

    pub(super) fn local(
        build: &mut Builder<'_>,
        name: &str,
        head: LocalHead,
        c: i64,
        d: i64,
    ) -> Projection {
        match head {
            LocalHead::Narrow => Projection::Whole(Mlp::new(build, name, &[9 * c, c, d])),
            LocalHead::Wide => Projection::Whole(Mlp::new(build, name, &[9 * c, 9 * c, d])),
            LocalHead::Pirl => Projection::Patches {
                patch: Mlp::new(build, &format!("{name}.patch"), &[c, c, d]),
                join: Linear::new(build, &format!("{name}.join"), 9 * d, d),
            },
        }
    }

    /// Elements that a pass of a sample keeps: what goes into each layer.
    pub(super) fn kept(&self, patches: i64) -> i64 {
        let into = |mlp: &Mlp| mlp.0.iter().map(|layer| layer.weight.size()[1]).sum::<i64>();
        match self {
            Projection::Whole(mlp) => into(mlp),
            Projection::Patches { patch, join } => patches * into(patch) + join.weight.size()[1],
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
