//! Finds NVIDIA's libraries when they are needed.

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;
use libloading::os::unix;

use super::CudaError;

/// Folders searched for libraries, besides those of the system's loader.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Search {
    /// Looked into in this order.
    pub folders: Vec<PathBuf>,
}

impl Search {
    /// What lies beside a libtorch: its own `lib`, and the folder of NVIDIA's wheels where it was
    /// installed as a Python wheel.
    pub fn beside_libtorch(libtorch: &Path) -> Search {
        // `.venv/libtorch` is a link into site-packages.
        let libtorch = libtorch.canonicalize().unwrap_or_else(|_| libtorch.to_path_buf());
        let wheels = libtorch.parent().map(|packages| packages.join("nvidia/cu13/lib"));
        Search { folders: wheels.into_iter().chain([libtorch.join("lib")]).collect() }
    }

    /// The same with a folder that is looked into before all others.
    pub fn first(mut self, folder: PathBuf) -> Search {
        self.folders.insert(0, folder);
        self
    }
}

/// Names of the driver's library; the second is a link that only some installations have.
const DRIVER: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Every function of the driver that this crate calls. `cudarc` panics at one that is missing, so
/// all are asked for before the first is called.
const DRIVER_FUNCTIONS: [&str; 38] = [
    "cuCtxGetStreamPriorityRange",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// Loaded once and never unloaded: `cudarc` keeps a handle of its own for as long as the program
/// runs.
static FOUND: OnceLock<Library> = OnceLock::new();

/// Makes sure that the driver is there, so that calls through `cudarc` cannot panic.
pub(super) fn driver() -> Result<(), CudaError> {
    if FOUND.get().is_some() {
        return Ok(());
    }
    let mut reason = String::new();
    for name in DRIVER {
        match open(Path::new(name)) {
            Ok(library) => {
                for symbol in DRIVER_FUNCTIONS {
                    address(&library, symbol).ok_or(CudaError::OldDriver { symbol })?;
                }
                // Another thread may have been faster; it found the same.
                let _ = FOUND.set(library);
                return Ok(());
            }
            Err(error) => reason = error,
        }
    }
    Err(CudaError::NoDriver { tried: DRIVER.join(", "), reason })
}

/// Loads a library by name (the system's loader looks for it) or by path.
pub(crate) fn open(name: &Path) -> Result<Library, String> {
    // Visible to libraries that are loaded later: NVRTC finds its built-ins by their name.
    let flags = unix::RTLD_NOW | unix::RTLD_GLOBAL;
    // SAFETY: only NVIDIA's driver, NVRTC and its built-ins are named by this module's callers;
    // their initialisers have no preconditions.
    let library = unsafe { unix::Library::open(Some(name), flags) };
    library.map(Library::from).map_err(|error| match std::error::Error::source(&error) {
        // The loader's own words.
        Some(cause) => cause.to_string(),
        None => error.to_string(),
    })
}

/// The address of the driver's `cuLaunchKernel`, for code beyond Rust that launches by itself.
///
/// # Errors
/// Where there is no driver.
pub fn launcher() -> Result<*mut c_void, CudaError> {
    driver()?;
    let symbol = "cuLaunchKernel";
    let address = FOUND.get().and_then(|library| address(library, symbol));
    address.ok_or(CudaError::OldDriver { symbol })
}

fn address(library: &Library, symbol: &str) -> Option<*mut c_void> {
    // SAFETY: the address is only asked for; nothing is called or read through it.
    unsafe { library.get::<*mut c_void>(symbol) }.ok().map(|address| *address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_with_its_name() {
        let error = open(Path::new("libno-such-thing.so.9")).unwrap_err();
        assert!(error.contains("libno-such-thing.so.9"), "{error}");
    }

    #[test]
    fn libtorch_as_a_wheel_has_nvidias_wheels_beside_it() {
        let search = Search::beside_libtorch(Path::new("packages/torch"));
        let expected = ["packages/nvidia/cu13/lib", "packages/torch/lib"].map(PathBuf::from);
        assert_eq!(search.folders, expected);
        assert_eq!(search.first(PathBuf::from("own")).folders[0], PathBuf::from("own"));
    }
}
