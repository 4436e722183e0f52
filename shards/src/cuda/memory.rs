//! Memory on the device, page-locked memory of the host, and copies between them.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys;

use super::error::check;
use super::{CudaError, Device, Event, Stream};

/// Bytes on the device. What they hold at first is unspecified.
#[derive(Debug)]
pub struct DeviceBuffer {
    address: u64,
    len: usize,
    device: Arc<Device>,
}

impl DeviceBuffer {
    /// `len` bytes, aligned to 256. Slow (it may wait for the device): allocate before the loop.
    ///
    /// # Errors
    /// When the device has not that much memory, or the driver fails.
    pub fn new(device: &Arc<Device>, len: usize) -> Result<DeviceBuffer, CudaError> {
        device.bind()?;
        let mut address = 0;
        // The driver refuses to allocate nothing.
        // SAFETY: `address` is a place for one address, and a context is current. Freed by `drop`.
        check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut address, len.max(1)) })?;
        Ok(DeviceBuffer { address, len, device: Arc::clone(device) })
    }

    /// Bytes of the buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device that it is on.
    #[cfg(feature = "nvjpeg")]
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The whole buffer.
    pub fn as_slice(&self) -> DeviceSlice<'_> {
        DeviceSlice { address: self.address, len: self.len, owner: PhantomData }
    }

    /// Part of the buffer.
    ///
    /// # Errors
    /// [`CudaError::Range`] where it reaches beyond the end.
    pub fn slice(&self, range: Range<usize>) -> Result<DeviceSlice<'_>, CudaError> {
        self.as_slice().slice(range)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // Work that was queued with this address is done after this, or has failed.
        if self.device.synchronize().is_ok() {
            // SAFETY: allocated by `new`, freed once, and nothing queued can use it any more:
            // slices borrow the buffer. A failure leaves nothing to do.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// Bytes on the device that somebody owns.
#[derive(Debug, Clone, Copy)]
pub struct DeviceSlice<'a> {
    address: u64,
    len: usize,
    owner: PhantomData<&'a [u8]>,
}

impl<'a> DeviceSlice<'a> {
    /// Foreign memory, such as a tensor of libtorch's.
    ///
    /// # Safety
    /// `len` bytes at `address` are memory of the device that this slice is used on. They
    /// stay allocated until all work that was queued with the slice is done, and nobody else counts
    /// on what they hold.
    pub unsafe fn from_raw(address: u64, len: usize) -> DeviceSlice<'a> {
        DeviceSlice { address, len, owner: PhantomData }
    }

    /// The first byte's address on the device.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Bytes of the slice.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether the slice has no bytes.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Part of the slice.
    ///
    /// # Errors
    /// [`CudaError::Range`] where it reaches beyond the end.
    pub fn slice(self, range: Range<usize>) -> Result<DeviceSlice<'a>, CudaError> {
        let need = range.end.saturating_sub(range.start);
        fits("device memory", range.start, need, self.len)?;
        Ok(DeviceSlice { address: self.address + range.start as u64, len: need, owner: self.owner })
    }
}

/// Page-locked bytes of the host: what the device copies from and to by itself.
///
/// A buffer remembers the last copy that touches it; access to its bytes waits for that copy.
#[derive(Debug)]
pub struct PinnedBuffer {
    /// Of `len` initialised bytes.
    pointer: *mut u8,
    len: usize,
    /// Behind the last copy, which began after all that were queued before it.
    copied: Event,
    device: Arc<Device>,
}

// SAFETY: the pointer is this value's own, as a Box's is.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared access reads only.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// `len` zeros. Slow (pages are locked one by one): allocate before the loop.
    ///
    /// # Errors
    /// When that much cannot be locked, or the driver fails.
    pub fn new(device: &Arc<Device>, len: usize) -> Result<PinnedBuffer, CudaError> {
        device.bind()?;
        let copied = Event::new(device)?;
        let mut pointer = std::ptr::null_mut();
        // Every context of this process may copy from it: several ranks can share one.
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: `pointer` is a place for one address, and a context is current. Freed by `drop`.
        let status = unsafe { sys::cuMemHostAlloc(&mut pointer, len.max(1), flags) };
        check("cuMemHostAlloc", status)?;
        let pointer: *mut u8 = pointer.cast();
        // SAFETY: `len` bytes were just allocated, and nobody else has the pointer.
        unsafe { pointer.write_bytes(0, len) };
        Ok(PinnedBuffer { pointer, len, copied, device: Arc::clone(device) })
    }

    /// Bytes of the buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether no copy is under way: [`PinnedBuffer::bytes_mut`] will not wait.
    ///
    /// # Errors
    /// When the copy failed, or the driver does.
    pub fn is_free(&self) -> Result<bool, CudaError> {
        self.copied.is_done()
    }

    /// The bytes, after the last copy is done.
    ///
    /// # Errors
    /// When the copy failed, or the driver does.
    pub fn bytes(&self) -> Result<&[u8], CudaError> {
        self.copied.synchronize()?;
        // SAFETY: `len` initialised bytes, live as long as `self`. No copy writes them: the last
        // one is done, and another takes `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts(self.pointer, self.len) })
    }

    /// The bytes to write to, after the last copy is done.
    ///
    /// # Errors
    /// When the copy failed, or the driver does.
    pub fn bytes_mut(&mut self) -> Result<&mut [u8], CudaError> {
        self.copied.synchronize()?;
        // SAFETY: `len` initialised bytes, live as long as `self`, and `&mut self` makes them ours.
        // No copy reads or writes them: the last one is done.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) })
    }

    /// Queues a copy of `range` to the beginning of `to`. Does not wait.
    ///
    /// # Errors
    /// [`CudaError::Range`] where either is too short, [`CudaError::Driver`] where the
    /// driver fails.
    pub fn upload(
        &mut self,
        range: Range<usize>,
        to: DeviceSlice<'_>,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let count = self.fits(&range, to)?;
        // The last copy may be on another stream.
        stream.wait(&self.copied)?;
        // SAFETY: `range` was checked to lie in the buffer.
        let from = unsafe { self.pointer.add(range.start) };
        // SAFETY: `count` bytes are there on both sides. Ours are neither written nor freed before
        // `copied` is reached; `to` outlives queued work by its contract, or by
        // `DeviceBuffer::drop`.
        let status = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.address, from.cast(), count, stream.handle().cast())
        };
        check("cuMemcpyHtoDAsync", status)?;
        self.mark(stream)
    }

    /// Queues a copy of the beginning of `from` into `range`. Does not wait.
    ///
    /// # Errors
    /// [`CudaError::Range`] where either is too short, [`CudaError::Driver`] where the
    /// driver fails.
    pub fn download(
        &mut self,
        range: Range<usize>,
        from: DeviceSlice<'_>,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let count = self.fits(&range, from)?;
        stream.wait(&self.copied)?;
        // SAFETY: `range` was checked to lie in the buffer.
        let to = unsafe { self.pointer.add(range.start) };
        // SAFETY: as for `upload`; nobody reads our bytes before `copied` is reached.
        let status = unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.cast(), from.address, count, stream.handle().cast())
        };
        check("cuMemcpyDtoHAsync", status)?;
        self.mark(stream)
    }

    fn fits(&self, range: &Range<usize>, other: DeviceSlice<'_>) -> Result<usize, CudaError> {
        let count = range.end.saturating_sub(range.start);
        fits("pinned memory", range.start, count, self.len)?;
        fits("device memory", 0, count, other.len)?;
        Ok(count)
    }

    /// Notes the copy that was just queued. Where that fails the copy is waited for instead.
    fn mark(&self, stream: &Stream) -> Result<(), CudaError> {
        self.copied.record(stream).or_else(|error| {
            stream.synchronize()?;
            Err(error)
        })
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // Memory that a copy may still touch is better lost than freed.
        if self.copied.synchronize().is_ok() && self.device.bind().is_ok() {
            // SAFETY: allocated by `new`, freed once, and no copy is under way. A failure leaves
            // nothing to do.
            let _ = unsafe { sys::cuMemFreeHost(self.pointer.cast()) };
        }
    }
}

/// Memory of the host that somebody else owns, page-locked while this lives: the device copies from it
/// by itself, as from a [`PinnedBuffer`].
#[derive(Debug)]
pub(crate) struct Registered {
    pointer: *mut u8,
    device: Arc<Device>,
}

// SAFETY: the pointer is only given back to the driver, which allows that in every thread.
unsafe impl Send for Registered {}
// SAFETY: as above; shared access does nothing.
unsafe impl Sync for Registered {}

impl Registered {
    /// Locks the pages of `len` bytes at `pointer`. Slow (page by page).
    ///
    /// # Safety
    /// The bytes begin and end with a page, and stay allocated until this is dropped.
    ///
    /// # Errors
    /// When that much cannot be locked, or the driver fails.
    pub(crate) unsafe fn new(
        device: &Arc<Device>,
        pointer: *mut u8,
        len: usize,
    ) -> Result<Registered, CudaError> {
        device.bind()?;
        // Every context of this process may copy from it: libtorch's is the same, but need not be.
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE;
        // SAFETY: the caller's promise; a context is current. Unlocked by `drop`.
        let status = unsafe { sys::cuMemHostRegister_v2(pointer.cast(), len, flags) };
        check("cuMemHostRegister", status)?;
        Ok(Registered { pointer, device: Arc::clone(device) })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // A copy that still reads these pages is done after this, or has failed.
        if self.device.synchronize().is_ok() {
            // SAFETY: locked by `new`, unlocked once. A failure leaves nothing to do.
            let _ = unsafe { sys::cuMemHostUnregister(self.pointer.cast()) };
        }
    }
}

fn fits(what: &'static str, offset: usize, need: usize, have: usize) -> Result<(), CudaError> {
    let end = offset.checked_add(need);
    if end.is_some_and(|end| end <= have) {
        return Ok(());
    }
    Err(CudaError::Range { what, offset, need, have })
}

#[cfg(test)]
mod tests {
    use detco_twin::driver;

    use super::*;

    #[test]
    fn a_range_beyond_the_end_is_refused() {
        // SAFETY: never used on a device.
        let slice = unsafe { DeviceSlice::from_raw(4096, 100) };
        let part = slice.slice(40..100).unwrap();
        assert_eq!((part.address(), part.len()), (4136, 60));
        for range in [40..101, 101..101, usize::MAX - 1..usize::MAX] {
            let error = slice.slice(range.clone()).unwrap_err();
            assert!(matches!(error, CudaError::Range { have: 100, .. }), "{range:?}: {error}");
        }
    }

    #[test]
    fn bytes_come_back_as_they_went() {
        let device = match Device::open(0) {
            Ok(device) => device,
            Err(error) => {
                println!("no GPU here: {error}");
                return driver::again(concat!(module_path!(), "::bytes_come_back_as_they_went"));
            }
        };
        let stream = Stream::new(&device).unwrap();
        let mut host = PinnedBuffer::new(&device, 1000).unwrap();
        let there = DeviceBuffer::new(&device, 1000).unwrap();
        for (i, byte) in host.bytes_mut().unwrap().iter_mut().enumerate() {
            *byte = i as u8;
        }
        host.upload(0..1000, there.as_slice(), &stream).unwrap();
        // Overwriting waits for the copy.
        host.bytes_mut().unwrap().fill(0);
        let copy = DeviceBuffer::new(&device, 500).unwrap();
        stream.copy(there.slice(500..1000).unwrap(), copy.as_slice()).unwrap();
        host.download(500..1000, copy.as_slice(), &stream).unwrap();
        let bytes = host.bytes().unwrap();
        assert!(bytes[..500].iter().all(|byte| *byte == 0));
        assert!(bytes[500..].iter().enumerate().all(|(i, byte)| *byte == (500 + i) as u8));
        assert!(stream.copy(copy.as_slice(), there.as_slice()).is_err());
        assert!(host.upload(0..1000, there.slice(1..1000).unwrap(), &stream).is_err());
        println!("copied on {}", device.name());
        driver::hold_nothing_against();
    }
}
