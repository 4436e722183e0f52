//! What a training step needs of libtorch and `tch` has not: see `step.cpp`.

use std::ffi::{c_char, c_void};
use std::marker::PhantomData;

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use super::{ShimError, call, text};

mod ffi {
    use std::ffi::{c_char, c_void};
    use torch_sys::C_tensor;

    type List = *const *const C_tensor;

    unsafe extern "C" {
        pub(super) fn detco_step_sgd(
            parameters: List,
            gradients: List,
            buffers: List,
            count: i64,
            decay: f64,
            momentum: f64,
            rate: f64,
            nesterov: i32,
            skip: *const C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_lerp(
            into: List,
            towards: List,
            count: i64,
            weight: f64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_copy(
            into: List,
            from: List,
            count: i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_add(
            into: List,
            count: i64,
            summand: *const C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_length(
            tensors: List,
            count: i64,
            out: *mut *mut C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_forget_gradients(
            tensors: List,
            count: i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_channels_last(
            tensor: *const C_tensor,
            out: *mut *mut C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
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
        pub(super) fn detco_step_upload(
            tensor: *const C_tensor,
            cuda_index: i64,
            out: *mut *mut C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_download_begin(
            tensor: *const C_tensor,
            out: *mut *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_download_wait(
            handle: *mut c_void,
            out: *mut *mut C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_download_free(
            handle: *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_lane_new(
            cuda_index: i64,
            bytes: i64,
            out: *mut *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_lane_send(
            handle: *mut c_void,
            sections: *const *const u8,
            lengths: *const i64,
            count: i64,
            out: *mut *mut C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_lane_left(
            handle: *mut c_void,
            wait: i32,
            left: *mut i32,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_lane_used(
            handle: *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_lane_free(
            handle: *mut c_void,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
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

/// The tensors behind a list, borrowed for a call.
fn pointers(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(Tensor::as_ptr).collect()
}

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

/// Numbers of an SGD update.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Weight decay.
    pub decay: f64,
    /// Momentum.
    pub momentum: f64,
    /// Learning rate.
    pub learning: f64,
    /// Whether the momentum is Nesterov's.
    pub nesterov: bool,
}

/// One update by `torch.optim.SGD`'s arithmetic (no dampening; buffers that start at
/// zero, and stay so without momentum) of all parameters in a few launches. Where `skip`, one float on the device, is 1, nothing
/// changes.
///
/// # Errors
/// When the tensors of a place differ in shape, type or device.
///
/// # Panics
/// When the lists differ in length.
pub fn sgd(
    parameters: &[Tensor],
    gradients: &[Tensor],
    buffers: &[Tensor],
    rates: Rates,
    skip: Option<&Tensor>,
) -> Result<(), ShimError> {
    assert_eq!((parameters.len(), parameters.len()), (gradients.len(), buffers.len()));
    if parameters.is_empty() {
        return Ok(());
    }
    let lists = [parameters, gradients, buffers].map(pointers);
    let skip = skip.map_or(std::ptr::null(), Tensor::as_ptr);
    call(|message, message_len| {
        // SAFETY: three lists of as many live tensors as said, `skip` null or live, all borrowed
        // for the call; the message's buffer is as long as said.
        unsafe {
            ffi::detco_step_sgd(
                lists[0].as_ptr(),
                lists[1].as_ptr(),
                lists[2].as_ptr(),
                parameters.len() as i64,
                rates.decay,
                rates.momentum,
                rates.learning,
                i32::from(rates.nesterov),
                skip,
                message,
                message_len,
            )
        }
    })
}

/// `into[i] += weight * (towards[i] - into[i])`, in a few launches.
///
/// # Errors
/// When shapes or types differ.
///
/// # Panics
/// When the lists differ in length.
pub fn lerp(into: &[Tensor], towards: &[Tensor], weight: f64) -> Result<(), ShimError> {
    assert_eq!(into.len(), towards.len());
    if into.is_empty() {
        return Ok(());
    }
    let (into, towards) = (pointers(into), pointers(towards));
    let count = into.len() as i64;
    call(|message, message_len| {
        // SAFETY: two lists of `count` live tensors, borrowed for the call; the buffer is as said.
        unsafe {
            ffi::detco_step_lerp(
                into.as_ptr(),
                towards.as_ptr(),
                count,
                weight,
                message,
                message_len,
            )
        }
    })
}

/// Copies the values of each tensor into its partner, in a few launches.
///
/// # Errors
/// When shapes differ.
///
/// # Panics
/// When the lists differ in length.
pub fn copy(into: &[Tensor], from: &[Tensor]) -> Result<(), ShimError> {
    assert_eq!(into.len(), from.len());
    if into.is_empty() {
        return Ok(());
    }
    let (into, from) = (pointers(into), pointers(from));
    let count = into.len() as i64;
    call(|message, message_len| {
        // SAFETY: two lists of `count` live tensors, borrowed for the call; the buffer is as said.
        unsafe { ffi::detco_step_copy(into.as_ptr(), from.as_ptr(), count, message, message_len) }
    })
}

/// Adds a scalar tensor to each.
///
/// # Errors
/// When `summand` is no scalar, or lies on another device.
pub fn add(into: &[Tensor], summand: &Tensor) -> Result<(), ShimError> {
    if into.is_empty() {
        return Ok(());
    }
    let (into, count) = (pointers(into), into.len() as i64);
    call(|message, message_len| {
        // SAFETY: `count` live tensors and one more, borrowed for the call; the buffer is as said.
        unsafe { ffi::detco_step_add(into.as_ptr(), count, summand.as_ptr(), message, message_len) }
    })
}

/// Euclidean length of all tensors together, a scalar.
///
/// # Errors
/// When there is none, or they differ in type or device.
pub fn length(tensors: &[Tensor]) -> Result<Tensor, ShimError> {
    let (list, count) = (pointers(tensors), tensors.len() as i64);
    made(|out, message, message_len| {
        // SAFETY: `count` live tensors, borrowed for the call; `out` and the buffer are ours.
        unsafe { ffi::detco_step_length(list.as_ptr(), count, out, message, message_len) }
    })
}

/// Takes the gradients of these tensors away.
///
/// # Errors
/// Never in practice.
pub fn forget_gradients(tensors: &[Tensor]) -> Result<(), ShimError> {
    let (list, count) = (pointers(tensors), tensors.len() as i64);
    call(|message, message_len| {
        // SAFETY: `count` live tensors, borrowed for the call; the buffer is as long as said.
        unsafe { ffi::detco_step_forget_gradients(list.as_ptr(), count, message, message_len) }
    })
}

/// `[n, c, h, w]` with channels innermost in memory; the same memory if they are already.
///
/// # Errors
/// When the tensor has not four dimensions.
pub fn channels_last(tensor: &Tensor) -> Result<Tensor, ShimError> {
    made(|out, message, message_len| {
        // SAFETY: a live tensor, borrowed for the call; `out` and the buffer are ours.
        unsafe { ffi::detco_step_channels_last(tensor.as_ptr(), out, message, message_len) }
    })
}

/// While it lives, this thread's operations run as `torch.autocast` to bfloat16 has them:
/// convolutions and linear layers in bfloat16, what needs range or precision in float32. Weights
/// are cast once and forgotten when the outermost ends.
#[derive(Debug)]
#[must_use = "autocast ends when this is dropped"]
pub struct Autocast {
    cuda_index: i64,
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

/// A small tensor of the host on the device, without waiting for what the device has still to do.
///
/// # Errors
/// When the device is out of memory.
pub fn upload(tensor: &Tensor, device: Device) -> Result<Tensor, ShimError> {
    made(|out, message, message_len| {
        // SAFETY: a live tensor, borrowed for the call; `out` and the buffer are ours.
        unsafe {
            ffi::detco_step_upload(tensor.as_ptr(), index_of(device), out, message, message_len)
        }
    })
}

/// Numbers on their way from the device to the host.
#[derive(Debug)]
#[must_use = "the numbers are read by `wait`"]
pub struct Download(*mut c_void);

impl Download {
    /// Begins to copy, behind all work that the device has been given so far; waits for nothing.
    ///
    /// # Errors
    /// When the host is out of memory.
    pub fn begin(tensor: &Tensor) -> Result<Download, ShimError> {
        handle(|out, message, message_len| {
            // SAFETY: a live tensor, borrowed for the call; `out` and the buffer are ours.
            unsafe { ffi::detco_step_download_begin(tensor.as_ptr(), out, message, message_len) }
        })
        .map(Download)
    }

    /// The numbers on the host, once they are there.
    ///
    /// # Errors
    /// When the device failed in the meantime.
    pub fn wait(self) -> Result<Tensor, ShimError> {
        made(|out, message, message_len| {
            // SAFETY: the handle is live until `self` is dropped, after the call.
            unsafe { ffi::detco_step_download_wait(self.0, out, message, message_len) }
        })
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        // A device that failed says so at the next call; here there is nothing to do about it.
        let _ = call(|message, message_len| {
            // SAFETY: made by `begin`, freed once: here.
            unsafe { ffi::detco_step_download_free(self.0, message, message_len) }
        });
    }
}

/// A way for bytes from the host to the device, beside the computation: a buffer on the device, and a
/// stream of its own that fills it from where the bytes lie. It keeps what they lie in, `K`, until
/// they have left. From pages that are locked the device copies by itself; from others the driver
/// copies first.
#[derive(Debug)]
pub struct Lane<K> {
    handle: *mut c_void,
    bytes: usize,
    /// In a place that does not move with the lane.
    kept: Option<Box<K>>,
}

impl<K> Lane<K> {
    /// Allocates the buffer.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: Device, bytes: usize) -> Result<Lane<K>, ShimError> {
        let handle = handle(|out, message, message_len| {
            // SAFETY: numbers, `out` and a buffer, ours for the call.
            unsafe {
                ffi::detco_step_lane_new(index_of(device), bytes as i64, out, message, message_len)
            }
        })?;
        Ok(Lane { handle, bytes, kept: None })
    }

    /// Sends `sections` of what is kept, one behind the other; gives the bytes on the device to
    /// `read`, which must give the current stream all that reads them: the next sending overwrites
    /// them. If the copy before is still under way, waits for it.
    ///
    /// # Errors
    /// When the device failed.
    ///
    /// # Panics
    /// When the sections are not as long together as the buffer.
    pub fn send<T>(
        &mut self,
        keep: K,
        sections: impl Fn(&K) -> Vec<&[u8]>,
        read: impl FnOnce(&Tensor, &K) -> T,
    ) -> Result<T, ShimError> {
        self.settle()?;
        // What the bytes lie in is kept before they are sent, also if that fails half-way.
        let kept = &**self.kept.insert(Box::new(keep));
        let sections = sections(kept);
        assert_eq!(sections.iter().map(|section| section.len()).sum::<usize>(), self.bytes);
        let lengths: Vec<i64> = sections.iter().map(|section| section.len() as i64).collect();
        let starts: Vec<*const u8> = sections.iter().map(|section| section.as_ptr()).collect();
        let sent = made(|out, message, message_len| {
            // SAFETY: the handle is live; both lists are as long as said; `out` and the buffer are
            // ours. The sections fill the lane's buffer exactly, and are borrowed from `kept`, which
            // nobody changes and which is dropped only when they have left (`left`, `drop`).
            unsafe {
                ffi::detco_step_lane_send(
                    self.handle,
                    starts.as_ptr(),
                    lengths.as_ptr(),
                    starts.len() as i64,
                    out,
                    message,
                    message_len,
                )
            }
        })?;
        let value = read(&sent, kept);
        call(|message, message_len| {
            // SAFETY: `self.handle` is live; the buffer is as long as said.
            unsafe { ffi::detco_step_lane_used(self.handle, message, message_len) }
        })?;
        Ok(value)
    }

    /// Lets go of what is kept, if its bytes have left.
    ///
    /// # Errors
    /// When the device failed.
    pub fn release(&mut self) -> Result<(), ShimError> {
        if self.kept.is_some() && self.left(0)? {
            self.kept = None;
        }
        Ok(())
    }

    /// Lets go of what is kept, when its bytes have left.
    ///
    /// # Errors
    /// When the device failed.
    pub fn settle(&mut self) -> Result<(), ShimError> {
        if self.kept.is_some() && self.left(1)? {
            self.kept = None;
        }
        Ok(())
    }

    fn left(&self, wait: i32) -> Result<bool, ShimError> {
        let mut left = 0;
        call(|message, message_len| {
            // SAFETY: `self.handle` is live; a number and the buffer are ours.
            unsafe { ffi::detco_step_lane_left(self.handle, wait, &mut left, message, message_len) }
        })?;
        Ok(left != 0)
    }
}

impl<K> Drop for Lane<K> {
    fn drop(&mut self) {
        if self.settle().is_err() {
            // What a copy may still read is better lost than freed.
            std::mem::forget(self.kept.take());
        }
        // A device that failed says so at the next call; here there is nothing to do about it.
        let _ = call(|message, message_len| {
            // SAFETY: made by `new`, freed once: here.
            unsafe { ffi::detco_step_lane_free(self.handle, message, message_len) }
        });
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
    use super::*;
    use tch::Kind;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
    }

    #[test]
    fn sgd_skips_where_the_device_says_so() {
        let rates = Rates { decay: 0.1, momentum: 0.5, learning: 2.0, nesterov: false };
        let tensors = |value: f64| [Tensor::full([2, 3], value, CPU)];
        let (parameter, gradient, buffer) = (tensors(1.0), tensors(0.4), tensors(3.0));
        let flag = |value: f64| Tensor::full([1], value, CPU);
        sgd(&parameter, &gradient, &buffer, rates, Some(&flag(1.0))).unwrap();
        assert_eq!(numbers(&parameter[0]), [1.0; 6]);
        assert_eq!(numbers(&buffer[0]), [3.0; 6]);
        sgd(&parameter, &gradient, &buffer, rates, Some(&flag(0.0))).unwrap();
        // d = 0.4 + 0.1; buffer = 1.5 + d; parameter -= 2 * buffer
        assert!((numbers(&buffer[0])[5] - 2.0).abs() < 1e-6);
        assert!((numbers(&parameter[0])[5] + 3.0).abs() < 1e-6);
        assert_eq!(numbers(&gradient[0]), numbers(&tensors(0.4)[0]));
    }

    #[test]
    fn sgd_reads_gradients_that_lie_otherwise_in_memory() {
        let rates = Rates { decay: 0.0, momentum: 0.0, learning: 1.0, nesterov: false };
        let gradient = Tensor::arange(2 * 3 * 4 * 4, CPU).view([2, 3, 4, 4]);
        let parameter = channels_last(&gradient.zeros_like()).unwrap();
        let buffer = parameter.zeros_like();
        assert_ne!(parameter.stride(), gradient.stride());
        let parameters = [parameter];
        sgd(&parameters, &[gradient.shallow_clone()], &[buffer], rates, None).unwrap();
        assert!(parameters[0].equal(&(gradient * -1.0)));
    }

    #[test]
    fn lists_are_followed_copied_added_and_measured() {
        let list = |values: [f64; 2]| values.map(|value| Tensor::full([3], value, CPU));
        let into = list([0.0, 10.0]);
        lerp(&into, &list([4.0, 20.0]), 0.25).unwrap();
        assert_eq!((numbers(&into[0]), numbers(&into[1])), (vec![1.0; 3], vec![12.5; 3]));
        assert!((numbers(&length(&list([3.0, 4.0])).unwrap())[0] - 75_f64.sqrt()).abs() < 1e-5);
        copy(&into, &list([7.0, 8.0])).unwrap();
        add(&into, &Tensor::from(0.5_f32)).unwrap();
        assert_eq!((numbers(&into[0]), numbers(&into[1])), (vec![7.5; 3], vec![8.5; 3]));
        let error = lerp(&into, &[into[0].view([3, 1]), Tensor::zeros([5], CPU)], 0.5);
        assert!(error.unwrap_err().to_string().starts_with("libtorch: "));
    }

    #[test]
    fn gradients_are_forgotten() {
        let x = Tensor::full([2], 3.0, CPU).set_requires_grad(true);
        (&x * &x).sum(None).backward();
        assert_eq!(numbers(&x.grad()), [6.0, 6.0]);
        forget_gradients(&[x.shallow_clone()]).unwrap();
        assert!(!x.grad().defined());
    }

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

    #[test]
    fn a_lane_carries_its_sections_and_keeps_what_they_lie_in() {
        let mut lane = Lane::new(Device::Cpu, 5).unwrap();
        let mut before = std::sync::Weak::new();
        for first in [1_u8, 100] {
            let kept = std::sync::Arc::new([vec![first, 2], vec![3, 4, 5]]);
            let watch = std::sync::Arc::downgrade(&kept);
            let sum = lane.send(
                kept,
                |kept| kept.iter().map(Vec::as_slice).collect(),
                |bytes, _| bytes.sum(Kind::Int64),
            );
            let sum = sum.unwrap();
            assert_eq!(sum.int64_value(&[]), i64::from(first) + 14);
            assert!(before.upgrade().is_none() && watch.upgrade().is_some());
            before = watch;
        }
        lane.release().unwrap();
        assert!(before.upgrade().is_none(), "on a CPU bytes have left at once");
    }

    #[test]
    fn numbers_come_to_the_host() {
        let numbers = Tensor::from_slice(&[1.5_f64, 2.5]);
        let arrived = Download::begin(&numbers).unwrap().wait().unwrap();
        assert!(arrived.equal(&numbers));
        assert!(upload(&numbers, Device::Cpu).unwrap().equal(&numbers));
    }

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
