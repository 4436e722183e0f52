//! PNG to RGB: rare in data sets of photographs, so through the crate `image`, with no scratch kept.

use image::{DynamicImage, ImageFormat};

use super::DecodeError;

/// Decodes into `[height, width, 3]`. Alpha is dropped, as Pillow's `convert("RGB")` does.
pub(super) fn decode(bytes: &[u8], rgb: &mut Vec<u8>) -> Result<(), DecodeError> {
    let image = image::load_from_memory_with_format(bytes, ImageFormat::Png)
        .map_err(|error| DecodeError::Damaged { reason: error.to_string() })?;
    *rgb = DynamicImage::into_rgb8(image).into_raw();
    Ok(())
}
