//! A part: a file of the cache that is being written.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::locks::Locks;
use crate::files::{hex, sync_folder};
use crate::format::ShardError;

/// A file being written. If it is dropped, what was written stays and can be continued.
#[derive(Debug)]
pub struct Part {
    file: File,
    /// `.NAME.BYTES.part`.
    path: PathBuf,
    pub(super) whole: PathBuf,
    locks: Arc<Locks>,
    have: u64,
    digest: Sha256,
}

impl Part {
    /// Continues what an earlier process left, unless it is longer than the file will be.
    pub(super) fn take_up(
        mut file: File,
        path: PathBuf,
        whole: PathBuf,
        locks: Arc<Locks>,
        bytes: u64,
    ) -> Result<Part, ShardError> {
        let (mut digest, mut have) = (Sha256::new(), 0);
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = file.read(&mut buffer).map_err(ShardError::io(&path, "read"))?;
            if read == 0 {
                break;
            }
            digest.update(&buffer[..read]);
            have += read as u64;
        }
        let mut part = Part { file, path, whole, locks, have, digest };
        if part.have > bytes {
            part.restart()?;
        }
        Ok(part)
    }

    /// Bytes written so far.
    pub fn have(&self) -> u64 {
        self.have
    }

    /// Appends bytes.
    ///
    /// # Errors
    ///
    /// The file system refuses; what was written before is unchanged.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), ShardError> {
        if let Err(error) = self.file.write_all(bytes) {
            // Some bytes may have been written: truncate to what the digest covers. If that fails too, the
            // next process to continue the part reads what there is.
            let _ = self.file.set_len(self.have);
            let _ = self.file.seek(SeekFrom::Start(self.have));
            return Err(ShardError::io(&self.path, "write")(error));
        }
        self.digest.update(bytes);
        self.have += bytes.len() as u64;
        Ok(())
    }

    /// Empties the part.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn restart(&mut self) -> Result<(), ShardError> {
        let cut = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        cut.map_err(ShardError::io(&self.path, "truncate"))?;
        (self.have, self.digest) = (0, Sha256::new());
        Ok(())
    }

    /// SHA-256 of the bytes written so far, 64 hex digits.
    pub fn sha256(&self) -> String {
        hex(&self.digest.clone().finalize())
    }

    /// Flushes the part to the disk. Some file systems report only now that there is no room.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn flush(&mut self) -> Result<(), ShardError> {
        self.file.sync_all().map_err(ShardError::io(&self.path, "flush"))
    }

    /// Renames a flushed part to its final name, while no process counts the cache: the file would be
    /// missed under both names.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn finish(self) -> Result<(), ShardError> {
        self.locks.alone(&self.whole, || {
            fs::rename(&self.path, &self.whole)
                .map_err(ShardError::io(&self.whole, "rename the part to"))
        })?;
        Ok(sync_folder(self.whole.parent().unwrap_or(Path::new(".")))?)
    }

    /// Removes the part.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn discard(self) -> Result<(), ShardError> {
        fs::remove_file(&self.path).map_err(ShardError::io(&self.path, "remove"))
    }
}
