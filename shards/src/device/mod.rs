//! The wiring for batches whose pixels are made where the model is: order, stream, decode, views,
//! into device memory.
//!
//! ```text
//!               tasks (bounded)               filled                      rendered
//! dispatcher ────────────────────▶ workers ───────────▶ submit thread ───────────────▶ DeviceLoader::next
//!     ▲  order, read-ahead            probe, draw,        batch decoder,                   │ in step order
//!     │                               decode or defer     render, event                    │
//!     └─────────────────────────────────── free buffers ◀──────────────────────────────────┘
//! ```
//!
//! The same order, cursor, views and policy on bad samples as [`pipeline`](crate::pipeline): the
//! two share the code that decides them, so the same options give the same samples, substitutes and
//! errors. What differs is who decodes and renders, and that stands behind one narrow trait,
//! [`Engine`]: [`Host`] does it with the CPU's code into host memory (the oracle, and what the tests
//! of this wiring run on), `Cuda` does it on a GPU.
//!
//! A worker looks at an image's header and takes one of three ways. What looks fit for the batch
//! decoder (baseline JPEG, for the hardware engine) is left for the submit thread, as far as the
//! [share](Share) says and where the decoder, which is [asked](Engine::takes), takes it; what the
//! device decodes one by one is decoded at once; the rest, and whatever the device refuses, is
//! decoded by the CPU in its place. The way changes neither order nor batch nor plan, and is
//! [counted](Counts). A batch that the batch decoder refuses is decoded
//! again image by image, so one bad image is found, judged and replaced as everywhere.
//!
//! Dropping the loader closes its channels, and the threads end.

mod batch;
mod counts;
#[cfg(feature = "nvjpeg")]
mod cuda;
mod engine;
mod host;
mod loader;
mod resolve;
mod share;
mod worker;

use crate::slab::Layout;

pub use batch::DeviceBatch;
pub use counts::Counts;
#[cfg(feature = "nvjpeg")]
pub use cuda::{Cuda, CudaBuffers, GpuError};
pub use engine::{Batched, By, Engine, Failure, Job, Pointers, Way};
pub use host::{Host, HostBuffers};
pub use loader::{DeviceError, DeviceLoader, DeviceOptions};
pub use resolve::{Decode, Decoding, Number, Setup, Unavailable};
pub use share::{Share, balance};

/// Bytes of a decoded image, on average, that memory is first planned with: ImageNet's have 0.55 MB.
const FRAME_BYTES: usize = 640 << 10;

/// Bytes on the device that a batch is first given: its views, and decoded images of a usual size.
/// Where images are larger it grows.
pub fn bytes(layout: &Layout, number: Number) -> usize {
    layout.pixels() * number.bytes() + layout.n() * FRAME_BYTES
}

/// Batches that a loader has memory for: those ahead, and the one that the consumer reads.
pub fn batches_held(batches_ahead: usize) -> usize {
    batches_ahead.max(1) + 1
}
