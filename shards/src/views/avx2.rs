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

mod blur;
mod color;
mod resize;

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::*;

use super::blur::{Kernel, RADIUS_MAX, Scratch};
use super::color as plain;
use super::geometry::{Axis, Column, Pair, ROWS, Ring};
use super::plan::Op;
use super::planes::Planes;

/// Proof that this CPU has AVX2 and FMA, as all have since 2015.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(());

/// Bytes of a vector.
const LANES: usize = 32;

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
        scratch: &mut Scratch,
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
                unsafe { color::saturation(view, factor) }
            }
            Op::Hue(turns) => self.hue(view, plain::shift(turns)),
            Op::Gray if view.is_gray() => {} // gray's luma is itself
            // SAFETY: as above.
            Op::Gray => unsafe { color::gray(view) },
            Op::Blur(sigma) => {
                let kernel = Kernel::gaussian(sigma);
                if kernel.radius > RADIUS_MAX {
                    return false;
                }
                // SAFETY: as above.
                unsafe { blur::gaussian(view, kernel, within, scratch) };
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
        let sum = unsafe { color::luma_sum(view) };
        plain::mean(sum, view.pixels())
    }

    /// As `color::brightness`, and as the second half of `color::contrast`.
    #[inline(always)]
    pub(super) fn blend_flat(self, view: &mut Planes, from: u8, factor: f32) {
        let planes = if view.is_gray() { 1 } else { 3 };
        for plane in view.padded().into_iter().take(planes) {
            // SAFETY: the CPU has AVX2: `self` proves it.
            unsafe { color::blend_flat(plane, from, factor) }
        }
    }

    /// As `color::hue`, by a shift of 8 bits.
    #[inline(always)]
    pub(super) fn hue(self, view: &mut Planes, shift: u8) {
        view.spread();
        // SAFETY: the CPU has AVX2 and FMA: `self` proves it.
        unsafe { color::hue(view, shift) }
    }

    /// As `geometry::transpose`.
    #[inline(always)]
    pub(super) fn transpose(self, rows: [&[u8]; ROWS], lines: &mut [Column]) {
        // SAFETY: the CPU has AVX2: `self` proves it.
        unsafe { resize::transpose(rows, lines) }
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
        unsafe { resize::horizontal_pass(lines, axis, plane, out) }
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
        unsafe { resize::across_rows(rows, start, pairs, plane, out) }
    }

    /// As `geometry::interleave`, of at least 16 columns.
    #[inline(always)]
    pub(super) fn interleave(self, planes: [&[u8]; 3], mirrored: bool, out: &mut [u8]) {
        // SAFETY: the CPU has AVX2: `self` proves it.
        unsafe { resize::interleave(planes, mirrored, out) }
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
