//! CUDA's part of libtorch, loaded where there is one, and a GPU's memory.

use crate::shim::{ShimError, call, text};

mod ffi {
    use std::ffi::c_char;

    unsafe extern "C" {
        pub(super) fn detco_step_load_cuda(
            state: *mut i32,
            text: *mut c_char,
            text_len: i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_cuda_memory(
            cuda_index: i64,
            free_bytes: *mut i64,
            total_bytes: *mut i64,
            peak_bytes: *mut i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
    }
}

/// Why there is no CUDA.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaMissing {
    /// The machine has no NVIDIA driver.
    #[error("no NVIDIA driver here: {library} is not found")]
    Driver {
        /// The driver's library.
        library: String,
    },
    /// libtorch is the one for CPUs.
    #[error("this libtorch is for CPUs only: there is no {path}")]
    Library {
        /// Where its part for GPUs would be.
        path: String,
    },
    /// The library does not load.
    #[error("libtorch's part for GPUs does not load: {reason}")]
    Load {
        /// What the loader said.
        reason: String,
    },
    /// All is there but a GPU that CUDA accepts.
    #[error("libtorch finds no GPU that it can use")]
    Gpu,
    /// libtorch failed.
    #[error(transparent)]
    Shim(#[from] ShimError),
}

/// Loads libtorch's part for GPUs. Before anything asks libtorch for a GPU, since the answer is
/// kept. A second call finds it loaded.
///
/// # Errors
/// Says what is missing.
pub fn load_cuda() -> Result<(), CudaMissing> {
    let (mut state, mut words) = (0, [0_u8; 1024]);
    call(|message, message_len| {
        // SAFETY: `state` and both buffers live through the call and are as long as said.
        unsafe {
            ffi::detco_step_load_cuda(
                &mut state,
                words.as_mut_ptr().cast(),
                words.len() as i64,
                message,
                message_len,
            )
        }
    })?;
    let words = text(&words);
    match state {
        0 => Ok(()),
        1 => Err(CudaMissing::Driver { library: words }),
        2 => Err(CudaMissing::Library { path: words }),
        _ => Err(CudaMissing::Load { reason: words }),
    }
}

/// Memory of a GPU in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaMemory {
    /// Nobody's.
    pub free: i64,
    /// All.
    pub total: i64,
    /// The most that this process's tensors have held at once.
    pub peak: i64,
}

/// What a GPU has and holds.
///
/// # Errors
/// Without CUDA.
pub fn cuda_memory(index: usize) -> Result<CudaMemory, ShimError> {
    let mut memory = CudaMemory::default();
    call(|message, message_len| {
        // SAFETY: three numbers and a buffer, ours for the call.
        unsafe {
            ffi::detco_step_cuda_memory(
                index as i64,
                &mut memory.free,
                &mut memory.total,
                &mut memory.peak,
                message,
                message_len,
            )
        }
    })?;
    Ok(memory)
}
