//! Backbone and heads: images to embeddings.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::Scope;
use super::head::Projection;
use super::norm::{self, Moments, Norm, Norms};
use super::resnet::ResNet;
use super::weights::Builder;
use crate::config::Model as Config;
use crate::shapes::{self, PATCHES};
use crate::shim::ShimError;
use crate::shim::{norm as shim_norm, step as shim};

/// Backbone and heads. Parameters are named `backbone.<torchvision's name>`,
/// `global.<level>.<layer>.weight`, `local.<level>.<layer>.weight`.
#[derive(Debug)]
pub struct Encoder {
    levels: Vec<u8>,
    backbone: ResNet,
    global: Vec<Projection>,
    local: Vec<Projection>,
    parameters: Vec<(String, Tensor)>,
    buffers: Vec<(String, Tensor)>,
    /// Whether [`Encoder::embed`] runs convolutions and linear layers in bfloat16.
    pub(super) in_bf16: bool,
    /// Whether maps have their channels innermost.
    channels_last: bool,
    /// Who normalises them then.
    pub(super) norms: Norms,
}

impl Encoder {
    /// A trained encoder, drawn from the seed.
    pub(super) fn draw(config: &Config, seed: u64, device: Device) -> Encoder {
        Encoder::build(config, Builder::draw(seed, device))
    }

    /// An encoder without gradients that starts as a copy.
    pub(super) fn copy(config: &Config, other: &Encoder, device: Device) -> Encoder {
        let values: HashMap<String, Tensor> = other.tensors().into_iter().collect();
        Encoder::build(config, Builder::copy(&values, device))
    }

    fn build(config: &Config, mut build: Builder<'_>) -> Encoder {
        let b = &mut build;
        let backbone = ResNet::new(b, "backbone", config);
        let levels = config.levels.clone();
        let mut heads = |scope: &str, sizes: Vec<shapes::Projection>| -> Vec<Projection> {
            let named = levels.iter().map(|level| format!("{scope}.{level}")).zip(&sizes);
            named.map(|(name, sizes)| Projection::new(b, &name, sizes)).collect()
        };
        let [global, local] = shapes::Projection::of(config);
        let (global, local) = (heads("global", global), heads("local", local));
        let Builder { parameters, buffers, .. } = build;
        let (in_bf16, channels_last, norms) = (false, false, Norms::Libtorch);
        Encoder {
            levels,
            backbone,
            global,
            local,
            parameters,
            buffers,
            in_bf16,
            channels_last,
            norms,
        }
    }

    /// Levels with a head, ascending.
    pub fn levels(&self) -> &[u8] {
        &self.levels
    }

    /// Whether there are local heads.
    pub fn has_local(&self) -> bool {
        !self.local.is_empty()
    }

    /// Trained tensors; they share memory and gradient with the encoder.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        share(&self.parameters)
    }

    /// Parameters and buffers, detached, sharing memory with the encoder.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let all = self.parameters.iter().chain(&self.buffers);
        all.map(|(name, tensor)| (name.clone(), tensor.detach())).collect()
    }

    /// The backbone's tensors under torchvision's names: no prefix, no `fc`.
    pub fn backbone_tensors(&self) -> Vec<(String, Tensor)> {
        let strip = |(name, tensor): (String, Tensor)| {
            name.strip_prefix("backbone.").map(|name| (name.to_string(), tensor.shallow_clone()))
        };
        self.tensors().into_iter().filter_map(strip).collect()
    }

    /// Embeddings of unit length, `[n, d]` for each level, with batch statistics.
    ///
    /// `images` are `[n, 3, h, w]`, or `[n, 9, 3, p, p]` for [`Scope::Local`]. Each of the `groups`
    /// contiguous n/`groups` samples is normalised by its own statistics (with all nine patches of
    /// its samples). Nothing changes: what was seen is added to `moments`.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    pub fn embed(
        &self,
        images: &Tensor,
        scope: Scope,
        groups: i64,
        moments: &mut Moments,
    ) -> Result<Vec<Tensor>, ShimError> {
        let rows = flat(images);
        let last = self.levels[self.levels.len() - 1];
        if self.channels_last {
            let mut norm = match self.norms {
                Norms::Libtorch => Norm::Blocks { groups, moments },
                Norms::Kernels => Norm::Fused { groups, moments },
            };
            let maps = self.backbone.forward(&rows, &mut norm, last)?;
            self.project(&maps, scope, Tensor::shallow_clone)
        } else {
            let mut norm = Norm::Dealt { groups, moments };
            let maps = self.backbone.forward(&deal(&rows, groups), &mut norm, last)?;
            self.project(&maps, scope, |pooled| collect(pooled, groups))
        }
    }

    /// Whether [`Encoder::embed`] is to be called under bfloat16's autocast.
    pub fn in_bf16(&self) -> bool {
        self.in_bf16
    }

    /// Embeddings as [`Encoder::embed`] gives them, with running statistics instead of the batch's.
    ///
    /// # Errors
    /// As [`Encoder::embed`].
    pub fn embed_frozen(&self, images: &Tensor, scope: Scope) -> Result<Vec<Tensor>, ShimError> {
        let last = self.levels[self.levels.len() - 1];
        let maps = self.backbone.forward(&flat(images), &mut Norm::Running, last)?;
        self.project(&maps, scope, Tensor::shallow_clone)
    }

    fn project(
        &self,
        maps: &[Tensor],
        scope: Scope,
        arrange: impl Fn(&Tensor) -> Tensor,
    ) -> Result<Vec<Tensor>, ShimError> {
        let (heads, patches) = match scope {
            Scope::Global => (&self.global, 1),
            Scope::Local => (&self.local, PATCHES),
        };
        let project = |(head, &level): (&Projection, &u8)| {
            let features = arrange(&pool(&maps[usize::from(level) - 2])?);
            Ok(unit(&widened(head.forward(&features, patches))))
        };
        heads.iter().zip(&self.levels).map(project).collect()
    }

    /// Maps of Res2..Res5, `[n, c, h', w']`, of images `[n, 3, h, w]`, with running statistics and
    /// without gradients.
    ///
    /// # Errors
    /// As [`Encoder::embed`].
    pub fn maps(&self, images: &Tensor) -> Result<Vec<Tensor>, ShimError> {
        tch::no_grad(|| self.backbone.forward(images, &mut Norm::Running, 5))
    }

    /// Res5, average-pooled, `[n, c]`: what kNN and linear classifiers read. As [`Encoder::maps`].
    ///
    /// # Errors
    /// As [`Encoder::embed`].
    pub fn features(&self, images: &Tensor) -> Result<Tensor, ShimError> {
        pool(&self.maps(images)?[3])
    }

    /// Puts the weights of convolutions where channels are innermost; maps follow them.
    pub(super) fn put_channels_last(&mut self) -> Result<(), ShimError> {
        for (_, tensor) in self.parameters.iter_mut().filter(|(_, tensor)| tensor.dim() == 4) {
            let moved = shim::channels_last(&tensor.detach())?;
            // Of one pixel both layouts are the same memory; gradients come with the strides of this one, and
            // libtorch's reducer warns where weights have the other's.
            let (shape, inner) = (moved.size(), moved.size()[1]);
            let strides = [inner, 1, inner, inner];
            let is_pixel = shape[2..] == [1, 1];
            let moved = if is_pixel { moved.as_strided(shape, strides, None) } else { moved };
            tensor.set_data(&moved);
        }
        self.channels_last = true;
        Ok(())
    }

    pub(super) fn convert(&mut self, kind: Kind) {
        let all = self.parameters.iter_mut().chain(&mut self.buffers);
        for (_, tensor) in all.filter(|(_, tensor)| tensor.is_floating_point()) {
            tensor.set_data(&tensor.detach().to_kind(kind));
        }
    }

    /// What one pass saw, averaged over the groups: mean and unbiased variance of every normalisation, side by
    /// side `[2 c of each]`. None if the pass had none.
    pub fn seen(&self, moments: &Moments) -> Option<Tensor> {
        tch::no_grad(|| norm::mean_of(&self.backbone.settling(moments)))
    }

    /// Moves the running statistics towards what one pass saw.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    pub fn settle(&mut self, moments: &Moments) -> Result<(), ShimError> {
        let Some(seen) = self.seen(moments) else { return Ok(()) };
        self.move_statistics(moments, &seen, None)
    }

    /// As [`Encoder::settle`], towards `seen` in place of this pass's own [`Encoder::seen`]: its mean over the
    /// ranks. Where `applied`, a truth value on the device, is false, nothing changes.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn settle_if(
        &mut self,
        moments: &Moments,
        seen: &Tensor,
        applied: &Tensor,
    ) -> Result<(), ShimError> {
        self.move_statistics(moments, seen, Some(applied))
    }

    fn move_statistics(
        &mut self,
        moments: &Moments,
        seen: &Tensor,
        applied: Option<&Tensor>,
    ) -> Result<(), ShimError> {
        tch::no_grad(|| norm::settle_all(&self.backbone.settling(moments), seen, applied))
    }
}

fn share(tensors: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

/// `[n, 9, 3, p, p]` to `[9n, 3, p, p]`; other images as they are.
fn flat(images: &Tensor) -> Tensor {
    if images.dim() == 5 { images.flatten(0, 1) } else { images.shallow_clone() }
}

/// Deals contiguous groups out like cards: row `g * m + j` moves to `j * groups + g`.
fn deal(rows: &Tensor, groups: i64) -> Tensor {
    swap(rows, groups, rows.size()[0] / groups)
}

/// Undoes [`deal`].
fn collect(rows: &Tensor, groups: i64) -> Tensor {
    swap(rows, rows.size()[0] / groups, groups)
}

fn swap(rows: &Tensor, a: i64, b: i64) -> Tensor {
    if a == 1 || b == 1 {
        return rows.shallow_clone();
    }
    let shape = rows.size();
    let split: Vec<i64> = [a, b].iter().chain(&shape[1..]).copied().collect();
    rows.reshape(split).transpose(0, 1).reshape(shape)
}

/// Global average: `[n, c, h, w]` to `[n, c]`.
fn pool(map: &Tensor) -> Result<Tensor, ShimError> {
    shim_norm::average(map)
}

/// Lengths, logits and losses are float32 whatever the layers before them ran in.
fn widened(x: Tensor) -> Tensor {
    if x.kind() == Kind::BFloat16 { x.to_kind(Kind::Float) } else { x }
}

/// Rows of unit length.
fn unit(x: &Tensor) -> Tensor {
    x / x.norm_scalaropt_dim(2, [1], true).clamp_min(1e-12)
}
