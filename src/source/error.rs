//! Why there is no next batch.

use std::convert::Infallible;

use detco_shards::device::DeviceError;
#[cfg(feature = "nvjpeg")]
use detco_shards::device::GpuError;
use detco_shards::pipeline::PipelineError;
use thiserror::Error;

/// Why there is no next batch.
#[derive(Debug, Error)]
pub enum SourceError {
    /// Samples, or threads.
    #[error("{0}")]
    Pipeline(#[source] Box<PipelineError>),
    /// The GPU that decodes and renders.
    #[cfg(feature = "nvjpeg")]
    #[error("the GPU failed the data path: {0}")]
    Gpu(#[source] Box<GpuError>),
}

impl From<PipelineError> for SourceError {
    fn from(error: PipelineError) -> SourceError {
        SourceError::Pipeline(Box::new(error))
    }
}

impl From<DeviceError<Infallible>> for SourceError {
    fn from(error: DeviceError<Infallible>) -> SourceError {
        match error {
            DeviceError::Pipeline(error) => error.into(),
            DeviceError::Engine(never) => match never {},
        }
    }
}

#[cfg(feature = "nvjpeg")]
impl From<GpuError> for SourceError {
    fn from(error: GpuError) -> SourceError {
        SourceError::Gpu(Box::new(error))
    }
}

#[cfg(feature = "nvjpeg")]
impl From<DeviceError<GpuError>> for SourceError {
    fn from(error: DeviceError<GpuError>) -> SourceError {
        match error {
            DeviceError::Pipeline(error) => error.into(),
            DeviceError::Engine(error) => error.into(),
        }
    }
}
