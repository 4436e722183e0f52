//! The JPEG decoder: the crate `libjpeg-turbo-rs`, libjpeg-turbo's algorithms in Rust. Its pixels are
//! libjpeg-turbo's, and so Pillow's, to the byte.
//!
//! Nothing outside this file and `planes.rs` knows which decoder it is; `tests/pixels.rs` holds the
//! hashes of what it makes of some two hundred pictures, so that another can take its place.
//!
//! **What stands in front of it.** [`probe()`] has walked the header, and has refused what
//! is too large, too short for its pixels, of too many scans or segments, or of a kind not read here.
//! The decoder reads the header once more: what it finds must be the same picture. It is strict:
//! missing data and codes that do not exist are errors, where libjpeg warns and fills up with gray.
//! It skips bytes between segments and broken metadata, as libjpeg does. A panic in it is an error.
//!
//! **What it cannot see.** Damage that happens to be valid codes, as in every decoder of JPEG. Of
//! arithmetic coding that is nearly all damage: any bytes are valid.
//!
//! **Its unsafe code**, version 0.9.0, on the paths that are called from here (x86-64), was read to
//! its end:
//! - The calls of the inverse transforms (`pipeline_impl/{baseline,progressive,arithmetic}.rs`) write
//!   blocks of `n` by `n` samples, `n` at most 8, into planes of whole units (`mcus × factor × n`
//!   along each side); every block index is below the blocks of its plane, in scans of one component
//!   because `ceil(side × factor / largest)` is at most that.
//! - The transforms (`decode/idct_scaled.rs`, `idct_extended.rs`, `simd/x86_64/{idct,avx2_idct}.rs`)
//!   read tables of 64 and write `n` rows of `n` bytes. Aligned loads are of constants that are
//!   aligned by their type.
//! - Colours and interpolation (`simd/x86_64/{color,avx2_color,upsample,avx2_upsample}.rs`): each safe
//!   wrapper asks the processor and holds the lengths of its slices against the width before it calls
//!   the vector code, whose loops end where a whole vector no longer fits; else it takes the plain loop.
//! - `common/try_alloc.rs` makes a vector of zeros from the allocator's own; `common/huffman_table.rs`
//!   publishes the standard tables once, by compare-and-exchange, for the program's life.
//!
//! Reading bits, Huffman tables, headers, scans and lossless coding are safe code. Encoders, transcoding and the merged
//! upsampling are not called. The code for ARM and WebAssembly was not read.

use std::panic::{AssertUnwindSafe, catch_unwind};

use libjpeg_turbo_rs::{DecodeLimits, FrameHeader, JpegError, PixelFormat, ScalingFactor};

use super::{
    Components, DecodeError, Image, PIXELS_MAX, Part, Probe, Rect, SCANS_MAX, planes, probe,
};

/// The decoder and its version; the same as in `Cargo.toml`.
pub(super) const NAME: &str = "libjpeg-turbo-rs 0.9.0";

/// Decodes JPEGs, one after the other.
#[derive(Debug, Default)]
pub(super) struct Jpeg {
    /// A file whose header says fewer rows.
    copy: Vec<u8>,
}

impl Jpeg {
    /// Decodes at least `wanted`; the pixels in it are those of the whole picture.
    pub(super) fn decode(
        &mut self,
        bytes: &[u8],
        header: &Probe,
        wanted: Part,
        into: &mut Image,
    ) -> Result<Part, DecodeError> {
        let layout = header.layout;
        if !ends(bytes.get(layout.coded..).unwrap_or_default()) {
            // What lacks of the last scan, of arithmetic coding, or of a file whose rest reads as zeros, leaves
            // no other trace. Pillow refuses such files as well.
            return Err(truncated(bytes));
        }
        if layout.restarts && layout.one_scan {
            probe::walk_scans(bytes, layout.coded, SCANS_MAX, |_, _| Ok(()))?;
        }
        let decoded = catch_unwind(AssertUnwindSafe(|| self.strictly(bytes, header, wanted, into)));
        decoded.unwrap_or_else(|_| {
            Err(DecodeError::Damaged { reason: format!("{NAME} has panicked") })
        })
    }

    fn strictly(
        &mut self,
        bytes: &[u8],
        header: &Probe,
        wanted: Part,
        into: &mut Image,
    ) -> Result<Part, DecodeError> {
        let failed = |error| failed(error, bytes);
        let whole = Part::whole(header.width, header.height);
        if planes_apart(header) {
            let decoder = open(bytes, header)?;
            let frame = decoder.header().clone();
            let raw = decoder.decode_raw().map_err(failed)?;
            planes::to_rgb(&raw, &frame, header, &mut into.pixels)?;
            (into.width, into.height) = (header.width, header.height);
            return Ok(whole);
        }
        let part = if header.layout.lossless { whole } else { grow(wanted, header) };
        let rows = rows(part, header);
        if rows == header.height {
            let decoder = open(bytes, header)?;
            return crop(decoder, header.width, part, into).map(|()| part).map_err(failed);
        }
        // The code of a picture's upper rows is that of a picture that has no others.
        self.copy.clear();
        self.copy.extend_from_slice(bytes);
        let at = header.layout.frame + 5;
        // Below the height, which has 16 bits.
        self.copy[at..at + 2].copy_from_slice(&(rows as u16).to_be_bytes());
        let header = Probe { height: rows, ..*header };
        let decoder = open(&self.copy, &header)?;
        crop(decoder, header.width, part, into).map(|()| part).map_err(failed)
    }
}

/// Reads the header, and holds it against ours: the decoder takes memory for what it finds itself.
fn open<'a>(bytes: &'a [u8], header: &Probe) -> Result<libjpeg_turbo_rs::Decoder<'a>, DecodeError> {
    let limits =
        DecodeLimits { max_pixels: PIXELS_MAX, max_scans: SCANS_MAX, ..DecodeLimits::default() };
    let mut decoder = libjpeg_turbo_rs::Decoder::new_with_limits(bytes, limits)
        .map_err(|error| failed(error, bytes))?;
    let FrameHeader { width, height, is_progressive, is_lossless, precision, .. } =
        *decoder.header();
    let count = match header.components {
        Components::Gray => 1,
        Components::Ycc | Components::Rgb => 3,
        Components::Cmyk | Components::Ycck => 4,
    };
    let coding = [is_progressive, decoder.is_arithmetic(), is_lossless];
    let found = (u32::from(width), u32::from(height), coding);
    let coding = [header.progressive, header.arithmetic, header.layout.lossless];
    let ours = (header.width, header.height, coding);
    if found != ours || precision != 8 || decoder.header().components.len() != count {
        let reason = format!("two headers, {found:?} and {ours:?}");
        return Err(DecodeError::Damaged { reason });
    }
    decoder.set_output_format(PixelFormat::Rgb);
    // As libjpeg does where a progressive picture lacks its finer scans.
    decoder.set_block_smoothing(true);
    Ok(decoder)
}

/// Whether the decoder gives the components one by one: its own conversions of four inks are not
/// Pillow's, and it takes luma for the component that is sampled most.
fn planes_apart(header: &Probe) -> bool {
    match header.components {
        Components::Cmyk | Components::Ycck => true,
        Components::Ycc => !header.layout.first_finest,
        Components::Gray | Components::Rgb => false,
    }
}

/// Decodes `part` of a picture that is `width` pixels wide and ends at or below the part.
fn crop(
    mut decoder: libjpeg_turbo_rs::Decoder<'_>,
    width: u32,
    part: Part,
    into: &mut Image,
) -> Result<(), JpegError> {
    let Part { area, reduction } = part;
    decoder.set_scale(ScalingFactor::try_new(1, reduction)?);
    let reduced = |length: u32| length.div_ceil(reduction) as usize;
    if area.width < width {
        decoder.set_crop(reduced(area.left), reduced(area.width));
    }
    into.pixels.resize(decoder.output_buffer_size()?, 0);
    let decoded = decoder.decode_image_into(&mut into.pixels)?;
    let (columns, rows) = (reduced(area.width), reduced(area.height));
    if decoded.width != columns || decoded.height < rows {
        let (width, height) = (decoded.width, decoded.height);
        let what = format!("{width}x{height} pixels decoded of {columns}x{rows}");
        return Err(JpegError::CorruptData(what));
    }
    // Rows below the part are there for the sake of its last one.
    into.pixels.truncate(columns * rows * 3);
    (into.width, into.height) = (columns as u32, rows as u32);
    Ok(())
}

/// What is decoded where `wanted` is asked for: all rows from the first to the last of the box, and
/// columns from the beginning of a unit of the coding on.
fn grow(wanted: Part, header: &Probe) -> Part {
    let [across, down] = header.layout.factors.map(u32::from);
    // The chroma of 4:1:1 would be off by more than a level.
    let reduction = if across.max(down) > 2 { 1 } else { wanted.reduction };
    let area = wanted.area;
    // Chroma is interpolated: at the left and right edge of what is decoded a neighbour is missing.
    // Two samples of the coarsest chroma are on the safe side.
    let margin = across * 2 * reduction;
    let unit = across * 8;
    let left = area.left.saturating_sub(margin) / unit * unit;
    // Sides are below 2^16, so nothing here overflows.
    let right = (area.left + area.width + margin).next_multiple_of(reduction).min(header.width);
    let bottom = (area.top + area.height).next_multiple_of(reduction).min(header.height);
    let area = Rect { left, top: 0, width: right - left, height: bottom };
    Part { area, reduction }
}

/// Rows of the picture that must be decoded for this part: to the end of the unit that holds the
/// neighbours of its last row. All where the code of the upper rows cannot be told from the rest.
fn rows(part: Part, header: &Probe) -> u32 {
    let layout = header.layout;
    if !layout.one_scan || layout.lossless || header.arithmetic {
        return header.height;
    }
    let down = u32::from(layout.factors[1]);
    let last = part.area.height + down * 2 * part.reduction;
    last.next_multiple_of(down * 8).min(header.height)
}

fn failed(error: JpegError, bytes: &[u8]) -> DecodeError {
    match error {
        JpegError::UnexpectedEof => truncated(bytes),
        error => DecodeError::Damaged { reason: error.to_string() },
    }
}

fn truncated(bytes: &[u8]) -> DecodeError {
    DecodeError::Truncated { what: "picture", offset: bytes.len(), len: bytes.len() }
}

/// Whether an end marker is there. (No two bytes of coded pixels look like it.)
fn ends(coded: &[u8]) -> bool {
    coded.windows(2).rposition(|pair| pair == [0xFF, 0xD9]).is_some()
}
