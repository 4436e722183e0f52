//! The output files: opened before anything is measured, written under a temporary name.

use std::fs;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::Args;
use crate::profile::timeline::{self, Process};
use crate::profile::{Report, html};

/// The output files. They are opened before anything is measured, so that ten minutes of measuring do not end
/// with "no such folder".
pub(super) struct Outputs {
    json: Option<Output>,
    html: Option<Output>,
    trace: Option<Output>,
    /// `--json -`.
    pub(super) stdout: bool,
}

/// An output file being written under a temporary name.
struct Output {
    pub(super) path: PathBuf,
    part: PathBuf,
    file: fs::File,
}

impl Outputs {
    pub(super) fn open(args: &Args) -> anyhow::Result<Outputs> {
        let stdout = args.json.as_deref() == Some(Path::new("-"));
        let json = args.json.as_deref().filter(|_| !stdout);
        let named: Vec<&Path> =
            [json, args.html.as_deref(), args.trace.as_deref()].into_iter().flatten().collect();
        for (at, path) in named.iter().enumerate() {
            if named[..at].contains(path) {
                bail!("{} is named for two outputs", path.display());
            }
        }
        let open = |path: Option<&Path>| path.map(Output::open).transpose();
        Ok(Outputs {
            json: open(json)?,
            html: open(args.html.as_deref())?,
            trace: open(args.trace.as_deref())?,
            stdout,
        })
    }

    /// Writes all of them; returns the JSON if it is for standard output.
    pub(super) fn write(
        self,
        report: &Report,
        processes: &[Process],
    ) -> anyhow::Result<Option<String>> {
        let mut json = serde_json::to_string_pretty(report)?;
        json.push('\n');
        if let Some(output) = self.json {
            output.finish(|file| file.write_all(json.as_bytes()))?;
        }
        if let Some(output) = self.html {
            output.finish(|file| file.write_all(html::page(report).as_bytes()))?;
        }
        if let Some(output) = self.trace {
            output.finish(|file| timeline::write(processes, file))?;
        }
        Ok(self.stdout.then_some(json))
    }
}

impl Output {
    pub(super) fn open(path: &Path) -> anyhow::Result<Output> {
        if path.is_dir() {
            bail!("{} is a folder: name a file to write", path.display());
        }
        crate::cli::check_folder(path)?;
        let mut name = path.file_name().context("an output needs a file name")?.to_owned();
        name.push(".part");
        let part = path.with_file_name(name);
        let file =
            fs::File::create(&part).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Output { path: path.to_path_buf(), part, file })
    }

    fn finish(
        self,
        write: impl FnOnce(&mut BufWriter<&fs::File>) -> std::io::Result<()>,
    ) -> anyhow::Result<()> {
        let mut writer = BufWriter::new(&self.file);
        let written = write(&mut writer).and_then(|()| writer.flush());
        drop(writer);
        written
            .and_then(|()| self.file.sync_all())
            .and_then(|()| fs::rename(&self.part, &self.path))
            .with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // After a rename there is nothing left under this name; after an error it is litter.
        let _ = fs::remove_file(&self.part);
    }
}
