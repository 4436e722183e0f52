//! The header of an image file: what it is, how large, how coloured. Decodes nothing.
//!
//! JPEG: ITU-T T.81 annex B (markers), T.872 clause 6.5 (Adobe marker); EXIF 2.32 section 4.6.
//! Everything else goes by its first bytes.

/// What an image file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// A JPEG.
    Jpeg(Jpeg),
    /// Something the `image` crate decodes and that becomes a JPEG.
    Other(image::ImageFormat),
}

/// A JPEG's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Jpeg {
    /// Width in pixels, as stored: orientation is not applied.
    pub width: u16,
    /// Height in pixels, as stored.
    pub height: u16,
    /// How its components are to be read.
    pub color: Color,
    /// Progressive (SOF2).
    pub progressive: bool,
    /// EXIF orientation, 1 to 8; 1 without EXIF.
    pub orientation: u8,
}

/// How the components of a JPEG are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Color {
    /// One component.
    Gray,
    /// Three: luma and chroma.
    YCbCr,
    /// Three: red, green, blue.
    Rgb,
    /// Four: inks.
    Cmyk,
    /// Four: luma, chroma and black.
    Ycck,
}

/// Formats other than JPEG that are taken and transcoded.
const OTHERS: [image::ImageFormat; 3] =
    [image::ImageFormat::Png, image::ImageFormat::WebP, image::ImageFormat::Bmp];

/// Reads the header of an image file. `None` when it is no image, or its header ends early.
pub fn header(bytes: &[u8]) -> Option<Header> {
    if bytes.starts_with(&[0xff, 0xd8]) {
        return jpeg(bytes).map(Header::Jpeg);
    }
    let format = image::guess_format(bytes).ok()?;
    OTHERS.contains(&format).then_some(Header::Other(format))
}

fn jpeg(bytes: &[u8]) -> Option<Jpeg> {
    let mut rest = bytes.get(2..)?;
    let mut jfif = false;
    let mut adobe = None;
    let mut orientation = 1;
    let mut frame: Option<(u8, &[u8])> = None;
    loop {
        // Before a marker any number of fill bytes may stand; other bytes are skipped, as libjpeg does.
        let at = rest.iter().position(|byte| *byte == 0xff)?;
        rest = &rest[at..];
        let at = rest.iter().position(|byte| *byte != 0xff)?;
        let marker = rest[at];
        rest = &rest[at + 1..];
        match marker {
            0x00 | 0x01 | 0xd0..=0xd8 => continue,
            0xd9 => return None,
            _ => {}
        }
        let length = usize::from(u16::from_be_bytes(*rest.first_chunk()?));
        let body = rest.get(2..length)?;
        match marker {
            0xe0 if body.starts_with(b"JFIF\0") => jfif = true,
            0xe1 => orientation = exif_orientation(body).unwrap_or(orientation),
            0xee if body.starts_with(b"Adobe") => adobe = body.get(11).copied().or(adobe),
            0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => frame = Some((marker, body)),
            0xda => break,
            _ => {}
        }
        rest = &rest[length..];
    }
    let (marker, frame) = frame?;
    let height = u16::from_be_bytes(*frame.get(1..)?.first_chunk()?);
    let width = u16::from_be_bytes(*frame.get(3..)?.first_chunk()?);
    let components = usize::from(*frame.get(5)?);
    let ids = frame.get(6..6 + 3 * components)?;
    let color = match (components, adobe) {
        (1, _) => Color::Gray,
        (3, Some(0)) => Color::Rgb,
        (3, None) if !jfif && [ids[0], ids[3], ids[6]] == *b"RGB" => Color::Rgb,
        (3, _) => Color::YCbCr,
        (4, Some(2)) => Color::Ycck,
        (4, _) => Color::Cmyk,
        _ => return None,
    };
    let progressive = matches!(marker, 0xc2 | 0xc6 | 0xca | 0xce);
    (width > 0 && height > 0).then_some(Jpeg { width, height, color, progressive, orientation })
}

/// Tag 0x0112 of the first directory.
fn exif_orientation(body: &[u8]) -> Option<u8> {
    let tiff = body.strip_prefix(b"Exif\0\0")?;
    let little = match tiff.first_chunk::<4>()? {
        b"II*\0" => true,
        b"MM\0*" => false,
        _ => return None,
    };
    let short = |at: usize| {
        let pair = *tiff.get(at..)?.first_chunk()?;
        Some(if little { u16::from_le_bytes(pair) } else { u16::from_be_bytes(pair) })
    };
    let long = |at: usize| {
        let four = *tiff.get(at..)?.first_chunk()?;
        Some(if little { u32::from_le_bytes(four) } else { u32::from_be_bytes(four) })
    };
    let directory = usize::try_from(long(4)?).ok()?;
    let first = directory.checked_add(2)?;
    for entry in 0..usize::from(short(directory)?) {
        let at = first.checked_add(entry * 12)?;
        if short(at)? == 0x0112 {
            let value = u8::try_from(short(at.checked_add(8)?)?).ok()?;
            return (1..=8).contains(&value).then_some(value);
        }
    }
    None
}
