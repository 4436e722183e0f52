//! Lets binaries link that have the crate `nvjpeg-sys` among their dependencies and call nothing of
//! it: its build script asks for `-lnvjpeg`, which a machine without CUDA has not. An empty archive
//! of that name satisfies the linker and adds nothing; nvJPEG itself is loaded at run time. A test
//! looks at what the binaries ask for.

use std::path::PathBuf;

/// The whole of an archive without members.
const EMPTY_ARCHIVE: &[u8] = b"!<arch>\n";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_NVJPEG").is_none() {
        return;
    }
    let Some(out) = std::env::var_os("OUT_DIR").map(PathBuf::from) else {
        panic!("cargo sets OUT_DIR for build scripts");
    };
    let archive = out.join("libnvjpeg.a");
    if let Err(error) = std::fs::write(&archive, EMPTY_ARCHIVE) {
        panic!("cannot write {}: {error}", archive.display());
    }
    println!("cargo::rustc-link-search=native={}", out.display());
}
