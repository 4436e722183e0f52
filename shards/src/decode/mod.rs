//! Decoding: from JPEG and PNG bytes to RGB pixels.
//!
//! The pixels are those of Pillow's `Image.open(..).convert("RGB")`: gray is replicated, CMYK and YCCK
//! go through Pillow's formula, EXIF orientation is ignored (as torchvision's `ImageFolder` does).
//! Bytes that are truncated or damaged are an error, never a half gray picture.

mod jpeg;
#[cfg(feature = "nvjpeg")]
pub mod nvjpeg;
mod part;
mod planes;
mod png;
mod probe;

pub use part::{Frame, Part, Rect};
pub use probe::{Components, Format, Probe, probe};

/// Pixels an image may have: 2^28, 0.8 GB of RGB. Larger ones are refused before anything is allocated.
pub const PIXELS_MAX: u64 = 1 << 28;

/// Scans a JPEG may have: real progressive ones have about ten. Each scan goes over the whole
/// picture whatever its few bytes say, so thousands of them are hours of decoding.
pub const SCANS_MAX: usize = 100;

/// Scans times pixels: 2^32, two seconds of walking. 48 megapixels in 89 scans, [`PIXELS_MAX`] in
/// 16.
pub const SCANNED_MAX: u64 = 1 << 32;

/// Segments in front of a JPEG's first scan. Real ones have a handful, or hundreds with a large
/// colour profile or depth map in pieces; decoders compare pieces with each other.
pub const SEGMENTS_MAX: usize = 4096;

/// A decoded image. Reused between samples: its memory grows to the largest one seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// `[height, width, 3]` bytes, RGB, rows without padding.
    pub pixels: Vec<u8>,
}

impl Image {
    /// An empty image, to be decoded into.
    pub fn new() -> Image {
        Image::default()
    }
}

/// Decodes images, one after the other. One per thread.
#[derive(Debug, Default)]
pub struct Decoder {
    jpeg: jpeg::Jpeg,
}

impl Decoder {
    /// A decoder.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Which JPEG decoder this is, with its version.
    pub fn name(&self) -> &'static str {
        jpeg::NAME
    }

    /// Decodes a JPEG or PNG image. On error `into` holds nothing usable.
    ///
    /// # Errors
    /// [`DecodeError`]: no image, truncated, damaged, too large or of an unsupported kind.
    pub fn decode(&mut self, bytes: &[u8], into: &mut Image) -> Result<(), DecodeError> {
        let header = probe(bytes)?;
        let whole = Part::whole(header.width, header.height);
        self.decode_part(bytes, &header, whole, into).map(drop)
    }

    /// Decodes at least the `wanted` part of an image with this header, and says what was decoded:
    /// of a JPEG the columns of the box and the rows down to its last; of fallback kinds (CMYK, chroma sampled
    /// more finely than luma) and of PNG the whole image at full size.
    ///
    /// At a reduction of 1 the pixels inside the wanted box are those of [`Decoder::decode`], byte
    /// for byte; around it they need not be. Damage that lies below the box may go unnoticed.
    ///
    /// # Errors
    /// As [`Decoder::decode`].
    ///
    /// # Panics
    /// Where the box is empty or leaves the image, or the reduction is other than 1, 2 or 4.
    pub fn decode_part(
        &mut self,
        bytes: &[u8],
        header: &Probe,
        wanted: Part,
        into: &mut Image,
    ) -> Result<Part, DecodeError> {
        let whole = Part::whole(header.width, header.height);
        let Part { area, reduction } = wanted;
        let empty = area.width == 0 || area.height == 0;
        assert!(!empty && whole.area.contains(&area), "{area:?} of {:?}", whole.area);
        assert!(matches!(reduction, 1 | 2 | 4), "a reduction of {reduction}");
        match header.format {
            Format::Jpeg => self.jpeg.decode(bytes, header, wanted, into),
            Format::Png => {
                png::decode(bytes, header, &mut into.pixels)?;
                (into.width, into.height) = (header.width, header.height);
                Ok(whole)
            }
        }
    }
}

/// Why an image cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The bytes begin like no known image format.
    #[error("not a JPEG or PNG image: {len} bytes starting with {start:02x?}")]
    NotAnImage {
        /// Length of the input.
        len: usize,
        /// Its first bytes, at most eight.
        start: Vec<u8>,
    },
    /// The bytes end before the picture does.
    #[error("the {what} is cut off: {len} bytes end at offset {offset}")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where more bytes were expected.
        offset: usize,
        /// Length of the input.
        len: usize,
    },
    /// The header is invalid.
    #[error("malformed {what} at offset {offset}")]
    Malformed {
        /// What was being read.
        what: &'static str,
        /// Where it begins.
        offset: usize,
    },
    /// The image is larger than [`PIXELS_MAX`].
    #[error("{width}x{height} pixels: more than {PIXELS_MAX} are refused")]
    TooLarge {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// Fewer bytes than the smallest code for so many pixels has: refused before the memory for
    /// them is taken.
    #[error("{width}x{height} pixels in {len} bytes: the shortest possible code has {least}")]
    TooShort {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Length of the input.
        len: usize,
        /// The least that it must have.
        least: u64,
    },
    /// The header or image has more parts than any real file.
    #[error("more than {max} {what} at offset {offset}: refused")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// What is allowed.
        max: usize,
        /// Where the first one too many begins.
        offset: usize,
    },
    /// A kind of image that this decoder does not read.
    #[error("{what} is not supported")]
    Unsupported {
        /// The kind.
        what: &'static str,
    },
    /// The coded picture is damaged.
    #[error("damaged picture: {reason}")]
    Damaged {
        /// The decoder's words.
        reason: String,
    },
}
