//! A sample, and the map that it is a slice of.

use std::ops::{Deref, Range};
use std::sync::Arc;

use super::Shard;
use super::remote::PinnedShard;
use crate::format::ShardError;
use crate::format::index::Span;
use crate::format::map::Map;

/// A shard's map while it is read.
#[derive(Debug, Clone)]
pub(super) enum Lease<'a> {
    /// Of a local shard, which stays mapped.
    Lent(&'a Map),
    /// Of a cached shard, pinned against eviction.
    Pinned(Arc<PinnedShard>),
}

impl Deref for Lease<'_> {
    type Target = Map;

    fn deref(&self) -> &Map {
        match self {
            Lease::Lent(map) => map,
            Lease::Pinned(held) => held,
        }
    }
}

/// A sample, borrowed from its shard.
#[derive(Debug, Clone)]
pub struct Sample<'a> {
    /// Its number in the set.
    pub id: u64,
    /// Position of its shard in [`ShardSet::shards`](super::ShardSet::shards).
    pub shard: usize,
    /// Its position in the shard.
    pub index: usize,
    /// Its key: the path without extension it was packed from.
    pub key: &'a str,
    /// Byte offset of the image in the shard.
    pub offset: u64,
    pub(super) from: &'a Shard,
    /// Its `.cls` member, which only [`Sample::class`] reads.
    pub(super) class: Option<Span>,
    pub(super) map: Lease<'a>,
    /// The image in the map.
    pub(super) image: Range<usize>,
}

impl Sample<'_> {
    /// The image file: a slice of the map. JPEG, or PNG in foreign shards.
    pub fn jpeg(&self) -> &[u8] {
        &self.map.bytes()[self.image.clone()]
    }

    /// Its class number; `None` without a `.cls` member. The member is read only here, so its content never
    /// makes a sample bad for training, which needs no class.
    ///
    /// # Errors
    ///
    /// The member holds no class number ([`SampleFault::Class`](crate::format::SampleFault::Class)), does not lie where the index says,
    /// or the shard changed since it was opened.
    pub fn class(&self) -> Result<Option<u32>, ShardError> {
        self.from.class(&self.map, self.key, self.class)
    }

    /// Another of its members by extension, such as `json`, `txt` or `seg.png`: a slice of the map. `None` if
    /// there is none, and for the image, which [`Sample::jpeg`] gives.
    ///
    /// # Errors
    ///
    /// The member does not lie where the index says, or the shard changed since it was opened.
    pub fn member(&self, extension: &str) -> Result<Option<&[u8]>, ShardError> {
        let span = match extension {
            "cls" => self.class,
            _ => self.from.table.member(self.index, extension),
        };
        let Some(span) = span else { return Ok(None) };
        let range = self.from.span(&self.map, span);
        if range.is_err() {
            self.map.check_file()?
        } else {
            self.map.check()?
        }
        Ok(Some(&self.map.bytes()[range?]))
    }

    /// The address range of the map, for tests that nothing was copied.
    pub fn map_range(&self) -> Range<*const u8> {
        self.map.bytes().as_ptr_range()
    }
}
