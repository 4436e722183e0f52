//! Crops: the part of an image that a view shows.

use serde::{Deserialize, Serialize};

use super::plan::ViewPlan;
use super::rng::{self, Rng};
use super::valid::{RecipeError, ordered, range, share, side};
use crate::decode::Rect;

/// Tries at a random box before the central one is taken; torchvision's number.
const TRIES: usize = 10;

/// Most of an image's long side after `resize`, in short sides: what a strip of a picture may come to
/// in memory.
const STRIP_MAX: u64 = 32;

/// How a box is chosen, and whether the image is resized before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Form", into = "Form")]
pub struct Crop {
    /// Resizes the whole image first, so that its short side has this many pixels (torchvision's
    /// `Resize`). What is taken from it is resized to the view's size, so there are two resamplings.
    pub resize: Option<u32>,
    /// How pixels are weighed in a resize.
    pub filter: Filter,
    /// The box.
    pub region: Region,
}

/// Pillow's filters, stretched by the reduction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// A triangle of two pixels.
    #[default]
    Bilinear,
    /// A cubic of four pixels.
    Bicubic,
}

/// How the box of a view is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Region {
    /// torchvision's `RandomResizedCrop`: ten tries at a box of random area and aspect ratio, then
    /// the largest central box whose ratio is allowed.
    Random {
        /// Least and largest share of the image's area, uniform.
        scale: [f64; 2],
        /// Least and largest width / height, uniform in its logarithm.
        ratio: [f64; 2],
    },
    /// A square at a random place; its side is this share of the short side.
    Square(f64),
    /// The square in the middle; its side is this share of the short side.
    Center(f64),
    /// All of the image, whatever its ratio.
    Whole,
}

/// torchvision's: 3/4 to 4/3.
const RATIO: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
/// torchvision's: 8 % to 100 % of the area.
const SCALE: [f64; 2] = [0.08, 1.0];

impl Default for Crop {
    /// torchvision's `RandomResizedCrop` with its defaults: scale (0.08, 1), ratio (3/4, 4/3).
    fn default() -> Self {
        Crop::random(SCALE)
    }
}

impl Crop {
    /// torchvision's `RandomResizedCrop` with its ratios.
    pub fn random(scale: [f64; 2]) -> Crop {
        Crop {
            resize: None,
            filter: Filter::Bilinear,
            region: Region::Random { scale, ratio: RATIO },
        }
    }

    /// The square in the middle, of this share of the short side.
    pub fn center(share: f64) -> Crop {
        Crop { region: Region::Center(share), ..Crop::default() }
    }

    /// Sets the picture that the box lies in and the box.
    pub(super) fn draw(&self, image: [u32; 2], rng: &mut Rng, into: &mut ViewPlan) {
        let [width, height] = image;
        into.picture = image;
        into.filter = self.filter;
        into.resized = self.resize.map(|short| resized(image, short));
        let within = into.resized.unwrap_or([width, height]);
        into.crop = match self.region {
            Region::Random { scale, ratio } => random(scale, ratio, within, rng),
            Region::Square(share) => {
                let side = square(within, share);
                let top = rng.below(within[1] - side + 1);
                let left = rng.below(within[0] - side + 1);
                Rect { left, top, width: side, height: side }
            }
            Region::Center(share) => center(within, share, self.resize.is_some()),
            Region::Whole => Rect { left: 0, top: 0, width: within[0], height: within[1] },
        };
    }

    pub(super) fn validate(&self, field: &str) -> Result<(), RecipeError> {
        if let Some(short) = self.resize {
            side(&format!("{field}.resize"), short, 1)?;
        }
        match self.region {
            Region::Random { scale, ratio } => {
                // A scale of 0 would draw empty boxes, one above 1 boxes larger than the image.
                let field_scale = format!("{field}.scale");
                for value in scale {
                    share(&field_scale, value)?;
                }
                ordered(&field_scale, scale)?;
                range(&format!("{field}.ratio"), ratio, 0.01, 100.0)
            }
            Region::Square(of) => share(&format!("{field}.square"), of),
            Region::Center(of) => share(&format!("{field}.center"), of),
            Region::Whole => Ok(()),
        }
    }
}

/// The sides after torchvision's `Resize(short)`: the long one is rounded down.
fn resized([width, height]: [u32; 2], short: u32) -> [u32; 2] {
    let [least, most] = [width.min(height), width.max(height)].map(u64::from);
    let long = u64::from(short) * most / least.max(1);
    let long = long.min(STRIP_MAX * u64::from(short)) as u32;
    if width <= height { [short, long] } else { [long, short] }
}

/// The side of a square of this share of the short side.
fn square([width, height]: [u32; 2], share: f64) -> u32 {
    let short = width.min(height);
    // In 32 bits, as evaluation has always rounded.
    ((short as f32 * share as f32).round() as u32).clamp(1, short.max(1))
}

/// The central square. Of a resized picture where torchvision's `CenterCrop` has it, which rounds a half
/// to even; of an image as it is, rounded down.
fn center(within: [u32; 2], share: f64, half_to_even: bool) -> Rect {
    let side = square(within, share);
    let [left, top] = within.map(|length| match (length - side) / 2 {
        before if half_to_even && (length - side) % 4 == 3 => before + 1,
        before => before,
    });
    Rect { left, top, width: side, height: side }
}

/// torchvision's `RandomResizedCrop.get_params`.
fn random(scale: [f64; 2], ratio: [f64; 2], [width, height]: [u32; 2], rng: &mut Rng) -> Rect {
    let area = f64::from(width) * f64::from(height);
    let [ratio_least, ratio_largest] = ratio;
    let log_ratio = [rng::ln(ratio_least), rng::ln(ratio_largest)];
    for _ in 0..TRIES {
        let target = area * rng.uniform(scale[0], scale[1]);
        let ratio = rng::exp(rng.uniform(log_ratio[0], log_ratio[1]));
        // Python's round(): half to even. The casts saturate, and an overlong side fails the test.
        let w = (target * ratio).sqrt().round_ties_even() as u32;
        let h = (target / ratio).sqrt().round_ties_even() as u32;
        if 0 < w && w <= width && 0 < h && h <= height {
            let top = rng.below(height - h + 1);
            let left = rng.below(width - w + 1);
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

/// A crop as a recipe file has it: at most one of `scale` with `ratio`, `square`, `center`, `whole`.
#[derive(Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Form {
    #[serde(skip_serializing_if = "Option::is_none")]
    resize: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    filter: Option<Filter>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale: Option<[f64; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<[f64; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    square: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    center: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    whole: Option<bool>,
}

impl TryFrom<Form> for Crop {
    type Error = &'static str;

    fn try_from(form: Form) -> Result<Crop, &'static str> {
        let Form { resize, filter, scale, ratio, square, center, whole } = form;
        let whole = whole.filter(|whole| *whole);
        let region = match (scale.or(ratio).is_some(), square, center, whole) {
            (_, None, None, None) => {
                Region::Random { scale: scale.unwrap_or(SCALE), ratio: ratio.unwrap_or(RATIO) }
            }
            (false, Some(share), None, None) => Region::Square(share),
            (false, None, Some(share), None) => Region::Center(share),
            (false, None, None, Some(_)) => Region::Whole,
            _ => {
                return Err("a crop has one of `scale` and `ratio`, `square`, `center`, \
                            `whole = true`");
            }
        };
        Ok(Crop { resize, filter: filter.unwrap_or_default(), region })
    }
}

impl From<Crop> for Form {
    fn from(Crop { resize, filter, region }: Crop) -> Form {
        let filter = Some(filter).filter(|filter| *filter != Filter::Bilinear);
        let form = Form { resize, filter, ..Form::default() };
        match region {
            Region::Random { scale, ratio } => {
                Form { scale: Some(scale), ratio: Some(ratio), ..form }
            }
            Region::Square(share) => Form { square: Some(share), ..form },
            Region::Center(share) => Form { center: Some(share), ..form },
            Region::Whole => Form { whole: Some(true), ..form },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_after_resizing_are_torchvisions() {
        for (image, sides) in [
            ([500, 375], [341, 256]),
            ([375, 500], [256, 341]),
            ([256, 256], [256, 256]),
            ([100, 99], [258, 256]),
            ([10_000, 10], [8192, 256]), // torchvision's would have 256,000 pixels a row
        ] {
            assert_eq!(resized(image, 256), sides);
        }
    }

    #[test]
    fn the_centre_is_torchvisions_of_a_resized_picture() {
        // Python: round((341 - 224) / 2.0) = 58, round((339 - 224) / 2.0) = 58.
        for (length, left) in [(341, 58), (339, 58), (343, 60), (340, 58), (224, 0)] {
            assert_eq!(center([length, 224], 1.0, true).left, left, "{length}");
        }
        assert_eq!(center([339, 224], 1.0, false).left, 57);
        assert_eq!(
            center([256, 256], 0.875, true),
            Rect { left: 16, top: 16, width: 224, height: 224 }
        );
    }
}
