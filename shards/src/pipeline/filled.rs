//! Finished batches, and the count of those that the consumer holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crossbeam::channel::Sender;

use super::BadSample;
use crate::format::ShardError;
use crate::order::Cursor;
use crate::slab::{Layout, Slab};
use crate::stats::Stats;
use crate::views::Note;

/// A finished batch of views. Dropping it frees its slab for the next batch.
#[derive(Debug)]
pub struct Filled {
    /// Its position in the run.
    pub cursor: Cursor,
    /// The samples it holds, substitutes included, in slot order.
    pub samples: Vec<u64>,
    /// Samples that could not be used, in slot order.
    pub bad: Vec<BadSample>,
    /// Read with the samples; empty where they were not asked for.
    pub(super) classes: Vec<Class>,
    pub(super) slab: Option<Slab>,
    pub(super) free: Sender<Slab>,
    pub(super) stats: Arc<Stats>,
    pub(super) _holding: Option<Holding>,
}

impl Filled {
    /// Samples in the batch, n.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether the batch holds nothing (a rank beyond the batch).
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Its layout; `None` for an empty batch.
    pub fn layout(&self) -> Option<&Layout> {
        self.slab.as_ref().map(Slab::layout)
    }

    /// View `view` of a group, of all samples: `[n, h, w, 3]` or `[n, patches, p, p, 3]` bytes.
    ///
    /// # Panics
    /// Where the recipe has no such view.
    pub fn view(&self, group: &str, view: usize) -> &[u8] {
        let of = |slab: &Slab| slab.layout().expect(group, view);
        self.slab.as_ref().map_or(&[], |slab| slab.view(of(slab), self.samples.len()))
    }

    /// What was drawn for view `view` of a group, of the sample in this slot.
    ///
    /// # Panics
    /// Where the recipe has no such view, or the batch no such slot.
    pub fn note(&self, group: &str, view: usize, slot: usize) -> Note {
        assert!(slot < self.samples.len(), "slot {slot} of {}", self.samples.len());
        let slab = self.slab.as_ref().expect("a batch with samples has a slab");
        slab.note(slab.layout().expect(group, view), slot)
    }

    /// The class of each sample, in slot order; `None` where the shard has none. Empty unless
    /// [`LoaderOptions::labels`](super::LoaderOptions::labels) asked for them: they are read with the samples.
    ///
    /// # Errors
    /// A class that is no number: see [`ShardSet::class`](crate::stream::ShardSet::class).
    pub fn labels(&self) -> Result<Vec<Option<u32>>, ShardError> {
        labels(&self.classes)
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        if let Some(slab) = self.slab.take() {
            let (start, found) = (Instant::now(), self.free.len());
            // The loader may be gone: then the slab is freed here.
            let _ = self.free.send(slab);
            self.stats.consumer().put.waited(start.elapsed(), found);
        }
    }
}

/// A sample's class, or the error of reading it.
pub(crate) type Class = Result<Option<u32>, Arc<ShardError>>;

pub(crate) fn labels(classes: &[Class]) -> Result<Vec<Option<u32>>, ShardError> {
    let shared = |error: &Arc<ShardError>| ShardError::Shared(Arc::clone(error));
    classes.iter().map(|class| class.as_ref().copied().map_err(shared)).collect()
}

/// The counter of batches that the consumer holds.
#[derive(Debug, Default)]
pub(super) struct Holders(pub(super) AtomicUsize);

/// Counts as one held batch until it is dropped.
#[derive(Debug)]
pub(crate) struct Holding(Arc<Holders>);

impl Holding {
    pub(super) fn new(holders: &Arc<Holders>) -> Holding {
        holders.0.fetch_add(1, Ordering::Relaxed);
        Holding(Arc::clone(holders))
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}
