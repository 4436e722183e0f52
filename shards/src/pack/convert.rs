//! Conversion of an image file to the bytes of its member, unchanged wherever possible.
//!
//! A JPEG stays byte for byte what it is, whatever its colours, its coding or its EXIF orientation
//! (which is not applied, as in torchvision's `ImageFolder`). Other formats become a JPEG of quality
//! 95 without chroma subsampling. `--resize-short` re-encodes what is larger, `--upright` what has an
//! EXIF orientation; a re-encoded image has no EXIF.

use std::borrow::Cow;
use std::collections::BTreeMap;

use detco_resize::Filter;
use image::codecs::jpeg::JpegEncoder;
use image::metadata::Orientation;
use image::{DynamicImage, ExtendedColorType, ImageFormat, RgbImage};
use serde::{Deserialize, Serialize};

use super::{Options, SkipReason};
use crate::decode::{Components, DecodeError, Decoder, Format, Image, Probe, probe};

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

/// Formats beside JPEG and PNG that are taken.
const OTHERS: [ImageFormat; 2] = [ImageFormat::WebP, ImageFormat::Bmp];

/// What a worker needs to convert one image after the other.
#[derive(Default)]
pub(crate) struct Converter {
    decoder: Decoder,
    image: Image,
    resizer: detco_resize::Resize,
}

/// What an image file is by its first bytes.
enum Kind {
    Known(Probe),
    Other(ImageFormat),
}

impl Converter {
    /// The bytes to store for a file; counts what was met.
    pub(crate) fn convert<'a>(
        &mut self,
        bytes: &'a [u8],
        extension: &[u8],
        options: &Options,
        oddities: &mut Oddities,
    ) -> Result<Cow<'a, [u8]>, SkipReason> {
        if bytes.is_empty() {
            return Err(SkipReason::Empty);
        }
        let kind = kind(bytes)?;
        let mut met = Vec::new();
        let named_jpeg = is_one_of(extension, &["jpg", "jpeg", "jpe", "jfif"]);
        let stored = match kind {
            Kind::Known(found) if found.format == Format::Jpeg => {
                met.extend((!named_jpeg).then_some("jpeg_under_another_name"));
                self.jpeg(bytes, &found, options, &mut met)?
            }
            kind => {
                let (name, components) = self.decode_other(bytes, &kind)?;
                met.push(name);
                met.extend(named_jpeg.then_some("other_format_under_a_jpeg_name"));
                let short = self.image.width.min(self.image.height);
                let mut quality = TRANSCODE_QUALITY;
                if let Some(resize) = options.resize.filter(|resize| short > resize.short) {
                    met.push("resized");
                    self.shrink(resize);
                    quality = resize.quality;
                }
                Cow::Owned(self.encode(components, quality)?)
            }
        };
        for name in met {
            *oddities.entry(name.to_owned()).or_default() += 1;
        }
        Ok(stored)
    }

    /// A JPEG: its own bytes, or another's where it is made smaller or turned.
    fn jpeg<'a>(
        &mut self,
        bytes: &'a [u8],
        found: &Probe,
        options: &Options,
        met: &mut Vec<&'static str>,
    ) -> Result<Cow<'a, [u8]>, SkipReason> {
        met.extend(oddities_of(found));
        // Zeros after the end are padding. Anything else may be the middle of a picture that was cut,
        // which training would refuse: now is the time to say so.
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let trailing = !bytes[..end].ends_with(&[0xff, 0xd9]);
        let short = found.width.min(found.height);
        let resize = options.resize.filter(|resize| short > resize.short);
        let turn = options.upright && found.orientation != 1;
        if trailing || options.check || resize.is_some() || turn {
            self.decoder.decode(bytes, &mut self.image)?;
        }
        met.extend(trailing.then_some("trailing_bytes"));
        if turn {
            met.push("turned_upright");
            self.turn(found.orientation);
        }
        let mut quality = TRANSCODE_QUALITY;
        if let Some(resize) = resize {
            met.push("resized");
            self.shrink(resize);
            quality = resize.quality;
        }
        if resize.is_none() && !turn {
            return Ok(Cow::Borrowed(bytes));
        }
        Ok(Cow::Owned(self.encode(found.components, quality)?))
    }

    /// Turns and mirrors `self.image` as an EXIF orientation from 2 to 8 says.
    fn turn(&mut self, orientation: u8) {
        let Image { width, height, pixels } = std::mem::take(&mut self.image);
        let turned = RgbImage::from_raw(width, height, pixels).map(|image| {
            let mut image = DynamicImage::ImageRgb8(image);
            let known = Orientation::from_exif(orientation);
            image.apply_orientation(known.unwrap_or(Orientation::NoTransforms));
            image.into_rgb8()
        });
        // The decoder's pixels are as many as its size says.
        let turned = turned.unwrap_or_default();
        let (width, height) = turned.dimensions();
        self.image = Image { width, height, pixels: turned.into_raw() };
    }

    /// Decodes what is no JPEG into `self.image`; its name and whether it is gray.
    fn decode_other(
        &mut self,
        bytes: &[u8],
        kind: &Kind,
    ) -> Result<(&'static str, Components), SkipReason> {
        match kind {
            Kind::Known(found) => {
                self.decoder.decode(bytes, &mut self.image)?;
                Ok(("png", found.components))
            }
            Kind::Other(format) => {
                let image = image::load_from_memory_with_format(bytes, *format);
                let image = image.map_err(|error| SkipReason::DecodeOther { error })?.into_rgb8();
                let (width, height) = image.dimensions();
                self.image = Image { width, height, pixels: image.into_raw() };
                let name = format.extensions_str().first().copied().unwrap_or("other");
                Ok((name, Components::Rgb))
            }
        }
    }

    /// Resizes `self.image` so that its shorter side is `resize.short`; the other keeps the ratio,
    /// rounded.
    fn shrink(&mut self, resize: Resize) {
        let Image { width, height, ref pixels } = self.image;
        let short = u64::from(width.min(height));
        // Both sides shrink, so the result fits.
        let scale =
            |side: u32| ((u64::from(side) * u64::from(resize.short) + short / 2) / short) as u32;
        let (new_width, new_height) = (scale(width), scale(height));
        let mut small = vec![0; new_width as usize * new_height as usize * 3];
        let (size, whole) = ((width, height), [0, 0, width, height]);
        let into = (new_width, new_height);
        self.resizer.crop_resize(Filter::Lanczos, pixels, size, whole, into, &mut small);
        self.image = Image { width: new_width, height: new_height, pixels: small };
    }

    /// `self.image` as JPEG, gray where it was gray, colours without subsampling.
    fn encode(&self, components: Components, quality: u8) -> Result<Vec<u8>, SkipReason> {
        let Image { width, height, ref pixels } = self.image;
        let mut bytes = Vec::new();
        let mut encoder = JpegEncoder::new_with_quality(&mut bytes, quality);
        let encoded = if components == Components::Gray {
            let gray: Vec<u8> = pixels.iter().step_by(3).copied().collect();
            encoder.encode(&gray, width, height, ExtendedColorType::L8)
        } else {
            encoder.encode(pixels, width, height, ExtendedColorType::Rgb8)
        };
        encoded.map_err(|error| SkipReason::Encode { error })?;
        Ok(bytes)
    }
}

fn kind(bytes: &[u8]) -> Result<Kind, SkipReason> {
    match probe(bytes) {
        Ok(found) => Ok(Kind::Known(found)),
        Err(DecodeError::NotAnImage { .. }) => match image::guess_format(bytes) {
            Ok(format) if OTHERS.contains(&format) => Ok(Kind::Other(format)),
            _ => Err(unsupported(bytes)
                .map_or(SkipReason::NotAnImage, |format| SkipReason::Unsupported { format })),
        },
        Err(error) => Err(error.into()),
    }
}

/// The format of an image that is not packed, by its first bytes.
fn unsupported(bytes: &[u8]) -> Option<&'static str> {
    const STARTS: [(&[u8], &str); 10] = [
        (b"GIF8", "GIF"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"II+\0", "TIFF"), // with 64-bit offsets
        (b"MM\0+", "TIFF"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x0cJXL ", "JPEG XL"),
        (b"\0\0\0\x0cjP  ", "JPEG 2000"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"8BPS", "Photoshop"),
    ];
    if let [b'P', b'1'..=b'7', b' ' | b'\t' | b'\r' | b'\n' | b'#', ..] = bytes {
        return Some("PNM");
    }
    // ISO base media files name their kind in the first box (ISO/IEC 23000-22, 23008-12).
    if bytes.get(4..8) == Some(b"ftyp") {
        return match bytes.get(8..12)? {
            b"avif" | b"avis" => Some("AVIF"),
            b"heic" | b"heix" | b"heim" | b"heis" | b"hevc" | b"hevx" | b"mif1" | b"msf1" => {
                Some("HEIC")
            }
            _ => None,
        };
    }
    STARTS.iter().find(|(start, _)| bytes.starts_with(start)).map(|(_, format)| *format)
}

fn oddities_of(found: &Probe) -> impl Iterator<Item = &'static str> + use<> {
    let color = match found.components {
        Components::Gray => Some("gray"),
        Components::Rgb => Some("rgb"),
        Components::Cmyk => Some("cmyk"),
        Components::Ycck => Some("ycck"),
        Components::Ycc => None,
    };
    let progressive = found.progressive.then_some("progressive");
    let turned = (found.orientation != 1).then_some("exif_orientation");
    [color, progressive, turned].into_iter().flatten()
}

fn is_one_of(extension: &[u8], known: &[&str]) -> bool {
    known.iter().any(|known| extension.eq_ignore_ascii_case(known.as_bytes()))
}
