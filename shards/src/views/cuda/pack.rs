//! Plans as the kernels read them: the structures of `kernels/view.h`, field by field, and how the
//! memory of a block is laid out.

use super::super::blur::Kernel;
use super::super::color;
use super::super::crop::Filter;
use super::super::grid::{CELLS_MAX, PATCHES_MAX};
use super::super::plan::{GridPlan, Op, ViewPlan};
use super::{BatchShape, DeviceFrame, DeviceViewsError, Element, Item};
use crate::cuda::{Device, DeviceSlice, Launch, Limits};

/// Words of 4 bytes of a `View`.
const VIEW_WORDS: usize = 28;
/// Words of an `Op`.
const OP_WORDS: usize = 5;
/// Threads of the smallest block, and of the largest, as the kernel's launch bounds say: a blur
/// gives each of 3 x 256 lines its thread, and with more the compiler would run out of registers.
const THREADS: (u32, u32) = (128, 768);
/// Pixels of a view for each thread, at least: fewer would mostly wait for each other.
const PIXELS_PER_THREAD: u32 = 8;
/// Shared memory that the compiler and the driver take for themselves.
const SHARED_RESERVED: u32 = 2048;
/// Bytes of the table of outputs; `TABLE_BYTES` of `view.h`.
const TABLE_BYTES: u32 = 3 * 256 * 4;
/// Shared memory that does not depend on the views: the table, and counts of as many bytes.
const FIXED_BYTES: u32 = 2 * TABLE_BYTES;
/// Bytes of a `Span` of `view.h`, for both axes.
const SPAN_BYTES: u32 = 2 * 8;
/// Words of a `Matrix`: six doubles.
const MATRIX_WORDS: usize = 12;
/// The widest blur, in pixels of standard deviation: ten times what a recipe may ask for.
const SIGMA_MAX: f32 = 1000.0;
/// Largest side of a view: a patch's place takes 16 bits, and sums of luma 32.
const SIDE_MAX: u32 = 4096;

/// Whether the kernels have an operation.
pub(super) fn has(op: Op) -> bool {
    op_words(op, 0).is_some()
}

/// An operation; `matrices` have been packed before it.
fn op_words(op: Op, matrices: usize) -> Option<[u32; OP_WORDS]> {
    let blend = |kind, factor: f32| [kind, factor.to_bits(), 0, 0, 0];
    let number = |kind, a: u32| [kind, 0, a, 0, 0];
    Some(match op {
        Op::Brightness(factor) => blend(0, factor),
        Op::Contrast(factor) => blend(1, factor),
        Op::Saturation(factor) => blend(2, factor),
        Op::Hue(turns) => number(3, color::shift(turns).into()),
        Op::Gray => number(4, 0),
        Op::Blur(sigma) => {
            if !(0.0..=SIGMA_MAX).contains(&sigma) {
                return None;
            }
            let Kernel { radius, full, far } = Kernel::gaussian(sigma);
            [5, 0, full, far, radius as u32]
        }
        Op::Invert => number(6, 0),
        Op::Posterize(bits) => number(7, (0xFF00 >> bits.min(8)) & 0xFF),
        Op::Solarize(threshold) => number(8, threshold.into()),
        Op::SolarizeAdd(add) => number(9, add.into()),
        Op::AutoContrast => number(10, 0),
        Op::Equalize => number(11, 0),
        Op::Sharpness(factor) => blend(12, factor),
        Op::Affine { bicubic, .. } => [13, 0, matrices as u32, bicubic.into(), 0],
        Op::Flip => number(14, 0),
    })
}

/// A batch's views and operations in the kernels' words.
#[derive(Debug, Default)]
pub(super) struct Packed {
    views: Vec<u32>,
    matrices: Vec<u32>,
    ops: Vec<u32>,
    /// Largest side of a view.
    side_max: u32,
    /// Bytes of the views' pixels: the largest of all, and the largest but those of the largest's
    /// size.
    view_bytes: [u32; 2],
    /// Bytes of the weights of the view that has most.
    weight_bytes: u64,
    /// Whether some operation works from a copy of the view.
    copies: bool,
}

impl Packed {
    /// Packs all views of `items`.
    pub(super) fn fill(
        &mut self,
        shape: &BatchShape,
        items: &[Item<'_>],
        out: &[DeviceSlice<'_>],
    ) -> Result<(), DeviceViewsError> {
        *self = Packed {
            views: std::mem::take(&mut self.views),
            matrices: std::mem::take(&mut self.matrices),
            ops: std::mem::take(&mut self.ops),
            ..Packed::default()
        };
        self.views.clear();
        self.matrices.clear();
        self.ops.clear();
        let element = shape.element.bytes();
        expect("tensors of a batch", shape.views.len(), out.len())?;
        for (numbers, tensor) in shape.views.iter().zip(out) {
            expect("bytes of a view's tensor", shape.samples * numbers * element, tensor.len())?;
        }
        for item in items {
            at_most("the slot of a sample", item.slot, shape.samples.saturating_sub(1))?;
            expect("views of a plan", shape.views.len(), item.plan.views.len())?;
            for ((plan, numbers), tensor) in item.plan.views.iter().zip(&shape.views).zip(out) {
                expect("numbers of a view", *numbers, plan.bytes())?;
                let place = tensor.address() + (item.slot * numbers * element) as u64;
                self.push(&item.frame, plan, place)?;
            }
        }
        Ok(())
    }

    fn push(
        &mut self,
        frame: &DeviceFrame<'_>,
        plan: &ViewPlan,
        out: u64,
    ) -> Result<(), DeviceViewsError> {
        if plan.resized.is_some() {
            return Err(DeviceViewsError::Resized);
        }
        check_frame(frame, plan)?;
        at_most("the side of a view", plan.size as usize, SIDE_MAX as usize)?;
        let patch = plan.grid.as_ref().map(|grid| grid.patch);
        // A patch of 0 would mean none, to the kernel.
        if [plan.size, patch.unwrap_or(1)].contains(&0) {
            return Err(DeviceViewsError::Empty);
        }
        let first_op = self.ops.len() / OP_WORDS;
        let long = |value: u64| [value as u32, (value >> 32) as u32];
        for op in &plan.ops {
            let words = op_words(*op, self.matrices.len() / MATRIX_WORDS)
                .ok_or(DeviceViewsError::Unsupported { op: *op })?;
            self.ops.extend(words);
            self.copies |= match op {
                // Registers hold the inputs of a box of radius 1.
                Op::Blur(_) => words[4] > 1,
                Op::Sharpness(_) | Op::Affine { .. } | Op::Flip => true,
                _ => false,
            };
            if let Op::Affine { matrix, .. } = op {
                self.matrices.extend(matrix.iter().flat_map(|number| long(number.to_bits())));
            }
        }
        let (slots, count) = match &plan.grid {
            Some(grid) => (slots(grid, plan.size)?, grid.order.len() as u32),
            None => ([0; PATCHES_MAX], 1),
        };
        let taps =
            [plan.crop.width, plan.crop.height].map(|inputs| taps(inputs, plan.size, plan.filter));
        let start = self.views.len();
        self.views
            .extend([frame.pixels.address(), out, frame.pitch as u64].into_iter().flat_map(long));
        let crop = plan.crop;
        self.views.extend([crop.left, crop.top, crop.width, crop.height]);
        self.views.extend([plan.size, taps[0], first_op as u32, plan.ops.len() as u32]);
        self.views.extend([plan.flip.into(), patch.unwrap_or(0)]);
        self.views.extend(slots);
        self.views.extend([taps[1], count, u32::from(plan.filter == Filter::Bicubic)]);
        debug_assert_eq!(self.views.len() - start, VIEW_WORDS, "a View of view.h");

        self.side_max = self.side_max.max(plan.size);
        let weights = 4 * u64::from(plan.size) * u64::from(taps[0] + taps[1]);
        self.weight_bytes = self.weight_bytes.max(weights);
        let bytes = view_bytes(plan.size);
        let [largest, second] = &mut self.view_bytes;
        if bytes > *largest {
            (*second, *largest) = (*largest, bytes);
        } else if bytes < *largest {
            *second = bytes.max(*second);
        }
        Ok(())
    }

    fn views(&self) -> u32 {
        (self.views.len() / VIEW_WORDS) as u32
    }

    /// Bytes of everything.
    pub(super) fn bytes_len(&self) -> usize {
        4 * (self.views.len() + self.matrices.len() + self.ops.len())
    }

    /// Views, then matrices, which are aligned to 8 bytes there, then operations.
    pub(super) fn write(&self, out: &mut [u8]) {
        let words = self.views.iter().chain(&self.matrices).chain(&self.ops);
        for (bytes, word) in out.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
    }
}

/// That the crop lies in the frame, and the frame in its memory.
fn check_frame(frame: &DeviceFrame<'_>, plan: &ViewPlan) -> Result<(), DeviceViewsError> {
    let (crop, width, height) = (plan.crop, frame.width, frame.height);
    let inside = |from: u32, length: u32, of: u32| {
        length > 0 && from.checked_add(length).is_some_and(|end| end <= of)
    };
    if !inside(crop.left, crop.width, width) || !inside(crop.top, crop.height, height) {
        return Err(DeviceViewsError::Crop { crop, width, height });
    }
    let row = width as usize * 3;
    at_most("bytes of a row of the frame", row, frame.pitch)?;
    let rows = (height as usize - 1).checked_mul(frame.pitch);
    let bytes = rows.and_then(|rows| rows.checked_add(row)).unwrap_or(usize::MAX);
    at_most("bytes of the frame", bytes, frame.pixels.len())
}

/// Where in the flipped view of `size` pixels the patch of each slot lies: left and top, 16 bits each.
fn slots(grid: &GridPlan, size: u32) -> Result<[u32; PATCHES_MAX], DeviceViewsError> {
    let cells = grid.cells;
    at_most("cells of a grid along a side", cells as usize, CELLS_MAX as usize)?;
    let patches = (cells * cells) as usize;
    for len in [grid.offsets.len(), grid.order.len()] {
        expect("patches of a grid", patches, len)?;
    }
    if patches == 0 {
        return Err(DeviceViewsError::Empty);
    }
    let cell_side = size / cells;
    let mut slots = [0; PATCHES_MAX];
    for (slot, cell) in slots.iter_mut().zip(&grid.order) {
        at_most("a cell of the grid", (*cell).into(), patches - 1)?;
        let [left, top] = grid.offsets[usize::from(*cell)];
        let end = left.max(top).saturating_add(grid.patch);
        at_most("the end of a patch in its cell", end as usize, cell_side as usize)?;
        let cell = u32::from(*cell);
        *slot = (cell % cells * cell_side + left) | (cell / cells * cell_side + top) << 16;
    }
    Ok(slots)
}

/// The most inputs that an output covers: twice the reduction, for a cubic four times, and one for
/// where it begins. One more, because the kernel's sums round.
fn taps(inputs: u32, outputs: u32, filter: Filter) -> u32 {
    let pixels = match filter {
        Filter::Bilinear => 2.0,
        Filter::Bicubic => 4.0,
    };
    (pixels * (f64::from(inputs) / f64::from(outputs)).max(1.0)) as u32 + 2
}

/// Bytes of a view's pixels in a block's memory, rows `stride_of` (of `view.h`) bytes apart.
fn view_bytes(side: u32) -> u32 {
    3 * side * (4 * (side.div_ceil(4) | 1))
}

/// How the memory of a block is laid out, and what to launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) launch: Launch,
    /// Bytes of shared memory for a view and for weights.
    shared_view: u32,
    shared_weights: u32,
    /// In a block's scratch memory: where the weights begin, where a copy of the view, and its
    /// bytes.
    scratch_weights: u64,
    scratch_copy: u64,
    scratch_bytes: u64,
}

/// Dynamic shared memory that a block may have on a device.
pub(super) fn dynamic_shared(device: &Device) -> u32 {
    device.limits().shared_bytes_per_block.saturating_sub(SHARED_RESERVED)
}

impl Layout {
    pub(super) fn of(packed: &Packed, device: &Device) -> Layout {
        Layout::within(packed, device.limits())
    }

    /// For a device of these limits.
    pub(super) fn within(packed: &Packed, limits: Limits) -> Layout {
        let shared = limits.shared_bytes_per_block.saturating_sub(SHARED_RESERVED);
        let fixed = FIXED_BYTES + SPAN_BYTES * packed.side_max;
        let mut room = shared.saturating_sub(fixed);
        // The largest size of view that fits; larger ones are worked on in scratch memory.
        let fitting = packed.view_bytes.into_iter().find(|bytes| *bytes <= room);
        let shared_view = fitting.unwrap_or(0).next_multiple_of(16);
        room = room.saturating_sub(shared_view);
        let shared_weights =
            u32::try_from(packed.weight_bytes).ok().filter(|bytes| *bytes <= room).unwrap_or(0);

        let largest = u64::from(packed.view_bytes[0]);
        let scratch_view = if fitting == Some(packed.view_bytes[0]) { 0 } else { largest };
        let scratch_weights = scratch_view.next_multiple_of(256);
        let weights = if shared_weights == 0 { packed.weight_bytes } else { 0 };
        let scratch_copy = (scratch_weights + weights).next_multiple_of(256);
        let copy = if packed.copies { largest } else { 0 };
        let scratch_bytes = (scratch_copy + copy).next_multiple_of(256);

        let pixels = packed.side_max * packed.side_max;
        let (least, most) = THREADS;
        let threads = (pixels / PIXELS_PER_THREAD).next_multiple_of(32).clamp(least, most);
        let shared_bytes = fixed + shared_view + shared_weights;
        let by_shared = limits.shared_bytes_per_multiprocessor / (shared_bytes + SHARED_RESERVED);
        let each = by_shared.min(limits.threads_per_multiprocessor / threads).max(1);
        let views = packed.views();
        let mut blocks = views.min(each * limits.multiprocessors).max(1);
        // Blocks take the views in turn. DetCo's samples have two small and two large views: with an even
        // number of blocks half of them would get all the large ones.
        let two_sizes = packed.view_bytes[1] > 0;
        if two_sizes && views > blocks && blocks.is_multiple_of(2) {
            blocks -= 1;
        }
        Layout {
            launch: Launch { grid: [blocks, 1, 1], threads, shared_bytes },
            shared_view,
            shared_weights,
            scratch_weights,
            scratch_copy,
            scratch_bytes,
        }
    }

    /// Bytes of scratch memory of all blocks.
    pub(super) fn scratch_len(&self) -> usize {
        (self.scratch_bytes * u64::from(self.launch.grid[0])) as usize
    }
}

/// `Batch` of `view.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct BatchWords {
    views: u64,
    matrices: u64,
    ops: u64,
    scratch: u64,
    scratch_bytes: u64,
    scratch_weights: u64,
    scratch_copy: u64,
    count: u32,
    side_max: u32,
    shared_view: u32,
    shared_weights: u32,
    bf16: u32,
    mean: [f32; 3],
    std: [f32; 3],
    reserved: u32,
}

const _: () = assert!(size_of::<BatchWords>() == 104, "`Batch` of view.h");

impl BatchWords {
    /// What a launch is told; addresses of plans and of scratch memory.
    pub(super) fn new(
        packed: &Packed,
        layout: &Layout,
        shape: &BatchShape,
        [plans, scratch]: [u64; 2],
    ) -> BatchWords {
        let matrices = plans + 4 * packed.views.len() as u64;
        BatchWords {
            views: plans,
            matrices,
            ops: matrices + 4 * packed.matrices.len() as u64,
            scratch,
            scratch_bytes: layout.scratch_bytes,
            scratch_weights: layout.scratch_weights,
            scratch_copy: layout.scratch_copy,
            count: packed.views(),
            side_max: packed.side_max,
            shared_view: layout.shared_view,
            shared_weights: layout.shared_weights,
            ..BatchWords::of_shape(shape)
        }
    }

    /// What is known without views.
    pub(super) fn of_shape(shape: &BatchShape) -> BatchWords {
        BatchWords {
            views: 0,
            matrices: 0,
            ops: 0,
            scratch: 0,
            scratch_bytes: 0,
            scratch_weights: 0,
            scratch_copy: 0,
            count: 0,
            side_max: 0,
            shared_view: 0,
            shared_weights: 0,
            bf16: u32::from(shape.element == Element::Bf16),
            mean: shape.mean,
            std: shape.std,
            reserved: 0,
        }
    }
}

/// That a number is the one that the shape asks for.
pub(super) fn expect(
    what: &'static str,
    expected: usize,
    found: usize,
) -> Result<(), DeviceViewsError> {
    if expected == found {
        return Ok(());
    }
    Err(DeviceViewsError::Shape { what, expected: expected as u64, found: found as u64 })
}

fn at_most(what: &'static str, found: usize, most: usize) -> Result<(), DeviceViewsError> {
    if found <= most {
        return Ok(());
    }
    Err(DeviceViewsError::Above { what, most: most as u64, found: found as u64 })
}
