//! The CUDA driver and nvJPEG in host memory (`driver.cpp`, `nvjpeg.cpp`), for tests without a GPU.
//!
//! A test that needs a GPU and finds none runs itself [`again`], in a process whose loader finds the
//! twins under the names of NVIDIA's libraries. There every stream is a thread, which does what is
//! queued late and at random moments: work that is not ordered goes wrong. What a GPU would not
//! forgive (freed memory in use, buffers used again too early, no current context) is refused or
//! counted. The twins say nothing of speed, nor of what NVIDIA's own libraries do.

use std::ffi::{c_int, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use libloading::{Library, Symbol};

/// Set in a process that runs on the twins.
const VARIABLE: &str = "DETCO_TWIN";

/// The folder of `libcuda.so.1` and `libnvjpeg.so.13`.
pub fn folder() -> &'static Path {
    Path::new(concat!(env!("OUT_DIR"), "/libraries"))
}

/// Whether this process runs on the twins.
pub fn is_here() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// Runs one test of this binary, by its full name (with or without its crate), in a process of its own
/// on the twins.
///
/// # Panics
/// Where the test fails there, or is already there: then the twins cannot be loaded.
pub fn again(test: &str) {
    let test = test.strip_prefix("detco_shards::").unwrap_or(test);
    assert!(!is_here(), "the driver's twin in {} was not found", folder().display());
    let mut folders = vec![folder().to_path_buf()];
    let others = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    folders.extend(std::env::split_paths(&others));
    let Ok(folders) = std::env::join_paths(folders) else {
        panic!("{} cannot stand in LD_LIBRARY_PATH", folder().display());
    };
    let Ok(binary) = std::env::current_exe() else { panic!("this binary has no path") };
    let output = Command::new(binary)
        .args(["--exact", test, "--nocapture"])
        .env("LD_LIBRARY_PATH", folders)
        .env(VARIABLE, "1")
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => panic!("{test}: {error}"),
    };
    let [out, err] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(
        output.status.success() && out.contains("test result: ok. 1 passed"),
        "{test} on the driver's twin: {}\n{out}\n{err}",
        output.status
    );
    println!("{test} on the driver's twin:\n{out}");
}

/// Objects that live.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Live {
    /// References to the context.
    pub contexts: u64,
    /// Streams.
    pub streams: u64,
    /// Events.
    pub events: u64,
    /// Modules.
    pub modules: u64,
    /// Allocations on the device.
    pub device: u64,
    /// Page-locked allocations.
    pub host: u64,
    /// Page-locked memory of others.
    pub registered: u64,
}

/// What lives now.
///
/// # Panics
/// Where this process does not run on the twins; so do the functions below.
pub fn live() -> Live {
    let function: Symbol<'_, unsafe extern "C" fn(*mut u64)> = function("detco_twin_live");
    let mut counts = [0; 7];
    // SAFETY: the function writes seven numbers.
    unsafe { function(counts.as_mut_ptr()) };
    let [contexts, streams, events, modules, device, host, registered] = counts;
    Live { contexts, streams, events, modules, device, host, registered }
}

/// What a GPU would not have forgiven, so far. Each was named on standard error.
pub fn faults() -> u64 {
    let function: Symbol<'_, unsafe extern "C" fn() -> u64> = function("detco_twin_faults");
    // SAFETY: the function only reads a counter.
    unsafe { function() }
}

/// Asks for no faults, where this process runs on the twins.
///
/// # Panics
/// Where there are some.
pub fn hold_nothing_against() {
    if is_here() {
        assert_eq!(faults(), 0, "see standard error");
    }
}

/// Calls so far, since [`fail_at`].
pub fn calls() -> u64 {
    let function: Symbol<'_, unsafe extern "C" fn() -> u64> = function("detco_twin_calls");
    // SAFETY: the function only reads a counter.
    unsafe { function() }
}

/// Lets the call of this number, counted from now on, fail; none at 0.
pub fn fail_at(number: u64) {
    let function: Symbol<'_, unsafe extern "C" fn(u64)> = function("detco_twin_fail_at");
    // SAFETY: the function only sets two counters.
    unsafe { function(number) }
}

/// Lets a stream, by its handle, stand still for so many milliseconds when it gets there.
pub fn hold(stream: *mut c_void, ms: u64) {
    let function: Symbol<'_, unsafe extern "C" fn(*mut c_void, u64) -> c_int> =
        function("detco_twin_hold");
    // SAFETY: the function looks the handle up before it uses it.
    let status = unsafe { function(stream, ms) };
    assert_eq!(status, 0, "no such stream");
}

/// What decodes for nvJPEG's twin: reads the size of `length` bytes at `jpeg` into `size` (width,
/// height) and says in `kind` who may decode it (0 all, 1 all but batches, 2 nobody); and, where there
/// is a place for them, writes the pixels `[height, width, 3]`. 0 where the bytes are an image.
pub type Decode = unsafe extern "C" fn(
    jpeg: *const u8,
    length: usize,
    size: *mut [u32; 2],
    kind: *mut c_int,
    pixels: *mut u8,
) -> c_int;

/// Sets what decodes for nvJPEG's twin.
pub fn decode_with(decode: Decode) {
    let function: Symbol<'_, unsafe extern "C" fn(Decode)> = function("detco_twin_decode_with");
    // SAFETY: the function keeps the address of a function, which stays where it is.
    unsafe { function(decode) }
}

fn function<T>(name: &str) -> Symbol<'static, T> {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        assert!(is_here(), "this process does not run on the driver's twin");
        // SAFETY: our own library; its initialisers have no preconditions.
        match unsafe { Library::new(folder().join("libcuda.so.1")) } {
            Ok(library) => library,
            Err(error) => panic!("{error}"),
        }
    });
    // SAFETY: callers name the type that driver.cpp or nvjpeg.cpp declares.
    match unsafe { library.get(name) } {
        Ok(function) => function,
        Err(error) => panic!("{error}"),
    }
}
