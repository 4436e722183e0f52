//! Lists a folder: pictures, tars and other files, through links.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::super::source::NO_ARCHIVE;
use super::super::{PackError, SkipReason, key};
use super::{LITTER, Scan, first_folder};
use crate::format::ShardError;
use crate::format::name::{is_picture, is_tar};

/// A folder that is being listed.
pub(super) struct Folder<'s, 'a> {
    pub(super) scan: &'s mut Scan<'a>,
    /// Tars that were met: name in the source, path.
    pub(super) tars: &'s mut Vec<(Vec<u8>, PathBuf)>,
}

impl Folder<'_, '_> {
    /// `above` are device and inode of the folders on the way here: a link back to one is a loop.
    pub(super) fn list(
        &mut self,
        folder: &Path,
        name: &mut Vec<u8>,
        above: &mut Vec<(u64, u64)>,
    ) -> Result<(), PackError> {
        let list = match std::fs::read_dir(folder) {
            Ok(list) => list,
            Err(error) if above.len() > 1 => {
                self.scan.skip(name, &SkipReason::Unreadable { error });
                return Ok(());
            }
            Err(error) => return Err(ShardError::io(folder, "list")(error).into()),
        };
        for entry in list {
            let entry = entry.map_err(ShardError::io(folder, "list"))?;
            let base = entry.file_name();
            let length = name.len();
            if length > 0 {
                name.push(b'/');
            }
            name.extend_from_slice(base.as_bytes());
            self.one(&entry.path(), base.as_bytes(), name, above)?;
            name.truncate(length);
        }
        Ok(())
    }

    fn one(
        &mut self,
        path: &Path,
        base: &[u8],
        name: &mut Vec<u8>,
        above: &mut Vec<(u64, u64)>,
    ) -> Result<(), PackError> {
        if base.starts_with(b".") {
            self.scan.skip(name, &SkipReason::Hidden);
            return Ok(());
        }
        // Follows links: data sets are often assembled from them.
        let meta = match std::fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) => {
                self.scan.skip(name, &SkipReason::Unreadable { error });
                return Ok(());
            }
        };
        let place = (meta.dev(), meta.ino());
        if meta.is_dir() && above.contains(&place) {
            self.scan.skip(name, &SkipReason::Loop);
        } else if meta.is_dir() {
            above.push(place);
            self.folder(path, name, above)?;
            above.pop();
        } else if !meta.is_file() {
            self.scan.other(name);
        } else if is_tar(name) {
            self.tars.push((name.clone(), path.to_path_buf()));
        } else if !is_picture(name) {
            self.scan.other(name);
        } else {
            // As torchvision's ImageFolder: the first folder is the class, whatever lies below.
            let class = first_folder(name);
            self.scan.image(name, NO_ARCHIVE, (0, meta.len()), class, None);
        }
        Ok(())
    }

    /// A folder in the source. One of the first level in which nothing was found is a class all the
    /// same when it is empty, or what is in it cannot be read; not when it holds other files only.
    fn folder(
        &mut self,
        path: &Path,
        name: &mut Vec<u8>,
        above: &mut Vec<(u64, u64)>,
    ) -> Result<(), PackError> {
        let before = (self.scan.found.len(), self.tars.len(), self.scan.others);
        let skips = self.scan.skips.len();
        self.list(path, name, above)?;
        let same = before == (self.scan.found.len(), self.tars.len(), self.scan.others);
        let faults = self.scan.skips[skips..].iter().any(|skip| skip.fault);
        if above.len() == 2 && (same || faults) && !LITTER.contains(&name.as_slice()) {
            self.scan.empty_classes.insert(key::readable(name));
        }
        Ok(())
    }
}
