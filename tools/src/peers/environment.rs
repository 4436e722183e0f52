//! The peers' own environment: `.peers/venv`, and what is installed in it, peer by peer.
//!
//! A peer that does not install or import is a reason in words, never an error: the others run.
//! What is installed and imports is noted in `.peers/installed/`, with the pins it was installed by.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{setup, shell};

const PINS: [&str; 2] =
    [include_str!("../../requirements.txt"), include_str!("../../peers/requirements.txt")];
/// Relative to the root; the order of [`PINS`].
const PIN_FILES: [&str; 2] = ["tools/requirements.txt", "tools/peers/requirements.txt"];

/// A loader that others use.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) name: &'static str,
    /// How it does the tasks, for the record.
    pub(crate) how: &'static str,
    wheels: &'static [&'static str],
    /// Built here from its sources, after the wheels; needs `libraries`.
    source: Option<&'static str>,
    /// Libraries of the system, as `pkg-config` knows them, without which it is not tried.
    libraries: &'static [&'static str],
    /// What to install when it fails.
    hint: &'static str,
}

/// Every peer there is.
pub(crate) const PEERS: [Peer; 7] = [
    Peer {
        name: "torchvision-pil",
        how: "torchvision's first transforms on Pillow images in a torch DataLoader; Pillow's blur",
        wheels: &["torch", "torchvision", "pillow", "numpy"],
        source: None,
        libraries: &[],
        hint: "",
    },
    Peer {
        name: "torchvision-v2",
        how: "torchvision's v2 transforms on u8 tensors in a torch DataLoader; decode_jpeg",
        wheels: &["torch", "torchvision", "numpy"],
        source: None,
        libraries: &[],
        hint: "",
    },
    Peer {
        name: "webdataset",
        how: "webdataset reads the shards, then as torchvision-pil",
        wheels: &["webdataset", "torch", "torchvision", "pillow", "numpy"],
        source: None,
        libraries: &[],
        hint: "",
    },
    Peer {
        name: "albumentations",
        how: "albumentations on OpenCV arrays in a torch DataLoader; cv2.imread, INTER_AREA",
        wheels: &["albumentations", "opencv-python-headless", "torch", "numpy"],
        source: None,
        libraries: &[],
        hint: "",
    },
    Peer {
        name: "dali",
        how: "DALI's CPU operators, reading the shards by their indexes; antialiased resize, colour \
              in one linear step, patches not shuffled",
        wheels: &["nvidia-dali-cuda130", "numpy"],
        source: None,
        libraries: &[],
        hint: "",
    },
    Peer {
        name: "ffcv",
        how: "FFCV on its own file with the same JPEG bytes; INTER_AREA. T1 and T3 are operations \
              written for this comparison in numba, since FFCV has no hue, gray, blur nor several \
              views a decode; their colour is one linear step",
        wheels: &[
            "torch",
            "numpy",
            "numba",
            "opencv-python-headless",
            "pillow",
            "assertpy",
            "fastargs",
            "psutil",
            "pytorch-pfn-extras",
            "setuptools",
            "terminaltables",
            "tqdm",
            "wheel",
        ],
        source: Some("ffcv"),
        libraries: &["opencv4", "libturbojpeg"],
        hint: "it is built from its sources and needs a C++ compiler, pkg-config, OpenCV and \
               libturbojpeg; on Debian: apt-get install g++ pkg-config libopencv-dev \
               libturbojpeg0-dev",
    },
    Peer {
        name: "spdl",
        how: "SPDL's threads; FFmpeg decodes, T2 in its filter graph, T3 by torchvision v2",
        wheels: &["spdl-io", "spdl-core", "torch", "torchvision", "numpy"],
        source: None,
        libraries: &[],
        hint: "it needs FFmpeg's shared libraries; on Debian 12: apt-get install libavfilter8 \
               libavdevice59",
    },
];

/// `.peers`, with its `venv`.
#[derive(Debug)]
pub(crate) struct Environment<'a> {
    root: &'a Path,
    folder: PathBuf,
}

impl<'a> Environment<'a> {
    /// Where it lies; makes nothing.
    pub(crate) fn of(root: &'a Path) -> Environment<'a> {
        Environment { root, folder: root.join(".peers") }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The versions of an installed peer's packages, as its check printed them.
    pub(crate) fn installed(&self, peer: &Peer) -> Option<String> {
        let text = fs::read_to_string(self.note(peer)).ok()?;
        text.strip_prefix(&stamp()).map(|versions| versions.trim().to_string())
    }

    /// Makes the environment if there is none.
    pub(crate) fn make(&self) -> Result<()> {
        ensure!(std::env::consts::OS == "linux", "the peers' wheels are for Linux");
        let (venv, made) = (self.folder.join("venv"), self.folder.join("venv-made.txt"));
        if made.exists() && self.program("python").exists() {
            return Ok(());
        }
        for folder in [&venv, &self.folder.join("installed")] {
            if folder.exists() {
                fs::remove_dir_all(folder)
                    .with_context(|| format!("removing {}", folder.display()))?;
            }
        }
        fs::create_dir_all(self.folder.join("log"))?;
        setup::make_venv(&venv, &setup::base_python()?)?;
        fs::write(&made, "whole\n").with_context(|| format!("writing {}", made.display()))
    }

    /// A program of the environment.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.folder.join("venv/bin").join(name)
    }

    /// The environment's interpreter, kept from looking into others.
    pub(crate) fn python(&self) -> Command {
        let mut python = setup::python(&self.program("python"));
        python.env("NO_ALBUMENTATIONS_UPDATE", "1"); // it would ask the network
        python
    }

    /// A file that keeps what a program said.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.folder.join("log").join(format!("{name}.txt"))
    }

    /// Installs a peer and imports it.
    ///
    /// # Errors
    /// Says why it cannot be had here.
    pub(crate) fn install(&self, peer: &Peer) -> Result<()> {
        if self.installed(peer).is_some() {
            return Ok(());
        }
        let versions = self.try_install(peer).map_err(|error| match peer.hint {
            "" => error,
            hint => error.context(hint),
        })?;
        let note = self.note(peer);
        fs::create_dir_all(self.folder.join("installed"))?;
        fs::write(&note, stamp() + versions.trim())
            .with_context(|| format!("writing {}", note.display()))
    }

    fn try_install(&self, peer: &Peer) -> Result<String> {
        for library in peer.libraries {
            shell::output(Command::new("pkg-config").args(["--exists", "--print-errors", library]))
                .with_context(|| format!("{library} is not installed"))?;
        }
        eprintln!("peers: installing {}", peer.name);
        self.pip(peer.name, peer.wheels, &[])?;
        if let Some(source) = peer.source {
            // Its dependencies are in: it names an OpenCV that needs a screen's libraries.
            self.pip(peer.name, &[source], &["--no-deps", "--no-build-isolation"])?;
        }
        let mut check = self.python();
        check.arg(self.root.join("tools/peers/measure.py")).args([peer.name, "--check"]);
        self.said(check, &format!("check-{}", peer.name))
    }

    /// cmake, for those who build libjpeg-turbo.
    pub(crate) fn cmake(&self) -> Result<()> {
        match self.program("cmake").exists() {
            true => Ok(()),
            false => self.pip("cmake", &["cmake"], &[]),
        }
    }

    fn pip(&self, name: &str, packages: &[&str], options: &[&str]) -> Result<()> {
        // Wheels of gigabytes pass through the temporary folder: beside their destination is room.
        let scratch = self.folder.join("tmp");
        fs::create_dir_all(&scratch)?;
        let mut pip = self.python();
        pip.args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input"])
            .args(["--progress-bar", "off"])
            .args(options)
            .env("TMPDIR", &scratch);
        for file in PIN_FILES {
            pip.arg("--constraint").arg(self.root.join(file));
        }
        pip.args(packages);
        let done = self.said(pip, &format!("pip-{name}"));
        fs::remove_dir_all(&scratch)?;
        done.map(drop)
    }

    /// Runs a program and returns its standard output; both outputs stay in the log.
    fn said(&self, mut command: Command, name: &str) -> Result<String> {
        let log = self.log(name);
        let to_log = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let output = command.stderr(to_log).output().context("starting it")?;
        let (said, errors) = (String::from_utf8_lossy(&output.stdout), fs::read_to_string(&log)?);
        fs::write(&log, format!("{said}{errors}"))?;
        ensure!(output.status.success(), "{} (all of it: {})", reason(&errors), log.display());
        Ok(said.into_owned())
    }

    fn note(&self, peer: &Peer) -> PathBuf {
        self.folder.join("installed").join(format!("{}.txt", peer.name))
    }
}

/// The pins that a note was written under.
fn stamp() -> String {
    PINS.concat() + "\n"
}

/// What a program's last words say went wrong: the last line that names an error, else the last line.
pub(crate) fn reason(errors: &str) -> String {
    let lines = || errors.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let named = lines().find(|line| line.to_lowercase().contains("error"));
    let mut reason = named.or_else(|| lines().next()).unwrap_or("it said nothing").to_string();
    if let Some((end, _)) = reason.char_indices().nth(300) {
        reason.truncate(end);
        reason.push('…');
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_the_last_line_that_names_an_error() {
        let text = "Traceback\n  File x\nImportError: libavutil.so: not found\n\n[notice] bye\n";
        assert_eq!(reason(text), "ImportError: libavutil.so: not found");
        assert_eq!(reason("one\ntwo\n"), "two");
        assert_eq!(reason(""), "it said nothing");
        assert_eq!(reason(&"é".repeat(400)).chars().count(), 301);
    }

    #[test]
    fn everything_a_peer_is_made_of_has_one_pin_at_most() {
        let pinned: Vec<&str> = PINS
            .iter()
            .flat_map(|text| text.lines())
            .filter(|line| !line.starts_with('#') && !line.contains(';'))
            .filter_map(|line| line.split_once("==").map(|pin| pin.0))
            .collect();
        for (at, name) in pinned.iter().enumerate() {
            assert!(!pinned[..at].contains(name), "{name} is pinned twice");
        }
        let sources = PEERS.iter().filter_map(|peer| peer.source);
        assert!(sources.into_iter().all(|name| pinned.contains(&name)));
    }
}
