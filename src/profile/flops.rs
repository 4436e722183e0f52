//! What an image costs the device: the arithmetic of a configuration's convolutions and heads, for
//! simulating a trainer by the speed of its device.

use crate::config::{Backbone, Config, Head, LocalHead, Stem};

/// Forward passes that an image's query view counts for: the forward pass and, at twice its cost,
/// the backward pass.
const TRAINED: f64 = 3.0;

/// Multiply-adds of a convolution with a square kernel, on an output of `side` pixels.
fn conv(kernel: u64, input: u64, output: u64, side: u64) -> u64 {
    kernel * kernel * input * output * side * side
}

/// Side of the output of a layer with this stride.
fn strided(side: u64, stride: u64) -> u64 {
    side.div_ceil(stride)
}

/// Channels after a level, 2..=5.
fn channels(config: &Config, level: u8) -> u64 {
    (config.model.width as u64 * expansion(config.model.backbone)) << (level - 2)
}

fn expansion(backbone: Backbone) -> u64 {
    match backbone {
        Backbone::Resnet18 | Backbone::Resnet34 => 1,
        Backbone::Resnet50 | Backbone::Resnet101 => 4,
    }
}

/// Multiply-adds of one forward pass of the backbone over a square image of `side` pixels.
pub fn backbone(config: &Config, side: u64) -> u64 {
    let model = &config.model;
    let width = model.width as u64;
    let (mut total, mut side) = match model.stem {
        Stem::Imagenet => {
            let half = strided(side, 2);
            (conv(7, 3, width, half), strided(half, 2))
        }
        Stem::Cifar => (conv(3, 3, width, side), side),
    };
    let blocks = match model.backbone {
        Backbone::Resnet18 => [2, 2, 2, 2],
        Backbone::Resnet34 | Backbone::Resnet50 => [3, 4, 6, 3],
        Backbone::Resnet101 => [3, 4, 23, 3],
    };
    let expansion = expansion(model.backbone);
    let mut input = width;
    for (stage, blocks) in blocks.into_iter().enumerate() {
        let inner = width << stage;
        for block in 0..blocks {
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            let (before, output) = (side, inner * expansion);
            side = strided(side, stride);
            total += if expansion == 1 {
                conv(3, input, inner, side) + conv(3, inner, inner, side)
            } else {
                // The stride sits in the 3x3 convolution.
                conv(1, input, inner, before)
                    + conv(3, inner, inner, side)
                    + conv(1, inner, output, side)
            };
            if stride != 1 || input != output {
                total += conv(1, input, output, side);
            }
            input = output;
        }
    }
    total
}

/// Multiply-adds of the heads on one image's global view, and on its patch set.
fn heads(config: &Config) -> [u64; 2] {
    let dim = config.model.dim as u64;
    let mut sum = [0, 0];
    for level in &config.model.levels {
        let c = channels(config, *level);
        sum[0] += match config.model.head {
            Head::Linear => c * dim,
            Head::Mlp => c * c + c * dim,
        };
        sum[1] += match config.model.local_head {
            LocalHead::Narrow => 9 * c * c + c * dim,
            LocalHead::Wide => 81 * c * c + 9 * c * dim,
            LocalHead::Pirl => 9 * (c * c + c * dim) + 9 * dim * dim,
        };
    }
    sum
}

/// Floating-point operations of one training step an image: the query's forward and backward pass
/// and the key's forward pass, over the global view and, with local views, the nine patches.
pub fn training(config: &Config) -> f64 {
    let [global_heads, local_heads] = heads(config);
    let mut forward = backbone(config, u64::from(config.views.global.size)) + global_heads;
    if let Some(local) = config.views.local.as_ref().filter(|_| config.model.local) {
        forward += 9 * backbone(config, u64::from(local.patch)) + local_heads;
    }
    2.0 * forward as f64 * (TRAINED + 1.0)
}

/// Floating-point operations of one supervised step an image: one view, forward and backward.
pub fn supervised(config: &Config) -> f64 {
    2.0 * backbone(config, u64::from(config.views.global.size)) as f64 * TRAINED
}

#[cfg(test)]
mod tests {
    use super::*;

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
        config.model.local = false;
        let global = training(&config);
        assert!((global / 1e9 - 8.0 * 4.089).abs() < 0.2, "{global}");
        // Nine patches of 64 pixels: 9 * (64 / 224)^2 = 0.73 of a view, and the heads.
        assert!((1.70..1.80).contains(&(whole / global)), "{}", whole / global);
        assert!(supervised(&config) < global);
        let small = with(Backbone::Resnet18, Stem::Cifar);
        assert!(backbone(&small, 32) < backbone(&small, 64));
    }
}
