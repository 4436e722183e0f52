//! Autocast to bfloat16, and the numerics of the whole process.

use std::marker::PhantomData;

use tch::Device;

use super::index_of;
use crate::shim::{ShimError, call};

mod ffi {
    use std::ffi::c_char;

    unsafe extern "C" {
        pub(super) fn detco_step_autocast_enter(
            cuda_index: i64,
            was: *mut i32,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_autocast_leave(
            cuda_index: i64,
            was: i32,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_numerics(
            tf32: i32,
            deterministic: i32,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
    }
}

/// While it lives, this thread's operations run as `torch.autocast` to bfloat16 has them:
/// convolutions and linear layers in bfloat16, what needs range or precision in float32. Weights
/// are cast once and forgotten when the outermost ends.
#[derive(Debug)]
#[must_use = "autocast ends when this is dropped"]
pub struct Autocast {
    pub(super) cuda_index: i64,
    was: i32,
    /// The switch is the thread's own.
    _thread: PhantomData<*const ()>,
}

impl Autocast {
    /// Switches it on for operations on this kind of device.
    ///
    /// # Errors
    /// When libtorch has no autocast for it.
    pub fn enter(device: Device) -> Result<Autocast, ShimError> {
        let (cuda_index, mut was) = (index_of(device), 0);
        call(|message, message_len| {
            // SAFETY: `was` and the buffer live through the call.
            unsafe { ffi::detco_step_autocast_enter(cuda_index, &mut was, message, message_len) }
        })?;
        Ok(Autocast { cuda_index, was, _thread: PhantomData })
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // It sets two variables of this thread; there is nothing to do about an error.
        let _ = call(|message, message_len| {
            // SAFETY: entered on this thread, which the type cannot leave; the buffer is as said.
            unsafe {
                ffi::detco_step_autocast_leave(self.cuda_index, self.was, message, message_len)
            }
        });
    }
}

/// Whether float32 products may be rounded to TensorFloat-32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float32 {
    /// IEEE float32.
    Exact,
    /// 10 bits of mantissa, on a GPU's tensor cores.
    Tensor,
}

/// Which algorithms libtorch takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithms {
    /// The fastest that cuDNN finds by trying.
    Fastest,
    /// The same result every time.
    Deterministic,
}

/// Sets the numerics of the whole process.
///
/// # Errors
/// Never in practice.
pub fn numerics(float32: Float32, algorithms: Algorithms) -> Result<(), ShimError> {
    let tensor = i32::from(float32 == Float32::Tensor);
    let deterministic = i32::from(algorithms == Algorithms::Deterministic);
    call(|message, message_len| {
        // SAFETY: two numbers and a buffer that is as long as said.
        unsafe { ffi::detco_step_numerics(tensor, deterministic, message, message_len) }
    })
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    #[test]
    fn autocast_ends_with_its_guard() {
        let x = Tensor::ones([2, 2], CPU);
        {
            let _outer = Autocast::enter(Device::Cpu).unwrap();
            let _inner = Autocast::enter(Device::Cpu).unwrap();
            assert_eq!(x.matmul(&x).kind(), Kind::BFloat16);
        }
        assert_eq!(x.matmul(&x).kind(), Kind::Float);
    }
}
