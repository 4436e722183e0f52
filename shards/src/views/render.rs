//! The renderer: from pixels and a plan to a view.

use super::plan::{GridPlan, Op, ViewPlan};
use super::planes::Planes;
use super::{Filter, Vectors, blur, color, geometry, randaugment};
use crate::decode::{Frame, Image, Rect};

/// Renders plans. Holds the scratch memory of one thread, which stops growing after the largest
/// image and view have been seen.
#[derive(Debug)]
pub struct Renderer {
    vectors: Vectors,
    geometry: geometry::Scratch,
    scratch: Scratch,
    /// The view in work.
    view: Planes,
    /// A patch of it, with the pixels within its blur radius.
    patch: Planes,
    /// A picture that was resized as a whole.
    resized: Image,
}

/// Memory of the operations.
#[derive(Debug, Default)]
struct Scratch {
    blur: blur::Scratch,
    randaugment: randaugment::Scratch,
}

impl Renderer {
    /// A renderer with empty scratch memory and the best instructions of this processor, or those that
    /// the variable `DETCO_SIMD` names ([`check_simd`](super::check_simd)).
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
            scratch: Scratch::default(),
            view: Planes::default(),
            patch: Planes::default(),
            resized: Image::new(),
        }
    }

    /// Renders a view of an [`Image`], or of as much of it as was decoded, into
    /// `out`: `[size, size, 3]`, or the patches in plan order, `[patches, patch, patch, 3]`.
    ///
    /// # Panics
    /// Where `out` has another length, the plan's box is not in the frame, or a patch leaves its cell.
    pub fn view<'a>(&mut self, frame: impl Into<Frame<'a>>, plan: &ViewPlan, out: &mut [u8]) {
        assert_eq!(out.len(), plan.bytes(), "bytes of a view");
        match self.vectors {
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx2(_) => {
                #[expect(unsafe_code, reason = "the same code, compiled for AVX2")]
                // SAFETY: this CPU has AVX2: the value proves it.
                unsafe {
                    self.view_avx2(frame.into(), plan, out);
                }
            }
            Vectors::Plain => self.view_any(frame.into(), plan, out),
        }
    }

    /// [`Renderer::view_any`] with vectors of 32 bytes instead of 16: half the time.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn view_avx2(&mut self, frame: Frame<'_>, plan: &ViewPlan, out: &mut [u8]) {
        self.view_any(frame, plan, out);
    }

    /// Cuts a box out of an image and resizes it to `sides` (width, height), as Pillow does: `out` is
    /// `[height, width, 3]`, and pixels outside the box are not looked at.
    ///
    /// # Panics
    /// Where `out` has another length, a side is 0, or the box is empty or leaves the image.
    pub fn resize(
        &mut self,
        image: &Image,
        crop: Rect,
        filter: Filter,
        sides: [u32; 2],
        out: &mut [u8],
    ) {
        let [width, height] = sides.map(|side| side as usize);
        assert!(width > 0 && height > 0 && out.len() == 3 * width * height, "{sides:?}");
        let to = (filter, [width, height]);
        match self.vectors {
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx2(_) => {
                #[expect(unsafe_code, reason = "the same code, compiled for AVX2")]
                // SAFETY: this CPU has AVX2: the value proves it.
                unsafe {
                    self.resize_avx2(image, crop, to, out);
                }
            }
            Vectors::Plain => self.resize_any(image, crop, to, out),
        }
    }

    /// [`Renderer::resize_any`] with vectors of 32 bytes.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn resize_avx2(&mut self, image: &Image, crop: Rect, to: (Filter, [usize; 2]), out: &mut [u8]) {
        self.resize_any(image, crop, to, out);
    }

    #[inline(always)]
    fn resize_any(&mut self, image: &Image, crop: Rect, to: (Filter, [usize; 2]), out: &mut [u8]) {
        self.geometry.crop_resize(image.into(), crop, to, self.vectors, &mut self.view);
        for (y, row) in out.chunks_exact_mut(3 * to.1[0]).enumerate() {
            geometry::interleave(self.view.row(y), false, self.vectors, row);
        }
    }

    // Always inlined, as is everything it calls: code is compiled for the caller's vectors.
    #[inline(always)]
    fn view_any(&mut self, frame: Frame<'_>, plan: &ViewPlan, out: &mut [u8]) {
        if let Some(sides) = plan.resized {
            self.resize_whole(frame, plan, sides);
        }
        let frame = if plan.resized.is_some() { Frame::from(&self.resized) } else { frame };
        let to = (plan.filter, [plan.size as usize; 2]);
        self.geometry.crop_resize(frame, plan.crop, to, self.vectors, &mut self.view);
        match &plan.grid {
            None => self.whole(plan, out),
            Some(grid) => self.patches(plan, grid, out),
        }
    }

    /// The whole picture to these sides, rounded to bytes.
    #[inline(always)]
    fn resize_whole(&mut self, frame: Frame<'_>, plan: &ViewPlan, sides: [u32; 2]) {
        [self.resized.width, self.resized.height] = sides;
        let [width, height] = sides.map(|side| side as usize);
        let to = (plan.filter, [width, height]);
        self.geometry.crop_resize(frame, plan.whole(), to, self.vectors, &mut self.view);
        let pixels = &mut self.resized.pixels;
        pixels.resize(3 * width * height, 0);
        for (y, row) in pixels.chunks_exact_mut(3 * width).enumerate() {
            geometry::interleave(self.view.row(y), false, self.vectors, row);
        }
    }

    #[inline(always)]
    fn whole(&mut self, plan: &ViewPlan, out: &mut [u8]) {
        let side = plan.size as usize;
        for op in &plan.ops {
            self.scratch.apply(op, [0, 0, side, side], self.vectors, &mut self.view);
        }
        for (y, out) in out.chunks_exact_mut(3 * side).enumerate() {
            geometry::interleave(self.view.row(y), plan.flip, self.vectors, out);
        }
    }

    #[inline(always)]
    fn patches(&mut self, plan: &ViewPlan, grid: &GridPlan, out: &mut [u8]) {
        let ViewPlan { size, ref ops, flip, .. } = *plan;
        let (side, patch, vectors) = (size as usize, grid.patch as usize, self.vectors);
        let (first, tail) = split(ops, vectors);
        for op in first {
            self.scratch.apply(op, [0, 0, side, side], vectors, &mut self.view);
        }
        let blend = tail.contrast.map(|factor| (mean(vectors, &mut self.view), factor));
        let cells = grid.cells as usize;
        let cell_side = side / cells;
        for (slot, cell) in out.chunks_exact_mut(patch * patch * 3).zip(&grid.order) {
            let cell = usize::from(*cell);
            let [left, top] = grid.offsets[cell].map(|offset| offset as usize);
            assert!(
                left.max(top) + patch <= cell_side,
                "a patch of {patch} at ({left}, {top}) leaves its cell of {cell_side}"
            );
            let left = cell % cells * cell_side + left;
            let top = cell / cells * cell_side + top;
            // Places count in the mirrored view.
            let left = if flip { side - left - patch } else { left };
            let [x, y] = self.cut([left, top], patch, tail.reach);
            if let Some((mean, factor)) = blend {
                blend_flat(vectors, &mut self.patch, mean, factor);
            }
            for op in tail.ops {
                self.scratch.apply(op, [x, y, patch, patch], vectors, &mut self.patch);
            }
            for (row, out) in slot.chunks_exact_mut(patch * 3).enumerate() {
                let row = self.patch.row(y + row).map(|channel| &channel[x..x + patch]);
                geometry::interleave(row, flip, vectors, out);
            }
        }
    }

    /// Sets `self.patch` to the patch at `[left, top]` and as much of the view around it as `reach` says;
    /// returns where in it the patch lies.
    #[inline(always)]
    fn cut(&mut self, [left, top]: [usize; 2], patch: usize, reach: usize) -> [usize; 2] {
        let side = self.view.width();
        let [x, y] = [left, top].map(|at| at.min(reach));
        let [right, bottom] = [left, top].map(|at| (at + patch + reach).min(side));
        let [left, top] = [left - x, top - y];
        self.patch.cut(&self.view, [left, top, right - left, bottom - top]);
        [x, y]
    }
}

/// Operations at the end of a plan that are applied to each patch separately.
#[derive(Debug, Clone, Copy)]
struct Tail<'a> {
    /// The factor of a contrast before them. It comes in two parts: the mean of the whole view, and the
    /// blend with it.
    contrast: Option<f32>,
    ops: &'a [Op],
    /// The one blur among them depends on so many pixels around a patch.
    reach: usize,
}

/// Splits a plan's operations into those on the whole view and those on its patches, which cover three fifths
/// of it. Plain loops apply all of them to the whole view, as the reference.
#[inline(always)]
fn split(ops: &[Op], vectors: Vectors) -> (&[Op], Tail<'_>) {
    let (mut first, mut contrast, mut reach) = (ops, None, 0);
    while let Some((op, before)) = first.split_last() {
        match *op {
            _ if matches!(vectors, Vectors::Plain) => break,
            Op::Brightness(_) | Op::Saturation(_) | Op::Hue(_) | Op::Gray => {}
            Op::Blur(sigma) => match blur::reach(sigma) {
                Some(pixels) if reach == 0 => reach = pixels,
                _ => break,
            },
            Op::Contrast(factor) => contrast = Some(factor),
            _ => break,
        }
        first = before;
        if contrast.is_some() {
            return (first, Tail { contrast, ops: &ops[first.len() + 1..], reach });
        }
    }
    (first, Tail { contrast, ops: &ops[first.len()..], reach })
}

#[inline(always)]
fn mean(vectors: Vectors, view: &mut Planes) -> u8 {
    match vectors {
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2(avx2) => avx2.mean(view),
        Vectors::Plain => color::luma_mean(view),
    }
}

#[inline(always)]
fn blend_flat(vectors: Vectors, view: &mut Planes, from: u8, factor: f32) {
    match vectors {
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2(avx2) => avx2.blend_flat(view, from, factor),
        Vectors::Plain => color::blend_flat(view, from, factor),
    }
}

impl Scratch {
    /// Applies `op` to a picture. A blur covers the box `within`, `[left, top, width, height]`, and may clobber
    /// pixels around it.
    #[inline(always)]
    fn apply(&mut self, op: &Op, within: [usize; 4], vectors: Vectors, view: &mut Planes) {
        #[cfg(target_arch = "x86_64")]
        if let Vectors::Avx2(avx2) = vectors {
            if avx2.apply(op, within, view, &mut self.blur) {
                return;
            }
            view.spread();
        }
        match *op {
            Op::Brightness(factor) => color::brightness(view, factor),
            Op::Contrast(factor) => color::contrast(view, factor),
            Op::Saturation(factor) => color::saturation(view, factor),
            Op::Hue(turns) => color::hue(view, turns),
            Op::Gray => color::gray(view),
            Op::Blur(sigma) => self.blur.gaussian(view, sigma),
            Op::AutoContrast => randaugment::auto_contrast(view),
            Op::Equalize => randaugment::equalize(view),
            Op::Invert => randaugment::invert(view),
            Op::Posterize(bits) => randaugment::posterize(view, bits),
            Op::Solarize(threshold) => randaugment::solarize(view, threshold),
            Op::SolarizeAdd(add) => randaugment::solarize_add(view, add),
            Op::Flip => geometry::mirror(view),
            Op::Sharpness(factor) => self.randaugment.sharpness(view, factor),
            Op::Affine { matrix, bicubic } => self.randaugment.affine(view, matrix, bicubic),
        }
    }
}

impl Default for Renderer {
    fn default() -> Renderer {
        Renderer::new()
    }
}
