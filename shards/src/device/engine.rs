//! The engine: what decodes and renders batches on a device, and what it is given.

use std::fmt;
#[cfg(feature = "nvjpeg")]
use std::sync::Arc;

use super::Number;
#[cfg(feature = "nvjpeg")]
use crate::cuda::{CudaError, Device, Stream};
use crate::decode::{Components, DecodeError, Format, Probe};
use crate::slab::Layout;
use crate::views::SamplePlan;

/// A device that decodes and renders batches.
///
/// Three threads of different kinds call it: workers decode into [`Engine::Buffers`], several at
/// once, each into slots of its own; then the submit thread, alone, decodes what was left to it and
/// renders; then the consumer reads. `recycle` comes before the next batch.
pub trait Engine: fmt::Debug + Send + Sync + 'static {
    /// Why the device cannot go on.
    type Error: std::error::Error + Send + Sync + 'static;
    /// What one batch needs: decoded frames, and views for the consumer.
    type Buffers: fmt::Debug + Send + Sync + 'static;
    /// What one thread decodes with. Made before the first sample.
    type Worker: Send + 'static;

    /// Allocates what a batch needs, for so many threads that decode into it.
    fn buffers(&self, layout: &Layout, threads: usize) -> Result<Self::Buffers, Self::Error>;

    /// Makes what thread `number` decodes with; anew after it panicked.
    fn worker(&self, number: usize) -> Result<Self::Worker, Self::Error>;

    /// Bytes of the device's memory that the buffers of one batch hold.
    fn bytes(buffers: &Self::Buffers) -> usize;

    /// Whether there is a batch decoder.
    fn batches(&self) -> bool;

    /// Prepares buffers for the next batch; their readers are done, or will be in the device's order.
    fn recycle(&self, buffers: &mut Self::Buffers) -> Result<(), Self::Error>;

    /// Decodes one image into its slot. What was in the slot before is gone, also on error.
    fn decode(
        &self,
        worker: &mut Self::Worker,
        buffers: &Self::Buffers,
        job: Job<'_>,
    ) -> Result<By, Failure<Self::Error>>;

    /// Whether the batch decoder supports this baseline image. Called by the workers, which have the time to
    /// check all of it: one bad image may fail a batch.
    fn takes(&self, worker: &mut Self::Worker, job: Job<'_>) -> Result<bool, Self::Error>;

    /// Decodes images together that were all taken. With `wait` it returns when they are decoded, for measuring.
    fn decode_batch(
        &self,
        worker: &mut Self::Worker,
        buffers: &Self::Buffers,
        jobs: &[Job<'_>],
        wait: bool,
    ) -> Result<Batched, Self::Error>;

    /// Renders the plans of slots 0, 1, ... The consumer may have the buffers when this returns,
    /// and orders its own work behind it by the device's means.
    fn render(
        &self,
        worker: &mut Self::Worker,
        buffers: &mut Self::Buffers,
        plans: &[&SamplePlan],
    ) -> Result<(), Self::Error>;

    /// What the device said of the first image or batch that it refused although it takes such ones.
    fn refusal(&self) -> Option<String> {
        None
    }

    /// Where the views of a batch lie as normalised numbers; none where they are no such numbers.
    fn pointers(buffers: &Self::Buffers) -> Option<Pointers>;

    /// The GPU, where the device is one.
    #[cfg(feature = "nvjpeg")]
    fn gpu(&self) -> Option<&Arc<Device>> {
        None
    }

    /// Lets what is queued on `stream` from now on wait until the views are rendered.
    #[cfg(feature = "nvjpeg")]
    fn wait_on(_buffers: &Self::Buffers, _stream: &Stream) -> Result<(), CudaError> {
        Ok(())
    }

    /// Has the next batch in these buffers wait for what is queued on `stream` now.
    #[cfg(feature = "nvjpeg")]
    fn release_on(_buffers: &Self::Buffers, _stream: &Stream) -> Result<(), CudaError> {
        Ok(())
    }
}

/// An image to decode.
///
/// Made by the loader only: engines rely on it that bytes and header belong together.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// Which sample of the batch.
    pub(super) slot: usize,
    /// The image's bytes: a slice of the map.
    pub(super) jpeg: &'a [u8],
    /// What its header says.
    pub(super) header: Probe,
}

/// Why [`Engine::decode`] left no image.
#[derive(Debug)]
pub enum Failure<E> {
    /// The bytes: the policy on bad samples decides.
    Sample(DecodeError),
    /// The device: the run ends.
    Engine(E),
}

impl<E> From<DecodeError> for Failure<E> {
    fn from(error: DecodeError) -> Failure<E> {
        Failure::Sample(error)
    }
}

/// Who decoded an image in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The device.
    Device,
    /// The CPU, in the device's place.
    Cpu,
}

/// Whether the batch decoder did its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batched {
    /// The images are decoded, or will be before they are rendered.
    Done,
    /// One of them cannot be decoded so, and it does not say which: none counts as decoded.
    Refused,
}

/// The decoder for an image, chosen by its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By the batch decoder, or alone.
    Batch,
    /// Alone, on the device.
    Single,
    /// By the CPU.
    Cpu,
}

impl Way {
    /// Chooses by the header. PNG, CMYK, RGB, chroma sampled by more than two (4:1:1, 4:1:0), arithmetic and
    /// lossless coding and baseline images in several scans go to the CPU: nvJPEG refuses them, or its pixels
    /// are not Pillow's, or it was not tried.
    ///
    /// Truncated JPEGs go to the CPU decoder too: decoders differ on them, and one must decide.
    pub fn of(header: &Probe, bytes: &[u8]) -> Way {
        let known = header.format == Format::Jpeg
            && matches!(header.components, Components::Ycc | Components::Gray)
            && header.sampling <= 2
            && !(header.arithmetic || header.layout.lossless)
            && (header.progressive || header.layout.one_scan)
            && bytes.windows(2).rposition(|pair| pair == [0xFF, 0xD9]).is_some();
        match (known, header.progressive) {
            (false, _) => Way::Cpu,
            (true, true) => Way::Single,
            (true, false) => Way::Batch,
        }
    }
}

/// Where the views of a batch lie on its device: numbers channels last, normalised. Made by the engines
/// of this crate only: who reads the addresses relies on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pointers {
    pub(super) views: Vec<u64>,
    pub(super) layout: Layout,
    pub(super) number: Number,
}

impl Pointers {
    /// The address of each view of all groups, in order: `[n, ...]` of its section's shape.
    pub fn views(&self) -> &[u64] {
        &self.views
    }

    /// What the views are. A short batch fills the first samples.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What the numbers are.
    pub fn number(&self) -> Number {
        self.number
    }

    /// The address of view `view` of a group, if there is such.
    pub fn view(&self, group: &str, view: usize) -> Option<u64> {
        self.layout.number(group, view).map(|number| self.views[number])
    }
}
