//! Batch normalisation over groups of the batch.
//!
//! Statistics are computed for each group apart, which is what a batch spread over as many GPUs
//! would see; shuffled keys then meet other groups than their queries, and the pair cannot be told
//! by its statistics (MoCo, section 3.3). Running statistics move by the mean of what the groups
//! would do to them, as in the split batch normalisation of MoCo's notebook.

use tch::Tensor;

use super::weights::{Builder, Init};

/// torch's and torchvision's.
const EPS: f64 = 1e-5;
/// Share of the new in the running statistics.
const MOMENTUM: f64 = 0.1;

/// What one training pass saw at each batch normalisation: mean and unbiased variance of each
/// group, `[groups, c]`. A pass may come in several chunks of whole groups.
#[derive(Debug, Default)]
pub struct Moments(Vec<Vec<(Tensor, Tensor)>>);

impl Moments {
    fn push(&mut self, slot: usize, mean: Tensor, variance: Tensor) {
        if self.0.len() <= slot {
            self.0.resize_with(slot + 1, Vec::new);
        }
        self.0[slot].push((mean, variance));
    }

    /// Mean over all groups that `slot` saw, `[c]` each; nothing if it did not run.
    fn average(&self, slot: usize) -> Option<(Tensor, Tensor)> {
        let seen = self.0.get(slot).filter(|seen| !seen.is_empty())?;
        let mean = |of: fn(&(Tensor, Tensor)) -> &Tensor| {
            let all: Vec<&Tensor> = seen.iter().map(of).collect();
            Tensor::cat(&all, 0).mean_dim(0, false, None)
        };
        Some((mean(|(mean, _)| mean), mean(|(_, variance)| variance)))
    }
}

/// Where statistics come from in a forward pass.
#[derive(Debug)]
pub(super) enum Norm<'a> {
    /// The running statistics: evaluation.
    Running,
    /// Each group's own. Sample `j` of group `g` lies at row `j * groups + g`, so that a group is a
    /// block of channels of a view and no activation is copied (in NCHW; channels-last memory has
    /// no such view, and a kernel for it would replace the body of [`BatchNorm::forward`] alone).
    Groups { groups: i64, moments: &'a mut Moments },
}

/// What follows a normalisation; in place, since nobody else needs its output.
#[derive(Debug)]
pub(super) enum After<'a> {
    Nothing,
    Relu,
    AddThenRelu(&'a Tensor),
}

impl After<'_> {
    fn apply(&self, mut x: Tensor) -> Tensor {
        match self {
            After::Nothing => x,
            After::Relu => x.relu_(),
            After::AddThenRelu(other) => x.g_add_(&other.reshape(x.size())).relu_(),
        }
    }
}

#[derive(Debug)]
pub(super) struct BatchNorm {
    slot: usize,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
}

impl BatchNorm {
    pub(super) fn new(build: &mut Builder<'_>, name: &str, channels: i64) -> BatchNorm {
        let slot = build.norms;
        build.norms += 1;
        let c = &[channels];
        BatchNorm {
            slot,
            weight: build.parameter(format!("{name}.weight"), c, Init::Constant(1.0)),
            bias: build.parameter(format!("{name}.bias"), c, Init::Constant(0.0)),
            running_mean: build.buffer(format!("{name}.running_mean"), c, Init::Constant(0.0)),
            running_var: build.buffer(format!("{name}.running_var"), c, Init::Constant(1.0)),
            num_batches_tracked: build.buffer(
                format!("{name}.num_batches_tracked"),
                &[],
                Init::Zero,
            ),
        }
    }

    /// Normalises `x` `[n, c, h, w]`.
    pub(super) fn forward(&self, x: &Tensor, norm: &mut Norm<'_>, after: After<'_>) -> Tensor {
        let (groups, moments) = match norm {
            Norm::Running => return after.apply(self.with_running(x)),
            Norm::Groups { groups, moments } => (*groups, moments),
        };
        let shape = x.size();
        let (n, c) = (shape[0], shape[1]);
        // Buffers of zeros that move by a share of 1 end up holding the groups' own statistics.
        let mean = self.running_mean.zeros_like().repeat([groups]);
        let variance = mean.zeros_like();
        let y = x.reshape([n / groups, groups * c, shape[2], shape[3]]).batch_norm(
            Some(self.weight.repeat([groups])),
            Some(self.bias.repeat([groups])),
            Some(mean.shallow_clone()),
            Some(variance.shallow_clone()),
            true,
            1.0,
            EPS,
            true,
        );
        moments.push(self.slot, mean.view([groups, c]), variance.view([groups, c]));
        after.apply(y).reshape(&shape)
    }

    fn with_running(&self, x: &Tensor) -> Tensor {
        x.batch_norm(
            Some(&self.weight),
            Some(&self.bias),
            Some(&self.running_mean),
            Some(&self.running_var),
            false,
            MOMENTUM,
            EPS,
            true,
        )
    }

    /// Moves the running statistics towards what a pass saw.
    pub(super) fn settle(&mut self, moments: &Moments) {
        let Some((mean, variance)) = moments.average(self.slot) else { return };
        let _ = self.running_mean.lerp_(&mean, MOMENTUM);
        let _ = self.running_var.lerp_(&variance, MOMENTUM);
        let _ = self.num_batches_tracked.g_add_scalar_(1);
    }
}
