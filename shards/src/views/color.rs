//! Colour, as Pillow's `ImageEnhance` and `convert` do it on 8-bit pixels: blends are computed in
//! `f32` and truncated, hues partly in `f64`, and every operation rounds to 8 bits before the next.
//!
//! Loops have no branches and no tables, so that they become vector code; conversions to integers add
//! 2^52 (or 2^23) and keep the low bits, because a saturating cast does not.

use super::planes::Planes;

/// Blends with black. Factor 1 is the image.
#[inline(always)]
pub(super) fn brightness(view: &mut Planes, factor: f32) {
    blend_flat(view, 0, factor);
}

/// Blends with the mean of the image's luma. Factor 1 is the image.
#[inline(always)]
pub(super) fn contrast(view: &mut Planes, factor: f32) {
    let mean = luma_mean(view);
    blend_flat(view, mean, factor);
}

/// The rounded mean of the image's luma.
#[inline(always)]
pub(super) fn luma_mean(view: &mut Planes) -> u8 {
    let [r, g, b] = view.planes();
    mean(luma_sum(r, g, b), r.len())
}

/// Sum of the luma of some pixels.
#[inline(always)]
pub(super) fn luma_sum(r: &[u8], g: &[u8], b: &[u8]) -> u64 {
    // As many values of at most 255 fit.
    const PART: usize = 1 << 16;
    let parts = r.chunks(PART).zip(g.chunks(PART)).zip(b.chunks(PART));
    let sums = parts.map(|((r, g), b)| {
        let sum: u32 = r.iter().zip(g).zip(b).map(|((r, g), b)| luma(*r, *g, *b)).sum();
        u64::from(sum)
    });
    sums.sum()
}

/// The rounded mean of so many pixels, from their sum.
pub(super) fn mean(sum: u64, pixels: usize) -> u8 {
    (sum as f64 / pixels as f64 + 0.5) as u8
}

/// Blends with the image's luma. Factor 1 is the image.
#[inline(always)]
pub(super) fn saturation(view: &mut Planes, factor: f32) {
    for_pixels(view, Saturation(factor));
}

/// Three equal channels of luma.
#[inline(always)]
pub(super) fn gray(view: &mut Planes) {
    for_pixels(view, Gray);
}

/// Turns the hue, through 8-bit HSV as Pillow does: the shift is truncated to 1/255 turns and the
/// sum wraps at 256.
#[inline(always)]
pub(super) fn hue(view: &mut Planes, turns: f32) {
    for_pixels(view, Hue(shift(turns)));
}

/// A part of a turn in units of Pillow's 8-bit hue, truncated, modulo 256.
pub(super) fn shift(turns: f32) -> u8 {
    (f64::from(turns) * 255.0) as i32 as u8
}

/// An operation on one pixel. Not a closure: a closure cannot be marked `inline(always)`, and one that is not
/// inlined is called for each pixel, without vector code.
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
        turn(pixel, self.0)
    }
}

#[inline(always)]
fn for_pixels(view: &mut Planes, op: impl Pixel) {
    let [r, g, b] = view.planes();
    for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
        [*r, *g, *b] = op.map([*r, *g, *b]);
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
pub(super) fn blend_flat(view: &mut Planes, from: u8, factor: f32) {
    for plane in view.planes() {
        for value in plane {
            *value = blend(f32::from(from), *value, factor);
        }
    }
}

/// The integer part of a number in `[0, 256)`.
#[inline(always)]
fn truncate(value: f32) -> i32 {
    ((value.floor() + (1 << 23) as f32).to_bits() & 0xFF) as i32
}

/// A pixel with its hue turned by `shift` / 255, through Pillow's 8-bit hue, saturation and value.
///
/// Pillow computes partly in `f64`. What is done here in `f32` and integers was found by trying to
/// truncate to the same bytes for every pixel and every shift, and a test holds it to that.
#[inline(always)]
fn turn([r, g, b]: [u8; 3], shift: u8) -> [u8; 3] {
    let [r, g, b] = [r, g, b].map(i32::from);
    let (most, least) = (r.max(g).max(b), r.min(g).min(b));
    let middle = r + g + b - most - least;
    let range = most - least;
    // Gray pixels have no hue; any will do, because their saturation is 0.
    let part = (most - middle) as f32 / range.max(1) as f32;
    // The hue in sixths of a turn is `base` plus or minus `part`. Selects, not branches: for vectors.
    let select = |condition: bool, yes: f32, no: f32| if condition { yes } else { no };
    let (is_red, is_green) = (r == most, g == most);
    let red = select(b <= g, 1.0, -1.0);
    let green = select(b <= r, 1.0, 3.0);
    let blue = select(r <= g, 3.0, 5.0);
    let base = select(is_red, red, select(is_green, green, blue));
    let red = select(b <= g, -1.0, 1.0);
    let green = select(b <= r, 1.0, -1.0);
    let blue = select(r <= g, 1.0, -1.0);
    let sixths = base + part * select(is_red, red, select(is_green, green, blue));
    let turns = sixths / 6.0 + select(sixths < 0.0, 1.0, 0.0);
    let hue = (truncate(turns * 255.0) + i32::from(shift)) & 0xFF;
    let saturation = truncate((range * 255) as f32 / most.max(1) as f32);

    let sector = ((hue * 6 + 1) * 257) >> 16;
    let within = hue * 6 - sector * 255;
    let away = if sector & 1 == 1 { within } else { 255 - within };
    // Rounded quotients; neither is ever halfway between two integers.
    let low = most * (255 - saturation) + 128;
    let low = (low + (low >> 8)) >> 8;
    let middle = (most * (255 * 255 - saturation * away)) as f32;
    let middle = truncate(middle * (1.0 / (255.0 * 255.0)) + 0.5);
    // Hue 255 is a full turn, sector 6: the same as sector 0.
    let sector = if sector == 6 { 0 } else { sector };
    let pick = |highest: [i32; 2], lowest: [i32; 2]| {
        let is = |at: [i32; 2]| (sector == at[0]) | (sector == at[1]);
        (if is(highest) {
            most
        } else if is(lowest) {
            low
        } else {
            middle
        }) as u8
    };

    [pick([0, 5], [2, 3]), pick([1, 2], [4, 5]), pick([3, 4], [0, 1])]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pillow's two conversions, in its own types: `float` variables, `double` expressions.
    fn pillow([r, g, b]: [u8; 3], shift: u8) -> [u8; 3] {
        let (most, least) = (r.max(g).max(b), r.min(g).min(b));
        let (mut h, mut s) = (0, 0);
        if most != least {
            let range = f32::from(most - least);
            let distance = |channel: u8| f32::from(most - channel) / range;
            let (rc, gc, bc) = (distance(r), distance(g), distance(b));
            let sector = if r == most {
                bc - gc
            } else if g == most {
                (2.0 + f64::from(rc) - f64::from(bc)) as f32
            } else {
                (4.0 + f64::from(gc) - f64::from(rc)) as f32
            };
            let turns = (f64::from(sector) / 6.0 + 1.0) % 1.0;
            h = (f64::from(turns as f32) * 255.0) as u8;
            s = (f64::from(range / f32::from(most)) * 255.0) as u8;
        }
        let (h, v) = (h.wrapping_add(shift), f64::from(most));
        let sixths = f64::from(h) * 6.0 / 255.0;
        let part = f64::from((sixths - sixths.floor()) as f32);
        let s = f64::from((f64::from(s) / 255.0) as f32);
        let [p, q, t] = [s, s * part, s * (1.0 - part)].map(|x| (v * (1.0 - x)).round() as u8);
        match sixths as u8 {
            1 => [q, most, p],
            2 => [p, most, t],
            3 => [p, q, most],
            4 => [t, p, most],
            5 => [most, p, q],
            _ => [most, t, p],
        }
    }

    /// All pixels for some shifts. (Hue and saturation depend on the pixel alone, and the way back is
    /// tried with all hues, because pixels have them all.)
    #[test]
    fn hues_turn_as_in_pillow_for_every_pixel() {
        for shift in [0, 1, 26, 128, 230, 255] {
            let [mut row, mut before] = [Planes::default(), Planes::default()];
            row.reshape(4096, 1);
            for first in (0..1 << 24).step_by(4096) {
                let [reds, greens, blues] = row.planes();
                for x in 0..4096 {
                    let [_, r, g, b] = (first + x as u32).to_be_bytes();
                    [reds[x], greens[x], blues[x]] = [r, g, b];
                }
                before.cut(&row, [0, 0, 4096, 1]);
                for_pixels(&mut row, Hue(shift));
                for x in 0..4096 {
                    let pixel = |row: &Planes| row.row(0).map(|channel| channel[x]);
                    let (is, was) = (pixel(&row), pixel(&before));
                    assert_eq!(is, pillow(was, shift), "{was:?} turned by {shift}");
                }
                #[cfg(target_arch = "x86_64")]
                if let Some(avx2) = super::super::avx2::Avx2::detect() {
                    avx2.hue(&mut before, shift);
                    assert!(before.row(0) == row.row(0), "{first:#x} turned by {shift}");
                }
            }
        }
    }
}
