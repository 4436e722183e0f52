//! The source of a packing job: from a folder, a tar or a folder of tars to a sorted list of images with their
//! classes.
//!
//! Reads names and sizes, no picture. The list is the same however the file system orders things.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::classes::{self, Arranged};
use super::scan::{self, Found, Scan};
use super::{OnError, Options, PackError, Progress, Skip, SkipReason, key};
use crate::format::map::Map;
use crate::format::{ShardError, name};

/// Stands for "no class".
pub(super) const NO_CLASS: u32 = u32::MAX;

/// Stands for "a file of its own".
pub(super) const NO_ARCHIVE: u32 = u32::MAX;

/// An image to pack. About a hundred bytes with its name.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// Path in the source, with `/`.
    pub(crate) name: Box<[u8]>,
    /// The tar it lies in, by its number; [`NO_ARCHIVE`] for a file.
    pub(super) archive: u32,
    /// How often its extension is part of its key.
    pub(super) extensions: u8,
    /// Where its bytes start in the tar; 0 for a file.
    pub(super) offset: u64,
    /// Size in bytes.
    pub(crate) size: u64,
    /// Number of its class.
    pub(super) class: u32,
}

impl Entry {
    pub(crate) fn class(&self) -> Option<u32> {
        (self.class != NO_CLASS).then_some(self.class)
    }
}

/// A tar of the source.
#[derive(Debug)]
pub(super) struct Archive {
    pub(super) path: PathBuf,
    /// The tar's bytes, where it is the only one. Of a folder of tars none stays mapped: there may be
    /// more of them than a process may have maps.
    pub(super) map: Option<Map>,
    /// Whether its names are keys that `detco pack` made.
    pub(super) own: bool,
}

/// The list of images to pack.
#[derive(Debug)]
pub(crate) struct Source {
    root: PathBuf,
    archives: Vec<Archive>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) classes: Vec<String>,
    /// Files left out already, sorted.
    pub(crate) skips: Vec<Skip>,
}

impl Source {
    /// Lists a folder, a tar or a folder of tars.
    pub(crate) fn scan(
        root: &Path,
        options: &Options,
        progress: &Progress,
    ) -> Result<Source, PackError> {
        let mut scan = scan::root(root, progress)?;
        if let Some(error) = scan.broken.take() {
            // What precedes the fault is whole, and the policy decides whether that is enough.
            if options.on_error == OnError::Fail || scan.found.is_empty() {
                return Err(error.into());
            }
            let ShardError::Tar { shard, error } = error else { return Err(error.into()) };
            let name = shard.file_name().unwrap_or_default().as_bytes();
            scan.skips.push(Skip::new(name, &SkipReason::Tar { error }));
        }
        if scan.found.is_empty() {
            return Err(nothing(root, &scan));
        }
        let Arranged { entries, classes, skips } = classes::arrange(root, &mut scan, options)?;
        let Scan { archives, notes, .. } = scan;
        let mut source = Source { root: root.to_path_buf(), archives, entries, classes, skips };
        source.tell_keys_apart();
        source.skips.extend(scan.skips);
        source.skips.sort_by(|a, b| (&a.path, &a.reason).cmp(&(&b.path, &b.reason)));
        notes.iter().for_each(|note| progress.tell(note));
        if source.entries.is_empty() {
            let first = source.skips.iter().find(|skip| skip.fault);
            return Err(match first {
                Some(Skip { path, reason, .. }) if options.on_error == OnError::Fail => {
                    PackError::File { path: path.clone(), reason: reason.clone() }
                }
                _ => PackError::AllSkipped {
                    from: root.to_path_buf(),
                    images: source.skips.iter().filter(|skip| skip.fault).count() as u64,
                },
            });
        }
        Ok(source)
    }

    /// Of pictures that share a key, the JPEG keeps it, or what is likest to be packed, or the first;
    /// the others get their extension into theirs. A file that turns out to be no picture thus costs
    /// no other its key.
    fn tell_keys_apart(&mut self) {
        use std::collections::HashMap;
        let digest = |key: Cow<'_, str>| {
            let mut short = [0; 16];
            short.copy_from_slice(&Sha256::digest(key.as_bytes())[..16]);
            short
        };
        let rank = |entry: &Entry| {
            let extension = name::extension(&entry.name).to_ascii_lowercase();
            let order: [&[&[u8]]; 4] =
                [&[b"jpg", b"jpeg", b"jpe", b"jfif"], &[b"png"], &[b"webp"], &[b"bmp"]];
            order.iter().position(|these| these.contains(&&*extension)).unwrap_or(order.len())
        };
        let mut taken: HashMap<[u8; 16], usize> = HashMap::with_capacity(self.entries.len());
        let mut losers = Vec::new();
        for at in 0..self.entries.len() {
            let entry = &self.entries[at];
            let holder = taken.entry(digest(self.key(entry))).or_insert(at);
            if *holder != at {
                let better = rank(entry) < rank(&self.entries[*holder]);
                losers.push(if better { std::mem::replace(holder, at) } else { at });
            }
        }
        losers.sort_unstable();
        for at in losers {
            // As many as 255 never take part: each has a file of its own with as many extensions.
            while self.entries[at].extensions < u8::MAX {
                self.entries[at].extensions += 1;
                let key = digest(self.key(&self.entries[at]));
                if let std::collections::hash_map::Entry::Vacant(free) = taken.entry(key) {
                    free.insert(at);
                    break;
                }
            }
        }
    }

    /// The key of a picture, which no other has.
    pub(crate) fn key(&self, entry: &Entry) -> Cow<'_, str> {
        let own = self.archives.get(entry.archive as usize).is_some_and(|archive| archive.own);
        let escaped = if own { key::kept } else { key::of };
        let mut key = escaped(&entry.name);
        key::append(&entry.name, entry.extensions, &mut key);
        Cow::Owned(key)
    }

    /// SHA-256 over names, sizes and classes: two runs over the same images agree.
    pub(crate) fn fingerprint(&self) -> String {
        let mut digest = Sha256::new();
        for entry in &self.entries {
            digest.update((entry.name.len() as u64).to_le_bytes());
            digest.update(&entry.name);
            digest.update(entry.size.to_le_bytes());
            digest.update(entry.class.to_le_bytes());
        }
        for class in &self.classes {
            digest.update((class.len() as u64).to_le_bytes());
            digest.update(class);
        }
        crate::files::hex(&digest.finalize())
    }

    /// Asks the system to read an image's bytes ahead.
    pub(crate) fn will_need(&self, entry: &Entry) {
        if let Some(Archive { map: Some(map), .. }) = self.archives.get(entry.archive as usize) {
            map.will_need(entry.offset, entry.size);
        }
    }

    /// Checks that all bytes read were the source's: see [`Map::check`].
    pub(crate) fn check(&self) -> Result<(), ShardError> {
        self.archives.iter().filter_map(|one| one.map.as_ref()).try_for_each(Map::check)
    }

    /// The bytes of an image: a slice of the tar, or read into `buffer`.
    pub(crate) fn read<'a>(
        &'a self,
        entry: &Entry,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], SkipReason> {
        use std::io::{Read as _, Seek as _, SeekFrom};
        let unreadable = |error| SkipReason::Unreadable { error };
        buffer.clear();
        match self.archives.get(entry.archive as usize) {
            Some(Archive { map: Some(map), .. }) => {
                // The walker has seen this range inside the map.
                Ok(&map.bytes()[entry.offset as usize..(entry.offset + entry.size) as usize])
            }
            Some(Archive { path, map: None, .. }) => {
                let mut file = File::open(path).map_err(unreadable)?;
                file.seek(SeekFrom::Start(entry.offset)).map_err(unreadable)?;
                file.take(entry.size).read_to_end(buffer).map_err(unreadable)?;
                if buffer.len() as u64 != entry.size {
                    return Err(unreadable(std::io::ErrorKind::UnexpectedEof.into()));
                }
                Ok(buffer)
            }
            None => {
                let path = self.root.join(std::ffi::OsStr::from_bytes(&entry.name));
                let mut file = File::open(path).map_err(unreadable)?;
                file.read_to_end(buffer).map_err(unreadable)?;
                Ok(buffer)
            }
        }
    }
}

/// Why a source has no pictures: what it has instead.
fn nothing(root: &Path, scan: &Scan<'_>) -> PackError {
    let others = scan.skips.len();
    let first = scan.skips.iter().min_by_key(|skip| (!skip.fault, &skip.path));
    let instead = first.map_or_else(String::new, |first| {
        let more = if others > 1 { format!(" and {} more", others - 1) } else { String::new() };
        format!(": only `{}` ({}){more}", first.path, first.reason)
    });
    PackError::NoImages { from: root.to_path_buf(), instead }
}

/// A picture that was found, with its class, as it will be packed.
pub(super) fn entry(found: Found, class: u32) -> Entry {
    let Found { name, archive, offset, size, .. } = found;
    Entry { name, archive, extensions: 0, offset, size, class }
}
