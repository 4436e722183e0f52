//! Changes of colour with AVX2, as in [`color`].

use std::arch::x86_64::*;

use super::super::color;
use super::super::planes::Planes;
use super::{LANES, load32, store32};

#[target_feature(enable = "avx2")]
pub(super) fn blend_flat(plane: &mut [u8], from: u8, factor: f32) {
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
pub(super) fn luma_sum(view: &mut Planes) -> u64 {
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
pub(super) fn saturation(view: &mut Planes, factor: f32) {
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
pub(super) fn gray(view: &mut Planes) {
    for_pixels(view, |[red, green, blue]| {
        let lumas = lumas([words(load32(red)), words(load32(green)), words(load32(blue))]);
        store32(red, bytes(lumas));
    });
    view.set_gray();
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn hue(view: &mut Planes, shift: u8) {
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
