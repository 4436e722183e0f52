//! Files appear whole: sibling temporary file, fsync, rename, fsync of the folder.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

/// Removes the temporary file unless it was renamed away.
struct Temporary {
    path: PathBuf,
    kept: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.kept {
            // The write has failed already, and that error is the one to report.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Writes a file atomically: it appears under `path` only when all of it is on the disk.
///
/// `fill` is handed the temporary file; errors of any kind leave `path` as it was.
pub(crate) fn write<E>(
    path: &Path,
    wrap: impl Fn(io::Error) -> E,
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<(), E>,
) -> Result<(), E> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // The process id keeps two exports to one path from writing into each other.
    let temporary = folder.join(format!(".{name}.{}.tmp", std::process::id()));
    let file = File::create(&temporary).map_err(&wrap)?;
    let mut temporary = Temporary { path: temporary, kept: false };
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    fill(&mut writer)?;
    let file = writer.into_inner().map_err(|error| wrap(error.into_error()))?;
    file.sync_all().map_err(&wrap)?;
    std::fs::rename(&temporary.path, path).map_err(&wrap)?;
    temporary.kept = true;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(&wrap)
}
