//! The data plane of `detco`: bytes on disk to a slab of pixels, without libtorch.

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod decode;
pub mod format;
pub mod order;
pub mod pack;
pub mod pipe;
pub mod pipeline;
pub mod slab;
pub mod stats;
pub mod stream;
pub mod trace;
pub mod views;
