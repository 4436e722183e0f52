//! NVRTC of `cargo xtask setup`, which needs no GPU: compiling, its errors, its cache.

#![cfg(feature = "cuda")]

use std::fs;
use std::path::{Path, PathBuf};

use detco_shards::cuda::{Architecture, Code, CudaError, Nvrtc, Origin, Program, Search};

/// Beside the libtorch of LIBTORCH, which `.cargo/config.toml` sets.
fn nvrtc() -> Nvrtc {
    let libtorch = std::env::var_os("LIBTORCH").map(PathBuf::from).unwrap_or_default();
    Nvrtc::open(&Search::beside_libtorch(&libtorch))
        .unwrap_or_else(|error| panic!("{error}: run `cargo xtask setup`"))
}

const SM_90: Architecture = Architecture { major: 9, minor: 0 };

fn program(source: &str) -> Program<'_> {
    let headers = &[("twice.h", "__device__ inline int twice(int x) { return 2 * x; }\n")];
    Program { name: "test.cu", source, headers, options: &["--std=c++17"] }
}

const GOOD: &str =
    "#include \"twice.h\"\nextern \"C\" __global__ void kernel(int* x) { *x = twice(*x); }";

#[test]
fn a_program_compiles_with_its_headers() {
    let nvrtc = nvrtc();
    assert_eq!(nvrtc.version().0, 13);
    let ptx = nvrtc.compile(&program(GOOD), SM_90, Code::Ptx).unwrap();
    let ptx = String::from_utf8(ptx).unwrap();
    assert!(ptx.contains(".target sm_90") && ptx.contains(".entry kernel"), "{ptx}");
    let cubin = nvrtc.compile(&program(GOOD), SM_90, Code::Cubin).unwrap();
    assert!(cubin.starts_with(b"\x7fELF"));
}

#[test]
fn an_error_of_the_program_comes_with_the_compilers_words() {
    let error = nvrtc().compile(&program("int x = nowhere;"), SM_90, Code::Ptx).unwrap_err();
    assert!(matches!(&error, CudaError::Compile { log, .. } if log.contains("nowhere")), "{error}");
    assert!(error.to_string().contains("test.cu") && error.to_string().contains("sm_90"));
    let unknown = Architecture { major: 1, minor: 0 };
    let error = nvrtc().compile(&program(GOOD), unknown, Code::Ptx).unwrap_err();
    assert!(error.to_string().contains("sm_10:\nnvrtc: error"), "{error}");
    let error = nvrtc().compile(&program("a\0b"), SM_90, Code::Ptx).unwrap_err();
    assert!(matches!(error, CudaError::Nul { offset: 1, .. }), "{error}");
}

#[test]
fn the_cache_is_used_and_what_is_damaged_in_it_is_made_again() {
    let nvrtc = nvrtc();
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("new/folder");
    let compile =
        |source| nvrtc.compile_cached(&program(source), SM_90, Code::Cubin, &cache).unwrap();
    let first = compile(GOOD);
    assert!(matches!(first.origin, Origin::Compiler));
    let second = compile(GOOD);
    assert!(matches!(second.origin, Origin::Cache));
    assert_eq!(first.code, second.code);

    let file = only_file(&cache);
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let third = compile(GOOD);
    assert!(matches!(third.origin, Origin::Compiler));
    assert_eq!(first.code, third.code);
    assert!(matches!(compile(GOOD).origin, Origin::Cache));

    // Another source is another file.
    assert!(matches!(compile("extern \"C\" __global__ void other() {}").origin, Origin::Compiler));
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 2);
}

#[test]
fn a_cache_that_cannot_be_written_only_costs_time() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "not a folder").unwrap();
    let compiled =
        nvrtc().compile_cached(&program(GOOD), SM_90, Code::Ptx, &file.join("cache")).unwrap();
    assert!(matches!(compiled.origin, Origin::Uncached(_)) && !compiled.code.is_empty());
}

fn only_file(folder: &Path) -> PathBuf {
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}
