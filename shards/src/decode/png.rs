//! PNG to RGB: rare in data sets of photographs, so through the crate `image`, with no scratch kept.

use std::io::Cursor;

use image::{ImageFormat, ImageReader, Limits};

use super::{DecodeError, Probe};

/// Memory for what is beside the pixels: colour profiles are a few megabytes at most, and a
/// deflated one may claim a gigabyte.
const BESIDE_MAX: u64 = 16 << 20;

/// Bytes of a pixel at most: four channels of 16 bits.
const PIXEL_MAX: u64 = 8;

/// Decodes into `[height, width, 3]`. Alpha is dropped, as Pillow's `convert("RGB")` does.
pub(super) fn decode(bytes: &[u8], header: &Probe, rgb: &mut Vec<u8>) -> Result<(), DecodeError> {
    let (width, height) = (header.width, header.height);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(u64::from(width) * u64::from(height) * PIXEL_MAX + BESIDE_MAX);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), ImageFormat::Png);
    reader.limits(limits);
    let damaged = |error: image::ImageError| DecodeError::Damaged { reason: error.to_string() };
    let image = reader.decode().map_err(damaged)?;
    *rgb = image.into_rgb8().into_raw();
    Ok(())
}
