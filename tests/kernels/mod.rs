//! The kernels of group normalisation on the host, thread by thread (`host.cpp`): a stand-in for the driver.

use std::ffi::{CString, c_char, c_void};
use std::path::Path;
use std::sync::OnceLock;

use detco::shim::norm::KERNELS;

unsafe extern "C" {
    /// The shim's own (`src/shim/norm.cpp`): with the index -1, the calling thread's maps on the CPU are
    /// normalised by these functions; by libtorch again where `launch` is null.
    fn detco_norm_register(
        index: i64,
        launch: *mut c_void,
        functions: *const *mut c_void,
        count: i64,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
}

/// Has the calling thread's maps normalised by a stand-in for the driver and its kernels.
///
/// # Safety
/// `launch` has the signature of `cuLaunchKernel`, knows the functions as the kernels of [`KERNELS`], in
/// that order, has done what it is asked when it returns, and stays loaded until it is taken back.
unsafe fn stand_in(launch: *mut c_void, functions: &[*mut c_void; KERNELS.len()]) {
    let mut message = [0; 256];
    let (count, length) = (functions.len() as i64, message.len() as i64);
    let (functions, said) = (functions.as_ptr(), message.as_mut_ptr());
    // SAFETY: list and message are as long as said; the rest is the caller's promise.
    let status = unsafe { detco_norm_register(-1, launch, functions, count, said, length) };
    assert_eq!(status, 0, "the shim is of another version");
}

/// The library with the kernels, compiled once a process.
fn library() -> &'static libloading::Library {
    static LIBRARY: OnceLock<libloading::Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = tempfile::tempdir().unwrap();
        let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let mut build = cc::Build::new();
        build.cpp(true).std("c++20").opt_level(2).target(&target).host(&target);
        let file = folder.path().join("libkernels.so");
        let mut command = build.get_compiler().to_command();
        command.args(["-shared", "-fPIC", "-Wno-attributes", "-I"]);
        command.arg(root.join("src/model/kernels")).arg(root.join("tests/kernels/host.cpp"));
        let output = command.arg("-o").arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {said}");
        // SAFETY: the library has no initialiser but its own globals'.
        unsafe { libloading::Library::new(&file) }.unwrap()
    })
}

/// While it lives, the thread's maps on the CPU are normalised by the kernels.
#[derive(Debug)]
pub(crate) struct OnTheHost(());

impl OnTheHost {
    pub(crate) fn begin() -> OnTheHost {
        type KernelOf = unsafe extern "C" fn(*const c_char) -> *mut c_void;
        // SAFETY: `kernel_of` in host.cpp is declared so.
        let kernel_of = unsafe { library().get::<KernelOf>(b"kernel_of\0") }.unwrap();
        let kernels = KERNELS.map(|name| {
            let text = CString::new(name).unwrap();
            // SAFETY: a text with a NUL at its end.
            let kernel = unsafe { kernel_of(text.as_ptr()) };
            assert!(!kernel.is_null(), "host.cpp has no {name}");
            kernel
        });
        // SAFETY: only the address is taken.
        let launch = unsafe { library().get::<*mut c_void>(b"launch\0") }.unwrap();
        // SAFETY: `launch` has the driver's signature and knows these kernels; the library stays loaded.
        unsafe { stand_in(*launch, &kernels) };
        OnTheHost(())
    }
}

impl Drop for OnTheHost {
    fn drop(&mut self) {
        // SAFETY: without a launcher the functions are not used.
        unsafe { stand_in(std::ptr::null_mut(), &[std::ptr::null_mut(); KERNELS.len()]) };
    }
}
