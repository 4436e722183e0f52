//! Backbone and heads: images to embeddings.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::head::Projection;
use super::norm::{self, Moments, Norm, Norms, Settling};
use super::resnet::ResNet;
use super::weights::Builder;
use crate::config::Model as Config;
use crate::method::design::{Design, Reads};
use crate::shim::ShimError;
use crate::shim::{norm as shim_norm, step as shim};

/// Backbone and heads. Parameters are named `backbone.<torchvision's name>`,
/// `<scope>.<level>.<layer>.weight`.
#[derive(Debug)]
pub struct Encoder {
    backbone: ResNet,
    heads: Vec<Projection>,
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
    pub(super) fn draw(config: &Config, design: &Design, seed: u64, device: Device) -> Encoder {
        Encoder::build(config, design, Builder::draw(seed, device))
    }

    /// An encoder without gradients that starts as a copy.
    pub(super) fn copy(
        config: &Config,
        design: &Design,
        other: &Encoder,
        device: Device,
    ) -> Encoder {
        let values: HashMap<String, Tensor> = other.tensors().into_iter().collect();
        Encoder::build(config, design, Builder::copy(&values, device))
    }

    fn build(config: &Config, design: &Design, mut build: Builder<'_>) -> Encoder {
        let backbone = ResNet::new(&mut build, "backbone", config);
        let heads = design.heads.iter().map(|head| Projection::new(&mut build, head)).collect();
        let Builder { parameters, buffers, .. } = build;
        let (in_bf16, channels_last, norms) = (false, false, Norms::Libtorch);
        Encoder { backbone, heads, parameters, buffers, in_bf16, channels_last, norms }
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

    /// Outputs of a scope's heads, `[rows, width]` each, with batch statistics.
    ///
    /// `images` are `[n, 3, h, w]`, or of several a sample `[n, images, 3, h, w]`. Each of the `groups`
    /// contiguous n/`groups` samples is normalised by its own statistics (with all images of
    /// its samples). Nothing changes: what was seen is added to `moments`.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    pub fn embed(
        &self,
        images: &Tensor,
        scope: &str,
        groups: i64,
        moments: &mut Moments,
    ) -> Result<Vec<Tensor>, ShimError> {
        let moments = std::slice::from_mut(moments);
        self.embed_together(std::slice::from_ref(images), scope, groups, moments)
    }

    /// As [`Encoder::embed`], of several passes over the same samples, whose images may differ in size and are
    /// normalised pass by pass in the backbone. Heads see the rows of all passes at once: a sample's images of
    /// the first pass, then those of the next. What they saw is added to the last of `moments`.
    ///
    /// # Errors
    /// As [`Encoder::embed`].
    pub fn embed_together(
        &self,
        images: &[Tensor],
        scope: &str,
        groups: i64,
        moments: &mut [Moments],
    ) -> Result<Vec<Tensor>, ShimError> {
        let mut passes = Vec::new();
        for (images, moments) in images.iter().zip(moments.iter_mut()) {
            let mut rows = flat(images);
            if !self.channels_last {
                rows = deal(&rows, groups);
            }
            let mut norm = self.norm(groups, moments);
            let maps = self.backbone.forward(&rows, &mut norm, self.last_level(scope))?;
            passes.push(Pass { maps, samples: images.size()[0] });
        }
        let Some(last) = moments.last_mut() else { return Ok(Vec::new()) };
        let groups_of_maps = if self.channels_last { 1 } else { groups };
        self.project(&passes, scope, &mut self.norm(groups, last), groups_of_maps)
    }

    /// Statistics of each group's own.
    fn norm<'a>(&self, groups: i64, moments: &'a mut Moments) -> Norm<'a> {
        match (self.channels_last, self.norms) {
            (false, _) => Norm::Dealt { groups, moments },
            (true, Norms::Libtorch) => Norm::Blocks { groups, moments },
            (true, Norms::Kernels) => Norm::Fused { groups, moments },
        }
    }

    /// Whether [`Encoder::embed`] is to be called under bfloat16's autocast.
    pub fn in_bf16(&self) -> bool {
        self.in_bf16
    }

    /// Outputs as [`Encoder::embed`] gives them, with running statistics instead of the batch's.
    ///
    /// # Errors
    /// As [`Encoder::embed`].
    pub fn embed_frozen(&self, images: &Tensor, scope: &str) -> Result<Vec<Tensor>, ShimError> {
        let mut norm = Norm::Running;
        let maps = self.backbone.forward(&flat(images), &mut norm, self.last_level(scope))?;
        let pass = Pass { maps, samples: images.size()[0] };
        self.project(&[pass], scope, &mut norm, 1)
    }

    /// The highest stage that a scope's heads read.
    fn last_level(&self, scope: &str) -> u8 {
        self.heads_of(scope).map(|head| head.level).max().unwrap_or(5)
    }

    fn heads_of<'a>(&'a self, scope: &'a str) -> impl Iterator<Item = &'a Projection> {
        self.heads.iter().filter(move |head| head.scope == scope)
    }

    /// Outputs of a scope's heads on maps whose rows were dealt to so many groups.
    fn project(
        &self,
        passes: &[Pass],
        scope: &str,
        norm: &mut Norm<'_>,
        dealt: i64,
    ) -> Result<Vec<Tensor>, ShimError> {
        let mut outputs = Vec::new();
        // What each head has made, before it gets unit length: others may read it.
        let mut made: Vec<(&Projection, Tensor)> = Vec::new();
        for head in self.heads_of(scope) {
            let of = |label: &str| {
                let found = made
                    .iter()
                    .find(|(other, _)| other.label == label && other.level == head.level);
                found.map_or_else(Tensor::new, |(_, made)| made.shallow_clone())
            };
            let features = match head.reads {
                Reads::Average => {
                    let averages =
                        passes.iter().map(|pass| Ok(collect(&pool(pass.map(head.level))?, dealt)));
                    together(&averages.collect::<Result<Vec<_>, ShimError>>()?, passes)
                }
                Reads::Cells => {
                    let cells = passes.iter().map(|pass| {
                        let map = pass.map(head.level);
                        let map = if head.is_scored { map.shallow_clone() } else { map.detach() };
                        // An image's cells line by line.
                        let rows = collect(&map, dealt).permute([0, 2, 3, 1]);
                        rows.reshape([-1, map.size()[1]])
                    });
                    together(&cells.collect::<Vec<_>>(), passes)
                }
                Reads::Head(label) => of(label),
                Reads::Mean(label) => {
                    let (rows, images) = (of(label), passes.iter().map(Pass::images).sum::<i64>());
                    let width = rows.size()[1];
                    rows.view([images, -1, width]).mean_dim([1_i64].as_slice(), false, None)
                }
            };
            let own = head.forward(&features, norm);
            let output = widened(own.shallow_clone());
            let output = if head.is_scored { output } else { output.detach() };
            outputs.push(if head.unit { unit(&output) } else { output });
            made.push((head, own));
        }
        Ok(outputs)
    }

    /// Maps of Res2..Res5, `[n, c, h', w']`, of images `[n, 3, h, w]`, with running statistics and
    /// without gradients.
    ///
    /// # Errors
    /// As [`Encoder::embed`].
    pub fn maps(&self, images: &Tensor) -> Result<Vec<Tensor>, ShimError> {
        self.maps_up_to(images, 5)
    }

    /// As [`Encoder::maps`], of Res2 to a level, 2 to 5; no higher one is computed. A level below or above is taken for
    /// 2 or 5.
    ///
    /// # Errors
    /// As [`Encoder::embed`].
    pub fn maps_up_to(&self, images: &Tensor, level: u8) -> Result<Vec<Tensor>, ShimError> {
        tch::no_grad(|| self.backbone.forward(images, &mut Norm::Running, level.clamp(2, 5)))
    }

    /// Maps of Res2..Res5, `[n, c, h', w']`, of images `[n, 3, h, w]`, with the batch's statistics, which are added to
    /// `moments`, and with gradients.
    ///
    /// # Errors
    /// As [`Encoder::embed`].
    pub fn maps_of_batch(
        &self,
        images: &Tensor,
        moments: &mut Moments,
    ) -> Result<Vec<Tensor>, ShimError> {
        self.backbone.forward(images, &mut self.norm(1, moments), 5)
    }

    /// Res5, average-pooled, `[n, c]`: what kNN and linear classifiers read. As [`Encoder::maps`].
    ///
    /// # Errors
    /// As [`Encoder::embed`].
    pub fn features(&self, images: &Tensor) -> Result<Tensor, ShimError> {
        self.features_at(images, 5)
    }

    /// The map of a stage, 2 to 5, average-pooled, `[n, c]`. As [`Encoder::maps`]; no higher stage is computed. A
    /// stage below or above is taken for 2 or 5.
    ///
    /// # Errors
    /// As [`Encoder::embed`].
    pub fn features_at(&self, images: &Tensor, level: u8) -> Result<Tensor, ShimError> {
        let maps = self.maps_up_to(images, level)?;
        pool(&maps[usize::from(level.clamp(2, 5)) - 2])
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

    /// Every normalisation that took part in a pass.
    fn settling(&self, moments: &Moments) -> Vec<Settling> {
        let heads = self.heads.iter().flat_map(|head| head.settling(moments));
        self.backbone.settling(moments).into_iter().chain(heads).collect()
    }

    /// What one pass saw, averaged over the groups: mean and unbiased variance of every normalisation, side by
    /// side `[2 c of each]`. None if the pass had none.
    pub fn seen(&self, moments: &Moments) -> Option<Tensor> {
        tch::no_grad(|| norm::mean_of(&self.settling(moments)))
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

    /// Puts the statistics of batches of images `[n, 3, h, w]` in the place of the backbone's running ones: the
    /// averages over the batches of their means and unbiased variances, as torch's `update_bn` has them. Every batch
    /// is normalised by its own. Returns the number of batches; without any, nothing changes.
    ///
    /// # Errors
    /// What a batch comes with; when libtorch fails, as where memory ends.
    pub fn recompute_statistics<E: From<ShimError>>(
        &mut self,
        batches: impl Iterator<Item = Result<Tensor, E>>,
    ) -> Result<i64, E> {
        let (mut sum, mut last, mut count) = (None, Vec::new(), 0);
        for images in batches {
            let (images, mut moments) = (images?, Moments::default());
            tch::no_grad(|| self.maps_of_batch(&images, &mut moments))?;
            last = self.backbone.settling(&moments);
            let seen = tch::no_grad(|| norm::mean_of(&last)).map(|seen| seen.to_kind(Kind::Double));
            sum = match (sum, seen) {
                (Some(sum), Some(seen)) => Some(sum + seen),
                (sum, seen) => sum.or(seen),
            };
            count += 1;
        }
        if let Some(sum) = sum {
            tch::no_grad(|| norm::replace_all(&last, &(sum / count as f64), count))?;
        }
        Ok(count)
    }

    fn move_statistics(
        &mut self,
        moments: &Moments,
        seen: &Tensor,
        applied: Option<&Tensor>,
    ) -> Result<(), ShimError> {
        tch::no_grad(|| norm::settle_all(&self.settling(moments), seen, applied))
    }
}

fn share(tensors: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

/// What the backbone made of the images of a pass.
struct Pass {
    maps: Vec<Tensor>,
    samples: i64,
}

impl Pass {
    /// The map of a stage.
    fn map(&self, level: u8) -> &Tensor {
        &self.maps[usize::from(level) - 2]
    }

    fn images(&self) -> i64 {
        self.maps.first().map_or(0, |map| map.size()[0])
    }
}

/// Rows of each pass, those of a sample side by side, to rows of all passes: a sample's of the first, then of the next.
fn together(rows: &[Tensor], passes: &[Pass]) -> Tensor {
    let [several @ .., last] = rows else { return Tensor::new() };
    if several.is_empty() {
        return last.shallow_clone();
    }
    let by_sample = rows
        .iter()
        .zip(passes)
        .map(|(rows, pass)| rows.reshape([pass.samples, -1, rows.size()[1]]));
    Tensor::cat(&by_sample.collect::<Vec<_>>(), 1).flatten(0, 1)
}

/// `[n, images, 3, h, w]` to `[images * n, 3, h, w]`; other images as they are.
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
pub(super) fn widened(x: Tensor) -> Tensor {
    if x.kind() == Kind::BFloat16 { x.to_kind(Kind::Float) } else { x }
}

/// Rows of unit length.
pub(super) fn unit(x: &Tensor) -> Tensor {
    x / x.norm_scalaropt_dim(2, [1], true).clamp_min(1e-12)
}
