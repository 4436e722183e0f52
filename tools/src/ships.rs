//! What ships beside the workspace's default build: features that are off by default, the fuzz
//! targets and the floor of `cargo xtask peers`, which are workspaces of their own, and the licences
//! and sources of all dependencies.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::shell;

/// Workspaces of their own, with their lockfiles. The fuzz targets are built with the compiler that is
/// there, for their code alone: fuzzing itself needs `cargo fuzz` and a nightly one's sanitizers.
const OTHERS: [&str; 3] =
    ["shards/fuzz/Cargo.toml", "tools/fuzz/Cargo.toml", "tools/peers/floor/Cargo.toml"];

/// Licences that a dependency may have, at least one of those that it offers: all ask for no more
/// than their text beside the program.
const LICENCES: [&str; 11] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "IJG",
    "ISC",
    "MIT",
    "NCSA",
    "Unicode-3.0",
    "Zlib",
];

/// Lints each package with all its features, and with none.
pub(crate) fn features(root: &Path) -> Result<()> {
    let clippy = |words: &str| {
        let words = format!("clippy {words} -- -D warnings");
        shell::step(shell::cargo(root).args(words.split(' ')))
    };
    // The default features of `detco` are all that it has.
    clippy("--workspace --all-targets --all-features")?;
    clippy("--package detco --package detco-shards --all-targets --no-default-features")
}

/// Builds what lies outside of the workspace.
pub(crate) fn others(root: &Path) -> Result<()> {
    for manifest in OTHERS {
        let target = root.join("target/others");
        let mut build = shell::cargo(root);
        build.args(["check", "--locked", "--manifest-path", manifest, "--target-dir"]).arg(target);
        shell::step(&mut build)?;
    }
    Ok(())
}

/// Holds licences and sources of all dependencies, of each workspace, against what is allowed here.
/// That takes no tool beside cargo. Whether a version has a known fault is not asked: the list of
/// those (RustSec's) is a repository of its own, which a machine of this check may not reach;
/// `cargo deny check advisories` asks it where it can.
pub(crate) fn dependencies(root: &Path) -> Result<()> {
    let (mut findings, mut sources) = (BTreeSet::new(), BTreeSet::new());
    for manifest in ["Cargo.toml"].into_iter().chain(OTHERS) {
        let words = "metadata --format-version 1 --locked --all-features \
                     --filter-platform x86_64-unknown-linux-gnu --manifest-path";
        let text = shell::output(shell::cargo(root).args(words.split(' ')).arg(manifest))
            .with_context(|| {
                format!(
                    "where a lockfile is to be updated, `cargo metadata --manifest-path \
                     {manifest}` does it"
                )
            })?;
        let metadata: Value = serde_json::from_str(&text).context("reading cargo's metadata")?;
        let packages = metadata["packages"].as_array().context("cargo's metadata: no packages")?;
        ensure!(packages.len() > 10, "{manifest}: {} packages", packages.len());
        findings.extend(packages.iter().filter_map(finding));
        let places = packages.iter().filter_map(|package| package["source"].as_str());
        sources.extend(places.map(String::from));
    }
    // No second registry either.
    ensure!(sources.len() == 1, "dependencies come from several places: {sources:?}");
    let findings: Vec<_> = findings.into_iter().collect();
    ensure!(findings.is_empty(), "dependencies:\n  {}", findings.join("\n  "));
    eprintln!("dependencies: licences and sources are allowed ones");
    Ok(())
}

/// What is wrong with a package; ours, which have no source, are not asked.
fn finding(package: &Value) -> Option<String> {
    let source = package["source"].as_str()?;
    let name = format!("{} {}", package["name"].as_str()?, package["version"].as_str()?);
    if !source.starts_with("registry+") {
        return Some(format!("{name}: comes from {source}"));
    }
    match package["license"].as_str() {
        Some(licence) if allowed(licence) => None,
        Some(licence) => Some(format!("{name}: its licence is {licence}")),
        None => Some(format!("{name}: names no licence")),
    }
}

/// Whether an SPDX expression can be met: of alternatives one, of a list all. `/` is an old `OR`.
fn allowed(licence: &str) -> bool {
    let text = licence.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = text.split_whitespace().peekable();
    any_of(&mut words) && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any_of(words: &mut Words<'_>) -> bool {
    let mut met = all_of(words);
    while words.next_if_eq(&"OR").is_some() {
        // Read in any case, so that what follows is understood.
        met |= all_of(words);
    }
    met
}

fn all_of(words: &mut Words<'_>) -> bool {
    let mut met = one(words);
    while words.next_if_eq(&"AND").is_some() {
        met &= one(words);
    }
    met
}

fn one(words: &mut Words<'_>) -> bool {
    match words.next() {
        Some("(") => {
            let met = any_of(words);
            words.next() == Some(")") && met
        }
        Some(name) if words.next_if_eq(&"WITH").is_some() => {
            let exception = words.next().unwrap_or_default();
            LICENCES.contains(&format!("{name} WITH {exception}").as_str())
        }
        Some(name) => LICENCES.contains(&name),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expression_is_met_by_one_of_its_alternatives() {
        for licence in [
            "MIT",
            "MIT OR Apache-2.0",
            "MIT/Apache-2.0",
            "GPL-3.0 OR MIT",
            "Apache-2.0 WITH LLVM-exception",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "(MIT OR GPL-3.0) AND ISC",
            "Apache-2.0 AND ISC",
        ] {
            assert!(allowed(licence), "{licence}");
        }
        for licence in [
            "",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(GPL-3.0 OR AGPL-3.0) AND MIT",
            "(MIT OR Apache-2.0) AND GPL-3.0",
            "SSPL-1.0",
            "(MIT",
            "MIT)",
            "MIT WITH GPL",
        ] {
            assert!(!allowed(licence), "{licence}");
        }
    }

    #[test]
    fn a_package_is_named_with_what_is_wrong() {
        let package = |source: Value, licence: Value| serde_json::json!({"name": "a", "version": "1.0.0", "source": source, "license": licence});
        assert_eq!(finding(&package(Value::Null, Value::Null)), None);
        let registry = "registry+https://example.org/index";
        assert_eq!(finding(&package(registry.into(), "MIT".into())), None);
        let wrong = finding(&package(registry.into(), "GPL-3.0".into())).unwrap();
        assert_eq!(wrong, "a 1.0.0: its licence is GPL-3.0");
        let wrong = finding(&package(registry.into(), Value::Null)).unwrap();
        assert_eq!(wrong, "a 1.0.0: names no licence");
        let wrong = finding(&package("git+https://example.org/a".into(), "MIT".into())).unwrap();
        assert!(wrong.contains("comes from git+https://example.org/a"), "{wrong}");
    }
}
