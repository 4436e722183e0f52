//! The operations of DetCo's views for CPUs with AVX2.
//!
//! Each gives the same bytes as the plain function in [`super::geometry`], [`super::color`] or
//! [`super::blur`], where it is explained. The tests compare the two.
//!
//! `u8` lanes are widened to 32 bits for products of 22-bit weights and for `f32`, and come back through
//! the saturating packs, which clamp to 0..=255 for free.

#![expect(
    unsafe_code,
    reason = "vector instructions: found by asking the CPU, loads from references"
)]

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::*;

use super::blur::{Kernel, PASSES, RADIUS_MAX, RING, ROOM, Rings, TOGETHER};
use super::color;
use super::geometry::{Axis, Column, HALF, Pair, ROWS, Ring, SPLIT, WEIGHT_BITS};
use super::plan::Op;
use super::planes::Planes;

/// Proof that this CPU has AVX2 and FMA, as all have since 2015.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(());

/// Columns of the horizontal pass that are brought into planes together.
const BLOCK: usize = 16;

/// Bytes of a vector.
const LANES: usize = 32;

/// 16-bit values of a vector.
const WORDS: usize = 16;

/// Values of a line that a vector of a blurred line is made of, or more.
const WINDOW: usize = WORDS + 2 * (RADIUS_MAX + 1);

impl Avx2 {
    /// The proof, where the CPU has it.
    pub(super) fn detect() -> Option<Avx2> {
        let has = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        has.then_some(Avx2(()))
    }

    /// Applies `op` to a picture, or returns false if the operation is not implemented here. A blur covers the box
    /// `within`, `[left, top, width, height]`; pixels within the blur radius outside of it are clobbered.
    #[inline(always)]
    pub(super) fn apply(
        self,
        op: &Op,
        within: [usize; 4],
        view: &mut Planes,
        scratch: &mut super::blur::Scratch,
    ) -> bool {
        match *op {
            Op::Brightness(factor) => self.blend_flat(view, 0, factor),
            Op::Contrast(factor) => {
                let mean = self.mean(view);
                self.blend_flat(view, mean, factor);
            }
            Op::Saturation(factor) => {
                view.spread();
                // SAFETY: the CPU has AVX2: `self` proves it. So below.
                unsafe { saturation(view, factor) }
            }
            Op::Hue(turns) => self.hue(view, color::shift(turns)),
            Op::Gray if view.is_gray() => {} // gray's luma is itself
            // SAFETY: as above.
            Op::Gray => unsafe { gray(view) },
            Op::Blur(sigma) => {
                let kernel = Kernel::gaussian(sigma);
                if kernel.radius > RADIUS_MAX {
                    return false;
                }
                // SAFETY: as above.
                unsafe { gaussian(view, kernel, within, scratch) };
            }
            _ => return false,
        }
        true
    }

    /// As `color::mean` of a picture's luma.
    #[inline(always)]
    pub(super) fn mean(self, view: &mut Planes) -> u8 {
        view.spread();
        // SAFETY: the CPU has AVX2: `self` proves it.
        let sum = unsafe { luma_sum(view) };
        color::mean(sum, view.pixels())
    }

    /// As `color::brightness`, and as the second half of `color::contrast`.
    #[inline(always)]
    pub(super) fn blend_flat(self, view: &mut Planes, from: u8, factor: f32) {
        let planes = if view.is_gray() { 1 } else { 3 };
        for plane in view.padded().into_iter().take(planes) {
            // SAFETY: the CPU has AVX2: `self` proves it.
            unsafe { blend_flat(plane, from, factor) }
        }
    }

    /// As `color::hue`, by a shift of 8 bits.
    #[inline(always)]
    pub(super) fn hue(self, view: &mut Planes, shift: u8) {
        view.spread();
        // SAFETY: the CPU has AVX2 and FMA: `self` proves it.
        unsafe { hue(view, shift) }
    }

    /// As `geometry::transpose`.
    #[inline(always)]
    pub(super) fn transpose(self, rows: [&[u8]; ROWS], lines: &mut [Column]) {
        // SAFETY: the CPU has AVX2: `self` proves it.
        unsafe { transpose(rows, lines) }
    }

    /// As `geometry::horizontal_pass`.
    #[inline(always)]
    pub(super) fn horizontal_pass(
        self,
        lines: &[Column],
        axis: &Axis,
        plane: usize,
        out: &mut [u8],
    ) {
        // SAFETY: the CPU has AVX2: `self` proves it.
        unsafe { horizontal_pass(lines, axis, plane, out) }
    }

    /// As `geometry::vertical_pass`, but for the room behind each of `out`, of which whole vectors are written.
    #[inline(always)]
    pub(super) fn vertical_pass(
        self,
        rows: Ring<'_>,
        (start, pairs): (usize, &[Pair]),
        plane: usize,
        out: [&mut [u8]; 3],
    ) {
        // SAFETY: the CPU has AVX2: `self` proves it.
        unsafe { across_rows(rows, start, pairs, plane, out) }
    }

    /// As `geometry::interleave`, of at least 16 columns.
    #[inline(always)]
    pub(super) fn interleave(self, planes: [&[u8]; 3], mirrored: bool, out: &mut [u8]) {
        // SAFETY: the CPU has AVX2: `self` proves it.
        unsafe { interleave(planes, mirrored, out) }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load32(from: &[u8; 32]) -> __m256i {
    // SAFETY: reads the 32 bytes that are borrowed; no alignment is asked for.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load16(from: &[u8; 16]) -> __m128i {
    // SAFETY: reads the 16 bytes that are borrowed; no alignment is asked for.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store32(to: &mut [u8; 32], value: __m256i) {
    // SAFETY: writes the 32 bytes that are borrowed; no alignment is asked for.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), value) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store16(to: &mut [u8; 16], value: __m128i) {
    // SAFETY: writes the 16 bytes that are borrowed; no alignment is asked for.
    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), value) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_columns(from: &[Column; 2]) -> __m128i {
    // SAFETY: reads the 16 bytes that are borrowed; no alignment is asked for.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}

/// The lower half.
#[inline]
#[target_feature(enable = "avx2")]
fn store8(to: &mut [u8; 8], value: __m128i) {
    // SAFETY: writes the 8 bytes that are borrowed; no alignment is asked for.
    unsafe { _mm_storel_epi64(to.as_mut_ptr().cast(), value) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_words(from: &[i16; WORDS]) -> __m256i {
    // SAFETY: reads the 32 bytes that are borrowed; no alignment is asked for.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_words(to: &mut [i16; WORDS], value: __m256i) {
    // SAFETY: writes the 32 bytes that are borrowed; no alignment is asked for.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), value) }
}

/// Eight bytes as 32-bit integers.
#[inline]
#[target_feature(enable = "avx2")]
fn widen8(from: &[u8; 8]) -> __m256i {
    _mm256_cvtepu8_epi32(_mm_set_epi64x(0, i64::from_le_bytes(*from)))
}

/// Four vectors of 32-bit integers as bytes in their order, clamped to 0..=255.
#[inline]
#[target_feature(enable = "avx2")]
fn narrow32([a, b, c, d]: [__m256i; 4]) -> __m256i {
    let (low, high) = (_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    let mixed = _mm256_packus_epi16(low, high);
    _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

/// The parts of 32 bytes that are widened one by one.
#[inline]
fn eights(from: &[u8; LANES]) -> [&[u8; 8]; 4] {
    let (parts, _) = from.as_chunks::<8>();
    [&parts[0], &parts[1], &parts[2], &parts[3]]
}

// ---- geometry

/// Sixteen rows, side by side: blocks of 16 x 16 bytes are transposed, three for 16 pixels.
#[target_feature(enable = "avx2")]
fn transpose(rows: [&[u8]; ROWS], lines: &mut [Column]) {
    let width = rows[0].len() / 3;
    if width < BLOCK {
        return super::geometry::transpose(rows, lines);
    }
    let rows = rows.map(|row| &row[..3 * width]);
    let columns = lines.len() / 6;
    // The last pixels overlap those before them.
    let starts = (0..width / BLOCK)
        .map(|i| BLOCK * i)
        .chain((!width.is_multiple_of(BLOCK)).then(|| width - BLOCK));
    let mut planes = lines.chunks_exact_mut(columns);
    let [a, b, c, d, e, f]: [_; 6] = std::array::from_fn(|_| planes.next().unwrap_or_default());
    for start in starts {
        let mut planes = [
            block(a, start),
            block(b, start),
            block(c, start),
            block(d, start),
            block(e, start),
            block(f, start),
        ];
        gather_block::<0>(&rows, start, &mut planes);
        gather_block::<1>(&rows, start, &mut planes);
        gather_block::<2>(&rows, start, &mut planes);
    }
}

#[inline]
fn block(plane: &mut [Column], start: usize) -> &mut [Column; BLOCK] {
    plane[start..].first_chunk_mut().expect("blocks end where the line does, or before")
}

/// One of the three blocks of the pixels from `start` on.
#[inline]
#[target_feature(enable = "avx2")]
fn gather_block<const PART: usize>(
    rows: &[&[u8]; ROWS],
    start: usize,
    planes: &mut [&mut [Column; BLOCK]; 6],
) {
    let at = 3 * start + 16 * PART;
    let mut pairs = [_mm256_setzero_si256(); 8];
    for (row, pair) in pairs.iter_mut().enumerate() {
        if let (Some(a), Some(b)) =
            (rows[row][at..].first_chunk(), rows[row + 8][at..].first_chunk())
        {
            *pair = _mm256_set_m128i(load16(b), load16(a));
        }
    }
    // Two bytes of a row each: of the first eight rows in one half, of the others in the other.
    for (i, two) in shuffle(shuffle(shuffle(pairs))).into_iter().enumerate() {
        let [first, second] = [16 * PART + 2 * i, 16 * PART + 2 * i + 1];
        let halves = [_mm256_castsi256_si128(two), _mm256_extracti128_si256::<1>(two)];
        for (half, bytes) in halves.into_iter().enumerate() {
            store8(&mut planes[2 * (first % 3) + half][first / 3], bytes);
            store8(
                &mut planes[2 * (second % 3) + half][second / 3],
                _mm_unpackhi_epi64(bytes, bytes),
            );
        }
    }
}

/// In each half a perfect shuffle of its 128 bytes: 0, 64, 1, 65, ... One of the seven bits of a byte's
/// place moves from the highest to the lowest, so that after three of them the halves, as matrices of
/// eight rows of 16 bytes, are transposed; and after four, as matrices of 16 rows of eight.
#[inline]
#[target_feature(enable = "avx2")]
fn shuffle([a, b, c, d, e, f, g, h]: [__m256i; 8]) -> [__m256i; 8] {
    [
        _mm256_unpacklo_epi8(a, e),
        _mm256_unpackhi_epi8(a, e),
        _mm256_unpacklo_epi8(b, f),
        _mm256_unpackhi_epi8(b, f),
        _mm256_unpacklo_epi8(c, g),
        _mm256_unpackhi_epi8(c, g),
        _mm256_unpacklo_epi8(d, h),
        _mm256_unpackhi_epi8(d, h),
    ]
}

/// Rows of `3 * plane` bytes come out; `plane` is a multiple of [`LANES`].
#[target_feature(enable = "avx2")]
fn horizontal_pass(lines: &[Column], axis: &Axis, plane: usize, out: &mut [u8]) {
    // Reductions by less than three need no loop over the weights.
    match axis.pairs_each() {
        1 => along_rows_by::<1>(lines, axis, plane, out),
        2 => along_rows_by::<2>(lines, axis, plane, out),
        3 => along_rows_by::<3>(lines, axis, plane, out),
        _ => along_rows_by::<0>(lines, axis, plane, out),
    }
}

/// With this many pairs of weights each; 0 for any number.
#[inline]
#[target_feature(enable = "avx2")]
fn along_rows_by<const PAIRS: usize>(lines: &[Column], axis: &Axis, plane: usize, out: &mut [u8]) {
    let columns = lines.len() / 6;
    let mut windows = axis.pairs();
    let mut sums = [[_mm256_setzero_si256(); BLOCK]; 3];
    for first in (0..axis.outputs()).step_by(BLOCK) {
        for (x, (start, pairs)) in windows.by_ref().take(BLOCK).enumerate() {
            let pairs = if PAIRS == 0 { pairs } else { &pairs[..PAIRS] };
            for (channel, sums) in sums.iter_mut().enumerate() {
                let at = 2 * channel * columns + start;
                let (upper, _) = lines[at..][..2 * pairs.len()].as_chunks();
                let (lower, _) = lines[at + columns..][..2 * pairs.len()].as_chunks();
                sums[x] = weighted_columns(upper, lower, pairs);
            }
        }
        for (channel, sums) in sums.iter().enumerate() {
            for (row, halves) in rows_of(sums).into_iter().enumerate() {
                for (half, value) in halves.into_iter().enumerate() {
                    let at = (3 * (row + half * ROWS / 2) + channel) * plane + first;
                    if let Some(to) = out[at..].first_chunk_mut() {
                        store16(to, value);
                    }
                }
            }
        }
    }
}

/// Sixteen rows' weighted sum of a channel of some columns, by pairs of columns, as 16-bit values.
#[inline]
#[target_feature(enable = "avx2")]
fn weighted_columns(upper: &[[Column; 2]], lower: &[[Column; 2]], pairs: &[Pair]) -> __m256i {
    // Of both columns' eight bytes the first four in turn, as 16-bit values; then the others.
    const TURNS: [[u8; LANES]; 2] = [in_turn(0), in_turn(4)];
    let turns = [load32(&TURNS[0]), load32(&TURNS[1])];
    let half = _mm256_set1_epi32(HALF);
    let (mut high, mut low) = ([_mm256_setzero_si256(); 2], [half; 2]);
    for ((upper, lower), pair) in upper.iter().zip(lower).zip(pairs) {
        let columns = _mm256_set_m128i(load_columns(lower), load_columns(upper));
        let (w_high, w_low) = (_mm256_set1_epi32(pair.high), _mm256_set1_epi32(pair.low));
        for (i, turns) in turns.into_iter().enumerate() {
            let values = _mm256_shuffle_epi8(columns, turns);
            high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(values, w_high));
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(values, w_low));
        }
    }
    _mm256_packs_epi32(rounded(high[0], low[0]), rounded(high[1], low[1]))
}

/// For a shuffle: of eight bytes and those after them, four from `first` on in turn, each with a zero behind.
const fn in_turn(first: u8) -> [u8; LANES] {
    let mut turns = [u8::MAX; LANES];
    let mut at = 0;
    while at < LANES {
        let [pair, second] = [(at % 16 / 4) as u8, (at % 4 / 2) as u8];
        turns[at] = first + pair + 8 * second;
        at += 2;
    }
    turns
}

/// A sum of products with split weights, of which the lower one holds [`HALF`] already.
#[inline]
#[target_feature(enable = "avx2")]
fn rounded(high: __m256i, low: __m256i) -> __m256i {
    let sum = _mm256_add_epi32(high, _mm256_srli_epi32::<{ SPLIT as i32 }>(low));
    // Signed: a cubic's sums may be below 0.
    _mm256_srai_epi32::<{ (WEIGHT_BITS - SPLIT) as i32 }>(sum)
}

/// Sixteen columns of sixteen rows as rows: the first with the ninth, and so on.
#[inline]
#[target_feature(enable = "avx2")]
fn rows_of(columns: &[__m256i; BLOCK]) -> [[__m128i; 2]; 8] {
    let (twos, _) = columns.as_chunks::<2>();
    let mut bytes = [_mm256_setzero_si256(); 8];
    for (bytes, [a, b]) in bytes.iter_mut().zip(twos) {
        *bytes = _mm256_packus_epi16(*a, *b);
    }
    shuffle(shuffle(shuffle(shuffle(bytes))))
        .map(|two| [_mm256_castsi256_si128(two), _mm256_extracti128_si256::<1>(two)])
}

#[target_feature(enable = "avx2")]
fn across_rows(rows: Ring<'_>, start: usize, pairs: &[Pair], plane: usize, out: [&mut [u8]; 3]) {
    match pairs {
        [a] => across_rows_by(rows, start, &[*a], plane, out),
        [a, b] => across_rows_by(rows, start, &[*a, *b], plane, out),
        [a, b, c] => across_rows_by(rows, start, &[*a, *b, *c], plane, out),
        _ => {
            for (channel, out) in out.into_iter().enumerate() {
                for (i, to) in out[..plane].as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                    let at = channel * plane / LANES + i;
                    let mut sums = Sums::new();
                    for (i, pair) in pairs.iter().enumerate() {
                        let y = start + 2 * i;
                        sums.add(&rows.lanes(y)[at], &rows.lanes(y + 1)[at], *pair);
                    }
                    store32(to, sums.bytes());
                }
            }
        }
    }
}

/// With a number of pairs that the compiler knows: the rows are looked up once.
#[inline]
#[target_feature(enable = "avx2")]
fn across_rows_by<const PAIRS: usize>(
    rows: Ring<'_>,
    start: usize,
    pairs: &[Pair; PAIRS],
    plane: usize,
    out: [&mut [u8]; 3],
) {
    let mut taps: [[&[[u8; LANES]]; 2]; PAIRS] = [[&[]; 2]; PAIRS];
    for (i, tap) in taps.iter_mut().enumerate() {
        for (row, tap) in tap.iter_mut().enumerate() {
            *tap = &rows.lanes(start + 2 * i + row)[..3 * plane / LANES];
        }
    }
    let mut at = 0;
    for out in out {
        for to in out[..plane].as_chunks_mut::<LANES>().0 {
            let mut sums = Sums::new();
            for i in 0..PAIRS {
                sums.add(&taps[i][0][at], &taps[i][1][at], pairs[i]);
            }
            store32(to, sums.bytes());
            at += 1;
        }
    }
}

/// The filter over 32 columns: sums of products with the weights' upper and lower bits.
struct Sums {
    high: [__m256i; 4],
    low: [__m256i; 4],
}

impl Sums {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new() -> Sums {
        Sums { high: [_mm256_setzero_si256(); 4], low: [_mm256_set1_epi32(HALF); 4] }
    }

    /// Adds a pair of rows.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn add(&mut self, a: &[u8; LANES], b: &[u8; LANES], pair: Pair) {
        let zero = _mm256_setzero_si256();
        let (a, b) = (load32(a), load32(b));
        let (left, right) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
        let values = [
            _mm256_unpacklo_epi8(left, zero),
            _mm256_unpackhi_epi8(left, zero),
            _mm256_unpacklo_epi8(right, zero),
            _mm256_unpackhi_epi8(right, zero),
        ];
        let (w_high, w_low) = (_mm256_set1_epi32(pair.high), _mm256_set1_epi32(pair.low));
        for (i, values) in values.into_iter().enumerate() {
            self.high[i] = _mm256_add_epi32(self.high[i], _mm256_madd_epi16(values, w_high));
            self.low[i] = _mm256_add_epi32(self.low[i], _mm256_madd_epi16(values, w_low));
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn bytes(self) -> __m256i {
        let Sums { high, low } = self;
        let left = _mm256_packs_epi32(rounded(high[0], low[0]), rounded(high[1], low[1]));
        let right = _mm256_packs_epi32(rounded(high[2], low[2]), rounded(high[3], low[3]));
        _mm256_packus_epi16(left, right)
    }
}

#[target_feature(enable = "avx2")]
fn interleave(planes: [&[u8]; 3], mirrored: bool, out: &mut [u8]) {
    // Where the three bytes of a store come from: red, green, blue; 255 takes nothing.
    const SPREAD: [[[u8; 16]; 3]; 3] = {
        let mut masks = [[[u8::MAX; 16]; 3]; 3];
        let mut byte = 0;
        while byte < 48 {
            masks[byte / 16][byte % 3][byte % 16] = (byte / 3) as u8;
            byte += 1;
        }
        masks
    };
    let columns = planes[0].len();
    let planes = planes.map(|plane| &plane[..columns]);
    let turn = _mm_setr_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    let mut masks = [[_mm_setzero_si128(); 3]; 3];
    for (masks, spread) in masks.iter_mut().flatten().zip(SPREAD.as_flattened()) {
        *masks = load16(spread);
    }
    // The last block overlaps the one before it.
    let starts = (0..columns / 16)
        .map(|i| 16 * i)
        .chain((!columns.is_multiple_of(16)).then(|| columns - 16));
    for start in starts {
        let mut three = [_mm_setzero_si128(); 3];
        for (value, plane) in three.iter_mut().zip(planes) {
            if let Some(bytes) = plane[start..].first_chunk() {
                let bytes = load16(bytes);
                *value = if mirrored { _mm_shuffle_epi8(bytes, turn) } else { bytes };
            }
        }
        let to = if mirrored { columns - 16 - start } else { start };
        let (stores, _) = out[3 * to..3 * to + 48].as_chunks_mut::<16>();
        for (to, [r, g, b]) in stores.iter_mut().zip(&masks) {
            let red_green =
                _mm_or_si128(_mm_shuffle_epi8(three[0], *r), _mm_shuffle_epi8(three[1], *g));
            store16(to, _mm_or_si128(red_green, _mm_shuffle_epi8(three[2], *b)));
        }
    }
}

// ---- colour

#[target_feature(enable = "avx2")]
fn blend_flat(plane: &mut [u8], from: u8, factor: f32) {
    let flat = _mm256_set1_ps(f32::from(from));
    let by = _mm256_set1_ps(factor);
    for chunk in plane.as_chunks_mut::<LANES>().0 {
        let blended = eights(chunk).map(|part| {
            let value = _mm256_cvtepi32_ps(widen8(part));
            blend(flat, value, by)
        });
        store32(chunk, narrow32(blended));
    }
}

/// `from` at factor 0, `to` at factor 1, truncated; clamped by the caller's packs.
#[inline]
#[target_feature(enable = "avx2")]
fn blend(from: __m256, to: __m256, factor: __m256) -> __m256i {
    let part = _mm256_mul_ps(factor, _mm256_sub_ps(to, from));
    _mm256_cvttps_epi32(_mm256_add_ps(from, part))
}

/// Luma of 32 pixels: of each half the first four of its [`words`], then the others.
#[inline]
#[target_feature(enable = "avx2")]
fn lumas([r, g, b]: [[__m256i; 2]; 3]) -> [__m256i; 4] {
    // Green's weight is more than 16 bits with a sign: half of it, twice.
    let pair = |a: i32, b: i32| _mm256_set1_epi32(a | b << 16);
    let (red_green, blue_green) = (pair(19595, 38470 / 2), pair(7471, 38470 / 2));
    let half = _mm256_set1_epi32(32768);
    let mut lumas = [half; 4];
    for i in 0..2 {
        let red = [_mm256_unpacklo_epi16(r[i], g[i]), _mm256_unpackhi_epi16(r[i], g[i])];
        let blue = [_mm256_unpacklo_epi16(b[i], g[i]), _mm256_unpackhi_epi16(b[i], g[i])];
        for j in 0..2 {
            let luma = _mm256_madd_epi16(red[j], red_green);
            let luma = _mm256_add_epi32(luma, _mm256_madd_epi16(blue[j], blue_green));
            lumas[2 * i + j] = _mm256_srli_epi32::<16>(_mm256_add_epi32(luma, half));
        }
    }
    lumas
}

/// Vectors of 32-bit integers, as [`words`] and [`longs`] of them were made, as bytes, clamped to 0..=255.
#[inline]
#[target_feature(enable = "avx2")]
fn bytes([a, b, c, d]: [__m256i; 4]) -> __m256i {
    _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d))
}

/// `op` on all pixels, and on what lies behind them.
#[inline(always)]
fn for_pixels(view: &mut Planes, op: impl Fn([&mut [u8; LANES]; 3])) {
    let [r, g, b] = view.padded().map(|plane| plane.as_chunks_mut::<LANES>().0);
    for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
        op([r, g, b]);
    }
}

/// Sum of the luma of all pixels.
#[target_feature(enable = "avx2")]
fn luma_sum(view: &mut Planes) -> u64 {
    // So many values of at most 255 a lane.
    const PART: usize = 1 << 20;
    let [red, green, blue] = view.planes();
    let mut total = 0;
    for ((r, g), b) in red.chunks(PART).zip(green.chunks(PART)).zip(blue.chunks(PART)) {
        let mut sum = _mm256_setzero_si256();
        let [(r32, r), (g32, g), (b32, b)] = [r, g, b].map(<[u8]>::as_chunks::<LANES>);
        for ((r, g), b) in r32.iter().zip(g32).zip(b32) {
            let [a, b, c, d] = lumas([words(load32(r)), words(load32(g)), words(load32(b))]);
            let four = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
            sum = _mm256_add_epi32(sum, four);
        }
        let mut lanes = [0; LANES];
        store32(&mut lanes, sum);
        let lanes = lanes.as_chunks::<4>().0.iter();
        total += lanes.map(|lane| u64::from(u32::from_le_bytes(*lane))).sum::<u64>();
        total += color::luma_sum(r, g, b);
    }
    total
}

#[target_feature(enable = "avx2")]
fn saturation(view: &mut Planes, factor: f32) {
    let by = _mm256_set1_ps(factor);
    for_pixels(view, |planes| {
        let [r, g, b] = &planes;
        let pixels = [words(load32(r)), words(load32(g)), words(load32(b))];
        let grays = lumas(pixels);
        for (plane, words) in planes.into_iter().zip(pixels) {
            let mut blended = grays;
            for i in 0..2 {
                let values = floats_of(words[i]);
                for j in 0..2 {
                    let gray = _mm256_cvtepi32_ps(grays[2 * i + j]);
                    blended[2 * i + j] = blend(gray, values[j], by);
                }
            }
            store32(plane, bytes(blended));
        }
    });
}

/// Into the first plane, which then stands for all.
#[target_feature(enable = "avx2")]
fn gray(view: &mut Planes) {
    for_pixels(view, |[red, green, blue]| {
        let lumas = lumas([words(load32(red)), words(load32(green)), words(load32(blue))]);
        store32(red, bytes(lumas));
    });
    view.set_gray();
}

#[target_feature(enable = "avx2,fma")]
fn hue(view: &mut Planes, shift: u8) {
    for_pixels(view, |[r, g, b]| {
        let [red, green, blue] = turn([load32(r), load32(g), load32(b)], shift);
        store32(r, red);
        store32(g, green);
        store32(b, blue);
    });
}

/// As `color::turn`, of 32 pixels: hue and saturation in `f32`, eight pixels at a time, the way back in
/// 16-bit integers, and the choice of channels in bytes.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn turn([r, g, b]: [__m256i; 3], shift: u8) -> [__m256i; 3] {
    let (above, below) = (_mm256_max_epu8(r, g), _mm256_min_epu8(r, g));
    let most = _mm256_max_epu8(above, b);
    let least = _mm256_min_epu8(below, b);
    let middle = _mm256_max_epu8(below, _mm256_min_epu8(above, b));
    let not_above = |a, b| _mm256_cmpeq_epi8(_mm256_min_epu8(a, b), a);
    let (red, green) = (_mm256_cmpeq_epi8(r, most), _mm256_cmpeq_epi8(g, most));
    let (bg, br, rg) = (not_above(b, g), not_above(b, r), not_above(r, g));
    // The hue in sixths of a turn is 2 * `place` - 1 plus or minus (most - middle) / range.
    let pick = |mask, yes: i8, no: i8| {
        _mm256_blendv_epi8(_mm256_set1_epi8(no), _mm256_set1_epi8(yes), mask)
    };
    let place = _mm256_blendv_epi8(pick(rg, 2, 3), pick(br, 1, 2), green);
    let place = _mm256_blendv_epi8(place, pick(bg, 1, 0), red);
    let rises = _mm256_blendv_epi8(rg, br, green);
    let falls = _mm256_blendv_epi8(pick(rises, 0, -128), bg, red);
    let falls = _mm256_and_si256(falls, _mm256_set1_epi8(-128));

    let zero = _mm256_setzero_si256();
    let gaps = words(_mm256_sub_epi8(most, middle));
    let ranges = words(_mm256_sub_epi8(most, least));
    let (mosts, places) = (words(most), words(place));
    // As the highest byte of 32 bits: their sign.
    let signs = [_mm256_unpacklo_epi8(zero, falls), _mm256_unpackhi_epi8(zero, falls)];
    let mut back = [[zero; 3]; 2];
    for half in 0..2 {
        let (gaps, ranges, values) =
            (floats_of(gaps[half]), floats_of(ranges[half]), floats_of(mosts[half]));
        let places = longs(places[half]);
        let signs =
            [_mm256_unpacklo_epi16(zero, signs[half]), _mm256_unpackhi_epi16(zero, signs[half])];
        let hue = _mm256_packs_epi32(
            hue_of(gaps[0], ranges[0], places[0], signs[0]),
            hue_of(gaps[1], ranges[1], places[1], signs[1]),
        );
        let hue = _mm256_add_epi16(hue, _mm256_set1_epi16(i16::from(shift)));
        let saturation = _mm256_packs_epi32(
            saturation_of(ranges[0], values[0]),
            saturation_of(ranges[1], values[1]),
        );
        back[half] = from_hue(hue, saturation, mosts[half], values);
    }
    let [first, second] = back;
    let sector = _mm256_packus_epi16(first[0], second[0]);
    let low = _mm256_packus_epi16(first[1], second[1]);
    let middle = _mm256_packus_epi16(first[2], second[2]);
    // By sector, of which 6 is 0: where a channel is the highest, and where the lowest.
    const Y: u8 = 255;
    let of = [sector, most, middle, low];
    let red = choose(of, [Y, 0, 0, 0, 0, Y, Y, 0], [0, 0, Y, Y, 0, 0, 0, 0]);
    let green = choose(of, [0, Y, Y, 0, 0, 0, 0, 0], [0, 0, 0, 0, Y, Y, 0, 0]);
    let blue = choose(of, [0, 0, 0, Y, Y, 0, 0, 0], [Y, Y, 0, 0, 0, 0, Y, 0]);
    [red, green, blue]
}

/// A channel, by the sectors where it is the highest, and where the lowest.
#[inline]
#[target_feature(enable = "avx2")]
fn choose([sector, most, middle, low]: [__m256i; 4], highest: [u8; 8], lowest: [u8; 8]) -> __m256i {
    let (highest, lowest) = (i64::from_le_bytes(highest), i64::from_le_bytes(lowest));
    let is_highest = _mm256_shuffle_epi8(_mm256_set1_epi64x(highest), sector);
    let is_lowest = _mm256_shuffle_epi8(_mm256_set1_epi64x(lowest), sector);
    _mm256_blendv_epi8(_mm256_blendv_epi8(middle, low, is_lowest), most, is_highest)
}

/// Bytes as 16-bit integers: of each half the lower eight, then the upper ones.
#[inline]
#[target_feature(enable = "avx2")]
fn words(bytes: __m256i) -> [__m256i; 2] {
    let zero = _mm256_setzero_si256();
    [_mm256_unpacklo_epi8(bytes, zero), _mm256_unpackhi_epi8(bytes, zero)]
}

/// 16-bit integers as 32-bit ones, likewise.
#[inline]
#[target_feature(enable = "avx2")]
fn longs(words: __m256i) -> [__m256i; 2] {
    let zero = _mm256_setzero_si256();
    [_mm256_unpacklo_epi16(words, zero), _mm256_unpackhi_epi16(words, zero)]
}

/// As [`longs`], as `f32`.
#[inline]
#[target_feature(enable = "avx2")]
fn floats_of(words: __m256i) -> [__m256; 2] {
    let [a, b] = longs(words);
    [_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)]
}

/// Eight hues in 255ths of a turn, truncated. `sign` has its highest bit where the part that is computed
/// is subtracted.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn hue_of(gap: __m256, range: __m256, place: __m256i, sign: __m256i) -> __m256i {
    let one = _mm256_set1_ps(1.0);
    let base = _mm256_setr_ps(-1.0, 1.0, 3.0, 5.0, -1.0, 1.0, 3.0, 5.0);
    let base = _mm256_permutevar_ps(base, place);
    let part = _mm256_div_ps(gap, _mm256_max_ps(range, one));
    let sixths = _mm256_add_ps(base, _mm256_xor_ps(part, _mm256_castsi256_ps(sign)));
    let below = _mm256_cmp_ps::<_CMP_LT_OQ>(sixths, _mm256_setzero_ps());
    // A division by six: the product's error, divided too.
    let (six, sixth) = (_mm256_set1_ps(6.0), _mm256_set1_ps(1.0 / 6.0));
    let turns = _mm256_mul_ps(sixths, sixth);
    let turns = _mm256_fmadd_ps(_mm256_fnmadd_ps(turns, six, sixths), sixth, turns);
    let turns = _mm256_add_ps(turns, _mm256_and_ps(below, one));
    _mm256_cvttps_epi32(_mm256_mul_ps(turns, _mm256_set1_ps(255.0)))
}

/// Eight saturations in 255ths, truncated.
#[inline]
#[target_feature(enable = "avx2")]
fn saturation_of(range: __m256, most: __m256) -> __m256i {
    let range = _mm256_mul_ps(range, _mm256_set1_ps(255.0));
    _mm256_cvttps_epi32(_mm256_div_ps(range, _mm256_max_ps(most, _mm256_set1_ps(1.0))))
}

/// Of sixteen pixels the sector of the turn that the hue (modulo 256) lies in, the lowest and the middle
/// channel.
#[inline]
#[target_feature(enable = "avx2")]
fn from_hue(hue: __m256i, saturation: __m256i, most: __m256i, values: [__m256; 2]) -> [__m256i; 3] {
    let all = _mm256_set1_epi16(255);
    let hue6 = _mm256_mullo_epi16(_mm256_and_si256(hue, all), _mm256_set1_epi16(6));
    let sector = _mm256_add_epi16(hue6, _mm256_set1_epi16(1));
    let sector = _mm256_mulhi_epu16(sector, _mm256_set1_epi16(257));
    let within = _mm256_sub_epi16(hue6, _mm256_mullo_epi16(sector, all));
    // 255 - within in even sectors.
    let odd = _mm256_srai_epi16::<15>(_mm256_slli_epi16::<15>(sector));
    let away = _mm256_xor_si256(within, _mm256_andnot_si256(odd, all));

    let low = _mm256_mullo_epi16(most, _mm256_xor_si256(saturation, all));
    let low = _mm256_add_epi16(low, _mm256_set1_epi16(128));
    let low = _mm256_srli_epi16::<8>(_mm256_add_epi16(low, _mm256_srli_epi16::<8>(low)));

    let square = _mm256_set1_epi16((255_u16 * 255) as i16);
    let rest = _mm256_sub_epi16(square, _mm256_mullo_epi16(saturation, away));
    let [a, b] = longs(rest);
    let middle = _mm256_packs_epi32(product(a, values[0]), product(b, values[1]));
    [sector, low, middle]
}

/// Eight times `value * rest / 255^2`, rounded. What is rounded is below 2^24: exact in `f32`.
#[inline]
#[target_feature(enable = "avx2")]
fn product(rest: __m256i, value: __m256) -> __m256i {
    let middle = _mm256_mul_ps(_mm256_cvtepi32_ps(rest), value);
    let middle = _mm256_mul_ps(middle, _mm256_set1_ps(1.0 / (255.0 * 255.0)));
    _mm256_cvttps_epi32(_mm256_add_ps(middle, _mm256_set1_ps(0.5)))
}

// ---- blur

/// The weights of a box, split so that products fit 16 bits: pairs (full, far).
#[derive(Clone, Copy)]
struct Split {
    high: __m256i,
    low: __m256i,
}

/// Bits of the lower part of a box's weight.
const BOX_SPLIT: i32 = 10;

#[target_feature(enable = "avx2")]
fn gaussian(
    view: &mut Planes,
    kernel: Kernel,
    within: [usize; 4],
    scratch: &mut super::blur::Scratch,
) {
    let pair = |full: u32, far: u32| _mm256_set1_epi32((full | far << 16) as i32);
    let mask = (1 << BOX_SPLIT) - 1;
    let weights = Split {
        high: pair(kernel.full >> BOX_SPLIT, kernel.far >> BOX_SPLIT),
        low: pair(kernel.full & mask, kernel.far & mask),
    };
    match kernel.radius {
        0 => passes::<0>(view, weights, within, scratch),
        _ => passes::<1>(view, weights, within, scratch),
    }
}

/// All passes, a few rows at a time, so that everything stays in the nearest cache: rows are blurred along
/// themselves, what is kept of them goes into `rings[0]`, from there along the columns into `rings[1]`,
/// `rings[2]` and back into the picture. A ring holds the newest [`RING`] rows, 16 bits a value.
#[inline]
#[target_feature(enable = "avx2")]
fn passes<const RADIUS: usize>(
    view: &mut Planes,
    weights: Split,
    [left, top, kept, rows]: [usize; 4],
    scratch: &mut super::blur::Scratch,
) {
    let margin = RADIUS + 1;
    let (width, height, count) = (view.width(), view.height(), if view.is_gray() { 1 } else { 3 });
    let mut planes = view.padded();
    let planes = &mut planes[..count];
    let Rings { mut lines, rings: [along, once, twice], stride } = scratch.rings(width, kept);
    let slot = |y: usize| (y % RING) * stride..(y % RING + 1) * stride;
    // Beyond the first and the last row stand those rows.
    let near =
        |y: usize, up: usize, down: usize| slot((y + down).saturating_sub(up).min(height - 1));
    let around =
        |y: usize| [near(y, margin, 0), near(y, 1, 0), slot(y), near(y, 0, 1), near(y, 0, margin)];
    // A pass is as many rows behind the one before it as it looks ahead, and needs no more rows than
    // the later ones read.
    let row = |y: usize, pass: usize| {
        let reach = (PASSES - pass) * margin;
        let y = y.checked_sub(pass * margin)?;
        (y < height && y + reach >= top && y < top + rows + reach).then_some(y)
    };
    for y in 0..height + PASSES * margin {
        if y < height && y.is_multiple_of(TOGETHER) {
            let rows = TOGETHER.min(height - y);
            let first = y..y + rows;
            let from = planes.iter().flat_map(|plane| first.clone().map(|y| &plane[y * width..]));
            along_lines::<RADIUS>(from, width, weights, &mut lines);
            let mut line = ROOM + margin + left;
            for plane in 0..count {
                for y in first.clone() {
                    copy(&lines[0][line..], &mut along[slot(y)][plane * kept..], kept);
                    line += width + 2 * margin;
                }
            }
        }
        if let Some(y) = row(y, 1) {
            across::<RADIUS>(along, around(y), weights, &mut once[slot(y)]);
        }
        if let Some(y) = row(y, 2) {
            across::<RADIUS>(once, around(y), weights, &mut twice[slot(y)]);
        }
        if let Some(y) = row(y, 3) {
            // Row y of `along` is no longer needed.
            let last = &mut along[slot(y)];
            across::<RADIUS>(twice, around(y), weights, last);
            for (i, plane) in planes.iter_mut().enumerate() {
                narrow(&last[i * kept..], &mut plane[y * width + left..], kept);
            }
        }
    }
}

/// Three passes along lines of `width` bytes, into `lines[0]`, where each has a margin at both ends and
/// [`ROOM`] is before the first. Pass by pass, not line by line: what a pass has stored has left the CPU's
/// store queue when the next one reads it; and a pass goes over all lines as over one, because lines
/// that are a few vectors long would wait for each other's ends.
#[inline]
#[target_feature(enable = "avx2")]
fn along_lines<'a, const RADIUS: usize>(
    from: impl Iterator<Item = &'a [u8]>,
    width: usize,
    weights: Split,
    [first, second]: &mut [&mut [i16]; 2],
) {
    let margin = RADIUS + 1;
    let stride = width + 2 * margin;
    let mut end = ROOM;
    for line in from {
        // What is written too much is overwritten with the next line, or lies in the room.
        let to = second[end + margin..].chunks_exact_mut(WORDS);
        let from = line.chunks_exact(WORDS).take(width.div_ceil(WORDS));
        for (to, from) in to.zip(from) {
            if let (Some(to), Some(from)) = (to.first_chunk_mut(), from.first_chunk()) {
                store_words(to, _mm256_cvtepu8_epi16(load16(from)));
            }
        }
        end += stride;
    }
    for pass in 0..PASSES {
        let (source, target): (&mut [i16], &mut [i16]) =
            if pass % 2 == 0 { (second, first) } else { (first, second) };
        for line in source[ROOM..end].chunks_exact_mut(stride) {
            let (left, right) = (line[margin], line[stride - 1 - margin]);
            for i in 0..margin {
                line[i] = left;
                line[stride - 1 - i] = right;
            }
        }
        for start in (ROOM..end).step_by(WORDS) {
            // One check of bounds for all taps. The margins get what nobody reads.
            let Some(window) = source[start - margin..].first_chunk::<WINDOW>() else { break };
            let tap = |tap: usize| window[tap..].first_chunk().unwrap_or(&[0; WORDS]);
            let taps = [tap(0), tap(1), tap(margin), tap(2 * margin - 1), tap(2 * margin)];
            if let Some(to) = target[start..].first_chunk_mut() {
                store_words(to, weigh::<RADIUS>(taps, weights));
            }
        }
    }
}

/// One pass across rows of a ring.
#[inline]
#[target_feature(enable = "avx2")]
fn across<const RADIUS: usize>(
    ring: &[i16],
    [a, b, c, d, e]: [std::ops::Range<usize>; 5],
    weights: Split,
    out: &mut [i16],
) {
    let (out, _) = out.as_chunks_mut::<WORDS>();
    let row = |at: std::ops::Range<usize>| ring[at].as_chunks::<WORDS>().0;
    let rows = row(a).iter().zip(row(b)).zip(row(c)).zip(row(d)).zip(row(e));
    for (((((a, b), c), d), e), to) in rows.zip(out) {
        store_words(to, weigh::<RADIUS>([a, b, c, d, e], weights));
    }
}

/// As many values, and up to whole vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn copy(from: &[i16], to: &mut [i16], count: usize) {
    let (from, to) = (from.as_chunks::<WORDS>().0, to.as_chunks_mut::<WORDS>().0);
    for (to, from) in to.iter_mut().zip(from).take(count.div_ceil(WORDS)) {
        store_words(to, load_words(from));
    }
}

/// As many values of 0..=255 as bytes, and up to whole vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn narrow(from: &[i16], to: &mut [u8], count: usize) {
    let (from, to) = (from.as_chunks::<WORDS>().0, to.as_chunks_mut::<WORDS>().0);
    for (to, from) in to.iter_mut().zip(from).take(count.div_ceil(WORDS)) {
        let words = load_words(from);
        let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        store16(to, _mm_packus_epi16(low, high));
    }
}

/// The outer two taps weigh `far`, those between `full`. Of radius 0 the three inner ones are the same.
#[inline]
#[target_feature(enable = "avx2")]
fn weigh<const RADIUS: usize>([a, b, c, d, e]: [&[i16; WORDS]; 5], weights: Split) -> __m256i {
    let mut inner = load_words(c);
    if RADIUS == 1 {
        inner = _mm256_add_epi16(inner, _mm256_add_epi16(load_words(b), load_words(d)));
    }
    let ends = _mm256_add_epi16(load_words(a), load_words(e));
    let low = weighted(_mm256_unpacklo_epi16(inner, ends), weights);
    let high = weighted(_mm256_unpackhi_epi16(inner, ends), weights);
    _mm256_packs_epi32(low, high)
}

/// Pairs (inner sum, sum of the ends) times (full, far), rounded to 2^24: in two products, because a
/// weight has 24 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn weighted(pairs: __m256i, weights: Split) -> __m256i {
    let high = _mm256_madd_epi16(pairs, weights.high);
    let low = _mm256_srli_epi32::<BOX_SPLIT>(_mm256_madd_epi16(pairs, weights.low));
    let half = _mm256_set1_epi32(1 << (23 - BOX_SPLIT));
    let sum = _mm256_add_epi32(_mm256_add_epi32(high, half), low);
    _mm256_srli_epi32::<{ 24 - BOX_SPLIT }>(sum)
}
