//! `cargo xtask gpu-check DIR`: everything that a machine with a GPU and no Rust needs in order to run
//! `tools/gpu-check/check.py`.
//!
//! Binaries are built here, with a rpath that means nothing there: the script finds the libtorch of
//! that machine's Python. They are stripped, since the folder has to travel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{setup, shell};

/// Tests that use a GPU where there is one: package, `--lib` or `--test`, and the target's name.
const TESTS: &[(&str, &str, &str)] = &[
    ("detco-shards", "--lib", "detco_shards"),
    ("detco-shards", "--test", "nvjpeg"),
    ("detco", "--test", "norm"),
    ("detco", "--test", "gpu"),
];
/// What `check.py` measures with.
const BENCHES: &[(&str, &str)] =
    &[("detco-shards", "device_decode"), ("detco-shards", "device_views"), ("detco", "step")];
/// Everything in Python that travels, from `tools/gpu-check`.
const SCRIPTS: &[&str] = &["check.py", "nvjpeg_alone.py", "pytorch_decode.py", "pytorch_step.py"];
/// Samples that travel: a batch of 256, in some 30 MB of ImageNet.
const SAMPLES: usize = 280;
/// The compressed bundle stays below: machines that are lent take 64 MiB along, the sources among them.
const BYTES_MAX: u64 = 60 << 20;

/// What was asked for.
#[derive(Debug)]
struct Options {
    bundle: PathBuf,
    images: PathBuf,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Options> {
        match arguments {
            [bundle, flag, images] if flag == "--images" => {
                Ok(Options { bundle: bundle.into(), images: images.into() })
            }
            _ => bail!(
                "usage: cargo xtask gpu-check DIR --images IMAGES\n\
                 DIR is made; IMAGES is a folder of JPEGs to measure with"
            ),
        }
    }
}

/// Builds everything and lays it into the folder.
pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<()> {
    let options = Options::parse(arguments)?;
    let bundle = &options.bundle;
    ensure!(!bundle.exists(), "{} exists already", bundle.display());
    let ready = setup::run(root)?;
    for folder in ["bin", "tests", "bench", "lib", "reference"] {
        fs::create_dir_all(bundle.join(folder))
            .with_context(|| format!("making {}", bundle.join(folder).display()))?;
    }
    let built = |words: &str| executables(root, words);
    let programs = built("build --release --package detco --bins")?;
    for program in ["detco", "detco-train"] {
        lay(&programs, program, &bundle.join("bin"))?;
    }
    // Both packages at once: what they share is then built once. Tests are not optimised to the last:
    // they check more so.
    let both = "--package detco --package detco-shards --features detco-shards/nvjpeg";
    let tests = TESTS.iter().map(|(_, kind, name)| match *kind {
        "--lib" => "--lib".to_string(),
        kind => format!("{kind} {name}"),
    });
    let tests = built(&format!("test --no-run {both} {}", tests.collect::<Vec<_>>().join(" ")))?;
    for (_, _, name) in TESTS {
        lay(&tests, name, &bundle.join("tests"))?;
    }
    let benches = BENCHES.iter().map(|(_, name)| format!("--bench {name}"));
    let benches =
        built(&format!("bench --no-run {both} {}", benches.collect::<Vec<_>>().join(" ")))?;
    for (_, name) in BENCHES {
        lay(&benches, name, &bundle.join("bench"))?;
    }
    let nvjpeg = find_nvjpeg(&ready.libtorch)?;
    copy(&nvjpeg, &bundle.join("lib").join("libnvjpeg.so.13"))?;
    for script in SCRIPTS {
        copy(&root.join("tools/gpu-check").join(script), &bundle.join(script))?;
    }
    let reference = root.join("tools/reference");
    for script in ["detco_reference.py", "tensors.py"] {
        copy(&reference.join(script), &bundle.join("reference").join(script))?;
    }
    shards(&options, bundle)?;
    let (name, archive) = (bundle.display(), archive(bundle)?);
    eprintln!("\nOn the machine with the GPU, with the folder or the archive:");
    eprintln!("  python3 {name}/check.py {name} RESULTS");
    eprintln!("  tar -xJf {archive} ./check.py && python3 check.py {archive} RESULTS");
    Ok(())
}

/// Compresses the folder beside itself, and sees that the result can travel.
fn archive(bundle: &Path) -> Result<String> {
    let mut archive = bundle.as_os_str().to_owned();
    archive.push(".tar.xz");
    let archive = PathBuf::from(archive);
    let mut tar = Command::new("tar");
    tar.arg("-cJf").arg(&archive).arg("-C").arg(bundle).arg(".");
    shell::step(&mut tar)?;
    let bytes = fs::metadata(&archive)?.len();
    eprintln!("{}: {:.1} MiB", archive.display(), bytes as f64 / f64::from(1 << 20));
    ensure!(bytes <= BYTES_MAX, "more than {} MiB: too much to carry", BYTES_MAX >> 20);
    Ok(archive.display().to_string())
}

/// Runs cargo and returns the executables that it names, with their targets' names.
fn executables(root: &Path, words: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut command = shell::cargo(root);
    command.args(words.split(' ')).arg("--message-format=json-render-diagnostics");
    eprintln!("\n$ {}", shell::line(&command));
    let output =
        command.stderr(std::process::Stdio::inherit()).output().context("starting cargo")?;
    ensure!(output.status.success(), "cargo failed ({})", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let found = messages.filter_map(|message| {
        let name = message["target"]["name"].as_str()?.to_string();
        Some((name, PathBuf::from(message["executable"].as_str()?)))
    });
    Ok(found.collect())
}

/// Copies the executable of a target and strips the copy.
fn lay(executables: &[(String, PathBuf)], name: &str, folder: &Path) -> Result<()> {
    let found = executables.iter().find(|(target, _)| target == name);
    let (_, program) = found.with_context(|| format!("cargo named no executable of {name}"))?;
    let to = folder.join(name);
    copy(program, &to)?;
    shell::output(Command::new("strip").arg(&to)).map(drop)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    Ok(())
}

/// The library of the wheel `nvidia-nvjpeg`, which lies beside torch's.
fn find_nvjpeg(libtorch: &Path) -> Result<PathBuf> {
    let packages = libtorch.canonicalize()?;
    let packages = packages.parent().context("libtorch lies in no folder of packages")?;
    let library = packages.join("nvidia/cu13/lib/libnvjpeg.so.13");
    ensure!(library.is_file(), "{} is missing: `cargo xtask setup` brings it", library.display());
    Ok(library)
}

/// Packs images into shards. `check.py` takes them out again for the tests that want files.
fn shards(options: &Options, bundle: &Path) -> Result<()> {
    let mut jpegs = Vec::new();
    collect(&options.images, &mut jpegs)?;
    jpegs.sort();
    ensure!(!jpegs.is_empty(), "{}: no JPEG", options.images.display());
    let every = jpegs.len().div_ceil(SAMPLES);
    let folder = bundle.join("images");
    fs::create_dir_all(&folder)?;
    for (number, jpeg) in jpegs.iter().step_by(every).enumerate() {
        copy(jpeg, &folder.join(format!("{number:06}.jpg")))?;
    }
    let mut pack = Command::new(bundle.join("bin/detco"));
    shell::step(pack.arg("pack").arg(&folder).arg(bundle.join("shards")))?;
    fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))
}

fn collect(folder: &Path, jpegs: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, jpegs)?;
        } else if path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("jpg") || e.eq_ignore_ascii_case("jpeg"))
        {
            jpegs.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_bundled_exists() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let of = |package: &str| root.join(if package == "detco" { "" } else { "shards" });
        for (package, kind, name) in TESTS {
            let file = of(package).join("tests").join(format!("{name}.rs"));
            assert!(*kind == "--lib" || file.is_file(), "{}", file.display());
        }
        for (package, name) in BENCHES {
            let file = of(package).join("benches").join(format!("{name}.rs"));
            assert!(file.is_file(), "{}", file.display());
        }
        let scripts = fs::read_dir(root.join("tools/gpu-check")).unwrap();
        let scripts = scripts.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut scripts: Vec<String> = scripts.filter(|name| name.ends_with(".py")).collect();
        scripts.sort();
        assert_eq!(scripts, SCRIPTS);
        let check = fs::read_to_string(root.join("tools/gpu-check/check.py")).unwrap();
        for (_, _, name) in TESTS {
            assert!(
                check.contains(&format!("\n    \"{name}\": [")),
                "check.py runs nothing of {name}"
            );
        }
    }
}
