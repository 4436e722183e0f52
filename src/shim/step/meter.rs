//! A count of the memory that a thread's tensors take on the CPU.

use std::ffi::c_void;

use super::handle;
use crate::shim::{ShimError, call};

mod ffi {
    use std::ffi::{c_char, c_void};

    unsafe extern "C" {
        pub(super) fn detco_step_meter_begin(
            out: *mut *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_meter_read(
            handle: *mut c_void,
            held: *mut i64,
            peak: *mut i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_meter_end(
            handle: *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
    }
}

/// Counts the memory that this thread's tensors take on the CPU, while it lives.
#[derive(Debug)]
pub struct Meter(*mut c_void);

impl Meter {
    /// Starts at 0.
    ///
    /// # Errors
    /// Never in practice.
    pub fn begin() -> Result<Meter, ShimError> {
        handle(|out, message, message_len| {
            // SAFETY: `out` and the buffer are ours.
            unsafe { ffi::detco_step_meter_begin(out, message, message_len) }
        })
        .map(Meter)
    }

    /// Bytes taken and not given back since the start, and the most at once.
    ///
    /// # Errors
    /// Never in practice.
    pub fn read(&self) -> Result<(i64, i64), ShimError> {
        let (mut held, mut peak) = (0, 0);
        call(|message, message_len| {
            // SAFETY: the handle is live; two numbers and the buffer are ours.
            unsafe {
                ffi::detco_step_meter_read(self.0, &mut held, &mut peak, message, message_len)
            }
        })?;
        Ok((held, peak))
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        // It puts a variable of this thread back; there is nothing to do about an error.
        let _ = call(|message, message_len| {
            // SAFETY: made by `begin` on this thread, which a raw pointer cannot leave; freed once.
            unsafe { ffi::detco_step_meter_end(self.0, message, message_len) }
        });
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    #[test]
    fn the_meter_counts_tensors() {
        let before = Tensor::zeros([1000], CPU);
        let meter = Meter::begin().unwrap();
        let kept = Tensor::zeros([1000], CPU);
        drop(Tensor::zeros([5000], CPU));
        assert_eq!(meter.read().unwrap(), (4000, 24_000));
        drop(kept);
        drop(before); // taken before the count began: not counted when it goes
        assert_eq!(meter.read().unwrap(), (0, 24_000));
        drop(meter);
        drop(Tensor::zeros([9000], CPU));
        let meter = Meter::begin().unwrap();
        assert_eq!(meter.read().unwrap(), (0, 0));
    }
}
