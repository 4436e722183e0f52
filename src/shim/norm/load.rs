//! Brings the kernels to a GPU, once a process and GPU: NVRTC compiles them, or its cache has them.

use std::sync::OnceLock;

use tch::Device;
use thiserror::Error;

#[cfg(feature = "nvjpeg")]
use detco_shards::{cuda, device::Number};

use crate::shim::ShimError;

/// GPUs that a process can have kernels on.
pub(super) const GPUS_MAX: usize = 64;

/// Why a GPU has not got the kernels.
#[derive(Debug, Error)]
pub enum KernelsMissing {
    /// This program was built without what compiles them.
    #[error("this program was built without NVRTC\nhint: `cargo build --features nvjpeg`")]
    NotBuilt,
    /// No place is kept for a GPU of this number.
    #[error("a process takes kernels to the first {GPUS_MAX} GPUs only")]
    Beyond,
    /// The driver or the compiler.
    #[cfg(feature = "nvjpeg")]
    #[error(transparent)]
    Cuda(#[from] cuda::CudaError),
    /// The shim.
    #[error(transparent)]
    Shim(#[from] ShimError),
}

/// What has to stay loaded as long as the process lives.
#[cfg(feature = "nvjpeg")]
type Loaded = Vec<cuda::Function>;
#[cfg(not(feature = "nvjpeg"))]
type Loaded = std::convert::Infallible;

/// Makes [`normalise`](super::normalise) work on maps of `device`. The CPU always has it; to a GPU the
/// kernels are loaded the first time, which takes a second or two where the cache does not have them.
///
/// # Errors
/// What is missing; the same every time.
pub fn ready(device: Device) -> Result<(), &'static KernelsMissing> {
    static GPUS: [OnceLock<Result<Loaded, KernelsMissing>>; GPUS_MAX] =
        [const { OnceLock::new() }; GPUS_MAX];
    let Device::Cuda(index) = device else { return Ok(()) };
    let gpu = GPUS.get(index).ok_or(&KernelsMissing::Beyond)?;
    gpu.get_or_init(|| load(index)).as_ref().map(|_| ())
}

#[cfg(not(feature = "nvjpeg"))]
fn load(_index: usize) -> Result<Loaded, KernelsMissing> {
    Err(KernelsMissing::NotBuilt)
}

#[cfg(feature = "nvjpeg")]
fn load(index: usize) -> Result<Loaded, KernelsMissing> {
    let setup = crate::config::gpu(Number::Bf16, None);
    let mut search = cuda::Search { folders: setup.folders };
    // The libtorch that runs, where LIBTORCH does not name it.
    search.folders.extend(cuda::Search::beside_libtorch(&super::libtorch()?).folders);
    let device = cuda::Device::open(index as u32)?;
    let nvrtc = cuda::Nvrtc::open(&search)?;
    let (architecture, code) = (device.architecture(), cuda::Code::Cubin);
    let compiled = nvrtc.compile_cached(&program(), architecture, code, &setup.cache)?;
    let module = cuda::Module::load(&device, &compiled.code)?;
    let functions = super::KERNELS.iter().map(|name| module.function(name));
    let functions = functions.collect::<Result<Loaded, cuda::CudaError>>()?;
    let handles = std::array::from_fn(|kernel| functions[kernel].handle());
    let launcher = cuda::launcher()?;
    // SAFETY: the driver's function, and the kernels by their names in their order. `ready` keeps what
    // is returned in a static. Nobody normalises on this GPU before `ready` has returned.
    unsafe { super::register(index, launcher, &handles) }?;
    Ok(functions)
}

/// The kernels' source, for the compiler.
#[cfg(feature = "nvjpeg")]
pub fn program() -> cuda::Program<'static> {
    cuda::Program {
        name: "norm.cu",
        source: include_str!("../../model/kernels/norm.cu"),
        headers: &[("norm.h", include_str!("../../model/kernels/norm.h"))],
        options: &["--std=c++17"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_there_or_what_is_missing_is_named() {
        assert!(ready(Device::Cpu).is_ok());
        assert!(matches!(ready(Device::Cuda(GPUS_MAX)), Err(KernelsMissing::Beyond)));
        if let Err(missing) = ready(Device::Cuda(0)) {
            let text = missing.to_string();
            let known = ["driver", "NVRTC", "no CUDA device"];
            assert!(known.iter().any(|word| text.contains(word)), "{text}");
            assert_eq!(text, ready(Device::Cuda(0)).unwrap_err().to_string());
        }
    }

    /// The compiler's library is looked for beside the libtorch that runs.
    #[cfg(feature = "nvjpeg")]
    #[test]
    fn the_libtorch_that_runs_is_found() {
        let libtorch = super::super::libtorch().unwrap();
        assert!(libtorch.join("lib/libtorch_cpu.so").is_file(), "{}", libtorch.display());
    }
}
