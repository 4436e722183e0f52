//! Layers: a module names only modules above it.
//!
//! `tools/layers.txt` lists each crate's modules from top to bottom. A file belongs to the longest entry that its
//! path begins with, and so does what it names behind `crate::`. Tests may name anything.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Where the table stands.
const TABLE: &str = "tools/layers.txt";

/// Files that put a crate together, and see everything.
const ROOTS: [&str; 3] = ["lib", "main", "trainer"];

/// The modules of one crate, from top to bottom.
#[derive(Debug)]
struct Layers {
    /// Its sources: `src`, `shards/src`.
    folder: String,
    /// Module paths, with those below that each may name nevertheless.
    modules: Vec<(String, Vec<String>)>,
}

/// Every module that names one below it, or stands in no line, as `file: what`.
pub(crate) fn findings(root: &Path) -> Result<Vec<String>> {
    let table = fs::read_to_string(root.join(TABLE)).with_context(|| format!("reading {TABLE}"))?;
    let mut findings = Vec::new();
    for layers in parse(&table)? {
        let folder = root.join(&layers.folder);
        each_file(&folder, &mut |path, text| {
            let name = path.strip_prefix(&folder).unwrap_or(path).with_extension("");
            let name = name.to_string_lossy().replace('/', "::");
            let module = name.strip_suffix("::mod").unwrap_or(&name);
            // Tests in a file of their own see everything, as those at the end of a file do.
            let is_tests = module.ends_with("::tests");
            if !ROOTS.contains(&module) && !is_tests {
                let file = path.strip_prefix(root).unwrap_or(path).display();
                let found = layers.of_module(module, text).into_iter();
                findings.extend(found.map(|what| format!("{file}: {what}")));
            }
        })?;
    }
    Ok(findings)
}

fn each_file(folder: &Path, visit: &mut impl FnMut(&Path, &str)) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            each_file(&path, visit)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path);
            visit(&path, &text.with_context(|| format!("reading {}", path.display()))?);
        }
    }
    Ok(())
}

/// Reads the table: a folder in brackets, then a module a line, perhaps with what it may name of those below it.
fn parse(text: &str) -> Result<Vec<Layers>> {
    let mut all: Vec<Layers> = Vec::new();
    for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
        if let Some(folder) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            all.push(Layers { folder: folder.to_owned(), modules: Vec::new() });
        } else if !line.is_empty() {
            let (module, below) = line.split_once(" may name ").unwrap_or((line, ""));
            let below = below.split_whitespace().map(str::to_owned).collect();
            let Some(layers) = all.last_mut() else {
                bail!("{TABLE}: {line:?} stands behind no folder, such as [src]");
            };
            layers.modules.push((module.trim().to_owned(), below));
        }
    }
    Ok(all)
}

impl Layers {
    /// Place of the longest entry that a path begins with.
    fn place(&self, path: &str) -> Option<usize> {
        let begins = |entry: &str| {
            path.strip_prefix(entry).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        };
        let all = self.modules.iter().enumerate().filter(|(_, (entry, _))| begins(entry));
        all.max_by_key(|(_, (entry, _))| entry.len()).map(|(place, _)| place)
    }

    /// What a module names that it should not.
    fn of_module(&self, module: &str, text: &str) -> Vec<String> {
        let Some(own) = self.place(module) else {
            return vec![format!("the module {module} stands in no line of {TABLE}")];
        };
        let mut found = Vec::new();
        for path in named(text) {
            match self.place(&path) {
                None => found.push(format!("names {path}, which stands in no line of {TABLE}")),
                Some(place)
                    if place > own && !self.modules[own].1.contains(&self.modules[place].0) =>
                {
                    let (module, below) = (&self.modules[own].0, &self.modules[place].0);
                    found.push(format!("names {path}: {below} lies below {module} in {TABLE}"));
                }
                Some(_) => {}
            }
        }
        found
    }
}

/// Where a file's tests begin: not where a file of tests is declared.
fn tests(text: &str) -> Option<usize> {
    let marks = text.match_indices("\n#[cfg(test)]").chain(text.match_indices("\n#[cfg(all(test"));
    let is_declared = |at: usize| {
        let item = text[at + 1..].lines().nth(1).unwrap_or_default();
        item.starts_with("mod ") && item.ends_with(';')
    };
    marks.map(|(at, _)| at).filter(|at| !is_declared(*at)).min()
}

/// Paths behind `crate::`, without comments and tests.
fn named(text: &str) -> BTreeSet<String> {
    let code = &text[..tests(text).unwrap_or(text.len())];
    let code: String = code
        .lines()
        .map(|line| format!("{}\n", line.split("//").next().unwrap_or_default()))
        .collect();
    let mut found = BTreeSet::new();
    for (at, word) in code.match_indices("crate::") {
        if !code[..at].ends_with(|c: char| c.is_alphanumeric() || "_$".contains(c)) {
            tree("", &code[at + word.len()..], &mut found);
        }
    }
    found
}

/// Adds the paths of a tree of names, such as `a::{b, c::d as e}`; returns what follows it.
fn tree<'a>(prefix: &str, mut text: &'a str, found: &mut BTreeSet<String>) -> &'a str {
    let mut path = prefix.to_owned();
    loop {
        text = text.trim_start();
        if let Some(mut inside) = text.strip_prefix('{') {
            loop {
                inside = tree(&path, inside, found).trim_start();
                match inside.strip_prefix(',') {
                    Some(rest) => inside = rest,
                    None => return inside.strip_prefix('}').unwrap_or(inside),
                }
            }
        }
        let (name, rest) = word(text);
        if name.is_empty() {
            return text; // behind a last comma
        }
        if name != "self" {
            path = if path.is_empty() { name.to_owned() } else { format!("{path}::{name}") };
        }
        text = match rest.strip_prefix("::") {
            Some(rest) => rest,
            None => {
                found.insert(path);
                let renamed =
                    rest.trim_start().strip_prefix("as ").map(|rest| word(rest.trim_start()).1);
                return renamed.unwrap_or(rest);
            }
        };
    }
}

/// A name, and what follows it.
fn word(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_behind_crate_are_found_and_others_are_not() {
        let text = "use crate::a::{self, b::C, d::{E, F as G},};\n\
                    #[cfg(test)]\nmod tests;\nuse crate::h as i;\n\
                    fn f() { crate::j::k() } // crate::comment\nlet x = $crate::macro_;\n\
                    #[cfg(test)]\nmod tests { use crate::z; }\n";
        let found: Vec<String> = named(text).into_iter().collect();
        assert_eq!(found, ["a", "a::b::C", "a::d::E", "a::d::F", "h", "j::k"]);
    }

    #[test]
    fn a_module_below_is_named_with_the_line_it_stands_in() {
        let table = "[src]\ntop may name low # why\nmid\nmid::deep\nlow\n";
        let layers = parse(table).unwrap().remove(0);
        let of = |module: &str, text: &str| layers.of_module(module, text);
        assert_eq!(of("top", "use crate::low::X;"), [""; 0]);
        assert_eq!(of("low", "use crate::{top, mid::deep::Y};"), [""; 0]);
        assert_eq!(of("mid::deep::file", "use crate::mid::X;"), [""; 0]);
        let said = of("mid", "use crate::mid::deep::Y;");
        assert_eq!(said, ["names mid::deep::Y: mid::deep lies below mid in tools/layers.txt"]);
        assert!(of("other", "")[0].contains("stands in no line"));
        assert!(of("low", "use crate::other;")[0].contains("names other, which stands in no line"));
        assert!(parse("top\n").is_err());
    }

    #[test]
    fn this_repository_keeps_its_layers() {
        assert_eq!(findings(&crate::shell::root()).unwrap(), [""; 0]);
    }
}
