//! Recycled host buffers that hold a batch of pixels, written by many workers at once.
//!
//! A [`Slab`] is one allocation with a section for each view, laid out as the trainer reads it:
//! `[n, h, w, 3]` u8 for a global crop, `[n, 9, p, p, 3]` for a patch set. Slabs circulate between
//! pipeline and trainer; none is allocated after warm-up (wall 7). For a GPU they are page-locked, so
//! that it copies from them by itself.

#![expect(unsafe_code, reason = "workers write disjoint slots of one allocation")]

use std::alloc::{self, alloc_zeroed};
use std::cell::UnsafeCell;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use thiserror::Error;

#[cfg(feature = "cuda")]
use crate::cuda::{CudaError, Device, Registered};
#[cfg(feature = "cuda")]
use crate::limits::page_size;

/// Sizes of a slab's sections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Samples.
    pub n: usize,
    /// Bytes of one global crop, `h * w * 3`.
    pub global_bytes: usize,
    /// Global crops of a sample: 2 for training, 1 for evaluation.
    pub globals: usize,
    /// Bytes of one patch set, `9 * p * p * 3`.
    pub local_bytes: usize,
    /// Patch sets of a sample: 2, or 0 without local views.
    pub locals: usize,
}

impl Layout {
    /// Bytes of the whole slab.
    pub fn bytes(&self) -> usize {
        self.n * (self.globals * self.global_bytes + self.locals * self.local_bytes)
    }

    /// [`Layout::bytes`] in a number that any layout fits.
    fn bytes_wide(&self) -> u128 {
        let [n, globals, global, locals, local] =
            [self.n, self.globals, self.global_bytes, self.locals, self.local_bytes]
                .map(|number| number as u128);
        n.saturating_mul(
            globals.saturating_mul(global).saturating_add(locals.saturating_mul(local)),
        )
    }

    /// The section of global view `view`.
    fn global(&self, view: usize) -> Range<usize> {
        assert!(view < self.globals, "global view {view} of {}", self.globals);
        let bytes = self.n * self.global_bytes;
        view * bytes..(view + 1) * bytes
    }

    /// The section of patch set `view`.
    fn local(&self, view: usize) -> Range<usize> {
        assert!(view < self.locals, "patch set {view} of {}", self.locals);
        let start = self.globals * self.n * self.global_bytes;
        let bytes = self.n * self.local_bytes;
        start + view * bytes..start + (view + 1) * bytes
    }
}

/// One batch of pixels.
#[derive(Debug)]
pub struct Slab {
    // Before the bytes: pages are unlocked before they are freed.
    #[cfg(feature = "cuda")]
    _locked: Option<Registered>,
    bytes: Box<[u8]>,
    /// Where the sections begin.
    start: usize,
    layout: Layout,
}

/// No memory for a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("no memory for {bytes} bytes")]
pub struct NoMemory {
    /// Bytes that were asked for.
    pub bytes: u128,
}

/// Zeroed memory that the system need not touch before it is used, or why there is none.
fn zeroed(bytes: u128) -> Result<Box<[u8]>, NoMemory> {
    let none = NoMemory { bytes };
    let layout = usize::try_from(bytes).ok().and_then(|len| alloc::Layout::array::<u8>(len).ok());
    let layout = layout.ok_or(none)?;
    if layout.size() == 0 {
        return Ok(Box::default());
    }
    // SAFETY: the layout's size is not zero.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        return Err(none);
    }
    let slice = ptr::slice_from_raw_parts_mut(memory, layout.size());
    // SAFETY: the global allocator gave this memory with the layout of a `[u8]` of that length, all of it is
    // initialised, and nothing else owns it.
    Ok(unsafe { Box::from_raw(slice) })
}

impl Slab {
    /// Allocates a zeroed slab.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(layout: Layout) -> Result<Slab, NoMemory> {
        Ok(Slab {
            #[cfg(feature = "cuda")]
            _locked: None,
            bytes: zeroed(layout.bytes_wide())?,
            start: 0,
            layout,
        })
    }

    /// Allocates a zeroed slab whose pages are locked for `device`.
    ///
    /// # Errors
    /// When that much cannot be locked, or the driver fails.
    #[cfg(feature = "cuda")]
    pub fn locked(layout: Layout, device: &Arc<Device>) -> Result<Slab, CudaError> {
        let mut slab = Slab::on_pages(layout)?;
        let len = layout.bytes().next_multiple_of(page_size());
        let pointer = slab.bytes[slab.start..][..len].as_mut_ptr();
        // SAFETY: whole pages of `bytes`, which is neither moved nor freed before `_locked` is.
        slab._locked = Some(unsafe { Registered::new(device, pointer, len) }?);
        Ok(slab)
    }

    /// A zeroed slab that begins with a page of the system, and shares its last one with nobody: pages are
    /// locked as a whole.
    #[cfg(feature = "cuda")]
    fn on_pages(layout: Layout) -> Result<Slab, NoMemory> {
        let page = page_size();
        let len = layout.bytes_wide().next_multiple_of(page as u128);
        let bytes = zeroed(len + page as u128)?;
        let start = bytes.as_ptr().addr().next_multiple_of(page) - bytes.as_ptr().addr();
        Ok(Slab { _locked: None, bytes, start, layout })
    }

    /// What the sections hold.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Global view `view` of the first `n` samples: `[n, h, w, 3]`.
    pub fn global(&self, view: usize, n: usize) -> &[u8] {
        &self.bytes[self.start..][self.layout.global(view)][..n * self.layout.global_bytes]
    }

    /// Patch set `view` of the first `n` samples: `[n, 9, p, p, 3]`.
    pub fn local(&self, view: usize, n: usize) -> &[u8] {
        &self.bytes[self.start..][self.layout.local(view)][..n * self.layout.local_bytes]
    }
}

/// A slab that its slots share until the last of them is done.
#[derive(Debug)]
struct Shared(UnsafeCell<Slab>);

// SAFETY: shared access goes through `Slot`, whose numbers are unique (`into_slots` makes each
// once, and a slot cannot be cloned), so no two threads reach the same bytes; the whole slab leaves
// only through `Arc::into_inner`, which proves that no slot is left.
unsafe impl Sync for Shared {}

impl Slab {
    /// Opens the slab for writing: a slot for each of the first `n` samples.
    pub fn into_slots(self, n: usize) -> Vec<Slot> {
        assert!((1..=self.layout.n).contains(&n), "{n} slots in a slab of {}", self.layout.n);
        let shared = Arc::new(Shared(UnsafeCell::new(self)));
        (0..n).map(|index| Slot { shared: Arc::clone(&shared), index }).collect()
    }
}

/// The right to write one sample of a slab: exists once for each index.
#[derive(Debug)]
pub struct Slot {
    shared: Arc<Shared>,
    index: usize,
}

impl Slot {
    /// The sample's number in the slab.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Where global view `view` of this sample goes: `[h, w, 3]`.
    pub fn global(&mut self, view: usize) -> &mut [u8] {
        let layout = self.layout();
        self.part(layout.global(view), layout.global_bytes)
    }

    /// Where patch set `view` of this sample goes: `[9, p, p, 3]`.
    pub fn local(&mut self, view: usize) -> &mut [u8] {
        let layout = self.layout();
        self.part(layout.local(view), layout.local_bytes)
    }

    /// Ends the writing. The last slot to be done gets the slab back: exactly one does, since
    /// every slot gives its reference up here and the count has one last decrement.
    pub fn done(self) -> Option<Slab> {
        Arc::into_inner(self.shared).map(|shared| shared.0.into_inner())
    }

    fn layout(&self) -> Layout {
        // SAFETY: the pointer comes from a live UnsafeCell; `layout` is never written after
        // `Slab::new`, so reading it beside the slots' writes (which touch `bytes` only) is sound.
        unsafe { (*self.shared.0.get()).layout }
    }

    fn part(&mut self, section: Range<usize>, bytes: usize) -> &mut [u8] {
        let start = section.start + self.index * bytes;
        assert!(start + bytes <= section.end, "slot {} lies outside its section", self.index);
        // SAFETY: reads the Box's pointer without making a reference to its bytes, which other
        // slots may be writing; the Box itself is not replaced while slots live.
        let base = unsafe { std::ptr::addr_of_mut!((*self.shared.0.get()).bytes) };
        // SAFETY: `base` points at a live Box<[u8]>; as_mut_ptr on the raw slice makes no reference.
        let pointer = unsafe { std::ptr::addr_of_mut!(**base) }.cast::<u8>();
        // SAFETY: as for `layout`: never written after the slab was made.
        let sections = unsafe { (*self.shared.0.get()).start };
        // SAFETY: `start + bytes` lies inside the sections (asserted above; they tile what the slab
        // allocated for them from `sections` on).
        let first = unsafe { pointer.add(sections + start) };
        // SAFETY: these bytes belong to this slot alone, since slot numbers are unique and parts of
        // different numbers are disjoint; `&mut self` keeps the caller to one part at a time.
        unsafe { std::slice::from_raw_parts_mut(first, bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout =
        Layout { n: 64, global_bytes: 12, globals: 2, local_bytes: 27, locals: 2 };

    #[test]
    fn many_threads_fill_one_slab() {
        fill(Slab::new(LAYOUT).unwrap());
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_slab_on_pages_of_its_own_is_filled_as_any() {
        let slab = Slab::on_pages(LAYOUT).unwrap();
        let first = slab.global(0, 64).as_ptr().addr();
        assert!(first.is_multiple_of(page_size()));
        let end = slab.bytes.as_ptr().addr() + slab.bytes.len();
        assert!(first + LAYOUT.bytes().next_multiple_of(page_size()) <= end);
        fill(slab);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn pages_are_locked_for_a_gpu() {
        use detco_twin::driver::{again, hold_nothing_against};

        match Device::open(0) {
            Ok(device) => {
                fill(Slab::locked(LAYOUT, &device).unwrap());
                println!("locked for {}", device.name());
                hold_nothing_against();
            }
            Err(error) => {
                println!("no GPU here: {error}");
                again(concat!(module_path!(), "::pages_are_locked_for_a_gpu"));
            }
        }
    }

    fn fill(mut slab: Slab) {
        for _ in 0..20 {
            let slots = std::sync::Mutex::new(slab.into_slots(64));
            let last = std::sync::Mutex::new(None);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        loop {
                            let Some(mut slot) = slots.lock().unwrap().pop() else { break };
                            let value = slot.index() as u8;
                            for view in 0..2 {
                                slot.global(view).fill(value + view as u8);
                                slot.local(view).fill(value + 100 + view as u8);
                            }
                            if let Some(slab) = slot.done() {
                                assert!(last.lock().unwrap().replace(slab).is_none());
                            }
                        }
                    });
                }
            });
            slab = last.into_inner().unwrap().expect("one slot was last");
            for (i, crop) in slab.global(1, 64).chunks(12).enumerate() {
                assert!(crop.iter().all(|byte| *byte == i as u8 + 1));
            }
            for (i, set) in slab.local(0, 64).chunks(27).enumerate() {
                assert!(set.iter().all(|byte| *byte == i as u8 + 100));
            }
        }
    }

    #[test]
    fn a_slab_that_does_not_fit_is_an_error() {
        let views = Layout { n: 1 << 20, global_bytes: 3 << 24, ..LAYOUT };
        for n in [1 << 20, usize::MAX] {
            let error = Slab::new(Layout { n, ..views }).unwrap_err();
            assert!(error.bytes >= (1 << 20) * 2 * (3 << 24), "{error}");
        }
        assert_eq!(Slab::new(Layout { n: 0, ..LAYOUT }).unwrap().bytes.len(), 0);
    }

    #[test]
    fn sections_tile_the_slab() {
        let parts = [LAYOUT.global(0), LAYOUT.global(1), LAYOUT.local(0), LAYOUT.local(1)];
        assert_eq!(parts[0].start, 0);
        assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert_eq!(parts[3].end, LAYOUT.bytes());
    }

    #[test]
    fn a_slab_in_work_is_not_given_out() {
        let mut slots = Slab::new(LAYOUT).unwrap().into_slots(2);
        assert!(slots.pop().unwrap().done().is_none());
        assert!(slots.pop().unwrap().done().is_some());
    }
}
