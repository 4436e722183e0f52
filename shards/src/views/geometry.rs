//! Crop, resize, interleaving and mirroring.

use super::Vectors;
use super::crop::Filter;
use super::plan::Rect;
use super::planes::Planes;
use crate::decode::Frame;

/// Bits after the point of a filter weight; Pillow's number, so that its sums are ours.
pub(super) const WEIGHT_BITS: u32 = 22;
/// Half, at that precision: added once to a sum, it rounds.
pub(super) const HALF: i32 = 1 << (WEIGHT_BITS - 1);

/// Rows that go through the horizontal filter together, a channel at a time: two vectors of eight
/// 32-bit sums, and no lane is idle.
pub(super) const ROWS: usize = 16;

/// A channel of a column of half of [`ROWS`] rows.
pub(super) type Column = [u8; ROWS / 2];

/// Planes between the two filters have a multiple of this many bytes, so that vectors need no remainder.
const PLANE: usize = 32;

/// Memory of the resizer.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    columns: Axis,
    rows: Axis,
    /// [`ROWS`] source rows side by side, `[3, 2, columns]`: neighbours along a row are a vector's two
    /// halves.
    lines: Vec<Column>,
    /// For [`Ring`]: rows `[3, side]`, the side rounded up to [`PLANE`].
    narrow: Vec<u8>,
}

/// A filter along one axis: for each output pixel the inputs it covers and their weights.
#[derive(Debug, Default)]
pub(super) struct Axis {
    /// What each output covers.
    centers: Vec<f64>,
    firsts: Vec<f64>,
    ends: Vec<f64>,
    /// Weights as they are computed, `[taps, outputs]`: from one output to the next the same is done.
    real: Vec<f64>,
    folded: Vec<f64>,
    sums: Vec<f64>,
    rounded: Vec<i32>,
    /// First input pixel that has a weight.
    starts: Vec<usize>,
    /// `[outputs, taps]`; zero beyond the inputs that are covered.
    weights: Vec<i32>,
    /// Pairs of the weights, split: `[outputs, taps / 2]`.
    pairs: Vec<Pair>,
    /// Weights of each output: the most inputs that one covers, rounded up to an even number. Where
    /// there are fewer inputs, the last weights are zero and belong to none.
    taps: usize,
}

/// Two neighbouring weights as 16-bit halves of 32 bits, the first one lower: products with 16 bits
/// are cheap, and a weight has 23.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    /// The weights' upper bits.
    pub(super) high: i32,
    /// Their lower [`SPLIT`] bits.
    pub(super) low: i32,
}

/// Lower bits of a weight in a [`Pair`]: 15 are left, and a sign.
pub(super) const SPLIT: u32 = 8;

impl Axis {
    /// A filter as wide as the reduction (no narrower than for none), cut off at the edges.
    ///
    /// Of a picture that was decoded at less than its size an input stands for `1 << bits` pixels,
    /// and `skipped` of the first one's lie before the box. Its weight is the sum of those of the
    /// pixels in the box: the filter stays where it was, and as wide.
    #[inline(always)]
    fn lay(
        &mut self,
        filter: Filter,
        pixels: usize,
        outputs: usize,
        (bits, skipped): (u32, usize),
    ) {
        let inputs = ((skipped + pixels - 1) >> bits) + 1;
        let scale = pixels as f64 / outputs as f64;
        let stretch = scale.max(1.0);
        let support = match filter {
            Filter::Bilinear => stretch,
            Filter::Bicubic => 2.0 * stretch,
        };
        let Axis { centers, firsts, ends, real, .. } = self;
        // Where the filter would reach beyond the first pixel or the last one, it ends there.
        let at = |place: f64| place.floor().clamp(0.0, pixels as f64);
        centers.clear();
        centers.extend((0..outputs as u32).map(|output| (f64::from(output) + 0.5) * scale));
        firsts.clear();
        firsts.extend(centers.iter().map(|center| at(center - support + 0.5)));
        ends.clear();
        ends.extend(centers.iter().map(|center| at(center + support + 0.5)));
        let covered = firsts.iter().zip(ends.iter()).map(|(first, end)| (end - first) as usize);
        let most = covered.max().unwrap_or(0);

        grow(real, most * outputs);
        let inverse = 1.0 / stretch;
        for (tap, real) in real.chunks_exact_mut(outputs).take(most).enumerate() {
            let spans = centers.iter().zip(firsts.iter()).zip(ends.iter());
            for (real, ((center, first), end)) in real.iter_mut().zip(spans) {
                let pixel = first + tap as f64;
                let distance = ((pixel - center + 0.5) * inverse).abs();
                let weight = match filter {
                    Filter::Bilinear => (1.0 - distance).max(0.0),
                    Filter::Bicubic => cubic(distance),
                };
                *real = if pixel < *end { weight } else { 0.0 };
            }
        }
        let most = if bits > 0 { self.fold(most, bits, skipped) } else { most };
        self.round(most, outputs);

        let input = |pixel: f64| (skipped + pixel as usize) >> bits;
        self.taps = most.next_multiple_of(2);
        self.starts.clear();
        self.weights.clear();
        self.weights.resize(outputs * self.taps, 0);
        let rows = self.weights.chunks_exact_mut(self.taps.max(1));
        let spans = self.firsts.iter().zip(&self.ends);
        for (output, ((first, end), weights)) in spans.zip(rows).enumerate() {
            let (start, count) = (input(*first), input(end - 1.0) + 1 - input(*first));
            // Near the end the window is moved back, so that its inputs exist.
            let moved = start.min(inputs.saturating_sub(self.taps));
            self.starts.push(moved);
            let rounded = self.rounded[output..].iter().step_by(outputs);
            for (weight, rounded) in weights[start - moved..][..count].iter_mut().zip(rounded) {
                *weight = *rounded;
            }
        }
        self.pairs.clear();
        self.pairs.extend(self.weights.as_chunks::<2>().0.iter().map(|[a, b]| Pair {
            high: (a >> SPLIT & 0xFFFF) | b >> SPLIT << 16,
            low: (a & 0xFF) | (b & 0xFF) << 16,
        }));
    }

    /// Adds up the weights of `taps` pixels an output by the inputs they lie in; returns the most inputs
    /// that an output covers.
    fn fold(&mut self, taps: usize, bits: u32, skipped: usize) -> usize {
        let outputs = self.centers.len();
        let input = |pixel: f64| (skipped + pixel as usize) >> bits;
        let spans = || self.firsts.iter().zip(&self.ends);
        let inputs = spans().map(|(first, end)| input(end - 1.0) + 1 - input(*first));
        let most = inputs.max().unwrap_or(0);
        self.folded.clear();
        self.folded.resize(most * outputs, 0.0);
        for (output, first) in self.firsts.iter().enumerate() {
            for tap in 0..taps {
                // What no pixel stands behind weighs nothing.
                let at = (input(first + tap as f64) - input(*first)).min(most - 1);
                self.folded[at * outputs + output] += self.real[tap * outputs + output];
            }
        }
        std::mem::swap(&mut self.real, &mut self.folded);
        most
    }

    /// Divides `taps` weights an output by their sum, and rounds them to [`WEIGHT_BITS`] bits.
    #[inline(always)]
    fn round(&mut self, taps: usize, outputs: usize) {
        let Axis { real, sums, rounded, .. } = self;
        sums.clear();
        sums.resize(outputs, 0.0);
        for real in real.chunks_exact(outputs).take(taps) {
            for (sum, real) in sums.iter_mut().zip(real) {
                *sum += real;
            }
        }
        grow(rounded, taps * outputs);
        let rows = rounded.chunks_exact_mut(outputs).zip(real.chunks_exact(outputs));
        for (rounded, real) in rows.take(taps) {
            for ((rounded, real), sum) in rounded.iter_mut().zip(real).zip(sums.iter()) {
                let half = if *real < 0.0 { -0.5 } else { 0.5 };
                *rounded = (half + real / sum * f64::from(1 << WEIGHT_BITS)) as i32;
            }
        }
    }

    /// Output pixels.
    #[inline(always)]
    pub(super) fn outputs(&self) -> usize {
        self.starts.len()
    }

    /// For each output the first input and the weights from there on.
    #[inline(always)]
    fn windows(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.starts.iter().copied().zip(self.weights.chunks_exact(self.taps.max(1)))
    }

    /// Pairs of weights of each output.
    #[inline(always)]
    pub(super) fn pairs_each(&self) -> usize {
        self.taps / 2
    }

    /// Weights of one output.
    #[inline(always)]
    fn weights_of(&self, output: usize) -> &[i32] {
        &self.weights[output * self.taps..][..self.taps]
    }

    /// Pairs of weights of one output.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn pairs_of(&self, output: usize) -> &[Pair] {
        &self.pairs[output * self.taps / 2..][..self.taps / 2]
    }

    /// [`Axis::windows`] by pairs.
    #[inline(always)]
    pub(super) fn pairs(&self) -> impl Iterator<Item = (usize, &[Pair])> {
        self.starts.iter().copied().zip(self.pairs.chunks_exact((self.taps / 2).max(1)))
    }
}

/// Pillow's cubic, of a distance of 0 or more.
#[inline(always)]
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

impl Scratch {
    /// Cuts `crop` out of `image` and resizes it to `across_to` x `down_to`: along rows, then along columns,
    /// each rounded to 8 bits, as Pillow's `BILINEAR` or `BICUBIC`. Pixels outside the box are not looked
    /// at, because torchvision crops first.
    #[inline(always)]
    pub(super) fn crop_resize(
        &mut self,
        frame: Frame<'_>,
        crop: Rect,
        (filter, [across_to, down_to]): (Filter, [usize; 2]),
        vectors: Vectors,
        out: &mut Planes,
    ) {
        out.reshape(across_to, down_to);
        let Frame { image, part } = frame;
        let inside = crop.width > 0 && crop.height > 0 && part.area.contains(&crop);
        assert!(inside, "{crop:?} in {part:?}");
        let bits = part.reduction.trailing_zeros();
        // From the frame's corner to the box's, which may lie within an input.
        let [x, y] = [crop.left - part.area.left, crop.top - part.area.top].map(|at| at as usize);
        let [left, top] = [x >> bits, y >> bits];
        let [columns, rows] = [crop.width, crop.height].map(|length| length as usize);
        let (width, height) =
            (((x + columns - 1) >> bits) + 1 - left, ((y + rows - 1) >> bits) + 1 - top);
        self.columns.lay(filter, columns, across_to, (bits, x - (left << bits)));
        self.rows.lay(filter, rows, down_to, (bits, y - (top << bits)));
        // One column more than there are: what a weight of zero may point at.
        grow(&mut self.lines, 6 * (width + 1));
        let lines = &mut self.lines[..6 * (width + 1)];
        let (plane, taps) = (across_to.next_multiple_of(PLANE), self.rows.taps);
        let stride = 3 * plane;
        let count = (taps + ROWS).next_power_of_two();
        grow(&mut self.narrow, count * stride);

        let source =
            |y: usize| &image.pixels[((top + y) * image.width as usize + left) * 3..][..width * 3];
        let mut done = 0;
        for y in 0..down_to {
            let start = self.rows.starts[y];
            while done < (start + taps).min(height) {
                // The last row is repeated as padding.
                let rows = std::array::from_fn(|i| source((done + i).min(height - 1)));
                let narrow = &mut self.narrow[done % count * stride..][..ROWS * stride];
                match vectors {
                    #[cfg(target_arch = "x86_64")]
                    Vectors::Avx2(avx2) => {
                        avx2.transpose(rows, lines);
                        avx2.horizontal_pass(lines, &self.columns, plane, narrow);
                    }
                    Vectors::Plain => {
                        transpose(rows, lines);
                        horizontal_pass(lines, &self.columns, plane, narrow);
                    }
                }
                done += ROWS;
            }
            let ring = Ring { bytes: &self.narrow[..count * stride], stride, mask: count - 1 };
            match vectors {
                #[cfg(target_arch = "x86_64")]
                Vectors::Avx2(avx2) => {
                    avx2.vertical_pass(ring, (start, self.rows.pairs_of(y)), plane, out.row_on(y))
                }
                Vectors::Plain => {
                    let row = out.row_on(y).map(|row| &mut row[..across_to]);
                    vertical_pass(ring, (start, self.rows.weights_of(y)), plane, row);
                }
            }
        }
    }
}

/// The newest rows of a crop after the horizontal pass, so few that they stay in the nearest cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ring<'a> {
    bytes: &'a [u8],
    /// Bytes of a row.
    stride: usize,
    /// Number of rows, a power of two, less one.
    mask: usize,
}

impl<'a> Ring<'a> {
    #[inline(always)]
    pub(super) fn row(self, y: usize) -> &'a [u8] {
        &self.bytes[(y & self.mask) * self.stride..][..self.stride]
    }

    /// A row by vectors: planes are whole ones.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn lanes(self, y: usize) -> &'a [[u8; PLANE]] {
        self.row(y).as_chunks().0
    }
}

/// Makes scratch memory at least this long. It never shrinks: filling it anew would cost more.
fn grow<T: Copy + Default>(scratch: &mut Vec<T>, len: usize) {
    if scratch.len() < len {
        scratch.resize(len, T::default());
    }
}

/// Rows of interleaved RGB side by side, `[3, 2, columns]`, where there may be more columns than pixels.
#[inline(always)]
pub(super) fn transpose(rows: [&[u8]; ROWS], lines: &mut [Column]) {
    let columns = lines.len() / 6;
    for (row, from) in rows.into_iter().enumerate() {
        let [half, row] = [row / (ROWS / 2), row % (ROWS / 2)];
        for (x, pixel) in from.as_chunks::<3>().0.iter().enumerate() {
            for (channel, value) in pixel.iter().enumerate() {
                lines[(2 * channel + half) * columns + x][row] = *value;
            }
        }
    }
}

/// [`ROWS`] rows of pixels, as [`transpose`] lays them, through the filter, into as many rows of three planes
/// of `plane` bytes.
#[inline(always)]
fn horizontal_pass(lines: &[Column], axis: &Axis, plane: usize, out: &mut [u8]) {
    for (x, (start, weights)) in axis.windows().enumerate() {
        for (i, columns) in lines.chunks_exact(lines.len() / 6).enumerate() {
            let (channel, half) = (i / 2, i % 2);
            let mut sums = [HALF; ROWS / 2];
            for (values, weight) in columns[start..].iter().zip(weights) {
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += i32::from(*value) * weight;
                }
            }
            let rows = out.chunks_exact_mut(3 * plane).skip(half * sums.len());
            for (row, sum) in rows.zip(sums) {
                row[channel * plane + x] = (sum >> WEIGHT_BITS).clamp(0, 255) as u8;
            }
        }
    }
}

/// Rows of three planes of `plane` bytes, from `start` on, through the filter into one row.
#[inline(always)]
fn vertical_pass(
    rows: Ring<'_>,
    (start, weights): (usize, &[i32]),
    plane: usize,
    out: [&mut [u8]; 3],
) {
    for (channel, out) in out.into_iter().enumerate() {
        for (x, out) in out.chunks_mut(PLANE).enumerate() {
            let mut sums = [HALF; PLANE];
            for (i, weight) in weights.iter().enumerate() {
                let row = &rows.row(start + i)[channel * plane + x * PLANE..][..PLANE];
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += i32::from(*value) * weight;
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = (sum >> WEIGHT_BITS).clamp(0, 255) as u8;
            }
        }
    }
}

/// Exchanges left and right.
pub(super) fn mirror(view: &mut Planes) {
    let width = view.width();
    for plane in view.planes() {
        plane.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
}

/// A row as interleaved RGB, from left to right, or from right to left where it is `mirrored`.
#[inline(always)]
pub(super) fn interleave([r, g, b]: [&[u8]; 3], mirrored: bool, vectors: Vectors, out: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if let Vectors::Avx2(avx2) = vectors
        && r.len() >= 16
    {
        return avx2.interleave([r, g, b], mirrored, out);
    }
    let (out, _) = out.as_chunks_mut::<3>();
    let pixels = r.iter().zip(g).zip(b);
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
