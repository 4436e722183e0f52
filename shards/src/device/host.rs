//! Host memory as a device: decodes and renders with the CPU's code.
//!
//! What the wiring does with a batch can so be held against [`Loader`](crate::pipeline::Loader),
//! byte by byte, on a machine without a GPU; and so can what a trainer does with it, for the views
//! also come as the kernels leave them: normalised numbers at an address.

use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};

use super::{Batched, By, Engine, Failure, Job, Number, Pointers, Way};
use crate::decode::{Components, Decoder, Image};
use crate::slab::Layout;
use crate::views::{MEAN, Renderer, STD, SamplePlan};

/// Host memory as a device.
#[derive(Debug)]
pub struct Host {
    batches: bool,
    number: Option<Number>,
}

impl Host {
    /// With a batch decoder, which like nvJPEG's leaves some baseline images (the gray ones), and
    /// refuses all of a batch for one that is bad; or without.
    pub fn new(batches: bool) -> Host {
        Host { batches, number: None }
    }

    /// The same, and its batches have [pointers](super::DeviceBatch::pointers) to normalised numbers.
    pub fn normalising(self, number: Number) -> Host {
        Host { number: Some(number), ..self }
    }
}

/// One batch in host memory.
#[derive(Debug)]
pub struct HostBuffers {
    layout: Layout,
    frames: Vec<Mutex<Image>>,
    /// Each view of all groups, of all samples that the batch has room for.
    views: Vec<Vec<u8>>,
    numbers: Option<Numbers>,
}

/// The views as numbers, channels last.
#[derive(Debug)]
enum Numbers {
    F32(Vec<Vec<f32>>),
    /// Their bits.
    Bf16(Vec<Vec<u16>>),
}

impl Numbers {
    fn new(number: Number, lens: impl Iterator<Item = usize>) -> Numbers {
        match number {
            Number::F32 => Numbers::F32(lens.map(|len| vec![0.0; len]).collect()),
            Number::Bf16 => Numbers::Bf16(lens.map(|len| vec![0; len]).collect()),
        }
    }

    fn fill(&mut self, views: &[Vec<u8>]) {
        match self {
            Numbers::F32(numbers) => each(numbers, views, |number| number),
            Numbers::Bf16(numbers) => each(numbers, views, to_bf16),
        }
    }

    fn number(&self) -> Number {
        match self {
            Numbers::F32(_) => Number::F32,
            Numbers::Bf16(_) => Number::Bf16,
        }
    }

    fn addresses(&self) -> Vec<u64> {
        match self {
            Numbers::F32(numbers) => numbers.iter().map(|view| view.as_ptr() as u64).collect(),
            Numbers::Bf16(numbers) => numbers.iter().map(|view| view.as_ptr() as u64).collect(),
        }
    }
}

fn each<T>(numbers: &mut [Vec<T>], views: &[Vec<u8>], to: impl Fn(f32) -> T) {
    for (numbers, bytes) in numbers.iter_mut().zip(views) {
        for (at, (number, byte)) in numbers.iter_mut().zip(bytes).enumerate() {
            *number = to((f32::from(*byte) / 255.0 - MEAN[at % 3]) / STD[at % 3]);
        }
    }
}

/// The nearest bfloat16's bits, to even where two are as near. The number is finite.
fn to_bf16(number: f32) -> u16 {
    let bits = number.to_bits();
    ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}

impl HostBuffers {
    /// View `view` of a group, of all samples that the batch has room for: `[n, h, w, 3]` or
    /// `[n, patches, p, p, 3]`.
    ///
    /// # Panics
    /// Where the recipe has no such view.
    pub fn view(&self, group: &str, view: usize) -> &[u8] {
        &self.views[self.layout.expect(group, view)]
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

    fn pointers(buffers: &HostBuffers) -> Option<Pointers> {
        let HostBuffers { layout, numbers, .. } = buffers;
        let numbers = numbers.as_ref()?;
        let (views, layout) = (numbers.addresses(), layout.clone());
        Some(Pointers { views, layout, number: numbers.number() })
    }

    fn buffers(&self, layout: &Layout, _threads: usize) -> Result<HostBuffers, Infallible> {
        let n = layout.n();
        let lens = || layout.view_bytes().map(|bytes| n * bytes);
        Ok(HostBuffers {
            layout: layout.clone(),
            frames: (0..n).map(|_| Mutex::new(Image::new())).collect(),
            views: lens().map(|len| vec![0; len]).collect(),
            numbers: self.number.map(|number| Numbers::new(number, lens())),
        })
    }

    fn worker(&self, _number: usize) -> Result<HostWorker, Infallible> {
        Ok(HostWorker { decoder: Decoder::new(), renderer: Renderer::new() })
    }

    fn bytes(buffers: &HostBuffers) -> usize {
        let views = buffers.layout.pixels();
        let number = buffers.numbers.as_ref().map_or(0, |numbers| numbers.number().bytes());
        views * (1 + number)
    }

    fn batches(&self) -> bool {
        self.batches
    }

    fn takes(&self, _worker: &mut HostWorker, job: Job<'_>) -> Result<bool, Infallible> {
        Ok(job.header.components != Components::Gray)
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
        let decoded = jobs.iter().all(|job| self.decode(worker, buffers, *job).is_ok());
        Ok(if decoded { Batched::Done } else { Batched::Refused })
    }

    fn render(
        &self,
        worker: &mut HostWorker,
        buffers: &mut HostBuffers,
        plans: &[&SamplePlan],
    ) -> Result<(), Infallible> {
        let HostBuffers { frames, views, numbers, .. } = buffers;
        for (slot, (frame, plan)) in frames.iter_mut().zip(plans).enumerate() {
            let image = frame.get_mut().unwrap_or_else(PoisonError::into_inner);
            // A sample that ends the run has no picture.
            if image.width == 0 {
                continue;
            }
            for (plan, out) in plan.views.iter().zip(&mut *views) {
                let bytes = plan.bytes();
                worker.renderer.view(&*image, plan, &mut out[slot * bytes..][..bytes]);
            }
        }
        if let Some(numbers) = numbers {
            numbers.fill(views);
        }
        Ok(())
    }
}
