//! Where tensors live, in which precision the encoders run, and how their maps lie in memory.
//!
//! The program links against libtorch's part for CPUs alone; the part for GPUs is loaded here, when
//! it is asked for. Nothing after this module asks whether there is a GPU.

use std::sync::Once;

use detco_shards::pipe;
use tch::{Device, Tensor};
use thiserror::Error;

use crate::config::{self, Config, Layout, Precision, Train};
use crate::shim::step::{self as shim, Algorithms, CudaMissing, Float32};
use crate::shim::{ShimError, norm};

/// Why the device that was asked for cannot be used.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// `train.device = "cuda"` without a GPU.
    #[error("train.device = \"cuda\": {0}")]
    NoGpu(#[source] CudaMissing),
    /// libtorch failed.
    #[error(transparent)]
    Shim(#[from] ShimError),
}

/// A device, and why it is not a GPU if one was wished for.
#[derive(Debug)]
pub struct Found {
    /// Where tensors are to live.
    pub device: Device,
    /// What `auto` did not find.
    pub missing: Option<CudaMissing>,
}

impl Found {
    /// For a line about the run: `the GPU`, or `the CPU (no NVIDIA driver here: …)`.
    pub fn describe(&self) -> String {
        match (self.device, &self.missing) {
            (Device::Cpu, Some(missing)) => format!("the CPU ({missing})"),
            (Device::Cpu, None) => "the CPU".into(),
            _ => "the GPU".into(),
        }
    }
}

/// Finds the device of `train.device`; `auto` takes a GPU if libtorch can use one.
///
/// # Errors
/// When `cuda` is asked for and something is missing: says what.
pub fn find(wanted: config::Device) -> Result<Found, DeviceError> {
    if wanted == config::Device::Cpu {
        return Ok(Found { device: Device::Cpu, missing: None });
    }
    let gpu = shim::load_cuda().and_then(|()| match Device::cuda_if_available() {
        Device::Cpu => Err(CudaMissing::Gpu),
        device => Ok(device),
    });
    match (gpu, wanted) {
        (Ok(device), _) => Ok(Found { device, missing: None }),
        (Err(missing), config::Device::Auto) => {
            Ok(Found { device: Device::Cpu, missing: Some(missing) })
        }
        (Err(missing), _) => Err(DeviceError::NoGpu(missing)),
    }
}

/// Sets the numerics of the process as the config has them, before the first tensor.
///
/// # Errors
/// When libtorch fails.
pub fn set_numerics(train: &Train) -> Result<(), ShimError> {
    let float32 = match train.precision {
        Precision::F32 => Float32::Exact,
        Precision::Auto | Precision::Tf32 | Precision::Bf16 => Float32::Tensor,
    };
    let algorithms = match train.deterministic {
        true => Algorithms::Deterministic,
        false => Algorithms::Fastest,
    };
    shim::numerics(float32, algorithms)
}

/// Whether the system starts as many threads as libtorch will: where it does not, libtorch's pools end the
/// process without a word of ours, or wait for ever.
///
/// # Errors
/// What the system said.
pub fn check_threads() -> std::io::Result<()> {
    let between = tch::get_num_interop_threads();
    let threads = tch::get_num_threads().max(1) + between.max(1) + SPARE_THREADS;
    pipe::can_start(threads as usize)
}

/// Autograd has a thread for each device, and the rest is for what else starts one.
const SPARE_THREADS: i32 = 3;

/// Whether the encoders run in bfloat16 there.
pub fn in_bf16(train: &Train, device: Device) -> bool {
    match train.precision {
        Precision::Bf16 => true,
        Precision::Auto => device.is_cuda(),
        Precision::F32 | Precision::Tf32 => false,
    }
}

/// Whether channels are innermost in maps, crops and weights there.
pub fn channels_last(config: &Config, device: Device) -> bool {
    match config.train.layout {
        Layout::ChannelsLast => true,
        Layout::Auto => device.is_cuda(),
        Layout::ChannelsFirst => false,
    }
}

/// Whether batch normalisation of groups is for our kernels there: on a GPU whose maps have their
/// channels innermost, if the kernels load. If they do not, says why, once.
pub fn has_kernels(config: &Config, device: Device) -> bool {
    static SAID: Once = Once::new();
    if !device.is_cuda() || !channels_last(config, device) {
        return false;
    }
    let missing = norm::ready(device).err();
    if let Some(missing) = missing {
        SAID.call_once(|| note!("libtorch normalises groups one by one, more slowly: {missing}"));
    }
    missing.is_none()
}

/// Whether an image tensor `[…, c, h, w]` has its channels innermost.
pub fn is_channels_last(images: &Tensor) -> bool {
    let (strides, dims) = (images.stride(), images.dim());
    dims >= 4 && images.size()[dims - 3] > 1 && strides[dims - 3] == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_goes_by_the_device() {
        let mut config = Config::default();
        for (device, expected) in [(Device::Cpu, false), (Device::Cuda(0), true)] {
            assert_eq!(in_bf16(&config.train, device), expected);
            assert_eq!(channels_last(&config, device), expected);
        }
        config.train.precision = Precision::Bf16;
        config.train.layout = Layout::ChannelsLast;
        assert!(in_bf16(&config.train, Device::Cpu) && channels_last(&config, Device::Cpu));
        config.train.precision = Precision::F32;
        assert!(!in_bf16(&config.train, Device::Cuda(0)));
    }

    #[test]
    fn a_gpu_is_found_or_what_is_missing_is_named() {
        let found = find(config::Device::Auto).unwrap();
        let cuda = find(config::Device::Cuda);
        match &found.missing {
            None => assert!(found.device.is_cuda() && cuda.is_ok()),
            Some(missing) => {
                assert_eq!(found.device, Device::Cpu);
                let error = cuda.unwrap_err().to_string();
                assert_eq!(error, format!("train.device = \"cuda\": {missing}"));
                assert_eq!(found.describe(), format!("the CPU ({missing})"));
            }
        }
        assert!(find(config::Device::Cpu).unwrap().missing.is_none());
    }
}
