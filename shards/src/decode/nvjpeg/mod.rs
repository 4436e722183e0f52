//! nvJPEG: JPEG bytes in host memory to RGB pixels on the device.
//!
//! | file | what it holds |
//! |---|---|
//! | `sys` | the functions, looked up at run time |
//! | `handle` | nvJPEG's objects, each destroyed once by who created it, and counted |
//! | `lane` | the hybrid back end: Huffman codes on the CPU, the rest on the device |
//! | `batch` | the hardware engine: many baseline images at once |
//!
//! Nothing of CUDA is needed to build or to start: [`Nvjpeg::open`] looks for the library, and what
//! is missing is named. All that a library or an image can do wrong is an error with the status by
//! name. Handles are opened with interpolated chroma, so that pixels agree with libjpeg's, and with
//! strict reading of the bitstream where codes are read on the CPU, so that damage is told rather than
//! painted over.
//!
//! Not yet run on a GPU.

#![expect(unsafe_code, reason = "the wall around nvJPEG")]

mod batch;
#[cfg(test)]
mod fake;
mod handle;
mod lane;
mod sys;

use std::ffi::c_int;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use super::Probe;
use crate::cuda::{CudaError, Search, open_library};
use sys::Api;

pub(crate) use batch::{Asker, Batch};
pub(crate) use handle::Handle;
pub use handle::live_handles;
pub(crate) use lane::Lane;

/// The library's name for the loader, with the version that its interface has.
const LIBRARY: &str = "libnvjpeg.so.13";

/// Errors of nvJPEG.
#[derive(Debug, Error)]
pub enum NvjpegError {
    /// The library is not on this machine, or does not load.
    #[error("no nvJPEG on this machine: looked for {tried} ({reason})")]
    NoLibrary {
        /// The names and files that were tried.
        tried: String,
        /// What the loader said about the last of them.
        reason: String,
    },
    /// The library lacks a function.
    #[error("{library}: has no function {symbol}")]
    NoFunction {
        /// The library.
        library: PathBuf,
        /// The function.
        symbol: &'static str,
    },
    /// The library is too old for interpolated chroma.
    #[error("{library}: nvJPEG {}.{}, and {}.{} or later is needed", found[0], found[1], sys::VERSION_MIN[0], sys::VERSION_MIN[1])]
    Old {
        /// The library.
        library: PathBuf,
        /// Its version.
        found: [i32; 2],
    },
    /// A call failed.
    #[error("{call} failed: {status}")]
    Failed {
        /// nvJPEG's function.
        call: &'static str,
        /// Its status.
        status: Status,
    },
    /// nvJPEG and our own reader of headers disagree about an image's size.
    #[error("two sizes: nvJPEG reads {found:?}, the header says {expected:?}")]
    Size {
        /// nvJPEG's.
        found: [u32; 2],
        /// Ours.
        expected: [u32; 2],
    },
    /// A kind of image that the back end does not take.
    #[error("nvJPEG does not take this kind of image")]
    NotTaken,
    /// nvJPEG has the back end, the GPU has no engine for it.
    #[error("this GPU decodes no JPEG in hardware, or its driver's libnvcuvid is not to be found")]
    NoEngine,
    /// More images than a batch can have.
    #[error("a batch of {images} images: more than nvJPEG counts to")]
    TooMany {
        /// Images of the batch.
        images: usize,
    },
    /// The device failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// A status other than success (`nvjpegStatus_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u32);

impl Status {
    /// Its name in nvjpeg.h, and what it means.
    pub fn meaning(self) -> (&'static str, &'static str) {
        match self.0 {
            1 => ("NOT_INITIALIZED", "a handle was used before it was made"),
            2 => ("INVALID_PARAMETER", "an argument is wrong"),
            3 => ("BAD_JPEG", "the JPEG cannot be parsed"),
            4 => ("JPEG_NOT_SUPPORTED", "this kind of JPEG is not decoded"),
            5 => ("ALLOCATOR_FAILURE", "there is no memory left"),
            6 => ("EXECUTION_FAILED", "work on the device failed, or there is no GPU or driver"),
            7 => (
                "ARCH_MISMATCH",
                "this GPU has no such decoder, or its driver's libnvcuvid is not to be found",
            ),
            8 => ("INTERNAL_ERROR", "nvJPEG failed within"),
            9 => ("IMPLEMENTATION_NOT_SUPPORTED", "this back end does not do that"),
            10 => ("INCOMPLETE_BITSTREAM", "the JPEG is cut off"),
            _ => ("unknown status", "newer than nvJPEG 13"),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, meaning) = self.meaning();
        write!(f, "{name} ({}): {meaning}", self.0)
    }
}

/// Turns a status into a result.
fn check(call: &'static str, status: nvjpeg_sys::nvjpegStatus_t) -> Result<(), NvjpegError> {
    match status {
        nvjpeg_sys::nvjpegStatus_t_NVJPEG_STATUS_SUCCESS => Ok(()),
        code => Err(NvjpegError::Failed { call, status: Status(code) }),
    }
}

/// The library, loaded.
#[derive(Debug)]
pub struct Nvjpeg {
    api: Api,
    version: [i32; 3],
    path: PathBuf,
}

impl Nvjpeg {
    /// Looks for `libnvjpeg.so.13` in the folders of `search`, then where the system's loader looks.
    ///
    /// # Errors
    /// [`NvjpegError::NoLibrary`] with every place that was tried, [`NvjpegError::NoFunction`] and
    /// [`NvjpegError::Old`] for a library that will not do.
    pub fn open(search: &Search) -> Result<Arc<Nvjpeg>, NvjpegError> {
        let places = search.folders.iter().map(|folder| folder.join(LIBRARY));
        let places: Vec<PathBuf> = places.chain([PathBuf::from(LIBRARY)]).collect();
        let mut reason = String::new();
        for path in &places {
            match open_library(path) {
                Ok(library) => {
                    let missing =
                        |symbol| NvjpegError::NoFunction { library: path.clone(), symbol };
                    return Nvjpeg::checked(Api::load(library).map_err(missing)?, path);
                }
                Err(error) => reason = error,
            }
        }
        let tried = places.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        Err(NvjpegError::NoLibrary { tried: tried.join(", "), reason })
    }

    fn checked(api: Api, path: &Path) -> Result<Arc<Nvjpeg>, NvjpegError> {
        let mut version = [0; 3];
        for (which, part) in (0..).zip(&mut version) {
            // SAFETY: `part` is a place for one int; 0, 1, 2 are major, minor and patch.
            let status = unsafe { (api.nvjpegGetProperty)(which, part) };
            check("nvjpegGetProperty", status)?;
        }
        let found = [version[0], version[1]];
        if found < sys::VERSION_MIN {
            return Err(NvjpegError::Old { library: path.to_path_buf(), found });
        }
        Ok(Arc::new(Nvjpeg { api, version, path: path.to_path_buf() }))
    }

    /// Major, minor and patch version.
    pub fn version(&self) -> [i32; 3] {
        self.version
    }

    /// The file or name that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Where a decoded image goes: `[height, width, 3]` bytes of device memory, RGB, rows `pitch` bytes
/// apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) address: u64,
    pub(crate) pitch: usize,
}

impl Target {
    fn image(self) -> nvjpeg_sys::nvjpegImage_t {
        let mut image = nvjpeg_sys::nvjpegImage_t::new();
        // An address on the device: a pointer in nvJPEG's interface, never followed here.
        image.channel[0] = self.address as *mut u8;
        image.pitch[0] = self.pitch;
        image
    }
}

/// Interleaved RGB in the first channel.
const RGBI: nvjpeg_sys::nvjpegOutputFormat_t = nvjpeg_sys::nvjpegOutputFormat_t_NVJPEG_OUTPUT_RGBI;

/// No metadata is kept, and the bytes are read where they lie.
const KEEP_NOTHING: c_int = 0;

/// Holds nvJPEG's size of a parsed image against ours: the target was allocated for ours.
fn same_size(header: &Probe, found: [u32; 2]) -> Result<(), NvjpegError> {
    let expected = [header.width, header.height];
    if found != expected {
        return Err(NvjpegError::Size { found, expected });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Beside the libtorch of LIBTORCH, which `.cargo/config.toml` sets.
    fn wheel() -> Search {
        let libtorch = std::env::var_os("LIBTORCH").map(PathBuf::from).unwrap_or_default();
        Search::beside_libtorch(&libtorch)
    }

    #[test]
    fn the_wheels_library_opens_and_without_a_gpu_says_what_is_missing() {
        let nvjpeg = Nvjpeg::open(&wheel()).expect("`cargo xtask setup` installs nvidia-nvjpeg");
        assert!(nvjpeg.version()[0] == 13, "{:?}", nvjpeg.version());
        assert!(nvjpeg.path().ends_with(LIBRARY));
        let _alone = fake::alone(); // objects are counted
        match Handle::hybrid(&nvjpeg) {
            Ok(_) => println!("a GPU is here"),
            Err(error) => {
                let text = error.to_string();
                assert!(
                    text.starts_with("nvjpegCreateEx failed: EXECUTION_FAILED (6)")
                        && text.contains("no GPU or driver"),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn a_missing_library_is_named_with_every_place() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(LIBRARY), b"no library").unwrap();
        let search = Search { folders: vec![folder.path().to_path_buf()] };
        match Nvjpeg::open(&search) {
            // The system has one of its own.
            Ok(nvjpeg) => assert_eq!(nvjpeg.path(), Path::new(LIBRARY)),
            Err(error) => {
                let text = error.to_string();
                let file = folder.path().join(LIBRARY).display().to_string();
                assert!(matches!(error, NvjpegError::NoLibrary { .. }), "{text}");
                assert!(text.contains(&format!("{file}, {LIBRARY}")), "{text}");
            }
        }
    }

    #[test]
    fn a_library_without_the_functions_is_named() {
        let folder = tempfile::tempdir().unwrap();
        // Any library will do that is not nvJPEG.
        let other = wheel().folders[0].join("libcudart.so.13");
        std::fs::copy(other, folder.path().join(LIBRARY)).unwrap();
        let search = Search { folders: vec![folder.path().to_path_buf()] };
        let error = Nvjpeg::open(&search).unwrap_err();
        let NvjpegError::NoFunction { library, symbol } = error else { panic!("{error}") };
        assert_eq!((library, symbol), (folder.path().join(LIBRARY), "nvjpegGetProperty"));
    }

    #[test]
    fn statuses_have_names_and_new_ones_do_no_harm() {
        for code in 1..=10 {
            let text = Status(code).to_string();
            assert!(text.contains(&format!("({code}): ")) && !text.contains("unknown"), "{text}");
        }
        assert_eq!(Status(77).to_string(), "unknown status (77): newer than nvJPEG 13");
    }
}
