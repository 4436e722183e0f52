//! Recycled host buffers that hold a batch of views, written by many workers at once.
//!
//! A [`Slab`] is one allocation with a section for each group of views, laid out as the trainer reads
//! it: for each view of the group `[n, h, w, 3]` bytes, or `[n, patches, p, p, 3]`, followed by the views'
//! notes. Slabs circulate between pipeline and trainer; none is allocated after warm-up. For a GPU they are
//! page-locked, so that it copies from them by DMA.

#![expect(unsafe_code, reason = "workers write disjoint slots of one allocation")]

use std::alloc::{self, alloc_zeroed};
use std::cell::UnsafeCell;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

#[cfg(feature = "cuda")]
use crate::cuda::{CudaError, Device, Registered};
use crate::layout::Note;
pub use crate::layout::{Layout, Section};
pub use crate::limits::NoMemory;
#[cfg(feature = "cuda")]
use crate::limits::page_size;

/// One batch of views.
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

/// Allocates zeroed memory, whose pages the system need not touch before they are used.
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
        let len = layout.bytes().next_multiple_of(page_size());
        let mut slab = Slab::on_pages(layout)?;
        let pointer = slab.bytes[slab.start..][..len].as_mut_ptr();
        // SAFETY: whole pages of `bytes`, which is neither moved nor freed before `_locked` is.
        slab._locked = Some(unsafe { Registered::new(device, pointer, len) }?);
        Ok(slab)
    }

    /// A zeroed slab that begins with a page of the system and shares its last page with nothing, since pages
    /// are locked as a whole.
    #[cfg(feature = "cuda")]
    fn on_pages(layout: Layout) -> Result<Slab, NoMemory> {
        let page = page_size();
        let len = layout.bytes_wide().next_multiple_of(page as u128);
        let bytes = zeroed(len + page as u128)?;
        let start = bytes.as_ptr().addr().next_multiple_of(page) - bytes.as_ptr().addr();
        Ok(Slab { _locked: None, bytes, start, layout })
    }

    /// Its layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// View `number`, among all views, of the first `n` samples: `[n, ...]` of its shape.
    pub fn view(&self, number: usize, n: usize) -> &[u8] {
        let (section, bytes) = self.layout.view(number);
        &self.bytes[self.start..][section][..n * bytes]
    }

    /// What was drawn for a view of a sample.
    pub fn note(&self, number: usize, slot: usize) -> Note {
        let (section, bytes) = self.layout.note(number);
        Note::read(&self.bytes[self.start..][section][slot * bytes..][..bytes])
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
        assert!((1..=self.layout.n()).contains(&n), "{n} slots in a slab of {}", self.layout.n());
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

    /// The bytes of view `number`, among all views, of this sample.
    pub fn view(&mut self, number: usize) -> &mut [u8] {
        let (section, bytes) = self.layout().view(number);
        self.part(section, bytes)
    }

    /// Writes the note of a view.
    pub fn note(&mut self, number: usize, note: &Note) {
        let (section, bytes) = self.layout().note(number);
        note.write(self.part(section, bytes));
    }

    /// Ends the writing. The last slot to be done gets the slab back: exactly one does, since
    /// every slot gives its reference up here and the count has one last decrement.
    pub fn done(self) -> Option<Slab> {
        Arc::into_inner(self.shared).map(|shared| shared.0.into_inner())
    }

    fn layout(&self) -> &Layout {
        // SAFETY: the pointer comes from a live UnsafeCell; `layout` is never written after
        // `Slab::new`, so a reference to it beside the slots' writes (which touch what `bytes` points
        // at only) is sound; it lives no longer than this slot, and so than the slab.
        unsafe { &(*self.shared.0.get()).layout }
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
    use crate::decode::Rect;

    fn layout() -> Layout {
        let sections = [("crops", vec![2, 2, 3]), ("patches", vec![9, 1, 1, 3])];
        let section = |(name, shape)| Section::new(name, 2, shape);
        Layout::new(64, sections.map(section).into())
    }

    #[test]
    fn many_threads_fill_one_slab() {
        fill(Slab::new(layout()).unwrap());
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_slab_on_pages_of_its_own_is_filled_as_any() {
        let slab = Slab::on_pages(layout()).unwrap();
        let first = slab.view(0, 64).as_ptr().addr();
        assert!(first.is_multiple_of(page_size()));
        let end = slab.bytes.as_ptr().addr() + slab.bytes.len();
        assert!(first + layout().bytes().next_multiple_of(page_size()) <= end);
        fill(slab);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn pages_are_locked_for_a_gpu() {
        use detco_twin::driver::{again, hold_nothing_against};

        match Device::open(0) {
            Ok(device) => {
                fill(Slab::locked(layout(), &device).unwrap());
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
                                slot.view(view).fill(value + view as u8);
                                slot.view(2 + view).fill(value + 100 + view as u8);
                            }
                            for view in 0..4 {
                                slot.note(view, &note(slot.index(), view));
                            }
                            if let Some(slab) = slot.done() {
                                assert!(last.lock().unwrap().replace(slab).is_none());
                            }
                        }
                    });
                }
            });
            slab = last.into_inner().unwrap().expect("one slot was last");
            for (i, crop) in slab.view(1, 64).chunks(12).enumerate() {
                assert!(crop.iter().all(|byte| *byte == i as u8 + 1));
            }
            for (i, set) in slab.view(2, 64).chunks(27).enumerate() {
                assert!(set.iter().all(|byte| *byte == i as u8 + 100));
            }
            for (slot, view) in (0..64).flat_map(|slot| (0..4).map(move |view| (slot, view))) {
                assert_eq!(slab.note(view, slot), note(slot, view));
            }
        }
    }

    fn note(slot: usize, view: usize) -> Note {
        let [slot, view] = [slot, view].map(|number| number as u32);
        Note {
            picture: [slot, view],
            crop: Rect { left: slot + 1, top: view + 2, width: slot + 3, height: view + 4 },
            flip: slot % 2 == 0,
            rotation: (slot % 4) as u8,
            permutation: (view > 1).then_some(slot),
        }
    }

    #[test]
    fn a_slab_that_does_not_fit_is_an_error() {
        let of = |n, side| Layout::new(n, vec![Section::new("crops", 2, vec![side, side, 3])]);
        for n in [1 << 20, usize::MAX] {
            let error = Slab::new(of(n, 4096)).unwrap_err();
            assert!(error.bytes >= (1 << 20) * 2 * (3 << 24), "{error}");
        }
        assert_eq!(Slab::new(of(0, 4096)).unwrap().bytes.len(), 0);
    }

    #[test]
    fn sections_tile_the_slab() {
        let layout = layout();
        let views = (0..4).map(|number| layout.view(number).0);
        let notes = (0..4).map(|number| layout.note(number).0);
        let parts: Vec<_> = views.chain(notes).collect();
        assert_eq!(parts[0].start, 0);
        assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert_eq!((parts[3].end, parts[7].end), (layout.pixels(), layout.bytes()));
        assert_eq!(layout.number("patches", 1), Some(3));
        assert_eq!((layout.number("patches", 2), layout.number("image", 0)), (None, None));
    }

    #[test]
    fn a_slab_in_work_is_not_given_out() {
        let mut slots = Slab::new(layout()).unwrap().into_slots(2);
        assert!(slots.pop().unwrap().done().is_none());
        assert!(slots.pop().unwrap().done().is_some());
    }
}
