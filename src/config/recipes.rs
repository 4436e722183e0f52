//! The recipes that ship with the program, by name.

use super::error::ConfigError;
use super::read::nearest;

/// The recipes that ship with the program: name, one line, TOML.
pub const RECIPES: &[(&str, &str, &str)] = &[
    (
        "detco-r50",
        "DetCo, ResNet-50, ImageNet: the paper (200 epochs, batch 256)",
        include_str!("../recipes/detco-r50.toml"),
    ),
    (
        "detco-aa-r50",
        "DetCo+AA: detco-r50 with RandAugment on the crops",
        include_str!("../recipes/detco-aa-r50.toml"),
    ),
    (
        "moco-v2-r50",
        "MoCo v2, ResNet-50, ImageNet (200 epochs, batch 256)",
        include_str!("../recipes/moco-v2-r50.toml"),
    ),
    (
        "moco-v1-r50",
        "MoCo v1, ResNet-50, ImageNet (200 epochs, batch 256)",
        include_str!("../recipes/moco-v1-r50.toml"),
    ),
    (
        "densecl-r50",
        "DenseCL, ResNet-50, ImageNet (200 epochs, batch 256)",
        include_str!("../recipes/densecl-r50.toml"),
    ),
    (
        "simclr-r50",
        "SimCLR, ResNet-50, ImageNet (200 epochs, batch 256, LARS)",
        include_str!("../recipes/simclr-r50.toml"),
    ),
    (
        "byol-r50",
        "BYOL, ResNet-50, ImageNet (200 epochs, batch 4096, LARS)",
        include_str!("../recipes/byol-r50.toml"),
    ),
    (
        "swav-r50",
        "SwAV, ResNet-50, ImageNet (200 epochs, batch 256, 2 large and 6 small views)",
        include_str!("../recipes/swav-r50.toml"),
    ),
    (
        "rotation-r50",
        "Rotation, ResNet-50, ImageNet (70 epochs, 128 images in four rotations)",
        include_str!("../recipes/rotation-r50.toml"),
    ),
    (
        "jigsaw-r50",
        "Jigsaw, ResNet-50, ImageNet (105 epochs, batch 256, 2000 permutations)",
        include_str!("../recipes/jigsaw-r50.toml"),
    ),
    (
        "detco-cifar",
        "DetCo, ResNet-18 with a CIFAR stem, 32-pixel images",
        include_str!("../recipes/detco-cifar.toml"),
    ),
    (
        "moco-v2-cifar",
        "MoCo v2, ResNet-18 with a CIFAR stem, 32-pixel images",
        include_str!("../recipes/moco-v2-cifar.toml"),
    ),
    (
        "densecl-cifar",
        "DenseCL, ResNet-18 with a CIFAR stem, 32-pixel images",
        include_str!("../recipes/densecl-cifar.toml"),
    ),
    (
        "simclr-cifar",
        "SimCLR, ResNet-18 with a CIFAR stem, 32-pixel images",
        include_str!("../recipes/simclr-cifar.toml"),
    ),
    (
        "byol-cifar",
        "BYOL, ResNet-18 with a CIFAR stem, 32-pixel images",
        include_str!("../recipes/byol-cifar.toml"),
    ),
    (
        "swav-cifar",
        "SwAV, ResNet-18 with a CIFAR stem, 32-pixel images, two views",
        include_str!("../recipes/swav-cifar.toml"),
    ),
    (
        "rotation-cifar",
        "Rotation, ResNet-18 with a CIFAR stem, 32-pixel images",
        include_str!("../recipes/rotation-cifar.toml"),
    ),
    (
        "jigsaw-cifar",
        "Jigsaw, ResNet-18 with a CIFAR stem, 48-pixel images in nine patches",
        include_str!("../recipes/jigsaw-cifar.toml"),
    ),
    (
        "detco-small",
        "DetCo, narrow ResNet-18, 48-pixel crops: minutes on a laptop",
        include_str!("../recipes/detco-small.toml"),
    ),
    (
        "moco-v2-small",
        "MoCo v2, narrow ResNet-18, 48-pixel crops: minutes on a laptop",
        include_str!("../recipes/moco-v2-small.toml"),
    ),
    (
        "densecl-small",
        "DenseCL, narrow ResNet-18, 48-pixel crops: minutes on a laptop",
        include_str!("../recipes/densecl-small.toml"),
    ),
    (
        "byol-small",
        "BYOL, narrow ResNet-18, 48-pixel views: minutes on a laptop",
        include_str!("../recipes/byol-small.toml"),
    ),
    (
        "swav-small",
        "SwAV, narrow ResNet-18, 48- and 24-pixel views: minutes on a laptop",
        include_str!("../recipes/swav-small.toml"),
    ),
];

/// What a file builds upon that names no base; equal to `Config::default()`.
pub(super) const DEFAULT: &str = "detco-r50";

pub(super) fn unknown_recipe(name: &str) -> ConfigError {
    let hint = nearest(name, RECIPES.iter().map(|(name, ..)| *name));
    ConfigError::UnknownRecipe {
        name: name.to_string(),
        hint: hint.map(|name| format!("; did you mean {name:?}?")).unwrap_or_default(),
        known: known_recipes(),
    }
}

pub(super) fn known_recipes() -> String {
    RECIPES.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(", ")
}
