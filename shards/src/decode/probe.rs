//! Reads image headers without decoding: JPEG segments, PNG's first chunk.

use super::{DecodeError, PIXELS_MAX, SCANNED_MAX, SCANS_MAX, SEGMENTS_MAX};

/// The format of an image, by its first bytes and not by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// JPEG (ITU-T T.81).
    Jpeg,
    /// PNG. One image of ImageNet is one, named `.JPEG`.
    Png,
}

/// The colour model of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Components {
    /// One component.
    Gray,
    /// Luma and two chroma components.
    Ycc,
    /// Red, green, blue.
    Rgb,
    /// CMYK.
    Cmyk,
    /// YCCK: CMYK with the first three inks as luma and chroma.
    Ycck,
}

/// The places in a JPEG that its decoder needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Offset of the frame header's marker.
    pub(crate) frame: usize,
    /// Offset of the first scan's coded data.
    pub(crate) coded: usize,
    /// Whether the first scan has all components completely, so that it is the only one.
    pub(crate) one_scan: bool,
    /// Whether restart markers divide the coded data of some scan.
    pub(crate) restarts: bool,
    /// Lossless coding: predictions of samples in place of blocks.
    pub(crate) lossless: bool,
    /// The largest sampling factors, across and down.
    pub(crate) factors: [u8; 2],
    /// Whether the first component is sampled as finely as any other.
    pub(crate) first_finest: bool,
}

/// The header of an image.
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
    /// True for arithmetic coding in place of Huffman's.
    pub arithmetic: bool,
    /// Places in a JPEG.
    pub(crate) layout: Layout,
}

/// Bytes that one byte of deflated data can stand for, at most.
const DEFLATE_MAX: u64 = 1032;

/// Pixels of a JPEG's side, at most: libjpeg's limit.
const SIDE_MAX: u16 = 65_500;

/// The signature of a PNG file.
const PNG: [u8; 8] = [0x89, b'P', b'N', b'G', 0x0D, 0x0A, 0x1A, 0x0A];

/// Reads an image's header: no pixel is decoded and nothing is allocated.
///
/// # Errors
/// [`DecodeError::NotAnImage`], [`DecodeError::Truncated`] and [`DecodeError::Malformed`] with the
/// offset, [`DecodeError::Unsupported`] for kinds of JPEG that the decoder does not read,
/// [`DecodeError::TooLarge`] above [`PIXELS_MAX`], [`DecodeError::TooShort`] for
/// bytes that cannot be so many pixels, [`DecodeError::TooMany`] above [`SCANS_MAX`],
/// [`SCANNED_MAX`] or [`SEGMENTS_MAX`], and [`DecodeError::Damaged`] where a restart marker of a
/// picture in several scans is not the next one.
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

/// Walks the segments up to the start of the first scan (ITU-T T.81, annex B). What libjpeg takes
/// for an error in a header is one here; what it skips is skipped.
fn jpeg(bytes: &[u8]) -> Result<Probe, DecodeError> {
    let mut reader = Reader { bytes, at: 2 };
    let mut frame: Option<Frame> = None;
    let (mut adobe, mut jfif, mut orientation) = (None, false, 1);
    let (mut segments, mut restarts) = (0, false);
    let (scan, scan_at) = loop {
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
        let malformed = |what| DecodeError::Malformed { what, offset };
        match marker {
            // Stuffing, as in the picture's own data.
            0x00 => continue,
            0x01..=0xBF | 0xD0..=0xD7 | 0xF0..=0xFD => {
                return Err(malformed("JPEG header (a marker that belongs elsewhere)"));
            }
            0xD8 => return Err(malformed("JPEG that begins twice")),
            0xD9 => return Err(malformed("JPEG without a picture")),
            _ => {}
        }
        let length = reader.take(2, "JPEG segment")?;
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        let length = length.checked_sub(2).ok_or(malformed("JPEG segment length"))?;
        let body = reader.take(length, "JPEG segment")?;
        match marker {
            0xC0..=0xC3 | 0xC9 | 0xCA if frame.is_some() => {
                return Err(malformed("JPEG of two frames"));
            }
            0xC0..=0xC3 | 0xC9 | 0xCA => frame = Some(Frame::parse(body, marker, offset)?),
            0xCB => {
                let what = "a lossless JPEG of arithmetic coding";
                return Err(DecodeError::Unsupported { what });
            }
            0xC5..=0xC7 | 0xC8 | 0xCD..=0xCF => {
                return Err(DecodeError::Unsupported { what: "a hierarchical JPEG" });
            }
            0xDD => match body {
                [high, low] => restarts = [*high, *low] != [0, 0],
                _ => return Err(malformed("JPEG restart interval")),
            },
            0xE0 if body.len() >= 14 && body.starts_with(b"JFIF\0") => jfif = true,
            0xE1 if body.starts_with(b"Exif\0\0") => {
                orientation = exif_orientation(&body[6..]).unwrap_or(1);
            }
            0xEE if body.len() >= 12 && body.starts_with(b"Adobe") => adobe = Some(body[11]),
            0xDA => break (body, offset),
            _ => {}
        }
    };
    let missing = DecodeError::Malformed { what: "JPEG scan before its frame", offset: scan_at };
    let frame = frame.ok_or(missing)?;
    let mut begun = [false; 4];
    let interleaved = frame.check_scan(scan, scan_at, &mut begun)?;
    check_size(frame.width, frame.height, frame.least(), bytes.len())?;
    let one_scan = !frame.progressive && interleaved == frame.count;
    if frame.lossless && !(one_scan && frame.finest() == [1, 1] && frame.count < 4) {
        let what = "a lossless JPEG of four inks, several scans or subsampled components";
        return Err(DecodeError::Unsupported { what });
    }
    if !one_scan {
        // At least 1: the size was checked.
        let most = SCANNED_MAX / (u64::from(frame.width) * u64::from(frame.height));
        let most = usize::try_from(most).unwrap_or(SCANS_MAX).min(SCANS_MAX);
        walk_scans(bytes, reader.at, most, |body, offset| {
            frame.check_scan(body, offset, &mut begun).map(drop)
        })?;
        if begun[..frame.count].contains(&false) {
            let what = "JPEG without a scan of one of its components";
            return Err(DecodeError::Malformed { what, offset: scan_at });
        }
    }
    Ok(Probe {
        format: Format::Jpeg,
        width: frame.width,
        height: frame.height,
        components: frame.components(adobe, jfif),
        progressive: frame.progressive,
        orientation,
        adobe: adobe.is_some(),
        sampling: frame.finest()[0].max(frame.finest()[1]),
        arithmetic: frame.arithmetic,
        layout: Layout {
            frame: frame.offset,
            coded: reader.at,
            one_scan,
            restarts,
            lossless: frame.lossless,
            factors: frame.finest(),
            first_finest: frame.factors[0] == frame.finest(),
        },
    })
}

/// Walks over the coded data of a JPEG from the first scan's on: counts the scans, of which there may
/// be `max`, and their segments, looks whether the restart markers of each scan follow each other,
/// and shows each further scan's header, with its offset, to `scan`. Only for pictures in several
/// scans or with restart markers: to look at all bytes of others would cost time for nothing.
pub(super) fn walk_scans(
    bytes: &[u8],
    mut at: usize,
    max: usize,
    mut scan: impl FnMut(&[u8], usize) -> Result<(), DecodeError>,
) -> Result<(), DecodeError> {
    let (mut scans, mut segments, mut restart) = (1, 0, 0);
    while let Some(found) = bytes.get(at..).and_then(|rest| memchr::memchr(0xFF, rest)) {
        let offset = at + found;
        at = offset + 1;
        let Some(&marker) = bytes.get(at) else { break };
        match marker {
            0xD9 => break,
            0xD0..=0xD7 if marker - 0xD0 == restart => restart = (restart + 1) % 8,
            0xD0..=0xD7 => {
                let (found, due) = (marker - 0xD0, restart);
                let reason =
                    format!("restart marker {found} at offset {offset}, where {due} is due");
                return Err(DecodeError::Damaged { reason });
            }
            0xDA => (scans, restart) = (scans + 1, 0),
            // Tables, application data, comments: their bytes are not coded data.
            0xC4 | 0xCC | 0xDB..=0xDD | 0xE0..=0xEF | 0xFE => segments += 1,
            // Stuffing, fill bytes.
            _ => continue,
        }
        let body = at + 3;
        if !matches!(marker, 0xD0..=0xD7) {
            // One that ends behind the file is for the decoder to report.
            let Some([high, low]) = bytes.get(at + 1..body) else { break };
            at += 1 + usize::from(u16::from_be_bytes([*high, *low]));
        }
        if scans > max {
            return Err(DecodeError::TooMany { what: "JPEG scans", max, offset });
        }
        if segments > SEGMENTS_MAX {
            return Err(DecodeError::TooMany { what: "JPEG segments", max: SEGMENTS_MAX, offset });
        }
        if marker == 0xDA {
            scan(bytes.get(body..at).unwrap_or_default(), offset)?;
        }
    }
    Ok(())
}

/// A start of frame.
struct Frame {
    /// Of the marker.
    offset: usize,
    width: u32,
    height: u32,
    /// Components, of which the first four have their names and sampling factors here.
    count: usize,
    ids: [u8; 4],
    factors: [[u8; 2]; 4],
    progressive: bool,
    arithmetic: bool,
    lossless: bool,
}

impl Frame {
    fn parse(body: &[u8], marker: u8, offset: usize) -> Result<Frame, DecodeError> {
        let malformed = |what| DecodeError::Malformed { what, offset };
        let [precision, h1, h0, w1, w0, count, rest @ ..] = body else {
            return Err(malformed("JPEG frame header"));
        };
        if *precision != 8 {
            return Err(DecodeError::Unsupported { what: "a JPEG of other than 8 bits a sample" });
        }
        let (height, width) = (u16::from_be_bytes([*h1, *h0]), u16::from_be_bytes([*w1, *w0]));
        if width == 0 || height == 0 {
            return Err(malformed("JPEG size (a side is 0)"));
        }
        if width.max(height) > SIDE_MAX {
            let what = "a JPEG with a side of more than 65,500 pixels";
            return Err(DecodeError::Unsupported { what });
        }
        let count = usize::from(*count);
        let (components, []) = rest.as_chunks::<3>() else {
            return Err(malformed("JPEG frame header"));
        };
        if components.len() != count {
            return Err(malformed("JPEG frame header"));
        }
        if !matches!(count, 1 | 3 | 4) {
            let what = "a JPEG of other than 1, 3 or 4 components";
            return Err(DecodeError::Unsupported { what });
        }
        let (mut ids, mut factors) = ([0; 4], [[1; 2]; 4]);
        for (at, &[id, both, _]) in components.iter().enumerate() {
            ids[at] = id;
            factors[at] = [both >> 4, both & 15];
        }
        let used = &factors[..count];
        if !used.as_flattened().iter().all(|factor| (1..=4).contains(factor)) {
            return Err(malformed("JPEG sampling factor"));
        }
        let most = finest(used);
        if used.iter().any(|pair| (0..2).any(|side| !most[side].is_multiple_of(pair[side]))) {
            return Err(DecodeError::Unsupported { what: "a JPEG of uneven sampling" });
        }
        Ok(Frame {
            offset,
            width: width.into(),
            height: height.into(),
            count,
            ids,
            factors,
            progressive: matches!(marker, 0xC2 | 0xCA),
            arithmetic: marker >= 0xC9,
            lossless: marker == 0xC3,
        })
    }

    /// The largest sampling factors, across and down.
    fn finest(&self) -> [u8; 2] {
        finest(&self.factors[..self.count])
    }

    /// Holds the header of a scan against the frame, notes the components that it begins, and says
    /// how many it has.
    fn check_scan(
        &self,
        body: &[u8],
        offset: usize,
        begun: &mut [bool; 4],
    ) -> Result<usize, DecodeError> {
        let malformed = |what| DecodeError::Malformed { what, offset };
        let [count, rest @ ..] = body else { return Err(malformed("JPEG scan header")) };
        let count = usize::from(*count);
        if !(1..=4).contains(&count) || rest.len() != count * 2 + 3 {
            return Err(malformed("JPEG scan header"));
        }
        let mut blocks = 0;
        for component in rest.as_chunks::<2>().0.iter().take(count) {
            let Some(known) = self.ids[..self.count].iter().position(|id| *id == component[0])
            else {
                return Err(malformed("JPEG scan of a component that its frame lacks"));
            };
            let [across, down] = self.factors[known];
            blocks += across * down;
            // The first of the coefficients that a scan has: 0 is the mean.
            begun[known] |= rest[count * 2] == 0;
        }
        // The standard's limit (T.81, B.2.3), at which libjpeg stops.
        if count > 1 && blocks > 10 {
            return Err(DecodeError::Unsupported { what: "a JPEG of more than 10 blocks a unit" });
        }
        // The decoder's limit, which libjpeg has not.
        let baseline = !self.progressive && !self.arithmetic;
        if baseline && count > 1 && count < self.count {
            let what = "a baseline JPEG with some of its components in one scan";
            return Err(DecodeError::Unsupported { what });
        }
        Ok(count)
    }

    /// Bytes of the shortest code: no block of 8x8 samples has less than a bit for its mean, nor,
    /// in a baseline picture, less than another for the end of the block; without loss no sample has
    /// less than a bit. Arithmetic coding has no such bound; a picture of that kind that has less is
    /// flat, or meant to fill the memory.
    fn least(&self) -> u64 {
        if self.lossless {
            return u64::from(self.width) * u64::from(self.height) / 8;
        }
        // All components together have a block for each 8x8 pixels, or half as many where none is
        // sampled most in both directions (factors are at most 4: a quarter and a quarter).
        let blocks = u64::from(self.width).div_ceil(8) * u64::from(self.height).div_ceil(8) / 2;
        blocks * if self.progressive || self.arithmetic { 1 } else { 2 } / 8
    }

    /// libjpeg's guess: JFIF, else the Adobe segment's transform, else the components' names.
    fn components(&self, adobe: Option<u8>, jfif: bool) -> Components {
        match (self.count, adobe) {
            (1, _) => Components::Gray,
            (3, _) if jfif => Components::Ycc,
            (3, Some(0)) => Components::Rgb,
            (3, Some(_)) => Components::Ycc,
            (3, None) if self.ids == *b"RGB\0" => Components::Rgb,
            (3, None) => Components::Ycc,
            (_, None | Some(0)) => Components::Cmyk,
            (_, Some(_)) => Components::Ycck,
        }
    }
}

/// The largest factors of these, across and down.
fn finest(factors: &[[u8; 2]]) -> [u8; 2] {
    [0, 1].map(|side| factors.iter().map(|pair| pair[side]).max().unwrap_or(1))
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
        arithmetic: false,
        layout: Layout::default(),
    })
}
