//! What the oracle tests share: generated images and the Python that checks them.

pub(crate) mod images;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

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
        // torchvision makes this folder, which stays empty, wherever it is told to.
        .env("TORCHINDUCTOR_CACHE_DIR", env!("CARGO_TARGET_TMPDIR"))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script} failed: {errors}\nrun `cargo xtask setup`");
    String::from_utf8(output.stdout).unwrap()
}
