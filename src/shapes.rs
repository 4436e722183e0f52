//! The layers of a backbone as numbers: channels, kernels and strides of ResNet-18/34/50/101. The one table that is
//! read by who builds the layers, and by who counts parameters, bytes and operations. Needs no libtorch.

use crate::config::{Backbone, Config, Model, Stem};
use crate::method::design::{Design, HeadDesign, Layer};

/// A convolution with a square kernel, half of it as padding, no bias, and a batch normalisation behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv {
    /// Input channels.
    pub from: i64,
    /// Output channels.
    pub to: i64,
    /// Edge of the kernel.
    pub kernel: i64,
    /// Stride.
    pub stride: i64,
}

impl Conv {
    /// Edge of the map that it makes of one of this edge.
    pub fn edge(&self, from: i64) -> i64 {
        (from + 2 * (self.kernel / 2) - self.kernel) / self.stride + 1
    }

    /// Elements of that map.
    pub fn elements(&self, from: i64) -> i64 {
        self.to * self.edge(from) * self.edge(from)
    }

    /// Numbers of its kernel.
    pub fn weights(&self) -> i64 {
        self.kernel * self.kernel * self.from * self.to
    }

    /// Numbers that are trained: the kernel, and scale and offset of the normalisation.
    pub fn parameters(&self) -> i64 {
        self.weights() + 2 * self.to
    }
}

/// A residual block: basic (3×3, 3×3) or bottleneck (1×1, 3×3, 1×1). The first 3×3 convolution has the stride.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// One after the other.
    pub convs: Vec<Conv>,
    /// On the way around them, where shapes differ.
    pub downsample: Option<Conv>,
}

impl Block {
    fn new(from: i64, width: i64, bottleneck: bool, stride: i64) -> Block {
        let conv = |from, to, kernel, stride| Conv { from, to, kernel, stride };
        let convs = match bottleneck {
            true => vec![
                conv(from, width, 1, 1),
                conv(width, width, 3, stride),
                conv(width, 4 * width, 1, 1),
            ],
            false => vec![conv(from, width, 3, stride), conv(width, width, 3, 1)],
        };
        let to = if bottleneck { 4 * width } else { width };
        let downsample = (stride != 1 || from != to).then(|| conv(from, to, 1, stride));
        Block { convs, downsample }
    }

    /// All convolutions, the way around last.
    pub fn all(&self) -> impl Iterator<Item = &Conv> {
        self.convs.iter().chain(&self.downsample)
    }
}

/// A ResNet without its classifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResNet {
    /// The first convolution.
    pub stem: Conv,
    /// Whether a 3×3 max pooling of stride 2 follows it.
    pub pools: bool,
    /// Blocks of Res2 to Res5.
    pub stages: [Vec<Block>; 4],
}

impl ResNet {
    /// The backbone of this configuration.
    pub fn of(model: &Model) -> ResNet {
        let (blocks, bottleneck) = match model.backbone {
            Backbone::Resnet18 => ([2, 2, 2, 2], false),
            Backbone::Resnet34 => ([3, 4, 6, 3], false),
            Backbone::Resnet50 => ([3, 4, 6, 3], true),
            Backbone::Resnet101 => ([3, 4, 23, 3], true),
        };
        let (kernel, stride, pools) = match model.stem {
            Stem::Imagenet => (7, 2, true),
            Stem::Cifar => (3, 1, false),
        };
        let stem = Conv { from: 3, to: model.width, kernel, stride };
        let mut from = model.width;
        let stages = std::array::from_fn(|stage| {
            let width = model.width << stage;
            let block = |i: usize| {
                let stride = if stage > 0 && i == 0 { 2 } else { 1 };
                let block = Block::new(from, width, bottleneck, stride);
                from = if bottleneck { 4 * width } else { width };
                block
            };
            (0..blocks[stage]).map(block).collect()
        });
        ResNet { stem, pools, stages }
    }

    /// Channels of the maps of Res2 to Res5.
    pub fn channels(&self) -> [i64; 4] {
        self.stages.each_ref().map(|blocks| {
            blocks.last().and_then(|block| block.convs.last()).map_or(0, |conv| conv.to)
        })
    }

    /// Edge of the map before Res2, of an image of this edge.
    pub fn edge_behind_stem(&self, image: i64) -> i64 {
        let edge = self.stem.edge(image);
        if self.pools { (edge - 1) / 2 + 1 } else { edge }
    }

    /// Edge of the map of a stage, 2 to 5, of an image of this edge.
    pub fn edge_at(&self, level: u8, image: i64) -> i64 {
        let blocks = self.stages.iter().take(usize::from(level).saturating_sub(1)).flatten();
        let convs = blocks.flat_map(|block| &block.convs);
        convs.fold(self.edge_behind_stem(image), |edge, conv| conv.edge(edge))
    }

    /// All convolutions.
    pub fn convs(&self) -> impl Iterator<Item = &Conv> {
        std::iter::once(&self.stem).chain(self.stages.iter().flatten().flat_map(Block::all))
    }
}

/// Numbers that training changes: convolutions, the scales and offsets of batch normalisation, heads with their
/// biases.
pub fn parameters(model: &Model, design: &Design) -> i64 {
    let backbone: i64 = ResNet::of(model).convs().map(Conv::parameters).sum();
    backbone + design.heads.iter().map(HeadDesign::parameters).sum::<i64>()
}

/// Bytes of what an encoder has beside its parameters: running mean and variance of each normalisation, and its
/// counter.
pub fn buffer_bytes(model: &Model, design: &Design) -> i64 {
    let backbone: i64 = ResNet::of(model).convs().map(|conv| 2 * conv.to * FLOAT + 8).sum();
    let heads = design.heads.iter().flat_map(HeadDesign::layers);
    backbone + heads.map(Layer::buffer_bytes).sum::<i64>()
}

/// Bytes of a number in float32.
pub const FLOAT: i64 = 4;

/// Bytes of the queues of negative keys.
pub fn queue_bytes(design: &Design) -> i64 {
    let queues = |head: &HeadDesign| head.queue_names().len() as i64;
    design.heads.iter().map(|head| queues(head) * head.width * design.queue * FLOAT).sum()
}

/// Bytes of an encoder.
pub fn encoder_bytes(model: &Model, design: &Design) -> i64 {
    parameters(model, design) * FLOAT + buffer_bytes(model, design)
}

/// Bytes of the key encoder, 0 without one.
pub fn teacher_bytes(model: &Model, design: &Design) -> i64 {
    if design.teacher.is_some() { encoder_bytes(model, &design.of_teacher()) } else { 0 }
}

/// Bytes of a model: its encoders and the queues.
pub fn model_bytes(model: &Model, design: &Design) -> i64 {
    encoder_bytes(model, design) + teacher_bytes(model, design) + queue_bytes(design)
}

/// Rows of a head for a sample of so many images of this edge.
pub fn rows(model: &Model, head: &HeadDesign, images: i64, edge: i64) -> i64 {
    images * head.rows(ResNet::of(model).edge_at(head.level, edge).pow(2))
}

/// Bytes of a checkpoint: the model, and the momentum of one encoder.
pub fn checkpoint_bytes(config: &Config) -> i64 {
    let design = config.design();
    model_bytes(&config.model, &design) + parameters(&config.model, &design) * FLOAT
}
