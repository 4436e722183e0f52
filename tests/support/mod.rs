//! What several test files need: images to pack, and the program to call.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use image::{Rgb, RgbImage};

/// The program under test.
pub(crate) const DETCO: &str = env!("CARGO_BIN_EXE_detco");

/// Class folders of small textured JPEGs: `classes` stripe directions, `each` images of each, of
/// varied size. The same arguments give the same files.
pub(crate) fn images(folder: &Path, classes: u32, each: u32) {
    for class in 0..classes {
        let name = folder.join(format!("class{class}"));
        std::fs::create_dir_all(&name).expect("a temp folder");
        for i in 0..each {
            picture(class, i).save(name.join(format!("{i:04}.jpg"))).expect("a JPEG");
        }
    }
}

fn picture(class: u32, i: u32) -> RgbImage {
    let mut state = u64::from(class * 7919 + i + 1);
    let mut draw = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let (width, height) = (48 + (draw() * 40.0) as u32, 48 + (draw() * 40.0) as u32);
    let angle = class as f32 * 0.7 + draw() * 0.2;
    let (step, phase) = (0.3 + draw() * 0.4, draw() * 6.0);
    let (low, high): ([f32; 3], [f32; 3]) =
        (std::array::from_fn(|_| draw() * 120.0), std::array::from_fn(|_| 120.0 + draw() * 130.0));
    RgbImage::from_fn(width, height, |x, y| {
        let along = x as f32 * angle.cos() + y as f32 * angle.sin();
        let t = 0.5 + 0.5 * (along * step + phase).sin();
        Rgb(std::array::from_fn(|c| (low[c] + (high[c] - low[c]) * t) as u8))
    })
}

/// Runs the program.
pub(crate) fn detco(args: &[&str]) -> Output {
    Command::new(DETCO).args(args).output().expect("the program starts")
}

/// Runs the program, which must succeed, and returns what it printed.
pub(crate) fn detco_ok(args: &[&str]) -> String {
    let output = detco(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "detco {args:?}: {}\n{error}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs the program, which must fail with this code, and returns its error message.
pub(crate) fn detco_fails(args: &[&str], code: i32) -> String {
    let output = detco(args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "detco {args:?}: {error}");
    error
}

/// Images of four classes, packed: `(temp folder, shards)`.
pub(crate) fn shards(each: u32) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temp folder");
    images(&folder.path().join("images"), 4, each);
    let shards = folder.path().join("shards");
    let (from, to) = (folder.path().join("images"), path(&shards));
    detco_ok(&["pack", path(&from), to, "--shard-size", "20"]);
    (folder, shards)
}

/// A path as an argument.
pub(crate) fn path(path: &Path) -> &str {
    path.to_str().expect("temp folders have plain names")
}
