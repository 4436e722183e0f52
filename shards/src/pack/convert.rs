//! One image file to the bytes of its member: as they are wherever possible.
//!
//! A JPEG stays byte for byte what it is, whatever its colours, its coding or its EXIF orientation
//! (which is not applied, as in torchvision's `ImageFolder`). Other formats become a JPEG of quality
//! 95 without chroma subsampling. `--resize-short` re-encodes what is larger.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Cursor;

use fast_image_resize as fir;
use image::codecs::jpeg::JpegEncoder;
use image::{DynamicImage, ExtendedColorType};
use serde::{Deserialize, Serialize};

use super::SkipReason;
use super::probe::{self, Color, Header};

/// Quality of a JPEG made from another format.
pub const TRANSCODE_QUALITY: u8 = 95;

/// Makes images smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Pixels of the shorter side; images whose shorter side is not longer stay untouched.
    pub short: u32,
    /// JPEG quality, 1 to 100.
    pub quality: u8,
}

/// How often something was met, by name.
pub(crate) type Oddities = BTreeMap<String, u64>;

/// The bytes to store for a file.
pub(crate) fn convert<'a>(
    bytes: &'a [u8],
    extension: &[u8],
    resize: Option<Resize>,
    oddities: &mut Oddities,
) -> Result<Cow<'a, [u8]>, SkipReason> {
    if bytes.is_empty() {
        return Err(SkipReason::Empty);
    }
    let header = probe::header(bytes).ok_or(SkipReason::NotAnImage)?;
    let mut met = Vec::new();
    let stored = match header {
        Header::Jpeg(jpeg) => {
            let color = match jpeg.color {
                Color::Gray => Some("gray"),
                Color::Rgb => Some("rgb"),
                Color::Cmyk => Some("cmyk"),
                Color::Ycck => Some("ycck"),
                Color::YCbCr => None,
            };
            met.extend(color);
            met.extend(jpeg.progressive.then_some("progressive"));
            met.extend((jpeg.orientation != 1).then_some("exif_orientation"));
            let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            met.extend((!bytes[..end].ends_with(&[0xff, 0xd9])).then_some("no_end_marker"));
            let named = [&b"jpg"[..], b"jpeg", b"jpe", b"jfif"];
            let misnamed = !named.iter().any(|name| extension.eq_ignore_ascii_case(name));
            met.extend(misnamed.then_some("jpeg_under_another_name"));
            let short = u32::from(jpeg.width.min(jpeg.height));
            match resize.filter(|resize| short > resize.short) {
                Some(resize) => {
                    met.push("resized");
                    Cow::Owned(smaller(&decode(bytes)?, resize)?)
                }
                None => Cow::Borrowed(bytes),
            }
        }
        Header::Other(format) => {
            let name = format.extensions_str().first().copied().unwrap_or("other");
            met.push(name);
            let known = format
                .extensions_str()
                .iter()
                .any(|known| extension.eq_ignore_ascii_case(known.as_bytes()));
            met.extend((!known).then_some("other_format_under_a_jpeg_name"));
            let image = decode(bytes)?;
            let short = image.width().min(image.height());
            match resize.filter(|resize| short > resize.short) {
                Some(resize) => {
                    met.push("resized");
                    Cow::Owned(smaller(&image, resize)?)
                }
                None => Cow::Owned(encode(&image, TRANSCODE_QUALITY)?),
            }
        }
    };
    for name in met {
        *oddities.entry(name.to_owned()).or_default() += 1;
    }
    Ok(stored)
}

/// Pixels as 8-bit gray or RGB; transparency is dropped, as Pillow's `convert("RGB")` does.
fn decode(bytes: &[u8]) -> Result<DynamicImage, SkipReason> {
    let reader = image::ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    // Reading from memory cannot fail.
    let reader = reader.map_err(|_| SkipReason::NotAnImage)?;
    let image = reader.decode().map_err(|error| SkipReason::Decode { error })?;
    Ok(match image {
        DynamicImage::ImageLuma8(_) | DynamicImage::ImageLuma16(_) => image.into_luma8().into(),
        DynamicImage::ImageLumaA8(_) | DynamicImage::ImageLumaA16(_) => image.into_luma8().into(),
        image => image.into_rgb8().into(),
    })
}

fn smaller(image: &DynamicImage, resize: Resize) -> Result<Vec<u8>, SkipReason> {
    let (width, height) = (u64::from(image.width()), u64::from(image.height()));
    let short = width.min(height);
    // The short side becomes `resize.short`, the other keeps the ratio, rounded; both shrink, so fit.
    let scale = |side: u64| ((side * u64::from(resize.short) + short / 2) / short) as u32;
    let gray = matches!(image, DynamicImage::ImageLuma8(_));
    let pixel = if gray { fir::PixelType::U8 } else { fir::PixelType::U8x3 };
    let fail = |_| SkipReason::Resize { width: image.width(), height: image.height() };
    let source = fir::images::ImageRef::new(image.width(), image.height(), image.as_bytes(), pixel)
        .map_err(|_| SkipReason::Resize { width: image.width(), height: image.height() })?;
    let (new_width, new_height) = (scale(width), scale(height));
    let mut target = fir::images::Image::new(new_width, new_height, pixel);
    let filter = fir::ResizeAlg::Convolution(fir::FilterType::Lanczos3);
    let options = fir::ResizeOptions::new().resize_alg(filter);
    fir::Resizer::new().resize(&source, &mut target, &options).map_err(fail)?;
    let color = if gray { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
    write(target.buffer(), new_width, new_height, color, resize.quality)
}

fn encode(image: &DynamicImage, quality: u8) -> Result<Vec<u8>, SkipReason> {
    let color = image.color().into();
    write(image.as_bytes(), image.width(), image.height(), color, quality)
}

fn write(
    pixels: &[u8],
    width: u32,
    height: u32,
    color: ExtendedColorType,
    quality: u8,
) -> Result<Vec<u8>, SkipReason> {
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, quality)
        .encode(pixels, width, height, color)
        .map_err(|error| SkipReason::Encode { error })?;
    Ok(bytes)
}
