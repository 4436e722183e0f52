//! Errors of CUDA's driver and compiler.

use std::ffi::CStr;
use std::path::PathBuf;

use cudarc::driver::sys;
use thiserror::Error;

/// An error of the device, the driver or the compiler.
#[derive(Debug, Error)]
pub enum CudaError {
    /// The driver's library is not on this machine, or does not load.
    #[error("no CUDA driver on this machine: looked for {tried} ({reason})")]
    NoDriver {
        /// The names that the system loader was asked for.
        tried: String,
        /// What the loader said about the last of them.
        reason: String,
    },
    /// The driver lacks a function that we call.
    #[error("the CUDA driver has no function {symbol}: CUDA 13.0 (driver 580) or later is needed")]
    OldDriver {
        /// The function.
        symbol: &'static str,
    },
    /// The driver is there, the device is not.
    #[error("no CUDA device {ordinal}: the driver sees {count}")]
    NoDevice {
        /// The device that was asked for.
        ordinal: u32,
        /// Devices that the driver sees.
        count: u32,
    },
    /// No memory for the pages that were to be locked.
    #[error(transparent)]
    Memory(#[from] crate::limits::NoMemory),
    /// A call of the driver failed. An error of earlier work on the device can come up here.
    #[error("{call} failed: {name} ({code}): {text}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// Its status.
        code: u32,
        /// The status by name.
        name: String,
        /// The status in words.
        text: String,
    },
    /// NVRTC, the run-time compiler, was not found or does not load.
    #[error("no CUDA run-time compiler (NVRTC): looked for {tried} ({reason})")]
    NoCompiler {
        /// The names and files that were tried.
        tried: String,
        /// What the loader said about the last of them.
        reason: String,
    },
    /// The NVRTC that was found lacks a function.
    #[error("{library}: has no function {symbol}")]
    OldCompiler {
        /// The library.
        library: PathBuf,
        /// The function.
        symbol: &'static str,
    },
    /// A call of NVRTC failed, other than by the program's fault.
    #[error("{call} failed: {name} ({code})")]
    Compiler {
        /// NVRTC's function.
        call: &'static str,
        /// Its status.
        code: i32,
        /// The status by name.
        name: String,
    },
    /// A program does not compile.
    #[error("{program} does not compile for {architecture}:\n{log}")]
    Compile {
        /// The program's name.
        program: String,
        /// What it was compiled for.
        architecture: String,
        /// What the compiler said.
        log: String,
    },
    /// A text that goes to C has a NUL inside.
    #[error("{what} has a NUL byte at offset {offset}")]
    Nul {
        /// Which text.
        what: &'static str,
        /// Where the NUL is.
        offset: usize,
    },
    /// A range reaches beyond its buffer.
    #[error("{what}: {need} bytes from offset {offset} do not fit in {have}")]
    Range {
        /// Which buffer.
        what: &'static str,
        /// First byte.
        offset: usize,
        /// Bytes from there on.
        need: usize,
        /// Bytes of the buffer.
        have: usize,
    },
}

/// Turns a status of the driver into a result that names the call.
pub(super) fn check(call: &'static str, status: sys::CUresult) -> Result<(), CudaError> {
    if status == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    // SAFETY: a call just gave this status, so the driver is loaded and has both functions (they
    // are among those that `library::driver` asks for).
    let name = in_words(|text| unsafe { sys::cuGetErrorName(status, text) });
    // SAFETY: as above.
    let text = in_words(|text| unsafe { sys::cuGetErrorString(status, text) });
    Err(CudaError::Driver { call, code: status as u32, name, text })
}

fn in_words(ask: impl FnOnce(*mut *const std::ffi::c_char) -> sys::CUresult) -> String {
    let mut text = std::ptr::null();
    if ask(&mut text) != sys::CUresult::CUDA_SUCCESS || text.is_null() {
        return String::from("a status that the driver has no words for");
    }
    // SAFETY: the driver gave a pointer to one of its constant, NUL-terminated texts.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
