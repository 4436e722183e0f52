//! The rules of this repository that no other tool checks: how a Rust file opens, words that must
//! not be left behind, README's length, and numbers that are stated in two files.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::setup;

/// Folders that hold no source of ours.
const SKIPPED: [&str; 3] = ["target", "__pycache__", "corpus"];
/// Hidden folders that do.
const HIDDEN: [&str; 2] = [".cargo", ".ci"];
/// What is read as text.
const TEXT: [&str; 9] = ["rs", "toml", "md", "py", "sh", "cpp", "h", "json", "txt"];
/// Lines of README.md; what needs more room is a guide.
const README_LINES: usize = 150;
/// Each release of tch is written for one libtorch; its README names it.
const TCH_FOR: [(&str, &str); 1] = [("=0.24.0", "2.11.0")];

/// Every broken rule, as `file:line: what`.
pub(crate) fn findings(root: &Path) -> Result<Vec<String>> {
    let mut findings = Vec::new();
    walk(root, root, &mut |name, text| findings.extend(of_file(name, text)))?;
    findings.extend(versions(&|name| {
        fs::read_to_string(root.join(name)).with_context(|| format!("reading {name}"))
    })?);
    findings.sort();
    Ok(findings)
}

fn walk(root: &Path, folder: &Path, visit: &mut impl FnMut(&str, &str)) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let (name, kind, path) = (entry.file_name(), entry.file_type()?, entry.path());
        let name = name.to_string_lossy();
        let hidden = name.starts_with('.') && !HIDDEN.contains(&name.as_ref());
        // Cargo marks its build folders so, whatever their names.
        let built = path.join("CACHEDIR.TAG").exists();
        if kind.is_dir() && !hidden && !built && !SKIPPED.contains(&name.as_ref()) {
            walk(root, &path, visit)?;
        }
        let text = path.extension().is_some_and(|e| TEXT.iter().any(|known| e == *known));
        if kind.is_file() && (text || path.ends_with(".ci/run")) {
            let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy();
            visit(&name, &String::from_utf8_lossy(&text));
        }
    }
    Ok(())
}

/// The rules that one file can break by itself.
fn of_file(name: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let rust = name.ends_with(".rs");
    if rust && !text.starts_with("//!") {
        findings.push(format!("{name}:1: a Rust file opens with `//!`: what it is for"));
    }
    let lines = text.lines().count();
    if name == "README.md" && lines > README_LINES {
        findings.push(format!(
            "{name}:{}: {lines} lines, at most {README_LINES}: src/guide has room for more",
            README_LINES + 1
        ));
    }
    // Put together here, so that this file does not break its own rules.
    let unfinished = [["TO", "DO"].concat(), ["FIX", "ME"].concat()];
    let machine = ["home", "root", "Users", "work"].map(|folder| format!("/{folder}/"));
    let ignored = ["#[", "ignore"].concat();
    let needs = [&ignored, " = \"needs "].concat();
    for (number, line) in text.lines().enumerate() {
        let mut finding = |what: &str| findings.push(format!("{name}:{}: {what}", number + 1));
        if unfinished.iter().any(|word| has_word(line, word)) {
            finding("an unfinished thing is an issue, or nothing");
        }
        if machine.iter().any(|path| starts_a_path(line, path)) {
            finding("a path of somebody's machine");
        }
        if rust && line.contains(&ignored) && !line.contains(&needs) {
            finding(
                "an ignored test says what it needs, and `cargo xtask test` runs it where that is",
            );
        }
    }
    findings
}

fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back().is_some_and(part);
        let after = line[at + word.len()..].chars().next().is_some_and(part);
        !before && !after
    })
}

/// Whether `path` occurs as the beginning of an absolute path, not inside a longer one.
fn starts_a_path(line: &str, path: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || "_-.}>*~/".contains(c);
    line.match_indices(path).any(|(at, _)| !line[..at].chars().next_back().is_some_and(inside))
}

/// Numbers that two files state must agree.
fn versions(read: &dyn Fn(&str) -> Result<String>) -> Result<Vec<String>> {
    let manifest = read("Cargo.toml")?;
    let value = |key: &str| -> Result<String> {
        let line = manifest.lines().find(|line| line.split('=').next().map(str::trim) == Some(key));
        let value = line.and_then(|line| line.split('"').nth(1));
        value.map(str::to_string).with_context(|| format!("Cargo.toml states no {key}"))
    };
    let (version, rust, tch) = (value("version")?, value("rust-version")?, value("tch")?);
    let torch = setup::pin("torch");
    let (readme, changelog) = (read("README.md")?, read("CHANGELOG.md")?);
    let mut findings = Vec::new();
    let mut demand = |holds: bool, finding: String| {
        if !holds {
            findings.push(finding);
        }
    };
    demand(
        TCH_FOR.contains(&(tch.as_str(), torch)),
        format!(
            "Cargo.toml: tch {tch} is not known to be for torch {torch} of tools/requirements.txt"
        ),
    );
    demand(
        readme.contains(&format!("Rust {rust}")),
        format!("README.md: does not say `Rust {rust}`, the rust-version of Cargo.toml"),
    );
    demand(
        readme.contains(&format!("libtorch {torch}")),
        format!(
            "README.md: does not say `libtorch {torch}`, the version of tools/requirements.txt"
        ),
    );
    demand(
        changelog.contains(&format!("## {version}")),
        format!("CHANGELOG.md: has no section `## {version}`, the version of Cargo.toml"),
    );
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_found_broken_with_file_and_line() {
        let unfinished = ["// TO", "DO: later"].concat();
        let path = ["let x = \"/ho", "me/me/data\";"].concat();
        let ignored = ["#[ig", "nore]"].concat();
        let text = format!("use a;\n{unfinished}\n{path}\n{ignored}\n");
        let found = of_file("a.rs", &text);
        let lines: Vec<&str> = found.iter().map(|f| f.split(": ").next().unwrap()).collect();
        assert_eq!(lines, ["a.rs:1", "a.rs:2", "a.rs:3", "a.rs:4"]);
    }

    #[test]
    fn a_long_readme_is_found_and_another_is_not() {
        let text = "a line\n".repeat(README_LINES + 1);
        let found = of_file("README.md", &text);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("README.md:151: 151 lines"), "{found:?}");
        assert_eq!(of_file("README.md", &text["a line\n".len()..]), [""; 0]);
        assert_eq!(of_file("shards/README.md", &text), [""; 0]);
    }

    #[test]
    fn words_and_paths_that_only_look_alike_pass() {
        let method = ["TO", "DOS and AU", "TO", "DO_x"].concat();
        let relative = ["see ../wo", "rk/a, $HOME/wo", "rk/ and https://host/ro", "ot/"].concat();
        assert_eq!(of_file("a.md", &format!("{method}\n{relative}\n")), [""; 0]);
    }

    #[test]
    fn numbers_in_two_files_are_compared() {
        let torch = setup::pin("torch");
        let manifest =
            "version = \"0.1.0\"\nrust-version = \"1.89\"\ntch = { version = \"=0.24.0\" }\n";
        let good = |name: &str| match name {
            "Cargo.toml" => Ok(manifest.to_string()),
            "README.md" => Ok(format!("Rust 1.89 and libtorch {torch}")),
            _ => Ok("## 0.1.0".to_string()),
        };
        assert_eq!(versions(&good).unwrap(), [""; 0]);
        let bad = |name: &str| match name {
            "Cargo.toml" => Ok(manifest.replace("0.24.0", "0.25.0")),
            _ => Ok(String::new()),
        };
        assert_eq!(versions(&bad).unwrap().len(), 4);
    }

    #[test]
    fn this_repository_keeps_its_rules() {
        assert_eq!(findings(&crate::shell::root()).unwrap(), [""; 0]);
    }
}
