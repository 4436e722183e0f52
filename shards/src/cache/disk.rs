//! The disk of the cache: how much of it is free, and errors of a full one.

use std::io::ErrorKind;
use std::path::Path;

use crate::format::ShardError;

/// Free bytes on the disk of a folder, if the system tells.
pub fn free(folder: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(folder).ok()?;
    stat.blocks_available().checked_mul(stat.fragment_size())
}

/// Whether the file system is full or a quota exceeded.
pub fn is_full(error: &ShardError) -> bool {
    let ShardError::Io { source, .. } = error else { return false };
    matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// Whether a limit on the size of a file was reached, which removing other files does not help.
pub fn is_limited(error: &ShardError) -> bool {
    let ShardError::Io { source, .. } = error else { return false };
    source.kind() == ErrorKind::FileTooLarge
}
