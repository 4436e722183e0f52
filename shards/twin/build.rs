//! Compiles the kernels' source as plain C++.

fn main() {
    let kernels = "../src/views/kernels";
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/twin.cpp");
    println!("cargo:rerun-if-changed={kernels}/view.h");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").include(kernels).file("src/twin.cpp");
    // No fused multiply-adds, as on the GPU: they round once where the CPU's renderer rounds twice.
    build.flag("-ffp-contract=off").flag("-pthread");
    build.warnings(true).extra_warnings(true).opt_level(2).debug(false);
    build.compile("detco_twin");
}
