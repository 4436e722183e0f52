//! Memory on the device for the decoded pictures of a batch.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::super::FRAME_BYTES;
use super::super::batch::lock;
use crate::cuda::{CudaError, Device, DeviceBuffer, DeviceSlice};
use crate::decode::Probe;
use crate::decode::nvjpeg::Target;
use crate::views::SamplePlan;
use crate::views::cuda::{DeviceFrame, Item};

/// Alignment of frames: that of device allocations.
const FRAME_ALIGN: usize = 256;

/// Alignment of rows, so that vector loads of neighbours meet.
const ROW_ALIGN: usize = 16;

/// A decoded image: where, and how large.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    place: Place,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) pitch: usize,
}

impl Frame {
    pub(super) fn bytes(&self) -> usize {
        self.pitch * self.height as usize
    }
}

#[derive(Debug, Clone)]
enum Place {
    /// In the common allocation, from this byte on.
    Common(usize),
    /// In this allocation of its own.
    Own(usize),
}

/// Memory for the frames of one batch.
#[derive(Debug)]
pub(super) struct Frames {
    pub(super) common: DeviceBuffer,
    /// Bytes taken from it, more than it has where some did not fit.
    taken: AtomicUsize,
    own: Mutex<Vec<DeviceBuffer>>,
    pub(super) slots: Vec<Mutex<Option<Frame>>>,
}

impl Frames {
    pub(super) fn new(device: &Arc<Device>, slots: usize) -> Result<Frames, CudaError> {
        Ok(Frames {
            common: DeviceBuffer::new(device, slots * FRAME_BYTES)?,
            taken: AtomicUsize::new(0),
            own: Mutex::default(),
            slots: (0..slots).map(|_| Mutex::new(None)).collect(),
        })
    }

    /// Room for an image. Only one that does not fit allocates.
    pub(super) fn take(&self, device: &Arc<Device>, header: &Probe) -> Result<Frame, CudaError> {
        let (width, height) = (header.width, header.height);
        let pitch = (width as usize * 3).next_multiple_of(ROW_ALIGN);
        let need = (pitch * height as usize).next_multiple_of(FRAME_ALIGN);
        let start = self.taken.fetch_add(need, Ordering::Relaxed);
        let place = if start.checked_add(need).is_some_and(|end| end <= self.common.len()) {
            Place::Common(start)
        } else {
            let buffer = DeviceBuffer::new(device, need)?;
            let mut own = lock(&self.own);
            own.push(buffer);
            Place::Own(own.len() - 1)
        };
        Ok(Frame { place, width, height, pitch })
    }

    /// Calls `with` on a frame's memory.
    pub(super) fn with<T>(
        &self,
        frame: &Frame,
        with: impl FnOnce(DeviceSlice<'_>) -> T,
    ) -> Result<T, CudaError> {
        match frame.place {
            Place::Common(start) => Ok(with(self.common.slice(start..start + frame.bytes())?)),
            Place::Own(index) => {
                let own = lock(&self.own);
                Ok(with(own[index].slice(0..frame.bytes())?))
            }
        }
    }

    /// What is to be rendered: slots with a picture, and their plans.
    pub(super) fn items<'a>(
        &'a mut self,
        plans: &[&'a SamplePlan],
    ) -> Result<Vec<Item<'a>>, CudaError> {
        let Frames { common, own, slots, .. } = self;
        let own = own.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut items = Vec::with_capacity(plans.len());
        for (slot, (frame, plan)) in slots.iter_mut().zip(plans).enumerate() {
            // A sample that ends the run has no picture.
            let frame = frame.get_mut().unwrap_or_else(PoisonError::into_inner);
            let Some(frame) = frame else { continue };
            let pixels = match frame.place {
                Place::Common(start) => common.slice(start..start + frame.bytes())?,
                Place::Own(index) => own[index].slice(0..frame.bytes())?,
            };
            let Frame { width, height, pitch, .. } = *frame;
            items.push(Item { slot, frame: DeviceFrame { pixels, width, height, pitch }, plan });
        }
        Ok(items)
    }

    pub(super) fn target(&self, frame: &Frame) -> Result<Target, CudaError> {
        let address = self.with(frame, |slice| slice.address())?;
        Ok(Target { address, pitch: frame.pitch })
    }

    /// Empties it; where not all fitted, it is larger from now on.
    pub(super) fn clear(&mut self, device: &Arc<Device>) -> Result<(), CudaError> {
        for slot in &mut self.slots {
            *slot.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        }
        let taken = std::mem::take(self.taken.get_mut());
        self.own.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        if taken > self.common.len() {
            // A quarter more: the next batch is a little different.
            self.common = DeviceBuffer::new(device, taken + taken / 4)?;
        }
        Ok(())
    }
}
