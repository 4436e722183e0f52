//! Writes files that appear whole: a sibling temp file, synced, then renamed.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::limits;

/// The operating system refused an operation on a file or folder.
#[derive(Debug, Error)]
#[error("cannot {action} {}{}", path.display(), limits::of_file(action, source))]
pub struct FileError {
    /// The file or folder.
    pub path: PathBuf,
    /// What was tried, to be read after "cannot".
    pub action: &'static str,
    /// Why it was refused.
    pub source: std::io::Error,
}

impl FileError {
    fn of(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> FileError + use<> {
        let path = path.to_path_buf();
        move |source| FileError { path, action, source }
    }
}

/// Writes a file that appears whole: sibling temp file, fsync, rename, fsync of the folder.
///
/// # Errors
///
/// Any of these is refused.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let temp = temp_name(path);
    let mut file = File::create(&temp).map_err(FileError::of(&temp, "create"))?;
    file.write_all(bytes).map_err(FileError::of(&temp, "write"))?;
    file.sync_all().map_err(FileError::of(&temp, "sync"))?;
    drop(file);
    std::fs::rename(&temp, path).map_err(FileError::of(path, "rename the temp file to"))?;
    sync_folder(path.parent().unwrap_or(Path::new(".")))
}

/// `folder/name` to `folder/.name.part`.
pub(crate) fn temp_name(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".part");
    path.with_file_name(name)
}

/// Flushes the renames in a folder to the disk. File systems that cannot do this (SMB, some in user space)
/// are accepted.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), FileError> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let handle = File::open(folder).map_err(FileError::of(folder, "open"))?;
    match handle.sync_all() {
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::InvalidInput | std::io::ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        synced => synced.map_err(FileError::of(folder, "sync")),
    }
}

/// Lower-case hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
