//! NVRTC, the compiler for CUDA C++ at run time, and a cache of what it made.
//!
//! Its library is loaded here and not through `cudarc`, which takes whichever `libnvrtc.so` the
//! system's loader finds first (a toolkit of another release, often) and panics where there is
//! none.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use libloading::Library;
use sha2::{Digest, Sha256};

use super::{CudaError, Search, library};

/// The library of CUDA 13: the release that the libtorch of this project brings.
const LIBRARY: &str = "libnvrtc.so.13";
/// How the library's second half is called, before its version.
const BUILT_INS: &str = "libnvrtc-builtins.so.";

/// A compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Architecture {
    /// 8 for A100, 9 for H100, 10 for B200.
    pub major: u32,
    /// The digit behind the point.
    pub minor: u32,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.major, self.minor)
    }
}

/// CUDA C++ in memory.
#[derive(Debug, Clone, Copy)]
pub struct Program<'a> {
    /// How the compiler's messages call the source.
    pub name: &'a str,
    /// The source.
    pub source: &'a str,
    /// What it includes: name and text.
    pub headers: &'a [(&'a str, &'a str)],
    /// Options of the compiler, but for the architecture.
    pub options: &'a [&'a str],
}

/// What a program is compiled to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Text that the driver compiles further.
    Ptx,
    /// Machine code.
    Cubin,
}

/// A compiled program.
#[derive(Debug)]
pub struct Compiled {
    /// PTX with a NUL at its end, or machine code.
    pub code: Vec<u8>,
    /// Where it comes from.
    pub origin: Origin,
}

/// Where a compiled program comes from.
#[derive(Debug)]
pub enum Origin {
    /// The cache had it.
    Cache,
    /// Compiled now, and put into the cache.
    Compiler,
    /// Compiled now; the cache could not be written, so that the next start compiles again.
    Uncached(io::Error),
}

type Handle = *mut c_void;
type GetSize = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
type GetBytes = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;
type Create = unsafe extern "C" fn(
    *mut Handle,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int;

/// NVRTC's status for a program that has errors.
const ERROR_COMPILATION: c_int = 6;

/// The compiler.
#[derive(Debug)]
pub struct Nvrtc {
    version: (c_int, c_int),
    create: Create,
    compile: Compile,
    destroy: unsafe extern "C" fn(*mut Handle) -> c_int,
    log: (GetSize, GetBytes),
    ptx: (GetSize, GetBytes),
    cubin: (GetSize, GetBytes),
    words: unsafe extern "C" fn(c_int) -> *const c_char,
    /// What the functions point into.
    _library: Library,
    _built_ins: Option<Library>,
}

impl Nvrtc {
    /// Looks for the compiler: in the folders of `search`, then where the system's loader looks.
    ///
    /// # Errors
    /// [`CudaError::NoCompiler`] names all that was tried; [`CudaError::OldCompiler`] what
    /// is missing.
    pub fn open(search: &Search) -> Result<Nvrtc, CudaError> {
        let name = PathBuf::from(LIBRARY);
        let files = search.folders.iter().map(|folder| folder.join(LIBRARY));
        let candidates: Vec<PathBuf> = files.chain([name]).collect();
        let mut reason = String::new();
        for path in &candidates {
            let built_ins = built_ins(path);
            match library::open(path) {
                Ok(library) => return Nvrtc::with(library, built_ins, path),
                Err(error) => reason = error,
            }
        }
        let tried = candidates.iter().map(|path| path.display().to_string());
        Err(CudaError::NoCompiler { tried: tried.collect::<Vec<_>>().join(", "), reason })
    }

    fn with(library: Library, built_ins: Option<Library>, path: &Path) -> Result<Nvrtc, CudaError> {
        let pair = |size, bytes| -> Result<(GetSize, GetBytes), CudaError> {
            Ok((function(&library, path, size)?, function(&library, path, bytes)?))
        };
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int =
            function(&library, path, "nvrtcVersion")?;
        let mut nvrtc = Nvrtc {
            version: (0, 0),
            create: function(&library, path, "nvrtcCreateProgram")?,
            compile: function(&library, path, "nvrtcCompileProgram")?,
            destroy: function(&library, path, "nvrtcDestroyProgram")?,
            log: pair("nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?,
            ptx: pair("nvrtcGetPTXSize", "nvrtcGetPTX")?,
            cubin: pair("nvrtcGetCUBINSize", "nvrtcGetCUBIN")?,
            words: function(&library, path, "nvrtcGetErrorString")?,
            _library: library,
            _built_ins: built_ins,
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: places for one int each.
        let status = unsafe { version(&mut major, &mut minor) };
        nvrtc.check("nvrtcVersion", status)?;
        nvrtc.version = (major, minor);
        Ok(nvrtc)
    }

    /// The compiler's release, as (13, 0).
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles.
    ///
    /// # Errors
    /// [`CudaError::Compile`] with the compiler's log where the program has errors,
    /// [`CudaError::Compiler`] where the compiler fails.
    pub fn compile(
        &self,
        program: &Program<'_>,
        architecture: Architecture,
        code: Code,
    ) -> Result<Vec<u8>, CudaError> {
        let options = program.options.iter().map(|option| text("an option", option));
        let mut options = options.collect::<Result<Vec<CString>, CudaError>>()?;
        options.push(text("an option", &format!("--gpu-architecture={architecture}"))?);
        let job = Job::new(self, program)?;
        let pointers = pointers(&options);
        // SAFETY: the program is live; as many pointers to texts as are counted.
        let status =
            unsafe { (self.compile)(job.handle, pointers.len() as c_int, pointers.as_ptr()) };
        if status != 0 {
            // Not only a program's errors are told there: a missing library of built-ins is.
            let log = job.bytes("nvrtcGetProgramLog", self.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_string();
            if status == ERROR_COMPILATION || !log.is_empty() {
                return Err(CudaError::Compile {
                    program: program.name.to_string(),
                    architecture: architecture.to_string(),
                    log,
                });
            }
        }
        self.check("nvrtcCompileProgram", status)?;
        match code {
            Code::Ptx => job.bytes("nvrtcGetPTX", self.ptx),
            Code::Cubin => job.bytes("nvrtcGetCUBIN", self.cubin),
        }
    }

    /// Takes a program from the folder `cache`, or compiles it and puts it there. A file that is
    /// not whole is compiled again; a folder that cannot be written costs the next start a second,
    /// and no more.
    ///
    /// # Errors
    /// As [`Nvrtc::compile`].
    pub fn compile_cached(
        &self,
        program: &Program<'_>,
        architecture: Architecture,
        code: Code,
        cache: &Path,
    ) -> Result<Compiled, CudaError> {
        let file = cache.join(self.file_name(program, architecture, code));
        if let Some(code) = std::fs::read(&file).ok().and_then(unseal) {
            return Ok(Compiled { code, origin: Origin::Cache });
        }
        let code = self.compile(program, architecture, code)?;
        let written =
            std::fs::create_dir_all(cache).and_then(|()| write_whole(&file, &seal(&code)));
        let origin = written.map_or_else(Origin::Uncached, |()| Origin::Compiler);
        Ok(Compiled { code, origin })
    }

    /// A name that changes with everything that decides the bytes.
    fn file_name(&self, program: &Program<'_>, architecture: Architecture, code: Code) -> String {
        let mut hash = Sha256::new();
        // Each text behind its length, so that no two lists of texts look alike.
        let mut add = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        add(&format!("{:?} {architecture} {code:?}", self.version));
        add(program.name);
        add(program.source);
        add(&program.headers.len().to_string());
        program.headers.iter().for_each(|(name, text)| {
            add(name);
            add(text);
        });
        program.options.iter().for_each(|option| add(option));
        let hex = crate::files::hex(&hash.finalize());
        let ending = match code {
            Code::Ptx => "ptx",
            Code::Cubin => "cubin",
        };
        format!("{hex}.{ending}")
    }

    fn check(&self, call: &'static str, status: c_int) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: any number is a status; unknown ones have a text too.
        let words = unsafe { (self.words)(status) };
        let name = if words.is_null() {
            String::from("a status without a name")
        } else {
            // SAFETY: a constant, NUL-terminated text of the library.
            unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
        };
        Err(CudaError::Compiler { call, code: status, name })
    }
}

/// A program inside the compiler, destroyed at the end.
struct Job<'a> {
    nvrtc: &'a Nvrtc,
    handle: Handle,
    /// What the program may point into.
    _texts: Vec<CString>,
}

impl<'a> Job<'a> {
    fn new(nvrtc: &'a Nvrtc, program: &Program<'_>) -> Result<Job<'a>, CudaError> {
        let source = text("a source", program.source)?;
        let name = text("a source's name", program.name)?;
        let headers = program.headers.iter();
        let headers = headers
            .map(|(name, source)| Ok((text("a header's name", name)?, text("a header", source)?)));
        let (names, texts): (Vec<CString>, Vec<CString>) =
            headers.collect::<Result<Vec<_>, CudaError>>()?.into_iter().unzip();
        let mut handle = ptr::null_mut();
        // SAFETY: `handle` is a place for one program; all texts end with NUL and live in the job;
        // as many headers as are counted.
        let status = unsafe {
            (nvrtc.create)(
                &mut handle,
                source.as_ptr(),
                name.as_ptr(),
                names.len() as c_int,
                pointers(&texts).as_ptr(),
                pointers(&names).as_ptr(),
            )
        };
        nvrtc.check("nvrtcCreateProgram", status)?;
        let texts = [source, name].into_iter().chain(names).chain(texts).collect();
        Ok(Job { nvrtc, handle, _texts: texts })
    }

    fn bytes(
        &self,
        call: &'static str,
        (size, bytes): (GetSize, GetBytes),
    ) -> Result<Vec<u8>, CudaError> {
        let mut len = 0;
        // SAFETY: the program is live, and `len` a place for one size.
        self.nvrtc.check(call, unsafe { size(self.handle, &mut len) })?;
        let mut out = vec![0_u8; len];
        // SAFETY: `out` has the room that was just asked for.
        self.nvrtc.check(call, unsafe { bytes(self.handle, out.as_mut_ptr().cast()) })?;
        Ok(out)
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once. A failure leaves nothing to do.
        let _ = unsafe { (self.nvrtc.destroy)(&mut self.handle) };
    }
}

fn function<F: Copy>(library: &Library, path: &Path, name: &'static str) -> Result<F, CudaError> {
    // SAFETY: each caller names the type after nvrtc.h of CUDA 13.0. The library outlives the
    // function: `Nvrtc` holds both.
    let found = unsafe { library.get::<F>(name) };
    let missing = |_| CudaError::OldCompiler { library: path.to_path_buf(), symbol: name };
    found.map(|function| *function).map_err(missing)
}

/// NVRTC opens its second half by name when it compiles. In a folder that the system's loader does
/// not know it finds it only if it is loaded already.
fn built_ins(nvrtc: &Path) -> Option<Library> {
    let folder = nvrtc.parent().filter(|folder| !folder.as_os_str().is_empty())?;
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(BUILT_INS))
        })
        .collect();
    names.sort();
    // Where it does not load, compiling says so.
    names.iter().find_map(|path| library::open(path).ok())
}

fn text(what: &'static str, text: &str) -> Result<CString, CudaError> {
    CString::new(text).map_err(|error| CudaError::Nul { what, offset: error.nul_position() })
}

fn pointers(texts: &[CString]) -> Vec<*const c_char> {
    texts.iter().map(|text| text.as_ptr()).collect()
}

/// A cached program: its SHA-256, then itself.
fn seal(code: &[u8]) -> Vec<u8> {
    [Sha256::digest(code).as_slice(), code].concat()
}

fn unseal(mut file: Vec<u8>) -> Option<Vec<u8>> {
    let (sum, code) = file.split_at_checked(Sha256::output_size())?;
    if Sha256::digest(code).as_slice() != sum {
        return None;
    }
    file.drain(..Sha256::output_size());
    Some(file)
}

/// Writes a file that appears whole, also when several processes and threads write it at once. Not
/// flushed to disk: after a power cut its checksum tells.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static WRITES: AtomicU32 = AtomicU32::new(0);
    let unique = (std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed));
    let mut name = std::ffi::OsString::from(format!(".{}-{}.", unique.0, unique.1));
    name.push(path.file_name().unwrap_or_default());
    let temp = path.with_file_name(name);
    let done = std::fs::write(&temp, bytes).and_then(|()| std::fs::rename(&temp, path));
    if done.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(&temp);
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_that_is_nowhere_is_an_error_with_all_that_was_tried() {
        let search = Search { folders: vec![PathBuf::from("no/such/folder")] };
        match Nvrtc::open(&search) {
            Ok(nvrtc) => println!("the system has NVRTC {:?}", nvrtc.version()),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains(LIBRARY) && text.contains("no/such/folder"), "{text}");
            }
        }
    }

    #[test]
    fn a_cached_program_that_changed_on_disk_is_not_believed() {
        let sealed = seal(b"machine code");
        assert_eq!(unseal(sealed.clone()).unwrap(), b"machine code");
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            assert!(unseal(damaged).is_none(), "byte {at}");
        }
        assert!(unseal(sealed[..sealed.len() - 1].to_vec()).is_none());
        assert!(unseal(Vec::new()).is_none());
    }
}
