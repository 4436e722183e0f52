//! The twin of a device in host memory: decodes and renders with the CPU's code.
//!
//! What the wiring does with a batch can so be held against [`Loader`](crate::pipeline::Loader),
//! byte by byte, on a machine without a GPU.

use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};

use super::{Batched, By, Engine, Failure, Job, Shape, Way};
use crate::decode::{Components, Decoder, Image};
use crate::views::{Renderer, SamplePlan};

/// Host memory as a device.
#[derive(Debug)]
pub struct Host {
    batches: bool,
}

impl Host {
    /// With a batch decoder, which like nvJPEG's leaves some baseline images (the gray ones), and
    /// refuses all of a batch for one that is bad; or without.
    pub fn new(batches: bool) -> Host {
        Host { batches }
    }
}

/// One batch in host memory.
#[derive(Debug)]
pub struct HostBuffers {
    shape: Shape,
    frames: Vec<Mutex<Image>>,
    globals: [Vec<u8>; 2],
    locals: [Vec<u8>; 2],
}

impl HostBuffers {
    /// Global view 0 (query) or 1 (key) of all samples that the batch has room for, `[n, h, w, 3]`.
    pub fn global(&self, view: usize) -> &[u8] {
        &self.globals[view]
    }

    /// Patch set 0 (query) or 1 (key), `[n, 9, p, p, 3]`.
    pub fn local(&self, view: usize) -> &[u8] {
        &self.locals[view]
    }
}

/// One thread's decoder and renderer.
#[derive(Debug)]
pub struct HostWorker {
    decoder: Decoder,
    renderer: Renderer,
}

impl Engine for Host {
    type Error = Infallible;
    type Buffers = HostBuffers;
    type Worker = HostWorker;

    fn buffers(&self, shape: &Shape, _threads: usize) -> Result<HostBuffers, Infallible> {
        let views = |count: usize, len: usize| {
            std::array::from_fn(|view| if view < count { vec![0; len] } else { Vec::new() })
        };
        Ok(HostBuffers {
            shape: *shape,
            frames: (0..shape.n).map(|_| Mutex::new(Image::new())).collect(),
            globals: views(shape.globals, shape.global_len()),
            locals: views(shape.locals, shape.local_len()),
        })
    }

    fn worker(&self, _number: usize) -> Result<HostWorker, Infallible> {
        Ok(HostWorker { decoder: Decoder::new(), renderer: Renderer::new() })
    }

    fn bytes(buffers: &HostBuffers) -> usize {
        buffers.globals.iter().chain(&buffers.locals).map(Vec::len).sum()
    }

    fn batches(&self) -> bool {
        self.batches
    }

    fn recycle(&self, buffers: &mut HostBuffers) -> Result<(), Infallible> {
        // What a slot that is not filled would show.
        for frame in &mut buffers.frames {
            let image = frame.get_mut().unwrap_or_else(PoisonError::into_inner);
            image.width = 0;
        }
        Ok(())
    }

    fn decode(
        &self,
        worker: &mut HostWorker,
        buffers: &HostBuffers,
        job: Job<'_>,
    ) -> Result<By, Failure<Infallible>> {
        let mut frame = buffers.frames[job.slot].lock().unwrap_or_else(PoisonError::into_inner);
        let decoded = worker.decoder.decode(job.jpeg, &mut frame);
        decoded.inspect_err(|_| frame.width = 0)?;
        Ok(if Way::of(&job.header, job.jpeg) == Way::Cpu { By::Cpu } else { By::Device })
    }

    fn decode_batch(
        &self,
        worker: &mut HostWorker,
        buffers: &HostBuffers,
        jobs: &[Job<'_>],
        _wait: bool,
    ) -> Result<Batched, Infallible> {
        let gray = |at: &usize| jobs[*at].header.components == Components::Gray;
        let left: Vec<usize> = (0..jobs.len()).filter(gray).collect();
        let taken = (0..jobs.len()).filter(|at| !left.contains(at));
        let decoded = taken.map(|at| jobs[at]).all(|job| self.decode(worker, buffers, job).is_ok());
        Ok(if decoded { Batched::Done { left } } else { Batched::Refused })
    }

    fn render(
        &self,
        worker: &mut HostWorker,
        buffers: &mut HostBuffers,
        plans: &[&SamplePlan],
    ) -> Result<(), Infallible> {
        let HostBuffers { shape, frames, globals, locals } = buffers;
        let [global, local] = [shape.global_len(), shape.local_len()].map(|len| len / shape.n);
        for (slot, (frame, plan)) in frames.iter_mut().zip(plans).enumerate() {
            let image = frame.get_mut().unwrap_or_else(PoisonError::into_inner);
            // A sample that ends the run has no picture.
            if image.width == 0 {
                continue;
            }
            for (plan, out) in plan.global.iter().zip(&mut globals[..shape.globals]) {
                worker.renderer.global(image, plan, &mut out[slot * global..][..global]);
            }
            for (plan, out) in plan.local.iter().flatten().zip(&mut locals[..shape.locals]) {
                worker.renderer.local(image, plan, &mut out[slot * local..][..local]);
            }
        }
        Ok(())
    }
}
