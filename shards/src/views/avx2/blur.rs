//! Gaussian blur with AVX2, as in [`blur`](super::super::blur).

use std::arch::x86_64::*;

use super::super::blur::{Kernel, PASSES, RADIUS_MAX, RING, ROOM, Rings, Scratch, TOGETHER};
use super::super::planes::Planes;
use super::{load16, store16};

/// 16-bit values of a vector.
const WORDS: usize = 16;

/// Values of a line that a vector of a blurred line is made of, or more.
const WINDOW: usize = WORDS + 2 * (RADIUS_MAX + 1);

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

/// The weights of a box, split so that products fit 16 bits: pairs (full, far).
#[derive(Clone, Copy)]
struct Split {
    high: __m256i,
    low: __m256i,
}

/// Bits of the lower part of a box's weight.
const BOX_SPLIT: i32 = 10;

#[target_feature(enable = "avx2")]
pub(super) fn gaussian(
    view: &mut Planes,
    kernel: Kernel,
    within: [usize; 4],
    scratch: &mut Scratch,
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
    scratch: &mut Scratch,
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
