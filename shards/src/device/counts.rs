//! Counts of images by who decoded them.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Who decoded how many images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Counts {
    /// Images that the batch decoder decoded.
    pub batched: u64,
    /// Images that the device decoded one by one.
    pub single: u64,
    /// Images that the CPU decoded in the device's place.
    pub cpu: u64,
    /// Batches that the batch decoder refused; their images are counted where they went.
    pub refused: u64,
    /// Share of what the batch decoder takes that goes there; none while it is measured.
    pub share: Option<f64>,
}

impl Counts {
    /// What was counted after `earlier`, and the share as it is now.
    pub fn since(self, earlier: Counts) -> Counts {
        Counts {
            batched: self.batched - earlier.batched,
            single: self.single - earlier.single,
            cpu: self.cpu - earlier.cpu,
            refused: self.refused - earlier.refused,
            share: self.share,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) batched: AtomicU64,
    pub(super) single: AtomicU64,
    pub(super) cpu: AtomicU64,
    pub(super) refused: AtomicU64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }
}
