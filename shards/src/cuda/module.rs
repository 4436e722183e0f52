//! Machine code on the device, and launches of its kernels.

use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::error::check;
use super::{CudaError, Device, Stream};

/// Code that the device has loaded.
#[derive(Debug)]
pub struct Module {
    handle: sys::CUmodule,
    device: Arc<Device>,
}

// SAFETY: the driver allows a module in every thread.
unsafe impl Send for Module {}
// SAFETY: as above; nothing changes after `load`.
unsafe impl Sync for Module {}

impl Module {
    /// Loads machine code (a cubin) or PTX, as [`Nvrtc::compile`](super::Nvrtc::compile) gives it.
    ///
    /// # Errors
    /// When the driver does not take it, as it does not code for another architecture.
    pub fn load(device: &Arc<Device>, code: &[u8]) -> Result<Arc<Module>, CudaError> {
        device.bind()?;
        // PTX is a text: the driver reads up to its NUL. A cubin says in itself how long it is.
        let code = [code, &[0]].concat();
        let mut handle = ptr::null_mut();
        // SAFETY: `handle` is a place for one module; `code` is only read, during the call, and
        // ends.
        let status = unsafe { sys::cuModuleLoadData(&mut handle, code.as_ptr().cast()) };
        check("cuModuleLoadData", status)?;
        Ok(Arc::new(Module { handle, device: Arc::clone(device) }))
    }

    /// A kernel by its name.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn function(self: &Arc<Module>, name: &'static str) -> Result<Function, CudaError> {
        let offset_of_nul = |error: std::ffi::NulError| error.nul_position();
        let name = CString::new(name).map_err(|error| CudaError::Nul {
            what: "a kernel's name",
            offset: offset_of_nul(error),
        })?;
        self.device.bind()?;
        let mut handle = ptr::null_mut();
        // SAFETY: `handle` is a place for one function; the module is live; the name ends with NUL.
        let status = unsafe { sys::cuModuleGetFunction(&mut handle, self.handle, name.as_ptr()) };
        check("cuModuleGetFunction", status)?;
        Ok(Function { handle, module: Arc::clone(self) })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // Kernels that still run are done after this, or have failed.
        if self.device.synchronize().is_ok() {
            // SAFETY: loaded once, unloaded once; its functions hold the module. A failure leaves
            // nothing to do.
            let _ = unsafe { sys::cuModuleUnload(self.handle) };
        }
    }
}

/// A kernel. Its copies are the same kernel.
#[derive(Debug, Clone)]
pub struct Function {
    handle: sys::CUfunction,
    module: Arc<Module>,
}

// SAFETY: the driver allows a function in every thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// How many threads run a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks: x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Function {
    /// The driver's handle, for code that launches by itself through [`launcher`](super::launcher).
    /// Of use as long as the function lives.
    pub fn handle(&self) -> *mut c_void {
        self.handle.cast()
    }

    /// Lets launches ask for up to `bytes` of dynamic shared memory: more than 48 KiB need leave.
    ///
    /// # Errors
    /// When the device has not that much for a block.
    pub fn allow_shared(&self, bytes: u32) -> Result<(), CudaError> {
        self.module.device.bind()?;
        let which = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        // SAFETY: the function is live.
        let status = unsafe { sys::cuFuncSetAttribute(self.handle, which, bytes) };
        check("cuFuncSetAttribute", status)
    }

    /// Queues a launch. Does not wait.
    ///
    /// # Safety
    /// `arguments` point at values of the kernel's parameters, in their order and of their
    /// types. What the kernel reads and writes through them is device memory that stays allocated
    /// until it is done.
    ///
    /// # Errors
    /// When the driver refuses; what goes wrong while the kernel runs comes up in a later call.
    pub(crate) unsafe fn launch(
        &self,
        stream: &Stream,
        launch: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        self.module.device.bind()?;
        let [x, y, z] = launch.grid;
        // SAFETY: function and stream are live; the rest is the caller's promise.
        let status = unsafe {
            sys::cuLaunchKernel(
                self.handle,
                x,
                y,
                z,
                launch.threads,
                1,
                1,
                launch.shared_bytes,
                stream.handle().cast(),
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check("cuLaunchKernel", status)
    }
}
