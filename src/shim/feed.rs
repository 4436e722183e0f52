//! What feeding a model from foreign memory needs of libtorch: see `feed.cpp`.

use std::ffi::c_void;
use std::path::PathBuf;
use std::time::Duration;

use tch::{Device, Tensor};

use super::step::{handle, index_of, made};
use super::{ShimError, call, text};

mod ffi {
    use std::ffi::{c_char, c_void};

    use torch_sys::C_tensor;

    unsafe extern "C" {
        pub(super) fn detco_feed_loan_new(
            out: *mut *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_feed_loan_lend(
            handle: *mut c_void,
            address: *mut c_void,
            sizes: *const i64,
            strides: *const i64,
            dims: i64,
            bf16: i32,
            cuda_index: i64,
            out: *mut *mut C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_feed_loan_out(
            handle: *mut c_void,
            count: *mut i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_feed_loan_free(
            handle: *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_feed_stream(
            cuda_index: i64,
            out: *mut *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_feed_libtorch(
            text: *mut c_char,
            text_len: i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_feed_span_begin(
            cuda_index: i64,
            out: *mut *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_feed_span_end(
            handle: *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_feed_span_read(
            handle: *mut c_void,
            ms: *mut f64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_feed_span_free(
            handle: *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
    }
}

/// How numbers lie at an address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lie<'a> {
    /// Sizes of the dimensions.
    pub(crate) sizes: &'a [i64],
    /// Numbers from one to the next, dimension by dimension.
    pub(crate) strides: &'a [i64],
    /// Whether they are bfloat16, else floats.
    pub(crate) bf16: bool,
    /// Where the address is one.
    pub(crate) device: Device,
}

/// Memory that is lent to tensors, and how many of them still live.
#[derive(Debug)]
pub(crate) struct Loan(*mut c_void);

impl Loan {
    /// Nothing is lent yet.
    ///
    /// # Errors
    /// Never in practice.
    pub(crate) fn new() -> Result<Loan, ShimError> {
        handle(|out, message, message_len| {
            // SAFETY: `out` and the buffer are ours.
            unsafe { ffi::detco_feed_loan_new(out, message, message_len) }
        })
        .map(Loan)
    }

    /// A tensor over foreign memory, without a copy.
    ///
    /// # Safety
    /// All that sizes and strides reach from `address` is memory of the device. It stays allocated,
    /// and nobody writes to it but behind what the tensor's readers were queued with, until
    /// [`Loan::out`] is 0.
    ///
    /// # Errors
    /// Without that device.
    ///
    /// # Panics
    /// When there are not as many strides as sizes.
    pub(crate) unsafe fn lend(&self, address: u64, lie: Lie<'_>) -> Result<Tensor, ShimError> {
        assert_eq!(lie.sizes.len(), lie.strides.len());
        made(|out, message, message_len| {
            // SAFETY: the handle is live, both lists are as long as said, `out` and the buffer are
            // ours; the memory is the caller's promise.
            unsafe {
                ffi::detco_feed_loan_lend(
                    self.0,
                    address as *mut c_void,
                    lie.sizes.as_ptr(),
                    lie.strides.as_ptr(),
                    lie.sizes.len() as i64,
                    i32::from(lie.bf16),
                    index_of(lie.device),
                    out,
                    message,
                    message_len,
                )
            }
        })
    }

    /// How many of the tensors lent still live, with all that shares their memory.
    ///
    /// # Errors
    /// Never in practice.
    pub(crate) fn out(&self) -> Result<i64, ShimError> {
        let mut count = 0;
        call(|message, message_len| {
            // SAFETY: the handle is live; a number and the buffer are ours.
            unsafe { ffi::detco_feed_loan_out(self.0, &mut count, message, message_len) }
        })?;
        Ok(count)
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        // It frees a number; there is nothing to do about an error.
        let _ = call(|message, message_len| {
            // SAFETY: made by `new`, freed once: here. Tensors that live hold the count themselves.
            unsafe { ffi::detco_feed_loan_free(self.0, message, message_len) }
        });
    }
}

/// The driver's handle (`CUstream`) of the stream on which libtorch works now on this GPU; null is
/// the default stream.
///
/// # Errors
/// Without CUDA.
pub fn stream(index: usize) -> Result<*mut c_void, ShimError> {
    handle(|out, message, message_len| {
        // SAFETY: a number, `out` and the buffer, ours for the call.
        unsafe { ffi::detco_feed_stream(index as i64, out, message, message_len) }
    })
}

/// The folder of the libtorch that is loaded, which has `lib` in it; none if the loader does not
/// say.
pub fn libtorch() -> Option<PathBuf> {
    let mut path = [0_u8; 4096];
    let found = call(|message, message_len| {
        // SAFETY: both buffers live through the call and are as long as said.
        unsafe {
            ffi::detco_feed_libtorch(
                path.as_mut_ptr().cast(),
                path.len() as i64,
                message,
                message_len,
            )
        }
    });
    found.ok().map(|()| PathBuf::from(text(&path))).filter(|path| path.is_absolute())
}

/// A stretch of a GPU's time: from what its stream had been given at the beginning to what it had
/// been given at the end.
#[derive(Debug)]
pub struct Span(*mut c_void);

impl Span {
    /// Begins behind what the current stream has been given so far. None on a CPU, whose work is
    /// done when it has been given.
    ///
    /// # Errors
    /// When the device failed.
    pub fn begin(device: Device) -> Result<Option<Span>, ShimError> {
        if !device.is_cuda() {
            return Ok(None);
        }
        let span = handle(|out, message, message_len| {
            // SAFETY: a number, `out` and the buffer, ours for the call.
            unsafe { ffi::detco_feed_span_begin(index_of(device), out, message, message_len) }
        });
        span.map(Span).map(Some)
    }

    /// Ends behind what the current stream has been given by now.
    ///
    /// # Errors
    /// When the device failed.
    pub fn end(&mut self) -> Result<(), ShimError> {
        call(|message, message_len| {
            // SAFETY: the handle is live; the buffer is as long as said.
            unsafe { ffi::detco_feed_span_end(self.0, message, message_len) }
        })
    }

    /// How long it was, once the device has reached its end: waits until then. Nothing for one that
    /// was not ended.
    ///
    /// # Errors
    /// When the device failed.
    pub fn read(&self) -> Result<Duration, ShimError> {
        let mut ms = 0.0;
        call(|message, message_len| {
            // SAFETY: the handle is live; a number and the buffer are ours.
            unsafe { ffi::detco_feed_span_read(self.0, &mut ms, message, message_len) }
        })?;
        Ok(Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default())
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        // A device that failed says so at the next call; here there is nothing to do about it.
        let _ = call(|message, message_len| {
            // SAFETY: made by `begin`, freed once: here.
            unsafe { ffi::detco_feed_span_free(self.0, message, message_len) }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn lent_numbers_are_read_where_they_lie_and_counted_until_the_last_reader_is_gone() {
        let mut numbers: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let loan = Loan::new().unwrap();
        let (sizes, strides) = ([2, 3, 2, 2], [12, 1, 6, 3]);
        let lie = Lie { sizes: &sizes, strides: &strides, bf16: false, device: Device::Cpu };
        // SAFETY: as many numbers, which live and are not written while tensors do.
        let images = unsafe { loan.lend(numbers.as_ptr() as u64, lie) }.unwrap();
        assert_eq!((images.kind(), images.size()), (Kind::Float, sizes.to_vec()));
        assert_eq!(images.double_value(&[1, 2, 0, 1]), 12.0 + 2.0 + 3.0);
        assert_eq!(images.data_ptr() as usize, numbers.as_ptr() as usize, "nothing is copied");
        let part = images.narrow(0, 1, 1);
        let copy = images.contiguous();
        drop(images);
        assert_eq!(loan.out().unwrap(), 1, "a part keeps the whole");
        drop(part);
        assert_eq!(loan.out().unwrap(), 0, "a copy keeps nothing");
        numbers.fill(7.0);
        assert_eq!(copy.double_value(&[1, 2, 0, 1]), 17.0);
    }

    #[test]
    fn gradients_of_a_step_hold_no_lent_memory_back() {
        let numbers = [0.5_f32; 8];
        let loan = Loan::new().unwrap();
        let lie = Lie { sizes: &[2, 4], strides: &[4, 1], bf16: false, device: Device::Cpu };
        // SAFETY: as many numbers, which live longer than all tensors here.
        let rows = unsafe { loan.lend(numbers.as_ptr() as u64, lie) }.unwrap();
        let weight = Tensor::ones([4, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let loss = rows.matmul(&weight).sum(None);
        drop(rows);
        assert_eq!(loan.out().unwrap(), 1, "backward will read it");
        loss.backward();
        assert_eq!(loan.out().unwrap(), 0, "backward has read it");
        assert!(weight.grad().equal(&weight.full_like(1.0)));
    }

    #[test]
    fn a_loan_may_end_before_its_tensors() {
        let bits = [0x3F80_u16; 3]; // ones
        let loan = Loan::new().unwrap();
        let lie = Lie { sizes: &[3], strides: &[1], bf16: true, device: Device::Cpu };
        // SAFETY: as many numbers, which live longer than the tensor.
        let ones = unsafe { loan.lend(bits.as_ptr() as u64, lie) }.unwrap();
        drop(loan);
        assert_eq!(ones.kind(), Kind::BFloat16);
        assert_eq!(ones.sum(Kind::Float).double_value(&[]), 3.0);
    }

    #[test]
    fn the_loaded_libtorch_says_where_it_lies() {
        let folder = libtorch().expect("an absolute path");
        assert!(folder.join("lib/libtorch_cpu.so").is_file(), "{}", folder.display());
    }

    #[test]
    fn a_cpu_has_no_time_of_its_own() {
        assert!(Span::begin(Device::Cpu).unwrap().is_none());
    }
}
