//! The renderer on a GPU: from frames and plans to batch tensors, with one launch per batch.
//!
//! The kernels lie in `kernels/`: `view.h` says what a block of threads does with a view, pass by
//! pass, and what each pass reads and writes. They are compiled for the device when a
//! [`DeviceRenderer`] is made. Their pixels are the CPU renderer's, byte for byte; the tests hold
//! the same source, compiled for the host, to that.
//!
//! Nothing here waits for the device.

mod pack;
#[cfg(test)]
mod tests;

use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;

use thiserror::Error;

use super::plan::{Op, Rect, SamplePlan};
use crate::cuda::{
    Architecture, Code, CudaError, Device, DeviceBuffer, DeviceSlice, Event, Function, Launch,
    Nvrtc, Origin, PinnedBuffer, Program, Stream,
};
use pack::{BatchWords, Layout, Packed};

/// Batches whose plans may be on their way at once: the host fills one buffer while the device
/// reads another, and a third is on the bus.
const PLANS_IN_FLIGHT: usize = 3;

/// Threads of a block that normalises, and blocks for each multiprocessor: enough to fill it twice.
const NORMALISE: (u32, u32) = (256, 16);

/// The kernels' source.
const KERNELS: Program<'static> = Program {
    name: "views.cu",
    source: include_str!("kernels/views.cu"),
    headers: &[("view.h", include_str!("kernels/view.h"))],
    // Fused multiply-adds round once where Pillow rounds twice.
    options: &["--std=c++17", "--fmad=false"],
};

/// Why a batch was not rendered. Nothing of it was queued.
#[derive(Debug, Error)]
pub enum DeviceViewsError {
    /// The device, the driver or the compiler.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The kernels lack an operation; [`supports`] says so beforehand.
    #[error("the kernels have no {op:?}: such a view is rendered on the CPU")]
    Unsupported {
        /// The operation.
        op: Op,
    },
    /// A plan was drawn for an image of another size.
    #[error("{crop:?} does not lie in a frame of {width}x{height}")]
    Crop {
        /// The plan's crop.
        crop: Rect,
        /// Width of the frame.
        width: u32,
        /// Height of the frame.
        height: u32,
    },
    /// A number of a plan, a frame or a tensor is not what the batch's shape asks for.
    #[error("{what} is {found}, and must be {expected}")]
    Shape {
        /// Which number.
        what: &'static str,
        /// What the shape asks for.
        expected: u64,
        /// What it is.
        found: u64,
    },
    /// A number is above what fits.
    #[error("{what} is {found}, and may be at most {most}")]
    Above {
        /// Which number.
        what: &'static str,
        /// The largest that fits.
        most: u64,
        /// What it is.
        found: u64,
    },
    /// A view or a patch has no pixels.
    #[error("a view or a patch of 0 pixels")]
    Empty,
    /// The image is resized before the crop, which is for the CPU.
    #[error(
        "the kernels crop an image as it is: a view that is resized before is rendered on the CPU"
    )]
    Resized,
}

/// Whether the kernels can render all views of a plan: all that a valid recipe draws but images that
/// are resized before the crop. What they cannot, such as a blur of more than 1,000 pixels, is for the
/// CPU.
pub fn supports(plan: &SamplePlan) -> bool {
    plan.views.iter().all(|view| view.resized.is_none() && view.ops.iter().all(|op| pack::has(*op)))
}

/// Numbers of the batch tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// 32-bit floats.
    F32,
    /// bfloat16, the nearest to the 32-bit float.
    Bf16,
}

impl Element {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 => 2,
        }
    }
}

/// The shape of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchShape {
    /// Samples of a batch, n.
    pub samples: usize,
    /// Numbers of each view of a sample, in order: `size * size * 3`, or those of its patches.
    pub views: Vec<usize>,
    /// Type of the numbers.
    pub element: Element,
    /// Means of the channels, of bytes / 255.
    pub mean: [f32; 3],
    /// Deviations of the channels.
    pub std: [f32; 3],
}

/// A decoded image on the device: RGB bytes `[height, width, 3]`, rows `pitch` bytes apart.
#[derive(Debug, Clone, Copy)]
pub struct DeviceFrame<'a> {
    /// The bytes.
    pub pixels: DeviceSlice<'a>,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Bytes from one row to the next.
    pub pitch: usize,
}

/// One sample to be rendered.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    /// Its place in the batch, below n.
    pub slot: usize,
    /// The image.
    pub frame: DeviceFrame<'a>,
    /// Its plan.
    pub plan: &'a SamplePlan,
}

/// The kernels, loaded on a device.
#[derive(Debug, Clone)]
pub struct Kernels {
    views: Function,
    normalise: Function,
    origin: Arc<Origin>,
}

impl Kernels {
    /// Compiles the kernels for `device`, or takes them from the folder `cache`.
    ///
    /// # Errors
    /// When they do not compile or load, or the driver fails.
    pub fn load(
        device: &Arc<Device>,
        nvrtc: &Nvrtc,
        cache: &Path,
    ) -> Result<Kernels, DeviceViewsError> {
        let compiled = nvrtc.compile_cached(&KERNELS, device.architecture(), Code::Cubin, cache)?;
        let module = crate::cuda::Module::load(device, &compiled.code)?;
        let views = module.function("detco_views")?;
        views.allow_shared(pack::dynamic_shared(device))?;
        let normalise = module.function("detco_normalise")?;
        Ok(Kernels { views, normalise, origin: Arc::new(compiled.origin) })
    }
}

/// Renders batches on a device. Its memory grows to what the largest batch needs, and stays.
#[derive(Debug)]
pub struct DeviceRenderer {
    device: Arc<Device>,
    shape: BatchShape,
    kernels: Kernels,
    packed: Packed,
    /// Plans on their way, used in turn.
    plans: [PinnedBuffer; PLANS_IN_FLIGHT],
    turn: usize,
    /// The plans that the kernel reads, and its scratch memory.
    device_plans: DeviceBuffer,
    scratch: DeviceBuffer,
    /// Behind the last launch: the next one uses the same memory, perhaps on another stream.
    launched: Event,
}

impl DeviceRenderer {
    /// A renderer of batches of this shape, by kernels that were loaded on `device`.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn new(
        device: &Arc<Device>,
        kernels: &Kernels,
        shape: BatchShape,
    ) -> Result<DeviceRenderer, DeviceViewsError> {
        let [a, b, c] = [(); PLANS_IN_FLIGHT].map(|()| PinnedBuffer::new(device, 0));
        Ok(DeviceRenderer {
            device: Arc::clone(device),
            shape,
            kernels: kernels.clone(),
            packed: Packed::default(),
            plans: [a?, b?, c?],
            turn: 0,
            device_plans: DeviceBuffer::new(device, 0)?,
            scratch: DeviceBuffer::new(device, 0)?,
            launched: Event::new(device)?,
        })
    }

    /// Where the kernels came from.
    pub fn origin(&self) -> &Origin {
        &self.kernels.origin
    }

    /// What batches look like.
    pub fn shape(&self) -> &BatchShape {
        &self.shape
    }

    /// Queues one launch that renders all views of `items` into their slots of `out`, a tensor for each
    /// view, `[n, size, size, 3]` or `[n, patches, patch, patch, 3]`. Does not wait. Other slots are
    /// left alone.
    ///
    /// # Errors
    /// When a plan or a tensor does not fit the shape, a plan is not [supported](supports), or the
    /// driver fails.
    pub fn render(
        &mut self,
        items: &[Item<'_>],
        out: &[DeviceSlice<'_>],
        stream: &Stream,
    ) -> Result<(), DeviceViewsError> {
        self.packed.fill(&self.shape, items, out)?;
        if items.is_empty() {
            return Ok(());
        }
        let layout = Layout::of(&self.packed, &self.device);
        self.grow(&layout)?;
        // The last launch may read plans and scratch still, on another stream.
        stream.wait(&self.launched)?;
        let plans = &mut self.plans[self.turn];
        self.turn = (self.turn + 1) % PLANS_IN_FLIGHT;
        let len = self.packed.bytes_len();
        self.packed.write(plans.bytes_mut()?);
        plans.upload(0..len, self.device_plans.as_slice(), stream)?;
        let at = [self.device_plans.as_slice().address(), self.scratch.as_slice().address()];
        let mut batch = BatchWords::new(&self.packed, &layout, &self.shape, at);
        #[expect(unsafe_code, reason = "a launch")]
        // SAFETY: the kernel's one parameter is a `Batch`, of the same layout (a test compares the
        // sizes). It reads the plans and frames and writes scratch, each as long as `grow` and
        // `fill` made sure of; the tensors' slots were checked by `fill`. All of it outlives the
        // kernel by `DeviceSlice`'s contract and `DeviceBuffer`'s drop.
        unsafe {
            self.kernels.views.launch(
                stream,
                layout.launch,
                &mut [(&raw mut batch).cast::<c_void>()],
            )?;
        }
        self.launched.record(stream)?;
        Ok(())
    }

    /// Queues the normalisation of bytes that the CPU rendered: `from` are `[..., 3]` bytes on the
    /// device, `to` as many numbers. Does not wait.
    ///
    /// # Errors
    /// When `to` has another length, or the driver fails.
    pub fn normalise(
        &self,
        from: DeviceSlice<'_>,
        to: DeviceSlice<'_>,
        stream: &Stream,
    ) -> Result<(), DeviceViewsError> {
        pack::expect("bytes of the tensor", from.len() * self.shape.element.bytes(), to.len())?;
        if from.is_empty() {
            return Ok(());
        }
        let mut batch = BatchWords::of_shape(&self.shape);
        let (mut source, mut target, mut count) = (from.address(), to.address(), from.len() as u64);
        let (threads, blocks) = NORMALISE;
        let needed = u32::try_from(count.div_ceil(u64::from(threads))).unwrap_or(u32::MAX);
        let blocks = needed.min(blocks * self.device.limits().multiprocessors);
        let launch = Launch { grid: [blocks.max(1), 1, 1], threads, shared_bytes: 0 };
        let mut arguments = [
            (&raw mut batch).cast::<c_void>(),
            (&raw mut source).cast(),
            (&raw mut target).cast(),
            (&raw mut count).cast(),
        ];
        #[expect(unsafe_code, reason = "a launch")]
        // SAFETY: the kernel's parameters are a `Batch`, an address, an address and a count. It
        // reads `count` bytes and writes as many numbers, which were just compared with the slices.
        unsafe {
            self.kernels.normalise.launch(stream, launch, &mut arguments)?;
        }
        Ok(())
    }

    /// Makes memory as large as a batch needs. Allocating waits for the device; after the largest
    /// image has been seen it does not happen again.
    fn grow(&mut self, layout: &Layout) -> Result<(), DeviceViewsError> {
        let plans = self.packed.bytes_len();
        if self.device_plans.len() < plans {
            self.device_plans = DeviceBuffer::new(&self.device, plans.next_power_of_two())?;
        }
        if self.plans[self.turn].len() < plans {
            self.plans[self.turn] = PinnedBuffer::new(&self.device, plans.next_power_of_two())?;
        }
        let scratch = layout.scratch_len();
        if self.scratch.len() < scratch {
            self.scratch = DeviceBuffer::new(&self.device, scratch)?;
        }
        Ok(())
    }
}

/// Compiles the kernels to PTX, as the tests do for architectures that are not there.
///
/// # Errors
/// When they do not compile.
pub fn kernels_as_ptx(nvrtc: &Nvrtc, architecture: Architecture) -> Result<Vec<u8>, CudaError> {
    nvrtc.compile(&KERNELS, architecture, Code::Ptx)
}
