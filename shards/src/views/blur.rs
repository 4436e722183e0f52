//! Pillow's Gaussian blur: three box blurs along rows, then three along columns, each rounded to 8
//! bits. A box of fractional radius is an integer box plus a part of the next pixel on either side
//! (Gwosdek, Grewenig, Bruhn, Weickert: "Theoretical Foundations of Gaussian Convolution by
//! Extended Box Filtering", 2011). Pixels beyond the edge repeat the edge.

use super::planes::Planes;

/// Box blurs in a row; Pillow's number.
pub(super) const PASSES: usize = 3;
/// The largest radius that has loops of its own: DetCo's blurs (sigma up to 2) have 0 or 1.
pub(super) const RADIUS_MAX: usize = 1;

/// Rows that are blurred along themselves together.
#[cfg(target_arch = "x86_64")]
pub(super) const TOGETHER: usize = 4;

/// Rows of an image that a ring holds: those that a pass of the largest radius reads, and those that
/// are blurred along themselves [`TOGETHER`].
#[cfg(target_arch = "x86_64")]
pub(super) const RING: usize = 16;

/// Values before the first line and behind the last one that vectors may read or write.
#[cfg(target_arch = "x86_64")]
pub(super) const ROOM: usize = 32;

/// The buffers between the passes.
#[cfg(target_arch = "x86_64")]
#[derive(Debug)]
pub(super) struct Rings<'a> {
    /// Lines of [`TOGETHER`] rows with [`RADIUS_MAX`] + 1 values more at both ends, twice; and [`ROOM`].
    pub(super) lines: [&'a mut [i16]; 2],
    /// Rows of `stride` values after the passes along rows, and after one and two along columns.
    pub(super) rings: [&'a mut [i16]; 3],
    /// At least the kept pixels of three lines, the last one's filled up to whole vectors.
    pub(super) stride: usize,
}

/// A padded line and a padded plane: what a pass reads.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    line: Vec<u8>,
    lines: Vec<u8>,
    /// For [`Rings`].
    #[cfg(target_arch = "x86_64")]
    words: Vec<i16>,
}

/// An extended box: weights in units of 2^-24.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Kernel {
    /// Pixels on either side with the full weight.
    pub(super) radius: usize,
    /// Weight of the centre and the full pixels.
    pub(super) full: u32,
    /// Weight of the pixel beyond them, on either side.
    pub(super) far: u32,
}

impl Kernel {
    /// The box whose threefold application has standard deviation `sigma`. In `f32`, step by step,
    /// because Pillow's is.
    pub(super) fn gaussian(sigma: f32) -> Kernel {
        let variance = sigma * sigma / PASSES as f32;
        let length = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
        let whole = ((f64::from(length) - 1.0) / 2.0).floor() as f32;
        let next = whole + 1.0;
        let mut part = (2.0 * whole + 1.0) * (whole * next - 3.0 * variance);
        part /= 6.0 * (variance - next * next);
        let radius = whole + part;
        let full = ((1u32 << 24) as f32 / (radius * 2.0 + 1.0)) as u32;
        let radius = radius as usize;
        let far = ((1 << 24) - (2 * radius as u32 + 1) * full) / 2;
        Kernel { radius, full, far }
    }
}

/// The blur radius: how many pixels around it a blurred pixel depends on, if there are loops for parts of a
/// picture.
pub(super) fn reach(sigma: f32) -> Option<usize> {
    let Kernel { radius, .. } = Kernel::gaussian(sigma);
    (radius <= RADIUS_MAX).then_some(PASSES * (radius + 1))
}

impl Scratch {
    /// Memory for up to three planes of lines of `width` pixels, of which `kept` go on to the passes
    /// along columns.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn rings(&mut self, width: usize, kept: usize) -> Rings<'_> {
        let stride = (2 * kept + kept.next_multiple_of(16)).next_multiple_of(16);
        let lines = TOGETHER * 3 * (width + 2 * (RADIUS_MAX + 1)) + 2 * ROOM;
        let ring = RING * stride;
        if self.words.len() < 2 * lines + 3 * ring {
            self.words.resize(2 * lines + 3 * ring, 0);
        }
        let (first, rest) = self.words.split_at_mut(lines);
        let (second, rest) = rest.split_at_mut(lines);
        let (along, rest) = rest.split_at_mut(ring);
        let (once, rest) = rest.split_at_mut(ring);
        Rings { lines: [first, second], rings: [along, once, &mut rest[..ring]], stride }
    }

    /// Blurs a picture in place. `sigma` in pixels.
    #[inline(always)]
    pub(super) fn gaussian(&mut self, view: &mut Planes, sigma: f32) {
        let kernel = Kernel::gaussian(sigma);
        let width = view.width();
        for plane in view.planes() {
            for line in plane.chunks_exact_mut(width) {
                for _ in 0..PASSES {
                    pad(line, 1, kernel.radius + 1, &mut self.line);
                    convolve(&self.line, 1, kernel, line);
                }
            }
            for _ in 0..PASSES {
                // Neighbours along a column are a row apart: the same sum over one long line.
                pad(plane, width, kernel.radius + 1, &mut self.lines);
                convolve(&self.lines, width, kernel, plane);
            }
        }
    }
}

/// Copies `line` with its first and last element (of `step` bytes) repeated `times` before and after.
#[inline(always)]
fn pad(line: &[u8], step: usize, times: usize, into: &mut Vec<u8>) {
    into.clear();
    for _ in 0..times {
        into.extend_from_slice(&line[..step]);
    }
    into.extend_from_slice(line);
    for _ in 0..times {
        into.extend_from_slice(&line[line.len() - step..]);
    }
}

/// One pass over a line padded by `radius + 1` elements of `step` bytes on either side.
#[inline(always)]
fn convolve(padded: &[u8], step: usize, kernel: Kernel, out: &mut [u8]) {
    let n = out.len();
    let Kernel { radius, full, far } = kernel;
    let tap = |k: usize| &padded[k * step..][..n];
    let (left, right) = (tap(0), tap(2 * radius + 2));
    // Up to RADIUS_MAX: three or five taps, no loop over them.
    match radius {
        0 => {
            let center = tap(1);
            for i in 0..n {
                out[i] = weigh(u32::from(center[i]), left[i], right[i], full, far);
            }
        }
        1 => {
            let (a, b, c) = (tap(1), tap(2), tap(3));
            for i in 0..n {
                let sum = u32::from(a[i]) + u32::from(b[i]) + u32::from(c[i]);
                out[i] = weigh(sum, left[i], right[i], full, far);
            }
        }
        _ => {
            for i in 0..n {
                let sum = (1..=2 * radius + 1).map(|k| u32::from(padded[k * step + i])).sum();
                out[i] = weigh(sum, left[i], right[i], full, far);
            }
        }
    }
}

#[inline(always)]
fn weigh(sum: u32, left: u8, right: u8, full: u32, far: u32) -> u8 {
    let ends = u32::from(left) + u32::from(right);
    // At most 255 * 2^24 + 2^23: the weights add up to 2^24.
    ((sum * full + ends * far + (1 << 23)) >> 24) as u8
}
