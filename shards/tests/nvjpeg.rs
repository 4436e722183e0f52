//! nvJPEG of `cargo xtask setup`: it is found at run time, and nothing needs it to start.

#![cfg(feature = "nvjpeg")]

use std::path::PathBuf;
use std::process::Command;

use detco_shards::cuda::Search;
use detco_shards::decode::nvjpeg::{Nvjpeg, live_handles};

/// The crate `nvjpeg-sys` asks for `-lnvjpeg`; this binary has it among its dependencies and uses
/// nvJPEG, and starts without.
#[test]
fn this_binary_starts_without_nvjpeg_and_finds_it_when_asked() {
    let binary = std::env::current_exe().unwrap();
    let output = Command::new("readelf").arg("-d").arg(&binary).output().expect("readelf is there");
    let text = String::from_utf8(output.stdout).expect("text");
    let needed: Vec<&str> = text.lines().filter(|line| line.contains("(NEEDED)")).collect();
    assert!(needed.iter().any(|line| line.contains("[libc.")), "{text}");
    let foreign = ["nvjpeg", "cuda", "nvrtc"];
    let found = needed.iter().find(|line| foreign.iter().any(|name| line.contains(name)));
    assert_eq!(found, None, "needed at start-up");

    let libtorch = std::env::var_os("LIBTORCH").map(PathBuf::from).unwrap_or_default();
    let nvjpeg = Nvjpeg::open(&Search::beside_libtorch(&libtorch))
        .unwrap_or_else(|error| panic!("{error}: run `cargo xtask setup`"));
    assert_eq!(nvjpeg.version()[0], 13);
    assert!(live_handles().iter().all(|(_, live)| *live == 0));
}
