//! Shards on a local file system: finds and opens what the user named.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::overlap::{self, Overlap};
use super::{Opened, Shard, Source, braces};
use crate::format::index::{IndexText, Table, shards_in};
use crate::format::manifest::{Manifest, STATE_FOLDER, ShardRecord};
use crate::format::map::Map;
use crate::format::name::is_picture;
use crate::format::{Blame, ShardError, SpecFault, StaleFault};
use crate::pipe::with_help;

/// Threads that open shards, at most: with more a disk only seeks more.
const OPENERS_MAX: usize = 8;

/// Names read in a folder without shards: enough to find an image among other files.
const NAMES_MAX: usize = 1000;
/// Class folders read in it.
const FOLDERS_MAX: usize = 10;

/// Opens what `spec` names; `notice` gets what is odd but not wrong.
pub(super) fn open(spec: &[String], notice: Option<fn(&str)>) -> Result<Opened, ShardError> {
    let mut paths = Vec::new();
    for one in spec {
        expand(one, &mut paths)?;
    }
    let mut seen = BTreeSet::new();
    for path in &paths {
        if !seen.insert(path) {
            let fault = SpecFault::Twice { shard: path.clone() };
            return Err(ShardError::Spec { spec: spec.join(" "), fault });
        }
    }
    let notices = Notices { tell: notice, index: AtomicBool::new(false) };
    let Manifests { classes, clash, mut records } = manifests(&paths, &notices)?;
    let jobs: Vec<(&Path, Option<ShardRecord>)> =
        paths.iter().map(|path| (path.as_path(), records.remove(path))).collect();
    let shards = open_all(&jobs, &notices)?;
    if let Some(text) = overlap::several(&shards) {
        notices.say(&text);
    }
    let digests = jobs.into_iter().map(|(_, record)| record.map(|record| record.sha256)).collect();
    Ok(Opened { shards, classes, clash, digests, remote: None })
}

/// The paths of shards for one argument of the user.
fn expand(spec: &str, paths: &mut Vec<PathBuf>) -> Result<(), ShardError> {
    let fail = |fault| ShardError::Spec { spec: spec.to_owned(), fault };
    // As it stands first: a name may hold braces or brackets.
    if Path::new(spec).exists() {
        return literal(Path::new(spec), paths).map_err(|why| why.into_error(fail));
    }
    let reason = |error: String| fail(SpecFault::Pattern { reason: error });
    let words = braces::expand(spec).map_err(reason)?;
    for word in words {
        if Path::new(&word).exists() {
            literal(Path::new(&word), paths).map_err(|why| why.into_error(fail))?;
        } else if word.contains(['*', '?', '[']) {
            let before = paths.len();
            for path in glob::glob(&word).map_err(|error| reason(error.to_string()))? {
                let path = path.map_err(|error| {
                    let path = error.path().to_path_buf();
                    ShardError::Io { path, action: "list", source: error.into() }
                })?;
                literal(&path, paths).map_err(|why| why.into_error(fail))?;
            }
            if paths.len() == before {
                return Err(fail(SpecFault::NoMatch));
            }
        } else {
            return Err(ShardError::Spec { spec: word, fault: SpecFault::Missing });
        }
    }
    Ok(())
}

/// Why [`literal`] failed.
enum Why {
    Spec(SpecFault),
    Shard(ShardError),
}

impl Why {
    fn into_error(self, spec: impl FnOnce(SpecFault) -> ShardError) -> ShardError {
        match self {
            Why::Spec(fault) => spec(fault),
            Why::Shard(error) => error,
        }
    }
}

fn literal(path: &Path, paths: &mut Vec<PathBuf>) -> Result<(), Why> {
    if !path.is_dir() {
        paths.push(path.to_path_buf());
        return Ok(());
    }
    let found = shards_in(path).map_err(Why::Shard)?;
    if path.join(STATE_FOLDER).exists() {
        return Err(Why::Spec(SpecFault::Unfinished));
    }
    if found.is_empty() {
        return Err(Why::Spec(if holds_images(path) {
            SpecFault::Images { folder: path.to_path_buf() }
        } else {
            holds_others(path).unwrap_or(SpecFault::Empty)
        }));
    }
    // The folder is the whole data set: what its manifest lists must be there.
    let manifests = Manifest::all_in(path).map_err(Why::Shard)?;
    if let Some(fault) = Manifest::incomplete(&manifests) {
        return Err(Why::Spec(fault));
    }
    for record in manifests.iter().flat_map(|(_, manifest)| &manifest.shards) {
        let shard = path.join(&record.name);
        if found.binary_search(&shard).is_err() {
            return Err(Why::Spec(SpecFault::Lost { shard }));
        }
    }
    paths.extend(found);
    Ok(())
}

/// Whether a folder or its class folders hold images, which someone forgot to pack. Reads only the first few
/// names and ignores errors, since an error is being reported already.
fn holds_images(folder: &Path) -> bool {
    let list = |folder: &Path| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).take(NAMES_MAX).collect::<Vec<_>>()
    };
    let images = |names: &[PathBuf]| {
        names.iter().any(|name| is_picture(name.as_os_str().as_encoded_bytes()) && name.is_file())
    };
    let names = list(folder);
    let mut folders = names.iter().filter(|name| name.is_dir()).take(FOLDERS_MAX);
    images(&names) || folders.any(|folder| images(&list(folder)))
}

/// The first by name of the files in a folder that data sets come in and that are no shards.
fn holds_others(folder: &Path) -> Option<SpecFault> {
    const KINDS: [(&[&str], &str); 4] = [
        (
            &[".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2"],
            "compressed: shards are read in place, decompress them first",
        ),
        (&[".parquet", ".arrow"], "a table of rows: `detco pack` takes image files and tars"),
        (&[".tfrecord", ".rec", ".beton", ".lmdb", ".mdb"], "another loader's format"),
        (&[".zip"], "a zip archive: unpack it and pack the images"),
    ];
    let entries = std::fs::read_dir(folder).ok()?.flatten().take(NAMES_MAX);
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names.into_iter().find_map(|name| {
        let low = name.to_ascii_lowercase();
        let known = KINDS.iter().find(|(ends, _)| ends.iter().any(|end| low.ends_with(end)));
        known.map(|(_, kind)| SpecFault::Others { name, kind })
    })
}

/// Reports oddities, each kind once.
struct Notices {
    tell: Option<fn(&str)>,
    /// Whether another program's index was reported.
    index: AtomicBool,
}

impl Notices {
    fn say(&self, text: &str) {
        if let Some(tell) = self.tell {
            tell(text);
        }
    }

    fn foreign_index(&self, index: &Path) {
        if !self.index.swap(true, Ordering::Relaxed) {
            self.say(&format!(
                "{}: an index of another program or version: the tar is walked",
                index.display()
            ));
        }
    }
}

#[derive(Default)]
struct Manifests {
    classes: Vec<String>,
    clash: Option<SpecFault>,
    records: BTreeMap<PathBuf, ShardRecord>,
}

/// The manifests beside the shards.
fn manifests(paths: &[PathBuf], notices: &Notices) -> Result<Manifests, ShardError> {
    let folders: BTreeSet<&Path> =
        paths.iter().map(|path| path.parent().unwrap_or(Path::new(""))).collect();
    let mut all = Manifests::default();
    let mut classes_of: Option<PathBuf> = None;
    let mut overlap = Overlap::default();
    let mut told = false;
    let several = folders.len() > 1;
    for folder in folders {
        let listed = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let found = Manifest::all_in(listed)?;
        let foreign = Manifest::foreign_in(listed)?.filter(|_| !told);
        if let Some(path) = foreign {
            told = true;
            notices.say(&format!("{}: a manifest of another program: not read", path.display()));
        }
        let any = !found.is_empty();
        for (path, manifest) in found {
            match &classes_of {
                Some(one) if all.classes != manifest.classes => {
                    // Training needs no classes: whoever does is told.
                    let (one, other) = (one.clone(), path.clone());
                    all.clash.get_or_insert(SpecFault::Classes { one, other });
                }
                Some(_) => {}
                None => {
                    all.classes = manifest.classes;
                    classes_of = Some(path.clone());
                }
            }
            if several {
                overlap.add(&path, manifest.shards.iter());
            }
            for record in manifest.shards {
                all.records.insert(folder.join(&record.name), record);
            }
        }
        let unlisted = paths.iter().find(|path| {
            path.parent().unwrap_or(Path::new("")) == folder && !all.records.contains_key(*path)
        });
        if let Some(shard) = unlisted.filter(|_| any) {
            let fault = SpecFault::Unlisted { shard: shard.clone() };
            return Err(ShardError::Spec { spec: listed.display().to_string(), fault });
        }
    }
    if all.clash.is_some() {
        all.classes.clear();
    }
    if let Some(text) = overlap::found(overlap) {
        notices.say(&text);
    }
    Ok(all)
}

fn open_all(
    jobs: &[(&Path, Option<ShardRecord>)],
    notices: &Notices,
) -> Result<Vec<Shard>, ShardError> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(OPENERS_MAX).min(jobs.len());
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let done = Mutex::new(Vec::with_capacity(jobs.len()));
    let open = || {
        let mut mine = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some((path, record)) = jobs.get(at) else { break };
            let opened = open_one(path, record.as_ref(), notices);
            failed.fetch_or(opened.is_err(), Ordering::Relaxed);
            mine.push((at, opened));
        }
        // A poisoned lock means that a sibling panicked; the scope passes that on.
        done.lock().unwrap_or_else(|poison| poison.into_inner()).extend(mine);
    };
    with_help(threads, &open);
    let mut done = done.into_inner().unwrap_or_else(|poison| poison.into_inner());
    // In order, so that of two faults the first in the data set is reported.
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, opened)| opened).collect()
}

fn open_one(
    path: &Path,
    record: Option<&ShardRecord>,
    notices: &Notices,
) -> Result<Shard, ShardError> {
    let map = Map::open(path)?;
    let found = table(&map, record, notices);
    // Where a shard shrank meanwhile there are zeros, and zeros end an archive.
    map.check()?;
    let (table, indexed) = found?;
    Ok(Shard { source: Source::Local(map), table, first: 0, indexed })
}

/// A shard's table of samples, and for a table from an index the file that is wrong if they disagree.
fn table(
    map: &Map,
    record: Option<&ShardRecord>,
    notices: &Notices,
) -> Result<(Table, Option<Blame>), ShardError> {
    let path = map.path();
    let index = path.with_extension("idx");
    let stale =
        |fault| ShardError::StaleIndex { index: index.clone(), shard: path.to_path_buf(), fault };
    let text = match std::fs::read(&index) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(ShardError::io(&index, "read")(error)),
    };
    let bytes = map.bytes().len() as u64;
    if let Some(record) = record.filter(|record| record.bytes != bytes) {
        let recorded = record.bytes;
        return Err(ShardError::Manifest {
            manifest: path.with_file_name("manifest.json"),
            fault: crate::format::ManifestFault::ShardSize {
                name: record.name.clone(),
                bytes,
                recorded,
            },
        });
    }
    let Some(text) = text else {
        return Ok((Table::walk(map)?, None));
    };
    if !Table::is_index(&text) {
        notices.foreign_index(&index);
        return Ok((Table::walk(map)?, None));
    }
    let blame = Blame::of(&text, record);
    if blame != Blame::Shard && older(&index, map) {
        // Copying a folder can bring this order about too, so the shard decides.
        let walked = IndexText::of(map.bytes()).map_err(|error| ShardError::tar(path, error))?;
        let walked = walked.finish();
        let lines =
            || text.split(|byte| *byte == b'\n').zip(walked.as_bytes().split(|b| *b == b'\n'));
        if walked.as_bytes() != text {
            let line = lines().take_while(|(one, other)| one == other).count() as u64 + 1;
            return Err(stale(StaleFault::Line { line }));
        }
    }
    // The check of the index touches the first and the last page. With read-ahead, megabytes would
    // come in with each: 6 ms a shard where the system reads 8 MB ahead.
    map.pages();
    let table = Table::read_all(&text, &index, map).map_err(|error| error.blame(blame))?;
    map.images();
    if let Some(record) = record.filter(|record| record.samples != table.len() as u64) {
        return Err(ShardError::Manifest {
            manifest: path.with_file_name("manifest.json"),
            fault: crate::format::ManifestFault::ShardSamples {
                name: record.name.clone(),
                samples: table.len() as u64,
                recorded: record.samples,
            },
        });
    }
    Ok((table, Some(blame)))
}

/// Whether the index was written before its shard.
fn older(index: &Path, map: &Map) -> bool {
    let index = index.metadata().and_then(|meta| meta.modified()).ok();
    index.zip(map.modified()).is_some_and(|(index, shard)| index < shard)
}
