//! What a header says, without decoding: a walk over JPEG segments, PNG's first chunk.

use super::{DecodeError, PIXELS_MAX, SCANNED_MAX, SCANS_MAX, SEGMENTS_MAX};

/// Container of an image, told by its first bytes and not by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// JPEG (ITU-T T.81).
    Jpeg,
    /// PNG. One image of ImageNet is one, named `.JPEG`.
    Png,
}

/// How the components of a picture are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Components {
    /// One component.
    Gray,
    /// Luma and two chroma components.
    Ycc,
    /// Red, green, blue.
    Rgb,
    /// Four inks.
    Cmyk,
    /// Four inks, the first three as luma and chroma.
    Ycck,
}

/// What [`probe`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Container.
    pub format: Format,
    /// Width in pixels, as stored.
    pub width: u32,
    /// Height in pixels, as stored.
    pub height: u32,
    /// Colour model.
    pub components: Components,
    /// True for progressive JPEG.
    pub progressive: bool,
    /// EXIF orientation, 1 to 8; 1 (upright) where none is stored. Reported, never applied.
    pub orientation: u8,
    /// True where an Adobe segment is present: its CMYK is stored inverted.
    pub adobe: bool,
    /// The largest sampling factor of a component, 1 to 4; 2 for 4:2:0, 4 for 4:1:1. 1 for PNG.
    pub sampling: u8,
}

/// Bytes that one byte of deflated data can stand for, at most.
const DEFLATE_MAX: u64 = 1032;

/// The signature of a PNG file.
const PNG: [u8; 8] = [0x89, b'P', b'N', b'G', 0x0D, 0x0A, 0x1A, 0x0A];

/// Reads an image's header: no pixel is decoded and nothing is allocated.
///
/// # Errors
/// [`DecodeError::NotAnImage`], [`DecodeError::Truncated`] and [`DecodeError::Malformed`] with the
/// offset, [`DecodeError::Unsupported`] for kinds of JPEG that no decoder here reads,
/// [`DecodeError::TooLarge`] above [`PIXELS_MAX`], [`DecodeError::TooShort`] for bytes that cannot
/// be so many pixels, [`DecodeError::TooMany`] above [`SCANS_MAX`], [`SCANNED_MAX`] or
/// [`SEGMENTS_MAX`].
pub fn probe(bytes: &[u8]) -> Result<Probe, DecodeError> {
    if bytes.starts_with(&[0xFF, 0xD8]) {
        jpeg(bytes)
    } else if bytes.starts_with(&PNG) {
        png(bytes)
    } else {
        let start = bytes[..bytes.len().min(8)].to_vec();
        Err(DecodeError::NotAnImage { len: bytes.len(), start })
    }
}

/// Holds a size against the limit and against the bytes there are: `least` is what the shortest
/// possible code has. Both come before any memory for the pixels is taken.
fn check_size(width: u32, height: u32, least: u64, len: usize) -> Result<(), DecodeError> {
    if u64::from(width) * u64::from(height) > PIXELS_MAX {
        return Err(DecodeError::TooLarge { width, height });
    }
    if (len as u64) < least {
        return Err(DecodeError::TooShort { width, height, len, least });
    }
    Ok(())
}

/// A bounds-checked view of the bytes that knows what it is reading.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let taken = self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end)).ok_or(
            DecodeError::Truncated { what, offset: self.bytes.len(), len: self.bytes.len() },
        )?;
        self.at += count;
        Ok(taken)
    }

    fn byte(&mut self, what: &'static str) -> Result<u8, DecodeError> {
        Ok(self.take(1, what)?[0])
    }
}

/// Walks the segments up to the start of the first scan (ITU-T T.81, annex B).
fn jpeg(bytes: &[u8]) -> Result<Probe, DecodeError> {
    let mut reader = Reader { bytes, at: 2 };
    let mut frame: Option<Frame> = None;
    let (mut adobe, mut jfif, mut orientation) = (None, false, 1);
    let mut segments = 0;
    let in_scan = loop {
        // Bytes between segments are skipped, as libjpeg does, and so are fill bytes (0xFF).
        while reader.byte("JPEG header")? != 0xFF {}
        let mut marker = reader.byte("JPEG header")?;
        while marker == 0xFF {
            marker = reader.byte("JPEG header")?;
        }
        let offset = reader.at - 2;
        segments += 1;
        if segments > SEGMENTS_MAX {
            return Err(DecodeError::TooMany { what: "JPEG segments", max: SEGMENTS_MAX, offset });
        }
        match marker {
            // Stuffing, TEM, RSTn, SOI: nothing follows them.
            0x00 | 0x01 | 0xD0..=0xD8 => continue,
            0xD9 => return Err(DecodeError::Malformed { what: "JPEG without a picture", offset }),
            _ => {}
        }
        let length = reader.take(2, "JPEG segment")?;
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        let length = length
            .checked_sub(2)
            .ok_or(DecodeError::Malformed { what: "JPEG segment length", offset })?;
        let body = reader.take(length, "JPEG segment")?;
        match marker {
            0xC0..=0xC2 if frame.is_some() => {
                return Err(DecodeError::Malformed { what: "JPEG of two frames", offset });
            }
            0xC0..=0xC2 => frame = Some(Frame::parse(body, marker == 0xC2, offset)?),
            0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => {
                let what = "JPEG that is lossless, hierarchical or arithmetically coded";
                return Err(DecodeError::Unsupported { what });
            }
            0xE0 if body.starts_with(b"JFIF\0") => jfif = true,
            0xE1 if body.starts_with(b"Exif\0\0") => {
                orientation = exif_orientation(&body[6..]).unwrap_or(1);
            }
            0xEE if body.len() >= 12 && body.starts_with(b"Adobe") => adobe = Some(body[11]),
            0xDA => break body.first().copied().unwrap_or(0),
            _ => {}
        }
    };
    let missing = DecodeError::Malformed { what: "JPEG scan before its frame", offset: reader.at };
    let frame = frame.ok_or(missing)?;
    check_size(frame.width, frame.height, frame.least(), bytes.len())?;
    if frame.progressive || usize::from(in_scan) < frame.count {
        // At least 1: the size was checked.
        let most = SCANNED_MAX / (u64::from(frame.width) * u64::from(frame.height));
        count_scans(bytes, reader.at, usize::try_from(most).unwrap_or(SCANS_MAX).min(SCANS_MAX))?;
    }
    Ok(Probe {
        format: Format::Jpeg,
        width: frame.width,
        height: frame.height,
        components: frame.components(adobe, jfif)?,
        progressive: frame.progressive,
        orientation,
        adobe: adobe.is_some(),
        sampling: frame.sampling,
    })
}

/// Counts the scans from the coded data of the first on. Only for pictures in several scans: in
/// others the decoder stops after the first, and looking at all bytes would cost time for nothing.
fn count_scans(bytes: &[u8], mut at: usize, max: usize) -> Result<(), DecodeError> {
    let mut scans = 1;
    while let Some(found) = bytes.get(at..).and_then(|rest| rest.iter().position(|b| *b == 0xFF)) {
        let offset = at + found;
        at = offset + 1;
        match bytes.get(at) {
            None | Some(0xD9) => break,
            Some(0xDA) => scans += 1,
            // Tables, application data, comments: their bytes are not coded data.
            Some(0xC4 | 0xDB..=0xDD | 0xE0..=0xEF | 0xFE) => {
                // One that ends behind the file is for the decoder to report.
                let Some([high, low]) = bytes.get(at + 1..at + 3) else { break };
                at += 1 + usize::from(u16::from_be_bytes([*high, *low]));
            }
            // Stuffing, restarts, fill bytes.
            Some(_) => {}
        }
        if scans > max {
            return Err(DecodeError::TooMany { what: "JPEG scans", max, offset });
        }
    }
    Ok(())
}

/// A start of frame.
struct Frame {
    width: u32,
    height: u32,
    /// Components, of which the first four have their names in `ids`.
    count: usize,
    ids: [u8; 4],
    sampling: u8,
    progressive: bool,
}

impl Frame {
    fn parse(body: &[u8], progressive: bool, offset: usize) -> Result<Frame, DecodeError> {
        let malformed = |what| DecodeError::Malformed { what, offset };
        let [precision, h1, h0, w1, w0, count, rest @ ..] = body else {
            return Err(malformed("JPEG frame header"));
        };
        if *precision != 8 {
            return Err(DecodeError::Unsupported { what: "JPEG of other than 8 bits a sample" });
        }
        let (height, width) = (u16::from_be_bytes([*h1, *h0]), u16::from_be_bytes([*w1, *w0]));
        if width == 0 || height == 0 {
            return Err(malformed("JPEG size (a side is 0)"));
        }
        if rest.len() < usize::from(*count) * 3 {
            return Err(malformed("JPEG frame header"));
        }
        let count = usize::from(*count);
        let components = rest.chunks_exact(3).take(count);
        let mut ids = [0; 4];
        for (id, component) in ids.iter_mut().zip(components.clone()) {
            *id = component[0];
        }
        let factors = components.flat_map(|c| [c[1] >> 4, c[1] & 15]);
        let sampling = factors.max().unwrap_or(1);
        Ok(Frame { width: width.into(), height: height.into(), count, ids, sampling, progressive })
    }

    /// Bytes of the shortest code: no block of 8x8 samples has less than a bit for its mean, nor,
    /// in a baseline picture, less than another for the end of the block.
    fn least(&self) -> u64 {
        // All components together have a block for each 8x8 pixels, or half as many where none is
        // sampled most in both directions (factors are at most 4: a quarter and a quarter).
        let blocks = u64::from(self.width).div_ceil(8) * u64::from(self.height).div_ceil(8) / 2;
        blocks * if self.progressive { 1 } else { 2 } / 8
    }

    /// libjpeg's guess: the Adobe segment's transform, else JFIF, else the components' names.
    fn components(&self, adobe: Option<u8>, jfif: bool) -> Result<Components, DecodeError> {
        Ok(match (self.count, adobe) {
            (1, _) => Components::Gray,
            (3, _) if jfif => Components::Ycc,
            (3, Some(0)) => Components::Rgb,
            (3, Some(_)) => Components::Ycc,
            (3, None) if self.ids == *b"RGB\0" => Components::Rgb,
            (3, None) => Components::Ycc,
            (4, Some(2)) => Components::Ycck,
            (4, _) => Components::Cmyk,
            _ => {
                return Err(DecodeError::Unsupported {
                    what: "JPEG of other than 1, 3 or 4 components",
                });
            }
        })
    }
}

/// Tag 0x0112 of the first directory of a TIFF block; `None` where there is none or it makes no
/// sense: orientation is only reported, so a broken EXIF block is no reason to refuse an image.
fn exif_orientation(tiff: &[u8]) -> Option<u8> {
    let little = match tiff.get(..2)? {
        b"II" => true,
        b"MM" => false,
        _ => return None,
    };
    let u16_at = |at: usize| {
        let b: [u8; 2] = tiff.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(if little { u16::from_le_bytes(b) } else { u16::from_be_bytes(b) })
    };
    let u32_at = |at: usize| {
        let b: [u8; 4] = tiff.get(at..at.checked_add(4)?)?.try_into().ok()?;
        Some(if little { u32::from_le_bytes(b) } else { u32::from_be_bytes(b) })
    };
    let directory = usize::try_from(u32_at(4)?).ok()?;
    let entries = usize::from(u16_at(directory)?);
    (0..entries).find_map(|i| {
        let entry = directory.checked_add(2 + i * 12)?;
        if u16_at(entry)? != 0x0112 {
            return None;
        }
        u8::try_from(u16_at(entry + 8)?).ok().filter(|value| (1..=8).contains(value))
    })
}

fn png(bytes: &[u8]) -> Result<Probe, DecodeError> {
    let mut reader = Reader { bytes, at: PNG.len() };
    let chunk = reader.take(8 + 13, "PNG header")?;
    let (kind, body) = (&chunk[4..8], &chunk[8..]);
    if kind != b"IHDR" {
        return Err(DecodeError::Malformed { what: "PNG header", offset: PNG.len() });
    }
    let word = |at: usize| u32::from_be_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]);
    let (width, height) = (word(0), word(4));
    if width == 0 || height == 0 {
        return Err(DecodeError::Malformed {
            what: "PNG size (a side is 0)",
            offset: PNG.len() + 8,
        });
    }
    let channels = match body[9] {
        2 => 3,
        4 => 2,
        6 => 4,
        _ => 1, // gray, indexed, or none that there is, which the decoder says
    };
    // Sides of 32 bits each and up to 64 bits a pixel.
    let bits = u128::from(width) * u128::from(height) * channels * u128::from(body[8]);
    let least = u64::try_from(bits / 8 / u128::from(DEFLATE_MAX)).unwrap_or(u64::MAX);
    check_size(width, height, least, bytes.len())?;
    // Colour types 0 and 4 are gray, 2, 3 and 6 are or index RGB.
    let components = if matches!(body[9], 0 | 4) { Components::Gray } else { Components::Rgb };
    Ok(Probe {
        format: Format::Png,
        width,
        height,
        components,
        progressive: body[12] == 1,
        orientation: 1,
        adobe: false,
        sampling: 1,
    })
}
