//! Where each sample lies: DALI's text index, read fast and checked against the shard.
//!
//! The layout is that of DALI's `wds2idx` version 1.2: a first line `v1.2 SAMPLES`, then a line a
//! sample with `EXTENSION OFFSET SIZE NAME` for each of its members, in order, all separated by one
//! space. OFFSET is where the member's payload starts, a multiple of 512.
//!
//! Members belong together as in WebDataset: neighbours whose names agree up to the first dot of
//! their last component, the key. Files without a dot or without anything in front of it, and
//! `__meta__` names, belong to no sample.
//!
//! The picture of a sample is its `.jpg`, `.jpeg` or `.png`, in this order of preference; without one of
//! these, the only member whose extension ends in one of them (`left.jpg`). A sample without a
//! picture, or that is damaged in another way, keeps its place in the table: whoever reads it is told
//! what is wrong, and the others are read.

mod builder;
mod ends;
mod table;
mod text;

use std::path::{Path, PathBuf};

use thiserror::Error;

use super::map::Map;
use super::tar;
use super::{SampleFault, ShardError, StaleFault};

pub use self::ends::Ends;
pub use self::table::Table;
pub(crate) use self::table::{Listed, listed};
pub use self::text::IndexText;
pub(crate) use self::text::ends;

/// First word of an index.
pub const VERSION: &str = "v1.2";

/// What is wrong with a line of an index.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IndexFault {
    /// Not text.
    #[error("not UTF-8")]
    Text,
    /// Not the version this program reads.
    #[error("`{found}` where `{VERSION} SAMPLES` was expected")]
    Version {
        /// The line, shortened.
        found: String,
    },
    /// Other than the promised number of lines.
    #[error("the first line promises {promised} samples, there are {found}")]
    Count {
        /// Samples by the first line.
        promised: u64,
        /// Samples found.
        found: u64,
    },
    /// A member is not `EXTENSION OFFSET SIZE NAME`.
    #[error("member {member} of the line is not `EXTENSION OFFSET SIZE NAME`")]
    Member {
        /// Which member, counted from 1.
        member: u64,
    },
    /// An offset where no payload can start.
    #[error("offset {offset} is no multiple of 512, or 0")]
    Offset {
        /// The offset.
        offset: u64,
    },
    /// Members of two samples in one line.
    #[error("`{name}` does not belong to sample `{key}`")]
    Stranger {
        /// Name of the member.
        name: String,
        /// Key of the line's first member.
        key: String,
    },
    /// The sample itself is at fault.
    #[error("sample `{key}`: {fault}")]
    Sample {
        /// Its key.
        key: String,
        /// What is wrong.
        fault: SampleFault,
    },
}

/// Bytes of a shard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub size: u64,
}

/// Where a sample's members lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The sample's key.
    pub key: &'a str,
    /// The image.
    pub image: Span,
    /// The class number, as text.
    pub class: Option<Span>,
}

/// Checks that a member lies where its index says: a header stands in front of it and names its size.
///
/// # Errors
///
/// What stands there instead.
pub fn check_header(bytes: &[u8], span: Span) -> Result<(), StaleFault> {
    let offset = span.offset;
    let (flag, actual) =
        tar::header_before(bytes, offset).map_err(|fault| StaleFault::Header { offset, fault })?;
    // A pax size replaces the field, which then holds 0 or the low digits: only walking tells.
    let replaced = actual != span.size && (actual == 0 || span.size > tar::SIZE_MAX);
    if !matches!(flag, 0 | b'0' | b'7') || (actual != span.size && !replaced) {
        return Err(StaleFault::Size { offset, indexed: span.size, actual });
    }
    Ok(())
}

/// As [`check_header`], with the error that names the index.
pub(crate) fn member_in_place(map: &Map, span: Span) -> Result<(), ShardError> {
    check_header(map.bytes(), span).map_err(|fault| ShardError::Disagree {
        index: map.path().with_extension("idx"),
        shard: map.path().to_path_buf(),
        fault,
    })
}

/// Splits a member's name into key and extension at the first dot of its last component.
///
/// `None` for names that belong to no sample: without a dot, with nothing in front of it, or
/// `__meta__` (Python's `webdataset` skips these too).
///
/// ```
/// use detco_shards::format::index::split_name;
/// assert_eq!(split_name("a.b/c.seg.png"), Some(("a.b/c", "seg.png")));
/// assert_eq!(split_name("a/.hidden"), None);
/// ```
pub fn split_name(name: &str) -> Option<(&str, &str)> {
    let base = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = base + name[base..].find('.')?;
    if dot == base || is_meta(name) {
        return None;
    }
    Some((&name[..dot], &name[dot + 1..]))
}

/// Whether Python's `webdataset` takes the name for meta data: its first component is `__…__`.
pub(crate) fn is_meta(name: &str) -> bool {
    let first = name.split('/').next().unwrap_or(name);
    first.len() >= 4 && first.starts_with("__") && first.ends_with("__")
}

/// All `.tar` files of a folder, sorted, hidden ones left out.
pub(crate) fn shards_in(folder: &Path) -> Result<Vec<PathBuf>, ShardError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(ShardError::io(folder, "list"))? {
        let path = entry.map_err(ShardError::io(folder, "list"))?.path();
        let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|extension| extension == "tar") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
