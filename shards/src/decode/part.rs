//! Regions of interest: the box of an image that is decoded, and its reduction.

use serde::{Deserialize, Serialize};

use super::Image;

/// A box in pixels, never empty, inside its image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rect {
    /// Pixels left of the box.
    pub left: u32,
    /// Pixels above the box.
    pub top: u32,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
}

impl Rect {
    /// Whether `other` lies in this box.
    pub fn contains(&self, other: &Rect) -> bool {
        let [[left, right], [top, bottom]] = self.edges();
        let [[other_left, other_right], [other_top, other_bottom]] = other.edges();
        left <= other_left && other_right <= right && top <= other_top && other_bottom <= bottom
    }

    /// The smallest box that holds both.
    pub fn union(&self, other: &Rect) -> Rect {
        let [x, y] = [0, 1].map(|axis| {
            let (own, other) = (self.edges()[axis], other.edges()[axis]);
            [own[0].min(other[0]), own[1].max(other[1])]
        });
        let length = |[from, to]: [u64; 2]| (to - from) as u32;
        Rect { left: x[0] as u32, top: y[0] as u32, width: length(x), height: length(y) }
    }

    /// From and to along x, then along y; in 64 bits, so that no box is too large.
    fn edges(&self) -> [[u64; 2]; 2] {
        let edge = |from: u32, length: u32| [u64::from(from), u64::from(from) + u64::from(length)];
        [edge(self.left, self.width), edge(self.top, self.height)]
    }
}

/// A region of interest: a box of an image and its reduction, requested or decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The box, in pixels of the whole picture. Of a decoded part, the left and the upper edge are
    /// multiples of the reduction.
    pub area: Rect,
    /// Pixels of the picture along each side of a decoded one: 1 for the picture as it is, 2 or 4
    /// for less. A decoded pixel stands for the square at multiples of it.
    pub reduction: u32,
}

impl Part {
    /// The whole image at full size.
    pub fn whole(width: u32, height: u32) -> Part {
        Part { area: Rect { left: 0, top: 0, width, height }, reduction: 1 }
    }
}

/// Decoded pixels and their region of the image.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// `[height / reduction, width / reduction, 3]` of the part, both rounded up.
    pub image: &'a Image,
    /// Where they lie.
    pub part: Part,
}

impl<'a> From<&'a Image> for Frame<'a> {
    /// A whole picture.
    fn from(image: &'a Image) -> Frame<'a> {
        Frame { image, part: Part::whole(image.width, image.height) }
    }
}
