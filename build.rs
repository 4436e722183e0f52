//! Compiles the shim around libtorch (`src/shim`), and writes libtorch's folder into the binaries
//! (rpath), so that they run from any folder with nothing exported.

use std::path::{Path, PathBuf};

/// The C++ files of the shim.
const SHIM: &[&str] = &["norm.cpp", "step.cpp", "version.cpp"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Named by torch-sys (`links = "tch"`); absent without the feature `train`.
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    if let Some(lib) = std::env::var_os("DEP_TCH_LIBTORCH_LIB") {
        let lib = PathBuf::from(lib);
        let lib = lib.canonicalize().unwrap_or(lib);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
        // `detco` calls nothing of libtorch, but its library's objects name it, and what a shared
        // library could take from a program the linker keeps: symbols of archives are not offered.
        println!("cargo:rustc-link-arg-bin=detco=-Wl,--exclude-libs,ALL");
        compile_shim(lib.parent().expect("a folder `lib` lies in libtorch's own"));
    }
}

fn compile_shim(libtorch: &Path) {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").warnings(false).flag_if_supported("-Wno-deprecated");
    build.include(libtorch.join("include"));
    build.include(libtorch.join("include/torch/csrc/api/include"));
    build.define("_GLIBCXX_USE_CXX11_ABI", "1"); // as the wheels of 2.7 and later
    build.opt_level(2).debug(false);
    println!("cargo:rerun-if-changed=src/shim/shim.h");
    println!("cargo:rerun-if-changed=src/model/kernels/norm.h");
    for file in SHIM {
        let path = Path::new("src/shim").join(file);
        println!("cargo:rerun-if-changed={}", path.display());
        build.file(path);
    }
    build.compile("detco_shim");
}
