//! ResNet-18/34/50/101 with torchvision's layer names and numerics (v1.5: the stride sits in the
//! 3×3 convolution), returning Res2..Res5.
//!
//! He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. No classifier.

use tch::{Device, Tensor};

use super::norm::{BatchNorm, Moments, Norm, Settling, Shared};
use super::weights::{Builder, Init};
use crate::config::{Model as Config, Stem};
use crate::shapes;
use crate::shim::ShimError;
use crate::shim::norm::Then;

#[derive(Debug)]
struct Conv {
    weight: Tensor,
    stride: i64,
    padding: i64,
}

impl Conv {
    fn new(build: &mut Builder<'_>, name: &str, conv: &shapes::Conv) -> Conv {
        let shapes::Conv { from, to, kernel, stride } = *conv;
        let shape = [to, from, kernel, kernel];
        let weight = build.parameter(format!("{name}.weight"), &shape, Init::Convolution);
        Conv { weight, stride, padding: kernel / 2 }
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
    fn new(build: &mut Builder<'_>, name: &str, block: &shapes::Block) -> Block {
        let mut layer = |conv: &str, norm: &str, shape: &shapes::Conv| {
            let conv = Conv::new(build, &format!("{name}.{conv}"), shape);
            (conv, BatchNorm::new(build, &format!("{name}.{norm}"), shape.to))
        };
        let convs = (1..).zip(&block.convs);
        let layers =
            convs.map(|(i, shape)| layer(&format!("conv{i}"), &format!("bn{i}"), shape)).collect();
        let downsample = block.downsample.as_ref();
        let downsample = downsample.map(|shape| layer("downsample.0", "downsample.1", shape));
        Block { layers, downsample }
    }

    fn forward(&self, x: Shared, norm: &mut Norm<'_>) -> Result<Shared, ShimError> {
        let Some(((last_conv, last_bn), first)) = self.layers.split_last() else { return Ok(x) };
        let mut y = x.map;
        for (conv, bn) in first {
            y = bn.forward(&conv.forward(&y), norm, Then::Relu)?.map;
        }
        let y = last_conv.forward(&y);
        match &self.downsample {
            Some((conv, bn)) => last_bn.add_normalised(&y, &conv.forward(&x.again), bn, norm),
            None => last_bn.forward(&y, norm, Then::AddThenRelu(&x.again)),
        }
    }
}

#[derive(Debug)]
pub(super) struct ResNet {
    stem: Stem,
    conv1: Conv,
    bn1: BatchNorm,
    stages: [Vec<Block>; 4],
}

impl ResNet {
    pub(super) fn new(build: &mut Builder<'_>, name: &str, config: &Config) -> ResNet {
        let shape = shapes::ResNet::of(config);
        let conv1 = Conv::new(build, &format!("{name}.conv1"), &shape.stem);
        let bn1 = BatchNorm::new(build, &format!("{name}.bn1"), shape.stem.to);
        let mut stage = 0;
        let stages = shape.stages.map(|blocks| {
            stage += 1;
            let name = |i: usize| format!("{name}.layer{stage}.{i}");
            let blocks = blocks.iter().enumerate();
            blocks.map(|(i, block)| Block::new(build, &name(i), block)).collect()
        });
        ResNet { stem: config.stem, conv1, bn1, stages }
    }

    /// Images `[n, 3, h, w]` to the maps of Res2 to Res`last`, `[n, c, h', w']` each.
    pub(super) fn forward(
        &self,
        images: &Tensor,
        norm: &mut Norm<'_>,
        last: u8,
    ) -> Result<Vec<Tensor>, ShimError> {
        let then = match self.stem {
            Stem::Imagenet => Then::ReluThenPool,
            Stem::Cifar => Then::Relu,
        };
        let mut x = self.bn1.forward(&self.conv1.forward(images), norm, then)?;
        let mut maps: Vec<Tensor> = Vec::with_capacity(4);
        for stage in &self.stages[..usize::from(last) - 1] {
            for block in stage {
                x = block.forward(x, norm)?;
            }
            maps.push(x.averaged.shallow_clone());
        }
        Ok(maps)
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
            let shape = shapes::Conv { from: 8, to: 5, kernel: 1, stride: 2 };
            assert_eq!(ours.size()[2], shape.edge(edge));
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
