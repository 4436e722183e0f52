//! `manifest.json`: what a folder of shards holds and how it came to be.
//!
//! One file, or one for each part when several machines packed (`manifest-00001-of-00004.json`).
//! A manifest is believed only where it adds up; a version this program does not know is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{ShardError, SpecFault};
use crate::files::write_atomically;

/// The format version this program writes and reads.
pub const FORMAT: u32 = 1;

/// Folder among the shards that holds what `detco pack --resume` needs; its presence says that the
/// data set is not finished.
pub const STATE_FOLDER: &str = ".pack";

/// What can be wrong with a manifest.
#[derive(Debug, Error)]
pub enum ManifestFault {
    /// No JSON, or not of the expected shape.
    #[error("not a manifest: {0}")]
    Json(#[source] serde_json::Error),
    /// Another version.
    #[error("format version {found}, this program reads {FORMAT}")]
    Version {
        /// The version found.
        found: u64,
    },
    /// A total that is not the sum of its shards.
    #[error("it says {total} {what}, which add up to {sum}")]
    Sum {
        /// What was added.
        what: &'static str,
        /// The total by the manifest.
        total: u64,
        /// The sum over its parts.
        sum: u64,
    },
    /// A shard name that is a path, empty or out of order.
    #[error("shard name `{name}` is not a plain file name in ascending order")]
    Name {
        /// The name.
        name: String,
    },
    /// A checksum of the wrong length or with strange characters.
    #[error("shard `{name}`: `{field}` is not {digits} hex digits")]
    Hex {
        /// The shard.
        name: String,
        /// The field.
        field: &'static str,
        /// Digits expected.
        digits: u64,
    },
    /// Members and samples that cannot go together.
    #[error("shard `{name}`: {members} members cannot be {samples} samples of {each}")]
    Members {
        /// The shard.
        name: String,
        /// Members by the manifest.
        members: u64,
        /// Samples by the manifest.
        samples: u64,
        /// Members a sample.
        each: u64,
    },
    /// A class listed twice.
    #[error("class `{class}` is listed twice")]
    Class {
        /// The class.
        class: String,
    },
    /// Another number of counts than of classes.
    #[error("{names} classes, but {counts} counts of their samples")]
    ClassSamples {
        /// Number of classes.
        names: u64,
        /// Number of counts.
        counts: u64,
    },
    /// A shard of another size than recorded.
    #[error("shard `{name}` has {bytes} bytes, {recorded} are recorded")]
    ShardSize {
        /// The shard.
        name: String,
        /// Its size.
        bytes: u64,
        /// The size in the manifest.
        recorded: u64,
    },
    /// A shard with other samples than recorded.
    #[error("shard `{name}` has {samples} samples, {recorded} are recorded")]
    ShardSamples {
        /// The shard.
        name: String,
        /// Its samples.
        samples: u64,
        /// The samples in the manifest.
        recorded: u64,
    },
    /// A part that is none.
    #[error("part {number} of {of} is impossible")]
    Part {
        /// Number of the part.
        number: u32,
        /// Number of parts.
        of: u32,
    },
}

/// The part of a data set that one run packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Which part, from 1.
    pub number: u32,
    /// Of how many.
    pub of: u32,
}

impl Part {
    /// Everything.
    pub const WHOLE: Part = Part { number: 1, of: 1 };

    /// The name of a file that each part has one of: `manifest.json`, `manifest-00001-of-00004.json`.
    pub fn file_name(self, stem: &str, extension: &str) -> String {
        match self.of {
            1 => format!("{stem}.{extension}"),
            of => format!("{stem}-{:05}-of-{of:05}.{extension}", self.number),
        }
    }

    /// The part whose file [`Part::file_name`] names so.
    pub(crate) fn of_file(name: &str, stem: &str, extension: &str) -> Option<Part> {
        let rest = name.strip_prefix(stem)?.strip_suffix(extension)?.strip_suffix('.')?;
        if rest.is_empty() {
            return Some(Part::WHOLE);
        }
        let (number, of) = numbers(rest)?;
        Some(Part { number: number.parse().ok()?, of: of.parse().ok()? })
    }
}

/// A shard, as its manifest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRecord {
    /// File name, without a folder.
    pub name: String,
    /// Samples in it.
    pub samples: u64,
    /// Members in it: one or two a sample.
    pub members: u64,
    /// Bytes of the tar.
    pub bytes: u64,
    /// SHA-256 of the tar, 64 hex digits.
    pub sha256: String,
    /// CRC-32C of the index beside it, 8 hex digits.
    pub index_crc32c: String,
    /// CRC-32C of each member's payload in order, 8 hex digits each, nothing between.
    pub crc32c: String,
}

/// What the manifest says. Options are kept as JSON: they are for people and for `--resume`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format version, [`FORMAT`].
    pub format: u32,
    /// Samples in all shards.
    pub samples: u64,
    /// Bytes of all shards.
    pub bytes: u64,
    /// Members a sample has: 1 (image), 2 (image and class).
    pub members_per_sample: u64,
    /// The part this run packed.
    pub part: Part,
    /// SHA-256 over keys and sizes of all source images, whatever the part.
    pub source_sha256: String,
    /// The exact options.
    pub options: serde_json::Value,
    /// Class names; a `.cls` member is a position in this list. Empty when there are no classes.
    pub classes: Vec<String>,
    /// Samples of each class in this part, in the order of `classes`.
    pub class_samples: Vec<u64>,
    /// What was found in the images, by name.
    pub oddities: BTreeMap<String, u64>,
    /// Files that were skipped: each is a line of `skipped.jsonl`.
    pub skipped: u64,
    /// The shards in order.
    pub shards: Vec<ShardRecord>,
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u64,
}

impl Manifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    ///
    /// It cannot be read, is of another version, or does not add up.
    pub fn read(path: &Path) -> Result<Manifest, ShardError> {
        let text = std::fs::read(path).map_err(ShardError::io(path, "read"))?;
        Manifest::parse(&text)
            .map_err(|fault| ShardError::Manifest { manifest: path.to_path_buf(), fault })
    }

    /// Reads and checks the text of a manifest.
    ///
    /// # Errors
    ///
    /// It is no manifest, is of another version, or does not add up.
    pub fn parse(text: &[u8]) -> Result<Manifest, ManifestFault> {
        // The version first: another version may have other fields.
        let FormatOnly { format } = serde_json::from_slice(text).map_err(ManifestFault::Json)?;
        if format != u64::from(FORMAT) {
            return Err(ManifestFault::Version { found: format });
        }
        let manifest: Manifest = serde_json::from_slice(text).map_err(ManifestFault::Json)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Whether a text claims to be a manifest of this program's, of whatever version and however
    /// damaged; other programs put a `manifest.json` beside their shards as well.
    pub fn is_ours(text: &[u8]) -> bool {
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text).trim_ascii_start();
        let inside = text.strip_prefix(b"{").map(<[u8]>::trim_ascii_start);
        // The first field that it writes.
        if inside.is_some_and(|inside| inside.starts_with(b"\"format\"")) {
            return true;
        }
        // Written anew by another program, its fields are in another order.
        let value: Option<serde_json::Value> = serde_json::from_slice(text).ok();
        value.is_some_and(|value| {
            value.get("members_per_sample").is_some() && value.get("source_sha256").is_some()
        })
    }

    fn check(&self) -> Result<(), ManifestFault> {
        let Part { number, of } = self.part;
        if number == 0 || number > of {
            return Err(ManifestFault::Part { number, of });
        }
        let mut classes = BTreeSet::new();
        if let Some(class) = self.classes.iter().find(|class| !classes.insert(class.as_str())) {
            return Err(ManifestFault::Class { class: class.clone() });
        }
        if self.classes.len() != self.class_samples.len() {
            let (names, counts) = (self.classes.len() as u64, self.class_samples.len() as u64);
            return Err(ManifestFault::ClassSamples { names, counts });
        }
        let mut before = "";
        for shard in &self.shards {
            let name = shard.name.as_str();
            if name.is_empty() || name <= before || name.contains(['/', '\\', '\0']) || name == ".."
            {
                return Err(ManifestFault::Name { name: name.to_owned() });
            }
            before = name;
            let each = self.members_per_sample;
            if shard.samples.checked_mul(each) != Some(shard.members) || !(1..=2).contains(&each) {
                let (members, samples) = (shard.members, shard.samples);
                return Err(ManifestFault::Members {
                    name: name.to_owned(),
                    members,
                    samples,
                    each,
                });
            }
            let hex = |field, digits: Option<u64>, text: &str| {
                let digits = digits.unwrap_or(u64::MAX);
                let plain = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
                match plain && text.len() as u64 == digits {
                    true => Ok(()),
                    false => Err(ManifestFault::Hex { name: name.to_owned(), field, digits }),
                }
            };
            hex("sha256", Some(64), &shard.sha256)?;
            hex("index_crc32c", Some(8), &shard.index_crc32c)?;
            hex("crc32c", shard.members.checked_mul(8), &shard.crc32c)?;
        }
        let add = |what, total: u64, count: fn(&ShardRecord) -> u64| {
            let sum = self.shards.iter().map(count).fold(0, u64::saturating_add);
            if sum == total { Ok(()) } else { Err(ManifestFault::Sum { what, total, sum }) }
        };
        let sum = self.class_samples.iter().fold(0, |sum: u64, count| sum.saturating_add(*count));
        if !self.classes.is_empty() && sum != self.samples {
            let (what, total) = ("samples in all classes", self.samples);
            return Err(ManifestFault::Sum { what, total, sum });
        }
        add("samples", self.samples, |shard| shard.samples)?;
        add("bytes", self.bytes, |shard| shard.bytes)
    }

    /// Writes the manifest into a folder, atomically. Returns its path.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn write(&self, folder: &Path) -> Result<PathBuf, ShardError> {
        let path = folder.join(self.part.file_name("manifest", "json"));
        let mut text = serde_json::to_vec_pretty(self).map_err(|error| ShardError::Manifest {
            manifest: path.clone(),
            fault: ManifestFault::Json(error),
        })?;
        text.push(b'\n');
        write_atomically(&path, &text)?;
        Ok(path)
    }

    /// The manifests of a folder, in order of their parts; none for foreign shards, whatever lies
    /// beside them under the name of a manifest.
    ///
    /// # Errors
    ///
    /// The folder or a manifest cannot be read.
    pub fn all_in(folder: &Path) -> Result<Vec<(PathBuf, Manifest)>, ShardError> {
        let mut found = Vec::new();
        for path in Manifest::named_in(folder)? {
            let text = std::fs::read(&path).map_err(ShardError::io(&path, "read"))?;
            if Manifest::is_ours(&text) {
                let fault = |fault| ShardError::Manifest { manifest: path.clone(), fault };
                found.push((path.clone(), Manifest::parse(&text).map_err(fault)?));
            }
        }
        Ok(found)
    }

    /// A file of a folder that has the name of a manifest and is another program's.
    ///
    /// # Errors
    ///
    /// The folder or the file cannot be read.
    pub fn foreign_in(folder: &Path) -> Result<Option<PathBuf>, ShardError> {
        for path in Manifest::named_in(folder)? {
            let text = std::fs::read(&path).map_err(ShardError::io(&path, "read"))?;
            if !Manifest::is_ours(&text) {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// The files of a folder that have the name of a manifest, sorted.
    fn named_in(folder: &Path) -> Result<Vec<PathBuf>, ShardError> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(ShardError::io(folder, "list"))? {
            let entry = entry.map_err(ShardError::io(folder, "list"))?;
            if entry.file_name().to_str().is_some_and(Manifest::is_name) {
                found.push(entry.path());
            }
        }
        found.sort();
        Ok(found)
    }

    /// Whether a file of this name is a manifest: `manifest.json`, `manifest-00001-of-00004.json`.
    pub fn is_name(name: &str) -> bool {
        let rest = name.strip_prefix("manifest").and_then(|rest| rest.strip_suffix(".json"));
        rest.is_some_and(|rest| rest.is_empty() || numbers(rest).is_some())
    }

    /// What keeps the parts of a folder from being one data set: another total, or one is missing.
    pub(crate) fn incomplete<P: AsRef<Path>>(manifests: &[(P, Manifest)]) -> Option<SpecFault> {
        let (path, Manifest { part: Part { of, .. }, .. }) = manifests.first()?;
        if let Some((other, _)) = manifests.iter().find(|(_, other)| other.part.of != *of) {
            let (one, other) = (path.as_ref().to_path_buf(), other.as_ref().to_path_buf());
            return Some(SpecFault::Totals { one, other });
        }
        let there: BTreeSet<u32> = manifests.iter().map(|(_, one)| one.part.number).collect();
        let missing = (1..=*of).find(|number| !there.contains(number))?;
        Some(SpecFault::Part { missing, of: *of })
    }

    /// The CRC-32C of a shard's member, by position in the shard. `None` beyond its members.
    pub fn crc_of(record: &ShardRecord, member: usize) -> Option<u32> {
        let start = member.checked_mul(8)?;
        let digits = record.crc32c.get(start..start.checked_add(8)?)?;
        u32::from_str_radix(digits, 16).ok()
    }
}

/// The digits of `-00001-of-00004`.
fn numbers(rest: &str) -> Option<(&str, &str)> {
    let digits = |text: &str| text.len() >= 5 && text.bytes().all(|b| b.is_ascii_digit());
    let numbers = rest.strip_prefix('-')?.split_once("-of-");
    numbers.filter(|(number, of)| digits(number) && digits(of))
}
