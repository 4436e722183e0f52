//! Crop, resize, mirror.

use detco_resize::{Filter, Resize};

use super::plan::Rect;
use crate::decode::Image;

/// The resizer and its intermediate image.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    resize: Resize,
}

impl Scratch {
    /// Cuts `crop` out of `image` and resizes it to `side` x `side` as Pillow's `BILINEAR` does.
    pub(super) fn crop_resize(&mut self, image: &Image, crop: Rect, side: usize, out: &mut [u8]) {
        let side = u32::try_from(side).expect("a view's side comes from a u32");
        let crop = [crop.left, crop.top, crop.width, crop.height];
        let size = (image.width, image.height);
        let (pixels, into) = (&image.pixels, (side, side));
        self.resize.crop_resize(Filter::Bilinear, pixels, size, crop, into, out);
    }
}

/// Mirrors left and right, in place.
pub(super) fn flip(pixels: &mut [u8], side: usize) {
    for row in pixels.chunks_exact_mut(side * 3) {
        let (pixels, _) = row.as_chunks_mut::<3>();
        pixels.reverse();
    }
}
