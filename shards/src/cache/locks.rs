//! Pins on cached files, visible to all processes: one lock file, with a byte for each name.
//!
//! The locks belong to an open file (Linux's open file description locks), so the kernel releases them
//! however a process ends, and a thousand shards in use cost one descriptor, not a thousand.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use sha2::{Digest as _, Sha256};

use crate::format::ShardError;

/// The byte locked while room is made; names have the bytes above it.
const ADMISSION: i64 = 0;

/// The lock file of a cache, opened.
#[derive(Debug)]
pub(super) struct Locks {
    file: File,
    /// Pins of each name in this process: to the kernel all threads of it are one owner.
    held: Mutex<HashMap<String, u32>>,
    /// Excludes other threads of this process, which the kernel's lock does not.
    admission: Mutex<()>,
}

/// A pin: while it exists no process evicts the file.
#[derive(Debug)]
pub struct Pin {
    locks: Arc<Locks>,
    name: String,
}

impl Locks {
    pub(super) fn open(path: &Path) -> Result<Locks, ShardError> {
        let mut options = File::options();
        let file = options.create(true).truncate(false).read(true).write(true).open(path);
        let file = file.map_err(ShardError::io(path, "open"))?;
        Ok(Locks { file, held: Mutex::default(), admission: Mutex::new(()) })
    }

    fn set(&self, kind: i32, byte: i64, wait: bool) -> Result<(), Errno> {
        // Both fit: they are small constants of the system.
        let (l_type, l_whence) = (kind as libc::c_short, libc::SEEK_SET as libc::c_short);
        let lock = libc::flock { l_type, l_whence, l_start: byte, l_len: 1, l_pid: 0 };
        loop {
            let asked = match wait {
                true => fcntl(&self.file, FcntlArg::F_OFD_SETLKW(&lock)),
                false => fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)),
            };
            match asked {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn fault(&self, path: &Path, error: Errno) -> ShardError {
        ShardError::io(path, "lock the use of")(error.into())
    }

    /// Pins a name. Waits for a process that is just removing it.
    pub(super) fn pin(self: &Arc<Locks>, name: &str, path: &Path) -> Result<Pin, ShardError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(name.to_owned()).or_insert(0);
        if *count == 0
            && let Err(error) = self.set(libc::F_RDLCK, byte_of(name), true)
        {
            held.remove(name);
            return Err(self.fault(path, error));
        }
        *count += 1;
        Ok(Pin { locks: Arc::clone(self), name: name.to_owned() })
    }

    /// Runs `remove` unless the name is pinned; returns its result if it ran. Requests for the name wait
    /// meanwhile.
    pub(super) fn if_unused<T>(
        &self,
        name: &str,
        path: &Path,
        remove: impl FnOnce() -> T,
    ) -> Result<Option<T>, ShardError> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.contains_key(name) {
            return Ok(None);
        }
        match self.set(libc::F_WRLCK, byte_of(name), false) {
            Ok(()) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
            Err(error) => return Err(self.fault(path, error)),
        }
        let done = remove();
        self.set(libc::F_UNLCK, byte_of(name), false).map_err(|error| self.fault(path, error))?;
        Ok(Some(done))
    }

    /// Runs `admit` while no other process or thread does.
    pub(super) fn alone<T>(
        &self,
        path: &Path,
        admit: impl FnOnce() -> Result<T, ShardError>,
    ) -> Result<T, ShardError> {
        let _threads = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        self.set(libc::F_WRLCK, ADMISSION, true).map_err(|error| self.fault(path, error))?;
        let done = admit();
        self.set(libc::F_UNLCK, ADMISSION, false).map_err(|error| self.fault(path, error))?;
        done
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut held = self.locks.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.get_mut(&self.name).map_or(0, |count| {
            *count -= 1;
            *count
        });
        if count == 0 {
            held.remove(&self.name);
            // If this fails the file is not evicted until this process ends.
            let _ = self.locks.set(libc::F_UNLCK, byte_of(&self.name), false);
        }
    }
}

/// The byte of a name. Two names with the same byte would merely keep each other from being evicted.
fn byte_of(name: &str) -> i64 {
    let digest = Sha256::digest(name.as_bytes());
    let mut bytes = [0; 8];
    bytes[..7].copy_from_slice(&digest[..7]);
    i64::from_le_bytes(bytes) + 1 // 56 bits, and not the admission's byte
}
