//! What the oracle tests share: generated images and the Python that checks them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use detco_shards::decode::{Decoder, Image};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The Python of `cargo xtask setup`, or of DETCO_PYTHON.
pub(crate) fn python() -> PathBuf {
    let python = std::env::var_os("DETCO_PYTHON")
        .map_or_else(|| root().join(".venv/bin/python"), PathBuf::from);
    assert!(python.exists(), "{}: not there. run `cargo xtask setup`", python.display());
    python
}

/// Runs a script of `tools/oracle` and gives what it printed.
pub(crate) fn oracle(script: &str, arguments: &[&OsStr]) -> String {
    let output = Command::new(python())
        .arg(root().join("tools/oracle").join(script))
        .args(arguments)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script} failed: {errors}\nrun `cargo xtask setup`");
    String::from_utf8(output.stdout).unwrap()
}

/// A small generator of its own, so that images do not depend on the code under test.
fn hash(mut x: u64) -> u64 {
    x = (x ^ (x >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    x = (x ^ (x >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    x ^ (x >> 32)
}

/// Independent bytes: the hardest image for anything that averages.
pub(crate) fn noise(width: u32, height: u32, seed: u64) -> Image {
    let bytes = u64::from(width) * u64::from(height) * 3;
    let pixels = (0..bytes).map(|i| hash(i ^ (seed << 40)) as u8).collect();
    Image { width, height, pixels }
}

/// Soft gradients, hard edges, fine texture and a little noise, in colour.
pub(crate) fn textured(width: u32, height: u32, seed: u64) -> Image {
    let mut pixels = Vec::with_capacity((width * height * 3) as usize);
    for y in 0..height {
        for x in 0..width {
            let (fx, fy) = (f64::from(x), f64::from(y));
            let noise = hash(u64::from(x) ^ (u64::from(y) << 20) ^ (seed << 40));
            for channel in 0..3u64 {
                let phase = (seed * 3 + channel) as f64;
                let wave = (fx * 0.031 + phase).sin() + (fy * 0.047 - phase).cos();
                let fine = ((fx + fy * 0.7) * 0.9 + phase).sin() * 0.3;
                let edge = if ((x / 37) ^ (y / 29)) as u64 + channel & 1 == 0 { 0.5 } else { -0.3 };
                let grain = ((noise >> (channel * 8)) & 15) as f64 - 7.5;
                let value = 128.0 + 45.0 * (wave + fine + edge) + grain;
                pixels.push(value.clamp(0.0, 255.0) as u8);
            }
        }
    }
    Image { width, height, pixels }
}

/// Up to `count` images of the folder DETCO_TEST_IMAGES; none where it is not set.
pub(crate) fn real_images(count: usize) -> Vec<(String, Image)> {
    let mut decoder = Decoder::new();
    let files = real_files();
    let every = (files.len() / count).max(1);
    files
        .iter()
        .step_by(every)
        .take(count)
        .enumerate()
        .map(|(i, path)| {
            let mut image = Image::new();
            decoder.decode(&std::fs::read(path).unwrap(), &mut image).unwrap();
            (format!("real{i}"), image)
        })
        .collect()
}

/// The files below DETCO_TEST_IMAGES, sorted.
pub(crate) fn real_files() -> Vec<PathBuf> {
    fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, into) } else { into.push(path) }
        }
    }
    let mut files = Vec::new();
    if let Some(folder) = std::env::var_os("DETCO_TEST_IMAGES") {
        walk(Path::new(&folder), &mut files);
    }
    files.sort();
    files
}
