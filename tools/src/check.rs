//! `cargo xtask check`: everything but the tests that must hold before a commit. `.ci/run` runs it after
//! them.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};

use crate::{layers, setup, shell, ships, tidy};

/// Everything but the tests: format, our own rules, dependencies, lints of all features and of none,
/// documentation, benches as tests, and what lies outside of the workspace.
pub(crate) fn check(root: &Path) -> Result<()> {
    let started = Instant::now();
    ready(root)?;
    let run = |words: &str| shell::step(shell::cargo(root).args(words.split(' ')));
    run("fmt --all --check")?;
    let findings = tidy::findings(root)?;
    ensure!(findings.is_empty(), "tidy:\n  {}", findings.join("\n  "));
    let findings = layers::findings(root)?;
    ensure!(findings.is_empty(), "layers:\n  {}", findings.join("\n  "));
    no_libtorch_without_train(root)?;
    ships::dependencies(root)?;
    ships::features(root)?;
    let mut docs = shell::cargo(root);
    docs.env("RUSTDOCFLAGS", "-D warnings");
    shell::step(docs.args(["doc", "--workspace", "--no-deps", "--document-private-items"]))?;
    // In the tests' profile: what is asked here is whether they run, and that build exists already.
    run("test --workspace --benches")?;
    ships::others(root)?;
    eprintln!("\ncheck: all passed in {}", shell::duration(started.elapsed()));
    Ok(())
}

pub(crate) fn ready(root: &Path) -> Result<()> {
    let ready = setup::run(root)?;
    eprintln!("set-up: libtorch {} in {}", ready.version, ready.libtorch.display());
    Ok(())
}

/// Without the feature `train`, `detco` must build on machines that have no libtorch.
fn no_libtorch_without_train(root: &Path) -> Result<()> {
    let arguments = "tree --package detco --no-default-features --edges normal,build --prefix none";
    let tree = shell::output(shell::cargo(root).args(arguments.split(' ')))?;
    let torch =
        tree.lines().find(|line| line.starts_with("tch ") || line.starts_with("torch-sys "));
    ensure!(
        torch.is_none(),
        "detco depends on {} without its feature `train`",
        torch.unwrap_or("")
    );
    Ok(())
}
