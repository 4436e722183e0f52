//! The data plane of `detco`: bytes on disk to a slab of pixels, without libtorch.

// The images of the tests name the crate from outside.
#[cfg(test)]
extern crate self as detco_shards;

pub mod cache;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod decode;
pub mod device;
pub mod files;
pub mod format;
mod layout;
pub mod limits;
pub mod order;
pub mod pack;
pub mod pipe;
pub mod pipeline;
pub mod slab;
pub mod stats;
pub mod stream;
pub mod trace;
pub mod views;
