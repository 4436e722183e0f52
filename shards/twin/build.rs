//! Compiles the kernels' source as plain C++, and the twins of NVIDIA's libraries.

use std::path::{Path, PathBuf};

const KERNELS: &str = "../src/views/kernels";

/// The names under which programs look for what the twins' library is.
const NAMES: [&str; 3] = ["libcuda.so.1", "libcuda.so", "libnvjpeg.so.13"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed={KERNELS}/view.h");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").include(KERNELS);
    // No fused multiply-adds, as on the GPU: they round once where the CPU's renderer rounds twice.
    build.flag("-ffp-contract=off").flag("-pthread");
    // The library's own functions stay its own, but for those that are NVIDIA's.
    build.flag("-fvisibility=hidden");
    build.warnings(true).extra_warnings(true).opt_level(2).debug(false).pic(true);
    library(&build);
    build.file("src/twin.cpp").compile("detco_twin");
}

/// Links the twins into one library, and names it as NVIDIA's are named.
fn library(build: &cc::Build) {
    let Some(out) = std::env::var_os("OUT_DIR").map(PathBuf::from) else {
        panic!("cargo sets OUT_DIR for build scripts");
    };
    let folder = out.join("libraries");
    // What an earlier build left may be another library's.
    let _ = std::fs::remove_dir_all(&folder);
    must(std::fs::create_dir_all(&folder), &folder);
    let file = folder.join("libdetco_twin.so");
    let mut command = build.get_compiler().to_command();
    command.args(["-shared", "src/driver.cpp", "src/nvjpeg.cpp", "-o"]).arg(&file);
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{command:?}: {status}"),
        Err(error) => panic!("{command:?}: {error}"),
    }
    for name in NAMES {
        let link = folder.join(name);
        must(std::os::unix::fs::symlink("libdetco_twin.so", &link), &link);
    }
}

fn must(done: std::io::Result<()>, path: &Path) {
    if let Err(error) = done {
        panic!("{}: {error}", path.display());
    }
}
