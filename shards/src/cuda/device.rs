//! A device with its context, streams and events.

use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;

use cudarc::driver::sys;

use super::error::check;
use super::nvrtc::Architecture;
use super::{CudaError, DeviceSlice, library};

/// Room for a device's name.
const NAME_BYTES: usize = 256;

/// Limits of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Threads that one of them holds at a time.
    pub threads_per_multiprocessor: u32,
    /// Bytes of shared memory of one of them.
    pub shared_bytes_per_multiprocessor: u32,
    /// Bytes of shared memory that a block may have, where its kernel asks for leave.
    pub shared_bytes_per_block: u32,
}

/// One GPU, and its primary context: the one that libtorch uses too.
#[derive(Debug)]
pub struct Device {
    handle: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    architecture: Architecture,
    memory_bytes: usize,
    limits: Limits,
}

// SAFETY: device and context are handles that the driver allows in every thread; each call makes
// the context current in its own thread first.
unsafe impl Send for Device {}
// SAFETY: as above; nothing here changes after `open`.
unsafe impl Sync for Device {}

impl Device {
    /// Opens GPU `ordinal`, counted as the driver counts (CUDA_VISIBLE_DEVICES applies).
    ///
    /// # Errors
    /// [`CudaError::NoDriver`] and [`CudaError::OldDriver`] where there is none to ask,
    /// [`CudaError::NoDevice`] where it has no such GPU, [`CudaError::Driver`] where it fails.
    pub fn open(ordinal: u32) -> Result<Arc<Device>, CudaError> {
        library::driver()?;
        // SAFETY: `library::driver` found the function; 0 is the only flag there is.
        check("cuInit", unsafe { sys::cuInit(0) })?;
        let mut count = 0;
        // SAFETY: `count` is a place for one int.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
        let count = u32::try_from(count).unwrap_or(0);
        let missing = CudaError::NoDevice { ordinal, count };
        let Some(ordinal) = c_int::try_from(ordinal).ok().filter(|at| (*at as u32) < count) else {
            return Err(missing);
        };
        let mut handle = 0;
        // SAFETY: `handle` is a place for one device, and `ordinal` is below the count.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut handle, ordinal) })?;
        let name = name(handle)?;
        let major = attribute(
            handle,
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        )?;
        let minor = attribute(
            handle,
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )?;
        let limits = limits(handle)?;
        let mut memory_bytes = 0;
        // SAFETY: `memory_bytes` is a place for one size, and the device exists.
        let status = unsafe { sys::cuDeviceTotalMem_v2(&mut memory_bytes, handle) };
        check("cuDeviceTotalMem", status)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: `context` is a place for one context, and the device exists. Released by `drop`.
        let status = unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, handle) };
        check("cuDevicePrimaryCtxRetain", status)?;
        let architecture = Architecture { major, minor };
        Ok(Arc::new(Device { handle, context, name, architecture, memory_bytes, limits }))
    }

    /// The marketing name, as "NVIDIA H100 80GB HBM3".
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The compute capability, as 9.0.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Bytes of the GPU's memory.
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    /// Limits of a launch.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Free bytes of the GPU's memory.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn free_bytes(&self) -> Result<usize, CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: places for one size each; a context is current.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(free)
    }

    /// Waits until everything queued on this device, by anybody in this process, is done.
    ///
    /// # Errors
    /// When that work failed, or the driver does.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: a context is current.
        check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
    }

    /// Makes the context current in this thread; the driver's calls act on the current one.
    pub(crate) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained until `drop`.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once by `open`, released once here; all that lives in the context keeps
        // the device alive. A failure leaves nothing to do: the program is ending, or the driver
        // has.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.handle) };
    }
}

fn name(handle: sys::CUdevice) -> Result<String, CudaError> {
    let mut bytes = [0_u8; NAME_BYTES];
    // SAFETY: `bytes` has room for the length given; the driver ends the name with NUL inside of
    // it.
    let status =
        unsafe { sys::cuDeviceGetName(bytes.as_mut_ptr().cast(), NAME_BYTES as c_int, handle) };
    check("cuDeviceGetName", status)?;
    let name = CStr::from_bytes_until_nul(&bytes).unwrap_or_default();
    Ok(name.to_string_lossy().into_owned())
}

fn limits(handle: sys::CUdevice) -> Result<Limits, CudaError> {
    use sys::CUdevice_attribute as Which;
    let ask = |which| attribute(handle, which);
    Ok(Limits {
        multiprocessors: ask(Which::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        threads_per_multiprocessor: ask(Which::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)?,
        shared_bytes_per_multiprocessor: ask(
            Which::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
        )?,
        shared_bytes_per_block: ask(Which::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

fn attribute(handle: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<u32, CudaError> {
    let mut value = 0;
    // SAFETY: `value` is a place for one int, and the device exists.
    let status = unsafe { sys::cuDeviceGetAttribute(&mut value, which, handle) };
    check("cuDeviceGetAttribute", status)?;
    // All that is asked for are counts.
    Ok(u32::try_from(value).unwrap_or(0))
}

/// A queue of work on a device. What is queued runs in order, beside that of other streams.
#[derive(Debug)]
pub struct Stream {
    handle: sys::CUstream,
    owned: bool,
    device: Arc<Device>,
}

// SAFETY: the driver allows a stream in every thread.
unsafe impl Send for Stream {}
// SAFETY: as above; queueing from two threads interleaves, and is otherwise fine.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream, which does not wait for the default stream and goes before it: decoding and
    /// rendering are small pieces of work, and training kernels fill the GPU.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn new(device: &Arc<Device>) -> Result<Stream, CudaError> {
        device.bind()?;
        let mut handle = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let [mut least, mut greatest] = [0; 2];
        // SAFETY: each is a place for one int, and a context is current.
        check("cuCtxGetStreamPriorityRange", unsafe {
            sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest)
        })?;
        // SAFETY: `handle` is a place for one stream, and a context is current. Destroyed by
        // `drop`.
        check("cuStreamCreateWithPriority", unsafe {
            sys::cuStreamCreateWithPriority(&mut handle, flags, greatest)
        })?;
        Ok(Stream { handle, owned: true, device: Arc::clone(device) })
    }

    /// A stream that belongs to somebody else, such as libtorch's current one. A null handle is the
    /// default stream.
    ///
    /// # Safety
    /// `handle` is a stream of the device's primary context, and lives as long as what is returned.
    pub unsafe fn from_raw(device: &Arc<Device>, handle: *mut c_void) -> Stream {
        Stream { handle: handle.cast(), owned: false, device: Arc::clone(device) }
    }

    /// The driver's handle, for other libraries of NVIDIA's. Valid as long as the stream.
    pub fn handle(&self) -> *mut c_void {
        self.handle.cast()
    }

    /// The device that the stream belongs to.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Makes later work on this stream wait for `event`. The host does not wait.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: stream and event are live.
        let status = unsafe { sys::cuStreamWaitEvent(self.handle, event.handle, 0) };
        check("cuStreamWaitEvent", status)
    }

    /// Queues a copy on the device, of the beginning of `from` to all of `to`. Does not wait.
    ///
    /// # Errors
    /// [`CudaError::Range`] where `from` is shorter, [`CudaError::Driver`] where the driver fails.
    pub fn copy(&self, from: DeviceSlice<'_>, to: DeviceSlice<'_>) -> Result<(), CudaError> {
        let from = from.slice(0..to.len())?;
        self.device.bind()?;
        // SAFETY: as many bytes on both sides, which outlive queued work by `DeviceSlice`'s
        // contract, or by `DeviceBuffer::drop`.
        let status = unsafe {
            sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), to.len(), self.handle)
        };
        check("cuMemcpyDtoDAsync", status)
    }

    /// Waits until all that is queued here is done.
    ///
    /// # Errors
    /// When that work failed, or the driver does.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: the stream is live.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.handle) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.owned && self.device.bind().is_ok() {
            // SAFETY: created by `new`, destroyed once. The driver lets queued work finish first. A
            // failure leaves nothing to do.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.handle) };
        }
    }
}

/// An event in a stream, to wait for or to measure from.
#[derive(Debug)]
pub struct Event {
    pub(super) handle: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: the driver allows an event in every thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event that only orders. Before it is recorded it counts as done. Waiting for it sleeps, since the cores
    /// are needed for decoding.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn new(device: &Arc<Device>) -> Result<Event, CudaError> {
        use sys::CUevent_flags::{CU_EVENT_BLOCKING_SYNC, CU_EVENT_DISABLE_TIMING};
        Event::with(device, CU_EVENT_DISABLE_TIMING as u32 | CU_EVENT_BLOCKING_SYNC as u32)
    }

    /// An event that also notes the time when it is reached.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn timed(device: &Arc<Device>) -> Result<Event, CudaError> {
        Event::with(device, sys::CUevent_flags::CU_EVENT_DEFAULT as u32)
    }

    fn with(device: &Arc<Device>, flags: u32) -> Result<Event, CudaError> {
        device.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is a place for one event, and a context is current. Destroyed by `drop`.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut handle, flags) })?;
        Ok(Event { handle, device: Arc::clone(device) })
    }

    /// Records the event behind the work queued on `stream`.
    ///
    /// # Errors
    /// When the driver fails, as it does for a stream of another device.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: event and stream are live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.handle, stream.handle) })
    }

    /// The driver's handle, for code that waits by itself. Valid as long as the event.
    #[cfg(feature = "nvjpeg")]
    pub(crate) fn handle(&self) -> *mut c_void {
        self.handle.cast()
    }

    /// Whether the mark has been reached. Does not wait.
    ///
    /// # Errors
    /// When the work before it failed, or the driver does.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        self.device.bind()?;
        // SAFETY: the event is live.
        let status = unsafe { sys::cuEventQuery(self.handle) };
        if status == sys::CUresult::CUDA_ERROR_NOT_READY {
            return Ok(false);
        }
        check("cuEventQuery", status).map(|()| true)
    }

    /// Waits until the mark has been reached.
    ///
    /// # Errors
    /// When the work before it failed, or the driver does.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: the event is live.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.handle) })
    }

    /// Milliseconds on the device between `earlier` and this one; both [timed](Event::timed) and
    /// reached.
    ///
    /// # Errors
    /// When either is not, or the driver fails.
    pub fn ms_since(&self, earlier: &Event) -> Result<f32, CudaError> {
        self.device.bind()?;
        let mut ms = 0.0;
        // SAFETY: `ms` is a place for one float; both events are live.
        let status = unsafe { sys::cuEventElapsedTime_v2(&mut ms, earlier.handle, self.handle) };
        check("cuEventElapsedTime", status).map(|()| ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created by `with`, destroyed once. The driver keeps what a stream still waits
            // for. A failure leaves nothing to do.
            let _ = unsafe { sys::cuEventDestroy_v2(self.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine without a GPU this is what users see; on one with a GPU it opens.
    #[test]
    fn a_device_opens_or_what_is_missing_is_named() {
        match Device::open(0) {
            Ok(device) => {
                assert!(device.architecture().major >= 7 && device.memory_bytes() > 0);
                assert!(device.free_bytes().unwrap() <= device.memory_bytes());
                println!("opened {}", device.name());
            }
            Err(error @ CudaError::NoDriver { .. }) => {
                let text = error.to_string();
                assert!(text.contains("libcuda.so.1"), "{text}");
                println!("no GPU here: {text}");
            }
            Err(error) => {
                assert!(
                    matches!(error, CudaError::NoDevice { .. } | CudaError::Driver { .. }),
                    "{error}"
                );
                println!("no GPU here: {error}");
            }
        }
    }

    #[test]
    fn a_device_that_does_not_exist_is_an_error() {
        assert!(Device::open(u32::MAX).is_err());
    }
}
