//! Pixels and a plan in, a view out.

use super::plan::{LocalPlan, Op, ViewPlan};
use super::recipe::{CELLS, GRID};
use super::{blur, color, geometry};
use crate::decode::Image;

/// Renders plans. Holds the scratch memory of one thread, which stops growing after the largest
/// image and view have been seen.
#[derive(Debug, Default)]
pub struct Renderer {
    geometry: geometry::Scratch,
    blur: blur::Scratch,
    /// The whole local image before the cut, `[size, size, 3]`.
    whole: Vec<u8>,
}

impl Renderer {
    /// A renderer with empty scratch memory.
    pub fn new() -> Renderer {
        Renderer::default()
    }

    /// Renders a global view into `out`, `[size, size, 3]`.
    ///
    /// # Panics
    /// Where `out` has another length, or `plan` was drawn for an image of another size.
    pub fn global(&mut self, image: &Image, plan: &ViewPlan, out: &mut [u8]) {
        let side = plan.size as usize;
        assert_eq!(out.len(), side * side * 3, "a global view is [{side}, {side}, 3]");
        self.geometry.crop_resize(image, plan.crop, side, out);
        for op in &plan.ops {
            self.apply(*op, side, out);
        }
        if plan.flip {
            geometry::flip(out, side);
        }
    }

    /// Renders a local view into `out`, `[9, patch, patch, 3]`: the nine patches in plan order.
    ///
    /// # Panics
    /// Where `out` has another length, `plan` was drawn for an image of another size, or a patch
    /// leaves its cell.
    pub fn local(&mut self, image: &Image, plan: &LocalPlan, out: &mut [u8]) {
        let (side, patch) = (plan.whole.size as usize, plan.patch as usize);
        assert_eq!(
            out.len(),
            CELLS as usize * patch * patch * 3,
            "a local view is [9, {patch}, {patch}, 3]"
        );
        // Taken out for the borrow checker; put back below, so that its memory is kept.
        let mut whole = std::mem::take(&mut self.whole);
        whole.resize(side * side * 3, 0);
        self.global(image, &plan.whole, &mut whole);
        let cell_side = side / GRID as usize;
        for (slot, cell) in out.chunks_exact_mut(patch * patch * 3).zip(plan.order) {
            let cell = usize::from(cell);
            let [left, top] = plan.offsets[cell].map(|offset| offset as usize);
            assert!(
                left.max(top) + patch <= cell_side,
                "a patch of {patch} at ({left}, {top}) leaves its cell of {cell_side}"
            );
            let left = cell % GRID as usize * cell_side + left;
            let top = cell / GRID as usize * cell_side + top;
            for (to, from) in
                slot.chunks_exact_mut(patch * 3).zip(whole.chunks_exact(side * 3).skip(top))
            {
                to.copy_from_slice(&from[left * 3..(left + patch) * 3]);
            }
        }
        self.whole = whole;
    }

    fn apply(&mut self, op: Op, side: usize, pixels: &mut [u8]) {
        match op {
            Op::Brightness(factor) => color::brightness(pixels, factor),
            Op::Contrast(factor) => color::contrast(pixels, factor),
            Op::Saturation(factor) => color::saturation(pixels, factor),
            Op::Hue(turns) => color::hue(pixels, turns),
            Op::Gray => color::gray(pixels),
            Op::Blur(sigma) => self.blur.gaussian(pixels, side, sigma),
        }
    }
}
