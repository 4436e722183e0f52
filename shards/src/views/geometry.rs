//! Crop, resize, mirror.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};

use super::plan::Rect;
use crate::decode::Image;

/// The resizer and its intermediate image.
#[derive(Default)]
pub(super) struct Scratch {
    resizer: Resizer,
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scratch").finish_non_exhaustive()
    }
}

impl Scratch {
    /// Cuts `crop` out of `image` and resizes it to `side` x `side`: a triangle filter as wide as the
    /// reduction (antialiased), as Pillow's `BILINEAR`. Pixels outside the box are not looked at,
    /// because torchvision crops first.
    pub(super) fn crop_resize(&mut self, image: &Image, crop: Rect, side: usize, out: &mut [u8]) {
        let side = u32::try_from(side).expect("a view's side comes from a u32");
        let Rect { left, top, width, height } = crop;
        let frame = TypedImageRef::from_buffer(image.width, image.height, &image.pixels)
            .expect("an Image holds width * height * 3 bytes");
        let frame = TypedCroppedImage::from_ref(&frame, left, top, width, height)
            .unwrap_or_else(|e| panic!("{crop:?} in {}x{}: {e}", image.width, image.height));
        let mut out = TypedImage::from_buffer(side, side, out)
            .expect("the caller checked the length of the view");
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(FilterType::Bilinear))
            .use_alpha(false);
        // Typed, because the untyped call compiles every pixel format there is (minutes).
        self.resizer
            .resize_typed::<U8x3>(&frame, &mut out, &options)
            .expect("the crop is the whole view of the frame");
    }
}

/// Mirrors left and right, in place.
pub(super) fn flip(pixels: &mut [u8], side: usize) {
    for row in pixels.chunks_exact_mut(side * 3) {
        let (pixels, _) = row.as_chunks_mut::<3>();
        pixels.reverse();
    }
}
