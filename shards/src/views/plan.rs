//! What was drawn: every number that rendering needs, and nothing else.

use serde::{Deserialize, Serialize};

use super::numbers::{self, Numbers};
use super::recipe::{CELLS, ColorStep, Crop, GRID, Photometric, Recipe};
use crate::decode::Part;
pub use crate::decode::Rect;

/// Streams of a sample's views. Part of the address of every drawn number: never renumber.
const GLOBAL_VIEWS: [u8; 2] = [0, 1];
const LOCAL_VIEWS: [u8; 2] = [2, 3];

/// Tries at a random box before the central one is taken; torchvision's number.
const CROP_TRIES: usize = 10;

/// One photometric operation with its drawn number.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Blend with black: factor 0 is black, 1 the image.
    Brightness(f32),
    /// Blend with the image's mean gray: factor 0 is flat, 1 the image.
    Contrast(f32),
    /// Blend with the image's gray: factor 0 is gray, 1 the image.
    Saturation(f32),
    /// Shift of the hue in turns, in [-0.5, 0.5].
    Hue(f32),
    /// Three equal channels of luma.
    Gray,
    /// Gaussian blur with this standard deviation in pixels.
    Blur(f32),
    /// Stretch each channel to 0..=255.
    AutoContrast,
    /// Even out each channel's histogram.
    Equalize,
    /// 255 minus the value.
    Invert,
    /// Keep this many high bits, 0 to 8.
    Posterize(u8),
    /// Invert values from this threshold on, 0 to 256.
    Solarize(u16),
    /// Add to values below 128.
    SolarizeAdd(u8),
    /// Blend with the smoothed image: factor 0 is smooth, 1 the image.
    Sharpness(f32),
    /// Fetch pixel (x, y) from `matrix` * (x + 1/2, y + 1/2, 1); grey outside the image.
    Affine {
        /// Two rows of three: input x, then input y, in pixels.
        matrix: [f64; 6],
        /// Bicubic instead of bilinear interpolation.
        bicubic: bool,
    },
}

/// Everything drawn for one global view.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ViewPlan {
    /// Side of the view in pixels.
    pub size: u32,
    /// The box of the image that is resized to `size` x `size`.
    pub crop: Rect,
    /// Colour and blur, in the order they are applied.
    pub ops: Vec<Op>,
    /// Mirror left and right, last.
    pub flip: bool,
}

/// Everything drawn for one local view.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LocalPlan {
    /// The whole image before the cut, `size` a multiple of 3.
    pub whole: ViewPlan,
    /// Side of a patch in pixels.
    pub patch: u32,
    /// For each cell of the grid, row-major: the patch's left and top edge within its cell.
    pub offsets: [[u32; 2]; CELLS as usize],
    /// Slot `i` of the output holds the patch of cell `order[i]`. A permutation of `0..9`.
    pub order: [u8; CELLS as usize],
}

/// Everything drawn for one sample in one epoch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SamplePlan {
    /// The query's and the key's global view.
    pub global: [ViewPlan; 2],
    /// The query's and the key's patch set.
    pub local: Option<[LocalPlan; 2]>,
}

/// The reductions a picture may be decoded at, and how many of its pixels along each side a pixel of
/// a view must at least be made of for it: three decoded ones at 1/2, four at 1/4.
///
/// So no view of a photograph was further than 0.84 levels of 255 on average from that of the whole
/// picture, colour and blur included, where a level is allowed. With two decoded ones it would be
/// 1.2 before colour; at 1/8 hardly a photo has so many (`benches/record/2026-11-23-scale.md`).
pub const REDUCTIONS: [(u32, u32); 2] = [(2, 6), (4, 16)];

/// The part of a picture that views look at: the smallest box around their crops, and the largest
/// reduction, of those up to `reduction_max`, that [`REDUCTIONS`] allows for the shorter side of
/// each. `None` without views.
pub fn needed<'a>(
    views: impl IntoIterator<Item = &'a ViewPlan>,
    reduction_max: u32,
) -> Option<Part> {
    let mut reduction = reduction_max;
    let boxes = views.into_iter().map(|view| {
        let short = u64::from(view.crop.width.min(view.crop.height));
        let allowed = REDUCTIONS.iter().rfind(|(reduction, ratio)| {
            *reduction <= reduction_max && short >= u64::from(view.size) * u64::from(*ratio)
        });
        reduction = reduction.min(allowed.map_or(1, |allowed| allowed.0));
        view.crop
    });
    let area = boxes.reduce(|all, one| all.union(&one))?;
    Some(Part { area, reduction })
}

impl Recipe {
    /// Draws the views of `sample` (of `width` x `height` pixels, both at least 1) in `epoch` of the
    /// run with this `seed`. The four views have independent streams.
    ///
    /// Numbers follow torchvision's distributions: `RandomResizedCrop`, `ColorJitter`,
    /// `RandomGrayscale`, `RandomHorizontalFlip`; blur as in MoCo v2. The recipe is expected to be
    /// [valid](Recipe::validate).
    pub fn draw(&self, width: u32, height: u32, seed: u64, epoch: u32, sample: u64) -> SamplePlan {
        let mut plan = SamplePlan::default();
        self.draw_into([width, height], (seed, epoch, sample), &mut plan);
        plan
    }

    /// [`Recipe::draw`] into a plan whose memory is used again. The image's width and height; run
    /// seed, epoch, sample.
    pub fn draw_into(
        &self,
        image: [u32; 2],
        (seed, epoch, sample): (u64, u32, u64),
        into: &mut SamplePlan,
    ) {
        let [width, height] = image;
        assert!(width > 0 && height > 0, "an image of {width}x{height} has no views");
        for (view, plan) in GLOBAL_VIEWS.into_iter().zip(&mut into.global) {
            let recipe = &self.global;
            let mut numbers = Numbers::at(seed, epoch, sample, view);
            draw_view(
                (recipe.size, &recipe.crop, recipe.flip),
                (&recipe.photometric, true),
                image,
                &mut numbers,
                plan,
            );
        }
        let Some(recipe) = &self.local else {
            into.local = None;
            return;
        };
        // RandAugment is the global views' alone unless the local views ask for it themselves.
        let photometric = match &recipe.photometric {
            Some(own) => (own, true),
            None => (&self.global.photometric, false),
        };
        for (view, plan) in LOCAL_VIEWS.into_iter().zip(into.local.get_or_insert_default()) {
            let mut numbers = Numbers::at(seed, epoch, sample, view);
            draw_view(
                (recipe.size, &recipe.crop, recipe.flip),
                photometric,
                image,
                &mut numbers,
                &mut plan.whole,
            );
            plan.patch = recipe.patch;
            let room = recipe.size / GRID - recipe.patch + 1;
            for offset in plan.offsets.iter_mut().flatten() {
                *offset = numbers.below(room);
            }
            plan.order = std::array::from_fn(|cell| cell as u8);
            numbers.shuffle(&mut plan.order);
        }
    }
}

fn draw_view(
    (size, crop, flip): (u32, &Crop, f64),
    (photometric, with_randaugment): (&Photometric, bool),
    image: [u32; 2],
    numbers: &mut Numbers,
    into: &mut ViewPlan,
) {
    into.size = size;
    into.crop = draw_crop(crop, image, numbers);
    into.ops.clear();
    for step in &photometric.order {
        if *step != ColorStep::RandAugment || with_randaugment {
            draw_step(*step, photometric, size, &mut into.ops, numbers);
        }
    }
    into.flip = numbers.chance(flip);
}

/// torchvision's `RandomResizedCrop.get_params`.
fn draw_crop(crop: &Crop, [width, height]: [u32; 2], numbers: &mut Numbers) -> Rect {
    let area = f64::from(width) * f64::from(height);
    let (ratio_least, ratio_largest) = (crop.ratio[0], crop.ratio[1]);
    let log_ratio = [numbers::ln(ratio_least), numbers::ln(ratio_largest)];
    for _ in 0..CROP_TRIES {
        let target = area * numbers.uniform(crop.scale[0], crop.scale[1]);
        let ratio = numbers::exp(numbers.uniform(log_ratio[0], log_ratio[1]));
        // Python's round(): half to even. The casts saturate, and an overlong side fails the test.
        let w = (target * ratio).sqrt().round_ties_even() as u32;
        let h = (target / ratio).sqrt().round_ties_even() as u32;
        if 0 < w && w <= width && 0 < h && h <= height {
            let top = numbers.below(height - h + 1);
            let left = numbers.below(width - w + 1);
            return Rect { left, top, width: w, height: h };
        }
    }
    let ratio = f64::from(width) / f64::from(height);
    // A one-pixel strip can round to a side of 0, where torchvision fails: take one pixel.
    let (w, h) = if ratio < ratio_least {
        (width, ((f64::from(width) / ratio_least).round_ties_even() as u32).clamp(1, height))
    } else if ratio > ratio_largest {
        (((f64::from(height) * ratio_largest).round_ties_even() as u32).clamp(1, width), height)
    } else {
        (width, height)
    };
    Rect { left: (width - w) / 2, top: (height - h) / 2, width: w, height: h }
}

fn draw_step(
    step: ColorStep,
    from: &Photometric,
    size: u32,
    ops: &mut Vec<Op>,
    numbers: &mut Numbers,
) {
    match step {
        ColorStep::Jitter => {
            let jitter = &from.jitter;
            if !numbers.chance(jitter.probability) {
                return;
            }
            let mut which = [0u8, 1, 2, 3];
            numbers.shuffle(&mut which);
            let mut factor = |x: f64| numbers.uniform((1.0 - x).max(0.0), 1.0 + x) as f32;
            let brightness = factor(jitter.brightness);
            let contrast = factor(jitter.contrast);
            let saturation = factor(jitter.saturation);
            let hue = numbers.uniform(-jitter.hue, jitter.hue) as f32;
            for op in which {
                match op {
                    0 if jitter.brightness > 0.0 => ops.push(Op::Brightness(brightness)),
                    1 if jitter.contrast > 0.0 => ops.push(Op::Contrast(contrast)),
                    2 if jitter.saturation > 0.0 => ops.push(Op::Saturation(saturation)),
                    3 if jitter.hue > 0.0 => ops.push(Op::Hue(hue)),
                    _ => {}
                }
            }
        }
        ColorStep::Gray => {
            if numbers.chance(from.gray) {
                ops.push(Op::Gray);
            }
        }
        ColorStep::Blur => {
            if numbers.chance(from.blur.probability) {
                let [least, largest] = from.blur.sigma;
                ops.push(Op::Blur(numbers.uniform(least, largest) as f32));
            }
        }
        ColorStep::RandAugment => from.randaugment.draw(size, ops, numbers),
    }
}
