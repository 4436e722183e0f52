//! Scanning: lists the images of a source, before they get class numbers and keys.
//!
//! A tar is listed as `tar -x` would unpack it. A folder may hold pictures, tars, or both.

mod folder;
mod inside;

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use self::folder::Folder;
use self::inside::Inside;
use super::source::{Archive, NO_ARCHIVE};
use super::{PackError, Progress, Skip, SkipReason, key};
use crate::format::ShardError;
use crate::format::manifest::Manifest;
use crate::format::map::Map;
use crate::format::name::{is_archive, is_hidden, stem};

/// Folders that systems and programs leave: they are no class when there is nothing in them.
const LITTER: [&[u8]; 6] = [
    b"lost+found",
    b"__MACOSX",
    b"$RECYCLE.BIN",
    b"System Volume Information",
    b"@eaDir",
    b"__pycache__",
];

/// A picture as met, before it has a class number.
#[derive(Debug)]
pub(super) struct Found {
    /// Path in the source.
    pub(super) name: Box<[u8]>,
    /// The tar it lies in, or [`NO_ARCHIVE`].
    pub(super) archive: u32,
    pub(super) offset: u64,
    pub(super) size: u64,
    /// Where in the name the class stands.
    pub(super) class: Option<(usize, usize)>,
    /// What its `.cls` neighbour says.
    pub(super) label: Option<Box<str>>,
}

impl Found {
    /// The class by its folder.
    pub(super) fn folder(&self) -> Option<String> {
        self.class.map(|(start, end)| key::readable(&self.name[start..end]))
    }
}

/// What is known of a source while it is listed.
pub(super) struct Scan<'a> {
    progress: &'a Progress,
    pub(super) found: Vec<Found>,
    /// Class folders without a picture that was found: empty, or with what cannot be read.
    pub(super) empty_classes: BTreeSet<String>,
    /// Class names by the manifest beside a folder of shards.
    pub(super) class_names: Vec<String>,
    pub(super) archives: Vec<Archive>,
    pub(super) skips: Vec<Skip>,
    /// Files that are no pictures by their names, so far.
    others: u64,
    /// Notices for the user.
    pub(super) notes: Vec<String>,
    /// Where the one tar that is the source is broken.
    pub(super) broken: Option<ShardError>,
}

/// Lists a folder, a tar or a folder of tars.
pub(super) fn root<'a>(root: &Path, progress: &'a Progress) -> Result<Scan<'a>, PackError> {
    let meta = std::fs::metadata(root).map_err(ShardError::io(root, "open"))?;
    let mut scan = Scan {
        progress,
        found: Vec::new(),
        empty_classes: BTreeSet::new(),
        class_names: Vec::new(),
        archives: Vec::new(),
        skips: Vec::new(),
        others: 0,
        notes: Vec::new(),
        broken: None,
    };
    if meta.is_dir() {
        let mut tars = Vec::new();
        let mut folder = Folder { scan: &mut scan, tars: &mut tars };
        folder.list(root, &mut Vec::new(), &mut vec![(meta.dev(), meta.ino())])?;
        tars.sort();
        scan.tars(root, tars);
    } else {
        scan.one_tar(root)?;
    }
    scan.found.sort_by(|a, b| (&a.name, order(a.archive)).cmp(&(&b.name, order(b.archive))));
    scan.settle_names();
    Ok(scan)
}

/// Files before tars, and these by their numbers.
fn order(archive: u32) -> u32 {
    archive.wrapping_add(1)
}

fn first_folder(name: &[u8]) -> Option<(usize, usize)> {
    name.iter().position(|byte| *byte == b'/').map(|slash| (0, slash))
}

/// The folder that a path lies in, as a range of the path.
fn last_folder(name: &[u8]) -> Option<(usize, usize)> {
    let end = name.iter().rposition(|byte| *byte == b'/')?;
    let start = name[..end].iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    Some((start, end))
}

/// A tar of a folder, listed.
struct Listed {
    /// Its name in the folder.
    name: Vec<u8>,
    archive: u32,
    inside: Inside,
}

/// What a tar's pictures are named and classed by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// Their paths in the tar, the folder they lie in.
    Paths,
    /// The tar's own name in front, which is the class.
    Class,
}

impl Scan<'_> {
    pub(super) fn skip(&mut self, name: &[u8], reason: &SkipReason) {
        self.skips.push(Skip::new(name, reason));
    }

    fn other(&mut self, name: &[u8]) {
        self.others += 1;
        let archive = is_archive(name);
        self.skip(name, if archive { &SkipReason::Archive } else { &SkipReason::OtherFile });
    }

    fn image(
        &mut self,
        name: &[u8],
        archive: u32,
        (offset, size): (u64, u64),
        class: Option<(usize, usize)>,
        label: Option<Box<str>>,
    ) {
        self.found.push(Found { name: name.into(), archive, offset, size, class, label });
        self.progress.scanned.fetch_add(1, Ordering::Relaxed);
    }

    /// The source is one tar.
    fn one_tar(&mut self, path: &Path) -> Result<(), PackError> {
        let map = Map::open(path)?;
        map.sequential();
        let mut inside = Inside::of(map.bytes());
        // Where the file shrank there are zeros, and zeros end an archive.
        map.check()?;
        self.broken = inside.broken.take().map(|error| ShardError::tar(path, error));
        let own = own_manifest(path.parent().unwrap_or(Path::new("")));
        let own = own.is_some_and(|manifests| lists(&manifests, path));
        self.add(0, &[], &inside, Reading::Paths, map.bytes());
        // Shuffled from here on.
        map.images();
        self.archives.push(Archive { path: path.to_path_buf(), map: Some(map), own });
        Ok(())
    }

    /// The tars of a folder: classes of pictures, or shards.
    fn tars(&mut self, root: &Path, tars: Vec<(Vec<u8>, PathBuf)>) {
        if tars.is_empty() {
            return;
        }
        let manifests = own_manifest(root).unwrap_or_default();
        let mut indexed = false;
        let mut listed = Vec::new();
        let mut maps = Vec::new();
        for (name, path) in tars {
            let opened = Map::open(&path).and_then(|map| {
                map.sequential();
                let inside = Inside::of(map.bytes());
                map.check().map(|()| (map, inside))
            });
            let (map, mut inside) = match opened {
                Ok(opened) => opened,
                Err(error) => {
                    let error = std::io::Error::other(error);
                    self.skip(&name, &SkipReason::Unreadable { error });
                    continue;
                }
            };
            if let Some(error) = inside.broken.take() {
                self.skip(&name, &SkipReason::Tar { error });
            } else if inside.pictures.is_empty()
                && inside.tars.is_empty()
                && inside.skips.is_empty()
            {
                self.other(&name);
            }
            indexed |= path.with_extension("idx").exists();
            let own = lists(&manifests, &path);
            let archive = self.archives.len() as u32;
            self.archives.push(Archive { path, map: None, own });
            // Only where a tar holds tars are its bytes read again.
            maps.push((!inside.tars.is_empty()).then_some(map));
            listed.push(Listed { name, archive, inside });
        }
        let reading = self.reading(root, &listed, indexed || !manifests.is_empty());
        if reading == Reading::Paths && !listed.is_empty() {
            self.class_names = class_names(&manifests);
        }
        for (Listed { name, archive, inside }, map) in listed.iter().zip(&maps) {
            let bytes = map.as_ref().map_or(&[][..], Map::bytes);
            let flat = reading == Reading::Class && (inside.flat() || name.contains(&b'/'));
            let reading = if flat { Reading::Class } else { Reading::Paths };
            self.add(*archive, stem(name), inside, reading, bytes);
        }
    }

    /// Whether tars are classes or shards, told to the user with the reason.
    fn reading(&mut self, root: &Path, tars: &[Listed], beside: bool) -> Reading {
        let full: Vec<&Listed> =
            tars.iter().filter(|tar| !tar.inside.pictures.is_empty()).collect();
        let count = full.len();
        if count == 0 {
            return Reading::Class;
        }
        let sampled = full.iter().filter(|tar| tar.inside.sampled()).count();
        let (reading, why) = if beside {
            (Reading::Paths, "shards, as the index or manifest beside them says".to_owned())
        } else if sampled * 2 >= count {
            (Reading::Paths, "shards: labels or texts lie beside their pictures".to_owned())
        } else if numbered(&full) {
            let why = "shards: their names are consecutive numbers, which name no class";
            (Reading::Paths, why.to_owned())
        } else {
            let folders = full.iter().filter(|tar| !tar.inside.flat()).count();
            let why = match folders {
                0 => "classes, named as the tars: no picture has a label or lies in a folder",
                _ => "classes: named as the tars, or as the folders in them where there are any",
            };
            (Reading::Class, why.to_owned())
        };
        let tars = if count == 1 { "1 tar is".to_owned() } else { format!("{count} tars are") };
        self.notes.push(format!("{}: {tars} read as {why}", root.display()));
        reading
    }

    /// Adds what a tar holds; `stem` is its own name, for [`Reading::Class`].
    fn add(&mut self, archive: u32, tar: &[u8], inside: &Inside, reading: Reading, bytes: &[u8]) {
        let shown = |path: &[u8]| match reading {
            Reading::Paths => path.to_vec(),
            Reading::Class => [tar, b"/", path].concat(),
        };
        for (path, offset, size) in &inside.pictures {
            let name = shown(path);
            let class = match reading {
                Reading::Paths => last_folder(&name),
                Reading::Class => first_folder(&name),
            };
            self.image(&name, archive, (*offset, *size), class, inside.label(path));
        }
        for path in &inside.others {
            self.other(&shown(path));
        }
        for (path, reason) in &inside.skips {
            self.skip(&shown(path), reason);
        }
        for (path, offset, size) in &inside.tars {
            // Inside the archive, as the walk has seen.
            let inner = &bytes[*offset as usize..(*offset + *size) as usize];
            self.nested(archive, path, *offset, inner);
        }
        let parent =
            |path: &[u8]| path[..path.iter().rposition(|b| *b == b'/').unwrap_or(0)].to_vec();
        match reading {
            Reading::Class
                if inside.pictures.is_empty()
                    && inside.others.is_empty()
                    && inside.tars.is_empty() =>
            {
                let class = tar.split(|byte| *byte == b'/').next().unwrap_or_default();
                self.empty_classes.insert(key::readable(class));
            }
            Reading::Class => {}
            Reading::Paths => {
                // An empty folder beside class folders is a class.
                let classes: BTreeSet<Vec<u8>> = inside
                    .pictures
                    .iter()
                    .filter_map(|(path, ..)| last_folder(path).map(|(_, end)| parent(&path[..end])))
                    .collect();
                let faulty = inside.skips.iter().filter(|(_, reason)| reason.is_fault());
                let faulty =
                    faulty.filter_map(|(path, _)| last_folder(path).map(|(_, end)| &path[..end]));
                let empty = inside.empty_folders.iter().map(Vec::as_slice);
                for folder in empty.chain(faulty).filter(|folder| classes.contains(&parent(folder)))
                {
                    let start =
                        folder.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
                    if !LITTER.contains(&&folder[start..]) && !is_hidden(folder) {
                        self.empty_classes.insert(key::readable(&folder[start..]));
                    }
                }
            }
        }
    }

    /// A tar inside a tar: its name is the class. One that is broken loses its rest, not the others'.
    fn nested(&mut self, archive: u32, name: &[u8], data: u64, bytes: &[u8]) {
        let base = name.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        let tar = stem(&name[base..]);
        let inside = Inside::of(bytes);
        let shown = |path: &[u8]| [tar, b"/", path].concat();
        for (path, offset, size) in &inside.pictures {
            // Cannot wrap: the inner archive lies inside the outer.
            let place = (data + offset, *size);
            self.image(&shown(path), archive, place, Some((0, tar.len())), None);
        }
        for path in inside.others.iter().chain(inside.tars.iter().map(|(path, ..)| path)) {
            self.other(&shown(path));
        }
        let faults = inside.broken.is_some() || inside.skips.iter().any(|(_, why)| why.is_fault());
        if faults || (inside.others.is_empty() && inside.tars.is_empty()) {
            self.empty_classes.insert(key::readable(tar));
        }
        for (path, reason) in inside.skips {
            self.skip(&shown(&path), &reason);
        }
        if let Some(error) = inside.broken {
            self.skip(name, &SkipReason::Tar { error });
        }
    }

    /// Of a file and a member of a tar with one path the file stays, as if the tar had been unpacked
    /// there before; of members of two tars both do, the later one below its tar's name.
    fn settle_names(&mut self) {
        let found = std::mem::take(&mut self.found);
        let mut kept: Vec<Found> = Vec::with_capacity(found.len());
        let mut moved = 0u64;
        for mut one in found {
            // Files come first, so that of each name the first stays what it is.
            let twice = |kept: &Vec<Found>| kept.last().is_some_and(|last| last.name == one.name);
            if one.archive == NO_ARCHIVE || !twice(&kept) {
                kept.push(one);
            } else if kept.last().is_some_and(|last| last.archive == NO_ARCHIVE) {
                self.skips.push(Skip::new(&one.name, &SkipReason::Replaced));
            } else {
                let tar = self.archives.get(one.archive as usize).map(|archive| &archive.path);
                let tar = tar.and_then(|path| path.file_stem()).unwrap_or_default().as_bytes();
                let shift = tar.len() + 1;
                // Sorted again below: `last` must stay the one with the plain name.
                one.name = [tar, b"/", &one.name[..]].concat().into();
                one.class = one.class.map(|(start, end)| (start + shift, end + shift));
                self.found.push(one);
                moved += 1;
            }
        }
        kept.append(&mut self.found);
        if moved > 0 {
            kept.sort_by(|a, b| (&a.name, a.archive).cmp(&(&b.name, b.archive)));
            self.notes.push(format!(
                "{moved} pictures have the path of another in another tar: theirs begin with the \
                 name of their tar"
            ));
        }
        self.found = kept;
    }
}

/// Whether the names of the tars are consecutive numbers behind one prefix, and no picture is named
/// by its tar, as ImageNet's are.
fn numbered(tars: &[&Listed]) -> bool {
    let split = |name: &[u8]| {
        let stem = stem(name);
        let digits = stem.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
        let (prefix, digits) = stem.split_at(stem.len() - digits);
        let number = std::str::from_utf8(digits).ok().and_then(|text| text.parse::<u64>().ok());
        number.map(|number| (prefix.to_vec(), number))
    };
    let names: Option<Vec<_>> = tars.iter().map(|tar| split(&tar.name)).collect();
    let Some(mut names) = names else { return false };
    names.sort();
    let consecutive = names
        .windows(2)
        .all(|pair| pair[0].0 == pair[1].0 && pair[0].1.checked_add(1) == Some(pair[1].1));
    let named_by_tar = |tar: &&Listed| {
        let base = tar.name.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        tar.inside.pictures.iter().all(|(path, ..)| {
            let rest = path.strip_prefix(stem(base));
            rest.is_some_and(|rest| rest.first().is_some_and(|byte| !byte.is_ascii_alphanumeric()))
        })
    };
    consecutive && !tars.iter().all(named_by_tar)
}

/// The manifests of `detco pack` in a folder, if there are any that can be read.
fn own_manifest(folder: &Path) -> Option<Vec<(PathBuf, Manifest)>> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    Manifest::all_in(folder).ok()
}

fn lists(manifests: &[(PathBuf, Manifest)], tar: &Path) -> bool {
    let name = tar.file_name().unwrap_or_default();
    let mut records = manifests.iter().flat_map(|(_, manifest)| &manifest.shards);
    records.any(|record| *record.name == *name)
}

/// The class names that all manifests give.
fn class_names(manifests: &[(PathBuf, Manifest)]) -> Vec<String> {
    let Some((_, first)) = manifests.first() else { return Vec::new() };
    let same = manifests.iter().all(|(_, other)| other.classes == first.classes);
    if same { first.classes.clone() } else { Vec::new() }
}
