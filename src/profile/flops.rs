//! Floating-point operations per image of a configuration's convolutions and heads, for simulating a
//! trainer by the speed of its device.

use crate::config::Config;
use crate::method::{Design, HeadDesign, PassDesign};
use crate::shapes::{self, Conv, ResNet};

/// Forward passes that an image of the student counts for: the forward pass and, at twice its cost,
/// the backward pass.
const TRAINED: f64 = 3.0;

/// Multiply-adds of one forward pass of the backbone over a square image of `side` pixels.
pub fn backbone(config: &Config, side: u64) -> u64 {
    let net = ResNet::of(&config.model);
    let of = |conv: &Conv, edge: i64| conv.weights() * conv.edge(edge) * conv.edge(edge);
    let image = side as i64; // at most 4096
    let (mut total, mut edge) = (of(&net.stem, image), net.edge_behind_stem(image));
    for block in net.stages.iter().flatten() {
        total += block.downsample.as_ref().map_or(0, |conv| of(conv, edge));
        for conv in &block.convs {
            total += of(conv, edge);
            edge = conv.edge(edge);
        }
    }
    total as u64
}

/// Multiply-adds of a pass over one sample: the backbone on each of its images, and the heads.
pub fn pass(config: &Config, design: &Design, pass: &PassDesign) -> u64 {
    let edge = config.views.group(&pass.group).map_or(0, |group| u64::from(group.images().1));
    let of = |head: &HeadDesign| {
        head.multiply_adds(shapes::rows(&config.model, head, pass.images, edge as i64))
    };
    let heads: i64 = design.heads_of(&pass.scope).map(of).sum();
    pass.images as u64 * backbone(config, edge) + heads as u64
}

/// Floating-point operations of one training step a sample: the student's forward and backward passes, and
/// the teacher's forward passes, if there is one.
pub fn training(config: &Config) -> f64 {
    let design = config.design();
    let forward = |design: &Design| -> f64 {
        design.passes.iter().map(|one| pass(config, design, one)).sum::<u64>() as f64
    };
    let teacher = if design.teacher.is_some() { forward(&design.of_teacher()) } else { 0.0 };
    let again = if design.is_coupled && config.train.accumulate > 1 { 1.0 } else { 0.0 };
    2.0 * (forward(&design) * (TRAINED + again) + teacher)
}

/// Floating-point operations of one supervised step an image: one view, forward and backward.
pub fn supervised(config: &Config) -> f64 {
    2.0 * backbone(config, u64::from(config.crop_size())) as f64 * TRAINED
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Backbone, Stem};
    use crate::method::Moco;

    fn with(backbone: Backbone, stem: Stem) -> Config {
        let mut config = Config::default();
        (config.model.backbone, config.model.stem) = (backbone, stem);
        config
    }

    /// The figures that torchvision's documentation gives (as GFLOPS, without the last layer's 0.002
    /// and 0.0005).
    #[test]
    fn backbones_cost_what_torchvision_says() {
        for (model, giga) in [
            (Backbone::Resnet18, 1.814),
            (Backbone::Resnet34, 3.664),
            (Backbone::Resnet50, 4.089),
            (Backbone::Resnet101, 7.801),
        ] {
            let found = backbone(&with(model, Stem::Imagenet), 224) as f64 / 1e9;
            assert!((found - giga).abs() < 0.003, "{model:?}: {found} for {giga}");
        }
    }

    #[test]
    fn a_step_is_four_forward_passes_over_both_scopes() {
        let mut config = with(Backbone::Resnet50, Stem::Imagenet);
        let whole = training(&config);
        let moco = config.method.as_a::<Moco>().unwrap().clone();
        config.method = Moco { local: false, ..moco }.into();
        let global = training(&config);
        assert!((global / 1e9 - 8.0 * 4.089).abs() < 0.2, "{global}");
        // Nine patches of 64 pixels: 9 * (64 / 224)^2 = 0.73 of a view, and the heads.
        assert!((1.70..1.80).contains(&(whole / global)), "{}", whole / global);
        assert!(supervised(&config) < global);
        let small = with(Backbone::Resnet18, Stem::Cifar);
        assert!(backbone(&small, 32) < backbone(&small, 64));
    }
}
