//! Reads every byte of a folder of shards and names every fault.
//!
//! Checked: the tar's structure, every member's CRC-32C, every shard's SHA-256, the index against
//! what walking the shard gives, counts against the manifest, samples that cannot be used; and, where
//! that is asked for, whether every image can be decoded. A fault in one place does not hide those
//! behind it: where the manifest has the index's checksum, the index
//! says where to read on behind a broken header.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::index::{self, IndexText, Span, Table, shards_in};
use super::manifest::{Manifest, STATE_FOLDER, ShardRecord};
use super::map::Map;
use super::tar::{Kind, Walker};
use super::{Blame, ShardError, SpecFault, StaleFault};
use crate::decode::{Decoder, Image};
use crate::files::hex;
use crate::pipe::side_by_side;

/// A fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The file it is in.
    pub file: PathBuf,
    /// The member, where one is concerned.
    pub member: Option<String>,
    /// Byte offset in the file, where one is concerned.
    pub offset: Option<u64>,
    /// What is wrong.
    pub fault: String,
}

/// What [`folder`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Shards read.
    pub shards: u64,
    /// Samples seen.
    pub samples: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Members whose CRC-32C was compared with the manifest's.
    pub checked: u64,
    /// Whether there is a manifest.
    pub manifest: bool,
    /// Everything wrong, by file and offset.
    pub faults: Vec<Fault>,
    /// What is odd but not wrong: files of other programs.
    pub notes: Vec<String>,
}

impl Report {
    /// Adds another's shards to this one's.
    pub(crate) fn add(&mut self, one: Report) {
        self.shards += one.shards;
        self.samples += one.samples;
        self.bytes += one.bytes;
        self.checked += one.checked;
        self.faults.extend(one.faults);
        self.notes.extend(one.notes);
    }
}

/// The treatment of each image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Images {
    /// Read its bytes.
    #[default]
    Read,
    /// Decode all of it, as training would.
    Decode,
}

/// Verifies all shards of a folder on `workers` threads, without decoding their images; `read` counts
/// bytes as they are read.
///
/// # Errors
///
/// The folder cannot be listed, or is a file. Whatever is wrong with the files is a [`Fault`].
pub fn folder(folder: &Path, workers: usize, read: &AtomicU64) -> Result<Report, ShardError> {
    folder_with(folder, Images::Read, workers, read)
}

/// As [`folder`], with a choice of decoding the images.
///
/// # Errors
///
/// As [`folder`].
pub fn folder_with(
    folder: &Path,
    images: Images,
    workers: usize,
    read: &AtomicU64,
) -> Result<Report, ShardError> {
    let mut report = Report::default();
    if folder.is_file() {
        let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty());
        let fault = SpecFault::NotFolder { folder: parent.unwrap_or(Path::new(".")).into() };
        return Err(ShardError::Spec { spec: folder.display().to_string(), fault });
    }
    let shards = shards_in(folder)?;
    if let Some(path) = Manifest::foreign_in(folder)? {
        let note = "a manifest of another program: not read";
        report.notes.push(format!("{}: {note}", path.display()));
    }
    let unfinished = folder.join(STATE_FOLDER);
    let mut records: Vec<(PathBuf, Option<ShardRecord>)> =
        shards.into_iter().map(|path| (path, None)).collect();
    match Manifest::all_in(folder) {
        Ok(manifests) => {
            report.manifest = !manifests.is_empty();
            // Of a run that goes on, parts are missing as a matter of course: that is told below.
            if let Some(fault) = Manifest::incomplete(&manifests).filter(|_| !unfinished.exists()) {
                report.faults.push(plain(folder, &fault.to_string()));
            }
            join(folder, manifests, &mut records, &mut report);
        }
        Err(error) => report.faults.push(fault_of(folder, &error)),
    }
    if unfinished.exists() {
        let text = "packing has not finished: go on with `detco pack --resume`";
        report.faults.push(plain(&unfinished, text));
    }
    if records.is_empty() {
        report.faults.push(plain(folder, "no .tar in this folder"));
    }
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let total = Mutex::new(report);
    let started = side_by_side(workers.clamp(1, records.len().max(1)), &stop, || {
        while !stop.load(Ordering::Relaxed) {
            let Some((path, record)) = records.get(next.fetch_add(1, Ordering::Relaxed)) else {
                break;
            };
            let one = shard(path, record.as_ref(), images, read);
            // A poisoned lock means that a sibling panicked; its report still counts.
            total.lock().unwrap_or_else(|poison| poison.into_inner()).add(one);
        }
    });
    started.map_err(|source| ShardError::Thread { source })?;
    let mut report = total.into_inner().unwrap_or_else(|poison| poison.into_inner());
    report.faults.sort_by(|a, b| (&a.file, a.offset).cmp(&(&b.file, b.offset)));
    report.notes.sort();
    Ok(report)
}

/// Pairs shards with their records; a shard or record without the other is a fault.
fn join(
    folder: &Path,
    manifests: Vec<(PathBuf, Manifest)>,
    records: &mut [(PathBuf, Option<ShardRecord>)],
    report: &mut Report,
) {
    if manifests.is_empty() {
        return;
    }
    for (path, manifest) in manifests {
        for record in manifest.shards {
            let shard = folder.join(&record.name);
            match records.iter_mut().find(|(path, _)| *path == shard) {
                Some((_, slot)) if slot.is_none() => *slot = Some(record),
                Some(_) => report.faults.push(plain(&path, "two manifests list one shard")),
                None => report.faults.push(plain(&shard, "in the manifest but not in the folder")),
            }
        }
    }
    for (path, _) in records.iter().filter(|(_, record)| record.is_none()) {
        report.faults.push(plain(path, "not in the manifest beside it"));
    }
}

pub(crate) fn shard(
    path: &Path,
    record: Option<&ShardRecord>,
    images: Images,
    read: &AtomicU64,
) -> Report {
    let mut report = Report { shards: 1, ..Report::default() };
    let map = match Map::open(path) {
        Ok(map) => map,
        Err(error) => {
            report.faults.push(fault_of(path, &error));
            return report;
        }
    };
    map.sequential();
    let bytes = map.bytes();
    report.bytes = bytes.len() as u64;
    let mut text = IndexText::default();
    let index = Index::read(path, record);
    let mut walker = Walker::new(bytes);
    let mut members = 0usize;
    let mut whole = true;
    while let Some(member) = walker.next() {
        let member = match member {
            Ok(member) => member,
            Err(error) => {
                whole = false;
                let broken = error.offset;
                report.faults.push(fault_of(path, &ShardError::tar(path, error)));
                // A sound index knows where the members behind this one lie.
                let Some((position, start)) = index.after(broken) else { break };
                (walker, members) = (Walker::at(bytes, start), position);
                continue;
            }
        };
        if member.kind != Kind::File {
            continue;
        }
        let name = String::from_utf8_lossy(&member.name);
        text.push(&name, Span { offset: member.data, size: member.payload.len() as u64 });
        if let Some(expected) = record.and_then(|record| Manifest::crc_of(record, members)) {
            report.checked += 1;
            let found = crc32c::crc32c(member.payload);
            if found != expected {
                report.faults.push(Fault {
                    file: path.to_path_buf(),
                    member: Some(name.into_owned()),
                    offset: Some(member.data),
                    fault: format!("CRC-32C is {found:08x}, the manifest says {expected:08x}"),
                });
            }
        }
        members += 1;
    }
    report.samples = text.samples();
    match Table::walk(&map) {
        Ok(table) => {
            table.bad().for_each(|at| {
                let fault = table.fault(at).zip(table.get(at));
                report.faults.extend(fault.map(|((offset, fault), entry)| Fault {
                    file: path.to_path_buf(),
                    member: Some(entry.key.to_owned()),
                    offset: Some(offset),
                    fault: fault.to_string(),
                }));
            });
            if images == Images::Decode {
                decode(&map, &table, &mut report);
            }
        }
        // That the tar is broken is said already.
        Err(ShardError::Tar { .. }) => {}
        Err(error) => report.faults.push(fault_of(path, &error)),
    }
    index.check(&map, &text.finish(), whole, &mut report);
    if let Some(record) = record {
        check_record(bytes, record, members as u64, path, &mut report);
    }
    if let Err(error) = map.check() {
        report.faults.push(fault_of(path, &error));
    }
    read.fetch_add(report.bytes, Ordering::Relaxed);
    report
}

/// Decodes the image of every sample.
fn decode(map: &Map, table: &Table, report: &mut Report) {
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    let good = (0..table.len()).filter(|position| table.fault(*position).is_none());
    for entry in good.filter_map(|position| table.get(position)) {
        let span = entry.image;
        // The table was made of this very map.
        let bytes = &map.bytes()[span.offset as usize..][..span.size as usize];
        if let Err(error) = decoder.decode(bytes, &mut image) {
            report.faults.push(Fault {
                file: map.path().to_path_buf(),
                member: Some(entry.key.to_owned()),
                offset: Some(span.offset),
                fault: format!("cannot be decoded: {error}"),
            });
        }
    }
}

/// The index beside a shard, if there is one.
struct Index {
    path: PathBuf,
    text: std::io::Result<Vec<u8>>,
    /// Which of the two is wrong if it and the shard disagree.
    blame: Blame,
    /// The ends of the members, if the index is the one in the manifest.
    ends: Vec<u64>,
}

impl Index {
    fn read(shard: &Path, record: Option<&ShardRecord>) -> Index {
        let path = shard.with_extension("idx");
        let text = std::fs::read(&path);
        let blame = text.as_ref().map_or(Blame::Either, |text| Blame::of(text, record));
        let known = text.as_ref().ok().filter(|_| blame == Blame::Shard);
        let ends = known.map_or_else(Vec::new, |text| index::ends(text));
        Index { path, text, blame, ends }
    }

    /// The member behind the one at an offset: its position in the shard, and where it starts.
    fn after(&self, offset: u64) -> Option<(usize, u64)> {
        let broken = self.ends.partition_point(|end| *end <= offset);
        let end = *self.ends.get(broken).filter(|end| **end > offset)?;
        (broken + 1 < self.ends.len()).then_some((broken + 1, end))
    }

    /// Compares the index with the result of walking the shard, up to its end or to a fault.
    fn check(&self, map: &Map, expected: &str, whole: bool, report: &mut Report) {
        let text = match &self.text {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => {
                return report.faults.push(plain(&self.path, &format!("cannot be read: {error}")));
            }
        };
        if text == expected.as_bytes() {
            return;
        }
        if !Table::is_index(text) {
            let note = "an index of another program or version: not compared with the shard";
            return report.notes.push(format!("{}: {note}", self.path.display()));
        }
        let (found, walked) = (after_first_line(text), after_first_line(expected.as_bytes()));
        let agrees = found.starts_with(walked.strip_suffix(b"\n").unwrap_or(walked));
        if !whole && (self.blame == Blame::Shard || agrees) {
            return; // the shard is broken, and that is said already
        }
        let shard = map.path();
        let error = match Table::read_all(text, &self.path, map) {
            Err(ShardError::Disagree { fault, .. }) => self.differs(shard, fault),
            Err(error) => error,
            Ok(_) => {
                let expected = expected.as_bytes().split(|byte| *byte == b'\n');
                let lines = text.split(|byte| *byte == b'\n').zip(expected);
                let same = lines.take_while(|(found, expected)| found == expected).count();
                self.differs(shard, StaleFault::Line { line: same as u64 + 1 })
            }
        };
        report.faults.push(fault_of(&self.path, &error));
    }

    /// The shard was walked, so that an index no manifest vouches for is the wrong one of the two.
    fn differs(&self, shard: &Path, fault: StaleFault) -> ShardError {
        let (index, shard) = (self.path.clone(), shard.to_path_buf());
        match self.blame {
            Blame::Shard => ShardError::Damaged { shard, fault },
            Blame::Either | Blame::Index => ShardError::StaleIndex { index, shard, fault },
        }
    }
}

fn after_first_line(text: &[u8]) -> &[u8] {
    let end = text.iter().position(|byte| *byte == b'\n').map_or(text.len(), |end| end + 1);
    &text[end..]
}

fn check_record(
    bytes: &[u8],
    record: &ShardRecord,
    members: u64,
    path: &Path,
    report: &mut Report,
) {
    let mut differ = |what: &str, found: &str, expected: &str| {
        if found != expected {
            let text = format!("{what}: {found}, the manifest says {expected}");
            report.faults.push(plain(path, &text));
        }
    };
    differ("bytes", &bytes.len().to_string(), &record.bytes.to_string());
    differ("members", &members.to_string(), &record.members.to_string());
    differ("samples", &report.samples.to_string(), &record.samples.to_string());
    differ("SHA-256", &hex(&Sha256::digest(bytes)), &record.sha256);
    let index = path.with_extension("idx");
    match std::fs::read(&index) {
        Ok(text) => {
            let found = format!("{:08x}", crc32c::crc32c(&text));
            if found != record.index_crc32c {
                let text = format!("CRC-32C: {found}, the manifest says {}", record.index_crc32c);
                report.faults.push(plain(&index, &text));
            }
        }
        Err(error) => report.faults.push(plain(&index, &format!("cannot be read: {error}"))),
    }
}

fn plain(file: &Path, fault: &str) -> Fault {
    Fault { file: file.to_path_buf(), member: None, offset: None, fault: fault.to_owned() }
}

pub(crate) fn fault_of(file: &Path, error: &ShardError) -> Fault {
    let (file, member, offset, fault) = match error {
        ShardError::Tar { shard, error } => {
            (shard, None, Some(error.offset), error.fault.to_string())
        }
        ShardError::Sample { shard, key, offset, fault } => {
            (shard, Some(key.clone()), Some(*offset), fault.to_string())
        }
        ShardError::Index { index, line, fault } => {
            (index, None, None, format!("line {line}: {fault}"))
        }
        ShardError::StaleIndex { index, fault, .. } => {
            (index, None, None, format!("stale index: {fault}"))
        }
        ShardError::Disagree { index, fault, .. } => {
            (index, None, None, format!("shard damaged or index stale: {fault}"))
        }
        ShardError::Damaged { shard, fault } => (shard, None, None, format!("damaged: {fault}")),
        ShardError::Manifest { manifest, fault } => (manifest, None, None, fault.to_string()),
        ShardError::Io { path, action, source } => {
            (path, None, None, format!("cannot {action} it: {source}"))
        }
        ShardError::Changed { shard, fault } => {
            (shard, None, None, format!("changed while it was being read: {fault}"))
        }
        other => return plain(file, &other.to_string()),
    };
    Fault { file: file.clone(), member, offset, fault }
}
