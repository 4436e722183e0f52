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

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::map::Map;
use super::tar::{self, BLOCK, Kind, Walker};
use super::{SampleFault, ShardError, StaleFault};

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

/// Where the samples of a shard lie: 20 bytes and the key for each, and 24 bytes for each member that is
/// neither the image nor the class.
#[derive(Debug, Clone, Default)]
pub struct Table {
    rows: Vec<Row>,
    keys: String,
    /// In the order of the samples.
    others: Vec<Other>,
    /// Lower case, each once.
    extensions: Vec<String>,
    /// Samples that cannot be used, by position.
    bad: Vec<Bad>,
    /// Samples with more than one picture.
    several: u64,
    /// The first of them: its key, the extension that is read, one that is not.
    first_several: Option<(String, String, String)>,
}

/// A member that is neither the image nor the class.
#[derive(Debug, Clone, Copy)]
struct Other {
    /// Position of its sample.
    sample: u32,
    /// Position in the table's extensions.
    extension: u32,
    span: Span,
}

/// A sample that cannot be used.
#[derive(Debug, Clone)]
struct Bad {
    position: usize,
    /// Offset of its first member.
    offset: u64,
    fault: SampleFault,
}

/// Payloads start at multiples of 512, so 32 bits of block number reach 2 TiB.
#[derive(Debug, Clone, Copy)]
struct Row {
    image_block: u32,
    image_size: u32,
    class_block: u32, // 0: none (block 0 is always a header)
    class_size: u32,
    key_end: u32,
}

impl Table {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The sample at a position, from 0.
    pub fn get(&self, position: usize) -> Option<Entry<'_>> {
        let row = self.rows.get(position)?;
        let key_start = position.checked_sub(1).map_or(0, |before| self.rows[before].key_end);
        let span = |block: u32, size: u32| Span {
            offset: u64::from(block) * BLOCK,
            size: u64::from(size),
        };
        Some(Entry {
            key: &self.keys[key_start as usize..row.key_end as usize],
            image: span(row.image_block, row.image_size),
            class: (row.class_block > 0).then(|| span(row.class_block, row.class_size)),
        })
    }

    /// Where the member with this extension lies, of the sample at a position: one that is neither its
    /// image nor its class. Upper and lower case are alike.
    pub fn member(&self, position: usize, extension: &str) -> Option<Span> {
        let sample = u32::try_from(position).ok()?;
        let same = |known: &String| known.eq_ignore_ascii_case(extension);
        let extension = self.extensions.iter().position(same)? as u32;
        let first = self.others.partition_point(|other| other.sample < sample);
        let mut of_sample = self.others[first..].iter().take_while(|other| other.sample == sample);
        of_sample.find(|other| other.extension == extension).map(|other| other.span)
    }

    /// What is wrong with the sample at a position, and the offset of its first member; `None` where
    /// nothing is.
    pub fn fault(&self, position: usize) -> Option<(u64, &SampleFault)> {
        let at = self.bad.binary_search_by_key(&position, |bad| bad.position).ok()?;
        Some((self.bad[at].offset, &self.bad[at].fault))
    }

    /// Positions of the samples that cannot be used, in order.
    pub fn bad(&self) -> impl Iterator<Item = usize> + '_ {
        self.bad.iter().map(|bad| bad.position)
    }

    /// How many samples have more than one picture, and of the first its key, the extension that is
    /// read and one that is not.
    pub fn several(&self) -> Option<(u64, &str, &str, &str)> {
        let (key, taken, other) = self.first_several.as_ref()?;
        Some((self.several, key, taken, other))
    }

    /// Walks a shard. Samples that cannot be used are in the table, see [`Table::fault`].
    ///
    /// # Errors
    ///
    /// The shard is no tar.
    pub fn walk(map: &Map) -> Result<Table, ShardError> {
        let members = listed(map.bytes())
            .map(|member| member.map_err(|error| ShardError::tar(map.path(), error)));
        let (table, _) = Table::of_members(map.path(), members)?;
        Ok(table)
    }

    /// Makes the table of a shard's members, in their order, and says where they begin and end. Each
    /// has the bytes of its payload, which lie inside the shard.
    ///
    /// # Errors
    ///
    /// What `members` says.
    pub(crate) fn of_members<'a>(
        shard: &Path,
        members: impl Iterator<Item = Result<Listed<'a>, ShardError>>,
    ) -> Result<(Table, Ends), ShardError> {
        let mut builder = Builder::default();
        let fault = |at: Fault| at.of(shard);
        for member in members {
            let Listed { name, span, link } = member?;
            builder.push(&name, span, link.as_deref()).map_err(fault)?;
        }
        builder.close().map_err(fault)?;
        let ends = Ends { first: builder.first, end: builder.end };
        Ok((builder.table, ends))
    }

    /// Reads the text of an index and checks it against its shard: every member lies inside, none
    /// overlaps another, the first and the last are where the shard has them, and nothing follows
    /// the last. What lies between is checked when a sample is read ([`check_header`]).
    ///
    /// # Errors
    ///
    /// [`ShardError::Index`] for a text that is no index or names a sample that cannot be used,
    /// [`ShardError::Disagree`] for one that describes another shard.
    pub fn read(text: &[u8], index: &Path, map: &Map) -> Result<Table, ShardError> {
        let (table, ends) = Table::parse(text, index, map.path(), map.bytes().len() as u64)?;
        if let Some(bad) = table.bad.first() {
            let key =
                table.get(bad.position).map_or_else(String::new, |entry| entry.key.to_owned());
            let fault = IndexFault::Sample { key, fault: bad.fault.clone() };
            // The first line has no sample.
            let line = bad.position as u64 + 2;
            return Err(ShardError::Index { index: index.to_path_buf(), line, fault });
        }
        ends.check(map.bytes(), index, map.path())?;
        Ok(table)
    }

    /// As [`Table::read`], with the samples that cannot be used in the table: see [`Table::fault`].
    ///
    /// # Errors
    ///
    /// As [`Table::read`], but for single samples.
    pub fn read_all(text: &[u8], index: &Path, map: &Map) -> Result<Table, ShardError> {
        let (table, ends) = Table::parse(text, index, map.path(), map.bytes().len() as u64)?;
        ends.check(map.bytes(), index, map.path())?;
        Ok(table)
    }

    /// Whether a text claims to be an index of this version; other programs, and other versions of
    /// DALI's, put files of the same name beside their shards.
    pub fn is_index(text: &[u8]) -> bool {
        let first = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let count = first.strip_prefix(VERSION.as_bytes()).and_then(|rest| rest.strip_prefix(b" "));
        count.is_some_and(|count| !count.ends_with(b"\r"))
    }

    /// Reads the text of an index whose shard of `bytes` bytes is not at hand yet: what
    /// [`Table::read`] checks, but for what only the shard tells, which is left to [`Ends::check`].
    ///
    /// # Errors
    ///
    /// As [`Table::read`].
    pub fn parse(
        text: &[u8],
        index: &Path,
        shard: &Path,
        bytes: u64,
    ) -> Result<(Table, Ends), ShardError> {
        let wrong = |line: u64, fault: IndexFault| ShardError::Index {
            index: index.to_path_buf(),
            line,
            fault,
        };
        let disagree = |fault: StaleFault| ShardError::Disagree {
            index: index.to_path_buf(),
            shard: shard.to_path_buf(),
            fault,
        };
        let text = std::str::from_utf8(text).map_err(|error| {
            let before = &text[..error.valid_up_to()];
            let line = before.iter().filter(|byte| **byte == b'\n').count();
            wrong(line as u64 + 1, IndexFault::Text)
        })?;
        let mut lines = text.split_terminator('\n');
        let first = lines.next().unwrap_or("");
        let version = || IndexFault::Version { found: first.chars().take(40).collect() };
        let promised = first
            .strip_prefix(VERSION)
            .and_then(|rest| rest.strip_prefix(' '))
            .and_then(|count| tar::decimal(count.as_bytes()))
            .ok_or_else(|| wrong(1, version()))?;

        let mut builder = Builder::default();
        // A line has at least 20 bytes, so a lie in the first line reserves no more than the text.
        let lines_max = (text.len() / 20).min(usize::try_from(promised).unwrap_or(usize::MAX));
        builder.table.rows.reserve_exact(lines_max);
        let mut found = 0;
        for (number, line) in (2..).zip(lines) {
            found += 1;
            let mut rest = Some(line);
            let mut member = 0;
            while let Some(text) = rest {
                member += 1;
                let Some((Span { offset, size }, name, after)) = first_member(text) else {
                    return Err(wrong(number, IndexFault::Member { member }));
                };
                rest = after;
                if offset % BLOCK != 0 || offset == 0 {
                    return Err(wrong(number, IndexFault::Offset { offset }));
                }
                let end = offset.saturating_add(size);
                if end > bytes {
                    let fault = StaleFault::Outside { line: number, offset, end, bytes };
                    return Err(disagree(fault));
                }
                if member > 1 && builder.starts_another(name) {
                    let key = builder.open_key().to_owned();
                    let name = name.to_owned();
                    return Err(wrong(number, IndexFault::Stranger { name, key }));
                }
                builder.push(name.as_bytes(), Span { offset, size }, None).map_err(|at| {
                    wrong(number, IndexFault::Sample { key: at.key, fault: at.fault })
                })?;
            }
            builder
                .close()
                .map_err(|at| wrong(number, IndexFault::Sample { key: at.key, fault: at.fault }))?;
        }
        if found != promised {
            return Err(wrong(1, IndexFault::Count { promised, found }));
        }
        let ends = Ends { first: builder.first, end: builder.end };
        let mut table = builder.table;
        table.keys.shrink_to_fit();
        table.others.shrink_to_fit();
        Ok((table, ends))
    }
}

/// A member of a shard that may belong to a sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed<'a> {
    pub(crate) name: Cow<'a, [u8]>,
    pub(crate) span: Span,
    /// Where it leads, if it is a link.
    pub(crate) link: Option<Cow<'a, [u8]>>,
}

/// The members of a shard that may belong to samples: its files and links, in their order.
pub(crate) fn listed(shard: &[u8]) -> impl Iterator<Item = Result<Listed<'_>, tar::TarError>> {
    Walker::new(shard).filter_map(|member| {
        let member = match member {
            Ok(member) => member,
            Err(error) => return Some(Err(error)),
        };
        let span = Span { offset: member.data, size: member.payload.len() as u64 };
        let link = match member.kind {
            Kind::File => None,
            Kind::HARD_LINK | Kind::SYMLINK => Some(member.link),
            _ => return None,
        };
        Some(Ok(Listed { name: member.name, span, link }))
    })
}

/// Where an index says that the members of its shard begin and end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ends {
    /// The first member of all.
    first: Span,
    /// End of the last one, padding included.
    end: u64,
}

impl Ends {
    /// The shard's first member is the index's first, and after the index's last only the end
    /// follows.
    ///
    /// # Errors
    ///
    /// [`ShardError::Disagree`] otherwise.
    pub fn check(&self, bytes: &[u8], index: &Path, shard: &Path) -> Result<(), ShardError> {
        check_ends(bytes, self).map_err(|fault| ShardError::Disagree {
            index: index.to_path_buf(),
            shard: shard.to_path_buf(),
            fault,
        })
    }
}

/// The first member of a line of an index: its bytes, its name, and the rest of the line. The name ends
/// where its extension does, so that it may hold blanks.
fn first_member(line: &str) -> Option<(Span, &str, Option<&str>)> {
    let (extension, rest) = line.split_once(' ')?;
    let (offset, rest) = rest.split_once(' ')?;
    let (size, rest) = rest.split_once(' ')?;
    let span =
        Span { offset: tar::decimal(offset.as_bytes())?, size: tar::decimal(size.as_bytes())? };
    let ends = rest.match_indices(' ').map(|(at, _)| at).chain([rest.len()]);
    for end in ends {
        let name = &rest[..end];
        if name.strip_suffix(extension).is_some_and(|front| front.ends_with('.')) {
            return Some((span, name, rest.get(end + 1..)));
        }
    }
    None
}

fn check_ends(bytes: &[u8], ends: &Ends) -> Result<(), StaleFault> {
    let unindexed = |member: &tar::Member<'_>| {
        let name = String::from_utf8_lossy(&member.name).into_owned();
        StaleFault::Unindexed { name, offset: member.data }
    };
    let header = |error: tar::TarError| StaleFault::Header {
        offset: error.offset.saturating_add(BLOCK),
        fault: error.fault,
    };
    for member in Walker::new(bytes) {
        let member = member.map_err(header)?;
        if member.data == ends.first.offset {
            let (indexed, actual) = (ends.first.size, member.payload.len() as u64);
            if indexed != actual {
                let offset = member.data;
                return Err(StaleFault::Size { offset, indexed, actual });
            }
            break;
        }
        if belongs(&member) {
            return Err(unindexed(&member));
        }
    }
    for member in Walker::at(bytes, ends.end) {
        let member = member.map_err(header)?;
        if belongs(&member) {
            return Err(unindexed(&member));
        }
    }
    Ok(())
}

/// Whether the member is part of a sample.
fn belongs(member: &tar::Member<'_>) -> bool {
    member.kind == Kind::File
        && std::str::from_utf8(&member.name).is_ok_and(|name| split_name(name).is_some())
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

/// A fault of a sample while a table is built.
struct Fault {
    key: String,
    offset: u64,
    fault: SampleFault,
}

impl Fault {
    fn of(self, shard: &Path) -> ShardError {
        let Fault { key, offset, fault } = self;
        ShardError::Sample { shard: shard.to_path_buf(), key, offset, fault }
    }
}

/// Builds a [`Table`] from members in order.
#[derive(Default)]
struct Builder {
    table: Table,
    /// Where the open sample's key starts in `table.keys`; the open sample is not a row yet.
    key_start: usize,
    open: Option<Open>,
    /// The open sample's extensions, lower case, each followed by a newline.
    extensions: String,
    /// The table's extensions and their positions.
    interned: HashMap<String, u32>,
    /// End of the last member, padding included.
    end: u64,
    /// The first member of all.
    first: Span,
}

/// Members of the sample being built.
struct Open {
    offset: u64,
    members: u64,
    /// Its place among [`IMAGES`], bytes.
    image: Option<(usize, Span)>,
    class: Option<Span>,
    /// The first fault that makes it unusable.
    fault: Option<SampleFault>,
    /// Pictures under longer extensions, such as `left.jpg`: how many, and the first.
    long: u64,
    first_long: Option<(String, Span)>,
    /// The extension of a picture in a format that is not read.
    other: Option<String>,
}

/// Members of a sample: each is compared with those before it.
const MEMBERS_MAX: u64 = 4096;

/// Extensions that hold the image, the preferred first.
const IMAGES: [&str; 3] = ["jpg", "jpeg", "png"];

impl Open {
    /// Takes note of a member by its extension, in lower case.
    fn take(&mut self, extension: &str, span: Span) {
        let last = extension.rsplit('.').next().unwrap_or(extension);
        if let Some(rank) = IMAGES.iter().position(|image| *image == extension) {
            if self.image.is_none_or(|(other, _)| rank < other) {
                self.image = Some((rank, span));
            }
        } else if extension == "cls" {
            self.class = Some(span);
        } else if IMAGES.contains(&last) {
            self.long += 1;
            self.first_long.get_or_insert_with(|| (extension.to_owned(), span));
        } else if super::name::is_picture_extension(last.as_bytes()) {
            self.other.get_or_insert_with(|| extension.to_owned());
        }
    }

    /// The picture: extension and bytes.
    fn picture(&self, key: &str) -> Result<(&str, Span), SampleFault> {
        match (&self.fault, &self.image, &self.first_long) {
            (Some(fault), ..) => Err(fault.clone()),
            (None, Some((rank, span)), _) => Ok((IMAGES[*rank], *span)),
            (None, None, Some((extension, span))) if self.long == 1 => Ok((extension, *span)),
            (None, None, Some((extension, _))) => Err(SampleFault::Dots {
                key: key.to_owned(),
                extension: extension.clone(),
                pictures: self.long,
            }),
            (None, None, None) => Err(self.other.as_ref().map_or(SampleFault::NoImage, |other| {
                SampleFault::OtherFormat { extension: other.clone() }
            })),
        }
    }

    /// A picture beside the one that is read.
    fn beside<'a>(&'a self, taken: &str, extensions: &'a str) -> Option<&'a str> {
        extensions.split_terminator('\n').find(|other| {
            let last = other.rsplit('.').next().unwrap_or(other);
            *other != taken && IMAGES.contains(&last)
        })
    }
}

impl Builder {
    fn open_key(&self) -> &str {
        &self.table.keys[self.key_start..]
    }

    fn starts_another(&self, name: &str) -> bool {
        self.open.is_some() && split_name(name).is_some_and(|(key, _)| key != self.open_key())
    }

    /// Adds a member, which is a link to elsewhere where `link` says so.
    fn push(&mut self, name: &[u8], span: Span, link: Option<&[u8]>) -> Result<(), Fault> {
        let text = String::from_utf8_lossy(name);
        let Some((key, extension)) = split_name(&text) else { return Ok(()) };
        if self.open.is_none() || key != self.open_key() {
            self.close()?;
            self.key_start = self.table.keys.len();
            self.table.keys.push_str(key);
            self.extensions.clear();
            self.open = Some(Open {
                offset: span.offset,
                members: 0,
                image: None,
                class: None,
                fault: None,
                long: 0,
                first_long: None,
                other: None,
            });
        }
        // The header in front of the payload needs a block too.
        if span.offset < self.end + BLOCK {
            let fault = SampleFault::Overlap { end: self.end };
            return Err(Fault { key: key.to_owned(), offset: span.offset, fault });
        }
        if self.first.offset == 0 {
            self.first = span;
        }
        // Cannot wrap: the caller has seen the span inside the shard.
        self.end = (span.offset + span.size).next_multiple_of(BLOCK);
        let Some(open) = &mut self.open else { return Ok(()) };
        open.members += 1;
        if open.members > MEMBERS_MAX {
            let (what, value) = ("the number of its members", open.members);
            let limit = MEMBERS_MAX;
            open.fault.get_or_insert(SampleFault::TooLarge { what, value, limit });
            return Ok(());
        }
        if matches!(text, Cow::Owned(_)) {
            open.fault.get_or_insert(SampleFault::Name);
        }
        let seen = self.extensions.len();
        self.extensions.push_str(extension);
        self.extensions[seen..].make_ascii_lowercase();
        let (before, extension) = self.extensions.split_at(seen);
        if before.split_terminator('\n').any(|other| other == extension) {
            let extension = extension.to_owned();
            open.fault.get_or_insert(SampleFault::DuplicateMember { extension });
        }
        match link {
            None => {
                let before = open.image;
                open.take(extension, span);
                let other = match IMAGES.iter().position(|image| *image == extension) {
                    Some(rank) if open.image == Some((rank, span)) => {
                        before.map(|(rank, span)| (IMAGES[rank], span))
                    }
                    None if extension == "cls" => None,
                    _ => Some((extension, span)),
                };
                if let Some((extension, span)) = other {
                    let sample = self.table.rows.len() as u32; // `close` sees to it that it fits
                    let known = self.interned.get(extension).copied();
                    let extension = known.unwrap_or_else(|| {
                        let number = self.table.extensions.len() as u32;
                        self.table.extensions.push(extension.to_owned());
                        self.interned.insert(extension.to_owned(), number);
                        number
                    });
                    self.table.others.push(Other { sample, extension, span });
                }
            }
            Some(target) => {
                let last = extension.rsplit('.').next().unwrap_or(extension);
                if last == "cls" || IMAGES.contains(&last) {
                    let target = String::from_utf8_lossy(target).into_owned();
                    let name = text.to_string();
                    open.fault.get_or_insert(SampleFault::Link { name, target });
                }
            }
        }
        self.extensions.push('\n');
        Ok(())
    }

    fn close(&mut self) -> Result<(), Fault> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let key = &self.table.keys[self.key_start..];
        let limit = u64::from(u32::MAX);
        let too_large = |what, value: u64| SampleFault::TooLarge { what, value, limit };
        let small = |what, value: u64| u32::try_from(value).map_err(|_| too_large(what, value));
        let row = |image: Span, class: Span, key_end| {
            Ok::<Row, SampleFault>(Row {
                image_block: small("the image's block", image.offset / BLOCK)?,
                image_size: small("the image's size", image.size)?,
                class_block: small("the class's block", class.offset / BLOCK)?,
                class_size: small("the class's size", class.size)?,
                key_end,
            })
        };
        let key_end = small("the length of all keys", self.table.keys.len() as u64)
            .map_err(|fault| Fault { key: key.to_owned(), offset: open.offset, fault })?;
        let class = open.class.unwrap_or_default();
        let picture = open.picture(key);
        let made =
            picture.and_then(|(extension, image)| Ok((extension, row(image, class, key_end)?)));
        let made = match made {
            Ok((extension, row)) => {
                if let Some(other) = open.beside(extension, &self.extensions) {
                    let first = || (key.to_owned(), extension.to_owned(), other.to_owned());
                    self.table.first_several.get_or_insert_with(first);
                    self.table.several += 1;
                }
                row
            }
            Err(fault) => {
                let (position, offset) = (self.table.rows.len(), open.offset);
                self.table.bad.push(Bad { position, offset, fault });
                Row { image_block: 0, image_size: 0, class_block: 0, class_size: 0, key_end }
            }
        };
        self.table.rows.push(made);
        Ok(())
    }
}

/// Where the members of a shard end, padding included, by the text of its index, up to what is none.
pub(crate) fn ends(text: &[u8]) -> Vec<u64> {
    let end = |words: &[&str]| {
        let number = |at: usize| words.get(at).and_then(|word| tar::decimal(word.as_bytes()));
        number(1)?.checked_add(number(2)?)?.checked_next_multiple_of(BLOCK)
    };
    let mut ends = Vec::new();
    for line in std::str::from_utf8(text).unwrap_or_default().lines().skip(1) {
        let words: Vec<&str> = line.split(' ').collect();
        ends.extend(words.chunks(4).map_while(end));
    }
    ends
}

/// Writes the text of an index, member by member.
#[derive(Debug, Clone, Default)]
pub struct IndexText {
    samples: u64,
    lines: String,
    key: String,
}

impl IndexText {
    /// Adds a member; members of a sample are neighbours. Names that belong to no sample are left
    /// out.
    pub fn push(&mut self, name: &str, span: Span) {
        let Some((key, extension)) = split_name(name) else { return };
        if self.samples == 0 || key != self.key {
            if self.samples > 0 {
                self.lines.push('\n');
            }
            self.samples += 1;
            key.clone_into(&mut self.key);
        } else {
            self.lines.push(' ');
        }
        // Writing into a String cannot fail.
        let _ = write!(self.lines, "{extension} {} {} {name}", span.offset, span.size);
    }

    /// Samples so far.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// The whole text.
    pub fn finish(self) -> String {
        let end = if self.samples > 0 { "\n" } else { "" };
        format!("{VERSION} {}\n{}{end}", self.samples, self.lines)
    }

    /// The text for a shard, found by walking it.
    ///
    /// # Errors
    ///
    /// The bytes are no tar.
    pub fn of(bytes: &[u8]) -> Result<IndexText, tar::TarError> {
        let mut text = IndexText::default();
        for member in Walker::new(bytes) {
            let member = member?;
            if member.kind == Kind::File
                && let Ok(name) = std::str::from_utf8(&member.name)
            {
                text.push(name, Span { offset: member.data, size: member.payload.len() as u64 });
            }
        }
        Ok(text)
    }
}
