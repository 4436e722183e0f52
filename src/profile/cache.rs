//! Fills or empties the page cache before a measurement.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::Builder;

use detco_shards::format::ShardError;
use detco_shards::stream::ShardSet;
use rustix::fs::{Advice, fadvise};
use thiserror::Error;

use super::{Size, machine};
use crate::{config, data};

/// The most that a warm measurement reads: what a fast machine processes in half a minute, and a slow
/// disk reads in a minute.
const WARM_BYTES_MAX: u64 = 4 << 30;
/// Threads that read files, at most.
const READERS_MAX: usize = 4;
/// Bytes of one read.
const BUFFER: usize = 1 << 20;

/// Why the page cache could not be prepared.
#[derive(Debug, Error)]
pub enum CacheError {
    /// A shard cannot be read.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The shard.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A shard's name is not text, so part of the data cannot be opened again.
    #[error(
        "{path}: a shard's path must be UTF-8 where only some of the shards fit the page cache"
    )]
    Name {
        /// The shard.
        path: PathBuf,
    },
    /// The shards cannot be opened again.
    #[error(transparent)]
    Shard(#[from] ShardError),
}

/// Chooses the shards to read: the first that fit into the page cache, or all for a cold measurement. Also
/// returns how many there are in all.
///
/// # Errors
/// A shard cannot be opened, or not be named.
pub fn choose(
    spec: &[String],
    cold: bool,
    data: &config::Data,
) -> Result<(Vec<String>, ShardSet, Size), CacheError> {
    let all = data::open(spec, data)?;
    let shards_of = all.shards().len() as u64;
    let size = |set: &ShardSet| Size {
        shards: set.shards().len() as u64,
        shards_of,
        samples: set.len(),
        bytes: set.shards().iter().map(|shard| shard.bytes()).sum(),
    };
    let whole = size(&all);
    let room = machine::memory_left().unwrap_or(u64::MAX) / 2;
    // From URLs shards come and go, and that is what is measured.
    if cold || all.is_remote() || whole.bytes <= room.min(WARM_BYTES_MAX) {
        return Ok((spec.to_vec(), all, whole));
    }
    let (mut names, mut bytes) = (Vec::new(), 0);
    for shard in all.shards() {
        bytes += shard.bytes();
        if bytes > room.min(WARM_BYTES_MAX) && !names.is_empty() {
            break;
        }
        let name = shard.path().to_str();
        let name = name.ok_or_else(|| CacheError::Name { path: shard.path().to_path_buf() })?;
        names.push(name.to_owned());
    }
    let part = ShardSet::open(&names)?;
    let size = size(&part);
    Ok((names, part, size))
}

/// Reads every local shard once; `read` counts the bytes meanwhile.
///
/// # Errors
/// A shard cannot be read.
pub fn fill(set: &ShardSet, read: &AtomicU64) -> Result<(), CacheError> {
    let shards = if set.is_remote() { &[] } else { set.shards() };
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    let work = || {
        let mut buffer = vec![0; BUFFER];
        while let Some(shard) = shards.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = fill_one(shard.path(), &mut buffer, read) {
                next.store(shards.len(), Ordering::Relaxed);
                // A poisoned lock means that a sibling panicked; the scope passes that on.
                *failed.lock().unwrap_or_else(|poison| poison.into_inner()) = Some(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..READERS_MAX.min(shards.len()) {
            // Where the system gives no more threads, those that there are read all.
            if Builder::new().spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    match failed.into_inner().unwrap_or_else(|poison| poison.into_inner()) {
        None => Ok(()),
        Some(error) => Err(error),
    }
}

fn fill_one(path: &Path, buffer: &mut [u8], read: &AtomicU64) -> Result<(), CacheError> {
    let mut file = File::open(path).map_err(fault("open", path))?;
    loop {
        let bytes = file.read(buffer).map_err(fault("read", path))?;
        if bytes == 0 {
            return Ok(());
        }
        read.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Asks the system to drop the shards' pages. It keeps pages that a program has mapped and touched, so
/// close the set first.
///
/// # Errors
/// A shard cannot be opened, written back, or the file system does not take the advice.
pub fn empty(paths: &[PathBuf]) -> Result<(), CacheError> {
    for path in paths {
        let file = File::open(path).map_err(fault("open", path))?;
        // Pages that are not yet on the disk would stay.
        file.sync_data().map_err(fault("write back", path))?;
        fadvise(&file, 0, None, Advice::DontNeed)
            .map_err(|error| fault("drop the pages of", path)(error.into()))?;
    }
    Ok(())
}

fn fault(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError {
    move |source| CacheError::Io { what, path: path.to_path_buf(), source }
}
