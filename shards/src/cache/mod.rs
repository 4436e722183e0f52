//! The cache: a folder of bounded size for fetched files, shared by all processes of a machine.
//!
//! A file appears under its name when it is whole: it grows as `.NAME.BYTES.part`, is flushed, then
//! renamed. The process that writes a part holds a lock on it (`flock`), which the kernel releases
//! however the process ends. A part without a lock is continued, or removed to make room. A reader of
//! a file locks its byte of `locks` (a [`Pin`]), so that no process evicts it; what is mapped is
//! therefore always counted. All other files are evicted by last use, which is their access time.
//!
//! The bound holds over all processes that state it: whole files count by their size, parts by the
//! size that they will have, and one process at a time makes room. Only names that this module makes
//! are counted or removed: 64 hex digits, a word, an ending.
//!
//! It never fetches anything, and knows nothing of shards but their eviction priority.

mod disk;
mod locks;
mod names;
mod part;

use std::cmp::Reverse;
use std::fs::{self, File, FileTimes, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use self::disk::{free, is_full, is_limited};
use self::locks::Locks;
pub use self::locks::Pin;
use self::names::{is_index, is_ours, parse};
pub use self::part::Part;
use crate::format::ShardError;

/// An open cache.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    bound: u64,
    locks: Arc<Locks>,
}

/// The eviction priority of a file in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Not needed: evicted first, the least recently used before others.
    Unneeded,
    /// Needed after so many other files: evicted the sooner, the later it is needed.
    NeededAfter(u32),
}

/// The answer to a request for room.
#[derive(Debug)]
pub enum Admitted {
    /// The file is there, whole.
    Present,
    /// Another process, or another thread, is fetching it.
    Elsewhere,
    /// There is room; the part is new, or what an earlier process left of it.
    Part(Part),
    /// Too much of the cache is in use.
    NoRoom {
        /// Bytes that could not be evicted.
        kept: u64,
    },
}

/// The contents of a cache, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that count against the bound.
    pub bytes: u64,
    /// Whole files.
    pub files: u64,
    /// Files being written, or left unfinished.
    pub parts: u64,
}

/// One of our files.
#[derive(Debug)]
struct Found {
    name: String,
    path: PathBuf,
    bytes: u64,
    part: bool,
    used: SystemTime,
}

/// How long an index must be unused before it is evicted for a shard: it is a thousandth of its shard,
/// and making it may have taken the whole shard.
const INDEX_REST: Duration = Duration::from_secs(24 * 3600);

impl Cache {
    /// Opens the cache of at most `bound` bytes in `folder`, which is created if it does not exist.
    ///
    /// # Errors
    ///
    /// The folder cannot be made or written.
    pub fn open(folder: &Path, bound: u64) -> Result<Cache, ShardError> {
        fs::create_dir_all(folder).map_err(ShardError::io(folder, "make the cache"))?;
        let locks = Arc::new(Locks::open(&folder.join("locks"))?);
        Ok(Cache { folder: folder.to_path_buf(), bound, locks })
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The bound in bytes.
    pub fn bound(&self) -> u64 {
        self.bound
    }

    /// The path of the file of this name, whether or not it exists.
    pub fn path(&self, name: &str) -> PathBuf {
        debug_assert!(is_ours(name), "{name} is no name of the cache's");
        self.folder.join(name)
    }

    /// Pins the file of this name against eviction, if it exists with so many bytes, and marks it as used
    /// now.
    ///
    /// # Errors
    ///
    /// The file system refuses; another size under this name is an error as well.
    pub fn take(&self, name: &str, bytes: u64) -> Result<Option<Pin>, ShardError> {
        let path = self.path(name);
        let pin = self.locks.pin(name, &path)?;
        let found = match path.metadata() {
            Ok(meta) => meta.len(),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ShardError::io(&path, "read the size of")(error)),
        };
        if found != bytes {
            let text = format!("it has {found} bytes, {bytes} were put there: remove it");
            return Err(ShardError::io(&path, "use")(std::io::Error::other(text)));
        }
        self.used(&path);
        Ok(Some(pin))
    }

    /// The size of the file of this name, if it exists.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn size(&self, name: &str) -> Result<Option<u64>, ShardError> {
        let path = self.path(name);
        match path.metadata() {
            Ok(meta) => Ok(Some(meta.len())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ShardError::io(&path, "read the size of")(error)),
        }
    }

    /// The bytes of a small file, if it exists.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, ShardError> {
        let path = self.path(name);
        let _pin = self.locks.pin(name, &path)?;
        match fs::read(&path) {
            Ok(bytes) => {
                self.used(&path);
                Ok(Some(bytes))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ShardError::io(&path, "read")(error)),
        }
    }

    /// Sets the access time of a file to now. It is set explicitly since many file systems do not update
    /// it on reads.
    fn used(&self, path: &Path) {
        let times = FileTimes::new().set_accessed(SystemTime::now());
        // Without the right to change it, the file keeps its place in the order.
        let _ = File::open(path).and_then(|file| file.set_times(times));
    }

    /// Stores a small file, unless there is no room or another process is storing it.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn store(
        &self,
        name: &str,
        bytes: &[u8],
        priority: &dyn Fn(&str) -> Priority,
    ) -> Result<(), ShardError> {
        if let Admitted::Part(mut part) = self.admit(name, bytes.len() as u64, priority)? {
            part.restart()?;
            part.append(bytes)?;
            part.flush()?;
            part.finish()?;
        }
        Ok(())
    }

    /// Removes a file, if nobody uses it.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn remove(&self, name: &str) -> Result<(), ShardError> {
        let path = self.path(name);
        let found = Found {
            name: name.to_owned(),
            path,
            bytes: 0,
            part: false,
            used: SystemTime::UNIX_EPOCH,
        };
        self.locks.alone(&self.folder, || self.evict(&found).map(|_| ()))
    }

    /// Requests room for a file of `bytes` bytes; evicts files of lower priority if needed.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn admit(
        &self,
        name: &str,
        bytes: u64,
        priority: &dyn Fn(&str) -> Priority,
    ) -> Result<Admitted, ShardError> {
        let (whole, path) = (self.path(name), self.folder.join(format!(".{name}.{bytes}.part")));
        let opened = self.locks.alone(&self.folder, || {
            if whole.exists() {
                return Ok(Err(Admitted::Present));
            }
            if !path.exists()
                && let Some(kept) = self.make_room(name, bytes, priority)?
            {
                return Ok(Err(Admitted::NoRoom { kept }));
            }
            let mut options = File::options();
            let file = options.create(true).truncate(false).read(true).write(true).open(&path);
            Ok(Ok(file.map_err(ShardError::io(&path, "create"))?))
        })?;
        let file = match opened {
            Ok(file) => file,
            Err(otherwise) => return Ok(otherwise),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Admitted::Elsewhere),
            Err(TryLockError::Error(error)) => return Err(ShardError::io(&path, "lock")(error)),
        }
        // Whoever held the lock before may have renamed or removed the part after it was opened.
        let number = |meta: fs::Metadata| (meta.dev(), meta.ino());
        let mine = file.metadata().map(number).map_err(ShardError::io(&path, "look at"))?;
        if path.metadata().map(number).ok() != Some(mine) {
            return Ok(Admitted::Elsewhere);
        }
        let part = Part::take_up(file, path, whole, Arc::clone(&self.locks), bytes)?;
        if part.whole.exists() {
            part.discard()?;
            return Ok(Admitted::Present);
        }
        Ok(Admitted::Part(part))
    }

    /// Counts the contents of the cache.
    ///
    /// # Errors
    ///
    /// The folder cannot be listed.
    pub fn usage(&self) -> Result<Usage, ShardError> {
        self.locks.alone(&self.folder, || self.count())
    }

    /// Counts the contents, with the lock of [`Locks::alone`].
    fn count(&self) -> Result<Usage, ShardError> {
        let mut usage = Usage::default();
        for found in self.list()? {
            usage.bytes += found.bytes;
            *(if found.part { &mut usage.parts } else { &mut usage.files }) += 1;
        }
        Ok(usage)
    }

    /// Evicts the file of the lowest priority where the disk is full below the bound; returns false if no
    /// file can be evicted.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn evict_one(
        &self,
        name: &str,
        priority: &dyn Fn(&str) -> Priority,
    ) -> Result<bool, ShardError> {
        self.locks.alone(&self.folder, || {
            for found in self.candidates(name, priority)? {
                if self.evict(&found)? {
                    return Ok(true);
                }
            }
            Ok(false)
        })
    }

    /// Evicts files until `bytes` more fit; returns the bytes that remain if they cannot fit.
    fn make_room(
        &self,
        name: &str,
        bytes: u64,
        priority: &dyn Fn(&str) -> Priority,
    ) -> Result<Option<u64>, ShardError> {
        let mut used = self.count()?.bytes;
        let fits = |used: u64| used.saturating_add(bytes) <= self.bound;
        if fits(used) {
            return Ok(None);
        }
        for found in self.candidates(name, priority)? {
            if self.evict(&found)? {
                used -= found.bytes;
            }
            if fits(used) {
                return Ok(None);
            }
        }
        Ok(Some(used))
    }

    /// The files that may be evicted to make room for `name`, in order of eviction: unneeded files by last
    /// use, with indexes after all others; then needed ones, the latest needed first.
    fn candidates(
        &self,
        name: &str,
        priority: &dyn Fn(&str) -> Priority,
    ) -> Result<Vec<Found>, ShardError> {
        let mine = priority(name);
        let goes_before = |other: Priority| match (other, mine) {
            (Priority::Unneeded, _) => true,
            (Priority::NeededAfter(_), Priority::Unneeded) => false,
            (Priority::NeededAfter(theirs), Priority::NeededAfter(mine)) => theirs > mine,
        };
        let now = SystemTime::now();
        let rested = |found: &Found| {
            !is_index(&found.name)
                || is_index(name)
                || now.duration_since(found.used).is_ok_and(|unused| unused >= INDEX_REST)
        };
        let mut all = self.list()?;
        all.retain(|found| {
            found.name != name && rested(found) && goes_before(priority(&found.name))
        });
        all.sort_by_cached_key(|found| {
            let later = match priority(&found.name) {
                Priority::Unneeded => None,
                Priority::NeededAfter(others) => Some(Reverse(others)),
            };
            (later, is_index(&found.name), found.used)
        });
        Ok(all)
    }

    fn evict(&self, found: &Found) -> Result<bool, ShardError> {
        let remove = || match fs::remove_file(&found.path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
            Err(error) => Err(ShardError::io(&found.path, "evict")(error)),
        };
        if !found.part {
            let done = self.locks.if_unused(&found.name, &found.path, remove)?;
            return done.unwrap_or(Ok(false));
        }
        // A part is in use while a process holds its lock.
        match File::open(&found.path) {
            Ok(file) if file.try_lock().is_ok() => remove(),
            _ => Ok(false),
        }
    }

    fn list(&self) -> Result<Vec<Found>, ShardError> {
        let mut all = Vec::new();
        let list = fs::read_dir(&self.folder).map_err(ShardError::io(&self.folder, "list"))?;
        for entry in list {
            let entry = entry.map_err(ShardError::io(&self.folder, "list"))?;
            let name = entry.file_name();
            let Some((name, promised)) = name.to_str().and_then(parse) else { continue };
            // Another process may have removed or renamed it since.
            let Ok(meta) = entry.metadata() else { continue };
            let used = meta.accessed().unwrap_or(SystemTime::UNIX_EPOCH);
            let bytes = promised.unwrap_or(meta.len());
            let (name, part) = (name.to_owned(), promised.is_some());
            all.push(Found { name, path: entry.path(), bytes, part, used });
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests;
