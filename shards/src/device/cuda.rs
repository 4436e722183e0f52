//! The engine on a GPU: nvJPEG decodes, kernels render.
//!
//! Each worker has a stream and two lanes of nvJPEG's hybrid back end: it decodes the codes of one
//! image while the device works on the one before. The submit thread has a stream for the hardware
//! engine and one for rendering. Events order them on the device. The host waits in four places
//! only, and each time for work at least two steps old:
//!
//! - a worker, before it uses a lane again, for the image that was in it (nvJPEG's buffers are read
//!   by a copy until then);
//! - a worker that decodes on the CPU, for its last upload from the same pinned memory;
//! - the submit thread, before it uses a state of the hardware engine again, for the batch before
//!   last (nvJPEG's state may be reset only then). While the share is measured it waits for each
//!   batch;
//! - the submit thread, before it decodes with the hardware engine into frames again, until they have
//!   been rendered: the engine writes when it is called, whatever its stream is to wait for
//!   (meta-pytorch/torchcodec, pull request 1634, seen on an H100 with nvJPEG 12.3 to 13.2).
//!
//! Frames of a batch lie in one allocation, taken piece by piece as headers are read; what does not
//! fit gets its own, and the next time round the allocation is larger. A consumer says on which
//! stream it read a batch ([`DeviceBatch::release_on`]); the device then waits, not the host.
//!
//! # What a trainer does with a batch
//!
//! With its own stream (libtorch's current one, through [`Stream::from_raw`]):
//! [`wait_on`](DeviceBatch::wait_on) it; make tensors over [`pointers`](DeviceBatch::pointers)
//! (addresses on the device, [`Number`], channels last; the first `len()` of `samples`); queue what
//! reads them; [`release_on`](DeviceBatch::release_on) the stream; drop the batch. No step waits on
//! the host. The tensors must not outlive the batch.
//!
//! Not yet run on a GPU.

#![expect(unsafe_code, reason = "queued decoding: nvJPEG reads and writes after its calls return")]

mod frames;
mod worker;

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use thiserror::Error;

use self::frames::Frames;
use self::worker::CudaWorker;
use super::batch::lock;
use super::{
    Batched, By, DeviceBatch, Engine, FRAME_BYTES, Failure, Job, Number, Pointers, Setup, Way,
};
use crate::cuda::{
    CudaError, Device, DeviceBuffer, DeviceSlice, Event, Nvrtc, PinnedBuffer, Search, Stream,
};
use crate::decode::nvjpeg::{Asker, Batch, Handle, Lane, Nvjpeg, NvjpegError};
use crate::decode::{Decoder, Image};
use crate::slab::Layout;
use crate::views::SamplePlan;
use crate::views::cuda::{BatchShape, DeviceRenderer, DeviceViewsError, Element, Kernels};

/// Errors of the GPU.
#[derive(Debug, Error)]
pub enum GpuError {
    /// The driver, the compiler, memory.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// nvJPEG.
    #[error(transparent)]
    Nvjpeg(#[from] NvjpegError),
    /// The kernels.
    #[error(transparent)]
    Views(#[from] DeviceViewsError),
}

/// One GPU as an [`Engine`].
#[derive(Debug)]
pub struct Cuda {
    setup: Setup,
    submit: Mutex<Submit>,
    kernels: Kernels,
    hybrid: Arc<Handle>,
    /// What nvJPEG said of the first image or batch that it refused.
    refusal: OnceLock<String>,
    /// The hardware engine: engines, and cores of each; or why there is none.
    hardware: Result<(Arc<Handle>, [u32; 2]), NvjpegError>,
    nvjpeg: Arc<Nvjpeg>,
    device: Arc<Device>,
}

/// The state of the submit thread.
#[derive(Debug)]
struct Submit {
    renderer: Option<DeviceRenderer>,
    hardware: Option<Hardware>,
    stream: Stream,
}

#[derive(Debug)]
struct Hardware {
    /// Used in turn: each with the mark behind its last batch.
    states: [(Batch, Event); 2],
    turn: usize,
    /// Images that the states have set memory aside for.
    room: usize,
    stream: Stream,
}

impl Hardware {
    /// Before the first batch of so many images.
    fn reserve(&mut self, images: usize) {
        if images > self.room {
            self.room = images;
            for (batch, _) in &mut self.states {
                // Without it nvJPEG allocates when it decodes.
                let _ = batch.reserve(images);
            }
        }
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        // nvJPEG's states are in use until then. A failure leaves nothing to do.
        let _ = self.stream.synchronize();
    }
}

impl Cuda {
    /// Opens the GPU, nvJPEG and the kernels' compiler. What is missing is an error that names it; a
    /// missing hardware engine is none ([`Cuda::hardware`] says why).
    ///
    /// # Errors
    /// [`GpuError`].
    pub fn open(setup: &Setup) -> Result<Cuda, GpuError> {
        let search = Search { folders: setup.folders.clone() };
        let device = Device::open(setup.ordinal)?;
        // Makes the context current: nvJPEG acts on the current one.
        let stream = Stream::new(&device)?;
        let nvjpeg = Nvjpeg::open(&search)?;
        let hybrid = Handle::hybrid(&nvjpeg)?;
        // Now, so that what is missing for them is told where the CPU can still do without.
        let kernels = Kernels::load(&device, &Nvrtc::open(&search)?, &setup.cache)?;
        let (hardware, engines) = match hardware(&nvjpeg, &device) {
            Ok((hardware, handle, engines)) => (Some(hardware), Ok((handle, engines))),
            Err(GpuError::Nvjpeg(error)) => (None, Err(error)),
            Err(error) => return Err(error),
        };
        let submit = Mutex::new(Submit { renderer: None, hardware, stream });
        let (setup, hardware) = (setup.clone(), engines);
        let refusal = OnceLock::new();
        Ok(Cuda { setup, submit, kernels, hybrid, refusal, hardware, nvjpeg, device })
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// nvJPEG's version.
    pub fn nvjpeg_version(&self) -> [i32; 3] {
        self.nvjpeg.version()
    }

    /// Engines that decode JPEG in hardware and cores of each, or why there are none.
    ///
    /// # Errors
    /// What nvJPEG said.
    pub fn hardware(&self) -> Result<[u32; 2], &NvjpegError> {
        self.hardware.as_ref().map(|(_, engines)| *engines)
    }

    fn note(&self, refused: &NvjpegError) {
        let _ = self.refusal.set(refused.to_string()); // the first is kept
    }
}

type Engines = (Hardware, Arc<Handle>, [u32; 2]);

fn hardware(nvjpeg: &Arc<Nvjpeg>, device: &Arc<Device>) -> Result<Engines, GpuError> {
    let stream = Stream::new(device)?;
    let handle = Handle::hardware(nvjpeg)?;
    let engines = handle.engines()?;
    if engines[0] == 0 {
        return Err(NvjpegError::NoEngine.into());
    }
    let state = || Ok::<_, GpuError>((Batch::new(&handle)?, Event::new(device)?));
    let hardware = Hardware { states: [state()?, state()?], turn: 0, room: 0, stream };
    Ok((hardware, handle, engines))
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Makes the context current for what is destroyed below. A failure leaves nothing to do.
        let _ = self.device.synchronize();
    }
}

/// One batch on the GPU.
#[derive(Debug)]
pub struct CudaBuffers {
    layout: Layout,
    number: Number,
    frames: Frames,
    /// Each view of all groups, of all samples that the batch has room for.
    views: Vec<DeviceBuffer>,
    /// By worker: behind what it queued for this batch.
    decoded: Vec<Event>,
    /// Behind the hardware engine's part.
    batched: Event,
    rendered: Event,
    /// Behind what the consumer queued.
    released: Event,
    is_released: AtomicBool,
}

impl DeviceBatch<Cuda> {
    /// The driver's event (`CUevent`) behind the rendering, for those who wait by themselves. Valid
    /// until the batch is dropped.
    pub fn event(&self) -> Option<*mut c_void> {
        self.buffers().map(|buffers| buffers.rendered.handle())
    }

    /// Copies the decoded picture of a slot back, to be looked at: the host waits for it. None for a
    /// slot without one.
    ///
    /// # Errors
    /// When there is no memory for it, or the driver fails.
    pub fn frame(&self, slot: usize) -> Result<Option<Image>, CudaError> {
        let Some(frames) = self.buffers().map(|buffers| &buffers.frames) else { return Ok(None) };
        let frame = frames.slots.get(slot).and_then(|slot| lock(slot).clone());
        let Some(frame) = frame else { return Ok(None) };
        let device = frames.common.device();
        let (stream, bytes) = (Stream::new(device)?, frame.bytes());
        let mut pinned = PinnedBuffer::new(device, bytes)?;
        self.wait_on(&stream)?;
        frames.with(&frame, |from| pinned.download(0..bytes, from, &stream))??;
        let row = frame.width as usize * 3;
        let rows = pinned.bytes()?.chunks_exact(frame.pitch);
        let pixels = rows.flat_map(|bytes| &bytes[..row]).copied().collect();
        Ok(Some(Image { width: frame.width, height: frame.height, pixels }))
    }
}

impl From<CudaError> for Failure<GpuError> {
    fn from(error: CudaError) -> Failure<GpuError> {
        Failure::Engine(error.into())
    }
}

impl Engine for Cuda {
    type Error = GpuError;
    type Buffers = CudaBuffers;
    type Worker = CudaWorker;

    fn pointers(buffers: &CudaBuffers) -> Option<Pointers> {
        let CudaBuffers { layout, number, views, .. } = buffers;
        let views = slices(views).into_iter().map(DeviceSlice::address).collect();
        Some(Pointers { views, layout: layout.clone(), number: *number })
    }

    fn gpu(&self) -> Option<&Arc<Device>> {
        Some(self.device())
    }

    fn wait_on(buffers: &CudaBuffers, stream: &Stream) -> Result<(), CudaError> {
        stream.wait(&buffers.rendered)
    }

    fn release_on(buffers: &CudaBuffers, stream: &Stream) -> Result<(), CudaError> {
        buffers.released.record(stream)?;
        buffers.is_released.store(true, Ordering::Release);
        Ok(())
    }

    fn buffers(&self, layout: &Layout, hands: usize) -> Result<CudaBuffers, GpuError> {
        let mut submit = lock(&self.submit);
        if submit.renderer.is_none() && layout.views() > 0 {
            let shape = self.setup.batch_shape(layout);
            submit.renderer = Some(DeviceRenderer::new(&self.device, &self.kernels, shape)?);
        }
        let (device, n) = (&self.device, layout.n());
        // Also makes the context current, in which nvJPEG allocates.
        let frames = Frames::new(device, n)?;
        if let Some(hardware) = &mut submit.hardware {
            hardware.reserve(n);
        }
        let number = self.setup.number;
        let view = |bytes| DeviceBuffer::new(device, n * bytes * number.bytes());
        Ok(CudaBuffers {
            layout: layout.clone(),
            number,
            frames,
            views: layout.view_bytes().map(view).collect::<Result<_, _>>()?,
            decoded: (0..hands).map(|_| Event::new(device)).collect::<Result<_, _>>()?,
            batched: Event::new(device)?,
            rendered: Event::new(device)?,
            released: Event::new(device)?,
            is_released: AtomicBool::new(true),
        })
    }

    fn worker(&self, number: usize) -> Result<CudaWorker, GpuError> {
        // First: makes the context current.
        let stream = Stream::new(&self.device)?;
        let lane = || Ok::<_, GpuError>((Lane::new(&self.hybrid)?, Event::new(&self.device)?));
        let lanes = [lane()?, lane()?];
        let asker =
            self.hardware.as_ref().ok().map(|(handle, _)| Asker::new(handle)).transpose()?;
        let (decoder, image) = (Decoder::new(), Image::new());
        let staging = PinnedBuffer::new(&self.device, FRAME_BYTES)?;
        Ok(CudaWorker { number, lanes, turn: 0, asker, decoder, image, staging, stream })
    }

    fn bytes(buffers: &CudaBuffers) -> usize {
        let CudaBuffers { frames, views, .. } = buffers;
        let views = views.iter().map(DeviceBuffer::len).sum::<usize>();
        frames.common.len() + views
    }

    fn batches(&self) -> bool {
        self.hardware.is_ok()
    }

    fn takes(&self, worker: &mut CudaWorker, job: Job<'_>) -> Result<bool, GpuError> {
        // It may be the first that this thread asks of the GPU: workers are made in another.
        self.device.bind()?;
        // What nvJPEG cannot parse is the hybrid back end's to tell of, or the CPU's.
        let asker = worker.asker.as_mut();
        Ok(asker.is_some_and(|asker| asker.takes(job.jpeg, &job.header).unwrap_or(false)))
    }

    fn recycle(&self, buffers: &mut CudaBuffers) -> Result<(), GpuError> {
        if !std::mem::take(buffers.is_released.get_mut()) {
            self.device.synchronize()?;
        }
        Ok(buffers.frames.clear(&self.device)?)
    }

    fn decode(
        &self,
        worker: &mut CudaWorker,
        buffers: &CudaBuffers,
        job: Job<'_>,
    ) -> Result<By, Failure<GpuError>> {
        let frames = &buffers.frames;
        *lock(&frames.slots[job.slot]) = None;
        // The last batch's rendering may read what is overwritten now.
        worker.stream.wait(&buffers.rendered)?;
        let frame = frames.take(&self.device, &job.header)?;
        let mut by = By::Cpu;
        if Way::of(&job.header, job.jpeg) != Way::Cpu {
            match worker.hybrid(job, frames.target(&frame)?)? {
                Ok(()) => by = By::Device,
                Err(refused) => self.note(&refused),
            }
        }
        if by == By::Cpu {
            worker.decoder.decode(job.jpeg, &mut worker.image)?;
            worker.upload(&self.device, frames, &frame)?;
        }
        mark(&buffers.decoded[worker.number], &worker.stream)?;
        *lock(&frames.slots[job.slot]) = Some(frame);
        Ok(by)
    }

    fn decode_batch(
        &self,
        _worker: &mut CudaWorker,
        buffers: &CudaBuffers,
        jobs: &[Job<'_>],
        wait: bool,
    ) -> Result<Batched, GpuError> {
        let mut submit = lock(&self.submit);
        let Some(Hardware { states, turn, stream, .. }) = &mut submit.hardware else {
            return Ok(Batched::Refused);
        };
        *turn = (*turn + 1) % states.len();
        let (batch, used) = &mut states[*turn];
        used.synchronize()?;
        buffers.rendered.synchronize()?;
        let mut framed = Vec::with_capacity(jobs.len());
        for job in jobs {
            let frame = buffers.frames.take(&self.device, &job.header)?;
            let target = buffers.frames.target(&frame)?;
            framed.push((job, frame, target));
        }
        let images = framed.iter().map(|(job, _, target)| (job.jpeg, *target));
        // SAFETY: what this state queued last lies before `used`, which was just waited for. Each target
        // was allocated for the size in its image's header, which nvJPEG reads again from the same
        // bytes: no writer of this project changes a file that has its name (`format/map.rs`), and a
        // foreign one that rewrites a header in place, between the two readings, could make it write
        // beyond a target, in the GPU's memory. The memory lives as long as queued work: a `DeviceBuffer` waits before it is freed.
        let decoded = unsafe { batch.decode(images, stream.handle()) };
        // Also after an error: part of it may be queued.
        mark(used, stream)?;
        mark(&buffers.batched, stream)?;
        if let Err(refused) = decoded {
            self.note(&refused);
            return Ok(Batched::Refused);
        }
        for (job, frame, _) in framed {
            *lock(&buffers.frames.slots[job.slot]) = Some(frame);
        }
        if wait {
            used.synchronize()?;
        }
        Ok(Batched::Done)
    }

    fn render(
        &self,
        _worker: &mut CudaWorker,
        buffers: &mut CudaBuffers,
        plans: &[&SamplePlan],
    ) -> Result<(), GpuError> {
        let mut submit = lock(&self.submit);
        let Submit { renderer, stream, .. } = &mut *submit;
        for decoded in buffers.decoded.iter().chain([&buffers.batched, &buffers.released]) {
            stream.wait(decoded)?;
        }
        if let Some(renderer) = renderer {
            let CudaBuffers { frames, views, .. } = &mut *buffers;
            renderer.render(&frames.items(plans)?, &slices(views), stream)?;
        }
        Ok(mark(&buffers.rendered, stream)?)
    }

    fn refusal(&self) -> Option<String> {
        self.refusal.get().cloned()
    }
}

/// Records an event behind the work queued on a stream. If that fails the work is waited for instead, since an
/// event that was never recorded counts as reached.
fn mark(event: &Event, stream: &Stream) -> Result<(), CudaError> {
    event.record(stream).or_else(|error| {
        stream.synchronize()?;
        Err(error)
    })
}

fn slices(views: &[DeviceBuffer]) -> Vec<DeviceSlice<'_>> {
    views.iter().map(DeviceBuffer::as_slice).collect()
}

impl From<Number> for Element {
    fn from(number: Number) -> Element {
        match number {
            Number::F32 => Element::F32,
            Number::Bf16 => Element::Bf16,
        }
    }
}

impl Setup {
    fn batch_shape(&self, layout: &Layout) -> BatchShape {
        BatchShape {
            samples: layout.n(),
            views: layout.view_bytes().collect(),
            element: self.number.into(),
            mean: self.mean,
            std: self.std,
        }
    }
}
