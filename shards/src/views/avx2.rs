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

use std::arch::x86_64::*;

use super::blur::{Kernel, PASSES, RADIUS_MAX};
use super::color::{self, Gray, Hue, Saturation, for_columns};
use super::geometry::{Axis, HALF, ROWS, WEIGHT_BITS};
use super::plan::Op;

/// Proof that this CPU has AVX2.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(());

/// Columns of the horizontal pass that are brought into planes together.
const BLOCK: usize = 16;

/// Bytes of a vector.
const LANES: usize = 32;

impl Avx2 {
    /// The proof, where the CPU has it.
    pub(super) fn detect() -> Option<Avx2> {
        std::arch::is_x86_feature_detected!("avx2").then_some(Avx2(()))
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
            // SAFETY: as above.
            Op::Hue(turns) => unsafe { hue(view, side, color::shift(turns)) },
            // SAFETY: as above.
            Op::Gray => unsafe { gray(view, side) },
            Op::Blur(sigma) => {
                let kernel = Kernel::gaussian(sigma);
                if kernel.radius > RADIUS_MAX || 3 * side < LANES {
                    return false;
                }
                // SAFETY: as above.
                unsafe { gaussian(view, side, kernel, blur) };
            }
            _ => return false,
        }
        true
    }

    /// [`super::geometry::gather`].
    #[inline(always)]
    pub(super) fn gather(self, rows: [&[u8]; ROWS], lines: &mut [[u8; 4 * ROWS]]) {
        // SAFETY: the CPU has AVX2: `self` proves it.
        unsafe { gather(rows, lines) }
    }

    /// [`super::geometry::along_rows`].
    #[inline(always)]
    pub(super) fn along_rows(
        self,
        lines: &[[u8; 4 * ROWS]],
        axis: &Axis,
        plane: usize,
        out: &mut [u8],
    ) {
        // SAFETY: the CPU has AVX2: `self` proves it.
        unsafe { along_rows(lines, axis, plane, out) }
    }

    /// [`super::geometry::along_columns`].
    #[inline(always)]
    pub(super) fn along_columns(
        self,
        rows: &[u8],
        axis: &Axis,
        plane: usize,
        side: usize,
        out: &mut [u8],
    ) {
        // SAFETY: the CPU has AVX2: `self` proves it.
        unsafe { along_columns(rows, axis, plane, side, out) }
    }

    /// [`super::geometry::interleave`] of at least 16 columns.
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

/// Eight bytes as 32-bit integers.
#[inline]
#[target_feature(enable = "avx2")]
fn widen8(from: &[u8; 8]) -> __m256i {
    _mm256_cvtepu8_epi32(_mm_set_epi64x(0, i64::from_le_bytes(*from)))
}

/// Sixteen bytes as 16-bit integers.
#[inline]
#[target_feature(enable = "avx2")]
fn widen16(from: &[u8; 16]) -> __m256i {
    _mm256_cvtepu8_epi16(load16(from))
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

/// Four rows of RGB pixels, side by side: for each column four times RGB and a byte without meaning.
#[target_feature(enable = "avx2")]
fn gather(rows: [&[u8]; ROWS], lines: &mut [[u8; 4 * ROWS]]) {
    let spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    let width = lines.len();
    let rows = rows.map(|row| &row[..3 * width]);
    // A load takes 16 bytes and uses 12.
    let whole = if width < 6 { 0 } else { (width - 2) / 4 * 4 };
    let (blocks, _) = lines[..whole].as_chunks_mut::<4>();
    for (i, block) in blocks.iter_mut().enumerate() {
        let pixels = |row: &[u8]| match row[12 * i..].first_chunk() {
            Some(bytes) => _mm_shuffle_epi8(load16(bytes), spread),
            None => _mm_setzero_si128(),
        };
        let [a, b, c, d] = [pixels(rows[0]), pixels(rows[1]), pixels(rows[2]), pixels(rows[3])];
        let (ab, cd) = (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d));
        store16(&mut block[0], _mm_unpacklo_epi64(ab, cd));
        store16(&mut block[1], _mm_unpackhi_epi64(ab, cd));
        let (ab, cd) = (_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d));
        store16(&mut block[2], _mm_unpacklo_epi64(ab, cd));
        store16(&mut block[3], _mm_unpackhi_epi64(ab, cd));
    }
    super::geometry::gather(rows.map(|row| &row[3 * whole..]), &mut lines[whole..]);
}

/// Rows of `3 * plane` bytes come out; `plane` is a multiple of [`LANES`].
#[target_feature(enable = "avx2")]
fn along_rows(lines: &[[u8; 4 * ROWS]], axis: &Axis, plane: usize, out: &mut [u8]) {
    let mut windows = axis.windows();
    let mut sums = [_mm256_setzero_si256(); BLOCK];
    for first in (0..axis.outputs()).step_by(BLOCK) {
        for (sum, (start, weights)) in sums.iter_mut().zip(&mut windows) {
            let (mut low, mut high) = (_mm256_set1_epi32(HALF), _mm256_set1_epi32(HALF));
            for (pixels, weight) in lines[start..start + weights.len()].iter().zip(weights) {
                let weight = _mm256_set1_epi32(*weight);
                let (parts, _) = pixels.as_chunks::<8>();
                low = _mm256_add_epi32(low, _mm256_mullo_epi32(widen8(&parts[0]), weight));
                high = _mm256_add_epi32(high, _mm256_mullo_epi32(widen8(&parts[1]), weight));
            }
            let low = _mm256_srai_epi32::<{ WEIGHT_BITS as i32 }>(low);
            let high = _mm256_srai_epi32::<{ WEIGHT_BITS as i32 }>(high);
            // Rows 0 and 2 in the lower half, 1 and 3 in the upper one.
            *sum = _mm256_packs_epi32(low, high);
        }
        let (even, odd) = planes(&sums);
        for (pair, [lower, upper]) in [(0, even), (1, odd)] {
            for (half, three) in [(0, lower), (1, upper)] {
                let row = 2 * pair + half;
                let Some(row) = out.get_mut(row * 3 * plane..(row + 1) * 3 * plane) else { break };
                for (channel, value) in three.into_iter().enumerate() {
                    if let Some(to) = row[channel * plane + first..].first_chunk_mut() {
                        store16(to, value);
                    }
                }
            }
        }
    }
}

/// Sixteen pixels of four rows by channel: of rows 0 and 1, then of rows 2 and 3.
#[inline]
#[target_feature(enable = "avx2")]
#[expect(clippy::type_complexity, reason = "pairs of rows, rows of a pair, channels of a row")]
fn planes(sums: &[__m256i; BLOCK]) -> ([[__m128i; 3]; 2], [[__m128i; 3]; 2]) {
    // RGB? of four pixels to RRRR GGGG BBBB.
    let split = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
    ));
    let mut fours = [[_mm256_setzero_si256(); BLOCK / 4]; 2];
    let (quads, _) = sums.as_chunks::<4>();
    for (i, [a, b, c, d]) in quads.iter().enumerate() {
        let ab = _mm256_castsi256_ps(_mm256_packus_epi16(*a, *b));
        let cd = _mm256_castsi256_ps(_mm256_packus_epi16(*c, *d));
        let first = _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(ab, cd));
        let second = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(ab, cd));
        fours[0][i] = _mm256_shuffle_epi8(first, split);
        fours[1][i] = _mm256_shuffle_epi8(second, split);
    }
    (channels(&fours[0]), channels(&fours[1]))
}

#[inline]
#[target_feature(enable = "avx2")]
fn channels([a, b, c, d]: &[__m256i; 4]) -> [[__m128i; 3]; 2] {
    let (ab, cd) = (_mm256_unpacklo_epi32(*a, *b), _mm256_unpacklo_epi32(*c, *d));
    let (red, green) = (_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    let (ab, cd) = (_mm256_unpackhi_epi32(*a, *b), _mm256_unpackhi_epi32(*c, *d));
    let blue = _mm256_unpacklo_epi64(ab, cd);
    let lower = [red, green, blue].map(|three| _mm256_castsi256_si128(three));
    let upper = [red, green, blue].map(|three| _mm256_extracti128_si256::<1>(three));
    [lower, upper]
}

/// Rows of `3 * plane` bytes go in, rows of `3 * side` come out.
#[target_feature(enable = "avx2")]
fn along_columns(rows: &[u8], axis: &Axis, plane: usize, side: usize, out: &mut [u8]) {
    let stride = 3 * plane;
    for (out, (start, weights)) in out.chunks_exact_mut(3 * side).zip(axis.windows()) {
        let rows = &rows[start * stride..(start + weights.len()) * stride];
        for channel in 0..3 {
            let out = &mut out[channel * side..][..side];
            let (chunks, rest) = out.as_chunks_mut::<LANES>();
            for (i, to) in chunks.iter_mut().enumerate() {
                store32(to, column(rows, stride, channel * plane + i * LANES, weights));
            }
            if !rest.is_empty() {
                let mut last = [0; LANES];
                let at = channel * plane + side / LANES * LANES;
                store32(&mut last, column(rows, stride, at, weights));
                rest.copy_from_slice(&last[..rest.len()]);
            }
        }
    }
}

/// The filter over 32 columns that begin at byte `at` of each row.
#[inline]
#[target_feature(enable = "avx2")]
fn column(rows: &[u8], stride: usize, at: usize, weights: &[i32]) -> __m256i {
    let mut sums = [_mm256_set1_epi32(HALF); 4];
    for (row, weight) in rows.chunks_exact(stride).zip(weights) {
        let weight = _mm256_set1_epi32(*weight);
        let Some(bytes) = row[at..].first_chunk() else { continue };
        for (sum, part) in sums.iter_mut().zip(eights(bytes)) {
            *sum = _mm256_add_epi32(*sum, _mm256_mullo_epi32(widen8(part), weight));
        }
    }
    narrow32(sums.map(|sum| _mm256_srai_epi32::<{ WEIGHT_BITS as i32 }>(sum)))
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

/// [`super::color::brightness`] and the second half of contrast.
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

/// The planes of a row-planar row, 32 columns at a time; what is left over.
#[inline]
#[expect(clippy::type_complexity, reason = "three channels, whole vectors and the rest")]
fn planes_mut(row: &mut [u8], side: usize) -> [(&mut [[u8; LANES]], &mut [u8]); 3] {
    let (r, rest) = row.split_at_mut(side);
    let (g, b) = rest.split_at_mut(side);
    [r.as_chunks_mut(), g.as_chunks_mut(), b.as_chunks_mut()]
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
    for row in view.chunks_exact_mut(3 * side) {
        let [(r, r_rest), (g, g_rest), (b, b_rest)] = planes_mut(row, side);
        for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
            let mut sums = [[_mm256_setzero_si256(); 4]; 3];
            let parts = [eights(r), eights(g), eights(b)];
            for i in 0..4 {
                let rgb = floats([parts[0][i], parts[1][i], parts[2][i]]);
                let scaled =
                    _mm256_mul_ps(luma(rgb[0], rgb[1], rgb[2]), _mm256_set1_ps(1.0 / 65536.0));
                let gray = _mm256_floor_ps(scaled);
                for (sum, value) in sums.iter_mut().zip(rgb) {
                    sum[i] = blend(gray, value, by);
                }
            }
            store32(r, narrow32(sums[0]));
            store32(g, narrow32(sums[1]));
            store32(b, narrow32(sums[2]));
        }
        for_columns([r_rest, g_rest, b_rest], Saturation(factor));
    }
}

#[target_feature(enable = "avx2")]
fn gray(view: &mut [u8], side: usize) {
    for row in view.chunks_exact_mut(3 * side) {
        let [(r, r_rest), (g, g_rest), (b, b_rest)] = planes_mut(row, side);
        for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
            let parts = [eights(r), eights(g), eights(b)];
            let mut sums = [_mm256_setzero_si256(); 4];
            for (i, sum) in sums.iter_mut().enumerate() {
                let [r, g, b] = floats([parts[0][i], parts[1][i], parts[2][i]]);
                *sum = _mm256_srli_epi32::<16>(_mm256_cvttps_epi32(luma(r, g, b)));
            }
            let gray = narrow32(sums);
            store32(r, gray);
            store32(g, gray);
            store32(b, gray);
        }
        for_columns([r_rest, g_rest, b_rest], Gray);
    }
}

#[target_feature(enable = "avx2")]
fn hue(view: &mut [u8], side: usize, shift: u8) {
    for row in view.chunks_exact_mut(3 * side) {
        let [(r, r_rest), (g, g_rest), (b, b_rest)] = planes_mut(row, side);
        for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
            let turned = turn([load32(r), load32(g), load32(b)], shift);
            store32(r, turned[0]);
            store32(g, turned[1]);
            store32(b, turned[2]);
        }
        for_columns([r_rest, g_rest, b_rest], Hue(shift));
    }
}

/// [`super::color::turn`] of 32 pixels.
#[inline]
#[target_feature(enable = "avx2")]
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
#[target_feature(enable = "avx2")]
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
    let turns = _mm256_div_ps(sixths, _mm256_set1_ps(6.0));
    let turns = _mm256_add_ps(turns, _mm256_and_ps(below, one));
    let hue = _mm256_cvttps_epi32(_mm256_mul_ps(turns, full));
    let hue = _mm256_and_si256(_mm256_add_epi32(hue, _mm256_set1_epi32(i32::from(shift))), all);
    let value = _mm256_max_ps(_mm256_cvtepi32_ps(most), one);
    let saturation = _mm256_cvttps_epi32(_mm256_div_ps(_mm256_mul_ps(range, full), value));

    let hue6 = _mm256_mullo_epi32(hue, _mm256_set1_epi32(6));
    let sector = _mm256_add_epi32(hue6, _mm256_set1_epi32(1));
    let sector = _mm256_mullo_epi32(sector, _mm256_set1_epi32(257));
    let sector = _mm256_srli_epi32::<16>(sector);
    let within = _mm256_sub_epi32(hue6, _mm256_mullo_epi32(sector, all));
    let odd = _mm256_castsi256_ps(_mm256_slli_epi32::<31>(sector));
    let even_away = _mm256_castsi256_ps(_mm256_sub_epi32(all, within));
    let away = _mm256_blendv_ps(even_away, _mm256_castsi256_ps(within), odd);
    let away = _mm256_castps_si256(away);

    let low = _mm256_mullo_epi32(most, _mm256_sub_epi32(all, saturation));
    let low = _mm256_add_epi32(low, _mm256_set1_epi32(128));
    let low = _mm256_add_epi32(low, _mm256_srli_epi32::<8>(low));
    // Its second byte is the quotient: left where it is.
    let low = _mm256_and_si256(low, _mm256_set1_epi32(0xFF00));
    let middle = _mm256_sub_epi32(square, _mm256_mullo_epi32(saturation, away));
    let middle = _mm256_cvtepi32_ps(_mm256_mullo_epi32(middle, most));
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

/// Bits of the lower part of a split weight.
const SPLIT: i32 = 10;

#[target_feature(enable = "avx2")]
fn gaussian(view: &mut [u8], side: usize, kernel: Kernel, scratch: &mut super::blur::Scratch) {
    let pair = |full: u32, far: u32| _mm256_set1_epi32((full | far << 16) as i32);
    let mask = (1 << SPLIT) - 1;
    let weights = Split {
        high: pair(kernel.full >> SPLIT, kernel.far >> SPLIT),
        low: pair(kernel.full & mask, kernel.far & mask),
    };
    match kernel.radius {
        0 => passes::<0>(view, side, weights, scratch),
        _ => passes::<1>(view, side, weights, scratch),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn passes<const RADIUS: usize>(
    view: &mut [u8],
    side: usize,
    weights: Split,
    scratch: &mut super::blur::Scratch,
) {
    let ([first, second], other) = scratch.lines_and_image(side, view.len());
    for (from, to) in view.chunks_exact(side).zip(other.chunks_exact_mut(side)) {
        line::<RADIUS>(from, weights, [&mut *first, &mut *second], to);
    }
    columns::<RADIUS>(other, 3 * side, weights, view);
    columns::<RADIUS>(view, 3 * side, weights, other);
    columns::<RADIUS>(other, 3 * side, weights, view);
    debug_assert_eq!(PASSES, 3, "the passes are written out");
}

/// Three passes along one line. `lines` have room for it, its margins and a vector more.
#[inline]
#[target_feature(enable = "avx2")]
fn line<const RADIUS: usize>(
    from: &[u8],
    weights: Split,
    [first, second]: [&mut [u8]; 2],
    to: &mut [u8],
) {
    let (n, margin) = (from.len(), RADIUS + 1);
    first[margin..margin + n].copy_from_slice(from);
    for pass in 0..PASSES {
        let (source, target): (&mut [u8], &mut [u8]) =
            if pass % 2 == 0 { (first, second) } else { (second, first) };
        let (left, right) = (source[margin], source[margin + n - 1]);
        source[..margin].fill(left);
        source[margin + n..][..margin].fill(right);
        for start in (0..n).step_by(LANES) {
            let taps =
                std::array::from_fn(|tap| source[start + tap.min(2 * margin)..].first_chunk());
            let Some(to) = target[margin + start..].first_chunk_mut() else { break };
            store32(to, weigh::<RADIUS>(taps, weights));
        }
    }
    to.copy_from_slice(&second[margin..margin + n]);
}

/// One pass along the columns of rows of `stride` bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn columns<const RADIUS: usize>(from: &[u8], stride: usize, weights: Split, to: &mut [u8]) {
    let last = from.len() / stride - 1;
    for (y, to) in to.chunks_exact_mut(stride).enumerate() {
        // Beyond the first and the last row stand those rows.
        let mut rows = [from; 5];
        for (tap, row) in rows[..2 * RADIUS + 3].iter_mut().enumerate() {
            let y = (y + tap).saturating_sub(RADIUS + 1).min(last);
            *row = &from[y * stride..][..stride];
        }
        // The last vector overlaps the one before it.
        let starts = (0..stride / LANES).map(|i| i * LANES);
        for start in starts.chain([stride - LANES]) {
            let taps = rows.map(|row| row[start..].first_chunk());
            let Some(to) = to[start..].first_chunk_mut() else { break };
            store32(to, weigh::<RADIUS>(taps, weights));
        }
    }
}

/// `2 * RADIUS + 3` taps of 32 bytes: the outer two weigh `far`, the others `full`.
#[inline]
#[target_feature(enable = "avx2")]
fn weigh<const RADIUS: usize>(taps: [Option<&[u8; LANES]>; 5], weights: Split) -> __m256i {
    let halves = |tap: usize| match taps[tap] {
        Some(bytes) => {
            let (parts, _) = bytes.as_chunks::<16>();
            [widen16(&parts[0]), widen16(&parts[1])]
        }
        None => [_mm256_setzero_si256(); 2],
    };
    let (left, right) = (halves(0), halves(2 * RADIUS + 2));
    let mut sums = [_mm256_setzero_si256(); 2];
    let mut inner = halves(1);
    for tap in 2..2 * RADIUS + 2 {
        let more = halves(tap);
        inner = [_mm256_add_epi16(inner[0], more[0]), _mm256_add_epi16(inner[1], more[1])];
    }
    for half in 0..2 {
        let ends = _mm256_add_epi16(left[half], right[half]);
        let low = weighted(_mm256_unpacklo_epi16(inner[half], ends), weights);
        let high = weighted(_mm256_unpackhi_epi16(inner[half], ends), weights);
        sums[half] = _mm256_packs_epi32(low, high);
    }
    let mixed = _mm256_packus_epi16(sums[0], sums[1]);
    _mm256_permute4x64_epi64::<0b11_01_10_00>(mixed)
}

/// Pairs (inner sum, sum of the ends) times (full, far), rounded to 2^24: in two products, because a
/// weight has 24 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn weighted(pairs: __m256i, weights: Split) -> __m256i {
    let high = _mm256_madd_epi16(pairs, weights.high);
    let low = _mm256_srli_epi32::<SPLIT>(_mm256_madd_epi16(pairs, weights.low));
    let half = _mm256_set1_epi32(1 << (23 - SPLIT));
    let sum = _mm256_add_epi32(_mm256_add_epi32(high, half), low);
    _mm256_srli_epi32::<{ 24 - SPLIT }>(sum)
}
