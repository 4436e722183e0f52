//! What there is to pack: a folder or a tar to a sorted list of images with their classes.
//!
//! Reads names and sizes, no image. The list is the same however the file system orders things.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use sha2::{Digest as _, Sha256};

use super::{PackError, Progress, Skip, SkipReason, key};
use crate::format::map::Map;
use crate::format::tar::{Kind, Walker};
use crate::format::{ShardError, index};

/// Extensions that name an image; others are left out without a fault.
const EXTENSIONS: [&str; 14] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "bmp", "webp", "gif", "tif", "tiff", "ppm", "pgm", "avif",
    "heic",
];

/// Stands for "no class".
const NO_CLASS: u32 = u32::MAX;

/// An image to pack. About a hundred bytes with its name.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// Path in the source, with `/`.
    pub(crate) name: Box<[u8]>,
    /// Where its bytes start in the tar; 0 for a file.
    offset: u64,
    /// Size in bytes.
    pub(crate) size: u64,
    /// Number of its class.
    class: u32,
}

impl Entry {
    pub(crate) fn class(&self) -> Option<u32> {
        (self.class != NO_CLASS).then_some(self.class)
    }
}

/// Everything there is to pack.
#[derive(Debug)]
pub(crate) struct Source {
    root: PathBuf,
    map: Option<Map>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) classes: Vec<String>,
    /// Files left out already, sorted.
    pub(crate) skips: Vec<Skip>,
}

impl Source {
    /// Lists a folder or a tar.
    pub(crate) fn scan(root: &Path, progress: &Progress) -> Result<Source, PackError> {
        let meta = std::fs::metadata(root).map_err(ShardError::io(root, "open"))?;
        let mut scan =
            Scan { progress, found: Vec::new(), labels: HashMap::new(), skips: Vec::new() };
        let map = if meta.is_dir() {
            scan.folder(root, &mut Vec::new(), &mut vec![(meta.dev(), meta.ino())])?;
            None
        } else {
            let map = Map::open(root)?;
            map.sequential();
            let scanned = scan.tar(&map);
            map.check()?;
            scanned?;
            // Shuffled from here on.
            map.images();
            Some(map)
        };
        let Scan { found, labels, skips, .. } = scan;
        let mut source = Source {
            root: root.to_path_buf(),
            map,
            entries: Vec::new(),
            classes: Vec::new(),
            skips,
        };
        source.arrange(found, &labels);
        source.skips.sort_by(|a, b| (&a.path, &a.reason).cmp(&(&b.path, &b.reason)));
        if source.entries.is_empty() {
            return Err(PackError::NoImages { from: root.to_path_buf() });
        }
        Ok(source)
    }

    /// Sorts, numbers the classes, leaves out duplicate keys and images without a class.
    fn arrange(&mut self, mut found: Vec<Found>, labels: &HashMap<Vec<u8>, String>) {
        found.sort_by(|a, b| a.name.cmp(&b.name));
        let sibling = |name: &[u8]| labels.get(webdataset_key(name)).map(String::as_str);
        // Numbers in .cls members are the numbering; anything else is sorted by name.
        let numbers: Option<Vec<u32>> = found
            .iter()
            .map(|one| sibling(&one.name).and_then(|text| text.parse().ok()))
            .collect::<Option<Vec<u32>>>()
            .filter(|numbers| numbers.iter().all(|number| *number < CLASSES_MAX));
        let label = |one: &Found| {
            let folder = || one.class.map(|(start, end)| key::readable(&one.name[start..end]));
            sibling(&one.name).map(str::to_owned).or_else(folder)
        };
        self.classes = match &numbers {
            Some(numbers) if !numbers.is_empty() => {
                let most = numbers.iter().copied().max().unwrap_or(0);
                (0..=most).map(|number| number.to_string()).collect()
            }
            _ => found.iter().filter_map(label).collect::<BTreeSet<_>>().into_iter().collect(),
        };
        let numbered = numbers.is_some();
        let mut seen = HashSet::with_capacity(found.len());
        for one in found {
            let class = match label(&one) {
                Some(label) if numbered => label.parse().unwrap_or(NO_CLASS),
                // Every label is in the list, and a list of 2^32 class names does not fit in memory.
                Some(label) => self.classes.binary_search(&label).map_or(NO_CLASS, |at| at as u32),
                None => NO_CLASS,
            };
            let mut digest = [0; 16];
            digest.copy_from_slice(&Sha256::digest(key::of(&one.name))[..16]);
            if class == NO_CLASS && !self.classes.is_empty() {
                self.skips.push(Skip::new(&one.name, &SkipReason::NoClass));
            } else if !seen.insert(digest) {
                let key = key::of(&one.name);
                self.skips.push(Skip::new(&one.name, &SkipReason::Duplicate { key }));
            } else {
                let Found { name, offset, size, .. } = one;
                self.entries.push(Entry { name, offset, size, class });
            }
        }
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
        crate::format::writer::hex(&digest.finalize())
    }

    /// Asks the system to read an image's bytes ahead.
    pub(crate) fn will_need(&self, entry: &Entry) {
        if let Some(map) = &self.map {
            map.will_need(entry.offset, entry.size);
        }
    }

    /// Whether all that was read were the source's bytes: see [`Map::check`].
    pub(crate) fn check(&self) -> Result<(), ShardError> {
        self.map.as_ref().map_or(Ok(()), Map::check)
    }

    /// The bytes of an image: a slice of the tar, or read into `buffer`.
    pub(crate) fn read<'a>(
        &'a self,
        entry: &Entry,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], SkipReason> {
        use std::io::Read as _;
        if let Some(map) = &self.map {
            // The walker has seen this range inside the map.
            return Ok(&map.bytes()[entry.offset as usize..(entry.offset + entry.size) as usize]);
        }
        buffer.clear();
        let path = self.root.join(std::ffi::OsStr::from_bytes(&entry.name));
        let unreadable = |error| SkipReason::Unreadable { error };
        let mut file = std::fs::File::open(path).map_err(unreadable)?;
        file.read_to_end(buffer).map_err(unreadable)?;
        Ok(buffer)
    }
}

/// Class numbers from `.cls` members are believed up to here.
const CLASSES_MAX: u32 = 1 << 20;

/// An image as met, before it has a class number.
struct Found {
    name: Box<[u8]>,
    offset: u64,
    size: u64,
    /// Where in the name the class stands.
    class: Option<(usize, usize)>,
}

struct Scan<'a> {
    progress: &'a Progress,
    found: Vec<Found>,
    /// What `.cls` members say, by WebDataset key.
    labels: HashMap<Vec<u8>, String>,
    skips: Vec<Skip>,
}

impl Scan<'_> {
    /// `above` are device and inode of the folders on the way here: a link back to one is a loop.
    fn folder(
        &mut self,
        folder: &Path,
        name: &mut Vec<u8>,
        above: &mut Vec<(u64, u64)>,
    ) -> Result<(), PackError> {
        let list = match std::fs::read_dir(folder) {
            Ok(list) => list,
            Err(error) if above.len() > 1 => {
                self.skips.push(Skip::new(name, &SkipReason::Unreadable { error }));
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
            self.skips.push(Skip::new(name, &SkipReason::Hidden));
            return Ok(());
        }
        // Follows links: data sets are often assembled from them.
        let meta = match std::fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) => {
                self.skips.push(Skip::new(name, &SkipReason::Unreadable { error }));
                return Ok(());
            }
        };
        let place = (meta.dev(), meta.ino());
        if meta.is_dir() && above.contains(&place) {
            self.skips.push(Skip::new(name, &SkipReason::Loop));
        } else if meta.is_dir() {
            above.push(place);
            self.folder(path, name, above)?;
            above.pop();
        } else if !meta.is_file() || !is_image(name) {
            self.skips.push(Skip::new(name, &SkipReason::OtherFile));
        } else {
            // As torchvision's ImageFolder: the first folder is the class, whatever lies below.
            let class = name.iter().position(|byte| *byte == b'/').map(|slash| (0, slash));
            self.image(name, 0, meta.len(), class);
        }
        Ok(())
    }

    fn image(&mut self, name: &[u8], offset: u64, size: u64, class: Option<(usize, usize)>) {
        self.found.push(Found { name: name.into(), offset, size, class });
        self.progress.scanned.fetch_add(1, Ordering::Relaxed);
    }

    fn tar(&mut self, map: &Map) -> Result<(), PackError> {
        for member in Walker::new(map.bytes()) {
            let member = member.map_err(|error| ShardError::tar(map.path(), error))?;
            if member.kind == Kind::Directory {
                continue;
            }
            let name = clean(&member.name);
            if member.kind == Kind::File && key::extension(&name).eq_ignore_ascii_case(b"tar") {
                self.nested(&name, member.data, member.payload);
            } else {
                self.member(&name, &member.name, member.kind, member.data, member.payload);
            }
        }
        Ok(())
    }

    /// A tar inside a tar: its name is the class. One that is broken loses its rest, not the others'.
    fn nested(&mut self, name: &[u8], data: u64, bytes: &[u8]) {
        let base = name.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        let stem = &name[base..name.len() - 4];
        for member in Walker::new(bytes) {
            let member = match member {
                Ok(member) => member,
                Err(error) => {
                    return self.skips.push(Skip::new(name, &SkipReason::Tar { error }));
                }
            };
            if member.kind == Kind::Directory {
                continue;
            }
            let inner = [stem, b"/", clean(&member.name).as_slice()].concat();
            if member.kind != Kind::File || !is_image(&inner) {
                self.skips.push(Skip::new(&inner, &SkipReason::OtherFile));
            } else if hidden(&inner) {
                self.skips.push(Skip::new(&inner, &SkipReason::Hidden));
            } else {
                let size = member.payload.len() as u64;
                // Cannot wrap: the inner archive lies inside the outer.
                self.image(&inner, data + member.data, size, Some((0, stem.len())));
            }
        }
    }

    fn member(&mut self, name: &[u8], raw: &[u8], kind: Kind, data: u64, payload: &[u8]) {
        if kind == Kind::File && key::extension(name) == b"cls" {
            let label = String::from_utf8_lossy(payload.trim_ascii()).into_owned();
            self.labels.insert(webdataset_key(name).to_vec(), label);
        } else if hidden(name) {
            self.skips.push(Skip::new(raw, &SkipReason::Hidden));
        } else if kind != Kind::File || !is_image(name) {
            self.skips.push(Skip::new(raw, &SkipReason::OtherFile));
        } else {
            let end = name.iter().rposition(|byte| *byte == b'/');
            let class = end.map(|end| {
                (name[..end].iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1), end)
            });
            self.image(name, data, payload.len() as u64, class);
        }
    }
}

/// Without a leading `./` or `/`.
fn clean(name: &[u8]) -> Vec<u8> {
    let mut rest = name;
    while let Some(shorter) = rest.strip_prefix(b"./").or_else(|| rest.strip_prefix(b"/")) {
        rest = shorter;
    }
    rest.to_vec()
}

fn hidden(name: &[u8]) -> bool {
    name.split(|byte| *byte == b'/')
        .any(|part| part.starts_with(b".") && part != b".." && part != b".")
}

/// Whether a file is an image by its name.
pub(crate) fn is_image(name: &[u8]) -> bool {
    let extension = key::extension(name);
    EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known.as_bytes()))
}

/// The name up to the first dot of its last component.
fn webdataset_key(name: &[u8]) -> &[u8] {
    match std::str::from_utf8(name).ok().and_then(index::split_name) {
        Some((key, _)) => key.as_bytes(),
        None => name,
    }
}
