//! Compiles the shim around libtorch (`src/shim`), and writes libtorch's folder into the binaries
//! (rpath), so that they run from any folder with nothing exported.

use std::path::{Path, PathBuf};

/// The C++ files of the shim.
const SHIM: &[&str] = &[
    "c10d.cpp",
    "feed.cpp",
    "norm.cpp",
    "step/autocast.cpp",
    "step/cuda.cpp",
    "step/lists.cpp",
    "step/meter.cpp",
    "step/transfer.cpp",
    "version.cpp",
];
/// Headers that the files above share.
const HEADERS: &[&str] = &[
    "event.h",
    "step/device.h",
    "shim.h",
    "c10d.h",
    "gloo/algorithm.h",
    "gloo/context.h",
    "gloo/common/error.h",
    "gloo/rendezvous/store.h",
    "gloo/transport/device.h",
    "../model/kernels/norm.h",
];
/// Compiled into a library of its own, which the program carries inside and loads on demand.
const NCCL: &str = "nccl.cpp";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Named by torch-sys (`links = "tch"`); absent without the feature `train`.
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    if let Some(lib) = std::env::var_os("DEP_TCH_LIBTORCH_LIB") {
        let lib = PathBuf::from(lib);
        let lib = lib.canonicalize().unwrap_or(lib);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
        // Before LD_LIBRARY_PATH: images for GPUs have a libtorch of their own there.
        println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags");
        // `detco` calls nothing of libtorch, but its library's objects name it, and what a shared
        // library could take from a program the linker keeps: symbols of archives are not offered.
        println!("cargo:rustc-link-arg-bin=detco=-Wl,--exclude-libs,ALL");
        let libtorch = lib.parent().expect("a folder `lib` lies in libtorch's own");
        // Where NVIDIA's libraries lie beside it, for who is not told otherwise.
        println!("cargo:rustc-env=DETCO_LIBTORCH={}", libtorch.display());
        compile_shim(libtorch);
        compile_nccl(libtorch);
    }
}

/// A compiler that finds libtorch's headers.
fn compiler(libtorch: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").warnings(false).flag_if_supported("-Wno-deprecated");
    build.include("src/shim"); // the Gloo headers that the wheel lacks
    build.include(libtorch.join("include"));
    build.include(libtorch.join("include/torch/csrc/api/include"));
    build.define("_GLIBCXX_USE_CXX11_ABI", "1"); // as the wheels of 2.7 and later
    build.opt_level(2).debug(false);
    build
}

/// The libraries that a shared object of ours needs beside what the program has.
const NCCL_LIBRARIES: &[&str] = &["torch_cuda", "torch_cpu", "c10_cuda", "c10"];

/// `libdetco_nccl.so` in the build's folder, and its path in `DETCO_NCCL`; without CUDA's headers
/// an empty file, which the program reports when NCCL is asked for.
fn compile_nccl(libtorch: &Path) {
    println!("cargo:rerun-if-changed=src/shim/{NCCL}");
    println!("cargo:rerun-if-env-changed=DETCO_CUDA_INCLUDE");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let library = out.join("libdetco_nccl.so");
    println!("cargo:rustc-env=DETCO_NCCL={}", library.display());
    let Some(includes) = cuda_includes(libtorch) else {
        println!(
            "cargo:warning=CUDA's or NCCL's headers are missing: this build cannot train on \
             several GPUs (`cargo xtask setup` brings them)"
        );
        std::fs::write(&library, b"").expect("the build's folder takes files");
        return;
    };
    let mut build = compiler(libtorch);
    build.includes(includes).pic(true).cargo_metadata(false).file(Path::new("src/shim").join(NCCL));
    let objects = build.compile_intermediates();
    let lib = libtorch.join("lib");
    let mut link = build.get_compiler().to_command();
    link.arg("-shared").args(objects).arg("-o").arg(&library);
    link.arg(format!("-L{}", lib.display())).arg(format!("-Wl,-rpath,{}", lib.display()));
    link.args(["-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined", "-Wl,-s"]);
    link.args(NCCL_LIBRARIES.iter().map(|name| format!("-l{name}")));
    let status = link.status().expect("the compiler that made the object starts");
    assert!(status.success(), "linking {}: {status}", library.display());
}

/// Folders with the headers of CUDA (with crt and cccl) and NCCL: `DETCO_CUDA_INCLUDE` (several
/// with `:`) after the wheels beside libtorch. None when some header is in none of them.
fn cuda_includes(libtorch: &Path) -> Option<Vec<PathBuf>> {
    let named = std::env::var_os("DETCO_CUDA_INCLUDE").unwrap_or_default();
    let mut folders = Vec::new();
    if let Some(packages) = libtorch.parent() {
        // First: these are of the versions that libtorch was built with.
        let wheels = ["nccl/include", "cu13/include", "cu13/include/cccl"];
        folders.extend(wheels.map(|wheel| packages.join("nvidia").join(wheel)));
    }
    folders.extend(std::env::split_paths(&named));
    let needed = ["cuda_runtime_api.h", "crt/host_defines.h", "cuda/std/complex", "nccl.h"];
    let there = |header: &&str| folders.iter().any(|folder| folder.join(header).is_file());
    if needed.iter().all(there) && libtorch.join("lib/libtorch_cuda.so").is_file() {
        return Some(folders);
    }
    // A wheel that is installed later changes these.
    for folder in folders.iter().filter(|folder| folder.is_dir()) {
        println!("cargo:rerun-if-changed={}", folder.display());
    }
    None
}

fn compile_shim(libtorch: &Path) {
    let mut build = compiler(libtorch);
    for header in HEADERS {
        println!("cargo:rerun-if-changed=src/shim/{header}");
    }
    for file in SHIM {
        let path = Path::new("src/shim").join(file);
        println!("cargo:rerun-if-changed={}", path.display());
        build.file(path);
    }
    build.compile("detco_shim");
}
