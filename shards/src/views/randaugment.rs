//! RandAugment (Cubuk et al., 2020): operations drawn from a list of fifteen, all at one magnitude.
//!
//! DetCo's second version uses it and gives no parameters. List, strengths and noise here are those of
//! timm's `rand-n2-m10-mstd0.5`, which the contrastive recipes of its time used (InfoMin in
//! PyContrast). Pixels are those of Pillow's `ImageOps`, `ImageEnhance` and `Image.transform`.

use super::color;
use super::plan::Op;
use super::planes::Planes;
use super::rng::{self, Rng};
use super::step::RandAugment;

/// The strongest magnitude; timm's scale.
const MAGNITUDE_MAX: f64 = 10.0;
/// The fill outside a rotated image: ImageNet's mean.
const OUTSIDE: [u8; 3] = [124, 116, 104];

impl RandAugment {
    /// Draws the operations of one view of `size` pixels. Each draw consumes the same words whatever
    /// comes of it, but for the rejections of a normal number.
    pub(super) fn draw(&self, size: u32, ops: &mut Vec<Op>, rng: &mut Rng) {
        for _ in 0..self.n {
            let which = rng.below(15);
            let applied = rng.chance(self.p);
            let magnitude = self.m + self.mstd * rng.normal();
            let level = magnitude.clamp(0.0, MAGNITUDE_MAX) / MAGNITUDE_MAX;
            let sign = if rng.chance(0.5) { -1.0 } else { 1.0 };
            let bicubic = rng.chance(0.5);
            if applied {
                ops.push(operation(which, level, sign, bicubic, f64::from(size)));
            }
        }
    }
}

fn operation(which: u32, level: f64, sign: f64, bicubic: bool, size: f64) -> Op {
    let factor = (level * 1.8 + 0.1) as f32;
    let affine = |matrix| Op::Affine { matrix, bicubic };
    match which {
        0 => Op::AutoContrast,
        1 => Op::Equalize,
        2 => Op::Invert,
        3 => affine(turn(sign * level * 30.0, size)),
        4 => Op::Posterize((level * 4.0) as u8),
        5 => Op::Solarize((level * 256.0) as u16),
        6 => Op::SolarizeAdd((level * 110.0) as u8),
        7 => Op::Saturation(factor),
        8 => Op::Contrast(factor),
        9 => Op::Brightness(factor),
        10 => Op::Sharpness(factor),
        11 => affine([1.0, sign * level * 0.3, 0.0, 0.0, 1.0, 0.0]),
        12 => affine([1.0, 0.0, 0.0, sign * level * 0.3, 1.0, 0.0]),
        13 => affine([1.0, 0.0, sign * level * 0.45 * size, 0.0, 1.0, 0.0]),
        _ => affine([1.0, 0.0, 0.0, 0.0, 1.0, sign * level * 0.45 * size]),
    }
}

/// The matrix of Pillow's `Image.rotate`: about the centre, counter-clockwise in degrees.
fn turn(degrees: f64, size: f64) -> [f64; 6] {
    let (sin, cos) = rng::sin_cos(degrees.to_radians());
    let center = size / 2.0;
    // Of the input: x' = cos (x - c) - sin (y - c) + c, y' = sin (x - c) + cos (y - c) + c.
    let shift_x = -cos * center + sin * center + center;
    let shift_y = -sin * center - cos * center + center;
    [cos, -sin, shift_x, sin, cos, shift_y]
}

fn histogram(plane: &[u8]) -> [u32; 256] {
    let mut counts = [0; 256];
    plane.iter().for_each(|value| counts[usize::from(*value)] += 1);
    counts
}

/// `ImageOps.autocontrast`: each channel is stretched to 0..=255.
pub(super) fn auto_contrast(view: &mut Planes) {
    for plane in view.planes() {
        let counts = histogram(plane);
        let least = counts.iter().position(|count| *count > 0).unwrap_or(0);
        let most = counts.iter().rposition(|count| *count > 0).unwrap_or(0);
        if most > least {
            let scale = 255.0 / (most - least) as f64;
            let offset = -(least as f64) * scale;
            plane.iter_mut().for_each(|value| *value = (f64::from(*value) * scale + offset) as u8);
        }
    }
}

/// `ImageOps.equalize`: each channel's histogram is evened out.
pub(super) fn equalize(view: &mut Planes) {
    for plane in view.planes() {
        let counts = histogram(plane);
        let last = counts.iter().rev().find(|count| **count > 0).copied().unwrap_or(0);
        // A channel of one value has all its pixels in the last bin: no step.
        let step = (counts.iter().sum::<u32>() - last) / 255;
        if step == 0 {
            continue;
        }
        let mut before = step / 2;
        let table = counts.map(|count| {
            let value = (before / step).min(255) as u8;
            before += count;
            value
        });
        plane.iter_mut().for_each(|value| *value = table[usize::from(*value)]);
    }
}

fn for_values(view: &mut Planes, op: impl Fn(u8) -> u8) {
    for plane in view.planes() {
        plane.iter_mut().for_each(|value| *value = op(*value));
    }
}

/// `ImageOps.invert`.
pub(super) fn invert(view: &mut Planes) {
    for_values(view, |value| 255 - value);
}

/// `ImageOps.posterize`, for 0 bits too, which leave black.
pub(super) fn posterize(view: &mut Planes, bits: u8) {
    let mask = (0xFF00_u16 >> bits.min(8)) as u8;
    for_values(view, |value| value & mask);
}

/// `ImageOps.solarize`.
pub(super) fn solarize(view: &mut Planes, threshold: u16) {
    for_values(view, |value| if u16::from(value) < threshold { value } else { 255 - value });
}

/// Adds to the darker half, up to white.
pub(super) fn solarize_add(view: &mut Planes, add: u8) {
    for_values(view, |value| if value < 128 { value.saturating_add(add) } else { value });
}

/// Scratch memory of operations that read pixels they have written: the original image.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    before: Planes,
}

impl Scratch {
    fn keep(&mut self, view: &Planes) {
        self.before.cut(view, [0, 0, view.width(), view.height()]);
    }

    /// `ImageEnhance.Sharpness`: a blend with the image smoothed by a 3x3 filter (5 in the middle, 1
    /// around it, of 13), whose border is the image's.
    pub(super) fn sharpness(&mut self, view: &mut Planes, factor: f32) {
        self.keep(view);
        let (width, height) = (view.width(), view.height());
        for (from, to) in self.before.planes().into_iter().zip(view.planes()) {
            let row =
                |at: usize| u32::from(from[at - 1]) + u32::from(from[at]) + u32::from(from[at + 1]);
            for y in 1..height.saturating_sub(1) {
                for at in y * width + 1..(y + 1) * width - 1 {
                    let sum = row(at - width) + row(at) + row(at + width) + 4 * u32::from(from[at]);
                    let smoothed = (2 * sum + 13) / 26; // rounded: a 13th is never at a half
                    to[at] = color::blend(smoothed as f32, from[at], factor);
                }
            }
        }
        // At the border the smoothed image is the image, and so is every blend of the two.
    }

    /// `Image.transform` with an affine matrix.
    pub(super) fn affine(&mut self, view: &mut Planes, matrix: [f64; 6], bicubic: bool) {
        self.keep(view);
        let [a, b, c, d, e, f] = matrix;
        let (width, height) = (view.width(), view.height());
        let limits = [width as f64, height as f64];
        let planes = view.planes();
        for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
            let (from_x, from_y) = (x as f64 + 0.5, y as f64 + 0.5);
            let at = [a * from_x + b * from_y + c, d * from_x + e * from_y + f];
            let inside = at.iter().zip(limits).all(|(at, limit)| *at >= 0.0 && *at < limit);
            for (which, outside) in OUTSIDE.into_iter().enumerate() {
                planes[which][y * width + x] = match (inside, bicubic) {
                    (false, _) => outside,
                    (true, false) => self.bilinear(which, at),
                    (true, true) => self.bicubic(which, at),
                };
            }
        }
    }

    /// A value of a channel; coordinates beyond the edge are the edge's.
    fn value(&self, which: usize, x: isize, y: isize) -> f64 {
        let within = |at: isize, length: usize| at.clamp(0, length as isize - 1) as usize;
        let row = self.before.row(within(y, self.before.height()))[which];
        f64::from(row[within(x, row.len())])
    }

    fn bilinear(&self, which: usize, at: [f64; 2]) -> u8 {
        let ([x, y], [dx, dy]) = split(at);
        let row = |y| {
            let left = self.value(which, x, y);
            left + (self.value(which, x + 1, y) - left) * dx
        };
        let (above, below) = (row(y), row(y + 1));
        (above + (below - above) * dy) as u8
    }

    fn bicubic(&self, which: usize, at: [f64; 2]) -> u8 {
        let ([x, y], [dx, dy]) = split(at);
        let row = |y| cubic([-1, 0, 1, 2].map(|i| self.value(which, x + i, y)), dx);
        cubic([-1, 0, 1, 2].map(|i| row(y + i)), dy) as u8
    }
}

/// The pixel at or before a place, counted from pixel centres, and what is left.
fn split(at: [f64; 2]) -> ([isize; 2], [f64; 2]) {
    let at = at.map(|at| at - 0.5);
    let whole = at.map(f64::floor);
    (whole.map(|whole| whole as isize), [at[0] - whole[0], at[1] - whole[1]])
}

/// Pillow's cubic through four values, `t` of the way from the second to the third.
fn cubic([a, b, c, d]: [f64; 4], t: f64) -> f64 {
    let slope = c - a;
    let square = 2.0 * (a - b) + c - d;
    let cube = -a + b - c + d;
    b + t * (slope + t * (square + t * cube))
}
