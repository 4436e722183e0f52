//! ResNet-18/34/50/101 with torchvision's layer names and numerics (v1.5: the stride sits in the
//! 3×3 convolution), returning Res2..Res5.
//!
//! He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. No classifier.

use tch::{Device, Tensor};

use super::norm::{BatchNorm, Moments, Norm, Norms, Settling, Shared};
use super::weights::{Builder, Init};
use crate::config::{Backbone, Model as Config, Stem};
use crate::shim::norm::Then;

#[derive(Debug)]
struct Conv {
    weight: Tensor,
    stride: i64,
    padding: i64,
}

impl Conv {
    fn new(build: &mut Builder<'_>, name: &str, shape: [i64; 3], stride: i64) -> Conv {
        let [from, to, edge] = shape;
        let weight =
            build.parameter(format!("{name}.weight"), &[to, from, edge, edge], Init::Convolution);
        Conv { weight, stride, padding: edge / 2 }
    }

    /// Edge of the map that it makes of one of this edge.
    fn edge(&self, from: i64) -> i64 {
        let kernel = self.weight.size()[2];
        (from + 2 * self.padding - kernel) / self.stride + 1
    }

    /// Elements of that map.
    fn elements(&self, from: i64) -> i64 {
        self.weight.size()[0] * self.edge(from) * self.edge(from)
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let conv = |x: &Tensor, weight: &Tensor, stride: i64, padding: i64| {
            x.conv2d(weight, None::<&Tensor>, [stride; 2], [padding; 2], [1, 1], 1)
        };
        if x.device() == Device::Cpu && self.overruns() {
            let every = |x: &Tensor, dim| x.slice(dim, None, None, self.stride);
            return conv(&every(&every(x, 2), 3), &self.weight, 1, 0);
        }
        if x.device() == Device::Cpu && self.leaves_taps(x) {
            let middle = |weight: &Tensor, dim| weight.narrow(dim, self.padding, 1);
            return conv(x, &middle(&middle(&self.weight, 2), 3), 1, 0);
        }
        conv(x, &self.weight, self.stride, self.padding)
    }

    /// Whether oneDNN, as libtorch 2.11 has it, would write behind its workspace in the backward pass
    /// of this convolution over a channels-last map: a 1×1 kernel with a stride, and fewer input
    /// channels than a block, of which the widest has 16 (uxlfoundation/oneDNN#6035). The pixels that
    /// the stride meets, picked beforehand, make the same products.
    fn overruns(&self) -> bool {
        let shape = self.weight.size();
        shape[2] == 1 && self.stride > 1 && shape[1] < 16
    }

    /// Whether oneDNN, as libtorch 2.11 has it, may leave parts of the weights' gradient as memory was:
    /// a map of one pixel, of which all taps but the middle one see nothing but padding, with a stride, in
    /// bfloat16 on a processor that computes with it (avx512_core_bf16; seen by filling free memory with
    /// numbers that are none). The middle tap alone makes the same products.
    fn leaves_taps(&self, x: &Tensor) -> bool {
        let one_pixel = x.size()[2..] == [1, 1];
        one_pixel
            && self.stride > 1
            && self.weight.size()[2] == 2 * self.padding + 1
            && self.padding > 0
    }
}

/// A residual block: basic (3×3, 3×3) or bottleneck (1×1, 3×3, 1×1).
#[derive(Debug)]
struct Block {
    layers: Vec<(Conv, BatchNorm)>,
    downsample: Option<(Conv, BatchNorm)>,
}

impl Block {
    /// `kernels` are (edge, output channels); the first 3×3 convolution has the stride.
    fn new(
        build: &mut Builder<'_>,
        name: &str,
        from: i64,
        kernels: &[(i64, i64)],
        stride: i64,
    ) -> Block {
        let mut layers = Vec::new();
        let (mut channels, mut left) = (from, stride);
        for (i, &(edge, to)) in kernels.iter().enumerate() {
            let here = if edge == 3 { std::mem::replace(&mut left, 1) } else { 1 };
            let conv =
                Conv::new(build, &format!("{name}.conv{}", i + 1), [channels, to, edge], here);
            layers.push((conv, BatchNorm::new(build, &format!("{name}.bn{}", i + 1), to)));
            channels = to;
        }
        let downsample = (stride != 1 || from != channels).then(|| {
            let conv =
                Conv::new(build, &format!("{name}.downsample.0"), [from, channels, 1], stride);
            (conv, BatchNorm::new(build, &format!("{name}.downsample.1"), channels))
        });
        Block { layers, downsample }
    }

    /// Adds what a pass over a map of this edge keeps; the edge of its own map. A convolution's
    /// output is kept by the normalisation after it, and what that makes by the ReLU and the next
    /// convolution; the shortcut's last output is only added.
    fn keep(&self, edge: i64, norms: Norms, kept: &mut Kept) -> i64 {
        let mut at = edge;
        for (conv, _) in &self.layers {
            kept.add(1, conv.elements(at));
            kept.add_behind_relu(conv.elements(at), norms);
            at = conv.edge(at);
        }
        if let Some((conv, _)) = &self.downsample {
            kept.add(1, conv.elements(edge));
        }
        at
    }

    fn forward(&self, x: Shared, norm: &mut Norm<'_>) -> Shared {
        let Some(((last_conv, last_bn), first)) = self.layers.split_last() else { return x };
        let mut y = x.map;
        for (conv, bn) in first {
            y = bn.forward(&conv.forward(&y), norm, Then::Relu).map;
        }
        let y = last_conv.forward(&y);
        match &self.downsample {
            Some((conv, bn)) => last_bn.add_normalised(&y, &conv.forward(&x.again), bn, norm),
            None => last_bn.forward(&y, norm, Then::AddThenRelu(&x.again)),
        }
    }
}

/// What a pass keeps of an image until its backward pass has come by.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Kept {
    /// Elements of maps, the image among them.
    pub(super) maps: i64,
    /// Bits beside the maps: where a window's largest value lay, and what a ReLU let through where our
    /// kernels normalise. libtorch looks at the map for that.
    pub(super) bits: i64,
    /// Elements of the largest map.
    pub(super) largest: i64,
}

impl Kept {
    fn add(&mut self, maps: i64, elements: i64) {
        self.maps += maps * elements;
        self.largest = self.largest.max(elements);
    }

    fn add_behind_relu(&mut self, elements: i64, norms: Norms) {
        self.add(1, elements);
        self.bits += if norms == Norms::Kernels { elements } else { 0 };
    }
}

#[derive(Debug)]
pub(super) struct ResNet {
    stem: Stem,
    conv1: Conv,
    bn1: BatchNorm,
    stages: [Vec<Block>; 4],
    channels: [i64; 4],
}

impl ResNet {
    pub(super) fn new(build: &mut Builder<'_>, name: &str, config: &Config) -> ResNet {
        let (blocks, bottleneck) = match config.backbone {
            Backbone::Resnet18 => ([2, 2, 2, 2], false),
            Backbone::Resnet34 => ([3, 4, 6, 3], false),
            Backbone::Resnet50 => ([3, 4, 6, 3], true),
            Backbone::Resnet101 => ([3, 4, 23, 3], true),
        };
        let (edge, stride) = match config.stem {
            Stem::Imagenet => (7, 2),
            Stem::Cifar => (3, 1),
        };
        let conv1 = Conv::new(build, &format!("{name}.conv1"), [3, config.width, edge], stride);
        let bn1 = BatchNorm::new(build, &format!("{name}.bn1"), config.width);
        let mut channels = config.width;
        let stages: [Vec<Block>; 4] = std::array::from_fn(|stage| {
            let width = config.width << stage;
            let kernels: &[(i64, i64)] = if bottleneck {
                &[(1, width), (3, width), (1, 4 * width)]
            } else {
                &[(3, width), (3, width)]
            };
            let mut block = |i: i64| {
                let stride = if stage > 0 && i == 0 { 2 } else { 1 };
                let name = format!("{name}.layer{}.{i}", stage + 1);
                let block = Block::new(build, &name, channels, kernels, stride);
                channels = kernels[kernels.len() - 1].1;
                block
            };
            (0..blocks[stage]).map(&mut block).collect()
        });
        let expansion = if bottleneck { 4 } else { 1 };
        let channels = std::array::from_fn(|stage| (config.width << stage) * expansion);
        ResNet { stem: config.stem, conv1, bn1, stages, channels }
    }

    /// Channels of Res2..Res5.
    pub(super) fn channels(&self) -> [i64; 4] {
        self.channels
    }

    /// Images `[n, 3, h, w]` to the maps of Res2 to Res`last`, `[n, c, h', w']` each.
    pub(super) fn forward(&self, images: &Tensor, norm: &mut Norm<'_>, last: u8) -> Vec<Tensor> {
        let then = match self.stem {
            Stem::Imagenet => Then::ReluThenPool,
            Stem::Cifar => Then::Relu,
        };
        let mut x = self.bn1.forward(&self.conv1.forward(images), norm, then);
        let mut maps: Vec<Tensor> = Vec::with_capacity(4);
        for stage in &self.stages[..usize::from(last) - 1] {
            for block in stage {
                x = block.forward(x, norm);
            }
            maps.push(x.averaged.shallow_clone());
        }
        maps
    }

    /// What a pass up to Res`last` keeps of an image of this edge.
    pub(super) fn kept(&self, edge: i64, last: u8, norms: Norms) -> Kept {
        let mut kept = Kept::default();
        kept.add(1, 3 * edge * edge);
        let elements = self.conv1.elements(edge);
        kept.add(1, elements);
        let mut at = self.conv1.edge(edge);
        if self.stem == Stem::Imagenet {
            at = (at - 1) / 2 + 1;
            let pooled = self.conv1.weight.size()[0] * at * at;
            kept.add(1, pooled);
            kept.bits += pooled * if norms == Norms::Kernels { 4 } else { 64 };
        }
        // Our kernels pool on the way.
        if self.stem == Stem::Cifar || norms == Norms::Libtorch {
            kept.add_behind_relu(elements, norms);
        }
        for block in self.stages[..usize::from(last) - 1].iter().flatten() {
            at = block.keep(at, norms, &mut kept);
        }
        kept
    }

    /// Every layer that `moments` saw.
    pub(super) fn settling(&self, moments: &Moments) -> Vec<Settling> {
        let blocks = self.stages.iter().flatten();
        let layers = blocks.flat_map(|block| block.layers.iter().chain(&block.downsample));
        std::iter::once(&self.bn1)
            .chain(layers.map(|(_, bn)| bn))
            .filter_map(|bn| bn.settling(moments))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    /// Picking pixels beforehand is what the stride does: values and gradients, at even and odd edges.
    #[test]
    fn convolutions_that_would_overrun_are_the_same_without_a_stride() {
        tch::manual_seed(1);
        for edge in [1_i64, 6, 7] {
            let of = (Kind::Double, tch::Device::Cpu);
            let leaf = |shape: &[i64]| Tensor::randn(shape, of).set_requires_grad(true);
            let (x, weight) = (leaf(&[2, 8, edge, edge]), leaf(&[5, 8, 1, 1]));
            let conv = Conv { weight: weight.shallow_clone(), stride: 2, padding: 0 };
            assert!(conv.overruns());
            let run = |y: Tensor| {
                let gradient = Tensor::arange(y.numel() as i64, of).view_as(&y);
                Tensor::run_backward(&[(&y * gradient).sum(None)], &[&x, &weight], false, false)
            };
            let direct = x.conv2d(&weight, None::<&Tensor>, [2, 2], [0, 0], [1, 1], 1);
            let ours = conv.forward(&x);
            assert_eq!(ours.size()[2], conv.edge(edge));
            assert!(ours.allclose(&direct, 1e-12, 1e-12, false));
            for (ours, theirs) in run(ours).iter().zip(run(direct)) {
                assert!(ours.allclose(&theirs, 1e-12, 1e-12, false));
            }
        }
        let wide = Tensor::zeros([4, 16, 1, 1], (Kind::Float, tch::Device::Cpu));
        assert!(!Conv { weight: wide, stride: 2, padding: 0 }.overruns());
    }

    /// A map of one pixel meets the middle tap alone: values, and gradients that are zero elsewhere.
    #[test]
    fn convolutions_of_one_pixel_have_all_of_their_gradient() {
        tch::manual_seed(1);
        let of = (Kind::Double, tch::Device::Cpu);
        let leaf = |shape: &[i64]| Tensor::randn(shape, of).set_requires_grad(true);
        for padding in [1, 3] {
            let kernel = 2 * padding + 1;
            let (x, weight) = (leaf(&[4, 8, 1, 1]), leaf(&[5, 8, kernel, kernel]));
            let conv = Conv { weight: weight.shallow_clone(), stride: 2, padding };
            assert!(conv.leaves_taps(&x) && !conv.leaves_taps(&leaf(&[4, 8, 2, 1])));
            let run = |y: Tensor| {
                let gradient = Tensor::arange(y.numel() as i64, of).view_as(&y);
                Tensor::run_backward(&[(&y * gradient).sum(None)], &[&x, &weight], false, false)
            };
            let direct = x.conv2d(&weight, None::<&Tensor>, [2, 2], [padding; 2], [1, 1], 1);
            let ours = conv.forward(&x);
            assert!(ours.allclose(&direct, 1e-12, 1e-12, false));
            for (ours, theirs) in run(ours).iter().zip(run(direct)) {
                assert!(ours.allclose(&theirs, 1e-12, 1e-12, false));
            }
        }
    }
}
