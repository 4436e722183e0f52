//! Folders with which other engines train detectors on an exported backbone: a config for each row of the paper's
//! tables, weights, a check that compares the stages inside the detector with ours, and a README.
//!
//! Everything in them is written here, from values; nothing is another project's file. A folder appears whole or not
//! at all.

mod engines;
mod network;
mod readme;
mod reference;
mod rows;

use std::path::{Path, PathBuf};

use tch::Tensor;
use thiserror::Error;

use self::network::Network;
use self::rows::{ROWS, Row};
use super::{ExportError, Format, Origin};
use crate::config::{Model as Shape, Stem};
use crate::export_format::Table;
use crate::model::ModelError;
use crate::shim::ShimError;

/// Why a folder of configs could not be written.
#[derive(Debug, Error)]
pub enum ConfigsError {
    /// The backbone has CIFAR's stem.
    #[error(
        "no detector of detectron2, torchvision or mmdetection takes a CIFAR stem (model.stem = \"cifar\", a 3x3 \
         convolution and no max pool)"
    )]
    Stem,
    /// The backbone is not 64 channels wide.
    #[error(
        "the configs are for standard ResNets, 64 channels wide; model.width of this backbone is {width}"
    )]
    Width {
        /// Channels of its stem.
        width: i64,
    },
    /// No row of the tables that were asked for fits.
    #[error("nothing of table {table} can be written: {why}")]
    Table {
        /// Its number.
        table: u8,
        /// What does not fit.
        why: &'static str,
    },
    /// The folder is there, with something in it.
    #[error("{path} is not an empty folder: name one that is not there yet")]
    Taken {
        /// The folder.
        path: PathBuf,
    },
    /// The folder or a file in it could not be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The folder or file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The weights or the reference could not be written.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The backbone does not fit a model of its shape.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The reference maps could not be computed.
    #[error(transparent)]
    Maps(#[from] ShimError),
}

/// The rows that are written, and why others are not.
#[derive(Debug)]
pub struct Plan {
    format: Format,
    network: Network,
    rows: Vec<Row>,
    refused: Vec<(String, &'static str)>,
}

impl Plan {
    /// The rows of `tables` that an engine can have with this network; of all tables where none is named.
    ///
    /// # Errors
    /// [`ConfigsError::Stem`] and [`ConfigsError::Width`] where no standard ResNet is the network, and
    /// [`ConfigsError::Table`] where a table was named of which no row fits.
    pub fn new(format: Format, shape: &Shape, tables: &[Table]) -> Result<Plan, ConfigsError> {
        if shape.stem == Stem::Cifar {
            return Err(ConfigsError::Stem);
        }
        if shape.width != 64 {
            return Err(ConfigsError::Width { width: shape.width });
        }
        let network = Network::of(shape);
        let asked = |row: &&Row| tables.is_empty() || tables.contains(&row.table);
        let mut plan = Plan { format, network, rows: Vec::new(), refused: Vec::new() };
        for row in ROWS.iter().filter(asked) {
            match row.refusal(format, network) {
                None => plan.rows.push(*row),
                Some(why) => plan.refused.push((row.stem(network), why)),
            }
        }
        for table in tables {
            let mut of_table = ROWS.iter().filter(|row| row.table == *table);
            let why = of_table.clone().find_map(|row| row.refusal(format, network));
            let fits = of_table.any(|row| row.refusal(format, network).is_none());
            if let (false, Some(why)) = (fits, why) {
                return Err(ConfigsError::Table { table: table.number(), why });
            }
        }
        Ok(plan)
    }

    /// The names of the configs, without extensions.
    pub fn names(&self) -> Vec<String> {
        self.rows.iter().map(|row| row.stem(self.network)).collect()
    }

    /// The rows that are not written, with the reason.
    pub fn refused(&self) -> &[(String, &'static str)] {
        &self.refused
    }

    /// The name of the weights in the folder.
    pub fn weights(&self) -> &'static str {
        match self.format {
            Format::Detectron2 => "backbone.pkl",
            Format::Torchvision | Format::Mmdet => "backbone.pth",
        }
    }

    /// Writes the folder: it appears under its name when all of it is written. `backbone` has torchvision's names.
    ///
    /// # Errors
    /// [`ConfigsError`]; `folder` is then as it was before.
    pub fn write(
        &self,
        folder: &Path,
        shape: &Shape,
        backbone: &[(String, Tensor)],
        origin: &Origin,
    ) -> Result<(), ConfigsError> {
        check(folder)?;
        let fault = |path: &Path, source| ConfigsError::Write { path: path.to_path_buf(), source };
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        // The process id keeps two exports to one folder from writing into each other.
        let part = folder.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
        std::fs::create_dir(&part).map_err(|error| fault(folder, error))?;
        let mut part = Part { path: part, kept: false };
        let at = |name: &str| part.path.join(name);
        super::write(&at(self.weights()), self.format, backbone, origin)?;
        reference::write(&at("reference.npz"), &reference::arrays(shape, backbone)?)?;
        let mut files = engines::files(self.format, self.network, &self.rows);
        files.insert("README.md".into(), readme::text(self, origin));
        for (name, text) in files {
            std::fs::write(at(&name), text).map_err(|error| fault(&folder.join(name), error))?;
        }
        // An empty folder of that name is replaced.
        std::fs::rename(&part.path, folder).map_err(|error| fault(folder, error))?;
        part.kept = true;
        Ok(())
    }
}

/// Checks before any work that a folder can be written: it is not there, or empty.
///
/// # Errors
/// [`ConfigsError::Taken`], and [`ConfigsError::Write`] for a path that names no folder.
pub fn check(folder: &Path) -> Result<(), ConfigsError> {
    let fault = |source| ConfigsError::Write { path: folder.to_path_buf(), source };
    if folder.file_name().is_none() {
        return Err(fault(std::io::ErrorKind::InvalidFilename.into()));
    }
    if !folder.is_dir() {
        let taken = folder.symlink_metadata().is_ok();
        return match taken {
            true => Err(ConfigsError::Taken { path: folder.to_path_buf() }),
            false => Ok(()),
        };
    }
    match std::fs::read_dir(folder).map_err(fault)?.next() {
        Some(_) => Err(ConfigsError::Taken { path: folder.to_path_buf() }),
        None => Ok(()),
    }
}

/// The folder while it is written. It is removed unless it was renamed.
struct Part {
    path: PathBuf,
    kept: bool,
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.kept {
            // The write has failed already, and that error is the one to report.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
