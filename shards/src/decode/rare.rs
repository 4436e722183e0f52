//! The few kinds of JPEG that the main decoder gets wrong, by another: slower, and right.

use jpeg_decoder::{Decoder, PixelFormat};

use super::{DecodeError, Probe};

/// Decodes a JPEG of three components into `pixels`, `[height, width, 3]`.
pub(super) fn decode(
    bytes: &[u8],
    header: &Probe,
    pixels: &mut Vec<u8>,
) -> Result<(), DecodeError> {
    let mut decoder = Decoder::new(bytes);
    let damaged = |error: jpeg_decoder::Error| DecodeError::Damaged { reason: error.to_string() };
    decoder.read_info().map_err(damaged)?;
    let size = decoder.info().map(|info| (u32::from(info.width), u32::from(info.height)));
    if size != Some((header.width, header.height)) {
        let reason = format!("two sizes, {size:?} and {:?}", (header.width, header.height));
        return Err(DecodeError::Damaged { reason });
    }
    let decoded = decoder.decode().map_err(damaged)?;
    let expected = header.width as usize * header.height as usize * 3;
    let is_rgb = decoder.info().is_some_and(|info| info.pixel_format == PixelFormat::RGB24);
    if !is_rgb || decoded.len() != expected {
        let reason = format!("{} bytes of pixels, expected {expected}", decoded.len());
        return Err(DecodeError::Damaged { reason });
    }
    *pixels = decoded;
    Ok(())
}
