//! Runs the Python side of a test: PyTorch and friends in the project's `.venv` as the oracle.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The project's Python.
fn python() -> PathBuf {
    let python = std::env::var_os("DETCO_PYTHON")
        .map_or_else(|| root().join(".venv/bin/python"), PathBuf::from);
    assert!(python.exists(), "{} is missing: run `cargo xtask setup`", python.display());
    python
}

/// Runs `tools/oracle/<script>` and returns what it prints. The test fails with the script's own
/// words where it fails.
pub(crate) fn run(script: &str, arguments: &[&dyn AsRef<OsStr>]) -> String {
    let script: OsString = root().join("tools/oracle").join(script).into();
    let output = Command::new(python())
        .arg(&script)
        .args(arguments.iter().map(|argument| argument.as_ref()))
        // torchvision makes this folder, which stays empty, wherever it is told to.
        .env("TORCHINDUCTOR_CACHE_DIR", env!("CARGO_TARGET_TMPDIR"))
        .output()
        .expect("python was found above");
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}: {said}\n{complained}", Path::new(&script).display());
    said.into_owned()
}
