//! What the tests share: the Python oracle, and images of their own.
#![expect(clippy::allow_attributes, reason = "not every test file uses every helper")]
#![allow(dead_code, reason = "not every test file uses every helper")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// The interpreter that `cargo xtask setup` makes.
pub fn python() -> PathBuf {
    let python = std::env::var_os("DETCO_PYTHON").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python"),
        PathBuf::from,
    );
    assert!(python.exists(), "{} is missing: run `cargo xtask setup`", python.display());
    python
}

/// Runs a Python program and returns what it prints.
pub fn run_python(program: &str, arguments: &[&Path]) -> String {
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

/// Runs a system tool and returns what it prints.
pub fn run_tool(tool: &str, arguments: &[&str], folder: &Path) -> String {
    let output = Command::new(tool)
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap_or_else(|error| panic!("`{tool}` is needed by this test: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {arguments:?}: {errors}");
    assert!(errors.is_empty(), "{tool} {arguments:?} warns: {errors}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// A textured JPEG of its own for each number.
pub fn jpeg(number: u32, width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 90)
        .encode_image(&picture(number, width, height))
        .expect("encodes");
    bytes
}

/// The same as PNG.
pub fn png(number: u32, width: u32, height: u32) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture(number, width, height)
        .write_to(&mut bytes, image::ImageFormat::Png)
        .expect("encodes");
    bytes.into_inner()
}

pub fn picture(number: u32, width: u32, height: u32) -> image::RgbImage {
    image::RgbImage::from_fn(width, height, |x, y| {
        let wave = |a: u32, b: u32| {
            let phase = f64::from(x * a + y * b + number * 17) / 23.0;
            (127.0 + 120.0 * phase.sin()) as u8
        };
        image::Rgb([wave(3, 1), wave(1, 4), wave(2, 2)])
    })
}

/// Every file below a folder, by relative path.
pub fn tree(folder: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    fn walk(
        root: &Path,
        folder: &Path,
        files: &mut std::collections::BTreeMap<String, Vec<u8>>,
    ) {
        for entry in std::fs::read_dir(folder).expect("lists") {
            let path = entry.expect("lists").path();
            if path.is_dir() {
                walk(root, &path, files);
            } else {
                let name = path.strip_prefix(root).expect("below").display().to_string();
                files.insert(name, std::fs::read(&path).expect("reads"));
            }
        }
    }
    let mut files = std::collections::BTreeMap::new();
    walk(folder, folder, &mut files);
    files
}
