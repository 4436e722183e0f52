//! The decoder in C and assembler: libjpeg-turbo, the one inside Pillow.

use turbojpeg::{Decompressor, PixelFormat};

use super::{Components, DecodeError, Image, Probe, SCANS_MAX, inks};

pub(super) const NAME: &str = "libjpeg-turbo 3 (crate turbojpeg 1.5)";

/// Decodes JPEGs, one after the other.
#[derive(Debug, Default)]
pub(super) struct Jpeg {
    /// Made by the first picture: only then can it be said that it failed.
    handle: Option<Decompressor>,
    /// Four-component pixels on their way to RGB.
    inks: Vec<u8>,
}

impl Jpeg {
    /// A warning of the library (data that end early, bytes between segments) is an error here.
    pub(super) fn decode(
        &mut self,
        bytes: &[u8],
        header: &Probe,
        into: &mut Image,
    ) -> Result<(), DecodeError> {
        let handle = match &mut self.handle {
            Some(handle) => handle,
            none => {
                let mut handle = Decompressor::new().map_err(damaged)?;
                handle.set_scan_limit(SCANS_MAX as u32).map_err(damaged)?;
                none.insert(handle)
            }
        };
        let four = matches!(header.components, Components::Cmyk | Components::Ycck);
        let (pixels, format) = if four {
            (&mut self.inks, PixelFormat::CMYK)
        } else {
            (&mut into.pixels, PixelFormat::RGB)
        };
        let (width, height) = (header.width as usize, header.height as usize);
        let pitch = width * format.size();
        pixels.resize(height * pitch, 0);
        let image =
            turbojpeg::Image { pixels: pixels.as_mut_slice(), width, pitch, height, format };
        if let Err(error) = handle.decompress(bytes, image) {
            // A handle that failed in a header says so again of every later picture.
            self.handle = None;
            return Err(damaged(error));
        }
        if four {
            // The library has turned YCCK into inks already.
            let header = Probe { components: Components::Cmyk, ..*header };
            inks::to_rgb(&self.inks, &header, &mut into.pixels);
        }
        Ok(())
    }
}

fn damaged(error: turbojpeg::Error) -> DecodeError {
    DecodeError::Damaged { reason: error.to_string() }
}
