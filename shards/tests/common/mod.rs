//! What the tests share: the Python oracle, and images of their own.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The interpreter that `cargo xtask setup` makes.
pub(crate) fn python() -> PathBuf {
    let python = std::env::var_os("DETCO_PYTHON").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python"),
        PathBuf::from,
    );
    assert!(python.exists(), "{} is missing: run `cargo xtask setup`", python.display());
    python
}

/// Runs a Python program and returns what it prints.
pub(crate) fn run_python(program: &str, arguments: &[&Path]) -> String {
    let output = Command::new(python())
        .arg("-c")
        .arg(program)
        .args(arguments)
        .output()
        .expect("Python starts");
    assert!(
        output.status.success(),
        "Python failed:\n{}\n{program}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("Python prints UTF-8")
}

/// A textured JPEG of its own for each number.
pub(crate) fn jpeg(number: u32, width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 90)
        .encode_image(&picture(number, width, height))
        .expect("encodes");
    bytes
}

/// The picture in it.
pub(crate) fn picture(number: u32, width: u32, height: u32) -> image::RgbImage {
    image::RgbImage::from_fn(width, height, |x, y| {
        let wave = |a: u32, b: u32| {
            let phase = f64::from(x * a + y * b + number * 17) / 23.0;
            (127.0 + 120.0 * phase.sin()) as u8
        };
        image::Rgb([wave(3, 1), wave(1, 4), wave(2, 2)])
    })
}
