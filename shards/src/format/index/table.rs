//! The table of a shard: where the samples lie, and what is wrong with those that cannot be used.

use std::borrow::Cow;
use std::path::Path;

use super::super::map::Map;
use super::super::tar::{self, BLOCK, Kind, Walker};
use super::super::{SampleFault, ShardError};
use super::builder::{Builder, Fault};
use super::{Ends, Entry, IndexFault, Span, VERSION};

/// Where the samples of a shard lie: 20 bytes and the key for each, and 24 bytes for each member that is
/// neither the image nor the class.
#[derive(Debug, Clone, Default)]
pub struct Table {
    pub(super) rows: Vec<Row>,
    pub(super) keys: String,
    /// In the order of the samples.
    pub(super) others: Vec<Other>,
    /// Lower case, each once.
    pub(super) extensions: Vec<String>,
    /// Samples that cannot be used, by position.
    pub(super) bad: Vec<Bad>,
    /// Samples with more than one picture.
    pub(super) several: u64,
    /// The first of them: its key, the extension that is read, one that is not.
    pub(super) first_several: Option<(String, String, String)>,
}

/// A member that is neither the image nor the class.
#[derive(Debug, Clone, Copy)]
pub(super) struct Other {
    /// Position of its sample.
    pub(super) sample: u32,
    /// Position in the table's extensions.
    pub(super) extension: u32,
    pub(super) span: Span,
}

/// A sample that cannot be used.
#[derive(Debug, Clone)]
pub(super) struct Bad {
    pub(super) position: usize,
    /// Offset of its first member.
    pub(super) offset: u64,
    pub(super) fault: SampleFault,
}

/// Payloads start at multiples of 512, so 32 bits of block number reach 2 TiB.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    pub(super) image_block: u32,
    pub(super) image_size: u32,
    pub(super) class_block: u32, // 0: none (block 0 is always a header)
    pub(super) class_size: u32,
    pub(super) key_end: u32,
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
    /// the last. What lies between is checked when a sample is read ([`check_header`](super::check_header)).
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
