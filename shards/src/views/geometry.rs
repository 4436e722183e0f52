//! Crop, resize, interleave, mirror.
//!
//! While a view is worked on it is *row-planar*, `[side, 3, side]`: each row holds its red, then its
//! green, then its blue values. Neighbours along a row are adjacent, neighbours along a column a whole
//! row apart, and every loop runs over contiguous bytes of one meaning.

use super::plan::Rect;
use crate::decode::Image;

/// Bits after the point of a filter weight; Pillow's number, so that its sums are ours.
const WEIGHT_BITS: u32 = 22;
/// Half, at that precision: added once to a sum, it rounds.
const HALF: i32 = 1 << (WEIGHT_BITS - 1);

/// Rows that go through the horizontal filter together, four bytes of a pixel each: two vectors of
/// eight 32-bit sums.
const ROWS: usize = 4;

/// Memory of the resizer.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    columns: Axis,
    rows: Axis,
    /// Source rows side by side: for each column the pixels of [`ROWS`] rows.
    lines: Vec<[u8; 4 * ROWS]>,
    /// The crop after the horizontal pass, `[crop height, 3, side]`.
    narrow: Vec<u8>,
}

/// A filter along one axis: for each output pixel the inputs it covers and their weights.
#[derive(Debug, Default)]
struct Axis {
    /// First input pixel.
    starts: Vec<usize>,
    /// `[outputs, taps]`; zero beyond the inputs that are covered.
    weights: Vec<i32>,
    /// Inputs covered by each output: the widest of them.
    taps: usize,
    real: Vec<f64>,
}

impl Axis {
    /// A triangle as wide as the reduction (no narrower than for none), cut off at the edges.
    fn triangle(&mut self, inputs: usize, outputs: usize) {
        let scale = inputs as f64 / outputs as f64;
        let stretch = scale.max(1.0);
        let inverse = 1.0 / stretch;
        self.taps = (stretch.ceil() as usize * 2 + 1).min(inputs);
        self.starts.clear();
        self.weights.clear();
        for output in 0..outputs {
            let center = (output as f64 + 0.5) * scale;
            // The casts saturate at 0, where the filter would reach beyond the first input.
            let start = (center - stretch + 0.5) as usize;
            let end = ((center + stretch + 0.5) as usize).min(inputs);
            self.real.clear();
            self.real.extend((start..end).map(|input| {
                let distance = (input as f64 - center + 0.5) * inverse;
                (1.0 - distance.abs()).max(0.0)
            }));
            let sum: f64 = self.real.iter().sum();
            // Near the end the window is moved back, so that every output has all its taps.
            let moved = start - start.min(inputs - self.taps);
            self.starts.push(start - moved);
            let first = self.weights.len() + moved;
            self.weights.resize(self.weights.len() + self.taps, 0);
            let one = f64::from(1 << WEIGHT_BITS);
            for (weight, real) in self.weights[first..].iter_mut().zip(&self.real) {
                *weight = (0.5 + real / sum * one) as i32;
            }
        }
    }

    fn windows(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.starts.iter().copied().zip(self.weights.chunks_exact(self.taps))
    }
}

impl Scratch {
    /// Cuts `crop` out of `image` and resizes it to `side` x `side`, row-planar: along rows, then along
    /// columns, each rounded to 8 bits, as Pillow's `BILINEAR`. Pixels outside the box are not looked
    /// at, because torchvision crops first.
    #[inline(always)]
    pub(super) fn crop_resize(&mut self, image: &Image, crop: Rect, side: usize, out: &mut [u8]) {
        let [left, top, width, height] =
            [crop.left, crop.top, crop.width, crop.height].map(|length| length as usize);
        let stride = image.width as usize * 3;
        assert!(
            width > 0
                && height > 0
                && left + width <= image.width as usize
                && top + height <= image.height as usize,
            "{crop:?} in {}x{}",
            image.width,
            image.height
        );
        self.columns.triangle(width, side);
        self.rows.triangle(height, side);
        self.narrow.resize(height * 3 * side, 0);

        let source = |y: usize| {
            let row = &image.pixels[(top + y) * stride + left * 3..][..width * 3];
            row.as_chunks::<3>().0
        };
        for (y, narrow) in (0..height).step_by(ROWS).zip(self.narrow.chunks_mut(ROWS * 3 * side)) {
            // Beyond the last row stands the last row.
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| source((y + i).min(height - 1)));
            self.lines.clear();
            self.lines.extend(a.iter().zip(b).zip(c).zip(d).map(|(((a, b), c), d)| {
                [a[0], a[1], a[2], 0, b[0], b[1], b[2], 0, c[0], c[1], c[2], 0, d[0], d[1], d[2], 0]
            }));
            along_rows(&self.lines, &self.columns, side, narrow);
        }
        along_columns(&self.narrow, &self.rows, 3 * side, out);
    }
}

/// [`ROWS`] rows of pixels through the filter, into up to as many rows, row-planar.
#[inline(always)]
fn along_rows(lines: &[[u8; 4 * ROWS]], axis: &Axis, side: usize, out: &mut [u8]) {
    for (x, (start, weights)) in axis.windows().enumerate() {
        let mut sums = [HALF; 4 * ROWS];
        for (pixels, weight) in lines[start..].iter().zip(weights) {
            for lane in 0..4 * ROWS {
                sums[lane] += i32::from(pixels[lane]) * weight;
            }
        }
        let bytes = sums.map(|sum| (sum >> WEIGHT_BITS) as u8);
        for (row, pixel) in out.chunks_exact_mut(3 * side).zip(bytes.as_chunks::<4>().0) {
            for channel in 0..3 {
                row[channel * side + x] = pixel[channel];
            }
        }
    }
}

/// Rows of `stride` bytes through the filter, column by column.
#[inline(always)]
fn along_columns(rows: &[u8], axis: &Axis, stride: usize, out: &mut [u8]) {
    const LANES: usize = 32;
    for (out, (start, weights)) in out.chunks_exact_mut(stride).zip(axis.windows()) {
        let rows = &rows[start * stride..(start + weights.len()) * stride];
        let whole = stride / LANES * LANES;
        for x in (0..whole).step_by(LANES) {
            let mut sums = [HALF; LANES];
            for (row, weight) in rows.chunks_exact(stride).zip(weights) {
                for (sum, value) in sums.iter_mut().zip(&row[x..x + LANES]) {
                    *sum += i32::from(*value) * weight;
                }
            }
            for (out, sum) in out[x..x + LANES].iter_mut().zip(sums) {
                *out = (sum >> WEIGHT_BITS) as u8;
            }
        }
        for x in whole..stride {
            let products = rows.chunks_exact(stride).zip(weights);
            let sum: i32 = products.map(|(row, weight)| i32::from(row[x]) * weight).sum();
            out[x] = ((sum + HALF) >> WEIGHT_BITS) as u8;
        }
    }
}

/// Part of a row-planar row as interleaved RGB: `columns` of it, from left to right, or from right to
/// left where the row is `mirrored`; the columns are counted in the mirrored row.
#[inline(always)]
pub(super) fn interleave(
    row: &[u8],
    columns: std::ops::Range<usize>,
    mirrored: bool,
    out: &mut [u8],
) {
    let side = row.len() / 3;
    let (out, _) = out.as_chunks_mut::<3>();
    let (left, right) = if mirrored {
        (side - columns.end, side - columns.start)
    } else {
        (columns.start, columns.end)
    };
    let channel = |c: usize| &row[c * side..][left..right];
    let pixels = channel(0).iter().zip(channel(1)).zip(channel(2));
    if mirrored {
        for (to, ((r, g), b)) in out.iter_mut().rev().zip(pixels) {
            *to = [*r, *g, *b];
        }
    } else {
        for (to, ((r, g), b)) in out.iter_mut().zip(pixels) {
            *to = [*r, *g, *b];
        }
    }
}
