//! Crop and resize of RGB images: Pillow's picture, at the speed of `fast_image_resize`.
//!
//! A crate of its own for the builder's sake: the kernels behind this one call are generic over
//! image types and precisions, take a minute to compile, and never change, while the data plane
//! around them does.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};

/// Pillow's filters by Pillow's names, both as wide as the reduction (antialiased).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// A triangle.
    Bilinear,
    /// A windowed sinc over three lobes.
    Lanczos,
}

/// The resizer and its intermediate image, which grows to the largest one seen.
#[derive(Default)]
pub struct Resize {
    resizer: Resizer,
}

impl std::fmt::Debug for Resize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resize").finish_non_exhaustive()
    }
}

impl Resize {
    /// Cuts the box `[left, top, width, height]` out of a frame of `size` (width, height) and
    /// resizes it to `into` (width, height). Pixels outside the box are not looked at, because
    /// torchvision crops first. `frame` and `out` are `[height, width, 3]`.
    ///
    /// # Panics
    /// When a length does not fit its size, or the box lies outside the frame.
    pub fn crop_resize(
        &mut self,
        filter: Filter,
        frame: &[u8],
        size: (u32, u32),
        crop: [u32; 4],
        into: (u32, u32),
        out: &mut [u8],
    ) {
        let (width, height) = size;
        let frame = TypedImageRef::from_buffer(width, height, frame)
            .expect("the frame holds width * height * 3 bytes");
        let [left, top, crop_width, crop_height] = crop;
        let cut = TypedCroppedImage::from_ref(&frame, left, top, crop_width, crop_height)
            .unwrap_or_else(|e| panic!("{crop:?} in {width}x{height}: {e}"));
        let mut out = TypedImage::from_buffer(into.0, into.1, out)
            .expect("the output holds width * height * 3 bytes");
        let filter = match filter {
            Filter::Bilinear => FilterType::Bilinear,
            Filter::Lanczos => FilterType::Lanczos3,
        };
        let options =
            ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)).use_alpha(false);
        // Typed, because the untyped call compiles every pixel format there is.
        self.resizer
            .resize_typed::<U8x3>(&cut, &mut out, &options)
            .expect("the crop is the whole view of the frame");
    }
}
