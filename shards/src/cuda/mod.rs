//! Safe wrapper of CUDA's driver and of its run-time compiler, both loaded when they are needed.
//!
//! Nothing of CUDA is needed to build or to start. [`Device::open`] looks for the driver,
//! [`Nvrtc::open`] for the compiler; what is missing is named, with where it was looked for, and
//! never ends the program. Everything public is safe but for the two places where foreign handles
//! come in ([`DeviceSlice::from_raw`], [`Stream::from_raw`]).
//!
//! Work is queued on a [`Stream`] and runs later. What keeps that safe:
//!
//! - A [`PinnedBuffer`] remembers the last copy that touches it. Its bytes can be had only after
//!   that
//!   copy is done, and so can its memory be freed.
//! - A [`DeviceBuffer`] waits for the whole device before it is freed.
//! - Two streams that touch the same device memory are ordered by an [`Event`]; without one the
//!   bytes there are unspecified, as after any race, but no host memory is at stake.

#![expect(unsafe_code, reason = "the wall around the CUDA driver and NVRTC")]

mod device;
mod error;
mod library;
mod memory;
mod module;
mod nvrtc;

pub use device::{Device, Event, Limits, Stream};
pub use error::CudaError;
#[cfg(feature = "nvjpeg")]
pub(crate) use library::open as open_library;
pub use library::{Search, launcher};
pub(crate) use memory::Registered;
pub use memory::{DeviceBuffer, DeviceSlice, PinnedBuffer};
pub use module::{Function, Launch, Module};
pub use nvrtc::{Architecture, Code, Compiled, Nvrtc, Origin, Program};
