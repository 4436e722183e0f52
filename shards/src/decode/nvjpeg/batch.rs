//! The hardware engine: many baseline images in one call.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use nvjpeg_sys::{nvjpegJpegState, nvjpegJpegStream};

use super::handle::{self, Handle, Part};
use super::{KEEP_NOTHING, NvjpegError, RGBI, Target, check, same_size};
use crate::decode::Probe;

/// The hardware engine reads the codes itself: no thread of the CPU helps.
const CPU_THREADS: c_int = 1;

/// Pictures that memory is set aside for: larger than most of ImageNet. Others grow it, which frees memory
/// and waits for all of the device.
const SIDE: c_int = 512;

/// Checks whether the engine supports an image. Each thread has its own.
#[derive(Debug)]
pub(crate) struct Asker {
    jpeg: Part<nvjpegJpegStream>,
    handle: Arc<Handle>,
}

impl Asker {
    pub(crate) fn new(handle: &Arc<Handle>) -> Result<Asker, NvjpegError> {
        Ok(Asker { jpeg: handle::stream(handle)?, handle: Arc::clone(handle) })
    }

    /// Whether the engine takes this image. All of the bytes are parsed: the engine fails a whole batch for
    /// one image whose header alone is good (NVIDIA/DALI, pull request 3113).
    ///
    /// # Errors
    /// What nvJPEG says of bytes that it cannot parse, or reads another size from.
    pub(crate) fn takes(&mut self, bytes: &[u8], header: &Probe) -> Result<bool, NvjpegError> {
        let (api, handle, jpeg) = (self.handle.api(), self.handle.pointer(), self.jpeg.pointer());
        let (data, length) = (bytes.as_ptr(), bytes.len());
        // SAFETY: handle and stream are live; what was parsed is used within this function only.
        let status = unsafe {
            (api.nvjpegJpegStreamParse)(handle, data, length, KEEP_NOTHING, KEEP_NOTHING, jpeg)
        };
        check("nvjpegJpegStreamParse", status)?;
        let [mut width, mut height] = [0; 2];
        // SAFETY: the stream holds a parsed image; each place has room for one unsigned int.
        let status =
            unsafe { (api.nvjpegJpegStreamGetFrameDimensions)(jpeg, &mut width, &mut height) };
        check("nvjpegJpegStreamGetFrameDimensions", status)?;
        same_size(header, [width, height])?;
        let mut refused = 1;
        // SAFETY: handle and stream are live; `refused` is a place for one int.
        let status = unsafe { (api.nvjpegDecodeBatchedSupported)(handle, jpeg, &mut refused) };
        check("nvjpegDecodeBatchedSupported", status)?;
        // nvjpeg.h: 0 where it is supported.
        Ok(refused == 0)
    }
}

/// The state of one batch in work.
#[derive(Debug)]
pub(crate) struct Batch {
    state: Part<nvjpegJpegState>,
    handle: Arc<Handle>,
    // The arguments of a call, whose memory is used again.
    bytes: Vec<*const u8>,
    lengths: Vec<usize>,
    images: Vec<nvjpeg_sys::nvjpegImage_t>,
}

// SAFETY: the pointers are set and read within one call of `decode`.
unsafe impl Send for Batch {}

impl Batch {
    /// Makes everything, on the device that is current.
    pub(crate) fn new(handle: &Arc<Handle>) -> Result<Batch, NvjpegError> {
        let state = handle::state(handle)?;
        let (bytes, lengths, images) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Batch { state, handle: Arc::clone(handle), bytes, lengths, images })
    }

    /// Sets memory aside for batches of so many images of the usual size, so that they need not allocate.
    ///
    /// # Errors
    /// What nvJPEG says; batches are decoded all the same.
    pub(crate) fn reserve(&mut self, images: usize) -> Result<(), NvjpegError> {
        let (api, handle, state) = (self.handle.api(), self.handle.pointer(), self.state.pointer());
        let count = c_int::try_from(images).map_err(|_| NvjpegError::TooMany { images })?;
        // nvJPEG's documentation: this sampling, where images have different ones.
        let most = nvjpeg_sys::nvjpegChromaSubsampling_t_NVJPEG_CSS_444;
        // SAFETY: handle and state are live, and this thread's only (`&mut self`).
        let status = unsafe {
            (api.nvjpegDecodeBatchedPreAllocate)(handle, state, count, SIDE, SIDE, most, RGBI)
        };
        check("nvjpegDecodeBatchedPreAllocate", status)
    }

    /// Decodes images, queued on `stream`. On an error none of them counts as decoded.
    ///
    /// # Safety
    /// What the last call queued is done. Each target has room for an image of the size that the image's
    /// header says, on the device of `stream`, until what is queued is done.
    pub(crate) unsafe fn decode<'a>(
        &mut self,
        images: impl Iterator<Item = (&'a [u8], Target)>,
        stream: *mut c_void,
    ) -> Result<(), NvjpegError> {
        let (api, handle, state) = (self.handle.api(), self.handle.pointer(), self.state.pointer());
        self.bytes.clear();
        self.lengths.clear();
        self.images.clear();
        for (bytes, target) in images {
            self.bytes.push(bytes.as_ptr());
            self.lengths.push(bytes.len());
            self.images.push(target.image());
        }
        let images = self.images.len();
        let count = c_int::try_from(images).map_err(|_| NvjpegError::TooMany { images })?;
        // SAFETY: handle and state are live, and this thread's only (`&mut self`). This also resets a
        // state whose last batch failed.
        let status =
            unsafe { (api.nvjpegDecodeBatchedInitialize)(handle, state, count, CPU_THREADS, RGBI) };
        check("nvjpegDecodeBatchedInitialize", status)?;
        // SAFETY: the three arrays have `count` elements. The bytes outlive the call, which copies
        // them from pageable memory before it returns; targets have room, as the caller promises.
        let status = unsafe {
            (api.nvjpegDecodeBatched)(
                handle,
                state,
                self.bytes.as_ptr(),
                self.lengths.as_ptr(),
                self.images.as_mut_ptr(),
                stream.cast(),
            )
        };
        check("nvjpegDecodeBatched", status)
    }
}
