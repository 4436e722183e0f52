//! Stand-ins for a GPU in host memory: its view kernels ([`render`]), its driver and nvJPEG
//! ([`driver`]).
//!
//! A crate of its own for the tests' sake: it needs a C++ compiler, which the data plane does not.

#![expect(unsafe_code, reason = "calls C++ that follows addresses")]

pub mod driver;

use std::ffi::{c_int, c_uint, c_void};

unsafe extern "C" {
    fn detco_views_twin(batch: *const c_void, shared_bytes: c_uint, threads: c_uint) -> c_int;
}

/// Renders all views of a batch, one after the other, each by a block of so many threads.
///
/// # Panics
/// Where memory or threads run out.
///
/// # Safety
/// `batch` points at a `Batch` of `view.h`. The addresses in it, and in its views, are
/// those of memory of this process that is as long as the views say and that nobody else uses.
/// `shared_bytes` is what the batch's layout asks for, and there is at least one thread.
pub unsafe fn render(batch: *const c_void, shared_bytes: u32, threads: u32) {
    // SAFETY: the caller's promise, word for word.
    let status = unsafe { detco_views_twin(batch, shared_bytes, threads) };
    assert_eq!(status, 0, "memory or threads ran out");
}
