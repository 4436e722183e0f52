//! The decoder in C and assembler: libjpeg-turbo, the one inside Pillow.
//!
//! It decodes as much of a picture as is asked for. Codes are read up to the last row of the box;
//! what they say is computed inside the box alone; and a quarter or a sixteenth of the pixels comes
//! from the coarse coefficients of each block, for a quarter of the work and less.

#![expect(unsafe_code, reason = "the wall around libjpeg-turbo")]

use std::ffi::{CStr, c_int};
use std::ptr::NonNull;

use turbojpeg_sys as sys;

use super::{Components, DecodeError, Image, Part, Probe, Rect, SCANS_MAX, inks};

pub(super) const NAME: &str = "libjpeg-turbo 3.1.0 (crate turbojpeg-sys 1.2)";

/// Decodes JPEGs, one after the other.
#[derive(Debug, Default)]
pub(super) struct Jpeg {
    /// Four-component pixels on their way to RGB.
    inks: Vec<u8>,
}

impl Jpeg {
    /// Decodes at least `wanted`; the pixels in it are those of the whole picture. A warning of the
    /// library (data that end early, bytes between segments) is an error here.
    pub(super) fn decode(
        &mut self,
        bytes: &[u8],
        header: &Probe,
        wanted: Part,
        into: &mut Image,
    ) -> Result<Part, DecodeError> {
        // One for each picture, a thousandth of its time: a handle keeps tables for files that have
        // none of their own, and a damaged file would be decoded with those of the file before it.
        Handle::new()?.decode(bytes, header, wanted, (&mut self.inks, into))
    }
}

/// The library's decoder.
#[derive(Debug)]
struct Handle(NonNull<std::ffi::c_void>);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle came from `tj3Init`, and nobody uses it after this.
        unsafe { sys::tj3Destroy(self.0.as_ptr()) }
    }
}

impl Handle {
    fn new() -> Result<Handle, DecodeError> {
        // SAFETY: no precondition.
        let handle = unsafe { sys::tj3Init(sys::TJINIT_TJINIT_DECOMPRESS as c_int) };
        let none = || DecodeError::Damaged { reason: "no memory for a decoder".to_owned() };
        let handle = Handle(NonNull::new(handle).ok_or_else(none)?);
        let scans = sys::TJPARAM_TJPARAM_SCANLIMIT as c_int;
        // SAFETY: the handle is live.
        let status = unsafe { sys::tj3Set(handle.0.as_ptr(), scans, SCANS_MAX as c_int) };
        handle.check(status)?;
        Ok(handle)
    }

    /// Into `pixels`; four inks on the way to them into `inks`.
    fn decode(
        &mut self,
        bytes: &[u8],
        header: &Probe,
        wanted: Part,
        (inks, into): (&mut Vec<u8>, &mut Image),
    ) -> Result<Part, DecodeError> {
        self.read_header(bytes, header)?;
        let four = matches!(header.components, Components::Cmyk | Components::Ycck);
        // Four inks are rare and a strange sampling rarer. A file without its end is decoded whole,
        // so that what lacks is noticed. The chroma of 4:1:1 would be off by more than a level.
        let unit = self.unit().filter(|_| !four && ends(bytes));
        let whole = Part::whole(header.width, header.height);
        let wanted = if unit == Some(32) { Part { reduction: 1, ..wanted } } else { wanted };
        let part = unit.map_or(whole, |unit| grow(wanted, unit, header));
        self.set_part(part, whole)?;
        let [width, height] = [part.area.width, part.area.height]
            .map(|length| length.div_ceil(part.reduction) as usize);
        let (pixels, format, channels) = match four {
            true => (&mut *inks, sys::TJPF_TJPF_CMYK, 4),
            false => (&mut into.pixels, sys::TJPF_TJPF_RGB, 3),
        };
        pixels.resize(width * height * channels, 0);
        let (handle, len) = (self.0.as_ptr(), bytes.len() as sys::size_t);
        let (pitch, format) = ((width * channels) as c_int, format as c_int);
        // SAFETY: the handle is live and used by nobody else (`&mut self`); `bytes` outlive the call.
        // The library writes `height` rows of `width` pixels, `pitch` bytes apart: that is the size
        // of the region and the scale set above, which it holds against the header it read from
        // these very bytes, and `pixels` has room for them.
        let status = unsafe {
            sys::tj3Decompress8(handle, bytes.as_ptr(), len, pixels.as_mut_ptr(), pitch, format)
        };
        self.check(status)?;
        if four {
            // The library has turned YCCK into inks already.
            let header = Probe { components: Components::Cmyk, ..*header };
            inks::to_rgb(inks, &header, &mut into.pixels);
        }
        (into.width, into.height) = (width as u32, height as u32);
        Ok(part)
    }

    /// Reads the header, and holds its size against ours: the library would write as many pixels
    /// as it finds itself.
    fn read_header(&mut self, bytes: &[u8], header: &Probe) -> Result<(), DecodeError> {
        let (handle, len) = (self.0.as_ptr(), bytes.len() as sys::size_t);
        // SAFETY: the handle is live, and `bytes` outlive the call.
        let status = unsafe { sys::tj3DecompressHeader(handle, bytes.as_ptr(), len) };
        self.check(status)?;
        let size = [sys::TJPARAM_TJPARAM_JPEGWIDTH, sys::TJPARAM_TJPARAM_JPEGHEIGHT];
        let size = size.map(|parameter| i64::from(self.get(parameter as c_int)));
        let ours = [i64::from(header.width), i64::from(header.height)];
        if size == ours {
            return Ok(());
        }
        Err(DecodeError::Damaged { reason: format!("two sizes, {size:?} and {ours:?}") })
    }

    /// Pixels from one left edge where decoding may begin to the next: the widest block of a
    /// component. None where the library cannot decode a part.
    fn unit(&self) -> Option<u32> {
        Some(match self.get(sys::TJPARAM_TJPARAM_SUBSAMP as c_int) {
            sys::TJSAMP_TJSAMP_444 | sys::TJSAMP_TJSAMP_GRAY | sys::TJSAMP_TJSAMP_440 => 8,
            sys::TJSAMP_TJSAMP_441 => 8,
            sys::TJSAMP_TJSAMP_422 | sys::TJSAMP_TJSAMP_420 => 16,
            sys::TJSAMP_TJSAMP_411 => 32,
            _ => return None,
        })
    }

    fn get(&self, parameter: c_int) -> c_int {
        // SAFETY: the handle is live.
        unsafe { sys::tj3Get(self.0.as_ptr(), parameter) }
    }

    /// Sets what the next call decodes: `part`, or everything where that is the `whole`.
    fn set_part(&mut self, part: Part, whole: Part) -> Result<(), DecodeError> {
        let scale = sys::tjscalingfactor { num: 1, denom: part.reduction as c_int };
        // SAFETY: the handle is live.
        let status = unsafe { sys::tj3SetScalingFactor(self.0.as_ptr(), scale) };
        self.check(status)?;
        let Rect { left, top, width, height } = part.area;
        let reduced = |length: u32| length.div_ceil(part.reduction) as c_int;
        let [x, y, w, h] = match part.area == whole.area {
            true => [0; 4],
            false => [left, top, width, height].map(reduced),
        };
        // SAFETY: the handle is live, and has read the header that the region is held against.
        let status =
            unsafe { sys::tj3SetCroppingRegion(self.0.as_ptr(), sys::tjregion { x, y, w, h }) };
        self.check(status)
    }

    fn check(&self, status: c_int) -> Result<(), DecodeError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the handle is live.
        let text = unsafe { sys::tj3GetErrorStr(self.0.as_ptr()) };
        // SAFETY: the text ends in a zero, lies in the handle, and is copied before the next call.
        let text = unsafe { CStr::from_ptr(text) };
        Err(DecodeError::Damaged { reason: text.to_string_lossy().into_owned() })
    }
}

/// What is decoded where `wanted` is asked for and parts begin at multiples of `unit` pixels.
fn grow(wanted: Part, unit: u32, header: &Probe) -> Part {
    let Part { area, reduction } = wanted;
    // Chroma is interpolated: at the left and right edge of what is decoded a neighbour is missing.
    // Two samples of the coarsest chroma are on the safe side. Above and below the library looks at
    // the neighbours itself.
    let margin = unit / 8 * 2 * reduction;
    let left = area.left.saturating_sub(margin) / unit * unit;
    let top = area.top / reduction * reduction;
    // Sides are below 2^16, so nothing here overflows.
    let right = (area.left + area.width + margin).next_multiple_of(reduction).min(header.width);
    let bottom = (area.top + area.height).next_multiple_of(reduction).min(header.height);
    Part { area: Rect { left, top, width: right - left, height: bottom - top }, reduction }
}

/// Whether an end marker is there. (No two bytes of coded pixels look like it.)
fn ends(bytes: &[u8]) -> bool {
    bytes.windows(2).rposition(|pair| pair == [0xFF, 0xD9]).is_some()
}
