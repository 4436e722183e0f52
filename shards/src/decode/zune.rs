//! The decoder in pure Rust: zune-jpeg.

use zune_core::bytestream::{ZByteIoError, ZByteReaderTrait, ZSeekFrom};
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use super::{Components, DecodeError, Image, Probe, SCANS_MAX, inks, rare};

pub(super) const NAME: &str = "zune-jpeg 0.5.15";

/// Decodes JPEGs, one after the other.
#[derive(Debug, Default)]
pub(super) struct Jpeg {
    /// Four-component pixels on their way to RGB.
    inks: Vec<u8>,
}

impl Jpeg {
    pub(super) fn decode(
        &mut self,
        bytes: &[u8],
        header: &Probe,
        into: &mut Image,
    ) -> Result<(), DecodeError> {
        if is_rare(header) {
            return rare::decode(bytes, header, &mut into.pixels);
        }
        // The decoder fills up with zeros past the end and says nothing. It stops at the end marker, so
        // a file that has one is not read further. (No two bytes of coded pixels look like it.)
        let Some(end) = bytes.windows(2).rposition(|pair| pair == [0xFF, 0xD9]) else {
            let (what, offset, len) = ("picture", bytes.len(), bytes.len());
            return Err(DecodeError::Truncated { what, offset, len });
        };
        self.common(Bytes { bytes: &bytes[..end + 2], at: 0 }, header, into)
    }

    fn common(
        &mut self,
        bytes: Bytes<'_>,
        header: &Probe,
        into: &mut Image,
    ) -> Result<(), DecodeError> {
        // The decoder's own four-component conversions are not Pillow's: take the inks as they are.
        let (space, channels) = match header.components {
            Components::Cmyk => (ColorSpace::CMYK, 4),
            Components::Ycck => (ColorSpace::YCCK, 4),
            _ => (ColorSpace::RGB, 3),
        };
        let options = DecoderOptions::default()
            .jpeg_set_out_colorspace(space)
            .set_max_width(usize::from(u16::MAX))
            .set_max_height(usize::from(u16::MAX))
            .jpeg_set_max_scans(SCANS_MAX)
            // Without it a truncated picture ends in gray and says nothing.
            .set_strict_mode(true);
        let mut decoder = JpegDecoder::new_with_options(bytes, options);
        decoder.decode_headers().map_err(damaged)?;
        // Where bytes lie between segments, two readers of one header may find two frames in it.
        let size = (header.width as usize, header.height as usize);
        if decoder.dimensions() != Some(size) {
            let reason = format!("two sizes, {:?} and {size:?}", decoder.dimensions());
            return Err(DecodeError::Damaged { reason });
        }
        let pixels = if channels == 4 { &mut self.inks } else { &mut into.pixels };
        pixels.resize(header.width as usize * header.height as usize * channels, 0);
        decoder.decode_into(pixels).map_err(damaged)?;
        if channels == 4 {
            inks::to_rgb(&self.inks, header, &mut into.pixels);
        }
        Ok(())
    }
}

/// What zune-jpeg 0.5.15 gets wrong, found by comparing with Pillow: chroma sampled by more than two
/// (4:1:0, and 4:1:1 with restart markers).
fn is_rare(header: &Probe) -> bool {
    matches!(header.components, Components::Ycc | Components::Rgb) && header.sampling > 2
}

fn damaged(error: zune_jpeg::errors::DecodeErrors) -> DecodeError {
    DecodeError::Damaged { reason: format!("{error:?}") }
}

/// The JPEG bytes as the decoder's input.
///
/// Its own cursor copies the four bytes of each Huffman refill through a `memcpy` of variable length:
/// that alone is a tenth of the decoding time.
struct Bytes<'a> {
    bytes: &'a [u8],
    /// May lie beyond the end: reads past it give zeros, and `is_eof` tells. Noting such reads
    /// costs a seventh of the decoding time.
    at: usize,
}

impl<'a> Bytes<'a> {
    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }
}

impl ZByteReaderTrait for Bytes<'_> {
    #[inline(always)]
    fn read_byte_no_error(&mut self) -> u8 {
        let byte = self.bytes.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        byte
    }

    #[inline(always)]
    fn read_exact_bytes(&mut self, buf: &mut [u8]) -> Result<(), ZByteIoError> {
        // Inlined where the length is a constant, so that the copy is a single load and store.
        let Some(bytes) = self.bytes.get(self.at..).and_then(|rest| rest.get(..buf.len())) else {
            return Err(ZByteIoError::NotEnoughBytes(self.rest().len(), buf.len()));
        };
        buf.copy_from_slice(bytes);
        self.at += buf.len();
        Ok(())
    }

    fn read_bytes(&mut self, buf: &mut [u8]) -> Result<usize, ZByteIoError> {
        let count = self.peek_bytes(buf)?;
        self.at += count;
        Ok(count)
    }

    fn peek_bytes(&mut self, buf: &mut [u8]) -> Result<usize, ZByteIoError> {
        let rest = self.rest();
        let count = rest.len().min(buf.len());
        buf[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn peek_exact_bytes(&mut self, buf: &mut [u8]) -> Result<(), ZByteIoError> {
        let at = self.at;
        let result = self.read_exact_bytes(buf);
        self.at = at;
        result
    }

    #[inline(always)]
    fn z_seek(&mut self, from: ZSeekFrom) -> Result<u64, ZByteIoError> {
        let target = match from {
            ZSeekFrom::Start(offset) => usize::try_from(offset).ok(),
            ZSeekFrom::End(offset) => self.bytes.len().checked_add_signed(offset as isize),
            ZSeekFrom::Current(offset) => self.at.checked_add_signed(offset as isize),
        };
        self.at = target.ok_or(ZByteIoError::SeekError("before the start"))?;
        Ok(self.at as u64)
    }

    #[inline(always)]
    fn is_eof(&mut self) -> Result<bool, ZByteIoError> {
        Ok(self.at >= self.bytes.len())
    }

    #[inline(always)]
    fn z_position(&mut self) -> Result<u64, ZByteIoError> {
        Ok(self.at as u64)
    }

    fn read_remaining(&mut self, sink: &mut Vec<u8>) -> Result<usize, ZByteIoError> {
        let rest = self.rest();
        sink.extend_from_slice(rest);
        self.at = self.at.max(self.bytes.len());
        Ok(rest.len())
    }
}
