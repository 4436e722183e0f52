//! Average precision of detections: COCO's twelve numbers and PASCAL VOC's.
//!
//! Arithmetic on boxes alone. COCO's follows the definition of its evaluation (Lin et al., ECCV 2014; the
//! numbers of pycocotools), VOC's the development kits of 2007 (11 points) and 2010 (area under the curve).

mod coco;
pub(in crate::eval) mod read;
mod voc;

use serde::Serialize;

pub use coco::{Coco, evaluate as coco};
pub use read::{
    ReadError, coco_boxes, coco_found, coco_truth, voc_found, voc_images, voc_objects, voc_pixels,
    voc_truth,
};
pub use voc::{Voc, Year, evaluate as voc};

/// A box: left, top, width and height in pixels.
pub type Box4 = [f64; 4];

/// An object that is there.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Position of its image in [`Truth::images`].
    pub image: usize,
    /// Position of its category in [`Truth::categories`].
    pub category: usize,
    /// Where it is.
    pub bounds: Box4,
    /// Pixels of it, by which COCO sorts objects into small, medium and large.
    pub area: f64,
    /// Whether it is left out of the count, and a detection of it too: COCO's `iscrowd`, VOC's `difficult`.
    pub is_ignored: bool,
}

/// An object that was detected.
#[derive(Clone, Debug, PartialEq)]
pub struct Detection {
    /// Position of its image in [`Truth::images`].
    pub image: usize,
    /// Position of its category in [`Truth::categories`].
    pub category: usize,
    /// Where it was detected.
    pub bounds: Box4,
    /// Confidence: a higher one is looked at first. Of equal ones the first in the file is.
    pub score: f64,
}

/// What is there to be detected.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Truth {
    /// Names of the images, or their numbers as text.
    pub images: Vec<String>,
    /// Categories: COCO's number, or VOC's position from 1; and the name.
    pub categories: Vec<(i64, String)>,
    /// All objects.
    pub objects: Vec<Object>,
}

/// One category's share of a result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OfCategory {
    /// Its name.
    pub name: String,
    /// Average precision in percent, over the thresholds 0.50 to 0.95; none without an object.
    pub ap: Option<f64>,
    /// At the threshold 0.5.
    pub ap50: Option<f64>,
}

/// Thresholds of overlap: 0.50, 0.55, … 0.95.
const THRESHOLDS: usize = 10;

/// The thresholds as pycocotools has them, to the last bit: some overlaps are equal to one.
fn thresholds() -> [f64; THRESHOLDS] {
    let step = (0.95 - 0.5) / 9.0;
    std::array::from_fn(|i| if i == 9 { 0.95 } else { i as f64 * step + 0.5 })
}

/// The mean, or none of nothing.
fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.into_iter().fold((0.0, 0), |(sum, n), value| (sum + value, n + 1));
    (count > 0).then(|| sum / f64::from(count))
}

/// Positions in the order of falling scores; equal ones stay in order.
fn by_score(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order
}

/// What lies at each pair of image and category: positions in `of`.
fn grouped(
    of: impl Iterator<Item = (usize, usize)>,
) -> std::collections::HashMap<(usize, usize), Vec<usize>> {
    let mut groups = std::collections::HashMap::<_, Vec<usize>>::new();
    for (position, (category, image)) in of.enumerate() {
        groups.entry((category, image)).or_default().push(position);
    }
    groups
}
