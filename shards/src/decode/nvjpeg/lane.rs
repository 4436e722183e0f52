//! The hybrid back end: one image at a time, its Huffman codes decoded by the calling thread, the
//! rest queued on a stream.

use std::ffi::c_void;
use std::sync::Arc;

use nvjpeg_sys::{
    nvjpegBufferDevice, nvjpegBufferPinned, nvjpegDecodeParams, nvjpegJpegDecoder, nvjpegJpegState,
    nvjpegJpegStream,
};

use super::handle::{self, Handle, Part};
use super::{KEEP_NOTHING, NvjpegError, Target, check, same_size};
use crate::decode::Probe;

/// A decode context for one image at a time: state, buffers, parsed bytes.
///
/// nvJPEG's calls take a lock and allocate when these are made, so a thread has its own from the
/// start. It has two, and uses them in turn: while the device works on one image the CPU decodes
/// the next one's codes into the other's buffers.
#[derive(Debug)]
pub(crate) struct Lane {
    jpeg: Part<nvjpegJpegStream>,
    params: Part<nvjpegDecodeParams>,
    state: Part<nvjpegJpegState>,
    decoder: Part<nvjpegJpegDecoder>,
    /// Attached to the state, so destroyed after it.
    _pinned: Part<nvjpegBufferPinned>,
    _device: Part<nvjpegBufferDevice>,
    handle: Arc<Handle>,
}

impl Lane {
    /// Makes everything, on the device that is current.
    pub(crate) fn new(handle: &Arc<Handle>) -> Result<Lane, NvjpegError> {
        let api = handle.api();
        let decoder = handle::decoder(handle)?;
        let (pinned, device) = (handle::pinned(handle)?, handle::device(handle)?);
        let state = handle::decoder_state(handle, &decoder)?;
        // SAFETY: both are live, and the buffer outlives the state (the order of the fields).
        let status =
            unsafe { (api.nvjpegStateAttachPinnedBuffer)(state.pointer(), pinned.pointer()) };
        check("nvjpegStateAttachPinnedBuffer", status)?;
        // SAFETY: as above.
        let status =
            unsafe { (api.nvjpegStateAttachDeviceBuffer)(state.pointer(), device.pointer()) };
        check("nvjpegStateAttachDeviceBuffer", status)?;
        let (jpeg, params) = (handle::stream(handle)?, handle::params(handle)?);
        let (_pinned, _device, handle) = (pinned, device, Arc::clone(handle));
        Ok(Lane { jpeg, params, state, decoder, _pinned, _device, handle })
    }

    /// Decodes an image: its codes now, the pixels when `stream` gets there. On an error nothing
    /// that was queued will touch the bytes, and the target holds nothing usable.
    ///
    /// # Safety
    /// What the last call on this lane queued is done. `target` has room for the image that `header`
    /// describes, on the device of `stream`, until what is queued is done.
    pub(crate) unsafe fn decode(
        &mut self,
        bytes: &[u8],
        header: &Probe,
        target: Target,
        stream: *mut c_void,
    ) -> Result<(), NvjpegError> {
        self.parse(bytes, header)?;
        let (api, handle, stream) = (self.handle.api(), self.handle.pointer(), stream.cast());
        let (decoder, state) = (self.decoder.pointer(), self.state.pointer());
        let (params, jpeg) = (self.params.pointer(), self.jpeg.pointer());
        // SAFETY: all objects are live, this lane's, and in use by this thread only (`&mut self`).
        // The parsed bytes outlive this call. Nothing queued reads the state's buffers any more.
        let status = unsafe { (api.nvjpegDecodeJpegHost)(handle, decoder, state, params, jpeg) };
        check("nvjpegDecodeJpegHost", status)?;
        // SAFETY: as above; the stream is live, and what is copied lies in the state's own buffers.
        let status =
            unsafe { (api.nvjpegDecodeJpegTransferToDevice)(handle, decoder, state, jpeg, stream) };
        check("nvjpegDecodeJpegTransferToDevice", status)?;
        let mut image = target.image();
        // SAFETY: as above; the target has room for the image, whose size `parse` compared.
        let status =
            unsafe { (api.nvjpegDecodeJpegDevice)(handle, decoder, state, &mut image, stream) };
        check("nvjpegDecodeJpegDevice", status)
    }

    /// Parses the bytes, and asks whether the back end takes what is in them.
    fn parse(&mut self, bytes: &[u8], header: &Probe) -> Result<(), NvjpegError> {
        let (api, jpeg) = (self.handle.api(), self.jpeg.pointer());
        // SAFETY: handle and stream are live. The stream keeps the bytes' address: they are not read
        // after `decode`, since every use of it parses first.
        let status = unsafe {
            (api.nvjpegJpegStreamParse)(
                self.handle.pointer(),
                bytes.as_ptr(),
                bytes.len(),
                KEEP_NOTHING,
                KEEP_NOTHING,
                jpeg,
            )
        };
        check("nvjpegJpegStreamParse", status)?;
        let [mut width, mut height] = [0; 2];
        // SAFETY: the stream holds a parsed image; each place has room for one unsigned int.
        let status =
            unsafe { (api.nvjpegJpegStreamGetFrameDimensions)(jpeg, &mut width, &mut height) };
        check("nvjpegJpegStreamGetFrameDimensions", status)?;
        same_size(header, [width, height])?;
        let mut refused = 1;
        // SAFETY: all three are live; `refused` is a place for one int.
        let status = unsafe {
            (api.nvjpegDecoderJpegSupported)(
                self.decoder.pointer(),
                jpeg,
                self.params.pointer(),
                &mut refused,
            )
        };
        check("nvjpegDecoderJpegSupported", status)?;
        // nvjpeg.h: 0 where it is supported.
        if refused != 0 { Err(NvjpegError::NotTaken) } else { Ok(()) }
    }
}
