//! Colour, as Pillow's `ImageEnhance` and `convert` do it on 8-bit pixels: blends are computed in
//! `f32` and truncated, hues partly in `f64`, and every operation rounds to 8 bits before the next.
//!
//! Views are row-planar here (see [`super::geometry`]). Loops have no branches and no tables, so that
//! they become vector code; conversions to integers add 2^52 (or 2^23) and keep the low bits, because
//! a saturating cast does not.

/// Blends with black. Factor 1 is the image.
#[inline(always)]
pub(super) fn brightness(view: &mut [u8], factor: f32) {
    blend_flat(view, 0, factor);
}

/// Blends with the mean of the image's luma. Factor 1 is the image.
#[inline(always)]
pub(super) fn contrast(view: &mut [u8], side: usize, factor: f32) {
    let mut sum = 0;
    for row in view.chunks_exact(3 * side) {
        let (r, g, b) = (&row[..side], &row[side..2 * side], &row[2 * side..]);
        // A row of at most 4096 values of at most 255 fits.
        let row: u32 = (0..side).map(|x| luma(r[x], g[x], b[x])).sum();
        sum += u64::from(row);
    }
    let mean = (sum as f64 / (side * side) as f64 + 0.5) as u8;
    blend_flat(view, mean, factor);
}

/// Blends with the image's luma. Factor 1 is the image.
#[inline(always)]
pub(super) fn saturation(view: &mut [u8], side: usize, factor: f32) {
    for_pixels(view, side, Saturation(factor));
}

/// Three equal channels of luma.
#[inline(always)]
pub(super) fn gray(view: &mut [u8], side: usize) {
    for_pixels(view, side, Gray);
}

/// Turns the hue, through 8-bit HSV as Pillow does: the shift is truncated to 1/255 turns and the
/// sum wraps at 256.
#[inline(always)]
pub(super) fn hue(view: &mut [u8], side: usize, turns: f32) {
    let shift = (f64::from(turns) * 255.0) as i32 as u8;
    for_pixels(view, side, Hue(shift));
}

/// What becomes of a pixel. Not a closure: those cannot be told to be inlined always, and one that is
/// not is called for each pixel, without vectors.
trait Pixel: Copy {
    fn map(self, pixel: [u8; 3]) -> [u8; 3];
}

#[derive(Clone, Copy)]
struct Saturation(f32);

impl Pixel for Saturation {
    #[inline(always)]
    fn map(self, [r, g, b]: [u8; 3]) -> [u8; 3] {
        let gray = luma(r, g, b) as f32;
        [blend(gray, r, self.0), blend(gray, g, self.0), blend(gray, b, self.0)]
    }
}

#[derive(Clone, Copy)]
struct Gray;

impl Pixel for Gray {
    #[inline(always)]
    fn map(self, [r, g, b]: [u8; 3]) -> [u8; 3] {
        [luma(r, g, b) as u8; 3]
    }
}

#[derive(Clone, Copy)]
struct Hue(u8);

impl Pixel for Hue {
    #[inline(always)]
    fn map(self, pixel: [u8; 3]) -> [u8; 3] {
        let (h, s, v) = to_hsv(pixel);
        to_rgb(h.wrapping_add(self.0), s, v)
    }
}

#[inline(always)]
fn for_pixels(view: &mut [u8], side: usize, op: impl Pixel) {
    for row in view.chunks_exact_mut(3 * side) {
        let (r, rest) = row.split_at_mut(side);
        let (g, b) = rest.split_at_mut(side);
        for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
            [*r, *g, *b] = op.map([*r, *g, *b]);
        }
    }
}

/// ITU-R 601-2 luma in 16-bit fixed point, rounded.
#[inline(always)]
fn luma(r: u8, g: u8, b: u8) -> u32 {
    (u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000) >> 16
}

/// `from` at factor 0, `to` at factor 1, clamped and truncated.
#[inline(always)]
pub(super) fn blend(from: f32, to: u8, factor: f32) -> u8 {
    let value = from + factor * (f32::from(to) - from);
    let value = value.clamp(0.0, 255.0).floor();
    (value + (1 << 23) as f32).to_bits() as u8
}

#[inline(always)]
fn blend_flat(view: &mut [u8], from: u8, factor: f32) {
    for value in view {
        *value = blend(f32::from(from), *value, factor);
    }
}

/// The integer part of a number in `[0, 256)`.
#[inline(always)]
fn truncate(value: f64) -> u8 {
    (value.floor() + (1u64 << 52) as f64).to_bits() as u8
}

/// Pillow's hue and saturation: `f32` where it has `float` variables, `f64` within expressions.
#[inline(always)]
fn to_hsv([r, g, b]: [u8; 3]) -> (u8, u8, u8) {
    let (most, least) = (r.max(g).max(b), r.min(g).min(b));
    let range = f32::from(most - least);
    // Gray pixels divide by zero; their hue is replaced below.
    let distance = |channel: u8| f32::from(most - channel) / range;
    let (r_far, g_far, b_far) = (distance(r), distance(g), distance(b));
    let red = b_far - g_far;
    let green = (2.0 + f64::from(r_far) - f64::from(b_far)) as f32;
    let blue = (4.0 + f64::from(g_far) - f64::from(r_far)) as f32;
    let sector = if r == most {
        red
    } else if g == most {
        green
    } else {
        blue
    };
    let turned = f64::from(sector) / 6.0 + 1.0;
    let h = truncate(f64::from((turned - turned.floor()) as f32) * 255.0);
    let s = truncate(f64::from(range / f32::from(most)) * 255.0);
    if most == least { (0, 0, most) } else { (h, s, most) }
}

/// The inverse. Without saturation all three are `v`, whatever the hue.
#[inline(always)]
fn to_rgb(h: u8, s: u8, v: u8) -> [u8; 3] {
    let turned = f64::from(h) * 6.0 / 255.0;
    let whole = turned.floor();
    let part = f64::from((turned - whole) as f32);
    let s = f64::from((f64::from(s) / 255.0) as f32);
    let scale = |x: f64| truncate(f64::from(v) * (1.0 - x) + 0.5);
    let (low, fall, rise) = (scale(s), scale(s * part), scale(s * (1.0 - part)));
    let sector = truncate(whole);
    // Hue 255 is a full turn, sector 6: the same as sector 0.
    let pick = |at: [u8; 6]| match sector {
        1 => at[1],
        2 => at[2],
        3 => at[3],
        4 => at[4],
        5 => at[5],
        _ => at[0],
    };
    [
        pick([v, fall, low, low, rise, v]),
        pick([rise, v, v, fall, low, low]),
        pick([low, low, rise, v, v, fall]),
    ]
}
