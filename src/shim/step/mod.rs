//! What a training step needs of libtorch and `tch` has not: one file a subject, with its C++ beside it.

use std::ffi::{c_char, c_void};

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use super::{ShimError, call};

mod autocast;
mod cuda;
mod lists;
mod meter;
mod transfer;

pub use autocast::{Algorithms, Autocast, Float32, numerics};
pub use cuda::{CudaMemory, CudaMissing, cuda_memory, load_cuda};
pub use lists::{Rates, add, channels_last, copy, forget_gradients, length, lerp, sgd};
pub use meter::Meter;
pub use transfer::{Download, Lane, upload};

/// A GPU's index; below 0 the CPU.
pub(super) fn index_of(device: Device) -> i64 {
    match device {
        Device::Cuda(index) => index as i64,
        _ => -1,
    }
}

/// A call that makes a tensor.
pub(super) fn made(
    function: impl FnOnce(*mut *mut C_tensor, *mut c_char, i64) -> i32,
) -> Result<Tensor, ShimError> {
    let mut out = std::ptr::null_mut();
    call(|message, message_len| function(&mut out, message, message_len))?;
    // SAFETY: the call succeeded, so `out` is a tensor made for the caller, who now owns it.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// A call that makes a handle.
pub(super) fn handle(
    function: impl FnOnce(*mut *mut c_void, *mut c_char, i64) -> i32,
) -> Result<*mut c_void, ShimError> {
    let mut out = std::ptr::null_mut();
    call(|message, message_len| function(&mut out, message, message_len))?;
    Ok(out)
}
