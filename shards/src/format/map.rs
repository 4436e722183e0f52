//! Memory maps of files: the only place that maps.
//!
//! A [`Map`] lends slices of the page cache; nothing copies a byte between it and the decoder. It never
//! writes, and no slice outlives it. If the file has become shorter than its map, zeros are read;
//! [`Map::check`] reports that, and every reader must call it.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::{Advice, Mmap};

use super::sigbus::Watch;
use super::{ChangeFault, ShardError};

/// A file, mapped read-only.
#[derive(Debug)]
pub struct Map {
    path: PathBuf,
    // Dropped in this order: nobody watches memory that is no map any more.
    watch: Watch,
    mmap: Mmap,
    modified: Option<SystemTime>,
    /// Device and inode.
    file: (u64, u64),
}

impl Map {
    /// Maps a regular file as long as it is now.
    ///
    /// # Errors
    ///
    /// The file cannot be opened, is no regular file, or cannot be mapped.
    pub fn open(path: &Path) -> Result<Map, ShardError> {
        let file = File::open(path).map_err(ShardError::io(path, "open"))?;
        let meta = file.metadata().map_err(ShardError::io(path, "read the size of"))?;
        if !meta.is_file() {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, "no regular file");
            return Err(ShardError::Io { path: path.to_path_buf(), action: "map", source });
        }
        let mmap = map_file(&file).map_err(ShardError::io(path, "map"))?;
        if mmap.len() as u64 != meta.len() {
            let source = std::io::Error::other("its size changed while it was opened");
            return Err(ShardError::Io { path: path.to_path_buf(), action: "map", source });
        }
        let (watch, modified) = (Watch::new(&mmap), meta.modified().ok());
        let file = (meta.dev(), meta.ino());
        Ok(Map { path: path.to_path_buf(), watch, mmap, modified, file })
    }

    /// Checks that all bytes read so far were the file's: to be called after reading and before using the
    /// result. One atomic load.
    ///
    /// # Errors
    ///
    /// [`ShardError::Changed`]: a page was missing when it was touched, and zeros were read. The error is
    /// permanent, since the file was shortened and the rest of it may have changed too.
    pub fn check(&self) -> Result<(), ShardError> {
        if !self.watch.hit() {
            return Ok(());
        }
        self.check_file()
    }

    /// As [`Map::check`], and also asks the file system; for bytes that turned out to be wrong.
    ///
    /// # Errors
    ///
    /// [`ShardError::Changed`]: as above, or the file has another size or time than when it was
    /// opened. A file that replaced it by name is no change: the map keeps the old one.
    pub fn check_file(&self) -> Result<(), ShardError> {
        let here = self.path.metadata().ok().filter(|meta| (meta.dev(), meta.ino()) == self.file);
        if let Some(meta) = here {
            let (mapped, now) = (self.mmap.len() as u64, meta.len());
            if mapped != now {
                return Err(self.changed(ChangeFault::Size { mapped, now }));
            }
            if self.modified != meta.modified().ok() {
                return Err(self.changed(ChangeFault::Written));
            }
        }
        if self.watch.hit() { Err(self.changed(ChangeFault::Unreadable)) } else { Ok(()) }
    }

    fn changed(&self, fault: ChangeFault) -> ShardError {
        ShardError::Changed { shard: self.path.clone(), fault }
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.mmap
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The modification time of the file, if the file system tells.
    pub fn modified(&self) -> Option<SystemTime> {
        self.modified
    }

    /// Advises the system that the file will be read from front to back.
    pub fn sequential(&self) {
        // Advice may be refused (a file system without read-ahead): nothing depends on it.
        let _ = self.mmap.advise(Advice::Sequential);
    }

    /// Advises the system that single pages will be read, so that it reads no neighbours.
    pub fn pages(&self) {
        // See `sequential`.
        let _ = self.mmap.advise(Advice::Random);
    }

    /// Advises the system that whole images will be read in random order.
    pub fn images(&self) {
        // See `sequential`. Not `Random`: that would read a cold image page by page.
        let _ = self.mmap.advise(Advice::Normal);
    }

    /// Advises the system that these bytes will be needed soon. A range outside the file is ignored.
    pub fn will_need(&self, offset: u64, length: u64) {
        let range = usize::try_from(offset).ok().zip(usize::try_from(length).ok());
        let Some((offset, length)) = range else { return };
        if offset.checked_add(length).is_some_and(|end| end <= self.mmap.len()) && length > 0 {
            // See `sequential`.
            let _ = self.mmap.advise_range(Advice::WillNeed, offset, length);
        }
    }
}

#[expect(unsafe_code, reason = "the one memory map of the project")]
fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the bytes of a map must not change while they are borrowed. Every writer of this
    // project writes a sibling temp file and renames it, so a file once opened keeps its bytes even
    // when its name is replaced. What remains is a foreign program that writes into a shard or
    // truncates it during a run, which no map can prevent: a page that is gone reads as zeros and
    // is reported (`Watch`). Bytes that change under a `&[u8]` are undefined behaviour by the
    // language's rules, which this program accepts, as others that map files do; README.md states
    // it. In practice they are foreign bytes like any other: whoever reads them twice, as the
    // decoder does, checks each time, and its lengths are its own, not the map's. The map is
    // read-only and nothing in the process writes through it.
    unsafe { Mmap::map(file) }
}
