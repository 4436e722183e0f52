//! [`CheckpointError`]: why a checkpoint could not be written or read.

use std::io;
use std::path::{Path, PathBuf};

use detco_shards::limits;
use rustix::io::Errno;
use thiserror::Error;

use crate::config::ConfigError;

/// Why a checkpoint could not be written or read.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The system refused.
    #[error("cannot {what} {path}: {source}{limit}", limit = limits::of_file(what, source))]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The run has none, or not this one.
    #[error("{run} holds no checkpoint{which}{known}")]
    Missing {
        /// The run's folder.
        run: PathBuf,
        /// The one asked for, if any.
        which: String,
        /// Those that are there.
        known: String,
    },
    /// `state.json` is no JSON.
    #[error("{path}: {reason}: the checkpoint is damaged")]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// `state.json` is not what this program writes.
    #[error("{path}: {reason}")]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of the checkpoint is not the one that was written.
    #[error("{path}: {what} is {found}, expected {expected}: the checkpoint is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which property differs.
        what: &'static str,
        /// What it is.
        found: String,
        /// What `state.json` says.
        expected: String,
    },
    /// Tensors that cannot be stored or read.
    #[error("{path}: {reason}")]
    Tensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The config inside does not pass this program's checks.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl CheckpointError {
    /// Whether there was no room for it: a disk, a quota or `ulimit -f`.
    pub fn is_no_room(&self) -> bool {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        match self {
            CheckpointError::Io { source, .. } => {
                matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge)
            }
            _ => false,
        }
    }

    /// Whether the checkpoint is not as it was written, so that an older one may be: files that are missing, or
    /// that the disk cannot read. A file that is whole and not ours to read is no damage.
    pub(super) fn is_damage(&self) -> bool {
        use io::ErrorKind::{IsADirectory, NotADirectory, NotFound};
        match self {
            CheckpointError::Io { source, .. } => {
                let unreadable = [Errno::IO, Errno::NODATA, Errno::BADMSG, Errno::NXIO];
                matches!(source.kind(), NotFound | IsADirectory | NotADirectory)
                    || Errno::from_io_error(source).is_some_and(|errno| unreadable.contains(&errno))
            }
            CheckpointError::Damaged { .. } | CheckpointError::Broken { .. } => true,
            _ => false,
        }
    }
}

/// An [`io::Error`] with what was tried on which path.
pub fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_path_buf();
    move |source| CheckpointError::Io { what, path, source }
}
