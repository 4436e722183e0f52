//! Crop, resize and transposition with AVX2, as in [`geometry`].

use std::arch::x86_64::*;

use super::super::geometry::{self, Axis, Column, HALF, Pair, ROWS, Ring, SPLIT, WEIGHT_BITS};
use super::{LANES, load16, load32, store16, store32};

/// Columns of the horizontal pass that are brought into planes together.
const BLOCK: usize = 16;

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

/// Sixteen rows, side by side: blocks of 16 x 16 bytes are transposed, three for 16 pixels.
#[target_feature(enable = "avx2")]
pub(super) fn transpose(rows: [&[u8]; ROWS], lines: &mut [Column]) {
    let width = rows[0].len() / 3;
    if width < BLOCK {
        return geometry::transpose(rows, lines);
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
pub(super) fn horizontal_pass(lines: &[Column], axis: &Axis, plane: usize, out: &mut [u8]) {
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
pub(super) fn across_rows(
    rows: Ring<'_>,
    start: usize,
    pairs: &[Pair],
    plane: usize,
    out: [&mut [u8]; 3],
) {
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
pub(super) fn interleave(planes: [&[u8]; 3], mirrored: bool, out: &mut [u8]) {
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
