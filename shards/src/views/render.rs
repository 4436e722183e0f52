//! Pixels and a plan in, a view out.

use super::plan::{LocalPlan, Op, ViewPlan};
use super::recipe::{CELLS, GRID};
use super::{Vectors, blur, color, geometry, randaugment};
use crate::decode::Frame;

/// Renders plans. Holds the scratch memory of one thread, which stops growing after the largest
/// image and view have been seen.
#[derive(Debug)]
pub struct Renderer {
    vectors: Vectors,
    geometry: geometry::Scratch,
    blur: blur::Scratch,
    randaugment: randaugment::Scratch,
    /// The view that is worked on, row-planar, `[size, 3, size]`.
    view: Vec<u8>,
}

impl Renderer {
    /// A renderer with empty scratch memory.
    pub fn new() -> Renderer {
        Renderer::with(Vectors::detect())
    }

    /// A renderer in plain loops, for any CPU: the same bytes, more slowly.
    pub fn plain() -> Renderer {
        Renderer::with(Vectors::Plain)
    }

    fn with(vectors: Vectors) -> Renderer {
        Renderer {
            vectors,
            geometry: geometry::Scratch::default(),
            blur: blur::Scratch::default(),
            randaugment: randaugment::Scratch::default(),
            view: Vec::new(),
        }
    }

    /// Renders a global view of an [`Image`](crate::decode::Image), or of as much of it as was
    /// decoded, into `out`, `[size, size, 3]`.
    ///
    /// # Panics
    /// Where `out` has another length, or the plan's box is not in the frame.
    pub fn global<'a>(&mut self, frame: impl Into<Frame<'a>>, plan: &ViewPlan, out: &mut [u8]) {
        let side = plan.size as usize;
        assert_eq!(out.len(), side * side * 3, "a global view is [{side}, {side}, 3]");
        self.render(frame.into(), plan);
        for (row, out) in self.view.chunks_exact(3 * side).zip(out.chunks_exact_mut(3 * side)) {
            geometry::interleave(row, 0..side, plan.flip, self.vectors, out);
        }
    }

    /// Renders a local view into `out`, `[9, patch, patch, 3]`: the nine patches in plan order.
    ///
    /// # Panics
    /// Where `out` has another length, the plan's box is not in the frame, or a patch leaves its
    /// cell.
    pub fn local<'a>(&mut self, frame: impl Into<Frame<'a>>, plan: &LocalPlan, out: &mut [u8]) {
        let (side, patch) = (plan.whole.size as usize, plan.patch as usize);
        assert_eq!(
            out.len(),
            CELLS as usize * patch * patch * 3,
            "a local view is [9, {patch}, {patch}, 3]"
        );
        self.render(frame.into(), &plan.whole);
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
            let rows = self.view.chunks_exact(side * 3).skip(top);
            for (row, out) in rows.zip(slot.chunks_exact_mut(patch * 3)) {
                geometry::interleave(row, left..left + patch, plan.whole.flip, self.vectors, out);
            }
        }
    }

    /// Everything but the flip, into `self.view`.
    fn render(&mut self, frame: Frame<'_>, plan: &ViewPlan) {
        match self.vectors {
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx2(_) => {
                #[expect(unsafe_code, reason = "the same code, compiled for AVX2")]
                // SAFETY: this CPU has AVX2: the value proves it.
                unsafe {
                    self.render_avx2(frame, plan);
                }
            }
            Vectors::Plain => self.render_any(frame, plan),
        }
    }

    /// [`Renderer::render_any`] with vectors of 32 bytes instead of 16: half the time.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn render_avx2(&mut self, frame: Frame<'_>, plan: &ViewPlan) {
        self.render_any(frame, plan);
    }

    // Always inlined, as is everything it calls: code is compiled for the caller's vectors.
    #[inline(always)]
    fn render_any(&mut self, frame: Frame<'_>, plan: &ViewPlan) {
        let side = plan.size as usize;
        self.view.resize(side * side * 3, 0);
        let view = &mut self.view[..];
        self.geometry.crop_resize(frame, plan.crop, side, self.vectors, view);
        for op in &plan.ops {
            #[cfg(target_arch = "x86_64")]
            if let Vectors::Avx2(avx2) = self.vectors
                && avx2.apply(op, view, side, &mut self.blur)
            {
                continue;
            }
            match *op {
                Op::Brightness(factor) => color::brightness(view, factor),
                Op::Contrast(factor) => color::contrast(view, side, factor),
                Op::Saturation(factor) => color::saturation(view, side, factor),
                Op::Hue(turns) => color::hue(view, side, turns),
                Op::Gray => color::gray(view, side),
                Op::Blur(sigma) => self.blur.gaussian(view, side, sigma),
                Op::AutoContrast => randaugment::auto_contrast(view, side),
                Op::Equalize => randaugment::equalize(view, side),
                Op::Invert => randaugment::invert(view),
                Op::Posterize(bits) => randaugment::posterize(view, bits),
                Op::Solarize(threshold) => randaugment::solarize(view, threshold),
                Op::SolarizeAdd(add) => randaugment::solarize_add(view, add),
                Op::Sharpness(factor) => self.randaugment.sharpness(view, side, factor),
                Op::Affine { matrix, bicubic } => {
                    self.randaugment.affine(view, side, matrix, bicubic);
                }
            }
        }
    }
}

impl Default for Renderer {
    fn default() -> Renderer {
        Renderer::new()
    }
}
