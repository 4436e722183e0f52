//! JPEG bytes to RGB pixels.
//!
//! The pixels are those of Pillow's `Image.open(..).convert("RGB")`: gray is replicated, CMYK and YCCK
//! go through Pillow's formula, EXIF orientation is ignored (as torchvision's `ImageFolder` does).
//! Bytes that are truncated or damaged are an error, never a half gray picture.

mod inks;
mod png;
mod probe;
mod rare;

#[path = "zune.rs"]
mod imp;

pub use imp::Decoder;
pub use probe::{Components, Format, Probe, probe};

/// Pixels an image may have: 2^28, 0.8 GB of RGB. Larger ones are refused before anything is allocated.
pub const PIXELS_MAX: u64 = 1 << 28;

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

/// Why bytes did not become pixels.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The bytes begin like no image format known here.
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
    /// The header says something that cannot be.
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
