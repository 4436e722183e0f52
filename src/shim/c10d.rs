//! Stores, process groups and the reducer of c10d, libtorch's distributed engine.
//!
//! Owning types over the handles of `c10d.cpp`; each closes its handle when it is dropped. A
//! collective that runs is a [`Work`], which borrows its tensors until it is waited for.

mod ffi;
mod group;
mod reducer;
mod store;
#[cfg(test)]
mod tests;

use std::ptr::NonNull;
use std::time::Duration;

pub use group::{Group, Member, Work};
pub use reducer::{Reducer, Wire, taking_part};
pub use store::{Role, Store};

/// Handles that exist: stores, groups, works, reducers. All are closed when all are zero.
pub fn live_handles() -> [i64; 4] {
    let mut four = [0; 4];
    // SAFETY: the function writes four numbers, and `four` has room for four.
    unsafe { ffi::detco_c10d_live(four.as_mut_ptr()) };
    four
}

/// Ends the process at once with `code`: no destructors, so that threads of a process group that
/// wait for a lost rank are not waited for.
pub fn exit(code: i32) -> ! {
    // SAFETY: the function takes any number and touches no memory of ours.
    unsafe { ffi::detco_exit(code) }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// A handle that C++ has just made.
fn made(handle: *mut ffi::Opaque) -> NonNull<ffi::Opaque> {
    NonNull::new(handle).expect("a call that succeeded has made a handle")
}
