//! Writes libtorch's folder into the binaries (rpath), so that they run from any folder with
//! nothing exported.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Named by torch-sys (`links = "tch"`); absent without the feature `train`.
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    if let Some(lib) = std::env::var_os("DEP_TCH_LIBTORCH_LIB") {
        let lib = std::path::PathBuf::from(lib);
        let lib = lib.canonicalize().unwrap_or(lib);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
        // `detco` calls nothing of libtorch, but its library's objects name it, and what a shared
        // library could take from a program the linker keeps: symbols of archives are not offered.
        println!("cargo:rustc-link-arg-bin=detco=-Wl,--exclude-libs,ALL");
    }
}
