//! Batch normalisation over groups of the batch.
//!
//! Statistics are computed for each group apart, which is what a batch spread over as many GPUs
//! would see; shuffled keys then meet other groups than their queries, and the pair cannot be told
//! by its statistics (MoCo, section 3.3). Running statistics move by the mean of what the groups
//! would do to them, as in the split batch normalisation of MoCo's notebook.

use tch::{Kind, Tensor};

use super::weights::{Builder, Init};
use crate::shim::ShimError;
use crate::shim::norm::{self, Layer, Normalised, Then};
use crate::shim::step as shim;

/// torch's and torchvision's.
const EPS: f64 = 1e-5;
/// Share of the new in the running statistics.
const MOMENTUM: f64 = 0.1;

/// What one training pass saw at each batch normalisation: mean and unbiased variance of each
/// group, `[groups, c]`. A pass may come in several chunks of whole groups.
#[derive(Debug, Default)]
pub struct Moments(Vec<Vec<[Tensor; 2]>>);

/// Running statistics of one normalisation and what a pass saw there, by chunks.
#[derive(Debug)]
pub(super) struct Settling {
    running: [Tensor; 2],
    seen: Vec<[Tensor; 2]>,
    tracked: Tensor,
}

/// Means over the groups of what a pass saw, all layers side by side: `[2 c of each layer]`. None if no layer
/// took part.
pub(super) fn mean_of(all: &[Settling]) -> Option<Tensor> {
    let first = all.first()?;
    if all.iter().any(|one| one.seen.len() != first.seen.len()) {
        // Layers of a head see all groups at once where those of the backbone see them one by one.
        let rows =
            |one: &Settling| Tensor::cat(&one.seen.iter().map(side_by_side).collect::<Vec<_>>(), 0);
        let rows: Vec<Tensor> = all.iter().map(rows).collect(); // [groups, 2 c]
        return Some(Tensor::cat(&rows, 1).mean_dim(0, false, None));
    }
    // Each chunk went through all layers: side by side, their groups are rows.
    let chunks = (0..first.seen.len()).map(|chunk| {
        let layers = all.iter().filter_map(|one| one.seen.get(chunk)).flatten();
        Tensor::cat(&layers.collect::<Vec<_>>(), 1)
    });
    Some(Tensor::cat(&chunks.collect::<Vec<_>>(), 0).mean_dim(0, false, None))
}

/// Means and variances `[groups, c]` to `[groups, 2 c]`.
fn side_by_side(seen: &[Tensor; 2]) -> Tensor {
    Tensor::cat(seen, 1)
}

/// Moves running statistics towards `seen`, as [`mean_of`] gives it, in a few launches for all of them. Where
/// `applied`, a truth value on the device, is false, nothing changes.
pub(super) fn settle_all(
    all: &[Settling],
    seen: &Tensor,
    applied: Option<&Tensor>,
) -> Result<(), ShimError> {
    let Some(first) = all.first() else { return Ok(()) };
    let running: Vec<Tensor> =
        all.iter().flat_map(|one| one.running.iter().map(Tensor::shallow_clone)).collect();
    let lengths: Vec<i64> = running.iter().map(|tensor| tensor.size()[0]).collect();
    let before = Tensor::cat(&running, 0);
    let mut after = before.lerp(seen, MOMENTUM);
    let mut one = first.tracked.ones_like();
    if let Some(applied) = applied {
        // Not a product: what is not finite times 0 is not finite.
        after = after.where_self(applied, &before);
        one = applied.to_kind(one.kind());
    }
    shim::copy(&running, &after.split_with_sizes(lengths, 0))?;
    let tracked: Vec<Tensor> = all.iter().map(|one| one.tracked.shallow_clone()).collect();
    shim::add(&tracked, &one)
}

/// Puts statistics in the place of running ones: means over `batches` passes of what [`mean_of`] gives, side by side
/// `[2 c of each layer]`.
pub(super) fn replace_all(all: &[Settling], means: &Tensor, batches: i64) -> Result<(), ShimError> {
    let running: Vec<Tensor> =
        all.iter().flat_map(|one| one.running.iter().map(Tensor::shallow_clone)).collect();
    let lengths: Vec<i64> = running.iter().map(|tensor| tensor.size()[0]).collect();
    let means =
        running.first().map_or_else(|| means.shallow_clone(), |one| means.to_kind(one.kind()));
    shim::copy(&running, &means.split_with_sizes(lengths, 0))?;
    let tracked: Vec<Tensor> = all.iter().map(|one| one.tracked.shallow_clone()).collect();
    let counts: Vec<Tensor> = tracked.iter().map(|one| one.full_like(batches)).collect();
    shim::copy(&tracked, &counts)
}

impl Moments {
    fn push(&mut self, slot: usize, mean: Tensor, variance: Tensor) {
        if self.0.len() <= slot {
            self.0.resize_with(slot + 1, Vec::new);
        }
        self.0[slot].push([mean, variance]);
    }
}

/// Who normalises groups of maps whose channels lie innermost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// libtorch, group by group, with what follows apart.
    Libtorch,
    /// Kernels of ours ([`crate::shim::norm`]), all groups and what follows in one pass.
    Kernels,
}

/// Where statistics come from in a forward pass.
#[derive(Debug)]
pub(super) enum Norm<'a> {
    /// The running statistics: evaluation.
    Running,
    /// Each group's own. Sample `j` of group `g` lies at row `j * groups + g`, so that a group is a
    /// block of channels of a view and no activation is copied. Channels-last memory has no such
    /// view.
    Dealt { groups: i64, moments: &'a mut Moments },
    /// Each group's own. Sample `j` of group `g` lies at row `g * n / groups + j`: groups are
    /// normalised one after the other and put together again, which copies activations unless there
    /// is one group. For channels-last memory.
    Blocks { groups: i64, moments: &'a mut Moments },
    /// As `Blocks`, by kernels of ours that take all groups, and what follows, in one pass. Maps that
    /// they do not take are `Blocks`.
    Fused { groups: i64, moments: &'a mut Moments },
}

/// A map that several read: a convolution, the way around it, and an average of its pixels. Each reads its
/// own of three tensors over the same memory, so that the kernels get the gradients of all and add them up
/// on their way; others' are the same tensor, whose gradients libtorch adds up.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) map: Tensor,
    pub(super) again: Tensor,
    pub(super) averaged: Tensor,
}

impl Shared {
    pub(super) fn of(map: Tensor) -> Shared {
        Shared { again: map.shallow_clone(), averaged: map.shallow_clone(), map }
    }
}

/// What follows a normalisation; in place, since nobody else needs its output.
fn apply(then: Then<'_>, mut x: Tensor) -> Tensor {
    match then {
        Then::Nothing => x,
        Then::Relu => x.relu_(),
        Then::ReluThenPool => x.relu_().max_pool2d([3, 3], [2, 2], [1, 1], [1, 1], false),
        Then::AddThenRelu(other) => x.g_add_(&other.reshape(x.size())).relu_(),
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
        BatchNorm::with_shift(build, name, channels, true)
    }

    /// Whose offset is trained, or stays 0.
    pub(super) fn with_shift(
        build: &mut Builder<'_>,
        name: &str,
        channels: i64,
        shift: bool,
    ) -> BatchNorm {
        let slot = build.norms;
        build.norms += 1;
        let (c, zero) = (&[channels], Init::Constant(0.0));
        BatchNorm {
            slot,
            weight: build.parameter(format!("{name}.weight"), c, Init::Constant(1.0)),
            bias: match shift {
                true => build.parameter(format!("{name}.bias"), c, zero),
                false => build.buffer(format!("{name}.bias"), c, zero),
            },
            running_mean: build.buffer(format!("{name}.running_mean"), c, Init::Constant(0.0)),
            running_var: build.buffer(format!("{name}.running_var"), c, Init::Constant(1.0)),
            num_batches_tracked: build.buffer(
                format!("{name}.num_batches_tracked"),
                &[],
                Init::Zero,
            ),
        }
    }

    /// Normalises `x` `[n, c, h, w]`, and does what comes `then`.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        norm: &mut Norm<'_>,
        then: Then<'_>,
    ) -> Result<Shared, ShimError> {
        let map = match norm {
            Norm::Running => apply(then, self.with_running(x)),
            Norm::Dealt { groups, moments } => {
                let (shape, groups) = (x.size(), *groups);
                let (n, c) = (shape[0], shape[1]);
                let side_by_side = x.reshape([n / groups, groups * c, shape[2], shape[3]]);
                let y = apply(then, self.with_own(&side_by_side, groups, moments));
                let edges = y.size();
                y.reshape([n, c, edges[2], edges[3]]) // a pool has made them smaller
            }
            Norm::Fused { groups, moments } if self.is_for_kernels(x) => {
                let fused = norm::normalise(self.layer(x), *groups, EPS, then);
                return self.keep(fused, None, moments);
            }
            Norm::Blocks { groups, moments } | Norm::Fused { groups, moments } => {
                apply(then, self.block_by_block(x, *groups, moments))
            }
        };
        Ok(Shared::of(map))
    }

    /// Normalises rows `[n, c]`, of which each group is a contiguous part.
    pub(super) fn forward_rows(&self, x: &Tensor, norm: &mut Norm<'_>) -> Tensor {
        match norm {
            Norm::Running => self.with_running(x),
            Norm::Dealt { groups, moments }
            | Norm::Blocks { groups, moments }
            | Norm::Fused { groups, moments } => {
                let (groups, n, c) = (*groups, x.size()[0], x.size()[1]);
                let apart = x.reshape([groups, n / groups, c]).transpose(0, 1);
                let side_by_side = apart.reshape([n / groups, groups * c]);
                let y = self.with_own(&side_by_side, groups, moments);
                y.reshape([n / groups, groups, c]).transpose(0, 1).reshape([n, c])
            }
        }
    }

    /// Normalises `x`, and `other` by a layer `of` its own; a ReLU of their sum.
    pub(super) fn add_normalised(
        &self,
        x: &Tensor,
        other: &Tensor,
        of: &BatchNorm,
        norm: &mut Norm<'_>,
    ) -> Result<Shared, ShimError> {
        match norm {
            Norm::Fused { groups, moments } if self.is_for_kernels(x) => {
                let fused = norm::normalise_both(self.layer(x), of.layer(other), *groups, EPS);
                self.keep(fused, Some(of), moments)
            }
            _ => {
                let other = of.forward(other, norm, Then::Nothing)?.map;
                self.forward(x, norm, Then::AddThenRelu(&other))
            }
        }
    }

    fn block_by_block(&self, x: &Tensor, groups: i64, moments: &mut Moments) -> Tensor {
        if groups == 1 {
            return self.with_own(x, 1, moments);
        }
        let parts = x.split(x.size()[0] / groups, 0);
        let parts: Vec<Tensor> = parts.iter().map(|part| self.with_own(part, 1, moments)).collect();
        Tensor::cat(&parts, 0)
    }

    /// Whether the kernels have what this map and these weights need.
    fn is_for_kernels(&self, x: &Tensor) -> bool {
        let kinds = (x.kind(), self.weight.kind());
        matches!(kinds, (Kind::Float | Kind::BFloat16, Kind::Float)) && norm::takes(x.size()[1])
    }

    fn layer<'a>(&'a self, x: &'a Tensor) -> Layer<'a> {
        Layer { x, weight: &self.weight, bias: &self.bias }
    }

    /// Files the moments of this layer and another one's.
    fn keep(
        &self,
        fused: Result<Normalised, ShimError>,
        other: Option<&BatchNorm>,
        moments: &mut Moments,
    ) -> Result<Shared, ShimError> {
        let fused = fused?;
        moments.push(self.slot, fused.moments.mean, fused.moments.variance);
        if let Some((layer, seen)) = other.zip(fused.other) {
            moments.push(layer.slot, seen.mean, seen.variance);
        }
        Ok(match fused.again {
            Some([again, averaged]) => Shared { map: fused.map, again, averaged },
            None => Shared::of(fused.map),
        })
    }

    /// Normalises `side` groups, side by side as blocks of c channels, by their own statistics.
    fn with_own(&self, x: &Tensor, side: i64, moments: &mut Moments) -> Tensor {
        // Buffers of zeros that move by a share of 1 end up holding the groups' own statistics.
        let mean = self.running_mean.zeros_like().repeat([side]);
        let variance = mean.zeros_like();
        let y = x.batch_norm(
            Some(self.weight.repeat([side])),
            Some(self.bias.repeat([side])),
            Some(mean.shallow_clone()),
            Some(variance.shallow_clone()),
            true,
            1.0,
            EPS,
            true,
        );
        moments.push(self.slot, mean.view([side, -1]), variance.view([side, -1]));
        y
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

    /// What [`mean_of`] and [`settle_all`] need; nothing if this layer took no part.
    pub(super) fn settling(&self, moments: &Moments) -> Option<Settling> {
        let seen = moments.0.get(self.slot).filter(|seen| !seen.is_empty())?;
        Some(Settling {
            running: [self.running_mean.shallow_clone(), self.running_var.shallow_clone()],
            seen: seen.iter().map(|two| two.each_ref().map(Tensor::shallow_clone)).collect(),
            tracked: self.num_batches_tracked.shallow_clone(),
        })
    }
}
