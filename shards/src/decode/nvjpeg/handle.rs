//! nvJPEG's objects: each is destroyed once, before the library handle that it came from.

use std::ffi::c_uint;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nvjpeg_sys::{
    nvjpegBackend_t, nvjpegBackend_t_NVJPEG_BACKEND_HARDWARE,
    nvjpegBackend_t_NVJPEG_BACKEND_HYBRID, nvjpegBufferDevice, nvjpegBufferPinned,
    nvjpegDecodeParams, nvjpegHandle, nvjpegJpegDecoder, nvjpegJpegState, nvjpegJpegStream,
    nvjpegStatus_t,
};

use super::sys::{Api, UPSAMPLING_WITH_INTERPOLATION};
use super::{Nvjpeg, NvjpegError, RGBI, check};

/// Kinds of objects.
const KINDS: [&str; 7] =
    ["library", "decoder", "state", "stream", "params", "pinned buffer", "device buffer"];

/// Live objects by kind.
static LIVE: [AtomicUsize; KINDS.len()] = [const { AtomicUsize::new(0) }; KINDS.len()];

/// The live nvJPEG objects of this process by kind; all 0 when nothing decodes.
pub fn live_handles() -> [(&'static str, usize); KINDS.len()] {
    std::array::from_fn(|kind| (KINDS[kind], LIVE[kind].load(Ordering::SeqCst)))
}

/// An nvJPEG object.
#[derive(Debug)]
struct Object<T> {
    pointer: *mut T,
    destroy: unsafe extern "C" fn(*mut T) -> nvjpegStatus_t,
    kind: usize,
}

// SAFETY: nvJPEG's objects are tied to no thread (its documentation asks for an instance a thread, not
// for the thread that made it); sharing is up to those who hold one.
unsafe impl<T> Send for Object<T> {}

impl<T> Object<T> {
    /// Has nvJPEG create an object; `create` is given the place for its address.
    fn create(
        (call, kind): (&'static str, usize),
        destroy: unsafe extern "C" fn(*mut T) -> nvjpegStatus_t,
        create: impl FnOnce(*mut *mut T) -> nvjpegStatus_t,
    ) -> Result<Object<T>, NvjpegError> {
        let mut pointer = null_mut();
        check(call, create(&mut pointer))?;
        LIVE[kind].fetch_add(1, Ordering::SeqCst);
        Ok(Object { pointer, destroy, kind })
    }
}

impl<T> Drop for Object<T> {
    fn drop(&mut self) {
        // SAFETY: created by the function that `destroy` belongs to, and destroyed here once. What it
        // was created from is still there: `Handle` outlives its parts (`Part`).
        let status = unsafe { (self.destroy)(self.pointer) };
        // A failure leaves nothing to do: the device is gone, or the program is ending.
        let _ = check("destroy", status);
        LIVE[self.kind].fetch_sub(1, Ordering::SeqCst);
    }
}

/// Growth of a lane's buffers: an ImageNet image's coefficients fit at once. Growing frees memory, which waits
/// for the whole device.
const PADDING: usize = 4 << 20;

/// A library handle: one back end of nvJPEG on the device that was current.
#[derive(Debug)]
pub(crate) struct Handle {
    object: Object<nvjpegHandle>,
    /// Last, so that the functions outlive what they destroy.
    nvjpeg: Arc<Nvjpeg>,
}

// SAFETY: the library handle may be used by many threads (nvJPEG's documentation, thread safety: states,
// streams and buffers are what each thread has of its own).
unsafe impl Sync for Handle {}

impl Handle {
    /// Huffman codes on the CPU, the rest on the device.
    pub(crate) fn hybrid(nvjpeg: &Arc<Nvjpeg>) -> Result<Arc<Handle>, NvjpegError> {
        let strict = nvjpeg_sys::NVJPEG_FLAGS_BITSTREAM_STRICT;
        let handle = Handle::create(nvjpeg, nvjpegBackend_t_NVJPEG_BACKEND_HYBRID, strict)?;
        let api = handle.api();
        // SAFETY: the handle is live, and nothing has been allocated with it yet.
        let status = unsafe { (api.nvjpegSetDeviceMemoryPadding)(PADDING, handle.pointer()) };
        check("nvjpegSetDeviceMemoryPadding", status)?;
        // SAFETY: as above.
        let status = unsafe { (api.nvjpegSetPinnedMemoryPadding)(PADDING, handle.pointer()) };
        check("nvjpegSetPinnedMemoryPadding", status)?;
        Ok(handle)
    }

    /// The hardware decoder, which some GPUs have; an error on others. Strict mode is off: its rules are
    /// undocumented, and one rejected image fails the whole batch.
    pub(crate) fn hardware(nvjpeg: &Arc<Nvjpeg>) -> Result<Arc<Handle>, NvjpegError> {
        Handle::create(nvjpeg, nvjpegBackend_t_NVJPEG_BACKEND_HARDWARE, 0)
    }

    fn create(
        nvjpeg: &Arc<Nvjpeg>,
        backend: nvjpegBackend_t,
        more: c_uint,
    ) -> Result<Arc<Handle>, NvjpegError> {
        let api = &nvjpeg.api;
        let flags = UPSAMPLING_WITH_INTERPOLATION | more;
        let create = |place| {
            // SAFETY: null allocators are nvJPEG's own; `place` has room for one address.
            unsafe { (api.nvjpegCreateEx)(backend, null_mut(), null_mut(), flags, place) }
        };
        let object = Object::create(("nvjpegCreateEx", 0), api.nvjpegDestroy, create)?;
        Ok(Arc::new(Handle { object, nvjpeg: Arc::clone(nvjpeg) }))
    }

    /// Engines that decode in hardware, and cores of each.
    pub(crate) fn engines(&self) -> Result<[u32; 2], NvjpegError> {
        let (mut engines, mut cores) = (0, 0);
        // SAFETY: the handle is live, and each place has room for one unsigned int.
        let status = unsafe {
            (self.api().nvjpegGetHardwareDecoderInfo)(self.pointer(), &mut engines, &mut cores)
        };
        check("nvjpegGetHardwareDecoderInfo", status)?;
        Ok([engines, cores])
    }

    pub(super) fn api(&self) -> &Api {
        &self.nvjpeg.api
    }

    /// Valid as long as `self`.
    pub(super) fn pointer(&self) -> *mut nvjpegHandle {
        self.object.pointer
    }
}

/// An object that was created from a library handle, which it keeps.
#[derive(Debug)]
pub(super) struct Part<T> {
    object: Object<T>,
    /// Last, so that it is destroyed after `object`.
    _handle: Arc<Handle>,
}

impl<T> Part<T> {
    /// Valid as long as `self`.
    pub(super) fn pointer(&self) -> *mut T {
        self.object.pointer
    }

    fn create(
        handle: &Arc<Handle>,
        what: (&'static str, usize),
        destroy: unsafe extern "C" fn(*mut T) -> nvjpegStatus_t,
        create: impl FnOnce(*mut *mut T) -> nvjpegStatus_t,
    ) -> Result<Part<T>, NvjpegError> {
        let object = Object::create(what, destroy, create)?;
        Ok(Part { object, _handle: Arc::clone(handle) })
    }
}

pub(super) fn decoder(handle: &Arc<Handle>) -> Result<Part<nvjpegJpegDecoder>, NvjpegError> {
    let (api, what) = (handle.api(), ("nvjpegDecoderCreate", 1));
    let backend = nvjpegBackend_t_NVJPEG_BACKEND_HYBRID;
    Part::create(handle, what, api.nvjpegDecoderDestroy, |place| {
        // SAFETY: the handle is live; `place` has room for one address.
        unsafe { (api.nvjpegDecoderCreate)(handle.pointer(), backend, place) }
    })
}

/// A state for batches.
pub(super) fn state(handle: &Arc<Handle>) -> Result<Part<nvjpegJpegState>, NvjpegError> {
    let (api, what) = (handle.api(), ("nvjpegJpegStateCreate", 2));
    Part::create(handle, what, api.nvjpegJpegStateDestroy, |place| {
        // SAFETY: the handle is live; `place` has room for one address.
        unsafe { (api.nvjpegJpegStateCreate)(handle.pointer(), place) }
    })
}

/// A state for a decoder's single images.
pub(super) fn decoder_state(
    handle: &Arc<Handle>,
    decoder: &Part<nvjpegJpegDecoder>,
) -> Result<Part<nvjpegJpegState>, NvjpegError> {
    let (api, what) = (handle.api(), ("nvjpegDecoderStateCreate", 2));
    Part::create(handle, what, api.nvjpegJpegStateDestroy, |place| {
        // SAFETY: handle and decoder are live; `place` has room for one address.
        unsafe { (api.nvjpegDecoderStateCreate)(handle.pointer(), decoder.pointer(), place) }
    })
}

pub(super) fn stream(handle: &Arc<Handle>) -> Result<Part<nvjpegJpegStream>, NvjpegError> {
    let (api, what) = (handle.api(), ("nvjpegJpegStreamCreate", 3));
    Part::create(handle, what, api.nvjpegJpegStreamDestroy, |place| {
        // SAFETY: the handle is live; `place` has room for one address.
        unsafe { (api.nvjpegJpegStreamCreate)(handle.pointer(), place) }
    })
}

/// Parameters with every value set: interleaved RGB, the whole image, no CMYK, no EXIF rotation.
pub(super) fn params(handle: &Arc<Handle>) -> Result<Part<nvjpegDecodeParams>, NvjpegError> {
    let (api, what) = (handle.api(), ("nvjpegDecodeParamsCreate", 4));
    let params = Part::create(handle, what, api.nvjpegDecodeParamsDestroy, |place| {
        // SAFETY: the handle is live; `place` has room for one address.
        unsafe { (api.nvjpegDecodeParamsCreate)(handle.pointer(), place) }
    })?;
    let at = params.pointer();
    // SAFETY: the parameters are live.
    let status = unsafe { (api.nvjpegDecodeParamsSetOutputFormat)(at, RGBI) };
    check("nvjpegDecodeParamsSetOutputFormat", status)?;
    // SAFETY: as above; nvjpeg.h: these values mean the whole image.
    let status = unsafe { (api.nvjpegDecodeParamsSetROI)(at, 0, 0, -1, -1) };
    check("nvjpegDecodeParamsSetROI", status)?;
    // SAFETY: as above.
    let status = unsafe { (api.nvjpegDecodeParamsSetAllowCMYK)(at, 0) };
    check("nvjpegDecodeParamsSetAllowCMYK", status)?;
    let upright = nvjpeg_sys::nvjpegExifOrientation_NVJPEG_ORIENTATION_NORMAL;
    // SAFETY: as above.
    let status = unsafe { (api.nvjpegDecodeParamsSetExifOrientation)(at, upright) };
    check("nvjpegDecodeParamsSetExifOrientation", status)?;
    Ok(params)
}

pub(super) fn pinned(handle: &Arc<Handle>) -> Result<Part<nvjpegBufferPinned>, NvjpegError> {
    let (api, what) = (handle.api(), ("nvjpegBufferPinnedCreate", 5));
    Part::create(handle, what, api.nvjpegBufferPinnedDestroy, |place| {
        // SAFETY: the handle is live; a null allocator is nvJPEG's own; `place` has room.
        unsafe { (api.nvjpegBufferPinnedCreate)(handle.pointer(), null_mut(), place) }
    })
}

pub(super) fn device(handle: &Arc<Handle>) -> Result<Part<nvjpegBufferDevice>, NvjpegError> {
    let (api, what) = (handle.api(), ("nvjpegBufferDeviceCreate", 6));
    Part::create(handle, what, api.nvjpegBufferDeviceDestroy, |place| {
        // SAFETY: the handle is live; a null allocator is nvJPEG's own; `place` has room.
        unsafe { (api.nvjpegBufferDeviceCreate)(handle.pointer(), null_mut(), place) }
    })
}
