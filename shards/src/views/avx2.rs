//! The operations of DetCo's views for CPUs with AVX2.
//!
//! Each does to the byte what its twin in [`super::geometry`], [`super::color`] or [`super::blur`]
//! does, which says what and why; here stands only how. The tests hold the two against each other.
//!
//! `u8` lanes are widened to 32 bits for products of 22-bit weights and for `f32`, and come back through
//! the saturating packs, which clamp to 0..=255 for free.

#![expect(
    unsafe_code,
    reason = "vector instructions: found by asking the CPU, loads from references"
)]

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::*;

use super::blur::{Kernel, PASSES, RADIUS_MAX, RING, Rings, TOGETHER, padded};
use super::color;
use super::geometry::{Axis, HALF, Pair, ROWS, Ring, SPLIT, WEIGHT_BITS};
use super::plan::Op;

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

    /// Sets `view` (row-planar, `[side, 3, side]`) to what `op` makes of it, or returns false where that
    /// operation is not here.
    #[inline(always)]
    pub(super) fn apply(
        self,
        op: &Op,
        view: &mut [u8],
        side: usize,
        blur: &mut super::blur::Scratch,
    ) -> bool {
        match *op {
            // SAFETY: the CPU has AVX2: `self` proves it. So below.
            Op::Brightness(factor) => unsafe { blend_flat(view, 0, factor) },
            Op::Contrast(factor) => {
                // SAFETY: as above.
                let sum = unsafe { luma_sum(view, side) };
                let mean = color::mean(sum, side);
                // SAFETY: as above.
                unsafe { blend_flat(view, mean, factor) };
            }
            // SAFETY: as above.
            Op::Saturation(factor) => unsafe { saturation(view, side, factor) },
            Op::Hue(turns) => self.hue(view, side, color::shift(turns)),
            // SAFETY: as above.
            Op::Gray => unsafe { gray(view, side) },
            Op::Blur(sigma) => {
                let kernel = Kernel::gaussian(sigma);
                if kernel.radius > RADIUS_MAX {
                    return false;
                }
                // SAFETY: as above.
                unsafe { gaussian(view, side, kernel, blur) };
            }
            _ => return false,
        }
        true
    }

    /// As `color::hue`, by a shift of 8 bits.
    #[inline(always)]
    pub(super) fn hue(self, view: &mut [u8], side: usize, shift: u8) {
        // SAFETY: the CPU has AVX2 and FMA: `self` proves it.
        unsafe { hue(view, side, shift) }
    }

    /// As `geometry::gather`.
    #[inline(always)]
    pub(super) fn gather(self, rows: [&[u8]; ROWS], lines: &mut [[u8; ROWS]]) {
        // SAFETY: the CPU has AVX2: `self` proves it.
        unsafe { gather(rows, lines) }
    }

    /// As `geometry::along_rows`.
    #[inline(always)]
    pub(super) fn along_rows(
        self,
        lines: &[[u8; ROWS]],
        axis: &Axis,
        plane: usize,
        out: &mut [u8],
    ) {
        // SAFETY: the CPU has AVX2: `self` proves it.
        unsafe { along_rows(lines, axis, plane, out) }
    }

    /// As `geometry::across`.
    #[inline(always)]
    pub(super) fn across(
        self,
        rows: Ring<'_>,
        (start, pairs): (usize, &[Pair]),
        plane: usize,
        out: &mut [u8],
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

/// Sixteen rows, side by side: blocks of 16 x 16 bytes are transposed.
#[target_feature(enable = "avx2")]
fn gather(rows: [&[u8]; ROWS], lines: &mut [[u8; ROWS]]) {
    let width = lines.len();
    let rows = rows.map(|row| &row[..width]);
    let (blocks, rest) = lines.as_chunks_mut::<16>();
    let whole = width - rest.len();
    for (i, block) in blocks.iter_mut().enumerate() {
        let bytes = |row: usize| match rows[row][16 * i..].first_chunk() {
            Some(bytes) => load16(bytes),
            None => _mm_setzero_si128(),
        };
        let pair = |row| _mm256_set_m128i(bytes(row + 8), bytes(row));
        let columns = shuffle(shuffle(shuffle([0, 1, 2, 3, 4, 5, 6, 7].map(pair))));
        for (to, two) in block.as_chunks_mut::<2>().0.iter_mut().zip(columns) {
            // Of both columns the first eight rows lie in one half, the others in the other.
            let two = _mm256_permute4x64_epi64::<0b11_01_10_00>(two);
            store16(&mut to[0], _mm256_castsi256_si128(two));
            store16(&mut to[1], _mm256_extracti128_si256::<1>(two));
        }
    }
    super::geometry::gather(rows.map(|row| &row[whole..]), rest);
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
fn along_rows(lines: &[[u8; ROWS]], axis: &Axis, plane: usize, out: &mut [u8]) {
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
fn along_rows_by<const PAIRS: usize>(
    lines: &[[u8; ROWS]],
    axis: &Axis,
    plane: usize,
    out: &mut [u8],
) {
    let mut windows = axis.pairs();
    let mut sums = [[_mm256_setzero_si256(); BLOCK]; 3];
    for first in (0..axis.outputs()).step_by(BLOCK) {
        for (x, (start, pairs)) in windows.by_ref().take(BLOCK).enumerate() {
            let pairs = if PAIRS == 0 { pairs } else { &pairs[..PAIRS] };
            let (columns, _) = lines[3 * start..3 * (start + 2 * pairs.len())].as_chunks::<6>();
            for (channel, sums) in sums.iter_mut().enumerate() {
                sums[x] = weighted_columns(columns, channel, pairs);
            }
        }
        for (channel, sums) in sums.iter().enumerate() {
            for (i, [lower, upper]) in rows_of(sums).into_iter().enumerate() {
                let row = if i < 4 { i } else { i + 4 };
                for (row, value) in [(row, lower), (row + 4, upper)] {
                    let at = (3 * row + channel) * plane + first;
                    if let Some(to) = out[at..].first_chunk_mut() {
                        store16(to, value);
                    }
                }
            }
        }
    }
}

/// Sixteen rows' weighted sum of a channel of some columns, by pairs of columns, as 16-bit values: of rows
/// 0 to 3 and 8 to 11, then of rows 4 to 7 and 12 to 15.
#[inline]
#[target_feature(enable = "avx2")]
fn weighted_columns(columns: &[[[u8; ROWS]; 6]], channel: usize, pairs: &[Pair]) -> __m256i {
    let half = _mm256_set1_epi32(HALF);
    let (mut high, mut low) = ([_mm256_setzero_si256(); 2], [half; 2]);
    for (two, pair) in columns.iter().zip(pairs) {
        let (a, b) = (load16(&two[channel]), load16(&two[channel + 3]));
        // Of two columns the values of the first eight rows, then of the others.
        let rows = [_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)];
        let (w_high, w_low) = (_mm256_set1_epi32(pair.high), _mm256_set1_epi32(pair.low));
        for (i, row) in rows.into_iter().enumerate() {
            let values = _mm256_cvtepu8_epi16(row);
            high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(values, w_high));
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(values, w_low));
        }
    }
    _mm256_packs_epi32(rounded(high[0], low[0]), rounded(high[1], low[1]))
}

/// A sum of products with split weights, of which the lower one holds [`HALF`] already.
#[inline]
#[target_feature(enable = "avx2")]
fn rounded(high: __m256i, low: __m256i) -> __m256i {
    let sum = _mm256_add_epi32(high, _mm256_srli_epi32::<{ SPLIT as i32 }>(low));
    _mm256_srli_epi32::<{ (WEIGHT_BITS - SPLIT) as i32 }>(sum)
}

/// Sixteen columns of sixteen rows as rows: two by two, as [`weighted_columns`] has them.
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
fn across_rows(rows: Ring<'_>, start: usize, pairs: &[Pair], plane: usize, out: &mut [u8]) {
    let side = out.len() / 3;
    for (channel, out) in out.chunks_exact_mut(side).enumerate() {
        let (chunks, rest) = out.as_chunks_mut::<LANES>();
        for (i, to) in chunks.iter_mut().enumerate() {
            store32(to, column(rows, channel * plane + i * LANES, start, pairs));
        }
        if !rest.is_empty() {
            let mut last = [0; LANES];
            let at = channel * plane + side / LANES * LANES;
            store32(&mut last, column(rows, at, start, pairs));
            rest.copy_from_slice(&last[..rest.len()]);
        }
    }
}

/// The filter over 32 columns that begin at byte `at` of each row.
#[inline]
#[target_feature(enable = "avx2")]
fn column(rows: Ring<'_>, at: usize, start: usize, pairs: &[Pair]) -> __m256i {
    let zero = _mm256_setzero_si256();
    let (mut high, mut low) = ([zero; 4], [_mm256_set1_epi32(HALF); 4]);
    for (i, pair) in pairs.iter().enumerate() {
        let y = start + 2 * i;
        let bytes = (rows.row(y)[at..].first_chunk(), rows.row(y + 1)[at..].first_chunk());
        let (Some(a), Some(b)) = bytes else { continue };
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
            high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(values, w_high));
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(values, w_low));
        }
    }
    let left = _mm256_packs_epi32(rounded(high[0], low[0]), rounded(high[1], low[1]));
    let right = _mm256_packs_epi32(rounded(high[2], low[2]), rounded(high[3], low[3]));
    _mm256_packus_epi16(left, right)
}

#[target_feature(enable = "avx2")]
fn interleave(planes: [&[u8]; 3], mirrored: bool, out: &mut [u8]) {
    // Where the three bytes of a store come from: red, green, blue; -1 takes nothing.
    const SPREAD: [[[i8; 16]; 3]; 3] = {
        let mut masks = [[[-1; 16]; 3]; 3];
        let mut byte = 0;
        while byte < 48 {
            masks[byte / 16][byte % 3][byte % 16] = (byte / 3) as i8;
            byte += 1;
        }
        masks
    };
    let columns = planes[0].len();
    let planes = planes.map(|plane| &plane[..columns]);
    let turn = _mm_setr_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    let masks = SPREAD.map(|of| of.map(|mask| load16(&mask.map(|lane| lane as u8))));
    // The last block overlaps the one before it.
    let starts = (0..columns / 16)
        .map(|i| 16 * i)
        .chain((!columns.is_multiple_of(16)).then(|| columns - 16));
    for start in starts {
        let three = planes.map(|plane| match plane[start..].first_chunk() {
            Some(bytes) if mirrored => _mm_shuffle_epi8(load16(bytes), turn),
            Some(bytes) => load16(bytes),
            None => _mm_setzero_si128(),
        });
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

/// As `color::brightness`, and as the second half of `color::contrast`.
#[target_feature(enable = "avx2")]
fn blend_flat(view: &mut [u8], from: u8, factor: f32) {
    let flat = _mm256_set1_ps(f32::from(from));
    let by = _mm256_set1_ps(factor);
    let (chunks, rest) = view.as_chunks_mut::<LANES>();
    for chunk in chunks {
        let blended = eights(chunk).map(|part| {
            let value = _mm256_cvtepi32_ps(widen8(part));
            blend(flat, value, by)
        });
        store32(chunk, narrow32(blended));
    }
    color::blend_flat(rest, from, factor);
}

/// `from` at factor 0, `to` at factor 1, truncated; clamped by the caller's packs.
#[inline]
#[target_feature(enable = "avx2")]
fn blend(from: __m256, to: __m256, factor: __m256) -> __m256i {
    let part = _mm256_mul_ps(factor, _mm256_sub_ps(to, from));
    _mm256_cvttps_epi32(_mm256_add_ps(from, part))
}

/// Luma times 65,536, rounding included: whole numbers below 2^24, exact in `f32`.
#[inline]
#[target_feature(enable = "avx2")]
fn luma(r: __m256, g: __m256, b: __m256) -> __m256 {
    let red = _mm256_mul_ps(r, _mm256_set1_ps(19595.0));
    let green = _mm256_mul_ps(g, _mm256_set1_ps(38470.0));
    let blue = _mm256_mul_ps(b, _mm256_set1_ps(7471.0));
    let half = _mm256_set1_ps(32768.0);
    _mm256_add_ps(_mm256_add_ps(red, green), _mm256_add_ps(blue, half))
}

/// The three channels of eight pixels.
#[inline]
#[target_feature(enable = "avx2")]
fn floats(parts: [&[u8; 8]; 3]) -> [__m256; 3] {
    parts.map(|part| _mm256_cvtepi32_ps(widen8(part)))
}

/// 32 pixels.
type Pixels = [[u8; LANES]; 3];

/// `op` on the pixels of a row-planar view, 32 of them at a time; the last of a row may not be there.
#[inline(always)]
fn for_pixels(view: &mut [u8], side: usize, op: impl Fn(&mut Pixels)) {
    for row in view.chunks_exact_mut(3 * side) {
        for start in (0..side).step_by(LANES) {
            let n = LANES.min(side - start);
            let mut pixels = [[0; LANES]; 3];
            for (pixels, plane) in pixels.iter_mut().zip(row.chunks_exact(side)) {
                match plane[start..].first_chunk() {
                    Some(whole) => *pixels = *whole,
                    None => pixels[..n].copy_from_slice(&plane[start..]),
                }
            }
            op(&mut pixels);
            for (pixels, plane) in pixels.iter().zip(row.chunks_exact_mut(side)) {
                match plane[start..].first_chunk_mut() {
                    Some(whole) => *whole = *pixels,
                    None => plane[start..].copy_from_slice(&pixels[..n]),
                }
            }
        }
    }
}

/// Sum of the luma of all pixels.
#[target_feature(enable = "avx2")]
fn luma_sum(view: &[u8], side: usize) -> u64 {
    let mut total = 0;
    for row in view.chunks_exact(3 * side) {
        let [r, g, b] = [&row[..side], &row[side..2 * side], &row[2 * side..]];
        let mut sum = _mm256_setzero_si256();
        let [(r8, r), (g8, g), (b8, b)] = [r, g, b].map(<[u8]>::as_chunks::<8>);
        for ((r, g), b) in r8.iter().zip(g8).zip(b8) {
            let [r, g, b] = floats([r, g, b]);
            let luma = _mm256_srli_epi32::<16>(_mm256_cvttps_epi32(luma(r, g, b)));
            sum = _mm256_add_epi32(sum, luma);
        }
        let mut lanes = [0; LANES];
        store32(&mut lanes, sum);
        total += lanes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|lane| u64::from(u32::from_le_bytes(*lane)))
            .sum::<u64>();
        total += color::luma_sum(r, g, b);
    }
    total
}

#[target_feature(enable = "avx2")]
fn saturation(view: &mut [u8], side: usize, factor: f32) {
    let by = _mm256_set1_ps(factor);
    for_pixels(view, side, |pixels| {
        let parts = [eights(&pixels[0]), eights(&pixels[1]), eights(&pixels[2])];
        let mut blended = [[_mm256_setzero_si256(); 4]; 3];
        for i in 0..4 {
            let [r, g, b] = floats([parts[0][i], parts[1][i], parts[2][i]]);
            let gray = _mm256_mul_ps(luma(r, g, b), _mm256_set1_ps(1.0 / 65536.0));
            let gray = _mm256_floor_ps(gray);
            blended[0][i] = blend(gray, r, by);
            blended[1][i] = blend(gray, g, by);
            blended[2][i] = blend(gray, b, by);
        }
        for (plane, blended) in pixels.iter_mut().zip(blended) {
            store32(plane, narrow32(blended));
        }
    });
}

#[target_feature(enable = "avx2")]
fn gray(view: &mut [u8], side: usize) {
    for_pixels(view, side, |pixels| {
        let parts = [eights(&pixels[0]), eights(&pixels[1]), eights(&pixels[2])];
        let mut sums = [_mm256_setzero_si256(); 4];
        for (i, sum) in sums.iter_mut().enumerate() {
            let [r, g, b] = floats([parts[0][i], parts[1][i], parts[2][i]]);
            *sum = _mm256_srli_epi32::<16>(_mm256_cvttps_epi32(luma(r, g, b)));
        }
        let gray = narrow32(sums);
        for plane in pixels {
            store32(plane, gray);
        }
    });
}

#[target_feature(enable = "avx2,fma")]
fn hue(view: &mut [u8], side: usize, shift: u8) {
    for_pixels(view, side, |pixels| {
        let turned = turn([load32(&pixels[0]), load32(&pixels[1]), load32(&pixels[2])], shift);
        for (plane, turned) in pixels.iter_mut().zip(turned) {
            store32(plane, turned);
        }
    });
}

/// As `color::turn`, of 32 pixels.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn turn([r, g, b]: [__m256i; 3], shift: u8) -> [__m256i; 3] {
    let (above, below) = (_mm256_max_epu8(r, g), _mm256_min_epu8(r, g));
    let most = _mm256_max_epu8(above, b);
    let least = _mm256_min_epu8(below, b);
    let middle = _mm256_max_epu8(below, _mm256_min_epu8(above, b));
    let not_above = |a, b| _mm256_cmpeq_epi8(_mm256_min_epu8(a, b), a);
    // The hue in sixths of a turn is `base` plus or minus (most - middle) / range.
    let pick = |mask, yes: i8, no: i8| {
        _mm256_blendv_epi8(_mm256_set1_epi8(no), _mm256_set1_epi8(yes), mask)
    };
    let (red, green) = (_mm256_cmpeq_epi8(r, most), _mm256_cmpeq_epi8(g, most));
    let (bg, br, rg) = (not_above(b, g), not_above(b, r), not_above(r, g));
    let base = _mm256_blendv_epi8(pick(rg, 3, 5), pick(br, 1, 3), green);
    let base = _mm256_blendv_epi8(base, pick(bg, 1, -1), red);
    let rises = _mm256_blendv_epi8(rg, br, green);
    let falls = _mm256_blendv_epi8(pick(rises, 0, -1), bg, red);

    let store = |value| {
        let mut bytes = [0; LANES];
        store32(&mut bytes, value);
        bytes
    };
    let gaps = store(_mm256_sub_epi8(most, middle));
    let ranges = store(_mm256_sub_epi8(most, least));
    let (mosts, bases, signs) = (store(most), store(base), store(falls));
    let [gaps, ranges, mosts, bases, signs] = [&gaps, &ranges, &mosts, &bases, &signs].map(eights);
    let mut pixels = [_mm256_setzero_si256(); 4];
    for (i, pixel) in pixels.iter_mut().enumerate() {
        let base = _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(widen8(bases[i])));
        let sign = _mm256_slli_epi32::<31>(widen8(signs[i]));
        *pixel = turn8(widen8(gaps[i]), widen8(ranges[i]), widen8(mosts[i]), base, sign, shift);
    }
    from_pixels(pixels)
}

/// Eight pixels, of which is known: most - middle, most - least, most, and where in the circle of hues
/// they lie: `base` sixths, less the part that is to be computed where `sign` has its highest bit.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn turn8(
    gap: __m256i,
    range: __m256i,
    most: __m256i,
    base: __m256i,
    sign: __m256i,
    shift: u8,
) -> __m256i {
    let [one, full] = [1.0, 255.0].map(|value| _mm256_set1_ps(value));
    let [all, square] = [255, 255 * 255].map(|value| _mm256_set1_epi32(value));
    let range = _mm256_cvtepi32_ps(range);
    let part = _mm256_div_ps(_mm256_cvtepi32_ps(gap), _mm256_max_ps(range, one));
    let part = _mm256_xor_ps(part, _mm256_castsi256_ps(sign));
    let sixths = _mm256_add_ps(_mm256_cvtepi32_ps(base), part);
    let below = _mm256_cmp_ps::<_CMP_LT_OQ>(sixths, _mm256_setzero_ps());
    // A division by six: the product's error, divided too.
    let (six, sixth) = (_mm256_set1_ps(6.0), _mm256_set1_ps(1.0 / 6.0));
    let turns = _mm256_mul_ps(sixths, sixth);
    let turns = _mm256_fmadd_ps(_mm256_fnmadd_ps(turns, six, sixths), sixth, turns);
    let turns = _mm256_add_ps(turns, _mm256_and_ps(below, one));
    let hue = _mm256_cvttps_epi32(_mm256_mul_ps(turns, full));
    let hue = _mm256_and_si256(_mm256_add_epi32(hue, _mm256_set1_epi32(i32::from(shift))), all);
    let value = _mm256_cvtepi32_ps(most);
    let saturation = _mm256_div_ps(_mm256_mul_ps(range, full), _mm256_max_ps(value, one));
    let saturation = _mm256_cvttps_epi32(saturation);

    // Factors below 2^15: their product as one of pairs whose upper halves are zero.
    let product = |a, b| _mm256_madd_epi16(a, b);
    let hue6 = product(hue, _mm256_set1_epi32(6));
    let sector = _mm256_add_epi32(hue6, _mm256_set1_epi32(1));
    let sector = product(sector, _mm256_set1_epi32(257));
    let sector = _mm256_srli_epi32::<16>(sector);
    let within = _mm256_sub_epi32(hue6, product(sector, all));
    let odd = _mm256_castsi256_ps(_mm256_slli_epi32::<31>(sector));
    let even_away = _mm256_castsi256_ps(_mm256_sub_epi32(all, within));
    let away = _mm256_blendv_ps(even_away, _mm256_castsi256_ps(within), odd);
    let away = _mm256_castps_si256(away);

    let low = product(most, _mm256_sub_epi32(all, saturation));
    let low = _mm256_add_epi32(low, _mm256_set1_epi32(128));
    let low = _mm256_add_epi32(low, _mm256_srli_epi32::<8>(low));
    // Its second byte is the quotient: left where it is.
    let low = _mm256_and_si256(low, _mm256_set1_epi32(0xFF00));
    // Below 2^24: exact in `f32`.
    let middle = _mm256_sub_epi32(square, product(saturation, away));
    let middle = _mm256_mul_ps(_mm256_cvtepi32_ps(middle), value);
    let middle = _mm256_mul_ps(middle, _mm256_set1_ps(1.0 / (255.0 * 255.0)));
    let middle = _mm256_cvttps_epi32(_mm256_add_ps(middle, _mm256_set1_ps(0.5)));

    // Most, low and middle are bytes 0, 1 and 2 of a lane; the sector says which of them is red, green
    // and blue. Sector 6 is sector 0.
    let three = _mm256_or_si256(_mm256_or_si256(most, low), _mm256_slli_epi32::<16>(middle));
    let order = _mm256_setr_epi32(
        0x0001_0200,
        0x0001_0002,
        0x0002_0001,
        0x0000_0201,
        0x0000_0102,
        0x0002_0100,
        0x0001_0200,
        0,
    );
    let order = _mm256_permutevar8x32_epi32(order, sector);
    let lane = _mm256_setr_epi32(
        0,
        0x0404_0404,
        0x0808_0808,
        0x0C0C_0C0C,
        0,
        0x0404_0404,
        0x0808_0808,
        0x0C0C_0C0C,
    );
    _mm256_shuffle_epi8(three, _mm256_or_si256(order, lane))
}

/// Four vectors of eight pixels RGB? as three planes of 32.
#[inline]
#[target_feature(enable = "avx2")]
fn from_pixels(pixels: [__m256i; 4]) -> [__m256i; 3] {
    let split = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
    ));
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let [a, b, c, d] = pixels.map(|four| _mm256_shuffle_epi8(four, split));
    let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
    let (red, green) = (_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    let (ab, cd) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
    let blue = _mm256_unpacklo_epi64(ab, cd);
    [red, green, blue].map(|plane| _mm256_permutevar8x32_epi32(plane, order))
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
fn gaussian(view: &mut [u8], side: usize, kernel: Kernel, scratch: &mut super::blur::Scratch) {
    let pair = |full: u32, far: u32| _mm256_set1_epi32((full | far << 16) as i32);
    let mask = (1 << BOX_SPLIT) - 1;
    let weights = Split {
        high: pair(kernel.full >> BOX_SPLIT, kernel.far >> BOX_SPLIT),
        low: pair(kernel.full & mask, kernel.far & mask),
    };
    match kernel.radius {
        0 => passes::<0>(view, side, weights, scratch),
        _ => passes::<1>(view, side, weights, scratch),
    }
}

/// All passes, a few rows at a time, so that everything stays in the nearest cache: rows are blurred along
/// themselves into `rings[0]`, from there along the columns into `rings[1]`, `rings[2]` and back into
/// the view. A ring holds the newest [`RING`] rows, 16 bits a value.
#[inline]
#[target_feature(enable = "avx2")]
fn passes<const RADIUS: usize>(
    view: &mut [u8],
    side: usize,
    weights: Split,
    scratch: &mut super::blur::Scratch,
) {
    let (margin, stride) = (RADIUS + 1, 3 * side);
    let Rings { mut lines, rings: [along, once, twice], width } = scratch.rings(side);
    let slot = |y: usize| (y % RING) * width..(y % RING) * width + width;
    // Beyond the first and the last row stand those rows.
    let near = |y: usize, up: usize, down: usize| slot((y + down).saturating_sub(up).min(side - 1));
    let around =
        |y: usize| [near(y, margin, 0), near(y, 1, 0), slot(y), near(y, 0, 1), near(y, 0, margin)];
    for y in 0..side + PASSES * margin {
        if y < side && y.is_multiple_of(TOGETHER) {
            let rows = TOGETHER.min(side - y);
            along_lines::<RADIUS>(
                &view[y * stride..(y + rows) * stride],
                side,
                weights,
                &mut lines,
            );
            for (i, line) in lines[0].chunks_exact(padded(side)).take(3 * rows).enumerate() {
                let to = &mut along[slot(y + i / 3)][i % 3 * side..][..side];
                to.copy_from_slice(&line[margin..margin + side]);
            }
        }
        let delayed = |rows: usize| y.checked_sub(rows * margin).filter(|y| *y < side);
        if let Some(y) = delayed(1) {
            across::<RADIUS>(along, around(y), weights, &mut once[slot(y)]);
        }
        if let Some(y) = delayed(2) {
            across::<RADIUS>(once, around(y), weights, &mut twice[slot(y)]);
        }
        if let Some(y) = delayed(3) {
            // Row y of `along` is no longer needed.
            let last = &mut along[slot(y)];
            across::<RADIUS>(twice, around(y), weights, last);
            narrow(last, &mut view[y * stride..(y + 1) * stride]);
        }
    }
}

/// Three passes along a few lines of `side` bytes, into `lines[0]`, whose lines are [padded]. Pass by
/// pass, not line by line: what a pass has stored has left the CPU's store queue when the next one
/// reads it.
#[inline]
#[target_feature(enable = "avx2")]
fn along_lines<const RADIUS: usize>(
    from: &[u8],
    side: usize,
    weights: Split,
    [first, second]: &mut [&mut [i16]; 2],
) {
    let (stride, margin) = (padded(side), RADIUS + 1);
    let count = from.len() / side;
    for (line, padded) in from.chunks_exact(side).zip(second.chunks_exact_mut(stride)) {
        for (to, from) in padded[margin..].iter_mut().zip(line) {
            *to = i16::from(*from);
        }
    }
    for pass in 0..PASSES {
        let (source, target): (&mut [i16], &mut [i16]) =
            if pass % 2 == 0 { (second, first) } else { (first, second) };
        let sources = source.chunks_exact_mut(stride).take(count);
        for (source, target) in sources.zip(target.chunks_exact_mut(stride)) {
            let (left, right) = (source[margin], source[margin + side - 1]);
            source[..margin].fill(left);
            source[margin + side..][..margin].fill(right);
            for start in (0..side).step_by(WORDS) {
                // One check of bounds for all taps.
                let Some(window) = source[start..].first_chunk::<WINDOW>() else { break };
                let tap = |tap: usize| window[tap..].first_chunk().unwrap_or(&[0; WORDS]);
                let (middle, right) = (margin, 2 * margin);
                let taps = [tap(0), tap(1), tap(middle), tap(right - 1), tap(right)];
                if let Some(to) = target[margin + start..].first_chunk_mut() {
                    store_words(to, weigh::<RADIUS>(taps, weights));
                }
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

/// 16-bit values of 0..=255 as bytes.
#[inline(always)]
fn narrow(from: &[i16], to: &mut [u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from as u8;
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
