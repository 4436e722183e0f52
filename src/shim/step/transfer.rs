//! Copies between host and device beside the computation.

use std::ffi::c_void;

use tch::{Device, Tensor};

use super::{handle, index_of, made};
use crate::shim::{ShimError, call};

mod ffi {
    use std::ffi::{c_char, c_void};

    use torch_sys::C_tensor;

    unsafe extern "C" {
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
    }
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
    pub(super) handle: *mut c_void,
    bytes: usize,
    /// In a place that does not move with the lane.
    pub(super) kept: Option<Box<K>>,
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

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

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
}
