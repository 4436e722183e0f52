//! A worker: two lanes of nvJPEG's hybrid back end, and the CPU where that refuses.

use std::sync::Arc;

use super::super::Job;
use super::frames::{Frame, Frames};
use super::mark;
use crate::cuda::{CudaError, Device, Event, PinnedBuffer, Stream};
use crate::decode::nvjpeg::{Asker, Lane, NvjpegError, Target};
use crate::decode::{Decoder, Image};

/// Lanes of a worker: one image on the CPU, one on the device.
const LANES: usize = 2;

/// The decoder of one worker.
#[derive(Debug)]
pub struct CudaWorker {
    pub(super) number: usize,
    pub(super) lanes: [(Lane, Event); LANES],
    pub(super) turn: usize,
    /// Of the hardware engine, where there is one.
    pub(super) asker: Option<Asker>,
    pub(super) decoder: Decoder,
    pub(super) image: Image,
    /// The CPU's pictures on their way.
    pub(super) staging: PinnedBuffer,
    pub(super) stream: Stream,
}

impl Drop for CudaWorker {
    fn drop(&mut self) {
        // Lanes are in use until then; also makes the context current for their destruction. A
        // failure leaves nothing to do.
        let _ = self.stream.synchronize();
    }
}

impl CudaWorker {
    /// The hybrid back end. Within, what nvJPEG says where it does not decode the image.
    pub(super) fn hybrid(
        &mut self,
        job: Job<'_>,
        target: Target,
    ) -> Result<Result<(), NvjpegError>, CudaError> {
        self.turn = (self.turn + 1) % LANES;
        let (lane, used) = &mut self.lanes[self.turn];
        used.synchronize()?;
        // SAFETY: what the lane queued last lies before `used`, which was just waited for. The target
        // was taken for this header's size, and its memory lives as long as queued work: a
        // `DeviceBuffer` waits for the device before it is freed.
        let decoded = unsafe { lane.decode(job.jpeg, &job.header, target, self.stream.handle()) };
        // Also after an error: part of it may be queued.
        mark(used, &self.stream)?;
        Ok(decoded)
    }

    /// Copies the decoded picture to the device.
    pub(super) fn upload(
        &mut self,
        device: &Arc<Device>,
        frames: &Frames,
        frame: &Frame,
    ) -> Result<(), CudaError> {
        let bytes = frame.bytes();
        if self.staging.len() < bytes {
            self.staging = PinnedBuffer::new(device, bytes.next_power_of_two())?;
        }
        let rows = self.image.pixels.chunks_exact(frame.width as usize * 3);
        let to = &mut self.staging.bytes_mut()?[..bytes];
        for (row, to) in rows.zip(to.chunks_exact_mut(frame.pitch)) {
            to[..row.len()].copy_from_slice(row);
        }
        let (staging, stream) = (&mut self.staging, &self.stream);
        frames.with(frame, |to| staging.upload(0..bytes, to, stream))?
    }
}
