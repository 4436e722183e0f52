//! Recipes by name: what the methods that papers compare are shown.
//!
//! Where a method's sources disagree, it is its most used recipe. All of them but BYOL's resize
//! bilinearly, and all change brightness by a factor, as torchvision's transforms of Pillow images do.

use super::crop::{Crop, Filter, Region};
use super::grid::{Grid, Shuffle};
use super::recipe::{Group, Recipe};
use super::step::{RandAugment, Step, Steps};

/// The one group of the recipes that supervised training and evaluation have.
pub const IMAGE: &str = "image";

type Make = fn() -> Recipe;

/// Name and recipe of each preset.
const PRESETS: [(&str, Make); 13] = [
    ("detco", Recipe::detco),
    ("detco-aa", Recipe::detco_aa),
    ("moco-v2", Recipe::moco_v2),
    ("moco-v1", Recipe::moco_v1),
    ("simclr", Recipe::simclr),
    ("byol", Recipe::byol),
    ("swav", Recipe::swav),
    ("pirl", Recipe::pirl),
    ("jigsaw", Recipe::jigsaw),
    ("rotation", Recipe::rotation),
    ("supervised", || Recipe::supervised(224)),
    ("center", || Recipe::center(224, 0.875)),
    ("squash", || Recipe::squash(256, 224)),
];

const FLIP: Step = Step::Flip { p: 0.5 };
const GRAY: Step = Step::Gray { p: 0.2 };
const BLUR: Step = Step::Blur { p: 0.5, sigma: [0.1, 2.0] };

/// A jitter of brightness, contrast and saturation by `strength`.
fn jitter(p: f64, strength: f64, hue: f64) -> Step {
    let [brightness, contrast, saturation] = [strength; 3];
    Step::Jitter { p, brightness, contrast, saturation, hue }
}

fn group(name: &str, count: u32, size: u32, crop: Crop, steps: Vec<Step>) -> Group {
    let (name, steps) = (name.to_owned(), Steps::Own(steps));
    Group { name, count, size, crop, steps, ..Group::default() }
}

fn patches(count: u32, crop: Crop, steps: Steps, shuffle: Shuffle) -> Group {
    let grid = Some(Grid { cells: 3, patch: 64, shuffle });
    Group { name: "patches".to_owned(), count, size: 255, crop, steps, grid, rotate: false }
}

/// MoCo v2's two crops, with these steps.
fn moco(steps: Vec<Step>) -> Group {
    group("crops", 2, 224, Crop::random([0.2, 1.0]), steps)
}

/// DetCo's two sets of nine patches.
fn detco_patches(steps: Steps) -> Group {
    patches(2, Crop::random([0.6, 1.0]), steps, Shuffle::Free)
}

impl Recipe {
    /// DetCo (arXiv 2102.04803, section 3.4) without RandAugment: MoCo v2's crops, and PIRL's 3x3
    /// patches with the same colour and blur before the cut. The default.
    pub fn detco() -> Recipe {
        let crops = moco(vec![jitter(0.8, 0.4, 0.1), GRAY, BLUR, FLIP]);
        Recipe { groups: vec![crops, detco_patches(Steps::Of("crops".to_owned()))] }
    }

    /// DetCo+AA: RandAugment on the crops, not on the patches.
    pub fn detco_aa() -> Recipe {
        let randaugment = Step::RandAugment(RandAugment::default());
        let crops = moco(vec![jitter(0.8, 0.4, 0.1), BLUR, randaugment, GRAY, FLIP]);
        let steps = vec![jitter(0.8, 0.4, 0.1), BLUR, GRAY, FLIP];
        Recipe { groups: vec![crops, detco_patches(steps.into())] }
    }

    /// MoCo v2 (`main_moco.py --aug-plus`): DetCo's crops alone.
    pub fn moco_v2() -> Recipe {
        Recipe::detco().only(&["crops"])
    }

    /// MoCo v1: gray before the jitter, which is always applied with hue 0.4; no blur.
    pub fn moco_v1() -> Recipe {
        Recipe { groups: vec![moco(vec![GRAY, jitter(1.0, 0.4, 0.4), FLIP])] }
    }

    /// SimCLR: two crops, stronger colour.
    pub fn simclr() -> Recipe {
        let steps = vec![FLIP, jitter(0.8, 0.8, 0.2), GRAY, BLUR];
        Recipe { groups: vec![group("crops", 2, 224, Crop::default(), steps)] }
    }

    /// BYOL: two crops with steps of their own. The first is always blurred, the second hardly ever,
    /// and sometimes solarized. Both are resized by a cubic.
    pub fn byol() -> Recipe {
        let steps = |blur, solarize| {
            let color =
                Step::Jitter { p: 0.8, brightness: 0.4, contrast: 0.4, saturation: 0.2, hue: 0.1 };
            let blur = Step::Blur { p: blur, sigma: [0.1, 2.0] };
            vec![FLIP, color, GRAY, blur, Step::Solarize { p: solarize, threshold: 128 }]
        };
        let crop = Crop { filter: Filter::Bicubic, ..Crop::default() };
        let view = |name, steps| group(name, 1, 224, crop, steps);
        Recipe { groups: vec![view("first", steps(1.0, 0.0)), view("second", steps(0.1, 0.2))] }
    }

    /// SwAV: two crops and six small ones.
    pub fn swav() -> Recipe {
        let steps = vec![FLIP, jitter(0.8, 0.8, 0.2), GRAY, BLUR];
        let large = group("crops", 2, 224, Crop::random([0.14, 1.0]), steps);
        let small = Group {
            steps: Steps::Of("crops".to_owned()),
            ..group("small", 6, 96, Crop::random([0.05, 0.14]), Vec::new())
        };
        Recipe { groups: vec![large, small] }
    }

    /// PIRL with blur: an image, and nine patches of another crop. Colour is changed before the cut.
    pub fn pirl() -> Recipe {
        let steps = vec![FLIP, jitter(0.8, 0.8, 0.2), GRAY, BLUR];
        let image = group("image", 1, 224, Crop::default(), steps);
        let (crop, steps) = (Crop::random([0.6, 1.0]), Steps::Of("image".to_owned()));
        Recipe { groups: vec![image, patches(1, crop, steps, Shuffle::Free)] }
    }

    /// Jigsaw: nine patches in one of 2,000 orders, whose index is the label. Often gray, so that
    /// chromatic aberration tells nothing.
    pub fn jigsaw() -> Recipe {
        let crop =
            Crop { resize: Some(256), region: Region::Square(255.0 / 256.0), ..Crop::default() };
        let steps = vec![FLIP, Step::Gray { p: 0.66 }];
        Recipe { groups: vec![patches(1, crop, steps.into(), Shuffle::Set(2000))] }
    }

    /// Rotation: one crop, and a quarter turn whose number is the label.
    pub fn rotation() -> Recipe {
        let crops = group("crops", 1, 224, Crop::default(), vec![FLIP]);
        Recipe { groups: vec![Group { rotate: true, ..crops }] }
    }

    /// Supervised training as torchvision's references do it: a random resized crop of 8 % to 100 %
    /// of the image, resized to `size` pixels, and a random flip.
    pub fn supervised(size: u32) -> Recipe {
        Recipe { groups: vec![group(IMAGE, 1, size, Crop::default(), vec![FLIP])] }
    }

    /// Evaluation: the centred square of `share` of the short side, resized to `size` pixels. 224/256
    /// is the usual share.
    pub fn center(size: u32, share: f64) -> Recipe {
        Recipe { groups: vec![group(IMAGE, 1, size, Crop::center(share), Vec::new())] }
    }

    /// Evaluation as for the support vector machines on VOC 2007: the image is resized to a short side
    /// of `short` pixels, and then to `size` x `size`, whatever its ratio.
    pub fn squash(short: u32, size: u32) -> Recipe {
        let crop = Crop { resize: Some(short), region: Region::Whole, ..Crop::default() };
        Recipe { groups: vec![group(IMAGE, 1, size, crop, Vec::new())] }
    }

    /// A preset by its name.
    pub fn preset(name: &str) -> Option<Recipe> {
        PRESETS.iter().find(|(known, _)| *known == name).map(|(_, make)| make())
    }

    /// The names that [`Recipe::preset`] knows.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|(name, _)| *name)
    }
}
