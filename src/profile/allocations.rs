//! A counting allocator: how often the process allocates memory.
//!
//! `detco` always uses it, since nobody takes a profile that needs another binary. It costs
//! one relaxed addition an allocation, and the pipeline's steady state makes about ten an image, all
//! of them the JPEG decoder's: beside the milliseconds of an image that is nothing.

#![expect(unsafe_code, reason = "an allocator can only be wrapped by an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

static COUNT: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, counted. For `#[global_allocator]`.
#[derive(Clone, Copy, Debug)]
pub struct Counting;

/// Allocations of the process so far; `None` where [`Counting`] is not its allocator.
pub fn count() -> Option<u64> {
    // A program has allocated long before it can ask.
    Some(COUNT.load(Ordering::Relaxed)).filter(|count| *count > 0)
}

// SAFETY: every method hands its arguments to `System`, which upholds the contract, and returns its
// answer unchanged; counting neither allocates nor panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps this trait's contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as in `alloc`; `pointer` came from `System`, as every block of this allocator.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as in `realloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}
